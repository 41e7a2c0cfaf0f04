"""The verdict on one damaged input."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

VERDICTS = ("right", "refused", "wrong", "unclear", "traceback", "hang", "memory", "escape")
GOOD = ("right", "refused")
CPU_SECONDS = 10
LONGEST = 1500  # characters of a message
_ROOT = Path(__file__).parents[3]
_PACKAGE = str(_ROOT / "vllm_bailing")
# What Python and its libraries read of their own accord.
_OWN = (
    str(_ROOT),
    sys.prefix,
    sys.base_prefix,
    "/usr/",
    "/lib",
    "/dev/null",
    "/dev/urandom",
    "/proc/self/",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/",
)
_RUNS_CODE = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
    "os.fork",
)


@dataclass(frozen=True)
class Kind:
    """What is damaged.

    Attributes:
        make: Writes a damaged input into an empty folder.
        read: What the package does with it; what it raises is what a user would see.
        judge: What is wrong with the result that `read` returned, or nothing. Does not use the package's own reading.
        files: Further paths that `read` may open.
    """

    make: Callable[[Path, random.Random], None]
    read: Callable[[Path], Any]
    judge: Callable[[Path, Any], str]
    files: tuple[str, ...] = ()


class Hang(BaseException):
    """It took more than `CPU_SECONDS`, or waited for ever."""


def folder_for(kind: Kind, name: str, seed: int, parent: Path) -> Path:
    """The input with this number, written into a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix=f"input-{seed}-", dir=parent))
    kind.make(folder, random.Random(f"{name} {seed}"))
    return folder


def examine(kind: Kind, folder: Path, wait: float = 15) -> tuple[str, str]:
    """One of `VERDICTS` on an input, and what is to be said about it.

    Args:
        wait: Seconds after which something that takes no time of the processor is a hang too.
    """
    said = _Said()
    logging.getLogger("vllm.plugins.bailing").addHandler(said)
    try:
        with watched(folder, kind.files) as seen, _limited(wait), _quiet():
            result = kind.read(folder)
        if not seen:
            verdict = _told(said.lines) or _judged(kind, folder, result)
    except Hang:
        return "hang", traceback.format_exc(limit=-3)
    except BaseException as error:  # pyo3 panics with one that is no Exception
        verdict = _of_error(error)
    finally:
        logging.getLogger("vllm.plugins.bailing").removeHandler(said)
    return ("escape", "; ".join(seen)) if seen else verdict


def _judged(kind: Kind, folder: Path, result: Any) -> tuple[str, str]:
    problem = kind.judge(folder, result)
    return ("wrong", problem) if problem else ("right", "")


def _of_error(error: BaseException) -> tuple[str, str]:
    if isinstance(error, MemoryError):
        return "memory", traceback.format_exc(limit=-5)
    last = traceback.extract_tb(error.__traceback__)[-1]
    is_meant = isinstance(error, (ValueError, RuntimeError)) and last.filename.startswith(_PACKAGE)
    is_meant = is_meant or type(error).__name__ == "BadParameter"
    if not is_meant or isinstance(error, (RecursionError, json.JSONDecodeError, UnicodeError, NotImplementedError)):
        return "traceback", "".join(traceback.format_exception(error, limit=-6))[-3000:]
    return _told([str(error)]) or ("refused", str(error))


def _told(lines: list[str]) -> tuple[str, str] | None:
    bad = next((line for line in lines if not line.isprintable() or len(line) > LONGEST), None)
    return None if bad is None else ("unclear", f"{len(bad)} characters: {bad[:300]!r}")


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _limited(wait: float) -> Iterator[None]:
    def hang(number: int, frame: Any) -> None:
        raise Hang

    before = [signal.signal(number, hang) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, wait)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


# ---- what is opened -------------------------------------------------------------------------------------------------

_watching: list[tuple[tuple[str, ...], list[str]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    allowed, seen = _watching[-1]
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 (links are not to be followed)
        if not path.startswith(allowed):
            seen.append(f"opened {path}")
    elif event in _RUNS_CODE:
        seen.append(f"{event} {arguments!r}"[:200])
    elif event == "import" and "/" in str(arguments[1] or "") and not str(arguments[1]).startswith(_OWN):
        seen.append(f"imported {arguments[1]}")


def watch_safetensors() -> None:
    """Let the hook see what the safetensors library opens, which it does without Python; before others import it."""
    original = safetensors.safe_open

    def watched_open(filename: Any, *args: Any, **kwargs: Any) -> Any:
        sys.audit("open", os.fspath(filename), "r", 0)
        return original(filename, *args, **kwargs)

    safetensors.safe_open = watched_open  # type: ignore[assignment, misc]


@contextlib.contextmanager
def watched(folder: Path, files: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Collects what is opened outside of `folder`, and code that is run."""
    if not hasattr(sys, "_bailing_watched"):
        sys.addaudithook(_hook)
        sys._bailing_watched = True  # type: ignore[attr-defined]
    seen: list[str] = []
    _watching.append(((str(folder), *files, *_OWN), seen))
    try:
        yield seen
    finally:
        _watching.pop()
