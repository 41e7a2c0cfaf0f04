"""What is read from checkpoints for the training of a layer, and the checkpoint that comes of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.draft_target import KEY, DraftTarget
from vllm_bailing.errors import TrainError
from vllm_bailing.reference_layers import BailingMoeV2MTPLayer
from vllm_bailing.tensor_names import EMBEDDING, HEAD, layer_of

WEIGHTS, INDEX, MTP_WEIGHTS = "model.safetensors", "model.safetensors.index.json", "model-mtp.safetensors"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def read_tensors(checkpoint: Checkpoint, config: BailingMoeV2Config, names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by their published names.

    Raises:
        TrainError: If one is missing.
    """
    published, tensors = checkpoint.published(config).tensors, {}
    with contextlib.ExitStack() as files:
        opened: dict[Path, Any] = {}

        def file(path: Path) -> Any:
            if path not in opened:
                opened[path] = files.enter_context(safe_open(path, framework="pt"))
            return opened[path]

        for name in names:
            if name not in published:
                raise TrainError(f"{checkpoint.folder} has no {name}; `vllm-bailing doctor` says what it holds")
            tensors[name] = published[name].read(file)
    return tensors


def embedding_and_head(checkpoint: Checkpoint, config: BailingMoeV2Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The target's embedding and head [vocab, H]; the head normalized if the configuration asks for it."""
    names = [EMBEDDING] if config.tie_word_embeddings else [EMBEDDING, HEAD]
    tensors = read_tensors(checkpoint, config, names)
    embedding, head = tensors[EMBEDDING].to(dtype), tensors[names[-1]]
    if config.norm_head:  # as `BailingMoeV2ForCausalLM.logits`
        head = nn.functional.normalize(head.float(), dim=0, eps=1e-7)
    return embedding, head.to(dtype)


def layer_from(checkpoint: Checkpoint | None, config: BailingMoeV2Config, seed: int) -> BailingMoeV2MTPLayer:
    """The MTP layer of a checkpoint in fp32, or a random one.

    Args:
        config: Of the target, with one MTP layer.
    """
    torch.manual_seed(seed)
    index = config.num_hidden_layers
    layer = BailingMoeV2MTPLayer(config, index)
    if checkpoint is None:
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.initializer_range)
        return layer
    prefix = f"model.layers.{index}."
    stored = read_tensors(checkpoint, config, (prefix + name for name in layer.state_dict()))
    layer.load_state_dict({name.removeprefix(prefix): tensor.float() for name, tensor in stored.items()})
    return layer


def published_layer(state: dict[str, Tensor], config: BailingMoeV2Config) -> dict[str, Tensor]:
    """The layer's tensors under their names in a checkpoint, in bf16 but for the expert bias."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    return {
        prefix + name: (tensor.float() if name.endswith("expert_bias") else tensor.bfloat16()).contiguous().cpu()
        for name, tensor in state.items()
    }


def write_draft(out: Path, layer: dict[str, Tensor], target: Path, made_for: DraftTarget) -> None:
    """Write the MTP layer alone as a checkpoint that vLLM takes as a draft.

    Embedding and head are the target's, so they are not in it.

    Args:
        layer: Of `published_layer`.
        target: Folder of the target.
    """
    out.mkdir(parents=True, exist_ok=True)
    raw = json.loads((target / "config.json").read_text(encoding="utf-8"))
    raw |= {"num_nextn_predict_layers": 1, KEY: made_for.to_json(), "torch_dtype": "bfloat16"}
    raw.pop("dtype", None)
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    _save(layer, out / WEIGHTS)
    for name in TOKENIZER:
        if (target / name).is_file():
            shutil.copyfile(target / name, out / name)


def write_merged(out: Path, layer: dict[str, Tensor], target: Path, made_for: DraftTarget) -> None:
    """Write a copy of the target's folder that holds the MTP layer in place of one that it may have."""
    out.mkdir(parents=True)
    weight_map: dict[str, str] = dict.fromkeys(layer, MTP_WEIGHTS)
    for file in sorted(target.iterdir()):
        if file.name in (INDEX, "config.json") or not file.is_file():
            continue
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
            continue
        names = _names(file)
        kept = [name for name in names if not _is_mtp(name, layer)]
        if len(kept) == len(names):
            shutil.copyfile(file, out / file.name)
        elif kept:
            tensors = load_file(file)
            _save({name: tensors[name] for name in kept}, out / file.name)
        weight_map.update(dict.fromkeys(kept, file.name))
    _save(layer, out / MTP_WEIGHTS)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    raw = json.loads((target / "config.json").read_text(encoding="utf-8"))
    raw |= {"num_nextn_predict_layers": 1, KEY: made_for.to_json()}
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _is_mtp(name: str, layer: dict[str, Tensor]) -> bool:
    return layer_of(name) in {layer_of(own) for own in layer}


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a file that all may read; safetensors itself lets only its owner."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)
