"""The command `vllm-bailing`: what belongs to it; each command has a file here for its options and its output.

The work behind it is in `tools/`, or in a room of its own (`planning/`, `bench/`, `tuning/`, `balance/`, `report/`).

Heavy packages are imported inside the command that needs them, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vllm_bailing import __version__
from vllm_bailing.cli import (
    balance,
    bench,
    chat,
    demo,
    doctor,
    draft_vocab,
    info,
    output,
    paths,
    plan,
    quantize,
    report,
    train_mtp,
    tune,
    verify,
)
from vllm_bailing.errors import LET_READ, unreadable
from vllm_bailing.folders import is_closed


class Commands(TyperGroup):
    """All commands end in the same way where something else ends them; typer tells of neither."""

    def make_context(self, *args: Any, **extra: Any) -> Any:  # prints --help
        with output.orderly_end(str):
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with output.orderly_end(lambda: ctx.invoked_subcommand or ""):
            return super().invoke(ctx)


class Command(TyperCommand):
    """Takes no empty argument: it comes of a variable that is not set, and would name the folder at hand.

    Nor one that names a folder which may not be read; that is for `doctor` to tell.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for number, argument in enumerate(args):
            option = argument.partition("=")[0]
            if not argument or (option.startswith("--") and argument == f"{option}="):
                after = f" after {args[number - 1]}" if number and not argument else ""
                name = argument or f"an argument{after}"
                raise typer.BadParameter(f"{name} is empty; is a variable not set?")
            if self.name != "doctor" and is_closed(argument):
                raise typer.BadParameter(f"{argument} cannot be read: Permission denied; {LET_READ}")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="vllm-bailing",
    cls=Commands,
    help="BailingMoeV2 (Ling 2.0, Ring 2.0, Ling-1T) for vLLM.",
    no_args_is_help=True,
    rich_markup_mode=None,  # its boxes leave the texts a strip of 20 columns, and cut off the names of options
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(help="Measure what an option gains on this machine.", no_args_is_help=True)


def _print_version(is_given: bool) -> None:
    if is_given:
        typer.echo(f"vllm-bailing {__version__}")
        raise typer.Exit


@app.callback()
def _common_options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command(cls=demo.DemoCommand)(demo.demo)
app.command(cls=Command)(paths.demo_path)
app.command(cls=Command)(paths.chat_template)
app.command(cls=Command)(info.info)
app.command(cls=Command)(doctor.doctor)
app.command(cls=Command)(plan.plan)
app.command(cls=Command)(draft_vocab.draft_vocab)
app.command(cls=Command)(quantize.quantize)
app.command(cls=Command)(train_mtp.train_mtp)
app.command(cls=Command)(verify.verify)
app.command(cls=Command)(report.report)
app.command()(chat.chat)
app.command(cls=Command)(tune.tune)
app.command(cls=Command)(balance.balance)
app.add_typer(bench_app, name="bench")
bench_app.command("mtp", cls=Command)(bench.bench_mtp)
bench_app.command("compare", cls=Command)(bench.bench_compare)


def main() -> None:
    """Entry point of the console script.

    Exit code 1 is a verdict of `verify`, `plan` and `doctor`, so what goes wrong in this program itself is 2.
    """
    output.leave_on(signal.SIGTERM, signal.SIGHUP)
    try:
        app()
    except PermissionError as error:
        print(f"vllm-bailing: {unreadable(error)}", file=sys.stderr)
        sys.exit(2)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(2)
