"""What each key of config.json may do: nothing, or what the official code does with it; else one clear line.

`official` says once more, apart from the package, what the official code makes of a config.json.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, GenerationConfig

from tests.support.configs import CARD, CONFIGS, FOREIGN_KEYS, VALUES, YARN, built, published, write_config
from vllm_bailing import config as config_module
from vllm_bailing.config import BailingMoeV2Config, adopt, read_config
from vllm_bailing.errors import SettingsError
from vllm_bailing.plugin.checks import check_stop_tokens

pytestmark = pytest.mark.usefixtures("registered")

NAMES = sorted(path.stem for path in CONFIGS.glob("*.json"))
OFFICIAL_DEFAULTS = {
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "norm_head": False,
    "tie_word_embeddings": False,
    "moe_router_enable_expert_bias": True,
}


# ---- the official rules ---------------------------------------------------------------------------------------------


def wavelengths(rope: dict[str, Any], theta: float, width: int, window: int) -> tuple[list[float], float, int]:
    """Frequencies of the rotary channels, the factor of cosines and sines, and the tokens that are served."""
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return plain, 1.0, window
    factor = rope["factor"]
    if kind == "linear":
        return [one / factor for one in plain], 1.0, window
    original = rope.get("original_max_position_embeddings") or window

    def channel(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
    if rope.get("truncate", True) is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if high == low else 0
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(width // 2)]
    mixed = [one / factor * share + one * (1 - share) for one, share in zip(plain, ramp, strict=True)]

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    scale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    default = magnitude(scale) / magnitude(all_dim) if scale and all_dim else magnitude(1)
    return mixed, rope.get("attention_factor") or default, round(factor * original)


def official(raw: dict[str, Any]) -> dict[str, Any]:
    """What the official code makes of a config.json, with the rotary width of `rotary_dim` besides."""

    def of(key: str, default: Any) -> Any:
        return default if raw.get(key) is None else raw[key]

    heads, hidden = of("num_attention_heads", 16), of("hidden_size", 2048)
    key_value_heads = of("num_key_value_heads", heads if "num_key_value_heads" in raw else 4)
    head_dim = of("head_dim", hidden // heads)
    rope = {
        key: value
        for name in ("rope_parameters", "rope_scaling")
        for key, value in (raw.get(name) or {}).items()
        if value is not None
    }
    rope.setdefault("original_max_position_embeddings", raw.get("original_max_position_embeddings"))
    share = of("partial_rotary_factor", rope.get("partial_rotary_factor"))
    width = of("rotary_dim", head_dim) if share is None else math.floor(head_dim * share)
    theta = of("rope_theta", rope.get("rope_theta", 600000))
    layers, dense = of("num_hidden_layers", 20), of("first_k_dense_replace", 1)
    shared, one = of("num_shared_experts", 0 if "num_shared_experts" in raw else 1), of("moe_intermediate_size", 512)
    stated = of("moe_shared_expert_intermediate_size", one)
    groups = of("n_group", 1 if "n_group" in raw else 8)
    frequencies, magnitude, window = wavelengths(rope, theta, width, of("max_position_embeddings", 32768))
    return {
        "vocabulary": of("vocab_size", 157184),
        "sizes": (hidden, of("intermediate_size", 5120), heads, key_value_heads, head_dim, one),
        "layers": (list(range(dense, layers)), list(range(layers, layers + of("num_nextn_predict_layers", 0)))),
        "experts": (of("num_experts", 256), of("num_experts_per_tok", 8), groups),
        "groups": of("topk_group", groups if "topk_group" in raw else 4),
        "scaling": of("routed_scaling_factor", 1.0),
        "shared": stated if stated == one * shared else stated * shared,
        "eps": of("rms_norm_eps", 1e-6),
        "switches": {key: of(key, default) for key, default in OFFICIAL_DEFAULTS.items()},
        "stops": raw.get("eos_token_id"),
        "rope": (width, frequencies, magnitude, window),
    }


def computed(config: BailingMoeV2Config) -> dict[str, Any]:
    """The same of a configuration of this package."""
    rope, window = dict(config.rope_parameters), config.max_position_embeddings
    width = int(config.head_dim * rope["partial_rotary_factor"])
    assert width == config.rotary_dim
    assert rope["rope_theta"] == config.rope_theta
    frequencies, magnitude, served = wavelengths(rope, rope["rope_theta"], width, window)
    assert served == window
    heads = config.num_attention_heads, config.num_key_value_heads
    return {
        "vocabulary": config.vocab_size,
        "sizes": (
            config.hidden_size,
            config.intermediate_size,
            *heads,
            config.head_dim,
            config.moe_intermediate_size,
        ),
        "layers": (config.moe_layer_ids, config.mtp_layer_ids),
        "experts": (config.num_experts, config.num_experts_per_tok, config.n_group),
        "groups": config.topk_group,
        "scaling": config.routed_scaling_factor,
        "shared": config.shared_expert_intermediate_size,
        "eps": config.rms_norm_eps,
        "switches": {key: getattr(config, key) for key in OFFICIAL_DEFAULTS},
        "stops": config.eos_token_id,
        "rope": (width, frequencies, magnitude, window),
    }


# ---- random changes of the published files --------------------------------------------------------------------------

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 156892, 157184, 10**9, 0.5, 1.0, 2.5, 1e-30, 1e300, -1]
)
SCALES = st.sampled_from([0, 0.5, 0.707, 1, 1.0, 2, 4.0, 32, 40, 4000, 32768, 131072, None, True, "4"])
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["yarn", "linear", "default", "ntk", None]),
        "rope_type": st.sampled_from(["yarn", "yarn", "linear", "default"]),
        **dict.fromkeys(
            "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
            "attn_factor extrapolation_factor rope_theta partial_rotary_factor".split(),
            SCALES,
        ),
        "truncate": st.sampled_from([True, False, None, "no"]),
    },
)
READ_BY_US = sorted({*json.loads((CONFIGS / "Ling-mini-2.0.json").read_text()), "rotary_dim"} - {"architectures"})
# Errors of one rope key may name another that it contradicts.
ROPE_WORDS = "rope rotary factor original_max_position_embeddings max_position_embeddings beta_ attn_factor".split()


def changes_of(key: str) -> st.SearchStrategy:
    if key in ("rope_scaling", "rope_parameters"):
        return st.one_of(ROPE, ROPE.map(lambda rope: {**rope, **YARN}), st.just(CARD), st.none())
    return st.one_of(NUMBERS, st.booleans(), st.none(), VALUES)


@given(
    st.sampled_from(NAMES),
    st.lists(st.sampled_from([*READ_BY_US, "rope_parameters", "rope_scaling"]), max_size=3, unique=True),
    st.lists(st.sampled_from(READ_BY_US), max_size=2, unique=True),
    st.data(),
)
@settings(deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
def test_any_changes_mean_what_the_official_code_makes_of_them_or_are_refused(name, changed, removed, data):
    raw = {**published(name), **{key: data.draw(changes_of(key), key) for key in changed}}
    raw = {key: value for key, value in raw.items() if key not in removed or key == "model_type"}
    untouched = copy.deepcopy(raw)
    try:
        config = built(raw)
    except ValueError as error:
        assert "\n" not in str(error)
        assert any(word in str(error) for word in [*changed, *removed, *ROPE_WORDS]), str(error)
        return
    finally:
        assert raw == untouched
    found, wanted = computed(config), official(raw)
    for key in wanted:
        assert _rounded(found[key]) == _rounded(wanted[key]), key


def _rounded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return float(f"{value:.9e}") if isinstance(value, float) else value


@given(st.sampled_from(NAMES), st.dictionaries(st.sampled_from(FOREIGN_KEYS), VALUES, min_size=1, max_size=4))
@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_keys_of_other_architectures_leave_the_configuration_as_it_is(name, foreign):
    raw = published(name)
    assert built({**raw, **foreign}).to_dict() == built(raw).to_dict()


# ---- keys that say nothing ------------------------------------------------------------------------------------------

HARMLESS = [
    *({key: None} for key in (*OFFICIAL_DEFAULTS, "use_rmsnorm", "norm_topk_prob", "initializer_range", "rotary_dim")),
    *({key: None} for key in ("use_sliding_window", "is_causal", "layer_types", "quantization_config", "router_type")),
    {"use_sliding_window": None, "sliding_window": 81920},
    {"use_sliding_window": False, "sliding_window": 81920},
    {"is_causal": True},
    {"is_encoder_decoder": False},
    {"layer_types": ["full_attention"] * 20},
    {"router_type": "topN"},
    {"per_layer_config": {}},
    {"quantization_config": {}},
    {"compression_config": None},
    {"original_max_position_embeddings": 4096},  # without YaRN
    {"dtype": "bfloat16"},
    {"rope_scaling": {"type": "default", "factor": 1.0}},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=str)
def test_keys_that_say_nothing_are_accepted(changes):
    raw = published("Ling-mini-2.0")
    default = {"use_sliding_window": False}
    assert {**built({**raw, **changes}).to_dict(), **default} == {**built(raw).to_dict(), **default}


@pytest.mark.parametrize(
    "more",
    [
        {"mscale_all_dim": 0},
        {"mscale": 0, "mscale_all_dim": 0.0},
        {"mscale": None},
        {"attn_factor": 1},
        {"attn_factor": 1.0, "extrapolation_factor": 1, "apply_yarn_scaling": True, "finetuned": True},
    ],
    ids=str,
)
def test_yarn_parameters_that_say_nothing_are_accepted(more):
    plain, with_more = (built(published("Ling-mini-2.0", rope_scaling={**CARD, **keys})) for keys in ({}, more))
    assert computed(with_more) == computed(plain)


@pytest.mark.parametrize("changes", [{"initializer_range": 0}, {"initializer_range": 0.0}, {"pad_token_id": -1}])
def test_values_for_training_alone_are_accepted(changes):
    assert computed(built(published("Ling-mini-2.0", **changes))) == computed(built(published("Ling-mini-2.0")))


@pytest.mark.parametrize("window", [32768, 131072])
def test_the_original_window_at_the_top_is_that_of_the_yarn_scaling(window):
    raw = published("Ling-mini-2.0", rope_scaling=YARN, max_position_embeddings=window)
    config = built({**raw, "original_max_position_embeddings": 32768})
    assert config.max_position_embeddings == 131072
    assert config.rope_parameters["original_max_position_embeddings"] == 32768
    with pytest.raises(ValueError, match="original_max_position_embeddings=4096 contradicts"):
        adopt({**raw, "rope_scaling": CARD, "original_max_position_embeddings": 4096})


def test_the_former_name_of_the_quantization_is_read():
    scheme = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    assert built(published("Ling-mini-2.0", compression_config=scheme)).quantization_config == scheme
    with pytest.raises(ValueError, match="compression_config contradicts quantization_config"):
        built(published("Ling-mini-2.0", compression_config=scheme, quantization_config={"quant_method": "fp8"}))


# ---- warnings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings_of(caplog):
    def read(raw: dict) -> list[str]:
        config_module._log_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="vllm.plugins.bailing"):
            adopt(raw)
            adopt(raw)
        return caplog.messages

    return read


@pytest.mark.parametrize("name", NAMES)
def test_published_files_are_read_without_a_warning(name, warnings_of):
    assert warnings_of(published(name)) == []


def test_keys_without_effect_are_named_once(warnings_of):
    (message,) = warnings_of(published("Ling-mini-2.0", sliding_window=64, attn_logit_softcapping=30.0, alibi=False))
    assert message.endswith("attn_logit_softcapping=30.0, sliding_window=64")


@pytest.mark.parametrize(
    ("lost", "fragments"),
    [
        ("partial_rotary_factor", ["no partial_rotary_factor", "1.0", "0.5"]),
        ("routed_scaling_factor", ["no routed_scaling_factor", "1.0", "2.5"]),
    ],
)
def test_a_lost_key_whose_default_no_published_model_has_is_warned_of(lost, fragments, warnings_of):
    raw = published("Ling-mini-2.0")
    (message,) = warnings_of({key: value for key, value in raw.items() if key != lost})
    assert all(fragment in message for fragment in fragments)
    assert "\n" not in message


def test_each_spelling_of_the_rotary_width_counts(warnings_of):
    raw = {key: value for key, value in published("Ling-mini-2.0").items() if key != "partial_rotary_factor"}
    assert warnings_of({**raw, "rotary_dim": 64}) == []
    assert warnings_of({**raw, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}) == []


@pytest.mark.parametrize(
    ("stops", "is_refused"),
    [(1013, False), ([1012, 1013], False), (None, False), (1024, True), ([1013, -1], True), ("1013", True)],
)
def test_stop_tokens_of_generation_config_are_in_the_vocabulary(stops, is_refused):
    model = SimpleNamespace(
        model="demo", try_get_generation_config=lambda: {"eos_token_id": stops}, get_vocab_size=lambda: 1024
    )
    refused = pytest.raises(SettingsError, match=r"^generation_config\.json of demo: eos_token_id=")
    with refused if is_refused else nullcontext():
        check_stop_tokens(model)


def test_a_generation_config_that_transformers_stumbles_over_is_named(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"pad_token_id": [1]}')
    read = functools.partial(GenerationConfig.from_pretrained, tmp_path)
    model = SimpleNamespace(model=tmp_path, try_get_generation_config=lambda: read().to_diff_dict())
    with pytest.raises(SettingsError, match=r"cannot be read .*; correct it, or pass --gener") as error:
        check_stop_tokens(model)
    assert str(error.value).isprintable()
    (tmp_path / "generation_config.json").unlink()
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(SettingsError, match="is no file; fetch it again, or pass --generation-config vllm"):
        check_stop_tokens(model)


# ---- which files are the family's -----------------------------------------------------------------------------------

WITHOUT_ARCHITECTURES = [{"architectures": None}, {"architectures": []}, {}]


@pytest.mark.parametrize("changes", WITHOUT_ARCHITECTURES, ids=str)
@pytest.mark.parametrize("model_type", ["bailing_moe", "bailing_moe_v2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_without_architectures_is_known_by_its_keys(name, model_type, changes, tmp_path):
    raw = {key: value for key, value in published(name).items() if key != "architectures"}
    config = AutoConfig.from_pretrained(write_config(tmp_path, {**raw, **changes, "model_type": model_type}))
    assert type(config) is BailingMoeV2Config
    assert config.architectures == ["BailingMoeV2ForCausalLM"]
    assert not hasattr(config, "auto_map")
    assert computed(config) == computed(built(published(name)))


def test_a_file_that_names_the_architecture_needs_no_model_type():
    raw = {key: value for key, value in published("Ling-mini-2.0").items() if key != "model_type"}
    assert adopt(raw)["model_type"] == "bailing_moe_v2"


@pytest.mark.parametrize(
    "architecture", ["BailingMoeV2Model", "BailingMoeV2ForSequenceClassification", "BailingMoeV2ForTokenClassification"]
)
def test_other_classes_of_the_family_keep_their_name(architecture, tmp_path):
    raw = published(
        "Ling-mini-2.0", architectures=[architecture], num_labels=3, id2label={"0": "a", "1": "b", "2": "c"}
    )
    config = AutoConfig.from_pretrained(write_config(tmp_path, raw))
    assert (type(config), config.architectures, config.num_labels) == (BailingMoeV2Config, [architecture], 3)


FIRST_GENERATION = {  # as the class of the first generation writes it
    "model_type": "bailing_moe",
    "vocab_size": 126464,
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_head": True,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "rope_theta": 600000,
    "num_experts": 64,
    "num_shared_experts": 2,
    "num_experts_per_tok": 6,
    "norm_topk_prob": True,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 0,
    "head_dim": 128,
}


@pytest.mark.parametrize("architectures", [["BailingMoeForCausalLM"], [], None])
def test_files_of_the_first_generation_are_left_alone(architectures):
    raw = {**FIRST_GENERATION, "architectures": architectures}
    assert adopt(raw) is raw


@pytest.mark.parametrize("kept", ["n_group", "routed_scaling_factor"])
def test_a_file_of_neither_generation_is_told_what_to_write(kept, tmp_path):
    model = write_config(tmp_path, {**FIRST_GENERATION, kept: 4})
    with pytest.raises(ValueError, match=r'write "architectures": \["BailingMoeV2ForCausalLM"\]') as caught:
        AutoConfig.from_pretrained(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [FIRST_GENERATION, {"model_type": "something_new", "architectures": ["X"]}], ids=str)
def test_a_command_says_in_one_line_that_a_file_is_not_the_familys(raw, tmp_path):
    with pytest.raises(ValueError, match=r"model_type='.*architectures=.*BailingMoeV2ForCausalLM") as caught:
        read_config(write_config(tmp_path, raw))
    assert "\n" not in str(caught.value)
    assert "pip install" not in str(caught.value)


# ---- overrides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ({"sliding_window": 64}, ["sliding_window=64", "BailingMoeV2; leave it out"]),
        ({"rope_tehta": 10000}, ["rope_tehta=10000", "write rope_theta"]),
        ({"use_sliding_window": True}, ["use_sliding_window=True", "set it to false"]),
        ({"is_causal": False}, ["is_causal=False", "set it to true"]),
        ({"text_config": {"hidden_size": 64}}, ["text_config"]),
        ({"eos_token_id": 157184}, ["eos_token_id=157184", "157183"]),
        ({"quantization_config": {"quant_method": None}}, ["quant_method=None"]),
    ],
    ids=str,
)
def test_an_override_that_is_no_key_of_the_architecture_is_refused(overrides, fragments, tmp_path):
    model = write_config(tmp_path, published("Ling-mini-2.0"))
    before = read_config(model).to_dict()
    with pytest.raises(ValueError) as caught:
        read_config(model, overrides)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)
    assert "\n" not in str(caught.value)
    assert read_config(model).to_dict() == before


def test_an_object_assigned_alone_is_checked_as_well():
    config = built(published("Ling-mini-2.0"))
    with pytest.raises(ValueError, match="text_config"):
        config.text_config = {"hidden_size": 64}  # as vLLM assigns overrides that are objects
    assert not hasattr(config, "text_config")


def test_overrides_that_say_nothing_or_are_known_are_taken():
    config = built(published("Ling-mini-2.0"))
    config.update({"sliding_window": None, "head_dtype": "float32", "num_labels": 3, "use_bias": None})
    assert (config.head_dtype, config.num_labels, config.use_bias) == ("float32", 3, False)
    assert not hasattr(config, "sliding_window")
