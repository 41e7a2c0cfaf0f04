"""Does a deployment compute its checkpoint? Served log-probabilities against those of the plain reference.

What is asked of the deployment: `verify_deployment.py`; what the reference computes: `verify_reference.py`; what is
made of their differences: `verify_statistics.py`, of drafts: `verify_drafts.py`, and in words: `verify_verdict.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_bailing import __version__
from vllm_bailing.config import BailingMoeV2Config, read_config
from vllm_bailing.errors import Finding, VerifyError
from vllm_bailing.folders import local_folder
from vllm_bailing.json_files import write_json
from vllm_bailing.tools import doctor_server
from vllm_bailing.tools.doctor_server import TOKEN
from vllm_bailing.tools.verify_deployment import (
    WORDS,
    Answers,
    Prompt,
    Served,
    as_json,
    ask_engine_apart,
    ask_for,
    ask_server,
    draft_counts,
    from_json,
    prompts_of,
    vllm_version,
)
from vllm_bailing.tools.verify_drafts import Drafts, checked, not_checked
from vllm_bailing.tools.verify_server import tokenizer_difference
from vllm_bailing.units import PLAIN_DTYPES, dtype_name, short_dtype

if TYPE_CHECKING:
    from vllm_bailing.tools.verify_reference import Computed, Rounding

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-bailing" / "verify"
DEFAULT_PROMPTS = (
    "Who are you? Please answer in one or two sentences.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "What is the derivative of x^3 * sin(x)? Show every step.",
    "Translate into French, German and Chinese: The early bird catches the worm.",
    "def fibonacci(n):\n    # Complete this function and explain its running time.",
    "List the planets of the solar system with their diameters, as a table.",
)
DTYPES = (*PLAIN_DTYPES.values(), "fp8")


@dataclass(frozen=True)
class Comparison:
    """A prompt's result: deviations in nats, `agreement` the share of positions with the same most likely token."""

    tokens: int
    mean: float
    max: float
    divergence: float
    agreement: float


def expected_dtype(config: BailingMoeV2Config) -> str:
    """What a deployment of `config` computes in if nothing else is known of it."""
    name = dtype_name(getattr(config, "dtype", None) or "bfloat16")
    return name if name in DTYPES else "bfloat16"


# ---- resuming -------------------------------------------------------------------------------------------------

_SHARED_READER = (
    "how the quantized weights are read: with dequantize the deployment reads them by the same code as the reference; "
    "compare with the checkpoint that was quantized, or with a GPU, whose kernels read them by themselves"
)
_OTHER_ANSWERS = "the deployment answers otherwise than when the run was interrupted; --fresh starts anew"
_SERVED = "served.json"
_FEW = 256  # tokens, of which a fault of a few experts may meet none


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


def served_before(work: Path) -> Answers | None:
    """What the deployment gave an interrupted run."""
    file = work / _SERVED
    return from_json(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def keep_served(work: Path, answers: Answers) -> None:
    """Keep what the deployment gave: asked again, it may round differently and answer otherwise."""
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / _SERVED, as_json(answers))


def delete_work(work: Path) -> None:
    """Delete the folder with what was kept, if there is one."""
    shutil.rmtree(work, ignore_errors=True)


# ---- comparing ------------------------------------------------------------------------------------------------


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


def compared(folder: Path, config: BailingMoeV2Config, served: list[Served], work: Path) -> list[Comparison]:
    """What each of the `served` sequences is apart from the reference, and nothing more; arguments as `judged`."""
    from vllm_bailing.tools.verify_reference import Asked, Reference, Rounding

    asked = Asked.of([one.token_ids for one in served], [list(row) for one in served for row in one.top])
    return _by_prompt(served, Reference(folder, config, asked, work, Rounding("float32")).forward(copies=0))


def _by_prompt(served: list[Served], computed: Computed) -> list[Comparison]:
    comparisons, value, place = [], 0, 0
    for sequence in served:
        rows = []
        for row in sequence.top:
            rows.append(dict(zip(row, computed.logprobs[value : value + len(row)].tolist(), strict=True)))
            value += len(row)
        comparisons.append(compare(sequence, rows, computed.likeliest[place : place + len(rows)].tolist()))
        place += len(rows)
    return comparisons


