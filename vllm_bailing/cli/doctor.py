"""`vllm-bailing doctor`: checks of an installation and of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_bailing.cli import options, output

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_bailing.tools.doctor import Check

_WEIGHTS = "weights"


def doctor(
    model: Annotated[str | None, typer.Argument(help="Also check this checkpoint: a folder or a hub name.")] = None,
    hf_overrides: options.HfOverrides = "{}",
    deep: Annotated[bool, typer.Option("--deep", help="Also read all weights: hashes, NaN, infinity, zeros.")] = False,
    url: Annotated[str | None, options.URL] = None,
    served_model_name: options.ServedModelName = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", help="With --url: seconds for each answer; 30 if left out.", min=0.1)
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check this installation or a server, and a checkpoint.

    Each line is ok or says what to do. Reads configuration and file headers, and weights with --deep alone. Exit code 1
    if something is wrong, 2 if the checks themselves failed.
    """
    from vllm_bailing.tools import doctor, doctor_server

    overrides = options.json_object("--hf-overrides", hf_overrides)
    given = {"MODEL": model, "--deep": deep, "--hf-overrides": overrides, "--url": url}
    given |= {"--served-model-name": served_model_name, "--timeout": timeout is not None}
    without = {"MODEL": ("--deep", "--hf-overrides"), "--url": ("--served-model-name", "--timeout")}
    options.refuse_ignored(given, without, {})
    console, checks = output.console(), []
    seconds = timeout or doctor_server.SECONDS
    worker = doctor.Worker() if url is None else None
    steps = {
        "this installation": doctor.environment() if url is None else (),
        f"the server at {url}": doctor_server.server(url, served_model_name, seconds) if url is not None else (),
        "the checkpoint": doctor.checkpoint(model, overrides) if model else (),
        _WEIGHTS: _weights(model) if model and deep else (),
        "what a process of vLLM imports": worker.checks() if worker else (),
    }
    for what, found in steps.items():
        for check in _waited_for(what, iter(found)):
            checks.append(check)
            if not as_json:
                show_check(console, check)
    problems = sum(check.ok is False for check in checks)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks]))
    elif problems:
        console.print(f"{problems} problem{'s' if problems > 1 else ''}", style="red")
    elif any(check.ok is None and check.fix for check in checks):
        console.print('no problem found; see what is under "to do"', style="green")
    else:
        console.print("all is well", style="green")
    raise typer.Exit(1 if problems else 0)


def _waited_for(what: str, found: Iterator[Check]) -> Iterator[Check]:
    """The checks one by one; a terminal shows what is being looked at meanwhile."""
    from vllm_bailing.errors import unreadable
    from vllm_bailing.tools.doctor import Check

    while True:
        # Weights have a progress bar of their own.
        with output.working("" if what == _WEIGHTS else f"looking at {what}"), output.output_aside():
            try:
                check = next(found, None)
            except PermissionError as error:
                check, found = Check("files", False, *unreadable(error)), iter(())
        if check is None:
            return
        yield check


def _weights(model: str) -> Iterator[Check]:
    from rich.progress import Progress

    from vllm_bailing.folders import local_folder
    from vllm_bailing.tools.doctor_weights import weights

    try:
        folder = local_folder(model)
    except ValueError:
        return  # told before
    console = output.console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("weights", total=None)
        found = list(weights(folder, lambda done, total: progress.update(task, completed=done, total=total)))
    yield from found


def show_check(console: Console, check: Check) -> None:
    """A line, and another with what to do."""
    from rich.text import Text

    mark, style = {True: ("ok", "green"), False: ("no", "bold red"), None: ("--", "dim")}[check.ok]
    output.show_beside(console, Text.assemble((f"{mark}  ", style), (f"{check.name:<21} ", "bold")), check.detail)
    if check.fix and check.ok is not True:
        output.show_beside(console, Text.assemble("    ", ("to do: ", style)), check.fix)
