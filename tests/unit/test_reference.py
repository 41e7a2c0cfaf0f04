"""The plain PyTorch reference against the recorded outputs of the official code, and as a transformers model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.cases import CASES, load_case
from tests.support.checkpoints import PROMPT, make_checkpoint, read_tensors
from vllm_bailing.reference import BailingMoeV2ForCausalLM, apply_rotary, rotary_cos_sin

# Largest differences measured: 2.1e-5 in MTP logits, 1.7e-5 in logits, 4.4e-6 in hidden states (order of fp32 sums).
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=CASES)
def answered(request):
    """A reference case and what the plain model makes of it."""
    folder, expected = load_case(request.param)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    ids = expected["input_ids"][None]
    with torch.no_grad():
        output = model(ids, output_hidden_states=True, output_router_logits=True)
    return model, report, expected, ids, output


def test_every_tensor_finds_its_place(answered):
    _, report, *_ = answered
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_logits_and_hidden_states_match(answered):
    *_, expected, _, output = answered
    assert (output.logits[0] - expected["logits"]).abs().max() <= TOLERANCE
    hidden_states = torch.stack(output.hidden_states)[:, 0]
    assert hidden_states.shape == expected["hidden_states"].shape
    assert (hidden_states - expected["hidden_states"]).abs().max() <= TOLERANCE


@torch.no_grad()
def test_routing_and_mtp_match(answered):
    model, _, expected, ids, output = answered
    routing = list(output.routing)
    if "mtp_logits" in expected:
        next_ids = torch.nn.functional.pad(ids[:, 1:], (0, 1))
        hidden, mtp_routing = model.mtp_forward(output.hidden_states[-1], next_ids)
        routing.append(mtp_routing)
        assert (model.logits(hidden)[0] - expected["mtp_logits"]).abs().max() <= TOLERANCE
    assert len(routing) == len(expected["topk_ids"])
    for (ids_, weights), wanted_ids, wanted_weights in zip(
        routing, expected["topk_ids"], expected["topk_weights"], strict=True
    ):
        order = ids_.sort(-1)
        assert torch.equal(order.values, wanted_ids.long())
        torch.testing.assert_close(weights.gather(1, order.indices), wanted_weights, atol=1e-6, rtol=1e-6)


def test_greedy_generation_with_cache_matches(answered):
    model, _, expected, ids, _ = answered
    answer = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert answer[0, ids.shape[1] :].tolist() == expected["greedy_ids"].tolist()


@torch.no_grad()
def test_left_padding_changes_nothing(tmp_path):
    model = BailingMoeV2ForCausalLM.from_pretrained(make_checkpoint(tmp_path), dtype=torch.float32)
    short, long = PROMPT[:9], PROMPT[:31]
    padded = torch.tensor([[0] * 22 + short, long])
    mask = torch.tensor([[0] * 22 + [1] * 9, [1] * 31])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    together = model.generate(padded, attention_mask=mask, **options)[:, 31:]
    for row, prompt in zip(together, (short, long), strict=True):
        alone = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert torch.equal(row, alone)


@torch.no_grad()
def test_cached_steps_equal_one_pass(tmp_path):
    model = BailingMoeV2ForCausalLM.from_pretrained(make_checkpoint(tmp_path), dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    whole = model(ids).logits
    first = model(ids[:, :20], use_cache=True)
    second = model(ids[:, 20:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole, atol=1e-5, rtol=1e-5)


def test_expert_bias_stays_fp32_in_a_bf16_model(tmp_path):
    model = BailingMoeV2ForCausalLM.from_pretrained(make_checkpoint(tmp_path))
    assert model.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.expert_bias.dtype == torch.float32


def test_saving_keeps_every_tensor_and_its_name(tmp_path):
    source = make_checkpoint(tmp_path / "source", num_nextn_predict_layers=1)
    BailingMoeV2ForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")
    before, after = read_tensors(source), read_tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_channels_past_the_rotary_part_pass_through(tmp_path):
    config = BailingMoeV2ForCausalLM.from_pretrained(make_checkpoint(tmp_path)).config
    x = torch.randn(1, 4, 5, config.head_dim)
    turned = apply_rotary(x, *rotary_cos_sin(config, torch.arange(5)[None] + 100))
    assert torch.equal(turned[..., config.rotary_dim :], x[..., config.rotary_dim :])
    assert not torch.allclose(turned[..., : config.rotary_dim], x[..., : config.rotary_dim])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_expert_bias_changes_the_choice_but_not_the_weights(tmp_path):
    model = BailingMoeV2ForCausalLM.from_pretrained(make_checkpoint(tmp_path), dtype=torch.float32)
    gate = model.model.layers[1].mlp.gate
    hidden = torch.randn(200, 64)
    ids, weights, _ = gate(hidden)
    torch.testing.assert_close(weights.sum(-1), torch.full((200,), 2.5))
    scores = torch.nn.functional.linear(hidden, gate.weight).sigmoid().gather(1, ids)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True) * 2.5)
    gate.expert_bias.zero_()
    assert not torch.equal(gate(hidden)[0].sort(-1).values, ids.sort(-1).values)


def test_loss_is_the_shifted_cross_entropy(tmp_path):
    model = BailingMoeV2ForCausalLM.from_pretrained(make_checkpoint(tmp_path), dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    output = model(ids, labels=ids)
    wanted = -output.logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None]).mean()
    torch.testing.assert_close(output.loss, wanted)
