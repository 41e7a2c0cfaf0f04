"""The switches of config.json, a row each.

With each, tests/engine/test_reference.py compares vLLM's layers with the plain model. A new switch gets a row here; a
value that is refused gets one in `MISTAKES` of tests/unit/test_config.py.
"""

from typing import Any

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "no_qk_norm": {"use_qk_norm": False},
    "one_key_value_head": {"num_key_value_heads": 1},
    "two_shared_experts": {"num_shared_experts": 2},
    "narrow_heads": {"head_dim": 16},
    "one_expert_per_token": {"num_experts_per_tok": 1},
    "no_groups": {"n_group": None, "topk_group": None},
    "no_shared_expert": {"num_shared_experts": 0},
    "three_shared_experts": {"num_shared_experts": 3},
    "wider_shared_expert": {"moe_shared_expert_intermediate_size": 64},
    "no_dense_layer": {"first_k_dense_replace": 0},
    "only_dense_layers": {"first_k_dense_replace": 3},
    "no_expert_bias": {"moe_router_enable_expert_bias": False},
    "scaling_factor_1": {"routed_scaling_factor": 1.0},
    "one_key_value_head_per_head": {"num_key_value_heads": 4},
    "rotary_dim_only": {"partial_rotary_factor": None, "rotary_dim": 8},
    "linear_rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn_with_all_keys": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16,
            "beta_slow": 2,
            "attention_factor": 1.3,
        },
        "max_position_embeddings": 64,
    },
    "theta_10000": {"rope_theta": 10000},
    "only_qkv_bias": {"use_qkv_bias": True},
    "only_dense_bias": {"use_bias": True},
    "norm_head": {"norm_head": True},
    "two_mtp_layers": {"num_nextn_predict_layers": 2},
}
# Those that no recorded case has and every kernel takes.
_LEFT_OUT = ("plain", "tied", "no_qk_norm", "two_shared_experts", "narrow_heads")
VARIANTS = [name for name in SWITCHES if name not in _LEFT_OUT]


def switched(*names: str) -> dict[str, Any]:
    """Changes of config.json that several switches make together."""
    return {key: value for name in names for key, value in SWITCHES[name].items()}
