"""The plain model as a model of transformers: training, generation, masks, caches, saving, and what it refuses.

transformers' wheels come without its common model tests; these hold the same promises, on a small model and offline.
"""

import copy
import inspect

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from tests.support.checkpoints import PROMPT, make_checkpoint, read_tensors, small_config
from vllm_bailing.reference import (
    CACHE,
    BailingMoeV2ForCausalLM,
    BailingMoeV2ForSequenceClassification,
    BailingMoeV2Model,
    plain_attention,
)

IDS = torch.tensor([PROMPT[:20]])
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint", num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def models(folder):
    """{attention: the same model}; "own" is registered as users register theirs."""
    AttentionInterface.register("own", plain_attention)
    return {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=name).eval()
        for name in ("sdpa", "eager", "own")
    }


@pytest.fixture
def model(models):
    return models["sdpa"]


@pytest.fixture
def trained(model):
    """A copy to train; attention and experts start from weights that matter."""
    return copy.deepcopy(model).train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- training ---------------------------------------------------------------------------------------------------


def some_labels(rows):
    ids = torch.tensor([PROMPT[i : i + 12] for i in range(rows)])
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 * row + 1] = -100  # another number of labels in every row
    return ids, labels


def test_accumulated_gradients_are_those_of_the_whole_batch(trained):
    ids, labels = some_labels(4)
    trained(ids, labels=labels).loss.backward()
    wanted = gradients(trained)
    trained.zero_grad()
    items = (labels[:, 1:] != -100).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        trained(ids[rows], labels=labels[rows], num_items_in_batch=items).loss.backward()
    found = gradients(trained)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", ["tokens", "sequences"])
def test_trainer_with_accumulation_takes_the_steps_of_the_whole_batch(kind, folder, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    ids, labels = some_labels(8)
    if kind == "sequences":
        labels = torch.arange(8) % 3
    data = [{"input_ids": i, "labels": one} for i, one in zip(ids, labels, strict=True)]
    after = []
    for size, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        auto = AutoModelForCausalLM if kind == "tokens" else AutoModelForSequenceClassification
        options = {} if kind == "tokens" else {"num_labels": 3}
        model = auto.from_pretrained(folder, dtype=torch.float32, **options)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=0,
        )
        Trainer(model=model, args=arguments, train_dataset=data).train()
        after.append(model.state_dict())
    for name, tensor in after[0].items():
        torch.testing.assert_close(after[1][name], tensor, atol=1e-4, rtol=1e-3)


def test_targets_that_are_shifted_already_replace_the_labels(model):
    shifted = torch.cat((IDS[:, 1:], torch.tensor([[-100]])), 1)
    wanted = model(IDS, labels=IDS).loss
    torch.testing.assert_close(model(IDS, shift_labels=shifted).loss, wanted)
    torch.testing.assert_close(model(IDS, labels=torch.zeros_like(IDS), shift_labels=shifted).loss, wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant, trained):
    trained(IDS, labels=IDS).loss.backward()
    wanted = gradients(trained)
    trained.zero_grad()
    trained.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    trained.model.layers[1].mlp.gate.register_forward_hook(lambda *_: calls.append(1))
    if reentrant:
        trained.enable_input_require_grads()
    trained(IDS, labels=IDS).loss.backward()
    assert len(calls) == 2  # once more in the backward pass
    found = gradients(trained)
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)
    filled = trained.eval()(IDS, use_cache=True)
    with pytest.raises(ValueError, match="gradient checkpointing; leave one of them out"):
        trained.train()(IDS, past_key_values=getattr(filled, CACHE))


def test_generation_during_training_with_gradient_checkpointing(model, trained):
    trained.gradient_checkpointing_enable()
    assert torch.equal(trained.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


@torch.no_grad()
def test_routing_stays_in_fp32_under_autocast(model):
    gate = model.model.layers[1].mlp.gate
    hidden = torch.randn(50, 64)
    wanted = gate(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gate(hidden)
    for one, other in zip(wanted, found, strict=True):
        assert one.dtype == other.dtype != torch.bfloat16
        assert torch.equal(one, other)


# ---- generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"assistant": True},
        {"return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("padding", [0, 5])
def test_options_of_generate_change_no_token(options, padding, model):
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[:, :padding], mask[:, :padding] = 0, 0
    wanted = model.generate(IDS[:, padding:], **GREEDY)[:, 20 - padding :]
    options = dict(options)
    if options.pop("assistant", False):
        options["assistant_model"] = model
    answer = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    if options.get("return_dict_in_generate"):
        assert len(answer.attentions[0]) == 3  # layers
        assert answer.attentions[0][0].shape == (1, 4, 20, 20)
        answer = answer.sequences
    assert torch.equal(answer[:, 20:], wanted)


@pytest.mark.parametrize("attention", ["eager", "own"])
@torch.no_grad()
def test_attention_implementations_give_the_same_logits(attention, models):
    assert models[attention].config._attn_implementation == attention
    torch.testing.assert_close(models[attention](IDS).logits, models["sdpa"](IDS).logits, **CLOSE)


def test_embeddings_in_place_of_tokens(model):
    embeds = model.get_input_embeddings()(IDS)
    wanted = model.generate(IDS, **GREEDY)[:, 20:]
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), wanted)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(IDS).logits)


