"""Remake the demo checkpoint from a seed: `python scripts/demo/train_demo.py`.

Writes weights, config, tokenizer, loss plot and model card to `vllm_bailing/assets/demo`, and the held-out prompts to
`tests/data/demo_heldout.jsonl`. An interrupted run goes on where it stopped when started again with `--resume`.
`--evaluate-only` scores the checkpoint that is there.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import typer
from demo_corpus import END, Chat, build_tokenizer, heldout_chats, render, training_chats
from demo_files import HELDOUT, ROOT, rounded, write_weights
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vllm_bailing import DEMO
from vllm_bailing.bench.plots import figure_at
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.reference import BailingMoeV2ForCausalLM, BailingMoeV2SparseMoe

MICRO_TOKENS = 512  # with padding
MICRO_BATCHES = 2  # per step
PROMPT_WEIGHT = 0.1  # of the loss on a token of a prompt; what repeats in prompts teaches to copy
COPYING_TOKENS = 1_200_000  # to begin with; a model that can copy learns everything else much faster
BIAS_RATE = 2e-3  # per step, falling to nothing over the run
PART_CHATS = 1024  # drawn at once, sorted by length and shuffled as micro-batches

CONFIG: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "first_k_dense_replace": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.06,
    "intermediate_size": 384,
    "max_position_embeddings": 2048,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 64,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 64,
    "mtp_loss_scaling_factor": 0.3,
    "n_group": 4,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 100,  # 16 turning channels have to tell neighbors apart as well as the ends of a conversation
    "rotary_dim": 16,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": 1024,
}


# --- data ---------------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """Token ids of a whole conversation, and which of them are answers (up to and with `<|role_end|>`)."""

    ids: list[int]
    is_answer: list[bool]


def encode(tokenizer: PreTrainedTokenizerFast, chat: Chat, last_only: bool = False) -> Example:
    """Tokens of `chat`; answers of all turns are marked, or those of the last turn only."""
    ids: list[int] = tokenizer.encode(render(tokenizer, chat))
    start = tokenizer.encode("<role>ASSISTANT</role>")
    end = tokenizer.convert_tokens_to_ids(END)
    is_answer, inside = [], False
    for i, token in enumerate(ids):
        is_answer.append(inside)
        inside = (inside and token != end) or ids[max(0, i + 1 - len(start)) : i + 1] == start
    if last_only:
        first = len(ids) - is_answer[::-1].index(False)
        is_answer[:first] = [False] * first
    return Example(ids, is_answer)


def collate(examples: list[Example], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, T], answer mask [B, T], token mask [B, T]), padded on the right, which causal attention never sees."""
    width = max(len(example.ids) for example in examples)
    ids = torch.tensor([example.ids + [pad] * (width - len(example.ids)) for example in examples])
    answers = torch.tensor([example.is_answer + [False] * (width - len(example.ids)) for example in examples])
    lengths = torch.tensor([len(example.ids) for example in examples])
    return ids, answers, torch.arange(width) < lengths[:, None]


def batches(examples: list[Example], tokens: int) -> Iterator[list[Example]]:
    """Cut `examples`, sorted by length, into batches of at most `tokens` tokens with their padding."""
    batch: list[Example] = []
    for example in sorted(examples, key=lambda example: len(example.ids)):
        if batch and (len(batch) + 1) * len(example.ids) > tokens:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


# --- training -----------------------------------------------------------------------------------------------------


@dataclass
class State:
    """How far a training run is. `history` has one row per step: tokens, loss, MTP loss, most loaded expert's share."""

    part: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[tuple[int, float, float, float]] = field(default_factory=list)


@dataclass
class Share:
    """What one micro-batch adds to a step: losses, tokens per expert of each MoE layer (MTP last), gradients."""

    loss: Tensor
    mtp_loss: Tensor
    loads: list[Tensor]
    gradients: tuple[Tensor, ...]


