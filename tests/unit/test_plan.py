"""Plans: stages, dtypes, refusals, and properties of any plan."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_configs import zoo_config

from tests.support.planning import MIDDLE, MTP, PARTITIONS, YARN, plan
from vllm_bailing.planning.choice import tp_obstacle
from vllm_bailing.planning.gpus import GPUS, Gpu, find_gpu
from vllm_bailing.planning.memory import Layout, Stage, vllm_partition
from vllm_bailing.planning.request import longest_window


@pytest.mark.parametrize(("layers", "partition"), PARTITIONS)
def test_layers_that_stages_do_not_share_evenly_go_to_the_middle(layers, partition):
    assert vllm_partition(layers, len(partition)) == partition


def test_stages_are_levelled_where_vllms_own_leave_no_room():
    """Ling-1T: the last stage has more MoE layers than the first, the head, and the draft."""
    found = plan(zoo_config("Ling-1T", **MTP), "H200", 16, 32768, 1, draft_tokens=1)
    assert (found.tp, found.pp, found.layer_partition) == (8, 2, (42, 38))
    assert found.environment == {"VLLM_PP_LAYER_PARTITION": "42,38"}
    assert found.serve_line().startswith("VLLM_PP_LAYER_PARTITION=42,38 vllm serve ")
    assert "VLLM_PP_LAYER_PARTITION=42,38" in found.yaml()
    roomy = plan(zoo_config("Ling-1T", **MTP), "B200", 16, 32768, 1, draft_tokens=1)
    assert (roomy.layer_partition, roomy.environment) == ((40, 40), {})


# --- dtypes and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "int4"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        *(
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"group_0": {"weights": {"num_bits": bits, "type": kind}}},
                },
                dtype,
            )
            for bits, kind, dtype in ((8, "float", "fp8"), (8, "int", "int8"), (4, "int", "int4"))
        ),
    ],
)
def test_the_dtype_is_by_default_the_checkpoints(quantization, dtype):
    overrides = {"quantization_config": quantization} if quantization else {}
    assert plan(zoo_config("Ling-mini-2.0", **overrides), "H200", 1, 4096, 1).dtype == dtype


def test_fp8_is_weight_only_where_there_is_no_fp8_arithmetic():
    config = zoo_config("Ling-flash-2.0")
    found = plan(config, "A100-80G", 2, 4096, 1, dtype="fp8")
    assert "no fp8 arithmetic" in found.notes[0]
    assert not plan(config, "H100", 2, 4096, 1, dtype="fp8").notes
    # What arithmetic a described GPU has is not known.
    assert not plan(config, find_gpu("B300", 268, 8), 1, 4096, 1, dtype="fp8").notes


@pytest.mark.parametrize(("short", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_a_dtype_may_be_spelled_as_torch_does(short, full):
    config = zoo_config("Ling-mini-2.0")
    assert plan(config, "H200", 1, 4096, 1, dtype=full) == plan(config, "H200", 1, 4096, 1, dtype=short)


BASE = {"gpu": "H100", "gpus": 4, "context": 4096, "concurrency": 4}
REFUSED = [
    ({"gpu": "H1000"}, ("'H1000'", "--list-gpus", "--memory-gib", "--bandwidth")),
    ({"gpus": 0}, ("gpus=0", "at least 1")),
    ({"context": -1}, ("context=-1",)),
    ({"concurrency": 1.5}, ("concurrency=1.5",)),
    ({"draft_tokens": -1}, ("draft_tokens=-1", "at least 0")),
    ({"draft_tokens": 1}, ("num_nextn_predict_layers=0", "--draft-model")),
    ({"memory_utilization": 1.2}, ("memory_utilization=1.2", "at most 1")),
    ({"dtype": "fp4"}, ("dtype='fp4'", "bf16, fp16")),
    ({"kv_dtype": "int8"}, ("kv_dtype='int8'", "auto, fp8")),
    ({"context": 131073}, ("context=131073", "131072 with YaRN", "at most 131072")),
    ({"tp": 3, "gpus": 3}, ("tp=3", "num_attention_heads=16")),
    ({"tp": 8}, ("tp=8 makes no groups of equal size of gpus=4; change",)),
    ({"pp": 8}, ("pp=8 makes no groups of equal size of gpus=4; change",)),
    ({"pp": 3}, ("pp=3 makes no groups of equal size of gpus=4; change",)),
    ({"tp": 4, "pp": 2}, ("tp=4 x pp=2 makes no groups of equal size of gpus=4; change",)),
    ({"tp": 4, "dp": 2}, ("tp=4 x dp=2 makes no groups of equal size of gpus=4; change",)),
    ({"tp": 8, "nodes": 3}, ("tp=8 makes no groups of equal size of gpus=4 on each of 3 nodes; change",)),
    ({"pp": 24, "gpus": 24}, ("pp=24", "num_hidden_layers=20", "fewer GPUs")),
    ({"nodes": 0}, ("nodes=0", "at least 1")),
    ({"gpus": 12}, ("gpus=12 are more than the 8 of a usual node", "--gpus", "--nodes")),
    ({"goal": "x"}, ("goal='x'", "throughput, latency")),
    ({"redundant_experts": -1}, ("redundant_experts=-1", "at least 0")),
    ({"gpus": 1, "expert_parallel": True}, ("expert parallelism needs more than one GPU",)),
    ({"tp": 4, "redundant_experts": 4}, ("redundant_experts=4 need expert parallelism", "--enable-expert-parallel")),
    ({"dp": 4, "redundant_experts": 3}, ("redundant_experts=3 and num_experts=256", "of 4 ranks", "use 4")),
    ({"dp": 2, "tp": 2, "max_loras": 1}, ("max_loras=1 with dp=2 was never tried", "replicas")),
    ({"gpus": 2, "nodes": 4, "tp": 4, "dp": 2}, ("tp=4 x pp=1 is larger than a node of 2 GPUs", "leave out dp")),
]


@pytest.mark.parametrize(("options", "fragments"), REFUSED)
def test_impossible_requests_are_refused_in_one_line(options, fragments):
    with pytest.raises(ValueError) as refusal:
        plan(zoo_config("Ling-mini-2.0"), **{**BASE, **options})
    message = str(refusal.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("overrides", "options", "fragments"),
    [
        ({"moe_intermediate_size": 500}, {"tp": 8, "gpus": 8}, ("tp=8", "moe_intermediate_size=500")),
        ({"num_key_value_heads": 8}, {"tp": 6, "gpus": 6}, ("tp=6", "num_attention_heads=16")),
        ({"rope_scaling": YARN}, {"context": 131073}, ("131072", "rope_type='yarn'")),
        ({"quantization_config": {"quant_method": "mxfp4"}}, {}, ("'mxfp4'", "compressed-tensors")),
        ({"quantization_config": {"quant_method": "fp8"}}, {"dtype": "int4"}, ("dtype='int4'", "in fp8", "bf16")),
    ],
)
def test_requests_that_the_model_does_not_allow_are_refused(overrides, options, fragments):
    with pytest.raises(ValueError) as refusal:
        plan(zoo_config("Ling-mini-2.0", **overrides), **{**BASE, **options})
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_blocks_of_fp8_stay_whole_on_every_rank():
    """The shared expert of the vendor's export of Ling-mini has 512 inputs, four blocks."""
    config = zoo_config("own export in FP8")
    assert plan(config, "H100", 8, 4096, 1, goal="latency").tp == 4
    with pytest.raises(ValueError, match="width=512 into whole blocks of 128"):
        plan(config, "H100", 8, 4096, 1, tp=8)


