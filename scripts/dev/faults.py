"""What a user sees when something breaks: servers of the demo on this machine, one fault each, and a table of them.

    .venv/bin/python scripts/dev/faults.py               all of them, about ten minutes on two cores
    .venv/bin/python scripts/dev/faults.py engine-killed small-shm

Those that change mounts need root on Linux. docs/reliability.md has results.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer

from vllm_bailing import DEMO

BIN = Path(sys.executable).parent
FLAGS = ["--served-model-name", "demo", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28)]
TWO_RANKS = ["--tensor-parallel-size", "2"]
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # one for each rank
ENV = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
START_SECONDS, SECONDS = 400, 120


class Server:
    """`vllm serve` of the demo, its log and what it does next."""

    def __init__(self, folder: Path, *flags: str, before: str = "") -> None:
        env = TWO_CORES if TWO_RANKS[0] in flags else {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log"
        command = [str(BIN / "vllm"), "serve", str(DEMO), "--port", str(port), *FLAGS, *flags]
        if before:  # in a mount namespace or with limits of its own
            command = ["unshare", "--mount", "bash", "-c", f"{before}; exec {shlex.join(command)}"]
        stream = self.log.open("w")
        self.process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, **ENV, **env}, start_new_session=True
        )

    def started(self) -> bool:
        """Wait until it is healthy (True) or has ended."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            if self.answers("/health"):
                return True
            time.sleep(0.5)
        return False

    def answers(self, path: str) -> bool:
        try:
            return httpx.get(self.url + path, timeout=3).status_code == 200
        except httpx.HTTPError:
            return False

    def asked(self, seconds: float = 30) -> str:
        """ "an answer", or the error."""
        body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 4}
        try:
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=seconds)
        except httpx.HTTPError as error:
            return type(error).__name__
        return "an answer" if answer.status_code == 200 else f"HTTP {answer.status_code}"

    def pid(self, name: str) -> int:
        """Of the process that calls itself so in the log."""
        found = re.search(rf"\({name} pid=(\d+)\)", self.log.read_text(errors="replace"))
        assert found, f"no {name} in {self.log}"
        return int(found[1])

    def last_line(self) -> str:
        """The last line of the log that says something, without the names of processes."""
        lines = [re.sub(r"^\([^)]*\) ", "", line) for line in self.log.read_text(errors="replace").splitlines()]
        wanted = [
            line for line in lines if line.startswith("vllm-bailing:") or re.match(r"\w*(Error|Exception)\b", line)
        ]
        return " ".join((wanted or [line for line in lines if line.strip()] or ["nothing"])[-1].split())[:160]

    def ended_after(self, begun: float) -> str:
        """How it ended, or that it did not."""
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"still runs after {SECONDS} s"
        left = [other for other in psutil.process_iter() if _session(other) == self.process.pid]
        return f"ends after {time.monotonic() - begun:.0f} s, code {code}, {len(left)} processes left"

    def stop(self) -> None:
        for other in [other for other in psutil.process_iter() if _session(other) == self.process.pid]:
            other.kill()
        self.process.wait()


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return -1


@contextmanager
def server(*flags: str, before: str = "") -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        running = Server(Path(folder), *flags, before=before)
        try:
            yield running
        finally:
            running.stop()


def _killed(name: str, *flags: str) -> str:
    with server(*flags) as running:
        assert running.started(), running.last_line()
        begun = time.monotonic()
        os.kill(running.pid(name), signal.SIGKILL)
        return f"the server {running.ended_after(begun)}; {running.last_line()}"


def engine_killed() -> str:
    """kill -9 of the engine core, idle."""
    return _killed("EngineCore")


def worker_killed() -> str:
    """kill -9 of one of two workers, idle."""
    return _killed("Worker_TP1", *TWO_RANKS)


def server_killed() -> str:
    """kill -9 of the API server."""
    return _killed("APIServer")


def engine_stopped() -> str:
    """The engine core stands still (SIGSTOP), then goes on."""
    with server() as running:
        assert running.started(), running.last_line()
        os.kill(running.pid("EngineCore"), signal.SIGSTOP)
        health = running.answers("/health")
        done = subprocess.run(
            [str(BIN / "vllm-bailing"), "doctor", "--url", running.url, "--timeout", "5"],
            capture_output=True,
            text=True,
        )
        said = next((line for line in done.stdout.splitlines() if line.startswith("no")), "nothing")
        os.kill(running.pid("EngineCore"), signal.SIGCONT)
        return f"/health {'200' if health else 'fails'}; doctor --url exits with {done.returncode}: {said}; " + (
            f"then {running.asked()}"
        )


def _at_start(*flags: str, before: str) -> str:
    with server(*flags, before=before) as running:
        begun = time.monotonic()
        if running.started():
            return f"starts, and gives {running.asked()}"
        return f"{running.ended_after(begun)}: {running.last_line()}"


def home_full() -> str:
    """The disk of the home folder is full from the start: no cache can be written."""
    return _at_start(before="mount -t tmpfs -o size=64k tmpfs /mnt && export HOME=/mnt XDG_CACHE_HOME=/mnt")


def home_read_only() -> str:
    """The home folder is read-only."""
    return _at_start(before="mount -t tmpfs -o ro tmpfs /mnt && export HOME=/mnt XDG_CACHE_HOME=/mnt")


def small_shm() -> str:
    """/dev/shm of 64 KiB, two ranks."""
    return _at_start(*TWO_RANKS, before="mount -t tmpfs -o size=64k tmpfs /dev/shm")


def little_memory() -> str:
    """A limit of 6 GiB on the address space."""
    return _at_start(before="ulimit -v 6291456")


FAULTS: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        engine_killed,
        worker_killed,
        server_killed,
        engine_stopped,
        home_full,
        home_read_only,
        small_shm,
        little_memory,
    )
}


def main(names: Annotated[list[str] | None, typer.Argument(help=", ".join(FAULTS))] = None) -> None:
    print("| fault | what is seen |\n|---|---|", flush=True)
    for name in names or FAULTS:
        fault = FAULTS[name]
        try:
            seen = fault()
        except AssertionError as error:
            seen = f"not tried: {error}"
        print(f"| {(fault.__doc__ or '').rstrip('.')} | {seen.replace('|', '/')} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
