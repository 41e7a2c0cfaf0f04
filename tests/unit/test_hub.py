"""A model's name on the hub, where the hub does not answer."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import constants

from vllm_bailing import DEMO
from vllm_bailing.config import PretrainedConfig, read_config
from vllm_bailing.errors import FilesError
from vllm_bailing.folders import local_folder, only_from_cache
from vllm_bailing.tools import doctor

COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def unreachable(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_it_is_asked_once_and_the_message_says_what_to_do(monkeypatch):
    def asked(*_arguments, **_options):
        pytest.fail("the hub's client tries five times, and prints each")

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", asked)
    with pytest.raises(ValueError, match=r"^a/b is no folder here and was not downloaded, and http://127\.0") as hit:
        read_config("a/b")
    message = str(hit.value)
    assert "cannot be asked (" in message and "give a folder or a config.json, or set HF_ENDPOINT" in message
    with pytest.raises(ValueError, match=r"^a b is no folder, and no name that the hub allows"):
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


@pytest.mark.parametrize("read", [read_config, local_folder])
def test_a_name_without_an_owner_is_told_what_names_are(read):
    with pytest.raises(FilesError, match=r"^demo is .*downloaded; names on the hub are OWNER/MODEL, .* demo-path"):
        read("demo")


@pytest.mark.parametrize("model", ["demo", "a/b", "/nowhere", str(DEMO / "config.json")])
def test_doctor_says_once_what_to_do(model):
    (check,) = doctor.checkpoint(model)
    assert check.ok is False and check.fix and check.fix not in check.detail and "; " not in check.detail
