"""What vLLM counts of drafts and of those that were accepted."""

from __future__ import annotations

DRAFTS, ACCEPTED = "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_accepted_tokens_per_pos"


def counters(text: str) -> tuple[int, list[int]]:
    """Drafts, and accepted tokens by position, of all engines behind a server.

    Args:
        text: What /metrics answers.
    """
    from prometheus_client.parser import text_string_to_metric_families

    drafts, accepted = 0.0, dict[int, float]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{DRAFTS}_total":
                drafts += sample.value
            elif sample.name == f"{ACCEPTED}_total":
                position = int(sample.labels["position"])
                accepted[position] = accepted.get(position, 0) + sample.value
    return round(drafts), [round(accepted[position]) for position in sorted(accepted)]
