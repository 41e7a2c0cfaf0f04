"""`vllm-bailing quantize`: a checkpoint with quantized linear layers."""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from vllm_bailing.cli import output
from vllm_bailing.tools.quantize import Scheme


def quantize(
    model: Annotated[str, typer.Argument(help="A bf16 checkpoint: a folder, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(help="Folder for the quantized checkpoint.")],
    scheme: Annotated[Scheme, typer.Option(help="fp8, fp8-block, w8a8 (int8) or w4a16 (int4 weights).")] = Scheme.fp8,
    group_size: Annotated[int, typer.Option(min=1, help="Inputs that share a scale, for w4a16.")] = 128,
    keep: Annotated[
        list[str] | None, typer.Option(help="Modules to leave alone, a name or re:PATTERN; repeatable.")
    ] = None,
    head: Annotated[
        Scheme | None, typer.Option(help="Quantize the head too, in this scheme: fp8, w8a8 or w4a16.")
    ] = None,
) -> None:
    """Quantize the linear layers of MODEL into OUT.

    One file at a time, without calibration data. Attention, dense and shared MLPs and experts are quantized, those of
    MTP layers too, and with --head the head; router, embeddings, norms and eh_proj stay as they are. The result is in
    the compressed-tensors format, which vLLM reads. Needs no GPU, and memory for the largest file of the checkpoint,
    twice. Exit code 2: it could not be quantized.
    """
    from vllm_bailing.errors import QuantizeError
    from vllm_bailing.tools.quantize import quantize
    from vllm_bailing.units import GIB

    try:
        size, is_draft = quantize(model, out, scheme, group_size, keep or [], head)
    except QuantizeError as error:
        raise output.fail("quantize", error, 2) from None
    except OSError as error:
        is_read = error.errno == errno.EACCES and Path(error.filename or "").is_relative_to(model)
        file, remedy = (error.filename, "make it readable") if is_read else (out, "name another folder")
        raise output.fail("quantize", f"{file}: {error.strerror or error}; {remedy}", 2) from None
    except KeyboardInterrupt:
        raise output.interrupted("quantize", f"what it wrote to {out} is removed") from None
    speculation = json.dumps({"method": "mtp", "model": str(out), "num_speculative_tokens": 1})
    way = f"`--speculative-config '{speculation}'`" if is_draft else f"`vllm serve {shlex.quote(str(out))}`"
    typer.echo(f"{out}: {size / GIB:.3f} GiB; serve it with {way}", err=True)
