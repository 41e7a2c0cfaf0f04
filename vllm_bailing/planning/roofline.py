"""How fast decoding can be at most: what a step has to read and compute, over what a GPU can.

Letters: T tokens of one step (one per request), D distinct experts, E routed experts, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vllm_bailing.planning.gpus import Gpu
from vllm_bailing.planning.memory import Layout, Stage


@dataclass(frozen=True)
class Bound:
    """The shortest decoding step of `batch` requests, and so the highest speed that a deployment can reach.

    Attributes:
        batch: Requests at once.
        step_bytes: Bytes of weights and KV cache that one GPU of the busiest pipeline stage reads in a step.
        step_flops: FLOPs that it computes in a step.
        tokens_per_s: Tokens of all requests together, without drafts and adapters.
        limit: What the step waits for, "bandwidth" or "compute".
    """

    batch: int
    step_bytes: int
    step_flops: int
    tokens_per_s: float
    limit: str


def bound(layout: Layout, partition: tuple[int, ...], gpu: Gpu, context: int, batch: int) -> Bound:
    """Roofline of a decoding step, all requests `context` tokens long.

    Replicas share the requests evenly. A pipeline works on as many batches at once as it has stages.

    Args:
        partition: Layers of each pipeline stage.
    """
    replicas = min(layout.replicas, batch)
    own = batch / replicas
    at_once = min(layout.pp, own)
    steps = [stage_step(layout, stage, context, own / at_once) for stage in layout.stages(partition)]
    peak = (gpu.flops_8 if layout.dtype in ("fp8", "int8") else None) or gpu.flops_16 or math.inf
    seconds = [max(read / gpu.bandwidth, flops / peak) for read, flops in steps]
    busiest = max(range(layout.pp), key=seconds.__getitem__)
    read, flops = steps[busiest]
    return Bound(
        batch,
        round(read),
        round(flops),
        replicas * own / max(sum(seconds), at_once * seconds[busiest]),
        "bandwidth" if read / gpu.bandwidth >= flops / peak else "compute",
    )


def stage_step(layout: Layout, stage: Stage, context: int, tokens: float) -> tuple[float, float]:
    """(bytes, FLOPs) of one stage on one GPU, for a step of T `tokens` of a replica, each after `context` others.

    With uniform routing D = E (1 - (1 - K / E)^T) distinct experts are read (MoESD, arXiv 2505.19645, equation for the
    expected number of activated experts). Data-parallel ranks share the tokens evenly. Redundant experts count as never
    read, and ranks that divide experts as wholes as having equally many of those that are: a bound from below.
    """
    config, weights, layers = layout.config, layout.weights(stage), stage.end - stage.first
    own = max(min(tokens, 1.0), tokens / layout.dp)  # tokens of a data-parallel rank that has any
    share = config.num_experts_per_tok / config.num_experts
    used = config.num_experts / layout.ep / layout.local_experts  # of the experts that the rank holds
    distinct = 1 - (1 - share) ** tokens  # D / E
    read = weights.total - weights.embedding - weights.mtp - weights.routed_experts - weights.adapters
    read += weights.routed_experts * used * distinct + layers * layout.kv_bytes_per_layer * context * own
    whole = ("shared_experts", "router") if layout.is_sequence_parallel else ()  # of which each rank has its own tokens
    active = sum(
        layout.part(name, stage).elements / (layout.tp if name in whole else 1)
        for name in ("attention", "dense_mlp", "shared_experts", "router")
    )
    active += layout.vocabulary.elements if stage.index == layout.pp - 1 else 0
    heads = config.num_attention_heads // layout.tp
    attention = 4 * context * heads * config.head_dim * layers  # two products over all positions
    experts = layout.part("routed_experts", stage).elements * used * share
    return read, own * (2 * active + attention) + tokens * 2 * experts


def step_bytes(layout: Layout, context: int, batch: int) -> float:
    """Bytes that a rank of a model in one stage reads for a decoding step of `batch` requests of `context` tokens."""
    return stage_step(layout, Stage(0, 0, layout.config.num_hidden_layers), context, batch)[0]
