"""Matrices in bf16 and fp16 on CPUs without instructions for them: the same numbers, and only there."""

from __future__ import annotations

import pytest
import torch

from tests.support.conversations import HELD_OUT
from tests.support.engine import ask, make_llm, run, run_in_turn
from vllm_bailing import DEMO
from vllm_bailing.processor import quantized_kernels

DTYPES = [torch.bfloat16, torch.float16]
PLAIN = {"bailing_cpu_kernels": False}
SHAPES = [
    # tokens, outputs, inputs, whether there is a bias
    ((1,), 96, 64, False),
    ((4,), 96, 64, True),
    ((5,), 96, 64, True),
    ((3, 7), 96, 64, True),
    ((96,), 96, 64, True),
    ((97,), 96, 64, True),  # more tokens than the kernels of avx2.py get
    ((33,), 1000, 2048, True),  # no multiple of 16 outputs: parts of 256, and a rest
    ((6,), 3, 2**19 + 32, False),  # a part is one output
    ((0,), 96, 64, True),
]


def _products(dtype):
    """For each shape [..., N]: in `dtype`, in fp64, and what the sums of the sizes of all products are."""
    from vllm_bailing.plugin.kernels import cpu_widened

    generator = torch.Generator().manual_seed(0)
    found = []
    for tokens, n, k, has_bias in SHAPES:
        x, weight, bias = (
            torch.randn(*shape, generator=generator).mul(k**-0.25).to(dtype) for shape in ((*tokens, k), (n, k), (n,))
        )
        bias = bias if has_bias else None
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        operation = torch.ops.vllm_bailing.widened_linear
        torch.library.opcheck(operation, (x, weight, bias), test_utils=("test_schema", "test_faketensor"))
        sizes = torch.nn.functional.linear(x.double().abs(), weight.double().abs())
        found.append((cpu_widened.widened_linear(x, weight, bias), exact, sizes))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_fp64_rounded_once(dtype):
    for (result, exact, sizes), shape in zip(run_in_turn(_products, dtype), SHAPES, strict=True):
        assert result.shape == exact.shape and result.dtype == dtype, shape
        # Half a unit of the last place, and what sums in fp32 are off by: a few roundings of what is summed.
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps * sizes
        assert ((result.double() - exact).abs() <= allowed).all(), shape


def _widens(dtype):
    from vllm_bailing.plugin.kernels.cpu_widened import widens

    return widens(dtype)


def _served(dtype, additional, eager):
    """([log-probabilities, tokens], classes of the methods of all layers, `_own`)."""
    import vllm_bailing

    vllm_bailing.register()
    from transformers import AutoTokenizer

    row = HELD_OUT[0]
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    prompt = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
    llm = make_llm(DEMO, dtype=dtype, additional_config=additional, enforce_eager=eager)
    return ask(llm, [prompt])[0], llm.apply_model(_methods)[0], llm.apply_model(_own)[0]


def _methods(model):
    named = ((name, type(getattr(module, "quant_method", None)).__name__) for name, module in model.named_modules())
    return {name: method for name, method in named if method != "NoneType"}


def _can_choose():
    from vllm_bailing.plugin.shims import grouped_topk_for_cpus

    return grouped_topk_for_cpus() is not None


def _own(model):
    """Of a layer: the dtype of its gate, and whether the choice of experts, and the rotation, are those of avx2.py."""
    from vllm_bailing.plugin.kernels import avx2

    layer = model.model.layers[1]
    chooses = getattr(layer.mlp.experts.router, "custom_routing_function", None) is not None
    weight = layer.mlp.gate.weight  # older vLLM leaves an empty one in another dtype where it has packed it
    gate = weight.dtype if weight.numel() else torch.float32
    return gate, chooses, layer.attention.fused_qk_norm_rope is avx2.qk_norm_rope


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_computes_the_same(dtype, eager):
    """Whatever multiplies, routers and rotation are those of avx2.py."""
    (table, tokens), methods, own = run_in_turn(_served, dtype, {}, eager)
    (wanted, wanted_tokens), plain, plain_own = run_in_turn(_served, dtype, PLAIN, eager)
    has_avx2 = not quantized_kernels().obstacle
    gate = torch.bfloat16 if has_avx2 and dtype == torch.bfloat16 else torch.float32
    assert own == (gate, has_avx2 and run_in_turn(_can_choose), has_avx2 and not eager)
    assert plain_own == (torch.float32, False, False)
    if run_in_turn(_widens, dtype):
        assert {methods[name] for name in plain if plain[name] == "UnquantizedLinearMethod"} == {"WidenedLinear"}
        assert methods["lm_head"] == "WidenedHead"
    assert "Widened" not in str(plain)
    assert (table.exp() - wanted.exp()).abs().max() < 0.05
    # Compiled, PyTorch sums up in fp32 too, which may give the very same numbers.
    assert not (eager and torch.equal(table, wanted))
    assert tokens == wanted_tokens


def test_without_a_compiler_it_computes_the_same_in_pytorch():
    if not run_in_turn(_widens, torch.bfloat16):
        pytest.skip("this CPU multiplies bf16 matrices")
    (table, _), methods, own = run(_served, torch.bfloat16, {}, True, env={"CXX": "/nonexistent"})
    (wanted, _), _, _ = run_in_turn(_served, torch.bfloat16, PLAIN, True)
    assert methods["lm_head"] == "WidenedHead" and own == (torch.float32, False, False)
    assert (table.exp() - wanted.exp()).abs().max() < 0.05


def test_fp32_is_left_as_it_is():
    assert not run_in_turn(_widens, torch.float32)
    (_, methods, own) = run_in_turn(_served, torch.float32, {}, True)
    assert "Widened" not in str(methods) and own == (torch.float32, False, False)
