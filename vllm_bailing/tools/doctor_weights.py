"""`vllm-bailing doctor --deep`: the numbers of a checkpoint, which nothing else looks at before they are served."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.errors import first_of, named
from vllm_bailing.folders import how_to_fetch
from vllm_bailing.tools.doctor import Check

if TYPE_CHECKING:
    import torch


def weights(folder: Path, advance: Callable[[int, int], object] = lambda done, total: None) -> Iterator[Check]:
    """Checks of all files and tensors of a checkpoint; holds one tensor at a time.

    Args:
        advance: Called with the number of bytes that were read, and of all.
    """
    import torch
    from safetensors import safe_open

    checkpoint = Checkpoint(folder)
    if checkpoint.damage or not checkpoint.tensors:
        return  # told before
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    yield from _hashes(folder, files)
    wrong: dict[str, list[str]] = {fault: [] for fault in _FAULTS}
    kinds: Counter[str] = Counter()
    done = 0
    for file in files:
        with safe_open(file, framework="pt") as opened, torch.inference_mode():
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                tensor = opened.get_tensor(name)
                kinds[str(tensor.dtype).removeprefix("torch.")] += 1
                for fault, names in wrong.items():
                    if _FAULTS[fault](name, tensor):
                        names.append(name)
                done += tensor.nbytes
                advance(done, checkpoint.size)
    for fault, names in wrong.items():
        if names:
            yield Check("numbers", False, f"{fault} in {named(names)}", how_to_fetch(str(folder)))
    if not any(wrong.values()):
        told = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
        yield Check("numbers", True, f"finite, and no weight is zero throughout ({told})")


def _hashes(folder: Path, files: list[Path]) -> Iterator[Check]:
    """The files against what the hub said of them when they were fetched; nothing is asked now."""
    told = {file: digest for file in files if (digest := _hash_of_the_hub(folder, file))}
    wrong = [file.name for file, digest in told.items() if _sha256(file) != digest]
    if wrong:
        yield Check("hashes", False, f"not what the hub has: {first_of(wrong)}", how_to_fetch(str(folder)))
    elif told:
        yield Check("hashes", True, f"{len(told)} of {len(files)} files are what the hub has")
    else:
        yield Check("hashes", None, "not known: the files were not fetched from the hub by `hf download`")


def _hash_of_the_hub(folder: Path, file: Path) -> str | None:
    """SHA-256 of a file as huggingface_hub notes it: the blob's name in its cache, else in a file beside the folder's.

    Source: huggingface_hub, "Understand caching" and `_local_folder.py`.
    """
    name, notes = file.resolve(), folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    if name.parent.name == "blobs":
        digest = name.name
    else:
        lines = notes.read_text(encoding="utf-8").splitlines() if notes.is_file() else []
        digest = lines[1].strip('"') if len(lines) > 1 else ""
    return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(2**22):
            digest.update(part)
    return digest.hexdigest()


def _is_not_finite(_name: str, tensor: torch.Tensor) -> bool:
    import torch

    if not tensor.is_floating_point():
        return False
    numbers = tensor if tensor.itemsize > 1 else tensor.to(torch.float32)
    return not bool(numbers.isfinite().all())


def _is_zero(name: str, tensor: torch.Tensor) -> bool:
    import torch

    is_weight = name.endswith((".weight", "_packed", "qweight"))  # biases may be, and zero points
    numbers = tensor.to(torch.float32) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
    return is_weight and not bool(numbers.any())


_FAULTS = {"NaN or infinity": _is_not_finite, "nothing but zeros": _is_zero}
