"""Greedy answers stay what they are, whatever drafts."""

import pytest

from tests.support.cases import load_case
from tests.support.checkpoints import PROMPT, make_checkpoint
from tests.support.conversations import evenly
from tests.support.engine import TWO_RANKS, ask, make_llm, run_in_turn
from tests.support.speculation import answers, counters, mtp
from vllm_bailing import DEMO


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_greedy_answers_to_200_prompts_stay_the_same(tokens, plain_answers, drafted_answers):
    ids, counted = drafted_answers(tokens)
    assert ids == plain_answers
    assert counted["draft_tokens"] == tokens * counted["drafts"]
    # The demo's MTP layer was trained for the first position; the others run the same layer again.
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]


@pytest.mark.parametrize(
    ("options", "env"),
    [
        ({"max_num_batched_tokens": 64, "max_num_seqs": 8}, {}),
        ({"enable_prefix_caching": False}, {}),
        ({"num_gpu_blocks_override": 20, "block_size": 32, "max_model_len": 512}, {}),
        ({"async_scheduling": True}, {}),
        ({"async_scheduling": False}, {}),
        ({"enforce_eager": False}, {}),
        ({"tensor_parallel_size": 2}, TWO_RANKS),
        ({"tensor_parallel_size": 2, "enforce_eager": False}, TWO_RANKS),
    ],
    ids=["chunked", "no_prefix_cache", "preemption", "async", "sync", "compiled", "tp2", "tp2_compiled"],
)
def test_greedy_answers_stay_the_same_with(options, env, plain_answers):
    ids, counted = run_in_turn(answers, DEMO, 25, 2, env=env, **options)
    assert ids == evenly(plain_answers, 25)
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]
    assert (counted["preemptions"] > 0) == ("num_gpu_blocks_override" in options)


def continued(model, tokens, prompts):
    """Greedy continuations of `prompts`, and the counters."""
    llm = make_llm(model, speculative_config=mtp(tokens), disable_log_stats=False)
    return [ids for _, ids in ask(llm, prompts, max_tokens=24, logprobs=False)], counters(llm)


@pytest.mark.parametrize("layers", [1, 2])
def test_random_weights_with_more_draft_tokens_than_layers_change_no_answer(layers, tmp_path):
    """Nearly every draft is thrown away here, in contrast to the demo."""
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=layers, shards=4)  # each has a part of the MTP layers
    prompts = [PROMPT[start : start + 8 + 3 * start] for start in range(12)]
    wanted, _ = run_in_turn(continued, model, 0, prompts)
    ids, counted = run_in_turn(continued, model, 3, prompts)
    assert ids == wanted
    assert counted["accepted_tokens"] < 0.5 * counted["drafts"]


@pytest.mark.parametrize("case", ["mtp", "mtp_yarn"])
def test_greedy_answers_to_the_recorded_prompts_stay_the_same(case):
    model, expected = load_case(case)
    for tokens in (1, 2, 3):
        ids, counted = run_in_turn(continued, model, tokens, [expected["input_ids"].tolist()])
        assert ids[0][:16] == expected["greedy_ids"].tolist()
        assert counted["draft_tokens"] > 0
