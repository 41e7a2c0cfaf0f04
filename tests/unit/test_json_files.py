"""JSON that others wrote, whatever it is, and who reads it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_bailing.errors import SettingsError
from vllm_bailing.json_files import parsed, read_json, write_json
from vllm_bailing.plugin.options import draft_vocabulary
from vllm_bailing.tools.prompts import read_prompts

PLACES = {
    "pipe": (os.mkfifo, "is no file"),
    "folder": (os.mkdir, "is no file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is no file"),
    "link to nothing": (lambda path: path.symlink_to("gone"), "cannot be read (No such file or directory)"),
    "link in a circle": (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
    "nothing": (lambda path: None, "cannot be read (No such file or directory)"),
}
TEXTS = {
    b"": "is no JSON (Expecting value",
    b"{": "is no JSON (Expecting property name",
    b"\xff\xfe{": "is not UTF-8",
    b"[" * 100_000: "is JSON of too many levels",
    b"1" * 5000: "is no JSON (Exceeds the limit",
}


def vocabulary(file):
    config = SimpleNamespace(hf_config=SimpleNamespace(vocab_size=1024))
    return draft_vocabulary(SimpleNamespace(additional_config={"bailing_draft_vocab": str(file)}, model_config=config))


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_not_opened(place, tmp_path):
    make, words = PLACES[place]
    make(tmp_path / "ids.json")
    with pytest.raises(ValueError) as refusal:
        read_json(tmp_path / "ids.json")
    assert str(refusal.value) == words
    with pytest.raises(SettingsError) as refusal:
        vocabulary(tmp_path / "ids.json")
    assert str(refusal.value) == (
        f"bailing_draft_vocab {tmp_path / 'ids.json'} {words}; make one by `vllm-bailing draft-vocab`"
    )
    make(tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match=r"prompts\.jsonl .*; |prompts\.jsonl cannot be read"):
        read_prompts(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:8]))
def test_what_is_no_json_is_said_in_a_few_words(text, tmp_path):
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(ValueError) as refusal:
        read_json(tmp_path / "file")
    assert str(refusal.value).startswith(TEXTS[text]) and str(refusal.value).isprintable()


def test_what_is_json_comes_as_it_is(tmp_path):
    (tmp_path / "file").write_text('{"ä": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(tmp_path / "file") == parsed('{"ä": [1, 2.5, null]}') == {"ä": [1, 2.5, None]}


@pytest.mark.parametrize("ids", ["x" * 9000, {"a": "\x1b[2J"}, [1, "2"], [True], [1024], [-1], [], 5])
def test_a_draft_vocabulary_is_a_list_of_tokens(ids):
    config = SimpleNamespace(hf_config=SimpleNamespace(vocab_size=1024))
    with pytest.raises(SettingsError) as refusal:
        draft_vocabulary(SimpleNamespace(additional_config={"bailing_draft_vocab": ids}, model_config=config))
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 500


def test_a_separator_of_lines_within_a_prompt_is_a_part_of_it(tmp_path):
    said = "one\u2028two\x85three\x0cfour"
    (tmp_path / "p.txt").write_text(f"{said}\nfive\r\n\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "{said.replace(chr(12), "")}"}}\n', encoding="utf-8")
    assert [prompt.messages[0]["content"] for prompt in read_prompts(tmp_path / "p.txt")] == [said, "five"]
    assert read_prompts(tmp_path / "p.jsonl")[0].messages[0]["content"] == said.replace("\x0c", "")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "kept.json", {"a": 1})
    original = Path.write_text

    def full(file, text, **options):
        original(file, text[:5], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "kept.json", {"a": 2})
    assert read_json(tmp_path / "kept.json") == {"a": 1}
