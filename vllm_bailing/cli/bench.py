"""`vllm-bailing bench mtp` and `vllm-bailing bench compare`: what an option gains on this machine."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_bailing import DEMO
from vllm_bailing.cli import options, output

if TYPE_CHECKING:
    from vllm_bailing.tools.prompts import Prompt


def bench_mtp(
    model: Annotated[str, typer.Argument(help="As for `vllm serve`; must have an MTP layer.")],
    draft_tokens: options.DraftTokenCounts = "0,1,2,3",
    batch_size: options.BatchSizes = "1,8",
    rounds: options.Rounds = 3,
    prompts: options.PromptFile = None,
    max_tokens: Annotated[int, typer.Option(help="Limit of an answer.", min=2)] = 128,
    acceptance: Annotated[
        float | None,
        typer.Option(help="Let vLLM accept each draft token by chance, such as 0.7 (GPUs only).", min=0.0, max=1.0),
    ] = None,
    draft_model: options.DraftModel = None,
    draft_vocab: options.DraftVocab = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="A kind of draft to compare, NAME=JSON: keys of vLLM's speculative configuration, and draft_vocab, a "
            "file; repeatable."
        ),
    ] = None,
    url: Annotated[str | None, options.URL] = None,
    engine: options.Engine = "{}",
    out: options.ReportName = Path("bench-mtp"),
    as_json: options.AsJson = False,
) -> None:
    """Find out how many draft tokens of the MTP layer pay, and plot it.

    The same prompts run with each number of draft tokens, in fresh processes that take turns. With --url, only
    acceptance is measured, on a server that runs: MODEL is its name there, and without --prompts all counts that it has
    made since its start.
    """
    from vllm_bailing.bench import mtp, plots, report, runner, shapes
    from vllm_bailing.errors import BenchError

    counts = sorted({0, *options.numbers(draft_tokens, least=0)})
    arguments = options.engine_arguments(engine)
    asked = _prompts(prompts)
    given = {"--url": url, "--engine": arguments, "--acceptance": acceptance is not None, "--draft": draft}
    given |= {"--draft-model": draft_model, "--draft-vocab": draft_vocab}
    options.refuse_ignored(given, {}, {"--url": tuple(given)[1:]})
    if url is not None:
        _show_server(url, model, asked, max_tokens, as_json)
        return
    _check_out(out, prompts, draft_vocab)
    lines = [asdict(prompt) for prompt in asked] or list(mtp.DEFAULT_PROMPTS)
    task = mtp.MtpTask(model, arguments, options.numbers(batch_size), lines, max_tokens)
    drafts = _drafts(draft or [], draft_model, draft_vocab)
    try:
        has_layer = shapes.load_config(model).num_nextn_predict_layers or all("model" in one for one in drafts.values())
        if not has_layer and max(counts):
            raise BenchError(f"{model} has no MTP layer; name a checkpoint that has it by --draft-model")
        tasks = mtp.mtp_tasks(task, counts, acceptance, drafts)
        results = runner.alternate(tasks, rounds)
    except BenchError as error:
        raise output.fail("bench", error, 2) from None
    measured = report.mtp_report(task, results, acceptance=acceptance, versions=_versions())
    written = report.write_report(measured, out, plots.plot_mtp)
    _show(measured, written, as_json, show_mtp)


def _drafts(named: list[str], model: str | None, vocabulary: Path | None) -> dict[str, dict[str, Any]]:
    """The kinds of draft to compare: those of --draft with --draft-model and --draft-vocab where they name none."""
    from vllm_bailing.bench.mtp import VOCABULARY

    common = ({"model": model} if model else {}) | ({VOCABULARY: str(vocabulary)} if vocabulary else {})
    drafts = {}
    for name, keys in (_named_object("--draft", text) for text in named):
        if name in drafts:
            raise typer.BadParameter(f"--draft {name!r} is given twice")
        drafts[name] = common | keys
    for keys in drafts.values() or [common]:
        file = keys.get(VOCABULARY)
        if file is not None and not (isinstance(file, str) and Path(file).is_file()):
            raise typer.BadParameter(f"{VOCABULARY} {file!r} is no file; make one by `vllm-bailing draft-vocab`")
        if file is not None:
            keys[VOCABULARY] = str(Path(file).resolve())
    return drafts or {"": common}


def _prompts(file: Path | None) -> list[Prompt]:
    from vllm_bailing.tools.prompts import read_prompts

    try:
        return read_prompts(file) if file else []
    except ValueError as error:
        raise typer.BadParameter(f"--prompts {error}") from None


def _show_server(url: str, model: str, prompts: list[Prompt], max_tokens: int, as_json: bool) -> None:
    from vllm_bailing.bench import mtp_server
    from vllm_bailing.errors import BenchError

    try:
        measured = mtp_server.ask(url, model, prompts, max_tokens)
    except BenchError as error:
        raise output.fail("bench", error, 2) from None
    if as_json:
        typer.echo(json.dumps(measured))
    else:
        show_acceptance(measured)


def show_acceptance(kinds: dict[str, dict[str, Any]]) -> None:
    """Acceptance by kind of text and position, with its 95 % interval."""
    positions = max(len(one["acceptance"]) for one in kinds.values())
    table = output.table("text", "drafts", *(f"position {number}" for number in range(1, positions + 1)))
    table.columns[0].no_wrap = False  # names of drafts and kinds may be long, and numbers stay whole
    for kind, one in kinds.items():
        pairs = zip(one["acceptance"], one["interval"], strict=True)
        shares = [f"{100 * share:.0f} % ({100 * low:.0f}-{100 * high:.0f})" for share, (low, high) in pairs]
        table.add_row(kind, str(one["drafts"]), *shares)
    console = output.console()
    console.print(table)
    console.print("accepted up to a position; in brackets the 95 % interval")


def bench_compare(
    model: Annotated[
        str,
        typer.Argument(
            help="As for `vllm serve`, or demo; as dummies mid, mini, flash, flash-4L, flash-8L.",
            autocompletion=options.one_of("demo", "mid", "mini", "flash", "flash-4L", "flash-8L"),
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(help="A further arm, NAME=JSON: the plugin with these arguments of vllm.LLM; repeatable."),
    ] = None,
    batch_size: options.BatchSizes = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(help="Of each request that decodes.", min=1)] = 32,
    output_tokens: Annotated[int, typer.Option(help="Of each request that decodes.", min=2)] = 64,
    prefill: Annotated[str, typer.Option(help="Lengths of prompts, each measured alone.")] = "512",
    rounds: options.Rounds = 5,
    repeats: Annotated[int, typer.Option(help="Of every figure in one process; the median counts.", min=1)] = 3,
    warm_up: Annotated[bool, typer.Option(help="Start every arm once before, unmeasured.")] = True,
    dtype: Annotated[
        str, options.dtype("bf16, fp16, fp32 or auto, as for `vllm serve`.", "bf16", "fp16", "fp32", "auto")
    ] = "auto",
    eager: Annotated[bool, typer.Option("--eager/--compiled", help="Without or with torch.compile.")] = False,
    tensor_parallel_size: Annotated[int, options.TENSOR_PARALLEL_SIZE] = 1,
    bandwidth: options.Bandwidth = None,
    engine: options.Engine = "{}",
    out: options.ReportName = Path("bench-compare"),
    as_json: options.AsJson = False,
) -> None:
    """Compare this package with vLLM's own model class.

    And, with --option, with itself under other arguments; and plot it. vLLM's class runs twice, and what differs
    between the two is the noise floor: a verdict needs more than that. All arms run in fresh processes that take turns,
    with the arguments of --engine. An arm that ran another class or other kernels than it should is an error.
    --bandwidth is for the share of the roofline.
    """
    from vllm_bailing.bench import in_tree, plots, report, shapes
    from vllm_bailing.errors import BenchError
    from vllm_bailing.units import full_dtype

    arms = dict(_named_object("--option", text) for text in option or [])
    for keys in arms.values():
        options.checked_arguments(keys, "--option")
    arguments: dict[str, Any] = {"dtype": full_dtype(dtype), "enforce_eager": eager}
    arguments["tensor_parallel_size"] = tensor_parallel_size
    arguments |= options.engine_arguments(engine)
    sizes, lengths = options.numbers(batch_size), options.numbers(prefill)
    _check_out(out)
    with tempfile.TemporaryDirectory() as folder:
        path = str(DEMO) if model == "demo" else model
        if model in shapes.SHAPES:
            shapes.write_shape(model, Path(folder))
            path, arguments["load_format"] = folder, "dummy"
        task = in_tree.CompareTask(path, arguments, sizes, lengths, prompt_tokens, output_tokens, repeats)
        try:
            result = in_tree.run(task, arms, rounds, warm_up, bandwidth)
        except BenchError as error:
            raise output.fail("bench", error, 2) from None
    command = shlex.join(["vllm-bailing", *sys.argv[1:]])
    measured = report.comparison_report(model, task, arms, rounds, result, command=command, versions=_versions())
    written = report.write_report(measured, out, plots.plot_comparison)
    _show(measured, written, as_json, show_comparison)


def _check_out(out: Path, *read: Path | None) -> None:
    """Before engines run, which takes long."""
    from vllm_bailing.bench.report import files_of

    output.require_others("bench", "--out", files_of(out), read)
    output.require_place("bench", "--out", out)


def _versions() -> dict[str, Any]:
    from vllm_bailing.tools.info import collect_info

    with output.output_aside():
        return collect_info()


def _show(
    measured: dict[str, Any], written: list[Path], as_json: bool, show_table: Callable[[dict[str, Any]], None]
) -> None:
    if len(written) == 1:
        typer.echo("no plot: `pip install 'vllm-bailing[bench]'`", err=True)
    if as_json:
        typer.echo(json.dumps(measured))
        return
    show_table(measured)
    output.show_files(written)


def _named_object(option: str, text: str) -> tuple[str, dict[str, Any]]:
    from vllm_bailing.bench import statistics

    name, equals, value = text.partition("=")
    if not name or not equals or name in (statistics.IN_TREE, statistics.AGAIN, statistics.PLUGIN):
        raise typer.BadParameter(f"{option} {text!r} is not NAME=JSON with a name of its own")
    return name, options.json_object(option, value)


def show_mtp(report: dict[str, Any]) -> None:
    """The report of `bench mtp`."""
    from vllm_bailing.bench.mtp import NO_DRAFTS, deepest_of

    rows = report["rows"]
    named = any(deepest_of(rows))  # whose acceptance stands below only, so that it fits into 80 columns
    table = output.table("batch", "draft", "tokens/s", "times none", "step", *([] if named else ["accepted"]))
    for row in rows:
        speed, ratio = row["tokens_per_second"], row["ratio"]
        table.add_row(
            str(row["batch_size"]),
            row["arm"],
            f"{speed['median']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})",
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if row["arm"] != NO_DRAFTS else "1",
            f"{row['acceptance_length']:.2f}",
            *([] if named else [" ".join(f"{100 * share:.0f}%" for share in row["acceptance"])]),
        )
    console = output.console()
    console.print(table)
    console.print(
        "step: tokens that one step of the model yields" + ("" if named else "; accepted: drafts, by position")
    )
    accepted: dict[str, dict[str, Any]] = {}
    for draft, deepest in deepest_of(rows).items():
        accepted[draft or "all"] = deepest
        accepted |= {f"{draft} {kind}".strip(): found for kind, found in deepest["kinds"].items()}
    if accepted:
        show_acceptance(accepted)
    # Rounding depends on how many tokens are computed at once, so answers in bf16 may part where two tokens are close.
    differ = ", ".join(f"{row['arm']} at batch {row['batch_size']}" for row in rows if not row["same_answers"])
    console.print(f"answers differ with draft tokens {differ}" if differ else "all answers are the same")
    for size, text in report["advice"].items():
        console.print(f"batch {size}: {text}")


def show_comparison(report: dict[str, Any]) -> None:
    """The report of `bench compare`."""
    from rich.text import Text

    from vllm_bailing.bench import statistics

    def short(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    headings = ("figure of in-tree", "median (range)", "ratio (95 %)", "verdict")
    table = output.table(*headings, padding=(0, 1, 0, 0))  # fits into 80 columns
    styles = {"faster": "green", "less": "green", "slower": "red", "more": "red"}
    for row in report["rows"]:
        low, high = row["interval"]
        is_base = row["arm"] == statistics.IN_TREE
        noise = f"noise {100 * (row['noise'] - 1):.1f} %"
        table.add_row(
            Text(f"{row['figure']}, {row['unit']}", "bold") if is_base else f"  {row['arm']}",
            f"{short(row['median'])} ({short(row['low'])}-{short(row['high'])})",
            "1" if is_base else f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})",
            noise if row["arm"] == statistics.AGAIN else row["verdict"],
            style=None if is_base else styles.get(row["verdict"], "dim"),
        )
    console = output.console()
    console.print(table)
    console.print(statistics.EXPLANATION)
    for figure, shares in report["roofline"].get("shares", {}).items():
        by_arm = ", ".join(f"{arm} {100 * share:.0f} %" for arm, share in shares.items())
        console.print(f"share of the roofline, {figure}: {by_arm}")
    for arm, facts in report["arms"].items():
        console.print(f"{arm}: {facts['model']}")
    base = report["arms"][statistics.IN_TREE]
    kernels = ", ".join(f"{key} {base[key]}" for key in ("experts", "attention", "dtype", "compilation", "graphs"))
    console.print(f"{kernels}, fusions {', '.join(base['fusions']) or 'none'}, on {base['device']}")
    for note in report["notes"]:
        console.print(note)
