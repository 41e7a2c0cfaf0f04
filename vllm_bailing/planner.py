"""What a deployment needs and can do at most: memory in whole bytes, a roofline, and the settings of `vllm serve`.

Everything follows from the configuration and a table of GPUs; no torch, no GPU and no file is asked. "Per GPU" is
always the GPU of the pipeline stage with the least room for the KV cache.

Letters: T tokens of one step (one per request), E routed experts, K experts per token, M tokens of the biggest step.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.weights import Shape, layer_tensors

GIB = 2**30
# Plain layers; then what linear layers are quantised to. int4 is of the routed experts alone.
_PLAIN = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DTYPES = (*_PLAIN, "fp8", "int8", "int4")
KV_DTYPES = ("auto", "fp8")
MEMORY_UTILIZATION = 0.92  # vLLM's own default
MAX_NUM_BATCHED_TOKENS = 8192
_BLOCK = 128  # side of a block of fp8 weights, and size of a group of int4 weights, that share a scale
_VOCABULARY_PADDING = 64  # DEFAULT_VOCAB_PADDING_SIZE of vLLM's VocabParallelEmbedding
_LARGEST_TP = 8  # GPUs of one machine
_YARN_FACTOR, _YARN_WINDOW = 4.0, 131072  # model card of Ling-flash-2.0; no card promises a longer window


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet and its driver describe it.

    Attributes:
        memory_bytes: The total that torch reports.
        bandwidth: Bytes/s.
        flops_16: Dense bf16 FLOP/s.
        flops_8: Dense fp8 FLOP/s; None if it has no fp8 arithmetic.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops_16: float
    flops_8: float | None


def _gpu(name: str, memory_gib: float, tb_per_s: float, tflops_16: float, tflops_8: float | None) -> Gpu:
    flops_8 = None if tflops_8 is None else tflops_8 * 1e12
    return Gpu(name, round(memory_gib * GIB), tb_per_s * 1e12, tflops_16 * 1e12, flops_8)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("H100", 79.1, 3.35, 989, 1979),
        _gpu("H200", 139.7, 4.8, 989, 1979),
        _gpu("H20", 95.1, 4.0, 148, 296),
        _gpu("H20-3e", 139.7, 4.8, 148, 296),
        _gpu("B200", 178.4, 8.0, 2250, 4500),
        _gpu("A100-80G", 79.1, 2.04, 312, None),
        _gpu("L40S", 44.4, 0.864, 362, 733),
        _gpu("RTX4090", 23.5, 1.008, 165, 330),
        _gpu("MI300X", 191.5, 5.3, 1307, 2615),
    )
}


def find_gpu(name: str, memory_gib: float | None = None, bandwidth: float | None = None) -> Gpu:
    """The GPU called `name`, in any case, with memory (GiB) and bandwidth (TB/s) replaced where they are given.

    Raises:
        ValueError: If it is not in the table and one of the two is missing, or a number is not positive.
    """
    for flag, value in (("--memory-gib", memory_gib), ("--bandwidth", bandwidth)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag} {value} must be a number above 0")
    gpu = next((known for known in GPUS.values() if known.name.lower() == name.lower()), None)
    if gpu is None:
        if memory_gib is None or bandwidth is None:
            raise ValueError(
                f"GPU {name!r} is not known; name one of {', '.join(GPUS)}, or give its memory by --memory-gib and its "
                "bandwidth by --bandwidth (TB/s)"
            )
        # Decoding is bound by bytes on every GPU of the table, so what is not known is left out of the bound.
        return Gpu(name, round(memory_gib * GIB), bandwidth * 1e12, math.inf, None)
    if memory_gib is not None:
        gpu = replace(gpu, memory_bytes=round(memory_gib * GIB))
    return gpu if bandwidth is None else replace(gpu, bandwidth=bandwidth * 1e12)


class _Bytes:
    """A dataclass of byte counts that add up."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Weights(_Bytes):
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


