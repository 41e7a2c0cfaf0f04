"""This package against vLLM's own model class, and against itself with an option: timings, noise floor and verdict.

The arms are `in-tree` (our configuration class, vLLM's model class), `in-tree again` (the same once more: what differs
between the two is noise), `plugin`, and one per option. Each is measured once a round in a fresh process, see `runner`.

vLLM's own `vllm bench latency` starts an engine for every figure. Starting takes longer than measuring, so a
`CompareTask` takes all figures from one engine, with the same `LLM.generate` under the clock.

Dimension letters: T tokens of a step, E routed experts, K experts per token.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_bailing.bench.runner import PACKAGE_PREFIX, alternate, cpu_info
from vllm_bailing.bench.shapes import load_config, without_mtp
from vllm_bailing.bench.statistics import AGAIN, IN_TREE, PLUGIN, SEED, summarize
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import BenchError
from vllm_bailing.planning.gpus import gpu_called
from vllm_bailing.planning.memory import Layout
from vllm_bailing.planning.roofline import step_bytes
from vllm_bailing.plugin.supported_versions import USE_INTREE
from vllm_bailing.tools.task import Task
from vllm_bailing.units import short_dtype

_OTHER_PREFIXES = {IN_TREE: "vllm.", AGAIN: "vllm."}  # of the arms whose model class is not this package's
# What has to be the same in all arms without an option.
_SAME = ("experts", "attention", "dtype", "quantization", "compilation", "graphs", "runner", "device")


@dataclass
class CompareTask(Task):
    """Every figure of one arm, from one engine.

    Attributes:
        batch_sizes: Requests at once, for decoding.
        prefill: Tokens of prompts, each alone, for prefill.
        prompt_tokens, output_tokens: Tokens of each request that decodes.
        repeats: How often each figure is taken; with 0 everything runs once, unmeasured.
    """

    batch_sizes: list[int]
    prefill: list[int]
    prompt_tokens: int = 32
    output_tokens: int = 64
    repeats: int = 3

    @property
    def longest(self) -> int:
        """Tokens of the longest request, with its answer."""
        return max([self.prompt_tokens + self.output_tokens, *(length + 1 for length in self.prefill)])

    def work(self) -> dict[str, Any]:
        _use_one_process_on_cpu()
        return measure(self)


def arms(task: CompareTask, options: Mapping[str, dict[str, Any]], plain: str | None = None) -> dict[str, CompareTask]:
    """`task` for each arm: vLLM's class twice, ours, and ours with each of `options` (arguments of `vllm.LLM`).

    Args:
        plain: The model of the arms without an option, which have to be alike; left out, that of all.
    """
    model = plain or task.model
    intree, ours = {**task.env, USE_INTREE: "1"}, {**task.env, USE_INTREE: "0"}
    tasks = {
        IN_TREE: replace(task, model=model, env=intree),
        AGAIN: replace(task, model=model, env=intree),
        PLUGIN: replace(task, model=model, env=ours),
    }
    for name, engine in options.items():
        tasks[name] = replace(task, env=ours, engine={**task.engine, **engine})
    return tasks


def warm_ups(tasks: Mapping[str, CompareTask]) -> dict[str, CompareTask]:
    """A first, unmeasured run of each arm, which fills the caches of files and of compiled code."""
    return {arm: replace(task, repeats=0) for arm, task in tasks.items() if arm != AGAIN}


def _use_one_process_on_cpu() -> None:
    """On CPUs, keep the engine in this process by its environment: one of its own would keep a core for itself."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def measure(task: CompareTask) -> dict[str, Any]:
    """What runs (`facts`) and the figures (`figures`, by kind and size), from an engine that this process starts."""
    import psutil
    from vllm import LLM, SamplingParams

    from vllm_bailing.bench.worker_extension import EXTENSION

    llm = LLM(
        task.model,
        **{
            "max_model_len": task.longest,
            "max_num_seqs": max(task.batch_sizes),
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "skip_tokenizer_init": True,
            "worker_extension_cls": EXTENSION,
            **task.engine,
        },
    )
    started_s = time.time() - psutil.Process().create_time()
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    draw = np.random.default_rng(SEED)

    def generate(batch_size: int, length: int, tokens: int) -> tuple[float, list[Any]]:
        prompts = [{"prompt_token_ids": row} for row in draw.integers(vocabulary, size=(batch_size, length)).tolist()]
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begun = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begun, [output.metrics for output in outputs]

    figures: dict[str, float] = {}
    for size in task.batch_sizes:
        generate(size, task.prompt_tokens, task.output_tokens)
        batches = [generate(size, task.prompt_tokens, task.output_tokens)[1] for _ in range(task.repeats)]
        if batches:
            taken = [_decoding(metrics, task.output_tokens) for metrics in batches]
            for kind, values in zip(("decode", "TTFT", "TPOT"), zip(*taken, strict=True), strict=True):
                figures[f"{kind} {size}"] = statistics.median(values)
    for length in task.prefill:
        generate(1, length, 1)
        seconds = [generate(1, length, 1)[0] for _ in range(task.repeats)]
        if seconds:
            figures[f"prefill {length}"] = length / statistics.median(seconds)
    return {"facts": llm.collective_rpc("bailing_facts")[0], "figures": figures | _costs(llm, started_s)}


