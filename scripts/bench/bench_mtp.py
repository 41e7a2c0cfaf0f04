"""Measure what a step with MTP drafts costs, and plot what it gains at an acceptance.

    python scripts/bench/bench_mtp.py

How much speculation gains depends on how often drafts are accepted, and that on the text: the demo checkpoint accepts
nearly every draft, real text 60 to 85 per cent. So this times a random model, large enough for its weights to be what a
step reads, and multiplies the measured steps per second by the tokens that a step yields at an acceptance rate. (On a
GPU `vllm-bailing bench mtp --acceptance` measures that; vLLM's sampler for CPUs cannot accept by chance.) Every engine
runs in a process of its own, in turns. Writes docs/mtp.json and docs/mtp.png.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from vllm_bailing import DEMO  # noqa: E402
from vllm_bailing.bench import mtp, runner  # noqa: E402
from vllm_bailing.cli import collect_info  # noqa: E402
from vllm_bailing.config import BailingMoeV2Config  # noqa: E402
from vllm_bailing.reference import BailingMoeV2ForCausalLM  # noqa: E402

ACCEPTANCES = (0.6, 0.7, 0.8)
CONFIG: dict[str, Any] = {  # the proportions of Ling-mini-2.0, at a fiftieth of its size
    "vocab_size": 32768,
    "hidden_size": 768,
    "intermediate_size": 1920,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_shared_experts": 1,
    "moe_intermediate_size": 192,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 4096,
}


def make_model(folder: Path) -> float:
    """Write a random bf16 checkpoint with the demo's tokenizer; returns its parameters in millions."""
    torch.manual_seed(0)
    model = BailingMoeV2ForCausalLM(BailingMoeV2Config(**CONFIG)).bfloat16()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def tokens_per_step(acceptance: float, draft_tokens: int) -> float:
    """Mean tokens of a step where each draft token is accepted with this chance after those before it."""
    return sum(acceptance**position for position in range(draft_tokens + 1))


def at_acceptance(row: dict[str, Any], acceptance: float) -> dict[str, float]:
    """The speed of `row` as a multiple of no speculation, had its drafts been accepted at this rate."""
    gain = tokens_per_step(acceptance, int(row["arm"])) / row["acceptance_length"]
    return {name: value * gain for name, value in row["ratio"].items()}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per batch size: speed over draft tokens, a line for each acceptance rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(sizes), figsize=(4.5 * len(sizes), 3.4), dpi=100, sharey=True, squeeze=False
    )
    for panel, size in zip(panels[0], sizes, strict=True):
        arms = [row for row in rows if row["batch_size"] == size]
        for acceptance in ACCEPTANCES:
            found = [at_acceptance(row, acceptance) for row in arms]
            x, y = [int(row["arm"]) for row in arms], [one["median"] for one in found]
            spread = [[one["median"] - one["low"] for one in found], [one["high"] - one["median"] for one in found]]
            panel.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=f"{100 * acceptance:.0f} % accepted")
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set(title=f"batch {size}", xlabel="draft tokens per step", ylim=(0, None), xticks=x)
        panel.grid(alpha=0.3)
    panels[0][0].set(ylabel="tokens/s, times no speculation")
    panels[0][0].legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(
    rounds: Annotated[int, typer.Option(help="How often each engine is measured, in turns.", min=1)] = 3,
    max_tokens: Annotated[int, typer.Option(help="Length of every answer.", min=2)] = 64,
    out: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = ROOT / "docs" / "mtp",
) -> None:
    folder = ROOT / "build" / "bench-model"
    parameters = make_model(folder)
    engine = {"max_model_len": 1024, "enforce_eager": True}
    task = mtp.MtpTask(str(folder), engine, [1, 8], list(mtp.DEFAULT_PROMPTS), max_tokens, ignore_eos=True)
    tasks = mtp.mtp_tasks(task, [0, 1, 2, 3])

    rows = mtp.summarize(runner.alternate(tasks, rounds), "0")
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "million_parameters": round(parameters),
        "config": CONFIG,
        "rounds": rounds,
        "max_tokens": max_tokens,
        "versions": collect_info(),
        "rows": rows,
    }
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(rows, out.with_suffix(".png"))
    for row in rows:
        found = [at_acceptance(row, acceptance) for acceptance in ACCEPTANCES]
        gains = "  ".join(
            f"{100 * acceptance:.0f} %: {one['median']:.2f} ({one['low']:.2f}-{one['high']:.2f})"
            for acceptance, one in zip(ACCEPTANCES, found, strict=True)
        )
        steps = row["tokens_per_second"]["median"] / row["acceptance_length"] / row["batch_size"]
        typer.echo(f"batch {row['batch_size']}  {row['arm']} drafts  {steps:5.1f} steps/s  {gains}")


if __name__ == "__main__":
    typer.run(main)
