"""Adapters, as PEFT and LLaMA-Factory write them, against checkpoints that they were merged into."""

from __future__ import annotations

import pytest
import torch

from tests.support.adapters import ATTENTION, EXPERTS_NAME, MLP, adapted, make_adapter, merged
from tests.support.checkpoints import PROMPT, make_checkpoint, plain_answer, read_tensors
from tests.support.engine import TOLERANCE, TWO_RANKS, EngineError, make_llm, run, run_in_turn
from tests.support.speculation import mtp

KINDS = {
    "query_key_value": (("query_key_value",), lambda module: True),
    "dense": (("dense",), lambda module: True),
    "dense_mlp": (MLP, lambda module: ".layers.0." in module),
    "shared_experts": (MLP, lambda module: ".shared_experts." in module),
    "all_linear": ((*ATTENTION, *MLP), lambda module: EXPERTS_NAME not in module),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_changes_the_model_as_if_it_were_merged(kind, tmp_path):
    model = make_checkpoint(tmp_path / "model", use_qkv_bias=True)
    targets, keep = KINDS[kind]
    adapter = make_adapter(tmp_path / "adapter", model, targets, keep=keep)
    wanted, wanted_ids = plain_answer(merged(model, adapter, tmp_path / "merged"), PROMPT)
    base, base_ids = plain_answer(model, PROMPT)
    ((logprobs, ids), (base_logprobs, found_ids)), _ = run_in_turn(adapted, model, [(PROMPT, adapter), (PROMPT, None)])
    assert (logprobs - wanted).abs().max() <= TOLERANCE and ids == wanted_ids
    assert (base_logprobs - base).abs().max() <= TOLERANCE and found_ids == base_ids
    assert (wanted - base).abs().max() > 1000 * TOLERANCE  # the adapter does something


def test_an_adapter_on_two_ranks(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, (*ATTENTION, *MLP))
    wanted, wanted_ids = plain_answer(merged(model, adapter, tmp_path / "merged"), PROMPT)
    ((logprobs, ids),), _ = run_in_turn(adapted, model, [(PROMPT, adapter)], env=TWO_RANKS, tensor_parallel_size=2)
    assert (logprobs - wanted).abs().max() <= TOLERANCE and ids == wanted_ids


def test_eight_adapters_of_different_ranks_in_one_batch(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    adapters = [
        make_adapter(tmp_path / f"adapter-{i}", model, (*ATTENTION, *MLP), rank=(2, 4, 8, 16)[i % 4], seed=i)
        for i in range(8)
    ]
    batch = [(PROMPT[i : i + 12 + i], adapters[i % 8]) for i in range(32)]
    rows, _ = run_in_turn(adapted, model, batch, logprobs=False, max_num_seqs=32)
    for i, adapter in enumerate(adapters):
        folder = merged(model, adapter, tmp_path / f"merged-{i}")
        for (prompt, _), (_, ids) in list(zip(batch, rows, strict=True))[i::8]:
            assert ids == plain_answer(folder, prompt)[1]
    assert len({tuple(ids) for _, ids in rows}) > 24


def test_an_adapter_on_a_target_that_speculates(tmp_path):
    """The draft has no adapter; what it proposes is checked with it."""
    model = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1)
    # LLaMA-Factory adapts the MTP layer too, since the official class runs it.
    adapter = make_adapter(tmp_path / "adapter", model, ATTENTION)
    assert any(".layers.3." in name for name in read_tensors(adapter))
    folder = merged(model, adapter, tmp_path / "merged")
    prompts = [PROMPT[i : i + 12] for i in range(8)]
    rows, counted = run_in_turn(
        adapted, model, [(prompt, adapter) for prompt in prompts], logprobs=False, speculative_config=mtp(2)
    )
    assert [ids for _, ids in rows] == [plain_answer(folder, prompt)[1] for prompt in prompts]
    assert counted["drafts"] > 0


@pytest.mark.parametrize(
    ("targets", "options", "fragments"),
    [
        (MLP, {}, ("96 module(s) that would be ignored", "mlp.experts.0.down_proj", "merge the adapter")),
        (
            ATTENTION,
            {"lora_target_modules": ["dense"]},
            ("3 module(s)", "query_key_value", "--lora-target-modules dense query_key_value"),
        ),
        (("gate",), {}, ("2 module(s)", "layers.1.mlp.gate", "if the model has them")),
        (("lm_head",), {}, ("1 module(s)", "down_proj lm_head")),
    ],
    ids=["experts", "not_prepared", "router", "head"],
)
def test_an_adapter_that_would_be_dropped_in_part_is_refused_by_name(targets, options, fragments, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, targets, keep=lambda module: "shared" not in module)
    with pytest.raises(EngineError) as refusal:
        run(adapted, model, [(PROMPT, adapter)], **options)
    for fragment in fragments:
        assert fragment in refusal.value.message


@pytest.mark.parametrize(
    ("targets", "fragment"),
    [
        (["dense", "experts"], "--lora-target-modules experts: vLLM's CPU build has no expert kernel"),
        (["dense", "lm_head"], "--lora-target-modules lm_head: the draft model"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_at_the_start(targets, fragment, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1)
    with pytest.raises(EngineError) as refusal:
        run(make_llm, model, enable_lora=True, lora_target_modules=targets, speculative_config=mtp(1))
    assert fragment in refusal.value.message


def test_an_adapter_of_the_head_on_demand(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, ("lm_head", "dense"))
    _, wanted_ids = plain_answer(merged(model, adapter, tmp_path / "merged"), PROMPT)
    ((_, ids),), _ = run_in_turn(
        adapted, model, [(PROMPT, adapter)], logprobs=False, lora_target_modules=["dense", "lm_head"]
    )
    assert ids == wanted_ids


def _landed(model, adapter):
    """Factors of the first MoE layer's experts as vLLM's adapter manager placed them: by name, for each projection.

    The CPU build has no kernel for them, so it is told that it had; nothing is computed with them.
    """
    from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.fused_moe import modular_kernel

    from vllm_bailing.plugin import checks, lora

    checks.settle_lora_targets = lambda config, on_cpu, has_draft: lora.settle_lora_targets(config, False, has_draft)
    modular_kernel.FusedMoEKernel.supports_lora = lambda self: True
    FusedMoEWithLoRA.set_mapping = BaseLayerWithLoRA.set_mapping
    llm = make_llm(model, enable_lora=True)
    llm.llm_engine.add_lora(LoRARequest("experts", 1, str(adapter)))
    found = {}

    def look(worker):
        manager = worker.model_runner.lora_manager._adapter_manager
        experts = manager.modules["model.layers.1.mlp.experts"]
        for name in ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked"):
            found[name] = [stacked[0].clone() for stacked in getattr(experts, name)]

    llm.collective_rpc(look)
    return found


def test_factors_of_the_experts_land_where_they_belong(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, MLP, keep=lambda module: EXPERTS_NAME in module)
    stored = read_tensors(adapter)
    found = run(_landed, model, adapter)
    for expert in range(16):
        prefix = f"base_model.model.model.layers.1.mlp.experts.{expert}"
        for place, name in ((("w13", 0), "gate_proj"), (("w13", 1), "up_proj"), (("w2", 0), "down_proj")):
            a, b = (stored[f"{prefix}.{name}.lora_{letter}.weight"] for letter in "AB")
            found_a, found_b = (found[f"{place[0]}_lora_{letter}_stacked"][place[1]][expert] for letter in "ab")
            rank = len(a)  # the rest of the slot stays zero
            assert torch.equal(found_a[:rank], a) and not found_a[rank:].any()
            assert torch.equal(found_b[:, :rank], 2 * b) and not found_b[:, rank:].any()  # alpha / rank
