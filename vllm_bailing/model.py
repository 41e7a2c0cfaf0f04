"""BailingMoeV2 on vLLM's layers: paged attention, fused MoE, rotary embedding, parallel linear layers.

Modules carry the names of the checkpoint, except that `word_embeddings` is `embed_tokens` here, which is what vLLM's
speculative decoding looks for, and that the projections `gate_proj` and `up_proj` are one `gate_up_proj`.

Dimension letters: T tokens of all requests, H hidden size, E routed experts, D head size, V vocabulary; Q query heads
and KV key/value heads of this rank.

Source: inclusionAI/Ling-V2, `modeling_bailing_moe_v2.py`; the interfaces are those of vLLM.
"""

# No postponed annotations in this file: vLLM's compile decorator reads them as types.
from collections.abc import Iterable
from itertools import islice, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig, get_current_vllm_config
from vllm.distributed.communication_op import tensor_model_parallel_all_gather, tensor_model_parallel_reduce_scatter
from vllm.distributed.parallel_state import get_ep_group, get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, MoERunner
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import (
    EagleModelMixin,
    MixtureOfExperts,
    SupportsEagle,
    SupportsEagle3,
    SupportsLoRA,
    SupportsPP,
    SupportsQuant,
)
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
    sequence_parallel_chunk,
)
from vllm.sequence import IntermediateTensors

from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import DEQUANTIZE, CheckpointError
from vllm_bailing.plugin.agreement import check_ranks_agree
from vllm_bailing.plugin.checks import adding_the_remedy
from vllm_bailing.plugin.kernels import avx2
from vllm_bailing.plugin.kernels.cpu import use_cpu_kernels
from vllm_bailing.plugin.kernels.cpu_attention import Passes, attends_in_one
from vllm_bailing.plugin.kernels.cpu_experts import heed_expert_map
from vllm_bailing.plugin.kernels.cpu_layer import in_two_operations, may_be_two_operations, weights_of_layer
from vllm_bailing.plugin.kernels.cpu_quantized import offer_quantized_layers
from vllm_bailing.plugin.kernels.qk_norm_rope import fused_qk_norm_rope_for
from vllm_bailing.plugin.lora import experts_take_adapters
from vllm_bailing.plugin.options import keeps_sequence_parallel
from vllm_bailing.plugin.patches import (
    experts_without_lora,
    hide_exchange_from_compiler,
    patch_for_model,
    repack_experts_on_reload,
)
from vllm_bailing.plugin.shims import (
    collect_aux_hidden_states,
    local_logits,
    pack_aux_hidden_states,
    rope_parameters,
    skipping_padding,
    spec_decode_needs_target_embed,
)
from vllm_bailing.plugin.weight_loading import WeightLoading
from vllm_bailing.router import BailingMoeV2Gate, routing_rule
from vllm_bailing.tensor_names import EMBEDDING, HEAD, SCORE, layer_of


