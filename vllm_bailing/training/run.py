"""The whole of `vllm-bailing train-mtp`: check, answer, record, train, write; an interrupted run goes on."""

from __future__ import annotations

import functools
import gc
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers.utils import logging as transformers_logging

from vllm_bailing.draft_target import DraftTarget
from vllm_bailing.errors import TrainError
from vllm_bailing.json_files import write_json
from vllm_bailing.planning.training import STATE_BYTES
from vllm_bailing.plugin.options import DRAFT_VOCABULARY
from vllm_bailing.tools.draft_vocab import coverage, most_frequent, write_tokens
from vllm_bailing.tools.prompts import read_prompts, read_tokenizer
from vllm_bailing.training import answers as answering
from vllm_bailing.training import checks, files, ranks, states
from vllm_bailing.training.draft import MtpDraft
from vllm_bailing.training.trainer import (
    Acceptance,
    Part,
    Settings,
    Trained,
    choose,
    fit,
    layer_state,
    require_peft,
)
from vllm_bailing.units import GIB

DRAFT_VOCAB_FILE = "draft_vocab.json"
HELD_OUT, MOST_HELD_OUT = 0.1, 200  # of the prompts


@dataclass(frozen=True)
class Request:
    """What the user asks for; see the options of the command.

    Attributes:
        data: Prompts, or None where `answers` has what the target said.
        adapter: Folder of the adapter that the target is served with; None for the target alone.
        engine: Further arguments of `vllm.LLM`.
        generator: "vllm" or "plain".
        draft_vocab_size: Tokens of a draft vocabulary that is chosen on the answers, if one is wanted.
        train_ranks: Processes that train, with the layer sharded over them.
    """

    target: str
    init: str | None
    data: Path | None
    answers: Path | None
    out: Path
    settings: Settings
    draft_tokens: int = 3
    max_tokens: int = 512
    max_length: int = 4096
    samples: int = 1
    temperature: float = 1.0
    generator: str = "vllm"
    engine: dict[str, Any] = field(default_factory=dict)
    merge: Path | None = None
    adapter: Path | None = None
    draft_vocab_size: int | None = None
    train_ranks: int = 1

    @property
    def work(self) -> Path:
        """Where a run keeps what it needs to go on."""
        return self.out.with_name(f"{self.out.name}.work")

    @property
    def layer(self) -> Path:
        """Where the layer is written; it becomes `out` when it is complete."""
        return self.work / "layer"

    @property
    def serve_command(self) -> str:
        """How the target is served with the layer."""
        speculation = {"method": "mtp", "model": str(self.out), "num_speculative_tokens": self.draft_tokens}
        adapter = f" --enable-lora --lora-modules {self.adapter.resolve().name}={self.adapter}" if self.adapter else ""
        command = f"vllm serve {self.target}{adapter} --speculative-config '{json.dumps(speculation)}'"
        if self.draft_vocab_size is not None:
            command += f" --additional-config '{json.dumps({DRAFT_VOCABULARY: str(self.out / DRAFT_VOCAB_FILE)})}'"
        return command


