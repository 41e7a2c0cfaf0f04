"""`vllm serve` on the demo checkpoint."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import httpx
from openai import OpenAI

from tests.support import warm
from tests.support.engine import ENGINE_ENV
from vllm_bailing import DEMO


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(log, *flags, model=DEMO, programs=None, **env):
    """`vllm serve` on the demo checkpoint or another one, in fp32, without any trust flag, under the name `demo`.

    Args:
        programs: The folder with the command; one that has vLLM imported already if left out.
    """
    port = free_port()
    command = [str((programs or warm.commands()) / "vllm"), "serve", str(model), "--served-model-name", "demo"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-logprobs", "-1", "--kv-cache-memory-bytes", str(2**28), *flags]
    env = {**os.environ, **ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **env}
    del env["VLLM_CPU_KVCACHE_SPACE"]  # it would overrule the flag above
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
        yield SimpleNamespace(client=client, log=log, url=f"http://127.0.0.1:{port}", process=process)
    finally:
        stop(process)


def posted(server, path, **body):
    """What the server answers to `body`, which has to be a success."""
    answer = httpx.post(f"{server.url}{path}", json={"model": "demo", **body}, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stop(process: subprocess.Popen) -> None:
    """End a server and all in its group, if it runs."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
