"""Tables of vLLM's fused experts for a model, a GPU and a tensor-parallel size, from timings on that GPU.

vLLM's Triton kernel for routed experts takes its tile sizes from a file that is named after the experts' shape and the
GPU, and falls back on rules of thumb where there is none. What a table may replace here is the baseline: whatever this
vLLM does without it, be that a table of its own or those rules. An entry of the new table differs from the baseline
only where it was faster in a second pass of timings.

Two passes over each number of tokens M. The first times every candidate briefly. The second times the fastest few
against the baseline, in turns and with the same routing. Each timing is a CUDA graph of several calls that rotate
among copies of the weights, since in a model the weights of every layer come from memory and not from the cache.

Only `GpuTimer` and the functions behind it need a GPU; the search takes anything that has the methods of `Timer`.

Dimension letters: M tokens, E routed experts, N their width on one rank, K hidden size.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_bailing import __version__
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.settings import TABLE_FOLDER

if TYPE_CHECKING:
    import torch

Config = dict[str, int]  # what vLLM calls the configuration of the kernel, keys as in `FIELDS`

FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
# vLLM takes the entry whose M is nearest, so a short ladder would be wrong between its rungs.
LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
DTYPES = ("bf16", "fp8")
GAIN = 1.02  # how many times as fast as the baseline an entry has to be
FINALISTS = 3  # candidates of a second pass
FIRST_ROUNDS, SECOND_ROUNDS = 5, 30  # timings of each candidate
CALLS = 8  # of the experts, in one timing

_BLOCK = 128  # side of a block of fp8 weights that shares a scale
_HOPPER_SHARED_MEMORY = 227 * 1024  # bytes that a block of threads can have; Blackwell's data-centre GPUs too
_SHARED_MEMORY = {
    "A100": 163 * 1024,
    "A800": 163 * 1024,
    "RTX": 99 * 1024,
    "L4": 99 * 1024,
    "L20": 99 * 1024,
    "GB10": 99 * 1024,
}
_WRONG = 0.05  # relative error of a result, of which rounding explains a tenth
# For the estimate of the time: two kernels to compile, and what else a candidate takes.
_COMPILE_SECONDS, _CANDIDATE_SECONDS = 1.5, 0.3


class TuneError(RuntimeError):
    """What keeps a table from being made, in words for the person who wanted it."""


class CandidateFailed(Exception):
    """A configuration that does not compile, needs more than the GPU has, or computes something else.

    Attributes:
        is_fatal: Whether the GPU can do nothing more in this process.
    """

    def __init__(self, reason: str, is_fatal: bool = False) -> None:
        super().__init__(reason)
        self.is_fatal = is_fatal


# ---- what is tuned -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experts:
    """The routed experts of one rank, as far as their speed depends on it.

    Attributes:
        intermediate_size: N, on this rank.
        dtype: "bf16", or "fp8" with a scale for each block of 128 x 128 weights.
    """

    num_experts: int
    intermediate_size: int
    hidden_size: int
    top_k: int
    n_group: int
    topk_group: int
    dtype: str

    @property
    def block_shape(self) -> list[int] | None:
        return [_BLOCK, _BLOCK] if self.dtype == "fp8" else None

    @property
    def table_dtype(self) -> str | None:
        """Spelling of the file name. Source: vLLM, `fused_moe.config._get_config_dtype_str`."""
        return "fp8_w8a8" if self.dtype == "fp8" else None

    @property
    def element_bytes(self) -> int:
        return 1 if self.dtype == "fp8" else 2

    @property
    def w1_shape(self) -> tuple[int, int, int]:
        """Gate and up projections: [E, 2 N, K]."""
        return self.num_experts, 2 * self.intermediate_size, self.hidden_size

    @property
    def w2_shape(self) -> tuple[int, int, int]:
        """Down projections: [E, K, N]."""
        return self.num_experts, self.hidden_size, self.intermediate_size

    @property
    def weight_bytes(self) -> int:
        return 3 * self.num_experts * self.intermediate_size * self.hidden_size * self.element_bytes


def experts_of(config: BailingMoeV2Config, tp_size: int, dtype: str | None = None) -> Experts:
    """The experts that one of `tp_size` ranks has.

    Args:
        dtype: One of `DTYPES`; what the checkpoint is stored in if left out.
    Raises:
        ValueError: If they cannot be divided so, or there are no tables for this dtype.
    """
    dtype = dtype or _stored_dtype(config)
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} has no tables of vLLM's Triton experts; use one of {', '.join(DTYPES)}")
    width = config.moe_intermediate_size
    if tp_size < 1 or width % tp_size:
        raise ValueError(f"--tensor-parallel-size {tp_size} must divide moe_intermediate_size={width}; choose another")
    for name, size in (
        ("moe_intermediate_size / tensor-parallel size", width // tp_size),
        ("hidden_size", config.hidden_size),
    ):
        if dtype == "fp8" and size % _BLOCK:
            raise ValueError(
                f"{name} = {size} is no multiple of {_BLOCK}, the blocks of fp8 weights, and vLLM's releases differ in "
                "the blocks that they make of it; choose another --tensor-parallel-size"
            )
    return Experts(
        config.num_experts,
        width // tp_size,
        config.hidden_size,
        config.num_experts_per_tok,
        config.n_group,
        config.topk_group,
        dtype,
    )


def _stored_dtype(config: BailingMoeV2Config) -> str:
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return "bf16"
    groups = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
    blocks = [quantization.get("weight_block_size"), *(weights.get("block_structure") for weights in groups)]
    if [_BLOCK, _BLOCK] in blocks:
        return "fp8"
    raise ValueError(
        f"the checkpoint's weights are quantised by {quantization.get('quant_method')!r} and not in blocks of "
        f"{_BLOCK} x {_BLOCK}, for which alone this makes tables of quantised experts; name another by --dtype "
        f"{' or '.join(DTYPES)}"
    )


def table_name(experts: Experts, device_name: str | None = None) -> str:
    """Name of the file that vLLM looks for, for this machine's GPU or the one called `device_name`."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    from vllm_bailing.compat import device_called

    with device_called(device_name):
        # vLLM reads E and N off the down projection.
        return get_config_file_name(
            experts.num_experts, experts.intermediate_size, experts.table_dtype, experts.block_shape
        )


