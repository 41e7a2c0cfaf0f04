"""`vllm-bailing verify` against a server."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from functools import partial
from importlib.metadata import version

import pytest
import torch

from tests.support.checkpoints import changed_demo, with_two_experts_swapped
from tests.support.commands import invoke, run_command
from tests.support.server import posted
from vllm_bailing import DEMO
from vllm_bailing.tools import verify
from vllm_bailing.tools.verify_deployment import vllm_version


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_server_is_verified(dtype, request, tmp_path):
    server = request.getfixturevalue({"float32": "plain_server", "bfloat16": "bf16_server"}[dtype])
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = invoke("verify", DEMO, "--url", server.url, "--dtype", dtype, "--json", **cache)
    assert done.exit_code == 0, done.output
    assert vllm_version(server.url) == version("vllm").partition("+")[0]
    report = json.loads(done.stdout)
    assert report["computes"] and len(report["prompts"]) == len(verify.DEFAULT_PROMPTS)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    # A checkpoint that is not the server's
    other = changed_demo(tmp_path / "other", with_two_experts_swapped)
    done = run_command("verify", other, "--url", f"{server.url}/v1", "--dtype", dtype, cache=tmp_path / "cache")
    assert done.returncode == 1 and f"does not compute {other}" in done.stdout, done.stdout + done.stderr
    assert "\033" not in done.stdout


def with_another_mtp_layer(tensors):
    for name in tensors:
        if name.endswith("eh_proj.weight"):
            tensors[name] = torch.zeros_like(tensors[name])


def test_drafts_are_compared_too(mtp_server, tmp_path):
    other = changed_demo(tmp_path / "other", with_another_mtp_layer)
    for model, computes in ((DEMO, True), (other, False)):
        options = ("--dtype", "float32", "--words", "64", "--no-parts", "--json")
        done = invoke("verify", model, "--url", mtp_server.url, *options, XDG_CACHE_HOME=str(tmp_path / "cache"))
        report = json.loads(done.stdout)
        made, expected = report["drafts"]["drafts"], report["drafts"]["expected"]
        assert report["computes"] == computes and made > 30, report  # 46 were seen
        assert (min(expected) <= made <= max(expected)) == computes, report["drafts"]
        assert ("MTP layer" in report["looks_like"]) != computes and not report["not_checked"]


def test_drafts_of_others_are_no_fault(mtp_server, monkeypatch, tmp_path):
    monkeypatch.setattr(verify, "CACHE", tmp_path)

    def meanwhile(stage, done, _total):
        if (stage, done) == ("deployment", 2):
            posted(mtp_server, "/v1/completions", prompt="Who are you?", max_tokens=8)

    options = {"dtype": "float32", "words": 64, "parts": False, "progress": meanwhile}
    report = verify.run(str(DEMO), mtp_server.url, **options)
    assert report["computes"] and report["drafts"] is None
    assert report["not_checked"] == "the MTP layer: drafts of others' requests were counted too"


def test_a_server_that_stands_still_is_told_soon(plain_server, tmp_path, monkeypatch):
    monkeypatch.setattr(verify.doctor_server, "server", partial(verify.doctor_server.server, seconds=2))
    pid = int(re.search(r"\(EngineCore pid=(\d+)\)", plain_server.log.read_text())[1])
    os.kill(pid, signal.SIGSTOP)
    try:
        done = invoke("verify", DEMO, "--url", plain_server.url, XDG_CACHE_HOME=str(tmp_path / "cache"))
    finally:
        os.kill(pid, signal.SIGCONT)
    said = f"{plain_server.url}: no answer within 2 s; restart the server: its engine stands still"
    assert done.exit_code == 2 and done.stderr.strip() == f"vllm-bailing verify: {said}", done.output


def with_another_template(model):
    file = model / "chat_template.jinja"
    file.write_text(file.read_text().replace("HUMAN", "USER"))


def with_another_tokenizer(model):
    """Two words of the vocabulary have each other's ids."""
    file = model / "tokenizer.json"
    contents = json.loads(file.read_text())
    vocabulary = contents["model"]["vocab"]
    one, other = (token for token in vocabulary if vocabulary[token] in (900, 901))
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_another_template, "its chat template is another one"),
        (with_another_tokenizer, "its tokenizer is another one"),
    ],
    ids=["chat template", "tokenizer"],
)
def test_another_tokenizer_or_template_is_a_fault(change, said, plain_server, tmp_path):
    from vllm_bailing.tools.verify_server import tokenizer_difference

    assert tokenizer_difference(plain_server.url, None, DEMO) == ""
    model = shutil.copytree(DEMO, tmp_path / "model")
    change(model)
    assert tokenizer_difference(plain_server.url, "demo", model).startswith(said)
    if change is with_another_template:
        template = (DEMO / "chat_template.jinja").read_text()
        assert tokenizer_difference(plain_server.url, None, model, template) == ""
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = ("--dtype", "float32", "--max-tokens", "1", "--words", "64", "--no-parts", "--json")
    done = invoke("verify", model, "--url", plain_server.url, *options, **cache)
    assert done.exit_code == 1 and said in json.loads(done.stdout)["reason"]
