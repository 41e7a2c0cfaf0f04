"""What a deployment needs and can do at most: memory in whole bytes, a roofline, and what `vllm serve` is given.

Everything follows from the configuration and a table of GPUs; no torch, no GPU and no file is needed. "Per GPU" is
always a GPU of the pipeline stage with the least room for the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vllm_bailing.adapters import ENDS, LINEAR, TARGETS, AdapterSlots
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning import serve
from vllm_bailing.planning.gpus import Gpu, find_gpu
from vllm_bailing.planning.memory import (
    DTYPES,
    KV_DTYPES,
    Layout,
    OtherMemory,
    WeightBytes,
    other_memory,
    padded_vocabulary,
    stored_dtype,
    vllm_partition,
)
from vllm_bailing.planning.roofline import Bound, bound
from vllm_bailing.units import GIB, PLAIN_DTYPES, short_dtype

MAX_NUM_BATCHED_TOKENS = 8192
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM, `MaxLoRARanks`
_LARGEST_TP = 8  # GPUs of one machine
_YARN_FACTOR, _YARN_WINDOW = 4.0, 131072  # model card of Ling-flash-2.0; no card promises a longer window
_SCHEMES = {"int8": "w8a8", "int4": "w4a16"}  # data type -> scheme that `vllm-bailing quantize` makes of it


@dataclass(frozen=True)
class Request:
    """What is to be served, and on what.

    Attributes:
        gpu: A row of `GPUS`, a GPU described by `find_gpu`, or the name of a row.
        gpus: Number of GPUs, over all machines.
        context: Tokens of one request, prompt and answer.
        concurrency: Requests at once.
        dtype: Data type of the weights, one of `DTYPES` or "bfloat16", "float16", "float32"; the checkpoint's own if
            left out.
        kv_dtype: Data type of the KV cache: "auto" (as the activations) or "fp8".
        draft_tokens: Tokens that the MTP layer drafts per step; 0 leaves the layer out.
        tp: Tensor-parallel size; by default the largest power of two up to 8 that the model and `gpus` allow.
        pp: Number of pipeline stages; by default what `tp` leaves of `gpus`.
        memory_utilization: Share of each GPU's memory that vLLM may use.
        max_num_batched_tokens: Tokens of the biggest step.
        model: Name or folder of the model for `vllm serve`; by default where the configuration came from.
        draft_model: Checkpoint of the MTP layer, if the model's own has none.
        max_loras: LoRA adapters that one batch can use; 0 without adapters.
        max_lora_rank: The highest rank of an adapter, one that vLLM allows.
        lora_target_modules: What adapters may change, of `adapters.TARGETS`.
    """

    gpu: Gpu | str
    gpus: int
    context: int
    concurrency: int
    dtype: str | None = None
    kv_dtype: str = "auto"
    draft_tokens: int = 0
    tp: int | None = None
    pp: int | None = None
    memory_utilization: float = serve.MEMORY_UTILIZATION
    max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS
    model: str | None = None
    draft_model: str | None = None
    max_loras: int = 0
    max_lora_rank: int = LORA_RANKS[2]
    lora_target_modules: tuple[str, ...] = LINEAR


@dataclass(frozen=True)
class Plan:
    """A deployment, what it occupies on one GPU and what fits into the rest.

    The attributes that are not listed are those of the `Request`, with nothing left open.

    Attributes:
        weights: Bytes of weights per GPU.
        other: Bytes per GPU that are neither weights nor KV cache.
        kv_room_bytes: Bytes per GPU that are left for the KV cache; negative if the weights do not fit.
        kv_bytes_per_token: Bytes of one token's KV cache per GPU, the MTP layers included.
        kv_tokens: Tokens of all requests together whose KV cache fits.
        verdict: "fits", "tight" (one request of this context fits, but not all at once) or "no".
        reason: Why the verdict is not "fits", and what to change; empty if it is.
        largest_context: Longest context at this concurrency, at most the model's window; 0 if nothing fits.
        largest_concurrency: Most requests at once at this context.
        single: Bound on the speed of one request alone.
        batch: Bound on the speed of all requests at once.
        layer_partition: Layers of each pipeline stage.
        notes: Sentences for the user.
        environment: Variables that `vllm serve` needs.
        flags: Flags of `vllm serve` without their dashes; True is a flag without a value, a list has several values,
            JSON is a text.
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
    weights: WeightBytes
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

    def serve_line(self) -> str:
        """The command, quoted for a shell, in lines of at most 100 columns unless one value is longer."""
        return serve.serve_line(self.model, self.flags, self.environment)

    def yaml(self) -> str:
        """Text of a file for `vllm serve --config FILE`."""
        count = f"{self.gpus} x {self.gpu.name}"
        room = f"{self.kv_tokens} tokens of KV cache, {self.largest_concurrency} such requests"
        comments = (
            f"{self.model} in {self.dtype} on {count}, {self.concurrency} requests of {self.context} tokens at once.",
            f"Planned on paper: {self.weights.total / GIB:.1f} GiB of weights per GPU, room for {room}.",
            *self.notes,
        )
        return serve.config_file(self.flags, self.environment, comments)


