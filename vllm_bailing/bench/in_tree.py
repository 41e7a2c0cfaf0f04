"""This package against vLLM's own model class, and against itself with an option: timings, noise floor and verdict.

The arms are `in-tree` (our configuration class, vLLM's model class), `in-tree again` (the same once more: what differs
between the two is noise), `plugin`, and one per option. Each is measured once a round in a fresh process, see `bench`.

vLLM's own `vllm bench latency` starts an engine for every figure. Starting takes longer than measuring, so `Trial`
takes all figures from one engine, with the same `LLM.generate` under the clock.

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

from vllm_bailing.bench.runner import OURS, Task, alternate, machine
from vllm_bailing.bench.shapes import load_config, without_mtp
from vllm_bailing.bench.statistics import AGAIN, IN_TREE, PLUGIN, SEED, summarize
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import BenchError
from vllm_bailing.planning.gpus import gpu_called
from vllm_bailing.planning.roofline import step_bytes
from vllm_bailing.plugin.support import USE_INTREE
from vllm_bailing.units import short_dtype

_PACKAGES = {IN_TREE: "vllm.", AGAIN: "vllm."}  # of the model class of an arm; of all others it is this one
_SAME = ("experts", "attention", "dtype", "quantization", "compilation", "graphs", "runner", "device")


@dataclass
class Trial(Task):
    """Every figure of one arm, from one engine.

    Attributes:
        batch_sizes: Requests at once, for decoding.
        prompt_tokens, output_tokens: Length of each of them.
        prefill: Lengths of prompts, each alone, for prefill.
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
        return measure(self)


def arms(trial: Trial, options: Mapping[str, dict[str, Any]], plain: str | None = None) -> dict[str, Trial]:
    """`trial` for each arm: vLLM's class twice, ours, and ours with each of `options` (arguments of `vllm.LLM`).

    Args:
        plain: The model of the arms without option, which have to be alike; left out, that of all.
    """
    model = plain or trial.model
    intree, ours = {**trial.env, USE_INTREE: "1"}, {**trial.env, USE_INTREE: "0"}
    found = {
        IN_TREE: replace(trial, model=model, env=intree),
        AGAIN: replace(trial, model=model, env=intree),
        PLUGIN: replace(trial, model=model, env=ours),
    }
    for name, engine in options.items():
        found[name] = replace(trial, env=ours, engine={**trial.engine, **engine})
    return found


def warm_ups(trials: Mapping[str, Trial]) -> dict[str, Trial]:
    """A first, unmeasured run of each arm, which fills the caches of files and of compiled code."""
    return {name: replace(trial, repeats=0) for name, trial in trials.items() if name != AGAIN}


