"""What a running server says of itself, to be held against a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_bailing.errors import ReportError, shown
from vllm_bailing.tools import metrics
from vllm_bailing.tools.chat import base_of, http_client
from vllm_bailing.tools.doctor import Check
from vllm_bailing.tools.doctor_server import SECONDS, json_of, server


@dataclass(frozen=True)
class Live:
    """A server; None where it does not say.

    Attributes:
        checks: What `doctor --url` finds.
        model: Its name of the model.
        window: Longest request in tokens.
        kv_tokens: Tokens that its KV cache holds, over all engines.
        kv_dtype: Data type of the KV cache.
        memory_utilization: Share of a GPU's memory that it may use.
        draft_tokens: Drafts in a step.
        tokens_per_s: Of one request, as the mean over all requests since the start.
        requests: Answers since the start.
    """

    url: str
    checks: list[Check]
    model: str
    window: int | None
    kv_tokens: int | None
    kv_dtype: str | None
    memory_utilization: float | None
    draft_tokens: int
    tokens_per_s: float | None
    requests: int


def ask(url: str, model: str | None = None, seconds: float = SECONDS) -> Live:
    """Ask a running server.

    Args:
        model: The server's name of the model; its first one if left out.
        seconds: That it may take for each answer.
    Raises:
        ReportError: If it does not answer, or has no such model.
    """
    import httpx

    checks = list(server(url, model, seconds))
    for check in checks:
        if check.ok is False and check.name in ("server", "model"):
            raise ReportError(f"--url {shown(check.detail)}; {check.fix}")
    try:
        with http_client(url, seconds) as client:
            text, models = client.get("/metrics").text, json_of(client.get("/v1/models"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ReportError(f"--url {base_of(url)}: {shown(error) or type(error).__name__}") from None
    served = [entry for entry in models.get("data") or [] if isinstance(entry, dict)]
    (chosen, *_) = [entry for entry in served if entry.get("id") == model] or served
    return Live(base_of(url), checks, str(chosen.get("id")), chosen.get("max_model_len"), **_of_metrics(text))


def _of_metrics(text: str) -> dict[str, Any]:
    samples = _samples(text)

    def found(name: str) -> list[Any]:
        return samples.get(f"vllm:{name}", [])

    def total(name: str) -> float:
        return sum(sample.value for sample in found(name))

    caches = [sample.labels for sample in found("cache_config_info")]
    blocks = [_value(int, cache.get("num_gpu_blocks")) for cache in caches]
    sizes = [_value(int, cache.get("block_size")) for cache in caches]
    rooms = [count * size for count, size in zip(blocks, sizes, strict=True) if count and size]
    seconds, tokens = total("inter_token_latency_seconds_sum"), total("inter_token_latency_seconds_count")
    positions = {sample.labels.get("position") for sample in found("spec_decode_num_accepted_tokens_per_pos_total")}
    first = caches[0] if caches else {}
    return {
        "kv_tokens": sum(rooms) if rooms else None,
        "kv_dtype": first.get("cache_dtype"),
        "memory_utilization": _value(float, first.get("gpu_memory_utilization")),
        "draft_tokens": len(positions),
        "tokens_per_s": tokens / seconds if seconds > 0 else None,
        "requests": int(total("request_success_total")),
    }


def _samples(text: str) -> dict[str, list[Any]]:
    """The samples of a text of metrics by name; none if it is something else."""
    try:
        return metrics.samples(text)
    except (ValueError, LookupError):
        return {}


def _value(kind: Callable[[Any], Any], text: Any) -> Any:
    try:
        return kind(text)
    except (TypeError, ValueError):
        return None
