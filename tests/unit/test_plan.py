"""Plans: stages, dtypes, refusals, and properties of any plan."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_configs import zoo_config

from tests.support.engine import run_in_turn
from tests.support.planning import MTP, YARN, plan
from vllm_bailing.planning.gpus import GPUS, find_gpu
from vllm_bailing.planning.memory import vllm_partition


@pytest.mark.parametrize(("layers", "pp"), [(80, 2), (32, 3), (20, 3), (21, 4), (22, 4), (7, 5)])
def test_stages_have_the_layers_that_vllm_gives_them(layers, pp):
    assert vllm_partition(layers, pp) == run_in_turn(_partition, layers, pp)


def _partition(layers, pp):
    from vllm.distributed.utils import get_pp_indices

    return tuple(end - start for start, end in (get_pp_indices(layers, rank, pp) for rank in range(pp)))


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
    assert not plan(config, find_gpu("B300", 268, 8), 2, 4096, 1, dtype="fp8").notes


@pytest.mark.parametrize(("short", "full"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_a_dtype_may_be_spelled_as_torch_does(short, full):
    config = zoo_config("Ling-mini-2.0")
    assert plan(config, "H200", 1, 4096, 1, dtype=full) == plan(config, "H200", 1, 4096, 1, dtype=short)


BASE = {"gpu": "H100", "gpus": 4, "context": 4096, "concurrency": 4}
REFUSED = [
    ({"gpu": "H1000"}, ("'H1000'", "H100, H200", "--memory-gib", "--bandwidth")),
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
    ({"tp": 8}, ("tp=8", "gpus=4")),
    ({"pp": 3}, ("pp=3", "gpus=4")),
    ({"pp": 24, "gpus": 24}, ("pp=24", "num_hidden_layers=20", "fewer GPUs")),
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
    found = plan(config, "H100", 8, 4096, 1)
    assert (found.tp, found.pp) == (4, 2)
    with pytest.raises(ValueError, match="width=512 into whole blocks of 128"):
        plan(config, "H100", 8, 4096, 1, tp=8)


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
    fewer, more = planned(options), planned(options, gpus=2 * options["gpus"])
    assert more.kv_room_bytes >= fewer.kv_room_bytes
    assert more.kv_tokens >= fewer.kv_tokens


@settings(deadline=None, max_examples=60)
@given(deployments, st.integers(1, 131072))
def test_more_context_never_allows_more_requests(options, context):
    short, long = sorted((options["context"], context))
    assert planned(options, context=long).largest_concurrency <= planned(options, context=short).largest_concurrency


@settings(deadline=None, max_examples=60)
@given(deployments, st.sampled_from([1, 2, 3]))
def test_largest_context_and_concurrency_are_exact(options, stages):
    options = {**options, "gpus": options["gpus"] * stages}
    found = planned(options)
    assert found.fits == (found.largest_concurrency >= found.concurrency)
    if found.largest_concurrency:
        assert planned(options, concurrency=found.largest_concurrency).fits
        assert not planned(options, concurrency=found.largest_concurrency + 1).fits
    if found.largest_context:
        assert planned(options, context=found.largest_context).fits
        if found.largest_context < 131072:
            assert not planned(options, context=found.largest_context + 1).fits
    assert (found.verdict == "no") == (found.kv_tokens < found.context)
