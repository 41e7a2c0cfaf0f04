"""What the commands print with: 80 columns, no colors where none are wanted.

rich is imported where it is used: it takes longer than all of `--help`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vllm_bailing.units import GIB

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console(stderr: bool = False) -> Console:
    """A terminal, or a file, to print on; numbers in a text are not colored."""
    from rich.console import Console

    class OwnConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # see `orderly_end`; rich would end the process

    return OwnConsole(highlight=False, stderr=stderr)


def table(*headings: str, padding: tuple[int, ...] = (0, 1), justify: Any = "left") -> Table:
    """A table with a line under its headings and no other frame."""
    from rich import box
    from rich.table import Table

    frame = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False)
    for heading in headings:
        frame.add_column(heading, justify=justify, no_wrap=True)
    return frame


def gib(count: int) -> str:
    """`count` bytes in GiB with two digits, without the unit."""
    return f"{count / GIB:.2f}"


def show_files(files: Iterable[Path]) -> None:
    """Where a result was written."""
    typer.echo(f"written to {' and '.join(map(str, files))}")


def fail(command: str, reason: Any, code: int) -> typer.Exit:
    """Print the reason on standard error; to be raised."""
    typer.echo(f"vllm-bailing {command}: {reason}", err=True)
    return typer.Exit(code)


INTERRUPTED = 130  # exit code of what Ctrl-C ended, as in a shell
CLOSED_PIPE = 141  # and of what nobody reads any more


def interrupted(command: str, then: str = "") -> typer.Exit:
    """Say that Ctrl-C ended it, and how to go on `then`; to be raised."""
    return fail(command, f"interrupted{then and '; '}{then}", INTERRUPTED)


@contextmanager
def orderly_end(command: str) -> Iterator[None]:
    """Ends the body orderly if it is interrupted, or if what reads its output goes away, as `head` does.

    Standard output is written when this returns: at the end of the process it would be too late.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise interrupted(command) from None
    except BrokenPipeError:
        # What is left in the buffer would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(CLOSED_PIPE) from None


@contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner with `text` while the body runs, on standard error if that is a terminal and there is a text."""
    if not text or not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(text):
        yield


@contextmanager
def output_aside() -> Iterator[None]:
    """Standard output goes to standard error: vLLM logs there, as do the processes that it starts."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
