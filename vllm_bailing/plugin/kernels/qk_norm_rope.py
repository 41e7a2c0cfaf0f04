"""Norms of queries and keys and their rotation in one call, where that computes the same.

vLLM's CUDA build has `fused_qk_norm_rope`, which its own compiler pass leaves off at every optimization level. Here it
is called where it proves equal on the GPU at hand, rotary widths below the head size included: a kernel of this kind
was once wrong for those (vLLM pull request 43676). CPU engines have that of cpu.py in eager mode. Compiled ones leave
both to torch.compile, or take that of avx2.py on x86: it is one operation, not several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_bailing.errors import SettingsError
from vllm_bailing.plugin.kernels import avx2, cpu
from vllm_bailing.plugin.kernels.cpu_widened import uses_avx2
from vllm_bailing.plugin.kernels.proof import proof
from vllm_bailing.plugin.options import FUSED_QK_NORM_ROPE, wants_fused_qk_norm_rope

logger = init_logger("vllm.plugins.bailing.fusion")

# That vLLM's kernel was compiled for.
_HEAD_SIZES = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)
# Attention backends whose kernels take queries with gaps between the tokens. FlashInfer, the default on Blackwell,
# copies them first (`contiguous()` in v1/attention/backends/flashinfer.py); nobody measured which is faster there.
_TAKE_STRIDES = ("FLASH_ATTN", "TRITON_ATTN")
_TOKENS = 37  # an odd number, so that the last block of threads is not full


def fused_qk_norm_rope_for(attention: Any, vllm_config: Any) -> Callable[..., None] | None:
    """A function with the arguments of vLLM's `fused_qk_norm_rope`, which changes queries and keys in place.

    None if the layers of `attention`, a BailingMoeV2Attention, are to stay separate. By default there is one where it
    gives what they give.

    Raises:
        SettingsError: If `--additional-config` asks for a kernel that cannot be used.
    """
    is_asked_for = wants_fused_qk_norm_rope(vllm_config)
    if is_asked_for is False:
        return None
    dtype = torch.get_default_dtype()
    kernel = avx2.qk_norm_rope if _takes_avx2(attention, vllm_config, dtype) else _kernel()
    obstacle = (
        _obstacle(kernel, attention, vllm_config, dtype)
        or ("" if is_asked_for else _price(attention.attn.attn_backend.get_name()))
        or _difference(
            kernel, attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.rotary_emb, dtype
        )
    )
    if obstacle and is_asked_for:
        raise SettingsError(f"{FUSED_QK_NORM_ROPE}=true in --additional-config: {obstacle}; leave it out")
    if obstacle:
        logger.info_once("Norms of queries and keys and the rotary embedding stay separate: %s", obstacle)
        return None
    logger.info_once("Norms of queries and keys and the rotary embedding run in one kernel, which proved equal.")
    return kernel


def _takes_avx2(attention: Any, vllm_config: Any, dtype: torch.dtype) -> bool:
    sizes_fit = attention.head_dim % 8 == attention.rotary_emb.rotary_dim % 16 == 0
    return sizes_fit and bool(vllm_config.compilation_config.mode) and uses_avx2(vllm_config, dtype)


def _kernel() -> Any:
    if current_platform.is_cpu():
        return cpu.fused_qk_norm_rope
    return _custom_ops.fused_qk_norm_rope if hasattr(torch.ops._C, "fused_qk_norm_rope") else None


def _obstacle(kernel: Any, attention: Any, vllm_config: Any, dtype: torch.dtype) -> str:
    if isinstance(attention.query_layernorm, torch.nn.Identity):
        return "the model has no norms on queries and keys"
    if current_platform.is_cpu():
        is_fused = kernel is cpu.fused_qk_norm_rope and vllm_config.compilation_config.mode
        return "on CPUs torch.compile fuses them" if is_fused else ""
    if not current_platform.is_cuda() or kernel is None:
        return "this build of vLLM has no such kernel"
    if dtype not in _DTYPES:
        return f"the kernel does not take {dtype}"
    if attention.head_dim not in _HEAD_SIZES:
        return f"the kernel does not take heads of {attention.head_dim}"
    return ""


def _price(backend: str) -> str:
    """Why the kernel may cost more than it saves; empty if it does not. It leaves queries as a part of the product."""
    if current_platform.is_cpu() or backend in _TAKE_STRIDES:
        return ""
    return f"{backend} would copy the queries in every layer, which lie apart after the kernel"


@proof  # once for all layers, which share their rotary embedding
def _difference(
    kernel: Any, num_heads: int, num_kv_heads: int, head_dim: int, rotary_emb: Any, dtype: torch.dtype
) -> str:
    """In what the kernel differs from the layers that it replaces; empty if in nothing."""
    cache = rotary_emb.cos_sin_cache
    generator = torch.Generator(cache.device).manual_seed(0)
    heads = num_heads + 2 * num_kv_heads

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=cache.device, dtype=torch.float32).to(dtype)

    qkv, q_weight, k_weight = random(_TOKENS, heads * head_dim), random(head_dim), random(head_dim)
    positions = torch.randint(len(cache), (_TOKENS,), generator=generator, device=cache.device)
    expected = _plainly(qkv, q_weight, k_weight, cache, positions, num_heads, num_kv_heads, head_dim)
    kernel(qkv, num_heads, num_kv_heads, num_kv_heads, head_dim, 1e-6, q_weight, k_weight, cache, True, positions)
    # Two steps of the coarser format: one for the kernel's rounding, one for that of the norm's output before it.
    step = 2 * torch.finfo(dtype).eps
    apart = (qkv.float() - expected).abs() - step * expected.abs()
    worst = float(apart.max())
    return (
        ""
        if worst <= step
        else f"the kernel differs by up to {worst:.3g} (head size {head_dim}, rotary {cache.shape[1]})"
    )


def _plainly(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cache: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> torch.Tensor:
    """What the kernel must give, in fp32. `cache` holds cosines and sines side by side, [positions, rotary]."""
    parts = qkv.float().view(len(qkv), -1, head_dim)
    q, k, v = parts.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cache[positions].float()[:, None].chunk(2, dim=-1)
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
        first, second, rest = x.split((cos.shape[-1], cos.shape[-1], head_dim - 2 * cos.shape[-1]), dim=-1)
        turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1))
    return torch.cat((*turned, v), dim=1).flatten(1)
