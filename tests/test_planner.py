"""What the planner computes: against recorded calculations, loaded models, running engines and vLLM's own parser."""

from __future__ import annotations

import json
import shlex

import pytest
import serve_configs
import torch
import yaml
from checkpoints import make_checkpoint, quantize, read_tensors
from engine import TWO_RANKS, loaded_rank, make_llm, run, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from serve_configs import zoo_config
from transformers import AutoConfig

from vllm_bailing.cli import DEMO
from vllm_bailing.config import BailingMoeV2Config, register_with_transformers
from vllm_bailing.planner import GPUS, find_gpu, plan, vllm_partition

GB = 10**9
MTP = {"num_nextn_predict_layers": 1}

# --- recorded calculations ----------------------------------------------------------------------------------------

# Calculated apart from this package, with every weight divided by all GPUs: checkpoint, dtype, GPUs; then GB of weights
# per GPU, tokens of KV cache, verdict for four requests of 32768 tokens. An MTP layer drafts.
FIT = [
    ("Ling-flash-2.0", None, 4, "H100", 53.1, 1.14e6, "fits"),
    ("Ling-flash-2.0", None, 4, "H20", 53.1, 2.07e6, "fits"),
    ("Ling-flash-2.0", None, 2, "H200", 106.2, 0.77e6, "fits"),
    ("Ling-flash-2.0", None, 2, "H20-3e", 106.2, 0.77e6, "fits"),
    ("Ling-flash-2.0", None, 2, "H100", 106.2, 0, "no"),
    ("Ling-flash-2.0", None, 2, "H20", 106.2, 0, "no"),
    ("Ling-flash-2.0", "fp8", 1, "H200", 107.5, 0.37e6, "fits"),
    ("Ling-flash-2.0", "fp8", 2, "H100", 53.8, 0.55e6, "fits"),
    ("Ling-flash-2.0", "fp8", 2, "H20", 53.8, 1.01e6, "fits"),
    ("Ling-flash-2.0", "int4", 1, "H100", 58.8, 0.20e6, "fits"),
    ("Ling-flash-2.0", "int4", 1, "H20", 58.8, 0.43e6, "fits"),
    ("Ling-mini-2.0", None, 1, "H100", 34.2, 0.91e6, "fits"),
    ("Ling-1T-FP8", None, 8, "H200", 127, 0.09e6, "tight"),
    ("Ling-1T-FP8", None, 8, "B200", 127, 1.0e6, "fits"),
    ("Ling-1T", None, 16, "H200", 126.6, 0.10e6, "tight"),
]


def replicated_bytes(config, tp):
    """What the recorded calculation divides by `tp` although every rank has it whole: routers, `eh_proj`; in bf16."""
    routers = (len(config.moe_layer_ids) + 1) * config.num_experts * config.hidden_size
    return (routers + 2 * config.hidden_size**2) * 2 * (1 - 1 / tp)


@pytest.mark.parametrize(("name", "dtype", "gpus", "gpu", "weights_gb", "kv_tokens", "verdict"), FIT)
def test_recorded_fit(name, dtype, gpus, gpu, weights_gb, kv_tokens, verdict):
    config = zoo_config(name, **MTP)
    found = plan(config, gpu, gpus, 32768, 4, dtype=dtype, draft_tokens=1, tp=gpus)
    assert found.weights.total / GB == pytest.approx(weights_gb, rel=0.02)
    assert found.verdict == verdict
    if kv_tokens:
        # Where the room is what two large numbers leave, the part that is whole on every rank shows.
        extra = replicated_bytes(config, gpus) / found.kv_bytes_per_token
        assert found.kv_tokens + extra == pytest.approx(kv_tokens, rel=0.1)


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


# --- loaded models ------------------------------------------------------------------------------------------------

MIDDLE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 2,
    "vocab_size": 1000,  # no multiple of 64
    "num_nextn_predict_layers": 1,
}
SHAPES = {
    "middle": {},
    "one key/value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "biases, two shared experts": {"use_bias": True, "use_qkv_bias": True, "num_shared_experts": 2},
}


def read_config(folder):
    register_with_transformers()
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, BailingMoeV2Config)
    return config


