"""`vllm-bailing report`: a page with what was measured of a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_bailing.cli import options, output


def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Results of plan, verify, doctor, balance and info with --json, and of bench.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Also check this checkpoint: a folder or a hub name.")
    ] = None,
    url: Annotated[str | None, options.URL] = None,
    served_model_name: options.ServedModelName = None,
    title: Annotated[str | None, typer.Option("--title", help="Of the page; names the model if left out.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("report.html"),
) -> None:
    """Make a page of HTML of what was measured of a deployment.

    It is one file, to look at and to hand on. The page needs no network and runs no scripts. With --url, a plan among
    FILES is held against what the server reports. Exit code 2: a file or the server is not what it should be.
    """
    from vllm_bailing.errors import ReportError
    from vllm_bailing.folders import nowhere
    from vllm_bailing.json_files import write_text
    from vllm_bailing.report import inputs, live, page
    from vllm_bailing.tools import doctor

    options.refuse_ignored(
        {"--url": url, "--served-model-name": served_model_name}, {"--url": ("--served-model-name",)}, {}
    )
    if not (files or model or url):
        raise typer.BadParameter("nothing to report on: name files with results, --model or --url")
    output.require_others("report", "--out", [out], files or [])
    if model and (reason := nowhere(model)):
        raise output.fail("report", f"--model {reason}", 2)
    try:
        results = [inputs.read_result(file) for file in files or []]
        with output.working("looking at what is there"), output.output_aside():
            server = live.ask(url, served_model_name) if url else None
            checks = list(doctor.checkpoint(model)) if model else []
        text = page.make(results, server, model, checks, title)
        write_text(out, text, errors="replace")
    except ReportError as error:
        raise output.fail("report", error, 2) from None
    except OSError as error:
        raise output.fail("report", f"--out {out}: {error.strerror}; name another file", 2) from None
    output.show_files([out])
