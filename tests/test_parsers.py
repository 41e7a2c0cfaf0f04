"""The parsers: over text with every cut, then as vLLM's server puts them together, then through the server itself."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_serve import as_openai, conversation, serving
from transformers import AutoTokenizer

import vllm_bailing
from vllm_bailing.answers import CallArguments, CallStart, ReasoningStream, ToolCallStream
from vllm_bailing.cli import DEMO, TEMPLATES

HELD_OUT = [json.loads(line) for line in (Path(__file__).parent / "data" / "demo_heldout.jsonl").open()]
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "time", "arguments": {"zone": "a </tool_call> b", "n": [1, {"x": "}"}]}}\n</tool_call>'
ROME, ZONE = ("weather", '{"city": "Rome"}'), ("time", '{"zone": "a </tool_call> b", "n": [1, {"x": "}"}]}')

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
# (text, prompt has opened it): (reasoning, content)
THOUGHTS = {
    ("hello, <think> is a tag", False): ("", "hello, <think> is a tag"),
    ("<think>\nI see.\n\nYes.\n</think>\n\nFour.\n", False): ("I see.\n\nYes.", "Four.\n"),
    ("\n<think>I see.</think>Four.", False): ("I see.", "Four."),
    ("I see.\n</think>\n\nFour.", True): ("I see.", "Four."),
    ("I see.\n</think>\n\nFour.", False): ("", "I see.\n</think>\n\nFour."),
    ("<think>I see.</think>Four.", True): ("I see.", "Four."),
    ("<think>\nI see, but", False): ("I see, but", ""),
    ("I see, but </thi", True): ("I see, but </thi", ""),
    ("<think></think>Four.", False): ("", "Four."),
    ("<think>a</think>b</think>c", False): ("a", "b</think>c"),
    ("<thi", False): ("", "<thi"),
}


def by_kind(kind, count):
    return [row["answer"] for row in HELD_OUT if row["kind"] == kind][:count]


RECORDED = [
    *by_kind("tool calls", 15),
    *by_kind("thinking", 15),
    *by_kind("tool results", 5),
    *by_kind("small talk", 5),
    *[f"{thought}\n{call}" for thought, call in zip(by_kind("thinking", 5), by_kind("tool calls", 5), strict=True)],
    *[f"{a}\n{b}" for a, b in zip(by_kind("tool calls", 5), by_kind("tool calls", 10)[5:], strict=True)],
]


def calls_of(pieces):
    """(content, calls) of what a ToolCallStream gave."""
    content, calls = "", []
    for piece in pieces:
        if isinstance(piece, CallStart):
            calls.append((piece.name, ""))
        elif isinstance(piece, CallArguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
        else:
            content += piece
    return content, calls


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


@pytest.mark.parametrize("text", CALLS)
def test_calls_and_text_are_told_apart_wherever_the_text_is_cut(text):
    for parts in cuts(text):
        assert read_calls(*parts) == CALLS[text], parts


@pytest.mark.parametrize("text, is_open", THOUGHTS)
def test_reasoning_and_content_are_told_apart_wherever_the_text_is_cut(text, is_open):
    for parts in cuts(text):
        assert read_thoughts(is_open, *parts) == THOUGHTS[text, is_open], parts


def test_arguments_come_while_they_are_written():
    stream = ToolCallStream()
    sent = [stream.feed(char) for char in TIME]
    arguments = [piece.text for pieces in sent for piece in pieces if isinstance(piece, CallArguments)]
    assert len(arguments) > len(ZONE[1]) / 2 and "".join(arguments) == ZONE[1]


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<", "</tool_"),
    *('{"name": "f1", "arguments": {"k": "2"}}', '{"name": "f3", "arguments": ', '{"4": "', '"}', "}", '"', "["),
    *("5", " ", "\n", "\\", "ü"),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@st.composite
def cut_texts(draw):
    text = draw(texts)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=1500, deadline=None)
@given(cut_texts(), st.booleans())
def test_any_text_reads_the_same_in_any_cut_and_loses_nothing(parts, is_open):
    text = "".join(parts)
    content, calls = read_calls(*parts)
    assert (content, calls) == read_calls(text)
    came = content + "".join(name + arguments for name, arguments in calls)
    assert sorted(filter(str.isdigit, came)) == sorted(filter(str.isdigit, text))
    reasoning, content = read_thoughts(is_open, *parts)
    assert (reasoning, content) == read_thoughts(is_open, text)
    assert (reasoning + content).replace(" ", "").replace("\n", "").count("5") == text.count("5")


# ---- as the server puts them together -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def build(tokenizer):
    """Makes the parser of a request, as vLLM's chat endpoint does."""
    import vllm.tool_parsers  # noqa: F401 (the server has imported it before it loads plugins)

    vllm_bailing.register()
    vllm_bailing.compat.register_parsers()
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser import ParserManager

    def build(messages, options, reasoning=True, tools=True, **fields):
        parser_class = ParserManager.get_parser(
            tool_parser_name="bailing" if tools else None,
            reasoning_parser_name="bailing" if reasoning else None,
            enable_auto_tools=True,
        )
        template = {key: value for key, value in options.items() if key != "tools"}
        request = ChatCompletionRequest(
            model="demo", messages=messages, tools=options.get("tools"), chat_template_kwargs=template, **fields
        )
        return parser_class(tokenizer, request.tools, chat_template_kwargs=template), request

    return build


