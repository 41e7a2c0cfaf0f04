"""Whose kernels run quantized layers in a test, whatever the processor would have: vLLM's, or ours for one kind."""

from __future__ import annotations

import pytest

from tests.support import avx2_stand_ins, cpu_stand_ins
from vllm_bailing.processor import SCHEMES, QuantizedKernels, compiler, instructions, quantized_kernels

NEEDS_AVX2 = pytest.mark.skipif(
    "AVX2" not in instructions() or compiler() is None, reason="needs a CPU with AVX2, and a C++ compiler"
)
NEEDS_VLLMS = pytest.mark.skipif(
    not quantized_kernels().vllms, reason="needs a CPU with AVX-512 bf16 and VNNI; stand-ins tell nothing here"
)
NEEDS_VNNI = pytest.mark.skipif(
    "AVX-512 VNNI" not in instructions() or compiler() is None, reason="needs a CPU with AVX-512 VNNI, a C++ compiler"
)
AVX512, AVX2, VNNI = "vLLM's", "AVX2", "VNNI"


def use(whose, damaged=None):
    """Have quantized layers run in these kernels, in this process.

    Args:
        damaged: An operation that is wrong, or "exact" for stand-ins that keep all digits of activations.
    """
    from vllm_bailing.plugin.kernels import cpu_quantized, quantized_avx2

    if whose == AVX512:
        cpu_stand_ins.register(damaged)
        return
    if whose == AVX2:
        cpu_quantized.quantized_kernels = lambda: QuantizedKernels(ours=SCHEMES, vllms=())
        # With more, vLLM has kernels for linear layers in integers.
        cpu_quantized.instructions = quantized_avx2.instructions = lambda: ["AVX2"]
    if damaged:
        avx2_stand_ins.register(None if damaged == "exact" else damaged)