@torch.no_grad()
def test_a_cache_filled_in_any_steps_gives_the_logits_of_one_pass(model):
    wanted = model(IDS).logits
    for cache in (None, StaticCache(config=model.config, max_cache_len=32)):
        rows = []
        for part in IDS.split((7, 1, 12), dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = getattr(output, CACHE)
            rows.append(output.logits)
        torch.testing.assert_close(torch.cat(rows, 1), wanted, **CLOSE)


@pytest.mark.parametrize("window", [{"sliding_window": 8, "use_sliding_window": False}, {"attention_chunk_size": 8}])
def test_a_window_that_is_not_in_use_bounds_no_cache(window, tmp_path, model):
    keys = {"num_nextn_predict_layers": 1, **window}
    narrow = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path, **keys), dtype=torch.float32)
    assert torch.equal(narrow.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


@pytest.mark.parametrize("keys", [{"layer_types": ["sliding_attention"] * 3}, {"layer_types": "x"}])
def test_another_kind_of_attention_is_refused(keys):
    with pytest.raises(ValueError, match=f"^{next(iter(keys))}.* remove"):
        small_config(**keys)


# ---- masks and positions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kept=st.lists(st.integers(1, 9), min_size=2, max_size=2),
    left=st.booleans(),
    form=st.sampled_from("2 bool add".split()),
)
@torch.no_grad()
def test_padding_changes_no_logit(attention, kept, left, form, models):
    model, width = models[attention], 9
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    places = [slice(width - n, width) if left else slice(0, n) for n in kept]
    for row, (n, place) in enumerate(zip(kept, places, strict=True)):
        ids[row, place], mask[row, place] = IDS[0, row : row + n], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if form != "2":
        square = torch.ones(width, width, dtype=torch.bool).tril() & mask[:, None, None].bool()
        square = square | torch.eye(width, dtype=torch.bool)
        mask = square if form == "bool" else torch.zeros(square.shape).masked_fill(~square, -1e9)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row, (n, place) in enumerate(zip(kept, places, strict=True)):
        alone = models["sdpa"](IDS[:, row : row + n]).logits[0]
        torch.testing.assert_close(logits[row, place], alone, **CLOSE)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(attention, use_cache, models):
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None]
    logits = models[attention](IDS, position_ids=positions, use_cache=use_cache).logits
    apart = torch.cat([models["sdpa"](part).logits for part in IDS.split((7, 13), dim=1)], 1)
    torch.testing.assert_close(logits, apart, **CLOSE)


# ---- outputs ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_outputs_that_are_asked_for(models):
    outputs = {}
    for name in ("sdpa", "eager"):
        outputs[name] = models[name](IDS, output_hidden_states=True, output_attentions=True, output_router_logits=True)
        assert len(outputs[name].hidden_states) == 4
        assert [weights.shape for weights in outputs[name].attentions] == [(1, 4, 20, 20)] * 3
    for one, other in zip(outputs["sdpa"].attentions, outputs["eager"].attentions, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
        torch.testing.assert_close(one.sum(-1), torch.ones(1, 4, 20))
        assert not one.triu(1).any()
    gates = [layer.mlp.gate for layer in models["sdpa"].model.layers[1:3]]
    output = outputs["sdpa"]
    assert len(output.routing) == len(output.router_logits) == 2
    for gate, logits, (ids, weights) in zip(gates, output.router_logits, output.routing, strict=True):
        chosen = logits.sigmoid().gather(1, ids)
        torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True) * gate.config.routed_scaling_factor)
    with pytest.raises(ValueError, match="attn_implementation='eager', not 'own'"):
        models["own"](IDS, output_attentions=True)


@torch.no_grad()
def test_a_tuple_in_place_of_a_dictionary(model):
    whole = model(IDS, labels=IDS, use_cache=False)
    for module, first in ((model, whole.loss), (model.model, model.model(IDS).last_hidden_state)):
        options = {"labels": IDS} if module is model else {}
        answer = module(IDS, return_dict=False, **options)
        assert type(answer) is tuple
        torch.testing.assert_close(answer[0], first)


# ---- arguments --------------------------------------------------------------------------------------------------

