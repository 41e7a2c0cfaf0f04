"""The training itself, by transformers' `Trainer`: which parts of the layer learn, its balance, and what is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from vllm_bailing.errors import TrainError
from vllm_bailing.json_files import write_json
from vllm_bailing.planning.training import ATTENTION, EXPERTS, LORA, LORA_RANK
from vllm_bailing.training.draft import MtpDraft, engine_steps, over_ranks, rank_of
from vllm_bailing.training.states import Batches, Example, States, collate, share

BIAS_RATE = 2e-3  # per step, falling to nothing over the run; as the demo was trained


class Part(str, Enum):
    """What of the layer is trained."""

    whole = "whole"
    attention = "attention"  # attention, shared expert, norms and the projection that joins state and token
    lora = "lora"  # the same matrices, by low-rank factors that are merged at the end


@dataclass(frozen=True)
class Settings:
    """How a layer is trained; each is an option of the command."""

    steps: int
    batch_size: int
    learning_rate: float
    part: Part
    seed: int


def choose(draft: MtpDraft, part: Part) -> None:
    """Freeze what is not to be trained; frozen experts are kept as autocast would round them at every draft step.

    Raises:
        TrainError: If LoRA is wanted and PEFT is not installed.
    """
    if part is Part.attention:
        for name, parameter in draft.layer.named_parameters():
            parameter.requires_grad_(ATTENTION.search(name) is not None)
    if part is Part.lora:
        peft = require_peft("--train lora", "choose --train attention")
        modules = [name for name, _ in draft.layer.named_modules() if LORA.search(f"{name}.weight")]
        config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=modules)
        peft.inject_adapter_in_model(config, draft.layer)
    for name, parameter in draft.layer.named_parameters():
        if EXPERTS in name and not parameter.requires_grad:
            parameter.data = parameter.data.to(draft.embedding.dtype)


def require_peft(what: str, remedy: str) -> Any:
    """The module, which `what` needs.

    Raises:
        TrainError: If it is not installed.
    """
    try:
        import peft  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise TrainError(f"{what} needs PEFT; `pip install 'vllm-bailing[train]'`, or {remedy}") from None
    return peft


def layer_state(draft: MtpDraft) -> dict[str, Tensor]:
    """The layer's tensors under its own names; low-rank factors are merged into their matrices."""
    modules: list[Any] = list(draft.layer.modules())
    for module in modules:
        if hasattr(module, "lora_A") and hasattr(module, "merge"):
            module.merge()
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in draft.layer.state_dict().items()
        if ".lora_" not in name
    }


class _Balance(TrainerCallback):
    """Moves the expert bias after every step, if the experts are trained."""

    def __init__(self, draft: MtpDraft, rate: float) -> None:
        self.draft, self.rate = draft, rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.draft.balance(self.rate * (1 - (state.global_step - 1) / state.max_steps))


class _Progress(TrainerCallback):
    """Passes on the loss and the acceptance of the run so far."""

    def __init__(self, show: Callable[[int, dict[str, float]], object]) -> None:
        self.show = show

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and ("loss" in logs or "eval_loss" in logs):
            self.show(state.global_step, logs)


