"""The multi-token prediction (MTP) layer of BailingMoeV2 as a draft model for vLLM's speculative decoding.

Row i of the draft's input pairs the target's hidden state of token i, after its final norm, with the embedding of
token i + 1; row i of its output predicts token i + 2. Embedding and head are the target's.

Source: inclusionAI/Ling-V2, `modeling_bailing_moe_v2.py`, class `BailingMoeV2MTPLayer`; the interface is what
`vllm.v1.spec_decode` and `vllm.v1.worker.gpu.spec_decode` ask of a draft model.
"""

# No postponed annotations in this file: vLLM's compile decorator reads them as types.
import contextlib
import copy
from collections.abc import Iterable

import torch
from safetensors import safe_open
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    get_draft_quant_config,
    make_empty_intermediate_tensors_factory,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import CheckpointError
from vllm_bailing.model import (
    BailingMoeV2DecoderLayer,
    BailingMoeV2ForCausalLM,
    BailingMoeV2MixtureOfExperts,
    BailingMoeV2Model,
    normalized_head,
)
from vllm_bailing.plugin.checks import adding_the_remedy
from vllm_bailing.plugin.kernels.cpu import use_cpu_kernels
from vllm_bailing.plugin.kernels.cpu_attention import Passes
from vllm_bailing.plugin.kernels.cpu_experts import heed_expert_map
from vllm_bailing.plugin.kernels.cpu_quantized import offer_quantized_layers
from vllm_bailing.plugin.options import draft_vocabulary
from vllm_bailing.plugin.shims import takes_a_part_of_the_files
from vllm_bailing.plugin.weight_loading import WeightLoading
from vllm_bailing.tensor_names import EMBEDDING, HEAD, layer_of


