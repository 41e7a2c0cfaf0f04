"""The demo checkpoint behind `vllm serve`, against the plain PyTorch model."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import urllib.request

import pytest
import torch

from tests.support import warm
from tests.support.checkpoints import without_its_end, without_mtp_in_config
from tests.support.configs import change_config
from tests.support.conversations import MAX_TOKENS, as_openai, conversation, greedy, prompt_ids, spread
from tests.support.engine import ENGINE_ENV
from tests.support.server import serving
from vllm_bailing import DEMO


def test_the_log_says_once_per_process_whose_class_serves(server):
    lines = [line for line in server.log.read_text().splitlines() if "vllm-bailing 0." in line]
    assert lines and all("replaces vLLM" in line and "BailingMoeV2ForCausalLM" in line for line in lines)
    processes = {line.split(")")[0] for line in lines}
    assert len(lines) == len(processes)
    assert re.search(r"This rank's \S+ GiB of weights took \S+ s \(\S+ GB/s\)", server.log.read_text())


def test_a_server_that_is_told_to_stop_finishes_its_answers(tmp_path):
    """As the files of deploy/ have it; without the flag they are cut off."""
    told, together, begun = {}, threading.Barrier(8), threading.Semaphore(0)

    def listen(number):
        together.wait(60)
        stream = server.client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": f"Count to {number}."}],
            max_tokens=900,  # a while even of eight at once on a fast machine
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = [next(stream)]
        begun.release()
        chunks += stream
        told[number] = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]

    with serving(tmp_path / "log", "--shutdown-timeout", "60") as server:
        server.client.models.list()  # what a client does at its first request would keep some of the eight behind
        listeners = [threading.Thread(target=listen, args=(number,)) for number in range(8)]
        for listener in listeners:
            listener.start()
        # Not asked of the server: under load it may leave /metrics without an answer until its streams have ended.
        assert all(begun.acquire(timeout=60) for _ in listeners) and not told, "the eight were never under way together"
        server.process.send_signal(signal.SIGTERM)
        for listener in listeners:
            listener.join(90)
        assert server.process.wait(90) == 0
    assert sorted(told) == list(range(8))
    assert {reasons[-1] for reasons in told.values()} == {"length"}


@pytest.mark.parametrize("stream", [False, True])
def test_chat_gives_the_plain_models_answers(server, plain, stream):
    rows = spread(12)
    wanted = greedy(plain, [prompt_ids(plain, row) for row in rows])
    for row, ids in zip(rows, wanted, strict=True):
        messages, options = conversation(row)
        tools = {"tools": options.pop("tools"), "tool_choice": "none"} if "tools" in options else {}
        answer = server.client.chat.completions.create(
            model="demo",
            messages=as_openai(messages),
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=stream,
            extra_body={"chat_template_kwargs": options},
            **tools,
        )
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
        else:
            text = answer.choices[0].message.content
        assert text == plain.tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def test_completions_give_the_plain_models_logprobs(server, plain):
    row = spread(4)[1]
    prompt = prompt_ids(plain, row)
    answer = server.client.completions.create(
        model="demo",
        prompt=prompt,
        temperature=0,
        max_tokens=8,
        logprobs=5,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True, "skip_special_tokens": False},
    ).choices[0]
    ids = [int(token.removeprefix("token_id:")) for token in answer.logprobs.tokens]
    logprobs = plain.model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    assert ids == logprobs.argmax(-1).tolist()
    served = torch.tensor(answer.logprobs.token_logprobs)
    assert (served - logprobs.max(-1).values).abs().max() <= 1e-4
    for step, top in enumerate(answer.logprobs.top_logprobs):
        for token, value in top.items():
            assert abs(logprobs[step, int(token.removeprefix("token_id:"))] - value) <= 1e-4


def test_a_context_beyond_the_window_is_refused_by_the_server(server, plain):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match="1024"):
        server.client.completions.create(model="demo", prompt=[5] * 1025, max_tokens=1)


def test_metrics_count_drafts_and_what_was_accepted(server, plain):
    for row in spread(4):
        server.client.completions.create(model="demo", prompt=prompt_ids(plain, row), temperature=0, max_tokens=32)
    lines = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode().splitlines()
    counts = {
        line.split("{")[0].removeprefix("vllm:spec_decode_num_"): float(line.split()[-1])
        for line in lines
        if line.startswith("vllm:spec_decode_num_") and "per_pos" not in line and "_created" not in line
    }
    if not server.draft_tokens:
        assert not counts
        return
    assert counts["draft_tokens_total"] == server.draft_tokens * counts["drafts_total"] > 0
    assert counts["accepted_tokens_total"] >= 0.8 * counts["drafts_total"]


def with_two_rotary_widths(model):
    change_config(model, rotary_dim=24)


@pytest.mark.parametrize(
    ("damage", "flags", "message"),
    [
        (without_its_end, [], "model.safetensors is cut off or damaged"),
        (with_two_rotary_widths, [], "rotary_dim=24 contradicts partial_rotary_factor=0.5"),
        (
            without_mtp_in_config,
            ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}'],
            "pass --hf-overrides '{\"num_nextn_predict_layers\": 1}'",
        ),
    ],
)
def test_the_server_ends_with_one_line_when_it_refuses(damage, flags, message, tmp_path):
    model = shutil.copytree(DEMO, tmp_path / "model")
    damage(model)
    env = {**os.environ, **ENGINE_ENV}
    done = subprocess.run(
        [str(warm.commands() / "vllm"), "serve", str(model), *flags],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    # Older vLLM puts the name of the process before every line.
    last = re.sub(r"^\(APIServer pid=\d+\) ", "", done.stderr.rstrip().splitlines()[-1])
    assert last.startswith("vllm-bailing: ") and message in last
    assert "Traceback" not in done.stdout + done.stderr
