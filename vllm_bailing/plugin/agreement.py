"""Ranks of a deployment that are not alike: other versions, other settings, another model class on one of the nodes.

Such ranks would start, and their answers would mix what each of them computes.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from vllm_bailing import __version__
from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.errors import SettingsError, told

WAIT = timedelta(seconds=60)  # ranks met a moment ago, when they formed their group
_MOST_DIFFERENCES = 3  # in a message


def check_ranks_agree(vllm_config: Any, model_class: type) -> None:
    """Compare with all other ranks what decides on the answers; every rank calls this before it builds the model.

    Args:
        model_class: Of the model: this package's, or vLLM's own where that was asked for.

    Raises:
        SettingsError: On every rank, if a rank differs, or has not called this after a minute.
    """
    import torch
    from vllm.distributed import get_world_group

    group = get_world_group()
    # A rank that joins a running engine would wait for the others, which have their model.
    if group.world_size == 1 or getattr(vllm_config.parallel_config, "enable_elastic_ep", False):
        return
    try:
        torch.distributed.monitored_barrier(group.cpu_group, WAIT, wait_all_ranks=True)
    except RuntimeError as error:
        raise SettingsError(
            f"rank {group.rank} on {socket.gethostname()}: not all of the {group.world_size} ranks have vllm-bailing "
            f"{__version__} ({_first_line(error)}); install it on every node, and leave it in VLLM_PLUGINS"
        ) from None
    everyone: list[Any] = [None] * group.world_size
    own = (socket.gethostname(), _identity(vllm_config, model_class))
    torch.distributed.all_gather_object(everyone, own, group.cpu_group)
    if problem := disagreement(everyone):
        raise SettingsError(problem)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rpartition("] ")[2].rstrip(".")


def _identity(vllm_config: Any, model_class: type) -> dict[str, Any]:
    """What has to be the same on all ranks, by the name that a user knows it by."""
    model_config = vllm_config.model_config
    checkpoint = Checkpoint.of(model_config).published(model_config.hf_config)
    return {
        "vllm-bailing": __version__,
        "model class": f"{model_class.__module__}.{model_class.__name__}",
        "vllm": version("vllm"),
        "torch": version("torch"),
        "--dtype": str(model_config.dtype),
        "--quantization": model_config.quantization,
        "--additional-config": vllm_config.additional_config,
        "bytes of weights": checkpoint.size,
        **_settings(model_config.hf_config),
    }


_OWN_TO_A_NODE = ("_name_or_path",)


def _settings(config: Any) -> dict[str, Any]:
    return {f"config.json {key}": value for key, value in config.to_dict().items() if key not in _OWN_TO_A_NODE}


def disagreement(everyone: list[tuple[str, dict[str, Any]]]) -> str:
    """In which ranks differ, in one line; empty if they do not.

    Args:
        everyone: For each rank its host, and what has to be the same by its name.
    """
    host, first = everyone[0]
    for rank, (other_host, other) in enumerate(everyone):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if not names:
            continue
        differences = [f"{name} {told(first.get(name))} and {told(other.get(name))}" for name in names]
        if len(names) > _MOST_DIFFERENCES:
            differences[_MOST_DIFFERENCES:] = [f"{len(names) - _MOST_DIFFERENCES} more"]
        return (
            f"rank 0 on {host} and rank {rank} on {other_host} differ in {'; '.join(differences)}; install the same "
            "packages, and give every node the same files, flags and environment"
        )
    return ""
