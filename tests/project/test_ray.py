"""deploy/ray on the demo and one machine: a batch that is interrupted and goes on, and a service."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from openai import OpenAI, OpenAIError

pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[data,serve]'")

from tests.support.paths import ROOT
from tests.support.ray import CPUS, ENGINE, ENV, batch, kill, prompt_rows, right_answers, wait_for_start, wrong_answers
from tests.support.server import free_port
from vllm_bailing import DEMO

PROMPTS, ROWS = 24, 4


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of programs that use a Ray cluster of one machine."""
    port = free_port()
    folder = tmp_path_factory.mktemp("ray")
    session = Path("/tmp") / f"vb{os.getpid()}"  # paths of sockets are short
    command = ["ray", "start", "--head", "--block", "--port", str(port), "--temp-dir", str(session)]
    command += ["--num-cpus", str(CPUS), "--object-store-memory", str(2**28), "--include-dashboard", "false"]
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *command[1:]],
            stdout=stream,
            stderr=stream,
            env={**os.environ, **ENV},
            start_new_session=True,
        )
    try:
        wait_for_start(process, log)
        yield {"RAY_ADDRESS": f"{socket.gethostbyname(socket.gethostname())}:{port}"}
    finally:
        kill(process)
        shutil.rmtree(session)


@contextmanager
def answering(folder, env):
    with (folder / "log").open("a") as log:
        process = batch(folder, "--rows", str(ROWS), log=log, env=env)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_an_interrupted_batch_goes_on_and_answers_each_prompt_once(cluster, tmp_path):
    asked = prompt_rows(PROMPTS)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))

    def said():
        return (tmp_path / "log").read_text(errors="replace")[-6000:]

    with answering(tmp_path, cluster) as process:
        end = time.monotonic() + 600
        while not (first := set(wrong_answers(tmp_path / "out", {})[1])):
            assert process.poll() is None and time.monotonic() < end, said()
            time.sleep(0.1)
    assert len(first) < PROMPTS
    with answering(tmp_path, cluster) as process:
        assert process.wait(600) == 0, said()
    assert f"{PROMPTS} answers to {PROMPTS} prompts: 0 missing, 0 twice, 0 with an error" in said()
    wrong, ids = wrong_answers(tmp_path / "out", right_answers(asked))
    assert wrong == []
    assert sorted(ids) == sorted(row["id"] for row in asked)
    assert (tmp_path / "out" / "done").is_dir()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"id": "a", "messages": []}\n{"messages": []}\n', "row 2 of"),
        ('{"id": "a", "messages": []}\n{"id": "a", "messages": []}\n', "has the id 'a' more than once"),
    ],
)
def test_prompts_that_cannot_be_told_apart_are_refused(lines, message, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(lines)
    with (tmp_path / "log").open("w") as log:
        assert batch(tmp_path, log=log, env={}).wait(120) == 1
    assert message in (tmp_path / "log").read_text().splitlines()[-1]


def test_the_service_answers_with_the_parsers_of_this_package(cluster, tmp_path):
    served = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    (config,) = served["applications"][0]["args"]["llm_configs"]
    config["model_loading_config"]["model_source"] = str(DEMO)
    config["engine_kwargs"] |= {**ENGINE, "tensor_parallel_size": 1}
    config["deployment_config"]["autoscaling_config"] = {"min_replicas": 1, "max_replicas": 1}
    config |= {"accelerator_type": None, "placement_group_config": {"bundles": [{"CPU": 1}]}}
    port = free_port()
    served["http_options"] = {"host": "127.0.0.1", "port": port}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(served))
    command = [str(Path(sys.executable).with_name("serve")), "run", "serve.yaml"]
    with (tmp_path / "log").open("w") as log:
        env = {**os.environ, **ENV, **cluster}
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True)
    # Models are listed before they answer.
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0)
    weather = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    weather["function"]["parameters"]["properties"] = {"city": {"type": "string"}}
    try:
        end = time.monotonic() + 600
        while True:
            try:
                client.models.list()
                break
            except OpenAIError:
                assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-6000:]
                time.sleep(1)

        def asked(content, **options):
            messages = [{"role": "user", "content": content}]
            return client.chat.completions.create(model="ling", messages=messages, temperature=0, **options)

        chunks = list(asked("What is the capital of France?", max_tokens=20, stream=True))
        assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        (call,) = asked("What is the weather in Paris?", max_tokens=60, tools=[weather]).choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    finally:
        kill(process)
