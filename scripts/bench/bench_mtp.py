"""Measure what a step with MTP drafts costs, and plot what it gains at an acceptance.

    python scripts/bench/bench_mtp.py

How much speculation gains depends on how often drafts are accepted, and that on the text: the demo checkpoint accepts
nearly every draft, real text 60 to 85 per cent. So this times a random model, large enough for its weights to be what a
step reads, and multiplies the measured steps per second by the tokens that a step yields at an acceptance rate. (On a
GPU `vllm-bailing bench mtp --acceptance` measures that; vLLM's sampler for CPUs cannot accept by chance.) Every engine
runs in a process of its own, in turns. Writes docs/mtp.json and docs/mtp.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from bench_files import ROOT, random_checkpoint

from vllm_bailing.bench import mtp, plots, report, runner, shapes
from vllm_bailing.tools.info import collect_info

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


def tokens_per_step(acceptance: float, draft_tokens: int) -> float:
    """Mean tokens of a step where each draft token is accepted with this chance after those before it."""
    return sum(acceptance**position for position in range(draft_tokens + 1))


def at_acceptance(row: dict[str, Any], acceptance: float) -> dict[str, float]:
    """The speed of `row` as a multiple of no speculation, had its drafts been accepted at this rate."""
    gain = tokens_per_step(acceptance, int(row["arm"])) / row["acceptance_length"]
    return {name: value * gain for name, value in row["ratio"].items()}


def plot(measured: report.Report, path: Path) -> None:
    """One panel per batch size: speed over draft tokens, a line for each acceptance rate."""
    sizes = list(dict.fromkeys(row["batch_size"] for row in measured["rows"]))
    size = (4.5 * len(sizes), 3.4)
    with plots.figure_at(path, size, panels=len(sizes), sharey=True) as (figure, panels):
        for panel, batch_size in zip(panels, sizes, strict=True):
            rows = [row for row in measured["rows"] if row["batch_size"] == batch_size]
            x = [int(row["arm"]) for row in rows]
            for place, acceptance in enumerate(ACCEPTANCES):
                speeds = [at_acceptance(row, acceptance) for row in rows]
                medians, lows, highs = ([speed[key] for speed in speeds] for key in ("median", "low", "high"))
                bars, label = plots.error_bars(medians, lows, highs), f"{100 * acceptance:.0f} % accepted"
                beside = [tick + plots.side_by_side(place, len(ACCEPTANCES)) for tick in x]
                panel.errorbar(beside, medians, yerr=bars, marker="o", capsize=3, label=label)
            panel.axhline(1, color="grey", linewidth=0.8)
            panel.set(title=f"batch {batch_size}", xlabel="draft tokens per step", ylim=(0, None), xticks=x)
            panel.grid(alpha=0.3)
        panels[0].set(ylabel="tokens/s, times no speculation")
        panels[0].legend(loc="lower left")
        figure.tight_layout()


def main(
    rounds: Annotated[int, typer.Option(help="How often each engine is measured, in turns.", min=1)] = 3,
    max_tokens: Annotated[int, typer.Option(help="Length of every answer.", min=2)] = 64,
    out: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = ROOT / "docs" / "mtp",
) -> None:
    """Measure the random model with 0 to 3 draft tokens and print what each gains at each acceptance."""
    folder = ROOT / "build" / "bench-model"
    parameters = random_checkpoint(folder, CONFIG)
    shapes.add_tokenizer(folder)
    engine = {"max_model_len": 1024, "enforce_eager": True}
    task = mtp.MtpTask(str(folder), engine, [1, 8], list(mtp.DEFAULT_PROMPTS), max_tokens, ignore_eos=True)
    rows = mtp.summarize(runner.alternate(mtp.mtp_tasks(task, [0, 1, 2, 3]), rounds), mtp.NO_DRAFTS)
    measured = {
        "million_parameters": round(parameters),
        "config": CONFIG,
        "rounds": rounds,
        "max_tokens": max_tokens,
        "versions": collect_info(),
        "rows": rows,
    }
    report.write_report(measured, out, plot)
    for row in rows:
        speeds = [at_acceptance(row, acceptance) for acceptance in ACCEPTANCES]
        gains = "  ".join(
            f"{100 * acceptance:.0f} %: {speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})"
            for acceptance, speed in zip(ACCEPTANCES, speeds, strict=True)
        )
        steps = row["tokens_per_second"]["median"] / row["acceptance_length"] / row["batch_size"]
        typer.echo(f"batch {row['batch_size']}  {row['arm']} drafts  {steps:5.1f} steps/s  {gains}")


if __name__ == "__main__":
    typer.run(main)