def measure(trial: Trial) -> dict[str, Any]:
    """What runs (`facts`) and the figures (`figures`, by kind and size), from an engine in this process."""
    import psutil
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    from vllm_bailing.bench.worker_extension import EXTENSION

    if current_platform.is_cpu():
        # An engine process of its own would keep a core for itself.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    llm = LLM(
        trial.model,
        **{
            "max_model_len": trial.longest,
            "max_num_seqs": max(trial.batch_sizes),
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "skip_tokenizer_init": True,
            "worker_extension_cls": EXTENSION,
            **trial.engine,
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
    for size in trial.batch_sizes:
        generate(size, trial.prompt_tokens, trial.output_tokens)
        found = [generate(size, trial.prompt_tokens, trial.output_tokens)[1] for _ in range(trial.repeats)]
        if found:
            taken = [_decoding(metrics, trial.output_tokens) for metrics in found]
            for kind, values in zip(("decode", "TTFT", "TPOT"), zip(*taken, strict=True), strict=True):
                figures[f"{kind} {size}"] = statistics.median(values)
    for length in trial.prefill:
        generate(1, length, 1)
        seconds = [generate(1, length, 1)[0] for _ in range(trial.repeats)]
        if seconds:
            figures[f"prefill {length}"] = length / statistics.median(seconds)

    costs = llm.collective_rpc("bailing_costs")
    figures["load"] = max(cost["load_s"] for cost in costs)
    figures["start"] = started_s
    on_gpu = [cost["gpu_bytes"] - cost["kv_bytes"] for cost in costs if "gpu_bytes" in cost]
    on_cpu = peak_memory(psutil.Process()) - sum(cost["kv_bytes"] for cost in costs)
    figures["memory"] = max(on_gpu, default=on_cpu) / 1e9
    return {"facts": llm.collective_rpc("bailing_facts")[0], "figures": figures}


def _decoding(metrics: list[Any], tokens: int) -> tuple[float, float, float]:
    """Decoding in tokens/s, median time to first token and per token after it in ms, of requests that ran at once."""
    # The stamps of tokens are those of the engine, so that they leave out what the caller does with a finished batch.
    seconds = max(one.last_token_ts for one in metrics) - min(one.first_token_ts for one in metrics)
    each = [(one.last_token_ts - one.first_token_ts) / (tokens - 1) for one in metrics]
    first = statistics.median(one.first_token_latency for one in metrics)
    return len(metrics) * (tokens - 1) / seconds, 1000 * first, 1000 * statistics.median(each)


def peak_memory(process: Any) -> int:
    """Bytes: the sum of the peaks of a `psutil.Process` and all below it; pages that they share count in each."""
    peaks = []
    for one in [process, *process.children(recursive=True)]:
        for line in Path(f"/proc/{one.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peaks.append(1024 * int(line.split()[1]))
    return sum(peaks)


class Referee:
    """Refuses a comparison whose arms do not run what their names say; for `bench.alternate`.

    Attributes:
        facts: What each arm runs.
        notes: What an option, or the plugin's own settings, changed besides.
    """

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []

    def __call__(self, arm: str, result: dict[str, Any]) -> None:
        """Check what `arm` ran.

        Raises:
            BenchError: If it is another model class, or other kernels than those of `in-tree` in an arm without option.
        """
        facts = result["facts"]
        package = _PACKAGES.get(arm, OURS)
        if not facts["model"].startswith(package):
            raise BenchError(
                f"the arm {arm!r} ran {facts['model']} and not a class of {package.rstrip('.')}; "
                "`vllm-bailing info` says why"
            )
        if arm in self.facts:
            return
        self.facts[arm] = facts
        base = self.facts[IN_TREE]
        for key in _SAME:
            if facts[key] == base[key]:
                continue
            ours = key == "experts" and all(kernel.startswith(OURS) for kernel in facts[key].split(", "))
            if arm in (AGAIN, PLUGIN) and not ours:
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
    trials: Mapping[str, Trial],
    facts: Mapping[str, dict[str, Any]],
    config: BailingMoeV2Config,
    bytes_per_s: float,
    ranks: int = 1,
) -> dict[str, dict[str, float]]:
    """Per decode figure and arm, the speed as a share of what `ranks` that read `bytes_per_s` each allow.

    Only for arms whose steps are those of the configuration: without speculation, quantisation or overrides.
    """
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        (kind, _, size), trial, runs = row["figure"].partition(" "), trials[row["arm"]], facts[row["arm"]]
        if kind != "decode" or runs["quantization"] or {"speculative_config", "hf_overrides"} & set(trial.engine):
            continue
        context = trial.prompt_tokens + trial.output_tokens // 2
        step_s = step_bytes(config, short_dtype(runs["dtype"]), ranks, context, int(size)) / bytes_per_s
        shares.setdefault(row["figure"], {})[row["arm"]] = row["median"] * step_s / int(size)
    return shares


def run(
    trial: Trial,
    options: Mapping[str, dict[str, Any]],
    rounds: int,
    warm_up: bool = True,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """Measure every arm and draw the conclusions.

    Args:
        trial: What to measure; the arms differ from it in environment and options.
        options: Of the further arms.
        warm_up: Whether every arm starts once before, unmeasured.
        bandwidth: Of the memory of one rank, in TB/s; left out, that of the GPU if it is a known one.
    Returns:
        `machine`, `arms` (what each ran), `notes`, `rows` (see `summarize`), `roofline` (see `roofline_shares`).
    Raises:
        BenchError: If the model takes no such prompts, an engine failed, or an arm did not run what its name says.
    """
    window = load_config(trial.model).max_position_embeddings
    if trial.longest > window and not {"max_model_len", "hf_overrides"} & trial.engine.keys():
        raise BenchError(
            f"the longest request takes {trial.longest} tokens with its answer, and the model's window has {window}; "
            "lower --prefill, --prompt-tokens or --output-tokens"
        )
    with tempfile.TemporaryDirectory() as folder:
        plain = trial.model if trial.engine.get("load_format") == "dummy" else without_mtp(trial.model, Path(folder))
        trials, referee = arms(trial, options, plain), Referee()
        if warm_up:
            alternate(warm_ups(trials), 1, referee, "warm-up")
        results = alternate(trials, rounds, referee)
    rows = summarize(results)
    device = referee.facts[IN_TREE]["device"]
    bandwidth = bandwidth or known_bandwidth(device)
    roofline = {}
    if bandwidth:
        ranks = trial.engine.get("tensor_parallel_size", 1)
        roofline = {
            "terabytes_per_s_of_a_rank": bandwidth,
            "shares": roofline_shares(rows, trials, referee.facts, load_config(trial.model), bandwidth * 1e12, ranks),
        }
    return {
        "machine": {**machine(), "device": device},
        "arms": referee.facts,
        "notes": referee.notes,
        "rows": rows,
        "roofline": roofline,
    }
