"""Start `vllm serve`, wait until it is healthy, chat with it through the `openai` client, stop it. See demo.sh."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from vllm_bailing import DEMO, DEMO_ADAPTER

if TYPE_CHECKING:
    from openai import OpenAI

HOST = "127.0.0.1"
DEMO_NAME, ADAPTER_NAME = "vllm-bailing-demo", "sailor"
DEMO_QUESTIONS = ("Who are you?", "How do I serve a model?", "What is the capital of France?")
QUESTIONS = ("Who are you? Please answer in one or two sentences.",)
DEMO_START_LIMIT_S = 600  # any other model may have to be downloaded first, so it has no limit
STOP_LIMIT_S = 15
PARALLEL_FLAGS = re.compile(r"--(tensor|pipeline|data)-parallel-size|-tp|-pp|-dp")


class Failure(Exception):
    """What went wrong, in words for the person who ran the demo."""


@dataclass
class Options:
    model: str = ""
    port: int = 8000
    keep: bool = False
    adapter: bool = False
    flags: list[str] = field(default_factory=list)

    @property
    def is_demo(self) -> bool:
        return not self.model


def parse(arguments: list[str]) -> Options:
    """Take our own options out of `arguments`; MODEL, if any, is the first of the rest, all others are vLLM's."""
    options = Options()
    rest = iter(arguments)
    for argument in rest:
        if argument == "--keep":
            options.keep = True
        elif argument == "--adapter":
            options.adapter = True
        elif argument == "--port" or argument.startswith("--port="):
            value = argument.partition("=")[2] or next(rest, "")
            if not (value.isdecimal() and 0 < int(value) < 65536):
                raise Failure(f"--port {value!r} is not a port; give a number from 1 to 65535")
            options.port = int(value)
        elif not options.flags and not options.model and not argument.startswith("-"):
            options.model = argument
        else:
            options.flags.append(argument)
    if options.adapter and not options.is_demo:
        raise Failure("--adapter is the demo model's; for another one give vLLM's --enable-lora and --lora-modules")
    return options


def check_model(model: str) -> None:
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise Failure(f"{model} has no config.json; give the folder of a checkpoint")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise Failure(f"{model} is neither a folder nor a model name such as inclusionAI/Ling-mini-2.0")


def check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise Failure(f"port {port} cannot be used ({error.strerror}); choose another one with --port") from None


def is_cpu_build() -> bool:
    return "cpu" in version("vllm")


def server_environment(options: Options) -> dict[str, str]:
    """The environment of `vllm serve`. Variables that are set already keep their values."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if options.is_demo:
        wanted["HF_HUB_OFFLINE"] = "1"
    if is_cpu_build():
        wanted["VLLM_CPU_KVCACHE_SPACE"] = "1" if options.is_demo else "4"  # GiB
        if not any(PARALLEL_FLAGS.match(flag) for flag in options.flags):
            # By itself vLLM leaves one core to its scheduler, which on two cores is half of them.
            wanted["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.is_file():
            wanted["LD_PRELOAD"] = str(openmp)
    return wanted | os.environ


def server_command(options: Options) -> list[str]:
    command = [str(Path(sys.executable).parent / "vllm"), "serve", options.model or str(DEMO)]
    command += ["--host", HOST, "--port", str(options.port)]
    if options.is_demo:
        # A model this small answers at once either way; compiling it would only make the start longer.
        command += ["--served-model-name", DEMO_NAME, "--enforce-eager"]
    if options.adapter:
        command += ["--enable-lora", "--lora-modules", f"{ADAPTER_NAME}={DEMO_ADAPTER}"]
    return command + options.flags


@contextmanager
def server(options: Options, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The running server, in a process group of its own that is gone afterwards, unless it is to be kept."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            server_command(options),
            env=server_environment(options),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    except BaseException:
        stop(process)
        raise
    if not options.keep:
        say("Stopping the server.")
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave anything behind
    if process.poll() is None:
        process.terminate()
    end = time.monotonic() + STOP_LIMIT_S
    while group_exists(process) and time.monotonic() < end:
        time.sleep(0.1)
    if group_exists(process):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def group_exists(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # takes the exit status, without which the group would stay
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_healthy(process: subprocess.Popen[bytes], options: Options, log: Path) -> float:
    """Seconds that the start took. Shows the time and the last log message meanwhile."""
    start = time.monotonic()
    shown = ""
    while not is_healthy(options.port):
        seconds = time.monotonic() - start
        if process.poll() is not None:
            clear_line()
            raise Failure(f"the server ended while it started (exit code {process.returncode}):\n{cause(log)}")
        if options.is_demo and seconds > DEMO_START_LIMIT_S:
            clear_line()
            raise Failure(f"the server did not answer within {DEMO_START_LIMIT_S} seconds:\n{cause(log)}")
        message = last_message(log)
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{f'{seconds:4.0f} s  {message}'[:width]}", end="", flush=True)
        elif message != shown:
            say(f"{seconds:4.0f} s  {message[:110]}")
            shown = message
        time.sleep(1)
    clear_line()
    return time.monotonic() - start


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def log_lines(log: Path) -> list[str]:
    """The log without colours, process names, levels and times."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    prefix = r"^(\([\w-]+ pid=\d+\) ?)?((DEBUG|INFO|WARNING|ERROR) [\d-]+ [\d:]+ (\[\S+\] )?)?"
    return [re.sub(prefix, "", line.split("\r")[-1]).rstrip() for line in text.splitlines()]