# Three ranks divide all of it.
BY_THREE = {
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "moe_intermediate_size": 384,
    "intermediate_size": 768,
    "vocab_size": 190,  # padded to 192
    "eos_token_id": 0,
    "pad_token_id": 0,
}
IN_BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.mark.parametrize(
    ("overrides", "obstacle"),
    [
        ({}, ""),
        ({"num_attention_heads": 16, "num_key_value_heads": 4}, "num_attention_heads=16"),
        ({"moe_intermediate_size": 500}, "moe_intermediate_size=500"),
        ({"vocab_size": 193}, "the padded vocabulary of 256"),
        ({"intermediate_size": 500}, "intermediate_size=500"),
        ({"intermediate_size": 500, "first_k_dense_replace": 0}, ""),
        ({"moe_shared_expert_intermediate_size": 500}, "the shared experts' width of 500"),
        ({"moe_shared_expert_intermediate_size": 500, "num_shared_experts": 0}, ""),
        ({"num_key_value_heads": 1}, ""),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2, nor is it a multiple of that"),
        (IN_BLOCKS, ""),
        ({**IN_BLOCKS, "intermediate_size": 960}, "intermediate_size=960 into whole blocks of 128"),
        ({**IN_BLOCKS, "intermediate_size": 960, "first_k_dense_replace": 0}, ""),
        (
            {**IN_BLOCKS, "moe_shared_expert_intermediate_size": 192},
            "the shared experts' width=192 into whole blocks of 128",
        ),
    ],
)
def test_what_a_tensor_parallel_size_does_not_divide(overrides, obstacle):
    config = zoo_config("Ling-mini-2.0", **{**BY_THREE, **overrides})
    assert tp_obstacle(config, 3) == obstacle
    assert tp_obstacle(config, 1) == ""


