"""The tuner's timing code, as far as a CPU goes."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch

from tests.support.tuning import DEFAULT, TEN, TINY, config
from vllm_bailing.errors import TuneError
from vllm_bailing.tuning import gpu_timer, search
from vllm_bailing.tuning.search import CandidateFailed
from vllm_bailing.tuning.space import FIELDS, Experts


def test_weights_that_do_not_fit_are_an_error(timer, monkeypatch):
    timer.experts = Experts(256, 64, 2048, 8, 8, 4, "bf16")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (200 * 2**20, 0))
    with pytest.raises(TuneError, match=r"one layer take 0\.2 GiB"):
        timer._affordable_copies()


def test_vllm_has_all_that_is_called_by_these_names():
    from vllm.model_executor.layers import fused_moe as package
    from vllm.model_executor.layers.fused_moe import config as configs
    from vllm.model_executor.layers.fused_moe import fused_moe

    wanted = {
        fused_moe.fused_experts: "hidden_states w1 w2 topk_weights topk_ids",
        fused_moe.get_config_file_name: "E N dtype block_shape",
        fused_moe.try_get_optimal_moe_config: "w1_shape w2_shape top_k dtype M block_shape",
        fused_moe.get_moe_configs: "E N dtype block_n block_k",
        package.override_config: "config",
    }
    for function, names in wanted.items():
        parameters = list(inspect.signature(function).parameters)
        assert parameters[: len(names.split())] == names.split(), function.__name__
    assert not inspect.signature(package.get_config).parameters
    assert {"quant_config", "global_num_experts", "expert_map"} <= set(
        inspect.signature(fused_moe.fused_experts).parameters
    )
    for name in ("w1_scale", "w2_scale", "block_shape"):
        assert name in inspect.signature(configs.fp8_w8a8_moe_quant_config).parameters
    # The override comes before any table, and everything else of a configuration goes to the kernel as it is.
    source = inspect.getsource(fused_moe.try_get_optimal_moe_config)
    assert source.index("get_config()") < source.index("get_moe_configs(")
    kernel = inspect.signature(getattr(fused_moe.fused_moe_kernel, "fn", fused_moe.fused_moe_kernel)).parameters
    assert set(FIELDS[:4]) <= set(kernel)


@pytest.mark.parametrize("n_group", [1, 4])
def test_random_routing_is_group_limited(n_group):
    experts = Experts(16, 128, 256, 3, n_group, min(n_group, 2), "bf16")
    ids, weights = gpu_timer.random_routing(experts, (5, 40), torch.Generator().manual_seed(0))
    assert (ids.shape, ids.dtype, weights.dtype) == ((5, 40, 3), torch.int32, torch.float32)
    assert all(len(set(one)) == 3 for one in ids.flatten(0, 1).tolist())
    assert ids.unique().tolist() == list(range(16))
    if n_group > 1:
        assert max(len(set(one)) for one in (ids // 4).flatten(0, 1).tolist()) == 2
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 40))


class Graph:
    """Stands in for a CUDA graph: runs again what the timer captured."""

    replays = 0

    def replay(self):
        Graph.replays += 1


@pytest.fixture
def timer(monkeypatch):
    """A `GpuTimer` on the CPU. vLLM's experts are replaced by plain ones that notice what they are given."""
    from vllm.model_executor.layers.fused_moe import fused_moe, get_config

    seen = []

    def fused_experts(
        hidden_states, w1, w2, topk_weights, topk_ids, quant_config, global_num_experts=-1, expert_map=None
    ):
        seen.append(SimpleNamespace(config=get_config(), w1=w1, ids=topk_ids, quant_config=quant_config))
        if expert_map is not None:  # what other ranks have adds nothing here
            assert global_num_experts == len(expert_map)
            local_ids = expert_map[topk_ids]
            topk_ids, topk_weights = local_ids.clamp(min=0), topk_weights * (local_ids >= 0)
        if get_config()["BLOCK_SIZE_N"] == 256:
            raise RuntimeError("out of resource: shared memory,\n Required: 270336")
        scales = [
            scale.repeat_interleave(128, 1).repeat_interleave(128, 2) for scale in quant_config_scales(quant_config)
        ]
        w1, w2 = (w.float() * scale for w, scale in zip((w1, w2), scales, strict=True))
        gate, up = torch.einsum("mh,mkfh->mkf", hidden_states.float(), w1[topk_ids]).chunk(2, -1)
        each = torch.einsum("mkf,mkhf->mkh", torch.nn.functional.silu(gate) * up, w2[topk_ids])
        wrong = 1.2 if get_config()["BLOCK_SIZE_N"] == 128 else 1.0
        return wrong * (each * topk_weights[..., None]).sum(1).bfloat16()

    def quant_config_scales(quant_config):
        return quant_config.w1_scale, quant_config.w2_scale

    @contextlib.contextmanager
    def graph(_graph):
        yield

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Graph.replays

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 4.0 * (end.at - self.at)

    for name, value in {"CUDAGraph": Graph, "graph": graph, "Event": Event, "synchronize": lambda *_: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_timer.GpuTimer, "_cache_bytes", lambda _: 64)
    monkeypatch.setattr(fused_moe, "fused_experts", fused_experts)
    made = gpu_timer.GpuTimer(TINY, "cpu", copies=2)
    made.seen = seen
    return made


