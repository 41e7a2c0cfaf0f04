"""Other tools' layouts of the same weights, turned into the published one."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tests.support.checkpoints import make_checkpoint, read_tensors, small_config, write_tensors
from tests.support.layouts import (
    CONFIG,
    LAYOUTS,
    PUBLISHED,
    SIZES,
    named_as_llama,
    padded_vocabulary,
    split_projections,
    stacked_experts,
)
from vllm_bailing.checkpoint import Checkpoint, StoredTensor
from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.errors import CheckpointError
from vllm_bailing.layouts import as_published, published_name
from vllm_bailing.tensor_names import main_tensors

ZEROS = {name: torch.zeros(shape) for name, shape in PUBLISHED.items()}
NAMES = {layout: [name for name, _ in turned(ZEROS)] for layout, turned in LAYOUTS.items()}


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in PUBLISHED.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_turned_into_the_published_one(layout, tensors):
    written = dict(LAYOUTS[layout](tensors))
    assert equal(dict(as_published(written.items(), CONFIG)), tensors)


@pytest.mark.parametrize("layout", [*LAYOUTS, "any common prefix"])
def test_files_of_a_layout_read_as_the_published_one(layout, tensors, tmp_path):
    written = (
        {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        if layout == "any common prefix"
        else dict(LAYOUTS[layout](tensors))
    )
    write_tensors(tmp_path, {name: tensor.contiguous() for name, tensor in written.items()}, shards=3)
    checkpoint = Checkpoint(tmp_path).published(CONFIG)
    Audit.of_target(CONFIG).check(checkpoint)
    Audit.of_draft(CONFIG).check(checkpoint)
    assert {name: stored.shape for name, stored in checkpoint.tensors.items()} == PUBLISHED
    read = {name: stored.read(lambda path: safe_open(path, "pt")) for name, stored in checkpoint.tensors.items()}
    assert equal(read, tensors)
    loaded = as_published(read_tensors(tmp_path).items(), CONFIG, Checkpoint(tmp_path).prefix)
    assert equal(dict(loaded), tensors)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_published_name_stays_and_a_strange_one_never_becomes_one(data):
    name = data.draw(st.sampled_from(sorted(PUBLISHED)))
    assert published_name(name) == name
    strange = data.draw(st.from_regex(r"[a-z]{1,6}(\.[a-z]{1,6}){0,2}\.", fullmatch=True))
    if not set(strange.split(".")) & {"module", "actor", "policy", "model", "score"}:
        assert published_name(f"{strange}{name}") not in PUBLISHED
    place = data.draw(st.sampled_from([place for place, char in enumerate(name) if char == "."]))
    assert published_name(f"{name[:place]}.stranger{name[place:]}") not in PUBLISHED


def test_fused_experts_that_might_lie_either_way_are_left_alone():
    config = small_config(moe_intermediate_size=32)  # twice that is the hidden size
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert [one for one, _ in as_published([(name, torch.zeros(16, 64, 64))], config)] == [name]


def test_tensors_that_are_the_same_one_are_refused(tensors):
    written = [*tensors.items(), ("actor.lm_head.weight", tensors["lm_head.weight"])]
    with pytest.raises(CheckpointError, match=r"lm_head.weight and actor.lm_head.weight are both lm_head.weight; keep"):
        dict(as_published(written, CONFIG))


def test_files_with_two_tensors_that_are_the_same_one_are_damaged(tensors, tmp_path):
    write_tensors(tmp_path, {**tensors, "actor.lm_head.weight": tensors["lm_head.weight"].clone()})
    checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.damage and "are both lm_head.weight; keep one" in checkpoint.published(CONFIG).damage


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_tensors_of_any_shape_are_described(data):
    """Scalars, as the scale of a whole tensor is one, and whatever else a file may hold."""
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    names = data.draw(st.lists(st.sampled_from(NAMES[layout]), unique=True, min_size=1, max_size=6))
    checkpoint = Checkpoint(None)
    for name in names:
        name = data.draw(st.sampled_from([name, f"{name}_scale", f"{name}_scale_inv", f"{name}.stranger"]))
        shape = tuple(data.draw(st.lists(st.sampled_from([0, 1, 2, 48, 64, 96, 128]), max_size=4)))
        checkpoint.tensors[name] = StoredTensor(Path("model.safetensors"), shape, "plain", name)
    described = checkpoint.published(CONFIG)
    assert described.damage or sum(math.prod(one.shape) for one in described.tensors.values()) <= sum(
        math.prod(one.shape) for one in checkpoint.tensors.values()
    )


# ---- what is not turned is told apart --------------------------------------------------------------------------------


def without(pattern):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}


def with_more(**more):
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


def turned_experts(tensors):
    found = dict(stacked_experts(tensors, leaf=""))
    return {name: tensor.mT if ".mlp.experts." in name else tensor for name, tensor in found.items()}


def mlx_quantized(tensors):
    changed = dict(tensors)
    name = "model.layers.0.mlp.gate_proj"
    changed[f"{name}.weight"] = torch.zeros(128, 8, dtype=torch.int32)
    return changed | {f"{name}.scales": torch.ones(128, 2), f"{name}.biases": torch.ones(128, 2)}


def with_adapter(tensors):
    renamed = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    name = "base_model.model.model.layers.0.attention.dense"
    renamed[f"{name}.base_layer.weight"] = renamed.pop(f"{name}.weight")
    return renamed | {
        f"{name}.lora_A.default.weight": torch.zeros(8, 128),
        f"{name}.lora_B.default.weight": torch.zeros(64, 8),
    }


MTP = r"layers\.3\."  # the small model has three main layers and one MTP layer
DIAGNOSES = {
    "an adapter": (with_adapter, {}, "an adapter that was not merged"),
    "a raw int8 tensor": (
        lambda tensors: tensors | {"model.norm.weight": torch.ones(64, dtype=torch.int8)},
        {},
        "quantized weights without a quantization_config",
    ),
    "fp8 with scales": (
        lambda tensors: (
            tensors
            | {
                "model.layers.0.attention.dense.weight": torch.ones(64, 128).to(torch.float8_e4m3fn),
                "model.layers.0.attention.dense.weight_scale": torch.ones(1),
            }
        ),
        {},
        "quantized weights without a quantization_config",
    ),
    "MLX, quantized": (mlx_quantized, {}, "MLX's layout"),
    "experts the other way round": (
        turned_experts,
        {},
        r"read as \[16, outputs, inputs\], but model\.layers\.1\.mlp\.exp",
    ),
    "no key projection": (
        lambda tensors: without(r"layers\.0\.attention\.k_proj")(dict(split_projections(tensors))),
        {},
        "all three have to come",
    ),
    "one layer fewer said": (
        without(MTP),
        {"num_hidden_layers": 2, "num_nextn_predict_layers": 0},
        "the checkpoint has 3 layers, but num_hidden_layers=2; set it to 3 .*cut on purpose",
    ),
    "one layer more said": (
        without(MTP),
        {"num_hidden_layers": 4, "num_nextn_predict_layers": 0},
        "has the layers up to 2, but num_hidden_layers=4; set it to 3",
    ),
    "one layer fewer said, with MTP": (
        lambda tensors: tensors,
        {"num_hidden_layers": 2},
        "the first MTP layer is number 3, .* but num_hidden_layers=2; set it to 3",
    ),
    "one layer more said, with MTP": (
        lambda tensors: tensors,
        {"num_hidden_layers": 4},
        "the first MTP layer is number 3, .* but num_hidden_layers=4; set it to 3",
    ),
    "MTP layers not said": (
        lambda tensors: tensors,
        {"num_nextn_predict_layers": 0},
        "set num_nextn_predict_layers to 1",
    ),
    "another vocabulary": (
        lambda tensors: (
            tensors | {name: torch.zeros(5000, 64) for name in ("model.word_embeddings.weight", "lm_head.weight")}
        ),
        {},
        "vocab_size=256, where the checkpoint has 5000 rows",
    ),
    "a reward model": (
        lambda tensors: without("lm_head")(tensors) | {"score.weight": torch.zeros(1, 64)},
        {},
        "--runner pooling --convert classify",
    ),
    "no head": (without("lm_head"), {}, "--runner pooling --convert embed, or a head that is the embedding"),
    "transposed": (
        lambda tensors: tensors | {"model.layers.0.mlp.down_proj.weight": torch.zeros(128, 64)},
        {},
        "saved transposed",
    ),
    "renamed": (
        lambda tensors: (
            without(r"layers\.0\.input_layernorm")(tensors) | {"model.layers.0.input_norm.weight": torch.ones(64)}
        ),
        {},
        r"model\.layers\.0\.input_norm\.weight should be called model\.layers\.0\.input_layernorm\.weight",
    ),
}


@pytest.mark.parametrize("kind", DIAGNOSES)
def test_what_is_wrong_is_said_with_the_way_out(kind, tensors, tmp_path):
    change, keys, cause = DIAGNOSES[kind]
    written = {name: tensor.contiguous() for name, tensor in change(tensors).items()}
    config = small_config(**{**SIZES, **keys})
    write_tensors(tmp_path, written)
    with pytest.raises(CheckpointError, match=f"Likely cause: .*{cause}") as refusal:
        Audit.of_target(config).check(Checkpoint(tmp_path).published(config))
    assert "\n" not in str(refusal.value)
    audit = Audit.of_target(config)
    with pytest.raises(CheckpointError, match=f"Likely cause: .*{cause}"):  # and where there are no files to look at
        for _ in audit.passed(as_published(written.items(), config)):
            pass
        audit.finish()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_name_is_only_proposed_where_the_shape_agrees(data):
    """A tensor goes missing, and another comes that is called nearly so."""
    config = small_config()
    shapes = main_tensors(config)
    name = data.draw(st.sampled_from(sorted(shapes)))
    shape = data.draw(st.sampled_from(sorted(set(shapes.values()))))
    audit = Audit.of_target(config)
    tensors = {other: torch.empty(size, device="meta") for other, size in shapes.items() if other != name}
    stranger = name.replace(".weight", ".wait").replace("bias", "bass")
    tensors[stranger] = torch.empty(shape, device="meta")
    for _ in audit.passed(tensors.items()):
        pass
    with pytest.raises(CheckpointError) as refusal:
        audit.finish()
    proposed = re.search(r"should be called (\S+)", str(refusal.value))
    assert proposed is None or math.prod(shapes[proposed[1]]) == math.prod(shape)


def test_one_index_of_a_layout_names_all_files_of_a_tensor(tensors, tmp_path):
    written = dict(split_projections(tensors))
    write_tensors(tmp_path, {name: tensor.contiguous() for name, tensor in written.items()}, shards=5)
    checkpoint = Checkpoint(tmp_path).published(CONFIG)
    name = "model.layers.3.attention.query_key_value.weight"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {file for stored, file in index.items() if re.search(r"layers\.3\.attention\.._proj\.weight", stored)}
    assert len(wanted) > 1
    pattern = checkpoint.files_with(lambda one: one == name)
    assert wanted <= {file.name for file in tmp_path.glob(pattern)}


def test_a_checkpoint_of_another_layout_passes_whole(tmp_path):
    model = make_checkpoint(tmp_path)
    written = dict(padded_vocabulary(dict(named_as_llama(read_tensors(model)))))
    write_tensors(model, {f"module.{name}": tensor.contiguous() for name, tensor in written.items()})
    Audit.of_target(small_config()).check(Checkpoint(model).published(small_config()))
