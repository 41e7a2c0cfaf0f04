"""`vllm-bailing demo`: serve the demo checkpoint, chat with it, stop."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from vllm_bailing.tools.demo import Options

COMMAND = "vllm-bailing demo"
CALLED_AS = "DEMO_COMMAND"  # environment variable with the command that was typed instead, from scripts/demo.sh


class DemoCommand(TyperCommand):
    """Takes the demo's own options wherever they stand, and hands everything else on to vLLM as it is.

    click would otherwise read the value of a flag that it does not know as MODEL, and the `-dph` of vLLM as `-h`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours: list[str] = []
        others: list[str] = []
        remaining = iter(args)
        for argument in remaining:
            if argument in ("--keep", "--adapter", "--help", "-h"):
                ours.append(argument)
            elif argument == "--port" or argument.startswith("--port="):
                ours += ["--port", argument.partition("=")[2] or next(remaining, "")]
            else:
                others.append(argument)
        if not others or others[0].startswith("-"):
            others.insert(0, "")  # no MODEL
        return super().parse_args(ctx, [*ours, "--", *others])


def demo(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with a checkpoint, or a name such as inclusionAI/Ling-mini-2.0; the demo model if left out.",
            show_default=False,
        ),
    ] = "",
    flags: Annotated[list[str] | None, typer.Argument(help="Any further ones of vllm serve.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running.")] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Serve a LoRA adapter of the demo model too, and ask both.")
    ] = False,
    port: Annotated[str, typer.Option("--port", metavar="N", help="Port of the server.")] = "8000",
) -> None:
    """Serve the demo checkpoint, chat with it, and stop.

    With --keep the server stays as the guides expect it: called demo, with tool calls and reasoning. Exit code 1: it
    could not be served or did not answer.
    """
    from vllm_bailing.cli import output
    from vllm_bailing.errors import DemoError
    from vllm_bailing.tools import demo

    output.leave_on(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        chosen = demo.Options(model, _port_number(port), keep, adapter, flags or [])
        demo.check(chosen)
        with demo.log_file(keep=keep) as log:
            _chat(chosen, log)
    except DemoError as error:
        _clear_line()
        print(f"{COMMAND}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except SystemExit:
        print(f"\n{COMMAND}: interrupted; the server is stopped", file=sys.stderr)
        raise


def _port_number(text: str) -> int:
    from vllm_bailing.errors import DemoError

    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise DemoError(f"--port {text!r} is not a port; give a number from 1 to 65535")
    return int(text)


def _chat(chosen: Options, log: Path) -> None:
    """All that happens between a running server and its end."""
    from vllm_bailing.tools import demo
    from vllm_bailing.tools.shell import laid_out

    words = [shlex.quote(word) for word in demo.server_command(chosen)]
    line = " ".join(words)
    if sys.stdout.isatty():
        parts: list[list[str]] = []
        for word in words:
            if parts and parts[-1][-1].startswith("-") and not word.startswith("-"):
                parts[-1].append(word)  # a flag and its value stay together
            else:
                parts.append([word])
        line = laid_out(parts, shutil.get_terminal_size().columns)
    _say(f"Serving {chosen.model or 'the demo model'} with vLLM {demo.vllm_version()}:\n  {line}\n")
    with demo.serving(chosen, log, stopping=lambda: _say("Stopping the server.")) as process:
        seconds = demo.wait_until_healthy(process, chosen, log, _Progress())
        _clear_line()
        _say(f"Ready after {seconds:.0f} seconds.")
        model = demo.served_model(chosen)
        speakers = {"Model": model, "Sailor": demo.ADAPTER_NAME} if chosen.adapter else {"Model": model}
        for question in chosen.questions:
            _say(f"\nYou:    {question}")
            for speaker, name in speakers.items():
                _show_answer(f"{speaker}:", demo.ask(chosen, name, question))
        if chosen.keep:
            _say(
                f"\nThe server goes on as process {process.pid}, its log is {log}. Stop it with: kill {process.pid}\n"
                f"Go on at {chosen.url}, for example:\n"
            )
        else:
            command = os.environ.get(CALLED_AS, COMMAND)
            ours = [chosen.model] if chosen.model else ["--adapter"] if chosen.adapter else []
            words = shlex.join([*ours, "--port", str(chosen.port), *chosen.flags])
            _say(f"\nTo leave the server running, call: {command} {words} --keep")
            _say(f"Then go on at {chosen.url}, for example:\n")
        _show_examples(chosen.url, model)


class _Progress:
    """Shows the time and what the server does: on a terminal in one line, else when that changes."""

    def __init__(self) -> None:
        self.shown = ""

    def __call__(self, seconds: float, message: str) -> None:
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{f'{seconds:4.0f} s  {message}'[:width]}", end="", flush=True)
        elif message != self.shown:
            _say(f"{seconds:4.0f} s  {message[:110]}")
            self.shown = message


def _show_answer(speaker: str, pieces: Iterable[str]) -> None:
    """Print an answer as it comes."""
    from vllm_bailing.cli.chat_screen import Lines
    from vllm_bailing.errors import DemoError

    print(f"{speaker:<8}", end="", flush=True)
    start = time.monotonic()
    lines = Lines(shutil.get_terminal_size().columns - 8 if sys.stdout.isatty() else sys.maxsize)
    try:
        for piece in pieces:
            print(lines.add(piece).replace("\n", "\n        "), end="", flush=True)
    except DemoError:
        print()
        raise
    rest = lines.rest().replace("\n", "\n        ")
    _say(f"{rest}\n        ({time.monotonic() - start:.1f} s)")


def _show_examples(url: str, model: str) -> None:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Who are you?"}]})
    _say(
        f"  curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'\n\n"
        f"  from openai import OpenAI\n"
        f'  client = OpenAI(base_url="{url}", api_key="none")\n'
        f'  question = [{{"role": "user", "content": "Who are you?"}}]\n'
        f'  print(client.chat.completions.create(model="{model}", messages=question).choices[0].message.content)\n'
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _clear_line() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
