"""What the files of a checkpoint tell without being loaded."""

import json

import torch

from tests.support.checkpoints import make_checkpoint, small_config, write_tensors
from vllm_bailing.checkpoint import Checkpoint, damaged_files
from vllm_bailing.tensor_names import main_tensors, mtp_tensors


def test_shards_are_checked_by_index_and_size(tmp_path):
    model = make_checkpoint(tmp_path, shards=3)
    assert damaged_files(str(model)) == ""
    assert damaged_files("inclusionAI/Ling-flash-2.0") == ""
    second = model / "model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    assert f"{second} is cut off or damaged ({len(content) - 1} bytes" in damaged_files(str(model))
    second.unlink()
    assert f"1 of 3 files of the index are not in {model}, first {second.name}" in damaged_files(str(model))


def test_headers_tell_names_shapes_and_files(tmp_path):
    model = make_checkpoint(tmp_path, shards=3, num_nextn_predict_layers=1)
    checkpoint, config = Checkpoint(model), small_config(num_nextn_predict_layers=1)
    assert checkpoint.damage == ""
    expected = {**main_tensors(config), **mtp_tensors(config)}
    assert {name: stored.shape for name, stored in checkpoint.tensors.items()} == expected
    assert all(stored.kind == "plain" for stored in checkpoint.tensors.values())
    assert checkpoint.layers_past_main(config) == [3]
    assert checkpoint.layers_past_main(small_config(num_hidden_layers=4)) == []
    assert Checkpoint(tmp_path / "nowhere").tensors == Checkpoint.at("someone/nothing").tensors == {}
    assert not checkpoint.has_scales("model.layers.3.eh_proj")


def test_one_pattern_finds_the_files_of_a_layer(tmp_path):
    model = make_checkpoint(tmp_path, shards=23, num_nextn_predict_layers=1)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoint = Checkpoint(model)

    def found(wanted):
        return {file.name for file in model.glob(str(checkpoint.files_with(wanted)))}

    for name in index:
        assert found(name.__eq__) == {index[name]}
    for name in ("enorm", "mlp.gate", "mlp.experts.1."):
        files = {index[one] for one in index if f"model.layers.3.{name}" in one}
        assert files <= found(lambda one, name=name: f"model.layers.3.{name}" in one)
    norms = {index[f"model.layers.3.{name}.weight"] for name in ("enorm", "hnorm")}
    assert norms <= found(lambda one: one.endswith(("enorm.weight", "hnorm.weight"))) < set(index.values())
    assert checkpoint.files_with(lambda name: False) is None


def test_a_scale_beside_the_projection_makes_it_quantized(tmp_path):
    write_tensors(tmp_path, {"model.layers.3.eh_proj.weight_scale_inv": torch.ones(1)})
    assert Checkpoint(tmp_path).has_scales("model.layers.3.eh_proj")
