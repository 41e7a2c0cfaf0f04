"""A plan held against a running server."""

from __future__ import annotations

import json
import re

from tests.support.commands import invoke
from tests.support.server import posted
from vllm_bailing import DEMO


def test_a_report_has_what_the_server_says_beside_the_plan(mtp_server, tmp_path):
    posted(mtp_server, "/v1/completions", prompt="Who are you?", max_tokens=16)
    described = ("--gpu", "any", "--memory-gib", 4, "--bandwidth", 0.02)
    planned = invoke("plan", DEMO, *described, "--context", 1024, "--concurrency", 2, "--mtp", 2, "--json")
    (tmp_path / "plan.json").write_text(planned.stdout)
    done = invoke("report", tmp_path / "plan.json", "--url", mtp_server.url, "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    found = {row[0]: row[1:3] for row in rows if row and row[0]}
    plan = json.loads(planned.stdout)
    (room,) = re.findall(r"KV cache size: ([\d,]+) tokens", mtp_server.log.read_text())
    assert found["KV cache, tokens"] == [f"{plan['kv_tokens']:,}", room]
    assert found["longest request, tokens"] == ["1,024", "1,024"] and found["draft tokens"] == ["2", "2"]
    assert int(found["answers since the start"][1]) >= 1 and float(found["tokens/s of a request"][1]) > 0
    assert "all is well" in page and "vllm-bailing 0." in page
