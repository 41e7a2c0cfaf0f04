"""`vllm-bailing draft-vocab`: the tokens that an MTP draft may propose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_bailing.cli import output


def draft_vocab(
    model: Annotated[str, typer.Argument(help="The model whose tokenizer is used: a folder or a hub name.")],
    text: Annotated[
        list[Path],
        typer.Option(help="Text like that which the model will write; repeatable.", exists=True, dir_okay=False),
    ],
    size: Annotated[int, typer.Option(help="How many tokens to keep, the most frequent ones.", min=1)] = 32768,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("draft_vocab.json"),
) -> None:
    """Choose the tokens that an MTP draft may propose.

    They are the most frequent ones of a text. Pass the file to vLLM by --additional-config '{"bailing_draft_vocab":
    "draft_vocab.json"}'. Answers stay what they are; a draft reads less and is accepted a little less often.
    """
    from vllm_bailing.tools.draft_vocab import choose_tokens, write_tokens

    output.require_others("draft-vocab", "--out", [out], text)
    if not out.parent.is_dir():  # before the text is read, which may take long
        raise output.fail("draft-vocab", f"--out {out}: there is no folder {out.parent}; make it first", 2)
    try:
        chosen = choose_tokens(model, text, size)
        write_tokens(out, chosen.token_ids)
    except (ValueError, OSError) as error:
        raise output.fail("draft-vocab", error, 2) from None
    if size > chosen.vocabulary:
        typer.echo(
            f"--size {size} is more than the model's {chosen.vocabulary} tokens: all of the text's are kept", err=True
        )
    typer.echo(
        f"{out}: {len(chosen.token_ids)} of {chosen.vocabulary} tokens, {100 * chosen.coverage:.2f} % of the text"
    )
