"""Other models through the engine, with and without the plugin."""

from pathlib import Path

import pytest

from tests.support.configs import write_config
from tests.support.engine import EngineError, generate, make_llm, run
from tests.support.registration import load_plugins

# ---- other models through the engine --------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
FIRST_GENERATION = {
    **SMALL,
    "architectures": ["BailingMoeForCausalLM"],
    "model_type": "bailing_moe",
    "auto_map": {"AutoConfig": "configuration_bailing_moe.BailingMoeConfig"},
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "norm_head": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
}
OTHERS = {
    "first generation": (FIRST_GENERATION, {"trust_remote_code": True}),
    "Qwen3": ({**SMALL, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, {}),
}
CONFIGURATION = """
from transformers import PretrainedConfig


class BailingMoeConfig(PretrainedConfig):
    model_type = "bailing_moe"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
"""


def other_model(folder: Path, contents: dict) -> Path:
    model = write_config(folder / "model", contents)
    (model / "configuration_bailing_moe.py").write_text(CONFIGURATION)
    return model


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_generates_the_same_tokens_with_and_without_the_plugin(name, tmp_path):
    contents, options = OTHERS[name]
    model = other_model(tmp_path, contents)
    answers = [
        run(
            generate,
            model,
            [[1, 2, 3, 4, 5], [9, 8, 7]],
            load_format="dummy",
            env={"VLLM_PLUGINS": plugins, "HF_MODULES_CACHE": str(tmp_path / "modules")},
            **options,
        )
        for plugins in ("bailing", "")
    ]
    for (logprobs, token_ids), (wanted_logprobs, wanted_ids) in zip(*answers, strict=True):
        assert token_ids == wanted_ids
        assert logprobs.equal(wanted_logprobs)
        assert logprobs.std() > 0


def test_first_generation_code_still_needs_the_trust_flag(tmp_path):
    model = other_model(tmp_path, FIRST_GENERATION)
    messages = []
    for plugins in ("bailing", ""):
        with pytest.raises(EngineError) as caught:
            run(make_llm, model, load_format="dummy", env={"VLLM_PLUGINS": plugins})
        messages.append(caught.value.message)
    assert "trust" in messages[0]
    assert messages[0] == messages[1]


# ---- MTP drafts of other models --------------------------------------------------------------------------------------

OTHERS_WITH_MTP = {
    "deepseek_v3": {"architectures": ["DeepseekV3ForCausalLM"], "num_nextn_predict_layers": 1},
    "glm4_moe": {"architectures": ["Glm4MoeForCausalLM"], "num_nextn_predict_layers": 1},
    "bailing_hybrid": {"architectures": ["BailingMoeV2_5ForCausalLM"], "num_nextn_predict_layers": 1},
    "bailing_hybrid_v3": {"architectures": ["BailingMoeV3ForCausalLM"], "num_nextn_predict_layers": 1},
    "bailing_moe": {"architectures": ["BailingMoeForCausalLM"], "num_nextn_predict_layers": 1},
    "ernie4_5_moe": {"architectures": ["Ernie4_5_MoeForCausalLM"], "num_nextn_predict_layers": 1},
    "qwen3_next": {"architectures": ["Qwen3NextForCausalLM"], "num_nextn_predict_layers": 1},
}


def drafts_of_others(plugins: str | None, folder: str) -> dict:
    """What vLLM makes of other models' configurations when they are to be their own drafts."""
    from transformers import PretrainedConfig
    from vllm import EngineArgs
    from vllm.config import SpeculativeConfig

    load_plugins(plugins)
    found: dict = {}
    for model_type, keys in OTHERS_WITH_MTP.items():
        config = PretrainedConfig(num_hidden_layers=2, vocab_size=64, **keys)
        config.model_type = model_type
        found[model_type] = SpeculativeConfig.hf_config_override(config).to_dict()
    engine = EngineArgs(
        folder, skip_tokenizer_init=True, speculative_config={"method": "mtp", "num_speculative_tokens": 2}
    ).create_engine_config()
    assert engine.speculative_config is not None
    draft = engine.speculative_config.draft_model_config
    found["engine"] = [engine.speculative_config.method, draft.architectures, draft.hf_config.to_dict()]
    return found


def test_mtp_drafts_of_other_models_are_made_as_without_the_plugin(tmp_path):
    glm = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "num_nextn_predict_layers": 1,
        "vocab_size": 64,
        "max_position_embeddings": 512,
    }
    folder = str(write_config(tmp_path, glm))
    without, with_plugin = run(drafts_of_others, "", folder), run(drafts_of_others, "bailing", folder)
    assert without == with_plugin
    assert with_plugin["engine"][1] == ["Glm4MoeMTPModel"]
    assert with_plugin["bailing_hybrid"]["architectures"] == ["BailingMoeV25MTPModel"]
