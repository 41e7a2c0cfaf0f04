"""Weights as the kernels keep them, put back into the layout of the checkpoint.

Where a trainer sends a part of a layer, the rest has to be had from the running engine. On a GPU most kernels take the
checkpoint's layout. On a CPU they do not, and the plain weights are gone: a matrix is read off its product with the
identity, and experts by packing the numbers of the places, which says where each place went.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

Tensors = Mapping[str, torch.Tensor]
_PLAIN_EXPERTS = ("TRITON", "BATCHED_TRITON")  # backends of vLLM's that take experts as they are stored
_EXPERTS = ("w13_weight", "w2_weight")
_BASE = 255  # bf16 holds the digits 1 to 255 exactly; 0 stands for padding
_ROWS = 1024  # of the identity at a time


def has_checkpoint_layout(layer: nn.Module) -> bool:
    """Whether the kernels of `layer` take its weights as the checkpoint stores them."""
    method = getattr(layer, "quant_method", None)
    if method is None:
        return True
    if current_platform.is_cpu():
        return False
    if isinstance(method, UnquantizedFusedMoEMethod):
        return getattr(method.unquantized_backend, "name", "") in _PLAIN_EXPERTS
    return isinstance(method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod))


def in_checkpoint_layout(layer: Any, stored: Tensors, kept: Tensors) -> dict[str, torch.Tensor] | None:
    """The present parameters of `layer`, in the checkpoint's layout; None where they cannot be had.

    Args:
        stored: The parameters as they are loaded: names, shapes, dtypes.
        kept: The parameters as the kernels keep them.
    """
    values = {name: kept[name] for name in stored if name in kept}
    if not has_checkpoint_layout(layer):
        method = layer.quant_method
        if not current_platform.is_cpu():
            return None
        if isinstance(method, UnquantizedFusedMoEMethod):
            unpacked = _unpacked_experts(layer, stored, kept)
            if unpacked is None:
                return None
            values |= unpacked
        elif isinstance(method, UnquantizedLinearMethod):
            if kept["weight"].shape != stored["weight"].shape:  # what cannot be packed stays plain
                values["weight"] = _unpacked_matrix(layer, stored["weight"], kept["weight"])
        else:
            return None
    fits = all(
        value.shape == stored[name].shape and value.dtype == stored[name].dtype for name, value in values.items()
    )
    return values if fits else None


def _unpacked_matrix(layer: Any, stored: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] of a linear layer for CPUs; exact, as every product has one term."""
    outputs, inputs = stored.shape
    weight = torch.empty(outputs, inputs, dtype=stored.dtype)
    for start in range(0, inputs, _ROWS):
        count = min(_ROWS, inputs - start)
        rows = torch.zeros(count, inputs, dtype=stored.dtype)
        rows[torch.arange(count), torch.arange(start, start + count)] = 1
        weight[:, start : start + count] = layer.cpu_linear(rows, kept, None).t()
    return weight


def _unpacked_experts(layer: Any, stored: Tensors, kept: Tensors) -> dict[str, torch.Tensor] | None:
    """The experts' weights [E, 2I, H] and [E, H, I], or None if the packing is no change of places, or not known."""
    if not hasattr(getattr(layer.quant_method, "moe_kernel", None), "fused_experts"):  # vLLM up to 0.31
        return None
    places = _places_of_experts(layer, stored)
    values = {}
    for name in _EXPERTS:
        shape, place = stored[name].shape, places[name]
        taken = place >= 0  # the others are padding
        if len(place) != kept[name][0].numel() or not torch.equal(
            place[taken].sort()[0], torch.arange(shape[1:].numel())
        ):
            return None
        values[name] = torch.empty(shape, dtype=stored[name].dtype)
        for expert, packed in zip(values[name], kept[name], strict=True):
            expert.view(-1)[place[taken]] = packed.reshape(-1)[taken]
    return values


def _places_of_experts(layer: Any, stored: Tensors) -> dict[str, torch.Tensor]:
    """For each place of a packed expert, the place in the checkpoint's layout that it holds; -1 for padding."""
    sizes = {name: stored[name].shape[1:].numel() for name in _EXPERTS}
    digits = next(count for count in range(1, 9) if _BASE**count >= max(sizes.values()))
    places: dict[str, Any] = {}
    for digit in range(digits):
        numbered = nn.Module()
        numbered.__dict__.update({key: value for key, value in vars(layer).items() if not key.startswith("_")})
        for name in _EXPERTS:
            numbers = torch.arange(sizes[name]) // _BASE**digit % _BASE + 1
            part = numbers.to(stored[name].dtype).view(1, *stored[name].shape[1:])
            numbered.register_parameter(name, nn.Parameter(part, requires_grad=False))
        layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(numbered)
        for name in _EXPERTS:
            packed = getattr(numbered, name).data.reshape(-1).long()
            known = places.get(name, torch.where(packed > 0, 0, -1))
            places[name] = known + torch.where(packed > 0, (packed - 1) * _BASE**digit, 0)
    return places
