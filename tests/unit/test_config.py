"""The configuration: published files, derived values, round trips, and one clear line for each mistake.

To test a new switch that changes what the model computes, add a row to tests/support/config_switches.py; a refused
value gets one in `MISTAKES` here. `data/configs` holds config.json files with the keys and sizes of the published
checkpoints.
"""

import copy
import inspect
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from tests.support.configs import CARD, CONFIGS, ROPE_KEYS, ROPES, VALUES, YARN, built, published, write_config
from vllm_bailing.config import BailingMoeV2Config, adopt

pytestmark = pytest.mark.usefixtures("registered")

# ---- the published files ------------------------------------------------------------------------------------------

# name: window, MoE layers, MTP layers, (heads, key/value heads), shared width
FAMILY = {
    "Ling-mini-2.0": (32768, range(1, 20), [], (16, 4), 512),
    "Ling-mini-base-2.0": (32768, range(1, 20), [20], (16, 4), 512),
    "Ling-flash-2.0": (32768, range(1, 32), [], (32, 4), 1024),
    "Ling-flash-2.0-fp8-block": (32768, range(1, 32), [], (32, 4), 1024),
    "Ring-flash-2.0-yarn": (131072, range(1, 32), [], (32, 4), 1024),
    "Ling-1T": (32768, range(4, 80), [], (64, 8), 2048),
    "Ring-1T": (65536, range(4, 80), [], (64, 8), 2048),
    "AntAngelMed": (32768, range(1, 32), [], (32, 4), 1024),
}


def test_every_file_in_the_folder_is_tested():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_published_config_loads_with_its_derived_values(name, tmp_path):
    config = AutoConfig.from_pretrained(write_config(tmp_path, published(name)))
    window, moe_layers, mtp_layers, heads, shared = FAMILY[name]
    assert type(config) is BailingMoeV2Config
    assert config.model_type == "bailing_moe_v2"
    assert config.max_position_embeddings == window
    assert config.moe_layer_ids == list(moe_layers)
    assert config.mtp_layer_ids == mtp_layers
    assert (config.num_attention_heads, config.num_key_value_heads) == heads
    assert config.shared_expert_intermediate_size == shared
    # `partial_rotary_factor` in most files, `rotary_dim` alone in the 1T ones: the same half of a head.
    assert (config.head_dim, config.rotary_dim, config.partial_rotary_factor) == (128, 64, 0.5)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_theta"] == config.rope_theta == 600000
    assert config.routed_scaling_factor == 2.5


@pytest.mark.parametrize("name", FAMILY)
def test_published_values_come_through_unchanged(name):
    contents = published(name)
    config = built(contents)
    derived = {
        "auto_map",
        "model_type",
        "rope_scaling",
        "max_position_embeddings",
        "torch_dtype",
        "transformers_version",
    }
    for key in set(contents) - derived:
        assert getattr(config, key) == contents[key], key


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_code_beside_the_config_never_runs(trust_remote_code, tmp_path):
    model = write_config(tmp_path / "model", published("Ling-mini-2.0"))
    alarm = tmp_path / "it-ran"
    for module in ("configuration_bailing_moe_v2", "modeling_bailing_moe_v2"):
        (model / f"{module}.py").write_text(f"open({str(alarm)!r}, 'w').close()\nclass BailingMoeV2Config: ...\n")
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    assert type(config) is BailingMoeV2Config
    assert not hasattr(config, "auto_map")
    assert not alarm.exists()


def test_keys_that_the_official_class_omits_take_the_official_meaning():
    contents = published("Ling-flash-2.0")
    omitted = (
        "norm_topk_prob use_rmsnorm score_function router_dtype moe_shared_expert_intermediate_size "
        "num_nextn_predict_layers norm_head rope_scaling"
    ).split()
    shorter = {key: value for key, value in contents.items() if key not in omitted}
    assert built(shorter).to_dict() == built(contents).to_dict()
    assert (built(shorter).score_function, built(shorter).router_dtype) == ("sigmoid", "fp32")


@pytest.mark.parametrize("key", ["num_shared_experts", "num_nextn_predict_layers"])
def test_null_means_none_of_them(key):
    assert getattr(built(published("Ling-mini-2.0", **{key: None})), key) == 0


