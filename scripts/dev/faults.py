"""What a user sees when something breaks: servers of the demo on this machine, one fault each, and a table of them.

    .venv/bin/python scripts/dev/faults.py               all of them, about ten minutes on two cores
    .venv/bin/python scripts/dev/faults.py engine-killed small-shm

Where a server ends by the fault, or its disk was full, the same one is started again once the cause is gone. Those that
change mounts need root on Linux. docs/reliability.md has results. Exit code 1 if a stream looks whole and is not.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.streams import streamed
from vllm_bailing import DEMO

BIN = Path(sys.executable).parent
FLAGS = ["--served-model-name", "demo", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28)]
TWO_RANKS = ["--tensor-parallel-size", "2"]
TWO_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # one for each rank
ENV = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
START_SECONDS, SECONDS = 400, 120
LOGS: Path | None = None  # where they are kept


class Server:
    """`vllm serve` of a checkpoint, its log and what it does next.

    Args:
        folder: Where the log is written.
        before: Shell commands in a mount namespace of its own, or limits, that come first.
        program: What runs the command, with its options.
        env: Further environment.
    """

    def __init__(
        self, folder: Path, *flags: str, model: Path | str = DEMO, before: str = "", program: str = "", **env: str
    ) -> None:
        cores = TWO_CORES if TWO_RANKS[0] in flags else {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "log"
        command = [str(BIN / "vllm"), "serve", str(model), "--port", str(port), *FLAGS, *flags]
        command = [*shlex.split(program), *command]
        if before:
            command = ["unshare", "--mount", "bash", "-c", f"{before}; exec {shlex.join(command)}"]
        stream = self.log.open("w")
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **ENV, **cores, **env},
            start_new_session=True,
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

    def completion(self) -> dict[str, Any]:
        body = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).json()

    def text(self) -> str:
        return self.completion()["choices"][0]["text"]

    @contextmanager
    def streams(self, count: int, tokens: int) -> Iterator[Callable[[], str]]:
        """That many streams under way, for the body of a `with`, and what waits for them and says how they ended."""
        body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True}
        begun = [threading.Event() for _ in range(count)]
        with ThreadPoolExecutor(max(1, count)) as pool:
            ends = [pool.submit(streamed, self.url, body, one) for one in begun]
            for one in begun:
                one.wait(120)
            yield lambda: ", ".join(
                f"{number} {end}" for end, number in Counter(one.result().judged(tokens) for one in ends).items()
            )

    def pid(self, name: str) -> int:
        """Of the process that calls itself so in the log."""
        found = re.search(rf"\({name} pid=(\d+)\)", self.log.read_text(errors="replace"))
        assert found, f"no {name} in {self.log}"
        return int(found[1])

    def says(self, text: str, seconds: float = START_SECONDS) -> bool:
        """Wait until the log has `text`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if text in self.log.read_text(errors="replace"):
                return True
            time.sleep(0.02)
        return False

    def message(self) -> str:
        """The line of the log that says what was wrong, without the names of processes: ours, or the first error."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))
        lines = [re.sub(r"^(\([^)]*\) )?(\w+ [\d-]+ [\d:]+ \[[^]]*\] )?", "", line) for line in text.splitlines()]
        ours = [line for line in lines if line.startswith(("vllm-bailing:", "vllm_bailing.errors."))]
        errors = [
            line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line) and "See root cause" not in line
        ]
        last = [line for line in lines if line.strip()] or ["nothing"]
        return " ".join((ours or errors or last[-1:])[0].split())[:200]

    def ended_after(self, begun: float) -> str:
        """How it ended, or that it did not."""
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"still runs after {SECONDS} s"
        seconds, end = time.monotonic() - begun, time.monotonic() + 10
        while (left := self._processes()) and time.monotonic() < end:
            time.sleep(0.5)
        return f"ends after {seconds:.0f} s, code {code}, {len(left) or 'no'} processes left"

    def _processes(self) -> list[psutil.Process]:
        return [other for other in psutil.process_iter() if _session(other) == self.process.pid]

    def stop(self) -> None:
        for other in self._processes():
            other.kill()
        self.process.wait()


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return -1


@contextmanager
def server(*flags: str, **how: Any) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        running = Server(Path(folder), *flags, **how)
        try:
            yield running
        finally:
            running.stop()
            if LOGS is not None:
                LOGS.mkdir(parents=True, exist_ok=True)
                shutil.copy(running.log, LOGS / f"{Path(folder).name}.log")


def again(*flags: str, **how: Any) -> str:
    """Start it once more: how long until an answer."""
    with server(*flags, **how) as running:
        if not running.started():
            return f"started again, it {running.ended_after(running.begun)}: {running.message()}"
        return f"started again, it gives {running.asked()} after {time.monotonic() - running.begun:.0f} s"


def _killed(name: str, *flags: str, clients: int = 0) -> str:
    with server(*flags) as running:
        assert running.started(), running.message()
        with running.streams(clients, tokens=400) as ends:
            begun = time.monotonic()
            os.kill(running.pid(name), signal.SIGKILL)
            told = f"{ends()} after {time.monotonic() - begun:.0f} s; " if clients else ""
        seen = f"{told}the server {running.ended_after(begun)}; {running.message()}"
    return f"{seen}; {again(*flags)}"


def engine_killed() -> str:
    """kill -9 of the engine core, idle."""
    return _killed("EngineCore")


def worker_killed() -> str:
    """kill -9 of one of two workers, idle."""
    return _killed("Worker_TP1", *TWO_RANKS)


def server_killed() -> str:
    """kill -9 of the API server."""
    return _killed("APIServer")


def engine_killed_under_load() -> str:
    """kill -9 of the engine core with 16 streams under way."""
    return _killed("EngineCore", clients=16)


def worker_killed_under_load() -> str:
    """kill -9 of one of two workers with 16 streams under way."""
    return _killed("Worker_TP1", *TWO_RANKS, clients=16)


def server_killed_under_load() -> str:
    """kill -9 of the API server with 16 streams under way."""
    return _killed("APIServer", clients=16)


def _stopped(name: str) -> str:
    """It stands still for 30 s, and then has to finish what it was asked before and meanwhile."""
    with server() as running:
        assert running.started(), running.message()
        with running.streams(1, tokens=200) as ends, ThreadPoolExecutor(1) as clients:
            os.kill(running.pid(name), signal.SIGSTOP)
            begun = time.monotonic()
            meanwhile = clients.submit(running.asked, 120)
            health = running.answers("/health")
            done = subprocess.run(
                [str(BIN / "vllm-bailing"), "doctor", "--url", running.url, "--timeout", "5"],
                capture_output=True,
                text=True,
            )
            said = next((line for line in done.stdout.splitlines() if line.startswith("no")), "nothing")
            time.sleep(max(0.0, 30 - (time.monotonic() - begun)))
            os.kill(running.pid(name), signal.SIGCONT)
            seen = f"/health {'200' if health else 'fails'}; doctor --url exits with {done.returncode}: {said}; "
            seen += f"after 30 s the stream is {ends()}, what was asked meanwhile is {meanwhile.result()}"
            return f"{seen}, and a new request {running.asked()}"


def engine_stopped() -> str:
    """The engine core stands still for 30 s (SIGSTOP), then goes on."""
    return _stopped("EngineCore")


def server_stopped() -> str:
    """The API server stands still for 30 s (SIGSTOP), then goes on."""
    return _stopped("APIServer")


def _at_start(*flags: str, **how: Any) -> str:
    with server(*flags, **how) as running:
        if running.started():
            return f"starts, and gives {running.asked()}"
        return f"{running.ended_after(running.begun)}: {running.message()}"


def _compiles(*flags: str, **how: Any) -> str:
    """As `_at_start`, without --enforce-eager, which stands in FLAGS."""
    return _at_start("--no-enforce-eager", *flags, **how)


@contextmanager
def disk(size: str) -> Iterator[Path]:
    """A disk with that little room, as a folder."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def _fills(size: str, env: Callable[[Path], dict[str, str]], *flags: str) -> str:
    """Start on a disk that gets full, and again when there is room, with what the first one left behind."""
    with disk(size) as folder:
        seen = _at_start(*flags, **env(folder))
        left = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        subprocess.run(["mount", "-o", "remount,size=2g", str(folder)], check=True)
        return f"{seen}; {left >> 10} KiB were left; with room, {again(*flags, **env(folder))}"


