"""A conversation with a running server, through its OpenAI interface."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import APIConnectionError, OpenAI, OpenAIError

from vllm_bailing.errors import ChatError, shown, told
from vllm_bailing.json_files import read_json, write_text
from vllm_bailing.reasoning import ReasoningStream

NOT_READY = (502, 503, 504)  # what stands for a server that does not answer yet
_LIST_SECONDS = 30.0  # for the names of the models, which no server has to compute
_CUT_OFF = "the connection ended before the answer did; ask again"
_MEASURABLE_SECONDS = 0.5  # below it the pieces of an answer come together, and say nothing about the speed


def with_scheme(url: str) -> str:
    """`url` as people write it, such as localhost:8000, as a whole one."""
    return url if "://" in url else f"http://{url}"


def checked_url(url: str) -> str:
    """As `with_scheme`, of what may be the address of a server.

    Raises:
        ChatError: If it cannot be.
    """
    whole = with_scheme(url)
    scheme = whole.partition("://")[0]
    if scheme.lower() not in ("http", "https"):
        raise ChatError(f"{shown(whole)} begins with {shown(scheme)}://; give a URL such as http://localhost:8000")
    try:
        parts = httpx.URL(whole)
        fits = bool(parts.host.encode("idna")) and (parts.port or 0) < 65536
    except (httpx.InvalidURL, UnicodeError):
        fits = False
    if not fits:
        raise ChatError(f"--url {told(url)} names no server; give a URL such as http://localhost:8000")
    return whole


def base_of(url: str) -> str:
    """Where the server's own endpoints begin, such as /health, from `url` with or without its scheme and /v1."""
    return with_scheme(url).rstrip("/").removesuffix("/v1")


def http_client(url: str, seconds: float) -> httpx.Client:
    """A client of those endpoints, which may take `seconds` to answer; VLLM_API_KEY is sent if it is set.

    Raises:
        httpx.InvalidURL: If `url` is none.
    """
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(base_url=base_of(url), timeout=seconds, headers=headers)


def connect(url: str, **options: Any) -> OpenAI:
    """A client of the server at `url`, with or without its /v1; VLLM_API_KEY is sent if it is set."""
    return OpenAI(base_url=f"{base_of(url)}/v1", api_key=os.environ.get("VLLM_API_KEY") or "none", **options)


def first_model(client: OpenAI) -> str:
    """The first model of the server.

    Raises:
        openai.OpenAIError: If it cannot be reached or refuses to say.
        ChatError: If it serves none, or is no such server.
    """
    try:
        name = client.with_options(timeout=_LIST_SECONDS).models.list().data[0].id
        if isinstance(name, str):
            return name
    # The library believes what it is sent, and ends somewhere in a web page.
    except (AttributeError, LookupError, TypeError):
        pass
    raise ChatError("it lists no models; is it a vLLM server?")


def model_names(client: OpenAI) -> list[str]:
    """The models of a server; empty if it does not list them."""
    try:
        return [model.id for model in client.with_options(max_retries=0).models.list().data]
    except (OpenAIError, AttributeError, TypeError):
        return []


