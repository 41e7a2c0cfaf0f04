"""Which target a trained MTP layer was made for: what its config.json says, and whether another target is that one.

A draft of another model of the same sizes is no error, only slow: every answer stays the target's own.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.config import BailingMoeV2Config, read_config
from vllm_bailing.errors import shown
from vllm_bailing.tensor_names import layer_of

KEY = "mtp_target"  # in the config.json of the draft
# What decides about a hidden state, beside the weights. `rope_parameters` is left out: YaRN is an option of serving.
_CONFIG_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "rotary_dim num_experts num_experts_per_tok n_group topk_group num_shared_experts moe_intermediate_size "
    "moe_shared_expert_intermediate_size first_k_dense_replace routed_scaling_factor rms_norm_eps norm_head "
    "tie_word_embeddings use_qk_norm use_qkv_bias use_bias moe_router_enable_expert_bias"
).split()
_SAMPLED_BYTES = 4096  # of each tensor


@dataclass(frozen=True)
class DraftTarget:
    """A target, as the value of `KEY` names it.

    Attributes:
        name: As the user gave it, without the folders above; for reading only.
        config: Hash of what config.json says of the architecture.
        weights: Hash of names, shapes and the first numbers of the main layers' tensors.
    """

    name: str
    config: str
    weights: str

    @classmethod
    def at(cls, folder: Path) -> DraftTarget:
        """That of a checkpoint in a folder; reads its headers, and 4 KiB of every tensor but the experts'.

        Which file holds a tensor makes no difference, nor whether there is an MTP layer.

        Raises:
            ValueError: If there is no configuration of this family, or a file cannot be read.
        """
        config = read_config(folder)
        checkpoint = Checkpoint.at(str(folder))
        if checkpoint.damage or not checkpoint.tensors:
            raise ValueError(checkpoint.damage or f"no safetensors files in {folder}")
        return cls(folder.resolve().name, _config_hash(config), _weights_hash(checkpoint, config))

    @classmethod
    def named_in(cls, config: Any) -> DraftTarget | None:
        """That for which the draft with this configuration was trained; None if it does not say."""
        value = getattr(config, KEY, None)
        if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("config", "weights")):
            return None
        return cls(*(shown(str(value.get(key, "?"))) for key in ("name", "config", "weights")))

    def is_same(self, other: DraftTarget) -> bool:
        """Whether both are the same model, whatever they are called."""
        return (self.config, self.weights) == (other.config, other.weights)

    def to_json(self) -> dict[str, str]:
        """The value of `KEY`."""
        return asdict(self)


def _config_hash(config: BailingMoeV2Config) -> str:
    return _short(json.dumps({key: getattr(config, key) for key in _CONFIG_KEYS}, sort_keys=True).encode())


def _weights_hash(checkpoint: Checkpoint, config: BailingMoeV2Config) -> str:
    digest = hashlib.sha256()
    files: dict[Path, Any] = {}
    for name, stored in sorted(checkpoint.tensors.items()):
        if (layer_of(name) or 0) >= config.num_hidden_layers:
            continue
        digest.update(f"{name} {stored.shape} {stored.kind}\n".encode())
        if ".experts." in name or not stored.shape or 0 in stored.shape:
            continue
        if stored.file not in files:
            files[stored.file] = safe_open(stored.file, framework="pt")
        # A fine-tune has the names and shapes of its base; its numbers are what tells them apart.
        part = files[stored.file].get_slice(stored.name)
        rows = max(1, _SAMPLED_BYTES // max(1, 2 * math.prod(stored.shape[1:])))
        digest.update(part[:rows].contiguous().flatten().view(dtype=_bytes()).numpy().tobytes()[:_SAMPLED_BYTES])
    return digest.hexdigest()[:16]


def _bytes() -> Any:
    import torch

    return torch.uint8


def _short(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def other_target(draft: Any, folder: Path) -> str | None:
    """What to say if the draft with configuration `draft` was trained for another target than that in `folder`.

    None if it was trained for this one, or does not say for which.
    """
    wanted = DraftTarget.named_in(draft)
    if wanted is None:
        return None
    try:
        actual = DraftTarget.at(folder)
    except (ValueError, OSError) as error:
        return f"whether the draft was trained for this target is unknown: {shown(error)}"
    if wanted.is_same(actual):
        return None
    what = "weights" if wanted.config == actual.config else "config.json"
    return (
        f"the draft was trained for {wanted.name}, and the {what} of {actual.name} differ from that: answers stay "
        "right, but fewer drafts may be accepted; measure with `vllm-bailing bench mtp`, or train one for this target "
        "by `vllm-bailing train-mtp`"
    )
