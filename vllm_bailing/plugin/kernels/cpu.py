"""Use vLLM's faster CPU kernels where it would pick slower ones, after checking each against PyTorch on this CPU.

*Matrices.* vLLM's CPU build multiplies bf16 matrices in two ways: with oneDNN and a portable kernel for experts, or
with kernels of AVX-512 bf16 instructions (ported from SGLang), which it takes only where the CPU has AMX besides. They
run without AMX (AMD from Zen 4 on, Intel's Cooper Lake). A bf16 model without quantization gets them here. Without
AVX-512 oneDNN takes no bf16 at all: see cpu_widened.py.

*Norms.* In eager mode vLLM computes them in PyTorch, operation by operation, and has kernels for them that lie idle.
`torch.compile` fuses them, so that compiled engines do without.

How much faster: docs/benchmarks.md. Dimension letters: T tokens, H hidden size, I width of an expert, N outputs and K
inputs of a linear layer, D head size, R rotary width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from vllm_bailing.errors import SettingsError
from vllm_bailing.plugin.kernels import avx2
from vllm_bailing.plugin.kernels.cpu_widened import has_zentorch, widen, widens
from vllm_bailing.plugin.kernels.proof import TOKENS, difference, experts_problem, proof, random, sample
from vllm_bailing.plugin.options import CPU_KERNELS, wants_cpu_kernels
from vllm_bailing.plugin.shims import portable_cpu_experts
from vllm_bailing.processor import instructions

logger = init_logger("vllm.plugins.bailing.cpu")

ops: Any = _custom_ops  # of older vLLM some of `_NEEDED` are missing
_NEEDED = ("weight_packed_linear_cpu", "fused_experts_cpu", "CPUQuantMethod")  # of vllm._custom_ops; new in 0.32
_BLOCKS = (16, 32)  # the kernels take weights [N, K] with N and K divisible by these
_BLOCK_TOKENS, _FEW_TOKENS = 32, 4  # tokens of a block; up to 4 tokens a kernel without oneDNN runs
_OPERATIONS = "cpu_operations"  # a key of additional_config
_TOLERANCE = 0.01  # of the norm of the result; bf16 rounding alone stays below 0.004


def use_cpu_kernels(model: nn.Module, head: nn.Module, vllm_config: Any) -> None:
    """Switch the layers of `model`, `head` among them, over to these kernels, before their weights are loaded.

    Raises:
        SettingsError: If `--additional-config` asks for what this machine or model cannot have.
    """
    is_asked_for = wants_cpu_kernels(vllm_config)
    obstacle = _obstacle(vllm_config.model_config.dtype)
    if obstacle and is_asked_for:
        raise SettingsError(f"{CPU_KERNELS}=true in --additional-config: {obstacle}; leave it out")
    if not current_platform.is_cpu() or is_asked_for is False:
        return
    _tell_graphs_apart(vllm_config)
    eager = not vllm_config.compilation_config.mode
    widened = bool(obstacle) and widens(vllm_config.model_config.dtype)
    for module in model.modules():
        if eager and type(module) is RMSNorm:
            _switch_norm(module)
        elif widened or _is_gate_in_bf16(module):
            widen(module, is_head=module is head)
        elif not obstacle:
            _switch_matrices(module, is_head=module is head)
    if widened:
        logger.info_once("Matrix products run in fp32, in kernels of this package: this CPU has none for bf16 or fp16.")
    elif obstacle:
        logger.debug("vLLM's choice of CPU kernels for matrices stays: %s", obstacle)
    else:
        logger.info_once("Matrix products run on AVX-512 bf16 kernels of vLLM that it keeps for CPUs with AMX.")


def _tell_graphs_apart(vllm_config: Any) -> None:
    """Have vLLM compile anew on another processor, or with other kernels of this package.

    It takes graphs that were compiled before from its cache, by a hash of the configuration, which says nothing of the
    operations that are in them.
    """
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config[_OPERATIONS] = f"{avx2.identity()}, {', '.join(instructions())}"


def _is_gate_in_bf16(module: nn.Module) -> bool:
    """Whether it needs a product with logits in fp32, which the kernels for AVX-512 do not have."""
    return isinstance(module, GateLinear) and module.weight.dtype == torch.bfloat16


def _obstacle(dtype: torch.dtype) -> str:
    """Why this engine cannot have the kernels for matrices; empty if it can."""
    if not current_platform.is_cpu():
        return "this is not a CPU engine"
    if dtype != torch.bfloat16:
        return f"the kernels take bf16, not {dtype}"
    if not all(hasattr(ops, name) for name in _NEEDED):
        return "this vLLM has no such kernels"
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX-512 bf16 instructions"
    if torch.cpu._is_amx_tile_supported():
        return "this CPU has AMX, for which vLLM chooses well"
    if has_zentorch():
        return "zentorch brings its own"
    return ""


# --- norms ---------------------------------------------------------------------------------------------------------


def fused_qk_norm_rope(
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
    """Norm and rotate queries and keys of `qkv` [T, (q + k + v) D] in place, all floats of one dtype.

    Args:
        q_weight, k_weight: [D].
        cos_sin_cache: [positions, R], cosines and sines side by side.
        is_neox: Whether halves are rotated, and not neighbors.
        position_ids: [T] int64.

    Source: the operation of the same name in vLLM's CUDA build, whose arguments these are.
    """
    q, k, _ = qkv.split((num_heads_q * head_dim, num_heads_k * head_dim, num_heads_v * head_dim), dim=-1)
    rotated = []
    for part, weight in ((q, q_weight), (k, k_weight)):
        normed = torch.empty(part.shape, dtype=part.dtype)
        torch.ops._C.rms_norm(normed.view(-1, head_dim), part.reshape(-1, head_dim), weight, eps)
        rotated.append(normed)
    torch.ops._C.rotary_embedding(position_ids, *rotated, head_dim, cos_sin_cache, is_neox)
    q.copy_(rotated[0])
    k.copy_(rotated[1])


def _rms_norm(layer: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    """As `RMSNorm.forward`; with a `residual`, both are changed in place."""
    x = x.contiguous()
    if residual is None:
        normed = torch.empty_like(x)
        torch.ops._C.rms_norm(normed, x, layer.weight.data, layer.variance_epsilon)
        return normed
    torch.ops._C.fused_add_rms_norm(x, residual, layer.weight.data, layer.variance_epsilon)
    return x, residual


def _switch_norm(layer: RMSNorm) -> None:
    problem = _norm_problem(layer.hidden_size, layer.weight.dtype)
    if problem:
        logger.info_once("Norms of %d stay in PyTorch: %s", layer.hidden_size, problem)
    else:
        layer.forward = functools.partial(_rms_norm, layer)


# --- proofs --------------------------------------------------------------------------------------------------------


@proof
def _norm_problem(size: int, dtype: torch.dtype) -> str:
    """Why the kernels cannot norm rows of `size` numbers; empty if they can."""
    generator = torch.Generator().manual_seed(0)
    layer = RMSNorm(size, eps=1e-6, dtype=dtype)
    layer.weight.data = random(generator, size).to(dtype)
    x, residual = (random(generator, TOKENS[1], size).to(dtype) for _ in range(2))
    plain: Any = layer.forward_native(x.clone())
    expected, added = layer.forward_native(x.clone(), residual.clone())
    result = _rms_norm(layer, x)
    normed, total = _rms_norm(layer, x, residual)
    return (
        difference(result, plain.float(), _TOLERANCE)
        or difference(normed, expected.float(), _TOLERANCE)
        or difference(total, added.float(), _TOLERANCE)
    )


@proof
def _linear_problem(n: int, k: int) -> str:
    """Why the kernel cannot multiply with weights [n, k]; empty if it can."""
    if n % _BLOCKS[0] or k % _BLOCKS[1]:
        return f"they are not multiples of {_BLOCKS[0]} and {_BLOCKS[1]}"
    generator = torch.Generator().manual_seed(0)
    n, k = sample(n), sample(k)
    weight = random(generator, n, k)
    packed = torch.ops._C.convert_weight_packed(weight)
    for tokens in TOKENS:
        x = random(generator, tokens, k)
        problem = difference(
            ops.weight_packed_linear_cpu(x, packed, n, None), x.float() @ weight.float().t(), _TOLERANCE
        )
        if problem:
            return problem
    return ""


@proof
def _experts_problem(hidden_size: int, width: int) -> str:
    """Why the kernel cannot run experts of `width`; empty if it can."""
    if hidden_size % _BLOCKS[1] or width % _BLOCKS[1]:
        return f"they are not multiples of {_BLOCKS[1]}"
    generator = torch.Generator().manual_seed(0)
    experts, h, i = 3, sample(hidden_size), sample(width)
    w13, w2 = random(generator, experts, 2 * i, h), random(generator, experts, h, i)
    packed13, packed2 = torch.ops._C.convert_weight_packed(w13), torch.ops._C.convert_weight_packed(w2)

    def run(output: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        _run_experts(output, x, packed13, packed2, weights, ids)

    return experts_problem(run, w13, w2, _TOLERANCE)


# --- matrices ------------------------------------------------------------------------------------------------------


def _switch_matrices(layer: Any, is_head: bool) -> None:
    method = getattr(layer, "quant_method", None)
    if type(method) is UnquantizedLinearMethod:
        layer.quant_method = PackedLinear()
    elif type(method) is UnquantizedEmbeddingMethod:
        # vLLM would pack a second copy of any table, to multiply with, which only a head does.
        layer.quant_method = PackedHead() if is_head else PlainEmbedding()
    else:
        _switch_experts(method)


class PackedLinear(UnquantizedLinearMethod):
    """Linear layers whose weight [N, K] is kept in the kernel's format only."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if not _pack(layer):
            super().process_weights_after_loading(layer)
            return
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


