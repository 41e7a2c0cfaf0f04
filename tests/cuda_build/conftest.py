"""Tests on vLLM's CUDA build without a GPU, started by scripts/gpu/rehearse.sh, once for each GPU and vLLM.

Elsewhere they are not collected: vLLM decides while it is imported on which platform it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest

if "FAKE_GPU_NAME" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-kernels", action="store_true", help="Record the kernels that vLLM chooses, and pass.")


@pytest.fixture(scope="session")
def forked() -> Callable[..., Any]:
    """`forked(job, *args)` is what `job(*args)` returns in a process of its own, a fork with vLLM imported.

    A failure has the end of what the process printed. What a job imports, later ones find imported: that takes longer
    than most jobs.
    """
    from tests.cuda_build import fakes
    from tests.support.engine import outcome

    fakes.pretend()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for name in ("vllm.engine.arg_utils", "vllm.model_executor.model_loader", "vllm_bailing.model", "vllm_bailing.mtp"):
        importlib.import_module(name)  # once, and not in every fork
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda job: job()  # which would import vLLM once more, to look at a model class

    def run(job: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile("w+", errors="replace") as log:
            process = os.fork()
            if process == 0:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                sys.stdout = sys.stderr = log
                before = set(sys.modules)
                found = outcome(job, args, kwargs)
                log.flush()
                os.write(answer.fileno(), pickle.dumps((*found, [name for name in sys.modules if name not in before])))
                os._exit(0)
            os.waitpid(process, 0)
            answer.seek(0)
            kind, value, imported = pickle.loads(answer.read() or pickle.dumps(("error", "the process died", [])))
            for name in imported:
                with contextlib.suppress(Exception):  # what could not be imported by itself
                    importlib.import_module(name)
            log.seek(0)
            assert kind == "ok", f"{value}\n--- end of the output ---\n{log.read()[-4000:]}"
            return value

    return run


# What does not depend on the GPU is checked for one.
ONCE = (
    "test_operations.py",
    "test_experts.py",
    "test_commands.py",
    "test_scripts.py",
    "test_configuration.py::test_a_deployment_is_configured",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "H100" in os.environ.get("FAKE_GPU_NAME", "H100"):
        return
    here = [item for item in items if not any(part in item.nodeid for part in ONCE)]
    config.hook.pytest_deselected(items=[item for item in items if item not in here])
    items[:] = here


@pytest.fixture(scope="session")
def gpu() -> str:
    """The GPU's name on the command line of `vllm-bailing plan`."""
    from vllm_bailing.planning.gpus import GPUS

    (found,) = [one.name for one in GPUS.values() if os.environ["FAKE_GPU_NAME"] in one.driver_names]
    return found


@pytest.fixture(scope="session")
def vllm_version() -> str:
    """Without the name of a build."""
    from vllm.version import __version__

    return __version__.partition("+")[0]
