"""Quantized layers on CPUs: in vLLM's kernels for AVX-512 with bf16 and VNNI, and in ours for AVX2 and for VNNI.

On a processor without AVX-512 stand-ins take the place of vLLM's kernels (`support/cpu_stand_ins.py`): everything up to
the kernels is tested then, and not what they compute. Those for AVX2 are always the real ones, and have all linear
layers to do besides.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.checkpoints import PROMPT, make_checkpoint, plain_answer
from tests.support.cpu_kernels import AVX2, AVX512, NEEDS_AVX2, NEEDS_VLLMS, NEEDS_VNNI, VNNI, use
from tests.support.cpu_stand_ins import register
from tests.support.engine import TWO_RANKS, EngineError, ask, generate, make_llm, run
from tests.support.quantized import only_experts, plain_copy, quantize, quantize_by_command
from tests.support.speculation import mtp
from tests.support.versions import since

KNOWN = since("0.32", "quantized experts for CPUs to which a kernel can be given")
SIZES = {"hidden_size": 128, "moe_intermediate_size": 128}
# Parts of a fused layer have to be whole blocks.
BLOCKS = {"intermediate_size": 256, "head_dim": 128, "moe_shared_expert_intermediate_size": 128}
# Each starts an engine, and some tell enough in a usual run.
THOROUGH = pytest.mark.thorough
# How far log-probabilities may be in the mean from those of the plain model in fp32. With stand-ins bf16 is all that
# rounds; the kernels round what goes into experts to 8 bits too, except for fp8.
NEAR = 0.1
# The same for those for AVX2 with every layer quantized, in fp16 where vLLM takes no fp32 for the scheme. int4 rounds
# all activations to 8 bits; with stand-ins that keep them, what was packed means what the checkpoint says.
EXACTLY = {"Fp8": 0.01, "Int8": 0.005, "Int4": 0.01}
ROUNDED = 0.3


def _quantized(folder, scheme, everything=False, **sizes):
    """A checkpoint whose experts are quantized (in fp8 or if asked for, all linear layers), and its plain copy."""
    model = make_checkpoint(folder / "model", **SIZES, **(BLOCKS if scheme == "fp8" or everything else {}), **sizes)
    if scheme.startswith("script-"):
        keep = () if everything else ("--keep", r"re:^(?!.*\.mlp\.experts\.).*")
        meaning = quantize_by_command(
            model, folder / "out", scheme.removeprefix("script-"), "--group-size", "32", *keep
        )
        model = folder / "out"
    else:
        meaning = quantize(model, scheme, *(() if scheme.startswith("fp8") or everything else (only_experts,)))
    return model, plain_copy(model, meaning, folder / "plain")


def _limit(plain, wanted):
    """How far bf16 may be off: NEAR, or what the engine's plain layers in bf16 are off for these weights, if more."""
    ((served, _),) = run(generate, plain, [PROMPT], dtype="bfloat16")
    return max(NEAR, 1.25 * (served - wanted).abs().mean())


def _served(model, whose=AVX512, damaged=None, reload=False, **options):
    """(names of the experts' kernels, log-probabilities, tokens[, the same after a reload])"""
    from vllm_bailing.bench.worker_extension import EXTENSION
    from vllm_bailing.errors import UpdateError

    use(whose, damaged)
    llm = make_llm(model, worker_extension_cls=EXTENSION, **{"dtype": "bfloat16", **options})
    kernels = llm.collective_rpc("bailing_facts")[0]["experts"]
    found = [ask(llm, [PROMPT])[0]]
    if reload:
        try:
            llm.collective_rpc("reload_weights")
        except UpdateError as error:
            assert "came in part" in str(error)
            return f"{kernels}, no reload", found
        llm.reset_prefix_cache()
        found.append(ask(llm, [PROMPT])[0])
    return kernels, found


@KNOWN
@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("w8a8", "Int8"),
        ("fp8", "Fp8"),
        ("awq", "Int4"),
        pytest.param("gptq", "Int4", marks=THOROUGH),
        pytest.param("script-w4a16", "Int4", marks=THOROUGH),
    ],
)
def test_experts_mean_what_the_checkpoint_says(scheme, kernel, tmp_path):
    """Target and MTP layer; and once more after the weights were loaded again, which int4 may refuse."""
    model, plain = _quantized(tmp_path, scheme, num_nextn_predict_layers=1)
    wanted, _ = plain_answer(plain, PROMPT)
    kernels, found = run(_served, model, reload=True, speculative_config=mtp(1))
    name, refused, _ = kernels.partition(", no reload")
    assert name == f"vllm_bailing.Proved{kernel}Experts" and not (refused and kernel != "Int4")
    for logprobs, _ in found:
        difference = (logprobs - wanted).abs().mean()
        assert difference <= NEAR or difference <= _limit(plain, wanted)


