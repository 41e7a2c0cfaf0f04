"""The MTP layer as it is trained: run several times in a row, as at inference, against the target's distribution.

Letters as in `reference_layers.py`; row r has the hidden state of token r and is given token r + 1. Step k of it
predicts token r + 1 + k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.planning.training import LOSS_ROWS
from vllm_bailing.reference_layers import BailingMoeV2MTPLayer, BailingMoeV2SparseMoe, rotary_cos_sin

# Weight of each further step in the loss, a factor each: a draft there is of use only if those before were accepted.
DECAY = 0.8
# At a token whose draft is not counted: of a prompt, of padding, or past the end.
NOT_COUNTED = -100


class MtpDraft(nn.Module):
    """An MTP layer between the target's embedding and head, which stay as they are and are not saved with it.

    Args:
        layer: The one that is trained.
        embedding: [vocab, H] of the target.
        head: [vocab, H] of the target, normalized if the configuration asks for it.
        steps: Draft tokens that it learns.
    """

    embedding: Tensor
    head: Tensor
    loads: Tensor

    def __init__(
        self, config: BailingMoeV2Config, layer: BailingMoeV2MTPLayer, embedding: Tensor, head: Tensor, steps: int
    ) -> None:
        super().__init__()
        if isinstance(layer.mlp, BailingMoeV2SparseMoe):
            # One that gets no token has a gradient of zeros then, and is moved alike however a batch is divided.
            layer.mlp.calls_every_expert = True
        self.config, self.layer, self.steps = config, layer, steps
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("head", head, persistent=False)
        # Tokens that each expert got since the last step of the optimizer.
        self.register_buffer("loads", torch.zeros(config.num_experts), persistent=False)

    def forward(self, input_ids: Tensor, hidden_states: Tensor, labels: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Loss of a batch as `states.collate` makes it, and outside of training which drafts were right.

        Returns:
            `loss`, the mean over the steps of the Kullback-Leibler divergence from the target, in nats; and in
            evaluation `matches` [B, A, steps] int64, a row for each token of the answer but the last (A at most):
            whether the draft's favourite is the target's, or `NOT_COUNTED`.
        """
        states = hidden_states.to(self.embedding.dtype)
        rows, is_row = answer_rows(labels, lengths)
        sums, counts, matches = [], [], []
        for step, drafted in enumerate(self.unrolled(input_ids, states, rows, lengths), 1):
            counted = is_row & (rows + step + 1 < lengths[:, None])
            wanted = taken(states, rows + step)[counted]
            parts = [
                checkpoint(self._compared, *pair, use_reentrant=False)
                for pair in zip(drafted[counted].split(LOSS_ROWS), wanted.split(LOSS_ROWS), strict=True)
            ]
            sums.append(torch.stack([divergence for divergence, _ in parts]).sum())
            counts.append(len(wanted))
            row = torch.full(counted.shape, NOT_COUNTED, device=input_ids.device)
            row[counted] = torch.cat([is_same for _, is_same in parts]).long()
            matches.append(row)
        loss = weighted_mean(torch.stack(sums), torch.tensor(counts, device=input_ids.device))
        return {"loss": loss} if self.training else {"loss": loss, "matches": torch.stack(matches, -1)}

    def _compared(self, came: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the divergences of rows [N, H] from the target's, and whether each has the same favourite [N]."""
        with torch.no_grad():
            target = self.logits(wanted)
        draft = self.logits(came)
        divergence = F.kl_div(draft.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
        return divergence, draft.argmax(-1) == target.argmax(-1)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[N, vocab] in fp32 of [N, H]."""
        return F.linear(hidden_states.to(self.head.dtype), self.head).float()

    def unrolled(self, input_ids: Tensor, hidden_states: Tensor, rows: Tensor, lengths: Tensor) -> list[Tensor]:
        """The layer's output [B, A, H] of each step at `rows` [B, A].

        The first step runs over the whole, since its keys are what all look at. A later one is fed the output of the
        one before and the token that follows, and sees what it sees at inference: keys of the first step up to its own
        row, and those of its own further steps. Rows that have no such token any more hold numbers without meaning.
        """
        whole = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)[None]
        cache: Any = DynamicCache()
        first = self._step(input_ids[:, 1:], hidden_states[:, :-1], whole, None, cache, whole + 1 < lengths[:, None])
        outputs = [taken(first, rows)]
        own = torch.eye(rows.shape[1], dtype=torch.bool, device=rows.device).expand(len(rows), -1, -1)
        mask = whole[:, None] <= rows[..., None]  # [B, A, T - 1]
        for step in range(1, self.steps):
            mask = torch.cat((mask, own), dim=2)
            following = taken(input_ids, rows + step + 1)
            is_real = rows + step + 1 < lengths[:, None]
            outputs.append(self._step(following, outputs[-1], rows + step, mask[:, None], cache, is_real))
        return outputs

    def _step(
        self, next_ids: Tensor, previous: Tensor, positions: Tensor, mask: Tensor | None, cache: Any, is_real: Tensor
    ) -> Tensor:
        """One run of the layer over rows [B, R]; counts where `is_real` which experts they go to."""
        joined = self.layer.join(F.embedding(next_ids, self.embedding), previous)
        output, routing = self.layer(joined, *rotary_cos_sin(self.config, positions), mask, cache)
        if self.training and routing is not None:
            chosen = routing[0][is_real.expand(next_ids.shape).flatten()]
            self.loads += torch.bincount(chosen.flatten(), minlength=len(self.loads))
        return self.layer.final_layernorm(output)

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Nudge every expert's bias against the sign of its load error.

        Source: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664.
        """
        if isinstance(self.layer.mlp, BailingMoeV2SparseMoe) and rate:
            bias: Any = self.layer.mlp.gate.expert_bias
            loads = over_ranks(self.loads)
            bias += rate * (loads.mean() - loads).sign()
        self.loads.zero_()


def rank_of() -> tuple[int, int]:
    """Number of this process among those that train the layer together, and how many they are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def over_ranks(values: Tensor) -> Tensor:
    """`values`, which become their sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def weighted_mean(sums: Tensor, counts: Tensor) -> Tensor:
    """Loss of all ranks together: each step's mean, weighted by `DECAY`. Its gradient is that of this rank's part.

    Args:
        sums: [steps] fp32, of this rank's tokens.
        counts: [steps], its tokens, whose number differs between ranks.
    """
    _, ranks = rank_of()
    all_sums, all_counts = over_ranks(torch.stack((sums.detach(), counts.float())))
    weights = DECAY ** torch.arange(len(sums), device=sums.device)
    # A batch of answers that are too short for a step has nothing to say about it.
    weights = weights / weights.sum() / all_counts.clamp(min=1)
    part = (sums * weights).sum() * ranks  # of which the sharded layer takes the mean over the ranks
    return part + ((all_sums * weights).sum() - part).detach()


def answer_rows(labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, A] whose given token is of the answer, and which of them there are; the others repeat the last."""
    first = labels.int().argmax(1) - 1
    count = lengths - 1 - first - 1  # the last token of an answer has none after it that could be drafted
    rows = first[:, None] + torch.arange(max(1, int(count.max())), device=labels.device)
    is_row = rows < (first + count)[:, None]
    return rows.clamp(max=labels.shape[1] - 2), is_row


def taken(values: Tensor, rows: Tensor) -> Tensor:
    """`values` [B, T, ...] at `rows` [B, A], the last one past the end."""
    rows = rows.clamp(max=values.shape[1] - 1)
    return values[torch.arange(len(values), device=values.device)[:, None], rows]


def engine_steps(matches: np.ndarray) -> np.ndarray:
    """What a greedy engine accepts at each of its steps through an answer.

    Args:
        matches: [A, steps] of one answer, of `MtpDraft.forward`.
    Returns:
        [N, steps] int64 for N steps of the engine: whether the draft up to there was accepted, or `NOT_COUNTED` past
        the end of the answer. A step begins after the token that the target gave in the one before.
    """
    counted = np.flatnonzero(matches[:, 0] != NOT_COUNTED)
    found: list[np.ndarray] = []
    row, end = (int(counted[0]), int(counted[-1])) if len(counted) else (0, -1)
    while row <= end:
        accepted = np.cumprod(matches[row] == 1)
        found.append(np.where(matches[row] == NOT_COUNTED, NOT_COUNTED, accepted))
        row += int(accepted.sum()) + 1
    return np.array(found, dtype=np.int64).reshape(-1, matches.shape[1])
