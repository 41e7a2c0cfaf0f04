"""What the `bench` commands report, and the files that they leave: NAME.json, and NAME.png with matplotlib."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_bailing.bench.in_tree import CompareTask
from vllm_bailing.bench.mtp import NO_DRAFTS, Measurement, MtpTask, advice, summarize
from vllm_bailing.bench.shapes import SHAPES
from vllm_bailing.json_files import write_text

Report = dict[str, Any]


def mtp_report(
    task: MtpTask,
    results: dict[str, list[dict[int, Measurement]]],
    *,
    acceptance: float | None,
    versions: Mapping[str, Any],
) -> Report:
    """Report of `vllm-bailing bench mtp`.

    Args:
        task: What all arms have in common.
        results: Of `runner.alternate`, with an arm `NO_DRAFTS`.
        acceptance: Chance at which vLLM was told to accept a draft token, if it was.
        versions: Of the packages that ran.
    Returns:
        `rows` (see `mtp.summarize`), `advice` (see `mtp.advice`), and what was measured.
    """
    rows = summarize(results, NO_DRAFTS)
    return {
        "model": task.model,
        "acceptance": acceptance,
        "rounds": len(results[NO_DRAFTS]),
        "engine": task.engine,
        "versions": versions,
        "rows": rows,
        "advice": advice(rows, NO_DRAFTS),
    }


def comparison_report(
    model: str,
    task: CompareTask,
    options: Mapping[str, dict[str, Any]],
    rounds: int,
    measured: Mapping[str, Any],
    *,
    command: str,
    versions: Mapping[str, Any],
) -> Report:
    """Report of `vllm-bailing bench compare`.

    Args:
        model: As the user named it; `task.model` may be a folder that was made for it.
        task: What all arms have in common.
        options: Arguments of `vllm.LLM` of the further arms.
        measured: What `in_tree.run` returned.
        command: The shell command that was run.
        versions: Of the packages that ran.
    """
    return {
        "model": model,
        "config": SHAPES.get(model),
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions,
        "rounds": rounds,
        "engine": task.engine,
        "options": options,
        "prompt_tokens": task.prompt_tokens,
        "output_tokens": task.output_tokens,
        **measured,
    }


def files_of(out: Path) -> tuple[Path, Path]:
    """OUT.json and OUT.png, of a name with or without one of these suffixes."""
    stem = out.name.removesuffix(".json").removesuffix(".png")
    return out.with_name(f"{stem}.json"), out.with_name(f"{stem}.png")


def write_report(report: Report, out: Path, plot: Callable[[Report, Path], None]) -> list[Path]:
    """Write `report` to OUT.json and its plot to OUT.png, and make the folder for them.

    Args:
        out: A name without suffix; ".json" or ".png" at its end is taken off.
        plot: Such as `plots.plot_mtp`.
    Returns:
        The files that were written: the JSON alone if there is no plot, for want of matplotlib.
    """
    data, picture = files_of(out)
    written = [data]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(written[0], json.dumps(report, indent=1) + "\n")
    try:
        plot(report, picture)
    except ImportError:
        return written
    return [*written, picture]
