"""Answers with reasoning and calls, and what is read from them."""

from __future__ import annotations

from vllm_bailing.reasoning import ReasoningStream
from vllm_bailing.tool_calls import ToolCall, ToolCallStream

WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {"zone": "a </tool_call> b", "n": [1, {"x": "}"}]}}\n</tool_call>'
ROME, ZONE = ("weather", '{"city": "Rome"}'), ("time", '{"zone": "a </tool_call> b", "n": [1, {"x": "}"}]}')


def calls_of(pieces):
    """(content, calls) of what a ToolCallStream gave."""
    content = "".join(piece for piece in pieces if not isinstance(piece, ToolCall))
    return content, [(piece.name, piece.arguments) for piece in pieces if isinstance(piece, ToolCall)]


def read_calls(*parts):
    stream = ToolCallStream()
    return calls_of([piece for part in parts for piece in stream.feed(part)] + stream.close())


def read_thoughts(is_open, *parts):
    stream = ReasoningStream(is_open)
    return tuple(map("".join, zip(*[stream.feed(part) for part in parts], stream.close(), strict=True)))


def cuts(text):
    """`text` whole, in two at every place, and letter by letter."""
    yield [text]
    for place in range(len(text) + 1):
        yield [text[:place], text[place:]]
    yield list(text) or [""]


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "time")]
ASK = [{"role": "user", "content": "Weather in Rome?"}]
