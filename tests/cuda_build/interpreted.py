"""vLLM's Triton kernel of the experts, in Triton's interpreter on the CPU, against plain arithmetic in fp64.

A program of its own, since Triton decides while it is imported: prints {scheme: relative error} as JSON. Not in bf16,
which the interpreter of Triton 3.8 multiplies wrongly.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

EXPERTS, GROUPS, BEST_GROUPS, TOP_K = 16, 4, 2, 4
HIDDEN, WIDTH, TOKENS, BLOCK = 64, 32, 7, 32
ROWS = 16  # of a block of tokens that go to one expert
Scaled = tuple[torch.Tensor, torch.Tensor | None]


def aligned(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `moe_align_block_size`: places of tokens by expert, in whole blocks; the blocks' experts; how many places."""
    flat = ids.flatten().tolist()
    places, experts = [], []
    for expert in range(EXPERTS):
        mine = [place for place, one in enumerate(flat) if one == expert]
        mine += [len(flat)] * (-len(mine) % ROWS)
        places += mine
        experts += [expert] * (len(mine) // ROWS)
    return tuple(torch.tensor(one, dtype=torch.int32) for one in (places, experts, [len(places)]))  # pyright: ignore


def expected(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> Any:
    x, w13, w2, out = x.double(), w13.double(), w2.double(), torch.zeros_like(x, dtype=torch.float64)
    for token in range(len(x)):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            gate, up = (w13[expert] @ x[token]).chunk(2)
            out[token] += weight * (w2[expert] @ (F.silu(gate) * up))
    return out


def by_kernel(
    x: torch.Tensor,
    w13: Scaled,
    w2: Scaled,
    weights: torch.Tensor,
    ids: torch.Tensor,
    quantized: Callable[[torch.Tensor], Scaled],
    **scheme: Any,
) -> torch.Tensor:
    import triton.language as tl
    from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel

    places, experts, count = aligned(ids)
    tiles = {"BLOCK_SIZE_M": ROWS, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1, "SPLIT_K": 1}
    tiles |= {"num_warps": 4, "num_stages": 2}
    flags = dict.fromkeys(("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16"), False)
    flags |= {"per_channel_quant": False, "block_shape": None, **scheme}
    dtype = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[x.dtype]

    def multiply(a: Scaled, b: Scaled, out: torch.Tensor, top_k: int, is_weighted: bool) -> None:
        factors = weights if is_weighted else None
        invoke_fused_moe_triton_kernel(
            a[0], b[0], out, a[1], b[1], factors, places, experts, count, is_weighted, top_k, tiles,
            compute_type=dtype, **flags,
        )  # fmt: skip

    middle = torch.zeros(TOKENS, TOP_K, 2 * WIDTH, dtype=x.dtype)
    out = torch.zeros(TOKENS, TOP_K, HIDDEN, dtype=x.dtype)
    multiply(quantized(x), w13, middle, TOP_K, False)
    gate, up = middle.view(-1, 2 * WIDTH).chunk(2, dim=-1)
    multiply(quantized((F.silu(gate.float()) * up.float()).to(x.dtype)), w2, out, 1, True)
    return out.float().sum(1)


def int8(x: torch.Tensor) -> Scaled:
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale).round().to(torch.int8), scale


def fp8(x: torch.Tensor) -> Scaled:
    parts = x.float().unflatten(-1, (-1, BLOCK))
    scale = parts.abs().amax(-1, keepdim=True) / 448
    return (parts / scale).flatten(-2).to(torch.float8_e4m3fn), scale.squeeze(-1)


def fp8_blocks(weight: torch.Tensor) -> Scaled:
    experts, rows, columns = weight.shape
    parts = weight.view(experts, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = parts.abs().amax((2, 4), keepdim=True) / 448
    return (parts / scale).view_as(weight).to(torch.float8_e4m3fn), scale.squeeze(4).squeeze(2)


def main() -> None:
    from vllm.model_executor.layers.fused_moe.router import grouped_topk_router
    from vllm.platforms import current_platform

    from vllm_bailing.config import BailingMoeV2Config
    from vllm_bailing.reference_layers import BailingMoeV2Gate

    current_platform.import_kernels()
    torch.manual_seed(0)
    config = BailingMoeV2Config(
        hidden_size=HIDDEN, num_experts=EXPERTS, n_group=GROUPS, topk_group=BEST_GROUPS, num_experts_per_tok=TOP_K
    )
    rule = BailingMoeV2Gate(config)
    torch.nn.init.normal_(rule.weight, std=0.3)
    torch.nn.init.normal_(rule.expert_bias, std=0.1)
    x = torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        ids, weights, logits = rule(x)
    native = getattr(grouped_topk_router.grouped_topk, "_torchdynamo_orig_callable", grouped_topk_router.grouped_topk)
    grouped_topk_router.envs.VLLM_USE_FUSED_MOE_GROUPED_TOPK = False  # pyright: ignore
    factor = config.routed_scaling_factor
    weights_of, ids_of = native(x, logits, TOP_K, True, GROUPS, BEST_GROUPS, "sigmoid", factor, rule.expert_bias)
    by_expert = torch.zeros(TOKENS, EXPERTS).scatter(1, ids_of.long(), weights_of)
    errors = {"routing": float((by_expert - torch.zeros(TOKENS, EXPERTS).scatter(1, ids, weights)).abs().max())}

    w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) * HIDDEN**-0.5
    w2 = torch.randn(EXPERTS, HIDDEN, WIDTH) * WIDTH**-0.5
    half = x.bfloat16()
    right, right_half = (expected(one, w13, w2, weights, ids) for one in (x, half))
    runs = {
        "fp32": (right, by_kernel(x, (w13, None), (w2, None), weights, ids, lambda a: (a, None))),
        "int8": (
            right_half,
            by_kernel(half, int8(w13), int8(w2), weights, ids, int8, use_int8_w8a8=True, per_channel_quant=True),
        ),
        "fp8 blocks": (
            right_half,
            by_kernel(
                half, fp8_blocks(w13), fp8_blocks(w2), weights, ids, fp8, use_fp8_w8a8=True, block_shape=[BLOCK, BLOCK]
            ),
        ),
    }
    errors |= {name: float((got.double() - want).norm() / want.norm()) for name, (want, got) in runs.items()}
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
