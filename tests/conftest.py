"""How tests share the machine when pytest-xdist runs two at once, as scripts/test.sh does."""

import os

import pytest

# Files whose tests share something that takes long to make: a server, an environment with the built wheel.
TOGETHER = {"test_serve", "test_packaging", "test_demo_script", "test_demo_checkpoint"}


def pytest_configure(config):
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        # Threads of two engines on the same cores would wait for each other most of the time.
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[int(worker.removeprefix("gw")) % len(cores)])


def pytest_collection_modifyitems(items):
    for item in items:
        if item.module.__name__ in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))
