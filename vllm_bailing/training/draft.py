"""The MTP layer as it is trained: run several times in a row, as at inference, against the target's distribution.

Letters as in `reference_layers.py`; row r has the hidden state of token r and is given token r + 1. Step k of it
predicts token r + 1 + k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
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
        self.config, self.layer, self.steps = config, layer, steps
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("head", head, persistent=False)
        # Tokens that each expert got since the last step of the optimizer.
        self.register_buffer("loads", torch.zeros(config.num_experts), persistent=False)

    def forward(self, input_ids: Tensor, hidden_states: Tensor, labels: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Loss of a batch as `states.collate` makes it, and outside of training which drafts were right.

        Returns:
            `loss`, the mean over the steps of the Kullback-Leibler divergence from the target, in nats; and in
            evaluation `matches` [B, T - 1, steps] int64: whether the draft's favourite is the target's, or
            `NOT_COUNTED`.
        """
        states = hidden_states.to(self.embedding.dtype)
        losses, matches = [], []
        for step, drafted in enumerate(self.unrolled(input_ids, states, lengths), 1):
            counted = self._counted(labels, step)
            wanted = F.pad(states[:, step:], (0, 0, 0, step))[:, : counted.shape[1]][counted]
            parts = [
                checkpoint(self._compared, *pair, use_reentrant=False)
                for pair in zip(drafted[counted].split(LOSS_ROWS), wanted.split(LOSS_ROWS), strict=True)
            ]
            # A batch of answers that are too short for a step has nothing to say about it.
            losses.append(sum(divergence for divergence, _ in parts) / max(1, len(wanted)))
            row = torch.full(counted.shape, NOT_COUNTED, device=input_ids.device)
            row[counted] = torch.cat([is_same for _, is_same in parts]).long()
            matches.append(row)
        weights = [DECAY**step for step in range(len(losses))]
        loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
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

    def unrolled(self, input_ids: Tensor, hidden_states: Tensor, lengths: Tensor) -> list[Tensor]:
        """The layer's output [B, T - 1, H] of each step.

        A later step is fed the output of the one before and the token that follows, and sees what it sees at
        inference: keys of the first step up to its own row, and those of its own further steps. Rows that have no such
        token any more hold numbers without meaning.
        """
        rows, device = input_ids.shape[1] - 1, input_ids.device
        cache: Any = DynamicCache()
        own = torch.eye(rows, dtype=torch.bool, device=device)
        mask = torch.ones(rows, rows, dtype=torch.bool, device=device).tril()
        previous, outputs = hidden_states[:, :-1], []
        for step in range(self.steps):
            following = F.pad(input_ids[:, step + 1 :], (0, min(step, rows)))[:, :rows]
            joined = self.layer.join(F.embedding(following, self.embedding), previous)
            positions = torch.arange(step, rows + step, device=device)[None]
            cos, sin = rotary_cos_sin(self.config, positions)
            output, routing = self.layer(joined, cos, sin, mask[None, None], cache)
            if self.training and routing is not None:
                is_real = (torch.arange(rows, device=device) + step + 1 < lengths[:, None]).flatten()
                self.loads += torch.bincount(routing[0][is_real].flatten(), minlength=len(self.loads))
            previous = self.layer.final_layernorm(output)
            outputs.append(previous)
            mask = torch.cat((mask, own), dim=1)
        return outputs

    @staticmethod
    def _counted(labels: Tensor, step: int) -> Tensor:
        """[B, T - 1] rows whose given token and whose wanted token are of the answer."""
        wanted = F.pad(labels[:, step + 1 :], (0, step))[:, : labels.shape[1] - 1]
        return labels[:, 1:] & wanted

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Nudge every expert's bias against the sign of its load error.

        Source: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664.
        """
        if isinstance(self.layer.mlp, BailingMoeV2SparseMoe) and rate:
            bias: Any = self.layer.mlp.gate.expert_bias
            bias += rate * (self.loads.mean() - self.loads).sign()
        self.loads.zero_()


def engine_steps(matches: np.ndarray) -> np.ndarray:
    """What a greedy engine accepts at each of its steps through an answer.

    Args:
        matches: [T, steps] of one answer, of `MtpDraft.forward`.
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