def vllm_table(name: str) -> Path | None:
    """The table of that name that vLLM comes with, if any."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    file = Path(fused_moe.__file__).parent / "configs" / name
    return file if file.is_file() else None


def baseline(experts: Experts, tokens: int) -> Config:
    """What vLLM takes for M tokens without a table of the user's."""
    from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

    found = try_get_optimal_moe_config(
        experts.w1_shape, experts.w2_shape, experts.top_k, experts.table_dtype, tokens, block_shape=experts.block_shape
    )
    return {field: found[field] for field in FIELDS}  # what else it may hold, SPLIT_K, is 1 whatever a table says


# ---- the search space ----------------------------------------------------------------------------------------------


def shared_memory_bytes(experts: Experts, config: Config) -> int:
    """Shared memory of a block of threads: tiles of both operands for each stage, or the tile of the result.

    Within 3 % of what Triton 3.6 reports for this kernel on Hopper, or above it.
    """
    block_m, block_n, block_k = (config[field] for field in FIELDS[:3])
    # Products of 64 rows and more read their operands from there, smaller ones from registers, a stage behind. With
    # fp8 vLLM swaps the operands of small tiles, which makes them large ones.
    is_read_there = block_m >= 64 or experts.block_shape is not None
    stages = config["num_stages"] if is_read_there else config["num_stages"] - 1
    return max((block_m + block_n) * block_k * experts.element_bytes * stages, block_m * block_n * 2)


def shared_memory_of(device_name: str) -> int:
    """Bytes that a block of threads can have on a GPU that is not here."""
    return next((size for part, size in _SHARED_MEMORY.items() if part in device_name), _HOPPER_SHARED_MEMORY)


