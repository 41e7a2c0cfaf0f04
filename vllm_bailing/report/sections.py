"""The sections of a report: what a template has to place, with every number as text already."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_bailing.bench.statistics import AGAIN, EXPLANATION, IN_TREE
from vllm_bailing.report import inputs
from vllm_bailing.report.inputs import Result
from vllm_bailing.report.live import Live
from vllm_bailing.report.pictures import Picture, drawn
from vllm_bailing.tools.doctor import Check
from vllm_bailing.units import GIB

GOOD, BAD, CLOSE, NONE = "good", "bad", "close", ""
_CLOSE_TO_PLAN = 0.95  # of the planned room for the KV cache; what is estimated in a plan is a few per cent of a GPU
_MOST_ROWS = 200


@dataclass(frozen=True)
class Row:
    cells: list[str]
    status: str = NONE


@dataclass(frozen=True)
class Table:
    """A table; columns of `numbers` are set to the right, and the column `marked` shows the status of a row."""

    caption: str
    headings: list[str]
    rows: list[Row]
    numbers: frozenset[int] = frozenset()
    marked: int = -1


@dataclass(frozen=True)
class Section:
    """A part of the page with its verdict, one of GOOD, BAD, CLOSE and NONE."""

    title: str
    status: str
    verdict: str
    source: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def number(value: Any, digits: int = 3) -> str:
    """A number with separators, or with so many significant digits where it is small."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e15 else f"{value:.{digits}g}"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def size(count: float) -> str:
    """Bytes, in the unit that suits."""
    return f"{count / GIB:,.2f} GiB" if abs(count) >= GIB / 100 else f"{count / 2**20:,.2f} MiB"


def _between(low: float, high: float) -> str:
    return f"{number(low)} to {number(high)}"


# ---- plan ------------------------------------------------------------------------------------------------------


def plan(result: Result, live: Live | None) -> Section:
    """A plan, beside what a running server reports."""
    made: inputs.PlanShape = result.value
    status = {"fits": GOOD, "tight": CLOSE}.get(made.verdict, BAD)
    asked = f"{made.concurrency:,} requests of {made.context:,} tokens"
    parts = [("weights", made.weights), ("other, estimated", made.other)]
    memory = [row for name, counts in parts for row in _memory(name, counts)]
    memory.append(Row(["left for the KV cache", "", size(made.kv_room_bytes)]))
    verdict = f"{made.verdict}: {asked}" + (f" ({made.reason})" if made.reason else "")
    if live and (differences := _differences(made, live)):
        status, verdict = BAD, f"{verdict}; the server is not what was planned: {' and '.join(differences)}"
    return Section(
        f"Plan for {made.gpus} x {made.gpu.name}",
        status,
        verdict,
        result.file,
        [
            ("model", made.model),
            ("layout", made.layout),
            ("weights", f"{made.dtype}, {size(sum(made.weights.values()))} on each GPU"),
            ("KV cache", f"{made.kv_dtype}, room for {made.kv_tokens:,} tokens"),
            *[
                (f"bound at batch {bound.batch:,}", f"{number(bound.tokens_per_s)} tokens/s, by {bound.limit}")
                for bound in (made.single, made.batch)
            ],
            ("command", made.serve),
        ],
        [
            *([_against(made, live)] if live else []),
            Table("Memory of a GPU", ["", "part", "size"], memory, frozenset({2})),
        ],
        notes=made.notes,
    )


def _memory(name: str, counts: dict[str, int]) -> list[Row]:
    parts = [(part.replace("_", " "), count) for part, count in counts.items() if count]
    return [Row([name, "", size(sum(counts.values()))]), *(Row(["", part, size(count)]) for part, count in parts)]


def _differences(made: inputs.PlanShape, live: Live) -> list[str]:
    """What of a server can make its numbers those of another deployment: its model, and too short a window."""
    planned, served = _bare(made.model), {_bare(name) for name in (live.model, live.root) if name}
    found = []
    if planned not in served | {"MODEL"}:
        found.append(f"it serves {live.model}, and the plan is for {made.model}")
    if live.window and live.window < made.context:
        found.append(f"its window is {live.window:,} tokens, and the plan's requests have {made.context:,}")
    return found


def _bare(name: str) -> str:
    """A model's name without its owner or the folders that it lies in."""
    return Path(name.removesuffix("/config.json")).name.removesuffix(".json")