def test_two_ranks_keep_whole_blocks_as_well():
    config = zoo_config("Ling-mini-2.0", **{**IN_BLOCKS, "intermediate_size": 640})
    assert tp_obstacle(config, 2) == "intermediate_size=640 into whole blocks of 128"
    assert tp_obstacle(config, 1) == ""


@pytest.mark.parametrize(
    ("gpus", "options", "sizes"),
    [
        (1, {}, (1, 1, 1, 1)),
        (3, {}, (3, 1, 1, 1)),
        (16, {}, (16, 1, 1, 1)),
        (1, {"goal": "latency"}, (1, 1, 1, 1)),
        (2, {"goal": "latency"}, (1, 1, 2, 1)),
        (6, {"goal": "latency"}, (3, 1, 2, 1)),
        (8, {"goal": "latency"}, (1, 1, 8, 1)),
        (16, {"goal": "latency"}, (2, 1, 8, 1)),
        (24, {"goal": "latency"}, (3, 1, 8, 1)),
        (16, {"goal": "latency", "nodes": 1}, (1, 1, 16, 1)),
        (4, {"goal": "latency", "nodes": 3}, (3, 1, 4, 1)),
        (16, {"tp": 16}, (1, 1, 16, 1)),
        (8, {"tp": 2}, (4, 1, 2, 1)),
        (8, {"pp": 2}, (4, 1, 1, 2)),
        (8, {"pp": 2, "goal": "latency"}, (1, 1, 4, 2)),
        (8, {"dp": 2}, (4, 2, 1, 1)),
        (8, {"dp": 2, "tp": 4}, (1, 2, 4, 1)),
        (8, {"dp": 2, "tp": 2, "pp": 2}, (1, 2, 2, 2)),
        (8, {"tp": 4, "pp": 2}, (1, 1, 4, 2)),
        (5, {"pp": 20, "nodes": 4}, (1, 1, 1, 20)),
    ],
)
def test_all_gpus_are_used(gpus, options, sizes):
    found = plan(zoo_config("Ling-mini-2.0"), "H200", gpus, 4096, 1, **options)
    assert (found.replicas, found.dp, found.tp, found.pp) == sizes
    assert found.replicas * found.dp * found.tp * found.pp == found.gpus == gpus * options.get("nodes", 1)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "4"])
@pytest.mark.parametrize("name", "gpus nodes context concurrency tp pp dp max_num_batched_tokens".split())
def test_counts_are_whole_numbers_of_at_least_one(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value!r} must be a whole number of at least 1; give another$"):
        plan(zoo_config("Ling-mini-2.0"), **{**BASE, name: value})


@pytest.mark.parametrize("share", [0, -0.1, 1.01])
def test_a_share_of_memory_is_above_0_and_at_most_1(share):
    with pytest.raises(ValueError, match=f"memory_utilization={share} must be above 0 and at most 1, such as 0.92"):
        plan(zoo_config("Ling-mini-2.0"), **{**BASE, "memory_utilization": share})
    assert plan(zoo_config("Ling-mini-2.0"), **{**BASE, "memory_utilization": 1}).fits


# --- what fits ----------------------------------------------------------------------------------------------------


def described(room: int) -> Gpu:
    """A GPU of which `room` bytes are left for the KV cache of `MIDDLE` in bf16, if vLLM may use half of it."""
    config = zoo_config("Ling-mini-2.0", **MIDDLE)
    layout = Layout(config, "bf16")
    taken = layout.weights(Stage(0, 0, 6)).total + layout.other_memory(8192).total
    return Gpu("GPU", 2 * (taken + room), 1e12)


