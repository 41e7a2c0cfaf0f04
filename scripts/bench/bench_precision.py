"""How far is bf16 serving from fp32? vLLM's own class, this package, and this package with fp32 logits.

    python scripts/bench/bench_precision.py

Every arm serves the demo checkpoint's held-out conversations in a process of its own and is compared with the plain
reference in fp32, position by position. Writes docs/precision.json.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bench_files import ROOT
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_bailing import DEMO
from vllm_bailing.bench import shapes
from vllm_bailing.config import read_config
from vllm_bailing.plugin.supported_versions import USE_INTREE
from vllm_bailing.tools import verify
from vllm_bailing.tools.verify_deployment import Prompt, Served, ask_offline

HELD_OUT = ROOT / "tests" / "data" / "demo_heldout.jsonl"
ENGINE = {"enforce_eager": True, "max_model_len": 1024, "dtype": "bfloat16"}
ARMS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "in-tree": ({USE_INTREE: "1"}, {}),
    "plugin": ({}, {}),
    # vLLM's own setting, with either class
    "plugin, fp32 logits": ({}, {"hf_overrides": {"head_dtype": "float32"}}),
}


def conversations(step: int) -> list[list[int]]:
    """Prompts of every `step`-th held-out conversation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    prompts = []
    for line in HELD_OUT.read_text(encoding="utf-8").splitlines()[::step]:
        row = json.loads(line)
        options = {"tools": row["tools"]} if row.get("tools") else {}
        text = tokenizer.apply_chat_template(
            row["messages"],
            tokenize=False,
            add_generation_prompt=True,
            thinking_option="on" if row.get("thinking") else "off",
            **options,
        )
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    return prompts


def served(model: str, env: dict[str, str], options: dict[str, Any], prompts: list[list[int]]) -> list[Served]:
    """What an engine in this process says."""
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", **env})
    os.dup2(2, 1)
    return ask_offline(model, {**ENGINE, **options}, [Prompt(ids, 32) for ids in prompts])[0]


def ratio(rows: list[verify.Comparison], base: list[verify.Comparison]) -> list[float]:
    """(Median, 2.5 % and 97.5 %) of the ratio of mean divergences, by drawing conversations anew."""
    mine, other = (np.array([one.divergence * one.tokens for one in arm]) for arm in (rows, base))
    draws = np.random.default_rng(0).integers(0, len(mine), (5000, len(mine)))
    ratios = mine[draws].sum(1) / other[draws].sum(1)
    return [float(value) for value in np.percentile(ratios, [50, 2.5, 97.5])]


def main(
    step: Annotated[int, typer.Option(help="Every so many of 420 conversations.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="File to write.")] = ROOT / "docs" / "precision.json",
) -> None:
    """Measure and print the table."""
    prompts, config = conversations(step), read_config(DEMO)
    found: dict[str, list[verify.Comparison]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = shapes.without_mtp(str(DEMO), Path(folder) / "demo")  # vLLM's class refuses an MTP layer
        for arm, (env, options) in track(ARMS.items(), description="arms", console=Console(stderr=True)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                told = pool.submit(served, plain, env, options, prompts).result()
            found[arm] = verify.compared(DEMO, config, told, Path(folder) / arm)
    table = Table("arm", "KL, nats", "of in-tree's (95 %)", "mean |Δ|", "same top-1")
    report: dict[str, Any] = {"conversations": len(prompts), "arms": {}}
    for arm, rows in found.items():
        total, share = verify.overall(rows), ratio(rows, found["in-tree"])
        report["arms"][arm] = {**asdict(total), "kl_over_in_tree": share}
        table.add_row(
            arm,
            f"{total.divergence:.2e}",
            f"{share[0]:.2f} ({share[1]:.2f}-{share[2]:.2f})",
            f"{total.mean:.4f}",
            f"{100 * total.agreement:.2f} %",
        )
    Console(width=100).print(table)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
