"""Is there a vLLM newer than the checked ones, and what does the static check say about it?

    python scripts/dev/vllm_release.py newest          its version, or nothing; needs pip and the standard library
    python scripts/dev/vllm_release.py report 0.34.0   Markdown on what `check_versions.py static 0.34.0` recorded

A patch release of a checked minor version is not news: the plugin treats it like that version.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "vllm_bailing" / "plugin" / "supported_versions.py"
RESULTS = ROOT / "tests" / "data" / "versions.json"


def last_checked(source: str) -> tuple[int, int]:
    """The last minor version in CHECKED_VLLM, read from `supported_versions.py` without importing it."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHECKED_VLLM":
            major, minor = ast.literal_eval(node.value)[1].split(".")
            return int(major), int(minor)
    raise SystemExit(f"vllm_release: {SUPPORT} sets no CHECKED_VLLM")


def published() -> list[str]:
    """Final releases of vLLM on the package index, as pip lists them."""
    command = [sys.executable, "-m", "pip", "index", "versions", "vllm", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    listed = re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE)
    if not listed:
        raise SystemExit(f"vllm_release: pip could not list the releases of vLLM: {done.stderr.strip()}")
    return listed[1].split(", ")


def newest(versions: Iterable[str], checked: tuple[int, int]) -> str:
    """The newest final release of `versions` whose minor version is past `checked`; empty if there is none."""
    final = [version for version in versions if re.fullmatch(r"\d+(\.\d+)+", version)]
    numbers = {tuple(map(int, version.split("."))): version for version in final}
    last = max(numbers, default=(0, 0))
    return numbers[last] if last[:2] > checked else ""


def report(version: str, results: dict[str, Any], checked: tuple[int, int], run: str = "") -> str:
    """Markdown for an issue: what the static check recorded about `version`, and how to go on."""
    lines = [
        f"vLLM {version} is on PyPI; this package was checked with releases up to {checked[0]}.{checked[1]}.",
        "",
    ]
    result = results.get(version, {}).get("static")
    if result is None:
        lines += ["The static check recorded nothing: it ended before it was done. The log of the run says why."]
    else:
        lines += [f"`scripts/dev/check_versions.py static {version}`, over the CPU build of {result['over']}:", ""]
        lines += ["| step | outcome |", "|---|---|"]
        lines += [f"| {step} | {plain(outcome)} |" for step, outcome in result["steps"].items()]
        lines += [f"| names and signatures | {len(result['errors']) or 'no'} errors |", ""]
        lines += [f"- `{plain(error)}`" for error in result["errors"][:50]]
    lines += ["", 'What to do: "A new vLLM release" in CONTRIBUTING.md.']
    if run:
        lines += ["", f"[Log of the run]({run})"]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """`text` of a program in a line of Markdown: no table cell, code span or mention begins or ends in it."""
    return " ".join(text.replace("|", "/").replace("`", "'").replace("@", "(at)").split())[:300]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("newest", help="print the newest release that was not checked, if any")
    describe = commands.add_parser("report", help="print what the static check recorded")
    describe.add_argument("version")
    describe.add_argument("--run", default="", metavar="URL", help="link to the run")
    options = parser.parse_args(arguments)
    checked = last_checked(SUPPORT.read_text(encoding="utf-8"))
    if options.command == "newest":
        print(newest(published(), checked))
    else:
        results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        print(report(options.version, results, checked, options.run), end="")


if __name__ == "__main__":
    main()
