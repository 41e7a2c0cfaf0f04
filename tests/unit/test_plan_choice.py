"""Layouts: what one GPU holds, reads and sends of each, and rules that hold for whatever is advised."""

from __future__ import annotations

import re
import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_configs import zoo_config

from tests.support.planning import MIDDLE, MTP, plan
from vllm_bailing.planning.gpus import GPUS, Gpu
from vllm_bailing.planning.memory import Layout, Stage
from vllm_bailing.planning.roofline import bound, stage_step
from vllm_bailing.planning.traffic import layer_traffic, traffic

# Hidden size 512, 8 heads of 64 with 2 for keys and values, 2 dense layers of width 1024, 4 layers with 32 experts and
# a shared one of width 256, 1000 tokens, padded to 1024.
CONFIG = zoo_config("Ling-mini-2.0", **MIDDLE)
WHOLE = Stage(0, 0, 6)
EXPERT = 3 * 256 * 512 * 2


def weights(**sizes):
    return Layout(CONFIG, "bf16", **sizes).weights(WHOLE)


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "experts", "shared"),
    [
        ({"tp": 2}, 32 / 2, 1 / 2),
        ({"tp": 2, "expert_parallel": True}, 16, 1 / 2),
        ({"dp": 2}, 32 / 2, 1),  # each expert by its width
        ({"dp": 2, "expert_parallel": True}, 16, 1),
        ({"dp": 2, "tp": 2}, 32 / 4, 1 / 2),
        ({"dp": 2, "tp": 2, "expert_parallel": True}, 8, 1),  # ranks divide the tokens
        ({"dp": 4, "tp": 2, "expert_parallel": True, "redundant_experts": 8}, 5, 1),
        ({"dp": 3, "expert_parallel": True}, 11, 1),  # of 11, 11 and 10
        ({"replicas": 4}, 32, 1),
    ],
)
def test_experts_of_a_rank(sizes, experts, shared):
    found, alone = weights(**sizes), weights(tp=sizes.get("tp", 1))
    assert found.routed_experts == 4 * experts * EXPERT
    assert found.shared_experts == 4 * shared * EXPERT
    for part in ("embedding", "head", "attention", "dense_mlp", "router", "norms"):
        assert getattr(found, part) == getattr(alone, part), part


def test_a_drafts_experts_are_divided_too():
    alone, divided = (
        weights(mtp_layers=1, dp=2, expert_parallel=is_whole, redundant_experts=2 * is_whole) for is_whole in (0, 1)
    )
    assert divided.mtp - alone.mtp == EXPERT  # 17 whole ones, not 32 halves


@pytest.mark.parametrize(("tp", "copies", "heads"), [(1, 1, 2), (2, 1, 1), (4, 2, 1), (8, 4, 1)])
def test_key_and_value_heads_are_copied_where_there_are_more_ranks(tp, copies, heads):
    layout = Layout(CONFIG, "bf16", tp=tp)
    assert layout.kv_copies == copies
    assert layout.kv_bytes_per_token(WHOLE) == 6 * 2 * heads * 64 * 2
    # Whatever the data-parallel size: each rank has the cache of its own requests.
    assert Layout(CONFIG, "bf16", tp=tp, dp=4, expert_parallel=True).kv_bytes_per_layer == layout.kv_bytes_per_layer


def test_other_memory_grows_with_the_ranks_whose_tokens_come():
    layout = Layout(CONFIG, "bf16", dp=2, expert_parallel=True, redundant_experts=4, mtp_layers=1)
    found, alone = layout.other_memory(100), Layout(CONFIG, "bf16").other_memory(100)
    assert found.moe_workspace == 2 * 100 * 8 * (512 + 512) * 2
    assert found.activations == 100 * 512 * (8 + 2 * 2) * 2
    assert found.eplb_buffer == 2 * 18 * EXPERT  # target and draft
    assert (found.logits, found.cuda_graphs, found.context) == (alone.logits, alone.cuda_graphs, alone.context)
    wide = zoo_config("Ling-mini-2.0", **{**MIDDLE, "moe_intermediate_size": 2048})
    sizes = {"tp": 2, "dp": 2}
    assert Layout(wide, "bf16", **sizes).other_memory(100).moe_workspace == 2 * 100 * 8 * (1024 + 512) * 2
    whole = Layout(wide, "bf16", expert_parallel=True, **sizes)
    assert whole.other_memory(100).moe_workspace == 2 * 100 * 8 * (4096 + 2048) * 2


def test_slots_for_adapters_are_those_of_the_layout():
    sizes = {"max_loras": 1, "lora_target_modules": ("experts",)}
    config = zoo_config("Ling-flash-2.0")
    by_width, whole = (
        plan(config, "H200", 4, 4096, 1, tp=4, expert_parallel=is_whole, **sizes).weights.adapters
        for is_whole in (False, True)
    )
    # A of gate and up is whole on each rank, and B of down: [16, 4096] and [4096, 16] of each of 256 experts, or of 64.
    assert by_width == 31 * 256 * 16 * (3 * 4096 + 3 * 256) * 2
    assert whole == 31 * 64 * 16 * (3 * 4096 + 3 * 1024) * 2


