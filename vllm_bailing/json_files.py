"""JSON files: read whole, or refused in a few words that fit into a message; and written whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_bailing.errors import shown


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: In a few words what it is instead, such as "is no JSON (...)". Pipes and devices are not opened.
    """
    try:
        if file.exists() and not file.is_file():
            raise ValueError("is no file")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({shown(error)})") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    return parsed(text)


def parsed(text: str) -> Any:
    """The value of JSON `text`.

    Raises:
        ValueError: In a few words what it is instead.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is JSON of too many levels") from None
    except ValueError as error:
        raise ValueError(f"is no JSON ({shown(error)})") from None


def write_json(file: Path, value: Any) -> None:
    """Write a file that holds all of `value` whenever it is there, also if the process or the disk ends meanwhile."""
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(value) + "\n", encoding="utf-8")
    new.replace(file)
