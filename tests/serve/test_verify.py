"""`vllm-bailing verify` against a server."""

from __future__ import annotations

import json

import pytest

from tests.support.checkpoints import changed_demo, with_two_experts_swapped
from tests.support.commands import invoke, run_command
from vllm_bailing import DEMO
from vllm_bailing.tools import verify


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_server_is_verified(dtype, request, tmp_path):
    server = request.getfixturevalue({"float32": "plain_server", "bfloat16": "bf16_server"}[dtype])
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = invoke("verify", DEMO, "--url", server.url, "--dtype", dtype, "--json", **cache)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["computes"] and len(report["prompts"]) == len(verify.DEFAULT_PROMPTS)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    # A checkpoint that is not the server's
    other = changed_demo(tmp_path / "other", with_two_experts_swapped)
    done = run_command("verify", other, "--url", f"{server.url}/v1", "--dtype", dtype, cache=tmp_path / "cache")
    assert done.returncode == 1 and f"does not compute {other}" in done.stdout, done.stdout + done.stderr
    assert "\033" not in done.stdout
