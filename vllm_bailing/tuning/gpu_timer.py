"""Timings of vLLM's fused experts on the GPU of this machine.

Each timing is a CUDA graph of several calls that rotate among copies of the weights, since in a model the weights of
every layer come from memory and not from the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_bailing.errors import TuneError
from vllm_bailing.tuning.search import CALLS, CandidateFailed
from vllm_bailing.tuning.space import BLOCK, Experts, TileConfig
from vllm_bailing.units import GIB

if TYPE_CHECKING:
    import torch

_WRONG = 0.05  # relative error of a result, of which rounding explains a tenth


def missing() -> str:
    """Why nothing can be timed here, with what to do; empty if it can."""
    import torch
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    advice = "run this on the machine to tune for, or add --dry-run --device-name NVIDIA_H20 to see what it would do"
    if not torch.cuda.is_available():
        return f"no GPU that torch can use, and only timings on one make a table; {advice}"
    if not current_platform.is_cuda():
        return f"this vLLM is built for {current_platform.device_name or 'no GPU'}, not for CUDA; {advice}"
    if not HAS_TRITON:
        return "vLLM finds no Triton, whose kernel this tunes; install vLLM's CUDA build"
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0":
        return "VLLM_BATCH_INVARIANT is set, and vLLM reads no tables then; unset it"
    return ""


def random_routing(
    experts: Experts, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32, weights fp32), each [*shape, top-k]: as the model routes, from random logits and without a bias.

    Ids are those of the experts of all ranks.
    """
    import torch

    from vllm_bailing.reference import grouped_topk

    logits = torch.randn(*shape, experts.global_num_experts, generator=generator, device=generator.device)
    scores = logits.sigmoid()  # [..., E]
    topk_ids = grouped_topk(scores, experts.n_group, experts.topk_group, experts.top_k)
    topk_weights = scores.gather(-1, topk_ids)
    return topk_ids.int(), topk_weights / topk_weights.sum(-1, keepdim=True)


