"""The layers of BailingMoeV2 in plain PyTorch, for reading: no vLLM, no fused kernels, one expert after the other.

`reference.py` makes a model of them, and hands their names on.

Dimension letters: B sequences, T tokens, S tokens incl. cache, N = B * T, H hidden size, E routed experts, G expert
groups, K experts per token, Q query heads, KV key/value heads, D head size, R rotary width.

Source: inclusionAI/Ling-V2, `modeling_bailing_moe_v2.py`; Ling 2.0 technical report, arXiv 2510.22115.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import maybe_autocast

from vllm_bailing.config import BailingMoeV2Config

Routing = tuple[Tensor, Tensor]  # topk_ids [N, K] int64, topk_weights [N, K] fp32


class BailingMoeV2RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 and returned in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(hidden_states.dtype)


def rotary_inv_freq(config: BailingMoeV2Config) -> tuple[Tensor, float]:
    """Inverse frequencies of the rotary embedding and the factor on its cosines and sines.

    Returns:
        (inv_freq [R / 2] fp32, attention factor). The factor is 1.0 unless the config asks for YaRN.
    Source: RoFormer, arXiv 2104.09864, equation 15; YaRN, arXiv 2309.00071, section 3.
    """
    rope = config.rope_parameters
    base, width = float(rope["rope_theta"]), config.rotary_dim
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    inv_freq = 1.0 / base**exponents
    if rope["rope_type"] == "default":
        return inv_freq, 1.0
    factor = rope["factor"]
    if rope["rope_type"] == "linear":
        return inv_freq / factor, 1.0

    def channel_of(rotations: float) -> float:
        """Channel whose wave turns `rotations` times within the window of the training."""
        window = rope["original_max_position_embeddings"]
        return width * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel_of(rope.get("beta_fast", 32)), channel_of(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # an empty ramp would divide by zero
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    # Fast waves (ramp 0) keep their frequency, slow ones (ramp 1) are stretched by the factor.
    inv_freq = inv_freq / factor * ramp + inv_freq * (1 - ramp)

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale and mscale_all:
            attention_factor = magnitude(factor, mscale) / magnitude(factor, mscale_all)
        else:
            attention_factor = magnitude(factor)
    return inv_freq, float(attention_factor)


def rotary_cos_sin(config: BailingMoeV2Config, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, R] in fp32 for `position_ids` [B, T]; both halves of R repeat the same angles."""
    inv_freq, attention_factor = rotary_inv_freq(config)
    angles = position_ids[:, None, :, None].float() * inv_freq.to(position_ids.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R channels of `x` [B, heads, T, D] (neox halves); the others pass through untouched."""
    width = cos.shape[-1]
    rotary, rest = x[..., :width], x[..., width:]
    first, second = rotary.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    rotary = rotary * cos.to(x.dtype) + turned * sin.to(x.dtype)
    return torch.cat((rotary, rest), dim=-1)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    is_causal: bool = True,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention spelled out: what transformers calls "eager", and the only kind that returns its weights.

    Args:
        query: [B, Q, T, D]; `key` and `value` are [B, KV, S, D].
        attention_mask: Broadcasts to [B, Q, T, S]: True where a query may look, or a number to add to its score. None
            lets it look at itself and at what comes before, or at everything if not `is_causal`.
    Returns:
        (context [B, T, Q, D], weights [B, Q, T, S]).
    """
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    if attention_mask is None and is_causal:
        attention_mask = torch.ones_like(scores, dtype=torch.bool).tril(scores.shape[3] - scores.shape[2])
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class BailingMoeV2Attention(nn.Module):
    """Grouped-query attention with a fused projection `[q | k | v]` and norms on q and k before the rotary."""

    is_causal = True  # read by the attention functions of transformers, as are `config` and `num_key_value_groups`

    def __init__(self, config: BailingMoeV2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_kv_heads
        self.head_dim = config.head_dim
        heads = self.num_heads + 2 * self.num_kv_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.use_qkv_bias)
        if config.use_qk_norm:
            self.query_layernorm = BailingMoeV2RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = BailingMoeV2RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.query_layernorm = self.key_layernorm = nn.Identity()
        self.dense = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=config.use_bias)

    def forward(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Any, cache: Cache | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        batch, tokens, _ = hidden_states.shape
        qkv = self.query_key_value(hidden_states).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)  # [B, heads, T, D]
        q = apply_rotary(self.query_layernorm(q), cos, sin)
        k = apply_rotary(self.key_layernorm(k), cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # [B, KV, S, D]
        implementation = self.config._attn_implementation or "sdpa"  # a layer outside of a model has none chosen for it
        if kwargs.get("output_attentions", self.config.output_attentions):
            if implementation not in ("sdpa", "eager"):
                raise ValueError(f"output_attentions=True needs attn_implementation='eager', not {implementation!r}")
            implementation = "eager"  # understands the masks of both
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, plain_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        context, weights = attend(self, q, k, v, mask, dropout=dropout, scaling=self.head_dim**-0.5, **kwargs)
        return self.dense(context.reshape(batch, tokens, -1)), weights


class BailingMoeV2MLP(nn.Module):
    """SwiGLU feed-forward block. It has no biases whatever `use_bias` says."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def grouped_topk(ranking: Tensor, n_group: int, topk_group: int, top_k: int) -> Tensor:
    """Ids of the experts that rank highest in the best groups.

    Args:
        ranking: [..., E].
    Returns:
        int64 [..., K], in no set order.
    """
    # Of `n_group` groups of neighbors those stay open whose two best experts rank highest together.
    groups = ranking.unflatten(-1, (n_group, -1))  # [..., G, E / G]
    if n_group > 1:
        group_scores = groups.topk(2, dim=-1).values.sum(-1)  # [..., G]
        chosen = group_scores.topk(topk_group, dim=-1).indices
        closed = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, chosen, False)
        groups = groups.masked_fill(closed[..., None], -torch.inf)
    return groups.flatten(-2).topk(top_k, dim=-1).indices


class BailingMoeV2Gate(nn.Module):
    """Router: group-limited top-k over sigmoid scores, in fp32.

    Source: Ling-V2, `modeling_bailing_moe_v2.py`, class `BailingMoeV2Gate`.
    """

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose experts for `hidden_states` [N, H].

        Returns:
            (ids [N, K], weights [N, K], logits [N, E]); experts in no set order, numbers in fp32.
        """
        config = self.config
        # Autocast would compute even this product in bf16.
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float())
        scores = logits.sigmoid()
        # The bias picks the experts; the weights come from the unbiased scores.
        ranking = scores + self.expert_bias.float()
        topk_ids = grouped_topk(ranking, config.n_group, config.topk_group, config.num_experts_per_tok)
        topk_weights = scores.gather(1, topk_ids)
        if config.num_experts_per_tok > 1:
            topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
        return topk_ids, topk_weights * config.routed_scaling_factor, logits


