"""Matrix products with weights of 16, 8 and 4 bits for x86 processors with AVX2 and without AVX-512 bf16.

vLLM's CPU build and PyTorch have none for them that read a quantized weight once and in its own bits. For weights of 4
bits there is a faster one with AVX-512 VNNI, which is ahead of vLLM's too. avx2.cpp is compiled when an engine needs it
first, which takes a C++ compiler and half a minute, and kept in the user's cache. It has operations more, for all
processors with AVX2, which are many small ones elsewhere: the choice of experts; norms, rotation and attention
(cpu_attention.py); and the two halves of a decoder layer (cpu_layer.py).

Weights are multiplied as what they mean: bf16, fp16 and fp8 with activations in fp32; int8 with activations in integers
of 11 to 15 bits, as many as leave sums of 32 bits without an overflow; int4 with activations in int8 and a scale for
every 128 of them. An activation that is not finite makes its token's result NaN.

Dimension letters: T tokens, P picks of a token, E experts, N outputs, K inputs, G groups of inputs with a scale, D head
size.
"""

from __future__ import annotations

import functools
import hashlib
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_bailing.processor import compiler

MULTIPLES = (16, 32)  # of which N and K have to be multiples
GROUPS = (32, 64, 128)  # sizes of groups of int4 weights; the kernel knows no others
_ROWS, _TILE = MULTIPLES[0], 4  # of outputs whose scales, and whose weights in int4, lie side by side
_SOURCE = Path(__file__).with_name("avx2.cpp")
_FLAGS = ("-O3", "-std=c++20", "-mavx2", "-mfma", "-mf16c", "-fopenmp", "-shared", "-fPIC")
_FLAGS += ("-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2")  # for PyTorch's vectors
_SECONDS = 600.0  # for the compiler


class Weights(NamedTuple):
    """A stack of weights, as the operations take them; contiguous.

    Attributes:
        data: [E, N, K] bf16, fp16, fp8 or int8, or uint8 as `packed_int4` gives it: [E, N, K / 2], or
            [E, N / 16, K / 8, 64] for VNNI.
        scales: Of fp8 [E, N / rows, G] fp32, a group being 128 inputs; of int8 [E, N] fp32; of int4 [E, N / 16, G, 16]
            bf16 or fp16.
        zeros: Of int4, [E, N / 16, G, 16] uint8.
        rows: Outputs that share a scale of fp8.
    """

    data: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    rows: int = 1

    def kind(self) -> tuple[torch.dtype, int]:
        """What both matrices of experts have to have in common."""
        return self.data.dtype, self.data.dim()