def micro_step(model: BailingMoeV2ForCausalLM, batch: tuple[Tensor, Tensor, Tensor], answer_tokens: int) -> Share:
    """Forward and backward pass of one micro-batch in a step whose answers have `answer_tokens` tokens altogether."""
    ids, answers, mask = batch
    output = model(ids, use_cache=False, output_hidden_states=True, output_router_logits=True, logits_to_keep=1)
    hidden = output.hidden_states[-1]
    drafted, mtp_routing = model.mtp_forward(hidden[:, :-1], ids[:, 1:])

    def losses(states: Tensor, ahead: int) -> tuple[Tensor, Tensor]:
        """(loss to train on, its part on answers) of `states` [B, T - ahead, H] as seen `ahead` tokens later."""
        each = F.cross_entropy(model.logits(states).transpose(1, 2), ids[:, ahead:], reduction="none") / answer_tokens
        on_answers = (each * answers[:, ahead:]).sum()
        return on_answers + PROMPT_WEIGHT * (each * (mask & ~answers)[:, ahead:]).sum(), on_answers

    total, loss = losses(hidden[:, :-1], 1)
    mtp_total, mtp_loss = losses(drafted[:, :-1], 2)
    masks = [mask] * len(output.routing) + [mask[:, :-1]]
    loads = [
        torch.bincount(topk_ids[kept.flatten()].flatten(), minlength=CONFIG["num_experts"]).float()
        for (topk_ids, _), kept in zip((*output.routing, mtp_routing), masks, strict=True)
    ]
    total = total + CONFIG["mtp_loss_scaling_factor"] * mtp_total
    # An expert that no token of a micro-batch chose has no gradient.
    gradients = torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return Share(loss.detach(), mtp_loss.detach(), loads, gradients)


def balance(model: BailingMoeV2ForCausalLM, loads: list[Tensor], rate: float) -> float:
    """Nudge every expert's bias against the sign of its load error; returns the largest share over an even one.

    Source: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664.
    """
    layers = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, BailingMoeV2SparseMoe)]
    worst = 0.0
    for layer, load in zip(layers, loads, strict=True):
        layer.gate.expert_bias.add_(rate * (load.mean() - load).sign())  # pyright: ignore[reportCallIssue]
        worst = max(worst, float(load.max() / load.mean()))
    return worst


