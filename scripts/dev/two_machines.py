"""A model over two machines: are the answers those of the official code, and what is said if the machines differ?

    .venv/bin/python scripts/dev/two_machines.py               all of it, about forty minutes on two cores
    .venv/bin/python scripts/dev/two_machines.py tp no-plugin

The second machine is a network namespace, so this needs root on Linux. docs/scale-out.md has results.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.cases import load_case
from tests.support.engine import TOLERANCE
from tests.support.machines import Machine, NoSecondMachineError, two_machines
from tests.support.server import free_port
from tests.support.streams import Stream, streamed

BIN = Path(sys.executable).parent
ENV = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
FLAGS = ["--served-model-name", "m", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
FLAGS += ["--skip-tokenizer-init", "--max-logprobs", "-1"]
START_SECONDS = 900
EAGER = ["--enforce-eager"]
TWO = ["--tensor-parallel-size", "2"]


@dataclass(frozen=True)
class Way:
    """How two machines share a model, or differ.

    Attributes:
        flags: Of both.
        over: "nodes" for --nnodes, "data" for ranks of data parallelism.
        env: Of both.
        there, env_there, env_here: What only the second machine has, or the first.
        words: Which one of the lines of each side has to hold, where they differ.
        victim: Whose processes are killed (0 for the first machine), and how the title of the one begins ("" for all).
        load: Whether there are streams under way then.
    """

    flags: list[str]
    over: str = "nodes"
    env: dict[str, str] = field(default_factory=dict)
    there: tuple[str, ...] = ()
    env_there: dict[str, str] = field(default_factory=dict)
    env_here: dict[str, str] = field(default_factory=dict)
    words: tuple[str, str] | None = None
    victim: tuple[int, str] | None = None
    load: bool = False


OTHER = json.dumps({"routed_scaling_factor": 2.4})
DATA = [*EAGER, "--data-parallel-size", "2", "--data-parallel-size-local", "1"]
KILLS = {
    "second": (1, ""),
    "second-worker": (1, "VLLM::Worker"),
    "first-worker": (0, "VLLM::Worker"),
    "first-engine": (0, "VLLM::EngineCore"),
}
DATA_KILLS = {"dp-second": (1, ""), "dp-second-engine": (1, "VLLM::EngineCore")}
WAYS = {
    "tp": Way([*EAGER, *TWO]),
    "tp-ep": Way([*EAGER, *TWO, "--enable-expert-parallel"]),
    "pp-compiled": Way(["--pipeline-parallel-size", "2"]),
    "dp": Way(DATA, "data"),
    "no-plugin": Way(
        [*EAGER, *TWO, "--distributed-timeout-seconds", "90"],
        env_there={"VLLM_PLUGINS": ""},
        words=("has waited", "does not recognize"),
    ),
    "no-plugin-first": Way(
        [*EAGER, *TWO, "--distributed-timeout-seconds", "90"],
        env_here={"VLLM_PLUGINS": ""},
        words=("does not recognize", "has waited"),
    ),
    "in-tree": Way(
        [*EAGER, *TWO],
        env_there={"VLLM_BAILING_USE_INTREE": "1"},
        words=("differ in model class",) * 2,
    ),
    "other-version": Way(
        [*EAGER, *TWO], env_there={"PYTHONPATH": "older"}, words=("vllm-bailing '0.1.0' and '0.0.1'",) * 2
    ),
    "other-config": Way(
        [*EAGER, *TWO], there=("--hf-overrides", OTHER), words=("routed_scaling_factor 2.5 and 2.4",) * 2
    ),
    **{
        f"{name}-killed-{'under-load' if load else 'idle'}": Way(flags, over, victim=victim, load=load)
        for flags, over, kills in (([*EAGER, *TWO], "nodes", KILLS), (DATA, "data", DATA_KILLS))
        for name, victim in kills.items()
        for load in (False, True)
    },
}


class Side:
    """`vllm serve` on one of the machines."""

    def __init__(self, machine: Machine, folder: Path, name: str, command: list[str], env: dict[str, str]) -> None:
        self.log = folder / name
        stream = self.log.open("w")
        self.start = time.monotonic()
        self.process = subprocess.Popen(
            [*machine.prefix, str(BIN / "vllm"), "serve", *command],
            stdout=stream,
            stderr=stream,
            env={**os.environ, **ENV, **machine.env, **env},
            start_new_session=True,
        )

    def said(self, words: str, since: int = 0) -> str:
        """The first line of the log with `words`, a regular expression, from a place on; empty if there is none."""
        for line in self.log.read_bytes()[since:].decode(errors="replace").splitlines():
            if re.search(words, line):
                return re.sub(r"^.*?(?:\[[\w.]+:\d+\]|Error:) ", "", line).strip()
        return ""

    def pids(self, title: str) -> list[int]:
        """Of the processes whose title begins so."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return [one.pid for one in family if " ".join(one.cmdline()).startswith(title)]

    def end(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(20)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
        # Workers have sessions of their own only if they left; the group has all that is left.
        for _ in range(2):
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                break
            time.sleep(0.5)


@contextmanager
def pair(way: Way, folder: Path, model: Path) -> Iterator[tuple[Side, Side, str]]:
    """Both sides of a way and the URL of the first."""
    with two_machines() as (here, there), ExitStack() as stack:
        port, meet = free_port(), free_port()
        if way.over == "nodes":
            where = ["--nnodes", "2", "--master-addr", here.address, "--master-port", str(meet)]
            roles = (["--node-rank", "0"], ["--node-rank", "1", "--headless"])
            cores = ("0", "1")
        else:
            where = ["--data-parallel-address", here.address, "--data-parallel-rpc-port", str(meet)]
            roles = ([], ["--data-parallel-start-rank", "1", "--headless"])
            cores = ("0|1", "0|1")  # vLLM takes each rank's share of the list
        older = folder / "older"
        older.mkdir(exist_ok=True)
        (older / "sitecustomize.py").write_text("import vllm_bailing\nvllm_bailing.__version__ = '0.0.1'\n")
        paths = os.pathsep.join([str(older), os.environ.get("PYTHONPATH", "")])
        env_there = {name: paths if value == "older" else value for name, value in way.env_there.items()}
        shared = [str(model), *FLAGS, *way.flags, *where]
        sides = []
        for machine, name, role, core, extra, env in (
            (here, "first", [*roles[0], "--port", str(port)], cores[0], (), way.env_here),
            (there, "second", roles[1], cores[1], way.there, env_there),
        ):
            settings = {"VLLM_CPU_OMP_THREADS_BIND": core, **way.env, **env}
            side = Side(machine, folder, name, [*shared, *role, *extra], settings)
            stack.callback(side.end)
            sides.append(side)
        yield sides[0], sides[1], f"http://{here.address}:{port}"


def trouble(side: Side, other: Side, url: str) -> str:
    """Why a deployment does not become healthy; empty if it does."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if side.process.poll() is not None or other.process.poll() is not None:
            return "WRONG: a side ended by itself"
        if is_healthy(url):
            return ""
        time.sleep(1)
    return f"WRONG: not healthy after {START_SECONDS} s"


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=3).status_code == 200
    except httpx.HTTPError:
        return False


def answered(url: str, expected: dict[str, Any]) -> str:
    """How far the answer is from the recorded one."""
    rows = expected["logits"].log_softmax(-1)[:-1]
    body = {"model": "m", "prompt": expected["input_ids"].tolist(), "max_tokens": 16, "temperature": 0}
    body |= {"ignore_eos": True, "prompt_logprobs": rows.shape[1], "return_token_ids": True, "detokenize": False}
    worst = 0.0
    for _ in range(4):  # data-parallel ranks take turns
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
        if answer.status_code != 200:
            return f"WRONG: HTTP {answer.status_code}"
        choice = answer.json()["choices"][0]
        found = [[row[str(token)]["logprob"] for token in range(len(row))] for row in choice["prompt_logprobs"][1:]]
        worst = max(worst, (rows.new_tensor(found) - rows).abs().max().item())
        if choice["token_ids"] != expected["greedy_ids"].tolist():
            return "WRONG: other greedy tokens"
    return f"{'equal' if worst <= TOLERANCE else 'WRONG'}: {worst:.1e}, 16 of 16 tokens"


LONG = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "detokenize": False}


WATCHED_SECONDS, IDLE_SECONDS = 60, 30
TROUBLE = r"Error|died unexpectedly|Connection closed"


def kill(way: Way, sides: tuple[Side, Side]) -> None:
    assert way.victim
    side, title = sides[way.victim[0]], way.victim[1]
    if not title:
        os.killpg(side.process.pid, signal.SIGKILL)
        return
    (pid,) = side.pids(title)
    os.kill(pid, signal.SIGKILL)


class Ends:
    """Watches from now on when each side ends."""

    def __init__(self, sides: tuple[Side, Side]) -> None:
        self.sides, self.begun = sides, time.monotonic()
        self.after: list[float | None] = [None, None]
        self.places = [side.log.stat().st_size for side in sides]

    def watch(self, seconds: float) -> None:
        """Until both have ended, or `seconds` after the beginning."""
        while None in self.after and time.monotonic() < self.begun + seconds:
            for number, side in enumerate(self.sides):
                if self.after[number] is None and side.process.poll() is not None:
                    self.after[number] = time.monotonic() - self.begun
            time.sleep(0.2)

    def told(self) -> list[str]:
        words = []
        for name, side, after, place in zip(("first", "second"), self.sides, self.after, self.places, strict=True):
            runs = f"still runs after {time.monotonic() - self.begun:.0f} s"
            end = runs if after is None else f"ends after {after:.0f} s, code {side.process.returncode}"
            words.append(f"the {name} {end} ({side.said(TROUBLE, place)[:150] or 'says nothing'})")
        return words


def killed(way: Way, sides: tuple[Side, Side], url: str) -> str:
    """What clients see when something is killed, and who notices when."""
    streams: list[Future[Stream]] = []
    with ThreadPoolExecutor(8) as pool:
        if way.load:
            begun = [threading.Event() for _ in range(8)]
            streams = [pool.submit(streamed, url, LONG, one) for one in begun]
            for one in begun:
                one.wait(120)
            under_way = sum(not one.done() for one in streams)
        ends = Ends(sides)
        kill(way, sides)
        if way.load:
            watch = pool.submit(ends.watch, WATCHED_SECONDS)
            counts = Counter(one.result().judged(400) for one in streams)
            seconds = time.monotonic() - ends.begun
            told = [f"{under_way} of 8 streams under way: {dict(counts)} after {seconds:.0f} s"]
            told.append(f"/health then: {'200' if is_healthy(url) else 'refused'}")
            watch.result()
        else:
            ends.watch(IDLE_SECONDS)
            told = [f"/health after {IDLE_SECONDS} s: {'200' if is_healthy(url) else 'refused'}"]
            start = time.monotonic()
            doctor = [str(BIN / "vllm-bailing"), "doctor", "--url", url, "--timeout", "20"]
            done = subprocess.run(doctor, capture_output=True, text=True)
            told.append(f"then doctor --url: exit code {done.returncode} after {time.monotonic() - start:.0f} s")
            told += [line.strip() for line in done.stdout.splitlines() if line.startswith("no  ")]
            if done.returncode == 0:
                told.append("WRONG: doctor says that all is well")
            ends.watch(WATCHED_SECONDS)
    return "; ".join(told + ends.told())


def refused(sides: tuple[Side, Side], words: tuple[str, str]) -> str:
    """What each side says, and when."""
    found: list[tuple[str, float] | None] = [None, None]
    ends = Ends(sides)
    while time.monotonic() < ends.begun + START_SECONDS and None in (*found, *ends.after):
        for number, (side, word) in enumerate(zip(sides, words, strict=True)):
            if found[number] is None and (line := side.said(word)):
                found[number] = (line, time.monotonic() - side.start)
        ends.watch(time.monotonic() - ends.begun + 0.5)
        if found[0] and None not in ends.after:
            break
    told = []
    for said, side, after in zip(found, sides, ends.after, strict=True):
        ended = "WRONG: still runs" if after is None else f"ended after {after + ends.begun - side.start:.0f} s"
        told.append(f"{said[0]} ({said[1]:.0f} s, {ended})" if said else f"WRONG: nothing ({ended})")
    return "\n    first:  {}\n    second: {}".format(*told)


def up(sides: tuple[Side, Side], url: str, expected: dict[str, Any]) -> str:
    return trouble(*sides, url) or answered(url, expected)


def show_logs(result: str, sides: tuple[Side, Side]) -> None:
    if "WRONG" in result:
        for side in sides:
            print(side.log.read_text(errors="replace")[-3000:], file=sys.stderr)


def each(names: list[str], model: Path, expected: dict[str, Any]) -> Iterator[str]:
    """What came of every way, each from the start of both sides to their end."""
    for name in names:
        way = WAYS[name]
        with tempfile.TemporaryDirectory() as folder, pair(way, Path(folder), model) as (*sides, url):
            result = refused(tuple(sides), way.words) if way.words else up(tuple(sides), url, expected)
            show_logs(result, tuple(sides))
        yield f"{name}: {result}"


def kills(names: list[str], model: Path, expected: dict[str, Any]) -> Iterator[str]:
    """What came of every kill; the start after one is the start before the next."""
    before = ""
    for name in [*names, ""]:
        way = WAYS[name or names[-1]]
        with tempfile.TemporaryDirectory() as folder, pair(way, Path(folder), model) as (*sides, url):
            begun, sides = time.monotonic(), tuple(sides)
            answer = up(sides, url, expected)
            if before:
                yield f"{before}, both started again: {answer} after {time.monotonic() - begun:.0f} s"
            elif "WRONG" in answer:
                yield f"{name}: {answer}"
            if "WRONG" in answer:
                show_logs(answer, sides)
                return
            if name:
                told = f"{name}: {killed(way, sides, url)}"
                show_logs(told, sides)
                yield told
            before = name


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which of {', '.join(WAYS)}; all if left out.")] = None,
) -> None:
    """Serve a recorded case over two machines in every way, and print what came."""
    unknown = set(names or []) - set(WAYS)
    if unknown:
        raise SystemExit(f"two_machines: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    model, expected = load_case("plain")
    chosen = names or list(WAYS)
    wrong = False
    try:
        # One run of kills for each way to divide the model.
        for (_, killing), group in groupby(chosen, lambda name: (WAYS[name].over, WAYS[name].victim is not None)):
            for line in (kills if killing else each)(list(group), model, expected):
                print(line, flush=True)
                wrong |= "WRONG" in line
    except NoSecondMachineError as error:
        raise SystemExit(f"two_machines: no second machine can be made here ({error})") from None
    raise SystemExit(wrong)


if __name__ == "__main__":
    typer.run(main)
