"""The bounds of speed that a plan names, against recorded calculations."""

from __future__ import annotations

import pytest
from serve_configs import zoo_config

from tests.support.planning import GB, MIDDLE, MTP, plan
from vllm_bailing.planning.gpus import Gpu
from vllm_bailing.planning.memory import Layout, Stage
from vllm_bailing.planning.roofline import bound, stage_step, step_bytes

# As above: checkpoint, dtype, tp, requests, GB per step and GPU; then tokens/s on GPUs. Context 2048, no draft.
ROOFLINE = [
    ("Ling-mini-2.0", None, 1, 1, 2.31, {"H20": 1735, "H100": 1453, "H200": 2082, "B200": 3469}),
    ("Ling-mini-2.0", None, 1, 32, 23.5, {"H20": 5453, "H100": 4567, "H200": 6544, "B200": 10907}),
    ("Ling-mini-2.0", None, 1, 128, 42.1, {"H20": 12200, "H100": 10200, "H200": 14600, "B200": 24300}),
    ("Ling-flash-2.0", None, 4, 1, 2.79, {"H20": 1435, "H100": 1202, "H200": 1722, "B200": 2870}),
    ("Ling-flash-2.0", None, 4, 32, 34.1, {"H20": 3752, "H100": 3142, "H200": 4502, "B200": 7503}),
    ("Ling-flash-2.0", None, 4, 128, 54.6, {"H20": 9384, "H100": 7859, "H200": 11300, "B200": 18800}),
    ("Ling-flash-2.0", "fp8", 1, 1, 6.32, {"H200": 759, "B200": 1266}),
    ("Ling-flash-2.0", "fp8", 1, 32, 71.1, {"H200": 2161, "B200": 3601}),
    ("Ling-flash-2.0", "fp8", 2, 1, 3.16, {"H20": 1266, "H100": 1060, "H200": 1519, "B200": 2532}),
    ("Ling-1T-FP8", None, 8, 1, 6.49, {"H200": 740, "B200": 1233}),
    ("Ling-1T-FP8", None, 8, 32, 83.4, {"H200": 1842, "B200": 3071}),
]


@pytest.mark.parametrize(("name", "dtype", "tp", "requests", "step_gb", "speeds"), ROOFLINE)
def test_recorded_roofline(name, dtype, tp, requests, step_gb, speeds):
    config = zoo_config(name)
    routers = len(config.moe_layer_ids) * config.num_experts * config.hidden_size * 2 * (1 - 1 / tp)
    for gpu, speed in speeds.items():
        bound = plan(config, gpu, tp, 2048, requests, dtype=dtype, tp=tp).batch
        assert (bound.batch, bound.limit) == (requests, "bandwidth")
        divided = bound.step_bytes - routers
        assert divided / GB == pytest.approx(step_gb, rel=0.003)  # as rounded there
        assert bound.tokens_per_s * bound.step_bytes / divided == pytest.approx(speed, rel=0.005)
        if routers / divided < 0.02:  # all but Ling-1T, whose routers are 4 % of what a single request reads
            assert bound.step_bytes / GB == pytest.approx(step_gb, rel=0.02)


def test_drafts_do_not_change_the_bound_and_a_single_request_has_its_own():
    config = zoo_config("Ling-flash-2.0", **MTP)
    plain, drafting = (plan(config, "H20", 4, 2048, 32, draft_tokens=count, tp=4) for count in (0, 3))
    assert (plain.single, plain.batch) == (drafting.single, drafting.batch)
    assert plain.single == plan(config, "H20", 4, 2048, 1, tp=4).batch


def test_many_tokens_are_bound_by_compute_on_a_gpu_with_little_of_it():
    """Recorded for H20: from about 700 requests of 2048 tokens on, with Ling-flash in bf16 on four."""
    config = zoo_config("Ling-flash-2.0")
    limits = {requests: plan(config, "H20", 4, 2048, requests, tp=4).batch.limit for requests in (500, 2000)}
    assert limits == {500: "bandwidth", 2000: "compute"}


# --- by hand ------------------------------------------------------------------------------------------------------


def read_by_hand(weights, layers, kv_per_layer, context, tokens):
    """Bytes of a step: all weights but the embedding, the draft and the experts that nobody chose; then the cache."""
    idle = weights.embedding + weights.mtp + weights.routed_experts * (1 - 8 / 32) ** tokens
    return weights.total - idle + layers * kv_per_layer * context * tokens