@dataclass(frozen=True)
class Plan:
    """A deployment, what it occupies on one GPU and what fits into the rest.

    Attributes:
        kv_room_bytes: What is left for the KV cache; negative if the weights do not fit.
        kv_bytes_per_token: On one GPU, the draft's layers included.
        kv_tokens: That fit into the room, of all requests together.
        verdict: "fits", "tight" (one request of this context fits, but not all at once) or "no".
        reason: Of a verdict other than "fits", with what to change.
        largest_context: At this concurrency; no longer than the model's window allows. 0 if nothing fits.
        largest_concurrency: At this context.
        single, batch: Bounds on the speed, for one request and for all.
        layer_partition: Layers of each pipeline stage.
        notes: What else there is to know.
        environment: Variables that `vllm serve` needs.
        flags: What `settings` returns.
    """

    model: str
    gpu: Gpu
    gpus: int
    tp: int
    pp: int
    dtype: str
    kv_dtype: str
    context: int
    concurrency: int
    draft_tokens: int
    memory_utilization: float
    weights: Weights
    other: OtherMemory
    kv_room_bytes: int
    kv_bytes_per_token: int
    kv_tokens: int
    verdict: str
    reason: str
    largest_context: int
    largest_concurrency: int
    single: Bound
    batch: Bound
    layer_partition: tuple[int, ...]
    notes: tuple[str, ...]
    environment: dict[str, str]
    flags: dict[str, Any]

    @property
    def fits(self) -> bool:
        """Whether all requests fit at once."""
        return self.verdict == "fits"

    def settings(self) -> dict[str, Any]:
        """Flags of `vllm serve` without their dashes; True is a flag without a value, JSON is a text."""
        return dict(self.flags)

    def serve_line(self) -> str:
        """The command, quoted for a shell, in lines of at most 100 columns unless one value is longer."""
        words = [*(f"{name}={value}" for name, value in self.environment.items()), "vllm", "serve"]
        parts = [[*words, shlex.quote(self.model)]]
        for name, value in self.flags.items():
            if name != "model":
                parts.append([f"--{name}"] if value is True else [f"--{name}", shlex.quote(str(value))])
        lines = [""]
        for part in parts:
            whole = " ".join(part)
            for piece in [whole] if len(whole) <= 96 else part:  # "  " and " \"
                if len(lines[-1]) + 1 + len(piece) > 96 and lines[-1]:
                    lines.append("")
                lines[-1] += f" {piece}" if lines[-1] else piece
        return " \\\n  ".join(lines)

    def yaml(self) -> str:
        """Text of a file for `vllm serve --config FILE`."""
        import yaml

        count = f"{self.gpus} x {self.gpu.name}"
        room = f"{self.kv_tokens} tokens of KV cache, {self.largest_concurrency} such requests"
        lines = [
            f"{self.model} in {self.dtype} on {count}, {self.concurrency} requests of {self.context} tokens at once.",
            f"Planned on paper: {self.weights.total / GIB:.1f} GiB of weights per GPU, room for {room}.",
            *self.notes,
        ]
        if self.environment:
            lines.append("Set " + " and ".join(f"{name}={value}" for name, value in self.environment.items()) + ".")
        header = "".join(f"# {line}\n" for line in lines)
        return header + yaml.safe_dump(self.flags, sort_keys=False, width=1000)


