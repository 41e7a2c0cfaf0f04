"""`vllm-bailing chat` against a server that answers as it is told."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

from rich.console import Console

from vllm_bailing.tools.chat import Answer, Chat, as_json, converse, show


def delta(content=None, reasoning=None, calls=()):
    calls = [
        SimpleNamespace(index=index, id=identity, function=SimpleNamespace(name=name, arguments=arguments))
        for index, identity, name, arguments in calls
    ]
    choice = SimpleNamespace(delta=SimpleNamespace(content=content, reasoning=reasoning, tool_calls=calls))
    return SimpleNamespace(choices=[choice])


def a_chat(*answers, **options):
    """A chat whose server gives `answers` in turn, and the requests that it got."""
    requests, answers = [], iter(answers)

    def create(**request):
        requests.append(request)
        return iter(next(answers))

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    return Chat(client, "demo", **options), requests


def printed(chat, *lines):
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    converse(chat, console, iter(lines))
    return console.file.getvalue()


def test_reasoning_comes_apart_whether_the_server_divides_or_not():
    wanted = Answer(reasoning="2 and 2", content="Four.")
    for pieces in ([delta(reasoning="2 and"), delta(reasoning=" 2"), delta("Fo"), delta("ur.")],
                   [delta("<thi"), delta("nk>\n2 and 2\n</think"), delta(">\n\nFour.")]):  # fmt: skip
        chat, _ = a_chat(pieces)
        assert printed(chat, "2+2?") == "2 and 2\nFour.\n"
        assert chat.last == wanted and chat.messages[-1]["reasoning_content"] == "2 and 2"
    assert json.loads(as_json(wanted)) == {"reasoning": "2 and 2", "content": "Four.", "tool_calls": []}


def test_a_calls_result_is_the_next_line():
    call = [delta(calls=[(0, "c1", "time", "")]), delta(calls=[(0, None, None, '{"zone": ')]),
            delta(calls=[(0, None, None, '"CET"}')])]  # fmt: skip
    chat, requests = a_chat(call, [delta("Noon.")], system="Be brief.", thinking="off", tools=[{}], temperature=0)
    assert printed(chat, "Time?", "12:00", "/exit", "never sent") == 'calls time {"zone": "CET"}\nNoon.\n'
    assert [message["role"] for message in requests[1]["messages"]] == ["system", "user", "assistant", "tool"]
    assert requests[1]["messages"][-1] == {"role": "tool", "content": "12:00", "tool_call_id": "c1"}
    assert requests[0]["extra_body"] == {"chat_template_kwargs": {"thinking_option": "off"}}
    assert requests[0]["temperature"] == 0 and requests[0]["tools"] == [{}]


def test_commands_of_the_conversation():
    chat, requests = a_chat([delta("a")], [delta("b")])
    told = printed(chat, "one", "", "/new", "/thinking on", "/what", "two")
    assert "/thinking on or off" in told
    assert [len(request["messages"]) for request in requests] == [1, 1]
    assert requests[1]["extra_body"] == {"chat_template_kwargs": {"thinking_option": "on"}}


def test_thinking_is_dim_on_a_terminal_only():
    for terminal in (True, False):
        colors = "standard" if terminal else None
        console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=colors)
        show(iter([("reasoning", "[b]x"), ("content", "y")]), console)
        told = console.file.getvalue()
        assert ("\033[2m" in told) == terminal and "[b]x" in told
