"""The command `vllm-bailing`.

Heavy packages are imported inside the command that needs them, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_bailing import __version__

DEMO = Path(__file__).parent / "demo"
DEMO_ADAPTER = Path(__file__).parent / "demo-adapter"
TEMPLATES = Path(__file__).parent / "templates"
PACKAGES = ("vllm", "torch", "transformers")

app = typer.Typer(
    name="vllm-bailing",
    help="BailingMoeV2 (Ling 2.0, Ring 2.0, Ling-1T) for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-bailing {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo_path(
    adapter: Annotated[bool, typer.Option("--adapter", help="The folder of the demo's LoRA adapter instead.")] = False,
) -> None:
    """Print the folder of the demo checkpoint, for example for `vllm serve $(vllm-bailing demo-path)`."""
    folder, file = (DEMO_ADAPTER, "adapter_config.json") if adapter else (DEMO, "config.json")
    if not (folder / file).is_file():
        raise SystemExit(f"vllm-bailing: no demo checkpoint in {folder}; reinstall vllm-bailing")
    typer.echo(folder)


@app.command()
def chat_template(name: Annotated[str, typer.Argument(help="Such as ring.")]) -> None:
    """Print the path of a chat template of this package.

    For example: vllm serve inclusionAI/Ring-flash-2.0 --chat-template $(vllm-bailing chat-template ring)

    ring: for Ring 2.0 checkpoints that came with the base models' template, which knows neither tools nor thinking.
    """
    file = TEMPLATES / f"{name}.jinja"
    if not file.is_file():
        known = ", ".join(sorted(found.stem for found in TEMPLATES.glob("*.jinja")))
        raise SystemExit(f"vllm-bailing: no chat template {name!r}; there is {known}")
    typer.echo(file)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Print the installed versions and what registering with vLLM decided."""
    facts = collect_info()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        typer.echo(typer.style(f"{name:<14}", bold=True) + (shown or "-"))


def collect_info() -> dict[str, str | list[str] | None]:
    """Versions of what is installed (None: not installed), the Python, and the decision of `register`."""
    facts: dict[str, str | list[str] | None] = {"vllm-bailing": __version__}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["python"] = sys.version.split()[0]
    if facts["vllm"] is None:
        return facts | {"active": [], "reason": "vllm is not installed", "warning": ""}
    with redirect_stdout(sys.stderr):  # vLLM logs to standard output
        from vllm_bailing import compat

        decided = compat.status()
    return facts | {"active": list(decided.active), "reason": decided.reason, "warning": decided.warning}


@app.command()
def draft_vocab(
    model: Annotated[str, typer.Argument(help="The model whose tokenizer is used: a folder or a hub name.")],
    text: Annotated[
        list[Path], typer.Option(help="Text like that which the model will write; repeatable.", exists=True)
    ],
    size: Annotated[int, typer.Option(help="How many tokens to keep, the most frequent ones.", min=1)] = 32768,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("draft_vocab.json"),
) -> None:
    """Choose the tokens that an MTP draft may propose, by their frequency in a text.

    Pass the file to vLLM by --additional-config '{"bailing_draft_vocab": "draft_vocab.json"}'. Answers stay what they
    are; a draft reads less and is accepted a little less often.
    """
    from collections import Counter

    from transformers import AutoTokenizer

    from vllm_bailing.config import register_with_transformers

    register_with_transformers()
    tokenizer = AutoTokenizer.from_pretrained(model)
    counts: Counter[int] = Counter()
    for file in text:
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            counts.update(tokenizer.encode(line, add_special_tokens=False))
    # Every answer ends with one of these, however rare they are in the text.
    kept = list(dict.fromkeys([*tokenizer.all_special_ids, *(token for token, _ in counts.most_common(size))]))[:size]
    covered = sum(counts[token] for token in kept) / max(1, counts.total())
    out.write_text(json.dumps(sorted(kept)) + "\n", encoding="utf-8")
    typer.echo(f"{out}: {len(kept)} of {len(tokenizer)} tokens, {100 * covered:.2f} % of the text")


bench_app = typer.Typer(help="Measure what an option gains on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0,1,2") from None


