"""Chat templates for messages that nobody vouches for: control tokens come from the template alone.

A template puts roles, reasoning and tool calls between tokens such as `<role>`. vLLM encodes the rendered text as one
string, so the same letters within a message become the same tokens: whoever writes a part of one, a user or a page in
the result of a tool, can write a turn of the system. `--tokenizer-mode bailing_split` has them read as ordinary text in
all that a chat request brings, and `bailing_refuse` answers such a request with an error.

What passes: `<think>` and `</think>` in the content of an assistant's message, out of which templates take reasoning.
Prompts of the completions endpoint are no messages, and are encoded as before.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Collection
from typing import Any

from vllm_bailing.errors import SettingsError, shown
from vllm_bailing.plugin.supported_versions import TOKENIZER_MODES

SPLIT, REFUSE = TOKENIZER_MODES
_REASONING = ("<think>", "</think>")
_PRIVATE_USE = tuple(map(chr, range(0xE000, 0xF900)))  # characters without a meaning of their own


class SplitsControlTokens:
    """The tokenizer of `--tokenizer-mode bailing_split`, in the form that vLLM's registry of tokenizers asks for."""

    refuses = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """vLLM's tokenizer for these arguments, `guarded`."""
        from vllm.tokenizers.hf import CachedHfTokenizer

        return guarded(CachedHfTokenizer.from_pretrained(*args, **kwargs), cls.refuses)


class RefusesControlTokens(SplitsControlTokens):
    """The same for `--tokenizer-mode bailing_refuse`."""

    refuses = True


def guarded(tokenizer: Any, refuses: bool = False) -> Any:
    """A copy of a Hugging Face tokenizer whose `apply_chat_template` writes no control token that a message holds.

    Messages without any are rendered as before. Otherwise the result is token ids, also with `tokenize=False`: a text
    cannot say which of its control tokens are meant.

    Args:
        refuses: Raise a ValueError instead, which vLLM answers with 400.
    Raises:
        SettingsError: If its control tokens cannot be encoded as ordinary text.
    """
    control = ControlTokens(tokenizer)
    original = type(tokenizer).apply_chat_template

    class Guarded(type(tokenizer)):
        @functools.wraps(original)
        def apply_chat_template(self, conversation: Any, tools: Any = None, **kwargs: Any) -> Any:
            try:
                return self._apply_guarded(conversation, tools, **kwargs)
            except RecursionError:
                raise ValueError("the request is nested too deeply; give it fewer levels") from None

        def _apply_guarded(self, conversation: Any, tools: Any, **kwargs: Any) -> Any:
            fixed = {key: kwargs.pop(key) for key in ("chat_template", "tokenize", "return_dict") if key in kwargs}
            request = {**kwargs, "messages": conversation, "tools": tools}
            found, is_open = control.look(request)
            if found and refuses:
                raise ValueError(
                    f"{found[1]} holds {shown(found[0])}, a control token of this model, which only the chat template "
                    f"may write; leave it out, or serve with --tokenizer-mode {SPLIT}, which reads it as text"
                )
            if not found and not is_open:
                return original(self, conversation, tools=tools, **kwargs, **fixed)
            mark = control.unused_mark((request, fixed.get("chat_template")))
            request = control.split(request, mark)
            as_text, as_dict = not fixed.pop("tokenize", True), fixed.pop("return_dict", True)
            text = original(self, request.pop("messages"), **request, **fixed, tokenize=False)
            parts = text.split(mark)
            once = list(dict.fromkeys(parts))
            ids_of = dict(zip(once, self(once, add_special_tokens=False)["input_ids"], strict=True))
            ids = [token for part in parts for token in ids_of[part]]
            return ids if as_text or not as_dict else {"input_ids": ids, "attention_mask": [1] * len(ids)}

        def __reduce__(self) -> tuple[Any, ...]:
            return guarded, (tokenizer, refuses)

    Guarded.__name__ = f"Guarded{type(tokenizer).__name__}"
    result = copy.copy(tokenizer)
    result.__class__ = Guarded
    return result