def _costs(llm: Any, started_s: float) -> dict[str, float]:
    """Seconds of loading and of the start, and peak memory without the KV cache in GB (of one rank on GPUs)."""
    import psutil

    costs = llm.collective_rpc("bailing_costs")
    on_gpu = [cost["gpu_bytes"] - cost["kv_bytes"] for cost in costs if "gpu_bytes" in cost]
    on_cpu = peak_memory(psutil.Process()) - sum(cost["kv_bytes"] for cost in costs)
    memory = max(on_gpu, default=on_cpu) / 1e9
    return {"load": max(cost["load_s"] for cost in costs), "start": started_s, "memory": memory}


def _decoding(metrics: list[Any], tokens: int) -> tuple[float, float, float]:
    """Decoding in tokens/s, median time to first token and per token after it in ms, of requests that ran at once.

    Args:
        metrics: vLLM's `RequestStateStats`, one per request.
        tokens: Tokens of each answer.
    """
    # The stamps of tokens are those of the engine, so that they leave out what the caller does with a finished batch.
    seconds = max(request.last_token_ts for request in metrics) - min(request.first_token_ts for request in metrics)
    each = [(request.last_token_ts - request.first_token_ts) / (tokens - 1) for request in metrics]
    first = statistics.median(request.first_token_latency for request in metrics)
    return len(metrics) * (tokens - 1) / seconds, 1000 * first, 1000 * statistics.median(each)


