"""Answers that several files compare with."""

import pytest

from tests.support.engine import run
from tests.support.speculation import answers
from vllm_bailing import DEMO


@pytest.fixture(scope="module")
def plain_answers():
    return run(answers, DEMO, 200, 0)[0]
