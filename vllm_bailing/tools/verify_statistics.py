"""What separates a fault from rounding, in the differences between a deployment and the reference.

Two questions. *How large* are the differences, position by position, in units of what the reference's own rounding does
to that position (`sizes`)? And *which way* do they point: by how much would each part of the model have to give more or
less to make them (`shifts`)? Rounding points nowhere. The second is Rao's score test with a variance that is estimated
from the observed contributions themselves, so that it needs no model of the noise.

Source: C. R. Rao, Large sample tests of statistical hypotheses (1948); H. White, A heteroskedasticity-consistent
covariance matrix estimator (1980).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm_bailing.tools.verify_reference import Asked, Computed

# Bits of mantissa that are kept. One less for fp32, in which finer errors than its own would vanish.
MANTISSA = {"float32": 22, "float16": 10, "bfloat16": 7}
_CLIP = 4.0  # units of the expected rounding, beyond which a position has no more weight


@dataclass(frozen=True)
class Differences:
    """Served minus reference log-probability of V values at N positions, in nats.

    Attributes:
        served: The differences [V].
        rounded: Those of right deployments, as the reference makes them [copies, V].
        position: Of each value, rising from 0 [V].
        token: Whose log-probability each value is [V].
        given: The last token before each position [N].
    """

    served: np.ndarray
    rounded: np.ndarray
    position: np.ndarray
    token: np.ndarray
    given: np.ndarray

    @classmethod
    def between(cls, served: np.ndarray, computed: Computed, asked: Asked) -> Differences:
        """Those of `served` log-probabilities [V] and what the reference computed, with its rounding.

        If rounding toward zero explains them better, then from the mean of what that gives: it has a direction. So has
        rounding to 8 bits: its noise is so large that the norms after it make the rest smaller.
        """
        rest = asked.position, asked.token, asked.given
        if computed.coarse and len(computed.copies) > 1:
            kinds = [cls._around_mean(served, of, *rest) for of in (computed.copies, computed.cut) if len(of)]
            return min(kinds, key=lambda one: float(np.median(one.size)))
        found = cls(served - computed.logprobs, computed.copies - computed.logprobs, *rest)
        if len(computed.cut):
            middle = computed.cut.mean(0)
            other = cls(served - middle, computed.cut - middle, *rest)
            found = min(found, other, key=lambda one: float(np.median(one.size)))
        return found

    @classmethod
    def _around_mean(cls, served: np.ndarray, copies: np.ndarray, *rest: np.ndarray) -> Differences:
        """From the mean of n copies, which is off itself by a n-th of their variance; theirs seems a n-th too small."""
        middle, count = copies.mean(0), len(copies)
        return cls(served - middle, (copies - middle) * math.sqrt((count + 1) / (count - 1)), *rest)

    def _mean(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.position, values) / np.bincount(self.position)

    def centered(self, values: np.ndarray) -> np.ndarray:
        """`values` less their mean at their position."""
        return values - self._mean(values)[self.position]

    def at_positions(self, values: np.ndarray) -> np.ndarray:
        """Root mean square of `values` at each position [N]."""
        return np.sqrt(self._mean(values**2))

    @property
    def expected(self) -> np.ndarray:
        """Root mean square of the rounding at each position [N]; never far below that of the positions around it."""
        size = np.sqrt(self._mean((self.rounded**2).mean(0)))
        return np.maximum(size, max(0.25 * np.median(size), 1e-9))

    @property
    def size(self) -> np.ndarray:
        """Root mean square of the differences at each position, in units of `expected` [N]."""
        return self.at_positions(self.served) / self.expected


def roundoff(dtype: str) -> float:
    """The most that rounding to `dtype` changes a number, relative to it; "fp8" computes in bf16 besides."""
    return 2.0 ** -(MANTISSA.get(dtype, 7) + 1)


def beyond(shift: Shift, dtype: str) -> float:
    """By how many standard errors a shift is larger than what rounding of every number in one direction could do."""
    return (abs(shift.size) - roundoff(dtype)) / shift.error


def measures(differences: Differences, shifts: list[Shift], dtype: str) -> dict[str, float]:
    """`sizes`, and as `significance` the largest of a part's shift, at least 1."""
    found = sizes(differences)
    if shifts:
        found["significance"] = max(1.0, *(beyond(shift, dtype) for shift in shifts))
    return found


