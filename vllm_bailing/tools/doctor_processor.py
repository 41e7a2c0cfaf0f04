"""What `vllm-bailing doctor` says of the processor, where vLLM's CPU build serves."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_bailing.errors import DEQUANTIZE


def serves_on_cpu() -> bool:
    """Whether the vLLM that is installed is its CPU build."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return False


def processor() -> str:
    """Instructions that were found, and the kernels that follow from them."""
    from vllm_bailing.processor import found, kernels

    return "; ".join([found(), *(f"{kind}: {kernel}" for kind, kernel in kernels().items())])


def kernels_for(stored_files: Any, scheme: str) -> tuple[bool, str, str]:
    """(whether there are some, detail, what to do) for a quantized checkpoint on this processor.

    Args:
        stored_files: The published `Checkpoint`.
        scheme: `quant_method` of config.json.
    """
    from vllm_bailing.processor import instructions, quantized_kernels

    obstacle, has = quantized_kernels().obstacle, instructions()
    if stored_files.has_quantized_experts and obstacle and "AMX" not in has:
        return False, f"none for {scheme} experts on this processor ({obstacle})", DEQUANTIZE
    if stored_files.has_integers and obstacle and "AVX-512" not in has:
        return False, f"none for {scheme} layers of integers on this processor ({obstacle})", DEQUANTIZE
    return True, f"for {scheme} layers on this processor; those of experts are proved at the start", ""
