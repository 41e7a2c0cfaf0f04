"""Timed comparisons of vLLM engines that differ in one thing, each in a fresh process, alternating.

Run as a module this file is the worker: it reads a `Task` as JSON from standard input and writes what that measured to
the file that the task names.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

DEFAULT_PROMPTS = (
    "What is YaRN?",
    "Tell me about vLLM.",
    "What is a mixture of experts?",
    "Explain the expert bias.",
    "What is speculative decoding?",
    "How do I serve a model?",
    "Describe thinking mode.",
    "What is Ling-flash-2.0?",
)
MIN_SECONDS = 3.0  # of a measurement with drafts; shorter ones mostly measure what else the machine does


class BenchError(RuntimeError):
    """An engine did not start or did not answer; the message ends with its last words."""


@dataclass
class Task(ABC):
    """What one process measures; every field has to fit into JSON.

    Attributes:
        model: As for `vllm serve`.
        engine: Further arguments of `vllm.LLM`.
        env: Environment variables of the process, besides those of this one.
        out: File for the result.
    """

    model: str
    engine: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict, kw_only=True)
    out: str = field(default="", kw_only=True)

    @abstractmethod
    def work(self) -> Any:
        """Measure in this process, which needs vLLM; the result has to fit into JSON."""

    def read(self, found: Any) -> Any:
        """The result of `work`, back from JSON."""
        return found


@dataclass
class Measurement:
    """One batch size in one process: all prompts, as often as `MIN_SECONDS` takes.

    Attributes:
        tokens: Tokens generated.
        seconds: From the first request to the last answer.
        drafts, accepted: Drafts made, and draft tokens accepted at each position.
        answers: Checksum of the token ids of the first time.
    """

    tokens: int
    seconds: float
    drafts: int = 0
    accepted: list[int] = field(default_factory=list)
    answers: int = 0


@dataclass
class Job(Task):
    """Answers to the same prompts at each batch size.

    Attributes:
        batch_sizes: Requests that run at once; each size is measured in turn.
        prompts: User messages, sent through the chat template; without one, as plain text.
        max_tokens: Limit of an answer.
        ignore_eos: Whether answers go on to that limit.
    """

    batch_sizes: list[int]
    prompts: list[str]
    max_tokens: int
    ignore_eos: bool = False

    def work(self) -> dict[int, dict[str, Any]]:
        return {size: asdict(row) for size, row in answer(self).items()}

    def read(self, found: dict[str, Any]) -> dict[int, Measurement]:
        return {int(size): Measurement(**row) for size, row in found.items()}


def answer(job: Job) -> dict[int, Measurement]:
    """Measure in this process; needs vLLM."""
    import zlib

    from vllm import LLM, SamplingParams

    options = {"max_num_seqs": max(job.batch_sizes), "disable_log_stats": False, **job.engine}
    llm = LLM(job.model, **options)
    params = SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=job.ignore_eos)
    tokenizer = llm.get_tokenizer()
    requests: list[Any] = list(job.prompts)
    if getattr(tokenizer, "chat_template", None):
        requests = [
            {
                "prompt_token_ids": tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
                )
            }
            for prompt in job.prompts
        ]

    def counters() -> tuple[int, list[int]]:
        found: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
        drafts = found.get("vllm:spec_decode_num_drafts")
        accepted = found.get("vllm:spec_decode_num_accepted_tokens_per_pos")
        return (drafts.value if drafts else 0), (list(accepted.values) if accepted else [])

    def generate(batch_size: int) -> tuple[int, int]:
        tokens, checksum = 0, 0
        for start in range(0, len(requests), batch_size):
            for output in llm.generate(requests[start : start + batch_size], params, use_tqdm=False):
                ids = output.outputs[0].token_ids
                tokens += len(ids)
                checksum = zlib.crc32(repr(list(ids)).encode(), checksum)
        return tokens, checksum

    results = {}
    for batch_size in job.batch_sizes:
        generate(batch_size)  # the first round compiles, captures and fills caches
        drafts_before, accepted_before = counters()
        started = time.perf_counter()
        tokens, checksum = generate(batch_size)
        while (seconds := time.perf_counter() - started) < MIN_SECONDS:
            tokens += generate(batch_size)[0]
        drafts, accepted = counters()
        results[batch_size] = Measurement(
            tokens,
            seconds,
            drafts - drafts_before,
            [now - before for now, before in zip(accepted, accepted_before, strict=True)],
            checksum,
        )
    return results


def run_job(task: Task) -> Any:
    """Measure in a fresh process.

    Raises:
        BenchError: If that failed.
    """
    # GiB for the KV cache of vLLM's CPU build, which otherwise wants nearly all memory; GPUs do not look at it.
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "4"}
    with tempfile.TemporaryDirectory() as folder:
        task = replace(task, out=str(Path(folder) / "result.json"))
        name = f"{type(task).__module__}:{type(task).__qualname__}"
        log = Path(folder) / "log"
        with log.open("w") as stream:
            done = subprocess.run(
                [sys.executable, "-m", "vllm_bailing.bench"],
                input=json.dumps({"task": name, "fields": asdict(task)}),
                text=True,
                stdout=stream,
                stderr=stream,
                env={**defaults, **os.environ, **task.env},
                check=False,
            )
        if done.returncode or not Path(task.out).is_file():
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            found = [match[0] for line in lines if (match := re.search(r"\w+Error: .*", line))]
            # The engine's own error comes first; what follows only says that the engine is gone.
            raise BenchError("\n".join(found[:1] or lines[-5:]))
        return task.read(json.loads(Path(task.out).read_text()))


def turns(names: Iterable[str], rounds: int) -> list[str]:
    """Every name once a round, in turned order every other round, so that a slow drift of the machine cancels out."""
    order = list(names)
    return [name for number in range(rounds) for name in (order if number % 2 == 0 else order[::-1])]


def alternate(
    jobs: Mapping[str, Task], rounds: int, check: Callable[[str, Any], None] | None = None, what: str = "engines"
) -> dict[str, list[Any]]:
    """Run every job once a round in `turns`, with a progress bar on standard error.

    Args:
        check: Is given the name and the result of every job that ran, and may raise.
        what: Stands before the progress bar.
    Raises:
        BenchError: If one of them failed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: dict[str, list[Any]] = {name: [] for name in jobs}
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=rounds * len(jobs))
        for name in turns(jobs, rounds):
            results[name].append(run_job(jobs[name]))
            if check is not None:
                check(name, results[name][-1])
            progress.advance(bar)
    return results


