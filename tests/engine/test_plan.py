"""What the planner computes, against loaded models and running engines."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from tests.support.config_switches import SWITCHES, switched
from tests.support.engine import TWO_RANKS, loaded_rank, make_llm, run, run_in_turn, run_ranks
from tests.support.planning import MIDDLE, PARTITIONS, plan
from tests.support.versions import SHARED_EXPERTS, since
from vllm_bailing import DEMO
from vllm_bailing.config import read_config
from vllm_bailing.planning.gpus import GPUS, find_gpu
from vllm_bailing.planning.serve import default_batched_tokens

SHAPES = {
    "middle": SWITCHES["plain"],
    "one key/value head": SWITCHES["one_key_value_head"],
    "tied": SWITCHES["tied"],
    "biases, two shared experts": switched("only_dense_bias", "only_qkv_bias", "two_shared_experts"),
}


# How ranks are used, as vLLM is told.
WAYS = {
    "tensor": lambda ranks: {"tensor_parallel_size": ranks},
    "pipeline": lambda ranks: {"pipeline_parallel_size": ranks},
    "expert": lambda ranks: {"tensor_parallel_size": ranks, "enable_expert_parallel": True},
    "data": lambda ranks: {"data_parallel_size": ranks, "enable_expert_parallel": True},
    "data, tensor": lambda ranks: {
        "data_parallel_size": 2,
        "tensor_parallel_size": ranks // 2,
        "enable_expert_parallel": True,
    },
    "redundant": lambda ranks: {
        "tensor_parallel_size": ranks,
        "enable_expert_parallel": True,
        "enable_eplb": True,
        "eplb_config": {"num_redundant_experts": 2 * ranks},
    },
}
# The same for the planner.
SIZES = {
    "tensor": lambda ranks: {"tp": ranks},
    "pipeline": lambda ranks: {"pp": ranks},
    "expert": lambda ranks: {"tp": ranks, "expert_parallel": True},
    "data": lambda ranks: {"dp": ranks, "tp": 1},
    "data, tensor": lambda ranks: {"dp": 2, "tp": ranks // 2},
    "redundant": lambda ranks: {"tp": ranks, "expert_parallel": True, "redundant_experts": 2 * ranks},
}


def _loaded_bytes(rank, ranks, init, options):
    """Bytes of the parameters of target and draft on one rank, with routers in bf16."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    torch.set_default_dtype(torch.bfloat16)  # as vLLM's loaders do
    # Of the platforms of vLLM's CPU build none balances experts; that they are loaded does not need it.
    from vllm.config import parallel

    balancing = mock.Mock(wraps=parallel.current_platform, **{"is_cuda_alike.return_value": True})
    with mock.patch.object(parallel, "current_platform", balancing) if "enable_eplb" in options else nullcontext():
        target, _ = loaded_rank(rank, ranks, init, options)
    models, settings = [target], target.vllm_config
    if settings.speculative_config:
        with set_current_vllm_config(settings):
            draft_config = settings.speculative_config.draft_model_config
            models.append(initialize_model(vllm_config=settings, model_config=draft_config))
    named = [named for model in models for named in model.named_parameters()]
    named += [named for model in models for named in model.named_buffers() if named[0].endswith("expert_bias")]
    # On most CPUs routers are fp32 whatever the model is; the plan is for GPUs.
    return sum(2 * one.numel() if name.endswith("gate.weight") else one.nbytes for name, one in named)


def loaded_bytes(model, folder, ranks, way, draft_tokens):
    options = {"model": str(model), **WAYS[way](ranks)}
    if draft_tokens:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": draft_tokens}
    return max(run_ranks(_loaded_bytes, ranks, folder, options))


