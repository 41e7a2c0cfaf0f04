"""Whose kernels run quantized layers in a test, whatever the processor would have: vLLM's or those for AVX2."""

from __future__ import annotations

import pytest

from tests.support import avx2_stand_ins, cpu_stand_ins
from vllm_bailing.processor import QuantizedKernels, compiler, instructions, quantized_kernels

NEEDS_AVX2 = pytest.mark.skipif(
    "AVX2" not in instructions() or compiler() is None, reason="needs a CPU with AVX2, and a C++ compiler"
)
NEEDS_VLLMS = pytest.mark.skipif(
    not quantized_kernels().are_vllms, reason="needs a CPU with AVX-512 bf16 and VNNI; stand-ins tell nothing here"
)
AVX512, AVX2 = "vLLM's", "AVX2"


def use(whose, damaged=None):
    """Have quantized layers run in these kernels, in this process.

    Args:
        damaged: An operation that is wrong, or "exact" for stand-ins that keep all digits of activations.
    """
    from vllm_bailing.plugin.kernels import cpu_quantized, quantized_avx2

    if whose == AVX512:
        cpu_stand_ins.register(damaged)
        return
    cpu_quantized.quantized_kernels = lambda: QuantizedKernels(are_vllms=False, are_ours=True, obstacle="")
    quantized_avx2.instructions = lambda: ["AVX2"]  # with more, vLLM has kernels for linear layers in integers
    if damaged:
        avx2_stand_ins.register(None if damaged == "exact" else damaged)
