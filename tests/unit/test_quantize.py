"""The script that quantizes a checkpoint."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig

from tests.support.checkpoints import make_checkpoint, read_tensors, write_tensors
from tests.support.commands import invoke
from tests.support.configs import change_config
from tests.support.layouts import LAYOUTS
from tests.support.quantized import is_linear, quantize_by_command
from vllm_bailing.config import read_config
from vllm_bailing.dequantize import Dequantizer
from vllm_bailing.tools.quantize import Quantizer


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
    ("scheme", "head", "error"), [("w4a16", "w8a8", 0.01), ("w8a8", "w4a16", 0.12), ("fp8", "fp8", 0.04)]
)
def test_the_head_is_quantized_in_a_scheme_of_its_own(scheme, head, error, tmp_path):
    model = make_checkpoint(tmp_path / "model", shards=2)
    meaning = quantize_by_command(model, tmp_path / "out", scheme, "--head", head, "--group-size", "32")
    without = quantize_by_command(model, tmp_path / "without", scheme, "--group-size", "32")
    plain = read_tensors(model)["lm_head.weight"].float()
    assert 0 < (meaning.pop("lm_head.weight") - plain).norm() / plain.norm() < error
    assert torch.equal(without.pop("lm_head.weight"), plain)
    assert meaning.keys() == without.keys() and all(torch.equal(meaning[name], without[name]) for name in meaning)
    # What reads the files by itself finds the same: the library's own types, and this package.
    config = read_config(str(tmp_path / "out"))
    QuantizationConfig.model_validate(config.quantization_config)
    plain_again = dict(
        Dequantizer(config.quantization_config, torch.float32).plain(read_tensors(tmp_path / "out").items())
    )
    again = quantize_by_command(model, tmp_path / "again", scheme, "--head", head, "--group-size", "32")
    assert all(torch.allclose(plain_again[name].float(), tensor, atol=1e-6) for name, tensor in again.items())


@pytest.mark.parametrize("layout", ["split and stacked", "fused experts", "padded vocabulary", "from actor."])
def test_another_layout_becomes_the_same_files(layout, tmp_path):
    model = make_checkpoint(tmp_path / "published", num_nextn_predict_layers=1, moe_intermediate_size=48)
    plain = read_tensors(model)
    meaning = quantize_by_command(model, tmp_path / "wanted", "fp8")
    write_tensors(model, dict(LAYOUTS[layout](plain)), shards=3, interleaved=False)
    came = quantize_by_command(model, tmp_path / "came", "fp8")
    assert came.keys() == meaning.keys() and all(torch.equal(came[name], meaning[name]) for name in came)


def test_an_mtp_layer_alone_becomes_what_it_becomes_beside_its_target(tmp_path):
    model = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1, hidden_size=160)
    whole = quantize_by_command(model, tmp_path / "whole", "w4a16", "--group-size", "32")
    layer = {name: tensor for name, tensor in read_tensors(model).items() if name.startswith("model.layers.3.")}
    write_tensors(model, layer)
    done = invoke("quantize", model, tmp_path / "out", "--scheme", "w4a16", "--group-size", "32")
    assert done.exit_code == 0, done.stderr
    assert '--speculative-config \'{"method": "mtp"' in done.stderr and "vllm serve" not in done.stderr
    came = quantize_by_command(model, tmp_path / "again", "w4a16", "--group-size", "32")
    assert came.keys() == layer.keys() and all(torch.equal(came[name], whole[name]) for name in came)


def test_a_checkpoint_without_a_layer_is_refused(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    name = "model.layers.1.attention.dense.weight"
    write_tensors(model, {other: tensor for other, tensor in read_tensors(model).items() if other != name})
    done = invoke("quantize", model, tmp_path / "out", "--scheme", "fp8")
    assert done.exit_code == 2 and name in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


def with_a_tensor_too_many(model):
    tensors = read_tensors(model)
    write_tensors(model, tensors | {"model.layers.1.foo.weight": tensors["model.norm.weight"].clone()})


def with_a_head_in_integers(model):
    tensors = read_tensors(model)
    write_tensors(model, tensors | {"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_a_tensor_too_many, "model.layers.1.foo.weight"),
        (with_a_head_in_integers, "1 of integers or 8 bits (lm_head.weight)"),
        (lambda model: change_config(model, num_hidden_layers=2), "num_hidden_layers=2"),
        (lambda model: change_config(model, num_nextn_predict_layers=0), "num_nextn_predict_layers=0"),
        (
            lambda model: change_config(model, quantization_config={"quant_method": "fp8"}),
            "its weights are plain; remove quantization_config from config.json",
        ),
    ],
    ids=["unexpected", "integers", "a layer too few", "MTP layer not counted", "plain"],
)
def test_what_doctor_rejects_is_not_quantized(change, said, tmp_path):
    model = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1)
    change(model)
    done = invoke("quantize", model, tmp_path / "out", "--scheme", "fp8")
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()
    assert invoke("doctor", model).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--scheme", "w4a16"), "--group-size 128 does not divide the 64 inputs of model.layers"),
        (("--scheme", "int3"), "int3"),
        (("--head", "fp8-block"), "vLLM reads no head with a scale per block; choose fp8, w8a8, w4a16"),
        (("--head", "w8a8", "--keep", "re:.*head"), "--head w8a8 and --keep, which names the head too; leave one"),
        (("--keep", "re:["), "--keep re:[ is no regular expression: unterminated character set"),
        (("--keep", "re:.*gate$", "--keep", "nothing.such"), "--keep nothing.such is none of the model's"),
        (("--head", "w4a16"), "--group-size 128 does not divide the 64 inputs of lm_head.weight"),
    ],
)
def test_the_script_refuses_what_it_cannot_do(arguments, fragment, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    done = invoke("quantize", model, tmp_path / "out", *arguments)
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)
    assert fragment in " ".join(done.stderr.replace("│", " ").split())


def test_damaged_weights_are_refused(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    tensors = read_tensors(model)
    tensors["model.norm.weight"][3] = torch.inf
    write_tensors(model, tensors)
    (tmp_path / "out").mkdir()
    done = invoke("quantize", model, tmp_path / "out")
    assert done.exit_code == 2 and "model.norm.weight holds NaN or infinity; `vllm-bailing doctor" in done.stderr
    assert not list((tmp_path / "out").iterdir())  # it is there as it was


@pytest.mark.parametrize("out", ["/proc/x", "file/x"])
def test_a_folder_that_cannot_be_made_is_one_line(out, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    (tmp_path / "file").write_text("")
    done = invoke("quantize", model, tmp_path / out)
    assert done.exit_code == 2 and "; name another folder" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("was_there", [False, True])
def test_an_interrupted_run_leaves_nothing_behind(was_there, tmp_path, monkeypatch):
    model, out = make_checkpoint(tmp_path / "model"), tmp_path / "out"
    if was_there:
        out.mkdir()

    def interrupted(*_):
        assert (out / "config.json").is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(Quantizer, "process", interrupted)
    done = invoke("quantize", model, out)
    assert done.exit_code == 130 and done.stderr.endswith(f"interrupted; what it wrote to {out} is removed\n")
    assert out.exists() == was_there and (not was_there or not list(out.iterdir()))


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        ({"tie_word_embeddings": True}, "the head is the embedding here, which stays as it is; leave --head out"),
        ({"norm_head": True}, "with norm_head=true in config.json the head is normalized as it loads"),
    ],
)
def test_a_head_that_cannot_be_quantized_is_refused(overrides, fragment, tmp_path):
    model = make_checkpoint(tmp_path / "model", **overrides)
    done = invoke("quantize", model, tmp_path / "out", "--scheme", "w8a8", "--head", "w8a8")
    assert done.exit_code == 2 and fragment in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
