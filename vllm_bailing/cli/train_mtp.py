"""`vllm-bailing train-mtp`: an MTP layer of its own for a chat model or a fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_bailing.cli import options, output

if TYPE_CHECKING:
    from vllm_bailing.training.run import Result


class Part(str, Enum):
    """As `training.trainer.Part`, which needs torch."""

    whole = "whole"
    attention = "attention"
    lora = "lora"


class Generator(str, Enum):
    """Who writes the answers."""

    vllm = "vllm"
    plain = "plain"


def train_mtp(
    target: Annotated[str, typer.Argument(help="The model that gets a draft layer: a folder or a hub name; bf16.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the layer.")] = None,
    init: Annotated[
        str | None,
        typer.Option(help="Checkpoint with the layer to begin with, or random; the target's own if left out."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prompts, one user message a line, or JSONL with messages and kind.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Answers that are ready instead: JSONL with prompt_token_ids and token_ids.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer.")] = 1000,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Answers in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At its peak.")] = 1e-4,
    draft_tokens: Annotated[
        int, typer.Option("--draft-tokens", "--mtp", min=1, help="Draft positions that it learns.")
    ] = 3,
    part: Annotated[
        Part, typer.Option("--train", help="What of it: whole, attention (and shared expert), or lora on those.")
    ] = Part.whole,
    generator: Annotated[
        Generator, typer.Option(help="Who answers: vllm, or plain PyTorch, for small models.")
    ] = Generator.vllm,
    engine: options.Engine = "{}",
    max_tokens: Annotated[int, typer.Option(min=2, help="Limit of an answer.")] = 512,
    max_length: Annotated[int, typer.Option(min=8, help="Limit of prompt and answer together.")] = 4096,
    samples: Annotated[int, typer.Option(min=0, help="Sampled answers to a prompt, besides the greedy one.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampled answers.")] = 1.0,
    merge: Annotated[
        Path | None, typer.Option(help="Also write a copy of the target with the layer into this folder.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of the LoRA adapter that TARGET is served with, if it is.")
    ] = None,
    draft_vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Also choose so many tokens that drafts are made of, the most frequent ones."),
    ] = None,
    train_ranks: Annotated[
        int, typer.Option(min=1, help="Processes that train, a GPU each; the layer is sharded over them.")
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    seed: int = 0,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it needs of --gpu; a config.json will do as TARGET.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="For --plan, such as H100.", autocompletion=options.known_gpus)] = "H100",
    gpus: Annotated[int, typer.Option(min=1, help="For --plan: how many.")] = 1,
) -> None:
    """Train an MTP layer for TARGET on its own answers.

    TARGET stays as it is: it answers the prompts, and the layer learns to draft what it says. A tenth of the prompts
    is held out, and acceptance on them printed. OUT.work keeps what --resume needs, and is removed at the end. Exit
    code 2: it could not be trained.
    """
    from vllm_bailing.errors import TrainError

    if plan:
        _plan(target, gpu, gpus, steps * batch_size, min(max_length, 2 * max_tokens), max_tokens, draft_tokens)
        return
    if out is None:
        raise output.fail("train-mtp", "--out is missing; name the folder for the layer", 2)
    arguments = options.engine_arguments(engine)
    try:
        from vllm_bailing.training import card, checks, run, trainer

        checks.check_packages()
        settings = trainer.Settings(steps, batch_size, learning_rate, trainer.Part(part.value), seed)
        sizes = (draft_tokens, max_tokens, max_length, samples, temperature)
        request = run.Request(
            target,
            init,
            data,
            answers,
            out,
            settings,
            *sizes,
            generator.value,
            arguments,
            merge,
            adapter,
            draft_vocab_size,
            train_ranks,
        )
        with output.output_aside():
            result = run.train(request, Terminal(), resume)
            card.write_card(result, request.layer)
            run.finish(request)
    except TrainError as error:
        raise output.fail("train-mtp", error, 2) from None
    except KeyboardInterrupt:
        raise output.interrupted("train-mtp", "the same command with --resume goes on from here") from None
    except OSError as error:  # a disk that fills up on the way
        raise output.fail("train-mtp", f"{error}; make room and go on with --resume", 2) from None
    _show(result)


def _plan(model: str, gpu: str, gpus: int, answers: int, length: int, answer_length: int, draft_tokens: int) -> None:
    from vllm_bailing.config import read_config
    from vllm_bailing.planning.gpus import find_gpu
    from vllm_bailing.planning.training import UTILIZATION, plan_training

    try:
        found = find_gpu(gpu)
        config = read_config(model)
        made = plan_training(config, found, gpus, answers, length, min(answer_length, length - 1), draft_tokens)
    except ValueError as error:
        raise output.fail("train-mtp", error, 2) from None

    def verdict(fits: bool) -> str:
        return "fits" if fits else "does not fit"

    one, all_ = output.gib(found.memory_bytes), f"{gpus} x {found.name}"
    table = output.table("what", "GiB", "of", "")
    record, memory = made.memory["whole"].record, found.memory_bytes * gpus
    table.add_row("record states, all GPUs", output.gib(record), output.gib(memory), verdict(made.record_fits))
    for part, needed in made.memory.items():
        table.add_row(f"train {part}, one GPU", output.gib(needed.train), one, verdict(made.fits[part]))
        if gpus > 1:
            each, fits = output.gib(made.sharded[part].train), made.sharded_fits[part]
            table.add_row(f"train {part}, each of {gpus}", each, one, verdict(fits))
    table.add_row("states, on disk", output.gib(made.disk), "", "")
    console = output.console()
    console.print(f"{answers:,} answers of {length} tokens with their prompts, {made.tokens / 1e6:.1f} million tokens")
    console.print(table)
    answer = "do not fit" if made.answer_hours is None else f"{_time(made.answer_hours)} at least"
    training = _time(made.train_hours)
    if gpus > 1:
        training += f" on one, {_time(made.sharded_hours)} with --train-ranks {gpus}"
    console.print(f"{all_}: answers {answer}, states {_time(made.record_hours)}, training {training}")
    console.print(
        "Memory: weights, gradients, moments and logits; a batch comes on top. Time: answers at the roofline, the rest "
        f"at {100 * UTILIZATION:.0f} % of a GPU's peak, as the README of Ling-V2 has it for Ling-mini-2.0."
    )


def _time(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


class Terminal:
    """Progress on standard error."""

    def __init__(self) -> None:
        self.console = output.console(stderr=True)

    def say(self, text: str) -> None:
        self.console.print(text)

    @contextmanager
    def stage(self, what: str, total: int) -> Iterator[Callable[[int], object]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.advance(task, done)

    def step(self, step: int, steps: int, logs: dict[str, float]) -> None:
        positions = [f"{100 * share:.0f} %" for name, share in logs.items() if name.startswith("eval_position_")]
        accepted = f"held out {logs.get('eval_loss', 0):.4f}, accepted {' '.join(positions)}"
        self.console.print(f"step {step}/{steps}  " + (accepted if positions else f"loss {logs['loss']:.4f}"))


def _show(result: Result) -> None:
    from vllm_bailing.training.card import rows_of

    count = result.request.draft_tokens
    table = output.table("text", "layer", *(f"position {number}" for number in range(1, count + 1)))
    for kind, layer, texts in rows_of(result):
        table.add_row(kind if layer == "before" else "", layer, *texts)
    console = output.console()
    console.print(table)
    console.print("accepted up to a position, greedy, on held-out prompts; in brackets the 95 % interval")
    if result.vocabulary:
        size, share = result.vocabulary
        console.print(f"draft vocabulary: {size:,} tokens, {100 * share:.2f} % of the held-out answers")
    output.show_files([result.request.out, *([result.request.merge] if result.request.merge else [])])
    typer.echo(result.request.serve_command)
