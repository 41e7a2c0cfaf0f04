"""Tool calls in the content of an answer, each `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

A call is handed out when it is complete, and its arguments are then the JSON text of an object. All else comes out as
the text that it was: calls that are cut off, and what only looks like a call. The stream gives the same however the
text is cut, and loses none of it; a whole answer is a stream fed once. No vLLM in here; its
side is `parsers.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import regex

from vllm_bailing.reasoning import HeldSpace, overlap_of

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
_MARK = regex.compile(r'\\(?:.|$)|["{}\[\]]', regex.DOTALL)  # of JSON's structure; a backslash with what it escapes
_BETWEEN = regex.compile(r"[\s,:]*")  # between the values of a list or an object
_SURPLUS = regex.compile(r"[\s,}\]]*")  # after a call: brackets that nothing opened
_STRING = regex.compile(r'"(?:[^"\\]|\\.)*"', regex.DOTALL)
_CONTROL = regex.compile(r"[\x00-\x1f]")


class ToolCallStream:
    """Divides content into text and calls. Whitespace beside calls is left out.

    The time is proportional to the text, whatever it is and however it is cut.
    """

    def __init__(self) -> None:
        self._partial = ""  # what may be the beginning of a tag
        self._space = HeldSpace()
        self._call: _OpenCall | None = None
        self._after_call = False

    def feed(self, text: str) -> list[Piece]:
        """What `text` completes."""
        pieces: list[Piece] = []
        text, start = self._partial + text, 0
        for tag in _TAG.finditer(text):
            self._read(text[start : tag.start()], pieces)
            self._read_tag(tag[0], pieces)
            start = tag.end()
        overlap = max(overlap_of(text[start:], CALL), overlap_of(text[start:], END_CALL))
        self._partial = text[len(text) - overlap :]
        self._read(text[start : len(text) - overlap], pieces)
        return pieces

    def close(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        pieces: list[Piece] = []
        rest, self._partial = self._partial, ""
        if self._call is None:
            self._say(self._space.before(rest) + self._space.take(), pieces)
            return pieces
        call, self._call = self._call, None
        body = call.text + ("" if END_CALL.startswith(rest) else rest)
        if not self._take(body.rstrip(), pieces):
            self._say(call.space + CALL + call.text + rest, pieces)
        return pieces

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        if text:
            pieces.append(text)

    def _read(self, text: str, pieces: list[Piece]) -> None:
        """Read text that holds no tag."""
        if self._call is None:
            self._say(self._space.before(text), pieces)
        elif not self._call.add(text):
            text, self._call = f"{self._call.space}{CALL}{self._call.text}", None
            self._say(self._space.before(text), pieces)

    def _read_tag(self, tag: str, pieces: list[Piece]) -> None:
        call = self._call
        if call is not None:
            if call.is_in_string():
                call.add(tag)  # it is part of an argument
                return
            self._call = None
            body = call.text
            if self._take(body, pieces):
                tag = "" if tag == END_CALL else tag
            else:
                self._say(self._space.before(call.space + CALL + body), pieces)
        if tag == CALL:
            self._call = _OpenCall(self._space.take())
        else:
            self._say(self._space.before(tag), pieces)

    def _take(self, body: str, pieces: list[Piece]) -> bool:
        calls, rest = read_calls(body)
        if calls:
            pieces += calls
            self._after_call = True
            self._say(rest, pieces)
        return bool(calls)


class _OpenCall:
    """The text after an opening tag, as far as it has come.

    Args:
        space: Whitespace before the tag, for the case that it is no call.
    """

    def __init__(self, space: str) -> None:
        self.space = space
        self._parts: list[str] = []
        self._has_begun = self._quotes = False
        self._escape = ""  # a backslash whose character has not come
        self._depth = self._size = self._checked = 0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def add(self, text: str) -> bool:
        """Take more text; False if what it begins with can be no call."""
        self._parts.append(text)
        self._size += len(text)
        if not self._has_begun:
            first = text.lstrip()[:1]
            if first and first not in "{[":
                return False
            self._has_begun = bool(first)
        text, self._escape = self._escape + text, ""
        for mark in _MARK.finditer(text):
            if mark[0] == "\\":
                self._escape = mark[0]
            elif mark[0] == '"':
                self._quotes = not self._quotes
            elif not self._quotes and len(mark[0]) == 1:
                self._depth += 1 if mark[0] in "{[" else -1
        return True

    def is_in_string(self) -> bool:
        """Whether the text ends within a string of its JSON."""
        if not self._quotes or self._depth <= 0:
            return False
        # What is no JSON has no strings. That is looked at again when the text is twice as long as the last time.
        if self._size >= 2 * self._checked:
            self._checked = self._size
            return _ends_in_string(self.text)
        return True


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
        calls += found
        end = value_end
    if not calls:
        for value, value_end in _values(body + "}"):
            if value_end > len(body):
                calls, end = _calls_of(value, is_mended=True), len(body)
            break
    return calls, body[_SURPLUS.match(body, end).end() :]  # pyright: ignore[reportOptionalMemberAccess]


def _calls_of(value: str, is_mended: bool = False, within: str = "") -> list[ToolCall]:
    """The calls that a JSON text is: one as an object, as the "function" of one, or several in a list. Else none.

    Args:
        within: What the text stood in, a "list" or a "function", since one of each is looked into, and no more.
    """
    inner = [text for text, _ in _values(value[1:-1])] if value[0] in "{[" else []
    if value[0] == "[":
        calls = [] if within else [_calls_of(text, within="list") for text in inner]
        return [call for found in calls for call in found] if all(calls) else []
    members = {json.loads(key, strict=False): text for key, text in zip(inner[::2], inner[1::2], strict=True)}
    if "name" not in members and within != "function" and members.get("function", "").startswith("{"):
        return _calls_of(members["function"], is_mended, within="function")
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
        _JSON.decode(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False
