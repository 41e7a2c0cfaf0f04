"""The reasoning of an answer: `<think>` reasoning `</think>` content.

The stream gives the same however the text is cut, and loses none of it. A whole answer is a stream fed once. No vLLM in
here.
"""

from __future__ import annotations

THINK, END_THINK = "<think>", "</think>"


def settled_length(text: str, tag: str) -> int:
    """Length of `text` that can be handed on: all but a beginning of `tag` at its end and the whitespace before it."""
    overlap = next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)
    return len(text[: len(text) - overlap].rstrip())


class ReasoningStream:
    """Divides the text of an answer into reasoning and content.

    Whitespace beside the tags is left out. Text without an opening tag is content, unless `is_open`; reasoning that is
    never closed is reasoning to the end.

    Args:
        is_open: Whether the prompt has opened the reasoning already. The tag may then be repeated.
    """

    def __init__(self, is_open: bool) -> None:
        self.is_open = is_open
        self.state = "start"
        self._text = ""
        self._has_begun = False

    @property
    def has_ended(self) -> bool:
        """Whether all that follows is content."""
        return self.state == "content"

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that `text` completes."""
        self._text += text
        reasoning = ""
        if self.state == "start":
            begun = self._text.lstrip()
            if begun.startswith(THINK):
                self.state, self._text = "reasoning", begun[len(THINK) :]
            elif THINK.startswith(begun):
                return "", ""
            elif self.is_open:
                self.state, self._text = "reasoning", begun
            else:
                self.state = "content"
        if self.state == "reasoning":
            if not self._has_begun:
                self._text = self._text.lstrip()
            before, tag, after = self._text.partition(END_THINK)
            if tag:
                reasoning, self._text, self.state = before.rstrip(), after, "between"
            else:
                size = settled_length(self._text, END_THINK)
                reasoning, self._text = self._text[:size], self._text[size:]
            self._has_begun = self._has_begun or bool(reasoning)
        if self.state == "between":
            self._text = self._text.lstrip()
            if self._text:
                self.state = "content"
        if self.state != "content":
            return reasoning, ""
        content, self._text = self._text, ""
        return reasoning, content

    def close(self) -> tuple[str, str]:
        """(reasoning, content) that was held back, at the end of the answer."""
        rest, self._text = self._text, ""
        if self.state == "reasoning" or (self.state == "start" and self.is_open):
            return rest.rstrip(), ""
        return "", rest
