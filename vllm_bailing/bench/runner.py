"""Timed comparisons of vLLM engines that differ in one thing, each in a fresh process, alternating.

An arm is one side of a comparison: a name, and a `Task` that runs once a round.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_bailing.tools.task import Task, run_task

PACKAGE_PREFIX = "vllm_bailing."  # what the full names of this package's classes start with


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
