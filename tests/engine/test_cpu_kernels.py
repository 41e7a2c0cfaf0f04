"""The AVX-512 bf16 kernels: the same answers as vLLM's own choice, and out of the way where they cannot be."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.support.cases import load_case
from tests.support.conversations import HELD_OUT
from tests.support.engine import ask, generate, make_llm, run, run_in_turn
from vllm_bailing import DEMO

pytestmark = [
    pytest.mark.skipif(
        not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        reason="needs a CPU with AVX-512 bf16 and without AMX",
    ),
]
PORTABLE = {"bailing_cpu_kernels": False}
PLAIN = {**PORTABLE, "bailing_fused_qk_norm_rope": False}


@functools.cache
def _prompt() -> list[int]:
    """Text that the demo checkpoint knows: where it has to guess, rounding may choose other experts."""
    from transformers import AutoTokenizer

    row = HELD_OUT[0]
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    options = {"tools": row["tools"]} if row.get("tools") else {}
    return tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False, **options)


def _served(model, additional=None, damage=None, **options):
    """(classes of the expert kernels, [log-probabilities, tokens])"""
    import vllm_bailing

    vllm_bailing.register()
    from vllm import _custom_ops

    from vllm_bailing.bench.worker_extension import EXTENSION

    if damage:
        kernel = getattr(_custom_ops, damage)

        def damaged(*args):
            result = kernel(*args)
            (args[0] if result is None else result)[..., 0] += 1
            return result

        setattr(_custom_ops, damage, damaged)
    llm = make_llm(
        model, dtype="bfloat16", additional_config=additional or {}, worker_extension_cls=EXTENSION, **options
    )
    return llm.collective_rpc("bailing_facts")[0]["experts"], ask(llm, [_prompt()])[0]


@functools.cache
def portably_served(eager):
    return run_in_turn(_served, DEMO, PORTABLE, enforce_eager=eager)


@pytest.mark.parametrize("eager", [True, False])
def test_served_alike_by_both(eager):
    ours, (table, tokens) = run_in_turn(_served, DEMO, enforce_eager=eager)
    portable, (wanted, wanted_tokens) = portably_served(eager)
    assert (ours, portable) == ("vllm_bailing.PackedExperts", "CPUUnquantizedExperts")
    assert (table.exp() - wanted.exp()).abs().max() < 0.05 and not torch.equal(table, wanted)
    assert tokens == wanted_tokens


def _errors(case, additional):
    """Mean deviation of the log-probabilities from the official code's, for each position."""
    folder, tensors = load_case(case)
    prompts = tensors["input_ids"].reshape(-1, tensors["input_ids"].shape[-1]).tolist()
    wanted = tensors["logits"].reshape(-1, *tensors["logits"].shape[-2:])[:, :-1].float().log_softmax(-1)
    found = run_in_turn(generate, folder, prompts, max_tokens=1, dtype="bfloat16", additional_config=additional)
    return torch.cat([(table - right).abs().mean(-1) for (table, _), right in zip(found, wanted, strict=True)])


def test_no_further_from_the_official_code():
    # Any rounding sends some positions to other experts, so the median has to tell.
    cases = ("plain", "biases", "full_rope", "two_shared", "yarn", "one_group")
    ours, portable = (torch.cat([_errors(case, keys) for case in cases]) for keys in ({}, PLAIN))
    assert ours.median() < 1.1 * portable.median()


@pytest.mark.parametrize("kernel", ["fused_experts_cpu", "weight_packed_linear_cpu"])
def test_a_kernel_that_is_wrong_is_left_alone(kernel):
    experts, (table, _) = run(_served, DEMO, damage=kernel)
    assert (experts == "CPUUnquantizedExperts") == (kernel == "fused_experts_cpu")
    assert (table.exp() - portably_served(True)[1][0].exp()).abs().max() < 0.05


def _reloaded(model):
    llm = make_llm(model, dtype="bfloat16")
    before = ask(llm, [_prompt()])
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    return before[0], ask(llm, [_prompt()])[0]


def test_reloading_packs_again():
    before, after = run_in_turn(_reloaded, DEMO)
    assert torch.equal(before[0], after[0]) and before[1] == after[1]
