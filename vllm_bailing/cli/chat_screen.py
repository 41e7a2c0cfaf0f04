"""The screen of `vllm-bailing chat`: how an answer is shown, and what may be typed."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openai import OpenAIError
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from vllm_bailing.cli import output
from vllm_bailing.errors import ChatError, shown
from vllm_bailing.tools.chat import Answer, Chat
from vllm_bailing.tools.no_answer import no_answer

HELP = """\
/help              this text
/new               a new conversation
/retry             ask the last question again
/system            show the system message
/system TEXT       a new conversation with this one; /system none has none
/thinking on|off   whether the model reasons first
/save FILE         write the conversation
/load FILE         go on with one
/exit              or Ctrl-D
//TEXT             a message that begins with /
Alt-Enter begins a new line, Ctrl-C stops an answer."""
_ALONE = ("help", "new", "retry", "exit")  # the commands that nothing follows
PATIENCE_SECONDS = 2.5  # after which a sign of life is wanted
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


class _Waiting:
    """The line that says how long something has been waited for, whenever it is drawn."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __rich__(self) -> Text:
        return Text(f"waiting for the server, {time.monotonic() - self._start:.0f} s; Ctrl-C stops", style="dim")


@contextlib.contextmanager
def waiting(console: Console) -> Iterator[None]:
    """On a terminal, a line that says so while the body takes long, and goes away with it."""
    if not console.is_interactive:
        yield
        return
    status = console.status(_Waiting(), spinner_style="dim")
    timer = threading.Timer(PATIENCE_SECONDS, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may just have begun to draw
        status.stop()


def show(pieces: Iterator[tuple[str, str]], console: Console) -> None:
    """Print an answer as it comes: reasoning dimmed, calls colored, each kind from a line of its own."""
    with waiting(console):
        first = list(itertools.islice(pieces, 1))
    before, lines = None, None

    def put(text: str, kind: str) -> None:
        console.print(text, style=STYLES[kind], end="", markup=False, highlight=False, soft_wrap=True)

    try:
        for kind, text in itertools.chain(first, pieces):
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
    elif console.is_terminal and answer.tokens:
        speed = answer.tokens_per_s
        if speed is None:
            pace = f" in {answer.seconds:.2f} s"
        else:
            pace = f", {speed:.0f} tokens/s" if speed >= 10 else f", {speed:.1f} tokens/s"
        console.print(f"({_count(answer.tokens, 'token')}{pace})", style="dim", highlight=False)


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number != 1 else ''}"


def converse(chat: Chat, console: Console, read: Callable[[str], str | None], url: str) -> bool:
    """Answer what is typed until it ends or is /exit; results of called functions are asked for one by one.

    Args:
        read: Asks for a message, with the mark before it; None if there are no more.
    Returns:
        Whether all that was typed could be done.
    """
    results: list[dict[str, str]] = []
    is_fine = True
    while True:
        calls = chat.open_calls[len(results) :]
        text = read(f"result of {_as_text(calls[0], 50)}> " if calls else "> ")
        text = "/exit" if text is None else text.strip()
        if not text:
            continue
        try:
            if text.startswith("/") and not text.startswith("//"):
                command, argument = _command(text)
                if command == "exit":
                    return is_fine
                before = chat.messages
                if command == "retry":
                    pieces = chat.ask_again()
                else:
                    _obey(chat, console, command, argument)
                    results = results if chat.messages is before else []
                    continue
            elif calls:
                results.append({"role": "tool", "content": text, "tool_call_id": calls[0]["id"]})
                if len(calls) > 1:
                    continue
                pieces = chat.ask(*results)
            else:
                pieces = chat.ask({"role": "user", "content": text.removeprefix("/") if text[:2] == "//" else text})
        except ChatError as error:  # of a command: no server had a part in it
            _complain(str(error), console)
            is_fine = False
            continue
        results = []
        try:
            _answer(chat, pieces, console)
        except (OpenAIError, ChatError) as error:
            _complain(str(no_answer(url, error)), console)
            is_fine = False