def test_without_any_rotary_key_the_whole_head_turns():
    contents = {key: value for key, value in published("Ling-mini-2.0").items() if key != "partial_rotary_factor"}
    assert built(contents).rotary_dim == 128


@pytest.mark.parametrize(("width_key", "expected"), [(512, 1024), (1024, 1024), (None, 1024)])
def test_shared_width_is_that_of_all_shared_experts(width_key, expected):
    # Files differ in whether the key means one shared expert or all of them.
    contents = published("Ling-mini-2.0", num_shared_experts=2, moe_shared_expert_intermediate_size=width_key)
    assert built(contents).shared_expert_intermediate_size == expected


def test_a_model_without_shared_experts_needs_no_width_for_them():
    contents = published("Ling-mini-2.0", num_shared_experts=0, moe_shared_expert_intermediate_size=0)
    assert built(contents).shared_expert_intermediate_size == 0


def test_defaults_alone_are_valid():
    assert BailingMoeV2Config().architectures == ["BailingMoeV2ForCausalLM"]


@pytest.mark.parametrize(
    "other",
    [
        {"architectures": ["BailingMoeForCausalLM"], "model_type": "bailing_moe", "auto_map": {"AutoConfig": "a.B"}},
        {"architectures": ["BailingMoeLinearV2ForCausalLM"], "model_type": "bailing_moe_linear", "auto_map": {}},
        {"architectures": ["BailingMoeV2_5ForCausalLM"], "model_type": "bailing_hybrid", "auto_map": {}},
        {"architectures": ["BailingMoeV3ForCausalLM"], "model_type": "bailing_hybrid_v3"},
        {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "something_else"},
        {"architectures": None, "model_type": "bailing_moe"},
        {"model_type": "bailing_moe"},
        {},
    ],
    ids=str,
)
def test_configs_of_other_models_pass_through_untouched(other):
    before = copy.deepcopy(other)
    assert adopt(other) is other
    assert other == before


# ---- round trips --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_round_trips_give_the_same_config(name, tmp_path):
    config = built(published(name))
    wanted = config.to_dict()
    config.save_pretrained(tmp_path)
    for copied in (
        AutoConfig.from_pretrained(tmp_path),
        BailingMoeV2Config.from_pretrained(tmp_path),
        BailingMoeV2Config.from_dict(config.to_dict()),
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
    ):
        same = {**copied.to_dict(), "_name_or_path": wanted.get("_name_or_path")}
        assert same == {**wanted, "_name_or_path": wanted.get("_name_or_path")}


def test_configurations_are_equal_if_their_keys_are():
    config = built(published("Ling-mini-2.0"))
    assert config == built(published("Ling-mini-2.0")) == copy.deepcopy(config)
    assert config != built(published("Ling-mini-2.0", num_hidden_layers=4))
    assert config != built(published("Ling-flash-2.0"))


@pytest.mark.parametrize("head_dim", [48, 64, 88, 96, 98, 104, 128, 176, 192, 256])
def test_any_even_width_survives_a_round_trip(head_dim):
    # 88, 98, 104 and 176 have widths whose share of the head, as a float, falls just below them.
    for rotary_dim in range(2, head_dim + 1, 2):
        config = BailingMoeV2Config(head_dim=head_dim, rotary_dim=rotary_dim)
        # What vLLM and the official code compute from the factor.
        assert int(head_dim * config.partial_rotary_factor) == rotary_dim
        assert BailingMoeV2Config.from_dict(config.to_dict()).rotary_dim == rotary_dim