class BailingMoeV2SparseMoe(nn.Module):
    """Routed experts, each token going to K of them, plus the shared experts, which see every token unscaled."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
        # Experts that are sharded over ranks have to be called by all of them, in one order.
        self.calls_every_expert = False
        self.gate = BailingMoeV2Gate(config)
        self.experts = nn.ModuleList(
            BailingMoeV2MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.shared_experts = (
            BailingMoeV2MLP(config.hidden_size, config.shared_expert_intermediate_size)
            if config.num_shared_experts
            else None
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Routing]:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])  # [N, H]
        topk_ids, topk_weights, _ = self.gate(flat)
        # Weighted outputs are summed in fp32 for bf16 models too: the order of experts then hardly matters.
        routed = torch.zeros_like(flat, dtype=torch.float32)
        experts = range(len(self.experts)) if self.calls_every_expert else topk_ids.unique().tolist()
        for expert in experts:
            tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
            output = self.experts[expert](flat[tokens]).float() * topk_weights[tokens, slots, None]
            routed.index_add_(0, tokens, output)
        output = routed.to(flat.dtype)
        if self.shared_experts is not None:
            output = output + self.shared_experts(flat)
        return output.view_as(hidden_states), (topk_ids, topk_weights)


class BailingMoeV2DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward block, each after a norm and added to the residual stream."""

    def __init__(self, config: BailingMoeV2Config, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = BailingMoeV2Attention(config, layer_idx)
        self.post_attention_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = (
            BailingMoeV2MLP(config.hidden_size, config.intermediate_size)
            if layer_idx < config.first_k_dense_replace
            else BailingMoeV2SparseMoe(config)
        )

    def forward(
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Any, cache: Cache | None = None, **kwargs: Any
    ) -> tuple[Tensor, Routing | None]:
        """One layer over `hidden_states` [B, T, H]; `mask` as the attention function that is in use wants it."""
        context, _ = self.attention(self.input_layernorm(hidden_states), cos, sin, mask, cache, **kwargs)
        hidden_states = hidden_states + context
        output, routing = self.mlp(self.post_attention_layernorm(hidden_states)), None
        if isinstance(output, tuple):
            output, routing = output
        return hidden_states + output, routing


class BailingMoeV2MTPLayer(BailingMoeV2DecoderLayer):
    """Multi-token prediction layer: a decoder layer over a hidden state joined with the next token's embedding."""

    def __init__(self, config: BailingMoeV2Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.final_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def join(self, next_embeds: Tensor, hidden_states: Tensor) -> Tensor:
        """Input of the decoder layer, from two tensors [B, T, H]."""
        return self.eh_proj(torch.cat((self.enorm(next_embeds), self.hnorm(hidden_states)), dim=-1))


def attention_mask_4d(attention_mask: Tensor | None, tokens: int, past: int, device: torch.device) -> Tensor | None:
    """Boolean mask [B or 1, 1, T, S] for layers outside of a model: True where a query may look; None is plain causal.

    Args:
        attention_mask: [B, S], 0 at padding, or None where nothing is padded.
        tokens: T, the queries of this call.
        past: Tokens already in the cache.
    """
    if (attention_mask is None or bool(attention_mask.all())) and past == 0:
        return None
    columns = torch.arange(past + tokens, device=device)
    rows = torch.arange(past, past + tokens, device=device)[:, None]
    mask = (columns <= rows)[None, None]
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None, :].bool()
    return mask | (columns == rows)  # a padding row that sees nothing would become NaN
