"""The parsers as vLLM's server puts them together."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import vllm_bailing
from tests.support.answers import ASK, ROME, TOOLS, WEATHER, read_calls, read_thoughts
from tests.support.conversations import HELD_OUT
from vllm_bailing import DEMO, TEMPLATES
from vllm_bailing.errors import RequestError
from vllm_bailing.plugin.register import register_extensions


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


CUTS = [
    (answer, place)
    for answer in (RECORDED[0], RECORDED[35], RECORDED[40], RECORDED[-1])
    for place in range(1, len(answer), 7)
]


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


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def build(tokenizer):
    """Makes the parser of a request, as vLLM's chat endpoint does."""
    vllm_bailing.register()
    register_extensions()
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


def test_answers_that_are_cut_off_give_no_broken_call(build, tokenizer):
    found = set()
    for answer, place in CUTS:
        options = {"tools": TOOLS, "thinking_option": "on" if "<think>" in answer else "off"}
        part = tokenizer.decode(tokenizer.encode(answer[:place], add_special_tokens=False))
        whole = at_once(build, tokenizer, part, options)
        assert whole == streamed(build, tokenizer, part, options, 3)
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in whole[2])
        assert part.count("</tool_call>") <= len(whole[2]) <= part.count("<tool_call>")
        found.add((len(whole[2]), "<tool_call>" in whole[1]))
    assert found >= {(0, False), (0, True), (1, False), (1, True)}


@pytest.mark.parametrize("reasoning, tools", [(True, False), (False, True)])
def test_each_parser_works_without_the_other(build, tokenizer, reasoning, tools):
    answer = f"<think>\nRain?\n</think>\n\nI look.\n{WEATHER}"
    options = {"tools": TOOLS, "thinking_option": "on"}
    wanted = ("", "<think>\nRain?\n</think>\n\nI look.", [ROME]) if tools else ("Rain?", f"I look.\n{WEATHER}", [])
    fields = {"reasoning": reasoning, "tools": tools}
    assert at_once(build, tokenizer, answer, options, **fields) == wanted
    for steps in (1, 3, 1000):
        assert streamed(build, tokenizer, answer, options, steps, **fields) == wanted


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED = {"type": "function", "function": {"name": "f"}}


def contents(tag):
    """The schemas of the calls that a structural tag allows."""
    return [tag["content"]["json_schema"] for tag in json.loads(tag)["format"]["tags"]]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize(
    "function, wanted",
    [
        ({"parameters": SCHEMA}, SCHEMA),
        ({"parameters": SCHEMA, "strict": True}, SCHEMA),
        ({"parameters": SCHEMA, "strict": False}, {"type": "object"}),
        ({"parameters": {}}, {"type": "object"}),
        ({}, {"type": "object"}),
        ({"parameters": {"type": "no such type"}}, {"type": "object"}),
    ],
    ids=["schema", "strict", "not strict", "empty", "none", "unreadable"],
)
def test_a_call_that_is_demanded_fits_the_schema_of_its_tool(build, choice, function, wanted):
    tools = [{"type": "function", "function": {"name": "f", **function}}]
    parser, request = build(ASK, {"tools": tools}, tool_choice=choice)
    before = request.tools[0].model_dump()
    found = contents(parser.adjust_request(request).structured_outputs.structural_tag)
    assert found and all(schema == wanted for schema in found)
    assert request.tools[0].model_dump() == before


def test_a_call_that_is_free_is_not_constrained(build):
    parser, request = build(ASK, {"tools": TOOLS}, tool_choice="auto")
    assert parser.adjust_request(request).structured_outputs is None


def test_an_unreadable_schema_is_told(build, monkeypatch):
    told = []
    monkeypatch.setattr("vllm_bailing.parsers.logger.warning", lambda text, *values: told.append(text % values))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "no such type"}}}]
    parser, request = build(ASK, {"tools": tools}, tool_choice="required")
    parser.adjust_request(request)
    assert len(told) == 1 and "tool 'f'" in told[0] and "no such type" in told[0] and "\n" not in told[0]


@pytest.mark.parametrize("switch", ["thinking_option", "enable_thinking"])
def test_switches_have_values_that_the_template_understands(build, tokenizer, switch):
    from vllm_bailing.parsers import SWITCHES

    values = SWITCHES[switch]
    rendered = [prompt_of(tokenizer, ASK, {switch: value}) for value in values]
    assert len({*map(tuple, rendered)}) == 2
    for value in (*values, None):
        parser, request = build(ASK, {switch: value})
        assert parser.adjust_request(request) is request
    for value in ("false", "true", "On", "", "auto", 5, [], {}):
        parser, request = build(ASK, {switch: value})
        with pytest.raises(RequestError, match=f'"{switch}": .*; give ') as caught:
            parser.adjust_request(request)
        assert "\n" not in str(caught.value)


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
