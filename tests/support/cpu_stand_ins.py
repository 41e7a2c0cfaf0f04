"""Stand-ins for the operations of vLLM's CPU build that need AVX-512 bf16 and VNNI, where the processor lacks them.

They are no kernels: they keep the operations' arguments, shapes and dtypes and compute in fp32 with what the packed
weights mean, activations unrounded. With them an engine loads, packs, chooses and answers on any x86 processor, through
the classes that a real kernel would be behind. What the kernels themselves compute is not tested by them.

What is packed here is turned around (last values first), so that nothing can take it for the weights themselves.
"""

from __future__ import annotations

import torch

_N = 32  # outputs of a block
_SCHEMAS = {
    "convert_weight_packed": "(Tensor weight) -> Tensor",
    "convert_weight_packed_scale_zp": "(Tensor qweight, Tensor qzeros, Tensor scales, int algorithm) -> "
    "(Tensor, Tensor, Tensor)",
    "fused_experts_cpu": "(Tensor(a!) out, Tensor hidden_states, Tensor w1, Tensor w2, Tensor topk_weights, "
    "Tensor topk_ids, int method, Tensor? w1_scale, Tensor? w2_scale, Tensor? w1_zero, Tensor? w2_zero, "
    "Tensor? a1_scale, int[]? block_size, Tensor? w1_bias, Tensor? w2_bias, float? alpha, float? limit, "
    "bool is_vnni) -> ()",
    "fp8_scaled_mm_cpu": "(Tensor mat1, Tensor mat2, Tensor scales2, int[] block_size, Tensor? bias, "
    "ScalarType out_dtype, bool is_vnni) -> Tensor",
    "int8_scaled_mm_with_quant": "(Tensor mat1, Tensor mat2, Tensor scales2, Tensor? bias, ScalarType out_dtype, "
    "bool is_vnni) -> Tensor",
    "int4_scaled_mm_cpu": "(Tensor(a!) x, Tensor(b!) w, Tensor(c!) w_zeros, Tensor(d!) w_scales, Tensor? bias) -> "
    "Tensor",
}


def convert_weight_packed(weight):
    packed = weight.view(torch.uint8).flip(-1).view(weight.dtype)
    if weight.dtype != torch.int8:
        return packed
    # The kernel keeps four bytes more per output, for sums that make up for activations without a sign.
    return torch.cat((packed, packed.new_zeros(*packed.shape[:-1], 4)), -1)


def _plain(packed, inputs):
    return packed[..., :inputs].contiguous().view(torch.uint8).flip(-1).view(packed.dtype).float()


_ORDERS = ((0, 2, 4, 6, 1, 3, 5, 7), (0, 1, 2, 3, 4, 5, 6, 7))  # of AWQ and GPTQ: places of eight values in a word


def _nibbles(words, algorithm):
    """[..., n / 8] int32 as [..., n]."""
    result = torch.empty(*words.shape, 8)
    for place, index in enumerate(_ORDERS[algorithm]):
        result[..., index] = ((words >> 4 * place) & 15).float()
    return result.flatten(-2)


