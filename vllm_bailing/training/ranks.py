"""Training by several processes, each with a GPU or a share of the cores: FSDP2 shards the layer over them.

The parent starts them, shows what the first one tells, and ends all when one ends. Each runs a `Trainer` that knows of
no other; what they do together happens in the sharded layer and in the sums of `draft.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes
from transformers.utils import logging as transformers_logging

from vllm_bailing.errors import TrainError
from vllm_bailing.reference_layers import BailingMoeV2MTPLayer, BailingMoeV2SparseMoe
from vllm_bailing.training import checks, files, states, trainer
from vllm_bailing.training.draft import MtpDraft

MEET = "rendezvous"  # a file of torch.distributed
BEGIN, END = "begin.safetensors", "end.safetensors"  # the layer before and after, with low-rank factors if it has them


@dataclass(frozen=True)
class Job:
    """What each process is told.

    Attributes:
        target: Folder of the target.
        work: Where the states are recorded, and the checkpoints go.
        gpus: As `CUDA_VISIBLE_DEVICES` names them; none on a machine without.
    """

    target: str
    settings: trainer.Settings
    draft_tokens: int
    work: Path
    resume: bool
    gpus: tuple[str, ...]


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this machine that may be used, as `CUDA_VISIBLE_DEVICES` names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return tuple(named.split(",")[:count])


def fit(draft: MtpDraft, job: Job, count: int, show: Callable[[int, dict[str, float]], object]) -> trainer.Trained:
    """As `trainer.fit`, by `count` processes; `draft` gets the layer that they made.

    Raises:
        TrainError: If one of them ended early.
    """
    save_file(draft.layer.state_dict(), job.work / BEGIN)
    told = get_context("spawn").SimpleQueue()
    (job.work / MEET).unlink(missing_ok=True)  # of a run that was killed
    arguments = (job, count, told)
    trained = None
    # Until they have begun, Ctrl-C is for this process alone: they would tell of it, each for itself.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        started: Any = start_processes(_work, arguments, count, join=False, daemon=True, start_method="spawn")
    finally:
        signal.signal(signal.SIGINT, interrupt)
    processes = started.processes
    try:
        while any(one.is_alive() for one in processes) or not told.empty():
            while not told.empty():
                what, *values = told.get()
                if what == "step":
                    show(*values)
                elif what == "failed":
                    raise TrainError(_killed(processes) or values[0])
                else:
                    (trained,) = values
            if any(one.exitcode for one in processes) and told.empty():
                break
            time.sleep(0.05)
        if trained is None:
            raise TrainError(_killed(processes) or f"a rank ended without a word; {job.work} has what it wrote")
    finally:
        for one in processes:
            one.kill()
            one.join()
    draft.layer.load_state_dict(load_file(job.work / END))
    return trained


def _killed(processes: list[Any]) -> str | None:
    """Which process was ended from outside, if one was; the others then fail for its sake."""
    for rank, one in enumerate(processes):
        if (one.exitcode or 0) < 0:
            name = signal.Signals(-one.exitcode).name
            return f"rank {rank} was ended by {name}, as the system does when memory runs out; go on with --resume"
    return None


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Memory that runs out ends in a line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = str(error).partition(". GPU")[0]
        raise TrainError(f"{what}; begin again with a smaller --batch-size or more --train-ranks") from None


def _work(rank: int, job: Job, count: int, told: Any) -> None:
    """One of the processes."""
    transformers_logging.set_verbosity_error()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # comes by Ctrl-C, and if the parent is gone
    log = job.work / f"rank-{rank}.log"
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        join(rank, count, job.work / MEET, job.gpus)
        with one_line():
            trained = train(job, (lambda *logs: told.put(("step", *logs))) if rank == 0 else (lambda *_: None))
        if rank == 0:
            told.put(("trained", trained))
        dist.destroy_process_group()
    except Exception as error:
        traceback.print_exc()
        told.put(("failed", f"rank {rank}: {failure(error, log)}"))
        os._exit(1)  # at once: the others wait while it holds its connections


def failure(error: Exception, log: Path) -> str:
    """What a rank that failed says of it, in a line."""
    if isinstance(error, TrainError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error}; make room and go on with --resume"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}; {log} has the rest"


def join(rank: int, count: int, meet: Path, gpus: tuple[str, ...]) -> None:
    """Make this process one of `count`, which find each other by the file `meet`; `gpus` as of `Job`."""
    # Not for other machines: whoever reaches these ports could change what is learned.
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[rank]  # nothing in this process has looked at GPUs so far
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    store = dist.FileStore(str(meet), count)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)


def train(job: Job, show: Callable[[int, dict[str, float]], object]) -> trainer.Trained:
    """This process's part of the training; the first one writes the layer."""
    device, dtype = ("cuda", torch.bfloat16) if job.gpus else ("cpu", torch.float32)
    target = checks.target_at(job.target)
    embedding, head = files.embedding_and_head(target.checkpoint, target.config, dtype)
    with torch.device("meta"):
        layer = BailingMoeV2MTPLayer(target.config, target.config.num_hidden_layers)
    draft = MtpDraft(target.config, layer, embedding, head, job.draft_tokens)
    with torch.device("meta"):
        trainer.choose(draft, job.settings.part)
    shard(draft, job.work / BEGIN, device)
    trained = trainer.fit(draft, states.recorded(job.work / "states") or [], job.settings, job.work, job.resume, show)
    whole: dict[str, Tensor] = {}
    for name, part in draft.layer.state_dict().items():
        tensor = part.full_tensor() if isinstance(part, DTensor) else part
        if dist.get_rank() == 0:
            whole[name] = tensor.cpu()
    if whole:
        save_file(whole, job.work / END)
    return trained


def shard(draft: MtpDraft, file: Path, device: str) -> None:
    """Shard the layer, on the meta device, over all ranks, and read this rank's part of it.

    Every expert is gathered by itself while it is used, the rest of the layer for the length of a step. The frozen
    embedding and head stay whole.
    """
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    mlp: Any = draft.layer.mlp
    if isinstance(mlp, BailingMoeV2SparseMoe):
        # Autocast, which is what rounds the rest, would keep rounded copies of gathered experts.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if device == "cuda" else MixedPrecisionPolicy()
        for expert in mlp.experts:
            fully_shard(expert, mesh=mesh, mp_policy=policy)
    fully_shard(draft, mesh=mesh, reshard_after_forward=True)
    draft.layer.to_empty(device=device)
    own: dict[str, Any] = draft.layer.state_dict()
    with safe_open(file, framework="pt") as opened:
        for name, part in own.items():
            whole = opened.get_tensor(name).to(device)
            if isinstance(part, DTensor):
                whole = distribute_tensor(whole, mesh, part.placements, src_data_rank=None)
            part.copy_(whole)
    _let_ranks_save_their_part(draft)


def _let_ranks_save_their_part(draft: MtpDraft) -> None:
    """The trainer's checkpoint of a rank has its part of each tensor, as a plain one."""

    def own(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state.update({name: one.to_local() for name, one in state.items() if isinstance(one, DTensor)})

    def shared(module: Any, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name, one in module.named_parameters():
            state[name] = DTensor.from_local(
                state[name], one.device_mesh, one.placements, shape=one.shape, stride=one.stride()
            )

    draft.register_state_dict_post_hook(own)
    draft.register_load_state_dict_pre_hook(shared)