TOOLS = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("weather", "time")]
ASK = [{"role": "user", "content": "Weather in Rome?"}]


def prompt_of(tokenizer, messages, options):
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, **options)
    return ids["input_ids"] if hasattr(ids, "keys") else ids


def streamed(build, tokenizer, answer, options, steps, **fields):
    """(reasoning, content, calls) of the deltas, when `steps` tokens come at once."""
    parser, request = build(ASK, options, **fields)
    prompt = prompt_of(tokenizer, ASK, options)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    reasoning, content, calls, told = "", "", [], ""
    for place in range(0, len(ids), steps):
        text = tokenizer.decode(ids[: place + steps])
        delta = parser.parse_delta(
            text[len(told) :], ids[place : place + steps], request, prompt, finished=place + steps >= len(ids)
        )
        told = text
        if delta is None:
            continue
        reasoning += delta.reasoning or ""
        content += delta.content or ""
        for call in delta.tool_calls or []:
            assert call.index in (len(calls) - 1, len(calls))
            if call.index == len(calls):
                assert call.id and call.function.name
                calls.append((call.function.name, ""))
            calls[-1] = (calls[-1][0], calls[-1][1] + (call.function.arguments or ""))
    return reasoning, content, calls


def at_once(build, tokenizer, answer, options, **fields):
    parser, request = build(ASK, options, **fields)
    parser.is_reasoning_end(prompt_of(tokenizer, ASK, options))  # which the server does before it generates
    reasoning, content, calls = parser.parse(answer, request, enable_auto_tools=True)
    return reasoning or "", content or "", [(call.name, call.arguments) for call in calls or []]


@pytest.mark.parametrize("number", range(len(RECORDED)))
def test_streams_give_what_whole_answers_give(build, tokenizer, number):
    answer = RECORDED[number]
    options = {"tools": TOOLS, "thinking_option": "on" if "<think>" in answer else "off"}
    whole = at_once(build, tokenizer, answer, options)
    assert (answer.count("<think>"), answer.count("<tool_call>")) == (bool(whole[0]), len(whole[2]))
    for steps in (1, 2, 3, 7, 1000):
        assert streamed(build, tokenizer, answer, options, steps) == whole


@pytest.mark.parametrize("reasoning, tools", [(True, False), (False, True)])
def test_each_parser_works_without_the_other(build, tokenizer, reasoning, tools):
    answer = f"<think>\nRain?\n</think>\n\nI look.\n{WEATHER}"
    options = {"tools": TOOLS, "thinking_option": "on"}
    wanted = ("", "<think>\nRain?\n</think>\n\nI look.", [ROME]) if tools else ("Rain?", f"I look.\n{WEATHER}", [])
    fields = {"reasoning": reasoning, "tools": tools}
    assert at_once(build, tokenizer, answer, options, **fields) == wanted
    for steps in (1, 3, 1000):
        assert streamed(build, tokenizer, answer, options, steps, **fields) == wanted


def test_no_tool_calls_when_none_are_wanted(build, tokenizer):
    options = {"tools": TOOLS}
    wanted = ("", f"So: {WEATHER}", [])
    assert at_once(build, tokenizer, wanted[1], options, tool_choice="none") == wanted
    assert streamed(build, tokenizer, wanted[1], options, 2, tool_choice="none") == wanted


