"""Small random checkpoints, and damaged copies of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.configs import change_config
from vllm_bailing import DEMO
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.reference import BailingMoeV2ForCausalLM

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "partial_rotary_factor": 0.5,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 2.5,
    "model_type": "bailing_moe",
    "architectures": ["BailingMoeV2ForCausalLM"],
    "eos_token_id": 0,
    "pad_token_id": 0,
}
PROMPT = [(7 * i * i + 3 * i + 11) % 256 for i in range(48)]


def make_checkpoint(folder: Path, seed: int = 0, shards: int = 1, **overrides: Any) -> Path:
    """Write a random checkpoint with the published tensor names; `overrides` change config.json, None removes a key.

    Weights are large enough for every part of the model to matter, and the expert biases enough to change the choice.
    """
    raw = {key: value for key, value in {**SMALL, **overrides}.items() if value is not None}
    torch.manual_seed(seed)
    config = BailingMoeV2Config(**{key: value for key, value in raw.items() if key != "model_type"})
    model = BailingMoeV2ForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("expert_bias"):
                tensor.uniform_(-0.3, 0.3)
            elif tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            else:
                tensor.normal_(std=1.0 if "word_embeddings" in name else 0.15)
    # Exact in bf16, as published weights are; only the expert bias is stored in fp32.
    tensors = {
        name: tensor.clone() if name.endswith("expert_bias") else tensor.bfloat16()
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**raw, "torch_dtype": "bfloat16"}))
    write_tensors(folder, tensors, shards)
    return folder


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, interleaved: bool = True) -> None:
    """Write `tensors` as one file, or as several with an index; names in turns or, as published, in runs."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        run = slice(shard * len(names) // shards, (shard + 1) * len(names) // shards)
        part = names[shard::shards] if interleaved else names[run]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@torch.no_grad()
def plain_answer(folder: Path, prompt: list[int], max_tokens: int = 16) -> tuple[torch.Tensor, list[int]]:
    """What the plain PyTorch reference answers: as `engine.generate`, for one prompt, in fp32."""
    model = BailingMoeV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    logprobs = model(ids).logits[0].log_softmax(-1)[:-1]
    answer = model.generate(ids, max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return logprobs, answer[0, len(prompt) :].tolist()


class Judge:
    """The plain reference with some tensors.

    Args:
        overrides: As those of `make_checkpoint`.
    """

    def __init__(self, **overrides: Any) -> None:
        self.model = BailingMoeV2ForCausalLM(small_config(**overrides)).float()

    @torch.no_grad()
    def logprobs(self, tensors: dict[str, torch.Tensor], prompt: list[int]) -> torch.Tensor:
        """Log-probabilities [T - 1, vocab] of the tokens after each one of `prompt`."""
        self.model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)[:-1]


def small_config(**overrides: Any) -> BailingMoeV2Config:
    """The configuration that `make_checkpoint` writes."""
    raw = {key: value for key, value in {**SMALL, **overrides}.items() if value is not None and key != "model_type"}
    return BailingMoeV2Config(**raw)


# --- damage -------------------------------------------------------------------------------------------------------

GATE = "model.layers.1.mlp.experts.5.gate_proj.weight"


def changed_demo(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **keys: Any) -> Path:
    """A copy of the demo checkpoint with other tensors and other keys in config.json."""
    shutil.copytree(DEMO, folder)
    if change:
        tensors = read_tensors(folder)
        change(tensors)
        write_tensors(folder, tensors)
    change_config(folder, **keys)
    return folder


def with_two_experts_swapped(tensors: dict[str, torch.Tensor]) -> None:
    for part in ("gate_proj", "up_proj", "down_proj"):
        one, other = (f"model.layers.2.mlp.experts.{expert}.{part}.weight" for expert in (0, 1))
        tensors[one], tensors[other] = tensors[other], tensors[one]


def with_a_tensor_transposed(model: Path) -> None:
    tensors = read_tensors(model)
    tensors[GATE] = tensors[GATE].T.contiguous()
    write_tensors(model, tensors)


def without_mtp_in_config(model: Path) -> None:
    change_config(model, num_nextn_predict_layers=0)


def without_its_end(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