class PackedHead(UnquantizedEmbeddingMethod):
    """The language-model head. Its plain weight stays: it may be the embedding's too, or be wanted in fp32."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not _pack(layer):
            super().process_weights_after_loading(layer)


class PlainEmbedding(UnquantizedEmbeddingMethod):
    """A table that is looked up and never multiplied with."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass


def _pack(layer: Any) -> bool:
    """Give `layer` a `cpu_linear`, which is what vLLM's methods call, if the kernel takes its weight."""
    weight = layer.weight
    if weight.is_meta or weight.ndim != 2 or weight.dtype != torch.bfloat16:
        return False
    n, k = weight.shape
    problem = _linear_problem(n, k)
    if problem:
        logger.info_once("Layers with weights [%d, %d] keep oneDNN: %s", n, k, problem)
        return False
    packed = torch.ops._C.convert_weight_packed(weight)
    _compile_linear(k)
    layer.cpu_linear = lambda x, _weight, bias: ops.weight_packed_linear_cpu(
        x, packed, n, None if bias is None else bias.float()
    )
    return True


def _run_experts(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    """Write the experts' weighted sum [T, H] to `output`; `w13` [E, 2I, H] and `w2` [E, H, I] are packed."""
    unquantized = ops.CPUQuantMethod.UNQUANT
    ops.fused_experts_cpu(
        output, hidden_states, w13, w2, topk_weights, topk_ids, unquantized, None, None, None, None, None
    )


# The kernels work on blocks of up to 32 tokens, and in every thread oneDNN compiles one for each number of tokens that
# a block can have, when it first meets it: 0.1 to 0.3 milliseconds that a request would wait for, several times over.


@functools.cache
def _compile_linear(k: int) -> None:
    """Let all threads meet blocks of every size in linear layers with `k` inputs."""
    weight = torch.zeros(2 * _BLOCK_TOKENS * torch.get_num_threads(), k, dtype=torch.bfloat16)
    for tokens in range(1, _BLOCK_TOKENS + _FEW_TOKENS + 1):  # few take another way, unless they are what is left over
        ops.weight_packed_linear_cpu(weight.new_zeros(tokens, k), weight, len(weight), None)


@functools.cache
def _compile_experts(hidden_size: int, width: int) -> None:
    """Let all threads meet blocks of every size in experts of `width`."""
    w13 = torch.zeros(2, 2 * width, hidden_size, dtype=torch.bfloat16)
    w2 = torch.zeros(2, hidden_size, width, dtype=torch.bfloat16)
    for tokens in range(1, _BLOCK_TOKENS + 1):
        # The other expert makes up for few tokens, which take another way.
        ids = torch.tensor([0] * tokens + [1] * (_BLOCK_TOKENS + 1 - tokens), dtype=torch.int32).unsqueeze(1)
        x = w13.new_zeros(len(ids), hidden_size)
        _run_experts(torch.empty_like(x), x, w13, w2, torch.ones(ids.shape), ids)


def _switch_experts(method: Any) -> None:
    experts = _packed_experts()
    if experts is None or getattr(method, "experts_cls", None) is not experts.__base__:
        return
    config = method.moe
    problem = _experts_problem(config.hidden_dim, experts._padded_intermediate_size(config))
    if problem:
        logger.info_once("Experts keep vLLM's portable kernel: %s", problem)
    else:
        method.experts_cls = experts


@functools.cache
def _packed_experts() -> Any:
    """A class of experts for vLLM, or None where its interface for them is another."""
    portable = portable_cpu_experts()
    if portable is None:
        return None

    class PackedExperts(portable):
        """Experts [E, 2I, H] and [E, H, I] in the kernel's format."""

        def process_weights_after_loading(self, layer: Any) -> None:
            self._pad_moe_intermediate(layer)
            for name in ("w13_weight", "w2_weight"):
                replace_parameter(layer, name, torch.ops._C.convert_weight_packed(getattr(layer, name)))
            _compile_experts(layer.w13_weight.shape[-1], layer.w2_weight.shape[-1])

        def apply(
            self,
            output: torch.Tensor,
            hidden_states: torch.Tensor,
            w1: torch.Tensor,
            w2: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            *_args: Any,
            **_kwargs: Any,
        ) -> None:
            _run_experts(output, hidden_states, w1, w2, topk_weights, topk_ids)

    return PackedExperts
