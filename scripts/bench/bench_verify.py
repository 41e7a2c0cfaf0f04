"""How far are right deployments from the reference? Makes and tries the limits of `vllm-bailing verify`.

    python scripts/bench/bench_verify.py --right 10                     judges them by the limits as they are
    python scripts/bench/bench_verify.py --right 10 --write FILE        and makes limits from them
    python scripts/bench/bench_verify.py --faults --words 4096          what of planted faults is above the limits
    python scripts/bench/bench_verify.py --faults --arm "plain fp8"
    python scripts/bench/bench_verify.py --faults --arm "bf16, drafts"  in the MTP layer that drafts

Every arm serves the demo checkpoint as one engine, or as the plain model in transformers, and is asked so many sets of
prompts: held-out conversations and words in no order. Each set counts as a deployment. What the arms answer and how it
is judged is kept in --work, from where a run that was cut off goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bench_files import ROOT
from rich.console import Console
from rich.table import Table

from tests.support.checkpoints import changed_demo
from vllm_bailing import DEMO
from vllm_bailing.config import BailingMoeV2Config, read_config
from vllm_bailing.tools import verify
from vllm_bailing.tools.quantize import Scheme, quantize
from vllm_bailing.tools.verify_deployment import (
    TOP,
    WORDS,
    Prompt,
    Served,
    ask_engine,
    draft_counts_of,
    engine,
    prompts_of,
)
from vllm_bailing.tools.verify_drafts import DraftCheck, Drafts

Fault = Callable[[Any], object]  # changes the plain model
DraftFault = Callable[[dict[str, Any]], object]  # changes the MTP layer's tensors, by their names in it
HELD_OUT = ROOT / "tests" / "data" / "demo_heldout.jsonl"
MTP = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
COMPILED = {"enforce_eager": False}  # as `vllm serve` runs unless it is told otherwise
LINEAR = (r"re:.*\.experts\..*",)  # kept as they are: CPUs without AVX-512 have no kernel for such experts


@dataclass(frozen=True)
class Arm:
    """A way to deploy the demo.

    Attributes:
        dtype: What it computes in, as `verify --dtype` takes it.
        options: Further arguments of vLLM; None for the plain model.
        scheme: Of the checkpoint, if it is quantized.
        keep: Modules of it that are not.
        dequantize: Whether vLLM makes the weights plain ones.
        twice: Asked twice; the answers are those that begin with a cached prefix.
    """

    dtype: str = "bfloat16"
    options: dict[str, Any] | None = field(default_factory=dict)
    scheme: Scheme | None = None
    keep: tuple[str, ...] = ()
    dequantize: bool = False
    twice: bool = False

    def folder(self, work: Path) -> Path:
        """The checkpoint, made where it is wanted for the first time."""
        if self.scheme is None:
            return DEMO
        folder = work / f"{self.scheme.value}{'-linear' if self.keep else ''}"
        if not (folder / "config.json").is_file():
            quantize(str(DEMO), folder, self.scheme, group_size=32, keep=self.keep)
        return folder

    @property
    def overrides(self) -> dict[str, Any]:
        """`--hf-overrides`."""
        return {"dequantize": True} if self.dequantize else {}

    @property
    def drafts(self) -> bool:
        """Whether the MTP layer drafts."""
        return self.options is not None and "speculative_config" in self.options


ARMS = {
    "bf16": Arm(),
    "bf16, drafts": Arm(options=MTP),
    "bf16, chunks of 64": Arm(options={"max_num_batched_tokens": 64, "max_num_seqs": 32}),
    "bf16, cached prefixes": Arm(options={"enable_prefix_caching": True, "block_size": 32}, twice=True),
    "bf16, 2 ranks": Arm(options={"tensor_parallel_size": 2}),
    "fp16": Arm("float16"),
    "fp16, drafts": Arm("float16", MTP),
    "fp32": Arm("float32"),
    "fp8, dequantized": Arm(scheme=Scheme.fp8, dequantize=True),
    "fp8 blocks, dequantized": Arm(scheme=Scheme.fp8_block, dequantize=True),
    "int8, dequantized": Arm(scheme=Scheme.w8a8, dequantize=True),
    "int8, dequantized, drafts": Arm(options=MTP, scheme=Scheme.w8a8, dequantize=True),
    "int4, dequantized": Arm(scheme=Scheme.w4a16, dequantize=True),
    "fp8 blocks": Arm(scheme=Scheme.fp8_block),  # these three in kernels for CPUs that have some
    "int8": Arm(scheme=Scheme.w8a8),
    "int4": Arm(scheme=Scheme.w4a16),
    "int8, drafts": Arm(options=MTP, scheme=Scheme.w8a8),
    "bf16, compiled": Arm(options=COMPILED),
    "int8, compiled": Arm(options=COMPILED, scheme=Scheme.w8a8),
    "int4, compiled": Arm(options=COMPILED, scheme=Scheme.w4a16),
    "fp8 linear layers": Arm(scheme=Scheme.fp8, keep=LINEAR),
    "int8 linear layers": Arm(scheme=Scheme.w8a8, keep=LINEAR),
    "int4 linear layers": Arm(scheme=Scheme.w4a16, keep=LINEAR),
    "plain bf16": Arm(options=None),
    "plain fp16": Arm("float16", None),
    "plain fp32": Arm("float32", None),
    "plain fp8": Arm("fp8", None),  # weights quantized at the start
    "plain fp8 checkpoint": Arm(options=None, scheme=Scheme.fp8),
    "plain int8 checkpoint": Arm(options=None, scheme=Scheme.w8a8),
}


def scaled(name: str, factor: float) -> Fault:
    """A parameter is so many times as large."""
    return lambda model: model.get_parameter(name).data.mul_(factor)


def swapped(name: str, one: int, other: int) -> Fault:
    """Two rows of a parameter stand in each other's place."""

    def plant(model: Any) -> None:
        rows = model.get_parameter(name).data
        rows[[one, other]] = rows[[other, one]]

    return plant


