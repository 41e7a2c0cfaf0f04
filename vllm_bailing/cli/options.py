"""Options that several commands share: each has one spelling, with its synonyms, and one help text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_bailing.errors import told
from vllm_bailing.json_files import parsed, read_text

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
HfOverrides = Annotated[
    str, typer.Option("--hf-overrides", metavar="JSON", help="As given to vLLM, such as the YaRN recipe.")
]
Engine = Annotated[str, typer.Option("--engine", metavar="JSON", help="Further arguments of vllm.LLM.")]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts", help="One user message a line, or JSONL with messages and kind; a few of ours if left out."
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option("--prompts", exists=True, dir_okay=False, help="One user message a line; a few of ours if left out."),
]
ServedModelName = Annotated[
    str | None, typer.Option("--served-model-name", help="The server's name of the model or adapter.")
]
DraftModel = Annotated[str | None, typer.Option("--draft-model", help="The checkpoint that has the MTP layer.")]
DraftTokens = Annotated[int, typer.Option("--draft-tokens", "--mtp", help="Draft tokens of the MTP layer per step.")]
DraftTokenCounts = Annotated[
    str, typer.Option("--draft-tokens", "--mtp", help="Draft tokens per step to compare; 0 is always among them.")
]
DraftVocab = Annotated[
    Path | None, typer.Option("--draft-vocab", exists=True, help="Result of `vllm-bailing draft-vocab`.")
]
Bandwidth = Annotated[
    float | None,
    typer.Option("--bandwidth", min=0.0, help="TB/s of the memory of each GPU or rank, if it is not a known GPU."),
]
BatchSizes = Annotated[str, typer.Option("--batch-size", help="Requests at once, each measured in turn.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="How often each is measured, alternating.")]
ReportName = Annotated[Path, typer.Option("--out", help="Where to write NAME.json and NAME.png.")]


def _checked_url(url: str | None) -> str | None:
    if url is None:
        return None
    from vllm_bailing.errors import ChatError
    from vllm_bailing.tools.chat import checked_url

    try:
        return checked_url(url.strip())
    except ChatError as error:
        raise typer.BadParameter(str(error)) from None


# These are optional in one command and have a default in another.
URL = typer.Option("--url", help="A running vLLM server, such as http://localhost:8000.", callback=_checked_url)
TENSOR_PARALLEL_SIZE = typer.Option(
    "--tensor-parallel-size", "--tp", "-tp", min=1, help="Ranks of tensor parallelism, as for vLLM."
)


def enable_expert_parallel(also: str = "") -> Any:
    """The option of that name; `also` ends its help text."""
    help_text = f"Whole experts on each rank, as for vLLM{also}."
    return typer.Option("--enable-expert-parallel", "--ep", "-ep", help=help_text)


def one_of(*values: str) -> Callable[[str], list[str]]:
    """For a shell that completes words: those of `values` that begin as what was typed."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]


def known_gpus(incomplete: str) -> list[str]:
    """As `one_of`, of the names that `plan --gpu` knows."""
    from vllm_bailing.planning.gpus import GPUS

    return one_of("auto", "cpu", *GPUS)(incomplete)


def dtype(values: str, *names: str) -> Any:
    """The option `--dtype`, which takes bf16 as well as bfloat16; commands translate it by `units`.

    Args:
        values: Help text: what the command takes.
        names: What a shell completes.
    """
    return typer.Option("--dtype", help=values, autocompletion=one_of(*names))


def json_object(flag: str, text: str) -> dict[str, Any]:
    """The value of `flag`.

    Raises:
        typer.BadParameter: If it is not a JSON object.
    """
    try:
        value = parsed(text)
    except ValueError as error:
        raise typer.BadParameter(f"{flag} {told(text)} is not a JSON object: it {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{flag} {told(text)} is not a JSON object, such as '{{\"key\": 1}}'")
    return value


def refuse_ignored(given: dict[str, Any], without: dict[str, tuple[str, ...]], by: dict[str, tuple[str, ...]]) -> None:
    """Refuse options that would be ignored.

    Args:
        given: Values by option, false for what is not given.
        without: By option, others that have no effect if it is not given.
        by: By option, others that have no effect if it is.
    Raises:
        typer.BadParameter: If there is one.
    """
    for first, others in by.items():
        if ignored := next((name for name in others if given[first] and given[name]), None):
            raise typer.BadParameter(f"{ignored} has no effect with {first}; leave one of the two out")
    for first, others in without.items():
        if ignored := next((name for name in others if not given[first] and given[name]), None):
            raise typer.BadParameter(f"{ignored} has no effect without {first}; leave it out, or add {first}")


def engine_arguments(text: str, flag: str = "--engine") -> dict[str, Any]:
    """The arguments of `vllm.LLM` that `flag` gives.

    Raises:
        typer.BadParameter: If it is not a JSON object, or vLLM has no such argument.
    """
    return checked_arguments(json_object(flag, text), flag)


def checked_arguments(arguments: dict[str, Any], flag: str) -> dict[str, Any]:
    """The same `arguments` of `vllm.LLM`.

    Raises:
        typer.BadParameter: If vLLM has no such argument.
    """
    from vllm_bailing.tools.task import check_arguments

    try:
        check_arguments(flag, arguments)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return arguments


def numbers(text: str, least: int = 1) -> list[int]:
    """The numbers of a list such as 1,2,4.

    Raises:
        typer.BadParameter: If it is anything else, or one is below `least`.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise typer.BadParameter(f"{text!r} is not a list of numbers from {least}, such as {least},{least + 1}")
    return found


def text_of(option: str, file: Path | None) -> str | None:
    """What a text file holds; None without a file.

    Raises:
        typer.BadParameter: If it cannot be read.
    """
    try:
        return file and read_text(file)
    except ValueError as error:
        raise typer.BadParameter(f"{option} {file} {error}; name a text file in UTF-8") from None


def lines_of(file: Path | None) -> list[str] | None:
    """The lines of a file of prompts that are not empty; None without a file.

    Raises:
        typer.BadParameter: If there are none, or it cannot be read.
    """
    if file is None:
        return None
    from vllm_bailing.tools.prompts import read_lines

    try:
        return [line for _, line in read_lines(file)]
    except ValueError as error:
        raise typer.BadParameter(f"--prompts {error}") from None
