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

_LOGGER = "vllm.plugins.bailing"
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

    # A child of vLLM's logger, whose level and format its users have set up.
    logger = init_logger(_LOGGER)
    decided = decide(vllm_version)
    takeover = Takeover()
    takeover.take("transformers.configuration_utils", _adopt_config_files)
    takeover.take("transformers.models.auto.configuration_auto", _name_the_configuration)
    if decided.active:
        from vllm_bailing.plugin import excepthook

        excepthook.shorten_in_vllm_command()
        classes = {name: ARCHITECTURES[name] for name in decided.active}
        takeover.take(
            "vllm.model_executor.models.registry", functools.partial(_name_the_classes, classes | DRAFT_ARCHITECTURES)
        )
        takeover.take("vllm.config.speculative", _know_drafts)
        takeover.take("vllm.model_executor.models.config", _check_configurations)
    else:
        takeover.take("vllm.model_executor.models.bailing_moe", _compare_ranks)
    register_extensions()
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


class Takeover:
    """What this package changes in a process: each part as soon as the module that it concerns is there, all or none.

    Importing those modules costs seconds and 100 MB, so processes of other models that do without are spared. If a part
    fails, those before it are taken back: half of them would give vLLM's own class a configuration that it misreads.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._is_over = False

    def take(self, module: str, part: Callable[[Any], Callable[[], object]]) -> None:
        """Call `part` with the module of that name, now or when it is imported; it returns what takes it back.

        Raises:
            Exception: What `part` raises now; later ones end in a warning.
        """
        if module in sys.modules:
            try:
                self._undo.append(part(sys.modules[module]))
            except BaseException:
                self._take_back()
                raise
        else:
            sys.meta_path.insert(0, WhenImported(module, functools.partial(self._take_later, part)))

    def _take_later(self, part: Callable[[Any], Callable[[], object]], module: Any) -> None:
        if self._is_over:
            return
        try:
            self._undo.append(part(module))
        except (Exception, SystemExit) as error:
            self._take_back()
            logging.getLogger(_LOGGER).warning(
                "vllm-bailing %s could not register with %s (%s: %s); vLLM continues with its own classes",
                __version__,
                module.__name__,
                type(error).__name__,
                error,
            )

    def _take_back(self) -> None:
        self._is_over = True
        while self._undo:
            self._undo.pop()()


def _adopt_config_files(_module: Any) -> Callable[[], object]:
    from vllm_bailing import config

    return config.adopt_config_files()


def _name_the_configuration(_module: Any) -> Callable[[], object]:
    from vllm_bailing import config

    return config.name_the_configuration()


def _name_the_classes(classes: dict[str, str], module: Any) -> Callable[[], object]:
    known = module.ModelRegistry.models
    before = {name: known.get(name) for name in classes}

    def undo() -> None:
        for name, entry in before.items():
            known.pop(name, None)
            if entry is not None:
                known[name] = entry

    try:
        for name, where in classes.items():
            module.ModelRegistry.register_model(name, where)
    except BaseException:
        undo()
        raise
    return undo


def _know_drafts(module: Any) -> Callable[[], object]:
    from vllm_bailing.plugin import patches

    try:
        return patches.know_drafts(module.SpeculativeConfig)
    except (AttributeError, KeyError) as error:  # a newer vLLM may serve the model all the same
        reason = "no MTP drafts on this vLLM, whose settings differ from the checked ones"
        logging.getLogger(_LOGGER).warning("vllm-bailing %s: %s: %s", __version__, reason, error)
        return lambda: None


def _check_configurations(module: Any) -> Callable[[], object]:
    from vllm_bailing.plugin import patches

    return patches.check_configurations(module.MODELS_CONFIG_MAP, module.VerifyAndUpdateConfig, _settle_engine_config)


def _compare_ranks(module: Any) -> Callable[[], object]:
    from vllm_bailing.plugin import patches

    model_class = getattr(module, "BailingMoeV2ForCausalLM", None)
    return patches.compare_ranks_first(model_class) if model_class else lambda: None


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
    A server can do without, so a failure is a warning.
    """
    for module, register_with in (
        ("vllm.reasoning", functools.partial(_register_parser, "ReasoningParserManager", "BailingReasoningParser")),
        ("vllm.tool_parsers", functools.partial(_register_parser, "ToolParserManager", "BailingToolParser")),
        ("vllm.tokenizers.registry", _register_tokenizers),
        ("vllm.renderers.registry", _register_renderers),
    ):
        finder = WhenImported(module, functools.partial(_register_or_warn, register_with))
        if module in sys.modules:
            finder.register(sys.modules[module])
        else:
            sys.meta_path.insert(0, finder)


def _register_or_warn(register_with: Callable[[Any], None], module: Any) -> None:
    try:
        register_with(module)
    except Exception as error:
        logging.getLogger(_LOGGER).warning(
            "vllm-bailing %s: not all of the parsers named %r and the tokenizer modes %s are there: %s: %s",
            __version__,
            PARSER,
            ", ".join(TOKENIZER_MODES),
            type(error).__name__,
            error,
        )


def _register_parser(manager: str, parser: str, module: Any) -> None:
    getattr(module, manager).register_lazy_module(PARSER, "vllm_bailing.parsers", parser)


def _register_tokenizers(module: Any) -> None:
    for mode, name in TOKENIZER_MODES.items():
        module.TokenizerRegistry.register(mode, "vllm_bailing.control_tokens", name)


def _register_renderers(module: Any) -> None:
    for mode in TOKENIZER_MODES:
        module.RENDERER_REGISTRY.register(mode, "vllm.renderers.hf", "HfRenderer")


class WhenImported(importlib.abc.MetaPathFinder):
    """Calls `register`, which must not raise, with a module when it is imported; finds nothing itself."""

    def __init__(self, module: str, register: Callable[[Any], object]) -> None:
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
                self.register(module)

            spec.loader.exec_module = exec_module
        return spec
