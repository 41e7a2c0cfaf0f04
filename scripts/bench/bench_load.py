"""Time to load a checkpoint, this package against vLLM's own model class, in fresh processes that take turns.

    python scripts/bench/bench_load.py                  a random model of 8 MoE layers with 256 experts each
    python scripts/bench/bench_load.py MODEL --rounds 5

Measured inside the engine's process: reading and placing the weights, and what vLLM does to them for its kernels after
that. The files are in the page cache, since each round reads them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from bench_files import random_checkpoint
from rich.progress import track

from vllm_bailing.bench.runner import turns
from vllm_bailing.plugin.supported_versions import USE_INTREE

ARMS = {"vLLM's own": {USE_INTREE: "1"}, "vllm-bailing": {USE_INTREE: "0"}}
# Many small tensors, which cost more time than their bytes.
CONFIG: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "moe_intermediate_size": 64,
    "max_position_embeddings": 1024,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WORKER = "--measure"


def measure(model: str, out: str) -> None:
    """Load `model` in this process and write the seconds of each part to `out`."""
    import vllm.model_executor.model_loader.base_loader as base_loader
    from vllm import LLM
    from vllm.model_executor.model_loader import default_loader

    seconds = {}

    def timed(owner: Any, name: str, key: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[key] = time.perf_counter() - start

        setattr(owner, name, wrapper)

    timed(default_loader.DefaultModelLoader, "load_weights", "load")
    timed(base_loader, "process_weights_after_loading", "process")
    LLM(model, enforce_eager=True, max_model_len=256, dtype="bfloat16", skip_tokenizer_init=True)
    Path(out).write_text(json.dumps(seconds))
    os._exit(0)


def main(
    model: Annotated[str | None, typer.Argument(help="A checkpoint; a random one if left out.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Compare both classes, alternating."""
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            model = str(Path(folder) / "model")
            random_checkpoint(Path(model), CONFIG)
        out = Path(folder) / "seconds.json"
        seconds: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
        for arm in track(turns(ARMS, rounds), description="engines"):
            env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **ARMS[arm]}
            command = [sys.executable, __file__, WORKER, model, str(out)]
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"bench_load: {arm} failed:\n{done.stderr[-2000:]}")
            seconds[arm].append(json.loads(out.read_text()))
    base, ours = ([sum(parts.values()) for parts in rounds_of_arm] for rounds_of_arm in seconds.values())
    for arm, rounds_of_arm in seconds.items():
        load, process = ([parts[key] for parts in rounds_of_arm] for key in ("load", "process"))
        print(
            f"{arm:<14} load {statistics.median(load):.2f} s ({min(load):.2f}-{max(load):.2f}), "
            f"after it {statistics.median(process):.2f} s ({min(process):.2f}-{max(process):.2f})"
        )
    ratios = [mine / other for mine, other in zip(ours, base, strict=True)]
    print(f"vllm-bailing / vLLM's own: {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        measure(*sys.argv[2:])
    typer.run(main)
