"""Ray Data over two machines, one of which is killed in the middle: is every prompt answered, once, and rightly?

    python scripts/dev/ray_machines.py --prompts 1000

With an environment that has ray[data] beside vLLM and this package. The second machine is a network namespace, so this
needs root on Linux. Runs deploy/ray/batch.py, and compares with the plain PyTorch model. docs/deploy.md has results.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import psutil
import typer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.machines import Machine, NoSecondMachineError, two_machines
from tests.support.ray import CPUS, ENV, batch, kill, prompt_rows, right_answers, wait_for_start, wrong_answers
from tests.support.server import free_port

BIN = Path(sys.executable).parent


@contextmanager
def node(machine: Machine, core: int, session: Path, own: Path, *role: str) -> Iterator[subprocess.Popen[bytes]]:
    """Ray's processes on a machine, which sees a folder of its own where the other has `session`."""
    start = ["ray", "start", "--block", *role, "--node-ip-address", machine.address, "--num-cpus", str(CPUS)]
    start += ["--object-store-memory", str(2**28), "--min-worker-port", "20000", "--max-worker-port", "29999"]
    prefix = list(machine.prefix)
    if prefix:
        prefix += ["sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(own), str(session)]
    with (own / "log").open("w") as log:
        process = subprocess.Popen(
            [*prefix, str(BIN / start[0]), *start[1:]],
            stdout=log,
            stderr=log,
            env={**os.environ, **ENV, **machine.env, "VLLM_CPU_OMP_THREADS_BIND": str(core)},
            start_new_session=True,
        )
    try:
        wait_for_start(process, own / "log")
        yield process
    finally:
        kill(process)


def busy(node: subprocess.Popen[bytes], seconds: float = 3) -> float:
    """Seconds of the processor that engines on a machine take meanwhile; one without requests takes none."""
    engines = [one for one in psutil.Process(node.pid).children(recursive=True) if one.name().startswith("VLLM::")]
    before = [sum(one.cpu_times()[:2]) for one in engines]
    time.sleep(seconds)
    return sum(sum(one.cpu_times()[:2]) for one in engines) - sum(before)


def main(
    prompts: Annotated[int, typer.Option(help="How many.")] = 1000,
    rows: Annotated[int, typer.Option(help="In a block.")] = 20,
    kill_after: Annotated[float, typer.Option(help="Share that is answered when one dies.")] = 0.3,
) -> None:
    """Answer all, kill the second machine in the middle, and judge what came."""
    with tempfile.TemporaryDirectory(prefix="vb") as name, ExitStack() as stack:
        folder = Path(name)
        (session := folder / "s").mkdir()
        asked = prompt_rows(prompts)
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        try:
            here, there = stack.enter_context(two_machines())
        except NoSecondMachineError as error:
            raise SystemExit(f"ray_machines: no second machine can be made here ({error})") from None
        port = free_port()
        (first := folder / "1").mkdir()
        (second := folder / "2").mkdir()
        head = ["--head", "--port", str(port), "--include-dashboard", "false", "--temp-dir", str(session)]
        stack.enter_context(node(here, 0, session, first, *head))
        other = stack.enter_context(node(there, 1, session, second, "--address", f"{here.address}:{port}"))
        # Else the first engine may have answered all before the second has started.
        waiting = {"RAY_DATA_DEFAULT_WAIT_FOR_MIN_ACTORS_S": "900"}
        env = {"RAY_ADDRESS": f"{here.address}:{port}", **here.env, **waiting}
        log = (folder / "batch.log").open("w")
        begun = time.monotonic()
        process = batch(folder, "--engines", "2", "--rows", str(rows), log=log, env=env)
        stack.callback(process.wait)
        stack.callback(process.send_signal, signal.SIGKILL)
        told: list[str] = []
        while process.poll() is None:
            done = len(wrong_answers(folder / "out", {})[1])
            if not told and done >= kill_after * prompts and (work := busy(other)) > 0.1:
                kill(other)
                told.append(
                    f"{done} were answered after {time.monotonic() - begun:.0f} s, when one machine was killed, whose "
                    f"engine had worked for {work:.1f} of the last 3 s"
                )
            time.sleep(0.5)
        if not told:
            told.append("nothing was killed: the second machine's engine did not work in time; give more --prompts")
        wrong, ids = wrong_answers(folder / "out", right_answers(asked))
        lines = (folder / "batch.log").read_text(errors="replace").splitlines()
        summary = next((line for line in reversed(lines) if " answers to " in line), "no summary")
        told.append(f"the end after {time.monotonic() - begun:.0f} s, exit code {process.returncode}: {summary}")
        told.append(f"{len(ids)} rows, {len(set(ids))} prompts, {len(wrong)} wrong answers {wrong[:2] or ''}")
        print("\n".join(told))
        each_once = sorted(ids) == sorted(row["id"] for row in asked)
        good = "when one machine was killed" in told[0] and process.returncode == 0 and not wrong and each_once
        if not good:
            print((folder / "batch.log").read_text(errors="replace")[-6000:], file=sys.stderr)
        raise SystemExit(not good)


if __name__ == "__main__":
    typer.run(main)
