"""The compiled operations that our path calls, in the real libraries."""

from __future__ import annotations

import pytest

# {operation: the arguments that we, or vLLM's layers for us, pass}
OPERATIONS = {
    "_C::fused_qk_norm_rope": "qkv num_heads_q num_heads_k num_heads_v head_dim eps q_weight k_weight cos_sin_cache "
    "is_neox position_ids",
    "_C::fused_add_rms_norm": "input residual weight epsilon",
    "_C::rms_norm": "result input weight epsilon",
    "_C::rotary_embedding": "positions query key head_size cos_sin_cache is_neox",
    "_moe_C::grouped_topk": "scores n_group topk_group topk renormalize routed_scaling_factor bias scoring_func",
    "_moe_C::moe_align_block_size": "",
    "_moe_C::moe_sum": "",
}


def _schemas() -> dict[str, list[str] | None]:
    """{operation: names of its arguments, None if it is gone or has no kernel for GPUs}."""
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    found: dict[str, list[str] | None] = {}
    for name in OPERATIONS:
        space, _, operation = name.partition("::")
        if not hasattr(getattr(torch.ops, space), operation):
            found[name] = None
            continue
        overload = getattr(getattr(torch.ops, space), operation).default
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        found[name] = [argument.name for argument in overload._schema.arguments] if has_kernel else None
    return found


@pytest.fixture(scope="module")
def schemas(forked):
    return forked(_schemas)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_there_and_takes_what_is_passed(name, schemas):
    taken = schemas[name]
    assert taken is not None, "gone, or without a kernel for GPUs"
    assert set(OPERATIONS[name].split()) <= set(taken)


def _head_order() -> list[str]:
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return [argument.name for argument in torch.ops._C.fused_qk_norm_rope.default._schema.arguments]


def test_the_fused_kernel_takes_its_arguments_in_our_order(forked):
    """`BailingMoeV2Attention._in_one_kernel` passes them by position."""
    wanted = OPERATIONS["_C::fused_qk_norm_rope"].split()
    assert forked(_head_order)[: len(wanted)] == wanted
