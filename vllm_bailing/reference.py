"""BailingMoeV2 in plain PyTorch: the oracle of the tests, and the family's model class for transformers 5.

Written from the published description, for reading: no vLLM, no fused kernels, one expert after the other. Importing
this module registers it with `AutoConfig` and `AutoModelForCausalLM`, so that `from_pretrained` and `generate` work on
the published checkpoints without remote code.

Dimension letters: B sequences, T tokens, S tokens incl. cache, N = B * T, H hidden size, E routed experts, G expert
groups, K experts per token, Q query heads, KV key/value heads, D head size, R rotary width.

Source: inclusionAI/Ling-V2, `modeling_bailing_moe_v2.py`; Ling 2.0 technical report, arXiv 2510.22115.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vllm_bailing.config import BailingMoeV2Config, register_with_transformers

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


class BailingMoeV2Attention(nn.Module):
    """Grouped-query attention with a fused projection `[q | k | v]` and norms on q and k before the rotary."""

    def __init__(self, config: BailingMoeV2Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
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
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: DynamicCache | None
    ) -> Tensor:
        batch, tokens, _ = hidden_states.shape
        qkv = self.query_key_value(hidden_states).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)  # [B, heads, T, D]
        q = apply_rotary(self.query_layernorm(q), cos, sin)
        k = apply_rotary(self.key_layernorm(k), cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # [B, KV, S, D]
        repeats = self.num_heads // self.num_kv_heads
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and tokens > 1)
        return self.dense(context.transpose(1, 2).reshape(batch, tokens, -1))


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

    def forward(self, hidden_states: Tensor) -> Routing:
        """Choose experts for `hidden_states` [N, H]; returns ids and weights [N, K], in no set order."""
        config = self.config
        scores = F.linear(hidden_states.float(), self.weight.float()).sigmoid()  # [N, E]
        # The bias picks the experts; the weights come from the unbiased scores.
        ranking = scores + self.expert_bias.float()
        topk_ids = grouped_topk(ranking, config.n_group, config.topk_group, config.num_experts_per_tok)
        topk_weights = scores.gather(1, topk_ids)
        if config.num_experts_per_tok > 1:
            topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
        return topk_ids, topk_weights * config.routed_scaling_factor


class BailingMoeV2SparseMoe(nn.Module):
    """Routed experts, each token going to K of them, plus the shared experts, which see every token unscaled."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__()
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
        topk_ids, topk_weights = self.gate(flat)
        # Weighted outputs are summed in fp32 for bf16 models too: the order of experts then hardly matters.
        routed = torch.zeros_like(flat, dtype=torch.float32)
        for expert in topk_ids.unique().tolist():
            tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
            output = self.experts[expert](flat[tokens]).float() * topk_weights[tokens, slots, None]
            routed.index_add_(0, tokens, output)
        output = routed.to(flat.dtype)
        if self.shared_experts is not None:
            output = output + self.shared_experts(flat)
        return output.view_as(hidden_states), (topk_ids, topk_weights)


class BailingMoeV2DecoderLayer(nn.Module):
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
        self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: DynamicCache | None = None
    ) -> tuple[Tensor, Routing | None]:
        hidden_states = hidden_states + self.attention(self.input_layernorm(hidden_states), cos, sin, mask, cache)
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


