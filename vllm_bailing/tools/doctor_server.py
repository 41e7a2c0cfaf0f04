"""Checks of a running server: whether it answers, and what answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vllm_bailing.errors import shown
from vllm_bailing.tools.chat import NOT_READY, base_of, http_client
from vllm_bailing.tools.doctor import Check
from vllm_bailing.tools.metrics import DRAFTS, PLUGIN, Counted, samples, total
from vllm_bailing.tools.no_answer import no_answer, refusal, tells_dead_engine

SECONDS = 30.0  # for an answer; an engine whose peer died takes requests and never answers
TOKEN = "a token"  # the check that has the server generate one
_TOOL = {"type": "function", "function": {"name": "noop", "parameters": {"type": "object", "properties": {}}}}


@dataclass
class Said:
    """What a server said while it was checked, for those who want more of it.

    Attributes:
        counted: Of /metrics; empty if it shows something else.
        models: Of /v1/models, by name.
    """

    counted: Counted = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)


def server(url: str, model: str | None = None, seconds: float = SECONDS, said: Said | None = None) -> Iterator[Check]:
    """Checks of the server at `url`, which end with a generated token; nothing is sent anywhere else.

    Args:
        model: The server's name of the model; its first one if left out.
        seconds: That it may take for each answer.
        said: Is filled with what it says.
    """
    import httpx

    base = base_of(url)
    try:
        with http_client(url, seconds) as client:
            yield from _checks(client, base, model, said or Said())
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        yield Check("server", False, *no_answer(base, error, seconds))


def _checks(client: Any, base: str, model: str | None, said: Said) -> Iterator[Check]:
    health = client.get("/health")
    if health.status_code != 200:
        todo = "restart it: see the end of its log"
        if health.status_code in NOT_READY:
            todo = f"wait until it has loaded its model; if it had, {todo}"
        yield Check("server", False, f"{base}: HTTP {health.status_code}", todo)
        return
    vllm = json_of(client.get("/version")).get("version")
    listed = client.get("/v1/models")
    if listed.status_code in (401, 403) or listed.is_redirect:
        yield Check("server", False, *refusal(base, listed.status_code, listed.reason_phrase))
        return
    models = json_of(listed).get("data")
    found = models if isinstance(models, list) else []
    said.models = names = {str(entry.get("id")): entry for entry in found if isinstance(entry, dict)}
    if not names:
        yield Check("server", False, f"{base} lists no models; is it a vLLM server?", "correct --url")
        return
    yield Check("server", True, f"{base}, vLLM {shown(str(vllm))}" if vllm else f"{base}, not vLLM by its own words")
    said.counted = counted = _counted(client)
    yield _plugin(counted)
    if model and model not in names:
        known = ", ".join(map(shown, names))
        yield Check("model", False, f"the server has {known}", "name one of them by --served-model-name")
        return
    name = model or next(iter(names))
    yield Check("model", True, f"{shown(name)}, window of {names[name].get('max_model_len', '?')} tokens")
    yield from _chat(client, name)
    yield _drafts(counted)
    yield _token(client, name, counted)


def json_of(response: Any) -> dict[str, Any]:
    """The object that a response holds; an empty one if it holds anything else."""
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _counted(client: Any) -> Counted:
    """The samples of /metrics; none if it shows something else, which is no fault of a server."""
    try:
        return samples(client.get("/metrics").text)
    except (ValueError, LookupError):
        return {}


def _plugin(counted: Counted) -> Check:
    for sample in counted.get(PLUGIN, []):
        return Check("plugin", True, f"vllm-bailing {shown(sample.labels.get('version', '?'))}")
    return Check(
        "plugin",
        None,
        "not seen: vLLM's own class, a router in front, or --disable-log-stats",
        "pip install vllm-bailing where the server runs",
    )


def _chat(client: Any, name: str) -> Iterator[Check]:
    messages = [{"role": "user", "content": "Hi"}]
    tokens = json_of(client.post("/tokenize", json={"model": name, "messages": messages})).get("count")
    if isinstance(tokens, int):
        yield Check("chat template", True, f"makes {tokens} tokens of a message of one word")
    else:
        yield Check("chat template", None, "none, or no /tokenize: a base model, or another server")
        return
    request = {"model": name, "messages": messages, "tools": [_TOOL], "tool_choice": "auto", "max_tokens": 1}
    if client.post("/v1/chat/completions", json=request).status_code == 200:
        yield Check("tool calls", True, "taken")
    else:
        flags = "--enable-auto-tool-choice --tool-call-parser bailing"
        yield Check("tool calls", None, f"refused: the server was started without {flags}")


def _drafts(counted: Counted) -> Check:
    drafted, accepted = (total(counted, f"spec_decode_num_{what}") for what in ("draft_tokens", "accepted_tokens"))
    if not drafted:
        return Check("drafts", None, "none yet" if f"{DRAFTS}_total" in counted else "none")
    return Check("drafts", True, f"{accepted / drafted:.0%} of {drafted:,.0f} draft tokens were accepted")


def _token(client: Any, name: str, before: Counted) -> Check:
    import httpx

    # A prompt of one token id: it needs no tokenizer and no template.
    request = {"model": name, "prompt": [0], "max_tokens": 1, "temperature": 0}
    try:
        response = client.post("/v1/completions", json=request)
    except httpx.ReadTimeout:
        limit, after = client.timeout.read, _counted(client)
        done = sum(total(after, what) - total(before, what) for what in ("generation_tokens", "prompt_tokens"))
        if done > 0:  # a queue is no fault, and a probe must not end a server for it
            return Check(TOKEN, None, f"still in the queue after {limit:g} s; {done:,.0f} others were computed")
        return Check(TOKEN, False, f"no answer within {limit:g} s", "restart the server: its engine stands still")
    usage = json_of(response).get("usage") or {}
    if response.status_code == 200 and usage.get("completion_tokens") == 1:
        return Check(TOKEN, True, f"generated in {response.elapsed.total_seconds():.1f} s")
    error = json_of(response).get("error") or {}
    reason = error.get("message") if isinstance(error, dict) else error
    if tells_dead_engine(str(reason)):
        return Check(TOKEN, False, "the server's engine has ended", "start the server again; its log says why")
    detail = f"HTTP {response.status_code}: {shown(str(reason or 'no token'))}"
    return Check(TOKEN, False, detail, "see the end of the server's log")
