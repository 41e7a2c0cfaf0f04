"""The scripts for machines with GPUs, each step as far as it goes without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

MACHINE = Path(os.environ.get("LD_PRELOAD", "")).parent
WANTED = {
    "smoke": "versions reference-fp32 reference-bf16 runners mtp quantized adapters tp2 serve",
    "bench": "environment compare-mini mtp-model mtp expectations",
}


@pytest.mark.parametrize("script", WANTED)
def test_every_step_gets_as_far_as_a_gpu_is_needed(script, tmp_path):
    settings = {"REHEARSAL": "1", "REQUIRE_GPU": "1", "SKIP_SETUP": "1", "SHAPES": "mini"}
    settings |= {"VENV": sys.prefix, "FAKE_GPU_COUNT": "2"}
    env = {**os.environ, **settings, "PATH": f"{MACHINE / 'bin'}:{os.environ['PATH']}"}
    # Calls of the CUDA runtime fail as they do without a driver: what goes on after them would crash in NCCL.
    env = {name: value for name, value in env.items() if name != "LD_PRELOAD" and not name.startswith("PYTEST")}
    command = ["bash", str(ROOT / "scripts" / "gpu" / f"{script}.sh"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    outcomes = dict(re.findall(r"^\[\d+/\d+\] ([\w-]+): (ok|as far as a GPU is needed)", done.stdout, re.MULTILINE))
    assert list(outcomes) == WANTED[script].split()
    without = ("versions", "environment", "mtp-model", "expectations")
    assert [name for name, outcome in outcomes.items() if outcome == "ok"] == [
        one for one in outcomes if one in without
    ]
