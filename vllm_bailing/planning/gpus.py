"""All that the package knows of GPUs: a row each, for planning, tuning and benchmarks.

Memory is what torch reports, which is less than the data sheet's: the driver keeps a part, and error correction a part
of GDDR. FLOP/s are dense, half of what a sheet gives "with sparsity". Shared memory follows from the compute
capability (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"), compute capabilities
are listed at https://developer.nvidia.com/cuda-gpus. tests/data/gpus.json has the data sheets once more.
"""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass, replace
from typing import Any

from vllm_bailing.units import GIB


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet and its driver describe it.

    Attributes:
        name: Name for the command line.
        memory_bytes: Total memory as torch reports it.
        bandwidth: Memory bandwidth in bytes/s.
        flops_16: Dense bf16 FLOP/s; None if not known.
        flops_8: Dense fp8 FLOP/s; None if not known, or if the GPU has no fp8 arithmetic.
        driver_names: Names that the driver reports. vLLM's file names have them with underscores for spaces.
        compute_capability: CUDA's version number of the architecture; None if not known or not from NVIDIA.
        shared_memory: Bytes of shared memory that one block of threads can have; None if not known.
        source: Title and address of the data sheet; empty for a GPU that the user describes.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops_16: float | None = None
    flops_8: float | None = None
    driver_names: tuple[str, ...] = ()
    compute_capability: str | None = None
    shared_memory: int | None = None
    source: str = ""


def _gpu(
    name: str,
    *,
    driver: str,
    gib: float,
    tb_per_s: float,
    tflops_16: float,
    tflops_8: float | None,
    capability: str | None,
    shared_kib: int,
    source: str,
) -> Gpu:
    return Gpu(
        name,
        memory_bytes=round(gib * GIB),
        bandwidth=tb_per_s * 1e12,
        flops_16=tflops_16 * 1e12,
        flops_8=None if tflops_8 is None else tflops_8 * 1e12,
        driver_names=(driver,),
        compute_capability=capability,
        shared_memory=shared_kib * 1024,
        source=source,
    )


