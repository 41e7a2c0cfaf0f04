"""This package against vLLM's own model class, and against itself with an option: timings, noise floor and verdict.

The arms are `in-tree` (our configuration class, vLLM's model class), `in-tree again` (the same once more: what differs
between the two is noise), `plugin`, and one per option. Each is measured once a round in a fresh process, see `bench`.

vLLM's own `vllm bench latency` starts an engine for every figure. Starting takes longer than measuring, so `Trial`
takes all figures from one engine, with the same `LLM.generate` under the clock.

Dimension letters: T tokens of a step, E routed experts, K experts per token.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm_bailing import planner
from vllm_bailing.bench import BenchError, Task, alternate
from vllm_bailing.compat import USE_INTREE
from vllm_bailing.config import ARCHITECTURE, MODEL_TYPE, BailingMoeV2Config, read_config
from vllm_bailing.weights import Checkpoint, layer_of, main_tensors

IN_TREE, AGAIN, PLUGIN = "in-tree", "in-tree again", "plugin"
OURS = "vllm_bailing."  # what the names of this package's classes start with
_PACKAGES = {IN_TREE: "vllm.", AGAIN: "vllm."}  # of the model class of an arm; of all others it is this one
_SAME = ("experts", "attention", "dtype", "quantization", "compilation", "graphs", "runner", "device")
SEED = 0
# Below this many rounds, the lowest and the highest of them enclose the median less often than 94 times in 100.
ROUNDS_FOR_A_VERDICT = 5
_DRAWS = 10_000


@dataclass(frozen=True)
class Kind:
    """A kind of figure: its unit, whether more of it is better, and the verdicts."""

    unit: str
    more_is_better: bool
    better: str = "faster"
    worse: str = "slower"


KINDS = {
    "decode": Kind("tok/s", True),
    "prefill": Kind("tok/s", True),
    "TTFT": Kind("ms", False),
    "TPOT": Kind("ms", False),
    "load": Kind("s", False),
    "start": Kind("s", False),
    "memory": Kind("GB", False, "less", "more"),
}
EXPLANATION = (
    "decode N, TTFT N, TPOT N: N requests at once; prefill N: one prompt of N tokens. TTFT: time to first token. TPOT: "
    "time per output token after it. load: weights. start: of the process until it answers. memory: peak without the "
    "KV cache; on GPUs of one rank. ratio: paired by round, above 1 is better."
)


# --- models --------------------------------------------------------------------------------------------------------

_COMMON = {
    "architectures": [ARCHITECTURE],
    "model_type": MODEL_TYPE,
    "torch_dtype": "bfloat16",
    "partial_rotary_factor": 0.5,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 32768,
}
_FLASH = {
    "vocab_size": 157184,
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 256,
    "moe_intermediate_size": 1024,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mini": {  # all of Ling-mini-2.0
        **_COMMON,
        "vocab_size": 157184,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 256,
        "moe_intermediate_size": 512,
    },
    "flash-4L": {**_COMMON, **_FLASH, "num_hidden_layers": 4},  # Ling-flash-2.0 with 4 and 8 of its 32 layers
    "flash-8L": {**_COMMON, **_FLASH, "num_hidden_layers": 8},
    "mid": {  # 454 million parameters, for CPUs
        **_COMMON,
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 2560,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "moe_intermediate_size": 256,
    },
}


def write_shape(name: str, folder: Path, mtp_layers: int = 0) -> None:
    """Write the config.json of a named shape; vLLM fills the weights in with `load_format="dummy"`."""
    config = {**SHAPES[name], "num_nextn_predict_layers": mtp_layers}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_config(model: str) -> BailingMoeV2Config:
    """The configuration of a checkpoint, a folder or a name on the hub.

    Raises:
        BenchError: As `read_config` raises ValueError.
    """
    try:
        return read_config(model)
    except ValueError as error:
        raise BenchError(str(error)) from None


def without_mtp(model: str, folder: Path) -> str:
    """`model`, or where it has MTP layers a copy in `folder` without them: vLLM's own class refuses such checkpoints.

    A checkpoint that has not been fetched from the hub yet stays as it is.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    checkpoint, config = Checkpoint.at(model), load_config(model)
    if checkpoint.folder is None or not checkpoint.layers_behind(config):
        return model
    folder.mkdir(parents=True, exist_ok=True)
    for file in {stored.file for stored in checkpoint.tensors.values()}:
        names = [name for name, stored in checkpoint.tensors.items() if stored.file == file]
        kept = [name for name in names if (layer_of(name) or 0) < config.num_hidden_layers]
        if len(kept) == len(names):
            (folder / file.name).symlink_to(file.resolve())
        elif kept:
            with safe_open(file, framework="pt") as opened:
                save_file({name: opened.get_tensor(name) for name in kept}, folder / file.name, {"format": "pt"})
    stored = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    stored["num_nextn_predict_layers"] = 0
    (folder / "config.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    for file in checkpoint.folder.iterdir():  # the tokenizer's, for instance
        if file.is_file() and ".safetensors" not in file.name and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    return str(folder)


def parameters(config: BailingMoeV2Config) -> int:
    """Number of parameters, MTP layers excluded."""
    return sum(math.prod(shape) for shape in main_tensors(config).values())


# --- arms ----------------------------------------------------------------------------------------------------------


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

    from vllm_bailing.probe import EXTENSION

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


# --- statistics ----------------------------------------------------------------------------------------------------


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval (percentiles) of the median of paired ratios.

    With five values it reaches from the lowest to the highest, which enclose the median 94 times in 100.
    """
    drawn = np.random.default_rng(SEED).choice(ratios, size=(_DRAWS, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def judge(ratios: list[float], noise: float, kind: Kind) -> str:
    """The verdict on an arm.

    Args:
        ratios: To `in-tree`, one per round, above 1 where the arm was better.
        noise: How far from 1 the interval of `in-tree again` reaches, as a ratio of at least 1.
    """
    low, high = interval(ratios)
    middle = statistics.median(ratios)
    if len(ratios) < ROUNDS_FOR_A_VERDICT:
        return "few rounds"
    if low <= 1 <= high or 1 / noise <= middle <= noise:
        return "no difference"
    return kind.better if middle > 1 else kind.worse


def summarize(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row per figure and arm: median and range over rounds, ratio to `in-tree`, noise floor and verdict."""
    rows = []
    for figure in results[IN_TREE][0]["figures"]:
        kind = KINDS[figure.split()[0]]
        values = {arm: [one["figures"][figure] for one in rounds] for arm, rounds in results.items()}
        ratios = {arm: _ratios(values[arm], values[IN_TREE], kind) for arm in results}
        low, high = interval(ratios[AGAIN])
        noise = max(high, 1 / low)
        for arm in results:
            verdict = "" if arm in (IN_TREE, AGAIN) else judge(ratios[arm], noise, kind)
            rows.append(
                {
                    "figure": figure,
                    "unit": kind.unit,
                    "arm": arm,
                    "median": statistics.median(values[arm]),
                    "low": min(values[arm]),
                    "high": max(values[arm]),
                    "rounds": values[arm],
                    "ratio": statistics.median(ratios[arm]),
                    "interval": interval(ratios[arm]),
                    "noise": noise,
                    "verdict": verdict,
                }
            )
    return rows


def _ratios(values: list[float], base: list[float], kind: Kind) -> list[float]:
    pairs = zip(values, base, strict=True)
    return [mine / other if kind.more_is_better else other / mine for mine, other in pairs]


# --- roofline ------------------------------------------------------------------------------------------------------

# The planner's GPUs by the names that the driver gives.
DEVICES = {"H100 80GB HBM3": "H100", "H200": "H200", "H20": "H20", "B200": "B200"}


def known_bandwidth(device: str) -> float | None:
    """TB/s of a GPU by its name, or None."""
    known = DEVICES.get(device.removeprefix("NVIDIA "))
    return planner.GPUS[known].bandwidth / 1e12 if known else None


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
        dtype = {"float32": "fp32", "float16": "fp16"}.get(runs["dtype"], "bf16")
        step_s = planner.step_bytes(config, dtype, ranks, context, int(size)) / bytes_per_s
        shares.setdefault(row["figure"], {})[row["arm"]] = row["median"] * step_s / int(size)
    return shares


# --- report --------------------------------------------------------------------------------------------------------


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


def machine() -> dict[str, Any]:
    """The processor and how many of its cores this process may use."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0))}


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Ratios to in-tree with their intervals; the band behind each figure is the noise floor.

    Raises:
        ImportError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = list(dict.fromkeys(row["figure"] for row in rows))
    names = [name for name in dict.fromkeys(row["arm"] for row in rows) if name not in (IN_TREE, AGAIN)]
    width = 0.8 / len(names)
    canvas, axis = pyplot.subplots(figsize=(max(6.0, 0.7 * len(figures) + 3), 3.8), dpi=100)
    for place, figure in enumerate(figures):
        noise = next(row["noise"] for row in rows if row["figure"] == figure)
        label = "noise floor" if place == 0 else None
        axis.fill_between([place - 0.45, place + 0.45], 1 / noise, noise, color="0.85", label=label, zorder=0)
    for index, name in enumerate(names):
        found = [row for row in rows if row["arm"] == name]
        x = [place + (index - (len(names) - 1) / 2) * width for place in range(len(figures))]
        below = [row["ratio"] - row["interval"][0] for row in found]
        above = [row["interval"][1] - row["ratio"] for row in found]
        heights = [row["ratio"] - 1 for row in found]
        axis.bar(x, heights, 0.9 * width, bottom=1, label=name, zorder=2, alpha=0.85)
        axis.errorbar(
            x, [row["ratio"] for row in found], yerr=[below, above], fmt="none", ecolor="black", capsize=3, zorder=3
        )
    axis.axhline(1, color="black", linewidth=0.8, zorder=1)
    axis.set_xticks(range(len(figures)), [figure.replace(" ", "\n") for figure in figures])
    axis.set(ylabel="times in-tree, above 1 is better", title=title)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    axis.margins(x=0.01)
    canvas.tight_layout()
    canvas.savefig(path)
    pyplot.close(canvas)