MISTAKES = [
    # what would take all memory
    *(
        ({key: 10**9}, [f"{key}=1000000000 must be an integer from"])
        for key in (
            "num_hidden_layers",
            "num_nextn_predict_layers",
            "num_experts",
            "head_dim",
            "max_position_embeddings",
        )
    ),
    *(
        ({f"{kind}_dropout": value}, [f"{kind}_dropout=", "must be a finite number of at least 0 and at most 1"])
        for kind in ("embedding", "attention", "output")
        for value in ("x", 1.5, -0.1, True, [0.1])
    ),
    ({"rope_scaling": {**YARN, "a\nb\x1b[2J": 1}}, [r"a\nb\x1b[2J=1 does not belong to rope_type='yarn'"]),
    (
        {"rope_scaling": {**YARN, "a\nb": 1}, "rope_parameters": {**YARN, "a\nb": 2}},
        [r"rope_parameters.a\nb=2 contradicts rope_scaling.a\nb=1"],
    ),
    ({"num_hidden_layers": 1000, "num_experts": 4096}, ["num_hidden_layers=1000", "num_experts=4096"]),
    # two keys against each other
    ({"rotary_dim": 32}, ["rotary_dim=32", "partial_rotary_factor=0.5"]),
    ({"rotary_dim": 64, "head_dim": 32}, ["rotary_dim=64", "partial_rotary_factor=0.5", "head_dim=32"]),
    ({"rotary_dim": 64, "head_dim": 32, "partial_rotary_factor": None}, ["rotary_dim=64", "head_dim=32"]),
    ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor=1.5", "head_dim=128"]),
    ({"partial_rotary_factor": 0.01}, ["partial_rotary_factor=0.01", "head_dim=128"]),
    ({"rotary_dim": 63, "partial_rotary_factor": None}, ["rotary_dim=63", "head_dim=128"]),
    ({"n_group": 7}, ["n_group=7", "num_experts=256"]),
    ({"n_group": 256, "topk_group": 8}, ["n_group=256", "num_experts=256"]),
    ({"topk_group": 9}, ["topk_group=9", "n_group=8"]),
    ({"num_experts_per_tok": 129}, ["num_experts_per_tok=129", "topk_group=4", "n_group=8", "num_experts=256"]),
    ({"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=16"]),
    ({"num_key_value_heads": 32}, ["num_key_value_heads=32", "num_attention_heads=16"]),
    ({"first_k_dense_replace": 21}, ["first_k_dense_replace=21", "num_hidden_layers=20"]),
    ({"norm_head": True, "tie_word_embeddings": True}, ["norm_head=True", "tie_word_embeddings=True"]),
    # what the architecture does not have
    ({"score_function": "softmax"}, ["score_function='softmax'", "'sigmoid'"]),
    ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "'silu'"]),
    ({"hidden_act": ["silu"]}, ["hidden_act=['silu']", "'silu'"]),
    ({"router_dtype": "fp8"}, ["router_dtype='fp8'", "'fp32'"]),
    ({"use_rmsnorm": False}, ["use_rmsnorm=False", "True"]),
    ({"norm_topk_prob": False}, ["norm_topk_prob=False", "True"]),
    ({"use_sliding_window": True}, ["use_sliding_window=True", "false"]),
    ({"is_causal": False}, ["is_causal=False", "true"]),
    ({"is_encoder_decoder": True}, ["is_encoder_decoder=True", "false"]),
    ({"layer_types": ["sliding_attention"] * 20}, ["layer_types=['sliding_attention'"]),
    ({"router_type": "MultiRouter"}, ["router_type='MultiRouter'", "topN"]),
    ({"mrope_section": [8, 12, 12]}, ["mrope_section=[8, 12, 12]"]),
    ({"per_layer_config": {"0": {"head_dim": 64}}}, ["per_layer_config"]),
    ({"torch_dtype": "bf16"}, ["torch_dtype='bf16'", "'bfloat16'"]),
    ({"dtype": "float16"}, ["dtype='float16'", "torch_dtype='bfloat16'"]),
    ({"architectures": "BailingMoeV2ForCausalLM"}, ["architectures='BailingMoeV2ForCausalLM'", "list"]),
    # rope
    ({"rope_scaling": "yarn"}, ["rope_scaling='yarn'", "object"]),
    ({"rope_scaling": [YARN]}, ["rope_scaling=[{", "object"]),
    ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, ["rope_type='ntk'", "yarn"]),
    ({"rope_scaling": {"type": ["yarn"]}}, ["rope_type=['yarn']", "yarn"]),
    ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}}, ["'yarn'", "'linear'"]),
    ({"rope_scaling": {"type": "yarn"}}, ["factor", "None", "yarn"]),
    ({"rope_scaling": {**YARN, "factor": "4"}}, ["factor", "'4'"]),
    ({"rope_scaling": {**YARN, "factor": 0.5}}, ["factor=0.5", "1"]),
    ({"rope_scaling": {**YARN, "factor": float("nan")}}, ["factor", "nan"]),
    ({"rope_scaling": {**YARN, "factor": 1e308}}, ["factor=1e+308", "original_max_position_embeddings=32768"]),
    ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, ["original_max_position_embeddings=0"]),
    (
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 4096.0}},
        ["original_max_position_embeddings=4096.0"],
    ),
    ({"rope_scaling": {**CARD, "factor": 2.0}, "max_position_embeddings": 131072}, ["=131072", "=2.0", "=32768"]),
    ({"rope_scaling": {**YARN, "factor": 4000}}, ["factor=4000", "16777216"]),
    ({"rope_scaling": {**YARN, "factor": 2000}, "max_position_embeddings": 4096}, ["factor=2000", "1024"]),
    ({"rope_scaling": {"type": "linear", "factor": 4000}}, ["factor=4000", "16777216"]),
    ({"max_position_embeddings": 2**25}, ["max_position_embeddings=33554432", "16777216"]),
    ({"rope_scaling": {**YARN, "beta_fast": 0.5}}, ["beta_fast=0.5", "beta_slow=1"]),
    ({"rope_scaling": {**YARN, "attn_factor": 1.2}}, ["attn_factor=1.2", "not read by the official code"]),
    ({"rope_scaling": {**YARN, "attention_factor": 0}}, ["attention_factor", "=0"]),
    ({"rope_scaling": {**YARN, "mscale_all_dim": -1}}, ["mscale_all_dim", "-1"]),
    ({"rope_theta": 1}, ["rope_theta=1"]),
    ({"rope_theta": 1e39}, ["rope_theta=1e+39"]),
    ({"rope_scaling": {**YARN, "beta_fast": "32"}}, ["beta_fast", "'32'"]),
    ({"rope_scaling": {**YARN, "short_factor": [1.0]}}, ["short_factor=[1.0]", "yarn"]),
    ({"rope_scaling": {**YARN, "truncate": "no"}}, ["truncate='no'"]),
    ({"rope_scaling": {"factor": 4.0}}, ["factor=4.0", "rope_type", "yarn"]),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["factor=2.0", "factor=4.0"]),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000}}, ["rope_theta=600000", "rope_theta=10000"]),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, ["partial_rotary_factor=0.5", "partial_rotary_factor=0.25"]),
    ({"rope_theta": 0}, ["rope_theta=0"]),
    ({"rope_theta": "600000"}, ["rope_theta='600000'"]),
    ({"rope_theta": float("inf")}, ["rope_theta=inf"]),
    # types and ranges
    ({"num_experts": "256"}, ["num_experts='256'"]),
    ({"num_experts": -256}, ["num_experts=-256"]),
    ({"num_experts": 0}, ["num_experts=0"]),
    ({"num_experts": None}, ["num_experts=None"]),
    ({"num_experts_per_tok": 8.0}, ["num_experts_per_tok=8.0"]),
    ({"num_experts_per_tok": True}, ["num_experts_per_tok=True"]),
    ({"num_hidden_layers": float("nan")}, ["num_hidden_layers=nan"]),
    ({"num_hidden_layers": 10**30}, ["num_hidden_layers=1000"]),
    ({"num_attention_heads": 0, "head_dim": None}, ["num_attention_heads=0"]),
    ({"hidden_size": "2048", "head_dim": None}, ["hidden_size='2048'"]),
    ({"hidden_size": {"a": 1}}, ["hidden_size={'a': 1}"]),
    ({"head_dim": 0}, ["head_dim=0"]),
    ({"vocab_size": [157184]}, ["vocab_size=[157184]"]),
    ({"n_group": 0}, ["n_group=0"]),
    ({"num_shared_experts": -1}, ["num_shared_experts=-1"]),
    ({"num_nextn_predict_layers": "1"}, ["num_nextn_predict_layers='1'"]),
    ({"moe_shared_expert_intermediate_size": 0}, ["moe_shared_expert_intermediate_size=0"]),
    ({"max_position_embeddings": 0}, ["max_position_embeddings=0"]),
    ({"rms_norm_eps": float("nan")}, ["rms_norm_eps=nan"]),
    ({"rms_norm_eps": float("inf")}, ["rms_norm_eps=inf"]),
    ({"rms_norm_eps": 0}, ["rms_norm_eps=0"]),
    ({"rms_norm_eps": None}, ["rms_norm_eps=None"]),
    ({"routed_scaling_factor": "2.5"}, ["routed_scaling_factor='2.5'"]),
    ({"routed_scaling_factor": float("-inf")}, ["routed_scaling_factor=-inf"]),
    ({"routed_scaling_factor": 10**400}, ["routed_scaling_factor=1000"]),
    ({"use_qk_norm": "true"}, ["use_qk_norm='true'"]),
    ({"use_bias": 1}, ["use_bias=1"]),
    ({"eos_token_id": "156892"}, ["eos_token_id='156892'"]),
    ({"eos_token_id": [156892, "x\ny"]}, ["eos_token_id=[156892, 'x\\ny']"]),
    ({"eos_token_id": 157184}, ["eos_token_id=157184", "157183", "vocab_size=157184"]),
    ({"eos_token_id": [156892, -1]}, ["eos_token_id=[156892, -1]", "vocab_size"]),
    ({"bos_token_id": 200000}, ["bos_token_id=200000", "vocab_size"]),
    ({"pad_token_id": 200000}, ["pad_token_id=200000", "vocab_size"]),
    ({"vocab_size": 1024}, ["eos_token_id=156892", "vocab_size=1024"]),
    ({"initializer_range": -1}, ["initializer_range=-1"]),
    ({"routed_scaling_factor": 1e300}, ["routed_scaling_factor=1e+300"]),
    ({"quantization_config": "fp8"}, ["quantization_config='fp8'"]),
    ({"quantization_config": {"quant_method": None}}, ["quantization_config", "quant_method=None"]),
    ({"compression_config": [1, 2]}, ["compression_config=[1, 2]"]),
    ({"compression_config": {"bits": 8}}, ["compression_config", "quant_method=None"]),
    ({"quantization_config": {"quant_method": 8}}, ["quantization_config", "quant_method=8"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config", "quant_method=None"]),
    # keys of all models
    ({"id2label": "x"}, ["id2label"]),
    ({"layer_types": 5}, ["layer_types"]),
    ({"to_dict": 1}, ["to_dict=1"]),
    ({"shared_expert_intermediate_size": 512}, ["shared_expert_intermediate_size=512"]),
]


@pytest.mark.parametrize(("changes", "fragments"), MISTAKES, ids=[str(changes)[:70] for changes, _ in MISTAKES])
def test_a_mistake_is_refused_with_one_line_naming_keys_and_values(changes, fragments, tmp_path):
    model = write_config(tmp_path, published("Ling-mini-2.0", **changes))
    with pytest.raises(ValueError) as caught:
        AutoConfig.from_pretrained(model)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, f"{fragment!r} is not in {message!r}"


COMMON_KEYS = ["dtype", "torch_dtype", "bos_token_id", "quantization_config", "layer_types", "use_sliding_window"]
KEYS = sorted({*inspect.signature(BailingMoeV2Config.__init__).parameters, *COMMON_KEYS} - {"self", "kwargs"})


@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3, unique=True), st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_give_a_valid_config_or_one_clear_line(keys, data):
    changes = {key: data.draw(ROPES if key in ("rope_scaling", "rope_parameters") else VALUES, key) for key in keys}
    try:
        config = built(published("Ling-mini-2.0", **changes))
    except ValueError as error:
        assert "\n" not in str(error)
        assert any(key in str(error) for key in [*keys, *ROPE_KEYS, "rotary"])
        return
    config.validate_rope()
    assert BailingMoeV2Config.from_dict(config.to_dict()).to_json_string() == config.to_json_string()


@pytest.mark.parametrize("key", ["sliding_window", "attention_chunk_size"])
def test_a_window_that_is_assigned_later_is_none(key):
    """transformers' caches would obey it, whatever says that it is not in use."""
    config = BailingMoeV2Config()
    setattr(config, key, 64)
    assert getattr(config, key) is None
