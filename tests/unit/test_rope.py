"""Rope keys: YaRN in every spelling, and one key assigned alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.configs import CARD, ROPES, SPELLINGS, VALUES, built, published
from vllm_bailing.config import BailingMoeV2Config

pytestmark = pytest.mark.usefixtures("registered")

# ---- YaRN -----------------------------------------------------------------------------------------------------------


def yarn_by(way: str, scaling: dict, **changes) -> BailingMoeV2Config:
    contents = published("Ling-flash-2.0", **changes)
    if way.startswith("file"):
        return built({**contents, way.split(".")[1]: scaling})
    config = built(contents)
    setattr(config, way.split(".")[1], scaling)
    return config


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "way", ["file.rope_scaling", "file.rope_parameters", "assigned.rope_scaling", "assigned.rope_parameters"]
)
@pytest.mark.parametrize("window", [32768, 131072])
def test_yarn_of_the_model_card_gives_131072(way, spelling, window):
    config = yarn_by(way, SPELLINGS[spelling], max_position_embeddings=window)
    assert config.max_position_embeddings == 131072
    assert config.rope_parameters == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "rope_theta": 600000,
        "partial_rotary_factor": 0.5,
    }
    assert config.rope_scaling == config.rope_parameters
    assert (config.rotary_dim, config.rope_theta) == (64, 600000)


@pytest.mark.parametrize("way", ["file.rope_scaling", "assigned.rope_scaling"])
def test_yarn_without_an_original_window_starts_from_the_trained_one(way):
    config = yarn_by(way, {"type": "yarn", "factor": 4.0})
    assert config.max_position_embeddings == 131072
    assert config.rope_parameters["original_max_position_embeddings"] == 32768


def test_the_callers_dict_is_left_alone():
    scaling = dict(CARD)
    yarn_by("file.rope_scaling", scaling)
    yarn_by("assigned.rope_scaling", scaling)
    assert scaling == CARD


@pytest.mark.parametrize(
    ("later", "window"),
    [(None, 32768), ({"type": "yarn", "factor": 2.0}, 65536), ({"type": "yarn", "factor": 8}, 262144)],
)
def test_another_scaling_starts_again_from_the_trained_window(later, window):
    config = yarn_by("file.rope_scaling", CARD)
    config.rope_scaling = later
    assert config.max_position_embeddings == window
    assert (config.rotary_dim, config.rope_theta) == (64, 600000)


@pytest.mark.parametrize(
    ("key", "value", "rotary_dim"),
    [("rope_theta", 10000.0, 64), ("rotary_dim", 32, 32), ("partial_rotary_factor", 1.0, 128)],
)
@pytest.mark.parametrize("scaling", [None, CARD], ids=["plain", "yarn"])
def test_one_rope_key_assigned_alone_settles_the_others(key, value, rotary_dim, scaling):
    config = built(published("Ling-flash-2.0", rope_scaling=scaling))
    before = dict(config.rope_parameters)
    config.update({key: value})
    wanted = {**before, "partial_rotary_factor": rotary_dim / 128}
    if key == "rope_theta":
        wanted["rope_theta"] = value
    assert config.rope_parameters == wanted
    assert (config.rotary_dim, config.partial_rotary_factor) == (rotary_dim, rotary_dim / 128)
    assert config.rope_theta == wanted["rope_theta"]
    assert config.max_position_embeddings == (131072 if scaling else 32768)


def test_a_refused_assignment_changes_nothing():
    config = built(published("Ling-flash-2.0", rope_scaling=CARD))
    before = config.to_dict()
    for key, value in (
        ("rope_scaling", {"type": "ntk"}),
        ("rotary_dim", 130),
        ("rope_theta", -1),
        ("rope_scaling", "yarn"),
    ):
        with pytest.raises(ValueError, match=key if key != "rope_scaling" else "rope"):
            setattr(config, key, value)
    assert config.to_dict() == before


@given(
    st.sampled_from(["rope_scaling", "rope_parameters", "rope_theta", "rotary_dim", "partial_rotary_factor"]), st.data()
)
@settings(deadline=None, max_examples=200)
def test_any_rope_assignment_gives_a_valid_config_or_one_clear_line(key, data):
    config = BailingMoeV2Config(partial_rotary_factor=0.5, rope_scaling=data.draw(st.sampled_from([None, CARD])))
    before = config.to_dict()
    try:
        setattr(config, key, data.draw(ROPES if key.endswith(("scaling", "parameters")) else VALUES))
    except ValueError as error:
        assert "\n" not in str(error)
        assert config.to_dict() == before
        return
    assert BailingMoeV2Config.from_dict(config.to_dict()).to_dict() == config.to_dict()
