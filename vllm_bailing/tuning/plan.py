"""Plan and make a table of vLLM's fused experts for a model, a GPU and a tensor-parallel size.

vLLM's Triton kernel for routed experts takes its tile sizes from a file that is named after the experts' shape and the
GPU, and falls back on rules of thumb where there is none. What a table may replace here is the baseline: whatever this
vLLM does without it, be that a table of its own or those rules. An entry of the new table differs from the baseline
only where it was faster in a second pass of timings.

`space` has the candidates, `search` the two passes over each number of tokens, `gpu_timer` the timings, `table` the
files. Only `run`, and a plan for the GPU of this machine, need a GPU.

Dimension letters: M tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_bailing.errors import TuneError
from vllm_bailing.planning.gpus import GPUS, gpu_called, shared_memory_of
from vllm_bailing.tuning.backend import AUTO, READERS, chosen_backend
from vllm_bailing.tuning.device import device_info, shared_memory
from vllm_bailing.tuning.gpu_timer import GpuTimer
from vllm_bailing.tuning.search import (
    CALLS,
    FINALISTS,
    FIRST_ROUNDS,
    SECOND_ROUNDS,
    Notes,
    Row,
    notes_file,
    notes_key,
    search,
)
from vllm_bailing.tuning.space import LADDER, Experts, TileConfig, candidates, tile_key
from vllm_bailing.tuning.table import (
    baseline,
    provenance,
    table,
    table_name,
    vllm_table,
    without_table_folder,
    write_table,
)

# For the estimate of the time: two kernels to compile, and what else a candidate takes.
_COMPILE_SECONDS, _CANDIDATE_SECONDS = 1.5, 0.3


@dataclass(frozen=True)
class TuningPlan:
    """What is going to be tuned.

    Attributes:
        file: The table to write.
        space: Candidates for each M.
        seconds: About how long it takes.
        replaced: The table that this vLLM has itself, if any.
        is_there: Whether `file` existed when the plan was made.
        backend: The experts that vLLM chooses; None if the vLLM of this machine cannot tell.
    """

    experts: Experts
    device_name: str
    file: Path
    space: dict[int, list[TileConfig]]
    seconds: float
    replaced: Path | None
    is_there: bool
    backend: str | None


def make_tuning_plan(
    experts: Experts, folder: Path, device_name: str | None = None, moe_backend: str = AUTO
) -> TuningPlan:
    """Plan a table in `folder`, for this machine's GPU or the one called `device_name`, which need not be here.

    Args:
        moe_backend: What `vllm serve` will be given as `--moe-backend`.
    Raises:
        ValueError: If vLLM would choose experts that read no table.
    """
    backend = chosen_backend(experts, device_name, moe_backend)
    if backend is not None and backend not in READERS:
        raise ValueError(
            f"for experts in {experts.dtype} on {device_name or 'this GPU'}, vLLM chooses {backend} with --moe-backend "
            f"{moe_backend}, and its Triton kernel alone reads tables; nothing to tune, unless you serve with "
            "--moe-backend triton: then add it here"
        )
    name = table_name(experts, device_name)
    limit = shared_memory_of(device_name) if device_name else shared_memory()
    device_name = device_name or name.partition("device_name=")[2].partition(",")[0].removesuffix(".json")
    space = {tokens: candidates(experts, tokens, limit) for tokens in LADDER}
    file = folder / name
    seconds = estimate_seconds(experts, space, device_name)
    return TuningPlan(experts, device_name, file, space, seconds, vllm_table(name), file.is_file(), backend)


def estimate_seconds(experts: Experts, space: dict[int, list[TileConfig]], device_name: str) -> float:
    """About how long tuning takes: compiling, and timings of candidates half as fast as the hardware allows.

    A GPU that is not a known one counts as an H20.
    """
    gpu = gpu_called(device_name) or GPUS["H20"]
    seconds = _COMPILE_SECONDS * len({tile_key(config) for configs in space.values() for config in configs})
    for tokens, configs in space.items():
        distinct = 1 - (1 - experts.top_k / experts.global_num_experts) ** tokens  # of them, with uniform routing
        picks = tokens * experts.top_k / experts.ep_size  # of this rank's
        flops = 6 * picks * experts.intermediate_size * experts.hidden_size
        call = 2 * max(experts.weight_bytes * distinct / gpu.bandwidth, flops / gpu.flops_16) + 50e-6
        timings = (FIRST_ROUNDS + 2) * len(configs) + SECOND_ROUNDS * (FINALISTS + 1)
        seconds += timings * CALLS * call + _CANDIDATE_SECONDS * len(configs)
    return seconds


def run(
    plan: TuningPlan, model: str, tp_size: int, advance: Callable[[int, int], object] = lambda _tokens, _steps: None
) -> tuple[list[Row], list[Path]]:
    """Tune on this machine's GPU, going on with what an earlier run left; returns the rows and the files written.

    Args:
        model, tp_size: For the record, what the experts of the plan were taken from.
        advance: As for `search`.
    Raises:
        TuneError: If it cannot be done; what was measured by then is kept.
    """
    from vllm.platforms import current_platform

    if plan.experts.block_shape and not current_platform.supports_fp8():
        raise TuneError(f"the {plan.device_name} has no fp8 arithmetic; add --dtype bf16")
    here = device_info()
    notes = Notes.resume(notes_file(plan.file), notes_key(plan.experts, plan.space, here))
    with without_table_folder():
        rows = search(GpuTimer(plan.experts), plan.space, lambda tokens: baseline(plan.experts, tokens), notes, advance)
    origin = provenance(rows, plan.experts, here, model, tp_size, plan.replaced)
    written = write_table(plan.file, table(rows, here["triton"]), origin)
    notes.delete()
    return rows, written
