"""What becomes of a checkpoint's tensors: loaded, skipped by a rule, or refused with one message."""

import json

import pytest
import torch
from checkpoints import PROMPT, SMALL, make_checkpoint, read_tensors, write_tensors
from engine import EngineError, generate, run

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.reference import BailingMoeV2ForCausalLM
from vllm_bailing.weights import (
    Audit,
    Checkpoint,
    CheckpointError,
    damaged_files,
    layer_tensors,
    main_tensors,
    mtp_tensors,
)


def config_of(**overrides):
    raw = {key: value for key, value in {**SMALL, **overrides}.items() if value is not None and key != "model_type"}
    return BailingMoeV2Config(**raw)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_nextn_predict_layers": 2},
        {"tie_word_embeddings": True},
        {"use_qk_norm": False},
        {"use_bias": True, "use_qkv_bias": True},
        {"num_shared_experts": 0},
        {"num_shared_experts": 3, "first_k_dense_replace": 0},
        {"num_key_value_heads": 1, "head_dim": 16},
    ],
)
def test_names_and_shapes_are_those_of_the_plain_model(overrides):
    config = config_of(**overrides)
    expected = main_tensors(config)
    for layer in config.mtp_layer_ids:
        expected |= layer_tensors(config, layer)
    actual = {name: tuple(tensor.shape) for name, tensor in BailingMoeV2ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        del actual["lm_head.weight"]
    assert expected == actual


def audited(config, tensors, **options):
    audit = Audit(config, main_tensors(config), **options)
    passed = {name for name, _ in audit.passed(tensors.items())}
    audit.finish()
    return passed


@pytest.fixture
def tensors():
    return {name: torch.empty(shape, device="meta") for name, shape in main_tensors(config_of()).items()}


GATE = "model.layers.1.mlp.experts.5.gate_proj.weight"


def test_a_complete_checkpoint_passes_whole(tensors):
    assert audited(config_of(), tensors) == set(tensors)


def test_named_rules_skip_mtp_layers_rotary_tables_and_a_tied_head(tensors):
    config = config_of(num_nextn_predict_layers=1)
    extra = {name: torch.empty(shape, device="meta") for name, shape in layer_tensors(config, 3).items()}
    extra["model.layers.0.attention.rotary_emb.inv_freq"] = torch.empty(8)
    assert audited(config, tensors | extra) == set(tensors)
    tied = config_of(tie_word_embeddings=True)
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
        audited(config_of(), tensors)
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
    assert audited(config_of(), tensors, quantized=True) == set(tensors)
    tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight_packed")
    with pytest.raises(CheckpointError, match=r"1 missing \(model.layers.1.mlp.experts.3.up_proj.weight\)"):
        audited(config_of(), tensors, quantized=True)


def test_another_ranks_experts_may_be_absent_but_not_a_part_of_one(tensors):
    here = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name or ".experts.1." in name}
    assert audited(config_of(), here, may_lack_experts=True) == set(here)
    here.pop("model.layers.2.mlp.experts.1.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"1 missing \(model.layers.2.mlp.experts.1.up_proj.weight\)"):
        audited(config_of(), here, may_lack_experts=True)


def test_a_trainer_may_send_portions_but_only_of_this_model(tensors):
    audit = Audit(config_of(), main_tensors(config_of()))
    assert [name for name, _ in audit.passed([(GATE, tensors[GATE])])] == [GATE]
    audit.finish(complete=False)
    list(audit.passed([("model.layers.1.mlp.experts.5.gate.weight", tensors[GATE])]))
    with pytest.raises(CheckpointError, match="1 unexpected"):
        audit.finish(complete=False)


def test_shards_are_checked_by_index_and_size(tmp_path):
    model = make_checkpoint(tmp_path, shards=3)
    assert damaged_files(str(model)) == ""
    assert damaged_files("inclusionAI/Ling-flash-2.0") == ""
    second = model / "model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    assert f"{second} is cut off or damaged ({len(content) - 1} bytes" in damaged_files(str(model))
    second.unlink()
    assert f"1 of 3 files of the index are not in {model}, first {second.name}" in damaged_files(str(model))


def test_headers_tell_names_shapes_and_files(tmp_path):
    model = make_checkpoint(tmp_path, shards=3, num_nextn_predict_layers=1)
    checkpoint, config = Checkpoint(model), config_of(num_nextn_predict_layers=1)
    assert checkpoint.damage == ""
    expected = {**main_tensors(config), **mtp_tensors(config)}
    assert {name: stored.shape for name, stored in checkpoint.tensors.items()} == expected
    assert all(stored.is_float for stored in checkpoint.tensors.values())
    assert checkpoint.layers_behind(config) == [3]
    assert checkpoint.layers_behind(config_of(num_hidden_layers=4)) == []
    assert Checkpoint(tmp_path / "nowhere").tensors == Checkpoint.at("someone/nothing").tensors == {}
    assert not checkpoint.has_scales("model.layers.3.eh_proj")


def test_one_pattern_finds_the_files_of_a_layer(tmp_path):
    model = make_checkpoint(tmp_path, shards=23, num_nextn_predict_layers=1)
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    checkpoint = Checkpoint(model)

    def found(wanted):
        return {file.name for file in model.glob(str(checkpoint.files_with(wanted)))}

    for name in index:
        assert found(name.__eq__) == {index[name]}
    for name in ("enorm", "mlp.gate", "mlp.experts.1."):
        files = {index[one] for one in index if f"model.layers.3.{name}" in one}
        assert files <= found(lambda one, name=name: f"model.layers.3.{name}" in one)
    norms = {index[f"model.layers.3.{name}.weight"] for name in ("enorm", "hnorm")}
    assert norms <= found(lambda one: one.endswith(("enorm.weight", "hnorm.weight"))) < set(index.values())
    assert checkpoint.files_with(lambda name: False) is None


def test_a_scale_beside_the_projection_makes_it_quantised(tmp_path):
    write_tensors(tmp_path, {"model.layers.3.eh_proj.weight_scale_inv": torch.ones(1)})
    assert Checkpoint(tmp_path).has_scales("model.layers.3.eh_proj")


def test_headers_alone_show_what_does_not_fit(tmp_path):
    model = make_checkpoint(tmp_path)
    Audit(config_of(), main_tensors(config_of())).check(Checkpoint(model))
    reshape(model)
    with pytest.raises(CheckpointError, match=r"is \[64, 32\], config.json asks for \[32, 64\]"):
        Audit(config_of(), main_tensors(config_of())).check(Checkpoint(model))


def test_a_draft_takes_its_own_layer_and_passes_over_the_targets(tmp_path):
    config = config_of(num_nextn_predict_layers=1)
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


def cut_off(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def lose_shard(model):
    write_tensors(model, read_tensors(model), shards=4)
    (model / "model-00003-of-00004.safetensors").unlink()


def rename(model):
    tensors = read_tensors(model)
    tensors["model.layers.1.mlp.expert.5.gate_proj.weight"] = tensors.pop(GATE)
    write_tensors(model, tensors)


def reshape(model):
    tensors = read_tensors(model)
    tensors[GATE] = tensors[GATE].T.contiguous()
    write_tensors(model, tensors)


def add(model):
    write_tensors(model, {**read_tensors(model), "model.layers.0.attention.dense.bias": torch.zeros(64)})


def drop_expert_part(model):
    tensors = read_tensors(model)
    del tensors[GATE]
    write_tensors(model, tensors)


def nan_in_config(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": float("nan")}))


@pytest.mark.engine
@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (cut_off, "model.safetensors is cut off or damaged ("),
        (lose_shard, "first model-00003-of-00004.safetensors; fetch them"),
        (rename, "model.layers.1.mlp.expert.5.gate_proj.weight should be called " + GATE),
        (reshape, "is [64, 32], config.json asks for [32, 64]"),
        (add, "1 unexpected (model.layers.0.attention.dense.bias)"),
        (drop_expert_part, f"1 missing ({GATE})"),
        (nan_in_config, "rms_norm_eps=nan must be a finite number above 0"),
    ],
)
def test_the_engine_refuses_a_damaged_checkpoint_and_says_why(damage, fragment, tmp_path):
    model = make_checkpoint(tmp_path)
    damage(model)
    with pytest.raises(EngineError) as refusal:
        run(generate, model, [PROMPT], max_tokens=1)
    assert fragment in refusal.value.message
