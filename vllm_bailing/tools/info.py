"""Versions of what is installed, and what registering with vLLM decided."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

from vllm_bailing import __version__

PACKAGES = ("vllm", "torch", "transformers")


def collect_info() -> dict[str, str | list[str] | None]:
    """Versions of what is installed (None: not installed), the Python, and the decision of `register`.

    vLLM, where it is installed, is imported and logs to standard output.
    """
    facts: dict[str, str | list[str] | None] = {"vllm-bailing": __version__}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["python"] = sys.version.split()[0]
    if facts["vllm"] is None:
        return facts | {"active": [], "reason": "vllm is not installed", "warning": ""}
    from vllm_bailing.plugin import register

    decision = register.register()
    return facts | {"active": list(decision.active), "reason": decision.reason, "warning": decision.warning}
