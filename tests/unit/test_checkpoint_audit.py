"""What becomes of a checkpoint's tensors: loaded, skipped by a rule, or refused with one message."""

import pytest
import torch

from tests.support.checkpoints import GATE, make_checkpoint, small_config, with_a_tensor_transposed, without_its_end
from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.errors import CheckpointError
from vllm_bailing.tensor_names import layer_tensors, main_tensors, mtp_tensors


def audited(config, tensors, **options):
    audit = Audit(config, main_tensors(config), **options)
    passed = {name for name, _ in audit.passed(tensors.items())}
    audit.finish()
    return passed


@pytest.fixture
def tensors():
    return {name: torch.empty(shape, device="meta") for name, shape in main_tensors(small_config()).items()}


def test_a_complete_checkpoint_passes_whole(tensors):
    assert audited(small_config(), tensors) == set(tensors)


def test_named_rules_skip_mtp_layers_rotary_tables_and_a_tied_head(tensors):
    config = small_config(num_nextn_predict_layers=1)
    extra = {name: torch.empty(shape, device="meta") for name, shape in layer_tensors(config, 3).items()}
    extra["model.layers.0.attention.rotary_emb.inv_freq"] = torch.empty(8)
    assert audited(config, tensors | extra) == set(tensors)
    tied = small_config(tie_word_embeddings=True)
    assert audited(tied, tensors) == set(tensors) - {"lm_head.weight"}


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (lambda t: t.pop(GATE), ["1 missing", GATE, "incomplete download"]),
        (lambda t: t.pop("model.norm.weight"), ["1 missing", "model.norm.weight"]),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.16.up_proj.weight": torch.empty(1)}),
            ["1 unexpected", "experts.16"],
        ),
        (
            lambda t: t.update({"model.layers.0.attention.dense.bias": torch.empty(64)}),
            ["1 unexpected", "attention.dense.bias"],
        ),
        (lambda t: t.update({"model.layers.1.mlp.experts.50.gate_proj.w": t.pop(GATE)}), ["should be called " + GATE]),
        (
            lambda t: t.update({GATE: torch.empty(64, 32, device="meta")}),
            ["1 of the wrong shape", GATE + " is [64, 32], config.json asks for [32, 64]", "saved transposed"],
        ),
        (
            lambda t: t.update({"model.layers.3.enorm.weight": torch.empty(64)}),
            ["num_nextn_predict_layers=0", "set num_nextn_predict_layers to 1"],
        ),
        (lambda t: t.update({f"base_model.{i}": torch.empty(1) for i in range(9)}), ["9 unexpected", ", ...)"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tensors, change, fragments):
    change(tensors)
    with pytest.raises(CheckpointError) as refusal:
        audited(small_config(), tensors)
    message = str(refusal.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_quantized_linear_layers_may_store_other_leaves(tensors):
    for name in [name for name in tensors if ".experts." in name or ".attention.dense." in name]:
        module = tensors.pop(name) is None or name.removesuffix(".weight")
        tensors[f"{module}.weight_packed"] = torch.empty(1, dtype=torch.int32)
        tensors[f"{module}.weight_scale"] = torch.empty(1)
    tensors["model.layers.0.attention.k_scale"] = torch.empty(1)
    assert audited(small_config(), tensors, quantized=True) == set(tensors)
    tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight_packed")
    with pytest.raises(CheckpointError, match=r"1 missing \(model.layers.1.mlp.experts.3.up_proj.weight\)"):
        audited(small_config(), tensors, quantized=True)


@pytest.mark.parametrize(
    ("name", "tensor", "fragment"),
    [
        # Integers are packed; a float of another shape is another model's.
        (GATE, torch.empty(64, 32), f"1 of the wrong shape ({GATE} is [64, 32], config.json asks for [32, 64]"),
        ("model.norm.weight", torch.empty(32), "1 of the wrong shape (model.norm.weight is [32]"),
        ("model.layers.0.attention.sinks", torch.empty(4), "1 unexpected (model.layers.0.attention.sinks)"),
        (
            "model.layers.1.mlp.experts.16.up_proj.qweight",
            torch.empty(1),
            "1 unexpected (model.layers.1.mlp.experts.16",
        ),
        ("model.layers.0.k_scale", torch.empty(1), "1 unexpected (model.layers.0.k_scale)"),
    ],
)
def test_a_quantized_checkpoint_may_hold_nothing_else(tensors, name, tensor, fragment):
    tensors[name] = tensor
    with pytest.raises(CheckpointError) as refusal:
        audited(small_config(), tensors, quantized=True)
    assert fragment in str(refusal.value)


def test_another_ranks_experts_may_be_absent_but_not_a_part_of_one(tensors):
    here = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name or ".experts.1." in name}
    assert audited(small_config(), here, may_lack_experts=True) == set(here)
    here.pop("model.layers.2.mlp.experts.1.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"1 missing \(model.layers.2.mlp.experts.1.up_proj.weight\)"):
        audited(small_config(), here, may_lack_experts=True)


def test_a_trainer_may_send_portions_but_only_of_this_model(tensors):
    audit = Audit(small_config(), main_tensors(small_config()))
    assert [name for name, _ in audit.passed([(GATE, tensors[GATE])])] == [GATE]
    audit.finish(complete=False)
    list(audit.passed([("model.layers.1.mlp.experts.5.gate.weight", tensors[GATE])]))
    with pytest.raises(CheckpointError, match="1 unexpected"):
        audit.finish(complete=False)


def test_headers_alone_show_what_does_not_fit(tmp_path):
    model = make_checkpoint(tmp_path)
    Audit(small_config(), main_tensors(small_config())).check(Checkpoint(model))
    with_a_tensor_transposed(model)
    with pytest.raises(CheckpointError, match=r"is \[64, 32\], config.json asks for \[32, 64\]"):
        Audit(small_config(), main_tensors(small_config())).check(Checkpoint(model))


def test_a_draft_takes_its_own_layer_and_passes_over_the_targets(tmp_path):
    config = small_config(num_nextn_predict_layers=1)
    everything = {**main_tensors(config), **mtp_tensors(config), "model.layers.1.attention.k_scale": (1,)}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in everything.items()}
    audit = Audit(config, mtp_tensors(config), elsewhere=main_tensors(config), is_draft=True)
    assert {name for name, _ in audit.passed(tensors.items())} == set(mtp_tensors(config))
    audit.finish()
    tensors["model.layers.3.extra.weight"] = torch.empty(1)
    audit = Audit(config, mtp_tensors(config), elsewhere=main_tensors(config), is_draft=True)
    list(audit.passed(tensors.items()))
    with pytest.raises(CheckpointError, match=r"1 unexpected \(model.layers.3.extra.weight\)"):
        audit.finish()


# ---- rules by which nothing is wrong with a tensor that is not loaded --------------------------------------------

EXPERT = "model.layers.1.mlp.experts.3.up_proj"
BIAS = "model.layers.1.mlp.gate.expert_bias"


@pytest.mark.parametrize(
    ("absent", "name", "rule"),
    [
        (".experts.3.", f"{EXPERT}.weight", "another rank's or the target's"),
        (".experts.3.", f"{EXPERT}.weight_packed", "another rank's or the target's"),
        ("expert_bias", BIAS, "another rank's or the target's"),
        (".experts.3.", f"{EXPERT}_extra.weight", None),
        ("nothing", "model.layers.0.attention.rotary_emb.inv_freq", "rotary tables are computed"),
        ("nothing", "model.layers.0.attention.rotary_emb.cos_cached", "rotary tables are computed"),
        ("nothing", "model.layers.0.attention.rotary_emb.sin_cached", "rotary tables are computed"),
        ("nothing", "model.layers.3.enorm.weight", "MTP layers are the draft model's"),
        ("nothing", "model.layers.4.enorm.weight", None),
        ("nothing", f"{EXPERT}.weight", None),
        ("nothing", "lm_head.bias", None),
    ],
)
def test_every_rule_has_a_name(absent, name, rule):
    audit = Audit.of_target(small_config(num_nextn_predict_layers=1), is_here=lambda tensor: absent not in tensor)
    assert audit.skip_rule(name) == rule


def test_an_audit_starts_again_with_the_same_expectations_and_nothing_seen():
    audit = Audit.of_target(small_config(), quantized=True, folder="/a/folder")
    list(audit.passed([(GATE, torch.empty(32, 64)), ("a.stranger", torch.empty(1))]))
    again = audit.restarted()
    assert (again.expected, again.quantized, again.folder) == (audit.expected, True, "/a/folder")
    assert (again.seen, again.unexpected) == (set(), {}) and (audit.seen, len(audit.unexpected)) == ({GATE}, 1)


@pytest.mark.parametrize("head", ["", "score.weight"])
def test_a_model_without_the_usual_head_skips_it(head):
    audit = Audit.of_target(small_config(num_labels=3), head=head)
    assert audit.skip_rule("lm_head.weight") == "no head of this kind is used"
    assert ("score.weight" in audit.expected) == (head == "score.weight")


def test_a_draft_may_have_an_embedding_and_options_of_its_own():
    config = small_config(num_nextn_predict_layers=1)
    embedding = "model.word_embeddings.weight"
    assert embedding not in Audit.of_draft(config).expected
    own = Audit.of_draft(config, has_embedding=True, quantized=True)
    assert own.expected[embedding] == main_tensors(config)[embedding] and own.quantized


def test_a_tied_head_is_skipped_and_nothing_else():
    audit = Audit.of_target(small_config(tie_word_embeddings=True))
    assert audit.skip_rule("lm_head.weight") == "the head is the embedding"
    assert audit.skip_rule("model.extra.weight") is None


@pytest.mark.parametrize("layers", [1, 3])
def test_a_draft_skips_what_the_target_accounts_for(layers):
    audit = Audit.of_draft(small_config(num_hidden_layers=layers, num_nextn_predict_layers=1))
    assert audit.skip_rule("model.norm.weight") == "another rank's or the target's"
    assert audit.skip_rule("model.layers.0.attention.extra") == "the target's"
    assert audit.skip_rule("extra") == "the target's"
    assert audit.skip_rule(f"model.layers.{layers}.extra.weight") is None


def test_what_a_rule_skips_is_dropped_before_anything_is_computed_from_it(tensors):
    audit = Audit.of_target(small_config(num_nextn_predict_layers=1))
    names = [GATE, "model.layers.3.enorm.weight", "a.stranger"]
    assert [name for name, _ in audit.needed((name, torch.empty(1)) for name in names)] == [GATE, "a.stranger"]


# ---- what is passed on, and what is held back --------------------------------------------------------------------


def test_integers_of_another_shape_are_a_quantized_checkpoints_own_affair(tensors):
    packed = {**tensors, GATE: torch.empty(32, 8, dtype=torch.int32)}
    assert audited(small_config(), packed, quantized=True) == set(tensors)
    with pytest.raises(
        CheckpointError, match=r"1 of integers or 8 bits .*quantized weights without a quantization_config"
    ):
        audited(small_config(), packed)


@pytest.mark.parametrize("shape", [(1,), (1, 64), (4, 8), (64,), (32, 63)])
def test_integers_that_are_no_pack_of_the_weight_are_refused(shape, tensors):
    """A layer might repeat them until they fill the weight."""
    given = {**tensors, GATE: torch.empty(shape, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match="1 of the wrong shape"):
        audited(small_config(), given, quantized=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    "name",
    [
        "model.word_embeddings.weight",
        "model.norm.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.gate.expert_bias",
    ],
)
def test_what_no_scheme_quantizes_is_of_floats_in_a_quantized_checkpoint_too(name, dtype, tensors):
    given = {**tensors, name: torch.empty(tensors[name].shape, dtype=dtype)}
    with pytest.raises(CheckpointError, match="1 of integers or 8 bits"):
        audited(small_config(), given, quantized=True)


EIGHT_BITS = {
    "fp8": ({"quant_method": "fp8"}, torch.float8_e4m3fn),
    "float": ({"config_groups": {"all": {"weights": {"type": "float", "num_bits": 8}}}}, torch.float8_e4m3fn),
    "int": ({"config_groups": {"all": {"weights": {"type": "int", "num_bits": 8}}}}, torch.int8),
}


@pytest.mark.parametrize("scheme", EIGHT_BITS)
def test_numbers_of_another_kind_than_the_scheme_says_are_refused(scheme, tensors):
    """A layer would convert them, and answer with other weights."""
    quantization, right = EIGHT_BITS[scheme]
    config = small_config(quantization_config={"quant_method": "compressed-tensors", **quantization})
    for dtype in (torch.int8, torch.float8_e4m3fn):
        given = {**tensors, GATE: torch.empty(tensors[GATE].shape, dtype=dtype)}
        if dtype is right:
            assert audited(config, given, quantized=True) == set(tensors)
            continue
        with pytest.raises(CheckpointError, match=r"1 not of (float8|integer) numbers, as quantization_config says"):
            audited(config, given, quantized=True)


@pytest.mark.parametrize(("dtype", "is_plain"), [(torch.float8_e4m3fn, False), (torch.bfloat16, True)])
def test_eight_bits_are_no_plain_weight(tensors, dtype, is_plain):
    given = {**tensors, GATE: torch.empty(32, 64, dtype=dtype, device="meta")}
    assert audited(small_config(), given, quantized=True) == set(tensors)
    if is_plain:
        assert audited(small_config(), given) == set(tensors)
    else:
        with pytest.raises(CheckpointError, match="1 of integers or 8 bits"):
            audited(small_config(), given)
    # Eight bits hold one number each: of another shape they are another model's.
    given[GATE] = torch.empty(32, 8, dtype=dtype, device="meta")
    with pytest.raises(CheckpointError, match="1 of the wrong shape"):
        audited(small_config(), given, quantized=True)


@pytest.mark.parametrize("leaf", ["qweight", "weight_packed"])
def test_a_packed_weight_stands_for_the_plain_one(leaf, tensors):
    module = GATE.removesuffix(".weight")
    tensors.pop(GATE)
    with pytest.raises(CheckpointError, match="1 missing"):
        audited(small_config(), {**tensors, f"{module}.scales": torch.empty(1)}, quantized=True)
    audited(small_config(), {**tensors, f"{module}.{leaf}": torch.empty(1, dtype=torch.int32)}, quantized=True)


def test_scales_of_the_cache_lie_beside_the_attention_or_within_it(tensors):
    names = {"model.layers.0.attention.k_scale", "model.layers.0.attention.attn.v_scale"}
    given = tensors | dict.fromkeys(names, torch.empty(1))
    assert audited(small_config(), given, quantized=True) == set(given)


@pytest.mark.parametrize("name", [GATE, "a.stranger"])
def test_what_does_not_fit_is_not_passed_on(name):
    audit = Audit.of_target(small_config())
    assert list(audit.passed([(name, torch.empty(1))])) == []


def test_a_file_that_ends_early_is_the_reason_and_another_error_is_left_alone(tmp_path):
    model = make_checkpoint(tmp_path)

    def breaking():
        yield GATE, torch.empty(32, 64)
        raise OSError("short read")

    whole = Audit.of_target(small_config(), folder=str(model))
    with pytest.raises(OSError, match="short read"):
        list(whole.passed(breaking()))
    without_its_end(model)
    with pytest.raises(CheckpointError, match=r"^the checkpoint cannot be read: .*model\.safetensors"):
        list(whole.passed(breaking()))


def test_headers_of_a_damaged_file_are_refused_with_the_damage(tmp_path):
    model = make_checkpoint(tmp_path)
    without_its_end(model)
    with pytest.raises(CheckpointError, match=r"^the checkpoint cannot be read: .*model\.safetensors"):
        Audit.of_target(small_config()).check(Checkpoint(model))


def test_headers_show_floats_of_another_shape_in_a_quantized_checkpoint_too(tmp_path):
    model = make_checkpoint(tmp_path)
    with_a_tensor_transposed(model)
    with pytest.raises(CheckpointError, match="1 of the wrong shape"):
        Audit.of_target(small_config(), quantized=True).check(Checkpoint(model))


# ---- what is missing, and why ------------------------------------------------------------------------------------


def without_expert(tensors, expert):
    return {name: tensor for name, tensor in tensors.items() if f".experts.{expert}." not in name}


def test_a_whole_expert_is_missing_unless_another_rank_may_hold_it(tensors):
    with pytest.raises(CheckpointError, match="6 missing"):
        audited(small_config(), without_expert(tensors, 3))
    audited(small_config(), without_expert(tensors, 3), may_lack_experts=True)


def test_expert_biases_are_missed_only_where_the_router_has_them(tensors):
    biases = {name for name in tensors if name.endswith("expert_bias")}
    plain = {name: tensor for name, tensor in tensors.items() if name not in biases}
    audited(small_config(moe_router_enable_expert_bias=False), plain)
    with pytest.raises(CheckpointError, match=r"2 missing .*expert_bias"):
        audited(small_config(), plain)
    plain.pop(GATE)
    with pytest.raises(CheckpointError, match="1 missing"):
        audited(small_config(moe_router_enable_expert_bias=False), plain)


def refusal_of(tensors, audit):
    list(audit.passed(tensors.items()))
    with pytest.raises(CheckpointError) as refusal:
        audit.finish()
    return str(refusal.value)


def test_the_message_lists_four_of_each_kind(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.0.mlp.")]:
        tensors.pop(name)
    tensors |= {f"stranger.{number}": torch.empty(1) for number in range(4)}
    tensors["model.norm.weight"] = torch.empty(3)
    assert refusal_of(tensors, Audit.of_target(small_config())) == (
        "the checkpoint does not fit its config.json: "
        "3 missing (model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight, "
        "model.layers.0.mlp.down_proj.weight); "
        "4 unexpected (stranger.0, stranger.1, stranger.2, stranger.3); "
        "1 of the wrong shape (model.norm.weight is [3], config.json asks for [64]). "
        "Take weights and config.json from the same place"
    )


def test_more_than_four_are_cut_short(tensors):
    tensors |= {f"stranger.{number}": torch.empty(1) for number in range(5)}
    assert refusal_of(tensors, Audit.of_target(small_config())) == (
        "the checkpoint does not fit its config.json: "
        "5 unexpected (stranger.0, stranger.1, stranger.2, stranger.3, ...). "
        "Likely cause: weights that this architecture has no place for; remove them from the checkpoint"
    )


INCOMPLETE = "Likely cause: an incomplete download or export; fetch or export the checkpoint again"


def test_a_damaged_file_is_the_cause_before_any_other(tensors, tmp_path):
    model = make_checkpoint(tmp_path)
    tensors.pop(GATE)
    assert refusal_of(tensors, Audit.of_target(small_config(), folder=str(model))).endswith(f". {INCOMPLETE}")
    without_its_end(model)
    message = refusal_of(tensors, Audit.of_target(small_config(), folder=str(model)))
    assert "Likely cause: " in message and "model.safetensors" in message.partition("Likely cause: ")[2]


def test_only_a_draft_without_any_of_its_tensors_has_no_mtp_layer():
    config = small_config(num_nextn_predict_layers=1)
    assert "has no MTP layer, though num_nextn_predict_layers=1" in refusal_of({}, Audit.of_draft(config))
    some = {"model.layers.3.enorm.weight": torch.empty(64)}
    assert refusal_of(some, Audit.of_draft(config)).endswith(INCOMPLETE)
    assert refusal_of({}, Audit.of_target(config)).endswith(INCOMPLETE)


def test_layers_past_the_last_are_counted(tensors):
    tensors |= {
        f"model.layers.{layer}.{norm}.weight": torch.empty(64) for layer in (3, 4) for norm in ("enorm", "hnorm")
    }
    message = refusal_of(tensors, Audit.of_target(small_config()))
    assert "the checkpoint has 2 layer(s) past num_hidden_layers=3" in message
    assert "set num_nextn_predict_layers to 2 in config.json" in message
