"""`vllm-bailing doctor --deep`: the numbers of a checkpoint, which nothing else looks at before they are served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.errors import named
from vllm_bailing.folders import how_to_fetch
from vllm_bailing.tools.doctor import Check

if TYPE_CHECKING:
    import torch


def weights(folder: Path, advance: Callable[[int, int], object] = lambda done, total: None) -> Iterator[Check]:
    """Checks of all tensors of a checkpoint; holds one of them at a time.

    Args:
        advance: Called with the number of bytes that were read, and of all.
    """
    import torch
    from safetensors import safe_open

    checkpoint = Checkpoint(folder)
    if checkpoint.damage or not checkpoint.tensors:
        return  # told before
    wrong: dict[str, list[str]] = {fault: [] for fault in _FAULTS}
    kinds: Counter[str] = Counter()
    done = 0
    for file in sorted({stored.file for stored in checkpoint.tensors.values()}):
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
