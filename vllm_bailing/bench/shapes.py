"""Models to measure: named shapes with dummy weights, and checkpoints as vLLM's own class takes them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from vllm_bailing import DEMO
from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.config import ARCHITECTURE, MODEL_TYPE, BailingMoeV2Config, read_config
from vllm_bailing.errors import BenchError
from vllm_bailing.tensor_names import layer_of, main_tensors

# What Ling-mini-2.0 and Ling-flash-2.0 have in common; a test compares these with tests/data/zoo.json.
_PUBLISHED: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": MODEL_TYPE,
    "torch_dtype": "bfloat16",
    "vocab_size": 157184,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 32768,
}
_MINI = {
    **_PUBLISHED,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 512,
}
_FLASH = {
    **_PUBLISHED,
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 1024,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mini": _MINI,
    "flash": _FLASH,
    "flash-4L": {**_FLASH, "num_hidden_layers": 4},
    "flash-8L": {**_FLASH, "num_hidden_layers": 8},
    "mid": {  # 454 million parameters, for CPUs
        **_PUBLISHED,
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 2560,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 64,
        "moe_intermediate_size": 256,
    },
}


def write_shape(name: str, folder: Path, mtp_layers: int = 0) -> None:
    """Write the config.json of a named shape; vLLM fills the weights in with `load_format="dummy"`."""
    config = {**SHAPES[name], "num_nextn_predict_layers": mtp_layers}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def add_tokenizer(folder: Path) -> None:
    """Give a model the demo's tokenizer and chat template: MTP is measured on user messages."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)


def load_config(model: str) -> BailingMoeV2Config:
    """The configuration of a checkpoint, a folder or a name on the hub.

    Raises:
        BenchError: As `read_config` raises ValueError.
    """
    try:
        return read_config(model)
    except ValueError as error:
        raise BenchError(str(error)) from None


def without_mtp(model: str, folder: Path) -> str:
    """`model`, or where it has MTP layers a copy in `folder` without them: vLLM's own class refuses such checkpoints.

    A checkpoint that has not been fetched from the hub yet stays as it is.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    checkpoint, config = Checkpoint.at(model), load_config(model)
    if checkpoint.folder is None or not checkpoint.layers_past_main(config):
        return model
    folder.mkdir(parents=True, exist_ok=True)
    for file in {stored.file for stored in checkpoint.tensors.values()}:
        names = [name for name, stored in checkpoint.tensors.items() if stored.file == file]
        kept = [name for name in names if (layer_of(name) or 0) < config.num_hidden_layers]
        if len(kept) == len(names):
            (folder / file.name).symlink_to(file.resolve())
        elif kept:
            with safe_open(file, framework="pt") as opened:
                save_file({name: opened.get_tensor(name) for name in kept}, folder / file.name, {"format": "pt"})
    stored = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    stored["num_nextn_predict_layers"] = 0
    (folder / "config.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    for file in checkpoint.folder.iterdir():  # the tokenizer's, for instance
        if file.is_file() and ".safetensors" not in file.name and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    return str(folder)


def parameters(config: BailingMoeV2Config) -> int:
    """Number of parameters, MTP layers excluded."""
    return sum(math.prod(shape) for shape in main_tensors(config).values())
