"""`vllm-bailing draft-vocab`: the tokens that an MTP draft may propose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
    from vllm_bailing.tools.draft_vocab import choose_tokens, write_tokens

    chosen = choose_tokens(model, text, size)
    write_tokens(out, chosen)
    typer.echo(
        f"{out}: {len(chosen.token_ids)} of {chosen.vocabulary} tokens, {100 * chosen.coverage:.2f} % of the text"
    )