def candidates(experts: Experts, tokens: int, shared_memory: int) -> list[Config]:
    """Configurations worth timing for M tokens on a GPU whose blocks have `shared_memory` bytes.

    Tiles are at most four times as high as an expert's mean share of the tokens, since the rest would be padding, and
    no less than a quarter, since weights would be read again for each. Threads hold 8 to 128 numbers of the result:
    with more they run out of registers, with fewer most of them wait.
    """
    share = tokens * experts.top_k / experts.num_experts
    heights = [size for size in (16, 32, 64, 128) if size == 16 or size <= 4 * share]
    heights = [size for size in heights if 4 * size >= share] or heights[-1:]
    widths = [size for size in (32, 64, 128, 256) if size <= max(32, 2 * experts.intermediate_size)]
    depths = [size for size in (64, 128, 256) if size <= max(64, experts.intermediate_size)]
    if experts.block_shape:  # a step along K has one scale
        depths = [size for size in depths if _BLOCK % size == 0]
    groups = (1, 16) if share >= 1 else (1,)  # with less than a tile per expert there is nothing to group
    stages = (2, 3, 4, 5) if share < 16 else (2, 3, 4)  # with many tokens products hide the loads
    found = []
    for values in product(heights, widths, depths, groups, (4, 8), stages):
        config = dict(zip(FIELDS, values, strict=True))
        numbers = values[0] * values[1] / (32 * config["num_warps"])
        is_narrow = values[0] >= 64 and values[1] < 64
        # The smallest tiles give four warps less to do than that, and still are the best for few tokens.
        fits = numbers <= 128 and (numbers >= 8 or config["num_warps"] == 4)
        if fits and not is_narrow and shared_memory_bytes(experts, config) <= shared_memory:
            found.append(config)
    return found


def estimate_seconds(experts: Experts, space: dict[int, list[Config]], device_name: str) -> float:
    """About how long tuning takes: compiling, and timings of candidates half as fast as the hardware allows."""
    from vllm_bailing.planner import GPUS

    spelled = device_name.replace("_", " ").replace("-SXM4", "").split()
    gpu = next((gpu for name, gpu in GPUS.items() if name in spelled), GPUS["H20"])
    seconds = _COMPILE_SECONDS * len({_key(config) for configs in space.values() for config in configs})
    for tokens, configs in space.items():
        distinct = 1 - (1 - experts.top_k / experts.num_experts) ** tokens  # of the experts, with uniform routing
        flops = 6 * tokens * experts.top_k * experts.intermediate_size * experts.hidden_size
        call = 2 * max(experts.weight_bytes * distinct / gpu.bandwidth, flops / gpu.flops_16) + 50e-6
        timings = (FIRST_ROUNDS + 2) * len(configs) + SECOND_ROUNDS * (FINALISTS + 1)
        seconds += timings * CALLS * call + _CANDIDATE_SECONDS * len(configs)
    return seconds


def _key(config: Config) -> tuple[int, ...]:
    return tuple(config[field] for field in FIELDS)


# ---- the search ----------------------------------------------------------------------------------------------------


class Timer(Protocol):
    """Times configurations."""

    def start(self, tokens: int, default: Config) -> None:
        """Go on with M tokens; `default` is the configuration whose results are right.

        Raises:
            TuneError: If `default` does not run.
        """
        ...

    def route(self, draw: int) -> None:
        """Send the tokens to other experts: the same ones for the same `draw`."""
        ...

    def arm(self, config: Config) -> Callable[[], float]:
        """A function that times a configuration once, with the routing of that moment, in ms per call.

        Raises:
            CandidateFailed: If it cannot be used; also from the function.
        """
        ...


@dataclass(frozen=True)
class Row:
    """The outcome for one M.

    Attributes:
        default: Configuration of the baseline.
        best: The fastest other one; the baseline where none ran.
        default_ms, best_ms: Medians of the second pass, per call.
        ratio: Median of the baseline's time divided by that of `best`, over the rounds of the second pass.
        is_kept: Whether `best` goes into the table.
        tried, failed: Candidates of the first pass, and those of them that failed.
    """

    tokens: int
    default: Config
    best: Config
    default_ms: float
    best_ms: float
    ratio: float
    is_kept: bool
    tried: int
    failed: int

    @property
    def config(self) -> Config:
        """The entry of the table."""
        return self.best if self.is_kept else self.default


