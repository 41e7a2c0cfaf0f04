"""Weights that are loaded again into a running engine."""

import torch

from tests.support.checkpoints import PROMPT, make_checkpoint, plain_answer
from tests.support.engine import TOLERANCE, ask, make_llm, run_in_turn


def _before_and_after_reload(model):
    llm = make_llm(model)
    before = ask(llm, [PROMPT])
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    return before[0], ask(llm, [PROMPT])[0]


def test_reloading_leaves_the_same_model(tmp_path):
    before, after = run_in_turn(_before_and_after_reload, make_checkpoint(tmp_path))
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def _other_weights(model, other):
    llm = make_llm(model)
    ask(llm, [PROMPT])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    llm.reset_prefix_cache()
    return ask(llm, [PROMPT])[0]


def test_reloading_other_weights_serves_those(tmp_path):
    model, other = make_checkpoint(tmp_path / "first"), make_checkpoint(tmp_path / "second", seed=1)
    wanted, wanted_ids = plain_answer(other, PROMPT)
    logprobs, token_ids = run_in_turn(_other_weights, model, other)
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids
