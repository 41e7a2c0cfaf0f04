"""Adapters behind `vllm serve`."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from tests.support.adapters import make_adapter
from tests.support.conversations import MAX_TOKENS
from vllm_bailing import DEMO, DEMO_ADAPTER


def say(server, model, question):
    return (
        server.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=MAX_TOKENS
        )
        .choices[0]
        .message.content
    )


def test_adapters_are_served_from_the_start_and_loaded_later(assistant_server, tmp_path):
    """The demo's own adapter changes what the model says; one that vLLM would drop in part is no more than an error."""
    experts = make_adapter(tmp_path / "experts", DEMO, ("up_proj",), keep=lambda module: ".mlp.experts." in module)
    question, server = "What is the capital of France?", assistant_server
    plain, sailor = (say(server, model, question) for model in ("demo", "sailor"))
    assert sailor == f"{plain} Aye, captain!"

    def load(name, folder):
        body = json.dumps({"lora_name": name, "lora_path": str(folder)}).encode()
        headers = {"Content-Type": "application/json"}
        return urllib.request.urlopen(
            urllib.request.Request(f"{server.url}/v1/load_lora_adapter", body, headers), timeout=60
        )

    with pytest.raises(urllib.error.HTTPError) as refusal:
        load("experts", experts)
    message = refusal.value.read().decode()
    assert "48 module(s) that would be ignored" in message, message  # from another process, so vLLM answers 500
    load("again", DEMO_ADAPTER)
    assert say(server, "again", question) == sailor
    assert say(server, "demo", question) == plain