@KNOWN
@NEEDS_AVX2
@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("w8a8", "Int8"),
        ("fp8", "Fp8"),
        ("awq", "Int4"),
        pytest.param("gptq", "Int4", marks=THOROUGH),
        ("script-w4a16", "Int4"),
    ],
)
def test_every_layer_means_what_the_checkpoint_says_on_avx2(scheme, kernel, tmp_path):
    _check_every_layer(scheme, kernel, AVX2, tmp_path)


@KNOWN
@NEEDS_VNNI
@pytest.mark.parametrize("scheme", ["awq", pytest.param("gptq", marks=THOROUGH), "script-w4a16"])
def test_every_layer_means_what_the_checkpoint_says_with_vnni(scheme, tmp_path):
    _check_every_layer(scheme, "Int4", VNNI, tmp_path)


def _check_every_layer(scheme, kernel, whose, tmp_path):
    """Compiled or not, target and MTP layer, in more digits than bf16 has, so that little rounds beside the kernels."""
    model, plain = _quantized(tmp_path, scheme, everything=True, num_nextn_predict_layers=1)
    wanted, _ = plain_answer(plain, PROMPT)
    dtype = "float32" if scheme == "w8a8" else "float16"
    options = {"dtype": dtype, "speculative_config": mtp(1), "enforce_eager": scheme != "script-w4a16"}
    for kept, limit in [(None, ROUNDED), ("exact", EXACTLY["Int4"])] if kernel == "Int4" else [(None, EXACTLY[kernel])]:
        kernels, found = run(_served, model, whose, kept, reload=True, **options)
        name, refused, _ = kernels.partition(", no reload")
        assert name == f"vllm_bailing.Proved{kernel}Experts" and not (refused and kernel != "Int4")
        for logprobs, _ in found:
            assert (logprobs - wanted).abs().mean() <= limit


@KNOWN
@NEEDS_AVX2
@pytest.mark.parametrize(
    ("scheme", "head", "limit", "ranks"),
    [
        ("w8a8", "w8a8", EXACTLY["Int8"], 1),
        pytest.param("w8a8", "w8a8", EXACTLY["Int8"], 2, marks=THOROUGH),
        ("w4a16", "w8a8", EXACTLY["Int4"], 1),
        pytest.param("w4a16", "w4a16", EXACTLY["Int4"], 2, marks=THOROUGH),
    ],
)
def test_a_quantized_head_means_what_the_checkpoint_says_on_avx2(scheme, head, limit, ranks, tmp_path):
    """Of a vocabulary that has to be padded, shared with the drafts."""
    model = make_checkpoint(
        tmp_path / "model", 1, 2, **SIZES, **BLOCKS, vocab_size=1000, num_nextn_predict_layers=1
    )  # with seed 0 fp16 turns two experts around that are nearly equal
    group = ("--group-size", "32")
    meaning = quantize_by_command(model, tmp_path / "out", scheme, "--head", head, *group)
    plain = plain_copy(tmp_path / "out", meaning, tmp_path / "plain")
    wanted, _ = plain_answer(plain, PROMPT)
    kept = "exact" if scheme == "w4a16" else None
    dtype = "float32" if scheme == "w8a8" else "float16"
    options = {"dtype": dtype, "speculative_config": mtp(1), **({"tensor_parallel_size": 2} if ranks > 1 else {})}
    _, [(logprobs, _)] = run(_served, tmp_path / "out", AVX2, kept, env=TWO_RANKS if ranks > 1 else {}, **options)
    assert (logprobs - wanted).abs().mean() <= limit


