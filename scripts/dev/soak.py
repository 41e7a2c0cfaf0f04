"""A server of the demo under mixed load for an hour: right answers, lost requests, memory and open files over time.

    .venv/bin/python scripts/dev/soak.py --minutes 60 --out docs/soak

The server has two draft tokens, both parsers and the demo's adapter, and a KV cache so small that requests are
preempted. Every 20 seconds, in turn: its weights are loaded again; it sleeps and wakes up; it is paused, given other
weights in portions, which its checksums have to show, given its own again, and goes on. A third of the requests is for
the adapter or for one that is loaded for it and taken away; one kind of twelve ends in the middle.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.adapters import merged
from tests.support.checkpoints import read_tensors
from tests.support.conversations import plain_model
from tests.support.paths import ROOT
from tests.support.server import serving
from tests.support.soak import ADAPTER, KINDS, Tally, questions, soak
from vllm_bailing import DEMO, DEMO_ADAPTER

FLAGS = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}')
FLAGS += ("--enable-auto-tool-choice", "--tool-call-parser", "bailing", "--reasoning-parser", "bailing")
FLAGS += ("--enable-lora", "--max-loras", "4", "--lora-modules", f"{ADAPTER}={DEMO_ADAPTER}")
FLAGS += ("--num-gpu-blocks-override", "12", "--max-num-seqs", "16")
FLAGS += ("--worker-extension-cls", "tests.support.weight_files.Extension")
FLAGS += ("--weight-transfer-config", '{"backend": "files"}')
QUESTIONS = 32  # for each model
ENV = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "PYTHONPATH": str(ROOT)}
ENV["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = "3600"  # for a machine that has more urgent work


class Changes:
    """What is done to a server meanwhile: every 20 seconds one of three things, in turn."""

    def __init__(self, url: str, folder: Path) -> None:
        self.http = httpx.Client(base_url=url, timeout=600)
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        own = read_tensors(DEMO)
        other = {name: -tensor for name, tensor in own.items() if ".experts.3." in name or name == "model.norm.weight"}
        self.own, self.other = (
            [_saved(dict(list(tensors.items())[start::3]), folder / f"{name}-{start}") for start in range(3)]
            for name, tensors in (("own", own), ("other", other))
        )

    def until(self, ended: threading.Event) -> None:
        for change in itertools.cycle((self.reload, self.sleep, self.update)):
            if ended.wait(20):
                return
            try:
                change()
                self.done[change.__name__] += 1
            except (httpx.HTTPError, RuntimeError) as error:
                self.problems.append(f"{change.__name__}: {error}")

    def _post(self, path: str, **body: Any) -> Any:
        answer = self.http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def reload(self) -> None:
        self._post("/collective_rpc", method="reload_weights")

    def sleep(self) -> None:
        """A CPU keeps its memory: vLLM's worker ignores that part of level 1, and the scheduler sleeps."""
        level = self.done["sleep"] % 2
        self._post(f"/sleep?level={level}&mode=keep")
        if not self.http.get("/is_sleeping").json()["is_sleeping"]:
            raise RuntimeError(f"it does not sleep at level {level}")
        time.sleep(1)
        self._post("/wake_up")

    def update(self) -> None:
        self._post("/pause?mode=keep")
        seen = [self._checksums()]
        for portions in (self.other, self.own):
            self._post("/start_weight_update")
            for file in portions:
                self._post("/update_weights", update_info={"file": str(file)})
            self._post("/finish_weight_update")
            seen.append(self._checksums())
        self._post("/resume")
        if seen[0] == seen[1] or seen[0] != seen[2]:
            raise RuntimeError("the weights are not those that were sent")

    def _checksums(self) -> Any:
        return self._post("/weight_checker", action="checksum")


def _saved(tensors: dict[str, Any], file: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


def slope(samples: list[dict[str, float]]) -> tuple[float, float]:
    """Growth of the memory in MiB per hour over the last half, by least squares, and its standard error."""
    import numpy

    kept = samples[len(samples) // 2 :]
    hours = numpy.array([sample["seconds"] / 3600 for sample in kept])
    mib = numpy.array([sample["memory"] / 2**20 for sample in kept])
    (rate, _), covariance = numpy.polyfit(hours, mib, 1, cov=True)
    return float(rate), float(covariance[0, 0] ** 0.5)


def report(tally: Tally, changes: Changes) -> dict[str, Any]:
    rate, error = slope(tally.samples)
    files = [sample["files"] for sample in tally.samples]
    return {
        "seconds": tally.samples[-1]["seconds"],
        "right": dict(tally.right),
        "wrong": tally.wrong,
        "lost": tally.lost,
        "preemptions": tally.samples[-1]["preemptions"],
        "changes": dict(changes.done),
        "problems": changes.problems,
        "memory_mib_per_hour": {"slope": rate, "standard_error": error},
        "open_files": {"first": files[0], "last": files[-1], "most": max(files)},
        "samples": tally.samples,
    }


def plot(found: dict[str, Any], path: Path) -> None:
    from vllm_bailing.bench.plots import figure_at

    minutes = [sample["seconds"] / 60 for sample in found["samples"]]
    panels = (("memory", 2**20, "memory of all processes, MiB"), ("files", 1, "open files"))
    panels += (("preemptions", 1, "requests preempted"),)
    with figure_at(path, (12, 3.4), len(panels), layout="constrained") as (_figure, axes):
        for axis, (key, unit, title) in zip(axes, panels, strict=True):
            axis.plot(minutes, [sample[key] / unit for sample in found["samples"]])
            axis.set(title=title, xlabel="minutes")
            axis.set_ylim(0, 1.05 * max(axis.get_ylim()[1], 1))


def main(minutes: Annotated[float, typer.Option(min=0.5)] = 60, out: Path = Path("soak")) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        asked = questions("demo", plain_model(DEMO), QUESTIONS) * 3
        asked += questions(ADAPTER, plain_model(merged(DEMO, DEMO_ADAPTER, folder / "merged")), QUESTIONS)
        # The installed program: a fork of another process would take its memory over little by little.
        with serving(Path(f"{out}.log"), *FLAGS, programs=Path(sys.executable).parent, **ENV) as server:
            changes, ended = Changes(server.url, folder), threading.Event()
            changing = threading.Thread(target=changes.until, args=(ended,))
            changing.start()
            begun = time.monotonic()
            print(f"{server.url} under load for {minutes:g} minutes", flush=True)
            tally = soak(server.url, asked, 60 * minutes, kinds=KINDS)
            ended.set()
            changing.join()
            print(f"done after {time.monotonic() - begun:.0f} s")
    found = report(tally, changes)
    Path(f"{out}.json").write_text(json.dumps(found, indent=1))
    plot(found, Path(f"{out}.png"))
    shown = {key: value for key, value in found.items() if key not in ("samples", "wrong", "lost")}
    print(json.dumps({**shown, "wrong": len(tally.wrong), "lost": len(tally.lost)}, indent=1))
    print(*(tally.wrong + tally.lost)[:10], sep="\n")
    raise typer.Exit(bool(tally.wrong or tally.lost or changes.problems))


if __name__ == "__main__":
    typer.run(main)
