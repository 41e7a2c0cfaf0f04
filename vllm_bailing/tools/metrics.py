"""What a server of vLLM counts, as it shows it at /metrics."""

from __future__ import annotations

from typing import Any

DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens_per_pos"

PLUGIN = "bailing_plugin_info"  # published by `plugin.checks.publish_version`


def samples(text: str) -> dict[str, list[Any]]:
    """The samples of prometheus_client by name, those of all engines behind a server.

    Args:
        text: What /metrics answers.
    """
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def counters(text: str) -> tuple[int, list[int]]:
    """Drafts, and accepted tokens by position, of all engines behind a server.

    Args:
        text: What /metrics answers.
    """
    found, accepted = samples(text), dict[int, float]()
    for sample in found.get(f"{ACCEPTED}_total", []):
        position = int(sample.labels["position"])
        accepted[position] = accepted.get(position, 0) + sample.value
    drafts = sum(sample.value for sample in found.get(f"{DRAFTS}_total", []))
    return round(drafts), [round(accepted[position]) for position in sorted(accepted)]


def answered(text: str) -> int:
    """Requests that all engines behind a server have answered.

    Args:
        text: What /metrics answers.
    """
    return round(sum(sample.value for sample in samples(text).get("vllm:request_success_total", [])))


def draft_source(text: str) -> str:
    """What drafts: "mtp" for the checkpoint's own MTP layer as it is; empty if nothing does or nobody says.

    Args:
        text: What /metrics answers.
    """
    return next((sample.labels.get("drafts", "") for sample in samples(text).get(PLUGIN, [])), "")
