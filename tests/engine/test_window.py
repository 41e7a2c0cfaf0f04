"""The window of a checkpoint as vLLM reads it, with and without YaRN."""

from pathlib import Path

import pytest

from tests.support.configs import CARD, SPELLINGS, published, write_config

pytestmark = pytest.mark.usefixtures("registered")


def window_in_vllm(model: Path, monkeypatch, **options) -> int:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(model), skip_tokenizer_init=True, dtype="float32", **options)
    return args.create_model_config().max_model_len


YARN_WAYS = {
    "config.json": (CARD, {}),
    "rope_scaling": (None, {"rope_scaling": CARD}),
    "rope_parameters": (None, {"rope_parameters": SPELLINGS["rope_type"]}),
}


@pytest.mark.parametrize("way", YARN_WAYS)
def test_vllm_accepts_131072_with_yarn_and_no_more(way, tmp_path, monkeypatch):
    in_file, overrides = YARN_WAYS[way]
    model = write_config(tmp_path, published("Ling-flash-2.0", rope_scaling=in_file))
    assert window_in_vllm(model, monkeypatch, hf_overrides=overrides) == 131072
    assert window_in_vllm(model, monkeypatch, hf_overrides=overrides, max_model_len=131072) == 131072
    with pytest.raises(ValueError, match="131073"):
        window_in_vllm(model, monkeypatch, hf_overrides=overrides, max_model_len=131073)


def test_vllm_keeps_the_trained_window_without_yarn(tmp_path, monkeypatch):
    model = write_config(tmp_path, published("Ling-flash-2.0"))
    assert window_in_vllm(model, monkeypatch) == 32768
    with pytest.raises(ValueError, match="32769"):
        window_in_vllm(model, monkeypatch, max_model_len=32769)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        ({"num_experts_per_tok": 200}, ["num_experts_per_tok=200", "topk_group=4"]),
        ({"n_group": 7}, ["n_group=7", "num_experts=256"]),
        ({"rope_scaling": {"type": "ntk"}}, ["rope_type='ntk'"]),
        ({"rope_theta": "600000"}, ["rope_theta='600000'"]),
    ],
    ids=str,
)
def test_vllm_refuses_a_bad_override(overrides, fragments, tmp_path, monkeypatch):
    model = write_config(tmp_path, published("Ling-flash-2.0"))
    with pytest.raises(ValueError) as caught:
        window_in_vllm(model, monkeypatch, hf_overrides=overrides)
    assert all(fragment in str(caught.value) for fragment in fragments)