def packed_int4(
    levels: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, for_vnni: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of one matrix as the kernels take them.

    Args:
        levels: [N, K] uint8, 0 to 15.
        scales: [N, G].
        zeros: [N, G] uint8, 0 to 16; a weight means (level - zero) * scale.
        for_vnni: Whether the kernels for VNNI take them.
    Returns:
        [N, K / 2] uint8, with 4 outputs side by side, or [N / 16, K / 8, 64] for VNNI; [N / 16, G, 16] bf16 or fp16;
        and [N / 16, G, 16] uint8. Groups larger than 128 are cut.
    Raises:
        RuntimeError: If the kernels know no groups of this size; a proof tells it.
    """
    n, k = levels.shape
    group = k // scales.shape[1]
    if group not in GROUPS and group % GROUPS[-1]:
        raise RuntimeError(f"groups of {group} inputs are none of {GROUPS} nor multiples of the last")
    if group > GROUPS[-1]:
        scales, zeros = (one.repeat_interleave(group // GROUPS[-1], 1) for one in (scales, zeros))
        group = GROUPS[-1]
    together, inputs = (_ROWS, 8) if for_vnni else (_TILE, min(group, 64))
    halves = levels.view(n // together, together, -1, 2, inputs // 2)
    data = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(1, 2)
    data = data.reshape(n // _ROWS, k // 8, 64) if for_vnni else data.reshape(n, k // 2)

    def in_blocks(of_groups: torch.Tensor) -> torch.Tensor:
        return of_groups.view(n // _ROWS, _ROWS, -1).transpose(1, 2).contiguous()

    scales = scales if scales.dtype == torch.float16 else scales.to(torch.bfloat16)
    return data, in_blocks(scales), in_blocks(zeros.to(torch.uint8))


# ---- operations ----------------------------------------------------------------------------------------------------

_registry = torch.library.Library("vllm_bailing", "FRAGMENT")
_registry.define("avx2_linear(Tensor x, Tensor data, Tensor? scales, Tensor? zeros, int rows, Tensor? bias) -> Tensor")
_registry.define("avx2_plain_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_registry.define(
    "avx2_experts(Tensor(a!) output, Tensor x, Tensor data13, Tensor? scales13, Tensor? zeros13, int rows13, "
    "Tensor data2, Tensor? scales2, Tensor? zeros2, int rows2, Tensor weights, Tensor ids) -> ()"
)
_registry.define(
    "avx2_route(Tensor logits, Tensor bias, int groups, int open, int picks, bool normalizes, float scale) "
    "-> (Tensor, Tensor)"
)
_registry.define(
    "avx2_qk_norm_rope(Tensor(a!) qkv, int q_heads, int k_heads, int head_dim, float eps, Tensor q_weight, "
    "Tensor k_weight, Tensor cos_sin, Tensor positions) -> ()"
)
# Attention writes to the KV cache, which is no argument: a graph cannot know it, and need not, as its results are used
# and no two layers have the same arguments.
_registry.define("avx2_begin_attention(int layers, bool attends) -> ()")
_registry.define(
    "avx2_hand_over(int[] places, Tensor[] caches, Tensor? slots, Tensor starts, Tensor lengths, Tensor blocks, "
    "Tensor schedule, Tensor? dynamic_causal, bool causal, int tokens, str isa) -> ()"
)
_registry.define(
    "avx2_attention(Tensor(a!) qkv, int q_heads, int k_heads, int head_dim, float eps, Tensor q_weight, "
    "Tensor k_weight, Tensor cos_sin, Tensor positions, float scale, int place) -> Tensor"
)
_registry.define(
    "avx2_attention_half(Tensor x, Tensor? residual, Tensor norm, float eps, Tensor[] qkv, int rows, int q_heads, "
    "int k_heads, int head_dim, float qk_eps, Tensor q_weight, Tensor k_weight, Tensor cos_sin, Tensor positions, "
    "float scale, int place) -> (Tensor, Tensor)"
)
_registry.define(
    "avx2_moe_half(Tensor heads, Tensor residual, Tensor[] dense, Tensor norm, float eps, Tensor gate, Tensor bias, "
    "int groups, int open, int picks, bool normalizes, float scale, Tensor[] w13, Tensor[] w2, Tensor[] shared13, "
    "Tensor[] shared2, int[] rows) -> (Tensor, Tensor)"
)
for _name, _shaped in {
    "avx2_linear": lambda x, data, *_: x.new_empty(*x.shape[:-1], data.shape[1] * (_ROWS if data.dim() == 4 else 1)),
    "avx2_plain_linear": lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    "avx2_experts": lambda *_: None,
    "avx2_qk_norm_rope": lambda *_: None,
    "avx2_attention": lambda qkv, heads, _kv_heads, size, *_: qkv.new_empty(qkv.shape[0], heads * size),
    "avx2_attention_half": lambda x, _residual, _norm, _eps, _qkv, _rows, heads, _kv_heads, size, *_: (
        x.new_empty(x.shape[0], heads * size),
        torch.empty_like(x),
    ),
    "avx2_moe_half": lambda _heads, residual, *_: (torch.empty_like(residual), torch.empty_like(residual)),
    "avx2_route": lambda logits, _bias, _groups, _open, picks, *_: (
        logits.new_empty(logits.shape[0], picks, dtype=torch.float32),
        logits.new_empty(logits.shape[0], picks, dtype=torch.int32),
    ),
}.items():
    torch.library.register_fake(f"vllm_bailing::{_name}", _shaped, lib=_registry)


def linear(x: torch.Tensor, weights: Weights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] times `weights` [1, N, K], plus `bias` [N]: [..., N] of x's dtype; after `load`."""
    return torch.ops.vllm_bailing.avx2_linear(x, *weights, bias)


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., K] times `weight` [N, K] in bf16 or fp16, plus `bias` [N]: [..., N] of x's dtype; after `load`.

    For more tokens than the kernels are good at, a part of the weight at a time becomes fp32 for a product of PyTorch.
    """
    return torch.ops.vllm_bailing.avx2_plain_linear(x, weight, bias)


def experts(
    output: torch.Tensor, x: torch.Tensor, w13: Weights, w2: Weights, weights: torch.Tensor, ids: torch.Tensor
) -> None:
    """Write the experts' weighted sum [T, H] to `output`, of x's dtype; after `load`.

    Args:
        x: [T, H].
        w13, w2: Weights [E, 2I, H], gates before ups, and [E, H, I].
        weights, ids: [T, P] of the picks; those of weight 0 are not computed.
    Raises:
        ValueError: If an id is none of an expert.
    """
    torch.ops.vllm_bailing.avx2_experts(output, x, *w13, *w2, weights, ids)


def route(
    logits: torch.Tensor, bias: torch.Tensor, groups: int, open_groups: int, picks: int, normalizes: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, P] in fp32 and ids [T, P] in int32 of the experts of tokens with `logits` [T, E]; after `load`.

    `picks` of those with the highest sigmoid plus `bias` [E], in the `open_groups` of `groups` whose two best of these
    have the highest sum. Weights are sigmoids, divided by their sum with `normalizes`, times `scale`. Logits with NaN
    give weights that are NaN.

    Source: Ling-V2, `modeling_bailing_moe_v2.py`, class `BailingMoeV2Gate`.
    """
    return torch.ops.vllm_bailing.avx2_route(logits, bias, groups, open_groups, picks, normalizes, scale)


