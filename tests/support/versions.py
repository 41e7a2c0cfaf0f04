"""What tests need of the installed vLLM."""

from importlib.metadata import version

import pytest
from packaging.version import Version

INSTALLED = Version(version("vllm"))


def since(release: str, what: str) -> pytest.MarkDecorator:
    """A mark that skips a test of `what` on releases before `release`, which is known to have it."""
    return pytest.mark.skipif(Version(release) > INSTALLED, reason=f"vLLM {INSTALLED} lacks {what}; {release} has it")


SHARED_EXPERTS = since("0.32", "experts on CPUs that heed which of them a rank holds")
PARTS_OF_EXPERTS = since("0.32", "experts on CPUs whose weights can be replaced in parts")
