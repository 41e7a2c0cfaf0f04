"""What unit tests share: they do without vLLM, whose import takes longer than a hundred of them."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _without_vllm():
    before = "vllm" in sys.modules  # by tests of the other rooms
    yield
    assert before or "vllm" not in sys.modules, "this test imports vLLM: it belongs into tests/engine"
