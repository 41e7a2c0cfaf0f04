"""`vllm-bailing doctor --url` on running servers."""

from __future__ import annotations

import os
import re
import signal

import httpx
import pytest

from tests.support.server import posted
from vllm_bailing import __version__
from vllm_bailing.tools.doctor_server import server as checks_of
from vllm_bailing.tools.metrics import draft_source, samples


def checked(server, **options):
    return {check.name: check for check in checks_of(server.url, **options)}


def test_a_server_is_known(server):
    found = checked(server)
    assert found["plugin"].detail == f"vllm-bailing {__version__}" and found["plugin"].ok
    assert found["server"].ok and ", vLLM 0." in found["server"].detail
    assert found["model"].detail == "demo, window of 1024 tokens"
    assert found["tool calls"].ok is None and "--tool-call-parser bailing" in found["tool calls"].detail
    assert found["a token"].ok and not [check for check in found.values() if check.ok is False]


def test_drafts_are_counted(mtp_server):
    text = httpx.get(f"{mtp_server.url}/metrics").text
    assert draft_source(samples(text)) == "mtp" and f'version="{__version__}"' in text
    posted(mtp_server, "/v1/completions", prompt="Who are you?", max_tokens=16)
    drafts = checked(mtp_server)["drafts"]
    assert drafts.ok and "draft tokens were accepted" in drafts.detail


def test_parsers_are_seen(assistant_server):
    assert checked(assistant_server)["tool calls"].ok


@pytest.mark.parametrize("part", ["EngineCore", "APIServer"])
def test_one_that_stands_still_is_noticed(part, plain_server):
    """As with a peer that died: the engine takes requests, and never answers."""
    pid = int(re.search(rf"\({part} pid=(\d+)\)", plain_server.log.read_text())[1])
    os.kill(pid, signal.SIGSTOP)
    try:
        (*others, last) = checks_of(plain_server.url, seconds=2)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert last.ok is False and "no answer within 2 s" in last.detail
    assert all(check.ok is not False for check in others)
    assert checked(plain_server)["a token"].ok