# fmt: off
_ROWS = (
    _gpu("H100", driver="NVIDIA H100 80GB HBM3",
         gib=79.1, tb_per_s=3.35, tflops_16=989, tflops_8=1979, capability="9.0", shared_kib=227,
         source="NVIDIA H100 Tensor Core GPU, H100 SXM: https://www.nvidia.com/en-us/data-center/h100/"),
    _gpu("H200", driver="NVIDIA H200",
         gib=139.7, tb_per_s=4.8, tflops_16=989, tflops_8=1979, capability="9.0", shared_kib=227,
         source="NVIDIA H200 Tensor Core GPU, H200 SXM: https://www.nvidia.com/en-us/data-center/h200/"),
    # NVIDIA has published no data sheet of the H20.
    _gpu("H20", driver="NVIDIA H20",
         gib=95.1, tb_per_s=4.0, tflops_16=148, tflops_8=296, capability="9.0", shared_kib=227,
         source="H20, L20 and L2 specifications, Tom's Hardware: https://www.tomshardware.com/pc-components/gpus/"
                "new-nvidia-ai-gpus-designed-to-get-around-us-export-bans-come-to-china-h20-l20-and-l2-to-fill-void-left-"
                "by-restricted-models"),
    _gpu("H20-3e", driver="NVIDIA H20-3e",
         gib=139.7, tb_per_s=4.8, tflops_16=148, tflops_8=296, capability="9.0", shared_kib=227,
         source="H20 with the memory of an H200, as quoted to NVIDIA: https://github.com/NVIDIA/nvbandwidth/issues/48"),
    # Nor of the H800, an H100 with slower links between GPUs.
    _gpu("H800", driver="NVIDIA H800",
         gib=79.1, tb_per_s=3.35, tflops_16=989, tflops_8=1979, capability="9.0", shared_kib=227,
         source="Insights into DeepSeek-V3, section 4.1, where it is an H100 but for FP64 and NVLink: https://arxiv.org/"
                "abs/2505.09343"),
    _gpu("B200", driver="NVIDIA B200",
         gib=178.4, tb_per_s=8.0, tflops_16=2250, tflops_8=4500, capability="10.0", shared_kib=227,
         source="NVIDIA DGX B200, an eighth of it: https://www.nvidia.com/en-us/data-center/dgx-b200/"),
    _gpu("GB200", driver="NVIDIA GB200",
         gib=184.3, tb_per_s=8.0, tflops_16=2500, tflops_8=5000, capability="10.0", shared_kib=227,
         source="NVIDIA GB200 NVL72, a 72nd of it: https://www.nvidia.com/en-us/data-center/gb200-nvl72/"),
    _gpu("GB300", driver="NVIDIA GB300",
         gib=276.5, tb_per_s=8.0, tflops_16=2500, tflops_8=5000, capability="10.3", shared_kib=227,
         source="NVIDIA GB300 NVL72, a 72nd of it: https://www.nvidia.com/en-us/data-center/gb300-nvl72/"),
    _gpu("A100-80G", driver="NVIDIA A100-SXM4-80GB",
         gib=79.1, tb_per_s=2.039, tflops_16=312, tflops_8=None, capability="8.0", shared_kib=163,
         source="NVIDIA A100 Tensor Core GPU, A100 80GB SXM: https://www.nvidia.com/content/dam/en-zz/Solutions/"
                "Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"),
    _gpu("L40S", driver="NVIDIA L40S",
         gib=44.4, tb_per_s=0.864, tflops_16=362, tflops_8=733, capability="8.9", shared_kib=99,
         source="NVIDIA L40S: https://www.nvidia.com/en-us/data-center/l40s/"),
    _gpu("L4", driver="NVIDIA L4",
         gib=22.0, tb_per_s=0.3, tflops_16=121, tflops_8=242.5, capability="8.9", shared_kib=99,
         source="NVIDIA L4: https://www.nvidia.com/en-us/data-center/l4/"),
    _gpu("A10", driver="NVIDIA A10",
         gib=22.0, tb_per_s=0.6, tflops_16=125, tflops_8=None, capability="8.6", shared_kib=99,
         source="NVIDIA A10: https://www.nvidia.com/en-us/data-center/products/a10-gpu/"),
    _gpu("RTX4090", driver="NVIDIA GeForce RTX 4090",
         gib=23.5, tb_per_s=1.008, tflops_16=165, tflops_8=330, capability="8.9", shared_kib=99,
         source="NVIDIA Ada GPU Architecture, appendix A, with fp32 accumulation: https://images.nvidia.com/aem-dam/"
                "Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"),
    _gpu("RTX5090", driver="NVIDIA GeForce RTX 5090",
         gib=31.3, tb_per_s=1.792, tflops_16=209.5, tflops_8=419, capability="12.0", shared_kib=99,
         source="NVIDIA RTX Blackwell GPU Architecture, appendix A, with fp32 accumulation: https://images.nvidia.com/"
                "aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"),
    _gpu("RTX-PRO-6000", driver="NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
         gib=94.9, tb_per_s=1.792, tflops_16=503.8, tflops_8=1007.6, capability="12.0", shared_kib=99,
         source="NVIDIA RTX Blackwell PRO GPU Architecture, RTX PRO 6000 Workstation Edition: https://www.nvidia.com/"
                "content/dam/en-zz/Solutions/design-visualization/quadro-product-literature/"
                "NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf"),
    _gpu("RTX-PRO-6000-SE", driver="NVIDIA RTX PRO 6000 Blackwell Server Edition",
         gib=94.9, tb_per_s=1.597, tflops_16=500, tflops_8=1000, capability="12.0", shared_kib=99,
         source="NVIDIA RTX PRO 6000 Blackwell Server Edition: https://www.nvidia.com/en-us/data-center/"
                "rtx-pro-6000-blackwell-server-edition/"),
    _gpu("MI300X", driver="AMD Instinct MI300X",
         gib=191.5, tb_per_s=5.3, tflops_16=1307, tflops_8=2615, capability=None, shared_kib=64,
         source="AMD Instinct MI300X: https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html; shared "
                "memory (LDS): https://rocm.docs.amd.com/en/latest/reference/gpu-specs.html"),
    _gpu("MI325X", driver="AMD Instinct MI325X",
         gib=255.6, tb_per_s=6.0, tflops_16=1307, tflops_8=2615, capability=None, shared_kib=64,
         source="AMD Instinct MI325X: https://www.amd.com/en/products/accelerators/instinct/mi300/mi325x.html; shared "
                "memory (LDS): https://rocm.docs.amd.com/en/latest/reference/gpu-specs.html"),
)
# fmt: on
GPUS = {gpu.name: gpu for gpu in _ROWS}

# KiB of shared memory of GPUs without a row, by a part of the driver's name; all others are taken for Hopper.
_SHARED_KIB = {"A100": 163, "A800": 163, "RTX": 99, "L4": 99, "L20": 99, "GB10": 99}
_HOPPER_SHARED_KIB = 227


