"""The measuring commands on the demo checkpoint."""

import json
import math
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tests.support import warm
from vllm_bailing import DEMO
from vllm_bailing.bench import mtp, runner
from vllm_bailing.bench.mtp import MtpTask
from vllm_bailing.bench.statistics import AGAIN, IN_TREE, PLUGIN
from vllm_bailing.cli import app


@pytest.fixture(autouse=True)
def warm_engines(monkeypatch):
    """Every measurement has a process of its own, which need not import vLLM first here."""
    monkeypatch.setattr(sys, "executable", str(warm.commands() / "python"))


def test_mtp_is_measured_on_the_demo(tmp_path):
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    arguments = ["--draft-tokens", "1", "--rounds", "1", "--batch-size", "2", "--max-tokens", "24"]
    arguments += ["--engine", json.dumps(engine), "--out", str(tmp_path / "mtp"), "--json"]
    done = CliRunner().invoke(app, ["bench", "mtp", str(DEMO), *arguments], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "mtp.json").read_text())
    assert [row["arm"] for row in report["rows"]] == ["0", "1"]
    assert all(row["same_answers"] for row in report["rows"])
    assert report["rows"][1]["acceptance"][0] >= 0.8
    assert (tmp_path / "mtp.png").is_file()


def test_short_answers_are_asked_for_until_the_measurement_is_long_enough():
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    task = MtpTask(str(DEMO), engine, [2], ["What is YaRN?", "Tell me about vLLM."], 8, ignore_eos=True)
    found = runner.run_task(task)[2]
    assert found.seconds >= mtp.MIN_SECONDS
    assert found.tokens > 2 * 8 and found.tokens % (2 * 8) == 0


def test_a_folder_without_a_model_is_refused_before_an_engine_starts(tmp_path):
    done = CliRunner().invoke(app, ["bench", "mtp", str(tmp_path), "--rounds", "1", "--out", str(tmp_path / "mtp")])
    assert (
        done.exit_code == 2
        and done.stderr == f"vllm-bailing bench: {tmp_path} is empty; copy, fetch or export it again\n"
    )


def test_both_classes_are_compared_on_the_demo(tmp_path):
    command = [str(warm.commands() / "vllm-bailing"), "bench", "compare", "demo"]
    command += ["--rounds", "1", "--batch-size", "1", "--output-tokens", "8", "--prefill", "64", "--eager"]
    command += ["--no-warm-up", "--bandwidth", "0.04", "--out", str(tmp_path / "x"), "--json"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "x.json").read_text())
    assert list(report["arms"]) == [IN_TREE, AGAIN, PLUGIN]
    assert [facts["model"].partition(".")[0] for facts in report["arms"].values()] == ["vllm", "vllm", "vllm_bailing"]
    facts = report["arms"][PLUGIN]
    assert facts["experts"] != "-" and facts["attention"] != "-" and facts["compilation"] == "NONE"
    wanted = ["decode 1", "TTFT 1", "TPOT 1", "prefill 64", "load", "start", "memory"]
    assert list(dict.fromkeys(row["figure"] for row in report["rows"])) == wanted
    assert all(0 < row["median"] < math.inf for row in report["rows"])
    assert report["roofline"]["shares"].keys() == {"decode 1"}
    own = facts["experts"] == "vllm_bailing.PackedExperts"  # on some CPUs, see test_cpu.py
    assert (len(report["notes"]) == 1 and "PackedExperts" in report["notes"][0]) if own else report["notes"] == []
    assert (tmp_path / "x.png").is_file()