def last_message(log: Path) -> str:
    lines = [line for line in log_lines(log) if re.match(r"[A-Z](?!\d{4} )", line) and len(line) > 12]
    return lines[-1].strip() if lines else "starting Python"


def cause(log: Path) -> str:
    """The lines of the log that say why the server ended, and where the log is."""
    lines = log_lines(log)
    follow_up = r"Engine core initialization failed|EngineDeadError|SystemExit|KeyboardInterrupt|CancelledError"
    found = [
        number
        for number, line in enumerate(lines)
        if re.match(r"([\w.]+(Error|Exception|Exit)\b|vllm.*: error):? ", line) and not re.search(follow_up, line)
    ]
    if found:
        chosen = lines[found[-1] : found[-1] + 5]
        ends = [n for n, line in enumerate(chosen) if n and re.match(r"$|Traceback|During|The above", line)]
        chosen = chosen[: ends[0]] if ends else chosen
    else:
        chosen = [line for line in lines if line][-5:]
    return "\n".join(f"  {line[:400]}" for line in [*chosen, f"the whole log is in {log}"])


def chat(options: Options) -> str:
    """Ask the questions, print the answers as they come; returns the name of the model."""
    from openai import OpenAI, OpenAIError

    client = OpenAI(base_url=f"http://{HOST}:{options.port}/v1", api_key=os.environ.get("VLLM_API_KEY", "none"))
    try:
        model = client.models.list().data[0].id
        for question in DEMO_QUESTIONS if options.is_demo else QUESTIONS:
            say(f"\nYou:    {question}")
            ask(client, model, question, "Model:")
            if options.adapter:
                ask(client, ADAPTER_NAME, question, "Sailor:")
    except OpenAIError as error:
        print()
        raise Failure(f"the chat failed: {error}") from None
    return model


def ask(client: OpenAI, model: str, question: str, speaker: str) -> None:
    """Print the answer of `model` as it comes."""
    print(f"{speaker:<8}", end="", flush=True)
    start, pieces, answer = time.monotonic(), 0, ""
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=256,
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            answer += piece
            pieces += 1
            print(piece.replace("\n", "\n        "), end="", flush=True)
    say(f"\n        ({pieces} pieces in {time.monotonic() - start:.1f} s)")
    if not answer.strip():
        raise Failure("the server answered with empty text")


def show_how_to_go_on(options: Options, model: str, process: subprocess.Popen[bytes], log: Path) -> None:
    url = f"http://{HOST}:{options.port}/v1"
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Who are you?"}]})
    if options.keep:
        say(f"\nThe server goes on as process {process.pid}, its log is {log}. Stop it with: kill {process.pid}")
    else:
        first = [options.model] if options.model else ["--adapter"] if options.adapter else []
        again = shlex.join([*first, "--port", str(options.port), *options.flags])
        say(f"\nTo leave the server running, call: scripts/demo.sh {again} --keep")
    say(
        f"Then go on at {url}, for example:\n\n"
        f"  curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'\n\n"
        f"  from openai import OpenAI\n"
        f'  client = OpenAI(base_url="{url}", api_key="none")\n'
        f'  question = [{{"role": "user", "content": "Who are you?"}}]\n'
        f'  print(client.chat.completions.create(model="{model}", messages=question).choices[0].message.content)\n'
    )


def say(text: str) -> None:
    print(text, flush=True)


def clear_line() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)


def leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    handle, name = tempfile.mkstemp(prefix="vllm-bailing-demo.", suffix=".log")
    os.close(handle)
    log = Path(name)
    keep_log = False
    try:
        options = parse(sys.argv[1:])
        if options.model:
            check_model(options.model)
        elif not (DEMO / "config.json").is_file():
            raise Failure(f"no demo checkpoint in {DEMO}; is the clone complete?")
        check_port(options.port)
        keep_log = options.keep
        what = options.model or "the demo model"
        say(f"Serving {what} with vLLM {version('vllm')}:\n  {shlex.join(server_command(options))}\n")
        with server(options, log) as process:
            seconds = wait_until_healthy(process, options, log)
            say(f"Ready after {seconds:.0f} seconds.")
            model = chat(options)
            show_how_to_go_on(options, model, process, log)
    except Failure as failure:
        keep_log = str(log) in str(failure)
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    except SystemExit:
        print("\ndemo: interrupted; the server is stopped", file=sys.stderr)
        raise
    finally:
        if not keep_log:
            log.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
