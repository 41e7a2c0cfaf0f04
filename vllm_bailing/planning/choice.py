"""Which layouts of a model on given GPUs make sense, what each of them holds, and which one is advised.

For throughput, as many replicas as hold all requests, since they send each other nothing; then data and expert
parallelism where a TP group would keep copies of the KV cache. For latency, tensor parallelism, by which each GPU reads
least for a token. Neither spreads over nodes what one node serves; for throughput, that is one that holds the requests,
or of whose bound more nodes together would not gain much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.gpus import Gpu
from vllm_bailing.planning.memory import (
    Layout,
    OtherMemory,
    Stage,
    WeightBytes,
    padded_vocabulary,
    vllm_partition,
)
from vllm_bailing.planning.request import Request
from vllm_bailing.planning.roofline import Bound, bound
from vllm_bailing.planning.traffic import Traffic, traffic


@dataclass(frozen=True, eq=False)
class Fit:
    """A layout on the GPUs of a request, and what it holds.

    Attributes:
        partition: Layers of each pipeline stage.
        stage: The stage with the least room for the KV cache, which the following bytes are of.
        room: Bytes per GPU that are left for the KV cache; negative if the weights do not fit.
        tokens: Tokens of KV cache of each engine, `Layout.engines`.
        requests: Requests at once of the request's context, over all engines.
        nodes: Nodes that one replica is spread over.
        single: Bound on the speed of one request alone.
        batch: Bound on the speed of all requests at once.
        held: Bound on the speed of those that fit at once, and no more than come; None if none fits.
    """

    layout: Layout
    partition: tuple[int, ...]
    stage: Stage
    weights: WeightBytes
    other: OtherMemory
    room: int
    tokens: int
    requests: int
    nodes: int
    single: Bound
    batch: Bound
    held: Bound | None
    traffic: Traffic


def fit(layout: Layout, request: Request) -> Fit:
    """What a layout holds, for a request that `settled` returned."""
    gpu = cast("Gpu", request.gpu)
    other = layout.other_memory(request.max_num_batched_tokens)
    budget = int(gpu.memory_bytes * request.memory_utilization) - other.total
    partition = _partition(layout, budget)
    tokens, stage = layout.tightest(partition, budget)
    weights, tokens = layout.weights(stage), max(0, tokens)
    requests = layout.engines * (tokens // request.context)
    held = min(requests, request.concurrency)
    return Fit(
        layout,
        partition,
        stage,
        weights,
        other,
        room=budget - weights.total,
        tokens=tokens,
        requests=requests,
        nodes=-(-layout.ranks // request.gpus),
        single=bound(layout, partition, gpu, request.context, 1),
        batch=bound(layout, partition, gpu, request.context, request.concurrency),
        held=bound(layout, partition, gpu, request.context, held) if held else None,
        traffic=traffic(layout, partition, request.gpus),
    )


def ranked(fits: Iterable[Fit], request: Request) -> list[Fit]:
    """The fits, the advised one first."""

    def key(one: Fit) -> tuple:
        layout = one.layout
        if not one.requests:
            return (True, -one.tokens, -one.room)
        if request.goal == "latency":
            return (False, one.nodes, layout.dp, 1 / one.single.tokens_per_s, -layout.replicas)
        held = min(one.requests, request.concurrency)
        copies = (layout.kv_copies, layout.expert_parallel, layout.dp)
        return (False, one.nodes, -held, -layout.replicas, copies, -one.requests)

    found = sorted(fits, key=key)
    spread = next((one for one in found if _is_worth_more_nodes(one, found[0], request)), None)
    return found if spread is None else [spread, *(one for one in found if one is not spread)]


_GAIN = 1.2  # of the bound, which leaves out traffic between nodes and what stages wait for each other


def _is_worth_more_nodes(one: Fit, first: Fit, request: Request) -> bool:
    """Whether a layout over more nodes than the `first`, which lets requests wait, is faster by those that it holds."""
    if request.goal == "latency" or one.nodes <= first.nodes or one.held is None or first.held is None:
        return False
    return first.requests < request.concurrency and one.held.tokens_per_s >= _GAIN * first.held.tokens_per_s


def runner_up(fits: list[Fit], request: Request) -> Fit | None:
    """What else to think of: the layout that holds most if the first of the ranked `fits` is too small, or the next.

    None if all others hold less and are slower, for one request and for all.
    """
    first, *others = fits

    def merits(one: Fit) -> tuple[float, ...]:
        return one.requests, one.single.tokens_per_s, one.batch.tokens_per_s

    better = [
        one for one in others if any(own > of_first for own, of_first in zip(merits(one), merits(first), strict=True))
    ]
    possible = [one for one in better if one.requests]
    if not first.requests or not possible:
        return None
    roomiest = max(possible, key=lambda one: one.requests)
    return roomiest if first.requests < min(request.concurrency, roomiest.requests) else possible[0]


def why(fits: list[Fit], request: Request) -> str:
    """Why the first of the ranked `fits` is advised; empty if there is no other, or none is possible."""
    first, *others = fits
    layout = first.layout
    if not others or not first.requests:
        return ""
    if first.nodes > 1:
        fewer = "one node" if first.nodes == 2 else "fewer nodes"
        held = max((one.requests for one in others if one.nodes < first.nodes), default=0)
        if not held:
            return f"no layout on {fewer} holds a request of {request.context} tokens"
        if request.goal != "latency":
            most = min(first.requests, request.concurrency)
            return f"{most} such requests at once fit on {first.nodes} nodes together, {held} on replicas of {fewer}"
    if request.goal == "latency":
        return f"its GPUs read the least for a token of one request, {first.single.step_bytes / 1e9:.1f} GB each"
    if first.requests < request.concurrency:
        return "no layout" + (" on one node" if request.nodes != 1 else "") + " holds more such requests"
    if layout.replicas > 1:
        gpus = "1 GPU holds" if layout.ranks == 1 else f"{layout.ranks} GPUs hold"
        return f"{gpus} model and requests, and replicas send each other nothing"
    copied = [one for one in others if one.layout.ranks == layout.ranks and one.layout.kv_copies > layout.kv_copies]
    if copied:
        copies, heads = copied[0].layout.kv_copies, layout.config.num_key_value_heads
        return f"{copied[0].layout.name} would keep each of {heads} key/value heads {copies} times"
    if any(one.requests and one.layout.ranks < layout.ranks for one in others):
        return "fewer GPUs would not hold all requests"
    return "fewer GPUs do not hold the model with one request"


# --- which there are ----------------------------------------------------------------------------------------------


def layouts(base: Layout, request: Request) -> list[Layout]:
    """All layouts that make sense on the GPUs of a request, which all of them use.

    Args:
        base: A layout on one GPU.
        request: A request that `settled` returned. Its sizes of parallelism are kept.
    Raises:
        ValueError: If there are none.
    """
    found, obstacles = [], []
    for layout in _divisions(base, request):
        if obstacle := _obstacle(layout, request):
            obstacles.append(obstacle)
        else:
            found.append(layout)
    if found:
        return found
    if obstacles:
        raise ValueError(obstacles[0])
    sizes = {"tp": request.tp, "pp": request.pp, "dp": request.dp}
    given = " x ".join(f"{name}={size}" for name, size in sizes.items() if size is not None)
    nodes = f" on each of {request.nodes} nodes" if request.nodes != 1 else ""
    raise ValueError(
        f"{given} makes no groups of equal size of gpus={request.gpus}{nodes}; change one of them, or leave it out"
    )


def _divisions(base: Layout, request: Request) -> Iterator[Layout]:
    """Layouts of replicas of every size that divides a node or consists of whole nodes."""
    gpus, nodes = request.gpus, request.nodes or 1
    sizes = [*_divisors(gpus), *(gpus * span for span in _divisors(nodes)[1:])]
    for ranks in sizes:
        for dp in _divisors(ranks) if request.dp is None else [request.dp] * (ranks % request.dp == 0):
            tp = _tensor_parallel_size(base.config, request, ranks // dp, dp)
            if tp is None:
                continue
            yield replace(
                base,
                tp=tp,
                pp=ranks // dp // tp,
                dp=dp,
                replicas=gpus * nodes // ranks,
                expert_parallel=dp > 1 or request.expert_parallel,
                redundant_experts=request.redundant_experts,
            )


def _tensor_parallel_size(config: BailingMoeV2Config, request: Request, group: int, dp: int) -> int | None:
    """Size of tensor parallelism for the `group` GPUs of each of `dp` data-parallel ranks; None if there is none.

    Stages are a way out where tensor parallelism ends: at the node, or at what it does not divide. With data
    parallelism there are none unless they are asked for.
    """
    if request.tp is not None:
        tp = request.tp
    elif request.pp is not None:
        tp = group // request.pp or 1
    else:
        powers = (2**power for power in range(request.gpus.bit_length()))
        fitting = (size for size in powers if group % size == request.gpus % size == 0)
        tp = max(size for size in fitting if not tp_obstacle(config, size))
    pp = request.pp or (1 if dp > 1 else group // tp)
    return tp if tp * pp == group else None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _obstacle(layout: Layout, request: Request) -> str:
    """Why a layout is impossible, as a message; empty if it is not."""
    config, tp, pp, dp, ep = layout.config, layout.tp, layout.pp, layout.dp, layout.ep
    if obstacle := tp_obstacle(config, tp):
        return f"tp={tp} does not divide {obstacle}; choose another tp, such as a power of two"
    if pp > config.num_hidden_layers:
        layers = config.num_hidden_layers
        return f"pp={pp} stages are more than num_hidden_layers={layers}; use fewer GPUs or a larger tp"
    if dp > 1 and tp * pp > request.gpus:
        return f"a data-parallel rank of tp={tp} x pp={pp} is larger than a node of {request.gpus} GPUs; leave out dp"
    if dp > 1 and layout.adapters:
        return f"max_loras={request.max_loras} with dp={dp} was never tried; leave out dp for replicas"
    if layout.expert_parallel and ep == 1:
        return "expert parallelism needs more than one GPU, by tp or dp; leave it out, or use more"
    if layout.expert_parallel and ep > config.num_experts:
        return f"tp={tp} x dp={dp} are more than num_experts={config.num_experts}; use fewer GPUs or replicas"
    redundant = layout.redundant_experts
    if redundant and not layout.expert_parallel:
        return f"redundant_experts={redundant} need expert parallelism; add --enable-expert-parallel or --dp"
    if redundant and (config.num_experts + redundant) % ep:
        fitting = redundant + -(config.num_experts + redundant) % ep
        return (
            f"redundant_experts={redundant} and num_experts={config.num_experts} are not the same number on each of "
            f"{ep} ranks, as EPLB wants it; use {fitting}"
        )
    return ""


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
