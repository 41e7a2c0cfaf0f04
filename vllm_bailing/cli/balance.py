"""`vllm-bailing balance`: which experts a model picks, and how even that keeps expert-parallel ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_bailing.cli import options, output

if TYPE_CHECKING:
    from vllm_bailing.balance.trace import Trace
    from vllm_bailing.config import BailingMoeV2Config

_SIZES = (2, 4, 8, 16)
_MOST_LAYERS = 12  # in a terminal; the JSON has all
_BLOCKS = "▁▂▃▄▅▆▇█"


def balance(
    model: Annotated[str, typer.Argument(help="The checkpoint: a folder or a hub name; config.json does for --trace.")],
    prompts: options.PromptFile = None,
    max_tokens: Annotated[int, typer.Option(help="Limit of an answer, whose picks count too.", min=1)] = 64,
    url: Annotated[str | None, options.URL] = None,
    served_model_name: options.ServedModelName = None,
    trace: Annotated[Path | None, typer.Option(help="Take the picks that an earlier run left here.")] = None,
    ep: Annotated[str | None, typer.Option("--ep", help="Numbers of expert-parallel ranks; else 2 to 16.")] = None,
    gpus: Annotated[int, typer.Option(help="GPUs in each node.", min=1)] = 8,
    step_tokens: Annotated[int, typer.Option(help="Tokens of all ranks in a step.", min=1)] = 256,
    engine: options.Engine = "{}",
    out: Annotated[Path, typer.Option(help="Where to write NAME.npz, NAME.json and NAME.png.")] = Path("balance"),
    as_json: options.AsJson = False,
) -> None:
    """Which experts does this model pick, and how evenly?

    Records the picks for prompts and greedy answers, here or from a server with --enable-return-routed-experts, and
    plays them against placements of the experts: in their order, and as vLLM's own load balancing (EPLB) places them.
    Other prompts than yours pick other experts. Nothing is timed.
    """
    from vllm_bailing.balance import report, simulate
    from vllm_bailing.bench.report import write_report
    from vllm_bailing.config import read_config
    from vllm_bailing.errors import BalanceError, CheckpointError

    sizes = None if ep is None else options.numbers(ep, least=2)
    arguments = options.engine_arguments(engine)
    given = {"--trace": trace, "--url": url, "--prompts": prompts, "--engine": arguments}
    given["--served-model-name"] = served_model_name
    by = {"--trace": ("--url", "--prompts", "--engine"), "--url": ("--engine",)}
    options.refuse_ignored(given, {"--url": ("--served-model-name",)}, by)
    stem = out.with_name(out.name.removesuffix(".npz").removesuffix(".json").removesuffix(".png"))
    files = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".png", *([] if trace else [".npz"]))]
    output.require_others("balance", "--out", files, [trace, prompts])
    output.require_place("balance", "--out", stem)  # before an engine runs, which may take long
    try:
        config = read_config(model)
        sizes = sizes or [size for size in _SIZES if config.num_experts % size == 0]
        simulate.check_sizes(config, sizes)
        with output.output_aside():
            recorded, written = _picks(
                model, config, prompts, max_tokens, url, served_model_name, trace, arguments, stem
            )
            found = simulate.simulate(recorded, config, sizes, step_tokens, gpus)
        measured = report.balance_report(recorded, found, step_tokens)
        written += write_report(measured, stem, report.plot_balance)
    except (BalanceError, CheckpointError, ValueError, OSError) as error:
        raise output.fail("balance", error, 2) from None
    if as_json:
        typer.echo(json.dumps(measured))
        return
    show_load(measured)
    show_ranks(measured)
    output.show_files(written)


def _picks(
    model: str,
    config: BailingMoeV2Config,
    prompts: Path | None,
    max_tokens: int,
    url: str | None,
    served_model_name: str | None,
    trace: Path | None,
    engine: dict[str, Any],
    out: Path,
) -> tuple[Trace, list[Path]]:
    """The picks, from a file or recorded now, and the file that they were written to if they were."""
    from rich.progress import Progress

    from vllm_bailing.balance import recording
    from vllm_bailing.balance.trace import read_trace, shape_of
    from vllm_bailing.bench.mtp import DEFAULT_PROMPTS
    from vllm_bailing.tools.prompts import Prompt, read_prompts

    if trace is not None:
        return read_trace(trace, config), []
    shape_of(config)
    asked = (
        read_prompts(prompts) if prompts else [Prompt([{"role": "user", "content": text}]) for text in DEFAULT_PROMPTS]
    )
    file = out.with_name(f"{out.name}.npz")
    if url is None:
        with output.working("recording: vLLM starts, answers, and reads the answers again"):
            recording.record_apart(model, asked, max_tokens, engine, file)
        return read_trace(file, config), [file]
    console = output.console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("prompts", total=len(asked))

        def advance(done: int) -> None:
            progress.update(task, completed=done)

        recorded = recording.from_server(url, served_model_name, model, config, asked, max_tokens, advance)
    recorded.save(file)
    return recorded, [file]


def show_load(report: dict[str, Any]) -> None:
    """How uneven each layer's experts are."""
    rows = sorted(report["load"], key=lambda row: -row["most"])[:_MOST_LAYERS]
    table = output.table("layer", "busiest", "least", "never", "experts, least picked first")
    for row in sorted(rows, key=lambda row: row["layer"]):
        busiest = f"{row['most']:.2f} (expert {row['busiest']})"
        table.add_row(str(row["layer"]), busiest, f"{row['least']:.2f}", str(row["never"]), _histogram(row["picks"]))
    console = output.console()
    console.print(
        f"{report['model']}: {report['tokens']} tokens of {report['requests']} requests, "
        f"{report['experts_per_token']} of {report['experts']} experts for each",
    )
    console.print(table)
    more = len(report["load"]) - len(rows)
    left_out = f"; {more} layers that are more even are left out" if more else ""
    console.print(f"picks of the busiest and the least picked expert, times an even share{left_out}")


def _histogram(picks: list[int], width: int = 24) -> str:
    """A bar for each expert, or for each group of as many, the highest being the most picked."""
    ordered = sorted(picks)
    each = -(-len(ordered) // width)
    bars = [max(ordered[start : start + each]) for start in range(0, len(ordered), each)]
    return "".join(_BLOCKS[round((len(_BLOCKS) - 1) * bar / max(1, bars[-1]))] for bar in bars)


def show_ranks(report: dict[str, Any]) -> None:
    """What the busiest rank has to do, by placement, and what copies are worth having."""
    table = output.table("EP", "in order", "round robin", "EPLB", "+ copies", "chance", "waiting", "GiB")
    for row in report["ranks"]:
        worth = row["worth"]
        copies = f"{worth['imbalance']:.2f}, {worth['redundant']}" if worth["redundant"] else "none"
        table.add_row(
            str(row["ep"]),
            *(f"{row[key]:.2f}" for key in ("linear", "round_robin")),
            f"{row['eplb'][0]['imbalance']:.2f}",
            copies,
            f"{row['even']:.2f}",
            f"{100 * row['waiting']:.0f} -> {100 * row['waiting_with_eplb']:.0f} %",
            output.gib(worth["bytes"]),
        )
    console = output.console()
    console.print()
    console.print(table)
    console.print(
        f"busiest rank, times an even share, in steps of {report['step_tokens']} tokens\n"
        "+ copies: of as many experts as are worth having in each layer, and GiB that they take of each GPU\n"
        "chance: a router without preferences\n"
        "waiting: of the average rank in expert layers, in order and with EPLB and these copies"
    )
