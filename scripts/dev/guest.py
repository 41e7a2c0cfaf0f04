"""What the plugin changes and costs in processes of vLLM that serve other models: a table, without and with it.

    .venv/bin/python scripts/dev/guest.py

The processes are the ones that load plugins: one that has the engine's modules already, as a server has, and one that
has nothing yet, as `vllm --help`. Milliseconds are of the processor; they mean something on a quiet machine alone.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Annotated, Any

import typer

PROGRAM = """
import json, os, resource, sys, time
{imports}
from vllm.plugins import load_general_plugins
def memory():
    import psutil
    return psutil.Process().memory_full_info().uss
before, modules, begun = memory(), set(sys.modules), time.process_time()
load_general_plugins()
ms, new = 1000 * (time.process_time() - begun), set(sys.modules) - modules
cost = {{"ms": ms, "MB": (memory() - before) / 1e6, "modules": len(new)}}
from vllm import ModelRegistry
from transformers import CONFIG_MAPPING
cost["architectures"] = {{name: repr(vars(model)) for name, model in ModelRegistry.models.items()}}
cost["model types"] = {{name: str(CONFIG_MAPPING._mapping.get(name)) for name in CONFIG_MAPPING.keys()}}
print(json.dumps(cost))
"""
PROCESSES = {
    "with the modules of a server": "import vllm.entrypoints.openai.api_server, vllm.engine.arg_utils, psutil",
    "with nothing of vLLM": "import psutil",
}


def observed(imports: str, plugins: str | None) -> dict[str, Any]:
    env = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    env |= {} if plugins is None else {"VLLM_PLUGINS": plugins}
    program = PROGRAM.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def differing(without: dict[str, str], with_it: dict[str, str]) -> str:
    other = sorted(name for name in without.keys() | with_it.keys() if without.get(name) != with_it.get(name))
    return f"{len(without)} and {len(with_it)}, of which differ: {', '.join(other) or 'none'}"


def main(rounds: Annotated[int, typer.Option(min=1)] = 3) -> None:
    print("| process | plugins | ms of the processor | MB | modules imported |\n|---|---|---|---|---|")
    last: dict[str, dict[str, Any]] = {}
    for process, imports in PROCESSES.items():
        for plugins, name in (("", "none"), (None, "this one")):
            runs = [observed(imports, plugins) for _ in range(rounds)]
            last[name] = runs[-1]
            cells = [f"{statistics.median(run[key] for run in runs):.1f}" for key in ("ms", "MB", "modules")]
            print(f"| {process} | {name} | {' | '.join(cells)} |", flush=True)
    for key in ("architectures", "model types"):
        print(f"{key}: {differing(last['none'][key], last['this one'][key])}")


if __name__ == "__main__":
    typer.run(main)
