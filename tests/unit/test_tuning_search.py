"""The search with made-up times, whole and cut off."""

from __future__ import annotations

import pytest

from tests.support.tuning import DEFAULT, H20, MINI, ONE, SLOW, TEN, TINY, FakeTimer
from vllm_bailing.errors import TuneError
from vllm_bailing.tuning import search
from vllm_bailing.tuning.search import CandidateFailed, Notes


def found(timer, tmp_path, configs, tokens=(16,)):
    notes = Notes.resume(tmp_path / "partial.jsonl", {"key": 1})
    return search.search(timer, dict.fromkeys(tokens, configs), lambda _: DEFAULT, notes)


def test_a_gain_of_ten_percent_is_kept(tmp_path):
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (TEN, 0.9), (SLOW, 3.0)])
    (row,) = found(timer, tmp_path, [DEFAULT, ONE, TEN, SLOW])
    assert row.is_kept and row.config == TEN
    assert row.ratio == pytest.approx(1 / 0.9) and row.best_ms / row.default_ms == pytest.approx(0.9)
    assert (row.tried, row.failed) == (3, 0)


def test_a_gain_of_one_percent_is_not_kept_and_the_entry_is_the_default(tmp_path):
    (row,) = found(FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (SLOW, 3.0)]), tmp_path, [ONE, SLOW])
    assert not row.is_kept and row.config == DEFAULT
    assert row.best == ONE and row.ratio == pytest.approx(1 / 0.99)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_taken_for_a_gain(seed, tmp_path):
    """Timings scatter by up to 15 % each way, as much as the gain that has to be found."""
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (TEN, 1.0), (SLOW, 1.01)], noise=0.15, seed=seed)
    (row,) = found(timer, tmp_path, [ONE, TEN, SLOW])
    assert not row.is_kept
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (TEN, 0.8), (SLOW, 3.0)], noise=0.15, seed=seed)
    (row,) = found(timer, tmp_path / "gain", [ONE, TEN, SLOW])
    assert row.config == TEN


def test_the_second_pass_decides_and_not_the_first():
    assert search.choose([1.0, 1.0, 1.0, 1.0], [[0.99] * 4, [0.9] * 4]) == (1, pytest.approx(1 / 0.9), True)
    # Much faster now and then, slower at other times.
    assert search.choose([1.0] * 8, [[0.5] * 5 + [1.1] * 3])[2] is False


def test_candidates_that_fail_are_counted_and_passed_over(tmp_path):
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, None), (TEN, 0.9), (SLOW, None)])
    (row,) = found(timer, tmp_path, [ONE, TEN, SLOW])
    assert (row.tried, row.failed, row.config) == (3, 2, TEN)


def test_where_no_candidate_runs_the_default_stays(tmp_path):
    (row,) = found(FakeTimer([(DEFAULT, 1.0), (ONE, None)]), tmp_path, [ONE])
    assert (row.config, row.ratio, row.is_kept) == (DEFAULT, 1.0, False)


def test_all_steps_are_told(tmp_path):
    told = []
    space = {1: [ONE, TEN], 2: [DEFAULT, ONE]}
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, None), (TEN, 0.9)])
    search.search(timer, space, lambda _: DEFAULT, Notes.resume(tmp_path / "n", {}), lambda *step: told.append(step))
    assert sum(count for _, count in told) == search.steps(space)
    assert [tokens for tokens, _ in told] == sorted(tokens for tokens, _ in told)


class Stops(FakeTimer):
    """Pressed Ctrl-C at the given timing."""

    def __init__(self, times, after):
        super().__init__(times)
        self.after = after

    def arm(self, one):
        if len(self.timed) == self.after:
            raise KeyboardInterrupt
        return super().arm(one)


TIMES = [(DEFAULT, 1.0), (ONE, 0.99), (TEN, 0.9), (SLOW, None)]


