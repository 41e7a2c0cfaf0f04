"""What quantized weights cost in quality: the demo checkpoint in every scheme of `vllm-bailing quantize`.

    python scripts/bench/bench_quantized.py
    python scripts/bench/bench_quantized.py --step 10

The plain reference computes in fp32 with what the quantized weights mean, so that weights are all that differs; with
`+ a8` what goes into an expert is rounded to 8 bits for each token besides, as the int8 and int4 kernels do. Compared
with the checkpoint as it is on the held-out conversations. Neither vLLM nor a kernel runs. Writes docs/quantized.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_files import ROOT
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_bailing import DEMO
from vllm_bailing.config import read_config
from vllm_bailing.tools.quantize import Scheme, quantize
from vllm_bailing.tools.verify_tensors import TensorReader

sys.path.insert(0, str(ROOT / "scripts" / "demo"))
import train_demo  # pyright: ignore[reportMissingImports]

# Name: scheme, group, whether activations are rounded.
ARMS: dict[str, tuple[Scheme | None, int, bool]] = {
    "fp8, blocks": (Scheme.fp8_block, 0, False),
    "fp8, channels": (Scheme.fp8, 0, False),
    "int8": (Scheme.w8a8, 0, False),
    "int8 + a8": (Scheme.w8a8, 0, True),
    "int4, groups of 32": (Scheme.w4a16, 32, False),
    "int4, groups of 32, + a8": (Scheme.w4a16, 32, True),
    "int4, groups of 64": (Scheme.w4a16, 64, False),
}


def _round_to_8_bits(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    x = inputs[0]
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-7) / 127
    return ((x / scale).round() * scale, *inputs[1:])


@torch.no_grad()
def _take_weights(model: torch.nn.Module, folder: Path) -> int:
    """Give `model` what the checkpoint in `folder` means; returns how many tensors changed."""
    reader, changed = TensorReader(folder, read_config(folder)), 0
    for name, parameter in model.named_parameters():
        meaning = reader.tensor(name)
        changed += not torch.equal(parameter, meaning)
        parameter.copy_(meaning)
    reader.close()
    return changed


@torch.no_grad()
def _logprobs(model: Any, tokenizer: Any, chats: list[Any]) -> list[torch.Tensor]:
    ids = [torch.tensor([train_demo.encode(tokenizer, chat, last_only=True).ids]) for chat in chats]
    return [model(one, use_cache=False).logits[0].log_softmax(-1) for one in ids]


def _measured(model: Any, tokenizer: Any, chats: list[Any], wanted: list[torch.Tensor]) -> dict[str, float]:
    found = _logprobs(model, tokenizer, chats)
    tokens = sum(len(one) for one in wanted)
    divergence = sum(float((right.exp() * (right - one)).sum()) for one, right in zip(found, wanted, strict=True))
    same = sum(int((one.argmax(-1) == right.argmax(-1)).sum()) for one, right in zip(found, wanted, strict=True))
    scores = train_demo.evaluate(model, tokenizer, chats).values()
    return {
        "kl": divergence / tokens,
        "same_top_1": same / tokens,
        "exact": sum(one.exact for one in scores) / sum(one.prompts for one in scores),
        "accepted": sum(one.accepted for one in scores) / sum(one.drafts for one in scores),
    }


def main(
    step: Annotated[int, typer.Option(help="Every so many of the held-out conversations.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="File to write.")] = ROOT / "docs" / "quantized.json",
) -> None:
    """Measure and print the table."""
    chats = train_demo.load_heldout(train_demo.HELDOUT)[::step]
    plain, tokenizer = train_demo.load_checkpoint(DEMO)
    wanted = _logprobs(plain, tokenizer, chats)
    rows = {"fp32": _measured(plain, tokenizer, chats, wanted)}
    with tempfile.TemporaryDirectory() as work:
        for name, (scheme, group, rounds) in track(ARMS.items(), description="schemes", console=Console(stderr=True)):
            folder = Path(work) / name.replace(" ", "-")
            quantize(str(DEMO), folder, scheme, group or 128)
            model, _ = train_demo.load_checkpoint(DEMO)
            assert _take_weights(model, folder) > 0
            if rounds:
                for path, module in model.named_modules():
                    if ".mlp.experts." in path and isinstance(module, torch.nn.Linear):
                        module.register_forward_pre_hook(_round_to_8_bits)
            rows[name] = _measured(model, tokenizer, chats, wanted)
    table = Table("weights", "KL, nats", "same top-1", "exact answers", "MTP drafts accepted")
    for name, row in rows.items():
        shares = [f"{100 * row[key]:.2f} %" for key in ("same_top_1", "exact", "accepted")]
        table.add_row(name, f"{row['kl']:.1e}", *shares)
    Console(width=100).print(table)
    out.write_text(json.dumps({"conversations": len(chats), "arms": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
