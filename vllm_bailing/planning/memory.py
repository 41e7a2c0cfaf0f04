"""What a model occupies on each GPU: weights, KV cache and the rest, in whole bytes.

Everything follows from the configuration: no torch, no GPU and no file is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cache

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.gpus import Gpu
from vllm_bailing.units import GIB, PLAIN_DTYPES
from vllm_bailing.weights import Shape, layer_tensors

# Plain layers; then what linear layers are quantised to. int4 is of the routed experts alone.
DTYPES = (*PLAIN_DTYPES, "fp8", "int8", "int4")
KV_DTYPES = ("auto", "fp8")
_BLOCK = 128  # side of a block of fp8 weights, and size of a group of int4 weights, that share a scale
_VOCABULARY_PADDING = 64  # DEFAULT_VOCAB_PADDING_SIZE of vLLM's VocabParallelEmbedding


class _Bytes:
    """A dataclass of byte counts that add up."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class WeightBytes(_Bytes):
    """Bytes of weights on one GPU.

    Attributes:
        embedding: 0 where it is the head as well.
        router: With the expert biases.
        mtp: The draft's layers, and its own copy of the embedding where the target has pipeline stages.
    """

    embedding: int = 0
    head: int = 0
    attention: int = 0
    dense_mlp: int = 0
    routed_experts: int = 0
    shared_experts: int = 0
    router: int = 0
    norms: int = 0
    mtp: int = 0


@dataclass(frozen=True)
class OtherMemory(_Bytes):
    """Bytes on one GPU that are neither weights nor KV cache. An estimate: kernels and vLLM releases differ in it.

    Attributes:
        moe_workspace: Two buffers of the fused experts, of M * K rows.
        activations: Eight tensors [M, hidden size], such as residual, norm and the fp32 copy for the router.
        logits: Of the sampler's trial run with 1024 requests, in the model's dtype and in fp32.
        cuda_graphs: Captured graphs.
        context: CUDA, NCCL and libraries.
    """

    moe_workspace: int
    activations: int
    logits: int
    cuda_graphs: int
    context: int


@dataclass(frozen=True)
class Bound:
    """What one decoding step of `batch` requests takes at least, and so the most that a deployment can reach.

    Attributes:
        batch: Requests at once.
        step_bytes: Read per GPU of the busiest pipeline stage: weights, KV cache.
        step_flops: Computed there.
        tokens_per_s: Of all requests together, without drafts.
        limit: "bandwidth" or "compute".
    """

    batch: int
    step_bytes: int
    step_flops: int
    tokens_per_s: float
    limit: str


def plain_dtype(config: BailingMoeV2Config) -> str:
    """The dtype in which vLLM computes by default."""
    written = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return "fp16" if written == "float16" else "bf16"