def configured(**keys: Any) -> Fault:
    """Keys of the configuration have other values."""
    return lambda model: model.config.update(keys)


def with_eps(eps: float) -> Fault:
    """All norms add it to the mean of squares."""

    def plant(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "eps"):
                module.eps = eps

    return plant


def with_bias(change: Callable[[Any], Any], layers: str = "") -> Fault:
    """The expert bias of all layers, or of those whose name has `layers`, is another one."""

    def plant(model: Any) -> None:
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias") and layers in name:
                buffer.copy_(change(buffer))

    return plant


def exchanged(one: str, other: str) -> Fault:
    """Two parameters stand in each other's place."""

    def plant(model: Any) -> None:
        first, second = model.get_parameter(one).data, model.get_parameter(other).data
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)

    return plant


FAULTS: dict[str, Fault] = {
    "none": lambda model: None,
    "routed scaling 2.4": configured(routed_scaling_factor=2.4),
    "final norm + 1 %": scaled("model.norm.weight", 1.01),
    "norm before attention 2 + 1 %": scaled("model.layers.2.input_layernorm.weight", 1.01),
    "norm before MLP 2 + 1 %": scaled("model.layers.2.post_attention_layernorm.weight", 1.01),
    "one expert + 5 %": scaled("model.layers.2.mlp.experts.5.down_proj.weight", 1.05),
    "rms_norm_eps 1e-5": with_eps(1e-5),
    "expert bias in bf16": with_bias(lambda bias: bias.bfloat16().float()),
    "expert bias zero": with_bias(lambda bias: 0 * bias),
    "expert bias zero in layer 2": with_bias(lambda bias: 0 * bias, ".2."),
    "shared expert missing in layer 2": scaled("model.layers.2.mlp.shared_experts.down_proj.weight", 0),
    "norms of layer 2 swapped": exchanged(
        *(f"model.layers.2.{norm}_layernorm.weight" for norm in ("input", "post_attention"))
    ),
    "rope theta 110": lambda model: model.config.rope_parameters.update(rope_theta=110),
    "3 of 4 experts": configured(num_experts_per_tok=3),
    "topk_group 4": configured(topk_group=4),
    "rows of the embedding swapped": swapped("model.word_embeddings.weight", 700, 800),
    "rows of the head swapped": swapped("lm_head.weight", 700, 800),
}


def times(factor: float, *names: str) -> DraftFault:
    """Tensors are so many times as large."""

    def plant(layer: dict[str, Any]) -> None:
        for name in names:
            layer[name] = factor * layer[name]

    return plant


def of_each_other(one: str, other: str) -> DraftFault:
    """Two tensors stand in each other's place."""
    return lambda layer: layer.update({one: layer[other], other: layer[one]})