@KNOWN
@pytest.mark.parametrize(
    ("whose", "scheme", "are_whole"),
    [
        pytest.param(AVX512, "gptq", True, marks=THOROUGH),
        pytest.param(AVX512, "w8a8", False, marks=THOROUGH),
        pytest.param(AVX512, "w8a8", True, marks=THOROUGH),
        pytest.param(AVX2, "w8a8", True, marks=NEEDS_AVX2),
        pytest.param(AVX2, "gptq", False, marks=(THOROUGH, NEEDS_AVX2)),
        pytest.param(VNNI, "gptq", False, marks=NEEDS_VNNI),
        pytest.param(VNNI, "script-w4a16", True, marks=(THOROUGH, NEEDS_VNNI)),
    ],
)
def test_each_of_two_ranks_computes_its_experts(whose, scheme, are_whole, tmp_path):
    model, plain = _quantized(tmp_path, scheme)
    wanted, _ = plain_answer(plain, PROMPT)
    two = {"tensor_parallel_size": 2, "enable_expert_parallel": are_whole, "env": TWO_RANKS}
    kernels, found = run(_served, model, whose, **two)
    assert "Experts" in kernels
    difference = (found[0][0] - wanted).abs().mean()
    assert difference <= NEAR or difference <= _limit(plain, wanted)


@KNOWN
@pytest.mark.parametrize(
    ("online", "scheme", "kernel", "whose"),
    [
        ("fp8_per_block", "fp8-block", "Fp8", AVX512),
        pytest.param("fp8_per_block", "fp8-block", "Fp8", AVX2, marks=(THOROUGH, NEEDS_AVX2)),
        pytest.param("int8_per_channel_weight_only", "script-w8a8", "Int8", AVX512, marks=THOROUGH),
        pytest.param("int8_per_channel_weight_only", "script-w8a8", "Int8", AVX2, marks=(THOROUGH, NEEDS_AVX2)),
    ],
)
def test_experts_are_quantized_while_they_load(online, scheme, kernel, whose, tmp_path):
    """To the same weights as `vllm-bailing quantize` writes, which for fp8 are those of all linear layers."""
    if scheme.startswith("script-"):
        _, plain = _quantized(tmp_path, scheme)
    else:
        make_checkpoint(tmp_path / "model", **SIZES, **BLOCKS)
        meaning = quantize_by_command(tmp_path / "model", tmp_path / "out", scheme)
        plain = plain_copy(tmp_path / "out", meaning, tmp_path / "plain")
    wanted, _ = plain_answer(plain, PROMPT)
    kernels, found = run(_served, tmp_path / "model", whose, quantization=online)
    assert kernels == f"vllm_bailing.Proved{kernel}Experts"
    # vLLM computes scales of int8 in bf16, which moves some levels by one.
    assert (found[0][0] - wanted).abs().mean() <= (1.5 if kernel == "Int8" else 1) * NEAR


@KNOWN
@pytest.mark.parametrize(
    ("whose", "scheme", "damaged"),
    [
        (AVX512, "w8a8", "fused_experts_cpu"),
        pytest.param(AVX512, "fp8", "fp8_scaled_mm_cpu", marks=THOROUGH),
        pytest.param(AVX2, "awq", "avx2_experts", marks=NEEDS_AVX2),
        pytest.param(AVX2, "w8a8", "avx2_linear", marks=NEEDS_AVX2),
        pytest.param(AVX2, "fp8", "avx2_linear", marks=(THOROUGH, NEEDS_AVX2)),
        pytest.param(AVX2, "gptq", "avx2_linear", marks=(THOROUGH, NEEDS_AVX2)),
        pytest.param(VNNI, "gptq", "avx2_experts", marks=NEEDS_VNNI),
    ],
)
def test_a_kernel_that_is_wrong_is_not_used(whose, scheme, damaged, tmp_path):
    model, _ = _quantized(tmp_path, scheme, everything=damaged == "avx2_linear")
    with pytest.raises(EngineError, match=r"the kernel's result is off by .*\"dequantize\": true"):
        run(_served, model, whose, damaged)


@KNOWN
@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("fp8-tensor", {}, r"no fp8 kernel for these experts .it takes a scale per block.*\"dequantize\": true"),
        pytest.param("script-fp8", {}, r"it takes a scale per block.*\"dequantize\": true", marks=THOROUGH),
        ("gptq-act", {}, r"no int4 kernel for these experts .it takes columns in their order.*\"dequantize\": true"),
        (None, {"quantization": "fp8"}, r"--quantization fp8: .*int8_per_channel_weight_only or fp8_per_block"),
        pytest.param(None, {"quantization": "fp8_per_channel"}, r"leave (--quantization|it) out", marks=THOROUGH),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_no_kernel_takes_is_refused(scheme, options, message, tmp_path):
    model = _quantized(tmp_path, scheme)[0] if scheme else make_checkpoint(tmp_path / "model", **SIZES)
    with pytest.raises(EngineError, match=message):
        run(_served, model, **options)


