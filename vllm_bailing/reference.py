"""BailingMoeV2 in plain PyTorch: the oracle of the tests, and the family's model classes for transformers 5.

The arithmetic of the layers, and what the dimension letters mean, stand in `reference_layers.py`. Importing this module
registers the classes with `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoModelForSequenceClassification`:
`from_pretrained`, `generate` and `Trainer` then work on the published checkpoints without remote code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import TransformersKwargs, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from vllm_bailing.config import BailingMoeV2Config, register_with_transformers
from vllm_bailing.reference_layers import (
    BailingMoeV2Attention,
    BailingMoeV2DecoderLayer,
    BailingMoeV2Gate,
    BailingMoeV2MLP,
    BailingMoeV2MTPLayer,
    BailingMoeV2RMSNorm,
    BailingMoeV2SparseMoe,
    Routing,
    apply_rotary,
    attention_mask_4d,
    grouped_topk,
    plain_attention,
    rotary_cos_sin,
    rotary_inv_freq,
)

__all__ = [
    "BailingMoeV2Attention",
    "BailingMoeV2DecoderLayer",
    "BailingMoeV2ForCausalLM",
    "BailingMoeV2ForSequenceClassification",
    "BailingMoeV2Gate",
    "BailingMoeV2MLP",
    "BailingMoeV2MTPLayer",
    "BailingMoeV2Model",
    "BailingMoeV2ModelOutput",
    "BailingMoeV2Output",
    "BailingMoeV2PreTrainedModel",
    "BailingMoeV2RMSNorm",
    "BailingMoeV2SparseMoe",
    "Routing",
    "apply_rotary",
    "attention_mask_4d",
    "grouped_topk",
    "plain_attention",
    "rotary_cos_sin",
    "rotary_inv_freq",
]

# transformers 5.24 renamed the argument and the output `past_key_values` to `cache`.
CACHE = "cache" if any(field.name == "cache" for field in fields(CausalLMOutputWithPast)) else "past_key_values"
# What a forward pass may be told besides its own arguments: the library's list, and the rest of its loss function's.
KNOWN_ARGUMENTS = frozenset(TransformersKwargs.__annotations__) | {"ignore_index", "shift_labels"}
# How a packed batch is told to flash attention alone; the others read it from `position_ids`.
PACKED_ARGUMENTS = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"))


@dataclass
class BailingMoeV2ModelOutput(MoeModelOutputWithPast):
    """`MoeModelOutputWithPast`, whose `router_logits` are [N, E] per MoE layer, plus `routing` as below."""

    routing: tuple[Routing, ...] | None = None


@dataclass
class BailingMoeV2Output(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` plus, of every MoE layer, `router_logits` [N, E] and `routing`.

    `routing` is `(topk_ids, topk_weights)`, tokens flattened.
    """

    router_logits: tuple[Tensor, ...] | None = None
    routing: tuple[Routing, ...] | None = None


