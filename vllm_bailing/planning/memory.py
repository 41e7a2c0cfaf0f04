"""What a model occupies on each GPU: weights, KV cache and the rest, in whole bytes.

Everything follows from the configuration: no torch, no GPU and no file is needed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

from vllm_bailing.adapters import AdapterSlots
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import told
from vllm_bailing.tensor_names import HEAD_MODULE, layer_tensors, shard_shape
from vllm_bailing.units import GIB, PLAIN_DTYPES, dtype_name

# Plain data types, then those that linear layers can be quantized to; int4 is for the routed experts alone.
DTYPES = (*PLAIN_DTYPES, "fp8", "int8", "int4")
KV_DTYPES = ("auto", "fp8")
_BLOCK = 128  # side of a block of fp8 weights, and size of a group of int4 weights, that share a scale
_VOCABULARY_PADDING = 64  # DEFAULT_VOCAB_PADDING_SIZE of vLLM's VocabParallelEmbedding
_TRIAL_REQUESTS = 1024  # of the run in which vLLM measures what is left for the KV cache


class _Bytes:
    """A dataclass of byte counts that add up."""

    @cached_property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class WeightBytes(_Bytes):
    """Bytes of weights on one GPU, by the part of the model.

    Attributes:
        embedding: The token embedding; 0 where the head is the same tensor.
        head: The output projection onto the vocabulary.
        attention: Linear layers of the attention.
        dense_mlp: MLPs of the layers without experts.
        routed_experts: Experts that the router chooses among.
        shared_experts: Experts that every token passes.
        router: Routers, with their expert biases.
        norms: Norms of the decoder layers, and the final norm.
        mtp: The MTP layers, and their own copy of the embedding if the target has pipeline stages.
        adapters: Slots for LoRA adapters, which are set aside at the start.
    """

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    mtp: int
    adapters: int = 0


@dataclass(frozen=True)
class OtherMemory(_Bytes):
    """Bytes on one GPU that are neither weights nor KV cache: an estimate, as kernels and vLLM releases differ.

    M tokens of the biggest step, K experts per token.

    Attributes:
        moe_workspace: The two buffers of the fused experts, each of M * K rows; with data parallelism, of the tokens
            of all its ranks.
        activations: Eight tensors [M, hidden size], such as residual, norm and the fp32 copy for the router; with data
            parallelism also what comes from all ranks and goes back to them.
        logits: Logits of vLLM's trial run with 1024 requests, in the model's dtype and in fp32.
        cuda_graphs: Captured CUDA graphs.
        context: CUDA's context, NCCL and libraries.
        eplb_buffer: One layer's routed experts, which pass through it when they are rearranged; once more for a draft.
            Source: vLLM, `EplbState.add_model`.
    """

    moe_workspace: int
    activations: int
    logits: int
    cuda_graphs: int
    context: int
    eplb_buffer: int = 0


def plain_dtype(config: BailingMoeV2Config) -> str:
    """Short name of the data type in which vLLM computes unless told otherwise."""
    return "fp16" if dtype_name(getattr(config, "dtype", None)) == "float16" else "bf16"


def stored_dtype(config: BailingMoeV2Config) -> str:
    """Which of `DTYPES` the checkpoint is stored in; if the configuration dequantizes it, what it becomes.

    That of the experts, where a compressed-tensors checkpoint has several.

    Raises:
        ValueError: If its quantization is not known.
    """
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return plain_dtype(config)
    method = quantization.get("quant_method")
    bits, kind = quantization.get("bits"), "int"
    if method == "fp8":
        bits, kind = 8, "float"
    elif method == "compressed-tensors":
        weights = _weights_of(quantization, _AN_EXPERT) or _weights_of(quantization, _A_LINEAR_LAYER)
        bits, kind = (weights.get("num_bits"), weights.get("type", "int")) if weights else (None, "int")
    elif method not in ("gptq", "awq"):
        bits = None
    dtype = _QUANTIZED.get((bits, kind))
    if dtype is None:
        raise ValueError(
            f"quantization_config of config.json (quant_method={method!r}, {bits} bits, {kind}) is not a known one: "
            "fp8, or compressed-tensors, gptq or awq with fp8, int8 or int4; name a checkpoint of another scheme"
        )
    return dtype


def stored_beside_experts(config: BailingMoeV2Config) -> dict[str, str | None]:
    """`linear_dtype` and `head_dtype` of a `Layout` that serves the checkpoint as it is stored.

    Only compressed-tensors says what they are; with other methods, and for a plain head, they are None.
    """
    quantization = getattr(config, "quantization_config", None) or {}
    if quantization.get("quant_method") != "compressed-tensors":
        return {"linear_dtype": None, "head_dtype": None}

    def dtype_of(module: str) -> str | None:
        weights = _weights_of(quantization, module)
        return _QUANTIZED.get((weights.get("num_bits"), weights.get("type", "int"))) if weights else None

    return {"linear_dtype": dtype_of(_A_LINEAR_LAYER) or plain_dtype(config), "head_dtype": dtype_of(HEAD_MODULE)}


# Names of modules that stand for all of their kind.
_AN_EXPERT, _A_LINEAR_LAYER = "model.layers.1.mlp.experts.0.gate_proj", "model.layers.1.attention.dense"
_QUANTIZED = {(8, "float"): "fp8", (8, "int"): "int8", (4, "int"): "int4"}


def _weights_of(quantization: dict[str, Any], module: str) -> dict[str, Any] | None:
    """What compressed-tensors says of the weights of a linear layer or the head; None if they are plain.

    Raises:
        ValueError: If a pattern is none.
    """

    def is_meant(patterns: Any, kind: str = "") -> bool:
        names = [one for one in patterns if isinstance(one, str)] if isinstance(patterns, list) else []
        try:
            return any(re.match(one[3:], module) if one.startswith("re:") else one in (module, kind) for one in names)
        except re.error as error:
            raise ValueError(
                f"quantization_config of config.json has a pattern that is none ({error}) among {told(names)}; take "
                "the config.json that was exported with the weights"
            ) from None

    if is_meant(quantization.get("ignore")):
        return None
    groups = quantization.get("config_groups")
    known = [one for one in groups.values() if isinstance(one, dict)] if isinstance(groups, dict) else []
    named = [one for one in known if is_meant(one.get("targets"))]  # which goes before the kind of layer
    meant = named or [
        one for one in known if module != HEAD_MODULE and is_meant(one.get("targets", ["Linear"]), "Linear")
    ]
    weights = meant[0].get("weights") if meant else None
    return weights if isinstance(weights, dict) else None


def padded_vocabulary(config: BailingMoeV2Config) -> int:
    """Rows that vLLM gives the embedding and the head."""
    return -(-config.vocab_size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING


def _matrix_bytes(rows: int, columns: int, dtype: str) -> int:
    """Bytes of a linear layer's weight [rows, columns] with its scales."""
    if dtype == "fp8":
        return rows * columns + 4 * -(-rows // _BLOCK) * -(-columns // _BLOCK)
    if dtype == "int8":
        return rows * columns + 4 * rows
    if dtype == "int4":
        return rows * -(-columns // 2) + 2 * rows * -(-columns // _BLOCK)
    return rows * columns * _plain_bytes(dtype)


def _plain_bytes(dtype: str) -> int:
    """Bytes of one element that is not quantized, in a model of that dtype."""
    return 4 if dtype == "fp32" else 2


def router_bytes(dtype: str) -> int:
    """Bytes of one router weight: fp32, unless the model computes in bf16, on a GPU. See `BailingMoeV2Gate`."""
    return 4 if dtype in ("fp16", "fp32") else 2


_DENSE_PARTS = ("attention", "dense_mlp", "shared_experts")


def _part_of(names: list[str]) -> str:
    """The part of `WeightBytes` that a layer's tensor belongs to; `names` is its name after the layer's number."""
    if names[:2] == ["mlp", "gate"]:
        return "router"
    if names[0] == "mlp":
        return {"experts": "routed_experts", "shared_experts": "shared_experts"}.get(names[1], "dense_mlp")
    if names[0] == "attention" and names[1] in ("query_key_value", "dense"):
        return "attention"
    return "eh_proj" if names[0] == "eh_proj" else "norms"


@dataclass(frozen=True)
class Part:
    """What one GPU holds of a part of the model.

    Attributes:
        bytes: Bytes of all its tensors.
        elements: Elements of its matrices, which are as many multiplications for each token.
    """

    bytes: int = 0
    elements: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.bytes + other.bytes, self.elements + other.elements)

    def __mul__(self, layers: int) -> Part:
        return Part(self.bytes * layers, self.elements * layers)


def vllm_partition(layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each pipeline stage as vLLM divides them. Source: vLLM, `distributed.utils.get_pp_indices`."""
    partition = [layers // pp] * pp
    for from_end in range(2, layers % pp + 2):
        partition[-from_end] += 1
    return tuple(partition)


class Stage(NamedTuple):
    """A pipeline stage: its index, its first decoder layer, and the layer after its last."""

    index: int
    first: int
    end: int


@dataclass(frozen=True, eq=False)
class Layout:
    """A model divided among GPUs: bytes of any pipeline stage, on one of its ranks.

    A replica is a copy of the model of its own, on `ranks` GPUs: dp times pp times tp. All but the routed experts is
    divided by `tp`, and every data-parallel rank has it once. The routed experts are divided among the dp times tp GPUs
    of a stage: each of them by its width, or as wholes with expert parallelism. Source: vLLM,
    `FusedMoEParallelConfig.make`.

    Attributes:
        dtype: Data type of the weights, one of `DTYPES`.
        kv_dtype: Data type of the KV cache, one of `KV_DTYPES`.
        tp: Tensor-parallel size.
        pp: Number of pipeline stages.
        mtp_layers: Number of MTP layers that draft; 0 without drafts.
        adapters: Slots for LoRA adapters, whose `tp` and `ep` are those of the layout; None without.
        dp: Data-parallel size: ranks with requests and a KV cache of their own.
        expert_parallel: Whether routed experts are divided as wholes.
        redundant_experts: Further copies of routed experts in each layer, over all ranks, for EPLB.
        replicas: Independent copies.
        linear_dtype: Data type of attention, dense MLPs and shared experts. If None, it is `dtype`, and with int4 the
            plain one.
        head_dtype: Data type of the head; the plain one if None.
    """

    config: BailingMoeV2Config
    dtype: str
    kv_dtype: str = "auto"
    tp: int = 1
    pp: int = 1
    mtp_layers: int = 0
    adapters: AdapterSlots | None = None
    dp: int = 1
    expert_parallel: bool = False
    redundant_experts: int = 0
    replicas: int = 1
    linear_dtype: str | None = None
    head_dtype: str | None = None

    @property
    def ranks(self) -> int:
        """GPUs of one replica."""
        return self.dp * self.pp * self.tp

    @property
    def engines(self) -> int:
        """Schedulers with a KV cache of their own, over all replicas."""
        return self.replicas * self.dp

    @property
    def ep(self) -> int:
        """Ranks that the routed experts are divided among as wholes."""
        return self.dp * self.tp if self.expert_parallel else 1

    @property
    def expert_tp(self) -> int:
        """Ranks that each routed expert is divided among."""
        return self.dp * self.tp // self.ep

    @property
    def local_experts(self) -> int:
        """Routed experts of a layer on the rank that has the most, the redundant ones included."""
        return -(-(self.config.num_experts + self.redundant_experts) // self.ep)

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether the ranks of a TP group divide the tokens of an MoE layer, and keep its shared experts whole.

        Source: vLLM, `ParallelConfig.use_sequence_parallel_moe`.
        """
        return self.expert_parallel and self.tp > 1 and self.dp > 1

    @property
    def kv_copies(self) -> int:
        """How often a TP group keeps each key and value: more than once if it has more ranks than KV heads."""
        return max(1, self.tp // self.config.num_key_value_heads)

    @property
    def name(self) -> str:
        """In words, such as "2 replicas of DP 2 x TP 4, EP 8"."""
        parts = [f"DP {self.dp}"] * (self.dp > 1) + [f"TP {self.tp}"]
        one = " x ".join(parts) + (f", EP {self.ep}" if self.expert_parallel else "")
        one += f", {self.pp} pipeline stages" if self.pp > 1 else ""
        return f"{self.replicas} replicas of {one}" if self.replicas > 1 else one

    @cached_property
    def vocabulary(self) -> Part:
        """The embedding, or a head that is not quantized, on one rank."""
        elements = padded_vocabulary(self.config) // self.tp * self.config.hidden_size
        return Part(elements * _plain_bytes(self.dtype), elements)

    @cached_property
    def _head_bytes(self) -> int:
        rows = padded_vocabulary(self.config) // self.tp
        if self.head_dtype is None or self.config.tie_word_embeddings:
            return self.vocabulary.bytes
        return _matrix_bytes(rows, self.config.hidden_size, self.head_dtype)

    @cached_property
    def _linear_dtype(self) -> str | None:
        return self.linear_dtype or (None if self.dtype == "int4" else self.dtype)

    @cached_property
    def kv_bytes_per_layer(self) -> int:
        """Bytes of a token's key and value in one layer, on one rank."""
        heads = max(1, self.config.num_key_value_heads // self.tp)
        return 2 * heads * self.config.head_dim * (1 if self.kv_dtype == "fp8" else _plain_bytes(self.dtype))

    @cached_property
    def _dense_layer(self) -> dict[str, Part]:
        return self.layer_parts(0) if self._all_dense_layers else {}

    @cached_property
    def _moe_layer(self) -> dict[str, Part]:
        layers = self.config.num_hidden_layers
        return self.layer_parts(layers - 1) if self._all_dense_layers < layers else {}

    @cached_property
    def _all_dense_layers(self) -> int:
        return self.config.first_k_dense_replace

    @cached_property
    def _mtp_bytes(self) -> int:
        if not self.mtp_layers:
            return 0
        draft = self.layer_parts(self.config.num_hidden_layers)
        return self.mtp_layers * sum(part.bytes for part in draft.values())

    def layer_parts(self, layer: int) -> dict[str, Part]:
        """Parts of a decoder layer on one rank, by the names of `WeightBytes`; an MTP layer has "eh_proj" as well."""
        parts: dict[str, Part] = {}
        for name, whole in layer_tensors(self.config, layer, experts=1).items():
            names = name.split(".")[3:]
            kind, tp, copies = _part_of(names), self.tp, 1
            if kind == "routed_experts":
                tp, copies = self.expert_tp, self.local_experts
            elif kind == "shared_experts" and self.is_sequence_parallel:
                tp = 1
            shape = shard_shape(self.config, names, whole, tp)
            elements, size = math.prod(shape), _plain_bytes(self.dtype)
            if kind == "router":
                size = 4 if names[2] == "expert_bias" else router_bytes(self.dtype)
            is_matrix = len(shape) == 2
            stored_as = {"routed_experts": self.dtype, **dict.fromkeys(_DENSE_PARTS, self._linear_dtype)}.get(kind)
            stored = _matrix_bytes(*shape, stored_as) if is_matrix and stored_as else elements * size
            parts[kind] = parts.get(kind, Part()) + Part(stored, elements if is_matrix else 0) * copies
        return parts

    def part(self, name: str, stage: Stage) -> Part:
        """A part of `WeightBytes`, summed over the decoder layers of a stage."""
        dense = self._dense_layers(stage)
        moe = stage.end - stage.first - dense
        return self._dense_layer.get(name, Part()) * dense + self._moe_layer.get(name, Part()) * moe

    def _dense_layers(self, stage: Stage) -> int:
        return max(0, min(stage.end, self._all_dense_layers) - stage.first)

    def weights(self, stage: Stage) -> WeightBytes:
        # A search among partitions asks for the same stages again and again.
        key = stage.index == 0, stage.index == self.pp - 1, self._dense_layers(stage), stage.end - stage.first
        if key not in self._weights:
            self._weights[key] = self._weights_of(stage)
        return self._weights[key]

    @cached_property
    def _weights(self) -> dict[tuple[bool, bool, int, int], WeightBytes]:
        """By whether a stage is the first or the last, and its dense and all its layers."""
        return {}

    def _weights_of(self, stage: Stage) -> WeightBytes:
        is_first, is_last = stage.index == 0, stage.index == self.pp - 1
        is_shared = self.config.tie_word_embeddings and is_last
        final_norm = self.config.hidden_size * _plain_bytes(self.dtype)
        own_embedding = self.vocabulary.bytes if self.mtp_layers and self.pp > 1 else 0
        return WeightBytes(
            embedding=self.vocabulary.bytes if is_first and not is_shared else 0,
            head=self._head_bytes if is_last else 0,
            attention=self.part("attention", stage).bytes,
            dense_mlp=self.part("dense_mlp", stage).bytes,
            routed_experts=self.part("routed_experts", stage).bytes,
            shared_experts=self.part("shared_experts", stage).bytes,
            router=self.part("router", stage).bytes,
            norms=self.part("norms", stage).bytes + (final_norm if is_last else 0),
            mtp=self._mtp_bytes + own_embedding if is_last else 0,
            adapters=self._adapter_bytes(stage),
        )

    def _adapter_bytes(self, stage: Stage) -> int:
        if self.adapters is None:
            return 0
        dense, moe = self._adapter_layers
        dense_layers = self._dense_layers(stage)
        ends = self.adapters.embedding_bytes(self.config) if stage.index == 0 else 0
        ends += self.adapters.head_bytes(self.config) if stage.index == self.pp - 1 else 0
        return dense * dense_layers + moe * (stage.end - stage.first - dense_layers) + ends

    @cached_property
    def _adapter_layers(self) -> tuple[int, int]:
        """Bytes of the slots of the first layer and of the last: dense and with experts, if there are both kinds."""
        assert self.adapters is not None
        slots = replace(self.adapters, tp=self.tp, ep=self.ep)
        return slots.layer_bytes(self.config, 0), slots.layer_bytes(self.config, self.config.num_hidden_layers - 1)

    def kv_bytes_per_token(self, stage: Stage) -> int:
        """Bytes of a token's keys and values on one rank, with those of the drafts, which the last stage keeps."""
        drafts = self.mtp_layers if stage.index == self.pp - 1 else 0
        return (stage.end - stage.first + drafts) * self.kv_bytes_per_layer

    def other_memory(self, max_num_batched_tokens: int) -> OtherMemory:
        """What one rank needs beside weights and KV cache, for steps of at most `max_num_batched_tokens`."""
        hidden, width = self.config.hidden_size, self.config.moe_intermediate_size // self.expert_tp
        # Source of the workspace: vLLM, `TritonExperts.workspace_shapes`.
        columns = max(2 * width, hidden) + max(width, hidden)
        gathered = 2 * self.dp if self.dp > 1 else 0
        experts = self._moe_layer.get("routed_experts", Part()).bytes if self.redundant_experts else 0
        return OtherMemory(
            moe_workspace=max_num_batched_tokens * self.dp * self.config.num_experts_per_tok * columns * 2,
            activations=max_num_batched_tokens * hidden * (8 + gathered) * 2,
            logits=_TRIAL_REQUESTS * self.config.vocab_size * (2 + 4),
            cuda_graphs=3 * GIB // 2,
            context=3 * GIB // 2,
            eplb_buffer=experts * (2 if self.mtp_layers else 1),
        )

    def stages(self, partition: tuple[int, ...]) -> list[Stage]:
        """The stages that have `partition` layers each."""
        ends = [sum(partition[: index + 1]) for index in range(self.pp)]
        return [Stage(index, end - partition[index], end) for index, end in enumerate(ends)]

    def tightest(self, partition: tuple[int, ...], budget: int) -> tuple[int, Stage]:
        """The stage with the least room for the KV cache: (tokens, stage).

        Args:
            budget: Bytes of one GPU for weights and KV cache; tokens are negative if the weights do not fit into them.
        """
        return min(
            ((budget - self.weights(stage).total) // self.kv_bytes_per_token(stage), stage)
            for stage in self.stages(partition)
        )

    def balanced_partition(self) -> tuple[int, ...]:
        """Layers of each stage such that the stage with the most bytes of weights has as few as possible."""
        layers = self.config.num_hidden_layers

        @cache
        def best(index: int, first: int) -> tuple[int, tuple[int, ...]]:
            if index == self.pp - 1:
                return self.weights(Stage(index, first, layers)).total, (layers - first,)
            choices = []
            for end in range(first + 1, layers - (self.pp - index - 1) + 1):
                fullest, rest = best(index + 1, end)
                own = self.weights(Stage(index, first, end)).total
                choices.append((max(fullest, own), (end - first, *rest)))
            return min(choices)

        return best(0, 0)[1]
