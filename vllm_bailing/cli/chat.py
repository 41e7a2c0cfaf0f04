"""`vllm-bailing chat`: a conversation with a running server."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_bailing.cli import options, output
from vllm_bailing.json_files import read_json


def chat(
    question: Annotated[str | None, typer.Argument(help="Asked once; left out, a conversation starts.")] = None,
    url: Annotated[str, options.URL] = "http://localhost:8000",
    served_model_name: options.ServedModelName = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    thinking: Annotated[
        str | None,
        typer.Option(
            help="on or off; left out, what the chat template does.", autocompletion=options.one_of("on", "off")
        ),
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option(help="JSON list of functions that the model may call.", exists=True, dir_okay=False),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="The server's default if left out.", min=0.0, max=2.0)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Limit of an answer; the server's if left out.", min=1)] = None,
    as_json: options.AsJson = False,
) -> None:
    """Chat with a running server.

    Thinking is shown dimmed, tool calls colored; type the functions' results as the next lines. /help lists what else
    may be typed. Text on standard input follows QUESTION. VLLM_API_KEY is sent if it is set. --json prints the answer
    to QUESTION.
    """
    from openai import OpenAIError

    from vllm_bailing.cli import chat_screen
    from vllm_bailing.errors import ChatError
    from vllm_bailing.tools import chat
    from vllm_bailing.tools.no_answer import no_answer

    if thinking not in (None, "on", "off"):
        raise typer.BadParameter(f"--thinking {thinking!r} must be on or off")
    if as_json and question is None:
        raise typer.BadParameter("--json needs a question")
    given = {"max_tokens": max_tokens, "temperature": temperature}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    functions, console = _functions(tools), output.console()
    try:
        url = chat.checked_url(url)
        client = chat.connect(url)
        read = chat_screen.typed(console) if question is None else None
        text = "" if question is None else _with_standard_input(question)
    except ChatError as error:
        raise output.fail("chat", error, 2) from None
    try:
        with contextlib.nullcontext() if as_json else chat_screen.waiting(console):
            name = served_model_name or chat.first_model(client)
        conversation = chat.Chat(client, name, system, thinking, functions, **sampling)
        if read is not None:
            if console.is_terminal and chat_screen.is_keyboard():
                console.print(f"{name} at {url}; /help lists what may be typed", style="dim", highlight=False)
            is_fine = chat_screen.converse(conversation, console, read, url)
            if not is_fine and not chat_screen.is_keyboard():  # who types has seen it
                raise typer.Exit(1)
            return
        pieces = conversation.ask({"role": "user", "content": text})
        if as_json:
            list(pieces)
            typer.echo(chat.as_json(conversation.last))
        else:
            chat_screen.show(pieces, console)
            chat_screen.remark(conversation.last, output.console(stderr=True))
    except (OpenAIError, ChatError) as error:
        raise output.fail("chat", no_answer(url, error), 1) from None


def _functions(file: Path | None) -> list[dict[str, Any]] | None:
    if file is None:
        return None
    try:
        functions = read_json(file)
    except ValueError as error:
        raise output.fail("chat", f"--tools {file} {error}; name a file with a list of functions", 2) from None
    if not isinstance(functions, list) or not all(map(_is_function, functions)):
        raise output.fail(
            "chat",
            f"--tools {file} is no list of functions, as the OpenAI interface takes them, such as "
            '[{"type": "function", "function": {"name": "get_time"}}]',
            2,
        )
    return functions


def _is_function(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _with_standard_input(question: str) -> str:
    """Raises ChatError if there is no question, or standard input is no text."""
    from vllm_bailing.cli import chat_screen
    from vllm_bailing.errors import ChatError

    if not question.strip():
        raise ChatError("the question is empty; write one, or leave it out for a conversation")
    text = "" if chat_screen.is_keyboard() else "".join(chat_screen.standard_input())
    return f"{question}\n\n{text}" if text.strip() else question
