"""How far are right deployments from the reference? Makes the limits of `vllm-bailing verify`.

    python scripts/bench/bench_verify.py --right 16
    python scripts/bench/bench_verify.py --faults --words 4096    what of planted faults is above the limits

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
from collections.abc import Callable
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

Fault = Callable[[Any], object]  # changes the plain model
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


def scaled(name: str, factor: float) -> Fault:
    """A parameter is so many times as large."""
    return lambda model: model.get_parameter(name).data.mul_(factor)


def swapped(name: str, one: int, other: int) -> Fault:
    """Two rows of a parameter stand in each other's place."""

    def plant(model: Any) -> None:
        rows = model.get_parameter(name).data
        rows[[one, other]] = rows[[other, one]]

    return plant


def configured(**keys: Any) -> Fault:
    """Keys of the configuration have other values."""
    return lambda model: model.config.update(keys)


def with_eps(eps: float) -> Fault:
    """All norms add it to the mean of squares."""

    def plant(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = eps

    return plant


def rounded_bias(model: Any) -> None:
    """The expert bias is kept in bf16."""
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.copy_(buffer.bfloat16().float())


FAULTS: dict[str, Fault] = {
    "none": lambda model: None,
    "routed scaling 2.4": configured(routed_scaling_factor=2.4),
    "final norm + 1 %": scaled("model.norm.weight", 1.01),
    "norm before attention 2 + 1 %": scaled("model.layers.2.input_layernorm.weight", 1.01),
    "norm before MLP 2 + 1 %": scaled("model.layers.2.post_attention_layernorm.weight", 1.01),
    "one expert + 5 %": scaled("model.layers.2.mlp.experts.5.down_proj.weight", 1.05),
    "rms_norm_eps 1e-5": with_eps(1e-5),
    "expert bias in bf16": rounded_bias,
    "rope theta 110": lambda model: model.config.rope_parameters.update(rope_theta=110),
    "3 of 4 experts": configured(num_experts_per_tok=3),
    "topk_group 4": configured(topk_group=4),
    "rows of the embedding swapped": swapped("model.word_embeddings.weight", 700, 800),
    "rows of the head swapped": swapped("lm_head.weight", 700, 800),
}


def prompts(seed: int, words: int = WORDS) -> list[Prompt]:
    """Those of `verify` for seed 0; else six held-out messages, and words in another order."""
    texts = list(verify.DEFAULT_PROMPTS)
    if seed:
        rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
        drawn = np.random.default_rng(seed).choice(len(rows), 6, replace=False)
        texts = [str(rows[one]["messages"][-1]["content"]) for one in drawn]
    return prompts_of(DEMO, texts, 32, words, read_config(DEMO).vocab_size, seed)


def ask(dtype: str, options: dict[str, Any], seeds: range, file: Path) -> None:
    """Append to `file` what an engine in this process answers to each set of prompts."""
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"})
    os.dup2(2, 1)
    llm = engine(str(DEMO), {**ENGINE, "dtype": dtype, **options})
    for seed in seeds:
        with file.open("ab") as stream:
            pickle.dump(ask_engine(llm, prompts(seed)), stream)


def plain_model(dtype: str) -> Any:
    """The demo as the plain model."""
    import torch

    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    return BailingMoeV2ForCausalLM.from_pretrained(DEMO, dtype=getattr(torch, dtype))


def answers_of(model: Any, asked: list[Prompt]) -> list[Served]:
    """What the plain model answers."""
    import torch

    with torch.no_grad():
        return [_answer(model, prompt) for prompt in asked]


def ask_plain(dtype: str, seeds: range, file: Path) -> None:
    """As `ask`, of the plain model in `dtype`."""
    model = plain_model(dtype)
    for seed in seeds:
        with file.open("ab") as stream:
            pickle.dump(answers_of(model, prompts(seed)), stream)


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


def show_faults(dtype: str, words: int) -> None:
    """Plant every fault in the plain model, and print what is above its limit."""
    table = Table("fault", "significance", "above their limits", "it looks like")
    for fault, plant in FAULTS.items():
        model = plain_model(dtype)
        plant(model)
        with tempfile.TemporaryDirectory() as work:
            report = verify.judged(DEMO, read_config(DEMO), answers_of(model, prompts(0, words)), dtype, Path(work))
        found = report["measures"]
        above = ", ".join(
            f"{name} {value:.3g} > {limit:.3g}" for name, (value, limit) in found.items() if value > limit
        )
        table.add_row(fault, f"{found['significance'][0]:.3g}", above, report["looks_like"])
    Console(width=130).print(table)


def main(
    right: Annotated[int, typer.Option(help="Sets of prompts for each arm.", min=2)] = 16,
    work: Annotated[Path | None, typer.Option(help="Folder for what the engines answer.")] = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = RIGHT,
    faults: Annotated[bool, typer.Option("--faults", help="Plant faults in the plain model instead.")] = False,
    words: Annotated[int, typer.Option(help="For --faults.")] = WORDS,
    dtype: Annotated[str, typer.Option(help="For --faults.")] = "bfloat16",
) -> None:
    """Measure, write the file and print a table."""
    if faults:
        show_faults(dtype, words)
        return
    config, measured = read_config(DEMO), dict[str, dict[str, list[float]]]()
    table = Table("arm", "sets", "measure", "mean", "largest")
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch) / "answers"
        folder.mkdir(parents=True, exist_ok=True)
        for arm, (kind, options) in ARMS.items():
            file = folder / f"{arm.replace(', ', '-').replace(' ', '_')}.pkl"
            missing = range(len(kept(file)), right)
            if missing:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    # An engine has options, the plain model none.
                    job: Any = ask_plain if options is None else functools.partial(ask, options=options)
                    pool.submit(job, kind, seeds=missing, file=file).result()
            found: dict[str, list[float]] = {}
            for number, served in enumerate(kept(file)[:right]):
                report = verify.judged(DEMO, config, served, kind, Path(scratch) / f"{arm}-{number}")
                for measure, (value, _) in report["measures"].items():
                    found.setdefault(measure, []).append(float(f"{value:.4g}"))
            for measure, values in found.items():
                measured.setdefault(kind, {}).setdefault(measure, []).extend(values)
                table.add_row(arm, str(len(values)), measure, f"{np.mean(values):.3g}", f"{max(values):.3g}")
    out.write_text(json.dumps({"right": measured}, indent=1) + "\n", encoding="utf-8")
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
