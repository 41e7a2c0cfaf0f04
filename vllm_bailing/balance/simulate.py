"""How even expert-parallel ranks would be: recorded picks against placements of the experts.

vLLM's expert load balancing (EPLB) places experts by what was picked before. So the placement is made from every other
request of the trace, and judged on steps of tokens that are drawn from the rest.

Dimension letters: S steps, L layers with experts, E routed experts, P slots of all ranks for experts and their copies,
R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_bailing.balance.trace import Trace, counted
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import BalanceError
from vllm_bailing.planning.memory import Layout, Stage, stored_dtype

_SEED = 0
_STEPS = 200  # that are drawn
_NEAR = 0.02  # copies of more experts have to gain at least this part of an even share


@dataclass(frozen=True)
class Copies:
    """Ranks that EPLB keeps even.

    Attributes:
        redundant: Copies of experts in each layer, over all ranks.
        imbalance: As `Balance.linear`.
        bytes: What the copies take of each GPU, over all layers.
    """

    redundant: int
    imbalance: float
    bytes: int


@dataclass(frozen=True)
class Balance:
    """How even a number of ranks is. An imbalance is the load of the busiest rank, times an even share.

    Attributes:
        ep: Expert-parallel ranks, R.
        nodes: That they are spread over.
        even: Imbalance of a router without preferences, with experts in their order: what chance alone makes of a step.
        linear: Imbalance of experts in their order, as vLLM places them.
        round_robin: Imbalance with `--expert-placement-strategy round_robin`.
        eplb: With EPLB, by number of copies, from none.
        worth: That with the fewest copies which is about as even as any.
    """

    ep: int
    nodes: int
    even: float
    linear: float
    round_robin: float
    eplb: tuple[Copies, ...]
    worth: Copies


def waiting(imbalance: float) -> float:
    """The part of the time in expert layers for which the average rank waits for the busiest."""
    return 1 - 1 / imbalance


def simulate(
    trace: Trace, config: BailingMoeV2Config, sizes: list[int], step_tokens: int, gpus: int = 8
) -> list[Balance]:
    """How even ranks of expert parallelism would be, for each number of ranks in `sizes`.

    Args:
        step_tokens: Tokens of all ranks in a step: fewer are less even.
        gpus: In each node; EPLB keeps groups of experts on a node.
    Raises:
        BalanceError: If the ranks cannot have equal numbers of experts, or there is but one request.
    """
    check_sizes(config, sizes)
    requests = trace.requests()
    if len(requests) < 2:
        raise BalanceError(
            "one request is too little: EPLB would be judged on what it learned from; give several prompts"
        )
    past, later = (np.concatenate(requests[first::2]) for first in (0, 1))
    load, tokens = counted(past, trace.experts), tokens_of_step(trace, step_tokens)
    draw = np.random.default_rng(_SEED)
    steps = (draw.permutation(len(later))[:tokens] for _ in range(_STEPS))
    counts = np.stack([counted(later[step], trace.experts) for step in steps])
    by_chance = _chance_counts(config, tokens)
    return [_balance(config, size, gpus, load, counts, by_chance) for size in sizes]


def tokens_of_step(trace: Trace, wanted: int) -> int:
    """Tokens of a step: as wanted, but no more than the requests have that it is drawn from."""
    return min(wanted, sum(trace.lengths[1::2]))


def check_sizes(config: BailingMoeV2Config, sizes: list[int]) -> None:
    """Raises BalanceError for numbers of ranks that cannot have equal numbers of experts."""
    for size in sizes:
        if size < 2 or config.num_experts % size:
            fitting = [one for one in range(2, config.num_experts + 1) if config.num_experts % one == 0]
            listed = ", ".join(map(str, fitting[:8]))
            raise BalanceError(f"--ep {size} does not divide num_experts={config.num_experts}; use some of {listed}")


def _balance(
    config: BailingMoeV2Config,
    ep: int,
    gpus: int,
    load: np.ndarray,
    counts: np.ndarray,
    by_chance: np.ndarray,
) -> Balance:
    nodes = ep // gpus if ep > gpus and ep % gpus == 0 else 1
    linear = np.arange(config.num_experts)
    tried = []
    for copies in _numbers_of_copies(config.num_experts, ep):
        placed = rebalanced(load, config, copies, nodes, ep)
        tried.append(Copies(copies, imbalance(counts, placed, ep), _bytes_of_copies(config, ep, copies)))
    best = min(one.imbalance for one in tried)
    return Balance(
        ep,
        nodes,
        even=imbalance(by_chance, linear[None], ep),
        linear=imbalance(counts, linear[None], ep),
        round_robin=imbalance(counts, linear.reshape(-1, ep).T.reshape(1, -1), ep),
        eplb=tuple(tried),
        worth=next(one for one in tried if one.imbalance <= best + _NEAR),
    )


def rebalanced(load: np.ndarray, config: BailingMoeV2Config, copies: int, nodes: int, ep: int) -> np.ndarray:
    """Which expert each slot of the ranks gets from vLLM's load balancing: [L, P], in the order of the ranks.

    Args:
        load: [L, E], how often each expert was picked.
    """
    import torch
    from vllm.distributed.eplb.policy import EPLB_POLICIES

    # As `EplbState.rearrange` calls it.
    placed = EPLB_POLICIES["default"].rebalance_experts(
        torch.from_numpy(load), config.num_experts + copies, config.n_group, nodes, ep
    )
    return placed.numpy()


def imbalance(counts: np.ndarray, placed: np.ndarray, ep: int) -> float:
    """Load of the busiest rank, times an even share: mean over steps and layers.

    A step's picks of an expert are divided evenly among its copies, as vLLM does on average, by a hash of the token's
    place.

    Args:
        counts: [S, L, E], picks in a step.
        placed: [L or 1, P], expert of each slot.
    """
    placed = np.broadcast_to(placed, (counts.shape[1], placed.shape[1]))
    copies = np.stack([np.bincount(row, minlength=counts.shape[2]) for row in placed])
    share = counts / copies
    slots = np.take_along_axis(share, placed[None].repeat(len(share), 0), axis=2)
    ranks = slots.reshape(*slots.shape[:2], ep, -1).sum(-1)
    return float((ranks.max(-1) / ranks.mean(-1)).mean())


def _chance_counts(config: BailingMoeV2Config, tokens: int) -> np.ndarray:
    """Counts [S, 1, E] of tokens that each pick different experts by chance."""
    draw = np.random.default_rng(_SEED)
    shape = (tokens, config.num_experts)
    picks = (np.argpartition(draw.random(shape), config.num_experts_per_tok - 1, axis=1) for _ in range(_STEPS))
    return np.stack([counted(one[:, None, : config.num_experts_per_tok], config.num_experts) for one in picks])


def _numbers_of_copies(experts: int, ep: int) -> list[int]:
    """None, then 1, 2, 4, ... on each rank, up to a copy of every expert."""
    numbers, each = [0], 1
    while each * ep <= experts:
        numbers.append(each * ep)
        each *= 2
    return numbers


def _bytes_of_copies(config: BailingMoeV2Config, ep: int, copies: int) -> int:
    whole = Stage(0, 0, config.num_hidden_layers)
    with_copies, without = (
        Layout(config, stored_dtype(config), dp=ep, expert_parallel=True, redundant_experts=number)
        .weights(whole)
        .routed_experts
        for number in (copies, 0)
    )
    return with_copies - without
