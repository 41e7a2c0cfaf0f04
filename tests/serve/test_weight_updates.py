"""vLLM's endpoints for trainers, on the demo checkpoint."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest
from safetensors.torch import save_file

from tests.support.checkpoints import read_tensors
from tests.support.versions import PARTS_OF_EXPERTS
from vllm_bailing import DEMO

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def post(server, path, **body):
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{server.url}{path}", data, headers), timeout=120).read()


def answer(server):
    post(server, "/reset_prefix_cache")
    chat = server.client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=16)
    return chat.choices[0].message.content


@pytest.fixture
def update(plain_server, tmp_path):
    def send(*portions):
        post(plain_server, "/start_weight_update")
        for number, portion in enumerate(portions):
            file = tmp_path / f"{number}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in portion.items()}, file)
            post(plain_server, "/update_weights", update_info={"file": str(file)})
        post(plain_server, "/finish_weight_update")

    return send


@PARTS_OF_EXPERTS
def test_a_server_is_updated_in_buckets_and_back(plain_server, update):
    before = answer(plain_server)
    assert before == "The capital of France is Paris."
    tensors = read_tensors(DEMO)
    names = sorted(tensors)
    post(plain_server, "/pause")
    changed = {name: -tensors[name] for name in names if ".experts.3." in name or name == "model.norm.weight"}
    update(dict(list(changed.items())[::2]), dict(list(changed.items())[1::2]))
    post(plain_server, "/resume")
    assert answer(plain_server) != before
    update(*({name: tensors[name] for name in names[start::3]} for start in range(3)))
    assert answer(plain_server) == before


def test_a_server_refuses_what_does_not_fit_and_goes_on(plain_server, update):
    before, tensors = answer(plain_server), read_tensors(DEMO)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        update({**tensors, "model.stranger.weight": tensors["model.norm.weight"].clone()})
    assert refusal.value.code >= 400
    assert "the update does not fit the model: 1 unexpected (model.stranger.weight)" in plain_server.log.read_text()
    assert answer(plain_server) == before
    update(tensors)
    assert answer(plain_server) == before
