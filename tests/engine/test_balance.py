"""Picks of experts that `vllm-bailing balance` records on running engines, against the plain PyTorch model's router."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from tests.support.conversations import greedy
from tests.support.engine import TWO_RANKS, run
from tests.support.versions import since
from vllm_bailing import DEMO
from vllm_bailing.balance import recording
from vllm_bailing.config import read_config
from vllm_bailing.tools.prompts import Prompt

TEXTS = ("What is YaRN?", "Tell me about vLLM, and about the experts of its models.", "Hello")
PROMPTS = [Prompt([{"role": "user", "content": text}]) for text in TEXTS]
TOKENS = 12
ENGINE = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory_bytes": 2**26}


def recorded(**options):
    """(picks, tokens of each request, numbers of the layers)"""
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule the size above
    # Two steps for the longer of them.
    engine = {**ENGINE, "max_num_batched_tokens": 24, "max_num_seqs": 4, **options}
    trace = recording.offline(str(DEMO), read_config(DEMO), PROMPTS, TOKENS, engine)
    return trace.picks, trace.lengths, trace.layers


@since("0.32", "routers on CPUs that can be watched")
@pytest.mark.parametrize(
    ("env", "options"),
    [({}, {}), (TWO_RANKS, {"tensor_parallel_size": 2, "enable_expert_parallel": True})],
    ids=["one rank", "expert-parallel ranks"],
)
def test_recorded_picks_are_the_plain_routers(env, options, plain):
    picks, lengths, layers = run(recorded, env=env, **options)
    assert layers == (1, 2, 3)
    prompts = [prompt.token_ids(plain.tokenizer) for prompt in PROMPTS]
    answers = [answer[:TOKENS] for answer in greedy(plain, prompts)]
    sequences = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    assert lengths == tuple(map(len, sequences))
    for sequence, found in zip(sequences, np.split(picks, np.cumsum(lengths)[:-1]), strict=True):
        with torch.no_grad():
            routing = plain.model(torch.tensor([sequence]), output_router_logits=True).routing
        wanted = np.stack([ids.numpy() for ids, _ in routing], 1)
        assert np.array_equal(np.sort(found), np.sort(wanted))
