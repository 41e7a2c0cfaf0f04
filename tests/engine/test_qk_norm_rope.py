"""The fused kernels for norms and rotation, where they prove equal. That of GPUs has a stand-in."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.support.cases import load_case
from tests.support.engine import EngineError, generate, run, run_in_turn


def stand_in(damage=0.0, fails=False):
    """Puts a kernel in plain PyTorch into vLLM's place, written from its documentation; counts its calls."""
    from vllm_bailing.plugin.kernels import qk_norm_rope

    calls = []

    def fused_qk_norm_rope(qkv, heads, kv_heads, v_heads, size, eps, q_weight, k_weight, cache, is_neox, positions):
        assert is_neox and positions.dtype == torch.int64 and qkv.is_contiguous()
        if fails:
            raise RuntimeError("no kernel image")
        calls.append(len(qkv))
        x = qkv.view(len(qkv), -1, size)
        half = cache.shape[1] // 2
        cos, sin = cache[positions][:, None, :half].float(), cache[positions][:, None, half:].float()
        for head, weight in [*((n, q_weight) for n in range(heads)), *((heads + n, k_weight) for n in range(kv_heads))]:
            y = x[:, head : head + 1].float()
            y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight.float()
            y[..., :half], y[..., half : 2 * half] = (
                y[..., :half] * cos - y[..., half : 2 * half] * sin,
                y[..., half : 2 * half] * cos + y[..., :half] * sin,
            )
            y[..., 2 * half :] += damage
            x[:, head : head + 1] = y.to(qkv.dtype)

    # An operation that torch.compile does not look into, as vLLM's is one.
    schema = (
        "(Tensor(a!) qkv, int heads, int kv_heads, int v_heads, int size, float eps, Tensor q_weight, Tensor k_weight, "
        "Tensor cache, bool is_neox, Tensor positions) -> ()"
    )
    operation = torch.library.custom_op(
        "stand_in::fused_qk_norm_rope", fused_qk_norm_rope, mutates_args=["qkv"], schema=schema
    )

    qk_norm_rope._kernel = lambda: operation
    qk_norm_rope._obstacle = lambda *_: ""
    return calls


def _served(folder, prompt, additional=None, eager=True, **kernel):
    import vllm_bailing

    vllm_bailing.register()
    calls = stand_in(**kernel)
    table, _ = generate(folder, [prompt], enforce_eager=eager, additional_config=additional or {})[0]
    return table, len(calls)


def prompt_of(case):
    folder, tensors = load_case(case)
    return folder, tensors["input_ids"].reshape(-1, tensors["input_ids"].shape[-1])[0].tolist()


@functools.cache
def without_kernel(case, eager=True):
    return run(_served, *prompt_of(case), {"bailing_fused_qk_norm_rope": False}, eager)


@pytest.mark.parametrize("case, eager", [("plain", True), ("yarn", True), ("full_rope", True), ("plain", False)])
def test_the_kernel_is_used_where_it_proves_equal(case, eager):
    wanted, unused = without_kernel(case, eager)
    table, used = run(_served, *prompt_of(case), eager=eager)
    assert not unused and used > 2
    # In fp32, which the real kernel does not take: in bf16 the two differ by a rounding.
    torch.testing.assert_close(table, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kernel", [{"damage": 0.25}, {"fails": True}])
def test_a_kernel_that_differs_or_fails_is_left_alone(kernel):
    folder, prompt = prompt_of("plain")
    wanted, _ = without_kernel("plain")
    table, used = run(_served, folder, prompt, **kernel)
    assert used <= 1 and torch.equal(table, wanted)
    reason = "differs by up to" if "damage" in kernel else "no kernel image"
    with pytest.raises(
        EngineError, match=f"bailing_fused_qk_norm_rope=true in --additional-config: the kernel .*{reason}"
    ):
        run(_served, folder, prompt, {"bailing_fused_qk_norm_rope": True}, **kernel)


def _plainly_served(folder, prompt, additional=None, **options):
    table, _ = generate(folder, [prompt], additional_config=additional or {}, **options)[0]
    return table


def test_what_the_kernel_cannot_is_said():
    for case, options, reason in (
        ("no_qk_norm", {}, "no norms"),
        ("plain", {"enforce_eager": False}, "torch.compile fuses them"),
    ):
        folder, prompt = prompt_of(case)
        with pytest.raises(EngineError, match=reason):
            run(_plainly_served, folder, prompt, {"bailing_fused_qk_norm_rope": True}, **options)
    with pytest.raises(EngineError, match="bailing_fused_qk_norm_rope='yes' in --additional-config must be true or"):
        run(_plainly_served, folder, prompt, {"bailing_fused_qk_norm_rope": "yes"})


@pytest.mark.parametrize("case", ["plain", "yarn", "full_rope"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_that_of_cpus_computes_what_the_layers_compute(case, dtype):
    folder, prompt = prompt_of(case)
    wanted = run_in_turn(_plainly_served, folder, prompt, {"bailing_fused_qk_norm_rope": False}, dtype=dtype)
    table = run_in_turn(_plainly_served, folder, prompt, {"bailing_fused_qk_norm_rope": True}, dtype=dtype)
    # In bf16 the order of a sum still tells: a last bit that differs may choose another expert at a position.
    apart = (table - wanted).abs().amax(-1) > (2e-3 if dtype == "bfloat16" else 1e-5)
    assert apart.float().mean() <= (0.05 if dtype == "bfloat16" else 0)
