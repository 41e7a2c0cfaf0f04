"""Mixed load on a running server: no wrong answer, no lost request. For longer: scripts/dev/soak.py."""

from __future__ import annotations

from tests.support.soak import KINDS, questions, soak


def test_every_answer_under_mixed_load_is_right(server, plain):
    tally = soak(server.url, questions("demo", plain, 24), seconds=15, clients=8)
    assert (tally.wrong, tally.lost) == ([], [])
    assert set(tally.right) == set(KINDS)
    assert tally.samples[-1]["requests"] > tally.samples[0]["requests"]
