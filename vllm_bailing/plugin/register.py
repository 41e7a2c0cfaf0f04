"""Registration with vLLM: what this package takes over in a process, said in one line of the log."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vllm_bailing import __version__
from vllm_bailing.plugin.supported_versions import (
    ARCHITECTURES,
    DRAFT_ARCHITECTURES,
    PARSER,
    TOKENIZER_MODES,
    USE_INTREE,
    Decision,
    decide,
    wants_intree,
)

_decision: Decision | None = None
_lock = threading.RLock()


def register() -> Decision:
    """Register the configuration and, where this vLLM allows it, the model classes.

    Returns:
        What was decided in this process; a second call does nothing else.
    """
    global _decision
    with _lock:
        if _decision is None:
            _decision = _register()
    return _decision


def _register() -> Decision:
    from vllm.logger import init_logger
    from vllm.version import __version__ as vllm_version  # pyright: ignore[reportPrivateImportUsage]

    from vllm_bailing.config import register_with_transformers

    # A child of vLLM's logger, whose level and format its users have set up.
    logger = init_logger("vllm.plugins.bailing")
    decided = decide(vllm_version)
    register_with_transformers()
    if decided.active:
        from vllm import ModelRegistry

        from vllm_bailing.plugin import excepthook, patches

        excepthook.shorten_in_vllm_command()
        for architecture in decided.active:
            ModelRegistry.register_model(architecture, ARCHITECTURES[architecture])
        try:
            patches.patch_configuration(_settle_engine_config)
            for architecture, where in DRAFT_ARCHITECTURES.items():
                ModelRegistry.register_model(architecture, where)
        except (ImportError, AttributeError) as error:
            decided.warning = f"no MTP drafts on this vLLM, whose settings differ from the checked ones: {error}"
    try:
        register_extensions()
    except Exception as error:  # a server can do without
        decided.warning = decided.warning or (
            f"not all of the parsers named {PARSER!r} and the tokenizer modes {', '.join(TOKENIZER_MODES)} are there: "
            f"{type(error).__name__}: {error}"
        )
    with _visible(logger):
        if decided.active:
            logger.info(
                "vllm-bailing %s replaces vLLM %s's %s (set %s=1 to keep vLLM's own)",
                __version__,
                vllm_version,
                ", ".join(decided.active),
                USE_INTREE,
            )
        else:
            logger.log(
                logging.INFO if wants_intree() else logging.WARNING,
                "vllm-bailing %s leaves vLLM %s's own model class in place: %s",
                __version__,
                vllm_version,
                decided.reason,
            )
        if decided.warning:
            logger.warning("vllm-bailing %s: %s", __version__, decided.warning)
    return decided


def _settle_engine_config(vllm_config: Any) -> None:
    # Not imported before: processes of other models do without.
    from vllm_bailing.plugin.checks import settle_engine_config

    settle_engine_config(vllm_config)


@contextlib.contextmanager
def _visible(logger: logging.Logger) -> Iterator[None]:
    """Let `logger` print what vLLM's logging settings allow, also before vLLM has applied them.

    Differs:  vLLM sets up logging after it has loaded the plugins, so that their INFO lines go nowhere; older ones did
              it on import.
    Upstream: `configure_logging_if_needed`, first seen in 0.32.
    Remove:   when plugins are loaded after it.
    """
    from vllm import envs

    if logging.getLogger("vllm").handlers or not envs.VLLM_CONFIGURE_LOGGING:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    before = logger.level, logger.propagate
    logger.setLevel(envs.VLLM_LOGGING_LEVEL)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def register_extensions() -> None:
    """Make the parsers and tokenizers of this package known by name, as soon as vLLM's registries are imported.

    `--reasoning-parser bailing`, `--tool-call-parser bailing`, `--tokenizer-mode bailing_split` and `bailing_refuse`.
    Importing vLLM's tool parsers takes seconds, so processes that do without them, the workers, are spared.
    """
    for module, register_with in (
        ("vllm.reasoning", functools.partial(_register_parser, "ReasoningParserManager", "BailingReasoningParser")),
        ("vllm.tool_parsers", functools.partial(_register_parser, "ToolParserManager", "BailingToolParser")),
        ("vllm.tokenizers.registry", _register_tokenizers),
        ("vllm.renderers.registry", _register_renderers),
    ):
        finder = WhenImported(module, register_with)
        if module in sys.modules:
            finder.register(sys.modules[module])
        else:
            sys.meta_path.insert(0, finder)


def _register_parser(manager: str, parser: str, module: Any) -> None:
    getattr(module, manager).register_lazy_module(PARSER, "vllm_bailing.parsers", parser)


def _register_tokenizers(module: Any) -> None:
    for mode, name in TOKENIZER_MODES.items():
        module.TokenizerRegistry.register(mode, "vllm_bailing.control_tokens", name)


def _register_renderers(module: Any) -> None:
    for mode in TOKENIZER_MODES:
        module.RENDERER_REGISTRY.register(mode, "vllm.renderers.hf", "HfRenderer")


class WhenImported(importlib.abc.MetaPathFinder):
    """Calls `register` with one of vLLM's modules when it is imported; finds nothing itself."""

    def __init__(self, module: str, register: Callable[[Any], None]) -> None:
        self.module, self.register = module, register

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        """What the other finders find for the module, with the registration after its execution."""
        if fullname != self.module:
            return None
        finders = (finder for finder in sys.meta_path if not isinstance(finder, WhenImported))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                with contextlib.suppress(AttributeError, TypeError):  # vLLM itself must go on
                    self.register(module)

            spec.loader.exec_module = exec_module
        return spec
