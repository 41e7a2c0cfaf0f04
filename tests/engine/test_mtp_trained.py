"""An MTP layer that `vllm-bailing train-mtp` wrote, as the draft of a fine-tune that speaks differently."""

import json
import logging
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from tests.support.adapters import merged
from tests.support.commands import invoke
from tests.support.engine import run_in_turn
from tests.support.speculation import answers, demo_requests, mtp, prompts_of
from vllm_bailing import DEMO, DEMO_ADAPTER


@pytest.fixture(scope="module")
def fine_tune(tmp_path_factory):
    """The demo with its adapter merged, what it answers without drafts, and a layer that was trained on that."""
    folder = tmp_path_factory.mktemp("trained")
    target = merged(DEMO, DEMO_ADAPTER, folder / "target")
    plain, _ = run_in_turn(answers, target, 25, 0)
    tokenizer = AutoTokenizer.from_pretrained(str(DEMO))
    rows = zip(prompts_of(SimpleNamespace(get_tokenizer=lambda: tokenizer), demo_requests(25)), plain, strict=True)
    (folder / "answers.jsonl").write_text(
        "".join(f"{json.dumps({'prompt_token_ids': ids, 'token_ids': said})}\n" for ids, said in rows)
    )
    ready = ("--init", DEMO, "--answers", folder / "answers.jsonl", "--out", folder / "layer")
    options = ("--merge", folder / "merged", "--steps", 25, "--batch-size", 4, "--learning-rate", 1e-3)
    done = invoke("train-mtp", target, *ready, *options)
    assert done.exit_code == 0, done.stderr
    return folder, plain


def heard(model, count, speculation):
    """As `answers`, and the warnings of this package."""
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("vllm.plugins.bailing")
    logger.addHandler(handler)
    try:
        return answers(model, count, speculation), said
    finally:
        logger.removeHandler(handler)


def test_answers_stay_the_same_and_more_drafts_are_accepted(fine_tune):
    folder, plain = fine_tune
    accepted = {}
    for draft in (DEMO, folder / "layer"):
        (ids, counted), said = run_in_turn(heard, folder / "target", 25, mtp(3, model=str(draft)))
        assert ids == plain
        assert not [line for line in said if "trained for" in line]
        accepted[draft] = counted["accepted_tokens"] / counted["drafts"]
    assert accepted[folder / "layer"] > 1.1 * accepted[DEMO]


def test_the_merged_copy_drafts_by_itself(fine_tune):
    folder, plain = fine_tune
    ids, counted = run_in_turn(answers, folder / "merged", 25, 3)
    assert ids == plain and counted["accepted_tokens"] > counted["drafts"]


def test_another_target_is_named_in_one_line(fine_tune):
    folder, _ = fine_tune
    _, said = run_in_turn(heard, DEMO, 2, mtp(1, model=str(folder / "layer")))
    lines = [line for line in said if "the draft was trained for target, and the weights of" in line]
    assert len(lines) == 1 and "\n" not in lines[0]
