"""A decoder layer with experts as two operations of a compiled graph, where its weights are ones of avx2.py.

With one token, the dozen operations of a layer wait for Python about as long as for a small matrix. What they compute
is the same here, by the same functions of avx2.cpp: from the norm before attention to what its heads give, and from
there to the sum of the experts. Layers whose sums go over ranks, or that adapters change, stay as they are.

Dimension letters: T tokens, H hidden size, Q heads of queries, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from vllm_bailing.plugin.kernels.avx2 import Weights
from vllm_bailing.plugin.kernels.cpu_router import routing_function, rule_of
from vllm_bailing.plugin.shims import experts_of, returns_routed_experts


class LayerWeights(NamedTuple):
    """What the operations multiply with; the last two are None without shared experts."""

    qkv: Weights
    dense: Weights
    w13: Weights
    w2: Weights
    shared13: Weights | None
    shared2: Weights | None


def may_be_two_operations(layer: Any, vllm_config: Any) -> bool:
    """Whether a BailingMoeV2DecoderLayer with experts may be, if its weights turn out to be `weights_of_layer`."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    return (
        layer.attention.attends_in_one
        and routing_function(vllm_config, model.hf_config, layer.mlp.gate.expert_bias) is not None
        and parallel.tensor_parallel_size == parallel.data_parallel_size == 1
        and not (parallel.enable_expert_parallel or parallel.enable_eplb)
        and vllm_config.lora_config is None
        and not returns_routed_experts(vllm_config)
    )


def weights_of_layer(layer: Any) -> LayerWeights | None:
    """The weights of a layer, after they were loaded; None if one of them is of another kind."""
    attention, mlp = layer.attention, layer.mlp
    routed = experts_of(mlp.experts.routed_experts)
    if mlp.gate.weight.dtype != torch.bfloat16 or not hasattr(routed, "weights_of_avx2"):
        return None
    qkv, dense, shared13, shared2 = _weights_of(attention.query_key_value), _weights_of(attention.dense), None, None
    if qkv is None or dense is None:
        return None
    if mlp.shared_experts is not None:
        shared13, shared2 = _weights_of(mlp.shared_experts.gate_up_proj), _weights_of(mlp.shared_experts.down_proj)
        # A checkpoint may quantize the two in different ways.
        if shared13 is None or shared2 is None or shared13.kind() != shared2.kind():
            return None
    w13, w2 = routed.weights_of_avx2(mlp.experts.routed_experts)
    return LayerWeights(qkv, dense, w13, w2, shared13, shared2)


def _weights_of(linear: nn.Module) -> Weights | None:
    of: Any = getattr(linear, "weights_of_avx2", None)
    return of() if of is not None and linear.bias is None else None


def _tensors(weights: Weights | None) -> list[torch.Tensor]:
    return [] if weights is None else [one for one in weights[:3] if one is not None]


def in_two_operations(
    layer: Any, weights: LayerWeights, positions: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output [T, H] and the residual stream [T, H], as of `BailingMoeV2DecoderLayer.forward`."""
    attention, moe, ops = layer.attention, layer.mlp, torch.ops.vllm_bailing
    heads, residual = ops.avx2_attention_half(
        x,
        residual,
        layer.input_layernorm.weight,
        layer.input_layernorm.variance_epsilon,
        _tensors(weights.qkv),
        weights.qkv.rows,
        *attention.arguments(positions),
    )
    rows = [1 if one is None else one.rows for one in weights[1:]]  # of all but the first
    return ops.avx2_moe_half(
        heads,
        residual,
        _tensors(weights.dense),
        layer.post_attention_layernorm.weight,
        layer.post_attention_layernorm.variance_epsilon,
        moe.gate.weight,
        moe.gate.expert_bias,
        *rule_of(layer.config),
        _tensors(weights.w13),
        _tensors(weights.w2),
        _tensors(weights.shared13),
        _tensors(weights.shared2),
        rows,
    )
