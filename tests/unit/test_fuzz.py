"""Damaged input of every kind: a right result or one clear line. Ten thousand of them: scripts/dev/fuzz.py."""

from __future__ import annotations

import pytest

from tests.support.fuzz import kinds, model_kinds
from tests.support.fuzz.examine import GOOD, Kind, examine, folder_for

pytestmark = pytest.mark.usefixtures("registered")
KINDS = {**model_kinds.KINDS, **kinds.KINDS}
COUNT = 12
# Of those that the script found, each of another kind of mistake.
FOUND: dict[str, tuple[int, ...]] = {}


@pytest.mark.parametrize("name", KINDS)
def test_damaged_input_is_read_right_or_refused_in_one_line(name, tmp_path):
    seeds = (*FOUND.get(name, ()), *range(20_000, 20_000 + COUNT))
    folders = {seed: folder_for(KINDS[name], name, seed, tmp_path) for seed in seeds}
    verdicts = {seed: examine(KINDS[name], folder) for seed, folder in folders.items()}
    assert {seed: verdict for seed, verdict in verdicts.items() if verdict[0] not in GOOD} == {}


@pytest.mark.parametrize("name", KINDS)
def test_an_input_is_a_function_of_its_number_alone(name, tmp_path):
    """Whatever was made before it: else nobody could try one again, and most would be refused for another's damage."""

    def made(folder):
        files = {file.name: file for file in sorted(folder.iterdir())}
        return {
            key: file.read_bytes().replace(str(folder).encode(), b"") if file.is_file() and not file.is_symlink() else 0
            for key, file in files.items()
        }

    first = made(folder_for(KINDS[name], name, 5, tmp_path))
    for seed in range(40):
        folder_for(KINDS[name], name, seed, tmp_path)
    assert made(folder_for(KINDS[name], name, 5, tmp_path)) == first


def _opens(folder):
    (folder / ".." / "outside").resolve().read_text()


def _raises(folder):
    [][1]


def _says_two_lines(folder):
    from vllm_bailing.validation import require_one_of

    require_one_of("a\nb", 1, (2,))


def _waits(folder):
    (folder / "pipe").read_text()


@pytest.mark.parametrize(
    ("read", "judge", "verdict"),
    [
        (_opens, "", "escape"),
        (_raises, "", "traceback"),
        (_says_two_lines, "", "unclear"),
        (_waits, "", "hang"),
        (bool, "not what was meant", "wrong"),
        (bool, "", "right"),
    ],
)
def test_the_verdict_is_what_happened(read, judge, verdict, tmp_path):
    import os

    (tmp_path / "outside").write_text("")
    folder = tmp_path / "input"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    kind = Kind(lambda folder, rng: None, read, lambda folder, found: judge)
    assert examine(kind, folder, wait=0.5)[0] == verdict