def _against(made: inputs.PlanShape, live: Live) -> Table:
    """The plan against the server, which is one replica of it."""
    room = made.kv_tokens // max(made.replicas, 1)
    window = live.window
    held = live.kv_tokens // window if live.kv_tokens and window else None
    rows = [
        Row(["model", made.model, live.model, ""]),
        _compared("longest request, tokens", made.context, window, at_least=1.0),
        _compared("KV cache, tokens" + (" of a replica" if made.replicas > 1 else ""), room, live.kv_tokens),
        _compared("such requests at once", made.largest_concurrency // max(made.replicas, 1), held),
        _told("data type of the KV cache", made.kv_dtype, live.kv_dtype),
        _told("share of the memory", number(made.memory_utilization), _number(live.memory_utilization)),
        _told("draft tokens", str(made.draft_tokens), str(live.draft_tokens)),
        _speed(made.single.tokens_per_s, live.tokens_per_s),
        Row(["answers since the start", "", number(live.requests), ""]),
    ]
    return Table(f"Plan against {live.url}", ["", "plan", "server", "server / plan"], rows, frozenset({1, 2, 3}))


def _compared(name: str, planned: int, found: int | None, at_least: float = _CLOSE_TO_PLAN) -> Row:
    if found is None or not planned:
        return Row([name, number(planned), _number(found), ""])
    ratio = found / planned
    return Row([name, number(planned), number(found), f"{ratio:.2f}"], GOOD if ratio >= at_least else BAD)


def _told(name: str, planned: str, found: str | None) -> Row:
    status = NONE if found is None else GOOD if found == planned else CLOSE
    return Row([name, planned, "not told" if found is None else found, ""], status)


def _speed(bound: float, found: float | None) -> Row:
    ratio = f"{found / bound:.2f}" if found and bound > 0 else ""
    return Row(["tokens/s of a request", f"{number(bound)} at most", _number(found and round(found, 1)), ratio])


def _number(value: float | None) -> str:
    return "not told" if value is None else number(value)


def server(live: Live) -> Section:
    """What `doctor --url` finds."""
    return _checks(f"Server {live.url}", live.checks)


# ---- verify ----------------------------------------------------------------------------------------------------


def verify(result: Result) -> Section:
    """The verdict on a deployment, what decided it, and the deviations by prompt."""
    found: inputs.VerifyShape = result.value
    verdict = "computes the checkpoint" if found.computes else f"does not compute the checkpoint: {found.reason}"
    hidden = len(found.prompts) - _MOST_ROWS
    further, tables = _further(found.model_extra or {})
    facts = [("checkpoint", found.checkpoint), ("deployment", found.deployment), ("computed in", found.dtype)]
    facts += [("looks like", found.looks_like)] if found.looks_like else []
    facts += [("the prompts touched", _touched(found.coverage))] if found.coverage else []
    return Section(
        "Verify",
        GOOD if found.computes else BAD,
        verdict,
        result.file,
        [*facts, *further],
        [*_measures(found), _deviations(found), *tables],
        [drawn("verify", result.read)],
        [
            *([f"not checked: {found.not_checked}"] if found.not_checked else []),
            *([f"{hidden:,} further prompts are in the file"] if hidden > 0 else []),
        ],
    )


def _touched(coverage: inputs.CoverageShape) -> str:
    least = f", at least {share(min(coverage.experts))} of the experts of every layer" if coverage.experts else ""
    return f"{share(coverage.vocabulary)} of the vocabulary{least}"


def _measures(found: inputs.VerifyShape) -> list[Table]:
    """What decides, and the parts of the model that differ most."""
    rows = [
        Row([name.replace("_", " "), number(came), number(most), *_within(came <= most)], NONE if came <= most else BAD)
        for name, (came, most) in found.measures.items()
    ]
    shifts = [
        Row(
            [
                one.part,
                *map(number, (one.size, one.error, one.significance)),
                "" if one.share is None else share(one.share),
            ]
        )
        for one in found.shifts
    ]
    tables = [
        Table(
            "What decides, in units of the checkpoint's own rounding",
            ["", "came", "at most", ""],
            rows,
            frozenset({1, 2}),
        ),
        Table(
            "Where it differs most",
            ["part", "size", "error", "significance", "explains"],
            shifts,
            frozenset({1, 2, 3, 4}),
        ),
    ]
    return [table for table in tables if table.rows]


def _deviations(found: inputs.VerifyShape) -> Table:
    limits, headings = found.tolerance, ["prompt", "tokens", "mean |Δ|", "max |Δ|", "KL", "same top-1"]
    caption = "Δ: served minus reference log-probability, in nats"
    if limits:
        caption += f"; limits for {found.dtype}: mean |Δ| {limits.mean:g}, mean KL {limits.divergence:g}"
        headings.append("limits")

    def row(title: str, one: inputs.ComparisonShape) -> Row:
        values = [number(one.mean), number(one.max), number(one.divergence), share(one.agreement)]
        is_within = limits is None or (one.mean <= limits.mean and one.divergence <= limits.divergence)
        status = NONE if is_within else BAD if title == "all" else CLOSE
        return Row([title, number(one.tokens), *values, *(_within(is_within) if limits else ())], status)

    rows = [row(str(place), one) for place, one in enumerate(found.prompts[:_MOST_ROWS], 1)]
    rows += [row("words", found.words)] if found.words else []
    return Table(caption, headings, [*rows, row("all", found.overall)], frozenset(range(1, 6)))


def _within(is_within: bool) -> list[str]:
    return ["within" if is_within else "above"]


def _further(extra: dict[str, Any]) -> tuple[list[tuple[str, str]], list[Table]]:
    """What a newer command says besides: plain values, and lists of objects as tables."""
    facts: list[tuple[str, str]] = []
    tables = []
    for key, value in extra.items():
        name = key.replace("_", " ")
        if isinstance(value, str | int | float):
            facts.append((name, number(value)))
        elif isinstance(value, dict) and value and all(isinstance(one, str | int | float) for one in value.values()):
            facts.append((name, ", ".join(f"{part.replace('_', ' ')} {number(one)}" for part, one in value.items())))
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            headings = list(value[0])
            rows = [Row([number(one.get(part, "")) for part in headings]) for one in value[:_MOST_ROWS]]
            tables.append(Table(name, [part.replace("_", " ") for part in headings], rows))
    return facts, tables


# ---- doctor ----------------------------------------------------------------------------------------------------


def doctor(result: Result) -> Section:
    """Findings of `doctor --json`."""
    found = [Check(one.name, one.ok, one.detail, one.fix) for one in result.value]
    return _checks("Doctor", found, result.file)


def checkpoint(model: str, checks: Iterable[Check]) -> Section:
    """What `doctor MODEL` finds in the files."""
    return _checks(f"Checkpoint {model}", list(checks))


def _checks(title: str, checks: list[Check], source: str = "") -> Section:
    problems = sum(check.ok is False for check in checks)
    marks = {True: ("ok", GOOD), False: ("no", BAD), None: ("--", NONE)}
    rows = []
    for check in checks:
        mark, status = marks[check.ok]
        todo = f"; to do: {check.fix}" if check.fix and check.ok is not True else ""
        rows.append(Row([mark, check.name, check.detail + todo], status))
    verdict = f"{problems} problem{'s' if problems > 1 else ''}" if problems else "all is well"
    table = Table("Findings", ["", "check", "found"], rows, marked=0)
    return Section(title, BAD if problems else GOOD, verdict, source, tables=[table])


# ---- bench -----------------------------------------------------------------------------------------------------


def compare(result: Result) -> Section:
    """A comparison with vLLM's own class."""
    found: inputs.CompareShape = result.value
    colors = {"faster": GOOD, "less": GOOD, "slower": BAD, "more": BAD}
    rows = []
    for one in found.rows:
        is_base, is_again = one.arm == IN_TREE, one.arm == AGAIN
        verdict = f"noise {100 * (one.noise - 1):.1f} %" if is_again else one.verdict
        ratio = ["1", ""] if is_base else [f"{one.ratio:.2f}", f"{one.interval[0]:.2f} to {one.interval[1]:.2f}"]
        values = [f"{number(one.median)} {one.unit}", _between(one.low, one.high), *ratio, verdict]
        rows.append(Row([one.figure, one.arm, *values], colors.get(one.verdict, NONE)))
    said = [one for one in found.rows if one.arm not in (IN_TREE, AGAIN)]
    faster, slower = (sum(colors.get(one.verdict) == color for one in said) for color in (GOOD, BAD))
    verdict = f"{faster} better, {slower} worse, {len(said) - faster - slower} without a difference, of {len(said)}"
    headings = ["figure", "arm", "median", "range", "ratio to in-tree", "95 %", "verdict"]
    return Section(
        f"Compared with vLLM's own class: {found.model}",
        BAD if slower else GOOD if faster else NONE,
        verdict,
        result.file,
        [*([("command", found.command)] if found.command else []), *([("date", found.date)] if found.date else [])],
        [Table("Figures", headings, rows, frozenset({2, 3, 4, 5}))],
        [drawn("compare", result.read)],
        [EXPLANATION, *found.notes],
    )


def mtp(result: Result) -> Section:
    """Draft tokens and what they gain."""
    found: inputs.MtpShape = result.value
    rows = []
    for one in found.rows:
        speed, ratio = one.tokens_per_second, one.ratio
        accepted = " ".join(share(value) for value in one.acceptance)
        rows.append(
            Row(
                [
                    number(one.batch_size),
                    one.arm,
                    number(speed.median),
                    _between(speed.low, speed.high),
                    f"{ratio.median:.2f}",
                    f"{ratio.low:.2f} to {ratio.high:.2f}",
                    f"{one.acceptance_length:.2f}",
                    accepted,
                ]
            )
        )
    headings = ["batch", "draft tokens", "tokens/s", "range", "times none", "range", "tokens of a step", "accepted"]
    advice = [(f"batch {batch}", text) for batch, text in found.advice.items()]
    return Section(
        f"Drafts of the MTP layer: {found.model or result.file}",
        NONE,
        "; ".join(f"{name}: {text}" for name, text in advice) or f"{len(rows)} measured",
        result.file,
        [],
        [Table("By batch and number of draft tokens", headings, rows, frozenset(range(8)))],
        [drawn("mtp", result.read)],
        ["times none: paired with the same batch without drafts; accepted: up to each position"],
    )


def acceptance(result: Result) -> Section:
    """Drafts that a running server accepted."""
    rows = []
    deepest = max((len(one.acceptance) for one in result.value.values()), default=0)
    for kind, one in result.value.items():
        pairs = zip(one.acceptance, one.interval, strict=False)
        cells = [f"{share(value)} ({share(low)} to {share(high)})" for value, (low, high) in pairs]
        rows.append(Row([kind, number(one.drafts), *cells, *[""] * (deepest - len(cells))]))
    headings = ["text", "drafts", *(f"position {place}" for place in range(1, deepest + 1))]
    table = Table("Accepted up to a position, with its 95 % interval", headings, rows, frozenset(range(1, deepest + 2)))
    return Section("Drafts of a running server", NONE, f"{len(rows)} kinds of text", result.file, tables=[table])


# ---- balance ---------------------------------------------------------------------------------------------------


def balance(result: Result) -> Section:
    """Which experts were picked, and how even that keeps the ranks of expert parallelism."""
    found: inputs.BalanceShape = result.value
    load = [
        Row([number(one.layer), f"{one.most:.2f}", number(one.busiest), f"{one.least:.2f}", number(one.never)])
        for one in found.load
    ]
    ranks = []
    for one in found.ranks:
        worth = one.worth
        copies = f"{worth.imbalance:.2f}, {number(worth.redundant)}, {size(worth.bytes)}" if worth.redundant else "none"
        loads = [f"{value:.2f}" for value in (one.linear, one.round_robin, one.eplb[0].imbalance)]
        wait = f"{share(one.waiting)} to {share(one.waiting_with_eplb)}"
        ranks.append(Row([number(one.ep), *loads, copies, f"{one.even:.2f}", wait]))
    most = max(found.load, key=lambda one: one.most)
    headings = ["ranks", "in order", "round robin", "EPLB", "with copies", "by chance", "waiting"]
    return Section(
        f"Load of the experts: {found.model}",
        NONE,
        f"the busiest expert, of layer {number(most.layer)}, is picked {most.most:.2f} times an even share",
        result.file,
        [
            ("recorded", f"{number(found.tokens)} tokens of {number(found.requests)} requests"),
            ("router", f"{number(found.experts_per_token)} of {number(found.experts)} experts for each token"),
        ],
        [
            Table(
                "Picks of the busiest and the least picked expert of each layer, times an even share",
                ["layer", "busiest", "expert", "least", "never picked"],
                load[:_MOST_ROWS],
                frozenset(range(5)),
            ),
            Table(
                f"The busiest rank, times an even share, in steps of {number(found.step_tokens)} tokens",
                headings,
                ranks[:_MOST_ROWS],
                frozenset(range(len(headings))),
            ),
        ],
        [drawn("balance", result.read)],
        [
            "with copies: of as many experts of each layer as are worth having, and what they take of each GPU",
            "waiting: of the average rank in expert layers, in order and with EPLB and these copies",
            "other prompts pick other experts",
        ],
    )


# ---- versions --------------------------------------------------------------------------------------------------


def versions(results: list[Result], live: Live | None) -> Section | None:
    """Which versions each result came from; None if none says."""
    told: dict[str, dict[str, Any]] = {}
    for result in results:
        found = result.value if result.kind == "info" else getattr(result.value, "versions", None)
        if found:
            told[result.file] = found
    if live:
        named = {"vllm": "server", "vllm-bailing": "plugin"}
        details = {check.name: check.detail for check in live.checks if check.ok}
        told[live.url] = {package: details[check].split()[-1] for package, check in named.items() if check in details}
    if not told:
        return None
    packages = list(dict.fromkeys(name for found in told.values() for name in found))
    names = [name for name in packages if any(isinstance(found.get(name), str) for found in told.values())]
    names = [name for name in names if any(found.get(name) for found in told.values())]
    rows = [Row([where, *(str(found.get(name) or "") for name in names)]) for where, found in told.items()]
    differ = [name for name in names if len({found[name] for found in told.values() if found.get(name)}) > 1]
    verdict = f"results of different versions: {', '.join(differ)}" if differ else "the same throughout"
    table = Table("Versions by result", ["", *names], rows)
    return Section("Versions", CLOSE if differ else NONE, verdict, tables=[table])
