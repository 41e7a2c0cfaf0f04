"""The small operations of a decode step as compiled loops, for CPU engines in eager mode.

A few tokens cost PyTorch and vLLM's layers far more in calls than in arithmetic: the norms of queries and keys with
their rotation are 170 microseconds of calls, and 4 of work, a layer. `torch.compile` fuses them too, so that compiled
engines do without this file. Numba compiles it on first use and keeps the result.

Floats come as their bits, which Numba has integers for: uint16 for bf16, uint32 for fp32.

Dimension letters: T tokens, E experts, D head size, R rotary width.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

_BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.uint32}
DTYPES = tuple(_BITS)
# A loop runs on one thread and PyTorch on all: with more work than this, the calls no longer matter.
_MOST_TOKENS_TIMES_THREADS = 8192
_MOST_LOGITS = 4096


def _compiled(**options: Any) -> Any:
    """Numba's decorator; where there is no folder to keep the result in, every process compiles anew."""

    def decorate(function: Any) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:
            return numba.njit(**options)(function)

    return decorate


def most_tokens() -> int:
    """For how many tokens at once `fused_qk_norm_rope` pays."""
    return _MOST_TOKENS_TIMES_THREADS // torch.get_num_threads()


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
) -> None:
    """Norm and rotate queries and keys of `qkv` [T, (q + k + v) D] in place.

    Args:
        q_weight, k_weight: [D], in the dtype of `qkv`, bf16 or fp32, as all floats here.
        cos_sin_cache: [positions, R], cosines and sines side by side.
        is_neox: Whether halves are rotated, and not neighbours; it has to be true.
        position_ids: [T] int64.

    Source: the operation of the same name in vLLM's CUDA build, whose arguments these are.
    """
    assert is_neox
    dtype = _BITS[qkv.dtype]
    floats = [each.detach().view(dtype).numpy() for each in (qkv, q_weight, k_weight, cos_sin_cache)]
    _norm_and_rotate(*floats, position_ids.numpy(), num_heads_q, num_heads_k, head_dim, eps, 32 - 8 * qkv.itemsize)


@_compiled()
def _round(row, shift):
    """Round fp32 to the nearest bf16 in place, ties to even, if `shift` is that of bf16."""
    bits = row.view(np.uint32)
    if shift != 0:
        for d in range(len(bits)):
            up = np.uint32(0x7FFF) + ((bits[d] >> np.uint32(16)) & np.uint32(1))
            bits[d] = (bits[d] + up) & np.uint32(0xFFFF0000)


@_compiled(fastmath={"reassoc", "contract", "nsz"})
def _norm_and_rotate(qkv, q_weight, k_weight, cache, positions, heads, kv_heads, size, eps, shift):
    half = cache.shape[1] // 2
    row, weight = np.empty(size, np.float32), np.empty((2, size), np.float32)
    angle = np.empty(2 * half, np.float32)
    row_bits, weight_bits, angle_bits = row.view(np.uint32), weight.view(np.uint32), angle.view(np.uint32)
    shift = np.uint32(shift)
    for d in range(size):
        weight_bits[0, d] = np.uint32(q_weight[d]) << shift
        weight_bits[1, d] = np.uint32(k_weight[d]) << shift
    for t in range(len(qkv)):
        for d in range(2 * half):
            angle_bits[d] = np.uint32(cache[positions[t], d]) << shift
        for head in range(heads + kv_heads):
            start = head * size
            for d in range(size):
                row_bits[d] = np.uint32(qkv[t, start + d]) << shift
            squares = np.float32(0)
            for d in range(size):
                squares += row[d] * row[d]
            scale = np.float32(1) / np.sqrt(squares / np.float32(size) + np.float32(eps))
            which = 0 if head < heads else 1
            # Rounded where the layers round, so that an answer does not depend on which of the two ran.
            for d in range(size):
                row[d] *= scale
            _round(row, shift)
            for d in range(size):
                row[d] *= weight[which, d]
            _round(row, shift)
            for d in range(half):
                first, second = row[d], row[half + d]
                row[d] = first * angle[d] - second * angle[half + d]
                row[half + d] = second * angle[d] + first * angle[half + d]
            _round(row, shift)
            for d in range(size):
                qkv[t, start + d] = row_bits[d] >> shift


def route_in_loops(router: Any) -> None:
    """Let vLLM's `router` for CPUs choose experts by `grouped_topk` where that is worth it."""
    compute = router._compute_routing

    def _compute_routing(hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if router_logits.numel() > _MOST_LOGITS or router_logits.dtype != torch.float32:
            return compute(hidden_states, router_logits, *args, **kwargs)
        return grouped_topk(
            router_logits,
            router.e_score_correction_bias,
            router.num_expert_group,
            router.topk_group,
            router.top_k,
            router.renormalize,
            router.routed_scaling_factor,
        )

    router._compute_routing = _compute_routing


def grouped_topk(
    logits: torch.Tensor,
    bias: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    top_k: int,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, top_k] fp32 and ids [T, top_k] int32 of the experts chosen by logits [T, E] and bias [E], both fp32.

    Source: inclusionAI/Ling-V2, `modeling_bailing_moe_v2.py`, `BailingMoeV2Gate`.
    """
    weights = torch.empty(len(logits), top_k)
    ids = torch.empty(len(logits), top_k, dtype=torch.int32)
    arrays = [each.detach().numpy() for each in (logits, bias, weights, ids)]
    _grouped_topk(*arrays, num_expert_group, topk_group, renormalize, scaling_factor)
    return weights, ids


@_compiled()
def _grouped_topk(logits, bias, weights, ids, groups, topk_group, renormalize, scaling_factor):
    experts, size = logits.shape[1], logits.shape[1] // groups
    nothing = np.float32(-np.inf)
    scores, choice = np.empty(experts, np.float32), np.empty(experts, np.float32)
    of_group = np.empty(groups, np.float32)
    for t in range(len(logits)):
        for e in range(experts):
            scores[e] = np.float32(1) / (np.float32(1) + np.exp(-logits[t, e]))
            choice[e] = scores[e] + bias[e]
        for g in range(groups):
            best, second = nothing, nothing
            for e in range(g * size, (g + 1) * size):
                if choice[e] > best:
                    best, second = choice[e], best
                elif choice[e] > second:
                    second = choice[e]
            of_group[g] = best + second
        for _ in range(groups - topk_group):
            worst = 0
            for g in range(1, groups):
                if of_group[g] <= of_group[worst]:
                    worst = g
            of_group[worst] = np.float32(np.inf)
            choice[worst * size : (worst + 1) * size] = nothing
        total = np.float32(0)
        for k in range(ids.shape[1]):
            best_expert = np.argmax(choice)
            choice[best_expert] = nothing
            ids[t, k] = best_expert
            weights[t, k] = scores[best_expert]
            total += scores[best_expert]
        scale = np.float32(scaling_factor)
        if renormalize:
            scale /= total + np.float32(1e-20)
        for k in range(ids.shape[1]):
            weights[t, k] *= scale
