"""vLLM's expert load balancing on its CPU build, which refuses it: what stands in for the parts that want a GPU.

The stand-ins are four: the platform that vLLM's check of flags sees; its Triton kernel that picks a replica for each
choice and counts; the calls by which its GPU runner hands models over; a GPU's stream and stopwatch. The balancing
itself, the exchange of weights between ranks, and this package's answers to vLLM's questions are the real ones.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.support.engine import ask, make_llm

BALANCED = {
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
    "enable_eplb": True,
    "eplb_config": {"num_redundant_experts": 2, "use_async": False, "window_size": 50, "step_interval": 1000},
}


class _WithBalancing:
    """The platform, as vLLM's check of flags sees it."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return (lambda: True) if name == "is_cuda_alike" else getattr(self._platform, name)


def _to_physical(
    topk_ids: torch.Tensor,
    expert_load_view: torch.Tensor,
    logical_to_physical_map: torch.Tensor,
    logical_replica_count: torch.Tensor,
    **_rest: Any,
) -> torch.Tensor:
    """Slots for the model's numbers of experts, replicas in turn, each counted."""
    ids = topk_ids.long()
    turn = torch.arange(len(ids)).unsqueeze(1) % logical_replica_count[ids]
    slots = logical_to_physical_map[ids].gather(2, turn.unsqueeze(2)).squeeze(2)
    expert_load_view.scatter_add_(0, slots.flatten(), torch.ones_like(slots.flatten(), dtype=expert_load_view.dtype))
    return slots.to(topk_ids.dtype)


def _balance(worker: Any) -> None:
    from vllm.distributed.eplb.eplb_state import EplbState
    from vllm.model_executor.layers.fused_moe.router import base_router

    base_router.eplb_map_to_physical_and_record = _to_physical
    runner = worker.model_runner
    runner._moe_model = runner.model
    state = runner.eplb_state = EplbState(runner.parallel_config, runner.device)
    state.add_model(runner.model, runner.model_config)
    drafter = getattr(runner, "drafter", None)
    if drafter is not None:
        state.add_model(drafter.model, runner.vllm_config.speculative_config.draft_model_config)


def _experts(worker: Any) -> list[tuple[list[list[int]], list[list[str]]]]:
    """For each model, and each of its layers: the model's number of every slot, and a mark of what this rank's hold."""
    from hashlib import sha256

    found = []
    for state in worker.model_runner.eplb_state.model_states.values():
        marks = [
            [
                sha256(b"".join(part[slot].numpy().tobytes() for part in layer)).hexdigest()
                for slot in range(len(layer[0]))
            ]
            for layer in state.model.expert_weights
        ]
        found.append((state.physical_to_logical_map.tolist(), marks))
    return found


def _counts(worker: Any) -> list[list[list[int]]]:
    """For each model, and each of its layers: how often each slot was picked on this rank."""
    states = worker.model_runner.eplb_state.model_states.values()
    return [state.expert_load_pass.tolist() for state in states]


def _rearrange(worker: Any) -> None:
    import vllm.distributed.eplb.eplb_state as module

    state = worker.model_runner.eplb_state
    skewed = torch.Generator().manual_seed(7)
    for model in state.model_states.values():
        window = model.expert_load_window
        window.copy_((torch.rand(window[0].shape, generator=skewed).pow(6) * 1000).to(window.dtype).expand_as(window))
    stopwatch = SimpleNamespace(record=lambda *_: None, elapsed_time=lambda *_: 0.0, synchronize=lambda: None)
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda *_: None)
    with (
        mock.patch.object(module.torch, "Event", lambda **_: stopwatch),
        mock.patch.object(torch.accelerator, "current_stream", lambda *_: stream),
    ):
        state.rearrange()


def _resized(worker: Any) -> list[list[tuple[int, int, int]]]:
    """What each model and its layers say when vLLM tells them of two more ranks; then of those that there are again.

    That is what elastic expert parallelism does; layers make their maps of experts anew by it.
    """
    found = []
    for state in worker.model_runner.eplb_state.model_states.values():
        model = state.model
        there = model.num_physical_experts, model.num_local_physical_experts
        with contextlib.ExitStack() as stack:
            maps = [stack.enter_context(mock.patch.object(one, "update_expert_map")) for one in model.moe_layers]
            model.update_physical_experts_metadata(2 * there[0], there[1])
        parts = (model, *model.moe_mlps)
        names = ("num_physical_experts", "num_local_physical_experts", "num_redundant_experts")
        found.append([tuple(getattr(part, name) for name in names) for part in parts])
        assert all(one.call_count == 1 for one in maps)
        model.update_physical_experts_metadata(*there)
    return found


def balanced(model: Any, prompt: list[int], **options: Any) -> dict[str, Any]:
    """Answers of an engine before and after its experts were rearranged, and what each rank's slots held."""
    from vllm.config import parallel

    with mock.patch.object(parallel, "current_platform", _WithBalancing(parallel.current_platform)):
        llm = make_llm(model, enable_prefix_caching=False, **{**BALANCED, **options})
    llm.collective_rpc(_balance)
    logprobs = "speculative_config" not in options
    found = {"before": ask(llm, [prompt], logprobs=logprobs)[0], "counts": llm.collective_rpc(_counts)}
    experts = [llm.collective_rpc(_experts)]
    llm.collective_rpc(_rearrange)
    experts.append(llm.collective_rpc(_experts))
    found["sizes"] = llm.collective_rpc(_resized)
    return {**found, "after": ask(llm, [prompt], logprobs=logprobs)[0], "experts": experts}
