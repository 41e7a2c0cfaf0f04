"""Plots of what was measured.

Every function raises ImportError without matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_bailing.bench.mtp import of_arm
from vllm_bailing.bench.statistics import AGAIN, IN_TREE, PLUGIN
from vllm_bailing.errors import shown
from vllm_bailing.json_files import replaced

_MOST_BARS = 100


@contextmanager
def figure_at(
    path: Path, size: tuple[float, float], panels: int = 1, **options: Any
) -> Iterator[tuple[Any, list[Any]]]:
    """A new figure of `size` inches and its panels from left to right, for the body of a `with`, then saved to `path`.

    Args:
        options: Further arguments of `matplotlib.pyplot.subplots`.
    Raises:
        ImportError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Names of models and arms are no formulas.
    with matplotlib.rc_context({"text.parse_math": False}):
        figure, axes = pyplot.subplots(1, panels, figsize=size, squeeze=False, **{"dpi": 100, **options})
        try:
            yield figure, list(axes[0])
            with replaced(path) as new:
                figure.savefig(new, format=path.suffix[1:])
        finally:
            pyplot.close(figure)


def side_by_side(place: int, count: int, width: float = 0.12) -> float:
    """How far right of a tick series `place` of `count` stands, so that their error bars lie beside each other."""
    return (place - (count - 1) / 2) * width


def ink() -> str:
    """The color of axes and text."""
    from matplotlib import rcParams

    return rcParams["axes.edgecolor"]


def _name(model: str) -> str:
    """The last part of a model's name, as it fits into a title."""
    return shown(Path(model).name, 40)


def error_bars(middles: list[float], lows: list[float], highs: list[float]) -> list[list[float]]:
    """Lengths of the error bars below and above, as matplotlib's `yerr` takes them."""
    return [
        [middle - low for middle, low in zip(middles, lows, strict=True)],
        [high - middle for middle, high in zip(middles, highs, strict=True)],
    ]


def plot_mtp(report: dict[str, Any], path: Path) -> None:
    """Speed by number of draft tokens, and acceptance by position.

    Args:
        report: Of `report.mtp_report`, from which this takes `model` and `rows`.
    Raises:
        ImportError: Without matplotlib.
    """
    with figure_at(path, (9, 3.9), panels=2) as (figure, (left, right)):
        from matplotlib.ticker import MaxNLocator

        rows = [(row["batch_size"], *of_arm(row["arm"]), row) for row in report["rows"]]
        lines = dict.fromkeys((size, draft) for size, count, draft, _ in rows if count)
        sizes, drafts = ([*dict.fromkeys(values)] for values in zip(*lines, strict=True)) if lines else ([], [])
        for place, (size, draft) in enumerate(lines):
            color = f"C{drafts.index(draft) if len(drafts) > 1 else sizes.index(size)}"
            style = {"color": color, "linestyle": ("-", "--", ":", "-.")[sizes.index(size) % 4], "marker": "o"}
            counts, of_line = zip(
                *((n, row) for at, n, name, row in rows if at == size and name in ("", draft)), strict=True
            )
            medians, lows, highs = ([row["ratio"][key] for row in of_line] for key in ("median", "low", "high"))
            beside, label = side_by_side(place, len(lines)), ", ".join(filter(None, [f"batch {size}", draft]))
            x, bars = [count + beside for count in counts], error_bars(medians, lows, highs)
            left.errorbar(x, medians, yerr=bars, capsize=3, label=label, **style)
            shares = [100 * share for share in max((row["acceptance"] for row in of_line), key=len)]
            positions = [position + beside for position in range(1, len(shares) + 1)]
            right.plot(positions, shares, **style)
        left.axhline(1, color="grey", linewidth=0.8)
        left.set(xlabel="draft tokens per step", ylabel="tokens/s, times no speculation", ylim=(0, None))
        right.set(xlabel="draft position", ylabel="accepted up to here, %", ylim=(0, 105))
        for axis in (left, right):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
        figure.suptitle(f"MTP on {_name(report.get('model', 'a model'))}")
        figure.legend(loc="lower center", ncols=3)  # below the panels, which it would hide
        figure.tight_layout(rect=(0, 0.08 * math.ceil(len(lines) / 3), 1, 1))


