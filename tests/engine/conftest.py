"""Answers that several files compare with."""

import functools

import pytest

from tests.support.engine import run_in_turn
from tests.support.speculation import answers
from vllm_bailing import DEMO


@pytest.fixture(scope="session")
def plain_answers():
    """Greedy answers of the demo checkpoint to 200 conversations, without speculation."""
    return run_in_turn(answers, DEMO, 200, 0)[0]


@pytest.fixture(scope="session")
def drafted_answers():
    """A function: those answers with so many MTP drafts at a time, and vLLM's counters."""
    return functools.cache(lambda tokens: run_in_turn(answers, DEMO, 200, tokens))
