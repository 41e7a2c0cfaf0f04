"""Shows what this package refuses as one line, not as a traceback through vLLM."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

_PACKAGE = Path(__file__).parents[1]


def shorten_in_vllm_command() -> None:
    """Let the `vllm` command end with the message alone where this package raised the error.

    Python programs that use vLLM keep their tracebacks.
    """
    if Path(sys.argv[0]).name != "vllm" or getattr(sys.excepthook, "of_vllm_bailing", False):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        refusal = next((one for one in _chain(error) if _raised_here(one)), None)
        if refusal is None:
            before(kind, error, traceback)
        else:
            print(f"vllm-bailing: {refusal}", file=sys.stderr)

    hook.of_vllm_bailing = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.excepthook = hook


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, what it wraps, and what it was raised in the handling of."""
    while error is not None:
        yield error
        wrapped: Any = getattr(error, "errors", None)  # pydantic keeps what a check raised in a list of its own
        rows: Any = wrapped() if callable(wrapped) else ()
        for row in rows:
            if isinstance(inner := row.get("ctx", {}).get("error"), BaseException):
                yield from _chain(inner)
        error = error.__cause__ or error.__context__


def _raised_here(error: BaseException) -> bool:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and Path(traceback.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)
