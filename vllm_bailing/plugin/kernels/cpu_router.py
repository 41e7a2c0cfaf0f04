"""The router on x86 CPUs: one operation of avx2.py for its choice, and its weight in bf16.

vLLM's rule for CPUs is fifteen small operations of PyTorch for every layer. With one token they take longer than many a
matrix product.

Dimension letters: T tokens, H hidden size, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.plugin.kernels import avx2
from vllm_bailing.plugin.kernels.cpu_widened import avx2_problem, uses_avx2
from vllm_bailing.plugin.kernels.proof import TOKENS, proof
from vllm_bailing.plugin.shims import grouped_topk_for_cpus

logger = init_logger("vllm.plugins.bailing.cpu")

_TOLERANCE = 1e-6  # of a weight before it is scaled, which is at most 1


def multiplies_gate(vllm_config: Any, experts: int, hidden_size: int) -> bool:
    """Whether there is a product of a router's weight [E, H] in bf16 that leaves logits in fp32."""
    return uses_avx2(vllm_config, torch.bfloat16) and not avx2_problem(torch.bfloat16, experts, hidden_size)


def routing_function(vllm_config: Any, config: BailingMoeV2Config, bias: torch.Tensor) -> Callable[..., Any] | None:
    """What vLLM's router calls in place of its own rule, with logits [T, E]; None where its own stays.

    Args:
        bias: [E], which the choice alone sees.
    """
    if not uses_avx2(vllm_config, torch.get_default_dtype()) or grouped_topk_for_cpus() is None:
        return None
    rule = rule_of(config)
    if problem := _problem(config.num_experts, *rule[:-1]):
        logger.info_once("The choice of experts stays in PyTorch: %s", problem)
        return None

    def route(*, gating_output: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return avx2.route(gating_output, bias, *rule)

    return route


def rule_of(config: BailingMoeV2Config) -> tuple[int, int, int, bool, float]:
    """What `avx2.route` takes after logits and bias."""
    picks = config.num_experts_per_tok
    return config.n_group, config.topk_group, picks, picks > 1, config.routed_scaling_factor


@proof
def _problem(experts: int, groups: int, open_groups: int, picks: int, normalizes: bool) -> str:
    """Why the operation cannot choose; empty if it can."""
    generator = torch.Generator().manual_seed(0)
    for tokens in TOKENS:
        logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float32)
        bias = torch.randn(experts, generator=generator, dtype=torch.float32) / 10
        weights, ids = avx2.route(logits, bias, groups, open_groups, picks, normalizes, 1.0)
        plain = grouped_topk_for_cpus()(logits, picks, normalizes, groups, open_groups, "sigmoid", 1.0, bias)
        found, expected = (
            torch.zeros_like(logits).scatter_(1, chosen.long(), of) for of, chosen in ((weights, ids), plain)
        )
        if not bool(((found - expected).abs() <= _TOLERANCE).all()):
            return "the operation chooses other experts or weights"
    return ""
