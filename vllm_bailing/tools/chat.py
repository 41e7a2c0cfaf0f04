"""A small chat in the terminal with a running server, through its OpenAI interface."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI
from rich.console import Console

from vllm_bailing.reasoning import ReasoningStream

HELP = "/thinking on or off, /new for a new conversation, /exit; an empty line is ignored"


def connect(url: str, **options: Any) -> OpenAI:
    """A client of the server at `url`, with or without its /v1; VLLM_API_KEY is sent if it is set."""
    base = url.rstrip("/").removesuffix("/v1")
    return OpenAI(base_url=f"{base}/v1", api_key=os.environ.get("VLLM_API_KEY", "none"), **options)


@dataclass
class Answer:
    """What the model said. `calls` holds `(id, name, arguments)`, arguments as JSON text."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str, str]] = field(default_factory=list)


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
        self.start_again()

    def start_again(self) -> None:
        """Forget what was said."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, message: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """Send `message` and yield the answer as it comes: `("reasoning" or "content" or "call", text)`.

        The answer is added to the conversation when it is complete; one that is cut off leaves it as it was.

        Raises:
            openai.OpenAIError: If the server cannot be reached or refuses the request.
        """
        messages = [*self.messages, message]
        extra = {} if self.thinking is None else {"chat_template_kwargs": {"thinking_option": self.thinking}}
        fields: dict[str, Any] = {"messages": messages, "extra_body": extra, **self.sampling}
        if self.tools:
            fields["tools"] = self.tools
        chunks = self.client.chat.completions.create(model=self.model, stream=True, **fields)
        answer = Answer()
        # A server without a reasoning parser sends the tags as text.
        divider = ReasoningStream(is_open=False)
        for chunk in chunks:
            for choice in chunk.choices:
                delta: Any = choice.delta
                if text := getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None):
                    answer.reasoning += text
                    yield "reasoning", text
                yield from self._divided(answer, *divider.feed(delta.content or ""))
                for call in delta.tool_calls or []:
                    if call.index == len(answer.calls):
                        answer.calls.append((call.id, call.function.name, ""))
                        yield "call", f"{call.function.name} "
                    identity, name, arguments = answer.calls[call.index]
                    more = (call.function and call.function.arguments) or ""
                    answer.calls[call.index] = (identity, name, arguments + more)
                    yield "call", more
        yield from self._divided(answer, *divider.close())
        self.messages = [*messages, self._as_message(answer)]
        self.last = answer

    @staticmethod
    def _divided(answer: Answer, reasoning: str, content: str) -> Iterator[tuple[str, str]]:
        answer.reasoning += reasoning
        answer.content += content
        yield from ((kind, text) for kind, text in (("reasoning", reasoning), ("content", content)) if text)

    @staticmethod
    def _as_message(answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [
                {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
                for identity, name, arguments in answer.calls
            ]
        return message


STYLES = {"reasoning": "dim", "content": "", "call": "cyan"}


def show(pieces: Iterator[tuple[str, str]], console: Console) -> None:
    """Print an answer as it comes: reasoning dimmed, calls colored, each kind from a line of its own."""
    before = None
    for kind, text in pieces:
        if before not in (None, kind):
            console.print()
        if kind == "call" and before != kind:
            console.print("calls ", style=STYLES[kind], end="")
        console.print(text, style=STYLES[kind], end="", markup=False, highlight=False, soft_wrap=True)
        before = kind
    console.print()


def converse(chat: Chat, console: Console, lines: Iterator[str]) -> None:
    """Answer each of `lines` until they end or say /exit; results of called functions are the next lines."""
    for line in lines:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/new":
            chat.start_again()
        elif text in ("/thinking on", "/thinking off"):
            chat.thinking = text.split()[1]
        elif text.startswith("/"):
            console.print(HELP, style="dim")
        elif text:
            message = {"role": "user", "content": text}
            open_call = chat.messages[-1].get("tool_calls") if chat.messages else None
            if open_call:
                message = {"role": "tool", "content": text, "tool_call_id": open_call[-1]["id"]}
            show(chat.ask(message), console)


def as_json(answer: Answer) -> str:
    """`answer` as one JSON object."""
    calls = [{"id": identity, "name": name, "arguments": arguments} for identity, name, arguments in answer.calls]
    return json.dumps({"reasoning": answer.reasoning, "content": answer.content, "tool_calls": calls})
