"""Which instructions the processor at hand has, and which kernels of vLLM's CPU build follow from them.

torch is imported where it is asked, so that commands can name this file at once.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import time
from typing import NamedTuple

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
SCHEMES = ("fp8", "int8", "int4")


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


def compiler() -> str | None:
    """The command of the C++ compiler (CXX, which may have options, or c++), or None if there is none."""
    command = os.environ.get("CXX") or "c++"
    return command if shutil.which(shlex.split(command)[0]) else None


class QuantizedKernels(NamedTuple):
    """Which of `SCHEMES` run in kernels of this package here, and which in vLLM's for AVX-512."""

    ours: tuple[str, ...]
    vllms: tuple[str, ...]
    obstacle: str = ""  # why none does


def quantized_kernels() -> QuantizedKernels:
    """Which kernels there are on this processor, with a compiler for those that are compiled here."""
    has = instructions()
    if all(name in has for name in _QUANTIZED_EXPERTS):
        # vLLM's for int4 are slower without AMX: docs/cpu.md.
        ours = ("int4",) if "AMX" not in has and compiler() else ()
        return QuantizedKernels(ours, tuple(scheme for scheme in SCHEMES if scheme not in ours))
    if "AVX2" not in has:
        return QuantizedKernels((), (), f"it has {found()}, and they need AVX2")
    if compiler() is None:
        compiled = "they are compiled for AVX2, and there is no C++ compiler here; install one (g++), or name it by CXX"
        return QuantizedKernels((), (), compiled)
    return QuantizedKernels(SCHEMES, ())


def kernels() -> dict[str, str]:
    """What vLLM's CPU build multiplies with here, in words, by kind of weights."""
    has, quantized = instructions(), quantized_kernels()
    parts = [f"vLLM's kernels for AMX ({', '.join(quantized.vllms)})"] if quantized.vllms else []
    parts += [f"kernels of this package ({', '.join(quantized.ours)})"] if quantized.ours else []
    proved = f"none ({quantized.obstacle})" if quantized.obstacle else f"{' and '.join(parts)}, each after a proof"
    bf16 = "AVX-512 bf16 kernels" if "AVX-512 bf16" in has else "oneDNN and vLLM's portable kernel"
    if has == ["AVX2"]:  # oneDNN takes none: plugin/kernels/cpu_widened.py
        bf16 = "products in fp32, and vLLM's portable kernel for experts"
    in_vllm = "AVX-512" in has and not quantized.vllms  # others for linear layers than for experts
    return {
        "bf16": "AMX kernels" if "AMX" in has else bf16,
        "linear layers in int8 or int4": "oneDNN and vLLM's kernels" if in_vllm else proved,
        "experts in int8, int4 or fp8 blocks": proved,
    }


def dtypes_with_kernels() -> tuple[str, ...]:
    """Data types of experts that can be multiplied with on this processor."""
    return ("bf16",) if quantized_kernels().obstacle else ("bf16", *SCHEMES)


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
