"""Which kernel every kind of layer gets, and that a forward pass fits together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from tests.cuda_build import fakes
from tests.cuda_build.deployments import BUILT, DP2, FLASH
from tests.cuda_build.records import record, recorded
from tests.support.paths import DATA

TABLE = DATA / "cuda_build.json"
# Where what stands in for a GPU ends: vLLM reads values there, or compiles. The kernels were chosen before.
FAKES_END = {
    "flash, fp8 blocks, TP 2": "DeepGEMM packs the scales",
    "flash, fp8 channels, TP 2": "scales are read while weights are processed",
    "flash, int8, TP 2": "scales are read while weights are processed",
    "flash, W4A16, TP 2": "weights are packed again by type",
}


# Enough for a GPU that chooses as another one does.
FEW = ("mini, 1 GPU", "flash, online fp8, TP 4", *FAKES_END)


def _name(thing: Any) -> str:
    return type(thing).__name__


def _experts(layer: Any) -> str:
    method = vars(layer.quant_method)
    chosen = (value.name for key, value in method.items() if key.endswith("_backend") and hasattr(value, "name"))
    takes_adapters = "LoRA" in getattr(method.get("experts_cls"), "__name__", "")  # another kernel of the same name
    return next(chosen, _name(layer.quant_method)) + " for adapters" * takes_adapters


def _linear(layer: Any) -> str:
    scheme = getattr(layer, "scheme", None)
    for holder in (scheme, layer.quant_method):
        for attribute in ("kernel", "fp8_linear", "w8a8_block_fp8_linear"):
            if getattr(holder, attribute, None) is not None:
                return _name(getattr(holder, attribute))
    return _name(scheme or layer.quant_method)


def kernels(model: Any) -> dict[str, str]:
    """{kind of layer: kernel}."""
    found: dict[str, str] = {}
    for path, layer in model.named_modules():
        leaf = path.rpartition(".")[2]
        if leaf == "attn":
            found["attention"] = _name(layer.impl).removesuffix("Impl")
        elif leaf == "gate":
            allowed = [key.removeprefix("allow_") for key, on in vars(layer).items() if key.startswith("allow_") and on]
            kernels = sorted(set(allowed) - {"specialized_router_gemm"})  # says that some of the others may be
            found["router"] = " ".join([str(layer.weight.dtype).removeprefix("torch."), *kernels])
        elif leaf == "routed_experts":
            found["experts"] = _experts(layer)
        elif leaf == "query_key_value":
            found["linear"] = _linear(getattr(layer, "base_layer", layer))
        elif leaf == "attention":
            found["norms and rotation"] = "one kernel" if layer.fused_qk_norm_rope else "separate"
    return found


def _built(runs: bool, name: str, changes: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, str], Any]:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    config = fakes.engine_config(name, changes, enforce_eager=True, distributed_executor_backend="mp", **options)
    with fakes.on_gpus(config, is_processed=runs) as built:
        found = kernels(built.model)
        if not runs:
            return found, None
        hidden = fakes.forward(built)
        return found, tuple(getattr(hidden, "shape", ())) or {
            name: tuple(one.shape) for name, one in hidden.tensors.items()
        }


def _skips_padding() -> bool:
    config = fakes.engine_config(
        FLASH, enforce_eager=True, distributed_executor_backend="mp", all2all_backend="deepep_v2", **DP2
    )
    fused_moe = "vllm.model_executor.layers.fused_moe.all2all_utils"
    stand_in = SimpleNamespace(maybe_roundup_layer_hidden_size=lambda size, *_, **__: size)  # of a package with kernels
    with (
        mock.patch(f"{fused_moe}.DeepEPV2PrepareAndFinalize", stand_in, create=True),
        fakes.on_gpus(config, is_processed=False) as built,
    ):
        return built.model.model.layers[-1].mlp.experts.router.skip_padding


def test_rows_that_fill_a_cuda_graph_stay_on_their_rank(vllm_version, gpu, forked):
    if gpu not in ("H100", "B200") or vllm_version < "0.33":
        pytest.skip("vLLM has it from 0.33 on, for GPUs with DeepEP")
    assert forked(_skips_padding)


@pytest.mark.parametrize("title", BUILT)
def test_every_layer_gets_the_kernel_of_the_table(
    title, gpu: str, vllm_version: str, forked: Callable[..., Any], pytestconfig
):
    if gpu not in ("H100", "B200") and title not in FEW:
        pytest.skip("shown for H100 and B200")
    name, changes, options = BUILT[title]
    runs = title not in FAKES_END
    found, shape = forked(_built, runs, name, changes, options)
    if runs:
        wanted = (fakes.TOKENS, json.loads((fakes.CONFIGS / f"{name}.json").read_text())["hidden_size"])
        assert shape == (dict.fromkeys(("hidden_states", "residual"), wanted) if "PP" in title else wanted)
    if pytestconfig.getoption("--write-kernels"):
        record(TABLE, vllm_version, gpu, title, found)
    in_table = recorded(TABLE, vllm_version, gpu).get(title)
    assert found == in_table, "other kernels than recorded; if that is right, add --write-kernels"
