"""The bounds of speed that a plan names, against recorded calculations."""

from __future__ import annotations

import pytest
from serve_configs import zoo_config

from tests.support.planning import GB, MTP, plan

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
        bound = plan(config, gpu, tp, 2048, requests, dtype=dtype).batch
        assert (bound.batch, bound.limit) == (requests, "bandwidth")
        divided = bound.step_bytes - routers
        assert divided / GB == pytest.approx(step_gb, rel=0.003)  # as rounded there
        assert bound.tokens_per_s * bound.step_bytes / divided == pytest.approx(speed, rel=0.005)
        if routers / divided < 0.02:  # all but Ling-1T, whose routers are 4 % of what a single request reads
            assert bound.step_bytes / GB == pytest.approx(step_gb, rel=0.02)


def test_drafts_do_not_change_the_bound_and_a_single_request_has_its_own():
    config = zoo_config("Ling-flash-2.0", **MTP)
    plain, drafting = (plan(config, "H20", 4, 2048, 32, draft_tokens=count) for count in (0, 3))
    assert (plain.single, plain.batch) == (drafting.single, drafting.batch)
    assert plain.single == plan(config, "H20", 4, 2048, 1).batch


def test_many_tokens_are_bound_by_compute_on_a_gpu_with_little_of_it():
    """Recorded for H20: from about 700 requests of 2048 tokens on, with Ling-flash in bf16 on four."""
    config = zoo_config("Ling-flash-2.0")
    limits = {requests: plan(config, "H20", 4, 2048, requests).batch.limit for requests in (500, 2000)}
    assert limits == {500: "bandwidth", 2000: "compute"}