@pytest.mark.parametrize(
    ("way", "ranks"), [("tensor", 1), ("tensor", 2), ("pipeline", 2), pytest.param("expert", 2, marks=SHARED_EXPERTS)]
)
@pytest.mark.parametrize("shape", ["demo", *SHAPES])
def test_weights_are_to_the_byte_what_a_rank_loads(shape, way, ranks, tmp_path):
    model = DEMO if shape == "demo" else make_checkpoint(tmp_path / "model", **{**MIDDLE, **SHAPES[shape]})
    # On CPUs vLLM's pipelines do not draft.
    draft_tokens = 1 if shape in ("demo", "middle") and way != "pipeline" else 0
    found = plan(read_config(model), "H100", ranks, 64, 1, draft_tokens=draft_tokens, **SIZES[way](ranks))
    assert found.weights.total == loaded_bytes(model, tmp_path, ranks, way, draft_tokens)


@SHARED_EXPERTS
@pytest.mark.parametrize(("way", "ranks"), [("data", 2), ("data, tensor", 4), ("redundant", 2)])
def test_so_they_are_where_experts_are_divided_among_all_ranks(way, ranks, tmp_path):
    """Two data-parallel ranks of two keep the shared experts whole; redundant experts are on every rank."""
    model = make_checkpoint(tmp_path / "model", **MIDDLE)
    found = plan(read_config(model), "H100", ranks, 64, 1, draft_tokens=1, **SIZES[way](ranks))
    assert found.weights.total == loaded_bytes(model, tmp_path, ranks, way, 1)


def _cache_tokens(model, **options):
    cache = make_llm(model, **options).llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


@pytest.mark.parametrize(("ranks", "draft_tokens"), [(1, 0), (2, 0), (1, 1)])
@pytest.mark.parametrize("shape", ["demo", "middle"])
def test_a_running_engine_has_that_many_tokens_of_cache(shape, ranks, draft_tokens, tmp_path):
    model = DEMO if shape == "demo" else make_checkpoint(tmp_path, **MIDDLE)
    options = {"tensor_parallel_size": ranks, "dtype": "bfloat16", "kv_cache_memory_bytes": 2**30}
    if draft_tokens:
        options["speculative_config"] = {"method": "mtp", "num_speculative_tokens": draft_tokens}
    if shape == "middle":
        options["load_format"] = "dummy"
    tokens = run_in_turn(_cache_tokens, model, env=TWO_RANKS if ranks > 1 else None, **options)
    found = plan(read_config(model), "H100", ranks, 64, 1, draft_tokens=draft_tokens, tp=ranks)
    assert 2**30 / tokens == pytest.approx(found.kv_bytes_per_token, rel=0.01)  # whole blocks


@pytest.mark.parametrize(("layers", "partition"), PARTITIONS)
def test_stages_have_the_layers_that_vllm_gives_them(layers, partition):
    assert run_in_turn(_partition, layers, len(partition)) == partition


def _partition(layers, pp):
    from vllm.distributed.utils import get_pp_indices

    return tuple(end - start for start, end in (get_pp_indices(layers, rank, pp) for rank in range(pp)))


def _vllms_defaults(machines):
    """Tokens of a step that `vllm serve` takes on each of `machines`: (memory in bytes, name)."""
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    tokens_of_a_step = []
    for memory, name in machines:
        arg_utils.current_platform = SimpleNamespace(
            get_device_total_memory=lambda memory=memory: memory,
            get_device_name=lambda name=name: name,
            is_tpu=lambda: False,
            is_cpu=lambda: False,
        )
        tokens, _ = arg_utils.EngineArgs.get_batch_defaults(1)
        tokens_of_a_step.append(tokens[UsageContext.OPENAI_API_SERVER])
    return tokens_of_a_step


@since("0.32", "these defaults")
def test_vllm_takes_as_many_tokens_of_a_step_by_default_as_planned():
    machines = [(gpu.memory_bytes, name) for gpu in GPUS.values() for name in gpu.driver_names]
    # Described by the user, under the name that the driver gives: memory decides, but for the A100.
    described = [
        find_gpu(name, gib, 1) for gib in (69.9, 70, 159.9, 160) for name in ("NVIDIA A100X", "NVIDIA GH200 480GB")
    ]
    machines += [(gpu.memory_bytes, gpu.name) for gpu in described]
    taken = run(_vllms_defaults, machines)
    planned = [default_batched_tokens(gpu) for gpu in (*GPUS.values(), *described)]
    assert planned == taken
    assert set(taken) == {2048, 8192, 16384}
