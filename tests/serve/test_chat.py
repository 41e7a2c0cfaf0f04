"""`vllm-bailing chat` with a server."""

from __future__ import annotations

import json
import os
import subprocess

from tests.support import warm


def test_the_command_chats_with_a_server(assistant_server):
    def run(*arguments, **options):
        program = [str(warm.commands() / "vllm-bailing"), "chat", *arguments]
        return subprocess.run(program, capture_output=True, text=True, env={**os.environ}, **options)

    settings = ("--url", assistant_server.url, "--temperature", "0", "--max-tokens", "96")
    done = run("What is the capital of France?", *settings)
    assert done.returncode == 0 and "Paris" in done.stdout, done.stdout + done.stderr
    done = run("can you add 17 and 5", *settings, "--thinking", "on", "--json")
    told = json.loads(done.stdout)
    assert told["reasoning"] and "22" in told["content"]
    done = run(*settings, input="Who are you?\n/new\nWhat is the capital of Italy?\n")
    assert "Rome" in done.stdout and "\033" not in done.stdout and len(done.stdout.splitlines()) == 2
    done = run("hello", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "http://127.0.0.1:9" in done.stderr
