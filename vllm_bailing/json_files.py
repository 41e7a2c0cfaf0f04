"""Files of text and JSON: read whole, or refused in a few words for a message; written whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_bailing.errors import shown


class Unreadable(ValueError):
    """A file cannot be read.

    Attributes:
        reason: The system's words for it, such as "Is a directory"; empty if it is a pipe or a device, or no text.
    """

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason


class NotText(Unreadable):
    """A file is not in UTF-8."""


def require_file(file: Path) -> None:
    """Refuse what a reader would wait for, or read for ever, before it is opened.

    Raises:
        Unreadable: If it is there and "is no file".
    """
    try:
        if file.exists() and not file.is_file():
            raise Unreadable("is no file", os.strerror(errno.EISDIR) if file.is_dir() else "")
    except OSError as error:  # a name that is too long, a link in a circle
        raise _unreadable(error) from None


def read_text(file: Path) -> str:
    """What a text file in UTF-8 holds.

    Raises:
        Unreadable: In a few words what it is instead, such as "is not UTF-8 (...)".
    """
    require_file(file)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise NotText(f"is not UTF-8 ({shown(error)})") from None
    except OSError as error:
        raise _unreadable(error) from None


def _unreadable(error: OSError) -> Unreadable:
    return Unreadable(f"cannot be read ({error.strerror})", error.strerror or "")


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: In a few words what it is instead, such as "is no JSON (...)"; as `read_text`.
    """
    return parsed(read_text(file))


def parsed(text: str) -> Any:
    """The value of JSON `text`.

    Raises:
        ValueError: In a few words what it is instead.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is no JSON, or has too many levels") from None
    except ValueError as error:
        raise ValueError(f"is no JSON ({shown(error)})") from None


def write_json(file: Path, value: Any) -> None:
    """Write JSON, as `write_text`."""
    write_text(file, json.dumps(value) + "\n")


def write_text(file: Path, text: str, errors: str = "strict") -> None:
    """Write a file that holds all of `text` or what it held before, also if the process or the disk ends meanwhile.

    Raises:
        OSError: If it cannot be written; nothing new is left.
    """
    if file.exists() and not file.is_file():  # such as /dev/stdout
        file.write_text(text, encoding="utf-8", errors=errors)
        return
    with replaced(file) as new:
        new.write_text(text, encoding="utf-8", errors=errors)


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Another file for the body to write, which takes the place of `file` after it; removed if the body fails."""
    file = file.resolve()  # a link stays one
    new = file.with_name(f"{file.name}.new")
    try:
        yield new
        if file.exists():
            shutil.copymode(file, new)
        new.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