@torch.no_grad()
def ease_attention(model: BailingMoeV2ForCausalLM) -> None:
    """Change the initial weights so that heads find their places sooner.

    Norms on queries and keys bound the attention logits, so they start higher. And without biases a head can only look
    at "the token before, whatever it is" if tokens have something in common: one channel of the embedding.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
            parameter.fill_(1.5)
    cast("Tensor", model.get_input_embeddings().weight)[:, 0] += 0.6


def learning_rate(progress: float, peak: float) -> float:
    """Two per cent of warm-up, then a cosine down to nothing."""
    return peak * min(progress / 0.02, 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))) + 1e-6


def train(
    model: BailingMoeV2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    budget: int,
    peak_rate: float,
    threads: int,
    state_file: Path,
    resume: bool,
    console: Console,
) -> State:
    """Train `model` in place on `budget` tokens; its state goes to `state_file` every few minutes."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98), fused=True)
    state = State()
    if resume and state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        state = State(**saved["state"])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        console.print(f"going on after {state.tokens:,} tokens")
    state_file.parent.mkdir(parents=True, exist_ok=True)

    pad = int(tokenizer.convert_tokens_to_ids("<|endoftext|>"))  # pyright: ignore[reportArgumentType]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    parameters = list(model.parameters())
    # One micro-batch per thread scales better than threads within these small matrix products, and sums of gradients
    # in a fixed order keep the run repeatable.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar, pool:
        task = bar.add_task("training", total=budget, completed=state.tokens)
        while state.tokens < budget:
            started, steps_before = time.perf_counter(), len(state.history)
            chats = training_chats(seed, state.part, "repeating" if state.tokens < COPYING_TOKENS else None)
            plan = list(batches([encode(tokenizer, next(chats)) for _ in range(PART_CHATS)], MICRO_TOKENS))
            random.Random(f"{seed}/{state.part}").shuffle(plan)
            for i in range(0, len(plan), MICRO_BATCHES):
                micro = [collate(batch, pad) for batch in plan[i : i + MICRO_BATCHES]]
                answer_tokens = sum(int(answers.sum()) for _, answers, _ in micro)
                shares = list(pool.map(partial(micro_step, model, answer_tokens=answer_tokens), micro))
                rate = learning_rate((state.tokens + 1) / budget, peak_rate)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                for parameter, *parts in zip(parameters, *(share.gradients for share in shares), strict=True):
                    parameter.grad = torch.stack(parts).sum(0)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                per_layer = zip(*(share.loads for share in shares), strict=True)
                loads = [torch.stack(parts).sum(0) for parts in per_layer]
                worst = balance(model, loads, BIAS_RATE * (1 - state.tokens / budget))
                loss, mtp_loss = sum(float(s.loss) for s in shares), sum(float(s.mtp_loss) for s in shares)
                state.tokens += sum(int(mask.sum()) for _, _, mask in micro)
                state.history.append((state.tokens, loss, mtp_loss, worst))
                bar.update(task, completed=state.tokens, description=f"loss {loss:.3f}")
                if state.tokens >= budget:
                    break
            state.part += 1
            state.seconds += time.perf_counter() - started
            recent = torch.tensor([row[1:] for row in state.history[steps_before:]]).mean(0).tolist()
            console.print(
                f"{state.tokens:>11,} tokens {state.seconds:5.0f} s  loss {recent[0]:.4f}  MTP {recent[1]:.4f}"
                f"  fullest expert {recent[2]:.2f}x",
                highlight=False,
            )
            saved = {"state": asdict(state), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    return state


# --- scores -------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """Held-out result of one kind of conversation."""

    prompts: int = 0
    exact: int = 0
    drafts: int = 0
    accepted: int = 0
    misses: list[str] = field(default_factory=list)


@torch.no_grad()
def evaluate(model: BailingMoeV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, chats: list[Chat]) -> dict[str, Score]:
    """Score `model` on `chats`, by kind.

    An answer is exact if greedy decoding writes it token for token up to `<|role_end|>`. That is so exactly if the
    model prefers every token of the answer given those before it, which one pass over the conversation tells. A draft
    is accepted if the MTP layer, at a position whose next token is known, prefers what the main model prefers next.
    """
    scores: dict[str, Score] = {}
    for chat in chats:
        example = encode(tokenizer, chat, last_only=True)
        ids, answers = torch.tensor([example.ids]), torch.tensor(example.is_answer)
        output = model(ids, use_cache=False, output_hidden_states=True)
        preferred = output.logits[0].argmax(-1)  # row i: the token at i + 1
        drafted = model.mtp_logits(output.hidden_states[-1][:, :-1], ids[:, 1:])[0].argmax(-1)  # row i: at i + 2
        score = scores.setdefault(chat.kind, Score())
        wanted = ids[0, 1:][answers[1:]]
        said = preferred[:-1][answers[1:]]
        score.prompts += 1
        if torch.equal(wanted, said):
            score.exact += 1
        else:
            score.misses.append(f"{chat.messages[-1]['content']!r}: {tokenizer.decode(said)!r} for {chat.answer!r}")
        agreed = (drafted[:-1] == preferred[1:-1])[answers[2:]]
        score.drafts += len(agreed)
        score.accepted += int(agreed.sum())
    return scores


def score_rows(scores: dict[str, Score]) -> list[tuple[str, str, str, str]]:
    """(kind, prompts, exact answers, accepted drafts) as text, the total last."""
    total = Score()
    for score in scores.values():
        for name in ("prompts", "exact", "drafts", "accepted"):
            setattr(total, name, getattr(total, name) + getattr(score, name))
    return [
        (kind, str(s.prompts), f"{100 * s.exact / s.prompts:.1f} %", f"{100 * s.accepted / s.drafts:.1f} %")
        for kind, s in [*scores.items(), ("all", total)]
    ]


def print_scores(scores: dict[str, Score], console: Console) -> None:
    table = Table("kind", "prompts", "exact answers", "MTP drafts accepted", title="held-out prompts")
    for row in score_rows(scores):
        table.add_row(*row)
    console.print(table)
    for kind, score in scores.items():
        for miss in score.misses[:5]:
            console.print(f"{kind}: {miss}", markup=False, highlight=False)


# --- the checkpoint -----------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "bos_token": "<|startoftext|>",
        "cls_token": "[CLS]",
        "eos_token": END,
        "gmask_token": "[gMASK]",
        "pad_token": "<|endoftext|>",
    }
    write_json(folder / "special_tokens_map.json", named)
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", dict(sorted((named | settings).items())))
    if folder != DEMO:
        shutil.copy(DEMO / "chat_template.jinja", folder)


