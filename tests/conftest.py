"""What all rooms share: markers by room, fixtures, and how two processes of pytest-xdist share the machine."""

from __future__ import annotations

import os

import pytest
from xdist.scheduler import LoadScopeScheduling

from vllm_bailing import DEMO

# Tests that share what takes long to make stay on one process. The group with the most tests is started first, and
# tests without a group fill the gaps, so that two processes end at the same time.
GROUPS = {
    "servers": ("serve",),
    "answers of the demo": tuple(
        f"engine/test_{name}.py" for name in "mtp_answers mtp_checkpoints draft_vocab eagle3 quantized_demo".split()
    ),
    "vLLM imported by tests": tuple(
        f"engine/test_{name}.py"
        for name in (
            "balancing gpu_timer nodes optional_reasoning parsers repeated_lists tuning_command tuning_files window"
        ).split()
    ),
    "vLLM's view of a configuration": ("engine/test_config_in_vllm.py",),
    "trained layers": ("engine/test_train_mtp.py", "engine/test_train_mtp_ranks.py"),
    "servers of the pages": ("project/test_docs.py",),
    "what modules import": ("project/test_import_rules.py",),
    "the built wheel": ("project/test_packaging.py",),
    "the demo script": ("project/test_demo_script.py",),
    "the demo checkpoint": ("project/test_demo_checkpoint.py",),
    "engines that others compare with": ("engine/test_qk_norm_rope.py", "engine/test_cpu_kernels.py"),
}
GROUP_OF = {part: group for group, parts in GROUPS.items() for part in parts}


def pytest_addoption(parser):
    text = "How many cases to draw at random and to put through an engine, where tests do so."
    parser.addoption("--random-cases", type=int, default=500, help=text)
    text = "Also what a usual run leaves out: every scheme that CPUs have kernels for, a killed rank of a training."
    parser.addoption("--thorough", action="store_true", help=text)


@pytest.fixture(scope="session")
def random_cases(pytestconfig):
    """How many to draw."""
    return pytestconfig.getoption("--random-cases")


def pytest_configure(config):
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker:
        # Threads of two processes on the same cores would wait for each other most of the time.
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch  # not in the process that only hands out tests

        torch.set_num_threads(1)
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[int(worker.removeprefix("gw")) % len(cores)])


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name in ("engine", "serve"):
            item.add_marker("engine")
        if item.get_closest_marker("thorough") and not item.config.getoption("--thorough"):
            item.add_marker(pytest.mark.skip(reason="runs with --thorough"))


class KeepTogether(LoadScopeScheduling):
    """Gives the tests of a group to one process, all others to whichever is free."""

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0].partition("tests/")[2]
        return GROUP_OF.get(file) or GROUP_OF.get(file.partition("/")[0]) or nodeid


def pytest_xdist_make_scheduler(config, log):
    # Not by the mark xdist_group, which pytest-xdist 3.8 writes where pytest 9.2 does not look.
    return KeepTogether(config, log)


@pytest.fixture(scope="session")
def registered():
    """The configuration class, known to transformers."""
    from vllm_bailing.config import register_with_transformers

    register_with_transformers()


@pytest.fixture(scope="session")
def plain():
    """The demo in plain PyTorch, in fp32, and its tokenizer."""
    from tests.support.conversations import plain_model

    return plain_model(DEMO)
