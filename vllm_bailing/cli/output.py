"""How results look in a terminal: 80 columns, no colours where none are wanted."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def show_check(console: Any, check: Any) -> None:
    """A line, and another with what to do."""
    mark, style = {True: ("ok", "green"), False: ("no", "bold red"), None: ("--", "dim")}[check.ok]
    line = Text.assemble((f"{mark}  ", style), (f"{check.name:<19}", "bold"), check.detail)
    console.print(line, soft_wrap=not console.is_terminal)
    if check.fix and check.ok is not True:
        console.print(Text.assemble("    ", ("to do: ", style), check.fix), soft_wrap=not console.is_terminal)


def show_plan(found: Any) -> None:
    """A `planning.plan.Plan` with its command."""
    console = Console(highlight=False)
    layout = f"TP {found.tp}" + (f", {found.pp} pipeline stages" if found.pp > 1 else "")
    console.print(
        f"[bold]{found.model}[/bold] in {found.dtype} on {found.gpus} x {found.gpu.name} ({layout})", soft_wrap=True
    )
    table = Table("GiB per GPU", "", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.columns[1].justify = "right"
    for part, name in ((found.weights, "weights"), (found.other, "other, estimated")):
        for key, value in asdict(part).items():
            if value:
                table.add_row(f"  {key.replace('_', ' ')}", f"{value / 2**30:.2f}", style="dim")
        table.add_row(name, f"{part.total / 2**30:.2f}")
    table.add_row("left for the KV cache", f"{found.kv_room_bytes / 2**30:.2f}", style="bold")
    console.print(table)
    colour = {"fits": "green", "tight": "yellow", "no": "red"}[found.verdict]
    console.print(
        f"KV cache: {found.kv_bytes_per_token / 1024:g} KiB per token and GPU, room for {found.kv_tokens} tokens"
    )
    console.print(
        f"[{colour}]{found.verdict}[/{colour}]: {found.concurrency} requests of {found.context} tokens", end=""
    )
    console.print(f" ({found.reason})" if found.reason else "", soft_wrap=True)
    if found.verdict != "no":
        console.print(
            f"at most {found.largest_context} tokens each at {found.concurrency} requests, "
            f"or {found.largest_concurrency} requests of {found.context} tokens"
        )
        for bound in (found.single, found.batch):
            console.print(
                f"bound at batch {bound.batch}: {bound.tokens_per_s:.0f} tokens/s "
                f"({bound.step_bytes / 1e9:.1f} GB per step and GPU, limited by {bound.limit})"
            )
    for note in found.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if found.verdict != "no":
        console.print(f"\n{found.serve_line()}", soft_wrap=True, markup=False)


def show_verified(report: dict[str, Any]) -> None:
    """The report of `vllm-bailing verify`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for heading in ("prompt", "tokens", "mean |Δ|", "max |Δ|", "KL", "same top-1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for title, row in [*((str(n), row) for n, row in enumerate(report["prompts"], 1)), ("all", report["overall"])]:
        table.add_row(
            title,
            str(row["tokens"]),
            *(f"{row[key]:.2g}" for key in ("mean", "max", "divergence")),
            f"{100 * row['agreement']:.1f} %",
            style="bold" if title == "all" else "",
        )
    console = Console(highlight=False)
    console.print(table)
    limits = report["tolerance"]
    console.print(
        f"Δ: served minus reference log-probability, in nats. Limits for {report['dtype']}: "
        f"mean |Δ| {limits['mean']:g}, mean KL {limits['divergence']:g}."
    )
    if report["computes"]:
        console.print(f"[green]{report['deployment']} computes {report['checkpoint']}[/green]", soft_wrap=True)
    else:
        console.print(
            f"[red]{report['deployment']} does not compute {report['checkpoint']}[/red]: {report['reason']}",
            soft_wrap=True,
        )


def show_mtp(rows: list[dict[str, Any]], told: dict[int, str]) -> None:
    """Rows and advice of `bench.summarize` and `bench.advice`."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)  # fits into 80 columns
    for heading in ("batch", "draft", "tokens/s", "times none", "step", "accepted"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        speed, ratio = row["tokens_per_second"], row["ratio"]
        table.add_row(
            str(row["batch_size"]),
            row["arm"],
            f"{speed['median']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})",
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if row["arm"] != "0" else "1",
            f"{row['acceptance_length']:.2f}",
            " ".join(f"{100 * share:.0f}%" for share in row["acceptance"]),
        )
    console = Console()
    console.print(table)
    console.print("step: tokens that one step of the model yields; accepted: drafts, by position", highlight=False)
    # Rounding depends on how many tokens are computed at once, so answers in bf16 may part where two tokens are close.
    differ = ", ".join(f"{row['arm']} at batch {row['batch_size']}" for row in rows if not row["same_answers"])
    console.print(
        f"answers differ with draft tokens {differ}" if differ else "all answers are the same", highlight=False
    )
    for size, words in told.items():
        console.print(f"batch {size}: {words}", highlight=False)


def show_comparison(report: dict[str, Any]) -> None:
    """The report of `compare.run`."""
    from vllm_bailing.bench import statistics

    def short(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)  # fits into 80 columns
    for heading in ("figure of in-tree", "median (range)", "ratio (95 %)", "verdict"):
        table.add_column(heading, no_wrap=True)
    styles = {"faster": "green", "less": "green", "slower": "red", "more": "red"}
    for row in report["rows"]:
        low, high = row["interval"]
        is_base = row["arm"] == statistics.IN_TREE
        noise = f"noise {100 * (row['noise'] - 1):.1f} %"
        table.add_row(
            f"[bold]{row['figure']}, {row['unit']}[/]" if is_base else f"  {escape(row['arm'])}",
            f"{short(row['median'])} ({short(row['low'])}-{short(row['high'])})",
            "1" if is_base else f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})",
            noise if row["arm"] == statistics.AGAIN else row["verdict"],
            style=None if is_base else styles.get(row["verdict"], "dim"),
        )
    console = Console()
    console.print(table)
    console.print(statistics.EXPLANATION, highlight=False)
    for figure, shares in report["roofline"].get("shares", {}).items():
        told = ", ".join(f"{arm} {100 * share:.0f} %" for arm, share in shares.items())
        console.print(f"share of the roofline, {figure}: {told}", highlight=False)
    for arm, facts in report["arms"].items():
        console.print(f"{arm}: {facts['model']}", highlight=False)
    shared = report["arms"][statistics.IN_TREE]
    told = ", ".join(f"{key} {shared[key]}" for key in ("experts", "attention", "dtype", "compilation", "graphs"))
    fusions = ", ".join(shared["fusions"]) or "none"
    console.print(f"{told}, fusions {fusions}, on {shared['device']}", highlight=False)
    for note in report["notes"]:
        console.print(note, highlight=False)


def show_tuning_plan(plan: Any, as_json: bool) -> None:
    """A `tune.Plan`, for people or as JSON."""
    counts = {str(tokens): len(configs) for tokens, configs in plan.space.items()}
    if as_json:
        found = {"file": str(plan.file), "exists": plan.is_there, "in_vllm": plan.replaced and str(plan.replaced)}
        found |= {"experts": asdict(plan.experts), "candidates": counts, "estimated_seconds": round(plan.seconds)}
        typer.echo(json.dumps(found))
        return
    experts = plan.experts
    typer.echo(f"{plan.file} ({'exists' if plan.is_there else 'does not exist yet'})")
    typer.echo(f"vLLM's own: {plan.replaced or 'none, so it would use its defaults'}")
    typer.echo(
        f"{experts.num_experts} experts in {experts.dtype}, {experts.top_k} per token; on each rank "
        f"w1 {list(experts.w1_shape)}, w2 {list(experts.w2_shape)}, {experts.weight_bytes / 2**30:.2f} GiB per layer"
    )
    typer.echo("candidates by tokens: " + ", ".join(f"{tokens}: {count}" for tokens, count in counts.items()))
    typer.echo(f"about {plan.seconds / 60:.0f} minutes")


def show_tuned(rows: list[Any], written: list[Path], serve: str) -> None:
    """What `tune.run` found, where it is, and how to use it."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for heading in ("tokens", "default ms", "best ms", "ratio", "entry"):
        table.add_column(heading, justify="left" if heading == "entry" else "right", no_wrap=True)
    for row in rows:
        entry = "x".join(str(value) for value in list(row.config.values())[:3]) if row.is_kept else "as before"
        table.add_row(
            str(row.tokens),
            f"{row.default_ms:.4f}",
            f"{row.best_ms:.4f}",
            f"{row.ratio:.2f}",
            entry,
            style="" if row.is_kept else "dim",
        )
    console = Console(highlight=False)
    console.print(table)
    kept, failed = sum(row.is_kept for row in rows), sum(row.failed for row in rows)
    console.print(
        f"{kept} of {len(rows)} entries are faster than what vLLM does without the table; "
        f"{sum(row.tried for row in rows)} candidates timed, of which {failed} could not run",
        soft_wrap=True,
    )
    console.print(f"written to {' and '.join(map(str, written))}", soft_wrap=True)
    console.print(f"\n{serve}", soft_wrap=True, markup=False)
    console.print("vLLM's log names the table. Where it does not, it chose other experts than Triton's; on GPUs newer")
    console.print("than Hopper it does so by itself, and --moe-backend triton changes that.")