MIDDLE_TOKEN = 6 * 2 * 2 * 64 * 2  # bytes of KV cache


@pytest.mark.parametrize(
    ("tokens", "verdict", "reason", "largest_context", "largest_concurrency"),
    [
        (
            0,
            "no",
            "weights of 0.1 GiB and other memory of 3.2 GiB leave nothing of 0.5 x 6.6 GiB per GPU; use more GPUs or a "
            "smaller dtype",
            0,
            0,
        ),
        (
            99,
            "no",
            "the weights fit, but beside them only 99 tokens of KV cache, less than one request of 100; use more GPUs, "
            "a smaller dtype, an fp8 KV cache or a shorter context",
            33,
            0,
        ),
        (
            100,
            "tight",
            "100 tokens of KV cache hold 1 requests of 100 tokens, not 3; the others wait when all are that long",
            33,
            1,
        ),
        (
            299,
            "tight",
            "299 tokens of KV cache hold 2 requests of 100 tokens, not 3; the others wait when all are that long",
            99,
            2,
        ),
        (300, "fits", "", 100, 3),
        (10**6, "fits", "", 131072, 10**4),
    ],
)
def test_a_verdict_says_what_fits(tokens, verdict, reason, largest_context, largest_concurrency):
    config = zoo_config("Ling-mini-2.0", **MIDDLE)
    for spare in (0, MIDDLE_TOKEN - 1) if tokens else (0,):
        room = tokens * MIDDLE_TOKEN + spare
        found = plan(config, described(room), 1, 100, 3, memory_utilization=0.5)
        assert (found.verdict, found.reason, found.fits) == (verdict, reason, verdict == "fits")
        assert (found.kv_room_bytes, found.kv_tokens, found.kv_bytes_per_token) == (room, tokens, MIDDLE_TOKEN)
        assert (found.largest_context, found.largest_concurrency) == (largest_context, largest_concurrency)


def test_a_room_for_less_than_a_token_is_a_room():
    found = plan(zoo_config("Ling-mini-2.0", **MIDDLE), described(1), 1, 100, 3, memory_utilization=0.5)
    assert found.reason.startswith("the weights fit, but beside them only 0 tokens")


def test_weights_that_do_not_fit_leave_a_negative_room_and_no_tokens():
    found = plan(zoo_config("Ling-mini-2.0", **MIDDLE), described(-1), 1, 100, 3, memory_utilization=0.5)
    assert (found.kv_room_bytes, found.kv_tokens, found.largest_context, found.verdict) == (-1, 0, 0, "no")


def test_stages_are_vllms_own_while_a_whole_window_fits():
    """Of six layers vLLM gives each of two stages three; the first has the two dense ones."""
    config = zoo_config("Ling-mini-2.0", **{**MIDDLE, "max_position_embeddings": 1000})
    layout, last = Layout(config, "bf16", pp=2), Stage(1, 3, 6)
    enough = layout.weights(last).total + 1000 * layout.kv_bytes_per_token(last)
    other = layout.other_memory(8192).total
    for spare, partition, environment in ((0, (3, 3), {}), (-1, (4, 2), {"VLLM_PP_LAYER_PARTITION": "4,2"})):
        gpu = Gpu("GPU", enough + other + spare, 1e12)
        found = plan(config, gpu, 2, 100, 3, pp=2, memory_utilization=1)
        assert (found.layer_partition, found.environment) == (partition, environment)


@pytest.mark.parametrize(
    ("window", "rope", "longest"),
    [(4096, None, 16384), (32768, None, 131072), (65536, None, 131072), (262144, None, 262144), (131072, YARN, 131072)],
)
def test_a_window_is_stretched_as_far_as_the_model_cards_go(window, rope, longest):
    config = zoo_config("Ling-mini-2.0", max_position_embeddings=window, rope_scaling=rope)
    assert longest_window(config) == longest
    assert plan(config, "B200", 1, longest, 1).largest_context <= longest
    with pytest.raises(ValueError, match=f"context={longest + 1} .* give a context of at most {longest}$"):
        plan(config, "B200", 1, longest + 1, 1)


