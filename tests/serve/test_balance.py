"""`vllm-bailing balance --url` on a running server."""

from __future__ import annotations

from tests.support.commands import invoke
from vllm_bailing import DEMO


def test_a_server_that_returns_no_picks_is_refused(plain_server, tmp_path):
    """vLLM's CPU build cannot return any."""
    done = invoke("balance", DEMO, "--url", plain_server.url, "--max-tokens", 2, "--out", tmp_path / "x")
    assert done.exit_code == 2
    assert "returns no routed experts; start it with --enable-return-routed-experts" in done.stderr
    assert not list(tmp_path.iterdir())
