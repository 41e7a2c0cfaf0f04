"""`vllm-bailing chat` against a server that answers as it is told."""

from __future__ import annotations

import contextlib
import io
import json
import random
import textwrap
import threading
from types import SimpleNamespace

import httpx
import pytest
from openai import APIConnectionError, InternalServerError, OpenAIError
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from typer.testing import CliRunner

from tests.support.commands import invoke
from tests.support.pages import serving_page
from vllm_bailing.cli import app, chat_screen, output
from vllm_bailing.errors import ChatError
from vllm_bailing.tools import chat as chat_tool
from vllm_bailing.tools.chat import Answer, Call, Chat, as_json, with_scheme

URL = "http://server"
REQUEST = httpx.Request("POST", URL)


def delta(content=None, reasoning=None, calls=(), finish=None, usage=None):
    calls = [
        SimpleNamespace(index=index, id=identity, function=SimpleNamespace(name=name, arguments=arguments))
        for index, identity, name, arguments in calls
    ]
    part = SimpleNamespace(content=content, reasoning=reasoning, tool_calls=calls)
    choice = SimpleNamespace(delta=part, finish_reason=finish)
    return SimpleNamespace(choices=[choice], usage=usage)


STOP = delta(finish="stop")
USAGE = SimpleNamespace(choices=[], usage=SimpleNamespace(completion_tokens=12))
CALL = [delta(calls=[(0, "c1", "weather", '{"city": "Rome"}')]),
        delta(calls=[(1, "c2", "weather", '{"city": "Oslo"}')]), delta(finish="tool_calls")]  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather"}}


def a_chat(*answers, **options):
    """A chat whose server gives `answers` in turn, and the requests that it got; an exception is raised there."""
    requests, answers = [], iter(answers)

    def create(**request):
        requests.append(request)
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer

        def stream():
            for part in answer:
                if isinstance(part, BaseException):
                    raise part
                yield part

        return stream()

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    return Chat(client, "demo", **options), requests


def printed(chat, *lines, terminal=False):
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    marks, lines = [], iter(lines)

    def read(mark):
        marks.append(mark)
        return next(lines, None)

    printed.is_fine = chat_screen.converse(chat, console, read, URL)
    printed.marks = marks
    return console.file.getvalue()


def roles(request):
    return [message["role"] for message in request["messages"]]


def test_reasoning_comes_apart_whether_the_server_divides_or_not():
    wanted = Answer("2 and 2", "Four.", finish_reason="stop")
    for pieces in ([delta(reasoning="2 and"), delta(reasoning=" 2"), delta("Fo"), delta("ur."), STOP],
                   [delta("<thi"), delta("nk>\n2 and 2\n</think"), delta(">\n\nFour."), STOP]):  # fmt: skip
        chat, _ = a_chat(pieces)
        assert printed(chat, "2+2?") == "2 and 2\nFour.\n"
        assert (chat.last.reasoning, chat.last.content) == (wanted.reasoning, wanted.content)
        assert chat.messages[-1]["reasoning_content"] == "2 and 2"
    assert json.loads(as_json(wanted)) == {
        "reasoning": "2 and 2", "content": "Four.", "tool_calls": [], "finish_reason": "stop"
    }  # fmt: skip


def test_a_calls_result_is_the_next_line():
    call = [delta(calls=[(0, "c1", "time", "")]), delta(calls=[(0, None, None, '{"zone": ')]),
            delta(calls=[(0, None, None, '"CET"}')]), delta(finish="tool_calls")]  # fmt: skip
    chat, requests = a_chat(
        call, [delta("Noon."), STOP], system="Be brief.", thinking="off", tools=[TOOL], temperature=0
    )
    assert printed(chat, "Time?", "12:00", "/exit", "never sent") == 'calls time {"zone": "CET"}\nNoon.\n'
    assert printed.marks == ["> ", 'result of time {"zone": "CET"}> ', "> "]
    assert roles(requests[1]) == ["system", "user", "assistant", "tool"]
    assert requests[1]["messages"][-1] == {"role": "tool", "content": "12:00", "tool_call_id": "c1"}
    assert requests[0]["extra_body"] == {"chat_template_kwargs": {"thinking_option": "off"}}
    assert requests[0]["temperature"] == 0 and requests[0]["tools"] == [TOOL]


