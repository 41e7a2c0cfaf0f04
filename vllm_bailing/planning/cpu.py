"""Whether a model fits the memory of one CPU machine, in which bits, and how fast it decodes at most.

A step reads every active weight once; on a CPU it waits for memory at small batches, which is what the bound counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.memory import Layout
from vllm_bailing.planning.roofline import step_bytes
from vllm_bailing.units import GIB

DTYPES = ("bf16", "fp8", "int8", "int4")
_ENGINE = 2 * GIB  # of Python, vLLM and PyTorch, and what a step computes with; an estimate


@dataclass(frozen=True)
class CpuMachine:
    """A machine without a GPU.

    Attributes:
        memory_bytes: Memory that is free for an engine.
        bandwidth: Bytes that it reads from memory in a second.
        kernels: Data types that vLLM's CPU build has kernels for on its processor, of `DTYPES`.
    """

    memory_bytes: int
    bandwidth: float
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class CpuPlan:
    """A model in one data type on one machine.

    Attributes:
        dtype: Of linear layers and experts; embedding, head and router are bf16.
        weights_bytes: Bytes of all weights.
        kv_tokens: Tokens of KV cache, in bf16, that the rest of the memory holds; 0 if the weights do not fit.
        has_kernel: Whether this processor has kernels for it.
        tokens_per_s: Highest speed of one request with `context` tokens, if memory is all that a step waits for.
        step_bytes: Bytes that such a step reads.
        kv_bytes_per_token: Bytes that a token takes in the KV cache.
    """

    dtype: str
    weights_bytes: int
    kv_tokens: int
    has_kernel: bool
    tokens_per_s: float
    step_bytes: float
    kv_bytes_per_token: int

    def verdict(self, context: int) -> str:
        """Whether it can be served with a window of `context` tokens, as one word."""
        if self.kv_tokens < context:
            return "no"
        return "fits" if self.has_kernel else "no kernel"


def cpu_plans(config: BailingMoeV2Config, machine: CpuMachine, context: int) -> list[CpuPlan]:
    """The model in each of `DTYPES`, the largest first."""
    plans = []
    for dtype in DTYPES:
        layout = Layout(config, dtype)
        (stage,) = layout.stages((config.num_hidden_layers,))
        weights = layout.weights(stage).total
        per_token = layout.kv_bytes_per_token(stage)
        room = max(0, machine.memory_bytes - _ENGINE - weights)
        read = step_bytes(config, dtype, 1, context, 1)
        plans.append(
            CpuPlan(
                dtype,
                round(weights),
                int(room // per_token),
                dtype in machine.kernels,
                machine.bandwidth / read,
                read,
                round(per_token),
            )
        )
    return plans