class ControlTokens:
    """What a tokenizer encodes as one token wherever the letters stand.

    Raises:
        SettingsError: If one cannot be encoded as ordinary text, its first character apart from the others.
    """

    def __init__(self, tokenizer: Any) -> None:
        texts = sorted({str(token) for token in tokenizer.added_tokens_decoder.values()} - {""})
        for text in texts:
            pieces = [tokenizer.encode(part, add_special_tokens=False) for part in (text[0], text[1:])]
            ids = [token for piece in pieces for token in piece]
            if not tokenizer.added_tokens_decoder.keys().isdisjoint(ids) or tokenizer.decode(ids) != text:
                raise SettingsError(
                    f"--tokenizer-mode {SPLIT} or {REFUSE}: the tokenizer cannot encode {shown(text)} as ordinary "
                    "text; leave it out"
                )
        self._any = _begins_with(texts)
        self._any_but_reasoning = _begins_with([text for text in texts if text not in _REASONING])
        # A text that begins or ends like this might form one together with its neighbor.
        self._beginnings = tuple({text[:size] for text in texts for size in range(1, len(text))})
        self._endings = tuple({text[size:] for text in texts for size in range(1, len(text))})
        normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        self._normalized = normalizer.normalize_str if normalizer is not None else str

    def look(self, request: dict[str, Any]) -> tuple[tuple[str, str] | None, bool]:
        """The first control token in a request with its place, and whether half of one stands at an edge of a text."""
        found: list[tuple[str, str]] = []
        is_open = False

        def see(text: str, where: str, pattern: re.Pattern[str]) -> str:
            nonlocal is_open
            is_open = is_open or text.endswith(self._beginnings) or text.startswith(self._endings)
            if not found and (match := pattern.search(text)):
                found.append((match[1], where))
            return text

        self._mapped(request, see)
        return (found[0] if found else None), is_open

    def split(self, request: dict[str, Any], mark: str) -> dict[str, Any]:
        """A copy with a `mark` wherever a control token, or a part of one, would be encoded together otherwise."""

        def marked(text: str, where: str, pattern: re.Pattern[str]) -> str:
            head = mark if text.startswith(self._endings) else ""
            tail = mark if text.endswith(self._beginnings) else ""
            return head + pattern.sub(lambda match: match[0] + mark, text) + tail

        return self._mapped(request, marked)

    def unused_mark(self, value: Any) -> str:
        """A character that stands nowhere in `value`.

        Raises:
            ValueError: If there is none.
        """
        used: set[str] = set()
        _each_text(value, lambda text, where: used.update(text) or text)
        mark = next((char for char in _PRIVATE_USE if char not in used), None)
        if mark is None:
            raise ValueError(
                f"the request holds a control token and all {len(_PRIVATE_USE)} characters of Unicode's private use "
                "area; leave one of the two out"
            )
        return mark

    def _mapped(self, request: dict[str, Any], change: Callable[[str, str, re.Pattern[str]], str]) -> dict[str, Any]:
        """A copy with each text changed, which `change` gets as the tokenizer will see it."""

        def anywhere(text: str, where: str) -> str:
            return change(self._normalized(text), where, self._any)

        def said(text: str, where: str) -> str:
            return change(self._normalized(text), where, self._any_but_reasoning)

        messages = [
            {
                key: _each_text(
                    value,
                    said if key == "content" and message.get("role") == "assistant" else anywhere,
                    f"messages[{number}].{key}",
                )
                for key, value in message.items()
            }
            for number, message in enumerate(request["messages"])
        ]
        others = {key: _each_text(value, anywhere, key) for key, value in request.items() if key != "messages"}
        return {"messages": messages, **others}


def _begins_with(texts: Collection[str]) -> re.Pattern[str]:
    """Matches the first character of each of `texts` wherever one stands, also within another."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile(rf"(?=({'|'.join(map(re.escape, longest_first))})).", re.DOTALL) if texts else re.compile("(?!)")


def _each_text(value: Any, change: Callable[[str, str], str], where: str = "") -> Any:
    """A copy of JSON-like `value` with each string changed, names of members too."""
    if isinstance(value, str):
        return change(value, where)
    if isinstance(value, dict):
        return {_each_text(key, change, where): _each_text(one, change, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(one, change, f"{where}[{number}]") for number, one in enumerate(value)]
    return value
