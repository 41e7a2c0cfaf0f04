"""The served model against what the official code and the plain PyTorch reference compute."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.cases import CASES, load_case
from tests.support.checkpoints import PROMPT, make_checkpoint, plain_answer
from tests.support.config_switches import SWITCHES, VARIANTS
from tests.support.engine import TOLERANCE, TWO_RANKS, generate, run_in_turn


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_engine_computes_what_the_official_code_computes(case, mode, tp_size):
    model, expected = load_case(case)
    prompt = expected["input_ids"].tolist()
    ((logprobs, token_ids),) = run_in_turn(
        generate,
        model,
        [prompt],
        env=TWO_RANKS if tp_size == 2 else None,
        enforce_eager=mode == "eager",
        tensor_parallel_size=tp_size,
    )
    wanted = expected["logits"].log_softmax(-1)[:-1]
    assert logprobs.shape == wanted.shape
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == expected["greedy_ids"].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_computes_what_the_plain_reference_computes(variant, tmp_path):
    model = make_checkpoint(tmp_path, **SWITCHES[variant])
    wanted, wanted_ids = plain_answer(model, PROMPT)
    ((logprobs, token_ids),) = run_in_turn(generate, model, [PROMPT])
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


@pytest.mark.parametrize("shards", [1, 5])
def test_one_key_value_head_is_copied_to_both_ranks(shards, tmp_path):
    model = make_checkpoint(tmp_path, shards=shards, num_key_value_heads=1, num_shared_experts=2, use_qkv_bias=True)
    wanted, wanted_ids = plain_answer(model, PROMPT)
    ((logprobs, token_ids),) = run_in_turn(generate, model, [PROMPT], env=TWO_RANKS, tensor_parallel_size=2)
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


def test_pipeline_stages_compute_the_same(tmp_path):
    model = make_checkpoint(tmp_path, tie_word_embeddings=True)
    wanted, wanted_ids = plain_answer(model, PROMPT)
    # vLLM's CPU worker prepares the tensors between stages only while it warms up a really compiled model.
    env = {**TWO_RANKS, "VLLM_CPU_CI_ENV": "0"}
    ((logprobs, token_ids),) = run_in_turn(
        generate, model, [PROMPT], env=env, enforce_eager=False, pipeline_parallel_size=2
    )
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


@torch.no_grad()
def _traced(folder):
    """Logits of the plain model, traced by torch.compile and not."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    ids = torch.tensor([PROMPT])
    return compiled(ids, use_cache=False).logits, model(ids).logits


def test_torch_compile_traces_the_plain_reference(tmp_path):
    few = {"num_hidden_layers": 2, "num_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
    traced, plain = run_in_turn(_traced, make_checkpoint(tmp_path, **few))
    torch.testing.assert_close(traced, plain, atol=1e-4, rtol=1e-4)
