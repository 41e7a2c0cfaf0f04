"""Quantized layers in kernels of vLLM's CPU build that it keeps for processors with AMX, after a proof.

vLLM has classes of experts in int8, fp8 and int4 for CPUs, and one of linear layers in fp8. They ask for AMX, which
their kernels use where it is there and do without elsewhere (AVX-512 with bf16 and VNNI: AMD from Zen 4 on, Intel's
Cooper Lake); and they ask how experts are chosen, which happens before them. The classes here are vLLM's with other
answers: the instructions that the kernels were compiled for, and a comparison with exact arithmetic on what the
quantized weights mean, on the processor at hand, for the scheme and the sizes of the model.

What each scheme computes: int8 experts round what goes into them to 8 bits for each token, int4 experts too; fp8
weights are multiplied with bf16.

Dimension letters: E experts, H hidden size, I width of an expert on this rank, N outputs and K inputs, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.platforms import CpuArchEnum, current_platform

from vllm_bailing.errors import DEQUANTIZE, SettingsError
from vllm_bailing.plugin.kernels.cpu_experts import heeding
from vllm_bailing.plugin.kernels.proof import TOKENS, difference, experts_problem, proof, random, sample
from vllm_bailing.plugin.options import CPU_KERNELS, wants_cpu_kernels
from vllm_bailing.plugin.patches import offer_quantized_layers_on_cpu
from vllm_bailing.plugin.shims import quantized_cpu_layers
from vllm_bailing.processor import found, lacking_for_quantized_experts

logger = init_logger("vllm.plugins.bailing.cpu")

ops: Any = _custom_ops  # of older vLLM some names are missing
_OPERATIONS = (
    "convert_weight_packed",
    "convert_weight_packed_scale_zp",
    "fused_experts_cpu",
    "fp8_scaled_mm_cpu",
)
_MULTIPLE = 32  # of which sizes have to be multiples
_BLOCK = 128  # fp8 weights have a scale for each block of this many rows and columns
# Of the norm of the result. With activations in 8 bits the kernels are 0.022 off, with those in bf16 0.004.
_TOLERANCE = {"int8": 0.04, "int4": 0.04, "fp8": 0.01}
_TAKES = {
    "int8": "a scale per output, and activations rounded for each token",
    "int4": "a scale per group of inputs",
    "fp8": f"a scale per block of {_BLOCK} x {_BLOCK}",
}
_PER_OUTPUT = "it takes a scale per group of inputs, and not one for all of them"
_EXPERTS = 3  # of a proof


def obstacle(vllm_config: Any = None) -> str:
    """Why this engine, or any on this machine, cannot run quantized experts; empty if it can."""
    if vllm_config is not None and wants_cpu_kernels(vllm_config) is False:
        return f"{CPU_KERNELS}=false in --additional-config keeps vLLM's choice"
    lacking = lacking_for_quantized_experts()
    if lacking:
        return f"it has {found()}, and they need {', '.join(lacking)}"
    if quantized_cpu_layers() is None or not all(hasattr(torch.ops._C, name) for name in _OPERATIONS):
        return "this vLLM has none"
    return ""


def layout_problem(quantization: dict[str, Any]) -> str:
    """Why the kernel for int4 would misread experts that are stored so; empty if it would not.

    Args:
        quantization: `quantization_config` of config.json.
    """
    weights = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    if quantization.get("desc_act") or any(one.get("actorder") for one in weights):
        return "it takes columns in their order, and not by activation"
    per_output = any(one.get("num_bits") == 4 and one.get("strategy") == "channel" for one in weights)
    return _PER_OUTPUT if per_output or quantization.get("group_size") == -1 else ""


def offer_quantized_layers(vllm_config: Any) -> None:
    """Let vLLM find the classes of this file when it builds quantized layers; call it before that."""
    is_x86 = current_platform.is_cpu() and current_platform.get_cpu_architecture() == CpuArchEnum.X86
    if vllm_config.quant_config is None or not is_x86 or obstacle(vllm_config):
        return
    experts, linear = _classes(vllm_config.parallel_config.enable_expert_parallel)
    offer_quantized_layers_on_cpu(experts, linear)


@functools.cache
def _classes(has_expert_map: bool) -> tuple[dict[str, type], type]:
    """Classes of experts by the names of those that they stand for, and one of linear layers in fp8."""
    found = quantized_cpu_layers()
    assert found is not None  # or there is an obstacle
    vllm_experts, linear = found
    problems = {"int8": int8_problem, "fp8": fp8_problem, "int4": int4_problem}
    experts = {}
    for scheme, parent in vllm_experts.items():
        proved = _proved_experts(parent, scheme, problems[scheme])
        # Of int4 experts vLLM refuses another class than the one that has the name.
        experts[parent.__name__] = heeding(proved) if has_expert_map else proved
    return experts, _proved_linear(linear)


def _proved_experts(parent: Any, scheme: str, problem_of: Callable[..., str]) -> Any:
    class ProvedExperts(parent):
        def __init__(self, moe_config: Any, quant_config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(moe_config, quant_config, *args, **kwargs)
            if scheme == "int4":
                _check_groups(moe_config, self.w1_scale, self.w2_scale)

        @staticmethod
        def _supports_current_device() -> bool:
            return not obstacle()

        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            # vLLM's takes any size of groups, but not the name that groups of 32 have.
            small_groups = (getattr(quant_utils, "kInt4Static32", "absent"), None)
            in_groups_of_32 = scheme == "int4" and (weight_key, activation_key) == small_groups
            return in_groups_of_32 or parent._supports_quant_scheme(weight_key, activation_key)

        @staticmethod
        def _supports_routing_method(*_: Any) -> bool:
            return True

        @staticmethod
        def is_supported_config(experts: Any, moe_config: Any, *keys: Any) -> tuple[bool, str | None]:
            """As vLLM asks.

            Raises:
                ValueError: Where vLLM would look on: there is no other class for CPUs.
            """
            hidden_size, width = moe_config.hidden_dim, moe_config.intermediate_size_per_partition
            supported, reason = parent.is_supported_config(experts, moe_config, *keys)
            if not experts._supports_quant_scheme(*keys[:2]):
                reason = f"it takes {_TAKES[scheme]}"
            elif supported:
                reason = _size_problem(moe_config.in_dtype, hidden_size, width) or problem_of(hidden_size, width)
            if reason:
                raise ValueError(f"vLLM's CPU build has no {scheme} kernel for these experts ({reason})")
            logger.info_once("Experts run in an %s kernel of vLLM for AVX-512, which proved right.", scheme)
            return True, None

        def apply(self, *, topk_weights: torch.Tensor, **rest: Any) -> Any:
            # The kernel for int4 reads them as fp32 whatever they are.
            return super().apply(topk_weights=topk_weights.float().contiguous(), **rest)

    ProvedExperts.__name__ = ProvedExperts.__qualname__ = f"Proved{scheme.capitalize()}Experts"
    return ProvedExperts


def _proved_linear(parent: Any) -> Any:
    class ProvedFp8Linear(parent):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return not obstacle(), obstacle() or None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            supported, reason = super().can_implement(config)
            if supported:
                rows = config.weight_quant_key.scale.group_shape.row
                reason = _size_problem(config.out_dtype, *config.weight_shape) or fp8_linear_problem(
                    *config.weight_shape, rows
                )
            return not reason, reason or None

    return ProvedFp8Linear


def _size_problem(dtype: torch.dtype, *sizes: int) -> str:
    if dtype != torch.bfloat16:
        return f"it takes bf16, not {dtype}; leave --dtype out"
    odd = [size for size in sizes if size % _MULTIPLE]
    return f"{odd[0]} is no multiple of {_MULTIPLE}" if odd else ""


def _check_groups(moe_config: Any, w13_scale: torch.Tensor, w2_scale: torch.Tensor) -> None:
    """Refuse groups that the kernel would read wrongly: it takes the size of the first matrix's for both.

    Args:
        w13_scale, w2_scale: Packed, [E, N / 32, G, 32].
    """
    groups = {
        moe_config.hidden_dim // w13_scale.shape[2],
        moe_config.intermediate_size_per_partition // w2_scale.shape[2],
    }
    problem = (
        _PER_OUTPUT
        if len(groups) > 1
        else int4_problem(moe_config.hidden_dim, moe_config.intermediate_size_per_partition, groups.pop())
    )
    if problem:
        raise SettingsError(f"vLLM's CPU build has no int4 kernel for these experts ({problem}); {DEQUANTIZE}")


# ---- proofs --------------------------------------------------------------------------------------------------------


def _fused(scheme: Any, packed: list[Any], scales: list[Any], zeros: list[Any], block: list[int] | None) -> Any:
    def run(output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        ops.fused_experts_cpu(output, x, *packed, weights, ids, scheme, *scales, *zeros, block)

    return run


def _matrices(hidden_size: int, width: int) -> tuple[torch.Generator, list[torch.Tensor]]:
    """Random weights [E, 2I, H] and [E, H, I]."""
    generator = torch.Generator().manual_seed(0)
    h, i = sample(hidden_size), sample(width)
    return generator, [random(generator, _EXPERTS, 2 * i, h).float(), random(generator, _EXPERTS, h, i).float()]


@proof
def int8_problem(hidden_size: int, width: int) -> str:
    """Why the kernel cannot run experts of `width` in int8 with a scale per output; empty if it can."""
    _, plain = _matrices(hidden_size, width)
    scales = [weight.abs().amax(-1, keepdim=True) / 127 for weight in plain]
    levels = [(weight / scale).round().to(torch.int8) for weight, scale in zip(plain, scales, strict=True)]
    meaning = [level.float() * scale for level, scale in zip(levels, scales, strict=True)]
    packed = [torch.ops._C.convert_weight_packed(level) for level in levels]
    run = _fused(ops.CPUQuantMethod.INT8_W8A8, packed, scales, [None, None], None)
    return experts_problem(run, meaning[0], meaning[1], _TOLERANCE["int8"])


def _in_blocks(plain: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels in fp8, a scale for each block, and what both mean, of weights [..., N, K]."""
    n, k = plain.shape[-2:]
    shape = (*plain.shape[:-2], -(-n // rows), -(-k // _BLOCK))
    generator = torch.Generator().manual_seed(2)
    scale = (torch.rand(shape, generator=generator, dtype=torch.float32) + 0.5) / 448
    spread = scale.repeat_interleave(rows, -2)[..., :n, :].repeat_interleave(_BLOCK, -1)[..., :k]
    level = (plain / plain.abs().max() * 448).to(torch.float8_e4m3fn)
    return level, scale, level.float() * spread


@proof
def fp8_problem(hidden_size: int, width: int) -> str:
    """Why the kernel cannot run experts of `width` in fp8 with a scale per block; empty if it can."""
    if 2 * width % (2 * _BLOCK) and width > _BLOCK:
        return f"width {width} is no multiple of a block of {_BLOCK}"
    _, plain = _matrices(hidden_size, width)
    levels, scales, meaning = zip(*(_in_blocks(weight, _BLOCK) for weight in plain), strict=True)
    packed = [torch.ops._C.convert_weight_packed(level) for level in levels]
    run = _fused(ops.CPUQuantMethod.FP8_W8A16, packed, list(scales), [None, None], [_BLOCK, _BLOCK])
    return experts_problem(run, meaning[0], meaning[1], _TOLERANCE["fp8"])


@proof
def fp8_linear_problem(n: int, k: int, rows: int) -> str:
    """Why the kernel cannot multiply with fp8 weights [n, k] with a scale per block of `rows`; empty if it can."""
    generator = torch.Generator().manual_seed(0)
    n, k = sample(n), sample(k)
    level, scale, meaning = _in_blocks(random(generator, n, k).float(), rows)
    packed = torch.ops._C.convert_weight_packed(level)
    for tokens in TOKENS:
        x = random(generator, tokens, k)
        result = torch.ops._C.fp8_scaled_mm_cpu(x, packed, scale, [rows, _BLOCK], None, torch.bfloat16, True)
        problem = difference(result, x.float() @ meaning.t(), _TOLERANCE["fp8"])
        if problem:
            return problem
    return ""


_GROUPS = (128, 64, 32)  # for a proof before a checkpoint's own are known
# Bits 4 i to 4 i + 3 of a word hold the value with this number of eight.
_ORDERS = {"GPTQ": (0, 1, 2, 3, 4, 5, 6, 7), "AWQ": (0, 2, 4, 6, 1, 3, 5, 7)}


@proof
def int4_problem(hidden_size: int, width: int, group: int = 0) -> str:
    """Why the kernel cannot run experts of `width` in int4, packed as GPTQ or AWQ do; empty if it can.

    Args:
        group: Inputs that share a scale; 0 for any that divides both sizes.
    """
    common = [size for size in _GROUPS if hidden_size % size == width % size == 0]
    if not group and not common:
        return f"no group of {_GROUPS[-1]} or more divides {hidden_size} and {width} inputs"
    group = group or common[0]
    generator, plain = _matrices(hidden_size, width)
    for algorithm, order in _ORDERS.items():
        parts = [_in_groups(generator, weight, group, algorithm, order) for weight in plain]
        words, scales, zeros, meaning = zip(*parts, strict=True)
        converted = [
            ops.convert_weight_packed_scale_zp(word, zero, scale, ops.CPUQuantAlgo[algorithm])
            for word, zero, scale in zip(words, zeros, scales, strict=True)
        ]
        packed, packed_zeros, packed_scales = (list(part) for part in zip(*converted, strict=True))
        run = _fused(ops.CPUQuantMethod.INT4_W4A8, packed, packed_scales, packed_zeros, None)
        problem = experts_problem(run, meaning[0], meaning[1], _TOLERANCE["int4"])
        if problem:
            return f"{algorithm}: {problem}"
    return ""


def _in_groups(
    generator: torch.Generator, plain: torch.Tensor, group: int, algorithm: str, order: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """Words, scales [E, G, N], zero points in words [E, G, N / 8], and what they mean, of weights [E, N, K].

    Words are [E, K / 8, N] for GPTQ, whose zero points are stored less one, and [E, K, N / 8] for AWQ.
    """
    grouped = plain.unflatten(-1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)  # [E, N, G]
    scale = ((high - low) / 15).bfloat16()
    zero = (-low / scale.float()).round().clamp(1, 15)
    level = (grouped / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    meaning = ((level - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(-2)
    is_gptq = algorithm == "GPTQ"
    levels = level.flatten(-2).transpose(1, 2)  # [E, K, N]
    words = _words(levels.transpose(1, 2), order).transpose(1, 2) if is_gptq else _words(levels, order)
    zeros = _words(zero.transpose(1, 2) - (1 if is_gptq else 0), order)
    return words.contiguous(), scale.transpose(1, 2).contiguous(), zeros, meaning


def _words(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Integers of four bits [..., n] as int32 [..., n / 8]."""
    eights = values.long().unflatten(-1, (-1, 8))
    words = sum(eights[..., index] << 4 * place for place, index in enumerate(order))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()
