"""The AVX-512 bf16 kernels, one layer at a time."""

from __future__ import annotations

import pytest
import torch

from tests.support.engine import run, run_in_turn

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    reason="needs a CPU with AVX-512 bf16 and without AMX",
)


def _product(n, k, tokens, bias=False):
    """Relative error of a PackedLinear's product, and the memory that its plain weight still takes."""
    from types import SimpleNamespace

    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_bailing.plugin.kernels.cpu import PackedLinear

    torch.manual_seed(n + k + tokens)
    weight, x = torch.randn(n, k).bfloat16(), torch.randn(tokens, k).bfloat16()
    added = torch.randn(n).bfloat16() if bias else None
    layer = SimpleNamespace(weight=torch.nn.Parameter(weight.clone(), requires_grad=False))
    with set_current_vllm_config(VllmConfig()):
        method = PackedLinear()
        method.process_weights_after_loading(layer)
        found = method.apply(layer, x, added).double()
    wanted = x.double() @ weight.double().t() + (added.double() if bias else 0)
    return float((found - wanted).norm() / wanted.norm()), layer.weight.numel()


@pytest.mark.parametrize("tokens", [1, 4, 5, 33, 300])
@pytest.mark.parametrize("n, k", [(16, 32), (48, 96), (1040, 1056), (24, 32), (32, 48)])
def test_linear_layers_multiply_as_in_fp64(n, k, tokens):
    """The last two shapes are none of the kernel's."""
    error, left = run_in_turn(_product, n, k, tokens)
    assert error < 0.003 and left == 0


def test_a_bias_is_added():
    assert run_in_turn(_product, 64, 64, 7, bias=True)[0] < 0.003


def _experts(tokens, width):
    from vllm_bailing.plugin.kernels import cpu

    torch.manual_seed(tokens)
    hidden, experts, top_k = 64, 8, 3
    w13 = torch.randn(experts, 2 * width, hidden).div(8).bfloat16()
    w2 = torch.randn(experts, hidden, width).div(8).bfloat16()
    x = torch.randn(tokens, hidden).bfloat16()
    weights, ids = torch.rand(tokens, experts).topk(top_k)
    found = torch.empty_like(x)
    pack = torch.ops._C.convert_weight_packed
    cpu._run_experts(found, x, pack(w13), pack(w2), weights, ids.int())
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for row in range(tokens):
        for weight, expert in zip(weights[row], ids[row], strict=True):
            gate, up = (w13[expert].double() @ x[row].double()).chunk(2)
            wanted[row] += weight * (w2[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("width", [32, 96])
def test_experts_compute_as_in_fp64(tokens, width):
    assert run_in_turn(_experts, tokens, width) < 0.006


def _compiled_while_running(folder, damage=None):
    """How many kernels oneDNN compiled while weights were packed, and how many while the layers ran after it.

    oneDNN writes each into a file of the current folder.
    """
    import os
    from types import SimpleNamespace

    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_bailing.plugin.kernels import cpu

    os.chdir(folder)
    if damage:
        setattr(cpu, damage, lambda *_: None)
    inputs, hidden, width, experts, top_k = 128, 96, 64, 8, 2
    layer = SimpleNamespace(weight=torch.nn.Parameter(torch.randn(160, inputs).bfloat16(), requires_grad=False))
    sparse = torch.nn.Module()
    sparse.w13_weight = torch.nn.Parameter(torch.randn(experts, 2 * width, hidden).bfloat16(), requires_grad=False)
    sparse.w2_weight = torch.nn.Parameter(torch.randn(experts, hidden, width).bfloat16(), requires_grad=False)
    kernel = cpu._packed_experts()
    with set_current_vllm_config(VllmConfig()):
        method = cpu.PackedLinear()
        method.process_weights_after_loading(layer)
        kernel.process_weights_after_loading(SimpleNamespace(_pad_moe_intermediate=lambda _: None), sparse)
        before = len(list(folder.iterdir()))
        torch.manual_seed(0)
        for tokens in range(1, 100):
            method.apply(layer, torch.randn(tokens, inputs).bfloat16(), None)
            x = torch.randn(tokens, hidden).bfloat16()
            weights, ids = torch.rand(tokens, experts).topk(top_k)
            kernel.apply(None, torch.empty_like(x), x, sparse.w13_weight, sparse.w2_weight, weights, ids.int())
    return before, len(list(folder.iterdir())) - before


@pytest.mark.parametrize("damage", ["", "_compile_linear", "_compile_experts"])
def test_no_kernel_is_compiled_while_requests_wait(tmp_path, damage):
    before, after = run(_compiled_while_running, tmp_path, damage, env={"ONEDNN_JIT_DUMP": "1"})
    assert before > 0
    assert (after > 0) == bool(damage)
