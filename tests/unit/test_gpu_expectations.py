"""Expectations of GPUs by counting, and how a measurement is held against them."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import gpu_expectations as expectations
import pytest

from vllm_bailing.bench.shapes import SHAPES
from vllm_bailing.bench.statistics import IN_TREE, PLUGIN
from vllm_bailing.planning.gpus import GPUS

H100 = GPUS["H100"]
RUNS = {"experts": "TritonExperts", "attention": "FLASH_ATTN"}
THEIRS = {
    "runs": {"model": "vllm.BailingMoeV2ForCausalLM", **RUNS},
    "router": "float32",
    "experts": {"1": {"aten.mm": 3}, "8": {"aten.mm": 4}, "64": {"aten.mm": 4}},
    "layer": {"triton": 5, "mm": 3, "vllm.moe_forward_shared": 1},
    "rest": {"triton": 6, "mm": 4},
}
OURS = {
    "runs": {"model": "vllm_bailing.model.BailingMoeV2ForCausalLM", **RUNS},
    "router": "bfloat16",
    "experts": {"1": {"aten.mm": 4}, "8": {"aten.mm": 4}, "64": {"aten.mm": 4}},
    "layer": {"triton": 2, "mm": 2, "vllm.moe_forward_shared": 1},
    "rest": {"triton": 5, "mm": 4},
}
RECORDED = {"0.33.0": {"H100": {"mini, TP 1": {IN_TREE: THEIRS, PLUGIN: OURS}}}}


def test_kernels_are_those_of_all_layers_and_what_is_counted_inside_is_counted_once():
    theirs, ours = (expectations.expectation(counts, "mini, TP 1", H100, 1) for counts in (THEIRS, OURS))
    assert (theirs.layer_kernels, theirs.step_kernels) == (8 + 3, 10 + 19 * 11)
    assert (ours.layer_kernels, ours.step_kernels) == (4 + 4, 9 + 19 * 8)


def test_bytes_are_those_of_the_weights_that_a_token_needs():
    hidden, experts, wide = 2048, 256, 512
    attention = (16 + 4 + 4) * 128 * hidden + 16 * 128 * hidden + 2 * 128 + 2 * hidden
    cache = expectations.CONTEXT * 2 * 4 * 128
    moe = attention + cache + experts * hidden + (8 + 1) * 3 * hidden * wide
    dense = attention + cache + 3 * hidden * 5120
    ours = expectations.expectation(OURS, "mini, TP 1", H100, 1)
    assert ours.layer_bytes == pytest.approx(2 * moe, rel=1e-3)
    assert ours.step_bytes == pytest.approx(2 * (dense + 19 * moe + 157184 * hidden), rel=1e-3)
    assert ours.tokens_per_s == pytest.approx(3.35e12 / ours.step_bytes, rel=1e-6)
    theirs = expectations.expectation(THEIRS, "mini, TP 1", H100, 1)
    assert theirs.layer_bytes - ours.layer_bytes == 2 * experts * hidden
    assert theirs.step_bytes - ours.step_bytes == 19 * 2 * experts * hidden


def result(speeds=(900.0, 1000.0), ratio=1.1, interval=(1.08, 1.12), noise=1.01, **facts):
    """As `vllm-bailing bench compare mini` writes it on an H100."""
    arms = {IN_TREE: {**THEIRS["runs"]}, PLUGIN: {**OURS["runs"], **facts}}
    rows = []
    for arm, speed in zip((IN_TREE, PLUGIN), speeds, strict=True):
        row = {"figure": "decode 1", "arm": arm, "median": speed, "ratio": 1.0, "interval": (1.0, 1.0), "noise": noise}
        rows.append({**row, "ratio": ratio, "interval": interval} if arm == PLUGIN else row)
    return {
        "model": "mini",
        "config": SHAPES["mini"],
        "engine": {"dtype": "bfloat16", "tensor_parallel_size": 1},
        "versions": {"vllm": "0.33.0"},
        "machine": {"device": "NVIDIA H100 80GB HBM3"},
        "arms": {arm: {"quantization": None, **kernels} for arm, kernels in arms.items()},
        "rows": rows,
    }


def missed(report):
    return [text for met, text in expectations.verdicts(report, RECORDED) if not met]


def test_a_measurement_that_bears_everything_out():
    report = result()
    found = expectations.verdicts(report, RECORDED)
    assert len(found) == 3 * 2 + 2 + 1  # what ran, limits, gain
    assert missed(report) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"experts": "CutlassExperts"}, "plugin: experts TritonExperts; ran CutlassExperts"),
        ({"speeds": (900.0, 5000.0)}, "plugin: decode 1 at most 14"),
        ({"ratio": 0.95, "interval": (0.94, 0.96)}, "measured 0.95"),
        ({"ratio": 2.0, "interval": (1.9, 2.1)}, "measured 2.00"),
    ],
    ids=["other experts", "faster than memory", "slower", "faster than fewer kernels explain"],
)
def test_what_was_missed_is_named_with_what_came(changes, word):
    (text,) = missed(result(**changes))
    assert word in text


def test_noise_widens_what_is_expected():
    assert missed(result(ratio=0.99, interval=(0.98, 1.0), noise=1.05)) == []


def test_a_measurement_of_which_nothing_was_expected_is_refused_with_a_way_out():
    other = copy.deepcopy(result())
    other["machine"]["device"] = "NVIDIA H200"
    with pytest.raises(SystemExit, match=r"nothing is expected of mini, TP 1 .*rehearse.sh 0.33.0 H200"):
        expectations.verdicts(other, RECORDED)
    other = result()
    other["engine"]["tensor_parallel_size"] = 2
    with pytest.raises(SystemExit, match="nothing is expected of mini on"):
        expectations.verdicts(other, RECORDED)


def test_the_command_says_met_or_missed_and_fails_if_one_was_missed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(expectations, "COUNTS", tmp_path / "counts.json")
    expectations.COUNTS.write_text(json.dumps(RECORDED))
    file = SimpleNamespace(good=tmp_path / "good.json", bad=tmp_path / "bad.json")
    file.good.write_text(json.dumps(result()))
    file.bad.write_text(json.dumps(result(experts="CutlassExperts")))
    assert expectations.check([file.good]) and not expectations.check([file.good, file.bad])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  met: ") for line in lines) == 9 + 9 + 8
    assert sum(line.startswith("  MISSED: ") for line in lines) == 1
