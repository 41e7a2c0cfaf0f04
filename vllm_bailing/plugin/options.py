"""Keys of `--additional-config` that this package reads, and what they may hold."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from vllm_bailing.errors import SettingsError, shown, told
from vllm_bailing.json_files import read_json

# Keys of --additional-config.
DRAFT_VOCABULARY = "bailing_draft_vocab"
FP32_ROUTER = "bailing_fp32_router"
FUSED_QK_NORM_ROPE = "bailing_fused_qk_norm_rope"
CPU_KERNELS = "bailing_cpu_kernels"
SEQUENCE_PARALLEL = "bailing_sequence_parallel"
_SWITCHES = (FP32_ROUTER, FUSED_QK_NORM_ROPE, CPU_KERNELS, SEQUENCE_PARALLEL)
_KEYS = (DRAFT_VOCABULARY, *_SWITCHES)


def _additional(vllm_config: Any, key: str) -> Any:
    given = vllm_config.additional_config
    return given.get(key) if isinstance(given, dict) else None


def _switch(vllm_config: Any, key: str) -> bool | None:
    given = _additional(vllm_config, key)
    if given is not None and not isinstance(given, bool):
        raise SettingsError(f"{key}={told(given)} in --additional-config must be true or false")
    return given


def keeps_fp32_router(vllm_config: Any) -> bool:
    """Whether `--additional-config` asks for router weights in fp32 whatever the first ones need.

    Raises:
        SettingsError: If it is neither true nor false.
    """
    return bool(_switch(vllm_config, FP32_ROUTER))


def wants_fused_qk_norm_rope(vllm_config: Any) -> bool | None:
    """Whether `--additional-config` asks for the fused kernel, or rules it out; None if it leaves that open.

    Raises:
        SettingsError: If it is neither true nor false.
    """
    return _switch(vllm_config, FUSED_QK_NORM_ROPE)


def wants_cpu_kernels(vllm_config: Any) -> bool | None:
    """Whether `--additional-config` asks for the kernels of `plugin.kernels.cpu`, or rules them out; None if open.

    Raises:
        SettingsError: If it is neither true nor false.
    """
    return _switch(vllm_config, CPU_KERNELS)


def keeps_sequence_parallel(vllm_config: Any) -> bool:
    """Whether `--additional-config` asks to keep hidden states divided by tokens from attention through the experts.

    Raises:
        SettingsError: If it is neither true nor false.
    """
    return bool(_switch(vllm_config, SEQUENCE_PARALLEL))


def check_switches(vllm_config: Any) -> None:
    """Check the keys that are true or false, and that none of this package's is misspelt.

    Raises:
        SettingsError: If one of them is neither, or a key says `bailing` and is none of ours.
    """
    given = vllm_config.additional_config
    for key in given if isinstance(given, dict) else ():
        if key not in _KEYS and "bailing" in str(key).lower():
            near = difflib.get_close_matches(str(key).lower().replace("-", "_"), _KEYS, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(_KEYS)}"
            raise SettingsError(f"{told(key)} in --additional-config is not a key of vllm-bailing; {meant}")
    for key in _SWITCHES:
        _switch(vllm_config, key)


def draft_vocabulary(vllm_config: Any) -> list[int] | None:
    """Token ids that an MTP draft may propose, from `--additional-config`; None for all.

    Raises:
        SettingsError: If they are not a list of token ids, or a file with one.
    """
    given = _additional(vllm_config, DRAFT_VOCABULARY)
    if given is None:
        return None
    source, vocab_size = DRAFT_VOCABULARY, vllm_config.model_config.hf_config.vocab_size
    if isinstance(given, str):
        source = f"{DRAFT_VOCABULARY} {shown(given)}"
        try:
            given = read_json(Path(given))
        except ValueError as error:
            raise SettingsError(f"{source} {error}; make one by `vllm-bailing draft-vocab`") from None
    ids = sorted(set(given)) if isinstance(given, list) and all(type(token) is int for token in given) else []
    if not ids or ids[0] < 0 or ids[-1] >= vocab_size:
        raise SettingsError(
            f"{source} must hold a list of token ids from 0 to {vocab_size - 1}, not {told(given)}; "
            "make one by `vllm-bailing draft-vocab`"
        )
    return ids
