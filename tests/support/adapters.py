"""LoRA adapters as PEFT and LLaMA-Factory write them, and checkpoints that they are merged into."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import save_file

from tests.support.checkpoints import read_tensors, write_tensors
from tests.support.engine import ask, make_llm
from tests.support.speculation import counters

ATTENTION = ("query_key_value", "dense")
MLP = ("gate_proj", "up_proj", "down_proj")
EXPERTS_NAME = ".mlp.experts."


def make_adapter(folder, model, targets, rank=4, alpha=8, seed=0, keep=lambda module: EXPERTS_NAME not in module):
    """Write an adapter of all modules whose name ends in one of `targets`, as far as `keep` wants them."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in read_tensors(model).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets and weight.dim() == 2 and keep(module):
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(rank, weight.shape[1], generator=draw)
            tensors[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(weight.shape[0], rank, generator=draw)
    assert tensors
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(targets),
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(model, adapter, out):
    """A copy of `model` in fp32 with the adapter's products added to its weights."""
    shutil.copytree(model, out)
    config = json.loads((adapter / "adapter_config.json").read_text())
    changes, tensors = read_tensors(adapter), {name: tensor.float() for name, tensor in read_tensors(model).items()}
    for name in list(changes):
        if name.endswith("lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            product = changes[name.replace("lora_A", "lora_B")] @ changes[name]
            tensors[f"{module}.weight"] += config["lora_alpha"] / config["r"] * product
    write_tensors(out, tensors)
    (out / "config.json").write_text(
        json.dumps({**json.loads((model / "config.json").read_text()), "torch_dtype": "float32"})
    )
    return out


def adapted(model, batch, max_tokens=16, logprobs=True, **options):
    """`engine.ask` for each (prompt, adapter folder or None), and the counters."""
    from vllm.lora.request import LoRARequest

    folders = sorted({str(adapter) for _, adapter in batch if adapter})
    defaults = {"enable_lora": True, "max_loras": max(len(folders), 1), "disable_log_stats": False}
    llm = make_llm(model, **{**defaults, **options})
    known = {folder: LoRARequest(f"adapter-{i}", i + 1, folder) for i, folder in enumerate(folders)}
    adapters = [known[str(adapter)] if adapter else None for _, adapter in batch]
    return ask(llm, [prompt for prompt, _ in batch], max_tokens, logprobs, adapters), counters(llm)