SQUARE = torch.ones(1, 1, 20, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_mask": torch.ones(3, 4)}, "does not know head_mask and would ignore it"),
        ({"cache_position": torch.arange(20)}, "does not know cache_position"),
        ({"token_type_ids": torch.ones_like(IDS)}, "does not know token_type_ids"),
        ({"atention_mask": SQUARE, "foo": 1}, "does not know atention_mask, foo"),
        ({"past_key_values": ((SQUARE, SQUARE),)}, "past_key_values is a tuple; give a Cache"),
        ({"inputs_embeds": torch.zeros(1, 20, 64)}, "either input_ids or inputs_embeds"),
        ({"input_ids": None}, "either input_ids or inputs_embeds"),
        ({"attention_mask": torch.ones(1, 19)}, r"attention_mask \[1, 19\].* give \[1, 20\]"),
        ({"attention_mask": torch.ones(2, 20)}, r"attention_mask \[2, 20\]"),
        ({"attention_mask": torch.ones(1, 20, 20)}, r"attention_mask \[1, 20, 20\]"),
        ({"attention_mask": SQUARE.long()}, "of torch.int64 does not fit"),
        ({"attention_mask": SQUARE[..., :19]}, r"attention_mask \[1, 1, 20, 19\]"),
        ({"position_ids": torch.arange(21)[None]}, r"position_ids \[1, 21\] must be \[1, 20\]"),
        ({"position_ids": torch.arange(20)}, r"position_ids \[20\] must be \[1, 20\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 7, 20])}, "cu_seq_lens_q without position_ids"),
        ({"labels": IDS, "logits_to_keep": 1}, r"labels \[1, 20\] need as many logits.* \[1, 1\]"),
        ({"labels": IDS[:, :19]}, r"labels \[1, 19\] need as many logits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_would_be_ignored_or_misread_is_refused_in_one_line(arguments, message, model):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        model(**{"input_ids": IDS, **arguments})
    assert "\n" not in str(caught.value)


def test_the_arguments_that_the_library_names_are_taken(model):
    """None of them changes these logits, and none is refused."""
    wanted = model(IDS).logits
    named = {"num_items_in_batch": torch.tensor(3), "is_causal": True, "output_hidden_states": False, "foo": None}
    torch.testing.assert_close(model(IDS, **named).logits, wanted)


# ---- the other classes, and files -------------------------------------------------------------------------------


@torch.no_grad()
def test_the_bare_model_gives_the_states_after_the_final_norm(folder, model):
    bare = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(bare) is BailingMoeV2Model
    wanted = model(IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(bare(IDS).last_hidden_state, wanted)
    torch.testing.assert_close(model.logits(bare(IDS).last_hidden_state), model(IDS).logits)


@torch.no_grad()
def test_a_sequence_is_scored_at_its_last_token(folder, model):
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=3).eval()
    assert type(classifier) is BailingMoeV2ForSequenceClassification
    ids = IDS.clamp(min=1)  # 0 is padding
    wanted = model.model(ids).last_hidden_state[:, -1] @ classifier.score.weight.T
    torch.testing.assert_close(classifier(ids).logits, wanted)
    for side in ((5, 0), (0, 5)):
        padded, mask = (torch.nn.functional.pad(x, side) for x in (ids, torch.ones_like(ids)))
        torch.testing.assert_close(classifier(padded, attention_mask=mask).logits, wanted, **CLOSE)
    loss = classifier(ids, labels=torch.tensor([2])).loss
    torch.testing.assert_close(loss, -wanted.log_softmax(-1)[0, 2])
    with pytest.raises(ValueError, match="output_router_logits"):
        classifier(ids, output_router_logits=True)
    assert "attention_mask" in inspect.signature(classifier.forward).parameters  # Trainer keeps what it finds here


@pytest.mark.parametrize("size", ["5GB", "100KB"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification])
def test_saved_files_load_again(auto, size, folder, tmp_path):
    model = auto.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "100KB")
    again, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model)
    assert again.config.architectures == [type(model).__name__]
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_bare_model_s_files_load_with_a_head(folder, tmp_path):
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"lm_head.weight"}
    stored = read_tensors(folder)
    assert all(
        torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items() if "lm_head" not in name
    )


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_resized_vocabulary(tied, tmp_path):
    model = BailingMoeV2ForCausalLM.from_pretrained(
        make_checkpoint(tmp_path, tie_word_embeddings=tied), dtype=torch.float32
    )
    wanted = model(IDS).logits
    model.resize_token_embeddings(300, mean_resizing=False)
    output = model(IDS, labels=torch.full_like(IDS, 299))
    assert model.config.vocab_size == 300 and torch.isfinite(output.loss)
    torch.testing.assert_close(output.logits[..., :256], wanted)
    assert (model.lm_head.weight is model.model.word_embeddings.weight) == tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype, folder, model):
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    logits = half(IDS).logits
    assert logits.dtype == dtype
    additive = torch.zeros(20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -1e4)[None, None]
    torch.testing.assert_close(half(IDS, attention_mask=additive).logits, logits, atol=0.1, rtol=0.1)
    eager = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    assert torch.isfinite(eager(IDS).logits).all()
