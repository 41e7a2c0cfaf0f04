"""What unit tests share: they do without vLLM, whose import takes longer than a hundred of them."""

import sys

import pytest

HEAVY = "vllm.config"  # the bare package, in whose folder its sources are looked up, costs next to nothing


@pytest.fixture(autouse=True)
def _without_vllm():
    before = HEAVY in sys.modules  # by tests of the other rooms
    yield
    assert before or HEAVY not in sys.modules, "this test imports vLLM: it belongs into tests/engine"
