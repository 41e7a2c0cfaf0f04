"""The target's hidden states over its answers, recorded once in bounded files, and the batches made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from vllm_bailing.json_files import write_json
from vllm_bailing.planning.training import STATE_BYTES
from vllm_bailing.training.answers import Answer

CHUNK_BYTES = 2**28
BATCH_TOKENS = 4096  # that the target reads at once, with padding
_INDEX = "index.json"


@dataclass(frozen=True)
class Example:
    """A prompt with its answer, and where its states are.

    Attributes:
        first: Index of the answer's first token.
    """

    ids: list[int]
    first: int
    kind: str
    held_out: bool
    file: str = ""
    start: int = 0


@torch.no_grad()
def record(
    target: Any, answers: list[Answer], max_length: int, folder: Path, progress: Callable[[int], object]
) -> list[Example]:
    """Write the hidden states after the final norm, which is what the MTP layer is fed, of every answer and its prompt.

    Args:
        target: A `BailingMoeV2ForCausalLM`.
        max_length: Tokens of an example; of a longer one, the beginning of the prompt is left out.
        progress: Called with the number of answers that were done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    examples: list[Example] = []
    chunk: list[Tensor] = []
    size = number = 0

    def flush() -> None:
        nonlocal chunk, size, number
        if chunk:
            save_file({"hidden_states": torch.cat(chunk)}, folder / f"states-{number:05d}.safetensors")
        chunk, size, number = [], 0, number + 1

    for batch in _batches(answers, max_length):
        width = max(len(prompt) + len(said) for _, prompt, said in batch)
        # Padding on the right, which causal attention never sees.
        ids = torch.tensor([[*prompt, *said] + [0] * (width - len(prompt) - len(said)) for _, prompt, said in batch])
        found = target.model(ids.to(target.device), use_cache=False).last_hidden_state
        for row, (answer, prompt, said) in zip(found, batch, strict=True):
            token_ids, file = [*prompt, *said], f"states-{number:05d}.safetensors"
            examples.append(Example(token_ids, len(prompt), answer.kind, answer.held_out, file, size))
            chunk.append(row[: len(token_ids)].bfloat16().cpu())
            size += len(token_ids)
        if size * found.shape[2] * STATE_BYTES >= CHUNK_BYTES:
            flush()
        progress(len(batch))
    flush()
    rows = [vars(example) for example in examples]
    write_json(folder / _INDEX, rows)
    return examples


def _batches(answers: list[Answer], max_length: int) -> Iterator[list[tuple[Answer, list[int], list[int]]]]:
    """Answers of like length with the prompt and answer that are kept, `BATCH_TOKENS` together."""
    rows = []
    for answer in answers:
        said = answer.token_ids[: max_length - 1]
        rows.append((answer, answer.prompt_token_ids[-(max_length - len(said)) :], said))
    rows.sort(key=lambda row: len(row[1]) + len(row[2]))
    batch: list[tuple[Answer, list[int], list[int]]] = []
    for row in rows:
        if batch and (len(batch) + 1) * (len(row[1]) + len(row[2])) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def recorded(folder: Path) -> list[Example] | None:
    """What `record` wrote; None if it has not ended."""
    file = folder / _INDEX
    return [Example(**row) for row in json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else None


def share(examples: list[Example], rank: int, ranks: int) -> list[Example]:
    """Every so many of the examples, for one of several ranks.

    All get as many: where that does not work out, some get one that has no answer, which counts for nothing.
    """
    empty = [replace(one, ids=one.ids[:1]) for one in examples[:1]]
    return [*examples, *empty * (-len(examples) % ranks)][rank::ranks]


class States(Dataset[dict[str, Any]]):
    """Recorded examples, read from disk when they are asked for."""

    def __init__(self, folder: Path, examples: list[Example]) -> None:
        self.folder, self.examples = folder, examples
        self._files: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(self.examples[index])

    def read(self, example: Example) -> dict[str, Any]:
        """A row for `collate`."""
        if example.file not in self._files:
            self._files[example.file] = safe_open(self.folder / example.file, framework="pt")
        whole = self._files[example.file].get_slice("hidden_states")
        states = whole[example.start : example.start + len(example.ids)]
        return {"input_ids": example.ids, "hidden_states": states, "first": example.first}


class Batches(Dataset[list[dict[str, Any]]]):
    """Recorded examples in batches of like length, which waste little on padding.

    Which belong together is fixed, so that the order of a run that goes on is that of one that was not interrupted.

    Args:
        size: Examples of a batch, of which each of `ranks` gets its share.
    """

    def __init__(self, states: States, size: int, rank: int = 0, ranks: int = 1) -> None:
        self.states = states
        order = sorted(states.examples, key=lambda example: len(example.ids))
        self.batches = [share(order[start : start + size], rank, ranks) for start in range(0, len(order), size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.states.read(example) for example in self.batches[index]]


def collate(rows: list[Any]) -> dict[str, Tensor]:
    """A batch: rows of `States`, or one of `Batches`, padded on the right, which causal attention never sees.

    Returns:
        `input_ids` [B, T] int64, `hidden_states` [B, T, H] bfloat16, `labels` [B, T] bool: the answer's tokens, and
        `lengths` [B] int64: tokens without padding.
    """
    rows = rows[0] if isinstance(rows[0], list) else rows
    width = max(2, *(len(row["input_ids"]) for row in rows))
    size = rows[0]["hidden_states"].shape[1]
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    states = torch.zeros(len(rows), width, size, dtype=torch.bfloat16)
    labels = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[number, :length] = torch.tensor(row["input_ids"])
        states[number, :length] = row["hidden_states"]
        labels[number, row["first"] : length] = True
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return {"input_ids": ids, "hidden_states": states, "labels": labels, "lengths": lengths}