def _home(folder: Path) -> dict[str, str]:
    return {"HOME": str(folder), "XDG_CACHE_HOME": str(folder), "VLLM_CACHE_ROOT": f"{folder}/vllm"}


def _caches(folder: Path) -> dict[str, str]:
    return {"VLLM_CACHE_ROOT": f"{folder}/vllm", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}


def home_full() -> str:
    """The disk of the home folder is full from the start: no cache can be written."""
    return _fills("64k", _home)


def home_fills() -> str:
    """The disk of the home folder is full after 256 KiB of compiled code."""
    return _fills("256k", lambda folder: _home(folder) | _caches(folder), "--no-enforce-eager")


def caches_fill() -> str:
    """The disk of the caches is full after 2 MiB: code was compiled, and is not all written."""
    return _fills("2m", _caches, "--no-enforce-eager")


def tmp_full() -> str:
    """/tmp is full from the start."""
    return _fills("4k", lambda folder: {"TMPDIR": str(folder)})


def tmp_fills() -> str:
    """/tmp is full after 256 KiB of compiled code."""
    return _fills("256k", lambda folder: {"TMPDIR": str(folder)} | _caches(folder), "--no-enforce-eager")


def home_read_only() -> str:
    """The home folder is read-only."""
    return _at_start(before="mount -t tmpfs -o ro tmpfs /mnt && export HOME=/mnt XDG_CACHE_HOME=/mnt")


