"""Kernels of vLLM's CPU build for quantized experts and linear layers, for AVX-512 with bf16 and VNNI.

vLLM takes them where a processor has AMX, which they use where it is there and do without elsewhere (AMD from Zen 4
on, Intel's Cooper Lake). int8 and int4 experts round what goes into them to 8 bits for each token; fp8 weights are
multiplied with bf16.

Dimension letters: E experts, H hidden size, I width of an expert on this rank, N outputs and K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm import _custom_ops
from vllm.model_executor.utils import replace_parameter

from vllm_bailing.plugin.kernels.proof import BLOCK, RunExperts, RunLinear

# Of the norm of the result. With activations in 8 bits the kernels are 0.022 off, with those in bf16 0.004.
TOLERANCE = {"int8": 0.04, "int4": 0.04, "fp8": 0.01}
TAKES_ANY_DTYPE = False
ops: Any = _custom_ops  # of older vLLM some names are missing
_OPERATIONS = (
    "convert_weight_packed",
    "convert_weight_packed_scale_zp",
    "fused_experts_cpu",
    "fp8_scaled_mm_cpu",
)


def name(_scheme: str) -> str:
    """Whose the kernel for a scheme is, for the log."""
    return "vLLM for AVX-512"


def obstacle() -> str:
    """Why this vLLM cannot run them; empty if it can."""
    return "" if all(hasattr(torch.ops._C, name) for name in _OPERATIONS) else "this vLLM has none"


def prepare() -> None:
    """Before a proof: nothing."""


def experts(parents: dict[str, Any]) -> dict[str, Any]:
    """vLLM's classes by scheme, as they are."""
    return parents


def linears(parents: dict[str, Any]) -> dict[str, Any]:
    """vLLM's classes of linear layers, by scheme, with the kernels that they take where there is AMX.

    Of integers those have a `problem` set before weights are processed: why they take vLLM's other kernels.
    """

    class Int8(parents["int8"]):
        problem = ""

        def process_weights_after_loading(self, layer: Any) -> None:
            if self.problem:
                self.linear_method = self._apply_weights_onednn
                self.process_weights_for_onednn(layer)
            else:
                self.linear_method = self._apply_weights_sgl
                self.process_weights_for_sgl(layer)

    class Int4(parents["int4"]):
        problem = ""

        def _process_gptq_weights_w4a16(self, layer: Any) -> None:  # vLLM calls this one without AMX
            self._pack(layer)

        def _process_gptq_weights_w4a8(self, layer: Any) -> None:  # and this one with it
            self._pack(layer)

        def _pack(self, layer: Any) -> None:
            layer.use_w4a8 = not self.problem
            if self.problem:
                super()._process_gptq_weights_w4a16(layer)
                return
            super()._process_gptq_weights_w4a8(layer)
            for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
                if name is not None:  # vLLM's class of parameters takes each operation through Python
                    replace_parameter(layer, name, getattr(layer, name).data)

    return {"int8": Int8, "fp8": parents["fp8"], "int4": Int4}


def preparations(_scheme: str) -> dict[str, Any]:
    """Functions of vLLM's `cpu_moe` that pack weights: its own."""
    return {}


def _fused(scheme: Any, packed: list[Any], scales: list[Any], zeros: list[Any], block: list[int] | None) -> RunExperts:
    def run(output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        ops.fused_experts_cpu(output, x, *packed, weights, ids, scheme, *scales, *zeros, block)

    return run


def int8_experts(levels: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> RunExperts:
    """Experts of int8 weights [E, 2I, H] and [E, H, I] with a scale per output."""
    packed = [torch.ops._C.convert_weight_packed(level) for level in levels]
    return _fused(ops.CPUQuantMethod.INT8_W8A8, packed, list(scales), [None, None], None)


def fp8_experts(levels: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> RunExperts:
    """Experts of fp8 weights [E, 2I, H] and [E, H, I] with a scale per block."""
    packed = [torch.ops._C.convert_weight_packed(level) for level in levels]
    return _fused(ops.CPUQuantMethod.FP8_W8A16, packed, list(scales), [None, None], [BLOCK, BLOCK])


def int4_experts(
    words: Sequence[torch.Tensor], zeros: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], algorithm: str
) -> RunExperts:
    """Experts of int4 weights in words, as GPTQ or AWQ pack them (`proof.in_groups`)."""
    converted = [
        ops.convert_weight_packed_scale_zp(word, zero, scale, ops.CPUQuantAlgo[algorithm])
        for word, zero, scale in zip(words, zeros, scales, strict=True)
    ]
    packed, packed_zeros, packed_scales = (list(part) for part in zip(*converted, strict=True))
    return _fused(ops.CPUQuantMethod.INT4_W4A8, packed, packed_scales, packed_zeros, None)


def fp8_linear(level: torch.Tensor, scale: torch.Tensor, rows: int) -> RunLinear:
    """A linear layer of fp8 weights [N, K] with a scale per block of `rows`."""
    packed = torch.ops._C.convert_weight_packed(level)

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.ops._C.fp8_scaled_mm_cpu(x, packed, scale, [rows, BLOCK], None, torch.bfloat16, True)

    return run


def int8_linear(level: torch.Tensor, scale: torch.Tensor) -> RunLinear:
    """A linear layer of int8 weights [N, K] with a scale per output."""
    packed = torch.ops._C.convert_weight_packed(level)
    return lambda x: torch.ops._C.int8_scaled_mm_with_quant(x, packed, scale, None, torch.bfloat16, True)


def int4_linear(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> RunLinear:
    """A linear layer of int4 weights as GPTQ packs them (`proof.in_groups`, without E)."""
    packed, packed_zeros, packed_scales = ops.convert_weight_packed_scale_zp(
        words, zeros, scales, ops.CPUQuantAlgo.GPTQ
    )
    return lambda x: ops.int4_scaled_mm_cpu(x, packed, packed_zeros, packed_scales, None)
