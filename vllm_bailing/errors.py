"""The classes of the errors that this package raises for its users, and the remedies that several messages share.

The text of a message stands where it is raised: search for its words. What is wrong is said,

- with a key or value of config.json, in `config.py`, `rope.py` and `validation.py`;
- with the folder of a checkpoint in `folders.py`, with its files in `checkpoint.py`, with its tensors in
  `checkpoint_audit.py`, `layouts.py` and `dequantize.py`, and the likely cause of it in `likely_causes.py`;
- with flags in `plugin/checks.py`, `plugin/options.py`, `plugin/speculation.py` and `plugin/kernels/`;
- with adapters in `adapters.py`, `adapter_audit.py` and `plugin/lora.py`;
- with updates in `plugin/weight_loading.py` and `router.py`;
- with a parallel layout that the model cannot be divided by in `model.py` and `mtp.py`;
- with a request in `parsers.py` and `control_tokens.py`;
- with the input of a command in the command's file of `cli/`, `tools/`, `planning/`, `bench/`, `tuning/`,
  `balance/`, `training/` or `report/`.

A message is one sentence on one line: what came, what was wanted, what to do next. A wrong value in a config.json is a
plain ValueError, which is what transformers and vLLM expect of a configuration class.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

NAME_ANOTHER_DRAFT = (
    "name a checkpoint that has it, such as the base model of the same size, by --speculative-config "
    '\'{"method": "mtp", "model": "...", "num_speculative_tokens": 1}\', or leave --speculative-config out'
)
DEQUANTIZE = (
    """--hf-overrides '{"dequantize": true}' turns it into plain weights while it loads, at the price of their memory"""
)


_MOST_NAMES = 4  # in a message
_LONGEST = 160  # characters of a name or value in a message


def shown(value: str | Exception, longest: int = _LONGEST) -> str:
    """What came from outside, as it may stand in a message: on one line, without control characters."""
    text = " ".join(str(value).split()) if isinstance(value, Exception) else value
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text[: longest + 1]
    )
    return text if len(text) <= longest else f"{text[:longest]}..."


def told(value: Any) -> str:
    """A value as it is written in Python, as `shown`."""
    try:
        return shown(repr(value))
    except RecursionError:
        return "(a value of too many levels)"


def reason_of(error: Exception) -> str:
    """What an error says, on one line; of several that pydantic puts into one, the first, with its field."""
    found: Any = getattr(error, "errors", None)
    rows: Any = found() if callable(found) and type(error).__name__ == "ValidationError" else ()
    if not rows:
        return shown(error, 600)
    field = str(next(iter(rows[0]["loc"]), ""))
    text = shown(rows[0]["msg"].removeprefix("Value error, "), 600)
    return f"{field}: {text}" if field else text


def first_of(names: Iterable[str]) -> str:
    """The first few of `names`: "a, b, c, d, ..."."""
    names = list(names)
    return f"{', '.join(map(shown, names[:_MOST_NAMES]))}{', ...' if len(names) > _MOST_NAMES else ''}"


def named(names: Collection[str]) -> str:
    """How many `names` there are, and the first few: "6 tensors (a, b, c, d, ...)"."""
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''} ({first_of(sorted(names))})"


class Finding(NamedTuple):
    """What is wrong, and what to do; as text, both in one sentence."""

    detail: str
    remedy: str

    def __str__(self) -> str:
        return "; ".join(filter(None, self))


LET_READ = "let the user who runs this read it"


def unreadable(error: OSError, place: Path | None = None) -> Finding:
    """What an error says of a file or folder that cannot be read, which is `place` if the error does not tell."""
    where = shown(str(error.filename or place))
    return Finding(f"{where} cannot be read: {error.strerror or shown(error)}", LET_READ)


class FilesError(ValueError):
    """A checkpoint is not here, or has no tokenizer that can be used; `finding` is the message in two parts."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


class OtherModelError(ValueError):
    """A config.json is another architecture's, for which there is nothing here."""


class CheckpointError(RuntimeError):
    """The checkpoint does not fit its configuration.

    Deliberately not a ValueError: pydantic would bury the message of one that is raised while vLLM checks its settings.

    Attributes:
        finding: The message in two parts where it has them, without the words that join them.
    """

    def __init__(self, message: str, finding: Finding | None = None) -> None:
        super().__init__(message)
        self.finding = finding or Finding(message, "")


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


class ChatError(RuntimeError):
    """A conversation cannot go on so; the message is shown to the user as is."""


class BenchError(RuntimeError):
    """An engine did not start or did not answer; the message ends with its last words."""


class BalanceError(RuntimeError):
    """Picks of experts cannot be recorded or used; the message is shown to the user as is."""


class TuneError(RuntimeError):
    """A table cannot be made; the message is shown to the user as is."""


class DemoError(RuntimeError):
    """The demo cannot go on; the message is shown to the user as is."""


class ReportError(RuntimeError):
    """A report cannot be made; the message is shown to the user as is."""


class QuantizeError(RuntimeError):
    """A checkpoint cannot be quantized; the message is shown to the user as is."""


class TrainError(RuntimeError):
    """An MTP layer cannot be trained; the message is shown to the user as is."""