def plot_comparison(report: dict[str, Any], path: Path) -> None:
    """Ratios to in-tree with their intervals; the band around 1 at each figure is the noise floor.

    Args:
        report: Of `report.comparison_report`, from which this takes `model`, `engine`, `arms` and `rows`.
    Raises:
        ImportError: Without matplotlib.
    """
    facts = report["arms"][PLUGIN]
    mode = "eager" if report["engine"].get("enforce_eager") else "compiled"
    title = f"vllm-bailing: {_name(report['model'])}, {mode}, {facts['dtype']}, {facts['device']}"
    rows = report["rows"]
    figures = list(dict.fromkeys(row["figure"] for row in rows))
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm not in (IN_TREE, AGAIN)]
    width = 0.8 / len(arms)
    with figure_at(path, (max(6.0, 0.7 * len(figures) + 3), 3.8)) as (canvas, (axis,)):
        for place, figure in enumerate(figures):
            noise = next(row["noise"] for row in rows if row["figure"] == figure)
            label = "noise floor" if place == 0 else None
            axis.fill_between(
                [place - 0.45, place + 0.45], 1 / noise, noise, color="grey", alpha=0.3, lw=0, label=label, zorder=0
            )
        for index, arm in enumerate(arms):
            x = [place + (index - (len(arms) - 1) / 2) * width for place in range(len(figures))]
            ratios = [row["ratio"] for row in rows if row["arm"] == arm]
            lows, highs = zip(*(row["interval"] for row in rows if row["arm"] == arm), strict=True)
            heights = [ratio - 1 for ratio in ratios]
            axis.bar(x, heights, 0.9 * width, bottom=1, label=arm, zorder=2, alpha=0.85)
            bars = error_bars(ratios, list(lows), list(highs))
            axis.errorbar(x, ratios, yerr=bars, fmt="none", ecolor=ink(), capsize=3, zorder=3)
        axis.axhline(1, color=ink(), linewidth=0.8, zorder=1)
        axis.set_xticks(range(len(figures)), [figure.replace(" ", "\n") for figure in figures])
        axis.set(ylabel="times in-tree, above 1 is better", title=title)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        axis.margins(x=0.01)
        canvas.tight_layout()


def plot_verify(report: dict[str, Any], path: Path) -> None:
    """Deviation from the reference by prompt, in nats, and what decides as a share of its limit.

    Args:
        report: Of `vllm-bailing verify`, from which this takes `prompts`, and `measures` or `tolerance`.
    Raises:
        ImportError: Without matplotlib.
    """
    means = [prompt["mean"] for prompt in report["prompts"]]
    limit = (report.get("tolerance") or {}).get("mean")
    decides = {name: came / most for name, (came, most) in report.get("measures", {}).items()}
    with figure_at(path, (9, 3.0), panels=2 if decides else 1) as (figure, (left, *right)):
        from matplotlib.ticker import MaxNLocator

        places = range(1, len(means) + 1)
        if len(means) <= _MOST_BARS:
            left.bar(places, means)
        else:
            left.plot(places, means, linewidth=0.6)
        if limit is not None:
            left.axhline(limit, color=ink(), linewidth=0.8, linestyle="--")
        title = "mean |Δ log-probability|" + ("" if limit is None else f" (dashed: limit {limit:g})")
        left.set(xlabel="prompt", ylabel="nats", title=title, xlim=(0.4, len(means) + 0.6))
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        for panel in right:
            colors = ["tab:blue" if value <= 1 else "tab:red" for value in decides.values()]
            panel.barh([name.replace("_", " ") for name in decides], list(decides.values()), color=colors)
            panel.axvline(1, color=ink(), linewidth=0.8, linestyle="--")
            panel.set(title="what decides, as a share of its limit")
            panel.invert_yaxis()
        for axis in (left, *right):
            axis.grid(alpha=0.3)
        figure.tight_layout()
