"""Which tensors of a checkpoint are refused, and by which rule; which are skipped, by which rule; which are loaded.

What may have happened to a checkpoint whose tensors do not fit is guessed in `likely_causes.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from vllm_bailing.checkpoint import Checkpoint, Kind, damaged_files
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import CheckpointError, Finding, first_of, shown
from vllm_bailing.likely_causes import likely_cause
from vllm_bailing.tensor_names import EMBEDDING, HEAD, KV_SCALES, ROUTER, Shape, layer_of, main_tensors, mtp_tensors

if TYPE_CHECKING:  # registering must not import it
    import torch

# Buffers that some exporters write; they are computed from the configuration.
_COMPUTED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class Audit:
    """Passes a checkpoint's tensors on to a loader, and accounts for every one of them.

    A tensor is loaded, or skipped by a rule named in `skip_rule`, or held back and reported. Only names, shapes and
    kinds of numbers are looked at: no byte of a tensor is read here. `check` does the same with the headers of the
    files alone. Why something does not fit is guessed in `likely_causes.py`.

    Args:
        config: The model's configuration.
        expected: Names and shapes that this model loads.
        quantized: Whether the checkpoint has a quantization config; then a linear layer may store its weight under
            other names, which vLLM's quantization method checks, and integers of it in packs.
        folder: Where the checkpoint's files lie, for a better message; may be None or not exist.
        may_lack_experts: Whether another rank may hold whole experts (expert parallelism).
        elsewhere: Names that another rank loads, or another model.
        is_draft: Whether this is the draft; then the target accounts for its own layers.
    """

    def __init__(
        self,
        config: BailingMoeV2Config,
        expected: dict[str, Shape],
        quantized: bool = False,
        folder: str | None = None,
        may_lack_experts: bool = False,
        elsewhere: Collection[str] = (),
        is_draft: bool = False,
    ) -> None:
        self.elsewhere, self.is_draft = elsewhere, is_draft
        self.config, self.expected, self.quantized = config, expected, quantized
        self.folder, self.may_lack_experts = folder, may_lack_experts
        self.quantized_kind = _quantized_kind(getattr(config, "quantization_config", None)) if quantized else None
        self._start()

    def _start(self) -> None:
        self.seen: set[str] = set()
        self.unexpected: dict[str, Shape] = {}
        self.misshapen: dict[str, Shape] = {}
        self.not_float: list[str] = []
        self.other_kind: list[str] = []

    def restarted(self) -> Audit:
        """The same audit with nothing seen yet."""
        again = copy.copy(self)
        again._start()
        return again

    @classmethod
    def of_target(
        cls,
        config: BailingMoeV2Config,
        is_here: Callable[[str], bool] = lambda _name: True,
        head: str = HEAD,
        **options: Any,
    ) -> Audit:
        """The audit of the main layers, embedding and head.

        Args:
            is_here: Whether this rank loads the tensor of that name; another one does otherwise.
            head: As for `main_tensors`.
            options: As for the class: `quantized`, `folder`, `may_lack_experts`.
        """
        tensors = main_tensors(config, head)
        here = {name: shape for name, shape in tensors.items() if is_here(name)}
        return cls(config, here, elsewhere=tensors.keys() - here.keys(), **options)

    @classmethod
    def of_draft(cls, config: BailingMoeV2Config, has_embedding: bool = False, **options: Any) -> Audit:
        """The audit of the MTP layers.

        Args:
            has_embedding: Whether the draft loads an embedding of its own.
            options: As for the class: `quantized`, `folder`, `may_lack_experts`.
        """
        main, own = main_tensors(config), mtp_tensors(config)
        if has_embedding:
            own[EMBEDDING] = main[EMBEDDING]
        return cls(config, own, elsewhere=main.keys() - own.keys(), is_draft=True, **options)

    def skip_rule(self, name: str) -> str | None:
        """Why `name` is not loaded although nothing is wrong with it, or None."""
        if name in self.expected:
            return None
        if name in self.elsewhere or f"{name.rpartition('.')[0]}.weight" in self.elsewhere:
            return "another rank's or the target's"
        if self.is_draft and (layer_of(name) or 0) < self.config.num_hidden_layers:
            return "the target's"
        if layer_of(name) in self.config.mtp_layer_ids and not self.is_draft:
            return "MTP layers are the draft model's"
        if name.endswith(_COMPUTED_SUFFIXES):
            return "rotary tables are computed"
        if name == HEAD and HEAD not in self.expected:
            return "the head is the embedding" if self.config.tie_word_embeddings else "no head of this kind is used"
        return None

    def needed(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of `weights` that no rule skips, before anything is computed from them."""
        for name, tensor in weights:
            # Nearly all are expected, and there are many.
            if name in self.expected or self.skip_rule(name) is None:
                yield name, tensor

    def passed(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of `weights` that are to be loaded."""
        iterator = iter(weights)
        while True:
            try:
                name, tensor = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                if cause := damaged_files(self.folder):
                    raise CheckpointError(f"the checkpoint cannot be read: {cause}") from error
                raise
            if tensor.shape == self.expected.get(name) and _kind(tensor) == "plain":
                self.seen.add(name)
                yield name, tensor
            elif self.skip_rule(name) is None and self._accepts(name, tuple(tensor.shape), _kind(tensor)):
                yield name, tensor

    def check(self, checkpoint: Checkpoint) -> None:
        """Report what does not fit before anything is loaded.

        Raises:
            CheckpointError: As from `finish`.
        """
        if checkpoint.damage:
            raise CheckpointError(f"the checkpoint cannot be read: {checkpoint.damage}")
        for name, stored in checkpoint.tensors.items():
            if self.skip_rule(name) is None:
                self._accepts(name, stored.shape, stored.kind)
        self.finish()

    def _accepts(self, name: str, shape: Shape, kind: Kind) -> bool:
        expected = self.expected.get(name)
        if expected is not None:
            self.seen.add(name)
            if kind != "plain" and not (self.quantized and _can_be_quantized(name, expected)):
                self.not_float.append(name)
            elif shape == expected and kind not in ("plain", self.quantized_kind or kind):
                self.other_kind.append(name)
            elif shape == expected or (kind == "integer" and _is_packed(shape, expected)):
                return True
            else:
                self.misshapen[name] = shape
            return False
        module, _, leaf = name.rpartition(".")
        if self.quantized and leaf in KV_SCALES and module.endswith((".attention", ".attention.attn")):
            return True
        if self.quantized and f"{module}.weight" in self.expected:
            if leaf in ("qweight", "weight_packed"):
                self.seen.add(f"{module}.weight")
            return True
        self.unexpected[name] = shape
        return False

    def missing(self) -> list[str]:
        """Expected tensors that did not come."""
        absent = [name for name in self.expected if name not in self.seen]
        if not self.config.moe_router_enable_expert_bias:
            absent = [name for name in absent if not name.endswith(".gate.expert_bias")]
        if self.may_lack_experts:
            here = {name.split(".")[5] for name in self.seen if ".mlp.experts." in name}
            absent = [name for name in absent if ".mlp.experts." not in name or name.split(".")[5] in here]
        return absent

    def finish(self, complete: bool = True, what: str = "the checkpoint does not fit its config.json") -> None:
        """Report every tensor that does not fit.

        Args:
            complete: Whether all tensors were to come; False where a trainer sends them in portions.
            what: How the message begins.
        Raises:
            CheckpointError: One message naming the first few missing, unexpected and misshapen tensors, and the cause.
        """
        missing = self.missing() if complete else []
        misshapen = [
            f"{name} is {list(shape)}, config.json asks for {list(self.expected[name])}"
            for name, shape in self.misshapen.items()
        ]
        found = (
            ("missing", missing),
            ("unexpected", list(self.unexpected)),
            ("of the wrong shape", misshapen),
            ("of integers or 8 bits", self.not_float),
            (f"not of {self.quantized_kind} numbers, as quantization_config says", self.other_kind),
        )
        parts = [f"{len(names)} {title} ({first_of(names)})" for title, names in found if names]
        if parts:
            cause = shown(likely_cause(self, missing), 1000)
            detail, todo = f"{what}: {'; '.join(parts)}", "take weights and config.json from the same place"
            remedy = f"Likely cause: {cause}" if cause else todo.capitalize()
            raise CheckpointError(f"{detail}. {remedy}", Finding(detail, cause or todo))


def _quantized_kind(quantization: Any) -> Kind | None:
    """Of quantized weights that have their own shape, where a scheme tells; a layer would convert another silently."""
    if not isinstance(quantization, dict):
        return None
    if quantization.get("quant_method") == "fp8":
        return "float8"
    groups = quantization.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    types = {(one.get("type"), one.get("num_bits")) for one in weights if isinstance(one, dict)}
    return {("int", 8): "integer", ("float", 8): "float8"}.get(types.pop()) if len(types) == 1 else None


def _can_be_quantized(name: str, shape: Shape) -> bool:
    """Norms, biases, router and embedding are floats in every scheme; layers would take integers without a word."""
    return len(shape) == 2 and name != EMBEDDING and not name.endswith(ROUTER)


def _is_packed(shape: Shape, expected: Shape) -> bool:
    """Whether integers of this shape are as many as a pack of 2, 4, 8 or 16 numbers in each leaves.

    How they are arranged, their layer looks at; what is too small, it would repeat to fill the weight.
    """
    return math.prod(expected) in (math.prod(shape) * numbers for numbers in (2, 4, 8, 16))


def _kind(tensor: torch.Tensor) -> Kind:
    return ("plain" if tensor.itemsize > 1 else "float8") if tensor.is_floating_point() else "integer"
