"""Plots of what was measured.

Every function raises ImportError without matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_bailing.bench.statistics import AGAIN, IN_TREE


def plot_mtp(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Speed by number of draft tokens, and acceptance by position.

    Raises:
        ImportError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=100)
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        arms = [row for row in rows if row["batch_size"] == size]
        x = [int(row["arm"]) for row in arms]
        y = [row["ratio"]["median"] for row in arms]
        below = [row["ratio"]["median"] - row["ratio"]["low"] for row in arms]
        above = [row["ratio"]["high"] - row["ratio"]["median"] for row in arms]
        left.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label=f"batch {size}")
        deepest = max(arms, key=lambda row: len(row["acceptance"]))
        positions = range(1, len(deepest["acceptance"]) + 1)
        right.plot(positions, [100 * share for share in deepest["acceptance"]], marker="o", label=f"batch {size}")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="draft tokens per step", ylabel="tokens/s, times no speculation", ylim=(0, None))
    right.set(xlabel="draft position", ylabel="accepted up to here, %", ylim=(0, 105))
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def plot_comparison(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Ratios to in-tree with their intervals; the band behind each figure is the noise floor.

    Raises:
        ImportError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = list(dict.fromkeys(row["figure"] for row in rows))
    names = [name for name in dict.fromkeys(row["arm"] for row in rows) if name not in (IN_TREE, AGAIN)]
    width = 0.8 / len(names)
    canvas, axis = pyplot.subplots(figsize=(max(6.0, 0.7 * len(figures) + 3), 3.8), dpi=100)
    for place, figure in enumerate(figures):
        noise = next(row["noise"] for row in rows if row["figure"] == figure)
        label = "noise floor" if place == 0 else None
        axis.fill_between([place - 0.45, place + 0.45], 1 / noise, noise, color="0.85", label=label, zorder=0)
    for index, name in enumerate(names):
        found = [row for row in rows if row["arm"] == name]
        x = [place + (index - (len(names) - 1) / 2) * width for place in range(len(figures))]
        below = [row["ratio"] - row["interval"][0] for row in found]
        above = [row["interval"][1] - row["ratio"] for row in found]
        heights = [row["ratio"] - 1 for row in found]
        axis.bar(x, heights, 0.9 * width, bottom=1, label=name, zorder=2, alpha=0.85)
        axis.errorbar(
            x, [row["ratio"] for row in found], yerr=[below, above], fmt="none", ecolor="black", capsize=3, zorder=3
        )
    axis.axhline(1, color="black", linewidth=0.8, zorder=1)
    axis.set_xticks(range(len(figures)), [figure.replace(" ", "\n") for figure in figures])
    axis.set(ylabel="times in-tree, above 1 is better", title=title)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    axis.margins(x=0.01)
    canvas.tight_layout()
    canvas.savefig(path)
    pyplot.close(canvas)
