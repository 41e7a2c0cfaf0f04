"""Timed comparisons of vLLM engines that differ in one thing, each in a fresh process, alternating.

A `Task` is what one process measures. An arm is one side of a comparison: a name, and a task that runs once a round.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_bailing.errors import BenchError

PACKAGE_PREFIX = "vllm_bailing."  # what the full names of this package's classes start with


@dataclass
class Task(ABC):
    """What one process measures; every field has to fit into JSON.

    Attributes:
        model: As for `vllm serve`.
        engine: Further arguments of `vllm.LLM`.
        env: Environment variables of the process, besides those of this one.
        out: File for the result; `run_task` fills it in.
    """

    model: str
    engine: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict, kw_only=True)
    out: str = field(default="", kw_only=True)

    @abstractmethod
    def work(self) -> Any:
        """Measure in this process, which needs vLLM and is the task's own; the result has to fit into JSON."""

    def read(self, stored: Any) -> Any:
        """The result of `work`, back from JSON."""
        return stored


def run_task(task: Task) -> Any:
    """Measure in a fresh process.

    Raises:
        BenchError: If that failed.
    """
    # GiB for the KV cache of vLLM's CPU build, which otherwise wants nearly all memory; GPUs do not look at it.
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "4"}
    with tempfile.TemporaryDirectory() as folder:
        task = replace(task, out=str(Path(folder) / "result.json"))
        name = f"{type(task).__module__}:{type(task).__qualname__}"
        log = Path(folder) / "log"
        with log.open("w") as stream:
            done = subprocess.run(
                [sys.executable, "-m", "vllm_bailing.bench"],
                input=json.dumps({"task": name, "fields": asdict(task)}),
                text=True,
                stdout=stream,
                stderr=stream,
                env={**defaults, **os.environ, **task.env},
                check=False,
            )
        if done.returncode or not Path(task.out).is_file():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            errors = [match[0] for line in lines if (match := re.search(r"\w+Error: .*", line))]
            # The engine's own error comes first; what follows only says that the engine is gone.
            raise BenchError("\n".join(errors[:1] or lines[-5:]))
        return task.read(json.loads(Path(task.out).read_text()))


def turns(arms: Iterable[str], rounds: int) -> list[str]:
    """Every arm once a round, in reverse order every other round, so that a slow drift of the machine cancels out."""
    order = list(arms)
    return [arm for number in range(rounds) for arm in (order if number % 2 == 0 else order[::-1])]


def alternate(
    tasks: Mapping[str, Task], rounds: int, check: Callable[[str, Any], None] | None = None, what: str = "engines"
) -> dict[str, list[Any]]:
    """Run the task of every arm once a round in `turns`, with a progress bar on standard error.

    Args:
        check: Called with the arm and the result of every task that ran; may raise.
        what: Label of the progress bar.
    Returns:
        The results of each arm, one per round.
    Raises:
        BenchError: If one of them failed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict[str, list[Any]] = {arm: [] for arm in tasks}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=rounds * len(tasks))
        for arm in turns(tasks, rounds):
            result = run_task(tasks[arm])
            results[arm].append(result)
            if check is not None:
                check(arm, result)
            progress.advance(bar)
    return results


def cpu_info() -> dict[str, Any]:
    """The processor and how many of its cores this process may use."""
    cpu, description = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in description.read_text().splitlines() if description.is_file() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}
