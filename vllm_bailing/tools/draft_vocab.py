"""The tokens that an MTP draft may propose: the most frequent ones of a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_bailing.config import register_with_transformers
from vllm_bailing.folders import nowhere
from vllm_bailing.json_files import NotText, read_text, write_json
from vllm_bailing.tools.prompts import read_tokenizer


@dataclass(frozen=True)
class ChosenTokens:
    """A draft's vocabulary.

    Attributes:
        token_ids: The ids that are kept, in ascending order.
        vocabulary: Number of tokens that the tokenizer has.
        coverage: Share of the text's tokens that are kept, 0 to 1.
    """

    token_ids: list[int]
    vocabulary: int
    coverage: float


def choose_tokens(model: str, files: Iterable[Path], size: int) -> ChosenTokens:
    """The `size` most frequent tokens of `files` in the tokenizer of `model`, all special ones among them.

    Raises:
        ValueError: If there is no tokenizer, a file is no text, or there is no text at all.
    """
    if reason := nowhere(model):
        raise ValueError(reason)
    register_with_transformers()
    tokenizer = read_tokenizer(model, "name its checkpoint")
    counts: Counter[int] = Counter()
    for file in files:
        try:
            text = read_text(file)
        except NotText as error:
            raise ValueError(f"--text {file} is no text: it {error}; name a text file in UTF-8") from None
        except ValueError as error:
            raise ValueError(f"--text {file} {error}; name a text file in UTF-8") from None
        for line in text.splitlines(keepends=True):
            counts.update(tokenizer.encode(line, add_special_tokens=False))
    if not counts:
        raise ValueError("--text is empty; name text like that which the model will write")
    kept = most_frequent(counts, tokenizer, size)
    return ChosenTokens(kept, len(tokenizer), coverage(counts, kept))


def most_frequent(counts: Counter[int], tokenizer: Any, size: int) -> list[int]:
    """The `size` most frequent token ids, ascending, all special ones of `tokenizer` among them.

    Every answer ends with a special token, however rare these are in a text.
    """
    special = [token for token in tokenizer.all_special_ids if token is not None]  # None: named, but in no vocabulary
    return sorted(list(dict.fromkeys([*special, *(token for token, _ in counts.most_common(size))]))[:size])


def coverage(counts: Counter[int], kept: Iterable[int]) -> float:
    """Share of what was counted that `kept` holds, 0 to 1."""
    return sum(counts[token] for token in kept) / max(1, counts.total())


def write_tokens(file: Path, token_ids: list[int]) -> None:
    """Write the ids as `bailing_draft_vocab` of `--additional-config` reads them."""
    write_json(file, token_ids)
