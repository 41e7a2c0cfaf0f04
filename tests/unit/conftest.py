"""What unit tests share."""

import pytest

from vllm_bailing.config import register_with_transformers


@pytest.fixture(scope="session")
def registered():
    """The configuration class, known to transformers."""
    register_with_transformers()
