"""Deployments of published checkpoints, as flags of vLLM."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from tests.support.configs import CONFIGS

_W4A16 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False}


def _compressed(layout: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, **({"input_activations": activations} if activations else {})}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": group},
        }
    }


def _eight_bits(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    shared = {"num_bits": 8, "type": kind, "symmetric": True}
    return {**shared, "strategy": "channel", "dynamic": False}, {**shared, "strategy": "token", "dynamic": True}


W4A16 = _compressed("pack-quantized", _W4A16)
FP8_CHANNEL = _compressed("float-quantized", *_eight_bits("float"))
INT8 = _compressed("int-quantized", *_eight_bits("int"))

MINI, MINI_BASE, FLASH, TRILLION = "Ling-mini-2.0", "Ling-mini-base-2.0", "Ling-flash-2.0", "Ling-1T"
FP8_BLOCK = "Ling-flash-2.0-fp8-block"
FP8_BLOCKS = {"quantization_config": json.loads((CONFIGS / f"{FP8_BLOCK}.json").read_text())["quantization_config"]}
TP2, TP4, TP8 = ({"tensor_parallel_size": ranks} for ranks in (2, 4, 8))
EP = {"enable_expert_parallel": True}
DP2 = {**TP2, "data_parallel_size": 2, **EP}
LORA = {"enable_lora": True, "max_lora_rank": 16}
FP32_ROUTER = {"additional_config": {"bailing_fp32_router": True}}
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}


def mtp(tokens: int, **more: Any) -> dict[str, Any]:
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": tokens, **more}}


# Of which the model is built: (checkpoint, changes to its config.json, options).
BUILT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mini, 1 GPU": (MINI, {}, {}),
    "flash, TP 4": (FLASH, {}, TP4),
    "flash, TP 4, fp16": (FLASH, {}, {**TP4, "dtype": "float16"}),
    "flash, TP 4, fp8 KV cache": (FLASH, {}, {**TP4, "kv_cache_dtype": "fp8"}),
    "flash, TP 4, fp32 router": (FLASH, {}, {**TP4, **FP32_ROUTER}),
    "flash, TP 4, adapters without experts": (FLASH, {}, {**TP4, **LORA}),
    "flash, TP 4, adapters with experts": (
        FLASH,
        {},
        {**TP4, **LORA, "lora_target_modules": ["query_key_value", "dense", "experts"]},
    ),
    "flash, TP 2 x PP 2": (FLASH, {"num_hidden_layers": 4}, {**TP2, "pipeline_parallel_size": 2}),
    "flash, online fp8, TP 4": (FLASH, {}, {**TP4, "quantization": "fp8"}),
    "flash, fp8 blocks, TP 2": (FP8_BLOCK, {}, TP2),
    "flash, fp8 channels, TP 2": (FLASH, FP8_CHANNEL, TP2),
    "flash, int8, TP 2": (FLASH, INT8, TP2),
    "flash, W4A16, TP 2": (FLASH, W4A16, TP2),
    "flash, EP 4": (FLASH, {}, {**TP4, **EP}),
    "1T, TP 8": (TRILLION, {"num_hidden_layers": 5}, TP8),
    "1T, TP 8, fp32 router": (TRILLION, {"num_hidden_layers": 5}, {**TP8, **FP32_ROUTER}),
}

# Of which the whole configuration is made: these, and
CONFIGURED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "flash, DP 2 x TP 2 + EP": (FLASH, {}, DP2),
    "flash, DeepEP": (FLASH, {}, {**DP2, "all2all_backend": "deepep_low_latency"}),
    "flash, DeepEP, two batches": (FLASH, {}, {**DP2, "all2all_backend": "deepep_low_latency", "enable_dbo": True}),
    "flash, EPLB": (FLASH, {}, {**TP4, **EP, "enable_eplb": True}),
    "mini, MTP 1": (MINI_BASE, {}, mtp(1)),
    "mini, MTP 2": (MINI_BASE, {}, mtp(2)),
    "mini, MTP 3": (MINI_BASE, {}, mtp(3)),
    "mini, MTP 3, TP 2": (MINI_BASE, {}, {**mtp(3), **TP2}),
    "mini, MTP 3, PP 2": (MINI_BASE, {"num_hidden_layers": 4}, {**mtp(3), "pipeline_parallel_size": 2}),
    "mini, MTP 3, adapters": (MINI_BASE, {}, {**mtp(3), **LORA}),
    "flash, YaRN by hf_overrides": (FLASH, {}, {**TP4, "hf_overrides": YARN, "max_model_len": 131072}),
    "flash, YaRN by config.json": ("Ring-flash-2.0-yarn", {}, TP4),
    "flash, eager": (FLASH, {}, {**TP4, "enforce_eager": True}),
    "flash, O3": (FLASH, {}, {**TP4, "optimization_level": 3}),
    "flash, sleep": (FLASH, {}, {**TP4, "enable_sleep_mode": True}),
    "flash, TP 4, batch-sharded sampling": (FLASH, {}, {**TP4, "enable_batch_sharded_sampling": True}),
    "Ring-1T, TP 8": ("Ring-1T", {"num_hidden_layers": 5}, TP8),
    "AntAngelMed, TP 4": ("AntAngelMed", {}, TP4),
}
if tuple(map(int, version("vllm").split(".")[:2])) >= (0, 33):
    CONFIGURED["mini, MTP 1, fp8 head"] = (MINI_BASE, {}, mtp(1, draft_lm_head_quantization="fp8"))