@pytest.mark.parametrize("tokens", [1, 2.5, 40])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_step_by_hand(tp, tokens):
    config = zoo_config("Ling-mini-2.0", **MIDDLE)
    layout, stage = Layout(config, "bf16", tp=tp, mtp_layers=1), Stage(0, 0, 6)
    read, flops = stage_step(layout, stage, 100, tokens)
    assert read == pytest.approx(read_by_hand(layout.weights(stage), 6, 2 * (2 // tp) * 64 * 2, 100, tokens), rel=1e-9)
    attention = (8 + 4) * 64 * 512 + 512 * 512
    moe = 9 * 3 * 256 * 512  # eight experts of 32 and the shared one
    sharded = 6 * attention + 2 * 3 * 1024 * 512 + 4 * moe + 1024 * 512
    scores = 6 * 2 * 100 * 8 * 64  # products with keys and with values
    assert flops == pytest.approx(2 * tokens * ((sharded + scores) / tp + 4 * 32 * 512), rel=1e-9)


def test_only_the_last_stage_computes_logits():
    layout = Layout(zoo_config("Ling-mini-2.0", **MIDDLE), "bf16", pp=2)
    first, last = (stage_step(layout, stage, 100, 1)[1] for stage in layout.stages((4, 2)))
    dense = 2 * 2 * 3 * 1024 * 512 + 2 * 2 * 100 * 8 * 64 * 2 + 2 * 2 * ((8 + 4) * 64 * 512 + 512 * 512)
    assert first - dense == last - 2 * 1024 * 512


def test_step_bytes_are_those_of_a_plan():
    config = zoo_config("Ling-flash-2.0")
    for dtype in ("bf16", "fp32", "fp8"):
        planned = plan(config, "B200", 4, 2048, 16, dtype=dtype, tp=4).batch
        assert planned.step_bytes == round(step_bytes(Layout(config, dtype, tp=4), 2048, 16))


def test_a_pipeline_works_on_as_many_batches_as_it_has_stages():
    """Alone, a request passes all stages; many keep the busiest stage busy."""
    layout, gpu = Layout(zoo_config("Ling-mini-2.0", **MIDDLE), "bf16", pp=2), Gpu("GPU", 10**9, 1e9, 1e15)

    def seconds(tokens):
        return [stage_step(layout, stage, 100, tokens)[0] / 1e9 for stage in layout.stages((3, 3))]

    alone, many = bound(layout, (3, 3), gpu, 100, 1), bound(layout, (3, 3), gpu, 100, 64)
    assert alone.tokens_per_s == pytest.approx(1 / sum(seconds(1)))
    assert many.tokens_per_s == pytest.approx(64 / (2 * max(seconds(32))))
    assert many.step_bytes == round(max(seconds(32)) * 1e9)
    # A short stage must not make it look faster than its batches, one after the other.
    uneven = bound(layout, (5, 1), gpu, 100, 64)
    reads = [stage_step(layout, stage, 100, 32)[0] for stage in layout.stages((5, 1))]
    assert uneven.tokens_per_s == pytest.approx(64 / (2 * max(reads) / 1e9))


@pytest.mark.parametrize(
    ("dtype", "flops_16", "flops_8", "peak"),
    [("bf16", 3e9, 5e9, 3e9), ("fp8", 3e9, 5e9, 5e9), ("int8", 3e9, 5e9, 5e9), ("int4", 3e9, 5e9, 3e9),
     ("fp8", 3e9, None, 3e9)],
)  # fmt: skip
def test_the_peak_is_that_of_the_dtype(dtype, flops_16, flops_8, peak):
    layout = Layout(zoo_config("Ling-mini-2.0", **MIDDLE), dtype)
    slow = bound(layout, (6,), Gpu("GPU", 10**9, 1e15, flops_16, flops_8), 100, 4)
    assert (slow.limit, slow.batch) == ("compute", 4)
    assert slow.step_flops == round(stage_step(layout, Stage(0, 0, 6), 100, 4)[1])
    assert slow.tokens_per_s == pytest.approx(4 * peak / slow.step_flops)


def test_without_a_peak_bytes_are_the_bound():
    layout = Layout(zoo_config("Ling-mini-2.0", **MIDDLE), "bf16")
    described = bound(layout, (6,), Gpu("GPU", 10**9, 1e9), 100, 10**6)
    assert described.limit == "bandwidth"
    assert described.tokens_per_s == pytest.approx(10**6 * 1e9 / described.step_bytes)
