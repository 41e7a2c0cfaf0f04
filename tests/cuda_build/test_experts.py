"""vLLM's Triton experts with this family's routing, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

# 8 bits of weights and activations: what two roundings to 1/254 and to 1/16 leave, several times over in a sum.
LIMITS = {"routing": 1e-6, "fp32": 1e-5, "int8": 0.03, "fp8 blocks": 0.08}


@pytest.fixture(scope="module")
def errors():
    command = [sys.executable, "-m", "tests.cuda_build.interpreted"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("scheme", LIMITS)
def test_the_kernel_computes_the_experts(scheme, errors):
    assert errors[scheme] <= LIMITS[scheme]
