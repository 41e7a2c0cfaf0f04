"""Tool calls in streamed text."""

from __future__ import annotations

import pytest

from tests.support.answers import ROME, TIME, WEATHER, ZONE, cuts, read_calls
from vllm_bailing.tool_calls import CallArguments, ToolCallStream

# text: (content, calls)
CALLS = {
    "": ("", []),
    "just text, 1 < 2 and <tool": ("just text, 1 < 2 and <tool", []),
    WEATHER: ("", [ROME]),
    f"{WEATHER}\n{TIME}": ("", [ROME, ZONE]),
    f"I look.\n\n{WEATHER}\nAnd then:\n{TIME}\n\nDone.": ("I look.And then:Done.", [ROME, ZONE]),
    '<tool_call>{"name":"f","arguments":{}}</tool_call>': ("", [("f", "{}")]),
    '<tool_call>{"name": "f"}</tool_call>': ("", [("f", "{}")]),
    '<tool_call>{"arguments": {"a": "ü"}, "name": "f"}</tool_call> x': ("x", [("f", '{"a": "ü"}')]),
    '<tool_call>{"name": "f", "parameters": {"a": "</tool_call>"}}</tool_call>': (
        "",
        [("f", '{"a": "</tool_call>"}')],
    ),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>': ("", [("f", '{"a": 1}')]),
    '<tool_call>{"name": "f", "arguments": {"a": "two\nlines"}}</tool_call>': ("", [("f", '{"a": "two\\nlines"}')]),
    # Cut off: what there is of the arguments stays with the call, what is no call yet stays text.
    "see <tool_call>": ("see <tool_call>", []),
    'see <tool_call>\n{"name": "wea': ('see <tool_call>\n{"name": "wea', []),
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro': ("", [("weather", '{"city": "Ro')]),
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}': ("", [ROME]),
    WEATHER.removesuffix("</tool_call>"): ("", [ROME]),
    WEATHER.removesuffix("</tool_call>") + "\n" + TIME: ("", [ROME, ZONE]),
    WEATHER.removesuffix("</tool_call>") + "It rains.": ("It rains.", [ROME]),
    # Malformed
    "<tool_call>\nnot JSON\n</tool_call> and on": ("<tool_call>\nnot JSON\n</tool_call> and on", []),
    '<tool_call>{"a": 1}</tool_call>': ('<tool_call>{"a": 1}</tool_call>', []),
    f"x <tool_call>[1</tool_call>\n{WEATHER}": ("x <tool_call>[1</tool_call>", [ROME]),
    '<tool_call>{"name": "f", "arguments": {"a": 1\n</tool_call>\n' + WEATHER: ("", [("f", '{"a": 1\n'), ROME]),
    '<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>': ("}</tool_call>", [("f", '{"a": 1}')]),
}


@pytest.mark.parametrize("text", CALLS)
def test_calls_and_text_are_told_apart_wherever_the_text_is_cut(text):
    for parts in cuts(text):
        assert read_calls(*parts) == CALLS[text], parts


def test_arguments_come_while_they_are_written():
    stream = ToolCallStream()
    sent = [stream.feed(char) for char in TIME]
    arguments = [piece.text for pieces in sent for piece in pieces if isinstance(piece, CallArguments)]
    assert len(arguments) > len(ZONE[1]) / 2 and "".join(arguments) == ZONE[1]