@pytest.mark.parametrize("first", [0, 1, 7])
def test_each_of_several_calls_is_shown_and_answered(first):
    """Servers number calls from whatever they like."""
    calls = [delta(calls=[(first, "c1", "weather", '{"city": "Rome"}')]),
             delta(calls=[(first + 1, "c2", "weather", '{"city": '), (first + 1, None, None, '"Oslo"}')]),
             delta(finish="tool_calls")]  # fmt: skip
    chat, requests = a_chat(calls, [delta("Warm and cold."), STOP])
    told = printed(chat, "Weather in Rome and Oslo?", "25", "3")
    assert told == 'calls weather {"city": "Rome"}\ncalls weather {"city": "Oslo"}\nWarm and cold.\n'
    rome, oslo = 'result of weather {"city": "Rome"}> ', 'result of weather {"city": "Oslo"}> '
    assert printed.marks == ["> ", rome, oslo, "> "]
    assert len(requests) == 2 and roles(requests[1]) == ["user", "assistant", "tool", "tool"]
    assert [(one["tool_call_id"], one["content"]) for one in requests[1]["messages"][-2:]] == [
        ("c1", "25"),
        ("c2", "3"),
    ]
    assert chat.last.calls == [] and json.loads(as_json(Answer(calls=[Call("c", "f", "{}")])))["tool_calls"] == [
        {"id": "c", "name": "f", "arguments": "{}"}
    ]


