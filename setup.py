"""All but one thing is in pyproject.toml: on a package index, the README's links need the address of the repository."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "vllm_bailing" / "__init__.py").read_text(), re.MULTILINE)
ADDRESS = f"https://github.com/vllm-bailing/vllm-bailing/blob/v{VERSION[1]}"

setup(
    long_description=re.sub(r"\]\((?!\w+:|#)", f"]({ADDRESS}/", (ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
