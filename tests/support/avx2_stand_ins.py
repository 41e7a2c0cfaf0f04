"""What the operations of avx2.cpp compute, in PyTorch and with all digits of activations.

From the layout of the weights alone: what is packed wrongly is wrong here too.
"""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from tests.support.cpu_stand_ins import wrong


def meaning(weights):
    """What a stack of weights (`avx2.Weights`) stands for: [E, N, K] fp64."""
    data, scales, zeros, rows = weights
    if data.dtype in (torch.bfloat16, torch.float16):
        return data.double()
    if data.dtype == torch.int8:
        return data.double() * scales.double().unsqueeze(-1)
    if data.dtype == torch.float8_e4m3fn:
        spread = scales.double().repeat_interleave(rows, 1).repeat_interleave(128, 2)
        return data.double() * spread[:, : data.shape[1], : data.shape[2]]
    levels, group = _levels_for_vnni(data, scales) if data.ndim == 4 else _levels(data, scales)
    scale, zero = (
        one.double().transpose(2, 3).flatten(1, 2).repeat_interleave(group, -1) for one in (scales, zeros)
    )  # [E, N, K]
    return (levels - zero) * scale


def _levels_for_vnni(data, scales):
    """Of integers of four bits, [E, N, K], and the size of a group."""
    experts, blocks, eights, _ = data.shape  # 64 bytes: of 16 outputs four inputs in lower halves, four in upper ones
    fours = data.view(experts, blocks, eights, 16, 1, 4)
    levels = torch.cat((fours & 15, fours >> 4), -2).transpose(2, 3).reshape(experts, 16 * blocks, 8 * eights)
    return levels.double(), 8 * eights // scales.shape[2]


def _levels(data, scales):
    groups, inputs = scales.shape[2], 2 * data.shape[2]
    group = inputs // groups
    half = min(group, 64) // 2  # so many bytes hold twice as many inputs, the first of them in their lower halves
    bytes_ = data.reshape(len(data), -1, inputs // (2 * half), 4, half).transpose(2, 3).flatten(1, 2)
    return torch.stack((bytes_ & 15, bytes_ >> 4), -2).flatten(-3).double(), group


def avx2_linear(x, data, scales, zeros, rows, bias):
    result = x.double() @ meaning((data, scales, zeros, rows))[0].t()
    return (result if bias is None else result + bias.double()).to(x.dtype)


def avx2_experts(
    output, x, data13, scales13, zeros13, rows13, data2, scales2, zeros2, rows2, weights, ids
):  # fmt: skip
    first, second = meaning((data13, scales13, zeros13, rows13)), meaning((data2, scales2, zeros2, rows2))
    result = torch.zeros(x.shape, dtype=torch.float64)
    for expert in ids.unique().tolist():
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens].double() @ first[expert].t()).chunk(2, -1)
        part = (silu(gate) * up) @ second[expert].t()
        result.index_add_(0, tokens, part * weights[tokens, places].double().unsqueeze(-1))
    output.copy_(result)


_registered: list[torch.library.Library] = []  # they end with the object


def register(damaged: str | None = None) -> None:
    """Have these run in this process in place of the compiled ones.

    Args:
        damaged: One of the operations; it alone is replaced, and its results are wrong.
    """
    from vllm_bailing.plugin.kernels import avx2

    avx2.load()
    library = torch.library.Library("vllm_bailing", "IMPL")
    _registered.append(library)
    for right in (avx2_linear, avx2_experts):
        if damaged is None:
            library.impl(right.__name__, right, "CPU", allow_override=True)
        elif damaged == right.__name__:
            library.impl(damaged, wrong(right), "CPU", allow_override=True)
