"""What vLLM's ModelConfig makes of keys that belong to other architectures: the same as without them.

All in one fork of a process that has imported vLLM. Which keys vLLM reads is observed there, not only listed.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.support.configs import FOREIGN_KEYS, published, write_config
from tests.support.engine import run
from vllm_bailing.config import KEYS

# What a stranger's config.json might say, with values that vLLM would follow.
PLANTED: dict[str, Any] = {
    "sliding_window": 64,
    "attention_chunk_size": 64,
    "dual_chunk_attention_config": {"chunk_size": 64},
    "attn_logit_softcapping": 30.0,
    "logit_scale": 0.5,
    "alibi": True,
    "attn_config": {"alibi": True},
    "position_encoding_type": "alibi",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "xdrope_section": [16, 24, 24],
    "seq_length": 512,
    "model_max_length": 512,
    "original_max_position_embeddings": 512,
    "num_kv_heads": 1,
    "hidden_size_per_head": 64,
    "kv_lora_rank": 512,
    "n_routed_experts": 8,
    "layers_block_type": ["mamba"] * 20,
    "block_configs": [{"block_type": "moe", "n_routed_experts": 8}],
    "index_topk": 64,
    "text_config": {"hidden_size": 64},
    "sub_configs": {"vision_config": 1},
    "vision_config": {"dtype": "float16"},
    "rswa_window": 64,
    "is_mm_prefix_lm": True,
    "canvas_length": 64,
    "embedding_size": 64,
    "speculators_config": {"verifier": {"name_or_path": "/nowhere"}},
    "temperature": 0.1,
}
REFUSED: dict[str, dict[str, Any]] = {
    "use_sliding_window": {"use_sliding_window": True, "sliding_window": 64},
    "is_causal": {"is_causal": False},
    "quant_method": {"quantization_config": {"quant_method": None}},
}
OVERRIDES: dict[str, Any] = {"sliding_window": 64, "model_max_length": 512, "text_config": {"hidden_size": 64}}
READ_BY_THE_CLASS = {"layer_types", "is_causal", "mrope_section", "compression_config"}  # refused, or another spelling
VALUES = [64, True, "x", [1, 2], {"a": 1}]


def views(model: str, **options: Any) -> dict[str, str]:
    """Everything that vLLM's ModelConfig says of a model, by name."""
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=model, skip_tokenizer_init=True, dtype="float32", **options).create_model_config()
    seen: dict[str, Any] = {f"hf_config.{key}": value for key, value in config.hf_config.to_dict().items()}
    seen["is its own text config"] = config.hf_text_config is config.hf_config
    fields = "max_model_len attention_chunk_size runner_type convert_type quantization model_arch_config encoder_config"
    for name in [*fields.split(), *dir(ModelConfig)]:
        if name.startswith("_") or not (name in fields or name.startswith("get_") or _is_property(ModelConfig, name)):
            continue
        try:
            value = getattr(config, name)
            seen[name] = value() if callable(value) else value
        except Exception as error:  # needs arguments, or a model of another kind
            seen[name] = type(error).__name__
    return {name: str(value).replace(model, "MODEL") for name, value in seen.items()}


def _is_property(owner: type, name: str) -> bool:
    return isinstance(getattr(owner, name, None), (property, functools.cached_property))


def difference(model: str, plain: dict[str, str], **options: Any) -> str:
    """What vLLM sees otherwise than in `plain`, or the error that it ends in."""
    try:
        found = views(model, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    names = sorted(plain.keys() | found.keys())
    return "; ".join(
        f"{key}: {plain.get(key)} -> {found.get(key)}" for key in names if plain.get(key) != found.get(key)
    )


def table(folder: str) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """For each planted case what changes, the keys that vLLM reads, and its view of the plain file."""
    from pathlib import Path

    from vllm_bailing.config import BailingMoeV2Config, register_with_transformers

    register_with_transformers()
    root, raw, read = Path(folder), published("Ling-mini-2.0"), set()
    plain_model = str(write_config(root / "plain", raw))
    original = BailingMoeV2Config.__getattribute__

    def recording(self: Any, name: str) -> Any:
        read.add(name)
        return original(self, name)

    BailingMoeV2Config.__getattribute__ = recording  # type: ignore[method-assign]
    plain = views(plain_model)
    BailingMoeV2Config.__getattribute__ = original  # type: ignore[method-assign]
    foreign = {name for name in read if not name.startswith("_") and not hasattr(BailingMoeV2Config, name)} - KEYS
    found = {}
    for name, planted in {"planted": PLANTED, **REFUSED}.items():
        found[name] = difference(str(write_config(root / name, {**raw, **planted})), plain)
    for value in VALUES:  # of every key that vLLM reads and the architecture does not have
        planted = dict.fromkeys(sorted(foreign - READ_BY_THE_CLASS | set(FOREIGN_KEYS)), value)
        found[f"all with {value!r}"] = difference(str(write_config(root / f"all-{value}", {**raw, **planted})), plain)
    for name, value in OVERRIDES.items():
        found[f"override of {name}"] = difference(plain_model, plain, hf_overrides={name: value})
    return found, sorted(foreign), plain


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return run(table, str(tmp_path_factory.mktemp("planted")))


@pytest.mark.parametrize("case", ["planted", *(f"all with {value!r}" for value in VALUES)])
def test_vllm_sees_the_same_model_with_keys_of_other_architectures(case, seen):
    assert seen[0][case] == ""


@pytest.mark.parametrize("case", REFUSED)
def test_a_key_that_would_make_another_model_is_refused(case, seen):
    assert case in seen[0][case]
    assert "Error" in seen[0][case]
    assert seen[0][case].count("\n") <= 3  # pydantic puts a line before and two after


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_of_another_architecture_is_refused(name, seen):
    assert f"{name}=" in seen[0][f"override of {name}"]
    assert "is not a key of BailingMoeV2" in seen[0][f"override of {name}"]


def test_the_views_are_those_of_this_model(seen):
    _, foreign, plain = seen
    assert {"sliding_window", "attention_chunk_size", "model_max_length"} <= set(foreign)
    expected = {
        "max_model_len": "32768",
        "get_sliding_window": "None",
        "attention_chunk_size": "None",
        "get_head_size": "128",
        "get_total_num_kv_heads": "4",
        "get_num_experts": "256",
        "attn_type": "decoder",
        "is_hybrid": "False",
        "uses_mrope": "False",
    }
    assert {name: plain[name] for name in expected} == expected