@bench_app.command("mtp")
def bench_mtp(
    model: Annotated[str, typer.Argument(help="As for `vllm serve`; has to have an MTP layer.")],
    draft_tokens: Annotated[
        str, typer.Option(help="Draft tokens per step to compare; 0 is always among them.")
    ] = "0,1,2,3",
    batch_size: Annotated[str, typer.Option(help="Requests at once, each measured in turn.")] = "1,8",
    rounds: Annotated[int, typer.Option(help="How often each is measured, alternating.", min=1)] = 3,
    prompts: Annotated[
        Path | None, typer.Option(help="One user message a line; short questions if left out.", exists=True)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Limit of an answer.", min=2)] = 128,
    acceptance: Annotated[
        float | None,
        typer.Option(help="Let vLLM accept each draft token by chance, such as 0.7 (GPUs only).", min=0.0, max=1.0),
    ] = None,
    draft_model: Annotated[str | None, typer.Option(help="A checkpoint of its own for the MTP layer.")] = None,
    draft_vocab: Annotated[Path | None, typer.Option(help="Result of `vllm-bailing draft-vocab`.", exists=True)] = None,
    engine: Annotated[str, typer.Option(help="Further arguments of vllm.LLM, as JSON.")] = "{}",
    out: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = Path("bench-mtp"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find out how many draft tokens of the MTP layer pay, and plot it.

    The same prompts run with each number of draft tokens, in fresh processes that take turns.
    """
    from vllm_bailing import bench

    counts = sorted({0, *_numbers(draft_tokens)})
    try:
        options: dict[str, Any] = json.loads(engine)
        if not isinstance(options, dict):
            raise ValueError("an object is wanted")
    except ValueError as error:
        raise typer.BadParameter(f"--engine {engine!r} is no JSON object: {error}") from None
    lines = prompts.read_text(encoding="utf-8").splitlines() if prompts else bench.DEFAULT_PROMPTS
    job = bench.Job(model, options, _numbers(batch_size), [line for line in lines if line.strip()], max_tokens)
    draft = {"model": draft_model} if draft_model else None
    vocabulary = str(draft_vocab.resolve()) if draft_vocab else None
    jobs = bench.mtp_jobs(job, counts, acceptance, draft, vocabulary)

    try:
        results = bench.alternate(jobs, rounds)
    except bench.BenchError as error:
        raise SystemExit(f"vllm-bailing bench: {error}") from None
    rows = bench.summarize(results, "0")
    told = bench.advice(rows, "0")
    report = {
        "model": model,
        "acceptance": acceptance,
        "rounds": rounds,
        "engine": options,
        "versions": collect_info(),
        "rows": rows,
        "advice": told,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    written = [out.with_suffix(".json")]
    try:
        bench.plot_mtp(rows, f"MTP on {Path(model).name}", out.with_suffix(".png"))
        written.append(out.with_suffix(".png"))
    except ImportError:
        typer.echo("no plot: `pip install 'vllm-bailing[bench]'`", err=True)
    if as_json:
        typer.echo(json.dumps(report))
        return
    _print_mtp(rows, told)
    typer.echo(f"written to {' and '.join(map(str, written))}")


def _print_mtp(rows: list[dict[str, Any]], told: dict[int, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)  # fits into 80 columns
    for heading in ("batch", "draft", "tokens/s", "times none", "step", "accepted"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        speed, ratio = row["tokens_per_second"], row["ratio"]
        table.add_row(
            str(row["batch_size"]),
            row["arm"],
            f"{speed['median']:.0f} ({speed['low']:.0f}-{speed['high']:.0f})",
            f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})" if row["arm"] != "0" else "1",
            f"{row['acceptance_length']:.2f}",
            " ".join(f"{100 * share:.0f}%" for share in row["acceptance"]),
        )
    console = Console()
    console.print(table)
    console.print("step: tokens that one step of the model yields; accepted: drafts, by position", highlight=False)
    # Rounding depends on how many tokens are computed at once, so answers in bf16 may part where two tokens are close.
    differ = ", ".join(f"{row['arm']} at batch {row['batch_size']}" for row in rows if not row["same_answers"])
    console.print(
        f"answers differ with draft tokens {differ}" if differ else "all answers are the same", highlight=False
    )
    for size, words in told.items():
        console.print(f"batch {size}: {words}", highlight=False)


def main() -> None:
    """Entry point of the console script."""
    app()