# --- speed --------------------------------------------------------------------------------------------------------


def test_a_step_of_data_parallel_ranks_by_hand():
    """A rank of two reads its own requests' cache, and of 16 experts those that anybody chose."""
    layout = Layout(CONFIG, "bf16", dp=2, expert_parallel=True, redundant_experts=2)
    read, flops = stage_step(layout, WHOLE, 100, 6)
    found = layout.weights(WHOLE)
    chosen = 4 * 16 * EXPERT * (1 - (1 - 8 / 32) ** 6)
    rest = found.total - found.routed_experts - found.embedding
    assert read == pytest.approx(rest + chosen + 6 * 2 * 2 * 64 * 2 * 100 * 3)
    attention = 6 * ((8 + 4) * 64 * 512 + 512 * 512) + 6 * 2 * 100 * 8 * 64
    dense = 2 * 3 * 1024 * 512 + 4 * (3 * 256 * 512 + 32 * 512) + 1024 * 512
    assert flops == pytest.approx(2 * (3 * (attention + dense) + 6 * 4 * 8 * 3 * 256 * 512 / 2))
    # One request alone is on one of them.
    alone, _ = stage_step(layout, WHOLE, 100, 1)
    assert alone == pytest.approx(rest + 4 * 16 * EXPERT * 8 / 32 + 6 * 2 * 2 * 64 * 2 * 100)


def test_ranks_that_divide_the_tokens_compute_a_part_of_shared_experts_and_router():
    sizes = {"tp": 2, "dp": 2}
    (_, divided), (_, whole) = (
        stage_step(Layout(CONFIG, "bf16", expert_parallel=is_whole, **sizes), WHOLE, 100, 8) for is_whole in (1, 0)
    )
    # Shared experts are whole for half of the tokens, or halved for all; only the router is not divided by TP.
    assert whole - divided == pytest.approx(2 * 4 * (4 * 32 * 512) / 2)


def test_replicas_share_the_requests():
    gpu = Gpu("GPU", 10**9, 1e9, 1e15)
    one = bound(Layout(CONFIG, "bf16"), (6,), gpu, 100, 8)
    four = bound(Layout(CONFIG, "bf16", replicas=4), (6,), gpu, 100, 32)
    assert (four.batch, four.step_bytes) == (32, one.step_bytes)
    assert four.tokens_per_s == pytest.approx(4 * one.tokens_per_s)
    # Two requests keep two of them busy.
    few = bound(Layout(CONFIG, "bf16", replicas=4), (6,), gpu, 100, 2)
    assert few.tokens_per_s == pytest.approx(2 * bound(Layout(CONFIG, "bf16"), (6,), gpu, 100, 1).tokens_per_s)


# --- traffic ------------------------------------------------------------------------------------------------------

TOKEN = 512 * 2  # bytes of a hidden state


@pytest.mark.parametrize(
    ("sizes", "dense", "moe", "experts"),
    [
        ({}, 0, 0, 0),
        ({"tp": 4}, 2 * 2 * 3 / 4, 2 * 2 * 3 / 4, 0),
        (
            {"tp": 4, "expert_parallel": True},
            2 * 2 * 3 / 4,
            2 * 2 * 3 / 4,
            0,
        ),  # as many: each rank has a part of the sum
        ({"dp": 2, "expert_parallel": True}, 0, 0, 2 * 1 / 2),
        ({"dp": 2, "tp": 4}, 2 * 2 * 3 / 4 / 2, 2 * 2 * 3 / 4 / 2, 2 * 1 / 2),
        ({"dp": 2, "tp": 4, "expert_parallel": True}, 2 * 2 * 3 / 4 / 2, (2 * 3 / 4 + 3 / 4) / 2, 2 * 7 / 8),
    ],
)
def test_traffic_of_a_layer_by_hand(sizes, dense, moe, experts):
    """In hidden states; to the routed experts go the numbers and weights of 8 of them as well, 4 bytes each."""
    layout = Layout(CONFIG, "bf16", **sizes)
    assert layer_traffic(layout, is_moe=False) == (dense * TOKEN, 0)
    ranks = layout.dp * (layout.tp if layout.is_sequence_parallel else 1)
    route = 64 * (ranks - 1) / ranks if layout.dp > 1 else 0
    assert layer_traffic(layout, is_moe=True) == pytest.approx((moe * TOKEN, experts * TOKEN + route))