class BailingMoeV2PreTrainedModel(PreTrainedModel):
    """Loading, initialization and the checks of arguments, shared by the classes below."""

    config_class = BailingMoeV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BailingMoeV2DecoderLayer", "BailingMoeV2MTPLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["expert_bias"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": BailingMoeV2DecoderLayer,
        "attentions": BailingMoeV2Attention,
        "router_logits": OutputRecorder(BailingMoeV2Gate, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BailingMoeV2Gate):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.expert_bias)

    @staticmethod
    def _positions(attention_mask: Tensor | None, tokens: int, past: int | Tensor, device: torch.device) -> Tensor:
        """Positions [B or 1, T] of `tokens` that follow `past` others; padding, 0 in the mask [B, S], has none."""
        if attention_mask is None:
            return torch.arange(tokens, device=device)[None] + past
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]

    def _check_arguments(self, kwargs: dict[str, Any], position_ids: Tensor | None) -> None:
        """Refuse what would be ignored although it changes the result."""
        given = {name for name, value in kwargs.items() if value is not None}
        if unknown := sorted(given - KNOWN_ARGUMENTS):
            raise TypeError(
                f"{type(self).__name__} does not know {', '.join(unknown)} and would ignore it; leave it out"
            )
        packed = sorted(given & PACKED_ARGUMENTS)
        if packed and position_ids is None:
            raise ValueError(
                f"{', '.join(packed)} without position_ids; give position_ids that start at 0 with every sequence"
            )

    @staticmethod
    def _check_mask(mask: Tensor, batch: int, tokens: int, past: int | Tensor, cache: Cache | None) -> None:
        """Refuse a mask that would be read as another one, or fail in the middle of the model."""
        wanted = [batch, int(past) + tokens]
        fits = list(mask.shape) == wanted
        if mask.dim() == 4:
            fits = mask.shape[0] in (1, batch) and mask.shape[2] == tokens
            # A static cache has room for more than it holds, and its mask says which part that is.
            fits = fits and (mask.shape[3] == wanted[1] or (cache is not None and cache.is_compileable))
            fits = fits and (mask.dtype == torch.bool or mask.is_floating_point())
        if not fits:
            raise ValueError(
                f"attention_mask {list(mask.shape)} of {mask.dtype} does not fit; give {wanted} with 0 at padding, or "
                f"[{batch}, 1, {tokens}, {wanted[1]}] of torch.bool, or of numbers to add to the scores"
            )


class BailingMoeV2Model(BailingMoeV2PreTrainedModel):
    """Embedding, decoder layers, MTP layers (in the same list, as in the checkpoints) and the final norm."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        layers: list[nn.Module] = [BailingMoeV2DecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        layers += [BailingMoeV2MTPLayer(config, i) for i in config.mtp_layer_ids]
        self.layers = nn.ModuleList(layers)
        self.norm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value

    def prepare(
        self,
        inputs_embeds: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """What the layers need besides `inputs_embeds` [B, T, H]: cosines, sines, and the mask of the attention in use.

        Arguments as `forward`.
        """
        batch, tokens = inputs_embeds.shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        padding = None
        if isinstance(attention_mask, Tensor):
            self._check_mask(attention_mask, batch, tokens, past, cache)
            padding = attention_mask if attention_mask.dim() == 2 else None
        packed_ids = position_ids
        if position_ids is None:
            position_ids = self._positions(padding, tokens, past, inputs_embeds.device)
        elif position_ids.shape[-1] != tokens or position_ids.dim() != 2:
            raise ValueError(f"position_ids {list(position_ids.shape)} must be [{batch}, {tokens}], one for each token")
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=packed_ids,
            **{CACHE: cache},
        )
        return *rotary_cos_sin(self.config, position_ids), mask

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BailingMoeV2ModelOutput:
        """Run embedding, main layers and final norm. Arguments and errors as `BailingMoeV2ForCausalLM.forward`.

        Returns:
            `last_hidden_state` [B, T, H] and, as asked for, the rest.
        """
        self._check_arguments(kwargs, position_ids)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument; give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; give a Cache, such as DynamicCache()")
        if cache is not None and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            raise ValueError("past_key_values cannot be filled with gradient checkpointing; leave one of them out")
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin, mask = self.prepare(hidden_states, attention_mask, position_ids, cache)
        if use_cache and cache is None:  # made after the mask: a packed batch is read as one only without a cache
            cache = DynamicCache(config=self.config)

        routings = []
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states, routing = layer(hidden_states, cos, sin, mask, cache, **kwargs)
            routings.append(routing)
        asked = kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False))
        return BailingMoeV2ModelOutput(
            last_hidden_state=self.norm(hidden_states),
            routing=tuple(routing for routing in routings if routing is not None) if asked else None,
            **{CACHE: cache},
        )


class BailingMoeV2ForCausalLM(BailingMoeV2PreTrainedModel, GenerationMixin):
    """BailingMoeV2 with its language-model head, for `from_pretrained`, `generate` and `Trainer`."""

    _tied_weights_keys = {"lm_head.weight": "model.word_embeddings.weight"}

    def __init__(self, config: BailingMoeV2Config) -> None:
        super().__init__(config)
        self.model = BailingMoeV2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Logits [..., vocab] of `hidden_states` [..., H], which come after the final norm."""
        if not self.config.norm_head:
            return self.lm_head(hidden_states)
        # Every column of the head, one per hidden channel, has unit length over the vocabulary.
        return F.linear(
            hidden_states, F.normalize(self.lm_head.weight.float(), dim=0, eps=1e-7).to(hidden_states.dtype)
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BailingMoeV2Output:
        """Run the main layers.

        Args:
            input_ids: [B, T] int64; or give `inputs_embeds` [B, T, H].
            attention_mask: [B, S], 0 at padding (either side), or None; or ready made [B, 1, T, S], True where a query
                may look, or numbers to add to the scores.
            position_ids: [B, T]; derived from `attention_mask` when left out. Without `attention_mask` and
                `past_key_values`, a position that does not follow the one before begins another sequence (packing).
            labels: [B, T] int64 with -100 where no loss is wanted; shifted inside.
            logits_to_keep: Compute logits of the last so many positions only; 0 for all.
            cache: What transformers 5.24 and later call `past_key_values`.
            kwargs: Those of `TransformersKwargs`, and of the loss function `shift_labels` and `ignore_index`. With
                `num_items_in_batch` the loss is the sum over all labels divided by it. `output_hidden_states` returns
                the embedding output and the output of every decoder layer, the last of them after the final norm;
                `output_attentions` the weights [B, Q, T, S] of every layer; `output_router_logits` both `router_logits`
                and `routing`.

        Returns:
            Logits [B, T, vocab] and, as asked for, loss, cache, hidden states, attentions, router logits and routing.

        Raises:
            TypeError: If an argument is unknown, since it would be ignored.
            ValueError: If arguments contradict each other, or a shape does not fit. The message is one line.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(outputs.last_hidden_state[:, kept])
        loss, targets = None, kwargs.get("shift_labels")
        targets = labels if targets is None else targets
        if targets is not None:
            if targets.shape != logits.shape[:-1]:
                raise ValueError(
                    f"labels {list(targets.shape)} need as many logits, but there are {list(logits.shape[:-1])}; "
                    "give a label for each token, and no logits_to_keep"
                )
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return BailingMoeV2Output(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            routing=outputs.routing,
            **{CACHE: outputs.get(CACHE)},
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
        joined = layer.join(self.model.word_embeddings(next_input_ids), hidden_states)
        output, routing = layer(joined, *self.model.prepare(joined, attention_mask, position_ids))
        return layer.final_layernorm(output), routing

    def mtp_logits(self, hidden_states: Tensor, next_input_ids: Tensor, step: int = 0, **kwargs: Any) -> Tensor:
        """Logits [B, T, vocab] of MTP layer `step`: row i predicts token i + 2 + step. Arguments as `mtp_forward`."""
        return self.logits(self.mtp_forward(hidden_states, next_input_ids, step, **kwargs)[0])


class BailingMoeV2ForSequenceClassification(GenericForSequenceClassification, BailingMoeV2PreTrainedModel):
    """BailingMoeV2 with a score for each label instead of the head, read at the last token that is not padding."""

    accepts_loss_kwargs = False  # its loss is a mean; `Trainer` then divides by the accumulated steps itself

    @functools.wraps(GenericForSequenceClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_router_logits"):
            raise ValueError("output_router_logits=True has no place in the scores of labels; ask BailingMoeV2Model")
        return super().forward(*args, **kwargs)


register_with_transformers()
AutoModel.register(BailingMoeV2Config, BailingMoeV2Model, exist_ok=True)
AutoModelForCausalLM.register(BailingMoeV2Config, BailingMoeV2ForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(BailingMoeV2Config, BailingMoeV2ForSequenceClassification, exist_ok=True)
