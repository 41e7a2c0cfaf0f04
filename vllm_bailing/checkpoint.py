"""The files of a checkpoint: their index and headers. No weights are read here."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import CheckpointError, shown, told, unreadable
from vllm_bailing.folders import FileStates, states_of
from vllm_bailing.json_files import read_json
from vllm_bailing.layouts import common_prefix, joined
from vllm_bailing.tensor_names import Shape, layer_of

if TYPE_CHECKING:  # registering must not import it
    import torch

_SCALES = ("weight_scale", "weight_scale_inv", "weight_packed", "qweight", "scales")
_LFS = b"version https://git-lfs"
_INDEX = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[\w][\w.+@ -]{0,200}\.safetensors")
Kind = Literal["plain", "float8", "integer"]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it.

    Attributes:
        kind: Of its numbers; plain ones are floats of 16 bits or more.
        name: In the file, of which `take` gets what is meant; the other parts of its rows are in `rest`.
    """

    file: Path
    shape: Shape
    kind: Kind
    name: str = ""
    take: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    rest: tuple[StoredTensor, ...] = ()

    def read(self, file: Any) -> torch.Tensor:
        """The tensor from its open file.

        Args:
            file: Opens a path as `safetensors.safe_open` does.
        """
        import torch

        parts = [part.take(file(part.file).get_tensor(part.name)) for part in (self, *self.rest)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Checkpoint:
    """The safetensors files of a checkpoint as a whole; reads their headers, no weights.

    Attributes:
        tensors: What they hold, by name.
        damage: What is wrong with the files: one is absent or cut off. Empty if nothing was found.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.damage = folder, ""
        self.tensors: dict[str, StoredTensor] = {}
        self._published: dict[str, Checkpoint] = {}
        if folder is None or not folder.is_dir():
            return
        try:
            files = _files_of(folder)
            for file in files:
                self._read_header(file)
        except CheckpointError as error:
            self.damage = str(error)
        except OSError as error:
            self.damage = str(unreadable(error, folder))

    def _read_header(self, file: Path) -> None:
        if not file.is_file():  # a link to nothing, a pipe, ...
            what = f"links to {shown(str(file.readlink()))}, which is gone" if file.is_symlink() else "is no file"
            raise CheckpointError(f"{file} {what}; fetch it again")
        file.open("rb").close()  # of one that may not be read, the library says that it does not exist
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    stored = opened.get_slice(name)
                    self.tensors[name] = StoredTensor(file, tuple(stored.get_shape()), _kind(stored.get_dtype()), name)
        except SafetensorError as error:
            size, reason = file.stat().st_size, shown(error)
            with file.open("rb") as stream:
                if stream.read(len(_LFS)) == _LFS:
                    raise CheckpointError(
                        f"{file} only says where the weights are (a pointer of git-lfs); fetch them by `git lfs pull`"
                    ) from None
            raise CheckpointError(f"{file} is cut off or damaged ({size} bytes; {reason}); fetch it again") from None

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
                if isinstance(cached := try_to_load_from_cache(model, name, revision=revision), str):
                    checkpoint = _read(Path(cached).parent)
                    # What is absent has not been fetched yet.
                    return Checkpoint(None) if checkpoint.damage.endswith("fetch them") else checkpoint
        except HFValidationError:
            pass
        return Checkpoint(None)

    @functools.cached_property
    def prefix(self) -> str:
        """What all names begin with that is not of the model."""
        return common_prefix(self.tensors)

    def published(self, config: BailingMoeV2Config) -> Checkpoint:
        """The same files with their tensors in the published layout, as far as they are in one that is known.

        Where two of them are the same one there, `damage` says so.
        """
        key = config.to_json_string(use_diff=False)
        if key not in self._published:  # the 123,200 names of a Ling-1T in FP8 take seconds, and a start asks often
            self._published[key] = self._in_published_layout(config)
        return self._published[key]

    def _in_published_layout(self, config: BailingMoeV2Config) -> Checkpoint:
        whole = Checkpoint(None)
        whole.folder, whole.damage = self.folder, self.damage
        stored = ((name, tensor.shape, tensor) for name, tensor in self.tensors.items())
        try:
            for name, parts in joined(stored, config, self.prefix):
                first, *rest = (StoredTensor(t.file, piece.shape, t.kind, t.name, piece.take) for piece, t in parts)
                if rest:  # parts have rows; what is whole may be a scalar, as the scale of a tensor is
                    rows = sum(part.shape[0] for part in (first, *rest))
                    first = replace(first, shape=(rows, *first.shape[1:]), rest=tuple(rest))
                whole.tensors[name] = first
        except CheckpointError as error:
            whole.damage = self.damage or str(error)
        return whole

    def named_by_index_alone(self) -> list[str]:
        """Tensors that the index of the folder names, and no file has; of undamaged files."""
        if self.folder is None or not (self.folder / _INDEX).is_file():
            return []
        return sorted(read_json(self.folder / _INDEX)["weight_map"].keys() - self.tensors.keys())

    def has_scales(self, module: str) -> bool:
        """Whether `module` is a linear layer that is stored quantized."""
        return any(f"{module}.{leaf}" in self.tensors for leaf in _SCALES)

    @property
    def has_quantized_experts(self) -> bool:
        """Whether any expert is stored quantized."""
        return any(".mlp.experts." in name and name.rpartition(".")[2] in _SCALES for name in self.tensors)

    @property
    def has_integers(self) -> bool:
        """Whether any tensor is stored as integers, in packs or one by one."""
        return any(tensor.kind == "integer" for tensor in self.tensors.values())

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in {stored.file for stored in self.tensors.values()})

    def layers_past_main(self, config: BailingMoeV2Config) -> list[int]:
        """Numbers of the layers past the main ones, which can only be MTP layers."""
        layers = {layer for name in self.tensors if (layer := layer_of(name)) is not None}
        return sorted(layer for layer in layers if layer >= config.num_hidden_layers)

    def files_with(self, is_needed: Callable[[str], bool]) -> str | None:
        """A glob for every file that holds a tensor whose name `is_needed`, and hardly any other; None if unknown.

        One pattern, since vLLM stops at the first that matches anything.
        """
        names = sorted(
            {
                part.file.name
                for name, stored in self.tensors.items()
                if is_needed(name)
                for part in (stored, *stored.rest)
            }
        )
        if len({len(name) for name in names}) != 1:
            return None
        columns = [sorted(set(column)) for column in zip(*names, strict=True)]
        return "".join(column[0] if len(column) == 1 else f"[{''.join(column)}]" for column in columns)


def _files_of(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, or what is there.

    Raises:
        CheckpointError: If the index cannot be read, names anything but files of the folder, or some are absent.
    """
    index = folder / _INDEX
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    if not index.is_file():
        raise CheckpointError(f"{index} is no file; fetch it again")
    try:
        listed = set(read_json(index)["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index} is not a readable index; fetch it again") from None
    for name in listed:
        # vLLM reads what is in the folder; nothing else may be looked at in its place.
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{index} names {told(name)}, which is no safetensors file in its folder; fetch it again"
            )
    absent = [name for name in sorted(listed) if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{len(absent)} of {len(listed)} files of the index are not in {folder}, first {absent[0]}; fetch them"
        )
    return [folder / name for name in sorted(listed)]


def _kind(dtype: str) -> Kind:
    if dtype in ("F16", "BF16", "F32", "F64"):
        return "plain"
    return "float8" if dtype.startswith("F8") else "integer"


def _read(folder: Path) -> Checkpoint:
    return _read_once(folder, states_of(folder, "*.safetensors*"))


@functools.lru_cache(maxsize=4)  # target and draft ask for the same files, several times each
def _read_once(folder: Path, files: FileStates) -> Checkpoint:
    return Checkpoint(folder)


def damaged_files(folder: str | None) -> str:
    """`Checkpoint.damage` of what lies in `folder`; empty if that is not a folder."""
    return Checkpoint(Path(folder)).damage if folder else ""
