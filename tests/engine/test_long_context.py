"""Retrieval at four times the trained window, with YaRN, beside the plain reference at the same positions."""

from __future__ import annotations

import json

import pytest
import torch
from needle import FACTOR, NEEDLE, PLAIN, WINDOW, YARN, questions
from transformers import AutoConfig

import vllm_bailing.reference as reference
from tests.support.engine import ask, make_llm, run_in_turn
from vllm_bailing import DEMO

DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]
ASKED = [one for rows in questions(FACTOR * WINDOW, DEPTHS, count=8).values() for one in rows]


def _served(overrides):
    """(tokens of all answers, log-probabilities at every position of the first two prompts)."""
    options = {"hf_overrides": overrides, "max_model_len": FACTOR * WINDOW}
    llm = make_llm(NEEDLE, **options)
    prompts = [prompt for prompt, _ in ASKED]
    tables = [table for table, _ in ask(llm, prompts[:2], max_tokens=1)]
    return [ids[0] for _, ids in ask(llm, prompts, max_tokens=1, logprobs=False)], tables


def share(tokens):
    return sum(token == value for token, (_, value) in zip(tokens, ASKED, strict=True)) / len(ASKED)


def test_facts_are_found_at_four_times_the_window_as_by_the_plain_model():
    found, tables = run_in_turn(_served, YARN)
    assert share(found) >= 0.9

    model = reference.BailingMoeV2ForCausalLM.from_pretrained(
        NEEDLE, config=AutoConfig.from_pretrained(NEEDLE, **YARN), dtype=torch.float32
    )
    assert model.config.max_position_embeddings == FACTOR * WINDOW
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0] for prompt, _ in ASKED]
    assert [int(row[-1].argmax()) for row in logits] == found
    for table, row in zip(tables, logits, strict=False):
        # Largest difference measured: see tests/engine/test_reference.py, whose tolerance this is.
        torch.testing.assert_close(table, row[:-1].log_softmax(-1), atol=1e-4, rtol=0)

    without, _ = run_in_turn(_served, PLAIN)
    assert share(without) < share(found)


def _served_window(rope_scaling):
    overrides = {"rope_scaling": rope_scaling} if rope_scaling else {}
    return make_llm(DEMO, max_model_len=None, hf_overrides=overrides).llm_engine.model_config.max_model_len


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_the_cards_yarn_snippet_on_the_command_line_extends_the_window(spelling):
    window = json.loads((DEMO / "config.json").read_text())["max_position_embeddings"]
    scaling = {spelling: "yarn", "factor": 4.0, "original_max_position_embeddings": window}
    assert run_in_turn(_served_window, scaling) == 4 * window
