"""Quantized experts and linear layers in the kernels of avx2.py, as subclasses of vLLM's classes for its own kernels.

What is stored in int8 and fp8 stays as it was loaded; int4 weights are packed anew, for AVX-512 VNNI where there is
that. Scales of activations that a checkpoint brings are not needed: activations keep more digits than they would leave.

Dimension letters: E experts, H hidden size, I width of an expert on this rank, N outputs and K inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise

from vllm_bailing.errors import CheckpointError
from vllm_bailing.plugin.kernels import avx2
from vllm_bailing.plugin.kernels.avx2 import Weights, packed_int4
from vllm_bailing.plugin.kernels.proof import BLOCK, ORDERS, RunExperts, RunLinear
from vllm_bailing.processor import instructions

TOLERANCE = {"int8": 0.01, "int4": 0.03, "fp8": 0.01}  # of the norm of the result, which is rounded to bf16
TAKES_ANY_DTYPE = True


def name(scheme: str) -> str:
    """Whose the kernel for a scheme is, for the log."""
    return "this package for " + ("AVX-512" if scheme == "int4" and _has_vnni() else "AVX2")


def _has_vnni() -> bool:
    return "AVX-512 VNNI" in instructions()


def prepare() -> None:
    """Before a proof: have the kernels compiled and loaded.

    Raises:
        RuntimeError: If they cannot be.
    """
    avx2.load()


# ---- weights -------------------------------------------------------------------------------------------------------


def _levels(words: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Integers of four bits [..., 8 n] uint8 in words [..., n] int32."""
    levels = torch.empty(*words.shape, 8, dtype=torch.uint8)
    for place, index in enumerate(order):
        levels[..., index] = (words >> 4 * place) & 15
    return levels.flatten(-2)


