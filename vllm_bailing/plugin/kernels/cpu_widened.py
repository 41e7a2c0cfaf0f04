"""Multiply bf16 and fp16 matrices in fp32 on CPUs that have no instructions for them.

oneDNN refuses bf16 on x86 processors without AVX-512 (AMD before Zen 4, Intel Core from the 12th generation on), and
fp16 on most others too. vLLM's CPU build then calls PyTorch's `linear`, whose loops for these types do not get faster
with more tokens. Here up to a hundred tokens take the kernels of avx2.py, where those can be compiled and prove right.
For more, a part of the weight at a time becomes fp32, as much as stays in a cache, and goes through the matrix product
of fp32. Both are the same sums, with less rounding. What is kept in memory stays in bf16.

How much faster: docs/benchmarks.md. Dimension letters: T tokens, N outputs and K inputs of a linear layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

from vllm_bailing.plugin.kernels import avx2
from vllm_bailing.plugin.kernels.proof import linear_problem, matrix, proof
from vllm_bailing.plugin.options import wants_cpu_kernels
from vllm_bailing.processor import quantized_kernels

logger = init_logger("vllm.plugins.bailing.cpu")

_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_FEW_TOKENS = 4  # up to so many, PyTorch's loops are as fast as a product in parts: they read the weight once
_TOLERANCE = 0.01  # of the norm of the result; bf16 rounding alone stays below 0.004
_PART = 2**19  # numbers of the weight that become fp32 at a time


def has_zentorch() -> bool:
    """Whether AMD's zentorch is there, which brings matrix products of its own."""
    return hasattr(torch.ops, "zentorch") and hasattr(torch.ops.zentorch, "zentorch_linear_unary")


def widens(dtype: torch.dtype) -> bool:
    """Whether nothing but PyTorch's loops has a matrix product of `dtype` on this CPU."""
    asked = getattr(torch.ops.mkldnn, _SUPPORTED.get(dtype, ""), None)
    return current_platform.is_cpu() and asked is not None and not asked() and not has_zentorch()


def uses_avx2(vllm_config: Any, dtype: torch.dtype) -> bool:
    """Whether an engine may compute in kernels of avx2.py what would be in `dtype`; each is proved besides."""
    may = current_platform.is_cpu() and wants_cpu_kernels(vllm_config) is not False and dtype in _SUPPORTED
    return may and not _missing()


@proof
def _missing() -> str:
    missing = quantized_kernels().obstacle or ("" if torch.cpu._is_avx2_supported() else "this CPU has no AVX2")
    if not missing:
        avx2.load()
    return missing


@proof
def avx2_problem(dtype: torch.dtype, n: int, k: int) -> str:
    """Why the kernels of avx2.py cannot multiply with weights [n, k] of `dtype`; empty if they can."""
    odd = n % avx2.MULTIPLES[0] or k % avx2.MULTIPLES[1]
    if _missing() or odd:
        return _missing() or f"[{n}, {k}] are no multiples of {avx2.MULTIPLES}"
    weight = matrix(n, k).to(dtype)
    return linear_problem(lambda x: avx2.plain_linear(x.to(dtype), weight), weight, _TOLERANCE)


def widened_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] times `weight` [N, K], plus `bias` [N]: [..., N], all of one dtype, summed in fp32."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= _FEW_TOKENS:
        return linear(x, weight, bias)
    n, k = weight.shape
    rows, result = rows.float(), x.new_empty(len(rows), n)
    part = torch.empty(min(n, max(1, _PART // k)), k)
    for start in range(0, n, len(part)):
        stop = min(n, start + len(part))
        sums = rows @ part[: stop - start].copy_(weight[start:stop]).t()
        result[:, start:stop] = sums if bias is None else sums.add_(bias[start:stop])
    return result.view(*x.shape[:-1], n)


# An operation of its own, which torch.compile does not look into: how many tokens there are is known when it runs.
_library = torch.library.Library("vllm_bailing", "FRAGMENT")
_library.define("widened_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("widened_linear", widened_linear, "CPU")


@torch.library.register_fake("vllm_bailing::widened_linear", lib=_library)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def widen(layer: Any, is_head: bool) -> None:
    """Multiply so in `layer`, if it is one without quantization; before its weights are loaded.

    Args:
        is_head: Whether a table of embeddings is multiplied with.
    """
    method = type(getattr(layer, "quant_method", None))
    if method is UnquantizedLinearMethod:
        layer.quant_method = WidenedLinear()
    elif method is UnquantizedEmbeddingMethod and is_head:
        layer.quant_method = WidenedHead()


def _multiply_so(layer: Any) -> bool:
    """Set what vLLM's methods call, with (x, weight, bias); not for weights in fp32, such as a router's."""
    if layer.weight.dtype not in _SUPPORTED:
        return False
    layer.cpu_linear = torch.ops.vllm_bailing.avx2_plain_linear
    if problem := avx2_problem(layer.weight.dtype, *layer.weight.shape):
        logger.info_once("Weights [%d, %d]: without the kernels for AVX2 (%s)", *layer.weight.shape, problem)
        layer.cpu_linear = torch.ops.vllm_bailing.widened_linear
    return True


class WidenedLinear(UnquantizedLinearMethod):
    """Linear layers whose weight [N, K] stays as it was loaded."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not _multiply_so(layer):
            super().process_weights_after_loading(layer)


class WidenedHead(UnquantizedEmbeddingMethod):
    """The language-model head, whose weight [N, K] may be the embedding's too."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not _multiply_so(layer):
            super().process_weights_after_loading(layer)
