"""The script that quantizes a checkpoint."""

from __future__ import annotations

import pytest

from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.commands import invoke
from tests.support.quantized import is_linear, quantize_by_command


@pytest.mark.parametrize(
    ("scheme", "error"), [("fp8", 0.04), ("fp8-block", 0.04), ("w8a8", 0.01), ("w4a16", 0.1)], ids=lambda value: value
)
def test_the_script_rounds_every_linear_layer_and_nothing_else(scheme, error, tmp_path):
    model = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1, hidden_size=160, shards=3)
    meaning = quantize_by_command(model, tmp_path / "out", scheme, "--group-size", "32")
    plain = read_tensors(model)
    assert set(meaning) == set(plain)
    for name, tensor in plain.items():
        change = (meaning[name] - tensor.float()).norm() / tensor.float().norm()
        assert (0 < change < error) if is_linear(name) else change == 0, name
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--scheme", "w4a16"), "--group-size 128 does not divide the 64 inputs of model.layers"),
        (("--scheme", "int3"), "int3"),
    ],
)
def test_the_script_refuses_what_it_cannot_do(arguments, fragment, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    done = invoke("quantize", model, tmp_path / "out", *arguments)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert fragment in " ".join(done.stderr.replace("│", " ").split())