def convert_weight_packed_scale_zp(qweight, qzeros, scales, algorithm):
    if qweight.ndim == 2:  # of one matrix
        packed = convert_weight_packed_scale_zp(*(one.unsqueeze(0) for one in (qweight, qzeros, scales)), algorithm)
        return tuple(one[0] for one in packed)
    experts, groups, outputs = scales.shape
    if algorithm == 1:  # GPTQ: eight inputs in a word, zero points less one
        levels = _nibbles(qweight.transpose(1, 2), 1)  # [E, N, K]
        zeros = _nibbles(qzeros, 1) + 1
    else:
        levels, zeros = _nibbles(qweight, 0).transpose(1, 2), _nibbles(qzeros, 0)
    inputs = levels.shape[-1]
    packed = levels.view(experts, outputs // _N, _N, inputs).flip(-1).to(torch.uint8)

    def in_blocks(of_groups):  # [E, G, N] as [E, N / 32, G, 32]
        return of_groups.view(experts, groups, outputs // _N, _N).transpose(1, 2).contiguous()

    return packed, in_blocks(zeros).to(torch.int8), in_blocks(scales.float())


def _of_groups(packed, zero, scale):
    levels = packed.flip(-1).float()  # [E, N / 32, 32, K]
    group = levels.shape[-1] // scale.shape[2]
    spread_zero, spread_scale = (part.float().transpose(2, 3).repeat_interleave(group, -1) for part in (zero, scale))
    return ((levels - spread_zero) * spread_scale).flatten(1, 2)


def _of_blocks(levels, scale, block):
    rows, columns = block
    spread = scale.float().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return levels * spread[..., : levels.shape[-2], : levels.shape[-1]]


def _meaning(packed, scale, zero, method, block, inputs):
    if method == 1:
        assert packed.dtype == torch.int8 and packed.shape[-1] == inputs + 4
        return _plain(packed, inputs) * scale.view(*packed.shape[:2], 1)
    if method == 2:
        assert packed.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
        return _of_blocks(_plain(packed, inputs), scale, block)
    assert method == 3 and packed.ndim == 4
    return _of_groups(packed, zero, scale)


def fused_experts_cpu(
    out, hidden_states, w1, w2, topk_weights, topk_ids, method, w1_scale, w2_scale, w1_zero, w2_zero, a1_scale,
    block_size, w1_bias, w2_bias, alpha, limit, is_vnni,
):  # fmt: skip
    assert hidden_states.dtype == torch.bfloat16 and topk_ids.dtype == torch.int32 and is_vnni
    assert topk_weights.dtype == torch.float32
    w13 = _meaning(w1, w1_scale, w1_zero, method, block_size, hidden_states.shape[1])
    down = _meaning(w2, w2_scale, w2_zero, method, block_size, w13.shape[1] // 2)
    x = hidden_states.float()
    result = torch.zeros_like(x)
    for expert in topk_ids.unique().tolist():
        tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (x[tokens] @ w13[expert].t()).chunk(2, -1)
        part = (torch.nn.functional.silu(gate) * up) @ down[expert].t()
        result.index_add_(0, tokens, part * topk_weights[tokens, places].unsqueeze(-1))
    out.copy_(result)


def fp8_scaled_mm_cpu(mat1, mat2, scales2, block_size, bias, out_dtype, is_vnni):
    assert is_vnni
    weight = _of_blocks(_plain(mat2, mat1.shape[1]), scales2, block_size)
    result = mat1.float() @ weight.t()
    return (result if bias is None else result + bias.float()).to(out_dtype)


def int8_scaled_mm_with_quant(mat1, mat2, scales2, bias, out_dtype, is_vnni):
    assert is_vnni and mat2.dtype == torch.int8 and mat2.shape[1] == mat1.shape[1] + 4
    result = mat1.float() @ (_plain(mat2, mat1.shape[1]) * scales2.view(-1, 1)).t()
    return (result if bias is None else result + bias).to(out_dtype)


def int4_scaled_mm_cpu(x, w, w_zeros, w_scales, bias):
    result = x.float() @ _of_groups(*(one.unsqueeze(0) for one in (w, w_zeros, w_scales)))[0].t()
    return (result if bias is None else result + bias).to(x.dtype)


_registered: list[torch.library.Library] = []  # they end with the object


def register(damaged: str | None = None) -> None:
    """Register them in this process, and let this package take the processor for one that has the kernels.

    Args:
        damaged: One of the operations, whose results are wrong then, whatever was there before.
    """
    from vllm import _custom_ops  # noqa: F401  # brings the real operations of the build

    from vllm_bailing.plugin import checks
    from vllm_bailing.plugin.kernels import cpu_quantized
    from vllm_bailing.processor import SCHEMES, QuantizedKernels

    library = torch.library.Library("_C", "FRAGMENT")
    _registered.append(library)
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops._C, name):
            library.define(name + schema)
        elif name != damaged:
            continue
        library.impl(name, wrong(globals()[name]) if name == damaged else globals()[name], "CPU", allow_override=True)
    cpu_quantized.quantized_kernels = lambda: QuantizedKernels(ours=(), vllms=SCHEMES)
    checks._lacks_avx512 = bool


def wrong(right):
    """As `right`, a function that returns a tensor or writes to its first argument, off by 1 in the first column."""

    def damaged(*args):
        result = right(*args)
        (args[0] if result is None else result)[..., 0] += 1
        return result

    return damaged
