"""A model's name on the hub, where the hub does not answer."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import constants

from vllm_bailing import DEMO
from vllm_bailing.config import PretrainedConfig, read_config
from vllm_bailing.folders import only_from_cache

COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def unreachable(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_it_is_asked_once_and_the_message_says_what_to_do(monkeypatch):
    def asked(*_arguments, **_options):
        pytest.fail("the hub's client tries five times, and prints each")

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", asked)
    with pytest.raises(ValueError, match=r"^a/b is no folder here and was not downloaded, and http://127.0.0.1:9 ") as hit:
        read_config("a/b")
    assert "cannot be asked (" in str(hit.value) and "give a folder or a config.json, or set HF_ENDPOINT" in str(hit.value)
    with pytest.raises(ValueError, match="^a b is no folder, and no name that the hub allows"):
        read_config("a b")
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(ValueError, match=r"\(HF_HUB_OFFLINE is set\)"):
        read_config("a/b")


def test_what_was_downloaded_is_read(tmp_path):
    folder = tmp_path / "models--a--b"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    shutil.copy(DEMO / "config.json", folder / "snapshots" / COMMIT)
    assert only_from_cache("a/b") and not only_from_cache(str(DEMO))
    assert read_config("a/b").num_experts == read_config(DEMO).num_experts
