"""Tool calls in the content of an answer, each `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

A call is handed out when it is complete, and its arguments are then the JSON text of an object. All else comes out as
the text that it was: calls that are cut off, and what only looks like a call. The stream gives the same however the
text is cut, and loses none of it; a whole answer is a stream fed once. No vLLM in here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import regex

from vllm_bailing.reasoning import settled_length

CALL, END_CALL = "<tool_call>", "</tool_call>"


@dataclass
class ToolCall:
    """A complete call.

    Attributes:
        name: Name of the function, not blank.
        arguments: JSON text of an object, as the model wrote it.
    """

    name: str
    arguments: str


Piece = str | ToolCall
_TAG = regex.compile(r"</?tool_call>")
_BEGINNING = regex.compile(r"\s*(\S)")
_BETWEEN = regex.compile(r"[\s,:]*")  # between the values of a list or an object
_SURPLUS = regex.compile(r"[\s,}\]]*")  # after a call: brackets that nothing opened
_STRING = regex.compile(r'"(?:[^"\\]|\\.)*"', regex.DOTALL)
_CONTROL = regex.compile(r"[\x00-\x1f]")


class ToolCallStream:
    """Divides content into text and calls. Whitespace beside calls is left out."""

    def __init__(self) -> None:
        self._text = ""  # what is not settled yet; in a call, all that follows its tag
        self._in_call = False
        self._space = ""  # before the call that is being read
        self._searched = 0  # how much of a call's text holds no tag that ends it
        self._after_call = False

    def feed(self, text: str) -> list[Piece]:
        """What `text` completes."""
        self._text += text
        pieces: list[Piece] = []
        while self._text and (self._call(pieces) if self._in_call else self._content(pieces)):
            pass
        return pieces

    def close(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        pieces: list[Piece] = []
        rest, self._text = self._text, ""
        if not self._in_call:
            self._say(rest, pieces)
        elif not self._take(rest[: settled_length(rest, END_CALL)], pieces):
            self._say(self._space + CALL + rest, pieces)
        return pieces

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        if text:
            pieces.append(text)

    # Each of the two handles what it can of the text and says whether the other one should go on.

    def _content(self, pieces: list[Piece]) -> bool:
        before, tag, after = self._text.partition(CALL)
        size = len(before.rstrip()) if tag else settled_length(self._text, CALL)
        self._say(before[:size], pieces)
        if not tag:
            self._text = self._text[size:]
            return False
        self._space, self._text, self._in_call, self._searched = before[size:], after, True, 0
        return True

    def _call(self, pieces: list[Piece]) -> bool:
        beginning = _BEGINNING.match(self._text)
        if beginning and beginning[1] not in "{[":
            self._in_call = False
            self._say(self._space + CALL, pieces)
            return True
        for tag in _TAG.finditer(self._text, self._searched):
            body = self._text[: tag.start()]
            taken = tag.end() if tag[0] == END_CALL else tag.start()
            if not self._take(body, pieces):
                if _ends_in_string(body):
                    self._searched = tag.end()  # the tag is part of an argument
                    continue
                self._say(self._space + CALL + self._text[:taken], pieces)
            self._text, self._in_call = self._text[taken:], False
            return True
        self._searched = max(self._searched, len(self._text) - len(END_CALL) + 1)
        return False

    def _take(self, body: str, pieces: list[Piece]) -> bool:
        calls, rest = read_calls(body)
        if calls:
            pieces += calls
            self._after_call = True
            self._say(rest, pieces)
        return bool(calls)


def read_calls(body: str) -> tuple[list[ToolCall], str]:
    """The calls that the text between the tags begins with, and what follows them.

    One brace too many and one too few at the end are forgiven, the latter where the arguments are complete.
    """
    calls: list[ToolCall] = []
    end = 0
    for value, value_end in _values(body):
        found = _calls_of(value)
        if not found:
            break
        calls, end = calls + found, value_end
    if not calls:
        for value, value_end in _values(body + "}"):
            if value_end > len(body):
                calls, end = _calls_of(value, is_mended=True), len(body)
            break
    return calls, body[_SURPLUS.match(body, end).end() :]  # pyright: ignore[reportOptionalMemberAccess]


def _calls_of(value: str, is_mended: bool = False) -> list[ToolCall]:
    """The calls that a JSON text is: one as an object, as the "function" of one, or several in a list. Else none."""
    inner = [text for text, _ in _values(value[1:-1])] if value[0] in "{[" else []
    if value[0] == "[":
        calls = [_calls_of(text) for text in inner]
        return [call for found in calls for call in found] if all(calls) else []
    members = {json.loads(key, strict=False): text for key, text in zip(inner[::2], inner[1::2], strict=True)}
    if "name" not in members and members.get("function", "").startswith("{"):
        return _calls_of(members["function"], is_mended)
    name = members.get("name", "")
    name = json.loads(name, strict=False) if name.startswith('"') else ""
    arguments = members.get("arguments", members.get("parameters", "" if is_mended else "null"))
    if arguments.startswith('"'):
        arguments = json.loads(arguments, strict=False).strip() or "null"
    if arguments == "null":
        arguments = "{}"
    is_object = arguments.startswith("{") and [end for _, end in _values(arguments)] == [len(arguments)]
    return [ToolCall(name, _STRING.sub(_escaped, arguments))] if name.strip() and is_object else []


def _escaped(string: Any) -> str:
    """A JSON string with its control characters, which JSON forbids, escaped."""
    return _CONTROL.sub(lambda char: json.dumps(char[0])[1:-1], string[0])


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


# Numbers are not read: Python has limits for their digits.
_JSON = json.JSONDecoder(strict=False, parse_int=str, parse_float=str, parse_constant=_refuse)


def _values(text: str) -> Iterator[tuple[str, int]]:
    """The JSON values that `text` begins with, as they are written, each with where it ends."""
    end = 0
    while True:
        start = _BETWEEN.match(text, end).end()  # pyright: ignore[reportOptionalMemberAccess]
        try:
            _, end = _JSON.raw_decode(text, start)
        except (ValueError, RecursionError):
            return
        yield text[start:end], end


def _ends_in_string(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False