def make_plan(config: BailingMoeV2Config, request: Request) -> Plan:
    """Lay a model out on GPUs, and say what fits.

    Raises:
        ValueError: If the request makes no sense. The message is one line: what was given, what is allowed, and what
            to do.
    """
    gpu = find_gpu(request.gpu) if isinstance(request.gpu, str) else request.gpu
    _check_numbers(request)
    dtype = _weight_dtype(stored_dtype(config), request.dtype)
    _check_kv_dtype(request.kv_dtype)
    _check_adapters(request)
    mtp_layers = _mtp_layers(config, request)
    yarn_factor = _yarn_factor(config, request.context)
    tp, pp = _degrees(config, request)
    model = request.model or config.name_or_path or "MODEL"
    request = replace(request, gpu=gpu, dtype=dtype, tp=tp, pp=pp, model=model)

    layout = Layout(config, dtype, request.kv_dtype, tp, pp, mtp_layers, _adapter_slots(request, dtype, tp))
    other = other_memory(config, tp, request.max_num_batched_tokens)
    budget = int(gpu.memory_bytes * request.memory_utilization) - other.total
    partition = _partition(layout, budget)
    tokens, stage = layout.tightest(partition, budget)
    weights = layout.weights(stage)
    room, tokens = budget - weights.total, max(0, tokens)
    verdict, reason = _verdict(request, gpu, weights, other, room, tokens)
    return Plan(
        model=model,
        gpu=gpu,
        gpus=request.gpus,
        tp=tp,
        pp=pp,
        dtype=dtype,
        kv_dtype=request.kv_dtype,
        context=request.context,
        concurrency=request.concurrency,
        draft_tokens=request.draft_tokens,
        memory_utilization=request.memory_utilization,
        weights=weights,
        other=other,
        kv_room_bytes=room,
        kv_bytes_per_token=layout.kv_bytes_per_token(stage),
        kv_tokens=tokens,
        verdict=verdict,
        reason=reason,
        largest_context=min(tokens // request.concurrency, longest_window(config)),
        largest_concurrency=tokens // request.context,
        single=bound(layout, partition, gpu, request.context, 1),
        batch=bound(layout, partition, gpu, request.context, request.concurrency),
        layer_partition=partition,
        notes=_notes(config, gpu, dtype, request.gpus),
        environment=serve.environment(partition),
        flags=serve.flags(config, request, yarn_factor),
    )


# --- the request --------------------------------------------------------------------------------------------------


def _check_numbers(request: Request) -> None:
    for name, value, minimum in (
        ("gpus", request.gpus, 1),
        ("context", request.context, 1),
        ("concurrency", request.concurrency, 1),
        ("tp", 1 if request.tp is None else request.tp, 1),
        ("pp", 1 if request.pp is None else request.pp, 1),
        ("max_num_batched_tokens", request.max_num_batched_tokens, 1),
        ("draft_tokens", request.draft_tokens, 0),
        ("max_loras", request.max_loras, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}; give another")
    share = request.memory_utilization
    if not 0 < share <= 1:
        raise ValueError(
            f"memory_utilization={share} must be above 0 and at most 1, such as {serve.MEMORY_UTILIZATION}"
        )


def _weight_dtype(stored: str, name: str | None) -> str:
    """Which of `DTYPES` the weights are served in."""
    if name is None:
        return stored
    dtype = short_dtype(name)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={name!r} is not known; use one of {', '.join(DTYPES)}")
    if dtype not in PLAIN_DTYPES and stored not in (*PLAIN_DTYPES, dtype):
        raise ValueError(
            f"dtype={name!r} cannot be made from a checkpoint in {stored}; use {stored}, or bf16, which dequantizes it"
        )
    return dtype


def _check_kv_dtype(kv_dtype: str) -> None:
    if kv_dtype not in KV_DTYPES:
        raise ValueError(f"kv_dtype={kv_dtype!r} is not known; use one of {', '.join(KV_DTYPES)}")


def _check_adapters(request: Request) -> None:
    if not request.max_loras:
        return
    if request.max_lora_rank not in LORA_RANKS:
        ranks = ", ".join(map(str, LORA_RANKS))
        raise ValueError(f"max_lora_rank={request.max_lora_rank} is none that vLLM allows; use one of {ranks}")
    targets = request.lora_target_modules
    if not targets or not set(targets) <= set(TARGETS):
        raise ValueError(f"lora_target_modules={' '.join(targets)!r} are not known; choose among {' '.join(TARGETS)}")
    if request.draft_tokens and not set(targets).isdisjoint(ENDS):
        raise ValueError(
            f"lora_target_modules={' '.join(targets)!r} with draft_tokens={request.draft_tokens}: drafts share "
            f"{' and '.join(ENDS)}, and take no adapters; leave one of the two out"
        )


def _adapter_slots(request: Request, dtype: str, tp: int) -> AdapterSlots | None:
    if not request.max_loras:
        return None
    itemsize = 4 if dtype == "fp32" else 2
    return AdapterSlots(request.lora_target_modules, request.max_loras, request.max_lora_rank, itemsize, tp)


def _mtp_layers(config: BailingMoeV2Config, request: Request) -> int:
    """Number of MTP layers that draft."""
    if not request.draft_tokens:
        return 0
    layers = config.num_nextn_predict_layers or (1 if request.draft_model else 0)
    if not layers:
        raise ValueError(
            f"draft_tokens={request.draft_tokens} needs an MTP layer, and the model has num_nextn_predict_layers=0; "
            "name a checkpoint that has it by --draft-model, such as the base model of the same size, or leave drafts "
            "out"
        )
    return layers


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


# --- the GPUs -----------------------------------------------------------------------------------------------------


def tp_obstacle(config: BailingMoeV2Config, tp: int) -> str:
    """What of the model `tp` does not divide, with its size; empty if there is nothing."""
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "moe_intermediate_size": config.moe_intermediate_size,
        "the padded vocabulary": padded_vocabulary(config),
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
        return f"num_key_value_heads={heads}, nor is it a multiple of that"
    block = (getattr(config, "quantization_config", None) or {}).get("weight_block_size")
    for name in ("intermediate_size", "the shared experts' width"):
        # vLLM's Fp8LinearMethod wants whole blocks on every rank; experts it divides into smaller ones.
        if block and tp > 1 and sizes.get(name, 0) // tp % block[0]:
            return f"{name}={sizes[name]} into whole blocks of {block[0]}"
    return ""


def _degrees(config: BailingMoeV2Config, request: Request) -> tuple[int, int]:
    """(tensor-parallel size, pipeline stages) that together use all GPUs."""
    gpus = request.gpus
    if request.tp is not None:
        tp = request.tp
    elif request.pp is not None:
        tp = max(1, gpus // request.pp)
    else:
        candidates = [2**power for power in range(_LARGEST_TP.bit_length())]
        tp = max(size for size in candidates if gpus % size == 0 and not tp_obstacle(config, size))
    pp = max(1, gpus // tp) if request.pp is None else request.pp
    if tp * pp != gpus:
        raise ValueError(f"tp={tp} times pp={pp} is {tp * pp}, not gpus={gpus}; change one of the three")
    if obstacle := tp_obstacle(config, tp):
        raise ValueError(f"tp={tp} does not divide {obstacle}; choose another tp, such as a power of two")
    if pp > config.num_hidden_layers:
        raise ValueError(
            f"pp={pp} stages are more than num_hidden_layers={config.num_hidden_layers}; use fewer GPUs or a larger tp"
        )
    return tp, pp


def _partition(layout: Layout, budget: int) -> tuple[int, ...]:
    """Layers of each pipeline stage: as vLLM divides them, unless that leaves too little room for the KV cache.

    vLLM's stages have equal numbers of layers, but dense layers are small, and head and draft are all on the last.

    Args:
        budget: Bytes of one GPU for weights and KV cache.
    """
    partition = vllm_partition(layout.config.num_hidden_layers, layout.pp)
    tokens = layout.tightest(partition, budget)[0]
    if layout.pp == 1 or tokens >= layout.config.max_position_embeddings:
        return partition
    balanced = layout.balanced_partition()
    return balanced if layout.tightest(balanced, budget)[0] > tokens else partition


# --- what comes of it ---------------------------------------------------------------------------------------------


def _verdict(
    request: Request, gpu: Gpu, weights: WeightBytes, other: OtherMemory, room: int, tokens: int
) -> tuple[str, str]:
    """(verdict, reason), see `Plan`, for `tokens` of KV cache in a `room` of so many bytes."""
    context, concurrency = request.context, request.concurrency
    names = "weights and adapters" if weights.adapters else "weights"
    if room <= 0:
        return "no", (
            f"{names} of {weights.total / GIB:.1f} GiB and other memory of {other.total / GIB:.1f} GiB leave nothing "
            f"of {request.memory_utilization} x {gpu.memory_bytes / GIB:.1f} GiB per GPU; use more GPUs or a smaller "
            "dtype"
        )
    if tokens < context:
        return "no", (
            f"the {names} fit, but beside them only {tokens} tokens of KV cache, less than one request of "
            f"{context}; use more GPUs, a smaller dtype, an fp8 KV cache or a shorter context"
        )
    if tokens < context * concurrency:
        return "tight", (
            f"{tokens} tokens of KV cache hold {tokens // context} requests of {context} tokens, not {concurrency}; "
            "the others wait when all are that long"
        )
    return "fits", ""


def _notes(config: BailingMoeV2Config, gpu: Gpu, dtype: str, gpus: int) -> tuple[str, ...]:
    notes = []
    is_described = gpu.flops_16 is None  # by the user, who does not say what arithmetic it has
    if dtype == "fp8" and gpu.flops_8 is None and not is_described:
        notes.append(f"The {gpu.name} has no fp8 arithmetic: weights are stored in fp8 and multiplied in 16 bits.")
    if dtype in _SCHEMES and stored_dtype(config) != dtype:
        command = f"vllm-bailing quantize --scheme {_SCHEMES[dtype]}"
        notes.append(f"Make a checkpoint in {dtype} and name it as the model: {command}.")
    if gpus > _LARGEST_TP:
        notes.append("More than one machine: start it on each as vLLM's guide to several nodes says.")
    return tuple(notes)
