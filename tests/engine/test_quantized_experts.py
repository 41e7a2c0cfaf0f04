"""Where quantized experts land."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.engine import loaded_rank, run_ranks
from tests.support.quantized import quantize, quantize_by_command


def _loaded_experts(rank, ranks, init, model):
    """Expert parameters of the first MoE layer as the loader leaves them, before any kernel repacks them.

    vLLM finds no kernel for them on this machine, so it is spared the choice; nothing is computed.
    """
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, int_wna16
    from vllm.model_executor.layers.quantization import auto_gptq, moe_wna16  # noqa: F401
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors  # noqa: F401

    from vllm_bailing.plugin import checks

    checks._has_amx = lambda: True
    choices = {
        "select_fp8_moe_backend": fp8.Fp8MoeBackend.TRITON,
        "select_int8_moe_backend": int8.Int8MoeBackend.TRITON,
        "select_wna16_moe_backend": int_wna16.WNA16MoEBackend.TRITON,
    }
    stubs = {name: lambda *args, backend=backend, **kwargs: (backend, None) for name, backend in choices.items()}
    stubs["init_fp8_linear_kernel"] = lambda *args, **kwargs: SimpleNamespace(input_quant_key=lambda: None)
    stubs["check_moe_marlin_supports_config"] = lambda *args, **kwargs: True
    for module in list(sys.modules.values()):
        for name, stub in stubs.items():
            if name in getattr(module, "__dict__", {}):
                setattr(module, name, stub)
    module, _ = loaded_rank(rank, ranks, init, {"model": str(model), "tensor_parallel_size": ranks})
    experts = module.model.layers[1].mlp.experts.routed_experts
    found = {name: parameter.data for name, parameter in experts.named_parameters()}
    return {name: data.float() if data.is_floating_point() else data for name, data in found.items()}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", ["fp8", "fp8-tensor", "w8a8", "script-fp8", "script-w4a16", "gptq"])
def test_every_quantized_expert_lands_in_its_slice(scheme, ranks, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "moe_intermediate_size": 256}
    model = make_checkpoint(tmp_path / "model", num_experts=8, n_group=2, **sizes)
    if scheme.startswith("script-"):
        quantize_by_command(model, tmp_path / "out", scheme.removeprefix("script-"), "--group-size", "32")
        model = tmp_path / "out"
    else:
        quantize(model, scheme)
    stored = read_tensors(model)
    found = run_ranks(_loaded_experts, ranks, tmp_path, model)
    prefix = "model.layers.1.mlp.experts"
    leaves = {name.rpartition(".")[2] for name in stored if name.startswith(prefix)} - {"weight_shape", "g_idx"}
    transposed = scheme in ("gptq", "awq")  # inputs first
    for expert in range(8):
        for leaf in leaves:
            gate, up, down = (stored[f"{prefix}.{expert}.{name}_proj.{leaf}"] for name in ("gate", "up", "down"))
            for rank, parameters in enumerate(found):
                w13, w2 = parameters[f"w13_{leaf}"][expert], parameters[f"w2_{leaf}"][expert]
                if gate.dim() == 0:  # one scale for the whole tensor, on every rank
                    assert w13.tolist() == [gate.item(), up.item()] and w2.item() == down.item()
                    continue
                out, into = (1, 0) if transposed else (0, 1)
                halves = [part.chunk(ranks, out)[rank] for part in (gate, up)]
                part = down.chunk(ranks, into)[rank] if down.shape[into] > 1 else down
                if w13.shape != torch.cat(halves, out).shape:  # some of vLLM's kernels want inputs first
                    halves, part = [half.T for half in halves], part.T
                    out = 1 - out
                assert torch.equal(w13.float(), torch.cat(halves, out).float()), (expert, leaf, rank)
                assert torch.equal(w2.float(), part.float()), (expert, leaf, rank)
