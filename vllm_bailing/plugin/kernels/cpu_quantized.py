"""Quantized layers on CPUs: which kernels run them, after a proof on the processor at hand.

vLLM's CPU build has classes of experts in int8, fp8 and int4, and of linear layers. They ask for AMX or AVX-512, and
how experts are chosen, which happens before them. The classes here are made of vLLM's, with kernels of
quantized_avx512.py or of quantized_avx2.py, whichever are better on the processor. Each is compared with exact
arithmetic on what the quantized weights mean, for the scheme and the sizes of the model; what is wrong is not used.

Dimension letters: H hidden size, I width of an expert on this rank, N outputs and K inputs of a linear layer, G groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.platforms import CpuArchEnum, current_platform

from vllm_bailing.errors import DEQUANTIZE, SettingsError
from vllm_bailing.plugin.kernels.cpu_experts import heeding
from vllm_bailing.plugin.kernels.proof import (
    BLOCK,
    ORDERS,
    experts_problem,
    in_blocks,
    in_groups,
    in_int8,
    linear_problem,
    matrices,
    matrix,
    proof,
)
from vllm_bailing.plugin.options import CPU_KERNELS, wants_cpu_kernels
from vllm_bailing.plugin.patches import offer_quantized_layers_on_cpu, quantize_blocks_uncompiled_on_cpu
from vllm_bailing.plugin.shims import quantized_cpu_layers
from vllm_bailing.processor import SCHEMES, instructions, quantized_kernels

logger = init_logger("vllm.plugins.bailing.cpu")

_MULTIPLE = 32  # of which sizes have to be multiples
_GROUPS = (128, 64, 32)  # for a proof before a checkpoint's own are known
_TAKES = {
    "int8": "a scale per output, and activations rounded for each token",
    "int4": "a scale per group of inputs",
    "fp8": f"a scale per block of {BLOCK} x {BLOCK}",
}
_PER_OUTPUT = "it takes a scale per group of inputs, and not one for all of them"


def obstacle(vllm_config: Any = None) -> str:
    """Why this engine, or any on this machine, cannot run quantized experts; empty if it can."""
    if vllm_config is not None and wants_cpu_kernels(vllm_config) is False:
        return f"{CPU_KERNELS}=false in --additional-config keeps vLLM's choice"
    if quantized_cpu_layers() is None:
        return "this vLLM has none"
    from vllm_bailing.plugin.kernels import quantized_avx512

    found = quantized_kernels()
    return found.obstacle or (quantized_avx512.obstacle() if found.vllms else "")


def _prepared(scheme: str) -> ModuleType:
    """The module that has this processor's kernels for a scheme, which can run."""
    _kernels(scheme).prepare()
    return _kernels(scheme)


def _kernels(scheme: str) -> ModuleType:
    """The module that has this processor's kernels for a scheme."""
    from vllm_bailing.plugin.kernels import quantized_avx2, quantized_avx512

    found = quantized_kernels()
    if scheme not in found.ours:
        return quantized_avx512
    if found.vllms:  # which stand in for those that cannot be compiled
        try:
            quantized_avx2.prepare()
        except RuntimeError as error:
            logger.info_once("The %s kernel of this package cannot be had: %s", scheme, str(error))
            return quantized_avx512
    return quantized_avx2


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
    in_cpu_moe, linear = _classes(vllm_config.parallel_config.enable_expert_parallel)
    offer_quantized_layers_on_cpu(in_cpu_moe, linear)
    quantize_blocks_uncompiled_on_cpu()