# --- speculation by MTP -------------------------------------------------------------------------------------------


def mtp_jobs(
    job: Job,
    draft_tokens: list[int],
    acceptance: float | None = None,
    draft: dict[str, Any] | None = None,
    draft_vocab: str | None = None,
) -> dict[str, Job]:
    """`job` with each number of draft tokens; 0 does not speculate.

    Args:
        acceptance: Chance of a draft token to be accepted after those before it; vLLM then draws instead of comparing,
            and answers mean nothing.
        draft: Further keys of the speculative configuration, such as `model`.
        draft_vocab: File of `vllm-bailing draft-vocab`, for the jobs that speculate.
    """
    jobs = {}
    for count in draft_tokens:
        speculation: dict[str, Any] = {"method": "mtp", "num_speculative_tokens": count, **(draft or {})}
        if acceptance is not None:
            speculation["rejection_sample_method"] = "synthetic"
            speculation["synthetic_acceptance_rates"] = [acceptance ** (i + 1) for i in range(count)]
        engine = {**job.engine, "speculative_config": speculation} if count else job.engine
        if count and draft_vocab is not None:
            engine["additional_config"] = {**engine.get("additional_config", {}), "bailing_draft_vocab": draft_vocab}
        jobs[str(count)] = replace(job, engine=engine, ignore_eos=job.ignore_eos or acceptance is not None)
    return jobs


def summarize(results: dict[str, list[dict[int, Measurement]]], baseline: str) -> list[dict[str, Any]]:
    """One row per batch size and arm.

    Speed is the median over rounds with its range; `ratio` is that of the arm to `baseline` in the same round, median
    and range. `acceptance` has, per draft position, the share of drafts accepted up to there; `acceptance_length` is
    the mean number of tokens that a step of the target yields.
    """
    rows = []
    for size in next(iter(results.values()))[0]:
        for name, rounds in results.items():
            speeds = [one[size].tokens / one[size].seconds for one in rounds]
            base = [one[size].tokens / one[size].seconds for one in results[baseline]]
            ratios = [mine / other for mine, other in zip(speeds, base, strict=True)]
            drafts = sum(one[size].drafts for one in rounds)
            accepted = [sum(column) for column in zip(*(one[size].accepted for one in rounds), strict=True)]
            rows.append(
                {
                    "batch_size": size,
                    "arm": name,
                    "tokens_per_second": _spread(speeds),
                    "ratio": _spread(ratios),
                    "acceptance": [count / drafts for count in accepted] if drafts else [],
                    "acceptance_length": 1 + sum(accepted) / drafts if drafts else 1.0,
                    "same_answers": {one[size].answers for one in rounds}
                    == {one[size].answers for one in results[baseline]},
                }
            )
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def advice(rows: list[dict[str, Any]], baseline: str) -> dict[int, str]:
    """For each batch size, which number of draft tokens to use, in words."""
    told = {}
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        arms = [row for row in rows if row["batch_size"] == size and row["arm"] != baseline]
        best = max(arms, key=lambda row: row["ratio"]["median"], default=None)
        if best is None or best["ratio"]["low"] <= 1:
            told[size] = "no number of draft tokens was faster in every round: serve without speculation"
        else:
            told[size] = f"num_speculative_tokens={best['arm']}: {best['ratio']['median']:.2f} times as fast"
    return told


def plot_mtp(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Speed by number of draft tokens, and acceptance by position.

    Raises:
        ImportError: Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), dpi=100)
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        arms = [row for row in rows if row["batch_size"] == size]
        x = [int(row["arm"]) for row in arms]
        y = [row["ratio"]["median"] for row in arms]
        below = [row["ratio"]["median"] - row["ratio"]["low"] for row in arms]
        above = [row["ratio"]["high"] - row["ratio"]["median"] for row in arms]
        left.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label=f"batch {size}")
        deepest = max(arms, key=lambda row: len(row["acceptance"]))
        positions = range(1, len(deepest["acceptance"]) + 1)
        right.plot(positions, [100 * share for share in deepest["acceptance"]], marker="o", label=f"batch {size}")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="draft tokens per step", ylabel="tokens/s, times no speculation", ylim=(0, None))
    right.set(xlabel="draft position", ylabel="accepted up to here, %", ylim=(0, 105))
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


if __name__ == "__main__":
    received = json.load(sys.stdin)
    todo: Task = pkgutil.resolve_name(received["task"])(**received["fields"])
    Path(todo.out).write_text(json.dumps(todo.work()))
