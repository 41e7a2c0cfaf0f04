"""The commands of `vllm-bailing`: in this process, or in one of their own where that is the point."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

from click.testing import Result
from huggingface_hub import constants
from typer.testing import CliRunner

from tests.support import warm
from tests.support.engine import ENGINE_ENV
from vllm_bailing.cli import app

TERMINAL = {"TTY_COMPATIBLE": "1", "TERM": "dumb", "COLUMNS": "80"}  # one of 80 columns, without colors


def invoke(*arguments: Any, **env: str) -> Result:
    """The command in this process: its exit code, output and the exception that ended it.

    The hub is never asked: where it cannot be reached, each question takes its time.
    """
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True):  # read from the environment once
        return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200", **env})


def run_command(*arguments: Any, cache: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with the environment of an engine."""
    program = [str(warm.commands() / "vllm-bailing"), *map(str, arguments)]
    environment = {**os.environ, **ENGINE_ENV, **({"XDG_CACHE_HOME": str(cache)} if cache else {}), **env}
    return subprocess.run(program, capture_output=True, text=True, env=environment)
