"""What a request demands of the form of its answer, and what comes of an answer that is cut off, on every interface."""

from __future__ import annotations

import json
import re

import anthropic
import pytest
from openai import BadRequestError

from tests.support.asking import first, say

# Of its own the demo answers the first without reasoning, also when it may reason, and reasons about the second.
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
SUM = [{"role": "user", "content": "What is 47 + 8?"}]
THINKING = {"thinking_option": "on"}
CITY = {  # nothing in it is without bounds: the demo has learned no form in which it would end
    "type": "object",
    "properties": {"town": {"enum": ["Rome", "Oslo"]}, "large": {"type": "boolean"}},
    "required": ["town", "large"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}


def is_city(text):
    city = json.loads(text)
    return set(city) == {"town", "large"} and city["town"] in ("Rome", "Oslo") and isinstance(city["large"], bool)


@pytest.mark.parametrize("stream", [False, True])
def test_constraints_hold_after_reasoning(assistant_server, stream):
    def ask(options=(), **fields):
        reasoning, *rest = say(assistant_server, SUM, THINKING | dict(options), stream, **fields)
        assert "Ones: 7 + 8 = 15" in reasoning
        return rest

    content, calls, reason = ask(response_format=SCHEMA)
    assert is_city(content) and not calls and reason == "stop"
    content, _, reason = ask(regex="[0-9]{4}")
    assert re.fullmatch("[0-9]{4}", content) and reason == "stop"
    for choice in ("required", NAMED):
        content, calls, reason = ask({"tools": [TOOL]}, tool_choice=choice)
        assert not content.strip() and calls
        assert all(name == "get_weather" and is_city(arguments) for name, arguments in calls)
        assert reason == ("tool_calls" if choice == "required" else "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_would_do_without_reasoning_is_constrained_too(assistant_server, stream):
    """The demo thinks nonsense first, at length, as it has learned no other form of an answer."""

    def ask(options=(), **fields):
        return say(assistant_server, CAPITAL, THINKING | dict(options), stream, max_tokens=600, **fields)[1:]

    content, _, reason = ask(response_format=SCHEMA)
    assert is_city(content) and reason == "stop"
    content, _, reason = ask(regex="[0-9]{4}")
    assert re.fullmatch("[0-9]{4}", content) and reason == "stop"
    for choice in ("required", NAMED):
        content, calls, reason = ask({"tools": [TOOL]}, tool_choice=choice)
        assert all(is_city(arguments) for _, arguments in calls)
        # (the demo may go on with spaces, which JSON allows, until it is cut off)
        assert calls or (content.startswith('<tool_call>\n{"name": "get_weather", ') and reason == "length")


@pytest.mark.parametrize("stream", [False, True])
def test_constraints_hold_in_responses(assistant_server, stream):
    def ask(**fields):
        fields = {"model": "demo", "input": SUM, "temperature": 0, "max_output_tokens": 160, **fields}
        answer = assistant_server.client.responses.create(
            **fields, stream=stream, extra_body={"chat_template_kwargs": THINKING}
        )
        if stream:
            answer = next(event.response for event in answer if event.type == "response.completed")
        assert "reasoning" in [item.type for item in answer.output]
        return answer.output_text, [item for item in answer.output if item.type == "function_call"]

    text, _ = ask(text={"format": {"type": "json_schema", "name": "city", "schema": CITY}})
    assert is_city(text)
    _, calls = ask(tools=[{"type": "function", **TOOL["function"]}], tool_choice="required")
    assert calls and all(is_city(call.arguments) for call in calls)


def test_the_schema_of_a_tool_holds_where_the_call_is_demanded(assistant_server):
    """Without `strict`; the model itself would name a city by other keys."""
    messages, options, _ = first("tool calls")
    for choice in ("required", NAMED):
        tools = [{**TOOL, "function": {**TOOL["function"], "strict": None}}]
        _, _, calls, _ = say(assistant_server, messages, {**options, "tools": tools}, tool_choice=choice)
        assert calls and all(is_city(arguments) for _, arguments in calls)


@pytest.mark.parametrize("switch", [{"enable_thinking": "false"}, {"thinking_option": "On"}])
def test_a_switch_that_the_template_would_misread_is_refused(assistant_server, switch):
    ((name, value),) = switch.items()
    for stream in (False, True):
        with pytest.raises(BadRequestError, match=f'{name}": "{value}".*give '):
            say(assistant_server, CAPITAL, switch, stream)
    with pytest.raises(BadRequestError, match=f'{name}": "{value}".*give '):
        assistant_server.client.responses.create(
            model="demo", input=CAPITAL, extra_body={"chat_template_kwargs": switch}
        )
    assert say(assistant_server, CAPITAL, {"enable_thinking": False})[1]  # and the server goes on


# ---- cut off -------------------------------------------------------------------------------------------------------

LIMITS = range(1, 40, 2)


def test_cut_off_calls_are_text_whole_and_streamed(assistant_server):
    messages, options, _ = first("tool calls")
    told = []
    for limit in LIMITS:
        whole = say(assistant_server, messages, options, max_tokens=limit)
        assert whole[:3] == say(assistant_server, messages, options, stream=True, max_tokens=limit)[:3]
        _, content, calls, reason = whole
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)
        assert bool(content) != bool(calls)
        if not calls:
            assert reason == "length"
        told.append(content)
    assert told[0] and "arguments" in max(told, key=len)
    assert not told[-1]


def test_a_stop_string_in_a_call_makes_it_text(assistant_server):
    messages, options, _ = first("tool calls")
    ((_, arguments),) = say(assistant_server, messages, options)[2]
    stop = str(next(iter(json.loads(arguments).values())))
    for stream in (False, True):
        _, content, calls, reason = say(assistant_server, messages, options, stream, stop=[stop])
        assert (calls, reason) == ([], "stop") and content.startswith("<tool_call>") and stop not in content


def test_cut_off_calls_in_messages(assistant_server):
    client = anthropic.Anthropic(base_url=assistant_server.url, api_key="none", max_retries=0)
    messages, options, _ = first("tool calls")
    messages = [message for message in messages if message["role"] != "system"]
    tools = [
        {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in options["tools"]
    ]
    fields = {"model": "demo", "messages": messages, "tools": tools, "extra_body": {"temperature": 0}}

    def parts(message):
        return [(block.type, block.text if block.type == "text" else block.input) for block in message.content]

    kinds = set()
    for limit in LIMITS:
        whole = client.messages.create(**fields, max_tokens=limit)
        with client.messages.stream(**fields, max_tokens=limit) as stream:
            streamed = stream.get_final_message()
        assert parts(whole) == parts(streamed)
        ((kind, value),) = parts(whole)
        assert isinstance(value, dict) == (kind == "tool_use")
        assert kind == "tool_use" or (value and whole.stop_reason == streamed.stop_reason == "max_tokens")
        kinds.add(kind)
    assert kinds == {"text", "tool_use"}


def test_cut_off_calls_in_responses(assistant_server):
    messages, options, _ = first("tool calls")
    tools = [{"type": "function", **tool["function"]} for tool in options["tools"]]
    fields = {"model": "demo", "input": messages, "tools": tools, "temperature": 0}
    kinds = set()
    for limit in LIMITS:
        whole = assistant_server.client.responses.create(**fields, max_output_tokens=limit)
        events = list(assistant_server.client.responses.create(**fields, max_output_tokens=limit, stream=True))
        told = []
        for answer in (whole, events[-1].response):
            calls = [(item.name, json.loads(item.arguments)) for item in answer.output if item.type == "function_call"]
            assert calls or (answer.status == "incomplete" and answer.output_text)
            told.append((answer.status, answer.output_text, calls))
            kinds |= {item.type for item in answer.output}
        assert told[0] == told[1]
    assert kinds == {"message", "function_call"}