def make_trainer(
    draft: MtpDraft,
    learn: States,
    held_out: States,
    settings: Settings,
    folder: Path,
    show: Callable[[int, dict[str, float]], object],
) -> Trainer:
    """The trainer, which keeps its checkpoints in `folder`.

    Each of several ranks has one of its own, which knows nothing of the others: they meet in `MtpDraft`.

    Args:
        show: Called with the step and its `loss`, or with the acceptance as `Acceptance.metrics` names it.
    """
    rank, ranks = rank_of()
    often = max(1, settings.steps // 10)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=1,  # an item of `Batches` is a whole one
        per_device_eval_batch_size=math.ceil(settings.batch_size / ranks),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 50),
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
        logging_steps=max(1, settings.steps // 50),
        eval_strategy="steps",
        eval_steps=often,
        save_steps=often,
        save_total_limit=1 if ranks == 1 else 2,  # the last may be there on some of the ranks only
        label_names=["labels"],
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # or the trainer would put copies of the layer on all GPUs
    trains_experts = settings.part is Part.whole and draft.config.moe_router_enable_expert_bias
    trainer = Trainer(
        draft,
        arguments,
        data_collator=collate,
        train_dataset=Batches(learn, settings.batch_size, rank, ranks),
        eval_dataset=States(held_out.folder, share(held_out.examples, rank, ranks)),
        compute_metrics=lambda predicted: acceptance(predicted.predictions).metrics(),
        callbacks=[_Balance(draft, BIAS_RATE if trains_experts else 0.0), _Progress(show)],
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


@dataclass(frozen=True)
class Acceptance:
    """Drafts that a greedy engine makes, and how many of them it accepts, at each position."""

    drafts: list[int]
    accepted: list[int]

    @property
    def shares(self) -> list[float]:
        """Share of the drafts of each position that were accepted, and all before them."""
        return [good / max(1, all_) for good, all_ in zip(self.accepted, self.drafts, strict=True)]

    def metrics(self) -> dict[str, float]:
        return {f"position_{number}": share for number, share in enumerate(self.shares, 1)}


def acceptance(matches: np.ndarray) -> Acceptance:
    """Of the rows of `MtpDraft.forward`'s `matches` [B, A, steps], and those of the other ranks."""
    steps = np.concatenate([engine_steps(row) for row in matches])
    return Acceptance(*over_ranks(torch.tensor(np.stack([(steps >= 0).sum(0), (steps == 1).sum(0)]))).tolist())


def measure(trainer: Trainer, held_out: States) -> dict[str, Acceptance]:
    """Acceptance on the held-out answers, by kind; that of all is under ""."""
    # Kind by kind: the trainer sorts what it evaluates by length.
    kinds = sorted({example.kind for example in held_out.examples})
    found = {}
    for kind in kinds:
        part = share([example for example in held_out.examples if example.kind == kind], *rank_of())
        found[kind] = acceptance(trainer.predict(States(held_out.folder, part)).predictions)
    drafts = [sum(counts) for counts in zip(*(one.drafts for one in found.values()), strict=True)]
    accepted = [sum(counts) for counts in zip(*(one.accepted for one in found.values()), strict=True)]
    return {"": Acceptance(drafts, accepted), **{kind: one for kind, one in found.items() if kind}}


@dataclass(frozen=True)
class Trained:
    """What a training brought; see `training.run.Result`."""

    before: dict[str, Acceptance]
    after: dict[str, Acceptance]
    history: list[dict[str, float]]


def fit(
    draft: MtpDraft,
    examples: list[Example],
    settings: Settings,
    work: Path,
    resume: bool,
    show: Callable[[int, dict[str, float]], object],
) -> Trained:
    """Train on the recorded states in `work`, from the last checkpoint on that all ranks have there if it goes on."""
    rank, ranks = rank_of()
    learn, held_out = (
        States(work / "states", [one for one in examples if one.held_out == held]) for held in (False, True)
    )
    folders = [work / "trainer" if ranks == 1 else work / f"trainer-{number}" for number in range(ranks)]
    trainer = make_trainer(draft, learn, held_out, settings, folders[rank], show)
    file = work / "before.json"
    if file.is_file():
        before = {kind: Acceptance(**one) for kind, one in json.loads(file.read_text(encoding="utf-8")).items()}
    else:
        before = measure(trainer, held_out)
        if rank == 0:
            write_json(file, {kind: asdict(one) for kind, one in before.items()})
    # A checkpoint's file of that name is the last that is written.
    there = [{path.parent.name for path in folder.glob("checkpoint-*/trainer_state.json")} for folder in folders]
    last = max(set.intersection(*there), key=lambda name: int(name.rpartition("-")[2]), default=None)
    trainer.train(resume_from_checkpoint=str(folders[rank] / last) if resume and last else None)
    return Trained(before, measure(trainer, held_out), trainer.state.log_history)
