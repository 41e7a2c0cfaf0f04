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


# Plans whose commands and files are looked at, by name.
COMMANDS = {
    "plain": {"name": "Ling-flash-2.0", "gpu": "H100", "gpus": 4, "context": 32768, "concurrency": 32},
    "everything": {
        "name": "Ling-flash-base-2.0",
        "gpu": "L40S",
        "gpus": 8,
        "context": 131072,
        "concurrency": 4,
        "dtype": "fp8",
        "kv_dtype": "fp8",
        "draft_tokens": 2,
        "memory_utilization": 0.9,
        "tp": 4,
        "pp": 2,
        "max_loras": 2,
        "max_lora_rank": 8,
        "lora_target_modules": ("query_key_value", "dense"),
    },
    "dequantized, draft of another": {
        "name": "Ling-1T-FP8",
        "gpu": "B200",
        "gpus": 32,
        "tp": 8,
        "pp": 4,
        "context": 65536,
        "concurrency": 4,
        "dtype": "fp16",
        "draft_tokens": 1,
        "draft_model": "a model's folder",
    },
}
# Plans of several commands; name: (of a plan, flags of all, flags of each command)
LAYOUTS = {
    "replicas on one node": (
        {"name": "Ling-flash-2.0", "gpu": "H200", "gpus": 4, "context": 32768, "concurrency": 5},
        {"tensor_parallel_size": 2, "data_parallel_size": 1, "enable_expert_parallel": False, "max_num_seqs": 3},
        [{"port": 8000, "headless": False}, {"port": 8001, "headless": False}],
    ),
    "a replica on each node": (
        {"name": "Ling-mini-2.0", "gpu": "H200", "gpus": 1, "nodes": 2, "context": 32768, "concurrency": 32},
        {"tensor_parallel_size": 1, "max_num_seqs": 16, "nnodes": 1},
        2 * [{"port": 8000, "headless": False}],
    ),
    "stages on two nodes": (
        {"name": "Ling-1T", "gpu": "H200", "gpus": 8, "nodes": 2, "context": 32768, "concurrency": 7},
        {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "nnodes": 2, "master_addr": "HOST0"},
        [{"node_rank": 0, "headless": False}, {"node_rank": 1, "headless": True}],
    ),
    "two replicas on four nodes": (
        {"name": "Ling-1T", "gpu": "H200", "gpus": 8, "nodes": 4, "context": 32768, "concurrency": 7},
        {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "nnodes": 2, "max_num_seqs": 4},
        [
            {"node_rank": 0, "master_addr": "HOST0", "headless": False},
            {"node_rank": 1, "master_addr": "HOST0", "headless": True},
            {"node_rank": 0, "master_addr": "HOST2", "headless": False},
            {"node_rank": 1, "master_addr": "HOST2", "headless": True},
        ],
    ),
    "data-parallel ranks on one node, with copies of experts": (
        {
            "name": "Ling-flash-2.0",
            "gpu": "H100",
            "gpus": 8,
            "context": 32768,
            "concurrency": 64,
            "dp": 2,
            "redundant_experts": 16,
        },
        {
            "tensor_parallel_size": 4,
            "data_parallel_size": 2,
            "enable_expert_parallel": True,
            "enable_eplb": True,
            "max_num_seqs": 32,
            "data_parallel_size_local": None,
        },
        [{"headless": False}],
    ),
    "data-parallel ranks on two nodes": (
        {
            "name": "Ling-flash-2.0",
            "gpu": "H100",
            "gpus": 8,
            "nodes": 2,
            "context": 32768,
            "concurrency": 64,
            "dp": 4,
            "tp": 4,
        },
        {
            "tensor_parallel_size": 4,
            "data_parallel_size": 4,
            "data_parallel_size_local": 2,
            "data_parallel_address": "HOST0",
            "max_num_seqs": 16,
            "nnodes": 1,
        },
        [
            {"data_parallel_start_rank": None, "headless": False},
            {"data_parallel_start_rank": 2, "headless": True},
        ],
    ),
}
# Layers of a model, and how stages share them.
PARTITIONS = [
    (80, (40, 40)),
    (32, (11, 11, 10)),
    (20, (7, 7, 6)),
    (21, (5, 5, 6, 5)),
    (22, (5, 6, 6, 5)),
    (7, (1, 1, 2, 2, 1)),
    (6, (6,)),
]
