"""What a server has besides its weights: its tokenizer and its chat template."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_bailing.errors import shown
from vllm_bailing.tools.chat import http_client
from vllm_bailing.tools.prompts import read_tokenizer, templated

_TEXTS = (
    "The early bird catches the worm; 3.14159 and 1,000,000.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "  Straße, naïve, 你好世界, مرحبا, 🙂🚀\t1234567890\r\n\n<|x|></s> don't",
)
_CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 3 = ?"}],
    [
        {"role": "user", "content": "2 + 3 = ?"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "And 2 * 3?"},
    ],
)
_SHOWN = 4  # ids in a message
_WORDS = 200  # of the vocabulary in a request


def tokenizer_difference(url: str, model: str | None, folder: Path, chat_template: str | None = None) -> str | None:
    """How a server tokenizes otherwise than the checkpoint's files; empty if alike, None if it has no `/tokenize`.

    Args:
        model: The server's name of the model; its first one if left out.
        chat_template: In place of the checkpoint's.

    Raises:
        ValueError: If the template refuses a plain conversation.
    """
    import httpx

    tokenizer = read_tokenizer(folder, "fetch tokenizer.json and tokenizer_config.json again")
    template = chat_template or tokenizer.chat_template
    chats = [templated(tokenizer, messages, chat_template=template) for messages in _CHATS] if template else []
    named = {"model": model} if model else {}
    try:
        with http_client(url, 60) as client:

            def asked(**question: Any) -> list[int]:
                answer = client.post("/tokenize", json={**named, **question})
                answer.raise_for_status()
                return answer.json()["tokens"]

            for text in (*_TEXTS, *_vocabulary(tokenizer)):
                here = tokenizer.encode(text, add_special_tokens=False)
                if said := _difference(asked(prompt=text, add_special_tokens=False), here):
                    return f"its tokenizer is another one: {shown(text, 20)} {said}"
            for messages, text in zip(_CHATS, chats, strict=False):
                here = tokenizer.encode(text, add_special_tokens=False)
                if said := _difference(asked(messages=messages, add_generation_prompt=True), here):
                    return f"its chat template is another one: a chat {said}; name the server's by --chat-template"
    except (httpx.HTTPError, LookupError, TypeError, ValueError):
        return None
    return ""


def _vocabulary(tokenizer: Any) -> Iterator[str]:
    """Texts that together have every word of the vocabulary which is text by itself, the special ones left out."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ids = [[number] for number in range(len(tokenizer)) if number not in special]
    words = [word for word in tokenizer.batch_decode(ids) if word and "\ufffd" not in word]
    for start in range(0, len(words), _WORDS):
        yield "\n".join(words[start : start + _WORDS])


def _difference(came: list[int], here: list[int]) -> str:
    if came == here:
        return ""
    shorter = min(len(came), len(here))
    at = next((i for i in range(shorter) if came[i] != here[i]), shorter)
    found, expected = (", ".join(map(str, ids[at : at + _SHOWN])) or "nothing" for ids in (came, here))
    return f"has {found} from token {at} on, and {expected} with the checkpoint's"
