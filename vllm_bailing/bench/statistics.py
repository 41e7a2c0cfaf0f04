"""Paired ratios of the arms of a comparison, their intervals, the noise floor and the verdict."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

IN_TREE, AGAIN, PLUGIN = "in-tree", "in-tree again", "plugin"
SEED = 0
# Below this many rounds, the lowest and the highest of them enclose the median less often than 94 times in 100.
ROUNDS_FOR_A_VERDICT = 5
_DRAWS = 10_000


@dataclass(frozen=True)
class Kind:
    """A kind of figure: its unit, whether more of it is better, and the words for a verdict."""

    unit: str
    more_is_better: bool
    better: str = "faster"
    worse: str = "slower"


KINDS = {
    "decode": Kind("tok/s", True),
    "prefill": Kind("tok/s", True),
    "TTFT": Kind("ms", False),
    "TPOT": Kind("ms", False),
    "load": Kind("s", False),
    "start": Kind("s", False),
    "memory": Kind("GB", False, "less", "more"),
}
EXPLANATION = (
    "decode N, TTFT N, TPOT N: N requests at once; prefill N: one prompt of N tokens. TTFT: time to first token. TPOT: "
    "time per output token after it. load: weights. start: of the process until it answers. memory: peak without the "
    "KV cache; on GPUs of one rank. ratio: paired by round, above 1 is better."
)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of the median of paired ratios.

    With five values it reaches from the lowest to the highest, which enclose the median 94 times in 100.
    """
    drawn = np.random.default_rng(SEED).choice(ratios, size=(_DRAWS, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share of `trials`; (0, 1) without any.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not trials:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.975)
    share, scale = successes / trials, 1 + z * z / trials
    middle = share + z * z / (2 * trials)
    width = z * (share * (1 - share) / trials + z * z / (4 * trials * trials)) ** 0.5
    return max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)


def judge(ratios: list[float], noise: float, kind: Kind) -> str:
    """The verdict on an arm.

    Args:
        ratios: To `in-tree`, one per round, above 1 where the arm was better.
        noise: How far from 1 the interval of `in-tree again` reaches, as a ratio of at least 1.
    """
    low, high = interval(ratios)
    middle = statistics.median(ratios)
    if len(ratios) < ROUNDS_FOR_A_VERDICT:
        return "few rounds"
    if low <= 1 <= high or 1 / noise <= middle <= noise:
        return "no difference"
    return kind.better if middle > 1 else kind.worse


def summarize(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per figure and arm: median and range over rounds, ratio to `in-tree`, noise floor and verdict.

    Args:
        results: Of each arm, one per round; their `figures` are values by kind and size, such as "decode 8".
    """
    rows = []
    for figure in results[IN_TREE][0]["figures"]:
        kind = KINDS[figure.split()[0]]
        values = {arm: [result["figures"][figure] for result in rounds] for arm, rounds in results.items()}
        ratios = {arm: _ratios(values[arm], values[IN_TREE], kind) for arm in results}
        low, high = interval(ratios[AGAIN])
        noise = max(high, 1 / low)
        for arm in results:
            verdict = "" if arm in (IN_TREE, AGAIN) else judge(ratios[arm], noise, kind)
            rows.append(
                {
                    "figure": figure,
                    "unit": kind.unit,
                    "arm": arm,
                    "median": statistics.median(values[arm]),
                    "low": min(values[arm]),
                    "high": max(values[arm]),
                    "rounds": values[arm],
                    "ratio": statistics.median(ratios[arm]),
                    "interval": interval(ratios[arm]),
                    "noise": noise,
                    "verdict": verdict,
                }
            )
    return rows


def _ratios(values: list[float], base: list[float], kind: Kind) -> list[float]:
    """`values` to `base`, round by round, above 1 where `values` are better."""
    pairs = zip(values, base, strict=True)
    return [mine / other if kind.more_is_better else other / mine for mine, other in pairs]
