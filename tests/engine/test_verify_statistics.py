"""What `vllm-bailing verify` makes of differences: the reference's rounding and derivatives, statistics, and words."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.checkpoints import make_checkpoint
from vllm_bailing import DEMO
from vllm_bailing.config import read_config
from vllm_bailing.reference import BailingMoeV2ForCausalLM
from vllm_bailing.tools import verify_statistics, verify_verdict
from vllm_bailing.tools.verify_deployment import prompts_of
from vllm_bailing.tools.verify_drafts import DraftCheck, Drafts, made_for, not_checked
from vllm_bailing.tools.verify_reference import Asked, Computed, Reference, Rounding, TensorReader, cut, dithered
from vllm_bailing.tools.verify_statistics import Differences, Shift
from vllm_bailing.tools.verify_verdict import MEASURES, judge, limit

SEQUENCES = [
    [(7 * i * i + 3 * i + start) % 256 for i in range(length)] for start, length in ((1, 40), (5, 24), (9, 33))
]
POSITIONS = sum(len(ids) - 1 for ids in SEQUENCES)
ASKED = Asked.of(SEQUENCES, [[(11 * place + 13 * one) % 256 for one in range(20)] for place in range(POSITIONS)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("verify") / "model", num_nextn_predict_layers=1)


def reference(checkpoint, work):
    return Reference(checkpoint, read_config(checkpoint), ASKED, work, Rounding("bfloat16"))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_dithering_is_as_large_as_rounding_and_has_no_direction(dtype, bits):
    torch.manual_seed(0)
    x = torch.randn(100_000)
    rounding, error = x.to(dtype).float() - x, dithered(x, bits) - x
    assert float(error.std()) == pytest.approx(float(rounding.std()), rel=0.02)
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(len(x))
    assert float((error / x).abs().max()) <= verify_statistics.roundoff(str(dtype).removeprefix("torch."))
    exact = torch.tensor([0.0, -0.0])
    assert torch.equal(dithered(exact, bits), exact) and torch.equal(cut(exact, bits), exact)


def test_cutting_makes_smaller_as_rounding_toward_zero_does():
    torch.manual_seed(0)
    x = torch.randn(100_000)
    cut_off = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)  # the upper half of fp32 is bf16
    given, found = (cut_off - x) / x, (cut(x, 7) - x) / x
    assert float(found.mean()) == pytest.approx(float(given.mean()), rel=0.02)
    assert float(found.std()) == pytest.approx(float(given.std()), rel=0.02)
    assert float(found.max()) <= 0


def test_an_engine_that_rounds_toward_zero_is_compared_with_that():
    served, exact = np.full(40, -1.2), np.full(40, -1.0)
    noise = 0.01 * np.random.default_rng(0).standard_normal((4, 40))
    position, token, given = np.arange(40) // 2, np.arange(40), np.arange(20)
    asked = SimpleNamespace(position=position, token=token, given=given)
    computed = Computed(exact, exact + noise, exact - 0.2 + noise, token, [])
    found = Differences.between(served, computed, asked)
    assert np.abs(found.served).max() < 0.02 and np.allclose(found.rounded.mean(0), 0)
    found = Differences.between(exact + noise[0], computed, asked)
    assert np.allclose(found.served, noise[0]) and np.allclose(found.rounded, noise)
    assert len(Differences.between(served, replace(computed, cut=noise[:0]), asked).served) == 40


def test_noise_of_8_bits_is_counted_from_its_mean():
    """It makes what the norms give smaller, for right deployments and for the copies alike."""
    random = np.random.default_rng(0)
    exact = np.full(8000, -1.0)
    served, *copies = exact - 0.05 + 0.1 * random.standard_normal((5, 8000))
    position = np.arange(8000) // 20
    asked = SimpleNamespace(position=position, token=position, given=np.arange(400))
    computed = Computed(exact, np.array(copies), np.zeros((0, 8000)), position, [])
    directed = Differences.between(served, computed, asked)
    assert float(directed.served.mean()) == pytest.approx(-0.05, abs=0.005)
    found = Differences.between(served, replace(computed, coarse=True), asked)
    # The mean of four copies is off by a half of their deviation.
    assert abs(float(found.served.mean())) < 5 * 0.1 * math.sqrt(1.25 / 8000)
    assert float(np.median(found.size)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("inputs", [None, "fp8", "int8"])
def test_only_rounding_to_8_bits_is_coarse(inputs, checkpoint, tmp_path):
    given = checkpoint, read_config(checkpoint), ASKED, tmp_path / "work", Rounding("bfloat16", inputs)
    assert Reference(*given).forward(copies=1).coarse == (inputs is not None)


PARTS = {  # what a tensor's scale is the scale of
    "final norm": ["model.norm.weight"],
    "layer 0 MLP": ["model.layers.0.mlp.down_proj.weight"],
    "layer 1 attention": ["model.layers.1.attention.dense.weight"],
    "layer 1 query and key": ["model.layers.1.attention.query_layernorm.weight"],
    "layer 1 norm before the MLP": ["model.layers.1.post_attention_layernorm.weight"],
    "layer 1 router": ["model.layers.1.mlp.gate.weight"],
    "layer 2 shared experts": ["model.layers.2.mlp.shared_experts.down_proj.weight"],
    "layer 2 expert 3": ["model.layers.2.mlp.experts.3.down_proj.weight"],
    "layer 2 routed experts": [f"model.layers.2.mlp.experts.{expert}.down_proj.weight" for expert in range(16)],
}


def scaled(names, factor):
    """`TensorReader.tensor` and `.rows` with the tensors `names` times `factor`."""
    tensor, rows = TensorReader.tensor, TensorReader.rows

    def times(name, value):
        return value * factor if name in names else value

    return {
        "tensor": lambda self, name: times(name, tensor(self, name)),
        "rows": lambda self, name, *where: times(name, rows(self, name, *where)),
    }


@pytest.mark.parametrize("part", PARTS)
def test_the_effect_of_a_part_is_the_derivative_by_its_scale(part, checkpoint, tmp_path, monkeypatch):
    random = np.random.default_rng(0).standard_normal((2, POSITIONS, 20))
    weights = (random - random.mean(-1, keepdims=True)).reshape(2, -1)
    exact = reference(checkpoint, tmp_path / "exact")
    exact.forward(copies=0)
    effect = exact.effects(weights)[part].sum(1)
    sums = []
    for factor in (1.0001, 0.9999):
        with monkeypatch.context() as patched:
            for method, replaced in scaled(PARTS[part], factor).items():
                patched.setattr(TensorReader, method, replaced)
            sums.append(weights @ reference(checkpoint, tmp_path / str(factor)).forward(copies=0).logprobs)
    # fp32: a difference of sums of 2000 values, over 0.0002
    np.testing.assert_allclose(effect, (sums[0] - sums[1]) / 0.0002, rtol=0.03, atol=1)


@pytest.mark.parametrize("part", ["final norm", "layer 1 attention", "layer 2 routed experts"])
def test_a_planted_scale_is_found_and_measured(part, checkpoint, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        for method, replaced in scaled(PARTS[part], 1.03).items():
            patched.setattr(TensorReader, method, replaced)
        wrong = reference(checkpoint, tmp_path / "wrong").forward(copies=1).copies[0]
    right = reference(checkpoint, tmp_path / "right")
    computed = right.forward()
    for served, is_wrong in ((wrong, True), (computed.copies[0], False)):
        less = served - computed.logprobs, computed.copies[1:] - computed.logprobs
        differences = Differences(*less, ASKED.position, ASKED.token, ASKED.given)
        effects = right.effects(verify_statistics.weights(differences))
        shifts = verify_statistics.shifts(effects, verify_statistics.squares(differences))
        (found,) = (shift for shift in shifts if shift.part == part)
        assert (abs(found.significance) > 5) == is_wrong, found
        assert abs(found.size - 0.03 * is_wrong) < (0.015 if is_wrong else 4 * found.error)
        if is_wrong:
            assert 0.8 * max(shift.share for shift in shifts) < found.share < 1, (found, shifts[:3])


def test_drafts_are_those_of_the_whole_model(checkpoint, tmp_path):
    asked = reference(checkpoint, tmp_path / "work")
    asked.forward(copies=1)
    found = asked.drafts([19, 23, 25], count=3)
    model = BailingMoeV2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert [each.shape for each in found] == [(3, 20, 3), (3, 7, 3)]  # the second answer has one token
    for (prompt, ids), drafted in zip(((19, SEQUENCES[0]), (25, SEQUENCES[2])), found, strict=True):
        for known in range(prompt + 1, len(ids)):
            assert drafted[0, known - prompt - 1].tolist() == drafts_after(model, ids[:known], 3)


@torch.no_grad()
def drafts_after(model, ids, count):
    """What the MTP layer drafts after some tokens, a token at a time, over the whole sequence each time."""
    states = model.model(torch.tensor([ids])).last_hidden_state[:, :-1]
    given, drafts = torch.tensor([ids[1:]]), []
    for _ in range(count):
        output, _routing = model.mtp_forward(states, given)
        drafts.append(int(model.logits(output[:, -1:]).argmax(-1)))
        # The next step sees what the rows before it were made of, and goes on from the last one's result.
        states = torch.cat((states, output[:, -1:]), 1)
        given = torch.cat((given, torch.tensor([[drafts[-1]]])), 1)
    return drafts


# ---- statistics -----------------------------------------------------------------------------------------------


def random_differences(positions=400, width=21, seed=0):
    random = np.random.default_rng(seed)
    scale = random.uniform(0.01, 0.2, positions).repeat(width)
    position = np.arange(positions).repeat(width)
    noise = random.standard_normal((5, positions * width)) * scale
    token = random.integers(0, 200, positions * width)
    return Differences(noise[0], noise[1:], position, token, np.arange(positions) % (positions // 2))


def test_sizes_are_in_units_of_the_expected_rounding():
    right = random_differences()
    found = verify_statistics.sizes(right)
    assert found["median"] == pytest.approx(1, abs=0.05) and found["mean"] == pytest.approx(1, abs=0.05)
    assert found["worst input"] < 2 and found["worst output"] < 3
    served = right.served.copy()
    served[21 * 7 : 21 * 8] *= 20  # after token 7, once
    once = verify_statistics.sizes(replace(right, served=served))
    assert once["median"] == pytest.approx(found["median"], rel=0.01) and once["worst input"] < 2
    served[21 * 207 : 21 * 208] *= 20  # and again
    assert verify_statistics.sizes(replace(right, served=served))["worst input"] > 12


def test_a_token_that_is_off_everywhere_is_seen():
    right = random_differences()
    served = right.served + 15 * right.expected[right.position] * (right.token == 33)
    assert verify_statistics.sizes(replace(right, served=served))["worst output"] > 8
    first = np.flatnonzero(right.token == 33)[:1]
    served = right.served.copy()
    served[first] += 15
    assert verify_statistics.sizes(replace(right, served=served))["worst output"] < 3


def test_values_in_any_order_within_a_position():
    right = random_differences(positions=50)
    order = np.random.default_rng(1).permutation(len(right.served))
    order = order[np.argsort(right.position[order], kind="stable")]
    mixed = Differences(
        right.served[order], right.rounded[:, order], right.position[order], right.token[order], right.given
    )
    assert verify_statistics.sizes(mixed) == pytest.approx(verify_statistics.sizes(right))


def test_one_position_cannot_decide_the_direction():
    right = random_differences()
    served = right.served.copy()
    served[:21] += 100 * np.arange(21)
    weights = verify_statistics.weights(replace(right, served=served))
    shares = np.abs(weights[0]).reshape(400, 21).sum(1) * right.expected
    assert shares[0] < 6 * np.median(shares)
    np.testing.assert_allclose(weights.reshape(2, 400, 21).sum(-1), 0, atol=1e-6 * np.abs(weights).max())


def test_a_shift_is_the_sum_over_its_error():
    score, information = np.array([3.0, 4.0, -1.0]), np.array([2.0, 0.0, 1.0])
    (found,) = verify_statistics.shifts({"layer 0 MLP": np.stack([score, information])}, 144.0)
    assert found.size == pytest.approx(6 / 5) and found.error == pytest.approx(math.sqrt(26) / 5)
    assert found.significance == pytest.approx(6 / math.sqrt(26))
    assert found.share == pytest.approx(36 / 5 / 144)
    alike = {f"layer {n} router": np.roll(np.stack([score, information]), n, axis=1) for n in (1, 2)}
    assert verify_statistics.shifts(alike, 144.0)[0].part == "router of all layers"


# ---- the verdict ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "fp8"])
@pytest.mark.parametrize("measure", MEASURES)
def test_each_measure_alone_speaks_against_a_deployment(measure, dtype):
    shifts = [Shift("layer 7 expert 12", 0.05, 0.001, 50.0)]
    good = {name: limit(dtype, name) for name in MEASURES}
    assert judge(good, [], dtype) == ("", "")
    for value in (1.01 * good[measure], math.inf, math.nan):
        reason, looks_like = judge({**good, measure: value}, shifts, dtype)
        assert reason.startswith(MEASURES[measure]) and " and " not in reason and looks_like
    if measure == "significance":
        assert looks_like == "expert 12 in layer 7: +5.0 % ± 0.1 %"


def test_more_parts_have_a_larger_extreme():
    few, many = (limit("bfloat16", "significance", parts) for parts in (82, 82 * 100))
    assert few == limit("bfloat16", "significance") and many == pytest.approx(math.sqrt(few**2 + 2 * math.log(100)))
    assert limit("bfloat16", "median", 8100) == limit("bfloat16", "median")


def test_the_part_that_explains_most_is_named_and_how_sure_that_is():
    most = {name: limit("bfloat16", name) for name in MEASURES}
    norm, experts = (
        Shift("final norm", -0.014, 0.0007, -19, 0.02),
        Shift("layer 2 routed experts", 0.1, 0.01, 9.5, 0.04),
    )
    small = Shift("layer 1 router", 0.1, 0.05, 2, 0.9)  # no more than rounding
    found = {**most, "significance": 17.7}
    assert (
        judge(found, [norm, experts, small], "bfloat16")[1]
        == "the routed experts, or routed_scaling_factor in layer 2: +10.0 % ± 1.0 %"
    )
    found["median"] *= 2  # too much for one part that explains so little
    assert judge(found, [norm, experts], "bfloat16")[1].endswith("; uncertain: that explains 4 % of the differences")
    whole = Shift("layer 2 shared experts", -1, 0.03, -36, 0.56)
    assert "uncertain" not in judge(found, [norm, whole], "bfloat16")[1]


@pytest.mark.parametrize(("times", "said"), [((1.1, 9), "rows of the head"), ((9, 1.1), "rows of the embedding")])
def test_rows_are_those_of_what_is_further_above_its_limit(times, said):
    most = {name: limit("bfloat16", name) for name in MEASURES}
    rows = dict(zip(("worst input", "worst output"), times, strict=True))
    assert judge({**most, **{name: most[name] * by for name, by in rows.items()}}, [], "bfloat16")[1] == said


def test_a_small_shift_is_told_with_as_many_digits_as_its_error_has():
    assert verify_verdict.described(Shift("final norm", -0.000214, 0.0000312, -7)).endswith(": -0.021 % ± 0.003 %")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("rotary of all layers", "the rotary embedding (theta, width, scaling) of all layers: -4.0 % ± 0.1 %"),
        ("layer 12 router", "the router in layer 12: -4.0 % ± 0.1 %"),
        ("final norm", "the final norm, or the scale of the logits: -4.0 % ± 0.1 %"),
    ],
)
def test_parts_are_named_in_words(part, said):
    assert verify_verdict.described(Shift(part, -0.04, 0.001, -40)) == said


def test_drafts_of_another_mtp_layer_speak_against_a_deployment():
    good = {name: limit("bfloat16", name) for name in MEASURES}
    assert judge(good, [], "bfloat16", DraftCheck(83, 60, [80, 81, 80, 79])) == ("", "")
    reason, looks_like = judge(good, [], "bfloat16", DraftCheck(90, 50, [80, 81, 80, 79]))
    assert reason == "its answers took 90 drafts, and 77 to 83 are right" and looks_like == "the MTP layer"
    assert judge(good, [], "bfloat16", DraftCheck(76, 60, [80, 81, 80, 79]))[1] == "the MTP layer"


def test_drafts_for_an_answer_are_gone_through_as_speculative_decoding_does():
    answer = [1, 2, 3, 4, 5, 6]
    assert made_for(answer, [[token, token + 1] for token in answer[1:]]) == (2, 2)  # 2, 3, 4 at once, then 5, 6
    assert made_for(answer, [[0, 3], [0, 4], [0, 5], [0, 6], [0, 0]]) == (5, 0)
    assert made_for(answer, [[2, 0], [9, 9], [9, 9], [5, 6], [9, 9]]) == (3, 2)  # 2, 3; 4; 5, 6
    assert made_for([1], []) == (0, 0)


@pytest.mark.parametrize(
    ("drafts", "layers", "said"),
    [
        (None, 1, "made no drafts"),
        (Drafts(10, [6, 3]), 1, ""),  # 19 tokens of the 17 that follow the first ones
        (Drafts(10, [4, 2]), 1, "something else drafts"),
        (Drafts(20, [6, 3]), 1, "others' requests"),
        (Drafts(10, [6, 3]), 2, "has several"),
        (Drafts(10, [9]), 2, ""),
        (Drafts(10, [6, 3], 4), 1, "others' requests"),  # one more than the three that were asked
        (Drafts(10, [6, 3], 3), 1, ""),
        (Drafts(10, [6, 3], unlike="another run"), 1, "another run"),
    ],
)
def test_drafts_that_say_nothing_of_the_mtp_layer_are_not_judged(drafts, layers, said):
    found = not_checked(drafts, SimpleNamespace(mtp_layer_ids=range(layers)), [10, 9, 1])
    assert said in found and bool(said) == bool(found)


def test_the_prompts_have_every_word_of_a_small_vocabulary():
    vocab = read_config(DEMO).vocab_size
    prompts = prompts_of(DEMO, ["Hello"], 32, 1024, vocab)
    assert {token for prompt in prompts for token in prompt.token_ids} == set(range(vocab))
    assert [prompt.max_tokens for prompt in prompts] == [32] + 8 * [1]
    words = Counter(token for prompt in prompts[1:] for token in prompt.token_ids)
    assert set(words.values()) == {2}
