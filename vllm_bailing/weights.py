"""Which tensors a BailingMoeV2 checkpoint has to hold, which it holds, and what became of each while loading.

No nn.Module and no vLLM in here: names and shapes follow from the configuration and from the headers of the files.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from vllm_bailing.config import BailingMoeV2Config

if TYPE_CHECKING:  # registering must not import it
    import torch

Shape = tuple[int, ...]
# Buffers that some exporters write; they are computed from the configuration.
_COMPUTED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
KV_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale")
# Fixed scales of activations, and what else belongs to a quantised layer's inputs and outputs.
ACTIVATION_LEAVES = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
_SCALES = ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "scales")
_INDEX = "model.safetensors.index.json"
_SHOWN = 4
NAME_ANOTHER_DRAFT = (
    "name a checkpoint that has it, such as the base model of the same size, by --speculative-config "
    '\'{"method": "mtp", "model": "...", "num_speculative_tokens": 1}\', or leave --speculative-config out'
)
EMBEDDING, HEAD = "model.word_embeddings.weight", "lm_head.weight"


class CheckpointError(RuntimeError):
    """The checkpoint does not fit its configuration.

    No ValueError: pydantic would bury the message of one that is raised while vLLM checks its settings.
    """


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    file: Path
    shape: Shape
    is_float: bool


class Checkpoint:
    """The safetensors files of a checkpoint as a whole; reads their headers, no weights.

    Attributes:
        tensors: What they hold, by name.
        damage: What is wrong with the files: one is absent or cut off. Empty if nothing was found.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.damage = folder, ""
        self.tensors: dict[str, StoredTensor] = {}
        if folder is None or not folder.is_dir():
            return
        index = folder / _INDEX
        files = sorted(folder.glob("*.safetensors"))
        if index.is_file():
            try:
                listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError):
                self.damage = f"{index} is not a readable index; fetch it again"
                return
            files = [folder / name for name in listed]
            absent = [file.name for file in files if not file.is_file()]
            if absent:
                self.damage = (
                    f"{len(absent)} of {len(listed)} files of the index are not in {folder}, first {absent[0]}; "
                    "fetch them"
                )
                return
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                        stored = opened.get_slice(name)
                        is_float = stored.get_dtype().startswith(("F", "BF"))
                        self.tensors[name] = StoredTensor(file, tuple(stored.get_shape()), is_float)
            except (SafetensorError, OSError) as error:
                size = file.stat().st_size
                self.damage = f"{file} is cut off or damaged ({size} bytes; {error}); fetch it again"
                return

    @classmethod
    def of(cls, model_config: Any) -> Checkpoint:
        """The files of a vLLM `ModelConfig`; none where they are not on this machine yet."""
        return cls.at(str(model_config.model), model_config.revision)

    @staticmethod
    def at(model: str, revision: str | None = None) -> Checkpoint:
        """The files in a folder, or of a repository of the model hub as far as they were fetched."""
        if Path(model).is_dir():
            return _read(Path(model))
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            for name in (_INDEX, "model.safetensors"):
                if isinstance(found := try_to_load_from_cache(model, name, revision=revision), str):
                    checkpoint = _read(Path(found).parent)
                    # What is absent has not been fetched yet.
                    return Checkpoint(None) if checkpoint.damage.endswith("fetch them") else checkpoint
        except HFValidationError:
            pass
        return Checkpoint(None)

    def has_scales(self, module: str) -> bool:
        """Whether `module` is a linear layer that is stored quantised."""
        return any(f"{module}.{leaf}" in self.tensors for leaf in _SCALES)

    @property
    def has_quantized_experts(self) -> bool:
        """Whether any expert is stored quantised."""
        return any(".mlp.experts." in name and name.rpartition(".")[2] in _SCALES for name in self.tensors)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in {stored.file for stored in self.tensors.values()})

    def layers_behind(self, config: BailingMoeV2Config) -> list[int]:
        """Numbers of the layers behind the main ones, which can only be MTP layers."""
        layers = {layer for name in self.tensors if (layer := layer_of(name)) is not None}
        return sorted(layer for layer in layers if layer >= config.num_hidden_layers)

    def files_with(self, wanted: Callable[[str], bool]) -> str | None:
        """A glob for every file that holds a tensor whose name is `wanted`, and hardly any other; None if unknown.

        One pattern, since vLLM stops at the first that matches anything.
        """
        names = sorted({stored.file.name for name, stored in self.tensors.items() if wanted(name)})
        if len({len(name) for name in names}) != 1:
            return None
        columns = [sorted(set(column)) for column in zip(*names, strict=True)]
        return "".join(column[0] if len(column) == 1 else f"[{''.join(column)}]" for column in columns)


