"""`vllm-bailing demo-path` and `vllm-bailing chat-template`: where the files of this package are."""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_bailing import DEMO, DEMO_ADAPTER, TEMPLATES


def demo_path(
    adapter: Annotated[bool, typer.Option("--adapter", help="The folder of the demo's LoRA adapter instead.")] = False,
) -> None:
    """Print the folder of the demo checkpoint.

    For example for `vllm serve $(vllm-bailing demo-path)`.
    """
    folder, file = (DEMO_ADAPTER, "adapter_config.json") if adapter else (DEMO, "config.json")
    if not (folder / file).is_file():
        raise SystemExit(f"vllm-bailing: no demo checkpoint in {folder}; reinstall vllm-bailing")
    typer.echo(folder)


def _templates() -> list[str]:
    return sorted(template.stem for template in TEMPLATES.glob("*.jinja"))


def chat_template(
    name: Annotated[str, typer.Argument(help="Such as ring.", autocompletion=_templates)],
) -> None:
    """Print the path of a chat template of this package.

    For example: vllm serve inclusionAI/Ring-flash-2.0 --chat-template $(vllm-bailing chat-template ring)

    ring: for Ring 2.0 checkpoints that came with the base models' template, which knows neither tools nor thinking.
    """
    file = TEMPLATES / f"{name}.jinja"
    if not file.is_file():
        raise typer.BadParameter(f"no chat template {name!r}; there is {', '.join(_templates())}")
    typer.echo(file)
