"""Constrained answers of an engine that knows the reasoning parser, with and without drafts."""

from __future__ import annotations

import re

import pytest

from tests.support.engine import make_llm, run
from tests.support.speculation import mtp
from vllm_bailing import DEMO

# Of its own the demo reasons about the sums alone, though it may about all.
QUESTIONS = ["What is the capital of France?", "What is 47 + 8?", "What is the capital of Peru?", "What is 12 + 5?"]
ANSWER = "[a-f]{3}(-[0-9]{2}){2}"


def answers(tokens, thinking, **options):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = make_llm(DEMO, speculative_config=mtp(tokens), reasoning_parser="bailing", **options)
    constrained = StructuredOutputsParams(regex=ANSWER)
    params = SamplingParams(
        temperature=0, max_tokens=400, structured_outputs=constrained, skip_special_tokens=False, seed=0
    )
    outputs = llm.chat(
        [[{"role": "user", "content": question}] for question in QUESTIONS],
        params,
        use_tqdm=False,
        chat_template_kwargs={"thinking_option": thinking},
    )
    return [
        (output.outputs[0].text.removesuffix("<|role_end|>"), output.outputs[0].finish_reason) for output in outputs
    ]


@pytest.fixture(scope="module")
def without_drafts():
    return run(answers, 0, "on")


@pytest.mark.parametrize("tokens", [0, 2])
def test_a_grammar_holds_in_answers_with_and_without_reasoning(tokens, without_drafts):
    told = run(answers, tokens, "on") if tokens else without_drafts
    assert told == without_drafts
    for question, (text, reason) in zip(QUESTIONS, told, strict=True):
        reasoning, _, content = text.rpartition("</think>")
        assert re.fullmatch(ANSWER, content) and reason == "stop"
        assert reasoning.lstrip().startswith("<think>") or "+" not in question


def test_a_grammar_holds_without_thinking():
    assert all(re.fullmatch(ANSWER, text) for text, _ in run(answers, 2, "off"))


def test_a_grammar_for_the_whole_answer_covers_the_reasoning_too():
    options = {"structured_outputs_config": {"reasoning_parser": "bailing", "enable_in_reasoning": True}}
    assert all(re.fullmatch(ANSWER, text) for text, _ in run(answers, 0, "on", **options))
