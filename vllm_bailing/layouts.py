"""Other tools' layouts of the same weights, turned into that of the published checkpoints.

Only what is exact is turned: names in wrappers, experts stacked into one tensor, a projection split into three, rows of
the vocabulary that an exporter added. What is known but not turned is told apart in `likely_causes.py`. No
nn.Module and no vLLM in here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import CheckpointError
from vllm_bailing.tensor_names import EMBEDDING, HEAD, Shape

if TYPE_CHECKING:  # registering must not import it
    import torch

T = TypeVar("T")

# What PyTorch, trainers and PEFT put around a model, before its names or amid them.
_INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = frozenset((*_INNER_WRAPPERS, "module", "_forward_module", "actor", "policy", "model", "base_model"))
_INNER = re.compile(rf"(?<=\.)(?:{'|'.join(_INNER_WRAPPERS)})\.")
_NAME = re.compile(
    r"(?P<prefix>(?:\w+\.)*?)(?:model\.)?(?P<rest>(?:layers\.\d+|word_embeddings|embed_tokens|lm_head|score)\..+|norm\.weight)"
)
# Modules as Llama and DeepSeek call them, whose tensors are the same.
_RENAMED = (
    ("embed_tokens.", "word_embeddings."),
    (".self_attn.", ".attention."),
    (".attention.o_proj.", ".attention.dense."),
    (".attention.q_norm.", ".attention.query_layernorm."),
    (".attention.k_norm.", ".attention.key_layernorm."),
    (".mlp.gate.e_score_correction_bias", ".mlp.gate.expert_bias"),
    (".mlp.switch_mlp.", ".mlp.experts."),
)
_OF_THE_HEAD = ("lm_head.", "score.")
_MOST_PADDING = 1024  # rows of a vocabulary


def common_prefix(names: Iterable[str]) -> str:
    """What all names of a checkpoint begin with that is not of the model; empty if they do not agree."""
    matches = [_NAME.fullmatch(_INNER.sub("", name)) for name in names]
    prefixes = {match["prefix"] if match else "" for match in matches}
    return prefixes.pop() if len(prefixes) == 1 else ""


def published_name(name: str, prefix: str = "") -> str:
    """The published name of a tensor, or `name` where it follows no pattern that is known.

    Args:
        prefix: What the checkpoint's names begin with, beside the names of wrappers.
    """
    match = _NAME.fullmatch(_INNER.sub("", name))
    if match is None or (match["prefix"] != prefix and not _WRAPPERS.issuperset(match["prefix"].split(".")[:-1])):
        return name
    rest = match["rest"]
    published = rest if rest.startswith(_OF_THE_HEAD) else f"model.{rest}"
    for theirs, ours in _RENAMED:
        published = published.replace(theirs, ours)
    return published


@dataclass(frozen=True)
class Piece:
    """A published tensor, or a part of its rows, that a stored tensor holds.

    Attributes:
        take: Gets it out of the stored tensor.
        number, of: Which part of how many it is, from the top.
    """

    name: str
    shape: Shape
    take: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    number: int = 0
    of: int = 1


def pieces(name: str, shape: Shape, config: BailingMoeV2Config) -> list[Piece]:
    """What a tensor under a published name holds; itself, unless it is of another layout that is known."""
    if name in (EMBEDDING, HEAD):
        return [_without_padding(name, shape, config)]
    for pattern, maker in _LAYOUTS:
        if (match := pattern.fullmatch(name)) and (found := maker(match, shape, config)):
            return found
    return [Piece(name, shape)]


def _without_padding(name: str, shape: Shape, config: BailingMoeV2Config) -> Piece:
    rows, wanted = shape[0] if shape else 0, config.vocab_size
    if shape[1:] != (config.hidden_size,) or not wanted < rows < wanted + _MOST_PADDING or rows % 8:
        return Piece(name, shape)
    return Piece(name, (wanted, config.hidden_size), lambda tensor: tensor[:wanted])


def _stacked(match: re.Match[str], shape: Shape, config: BailingMoeV2Config) -> list[Piece]:
    """Experts [E, outputs, inputs] of one projection, or of `gate_up_proj`: rows of the gate, then of the other."""
    layer, projection = match[1], match[2]
    hidden, width, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    plain = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    if projection != "gate_up_proj":
        if shape != (experts, *plain[projection]) or (projection == "down_proj" and hidden == width):
            return []
        return [
            Piece(f"{layer}.mlp.experts.{expert}.{projection}.weight", shape[1:], _row(expert))
            for expert in range(experts)
        ]
    if shape != (experts, 2 * width, hidden) or hidden == 2 * width:  # might as well be the other way round
        return []
    return [
        Piece(f"{layer}.mlp.experts.{expert}.{name}.weight", (width, hidden), _row(expert, start, start + width))
        for expert in range(experts)
        for name, start in (("gate_proj", 0), ("up_proj", width))
    ]


def _row(index: int, start: int | None = None, end: int | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor[index, start:end]


def _split(match: re.Match[str], shape: Shape, config: BailingMoeV2Config) -> list[Piece]:
    """One of the projections of queries, keys and values, whose rows stand in this order in the published one."""
    layer, which, leaf = match[1], match[2], match[3]
    heads = config.num_attention_heads if which == "q" else config.num_key_value_heads
    if shape != (heads * config.head_dim, config.hidden_size)[: 2 if leaf == "weight" else 1]:
        return []
    return [Piece(f"{layer}.attention.query_key_value.{leaf}", shape, number="qkv".index(which), of=3)]


_LAYOUTS = (
    (re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.((?:gate|up|gate_up|down)_proj)(?:\.weight)?"), _stacked),
    (re.compile(r"(model\.layers\.\d+)\.attention\.(q|k|v)_proj\.(weight|bias)"), _split),
)


def joined(
    stored: Iterable[tuple[str, Shape, T]], config: BailingMoeV2Config, prefix: str = ""
) -> Iterator[tuple[str, list[tuple[Piece, T]]]]:
    """Yield the published tensors that stored ones hold, each with its pieces in the order of their rows.

    What follows no known layout passes as it is, also a part of a tensor whose other parts do not come.

    Args:
        stored: Names, shapes, and whatever stands for their numbers.
        prefix: As for `published_name`.
    Raises:
        CheckpointError: If two tensors are the same one of the published layout.
    """
    came_as: dict[tuple[str, int], str] = {}
    waiting: dict[str, dict[int, tuple[Piece, T]]] = {}
    for stored_name, stored_shape, numbers in stored:
        for piece in pieces(published_name(stored_name, prefix), stored_shape, config):
            first = came_as.setdefault((piece.name, piece.number), stored_name)
            if first != stored_name:
                raise CheckpointError(f"{first} and {stored_name} are both {piece.name}; keep one of them")
            parts = waiting.setdefault(piece.name, {})
            parts[piece.number] = piece, numbers
            if len(parts) == piece.of:
                del waiting[piece.name]
                yield piece.name, [parts[number] for number in range(piece.of)]
    for name, parts in waiting.items():
        for number, part in parts.items():
            yield came_as[name, number], [part]


def as_published(
    weights: Iterable[tuple[str, torch.Tensor]], config: BailingMoeV2Config, prefix: str = ""
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's or an update's tensors in the published layout; as `joined`, whose arguments it takes."""
    import torch

    for name, parts in joined(((name, tuple(tensor.shape), tensor) for name, tensor in weights), config, prefix):
        tensors = [piece.take(tensor) for piece, tensor in parts]
        yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors)
