"""Quantized tensors turned into plain ones; tests/support/quantized.py says what they mean."""

from __future__ import annotations

import pytest
import torch

from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.configs import raw_config_of
from tests.support.quantized import SCHEMES, is_linear, quantize
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.dequantize import Dequantizer
from vllm_bailing.errors import CheckpointError


@pytest.mark.parametrize("scheme", [*SCHEMES, "gptq-v2"])
def test_dequantised_weights_are_what_the_stored_ones_mean(scheme, tmp_path):
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
    stored["model.layers.0.attention.dense.input_scale"] = torch.tensor(1.0)
    stored["model.layers.0.attention.k_scale"] = torch.tensor(1.0)
    dequantizer = Dequantizer(raw_config_of(model)["quantization_config"], torch.bfloat16)
    assert set(dict(dequantizer.plain(stored.items()))) == set(meaning)


@pytest.mark.parametrize(
    ("scheme", "change", "fragments"),
    [
        ("fp8", lambda parts: parts.pop("weight_scale_inv"), ("has weight but no weight_scale_inv",)),
        ("gptq", lambda parts: parts.pop("qzeros"), ("but no qzeros",)),
        ("awq", lambda parts: parts.update(scales=parts["scales"][:1]), ("do not fit", "qweight [128, 8]")),
        ("gptq", lambda parts: parts["g_idx"].fill_(9), ("do not fit", "g_idx points outside the 4 groups")),
        ("fp8", lambda parts: parts.update(weight_scale_inv=torch.ones(7, 3)), ("do not fit", "[7, 3]")),
        ("w8a8", lambda parts: parts.update(weight_scale=torch.ones(5, 1)), ("do not fit", "[5, 1]")),
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


def test_the_configuration_hides_what_is_dequantised():
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