@functools.cache
def _classes(has_expert_map: bool) -> tuple[dict[str, Any], list[type]]:
    """What stands for classes and functions of vLLM's `cpu_moe`, by their names; and classes of linear layers."""
    found = quantized_cpu_layers()
    assert found is not None  # or there is an obstacle
    vllm_experts, vllm_linears = found
    problems = {"int8": int8_problem, "fp8": fp8_problem, "int4": int4_problem}
    proved_linear = {"int8": _proved_int8_linear, "fp8": _proved_fp8_linear, "int4": _proved_int4_linear}
    in_cpu_moe: dict[str, Any] = {}
    linears: list[type] = []
    for scheme in SCHEMES:
        kernels = _kernels(scheme)
        in_cpu_moe |= kernels.preparations(scheme)
        proved = _proved_experts(kernels.experts(vllm_experts)[scheme], scheme, problems[scheme])
        # Of int4 experts vLLM refuses another class than the one that has the name.
        in_cpu_moe[vllm_experts[scheme].__name__] = heeding(proved) if has_expert_map else proved
        if (linear := kernels.linears(vllm_linears).get(scheme)) is not None:
            linears.append(proved_linear[scheme](linear))
    return in_cpu_moe, linears


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
                dtype = moe_config.in_dtype
                reason = _size_problem(scheme, dtype, hidden_size, width) or problem_of(hidden_size, width)
            if reason:
                raise ValueError(f"vLLM's CPU build has no {scheme} kernel for these experts ({reason})")
            logger.info_once(
                "Experts run in an %s kernel of %s, which proved right.", scheme, _kernels(scheme).name(scheme)
            )
            return True, None

        def apply(self, *, topk_weights: torch.Tensor, **rest: Any) -> Any:
            # The kernel for int4 reads them as fp32 whatever they are.
            return super().apply(topk_weights=topk_weights.float().contiguous(), **rest)

    ProvedExperts.__name__ = ProvedExperts.__qualname__ = f"Proved{scheme.capitalize()}Experts"
    return ProvedExperts


def _size_problem(scheme: str, dtype: torch.dtype, *sizes: int) -> str:
    if dtype != torch.bfloat16 and not _kernels(scheme).TAKES_ANY_DTYPE:
        return f"it takes bf16, not {dtype}; leave --dtype out"
    odd = [size for size in sizes if size % _MULTIPLE]
    return f"{odd[0]} is no multiple of {_MULTIPLE}" if odd else ""


def _check_groups(moe_config: Any, w13_scale: torch.Tensor, w2_scale: torch.Tensor) -> None:
    """Refuse groups that the kernel would read wrongly: that of vLLM takes the size of the first matrix's for both.

    Args:
        w13_scale, w2_scale: Packed, [E, N / 32, G, 32] or [E, N / 16, G, 16].
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


# ---- linear layers -------------------------------------------------------------------------------------------------


def _proved_fp8_linear(parent: Any) -> Any:
    class ProvedFp8Linear(parent):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return not obstacle(), obstacle() or None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            supported, reason = super().can_implement(config)
            if supported:
                rows = config.weight_quant_key.scale.group_shape.row
                reason = _size_problem("fp8", config.out_dtype, *config.weight_shape) or fp8_linear_problem(
                    *config.weight_shape, rows
                )
            return not reason, reason or None

    return ProvedFp8Linear


def _proved_int8_linear(parent: Any) -> Any:
    class ProvedInt8Linear(parent):
        def process_weights_after_loading(self, layer: Any) -> None:
            n, k = getattr(layer, self.layer_param_names[0]).shape
            self.problem = (
                _linear_obstacle("int8", self.config)
                or _size_problem("int8", torch.get_default_dtype(), n, k)
                or int8_linear_problem(n, k)
            )
            _tell("int8", self.problem)
            super().process_weights_after_loading(layer)

    return ProvedInt8Linear


def _proved_int4_linear(parent: Any) -> Any:
    class ProvedInt4Linear(parent):
        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            supported, reason = super().can_implement(config)
            reason = _int4_config_problem(config) if supported and not _has_peers() else reason
            if reason:
                raise ValueError(f"vLLM's CPU build has no int4 kernel for linear layers here ({reason})")
            return True, None

        def process_weights_after_loading(self, layer: Any) -> None:
            self.problem = _int4_config_problem(self.config)
            _tell("int4", self.problem)
            super().process_weights_after_loading(layer)

    return ProvedInt4Linear


def _int4_config_problem(config: Any) -> str:
    (k, n), group = config.partition_weight_shape, config.group_size
    return (
        _linear_obstacle("int4", config)
        or _size_problem("int4", config.act_type, n, k)
        or int4_linear_problem(n, k, k if group == -1 else group)
    )


def _has_peers() -> bool:
    """Whether vLLM's CPU build has other kernels for linear layers of integers here."""
    return "AVX-512" in instructions()


def _linear_obstacle(scheme: str, config: Any) -> str:
    """Why linear layers of integers keep vLLM's other kernel, whatever their sizes; empty if they do not."""
    if _has_peers() and scheme == "int8" and not config.input_symmetric:
        return "activations have zero points"
    if _has_peers() and scheme == "int4" and not envs.VLLM_CPU_INT4_W4A8:
        return "VLLM_CPU_INT4_W4A8=0 keeps activations in 16 bits"
    return ""