EXPERTS = tuple(f"mlp.experts.{expert}.down_proj.weight" for expert in range(16))  # of the demo
DRAFT_FAULTS: dict[str, DraftFault] = {
    "none": lambda layer: None,
    "eh_proj zero": times(0, "eh_proj.weight"),
    "halves of eh_proj swapped": lambda layer: layer.update(
        {"eh_proj.weight": layer["eh_proj.weight"].roll(layer["eh_proj.weight"].shape[1] // 2, 1)}
    ),
    "hnorm and enorm swapped": of_each_other("hnorm.weight", "enorm.weight"),
    "final norm half as large": times(0.5, "final_layernorm.weight"),
    "attention missing": times(0, "attention.dense.weight"),
    "norms of query and key swapped": of_each_other(
        "attention.query_layernorm.weight", "attention.key_layernorm.weight"
    ),
    "norms of the layer swapped": of_each_other("input_layernorm.weight", "post_attention_layernorm.weight"),
    "routed experts missing": times(0, *EXPERTS),
    "routed experts twice as large": times(2, *EXPERTS),
    "one expert missing": times(0, EXPERTS[0]),
    "two experts swapped": of_each_other(*EXPERTS[:2]),
    "shared experts missing": times(0, "mlp.shared_experts.down_proj.weight"),
    "expert bias zero": times(0, "mlp.gate.expert_bias"),
}


def prompts(seed: int, words: int = WORDS) -> list[Prompt]:
    """Those of `verify` for seed 0; else six held-out messages, and words in another order."""
    texts = list(verify.DEFAULT_PROMPTS)
    if seed:
        rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
        drawn = np.random.default_rng(seed).choice(len(rows), 6, replace=False)
        texts = [str(rows[one]["messages"][-1]["content"]) for one in drawn]
    return prompts_of(DEMO, texts, 32, words, read_config(DEMO).vocab_size, seed)


def ask(arm: Arm, folder: Path, missing: dict[int, Path]) -> None:
    """Keep in each of the files by seed what an engine in this process answers to that set of prompts."""
    os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"})
    os.dup2(2, 1)
    common = {"enforce_eager": True, "max_model_len": 512, "dtype": arm.dtype, "hf_overrides": arm.overrides}
    llm = engine(str(folder), {**common, **(arm.options or {})})
    for seed, file in missing.items():
        before = draft_counts_of(llm)
        served = ask_engine(llm, prompts(seed))
        after = draft_counts_of(llm)
        if arm.twice:
            served = [_with_cached_prefix(llm, one) for one in served]
        keep(file, served, after.since(before) if before and after else None)


def _with_cached_prefix(llm: Any, served: Served) -> Served:
    """What an engine answers that need not compute the prompt: it has done so for `served`."""
    from vllm import SamplingParams

    answered = len(served.token_ids) - served.prompt
    params = SamplingParams(max_tokens=answered, temperature=0, logprobs=TOP, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": served.token_ids[: served.prompt]}], params, use_tqdm=False)
    answer = output.outputs[0]
    top = [{token: entry.logprob for token, entry in row.items()} for row in answer.logprobs or []]
    ids = served.token_ids[: served.prompt] + list(answer.token_ids)
    return Served(ids, served.top[: served.prompt - 1] + top, served.prompt)


def plain_model(arm: Arm, folder: Path, plant: Fault = lambda model: None) -> Any:
    """The demo as the plain model, with a fault, and computing as the arm does."""
    import torch

    from vllm_bailing.reference import BailingMoeV2ForCausalLM

    dtype = "bfloat16" if arm.dtype == "fp8" else arm.dtype
    model = BailingMoeV2ForCausalLM.from_pretrained(DEMO, dtype=getattr(torch, dtype))
    plant(model)
    if arm.dtype == "fp8" or arm.scheme is not None:
        _quantize_layers(model, arm, folder)
    return model


def _quantize_layers(model: Any, arm: Arm, folder: Path) -> None:
    """Linear layers as a kernel for FP8 or INT8 computes them: rounded inputs, exact sums."""
    import torch
    from torch.nn import Linear

    from vllm_bailing.tools.verify_tensors import TensorReader

    reader = TensorReader(folder, read_config(folder))
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or name.endswith(("lm_head", "eh_proj", "gate")):
            continue
        if arm.scheme is None:  # one scale for the tensor, as vLLM has it
            weight, kind = _rounded(module.weight.float(), "fp8", (0, 1)), "fp8"
        else:
            weight, kind = reader.tensor(f"{name}.weight"), "int8" if arm.scheme is Scheme.w8a8 else "fp8"

        def forward(x: Any, weight: Any = weight, kind: str = kind) -> Any:
            return torch.nn.functional.linear(_rounded(x.float(), kind, -1), weight).to(x.dtype)

        module.forward = forward  # pyright: ignore[reportAttributeAccessIssue]


def _rounded(x: Any, kind: str, over: int | tuple[int, ...]) -> Any:
    """`x` in FP8 or INT8, with one scale over the axes `over`."""
    import torch

    scale = (x.abs().amax(over, keepdim=True) / (448 if kind == "fp8" else 127)).clamp(min=1e-12)
    return ((x / scale).to(torch.float8_e4m3fn).float() if kind == "fp8" else (x / scale).round()) * scale


def answers_of(model: Any, asked: list[Prompt]) -> list[Served]:
    """What the plain model answers."""
    import torch

    with torch.no_grad():
        return [_answer(model, prompt) for prompt in asked]


def ask_plain(arm: Arm, folder: Path, missing: dict[int, Path]) -> None:
    """As `ask`, of the plain model."""
    model = plain_model(arm, folder)
    for seed, file in missing.items():
        keep(file, answers_of(model, prompts(seed)), None)


def _answer(model: Any, prompt: Prompt) -> Served:
    import torch

    ids = prompt.token_ids
    if prompt.max_tokens > 1:
        given = torch.tensor([ids])
        ids = model.generate(given, max_new_tokens=prompt.max_tokens, do_sample=False, pad_token_id=0)[0].tolist()
    logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    top = [
        {token: float(row[token]) for token in {*row.topk(TOP).indices.tolist(), next_token}}
        for row, next_token in zip(logprobs, ids[1:], strict=True)
    ]
    return Served(ids, top, len(prompt.token_ids))


def keep(file: Path, served: list[Served], drafts: Drafts | None) -> None:
    """Keep in `file` what a deployment gave."""
    new = file.with_suffix(".new")
    new.write_bytes(pickle.dumps((served, drafts)))
    new.replace(file)


def reports_of(arm: Arm, work: Path, folder: Path, seeds: range) -> list[dict[str, Any]]:
    """What `verify` says of the arm for each set of prompts; what is kept in `work` is not done again."""
    work.mkdir(parents=True, exist_ok=True)
    missing = {seed: work / f"{seed}.pkl" for seed in seeds if not (work / f"{seed}.pkl").is_file()}
    if missing:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(ask_plain if arm.options is None else ask, arm, folder, missing).result()
    config, reports = read_config(folder, arm.overrides), []
    for seed in seeds:
        file = work / f"{seed}.json"
        if not file.is_file():
            served, drafts = pickle.loads((work / f"{seed}.pkl").read_bytes())
            file.write_text(json.dumps(judged(arm, folder, config, served, drafts)))
        reports.append(json.loads(file.read_text()))
    return reports


def judged(
    arm: Arm,
    folder: Path,
    config: BailingMoeV2Config,
    served: list[Served],
    drafts: Drafts | None = None,
    parts: bool = True,
) -> dict[str, Any]:
    """`verify`'s report, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        vllm = None if arm.options is None else version("vllm")
        report = verify.judged(folder, config, served, arm.dtype, Path(scratch), vllm=vllm, drafts=drafts, parts=parts)
        return {**report, "seconds": time.monotonic() - start}


def show_faults(arm: Arm, work: Path, words: int) -> None:
    """Plant every fault in the plain model, and print what is above its limit."""
    table = Table("fault", "significance", "above their limits", "it looks like")
    folder = arm.folder(work)
    config = read_config(folder)
    for fault, plant in FAULTS.items():
        model = plain_model(arm, folder, plant)
        report = judged(arm, folder, config, answers_of(model, prompts(0, words)))
        found = report["measures"]
        above = ", ".join(
            f"{name} {value:.3g} > {limit:.3g}" for name, (value, limit) in found.items() if value > limit
        )
        table.add_row(fault, f"{found['significance'][0]:.3g}", above, report["looks_like"])
        print(f"{fault}: {above or 'nothing'} above; {report['looks_like']}", flush=True)
    Console(width=130).print(table)


def show_draft_faults(arm: Arm, work: Path) -> None:
    """Plant every fault in the MTP layer of a checkpoint that an engine serves, and print what its drafts come to."""
    table = Table("fault in the MTP layer", "first drafts accepted", "drafts of the reference", "verdict")
    config = read_config(DEMO)
    layer = f"model.layers.{config.num_hidden_layers}."
    for number, (fault, plant) in enumerate(DRAFT_FAULTS.items()):

        def change(tensors: dict[str, Any], plant: DraftFault = plant) -> None:
            found = {name.removeprefix(layer): one for name, one in tensors.items() if name.startswith(layer)}
            plant(found)
            tensors.update({f"{layer}{name}": one.contiguous() for name, one in found.items()})

        folder, file = changed_demo(work / f"draft-fault-{number}", change), work / f"draft-fault-{number}.pkl"
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(ask, arm, folder, {0: file}).result()
        served, drafts = pickle.loads(file.read_bytes())
        check = DraftCheck(**judged(arm, DEMO, config, served, drafts, parts=False)["drafts"])
        came, wanted = f"{check.accepted} of {check.drafts}", ", ".join(map(str, check.expected))
        table.add_row(fault, came, wanted, check.reason or "right")
        print(f"{fault}: {came}, {wanted}; {check.reason or 'right'}", flush=True)
    Console(width=150).print(table)


def show_right(reports: dict[str, list[dict[str, Any]]]) -> None:
    """Print what the measures of each arm come to, and whether `verify` finds fault with it."""
    measures = list(next(iter(reports.values()))[0]["measures"])
    table = Table("arm", "sets", "alarms", "drafts accepted", *measures, title="mean and largest of the sets")
    for arm, rows in reports.items():
        values = {name: [row["measures"][name][0] for row in rows] for name in measures}
        drafts = [row["drafts"] for row in rows if row["drafts"]]
        accepted, made = (sum(one[key] for one in drafts) for key in ("accepted", "drafts"))
        cells = (f"{np.mean(each):.2f} {max(each):.2f}" for each in values.values())
        alarms = sum(bool(row["reason"]) for row in rows)
        table.add_row(arm, str(len(rows)), str(alarms), f"{accepted / made:.0%}" if made else "", *cells)
    Console(width=150).print(table)
    for arm, rows in reports.items():
        for number, row in enumerate(rows):
            if row["reason"]:
                print(f"{arm}, set {number}: {row['reason']}; {row['looks_like']}")


def write(reports: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """The limits' file."""
    measured: dict[str, dict[str, list[float]]] = {}
    for arm, rows in reports.items():
        for row in rows:
            for measure, (value, _) in row["measures"].items():
                values = measured.setdefault(ARMS[arm].dtype, {}).setdefault(measure, [])
                values.append(float(f"{value:.4g}"))
    out.write_text(json.dumps({"right": measured}, indent=1) + "\n", encoding="utf-8")


def main(
    right: Annotated[int, typer.Option(help="Sets of prompts for each arm.", min=1)] = 10,
    first: Annotated[int, typer.Option(help="Number of the first set.", min=1)] = 1,
    arm: Annotated[list[str] | None, typer.Option(help="Only this one, as often as you like.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder for what comes.")] = None,
    out: Annotated[Path | None, typer.Option("--write", help="File to write: vllm_bailing/assets/verify.json.")] = None,
    faults: Annotated[bool, typer.Option("--faults", help="Plant faults in plain models instead.")] = False,
    words: Annotated[int, typer.Option(help="For --faults.")] = WORDS,
) -> None:
    """Measure, and print a table."""
    if unknown := set(arm or ()) - ARMS.keys():
        raise typer.BadParameter(f"no such arm: {', '.join(unknown)}; there are {'; '.join(ARMS)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if faults:
            for name in arm or ["plain bf16"]:
                if ARMS[name].drafts:
                    show_draft_faults(ARMS[name], folder)
                else:
                    show_faults(ARMS[name], folder, words)
            return
        reports = {}
        for name in arm or ARMS:
            place = folder / name.replace(", ", "-").replace(" ", "_")
            chosen = ARMS[name]
            reports[name] = reports_of(chosen, place, chosen.folder(folder), range(first, first + right))
        show_right(reports)
        if out is not None:
            write(reports, out)


if __name__ == "__main__":
    typer.run(main)
