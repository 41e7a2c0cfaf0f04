"""Mixed load on a running server: no wrong answer, no lost request. For longer: scripts/dev/soak.py."""

from __future__ import annotations

import pytest

from tests.support.adapters import merged
from tests.support.conversations import plain_model
from tests.support.soak import ADAPTER, BASE, PARSED, SWAPPED, questions, soak
from vllm_bailing import DEMO, DEMO_ADAPTER


@pytest.fixture(scope="module")
def sailor(tmp_path_factory):
    """The plain model that the adapter was merged into."""
    return plain_model(merged(DEMO, DEMO_ADAPTER, tmp_path_factory.mktemp("merged") / "model"))


def loaded(server, asked, seconds, kinds):
    tally = soak(server.url, asked, seconds, clients=8, kinds=kinds)
    assert (tally.wrong, tally.lost) == ([], [])
    assert set(tally.right) == set(kinds)
    assert tally.samples[-1]["requests"] > tally.samples[0]["requests"]


def test_every_answer_under_mixed_load_is_right(server, plain):
    loaded(server, questions("demo", plain, 24), 10, BASE)


def test_calls_reasoning_and_adapters_under_load_are_right(assistant_server, plain, sailor):
    asked = questions("demo", plain, 24) + questions(ADAPTER, sailor, 12)
    loaded(assistant_server, asked, 10, (*PARSED, *SWAPPED, "whole", "aborted"))
