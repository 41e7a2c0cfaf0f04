"""Intervals and verdicts of the comparison, on results with a known gain."""

import numpy as np
import pytest

from tests.support.benchmarks import planted, verdicts
from vllm_bailing.bench import statistics
from vllm_bailing.bench.statistics import AGAIN, IN_TREE, KINDS, PLUGIN


def test_interval_of_five_ratios_is_their_range_and_narrows_with_more():
    assert statistics.interval([1.0, 1.1, 1.2, 1.3, 1.4]) == (1.0, 1.4)
    assert statistics.interval([1.5]) == (1.5, 1.5)
    draw = np.random.default_rng(0).normal(1.2, 0.05, 100)
    low, high = statistics.interval(list(draw))
    # Of a normal distribution the median of n has the standard error 1.2533 sigma / sqrt(n).
    assert (high - low) / 2 == pytest.approx(1.96 * 1.2533 * 0.05 / 10, rel=0.3)


def test_the_interval_encloses_the_true_median_as_often_as_it_says():
    draw = np.random.default_rng(2)
    samples = draw.normal(1, 0.05, (200, 9))
    enclosed = sum(low <= 1 <= high for low, high in map(statistics.interval, samples.tolist()))
    assert enclosed >= 0.9 * 200


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_an_arm_that_is_the_same_makes_no_difference(drift):
    told = verdicts(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 1}, drift=drift))
    assert set(told.values()) == {"no difference"}


def test_a_planted_fifth_is_found_in_either_direction():
    assert verdicts(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 1.2})) == {
        "decode 1": "faster",
        "TTFT 1": "faster",
        "memory": "less",
    }
    assert verdicts(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 1 / 1.2})) == {
        "decode 1": "slower",
        "TTFT 1": "slower",
        "memory": "more",
    }


def test_a_gain_below_the_noise_floor_is_no_difference():
    ratios = [1.05, 1.06, 1.05, 1.07, 1.06]
    assert statistics.judge(ratios, noise=1.08, kind=KINDS["decode"]) == "no difference"
    assert statistics.judge(ratios, noise=1.01, kind=KINDS["decode"]) == "faster"


def test_few_rounds_give_no_verdict():
    assert set(verdicts(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 2}, rounds=4)).values()) == {"few rounds"}


def test_rows_pair_the_rounds_and_turn_times_around():
    results = {
        IN_TREE: [{"figures": {"TPOT 1": 10.0}}, {"figures": {"TPOT 1": 20.0}}, {"figures": {"TPOT 1": 40.0}}],
        AGAIN: [{"figures": {"TPOT 1": 10.0}}, {"figures": {"TPOT 1": 25.0}}, {"figures": {"TPOT 1": 40.0}}],
        PLUGIN: [{"figures": {"TPOT 1": 5.0}}, {"figures": {"TPOT 1": 10.0}}, {"figures": {"TPOT 1": 10.0}}],
    }
    base, again, plugin = statistics.summarize(results)
    assert (base["median"], base["low"], base["high"], base["ratio"]) == (20, 10, 40, 1)
    assert again["interval"] == (0.8, 1.0) and again["noise"] == plugin["noise"] == 1.25
    assert (plugin["ratio"], plugin["interval"]) == (2, (2, 4))