def qk_norm_rope(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
) -> None:
    """Norm and rotate queries and keys of `qkv` [T, (q + k + v) D] in place; after `load`.

    Args and source: as `cpu.fused_qk_norm_rope`; halves are rotated, whatever `is_neox` says.
    Raises:
        RuntimeError: If D or half of the rotary width are no multiples of 8.
    """
    torch.ops.vllm_bailing.avx2_qk_norm_rope(
        qkv, num_heads_q, num_heads_k, head_dim, eps, q_weight, k_weight, cos_sin_cache, position_ids
    )


def begin_attention(layers: int, attends: bool = False) -> None:
    """Before `attention` is called for so many layers, and after it for 0, which lets go of what was handed over.

    Args:
        attends: Whether all of them are handed something; if not, they give zeros.
    """
    torch.ops.vllm_bailing.avx2_begin_attention(layers, attends)


def hand_over(
    places: Sequence[int], caches: Sequence[torch.Tensor], slots: torch.Tensor | None, metadata: Any, isa: str
) -> None:
    """What layers of one group of the KV cache attend with.

    Args:
        places: Numbers of the layers.
        caches: [B, K, S, 2 D] of each, S slots of a block.
        slots: [T] of the new keys and values; None if they are there already.
        metadata: vLLM's `CPUAttentionMetadata`.
        isa: As vLLM names the instructions of its kernels.
    """
    torch.ops.vllm_bailing.avx2_hand_over(
        places,
        caches,
        slots,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.block_table,
        metadata.scheduler_metadata,
        metadata.dynamic_causal,
        metadata.causal,
        metadata.num_actual_tokens,
        isa,
    )


def attention(
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    place: int,
) -> torch.Tensor:
    """`qk_norm_rope` of `qkv` [T, (Q + 2 K) D], and what its tokens attend to [T, Q D], in vLLM's kernels.

    Args:
        scale: Of queries times keys.
        place: Of the layer among those that were handed over.
    Raises:
        RuntimeError: If there is no such layer, or vLLM's operations take other arguments.
    """
    return torch.ops.vllm_bailing.avx2_attention(
        qkv, num_heads, num_kv_heads, head_dim, eps, q_weight, k_weight, cos_sin_cache, positions, scale, place
    )


# ---- compiling -----------------------------------------------------------------------------------------------------


@functools.cache
def identity() -> str:
    """What tells the compiled kernels from those of another source, compiler or PyTorch."""
    parts = (_SOURCE.read_text(), *_FLAGS, compiler() or "", torch.__version__, torch.__file__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load() -> None:
    """Have the operations run in the compiled kernels, in this process; each proof calls it.

    Raises:
        RuntimeError: If they cannot be compiled or loaded; the second time without another attempt.
    """
    if problem := _problem():
        raise RuntimeError(problem)


@functools.cache
def _problem() -> str:
    from vllm import envs
    from vllm.logger import init_logger

    kept = Path(envs.VLLM_CACHE_ROOT).expanduser() / "bailing" / f"avx2-{identity()}.so"
    folder = None
    try:
        if not kept.is_file():
            try:
                kept.parent.mkdir(parents=True, exist_ok=True)
                folder = tempfile.mkdtemp(dir=kept.parent)
            except OSError:  # no place there: compiled for this process alone
                folder = tempfile.mkdtemp()
                kept = Path(folder) / "kept.so"
            init_logger("vllm.plugins.bailing.cpu").info("Kernels for AVX2 are compiled, once; up to a minute.")
            made = Path(folder) / "made.so"
            _compile(made)
            made.replace(kept)  # at once, whoever else compiles it
        torch.ops.load_library(kept)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error)
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return ""


def _compile(to: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    found = [*(f"-I{one}" for one in include_paths()), *(f"-L{one}" for one in library_paths())]
    command = [*shlex.split(compiler() or "c++"), *_FLAGS, *found, str(_SOURCE), "-o", str(to), "-lc10", "-ltorch_cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
