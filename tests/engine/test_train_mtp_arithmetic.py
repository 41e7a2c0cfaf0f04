"""How an MTP layer is trained: its steps as at inference, the loss, the balance of its experts, what is held out."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.support.checkpoints import PROMPT, make_checkpoint, plain_answer
from tests.support.config_switches import switched
from vllm_bailing.bench.statistics import wilson
from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.config import read_config
from vllm_bailing.reference import BailingMoeV2ForCausalLM, rotary_cos_sin
from vllm_bailing.training.answers import Answer, Question, ask_plain, questions_of
from vllm_bailing.training.draft import DECAY, NOT_COUNTED, MtpDraft, engine_steps
from vllm_bailing.training.files import embedding_and_head, layer_from
from vllm_bailing.training.states import Example, States, collate, record, share
from vllm_bailing.training.trainer import Part, Settings, acceptance, choose, make_trainer, measure

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
STEPS, FIRST = 3, 5


def opened(folder, steps=STEPS, **keys):
    """The plain model of a random checkpoint, and its MTP layer as it is trained."""
    make_checkpoint(folder, num_nextn_predict_layers=1, **keys)
    model = BailingMoeV2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config, checkpoint = read_config(folder), Checkpoint.at(str(folder))
    layer = layer_from(checkpoint, config, seed=0)
    return model, MtpDraft(config, layer, *embedding_and_head(checkpoint, config, torch.float32), steps).eval()


@torch.no_grad()
def batch_of(model, *rows):
    """A batch of `rows` of token ids, whose answers begin at `FIRST`; the states in fp32."""
    states = [model.model(torch.tensor([ids])).last_hidden_state[0] for ids in rows]
    batch = collate(
        [{"input_ids": ids, "hidden_states": one, "first": FIRST} for ids, one in zip(rows, states, strict=True)]
    )
    width = batch["input_ids"].shape[1]
    padded = [torch.nn.functional.pad(one, (0, 0, 0, width - len(one))) for one in states]
    return batch | {"hidden_states": torch.stack(padded)}


@torch.no_grad()
def drafted_one_by_one(model, ids, states, root):
    """Hidden states of each draft step from row `root` on, as an engine has them: one row after the other, a cache."""
    layer, embed = model.model.layers[-1], model.model.word_embeddings
    cache, outputs = DynamicCache(), []
    joined = layer.join(embed(torch.tensor([ids[1 : root + 2]])), states[None, : root + 1])
    output, _ = layer(joined, *rotary_cos_sin(model.config, torch.arange(root + 1)[None]), None, cache)
    outputs.append(layer.final_layernorm(output)[0, -1])
    for step in range(1, STEPS):
        joined = layer.join(embed(torch.tensor([[ids[root + step + 1]]])), outputs[-1][None, None])
        cos_sin = rotary_cos_sin(model.config, torch.tensor([[root + step]]))
        output, _ = layer(joined, *cos_sin, None, cache)
        outputs.append(layer.final_layernorm(output)[0, -1])
    return outputs


@pytest.mark.parametrize("switches", [(), ("tied",), ("norm_head",), ("no_qk_norm", "no_groups")], ids=", ".join)
@torch.no_grad()
def test_every_step_is_what_an_engine_computes(switches, tmp_path):
    model, draft = opened(tmp_path, **switched(*switches))
    ids = PROMPT[:12]
    batch = batch_of(model, ids)
    states = batch["hidden_states"][0]
    steps = draft.unrolled(batch["input_ids"], batch["hidden_states"], torch.arange(11)[None], batch["lengths"])
    torch.testing.assert_close(steps[0], model.mtp_forward(states[None, :-1], torch.tensor([ids[1:]]))[0], **CLOSE)
    for root in range(len(ids) - 1 - STEPS):
        for step, wanted in enumerate(drafted_one_by_one(model, ids, states, root)):
            torch.testing.assert_close(steps[step][0, root], wanted, **CLOSE)
            torch.testing.assert_close(draft.logits(wanted[None]), model.logits(wanted[None]), **CLOSE)


@torch.no_grad()
def test_the_loss_is_the_divergence_from_what_the_target_says_next(tmp_path):
    model, draft = opened(tmp_path)
    ids = PROMPT[:12]
    batch = batch_of(model, ids)
    wanted = model(torch.tensor([ids])).logits[0].softmax(-1)  # row i: of token i + 1
    drafts = draft.unrolled(batch["input_ids"], batch["hidden_states"], torch.arange(11)[None], batch["lengths"])
    means, right = [], np.full((len(ids) - 1, STEPS), NOT_COUNTED)
    for step in range(1, STEPS + 1):
        came = model.logits(drafts[step - 1][0]).softmax(-1)
        each = []
        for row in range(FIRST - 1, len(ids) - 1 - step):  # token row + 1 is of the answer, row + 1 + step is its last
            p, q = wanted[row + step], came[row]
            each.append(float((p * (p / q).log()).sum()))
            right[row, step - 1] = p.argmax() == q.argmax()
        means.append(sum(each) / len(each))
    weights = [DECAY**step for step in range(STEPS)]
    output = draft(**batch)
    assert float(output["loss"]) == pytest.approx(np.average(means, weights=weights), rel=1e-4)
    assert (output["matches"][0].numpy() == right[FIRST - 1 : -1]).all()


def test_padding_changes_neither_loss_nor_balance(tmp_path):
    model, draft = opened(tmp_path)
    rows = [PROMPT[:20], PROMPT[3:12], PROMPT[7:14]]
    draft.train()
    alone, loads = [], []
    for ids in rows:
        alone.append(float(draft(**batch_of(model, ids))["loss"].detach()))
        loads.append(draft.loads.clone())
        draft.loads.zero_()
    draft(**batch_of(model, *rows))
    assert torch.equal(draft.loads, sum(loads))
    # The first step runs over all tokens, the others over the answer as far as their token is there.
    counted = sum(len(ids) - 1 + len(ids) - FIRST - 1 + len(ids) - FIRST - 2 for ids in rows)
    assert draft.loads.sum() == model.config.num_experts_per_tok * counted
    draft.eval()
    padded = draft(**batch_of(model, *rows))["matches"]
    for ids, row in zip(rows, padded, strict=True):
        count = len(ids) - FIRST - 1
        assert torch.equal(row[:count], draft(**batch_of(model, ids))["matches"][0])
        assert (row[count:] == NOT_COUNTED).all()


def test_balance_moves_the_bias_of_every_expert_towards_an_even_load(tmp_path):
    _, draft = opened(tmp_path)
    bias = draft.layer.mlp.gate.expert_bias
    before = bias.clone()
    draft.loads.copy_(torch.arange(16.0))
    draft.balance(0.01)
    torch.testing.assert_close(bias - before, torch.tensor([0.01] * 8 + [-0.01] * 8))
    assert not draft.loads.any()


@pytest.mark.parametrize("length", [FIRST + 1, FIRST + 2, FIRST + 3])
def test_answers_too_short_for_a_step_are_no_harm(length, tmp_path):
    model, draft = opened(tmp_path)
    output = draft(**batch_of(model, PROMPT[:length]))
    assert torch.isfinite(output["loss"]) and output["matches"].shape == (1, max(1, length - FIRST - 1), STEPS)
    assert (output["matches"] != NOT_COUNTED).sum() == sum(range(length - FIRST))


def test_an_answer_that_only_fills_a_share_counts_for_nothing(tmp_path):
    model, draft = opened(tmp_path)
    draft.train()
    alone = draft(**batch_of(model, PROMPT[:12]))["loss"]
    loads = draft.loads.clone()
    draft.loads.zero_()
    filler = [PROMPT[:1]]
    torch.testing.assert_close(draft(**batch_of(model, PROMPT[:12], *filler))["loss"], alone, **CLOSE)
    assert torch.equal(draft.loads, loads)
    draft.loads.zero_()
    loss = draft(**batch_of(model, *filler))["loss"]
    loss.backward()
    assert loss == 0 and not draft.loads.any()
    # Nothing is learnt, but every parameter has a gradient: ranks exchange those of all.
    assert all(one.grad is not None and not one.grad.any() for one in draft.layer.parameters())
    assert (draft.eval()(**batch_of(model, *filler))["matches"] == NOT_COUNTED).all()


@given(count=st.integers(1, 40), ranks=st.integers(1, 9))
def test_shares_have_every_example_once_and_are_alike_in_size(count, ranks):
    examples = [Example([number, 1, 2], 1, "", False) for number in range(count)]
    shares = [share(examples, rank, ranks) for rank in range(ranks)]
    assert len({len(one) for one in shares}) == 1
    held = [one for part in shares for one in part]
    assert sorted(one.ids[0] for one in held if len(one.ids) > 1) == list(range(count))
    assert sum(len(one.ids) == 1 for one in held) == -count % ranks


@pytest.mark.parametrize("part", [Part.attention, Part.lora])
def test_frozen_experts_in_bf16_are_what_autocast_makes_of_them(part, tmp_path):
    if part is Part.lora:
        pytest.importorskip("peft")
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model, draft = opened(tmp_path)
        draft.embedding = draft.embedding.to(torch.bfloat16)
        draft.head = draft.head.to(torch.bfloat16)
        torch.manual_seed(0)
        choose(draft, part)
        experts = {one.dtype for name, one in draft.layer.named_parameters() if ".experts." in name}
        assert experts == {torch.bfloat16}
        assert all(one.dtype == torch.float32 for one in draft.parameters() if one.requires_grad)
        draft.layer.mlp.experts.to(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(float(draft(**batch_of(model, PROMPT[:12]))["loss"]))
    assert losses[0] == losses[1]


def test_an_engine_s_steps():
    n = NOT_COUNTED
    matches = np.array([[n, n], [1, 1], [0, 1], [0, 1], [0, 1], [1, 0], [0, 0], [1, n], [n, n]])
    # From row 1 two are accepted, so row 4 is next; there the second is of no use; row 5 accepts one, row 7 the last.
    assert engine_steps(matches).tolist() == [[1, 1], [0, 0], [1, 0], [1, n]]
    found = acceptance(np.stack([matches, np.full_like(matches, n)]))
    assert (found.drafts, found.accepted) == ([4, 3], [3, 1]) and found.shares == [0.75, 1 / 3]


def test_the_plain_model_answers_as_it_does_alone(tmp_path):
    folder = make_checkpoint(tmp_path, num_hidden_layers=2)
    model = BailingMoeV2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [PROMPT[start : start + 3 + 2 * start] for start in range(8)]
    alone = [plain_answer(folder, prompt, 6)[1] for prompt in prompts]
    stop = alone[3][2]  # ends this answer after three tokens at most
    model.generation_config.eos_token_id = stop
    wanted = [ids[: ids.index(stop) + 1] if stop in ids else ids for ids in alone]
    questions = [Question(ids, "", False, 0.0) for ids in prompts] + [Question(PROMPT[:4], "", False, 1.0)] * 2
    done = []
    came = ask_plain(model, questions, 6, 0, done.append)
    assert came[:-2] == wanted and sum(done) == len(questions)
    assert came[-2:] == ask_plain(model, questions, 6, 0, done.append)[-2:] != [wanted[0]] * 2


def test_acceptance_is_told_apart_by_kind_whatever_the_order(tmp_path):
    model, draft = opened(tmp_path / "model", vocab_size=4)  # so few tokens that many drafts are right
    answers = [
        Answer(
            [n % 4 for n in PROMPT[start : start + 3 + start % 7]], [n % 4 for n in PROMPT[: 4 + 3 * (start % 5)]], kind
        )
        for start, kind in enumerate("abcbaaccbabcacbbac")
    ]
    examples = record(model, answers, 40, tmp_path / "states", lambda _: None)
    wanted = {}
    for kind in "abc":
        rows = [collate([one]) for one in States(tmp_path / "states", [e for e in examples if e.kind == kind])]
        counted = [acceptance(draft(**row)["matches"].numpy()) for row in rows]
        wanted[kind] = [
            [sum(x) for x in zip(*parts, strict=True)]
            for parts in zip(*((c.drafts, c.accepted) for c in counted), strict=True)
        ]
    data = States(tmp_path / "states", examples)
    trainer = make_trainer(draft, data, data, Settings(1, 5, 0.1, Part.whole, 0), tmp_path / "t", lambda *_: None)
    found = measure(trainer, data)
    assert {kind: [one.drafts, one.accepted] for kind, one in found.items() if kind} == wanted
    assert found[""].drafts == [sum(one) for one in zip(*(drafts for drafts, _ in wanted.values()), strict=True)]
    assert len({one.shares[0] for one in found.values()}) == 4


@settings(max_examples=50, deadline=None)
@given(
    kinds=st.lists(st.sampled_from("abc"), min_size=2, max_size=60),
    samples=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_what_is_held_out_is_never_learnt_from(kinds, samples, seed):
    prompts = [([number % 20, 1], kind) for number, kind in enumerate(kinds)]
    questions = questions_of(prompts, samples, 0.7, share=0.1, most=4, seed=seed)
    held = {tuple(one.token_ids) for one in questions if one.held_out}
    learnt = {tuple(one.token_ids) for one in questions if not one.held_out}
    assert held and learnt and not held & learnt and len(held) <= 4
    assert all(one.temperature == 0 for one in questions if one.held_out)
    assert len(questions) == len(held) + len(learnt) * (1 + samples)


@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_the_interval_of_a_share_is_that_of_scipy(trials, share):
    successes = round(share * trials)
    wanted = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