def _packed(
    words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, algorithm: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`packed_int4` of all experts, whose weights are in words as GPTQ or AWQ pack them (`proof.in_groups`)."""
    order, parts = ORDERS[algorithm], []
    for word, zero, scale in zip(words, zeros, scales, strict=True):
        is_gptq = algorithm == "GPTQ"
        levels = _levels(word.t(), order) if is_gptq else _levels(word, order).t()
        points = _levels(zero, order).t() + (1 if is_gptq else 0)
        parts.append(packed_int4(levels.contiguous(), scale.t(), points, _has_vnni()))
    data, scale, point = zip(*parts, strict=True)
    return torch.stack(data), torch.stack(scale), torch.stack(point)


def _checked_fp8(weight: torch.Tensor) -> torch.Tensor:
    if any(bool((one.view(torch.uint8) & 127 == 127).any()) for one in weight):
        raise CheckpointError("fp8 weights are NaN in the checkpoint; get it again, or have its maker export it anew")
    return weight


def _prepare_fp8(w13: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _checked_fp8(w13).contiguous(), _checked_fp8(w2).contiguous()


def _prepare_int4(
    w13_packed: torch.Tensor,
    w2_packed: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    quant_algo: Any,
    w13_zeros: torch.Tensor | None = None,
    w2_zeros: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """As vLLM's `prepare_int4_moe_layer_for_cpu`: weights, scales and zero points of both matrices."""
    parts = []
    for words, scale, zeros in ((w13_packed, w13_scale, w13_zeros), (w2_packed, w2_scale, w2_zeros)):
        if zeros is None:  # symmetric: 8, stored less one
            experts, groups, outputs = scale.shape
            zeros = torch.full((experts, groups, outputs // 8), 0x77777777, dtype=torch.int32)
        parts.append(_packed(words, zeros, scale, quant_algo.name))
    (w13, s13, z13), (w2, s2, z2) = parts
    return w13, w2, s13, s2, z13, z2


def preparations(scheme: str) -> dict[str, Any]:
    """What stands for functions of vLLM's `cpu_moe` that pack weights."""
    packs = {"fp8": _prepare_fp8, "int4": _prepare_int4}
    return {f"prepare_{scheme}_moe_layer_for_cpu": packs[scheme]} if scheme in packs else {}


# ---- experts -------------------------------------------------------------------------------------------------------


def _int8_weights(data: torch.Tensor, scales: torch.Tensor) -> Weights:
    return Weights(data, scales.float().reshape(data.shape[:2]).contiguous())


def _fp8_weights(data: torch.Tensor, scales: torch.Tensor) -> Weights:
    return Weights(data, scales.float().contiguous(), rows=BLOCK)


def experts(parents: dict[str, Any]) -> dict[str, Any]:
    """Subclasses of vLLM's classes of experts, by scheme."""

    class Int8(parents["int8"]):
        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            pass

        def _stacks(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[Weights, Weights]:
            return _int8_weights(w1, self.w1_scale), _int8_weights(w2, self.w2_scale)

    class Fp8(parents["fp8"]):
        def _stacks(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[Weights, Weights]:
            return _fp8_weights(w1, self.w1_scale), _fp8_weights(w2, self.w2_scale)

    class Int4(parents["int4"]):
        def _stacks(self, w1: torch.Tensor, w2: torch.Tensor) -> tuple[Weights, Weights]:
            return Weights(w1, self.w1_scale, self.w1_zp), Weights(w2, self.w2_scale, self.w2_zp)

    def apply(
        self: Any,
        *,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        **_: Any,
    ) -> None:
        w13, down = self._stacks(w1, w2)
        avx2.experts(output, hidden_states, w13, down, topk_weights, topk_ids)

    def weights_of_avx2(self: Any, layer: Any) -> tuple[Weights, Weights]:
        """Those of vLLM's `RoutedExperts`, after they were loaded."""
        return self._stacks(layer.w13_weight, layer.w2_weight)

    for one in (Int8, Fp8, Int4):
        one.apply, one.weights_of_avx2 = apply, weights_of_avx2
    return {"int8": Int8, "fp8": Fp8, "int4": Int4}


def int8_experts(levels: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> RunExperts:
    """Experts of int8 weights [E, 2I, H] and [E, H, I] with a scale per output."""
    return _running(*(_int8_weights(*one) for one in zip(levels, scales, strict=True)))


def fp8_experts(levels: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> RunExperts:
    """Experts of fp8 weights [E, 2I, H] and [E, H, I] with a scale per block."""
    return _running(*(_fp8_weights(*one) for one in zip(levels, scales, strict=True)))


def int4_experts(
    words: Sequence[torch.Tensor], zeros: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], algorithm: str
) -> RunExperts:
    """Experts of int4 weights in words, as GPTQ or AWQ pack them."""
    packed = [_packed(*one, algorithm) for one in zip(words, zeros, scales, strict=True)]
    return _running(*(Weights(data, scale, zero) for data, scale, zero in packed))


def _running(w13: Weights, w2: Weights) -> RunExperts:
    def run(output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        avx2.experts(output, x, w13, w2, weights, ids)

    return run


# ---- linear layers -------------------------------------------------------------------------------------------------


def _keep(layer: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(value, requires_grad=False)
    if getattr(layer, name, None) is None:
        layer.register_parameter(name, parameter)
    else:
        replace_parameter(layer, name, parameter)


def linears(parents: dict[str, Any]) -> dict[str, Any]:
    """Subclasses of vLLM's classes of linear layers, by scheme."""

    class Int8(parents["int8"]):
        def process_weights_after_loading(self, layer: Any) -> None:
            name, scale_name, *_ = self.layer_param_names
            scale: Any = getattr(layer, scale_name).data
            if not self.config.is_channelwise:
                scale = convert_to_channelwise(scale, layer.logical_widths)
            _keep(layer, name, getattr(layer, name).data.unsqueeze(0).contiguous())
            _keep(layer, scale_name, scale.float().reshape(1, -1).contiguous())

            layer.weights_of_avx2 = partial(self._weights, layer)

        def _weights(self, layer: Any) -> Weights:
            weight, scale, *_ = self._get_layer_params(layer)
            return Weights(weight, scale)

        def apply_weights(
            self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any
        ) -> torch.Tensor:
            return avx2.linear(x, self._weights(layer), bias)

    class Fp8(parents["fp8"]):
        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            columns = config.weight_quant_key.scale.group_shape.col
            problem = "" if columns == BLOCK else f"it takes blocks of {BLOCK} inputs, not of {columns}"
            return not problem, problem or None

        def process_weights_after_loading(self, layer: Any) -> None:
            params = self._get_layer_params(layer)
            stored = params.WEIGHT_SCALE if params.weight_scale_inv is None else params.WEIGHT_SCALE_INV
            _keep(layer, params.WEIGHT, _checked_fp8(params.weight.data.unsqueeze(0)).contiguous())
            _keep(layer, stored, getattr(layer, stored).data.float().unsqueeze(0).contiguous())

            layer.weights_of_avx2 = partial(self._weights, layer)

        def _weights(self, layer: Any) -> Weights:
            params = self._get_layer_params(layer)
            scale = params.weight_scale if params.weight_scale_inv is None else params.weight_scale_inv
            return Weights(params.weight, scale, rows=self.weight_group_shape[0])

        def apply_weights(
            self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **_: Any
        ) -> torch.Tensor:
            return avx2.linear(x, self._weights(layer), bias)

    class Int4(parents["int4"]):
        problem = ""  # set before weights are processed: why they take vLLM's kernel, where it has one

        def process_weights_after_loading(self, layer: Any) -> None:
            if self.problem:
                super().process_weights_after_loading(layer)
                return
            # Parameters lie as vLLM's class finds them: words [K / 8, N] or [N, K / 8], scales [G, N] or [N, G].
            words, scale, points = self._get_weight_params(layer)
            kind = self.config.weight_type
            levels = unpack_quantized_values_into_int32(words.data, kind, words.packed_dim)
            levels = levels if words.input_dim == 1 else levels.t()  # type: ignore[attr-defined]
            scales = scale.data if scale.output_dim == 0 else scale.data.t()  # type: ignore[attr-defined]
            zeros = torch.full(scales.shape, kind.bias if kind.has_bias() else 0, dtype=torch.uint8)
            if self.config.zero_points:
                zeros = unpack_quantized_values_into_int32(points.data, kind, points.output_dim)  # type: ignore[union-attr]
                zeros = zeros if points.output_dim == 0 else zeros.t()  # type: ignore[union-attr]
            packed = packed_int4(levels.to(torch.uint8).contiguous(), scales, zeros, _has_vnni())
            for name, value in zip((self.w_q_name, self.w_s_name, self.w_zp_name), packed, strict=True):
                _keep(layer, name or "weight_zero_point", value.unsqueeze(0))
            layer.weights_of_avx2 = partial(self._weights, layer)

        def _weights(self, layer: Any) -> Weights:
            words, scale, _ = self._get_weight_params(layer)
            return Weights(words, scale, getattr(layer, self.w_zp_name or "weight_zero_point"))

        def apply_weights(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            if self.problem:
                return super().apply_weights(layer, x, bias)
            return avx2.linear(x, self._weights(layer), bias)

    if "AVX-512" not in instructions():
        return {"int8": Int8, "fp8": Fp8, "int4": Int4}
    # vLLM has kernels for integers then.
    return {"fp8": Fp8, "int4": Int4} if _has_vnni() else {"fp8": Fp8}


def fp8_linear(level: torch.Tensor, scale: torch.Tensor, rows: int) -> RunLinear:
    """A linear layer of fp8 weights [N, K] with a scale per block of `rows`."""
    weights = Weights(level.unsqueeze(0), scale.unsqueeze(0), rows=rows)
    return lambda x: avx2.linear(x, weights)


def int8_linear(level: torch.Tensor, scale: torch.Tensor) -> RunLinear:
    """A linear layer of int8 weights [N, K] with a scale per output."""
    weights = _int8_weights(level.unsqueeze(0), scale)
    return lambda x: avx2.linear(x, weights)


def int4_linear(words: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> RunLinear:
    """A linear layer of int4 weights as GPTQ packs them (`proof.in_groups`, without E)."""
    weights = Weights(*_packed(words.unsqueeze(0), zeros.unsqueeze(0), scales.unsqueeze(0), "GPTQ"))
    return lambda x: avx2.linear(x, weights)