class GpuTimer:
    """Times vLLM's fused experts with random weights, the router not included.

    A served fp8 model joins the activation with the quantization of its result, which are two kernels here; the kernel
    that takes the configuration is the same.

    Args:
        device: A torch device.
        copies: Of the weights; left out, as many as make calls read from memory and fit.
    Raises:
        TuneError: If the weights do not fit.
    """

    def __init__(self, experts: Experts, device: str = "cuda", copies: int | None = None) -> None:
        import torch

        self.experts = experts
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(0)
        copies = self._affordable_copies() if copies is None else copies
        self._weights = [(self._random(experts.w1_shape), self._random(experts.w2_shape)) for _ in range(copies)]
        self._quant_config = self._scales()
        self._of_rank = self._expert_map()
        self._flushed = torch.empty(4 * self._cache_bytes(), dtype=torch.uint8, device=self.device)
        self._hidden_states = self._ids = self._topk_weights = self._right = torch.empty(0)

    def _affordable_copies(self) -> int:
        """How many copies of the weights are several times the cache together, so that calls read from memory."""
        import torch

        room = torch.cuda.mem_get_info(self.device)[0] * 3 // 4
        size = self.experts.weight_bytes
        if room < size:
            raise TuneError(
                f"the experts of one layer take {size / GIB:.1f} GiB and the GPU has {room / GIB:.1f} to spare; "
                "end what else runs on it, or choose a larger --tensor-parallel-size"
            )
        return min(CALLS, max(2, -(-8 * self._cache_bytes() // size)), room // size)

    def _cache_bytes(self) -> int:
        import torch

        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def _random(self, shape: tuple[int, int, int]) -> torch.Tensor:
        import torch

        weight = torch.empty(shape, dtype=self._weight_dtype(), device=self.device)
        for expert in weight:  # one by one: all of them in a wider type may not fit beside the copies
            values = torch.randn(shape[1:], generator=self._generator, device=self.device)
            expert.copy_(values if self.experts.block_shape else values / shape[2] ** 0.5)
        return weight

    def _weight_dtype(self) -> torch.dtype:
        import torch
        from vllm.platforms import current_platform

        return current_platform.fp8_dtype() if self.experts.block_shape else torch.bfloat16

    def _scales(self) -> Any:
        """Block scales that give fp8 results of about 1; None for bf16."""
        import torch
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        if self.experts.block_shape is None:
            return None
        scales = [
            torch.full((count, -(-rows // BLOCK), -(-columns // BLOCK)), columns**-0.5, device=self.device)
            for count, rows, columns in (self.experts.w1_shape, self.experts.w2_shape)
        ]
        return fp8_w8a8_moe_quant_config(w1_scale=scales[0], w2_scale=scales[1], block_shape=self.experts.block_shape)

    def _expert_map(self) -> dict[str, Any]:
        """What tells vLLM's experts which ones the first of several ranks has."""
        import torch

        if self.experts.ep_size == 1:
            return {}
        expert_map = torch.full((self.experts.global_num_experts,), -1, dtype=torch.int32, device=self.device)
        expert_map[: self.experts.num_experts] = torch.arange(self.experts.num_experts, device=self.device)
        return {"global_num_experts": self.experts.global_num_experts, "expert_map": expert_map}

    def start(self, tokens: int, default: TileConfig) -> None:
        import torch

        shape = (tokens, self.experts.hidden_size)
        self._hidden_states = torch.randn(shape, generator=self._generator, device=self.device).bfloat16()
        self._ids, self._topk_weights = random_routing(self.experts, (CALLS, tokens), self._generator)
        self.route(0)
        try:
            self._right = self._run(default)
        except CandidateFailed as error:
            raise TuneError(f"vLLM's own configuration {default} for {tokens} tokens does not run: {error}") from error

    def route(self, draw: int) -> None:
        import torch

        generator = torch.Generator(self.device).manual_seed(1 + draw)
        ids, weights = random_routing(self.experts, self._ids.shape[:2], generator)
        self._ids.copy_(ids)  # in place, since the graphs read it
        self._topk_weights.copy_(weights)

    def arm(self, config: TileConfig) -> Callable[[], float]:
        import torch

        self.route(0)
        result = self._run(config)
        error = ((result - self._right).norm() / self._right.norm()).item()
        if not error < _WRONG:  # as it is for NaN
            raise CandidateFailed(f"its result is off by {error:.2g}")
        graph = torch.cuda.CUDAGraph()

        def capture() -> None:
            with torch.cuda.graph(graph):
                self._calls()

        def replay() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Empties the cache, and keeps the GPU busy until the graph is in its queue.
            self._flushed.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / CALLS

        self._guarded(capture, config)
        self._guarded(replay)
        return lambda: self._guarded(replay)

    def _run(self, config: TileConfig) -> torch.Tensor:
        """Result of the first call [M, K] in fp32; compiles the kernel where that was not done yet."""
        return self._guarded(self._calls, config).float()

    def _calls(self) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        results = []
        for call in range(CALLS):
            w1, w2 = self._weights[call % len(self._weights)]
            ids, weights = self._ids[call], self._topk_weights[call]
            result = fused_experts(
                self._hidden_states, w1, w2, weights, ids, quant_config=self._quant_config, **self._of_rank
            )
            results = results or [result]
        return results[0]

    def _guarded(self, work: Callable[[], Any], config: TileConfig | None = None) -> Any:
        """What `work` returns, done under `config`.

        Raises:
            CandidateFailed: Whatever goes wrong: compilers and drivers have errors of many classes.
        """
        from vllm.model_executor.layers.fused_moe import get_config, override_config

        failure, result = None, None
        # vLLM's context manager does not undo its override if an error passes through it.
        with override_config(config or get_config()):
            try:
                result = work()
                self._synchronize()
            except Exception as error:
                failure = error
        if failure is None:
            return result
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
        try:
            self._synchronize()
        except RuntimeError:
            raise CandidateFailed(reason, is_fatal=True) from failure
        raise CandidateFailed(reason) from failure

    def _synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self.device)
