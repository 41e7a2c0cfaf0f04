"""`vllm-bailing doctor` in a good environment, in bad ones, and on damaged checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch

from tests.support.checkpoints import make_checkpoint, read_tensors, without_mtp_in_config, write_tensors
from tests.support.commands import invoke
from tests.support.configs import change_config
from tests.support.pages import serving_page
from tests.support.quantized import quantize
from vllm_bailing import DEMO, DEMO_ADAPTER
from vllm_bailing.plugin import supported_versions
from vllm_bailing.tools import doctor, doctor_server, doctor_weights


def by_name(checks):
    return {check.name: check for check in checks}


@pytest.mark.parametrize(
    "found, ok, words",
    [
        ("0.26.1", False, "it needs vLLM 0.27 or newer"),
        ("0.29.0", True, "checked: 0.27 to 0.33"),
        ("0.99.0", None, "newer than the checked 0.27 to 0.33"),
    ],
)
def test_vllms_version_is_compared_with_the_checked_ones(found, ok, words, monkeypatch):
    monkeypatch.setattr(doctor, "_vllm_version", lambda: found)
    monkeypatch.setattr(doctor, "version", lambda package: found)
    check = by_name(doctor._packages())["vllm"]
    assert check.ok is ok and words in check.detail and (ok is not False or check.fix)


def test_a_newer_vllm_that_lacks_what_is_needed_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "_vllm_version", lambda: "0.99.0")
    monkeypatch.setattr(supported_versions, "missing_from_vllm", lambda root: ["FusedMoEFactory is gone"])
    check = by_name(doctor._packages())["vllm"]
    assert check.ok is False and "FusedMoEFactory is gone" in check.detail


@pytest.mark.parametrize("works", [True, False])
def test_gpus_are_asked_of_the_driver(works, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + ("echo 'Some GPU, 570.1, 81559 MiB'" if works else "echo no devices; exit 9"))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    check = doctor._accelerator({"platform": "cpu", "gpus": []})
    # The driver is a fake, so torch cannot use what it lists.
    assert check.ok is False and check.fix
    assert ("Some GPU, 570.1" if works else "no devices") in check.detail


def test_gpus_that_vllm_finds_need_no_tool(monkeypatch):
    """Containers have the driver's libraries, and often not its programs."""
    monkeypatch.setenv("PATH", "")
    names = ["NVIDIA H100 80GB HBM3"] * 7 + ["NVIDIA H200"]
    check = doctor._accelerator({"platform": "cuda", "gpus": names})
    assert (check.ok, check.detail) == (True, "7 x NVIDIA H100 80GB HBM3, 1 x NVIDIA H200")
    assert doctor._accelerator({"platform": "cpu", "gpus": []}).detail == "none: vLLM runs on cpu"
    assert doctor._accelerator({}).ok is None


def without_a_tensor(folder):
    tensors = read_tensors(folder)
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    write_tensors(folder, tensors)


def without_a_shard(folder):
    write_tensors(folder, read_tensors(folder), shards=3)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def with_a_wrong_key(folder):
    change_config(folder, n_group=7)


def with_the_base_models_template(folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}<role>{{ m.content }}{% endfor %}")


def with_a_misspelt_key(folder):
    config = json.loads((folder / "config.json").read_text())
    config["num_expert_per_tok"] = config.pop("num_experts_per_tok")
    (folder / "config.json").write_text(json.dumps(config))


