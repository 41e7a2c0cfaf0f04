"""BailingMoeV2 (Ling 2.0, Ring 2.0, Ling-1T) for vLLM, as a plugin.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process that it starts,
sometimes more than once and also for other models. Importing this package therefore imports nothing but the standard
library.
"""

from pathlib import Path

__version__ = "0.1.0"

ASSETS = Path(__file__).parent / "assets"
DEMO = ASSETS / "demo"  # the demo checkpoint
DEMO_ADAPTER = ASSETS / "demo-adapter"  # a LoRA adapter for it
TEMPLATES = ASSETS / "templates"  # chat templates
TABLES = ASSETS / "tables"  # tile sizes of vLLM's fused experts, made by `vllm-bailing tune`; missing if there are none


def register() -> None:
    """Make vLLM use this package for the BailingMoeV2 architecture. Never raises; safe to call again."""
    try:
        from vllm_bailing.plugin.register import register

        register()
    # vLLM does not catch this: it would end every `vllm` command, for any model.
    except (Exception, SystemExit) as error:
        import logging

        logging.getLogger("vllm.plugins.bailing").warning(
            "vllm-bailing %s could not register (%s: %s); vLLM continues with its own classes",
            __version__,
            type(error).__name__,
            error,
        )
