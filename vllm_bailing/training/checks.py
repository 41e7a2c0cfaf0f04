"""What is refused before any long work: a target, layer, folder, memory or disk that will not do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_bailing import adapter_audit
from vllm_bailing.adapters import EXPERTS, LINEAR
from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.config import BailingMoeV2Config, read_config
from vllm_bailing.errors import AdapterError, CheckpointError, TrainError
from vllm_bailing.folders import local_folder
from vllm_bailing.planning.request import LORA_RANKS
from vllm_bailing.planning.training import SAVED_BYTES, layer_elements, memory_needed
from vllm_bailing.tensor_names import layer_tensors
from vllm_bailing.units import GIB

RANDOM = "random"


@dataclass(frozen=True)
class Source:
    """A checkpoint that is read.

    Attributes:
        config: With one MTP layer, whatever config.json says of them.
    """

    folder: Path
    config: BailingMoeV2Config
    checkpoint: Checkpoint


def target_at(model: str) -> Source:
    """The target, whose main layers are complete.

    Raises:
        TrainError: If it is no such checkpoint, or a quantized one.
    """
    source = _source(model, "TARGET")
    try:
        Audit.of_target(source.config, folder=str(source.folder)).check(source.checkpoint.published(source.config))
    except CheckpointError as error:
        raise TrainError(f"TARGET {model}: {error}") from None
    return source


def init_at(init: str | None, target: Source) -> Checkpoint | None:
    """The files with the MTP layer to begin with; None for a random one.

    Args:
        init: As of `--init`; None for the layer that the target has itself.
    Raises:
        TrainError: If there is no such layer, or it is another model's.
    """
    if init == RANDOM:
        return None
    remedy = "name the base model of the same size by --init, or begin with --init random"
    source = target if init is None else _source(init, "--init")
    layer = target.config.num_hidden_layers
    where = f"TARGET {target.folder}" if init is None else f"--init {init}"
    for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_experts", "moe_intermediate_size"):
        wanted, actual = getattr(target.config, name), getattr(source.config, name)
        if wanted != actual:
            raise TrainError(f"{where} has {name}={actual}, the target {wanted}; {remedy}")
    published = source.checkpoint.published(source.config)
    if layer not in published.layers_past_main(source.config):
        raise TrainError(f"{where} has no MTP layer; {remedy}")
    for name, shape in layer_tensors(target.config, layer).items():
        stored = published.tensors.get(name)
        if stored is None or stored.shape != shape or stored.kind != "plain":
            actual = "missing" if stored is None else f"{list(stored.shape)}, {stored.kind}"
            raise TrainError(f"{where}: {name} is {actual}, the target needs {list(shape)}, plain; {remedy}")
    return source.checkpoint


def check_adapter(folder: Path, target: Source) -> None:
    """Whether the target can be served with the adapter in `folder`.

    Raises:
        TrainError: If its files do not fit the target.
    """
    limits = adapter_audit.Limits(target.config, (*LINEAR, EXPERTS), LORA_RANKS[-1])
    try:
        adapter_audit.check_adapter(folder, limits)
    except AdapterError as error:
        raise TrainError(f"--adapter: {error}") from None


def _source(model: str, what: str) -> Source:
    try:
        folder = local_folder(model)
        config = read_config(folder)
    except ValueError as error:
        raise TrainError(f"{what} {error}") from None
    if config.stored_quantization_config or getattr(config, "quantization_config", None):
        raise TrainError(f"{what} {model} is quantized; give the bf16 checkpoint that it was made from")
    checkpoint = Checkpoint.at(str(folder))
    if damage := checkpoint.published(config).damage or ("" if checkpoint.tensors else "no safetensors files"):
        raise TrainError(f"{what} {model} cannot be read: {damage}")
    config.update({"num_nextn_predict_layers": 1})
    return Source(folder, config, checkpoint)


def check_packages() -> None:
    """Whether `Trainer` has what it needs.

    Raises:
        TrainError: If what `Trainer` needs is not installed.
    """
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise TrainError("accelerate is not installed; `pip install 'vllm-bailing[train]'`") from None


def check_folder(folder: Path, flag: str) -> None:
    """Whether a folder can be written.

    Raises:
        TrainError: If there is something in the folder, or no place for it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TrainError(f"{flag} {folder} is not an empty folder; choose another one")
    if not folder.absolute().parent.is_dir():
        raise TrainError(f"{flag} {folder}: there is no folder {folder.absolute().parent}; make it first")


def check_memory(config: BailingMoeV2Config, model: str, part: str, ranks: int) -> None:
    """Whether the weights of either part of a run fit into the memory that is free.

    Args:
        ranks: That train, each on a GPU of its own if there are any.
    Raises:
        TrainError: If the weights alone do not fit into the memory that is free, or there are fewer GPUs than ranks.
    """
    import psutil
    import torch

    has_gpu = torch.cuda.is_available()
    needed = memory_needed(config, has_gpu, part, ranks)
    if has_gpu and ranks > torch.cuda.device_count():
        raise TrainError(f"--train-ranks {ranks} needs as many GPUs, and there are {torch.cuda.device_count()}")
    if has_gpu:
        free = [torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())]
        parts: list[Any] = [("record its states", needed.record, sum(free), "all GPUs")]
        where = "the first GPU" if ranks == 1 else f"one of the first {ranks} GPUs"
        parts.append(("train its layer", needed.train, min(free[:ranks]), where))
    else:
        free_here = psutil.virtual_memory().available
        parts = [("record its states", needed.record, free_here, "memory, and there is no GPU")]
        parts.append(("train its layer", needed.train * ranks, free_here, "memory, and there is no GPU"))
    for what, wanted, there, where in parts:
        if wanted > there:
            raise TrainError(
                f"{model} needs {wanted / GIB:.1f} GiB to {what}, and {there / GIB:.1f} are free in {where}; "
                "`vllm-bailing train-mtp --plan` says what it runs on"
            )


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Whether a file system has `needed` bytes free.

    Raises:
        TrainError: If a file system has less than `needed` bytes free.
    """
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TrainError(
            f"{what} need up to {needed / GIB:.2f} GiB in {existing}, and {free / GIB:.2f} are free; make room, or "
            "choose another --out, fewer prompts or a smaller --max-tokens"
        )


def saved_bytes(config: BailingMoeV2Config, ranks: int) -> int:
    """Bytes of the trainer's checkpoints, of which there are two for a moment, and of the result.

    Several ranks have one more, and the layer in fp32 before and after.
    """
    return layer_elements(config) * (2 * SAVED_BYTES + 2 + (0 if ranks == 1 else SAVED_BYTES + 2 * 4))
