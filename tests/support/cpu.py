"""What tests need of the processor."""

import pytest
import torch

NEEDS_AVX512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's CPU build has these kernels for AVX-512 alone"
)
