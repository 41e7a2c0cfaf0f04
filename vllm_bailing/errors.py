"""The classes of the errors that this package raises for its users, and the remedies that several messages share.

The text of a message stands where it is raised: search for its words. What is wrong with the tensors of a checkpoint is
said in `checkpoint_audit.py`, with a value of config.json in `config.py`, `rope.py` and `validation.py`, with flags in
`plugin/checks.py` and `plugin/options.py`, with a request in `parsers.py`.

A message is one sentence on one line: what came, what was wanted, what to do next. A wrong value in a config.json is a
plain ValueError, which is what transformers and vLLM expect of a configuration class.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

NAME_ANOTHER_DRAFT = (
    "name a checkpoint that has it, such as the base model of the same size, by --speculative-config "
    '\'{"method": "mtp", "model": "...", "num_speculative_tokens": 1}\', or leave --speculative-config out'
)
DEQUANTIZE = (
    """--hf-overrides '{"dequantize": true}' turns it into plain weights while it loads, at the price of their memory"""
)


SHOWN = 4  # names in a message
_LONGEST = 160  # characters of a value in a message


def named(names: Collection[str]) -> str:
    """How many `names` there are, and the first few: "6 tensors (a, b, c, d, ...)"."""
    shown = f"{', '.join(shown(name) for name in sorted(names)[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''} ({shown})"


def shown(value: Any) -> str:
    """A name, value or error that came from outside, as it may stand in a message: one line, no control characters."""
    if isinstance(value, Exception):
        text = " ".join(str(value).split())
    else:
        text = value if isinstance(value, str) else repr(value)
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: _LONGEST + 1]
    )
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class CheckpointError(RuntimeError):
    """The checkpoint does not fit its configuration.

    Deliberately not a ValueError: pydantic would bury the message of one that is raised while vLLM checks its settings.
    """


class UpdateError(CheckpointError):
    """A trainer's update of a running engine cannot be carried out."""


class SettingsError(RuntimeError):
    """A flag or a key of `--additional-config` is wrong. Not a ValueError, for the reason given above."""


class AdapterError(ValueError):
    """An adapter cannot be served as a whole. A ValueError, which vLLM's server answers with its message."""


class RequestError(ValueError):
    """A request asks for what means nothing. A ValueError, for the reason given above."""


class VerifyError(RuntimeError):
    """The comparison cannot be made; the message is shown to the user as is."""


class BenchError(RuntimeError):
    """An engine did not start or did not answer; the message ends with its last words."""


class TuneError(RuntimeError):
    """A table cannot be made; the message is shown to the user as is."""


class DemoError(RuntimeError):
    """The demo cannot go on; the message is shown to the user as is."""


class QuantizeError(RuntimeError):
    """A checkpoint cannot be quantized; the message is shown to the user as is."""
