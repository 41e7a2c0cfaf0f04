"""What rehearsals found, by release and GPU, in files of tests/data. Several GPUs may be rehearsed at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vllm_bailing.planning.gpus import GPUS


def recorded(file: Path, release: str, gpu: str) -> dict[str, Any]:
    """{deployment: what was found}; empty before the first rehearsal of that kind."""
    if not file.is_file():
        return {}
    with _locked(file) as (_, table):
        return table.get(release, {}).get(gpu, {})


def record(file: Path, release: str, gpu: str, deployment: str, found: Any) -> None:
    """Write `found`, and leave all else as it is."""
    with _locked(file) as (handle, table):
        by_gpu = table.setdefault(release, {})
        by_gpu.setdefault(gpu, {})[deployment] = found
        table[release] = {name: by_gpu[name] for name in GPUS if name in by_gpu}
        handle.truncate(0)
        handle.write(json.dumps(table, indent=1) + "\n")


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[tuple[IO[str], dict[str, Any]]]:
    """`file`, opened to be written anew, and what it holds."""
    with file.open("a+", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        yield handle, json.loads(handle.read() or "{}")