class Show(Protocol):
    """What a run tells its user."""

    def say(self, text: str) -> None:
        """A line of its own."""

    def stage(self, what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
        """A part of the run with a bar; what it gives is called with what was done since the last time."""

    def step(self, step: int, steps: int, logs: dict[str, float]) -> None:
        """A step of the training: its `loss`, or the acceptance at each `eval_position_N`."""


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        before, after: Acceptance on the held-out answers by kind, of the layer that it began with and of the result.
        history: What was logged, by step.
        vocabulary: Tokens of the draft vocabulary, and their share of the held-out answers.
    """

    request: Request
    made_for: DraftTarget
    before: dict[str, Acceptance]
    after: dict[str, Acceptance]
    history: list[dict[str, float]]
    answers: int
    vocabulary: tuple[int, float] | None = None


def train(request: Request, show: Show, resume: bool = False) -> Result:
    """Train a layer and write it to `request.layer`, and merged into a copy of the target where that is asked for.

    Raises:
        TrainError: If something is missing, does not fit or has no room; before any long work where it can be known.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    target = checks.target_at(request.target)
    init = checks.init_at(request.init, target)
    _check(request, target, resume)
    questions, ready = _questions(request, target, show), _ready(request, target, show)
    torch.manual_seed(request.settings.seed)
    _keep_settings(request, resume)
    made_for = DraftTarget.at(target.folder)
    examples = _recorded(request, target, questions, ready, show)
    draft = _draft(request, target, init)
    trained = _trained(request, target, draft, examples, show, resume)
    result = Result(request, made_for, trained.before, trained.after, trained.history, len(examples))
    layer = files.published_layer(layer_state(draft), target.config)
    shutil.rmtree(request.layer, ignore_errors=True)
    files.write_draft(request.layer, layer, target.folder, made_for)
    if request.draft_vocab_size is not None:
        kept, share = _draft_vocabulary(examples, _tokenizer(request, target), request.draft_vocab_size)
        write_tokens(request.layer / DRAFT_VOCAB_FILE, kept)
        result = replace(result, vocabulary=(len(kept), share))
    if request.merge is not None:
        part = request.merge.with_name(f"{request.merge.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        files.write_merged(part, layer, target.folder, made_for)
        part.replace(request.merge)
    return result


def _check(request: Request, target: checks.Source, resume: bool) -> None:
    if (request.data is None) == (request.answers is None):
        raise TrainError("give either --data, prompts that the target answers, or --answers that are ready")
    checks.check_packages()
    if request.settings.part is Part.lora:
        require_peft("--train lora", "choose --train attention")
    if request.adapter is not None:
        require_peft("--adapter", "merge the adapter into the checkpoint")
        checks.check_adapter(request.adapter, target)
    if request.draft_vocab_size is not None:
        _tokenizer(request, target)
    checks.check_folder(request.out, "--out")
    if request.merge is not None:
        checks.check_folder(request.merge, "--merge")
        if request.merge.absolute() == request.out.absolute():
            raise TrainError(f"--merge {request.merge} is --out as well; give each a folder of its own")
        checks.check_disk(request.merge, target.checkpoint.size, "a copy of the target")
    if request.work.exists() and not resume:
        raise TrainError(f"a run that did not end is in {request.work}; go on with --resume, or remove it")
    if resume and not request.work.is_dir():
        raise TrainError(f"--resume: there is no run to go on with in {request.work}; leave --resume out")
    count, answers = request.train_ranks, request.settings.batch_size
    if count > answers:
        raise TrainError(
            f"--train-ranks {count} is more than the {answers} answers of a step that they share; give fewer, or a "
            "larger --batch-size"
        )
    checks.check_memory(target.config, request.target, request.settings.part.value, count)
    checks.check_disk(request.out, checks.saved_bytes(target.config, count), "checkpoints of the training")


def _keep_settings(request: Request, resume: bool) -> None:
    """Note what the run was started with, or compare it with that of the run that goes on."""
    file = request.work / "run.json"
    now = json.loads(json.dumps(asdict(request), default=str))
    if not resume:
        request.work.mkdir()
        write_json(file, now)
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise TrainError(f"--resume: {file} cannot be read; remove {request.work} and begin again") from None
    was, wanted = ({**run, **run["settings"], "settings": None} for run in (before, now))
    for name, value in wanted.items():
        if name not in ("merge", "out") and was.get(name) != value:
            raise TrainError(
                f"--resume: the run in {request.work} has {name}={was.get(name)}, not {value}; give the same options, "
                "or remove it and begin again"
            )


def _recorded(
    request: Request,
    target: checks.Source,
    questions: list[answering.Question],
    ready: list[answering.Answer] | None,
    show: Show,
) -> list[states.Example]:
    """The examples with their states, from an earlier run as far as that came."""
    folder, settings = request.work / "states", request.settings
    if (done := states.recorded(folder)) is not None:
        return done
    model, file = None, request.work / "answers.jsonl"
    if ready is None and not file.is_file():
        show.say(f"{len(questions)} answers of up to {request.max_tokens} tokens, by {request.generator}")
        if request.generator == "plain":
            model = load_target(target, request.adapter)
            with show.stage("answers", len(questions)) as progress:
                said = answering.ask_plain(model, questions, request.max_tokens, settings.seed, progress)
        else:
            with show.stage("answers", 1) as progress:
                said = answering.ask_vllm(
                    str(target.folder), questions, request.max_tokens, settings.seed, request.engine, request.adapter
                )
                progress(1)
        answering.write_answers(file, answering.answered(questions, said))
    answers = ready or answering.read_answers(file, target.config.vocab_size, HELD_OUT, MOST_HELD_OUT)
    model = model or load_target(target, request.adapter)
    with show.stage("hidden states", len(answers)) as progress:
        examples = states.record(model, answers, request.max_length, folder, progress)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return examples


def _ready(request: Request, target: checks.Source, show: Show) -> list[answering.Answer] | None:
    """The answers of `--answers`, for whose states there is room."""
    if request.answers is None:
        return None
    answers = answering.read_answers(request.answers, target.config.vocab_size, HELD_OUT, MOST_HELD_OUT)
    lengths = [len(one.prompt_token_ids) + len(one.token_ids) for one in answers]
    _check_room(request, target, lengths, show)
    return answers


def _check_room(request: Request, target: checks.Source, lengths: list[int], show: Show) -> None:
    tokens = sum(min(request.max_length, length) for length in lengths)
    needed = tokens * target.config.hidden_size * STATE_BYTES
    checks.check_disk(request.work, needed, "recorded states")
    size = f"{needed / GIB:.2f} GiB" if needed >= GIB // 10 else f"{needed / 2**20:.1f} MiB"
    show.say(f"disk: up to {size} in {request.work} for hidden states of {tokens:,} tokens, until the end")


def _questions(request: Request, target: checks.Source, show: Show) -> list[answering.Question]:
    """The prompts of `--data` in tokens, for whose answers there is room; none without it."""
    if request.data is None:
        return []
    try:
        prompts = read_prompts(request.data)
    except ValueError as error:
        raise TrainError(f"--data {error}") from None
    tokenizer = _tokenizer(request, target)
    try:
        drawn = [(prompt.token_ids(tokenizer)[-request.max_length :], prompt.kind) for prompt in prompts]
    except ValueError as error:
        raise TrainError(f"--data {request.data}: {error}") from None
    settings = request.settings
    questions = answering.questions_of(
        drawn, request.samples, request.temperature, HELD_OUT, MOST_HELD_OUT, settings.seed
    )
    _check_room(request, target, [len(one.token_ids) + request.max_tokens for one in questions], show)
    return questions


def _tokenizer(request: Request, target: checks.Source) -> Any:
    return _read_once(target.folder, "leave --draft-vocab-size out" if request.data is None else "give --answers")


@functools.lru_cache(1)  # read early, to refuse early, and used at the end
def _read_once(folder: Path, without: str) -> Any:
    try:
        return read_tokenizer(folder, without)
    except ValueError as error:
        raise TrainError(str(error)) from None


def _draft_vocabulary(examples: list[states.Example], tokenizer: Any, size: int) -> tuple[list[int], float]:
    """The most frequent tokens of the answers to learn from, and their share of those that are held out."""
    learned, held_out = (
        Counter(token for one in examples if one.held_out == held for token in one.ids[one.first :])
        for held in (False, True)
    )
    kept = most_frequent(learned, tokenizer, size)
    return kept, coverage(held_out, kept)


def load_target(target: checks.Source, adapter: Path | None) -> Any:
    """The target with its adapter as the plain model: in fp32 on a processor, in bf16 over all GPUs."""
    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    has_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"device_map": "auto"} if has_gpu else {}
    dtype = torch.bfloat16 if has_gpu else torch.float32
    model = BailingMoeV2ForCausalLM.from_pretrained(target.folder, dtype=dtype, **options).eval()
    if adapter is None:
        return model
    from peft import PeftModel  # pyright: ignore[reportMissingImports]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names every module of the target that the adapter leaves as it is
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def _draft(request: Request, target: checks.Source, init: Any) -> MtpDraft:
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    embedding, head = files.embedding_and_head(target.checkpoint, target.config, dtype)
    layer = files.layer_from(init, target.config, request.settings.seed)
    draft = MtpDraft(target.config, layer, embedding, head, request.draft_tokens)
    choose(draft, request.settings.part)
    return draft


def _trained(
    request: Request,
    target: checks.Source,
    draft: MtpDraft,
    examples: list[states.Example],
    show: Show,
    resume: bool,
) -> Trained:
    settings = request.settings

    def step(number: int, logs: dict[str, float]) -> None:
        show.step(number, settings.steps, logs)

    if request.train_ranks == 1:
        with ranks.one_line():
            return fit(draft, examples, settings, request.work, resume, step)
    gpus = ranks.visible_gpus()
    job = ranks.Job(str(target.folder), settings, request.draft_tokens, request.work, resume, gpus)
    return ranks.fit(draft, job, request.train_ranks, step)


def finish(request: Request) -> None:
    """Put the layer where it was asked for, and remove what an interrupted run would need."""
    request.layer.replace(request.out)
    shutil.rmtree(request.work)