def _group_problems(cases):
    from vllm_bailing.errors import SettingsError
    from vllm_bailing.plugin.kernels.cpu_quantized import _check_groups

    register()
    sizes, problems = SimpleNamespace(hidden_dim=128, intermediate_size_per_partition=64), []
    for groups in cases:
        try:
            _check_groups(sizes, *(torch.ones(2, 4, count, 32) for count in groups))
            problems.append("")
        except SettingsError as error:
            problems.append(str(error))
    return problems


@KNOWN
def test_groups_that_the_kernel_would_misread_are_refused():
    """128 inputs of the first matrix, 64 of the second; pairs of how many groups they are in."""
    problems = run(_group_problems, [(4, 2), (2, 1), (1, 1), (4, 4)])
    assert problems[:2] == ["", ""] and all("not one for all of them" in one for one in problems[2:])


def _with_linear_layers(model, damaged=None, whose=AVX512):
    """Whether linear layers take the kernels that vLLM keeps for AMX, or ours; and log-probabilities."""
    use(whose, damaged)
    llm = make_llm(model, dtype="bfloat16")
    takes = _takes_kernels_for_amx if whose == AVX512 else _takes_ours
    return llm.apply_model(takes)[0], ask(llm, [PROMPT])[0][0]


def _takes_ours(model):
    weight = model.model.layers[0].attention.query_key_value.weight_packed
    return weight.ndim == 4


def _takes_kernels_for_amx(model):
    layer = model.model.layers[0].attention.query_key_value
    if hasattr(layer, "use_w4a8"):
        return layer.use_w4a8
    return layer.scheme.kernel.linear_method.__name__ == "_apply_weights_sgl"


@KNOWN
@pytest.mark.parametrize(
    ("scheme", "damaged"),
    [
        ("w8a8", None),
        ("gptq", None),
        pytest.param("script-w4a16", None, marks=THOROUGH),
        pytest.param("w8a8", "int8_scaled_mm_with_quant", marks=NEEDS_VLLMS),
        pytest.param("awq", "int4_scaled_mm_cpu", marks=NEEDS_VLLMS),
    ],
)
def test_linear_layers_of_integers_mean_what_the_checkpoint_says(scheme, damaged, tmp_path):
    """Their activations are rounded too; with a kernel that is wrong they keep vLLM's other one."""
    model, plain = _quantized(tmp_path, scheme, everything=True)
    wanted, _ = plain_answer(plain, PROMPT)
    takes_kernels, logprobs = run(_with_linear_layers, model, damaged)
    assert takes_kernels == (damaged is None)
    assert (logprobs - wanted).abs().mean() <= ROUNDED


@KNOWN
@NEEDS_VNNI
@pytest.mark.parametrize(("damaged", "options"), [("avx2_linear", {}), (None, {"VLLM_CPU_INT4_W4A8": "0"}), (None, {})])
def test_linear_layers_in_int4_with_vnni_have_another_kernel(damaged, options, tmp_path):
    model, plain = _quantized(tmp_path, "script-w4a16", everything=True)
    wanted, _ = plain_answer(plain, PROMPT)
    are_ours, logprobs = run(_with_linear_layers, model, damaged, VNNI, env=options)
    assert are_ours == (not damaged and not options)
    assert (logprobs - wanted).abs().mean() <= ROUNDED


@NEEDS_VLLMS
@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "gptq", "awq"])
def test_kernels_agree_with_dequantized_weights(scheme, tmp_path):
    """The same checkpoint through the kernels and as plain weights in bf16; every linear layer quantized."""
    model = make_checkpoint(tmp_path / "model", **SIZES, **BLOCKS)
    quantize(model, scheme)
    quantized = run(_served, model)[1][0][0]
    ((plain, _),) = run(generate, model, [PROMPT], dtype="bfloat16", hf_overrides={"dequantize": True})
    limit = 0.01 if scheme == "fp8" else 0.05
    assert (quantized - plain).abs().mean() <= limit * plain.abs().mean()
