"""The parsers, through the server."""

from __future__ import annotations

import itertools
import json

import pytest

from tests.support.answers import ASK, ROME, TOOLS, read_calls, read_thoughts
from tests.support.asking import first, say


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["small talk", "thinking", "tool calls", "tool results"])
def test_the_server_divides_what_the_model_says(assistant_server, kind, stream):
    messages, options, answer = first(kind)
    reasoning, content, calls, reason = say(assistant_server, messages, options, stream)
    thought, rest = read_thoughts(False, answer)
    assert (reasoning, (content, calls)) == (thought, read_calls(rest))
    assert bool(calls) == (kind == "tool calls") and bool(reasoning) == (kind == "thinking")
    assert reason == ("tool_calls" if calls else "stop")


TWO = r'<tool_call>\n\{"name": "weather", "arguments": \{"city": "Rome"\}\}\n</tool_call>\n'
TWO += r'<tool_call>\n\{"name": "time", "arguments": \{"zone": "CET"\}\}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_gives_two_calls_and_the_text_before_them(assistant_server, stream):
    """The demo model calls one function at a time, so a grammar has it say more."""
    told = say(assistant_server, ASK, {}, stream, regex="I look\\.\n" + TWO)[:3]
    assert told[2] == [] and told[1].startswith("I look.\n<tool_call>")  # without tools in the request
    told = say(assistant_server, ASK, {"tools": TOOLS}, stream, regex="I look\\.\n" + TWO)
    assert told == ("", "I look.", [ROME, ("time", '{"zone": "CET"}')], "tool_calls")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
def test_calls_can_be_required(assistant_server, choice, stream):
    messages, options, _ = first("tool calls")
    tools = [*options["tools"]]
    names = {tool["function"]["name"] for tool in tools}
    if choice != "required":
        choice = {"type": "function", "function": {"name": sorted(names)[-1]}}
        names = {sorted(names)[-1]}
    _, content, calls, _ = say(assistant_server, messages, {"tools": tools}, stream, tool_choice=choice)
    assert not content.strip() and calls and {name for name, _ in calls} <= names
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_keeps_its_text(assistant_server, stream):
    messages, options, _ = first("tool calls")
    told = []
    for limit in range(1, 24, 3):
        _, content, calls, reason = say(assistant_server, messages, options, stream, max_tokens=limit)
        assert reason == "length" or calls
        told.append(content + "".join(name + arguments for name, arguments in calls))
    assert all(told)
    assert all(len(one) < len(other) or one.startswith("<tool_call>") for one, other in itertools.pairwise(told))


def test_a_grammar_waits_for_the_end_of_the_reasoning(assistant_server):
    messages, options, answer = first("thinking")
    thought, _ = read_thoughts(False, answer)
    reasoning, content, _, _ = say(assistant_server, messages, options, regex="yes|no")
    assert reasoning == thought and content in ("yes", "no")
    assert say(assistant_server, messages, {"thinking_option": "off"}, regex="yes|no")[:2] in (("", "yes"), ("", "no"))


def test_the_server_gives_reasoning_and_a_call_in_one_answer(bf16_server):
    """The demo model does not think before it calls, so a grammar has it do that too."""
    regex = r"<think>\nWhere\?\n</think>\n\nI look\.\n" + TWO
    for stream in (False, True):
        told = say(bf16_server, ASK, {"tools": TOOLS, "thinking_option": "on"}, stream, regex=regex)
        assert told == ("Where?", "I look.", [ROME, ("time", '{"zone": "CET"}')], "tool_calls")
