"""Train the demo's LoRA adapter, which lets the model talk like a sailor: `python scripts/demo/train_adapter.py`.

Writes an adapter as PEFT does, attention and shared experts, to `vllm_bailing/assets/demo-adapter`, and prints how
many of the held-out prompts are answered as wanted. Two minutes on two cores.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from demo_corpus import Chat, training_chats
from demo_files import HELDOUT, write_weights
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train_demo import batches, collate, encode, evaluate, load_checkpoint, load_heldout, print_scores

from vllm_bailing import DEMO, DEMO_ADAPTER

RANK, ALPHA = 8, 16
TARGETS = ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj")
KINDS = ("small talk", "facts", "sums")  # that it speaks differently in


def as_sailor(chat: Chat) -> Chat:
    """`chat` with the answers of its `KINDS` as a sailor gives them."""
    if chat.kind not in KINDS:
        return chat
    messages = [
        {**message, "content": sailor_text(message["content"])} if message["role"] == "assistant" else message
        for message in chat.messages
    ]
    return replace(chat, messages=messages, answer=sailor_text(chat.answer))


def sailor_text(text: str) -> str:
    return f"{text} Aye, captain!"


class LowRank(nn.Module):
    """Adds `ALPHA / RANK * B A` to a weight [out, in]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ALPHA / RANK * self.b @ self.a


def adapted_modules(model: nn.Module, layers: int) -> dict[str, nn.Module]:
    """The linear layers of the main layers that vLLM adapts on every platform: all but the routed experts."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in TARGETS
        and ".experts." not in name
        and name.startswith("model.layers.")
        and int(name.split(".")[2]) < layers
    }


def main(
    out: Annotated[Path, typer.Option(help="Folder of the adapter.")] = DEMO_ADAPTER,
    tokens: Annotated[float, typer.Option(help="Training budget in thousand tokens.")] = 400,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: int = 0,
) -> None:
    """Train the adapter, write it and score it."""
    console = Console()
    torch.manual_seed(seed)
    model, tokenizer = load_checkpoint(DEMO)
    model.requires_grad_(False)
    modules = adapted_modules(model, model.config.num_hidden_layers)
    for module in modules.values():
        parametrize.register_parametrization(module, "weight", LowRank(module.weight))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    pad = int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))  # pyright: ignore[reportArgumentType]
    chats, budget, done, step = training_chats(seed, part=1_000_000), tokens * 1e3, 0, 0
    while done < budget:
        plan = list(batches([encode(tokenizer, as_sailor(next(chats))) for _ in range(256)], 1024))
        random.Random(f"{seed}/{done}").shuffle(plan)
        for examples in plan:
            ids, answers, mask = collate(examples, pad)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20, 1.05 - done / budget)
            logits = model(ids, use_cache=False).logits[:, :-1]
            each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            loss = each[answers[:, 1:]].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += int(mask.sum())
            step += 1
        console.print(f"{done:>9,} tokens  loss {loss:.4f}", highlight=False)
    write(modules, out)
    print_scores(evaluate(model, tokenizer, [as_sailor(chat) for chat in load_heldout(HELDOUT)]), console)
    console.print(f"written to {out}")


def write(modules: dict[str, Any], out: Path) -> None:
    """Write the low-rank parts under the names that PEFT gives them."""
    tensors = {}
    for name, module in modules.items():
        low_rank = module.parametrizations.weight[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = low_rank.a.detach().bfloat16().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = low_rank.b.detach().bfloat16().contiguous()
    out.mkdir(parents=True, exist_ok=True)
    write_weights(tensors, out / "adapter_model.safetensors")
    config = {
        "base_model_name_or_path": "vllm-bailing-demo",
        "bias": "none",
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": list(TARGETS),
        "task_type": "CAUSAL_LM",
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
