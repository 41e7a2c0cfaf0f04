"""What the kernels of avx2.cpp compute, in PyTorch and with all digits of activations; by the layout of the weights."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


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
    groups, inputs = scales.shape[2], 2 * data.shape[2]
    group = inputs // groups
    half = min(group, 64) // 2  # so many bytes hold twice as many inputs, the first of them in their lower halves
    bytes_ = data.unflatten(-1, (-1, half))
    levels = torch.stack((bytes_ & 15, bytes_ >> 4), -2).flatten(-3).double()
    scale, zero = (
        one.double().transpose(2, 3).flatten(1, 2).repeat_interleave(group, -1) for one in (scales, zeros)
    )  # [E, N, K]
    return (levels - zero) * scale


def linear(x, weights, bias=None):
    result = x.double() @ meaning(weights)[0].t()
    return (result if bias is None else result + bias.double()).to(x.dtype)


def experts(output, x, w13, w2, weights, ids):
    first, second = meaning(w13), meaning(w2)
    result = torch.zeros(x.shape, dtype=torch.float64)
    for expert in ids.unique().tolist():
        tokens, places = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens].double() @ first[expert].t()).chunk(2, -1)
        part = (silu(gate) * up) @ second[expert].t()
        result.index_add_(0, tokens, part * weights[tokens, places].double().unsqueeze(-1))
    output.copy_(result)
