"""From the start of `vllm serve` to its first token, and what the plugin itself costs a process at its start.

    python scripts/bench/bench_start.py
    python scripts/bench/bench_start.py --rounds 5 --compiled

vLLM's own class and this package take turns; vLLM's runs twice, and what differs between the two is noise. Both see the
demo checkpoint without its MTP layer, which vLLM's class refuses. Writes nothing.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import openai
import typer
from rich.console import Console
from rich.progress import track
from vllm.utils.network_utils import get_open_port

from vllm_bailing import DEMO
from vllm_bailing.bench import shapes
from vllm_bailing.bench.runner import turns
from vllm_bailing.bench.statistics import AGAIN, IN_TREE, PLUGIN, interval
from vllm_bailing.plugin.supported_versions import USE_INTREE

ARMS = {IN_TREE: "1", PLUGIN: "0", AGAIN: "1"}
PATIENCE = 600  # seconds
# What a server has imported when it loads the plugins or soon after, so that only what comes on top is timed.
REGISTRATION = """
import time, vllm.entrypoints.openai.api_server, vllm.engine.arg_utils, vllm.config, vllm.model_executor.models.registry
import vllm.model_executor.models.config
from importlib.metadata import entry_points
start = time.perf_counter()
[plugin] = [entry for entry in entry_points(group="vllm.general_plugins") if entry.value.startswith("vllm_bailing")]
plugin.load()()
print(1000 * (time.perf_counter() - start))
"""


def seconds_to_first_token(model: str, use_intree: str, options: list[str]) -> float:
    """Start a server, ask until it answers, and stop it.

    Raises:
        SystemExit: If it ends instead, with its last words.
    """
    port = get_open_port()
    command = [str(Path(sys.executable).parent / "vllm"), "serve", model, "--port", str(port), *options]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        env = {**os.environ, USE_INTREE: use_intree}
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            while True:
                if server.poll() is not None or time.perf_counter() - start > PATIENCE:
                    log.seek(0)
                    raise SystemExit(f"bench_start: {' '.join(command)} did not answer:\n{log.read()[-2000:]}")
                try:
                    client.completions.create(model=model, prompt="The", max_tokens=1)
                    return time.perf_counter() - start
                except openai.APIConnectionError:
                    time.sleep(0.05)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGINT)
                server.wait(60)


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    compiled: Annotated[bool, typer.Option("--compiled/--eager", help="With or without torch.compile.")] = False,
) -> None:
    """Measure both and print them."""
    options = ["--max-model-len", "1024", "--dtype", "bfloat16", *([] if compiled else ["--enforce-eager"])]
    measured: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        model = shapes.without_mtp(str(DEMO), Path(folder) / "demo")
        for arm in (IN_TREE, PLUGIN):
            seconds_to_first_token(model, ARMS[arm], options)  # fills the caches of files and of compiled code
        for arm in track(turns(ARMS, rounds), description="servers", console=Console(stderr=True)):
            measured[arm].append(seconds_to_first_token(model, ARMS[arm], options))
    for arm, seconds in measured.items():
        ratios = [mine / base for mine, base in zip(seconds, measured[IN_TREE], strict=True)]
        low, high = interval(ratios)
        print(
            f"{arm:<14} {statistics.median(seconds):.1f} s ({min(seconds):.1f}-{max(seconds):.1f}), "
            f"{statistics.median(ratios):.2f} of {IN_TREE}'s ({low:.2f}-{high:.2f})"
        )
    command = [sys.executable, "-c", REGISTRATION]
    costs = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        for _ in track(range(rounds), description="plugin", console=Console(stderr=True))
    ]
    print(f"plugin, import and registration: {statistics.median(costs):.0f} ms ({min(costs):.0f}-{max(costs):.0f})")


if __name__ == "__main__":
    typer.run(main)
