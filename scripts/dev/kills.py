"""kill -9 of a process of a server with streams under way: who notices, what the clients see, and the start after it.

    .venv/bin/python scripts/dev/kills.py

Servers of the demo on this machine. faults.py kills the same ones while they are idle, two_machines.py a whole node.
docs/reliability.md has results. Exit code 1 if a stream looks whole and is not.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Annotated

import typer
from faults import TWO_RANKS, again, server

CLIENTS, TOKENS = 16, 400
KILLS = {
    "the engine core": ("EngineCore", ()),
    "one of two workers": ("Worker_TP1", TWO_RANKS),
    "the API server": ("APIServer", ()),
}


def killed(name: str, *flags: str) -> str:
    """What is seen when the process of that name is killed."""
    with server(*flags) as running:
        assert running.started(), running.message()
        with running.streams(CLIENTS, TOKENS) as ends:
            start = time.monotonic()
            os.kill(running.pid(name), signal.SIGKILL)
            told = f"{ends()} after {time.monotonic() - start:.0f} s"
        told += f"; the server {running.ended_after(start)}; {running.message()}"
    return f"{told}; {again(*flags)}"


def main(names: Annotated[list[str] | None, typer.Argument(help=", ".join(map(repr, KILLS)))] = None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped on the way out
    print(f"| killed, with {CLIENTS} streams under way | what is seen |\n|---|---|", flush=True)
    wrong = False
    for name in names or KILLS:
        process, flags = KILLS[name]
        seen = killed(process, *flags)
        wrong |= "WRONG" in seen
        print(f"| {name} | {seen.replace('|', '/')} |", flush=True)
    raise SystemExit(wrong)


if __name__ == "__main__":
    typer.run(main)