def test_commands_of_the_conversation(tmp_path):
    chat, requests = a_chat(*[[delta(letter), STOP] for letter in "abcdef"])
    told = printed(chat, "one", "", "/new", "/thinking on", "/what is this", "two", "//etc/hosts", terminal=True)
    assert "/what is this is no command; /help lists them" in told and "thinking is on" in told
    assert [len(request["messages"]) for request in requests] == [1, 1, 3]
    assert requests[1]["extra_body"] == {"chat_template_kwargs": {"thinking_option": "on"}}
    assert requests[2]["messages"][-1]["content"] == "/etc/hosts"
    kept = tmp_path / "kept.json"
    told = printed(chat, f"/save {kept}", "/system Be brief.", "three", f"/load {kept}", "/retry", "four")
    assert told == "d\ne\nf\n" and printed.is_fine  # a file gets the answers
    assert roles(requests[3]) == ["system", "user"] and requests[3]["messages"][0]["content"] == "Be brief."
    assert requests[4]["messages"] == requests[2]["messages"]
    assert roles(requests[5]) == ["user", "assistant", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/save", "/save needs a file; name one behind it"),
        ("/LOAD", "/load needs a file; name one behind it"),
        ("/thinking maybe", "/thinking is on or off, not maybe"),
        ("/exit now", "/exit stands alone; leave out now"),
        ("/new x y", "/new stands alone; leave out x y"),
        ("/retry again", "/retry stands alone; leave out again"),
        ("/help me", "/help stands alone; leave out me"),
        ("/save kept.json", "there is nothing to save yet"),
        ("/retry", "nothing was asked yet"),
        ("/load nowhere", "nowhere is no conversation that /save wrote: it cannot be read (No such file or directory)"),
        (
            "/load ~no-such-user/x",
            "~no-such-user/x is no conversation that /save wrote: it cannot be read (No such file or dir",
        ),
        ("/ new", "/ new is no command; /help lists them, and // new is a message"),
        ("/what", "/what is no command; /help lists them, and //what is a message"),
    ],
)
def test_a_command_that_cannot_be_done_says_what_it_wants(line, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat, requests = a_chat()
    told = printed(chat, line)
    assert told.startswith(said) and told.count("\n") == 1, told
    assert not printed.is_fine and not requests and not list(tmp_path.iterdir())


def test_commands_are_known_in_any_case_and_with_any_space():
    chat, _ = a_chat()
    told = printed(chat, "/HELP", "/Thinking\tOFF", "/thinking", "/SYSTEM Be brief.", "/system", "/Exit", "/what")
    assert told == f"{chat_screen.HELP}\nthinking is off\nBe brief.\n" and printed.is_fine
    assert max(map(len, told.splitlines())) <= 80


def test_the_system_message_is_shown_and_taken_away():
    chat, requests = a_chat(*[[delta(letter), STOP] for letter in "abcd"], system="Be\x1b brief.")
    assert printed(chat, "one", "/system", "two") == "a\nBe\u241b brief.\nb\n"
    assert roles(requests[1]) == ["system", "user", "assistant", "user"]  # the conversation went on
    assert printed(chat, "/system None", "/system", "three") == "there is no system message\nc\n"
    printed(chat, "/system Be.", '/system ""', "four")
    assert roles(requests[2]) == roles(requests[3]) == ["user"]


def test_a_file_of_something_else_is_not_saved_over(tmp_path):
    chat, _ = a_chat([delta("a"), STOP], [delta("b"), STOP])
    notes, kept = tmp_path / "notes.txt", tmp_path / "kept.json"
    notes.write_text("Mine.")
    told = printed(chat, "one", f"/save {notes}", f"/save {kept}", "two", f"/save {kept}")
    assert notes.read_text() == "Mine." and f"\n{notes} is no conversation that /save wrote: it is no JSON" in told
    assert told.count("; save to another file\n") == 1
    assert [message["content"] for message in json.loads(kept.read_text())["messages"]] == ["one", "a", "two", "b"]
    chat.messages[-1]["content"] = "\ud800"  # no file takes it
    with pytest.raises(ChatError, match="surrogates not allowed"):
        chat.save(kept)
    assert len(json.loads(kept.read_text())["messages"]) == 4


def test_what_was_said_last_is_seen_again(tmp_path):
    chat, _ = a_chat(CALL)
    printed(chat, "Weather in\nRome and Oslo?" + " Please!" * 99, f"/save {tmp_path / 'kept'}")
    chat, requests = a_chat([delta("Warm."), STOP], [delta("Hi."), STOP], [delta("Mild."), STOP])
    told = printed(chat, f"/load {tmp_path / 'kept'}", "25", "3", f"/save {tmp_path / 'kept'}", terminal=True)
    head, question, *calls = told.splitlines()[:4]
    assert head.startswith("2 messages read from ") and len(question) < 320 and question.endswith("...")
    assert question.startswith("> Weather in Rome and Oslo? Please!")
    assert calls == ['calls weather {"city": "Rome"}', 'calls weather {"city": "Oslo"}']
    told = printed(chat, f"/load {tmp_path / 'kept'}", terminal=True)
    assert told.endswith("\n> 25\n> 3\nWarm.\n")
    printed(chat, f"/load {tmp_path / 'kept'}", "/retry")  # the results, which were told last
    assert requests[1]["messages"] == requests[0]["messages"]


def test_a_result_is_none_of_another_conversation():
    chat, requests = a_chat(CALL, CALL, [delta("Warm and cold."), STOP])
    printed(chat, "Weather?", "25", "/new", "Weather?", "26", "3")
    assert [message["content"] for message in requests[2]["messages"][2:]] == ["26", "3"]


def test_the_last_question_may_be_asked_again():
    chat, requests = a_chat([delta("a"), STOP], [delta("b"), STOP], [delta("c"), STOP])
    assert printed(chat, "one", "two", "/retry") == "a\nb\nc\n"
    assert requests[1]["messages"] == requests[2]["messages"]
    assert [message["content"] for message in chat.messages] == ["one", "a", "two", "c"]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (OpenAIError("overloaded"), "overloaded"),
        ([delta("Half an"), OpenAIError("gone")], "gone"),
        ([delta("Half an")], "the connection ended before the answer did; ask again"),
        ([delta("Half an"), APIConnectionError(request=REQUEST)], "the connection ended before the answer did; ask"),
        ([delta("Half an"), httpx.ReadError("reset")], "the connection ended before the answer did; ask again"),
        (
            [
                delta("Half an"),
                OpenAIError("EngineCore encountered an issue. See stack trace (above) for the root cause."),
            ],
            "http://server: the server's engine has ended; the server's log says why; start the server again",
        ),
        (InternalServerError("", response=httpx.Response(503, request=REQUEST), body=None), "is not ready (HTTP 503);"),
        (APIConnectionError(request=REQUEST), "no server at http://server; start one by"),
        (["<html>"], "no answer of a vLLM server"),
    ],
    ids=["refused", "failed", "cut off", "lost", "reset", "engine", "loading", "gone", "a web page"],
)
def test_a_request_that_fails_leaves_the_conversation_as_it_was(answer, words):
    chat, requests = a_chat([delta("a"), STOP], answer, [delta("c"), STOP])
    told = printed(chat, "one", "two", "/retry")
    assert words in told and told.endswith("c\n") and not printed.is_fine
    assert requests[2]["messages"] == requests[1]["messages"]
    assert [message["content"] for message in chat.messages] == ["one", "a", "two", "c"]


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation():
    chat, requests = a_chat([delta("One, two, "), KeyboardInterrupt()], [delta("Done."), STOP])
    told = printed(chat, "Count.", "Thanks.")
    assert told == "One, two, \n(stopped)\nDone.\n"
    assert [message["content"] for message in requests[1]["messages"]] == ["Count.", "One, two, ", "Thanks."]


