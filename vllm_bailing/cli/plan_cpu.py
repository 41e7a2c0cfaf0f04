"""`vllm-bailing plan MODEL --gpu cpu`: what this machine's memory and processor can serve."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from vllm_bailing.cli import output
from vllm_bailing.errors import shown

if TYPE_CHECKING:
    from vllm_bailing.config import BailingMoeV2Config
    from vllm_bailing.planning.cpu import CpuMachine, CpuPlan

SCHEMES = {"fp8": "fp8-block", "int8": "w8a8", "int4": "w4a16"}  # of `vllm-bailing quantize`


def report(
    model: str,
    config: BailingMoeV2Config,
    context: int | None,
    memory_gib: float | None,
    bandwidth: float | None,
    as_json: bool,
) -> bool:
    """Print what fits; returns whether anything does.

    Args:
        memory_gib, bandwidth: Of another machine, GiB and TB/s; this one's, measured, where None.
    """
    from vllm_bailing.planning.cpu import cpu_plans

    context = min(4096, config.max_position_embeddings) if context is None else context
    if context < 1:
        raise ValueError(f"--context {context} must be at least 1")
    machine = _machine(memory_gib, bandwidth)
    plans = cpu_plans(config, machine, context)
    can = [plan for plan in plans if plan.verdict(context) == "fits"]
    if as_json:
        rows = [{**asdict(plan), "verdict": plan.verdict(context)} for plan in plans]
        typer.echo(json.dumps({"model": model, "context": context, "machine": asdict(machine), "plans": rows}))
    else:
        _show(model, context, machine, plans)
        if can:
            _show_commands(model, context, can[0], config)
    return bool(can)


def _machine(memory_gib: float | None, bandwidth: float | None) -> CpuMachine:
    import psutil

    from vllm_bailing.planning.cpu import CpuMachine
    from vllm_bailing.processor import dtypes_with_kernels, memory_bandwidth
    from vllm_bailing.units import GIB

    for flag, value in (("--memory-gib", memory_gib), ("--bandwidth", bandwidth)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} {value:g} must be a positive number")
    memory = psutil.virtual_memory().available if memory_gib is None else round(memory_gib * GIB)
    return CpuMachine(memory, memory_bandwidth() if bandwidth is None else bandwidth * 1e12, dtypes_with_kernels())


def _show(model: str, context: int, machine: CpuMachine, plans: list[CpuPlan]) -> None:
    from rich.text import Text

    from vllm_bailing.processor import found
    from vllm_bailing.units import GIB

    console = output.console()
    console.print(
        Text.assemble(
            (shown(model), "bold"),
            f" on this processor ({found()}), {machine.memory_bytes / GIB:.1f} GiB free, ",
            f"{machine.bandwidth / 1e9:.1f} GB/s read from memory",
        )
    )
    table = output.table("weights in")
    for title in ("GiB", "tokens of KV cache", "tokens/s at most", f"{context:,} tokens"):
        table.add_column(title, justify="right")
    for plan in plans:
        verdict = plan.verdict(context)
        color = {"fits": "green", "no kernel": "yellow", "no": "red"}[verdict]
        table.add_row(
            f"{plan.dtype}, head {plan.head_dtype}" if plan.head_dtype else plan.dtype,
            output.gib(plan.weights_bytes),
            f"{plan.kv_tokens:,}",
            f"{plan.tokens_per_s:.1f}",
            Text(verdict, color),
        )
    console.print(table)
    console.print("tokens/s: one request, if reading memory were all that a step takes; no promise")
    if any(plan.verdict(context) == "no kernel" for plan in plans):
        console.print(
            "no kernel: vLLM's CPU build has none for experts in these bits on this processor; `dequantize` serves "
            "such a checkpoint with the memory and the speed of bf16"
        )


def _show_commands(model: str, context: int, best: CpuPlan, config: BailingMoeV2Config) -> None:
    from vllm_bailing.planning.memory import stored_dtype
    from vllm_bailing.tools.shell import servable
    from vllm_bailing.units import GIB

    console = output.console()
    source, flags = servable(model), ""
    served = source
    if getattr(config, "quantization_config", None):
        flags = "" if best.dtype == stored_dtype(config) else " --hf-overrides '{\"dequantize\": true}'"
    elif best.dtype != "bf16" and not config.stored_quantization_config:
        served = f"{source.rstrip('/').rpartition('/')[2]}-{best.dtype}"
        head = f" --head {SCHEMES[best.head_dtype]}" if best.head_dtype else ""
        command = f"\nvllm-bailing quantize {source} {served} --scheme {SCHEMES[best.dtype]}{head}"
        console.print(command, soft_wrap=True)
    cache = max(1, -(-min(best.kv_tokens, 8 * context) * best.kv_bytes_per_token // GIB))
    command = f"VLLM_CPU_KVCACHE_SPACE={cache} vllm serve {served} --max-model-len {context}{flags}"
    console.print(command if served != source else f"\n{command}", soft_wrap=True)
