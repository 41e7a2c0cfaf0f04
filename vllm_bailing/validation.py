"""What a value of config.json must be. Every error names the key, its value and what to do."""

from __future__ import annotations

import sys
from typing import Any

LARGEST = 2**31 - 1


def require_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= LARGEST:
        raise ValueError(f"{name}={value!r} must be an integer from {minimum} to {LARGEST}; correct it in config.json")


def require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}={value!r} must be a finite number above 0; correct it in config.json")


def require_object(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must be an object such as {{'rope_type': 'yarn', 'factor': 4.0}}, or null")


def require_token_ids(name: str, value: Any) -> None:
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise ValueError(f"{name}={value!r} must be a token id, a list of them or null; correct it in config.json")


def require_one_of(name: str, value: Any, supported: tuple) -> None:
    if value not in supported:
        choices = ", ".join(repr(choice) for choice in supported)
        raise ValueError(f"{name}={value!r} is not part of BailingMoeV2, which supports {choices}; correct config.json")
