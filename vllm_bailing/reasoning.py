"""The reasoning of an answer: `<think>` reasoning `</think>` content.

The stream gives the same however the text is cut, and loses none of it. A whole answer is a stream fed once. No vLLM in
here.
"""

from __future__ import annotations

THINK, END_THINK = "<think>", "</think>"


def overlap_of(text: str, tag: str) -> int:
    """Length of the beginning of `tag` that `text` ends with."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)


class HeldSpace:
    """Whitespace that is handed on when something else follows it."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def before(self, text: str) -> str:
        """All that was held and `text`, but for the whitespace at its end, which is held now."""
        said = text.rstrip()
        if not said:
            self._parts.append(text)
            return ""
        held, self._parts = self.take(), [text[len(said) :]]
        return held + said

    def take(self) -> str:
        """What is held, for the last time."""
        held, self._parts = "".join(self._parts), []
        return held


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
        self._partial = ""  # what may be the beginning of a tag
        self._space = HeldSpace()
        self._has_begun = False

    @property
    def has_ended(self) -> bool:
        """Whether all that follows is content."""
        return self.state == "content"

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that `text` completes."""
        text, self._partial = self._partial + text, ""
        reasoning = ""
        if self.state == "start":
            begun = text.lstrip()
            self._space.before(text[: len(text) - len(begun)])
            if begun.startswith(THINK):
                self._space.take()
                self.state, text = "reasoning", begun[len(THINK) :]
            elif THINK.startswith(begun):
                self._partial = begun
                return "", ""
            elif self.is_open:
                self._space.take()
                self.state, text = "reasoning", begun
            else:
                self.state, text = "content", self._space.take() + begun
        if self.state == "reasoning":
            before, tag, after = text.partition(END_THINK)
            if not tag:
                overlap = overlap_of(text, END_THINK)
                before, self._partial = text[: len(text) - overlap], text[len(text) - overlap :]
            reasoning = self._space.before(before if self._has_begun else before.lstrip())
            self._has_begun = self._has_begun or bool(reasoning)
            text = after
            if tag:
                self._space.take()
                self.state = "between"
        if self.state == "between":
            text = text.lstrip()
            if text:
                self.state = "content"
        return reasoning, text if self.state == "content" else ""

    def close(self) -> tuple[str, str]:
        """(reasoning, content) that was held back, at the end of the answer."""
        rest, self._partial = self._partial, ""
        if self.state == "reasoning" or (self.state == "start" and self.is_open):
            return (self._space.take() if self._has_begun and rest else "") + rest, ""
        return "", self._space.take() + rest
