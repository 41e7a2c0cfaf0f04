"""Grammars for answers that may begin with reasoning."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from vllm.v1.structured_output.backend_types import StructuredOutputGrammar


class OptionalReasoning(StructuredOutputGrammar):
    """vLLM's grammar of the content, for an answer that opens with reasoning or does without.

    As long as the answer can still open the reasoning, the tokens that do so are allowed beside those of the grammar.
    In the reasoning every token is allowed that does not end the answer. The content, from the first token or after the
    reasoning, follows the grammar. The state is a function of the tokens, so any of them can be taken back.

    Args:
        grammar: For the content alone.
        openings: Ids of tokens that open the reasoning, one list for each way to write it.
        is_end: Whether the last of the tokens [n] completes the end of the reasoning; called with all and the last.
        stops: The tokens that end the answer.
    """

    def __init__(
        self,
        grammar: StructuredOutputGrammar,
        openings: Sequence[list[int]],
        is_end: Callable[[Sequence[int], Sequence[int]], bool],
        stops: Collection[int] = (),
    ) -> None:
        self._grammar, self._openings, self._is_end, self._stops = grammar, openings, is_end, stops
        self._tokens: list[int] = []
        self._starts: list[int | None] = [0]  # where the content began, before and after each token; None in reasoning
        self._fed: list[int] = []  # the tokens that the grammar has taken

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Whether all of the tokens are allowed; those after the end are ignored, as vLLM's grammars do."""
        return all(self.is_terminated() or self._advance(token, request_id) for token in tokens)

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that is not allowed; the state stays as it is."""
        count = 0
        while count < len(tokens) and not self.is_terminated() and self._advance(tokens[count], ""):
            count += 1
        self.rollback(count)
        return tokens[:count]

    def rollback(self, num_tokens: int) -> None:
        """Take the last tokens back."""
        if not num_tokens:
            return
        del self._tokens[-num_tokens:], self._starts[-num_tokens:]
        start = self._starts[-1]
        content = [] if start is None else self._tokens[start:]
        if self._fed[: len(content)] == content:
            if surplus := len(self._fed) - len(content):
                self._grammar.rollback(surplus)
                del self._fed[-surplus:]
        else:
            self._clear()
            for index, token in enumerate(content):
                self._feed(token, index, "")

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        """Write the tokens that may follow into row `batch_index` of the int32 mask [rows, ceil(vocabulary / 32)]."""
        if self._starts[-1] is None:
            bitmask[batch_index].fill_(-1)
            for token in self._stops:
                bitmask[batch_index, token // 32] &= ~_bit(token)
            return
        reached = len(self._tokens)
        openings = self._openings_left()
        if openings and len(self._fed) < reached:
            bitmask[batch_index].zero_()
        else:
            self._grammar.fill_bitmask(bitmask, batch_index)
        for opening in openings:
            bitmask[batch_index, opening[reached] // 32] |= _bit(opening[reached])

    def is_terminated(self) -> bool:
        """Whether the content is complete."""
        return self._starts[-1] is not None and self._grammar.is_terminated()

    def reset(self) -> None:
        """Begin anew."""
        self._tokens, self._starts = [], [0]
        self._clear()

    def _openings_left(self) -> list[list[int]]:
        """The openings that the answer has begun, and not more."""
        if self._starts[-1] != 0:
            return []
        reached = len(self._tokens)
        return [opening for opening in self._openings if len(opening) > reached and opening[:reached] == self._tokens]

    def _advance(self, token: int, request_id: str) -> bool:
        start = self._starts[-1]
        if start is None and token in self._stops:
            return False
        opens = [opening for opening in self._openings_left() if opening[len(self._tokens)] == token]
        self._tokens.append(token)
        if start is None:
            start = len(self._tokens) if self._is_end(self._tokens, [token]) else None
        elif self._tokens in opens:
            start = None
            self._clear()
        elif not self._feed(token, len(self._tokens) - 1 - start, request_id) and not opens:
            self._tokens.pop()
            return False
        self._starts.append(start)
        return True

    def _feed(self, token: int, index: int, request_id: str) -> bool:
        """Hand token `index` of the content to the grammar, unless it has refused an earlier one."""
        if len(self._fed) < index or not self._grammar.validate_tokens([token]):
            return False
        self._fed.append(token)
        return self._grammar.accept_tokens(request_id, [token])

    def _clear(self) -> None:
        if self._fed:
            self._grammar.reset()
            self._fed = []


def _bit(token: int) -> int:
    """The bit of a token in its word of the mask, as an int32."""
    return 1 << token % 32 if token % 32 < 31 else -(1 << 31)