def home_read_only_compiled() -> str:
    """The home folder is read-only, and the model is compiled."""
    return _compiles(before="mount -t tmpfs -o ro tmpfs /mnt && export HOME=/mnt XDG_CACHE_HOME=/mnt")


def small_shm() -> str:
    """/dev/shm of 64 MiB, as containers have it, two ranks."""
    return _at_start(*TWO_RANKS, before="mount -t tmpfs -o size=64m tmpfs /dev/shm")


def little_memory() -> str:
    """A limit of 3 GiB on the address space."""
    return _at_start(before="ulimit -v 3145728")


def no_permission() -> str:
    """The file of the weights may not be read (by a root without the capability to read all)."""
    with tempfile.TemporaryDirectory() as folder:
        model = _copy(Path(folder))
        (model / "model.safetensors").chmod(0)
        return _at_start(model=model, program="setpriv --bounding-set=-dac_override,-dac_read_search")


def _copy(folder: Path) -> Path:
    return Path(shutil.copytree(DEMO, folder / "model"))


def _changes_while_loading(change: Callable[[Path], object], prepare: Callable[[Path], object] = bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model = _copy(Path(folder))
        prepare(model / "model.safetensors")
        with server(model=model) as running:
            assert running.says("Starting to load model"), running.message()
            change(model / "model.safetensors")
            if running.started():
                return f"starts, and gives {running.asked()}"
            return f"{running.ended_after(running.begun)}: {running.message()}"


def replaced_while_loading() -> str:
    """The weights are replaced by another model's after the check and before they are read."""

    def prepare(file: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        tensors = {name: torch.cat([one, one]) for name, one in load_file(file).items()}
        save_file(tensors, file.with_suffix(".new"))

    return _changes_while_loading(lambda file: file.with_suffix(".new").rename(file), prepare)


def cut_while_loading() -> str:
    """The file of the weights is cut off after the check and before it is read."""
    return _changes_while_loading(lambda file: os.truncate(file, file.stat().st_size // 2))


def dangling_link() -> str:
    """A model of the hub's cache, whose weights are a link to a blob that was deleted."""
    with tempfile.TemporaryDirectory() as home:
        name, commit = "models--some--model", "0" * 40
        snapshot = Path(home) / "hub" / name / "snapshots" / commit
        shutil.copytree(DEMO, snapshot)
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(commit)
        return _at_start(model="some/model", HF_HOME=home, HF_HUB_CACHE=f"{home}/hub")


def clock_jump() -> str:
    """The clock jumps a day ahead, and two days back, while it answers."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Path(folder) / "clock"
        clock.write_text("+0")
        library = next(Path("/usr/lib").rglob("libfaketime.so.1"), None)
        assert library, "apt install faketime"
        env = {"FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        with server(LD_PRELOAD=str(library), **env) as running:
            assert running.started(), running.message()
            seen = []
            for jump in ("+1d", "-1d"):
                clock.write_text(jump)
                begun = time.monotonic()
                seen.append(f"{jump}: {running.asked()} after {time.monotonic() - begun:.1f} s")
                shown = running.completion()["created"] - time.time()
                assert abs(abs(shown) - 86400) < 3600, f"its clock is off by {shown:.0f} s"
            return f"{'; '.join(seen)}; /health {'200' if running.answers('/health') else 'fails'}"


def one_cache() -> str:
    """Two servers start at once and compile into one empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        env = {"VLLM_CACHE_ROOT": f"{cache}/vllm", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        compiled = ("--no-enforce-eager",)
        with server(*compiled, **env) as first, server(*compiled, **env) as second:
            both = [running.started() for running in (first, second)]
            if not all(both):
                return f"{both}: {first.message()}; {second.message()}"
            answers = {running.text() for running in (first, second)}
            seen = f"both start, and give {'the same answer' if len(answers) == 1 else f'other answers: {answers}'}"
        return f"{seen}; {again(*compiled, **env)}"


def _drains(*flags: str) -> str:
    with server(*flags) as running:
        assert running.started(), running.message()
        with running.streams(16, tokens=400) as ends:
            begun = time.monotonic()
            running.process.send_signal(signal.SIGTERM)
            how = running.ended_after(begun)
            return f"{ends()}; {how}"


def terminated() -> str:
    """SIGTERM with 16 streams under way."""
    return _drains()


def terminated_with_time() -> str:
    """SIGTERM with 16 streams under way and `--shutdown-timeout 60`."""
    return _drains("--shutdown-timeout", "60")


FAULTS: dict[str, Callable[[], str]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        engine_killed,
        worker_killed,
        server_killed,
        engine_killed_under_load,
        worker_killed_under_load,
        server_killed_under_load,
        engine_stopped,
        server_stopped,
        terminated,
        terminated_with_time,
        clock_jump,
        home_full,
        home_fills,
        caches_fill,
        home_read_only,
        home_read_only_compiled,
        tmp_full,
        tmp_fills,
        small_shm,
        little_memory,
        no_permission,
        dangling_link,
        replaced_while_loading,
        cut_while_loading,
        one_cache,
    )
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=", ".join(FAULTS))] = None,
    logs: Annotated[Path | None, typer.Option(help="Keep the servers' logs in this folder.")] = None,
    at_once: Annotated[int, typer.Option(help="How many faults at a time.")] = 1,
) -> None:
    global LOGS
    LOGS = logs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped on the way out
    print("| fault | what is seen |\n|---|---|", flush=True)
    with ThreadPoolExecutor(at_once) as pool:
        seen = list(pool.map(report, names or FAULTS))
    raise SystemExit(any("WRONG" in one for one in seen))


def report(name: str) -> str:
    fault = FAULTS[name]
    try:
        seen = fault()
    except AssertionError as error:
        seen = f"not tried: {error}"
    print(f"| {(fault.__doc__ or '').rstrip('.')} | {seen.replace('|', '/')} |", flush=True)
    return seen


if __name__ == "__main__":
    typer.run(main)
