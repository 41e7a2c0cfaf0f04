"""`vllm-bailing plan`: memory, speed and settings of a deployment on paper."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_bailing.cli import options, output

if TYPE_CHECKING:
    from vllm_bailing.planning.plan import Plan


def plan(
    model: Annotated[str, typer.Argument(help="A hub name, a folder or a config.json.")],
    gpu: Annotated[str, typer.Option(help="Such as H100; any other with --memory-gib and --bandwidth.")],
    gpus: Annotated[int, typer.Option(help="How many, over all nodes.")] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens of a request; the model's window if left out.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    dtype: Annotated[
        str | None, options.dtype("bf16, fp16, fp32, fp8, int8 or int4; the checkpoint's if left out.")
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help="auto or fp8.")] = "auto",
    draft_tokens: options.DraftTokens = 0,
    draft_model: options.DraftModel = None,
    max_loras: Annotated[
        int | None, typer.Option("--max-loras", min=1, help="LoRA adapters in one batch; none without these flags.")
    ] = None,
    max_lora_rank: Annotated[
        int | None, typer.Option("--max-lora-rank", help="Highest rank of an adapter; 16 if left out.")
    ] = None,
    lora_target_modules: Annotated[
        str | None,
        typer.Option("--lora-target-modules", help="What adapters change, in quotes; all but experts if left out."),
    ] = None,
    tensor_parallel_size: Annotated[int | None, options.TENSOR_PARALLEL_SIZE] = None,
    pipeline_parallel_size: Annotated[
        int | None,
        typer.Option("--pipeline-parallel-size", "--pp", "-pp", min=1, help="Pipeline stages, as for vLLM."),
    ] = None,
    memory_gib: Annotated[float | None, typer.Option(help="Memory of a GPU that is not known.")] = None,
    bandwidth: options.Bandwidth = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of a GPU that vLLM may use.")] = 0.92,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Write a file for `vllm serve --config`.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Will it fit, how much context and how many requests, and with which command?

    Works from the configuration alone; sizes of parallelism are chosen if they are left out. Memory beside weights and
    KV cache is an estimate; the speeds are bounds that no deployment can pass, not promises. Exit code 1 if it does not
    fit.
    """
    from vllm_bailing.config import read_config
    from vllm_bailing.planning.gpus import find_gpu
    from vllm_bailing.planning.plan import Request, make_plan
    from vllm_bailing.units import short_dtype

    try:
        config = read_config(model)
        wants_adapters = not (max_loras is None and max_lora_rank is None and lora_target_modules is None)
        request = Request(
            find_gpu(gpu, memory_gib, bandwidth),
            gpus,
            config.max_position_embeddings if context is None else context,
            concurrency,
            dtype=dtype and short_dtype(dtype),
            kv_dtype=kv_dtype,
            draft_tokens=draft_tokens,
            tp=tensor_parallel_size,
            pp=pipeline_parallel_size,
            memory_utilization=gpu_memory_utilization,
            model=model,
            draft_model=draft_model,
            max_loras=(1 if max_loras is None else max_loras) if wants_adapters else 0,
            max_lora_rank=Request.max_lora_rank if max_lora_rank is None else max_lora_rank,
            lora_target_modules=Request.lora_target_modules
            if lora_target_modules is None
            else tuple(lora_target_modules.replace(",", " ").split()),
        )
        deployment = make_plan(config, request)
    except ValueError as error:
        raise output.fail("plan", error, 2) from None
    is_possible = deployment.verdict != "no"
    if config_file and is_possible:
        try:
            config_file.write_text(deployment.yaml(), encoding="utf-8")
        except OSError as error:
            raise output.fail("plan", f"--config {config_file}: {error.strerror}; name another file", 2) from None
    if as_json:
        typer.echo(json.dumps({**asdict(deployment), "serve": deployment.serve_line()}))
    else:
        show_plan(deployment)
        if config_file and is_possible:
            output.show_files([config_file])
    raise typer.Exit(0 if is_possible else 1)


def show_plan(plan: Plan) -> None:
    """A plan with its command."""
    console = output.console()
    layout = f"TP {plan.tp}" + (f", {plan.pp} pipeline stages" if plan.pp > 1 else "")
    console.print(
        f"[bold]{plan.model}[/bold] in {plan.dtype} on {plan.gpus} x {plan.gpu.name} ({layout})", soft_wrap=True
    )
    table = output.table("GiB per GPU")
    table.add_column("", justify="right")
    for part, name in ((plan.weights, "weights"), (plan.other, "other, estimated")):
        for key, value in asdict(part).items():
            if value:
                table.add_row(f"  {key.replace('_', ' ')}", output.gib(value), style="dim")
        table.add_row(name, output.gib(part.total))
    table.add_row("left for the KV cache", output.gib(plan.kv_room_bytes), style="bold")
    console.print(table)
    color = {"fits": "green", "tight": "yellow", "no": "red"}[plan.verdict]
    console.print(
        f"KV cache: {plan.kv_bytes_per_token / 1024:g} KiB per token and GPU, room for {plan.kv_tokens} tokens"
    )
    console.print(f"[{color}]{plan.verdict}[/{color}]: {plan.concurrency} requests of {plan.context} tokens", end="")
    console.print(f" ({plan.reason})" if plan.reason else "", soft_wrap=True)
    if plan.verdict != "no":
        console.print(
            f"at most {plan.largest_context} tokens each at {plan.concurrency} requests, "
            f"or {plan.largest_concurrency} requests of {plan.context} tokens"
        )
        for bound in (plan.single, plan.batch):
            console.print(
                f"bound at batch {bound.batch}: {bound.tokens_per_s:.0f} tokens/s "
                f"({bound.step_bytes / 1e9:.1f} GB per step and GPU, limited by {bound.limit})"
            )
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if plan.verdict != "no":
        console.print(f"\n{plan.serve_line()}", soft_wrap=True, markup=False)
