"""The GPUs that are known, a row each, for planning, tuning and benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from vllm_bailing.units import GIB


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet and its driver describe it.

    Attributes:
        memory_bytes: The total that torch reports.
        bandwidth: Bytes/s.
        flops_16: Dense bf16 FLOP/s.
        flops_8: Dense fp8 FLOP/s; None if it has no fp8 arithmetic.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops_16: float
    flops_8: float | None


def _gpu(name: str, memory_gib: float, tb_per_s: float, tflops_16: float, tflops_8: float | None) -> Gpu:
    flops_8 = None if tflops_8 is None else tflops_8 * 1e12
    return Gpu(name, round(memory_gib * GIB), tb_per_s * 1e12, tflops_16 * 1e12, flops_8)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("H100", 79.1, 3.35, 989, 1979),
        _gpu("H200", 139.7, 4.8, 989, 1979),
        _gpu("H20", 95.1, 4.0, 148, 296),
        _gpu("H20-3e", 139.7, 4.8, 148, 296),
        _gpu("B200", 178.4, 8.0, 2250, 4500),
        _gpu("A100-80G", 79.1, 2.04, 312, None),
        _gpu("L40S", 44.4, 0.864, 362, 733),
        _gpu("RTX4090", 23.5, 1.008, 165, 330),
        _gpu("MI300X", 191.5, 5.3, 1307, 2615),
    )
}


def find_gpu(name: str, memory_gib: float | None = None, bandwidth: float | None = None) -> Gpu:
    """The GPU called `name`, in any case, with memory (GiB) and bandwidth (TB/s) replaced where they are given.

    Raises:
        ValueError: If it is not in the table and one of the two is missing, or a number is not positive.
    """
    for flag, value in (("--memory-gib", memory_gib), ("--bandwidth", bandwidth)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag} {value} must be a number above 0")
    gpu = next((known for known in GPUS.values() if known.name.lower() == name.lower()), None)
    if gpu is None:
        if memory_gib is None or bandwidth is None:
            raise ValueError(
                f"GPU {name!r} is not known; name one of {', '.join(GPUS)}, or give its memory by --memory-gib and its "
                "bandwidth by --bandwidth (TB/s)"
            )
        # Decoding is bound by bytes on every GPU of the table, so what is not known is left out of the bound.
        return Gpu(name, round(memory_gib * GIB), bandwidth * 1e12, math.inf, None)
    if memory_gib is not None:
        gpu = replace(gpu, memory_bytes=round(memory_gib * GIB))
    return gpu if bandwidth is None else replace(gpu, bandwidth=bandwidth * 1e12)
