"""`vllm-bailing draft-vocab`."""

import json

from transformers import AutoTokenizer
from typer.testing import CliRunner

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
