"""`vllm-bailing info`: what is installed."""

from __future__ import annotations

import json

import typer

from vllm_bailing.cli import options, output


def info(as_json: options.AsJson = False) -> None:
    """Print versions, and what registering with vLLM decided."""
    from vllm_bailing.tools.info import collect_info

    with output.working("importing vLLM"), output.output_aside():
        facts = collect_info()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        typer.echo(typer.style(f"{name:<14}", bold=True) + (shown or "-"))
