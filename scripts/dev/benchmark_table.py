"""The table of docs/benchmarks.md, from the results of `vllm-bailing bench compare` in docs/benchmarks.

python scripts/dev/benchmark_table.py            print it
python scripts/dev/benchmark_table.py --write    put it into the page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from tables import print_or_write, replaced

from vllm_bailing.bench.statistics import PLUGIN

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs" / "benchmarks", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
FIGURES = {
    "decode 1": "decode, batch 1",
    "decode 8": "batch 8",
    "decode 32": "batch 32",
    "prefill 512": "prefill 512",
    "prefill 2": "prefill 2,048",  # or what fits a window of 2,048 with an answer
    "TTFT 1": "first token",
    "load": "load",
    "start": "start",
    "memory": "memory",
}


def lines() -> list[str]:
    """One row for each result: ratios to vLLM's own class, above 1 better, with the noise floor."""
    table = [f"| model, mode, dtype | {' | '.join(FIGURES.values())} |", f"|{'---|' * (1 + len(FIGURES))}"]
    for file in sorted(RESULTS.glob("cpu-*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        mode = "eager" if report["engine"]["enforce_eager"] else "compiled"
        dtype = report["arms"][PLUGIN]["dtype"]
        rows = [row for row in report["rows"] if row["arm"] == PLUGIN]
        cells = [cell(next((row for row in rows if row["figure"].startswith(figure)), None)) for figure in FIGURES]
        name = f"[{report['model']}, {mode}, {dtype}](benchmarks/{file.name})"
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table


def cell(row: dict[str, Any] | None) -> str:
    """A ratio, bold where it is a difference, and in brackets how far the noise reaches."""
    if row is None:
        return ""
    ratio, noise = f"{row['ratio']:.2f}", f"({100 * (row['noise'] - 1):.0f} %)"
    return f"{ratio} {noise}" if row["verdict"] == "no difference" else f"**{ratio}** {noise}"


def with_table(page: str) -> str:
    """`page` with the table between its two marks replaced."""
    return replaced(page, BEGIN, END, lines())


def main(write: Annotated[bool, typer.Option("--write", help="Replace the table in the page.")] = False) -> None:
    """Print or write the table."""
    print_or_write(PAGE, BEGIN, END, lines(), write)


if __name__ == "__main__":
    typer.run(main)
