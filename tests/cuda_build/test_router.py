"""The router as on a GPU, with real tensors on the CPU: what runs only where the platform is CUDA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch


def gate(hidden_size: int = 64, num_experts: int = 16) -> Any:
    """A gate in a bf16 model, as vLLM's loader leaves it before the weights come."""
    import vllm.distributed.parallel_state as state
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_bailing.router import BailingMoeV2Gate

    config = VllmConfig()
    context = set_current_vllm_config(config)
    context.__enter__()
    state._TP = SimpleNamespace(rank_in_group=0, world_size=1)  # pyright: ignore
    with set_default_torch_dtype(torch.bfloat16):
        made = BailingMoeV2Gate(SimpleNamespace(hidden_size=hidden_size, num_experts=num_experts), config, "gate")
    record_metadata_for_reloading(made)
    return made


def load(layer: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
    layer.load_weights([("weight", weight), ("expert_bias", bias)])


def reloaded(first: torch.Tensor, second: torch.Tensor) -> tuple[str, float, bool]:
    """Load `first`, then `second` by vLLM's reload: the dtype, the largest error, and whether the tensors stayed."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    layer, bias = gate(), torch.randn(16)
    load(layer, first, bias)
    before = layer.weight, layer.expert_bias
    initialize_layerwise_reload(layer)
    load(layer, second, bias + 1)
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.bfloat16))
    error = max((layer.weight.float() - second).abs().max(), (layer.expert_bias - (bias + 1)).abs().max())
    return str(layer.weight.dtype), float(error), before[0] is layer.weight and before[1] is layer.expert_bias


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, 64), torch.randn(16, 64).bfloat16().float()


CASES = {
    "fp32, then the same": lambda fine, exact: (fine, fine),
    "fp32, then others": lambda fine, exact: (fine, fine * 1.1),
    "fp32, then bf16": lambda fine, exact: (fine, exact),
    "bf16, then bf16": lambda fine, exact: (exact, exact * 2),
}


def _case(title: str) -> tuple[str, float, bool]:
    return reloaded(*CASES[title](*weights()))


@pytest.mark.parametrize("title", CASES)
def test_a_reload_keeps_the_router_exact_and_its_tensors_in_place(title, forked):
    dtype, error, stayed = forked(_case, title)
    assert dtype == ("torch.float32" if title.startswith("fp32") else "torch.bfloat16")
    assert error == 0 and stayed


def _refused() -> str:
    fine, exact = weights()
    try:
        reloaded(exact, fine)
    except Exception as error:
        return str(error)
    return ""


def test_weights_that_bf16_cannot_hold_are_not_rounded(forked):
    assert "bailing_fp32_router" in forked(_refused)


def _tiers(shape: tuple[int, int]) -> tuple[dict[str, bool], dict[str, bool]]:
    """Which kernels a gate may take that turned to fp32, and one that was built in it."""
    from vllm.model_executor.layers.fused_moe import GateLinear

    layer = gate(*shape)
    load(layer, torch.randn(shape[1], shape[0]), torch.zeros(shape[1]))
    built = GateLinear(*shape, out_dtype=torch.float32, params_dtype=torch.float32, prefix="other")
    return tuple(
        {name: value for name, value in vars(one).items() if name.startswith("allow_")} for one in (layer, built)
    )  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("shape", [(2048, 256), (4096, 256), (8192, 256)], ids=["mini", "flash", "1T"])
def test_a_router_that_turned_to_fp32_has_the_kernels_of_one_that_was_built_so(shape, forked):
    turned, built = forked(_tiers, shape)
    assert turned == built
    assert not turned["allow_cublas_router_gemm"]