def _loaded_bytes(rank, ranks, init, options):
    """Bytes of the parameters of target and draft on one rank, and how many weights its routers have."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    torch.set_default_dtype(torch.bfloat16)  # as vLLM's loaders do
    target, _ = loaded_rank(rank, ranks, init, options)
    models, settings = [target], target.vllm_config
    if settings.speculative_config:
        with set_current_vllm_config(settings):
            draft_config = settings.speculative_config.draft_model_config
            models.append(initialize_model(vllm_config=settings, model_config=draft_config))
    named = [named for model in models for named in model.named_parameters()]
    routers = sum(parameter.numel() for name, parameter in named if name.endswith("gate.weight"))
    return sum(parameter.nbytes for _, parameter in named), routers


def loaded_bytes(model, folder, ranks, way, draft_tokens):
    options = {"model": str(model), f"{way}_parallel_size": ranks}
    if draft_tokens:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": draft_tokens}
    # On CPUs routers are fp32 whatever the model is; the plan is for GPUs.
    return max(size - 2 * routers for size, routers in run_ranks(_loaded_bytes, ranks, folder, options))


@pytest.mark.engine
@pytest.mark.parametrize(("way", "ranks"), [("tensor", 1), ("tensor", 2), ("pipeline", 2)])
@pytest.mark.parametrize("shape", ["demo", *SHAPES])
def test_weights_are_to_the_byte_what_a_rank_loads(shape, way, ranks, tmp_path):
    model = DEMO if shape == "demo" else make_checkpoint(tmp_path / "model", **{**MIDDLE, **SHAPES[shape]})
    # On CPUs vLLM's pipelines do not draft.
    draft_tokens = 1 if shape in ("demo", "middle") and way == "tensor" else 0
    size = {"tp": ranks} if way == "tensor" else {"pp": ranks}
    found = plan(read_config(model), "H100", ranks, 64, 1, draft_tokens=draft_tokens, **size)
    assert found.weights.total == loaded_bytes(model, tmp_path, ranks, way, draft_tokens)


@pytest.mark.parametrize("scheme", ["fp8", "w8a8"])
def test_quantised_weights_are_what_the_files_hold(scheme, tmp_path):
    model = make_checkpoint(
        tmp_path, **{**MIDDLE, "vocab_size": 1024, "moe_intermediate_size": 160}
    )  # half-empty blocks
    quantize(model, scheme)
    config = read_config(model)
    # Some scales are stored in a smaller dtype than they are used in.
    stored = sum(
        tensor.numel() * 4 if "scale" in name else tensor.nbytes for name, tensor in read_tensors(model).items()
    )
    found = plan(config, "H100", 1, 64, 1, draft_tokens=1)
    assert found.dtype == {"fp8": "fp8", "w8a8": "int8"}[scheme]
    assert found.weights.total == stored


def _cache_tokens(model, **options):
    cache = make_llm(model, **options).llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


@pytest.mark.engine
@pytest.mark.parametrize(("ranks", "draft_tokens"), [(1, 0), (2, 0), (1, 1)])
@pytest.mark.parametrize("shape", ["demo", "middle"])
def test_a_running_engine_has_that_many_tokens_of_cache(shape, ranks, draft_tokens, tmp_path):
    model = DEMO if shape == "demo" else make_checkpoint(tmp_path, **MIDDLE)
    options = {"tensor_parallel_size": ranks, "dtype": "bfloat16"}
    if draft_tokens:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": draft_tokens}
    if shape == "middle":
        options["load_format"] = "dummy"
    tokens = run(_cache_tokens, model, env=TWO_RANKS if ranks > 1 else None, **options)
    found = plan(read_config(model), "H100", ranks, 64, 1, draft_tokens=draft_tokens, tp=ranks)
    assert 2**30 / tokens == pytest.approx(found.kv_bytes_per_token, rel=0.01)  # whole blocks; VLLM_CPU_KVCACHE_SPACE


@pytest.mark.parametrize(("layers", "pp"), [(80, 2), (32, 3), (20, 3), (21, 4), (22, 4), (7, 5)])
def test_stages_have_the_layers_that_vllm_gives_them(layers, pp):
    assert vllm_partition(layers, pp) == run(_partition, layers, pp)


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


# --- settings -----------------------------------------------------------------------------------------------------


def _parsed(arguments):
    """What `vllm ARGUMENTS` reads, by the names of its attributes."""
    import vllm_bailing

    vllm_bailing.register()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command, parser = ServeSubcommand(), FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args(arguments)
    command.validate(parsed)
    names = [*(name for flags in EXPECTED.values() for name in flags), "model_tag", "model"]
    return {name: getattr(parsed, name) for name in dict.fromkeys(names)}


CASES = {
    "plain": {"name": "Ling-flash-2.0", "gpu": "H100", "gpus": 4, "context": 32768, "concurrency": 32},
    "everything": {
        "name": "Ling-flash-base-2.0",
        "gpu": "L40S",
        "gpus": 8,
        "context": 131072,
        "concurrency": 4,
        "dtype": "fp8",
        "kv_dtype": "fp8",
        "draft_tokens": 2,
        "memory_utilization": 0.9,
        "pp": 2,
    },
    "dequantised, draft of another": {
        "name": "Ling-1T-FP8",
        "gpu": "B200",
        "gpus": 32,
        "context": 65536,
        "concurrency": 4,
        "dtype": "fp16",
        "draft_tokens": 1,
        "draft_model": "a model's folder",
    },
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
PARSERS = {"enable_auto_tool_choice": True, "tool_call_parser": "bailing", "reasoning_parser": "bailing"}
EXPECTED = {
    "plain": {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 1,
        "max_model_len": 32768,
        "max_num_seqs": 32,
        "max_num_batched_tokens": None,
        "gpu_memory_utilization": 0.92,
        "kv_cache_dtype": "auto",
        "quantization": None,
        "dtype": "auto",
        "hf_overrides": {},
        "speculative_config": None,
        **PARSERS,
    },
    "everything": {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
        "max_model_len": 131072,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8192,  # vLLM would take fewer on a small GPU
        "gpu_memory_utilization": 0.9,
        "kv_cache_dtype": "fp8",
        "quantization": "fp8",
        "dtype": "auto",
        "hf_overrides": {"rope_scaling": YARN},
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
        **PARSERS,
    },
    "dequantised, draft of another": {
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 4,
        "max_num_batched_tokens": 8192,  # vLLM would take more on a big GPU
        "dtype": "float16",
        "hf_overrides": {"dequantize": True, "rope_scaling": YARN},
        "speculative_config": {"method": "mtp", "model": "a model's folder", "num_speculative_tokens": 1},
        **PARSERS,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_vllm_reads_command_and_file_as_planned(case, tmp_path):
    options = dict(CASES[case])
    found = plan(zoo_config(options.pop("name")), model="some one's/model", **options)
    file = tmp_path / "serve.yaml"
    file.write_text(found.yaml())
    command = shlex.split(found.serve_line().replace("\\\n", ""))
    command = command[command.index("serve") :]
    by_command, by_file = (run(_parsed, arguments) for arguments in (command, ["serve", "--config", str(file)]))
    assert by_command.pop("model_tag") == by_file.pop("model") == "some one's/model"
    by_command.pop("model"), by_file.pop("model_tag")
    assert by_command == by_file
    assert {name: by_command[name] for name in EXPECTED[case]} == EXPECTED[case]
    assert yaml.safe_load(found.yaml()) == found.settings()


@pytest.mark.parametrize("case", list(CASES)[:2])
def test_command_is_at_most_100_columns_wide(case):
    options = dict(CASES[case])
    found = plan(zoo_config(options.pop("name")), model="inclusionAI/Ling-flash-base-2.0", **options)
    assert max(map(len, found.serve_line().splitlines())) <= 100


def test_the_window_of_ring_1t_is_stretched_to_what_its_card_promises():
    found = plan(zoo_config("Ring-1T"), "B200", 16, 131072, 1)
    scaling = json.loads(found.settings()["hf-overrides"])["rope_scaling"]
    assert scaling == {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536}


def test_files_of_deploy_are_what_the_script_writes():
    plans = serve_configs.plans()
    files = {file.stem: file.read_text(encoding="utf-8") for file in serve_configs.FOLDER.glob("*.yaml")}
    assert files == {name: found.yaml() for name, found in plans.items()}, "run scripts/serve_configs.py"
    assert all(found.fits for found in plans.values())


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


def test_a_gpu_is_found_in_any_case_and_may_be_described():
    assert find_gpu("h20-3E") is GPUS["H20-3e"]
    other = find_gpu("B300", memory_gib=268, bandwidth=8)
    assert (other.memory_bytes, other.bandwidth) == (268 * 2**30, 8e12)
    assert find_gpu("H100", memory_gib=93).bandwidth == GPUS["H100"].bandwidth


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
