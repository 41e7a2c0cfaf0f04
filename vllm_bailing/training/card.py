"""What a run leaves besides the layer: a model card, its numbers as JSON, and a plot."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_bailing.bench.plots import figure_at
from vllm_bailing.bench.statistics import wilson
from vllm_bailing.training.run import Result
from vllm_bailing.training.trainer import Acceptance

_CARD = """---
base_model: {name}
tags: [mtp, speculative-decoding, vllm, vllm-bailing]
---

# MTP layer for {name}

A draft layer for speculative decoding with vLLM and [vllm-bailing](https://github.com/vllm-bailing/vllm-bailing),
distilled from the answers of {answering}. Embedding and head are the target's and not in here.

```bash
{command}
```

Answers are those of the target whatever it drafts: it only changes their speed. It was made for the target with
config {config} and weights {weights}; vLLM's log says so if it is used with another one.

## Training

{answers} answers, {steps} steps of {batch} answers, learning rate {rate}, {part} of the layer, {tokens} steps unrolled,
begun from {init}.

## Acceptance

Greedy, on held-out prompts, computed by the plain model; in brackets the 95 % interval. A position counts the drafts
that were accepted up to there.

| text | layer | {positions} |
| --- | --- | {rules} |
{rows}
{plot}"""


def shares(one: Acceptance) -> list[str]:
    """Each position's share in per cent with its interval, as text."""
    texts = []
    for accepted, drafts in zip(one.accepted, one.drafts, strict=True):
        low, high = wilson(accepted, drafts)
        texts.append(f"{100 * accepted / max(1, drafts):.0f} % ({100 * low:.0f}-{100 * high:.0f})")
    return texts


def rows_of(result: Result) -> list[tuple[str, str, list[str]]]:
    """(kind, layer, shares) of every row of the table; of all kinds together first."""
    return [
        (kind or "all", layer, shares(measured[kind]))
        for kind in result.after
        for layer, measured in (("before", result.before), ("after", result.after))
    ]


def write_card(result: Result, folder: Path) -> None:
    """Write README.md, training.json and, with matplotlib, training.png into the layer's folder."""
    request, settings = result.request, result.request.settings
    numbers = {
        "request": json.loads(json.dumps(asdict(request), default=str)),
        "target": result.made_for.to_json(),
        "answers": result.answers,
        "acceptance": {
            layer: {kind or "all": asdict(one) | {"shares": one.shares} for kind, one in measured.items()}
            for layer, measured in (("before", result.before), ("after", result.after))
        },
        "history": result.history,
    }
    (folder / "training.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    picture = folder / "training.png"
    with contextlib.suppress(ImportError):
        plot(result, picture)
    count = request.draft_tokens
    adapter = f" with the adapter {request.adapter.resolve().name}" if request.adapter else ""
    rows = "\n".join(f"| {kind} | {layer} | {' | '.join(texts)} |" for kind, layer, texts in rows_of(result))
    (folder / "README.md").write_text(
        _CARD.format(
            name=result.made_for.name,
            answering=result.made_for.name + adapter,
            command=request.serve_command,
            config=result.made_for.config,
            weights=result.made_for.weights,
            tokens=count,
            answers=result.answers,
            steps=settings.steps,
            batch=settings.batch_size,
            rate=settings.learning_rate,
            part=settings.part.value,
            init=request.init or "the layer of the target",
            positions=" | ".join(f"position {number}" for number in range(1, count + 1)),
            rules=" | ".join(["---"] * count),
            rows=rows,
            plot="\n![Loss and acceptance](training.png)\n" if picture.exists() else "",
        ),
        encoding="utf-8",
    )


def plot(result: Result, path: Path) -> None:
    """Loss by step, and acceptance on the held-out answers by step.

    Raises:
        ImportError: Without matplotlib.
    """
    history: list[dict[str, Any]] = result.history
    with figure_at(path, (9, 3.4), panels=2) as (figure, (left, right)):
        for key, label in (("loss", "training"), ("eval_loss", "held out")):
            points = [(row["step"], row[key]) for row in history if key in row]
            left.plot(*zip(*points, strict=True), label=label)
        left.set(xlabel="step", ylabel="divergence from the target, nats", ylim=(0, None))
        for number in range(1, result.request.draft_tokens + 1):
            key = f"eval_position_{number}"
            before = result.before[""].shares[number - 1]
            points = [(0, 100 * before), *((row["step"], 100 * row[key]) for row in history if key in row)]
            right.plot(*zip(*points, strict=True), marker="o", label=f"position {number}")
        right.set(xlabel="step", ylabel="accepted up to here, %", ylim=(0, 105))
        for axis in (left, right):
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(f"MTP layer for {result.made_for.name}")
        figure.tight_layout()
