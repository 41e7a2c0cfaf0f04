"""Names and shapes of the tensors of a checkpoint."""

import pytest

from tests.support.checkpoints import small_config
from tests.support.config_switches import SWITCHES, switched
from vllm_bailing.reference import BailingMoeV2ForCausalLM
from vllm_bailing.tensor_names import layer_of, layer_tensors, main_tensors

TOGETHER = [
    ("only_dense_bias", "only_qkv_bias"),
    ("three_shared_experts", "no_dense_layer"),
    ("one_key_value_head", "narrow_heads"),
]


@pytest.mark.parametrize("switches", [*((name,) for name in SWITCHES), *TOGETHER], ids=", ".join)
def test_names_and_shapes_are_those_of_the_plain_model(switches):
    config = small_config(**switched(*switches))
    expected = main_tensors(config)
    for layer in config.mtp_layer_ids:
        expected |= layer_tensors(config, layer)
    actual = {name: tuple(tensor.shape) for name, tensor in BailingMoeV2ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del actual["lm_head.weight"]
    assert expected == actual


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.gate.weight", 12),
        ("model.layers.3.enorm", 3),
        ("model.layers.x.enorm", None),
        ("model.norm.weight", None),
        ("other.layers.3.enorm.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_a_name_tells_its_layer(name, layer):
    assert layer_of(name) == layer
