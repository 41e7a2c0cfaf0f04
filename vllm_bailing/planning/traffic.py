"""What GPUs send each other: a consequence of the layout that memory does not show.

Letters: H hidden size, K experts per token, b bytes of an element, n ranks.

In a ring, an all-reduce of S bytes makes every rank send 2 S (n - 1) / n, an all-gather to S bytes or a reduce-scatter
of them S (n - 1) / n. Source: NVIDIA, nccl-tests, `doc/PERFORMANCE.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_bailing.planning.memory import Layout

_ROUTE = 4 + 4  # bytes of an expert's number and its weight


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends for each token of its replica, over the layers of the largest stage.

    Attributes:
        tensor: Of tensor parallelism: all-reduces after the attention and after the MLP of each layer.
        experts: Tokens gathered from all data-parallel ranks before the routed experts of each layer, and reduced
            after them, by vLLM's default `allgather_reducescatter`.
        pipeline: To the next stage.
        between_nodes: What of all this leaves the node.
    """

    tensor: float
    experts: float
    pipeline: float
    between_nodes: float

    @property
    def total(self) -> float:
        return self.tensor + self.experts + self.pipeline


def traffic(layout: Layout, partition: tuple[int, ...], gpus: int) -> Traffic:
    """Traffic of one replica on nodes of `gpus` GPUs."""
    most = max(layout.stages(partition), key=lambda stage: stage.end - stage.first)
    dense = max(0, min(most.end, layout.config.first_k_dense_replace) - most.first)
    moe = most.end - most.first - dense
    of_dense, _ = layer_traffic(layout, is_moe=False)
    of_moe, of_experts = layer_traffic(layout, is_moe=True)
    tensor, experts = dense * of_dense + moe * of_moe, moe * of_experts
    # Hidden states and residual, a part from each rank. Source: vLLM, `GroupCoordinator.send_tensor_dict`.
    pipeline = 2 * _token_bytes(layout) / layout.tp / layout.dp if layout.pp > 1 else 0.0
    leaves = 0.0
    if layout.ranks > gpus:
        leaves = pipeline + (experts if layout.dp > 1 else 0.0) + (tensor if layout.tp > gpus else 0.0)
    return Traffic(tensor, experts, pipeline, leaves)


def layer_traffic(layout: Layout, is_moe: bool) -> tuple[float, float]:
    """(tensor, experts) of one layer, as in `Traffic`: bytes that one GPU sends for a token of its replica.

    A TP group reduces the tokens of its own data-parallel rank alone. If it divides those of an MoE layer among its
    ranks (`Layout.is_sequence_parallel`), all ranks exchange them, and the group gathers its own afterwards.
    """
    hidden, tp, dp = _token_bytes(layout), layout.tp, layout.dp
    reduce = 2 * hidden * (tp - 1) / tp / dp
    if not is_moe or dp == 1:
        return 2 * reduce, 0.0
    ranks = dp * tp if layout.is_sequence_parallel else dp
    there = hidden + layout.config.num_experts_per_tok * _ROUTE
    experts = (there + hidden) * (ranks - 1) / ranks
    if layout.is_sequence_parallel:
        return reduce + hidden * (tp - 1) / tp / dp, experts
    return 2 * reduce, experts


def _token_bytes(layout: Layout) -> int:
    """Bytes of a token's hidden state: H b."""
    return layout.config.hidden_size * (4 if layout.dtype == "fp32" else 2)
