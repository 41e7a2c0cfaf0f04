"""What needs an engine of vLLM of its own, in a fresh process: its log is in a file, and nothing of it is left behind.

A `Task` is what one process does.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_bailing.errors import BenchError, shown, told
from vllm_bailing.tools.processes import end_group

_FOLLOWS = re.compile(r"Engine core|EngineDeadError|EngineGenerateError|WorkerProc|cancelled")  # another error


@dataclass
class Task(ABC):
    """What one process does; every field has to fit into JSON.

    Attributes:
        model: As for `vllm serve`.
        engine: Further arguments of `vllm.LLM`.
        env: Environment variables of the process, besides those of this one.
        out: File for the result; `run_task` fills it in.
    """

    model: str
    engine: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict, kw_only=True)
    out: str = field(default="", kw_only=True)

    @abstractmethod
    def work(self) -> Any:
        """Do it in this process, which needs vLLM and is the task's own; the result has to fit into JSON."""

    def read(self, stored: Any) -> Any:
        """The result of `work`, back from JSON."""
        return stored


def run_task(task: Task) -> Any:
    """The result of a task, done in a fresh process. If this one is interrupted, all that it started is ended.

    Raises:
        BenchError: If it failed; the message names the file with the log, which is kept then.
    """
    # GiB for the KV cache of vLLM's CPU build, which otherwise wants nearly all memory; GPUs do not look at it. It
    # would overrule the argument.
    defaults = {} if "kv_cache_memory_bytes" in task.engine else {"VLLM_CPU_KVCACHE_SPACE": "4"}
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        task = replace(task, out=str(result))
        name = f"{type(task).__module__}:{type(task).__qualname__}"
        with log.open("w") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "vllm_bailing.tools"],
                stdin=subprocess.PIPE,
                text=True,
                stdout=stream,
                stderr=stream,
                env={**defaults, **os.environ, **task.env},
                start_new_session=True,  # Ctrl-C goes to this process alone, which then ends the others
            )
        try:
            process.communicate(json.dumps({"task": name, "fields": asdict(task)}))
        finally:
            end_group(process)
        ended = json.loads(result.read_text()) if result.is_file() else {}
        if "result" not in ended:
            text = log.read_text(errors="replace")
            wrong = re.match(r"ValidationError: (\w+): (.*)", ended.get("error", ""))
            if wrong and wrong[1] in task.engine:
                value = told(task.engine[wrong[1]])
                raise BenchError(f"argument {wrong[1]}={value} of vllm.LLM: {wrong[2]}; correct it in --engine")
            raise BenchError(f"{_reason(ended.get('error', ''), text)}; the whole log is in {_kept(text)}")
        return task.read(ended["result"])


def _reason(error: str, log: str) -> str:
    """Why a task failed: its own error, unless that only says that the engine is gone, whose own is in the log."""
    if error and not _FOLLOWS.search(error):
        return error
    lines = [line for line in log.splitlines() if line.strip()]
    errors = [match[0] for line in lines if (match := re.search(r"\w+Error: .*", line))]
    return shown(next(filter(None, [*errors[:1], error, *lines[-1:], "the process said nothing"])), 600)


def _kept(log: str) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="vllm-bailing.", suffix=".log", delete=False) as file:
        file.write(log)
    return file.name


def check_arguments(option: str, arguments: Iterable[str]) -> None:
    """Refuse what vLLM's own sources do not name as an argument of `vllm.LLM`, before vLLM is imported.

    Raises:
        ValueError: Naming `option`.
    """
    if not (known := _engine_arguments()):
        return
    for name in arguments:
        if name == "model":
            raise ValueError(f"{option}: 'model' is what MODEL says; leave it out")
        if name not in known:
            likely = difflib.get_close_matches(name, known, 1, 0.75)
            todo = f"is {likely[0]!r} meant?" if likely else "correct it, or leave it out"
            raise ValueError(f"{option}: {told(name)} is no argument of vllm.LLM; {todo}")


def _engine_arguments() -> set[str]:
    """Empty where vLLM is not found."""
    found = find_spec("vllm")
    folder = Path(found.origin or "").parent if found else Path()
    names: set[str] = set()
    for place, owner in (("engine/arg_utils.py", "EngineArgs"), ("entrypoints/llm.py", "LLM")):
        file = folder / place
        if not found or not file.is_file():
            return set()
        classes = [node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
        for statement in (one for node in classes if node.name == owner for one in node.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                names.add(statement.target.id)
            if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
                names |= {one.arg for one in (*statement.args.args[1:], *statement.args.kwonlyargs)}
    return names
