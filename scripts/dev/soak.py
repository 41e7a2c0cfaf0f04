"""A server of the demo under mixed load for an hour: right answers, lost requests, memory and open files over time.

    .venv/bin/python scripts/dev/soak.py --minutes 60 --out docs/soak

The server has two draft tokens and the demo's adapter, and a KV cache so small that requests are preempted; its weights
are loaded again every minute. A quarter of the requests is for the adapter; an eighth ends in the middle.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import typer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.adapters import merged
from tests.support.server import serving
from tests.support.soak import ADAPTER, Tally, questions, soak
from vllm_bailing import DEMO, DEMO_ADAPTER

FLAGS = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}')
FLAGS += ("--enable-lora", "--lora-modules", f"{ADAPTER}={DEMO_ADAPTER}")
FLAGS += ("--num-gpu-blocks-override", "12", "--max-num-seqs", "16")


def plain_model(folder: Path) -> Any:
    from transformers import AutoTokenizer

    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    model = BailingMoeV2ForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(str(folder)))


def reload_weights(url: str, ended: threading.Event, count: list[int]) -> None:
    while not ended.wait(60):
        httpx.post(f"{url}/collective_rpc", json={"method": "reload_weights"}, timeout=300).raise_for_status()
        count[0] += 1


def slope(samples: list[dict[str, float]]) -> tuple[float, float]:
    """Growth of the memory in MiB per hour over the last half, by least squares, and its standard error."""
    import numpy

    kept = samples[len(samples) // 2 :]
    hours = numpy.array([sample["seconds"] / 3600 for sample in kept])
    mib = numpy.array([sample["memory"] / 2**20 for sample in kept])
    (rate, _), covariance = numpy.polyfit(hours, mib, 1, cov=True)
    return float(rate), float(covariance[0, 0] ** 0.5)


def report(tally: Tally, reloads: int) -> dict[str, Any]:
    rate, error = slope(tally.samples)
    files = [sample["files"] for sample in tally.samples]
    return {
        "seconds": tally.samples[-1]["seconds"],
        "right": dict(tally.right),
        "wrong": tally.wrong,
        "lost": tally.lost,
        "preemptions": tally.samples[-1]["preemptions"],
        "reloads": reloads,
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


def main(minutes: Annotated[float, typer.Option(min=1)] = 60, out: Path = Path("soak")) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        asked = questions("demo", plain_model(DEMO), 64) * 3
        asked += questions(ADAPTER, plain_model(merged(DEMO, DEMO_ADAPTER, folder / "merged")), 64)
        # The installed program: a fork of another process would take its memory over little by little.
        programs = Path(sys.executable).parent
        with serving(folder / "log", *FLAGS, programs=programs, VLLM_SERVER_DEV_MODE="1") as server:
            ended, reloads = threading.Event(), [0]
            reloading = threading.Thread(target=reload_weights, args=(server.url, ended, reloads))
            reloading.start()
            begun = time.monotonic()
            print(f"{server.url} under load for {minutes:g} minutes", flush=True)
            tally = soak(server.url, asked, 60 * minutes)
            ended.set()
            reloading.join()
            print(f"done after {time.monotonic() - begun:.0f} s")
    found = report(tally, reloads[0])
    Path(f"{out}.json").write_text(json.dumps(found, indent=1))
    plot(found, Path(f"{out}.png"))
    shown = {key: value for key, value in found.items() if key not in ("samples", "wrong", "lost")}
    print(json.dumps({**shown, "wrong": len(tally.wrong), "lost": len(tally.lost)}, indent=1))
    print(*(tally.wrong + tally.lost)[:10], sep="\n")
    raise typer.Exit(bool(tally.wrong or tally.lost))


if __name__ == "__main__":
    typer.run(main)
