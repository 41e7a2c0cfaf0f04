"""What a deployment needs and can do at most: memory in whole bytes, a roofline, and what `vllm serve` is given.

Everything follows from the configuration and a table of GPUs; no torch, no GPU and no file is needed. "Per GPU" is
always a GPU of the pipeline stage with the least room for the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from vllm_bailing.adapters import AdapterSlots
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning import serve
from vllm_bailing.planning.choice import Fit, fit, layouts, ranked, runner_up, why
from vllm_bailing.planning.gpus import Gpu
from vllm_bailing.planning.memory import Layout, OtherMemory, WeightBytes, stored_beside_experts, stored_dtype
from vllm_bailing.planning.request import Request, longest_window, mtp_layers, settled, yarn_factor
from vllm_bailing.planning.roofline import Bound
from vllm_bailing.planning.traffic import Traffic
from vllm_bailing.units import GIB

_SCHEMES = {"int8": "w8a8", "int4": "w4a16"}  # data type -> scheme that `vllm-bailing quantize` makes of it


@dataclass(frozen=True)
class Plan:
    """A deployment, what it occupies on one GPU and what fits into the rest.

    The attributes that are not listed are those of the `Request`, with nothing left open.

    Attributes:
        gpus: Number of GPUs, over all nodes.
        replicas: Independent copies of the model.
        layout: The sizes of parallelism in words.
        weights: Bytes of weights per GPU.
        other: Bytes per GPU that are neither weights nor KV cache.
        kv_room_bytes: Bytes per GPU that are left for the KV cache; negative if the weights do not fit.
        kv_bytes_per_token: Bytes of one token's KV cache per GPU, the MTP layers included.
        kv_tokens: Tokens of all requests together whose KV cache fits, over all replicas and data-parallel ranks.
        verdict: "fits", "tight" (one request of this context fits, but not all at once) or "no".
        reason: Why the verdict is not "fits", and what to change; empty if it is.
        largest_context: Longest context at this concurrency, at most the model's window; 0 if nothing fits.
        largest_concurrency: Most requests at once at this context.
        traffic: Bytes that a GPU sends for each token.
        why: Why this layout is advised; empty if there is no other.
        runner_up: The layout that is advised if not this one, what it holds and its flags; empty if there is none.
        single: Bound on the speed of one request alone.
        batch: Bound on the speed of all requests at once.
        layer_partition: Layers of each pipeline stage.
        notes: Sentences for the user.
        environment: Variables that every `vllm serve` needs.
        flags: Flags of every `vllm serve` without their dashes; True is a flag without a value, a list has several
            values, JSON is a text.
        commands: What each `vllm serve` gets besides, on its node.
    """

    model: str
    gpu: Gpu
    gpus: int
    nodes: int
    goal: str
    layout: str
    replicas: int
    dp: int
    tp: int
    pp: int
    expert_parallel: bool
    redundant_experts: int
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
    traffic: Traffic
    why: str
    runner_up: str
    layer_partition: tuple[int, ...]
    notes: tuple[str, ...]
    environment: dict[str, str]
    flags: dict[str, Any]
    commands: tuple[serve.Command, ...]

    @property
    def fits(self) -> bool:
        """Whether all requests fit at once."""
        return self.verdict == "fits"

    @property
    def spans_nodes(self) -> bool:
        """Whether a replica is spread over several nodes."""
        return self.replicas < self.nodes

    def serve_line(self, command: int = 0, columns: int = serve.COLUMNS) -> str:
        """One of the commands, quoted for a shell, in lines of so many columns unless one value is longer."""
        own = self.commands[command]
        environment = {**own.environment, **self.environment}
        return serve.serve_line(self.flags["model"], {**self.flags, **own.flags}, environment, columns)

    def yaml(self) -> str:
        """Text of a file for `vllm serve --config FILE`."""
        count = f"{self.gpus} x {self.gpu.name}" + (f" ({self.layout})" if len(self.commands) > 1 else "")
        room = f"{self.kv_tokens:,} tokens of KV cache, {self.largest_concurrency} such requests"
        comments = (
            f"{self.model} in {self.dtype} on {count}, {self.concurrency} requests of {self.context:,} tokens at once.",
            f"Planned on paper: {self.weights.total / GIB:.1f} GiB of weights per GPU, room for {room}.",
            *self.notes,
            *(f"On {own.place(self.commands)}: {own.additions()}" for own in self.commands if own.flags),
        )
        return serve.config_file(self.flags, self.environment, comments)


def make_plan(config: BailingMoeV2Config, request: Request) -> Plan:
    """Lay a model out on GPUs, and say what fits.

    Raises:
        ValueError: If the request makes no sense. The message is one line: what was given, what is allowed, and what
            to do.
    """
    request = settled(config, request)
    gpu, dtype = cast("Gpu", request.gpu), cast("str", request.dtype)
    base = Layout(
        config,
        dtype,
        request.kv_dtype,
        mtp_layers=mtp_layers(config, request),
        adapters=_adapter_slots(request),
        **(stored_beside_experts(config) if dtype == stored_dtype(config) else {}),
    )
    fits = ranked((fit(layout, request) for layout in layouts(base, request)), request)
    best, other = fits[0], runner_up(fits, request)
    layout = best.layout
    request = replace(request, tp=layout.tp, pp=layout.pp, dp=layout.dp, expert_parallel=layout.expert_parallel)
    verdict, reason = _verdict(request, best)
    return Plan(
        model=cast("str", request.model),
        gpu=gpu,
        gpus=request.total_gpus,
        nodes=cast("int", request.nodes),
        goal=request.goal,
        layout=layout.name,
        replicas=layout.replicas,
        dp=layout.dp,
        tp=layout.tp,
        pp=layout.pp,
        expert_parallel=layout.expert_parallel,
        redundant_experts=layout.redundant_experts,
        dtype=dtype,
        kv_dtype=request.kv_dtype,
        context=request.context,
        concurrency=request.concurrency,
        draft_tokens=request.draft_tokens,
        memory_utilization=request.memory_utilization,
        weights=best.weights,
        other=best.other,
        kv_room_bytes=best.room,
        kv_bytes_per_token=layout.kv_bytes_per_token(best.stage),
        kv_tokens=layout.engines * best.tokens,
        verdict=verdict,
        reason=reason,
        largest_context=min(best.tokens // serve.requests_of_an_engine(request, layout), longest_window(config)),
        largest_concurrency=best.requests,
        single=best.single,
        batch=best.batch,
        traffic=best.traffic,
        why=why(fits, request),
        runner_up=_described(other) if other else "",
        layer_partition=best.partition,
        notes=_notes(config, gpu, dtype, layout),
        environment=serve.environment(best.partition),
        flags=serve.flags(config, request, layout, yarn_factor(config, request.context)),
        commands=serve.commands(layout, request.gpus, cast("int", request.nodes)),
    )


def _adapter_slots(request: Request) -> AdapterSlots | None:
    if not request.max_loras:
        return None
    itemsize = 4 if request.dtype == "fp32" else 2
    return AdapterSlots(request.lora_target_modules, request.max_loras, request.max_lora_rank, itemsize)


def _verdict(request: Request, best: Fit) -> tuple[str, str]:
    """(verdict, reason), see `Plan`."""
    context, weights, gpu = request.context, best.weights, cast("Gpu", request.gpu)
    names = "weights and adapters" if weights.adapters else "weights"
    if best.room <= 0:
        return "no", (
            f"{names} of {weights.total / GIB:.1f} GiB and other memory of {best.other.total / GIB:.1f} GiB leave "
            f"nothing of {request.memory_utilization} x {gpu.memory_bytes / GIB:.1f} GiB per GPU; use more GPUs or a "
            "smaller dtype"
        )
    if not best.requests:
        return "no", (
            f"the {names} fit, but beside them only {best.tokens:,} tokens of KV cache, less than one request of "
            f"{context:,}; use more GPUs, a smaller dtype, an fp8 KV cache or a shorter context"
        )
    if best.requests < request.concurrency:
        engines = best.layout.engines
        tokens = f"{engines} x {best.tokens:,}" if engines > 1 else f"{best.tokens:,}"
        return "tight", (
            f"{tokens} tokens of KV cache hold {best.requests:,} requests of {context:,} tokens, not "
            f"{request.concurrency}; the others wait when all are that long"
        )
    return "fits", ""


def _described(other: Fit) -> str:
    layout = other.layout
    spread = f" over {other.nodes} nodes" if other.nodes > 1 else ""
    return (
        f"{layout.name}{spread}: {other.requests} such requests at once, bound alone {other.single.tokens_per_s:,.0f} "
        f"tokens/s (--tp {layout.tp} --pp {layout.pp} --dp {layout.dp})"
    )


def _notes(config: BailingMoeV2Config, gpu: Gpu, dtype: str, layout: Layout) -> tuple[str, ...]:
    notes = []
    is_described = gpu.flops_16 is None  # by the user, who does not say what arithmetic it has
    if dtype == "fp8" and gpu.flops_8 is None and not is_described:
        notes.append(f"The {gpu.name} has no fp8 arithmetic: weights are stored in fp8 and multiplied in 16 bits.")
    if dtype in _SCHEMES and stored_dtype(config) != dtype:
        command = f"vllm-bailing quantize --scheme {_SCHEMES[dtype]}"
        notes.append(f"Make a checkpoint in {dtype} and name it as the model: {command}.")
    if layout.replicas > 1:
        notes.append("A router has to share the requests out among the replicas, see docs/scale-out.md.")
    return tuple(notes)
