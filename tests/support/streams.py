"""Streams of completions, and how they end: nothing may look whole that is not."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from typing import Any

import httpx

DONE, CUT_OFF = "done", "cut off without an error"


@dataclass
class Stream:
    """What came of a stream.

    Attributes:
        tokens: That were received.
        end: DONE if the server said that it was whole; else HTTP's status, "an error event", the name of the
            connection's error, or CUT_OFF.
    """

    tokens: list[int] = field(default_factory=list)
    end: str = CUT_OFF

    @property
    def error(self) -> str:
        """What a table says of an error."""
        return f"{self.end} after {'some' if self.tokens else 'no'} tokens"

    def judged(self, tokens: int) -> str:
        """In a word, for a stream that should have had so many."""
        if self.end == DONE:
            return "whole" if len(self.tokens) == tokens else "WRONG: short, and ended as if whole"
        return f"WRONG: {self.end}" if self.end == CUT_OFF else self.end


def streamed(
    url: str,
    body: dict[str, Any],
    started: threading.Event | None = None,
    headers: dict[str, str] | None = None,
    timeout: float = 200,
) -> Stream:
    """Ask for a completion as a stream of token ids, and read it to its end.

    Args:
        started: Set at the first token, and at the end.
        timeout: Seconds without a word from the server.
    """
    found, started = Stream(), started or threading.Event()
    body = {**body, "stream": True, "return_token_ids": True}
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=timeout) as answer:
            if answer.status_code != 200:
                found.end = f"HTTP {answer.status_code}"
                return found
            for line in answer.iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    found.end = DONE
                elif data:
                    event = json.loads(data)
                    if "error" in event:
                        found.end = "an error event"
                        return found
                    found.tokens += [token for choice in event["choices"] for token in choice.get("token_ids") or []]
                    if found.tokens:
                        started.set()
    except httpx.HTTPError as error:
        found.end = type(error).__name__
    finally:
        started.set()
    return found
