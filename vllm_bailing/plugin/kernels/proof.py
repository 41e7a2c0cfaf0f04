"""Proofs: a kernel is used only after its results were compared with PyTorch's on the machine at hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def proof(attempt: Callable[..., str]) -> Callable[..., str]:
    """Decorator of a function that compares a kernel with PyTorch and returns what is wrong, "" if nothing is.

    What the kernel raises becomes the reason why it is not used. Outcomes are remembered for the same arguments.
    """

    @functools.lru_cache(maxsize=64)
    def problem(*shape: Any) -> str:
        try:
            return attempt(*shape)
        except (RuntimeError, TypeError, AttributeError) as error:
            return f"the kernel failed ({' '.join(str(error).split())[:120]})"

    return problem