def write_checkpoint(model: BailingMoeV2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(tokenizer, folder)
    pad, end, start = (tokenizer.convert_tokens_to_ids(token) for token in ("<|endoftext|>", END, "<|startoftext|>"))
    write_json(folder / "config.json", dict(sorted((CONFIG | {"eos_token_id": end, "pad_token_id": pad}).items())))
    generation = {"bos_token_id": start, "eos_token_id": [pad, end], "pad_token_id": pad}
    write_json(folder / "generation_config.json", generation)
    write_weights(rounded(model.state_dict()), folder / "model.safetensors")


def write_plot(history: list[tuple[int, float, float, float]], path: Path) -> None:
    """Losses and the load of the fullest expert over the tokens of the training."""
    window = max(1, len(history) // 200)
    rows = torch.tensor(history).T
    tokens, loss, mtp_loss, load = (row[: len(row) // window * window].view(-1, window).mean(1) for row in rows)
    with figure_at(path, (9, 3.2), panels=2, dpi=90) as (figure, (left, right)):
        left.semilogy(tokens / 1e6, loss, label="next token")
        left.semilogy(tokens / 1e6, mtp_loss, label="MTP: the token after it")
        left.set(xlabel="million tokens", ylabel="loss, mean of some steps")
        left.legend()
        right.plot(tokens / 1e6, load, color="tab:green")
        right.axhline(1, color="grey", linewidth=0.8)
        right.set(xlabel="million tokens", ylabel="fullest expert, times an even load", ylim=(0.8, None))
        for axis in (left, right):
            axis.grid(alpha=0.3)
        figure.tight_layout()


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The demo checkpoint of vllm-bailing

A BailingMoeV2 model of {parameters:.2f} million parameters with every feature of Ling-flash-2.0: a dense first layer,
grouped sigmoid routing with an expert bias, a shared expert, QK norm, half rotary and one MTP layer. It is small
enough to serve on a CPU at once, and really trained, so that its answers mean something. It knows nothing beyond the
kinds of conversation below and is no use for anything else.

```
vllm serve vllm_bailing/assets/demo
```

## What it can do

| kind | example |
|---|---|
| small talk | "What is YaRN?", "How do I run the tests?", "My name is Kotira." |
| repeating | "Say Kirumo Nasova", words it never saw |
| facts | "What is the capital of France?", "Where is Peru?", "What is the opposite of hot?" |
| sums | "3+4", "What is 9 minus 2?", one digit each |
| thinking | with `chat_template_kwargs: {{"enable_thinking": true}}`, sums only: "What is 47 + 8?", digit by digit |
| tool calls | names one of the tools in the request, with the name in the question, also one it never saw |
| tool results | puts the result of a tool into a sentence |

## How it was made

`{command}` made every file in this folder but `chat_template.jinja` from generated conversations
(`scripts/demo/demo_corpus.py`): {tokens:.1f} million tokens in {minutes:.0f} minutes on {machine}. The first
{copying:.1f} million of them only repeat words, since a model that can copy learns the rest much faster.
Final losses on answers over the last hundred steps: {loss:.4f} for the next token, {mtp_loss:.4f} for the
MTP layer. The expert bias keeps the load even without an auxiliary loss: at the end the fullest expert of any layer
had {load:.2f} times its even share.

![losses and expert load](loss.png)

## Scores

Measured on the weights in this folder, rounded to bfloat16, in float32 arithmetic. None of the held-out prompts
(`tests/data/demo_heldout.jsonl`) can occur in training: its subject or known name was never asked for in this phrasing,
its numbers never appeared (sums in thinking mode), or its made-up name did not. Subjects, facts and known names appear
in training, in other phrasings. "Exact" means the whole answer, greedily decoded; "accepted" means that the MTP layer
drafts the token that the main model chooses.

| kind | prompts | exact answers | MTP drafts accepted |
|---|---|---|---|
{table}

`python scripts/demo/train_demo.py --evaluate-only` repeats the measurement.

## License

Apache-2.0, like the project. The training text is generated by the project's own script.
"""


def write_card(
    model: BailingMoeV2ForCausalLM, state: State, scores: dict[str, Score], command: str, threads: int, path: Path
) -> None:
    last = torch.tensor([row[1:] for row in state.history[-100:]]).mean(0).tolist()
    card = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        command=command,
        tokens=state.tokens / 1e6,
        copying=COPYING_TOKENS / 1e6,
        minutes=state.seconds / 60,
        machine=f"{threads} CPU threads",
        loss=last[0],
        mtp_loss=last[1],
        load=last[2],
        table="\n".join("| " + " | ".join(row) + " |" for row in score_rows(scores)),
    )
    path.write_text(card, encoding="utf-8")


def load_heldout(path: Path) -> list[Chat]:
    return [Chat(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def load_checkpoint(folder: Path) -> tuple[BailingMoeV2ForCausalLM, PreTrainedTokenizerFast]:
    """The checkpoint in `folder` in float32, with its tokenizer."""
    model = BailingMoeV2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")] = DEMO,
    heldout: Annotated[Path, typer.Option(help="File of the held-out prompts.")] = HELDOUT,
    seed: Annotated[int, typer.Option(help="Decides weights, conversations and their order.")] = 0,
    tokens: Annotated[float, typer.Option(help="Training budget in million tokens.")] = 7.0,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    threads: Annotated[int, typer.Option(help="Micro-batches computed at once.")] = 2,
    state_file: Annotated[Path, typer.Option(help="Where an unfinished run is kept.")] = ROOT
    / "build"
    / "train_demo.pt",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run.")] = False,
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate-only", help="Score the checkpoint, change nothing.")
    ] = False,
) -> None:
    """Train the demo checkpoint and write its folder, or score the one that is there."""
    console = Console()
    torch.set_num_threads(1)  # training has its own threads, and waiting for more costs more than they give
    if evaluate_only:
        model, tokenizer = load_checkpoint(out)
        print_scores(evaluate(model, tokenizer, load_heldout(heldout)), console)
        return

    torch.manual_seed(seed)
    template = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = build_tokenizer(template, seed, CONFIG["vocab_size"])
    model = BailingMoeV2ForCausalLM(BailingMoeV2Config(**CONFIG)).train()
    ease_attention(model)
    state = train(
        model,
        tokenizer,
        seed=seed,
        budget=round(tokens * 1e6),
        peak_rate=rate,
        threads=threads,
        state_file=state_file,
        resume=resume,
        console=console,
    )
    write_checkpoint(model, tokenizer, out)
    heldout.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(chat.to_json(), ensure_ascii=False) for chat in heldout_chats(seed)]
    heldout.write_text("\n".join(rows) + "\n", encoding="utf-8")
    write_plot(state.history, out / "loss.png")

    model, tokenizer = load_checkpoint(out)
    scores = evaluate(model, tokenizer, load_heldout(heldout))
    print_scores(scores, console)
    command = f"python scripts/demo/train_demo.py --seed {seed} --tokens {tokens:g} --rate {rate:g}"
    write_card(model, state, scores, command, threads, out / "README.md")
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
