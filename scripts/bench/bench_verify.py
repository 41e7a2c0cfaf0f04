"""How far are right deployments from the reference? Makes the limits of `vllm-bailing verify`.

    python scripts/bench/bench_verify.py --right 16

Every arm serves the demo checkpoint as one engine, or as the plain model in transformers, and is asked so many sets of
prompts: held-out conversations and words in no order. Each set counts as a deployment. Writes
vllm_bailing/assets/verify.json. What the arms answer is kept in --work, from where a run that was cut off goes on.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import pickle
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bench_files import ROOT
from rich.console import Console
from rich.table import Table

from vllm_bailing import DEMO
from vllm_bailing.config import read_config
from vllm_bailing.tools import verify
from vllm_bailing.tools.verify_deployment import TOP, WORDS, Prompt, Served, ask_engine, engine, prompts_of
from vllm_bailing.tools.verify_verdict import RIGHT

HELD_OUT = ROOT / "tests" / "data" / "demo_heldout.jsonl"
ENGINE = {"enforce_eager": True, "max_model_len": 512}
MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
# Name: (dtype, further arguments of vLLM; None for the plain model)
ARMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "bf16": ("bfloat16", {}),
    "bf16, drafts": ("bfloat16", MTP),
    "bf16, chunks of 64": ("bfloat16", {"max_num_batched_tokens": 64, "max_num_seqs": 32}),
    "bf16, 2 ranks": ("bfloat16", {"tensor_parallel_size": 2}),
    "fp16": ("float16", {}),
    "fp32": ("float32", {}),
    "plain bf16": ("bfloat16", None),
    "plain fp16": ("float16", None),
    "plain fp32": ("float32", None),
}


def prompts(seed: int) -> list[Prompt]:
    """Those of `verify` for seed 0; else six held-out messages, and words in another order."""
    texts = list(verify.DEFAULT_PROMPTS)
    if seed:
        rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
        drawn = np.random.default_rng(seed).choice(len(rows), 6, replace=False)
        texts = [str(rows[one]["messages"][-1]["content"]) for one in drawn]
    return prompts_of(DEMO, texts, 32, WORDS, read_config(DEMO).vocab_size, seed)


def ask(dtype: str, options: dict[str, Any], seeds: range, file: Path) -> None:
    """Append to `file` what an engine in this process answers to each set of prompts."""
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"})
    os.dup2(2, 1)
    llm = engine(str(DEMO), {**ENGINE, "dtype": dtype, **options})
    for seed in seeds:
        with file.open("ab") as stream:
            pickle.dump(ask_engine(llm, prompts(seed)), stream)


def ask_plain(dtype: str, seeds: range, file: Path) -> None:
    """As `ask`, of the plain model in `dtype`."""
    import torch

    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    model = BailingMoeV2ForCausalLM.from_pretrained(DEMO, dtype=getattr(torch, dtype))
    for seed in seeds:
        with torch.no_grad():
            answers = [_answer(model, prompt) for prompt in prompts(seed)]
        with file.open("ab") as stream:
            pickle.dump(answers, stream)


def _answer(model: Any, prompt: Prompt) -> Served:
    import torch

    ids = prompt.token_ids
    if prompt.max_tokens > 1:
        given = torch.tensor([ids])
        ids = model.generate(given, max_new_tokens=prompt.max_tokens, do_sample=False, pad_token_id=0)[0].tolist()
    logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    top = [
        {token: float(row[token]) for token in {*row.topk(TOP).indices.tolist(), next_token}}
        for row, next_token in zip(logprobs, ids[1:], strict=True)
    ]
    return Served(ids, top, len(prompt.token_ids))


def kept(file: Path) -> list[list[Served]]:
    """What is in `file`."""
    answers = []
    if file.is_file():
        with file.open("rb") as stream:
            while stream.peek(1):
                answers.append(pickle.load(stream))
    return answers


def main(
    right: Annotated[int, typer.Option(help="Sets of prompts for each arm.", min=2)] = 16,
    work: Annotated[Path | None, typer.Option(help="Folder for what the engines answer.")] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = RIGHT,
) -> None:
    """Measure, write the file and print a table."""
    config, measured = read_config(DEMO), dict[str, dict[str, list[float]]]()
    table = Table("arm", "sets", "measure", "mean", "largest")
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch) / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        for arm, (dtype, options) in ARMS.items():
            file = folder / f"{arm.replace(', ', '-').replace(' ', '_')}.pkl"
            missing = range(len(kept(file)), right)
            if missing:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    # An engine has options, the plain model none.
                    job: Any = ask_plain if options is None else functools.partial(ask, options=options)
                    pool.submit(job, dtype, seeds=missing, file=file).result()
            found: dict[str, list[float]] = {}
            for number, served in enumerate(kept(file)[:right]):
                report = verify.judged(DEMO, config, served, dtype, Path(scratch) / f"{arm}-{number}")
                for measure, (value, _) in report["measures"].items():
                    found.setdefault(measure, []).append(float(f"{value:.4g}"))
            for measure, values in found.items():
                measured.setdefault(dtype, {}).setdefault(measure, []).extend(values)
                table.add_row(arm, str(len(values)), measure, f"{np.mean(values):.3g}", f"{max(values):.3g}")
    out.write_text(json.dumps({"right": measured}, indent=1) + "\n", encoding="utf-8")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
