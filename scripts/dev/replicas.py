"""Two replicas behind a router, one of them killed under load: is every answer right, and is a broken one an error?

    .venv/bin/python scripts/dev/replicas.py                  behind nginx, and vllm-router where it is installed
    .venv/bin/python scripts/dev/replicas.py --router PATH    of vllm-router, in an environment of its own

The servers are those of the demo, the right answers the plain PyTorch model's. docs/scale-out.md has results.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import typer

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.support.conversations import MAX_TOKENS
from tests.support.nginx import PROGRAM, proxying
from tests.support.server import free_port, serving
from tests.support.soak import Question, questions
from tests.support.streams import CUT_OFF, DONE, streamed
from vllm_bailing import DEMO

Behind = Callable[[Path, int, tuple[str, str]], Any]


def stream(url: str, session: int, question: Question) -> str:
    """What became of a stream: right, wrong, short (it ended as if whole), or the error."""
    body = {"model": "demo", "prompt": question.prompt, "temperature": 0, "max_tokens": MAX_TOKENS}
    found = streamed(url, body, headers={"X-Session-Id": str(session)}, timeout=180)
    if found.tokens != question.answer[: len(found.tokens)]:
        return "WRONG"
    if found.end == DONE:
        return "right" if len(found.tokens) == len(question.answer) else "SHORT, and ended as if whole"
    return "SHORT without an error" if found.end == CUT_OFF else found.error


def load(url: str, asked: list[Question], clients: int, kill: Callable[[], None], seconds: float) -> dict[str, Any]:
    """Streams of `clients` at once before and after `kill`: what became of them, by when they began."""
    before, after, lock = Counter[str](), Counter[str](), threading.Lock()
    begun, killed = threading.Barrier(clients + 1), threading.Event()
    end = [float("inf")]

    def work(session: int) -> None:
        begun.wait()
        turn = 0
        while time.monotonic() < end[0]:
            tally = after if killed.is_set() else before
            outcome = stream(url, session, asked[(session + turn) % len(asked)])
            turn += 1
            with lock:
                tally[outcome] += 1

    workers = [threading.Thread(target=work, args=(session,)) for session in range(clients)]
    for worker in workers:
        worker.start()
    begun.wait()
    while sum(before.values()) < clients:  # as many are done, and as many under way
        time.sleep(0.1)
    kill()
    killed.set()
    end[0] = time.monotonic() + seconds
    for worker in workers:
        worker.join(300)
    return {"begun before": dict(before), "begun after": dict(after)}


@contextmanager
def routed(program: str, folder: Path, port: int, replicas: tuple[str, str]) -> Iterator[str]:
    """vllm-router in front of both, with a session's requests on one of them."""
    urls = [f"http://{one}" for one in replicas]
    command = [program, "--worker-urls", *urls, "--policy", "consistent_hash", "--port", str(port)]
    with (folder / "router.log").open("w") as log:
        process = subprocess.Popen([*command, "--host", "127.0.0.1"], stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        else:
            raise SystemExit(f"replicas: vllm-router does not start\n{(folder / 'router.log').read_text()[-2000:]}")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def plain_questions(count: int) -> list[Question]:
    from transformers import AutoTokenizer

    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    model = BailingMoeV2ForCausalLM.from_pretrained(DEMO, dtype="float32").eval()
    return questions("demo", SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(DEMO)), count)


def main(
    clients: Annotated[int, typer.Option(help="Streams at once.")] = 50,
    seconds: Annotated[float, typer.Option(help="Of load after the kill.")] = 20,
    router: Annotated[str | None, typer.Option(help="The program vllm-router.")] = shutil.which("vllm-router"),
) -> None:
    """Kill one of two replicas under load, behind each router."""
    ways: dict[str, Behind] = {}
    if PROGRAM:
        ways["nginx"] = proxying
    if router:
        ways["vllm-router"] = lambda folder, port, replicas: routed(router, folder, port, replicas)
    if not ways:
        raise SystemExit("replicas: neither nginx nor vllm-router is installed; install one of them")
    asked, bad = plain_questions(16), False
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def replica(number: int) -> Any:
            return stack.enter_context(serving(folder / f"log{number}", "--max-num-seqs", "32"))

        kept = replica(0)
        for number, (name, behind) in enumerate(ways.items(), 1):
            other = replica(number)
            (own := folder / name).mkdir()
            places = tuple(one.url.removeprefix("http://") for one in (kept, other))
            with behind(own, free_port(), places) as url:
                found = load(
                    url, asked, clients, functools.partial(os.killpg, other.process.pid, signal.SIGKILL), seconds
                )
            print(name, json.dumps(found), flush=True)
            bad |= any(outcome.startswith(("WRONG", "SHORT")) for tally in found.values() for outcome in tally)
    raise typer.Exit(bad)


if __name__ == "__main__":
    typer.run(main)