def test_an_answer_that_is_not_read_on_stays_as_far_as_it_came():
    chat, _ = a_chat([delta("One, "), delta("two, "), delta("three"), STOP])
    pieces = chat.ask({"role": "user", "content": "Count."})
    assert [next(pieces), next(pieces)] == [("content", "One, "), ("content", "two, ")]
    pieces.close()
    assert [message["content"] for message in chat.messages] == ["Count.", "One, two, "]


def test_what_the_text_does_not_say_is_told():
    length = [delta("One, two"), delta(finish="length"), USAGE]
    chat, _ = a_chat(length, [delta("Done."), STOP, USAGE])
    assert printed(chat, "Count.") == "One, two\n(cut off at the limit of tokens)\n"
    assert chat.last.finish_reason == "length" and chat.last.tokens == 12


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        # times of the pieces since the question was sent, and how many tokens had come by then
        ([(3.0, 0), (3.0, 5), (4.0, 15), (5.0, 25)], "(25 tokens, 10 tokens/s)"),  # neither prefill nor first piece
        ([(3.0, 1), (7.0, 2)], "(2 tokens, 0.2 tokens/s)"),
        ([(0.064, 0), (0.065, 20), (0.07, 37)], "(37 tokens in 0.07 s)"),  # too quick to tell
        ([(3.0, 37), (4.0, 37)], "(37 tokens in 4.00 s)"),  # as a call comes, in one piece
        ([(3.0, None), (4.0, 37)], "(37 tokens in 4.00 s)"),  # a server that counts at the end
        ([(0.5, 1)], "(1 token in 0.50 s)"),
        ([(0.5, None)], ""),
    ],
)
def test_the_speed_is_told_where_it_can_be_known(counts, told, monkeypatch):
    usages = [None if count is None else SimpleNamespace(completion_tokens=count) for _, count in counts]
    chat, _ = a_chat([*(delta("x", usage=usage) for usage in usages[:-1]), delta(finish="stop", usage=usages[-1])])
    clock = iter([100.0, *(100 + seconds for seconds, _ in counts)])
    monkeypatch.setattr(chat_tool, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(chat.ask({"role": "user", "content": "Count."})) == [("content", "x")] * (len(counts) - 1)
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    chat_screen.remark(chat.last, console)
    assert console.file.getvalue().strip() == told


def test_an_answer_that_was_stopped_is_not_measured():
    chat, _ = a_chat([delta("a"), delta(finish="length"), USAGE], KeyboardInterrupt())
    told = printed(chat, "one", "two", terminal=True)
    assert told == "a\n(cut off at the limit of tokens)\n(stopped)\n"


class Watched(io.StringIO):
    """What is printed; `seen` is set as soon as it has the words that are waited for."""

    def __init__(self, words):
        super().__init__()
        self.words, self.seen = words, threading.Event()

    def write(self, text):
        done = super().write(text)
        if self.words in text:
            self.seen.set()
        return done


@pytest.mark.parametrize("end", [[("content", "Hello.")], [], KeyboardInterrupt], ids=["an answer", "none", "Ctrl-C"])
def test_a_wait_is_seen_on_a_terminal_until_it_ends(end, monkeypatch):
    monkeypatch.setattr(chat_screen, "PATIENCE_SECONDS", 0)
    screen = Watched("waiting for the server, 0 s; Ctrl-C stops")
    console = Console(file=screen, width=80, force_terminal=True, force_interactive=True, color_system=None)

    def pieces():
        assert screen.seen.wait(60), screen.getvalue()
        if end is KeyboardInterrupt:
            raise KeyboardInterrupt
        yield from end

    with pytest.raises(KeyboardInterrupt) if end is KeyboardInterrupt else contextlib.nullcontext():
        chat_screen.show(pieces(), console)
    erased = "\x1b[2K"
    shown_last = screen.getvalue().rpartition(erased)[2]
    assert screen.words not in shown_last and "\x1b[?25h" in screen.getvalue()  # nor is the cursor hidden
    assert ("Hello." in shown_last) == (end == [("content", "Hello.")])


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "JSON"])
def test_a_wait_for_the_first_word_of_a_server_is_seen_unless_for_json(options, monkeypatch):
    monkeypatch.setattr(chat_screen, "PATIENCE_SECONDS", 0)
    screen = Watched("waiting for the server")
    console = Console(file=screen, width=80, force_terminal=True, force_interactive=True, color_system=None)

    def silent(_):
        assert options or screen.seen.wait(60)
        raise ChatError("it lists no models; is it a vLLM server?")

    monkeypatch.setattr(chat_tool, "first_model", silent)
    monkeypatch.setattr(output, "console", lambda **_: console)
    done = invoke("chat", "hello", *options)
    assert done.exit_code == 1 and bool(screen.getvalue()) == (not options), done.exception


