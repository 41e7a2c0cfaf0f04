"""The configurations of the published checkpoints."""

from __future__ import annotations

import math

import pytest
from transformers import AutoConfig

from tests.support.configs import write_config
from tests.support.zoo import CHECKPOINTS, OTHERS, raw_config
from vllm_bailing.config import BailingMoeV2Config, adopt, register_with_transformers
from vllm_bailing.tensor_names import main_tensors, mtp_tensors


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_configuration_of(name, tmp_path):
    register_with_transformers()
    raw = raw_config(name)
    config = AutoConfig.from_pretrained(write_config(tmp_path, raw))  # auto_map is not followed: it names no file here
    assert isinstance(config, BailingMoeV2Config)
    assert (config.rotary_dim, config.head_dim) == (64, 128)
    assert config.max_position_embeddings == raw["max_position_embeddings"]
    assert getattr(config, "quantization_config", None) == raw.get("quantization_config")
    count = sum(math.prod(shape) for shape in main_tensors(config).values())
    assert count == pytest.approx(CHECKPOINTS[name]["parameters"], rel=5e-4)
    extra = sum(math.prod(shape) for shape in mtp_tensors(config).values())
    assert bool(extra) == bool(raw["num_nextn_predict_layers"])


@pytest.mark.parametrize("name", OTHERS)
def test_configuration_of_another_architecture_is_left_alone(name):
    assert adopt(OTHERS[name]) is OTHERS[name]