def _complain(text: str, console: Console) -> None:
    console.print(output.folded(text, console.file), style="red", highlight=False, markup=False, soft_wrap=True)


def _answer(chat: Chat, pieces: Iterator[tuple[str, str]], console: Console) -> None:
    try:
        show(pieces, console)
        remark(chat.last, console)
    except KeyboardInterrupt:
        console.print("(stopped)", style="yellow", highlight=False)
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()


def _command(text: str) -> tuple[str, str]:
    """The command in a line that begins with /, and what follows it.

    Raises:
        ChatError: If there is none of that name, or it takes something else.
    """
    word, argument = [*text.split(None, 1), ""][:2]
    command = word[1:].lower()
    if command in _ALONE and argument:
        raise ChatError(f"/{command} stands alone; leave out {shown(argument, 60)}")
    if command in ("save", "load") and not argument:
        raise ChatError(f"/{command} needs a file; name one behind it")
    if command == "thinking" and argument.lower() not in ("on", "off", ""):
        raise ChatError(f"/thinking is on or off, not {shown(argument, 60)}")
    if command not in (*_ALONE, "save", "load", "thinking", "system"):
        told = shown(text, 60)
        raise ChatError(f"{told} is no command; /help lists them, and /{told} is a message")
    return command, argument


def _obey(chat: Chat, console: Console, command: str, argument: str) -> None:
    """Do what a command says that asks nothing of the server."""

    def say(text: str, always: bool = False) -> None:
        if always or console.is_terminal:  # a file gets the answers alone, and what was asked for by a command
            text = output.folded(text, console.file)
            console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    file = Path(argument)
    with contextlib.suppress(RuntimeError):  # ~ of nobody
        file = file.expanduser()
    if command == "help":
        say(HELP, always=True)
    elif command == "new":
        chat.start_again()
        say("a new conversation")
    elif command == "system" and argument:
        chat.start_again(system="" if argument.lower() in ("none", '""') else argument)
        say(f"a new conversation, {'with that system message' if chat.system else 'without a system message'}")
    elif command == "system":
        say((chat.system or "there is no system message").translate(_CONTROLS), always=True)
    elif command == "thinking":
        chat.thinking = argument.lower() or chat.thinking
        say(f"thinking is {chat.thinking or 'what the chat template makes it'}", always=not argument)
    elif command == "save":
        chat.save(file)
        say(f"{_count(len(chat.messages), 'message')} written to {argument}")
    elif command == "load":
        chat.load(file)
        say(f"{_count(len(chat.messages), 'message')} read from {argument}")
        for message in chat.last_exchange:
            mark = "" if message["role"] == "assistant" else "> "
            calls = [f"calls {_as_text(call, 300)}" for call in message.get("tool_calls") or ()]
            for text in filter(None, [_shortened(message.get("content") or ""), *calls]):
                say(f"{mark}{text}")


def _as_text(call: dict[str, Any], longest: int) -> str:
    function = call["function"]
    return f"{shown(function['name'])} {_shortened(function['arguments'], longest)}".strip()


def _shortened(content: Any, longest: int = 300) -> str:
    return shown(" ".join(str(content).split()), longest)


def is_keyboard() -> bool:
    """Whether somebody types what is read."""
    return sys.stdin is not None and sys.stdin.isatty()


def standard_input() -> Iterator[str]:
    """Its lines.

    Raises:
        ChatError: If it is no text.
    """
    try:
        for line in sys.stdin or ():
            line.encode()  # with some locales Python reads any bytes, but no server takes them
            yield line
    except UnicodeError as error:
        raise ChatError(f"standard input is not UTF-8 ({shown(error)}); give text") from None


def typed(console: Console) -> Callable[[str], str | None]:
    """What asks for a message: an editable line with a history on a terminal, else the next line of standard input.

    Raises:
        ChatError: If there is no such line.
    """
    if not (is_keyboard() and console.is_terminal):
        lines = standard_input()
        first = next((line for line in lines if line.strip()), None)
        if first is None:
            raise ChatError("nothing was asked: standard input is empty; give a question, or one a line")
        rest = itertools.chain([first], lines)
        return lambda _mark: next(rest, None)
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
