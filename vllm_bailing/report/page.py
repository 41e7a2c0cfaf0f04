"""A report as HTML: one file without scripts, which asks for nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vllm_bailing import ASSETS, __version__
from vllm_bailing.errors import shown
from vllm_bailing.folders import is_path
from vllm_bailing.report import sections
from vllm_bailing.report.inputs import Result
from vllm_bailing.report.live import Live
from vllm_bailing.tools.doctor import Check

_ORDER = ("verify", "plan", "doctor", "compare", "mtp", "acceptance", "balance")
_MAKE = {
    "verify": sections.verify,
    "doctor": sections.doctor,
    "compare": sections.compare,
    "mtp": sections.mtp,
    "acceptance": sections.acceptance,
    "balance": sections.balance,
}
_WANTED = {
    "verify": "vllm-bailing verify MODEL --url URL --json > verify.json",
    "plan": "vllm-bailing plan MODEL --gpu GPU --json > plan.json",
    "doctor": "vllm-bailing doctor MODEL --json > doctor.json",
}


def make(
    results: list[Result],
    live: Live | None = None,
    model: str | None = None,
    checks: Iterable[Check] = (),
    title: str | None = None,
) -> str:
    """The page.

    Args:
        results: What was read.
        live: A running server.
        model: A checkpoint, and what `doctor` finds in it as `checks`.
        title: At the top; made of the model's name if left out.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    parts = [section for kind in _ORDER for section in _sections(kind, results, live)]
    if live:
        parts.insert(0, sections.server(live))
    if model:
        parts.append(sections.checkpoint(model, checks))
    parts += filter(None, [sections.versions(results, live)])
    is_there = {result.kind for result in results} | ({"doctor"} if live or model else set())
    made = datetime.now(timezone.utc)
    environment = Environment(
        loader=FileSystemLoader(ASSETS / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(
        title=title or f"Deployment of {_name(results, live, model)}",
        date=made.strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        sections=parts,
        missing=[(kind, command) for kind, command in _WANTED.items() if kind not in is_there],
    )


def _printable(value: Any) -> Any:
    """Text without control characters, which a file may bring; what is HTML already stays."""
    if type(value) is not str or value.isprintable():
        return value
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in value)


def _sections(kind: str, results: list[Result], live: Live | None) -> list[sections.Section]:
    found = [result for result in results if result.kind == kind]
    return [sections.plan(result, live) if kind == "plan" else _MAKE[kind](result) for result in found]


def _name(results: list[Result], live: Live | None, model: str | None) -> str:
    """The name of the model, from wherever it is told."""
    found = sorted((result for result in results if result.kind in _ORDER), key=lambda one: _ORDER.index(one.kind))
    told = [getattr(result.value, key, "") for result in found for key in ("model", "checkpoint")]
    name = next(filter(None, [model, *told, live.model if live else ""]), "a model")
    return shown(Path(name).name if is_path(name) else name, 80)