def stored_dtype(config: BailingMoeV2Config) -> str:
    """What of `DTYPES` the checkpoint is stored in, or what it becomes if the configuration dequantises it."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return plain_dtype(config)
    method = quantization.get("quant_method")
    bits, kind = quantization.get("bits"), "int"
    if method == "fp8":
        bits, kind = 8, "float"
    elif method == "compressed-tensors":
        groups = [group.get("weights") or {} for group in quantization.get("config_groups", {}).values()]
        bits, kind = (groups[0].get("num_bits"), groups[0].get("type", "int")) if groups else (None, "int")
    elif method not in ("gptq", "awq"):
        bits = None
    found = {(8, "float"): "fp8", (8, "int"): "int8", (4, "int"): "int4"}.get((bits, kind))
    if found is None:
        raise ValueError(
            f"quantization_config of config.json (quant_method={method!r}, {bits} bits, {kind}) is not one that is "
            "known: fp8, or compressed-tensors, gptq or awq with fp8, int8 or int4; name a checkpoint of another scheme"
        )
    return found


def padded_vocabulary(config: BailingMoeV2Config) -> int:
    return -(-config.vocab_size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING


def other_memory(config: BailingMoeV2Config, tp: int, max_num_batched_tokens: int) -> OtherMemory:
    hidden, width = config.hidden_size, config.moe_intermediate_size // tp
    # Source of the workspace: vLLM, `TritonExperts.workspace_shapes`.
    columns = max(2 * width, hidden) + max(width, hidden)
    return OtherMemory(
        moe_workspace=max_num_batched_tokens * config.num_experts_per_tok * columns * 2,
        activations=max_num_batched_tokens * hidden * 8 * 2,
        logits=1024 * config.vocab_size * (2 + 4),
        cuda_graphs=3 * GIB // 2,
        context=3 * GIB // 2,
    )


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
    return 4 if dtype == "fp32" else 2


def router_bytes(dtype: str) -> int:
    """Bytes of one router weight: fp32, unless the model computes in bf16, on a GPU. See `BailingMoeV2Gate`."""
    return 4 if dtype in ("fp16", "fp32") else 2


@dataclass(frozen=True)
class Part:
    """What one layer has of a part of the model on one GPU: bytes, and elements of its matrices."""

    bytes: int = 0
    elements: int = 0

    def __add__(self, other: Part) -> Part:
        return Part(self.bytes + other.bytes, self.elements + other.elements)


def _own_shape(config: BailingMoeV2Config, names: list[str], shape: Shape, tp: int) -> Shape:
    """Shape that one of `tp` ranks keeps of a layer's tensor; `names` are the dotted parts behind the layer's number.

    Norms, router and `eh_proj` are whole on every rank, as is the bias of a layer that is divided by its inputs.
    """
    if names[1:2] == ["query_key_value"]:
        heads = config.num_attention_heads // tp + 2 * max(1, config.num_key_value_heads // tp)
        return (heads * config.head_dim, *shape[1:])
    if names[-2:] in (["gate_proj", "weight"], ["up_proj", "weight"]):
        return (shape[0] // tp, shape[1])
    if names[-2:] in (["down_proj", "weight"], ["dense", "weight"]):
        return (shape[0], shape[1] // tp)
    return shape


def layer_parts(config: BailingMoeV2Config, layer: int, dtype: str, tp: int) -> dict[str, Part]:
    """Parts of a decoder layer on one rank, by the names of `WeightBytes`."""
    parts: dict[str, Part] = {}
    for name, whole in layer_tensors(config, layer).items():
        names = name.split(".")[3:]
        shape = _own_shape(config, names, whole, tp)
        elements, size = math.prod(shape), _plain_bytes(dtype)
        if names[:2] == ["mlp", "gate"]:
            part, size = "router", 4 if names[2] == "expert_bias" else router_bytes(dtype)
        elif names[0] == "mlp":
            part = {"experts": "routed_experts", "shared_experts": "shared_experts"}.get(names[1], "dense_mlp")
        elif names[0] == "attention" and names[1] in ("query_key_value", "dense"):
            part = "attention"
        else:
            part = "eh_proj" if names[0] == "eh_proj" else "norms"
        found = Part(elements * size, elements if len(shape) == 2 else 0)
        is_quantized = part in ("attention", "dense_mlp", "shared_experts") and dtype != "int4"
        if len(shape) == 2 and (is_quantized or part == "routed_experts"):
            found = Part(_matrix_bytes(*shape, dtype), elements)
        parts[part] = parts.get(part, Part()) + found
    return parts


def vllm_partition(layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each pipeline stage as vLLM divides them. Source: vLLM, `distributed.utils.get_pp_indices`."""
    partition = [layers // pp] * pp
    for behind_last in range(2, layers % pp + 2):
        partition[-behind_last] += 1
    return tuple(partition)


class Layout:
    """A model divided among GPUs; a stage is (index, first layer, layer behind its last).

    Args:
        mtp_layers: Of the draft; 0 without one.
    """

    def __init__(
        self, config: BailingMoeV2Config, dtype: str, kv_dtype: str, tp: int, pp: int, mtp_layers: int
    ) -> None:
        self.config, self.dtype, self.tp, self.pp, self.mtp_layers = config, dtype, tp, pp, mtp_layers
        self.dense_layers = config.first_k_dense_replace
        layers = config.num_hidden_layers
        self.dense = layer_parts(config, 0, dtype, tp) if self.dense_layers else {}
        self.moe = layer_parts(config, layers - 1, dtype, tp) if self.dense_layers < layers else {}
        draft = layer_parts(config, layers, dtype, tp) if mtp_layers else {}
        self.mtp_bytes = mtp_layers * sum(part.bytes for part in draft.values())
        self.vocabulary = Part(0, padded_vocabulary(config) // tp * config.hidden_size)
        self.vocabulary = replace(self.vocabulary, bytes=self.vocabulary.elements * _plain_bytes(dtype))
        self.norm_bytes = config.hidden_size * _plain_bytes(dtype)
        heads = max(1, config.num_key_value_heads // tp)
        self.kv_bytes_per_layer = 2 * heads * config.head_dim * (1 if kv_dtype == "fp8" else _plain_bytes(dtype))

    def _counts(self, start: int, end: int) -> tuple[int, int]:
        dense = max(0, min(end, self.dense_layers) - start)
        return dense, end - start - dense

    def _sum(self, name: str, start: int, end: int) -> Part:
        dense, moe = self._counts(start, end)
        of_dense, of_moe = self.dense.get(name, Part()), self.moe.get(name, Part())
        return Part(dense * of_dense.bytes + moe * of_moe.bytes, dense * of_dense.elements + moe * of_moe.elements)

    def weights(self, index: int, start: int, end: int) -> WeightBytes:
        is_first, is_last = index == 0, index == self.pp - 1
        is_shared = self.config.tie_word_embeddings and is_last
        own_embedding = self.vocabulary.bytes if self.mtp_layers and self.pp > 1 else 0
        return WeightBytes(
            embedding=self.vocabulary.bytes if is_first and not is_shared else 0,
            head=self.vocabulary.bytes if is_last else 0,
            attention=self._sum("attention", start, end).bytes,
            dense_mlp=self._sum("dense_mlp", start, end).bytes,
            routed_experts=self._sum("routed_experts", start, end).bytes,
            shared_experts=self._sum("shared_experts", start, end).bytes,
            router=self._sum("router", start, end).bytes,
            norms=self._sum("norms", start, end).bytes + (self.norm_bytes if is_last else 0),
            mtp=self.mtp_bytes + own_embedding if is_last else 0,
        )

    def kv_bytes_per_token(self, index: int, start: int, end: int) -> int:
        drafts = self.mtp_layers if index == self.pp - 1 else 0
        return (end - start + drafts) * self.kv_bytes_per_layer

    def stages(self, partition: tuple[int, ...]) -> list[tuple[int, int, int]]:
        ends = [sum(partition[: index + 1]) for index in range(self.pp)]
        return [(index, end - partition[index], end) for index, end in enumerate(ends)]

    def tightest(self, partition: tuple[int, ...], budget: int) -> tuple[int, tuple[int, int, int]]:
        """(tokens of KV cache, negative if the weights do not fit; stage) where the fewest fit into `budget` bytes."""
        return min(
            ((budget - self.weights(*stage).total) // self.kv_bytes_per_token(*stage), stage)
            for stage in self.stages(partition)
        )

    def levelled_partition(self) -> tuple[int, ...]:
        """Layers of each stage such that the weights of the fullest are as few as they can be."""

        @cache
        def best(index: int, start: int) -> tuple[int, tuple[int, ...]]:
            if index == self.pp - 1:
                end = self.config.num_hidden_layers
                return self.weights(index, start, end).total, (end - start,)
            choices = []
            for end in range(start + 1, self.config.num_hidden_layers - (self.pp - index - 1) + 1):
                fullest, rest = best(index + 1, end)
                choices.append((max(fullest, self.weights(index, start, end).total), (end - start, *rest)))
            return min(choices)

        return best(0, 0)[1]

    # ---- speed -----------------------------------------------------------------------------------------------------

    def bound(self, partition: tuple[int, ...], gpu: Gpu, context: int, batch: int) -> Bound:
        """Roofline of a decoding step, all requests `context` tokens long.

        With uniform routing D = E (1 - (1 - K / E)^T) distinct experts are read (MoESD, arXiv 2505.19645, equation
        for the expected number of activated experts). A pipeline works on as many batches at once as it has stages.
        """
        at_once = min(self.pp, batch)
        tokens = batch / at_once
        steps = [self._step(stage, context, tokens) for stage in self.stages(partition)]
        peak = (gpu.flops_8 if self.dtype in ("fp8", "int8") else None) or gpu.flops_16
        seconds = [max(read / gpu.bandwidth, flops / peak) for read, flops in steps]
        busiest = max(range(self.pp), key=seconds.__getitem__)
        read, flops = steps[busiest]
        return Bound(
            batch,
            round(read),
            round(flops),
            batch / max(sum(seconds), at_once * seconds[busiest]),
            "bandwidth" if read / gpu.bandwidth >= flops / peak else "compute",
        )

    def _step(self, stage: tuple[int, int, int], context: int, tokens: float) -> tuple[float, float]:
        """(bytes, FLOPs) of one stage and GPU for a step of `tokens` requests."""
        index, start, end = stage
        config, weights = self.config, self.weights(*stage)
        share = config.num_experts_per_tok / config.num_experts
        distinct = 1 - (1 - share) ** tokens
        read = weights.total - weights.embedding - weights.mtp - weights.routed_experts
        read += weights.routed_experts * distinct + (end - start) * self.kv_bytes_per_layer * context * tokens
        parts = ("attention", "dense_mlp", "shared_experts", "router")
        active = sum(self._sum(part, start, end).elements for part in parts)
        active += self._sum("routed_experts", start, end).elements * share
        active += self.vocabulary.elements if index == self.pp - 1 else 0
        heads = config.num_attention_heads // self.tp
        attention = 4 * context * heads * config.head_dim * (end - start)  # two products over all positions
        return read, tokens * (2 * active + attention)


def step_bytes(config: BailingMoeV2Config, dtype: str, tp: int, context: int, batch: int) -> float:
    """Bytes that one GPU reads for a decoding step of `batch` requests; see `Bound`."""
    layout = Layout(config, dtype, "auto", tp, 1, 0)
    return layout._step((0, 0, config.num_hidden_layers), context, batch)[0]