@dataclass
class Call:
    """A call of a function; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Answer:
    """What the model said.

    Attributes:
        finish_reason: As the server gave it; "length" for an answer that was cut off at its limit.
        tokens: As the server counted them; None if it did not.
        seconds: Since the question was sent.
        streamed_tokens: Those after the first piece, which may have several, and comes after the prefill.
        streamed_seconds: Since that piece.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int | None = None
    seconds: float = 0.0
    streamed_tokens: int = 0
    streamed_seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Of the decode; None for an answer that was too quick to tell."""
        is_measurable = self.streamed_tokens and self.streamed_seconds >= _MEASURABLE_SECONDS
        return self.streamed_tokens / self.streamed_seconds if is_measurable else None


class Chat:
    """A conversation with `model`.

    Args:
        thinking: "on" or "off" for the chat template's switch; None leaves it to the template.
        tools: Functions that may be called, as the OpenAI interface takes them.
        sampling: Further fields of the requests, such as temperature.
    """

    def __init__(
        self,
        client: OpenAI,
        model: str,
        system: str | None = None,
        thinking: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        **sampling: Any,
    ) -> None:
        self.client, self.model, self.system, self.thinking = client, model, system, thinking
        self.tools, self.sampling = tools, sampling
        self.last = Answer()
        self.messages: list[dict[str, Any]] = []
        self._asked: list[dict[str, Any]] = []

    def start_again(self, system: str | None = None) -> None:
        """Forget what was said; go on with the `system` message if one is given."""
        self.messages, self._asked, self.last = [], [], Answer()
        self.system = self.system if system is None else system

    def ask(self, *messages: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Send `messages` and yield the answer as it comes: `("reasoning" or "content" or "call", text)`.

        The answer is added to the conversation when it is complete. If it is not read to its end, what the model said
        until then is; if the server fails, the conversation stays as it was.

        Raises:
            openai.OpenAIError: If the server cannot be reached or refuses the request.
            ChatError: If what comes is no answer, or ends before the answer does.
        """
        self._asked = list(messages)
        before = [{"role": "system", "content": self.system}] if self.system else []
        extra = {} if self.thinking is None else {"chat_template_kwargs": {"thinking_option": self.thinking}}
        fields: dict[str, Any] = {"messages": [*before, *self.messages, *messages], "extra_body": extra}
        if self.tools:
            fields["tools"] = self.tools
        # With the latter, vLLM tells with every piece how many tokens came until then.
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        self.last = answer = Answer()
        sent = time.monotonic()
        chunks = self.client.chat.completions.create(model=self.model, stream=True, **fields, **self.sampling)
        try:
            yield from _read(chunks, answer, sent)
        except (GeneratorExit, KeyboardInterrupt):  # nobody reads on
            answer.calls = []
            if answer.content:
                self.messages = [*self.messages, *messages, _as_message(answer)]
            raise
        except (AttributeError, LookupError, TypeError) as error:
            raise ChatError(f"what came is no answer of a vLLM server ({shown(error)})") from error
        except (APIConnectionError, httpx.HTTPError) as error:  # there was a server, or nothing would have come
            raise ChatError(_CUT_OFF) from error
        if answer.finish_reason is None:
            raise ChatError(_CUT_OFF)
        self.messages = [*self.messages, *messages, _as_message(answer)]

    def ask_again(self) -> Iterator[tuple[str, str]]:
        """As `ask`, with what was asked last; an answer to it is forgotten.

        Raises:
            ChatError: If nothing was asked; and as `ask`.
        """
        asked = self._asked
        if not asked:
            raise ChatError("nothing was asked yet")
        before, last, _ = _parted(self.messages)
        if last == asked:
            self.messages = before
        return self.ask(*asked)

    @property
    def last_exchange(self) -> list[dict[str, Any]]:
        """What was asked last, and the answer."""
        _, asked, answer = _parted(self.messages)
        return [*asked, *answer]

    @property
    def open_calls(self) -> list[dict[str, Any]]:
        """The calls of the last answer, which wait for their results."""
        return (self.messages[-1].get("tool_calls") or []) if self.messages else []

    def save(self, file: Path) -> None:
        """Write the conversation, to a new file or over one that was written so.

        Raises:
            ChatError: If there is none yet, the file is another one, or it cannot be written.
        """
        if not self.messages:
            raise ChatError("there is nothing to save yet")
        kept = {"system": self.system, "messages": self.messages}
        try:
            if file.exists():
                _kept_in(file)
            write_text(file, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        except ChatError as error:
            raise ChatError(f"{error}; save to another file") from None
        except (OSError, ValueError) as error:  # the latter for characters that no file may have
            raise ChatError(f"{shown(str(file))}: {getattr(error, 'strerror', None) or shown(error)}") from None

    def load(self, file: Path) -> None:
        """Go on with a conversation that `save` wrote.

        Raises:
            ChatError: If it cannot be read; the conversation stays as it was.
        """
        system, messages = _kept_in(file)
        self.start_again()
        self.system, self.messages = system, messages
        self._asked = _parted(messages)[1]


def _kept_in(file: Path) -> tuple[str | None, list[dict[str, Any]]]:
    """The system message and the messages that `Chat.save` wrote.

    Raises:
        ChatError: If it did not write them.
    """
    name = shown(str(file))
    try:
        kept = read_json(file)
    except ValueError as error:
        raise ChatError(f"{name} is no conversation that /save wrote: it {error}") from None
    try:
        system, messages = kept["system"], kept["messages"]
        fits = isinstance(messages, list) and all(map(_is_message, messages))
    except (LookupError, TypeError):
        fits = False
    if not fits or not isinstance(system, str | None):
        raise ChatError(f"{name} is no conversation that /save wrote")
    return system, messages


def _is_message(message: Any) -> bool:
    """Raises LookupError or TypeError if `message` is something else altogether."""
    texts = [message["role"]]
    for call in message.get("tool_calls") or ():
        texts += [call["id"], call["function"]["name"], call["function"]["arguments"]]
    return all(isinstance(text, str) for text in texts)


def _parted(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], ...]:
    """What was said before the last question, the question (or the results of functions), and the answer to it."""
    answered = len(messages) - (bool(messages) and messages[-1]["role"] == "assistant")
    asked = itertools.takewhile(lambda message: message["role"] != "assistant", reversed(messages[:answered]))
    start = answered - len(list(asked))
    return messages[:start], messages[start:answered], messages[answered:]


