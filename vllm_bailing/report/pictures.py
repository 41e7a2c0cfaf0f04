"""Plots of a report, as SVG that stands in the page: it takes the page's color of text, in light and in dark."""

from __future__ import annotations

import itertools
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_bailing.bench import plots
from vllm_bailing.errors import shown

NO_MATPLOTLIB = "no plot: pip install 'vllm-bailing[bench]'"
_INK = "#010203"  # stands for the color of text until the plot is in the page
_STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
    "svg.hashsalt": "vllm-bailing",
}


def _plot_balance(measured: Any, path: Path) -> None:
    from vllm_bailing.balance.report import plot_balance  # brings torch, which a page does without

    plot_balance(measured, path)


_DRAW = {
    "verify": plots.plot_verify,
    "compare": plots.plot_comparison,
    "mtp": plots.plot_mtp,
    "balance": _plot_balance,
}
_ALT = {
    "verify": "Deviation from the reference by prompt, with the limits; the numbers are in the table above.",
    "compare": "Ratios to vLLM's own class with their intervals; the numbers are in the table above.",
    "mtp": "Speed by number of draft tokens, and acceptance by position; the numbers are in the table above.",
    "balance": "Picks of the experts of each layer, and the busiest rank; the numbers are in the tables above.",
}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Picture:
    """A plot as SVG, with a text for those who do not see it; without `svg` the text says why there is none."""

    svg: str
    text: str


def drawn(kind: str, measured: Any) -> Picture:
    """The plot of a result: one of `_DRAW`."""
    try:
        return Picture(_svg(_DRAW[kind], measured), _ALT[kind])
    except ImportError:
        return Picture("", NO_MATPLOTLIB)
    # The numbers come from a file: one that is not finite or not there ends somewhere in matplotlib.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return Picture("", f"no plot: it cannot be drawn from these numbers ({shown(error, 80)})")


def _svg(draw: Callable[[Any, Path], None], measured: Any) -> str:
    import matplotlib

    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that are not finite, and letters that the font lacks
        file = Path(folder) / "plot.svg"
        draw(measured, file)
        text = file.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for attribute in ("width", "height"):  # the page decides
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    # Several plots share the page, so each has names of its own.
    own = f"plot{next(_numbers)}-"
    text = re.sub(r'\bid="', f'id="{own}', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{own}", text)
    return text.replace(_INK, "currentColor")
