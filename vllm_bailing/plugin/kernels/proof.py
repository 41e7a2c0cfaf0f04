"""Proofs: a kernel is used only after its results were compared with PyTorch's on the machine at hand.

Dimension letters: T tokens, K experts per token, E experts, H hidden size, I width of an expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import silu

RunExperts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]  # as experts_problem takes it
RunLinear = Callable[[torch.Tensor], torch.Tensor]  # [T, K] to [T, N]
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


def linear_problem(run: RunLinear, weight: torch.Tensor, tolerance: float) -> str:
    """What is wrong with a kernel for a linear layer whose weights mean `weight` [N, K].

    Args:
        run: Takes hidden states [T, K] in bf16.
        tolerance: Of the norm of the result.
    """
    generator = torch.Generator().manual_seed(1)
    for tokens in TOKENS:
        x = random(generator, tokens, weight.shape[1])
        problem = difference(run(x), x.float() @ weight.float().t(), tolerance)
        if problem:
            return problem
    return ""


def experts_problem(run: RunExperts, w13: torch.Tensor, w2: torch.Tensor, tolerance: float) -> str:
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


# ---- quantized weights and what they mean --------------------------------------------------------------------------

_EXPERTS = 3  # of a proof
BLOCK = 128  # fp8 weights have a scale for each block of this many rows and columns
# Bits 4 i to 4 i + 3 of a word hold the value with this number of eight.
ORDERS = {"GPTQ": (0, 1, 2, 3, 4, 5, 6, 7), "AWQ": (0, 2, 4, 6, 1, 3, 5, 7)}


def matrices(hidden_size: int, width: int) -> tuple[torch.Generator, list[torch.Tensor]]:
    """Random weights [E, 2I, H] and [E, H, I]."""
    generator = torch.Generator().manual_seed(0)
    h, i = sample(hidden_size), sample(width)
    return generator, [random(generator, _EXPERTS, 2 * i, h).float(), random(generator, _EXPERTS, h, i).float()]


def matrix(n: int, k: int) -> torch.Tensor:
    """Random weights [N, K]."""
    return random(torch.Generator().manual_seed(0), sample(n), sample(k)).float()


def in_int8(plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels in int8, a scale for each output [..., N, 1] and what both mean, of weights [..., N, K]."""
    scale = plain.abs().amax(-1, keepdim=True) / 127
    level = (plain / scale).round().to(torch.int8)
    return level, scale, level.float() * scale


def in_blocks(plain: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels in fp8, a scale for each block, and what both mean, of weights [..., N, K]."""
    n, k = plain.shape[-2:]
    shape = (*plain.shape[:-2], -(-n // rows), -(-k // BLOCK))
    generator = torch.Generator().manual_seed(2)
    scale = (torch.rand(shape, generator=generator, dtype=torch.float32) + 0.5) / 448
    spread = scale.repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(BLOCK, -1)[..., :k]
    level = (plain / plain.abs().max() * 448).to(torch.float8_e4m3fn)
    return level, scale, level.float() * spread


def in_groups(
    generator: torch.Generator, plain: torch.Tensor, group: int, algorithm: str, order: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """Words, scales [E, G, N], zero points in words [E, G, N / 8], and what they mean, of weights [E, N, K].

    Words are [E, K / 8, N] for GPTQ, whose zero points are stored less one, and [E, K, N / 8] for AWQ.
    """
    grouped = plain.unflatten(-1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)  # [E, N, G]
    scale = ((high - low) / 15).bfloat16()
    zero = (-low / scale.float()).round().clamp(1, 15)
    level = (grouped / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    meaning = ((level - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(-2)
    is_gptq = algorithm == "GPTQ"
    levels = level.flatten(-2).transpose(1, 2)  # [E, K, N]
    words = words_of(levels.transpose(1, 2), order).transpose(1, 2) if is_gptq else words_of(levels, order)
    zeros = words_of(zero.transpose(1, 2) - (1 if is_gptq else 0), order)
    return words.contiguous(), scale.transpose(1, 2).contiguous(), zeros, meaning


def words_of(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Integers of four bits [..., n] as int32 [..., n / 8]."""
    eights = values.long().unflatten(-1, (-1, 8))
    words = sum(eights[..., index] << 4 * place for place, index in enumerate(order))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()
