"""Does a deployment compute its checkpoint? Served log-probabilities against those of the plain reference.

The reference (`reference.py`) runs in fp32 on a CPU and reads the checkpoint as it goes: attention, router and shared
experts of one layer and one routed expert are in memory at a time, beside the hidden states of all prompts. So a
checkpoint of any size can be verified on a machine that cannot serve it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_bailing import __version__
from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.config import BailingMoeV2Config, read_config
from vllm_bailing.errors import CheckpointError
from vllm_bailing.folders import local_folder
from vllm_bailing.json_files import write_json
from vllm_bailing.tensor_names import EMBEDDING, HEAD
from vllm_bailing.tools.verify_deployment import Served, ask_again, ask_offline, ask_server, prompt_ids
from vllm_bailing.tools.verify_server import tokenizer_difference
from vllm_bailing.units import dtype_name

if TYPE_CHECKING:
    import torch

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-bailing" / "verify"
DEFAULT_PROMPTS = (
    "Who are you? Please answer in one or two sentences.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "What is the derivative of x^3 * sin(x)? Show every step.",
    "Translate into French, German and Chinese: The early bird catches the worm.",
    "def fibonacci(n):\n    # Complete this function and explain its running time.",
    "List the planets of the solar system with their diameters, as a table.",
)
_ROWS = 16384  # of the head at once


@dataclass(frozen=True)
class Tolerance:
    """How far a correct deployment may be from the reference.

    Attributes:
        mean: Of |Δ log-probability| over the tokens of the texts, in nats.
        divergence: Mean Kullback-Leibler divergence of a position, in nats.
    """

    mean: float
    divergence: float


# fp32: summation order. bf16: rounding of activations at each of some hundred operations. fp8: that of the weights is
# part of the checkpoint, that of activations and of the KV cache is not.
TOLERANCES = {
    "float32": Tolerance(mean=1e-4, divergence=1e-6),
    "bfloat16": Tolerance(mean=0.05, divergence=0.004),
    "float16": Tolerance(mean=0.02, divergence=0.002),
    "fp8": Tolerance(mean=0.15, divergence=0.05),
}


@dataclass(frozen=True)
class Comparison:
    """A prompt's result: deviations in nats, `agreement` the share of positions with the same most likely token."""

    tokens: int
    mean: float
    max: float
    divergence: float
    agreement: float


def expected_dtype(config: BailingMoeV2Config) -> str:
    """The key of `TOLERANCES` that a deployment of `config` should fit if nothing else is known of it."""
    stored = config.stored_quantization_config or getattr(config, "quantization_config", None)
    name = dtype_name(getattr(config, "dtype", None) or "bfloat16")
    return "fp8" if stored else name if name in TOLERANCES else "bfloat16"


# ---- the reference --------------------------------------------------------------------------------------------


