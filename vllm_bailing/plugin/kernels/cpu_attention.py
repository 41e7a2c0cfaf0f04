"""Attention of vLLM's CPU backend, after norms and rotation, as one operation of a compiled graph.

In vLLM an attention layer is two operations in Python, which take as long as what they compute where there is one
token. Here Python runs once in each forward pass of a model: it hands the caches and vLLM's metadata of all layers to
avx2.cpp, whose operation calls vLLM's two kernels. Engines whose layers do more than that keep vLLM's way.

Dimension letters: T tokens, Q and K heads of queries and of keys, D head size, B blocks of the KV cache, S slots of a
block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from vllm import _custom_ops
from vllm.config import CompilationMode
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from vllm_bailing.plugin.kernels import avx2
from vllm_bailing.plugin.kernels.proof import difference, proof
from vllm_bailing.plugin.shims import instructions_of_attention

logger = init_logger("vllm.plugins.bailing.cpu")

_TOLERANCE = 0.01  # of the norm of the result, which is rounded to bf16
_TOKENS, _SLOTS, _EPSILON = 37, 32, 1e-6  # of a request in the proof, and of a block of its cache; of the norms


def attends_in_one(attention: Any, vllm_config: Any) -> bool:
    """Whether the operation stands for `norm_and_rotate` and `attn` of `attention`, a BailingMoeV2Attention."""
    is_stock = vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE  # compiles `running` too
    if is_stock or attention.fused_qk_norm_rope is not avx2.qk_norm_rope:
        return False
    problem = _obstacle(attention.attn, vllm_config) or _problem(
        attention.num_heads, attention.num_kv_heads, attention.head_dim, torch.get_default_dtype()
    )
    if problem:
        logger.info_once("Attention stays in vLLM's operations: %s", problem)
    return not problem


def _obstacle(layer: Any, vllm_config: Any) -> str:
    """Why a layer of vLLM's is more than its two kernels; empty if it is not."""
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector wants to see every layer"
    from vllm.v1.attention.backends import cpu_attn

    impl = layer.impl
    if type(impl) is not cpu_attn.CPUAttentionBackendImpl:
        return f"they are those of {type(impl).__name__}"
    if impl.is_fp8_kv_cache or layer.kv_sharing_target_layer_name is not None:
        return "the KV cache is quantized, or another layer's"
    plain = (impl.sliding_window, impl.alibi_slopes, impl.logits_soft_cap, impl.sinks) == (-1, None, 0, None)
    return "" if plain else "they take more than queries, keys and values"


class Passes:
    """Forward passes of one model, whose attention layers get what vLLM's would look up."""

    def __init__(self, model: nn.Module) -> None:
        """Number those layers of `model` that attend in one operation: a graph knows a layer by its place."""
        self._layers: list[Any] = []
        for module in model.modules():
            if getattr(module, "attends_in_one", False):
                module.place = len(self._layers)  # type: ignore[assignment]
                self._layers.append(module.attn)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around a call of the model."""
        if not self._layers:
            yield
            return
        context: Any = get_forward_context()
        avx2.begin_attention(len(self._layers), attends=context.attn_metadata is not None)
        try:
            if context.attn_metadata is not None:  # there is none while memory is measured
                self._hand_over(context.attn_metadata, context.slot_mapping)
            yield
        finally:
            avx2.begin_attention(0)

    def _hand_over(self, of_layers: Any, slots: Any) -> None:
        of_layers = of_layers[0] if isinstance(of_layers, list) else of_layers
        groups: dict[int, list[int]] = {}  # layers that share their metadata, commonly all
        for place, layer in enumerate(self._layers):
            groups.setdefault(id(of_layers[layer.layer_name]), []).append(place)
        for places in groups.values():
            first = self._layers[places[0]]
            caches = [self._layers[place].kv_cache for place in places]
            name, isa = first.layer_name, instructions_of_attention(first)
            avx2.hand_over(places, caches, slots.get(name), of_layers[name], isa)


# --- proof ---------------------------------------------------------------------------------------------------------


@proof
def _problem(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> str:
    """Why the operation cannot attend; empty if it can."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(_TOKENS, heads + 2 * kv_heads, size, generator=generator, dtype=torch.float32).to(dtype)
    cache = torch.zeros(-(-_TOKENS // _SLOTS), kv_heads, _SLOTS, 2 * size, dtype=dtype)
    parts = (  # the second pass reads what the first has written
        _attend(qkv[start:stop].flatten(1).clone(), start, cache, heads)
        for start, stop in ((0, _TOKENS - 1), (_TOKENS - 1, _TOKENS))  # a prompt, and a token after it
    )
    q, k, v = qkv.float().transpose(0, 1).split((heads, kv_heads, kv_heads))
    q, k = (rms_norm(one, (size,), eps=_EPSILON) for one in (q, k))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return difference(torch.cat(list(parts)), expected.transpose(0, 1).flatten(1), _TOLERANCE)


def _attend(qkv: torch.Tensor, start: int, cache: torch.Tensor, heads: int) -> torch.Tensor:
    """Output [T, Q D] for the tokens from `start` on of a single request, whose `cache` [B, K, S, 2 D] gets theirs."""
    from vllm.v1.attention.backends import cpu_attn

    blocks, kv_heads, slots, size = cache.shape
    size //= 2
    stop, isa = start + len(qkv), cpu_attn._get_attn_isa(cache.dtype, slots, size, "auto")
    starts, lengths = (torch.tensor(one, dtype=torch.int32) for one in ([0, len(qkv)], [stop]))
    schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=size,
        seq_lens=lengths,
        dtype=cache.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    positions, weight = torch.arange(start, stop), torch.ones(size, dtype=cache.dtype)
    metadata = cpu_attn.CPUAttentionMetadata(
        num_actual_tokens=len(qkv),
        max_query_len=len(qkv),
        query_start_loc=starts,
        max_seq_len=stop,
        seq_lens=lengths,
        block_table=torch.arange(blocks, dtype=torch.int32).unsqueeze(0),
        slot_mapping=positions,
        scheduler_metadata=schedule,
    )
    unturned = torch.cat((torch.ones(stop, size // 2), torch.zeros(stop, size // 2)), dim=1).to(cache.dtype)
    avx2.begin_attention(1, attends=True)
    try:
        avx2.hand_over([0], [cache], positions, metadata, isa)
        return avx2.attention(
            qkv, heads, kv_heads, size, _EPSILON, weight, weight, unturned, positions, size**-0.5, place=0
        )
    finally:
        avx2.begin_attention(0)
