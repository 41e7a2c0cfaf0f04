"""Whether a model fits the memory of one CPU machine, in which bits, and how fast it decodes at most.

A step reads every active weight once; on a CPU it waits for memory at small batches, which is what the bound counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.memory import Layout, stored_beside_experts, stored_dtype
from vllm_bailing.planning.roofline import step_bytes
from vllm_bailing.units import GIB

# What a plain checkpoint can be served in: all linear layers in the same bits, as `vllm-bailing quantize` makes them.
DTYPES = ("bf16", "fp8", "int8", "int4")
HEADS = {"int8": "int8", "int4": "int8"}  # of a head that is quantized with the rest
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
        dtype: Of linear layers and experts; embedding and router are bf16.
        head_dtype: Of the head; None if it is bf16.
        weights_bytes: Bytes of all weights.
        kv_tokens: Tokens of KV cache, in bf16, that the rest of the memory holds; 0 if the weights do not fit.
        has_kernel: Whether this processor has kernels for it.
        tokens_per_s: Highest speed of one request with `context` tokens, if memory is all that a step waits for.
        step_bytes: Bytes that such a step reads.
        kv_bytes_per_token: Bytes that a token takes in the KV cache.
    """

    dtype: str
    head_dtype: str | None
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
    """The model in each way that it can be served: what is best first, as long as it fits.

    A checkpoint that is quantized can be served as it is, or dequantized. A plain one comes in each of `DTYPES`.
    """
    if getattr(config, "quantization_config", None):
        layouts = [Layout(config, stored_dtype(config), **stored_beside_experts(config)), Layout(config, "bf16")]
    else:
        layouts = [Layout(config, one, linear_dtype=one, head_dtype=HEADS.get(one)) for one in DTYPES]
    return [_planned(layout, machine, context) for layout in layouts]


def _planned(layout: Layout, machine: CpuMachine, context: int) -> CpuPlan:
    (stage,) = layout.stages((layout.config.num_hidden_layers,))
    weights = layout.weights(stage).total
    per_token = layout.kv_bytes_per_token(stage)
    room = max(0, machine.memory_bytes - _ENGINE - weights)
    read = step_bytes(layout, context, 1)
    return CpuPlan(
        layout.dtype,
        layout.head_dtype,
        round(weights),
        int(room // per_token),
        layout.dtype in machine.kernels,
        machine.bandwidth / read,
        read,
        round(per_token),
    )
