"""Matrix products with weights of 16, 8 and 4 bits for x86 processors with AVX2 and without AVX-512 bf16.

vLLM's CPU build and PyTorch have none for them that read a quantized weight once and in its own bits. avx2.cpp is
compiled when an engine needs it first, which takes a C++ compiler and some seconds, and kept in the user's cache.

Weights are multiplied as what they mean: bf16 and fp8 with activations in fp32; int8 with activations in integers of
11 to 15 bits, as many as leave sums of 32 bits without an overflow; int4 with activations in int8 and a scale for
every 128 of them. An activation that is not finite makes its token's result NaN.

Dimension letters: T tokens, P picks of a token, E experts, N outputs, K inputs, G groups of inputs with a scale.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_bailing.processor import compiler

MULTIPLES = (16, 32)  # of which N and K have to be multiples
GROUPS = (32, 64, 128)  # sizes of groups of int4 weights; the kernel knows no others
# By the dtype of weights.
_FORMATS = {torch.bfloat16: 0, torch.float16: 1, torch.float8_e4m3fn: 2, torch.int8: 3, torch.uint8: 4}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of activations and scales
_SOURCE = Path(__file__).with_name("avx2.cpp")
_FLAGS = ("-O3", "-std=c++17", "-mavx2", "-mfma", "-mf16c", "-fopenmp", "-shared", "-fPIC")
_ROWS = MULTIPLES[0]
_SECONDS = 300.0  # for the compiler
_TOKENS = 2048  # whose picks are computed together, so that what is kept of them stays small


# ---- compiling -----------------------------------------------------------------------------------------------------


def _compile(to: Path) -> None:
    command = [compiler() or "c++", *_FLAGS, str(_SOURCE), "-o", str(to)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")


def _library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        RuntimeError: If they cannot be compiled or loaded; the second time without another attempt.
    """
    built = _built()
    if isinstance(built, str):
        raise RuntimeError(built)
    return built


@functools.cache
def _built() -> ctypes.CDLL | str:
    from vllm import envs
    from vllm.logger import init_logger

    identity = "\0".join((_SOURCE.read_text(), *_FLAGS, compiler() or "")).encode()
    kept = Path(envs.VLLM_CACHE_ROOT).expanduser() / "bailing" / f"avx2-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    folder = None
    try:
        if kept.is_file():
            return _loaded(kept)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.mkdtemp(dir=kept.parent)
        except OSError:  # no place there: compiled for this process alone
            folder = tempfile.mkdtemp()
            kept = Path(folder) / "kept.so"
        init_logger("vllm.plugins.bailing.cpu").info("Kernels for AVX2 are compiled, once: a few seconds.")
        made = Path(folder) / "made.so"
        _compile(made)
        made.replace(kept)  # at once, whoever else compiles it
        return _loaded(kept)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _loaded(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.bailing_linear.argtypes = [pointer, pointer, number, number, pointer]
    library.bailing_linear.restype = None
    library.bailing_experts.argtypes = [pointer, pointer, pointer, number, number, pointer, pointer, number, pointer]
    library.bailing_experts.restype = ctypes.c_bool
    return library


# ---- weights -------------------------------------------------------------------------------------------------------


class _Description(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "format",
                "experts",
                "n",
                "k",
                "groups",
                "rows_of_scale",
                "scale_dtype",
                "data_bytes",
                "scale_bytes",
                "zero_bytes",
            )
        ),
        *((name, ctypes.c_void_p) for name in ("data", "scales", "zeros")),
    ]


class Weights(NamedTuple):
    """A stack of weights, as the kernels take them; contiguous.

    Attributes:
        data: [E, N, K] bf16, fp16, fp8 or int8, or [E, N, K / 2] uint8 as `packed_int4` gives it.
        scales: Of fp8 [E, N / rows, G] fp32, a group being 128 inputs; of int8 [E, N] fp32; of int4 [E, N / 16, G, 16]
            bf16 or fp16.
        zeros: Of int4, [E, N / 16, G, 16] uint8.
        rows: Outputs that share a scale of fp8.
    """

    data: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    rows: int = 1

    def described(self) -> Any:
        """The pointer that the kernels take."""
        data, scales, _, rows = self
        groups = 1 if scales is None or scales.ndim < 3 else scales.shape[2]
        kind = 0 if scales is None else _DTYPES[scales.dtype]
        places = [None if one is None else one.data_ptr() for one in self[:3]]
        return _described(data.dtype, tuple(data.shape), groups, rows, kind, *places)


