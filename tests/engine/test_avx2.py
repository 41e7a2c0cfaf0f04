"""Kernels of avx2.cpp: against fp64, for every format of weights; and what happens where they cannot be compiled."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from tests.support import avx2_stand_ins
from tests.support.cpu_kernels import NEEDS_AVX2, NEEDS_VNNI
from tests.support.engine import run, run_in_turn
from vllm_bailing.processor import compiler

pytestmark = NEEDS_AVX2
# Of the norm of the result. fp32 sums; 11 bits or more of activations, in two matrices one after the other; 8 bits.
EXACT, NEARLY, ROUNDED = 1e-6, 5e-4, 0.05
FORMATS = {
    # dtype of weights, outputs or inputs that share a scale, tolerance
    "bf16": (torch.bfloat16, 0, EXACT),
    "fp16": (torch.float16, 0, EXACT),
    "fp8, blocks": (torch.float8_e4m3fn, 128, EXACT),
    "fp8, half blocks": (torch.float8_e4m3fn, 64, EXACT),
    "fp8, outputs": (torch.float8_e4m3fn, 1, EXACT),
    "int8": (torch.int8, 0, NEARLY),
    "int4, groups of 32": (torch.uint8, 32, ROUNDED),
    "int4, groups of 64": (torch.uint8, 64, ROUNDED),
    "int4, groups of 128": (torch.uint8, 128, ROUNDED),
    "int4, groups of 256": (torch.uint8, 256, ROUNDED),
}
FOR_VNNI = {f"{name}, VNNI": found for name, found in FORMATS.items() if "int4" in name}
EVERY = FORMATS | FOR_VNNI
SIZES = [
    # experts, hidden size, width, picks; the last has more inputs than are unpacked at a time, and a rest
    (3, 128, 128, 2),
    (8, 512, 256, 3),
    (2, 768, 1536, 1),
]
TOKENS = (0, 1, 2, 5, 12, 13, 24, 25, 97, 130)


def _stack(dtype, shared, experts, n, k, for_vnni=False):
    """Random weights of which the products with a normal vector are about as large as it."""
    from vllm_bailing.plugin.kernels.avx2 import Weights, packed_int4

    size = k**-0.5
    if dtype in (torch.bfloat16, torch.float16):
        return Weights((torch.randn(experts, n, k) * size).to(dtype))
    if dtype == torch.int8:
        levels = torch.randint(-128, 128, (experts, n, k), dtype=torch.int8)
        return Weights(levels, (torch.rand(experts, n) + 0.5) * size / 70)
    if dtype == torch.float8_e4m3fn:
        levels = (torch.randn(experts, n, k) * 100).clamp(-448, 448).to(dtype)
        scales = (torch.rand(experts, -(-n // shared), -(-k // 128)) + 0.5) * size / 100
        return Weights(levels, scales, rows=shared)
    parts = []
    for number in range(experts):
        levels = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scales = ((torch.rand(n, k // shared) + 0.5) * size / 4).to(torch.float16 if number % 2 else torch.bfloat16)
        zeros = torch.randint(0, 17, (n, k // shared), dtype=torch.uint8)
        parts.append(packed_int4(levels, scales.to(torch.bfloat16), zeros, for_vnni))
    return Weights(*(torch.stack(one) for one in zip(*parts, strict=True)))


def _errors(name):
    """(case, distance from fp64 over the norm) for experts and a linear layer, and the largest of biased ones."""
    from vllm_bailing.plugin.kernels import avx2

    avx2.load()
    torch.manual_seed(0)
    dtype, shared, _ = EVERY[name]
    found, vnni = [], name in FOR_VNNI
    for experts, hidden, width, picks in SIZES:
        if hidden % max(shared, 1) or width % max(shared, 1):
            continue
        w13, w2 = (_stack(dtype, shared, experts, *size, vnni) for size in ((2 * width, hidden), (hidden, width)))
        first = avx2.Weights(*(one[:1] if isinstance(one, torch.Tensor) else one for one in w13))
        for tokens in TOKENS:
            x, bias = torch.randn(tokens, hidden), torch.randn(2 * width)
            weights, ids = torch.rand(tokens, experts).topk(picks)
            weights[::3, 0] = 0  # is not computed
            outputs = [torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)]
            avx2.experts(outputs[0], x, w13, w2, weights, ids.int())
            avx2_stand_ins.avx2_experts(outputs[1], x, *w13, *w2, weights, ids)
            pairs = [outputs, [avx2.linear(x, first, bias), avx2_stand_ins.avx2_linear(x, *first, bias)]]
            for kind, (result, exact) in zip(("experts", "linear"), pairs, strict=True):
                error = (result.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)
                found.append(((kind, experts, hidden, width, tokens), float(error)))
    return found


@pytest.mark.parametrize("name", [*FORMATS, *(pytest.param(name, marks=NEEDS_VNNI) for name in FOR_VNNI)])
def test_products_are_those_of_fp64(name):
    found = run_in_turn(_errors, name)
    assert len(found) >= 2 * len(TOKENS)
    assert not {case: error for case, error in found if not error <= EVERY[name][2]}


def _rounded_once(dtype):
    """Results in `dtype`, and in fp32 of the same numbers."""
    from vllm_bailing.plugin.kernels import avx2

    avx2.load()
    torch.manual_seed(0)
    w13, w2 = _stack(torch.int8, 0, 4, 128, 64), _stack(torch.int8, 0, 4, 64, 64)
    x = (100 * torch.randn(7, 64)).to(dtype)
    x[3] = 3e38 if dtype == torch.bfloat16 else 6e4
    weights, ids = torch.rand(7, 4).topk(2)
    outputs = [torch.empty(7, 64, dtype=one) for one in (dtype, torch.float32)]
    for output in outputs:
        avx2.experts(output, x.to(output.dtype), w13, w2, weights, ids)
    return outputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_the_nearest(dtype):
    rounded, exact = run_in_turn(_rounded_once, dtype)
    torch.testing.assert_close(rounded, exact.to(dtype), rtol=0, atol=0, equal_nan=True)


def _with_faulty_inputs():
    from vllm_bailing.plugin.kernels import avx2

    avx2.load()
    x = torch.randn(4, 128)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    finite = []
    for dtype, shared, _ in FORMATS.values():
        if shared <= 128:
            finite.append(avx2.linear(x, _stack(dtype, shared, 1, 32, 128)).isfinite().all(1).tolist())
    said = []
    w13, w2 = _stack(torch.int8, 0, 4, 128, 64), _stack(torch.int8, 0, 4, 64, 64)
    for ids in ([[4]], [[-1]]):
        try:
            avx2.experts(torch.empty(1, 64), torch.ones(1, 64), w13, w2, torch.ones(1, 1), torch.tensor(ids))
        except ValueError as error:
            said.append(str(error))
    return finite, said


def test_what_is_not_finite_stays_so_and_strange_picks_are_refused():
    finite, said = run_in_turn(_with_faulty_inputs)
    assert all(one == [True, False, False, True] for one in finite)
    assert len(said) == 2 and all("picked an expert that is none of 4" in one for one in said)


def _routed(experts, groups, open_groups, picks, normalizes):
    """Of the operation and of the plain router: for every token the weight of each expert, 0 for those not picked."""
    from vllm_bailing.plugin.kernels import avx2
    from vllm_bailing.reference_layers import grouped_topk

    avx2.load()
    found = []
    for tokens in (0, 1, 7, 8, 9, 130):
        logits, bias = 3 * torch.randn(tokens, experts), 0.1 * torch.randn(experts)
        weights, ids = avx2.route(logits, bias, groups, open_groups, picks, normalizes, 2.5)
        assert ids.dtype == torch.int32 and weights.dtype == torch.float32
        assert all(len(set(row)) == picks for row in ids.tolist())
        scores = logits.double().sigmoid()
        chosen = grouped_topk(scores + bias, groups, open_groups, picks)
        expected = scores.gather(1, chosen)
        expected = 2.5 * (expected / expected.sum(1, keepdim=True) if normalizes else expected)
        plain = torch.zeros_like(scores)
        found.append((plain.scatter(1, ids.long(), weights.double()), plain.scatter(1, chosen, expected)))
    return found


@pytest.mark.parametrize(
    "rule", [(256, 8, 4, 8, True), (64, 8, 2, 6, True), (16, 1, 1, 1, False), (32, 4, 4, 32, True), (8, 4, 1, 2, True)]
)
def test_the_router_picks_and_weighs_as_the_plain_one(rule):
    for found, expected in run_in_turn(_routed, *rule):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def _problems_of_routers(rules):
    from vllm_bailing.plugin.kernels import avx2, cpu_router

    avx2.load()
    route, found = avx2.route, []
    found.append([cpu_router._problem(*rule) for rule in rules])
    cpu_router._problem.cache_clear()
    avx2.route = lambda logits, bias, *rule: route(logits, 0 * bias, *rule)
    found.append([cpu_router._problem(*rule) for rule in rules])
    return found


def test_a_router_that_is_wrong_is_not_used():
    right, wrong = run(_problems_of_routers, [(256, 8, 4, 8, True), (16, 2, 1, 1, False)])
    assert right == ["", ""] and wrong == ["the operation chooses other experts or weights"] * 2


def _strangely_routed():
    from vllm_bailing.plugin.kernels import avx2

    avx2.load()
    logits = torch.zeros(4, 16)  # all alike: the first of each, and of the first groups
    logits[1, 5], logits[2, 7], logits[3, 7] = torch.nan, torch.inf, -torch.inf
    weights, ids = avx2.route(logits, torch.zeros(16), 4, 2, 2, True, 1.0)
    said = []
    for rule in ((3, 1, 2), (4, 5, 2), (4, 1, 5), (4, 1, 0)):
        try:
            avx2.route(logits, torch.zeros(16), *rule, True, 1.0)
        except RuntimeError as error:
            said.append(str(error))
    return weights, ids.tolist(), said


def test_what_a_router_cannot_rank_is_nan_and_equal_scores_go_by_their_order():
    weights, ids, said = run_in_turn(_strangely_routed)
    assert weights.isnan().all(1).tolist() == [False, True, False, False] and all(0 <= one < 16 for one in ids[1])
    assert ids[0] == [0, 1] and ids[3] == [0, 1] and sorted(ids[2]) == [0, 7]
    assert len(said) == 4 and all("of 16 experts" in one for one in said)


def _turned(dtype, size, rotary, angles):
    """Queries, keys and values after the operation, and exactly."""
    from vllm_bailing.plugin.kernels import avx2

    avx2.load()
    found = []
    for tokens in (0, 1, 5, 40):
        qkv = (3 * torch.randn(tokens, 7 * size)).to(dtype)  # 4 queries, 2 keys, 1 value
        weights = [torch.randn(size).to(dtype) for _ in range(2)]
        angle = 6 * torch.rand(50, rotary // 2)
        cache = torch.cat((angle.cos(), angle.sin()), -1).to(angles)
        positions = torch.randint(50, (tokens,))
        x = qkv.double().view(tokens, 7, size)
        cos, sin = cache.double()[positions, None].chunk(2, -1)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        normed = normed * torch.stack([weights[0]] * 4 + [weights[1]] * 2 + [torch.ones(size)]).double()
        first, second, rest = normed.split((rotary // 2, rotary // 2, size - rotary), -1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)
        expected = torch.cat((turned[:, :6], x[:, 6:]), 1).flatten(1)
        avx2.qk_norm_rope(qkv, 4, 2, 1, size, 1e-6, *weights, cache, True, positions)
        found.append((qkv, expected))
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size, rotary, angles", [(128, 64, torch.bfloat16), (64, 64, torch.float32), (16, 16, None)])
def test_queries_and_keys_are_normed_and_rotated_with_one_rounding(dtype, size, rotary, angles):
    for found, expected in run_in_turn(_turned, dtype, size, rotary, angles or dtype):
        step = torch.finfo(dtype).eps / 2  # of the number that it is rounded to; fp32 sums besides
        torch.testing.assert_close(found.double(), expected, rtol=step + 1e-6, atol=1e-5)


def _first_load(folder, cxx):
    """What `load` says twice, and the files that it leaves."""
    os.environ.update(CXX=cxx, VLLM_CACHE_ROOT=folder)
    from vllm_bailing.plugin.kernels import avx2

    said = []
    for _ in range(2):
        try:
            avx2.load()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))
    return said, [file.name for file in Path(folder).rglob("*") if file.is_file()]


def test_a_compiler_that_fails_is_asked_once_and_told(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such instruction' >&2; echo x >> \"$0.calls\"; exit 3\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    said, left = run(_first_load, str(tmp_path / "cache"), str(broken))
    assert said[0] == said[1] and "ended with 3: no such instruction" in said[0]
    assert (tmp_path / "broken.calls").read_text() == "x\n" and not left


def test_kernels_are_compiled_once_and_where_the_cache_cannot_be_written_for_one_process(tmp_path):
    said, left = run(_first_load, str(tmp_path / "cache"), compiler())
    assert said == ["", ""] and len(left) == 1 and left[0].startswith("avx2-")
    (tmp_path / "file").write_text("")
    said, _ = run(_first_load, str(tmp_path / "file" / "cache"), compiler())
    assert said == ["", ""] and not list(Path(tmp_path / "cache" / "bailing").glob("tmp*"))
