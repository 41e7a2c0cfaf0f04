"""`vllm-bailing chat`: a conversation with a running server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_bailing.cli import options

if TYPE_CHECKING:
    from rich.console import Console


def chat(
    question: Annotated[str | None, typer.Argument(help="Asked once; left out, a conversation starts.")] = None,
    url: Annotated[str, options.URL] = "http://localhost:8000",
    served_model_name: options.ServedModelName = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    thinking: Annotated[str | None, typer.Option(help="on or off; left out, what the chat template does.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON list of functions that the model may call.", exists=True)
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="The server's default if left out.", min=0.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Limit of an answer; the server's if left out.", min=1)] = None,
    as_json: options.AsJson = False,
) -> None:
    """Chat with a running server.

    Thinking is shown dimmed, tool calls colored; type a function's result as the next line. VLLM_API_KEY is sent if it
    is set. --json prints the answer to QUESTION.
    """
    from openai import OpenAIError
    from rich.console import Console

    from vllm_bailing.tools import chat

    if thinking not in (None, "on", "off"):
        raise typer.BadParameter(f"--thinking {thinking!r} must be on or off")
    if as_json and question is None:
        raise typer.BadParameter("--json needs a question")
    given = {"max_tokens": max_tokens, "temperature": temperature}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    client = chat.connect(url)
    console = Console()
    try:
        functions = json.loads(tools.read_text(encoding="utf-8")) if tools else None
        name = served_model_name or client.models.list().data[0].id
        conversation = chat.Chat(client, name, system, thinking, functions, **sampling)
        if question is None:
            if sys.stdin.isatty():
                console.print(f"{name} at {url}. {chat.HELP}.", style="dim", highlight=False)
            chat.converse(conversation, console, _typed(console))
        elif as_json:
            list(conversation.ask({"role": "user", "content": question}))
            typer.echo(chat.as_json(conversation.last))
        else:
            chat.show(conversation.ask({"role": "user", "content": question}), console)
    except OpenAIError as error:
        raise SystemExit(f"vllm-bailing chat: {url}: {error}") from None
    except json.JSONDecodeError as error:
        raise SystemExit(f"vllm-bailing chat: {tools} is not JSON: {error}") from None


def _typed(console: Console) -> Iterator[str]:
    """Lines of standard input, asked for on a terminal."""
    while True:
        try:
            yield console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return