@functools.lru_cache(maxsize=4096)
def _described(
    dtype: torch.dtype, shape: tuple[int, int, int], groups: int, rows: int, scale_dtype: int, *places: int | None
) -> Any:
    experts, n, k = shape
    data_bytes = n * k * dtype.itemsize
    if dtype == torch.uint8:
        k *= 2
    scale_bytes = {torch.float8_e4m3fn: -(-n // rows) * groups * 4, torch.int8: n * 4, torch.uint8: n * groups * 2}
    sizes = data_bytes, scale_bytes.get(dtype, 0), n * groups
    return ctypes.byref(_Description(_FORMATS[dtype], experts, n, k, groups, rows, scale_dtype, *sizes, *places))


def packed_int4(
    levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of one matrix as the kernels take them.

    Args:
        levels: [N, K] uint8, 0 to 15.
        scales: [N, G].
        zeros: [N, G] uint8, 0 to 16; a weight means (level - zero) * scale.
    Returns:
        [N, K / 2] uint8, [N / 16, G, 16] bf16 or fp16, and [N / 16, G, 16] uint8. Groups larger than 128 are cut.
    """
    n, k = levels.shape
    group = k // scales.shape[1]
    if group > GROUPS[-1]:
        scales, zeros = (one.repeat_interleave(group // GROUPS[-1], 1) for one in (scales, zeros))
        group = GROUPS[-1]
    halves = levels.view(n, -1, 2, min(group, 64) // 2)
    data = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(n, k // 2)

    def in_blocks(of_groups: torch.Tensor) -> torch.Tensor:
        return of_groups.view(n // _ROWS, _ROWS, -1).transpose(1, 2).contiguous()

    return (
        data,
        in_blocks(scales if scales.dtype == torch.float16 else scales.to(torch.bfloat16)),
        in_blocks(zeros.to(torch.uint8)),
    )


# ---- products ------------------------------------------------------------------------------------------------------


def linear(x: torch.Tensor, weights: Weights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] times `weights` [1, N, K], plus `bias` [N]: [..., N] of x's dtype."""
    dtype = x.dtype
    x = (x if bias is None else x.float()).contiguous()  # so that the sum is rounded once
    result = x.new_empty(*x.shape[:-1], weights.data.shape[1])
    count = x.numel() // x.shape[-1]
    _library().bailing_linear(weights.described(), x.data_ptr(), _DTYPES[x.dtype], count, result.data_ptr())
    return result if bias is None else result.add_(bias).to(dtype)


def experts(
    output: torch.Tensor, x: torch.Tensor, w13: Weights, w2: Weights, weights: torch.Tensor, ids: torch.Tensor
) -> None:
    """Write the experts' weighted sum [T, H] to `output`, of x's dtype.

    Args:
        x: [T, H].
        w13, w2: Weights [E, 2I, H], gates before ups, and [E, H, I].
        weights, ids: [T, P] of the picks; those of weight 0 are not computed.
    Raises:
        ValueError: If an id is none of an expert.
    """
    assert output.is_contiguous() and output.dtype == x.dtype
    x, weights, ids = x.contiguous(), weights.float().contiguous(), ids.int().contiguous()
    run, first, second = _library().bailing_experts, w13.described(), w2.described()
    for part in zip(*(one.split(_TOKENS) for one in (x, ids, weights, output)), strict=True):
        x_at, ids_at, weights_at, output_at = (one.data_ptr() for one in part)
        count, per_token = part[1].shape
        if not run(first, second, x_at, _DTYPES[x.dtype], count, ids_at, weights_at, per_token, output_at):
            raise ValueError(f"no expert has one of the numbers {int(ids.min())} to {int(ids.max())}")


# Operations, which torch.compile does not look into.
_registry = torch.library.Library("vllm_bailing", "FRAGMENT")
_registry.define("avx2_linear(Tensor x, Tensor data, Tensor? scales, Tensor? zeros, int rows, Tensor? bias) -> Tensor")
_registry.define(
    "avx2_experts(Tensor(a!) output, Tensor x, Tensor data13, Tensor? scales13, Tensor? zeros13, int rows13, "
    "Tensor data2, Tensor? scales2, Tensor? zeros2, int rows2, Tensor weights, Tensor ids) -> ()"
)


def _linear(x: Any, *parts: Any) -> torch.Tensor:
    return linear(x, Weights(*parts[:4]), parts[4])


def _experts(output: Any, x: Any, *parts: Any) -> None:
    experts(output, x, Weights(*parts[:4]), Weights(*parts[4:8]), *parts[8:])


_registry.impl("avx2_linear", _linear, "CPU")
_registry.impl("avx2_experts", _experts, "CPU")
torch.library.register_fake(
    "vllm_bailing::avx2_linear", lambda x, data, *_: x.new_empty(*x.shape[:-1], data.shape[1]), lib=_registry
)
torch.library.register_fake("vllm_bailing::avx2_experts", lambda *_: None, lib=_registry)
