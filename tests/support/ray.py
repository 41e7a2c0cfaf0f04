"""deploy/ray/batch.py on the demo, and what it should have answered."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import psutil

from tests.support.conversations import HELD_OUT, greedy, prompt_ids
from tests.support.paths import ROOT
from vllm_bailing import DEMO

CPUS = 8  # that Ray believes in: each of its workers asks for one, and most of them wait
ENV = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # it would write a token into the home folder
    "RAY_worker_niceness": "0",  # 15 otherwise: starved by whatever else runs here
    "RAY_raylet_start_wait_time_s": "240",
    "RAY_agent_register_timeout_ms": "240000",
    "RAY_health_check_failure_threshold": "20",
    "RAY_memory_monitor_refresh_ms": "0",  # it would count the memory of the whole machine
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
MAX_TOKENS = 32
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
# Without tools and thinking, whose messages have other keys.
ROWS = [row for row in HELD_OUT if not row.get("tools") and not row.get("thinking")]


def wait_for_start(process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    """Wait until `ray start --block` has started its processes."""
    end = time.monotonic() + seconds
    while "Ray runtime started" not in (said := log.read_text(errors="replace")):
        assert process.poll() is None and time.monotonic() < end, said
        time.sleep(0.5)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End all that `process` started, in whatever session, at once, as a power cut would."""
    try:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for send in ("suspend", "kill"):
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(one, send)()
    process.wait()


def prompt_rows(count: int) -> list[dict[str, Any]]:
    """`count` lines for batch.py; conversations come again, ids do not."""
    return [{"id": f"prompt-{number}", "messages": ROWS[number % len(ROWS)]["messages"]} for number in range(count)]


def batch(folder: Path, *options: str, log: IO[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """batch.py, started in a session of its own, from prompts.jsonl to out in `folder`."""
    command = [sys.executable, str(ROOT / "deploy/ray/batch.py"), str(DEMO), "prompts.jsonl", "out", "--cpu", *options]
    command += ["--engine", json.dumps(ENGINE), "--sampling", json.dumps({"temperature": 0, "max_tokens": MAX_TOKENS})]
    environment = {**os.environ, **ENV, **env}
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)


def right_answers(asked: list[dict[str, Any]]) -> dict[str, str]:
    """By id, what the plain PyTorch model answers."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    model = BailingMoeV2ForCausalLM.from_pretrained(DEMO, dtype="float32").eval()
    plain = SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(DEMO))
    several = asked[: len(ROWS)]
    tokens = greedy(plain, [prompt_ids(plain, row) for row in several])
    texts = [plain.tokenizer.decode(row[:MAX_TOKENS], skip_special_tokens=True) for row in tokens]
    return {row["id"]: texts[number % len(ROWS)] for number, row in enumerate(asked)}


def wrong_answers(out: Path, right: dict[str, str]) -> tuple[list[Any], list[str]]:
    """Rows of batch.py's output that are not as in `right`, and the ids of all rows."""
    lines = [line for file in sorted((out / "answers").glob("*.json")) for line in file.open(encoding="utf-8")]
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a file may be in the making
    wrong = [(row, right[row["id"]]) for row in rows if row["id"] in right and row["answer"] != right[row["id"]]]
    return wrong, [row["id"] for row in rows]
