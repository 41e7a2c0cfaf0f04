"""Quantized tensors turned into plain ones; tests/support/quantized.py says what they mean."""

from __future__ import annotations

import re

import pytest
import torch

from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.configs import raw_config_of
from tests.support.quantized import SCHEMES, is_linear, quantize, quantize_one
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.dequantize import Dequantizer, dequantized
from vllm_bailing.errors import CheckpointError


@pytest.mark.parametrize("scheme", [*SCHEMES, "gptq-v2"])
def test_dequantized_weights_are_what_the_stored_ones_mean(scheme, tmp_path):
    model = make_checkpoint(tmp_path, hidden_size=160, intermediate_size=288, num_nextn_predict_layers=1)
    meaning = quantize(model, scheme)
    stored = read_tensors(model)
    dequantizer = Dequantizer(raw_config_of(model)["quantization_config"], torch.float32)
    found = dict(dequantizer.plain(reversed(stored.items())))  # in any order
    assert set(found) == set(meaning) != set(stored)
    for name, tensor in found.items():
        assert tensor.shape == meaning[name].shape
        torch.testing.assert_close(tensor.float(), meaning[name], atol=1e-6, rtol=1e-6)
        # What was plain passes as it was.
        assert tensor.dtype == (torch.float32 if is_linear(name) else stored[name].dtype)


def test_scales_of_activations_and_cache_are_left_out_of_plain_weights(tmp_path):
    model = make_checkpoint(tmp_path)
    meaning = quantize(model, "fp8-tensor")
    stored = read_tensors(model)
    scales = ("model.layers.0.attention.dense.input_scale", "model.layers.0.attention.k_scale")
    stored = dict.fromkeys(scales, torch.tensor(1.0)) | stored
    dequantizer = Dequantizer(raw_config_of(model)["quantization_config"], torch.bfloat16)
    assert set(dict(dequantizer.plain(stored.items()))) == set(meaning)


