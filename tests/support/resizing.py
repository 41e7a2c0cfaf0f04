"""vLLM's elastic expert parallelism on its CPU build, which has none: three ranks become two, and three again.

Three data-parallel ranks share the experts and copies of some. vLLM's own executor moves what the third has to the
others, and tells layers and model of the new size; then two answer without it, while it forgets its experts, as a rank
that starts has none; then all answer again. vLLM cannot make several of one: its map of experts wants one before.

What stands in, besides the parts of tests/support/balancing.py: groups of ranks are PyTorch's, formed beforehand,
where vLLM forms stateless ones of NCCL; the third rank stays in its process; nothing is captured that were to be
released. vLLM refuses drafts with it ("Elastic EP is not supported with drafter model"): a draft is resized by the
same steps all the same, after its target.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.support.balancing import _balance, _experts, _gpu_clocks, _rearrange, with_balancing
from tests.support.engine import ask, make_llm

RANKS, FEWER = 3, 2
REDUNDANT = 8  # of 16 experts, so that two ranks have each once


class _Worker(SimpleNamespace):
    """What the executor asks of a worker; it keeps a weak reference, which SimpleNamespace alone does not allow."""


def _models(worker: Any) -> list[Any]:
    """Runners as the executor wants them: of the target, and of the draft."""
    runner = worker.model_runner
    found = [(runner.model, runner.model_config)]
    if (drafter := getattr(runner, "drafter", None)) is not None:
        found.append((drafter.model, runner.vllm_config.speculative_config.draft_model_config))
    return [
        SimpleNamespace(model=model, model_config=config, eplb_state=runner.eplb_state, get_model=lambda m=model: m)
        for model, config in found
    ]


def _form_groups(worker: Any) -> None:
    """Those of all ranks, and those of the first ones."""
    from vllm.distributed import parallel_state as state

    names = {"world": "get_world_group", "dp": "get_dp_group", "ep": "get_ep_group", "eplb": "get_eplb_group"}
    of_all = {name: getattr(state, function)() for name, function in names.items()}
    parts = [list(range(FEWER)), list(range(FEWER, RANKS))]
    of_few = {
        # vLLM knows the group of experts by its name.
        name: state.init_model_parallel_group(parts, 0, "gloo", group_name=name, use_all2all=name == "ep")
        for name in names
    }
    for group in (*of_all.values(), *of_few.values()):
        group.tcp_store_group = group.cpu_group
    worker.groups = {RANKS: of_all, FEWER: of_few}


def _executors(worker: Any, ranks: int) -> list[Any]:
    from vllm.distributed.elastic_ep.elastic_execute import ElasticEPScalingExecutor
    from vllm.v1.engine import ReconfigureRankType

    parallel = worker.vllm_config.parallel_config
    keep = ReconfigureRankType.KEEP_CURRENT_RANK
    request = SimpleNamespace(
        new_data_parallel_size=ranks,
        new_data_parallel_rank=keep,
        new_data_parallel_rank_local=keep,
        new_data_parallel_master_ip=parallel.data_parallel_master_ip,
        new_data_parallel_master_port=parallel.data_parallel_master_port,
    )
    executors = []
    for runner in _models(worker):
        stand_in = _Worker(model_runner=runner, vllm_config=worker.vllm_config, device=worker.device)
        executor = ElasticEPScalingExecutor(stand_in)
        executor.kept, executor.reconfig_request = stand_in, request
        executors.append(executor)
    return executors


def _switch(worker: Any, ranks: int) -> None:
    """Tell the models of this rank that so many share their experts."""
    from vllm.distributed.elastic_ep import elastic_execute as module

    groups = worker.groups[ranks]
    for executor in _executors(worker, ranks):
        with (
            mock.patch.object(module, "pop_standby_groups", lambda: {**groups, "node_count": 1}),
            mock.patch.object(module, "get_standby_dp_group", lambda: groups["dp"]),
            mock.patch.object(module, "get_standby_ep_group", lambda: groups["ep"]),
            mock.patch.object(module, "get_ep_all2all_manager", lambda *_: mock.MagicMock()),
            mock.patch.object(executor, "_release_cuda_graphs"),
        ):
            executor.stage_standby_moe_quant_methods(getattr(groups["ep"].device_communicator, "all2all_manager", None))
            executor._prepare_eplb_communicator(groups["eplb"])
            executor.switch_and_prepare()


def _reshuffle(worker: Any, rank_mapping: dict[int, int] | None = None) -> None:
    from vllm.distributed.eplb import eplb_state as module
    from vllm.distributed.parallel_state import GroupCoordinator

    executor = _executors(worker, RANKS)[0]
    with _gpu_clocks(), mock.patch.object(module, "StatelessGroupCoordinator", GroupCoordinator):
        executor._perform_eplb_reshuffle(rank_mapping)


def _shrink(worker: Any) -> None:
    """The first ranks get all experts, and know that they are fewer."""
    _reshuffle(worker, {rank: rank if rank < FEWER else -1 for rank in range(RANKS)})
    if torch.distributed.get_rank() < FEWER:
        _switch(worker, FEWER)


def _forget(worker: Any) -> None:
    """This rank holds no experts any more."""
    for runner in _models(worker):
        for layer in runner.model.expert_weights:
            for part in layer:
                part.fill_(float("nan"))


def _grow(worker: Any) -> None:
    """The first ranks share their experts out again."""
    stayed = torch.distributed.get_rank() < FEWER
    if stayed:
        _switch(worker, RANKS)
    for runner in _models(worker):
        state = runner.eplb_state.model_states[runner.model_config.compute_hash()]
        mapping = state.physical_to_logical_map_buffer.clone()
        torch.distributed.broadcast(mapping, 0)
        if not stayed:
            runner.eplb_state.update_mapping(runner.model_config, mapping)
    _reshuffle(worker)


def _sizes(worker: Any) -> list[dict[str, Any]]:
    """What each model, and the first and the last of its layers, say of their experts."""
    names = ("num_physical_experts", "num_local_physical_experts", "num_redundant_experts")
    found = []
    for runner in _models(worker):
        parts = (runner.model, *runner.model.moe_mlps)
        found.append({name: [getattr(part, name) for part in parts] for name in names})
    return found


def resized(model: Any, prompts: list[list[int]], rank: int, **options: Any) -> list[dict[str, Any]]:
    """[what this rank answers, what its slots hold, and its sizes, for each number of ranks]."""
    with with_balancing():
        llm = make_llm(
            model,
            enable_prefix_caching=False,
            enable_expert_parallel=True,
            enable_eplb=True,
            eplb_config={"num_redundant_experts": REDUNDANT, "use_async": False, "communicator": "torch_gloo"},
            **options,
        )
    logprobs = "speculative_config" not in options
    found: dict[str, Any] = {"answers": {}, "experts": {}, "sizes": {}}

    def note(when: str) -> None:
        found["experts"][when] = llm.collective_rpc(_experts)[0]
        found["sizes"][when] = llm.collective_rpc(_sizes)[0]
        found["answers"][when] = ask(llm, prompts, logprobs=logprobs)[0]

    llm.collective_rpc(_balance)
    llm.collective_rpc(_form_groups)
    llm.collective_rpc(_rearrange)  # the first two would have every expert else
    note("all")
    llm.collective_rpc(_shrink)
    if rank < FEWER:
        with mock.patch.object(llm.llm_engine, "dp_group", None):  # it would wait for the third to have no request
            note("fewer")
    else:
        llm.collective_rpc(_forget)
    llm.collective_rpc(_grow)
    note("all again")
    return [found]
