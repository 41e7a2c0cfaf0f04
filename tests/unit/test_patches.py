"""What is patched in vLLM, on tensors alone."""

from __future__ import annotations

import torch

from tests.support.engine import run


def _low_rank_products():
    """What vLLM's operations for adapters make of rows for the adapters 0, none, and 1; and of all rows for 0 and 1."""
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    from vllm_bailing.plugin import patches

    patches.fix_lora_base_rows_on_cpu()
    torch.manual_seed(0)
    hidden, shrunk = torch.randn(3, 16), torch.randn(3, 4)
    a, b = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 16, 4)
    found = []
    for module in (lora_ops, punica_cpu):
        for indices in ([0, -1, 1], [0, 0, 1]):
            indices = torch.tensor(indices)
            outputs = torch.zeros(3, 4), torch.ones(3, 16), torch.ones(3, 40)
            module.bgmv_shrink(hidden, a, outputs[0], indices, 2.0)
            module.bgmv_expand(shrunk, b, outputs[1], indices, True)
            module.bgmv_expand_slice(shrunk, b, outputs[2], indices, 8, 16, True)
            found.append(outputs)
    products = 2 * hidden[:, None] @ a[[0, 0, 1], 0].mT, shrunk[:, None] @ b[[0, 0, 1], 0].mT
    return found, [product[:, 0] for product in products]


def test_rows_without_an_adapter_stay_as_they_are_among_rows_with_one():
    found, (shrunk, expanded) = run(_low_rank_products)
    for (down, up, part), row in zip(found, (True, False, True, False), strict=True):
        wanted_down, wanted_up = shrunk.clone(), expanded.clone()
        if row:
            wanted_down[1], wanted_up[1] = 0, 0
        torch.testing.assert_close(down, wanted_down)
        torch.testing.assert_close(up, 1 + wanted_up)
        torch.testing.assert_close(part[:, 8:24], 1 + wanted_up)
        assert (part[:, :8] == 1).all() and (part[:, 24:] == 1).all()
