"""What a running server says of itself, to be held against a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_bailing.errors import ReportError, shown
from vllm_bailing.tools.chat import base_of
from vllm_bailing.tools.doctor import Check
from vllm_bailing.tools.doctor_server import SECONDS, Counted, Said, server


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
        root: What it was started on, as it names it; empty if it does not.
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
    root: str = ""


def ask(url: str, model: str | None = None, seconds: float = SECONDS) -> Live:
    """Ask a running server.

    Args:
        model: The server's name of the model; its first one if left out.
        seconds: That it may take for each answer.
    Raises:
        ReportError: If it does not answer, or has no such model.
    """
    said = Said()
    checks = list(server(url, model, seconds, said))
    for check in checks:
        if check.ok is False and check.name in ("server", "model"):
            raise ReportError(f"{shown(check.detail)}; {check.fix}")
    name = model or next(iter(said.models))
    window = said.models[name].get("max_model_len")
    root = str(said.models[name].get("root") or "")
    return Live(base_of(url), checks, name, window, **_of_metrics(said.counted), root=root)


def _of_metrics(samples: Counted) -> dict[str, Any]:
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


def _value(kind: Callable[[Any], Any], text: Any) -> Any:
    try:
        return kind(text)
    except (TypeError, ValueError):
        return None
