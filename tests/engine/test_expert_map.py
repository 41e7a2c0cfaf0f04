"""Picks of experts that a rank holds, against what all ranks together have to compute."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.engine import run_in_turn


def _sums_of_ranks(cases):
    from vllm_bailing.plugin.kernels.cpu_experts import picks_of_this_rank

    found = []
    for values, weights, ids, owner, ranks in cases:
        total = torch.zeros(len(ids), dtype=torch.float64)
        for rank in range(ranks):
            held = (owner == rank).nonzero().flatten()
            expert_map = torch.full((len(owner),), -1, dtype=torch.int32)
            expert_map[held] = torch.arange(len(held), dtype=torch.int32)
            if not len(held):
                continue
            part, local = picks_of_this_rank(weights, ids, expert_map)
            assert part.shape == local.shape and local.dtype == ids.dtype
            assert ids.shape[1] >= part.shape[1] >= 1 or not len(ids)
            total += (values[held][local.long()] * part).sum(1)
        found.append(total)
    return found


@st.composite
def routings(draw):
    """(value of each expert, weights and ids of each token's picks, the rank that holds each expert, ranks)."""
    experts, ranks = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    tokens, top_k = draw(st.integers(0, 9)), draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].int()
    weights = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    owner = torch.randint(ranks, (experts,), generator=generator)
    return torch.randn(experts, generator=generator, dtype=torch.float64), weights, ids, owner, ranks


def test_all_ranks_together_compute_every_pick_once():
    cases = []

    @given(routings())
    def collect(case):
        cases.append(case)

    collect()
    for case, total in zip(cases, run_in_turn(_sums_of_ranks, cases), strict=True):
        values, weights, ids, *_ = case
        torch.testing.assert_close(total, (values[ids.long()] * weights).sum(1))
