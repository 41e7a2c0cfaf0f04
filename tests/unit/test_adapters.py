"""The modules that take adapters, and the memory that is set aside for them."""

from __future__ import annotations

import pytest
from serve_configs import zoo_config

from tests.support.checkpoints import small_config
from tests.support.planning import plan
from vllm_bailing.adapters import (
    LINEAR,
    TARGETS,
    AdapterSlots,
    adaptable,
    target_of,
    unknown_targets,
)
from vllm_bailing.planning.memory import Layout, Stage
from vllm_bailing.units import GIB

MIB = 2**20
# MiB per MoE layer and rank, as vLLM's own manager allocated them: checkpoint, slots.
MEASURED = [
    ("Ling-flash-2.0", AdapterSlots(("experts",), 1, 16, 2, 4), 102),
    ("Ling-flash-2.0", AdapterSlots(("experts",), 4, 64, 2, 4), 1632),
    ("Ling-mini-2.0", AdapterSlots(("experts",), 1, 16), 60),
]


@pytest.mark.parametrize(("name", "slots", "mib"), MEASURED)
def test_the_room_of_experts_is_the_measured_one(name, slots, mib):
    config = zoo_config(name)
    assert slots.layer_bytes(config, config.num_hidden_layers - 1) == mib * MIB
    assert slots.layer_bytes(config, 0) == 0  # a dense layer has none


def test_the_room_of_attention_is_the_measured_one():
    slots = AdapterSlots(("query_key_value", "dense"), 1, 16, 2, 4)
    assert round(2 * slots.layer_bytes(zoo_config("Ling-flash-2.0"), 3) / MIB, 1) == 0.6


def test_experts_that_are_divided_as_wholes_take_the_same_room_in_all():
    """Four ranks that hold a quarter of the experts each, with whole factors."""
    config = zoo_config("Ling-flash-2.0")
    whole = AdapterSlots(("experts",)).layer_bytes(config, 5)
    assert 4 * AdapterSlots(("experts",), tp=4, ep=4).layer_bytes(config, 5) == whole
    assert 4 * AdapterSlots(("experts",), tp=4, fully_sharded=True).layer_bytes(config, 5) == whole
    assert 4 * AdapterSlots(("experts",), tp=4).layer_bytes(config, 5) > whole


@pytest.mark.parametrize(
    ("options", "gib"),
    [
        ({}, 0),
        ({"max_loras": 1, "lora_target_modules": ("experts",)}, 31 * 102 / 1024),
        ({"max_loras": 4, "max_lora_rank": 64, "lora_target_modules": ("experts",)}, 31 * 1632 / 1024),
    ],
)
def test_a_plan_counts_adapters(options, gib):
    found = plan(zoo_config("Ling-flash-2.0"), "H200", 4, 4096, 4, tp=4, **options)
    assert found.weights.adapters == gib * GIB
    without = plan(zoo_config("Ling-flash-2.0"), "H200", 4, 4096, 4, tp=4)
    assert without.kv_room_bytes - found.kv_room_bytes == found.weights.adapters
    assert without.single == found.single  # a bound for requests without adapters


def test_a_plan_counts_adapters_of_every_stage():
    slots = {"max_loras": 2, "lora_target_modules": TARGETS}
    config = zoo_config("Ling-mini-2.0")
    found = plan(config, "H100", 2, 4096, 4, pp=2, **slots)
    own = AdapterSlots(TARGETS, 2)
    stages = (range(10), range(10, 20))
    sizes = [sum(own.layer_bytes(config, layer) for layer in layers) for layers in stages]
    ends = 2 * 16 * 2 * (config.vocab_size + config.hidden_size)
    assert found.weights.adapters in [size + ends for size in sizes]
    layout = Layout(config, "bf16", pp=2, adapters=own)
    first, last = (layout.weights(stage).adapters for stage in layout.stages((10, 10)))
    # Embedding and head take factors of the vocabulary and the hidden size, on the first stage and on the last.
    assert (first, last) == tuple(size + ends for size in sizes)
    whole = Layout(config, "bf16", adapters=own).weights(Stage(0, 0, 20)).adapters
    assert whole == first + last


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"max_loras": -1}, "max_loras=-1 must be"),
        ({"max_loras": 1, "max_lora_rank": 24}, "use one of 1, 8, 16, 32"),
        ({"max_loras": 1, "lora_target_modules": ("q_proj",)}, "'q_proj' are not known; choose among query_key_value"),
        ({"max_loras": 1, "lora_target_modules": ()}, "choose among"),
        (
            {"max_loras": 1, "lora_target_modules": ("lm_head",), "draft_tokens": 1},
            "drafts share embed_tokens and lm_head",
        ),
    ],
)
def test_a_plan_of_adapters_that_vllm_would_refuse(options, fragment):
    with pytest.raises(ValueError, match=fragment):
        plan(zoo_config("Ling-mini-2.0", num_nextn_predict_layers=1), "H100", 1, 4096, 4, **options)


def test_every_linear_module_but_the_router_takes_an_adapter():
    config = small_config(num_nextn_predict_layers=1)
    shapes = adaptable(config)
    assert shapes["model.word_embeddings"] == (64, 256) and shapes["lm_head"] == (256, 64)
    assert shapes["model.layers.0.attention.query_key_value"] == (8 * 32, 64)
    assert shapes["model.layers.2.mlp.experts.15.down_proj"] == (64, 32)
    assert not any("gate" in name.split(".") or "norm" in name or ".layers.3." in name for name in shapes)
    assert {target_of(name) for name in shapes} == set(TARGETS)
    assert "lm_head" not in adaptable(small_config(tie_word_embeddings=True))


def test_unknown_targets():
    config = small_config()
    assert unknown_targets(config, [*TARGETS, "gate_up_proj", "model.layers.1.mlp.experts"]) == []
    wrong = ["q_proj", "gate", "shared_experts", "word_embeddings", "model.layers.9.mlp.experts", "layers", ""]
    assert unknown_targets(config, [*LINEAR, *wrong]) == wrong
