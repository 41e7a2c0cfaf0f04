"""`train-mtp --train-ranks`: several processes make the layer that one makes, each with a part of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.multiprocessing import start_processes

from tests.support.checkpoints import PROMPT, make_checkpoint, read_tensors
from tests.support.commands import invoke
from vllm_bailing.cli.train_mtp import Terminal
from vllm_bailing.errors import TrainError
from vllm_bailing.reference import BailingMoeV2ForCausalLM
from vllm_bailing.training import answers, checks, files, ranks, states, trainer
from vllm_bailing.training.draft import MtpDraft

# 17 answers of different lengths to learn from, in batches of 4: the last batch has one, so a rank has none of it.
ANSWERS = [
    answers.Answer(PROMPT[n : n + 8], PROMPT[n : n + 16 - n % 7], "ab"[n % 2], held_out=n in (4, 9, 13))
    for n in range(20)
]
BATCH = 4
STEPS = 30  # so that the run is not over when one of its processes is killed after 6


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(folder / "target", num_nextn_predict_layers=1)
    answers.write_answers(folder / "answers.jsonl", ANSWERS)
    return folder


def job_in(base, part, work):
    settings = trainer.Settings(steps=5, batch_size=BATCH, learning_rate=1e-3, part=trainer.Part(part), seed=0)
    return ranks.Job(str(base / "target"), settings, 3, work, resume=False, gpus=())


def draft_for(base, part):
    target = checks.target_at(str(base / "target"))
    layer = files.layer_from(target.checkpoint, target.config, seed=0)
    draft = MtpDraft(
        target.config, layer, *files.embedding_and_head(target.checkpoint, target.config, torch.float32), 3
    )
    trainer.choose(draft, trainer.Part(part))
    return draft


def work_in_pairs(rank, meet, jobs):
    ranks.join(rank, 2, meet, ())
    listening = [one.laddr.ip for one in psutil.Process().net_connections() if one.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}
    for job in jobs:
        ranks.train(job, lambda *_: None)


@pytest.fixture(scope="module")
def by_part(base, tmp_path_factory):
    """For each part: the layer at the beginning, that of one process, that of two, and where the two worked."""
    pytest.importorskip("peft")
    model = BailingMoeV2ForCausalLM.from_pretrained(base / "target", dtype=torch.float32).eval()
    found, jobs = {}, []
    for part in ("whole", "attention", "lora"):
        works = [tmp_path_factory.mktemp(f"{part}-{count}") for count in (1, 2)]
        examples = [states.record(model, ANSWERS, 40, work / "states", lambda _: None) for work in works]
        draft = draft_for(base, part)
        save_file(draft.layer.state_dict(), works[1] / ranks.BEGIN)
        one = job_in(base, part, works[0])
        trained = trainer.fit(draft, examples[0], one.settings, one.work, False, lambda *_: None)
        found[part] = (draft.layer.state_dict(), works[1], trained.history)
        jobs.append(job_in(base, part, works[1]))
    start_processes(work_in_pairs, (base / "meet", jobs), 2)
    return found


def assert_close(came, wanted, **limits):
    for name in wanted:
        text = f"{name}: {float((came[name] - wanted[name]).abs().max()):.2g} at most"
        torch.testing.assert_close(came[name].float(), wanted[name].float(), msg=text, **limits)


@pytest.mark.parametrize("part", ["whole", "attention", "lora"])
def test_two_processes_make_the_layer_that_one_makes(part, by_part):
    """Moved by 6e-3 at most in five steps; measured, it differs by 6.2e-7 at most."""
    wanted, work, _ = by_part[part]
    begin, came = load_file(work / ranks.BEGIN), load_file(work / ranks.END)
    assert came.keys() == wanted.keys()
    assert max(float((came[name] - begin[name]).abs().max()) for name in came) > 1e-3
    assert_close(came, wanted, atol=3e-6, rtol=0)


@pytest.mark.parametrize("part", ["whole", "attention", "lora"])
def test_loss_gradient_norm_and_acceptance_are_those_of_one_process(part, by_part):
    _, work, wanted = by_part[part]
    for rank in (0, 1):
        came = json.loads((work / f"trainer-{rank}" / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
        for one, other in zip(came, wanted, strict=False):
            for name in {"loss", "grad_norm", "eval_position_1", "eval_position_2", "eval_position_3"} & one.keys():
                assert one[name] == pytest.approx(other[name], rel=1e-5), (rank, one["step"], name)


@pytest.mark.parametrize("part", ["whole", "attention", "lora"])
def test_each_process_has_half_of_the_layer_and_of_its_moments(part, by_part):
    wanted, work, _ = by_part[part]
    whole, learns = sum(one.numel() for one in wanted.values()), {}
    for rank in (0, 1):
        folder = work / f"trainer-{rank}" / "checkpoint-5"
        own = load_file(folder / "model.safetensors")
        assert sum(one.numel() for one in own.values()) <= 0.51 * whole
        moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
        learns[rank] = [sum(one[name].to_local().numel() for one in moments) for name in ("exp_avg", "exp_avg_sq")]
        assert all(one["exp_avg"].numel() >= one["exp_avg"].to_local().numel() for one in moments)
    total = sum(one["exp_avg"].numel() for one in moments)
    assert [first + second for first, second in zip(*learns.values(), strict=True)] == [total, total]
    assert all(0.49 * total <= one <= 0.51 * total for own in learns.values() for one in own)


def train(base, out, *more):
    options = ("--answers", base / "answers.jsonl", "--steps", STEPS, "--batch-size", BATCH, "--learning-rate", 1e-4)
    return invoke("train-mtp", base / "target", "--out", out, *options, *more)


@pytest.fixture(autouse=True)
def others():
    """Processes of other tests, which keep engines for each other: they are not the run's."""
    _OTHERS[:] = multiprocessing.active_children()


