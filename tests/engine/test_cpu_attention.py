"""Attention, and whole layers, in one or two operations: what vLLM's operations give, and those where it may not be."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from tests.engine.test_avx2 import EVERY, _stack
from tests.support.checkpoints import PROMPT, make_checkpoint, plain_answer
from tests.support.cpu_kernels import AVX2, NEEDS_AVX2, NEEDS_VNNI, VNNI, use
from tests.support.engine import EngineError, ask, make_llm, run, run_in_turn
from tests.support.quantized import plain_copy, quantize_by_command
from tests.support.speculation import mtp
from tests.support.versions import since
from vllm_bailing.processor import instructions

pytestmark = [NEEDS_AVX2, since("0.32", "attention for CPUs with these arguments")]
SIZES = {"head_dim": 32, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
# One that takes several steps to read, one with a past, one that ends within a block of the cache. Not one token first:
# vLLM's mode for tests compiles for the size that it meets first.
PROMPTS = [PROMPT * 3, PROMPT * 3 + PROMPT[:5], PROMPT[:37], PROMPT[:1]]
OFF = {"bailing_cpu_kernels": False}


def _answers(model, patched=None, **options):
    """[log-probabilities, tokens] of each prompt, tokens of all at once, and what ran: "attention", "layer"."""
    import vllm_bailing

    vllm_bailing.register()
    from vllm_bailing.plugin.kernels import avx2, cpu_attention, cpu_layer

    ran = set()
    if patched == "attention":
        cpu_attention._problem = lambda *_: "a test"
    elif patched == "layer":
        cpu_layer.routing_function = lambda *_: None
    elif patched == "damaged":
        plain = avx2.attention
        avx2.attention = lambda *args, **named: plain(*args, **named) * 1.1
    handed, tensors = avx2.hand_over, cpu_layer._tensors
    # A proof hands over for a single layer.
    avx2.hand_over = lambda *args: (ran.update(["attention"] * (len(args[0]) > 1)), handed(*args))
    cpu_layer._tensors = lambda weights: (ran.add("layer"), tensors(weights))[1]
    options = {"dtype": "bfloat16", "enforce_eager": False, "max_num_batched_tokens": 64, **options}
    llm = make_llm(model, **options)
    found = [ask(llm, [prompt], max_tokens=8)[0] for prompt in PROMPTS]
    together = [tokens for _, tokens in ask(llm, PROMPTS, max_tokens=8, logprobs=False)]
    if ran:  # nothing of the engine's is kept
        with pytest.raises(RuntimeError, match="outside of a forward pass"):
            avx2.attention(*_nothing(), scale=1.0, place=0)
    return found, together, ran


def _nothing():
    x, weight = torch.zeros(1, 3 * 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    return x, 1, 1, 32, 1e-6, weight, weight, torch.ones(4, 32), torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize(
    "options",
    [{"enable_prefix_caching": True, "block_size": 32}, {"dtype": "float16"}, {"speculative_config": mtp(2)}],
    ids=["cached", "fp16", "drafted"],
)
def test_attention_is_that_of_vllms_operations(options, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1, **SIZES)
    ours, together, ran = run(_answers, model, **options)
    plain, wanted, without = run(_answers, model, "attention", **options)
    assert ran == {"attention"} and not without
    assert together == wanted
    for (table, tokens), (expected, right) in zip(ours, plain, strict=True):
        assert tokens == right
        assert torch.equal(table, expected)  # the same kernels, on the same numbers


@pytest.mark.parametrize(
    "options",
    [{"enforce_eager": True}, {"additional_config": OFF}, {"kv_cache_dtype": "fp8"}, {"dtype": "float32"}],
    ids=["eager", "off", "fp8 cache", "fp32"],
)
def test_attention_stays_in_vllms_operations(options, tmp_path):
    if "kv_cache_dtype" in options and "AVX-512" not in instructions():
        pytest.skip("vLLM has a KV cache in fp8 for CPUs with AVX-512 alone")
    assert not run(_answers, make_checkpoint(tmp_path, **SIZES), **options)[2]


def test_attention_that_is_wrong_is_not_used(tmp_path):
    model = make_checkpoint(tmp_path, **SIZES)
    found, _, ran = run(_answers, model, "damaged")
    assert not ran
    assert torch.equal(found[0][0], run(_answers, model, "attention")[0][0][0])


@pytest.mark.parametrize(
    "shape",
    [{}, {"num_shared_experts": 0}, {"first_k_dense_replace": 0, "num_shared_experts": 2}],
    ids=["shared", "no shared", "no dense layer"],
)
@pytest.mark.parametrize("whose", [AVX2, pytest.param(VNNI, marks=NEEDS_VNNI)])
def test_a_layer_in_two_operations_means_what_the_checkpoint_says(whose, shape, tmp_path):
    sizes = {"moe_intermediate_size": 64, "intermediate_size": 128, "num_experts": 16, **SIZES, **shape}
    model = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1, **sizes)
    meaning = quantize_by_command(model, tmp_path / "out", "w4a16", "--group-size", "32")
    plain = plain_copy(tmp_path / "out", meaning, tmp_path / "plain")
    wanted, _ = plain_answer(plain, PROMPTS[0])
    options = {"speculative_config": mtp(2)}
    ours, _, ran = run(_in_kernels, tmp_path / "out", whose, **options)
    several, _, without = run(_in_kernels, tmp_path / "out", whose, "layer", **options)
    assert (ran, without) == ({"attention", "layer"}, {"attention"})
    errors = [(found[0][0] - wanted).abs().mean() for found in (ours, several)]
    assert errors[0] < 1.1 * errors[1]  # which is what bf16 and the kernels round


def _in_kernels(model, whose, *args, **options):
    use(whose)
    return _answers(model, *args, **options)


KINDS = ["int8", "fp8, blocks", "int4, groups of 32", "int4, groups of 128", "fp8, half blocks"]


def _parts(kind, has_shared, tokens):
    """What half a layer gives, (output, residual stream), and what the operations that it is made of give."""
    from vllm_bailing.plugin.kernels import avx2
    from vllm_bailing.plugin.kernels.cpu_layer import _tensors

    avx2.load()
    torch.manual_seed(0)
    dtype, shared, _ = EVERY[kind]
    hidden, width, experts, rule = 256, 128, 32, (4, 2, 3, True, 2.5)

    def weights(number, n, k):
        return _stack(dtype, shared, number, n, k, "VNNI" in kind)

    dense, w13, w2 = weights(1, hidden, 128), weights(experts, 2 * width, hidden), weights(experts, hidden, width)
    s13, s2 = (weights(1, 4 * width, hidden), weights(1, hidden, 2 * width)) if has_shared else (None, None)
    heads, residual = torch.randn(tokens, 128).bfloat16(), torch.randn(tokens, hidden).bfloat16()
    norm, gate, bias = torch.rand(hidden).bfloat16(), torch.randn(experts, hidden).bfloat16(), torch.randn(experts) / 10
    rows = [1 if one is None else one.rows for one in (dense, w13, w2, s13, s2)]
    found = torch.ops.vllm_bailing.avx2_moe_half(
        heads, residual, _tensors(dense), norm, 1e-6, gate, bias, *rule, *map(_tensors, (w13, w2, s13, s2)), rows
    )
    total = avx2.linear(heads, dense).float() + residual.float()
    x = (total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.float()).bfloat16()
    output = torch.empty_like(x)
    avx2.experts(output, x, w13, w2, *avx2.route(avx2.plain_linear(x.float(), gate), bias, *rule))
    if has_shared:
        gates, ups = avx2.linear(x.float(), s13).chunk(2, dim=-1)
        output = output.float() + avx2.linear(silu(gates) * ups, s2)
    return found, (output, total)


@pytest.mark.parametrize("has_shared", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(f"{one}, VNNI", marks=NEEDS_VNNI) for one in KINDS[2:4])])
def test_half_a_layer_is_what_its_operations_give(kind, has_shared):
    for tokens in (1, 5, 32, 33, 97):
        for found, expected in zip(*run_in_turn(_parts, kind, has_shared, tokens), strict=True):
            assert found.dtype == torch.bfloat16
            assert (found.float() - expected.float()).norm() < 0.01 * expected.float().norm()


def test_both_matrices_of_experts_have_one_format():
    with pytest.raises(EngineError, match="both matrices of experts have to be of one format"):
        run(_mixed)


def _mixed():
    from vllm_bailing.plugin.kernels import avx2

    avx2.load()
    w13, w2 = _stack(torch.int8, 0, 2, 64, 64), _stack(torch.float8_e4m3fn, 128, 2, 64, 32)
    x = torch.zeros(1, 64).bfloat16()
    avx2.experts(x.clone(), x, w13, w2, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))


def _hash_of_graphs(model, patched):
    import vllm_bailing

    vllm_bailing.register()
    from vllm_bailing.plugin.kernels import cpu

    if patched:
        cpu.instructions = lambda: ["SSE"]
    llm = make_llm(model, dtype="bfloat16", enforce_eager=False)
    return llm.llm_engine.vllm_config.compute_hash()


def test_graphs_of_another_processor_are_not_used(tmp_path):
    model = make_checkpoint(tmp_path, **SIZES)
    here, again, elsewhere = (run(_hash_of_graphs, model, patched) for patched in (False, False, True))
    assert here == again != elsewhere
