"""Tool calls in the content of an answer, each `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

The stream gives the same however the text is cut, and loses none of it: what is not a complete tag, or not a call,
comes out as the text that it was. A whole answer is a stream fed once. No vLLM in here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import regex

from vllm_bailing.reasoning import settled_length

CALL, END_CALL = "<tool_call>", "</tool_call>"


@dataclass
class CallStart:
    """A call of the function `name` begins."""

    name: str


@dataclass
class CallArguments:
    """The next part of the arguments of the last call, JSON text."""

    text: str


Piece = str | CallStart | CallArguments
# A call as it is meant to be, up to its arguments; other forms are read when they are complete.
_HEADER = regex.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_TAIL = regex.compile(r"\s*\}?\s*</tool_call>")
_TAIL_STRUCTURE = regex.compile(r"\s*\}?\s*")
_TAG = regex.compile(r"</?tool_call>")


class ToolCallStream:
    """Divides content into text and calls.

    Arguments are handed on while they come, as the model writes them, so that a call that is cut off keeps what there
    is of it; only control characters in strings, which JSON forbids, are escaped. Text that only looks like a call
    stays text. Whitespace beside calls is left out.
    """

    def __init__(self) -> None:
        self.state = self._content
        self._text = ""
        self._space = ""  # before the call that is being read
        self._after_call = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def feed(self, text: str) -> list[Piece]:
        """What `text` completes."""
        self._text += text
        pieces: list[Piece] = []
        while self._text and self.state(pieces):
            pass
        return pieces

    def close(self) -> list[Piece]:
        """What was held back, at the end of the answer."""
        pieces: list[Piece] = []
        rest, self._text = self._text, ""
        if self.state == self._content:
            self._say(rest, pieces)
        elif self.state in (self._header, self._whole) and not self._call_of(rest, pieces):
            self._say(self._space + CALL + rest, pieces)
        return pieces

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._after_call:
            text = text.lstrip()
            self._after_call = not text
        if text:
            pieces.append(text)

    # Each state handles what it can of the text and says whether the next one should go on.

    def _content(self, pieces: list[Piece]) -> bool:
        before, tag, after = self._text.partition(CALL)
        size = len(before.rstrip()) if tag else settled_length(self._text, CALL)
        self._say(before[:size], pieces)
        if not tag:
            self._text = self._text[size:]
            return False
        self._space, self._text, self.state = before[size:], after, self._header
        return True

    def _header(self, pieces: list[Piece]) -> bool:
        match = _HEADER.match(self._text, partial=True)
        if match is None:
            self.state = self._whole
        elif match.partial:
            return False
        else:
            try:
                name = json.loads(match[1])
            except ValueError:
                self.state = self._whole
                return True
            pieces.append(CallStart(name))
            self._text, self.state = self._text[match.end() :], self._arguments
            self._depth, self._in_string, self._escaped = 0, False, False
        return True

    def _whole(self, pieces: list[Piece]) -> bool:
        for tag in _TAG.finditer(self._text):
            body = self._text[: tag.start()]
            taken = tag.end() if tag[0] == END_CALL else tag.start()
            if not self._call_of(body, pieces):
                if _ends_in_string(body):
                    continue  # the tag is part of an argument
                self._say(self._space + CALL + self._text[:taken], pieces)
            self._text, self.state = self._text[taken:], self._content
            return True
        return False

    def _call_of(self, body: str, pieces: list[Piece]) -> bool:
        try:
            call = json.loads(body, strict=False)
        except ValueError:
            return False
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return False
        arguments = call.get("arguments", call.get("parameters"))
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        pieces += [CallStart(call["name"]), CallArguments(arguments)]
        self._after_call = True
        return True

    def _arguments(self, pieces: list[Piece]) -> bool:
        sent: list[str] = []
        place = 0
        for place, char in enumerate(self._text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
                sent.append(json.dumps(char)[1:-1] if char < " " else char)
                continue
            if char == "<":  # JSON has none outside strings: the call is broken off
                rest = self._text[place:]
                if rest.startswith((CALL, END_CALL)):
                    self.state = self._tail
                    break
                if CALL.startswith(rest) or END_CALL.startswith(rest):
                    break
            sent.append(char)
            self._in_string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            if not self._depth:
                self.state = self._tail
                place += 1
                break
        else:
            place = len(self._text)
        self._text = self._text[place:]
        if sent:
            pieces.append(CallArguments("".join(sent)))
        return self.state == self._tail

    def _tail(self, pieces: list[Piece]) -> bool:
        match = _TAIL.match(self._text, partial=True)
        if match is not None and match.partial:
            return False
        structure: Any = match or _TAIL_STRUCTURE.match(self._text)
        self._text, self.state = self._text[structure.end() :], self._content
        self._after_call = True
        return True


def _ends_in_string(text: str) -> bool:
    try:
        json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    return False