class TensorReader:
    """A checkpoint's tensors one by one, in fp32, quantized ones as what they stand for.

    Raises:
        CheckpointError: If the files are damaged or do not fit the configuration.
    """

    def __init__(self, folder: Path, config: BailingMoeV2Config) -> None:
        import torch

        from vllm_bailing.dequantize import Dequantizer

        self.config, self.checkpoint = config, Checkpoint(folder).published(config)
        if not self.checkpoint.tensors and not self.checkpoint.damage:
            raise CheckpointError(f"{folder} has no safetensors files; give the folder that the server was started on")
        stored = config.stored_quantization_config or getattr(config, "quantization_config", None)
        Audit.of_target(config, quantized=stored is not None, folder=str(folder)).check(self.checkpoint)
        self._plain = None if stored is None else Dequantizer(stored, torch.float32)
        self._parts: dict[str, list[str]] = {}
        for name in self.checkpoint.tensors:
            self._parts.setdefault(name.rpartition(".")[0], []).append(name)
        self._open = contextlib.ExitStack()
        self._files: dict[Path, Any] = {}

    def close(self) -> None:
        """Let go of the files, whose pages would otherwise stay in memory."""
        self._open.close()
        self._files.clear()

    def _file(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self._files:
            self._files[path] = self._open.enter_context(safe_open(path, framework="pt"))
        return self._files[path]

    def tensor(self, name: str) -> torch.Tensor:
        """`name` as a whole."""
        if name in self.checkpoint.tensors and self._plain is None:
            return self.checkpoint.tensors[name].read(self._file).float()
        parts = self._parts[name.rpartition(".")[0]]
        stored = [(part, self.checkpoint.tensors[part].read(self._file)) for part in parts]
        return dict(self._plain.plain(stored) if self._plain else stored)[name].float()

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Rows `start` to `end` of the matrix `name`; embedding and head are never quantized row-wise."""
        if name not in self.checkpoint.tensors or self._is_quantized(name):
            return self.tensor(name)[start:end]
        stored = self.checkpoint.tensors[name]
        return self._file(stored.file).get_slice(stored.name)[start : min(end, stored.shape[0])].float()

    def _is_quantized(self, name: str) -> bool:
        return self.checkpoint.has_scales(name.rpartition(".")[0])


def reference_logprobs(
    folder: Path,
    config: BailingMoeV2Config,
    served: list[Served],
    work: Path,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[list[list[dict[int, float]]], list[list[int]]]:
    """Log-probabilities of the reference for every token id that `served` names, and its top token per position.

    Args:
        work: Folder for the hidden states after every layer, from which an interrupted run continues.
        progress: Called with the number of steps that are done, and of all.
    Raises:
        CheckpointError: As from `TensorReader`.
    """
    import torch

    from vllm_bailing import reference

    reader = TensorReader(folder, config)
    steps = config.num_hidden_layers + 1
    lengths = [len(sequence.token_ids) for sequence in served]
    mask = torch.zeros(len(served), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    with torch.no_grad():
        done, hidden_states = _resumed(work) or (0, _embedded(reader, served, mask))
        positions = reference.BailingMoeV2ForCausalLM._positions(mask, mask.shape[1], 0, mask.device)
        cos, sin = reference.rotary_cos_sin(config, positions)
        visible = reference.attention_mask_4d(mask, mask.shape[1], 0, mask.device)
        for index in range(done, config.num_hidden_layers):
            progress(index, steps)
            layer = _layer(reader, index)
            hidden_states, _ = layer(hidden_states, cos, sin, visible)
            reader.close()
            _keep(work, index + 1, hidden_states)
        progress(config.num_hidden_layers, steps)
        norm = reference.BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        norm.weight.copy_(reader.tensor("model.norm.weight"))
        hidden_states = norm(hidden_states)
        kept = torch.cat([hidden_states[row, : length - 1] for row, length in enumerate(lengths)])  # [N, H]
        named = [row for sequence in served for row in sequence.top]
        logprobs, likeliest = _head(reader, kept, named)
        reader.close()
    progress(steps, steps)
    rows, best, place = [], [], 0
    for length in lengths:
        rows.append(logprobs[place : place + length - 1])
        best.append(likeliest[place : place + length - 1])
        place += length - 1
    return rows, best


def _embedded(reader: TensorReader, served: list[Served], mask: torch.Tensor) -> torch.Tensor:
    import torch

    hidden_states = torch.zeros(*mask.shape, reader.config.hidden_size)
    used = {token for sequence in served for token in sequence.token_ids}
    rows = {token: reader.rows(EMBEDDING, token, token + 1)[0] for token in used}
    for number, sequence in enumerate(served):
        ids = sequence.token_ids
        hidden_states[number, : len(ids)] = torch.stack([rows[token] for token in ids])
    return hidden_states


def _layer(reader: TensorReader, index: int) -> Any:
    """Decoder layer `index` in fp32, whose routed experts are read when they are called."""
    import torch
    from torch import nn

    from vllm_bailing import reference

    config, prefix = reader.config, f"model.layers.{index}"

    def filled(module: nn.Module, prefix: str) -> nn.Module:
        state = {}
        for name, empty in module.state_dict().items():
            full = f"{prefix}.{name}"
            absent = name.endswith("expert_bias") and full not in reader.checkpoint.tensors
            state[name] = torch.zeros(empty.shape) if absent else reader.tensor(full)
        module.load_state_dict(state, assign=True)
        return module

    class Experts(nn.Module):
        def __getitem__(self, expert: int) -> nn.Module:
            with torch.device("meta"):
                empty = reference.BailingMoeV2MLP(config.hidden_size, config.moe_intermediate_size)
            return filled(empty, f"{prefix}.mlp.experts.{expert}")

    with torch.device("meta"):
        layer = reference.BailingMoeV2DecoderLayer(config, index)
    if index >= config.first_k_dense_replace:
        layer.mlp.experts = Experts()  # pyright: ignore[reportAttributeAccessIssue]
    return filled(layer, prefix)


def _head(
    reader: TensorReader, hidden_states: torch.Tensor, named: list[dict[int, float]]
) -> tuple[list[dict[int, float]], list[int]]:
    """Log-probabilities of the `named` ids and the most likely id for each row of `hidden_states` [N, H]."""
    import torch

    config = reader.config
    name = EMBEDDING if config.tie_word_embeddings else HEAD
    starts = range(0, config.vocab_size, _ROWS)
    if config.norm_head:
        squares = sum(reader.rows(name, start, start + _ROWS).pow(2).sum(0) for start in starts)
        hidden_states = hidden_states / torch.as_tensor(squares).sqrt().clamp(min=1e-7)
    normalizer = torch.full((len(hidden_states),), -math.inf)
    best, likeliest = normalizer.clone(), torch.zeros(len(hidden_states), dtype=torch.long)
    named_logits: list[dict[int, float]] = [{} for _ in named]
    for start in starts:
        logits = hidden_states @ reader.rows(name, start, start + _ROWS).T  # [N, rows]
        normalizer = torch.logaddexp(normalizer, logits.logsumexp(-1))
        top, place = logits.max(-1)
        likeliest = torch.where(top > best, place + start, likeliest)
        best = torch.maximum(best, top)
        for row, ids in enumerate(named):
            for token in ids:
                if start <= token < start + _ROWS:
                    named_logits[row][token] = float(logits[row, token - start])
    return (
        [
            {token: logit - float(normalizer[row]) for token, logit in logits.items()}
            for row, logits in enumerate(named_logits)
        ],
        likeliest.tolist(),
    )


# ---- resuming -------------------------------------------------------------------------------------------------

_SHARED_READER = (
    "how the quantized weights are read: with dequantize the deployment reads them by the same code as the reference; "
    "compare with the checkpoint that was quantized, or with a GPU, whose kernels read them by themselves"
)
_STATES = "hidden_states.safetensors"
_SERVED = "served.json"


def files_identity(folder: Path) -> list[tuple[str, int, int]]:
    """(name, size, time of the last change) of the files of a checkpoint: other ones make another run."""
    stats = ((file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file())
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats if name.endswith((".json", ".safetensors"))]


def work_folder(cache: Path, *identity: Any) -> Path:
    """A folder of `cache` for the run that `identity` describes."""
    return cache / hashlib.sha256(json.dumps(identity, default=str).encode()).hexdigest()[:16]


def began(work: Path) -> str:
    """When an interrupted run asked the deployment, as people write it."""
    return datetime.fromtimestamp((work / _SERVED).stat().st_mtime).strftime("%Y-%m-%d %H:%M")


def served_before(work: Path) -> tuple[list[Served], str] | None:
    """What the deployment gave an interrupted run, and the deployment's dtype."""
    file = work / _SERVED
    if not file.is_file():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    served = [
        Served(sequence["token_ids"], [{int(token): value for token, value in row.items()} for row in sequence["top"]])
        for sequence in kept["served"]
    ]
    return served, kept["dtype"]


def keep_served(work: Path, served: list[Served], dtype: str) -> None:
    """Keep what the deployment gave: asked again, it may round differently and answer otherwise."""
    work.mkdir(parents=True, exist_ok=True)
    kept = {"dtype": dtype, "served": [asdict(sequence) for sequence in served]}
    write_json(work / _SERVED, kept)


def delete_work(work: Path) -> None:
    """Delete the folder with what was kept, if there is one."""
    shutil.rmtree(work, ignore_errors=True)


def _resumed(work: Path) -> tuple[int, torch.Tensor] | None:
    from safetensors import safe_open

    file = work / _STATES
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as opened:
        return int(opened.metadata()["layers"]), opened.get_tensor("hidden_states")


def _keep(work: Path, layers: int, hidden_states: torch.Tensor) -> None:
    from safetensors.torch import save_file

    work.mkdir(parents=True, exist_ok=True)
    new = work / f"{_STATES}.new"
    save_file({"hidden_states": hidden_states.contiguous()}, new, {"layers": str(layers)})
    new.replace(work / _STATES)


# ---- the verdict ----------------------------------------------------------------------------------------------


def compare(served: Served, logprobs: list[dict[int, float]], likeliest: list[int]) -> Comparison:
    """Deviations of a served sequence from the reference."""
    deviations, divergences, same = [], [], 0
    for token, row, right, best in zip(served.token_ids[1:], served.top, logprobs, likeliest, strict=True):
        deviations.append(abs(row[token] - right[token]))
        divergences.append(_divergence(right, row))
        same += max(row, key=row.__getitem__) == best
    count = len(deviations)
    return Comparison(count, sum(deviations) / count, max(deviations), sum(divergences) / count, same / count)


def _divergence(right: dict[int, float], served: dict[int, float]) -> float:
    """Kullback-Leibler divergence over the named ids, all others taken together: a lower bound of the whole."""
    total = sum(math.exp(right[token]) * (right[token] - served[token]) for token in served)
    rest_right = max(1 - sum(map(math.exp, right.values())), 0.0)
    rest_served = max(1 - sum(map(math.exp, served.values())), 0.0)
    if rest_right > 1e-9 and rest_served > 1e-9:
        total += rest_right * math.log(rest_right / rest_served)
    return max(total, 0.0)


def overall(comparisons: list[Comparison]) -> Comparison:
    """All positions together."""
    tokens = sum(each.tokens for each in comparisons)

    def mean(name: str) -> float:
        return sum(getattr(each, name) * each.tokens for each in comparisons) / tokens

    largest = max(each.max for each in comparisons)
    return Comparison(tokens, mean("mean"), largest, mean("divergence"), mean("agreement"))


def verdict(total: Comparison, tolerance: Tolerance) -> str:
    """What speaks against the deployment; empty if nothing does."""
    reasons = [
        f"{title} {value:.2g} is above {limit:.2g}"
        for title, value, limit in (
            ("mean |Δ log-probability|", total.mean, tolerance.mean),
            ("mean KL divergence", total.divergence, tolerance.divergence),
        )
        if not value <= limit  # also if it is not a number
    ]
    return " and ".join(reasons)


def _asked(
    url: str,
    model: str | None,
    ids: list[list[int]],
    before: list[Served] | None,
    max_tokens: int,
    progress: Callable[[str, int, int | None], None],
) -> list[Served]:
    answers = (
        ask_server(url, model, ids, max_tokens) if before is None else ask_again(url, model, ids, before, max_tokens)
    )
    served = []
    for sequence in answers:
        served.append(sequence)
        progress("deployment", len(served), len(ids))
    return served


# ---- all of it ------------------------------------------------------------------------------------------------


def run(
    model: str,
    url: str | None = None,
    served_model_name: str | None = None,
    *,
    dtype: str | None = None,
    prompts: list[str] | None = None,
    max_tokens: int = 32,
    overrides: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    fresh: bool = False,
    chat_template: str | None = None,
    progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, Any]:
    """Compare a deployment with the reference; an interrupted run with the same arguments continues where it stopped.

    What it continues with is the reference's work. A server is asked again: it may be another one by now.

    Args:
        model: The checkpoint: a folder, or a hub name that was downloaded.
        url: A running vLLM server; without it, vLLM runs in this process and logs to standard output.
        served_model_name: The server's name of the model; its first one if left out.
        dtype: The key of `TOLERANCES` to judge by; what the deployment computes in if left out.
        prompts: User messages; `DEFAULT_PROMPTS` if left out.
        max_tokens: Length of the answers that are compared too.
        overrides: As given to the deployment by `--hf-overrides`.
        engine: Without `url`, further arguments of `vllm.LLM`.
        fresh: Start again.
        chat_template: That of the server, if it is not the checkpoint's.
        progress: Called with "deployment" or "reference", the number of steps that are done, and of all if known.
        say: Called with a sentence if an interrupted run is continued.
    Returns:
        `checkpoint`, `deployment`, `dtype`, `tolerance`, `prompts` and `overall` (a `Comparison` each), `computes`
        (whether the deployment computes the checkpoint), `reason` (why not) and `not_checked` (what both sides share);
        it fits into JSON.
    Raises:
        VerifyError: If the deployment does not answer as it should.
        CheckpointError: If the files are damaged or do not fit the configuration.
        ValueError: If the checkpoint is not on this machine, or `dtype` is not known.
    """
    folder, overrides, engine = local_folder(model), overrides or {}, engine or {}
    config = read_config(folder, overrides)
    if dtype is not None and dtype not in TOLERANCES:
        raise ValueError(f"--dtype {dtype} is not known; use one of {', '.join(TOLERANCES)}")
    ids = prompt_ids(folder, list(DEFAULT_PROMPTS) if prompts is None else prompts)
    identity = (files_identity(folder), url, served_model_name, ids, max_tokens, overrides, engine)
    versions = None if url else [__version__, version("vllm")]
    work = work_folder(CACHE, str(folder), versions, *identity)
    if fresh:
        delete_work(work)
    kept = served_before(work)
    if kept is not None:
        what = "the deployment is asked again" if url else "with the answers of then"
        say(f"goes on with the run of {began(work)}, {what}; --fresh starts anew")
    if kept is not None and url is None:
        served, computed = kept
    else:
        progress("deployment", 0, len(ids))
        if url is None:
            served, computed = ask_offline(str(folder), {**engine, "hf_overrides": overrides}, ids, max_tokens)
        else:
            before = kept and kept[0]
            served, computed = _asked(url, served_model_name, ids, before, max_tokens, progress), expected_dtype(config)
        progress("deployment", len(ids), len(ids))
        keep_served(work, served, computed)
    logprobs, likeliest = reference_logprobs(
        folder, config, served, work, lambda done, total: progress("reference", done, total)
    )
    delete_work(work)
    comparisons = [compare(*sequence) for sequence in zip(served, logprobs, likeliest, strict=True)]
    total, judged_as = overall(comparisons), dtype or computed
    tokens = tokenizer_difference(url, served_model_name, folder, chat_template) if url else ""
    reason = " and ".join(filter(None, (verdict(total, TOLERANCES[judged_as]), tokens)))
    not_checked = [_SHARED_READER] if config.stored_quantization_config else []
    not_checked += ["tokenizer and chat template: the server does not answer /tokenize"] if tokens is None else []
    return {
        "checkpoint": str(folder),
        "deployment": url or "vllm.LLM",
        "dtype": judged_as,
        "tolerance": asdict(TOLERANCES[judged_as]),
        "prompts": [asdict(comparison) for comparison in comparisons],
        "overall": asdict(total),
        "computes": not reason,
        "reason": reason,
        "not_checked": "; ".join(not_checked),
    }
