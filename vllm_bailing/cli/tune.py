"""`vllm-bailing tune`: tile sizes of vLLM's fused experts for this GPU."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_bailing.cli import options, output

if TYPE_CHECKING:
    from vllm_bailing.tuning.plan import TuningPlan
    from vllm_bailing.tuning.search import Row


def tune(
    model: Annotated[str, typer.Argument(help="A hub name, a folder or a config.json; no weights are read.")],
    tensor_parallel_size: Annotated[int, options.TENSOR_PARALLEL_SIZE] = 1,
    enable_expert_parallel: Annotated[bool, options.enable_expert_parallel()] = False,
    dtype: Annotated[
        str | None, options.dtype("bf16, or fp8 in blocks of 128 x 128; the checkpoint's if left out.", "bf16", "fp8")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("tables"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Tune again what is there already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be tuned.")] = False,
    device_name: Annotated[
        str | None, typer.Option(help="With --dry-run: a GPU that need not be here, such as NVIDIA_H20.")
    ] = None,
    moe_backend: Annotated[str, typer.Option(help="As you will give it to `vllm serve`.")] = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Make the table of tile sizes of a model for this GPU.

    vLLM's fused experts read it, and have none for most models. Nothing else should run on the GPU. An interrupted run
    continues where it stopped. Exit code 1: it failed; 2: it could not start.
    """
    from vllm_bailing.config import read_config
    from vllm_bailing.errors import TuneError
    from vllm_bailing.tools.shell import servable
    from vllm_bailing.tuning import gpu_timer, search, space
    from vllm_bailing.tuning.plan import make_tuning_plan
    from vllm_bailing.units import short_dtype

    if device_name and not dry_run:
        raise typer.BadParameter("--device-name is for --dry-run; a table is made on the GPU that it is for")
    with output.output_aside():
        try:
            experts = space.experts_of(
                read_config(model), tensor_parallel_size, dtype and short_dtype(dtype), enable_expert_parallel
            )
            if not device_name and (reason := gpu_timer.missing()):
                raise output.fail("tune", reason, 2)
            plan = make_tuning_plan(experts, out, device_name, moe_backend)
        except ValueError as error:
            raise output.fail("tune", error, 2) from None
    if dry_run:
        show_tuning_plan(plan, as_json)
        return
    if plan.is_there and not overwrite:
        raise output.fail("tune", f"{plan.file} is there; use it, or add --overwrite to make it again", 2)
    with redirect_stdout(sys.stderr):
        show_tuning_plan(plan, as_json=False)
    try:
        rows, written = _run(plan, model, tensor_parallel_size)
    except KeyboardInterrupt:
        left = search.notes_file(plan.file)
        reason = f"stopped; what was measured is in {left}, and the same command goes on from there"
        raise output.fail("tune", reason, 130) from None
    except TuneError as error:
        raise output.fail("tune", error, 1) from None
    serve = f"VLLM_TUNED_CONFIG_FOLDER={shlex.quote(str(out))} vllm serve {shlex.quote(servable(model))}"
    if tensor_parallel_size > 1:
        serve += f" --tensor-parallel-size {tensor_parallel_size}"
    if enable_expert_parallel:
        serve += " --enable-expert-parallel"
    if moe_backend != "auto":
        serve += f" --moe-backend {shlex.quote(moe_backend)}"
    if as_json:
        files = [str(file) for file in written]
        typer.echo(json.dumps({"files": files, "serve": serve, "tokens": [asdict(row) for row in rows]}))
    else:
        show_table(rows, written, serve)


def _run(plan: TuningPlan, model: str, tp_size: int) -> tuple[list[Row], list[Path]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vllm_bailing.tuning.plan import run
    from vllm_bailing.tuning.search import steps as all_steps

    console = output.console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        output.output_aside(),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("weights", total=all_steps(plan.space))
        reached = 0

        def advance(tokens: int, steps: int) -> None:
            nonlocal reached
            progress.update(task, advance=steps, description=f"{tokens} tokens")
            if tokens != reached and not console.is_terminal:
                console.print(f"{tokens} tokens, after {progress.tasks[0].percentage:.0f} %")
            reached = tokens

        return run(plan, model, tp_size, advance)


def show_tuning_plan(plan: TuningPlan, as_json: bool) -> None:
    """What would be tuned, for people or as JSON."""
    counts = {str(tokens): len(configs) for tokens, configs in plan.space.items()}
    experts = plan.experts
    if as_json:
        facts: dict[str, Any] = {
            "file": str(plan.file),
            "exists": plan.is_there,
            "moe_backend": plan.backend,
            "in_vllm": plan.replaced and str(plan.replaced),
            "experts": asdict(experts),
            "candidates": counts,
            "estimated_seconds": round(plan.seconds),
        }
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"{plan.file} ({'exists' if plan.is_there else 'does not exist yet'})")
    typer.echo(f"vLLM's own: {plan.replaced or 'none, so it would use its defaults'}")
    typer.echo(
        f"{experts.global_num_experts} experts in {experts.dtype}, {experts.top_k} per token; on each rank "
        f"w1 {list(experts.w1_shape)}, w2 {list(experts.w2_shape)}, {output.gib(experts.weight_bytes)} GiB per layer"
    )
    typer.echo(
        f"vLLM chooses {plan.backend} experts, which read it"
        if plan.backend
        else "Whether vLLM chooses Triton's experts, which alone read it, only its CUDA build can tell, for GPUs that "
        "`vllm-bailing plan` knows"
    )
    typer.echo("candidates by tokens: " + ", ".join(f"{tokens}: {count}" for tokens, count in counts.items()))
    typer.echo(f"about {plan.seconds / 60:.0f} minutes")


def show_table(rows: list[Row], written: list[Path], serve: str) -> None:
    """The entries of a table, where it is, and how to use it."""
    table = output.table("tokens", "default ms", "best ms", "ratio", justify="right")
    table.add_column("entry", no_wrap=True)
    for row in rows:
        entry = "x".join(str(value) for value in list(row.config.values())[:3]) if row.is_kept else "as before"
        times = (f"{row.default_ms:.4f}", f"{row.best_ms:.4f}", f"{row.ratio:.2f}")
        table.add_row(str(row.tokens), *times, entry, style="" if row.is_kept else "dim")
    console = output.console()
    console.print(table)
    kept, failed = sum(row.is_kept for row in rows), sum(row.failed for row in rows)
    console.print(
        f"{kept} of {len(rows)} entries are faster than what vLLM does without the table; "
        f"{sum(row.tried for row in rows)} candidates timed, of which {failed} could not run"
    )
    console.print(f"written to {' and '.join(map(str, written))}")
    console.print(f"\n{serve}", soft_wrap=True)
    console.print("vLLM's log names the table.")
