"""What the files of a checkpoint tell without being loaded."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.support.checkpoints import make_checkpoint, small_config, write_tensors
from vllm_bailing import DEMO_ADAPTER, checkpoint
from vllm_bailing.checkpoint import Checkpoint, damaged_files
from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.errors import CheckpointError
from vllm_bailing.tensor_names import main_tensors, mtp_tensors

INDEX = "model.safetensors.index.json"


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


@pytest.mark.parametrize(
    "content",
    ["5", "null", "[]", '"x"', "{}", '{"weight_map": [["a"]]}', '{"weight_map": 5}', "[" * 100_000, "{", "\0", ""],
    ids=lambda content: content[:20],
)
def test_an_index_that_is_none(content, tmp_path):
    model = make_checkpoint(tmp_path, shards=3)
    (model / INDEX).write_text(content)
    assert Checkpoint(model).damage == f"{model / INDEX} is not a readable index; fetch it again"


AS_ANOTHER = """
import sys
from pathlib import Path
from vllm_bailing.adapter_audit import Limits, check_adapter
from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.config import read_config
print(Checkpoint(Path(sys.argv[1])).damage)
try:
    check_adapter(Path(sys.argv[2]), Limits(read_config(sys.argv[1])))
except ValueError as error:
    print(error)
"""


def test_files_that_may_not_be_read_are_told(tmp_path):
    model, adapter = make_checkpoint(tmp_path / "model"), tmp_path / "adapter"
    shutil.copytree(DEMO_ADAPTER, adapter)
    (model / "model.safetensors").chmod(0)
    (adapter / "adapter_model.safetensors").chmod(0)
    # To root, nothing is forbidden but by leaving that ability behind.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    command = [*drop, sys.executable, "-c", AS_ANOTHER, model, adapter]
    weights, factors = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert weights == f"{model}/model.safetensors cannot be read: Permission denied; let the user who runs this read it"
    assert factors.endswith(
        "adapter_model.safetensors cannot be read (Permission denied); let the server's user read it"
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../x.safetensors", "../../x.safetensors"),
        ("/etc/shadow", "/etc/shadow"),
        ("/tmp/x.safetensors", "/tmp/x.safetensors"),
        ("sub/x.safetensors", "sub/x.safetensors"),
        ("..", ".."),
        ("config.json", "config.json"),
        ("a\n\x1b[31mb.safetensors", r"a\n\x1b[31mb.safetensors"),
        ("x" * 300 + ".safetensors", "x" * 150),
        ("", ""),
        (None, "None"),
        (5, "5"),
        (["a.safetensors"], "is not a readable index"),
        ({"a": 1}, "is not a readable index"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_an_index_names_files_of_its_folder_and_no_others(name, shown, tmp_path, monkeypatch):
    model = make_checkpoint(tmp_path / "model", shards=3)
    write_tensors(tmp_path, {"a": torch.ones(1)})
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (model / INDEX).write_text(json.dumps(index))
    opened = []
    monkeypatch.setattr(checkpoint, "safe_open", lambda file, framework: opened.append(file))
    damage = Checkpoint(model).damage
    assert shown in damage and "fetch it again" in damage and damage.isprintable() and len(damage) < 400
    assert opened == []


def _a_pipe(file):
    os.mkfifo(file)


def _a_folder(file):
    file.mkdir()


def _a_link_to_nothing(file):
    file.symlink_to(file.parent / "gone")


def _a_link_to_itself(file):
    file.symlink_to(file)


@pytest.mark.parametrize("change", [_a_pipe, _a_folder, _a_link_to_nothing, _a_link_to_itself])
@pytest.mark.parametrize("which", ["model.safetensors", "model-00002-of-00003.safetensors", INDEX])
def test_what_is_no_file_is_not_opened(change, which, tmp_path):
    model = make_checkpoint(tmp_path, shards=1 if which == "model.safetensors" else 3)
    (model / which).unlink()
    change(model / which)
    damage = Checkpoint(model).damage
    if which == INDEX and not (model / which).exists():
        assert damage == "" and Checkpoint(model).tensors  # as if there were none
    else:
        assert which in damage and "fetch" in damage


def test_names_of_a_file_cannot_write_to_the_terminal(tmp_path):
    write_tensors(tmp_path, {"a\nb\x1b[2Jc": torch.ones(1), "x" * 100_000: torch.ones(1)})
    with pytest.raises(CheckpointError) as refusal:
        Audit.of_target(small_config()).check(Checkpoint(tmp_path))
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 2000


def test_headers_tell_names_shapes_and_files(tmp_path):
    model = make_checkpoint(tmp_path, shards=3, num_nextn_predict_layers=1)
    files, config = Checkpoint(model), small_config(num_nextn_predict_layers=1)
    assert files.damage == ""
    expected = {**main_tensors(config), **mtp_tensors(config)}
    assert {name: stored.shape for name, stored in files.tensors.items()} == expected
    assert all(stored.kind == "plain" for stored in files.tensors.values())
    assert files.layers_past_main(config) == [3]
    assert files.layers_past_main(small_config(num_hidden_layers=4)) == []
    assert Checkpoint(tmp_path / "nowhere").tensors == Checkpoint.at("someone/nothing").tensors == {}
    assert not files.has_scales("model.layers.3.eh_proj")


def test_one_pattern_finds_the_files_of_a_layer(tmp_path):
    model = make_checkpoint(tmp_path, shards=23, num_nextn_predict_layers=1)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    files_of = Checkpoint(model)

    def found(wanted):
        return {file.name for file in model.glob(str(files_of.files_with(wanted)))}

    for name in index:
        assert found(name.__eq__) == {index[name]}
    for name in ("enorm", "mlp.gate", "mlp.experts.1."):
        files = {index[one] for one in index if f"model.layers.3.{name}" in one}
        assert files <= found(lambda one, name=name: f"model.layers.3.{name}" in one)
    norms = {index[f"model.layers.3.{name}.weight"] for name in ("enorm", "hnorm")}
    assert norms <= found(lambda one: one.endswith(("enorm.weight", "hnorm.weight"))) < set(index.values())
    assert files_of.files_with(lambda name: False) is None


def test_a_scale_beside_the_projection_makes_it_quantized(tmp_path):
    write_tensors(tmp_path, {"model.layers.3.eh_proj.weight_scale_inv": torch.ones(1)})
    assert Checkpoint(tmp_path).has_scales("model.layers.3.eh_proj")