def test_a_timing_is_of_one_replay_divided_by_its_calls(timer):
    timer.start(24, DEFAULT)
    measure = timer.arm(TEN)
    assert measure() == 4.0 / search.CALLS


def test_calls_run_under_the_candidate_and_rotate_weights_and_routing(timer):
    timer.start(24, DEFAULT)
    timer.seen.clear()
    timer.arm(TEN)
    assert len(timer.seen) == 2 * search.CALLS  # once to compile, once to capture
    assert all(call.config == TEN for call in timer.seen)
    assert len({call.w1.data_ptr() for call in timer.seen}) == 2
    assert timer.seen[0].w1.data_ptr() != timer.seen[1].w1.data_ptr()
    assert not torch.equal(timer.seen[0].ids, timer.seen[1].ids)


def test_a_rank_of_several_computes_its_own_experts_alone(timer):
    of_four = dataclasses.replace(TINY, num_experts=TINY.num_experts // 4, ep_size=4)
    few = gpu_timer.GpuTimer(of_four, "cpu", copies=1)
    few.start(24, DEFAULT)
    assert few._ids.max() >= 3 * of_four.num_experts, "tokens go to the experts of all ranks"
    is_here = few._ids[0] < of_four.num_experts
    assert 0.1 < is_here.float().mean() < 0.4
    (w1, w2), weights = few._weights[0], few._topk_weights[0] * is_here
    scales = few._quant_config.w1_scale, few._quant_config.w2_scale
    w1, w2 = (
        weight.float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        for weight, scale in zip((w1, w2), scales, strict=True)
    )
    wanted = torch.zeros(24, TINY.hidden_size)
    for token in range(24):
        for slot, expert in enumerate(few._ids[0, token].tolist()):
            if expert < of_four.num_experts:
                gate, up = (w1[expert] @ few._hidden_states[token].float()).chunk(2)
                wanted[token] += weights[token, slot] * (w2[expert] @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(few._right, wanted, atol=0.02, rtol=0.02)


def test_routing_changes_in_place_and_is_the_same_for_the_same_draw(timer):
    timer.start(24, DEFAULT)
    where, first = timer._ids.data_ptr(), timer._ids.clone()
    timer.route(1)
    assert timer._ids.data_ptr() == where and not torch.equal(timer._ids, first)
    timer.route(0)
    assert torch.equal(timer._ids, first)


def test_results_are_of_the_size_that_a_models_are(timer):
    """Weights with scales give numbers that neither overflow nor vanish."""
    timer.start(24, DEFAULT)
    assert 0.05 < timer._right.std() < 5


def test_a_candidate_that_computes_something_else_is_refused(timer):
    timer.start(24, DEFAULT)
    with pytest.raises(CandidateFailed, match=r"off by 0\.2"):
        timer.arm(config(16, 128, 64, 1, 4, 3))


def test_a_candidate_that_fails_leaves_no_override_behind(timer):
    """vLLM's context manager would: later look-ups would find the failed configuration."""
    from vllm.model_executor.layers.fused_moe import get_config

    timer.start(24, DEFAULT)
    with pytest.raises(
        CandidateFailed, match="RuntimeError: out of resource: shared memory, Required: 270336"
    ) as error:
        timer.arm(config(16, 256, 64, 1, 4, 3))
    assert not error.value.is_fatal and get_config() is None


def test_a_gpu_that_can_do_nothing_more_is_noticed(timer, monkeypatch):
    timer.start(24, DEFAULT)

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(CandidateFailed) as error:
        timer.arm(TEN)
    assert error.value.is_fatal


def test_a_default_that_does_not_run_is_an_error(timer):
    with pytest.raises(TuneError, match=r"vLLM's own configuration .* for 24 tokens does not run: RuntimeError"):
        timer.start(24, config(16, 256, 64, 1, 4, 3))


@pytest.mark.parametrize(
    ("cache", "free", "copies"),
    [(40, 4000, 2), (50, 4000, 3), (126, 4000, 6), (500, 4000, 8), (500, 520, 2), (500, 260, 1)],
)
def test_copies_of_the_weights_are_several_times_the_cache_and_fit(timer, monkeypatch, cache, free, copies):
    experts = Experts(256, 64, 2048, 8, 8, 4, "bf16")
    assert experts.weight_bytes == 192 * 2**20
    timer.experts = experts
    monkeypatch.setattr(gpu_timer.GpuTimer, "_cache_bytes", lambda _: cache * 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * 2**20, 0))
    assert timer._affordable_copies() == copies
