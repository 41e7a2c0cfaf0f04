"""What the commands print with: 80 columns, no colors where none are wanted.

rich is imported where it is used: it takes longer than all of `--help`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import typer

from vllm_bailing.errors import reason_of
from vllm_bailing.units import GIB

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console(stderr: bool = False) -> Console:
    """A terminal, or a file, to print on; numbers in a text are not colored, and [brackets] are brackets.

    Texts break at blanks to fit into the lines of a terminal, and nowhere in a file or where a word does not fit;
    `soft_wrap=True` is for commands, which break nowhere, so that they can be copied.
    """
    from rich.console import Console
    from rich.text import Text

    class OwnConsole(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            if all(isinstance(one, (str, Text)) for one in objects):
                longest = max((len(word) for one in objects for word in str(one).split()), default=0)
                options = {"soft_wrap": not self.is_terminal or longest > self.width, **options}
            super().print(*objects, **options)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # see `orderly_end`; rich would end the process

    return OwnConsole(highlight=False, markup=False, stderr=stderr)


def show_beside(console: Console, lead: Any, text: str) -> None:
    """`text` after `lead`, a `Text`, under which the further lines of a terminal are indented.

    What stands in backticks or single quotes is not broken: it is to be copied.
    """
    from rich.text import Text

    if not console.is_terminal:
        console.print(Text.assemble(lead, text))
        return
    kept = re.sub(r"`[^`]*`|(?<!\w)'[^']*'(?!\w)", lambda quoted: quoted[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    lines = textwrap.wrap(kept, max(20, console.width - lead.cell_len), break_long_words=False, break_on_hyphens=False)
    indented = f"\n{' ' * lead.cell_len}".join(lines or [""])
    console.print(Text.assemble(lead, indented.replace("\N{NO-BREAK SPACE}", " ")), soft_wrap=True)


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
    if type(reason).__name__ == "ValidationError":  # pydantic's, on several lines
        reason = reason_of(reason)
    typer.echo(folded(f"{' '.join(filter(None, ('vllm-bailing', command)))}: {reason}", sys.stderr), err=True)
    return typer.Exit(code)


def folded(text: str, stream: TextIO, indent: int = 0) -> str:
    """`text` in lines that break at blanks at the width of a terminal, the further ones indented; as it is elsewhere.

    A word that is longer, such as a path, stays whole.
    """
    if not stream.isatty():
        return text
    width, rest = shutil.get_terminal_size().columns, " " * indent
    lines = [
        textwrap.fill(line, width, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    ]
    return "\n".join(lines)


def require_others(command: str, option: str, written: Iterable[Path], read: Iterable[Path | str | None]) -> None:
    """Refuse to write over a file that is read."""
    there = [Path(file) for file in read if file and Path(file).exists()]
    for file in written:
        if file.exists() and any(file.samefile(one) for one in there):
            raise fail(command, f"{option} {file} is a file that is read; name another one", 2)


INTERRUPTED = 130  # exit code of what Ctrl-C ended, as in a shell
CLOSED_PIPE = 141  # and of what nobody reads any more


def interrupted(command: str, then: str = "") -> typer.Exit:
    """Say that Ctrl-C ended it, and how to go on `then`; to be raised."""
    return fail(command, f"interrupted{then and '; '}{then}", INTERRUPTED)


def require_place(command: str, option: str, file: Path) -> None:
    """Make the folder of a file that will be written, and refuse one that cannot be written into."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise fail(command, f"{option} {file}: {error.strerror}; name another file", 2) from None


def leave_on(*numbers: signal.Signals) -> None:
    """Let these signals end the process by SystemExit, so that what it started or began to write goes with it.

    One that is ignored stays so, as nohup leaves it; but not SIGINT, which scripts ignore for what runs beside them.
    """
    for number in numbers:
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def orderly_end(command: Callable[[], str]) -> Iterator[None]:
    """Ends the body orderly if it is interrupted, or if what reads its output goes away, as `head` does.

    Standard output is written when this returns: at the end of the process it would be too late.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # as it is where it was closed
                sys.stdout.flush()
    except KeyboardInterrupt:
        raise interrupted(command()) from None
    except BrokenPipeError:
        # What is left in the buffer would fail once more.
        _drop_output()
        raise SystemExit(CLOSED_PIPE) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise
        _drop_output()
        where = error.filename or "the output"
        raise fail(command(), f"{where}: {error.strerror}; make room, or write elsewhere", 2) from None


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


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