_OTHERS = []


def processes():
    """Those that a run has started."""
    return [one for one in multiprocessing.active_children() if one not in _OTHERS]


def assert_refused(done, fragment):
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if "train-mtp:" in line]
    assert len(lines) == 1 and fragment in lines[0] and "Traceback" not in done.output, done.stderr
    assert not processes()


@pytest.mark.thorough
def test_a_process_that_is_killed_ends_the_run_which_then_goes_on(base, tmp_path, monkeypatch):
    shown = []

    def kill_one(self, step, steps, logs):
        if step == 6 and step not in shown:
            os.kill(processes()[0].pid, signal.SIGKILL)
        shown.append(step)

    with monkeypatch.context() as patched:
        patched.setattr(Terminal, "step", kill_one)
        assert_refused(train(base, tmp_path / "out", "--train-ranks", 2), "was ended by SIGKILL")
    assert_refused(train(base, tmp_path / "out", "--resume"), "has train_ranks=2, not 1; give the same options")
    monkeypatch.setattr(Terminal, "step", lambda self, step, *_: shown.append(step))
    shown.clear()
    done = train(base, tmp_path / "out", "--train-ranks", 2, "--resume")
    assert done.exit_code == 0, done.stderr
    # What all had done is not done again; each step is shown once for its loss, and some once for the acceptance.
    assert shown[0] > 3 and shown == sorted(shown) and shown.count(STEPS) == 2 and shown.count(STEPS - 1) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert train(base, tmp_path / "wanted").exit_code == 0
    came, wanted = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "wanted")
    assert_close(came, wanted, atol=1e-6, rtol=2**-7)  # rounded to bf16: to the neighbour at most
    one, other = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("out", "wanted"))
    assert one["acceptance"] == other["acceptance"]
    losses = [[row["loss"] for row in numbers["history"] if "loss" in row] for numbers in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == STEPS


def test_an_interrupt_leaves_no_process(base, tmp_path, monkeypatch):
    def interrupted(_):
        assert len(processes()) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks.time, "sleep", interrupted)
    assert train(base, tmp_path / "out", "--train-ranks", 2).exit_code != 0
    assert not processes() and (tmp_path / "out.work").is_dir()


def test_what_a_failed_process_says_is_a_line(tmp_path):
    log = Path("out.work/rank-1.log")
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
    with pytest.raises(TrainError) as caught, ranks.one_line():
        raise torch.OutOfMemoryError(said)
    for error, wanted in (
        (caught.value, "Tried to allocate 2.00 GiB; begin again with a smaller --batch-size or more --train-ranks"),
        (OSError(28, "No space left on device"), "No space left on device; make room and go on with --resume"),
        (RuntimeError("Connection closed\nby peer"), f"RuntimeError: Connection closed; {log} has the rest"),
    ):
        line = ranks.failure(error, log)
        assert line.endswith(wanted) and "\n" not in line


def test_ranks_that_cannot_be_had_are_refused(base, tmp_path, monkeypatch):
    assert_refused(train(base, tmp_path / "out", "--train-ranks", 5), "5 is more than the 4 answers of a step")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**12, 10**12))
    assert_refused(train(base, tmp_path / "out", "--train-ranks", 3), "3 needs as many GPUs, and there are 2")
    assert not list(tmp_path.iterdir())
