"""Requests of absurd size to a server of the demo: what each gets, and how long another user waits meanwhile.

    .venv/bin/python scripts/dev/floods.py                    all of them, about ten minutes on two cores
    .venv/bin/python scripts/dev/floods.py huge-n many-tools

Beside each, another user asks a short question again and again; its answer is known. docs/reliability.md has results.
Exit code 1 if that answer is ever wrong, or the server does not outlive a request.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Annotated, Any

import httpx
import typer
from faults import Server, server

PATIENCE_SECONDS = 300
FLAGS = "--enable-auto-tool-choice --tool-call-parser bailing --reasoning-parser bailing --max-model-len 1024".split()
Flood = tuple[str, dict[str, Any]]  # path and body of a request
USER = [{"role": "user", "content": "What is the capital of France?"}]


def nested(levels: int) -> dict[str, Any]:
    """A JSON schema of objects in objects."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def wide(count: int) -> dict[str, Any]:
    names = [f"property_{number}" for number in range(count)]
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": names}


def tool(number: int, description: str = "", parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    parameters = parameters or {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": f"tool_{number}", "description": description, "parameters": parameters},
    }


def chat(**body: Any) -> Flood:
    return "/v1/chat/completions", {"messages": USER, "max_tokens": 16, **body}


def completion(**body: Any) -> Flood:
    return "/v1/completions", {"prompt": "The capital of", "max_tokens": 8, **body}


def constrained(schema: dict[str, Any]) -> Flood:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def anthropic(**body: Any) -> Flood:
    return "/v1/messages", {"max_tokens": 16, "messages": USER, **body}


MANY = 10_000
COUNTS = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(x{1,999}){1,999}"}}}
FLOODS = {
    "huge-n": completion(n=100_000),
    "n-of-4000": completion(n=4000, max_tokens=1, temperature=1.0),
    "all-prompt-logprobs": completion(prompt="x " * 400, prompt_logprobs=-1, max_tokens=1),
    "top-logprobs-of-a-billion": chat(logprobs=True, top_logprobs=10**9),
    "logprobs-over-the-vocabulary": completion(logprobs=10**6),
    "prompt-of-10-MB": completion(prompt="a b c " * 1_700_000),
    "message-of-10-MB": chat(messages=[{"role": "user", "content": "<tool_call>" * 1_000_000}]),
    "responses-of-10-MB": ("/v1/responses", {"input": "<role>" * 1_700_000, "max_output_tokens": 16}),
    "messages-of-10-MB": anthropic(messages=[{"role": "user", "content": "</think>" * 1_300_000}]),
    "many-messages": chat(messages=USER * MANY * 5),
    "many-tools": chat(tools=[tool(number, "d" * 1000) for number in range(MANY)]),
    "many-tools-of-responses": (
        "/v1/responses",
        {
            "input": "hi",
            "max_output_tokens": 16,
            "tools": [{"type": "function", **tool(number, "d" * 1000)["function"]} for number in range(MANY)],
        },
    ),
    "many-tools-of-messages": anthropic(
        tools=[{"name": f"tool_{number}", "input_schema": {"type": "object"}} for number in range(MANY)]
    ),
    "tool-of-10-MB": chat(tools=[tool(0, "d" * 10_000_000)]),
    "tool-of-900-levels": chat(tools=[tool(0, "", nested(900))]),
    "required-of-many-tools": chat(tools=[tool(number) for number in range(MANY)], tool_choice="required"),
    "named-tool-of-a-deep-schema": chat(
        tools=[tool(0, "", nested(200))], tool_choice={"type": "function", "function": {"name": "tool_0"}}
    ),
    "schema-of-900-levels": constrained(nested(900)),
    "schema-of-300-levels": constrained(nested(300)),
    "wide-schema": constrained(wide(MANY)),
    "schema-of-many-choices": constrained({"enum": [f"choice {number}" for number in range(5 * MANY)]}),
    "schema-that-counts": constrained({"type": "string", "minLength": 10**6, "maxLength": 10**9}),
    "schema-of-a-ring": constrained({"$ref": "#"}),
    "regex-that-backtracks": chat(structured_outputs={"regex": "(a+)+$" * 20}),
    "regex-that-counts": chat(structured_outputs={"regex": "(a{1,1000}){1,1000}"}),
    "regex-of-1-MB": chat(structured_outputs={"regex": "a?" * 500_000}),
    "pattern-of-a-tool": chat(
        tools=[
            tool(0, "", {"type": "object", "properties": {"a": {"type": "string", "pattern": "(x{1,999}){1,999}"}}})
        ],
        tool_choice="required",
    ),
    "grammar-of-a-ring": chat(structured_outputs={"grammar": "root ::= root root"}),
    "many-stops": completion(stop=[f"stop {number}" for number in range(5 * MANY)]),
    "many-bad-words": completion(bad_words=[f"word {number}" for number in range(MANY)]),
    "many-biases": completion(logit_bias={str(number): -100 for number in range(5 * MANY)}),
    "deep-template-arguments": chat(chat_template_kwargs={"x": nested(900)}),
}


class Bystander:
    """Another user, who asks until told to stop: the longest wait in seconds, and whether an answer was wrong."""

    def __init__(self, running: Server, wanted: str) -> None:
        self.longest, self.wrong, self._stop = 0.0, False, threading.Event()
        self._running, self._wanted = running, wanted
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._stop.is_set():
            start = time.monotonic()
            try:
                self.wrong |= self._running.text() != self._wanted
            except (httpx.HTTPError, KeyError, ValueError):
                self.wrong = True
            self.longest = max(self.longest, time.monotonic() - start)
            self._stop.wait(0.1)

    def __enter__(self) -> Bystander:
        self._thread.start()
        time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def asked(running: Server, path: str, body: dict[str, Any]) -> str:
    """What the sender gets, on one line."""
    content = json.dumps({"model": "demo", **body})
    headers = {"Content-Type": "application/json"}
    try:
        answer = httpx.post(running.url + path, content=content, headers=headers, timeout=PATIENCE_SECONDS)
    except httpx.HTTPError as error:
        return f"{type(error).__name__} {error}".strip()
    if answer.status_code == 200:
        return "200"
    try:
        told = answer.json()
        told = (told.get("error") or told).get("message") or str(told)
    except (ValueError, AttributeError):
        told = answer.text
    told = " ".join(str(told).split())
    return f"{answer.status_code}: {told if len(told) < 140 else told[:140] + '...'}"


def main(names: Annotated[list[str] | None, typer.Argument(help=", ".join(FLOODS))] = None) -> None:
    sys.setrecursionlimit(20_000)  # to write what is nested deeper than a reader may go
    print("| request | answer | after | longest wait of another user |\n|---|---|---|---|", flush=True)
    failed = False
    with server(*FLAGS) as running:
        assert running.started(), running.message()
        wanted = running.text()
        for name in names or FLOODS:
            with Bystander(running, wanted) as other:
                start = time.monotonic()
                told = asked(running, *FLOODS[name])
                seconds = time.monotonic() - start
            ended = running.process.poll() is not None
            told += f"; THE SERVER ENDED: {running.message()}" if ended else "; WRONG BESIDE IT" * other.wrong
            failed |= ended or other.wrong
            print(f"| {name} | {told.replace('|', '/')} | {seconds:.1f} s | {other.longest:.1f} s |", flush=True)
            if ended:
                break
    sys.exit(failed)


if __name__ == "__main__":
    typer.run(main)