def with_a_pointer_of_git_lfs(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def with_pickled_files(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "change, name, ok, detail, fix",
    [
        (
            with_pickled_files,
            "files",
            None,
            "nothing here reads: the weights were not checked",
            "save the model as safetensors",
        ),
        (with_a_misspelt_key, "config.json", None, "num_expert_per_tok=4 (is num_experts_per_tok meant?)", "correct"),
        (with_a_pointer_of_git_lfs, "files", False, "only says where the weights are", ""),
        (without_a_tensor, "tensors", False, "model.layers.2.mlp.experts.3.up_proj.weight", "incomplete download"),
        (without_a_shard, "files", False, "1 of 3 files of the index are not in", "fetch or export"),
        (without_mtp_in_config, "MTP layer", False, "1 in the files, num_nextn_predict_layers=0", "--hf-overrides"),
        (with_a_wrong_key, "config.json", False, "n_group=7", "correct config.json"),
        (with_the_base_models_template, "chat template", None, "no thinking and no tools", "chat-template ring"),
    ],
)
def test_a_checkpoint_is_judged_by_its_headers(change, name, ok, detail, fix, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    change(folder)
    check = by_name(doctor.checkpoint(str(folder)))[name]
    assert check.ok is ok and detail in check.detail and fix in check.fix, check


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"hidden_sizes": 3}, "hidden_sizes=3 is not a key"),
        ({"hidden_size": "x"}, "hidden_size='x' must be an integer"),
    ],
)
def test_what_is_wrong_with_overrides_is_not_wrong_with_the_file(overrides, said):
    (check,) = (one for one in doctor.checkpoint(str(DEMO), overrides) if one.ok is False)
    assert check.name == "--hf-overrides" and said in check.detail and "config.json" not in check.detail
    assert check.fix == "correct --hf-overrides, or leave it out"


def with_config(folder, text):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)


DEEP = '{"a": ' + "[" * 900 + "]" * 900 + "}"


def with_a_window_of(tokens):
    def make(folder):
        shutil.copytree(DEMO, folder)
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": tokens}))

    return make