def gpu_called(driver_name: str) -> Gpu | None:
    """The GPU that the driver calls `driver_name`, or whose name stands so in vLLM's file names; None without a row."""
    spaced = driver_name.replace("_", " ")
    return next((gpu for gpu in GPUS.values() if spaced in gpu.driver_names), None)


def shared_memory_of(driver_name: str) -> int:
    """Bytes of shared memory that one block of threads can have on a GPU that need not be in this machine."""
    gpu = gpu_called(driver_name)
    if gpu is not None and gpu.shared_memory is not None:
        return gpu.shared_memory
    return 1024 * next((kib for part, kib in _SHARED_KIB.items() if part in driver_name), _HOPPER_SHARED_KIB)


def find_gpu(name: str, memory_gib: float | None = None, bandwidth: float | None = None) -> Gpu:
    """The GPU called `name` on the command line, in any case: by its row, or as nvidia-smi calls it.

    Args:
        memory_gib: Memory in GiB, instead of the row's.
        bandwidth: Memory bandwidth in TB/s, instead of the row's.
    Raises:
        ValueError: If there is no such row and one of the two is missing, or a number is not positive.
    """
    for flag, value in (("--memory-gib", memory_gib), ("--bandwidth", bandwidth)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{flag} {value} must be a number above 0")
    gpu = _row_called(name)
    if gpu is None:
        if memory_gib is None or bandwidth is None:
            given = {"--memory-gib": memory_gib, "--bandwidth": bandwidth}
            absent = [flag for flag, value in given.items() if value is None]
            way = "give its memory by --memory-gib and its bandwidth by --bandwidth (TB/s)"
            if len(absent) == 1:
                way = f"add {absent[0]}{' (TB/s)' if absent == ['--bandwidth'] else ''}"
            raise ValueError(f"GPU {name!r} is not known{_like(name)}; {way}, or name one of --list-gpus")
        # Without FLOP/s: bytes bound decoding on every GPU of the table.
        return Gpu(name, round(memory_gib * GIB), bandwidth * 1e12)
    if memory_gib is not None:
        gpu = replace(gpu, memory_bytes=round(memory_gib * GIB))
    return gpu if bandwidth is None else replace(gpu, bandwidth=bandwidth * 1e12)


def find_gpus(
    name: str, count: int | None = None, memory_gib: float | None = None, bandwidth: float | None = None
) -> tuple[Gpu, int]:
    """(GPU, how many) as asked on the command line; "auto" are those of this machine, and all of them without `count`.

    Raises:
        ValueError: As for `find_gpu`, or if NVML does not find GPUs of one kind.
    """
    if name.casefold() != "auto":
        return find_gpu(name, memory_gib, bandwidth), 1 if count is None else count
    names, bytes_each = _gpus_here()
    if _row_called(names[0]) is None and memory_gib is None:
        memory_gib = bytes_each / GIB
    return find_gpu(names[0], memory_gib, bandwidth), len(names) if count is None else count


def _gpus_here() -> tuple[list[str], int]:
    """(the driver's name of each GPU of this machine, memory of one in bytes), as NVML has them."""
    way = "name the GPU instead, such as --gpu H100"
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        raise ValueError(
            f"--gpu auto asks NVML, and its package is missing; pip install nvidia-ml-py, or {way}"
        ) from None
    try:
        nvml.nvmlInit()
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            names = [nvml.nvmlDeviceGetName(handle) for handle in handles]
            sizes = [nvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise ValueError(f"--gpu auto: NVML finds no driver of NVIDIA's here ({error}); {way}") from None
    names = [name.decode() if isinstance(name, bytes) else name for name in names]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if all(number.isdecimal() and int(number) < len(names) for number in visible):
        names = [names[int(number)] for number in visible]
    if len(set(names)) != 1:
        raise ValueError(f"--gpu auto: NVML finds {', '.join(sorted({*names})) or 'no GPU'} here, not one kind; {way}")
    return names, min(sizes)


def _row_called(name: str) -> Gpu | None:
    def plain(text: str) -> str:
        return text.casefold().replace("_", "").replace(" ", "").replace("-", "")

    rows = (gpu for gpu in GPUS.values() if plain(name) in map(plain, (gpu.name, *gpu.driver_names)))
    return next(rows, None)


def _like(name: str) -> str:
    """A row that may be meant, as a question; a beginning alone is no row: an A10 is no A100."""
    wanted = name.casefold().replace(" ", "")
    near = [gpu for gpu in GPUS if wanted and wanted in gpu.casefold()]
    return f" (is {near[0]} meant?)" if len(near) == 1 else ""