class BailingMoeV2Attention(nn.Module):
    """Grouped-query attention with a fused projection `[q | k | v]` and norms on q and k before the rotary."""

    def __init__(
        self,
        config: BailingMoeV2Config,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        if config.num_attention_heads % tp_size:
            raise ValueError(
                f"tensor_parallel_size={tp_size} must divide num_attention_heads={config.num_attention_heads}; "
                "choose another --tensor-parallel-size"
            )
        self.head_dim = config.head_dim
        self.query_key_value = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.use_qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.query_key_value",
        )
        # Per rank; with fewer key/value heads than ranks every rank keeps a copy of one.
        self.num_heads, self.num_kv_heads = self.query_key_value.num_heads, self.query_key_value.num_kv_heads
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        else:
            self.query_layernorm = self.key_layernorm = nn.Identity()
        self.dense = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=config.use_bias,
            quant_config=quant_config,
            reduce_results=reduce_results,
            prefix=f"{prefix}.dense",
        )
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            is_neox_style=True,
            rope_parameters=rope_parameters(config.rope_parameters),
        )
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )
        self.fused_qk_norm_rope = fused_qk_norm_rope_for(self, get_current_vllm_config())
        self.norm_and_rotate = self._in_one_kernel if self.fused_qk_norm_rope else self._layer_by_layer
        self.attends_in_one = attends_in_one(self, get_current_vllm_config())
        self.place = 0  # among the model's layers that do; see `Passes`

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output [T, H] for positions [T] and hidden states [T, H]; this rank's summand without `reduce_results`."""
        qkv, _ = self.query_key_value(hidden_states)  # [T, (Q + 2 KV) D]
        attend = self._attend_in_one if self.attends_in_one else self._attend
        output, _ = self.dense(attend(positions, qkv))  # [T, H]
        return output

    def _attend(self, positions: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = self.norm_and_rotate(positions, qkv)  # [T, Q D], [T, KV D], [T, KV D]
        return self.attn(q, k, v)

    def _attend_in_one(self, positions: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        return avx2.attention(qkv, *self.arguments(positions))

    def arguments(self, positions: torch.Tensor) -> tuple[Any, ...]:
        """Those of `avx2.attention` beside queries, keys and values."""
        return (
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.query_layernorm.variance_epsilon,
            self.query_layernorm.weight,
            self.key_layernorm.weight,
            self.rotary_emb.cos_sin_cache,
            positions,
            self.attn.impl.scale,
            self.place,
        )

    def _layer_by_layer(self, positions: torch.Tensor, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = qkv.split((self.q_size, self.kv_size, self.kv_size), dim=-1)
        q = self.query_layernorm(q.view(-1, self.num_heads, self.head_dim)).view(q.shape)
        k = self.key_layernorm(k.view(-1, self.num_kv_heads, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        return q, k, v

    def _in_one_kernel(self, positions: torch.Tensor, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        is_neox = True  # halves are rotated, not neighbors
        assert self.fused_qk_norm_rope is not None
        self.fused_qk_norm_rope(  # changes q and k in place
            qkv,
            self.num_heads,
            self.num_kv_heads,
            self.num_kv_heads,
            self.head_dim,
            self.query_layernorm.variance_epsilon,
            self.query_layernorm.weight,
            self.key_layernorm.weight,
            self.rotary_emb.cos_sin_cache,
            is_neox,
            positions,
        )
        return qkv.split((self.q_size, self.kv_size, self.kv_size), dim=-1)


class BailingMoeV2MLP(nn.Module):
    """SwiGLU feed-forward block. It has no biases whatever `use_bias` says."""

    def __init__(
        self,
        config: BailingMoeV2Config,
        intermediate_size: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        reduce_results: bool = True,
        replicated: bool = False,
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size,
            [intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            disable_tp=replicated,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            reduce_results=reduce_results,
            disable_tp=replicated,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class BailingMoeV2MoE(nn.Module):
    """Routed experts chosen by group-limited top-k of sigmoid scores, plus shared experts that see every token.

    How they are chosen: `router.py`.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: BailingMoeV2Config,
        prefix: str,
    ) -> None:
        super().__init__()
        parallel_config, quant_config = vllm_config.parallel_config, vllm_config.quant_config
        self.num_redundant_experts = parallel_config.eplb_config.num_redundant_experts
        self.num_physical_experts = config.num_experts + self.num_redundant_experts
        self.num_local_physical_experts = self.num_physical_experts // get_ep_group().world_size
        self.is_sequence_parallel = parallel_config.use_sequence_parallel_moe
        self.gate = BailingMoeV2Gate(config, vllm_config, prefix=f"{prefix}.gate")
        self.shared_experts = (
            BailingMoeV2MLP(
                config,
                config.shared_expert_intermediate_size,
                quant_config,
                prefix=f"{prefix}.shared_experts",
                reduce_results=False,
                replicated=self.is_sequence_parallel,
            )
            if config.num_shared_experts
            else None
        )
        with experts_without_lora(experts_take_adapters(vllm_config, f"{prefix}.experts")):
            self.experts: MoERunner = FusedMoEFactory(
                num_experts=config.num_experts,
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
                quant_config=quant_config,
                prefix=f"{prefix}.experts",
                **routing_rule(config, self.gate, vllm_config),
                enable_eplb=parallel_config.enable_eplb,
                num_redundant_experts=self.num_redundant_experts,
                is_sequence_parallel=self.is_sequence_parallel,
                **skipping_padding(),
                router_logits_dtype=torch.float32,
                # The runner evaluates the gate: next to the shared experts, and past what torch.compile would freeze.
                gate=self.gate,
                shared_experts=self.shared_experts,
            )
        repack_experts_on_reload(self.experts.routed_experts)
        hide_exchange_from_compiler(self.experts, parallel_config)

    def forward(self, hidden_states: torch.Tensor, is_part: bool = False) -> torch.Tensor:
        """Output for hidden states [T, H], or for this rank's part of them, see `_own_part`."""
        divides = self.is_sequence_parallel and not is_part
        own = sequence_parallel_chunk(hidden_states) if divides else hidden_states
        # The runner holds the gate and replaces what is given as logits.
        output = self.experts(hidden_states=own, router_logits=own)
        return _whole(output, hidden_states.shape[0]) if divides else output


def _own_part(summand: torch.Tensor) -> torch.Tensor:
    """This rank's tokens [ceil(T / ranks), H], as `sequence_parallel_chunk` cuts them, of the sum of all `summand`."""
    missing = -summand.shape[0] % get_tensor_model_parallel_world_size()
    return tensor_model_parallel_reduce_scatter(F.pad(summand, (0, 0, 0, missing)), 0)


def _whole(part: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The parts of all ranks, [T, H]."""
    return tensor_model_parallel_all_gather(part, 0)[:num_tokens]


class BailingMoeV2DecoderLayer(nn.Module):
    """Attention and feed-forward block, each after a norm that also adds to the residual stream.

    Attributes:
        gets_part: Whether both streams come as this rank's part of the tokens.
        leaves_part: Whether they go so.
    """

    def __init__(
        self, vllm_config: VllmConfig, config: BailingMoeV2Config, prefix: str, may_leave_part: bool = False
    ) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        has_experts = extract_layer_index(prefix) >= config.first_k_dense_replace
        self.gets_part, self.leaves_part = False, may_leave_part and has_experts
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = BailingMoeV2Attention(
            config,
            vllm_config.cache_config,
            quant_config,
            prefix=f"{prefix}.attention",
            reduce_results=not self.leaves_part,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: nn.Module
        if has_experts:
            self.mlp = BailingMoeV2MoE(vllm_config, config, prefix=f"{prefix}.mlp")
        else:
            self.mlp = BailingMoeV2MLP(config, config.intermediate_size, quant_config, prefix=f"{prefix}.mlp")
        self.config = config
        self.may_be_two_operations = has_experts and may_be_two_operations(self, vllm_config)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = weights_of_layer(self) if self.may_be_two_operations else None
        if weights is not None:
            return in_two_operations(self, weights, positions, hidden_states, residual)
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        if self.gets_part:
            hidden_states = _whole(hidden_states, positions.shape[0])
        hidden_states = self.attention(positions, hidden_states)
        if self.leaves_part:
            hidden_states = _own_part(hidden_states)
            residual = residual if self.gets_part else sequence_parallel_chunk(residual)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        output = self.mlp(hidden_states, is_part=True) if self.leaves_part else self.mlp(hidden_states)
        return output, residual


@support_torch_compile
class BailingMoeV2Model(nn.Module, EagleModelMixin):
    """Embedding, this pipeline stage's decoder layers, final norm."""

    supports_aux_hidden_states_over_pp = True
    # Expert tensors are not here: the MoE runner maps its own.
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".mlp.gate_proj.": (".mlp.gate_up_proj.", 0),
            ".mlp.up_proj.": (".mlp.gate_up_proj.", 1),
            ".shared_experts.gate_proj.": (".shared_experts.gate_up_proj.", 0),
            ".shared_experts.up_proj.": (".shared_experts.gate_up_proj.", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: BailingMoeV2Config = vllm_config.model_config.hf_config
        self.config, self.quant_config = config, vllm_config.quant_config
        pp_group = get_pp_group()
        self.embed_tokens = (
            VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "embed_tokens"),
            )
            if pp_group.is_first_rank
            or (config.tie_word_embeddings and pp_group.is_last_rank)
            or spec_decode_needs_target_embed(vllm_config)
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: BailingMoeV2DecoderLayer(
                vllm_config, config, prefix, may_leave_part=keeps_sequence_parallel(vllm_config)
            ),
            prefix=maybe_prefix(prefix, "layers"),
        )
        own = [layer for layer in self.layers if isinstance(layer, BailingMoeV2DecoderLayer)]  # of this stage
        for before, layer in pairwise(own):
            layer.gets_part = before.leaves_part
        self.leaves_part = bool(own) and own[-1].leaves_part
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if pp_group.is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]

        # Only a draft model of the EAGLE-3 kind asks for hidden states on the way.
        aux_hidden_states: list[torch.Tensor] = []
        if get_pp_group().is_first_rank:  # else the stage before has added it
            self._maybe_add_hidden_state(aux_hidden_states, 0, hidden_states, residual)
        for index, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), self.start_layer + 1):
            hidden_states, residual = layer(positions, hidden_states, residual)
            self._maybe_add_hidden_state(aux_hidden_states, index, hidden_states, residual)
            if layer.leaves_part and index in self.aux_hidden_state_layers:
                aux_hidden_states[-1] = _whole(aux_hidden_states[-1], positions.shape[0])

        if not get_pp_group().is_last_rank:
            if self.leaves_part:
                hidden_states = _whole(hidden_states, positions.shape[0])
                residual = _whole(residual, positions.shape[0])
            passed_on = pack_aux_hidden_states(self, aux_hidden_states)
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual, **passed_on})
        hidden_states, _ = self.norm(hidden_states, residual)
        if self.leaves_part:
            hidden_states = _whole(hidden_states, positions.shape[0])
        aux_hidden_states = [*collect_aux_hidden_states(self, intermediate_tensors), *aux_hidden_states]
        return (hidden_states, aux_hidden_states) if aux_hidden_states else hidden_states

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def normalized_head(config: BailingMoeV2Config, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The head [V, H] as it multiplies: with `norm_head`, columns of unit length over the whole vocabulary."""
    return F.normalize(weight.float(), dim=0, eps=1e-7).to(dtype) if config.norm_head else weight


class BailingMoeV2MixtureOfExperts(MixtureOfExperts):
    """What vLLM's expert load balancing (EPLB) needs to know of a model; target and draft models share it."""

    def collect_moe_layers(self, layers: Iterable[nn.Module], config: BailingMoeV2Config) -> None:
        """Enumerate the MoE layers of this rank's pipeline stage."""
        self.moe_mlps = [mlp for layer in layers for mlp in layer.children() if isinstance(mlp, BailingMoeV2MoE)]
        self.moe_layers = [mlp.experts for mlp in self.moe_mlps]
        self.expert_weights = []
        self.num_moe_layers = len(self.moe_layers)
        self.num_expert_groups = config.n_group
        self.num_logical_experts = self.num_routed_experts = config.num_experts
        self.num_shared_experts = config.num_shared_experts
        # A pipeline stage of dense layers has no MoE layer to ask; it balances nothing either.
        example = self.moe_mlps[0] if self.moe_mlps else None
        self.num_redundant_experts = example.num_redundant_experts if example else 0
        self.num_physical_experts = example.num_physical_experts if example else config.num_experts
        self.num_local_physical_experts = example.num_local_physical_experts if example else config.num_experts

    def update_physical_experts_metadata(self, num_physical_experts: int, num_local_physical_experts: int) -> None:
        self.num_physical_experts = num_physical_experts
        self.num_local_physical_experts = num_local_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts
        for mlp in self.moe_mlps:
            mlp.num_physical_experts = num_physical_experts
            mlp.num_local_physical_experts = num_local_physical_experts
            mlp.num_redundant_experts = self.num_redundant_experts
            mlp.experts.update_expert_map()


class BailingMoeV2ForCausalLM(
    nn.Module,
    SupportsPP,
    SupportsLoRA,
    SupportsEagle,
    SupportsEagle3,
    SupportsQuant,
    BailingMoeV2MixtureOfExperts,
):
    """BailingMoeV2 with its language-model head.

    Raises:
        CheckpointError: From `load_weights`, if the checkpoint does not fit the configuration.
    """

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.word_embeddings.": "model.embed_tokens."})
    packed_modules_mapping = {
        "query_key_value": ["query_key_value"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: BailingMoeV2Config = vllm_config.model_config.hf_config
        self.config, self.vllm_config = config, vllm_config
        self.quant_config = vllm_config.quant_config
        patch_for_model(vllm_config)
        check_ranks_agree(vllm_config, type(self))
        offer_quantized_layers(vllm_config)
        with adding_the_remedy(vllm_config):
            self.model = BailingMoeV2Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=self.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if config.tie_word_embeddings and isinstance(self.lm_head, ParallelLMHead):  # pooling models have none
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        else:
            self.lm_head = PPMissingLayer()
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.collect_moe_layers(self.model.layers, config)
        # An adapter trained on a checkpoint with MTP layers may change them too; drafts need no adapter to be right.
        skipped = [f"model.layers.{layer}." for layer in config.mtp_layer_ids]
        self.lora_skip_prefixes = skipped  # pyright: ignore[reportAttributeAccessIssue]
        self.weight_loading = WeightLoading(self, vllm_config, self._audit_of, self._load)
        use_cpu_kernels(self, self.lm_head, vllm_config)
        self.passes = Passes(self.model)
        heed_expert_map(self, vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        with self.passes.running():
            return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [T, V] of hidden states [T, H] after the final norm, on the rank that gathers them."""
        self.weight_loading.check_complete()
        return self.logits_processor(self.lm_head, hidden_states)

    def compute_logits_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """This rank's part of the logits [T, V / ranks], for vLLM's `--enable-batch-sharded-sampling`."""
        self.weight_loading.check_complete()
        return local_logits(self.logits_processor, self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, under the names of the published checkpoints.

        The first call must bring everything; later ones (a trainer updating the model) may bring a part.
        """
        return self.weight_loading.load(weights)

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(self._with_head(weights), mapper=self.hf_to_vllm_mapper)

    def is_unused_checkpoint_weight(self, name: str) -> bool:
        """Files with nothing but such tensors are not even read, by vLLM 0.32 and newer."""
        # A head beside a tied embedding is compared with it.
        return name != HEAD and self.weight_loading.audit.skip_rule(name) is not None

    def _is_of_this_rank(self, name: str) -> bool:
        layer = layer_of(name)
        if layer is not None:
            return self.model.start_layer <= layer < self.model.end_layer
        module = self.model.embed_tokens if name == EMBEDDING else self.model.norm  # the head is where the norm is
        return not isinstance(module, PPMissingLayer)

    def _audit_of(self) -> Audit:
        # vLLM makes a pooling model of this class without the head, and may give it one of its own.
        is_generating = isinstance(self.lm_head, ParallelLMHead) or not get_pp_group().is_last_rank
        return Audit.of_target(
            self.config,
            is_here=self._is_of_this_rank,
            head=HEAD if is_generating else SCORE if hasattr(self, "score") else "",
            quantized=self.quant_config is not None,
            folder=self.vllm_config.model_config.model,
            may_lack_experts=self.vllm_config.parallel_config.enable_expert_parallel,
        )

    def _with_head(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name.startswith("lm_head."):
                self._check_head(name, tensor)
            if name == HEAD:
                tensor = normalized_head(self.config, tensor, self.vllm_config.model_config.dtype)
            yield name, tensor

    def _check_head(self, name: str, tensor: torch.Tensor) -> None:
        if self.config.norm_head and (name != HEAD or tensor.itemsize == 1):
            raise CheckpointError(
                "the head is quantized, and norm_head=true in config.json normalizes it while it loads, which takes "
                f"floats; {DEQUANTIZE}"
            )
        if isinstance(self.lm_head, ParallelLMHead) and not hasattr(self.lm_head, name.rpartition(".")[2]):
            raise CheckpointError(
                f"{name} says that the head is quantized, and by quantization_config of config.json vLLM takes it for "
                'a plain one (of compressed-tensors, "Linear" does not mean the head: a group has to have "lm_head" '
                f"among its targets); {DEQUANTIZE}"
            )