def sizes(differences: Differences) -> dict[str, float]:
    """How large the differences are, in units of the expected rounding.

    Returns:
        `median` and `mean` (root mean square, clipped) over the positions; `worst input` and `worst output`, the
        largest of a token: after it, and of its own log-probability against what the position has besides. A token
        counts by the (lower) median of its places, of which there must be two: rounding may send one of them to other
        experts.
    """
    size, position = differences.size, differences.position
    middle, _ = _lower_medians(differences.served, position)
    apart = np.abs(differences.served - middle[position])
    spread, _ = _lower_medians(apart, position)
    scale = np.maximum(differences.expected, 1.48 * spread)
    inputs, input_places = _lower_medians(size, differences.given)
    outputs, output_places = _lower_medians(apart / scale[position], differences.token)
    return {
        "median": float(np.median(size)),
        "mean": float(np.sqrt(np.mean(np.minimum(size, _CLIP) ** 2))),
        "worst input": float(inputs[input_places > 1].max(initial=0)),
        "worst output": float(outputs[output_places > 1].max(initial=0)),
    }


def _lower_medians(values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower median of the values of each key, by rising key, and how many it has."""
    _, starts, counts = np.unique(np.sort(keys), return_index=True, return_counts=True)
    return values[np.lexsort((values, keys))][starts + (counts - 1) // 2], counts


def weights(differences: Differences, seed: int = 0) -> np.ndarray:
    """The two sums that `Reference.effects` is asked for: [2, V].

    The first is the score: the differences, each weighed by how exactly its position is known. The second has the same
    weights and random signs: what its parts contribute, squared and added, is the information on each part.
    """
    position = differences.position
    precision = 1 / (differences.expected * np.sqrt(np.bincount(position)))
    clip = _clip(differences)
    score = differences.centered(differences.served) * (clip * precision**2)[position]
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), len(position))
    return np.stack([score, differences.centered(signs) * (np.sqrt(clip) * precision)[position]])


def _clip(differences: Differences) -> np.ndarray:
    return np.minimum(1, _CLIP / np.maximum(differences.size, 1e-9))


def squares(differences: Differences) -> float:
    """The squared differences in units of what rounding makes, in sum over the positions, weighed as the score is."""
    return float((_clip(differences) * differences.size**2).sum())


@dataclass(frozen=True)
class Shift:
    """How much more a part of the model seems to give than it should.

    Attributes:
        part: Such as "layer 3 attention".
        size: Relative: 0.01 is one percent too much.
        error: Standard error of `size`.
        significance: `size / error`.
        share: Of the squared differences, what `size` explains, 0 to 1.
    """

    part: str
    size: float
    error: float
    significance: float
    share: float = 0.0


def shifts(effects: dict[str, np.ndarray], squares: float) -> list[Shift]:
    """The shift of each part, and of all parts of a kind together, from `Reference.effects` of `weights`.

    Args:
        squares: Those of all differences.
    """
    found, together = [], {}
    for part, (score, information) in effects.items():
        found.append(_shift(part, score, information, squares))
        kind = kind_of(part)
        if part.startswith("layer ") and kind != "expert":
            before = together.get(kind, (0.0, 0.0, 0))
            together[kind] = (before[0] + score, before[1] + information, before[2] + 1)
    found += [
        _shift(f"{kind} of all layers", score, information, squares)
        for kind, (score, information, count) in together.items()
        if count > 1
    ]
    return sorted(found, key=lambda shift: -abs(shift.significance))


def _shift(part: str, score: np.ndarray, information: np.ndarray, squares: float) -> Shift:
    total, spread = float(score.sum()), math.sqrt(float((score**2).sum()))
    known = float((information**2).sum())
    if spread == 0 or known == 0:
        return Shift(part, 0.0, math.inf, 0.0)
    return Shift(part, total / known, spread / known, total / spread, total**2 / known / squares)


def kind_of(part: str) -> str:
    """What a part is, without its layer and number."""
    return re.sub(r"^layer \d+ | \d+$| of all layers$", "", part)
