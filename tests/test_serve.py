"""The demo checkpoint through the front door, `vllm serve` and `LLM(...)`, against the plain PyTorch model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine import ENGINE_ENV, make_llm, run
from openai import OpenAI
from test_lora import make_adapter
from transformers import AutoTokenizer
from vllm.utils.network_utils import get_open_port

from vllm_bailing.cli import DEMO, DEMO_ADAPTER
from vllm_bailing.reference import BailingMoeV2ForCausalLM

pytestmark = pytest.mark.engine

HELD_OUT = [json.loads(line) for line in (Path(__file__).parent / "data" / "demo_heldout.jsonl").open()]
MAX_TOKENS = 96


def conversation(row):
    options = {"tools": row["tools"]} if row.get("tools") else {}
    if row.get("thinking"):
        options["thinking_option"] = "on"
    return row["messages"], options


def as_openai(messages):
    """`messages` as OpenAI's schema wants them: tool calls with an id, their arguments as a JSON text."""
    result = []
    for message in messages:
        message = dict(message)
        if message["role"] == "tool":
            message["tool_call_id"] = "call"
        if calls := message.get("tool_calls"):
            functions = [call.get("function", call) for call in calls]
            message["tool_calls"] = [
                {
                    "id": "call",
                    "type": "function",
                    "function": {"name": function["name"], "arguments": json.dumps(function["arguments"])},
                }
                for function in functions
            ]
        result.append(message)
    return result


@pytest.fixture(scope="module")
def plain():
    """The plain model in fp32 and its tokenizer."""
    model = BailingMoeV2ForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(DEMO))


def prompt_ids(plain, row):
    messages, options = conversation(row)
    return plain.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)[
        "input_ids"
    ]


def greedy(plain, prompts):
    """Greedy answers of the plain model to token id lists, in one left-padded batch, up to the end-of-text token."""
    ends = plain.model.generation_config.eos_token_id
    width = max(map(len, prompts))
    pad = plain.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    rows = plain.model.generate(ids, attention_mask=mask, max_new_tokens=MAX_TOKENS, do_sample=False)[
        :, width:
    ].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def spread(count):
    """`count` held-out conversations, evenly over all kinds."""
    return [HELD_OUT[i * len(HELD_OUT) // count] for i in range(count)]


def _answers(prompts):
    from vllm import SamplingParams

    llm = make_llm(DEMO, max_model_len=1024)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_batch_of_64_prompts_gets_the_plain_models_answers(plain):
    prompts = [prompt_ids(plain, row) for row in spread(64)]
    assert run(_answers, prompts) == greedy(plain, prompts)


@contextmanager
def serving(log, *flags, **env):
    """`vllm serve` on the demo checkpoint, in fp32, without any trust flag."""
    port = get_open_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(DEMO), "--served-model-name", "demo"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-logprobs", "-1", *flags]
    env = {**os.environ, **ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        yield SimpleNamespace(client=client, log=log, url=f"http://127.0.0.1:{port}")
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "mtp"])
def server(tmp_path_factory, request):
    """A server with so many draft tokens."""
    speculation = {"method": "mtp", "num_speculative_tokens": request.param}
    flags = ["--speculative-config", json.dumps(speculation)] if request.param else []
    with serving(tmp_path_factory.mktemp("server") / "log", *flags) as found:
        found.draft_tokens = request.param
        yield found


def test_the_log_says_once_per_process_whose_class_serves(server):
    lines = [line for line in server.log.read_text().splitlines() if "vllm-bailing 0." in line]
    assert lines and all("replaces vLLM" in line and "BailingMoeV2ForCausalLM" in line for line in lines)
    processes = {line.split(")")[0] for line in lines}
    assert len(lines) == len(processes)
    assert re.search(r"This rank's \S+ GiB of weights took \S+ s \(\S+ GB/s\)", server.log.read_text())


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


def without_its_end(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def with_two_rotary_widths(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rotary_dim": 24}))


def without_mtp_in_config(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))


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
    vllm = str(Path(sys.executable).with_name("vllm"))
    env = {**os.environ, **ENGINE_ENV}
    done = subprocess.run(
        [vllm, "serve", str(model), *flags], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    # Older vLLM puts the name of the process before every line.
    last = re.sub(r"^\(APIServer pid=\d+\) ", "", done.stderr.rstrip().splitlines()[-1])
    assert last.startswith("vllm-bailing: ") and message in last
    assert "Traceback" not in done.stdout + done.stderr


def _served_window(rope_scaling):
    overrides = {"rope_scaling": rope_scaling} if rope_scaling else {}
    return make_llm(DEMO, max_model_len=None, hf_overrides=overrides).llm_engine.model_config.max_model_len


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_the_cards_yarn_snippet_on_the_command_line_extends_the_window(spelling):
    window = json.loads((DEMO / "config.json").read_text())["max_position_embeddings"]
    scaling = {spelling: "yarn", "factor": 4.0, "original_max_position_embeddings": window}
    assert run(_served_window, scaling) == 4 * window


# --- adapters -----------------------------------------------------------------------------------------------------


def say(server, model, question):
    return (
        server.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=MAX_TOKENS
        )
        .choices[0]
        .message.content
    )


def test_adapters_are_served_from_the_start_and_loaded_later(tmp_path):
    """The demo's own adapter changes what the model says; one that vLLM would drop in part is no more than an error."""
    experts = make_adapter(tmp_path / "experts", DEMO, ("up_proj",), keep=lambda module: ".mlp.experts." in module)
    question = "What is the capital of France?"
    flags = ("--enable-lora", "--max-loras", "2", "--lora-modules", f"sailor={DEMO_ADAPTER}")
    with serving(tmp_path / "log", *flags, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as server:
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
