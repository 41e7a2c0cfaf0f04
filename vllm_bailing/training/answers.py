"""What the target answers: written by vLLM in a process of its own, by the plain model, or read from a file."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_bailing.adapter_audit import CONFIG, read_settings
from vllm_bailing.errors import BenchError, TrainError
from vllm_bailing.planning.request import LORA_RANKS
from vllm_bailing.tools.prompts import json_row, read_lines
from vllm_bailing.tools.task import Task, run_task

_AT_ONCE = 16  # questions that the plain model answers together
_FORM = 'give {"prompt_token_ids": [...], "token_ids": [...]}, and if you like "kind" and "held_out"'


@dataclass(frozen=True)
class Answer:
    """An answer of the target.

    Attributes:
        kind: Of text, for the report.
        held_out: Whether acceptance is measured on it; then it was not sampled, and nothing is learnt from it.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    kind: str = ""
    held_out: bool = False


@dataclass(frozen=True)
class Question:
    """A prompt in tokens, and how it is to be answered: greedily at a temperature of 0."""

    token_ids: list[int]
    kind: str
    held_out: bool
    temperature: float


def chosen(kinds: list[str], share: float, most: int) -> set[int]:
    """Which of several are held out: a `share` of each of their `kinds`, one at least, `most` of all, and never all."""
    order = sorted(range(len(kinds)), key=kinds.__getitem__)  # stable: kinds in runs, of which every so many are taken
    count = max(1, len(set(kinds)), min(most, round(share * len(order))))
    count = min(count, len(order) // 2)
    return {order[number * len(order) // count] for number in range(count)}


def questions_of(
    prompts: Iterable[tuple[list[int], str]], samples: int, temperature: float, share: float, most: int, seed: int
) -> list[Question]:
    """Every prompt once greedily, and `samples` times at `temperature`; those that are held out greedily alone.

    Args:
        prompts: Token ids and kind of each.
        share: Of the prompts that are held out, of every kind alike.
        most: Held-out prompts at most.
    Raises:
        TrainError: If there are fewer than two.
    """
    drawn = list({tuple(ids): kind for ids, kind in prompts}.items())  # a prompt twice could be in both parts
    if len(drawn) < 2:
        raise TrainError("--data has one prompt only; give two at least, one to learn from and one to measure on")
    random.Random(seed).shuffle(drawn)
    held_out = chosen([kind for _, kind in drawn], share, most)
    questions = []
    for number, (ids, kind) in enumerate(drawn):
        is_held = number in held_out
        questions.append(Question(list(ids), kind, is_held, 0.0))
        questions += [Question(list(ids), kind, False, temperature)] * (0 if is_held else samples)
    return questions


@dataclass
class AnswerTask(Task):
    """Answers to questions from one engine, in a process of its own: its memory is free again afterwards.

    Attributes:
        questions: `Question`s as dictionaries.
        adapter: Folder of the adapter that answers; None for the model alone.
    """

    questions: list[dict[str, Any]]
    max_tokens: int
    seed: int
    adapter: str | None = None

    def work(self) -> list[list[int]]:
        from vllm import LLM, SamplingParams

        llm = LLM(self.model, **{"seed": self.seed, **self.engine})
        requests: Any = [{"prompt_token_ids": question["token_ids"]} for question in self.questions]
        # The engine's seed, not one of each request: vLLM 0.32's CPU build ends at those.
        params = [
            SamplingParams(temperature=question["temperature"], max_tokens=self.max_tokens)
            for question in self.questions
        ]
        request = None
        if self.adapter is not None:
            from vllm.lora.request import LoRARequest

            request = LoRARequest("adapter", 1, self.adapter)
        said = llm.generate(requests, params, lora_request=request, use_tqdm=True)
        return [list(output.outputs[0].token_ids) for output in said]


def ask_vllm(
    model: str,
    questions: list[Question],
    max_tokens: int,
    seed: int,
    engine: dict[str, Any],
    adapter: Path | None = None,
) -> list[list[int]]:
    """Token ids of the answers, with the stop token; of the model with `adapter` if there is one.

    Raises:
        TrainError: If the engine did not start or did not answer.
    """
    folder = None
    if adapter is not None:
        folder = str(adapter.absolute())
        rank = read_settings(adapter / CONFIG).highest_rank
        rank = next(allowed for allowed in LORA_RANKS if allowed >= rank)
        engine = {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank, **engine}
    task = AnswerTask(model, engine, [asdict(question) for question in questions], max_tokens, seed, folder)
    try:
        return run_task(task)
    except BenchError as error:
        raise TrainError(
            f"vLLM did not answer the prompts ({error}); give --engine what it needs, or answer with --generator plain"
        ) from None


def ask_plain(
    target: Any, questions: list[Question], max_tokens: int, seed: int, progress: Callable[[int], object]
) -> list[list[int]]:
    """As `ask_vllm`, by the plain model `target`, a few questions of like length at once: for small models."""
    import torch

    torch.manual_seed(seed)
    stops = target.generation_config.eos_token_id
    stops = set(stops if isinstance(stops, list) else [stops])
    answers: list[list[int]] = [[]] * len(questions)
    order = sorted(range(len(questions)), key=lambda n: (questions[n].temperature, len(questions[n].token_ids)))
    for _, group in itertools.groupby(order, key=lambda n: questions[n].temperature):
        numbers = list(group)
        for start in range(0, len(numbers), _AT_ONCE):
            batch = numbers[start : start + _AT_ONCE]
            asked = [questions[number] for number in batch]
            width = max(len(question.token_ids) for question in asked)
            ids = torch.tensor([[0] * (width - len(one.token_ids)) + one.token_ids for one in asked])
            mask = torch.tensor([[0] * (width - len(one.token_ids)) + [1] * len(one.token_ids) for one in asked])
            sampling: dict[str, Any] = {"do_sample": asked[0].temperature > 0}
            if asked[0].temperature > 0:
                sampling |= {"temperature": asked[0].temperature, "top_k": 0, "top_p": 1.0}
            said = target.generate(
                ids.to(target.device),
                attention_mask=mask.to(target.device),
                max_new_tokens=max_tokens,
                pad_token_id=0,
                **sampling,
            )
            for number, row in zip(batch, said[:, width:].tolist(), strict=True):
                end = next((place + 1 for place, token in enumerate(row) if token in stops), len(row))
                answers[number] = row[:end]
            progress(len(batch))
    return answers


def answered(questions: list[Question], token_ids: list[list[int]]) -> list[Answer]:
    """Questions with their answers; those that are too short to draft anything are left out."""
    pairs = zip(questions, token_ids, strict=True)
    return [
        Answer(question.token_ids, ids, question.kind, question.held_out) for question, ids in pairs if len(ids) > 1
    ]


def write_answers(file: Path, answers: Iterable[Answer]) -> None:
    """Write JSONL that `read_answers` reads."""
    file.write_text("".join(f"{json.dumps(asdict(answer))}\n" for answer in answers), encoding="utf-8")


def read_answers(file: Path, vocab_size: int, share: float, most: int) -> list[Answer]:
    """Answers that are ready; if none of them is marked as held out, every so many are taken for it.

    Raises:
        TrainError: If the file cannot be read, or a line is not such an answer.
    """
    answers = []
    try:
        for number, line in read_lines(file):
            where = f"{file}, line {number}"
            row = json_row(line, where, _FORM)
            parts = [row.get("prompt_token_ids"), row.get("token_ids")]
            for ids in parts:
                if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
                    raise ValueError(f"{where} has no lists of token ids; {_FORM}")
                if not all(0 <= one < vocab_size for one in ids):
                    raise ValueError(
                        f"{where} has token {max(ids, key=abs)}, but the target has {vocab_size}; take answers of this "
                        "target"
                    )
            answers.append(Answer(parts[0], parts[1], str(row.get("kind") or ""), bool(row.get("held_out"))))
    except ValueError as error:
        raise TrainError(f"--answers {error}") from None
    answers = [answer for answer in answers if len(answer.token_ids) > 1]
    if len(answers) < 2:
        raise TrainError(f"--answers {file} has {len(answers)} answers of two tokens or more; give at least two")
    if not any(answer.held_out for answer in answers):
        held_out = chosen([answer.kind for answer in answers], share, most)
        answers = [Answer(**{**asdict(one), "held_out": n in held_out}) for n, one in enumerate(answers)]
    if all(answer.held_out for answer in answers):
        raise TrainError(f"--answers {file} marks every answer as held out; leave some to learn from")
    return answers