def _tell(scheme: str, problem: str) -> None:
    """Log which kernel linear layers take, or that those of this processor cannot take them.

    Raises:
        SettingsError: If no other can.
    """
    if not problem:
        whose = _kernels(scheme).name(scheme)
        logger.info_once("Linear layers run in an %s kernel of %s, which proved right.", scheme, whose)
    elif _has_peers():
        logger.info_once("Linear layers keep vLLM's other %s kernel: %s", scheme, problem)
    else:
        raise SettingsError(f"vLLM's CPU build has no {scheme} kernel for linear layers here ({problem}); {DEQUANTIZE}")


# ---- proofs --------------------------------------------------------------------------------------------------------


@proof
def int8_problem(hidden_size: int, width: int) -> str:
    """Why the kernel cannot run experts of `width` in int8 with a scale per output; empty if it can."""
    levels, scales, (w13, w2) = zip(*map(in_int8, matrices(hidden_size, width)[1]), strict=True)
    return experts_problem(_prepared("int8").int8_experts(levels, scales), w13, w2, _kernels("int8").TOLERANCE["int8"])


@proof
def fp8_problem(hidden_size: int, width: int) -> str:
    """Why the kernel cannot run experts of `width` in fp8 with a scale per block; empty if it can."""
    if 2 * width % (2 * BLOCK) and width > BLOCK:
        return f"width {width} is no multiple of a block of {BLOCK}"
    levels, scales, (w13, w2) = zip(*(in_blocks(one, BLOCK) for one in matrices(hidden_size, width)[1]), strict=True)
    return experts_problem(_prepared("fp8").fp8_experts(levels, scales), w13, w2, _kernels("fp8").TOLERANCE["fp8"])


@proof
def int4_problem(hidden_size: int, width: int, group: int = 0) -> str:
    """Why the kernel cannot run experts of `width` in int4, packed as GPTQ or AWQ do; empty if it can.

    Args:
        group: Inputs that share a scale; 0 for any that divides both sizes.
    """
    common = [size for size in _GROUPS if hidden_size % size == width % size == 0]
    if not group and not common:
        return f"no group of {_GROUPS[-1]} or more divides {hidden_size} and {width} inputs"
    generator, plain = matrices(hidden_size, width)
    for algorithm, order in ORDERS.items():
        parts = [in_groups(generator, weight, group or common[0], algorithm, order) for weight in plain]
        words, scales, zeros, (w13, w2) = zip(*parts, strict=True)
        run = _prepared("int4").int4_experts(words, zeros, scales, algorithm)
        problem = experts_problem(run, w13, w2, _kernels("int4").TOLERANCE["int4"])
        if problem:
            return f"{algorithm}: {problem}"
    return ""


@proof
def fp8_linear_problem(n: int, k: int, rows: int) -> str:
    """Why the kernel cannot multiply with fp8 weights [n, k] with a scale per block of `rows`; empty if it can."""
    level, scale, meaning = in_blocks(matrix(n, k), rows)
    return linear_problem(_prepared("fp8").fp8_linear(level, scale, rows), meaning, _kernels("fp8").TOLERANCE["fp8"])


@proof
def int8_linear_problem(n: int, k: int) -> str:
    """Why the kernel cannot multiply with int8 weights [n, k] with a scale per output; empty if it can."""
    level, scale, meaning = in_int8(matrix(n, k))
    return linear_problem(_prepared("int8").int8_linear(level, scale), meaning, _kernels("int8").TOLERANCE["int8"])


@proof
def int4_linear_problem(n: int, k: int, group: int) -> str:
    """Why the kernel cannot multiply with int4 weights [n, k] in groups; empty if it can."""
    if group not in _GROUPS and group % _GROUPS[0]:
        return f"it takes groups of {', '.join(map(str, _GROUPS))} inputs or multiples of that, not of {group}"
    generator = torch.Generator().manual_seed(0)
    parts = in_groups(generator, matrix(n, k).unsqueeze(0), group, "GPTQ", ORDERS["GPTQ"])
    words, scales, zeros, meaning = (part[0] for part in parts)
    return linear_problem(
        _prepared("int4").int4_linear(words, zeros, scales), meaning, _kernels("int4").TOLERANCE["int4"]
    )