def _read(chunks: Any, answer: Answer, sent: float) -> Iterator[tuple[str, str]]:
    """Fill `answer` from the stream that was asked for at the time `sent`, and yield its parts as they come."""
    divider = ReasoningStream(is_open=False)  # a server without a reasoning parser sends the tags as text
    calls: dict[int, Call] = {}  # servers number them, from whatever they like
    first: tuple[int, float] | None = None
    for chunk in chunks:
        now = time.monotonic()
        answer.seconds = now - sent
        if (usage := getattr(chunk, "usage", None)) and usage.completion_tokens:
            answer.tokens = usage.completion_tokens
            first = first or (usage.completion_tokens, now)
            answer.streamed_tokens, answer.streamed_seconds = usage.completion_tokens - first[0], now - first[1]
        for choice in chunk.choices:
            delta: Any = choice.delta
            if text := getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None):
                answer.reasoning += text
                yield "reasoning", text
            yield from _divided(answer, *divider.feed(delta.content or ""))
            for part in delta.tool_calls or []:
                more = (part.function and part.function.arguments) or ""
                if part.index not in calls:
                    lead = "\n" if calls else ""
                    calls[part.index] = Call(part.id, part.function.name)
                    answer.calls.append(calls[part.index])
                    yield "call", f"{lead}calls {part.function.name} "
                calls[part.index].arguments += more
                yield "call", more
            answer.finish_reason = getattr(choice, "finish_reason", None) or answer.finish_reason
    yield from _divided(answer, *divider.close())


def _divided(answer: Answer, reasoning: str, content: str) -> Iterator[tuple[str, str]]:
    answer.reasoning += reasoning
    answer.content += content
    yield from ((kind, text) for kind, text in (("reasoning", reasoning), ("content", content)) if text)


def _as_message(answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message


def as_json(answer: Answer) -> str:
    """`answer` as one JSON object."""
    calls = [asdict(call) for call in answer.calls]
    return json.dumps(
        {
            "reasoning": answer.reasoning,
            "content": answer.content,
            "tool_calls": calls,
            "finish_reason": answer.finish_reason,
        }
    )
