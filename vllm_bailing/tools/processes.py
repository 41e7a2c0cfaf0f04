"""Processes with a group of their own: nothing of them is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

_POLL_S = 0.1


def end_group(process: subprocess.Popen, seconds: float = 5.0) -> None:
    """End `process` and all in its group, whoever is left: asked first, killed after `seconds`."""
    with undisturbed():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        kill_group(process, seconds)


def kill_group(process: subprocess.Popen, seconds: float) -> None:
    """Wait until all of the group of `process` have ended; kill those that have not after `seconds`."""
    end = time.monotonic() + seconds
    while _group_exists(process) and time.monotonic() < end:
        time.sleep(_POLL_S)
    if _group_exists(process):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """A second Ctrl-C must not leave processes running."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _group_exists(process: subprocess.Popen) -> bool:
    process.poll()  # takes the exit status, without which the group would stay
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
