"""Acceptance of a running server, from the counters that it shows at /metrics."""

from __future__ import annotations

from typing import Any

from vllm_bailing.bench.mtp import acceptance_of, difference
from vllm_bailing.errors import BenchError, first_of, shown
from vllm_bailing.tools.chat import base_of, connect, http_client, model_names
from vllm_bailing.tools.metrics import DRAFTS, counters, samples
from vllm_bailing.tools.no_answer import no_answer
from vllm_bailing.tools.prompts import Prompt

_SECONDS = 30


def read(url: str) -> tuple[int, list[int]]:
    """`counters` of the server at `url`.

    Raises:
        BenchError: If it does not answer, or does not speculate.
    """
    import httpx

    address = f"{base_of(url)}/metrics"
    try:
        with http_client(url, _SECONDS) as client:
            text = client.get("/metrics").raise_for_status().text
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BenchError(no_answer(url, error)) from None
    if f"{DRAFTS}_total" not in text:
        raise BenchError(f"{address} counts no drafts; start the server with --speculative-config")
    return counters(samples(text))


def ask(url: str, model: str, prompts: list[Prompt], max_tokens: int) -> dict[str, dict[str, Any]]:
    """Acceptance by kind of prompt, of all together under "all"; without prompts, since the server started.

    Others who use the server at the same time are counted too.

    Args:
        model: The server's name of it.
    Raises:
        BenchError: If a request fails.
    """
    if not prompts:
        return {"all": acceptance_of(*read(url))}
    import openai

    client = connect(url)
    if (names := model_names(client)) and model not in names:
        raise BenchError(f"{base_of(url)} has {first_of(names)}, and not {shown(model)}; name what it has")
    result: dict[str, dict[str, Any]] = {}
    start = read(url)
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        before = read(url)
        for prompt in prompts:
            if prompt.kind != kind:
                continue
            messages: Any = prompt.messages
            options: dict[str, Any] = {"tools": prompt.tools} if prompt.tools else {}
            try:
                client.chat.completions.create(
                    model=model,
                    messages=messages,
                    max_tokens=max_tokens,
                    temperature=0,
                    extra_body={"chat_template_kwargs": prompt.template} if prompt.template else {},
                    **options,
                )
            except openai.OpenAIError as error:
                raise BenchError(no_answer(url, error)) from None
        if kind:
            result[kind] = acceptance_of(*difference(read(url), before))
    return {"all": acceptance_of(*difference(read(url), start))} | result
