"""Commands on the CUDA build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cuda_build import fakes
from tests.cuda_build.deployments import MINI, W4A16


def test_doctor_finds_the_gpus_without_the_drivers_tool():
    program = Path(sys.executable).with_name("vllm-bailing")
    env = {**os.environ, "PATH": str(program.parent), "COLUMNS": "200"}
    done = subprocess.run([program, "doctor"], env=env, capture_output=True, text=True)
    assert f"{os.environ['FAKE_GPU_COUNT']} x {os.environ['FAKE_GPU_NAME']}" in done.stdout, done.stdout + done.stderr


def _refused() -> str:
    config = fakes.engine_config(MINI, W4A16, tensor_parallel_size=8, distributed_executor_backend="mp")
    try:
        with fakes.on_gpus(config, is_processed=False):
            return ""
    except Exception as error:
        return str(error)


def test_groups_that_ranks_would_cut_are_refused_with_both_ways_out(forked):
    message = forked(_refused)
    assert "\n" not in message and ".." not in message
    assert 0 < message.find("smaller --tensor-parallel-size") < message.find("dequantize")
