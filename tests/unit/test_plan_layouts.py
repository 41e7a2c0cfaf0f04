"""Questions to the planner about layouts, each answered by hand here.

Every figure is worked out from the sizes of the model alone, apart from the package: elements of a layer's matrices,
two bytes each (in fp8 one, and four for the scale of each block of 128 x 128); then what a GPU leaves.
"""

from __future__ import annotations

import pytest
from serve_configs import zoo_config

from tests.support.planning import MTP, plan

GIB = 2**30
H100, H200, L40S, MI325X = (int(round(gib * GIB) * 0.92) for gib in (79.1, 139.7, 44.4, 255.6))  # what vLLM may use
# CUDA graphs, context, and the logits of 1024 requests with 157184 tokens in two and four bytes.
ALWAYS = 3 * GIB + 1024 * 157184 * 6

# Ling-flash: hidden size 4096, 32 layers of which the first has no experts but an MLP of width 9216; 256 experts of
# width 1024 and a shared one; 32 heads of 128, 4 for keys and values; 157184 tokens.
EXPERT = 3 * 1024 * 4096
FLASH_ROUTERS = 31 * (256 * 4096 * 2 + 256 * 4)  # bf16, with biases in fp32
FLASH_NORMS = 2 * (32 * (2 * 4096 + 2 * 128) + 4096)
FLASH_WHOLE = FLASH_ROUTERS + FLASH_NORMS  # on every rank
FLASH_ENDS = 2 * 157184 * 4096 * 2  # embedding and head
FLASH_DENSE = 3 * 9216 * 4096 * 2
# 8192 tokens of a step: two buffers with 8 rows each of 4096 columns; eight tensors.
FLASH_OTHER = ALWAYS + 8192 * 8 * (4096 + 4096) * 2 + 8192 * 4096 * 8 * 2

