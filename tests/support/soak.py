"""Mixed load on a server of the demo checkpoint for any length of time, every answer compared with the right one.

The right answers are those of the plain PyTorch model to the held-out conversations, without and with the demo's
adapter. By hand, for an hour, with a report, on a server whose weights change and which sleeps: scripts/dev/soak.py.
"""

from __future__ import annotations

import json
import queue
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from tests.support.conversations import HELD_OUT, MAX_TOKENS, as_openai, evenly, greedy, prompt_ids
from vllm_bailing import DEMO_ADAPTER

ADAPTER = "sailor"
PATTERN = r"[a-f]{3}-[0-9]{2}"
# Requests that every server answers, those that need its parsers, and one that needs adapters to be loaded at run time.
BASE = ("whole", "several", "streamed", "aborted", "long", "sampled", "constrained", "refused")
PARSED = ("chat", "tools", "thinking")
SWAPPED = ("swapped",)
# For adapters that come and go. Few: vLLM keeps a series in /metrics for each set of names that ran together.
_NAMES: queue.Queue[str] = queue.Queue()
_NAMES.put("adapter-0")
_NAMES.put("adapter-1")


@dataclass
class Question:
    """A conversation, its prompt, and the right greedy answer of the model that is asked, as tokens and as text."""

    model: str
    row: dict[str, Any]
    prompt: list[int]
    answer: list[int]
    text: str


@dataclass
class Tally:
    """What came of the requests.

    Attributes:
        right: Number of answers that were right, by kind of request.
        wrong: Descriptions of those that were not.
        lost: Requests that ended in an error, with it.
        samples: Rows of seconds, memory in bytes and open files of the server's processes, preemptions, requests: the
            first from before the load, the last from after it.
    """

    right: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    samples: list[dict[str, float]] = field(default_factory=list)


def questions(model: str, plain: Any, count: int) -> list[Question]:
    """`count` held-out conversations, and what `plain` answers."""
    rows = evenly(HELD_OUT, count)
    prompts = [prompt_ids(plain, row) for row in rows]
    answers = greedy(plain, prompts)
    texts = [plain.tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]
    return [Question(model, *parts) for parts in zip(rows, prompts, answers, texts, strict=True)]


def soak(
    url: str,
    asked: list[Question],
    seconds: float,
    clients: int = 12,
    sample_every: float = 5.0,
    kinds: Collection[str] = BASE,
) -> Tally:
    """Load the server at `url` for `seconds` with `clients` at once and requests of these of `KINDS`."""
    tally, lock = Tally(), threading.Lock()
    fitting = {kind: [one for one in asked if KINDS[kind].fits(one)] for kind in kinds}

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=url, timeout=600) as client:
            while time.monotonic() < end:
                kind = chance.choice(list(fitting))
                question = chance.choice(fitting[kind])
                try:
                    problem = KINDS[kind].ask(client, question, chance)
                except (httpx.HTTPError, LookupError, ValueError) as error:
                    with lock:
                        tally.lost.append(f"{kind}: {type(error).__name__}: {error}")
                    continue
                with lock:
                    if problem:
                        tally.wrong.append(f"{kind}, {question.model}: {problem}")
                    else:
                        tally.right[kind] += 1

    processes = processes_of(url)
    started = time.monotonic()

    def sample() -> bool:
        """Whether the server still tells how it is."""
        try:
            tally.samples.append({"seconds": time.monotonic() - started, **_sample(url, processes)})
        except (httpx.HTTPError, psutil.Error) as error:
            tally.lost.append(f"the server is gone: {type(error).__name__}: {error}")
            return False
        return True

    # One sample before the load and one after it, however long a server at work takes for those between.
    if not sample():
        return tally
    end = time.monotonic() + seconds
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(clients)]
    for worker in workers:
        worker.start()
    while time.monotonic() < end:
        time.sleep(min(sample_every, max(0.0, end - time.monotonic())))
        if time.monotonic() < end and not sample():
            end = 0  # for all clients
    for worker in workers:
        worker.join(660)
    if any(worker.is_alive() for worker in workers):
        tally.lost.append("a request never ended")
    sample()
    return tally


