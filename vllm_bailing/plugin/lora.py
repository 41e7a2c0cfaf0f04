"""LoRA adapters in vLLM: what is prepared for them at the start, and the refusal of those that do not fit.

Which modules take them: `adapters.py`. What an adapter must be: `adapter_audit.py`.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from vllm_bailing.adapter_audit import CONFIG, Limits, check_adapter
from vllm_bailing.adapters import ENDS, EXPERTS, LINEAR, TARGETS, AdapterSlots, is_prepared, unknown_targets
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import AdapterError, shown
from vllm_bailing.plugin.shims import knows_scales_of_modules
from vllm_bailing.tensor_names import layer_of
from vllm_bailing.units import GIB, dtype_name

_NO_EXPERTS_ON_CPU = (
    "vLLM's CPU build has no expert kernel that takes adapters; use a GPU, merge the adapter into the checkpoint, or "
    "train one without the experts"
)


def settle_lora_targets(vllm_config: Any, on_cpu: bool, has_draft: bool) -> None:
    """Let vLLM prepare the linear layers for adapters, if the user did not choose; log the memory that this takes.

    Raises:
        AdapterError: If the user chose what the model does not have, experts on a CPU, or embedding or head beside a
            draft that shares them.
    """
    lora_config, config = vllm_config.lora_config, vllm_config.model_config.hf_config
    if lora_config.target_modules is None:
        lora_config.target_modules = list(LINEAR)
    chosen = lora_config.target_modules
    if unknown := unknown_targets(config, chosen):
        raise AdapterError(
            f"--lora-target-modules {' '.join(unknown)}: the model has nothing of that name that takes adapters; "
            f"choose among {' '.join(TARGETS)}"
        )
    if on_cpu and wants_experts(chosen):
        raise AdapterError(f"--lora-target-modules {EXPERTS}: {_NO_EXPERTS_ON_CPU}")
    shared = [name for name in chosen if name.rpartition(".")[2] in ENDS]
    if has_draft and shared:
        raise AdapterError(
            f"--lora-target-modules {' '.join(shared)}: the draft model of --speculative-config shares these layers "
            "and takes no adapters; leave one of the two out"
        )
    _log_room(vllm_config)


def wants_experts(targets: list[str]) -> bool:
    """Whether routed experts of any layer are among the targets."""
    return any(name.rpartition(".")[2] == EXPERTS for name in targets)


def experts_take_adapters(vllm_config: Any, name: str) -> bool:
    """Whether the experts called `name` are prepared for adapters; those of a draft, which shares the flag, are not."""
    from vllm.platforms import current_platform

    lora_config, config = vllm_config.lora_config, vllm_config.model_config.hf_config
    if lora_config is None or current_platform.is_cpu():
        return False
    layer = layer_of(f"{name}.")
    return (
        layer is not None and layer < config.num_hidden_layers and is_prepared(f"{name}.0", lora_config.target_modules)
    )


def _log_room(vllm_config: Any) -> None:
    """Before it is allocated, so that it can also be read when there is not enough."""
    from vllm.logger import init_logger

    lora_config, slots = vllm_config.lora_config, slots_of(vllm_config)
    experts = (
        "" if wants_experts(lora_config.target_modules) else f"; not {EXPERTS}, which --lora-target-modules can add"
    )
    init_logger("vllm.plugins.bailing").info_once(
        "adapters: vLLM sets %.2f GiB aside on each rank, for --max-loras %d of --max-lora-rank %d on %s%s",
        max(stage_bytes(vllm_config, slots)) / GIB,
        slots.count,
        slots.rank,
        " ".join(slots.targets),
        experts,
    )


def slots_of(vllm_config: Any) -> AdapterSlots:
    """The slots of an engine."""
    import torch

    lora_config, parallel = vllm_config.lora_config, vllm_config.parallel_config
    tp = parallel.tensor_parallel_size
    return AdapterSlots(
        tuple(lora_config.target_modules),
        lora_config.max_loras,
        lora_config.max_lora_rank,
        getattr(torch, adapter_dtype(lora_config, vllm_config.model_config.dtype)).itemsize,
        tp,
        tp * parallel.data_parallel_size if parallel.enable_expert_parallel else 1,
        lora_config.fully_sharded_loras,
    )


def stage_bytes(vllm_config: Any, slots: AdapterSlots) -> list[int]:
    """Bytes of the slots on one rank of each pipeline stage."""
    from vllm.distributed.utils import get_pp_indices

    config, stages = vllm_config.model_config.hf_config, vllm_config.parallel_config.pipeline_parallel_size
    sizes = []
    for stage in range(stages):
        layers = range(*get_pp_indices(config.num_hidden_layers, stage, stages))
        size = sum(slots.layer_bytes(config, layer) for layer in layers)
        size += slots.embedding_bytes(config) if stage == 0 else 0
        size += slots.head_bytes(config) if stage == stages - 1 else 0
        sizes.append(size)
    return sizes


def adapter_dtype(lora_config: Any, model_dtype: Any) -> str:
    """Full name of the data type that factors become; vLLM replaces "auto" after it has asked for checks."""
    chosen = lora_config.lora_dtype
    return dtype_name(model_dtype if chosen in (None, "auto") else chosen)


def refuse_misfit(model_config: Any, lora_config: Any, request: Any) -> None:
    """Refuse the adapter of a vLLM `LoRARequest` if it does not fit; models of other architectures pass.

    Raises:
        AdapterError: On one line, what is wrong with it and what to do.
        LoRAAdapterNotFoundError: vLLM's own, if there is none, which its server answers with 404.
    """
    config = model_config.hf_config
    if request is None or lora_config is None or not isinstance(config, BailingMoeV2Config):
        return
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.platforms import current_platform

    folder = _folder_of(request.lora_path)
    if not (folder / CONFIG).is_file():
        raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
    limits = Limits(
        config,
        tuple(lora_config.target_modules),
        lora_config.max_lora_rank,
        adapter_dtype(lora_config, model_config.dtype),
        _NO_EXPERTS_ON_CPU if current_platform.is_cpu() else None,
        knows_scales_of_modules(),
        functools.partial(_read_as_vllm_does, lora_config),
    )
    check_adapter(folder, limits)


def _read_as_vllm_does(lora_config: Any, folder: Path) -> None:
    """What vLLM refuses in an adapter's settings it refuses in a step of the engine, which does not survive that."""
    from vllm.lora.peft_helper import PEFTHelper

    try:
        settings = PEFTHelper.from_local_dir(str(folder), None)
        settings.validate_legal(lora_config)
    except Exception as error:  # of whatever kind
        raise AdapterError(f"vLLM does not take its {CONFIG}: {shown(error)}") from None


def _folder_of(path: str) -> Path:
    local = Path(path).expanduser()
    return local.absolute() if local.is_dir() else _fetched(path)


@functools.lru_cache(maxsize=256)  # the hub is asked once, not for every request
def _fetched(path: str) -> Path:
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(path))
