"""Tool calls in streamed text."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.answers import ROME, TIME, WEATHER, ZONE, calls_of, cuts, read_calls
from vllm_bailing import tool_calls
from vllm_bailing.tool_calls import CALL, END_CALL, ToolCall, ToolCallStream
from vllm_bailing.tool_calls import read_calls as read_calls_of

HALF = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro'
DEEP = "[" * 100_000


def tagged(body):
    return f"{CALL}\n{body}\n{END_CALL}"


# text: (content, calls)
CALLS = {
    "": ("", []),
    "just text, 1 < 2 and <tool": ("just text, 1 < 2 and <tool", []),
    WEATHER: ("", [ROME]),
    f"{WEATHER}\n{TIME}": ("", [ROME, ZONE]),
    f"I look.\n\n{WEATHER}\nAnd then:\n{TIME}\n\nDone.": ("I look.And then:Done.", [ROME, ZONE]),
    '<tool_call>{"name":"f","arguments":{}}</tool_call>': ("", [("f", "{}")]),
    '<tool_call>{"name": "f"}</tool_call>': ("", [("f", "{}")]),
    '<tool_call>{"name": "f", "arguments": null}</tool_call>': ("", [("f", "{}")]),
    '<tool_call>{"arguments": {"a": "ü"}, "name": "f"}</tool_call> x': ("x", [("f", '{"a": "ü"}')]),
    '<tool_call>{"name": "f", "parameters": {"a": "</tool_call>"}}</tool_call>': (
        "",
        [("f", '{"a": "</tool_call>"}')],
    ),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>': ("", [("f", '{"a": 1}')]),
    '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"two\\nlines\\"}"}</tool_call>': (
        "",
        [("f", '{"a": "two\\nlines"}')],
    ),
    '<tool_call>{"name": "f", "arguments": {"a": "two\nlines"}}</tool_call>': ("", [("f", '{"a": "two\\nlines"}')]),
    # Numbers that Python would change or refuse
    tagged('{"name": "f", "arguments": {"a": 1.10, "b": 1e999}}'): ("", [("f", '{"a": 1.10, "b": 1e999}')]),
    tagged('{"name": "f", "arguments": {"a": %s}}' % ("9" * 5000)): ("", [("f", '{"a": %s}' % ("9" * 5000))]),
    # Other forms whose meaning is plain
    tagged(f"[{json.dumps({'name': 'a'})}, {json.dumps({'name': 'b', 'arguments': {'x': [1]}})}]"): (
        "",
        [("a", "{}"), ("b", '{"x": [1]}')],
    ),
    tagged('{"name": "a", "arguments": {"x": 1}}\n{"name": "b", "arguments": {"x": 2}}'): (
        "",
        [("a", '{"x": 1}'), ("b", '{"x": 2}')],
    ),
    tagged('{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}'): ("", [("f", '{"a": 1}')]),
    tagged('[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\\"a\\": 1}"}}]'): (
        "",
        [("f", '{"a": 1}')],
    ),
    tagged('{"type": "function", "name": "f", "parameters": {"a": 1}}'): ("", [("f", '{"a": 1}')]),
    # A tag behind an escaped quotation mark, in a string
    tagged(r'{"name": "f", "arguments": {"a": "\" <tool_call> \\"}}'): ("", [("f", r'{"a": "\" <tool_call> \\"}')]),
    # One brace too many, or too few
    '<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>': ("", [("f", '{"a": 1}')]),
    f'{tagged("""{"name": "f", "arguments": {"a": 1}}}""")} x {WEATHER}': ("x", [("f", '{"a": 1}'), ROME]),
    '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>': ("", [("f", '{"a": 1}')]),
    # Cut off: complete calls are calls, all else stays text.
    "see <tool_call>": ("see <tool_call>", []),
    'see <tool_call>\n{"name": "wea': ('see <tool_call>\n{"name": "wea', []),
    HALF: (HALF, []),
    f"{WEATHER}\n{HALF}": (HALF, [ROME]),
    '<tool_call>{"name": "weather"': ('<tool_call>{"name": "weather"', []),
    '<tool_call>{"type": "function", "function": {"name": "f"}': (
        '<tool_call>{"type": "function", "function": {"name": "f"}',
        [],
    ),
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}': ("", [ROME]),
    WEATHER.removesuffix("</tool_call>"): ("", [ROME]),
    WEATHER.removesuffix("call>"): ("", [ROME]),
    WEATHER.removesuffix("</tool_call>") + "\n" + TIME: ("", [ROME, ZONE]),
    WEATHER.removesuffix("</tool_call>") + "It rains.": ("It rains.", [ROME]),
    # Malformed
    "<tool_call>\nnot JSON\n</tool_call> and on": ("<tool_call>\nnot JSON\n</tool_call> and on", []),
    "the tag <tool_call> begins": ("the tag <tool_call> begins", []),
    '<tool_call>{"a": 1}</tool_call>': ('<tool_call>{"a": 1}</tool_call>', []),
    f"x <tool_call>[1</tool_call>\n{WEATHER}": ("x <tool_call>[1</tool_call>", [ROME]),
    '<tool_call>{"name": "f", "arguments": {"a": 1\n</tool_call>\n' + WEATHER: (
        '<tool_call>{"name": "f", "arguments": {"a": 1\n</tool_call>',
        [ROME],
    ),
    f"{CALL}{DEEP}{END_CALL}": (f"{CALL}{DEEP}{END_CALL}", []),
}
NO_OBJECTS = ['"hello"', '"[1]"', "[1]", "5", "true", '"{"', '{"a": NaN}', '{"a": Infinity}', '"{\\"a\\": NaN}"']
NO_CALLS = [
    *('{"name": ""}', '{"name": " "}', '{"name": 5}', '{"name": null}', "[]", "[[]]", "{}", '{"function": {}}'),
    *(f'{{"name": "f", "arguments": {value}}}' for value in NO_OBJECTS),
    *('[{"name": "f"}, 5]', '[{"name": "f"}, {"name": ""}]', '{"type": "function", "function": "f"}'),
    *("{'name': 'f'}", '{"name": "f", "arguments": {"a": "\\x"}}'),
]
CALLS |= {tagged(body): (tagged(body), []) for body in NO_CALLS}


@pytest.mark.parametrize("text", CALLS, ids=lambda text: repr(text[:80]))
def test_calls_and_text_are_told_apart_wherever_the_text_is_cut(text):
    for parts in cuts(text) if len(text) < 1000 else [[text], [text[:400], text[400:]]]:
        assert read_calls(*parts) == CALLS[text], parts


def test_a_call_comes_with_its_closing_tag_and_text_at_once():
    stream = ToolCallStream()
    sent = [stream.feed(char) for char in f"I look. {TIME} x"]
    assert [sent[0], sent[2], sent[5]] == [["I"], [" l"], ["k"]]
    place = next(place for place, pieces in enumerate(sent) if any(isinstance(piece, ToolCall) for piece in pieces))
    assert place == len(f"I look. {TIME}") - 1
    stream = ToolCallStream()
    sent = [stream.feed(char) for char in "the tag <tool_call> is"]
    assert sent[-1] == ["s"]  # what cannot become a call is not held back


# ---- random texts --------------------------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    # (what could be taken for the end of a call)
    | st.lists(st.sampled_from(["</tool_call>", "<tool_call>", '"', "\\", "}", "\n", "<"]), max_size=4).map("".join),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(st.text(max_size=4), values, max_size=3)
names = st.text(min_size=1, max_size=6).filter(str.strip)
calls = st.tuples(names, objects)
proses = st.text(alphabet="ab c,1<>/{}\n", max_size=12)


@st.composite
def written(draw):
    """(text, calls, where each begins) of an answer: text, calls in one of the forms that are read, text."""
    text, meant, begun = draw(proses), [], []
    for name, arguments in draw(st.lists(calls, max_size=3)):
        ascii_only, indent = draw(st.booleans()), draw(st.sampled_from([None, 1]))
        form = draw(st.sampled_from(["plain", "nested", "string", "list", "one too many", "one too few"]))
        call = {"name": name, "arguments": json.dumps(arguments) if form == "string" else arguments}
        call = {"type": "function", "function": call} if form == "nested" else [call] if form == "list" else call
        body = json.dumps(call, ensure_ascii=ascii_only, indent=indent)
        body = body + "}" if form == "one too many" else body[:-1] if form == "one too few" else body
        begun.append(len(text))
        text += draw(st.sampled_from([CALL, CALL + "\n"])) + body + draw(st.sampled_from([END_CALL, "\n" + END_CALL]))
        text += draw(proses)
        meant.append((name, arguments))
    return text, meant, begun


def in_parts(draw, text):
    if draw(st.booleans()):
        return list(text)
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return [text[start:end] for start, end in itertools.pairwise([0, *places, len(text)])]


def refuse(constant):
    raise ValueError(constant)


@settings(max_examples=400, deadline=None)
@given(st.data(), written())
def test_whole_and_streamed_agree_and_arguments_are_objects_also_when_cut_off(data, answer):
    text, meant, begun = answer
    _, found = read_calls(text)
    assert [(name, json.loads(arguments)) for name, arguments in found] == meant
    text = text[: data.draw(st.integers(0, len(text)))]
    content, found = read_calls(text)
    assert read_calls(*in_parts(data.draw, text)) == (content, found)
    for (name, arguments), (meant_name, meant_arguments) in zip(found, meant[: len(found)], strict=True):
        assert (name, json.loads(arguments, parse_constant=refuse)) == (meant_name, meant_arguments)
    if len(found) < len(begun):
        assert content.endswith(text[begun[len(found)] :])


junk = st.lists(
    st.sampled_from([CALL, END_CALL, *'{}[]",:\\ \nx1', '"name"', '"arguments"', '"f"', "{}", '{"name": "f"', "null"]),
    max_size=25,
).map("".join)


@settings(max_examples=1500, deadline=None)
@given(st.data(), junk)
def test_whatever_is_taken_for_a_call_can_be_called(data, text):
    content, found = read_calls(text)
    assert read_calls(*in_parts(data.draw, text)) == (content, found)
    for name, arguments in found:
        assert name.strip() and isinstance(json.loads(arguments, parse_constant=refuse), dict)
    stream = ToolCallStream()
    pieces = [piece for char in text for piece in stream.feed(char)]
    early = calls_of(pieces)[1]
    assert early == found[: len(early)]  # nothing that was handed out is taken back


MANY = 20_000
ENDLESS = {
    "opening tags": CALL * MANY,
    "closing tags": END_CALL * MANY,
    "opening tags in a name": f'{CALL}{{"name": "' + CALL * MANY,
    "closing tags in a name": f'{CALL}{{"name": "' + END_CALL * MANY,
    "closing tags in arguments": f'{CALL}{{"name": "f", "arguments": {{' + f'"a{END_CALL}": "b", ' * MANY,
    "closing tags in no JSON": f'{CALL}{{"name": "f", x ' + f'"a{END_CALL}": "b", ' * MANY,
    "no JSON after a while": f'{CALL}{{"name": "f", {f"{CALL!r}: 1, " * 9}x ' + f'"a{END_CALL}": "b", ' * MANY,
    "calls": f'{CALL}{{"name": "f"}}{END_CALL}' * MANY,
    "calls in one tag": CALL + '{"name": "f"} ' * MANY + END_CALL,
    "a list of calls": f"{CALL}[{', '.join([json.dumps({'name': 'f'})] * MANY)}]{END_CALL}",
    "functions in functions": CALL + '{"function":' * 900 + '"f"' + "}" * 900 + END_CALL,
    "lists in lists": CALL + "[" * 900 + "]" * 900 + END_CALL,
    "brackets": CALL + "[" * MANY + END_CALL,
    "digits": f'{CALL}{{"name": "f", "arguments": {{"a": {"1" * MANY}, "b": "{END_CALL * MANY}"}}}}{END_CALL}',
    "calls without an end": (CALL + '{"name": "f", ') * MANY,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_a_model_never_ends_is_read_a_few_times_at_most(kind, monkeypatch):
    text, read = ENDLESS[kind], []

    class Counting(json.JSONDecoder):
        def raw_decode(self, s, idx=0):
            try:
                value, end = super().raw_decode(s, idx)
            except ValueError as error:
                read.append(getattr(error, "pos", len(s)) - idx)
                raise
            read.append(end - idx)
            return value, end

    options = {"strict": False, "parse_int": str, "parse_float": str}
    monkeypatch.setattr(tool_calls, "_JSON", Counting(**options))
    whole = read_calls(text)
    assert sum(read) <= 12 * len(text)
    assert read_calls(*(text[start : start + 997] for start in range(0, len(text), 997))) == whole
    if kind == "digits":
        assert len(whole[1]) == 1


def test_a_long_call_is_parsed_once(monkeypatch):
    bodies = []
    monkeypatch.setattr(tool_calls, "read_calls", lambda body: bodies.append(body) or read_calls_of(body))
    text = tagged(json.dumps({"name": "write", "arguments": {"text": "x <tool </tool " * 1000}}))
    assert len(read_calls(*text)[1]) == len(bodies) == 1