@dataclass
class BailingMoeV2Output(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` plus `routing`: `(topk_ids, topk_weights)` of every MoE layer, tokens flattened."""

    routing: tuple[Routing, ...] | None = None


class BailingMoeV2PreTrainedModel(PreTrainedModel):
    """Loading and initialization shared by the classes below."""

    config_class = BailingMoeV2Config
    base_model_prefix = "model"
    _no_split_modules = ["BailingMoeV2DecoderLayer", "BailingMoeV2MTPLayer"]
    _keep_in_fp32_modules_strict = ["expert_bias"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding, BailingMoeV2Gate)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, BailingMoeV2RMSNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, BailingMoeV2Gate):
            nn.init.zeros_(module.expert_bias)


class BailingMoeV2Model(BailingMoeV2PreTrainedModel):
    """Embedding, decoder layers, MTP layers (in the same list, as in the checkpoints) and the final norm."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[nn.Module] = [BailingMoeV2DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        layers += [BailingMoeV2MTPLayer(config, i) for i in config.mtp_layer_ids]
        self.layers = nn.ModuleList(layers)
        self.norm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value


def attention_mask_4d(attention_mask: Tensor | None, tokens: int, past: int, device: torch.device) -> Tensor | None:
    """Boolean mask [B or 1, 1, T, S], True where a query may look; None means plain causal attention.

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


class BailingMoeV2ForCausalLM(BailingMoeV2PreTrainedModel, GenerationMixin):
    """BailingMoeV2 with its language-model head, for `from_pretrained` and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.model = BailingMoeV2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [..., vocab] of `hidden_states` [..., H], which come after the final norm."""
        if not self.config.norm_head:
            return self.lm_head(hidden_states)
        # Every column of the head, one per hidden channel, has unit length over the vocabulary.
        return F.linear(
            hidden_states, F.normalize(self.lm_head.weight.float(), dim=0, eps=1e-7).to(hidden_states.dtype)
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: DynamicCache | None = None,
        **kwargs: Any,
    ) -> BailingMoeV2Output:
        """Run the main layers.

        Args:
            input_ids: [B, T] int64; or give `inputs_embeds` [B, T, H].
            attention_mask: [B, S], 0 at padding (either side), or None.
            position_ids: [B, T]; derived from `attention_mask` when left out.
            labels: [B, T] int64 with -100 where no loss is wanted; shifted inside.
            output_hidden_states: Also return the embedding output and the output of every decoder layer, the last of
                them after the final norm.
            output_router_logits: Also return the routing of every MoE layer.
            logits_to_keep: Compute logits of the last so many positions only; 0 for all.
            cache: What `generate` of transformers 5.24 and later calls `past_key_values`.

        Returns:
            Logits [B, T, vocab] and, as asked for, cache, hidden states and routing.
        """
        hidden_states = self.model.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = hidden_states.shape[1]
        past_key_values = cache if cache is not None else past_key_values
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = self._positions(attention_mask, tokens, past, hidden_states.device)
        mask = attention_mask_4d(attention_mask, tokens, past, hidden_states.device)
        cos, sin = rotary_cos_sin(self.config, position_ids)

        states, routings = [hidden_states], []
        for layer in self.model.layers[: self.config.num_hidden_layers]:
            hidden_states, routing = layer(hidden_states, cos, sin, mask, past_key_values)
            states.append(hidden_states)
            if routing is not None:
                routings.append(routing)
        hidden_states = states[-1] = self.model.norm(hidden_states)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(hidden_states[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return BailingMoeV2Output(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            routing=tuple(routings) if output_router_logits else None,
        )

    def mtp_forward(
        self,
        hidden_states: Tensor,
        next_input_ids: Tensor,
        step: int = 0,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """Run MTP layer `step` over whole sequences (no cache).

        Args:
            hidden_states: [B, T, H] after the main model's final norm, or this method's result for `step - 1`.
            next_input_ids: [B, T]; row i holds the token that follows position i (plus `step`).
            attention_mask: [B, T], 0 at padding, or None.
            position_ids: [B, T]; derived from `attention_mask` when left out.

        Returns:
            ([B, T, H] after the MTP layer's final norm, its routing).
        """
        layer: BailingMoeV2MTPLayer = self.model.layers[self.config.num_hidden_layers + step]
        tokens = hidden_states.shape[1]
        if position_ids is None:
            position_ids = self._positions(attention_mask, tokens, 0, hidden_states.device)
        cos, sin = rotary_cos_sin(self.config, position_ids)
        joined = layer.join(self.model.word_embeddings(next_input_ids), hidden_states)
        mask = attention_mask_4d(attention_mask, tokens, 0, hidden_states.device)
        output, routing = layer(joined, cos, sin, mask)
        return layer.final_layernorm(output), routing

    def mtp_logits(self, hidden_states: Tensor, next_input_ids: Tensor, step: int = 0, **kwargs: Any) -> Tensor:
        """Logits [B, T, vocab] of MTP layer `step`: row i predicts token i + 2 + step. Arguments as `mtp_forward`."""
        return self.logits(self.mtp_forward(hidden_states, next_input_ids, step, **kwargs)[0])

    @staticmethod
    def _positions(attention_mask: Tensor | None, tokens: int, past: int, device: torch.device) -> Tensor:
        if attention_mask is None:
            return torch.arange(past, past + tokens, device=device)[None]
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]


register_with_transformers()
AutoModelForCausalLM.register(BailingMoeV2Config, BailingMoeV2ForCausalLM, exist_ok=True)
