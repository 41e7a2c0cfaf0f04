"""The search: which configuration is fastest for each number of tokens, with a guard against noise.

Two passes over each number of tokens M. The first times every candidate briefly. The second times the fastest few
against the baseline, in turns and with the same routing. The search takes anything that has the methods of `Timer`, and
so needs no GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_bailing.errors import TuneError
from vllm_bailing.tuning.space import Experts, TileConfig, tile_key

GAIN = 1.02  # how many times as fast as the baseline an entry has to be
FINALISTS = 3  # candidates of a second pass
FIRST_ROUNDS, SECOND_ROUNDS = 5, 30  # timings of each candidate
CALLS = 8  # of the experts, in one timing


class CandidateFailed(Exception):
    """A configuration that does not compile, needs more than the GPU has, or computes something else.

    Attributes:
        is_fatal: Whether the GPU can do nothing more in this process.
    """

    def __init__(self, reason: str, is_fatal: bool = False) -> None:
        super().__init__(reason)
        self.is_fatal = is_fatal


class Timer(Protocol):
    """Times configurations."""

    def start(self, tokens: int, default: TileConfig) -> None:
        """Go on with M tokens; `default` is the configuration whose results are right.

        Raises:
            TuneError: If `default` does not run.
        """
        ...

    def route(self, draw: int) -> None:
        """Send the tokens to other experts: the same ones for the same `draw`."""
        ...

    def arm(self, config: TileConfig) -> Callable[[], float]:
        """A function that times a configuration once, with the routing of that moment, in ms per call.

        Raises:
            CandidateFailed: If it cannot be used; also from the function.
        """
        ...


@dataclass(frozen=True)
class Row:
    """The outcome for one M.

    Attributes:
        default: Configuration of the baseline.
        best: The fastest other one; the baseline where none ran.
        default_ms, best_ms: Medians of the second pass, per call.
        ratio: Median of the baseline's time divided by that of `best`, over the rounds of the second pass.
        is_kept: Whether `best` goes into the table.
        tried, failed: Candidates of the first pass, and those of them that failed.
    """

    tokens: int
    default: TileConfig
    best: TileConfig
    default_ms: float
    best_ms: float
    ratio: float
    is_kept: bool
    tried: int
    failed: int

    @property
    def config(self) -> TileConfig:
        """The entry of the table."""
        return self.best if self.is_kept else self.default


def choose(default_ms: list[float], finalists: list[list[float]]) -> tuple[int, float, bool]:
    """(index of the fastest of `finalists`, its median ratio, whether it is to be kept).

    Args:
        default_ms: Times of the baseline, one a round.
        finalists: Those of each finalist, in the same rounds.
    """
    ratios = [[base / ms for base, ms in zip(default_ms, times, strict=True)] for times in finalists]
    medians = [statistics.median(rounds) for rounds in ratios]
    fastest = max(range(len(medians)), key=medians.__getitem__)
    # Where noise is larger than the gain, a median alone would keep what is no faster.
    lower_quartile = sorted(ratios[fastest])[len(default_ms) // 4]
    return fastest, medians[fastest], medians[fastest] > GAIN and lower_quartile > 1


def search(
    timer: Timer,
    space: dict[int, list[TileConfig]],
    default: Callable[[int], TileConfig],
    notes: Notes,
    advance: Callable[[int, int], object] = lambda _tokens, _steps: None,
) -> list[Row]:
    """Find the configuration for each M of `space`.

    Args:
        default: The baseline for M.
        notes: What an earlier run found; this one adds to it.
        advance: Called with M and a number of steps done, which are `steps(space)` in all.
    Raises:
        TuneError: If the baseline does not run, or the GPU fails altogether.
    """
    rows = []
    for tokens, configs in space.items():
        row = notes.row(tokens)
        if row is None:
            row = _search_one(timer, tokens, configs, default(tokens), notes, lambda steps, m=tokens: advance(m, steps))
            notes.add_row(row)
        else:
            advance(tokens, len(configs) + FINALISTS)
        rows.append(row)
    return rows


def steps(space: dict[int, list[TileConfig]]) -> int:
    """How many steps `search` takes."""
    return sum(len(configs) + FINALISTS for configs in space.values())


def _search_one(
    timer: Timer,
    tokens: int,
    configs: list[TileConfig],
    default: TileConfig,
    notes: Notes,
    advance: Callable[[int], object],
) -> Row:
    timer.start(tokens, default)
    times: dict[tuple[int, ...], float] = {}
    failed = 0
    challengers = [config for config in configs if config != default]
    advance(len(configs) - len(challengers))
    for config in challengers:
        known, ms = notes.time(tokens, config)
        if not known:
            ms = _first_pass(timer, tokens, config, min(times.values(), default=None), notes)
        if ms is None:
            failed += 1
        else:
            times[tile_key(config)] = ms
        advance(1)
    finalists = sorted(
        (config for config in challengers if tile_key(config) in times), key=lambda c: times[tile_key(c)]
    )
    try:
        default_ms, best, best_ms, ratio, is_kept = _second_pass(timer, default, finalists[:FINALISTS])
    except CandidateFailed as error:
        raise TuneError(f"the second pass for {tokens} tokens failed: {error}; run this again to go on") from error
    advance(FINALISTS)
    return Row(tokens, default, best, default_ms, best_ms, ratio, is_kept, len(challengers), failed)


def _first_pass(timer: Timer, tokens: int, config: TileConfig, best_ms: float | None, notes: Notes) -> float | None:
    """Median time of a candidate, None if it failed; one that is far behind is timed only once."""
    try:
        measure, times = timer.arm(config), []
        for draw in range(FIRST_ROUNDS):
            timer.route(draw)
            times.append(measure())
            if best_ms is not None and times[0] > 2 * best_ms:
                break
        ms = statistics.median(times)
    except CandidateFailed as error:
        notes.add_time(tokens, config, None)  # before anything else, so that the next run passes it by
        if error.is_fatal:
            raise TuneError(
                f"{config} for {tokens} tokens broke the GPU's context ({error}); run this again to go on"
            ) from error
        return None
    notes.add_time(tokens, config, ms)
    return ms


def _second_pass(
    timer: Timer, default: TileConfig, finalists: list[TileConfig]
) -> tuple[float, TileConfig, float, float, bool]:
    """(ms of the baseline, the best configuration, its ms, ratio, whether it is kept)."""
    measures, configs = [timer.arm(default)], []
    for config in finalists:
        with contextlib.suppress(CandidateFailed):  # all of them at once need more memory
            measures.append(timer.arm(config))
            configs.append(config)
    times: list[list[float]] = [[] for _ in measures]
    for draw in range(SECOND_ROUNDS):
        timer.route(FIRST_ROUNDS + draw)
        # The order changes, so that what a configuration leaves in the cache falls to each of the others in turn.
        for turn in range(len(measures)):
            arm = (turn + draw) % len(measures)
            times[arm].append(measures[arm]())
    default_ms = statistics.median(times[0])
    if not configs:
        return default_ms, default, default_ms, 1.0, False
    fastest, ratio, is_kept = choose(times[0], times[1:])
    return default_ms, configs[fastest], statistics.median(times[1 + fastest]), ratio, is_kept


class Notes:
    """What was measured, in a file with a line for each result, so that a run can be cut off at any time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._times: dict[tuple[int, ...], float | None] = {}
        self._rows: dict[int, Row] = {}

    @classmethod
    def resume(cls, file: Path, key: dict[str, Any]) -> Notes:
        """Go on with the results in `file`, which is rewritten without a last line that was cut off.

        Where there are none, or they were measured under another `key`, the file is begun anew.

        Raises:
            TuneError: If it cannot be written.
        """
        if file.exists() and not file.is_file():
            raise TuneError(f"{file}, where notes are kept, is no file; remove it, or name another folder")
        notes, lines = cls(file), list(_json_lines(file))
        if not lines or lines[0] != {"key": key}:
            lines = [{"key": key}]
        for number, line in enumerate(lines[1:], 1):
            try:
                notes._read(line)
            except (KeyError, TypeError, AttributeError):  # none of ours: measured again, like all behind it
                del lines[number:]
                break
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise TuneError(f"{file} cannot be written ({error.strerror}); remove it, or name another folder") from None
        return notes

    def _read(self, line: Any) -> None:
        if "row" in line:
            self._rows[line["row"]["tokens"]] = Row(**line["row"])
            return
        if (ms := line["ms"]) is not None and (type(ms) not in (int, float) or not 0 < ms < math.inf):
            raise TypeError(f"{ms!r} is no time")
        self._times[(line["tokens"], *line["config"])] = ms

    def row(self, tokens: int) -> Row | None:
        return self._rows.get(tokens)

    def time(self, tokens: int, config: TileConfig) -> tuple[bool, float | None]:
        """Whether the candidate was timed, and its ms; None if it failed."""
        key = (tokens, *tile_key(config))
        return key in self._times, self._times.get(key)

    def add_time(self, tokens: int, config: TileConfig, ms: float | None) -> None:
        self._times[(tokens, *tile_key(config))] = ms
        self._add({"tokens": tokens, "config": tile_key(config), "ms": ms})

    def add_row(self, row: Row) -> None:
        self._rows[row.tokens] = row
        self._add({"row": asdict(row)})

    def delete(self) -> None:
        """Delete the file, when the table is written."""
        self.file.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._times)

    def _add(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def notes_file(table: Path) -> Path:
    """Where the notes of an unfinished run are kept: beside the table that it is going to write."""
    return table.with_name(f"{table.name.removesuffix('.json')}.partial.jsonl")


def notes_key(experts: Experts, space: dict[int, list[TileConfig]], machine: dict[str, Any]) -> dict[str, Any]:
    """All that results depend on.

    Args:
        machine: See `device_info`.
    """
    searched = json.dumps({tokens: [tile_key(config) for config in configs] for tokens, configs in space.items()})
    method = [GAIN, FINALISTS, FIRST_ROUNDS, SECOND_ROUNDS, CALLS]
    digest = hashlib.sha256(searched.encode()).hexdigest()
    return {"experts": asdict(experts), "machine": machine, "candidates": digest, "method": method}


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        for line in file.read_bytes().split(b"\n"):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError):
                return
