"""`vllm-bailing draft-vocab`."""

import json
import os

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.support.commands import invoke
from vllm_bailing import DEMO
from vllm_bailing.cli import app


def test_draft_vocabulary_keeps_the_most_frequent_tokens_and_all_that_end_an_answer(tmp_path):

    text, out = tmp_path / "text.txt", tmp_path / "ids.json"
    text.write_text("The capital of France is Paris.\n" * 3 + "YaRN\n")
    done = CliRunner().invoke(
        app, ["draft-vocab", str(DEMO), "--text", str(text), "--size", "30", "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = json.loads(out.read_text())
    assert ids == sorted(set(ids)) and len(ids) <= 30
    assert set(tokenizer.encode("The capital of France is Paris.")) | set(tokenizer.all_special_ids) <= set(ids)
    assert "% of the text" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--text", "binary"), "--text binary is no text"),
        (("--text", "empty"), "--text is empty; name text like that"),
        (("--text", "."), "--text"),
        (("--text", "text", "--out", "missing/ids.json"), "there is no folder missing; make it first"),
        (("--text", "text", "--model", "."), ". has no tokenizer that can be read"),
        (("--text", "text", "--model", "pipes"), "pipes/pipe is a pipe or a device and no file; remove it"),
        (("--text", "pipes/pipe"), "--text pipes/pipe is no file; name a text file"),
        (("--text", "text", "--model", "no-such/model"), "no-such/model has no tokenizer that can be read"),
    ],
)
def test_what_no_vocabulary_can_be_made_of_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_text("")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "pipes").mkdir()
    os.mkfifo(tmp_path / "pipes" / "pipe")
    model = DEMO
    if "--model" in arguments:
        arguments, model = arguments[:-2], arguments[-1]
    done = invoke("draft-vocab", model, *arguments)
    assert done.exit_code == 2 and words in " ".join(done.stderr.split()), (done.output, done.exception)
    assert list(tmp_path.rglob("*.json")) == []


def test_more_tokens_than_there_are_are_told(tmp_path):
    (tmp_path / "text").write_text("hello")
    done = invoke("draft-vocab", DEMO, "--text", tmp_path / "text", "--size", 99999, "--out", tmp_path / "ids.json")
    assert done.exit_code == 0 and "--size 99999 is more than the model's 1024 tokens" in done.stderr
