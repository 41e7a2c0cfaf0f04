"""vLLM's Triton experts with this family's routing, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def test_the_experts_that_round_the_routers_weights_are_named():
    """What README and the change log say of "fp32 from the gate to the weights of the experts"."""
    import flashinfer

    library = (Path(flashinfer.__path__[0]) / "fused_moe" / "core.py").read_text()
    rounds = "``expert_weights`` tensor is always ``bfloat16``" in " ".join(library.split())
    for page, words in (("README.md", "[but for TRT-LLM's experts]"), ("CHANGELOG.md", "TRT-LLM's experts")):
        assert (words in (ROOT / page).read_text()) == rounds, page
