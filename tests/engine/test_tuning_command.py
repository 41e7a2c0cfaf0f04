"""`vllm-bailing tune` without its GPU."""

from __future__ import annotations

import json

import pytest
import torch
from serve_configs import zoo_config
from typer.testing import CliRunner

from tests.support.tuning import DEFAULT, H20, MACHINE, FakeTimer
from vllm_bailing import DEMO
from vllm_bailing.cli import app
from vllm_bailing.plugin import patches
from vllm_bailing.tuning import gpu_timer, plan
from vllm_bailing.tuning.space import LADDER


def invoke(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture
def mini(tmp_path):
    zoo_config("Ling-mini-2.0").save_pretrained(tmp_path)
    return tmp_path


def test_a_dry_run_needs_no_gpu(mini, tmp_path):
    done = invoke(
        mini, "--dry-run", "--device-name", H20, "-tp", 2, "--dtype", "fp8", "--out", tmp_path / "t", "--json"
    )
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["file"] == str(
        tmp_path / "t" / "E=256,N=256,device_name=NVIDIA_H20,dtype=fp8_w8a8,block_shape=[128,128].json"
    )
    assert (plan["exists"], plan["experts"]["intermediate_size"]) == (False, 256)
    assert plan["in_vllm"].endswith(
        "configs/E=256,N=256,device_name=NVIDIA_H20,dtype=fp8_w8a8,block_shape=[128,128].json"
    )
    assert list(plan["candidates"]) == [str(tokens) for tokens in LADDER] and min(plan["candidates"].values()) > 10
    assert 300 < plan["estimated_seconds"] < 4 * 3600
    assert not (tmp_path / "t").exists()


def test_a_dry_run_says_what_is_there(mini, tmp_path):
    (tmp_path / "E=256,N=128,device_name=NVIDIA_H20.json").write_text("{}")
    done = invoke(mini, "--dry-run", "--device-name", H20, "-tp", 4, "--out", tmp_path)
    assert "device_name=NVIDIA_H20.json (exists)" in done.stdout
    assert "vLLM's own: none, so it would use its defaults" in done.stdout
    assert "w1 [256, 256, 2048], w2 [256, 2048, 128]" in done.stdout
    assert "only its CUDA build can tell" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_without_a_gpu_there_is_one_line(arguments):
    done = invoke(DEMO, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if "vllm-bailing tune:" in line]
    assert "no GPU that torch can use" in line and "--dry-run --device-name" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-tp", 3), "must divide"),
        (("--device-name", H20), "--device-name is for --dry-run"),
        (("--dtype", "int4", "--dry-run", "--device-name", H20), "--dtype int4"),
    ],
)
def test_a_request_that_makes_no_sense_ends_with_exit_code_2(arguments, words, mini):
    done = invoke(mini, *arguments)
    assert done.exit_code == 2 and words in " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture
def with_gpu(monkeypatch):
    """The command as it would run on a GPU, with times that are made up."""
    monkeypatch.setattr(gpu_timer, "missing", str)
    monkeypatch.setattr(plan, "shared_memory", lambda: 99 * 1024)
    monkeypatch.setattr(plan, "device_info", lambda: MACHINE)
    monkeypatch.setattr(plan, "LADDER", (1, 4096))
    monkeypatch.setattr(plan, "baseline", lambda _experts, _tokens: DEFAULT)

    class ThreeStagesAreFast(FakeTimer):
        def __init__(self, _experts):
            super().__init__([])

        def arm(self, one):
            self.times[tuple(one.values())] = 0.8 if one["num_stages"] == 3 else 1.0
            return super().arm(one)

    monkeypatch.setattr(plan, "GpuTimer", ThreeStagesAreFast)
    with patches.pretend_device(H20):
        yield ThreeStagesAreFast


def test_the_command_prints_times_and_how_to_use_the_table(mini, tmp_path, with_gpu):
    done = invoke(mini, "-tp", 2, "--out", tmp_path / "tables")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["tokens", "default", "ms", "best", "ms", "ratio", "entry"]
    assert [line.split()[0] for line in lines[2:4]] == ["1", "4096"] and "1.25" in lines[2]
    assert "2 of 2 entries are faster" in done.stdout
    assert "(does not exist yet)" in done.stderr and "vLLM's own: " in done.stderr
    serve = f"VLLM_TUNED_CONFIG_FOLDER={tmp_path / 'tables'} vllm serve {mini} --tensor-parallel-size 2"
    assert serve in lines
    asked = invoke(mini, "-tp", 2, "--out", tmp_path / "asked", "--moe-backend", "triton")
    assert "--tensor-parallel-size 2 --moe-backend triton" in asked.stdout
    divided = invoke(mini, "-tp", 2, "--enable-expert-parallel", "--out", tmp_path / "divided")
    assert "--tensor-parallel-size 2 --enable-expert-parallel" in divided.stdout
    assert "E=128,N=512,device_name=NVIDIA_H20.json" in divided.stdout
    assert "256 experts in bf16, 8 per token; on each rank w1 [128, 1024, 2048]" in divided.stderr
    again = invoke(mini, "-tp", 2, "--out", tmp_path / "tables")
    assert again.exit_code == 2 and "is there; use it, or add --overwrite" in again.stderr


def test_no_table_is_tuned_that_vllm_would_not_read(mini, with_gpu, monkeypatch):
    monkeypatch.setattr(plan, "chosen_backend", lambda _experts, _device, moe_backend: {"auto": "AITER"}[moe_backend])
    done = invoke(mini)
    (line,) = [line for line in done.stderr.splitlines() if "vllm-bailing tune:" in line]
    assert done.exit_code == 2 and "bf16 on this GPU, vLLM chooses AITER with --moe-backend auto" in line
    assert "--moe-backend triton" in line


def test_ctrl_c_says_how_to_go_on(mini, tmp_path, with_gpu, monkeypatch):
    arm = with_gpu.arm
    count = iter(range(100))

    def stopping(self, one):
        if next(count) == 5:
            raise KeyboardInterrupt
        return arm(self, one)

    monkeypatch.setattr(with_gpu, "arm", stopping)
    done = invoke(mini, "--out", tmp_path / "tables")
    left = tmp_path / "tables" / "E=256,N=512,device_name=NVIDIA_H20.partial.jsonl"
    assert done.exit_code == 130 and f"{left}, and the same command goes on" in done.stderr
    assert len(left.read_text().splitlines()) == 6  # the key, and five candidates
    monkeypatch.setattr(with_gpu, "arm", arm)
    assert invoke(mini, "--out", tmp_path / "tables").exit_code == 0
    assert not left.exists()