def processes_of(url: str) -> list[psutil.Process]:
    """The server that listens at `url`, and its engine."""
    port = int(url.rpartition(":")[2])
    listening = {
        found.pid for found in psutil.net_connections("tcp") if found.status == "LISTEN" and found.laddr.port == port
    }
    servers = [psutil.Process(pid) for pid in listening if pid]
    return servers + [child for server in servers for child in server.children(recursive=True)]


def _sample(url: str, processes: list[psutil.Process]) -> dict[str, float]:
    metrics = httpx.get(f"{url}/metrics", timeout=60).text

    def total(name: str) -> float:
        return sum(map(float, re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", metrics, re.MULTILINE)))

    return {
        "memory": sum(process.memory_full_info().uss for process in processes),
        "files": sum(process.num_fds() for process in processes),
        "preemptions": total("num_preemptions_total"),
        "requests": total("request_success_total"),
        "running": total("num_requests_running"),
    }


# ---- kinds of requests; each returns what was wrong, or nothing -----------------------------------------------------


def _post(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={"temperature": 0, "max_tokens": MAX_TOKENS, **body})
    answer.raise_for_status()
    return answer.json()


def _differs(found: list[int], question: Question) -> str:
    return "" if found == question.answer else f"{found} is not {question.answer}"


def _whole(client: httpx.Client, question: Question, chance: random.Random) -> str:
    found = _post(client, model=question.model, prompt=question.prompt, return_token_ids=True)
    return _differs(found["choices"][0]["token_ids"], question)


def _several(client: httpx.Client, question: Question, chance: random.Random) -> str:
    found = _post(client, model=question.model, prompt=[question.prompt] * 3, return_token_ids=True, logprobs=3)
    return next(filter(None, (_differs(choice["token_ids"], question) for choice in found["choices"])), "")


def _streamed(
    client: httpx.Client, question: Question, chance: random.Random, leave_after: float = float("inf")
) -> str:
    body = {"model": question.model, "prompt": question.prompt, "stream": True, "return_token_ids": True}
    body |= {"temperature": 0, "max_tokens": MAX_TOKENS}
    found: list[int] = []
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            found += json.loads(data)["choices"][0].get("token_ids") or []
            if len(found) >= leave_after:
                return "" if question.answer[: len(found)] == found else f"{found} does not begin {question.answer}"
    return _differs(found, question)


def _aborted(client: httpx.Client, question: Question, chance: random.Random) -> str:
    return _streamed(client, question, chance, leave_after=chance.randint(1, 12))


def _long(client: httpx.Client, question: Question, chance: random.Random) -> str:
    """A prompt of many tokens, of which the answer is cut off at once; so that the cache gets full."""
    prompt = (question.prompt * 20)[: chance.randint(300, 700)]
    found = _post(client, model=question.model, prompt=prompt, max_tokens=chance.randint(1, 64))
    return "" if found["usage"]["completion_tokens"] >= 1 else "no token"


def _sampled(client: httpx.Client, question: Question, chance: random.Random) -> str:
    found = _post(client, model=question.model, prompt=question.prompt, temperature=1.0, n=2, max_tokens=24)
    return "" if len(found["choices"]) == 2 else f"{len(found['choices'])} answers for n=2"


def _constrained(client: httpx.Client, question: Question, chance: random.Random) -> str:
    body = {"structured_outputs": {"regex": PATTERN}, "max_tokens": 16}
    found = _post(client, model=question.model, prompt=question.prompt, **body)["choices"][0]["text"]
    return "" if re.fullmatch(PATTERN, found) else f"{found!r} does not match {PATTERN}"


def _refused(client: httpx.Client, question: Question, chance: random.Random) -> str:
    answer = client.post("/v1/completions", json={"model": question.model, "prompt": question.prompt * 200})
    return "" if answer.status_code == 400 else f"HTTP {answer.status_code} for a prompt beyond the window"


def _assistant(client: httpx.Client, question: Question, chance: random.Random) -> str:
    """Through the chat template, and both parsers; streamed or whole."""
    body: dict[str, Any] = {"model": question.model, "messages": as_openai(question.row["messages"])}
    body |= {"temperature": 0, "max_tokens": MAX_TOKENS}
    if tools := question.row.get("tools"):
        body["tools"] = tools
    if question.row.get("thinking"):
        body["chat_template_kwargs"] = {"thinking_option": "on"}
    if chance.random() < 0.5:
        found = _joined(client, body)
    else:
        answer = client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        message = answer.json()["choices"][0]["message"]
        functions = [call["function"] for call in message.get("tool_calls") or []]
        calls = [(function["name"], json.loads(function["arguments"])) for function in functions]
        found = (message.get("reasoning") or "", message.get("content") or "", calls)
    wanted = _parts(question)
    return "" if tuple(found) == wanted else f"{found} is not {wanted}"


def _joined(client: httpx.Client, body: dict[str, Any]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, content and calls of a stream."""
    reasoning, content, names, arguments = "", "", [], []
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            delta = json.loads(data)["choices"][0]["delta"]
            reasoning += delta.get("reasoning") or ""
            content += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                if call["index"] == len(names):
                    names.append("")
                    arguments.append("")
                names[call["index"]] += call["function"].get("name") or ""
                arguments[call["index"]] += call["function"].get("arguments") or ""
    return reasoning, content, list(zip(names, map(json.loads, arguments), strict=True))


def _parts(question: Question) -> tuple[str, str, list[tuple[str, Any]]]:
    """What a user has to get of an answer: reasoning, content, and calls as names and arguments."""
    text = question.text.replace("<|role_end|>", "").replace("<|endoftext|>", "")
    thought = re.fullmatch(r"<think>\n?(.*?)\n?</think>\s*(.*)", text, re.DOTALL)
    reasoning, rest = thought.groups() if thought else ("", text)
    calls = [json.loads(call) for call in re.findall(r"<tool_call>(.*?)</tool_call>", rest, re.DOTALL)]
    content = re.sub(r"\s*<tool_call>.*</tool_call>", "", rest, flags=re.DOTALL) if calls else rest
    return reasoning, content, [(call["name"], call["arguments"]) for call in calls]


def _swapped(client: httpx.Client, question: Question, chance: random.Random) -> str:
    """The adapter is loaded under another name, asked, and taken away."""
    name = _NAMES.get()
    try:
        return _swapped_as(name, client, question)
    finally:
        _NAMES.put(name)


def _swapped_as(name: str, client: httpx.Client, question: Question) -> str:
    client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(DEMO_ADAPTER)}).raise_for_status()
    found = _post(client, model=name, prompt=question.prompt, return_token_ids=True)
    client.post("/v1/unload_lora_adapter", json={"lora_name": name}).raise_for_status()
    answer = client.post("/v1/completions", json={"model": name, "prompt": question.prompt})
    if answer.status_code != 404:
        return f"HTTP {answer.status_code} from an adapter that was taken away"
    return _differs(found["choices"][0]["token_ids"], question)


@dataclass(frozen=True)
class Kind:
    """A kind of request: how it is made, which returns what was wrong; and the questions that fit it."""

    ask: Callable[[httpx.Client, Question, random.Random], str]
    fits: Callable[[Question], bool] = lambda question: True


KINDS = {
    "whole": Kind(_whole),
    "several": Kind(_several),
    "streamed": Kind(_streamed),
    "aborted": Kind(_aborted),
    "long": Kind(_long),
    "sampled": Kind(_sampled),
    # With a reasoning parser vLLM holds only what comes after the reasoning to the pattern.
    "constrained": Kind(_constrained, lambda question: not question.row.get("thinking")),
    "refused": Kind(_refused),
    "chat": Kind(_assistant, lambda question: not (question.row.get("tools") or question.row.get("thinking"))),
    "tools": Kind(_assistant, lambda question: bool(question.row.get("tools"))),
    "thinking": Kind(_assistant, lambda question: bool(question.row.get("thinking"))),
    "swapped": Kind(_swapped, lambda question: question.model == ADAPTER),
}