def test_traffic_of_all_layers_and_what_leaves_the_node():
    layout = Layout(CONFIG, "bf16", tp=4, pp=2)
    found = traffic(layout, (4, 2), 8)
    assert (found.tensor, found.experts) == (4 * 3 * TOKEN, 0)  # of the larger stage
    assert (found.pipeline, found.between_nodes) == (2 * TOKEN / 4, 0)
    assert traffic(layout, (4, 2), 4).between_nodes == 2 * TOKEN / 4
    assert traffic(Layout(CONFIG, "bf16", tp=8), (6,), 4).between_nodes == 6 * 2 * 2 * 7 / 8 * TOKEN
    spread = traffic(Layout(CONFIG, "fp32", dp=4, expert_parallel=True), (6,), 2)
    assert spread.between_nodes == spread.experts == spread.total == 4 * (2 * 2 * TOKEN + 64) * 3 / 4


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ({}, "TP 1"),
        ({"tp": 8, "pp": 2}, "TP 8, 2 pipeline stages"),
        ({"replicas": 3}, "3 replicas of TP 1"),
        ({"tp": 4, "expert_parallel": True}, "TP 4, EP 4"),
        ({"dp": 2, "tp": 4, "expert_parallel": True, "replicas": 2}, "2 replicas of DP 2 x TP 4, EP 8"),
    ],
)
def test_a_layout_has_a_name(sizes, name):
    assert Layout(CONFIG, "bf16", **sizes).name == name


# --- rules --------------------------------------------------------------------------------------------------------

CONFIGS = {name: zoo_config(name, **MTP) for name in ("Ling-mini-2.0", "Ling-flash-2.0", "Ling-1T-FP8", "Ling-1T")}
QUESTIONS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(sorted(CONFIGS)),
        "gpu": st.sampled_from(sorted(GPUS)),
        "gpus": st.sampled_from([1, 2, 3, 4, 8]),
        "nodes": st.sampled_from([1, 2, 4]),
        "context": st.sampled_from([1000, 32768, 131072]),
        "concurrency": st.sampled_from([1, 7, 64, 1000]),
        "goal": st.sampled_from(["throughput", "latency"]),
        "draft_tokens": st.sampled_from([0, 1]),
    }
)


def advised(question, **changes):
    question = {**question, **changes}
    return plan(CONFIGS[question.pop("name")], **question)


@settings(deadline=None, max_examples=60)
@given(QUESTIONS)
def test_nothing_is_spread_over_nodes_that_one_node_serves(question):
    found, on_one = advised(question), advised(question, nodes=1)
    if on_one.verdict == "fits" or (on_one.verdict == "tight" and question["goal"] == "latency"):
        assert not found.spans_nodes and found.traffic.between_nodes == 0
    elif found.spans_nodes and on_one.verdict == "tight":  # which would let requests wait on all nodes, too
        assert question["nodes"] * on_one.largest_concurrency < question["concurrency"]
        assert found.largest_concurrency > question["nodes"] * on_one.largest_concurrency
        assert "nodes together" in found.why
    elif found.spans_nodes and found.verdict != "no":
        assert found.why.startswith("no layout on ") or "nodes together" in found.why


@settings(deadline=None, max_examples=60)
@given(QUESTIONS)
def test_every_gpu_has_one_place(question):
    found = advised(question)
    assert found.replicas * found.dp * found.tp * found.pp == found.gpus == question["gpus"] * question["nodes"]
    assert len(found.commands) == max(found.replicas, found.nodes)
    taken = [
        (own.node, gpu)
        for own in found.commands
        for gpu in own.environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(question["gpus"])))).split(",")
    ]
    assert sorted(taken) == [(node, str(gpu)) for node in range(found.nodes) for gpu in range(question["gpus"])]
    served = [(own.node, own.flags.get("port")) for own in found.commands if "headless" not in own.flags]
    assert len(served) == len(set(served)) == found.replicas


@settings(deadline=None, max_examples=60)
@given(QUESTIONS)
def test_the_runner_up_is_what_its_flags_plan(question):
    found = advised(question)
    if not found.runner_up:
        return
    name, requests, flags = re.fullmatch(r"(.*?)(?: over \d+ nodes)?: (\d+) such .* \((.*)\)", found.runner_up).groups()
    words = shlex.split(flags)
    sizes = {flag.removeprefix("--"): int(value) for flag, value in zip(words[::2], words[1::2], strict=True)}
    other = advised(question, **sizes)
    assert (other.layout, other.largest_concurrency) == (name, int(requests))
    assert other.layout != found.layout
    assert (
        other.largest_concurrency > found.largest_concurrency
        or other.single.tokens_per_s > found.single.tokens_per_s
        or other.batch.tokens_per_s > found.batch.tokens_per_s
    )


@settings(deadline=None, max_examples=60)
@given(QUESTIONS)
def test_what_is_advised_is_best_by_its_goal(question):
    """For throughput, more replicas hold fewer of the requests that come; for latency, none of TP alone is faster."""
    found, wanted = advised(question), question["concurrency"]
    if found.verdict == "no":
        return
    for tp in (tp for tp in (1, 2, 4, 8) if question["gpus"] % tp == 0):
        other = advised(question, tp=tp, pp=1, dp=1)
        if other.verdict == "no" or other.spans_nodes:
            continue
        if question["goal"] == "latency":
            assert found.single.tokens_per_s >= other.single.tokens_per_s * (1 - 1e-9)
        elif other.replicas > found.replicas:
            assert min(other.largest_concurrency, wanted) < min(found.largest_concurrency, wanted)
