"""What becomes of a checkpoint's tensors: loaded, skipped by a rule, or refused with one message."""

import pytest
import torch

from tests.support.checkpoints import GATE, make_checkpoint, small_config, with_a_tensor_transposed
from vllm_bailing.audit import Audit
from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.errors import CheckpointError
from vllm_bailing.weights import layer_tensors, main_tensors, mtp_tensors


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
            ["1 of the wrong shape", GATE + " is [64, 32], config.json asks for [32, 64]", "another model size"],
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


def test_quantised_linear_layers_may_store_other_leaves(tensors):
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
