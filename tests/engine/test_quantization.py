"""Quantized checkpoints: in vLLM's own kernels where the CPU build has them, turned into plain weights elsewhere."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.checkpoints import PROMPT, make_checkpoint, plain_answer, read_tensors, write_tensors
from tests.support.configs import raw_config_of
from tests.support.cpu import NEEDS_AVX512
from tests.support.engine import TOLERANCE, EngineError, generate, make_llm, run, run_in_turn
from tests.support.quantized import DEQUANTIZE, SCHEMES, no_expert, plain_copy, quantize, quantize_by_command
from tests.support.speculation import mtp


@pytest.mark.parametrize("scheme", SCHEMES)
def test_engine_serves_what_a_dequantized_checkpoint_means(scheme, tmp_path):
    model = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1)
    meaning = quantize(model, scheme)
    wanted, wanted_ids = plain_answer(plain_copy(model, meaning, tmp_path / "plain"), PROMPT)
    ((logprobs, token_ids),) = run_in_turn(generate, model, [PROMPT], speculative_config=mtp(1), **DEQUANTIZE)
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


def test_a_swapped_scale_shows(tmp_path):
    """Two experts' scales exchanged: what the comparison above is able to see."""
    model = make_checkpoint(tmp_path / "model")
    meaning = quantize(model, "fp8")
    stored = read_tensors(model)
    one, other = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight_scale_inv" for expert in (3, 4))
    stored[one], stored[other] = stored[other], stored[one].float() * 2
    write_tensors(model, stored)
    wanted, _ = plain_answer(plain_copy(model, meaning, tmp_path / "plain"), PROMPT)
    ((logprobs, _),) = run_in_turn(generate, model, [PROMPT], **DEQUANTIZE)
    assert (logprobs - wanted).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("scheme", "mean_error"),
    [
        pytest.param("w8a8", 0.3, marks=NEEDS_AVX512),
        ("script-fp8", 0.5),
        *(pytest.param(scheme, 0.1, marks=NEEDS_AVX512) for scheme in ("script-w4a16", "gptq", "awq")),
    ],
    ids=lambda value: value,
)
def test_linear_layers_in_vllms_quantized_kernels(scheme, mean_error, tmp_path):
    """Experts stay plain. W8A8 and FP8 round what goes into a layer too, so they cannot agree as well.

    So would int4, if vLLM were not told to keep activations.
    """
    model = make_checkpoint(tmp_path / "plain", hidden_size=128, moe_intermediate_size=128)
    if scheme.startswith("script-"):
        arguments = ("--group-size", "32", "--keep", r"re:.*\.mlp\.experts\..*")
        meaning = quantize_by_command(model, tmp_path / "model", scheme.removeprefix("script-"), *arguments)
        model = tmp_path / "model"
    else:
        meaning = quantize(model, scheme, no_expert)
    wanted, _ = plain_answer(plain_copy(model, meaning, tmp_path / "meaning"), PROMPT)
    ((logprobs, _),) = run_in_turn(generate, model, [PROMPT], dtype="bfloat16", env={"VLLM_CPU_INT4_W4A8": "0"})
    assert (logprobs - wanted).abs().mean() <= mean_error


def _take_kernels_away():
    from vllm_bailing.plugin.kernels import cpu_quantized
    from vllm_bailing.processor import QuantizedKernels

    nothing = QuantizedKernels((), (), "it has none, and they need AVX2")
    cpu_quantized.quantized_kernels = lambda: nothing


def _start_without_avx512(model):
    torch.cpu._is_avx512_supported = bool
    _take_kernels_away()
    make_llm(model)


@pytest.mark.parametrize("scheme", ["w8a8", "gptq", "awq"])
def test_integers_are_refused_where_no_processor_of_this_kind_has_a_kernel(scheme, tmp_path):
    """It would start, and the first request would end the engine."""
    model = make_checkpoint(tmp_path, hidden_size=128, moe_intermediate_size=128)
    quantize(model, scheme, no_expert)
    message = (
        r"no kernel for \S+ layers of integers on this processor \(it has none, and they need AVX2\); "
        r".*\"dequantize\": true"
    )
    with pytest.raises(EngineError, match=message):
        run(_start_without_avx512, model)


def _start_without_kernels_for_experts(model, **options):
    _take_kernels_away()
    make_llm(model, **options)


@pytest.mark.parametrize(
    ("scheme", "options", "fragments"),
    [
        (
            "fp8",
            {},
            ("no kernel for fp8 experts on this processor (it has ", "they need AVX2", '"dequantize": true'),
        ),
        ("w8a8", {}, ("no kernel for compressed-tensors experts", '"dequantize": true')),
        ("awq", {}, ("no kernel for", '"dequantize": true')),
        (None, {"quantization": "fp8"}, ("--quantization fp8", "leave it out")),
        (None, DEQUANTIZE, ("dequantize=true, but config.json has no quantization_config",)),
    ],
    ids=["fp8", "w8a8", "awq", "online", "nothing"],
)
def test_a_scheme_without_a_kernel_is_refused_with_the_way_out(scheme, options, fragments, tmp_path):
    model = make_checkpoint(tmp_path)
    if scheme:
        quantize(model, scheme)
    with pytest.raises(EngineError) as refusal:
        run(_start_without_kernels_for_experts, model, **options)
    for fragment in fragments:
        assert fragment in refusal.value.message


def _for_linear_layers_alone(config):
    config["quantization_config"]["config_groups"] = {
        "group_0": config["quantization_config"]["config_groups"]["group_1"]
    }


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (_for_linear_layers_alone, 'a group has to have "lm_head" among its targets'),
        (lambda config: config.update(norm_head=True), "norm_head=true in config.json normalizes it"),
    ],
)
def test_a_quantized_head_that_would_be_misread_is_refused(change, fragment, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    quantize_by_command(model, tmp_path / "out", "fp8", "--head", "fp8", "--keep", r"re:.*\.mlp\.experts\..*")
    config = raw_config_of(tmp_path / "out")
    change(config)
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError) as refusal:
        run(make_llm, tmp_path / "out", dtype="bfloat16")
    assert fragment in refusal.value.message and '"dequantize": true' in refusal.value.message
