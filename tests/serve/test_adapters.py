"""Adapters behind `vllm serve`."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request

import openai
import pytest

from tests.support.adapters import REFUSED, changed_adapter, make_adapter, setting
from tests.support.conversations import MAX_TOKENS
from tests.support.server import serving
from vllm_bailing import DEMO, DEMO_ADAPTER

QUESTION = "What is the capital of France?"


def say(server, model, question=QUESTION):
    return (
        server.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=MAX_TOKENS
        )
        .choices[0]
        .message.content
    )


def load(server, name, folder):
    """(status, message) of a request to load an adapter."""
    body = json.dumps({"lora_name": name, "lora_path": str(folder)}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/load_lora_adapter", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.loads(refusal.read())["error"]["message"]


def test_adapters_are_served_from_the_start_and_loaded_later(assistant_server):
    """The demo's own adapter changes what the model says."""
    server = assistant_server
    plain, sailor = (say(server, model) for model in ("demo", "sailor"))
    assert sailor == f"{plain} Aye, captain!"
    assert load(server, "again", DEMO_ADAPTER)[0] == 200
    assert say(server, "again") == sailor
    assert say(server, "demo") == plain


def test_adapters_that_do_not_fit_are_the_users_mistake_and_the_server_goes_on(assistant_server, tmp_path):
    server = assistant_server
    before = [say(server, model) for model in ("demo", "sailor")]
    for case in ("half_of_every_a", "nan", "empty", "integers", "a_without_b", "alpha_zero", "modules_to_save"):
        status, message = load(server, case, changed_adapter(tmp_path / case, REFUSED[case][0]))
        assert status == 400 and REFUSED[case][1] in message and "\n" not in message, (case, status, message)
    experts = make_adapter(tmp_path / "experts", DEMO, ("up_proj",), keep=lambda module: ".mlp.experts." in module)
    status, message = load(server, "experts", experts)
    assert status == 400 and "48 module(s) that would be ignored" in message, message
    broken = changed_adapter(tmp_path / "broken", setting())
    (broken / "adapter_config.json").write_text("{")
    assert load(server, "broken", broken)[0] == 400
    status, message = load(server, "nowhere", tmp_path / "nowhere")
    assert status == 404 and "No adapter found" in message
    assert {model.id for model in server.client.models.list().data} <= {"demo", "sailor", "again"}
    assert [say(server, model) for model in ("demo", "sailor")] == before


def test_an_adapter_that_becomes_unfit_while_it_is_served_is_refused_and_the_server_goes_on(assistant_server, tmp_path):
    server, folder = assistant_server, changed_adapter(tmp_path / "adapter", setting())
    assert load(server, "changing", folder)[0] == 200
    changed_adapter(tmp_path / "unfit", REFUSED["nan"][0])
    (tmp_path / "unfit" / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")
    with pytest.raises(openai.BadRequestError, match="have values that are NaN"):
        say(server, "changing")
    assert say(server, "sailor").endswith("Aye, captain!")


def test_a_server_does_not_start_with_an_adapter_that_does_not_fit(tmp_path):
    folder = changed_adapter(tmp_path / "adapter", REFUSED["half_of_every_a"][0])
    log = tmp_path / "log"
    with pytest.raises(AssertionError), serving(log, "--enable-lora", "--lora-modules", f"bad={folder}"):
        pass
    lines = [line for line in log.read_text().splitlines() if re.match(r"(\(\w+ pid=\d+\) )?vllm-bailing: ", line)]
    assert len(lines) == 1 and "20 factor(s) are of the wrong shape" in lines[0]
