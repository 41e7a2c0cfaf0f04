"""Retrieval beyond the trained window: train a small model that looks facts up, then measure it with and without YaRN.

    python scripts/demo/needle.py train      writes tests/data/needle (a quarter of an hour on two cores)
    python scripts/demo/needle.py measure    serves it through vLLM, prints the table, writes docs/needle.json and .png

A prompt is filler with facts in it, each a key and the value after it, and ends with one of the keys. The answer is
one token, the value of that key. The model sees 256 tokens in training; measured is up to four times that.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from demo_files import NEEDLE, ROOT, rounded, write_weights
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_bailing.bench.plots import figure_at
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.reference import BailingMoeV2ForCausalLM

WINDOW = 256  # tokens, in training
FACTOR = 4
FILLER, KEYS, VALUES = range(1, 64), range(64, 160), range(160, 256)
FACTS = 8
CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": WINDOW,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.06,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
    "pad_token_id": 0,
}
YARN = {"rope_scaling": {"type": "yarn", "factor": FACTOR, "original_max_position_embeddings": WINDOW}}
PLAIN = {"max_position_embeddings": FACTOR * WINDOW}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def lesson(rng: random.Random, length: int, filler: float) -> tuple[list[int], list[bool]]:
    """A training text that mentions its facts several times, and where a value can be known from an earlier mention."""
    facts = dict(zip(rng.sample(KEYS, FACTS), rng.choices(VALUES, k=FACTS), strict=True))
    ids: list[int] = []
    known: list[bool] = []
    seen: set[int] = set()
    while len(ids) < length:
        if rng.random() >= filler:
            key = rng.choice(list(facts))
            ids += [key, facts[key]]
            known += [False, key in seen]
            seen.add(key)
        else:
            ids.append(rng.choice(FILLER))
            known.append(False)
    return ids[:length], known[:length]


def echo(rng: random.Random, length: int) -> tuple[list[int], list[bool]]:
    """A random text that repeats itself: every token of the repetition can be known."""
    period = rng.randrange(length // 4, length // 2)
    ids = rng.choices([*KEYS, *VALUES], k=period)
    ids = (ids * (length // period + 1))[:length]
    return ids, [place > period for place in range(length)]


def question(rng: random.Random, length: int, depth: float) -> tuple[list[int], int]:
    """A prompt of `length` tokens whose fact stands at `depth` (0: start, 1: end) among others, and the answer."""
    ids = rng.choices(FILLER, k=length)
    room = length - 3
    keys, values = rng.sample(KEYS, FACTS), rng.choices(VALUES, k=FACTS)
    places = {round(depth * room)}
    while len(places) < FACTS:
        place = rng.randrange(room)
        if all(abs(place - other) > 1 for other in places):
            places.add(place)
    first = round(depth * room)
    for place, key, value in zip([first, *(places - {first})], keys, values, strict=True):
        ids[place : place + 2] = [key, value]
    ids[-1] = keys[0]
    return ids, values[0]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = NEEDLE,
    minutes: Annotated[float, typer.Option(help="How long to train.")] = 15,
    batch: Annotated[int, typer.Option(help="Texts per step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: int = 0,
) -> None:
    """Train the model from scratch and write it in bf16."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = BailingMoeV2ForCausalLM(BailingMoeV2Config(**CONFIG)).train()
    with torch.no_grad():  # norms on queries and keys bound the logits; sharp attention is what this needs
        for name, parameter in model.named_parameters():
            if name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
                parameter.fill_(2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    started, step = time.perf_counter(), 0
    while (spent := (time.perf_counter() - started) / 60) < minutes:
        progress = spent / minutes
        # Short texts first: a head that finds the key before a value forms there within minutes.
        length = WINDOW if progress > 0.5 else 64
        texts = batch * WINDOW // length
        if progress < 0.3:
            rows = [echo(rng, length) for _ in range(texts // 2)] + [lesson(rng, length, 0) for _ in range(texts // 2)]
        else:
            rows = [lesson(rng, length, 0.75) for _ in range(texts)]
        ids, known = (torch.tensor(column) for column in zip(*rows, strict=True))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, step / 100) * min(1.0, 2 * (1 - progress)) + 1e-6
        logits = model(ids, use_cache=False).logits[:, :-1]
        each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        mask = known[:, 1:]
        loss = each[mask].mean()
        (loss + 0.05 * each.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            right = (logits.argmax(-1) == ids[:, 1:])[mask].float().mean()
            print(f"{spent:5.1f} min  step {step}  loss {loss:.3f}  right {100 * right:.1f} %", flush=True)
        step += 1
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n", encoding="utf-8")
    write_weights(rounded(model.state_dict()), out / "model.safetensors")


def questions(length: int, depths: list[float], count: int, seed: int = 1) -> dict[float, list[tuple[list[int], int]]]:
    """`count` questions at each depth, `length` tokens with their answers."""
    return {
        depth: [
            question(random.Random(f"{seed}/{length}/{depth}/{number}"), length - 1, depth) for number in range(count)
        ]
        for depth in depths
    }


def served(model: str, overrides: dict[str, Any], prompts: list[list[int]]) -> list[int]:
    """First token of the greedy answers of a vLLM engine."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        hf_overrides=overrides,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=FACTOR * WINDOW,
    )
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [output.outputs[0].token_ids[0] for output in outputs]


@app.command()
def measure(
    model: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = NEEDLE,
    count: Annotated[int, typer.Option(help="Questions per cell.")] = 40,
    out: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = ROOT / "docs" / "needle",
) -> None:
    """Share of right answers by prompt length and depth, with YaRN and without."""
    lengths, depths = [WINDOW, 2 * WINDOW, FACTOR * WINDOW], [number / 10 for number in range(11)]
    cells = {length: questions(length, depths, count) for length in lengths}
    asked = [one for length in lengths for rows in cells[length].values() for one in rows]
    shares: dict[str, dict[int, list[float]]] = {}
    for arm, overrides in track({"YaRN": YARN, "none": PLAIN}.items(), description="engines"):
        tokens = iter(served(str(model), overrides, [prompt for prompt, _ in asked]))
        shares[arm] = {
            length: [sum(next(tokens) == value for _, value in rows) / count for rows in cells[length].values()]
            for length in lengths
        }
    table = Table("tokens", "scaling", *(f"{depth:.0%}" for depth in depths), "all")
    for length in lengths:
        for arm, found in shares.items():
            row = found[length]
            table.add_row(str(length), arm, *(f"{100 * one:.0f}" for one in row), f"{100 * sum(row) / len(row):.1f}")
    Console(width=120).print(table)
    out.with_suffix(".json").write_text(json.dumps({"depths": depths, "shares": shares}, indent=1) + "\n")
    plot(depths, shares, out.with_suffix(".png"))


def plot(depths: list[float], shares: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Heat maps of the shares."""
    options = {"panels": len(shares), "sharey": True, "layout": "constrained"}
    with figure_at(path, (10, 2.6), **options) as (figure, axes):
        image = None
        for axis, (arm, by_length) in zip(axes, shares.items(), strict=True):
            image = axis.imshow(list(by_length.values()), vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set(title=f"scaling: {arm}", xlabel="depth of the fact, %")
            axis.set_xticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths], fontsize=7)
            axis.set_yticks(range(len(by_length)), [str(length) for length in by_length])
            for y, row in enumerate(by_length.values()):
                for x, share in enumerate(row):
                    ink = "white" if sum(image.cmap(image.norm(share))[:3]) < 1.6 else "black"
                    axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=ink)
        axes[0].set_ylabel("tokens in the prompt")
        figure.colorbar(image, ax=axes, label="right")


if __name__ == "__main__":
    app()
