"""Commands on the CUDA build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.cuda_build import fakes
from tests.cuda_build.deployments import CONFIGURED, FP8_BLOCKS, MINI, MINI_BASE, W4A16, mtp


def test_doctor_finds_the_gpus_without_the_drivers_tool():
    program = Path(sys.executable).with_name("vllm-bailing")
    env = {**os.environ, "PATH": str(program.parent), "COLUMNS": "200"}
    done = subprocess.run([program, "doctor"], env=env, capture_output=True, text=True)
    assert f"{os.environ['FAKE_GPU_COUNT']} x {os.environ['FAKE_GPU_NAME']}" in done.stdout, done.stdout + done.stderr


def _refused(changes: dict[str, Any]) -> str:
    config = fakes.engine_config(MINI, changes, tensor_parallel_size=8, distributed_executor_backend="mp")
    try:
        with fakes.on_gpus(config, is_processed=False):
            return ""
    except Exception as error:
        return str(error)


@pytest.mark.parametrize("changes", [W4A16, FP8_BLOCKS], ids=["W4A16", "fp8 blocks"])
def test_groups_that_ranks_would_cut_are_refused_with_both_ways_out(changes, forked):
    message = forked(_refused, changes)
    assert "\n" not in message and ".." not in message
    assert 0 < message.find("smaller --tensor-parallel-size") < message.find("dequantize")


def _both_heads() -> str:
    options = mtp(1, draft_lm_head_quantization="fp8")
    try:
        fakes.engine_config(MINI_BASE, **options, additional_config={"bailing_draft_vocab": [1, 2, 3]})
        return ""
    except Exception as error:
        return str(error)


@pytest.mark.skipif("mini, MTP 1, fp8 head" not in CONFIGURED, reason="vLLM quantizes heads of drafts from 0.33 on")
def test_a_draft_has_one_head(forked):
    assert "leave one of them out" in forked(_both_heads)


def _tuned(*arguments: str) -> tuple[int, str]:
    from vllm_bailing.cli import app

    model = fakes.CONFIGS / f"{MINI}.json"
    done = CliRunner().invoke(app, ["tune", str(model), "--dry-run", "--device-name", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        (("NVIDIA_H20",), "TRITON"),
        (("NVIDIA_H20", "--dtype", "fp8"), "TRITON"),
        (("NVIDIA_B200",), "FLASHINFER_TRTLLM"),
        (("NVIDIA_B200", "--dtype", "fp8"), "FLASHINFER_TRTLLM"),
        (("NVIDIA_B200", "--moe-backend", "triton"), "TRITON"),
        (("NVIDIA_B200", "--dtype", "fp8", "--moe-backend", "triton"), "TRITON"),
        (("NVIDIA_A100-SXM4-80GB",), "TRITON"),
        (("NVIDIA_H20", "--enable-expert-parallel", "--tp", "4"), "TRITON"),
        (("NVIDIA_H20", "--enable-expert-parallel", "--tp", "4", "--dtype", "fp8"), "FLASHINFER_CUTLASS"),
        (("NVIDIA_B200", "--enable-expert-parallel", "--tp", "4"), "FLASHINFER_TRTLLM"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_no_table_is_tuned_that_vllm_would_not_read(arguments, backend, forked):
    code, text = forked(_tuned, *arguments)
    assert code == (0 if backend == "TRITON" else 2), text
    assert (f"vLLM chooses {backend} experts, which read it" if code == 0 else f"vLLM chooses {backend} with") in text
    assert ("add it here" in text) == (code == 2)
