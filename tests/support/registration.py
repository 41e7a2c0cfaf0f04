"""Loading plugins in a process, as vLLM does at start."""

import logging
import os

LOGGER = "vllm.plugins.bailing"


def load_plugins(plugins: str | None) -> list[tuple[str, str]]:
    """Load plugins as vLLM does at start, with `VLLM_PLUGINS` set to `plugins`; returns what this one logged."""
    from vllm.plugins import load_general_plugins

    os.environ.pop("VLLM_PLUGINS", None)
    if plugins is not None:
        os.environ["VLLM_PLUGINS"] = plugins
    lines: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    logging.getLogger(LOGGER).addHandler(handler)
    load_general_plugins()
    return lines
