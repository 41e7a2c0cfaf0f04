"""Small random checkpoints, and damaged copies of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write `tensors` as one file, or as several with an index."""
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def quantize_linears(folder: Path, listed: tuple[str, ...] = ()) -> Path:
    """Store attention, dense and shared MLPs as int8 with a scale per row (compressed-tensors, W8A8 dynamic).

    Experts stay as they are, since vLLM's CPU build has no kernel for them; so does every module matched by `listed`,
    and `eh_proj`, which is left out of the ignore list like in the vendor's exports.
    """
    ignored = ["lm_head", r"re:.*mlp\.experts.*", r"re:.*mlp\.gate$", *listed]
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read_tensors(folder).items():
        module, _, leaf = name.rpartition(".")
        is_linear = leaf == "weight" and module.endswith(("query_key_value", "dense", "_proj"))
        if not is_linear or ".experts." in name or module.endswith("eh_proj"):
            tensors[name] = tensor
        else:
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor.float() / scale).round().to(torch.int8)
            tensors[f"{module}.weight_scale"] = scale
    config = json.loads((folder / "config.json").read_text())
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors)
    return folder


@torch.no_grad()
def plain_answer(folder: Path, prompt: list[int], max_tokens: int = 16) -> tuple[torch.Tensor, list[int]]:
    """What the plain PyTorch reference answers: as `engine.generate`, for one prompt, in fp32."""
    model = BailingMoeV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    logprobs = model(ids).logits[0].log_softmax(-1)[:-1]
    answer = model.generate(ids, max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    return logprobs, answer[0, len(prompt) :].tolist()
