"""Proofs: a kernel is used only after its results were compared with PyTorch's on the machine at hand.

Dimension letters: T tokens, K experts per token, E experts, H hidden size, I width of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu

TOKENS = (3, 37)  # below and above the number of tokens where CPU kernels change their way of working
_SAMPLE = 512  # sizes above twice this are proved on a smaller matrix with the same remainder


def proof(attempt: Callable[..., str]) -> Callable[..., str]:
    """Decorator of a function that compares a kernel with PyTorch and returns what is wrong, "" if nothing is.

    What the kernel raises becomes the reason why it is not used. Outcomes are remembered for the same arguments.
    """

    @functools.lru_cache(maxsize=64)
    def problem(*shape: Any) -> str:
        try:
            return attempt(*shape)
        except (RuntimeError, TypeError, AttributeError) as error:
            return f"the kernel failed ({' '.join(str(error).split())[:120]})"

    return problem


def sample(size: int) -> int:
    """The size that stands for `size` in a proof."""
    return size if size <= 2 * _SAMPLE else _SAMPLE + size % _SAMPLE


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal numbers in bf16 that keep the size of what they are multiplied with."""
    return torch.randn(*shape, generator=generator, dtype=torch.float32).mul_(shape[-1] ** -0.5).bfloat16()


def difference(result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """What to say if `result` is further from `expected` than `tolerance` times the norm of that."""
    error = float((result.float() - expected).norm() / expected.norm())
    return "" if error <= tolerance else f"the kernel's result is off by {error:.1%}"


def experts_problem(run: Callable[..., None], w13: torch.Tensor, w2: torch.Tensor, tolerance: float) -> str:
    """What is wrong with a kernel for experts whose weights mean `w13` [E, 2I, H] and `w2` [E, H, I].

    Args:
        run: Takes output [T, H], hidden states [T, H] in bf16, weights [T, K] and ids [T, K] of the picks.
        tolerance: Of the norm of the result.
    """
    generator = torch.Generator().manual_seed(1)
    experts, hidden_size = w2.shape[:2]
    for tokens in TOKENS:
        x = random(generator, tokens, hidden_size)
        weights, ids = torch.rand(tokens, experts, generator=generator, dtype=torch.float32).topk(2)
        output = torch.full_like(x, torch.nan)
        run(output, x, weights, ids.int())
        gate, up = torch.einsum("th,eih->tei", x.float(), w13.float()).chunk(2, dim=-1)
        every = torch.einsum("tei,ehi->teh", silu(gate) * up, w2.float())
        picked = every.gather(1, ids.unsqueeze(-1).expand(-1, -1, hidden_size))
        problem = difference(output, (picked * weights.unsqueeze(-1)).sum(1), tolerance)
        if problem:
            return problem
    return ""