@pytest.mark.parametrize("template", ["demo", "ring", "ring-mini", "none"])
@pytest.mark.parametrize("thinking", ["on", "off"])
def test_the_prompt_tells_how_the_answer_is_read(build, tokenizer, template, thinking):
    """Ring-mini's template opens the reasoning itself; the base models' says nothing about it."""
    options = {"thinking_option": thinking}
    prompt = tokenizer.apply_chat_template(
        ASK,
        add_generation_prompt=True,
        tokenize=False,
        chat_template=(TEMPLATES / "ring.jinja").read_text() if template == "ring" else None,
        **options,
    )
    if template in ("ring-mini", "none"):
        prompt = "<role>HUMAN</role>Weather in Rome?<role>ASSISTANT</role>" + "<think>\n" * (template == "ring-mini")
    parser, request = build(ASK, options)
    ended = parser.is_reasoning_end(tokenizer.encode(prompt, add_special_tokens=False))
    reads = {"demo": thinking, "ring": thinking, "ring-mini": "open", "none": "on"}[template]
    assert ended == (reads == "off")
    answers = {"on": "<think>a</think>b", "off": "<think>a</think>b", "open": "a</think>b"}
    wanted = (None, "<think>a</think>b") if reads == "off" else ("a", "b")
    assert parser.parse(answers[reads], request)[:2] == wanted


def test_further_answers_to_a_prompt_are_read_by_the_models_own_template(build, tokenizer):
    parser, request = build(ASK, {"thinking_option": "off"})
    assert parser.parse("<think>a</think>b", request)[:2] == (None, "<think>a</think>b")
    parser, request = build(ASK, {"thinking_option": "on"})
    assert parser.parse("<think>a</think>b", request)[:2] == ("a", "b")


def test_the_end_of_the_reasoning_is_seen_in_tokens(build, tokenizer):
    reasoning_parser = build(ASK, {})[0].reasoning_parser
    prompt = prompt_of(tokenizer, ASK, {"thinking_option": "on"})
    answer = tokenizer.encode("<think>\nI see.\n</think>\n\nFour.", add_special_tokens=False)
    end = answer.index(tokenizer.convert_tokens_to_ids("</think>"))
    for place in range(len(answer)):
        so_far = prompt + answer[: place + 1]
        assert reasoning_parser.is_reasoning_end_streaming(so_far, so_far[-1:]) == (place == end)
    assert reasoning_parser.extract_content_ids(answer) == answer[end + 1 :]
    assert build(ASK, {"thinking_option": "on"})[0].reasoning_parser.count_reasoning_tokens(answer) == end - 1
    assert build(ASK, {"thinking_option": "off"})[0].reasoning_parser.count_reasoning_tokens(answer) == 0


def test_tags_of_several_tokens_are_seen_too(build):
    """A tokenizer that has no token for the tags, as none was looked at for every checkpoint."""
    letters = {chr(code): code for code in range(128)}

    class Letters:
        all_special_tokens: tuple = ()

        def get_vocab(self):
            return letters

        def decode(self, ids, skip_special_tokens=False):
            return "".join(map(chr, ids))

    from vllm_bailing.parsers import BailingReasoningParser

    reasoning_parser = BailingReasoningParser(Letters())
    ids = [ord(char) for char in "<think>abc</think>d"]
    ended = [reasoning_parser.is_reasoning_end_streaming(ids[:end], ids[end - 1 : end]) for end in range(1, len(ids))]
    assert ended.index(True) == len("<think>abc</think>") - 1 and sum(ended) == 1
    assert reasoning_parser.count_reasoning_tokens(ids) == 3


# ---- through the server ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("parsers") / "log"
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "bailing", "--reasoning-parser", "bailing")
    with serving(log, *flags) as server:
        yield server


def say(server, messages, options, stream=False, regex=None, **fields):
    """(reasoning, content, calls, finish reason) of an answer by the OpenAI client."""
    template = {key: value for key, value in options.items() if key != "tools"}
    extra = {"chat_template_kwargs": template}
    if regex:
        extra["structured_outputs"] = {"regex": regex}
    if tools := options.get("tools"):
        fields["tools"] = tools
    fields = {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 160, **fields}
    answer = server.client.chat.completions.create(**fields, stream=stream, extra_body=extra)
    if not stream:
        choice = answer.choices[0]
        message = choice.message
        calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or []]
        return getattr(message, "reasoning", None) or "", message.content or "", calls, choice.finish_reason
    reasoning, content, calls, reason = "", "", [], None
    for chunk in answer:
        for choice in chunk.choices:
            reasoning += getattr(choice.delta, "reasoning", None) or ""
            content += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for call in choice.delta.tool_calls or []:
                if call.index == len(calls):
                    calls.append((call.function.name, ""))
                calls[-1] = (calls[-1][0], calls[-1][1] + (call.function.arguments or ""))
    return reasoning, content, calls, reason


