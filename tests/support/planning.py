"""Shapes and keys that tests of the planner share."""

from __future__ import annotations

from vllm_bailing.planning.plan import Plan, make_plan
from vllm_bailing.planning.request import Request

GB = 10**9
MTP = {"num_nextn_predict_layers": 1}
MIDDLE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 2,
    "vocab_size": 1000,  # no multiple of 64
    "eos_token_id": 0,
    "pad_token_id": 0,
    "num_nextn_predict_layers": 1,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def plan(config, gpu, gpus, context, concurrency, **options) -> Plan:
    """The plan for a request of these values."""
    return make_plan(config, Request(gpu, gpus, context, concurrency, **options))
