"""Reasoning in streamed text."""

from __future__ import annotations

import pytest

from tests.support.answers import cuts, read_thoughts

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


@pytest.mark.parametrize("text, is_open", THOUGHTS)
def test_reasoning_and_content_are_told_apart_wherever_the_text_is_cut(text, is_open):
    for parts in cuts(text):
        assert read_thoughts(is_open, *parts) == THOUGHTS[text, is_open], parts