def local_folder(model: str) -> Path:
    """The folder of a checkpoint that is on this machine.

    Raises:
        ValueError: If it is not.
    """
    if Path(model).is_dir():
        return Path(model).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        raise ValueError(
            f"{model} is neither a folder nor a model that was downloaded; fetch it by `hf download {model}`"
        ) from None


def _read(folder: Path) -> Checkpoint:
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.glob("*.safetensors*"))
    return _read_once(folder, tuple(files))


@functools.lru_cache(maxsize=4)  # target and draft ask for the same files, several times each
def _read_once(folder: Path, files: tuple[tuple[str, int, int], ...]) -> Checkpoint:
    return Checkpoint(folder)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def layer_tensors(config: BailingMoeV2Config, layer: int) -> dict[str, Shape]:
    """Names and shapes of one decoder layer, `layer` counted over main and MTP layers."""
    hidden, prefix = config.hidden_size, f"model.layers.{layer}"
    q_size = config.num_attention_heads * config.head_dim
    qkv_size = q_size + 2 * config.num_key_value_heads * config.head_dim
    tensors: dict[str, Shape] = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        f"{prefix}.attention.query_key_value.weight": (qkv_size, hidden),
        f"{prefix}.attention.dense.weight": (hidden, q_size),
    }
    if config.use_qkv_bias:
        tensors[f"{prefix}.attention.query_key_value.bias"] = (qkv_size,)
    if config.use_bias:
        tensors[f"{prefix}.attention.dense.bias"] = (hidden,)
    if config.use_qk_norm:
        tensors[f"{prefix}.attention.query_layernorm.weight"] = (config.head_dim,)
        tensors[f"{prefix}.attention.key_layernorm.weight"] = (config.head_dim,)
    if layer < config.first_k_dense_replace:
        tensors.update(_mlp(f"{prefix}.mlp", hidden, config.intermediate_size))
    else:
        tensors[f"{prefix}.mlp.gate.weight"] = (config.num_experts, hidden)
        tensors[f"{prefix}.mlp.gate.expert_bias"] = (config.num_experts,)
        for expert in range(config.num_experts):
            tensors.update(_mlp(f"{prefix}.mlp.experts.{expert}", hidden, config.moe_intermediate_size))
        if config.num_shared_experts:
            tensors.update(_mlp(f"{prefix}.mlp.shared_experts", hidden, config.shared_expert_intermediate_size))
    if layer >= config.num_hidden_layers:
        for norm in ("enorm", "hnorm", "final_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = (hidden,)
        tensors[f"{prefix}.eh_proj.weight"] = (hidden, 2 * hidden)
    return tensors


def main_tensors(config: BailingMoeV2Config) -> dict[str, Shape]:
    """Names and shapes of everything but the MTP layers."""
    vocab = (config.vocab_size, config.hidden_size)
    tensors: dict[str, Shape] = {EMBEDDING: vocab, "model.norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings:
        tensors[HEAD] = vocab
    for layer in range(config.num_hidden_layers):
        tensors.update(layer_tensors(config, layer))
    return tensors


def mtp_tensors(config: BailingMoeV2Config) -> dict[str, Shape]:
    """Names and shapes of the MTP layers."""
    return {name: shape for layer in config.mtp_layer_ids for name, shape in layer_tensors(config, layer).items()}


def layer_of(name: str) -> int | None:
    """The decoder layer that a tensor belongs to, or None."""
    parts = name.split(".", 3)
    return int(parts[2]) if name.startswith("model.layers.") and parts[2].isdigit() else None


class Audit:
    """Passes a checkpoint's tensors on to a loader, and accounts for every one of them.

    A tensor is loaded, or skipped by a rule named in `skip_rule`, or held back and reported. Only names and shapes are
    looked at: no byte of a tensor is read here. `check` does the same with the headers of the files alone.

    Args:
        config: The model's configuration.
        expected: Names and shapes that this model loads.
        quantized: Whether the checkpoint has a quantisation config; then a linear layer may store its weight under
            other names and in packed shapes, which vLLM's quantisation method checks.
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
        self.seen: set[str] = set()
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.stray_layers: set[int] = set()

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
        if name.startswith("lm_head.") and self.config.tie_word_embeddings:
            return "the head is the embedding"
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
            if tensor.shape == self.expected.get(name):
                self.seen.add(name)
                yield name, tensor
            elif self.skip_rule(name) is None and self._accepts(name, tuple(tensor.shape), tensor.is_floating_point()):
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
                self._accepts(name, stored.shape, stored.is_float)
        self.finish()

    def _accepts(self, name: str, shape: Shape, is_float: bool) -> bool:
        wanted = self.expected.get(name)
        if wanted is not None:
            self.seen.add(name)
            packed = self.quantized and not is_float
            if shape == wanted or packed:
                return True
            self.misshapen.append(f"{name} is {list(shape)}, config.json asks for {list(wanted)}")
            return False
        module, _, leaf = name.rpartition(".")
        if self.quantized and leaf in KV_SCALES and module.endswith((".attention", ".attention.attn")):
            return True
        if self.quantized and f"{module}.weight" in self.expected:
            if leaf in ("qweight", "weight_packed"):
                self.seen.add(f"{module}.weight")
            return True
        layer = layer_of(name)
        if layer is not None and layer >= self.config.num_hidden_layers:
            self.stray_layers.add(layer)
        self.unexpected.append(name)
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

    def finish(self, complete: bool = True) -> None:
        """Report what was found.

        Args:
            complete: Whether all tensors were to come; False where a trainer sends them in portions.
        Raises:
            CheckpointError: One message naming the first few missing, unexpected and misshapen tensors, and the cause.
        """
        missing = self.missing() if complete else []
        if not (missing or self.unexpected or self.misshapen):
            return
        parts = [
            f"{len(found)} {title} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
            for title, found in (
                ("missing", missing),
                ("unexpected", self.unexpected),
                ("of the wrong shape", self.misshapen),
            )
            if found
        ]
        raise CheckpointError(
            f"the checkpoint does not fit its config.json: {'; '.join(parts)}. {self._cause(missing)}"
        )

    def _cause(self, missing: list[str]) -> str:
        if damage := damaged_files(self.folder):
            return f"Likely cause: {damage}"
        if self.is_draft and len(missing) == len(self.expected):
            return (
                f"Likely cause: {self.folder} has no MTP layer, though num_nextn_predict_layers="
                f"{self.config.num_nextn_predict_layers}; {NAME_ANOTHER_DRAFT}"
            )
        if self.stray_layers:
            layers = len(self.stray_layers)
            return (
                f"Likely cause: there are {layers} layer(s) behind num_hidden_layers={self.config.num_hidden_layers}, "
                f"but num_nextn_predict_layers={self.config.num_nextn_predict_layers}; if they are MTP layers, set "
                f"num_nextn_predict_layers to {layers} in config.json or by --hf-overrides"
            )
        if missing and self.unexpected:
            # Names close to a missing one were most likely meant to be it.
            close = difflib.get_close_matches(self.unexpected[0], missing[:2000], n=1, cutoff=0.6)
            if close:
                return f"Likely cause: {self.unexpected[0]} should be called {close[0]}"
        if self.misshapen:
            return "Likely cause: config.json belongs to another model size; take it from the same place as the weights"
        if missing:
            return "Likely cause: an incomplete download or export; fetch or export the checkpoint again"
        return "Likely cause: weights of another architecture or adapter tensors; remove them from the checkpoint"


def damaged_files(folder: str | None) -> str:
    """`Checkpoint.damage` of what lies in `folder`; empty where that is no folder."""
    return Checkpoint(Path(folder)).damage if folder else ""
