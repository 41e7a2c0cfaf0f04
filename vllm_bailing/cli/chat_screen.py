"""The screen of `vllm-bailing chat`: how an answer is shown, and what may be typed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openai import OpenAIError
from rich.cells import cell_len
from rich.console import Console

from vllm_bailing.errors import ChatError, shown
from vllm_bailing.tools.chat import NOT_READY, Answer, Chat

HELP = """\
/help              this text
/new               a new conversation
/retry             ask the last question again
/system TEXT       a system message; begins a new conversation
/thinking on|off   whether the model reasons first
/save FILE         write the conversation
/load FILE         go on with one
/exit              or Ctrl-D
//TEXT             a message that begins with /
Alt-Enter begins a new line, Ctrl-C stops an answer."""
STYLES = {"reasoning": "dim", "content": "", "call": "cyan"}
# A terminal would obey them; they are shown as the pictures that Unicode has of them.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


class Lines:
    """Text as it comes, for a terminal that is `width` columns wide and would break lines within words.

    The end of a text is held back until it is known whether the word goes on.
    """

    def __init__(self, width: int) -> None:
        self.width, self.column, self._word = width, 0, ""

    def add(self, text: str) -> str:
        """What may be printed now."""
        out = []
        for char in text:
            wide = cell_len(char) > 1  # Chinese, for one, has a break after every character and no spaces
            if wide or char.isspace():
                out.append(self.rest())
            if wide:
                self._word = char
                out.append(self.rest())
            elif char == "\n":
                out.append(char)
                self.column = 0
            elif not char.isspace():
                self._word += char
            elif self.column < self.width:
                out.append(char)
                self.column += 8 - self.column % 8 if char == "\t" else 1
        return "".join(out)

    def rest(self) -> str:
        """The word that was held back."""
        word, self._word = self._word, ""
        size = cell_len(word)
        is_too_long = bool(size and self.column) and self.column + size > self.width
        self.column = (0 if is_too_long else self.column) + size
        while self.column > self.width:  # a word longer than a line, which the terminal breaks
            self.column -= self.width
        return ("\n" if is_too_long else "") + word


def show(pieces: Iterator[tuple[str, str]], console: Console) -> None:
    """Print an answer as it comes: reasoning dimmed, calls colored, each kind from a line of its own."""
    before, lines = None, None

    def put(text: str, kind: str) -> None:
        console.print(text, style=STYLES[kind], end="", markup=False, highlight=False, soft_wrap=True)

    try:
        for kind, text in pieces:
            if before is not None and before != kind:
                put(lines.rest() if lines else "", before)
                console.print()
                lines = None
            visible = text.translate(_CONTROLS)
            if console.is_terminal:
                lines = lines or Lines(console.width)
                visible = lines.add(visible)
            put(visible, kind)
            before = kind
    finally:
        if before is not None:
            put(lines.rest() if lines else "", before)
            console.print()


def remark(answer: Answer, console: Console) -> None:
    """Say what the text of an answer does not: that it was cut off; on a terminal, its length and speed."""
    if answer.finish_reason == "length":
        console.print("(cut off at the limit of tokens)", style="yellow", highlight=False)
    elif console.is_terminal and answer.tokens and answer.tokens > 1 and answer.seconds:
        speed = (answer.tokens - 1) / answer.seconds
        console.print(f"({answer.tokens} tokens, {speed:.0f} tokens/s)", style="dim", highlight=False)


def explained(error: Exception, url: str) -> str:
    """What went wrong, and what to do."""
    from openai import APIConnectionError, APIStatusError

    scheme = url.partition("://")[0]
    if scheme not in ("http", "https"):
        return f"{shown(url)} begins with {shown(scheme)}://; give a URL such as http://localhost:8000"
    if isinstance(error, APIConnectionError):
        return (
            f"no server at {url}; start one by `vllm serve MODEL` or `vllm-bailing demo --keep`, and wait until its "
            "log says that the start is complete"
        )
    if isinstance(error, APIStatusError) and error.status_code in NOT_READY:
        return f"{url} is not ready (HTTP {error.status_code}); wait until it has loaded its model, and ask again"
    return f"{url}: {shown(error, 1000)}"


def converse(chat: Chat, console: Console, read: Callable[[str], str | None], url: str) -> None:
    """Answer what is typed until it ends or is /exit; results of called functions are asked for one by one.

    Args:
        read: Asks for a message, with the mark before it; None if there are no more.
    """
    results: list[dict[str, str]] = []
    while True:
        waiting = chat.open_calls[len(results) :]
        mark = f"result of {shown(waiting[0]['function']['name'])}> " if waiting else "> "
        text = read(mark)
        if text is None or text.strip() == "/exit":
            return
        text = text.strip()
        if not text:
            continue
        try:
            if text.startswith("/") and not text.startswith("//"):
                if not _obey(chat, console, *text[1:].partition(" ")[::2]):
                    continue
                results, pieces = [], chat.ask_again()
            elif waiting:
                results.append({"role": "tool", "content": text, "tool_call_id": waiting[0]["id"]})
                if len(waiting) > 1:
                    continue
                pieces, results = chat.ask(*results), []
            else:
                pieces = chat.ask({"role": "user", "content": text.removeprefix("/") if text[:2] == "//" else text})
            _answer(pieces, console)
            remark(chat.last, console)
        except (OpenAIError, ChatError) as error:
            console.print(explained(error, url), style="red", highlight=False, markup=False, soft_wrap=True)


def _answer(pieces: Iterator[tuple[str, str]], console: Console) -> None:
    try:
        show(pieces, console)
    except KeyboardInterrupt:
        console.print("(stopped)", style="yellow", highlight=False)
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()


def _obey(chat: Chat, console: Console, command: str, argument: str) -> bool:
    """Do what a line that begins with / says; whether the last question is to be asked again."""

    def say(text: str, always: bool = False) -> None:
        if always or console.is_terminal:  # a file gets the answers alone
            console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    argument = argument.strip()
    if command == "retry":
        return True
    if command == "new":
        chat.start_again()
        say("a new conversation")
    elif command == "system":
        chat.start_again(system=argument)
        say(f"a new conversation, {'with that system message' if argument else 'without a system message'}")
    elif command == "thinking" and argument in ("on", "off", ""):
        chat.thinking = argument or chat.thinking
        say(f"thinking is {chat.thinking or 'what the chat template makes it'}")
    elif command in ("save", "load") and argument:
        try:
            (chat.save if command == "save" else chat.load)(Path(argument).expanduser())
        except ChatError as error:
            say(str(error), always=True)
            return False
        say(f"{len(chat.messages)} messages {'written to' if command == 'save' else 'read from'} {argument}")
    elif command == "help":
        say(HELP, always=True)
    else:
        told = shown(f"/{command} {argument}".strip(), 60)
        say(f"{told} is no command; /help lists them, and /{told} is a message", always=True)
    return False


def typed(console: Console) -> Callable[[str], str | None]:
    """What asks for a message: an editable line with a history on a terminal, else the next line of standard input."""
    if not (sys.stdin.isatty() and console.is_terminal):
        return lambda _mark: next(sys.stdin, None)
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(history=_history(), key_bindings=keys)

    def ask(mark: str) -> str | None:
        while True:
            try:
                return session.prompt(mark)
            except KeyboardInterrupt:  # drops what was typed, as in a shell
                continue
            except EOFError:
                return None

    return ask


def _history() -> Any:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "vllm-bailing" / "chat_history"
    with contextlib.suppress(OSError, RuntimeError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        return FileHistory(str(file))
    return InMemoryHistory()
