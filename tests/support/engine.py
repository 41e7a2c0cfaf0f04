"""Runs vLLM engines for tests, in processes other than the tests'.

Importing vLLM takes longer than loading a test checkpoint, so one server process imports it once and every engine is
forked from there, before anything in it used threads. Engines run one at a time and inside the forked process
(no engine subprocess), unless a test asks for several ranks. `run` gives a job a process of its own, `run_in_turn` one
that other jobs used before.
"""

from __future__ import annotations

import gc
import glob
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch

ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",  # torch.compile traces the model, but does not generate code: 10 s instead of 60
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


# Two ranks, a core each. Forking them from the engine's process saves an import of vLLM for each.
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
# Jobs in the engine's process may hand functions to its ranks.
_JOB_ENV = {**ENGINE_ENV, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
fork_context = multiprocessing.get_context("forkserver")


fork_context.set_forkserver_preload(["tests.support.preload"])


class EngineError(AssertionError):
    """The job failed; the message is what the user of the engine would have seen, `log` all that it printed."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}\n--- end of the engine's output ---\n{log[-6000:]}")
        self.message, self.log = message, log


def run(
    job: Callable[..., Any], *args: Any, env: dict[str, str] | None = None, timeout: float = 600, **kwargs: Any
) -> Any:
    """Return `job(*args, **kwargs)`, computed in a fresh process with vLLM imported.

    Raises:
        EngineError: If the job raised, died or took longer than `timeout` seconds.
    """
    receiver, sender = fork_context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", suffix=".log", errors="replace") as log:
        process = fork_context.Process(
            target=_child, args=(sender, log.name, {**_JOB_ENV, **(env or {})}, job, args, kwargs)
        )
        process.start()
        sender.close()
        try:
            outcome, value = (
                pickle.loads(receiver.recv_bytes())
                if receiver.poll(timeout)
                else ("error", f"no answer within {timeout} s")
            )
        except EOFError:
            process.join(10)
            outcome, value = "error", f"the process died with exit code {process.exitcode}"
        if outcome == "error" and process.is_alive():
            process.kill()
        process.join()
        if outcome == "error":
            raise EngineError(value, log.read())
        return value


class _Turns:
    """A process that does one job after another."""

    def __init__(self, env: dict[str, str]) -> None:
        self.connection, theirs = fork_context.Pipe()
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log", errors="replace")  # noqa: SIM115
        self.process = fork_context.Process(target=_turns, args=(theirs, self.log.name, env), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, job: Callable[..., Any], args: tuple, kwargs: dict, timeout: float) -> Any:
        self.log.seek(0, os.SEEK_END)
        try:
            self.connection.send_bytes(pickle.dumps((job, args, kwargs)))
            outcome, value = (
                pickle.loads(self.connection.recv_bytes())
                if self.connection.poll(timeout)
                else ("error", f"no answer within {timeout} s")
            )
        except (EOFError, OSError):
            self.process.join(10)
            outcome, value = "error", f"the process died with exit code {self.process.exitcode}"
        if outcome == "error":
            raise EngineError(value, self.log.read())
        return value

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.log.close()


_at_work: dict[frozenset, _Turns] = {}


def run_in_turn(
    job: Callable[..., Any], *args: Any, env: dict[str, str] | None = None, timeout: float = 600, **kwargs: Any
) -> Any:
    """As `run`, in a process that did such jobs before, with the same `env`: for jobs that change nothing in vLLM.

    The second engine of a process takes a third of the time that the first one takes. A job that fails ends it, and
    engines of several ranks get a process of their own.
    """
    if "VLLM_WORKER_MULTIPROC_METHOD" in (env or {}):
        return run(job, *args, env=env, timeout=timeout, **kwargs)
    env = {**_JOB_ENV, **(env or {})}
    key = frozenset(env.items())
    if key not in _at_work:
        _at_work[key] = _Turns(env)
    try:
        return _at_work[key].run(job, args, kwargs, timeout)
    except EngineError:
        _at_work.pop(key).end()
        raise


def outcome(job: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[str, Any]:
    """("ok", what `job` returns) or ("error", its message), with the traceback printed."""
    try:
        return "ok", job(*args, **kwargs)
    except BaseException as error:
        traceback.print_exc()
        return "error", f"{type(error).__name__}: {error}"


def _turns(connection: Any, log: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    with Path(log).open("w", buffering=1) as stream:
        _redirect(stream)
        while True:
            before = _own_names()
            answer = outcome(*pickle.loads(connection.recv_bytes()))
            after = _own_names()
            if replaced := [name for name, value in before.items() if after.get(name) is not value]:
                answer = "error", f"the job replaced {replaced}, for later jobs too; give it a process of its own"
            stream.flush()
            connection.send_bytes(pickle.dumps(answer))
            del answer
            _forget_engines()


def _own_names() -> dict[str, Any]:
    """The functions and classes that names in the modules of the package stand for."""
    modules = [(name, module) for name, module in sys.modules.items() if name.startswith("vllm_bailing.")]
    return {
        f"{name}.{key}": value for name, module in modules for key, value in vars(module).items() if callable(value)
    }


def _forget_engines() -> None:
    """Free what the job's engines hold, above all their caches."""
    # Collections of garbage have only this engine to walk through as long as all else is set aside.
    with mock.patch.object(gc, "collect"):
        for llm in _engines:
            llm.llm_engine.engine_core.shutdown()
    _engines.clear()
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()


def _redirect(stream: Any) -> None:
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream


def _child(sender: Any, log: str, env: dict[str, str], job: Callable[..., Any], args: tuple, kwargs: dict) -> None:
    os.environ.update(env)
    with Path(log).open("w", buffering=1) as stream:
        _redirect(stream)
        if env.get("VLLM_WORKER_MULTIPROC_METHOD") == "fork":
            fork_children()
        answer = outcome(job, args, kwargs)
        stream.flush()
        # Plain pickle: multiprocessing's own would pass tensors as handles into a process that is about to end.
        sender.send_bytes(pickle.dumps(answer))
        sender.close()
        # Ranks of a parallel engine notice the end of this process late, and take the cores from the next engine.
        ranks = psutil.Process().children(recursive=True)
        shared = {Path(part.path) for rank in ranks for part in rank.memory_maps() if part.path.endswith("cpushm_0")}
        for rank in ranks:
            rank.kill()
        for memory in shared:  # under a name that older vLLM may use again
            for file in memory.parent.glob(f"{glob.escape(memory.name[:-1])}*"):
                file.unlink(missing_ok=True)
        os._exit(0)  # an engine's threads would keep the process alive


def fork_children() -> None:
    """Let vLLM fork this process's children, the engine and its ranks, where it would spawn them."""
    torch.set_num_threads(1)  # threads do not survive a fork
    of_method = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: of_method("fork" if method == "spawn" else method)


def run_ranks(job: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """`job(rank, ranks, init, *args)` of each rank, computed side by side; `init` is a file for `loaded_rank`."""
    identity = uuid.uuid4().hex  # of the ranks' shared memory; vLLM's executors set it
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(run, job, rank, ranks, folder / identity, *args, env={"VLLM_DIST_IDENT": identity})
            for rank in range(ranks)
        ]
        found = [one.result() for one in jobs]
    for memory in Path("/dev/shm").glob(f"*{identity}*"):
        memory.unlink(missing_ok=True)
    return found


def loaded_rank(rank: int, ranks: int, init: Path, options: dict[str, Any], watch: Callable = lambda weights: weights):
    """(model, names that it loaded) of one rank as the loader leaves it, without an engine.

    Args:
        options: Of `vllm.EngineArgs`, with the way that the ranks are used; data-parallel ranks number themselves.
        watch: Passes the checkpoint's tensors on.
    """
    import vllm_bailing

    vllm_bailing.register()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model

    # Eager pipelines are refused on CPUs.
    eager = options.get("pipeline_parallel_size", 1) == 1
    defaults = {"dtype": "bfloat16", "enforce_eager": eager, "skip_tokenizer_init": True}
    in_group = ranks // options.get("data_parallel_size", 1)
    if in_group < ranks:
        options = {**options, "data_parallel_rank": rank // in_group}
        # vLLM would agree on a port with the other data-parallel ranks; it takes a group that is there.
        torch.distributed.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=ranks)
    config = EngineArgs(**{**defaults, **options}).create_engine_config()
    parallel = config.parallel_config
    with set_current_vllm_config(config):
        init_distributed_environment(in_group, rank % in_group, f"file://{init}", rank, "gloo")
        initialize_model_parallel(parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
        model = initialize_model(vllm_config=config, model_config=config.model_config)
        weights = DefaultModelLoader(config.load_config).get_all_weights(config.model_config, model)
        return model, model.load_weights(watch(weights))


_engines: list[Any] = []  # keeps engines: one that is dropped waits some seconds for its ranks to end


def make_llm(model: str | Path, **options: Any) -> Any:
    """An offline engine with the options that the comparisons need; `options` override them."""
    from vllm import LLM

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": options.get("pipeline_parallel_size", 1) == 1,  # eager ones are refused on CPUs
        "max_model_len": 512,
        "max_logprobs": -1,
        "disable_log_stats": True,
        "skip_tokenizer_init": not (Path(model) / "tokenizer.json").exists(),
    }
    with (
        mock.patch.object(gc, "freeze"),  # what vLLM sets aside would never be freed
        mock.patch.dict(os.environ),
    ):
        if "gpu_memory_utilization" not in options:
            defaults["kv_cache_memory_bytes"] = 2**26  # on a CPU, all of it is filled with zeros at the start
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would win
        _engines.append(LLM(str(model), **{**defaults, **options}))
    return _engines[-1]


def generate(
    model: str | Path, prompts: list[list[int]], max_tokens: int = 16, logprobs: bool = True, **options: Any
) -> list[tuple[torch.Tensor | None, list[int]]]:
    """Greedy continuations, and log-probabilities of the whole vocabulary at every prompt position but the last.

    Returns:
        For each prompt `(logprobs [T - 1, vocab] fp32 or None, token ids [max_tokens])`.
    """
    return ask(make_llm(model, **options), prompts, max_tokens, logprobs)


def ask(
    llm: Any, prompts: list[list[int]], max_tokens: int = 16, logprobs: bool = True, adapters: list | None = None
) -> list:
    """As `generate`, on an engine that is already there; `adapters` has a LoRARequest or None for each prompt."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=-1 if logprobs else None,
    )
    answers = []
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    for output in llm.generate(requests, params, use_tqdm=False, lora_request=adapters):
        table = None
        if logprobs:
            rows = [[row[token].logprob for token in range(len(row))] for row in output.prompt_logprobs[1:]]
            table = torch.tensor(rows)
        answers.append((table, list(output.outputs[0].token_ids)))
    return answers


# Largest difference measured: 1.2e-5 (order of fp32 sums); the promise of the README is 1e-4.
TOLERANCE = 1e-4