def peak_memory(process: Any) -> int:
    """Sum of the peaks of a `psutil.Process` and all of its children, in bytes; pages that they share count in each."""
    peaks = []
    for member in [process, *process.children(recursive=True)]:
        for line in Path(f"/proc/{member.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peaks.append(1024 * int(line.split()[1]))
    return sum(peaks)


class Referee:
    """Refuses a comparison whose arms do not run what their names say; the `check` of `runner.alternate`.

    Attributes:
        facts: What each arm runs.
        notes: What an option, or the plugin's own kernels, changed besides the model class.
    """

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    def __call__(self, arm: str, result: dict[str, Any]) -> None:
        """Check what `arm` ran.

        Raises:
            BenchError: If it is another model class, or an arm without an option has other kernels than `in-tree`.
        """
        facts = result["facts"]
        prefix = _OTHER_PREFIXES.get(arm, PACKAGE_PREFIX)
        if not facts["model"].startswith(prefix):
            raise BenchError(
                f"the arm {arm!r} ran {facts['model']} and not a class of {prefix.rstrip('.')}; "
                "`vllm-bailing info` says why"
            )
        if arm in self.facts:
            return
        self.facts[arm] = facts
        base = self.facts[IN_TREE]
        for key in _SAME:
            if facts[key] == base[key]:
                continue
            are_ours = key == "experts" and all(kernel.startswith(PACKAGE_PREFIX) for kernel in facts[key].split(", "))
            if arm in (AGAIN, PLUGIN) and not are_ours:
                raise BenchError(
                    f"the arm {arm!r} ran with {key} {facts[key]} and {IN_TREE!r} with {base[key]}, so that their "
                    "difference says nothing about the model class; fix it with --engine"
                )
            self.notes.append(f"{arm}: {key} {facts[key]} (in-tree: {base[key]})")
        changed = sorted(set(facts["fusions"]) ^ set(base["fusions"]))
        for name in changed:
            self.notes.append(f"{arm}: fusion {name} {'on' if name in facts['fusions'] else 'off'}, unlike in-tree")


def known_bandwidth(device: str) -> float | None:
    """Memory bandwidth in TB/s of the GPU that the driver calls `device`; None if it is not a known one."""
    gpu = gpu_called(device)
    return gpu.bandwidth / 1e12 if gpu else None


def roofline_shares(
    rows: list[dict[str, Any]],
    tasks: Mapping[str, CompareTask],
    facts: Mapping[str, dict[str, Any]],
    config: BailingMoeV2Config,
    bytes_per_s: float,
    ranks: int = 1,
) -> dict[str, dict[str, float]]:
    """Per decode figure and arm, the speed as a share of what `ranks` that read `bytes_per_s` each allow.

    Only for arms whose steps are those of the configuration: without speculation, quantization or overrides.
    """
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        (kind, _, size), task, runs = row["figure"].partition(" "), tasks[row["arm"]], facts[row["arm"]]
        if kind != "decode" or runs["quantization"] or {"speculative_config", "hf_overrides"} & set(task.engine):
            continue
        context = task.prompt_tokens + task.output_tokens // 2
        layout = Layout(config, short_dtype(runs["dtype"]), tp=ranks)
        step_s = step_bytes(layout, context, int(size)) / bytes_per_s
        shares.setdefault(row["figure"], {})[row["arm"]] = row["median"] * step_s / int(size)
    return shares


def run(
    task: CompareTask,
    options: Mapping[str, dict[str, Any]],
    rounds: int,
    warm_up: bool = True,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """Measure every arm and draw the conclusions.

    Args:
        task: What to measure; the arms differ from it in environment and options.
        options: Of the further arms.
        warm_up: Whether every arm starts once before, unmeasured.
        bandwidth: Of the memory of one rank, in TB/s; left out, that of the GPU if it is a known one.
    Returns:
        `machine`, `arms` (what each ran), `notes`, `rows` (see `summarize`), `roofline` (see `roofline_shares`).
    Raises:
        BenchError: If the model takes no such prompts, an engine failed, or an arm did not run what its name says.
    """
    window = load_config(task.model).max_position_embeddings
    if task.longest > window and not {"max_model_len", "hf_overrides"} & task.engine.keys():
        raise BenchError(
            f"the longest request takes {task.longest} tokens with its answer, and the model's window has {window}; "
            "lower --prefill, --prompt-tokens or --output-tokens"
        )
    with tempfile.TemporaryDirectory() as folder:
        plain = task.model if task.engine.get("load_format") == "dummy" else without_mtp(task.model, Path(folder))
        tasks, referee = arms(task, options, plain), Referee()
        if warm_up:
            alternate(warm_ups(tasks), 1, referee, "warm-up")
        results = alternate(tasks, rounds, referee)
    rows = summarize(results)
    device = referee.facts[IN_TREE]["device"]
    bandwidth = bandwidth or known_bandwidth(device)
    roofline = {}
    if bandwidth:
        ranks = task.engine.get("tensor_parallel_size", 1)
        roofline = {
            "terabytes_per_s_of_a_rank": bandwidth,
            "shares": roofline_shares(rows, tasks, referee.facts, load_config(task.model), bandwidth * 1e12, ranks),
        }
    return {
        "machine": {**cpu_info(), "device": device},
        "arms": referee.facts,
        "notes": referee.notes,
        "rows": rows,
        "roofline": roofline,
    }
