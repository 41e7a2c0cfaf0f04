"""Published config.json files, and values that might stand in one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.support.paths import DATA
from vllm_bailing.config import BailingMoeV2Config, adopt

CONFIGS = DATA / "configs"
CARD = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}  # as the model card writes it
SPELLINGS = {
    "type": CARD,
    "rope_type": {"factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn"},
    "both": {**CARD, "rope_type": "yarn"},
}


# Keys of other architectures, each of which some version of vLLM or transformers reads from a configuration.
FOREIGN_KEYS = """
    sliding_window attention_chunk_size attn_logit_softcapping final_logit_softcapping logit_scale logits_scaling
    alibi attn_config position_embedding_type position_encoding_type xdrope_section
    rotary_pct rotary_emb_fraction rotary_emb_base rope_dim kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim
    v_head_dim compress_ratios hidden_size_per_head n_head_kv num_kv_heads multi_query_group_num num_attention_groups
    multi_query n_positions max_seq_len seq_length model_max_length max_target_positions max_sequence_length
    max_seq_length seq_len moe_num_experts n_routed_experts num_local_experts num_experts_per_token top_k_experts
    moe_topk moe_top_k block_configs layers_block_type attn_type_list mamba_chunk_size chunk_size index_topk
    dual_chunk_attention_config text_config text_encoder decoder generator llm_config thinker_config vision_config
    encoder_config speculators_config eagle_config dflash_config rswa_window is_mm_prefix_lm canvas_length
    embedding_size projection_dim projection_size engram_layer_ids is_original_qwen3_reranker task_instructions
    sub_configs eagle_aux_hidden_state_layer_ids mask_token_id num_lookahead_tokens temperature top_p max_length
    do_sample tie_last_hidden_states my_own_note
""".split()


def raw_config_of(folder: Path) -> dict[str, Any]:
    """What config.json says."""
    return json.loads((folder / "config.json").read_text())


def write_config(folder: Path, raw: dict[str, Any]) -> Path:
    """Write a config.json, and the folder for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def change_config(folder: Path, **keys: Any) -> None:
    """Change keys of config.json."""
    write_config(folder, {**raw_config_of(folder), **keys})


def published(name: str, **changes) -> dict:
    return {**json.loads((CONFIGS / f"{name}.json").read_text()), **changes}


def built(contents: dict) -> BailingMoeV2Config:
    return BailingMoeV2Config(**adopt(contents))


YARN = {"type": "yarn", "factor": 4.0}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.sampled_from([32768, 131072, 10**400]),
    st.floats(),
    st.sampled_from(["", "4", "yarn", "default", "linear", "sigmoid", "silu", "bfloat16", "a\nb"]),
)
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.text(max_size=3), SCALARS, max_size=2))
ROPE_KEYS = (
    "type rope_type factor original_max_position_embeddings rope_theta partial_rotary_factor attention_factor "
    "beta_fast beta_slow mscale truncate other"
).split()
ROPES = st.one_of(
    VALUES,
    st.dictionaries(st.sampled_from(ROPE_KEYS), SCALARS, max_size=4),
    st.dictionaries(st.sampled_from(ROPE_KEYS), SCALARS, max_size=4).map(lambda rope: {**rope, **YARN}),
)
