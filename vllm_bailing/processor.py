"""Which instructions the processor at hand has, and which kernels of vLLM's CPU build follow from them.

torch is imported where it is asked, so that commands can name this file at once.
"""

from __future__ import annotations

import platform
import time

# Names of torch's record of the processor, and what people call them.
_NAMES = {
    "avx2": "AVX2",
    "avx512_f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_tile": "AMX",
}
# The kernels of vLLM's CPU build that were ported from SGLang are compiled for these.
_QUANTIZED_EXPERTS = ("AVX-512", "AVX-512 bf16", "AVX-512 VNNI")


def instructions() -> list[str]:
    """Of `_NAMES`, those that this processor has, from old to new; none of another architecture than x86."""
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):  # torch before 2.12
        asked = {
            "avx2": torch.cpu._is_avx2_supported,
            "avx512_f": torch.cpu._is_avx512_supported,
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
            "avx512_vnni": torch.cpu._is_vnni_supported,
            "amx_tile": torch.cpu._is_amx_tile_supported,
        }
        return [_NAMES[key] for key, has in asked.items() if has()]
    capabilities = torch.cpu.get_capabilities()
    return [name for key, name in _NAMES.items() if capabilities.get(key)]


def found() -> str:
    """The instructions, in words for a message."""
    return ", ".join(instructions()) or f"none of x86's wide ones ({platform.machine()})"


def lacking_for_quantized_experts() -> list[str]:
    """The instructions that experts in int8, fp8 or int4 need and that this processor lacks."""
    has = instructions()
    return [name for name in _QUANTIZED_EXPERTS if name not in has]


def kernels() -> dict[str, str]:
    """What vLLM's CPU build multiplies with here, in words, by kind of weights."""
    has = instructions()
    lacking = lacking_for_quantized_experts()
    bf16 = "AVX-512 bf16 kernels" if "AVX-512 bf16" in has else "oneDNN and vLLM's portable kernel"
    if has == ["AVX2"]:  # oneDNN takes none: plugin/kernels/cpu_widened.py
        bf16 = "products in fp32, a part of a weight at a time, and vLLM's portable kernel for experts"
    quantized = "vLLM's kernels, each after a proof" if not lacking else f"none (no {', no '.join(lacking)})"
    return {
        "bf16": "AMX kernels" if "AMX" in has else bf16,
        "linear layers in int8 or int4": "oneDNN and vLLM's kernels" if "AVX-512" in has else "none (no AVX-512)",
        "experts in int8, int4 or fp8 blocks": quantized,
    }


def dtypes_with_kernels() -> tuple[str, ...]:
    """Data types of experts that vLLM's CPU build multiplies with on this processor."""
    return ("bf16",) if lacking_for_quantized_experts() else ("bf16", "fp8", "int8", "int4")


def memory_bandwidth(seconds: float = 1.0) -> float:
    """Bytes that all threads together read from memory in a second, the best of what `seconds` allow."""
    import torch

    numbers = torch.ones(2**26, dtype=torch.float32)  # 256 MiB, far more than caches hold
    end, best = time.perf_counter() + seconds, 0.0
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best
