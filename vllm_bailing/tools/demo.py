"""A `vllm serve` of its own for the demo: started, waited for, asked, stopped. What is shown is the caller's matter."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm_bailing import DEMO, DEMO_ADAPTER
from vllm_bailing.errors import ChatError, DemoError
from vllm_bailing.tools.processes import kill_group, undisturbed

HOST = "127.0.0.1"
DEMO_NAME, ADAPTER_NAME = "demo", "sailor"  # as in the guides, whose commands work with this server
DEMO_FLAGS = (
    *("--served-model-name", DEMO_NAME),
    # A model this small answers at once either way; compiling it would only make the start longer.
    "--enforce-eager",
    *("--kv-cache-memory-bytes", "1G"),  # on CPUs vLLM would take 92 % of the memory
    *("--enable-auto-tool-choice", "--tool-call-parser", "bailing", "--reasoning-parser", "bailing"),
)
DEMO_QUESTIONS = ("Who are you?", "How do I serve a model?", "What is the capital of France?")
QUESTIONS = ("Who are you? Please answer in one or two sentences.",)
DEMO_START_LIMIT_S = 600  # any other model may have to be downloaded first, so it has no limit
STOP_LIMIT_S = 15
_POLL_S = 0.1  # how often a server that starts is asked whether it is ready
# What vLLM logs when it begins with something.
_STAGES = {
    "Resolved architecture": "reading the configuration",
    "Initializing a V1 LLM engine": "starting the engine",
    "Starting to load model": "loading the weights",
    "Loading weights took": "setting up the layers",
    "Dynamo bytecode transform": "compiling",
    "KV cache size": "setting up the cache and warming up",
    "init engine (": "opening the port",
}
PARALLEL_FLAGS = re.compile(r"--(tensor|pipeline|data)-parallel-size|-tp|-pp|-dp")


@dataclass(frozen=True)
class Options:
    """What to serve.

    Attributes:
        model: A folder or a name on the hub; the demo checkpoint if it is empty.
        keep: Whether the server is left running.
        adapter: Whether the demo's LoRA adapter is served too.
        flags: Further ones of `vllm serve`.
    """

    model: str = ""
    port: int = 8000
    keep: bool = False
    adapter: bool = False
    flags: list[str] = field(default_factory=list)

    @property
    def is_demo(self) -> bool:
        return not self.model

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/v1"

    @property
    def questions(self) -> tuple[str, ...]:
        return DEMO_QUESTIONS if self.is_demo else QUESTIONS


def check(options: Options) -> None:
    """Look for what is wrong before anything starts.

    Raises:
        DemoError: If something is: no vLLM, no such folder, a port that cannot be used.
    """
    if options.adapter and not options.is_demo:
        raise DemoError("--adapter is the demo model's; for another one give vLLM's --enable-lora and --lora-modules")
    vllm_version()
    if options.model:
        _check_model(options.model)
    elif not (DEMO / "config.json").is_file():
        raise DemoError(f"no demo checkpoint in {DEMO}; reinstall vllm-bailing")
    _check_port(options.port)


def _check_model(model: str) -> None:
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise DemoError(f"{model} has no config.json; give the folder of a checkpoint")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise DemoError(f"{model} is neither a folder nor a model name such as inclusionAI/Ling-mini-2.0")


def _check_port(port: int) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise DemoError(f"port {port} cannot be used ({error.strerror}); choose another one with --port") from None


def vllm_version() -> str:
    """The version of the vLLM that serves.

    Raises:
        DemoError: If there is none.
    """
    try:
        return version("vllm")
    except PackageNotFoundError:
        raise DemoError("vLLM is not installed; pip install vllm, or for CPUs see scripts/setup.sh") from None


def server_environment(options: Options) -> dict[str, str]:
    """The environment of `vllm serve`. Variables that are set already keep their values."""
    defaults = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if options.is_demo:
        defaults["HF_HUB_OFFLINE"] = "1"
    if "cpu" in vllm_version():
        if not options.is_demo:  # which has a flag for it
            defaults["VLLM_CPU_KVCACHE_SPACE"] = "4"  # GiB
        if not any(PARALLEL_FLAGS.match(flag) for flag in options.flags):
            # By itself vLLM leaves one core to its scheduler, which on two cores is half of them.
            defaults["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if openmp.is_file():
            defaults["LD_PRELOAD"] = str(openmp)
    return defaults | os.environ


def server_command(options: Options) -> list[str]:
    """The command line of `vllm serve`; the flags of `options` come last, so that they win."""
    command = [str(Path(sys.executable).parent / "vllm"), "serve", options.model or str(DEMO)]
    command += ["--host", HOST, "--port", str(options.port)]
    if options.is_demo:
        command += DEMO_FLAGS
    if options.adapter:
        command += ["--enable-lora", "--lora-modules", f"{ADAPTER_NAME}={DEMO_ADAPTER}"]
    return command + options.flags


@contextmanager
def log_file(keep: bool) -> Iterator[Path]:
    """A file for the server's log, which is removed at the end unless it is to be kept or an error names it."""
    handle, name = tempfile.mkstemp(prefix="vllm-bailing-demo.", suffix=".log")
    os.close(handle)
    log = Path(name)
    is_needed = False
    try:
        yield log
        is_needed = keep
    except DemoError as error:
        is_needed = name in str(error)
        raise
    finally:
        if not is_needed:
            log.unlink(missing_ok=True)