def choose(default_ms: list[float], finalists: list[list[float]]) -> tuple[int, float, bool]:
    """(index of the fastest of `finalists`, its median ratio, whether it is to be kept).

    Args:
        default_ms: Times of the baseline, one a round.
        finalists: Those of each finalist, in the same rounds.
    """
    ratios = [[one / other for one, other in zip(default_ms, times, strict=True)] for times in finalists]
    medians = [statistics.median(each) for each in ratios]
    fastest = max(range(len(medians)), key=medians.__getitem__)
    # Where noise is larger than the gain, a median alone would keep what is no faster.
    lower_quartile = sorted(ratios[fastest])[len(default_ms) // 4]
    return fastest, medians[fastest], medians[fastest] > GAIN and lower_quartile > 1


def search(
    timer: Timer,
    space: dict[int, list[Config]],
    default: Callable[[int], Config],
    notes: Notes,
    advance: Callable[[int, int], object] = lambda _tokens, _steps: None,
) -> list[Row]:
    """Find the configuration for each M of `space`.

    Args:
        default: The baseline for M.
        notes: What an earlier run found; this one adds to it.
        advance: Told after every step with M and the number of steps, which are `steps(space)` in all.
    Raises:
        TuneError: If the baseline does not run, or the GPU fails altogether.
    """
    rows = []
    for tokens, configs in space.items():
        row = notes.row(tokens)
        if row is None:
            row = _search_one(timer, tokens, configs, default(tokens), notes, lambda steps, m=tokens: advance(m, steps))
            notes.add_row(row)
        else:
            advance(tokens, len(configs) + FINALISTS)
        rows.append(row)
    return rows


def steps(space: dict[int, list[Config]]) -> int:
    return sum(len(configs) + FINALISTS for configs in space.values())


def _search_one(
    timer: Timer, tokens: int, configs: list[Config], default: Config, notes: Notes, advance: Callable[[int], object]
) -> Row:
    timer.start(tokens, default)
    times: dict[tuple[int, ...], float] = {}
    failed = 0
    challengers = [config for config in configs if config != default]
    advance(len(configs) - len(challengers))
    for config in challengers:
        known, ms = notes.time(tokens, config)
        if not known:
            ms = _first_pass(timer, tokens, config, min(times.values(), default=None), notes)
        if ms is None:
            failed += 1
        else:
            times[_key(config)] = ms
        advance(1)
    finalists = sorted((config for config in challengers if _key(config) in times), key=lambda c: times[_key(c)])
    try:
        default_ms, best, best_ms, ratio, is_kept = _second_pass(timer, default, finalists[:FINALISTS])
    except CandidateFailed as error:
        raise TuneError(f"the second pass for {tokens} tokens failed: {error}; run this again to go on") from error
    advance(FINALISTS)
    return Row(tokens, default, best, default_ms, best_ms, ratio, is_kept, len(challengers), failed)


def _first_pass(timer: Timer, tokens: int, config: Config, best_ms: float | None, notes: Notes) -> float | None:
    """Median time of a candidate, None if it failed; one that is far behind is timed only once."""
    try:
        measure, found = timer.arm(config), []
        for draw in range(FIRST_ROUNDS):
            timer.route(draw)
            found.append(measure())
            if best_ms is not None and found[0] > 2 * best_ms:
                break
        ms = statistics.median(found)
    except CandidateFailed as error:
        notes.add_time(tokens, config, None)  # before anything else, so that the next run passes it by
        if error.is_fatal:
            raise TuneError(
                f"{config} for {tokens} tokens broke the GPU's context ({error}); run this again to go on"
            ) from error
        return None
    notes.add_time(tokens, config, ms)
    return ms


def _second_pass(timer: Timer, default: Config, finalists: list[Config]) -> tuple[float, Config, float, float, bool]:
    """(ms of the baseline, the best configuration, its ms, ratio, whether it is kept)."""
    measures, configs = [timer.arm(default)], []
    for config in finalists:
        with contextlib.suppress(CandidateFailed):  # all of them at once need more memory
            measures.append(timer.arm(config))
            configs.append(config)
    times: list[list[float]] = [[] for _ in measures]
    for draw in range(SECOND_ROUNDS):
        timer.route(FIRST_ROUNDS + draw)
        # Turns change, so that what the one before leaves in the cache is spread over all.
        for turn in range(len(measures)):
            arm = (turn + draw) % len(measures)
            times[arm].append(measures[arm]())
    default_ms = statistics.median(times[0])
    if not configs:
        return default_ms, default, default_ms, 1.0, False
    fastest, ratio, is_kept = choose(times[0], times[1:])
    return default_ms, configs[fastest], statistics.median(times[1 + fastest]), ratio, is_kept


class Notes:
    """What was measured, in a file with a line for each result, so that a run can be cut off at any time.

    Results that were found for another `key` do not count, and go with the first new one.
    """

    def __init__(self, file: Path, key: dict[str, Any]) -> None:
        self.file = file
        self._times: dict[tuple[int, ...], float | None] = {}
        self._rows: dict[int, Row] = {}
        lines = list(_json_lines(file))
        if not lines or lines[0] != {"key": key}:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            if "row" in line:
                self._rows[line["row"]["tokens"]] = Row(**line["row"])
            else:
                self._times[(line["tokens"], *line["config"])] = line["ms"]
        # The last line may have been cut off.
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def row(self, tokens: int) -> Row | None:
        return self._rows.get(tokens)

    def time(self, tokens: int, config: Config) -> tuple[bool, float | None]:
        """Whether the candidate was timed, and its ms; None if it failed."""
        key = (tokens, *_key(config))
        return key in self._times, self._times.get(key)

    def add_time(self, tokens: int, config: Config, ms: float | None) -> None:
        self._times[(tokens, *_key(config))] = ms
        self._add({"tokens": tokens, "config": _key(config), "ms": ms})

    def add_row(self, row: Row) -> None:
        self._rows[row.tokens] = row
        self._add({"row": asdict(row)})

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._times)

    def _add(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


# ---- the table -----------------------------------------------------------------------------------------------------


def table(rows: Iterable[Row], triton: str) -> dict[str, Any]:
    """Contents of the file, as vLLM reads them."""
    return {"triton_version": triton} | {str(row.tokens): row.config for row in rows}


def provenance(
    rows: list[Row], experts: Experts, machine: dict[str, Any], model: str, tp_size: int, replaced: Path | None
) -> dict[str, Any]:
    """Where a table comes from and what it gains."""
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
    beside.write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(json.dumps(contents, indent=4) + "\n", encoding="utf-8")
    unfinished.replace(file)  # a server that starts meanwhile finds all of it or nothing
    return [file, beside]


def partial_file(folder: Path, name: str) -> Path:
    """Where the results of an unfinished run are kept."""
    return folder / f"{name.removesuffix('.json')}.partial.jsonl"


def partial_key(experts: Experts, space: dict[int, list[Config]], machine: dict[str, Any]) -> dict[str, Any]:
    """All that results depend on."""
    searched = json.dumps({tokens: [_key(config) for config in configs] for tokens, configs in space.items()})
    method = [GAIN, FINALISTS, FIRST_ROUNDS, SECOND_ROUNDS, CALLS]
    digest = hashlib.sha256(searched.encode()).hexdigest()
    return {"experts": asdict(experts), "machine": machine, "candidates": digest, "method": method}


@dataclass(frozen=True)
class Plan:
    """What is going to be tuned.

    Attributes:
        file: The table to write.
        space: Candidates for each M.
        seconds: About how long it takes.
        replaced: The table that this vLLM has itself, if any.
        is_there: Whether `file` exists.
    """

    experts: Experts
    device_name: str
    file: Path
    space: dict[int, list[Config]]
    seconds: float
    replaced: Path | None
    is_there: bool


def plan(experts: Experts, folder: Path, device_name: str | None = None) -> Plan:
    """Plan a table in `folder`, for this machine's GPU or the one called `device_name`, which need not be here."""
    name = table_name(experts, device_name)
    limit = shared_memory_of(device_name) if device_name else shared_memory()
    device_name = device_name or name.partition("device_name=")[2].partition(",")[0].removesuffix(".json")
    space = {tokens: candidates(experts, tokens, limit) for tokens in LADDER}
    file = folder / name
    seconds = estimate_seconds(experts, space, device_name)
    return Plan(experts, device_name, file, space, seconds, vllm_table(name), file.is_file())


# ---- on the GPU ----------------------------------------------------------------------------------------------------


def missing() -> str:
    """Why nothing can be timed here, with what to do; empty if it can."""
    import torch
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    advice = "run this on the machine to tune for, or add --dry-run --device-name NVIDIA_H20 to see what it would do"
    if not torch.cuda.is_available():
        return f"no GPU that torch can use, and only timings on one make a table; {advice}"
    if not current_platform.is_cuda():
        return f"this vLLM is built for {current_platform.device_name or 'no GPU'}, not for CUDA; {advice}"
    if not HAS_TRITON:
        return "vLLM finds no Triton, whose kernel this tunes; install vLLM's CUDA build"
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0":
        return "VLLM_BATCH_INVARIANT is set, and vLLM reads no tables then; unset it"
    return ""


def machine() -> dict[str, Any]:
    """GPU, driver and versions of what a timing depends on."""
    import torch
    from vllm.platforms import current_platform

    return {
        "gpu": current_platform.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        **{package: _version(package) for package in ("torch", "triton", "vllm")},
        "vllm_bailing": __version__,
        "python": sys.version.split()[0],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def shared_memory() -> int:
    """Bytes that a block of threads can have on this GPU."""
    import torch

    return torch.cuda.get_device_properties(0).shared_memory_per_block_optin


def random_routing(
    experts: Experts, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32, weights fp32), each [*shape, top-k]: group-limited top-k of sigmoid scores of random logits."""
    import torch

    logits = torch.randn(*shape, experts.num_experts, generator=generator, device=generator.device)
    scores = logits.sigmoid()  # [..., E]
    groups = scores.unflatten(-1, (experts.n_group, -1))  # [..., G, E / G]
    if experts.n_group > 1:
        best = groups.topk(2, dim=-1).values.sum(-1).topk(experts.topk_group, dim=-1).indices
        closed = torch.ones(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, best, False)
        groups = groups.masked_fill(closed[..., None], -torch.inf)
    topk_weights, topk_ids = groups.flatten(-2).topk(experts.top_k, dim=-1)
    return topk_ids.int(), topk_weights / topk_weights.sum(-1, keepdim=True)


class GpuTimer:
    """Times vLLM's fused experts with random weights, the router not included.

    A served fp8 model joins the activation with the quantisation of its result, which are two kernels here; the kernel
    that takes the configuration is the same.
    """

    def __init__(self, experts: Experts, device: str = "cuda", copies: int | None = None) -> None:
        import torch

        self.experts = experts
        self.device = torch.device(device)
        self._generator = torch.Generator(self.device).manual_seed(0)
        copies = self._affordable_copies() if copies is None else copies
        self._weights = [(self._random(experts.w1_shape), self._random(experts.w2_shape)) for _ in range(copies)]
        self._quant_config = self._scales()
        self._flushed = torch.empty(4 * self._cache_bytes(), dtype=torch.uint8, device=self.device)
        self._hidden_states = self._ids = self._topk_weights = self._right = torch.empty(0)

    def _affordable_copies(self) -> int:
        """Copies of the weights, several times the cache together: calls read from memory, as the layers of a model."""
        import torch

        room = torch.cuda.mem_get_info(self.device)[0] * 3 // 4
        size = self.experts.weight_bytes
        if room < size:
            raise TuneError(
                f"the experts of one layer take {size / 2**30:.1f} GiB and the GPU has {room / 2**30:.1f} to spare; "
                "end what else runs on it, or choose a larger --tensor-parallel-size"
            )
        return min(CALLS, max(2, -(-8 * self._cache_bytes() // size)), room // size)

    def _cache_bytes(self) -> int:
        import torch

        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def _random(self, shape: tuple[int, int, int]) -> torch.Tensor:
        import torch

        weight = torch.empty(shape, dtype=self._weight_dtype(), device=self.device)
        for expert in weight:  # one by one: all of them in a wider type may not fit beside the copies
            values = torch.randn(shape[1:], generator=self._generator, device=self.device)
            expert.copy_(values if self.experts.block_shape else values / shape[2] ** 0.5)
        return weight

    def _weight_dtype(self) -> torch.dtype:
        import torch
        from vllm.platforms import current_platform

        return current_platform.fp8_dtype() if self.experts.block_shape else torch.bfloat16

    def _scales(self) -> Any:
        """Block scales that give fp8 results of about 1; None for bf16."""
        import torch
        from vllm.model_executor.layers.fused_moe.config import fp8_w8a8_moe_quant_config

        if self.experts.block_shape is None:
            return None
        scales = [
            torch.full((count, -(-rows // _BLOCK), -(-columns // _BLOCK)), columns**-0.5, device=self.device)
            for count, rows, columns in (self.experts.w1_shape, self.experts.w2_shape)
        ]
        return fp8_w8a8_moe_quant_config(w1_scale=scales[0], w2_scale=scales[1], block_shape=self.experts.block_shape)

    def start(self, tokens: int, default: Config) -> None:
        import torch

        shape = (tokens, self.experts.hidden_size)
        self._hidden_states = torch.randn(shape, generator=self._generator, device=self.device).bfloat16()
        self._ids, self._topk_weights = random_routing(self.experts, (CALLS, tokens), self._generator)
        self.route(0)
        try:
            self._right = self._run(default)
        except CandidateFailed as error:
            raise TuneError(f"vLLM's own configuration {default} for {tokens} tokens does not run: {error}") from error

    def route(self, draw: int) -> None:
        import torch

        generator = torch.Generator(self.device).manual_seed(1 + draw)
        ids, weights = random_routing(self.experts, self._ids.shape[:2], generator)
        self._ids.copy_(ids)  # in place, since the graphs read it
        self._topk_weights.copy_(weights)

    def arm(self, config: Config) -> Callable[[], float]:
        import torch

        self.route(0)
        result = self._run(config)
        error = ((result - self._right).norm() / self._right.norm()).item()
        if not error < _WRONG:  # as it is for NaN
            raise CandidateFailed(f"its result is off by {error:.2g}")
        graph = torch.cuda.CUDAGraph()

        def capture() -> None:
            with torch.cuda.graph(graph):
                self._calls()

        def replay() -> float:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # Empties the cache, and keeps the GPU busy until the graph is in its queue.
            self._flushed.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / CALLS

        self._guarded(capture, config)
        self._guarded(replay)
        return lambda: self._guarded(replay)

    def _run(self, config: Config) -> torch.Tensor:
        """Result of the first call, fp32; compiles what was not yet."""
        return self._guarded(self._calls, config).float()

    def _calls(self) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

        results = []
        for call in range(CALLS):
            w1, w2 = self._weights[call % len(self._weights)]
            ids, weights = self._ids[call], self._topk_weights[call]
            result = fused_experts(self._hidden_states, w1, w2, weights, ids, quant_config=self._quant_config)
            results = results or [result]
        return results[0]

    def _guarded(self, work: Callable[[], Any], config: Config | None = None) -> Any:
        """What `work` returns, done under `config`.

        Raises:
            CandidateFailed: For whatever goes wrong: compilers and drivers have errors of many classes.
        """
        from vllm.model_executor.layers.fused_moe import get_config, override_config

        failure, result = None, None
        # vLLM's context manager leaves its override behind if an error passes through it.
        with override_config(config or get_config()):
            try:
                result = work()
                self._synchronize()
            except Exception as error:
                failure = error
        if failure is None:
            return result
        reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
        try:
            self._synchronize()
        except RuntimeError:
            raise CandidateFailed(reason, is_fatal=True) from failure
        raise CandidateFailed(reason) from failure

    def _synchronize(self) -> None:
        import torch

        torch.cuda.synchronize(self.device)


def run(
    plan: Plan, model: str, tp_size: int, advance: Callable[[int, int], object] = lambda _tokens, _steps: None
) -> tuple[list[Row], list[Path]]:
    """Tune on this machine's GPU, going on with what an earlier run left; returns the rows and the files written.

    Raises:
        TuneError: If it cannot be done; what was measured by then is kept.
    """
    from vllm.platforms import current_platform

    if plan.experts.block_shape and not current_platform.supports_fp8():
        raise TuneError(f"the {plan.device_name} has no fp8 arithmetic; add --dtype bf16")
    os.environ.pop(TABLE_FOLDER, None)  # the baseline is what vLLM does without such a folder
    here = machine()
    notes = Notes(partial_file(plan.file.parent, plan.file.name), partial_key(plan.experts, plan.space, here))
    rows = search(GpuTimer(plan.experts), plan.space, lambda tokens: baseline(plan.experts, tokens), notes, advance)
    origin = provenance(rows, plan.experts, here, model, tp_size, plan.replaced)
    written = write_table(plan.file, table(rows, here["triton"]), origin)
    notes.forget()
    return rows, written
