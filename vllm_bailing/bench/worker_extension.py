"""What a measured engine is made of and what it took, asked in the processes that hold the model.

vLLM mixes `FactsExtension` into its workers where `worker_extension_cls` names it, and imports this file for that
before any weights are read. Only benchmarks do so: importing it puts a stopwatch around vLLM's loader.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_bailing.bench.runner import PACKAGE_PREFIX
from vllm_bailing.plugin.patches import time_model_loading
from vllm_bailing.units import dtype_name

EXTENSION = "vllm_bailing.bench.worker_extension.FactsExtension"
_load_seconds = time_model_loading()


class FactsExtension:
    """Methods for `LLM.collective_rpc`; their names must not be those of a worker's own."""

    vllm_config: Any
    model_runner: Any
    get_model: Any

    def bailing_facts(self) -> dict[str, Any]:
        """What runs in this worker, by names: model class, kernels, dtype, compilation, device."""
        model, config = self.get_model(), self.vllm_config
        compilation = config.compilation_config
        layers = compilation.static_forward_context.values()
        passes = vars(compilation.pass_config)
        return {
            "model": f"{type(model).__module__}.{type(model).__qualname__}",
            "experts": _words(_expert_kernels(model)),
            "attention": _words(layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")),
            "dtype": dtype_name(config.model_config.dtype),
            "quantization": config.model_config.quantization,
            "compilation": compilation.mode.name,
            "graphs": compilation.cudagraph_mode.name,
            "fusions": [name for name, value in passes.items() if value is True],
            "runner": type(self.model_runner).__module__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        }

    def bailing_costs(self) -> dict[str, float]:
        """Seconds of loading (reading, placing and packing weights), bytes of the KV cache, peak bytes on a GPU."""
        costs = {"load_s": _load_seconds(), "kv_bytes": _kv_cache_bytes(self.vllm_config)}
        return {**costs, "gpu_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else costs


def _words(names: Any) -> str:
    return ", ".join(sorted(set(names))) or "-"


def _expert_kernels(model: torch.nn.Module) -> list[str]:
    """Classes of the kernels of all expert layers, ours marked; where there are none, of their quantization methods."""
    names = []
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if kernel is not None:
            experts = type(kernel.fused_experts)
            prefix = PACKAGE_PREFIX if experts.__module__.startswith(PACKAGE_PREFIX) else ""
            names.append(prefix + experts.__name__)
        elif "MoE" in type(method).__name__:
            names.append(type(method).__name__)
    return names


def _kv_cache_bytes(config: Any) -> int:
    storages = {}
    for layer in config.compilation_config.static_forward_context.values():
        cache = getattr(layer, "kv_cache", None)
        for tensor in cache if isinstance(cache, (list, tuple)) else [cache]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
