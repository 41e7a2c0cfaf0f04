"""`vllm-bailing verify`: a deployment against the plain reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_bailing.cli import options, output


def verify(
    model: Annotated[str, typer.Argument(help="The checkpoint: a folder, or a hub name that was downloaded.")],
    url: Annotated[str | None, options.URL] = None,
    served_model_name: options.ServedModelName = None,
    dtype: Annotated[
        str | None, options.dtype("What the deployment computes in: bf16, fp16, fp32 or fp8; else the checkpoint's.")
    ] = None,
    prompts: options.Prompts = None,
    max_tokens: Annotated[int, typer.Option(help="Length of the answers that are compared too.", min=1)] = 32,
    words: Annotated[
        int, typer.Option(help="Words of the vocabulary, in no order, that are asked besides.", min=0)
    ] = 1024,
    parts: Annotated[
        bool, typer.Option(help="Go back through the checkpoint, to see which part of the model differs.")
    ] = True,
    hf_overrides: options.HfOverrides = "{}",
    engine: options.Engine = "{}",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again instead of continuing an interrupted run.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The server's, if it is not the checkpoint's.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Does this deployment compute this checkpoint?

    Sends prompts, takes the log-probabilities of prompts and answers, and compares them with the plain PyTorch
    reference, which reads the checkpoint layer by layer: a 100B model needs a few GiB of memory, and the time to read
    its files four times. Without --url, vLLM runs here, with the arguments of --engine. Exit code 0: it does; 1: it
    does not; 2: could not be compared.
    """
    from rich.progress import Progress

    from vllm_bailing.errors import CheckpointError, VerifyError
    from vllm_bailing.tools import verify
    from vllm_bailing.units import full_dtype

    overrides = options.json_object("--hf-overrides", hf_overrides)
    arguments = options.engine_arguments(engine)
    given = {"--url": url, "--engine": arguments, "--served-model-name": served_model_name}
    given["--chat-template"] = chat_template
    without = {"--url": ("--served-model-name", "--chat-template")}
    options.refuse_ignored(given, without, {"--url": ("--engine",)})
    if "hf_overrides" in arguments:
        raise typer.BadParameter("--engine: 'hf_overrides' is for the reference too; give it by --hf-overrides")
    console = output.console(stderr=True)
    try:
        with (
            Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            tasks = {}

            def advance(stage: str, done: int, total: int | None) -> None:
                if stage not in tasks:
                    tasks[stage] = progress.add_task(stage, total=total)
                progress.update(tasks[stage], completed=done, total=total)

            report = verify.run(
                model,
                url,
                served_model_name,
                dtype=dtype and full_dtype(dtype),
                prompts=options.lines_of(prompts),
                max_tokens=max_tokens,
                words=words,
                parts=parts,
                overrides=overrides,
                engine=arguments,
                fresh=fresh,
                chat_template=options.text_of("--chat-template", chat_template),
                progress=advance,
                say=lambda text: typer.echo(f"vllm-bailing verify: {text}", err=True),
            )
    except (VerifyError, CheckpointError, ValueError) as error:
        raise output.fail("verify", error, 2) from None
    except KeyboardInterrupt:
        raise output.interrupted("verify", "the same command goes on from here" + ", without --fresh" * fresh) from None
    if as_json:
        typer.echo(json.dumps(report))
    else:
        show_report(report)
    raise typer.Exit(0 if report["computes"] else 1)


def show_report(report: dict[str, Any]) -> None:
    """What `tools.verify.run` returns."""
    from rich.text import Text

    from vllm_bailing.tools.verify_drafts import DraftCheck
    from vllm_bailing.tools.verify_verdict import MEASURES, two_digits

    console = output.console()
    console.print(_deviations(report))
    console.print("Δ: served minus reference log-probability, in nats.")
    table = output.table(f"what decides, for {report['dtype']}", "came", "at most", justify="right")
    for name, (value, limit) in report["measures"].items():
        table.add_row(MEASURES[name], two_digits(value), two_digits(limit), style="" if value <= limit else "red")
    console.print(table)
    text = "Differences are in units of what rounding does here, significance in standard errors."
    console.print(text)
    coverage = report["coverage"]
    touched = f"{100 * coverage['vocabulary']:.3g} % of the vocabulary"
    if coverage["experts"]:
        worst = min(coverage["experts"])
        touched += f" and {100 * worst:.3g} % of the experts of each layer"
    console.print(f"The prompts touched {touched}.")
    if report["drafts"]:
        drafts = DraftCheck(**report["drafts"])
        console.print("The answers took {} drafts; {} to {} are right.".format(drafts.drafts, *drafts.range))
    if report["computes"]:
        console.print(f"{report['deployment']} computes {report['checkpoint']}", style="green")
    else:
        verdict = f"{report['deployment']} does not compute {report['checkpoint']}"
        console.print(Text.assemble((verdict, "red"), f": {report['reason']}"))
    if report["looks_like"]:
        console.print(f"It looks like {report['looks_like']}")
    if report["not_checked"]:
        output.show_beside(console, Text("Not checked: ", "yellow"), report["not_checked"])


def _deviations(report: dict[str, Any]) -> Any:
    table = output.table("prompt", "tokens", "mean |Δ|", "max |Δ|", "KL", "same top-1", justify="right")
    rows = [(str(number), row) for number, row in enumerate(report["prompts"], 1)]
    rows += [("words", report["words"])] if report["words"] else []
    for title, row in [*rows, ("all", report["overall"])]:
        table.add_row(
            title,
            str(row["tokens"]),
            *(f"{row[key]:.2g}" for key in ("mean", "max", "divergence")),
            f"{100 * row['agreement']:.1f} %",
            style="bold" if title == "all" else "",
        )
    return table
