"""What all rooms share: markers by room, fixtures, and how two processes of pytest-xdist share the machine."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer
from xdist.scheduler import LoadScopeScheduling

from vllm_bailing import DEMO
from vllm_bailing.reference import BailingMoeV2ForCausalLM

# Files whose tests share something that takes long to make: a server, an environment with the built wheel.
TOGETHER = {"test_server", "test_parsers", "test_packaging", "test_demo_script", "test_demo_checkpoint", "test_docs"}


def pytest_configure(config):
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        # Threads of two engines on the same cores would wait for each other most of the time.
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[int(worker.removeprefix("gw")) % len(cores)])


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name in ("engine", "serve"):
            item.add_marker("engine")


class KeepTogether(LoadScopeScheduling):
    """Gives the tests of such a file to one worker, all others to whoever is free."""

    def _split_scope(self, nodeid):
        module = Path(nodeid.partition("::")[0]).stem
        return module if module in TOGETHER else nodeid


def pytest_xdist_make_scheduler(config, log):
    # Not by the mark xdist_group, which pytest-xdist 3.8 writes where pytest 9.2 does not look.
    return KeepTogether(config, log)


@pytest.fixture(scope="session")
def plain():
    """The plain model in fp32 and its tokenizer."""
    model = BailingMoeV2ForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(DEMO))
