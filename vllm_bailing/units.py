"""Units, and the two spellings of a data type: "bfloat16" as in config.json and torch, "bf16" for short."""

from __future__ import annotations

from typing import Any

GIB = 2**30
# Short name of each plain data type -> its full name.
PLAIN_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def full_dtype(name: str) -> str:
    """ "bfloat16" for "bf16" or "bfloat16"; what is not the name of a plain data type comes back as it is."""
    return PLAIN_DTYPES.get(name, name)


def short_dtype(name: str) -> str:
    """ "bf16" for "bfloat16" or "bf16"; what is not the name of a plain data type comes back as it is."""
    return next((short for short, full in PLAIN_DTYPES.items() if full == name), name)


def dtype_name(dtype: Any) -> str:
    """Full name of a `torch.dtype`, or of what a config.json says."""
    return full_dtype(str(dtype).removeprefix("torch."))
