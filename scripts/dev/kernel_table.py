"""The tables of docs/gpus.md: which kernels vLLM chooses, as scripts/gpu/rehearse.sh recorded them.

python scripts/dev/kernel_table.py            print them
python scripts/dev/kernel_table.py --write    put them into the page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from tables import print_or_write, replaced

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "tests" / "data" / "cuda_build.json", ROOT / "docs" / "gpus.md"
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
KINDS = ("attention", "norms and rotation", "router", "linear", "experts")
PLAIN = {"UnquantizedLinearMethod": "cuBLAS"}


def lines() -> list[str]:
    """A table for each release, newest first; a row for each deployment and choice, with the GPUs that share it."""
    text: list[str] = []
    for version, by_gpu in reversed(json.loads(RESULTS.read_text(encoding="utf-8")).items()):
        text += [
            "",
            f"vLLM {version}:",
            "",
            f"| deployment | GPU | {' | '.join(KINDS)} |",
            f"|{'---|' * (2 + len(KINDS))}",
        ]
        deployments = dict.fromkeys(title for rows in by_gpu.values() for title in rows)
        for title in deployments:
            choices: dict[tuple[str, ...], list[str]] = {}
            for gpu, rows in by_gpu.items():
                if title in rows:
                    choice = tuple(PLAIN.get(rows[title][kind], rows[title][kind]) for kind in KINDS)
                    choices.setdefault(choice, []).append(gpu)
            text += [f"| {title} | {', '.join(gpus)} | {' | '.join(choice)} |" for choice, gpus in choices.items()]
    return [*text, ""]


def with_tables(page: str) -> str:
    """`page` with the tables between its two marks replaced."""
    return replaced(page, BEGIN, END, lines())


def main(write: Annotated[bool, typer.Option("--write", help="Replace the tables in docs/gpus.md.")] = False) -> None:
    """Print the tables, or write them into the page."""
    print_or_write(PAGE, BEGIN, END, lines(), write)


if __name__ == "__main__":
    typer.run(main)