def test_a_wait_is_not_seen_in_a_file(monkeypatch):
    monkeypatch.setattr(chat_screen, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(chat_screen.threading, "Timer", lambda *_: pytest.fail("a timer"))
    chat, _ = a_chat([delta("Hello."), STOP])
    assert printed(chat, "Hello?") == "Hello.\n"


def test_control_characters_of_a_server_do_not_reach_the_terminal():
    chat, _ = a_chat([delta("a\x1b[2Jb\x07\r\x9bc\n\td\x7f"), delta("\x1b"), delta("]0;title\x07"), STOP])
    told = printed(chat, "x", terminal=True)
    assert "a\u241b[2Jb\u2407\u240d\ufffdc\n" in told and "\u241b]0;title\u2407" in told
    assert not set(told) & {chr(code) for code in [*range(9), *range(11, 32), *range(127, 160)]}


def test_thinking_is_dim_on_a_terminal_only():
    for terminal in (True, False):
        colors = "standard" if terminal else None
        console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=colors)
        chat_screen.show(iter([("reasoning", "[b]x"), ("content", "y")]), console)
        told = console.file.getvalue()
        assert ("\033[2m" in told) == terminal and "[b]x" in told


@pytest.mark.parametrize(
    "text",
    ["3", "[]", "{}", '{"system": null, "messages": 5}', '{"system": 1, "messages": [1]}', "x",
     '{"system": null, "messages": [{"role": "assistant", "tool_calls": [1]}]}',
     '{"system": null, "messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f"}}]}]}'],
)  # fmt: skip
def test_what_is_no_conversation_is_not_loaded(text, tmp_path):
    chat, _ = a_chat([delta("a"), STOP])
    list(chat.ask({"role": "user", "content": "one"}))
    (tmp_path / "kept").write_text(text)
    with pytest.raises(ChatError, match="is no conversation that /save wrote"):
        chat.load(tmp_path / "kept")
    for failing in (chat.load, chat.save):
        with pytest.raises(ChatError, match="No such file or directory"):
            failing(tmp_path / "missing" / "file")
    assert len(chat.messages) == 2


