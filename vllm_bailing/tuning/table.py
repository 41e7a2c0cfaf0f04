"""Tables of tile sizes as vLLM reads them: their names, their contents, and where they come from."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_bailing.json_files import write_text
from vllm_bailing.plugin.patches import TABLE_FOLDER
from vllm_bailing.tuning.search import CALLS, GAIN, SECOND_ROUNDS, Row
from vllm_bailing.tuning.space import FIELDS, Experts, TileConfig


def table_name(experts: Experts, device_name: str | None = None) -> str:
    """Name of the file that vLLM looks for, for this machine's GPU or the one called `device_name`."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    from vllm_bailing.plugin.patches import pretend_device

    with pretend_device(device_name):
        # vLLM reads E and N off the down projection.
        return get_config_file_name(
            experts.num_experts, experts.intermediate_size, experts.table_dtype, experts.block_shape
        )


def vllm_table(name: str) -> Path | None:
    """The table of that name that vLLM comes with, if any."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    file = Path(fused_moe.__file__).parent / "configs" / name
    return file if file.is_file() else None


@contextmanager
def without_table_folder() -> Iterator[None]:
    """Meanwhile the environment names no folder of the user's tables: the baseline is what vLLM does without one."""
    folder = os.environ.pop(TABLE_FOLDER, None)
    try:
        yield
    finally:
        if folder is not None:
            os.environ[TABLE_FOLDER] = folder


def baseline(experts: Experts, tokens: int) -> TileConfig:
    """What vLLM takes for M tokens; within `without_table_folder`, that is its own table or its rules of thumb."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    config = try_get_optimal_moe_config(
        experts.w1_shape, experts.w2_shape, experts.top_k, experts.table_dtype, tokens, block_shape=experts.block_shape
    )
    return {field: config[field] for field in FIELDS}  # what else it may hold, SPLIT_K, is 1 whatever a table says


def table(rows: Iterable[Row], triton: str) -> dict[str, Any]:
    """Contents of the file, as vLLM reads them."""
    return {"triton_version": triton} | {str(row.tokens): row.config for row in rows}


def provenance(
    rows: list[Row], experts: Experts, machine: dict[str, Any], model: str, tp_size: int, replaced: Path | None
) -> dict[str, Any]:
    """Where a table comes from and what it gains, for the file beside it.

    Args:
        machine: See `device_info`.
        replaced: The table of vLLM's own that was the baseline, if any.
    """
    return {
        **machine,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": model,
        "tensor_parallel_size": tp_size,
        "experts": asdict(experts),
        "baseline": f"vLLM's table {replaced.name}" if replaced else "vLLM's defaults",
        "kept_above": GAIN,
        "rounds": SECOND_ROUNDS,
        "calls_per_round": CALLS,
        "candidates_tried": sum(row.tried for row in rows),
        "candidates_failed": sum(row.failed for row in rows),
        "entries_kept": sum(row.is_kept for row in rows),
        "tokens": {str(row.tokens): {k: v for k, v in asdict(row).items() if k != "tokens"} for row in rows},
    }


def write_table(file: Path, contents: dict[str, Any], origin: dict[str, Any]) -> list[Path]:
    """Write a table and, beside it, its provenance; returns both files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.stem}.provenance.json")
    write_text(beside, json.dumps(origin, indent=1) + "\n")
    write_text(file, json.dumps(contents, indent=4) + "\n")  # a server that starts meanwhile finds all or nothing
    return [file, beside]