def _asked(
    url: str,
    model: str | None,
    prompts: list[Prompt],
    before: list[Served] | None,
    progress: Callable[[str, int, int | None], None],
) -> tuple[list[Served], Drafts | None]:
    """What a server answers, for the very sequences of an earlier run if there was one, and what it drafted.

    Raises:
        VerifyError: As from `ask_server`, and soon if its engine stands still: a long prompt may take minutes.
    """
    for check in doctor_server.server(url, model):
        if check.name == TOKEN and check.ok is False:
            raise VerifyError(Finding(f"{url}: {check.detail}", check.fix))
    counted, served, differ = draft_counts(url), list[Served](), False
    for number, now in enumerate(ask_server(url, model, prompts)):
        same = before is None or now.token_ids == before[number].token_ids
        differ |= not same  # as rounding alone may make it
        served.append(now if same or before is None else ask_for(url, model, before[number]))
        progress("deployment", len(served), len(prompts))
    after = draft_counts(url)
    if counted is None or after is None or after.made == counted.made:
        return served, None
    drafts = after.since(counted)
    return served, replace(drafts, unlike=_OTHER_ANSWERS) if differ else drafts


# ---- all of it ------------------------------------------------------------------------------------------------


def run(
    model: str,
    url: str | None = None,
    served_model_name: str | None = None,
    *,
    dtype: str | None = None,
    prompts: list[str] | None = None,
    max_tokens: int = 32,
    words: int = WORDS,
    parts: bool = True,
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
        url: A running vLLM server; without it, vLLM runs in a process of its own.
        served_model_name: The server's name of the model; its first one if left out.
        dtype: One of `DTYPES`: what the deployment computes in; the engine's or the checkpoint's if left out.
        prompts: User messages; `DEFAULT_PROMPTS` if left out.
        max_tokens: Length of the answers that are compared too.
        words: How many words of the vocabulary are asked besides.
        parts: Go back through the checkpoint, to see which part of the model differs.
        overrides: As given to the deployment by `--hf-overrides`.
        engine: Without `url`, further arguments of `vllm.LLM`.
        fresh: Start again.
        chat_template: That of the server, if it is not the checkpoint's.
        progress: Called with "deployment" or "reference", the number of steps that are done, and of all if known.
        say: Called with a sentence if an interrupted run is continued.
    Returns:
        `checkpoint`, `deployment`, `dtype`, `prompts` and `overall` (a `Comparison` each), `measures` (of each kind,
        what came and the most that is right), `shifts` (of the parts that differ most), `coverage`, `computes` (whether
        the deployment computes the checkpoint), `reason` (why not), `looks_like`, and `not_checked` (what both sides
        share, or nobody looked at); it fits into JSON.
    Raises:
        VerifyError: If the deployment does not answer as it should.
        CheckpointError: If the files are damaged or do not fit the configuration.
        ValueError: If the checkpoint is not on this machine, or `dtype` is not known.
    """
    folder, overrides, engine = local_folder(model), overrides or {}, engine or {}
    config = read_config(folder, overrides)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not known; use one of {', '.join(map(short_dtype, DTYPES))}")
    texts = list(DEFAULT_PROMPTS) if prompts is None else prompts
    asked = prompts_of(folder, texts, max_tokens, words, config.vocab_size)
    tokens = tokenizer_difference(url, served_model_name, folder, chat_template) if url else ""
    identity = (files_identity(folder), url, served_model_name, [asdict(one) for one in asked], overrides, engine)
    vllm = vllm_version(url) if url else version("vllm")
    work = work_folder(CACHE, str(folder), [__version__, vllm], dtype, *identity)
    if fresh:
        delete_work(work)
    kept = served_before(work)
    if kept is not None:
        what = "the deployment is asked again" if url else "with the answers of then"
        say(f"goes on with the run of {began(work)}, {what}; --fresh starts anew")
    if kept is not None and url is None:
        served, computed_in, drafts = kept
    else:
        progress("deployment", 0, len(asked))
        if url is None:
            served, computed_in, drafts = ask_engine_apart(str(folder), {**engine, "hf_overrides": overrides}, asked)
        else:
            served, drafts = _asked(url, served_model_name, asked, kept and kept[0], progress)
            computed_in = expected_dtype(config)
        progress("deployment", len(asked), len(asked))
        keep_served(work, (served, computed_in, drafts))
    told: dict[str, Any] = {"vllm": vllm, "drafts": drafts, "texts": len(texts), "parts": parts}
    report = judged(folder, config, served, dtype or computed_in, work, progress=progress, **told)
    delete_work(work)
    reason = " and ".join(filter(None, (report["reason"], tokens)))
    not_checked = [report["not_checked"], _SHARED_READER if config.stored_quantization_config else ""]
    not_checked += ["tokenizer and chat template: the server does not answer /tokenize"] if tokens is None else []
    return {
        "checkpoint": str(folder),
        "deployment": url or "vllm.LLM",
        **report,
        "computes": not reason,
        "reason": reason,
        "not_checked": "; ".join(filter(None, not_checked)),
    }


def judged(
    folder: Path,
    config: BailingMoeV2Config,
    served: list[Served],
    dtype: str,
    work: Path,
    *,
    vllm: str | None = None,
    drafts: Drafts | None = None,
    texts: int | None = None,
    parts: bool = True,
    progress: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The part of `run`'s report that the log-probabilities decide.

    Where several ways of rounding are possible, the deployment computes the checkpoint if it does with one of them.

    Args:
        served: What the deployment gave.
        vllm: Its version of vLLM, if that is known.
        drafts: Its drafts, if it made any and counts them.
        texts: How many of the sequences are texts; the others are words in no order. All if left out.
        dtype, work, parts, progress: As for `run`, and the folder for what an interrupted run goes on with.
    """
    from vllm_bailing.tools.verify_reference import Rounding

    reports: list[dict[str, Any]] = []
    for rounding in Rounding.possible(config, dtype, vllm):
        place = work / f"rounding-{len(reports)}" if reports else work
        told: dict[str, Any] = {"drafts": drafts, "texts": texts, "parts": parts, "progress": progress}
        reports.append(_judged_by(rounding, folder, config, served, dtype, place, **told))
        if not reports[-1]["reason"]:
            return reports[-1]
    return min(reports, key=lambda report: report["measures"]["mean"][0])


def _judged_by(
    rounding: Rounding,
    folder: Path,
    config: BailingMoeV2Config,
    served: list[Served],
    dtype: str,
    work: Path,
    *,
    drafts: Drafts | None,
    texts: int | None,
    parts: bool,
    progress: Callable[[str, int, int | None], None],
) -> dict[str, Any]:
    import numpy as np

    from vllm_bailing.tools import verify_statistics, verify_verdict
    from vllm_bailing.tools.verify_reference import Asked, Reference
    from vllm_bailing.tools.verify_statistics import Differences

    steps = config.num_hidden_layers + 1
    asked = Asked.of([one.token_ids for one in served], [list(row) for one in served for row in one.top])
    reference = Reference(
        *(folder, config, asked, work, rounding), lambda done: progress("reference", done, steps * (1 + parts))
    )
    computed = reference.forward()
    came = np.array([value for one in served for row in one.top for value in row.values()])
    differences = Differences.between(came, computed, asked)
    no_numbers = int((~np.isfinite(came)).sum())
    shifts = []
    if parts and not no_numbers:
        effects = reference.effects(verify_statistics.weights(differences))
        shifts = verify_statistics.shifts(effects, verify_statistics.squares(differences))
    answers = [one.token_ids[one.prompt :] for one in served]
    no_drafts = not_checked(drafts, config, [len(answer) for answer in answers])
    draft_check = None
    if drafts and not no_drafts and config.num_nextn_predict_layers:
        draft_check = checked(reference, answers, [one.prompt for one in served], drafts)
    progress("reference", steps * (1 + parts), steps * (1 + parts))
    comparisons = _by_prompt(served, computed)
    measures = verify_statistics.measures(differences, shifts, dtype)
    most = verify_verdict.limits(dtype, measures, shifts)
    reason, looks_like = verify_verdict.judge(measures, shifts, dtype, draft_check)
    if no_numbers:
        reason = f"{no_numbers} of its {len(came)} log-probabilities are NaN or infinite"
        looks_like = "damaged weights, or numbers that are too large for its data type"
    left = [f"the MTP layer: {no_drafts}"] if config.num_nextn_predict_layers and no_drafts else []
    left += [f"small faults: {asked.positions} tokens are few; ask more --words"] if asked.positions < _FEW else []
    used = len({token for one in served for token in one.token_ids})
    return {
        "dtype": dtype,
        "prompts": [asdict(comparison) for comparison in comparisons[:texts]],
        "words": asdict(overall(comparisons[texts:])) if comparisons[texts:] else None,
        "overall": asdict(overall(comparisons)),
        "measures": {name: [value, most[name]] for name, value in measures.items()},
        "shifts": [asdict(shift) for shift in shifts[:5]],
        "coverage": {"vocabulary": used / config.vocab_size, "experts": computed.experts},
        "reason": reason,
        "looks_like": looks_like,
        "drafts": draft_check and asdict(draft_check),
        "not_checked": "; ".join(left),
    }
