"""The command `vllm-bailing`: what is installed, what registration decided, where the demo checkpoint lies.

Heavy packages are imported inside the command that needs them, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from vllm_bailing import __version__

DEMO = Path(__file__).parent / "demo"
PACKAGES = ("vllm", "torch", "transformers")

app = typer.Typer(
    name="vllm-bailing",
    help="BailingMoeV2 (Ling 2.0, Ring 2.0, Ling-1T) for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-bailing {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo_path() -> None:
    """Print the folder of the demo checkpoint, for example for `vllm serve $(vllm-bailing demo-path)`."""
    if not (DEMO / "config.json").is_file():
        raise SystemExit(f"vllm-bailing: no demo checkpoint in {DEMO}; reinstall vllm-bailing")
    typer.echo(DEMO)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Print the installed versions and what registering with vLLM decided."""
    facts = collect_info()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        typer.echo(typer.style(f"{name:<14}", bold=True) + (shown or "-"))


def collect_info() -> dict[str, str | list[str] | None]:
    """Versions of what is installed (None: not installed), the Python, and the decision of `register`."""
    facts: dict[str, str | list[str] | None] = {"vllm-bailing": __version__}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["python"] = sys.version.split()[0]
    if facts["vllm"] is None:
        return facts | {"active": [], "reason": "vllm is not installed", "warning": ""}
    with redirect_stdout(sys.stderr):  # vLLM logs to standard output
        from vllm_bailing import compat

        decided = compat.status()
    return facts | {"active": list(decided.active), "reason": decided.reason, "warning": decided.warning}


def main() -> None:
    """Entry point of the console script."""
    app()