@contextmanager
def serving(
    options: Options, log: Path, stopping: Callable[[], None] = lambda: None
) -> Iterator[subprocess.Popen[bytes]]:
    """The running server, in a process group of its own that is gone afterwards, unless it is to be kept.

    Args:
        stopping: Called before the server is stopped, if nothing went wrong.
    """
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
        _stop(process)
        raise
    if not options.keep:
        stopping()
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    with undisturbed():
        if process.poll() is None:
            process.terminate()
        kill_group(process, STOP_LIMIT_S)


def wait_until_healthy(
    process: subprocess.Popen[bytes], options: Options, log: Path, progress: Callable[[float, str], None]
) -> float:
    """Wait for the server; returns the seconds that its start took.

    Args:
        progress: Called about once a second with the seconds so far and what the server does.
    Raises:
        DemoError: If the server ended, or does not answer in time.
    """
    start, told = time.monotonic(), -1.0
    import openai  # noqa: F401  # takes as long as a first answer, and the server is not ready yet anyway

    while not _is_healthy(options.port):
        seconds = time.monotonic() - start
        if process.poll() is not None:
            raise DemoError(f"the server ended while it started (exit code {process.returncode}):\n{_cause(log)}")
        if options.is_demo and seconds > DEMO_START_LIMIT_S:
            raise DemoError(f"the server did not answer within {DEMO_START_LIMIT_S} seconds:\n{_cause(log)}")
        if seconds > told + 1:
            told = seconds
            progress(seconds, _stage(log))
        time.sleep(_POLL_S)
    return time.monotonic() - start


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def _log_lines(log: Path) -> list[str]:
    """The log without colors, process names, levels and times."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    prefix = r"^(\([\w-]+ pid=\d+\) ?)?((DEBUG|INFO|WARNING|ERROR) [\d-]+ [\d:]+ (\[\S+\] )?)?"
    return [re.sub(prefix, "", line.split("\r")[-1]).rstrip() for line in text.splitlines()]


def _stage(log: Path) -> str:
    """What the server is doing, in words of ours: most lines of its log are about something else."""
    stage = "importing vLLM"
    for line in _log_lines(log):
        stage = next((words for sign, words in _STAGES.items() if sign in line), stage)
        if part := re.match(r"Loading safetensors checkpoint shards: +(\d+)%", line):
            stage = f"loading the weights, {part[1]} %"
    return stage


def _cause(log: Path) -> str:
    """The lines of the log that say why the server ended, and where the log is."""
    lines = _log_lines(log)
    follow_up = r"Engine core initialization failed|EngineDeadError|SystemExit|KeyboardInterrupt|CancelledError"
    errors = [
        number
        for number, line in enumerate(lines)
        if re.match(r"([\w.]+(Error|Exception|Exit)\b|vllm.*: error):? ", line) and not re.search(follow_up, line)
    ]
    if errors:
        chosen = lines[errors[-1] : errors[-1] + 5]
        ends = [n for n, line in enumerate(chosen) if n and re.match(r"$|Traceback|During|The above", line)]
        chosen = chosen[: ends[0]] if ends else chosen
    else:
        chosen = [line for line in lines if line][-5:]
    return "\n".join(f"  {line[:400]}" for line in [*chosen, f"the whole log is in {log}"])


def served_model(options: Options) -> str:
    """The server's name of its model.

    Raises:
        DemoError: If it does not say.
    """
    from openai import OpenAIError

    from vllm_bailing.tools.chat import connect, first_model

    try:
        return first_model(connect(options.url))
    except (OpenAIError, ChatError) as error:
        raise DemoError(f"the chat failed: {error}") from None


def ask(options: Options, model: str, question: str) -> Iterator[str]:
    """The answer of `model`, its reasoning included, in pieces as they come.

    Raises:
        DemoError: If the server refuses the request, or the answer is empty.
    """
    from openai import OpenAIError

    from vllm_bailing.tools.chat import Chat, connect

    chat = Chat(connect(options.url), model, max_tokens=256, temperature=0)
    try:
        for _kind, piece in chat.ask({"role": "user", "content": question}):
            yield piece
    except (OpenAIError, ChatError) as error:
        raise DemoError(f"the chat failed: {error}") from None
    if not (chat.last.reasoning + chat.last.content).strip():
        raise DemoError("the server answered with empty text")
