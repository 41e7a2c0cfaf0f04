"""Servers that the tests of this room share: each is started when a test first asks for it, serves all the others,
and ends with the last of them.

They stay on one process of pytest-xdist, see tests/conftest.py.
"""

from __future__ import annotations

import json

import pytest

from tests.support.paths import ROOT
from tests.support.server import serving
from vllm_bailing import DEMO_ADAPTER

PARSERS = ("--enable-auto-tool-choice", "--tool-call-parser", "bailing", "--reasoning-parser", "bailing")
MTP = json.dumps({"method": "mtp", "num_speculative_tokens": 2})
UPDATES = ("--worker-extension-cls", "tests.support.weight_files.Extension")
UPDATES += ("--weight-transfer-config", json.dumps({"backend": "files"}))
IN_REASONING = json.dumps({"enable_in_reasoning": True})


@pytest.fixture(scope="package")
def plain_server(tmp_path_factory):
    """In fp32, with nothing else but vLLM's endpoints for trainers."""
    log = tmp_path_factory.mktemp("plain") / "log"
    with serving(log, *UPDATES, VLLM_SERVER_DEV_MODE="1", PYTHONPATH=str(ROOT)) as server:
        server.draft_tokens = 0
        yield server


@pytest.fixture(scope="package")
def mtp_server(tmp_path_factory):
    """With two draft tokens."""
    with serving(tmp_path_factory.mktemp("mtp") / "log", "--speculative-config", MTP) as server:
        server.draft_tokens = 2
        yield server


@pytest.fixture(params=["plain", "mtp"])
def server(request):
    """Either of the two."""
    return request.getfixturevalue(f"{request.param}_server")


@pytest.fixture(scope="package")
def assistant_server(tmp_path_factory):
    """With both parsers, and the demo's adapter as `sailor`."""
    adapters = ("--enable-lora", "--max-loras", "2", "--lora-modules", f"sailor={DEMO_ADAPTER}")
    log = tmp_path_factory.mktemp("assistant") / "log"
    with serving(log, *PARSERS, *adapters, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
        yield server


@pytest.fixture(scope="package")
def bf16_server(tmp_path_factory):
    """In bf16, with both parsers and grammars that hold in the reasoning too."""
    log = tmp_path_factory.mktemp("bf16") / "log"
    with serving(log, "--dtype", "bfloat16", *PARSERS, "--structured-outputs-config", IN_REASONING) as server:
        yield server
