"""The command `vllm-bailing`.

Heavy packages are imported inside the command that needs them, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_bailing import DEMO, DEMO_ADAPTER, TEMPLATES, __version__

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-bailing"
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


@contextmanager
def _output_aside() -> Iterator[None]:
    """Standard output goes to standard error: vLLM logs there, as do the processes that it starts."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


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
    with _output_aside():
        from vllm_bailing.plugin import register

        decided = register.register()
    return facts | {"active": list(decided.active), "reason": decided.reason, "warning": decided.warning}


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Also check this checkpoint: a folder or a hub name.")] = None,
    hf_overrides: Annotated[str, typer.Option(help="As they would be given to vLLM.")] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check this installation, and a checkpoint if one is named: each line is ok or says what to do.

    Reads configuration and file headers, no weights. Exit code 1 if something is wrong.
    """
    from itertools import chain

    from rich.console import Console

    from vllm_bailing.cli import output
    from vllm_bailing.tools import doctor

    overrides = _json_object("--hf-overrides", hf_overrides)
    console, found = Console(highlight=False), []
    steps = chain(doctor.environment(), doctor.checkpoint(model, overrides) if model else ())
    while True:
        with _output_aside():
            check = next(steps, None)
        if check is None:
            break
        found.append(check)
        if not as_json:
            output.show_check(console, check)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in found]))
    wrong = sum(check.ok is False for check in found)
    if not as_json:
        console.print(f"[red]{wrong} to mend[/red]" if wrong else "[green]all is well[/green]")
    raise typer.Exit(1 if wrong else 0)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A hub name, a folder or a config.json.")],
    gpu: Annotated[str, typer.Option(help="Such as H100; any other with --memory-gib and --bandwidth.")],
    gpus: Annotated[int, typer.Option(help="How many, over all nodes.")] = 1,
    context: Annotated[int | None, typer.Option(help="Tokens of a request; the model's window if left out.")] = None,
    concurrency: Annotated[int, typer.Option(help="Requests at once.")] = 32,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16, fp32, fp8, int8 or int4; else the checkpoint's.")
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help="auto or fp8.")] = "auto",
    mtp: Annotated[int, typer.Option(help="Draft tokens of the MTP layer.")] = 0,
    draft_model: Annotated[str | None, typer.Option(help="The checkpoint that has the MTP layer.")] = None,
    tp: Annotated[int | None, typer.Option(help="Tensor-parallel size, if not chosen by itself.")] = None,
    pp: Annotated[int | None, typer.Option(help="Pipeline stages, if not chosen by themselves.")] = None,
    memory_gib: Annotated[float | None, typer.Option(help="Memory of a GPU that is not known.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Its memory bandwidth in TB/s.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of a GPU that vLLM may use.")] = 0.92,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Write a file for `vllm serve --config`.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Will it fit, how much context and how many requests, and with which command?

    Works from the configuration alone. Memory beside weights and KV cache is an estimate; the speeds are bounds that
    no deployment can pass, not promises. Exit code 1 if it does not fit.
    """
    from vllm_bailing.cli import output
    from vllm_bailing.config import read_config
    from vllm_bailing.planning.gpus import find_gpu
    from vllm_bailing.planning.plan import Request, make_plan

    try:
        config = read_config(model)
        request = Request(
            find_gpu(gpu, memory_gib, bandwidth),
            gpus,
            config.max_position_embeddings if context is None else context,
            concurrency,
            dtype=dtype,
            kv_dtype=kv_dtype,
            draft_tokens=mtp,
            tp=tp,
            pp=pp,
            memory_utilization=gpu_memory_utilization,
            model=model,
            draft_model=draft_model,
        )
        found = make_plan(config, request)
    except ValueError as error:
        typer.echo(f"vllm-bailing plan: {error}", err=True)
        raise typer.Exit(2) from None
    if config_file and found.verdict != "no":
        config_file.write_text(found.yaml(), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({**asdict(found), "serve": found.serve_line()}))
    else:
        output.show_plan(found)
        if config_file and found.verdict != "no":
            typer.echo(f"written to {config_file}")
    raise typer.Exit(1 if found.verdict == "no" else 0)


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


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="The checkpoint: a folder, or a hub name that was downloaded.")],
    url: Annotated[
        str | None, typer.Option(help="A running vLLM server, such as http://localhost:8000; else vLLM runs here.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The server's name of the model.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="What the deployment computes in: bfloat16, float16, float32 or fp8.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One user message a line; a few questions if left out.", exists=True)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Length of the answers that are compared too.", min=1)] = 32,
    hf_overrides: Annotated[str, typer.Option(help="As given to the deployment, such as the YaRN recipe.")] = "{}",
    engine: Annotated[str, typer.Option(help="Without --url: further arguments of vllm.LLM, as JSON.")] = "{}",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start again instead of going on with a run cut off.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Does this deployment compute this checkpoint?

    Sends prompts, takes the log-probabilities of prompts and answers, and compares them with the plain PyTorch
    reference, which reads the checkpoint layer by layer: a 100B model needs a few GiB of memory, and the time to read
    its files. Exit code 0: it does; 1: it does not; 2: could not be compared.
    """
    from vllm_bailing import errors
    from vllm_bailing.cli import output
    from vllm_bailing.errors import CheckpointError

    overrides, options = _json_object("--hf-overrides", hf_overrides), _json_object("--engine", engine)
    try:
        report = _verified(model, url, served_model_name, dtype, prompts, max_tokens, overrides, options, fresh)
    except (errors.VerifyError, CheckpointError, ValueError) as error:
        typer.echo(f"vllm-bailing verify: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(report))
    else:
        output.show_verified(report)
    raise typer.Exit(0 if report["computes"] else 1)


@app.command()
def chat(
    question: Annotated[str | None, typer.Argument(help="Asked once; left out, a conversation starts.")] = None,
    url: Annotated[str, typer.Option(help="A running server.")] = "http://localhost:8000",
    served_model_name: Annotated[str | None, typer.Option(help="The server's name of the model or adapter.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    thinking: Annotated[str | None, typer.Option(help="on or off; left out, what the chat template does.")] = None,
    tools: Annotated[
        Path | None, typer.Option(help="JSON list of functions that the model may call.", exists=True)
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="The server's default if left out.", min=0.0)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Limit of an answer; the server's if left out.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer to QUESTION as JSON.")] = False,
) -> None:
    """Chat with a running server.

    Thinking is shown dimmed, tool calls coloured; type a function's result as the next line. VLLM_API_KEY is sent if
    it is set.
    """
    from openai import OpenAIError
    from rich.console import Console

    from vllm_bailing.tools import chat

    if thinking not in (None, "on", "off"):
        raise typer.BadParameter(f"--thinking {thinking!r} must be on or off")
    if as_json and question is None:
        raise typer.BadParameter("--json needs a question")
    given = {"max_tokens": max_tokens, "temperature": temperature}
    sampling: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    client = chat.connect(url)
    console = Console()
    try:
        functions = json.loads(tools.read_text(encoding="utf-8")) if tools else None
        name = served_model_name or client.models.list().data[0].id
        conversation = chat.Chat(client, name, system, thinking, functions, **sampling)
        if question is None:
            if sys.stdin.isatty():
                console.print(f"{name} at {url}. {chat.HELP}.", style="dim", highlight=False)
            chat.converse(conversation, console, _typed(console))
        elif as_json:
            list(conversation.ask({"role": "user", "content": question}))
            typer.echo(chat.as_json(conversation.last))
        else:
            chat.show(conversation.ask({"role": "user", "content": question}), console)
    except OpenAIError as error:
        raise SystemExit(f"vllm-bailing chat: {url}: {error}") from None
    except json.JSONDecodeError as error:
        raise SystemExit(f"vllm-bailing chat: {tools} is no JSON: {error}") from None


def _typed(console: Any) -> Iterator[str]:
    """Lines of standard input, asked for on a terminal."""
    while True:
        try:
            yield console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt):
            return


def _json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("an object is wanted")
        return found
    except ValueError as error:
        raise typer.BadParameter(f"{flag} {text!r} is no JSON object: {error}") from None


def _verified(
    model: str,
    url: str | None,
    name: str | None,
    dtype: str | None,
    prompts: Path | None,
    max_tokens: int,
    overrides: dict[str, Any],
    options: dict[str, Any],
    fresh: bool,
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from vllm_bailing.checkpoint import local_folder
    from vllm_bailing.config import read_config
    from vllm_bailing.tools import verify

    folder = local_folder(model)
    config = read_config(folder, overrides)
    if dtype is not None and dtype not in verify.TOLERANCES:
        raise ValueError(f"--dtype {dtype} is not known; use one of {', '.join(verify.TOLERANCES)}")
    texts = prompts.read_text(encoding="utf-8").splitlines() if prompts else verify.DEFAULT_PROMPTS
    ids = verify.prompt_ids(folder, [text for text in texts if text.strip()])
    work = verify.work_folder(CACHE / "verify", str(folder), url, name, ids, max_tokens, overrides, options)
    if fresh:
        verify.forget(work)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        known = verify.served_before(work)
        if known is None:
            task = progress.add_task("deployment", total=len(ids))
            if url is None:
                with _output_aside():
                    served, computed = verify.ask_offline(
                        str(folder), {**options, "hf_overrides": overrides}, ids, max_tokens
                    )
            else:
                computed, served = verify.expected_dtype(config), []
                for one in verify.ask_server(url, name, ids, max_tokens):
                    served.append(one)
                    progress.advance(task)
            progress.update(task, completed=len(ids))
            verify.keep_served(work, served, computed)
        else:
            served, computed = known
        task = progress.add_task("reference", total=None)
        logprobs, likeliest = verify.reference_logprobs(
            folder, config, served, work, lambda done, of: progress.update(task, completed=done, total=of)
        )
    verify.forget(work)
    comparisons = [verify.compare(*row) for row in zip(served, logprobs, likeliest, strict=True)]
    total, judged_as = verify.overall(comparisons), dtype or computed
    reason = verify.verdict(total, verify.TOLERANCES[judged_as])
    return {
        "checkpoint": str(folder),
        "deployment": url or "vllm.LLM",
        "dtype": judged_as,
        "tolerance": asdict(verify.TOLERANCES[judged_as]),
        "prompts": [asdict(one) for one in comparisons],
        "overall": asdict(total),
        "computes": not reason,
        "reason": reason,
    }


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="A hub name, a folder or a config.json; no weights are read.")],
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", help="As for vLLM.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, or fp8 in blocks of 128 x 128; else the checkpoint's.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("tables"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Tune again what is there already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be tuned.")] = False,
    device_name: Annotated[
        str | None, typer.Option(help="With --dry-run: a GPU that need not be here, such as NVIDIA_H20.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make the table of tile sizes that vLLM's fused experts lack for a model on this GPU.

    Nothing else should run on the GPU. A run that was cut off goes on where it was. Exit code 1: it failed; 2: it
    could not start.
    """
    from vllm_bailing import errors
    from vllm_bailing.cli import output
    from vllm_bailing.config import read_config
    from vllm_bailing.tuning import gpu_timer, space, table
    from vllm_bailing.tuning.plan import make_tuning_plan

    def refuse(reason: Any, code: int) -> typer.Exit:
        typer.echo(f"vllm-bailing tune: {reason}", err=True)
        return typer.Exit(code)

    if device_name and not dry_run:
        raise typer.BadParameter("--device-name is for --dry-run; a table is made on the GPU that it is for")
    with _output_aside():
        try:
            experts = space.experts_of(read_config(model), tensor_parallel_size, dtype)
            if not device_name and (reason := gpu_timer.missing()):
                raise refuse(reason, 2)
            plan = make_tuning_plan(experts, out, device_name)
        except ValueError as error:
            raise refuse(error, 2) from None
    if dry_run:
        output.show_tuning_plan(plan, as_json)
        return
    if plan.is_there and not overwrite:
        raise refuse(f"{plan.file} is there; use it, or add --overwrite to make it again", 2)
    with redirect_stdout(sys.stderr):
        output.show_tuning_plan(plan, as_json=False)
    try:
        rows, written = _tuned(plan, model, tensor_parallel_size)
    except KeyboardInterrupt:
        left = table.partial_file(out, plan.file.name)
        raise refuse(f"stopped; what was measured is in {left}, and the same command goes on from there", 130) from None
    except errors.TuneError as error:
        raise refuse(error, 1) from None
    serve = f"VLLM_TUNED_CONFIG_FOLDER={shlex.quote(str(out))} vllm serve {shlex.quote(model)}"
    if tensor_parallel_size > 1:
        serve += f" --tensor-parallel-size {tensor_parallel_size}"
    if as_json:
        files = [str(file) for file in written]
        typer.echo(json.dumps({"files": files, "serve": serve, "tokens": [asdict(row) for row in rows]}))
    else:
        output.show_tuned(rows, written, serve)


