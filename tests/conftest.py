"""How tests share the machine when pytest-xdist runs two at once, as scripts/test.sh does."""

import os
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

# Files whose tests share something that takes long to make: a server, an environment with the built wheel.
TOGETHER = {"test_serve", "test_packaging", "test_demo_script", "test_demo_checkpoint", "test_parsers", "test_docs"}


def pytest_configure(config):
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        # Threads of two engines on the same cores would wait for each other most of the time.
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[int(worker.removeprefix("gw")) % len(cores)])


class KeepTogether(LoadScopeScheduling):
    """Gives the tests of such a file to one worker, all others to whoever is free."""

    def _split_scope(self, nodeid):
        module = Path(nodeid.partition("::")[0]).stem
        return module if module in TOGETHER else nodeid


def pytest_xdist_make_scheduler(config, log):
    # Not by the mark xdist_group, which pytest-xdist 3.8 writes where pytest 9.2 does not look.
    return KeepTogether(config, log)