@pytest.mark.parametrize(
    ("dtype", "stored", "note"),
    [
        ("int8", None, "Make a checkpoint in int8 and name it as the model: vllm-bailing quantize --scheme w8a8."),
        ("int4", None, "Make a checkpoint in int4 and name it as the model: vllm-bailing quantize --scheme w4a16."),
        ("int8", {"quant_method": "gptq", "bits": 8}, None),
        ("fp8", None, None),
        ("bf16", None, None),
    ],
)
def test_a_note_says_how_to_get_the_checkpoint(dtype, stored, note):
    config = zoo_config("Ling-mini-2.0", **({"quantization_config": stored} if stored else {}))
    assert plan(config, "H200", 1, 4096, 1, dtype=dtype).notes == ((note,) if note else ())


def test_a_note_says_that_replicas_need_a_router():
    config = zoo_config("Ling-mini-2.0")
    (note,) = plan(config, "H200", 8, 4096, 1).notes
    assert note.startswith("A router has to share the requests out") and "docs/scale-out.md" in note
    assert not plan(config, "H200", 8, 4096, 1, tp=8).notes


def test_drafts_of_another_checkpoint_are_one_layer():
    alone = plan(zoo_config("Ling-mini-2.0"), "H200", 1, 4096, 1, draft_tokens=1, draft_model="base")
    own = plan(zoo_config("Ling-mini-2.0", **MTP), "H200", 1, 4096, 1, draft_tokens=1)
    assert alone.weights == own.weights
    assert plan(zoo_config("Ling-mini-2.0", **MTP), "H200", 1, 4096, 1).weights.mtp == 0


# --- properties ---------------------------------------------------------------------------------------------------

deployments = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["Ling-mini-2.0", "Ling-flash-2.0", "Ling-1T-FP8", "Ring-1T"]),
        "gpu": st.sampled_from(sorted(GPUS)),
        "gpus": st.sampled_from([1, 2, 4, 8]),
        "context": st.integers(1, 131072),
        "concurrency": st.integers(1, 300),
        "draft_tokens": st.integers(0, 2),
        "kv_dtype": st.sampled_from(["auto", "fp8"]),
    }
)
CONFIGS = {name: zoo_config(name, **MTP) for name in ("Ling-mini-2.0", "Ling-flash-2.0", "Ling-1T-FP8", "Ring-1T")}


def planned(options, **changes):
    options = {**options, **changes}
    return plan(CONFIGS[options.pop("name")], **options)


# Within one machine: stages of unequal size can cost what further GPUs bring.
@settings(deadline=None, max_examples=60)
@given(deployments.filter(lambda options: options["gpus"] < 8))
def test_more_gpus_never_leave_less_room(options):
    gpus, wanted = options["gpus"], options["concurrency"]
    fewer, more = planned(options, tp=gpus), planned(options, gpus=2 * gpus, tp=2 * gpus)
    assert more.kv_room_bytes >= fewer.kv_room_bytes
    assert more.kv_tokens >= fewer.kv_tokens
    # Whatever is made of them, no fewer of the requests are served.
    fewer, more = planned(options), planned(options, gpus=2 * gpus)
    assert min(more.largest_concurrency, wanted) >= min(fewer.largest_concurrency, wanted)


@settings(deadline=None, max_examples=60)
@given(deployments, st.integers(1, 131072))
def test_more_context_never_allows_more_requests(options, context):
    contexts, wanted = sorted((options["context"], context)), options["concurrency"]
    short, long = (planned(options, context=tokens, tp=options["gpus"]) for tokens in contexts)
    assert long.largest_concurrency <= short.largest_concurrency
    short, long = (planned(options, context=tokens) for tokens in contexts)
    assert min(long.largest_concurrency, wanted) <= min(short.largest_concurrency, wanted)


@settings(deadline=None, max_examples=60)
@given(deployments, st.sampled_from([1, 2, 3]))
def test_largest_context_and_concurrency_are_exact(options, stages):
    options = {**options, "nodes": stages}
    found = planned(options)
    options |= {"tp": found.tp, "pp": found.pp, "dp": found.dp}
    assert found.fits == (found.largest_concurrency >= found.concurrency)
    if found.largest_concurrency:
        assert planned(options, concurrency=found.largest_concurrency).fits
        assert not planned(options, concurrency=found.largest_concurrency + 1).fits
    if found.largest_context:
        assert planned(options, context=found.largest_context).fits
        if found.largest_context < 131072:
            assert not planned(options, context=found.largest_context + 1).fits
    assert (found.verdict == "no") == (found.kv_tokens // found.replicas // found.dp < found.context)
