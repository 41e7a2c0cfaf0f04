"""The AVX-512 bf16 kernels: the same answers as vLLM's own choice, and out of the way where they cannot be."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from engine import EngineError, ask, generate, make_llm, run
from reference_cases import load_case

from vllm_bailing.cli import DEMO

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
        reason="needs a CPU with AVX-512 bf16 and without AMX",
    ),
]
PORTABLE = {"bailing_cpu_kernels": False}


@functools.cache
def _prompt() -> list[int]:
    """Text that the demo checkpoint knows: where it has to guess, rounding may choose other experts."""
    from transformers import AutoTokenizer

    row = json.loads(
        (Path(__file__).parent / "data" / "demo_heldout.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    options = {"tools": row["tools"]} if row.get("tools") else {}
    return tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False, **options)


def _product(n, k, tokens, bias=False):
    """Relative error of a PackedLinear's product, and the memory that its plain weight still takes."""
    from types import SimpleNamespace

    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_bailing.cpu import PackedLinear

    torch.manual_seed(n + k + tokens)
    weight, x = torch.randn(n, k).bfloat16(), torch.randn(tokens, k).bfloat16()
    added = torch.randn(n).bfloat16() if bias else None
    layer = SimpleNamespace(weight=torch.nn.Parameter(weight.clone(), requires_grad=False))
    with set_current_vllm_config(VllmConfig()):
        method = PackedLinear()
        method.process_weights_after_loading(layer)
        found = method.apply(layer, x, added).double()
    wanted = x.double() @ weight.double().t() + (added.double() if bias else 0)
    return float((found - wanted).norm() / wanted.norm()), layer.weight.numel()


@pytest.mark.parametrize("tokens", [1, 4, 5, 33, 300])
@pytest.mark.parametrize("n, k", [(16, 32), (48, 96), (1040, 1056), (24, 32), (32, 48)])
def test_linear_layers_multiply_as_in_fp64(n, k, tokens):
    """The last two shapes are none of the kernel's."""
    error, left = run(_product, n, k, tokens)
    assert error < 0.003 and left == 0


def test_a_bias_is_added():
    assert run(_product, 64, 64, 7, bias=True)[0] < 0.003


def _experts(tokens, width):
    from vllm_bailing import cpu

    torch.manual_seed(tokens)
    hidden, experts, top_k = 64, 8, 3
    w13 = torch.randn(experts, 2 * width, hidden).div(8).bfloat16()
    w2 = torch.randn(experts, hidden, width).div(8).bfloat16()
    x = torch.randn(tokens, hidden).bfloat16()
    weights, ids = torch.rand(tokens, experts).topk(top_k)
    found = torch.empty_like(x)
    pack = torch.ops._C.convert_weight_packed
    cpu._run_experts(found, x, pack(w13), pack(w2), weights, ids.int())
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for row in range(tokens):
        for weight, expert in zip(weights[row], ids[row], strict=True):
            gate, up = (w13[expert].double() @ x[row].double()).chunk(2)
            wanted[row] += weight * (w2[expert].double() @ (torch.nn.functional.silu(gate) * up))
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("width", [32, 96])
def test_experts_compute_as_in_fp64(tokens, width):
    assert run(_experts, tokens, width) < 0.006


def _served(model, additional=None, damage=None, **options):
    """(classes of the expert kernels, [log-probabilities, tokens])"""
    import vllm_bailing

    vllm_bailing.register()
    from vllm import _custom_ops

    from vllm_bailing.probe import EXTENSION

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


@pytest.mark.parametrize("eager", [True, False])
def test_served_alike_by_both(eager):
    ours, (table, tokens) = run(_served, DEMO, enforce_eager=eager)
    portable, (wanted, wanted_tokens) = run(_served, DEMO, PORTABLE, enforce_eager=eager)
    assert (ours, portable) == ("vllm_bailing.PackedExperts", "CPUUnquantizedExperts")
    assert (table.exp() - wanted.exp()).abs().max() < 0.05 and not torch.equal(table, wanted)
    assert tokens == wanted_tokens


@pytest.mark.parametrize("case", ["tied", "biases", "two_shared"])
def test_close_to_the_official_code(case):
    folder, tensors = load_case(case)
    prompt = tensors["input_ids"].reshape(-1, tensors["input_ids"].shape[-1])[0].tolist()
    [(table, _)] = run(generate, folder, [prompt], max_tokens=1, dtype="bfloat16")
    [(portable, _)] = run(generate, folder, [prompt], max_tokens=1, dtype="bfloat16", additional_config=PORTABLE)
    wanted = tensors["logits"].reshape(-1, *tensors["logits"].shape[-2:])[0, :-1].float().log_softmax(-1)
    error, allowed = (table - wanted).abs().mean(), (portable - wanted).abs().mean()
    assert error < 1.5 * allowed


@pytest.mark.parametrize("kernel", ["fused_experts_cpu", "weight_packed_linear_cpu"])
def test_a_kernel_that_is_wrong_is_left_alone(kernel):
    experts, (table, _) = run(_served, DEMO, damage=kernel)
    assert (experts == "CPUUnquantizedExperts") == (kernel == "fused_experts_cpu")
    assert (table.exp() - run(_served, DEMO, PORTABLE)[1][0].exp()).abs().max() < 0.05


def _reloaded(model):
    llm = make_llm(model, dtype="bfloat16")
    before = ask(llm, [_prompt()])
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    return before[0], ask(llm, [_prompt()])[0]


def test_reloading_packs_again():
    before, after = run(_reloaded, DEMO)
    assert torch.equal(before[0], after[0]) and before[1] == after[1]


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize(
    "experts, groups, topk_group, top_k", [(16, 4, 2, 4), (64, 8, 4, 8), (256, 8, 4, 8), (8, 1, 1, 1)]
)
def test_the_loop_chooses_as_the_reference_does(experts, groups, topk_group, top_k, tokens):
    from vllm_bailing import loops
    from vllm_bailing.config import BailingMoeV2Config
    from vllm_bailing.reference import BailingMoeV2Gate

    config = BailingMoeV2Config(
        num_experts=experts,
        n_group=groups,
        topk_group=topk_group,
        num_experts_per_tok=top_k,
        hidden_size=experts,
        head_dim=32,
    )
    gate = BailingMoeV2Gate(config)
    torch.manual_seed(tokens)
    gate.weight.data = torch.eye(experts)  # so that hidden states are the logits
    gate.expert_bias.data = torch.randn(experts) / 10
    logits = torch.randn(tokens, experts)
    wanted_ids, wanted = gate(logits)[:2]
    found, ids = loops.grouped_topk(
        logits, gate.expert_bias, groups, topk_group, top_k, top_k > 1, config.routed_scaling_factor
    )
    order, wanted_order = ids.long().sort(-1), wanted_ids.sort(-1)
    assert torch.equal(order.values, wanted_order.values)
    torch.testing.assert_close(found.gather(1, order.indices), wanted.gather(1, wanted_order.indices))


def test_what_cannot_be_is_refused():
    with pytest.raises(EngineError, match=r"bailing_cpu_kernels=true .* the kernels take bf16, not torch.float32"):
        run(generate, DEMO, [_prompt()], additional_config={"bailing_cpu_kernels": True})
    with pytest.raises(EngineError, match="bailing_cpu_kernels='on' in --additional-config must be true or false"):
        run(generate, DEMO, [_prompt()], dtype="bfloat16", additional_config={"bailing_cpu_kernels": "on"})