class DraftHead(nn.Module):
    """Rows of the target's head for a part of the vocabulary; the draft proposes no other token.

    What the target accepts, and so every answer, stays the same. Saves bandwidth: the head is most of what a draft
    reads.
    """

    token_ids: torch.Tensor

    def __init__(self, vllm_config: VllmConfig, token_ids: list[int], prefix: str) -> None:
        super().__init__()
        config: BailingMoeV2Config = vllm_config.model_config.hf_config
        assert vllm_config.speculative_config is not None
        self.config, self.target = config, vllm_config.speculative_config.target_model_config
        self.rows = token_ids
        self.head = ParallelLMHead(len(token_ids), config.hidden_size, prefix=f"{prefix}.head")
        self.logits_processor = LogitsProcessor(len(token_ids))
        self.register_buffer("token_ids", torch.tensor(token_ids), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits [T, vocab], minus infinity for tokens that are never proposed."""
        logits = self.logits_processor(self.head, hidden_states)
        if logits is None:
            return None
        return logits.new_full((len(logits), self.config.vocab_size), -torch.inf).index_copy_(1, self.token_ids, logits)

    def get_top_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Most likely token [T] of those that may be proposed."""
        return self.token_ids[self.logits_processor.get_top_tokens(self.head, hidden_states)]

    def load_from_target(self) -> None:
        """Read the rows from the target's files, which are there: it was loaded before."""
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        stored = Checkpoint.of(self.target).published(self.config).tensors.get(name)
        if stored is None:
            raise CheckpointError(
                f"a draft vocabulary needs {name} in safetensors files on this machine, and {self.target.model} has "
                "none; leave bailing_draft_vocab out of --additional-config"
            )
        with contextlib.ExitStack() as files:
            stored_weight = stored.read(lambda path: files.enter_context(safe_open(path, framework="pt")))
        weight = normalized_head(self.config, stored_weight, self.target.dtype)
        self.head.weight_loader(self.head.weight, weight[self.rows])


class BailingMoeV2MTPLayer(BailingMoeV2DecoderLayer):
    """A decoder layer over a hidden state joined with the next token's embedding."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config: BailingMoeV2Config = vllm_config.model_config.hf_config
        super().__init__(vllm_config, config, prefix)
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # The vendor's exporter quantizes everything around this projection and says so nowhere.
        name = f"{prefix}.eh_proj"
        is_quantized = Checkpoint.of(vllm_config.model_config).published(config).has_scales(name)
        self.eh_proj = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config if is_quantized else None,
            prefix=name,
        )
        self.final_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, next_embeds: torch.Tensor) -> torch.Tensor:
        """Returns [T, H] after the layer's own final norm, for tensors [T], [T, H] and [T, H]."""
        joined, _ = self.eh_proj(torch.cat((self.enorm(next_embeds), self.hnorm(hidden_states)), dim=-1))
        output, residual = super().forward(positions, joined, None)
        output, _ = self.final_layernorm(output, residual)
        return output


def _has_one_layer(vllm_config: VllmConfig) -> bool:
    return len(vllm_config.model_config.hf_config.mtp_layer_ids) == 1


# A compiled graph keeps the layer that it was traced with. The embedding belongs inside: CUDA graphs read their inputs
# from where vLLM keeps its own buffers, which an embedding computed outside is not.
@support_torch_compile(enable_if=_has_one_layer)
class BailingMoeV2MTPStack(nn.Module):
    """The MTP layers, under their numbers in the checkpoint, and the embedding they share with the target."""

    hf_to_vllm_mapper = BailingMoeV2Model.hf_to_vllm_mapper

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: BailingMoeV2Config = vllm_config.model_config.hf_config
        self.layer_ids = config.mtp_layer_ids
        # vLLM puts the target's embedding here, unless that is on another pipeline stage.
        self.embed_tokens: nn.Module = PPMissingLayer()
        if get_pp_group().world_size > 1:
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "embed_tokens"),
            )
        self.layers = nn.ModuleDict(
            {
                str(layer): BailingMoeV2MTPLayer(
                    vllm_config=vllm_config, prefix=maybe_prefix(prefix, f"layers.{layer}")
                )
                for layer in self.layer_ids
            }
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # Steps past the last layer run it again.
        layer = self.layers[str(self.layer_ids[min(spec_step_idx, len(self.layer_ids) - 1)])]
        return layer(positions, hidden_states, inputs_embeds)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _of_the_draft(vllm_config: VllmConfig) -> VllmConfig:
    """`vllm_config` with the draft's model and quantization, where vLLM leaves the target's."""
    assert vllm_config.speculative_config is not None
    own = copy.copy(vllm_config)  # the layers register in the parts that both share
    own.model_config = vllm_config.speculative_config.draft_model_config
    own.quant_config = get_draft_quant_config(vllm_config)
    if own.quant_config is not None:
        configure_quant_config(own.quant_config, BailingMoeV2MTPModel)
    return own


class BailingMoeV2MTPModel(nn.Module, SupportsPP, BailingMoeV2MixtureOfExperts):
    """Draft model of `--speculative-config '{"method": "mtp", ...}'`.

    Raises:
        CheckpointError: From `load_weights`, if the checkpoint lacks an MTP layer or its tensors do not fit.
    """

    hf_to_vllm_mapper = BailingMoeV2ForCausalLM.hf_to_vllm_mapper
    packed_modules_mapping = BailingMoeV2ForCausalLM.packed_modules_mapping

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        vllm_config = _of_the_draft(vllm_config)
        config: BailingMoeV2Config = vllm_config.model_config.hf_config
        self.config, self.vllm_config = config, vllm_config
        self.quant_config = vllm_config.quant_config
        offer_quantized_layers(vllm_config)
        with adding_the_remedy(vllm_config):
            self.model = BailingMoeV2MTPStack(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module = PPMissingLayer()  # vLLM puts the target's here
        self.logits_processor = LogitsProcessor(config.vocab_size)
        draft_ids = draft_vocabulary(vllm_config)
        self.draft_head = DraftHead(vllm_config, draft_ids, maybe_prefix(prefix, "draft_head")) if draft_ids else None
        self.collect_moe_layers(self.model.layers.values(), config)
        # The draft is whole on the last stage, but vLLM asks for this wherever the target has stages.
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )
        has_embedding = get_pp_group().world_size > 1  # the target's is on another stage then
        if has_embedding:
            self.has_own_embed_tokens = True  # vLLM asks whether the attribute is there
        audit = Audit.of_draft(
            config,
            has_embedding=has_embedding,
            quantized=self.quant_config is not None,
            folder=vllm_config.model_config.model,
            may_lack_experts=vllm_config.parallel_config.enable_expert_parallel,
        )
        # The other files of a large target would be read from disk a second time.
        files = (
            Checkpoint.of(vllm_config.model_config)
            .published(config)
            .files_with(lambda name: name in audit.expected or layer_of(name) in config.mtp_layer_ids)
        )
        self.allow_patterns_overrides = [files] if files and takes_a_part_of_the_files() else None
        self.weight_loading = WeightLoading(self, vllm_config, lambda: audit, self._load)
        use_cpu_kernels(self, self.draft_head.head if self.draft_head else self.lm_head, vllm_config)
        self.passes = Passes(self.model)
        heed_expert_map(self, vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> torch.Tensor:
        """Returns [T, H], input of `compute_logits` and of the next step.

        Args:
            input_ids: [T]; row i holds the token that follows row i's hidden state.
            positions: [T], of the hidden states.
            hidden_states: [T, H] after the target's final norm, or this method's result for the step before.
        """
        with self.passes.running():
            return self.model(input_ids, positions, hidden_states, inputs_embeds, spec_step_idx)

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor | None:
        if self.draft_head is not None:
            return self.draft_head(hidden_states)
        return self.logits_processor(self.lm_head, hidden_states)

    def get_top_tokens(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor:
        """Most likely token [T], for `use_local_argmax_reduction`: ranks exchange two numbers instead of logits."""
        if self.draft_head is not None:
            return self.draft_head.get_top_tokens(hidden_states)
        return self.logits_processor.get_top_tokens(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the MTP layers of a checkpoint; what belongs to the target is passed over. As that of the target."""
        is_start = not self.weight_loading.is_running
        loaded = self.weight_loading.load(weights)
        if self.draft_head is not None and is_start:
            self.draft_head.load_from_target()
            loaded.add("draft_head.head.weight")
        return loaded

    def _load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