def _tuned(plan: Any, model: str, tp_size: int) -> tuple[list[Any], list[Path]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vllm_bailing.tuning.plan import run
    from vllm_bailing.tuning.search import steps as all_steps

    console = Console(stderr=True, highlight=False)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with (
        _output_aside(),
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("weights", total=all_steps(plan.space))
        reached = 0

        def advance(tokens: int, steps: int) -> None:
            nonlocal reached
            progress.update(task, advance=steps, description=f"{tokens} tokens")
            if tokens != reached and not console.is_terminal:
                console.print(f"{tokens} tokens, after {progress.tasks[0].percentage:.0f} %", soft_wrap=True)
            reached = tokens

        return run(plan, model, tp_size, advance)


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
    from vllm_bailing import errors
    from vllm_bailing.bench import mtp, plots, report, runner
    from vllm_bailing.cli import output

    counts = sorted({0, *_numbers(draft_tokens)})
    options = _json_object("--engine", engine)
    lines = prompts.read_text(encoding="utf-8").splitlines() if prompts else mtp.DEFAULT_PROMPTS
    task = mtp.MtpTask(model, options, _numbers(batch_size), [line for line in lines if line.strip()], max_tokens)
    draft = {"model": draft_model} if draft_model else None
    vocabulary = str(draft_vocab.resolve()) if draft_vocab else None
    tasks = mtp.mtp_tasks(task, counts, acceptance, draft, vocabulary)

    try:
        results = runner.alternate(tasks, rounds)
    except errors.BenchError as error:
        raise SystemExit(f"vllm-bailing bench: {error}") from None
    measured = report.mtp_report(task, results, acceptance=acceptance, versions=collect_info())
    written = report.write_report(measured, out, plots.plot_mtp)
    if len(written) == 1:
        typer.echo("no plot: `pip install 'vllm-bailing[bench]'`", err=True)
    if as_json:
        typer.echo(json.dumps(measured))
        return
    output.show_mtp(measured["rows"], measured["advice"])
    typer.echo(f"written to {' and '.join(map(str, written))}")


@bench_app.command("compare")
def bench_compare(
    model: Annotated[
        str, typer.Argument(help="As for `vllm serve`, or demo; with dummy weights: mid, mini, flash-4L, flash-8L.")
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(help="A further arm, NAME=JSON: the plugin with these arguments of vllm.LLM; repeatable."),
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Requests at once, each measured in turn.")] = "1,8,32",
    prompt_tokens: Annotated[int, typer.Option(help="Of each request that decodes.", min=1)] = 32,
    output_tokens: Annotated[int, typer.Option(help="Of each request that decodes.", min=2)] = 64,
    prefill: Annotated[str, typer.Option(help="Lengths of prompts, each measured alone.")] = "512",
    rounds: Annotated[int, typer.Option(help="How often each arm is measured, alternating.", min=1)] = 5,
    repeats: Annotated[int, typer.Option(help="Of every figure in one process; the median counts.", min=1)] = 3,
    warm_up: Annotated[bool, typer.Option(help="Start every arm once before, unmeasured.")] = True,
    dtype: Annotated[str, typer.Option(help="As for `vllm serve`.")] = "auto",
    eager: Annotated[bool, typer.Option("--eager/--compiled", help="Without or with torch.compile.")] = False,
    tp: Annotated[int, typer.Option(help="Ranks of tensor parallelism.", min=1)] = 1,
    bandwidth: Annotated[
        float | None, typer.Option(help="TB/s of the memory of a rank, for the share of the roofline.", min=0.0)
    ] = None,
    engine: Annotated[str, typer.Option(help="Further arguments of vllm.LLM, for every arm, as JSON.")] = "{}",
    out: Annotated[Path, typer.Option(help="Where to write NAME.json and NAME.png.")] = Path("bench-compare"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Compare this package with vLLM's own model class, and with itself under an option, and plot it.

    vLLM's class runs twice, and what differs between the two is the noise floor: a verdict needs more than that. All
    arms run in fresh processes that take turns. An arm that ran another class or other kernels than it should is an
    error.
    """
    import shlex
    import tempfile

    from vllm_bailing import errors
    from vllm_bailing.bench import in_tree, plots, report, shapes
    from vllm_bailing.cli import output

    options = dict(_named_object("--option", text) for text in option or [])
    arguments: dict[str, Any] = {"dtype": dtype, "enforce_eager": eager, "tensor_parallel_size": tp}
    arguments |= _json_object("--engine", engine)
    sizes, lengths = _numbers(batch_size), _numbers(prefill)
    with tempfile.TemporaryDirectory() as folder:
        path = str(DEMO) if model == "demo" else model
        if model in shapes.SHAPES:
            shapes.write_shape(model, Path(folder))
            path, arguments["load_format"] = folder, "dummy"
        task = in_tree.CompareTask(path, arguments, sizes, lengths, prompt_tokens, output_tokens, repeats)
        try:
            result = in_tree.run(task, options, rounds, warm_up, bandwidth)
        except errors.BenchError as error:
            raise SystemExit(f"vllm-bailing bench: {error}") from None
    command, versions = shlex.join(["vllm-bailing", *sys.argv[1:]]), collect_info()
    measured = report.comparison_report(model, task, options, rounds, result, command=command, versions=versions)
    written = report.write_report(measured, out, plots.plot_comparison)
    if len(written) == 1:
        typer.echo("no plot: `pip install 'vllm-bailing[bench]'`", err=True)
    if as_json:
        typer.echo(json.dumps(measured))
        return
    output.show_comparison(measured)
    typer.echo(f"written to {' and '.join(map(str, written))}")


def _named_object(option: str, text: str) -> tuple[str, dict[str, Any]]:
    from vllm_bailing.bench import statistics

    name, equals, value = text.partition("=")
    if not name or not equals or name in (statistics.IN_TREE, statistics.AGAIN, statistics.PLUGIN):
        raise typer.BadParameter(f"{option} {text!r} is not NAME=JSON with a name of its own")
    return name, _json_object(option, value)


def main() -> None:
    """Entry point of the console script."""
    app()