def first(kind):
    row = next(row for row in HELD_OUT if row["kind"] == kind)
    messages, options = conversation(row)
    return as_openai(messages), options, row["answer"]


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["small talk", "thinking", "tool calls", "tool results"])
def test_the_server_divides_what_the_model_says(server, kind, stream):
    messages, options, answer = first(kind)
    reasoning, content, calls, reason = say(server, messages, options, stream)
    thought, rest = read_thoughts(False, answer)
    assert (reasoning, (content, calls)) == (thought, read_calls(rest))
    assert bool(calls) == (kind == "tool calls") and bool(reasoning) == (kind == "thinking")
    assert reason == ("tool_calls" if calls else "stop")


TWO = r'<tool_call>\n\{"name": "weather", "arguments": \{"city": "Rome"\}\}\n</tool_call>\n'
TWO += r'<tool_call>\n\{"name": "time", "arguments": \{"zone": "CET"\}\}\n</tool_call>'


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True])
def test_the_server_gives_two_calls_and_the_text_before_them(server, stream):
    """The demo model calls one function at a time, so a grammar has it say more."""
    told = say(server, ASK, {}, stream, regex="I look\\.\n" + TWO)[:3]
    assert told[2] == [] and told[1].startswith("I look.\n<tool_call>")  # without tools in the request
    told = say(server, ASK, {"tools": TOOLS}, stream, regex="I look\\.\n" + TWO)
    assert told == ("", "I look.", [ROME, ("time", '{"zone": "CET"}')], "tool_calls")


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
def test_calls_can_be_required(server, choice, stream):
    messages, options, _ = first("tool calls")
    tools = [*options["tools"]]
    names = {tool["function"]["name"] for tool in tools}
    if choice != "required":
        choice = {"type": "function", "function": {"name": sorted(names)[-1]}}
        names = {sorted(names)[-1]}
    _, content, calls, _ = say(server, messages, {"tools": tools}, stream, tool_choice=choice)
    assert not content.strip() and calls and {name for name, _ in calls} <= names
    for _, arguments in calls:
        assert isinstance(json.loads(arguments), dict)


@pytest.mark.engine
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_keeps_its_text(server, stream):
    messages, options, _ = first("tool calls")
    told = []
    for limit in range(1, 24, 3):
        _, content, calls, reason = say(server, messages, options, stream, max_tokens=limit)
        assert reason == "length" or calls
        told.append(content + "".join(name + arguments for name, arguments in calls))
    assert all(told)
    assert all(len(one) < len(other) or one.startswith("<tool_call>") for one, other in itertools.pairwise(told))


@pytest.mark.engine
def test_a_grammar_waits_for_the_end_of_the_reasoning(server):
    messages, options, answer = first("thinking")
    thought, _ = read_thoughts(False, answer)
    reasoning, content, _, _ = say(server, messages, options, regex="yes|no")
    assert reasoning == thought and content in ("yes", "no")
    assert say(server, messages, {"thinking_option": "off"}, regex="yes|no")[:2] in (("", "yes"), ("", "no"))


@pytest.mark.engine
def test_the_server_gives_reasoning_and_a_call_in_one_answer(tmp_path):
    """The demo model does not think before it calls, so a grammar has it do that too."""
    flags = ("--enable-auto-tool-choice", "--tool-call-parser", "bailing", "--reasoning-parser", "bailing")
    with serving(tmp_path / "log", *flags, "--structured-outputs-config", '{"enable_in_reasoning": true}') as server:
        regex = r"<think>\nWhere\?\n</think>\n\nI look\.\n" + TWO
        for stream in (False, True):
            told = say(server, ASK, {"tools": TOOLS, "thinking_option": "on"}, stream, regex=regex)
            assert told == ("Where?", "I look.", [ROME, ("time", '{"zone": "CET"}')], "tool_calls")