def with_a_pipe(name):
    def make(folder):
        shutil.copytree(DEMO, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def with_gguf(folder):
    folder.mkdir()
    (folder / "ling.gguf").write_bytes(b"GGUF")


def with_a_dangling(name):
    def change(folder):
        shutil.copytree(DEMO, folder)
        (folder / name).unlink()
        (folder / name).symlink_to("/gone/blob")

    return change


def with_file(name, text):
    def change(folder):
        shutil.copytree(DEMO, folder)
        (folder / name).write_text(text)

    return change


FETCH = "copy, fetch or export it again"
OTHER = "vLLM serves it by its own class"


@pytest.mark.parametrize(
    ("make", "name", "detail", "fix"),
    [
        (lambda folder: folder.mkdir(), "files", "is empty", FETCH),
        (lambda folder: shutil.copytree(DEMO, folder / "demo"), "files", "has no config.json", "/demo meant?"),
        (lambda folder: shutil.copytree(DEMO_ADAPTER, folder), "files", "is a LoRA adapter", "--lora-modules NAME="),
        (with_gguf, "files", "has GGUF files, llama.cpp's", "safetensors"),
        (with_a_dangling("config.json"), "files", "config.json links to /gone/blob, which is gone", FETCH),
        (with_a_dangling("model.safetensors"), "files", "model.safetensors links to /gone/blob, which is gone", FETCH),
        (lambda folder: None, "files", "is no folder on this machine", "correct it, or give a model's name on the hub"),
        (lambda folder: folder.write_text(""), "files", "is a file", "give the folder that it is in"),
        (lambda folder: with_config(folder, "[1]"), "config.json", "it holds a list", "correct config.json"),
        (
            lambda folder: with_config(folder, '{"architectures": ["BailingMoeForCausalLM"], "model_type": "bailing"}'),
            "config.json", "is not a BailingMoeV2 model", OTHER,
        ),
        (
            lambda folder: with_config(folder, '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'),
            "config.json", "is not a BailingMoeV2 model", OTHER,
        ),
        (with_file("generation_config.json", "{"), "generation_config.json", "is no JSON", "fetch it again"),
        (with_file("generation_config.json", "[]"), "generation_config.json", "object", "fetch it again"),
        (with_file("generation_config.json", '{"eos_token_id": 99999}'), "generation_config.json", "vocabulary", ""),
        (with_file("generation_config.json", '{"pad_token_id": "x"}'), "generation_config.json", "not supp", "correct"),
        (with_a_window_of("x"), "tokenizer", "not supported between", "fetch tokenizer.json"),
        (with_a_pipe("tokenizer.json"), "tokenizer", "tokenizer.json is a pipe or a device and no file", "remove it"),
        (with_file("generation_config.json", DEEP), "generation_config.json", "recursion", "correct"),
    ],
)  # fmt: skip
def test_a_folder_is_named_for_what_it_is(make, name, detail, fix, tmp_path):
    make(tmp_path / "model")
    check = by_name(doctor.checkpoint(str(tmp_path / "model")))[name]
    assert detail in check.detail and fix in check.fix and "hf download" not in check.fix, check


def test_a_folder_of_the_hubs_cache_is_fetched_by_its_name(tmp_path):
    folder = tmp_path / "hub" / "models--inclusionAI--Ling-mini-2.0" / "snapshots" / "abc"
    with_a_dangling("model.safetensors")(folder)
    check = by_name(doctor.checkpoint(str(folder)))["files"]
    assert check.ok is False and check.fix == "hf download inclusionAI/Ling-mini-2.0"


@pytest.mark.parametrize(
    ("method", "ok", "detail"),
    [
        ("quark", None, "quark, which was not tried; vLLM decides when it starts"),
        ("magic", False, "vLLM has no scheme magic"),
        ("fp8", False, "fp8 by config.json, and all weights are plain"),
        ("compressed-tensors", False, "compressed-tensors by config.json, and all weights are plain"),
    ],
)
def test_the_scheme_of_config_json_is_looked_at(method, ok, detail, tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    change_config(tmp_path / "model", quantization_config={"quant_method": method})
    check = by_name(doctor.checkpoint(str(tmp_path / "model")))["quantization"]
    assert (check.ok, check.detail) == (ok, detail) and bool(check.fix) == (ok is False)


def test_a_wrong_number_of_layers_is_told_once(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    change_config(tmp_path / "model", num_hidden_layers=3)
    checks = by_name(doctor.checkpoint(str(tmp_path / "model")))
    assert "set it to 4" in checks["tensors"].fix and "MTP layer" not in checks and checks["chat template"].ok


def with_numbers(change):
    def changed(folder):
        tensors = read_tensors(folder)
        change(tensors)
        write_tensors(folder, tensors)

    return changed


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda tensors: None, None),
        (
            lambda tensors: tensors["model.norm.weight"][3:4].fill_(torch.nan),
            "NaN or infinity in 1 tensor (model.norm.weight)",
        ),
        (
            lambda tensors: tensors["model.layers.0.attention.dense.weight"][0].fill_(-torch.inf),
            "NaN or infinity in 1 tensor (model.layers.0.attention.dense.weight)",
        ),
        (
            lambda tensors: [tensor.zero_() for name, tensor in tensors.items() if ".layers.1.mlp.experts." in name],
            "nothing but zeros in 48 tensors (model.layers.1.mlp.experts.0.down_proj.weight",
        ),
        (lambda tensors: tensors["model.layers.1.mlp.gate.expert_bias"].zero_(), None),
    ],
)
def test_all_numbers_are_looked_at_if_asked(change, detail, tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    with_numbers(change)(tmp_path / "model")
    read = []
    (_, check) = doctor_weights.weights(tmp_path / "model", lambda done, total: read.append(done / total))
    assert read == sorted(read) and abs(read[-1] - 1) < 0.01
    if detail is None:
        assert check.ok and "of bfloat16" in check.detail
    else:
        assert check.ok is False and detail in check.detail and check.fix == FETCH


def test_numbers_of_eight_bits_are_looked_at_too(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    quantize(model, "fp8")
    assert [check.ok for check in doctor_weights.weights(model)] == [None, True]


ENGINE = """
import os, sys, time, setproctitle
if os.fork() == 0:
    setproctitle.setproctitle("VLLM::EngineCore")
    print(os.getpid(), flush=True)
    time.sleep(60)
time.sleep(60 * (sys.argv[1] == "lives"))
"""


@pytest.mark.parametrize("server", ["lives", "was killed"])
def test_an_engine_without_its_server_is_named(server):
    with subprocess.Popen([sys.executable, "-c", ENGINE, server], stdout=subprocess.PIPE, text=True) as process:
        engine = psutil.Process(int(process.stdout.readline()))
        try:
            if server == "was killed":
                process.wait(30)
            found = [check.detail for check in doctor._engines_left_behind() if f"kill {engine.pid}" in check.detail]
            said = f"{engine.pid} runs without its server and keeps its memory; end it by: kill {engine.pid}"
            assert found == ([] if server == "lives" else [said])
        finally:
            engine.kill()
            process.kill()


def test_deep_checks_need_a_model():
    assert invoke("doctor", "--deep").exit_code == 2


def test_a_model_that_is_not_here_is_told_how_to_get(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (check,) = doctor.checkpoint("no-such/model")
    assert check.ok is False and check.fix == "fetch it by `hf download no-such/model`"


@pytest.mark.parametrize(("wrong", "line"), [(0, "all is well"), (1, "1 problem"), (2, "2 problems")])
def test_problems_are_counted_in_the_last_line(wrong, line, monkeypatch):
    checks = [doctor.Check("good", True, ""), doctor.Check("unknown", None, "")]
    checks += [doctor.Check(f"bad {number}", False, "", "change it") for number in range(wrong)]
    monkeypatch.setattr(doctor, "environment", lambda: iter(checks))
    monkeypatch.setattr(doctor, "Worker", lambda: SimpleNamespace(checks=lambda: iter(())))  # a process imports vLLM
    done = invoke("doctor")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (int(wrong > 0), line)
    assert done.stdout.count("to do: change it") == wrong


def fetched(place: str, folder):
    """The demo as `hf download` leaves it: in its cache, or in a folder by --local-dir."""
    digest = hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()
    if place == "cache":
        blob = folder / "models--a--b" / "blobs" / digest
        folder = folder / "models--a--b" / "snapshots" / "abc"
        shutil.copytree(DEMO, folder)
        blob.parent.mkdir(parents=True)
        (folder / "model.safetensors").rename(blob)
        (folder / "model.safetensors").symlink_to(os.path.relpath(blob, folder))
    else:
        shutil.copytree(DEMO, folder, dirs_exist_ok=True)
        notes = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
        notes.parent.mkdir(parents=True)
        notes.write_text(f"commit\n{digest}\n1700000000.0\n")
    return folder


@pytest.mark.parametrize("place", ["cache", "local-dir"])
def test_files_of_the_hub_are_compared_with_its_hashes(place, tmp_path):
    folder = fetched(place, tmp_path)
    assert by_name(doctor_weights.weights(folder))["hashes"].detail == "1 of 1 files are what the hub has"
    file = (folder / "model.safetensors").resolve()
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    check = by_name(doctor_weights.weights(folder))["hashes"]
    assert check.ok is False and check.detail == "not what the hub has: model.safetensors"
    assert check.fix == ("hf download a/b" if place == "cache" else "copy, fetch or export it again")


def test_files_from_elsewhere_have_no_hashes():
    assert by_name(doctor_weights.weights(DEMO))["hashes"].ok is None


# ---- a server --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (200, {"usage": {"completion_tokens": 1}}, "generated in 0.5 s"),
        (200, {"usage": {"completion_tokens": 0}}, "HTTP 200: no token"),
        (500, {"error": {"message": "EngineCore encountered an issue. See stack trace (above)"}}, "engine has ended"),
        (400, {"error": {"message": "prompt: too long"}}, "HTTP 400: prompt: too long"),
        (404, {"error": "no such page"}, "HTTP 404: no such page"),
    ],
)
def test_a_token_is_asked_for(status, answer, said):
    response = httpx.Response(status, json=answer)
    response.elapsed = timedelta(seconds=0.5)
    found = doctor_server._token(SimpleNamespace(post=lambda *_, **__: response), "demo", {})
    assert said in found.detail and found.ok == ("generated" in said) and bool(found.fix) != found.ok


@pytest.mark.parametrize("page", ["<html>It works!</html>", '{"data": []}', '{"data": 3}', '{"data": [3]}'])
def test_what_serves_no_model_is_no_server(page):
    with serving_page(page) as address:
        done = invoke("doctor", "--url", address)
    assert done.exit_code == 1 and "lists no models; is it a vLLM server?" in done.stdout, done.output
    assert "ok  " not in done.stdout and done.stdout.count("to do") == 1


def test_what_is_left_to_do_is_not_all_well(tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    with_pickled_files(tmp_path / "model")
    done = invoke("doctor", tmp_path / "model")
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == 'no problem found; see what is under "to do"'


def as_anyone(*command):
    """A command that may read what everyone may: to root, nothing is forbidden but by leaving that ability behind."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    program = [sys.executable, "-c", "from vllm_bailing.cli import main; main()", *map(str, command)]
    return subprocess.run([*drop, *program], capture_output=True, text=True)


@pytest.mark.parametrize(
    "command",
    [
        *(("plan", "M", "--gpu", "H100"), ("quantize", "M", "out"), ("verify", "M"), ("report", "--model", "M")),
        *(("bench", "mtp", "M"), ("balance", "M"), ("tune", "M"), ("train-mtp", "M", "--out", "out"), ("demo", "M")),
        ("draft-vocab", "M", "--text", __file__, "--out", "out"),
    ],
    ids=" ".join,
)
def test_a_folder_that_may_not_be_read_is_one_line(command, tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "model").chmod(0)
    places = {"M": tmp_path / "model", "out": tmp_path / "out"}
    done = as_anyone(*(places.get(word, word) for word in command))
    (tmp_path / "model").chmod(0o755)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "Permission denied; let the user who runs this read it" in done.stderr.replace("\n", " "), done.stderr


@pytest.mark.parametrize("closed", ["", "config.json", "model.safetensors"])
def test_what_may_not_be_read_is_for_doctor_to_tell(closed, tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    (tmp_path / "model" / closed).chmod(0)
    done = as_anyone("doctor", tmp_path / "model", "--json")
    (tmp_path / "model").chmod(0o755)
    assert done.returncode == 1, done.stderr
    (wrong,) = [check for check in json.loads(done.stdout) if check["ok"] is False]
    assert "Permission denied" in wrong["detail"] and wrong["fix"] == "let the user who runs this read it", wrong


def test_an_index_with_more_than_the_files_is_told(tmp_path):
    model = make_checkpoint(tmp_path / "model", shards=2)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.9.mlp.gate.weight"] = next(iter(index["weight_map"].values()))
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (told,) = (check for check in doctor.checkpoint(str(model)) if check.detail.startswith("the index names"))
    assert told.ok is None and told.detail.endswith("no file has: 1 tensor (model.layers.9.mlp.gate.weight)")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_word_that_ends_answers_is_told(file, tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    assert "stop tokens" not in by_name(doctor.checkpoint(str(tmp_path / "model")))
    contents = json.loads((tmp_path / "model" / file).read_text()) | {"eos_token_id": 500}
    (tmp_path / "model" / file).write_text(json.dumps(contents))
    check = by_name(doctor.checkpoint(str(tmp_path / "model")))["stop tokens"]
    assert check.ok is None and check.detail.startswith("eos_token_id 500 is the word "), check


@pytest.mark.parametrize(
    ("before", "after"),
    [("attention.query_layernorm", "attention.qq_norm"), ("mlp.gate", "mlp.router"), ("enorm", "norm_e")],
)
def test_misnamed_tensors_of_an_mtp_layer_are_no_further_layer(before, after, tmp_path):
    shutil.copytree(DEMO, tmp_path / "model")
    write_tensors(
        tmp_path / "model", {name.replace(before, after): one for name, one in read_tensors(tmp_path / "model").items()}
    )
    for check in doctor.checkpoint(str(tmp_path / "model")):
        assert "num_hidden_layers" not in check.fix + check.detail or check.name == "config.json", check