@pytest.mark.parametrize(
    ("scheme", "change", "fragments"),
    [
        ("fp8", lambda parts: parts.pop("weight_scale_inv"), ("has weight but no weight_scale_inv",)),
        ("gptq-act", lambda parts: parts.pop("qzeros"), ("but no qzeros",)),
        ("awq", lambda parts: parts.update(scales=parts["scales"][:1]), ("do not fit", "qweight [128, 8]")),
        ("gptq-act", lambda parts: parts["g_idx"].fill_(9), ("do not fit", "g_idx points outside the 4 groups")),
        ("fp8", lambda parts: parts.update(weight_scale_inv=torch.ones(7, 3)), ("do not fit", "[7, 3]")),
        (
            "w8a8",
            lambda parts: parts.update(weight_scale=torch.ones(5, 1)),
            ("do not fit", "weight_scale [5, 1], weight [64, 128]"),
        ),
        ("awq", lambda parts: (parts.pop("qzeros"), parts.pop("scales")), ("has qweight but no qzeros, scales; ",)),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(scheme, change, fragments, tmp_path):
    model = make_checkpoint(tmp_path)
    quantize(model, scheme)
    stored = read_tensors(model)
    module = "model.layers.0.attention.dense"
    parts = {name.removeprefix(f"{module}."): stored.pop(name) for name in list(stored) if name.startswith(module)}
    change(parts)
    stored |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
    dequantizer = Dequantizer(raw_config_of(model)["quantization_config"], torch.float32)
    with pytest.raises(CheckpointError) as refusal:
        list(dequantizer.plain(stored.items()))
    for fragment in (module, *fragments):
        assert fragment in str(refusal.value)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(CheckpointError, match=r"quant_method='mxfp4'.*only compressed-tensors, fp8, gptq, awq"):
        Dequantizer({"quant_method": "mxfp4"}, torch.bfloat16)


def test_the_configuration_hides_what_is_dequantized():
    stored = {"quant_method": "fp8"}
    given = BailingMoeV2Config(dequantize=True, quantization_config=stored)
    assigned = BailingMoeV2Config(quantization_config=stored)
    assigned.update({"dequantize": True})  # as --hf-overrides does
    late = BailingMoeV2Config(dequantize=True)
    late.quantization_config = stored
    for config in (given, assigned, late, BailingMoeV2Config.from_dict(given.to_dict())):
        assert getattr(config, "quantization_config", None) is None
        assert config.stored_quantization_config == stored
    assert BailingMoeV2Config(quantization_config=stored).quantization_config == stored
    with pytest.raises(ValueError, match="dequantize='yes' must be true or false"):
        BailingMoeV2Config(dequantize="yes")


# ---- one linear layer ----------------------------------------------------------------------------------------------

MODULE = "model.layers.0.attention.dense"


def one_layer(scheme, rows=160, columns=288):
    """`quantization_config`, stored tensors and their meaning."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return quantize_one(MODULE, weight, scheme)


def plain_weight(quantization, stored, dtype=torch.float32):
    ((name, weight),) = Dequantizer(quantization, dtype).plain(stored.items())
    assert name == f"{MODULE}.weight"
    return weight


@pytest.mark.parametrize("scheme", [*SCHEMES, "gptq-v2"])
def test_the_last_part_completes_a_layer_whichever_it_is(scheme):
    quantization, stored, meaning = one_layer(scheme)
    for name in stored:
        others = {other: part for other, part in stored.items() if other != name}
        weight = plain_weight(quantization, {**others, name: stored[name]})
        torch.testing.assert_close(weight, meaning, atol=1e-6, rtol=1e-6)
        assert weight.is_contiguous()


@pytest.mark.parametrize("scheme", [*SCHEMES, "gptq-v2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_weights_are_rounded_once_to_the_dtype_of_the_model(scheme, dtype):
    quantization, stored, meaning = one_layer(scheme)
    weight = plain_weight(quantization, stored, dtype)
    assert weight.dtype == dtype
    torch.testing.assert_close(weight, meaning.to(dtype), atol=0, rtol=torch.finfo(dtype).eps)


def test_layers_are_given_as_they_are_completed_and_what_is_plain_at_once():
    quantization, stored, _ = one_layer("fp8")
    plain = {"model.norm.weight": torch.ones(8), "model.layers.1.mlp.gate.expert_bias": torch.zeros(4)}
    (weight, scale) = stored
    order = {weight: stored[weight], **plain, scale: stored[scale]}
    assert [name for name, _ in Dequantizer(quantization, torch.float32).plain(order.items())] == [*plain, weight]


def test_a_scale_in_bf16_is_widened_before_it_multiplies():
    for scheme, leaf in (("fp8-tensor", "weight_scale"), ("w8a8", "weight_scale"), ("fp8", "weight_scale_inv")):
        quantization, stored, _ = one_layer(scheme, 128, 128)
        stored[f"{MODULE}.{leaf}"] = stored[f"{MODULE}.{leaf}"].bfloat16()
        scale = stored[f"{MODULE}.{leaf}"].float()
        expected = stored[f"{MODULE}.weight"].float() * scale
        torch.testing.assert_close(plain_weight(quantization, stored), expected, atol=0, rtol=1e-6)


def test_blocks_may_be_of_any_size():
    weight = torch.randn(70, 48, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    stored = {f"{MODULE}.weight": weight, f"{MODULE}.weight_scale_inv": scale}
    spread = scale.repeat_interleave(32, 0).repeat_interleave(16, 1)[:70]
    quantization = {"quant_method": "fp8", "weight_block_size": [32, 16]}
    torch.testing.assert_close(plain_weight(quantization, stored), weight.float() * spread)
    stored[f"{MODULE}.weight_scale_inv"] = scale[:2]
    with pytest.raises(CheckpointError, match=r"\(blocks of 32 x 16 need \[3, 3\] scales\); fetch or export"):
        plain_weight(quantization, stored)


def test_blocks_may_be_those_of_compressed_tensors():
    """As llm-compressor writes FP8 blocks: another key and another name for the same numbers."""
    _, stored, meaning = one_layer("fp8")
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    renamed = {name.replace("weight_scale_inv", "weight_scale"): part.clone() for name, part in stored.items()}
    torch.testing.assert_close(plain_weight(quantization, renamed), meaning, atol=1e-6, rtol=1e-6)
    renamed[f"{MODULE}.weight_scale"] = renamed[f"{MODULE}.weight_scale"].float()[:1]
    with pytest.raises(CheckpointError, match=r"blocks of 128 x 128 need \[2, 3\] scales"):
        plain_weight(quantization, renamed)


def test_awq_may_do_without_zero_points():
    quantization, stored, _ = one_layer("awq")
    levels, zeros, scales = (stored.pop(f"{MODULE}.{leaf}") for leaf in ("qweight", "qzeros", "scales"))
    with_zeros = {f"{MODULE}.qweight": levels, f"{MODULE}.scales": scales, f"{MODULE}.qzeros": zeros}
    eights = torch.full_like(zeros, 0x88888888 - 2**32)
    expected = plain_weight(quantization, {**with_zeros, f"{MODULE}.qzeros": eights})
    without = {name: part for name, part in with_zeros.items() if not name.endswith("qzeros")}
    torch.testing.assert_close(plain_weight({**quantization, "zero_point": False}, without), expected)
    with pytest.raises(CheckpointError, match="has qweight, scales but no qzeros; fetch or export it again"):
        plain_weight(quantization, without)


def test_awq_converts_whatever_is_stored_packed():
    """A list of modules that were left plain is no reason to refuse those that are there."""
    quantization, stored, meaning = one_layer("awq")
    weight = plain_weight({**quantization, "modules_to_not_convert": ["attention"]}, stored)
    torch.testing.assert_close(weight, meaning, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "awq", "bits": 8}, "quantization_config of config.json: .*4-bit"),
        ({"quant_method": "awq", "version": "gemv"}, "quantization_config of config.json: .*gemv"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": 3}}},
            "quantization_config of config.json is not understood: .*targets",
        ),
    ],
)
def test_a_configuration_that_the_library_refuses_is_refused_with_its_reason(quantization, message):
    with pytest.raises(CheckpointError, match=f"(?s)^{message}"):
        Dequantizer(quantization, torch.float32)


@pytest.mark.parametrize("key", ["bits", "sym", "desc_act", "dynamic"])
def test_gptq_has_four_symmetric_bits_in_order_unless_it_says_otherwise(key):
    quantization, stored, meaning = one_layer("gptq")
    del quantization[key]
    torch.testing.assert_close(plain_weight(quantization, stored), meaning, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("group_size", [-1, None])
def test_gptq_has_one_group_unless_it_says_otherwise(group_size):
    quantization, stored, meaning = quantize_one(MODULE, torch.randn(64, 96), "gptq", group=96)
    quantization["group_size"] = group_size
    if group_size is None:
        del quantization["group_size"]
    torch.testing.assert_close(plain_weight(quantization, stored), meaning, atol=1e-6, rtol=1e-6)


def test_the_last_group_of_gptq_may_be_smaller():
    quantization, stored, meaning = one_layer("gptq", 64, 96)
    stored[f"{MODULE}.qweight"] = stored[f"{MODULE}.qweight"][:10]  # eight inputs each
    stored[f"{MODULE}.g_idx"] = stored[f"{MODULE}.g_idx"][:80]
    torch.testing.assert_close(plain_weight(quantization, stored), meaning[:, :80], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("index", [-1, 9])
def test_a_group_outside_the_scales_is_refused(index):
    quantization, stored, _ = one_layer("gptq-act")
    stored[f"{MODULE}.g_idx"][5] = index
    with pytest.raises(CheckpointError, match=r"\(g_idx points outside the 9 groups\)"):
        plain_weight(quantization, stored)


@pytest.mark.parametrize("zeros", [0x77777777, -0x77777778, 0, None])
def test_symmetric_gptq_has_its_zero_in_the_middle_whatever_is_stored(zeros):
    """Exporters write 7 (the first format stores every zero less one), 8, anything, or nothing."""
    quantization, stored, meaning = one_layer("gptq")
    if zeros is None:
        del stored[f"{MODULE}.qzeros"]
    else:
        stored[f"{MODULE}.qzeros"].fill_(zeros)
    torch.testing.assert_close(plain_weight(quantization, stored), meaning, atol=1e-6, rtol=1e-6)
    del quantization["sym"]  # as it is by default
    torch.testing.assert_close(plain_weight(quantization, stored), meaning, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scheme", ["gptq", "gptq-v2"])
def test_gptq_groups_are_in_order_where_none_are_stored(scheme):
    quantization, stored, meaning = one_layer(scheme)
    del stored[f"{MODULE}.g_idx"]
    torch.testing.assert_close(plain_weight(quantization, stored), meaning, atol=1e-6, rtol=1e-6)


def test_gptq_groups_that_contradict_the_configuration_are_refused():
    quantization, stored, _ = one_layer("gptq")
    stored[f"{MODULE}.g_idx"] = stored[f"{MODULE}.g_idx"].flip(0)
    with pytest.raises(CheckpointError, match="g_idx is out of order, but quantization_config has desc_act=false"):
        plain_weight(quantization, stored)


@pytest.mark.parametrize(
    ("scheme", "keys", "message"),
    [
        ("gptq", {"bits": 1}, "has bits=1; GPTQ has 2, 3, 4, 8"),
        ("gptq", {"bits": 2}, "576 inputs of 2 bits in groups of 32 are not 9 groups"),
        ("gptq", {"bits": 3}, "384 inputs of 3 bits in groups of 32 are not 9 groups"),
        ("gptq", {"bits": 8}, "144 inputs of 8 bits in groups of 32 are not 9 groups"),
        ("gptq", {"bits": True}, "has bits=True"),
        ("gptq", {"bits": "4"}, "has bits='4'"),
        ("gptq", {"bits": None}, "has bits=None"),
        ("gptq", {"group_size": 64}, "288 inputs of 4 bits in groups of 64 are not 9 groups"),
        ("gptq", {"group_size": -1}, "group_size=-1 means one group, not 9"),
        ("gptq", {"group_size": 0}, "has group_size=0"),
        ("gptq", {"group_size": None}, "has group_size=None"),
        ("gptq", {"dynamic": {"+:.*attention.*": {"bits": 8}}}, 'has "dynamic" settings of single modules'),
        ("awq", {"zero_point": False}, "has zero points, but quantization_config has zero_point=false"),
    ],
)
def test_a_configuration_that_contradicts_the_weights_is_refused(scheme, keys, message):
    quantization, stored, _ = one_layer(scheme)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        plain_weight({**quantization, **keys}, stored)


@pytest.mark.parametrize("scheme", ["gptq", "awq"])
@pytest.mark.parametrize("leaf", ["weight_scale", "weight_packed", "weight_zero_point"])
def test_a_part_of_another_scheme_is_refused(scheme, leaf):
    quantization, stored, _ = one_layer(scheme)
    with pytest.raises(CheckpointError, match=f"{MODULE}.{leaf} is no part of {scheme.upper()}"):
        plain_weight(quantization, {f"{MODULE}.{leaf}": torch.ones(1), **stored})


def test_groups_of_compressed_tensors_are_told_apart_by_their_targets():
    quantization, stored, meaning = one_layer("w8a8")
    group = quantization["config_groups"].pop("group_0")
    packed = {"weights": {**group["weights"], "num_bits": 4, "strategy": "group", "group_size": 32}}
    quantization["config_groups"] = {
        "others": {**packed, "targets": ["re:.*experts.*"], "format": "pack-quantized"},
        "attention": {**group, "targets": ["re:.*attention.*"], "format": "int-quantized"},
    }
    torch.testing.assert_close(plain_weight(quantization, stored), meaning, atol=1e-6, rtol=1e-6)
    del stored[f"{MODULE}.weight_scale"]
    with pytest.raises(CheckpointError, match="has weight but no weight_scale; "):  # not the parts of the other group
        plain_weight(quantization, stored)
    del quantization["config_groups"]["attention"]
    with pytest.raises(CheckpointError, match=f"^{MODULE} is quantized, but no group of quantization_config"):
        plain_weight(quantization, stored)


def test_only_what_the_configuration_asks_for_is_dequantized():
    quantization, stored, meaning = one_layer("fp8")
    kept, asked = BailingMoeV2Config(), BailingMoeV2Config(dequantize=True, quantization_config=quantization)
    tensors = list(stored.items())
    assert dequantized(tensors, kept, torch.float32) is tensors
    ((_, halves),) = dequantized(tensors, asked, torch.float16)
    assert halves.dtype == torch.float16
    ((name, weight),) = dequantized(tensors, asked, torch.float32)
    assert name == f"{MODULE}.weight" and weight.dtype == torch.float32
    torch.testing.assert_close(weight, meaning, atol=1e-6, rtol=1e-6)


def message_of(quantization, stored):
    with pytest.raises(CheckpointError) as refusal:
        plain_weight(quantization, stored)
    message = str(refusal.value)
    assert message.isprintable() and len(message) < 600
    return message


@pytest.mark.parametrize("block", [5, True, "128", [128], [128, 128, 1], [0, 128], [[1], 128], [128.0, 128], {"a": 1}])
def test_blocks_of_fp8_are_two_numbers(block):
    quantization, stored, _ = one_layer("fp8")
    assert "wanted are two numbers" in message_of({**quantization, "weight_block_size": block}, stored)


def change_weights(**changes):
    def change(quantization):
        quantization["config_groups"]["group_0"]["weights"].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_weights(symmetric="x"), "weights.symmetric: Input should be a valid boolean"),
        (change_weights(strategy="\x1b[2J"), "weights.strategy: Value error"),
        (change_weights(num_bits="x"), "weights.num_bits: Input should be a valid integer"),
        (lambda quantization: quantization.update(config_groups=5), "config_groups"),
        (lambda quantization: quantization.update(ignore={"a": [5]}), "ignore"),
    ],
)
def test_the_first_of_pydantics_finds_is_told_in_a_line(change, words):
    quantization, stored, _ = one_layer("w8a8")
    change(quantization)
    assert words in message_of(quantization, stored)


@pytest.mark.parametrize(
    "scheme, change",
    [
        ("w8a8", lambda scale: scale[:1]),
        ("w8a8", lambda scale: scale.reshape(-1)),
        ("w8a8", lambda scale: scale.expand(-1, 288)),
    ],
)
def test_scales_are_not_stretched_over_a_weight_that_they_do_not_fit(scheme, change):
    quantization, stored, _ = one_layer(scheme)
    stored[f"{MODULE}.weight_scale"] = change(stored[f"{MODULE}.weight_scale"])
    assert "needs [160, 1] scales" in message_of(quantization, stored)


@pytest.mark.parametrize(
    ("scheme", "part", "change", "words"),
    [
        ("w8a8", "weight", lambda weight: weight.to(torch.uint8), "weight is torch.uint8, wanted is int8"),
        ("w8a8", "weight", lambda weight: weight.to(torch.bool), "weight is torch.bool, wanted is int8"),
        ("w8a8", "weight_scale", lambda scale: scale.to(torch.int32), "weight_scale is torch.int32, wanted are floats"),
        ("fp8", "weight", lambda weight: weight.float().to(torch.int8), "weight is torch.int8, wanted is float8"),
        ("awq", "qzeros", lambda zeros: zeros[:1], "1 rows of zero points for 9 of scales"),
        ("awq", "qweight", lambda weight: weight.to(torch.int64), "qweight is torch.int64, wanted are integers of 32"),
        ("gptq-act", "g_idx", lambda index: index[:1], "g_idx has [1] values for 288 inputs"),
        ("gptq-act", "g_idx", lambda index: index.float(), "g_idx is torch.float32, wanted are integers"),
        ("gptq", "scales", lambda scale: scale.to(torch.bool), "scales is torch.bool, wanted are floats"),
    ],
)
def test_parts_are_of_the_kind_that_the_scheme_has(scheme, part, change, words):
    quantization, stored, _ = one_layer(scheme)
    stored[f"{MODULE}.{part}"] = change(stored[f"{MODULE}.{part}"]).contiguous()
    assert words in message_of(quantization, stored)


@pytest.mark.parametrize("scheme", ["awq", "gptq"])
@pytest.mark.parametrize("size", ["32", 0, -2, True, None, [32], 32.0])
def test_a_group_is_a_number_of_inputs(scheme, size):
    quantization, stored, _ = one_layer(scheme)
    assert "wanted is a number of inputs, or -1" in message_of({**quantization, "group_size": size}, stored)


def test_a_group_that_says_nothing_of_weights():
    quantization, stored, _ = one_layer("w8a8")
    quantization["config_groups"]["group_0"]["weights"] = None
    assert "says nothing of weights; take the config.json" in message_of(quantization, stored)