# On 2, 4 and 8 ranks: 16 + 2 * 2, 8 + 2 * 1 and 4 + 2 * 1 heads, then the output's inputs.
FLASH_ATTENTION = {
    2: 32 * (20 * 128 * 4096 + 4096 * 2048) * 2,
    4: 32 * (10 * 128 * 4096 + 4096 * 1024) * 2,
    8: 32 * (6 * 128 * 4096 + 4096 * 512) * 2,
}
# All but the KV cache that a TP group divides evenly: dense MLP, 31 x (256 experts and a shared one), both ends.
FLASH_DIVIDED = FLASH_DENSE + 31 * 257 * EXPERT * 2 + FLASH_ENDS
FLASH = {tp: FLASH_ATTENTION[tp] + FLASH_DIVIDED // tp + FLASH_WHOLE for tp in (2, 4, 8)}


def flash(*hardware, **options):
    return plan(zoo_config("Ling-flash-2.0"), *hardware, **options)


def test_1_flash_on_two_nodes_of_h200_is_eight_replicas_of_two_gpus():
    """One GPU is too small for 192 GiB. Two hold 96 each and leave 27, 893,600 tokens: 27 requests, of which 8 come."""
    found = flash("H200", 8, 32768, 64, nodes=2)
    assert (found.layout, found.verdict) == ("8 replicas of TP 2", "fits")
    assert found.weights.total == FLASH[2] == pytest.approx(95.85 * GIB, rel=1e-4)
    assert found.kv_bytes_per_token == 32 * 2 * 2 * 128 * 2  # layers, key and value, 2 of the 4 heads, bf16
    tokens = (H200 - FLASH_OTHER - FLASH[2]) // 32768
    assert tokens == 893_600
    assert (found.kv_tokens, found.largest_concurrency) == (8 * tokens, 8 * 27)
    # Two all-reduces of 4096 x 2 bytes in each of 32 layers, of which a rank of two sends 2 x 1/2. None leaves a node.
    assert (found.traffic.total, found.traffic.between_nodes) == (32 * 2 * 8192, 0)
    assert found.flags["max-num-seqs"] == 8
    assert "2 GPUs hold model and requests" in found.why
    assert found.runner_up.startswith("4 replicas of TP 4: 600 such requests")
    ports = [(own.node, own.environment["CUDA_VISIBLE_DEVICES"], own.flags["port"]) for own in found.commands]
    on_a_node = [("0,1", 8000), ("2,3", 8001), ("4,5", 8002), ("6,7", 8003)]
    assert ports == [(node, *slot) for node in (0, 1) for slot in on_a_node]


def fp8(*shapes):
    """Bytes of matrices in fp8 whose sides are whole blocks."""
    return sum(rows * columns + 4 * (rows // 128) * (columns // 128) for rows, columns in shapes)


# Ling-1T: hidden size 8192, 80 layers, 4 with an MLP of width 18432, 76 with 256 experts of width 2048; 64 heads.
ONE_T_ATTENTION = fp8(((8 + 2) * 128, 8192), (8192, 1024))  # an eighth of 64 heads, and of 8 for keys and values
ONE_T_MLP = fp8((2304, 8192), (2304, 8192), (8192, 2304))
ONE_T_MOE = 257 * fp8((256, 8192), (256, 8192), (8192, 256)) + 256 * 8192 * 2 + 256 * 4
ONE_T_NORMS = 2 * (2 * 8192 + 2 * 128)
ONE_T_END = (157184 // 8) * 8192 * 2  # embedding, or head
ONE_T_OTHER = ALWAYS + 8192 * 8 * 2 * 8192 * 2 + 8192 * 8192 * 16


def one_t_tokens():
    """(tokens of KV cache of a node, of both as two stages)"""
    whole = 80 * (ONE_T_ATTENTION + ONE_T_NORMS) + 4 * ONE_T_MLP + 76 * ONE_T_MOE + 2 * 8192 + 2 * ONE_T_END
    last = 40 * (ONE_T_ATTENTION + ONE_T_NORMS + ONE_T_MOE) + 2 * 8192 + ONE_T_END  # the fuller stage
    room = H200 - ONE_T_OTHER
    return (room - whole) // (80 * 2 * 128 * 2), (room - last) // (40 * 2 * 128 * 2)


def test_2_one_t_in_fp8_stays_on_one_node_for_the_requests_that_it_holds():
    found = plan(zoo_config("Ling-1T-FP8"), "H200", 8, 32768, 6, nodes=2)
    tokens, _ = one_t_tokens()
    assert tokens == 121_495  # 3 requests of 32768
    assert (found.layout, found.verdict, found.largest_concurrency) == ("2 replicas of TP 8", "fits", 6)
    assert found.weights.total == H200 - ONE_T_OTHER - found.kv_room_bytes == pytest.approx(116.99 * GIB, rel=1e-4)
    assert found.traffic.between_nodes == 0
    # What is given up for it: half of the weights, and of the cache's layers, on each GPU.
    assert found.runner_up.startswith("TP 8, 2 pipeline stages over 2 nodes: 96 such requests at once")


def read_by_hand(layers, moe, requests, tokens):
    """Bytes that a GPU reads for a step of `requests`: of 256 experts those that somebody picks, and all caches."""
    picked = 1 - (1 - 8 / 256) ** requests
    expert = fp8((256, 8192), (256, 8192), (8192, 256))
    attention = layers * (ONE_T_ATTENTION + ONE_T_NORMS) + (layers - moe) * ONE_T_MLP
    return (
        attention
        + moe * (256 * picked * expert + expert + 256 * 8192 * 2 + 256 * 4)
        + layers * 2 * 128 * 2 * tokens * requests
    )


def test_2b_for_ten_times_as_many_both_nodes_are_one():
    """58 of 64 requests would wait. Two stages hold all of them, and read their experts for 32 tokens instead of 3."""
    found = plan(zoo_config("Ling-1T-FP8"), "H200", 8, 32768, 64, nodes=2)
    of_one, of_both = one_t_tokens()
    assert (of_one // 32768, of_both // 32768) == (3, 96)
    assert (found.layout, found.verdict, found.largest_concurrency) == ("TP 8, 2 pipeline stages", "fits", 96)
    assert found.why == "64 such requests at once fit on 2 nodes together, 6 on replicas of one node"
    # Replicas: 2 x 3 requests in the time of one step. Stages: 32 of 64 requests in that of the slower stage.
    replicas = 6 / (read_by_hand(80, 76, 3, 32768) + 2 * 8192 + ONE_T_END)
    stages = 32 / (read_by_hand(40, 40, 32, 32768) + 2 * 8192 + ONE_T_END)
    assert stages / replicas == pytest.approx(1.499, abs=0.001)
    assert found.batch.tokens_per_s == pytest.approx(stages * 4.8e12, rel=1e-6)
    assert found.runner_up.startswith("2 replicas of TP 8: 6 such requests at once")


def test_2c_for_twice_as_many_it_would_gain_too_little():
    """12 requests are 8 % faster over both nodes by a bound that leaves out the traffic between them."""
    found = plan(zoo_config("Ling-1T-FP8"), "H200", 8, 32768, 12, nodes=2)
    replicas = 6 / (read_by_hand(80, 76, 3, 32768) + 2 * 8192 + ONE_T_END)
    stages = 6 / (read_by_hand(40, 40, 6, 32768) + 2 * 8192 + ONE_T_END)
    assert stages / replicas == pytest.approx(1.078, abs=0.001)
    assert (found.layout, found.verdict) == ("2 replicas of TP 8", "tight")
    assert found.reason.startswith("2 x 121,495 tokens of KV cache hold 6 requests of 32,768 tokens, not 12")


def test_3_one_t_in_bf16_needs_both_nodes():
    """A node would need 2 x 117 GiB per GPU. Stages of 42 and 38 layers: the first has the 4 layers without experts."""
    found = plan(zoo_config("Ling-1T"), "H200", 8, 32768, 7, nodes=2)
    attention = 2 * ((8 + 2) * 128 * 8192 + 8192 * 1024)
    moe = 257 * 3 * 256 * 8192 * 2 + 256 * 8192 * 2 + 256 * 4
    norms = 2 * (2 * 8192 + 2 * 128)
    first = 42 * (attention + norms) + 4 * 3 * 2304 * 8192 * 2 + 38 * moe + (157184 // 8) * 8192 * 2
    other = ALWAYS + 8192 * 8 * 2 * 8192 * 2 + 8192 * 8192 * 16
    assert found.layer_partition == (42, 38)
    assert (found.layout, found.weights.total) == ("TP 8, 2 pipeline stages", first)
    assert found.kv_bytes_per_token == 42 * 2 * 1 * 128 * 2
    tokens = (H200 - other - first) // found.kv_bytes_per_token
    assert (found.kv_tokens, found.largest_concurrency, found.verdict) == (tokens, tokens // 32768, "fits")
    assert found.largest_concurrency == 7
    assert found.why == "no layout on one node holds a request of 32768 tokens"
    # Hidden states and residual, 8192 x 2 bytes each, an eighth from each rank, go to the other node.
    assert found.traffic.between_nodes == 2 * 8192 * 2 / 8
    node_0, node_1 = (found.commands[node].additions() for node in (0, 1))
    assert node_0 == "--nnodes 2 --node-rank 0 --master-addr HOST0"
    assert node_1 == "--nnodes 2 --node-rank 1 --master-addr HOST0 --headless"


# On 2 data-parallel ranks of 4: attention, MLP and ends by 4, an eighth of the experts whole, the shared one whole.
FLASH_DP = FLASH_ATTENTION[4] + (FLASH_DENSE + FLASH_ENDS) // 4 + 31 * (32 + 1) * EXPERT * 2 + FLASH_WHOLE
# Tokens of both ranks pass the experts, and are gathered before them and reduced after them.
FLASH_DP_OTHER = ALWAYS + 2 * 8192 * 8 * (4096 + 4096) * 2 + 8192 * 4096 * (8 + 4) * 2


def test_4_flash_for_64_long_requests_on_8_h100_is_data_and_expert_parallel():
    """TP 8 keeps each of 4 heads twice: 16 KiB a token as on TP 4, for all tokens; DP 2 has them for half of them."""
    found = flash("H100", 8, 65536, 64)
    assert (found.layout, found.verdict) == ("DP 2 x TP 4, EP 8", "fits")
    assert found.weights.total == FLASH_DP == pytest.approx(25.25 * GIB, rel=1e-3)
    tokens = (H100 - FLASH_DP_OTHER - FLASH_DP) // 16384
    assert (found.kv_bytes_per_token, found.kv_tokens) == (16384, 2 * tokens)
    assert found.largest_concurrency == 2 * (tokens // 65536) == 80
    assert found.why == "TP 8 would keep each of 4 key/value heads 2 times"
    by_tp = flash("H100", 8, 65536, 64, tp=8)
    assert (by_tp.kv_bytes_per_token, by_tp.weights.total) == (16384, FLASH[8])
    assert by_tp.kv_tokens == (H100 - FLASH_OTHER - FLASH[8]) // 16384
    assert by_tp.largest_concurrency == by_tp.kv_tokens // 65536 == 43
    # Of a token's 8192 bytes: two all-reduces, among 4 for its half of the tokens, in the layer without experts. With
    # them one, then there and back among 8 with 8 experts' numbers and weights, then a gathering among 4.
    reduce, gather = 2 * 8192 * 3 / 4 / 2, 8192 * 3 / 4 / 2
    assert found.traffic.total == 2 * reduce + 31 * (reduce + (8192 + 8 * 8 + 8192) * 7 / 8 + gather)


def test_4b_half_as_long_requests_are_two_replicas():
    """Two TP groups of 4 hold 1,272,382 tokens each, 38 requests of 32768; 32 come to each."""
    found = flash("H100", 8, 32768, 64)
    tokens = (H100 - FLASH_OTHER - FLASH[4]) // 16384
    assert tokens == 1_272_382
    assert (found.layout, found.kv_tokens, found.largest_concurrency) == ("2 replicas of TP 4", 2 * tokens, 2 * 38)
    assert found.runner_up.startswith("DP 2 x TP 4, EP 8: 162 such requests")


def test_5_flash_in_fp8_takes_four_l40s():
    """97 GiB in all: two would need 49 of 44 each."""
    found = flash("L40S", 4, 32768, 8, dtype="fp8")
    attention = fp8(((8 + 2) * 128, 4096), (4096, 1024))
    mlp = fp8((2304, 4096), (2304, 4096), (4096, 2304))
    expert = fp8((256, 4096), (256, 4096), (4096, 256))
    weights = 32 * attention + mlp + 31 * 257 * expert + FLASH_WHOLE + FLASH_ENDS // 4
    assert (found.layout, found.verdict, found.weights.total) == ("TP 4", "fits", weights)
    tokens = (L40S - FLASH_OTHER - weights) // 16384
    assert (found.kv_tokens, found.largest_concurrency) == (tokens, tokens // 32768)
    assert found.largest_concurrency == 22
    assert found.why == "fewer GPUs do not hold the model with one request"


def test_5b_copies_are_avoided_even_where_all_requests_fit():
    """In bf16 flash takes all of eight L40S, 24 GiB each: as TP 8 with room for 91 requests, of which 8 come."""
    by_tp = flash("L40S", 8, 8192, 8, tp=8)
    assert by_tp.largest_concurrency == (L40S - FLASH_OTHER - FLASH[8]) // 16384 // 8192 == 91
    found = flash("L40S", 8, 8192, 8)
    assert found.layout == "DP 2 x TP 4, EP 8"
    assert found.largest_concurrency == 2 * ((L40S - FLASH_DP_OTHER - FLASH_DP) // 16384 // 8192) == 142


@pytest.mark.parametrize(
    ("gpu", "gib", "verdict"), [("L4", 22.0, "no"), ("A10", 22.0, "no"), ("RTX4090", 23.5, "tight")]
)
def test_6_mini_in_fp8_on_one_small_gpu(gpu, gib, verdict):
    """Hidden size 2048, 20 layers, one with an MLP of width 5120; experts of width 512; 16 heads, 4 of keys."""
    found = plan(zoo_config("Ling-mini-2.0"), gpu, 1, 8192, 8, dtype="fp8")
    attention = fp8(((16 + 2 * 4) * 128, 2048), (2048, 2048))
    mlp = fp8((5120, 2048), (5120, 2048), (2048, 5120))
    expert = fp8((512, 2048), (512, 2048), (2048, 512))
    whole = 19 * (256 * 2048 * 2 + 256 * 4) + 2 * (20 * (2 * 2048 + 2 * 128) + 2048) + 2 * 157184 * 2048 * 2
    weights = 20 * attention + mlp + 19 * 257 * expert + whole
    other = ALWAYS + 8192 * 8 * (2048 + 2048) * 2 + 8192 * 2048 * 16
    room = int(round(gib * GIB) * 0.92) - other - weights
    assert (found.weights.total, found.kv_room_bytes, found.verdict) == (weights, room, verdict)
    assert found.largest_concurrency == max(0, room) // (20 * 2 * 4 * 128 * 2) // 8192
    assert any("no fp8 arithmetic" in note for note in found.notes) == (gpu == "A10")
    assert (found.why, found.runner_up) == ("", "")  # there is one layout


def test_7_two_redundant_experts_on_each_of_eight_ranks():
    """34 of 272 experts each, and a buffer of one layer's to move them through."""
    found = flash("H100", 8, 32768, 64, dp=2, redundant_experts=16)
    weights = FLASH_DP + 31 * 2 * EXPERT * 2
    other = FLASH_DP_OTHER + 34 * EXPERT * 2
    assert (found.layout, found.weights.total) == ("DP 2 x TP 4, EP 8", weights)
    assert (found.other.eplb_buffer, found.other.total) == (34 * EXPERT * 2, other)
    assert found.kv_tokens == 2 * ((H100 - other - weights) // 16384)
    assert found.flags["eplb-config"] == '{"num_redundant_experts":16}'
    assert found.flags["enable-eplb"] is found.flags["enable-expert-parallel"] is True


def test_8_slots_for_four_adapters_of_rank_64():
    """For each matrix a pair of 64 x inputs and outputs x 64, on the same share of inputs or outputs as its weight."""
    found = flash("H100", 4, 32768, 8, max_loras=4, max_lora_rank=64)
    attention = 64 * (4096 + 10 * 128) + 64 * (1024 + 4096)
    mlp, shared = 3 * 64 * (4096 + 2304), 3 * 64 * (4096 + 256)
    slots = 4 * 2 * (32 * attention + mlp + 31 * shared)
    assert (found.weights.adapters, found.weights.total) == (slots, FLASH[4] + slots)
    assert (found.layout, found.kv_tokens) == ("TP 4", (H100 - FLASH_OTHER - FLASH[4] - slots) // 16384)


def test_9_drafts_cost_a_layer_and_its_cache():
    """An MTP layer: attention and experts as in any other, three norms more, and a whole projection of 2 x 4096."""
    found = plan(zoo_config("Ling-flash-2.0", **MTP), "H100", 4, 32768, 8, draft_tokens=2)
    layer = FLASH_ATTENTION[4] // 32 + 257 * EXPERT * 2 // 4 + 256 * 4096 * 2 + 256 * 4 + 2 * (2 * 4096 + 2 * 128)
    layer += 3 * 4096 * 2 + 4096 * 8192 * 2
    assert (found.weights.mtp, found.weights.total) == (layer, FLASH[4] + layer)
    assert found.kv_bytes_per_token == 33 * 2 * 1 * 128 * 2
    assert found.kv_tokens == (H100 - FLASH_OTHER - FLASH[4] - layer) // (33 * 512)


def test_10_latency_and_throughput_want_different_layouts_of_the_same_gpus():
    """A token of one request reads everything but the embedding, 8 of 256 experts, and its 65536 tokens of cache."""
    fast = flash("H100", 8, 65536, 64, goal="latency")
    experts = 31 * 256 * EXPERT * 2 // 8
    read = FLASH[8] - FLASH_ENDS // 2 // 8 - experts + experts * 8 // 256 + 65536 * 16384
    assert (fast.layout, fast.verdict) == ("TP 8", "tight")
    assert fast.single.step_bytes == read
    assert fast.single.tokens_per_s == pytest.approx(3.35e12 / read)
    assert fast.runner_up.startswith("DP 2 x TP 4, EP 8: 80 such requests")
    assert fast.single.tokens_per_s > flash("H100", 8, 65536, 64).single.tokens_per_s
    # Two nodes are two replicas: neither reads less for being spread.
    assert flash("H200", 8, 32768, 64, nodes=2, goal="latency").layout == "2 replicas of TP 8"


def test_11_one_t_in_bf16_fits_no_eight_l40s():
    """An eighth is 2 x 117 GiB of 44."""
    found = plan(zoo_config("Ling-1T"), "L40S", 8, 32768, 8)
    attention = 2 * ((8 + 2) * 128 * 8192 + 8192 * 1024)
    moe = 257 * 3 * 256 * 8192 * 2 + 256 * 8192 * 2 + 256 * 4
    weights = 80 * (attention + 2 * (2 * 8192 + 2 * 128)) + 4 * 3 * 2304 * 8192 * 2 + 76 * moe + 8192 * 2
    weights += 2 * (157184 // 8) * 8192 * 2
    other = ALWAYS + 8192 * 8 * 2 * 8192 * 2 + 8192 * 8192 * 16
    assert (found.layout, found.verdict, found.weights.total) == ("TP 8", "no", weights)
    assert (found.kv_room_bytes, found.kv_tokens) == (L40S - other - weights, 0)
    assert found.reason.startswith("weights of 233.0 GiB") and (found.why, found.runner_up) == ("", "")


def test_12_one_mi325x_holds_flash_in_bf16():
    """192 GiB of 235, 38 left: at 64 KiB a token 624,321, four requests of 131072; two come to each of eight."""
    found = flash("MI325X", 8, 131072, 16)
    weights = 32 * ((32 + 2 * 4) * 128 * 4096 + 4096 * 4096) * 2 + FLASH_DIVIDED + FLASH_WHOLE
    tokens = (MI325X - FLASH_OTHER - weights) // (32 * 2 * 4 * 128 * 2)
    assert (found.layout, found.verdict, found.weights.total) == ("8 replicas of TP 1", "fits", weights)
    assert (found.kv_tokens, found.largest_concurrency) == (8 * tokens, 8 * 4)
    assert tokens // 131072 == 4
    assert found.traffic.total == 0


def test_13_mini_on_eight_gpus_is_eight_servers():
    """30 GiB each, where it used to be one server over all."""
    found = plan(zoo_config("Ling-mini-2.0"), "H100", 8, 32768, 32)
    assert (found.layout, found.verdict, found.flags["max-num-seqs"]) == ("8 replicas of TP 1", "fits", 4)
    assert [own.environment["CUDA_VISIBLE_DEVICES"] for own in found.commands] == list("01234567")
