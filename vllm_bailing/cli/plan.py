"""`vllm-bailing plan`: memory, speed and settings of a deployment on paper."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_bailing.cli import options, output
from vllm_bailing.errors import shown
from vllm_bailing.json_files import write_text

if TYPE_CHECKING:
    from rich.console import Console

    from vllm_bailing.planning.plan import Plan

_NAMED_OTHERWISE = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "dp": "data_parallel_size"}
_NAMED_OTHERWISE["memory_utilization"] = "gpu_memory_utilization"
_FIELDS = ("gpus", "nodes", "goal", "context", "concurrency", "dtype", "kv_dtype", "draft_tokens", "redundant_experts")
_FIELDS += ("max_loras", "max_lora_rank", "lora_target_modules", *_NAMED_OTHERWISE)
_OPTIONS = {name: f"--{_NAMED_OTHERWISE.get(name, name).replace('_', '-')}" for name in _FIELDS}
NEVER_RUN = "on paper: sizes were compared with CPU ranks, nothing was run on GPUs yet"


def _list_gpus(is_given: bool) -> None:
    if not is_given:
        return
    from vllm_bailing.planning.gpus import GPUS
    from vllm_bailing.units import GIB

    typer.echo(f"{'name':15}  {'GiB':>5}  TB/s  as nvidia-smi or rocm-smi has it")
    for gpu in GPUS.values():
        size = f"{gpu.memory_bytes / GIB:5.1f}  {gpu.bandwidth / 1e12:4.2f}"
        typer.echo(f"{gpu.name:15}  {size}  {gpu.driver_names[0]}")
    raise typer.Exit


def _size(*spellings: str, help: str) -> Any:
    return typer.Option(*spellings, min=1, help=help)


def plan(
    model: Annotated[str, typer.Argument(help="A hub name, a folder or a config.json.")],
    gpu: Annotated[
        str,
        typer.Option(
            help="Such as H100, auto or cpu; any other with --memory-gib and --bandwidth.",
            autocompletion=options.known_gpus,
        ),
    ],
    gpus: Annotated[int | None, typer.Option(help="How many in each node; 1, or with auto all, if left out.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes; 1, or for more than 8 --gpus nodes of 8.")] = None,
    goal: Annotated[
        str,
        typer.Option(
            help="throughput or latency; what sizes are chosen for.",
            autocompletion=options.one_of("throughput", "latency"),
        ),
    ] = "throughput",
    context: Annotated[int | None, typer.Option(help="Tokens of a request; the model's window if left out.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    dtype: Annotated[
        str | None,
        options.dtype(
            "bf16, fp16, fp32, fp8, int8 or int4; the checkpoint's if left out.",
            *("bf16", "fp16", "fp32", "fp8", "int8", "int4"),
        ),
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help="auto or fp8.", autocompletion=options.one_of("auto", "fp8"))] = "auto",
    draft_tokens: options.DraftTokens = 0,
    draft_model: options.DraftModel = None,
    max_loras: Annotated[int | None, _size("--max-loras", help="LoRA adapters in one batch.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="Highest rank of an adapter; 16 if left out.")] = None,
    lora_target_modules: Annotated[
        str | None, typer.Option(help="What adapters change, in quotes; all but experts if left out.")
    ] = None,
    tensor_parallel_size: Annotated[int | None, options.TENSOR_PARALLEL_SIZE] = None,
    pipeline_parallel_size: Annotated[
        int | None, _size("--pipeline-parallel-size", "--pp", "-pp", help="Pipeline stages, as for vLLM.")
    ] = None,
    data_parallel_size: Annotated[
        int | None, _size("--data-parallel-size", "--dp", "-dp", help="Ranks of data parallelism, as for vLLM.")
    ] = None,
    enable_expert_parallel: Annotated[bool, options.enable_expert_parallel("; --dp implies it")] = False,
    redundant_experts: Annotated[int, typer.Option(help="Copies of experts in each layer for EPLB, in all.")] = 0,
    memory_gib: Annotated[float | None, typer.Option(help="Memory of a GPU that is not known.")] = None,
    bandwidth: options.Bandwidth = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of a GPU that vLLM may use.")] = 0.92,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Write a file for `vllm serve --config`.")
    ] = None,
    as_json: options.AsJson = False,
    _list: Annotated[
        bool, typer.Option("--list-gpus", callback=_list_gpus, is_eager=True, help="Print known GPUs and exit.")
    ] = False,
) -> None:
    """Will it fit, how many requests, and with which commands?

    Works from the configuration alone; sizes of parallelism are chosen if they are left out. Memory beside weights and
    KV cache is an estimate; the speeds are bounds that no deployment can pass, not promises. Exit code 1 if it does not
    fit.
    """
    from vllm_bailing.config import read_config
    from vllm_bailing.planning.gpus import find_gpus
    from vllm_bailing.planning.plan import make_plan
    from vllm_bailing.planning.request import Request
    from vllm_bailing.units import short_dtype

    try:
        config = read_config(model)
        if gpu.casefold() == "cpu":
            from vllm_bailing.cli import plan_cpu

            given = {"--gpu cpu": True, "--gpus": gpus, "--nodes": nodes, "--dtype": dtype, "--config": config_file}
            given |= {"--draft-tokens": draft_tokens, "--draft-model": draft_model, "--max-loras": max_loras}
            given |= {"--tensor-parallel-size": tensor_parallel_size, "--data-parallel-size": data_parallel_size}
            given |= {"--pipeline-parallel-size": pipeline_parallel_size, "--redundant-experts": redundant_experts}
            given |= {"--enable-expert-parallel": enable_expert_parallel}
            options.refuse_ignored(given, {}, {"--gpu cpu": tuple(given)[1:]})
            fits = plan_cpu.report(model, config, context, memory_gib, bandwidth, as_json)
            raise typer.Exit(0 if fits else 1)
        request = Request(
            *find_gpus(gpu, gpus, memory_gib, bandwidth),
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
            **_adapters(max_loras, max_lora_rank, lora_target_modules),
            nodes=nodes,
            goal=goal,
            dp=data_parallel_size,
            expert_parallel=enable_expert_parallel,
            redundant_experts=redundant_experts,
        )
        deployment = make_plan(config, request)
    except ValueError as error:
        raise output.fail("plan", _in_options(str(error)), 2) from None
    if config_file:
        output.require_others("plan", "--config", [config_file], [model, Path(model) / "config.json"])
    _report(deployment, config_file, as_json)
    raise typer.Exit(1 if deployment.verdict == "no" else 0)


def _in_options(text: str) -> str:
    """A message of the planner with the options that were written in place of the fields of a request."""
    return re.sub(rf"\b({'|'.join(_OPTIONS)})=", lambda field: f"{_OPTIONS[field[1]]} ", text)


def _adapters(count: int | None, rank: int | None, targets: str | None) -> dict[str, Any]:
    """What a request says of adapters: none unless one of the flags is given."""
    if count is rank is targets is None:
        return {}
    asked = {"max_loras": 1 if count is None else count}
    asked |= {} if rank is None else {"max_lora_rank": rank}
    return asked | ({} if targets is None else {"lora_target_modules": tuple(targets.replace(",", " ").split())})


def _report(plan: Plan, config_file: Path | None, as_json: bool) -> None:
    written = None if plan.verdict == "no" else config_file
    if written:
        try:
            write_text(written, plan.yaml())
        except OSError as error:
            raise output.fail("plan", f"--config {written}: {error.strerror}; name another file", 2) from None
    if as_json:
        lines = [plan.serve_line(number) for number in range(len(plan.commands))]
        commands = [{**asdict(own), "line": line} for own, line in zip(plan.commands, lines, strict=True)]
        typer.echo(json.dumps({**asdict(plan), "commands": commands, "serve": lines[0]}))
        return
    show_plan(plan)
    if written:
        output.show_files([written])


def show_plan(plan: Plan) -> None:
    """A plan with its commands."""
    from rich.text import Text

    console = output.console()
    on = f" in {plan.dtype} on {plan.gpus} x {plan.gpu.name} ({plan.layout})"
    console.print(Text.assemble((shown(plan.model), "bold"), on))
    for name, text in (("why", plan.why), ("runner-up", plan.runner_up)):
        if text:
            output.show_beside(console, Text(f"{name}: "), text)
    table = output.table("GiB per GPU")
    table.add_column("", justify="right")
    for part, name in ((plan.weights, "weights"), (plan.other, "other, estimated")):
        for key, value in asdict(part).items():
            if output.gib(value) != output.gib(0):
                table.add_row(f"  {key.replace('_', ' ')}", output.gib(value), style="dim")
        table.add_row(name, output.gib(part.total))
    table.add_row("left for the KV cache", output.gib(plan.kv_room_bytes), style="bold")
    console.print(table)
    color = {"fits": "green", "tight": "yellow", "no": "red"}[plan.verdict]
    console.print(
        f"KV cache: {plan.kv_bytes_per_token / 1024:g} KiB per token and GPU, room for {plan.kv_tokens:,} tokens"
    )
    console.print(
        Text.assemble(
            (plan.verdict, color),
            f": {plan.concurrency:,} requests of {plan.context:,} tokens",
            f" ({plan.reason})" if plan.reason else "",
        )
    )
    if plan.verdict != "no":
        console.print(
            f"at most {plan.largest_context:,} tokens each at {plan.concurrency:,} requests, "
            f"or {plan.largest_concurrency:,} requests of {plan.context:,} tokens"
        )
        for bound in (plan.single, plan.batch):
            console.print(
                f"bound at batch {bound.batch:,}: {bound.tokens_per_s:,.0f} tokens/s "
                f"({bound.step_bytes / 1e9:.1f} GB per step and GPU, by {bound.limit})"
            )
        _show_traffic(console, plan)
    console.print(NEVER_RUN)
    for note in plan.notes:
        output.show_beside(console, Text("note: "), note)
    if plan.verdict != "no":
        _show_commands(console, plan)


def _show_traffic(console: Console, plan: Plan) -> None:
    if not plan.traffic.total:
        return
    leaves = plan.traffic.between_nodes
    between = f", {leaves / 1e3:.0f} kB of it to other nodes" if leaves else ", nothing to other nodes"
    console.print(
        f"traffic: each GPU sends {plan.traffic.total / 1e3:.0f} kB for a token" + (between if plan.nodes > 1 else "")
    )


def _columns(console: Console) -> int:
    from vllm_bailing.planning.serve import COLUMNS

    return min(console.width, COLUMNS) if console.is_terminal else COLUMNS


def _show_commands(console: Console, plan: Plan) -> None:
    """Replicas differ by a few words, nodes that share one by more."""
    first, *others = plan.commands
    if plan.spans_nodes:
        for number, own in enumerate(plan.commands):
            address = f", of address HOST{own.node}" if "headless" not in own.flags else ""
            console.print(f"\n{own.place(plan.commands)}{address}:")
            console.print(plan.serve_line(number, _columns(console)), soft_wrap=True)
        return
    beside = [own for own in others if own.node == first.node]
    where = f"each of {plan.nodes} nodes" if plan.nodes > 1 else "the node"
    console.print(f"\non {where}:" if others else "")
    console.print(plan.serve_line(0, _columns(console)), soft_wrap=True)
    for own in beside:
        console.print(f"the same with {own.additions()}", soft_wrap=True)
