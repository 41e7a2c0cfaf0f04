"""Expert parallelism on vLLM's CPU build: experts that heed which of them their rank holds.

vLLM hands every class of experts the map from a model's experts to this rank's, and those for CPUs pass it over: they
index this rank's weights by the model's numbers, which is another expert's weight or no memory of theirs at all.

Dimension letters: T tokens, K experts per token, E experts of the model.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from vllm.platforms import current_platform

from vllm_bailing.errors import SettingsError
from vllm_bailing.plugin.shims import takes_expert_map


def heed_expert_map(model: nn.Module, vllm_config: Any) -> None:
    """Let the experts of `model` compute what their rank holds, where vLLM's own classes for CPUs would not.

    Call it before the weights are loaded, which is when vLLM makes the experts' kernels.

    Raises:
        SettingsError: If experts are of a kind that cannot be told.
    """
    if not current_platform.is_cpu() or not vllm_config.parallel_config.enable_expert_parallel:
        return
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        experts = getattr(method, "experts_cls", None)
        if method is None or not hasattr(module, "expert_map"):
            continue
        if not takes_expert_map(experts):
            raise SettingsError(
                f"--enable-expert-parallel: {type(method).__name__} of vLLM's CPU build does not know which experts a "
                "rank holds; leave it out, and --tensor-parallel-size divides every expert"
            )
        method.experts_cls = heeding(experts)  # pyright: ignore[reportOptionalMemberAccess]


@functools.cache
def heeding(experts: Any) -> Any:
    """A class of experts that gives `experts`, one of vLLM's, the picks that this rank holds, by its own numbers."""
    if getattr(experts, "heeds_expert_map", False):
        return experts

    class ExpertsOfThisRank(experts):
        heeds_expert_map = True

        def apply(
            self, *, topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None, **rest: Any
        ) -> Any:
            if expert_map is not None:
                topk_weights, topk_ids = picks_of_this_rank(topk_weights, topk_ids, expert_map)
            return super().apply(topk_weights=topk_weights, topk_ids=topk_ids, expert_map=None, **rest)

    ExpertsOfThisRank.__name__ = ExpertsOfThisRank.__qualname__ = experts.__name__  # vLLM logs it
    return ExpertsOfThisRank


def picks_of_this_rank(
    weights: torch.Tensor, ids: torch.Tensor, expert_map: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The picks of each token that this rank holds, by this rank's numbers.

    Args:
        weights: [T, K].
        ids: [T, K], the model's numbers.
        expert_map: [E], this rank's number of each expert, -1 for those of other ranks.
    Returns:
        Weights and ids [T, L], L the most picks that a token has here, at least one. Tokens with fewer are filled up
        with picks of weight zero.
    """
    local = expert_map[ids.long()]
    is_here = local >= 0
    most = max(int(is_here.sum(1).max()), 1) if len(ids) else ids.shape[1]
    order = is_here.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    weights, local = weights.masked_fill(~is_here, 0).gather(1, order), local.clamp(min=0).gather(1, order)
    return weights.contiguous(), local.to(ids.dtype).contiguous()
