"""The GPU of this machine, and the versions of what its timings depend on."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_bailing import __version__


def device_info() -> dict[str, Any]:
    """Names and versions of all that a timing depends on: GPU, driver, CUDA, packages."""
    import torch
    from vllm.platforms import current_platform

    return {
        "gpu": current_platform.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": _driver_version(),
        "cuda": torch.version.cuda,
        **{package: _installed_version(package) for package in ("torch", "triton", "vllm")},
        "vllm_bailing": __version__,
        "python": sys.version.split()[0],
    }


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def shared_memory() -> int:
    """Shared memory that a block of threads can have on this GPU, in bytes."""
    import torch

    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin
