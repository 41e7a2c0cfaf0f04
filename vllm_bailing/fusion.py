"""Norms of queries and keys and their rotation in one kernel, where that computes the same.

vLLM's CUDA build has `fused_qk_norm_rope`, which its own compiler pass leaves off at every optimisation level. Here it
is called where it proves equal on the GPU at hand, rotary widths below the head size included: a kernel of this kind
was once wrong for those (vLLM pull request 43676). CPU engines in eager mode have that of `vllm_bailing.loops`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_bailing.settings import FUSED_QK_NORM_ROPE, SettingsError, wants_fused_qk_norm_rope

logger = init_logger("vllm.plugins.bailing.fusion")

# That vLLM's kernel was compiled for.
_HEAD_SIZES = (64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16)
_TOKENS = 37  # an odd number, so that the last block of threads is not full


@dataclass(frozen=True)
class Kernel:
    """A kernel with the arguments of vLLM's `fused_qk_norm_rope`, and up to how many tokens it is to be used."""

    call: Callable[..., None]
    most_tokens: int | None = None

    def norm_and_rotate(self, attention: Any, positions: torch.Tensor, qkv: torch.Tensor) -> bool:
        """Norm and rotate queries and keys of `qkv` [T, q + 2 kv] in place, or return False; `positions` [T] int64."""
        if self.most_tokens is not None and len(qkv) > self.most_tokens:
            return False
        self.call(
            qkv,
            attention.num_heads,
            attention.num_kv_heads,
            attention.num_kv_heads,
            attention.head_dim,
            attention.query_layernorm.variance_epsilon,
            attention.query_layernorm.weight,
            attention.key_layernorm.weight,
            attention.rotary_emb.cos_sin_cache,
            True,
            positions,
        )
        return True


def qk_norm_rope_kernel(vllm_config: Any, attention: Any) -> Kernel | None:
    """The kernel for `attention`, a BailingMoeV2Attention, or None if its layers are to stay separate.

    By default there is one where it gives what the separate layers give.

    Raises:
        SettingsError: If `--additional-config` asks for what there is not.
    """
    wanted = wants_fused_qk_norm_rope(vllm_config)
    if wanted is False:
        return None
    dtype = torch.get_default_dtype()
    kernel, obstacle = _kernel(vllm_config, attention, dtype)
    obstacle = obstacle or _difference(
        kernel, attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.rotary_emb, dtype
    )
    if obstacle and wanted:
        raise SettingsError(f"{FUSED_QK_NORM_ROPE}=true in --additional-config: {obstacle}; leave it out")
    if obstacle:
        logger.info_once("Norms of queries and keys and the rotary embedding stay separate: %s", obstacle)
        return None
    logger.info_once("Norms of queries and keys and the rotary embedding run in one kernel, which proved equal.")
    return kernel


def _kernel(vllm_config: Any, attention: Any, dtype: torch.dtype) -> tuple[Kernel | None, str]:
    """The kernel for this machine, or why there is none."""
    if isinstance(attention.query_layernorm, torch.nn.Identity):
        return None, "the model has no norms on queries and keys"
    if current_platform.is_cpu():
        if vllm_config.compilation_config.mode:
            return None, "on CPUs torch.compile fuses them"
        from vllm_bailing import loops

        kernel, dtypes, sizes = Kernel(loops.fused_qk_norm_rope, loops.most_tokens()), loops.DTYPES, None
    elif current_platform.is_cuda() and hasattr(torch.ops._C, "fused_qk_norm_rope"):
        kernel, dtypes, sizes = Kernel(_custom_ops.fused_qk_norm_rope), _DTYPES, _HEAD_SIZES
    else:
        return None, "this build of vLLM has no such kernel"
    if dtype not in dtypes:
        return None, f"the kernel does not take {dtype}"
    if sizes is not None and attention.head_dim not in sizes:
        return None, f"the kernel does not take heads of {attention.head_dim}"
    return kernel, ""


@functools.lru_cache(maxsize=8)  # once for all layers, which share their rotary embedding
def _difference(
    kernel: Kernel, num_heads: int, num_kv_heads: int, head_dim: int, rotary_emb: Any, dtype: torch.dtype
) -> str:
    """In what the kernel differs from the layers that it replaces; empty if in nothing."""
    cache = rotary_emb.cos_sin_cache
    generator = torch.Generator(cache.device).manual_seed(0)
    heads = num_heads + 2 * num_kv_heads

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=cache.device, dtype=torch.float32).to(dtype)

    qkv, q_weight, k_weight = random(_TOKENS, heads * head_dim), random(head_dim), random(head_dim)
    positions = torch.randint(len(cache), (_TOKENS,), generator=generator, device=cache.device)
    wanted = _plainly(qkv, q_weight, k_weight, cache, positions, num_heads, num_kv_heads, head_dim)
    try:
        kernel.call(
            qkv, num_heads, num_kv_heads, num_kv_heads, head_dim, 1e-6, q_weight, k_weight, cache, True, positions
        )
    except (RuntimeError, TypeError, ValueError) as error:
        return f"the kernel failed ({' '.join(str(error).split())[:120]})"
    # Two steps of the coarser format: one for the kernel's rounding, one for that of the norm's output before it.
    step = 2 * torch.finfo(dtype).eps
    apart = (qkv.float() - wanted).abs() - step * wanted.abs()
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
    """What the kernel has to give, in fp32. `cache` holds cosines and sines side by side, [positions, rotary]."""
    parts = qkv.float().view(len(qkv), -1, head_dim)
    q, k, v = parts.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cache[positions].float()[:, None].chunk(2, dim=-1)
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.float()
        first, second, rest = x.split((cos.shape[-1], cos.shape[-1], head_dim - 2 * cos.shape[-1]), dim=-1)
        turned.append(torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1))
    return torch.cat((*turned, v), dim=1).flatten(1)