def plan(
    config: BailingMoeV2Config,
    gpu: Gpu | str,
    gpus: int,
    context: int,
    concurrency: int,
    dtype: str | None = None,
    kv_dtype: str = "auto",
    draft_tokens: int = 0,
    tp: int | None = None,
    pp: int | None = None,
    memory_utilization: float = MEMORY_UTILIZATION,
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
    model: str | None = None,
    draft_model: str | None = None,
) -> Plan:
    """Lay a model out on GPUs, and say what fits.

    Args:
        gpu: Of the table, or its name there.
        context: Tokens of a request, prompt and answer.
        concurrency: Requests at once.
        dtype: One of `DTYPES`; the checkpoint's own if left out.
        kv_dtype: "auto" (as the activations) or "fp8".
        draft_tokens: Of the MTP layer per step; 0 leaves the layer out.
        tp: Tensor-parallel size; by default the largest power of two up to 8 that the model and `gpus` allow.
        pp: Pipeline stages; by default what `tp` leaves of `gpus`.
        memory_utilization: Share of the GPU that vLLM may use.
        max_num_batched_tokens: Tokens of the biggest step.
        model: Name or folder for the settings; by default where the configuration came from.
        draft_model: Checkpoint of the MTP layer, if the model's own has none.
    Raises:
        ValueError: If the request makes no sense. The message is one line with what came, what was wanted and what to
            do.
    """
    gpu = find_gpu(gpu) if isinstance(gpu, str) else gpu
    for name, value in (
        ("gpus", gpus),
        ("context", context),
        ("concurrency", concurrency),
        ("tp", 1 if tp is None else tp),
        ("pp", 1 if pp is None else pp),
        ("max_num_batched_tokens", max_num_batched_tokens),
    ):
        _require_count(name, value, 1)
    _require_count("draft_tokens", draft_tokens, 0)
    if not 0 < memory_utilization <= 1:
        raise ValueError(f"memory_utilization={memory_utilization} must be above 0 and at most 1, such as 0.92")
    stored = _stored_dtype(config)
    dtype = _checked_dtype(config, stored, dtype)
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype={kv_dtype!r} is not known; use one of {', '.join(KV_DTYPES)}")
    mtp_layers = config.num_nextn_predict_layers or (1 if draft_model else 0)
    if draft_tokens and not mtp_layers:
        raise ValueError(
            f"draft_tokens={draft_tokens} needs an MTP layer, and the model has num_nextn_predict_layers=0; name a "
            "checkpoint that has it by --draft-model, such as the base model of the same size, or leave drafts out"
        )
    factor = _yarn_factor(config, context)
    tp, pp = _degrees(config, gpus, tp, pp)

    layout = _Layout(config, dtype, kv_dtype, tp, pp, mtp_layers if draft_tokens else 0)
    other = _other_memory(config, tp, max_num_batched_tokens)
    budget = int(gpu.memory_bytes * memory_utilization) - other.total
    partition = vllm_partition(config.num_hidden_layers, pp)
    environment: dict[str, str] = {}
    # Its stages have equal numbers of layers, but dense ones are small, and head and draft are all on the last.
    if pp > 1 and layout.tightest(partition, budget)[0] < config.max_position_embeddings:
        levelled = layout.levelled_partition()
        if layout.tightest(levelled, budget)[0] > layout.tightest(partition, budget)[0]:
            partition = levelled
            environment["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, partition))
    tokens, stage = layout.tightest(partition, budget)
    weights, per_token = layout.weights(*stage), layout.kv_bytes_per_token(*stage)
    room, tokens = budget - weights.total, max(0, tokens)
    verdict, reason = _verdict(gpu, weights, other, room, tokens, context, concurrency, memory_utilization)

    notes = []
    if dtype == "fp8" and gpu.flops_8 is None:
        notes.append(f"The {gpu.name} has no fp8 arithmetic: weights are stored in fp8 and multiplied in 16 bits.")
    if dtype in ("int8", "int4") and stored != dtype:
        scheme = {"int8": "w8a8", "int4": "w4a16"}[dtype]
        notes.append(f"Make a checkpoint in {dtype} and name it as the model: scripts/quantize.py --scheme {scheme}.")
    if gpus > _LARGEST_TP:
        notes.append("More than one machine: start it on each as vLLM's guide to several nodes says.")
    name = model or config.name_or_path or "MODEL"
    flags: dict[str, Any] = {"model": name, "tensor-parallel-size": tp}
    if pp > 1:
        flags["pipeline-parallel-size"] = pp
    flags |= {"max-model-len": context, "max-num-seqs": concurrency}
    if max_num_batched_tokens != _default_batched_tokens(gpu):
        flags["max-num-batched-tokens"] = max_num_batched_tokens
    if memory_utilization != MEMORY_UTILIZATION:
        flags["gpu-memory-utilization"] = memory_utilization
    if dtype in _PLAIN and dtype != _plain_dtype(config):
        flags["dtype"] = _PLAIN[dtype]
    if dtype == "fp8" and stored in _PLAIN:
        flags["quantization"] = "fp8"  # while loading
    if kv_dtype != "auto":
        flags["kv-cache-dtype"] = kv_dtype
    overrides: dict[str, Any] = {}
    if dtype in _PLAIN and ((stored != dtype and stored not in _PLAIN) or config.stored_quantization_config):
        overrides["dequantize"] = True
    if factor:
        window = config.max_position_embeddings
        overrides["rope_scaling"] = {"type": "yarn", "factor": factor, "original_max_position_embeddings": window}
    if overrides:
        flags["hf-overrides"] = json.dumps(overrides, separators=(",", ":"))
    if draft_tokens:
        draft = {"method": "mtp", **({"model": draft_model} if draft_model else {})}
        flags["speculative-config"] = json.dumps(
            {**draft, "num_speculative_tokens": draft_tokens}, separators=(",", ":")
        )
    flags |= {"enable-auto-tool-choice": True, "tool-call-parser": "bailing", "reasoning-parser": "bailing"}

    return Plan(
        model=name,
        gpu=gpu,
        gpus=gpus,
        tp=tp,
        pp=pp,
        dtype=dtype,
        kv_dtype=kv_dtype,
        context=context,
        concurrency=concurrency,
        draft_tokens=draft_tokens,
        memory_utilization=memory_utilization,
        weights=weights,
        other=other,
        kv_room_bytes=room,
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
        verdict=verdict,
        reason=reason,
        largest_context=min(tokens // concurrency, longest_window(config)),
        largest_concurrency=tokens // context,
        single=layout.bound(partition, gpu, context, 1),
        batch=layout.bound(partition, gpu, context, concurrency),
        layer_partition=partition,
        notes=tuple(notes),
        environment=environment,
        flags=flags,
    )


# ---- what was asked for --------------------------------------------------------------------------------------------


def step_bytes(config: BailingMoeV2Config, dtype: str, tp: int, context: int, batch: int) -> float:
    """Bytes that one GPU reads for a decoding step of `batch` requests; see `Bound`."""
    layout = _Layout(config, dtype, "auto", tp, 1, 0)
    return layout._step((0, 0, config.num_hidden_layers), context, batch)[0]


def _require_count(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}; give another")


def _plain_dtype(config: BailingMoeV2Config) -> str:
    """The dtype in which vLLM computes by default."""
    written = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return "fp16" if written == "float16" else "bf16"


def _stored_dtype(config: BailingMoeV2Config) -> str:
    """What of `DTYPES` the checkpoint is stored in, or what it becomes if the configuration dequantises it."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return _plain_dtype(config)
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


def _checked_dtype(config: BailingMoeV2Config, stored: str, dtype: str | None) -> str:
    if dtype is None:
        return stored
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if dtype not in _PLAIN and stored not in (*_PLAIN, dtype):
        raise ValueError(
            f"dtype={dtype!r} cannot be had from a checkpoint in {stored}; use {stored}, or bf16, which dequantises it"
        )
    return dtype


def longest_window(config: BailingMoeV2Config) -> int:
    """Tokens that the model can be served with, by YaRN as on the model card if it has no scaling yet."""
    window = config.max_position_embeddings
    if config.rope_parameters["rope_type"] != "default":
        return window
    return max(window, min(int(_YARN_FACTOR * window), _YARN_WINDOW))


def _yarn_factor(config: BailingMoeV2Config, context: int) -> float | None:
    """Factor that stretches the model's window over `context`; None if it is long enough."""
    window, longest = config.max_position_embeddings, longest_window(config)
    if context > longest:
        kind = config.rope_parameters["rope_type"]
        how = f"{longest} with YaRN" if longest > window else f"{window}, with rope_type={kind!r} in config.json"
        raise ValueError(
            f"context={context} is beyond the model's window of {window} tokens (at most {how}); give a context of "
            f"at most {longest}"
        )
    return longest / window if context > window else None


def _obstacle(config: BailingMoeV2Config, tp: int) -> str:
    """Which size of the model `tp` does not divide, with its value; empty if there is none."""
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "moe_intermediate_size": config.moe_intermediate_size,
        "the vocabulary, padded,": _padded_vocabulary(config),
    }
    if config.first_k_dense_replace:
        sizes["intermediate_size"] = config.intermediate_size
    if config.num_shared_experts:
        sizes["the shared experts' width"] = config.shared_expert_intermediate_size
    for name, size in sizes.items():
        if size % tp:
            return f"{name} of {size}" if name.startswith("the ") else f"{name}={size}"
    heads = config.num_key_value_heads
    if heads % tp and tp % heads:
        return f"num_key_value_heads={heads}, nor be a multiple of it,"
    block = (getattr(config, "quantization_config", None) or {}).get("weight_block_size")
    for name in ("intermediate_size", "the shared experts' width"):
        # vLLM's Fp8LinearMethod wants whole blocks on every rank; experts it divides into smaller ones.
        if block and tp > 1 and sizes.get(name, 0) // tp % block[0]:
            return f"{name}={sizes[name]} into whole blocks of {block[0]}"
    return ""


def _degrees(config: BailingMoeV2Config, gpus: int, wanted_tp: int | None, wanted_pp: int | None) -> tuple[int, int]:
    """(tensor-parallel size, pipeline stages) that together use `gpus`."""
    if wanted_tp is not None:
        tp = wanted_tp
    elif wanted_pp is not None:
        tp = max(1, gpus // wanted_pp)
    else:
        candidates = [2**power for power in range(_LARGEST_TP.bit_length())]
        tp = max(size for size in candidates if gpus % size == 0 and not _obstacle(config, size))
    pp = max(1, gpus // tp) if wanted_pp is None else wanted_pp
    if tp * pp != gpus:
        raise ValueError(f"tp={tp} times pp={pp} is {tp * pp}, not gpus={gpus}; change one of the three")
    if obstacle := _obstacle(config, tp):
        raise ValueError(f"tp={tp} must divide {obstacle} and does not; choose another tp, such as a power of two")
    if pp > config.num_hidden_layers:
        raise ValueError(
            f"pp={pp} stages are more than num_hidden_layers={config.num_hidden_layers}; use fewer GPUs or a larger tp"
        )
    return tp, pp


def _verdict(
    gpu: Gpu,
    weights: Weights,
    other: OtherMemory,
    room: int,
    tokens: int,
    context: int,
    concurrency: int,
    memory_utilization: float,
) -> tuple[str, str]:
    if room <= 0:
        return "no", (
            f"weights of {weights.total / GIB:.1f} GiB and other memory of {other.total / GIB:.1f} GiB leave nothing "
            f"of {memory_utilization} x {gpu.memory_bytes / GIB:.1f} GiB per GPU; use more GPUs or a smaller dtype"
        )
    if tokens < context:
        return "no", (
            f"the weights fit, but beside them only {tokens} tokens of KV cache, less than one request of "
            f"{context}; use more GPUs, a smaller dtype, an fp8 KV cache or a shorter context"
        )
    if tokens < context * concurrency:
        return "tight", (
            f"{tokens} tokens of KV cache hold {tokens // context} requests of {context} tokens, not {concurrency}; "
            "the others wait when all are that long"
        )
    return "fits", ""


# ---- memory --------------------------------------------------------------------------------------------------------


def _padded_vocabulary(config: BailingMoeV2Config) -> int:
    return -(-config.vocab_size // _VOCABULARY_PADDING) * _VOCABULARY_PADDING


def _default_batched_tokens(gpu: Gpu) -> int:
    """What `vllm serve` takes. Source: vLLM, `EngineArgs.get_batch_defaults`."""
    if gpu.memory_bytes >= 160 * GIB:
        return 16384
    return 8192 if gpu.memory_bytes >= 70 * GIB and "a100" not in gpu.name.lower() else 2048


def _other_memory(config: BailingMoeV2Config, tp: int, max_num_batched_tokens: int) -> OtherMemory:
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
class _Part:
    """What one layer has of a part of the model on one GPU: bytes, and elements of its matrices."""

    bytes: int = 0
    elements: int = 0

    def __add__(self, other: _Part) -> _Part:
        return _Part(self.bytes + other.bytes, self.elements + other.elements)


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


def _layer_parts(config: BailingMoeV2Config, layer: int, dtype: str, tp: int) -> dict[str, _Part]:
    """Parts of a decoder layer on one rank, by the names of `Weights`."""
    parts: dict[str, _Part] = {}
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
        found = _Part(elements * size, elements if len(shape) == 2 else 0)
        is_quantized = part in ("attention", "dense_mlp", "shared_experts") and dtype != "int4"
        if len(shape) == 2 and (is_quantized or part == "routed_experts"):
            found = _Part(_matrix_bytes(*shape, dtype), elements)
        parts[part] = parts.get(part, _Part()) + found
    return parts


def vllm_partition(layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each pipeline stage as vLLM divides them. Source: vLLM, `distributed.utils.get_pp_indices`."""
    partition = [layers // pp] * pp
    for behind_last in range(2, layers % pp + 2):
        partition[-behind_last] += 1
    return tuple(partition)


class _Layout:
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
        self.dense = _layer_parts(config, 0, dtype, tp) if self.dense_layers else {}
        self.moe = _layer_parts(config, layers - 1, dtype, tp) if self.dense_layers < layers else {}
        draft = _layer_parts(config, layers, dtype, tp) if mtp_layers else {}
        self.mtp_bytes = mtp_layers * sum(part.bytes for part in draft.values())
        self.vocabulary = _Part(0, _padded_vocabulary(config) // tp * config.hidden_size)
        self.vocabulary = replace(self.vocabulary, bytes=self.vocabulary.elements * _plain_bytes(dtype))
        self.norm_bytes = config.hidden_size * _plain_bytes(dtype)
        heads = max(1, config.num_key_value_heads // tp)
        self.kv_bytes_per_layer = 2 * heads * config.head_dim * (1 if kv_dtype == "fp8" else _plain_bytes(dtype))

    def _counts(self, start: int, end: int) -> tuple[int, int]:
        dense = max(0, min(end, self.dense_layers) - start)
        return dense, end - start - dense

    def _sum(self, name: str, start: int, end: int) -> _Part:
        dense, moe = self._counts(start, end)
        of_dense, of_moe = self.dense.get(name, _Part()), self.moe.get(name, _Part())
        return _Part(dense * of_dense.bytes + moe * of_moe.bytes, dense * of_dense.elements + moe * of_moe.elements)

    def weights(self, index: int, start: int, end: int) -> Weights:
        is_first, is_last = index == 0, index == self.pp - 1
        is_shared = self.config.tie_word_embeddings and is_last
        own_embedding = self.vocabulary.bytes if self.mtp_layers and self.pp > 1 else 0
        return Weights(
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