def in_pieces(text, width, seed):
    """What `Lines` makes of a text that comes in pieces."""
    lines, draw, out = chat_screen.Lines(width), random.Random(seed), ""
    while text:
        cut = draw.randint(1, 9)
        out += lines.add(text[:cut])
        text = text[cut:]
    return out + lines.rest()


@pytest.mark.parametrize("seed", range(20))
def test_lines_break_between_words_however_a_text_is_cut(seed):
    draw = random.Random(seed)
    width = draw.randint(12, 80)
    words = ["".join(draw.choices("abc.,", k=draw.randint(1, 12))) for _ in range(60)]
    text, came = " ".join(words), in_pieces(" ".join(words), width, seed)
    assert [line.rstrip() for line in came.split("\n")] == textwrap.wrap(text, width, break_on_hyphens=False)


def test_lines_keep_what_is_set_in_columns_and_do_not_hold_chinese_back():
    assert in_pieces("def f():\n    return 1\n\n", 20, 1) == "def f():\n    return 1\n\n"
    assert in_pieces("x" * 50 + " y", 20, 1) == "x" * 50 + " y"  # the terminal breaks it
    lines = chat_screen.Lines(10)
    assert lines.add("你好世界") == "你好世界" and lines.add("再见") == "再\n见"
    terminal = Console(file=io.StringIO(), width=20, force_terminal=True, color_system=None)
    chat_screen.show(iter([("reasoning", "twelve lett"), ("reasoning", "ers is long"), ("content", "y")]), terminal)
    assert terminal.file.getvalue() == "twelve letters is \nlong\ny\n"
    file = Console(file=io.StringIO(), width=20)
    chat_screen.show(iter([("content", "twelve letters is long")]), file)
    assert file.file.getvalue() == "twelve letters is long\n"  # whatever the width


def test_lines_are_edited_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(chat_screen.sys.stdin.__class__, "isatty", lambda _self: True, raising=False)
    console = Console(file=io.StringIO(), force_terminal=True)
    with create_pipe_input() as typed, create_app_session(input=typed, output=DummyOutput()):
        monkeypatch.setattr(chat_screen.sys, "stdin", SimpleNamespace(isatty=lambda: True))
        read = chat_screen.typed(console)
        long = "x" * 6000  # a terminal's own line mode would cut it at 4095
        typed.send_text(f"{long}\r")
        assert read("> ") == long
        typed.send_text("Hela\x1b[D\x1b[Dl\x1b[C\x1b[C\x7fo\x1b\rworld\r")  # left, right, backspace, Alt-Enter
        assert read("> ") == "Hello\nworld"
        typed.send_text("\x1b[A\r")  # up
        assert read("> ") == "Hello\nworld"
        typed.send_text("dropped\x03kept\r")  # Ctrl-C drops what was typed
        assert read("> ") == "kept"
        typed.send_text("\x04")
        assert read("> ") is None
    history = tmp_path / "vllm-bailing" / "chat_history"
    assert "+kept" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("url", ["localhost:8000", "127.0.0.1:8000/v1", "http://x", "https://x/v1"])
def test_a_url_may_do_without_its_scheme(url):
    assert with_scheme(url) == (url if "://" in url else f"http://{url}")


