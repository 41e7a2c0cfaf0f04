"""Which implementation of the experts vLLM chooses: its Triton kernel alone reads tables."""

from __future__ import annotations

from dataclasses import replace

from vllm_bailing.planning.gpus import gpu_called
from vllm_bailing.tuning.space import Experts

READERS = ("TRITON", "BATCHED_TRITON")  # of tables, as vLLM names its backends
AUTO = "auto"


def chosen_backend(experts: Experts, device_name: str | None, moe_backend: str = AUTO) -> str | None:
    """The name of the backend that vLLM chooses for these experts, such as "FLASHINFER_TRTLLM".

    Args:
        device_name: A GPU that need not be here; this machine's if left out.
        moe_backend: As vLLM's flag `--moe-backend`.
    Returns:
        None if this vLLM cannot tell: it is no CUDA build, or the GPU is not a known one.
    Raises:
        ValueError: From vLLM, if it has no such backend for these experts.
    """
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import (
        FusedMoEConfig,
        FusedMoEParallelConfig,
        RoutingMethodType,
    )
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import select_fp8_moe_backend
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym
    from vllm.platforms import current_platform

    from vllm_bailing.plugin.patches import pretend_device

    capability = None
    if device_name is not None:
        gpu = gpu_called(device_name)
        capability = gpu and gpu.compute_capability
        if capability is None:
            return None
    if not current_platform.is_cuda():
        return None
    parallel = replace(FusedMoEParallelConfig.make_no_parallel(), ep_size=experts.ep_size, use_ep=experts.ep_size > 1)
    config = FusedMoEConfig(
        num_experts=experts.global_num_experts,
        experts_per_token=experts.top_k,
        hidden_dim=experts.hidden_size,
        intermediate_size=experts.intermediate_size,  # already one rank's
        num_local_experts=experts.num_experts,
        num_logical_experts=experts.global_num_experts,
        activation=MoEActivation.SILU,
        device="cuda",
        routing_method=RoutingMethodType.DeepSeekV3,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        moe_backend=moe_backend,  # pyright: ignore[reportArgumentType]
    )
    with set_current_vllm_config(VllmConfig()), pretend_device(device_name, capability):
        if experts.block_shape is None:
            return select_unquantized_moe_backend(config)[0].name
        return select_fp8_moe_backend(config, kFp8Static128BlockSym, kFp8Dynamic128Sym)[0].name
