"""What a deployment needs and can do at most: memory in whole bytes, a roofline, and the settings of `vllm serve`.

Everything follows from the configuration and a table of GPUs; no torch, no GPU and no file is asked. "Per GPU" is
always the GPU of the pipeline stage with the least room for the KV cache.

Letters: T tokens of one step (one per request), E routed experts, K experts per token, M tokens of the biggest step.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.gpus import Gpu, find_gpu
from vllm_bailing.planning.memory import (
    DTYPES,
    KV_DTYPES,
    Bound,
    Layout,
    OtherMemory,
    WeightBytes,
    other_memory,
    padded_vocabulary,
    plain_dtype,
    stored_dtype,
    vllm_partition,
)
from vllm_bailing.units import GIB, PLAIN_DTYPES

MEMORY_UTILIZATION = 0.92  # vLLM's own default
MAX_NUM_BATCHED_TOKENS = 8192
_LARGEST_TP = 8  # GPUs of one machine
_YARN_FACTOR, _YARN_WINDOW = 4.0, 131072  # model card of Ling-flash-2.0; no card promises a longer window


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


def make_plan(
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
    stored = stored_dtype(config)
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

    layout = Layout(config, dtype, kv_dtype, tp, pp, mtp_layers if draft_tokens else 0)
    other = other_memory(config, tp, max_num_batched_tokens)
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
    if max_num_batched_tokens != default_batched_tokens(gpu):
        flags["max-num-batched-tokens"] = max_num_batched_tokens
    if memory_utilization != MEMORY_UTILIZATION:
        flags["gpu-memory-utilization"] = memory_utilization
    if dtype in PLAIN_DTYPES and dtype != plain_dtype(config):
        flags["dtype"] = PLAIN_DTYPES[dtype]
    if dtype == "fp8" and stored in PLAIN_DTYPES:
        flags["quantization"] = "fp8"  # while loading
    if kv_dtype != "auto":
        flags["kv-cache-dtype"] = kv_dtype
    overrides: dict[str, Any] = {}
    if dtype in PLAIN_DTYPES and (
        (stored != dtype and stored not in PLAIN_DTYPES) or config.stored_quantization_config
    ):
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


def _require_count(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {minimum}; give another")


def _checked_dtype(config: BailingMoeV2Config, stored: str, dtype: str | None) -> str:
    if dtype is None:
        return stored
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if dtype not in PLAIN_DTYPES and stored not in (*PLAIN_DTYPES, dtype):
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


def tp_obstacle(config: BailingMoeV2Config, tp: int) -> str:
    """Which size of the model `tp` does not divide, with its value; empty if there is none."""
    sizes = {
        "num_attention_heads": config.num_attention_heads,
        "moe_intermediate_size": config.moe_intermediate_size,
        "the vocabulary, padded,": padded_vocabulary(config),
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
        tp = max(size for size in candidates if gpus % size == 0 and not tp_obstacle(config, size))
    pp = max(1, gpus // tp) if wanted_pp is None else wanted_pp
    if tp * pp != gpus:
        raise ValueError(f"tp={tp} times pp={pp} is {tp * pp}, not gpus={gpus}; change one of the three")
    if obstacle := tp_obstacle(config, tp):
        raise ValueError(f"tp={tp} must divide {obstacle} and does not; choose another tp, such as a power of two")
    if pp > config.num_hidden_layers:
        raise ValueError(
            f"pp={pp} stages are more than num_hidden_layers={config.num_hidden_layers}; use fewer GPUs or a larger tp"
        )
    return tp, pp


def _verdict(
    gpu: Gpu,
    weights: WeightBytes,
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


def default_batched_tokens(gpu: Gpu) -> int:
    """What `vllm serve` takes. Source: vLLM, `EngineArgs.get_batch_defaults`."""
    if gpu.memory_bytes >= 160 * GIB:
        return 16384
    return 8192 if gpu.memory_bytes >= 70 * GIB and "a100" not in gpu.name.lower() else 2048
