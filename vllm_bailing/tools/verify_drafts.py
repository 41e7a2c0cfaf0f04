"""Drafts of the MTP layer: those that a deployment counts, and those that the reference makes for the same answers.

Greedy drafts are the same every time, so what the reference drafts after each token of an answer says how many drafts
that answer takes: speculative decoding is gone through once more. Rounding changes a draft here and there; the rounded
copies of the reference say how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_bailing.config import BailingMoeV2Config
    from vllm_bailing.tools.verify_reference import Reference


@dataclass(frozen=True)
class Drafts:
    """What a deployment counts.

    Attributes:
        made: How many times it drafted.
        accepted: How many of the first, second, ... drafted tokens it accepted; as many as it drafts at a time.
        requests: How many it has answered.
        unlike: Why they say nothing of the MTP layer over the answers that are compared; empty if nothing is known.
    """

    made: int
    accepted: list[int]
    requests: int = 0
    unlike: str = ""

    def since(self, before: Drafts) -> Drafts:
        """Those that were made after `before` was counted."""
        earlier = [*before.accepted, *[0] * len(self.accepted)]
        accepted = [now - then for now, then in zip(self.accepted, earlier, strict=False)]
        return Drafts(self.made - before.made, accepted, self.requests - before.requests, self.unlike)


def unlike_mtp(source: str) -> str:
    """Why drafts say nothing of a checkpoint's MTP layer, by `metrics.draft_source`; empty if nothing is known."""
    return f"what drafts is {source}" if source not in ("", "mtp") else ""


def not_checked(drafts: Drafts | None, config: BailingMoeV2Config, answered: list[int]) -> str:
    """Why a deployment's drafts say nothing of its MTP layer; empty if they do.

    Each step after an answer's first token has a draft of the MTP layer, and gives one token more than it accepts. What
    is accepted in the last step may reach beyond the answer.

    Args:
        answered: Length of each of the answers.
    """
    if drafts is None:
        return "the deployment made no drafts, or does not count them"
    if drafts.unlike:
        return drafts.unlike
    if len(config.mtp_layer_ids) > 1 and len(drafts.accepted) > 1:
        return "the checkpoint has several"
    steps = [length - 1 for length in answered if length > 1]
    given = drafts.made + sum(drafts.accepted)
    if given < sum(steps):
        return "not every step had a draft, so something else drafts"
    if drafts.requests > len(answered) or given > sum(steps) + len(steps) * len(drafts.accepted):
        return "drafts of others' requests were counted too"
    return ""


def made_for(answer: list[int], drafts: list[list[int]]) -> tuple[int, int]:
    """How many times a deployment drafts for an answer, and how many first drafted tokens it accepts.

    Args:
        answer: Token ids.
        drafts: After each of them but the last, the tokens that are drafted then.
    """
    known, made, accepted = 1, 0, 0  # the first token comes from the prompt
    while known < len(answer):
        agreeing = 0
        for draft, token in zip(drafts[known - 1], answer[known:], strict=False):
            if draft != token:
                break
            agreeing += 1
        made, accepted, known = made + 1, accepted + (agreeing > 0), known + agreeing + 1
    return made, accepted


@dataclass(frozen=True)
class DraftCheck:
    """A deployment's drafts beside the reference's.

    Attributes:
        drafts, accepted: How many times the deployment drafted, and how many first drafted tokens were accepted.
        expected: How many times each of the reference's copies drafts for the same answers.
    """

    drafts: int
    accepted: int
    expected: list[int]

    @property
    def range(self) -> tuple[int, int]:
        """The fewest and the most drafts that a right MTP layer makes: a little beyond what rounding was seen to do."""
        least, most = min(self.expected), max(self.expected)
        beyond = 1 + 0.02 * most
        return math.ceil(least - beyond), math.floor(most + beyond)

    @property
    def reason(self) -> str:
        """What speaks against the deployment's MTP layer; empty if nothing does."""
        least, most = self.range
        if least <= self.drafts <= most:
            return ""
        return f"its answers took {self.drafts} drafts, and {least} to {most} are right"


def checked(reference: Reference, answers: list[list[int]], prompts: list[int], drafts: Drafts) -> DraftCheck:
    """A deployment's drafts beside the reference's, after its `forward`.

    Args:
        answers: Token ids.
        prompts: Length of the prompt of each.
        drafts: What the deployment counts for all.
    """
    long = [answer for answer in answers if len(answer) > 1]
    copies = zip(*(each.tolist() for each in reference.drafts(prompts, len(drafts.accepted))), strict=True)
    expected = [sum(made_for(*one)[0] for one in zip(long, copy, strict=True)) for copy in copies]
    return DraftCheck(drafts.made, drafts.accepted[0], expected)
