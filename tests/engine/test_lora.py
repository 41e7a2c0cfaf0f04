"""Adapters, as PEFT and LLaMA-Factory write them, against checkpoints that they were merged into."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from tests.support.adapters import (
    ATTENTION,
    EXPERTS_NAME,
    MLP,
    REFUSED,
    SERVED,
    adapted,
    changed_adapter,
    make_adapter,
    merged,
    merged_tensors,
    random_change,
)
from tests.support.checkpoints import PROMPT, Judge, make_checkpoint, plain_answer, read_tensors
from tests.support.engine import TOLERANCE, TWO_RANKS, EngineError, ask, make_llm, run, run_in_turn
from tests.support.speculation import mtp
from tests.support.versions import since
from vllm_bailing import DEMO, DEMO_ADAPTER

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
        (("gate",), {}, ("2 module(s)", "layers.1.mlp.gate", "or its router, which takes none")),
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
        (["dense", "q_proj", "gate"], "--lora-target-modules q_proj gate: the model has nothing of that name"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused_at_the_start(targets, fragment, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1)
    with pytest.raises(EngineError) as refusal:
        run(make_llm, model, enable_lora=True, lora_target_modules=targets, speculative_config=mtp(1))
    assert fragment in refusal.value.message


@since("0.32", "scales of single modules")
def test_changed_adapters_answer_as_if_they_were_merged(tmp_path):
    """All that the audit lets pass, see tests/unit/test_adapter_audit.py."""
    folders = {case: changed_adapter(tmp_path / case, change) for case, change in SERVED.items()}
    prompt = [(5 * i * i + i + 3) % 1000 for i in range(12)]
    batch = [(prompt, folder) for folder in folders.values()]
    rows, _ = run_in_turn(adapted, DEMO, batch, max_num_seqs=len(batch), max_tokens=4)
    base = plain_answer(DEMO, prompt, 4)[0]
    for (case, folder), (logprobs, ids) in zip(folders.items(), rows, strict=True):
        wanted, wanted_ids = plain_answer(merged(DEMO, folder, tmp_path / f"{case}-merged"), prompt, 4)
        assert (logprobs - wanted).abs().max() <= TOLERANCE and ids == wanted_ids, case
        assert (wanted - base).abs().max() > 10 * TOLERANCE, case


def _after_refusals(model, good, bad):
    """(messages of the refusals, what `good` answers before and after) of an engine that was given bad adapters."""
    from vllm.lora.request import LoRARequest

    llm = make_llm(model, enable_lora=True, max_loras=1, max_cpu_loras=1)
    good = LoRARequest("good", 1, str(good))
    ask_good = functools.partial(ask, llm, [PROMPT[:12]] * 2, 8, False, [good, None])
    before, messages = ask_good(), []
    for number, folder in enumerate(bad, 2):
        request = LoRARequest(f"bad-{number}", number, str(folder))
        for way in (llm.llm_engine.add_lora, lambda one: ask(llm, [PROMPT[:12]] * 2, 8, False, [good, one])):
            try:
                way(request)
                messages.append("served")
            except Exception as error:
                messages.append(str(error))
    return messages, before, ask_good(), sorted(llm.llm_engine.list_loras())


@pytest.mark.parametrize("in_process", [True, False], ids=["in_process", "engine_apart"])
def test_an_engine_that_refused_adapters_goes_on(in_process, tmp_path):
    cases = ["half_of_every_a", "nan", "a_without_b", "empty", "alpha_nan", "integers", "dora"]
    bad = [changed_adapter(tmp_path / case, REFUSED[case][0]) for case in cases]
    env = {} if in_process else {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    messages, before, after, loaded = run(_after_refusals, DEMO, DEMO_ADAPTER, bad, env=env)
    for message, case in zip(messages, [case for case in cases for _ in "ab"], strict=True):
        assert REFUSED[case][1] in message, (case, message)
        assert "\n" not in message
    assert before == after and before[0][1] != before[1][1]
    assert loaded == [1]  # the good one was not evicted for them


# ---- anything --------------------------------------------------------------------------------------------------------


def _served(model, folders):
    """Log-probabilities of a prompt with each adapter, or why it was refused; after which ones the base changed."""
    from vllm.lora.request import LoRARequest

    llm = make_llm(model, enable_lora=True, max_loras=2, max_cpu_loras=2, max_lora_rank=16)
    prompt, found, spoiled = PROMPT[:10], [], []
    ((base, _),) = ask(llm, [prompt], 1)
    for number, folder in enumerate(folders, 1):
        try:
            ((logprobs, _),) = ask(llm, [prompt], 1, adapters=[LoRARequest(folder.name, number, str(folder))])
            found.append(logprobs)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        if number % 20 == 0 or number == len(folders):
            ((again, _),) = ask(llm, [prompt], 1)
            if not torch.equal(base, again):
                spoiled.append(number)
    return found, spoiled


def test_randomly_changed_adapters_answer_as_if_merged_or_are_refused(random_cases, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, (*ATTENTION, *MLP), rank=8, alpha=8)
    seeds = range(random_cases)
    folders = [
        changed_adapter(tmp_path / str(seed), random_change(random.Random(seed)), adapter=adapter) for seed in seeds
    ]
    found, spoiled = run_in_turn(_served, model, folders, timeout=3600)
    assert spoiled == []
    judge, weights = Judge(), {name: tensor.float() for name, tensor in read_tensors(model).items()}
    wrong, served = [], 0
    for seed, folder, came in zip(seeds, folders, found, strict=True):
        if isinstance(came, str):
            if "\n" in came or "the adapter " not in came:
                wrong.append((seed, came))
            continue
        served += 1
        try:
            off = (came - judge.logprobs(merged_tensors(weights, folder), PROMPT[:10])).abs().max()
        except Exception as error:
            wrong.append((seed, f"served, but {error!r}"))
            continue
        if not off <= TOLERANCE:
            wrong.append((seed, off))
    assert wrong == []
    assert 0.15 < served / len(found) < 0.85


def _set_aside(model, **options):
    """(bytes that the adapter manager of each rank allocated, bytes that are counted for each pipeline stage)."""
    from vllm_bailing.plugin import lora

    llm = make_llm(model, enable_lora=True, **options)
    config = llm.llm_engine.vllm_config
    found = llm.collective_rpc(_stacked_bytes)
    return found, lora.stage_bytes(config, lora.slots_of(config))


def _stacked_bytes(worker):
    from vllm.lora.layers import FusedMoEWithLoRA

    size = 0
    for module in worker.model_runner.lora_manager._adapter_manager.modules.values():
        names = ["lora_a_stacked", "lora_b_stacked"]
        if isinstance(module, FusedMoEWithLoRA):
            names = [f"{part}_{name}" for part in ("w13", "w2") for name in names]
        for name in names:
            stacked = getattr(module, name)
            size += sum(part.nbytes for part in ([stacked] if isinstance(stacked, torch.Tensor) else stacked))
    return size


@pytest.mark.parametrize(
    ("options", "env"),
    [
        ({"max_loras": 3, "max_lora_rank": 32}, {}),
        ({"lora_target_modules": ["gate_proj", "lm_head", "embed_tokens"]}, {}),
        ({"dtype": "bfloat16", "lora_target_modules": ["model.layers.1.attention.dense", "query_key_value"]}, {}),
        ({"tensor_parallel_size": 2, "max_loras": 2}, TWO_RANKS),
        ({"tensor_parallel_size": 2, "fully_sharded_loras": True}, TWO_RANKS),
        ({"pipeline_parallel_size": 2}, TWO_RANKS),
    ],
    ids=["slots", "ends", "whole_names", "two_ranks", "fully_sharded", "two_stages"],
)
def test_the_memory_of_adapters_is_counted_as_vllm_allocates_it(options, env, tmp_path):
    model = make_checkpoint(tmp_path, vocab_size=250)  # no multiple of the padding
    found, counted = run_in_turn(_set_aside, model, env=env, **options)
    assert found == counted * (len(found) // len(counted)) and min(found) > 0


def test_an_adapter_of_the_head_on_demand(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, ("lm_head", "dense"))
    _, wanted_ids = plain_answer(merged(model, adapter, tmp_path / "merged"), PROMPT)
    ((_, ids),), _ = run_in_turn(
        adapted, model, [(PROMPT, adapter)], logprobs=False, lora_target_modules=["dense", "lm_head"]
    )
    assert ids == wanted_ids


def _pretend_experts_take_adapters():
    """The CPU build has no kernel for them, so it is told that it had; nothing is computed with them."""
    from vllm.lora.layers import BaseLayerWithLoRA, FusedMoEWithLoRA
    from vllm.model_executor.layers.fused_moe import modular_kernel

    from vllm_bailing.plugin import checks, lora

    checks.settle_lora_targets = lambda config, on_cpu, has_draft: lora.settle_lora_targets(config, False, has_draft)
    modular_kernel.FusedMoEKernel.supports_lora = lambda self: True
    FusedMoEWithLoRA.set_mapping = BaseLayerWithLoRA.set_mapping


def _landed(model, adapter):
    """Factors of the first MoE layer's experts as vLLM's adapter manager placed them: by name, for each projection."""
    from vllm.lora.request import LoRARequest

    _pretend_experts_take_adapters()
    llm = make_llm(model, enable_lora=True, lora_target_modules=["experts"])
    llm.llm_engine.add_lora(LoRARequest("experts", 1, str(adapter)))
    found = {}

    def look(worker):
        manager = worker.model_runner.lora_manager._adapter_manager
        experts = manager.modules["model.layers.1.mlp.experts"]
        for name in ("w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked"):
            found[name] = [stacked[0].clone() for stacked in getattr(experts, name)]

    llm.collective_rpc(look)
    return found


def _landed_bytes(model):
    """As `_set_aside`, with experts, as on a GPU."""
    _pretend_experts_take_adapters()
    return _set_aside(model, lora_target_modules=["experts"], max_loras=2)


ADAPTED_EXPERTS = since("0.32", "experts on CPUs that can be taken for ones with adapters")


@ADAPTED_EXPERTS
def test_the_memory_of_experts_is_counted_as_vllm_allocates_it(tmp_path):
    found, counted = run(_landed_bytes, make_checkpoint(tmp_path / "model"))
    assert found == counted and min(found) > 0


@ADAPTED_EXPERTS
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
