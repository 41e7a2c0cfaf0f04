"""A model over two machines: are the answers those of the official code, and what is said if the machines differ?

    .venv/bin/python scripts/dev/two_machines.py               all of it, about half an hour on two cores
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.cases import load_case
from tests.support.engine import TOLERANCE
from tests.support.machines import Machine, NoSecondMachineError, two_machines
from tests.support.server import free_port
from tests.support.streams import Stream, streamed

BIN = Path(sys.executable).parent
ENV = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
FLAGS = ["--served-model-name", "m", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4"]
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
        there, env_there: What only the second machine has.
        words: Which one of the lines of each side has to hold, where they differ.
        killed: "idle" or "under load", where the second machine is killed.
    """

    flags: list[str]
    over: str = "nodes"
    env: dict[str, str] = field(default_factory=dict)
    there: tuple[str, ...] = ()
    env_there: dict[str, str] = field(default_factory=dict)
    words: tuple[str, str] | None = None
    killed: str = ""


OTHER = json.dumps({"routed_scaling_factor": 2.4})
WAYS = {
    "tp": Way([*EAGER, *TWO]),
    "tp-ep": Way([*EAGER, *TWO, "--enable-expert-parallel"]),
    "pp-compiled": Way(["--pipeline-parallel-size", "2"]),
    "dp": Way([*EAGER, "--data-parallel-size", "2", "--data-parallel-size-local", "1"], "data"),
    "no-plugin": Way(
        [*EAGER, *TWO, "--distributed-timeout-seconds", "90"],
        env_there={"VLLM_PLUGINS": ""},
        words=("has waited", "does not recognize"),
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
    "killed-idle": Way([*EAGER, *TWO], killed="idle"),
    "killed-under-load": Way([*EAGER, *TWO], killed="under load"),
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

    def said(self, words: str) -> tuple[str, float] | None:
        """The first line of the log with `words`, and seconds since the start."""
        for line in self.log.read_text(errors="replace").splitlines():
            if words in line:
                told = re.sub(r"^.*?(?:\[[\w.]+:\d+\]|Error:) ", "", line).strip()
                return told, time.monotonic() - self.start
        return None

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
            (here, "first", [*roles[0], "--port", str(port)], cores[0], (), {}),
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


def killed(side: Side, other: Side, url: str, when: str) -> str:
    """What clients see when the second machine is gone, and who notices when."""
    streams: list[Future[Stream]] = []
    with ThreadPoolExecutor(8) as pool:
        if when == "under load":
            begun = [threading.Event() for _ in range(8)]
            streams = [pool.submit(streamed, url, LONG, one) for one in begun]
            for one in begun:
                one.wait(120)
        os.killpg(other.process.pid, signal.SIGKILL)
        start = time.monotonic()
        if when == "idle":
            time.sleep(30)
            told = [f"/health after 30 s: {'200' if is_healthy(url) else 'refused'}"]
            start = time.monotonic()
            doctor = [str(BIN / "vllm-bailing"), "doctor", "--url", url, "--timeout", "20"]
            code = subprocess.run(doctor, capture_output=True).returncode
            told.append(f"doctor --url: exit code {code} after {time.monotonic() - start:.0f} s")
        else:
            counts = Counter(one.result().judged(400) for one in streams)
            told = [f"8 streams: {dict(counts)} after {time.monotonic() - start:.0f} s"]
    try:
        side.process.wait(120)
        told.append(f"the first ends {time.monotonic() - start:.0f} s after {'that began' if when == 'idle' else 'it'}")
    except subprocess.TimeoutExpired:
        told.append(f"the first still runs after 120 s; /health: {'200' if is_healthy(url) else 'refused'}")
    return "; ".join(told)


def refused(side: Side, other: Side, words: tuple[str, str]) -> str:
    """What each side says, and when."""
    found: list[tuple[str, float] | None] = [None, None]
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and None in found:
        found = [known or one.said(word) for known, one, word in zip(found, (side, other), words, strict=True)]
        time.sleep(0.5)
    told = []
    for said, one in zip(found, (side, other), strict=True):
        try:
            one.process.wait(120)
            ended = f"ended after {time.monotonic() - one.start:.0f} s"
        except subprocess.TimeoutExpired:
            ended = f"WRONG: still runs after {time.monotonic() - one.start:.0f} s"
        told.append(f"{said[0]} ({said[1]:.0f} s, {ended})" if said else f"WRONG: nothing ({ended})")
    return "\n    first:  {}\n    second: {}".format(*told)


def judged(way: Way, first: Side, second: Side, url: str, expected: dict[str, Any]) -> str:
    if way.words:
        return refused(first, second, way.words)
    return trouble(first, second, url) or (
        killed(first, second, url, way.killed) if way.killed else answered(url, expected)
    )


def once(way: Way, folder: Path, model: Path, expected: dict[str, Any]) -> str:
    """Both sides from their start to their end, and what came of it."""
    with pair(way, folder, model) as (first, second, url):
        result = judged(way, first, second, url, expected)
        if "WRONG" in result:
            for side in (first, second):
                print(side.log.read_text(errors="replace")[-3000:], file=sys.stderr)
        return result


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which of {', '.join(WAYS)}; all if left out.")] = None,
) -> None:
    """Serve a recorded case over two machines in every way, and print what came."""
    unknown = set(names or []) - set(WAYS)
    if unknown:
        raise SystemExit(f"two_machines: {', '.join(sorted(unknown))} is none of {', '.join(WAYS)}")
    model, expected = load_case("plain")
    wrong = False
    for name in names or WAYS:
        way = WAYS[name]
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = once(way, Path(folder), model, expected)
                if way.killed:
                    begun = time.monotonic()
                    again = once(replace(way, killed=""), Path(folder), model, expected)
                    result += f"; both started again: {again}, after {time.monotonic() - begun:.0f} s"
            except NoSecondMachineError as error:
                raise SystemExit(f"two_machines: no second machine can be made here ({error})") from None
        print(f"{name}: {result}", flush=True)
        wrong |= "WRONG" in result
    raise SystemExit(wrong)


if __name__ == "__main__":
    typer.run(main)
