"""A conversation with a running server, through its OpenAI interface."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import APIConnectionError, OpenAI

from vllm_bailing.errors import ChatError, shown
from vllm_bailing.json_files import read_json
from vllm_bailing.reasoning import ReasoningStream

NOT_READY = (502, 503, 504)  # what stands for a server that does not answer yet
_CUT_OFF = "the connection ended before the answer did; ask again"


def with_scheme(url: str) -> str:
    """`url` as people write it, such as localhost:8000, as a whole one."""
    return url if "://" in url else f"http://{url}"


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
    return OpenAI(base_url=f"{base_of(url)}/v1", api_key=os.environ.get("VLLM_API_KEY", "none"), **options)


def first_model(client: OpenAI) -> str:
    """The first model of the server.

    Raises:
        openai.OpenAIError: If it cannot be reached or refuses to say.
        ChatError: If it serves none, or is no such server.
    """
    try:
        models = client.models.list().data
        return models[0].id
    # The library believes what it is sent, and ends somewhere in a web page.
    except (AttributeError, LookupError, TypeError) as error:
        raise ChatError("it lists no models; is it a vLLM server?") from error


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
        seconds: Since the first of them.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int | None = None
    seconds: float = 0.0


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
        chunks = self.client.chat.completions.create(
            model=self.model, stream=True, stream_options={"include_usage": True}, **fields, **self.sampling
        )
        self.last = answer = Answer()
        try:
            yield from _read(chunks, answer)
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
        if self.messages[-1 - len(asked) : -1] == asked:
            self.messages = self.messages[: -1 - len(asked)]
        return self.ask(*asked)

    @property
    def open_calls(self) -> list[dict[str, Any]]:
        """The calls of the last answer, which wait for their results."""
        return self.messages[-1].get("tool_calls", []) if self.messages else []

    def save(self, file: Path) -> None:
        """Write the conversation.

        Raises:
            ChatError: If it cannot be written.
        """
        kept = {"system": self.system, "messages": self.messages}
        try:
            file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise ChatError(f"{file}: {error.strerror}") from None

    def load(self, file: Path) -> None:
        """Go on with a conversation that `save` wrote.

        Raises:
            ChatError: If it cannot be read; the conversation stays as it was.
        """
        try:
            kept = read_json(file)
        except ValueError as error:
            raise ChatError(f"{file} is no conversation that /save wrote: it {error}") from None
        try:
            system, messages = kept["system"], kept["messages"]
            fits = all(isinstance(message["role"], str) for message in messages) and isinstance(messages, list)
        except (LookupError, TypeError):
            fits = False
        if not fits or not isinstance(system, str | None):
            raise ChatError(f"{file} is no conversation that /save wrote")
        self.start_again()
        self.system, self.messages = system, messages


def _read(chunks: Any, answer: Answer) -> Iterator[tuple[str, str]]:
    """Fill `answer` from a stream, and yield its parts as they come."""
    divider = ReasoningStream(is_open=False)  # a server without a reasoning parser sends the tags as text
    calls: dict[int, Call] = {}  # servers number them, from whatever they like
    start = None
    for chunk in chunks:
        if usage := getattr(chunk, "usage", None):
            answer.tokens = usage.completion_tokens
        for choice in chunk.choices:
            start = start or time.monotonic()
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
            answer.seconds = time.monotonic() - start
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
