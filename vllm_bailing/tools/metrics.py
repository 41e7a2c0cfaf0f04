"""What a server of vLLM counts, as it shows it at /metrics."""

from __future__ import annotations

from typing import Any

DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens_per_pos"
PLUGIN = "bailing_plugin_info"  # published by `plugin.checks.publish_version`
Counted = dict[str, list[Any]]  # samples of prometheus_client by name


def samples(text: str) -> Counted:
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


def total(counted: Counted, what: str) -> int:
    """A counter of vLLM, over all engines behind a server."""
    return round(sum(sample.value for sample in counted.get(f"vllm:{what}_total", [])))


def counters(counted: Counted) -> tuple[int, list[int]]:
    """Drafts, and accepted tokens by position, of all engines behind a server."""
    accepted = dict[int, float]()
    for sample in counted.get(f"{ACCEPTED}_total", []):
        position = int(sample.labels["position"])
        accepted[position] = accepted.get(position, 0) + sample.value
    drafts = total(counted, DRAFTS.removeprefix("vllm:"))
    return drafts, [round(accepted[position]) for position in sorted(accepted)]


def draft_source(counted: Counted) -> str:
    """What drafts: "mtp" for the checkpoint's own MTP layer as it is; empty if nothing does or nobody says."""
    return next((sample.labels.get("drafts", "") for sample in counted.get(PLUGIN, [])), "")
