"""How many draft tokens of the MTP layer pay: speed and acceptance at each number of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm_bailing.bench.statistics import wilson
from vllm_bailing.plugin.options import DRAFT_VOCABULARY
from vllm_bailing.tools.prompts import Prompt
from vllm_bailing.tools.task import Task

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
NO_DRAFTS = "0"  # the arm that does not speculate
VOCABULARY = "draft_vocab"
MIN_SECONDS = 3.0  # of a measurement with drafts; shorter ones mostly measure what else the machine does


@dataclass
class Measurement:
    """One batch size in one process: all prompts, as often as `MIN_SECONDS` takes.

    Attributes:
        tokens: Tokens generated.
        seconds: From the first request to the last answer.
        drafts, accepted: Drafts made, and draft tokens accepted at each position.
        checksum: Of the token ids of all answers, the first time.
        kinds: Drafts and accepted tokens of the prompts of each kind alone, which were answered once more.
    """

    tokens: int
    seconds: float
    drafts: int = 0
    accepted: list[int] = field(default_factory=list)
    checksum: int = 0
    kinds: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass
class MtpTask(Task):
    """Answers to the same prompts at each batch size, from one engine.

    Attributes:
        batch_sizes: Requests that run at once; each size is measured in turn.
        prompts: User messages, or `Prompt`s as dictionaries; sent through the chat template, or as plain text where the
            model has none.
        max_tokens: Most tokens of an answer.
        ignore_eos: Whether every answer goes on to that limit.
    """

    batch_sizes: list[int]
    prompts: list[Any]
    max_tokens: int
    ignore_eos: bool = False

    def work(self) -> dict[int, dict[str, Any]]:
        return {size: asdict(measurement) for size, measurement in measure(self).items()}

    def read(self, stored: dict[str, Any]) -> dict[int, Measurement]:
        return {int(size): Measurement(**fields) for size, fields in stored.items()}


def measure(task: MtpTask) -> dict[int, Measurement]:
    """Measure every batch size in this process, which needs vLLM."""
    import zlib

    from vllm import LLM, SamplingParams

    options = {"max_num_seqs": max(task.batch_sizes), "disable_log_stats": False, **task.engine}
    llm = LLM(task.model, **options)
    params = SamplingParams(temperature=0, max_tokens=task.max_tokens, ignore_eos=task.ignore_eos)
    asked = [prompt_of(prompt) for prompt in task.prompts]
    requests: list[Any] = [{"prompt_token_ids": prompt.token_ids(llm.get_tokenizer())} for prompt in asked]

    def counters() -> tuple[int, list[int]]:
        metrics: dict[str, Any] = {metric.name: metric for metric in llm.get_metrics()}
        drafts = metrics.get("vllm:spec_decode_num_drafts")
        accepted = metrics.get("vllm:spec_decode_num_accepted_tokens_per_pos")
        return (drafts.value if drafts else 0), (list(accepted.values) if accepted else [])

    def generate(batch_size: int, requests: list[Any] = requests) -> tuple[int, int]:
        tokens, checksum = 0, 0
        for start in range(0, len(requests), batch_size):
            for output in llm.generate(requests[start : start + batch_size], params, use_tqdm=False):
                ids = output.outputs[0].token_ids
                tokens += len(ids)
                checksum = zlib.crc32(repr(list(ids)).encode(), checksum)
        return tokens, checksum

    results = {}
    for batch_size in task.batch_sizes:
        generate(batch_size)  # the first round compiles, captures and fills caches
        drafts_before, accepted_before = counters()
        started = time.perf_counter()
        tokens, checksum = generate(batch_size)
        while (seconds := time.perf_counter() - started) < MIN_SECONDS:
            tokens += generate(batch_size)[0]
        drafts, accepted = difference(counters(), (drafts_before, accepted_before))
        results[batch_size] = Measurement(tokens, seconds, drafts, accepted, checksum)
    kinds = {prompt.kind for prompt in asked} - {""} if "speculative_config" in task.engine else set()
    for kind in sorted(kinds):
        before = counters()
        of_kind = [one for one, prompt in zip(requests, asked, strict=True) if prompt.kind == kind]
        generate(max(task.batch_sizes), of_kind)
        results[max(task.batch_sizes)].kinds[kind] = difference(counters(), before)
    return results


def prompt_of(value: Any) -> Prompt:
    """A prompt of `MtpTask.prompts`."""
    return Prompt([{"role": "user", "content": value}]) if isinstance(value, str) else Prompt(**value)


def difference(now: tuple[int, list[int]], before: tuple[int, list[int]]) -> tuple[int, list[int]]:
    """Drafts and accepted tokens by position between two readings; the first may come before any draft."""
    past = before[1] or [0] * len(now[1])
    return now[0] - before[0], [count - old for count, old in zip(now[1], past, strict=True)]


def mtp_tasks(
    task: MtpTask,
    draft_tokens: list[int],
    acceptance: float | None = None,
    drafts: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, MtpTask]:
    """`task` for each arm, which is a number of draft tokens of a kind of draft; 0 does not speculate.

    Args:
        acceptance: Chance of a draft token to be accepted after those before it; vLLM then draws instead of comparing,
            and answers mean nothing.
        drafts: The kinds by name ("" alone if there is one): further keys of the speculative configuration, such as
            `model`; and `VOCABULARY`, a file of `vllm-bailing draft-vocab`.
    """
    synthetic: dict[str, Any] = {}
    tasks = {NO_DRAFTS: replace(task, ignore_eos=task.ignore_eos or acceptance is not None)}
    for name, keys in (drafts or {"": {}}).items():
        for count in filter(None, draft_tokens):
            if acceptance is not None:
                rates = [acceptance ** (i + 1) for i in range(count)]
                synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates}
            further = {key: value for key, value in keys.items() if key != VOCABULARY}
            speculation = {"method": "mtp", "num_speculative_tokens": count, **further, **synthetic}
            engine = {**task.engine, "speculative_config": speculation}
            if VOCABULARY in keys:
                engine["additional_config"] = {
                    **engine.get("additional_config", {}), DRAFT_VOCABULARY: keys[VOCABULARY]
                }  # fmt: skip
            tasks[f"{count} {name}".strip()] = replace(tasks[NO_DRAFTS], engine=engine)
    return tasks


def summarize(results: dict[str, list[dict[int, Measurement]]], baseline: str) -> list[dict[str, Any]]:
    """One row per batch size and arm, an arm being a number of draft tokens and, if there are several, a kind of draft.

    Speed is the median over rounds with its range; `ratio` is that of the arm to `baseline` in the same round, median
    and range. `acceptance` has, per draft position, the share of drafts accepted up to there, and `interval` the 95 %
    interval of each; `kinds` both for each kind of text; `acceptance_length` is the mean number of tokens that a step
    of the target yields.
    """
    rows = []
    for size in results[baseline][0]:
        base = [measured[size] for measured in results[baseline]]
        for arm, rounds in results.items():
            measurements = [measured[size] for measured in rounds]
            pairs = zip(measurements, base, strict=True)
            drafts = sum(one.drafts for one in measurements)
            accepted = [sum(position) for position in zip(*(one.accepted for one in measurements), strict=True)]
            rows.append(
                {
                    "batch_size": size,
                    "arm": arm,
                    "tokens_per_second": _spread([one.speed for one in measurements]),
                    "ratio": _spread([mine.speed / other.speed for mine, other in pairs]),
                    **acceptance_of(drafts, accepted if drafts else []),
                    "kinds": _by_kind(measurements),
                    "acceptance_length": 1 + sum(accepted) / drafts if drafts else 1.0,
                    "same_answers": {one.checksum for one in measurements} == {one.checksum for one in base},
                }
            )
    return rows


def _by_kind(measurements: list[Measurement]) -> dict[str, dict[str, Any]]:
    result = {}
    for kind in measurements[0].kinds:
        counts = [one.kinds[kind] for one in measurements]
        accepted = [sum(position) for position in zip(*(one[1] for one in counts), strict=True)]
        result[kind] = acceptance_of(sum(one[0] for one in counts), accepted)
    return result


def acceptance_of(drafts: int, accepted: list[int]) -> dict[str, Any]:
    """`drafts`, and by position `acceptance` and its `interval`."""
    return {
        "drafts": drafts,
        "acceptance": [count / drafts if drafts else 0.0 for count in accepted],
        "interval": [wilson(count, drafts) for count in accepted],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def of_arm(name: str) -> tuple[int, str]:
    """Draft tokens per step of an arm of `mtp_tasks`, and the name of their kind, "" if there is one kind."""
    count, _, draft = name.partition(" ")
    return int(count), draft


def deepest_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each kind of draft, the row with most draft tokens, at the largest batch."""
    deepest: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (of_arm(row["arm"])[0], row["batch_size"])):
        if row["arm"] != NO_DRAFTS:
            deepest[of_arm(row["arm"])[1]] = row
    return deepest


def advice(rows: list[dict[str, Any]], baseline: str) -> dict[int, str]:
    """For each batch size, which number of draft tokens to use, in words."""
    sentences = {}
    for size in dict.fromkeys(row["batch_size"] for row in rows):
        arms = [row for row in rows if row["batch_size"] == size and row["arm"] != baseline]
        best = max(arms, key=lambda row: row["ratio"]["median"], default=None)
        if best is None or best["ratio"]["low"] <= 1:
            sentences[size] = "no number of draft tokens was faster in every round: serve without speculation"
        else:
            count, draft = of_arm(best["arm"])
            choice = f"num_speculative_tokens={count}" + (f" with {draft}" if draft else "")
            sentences[size] = f"{choice}: {best['ratio']['median']:.2f} times as fast"
    return sentences