@pytest.mark.parametrize("page", ["<html>It works!</html>", "[]", '{"data": []}', '{"data": [3]}'])
def test_what_is_no_server_of_models_is_one_line(page):
    with serving_page(page) as address:
        done = invoke("chat", "hello", "--url", address)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1, (done.output, done.exception)
    assert "is it a vLLM server?" in done.stderr


def test_no_server_says_how_to_start_one():
    done = invoke("chat", "hello", "--url", "localhost:9")
    assert done.exit_code == 1 and done.stderr == (
        "vllm-bailing chat: no server at http://localhost:9; start one by `vllm serve MODEL` or "
        "`vllm-bailing demo --keep`, and wait until its log says that the start is complete\n"
    )
    done = invoke("chat", "hello", "--url", "htp://localhost:9")
    assert done.exit_code == 2 and "htp://localhost:9 begins with htp://; give a URL such as http://" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("hi", "--url", "ftp://x"), "ftp://x begins with ftp://; give a URL such as http://localhost:8000"),
        (("hi", "--url", ""), "--url '' names no server; give a URL such as http://localhost:8000"),
        (("hi", "--url", "http:///v1"), "--url 'http:///v1' names no server; give a URL"),
        (("hi", "--url", "server:99999"), "--url 'server:99999' names no server; give a URL"),
        (("hi", "--url", "server:port"), "--url 'server:port' names no server; give a URL"),
        (("hi", "--url", "a..b"), "--url 'a..b' names no server; give a URL"),
        (("hi", "--temperature", "99"), "--temperature"),
        (("hi", "--temperature", "-1"), "--temperature"),
        (("hi", "--temperature", "nan"), "--temperature"),
        (("hi", "--max-tokens", "0"), "--max-tokens"),
        (("hi", "--thinking", "maybe"), "--thinking 'maybe' must be on or off"),
        (("",), "the question is empty; write one, or leave it out for a conversation"),
        (("  ", "--json"), "the question is empty; write one"),
        ((), "nothing was asked: standard input is empty; give a question, or one a line"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_by_itself_is_refused_before_anything_is_asked(arguments, said, monkeypatch):
    monkeypatch.setattr(chat_tool, "first_model", lambda _: pytest.fail("asks"))
    done = invoke("chat", *arguments)
    assert done.exit_code == 2 and said in done.stderr, (done.output, done.exception)
    assert done.stderr.splitlines()[-1] == done.stderr.splitlines()[-1].strip() and not done.stdout


@pytest.mark.parametrize("question", [("Summarize this.",), ()], ids=["text", "questions"])
def test_what_is_no_text_is_not_asked(question, tmp_path, monkeypatch):
    monkeypatch.setattr(chat_tool, "first_model", lambda _: pytest.fail("asks"))
    done = CliRunner().invoke(app, ["chat", *question], input=b"\x7fELF\xff\xfe\n")
    assert done.exit_code == 2 and done.stderr.startswith("vllm-bailing chat: standard input is not UTF-8 (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("lines", "code"), [("\none\n/new\n", 0), ("/wrong\none\n", 1), ("one\ntwo\n", 1)])
def test_a_conversation_from_a_file_says_by_its_code_whether_all_was_done(lines, code, monkeypatch):
    chat, _ = a_chat([delta("a"), STOP], OpenAIError("overloaded"))
    monkeypatch.setattr(chat_tool, "connect", lambda _: chat.client)
    done = CliRunner().invoke(app, ["chat", "--served-model-name", "demo"], input=lines)
    assert done.exit_code == code and "a\n" in done.stdout, (done.output, done.exception)


@pytest.mark.parametrize("text", ["{}", "[1]", "[{}]", '[{"name": "get_time"}]', "no JSON"])
def test_tools_are_a_list_of_functions(text, tmp_path):
    (tmp_path / "tools.json").write_text(text)
    done = invoke("chat", "hello", "--tools", tmp_path / "tools.json")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "--tools" in done.stderr
    assert invoke("chat", "hello", "--tools", tmp_path).exit_code == 2
