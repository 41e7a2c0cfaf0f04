"""A fine-tune of the demo to train an MTP layer for: `python scripts/demo/fine_tune.py --out fine-tune`.

Writes a copy of the demo in fp32 with an adapter merged into its main layers, whose MTP layer is still the demo's, and
prompts.jsonl with prompts of the kinds that the demo was trained on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from demo_corpus import training_chats
from demo_files import write_weights
from safetensors.torch import load_file

from vllm_bailing import DEMO, DEMO_ADAPTER


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    adapter: Annotated[Path, typer.Option(help="The adapter that is merged.")] = DEMO_ADAPTER,
    prompts: Annotated[int, typer.Option(help="How many to write.")] = 1500,
    seed: int = 7,
) -> None:
    """Write the fine-tune and the prompts."""
    shutil.copytree(DEMO, out)
    weights = {name: tensor.float() for name, tensor in load_file(DEMO / "model.safetensors").items()}
    changes = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for name, down in changes.items():
        if name.endswith("lora_A.weight"):
            weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            up = changes[name.replace("lora_A", "lora_B")].float()
            weights[weight] += config["lora_alpha"] / config["r"] * up @ down.float()
    write_weights(weights, out / "model.safetensors")
    raw = json.loads((DEMO / "config.json").read_text(encoding="utf-8")) | {"torch_dtype": "float32"}
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    chats, rows = training_chats(seed, part=2_000_000), []
    for _ in range(prompts):
        chat = next(chats)
        row: dict[str, Any] = {"kind": chat.kind, "messages": chat.messages}
        if chat.tools:
            row["tools"] = chat.tools
        if chat.thinking:
            row["chat_template_kwargs"] = {"enable_thinking": True}
        rows.append(f"{json.dumps(row)}\n")
    (out / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    typer.echo(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
