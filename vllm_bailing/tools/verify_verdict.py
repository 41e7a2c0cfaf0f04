"""Whether differences are rounding, and what they look like if not, by what right deployments were measured to do."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path

from vllm_bailing.tools.verify_drafts import DraftCheck
from vllm_bailing.tools.verify_statistics import Shift, beyond, kind_of

# What right deployments gave: lists by dtype and measure. Made by scripts/bench/bench_verify.py.
RIGHT = Path(__file__).parent.parent / "assets" / "verify.json"
_PARTS = 82  # of the demo, on which they were measured
MEASURES = {
    "median": "median difference",
    "mean": "mean difference",
    "worst input": "largest difference after a token",
    "worst output": "largest difference of a token",
    "significance": "significance of a part's shift",
}
# Other machines round in other places, and the largest of a thousand tokens varies much.
_FACTORS = {"median": 1.5, "mean": 1.5, "worst input": 2, "worst output": 2, "significance": 1.5}
_EXPLAINED = 0.25  # share of large differences below which the part that is named may be another one
_ROWS_OF = {"worst input": "rows of the embedding", "worst output": "rows of the head"}
_WORDS = {
    "final norm": "the final norm, or the scale of the logits",
    "rotary": "the rotary embedding (theta, width, scaling)",
    "query and key": "the norms of query and key, or the scale of the attention",
    "attention": "the attention (its projections, or the norm before it)",
    "norm before the MLP": "the norm before the MLP",
    "MLP": "the dense MLP",
    "router": "the router",
    "routed experts": "the routed experts, or routed_scaling_factor",
    "shared experts": "the shared experts",
    "expert": "expert",
}


@functools.cache
def right_deployments() -> dict[str, dict[str, list[float]]]:
    """What was measured of right deployments, by dtype and measure."""
    return json.loads(RIGHT.read_text(encoding="utf-8"))["right"]


def limit(dtype: str, measure: str, parts: int = 0) -> float:
    """The most that a right deployment gives: the largest of what was measured, times the measure's factor.

    What was measured in bf16 counts for all, since differences are in units of the rounding that is expected.

    Args:
        parts: How many parts the largest shift was sought among; the largest of more normal numbers is larger.
    """
    measured = right_deployments()
    values = measured["bfloat16"][measure] + measured.get(dtype, {}).get(measure, [])
    most = _FACTORS[measure] * max(values)
    if measure == "significance" and parts > _PARTS:
        most = math.sqrt(most**2 + 2 * math.log(parts / _PARTS))
    return most


def limits(dtype: str, measures: dict[str, float], shifts: list[Shift]) -> dict[str, float]:
    """`limit` of each of `measures`."""
    return {name: limit(dtype, name, len(shifts)) for name in measures}


def two_digits(value: float) -> str:
    """A measure or limit as people see it; halves that binary numbers are a little below are rounded up too."""
    return f"{value + 1e-9:.2f}"


def judge(
    measures: dict[str, float], shifts: list[Shift], dtype: str, drafts: DraftCheck | None = None
) -> tuple[str, str]:
    """What speaks against a deployment, and what it looks like; both empty if nothing does.

    Args:
        measures, shifts: Of `verify_statistics`.
        dtype: What the deployment computes in.
    """
    most = limits(dtype, measures, shifts)
    above = [name for name, value in measures.items() if not value <= most[name]]  # also if it is no number
    reasons = [f"{MEASURES[name]}: {two_digits(measures[name])} is above {two_digits(most[name])}" for name in above]
    looks = [_look({name: measures[name] / most[name] for name in above}, shifts, dtype)] if above else []
    if drafts and drafts.reason:
        reasons.append(drafts.reason)
        looks.append("the MTP layer")
    return " and ".join(reasons), "; ".join(looks)


def _look(above: dict[str, float], shifts: list[Shift], dtype: str) -> str:
    """What it looks like.

    Args:
        above: How many times as large as its limit each of the measures is that are larger.
    """
    least = limit(dtype, "significance", len(shifts)) / 2
    sure = [shift for shift in shifts if beyond(shift, dtype) > least]
    if "significance" in above and sure:
        found = max(sure, key=lambda shift: shift.share)
        words = described(found)
        if "median" in above and found.share < _EXPLAINED:
            words += f"; uncertain: that explains {100 * found.share:.2g} % of the differences"
        return words
    if "median" in above:
        return f"many parts at once, or coarser rounding than {dtype}'s everywhere (quantized weights?)"
    tokens = {name: above[name] for name in _ROWS_OF if name in above}
    if tokens:
        return _ROWS_OF[max(tokens, key=lambda name: tokens[name])]
    return f"many parts at once, or coarser rounding than {dtype}'s"


def described(shift: Shift) -> str:
    """A shift in words."""
    kind = kind_of(shift.part)
    where = re.sub(r"^layer (\d+) .*", r" in layer \1", shift.part) if shift.part.startswith("layer ") else ""
    where = where or (" of all layers" if shift.part.endswith("all layers") else "")
    number = shift.part.rpartition(" ")[2] if kind == "expert" else ""
    words = " ".join(filter(None, (_WORDS[kind], number)))
    digits = max(1, -math.floor(math.log10(100 * shift.error))) if shift.error > 0 else 1  # of which one is left
    return f"{words}{where}: {100 * shift.size:+.{digits}f} % ± {100 * shift.error:.{digits}f} %"
