"""`vllm-bailing doctor` in a good environment, in bad ones, and on damaged checkpoints."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from tests.support.checkpoints import read_tensors, without_mtp_in_config, write_tensors
from tests.support.commands import invoke, run_command
from tests.support.configs import change_config
from vllm_bailing import DEMO
from vllm_bailing.plugin import supported_versions
from vllm_bailing.tools import doctor


def by_name(checks):
    return {check.name: check for check in checks}


def test_a_good_environment_and_checkpoint_are_well():
    done = run_command("doctor", DEMO, COLUMNS="80")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "all is well", done.stdout + done.stderr
    assert "\033" not in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("no ")]
    worker = next(line for line in done.stdout.splitlines() if "a worker's classes" in line)
    assert "BailingMoeV2ForCausalLM from vllm_bailing, BailingMoeV2MTPModel from vllm_bailing" in worker


def test_an_entry_point_masked_by_vllm_plugins_is_found_in_a_worker_too():
    done = run_command("doctor", "--json", VLLM_PLUGINS="other")
    assert done.returncode == 1
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["entry point"]["ok"] is False and checks["entry point"]["fix"] == "export VLLM_PLUGINS=other,bailing"
    worker = checks["a worker's classes"]
    assert worker["ok"] is False and "BailingMoeV2ForCausalLM from vllm," in worker["detail"]


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


def with_pickled_files(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "change, name, ok, detail, fix",
    [
        (with_pickled_files, "files", None, ".bin files, which vLLM serves but nothing here reads", ""),
        (without_a_tensor, "tensors", False, "model.layers.2.mlp.experts.3.up_proj.weight", "incomplete download"),
        (without_a_shard, "files", False, "1 of 3 files of the index are not in", "hf download"),
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


def test_a_model_that_is_not_here_is_told_how_to_get(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (check,) = doctor.checkpoint("no-such/model")
    assert check.ok is False and check.fix == "hf download no-such/model"


@pytest.mark.parametrize(("wrong", "line"), [(0, "all is well"), (1, "1 problem"), (2, "2 problems")])
def test_problems_are_counted_in_the_last_line(wrong, line, monkeypatch):
    checks = [doctor.Check("good", True, ""), doctor.Check("unknown", None, "")]
    checks += [doctor.Check(f"bad {number}", False, "", "change it") for number in range(wrong)]
    monkeypatch.setattr(doctor, "environment", lambda: iter(checks))
    done = invoke("doctor")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (int(wrong > 0), line)
    assert done.stdout.count("to do: change it") == wrong