@pytest.mark.parametrize("after", range(12))
def test_a_run_cut_off_anywhere_goes_on_to_the_same_rows(after, tmp_path):
    whole = found(FakeTimer(TIMES), tmp_path / "whole", [ONE, TEN, SLOW], (1, 2))
    cut = Stops(TIMES, after)
    with pytest.raises(KeyboardInterrupt):
        found(cut, tmp_path, [ONE, TEN, SLOW], (1, 2))
    rest = FakeTimer(TIMES)
    assert found(rest, tmp_path, [ONE, TEN, SLOW], (1, 2)) == whole
    first_pass = [one for one in cut.timed + rest.timed if one[1] == tuple(SLOW.values())]
    assert len(first_pass) == 2, "a candidate was tried twice"


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path):
    file = tmp_path / "n"
    notes = Notes.resume(file, {"a": 1})
    notes.add_time(1, ONE, 0.5)
    with file.open("a") as text:
        text.write('{"tokens": 1, "con')
    notes = Notes.resume(file, {"a": 1})
    assert notes.time(1, ONE) == (True, 0.5) and len(notes) == 1
    notes.add_time(1, TEN, None)
    assert Notes.resume(file, {"a": 1}).time(1, TEN) == (True, None)


@pytest.mark.parametrize(
    "line",
    [
        *("5", "null", "[]", "{}", '{"row": 5}', '{"row": {"tokens": 1}}', '{"tokens": 1, "config": 5, "ms": 1}'),
        *('{"tokens": 1, "config": [16], "ms": "x"}', '{"tokens": 1, "config": [16], "ms": -1}'),
        *('{"tokens": 1, "config": [16], "ms": NaN}', '{"tokens": [], "config": [16], "ms": 1}'),
        "[" * 100_000,
    ],
    ids=lambda line: line[:40],
)
def test_a_line_that_is_no_note_is_dropped_with_all_behind_it(line, tmp_path):
    file = tmp_path / "n"
    Notes.resume(file, {"a": 1}).add_time(1, ONE, 0.5)
    with file.open("a") as text:
        text.write(f"{line}\n")
    Notes(file).add_time(1, TEN, 0.7)
    notes = Notes.resume(file, {"a": 1})
    assert notes.time(1, ONE) == (True, 0.5) and notes.time(1, TEN) == (False, None)
    assert len(file.read_text().splitlines()) == 2


def test_notes_that_cannot_be_kept_are_told_before_any_measurement(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for place, words in (("pipe", "is no file"), (".", "is no file"), ("loop", "cannot be written")):
        with pytest.raises(TuneError, match=f"{words}.*; remove it, or name another folder"):
            Notes.resume(tmp_path / place, {})


def test_results_of_anything_else_do_not_count(tmp_path):
    here = {"gpu": H20, "driver": "1", "vllm": "0.32.0"}
    space = {1: [ONE, TEN]}
    key = search.notes_key(MINI, space, here)
    others = [
        search.notes_key(MINI, space, here | {"driver": "2"}),
        search.notes_key(MINI, space, here | {"vllm": "0.33.0"}),
        search.notes_key(TINY, space, here),
        search.notes_key(MINI, {1: [ONE]}, here),
        search.notes_key(MINI, {2: [ONE, TEN]}, here),
    ]
    assert key == search.notes_key(MINI, {1: [dict(ONE), dict(TEN)]}, dict(here))
    for number, other in enumerate(others):
        file = tmp_path / str(number)
        Notes.resume(file, key).add_time(1, ONE, 0.5)
        assert Notes.resume(file, key).time(1, ONE) == (True, 0.5)
        assert Notes.resume(file, other).time(1, ONE) == (False, None)


def test_what_broke_the_gpu_is_not_tried_again(tmp_path):
    class Breaks(FakeTimer):
        def arm(self, one):
            if one == TEN:
                raise CandidateFailed("illegal memory access", is_fatal=True)
            return super().arm(one)

    with pytest.raises(TuneError, match=r"illegal memory access.*run this again"):
        found(Breaks(TIMES), tmp_path, [ONE, TEN])
    rest = FakeTimer(TIMES)
    (row,) = found(rest, tmp_path, [ONE, TEN])
    assert row.failed == 1 and (16, tuple(TEN.values())) not in rest.timed
