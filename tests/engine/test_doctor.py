"""`vllm-bailing doctor` in an environment with vLLM, whose workers it asks."""

from __future__ import annotations

import json

from tests.support.commands import run_command
from vllm_bailing import DEMO


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


def test_deep_checks_follow_the_others():
    done = run_command("doctor", DEMO, "--deep", "--json")
    assert done.returncode == 0 and "numbers" in {check["name"] for check in json.loads(done.stdout)}
