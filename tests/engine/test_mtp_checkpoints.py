"""Where the MTP draft comes from: the target's files, other files, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.cases import load_case
from tests.support.checkpoints import make_checkpoint, read_tensors, without_mtp_in_config, write_tensors
from tests.support.conversations import evenly
from tests.support.cpu import NEEDS_AVX512
from tests.support.engine import TOLERANCE, TWO_RANKS, EngineError, make_llm, run, run_in_turn
from tests.support.quantized import no_expert, quantize
from tests.support.speculation import answers, draft_logits, mtp
from vllm_bailing import DEMO


def split_mtp(folder, tmp_path, count=1):
    """The target without its MTP layer, and the MTP layer alone."""
    tensors = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    prefix = f"model.layers.{config['num_hidden_layers']}."
    for name, wanted in (("target", False), ("draft", True)):
        part = tmp_path / name
        part.mkdir()
        write_tensors(part, {key: value for key, value in tensors.items() if key.startswith(prefix) == wanted})
        (part / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": count if wanted else 0}))
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (part / file).write_bytes((DEMO / file).read_bytes())
    return tmp_path / "target", tmp_path / "draft"


@pytest.mark.parametrize("whole", [False, True], ids=["layer_alone", "base_model"])
def test_the_draft_may_be_a_checkpoint_of_its_own(whole, tmp_path, plain_answers):
    target, draft = split_mtp(DEMO, tmp_path)
    draft = DEMO if whole else draft
    ids, counted = run_in_turn(answers, target, 25, mtp(2, model=str(draft)))
    assert ids == evenly(plain_answers, 25)
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]


def test_overrides_of_the_target_reach_its_draft(tmp_path):
    """YaRN by --hf-overrides: past the draft's original length it would propose nothing of use, without a word."""
    model, expected = load_case("mtp_yarn")
    raw = json.loads((model / "config.json").read_text())
    plain = tmp_path / "model"
    plain.mkdir()
    scaling = raw.pop("rope_scaling")
    (plain / "config.json").write_text(json.dumps({**raw, "num_nextn_predict_layers": 0}))
    (plain / "model.safetensors").symlink_to(model / "model.safetensors")
    overrides = {"rope_scaling": scaling, "num_nextn_predict_layers": 1}
    prompt = expected["input_ids"].tolist()
    logits = run_in_turn(draft_logits, plain, prompt, hf_overrides=overrides)
    wanted = expected["mtp_logits"][: len(logits)].log_softmax(-1)
    assert (logits.log_softmax(-1) - wanted).abs().max() <= TOLERANCE


def no_layer_in_files(model):
    write_tensors(model, {name: tensor for name, tensor in read_tensors(model).items() if ".layers.3." not in name})


def no_layer_at_all(model):
    without_mtp_in_config(model)
    no_layer_in_files(model)


def no_projection(model):
    tensors = read_tensors(model)
    del tensors["model.layers.3.eh_proj.weight"]
    write_tensors(model, tensors)


def cut_off(model):
    write_tensors(model, read_tensors(model), shards=3)
    file = model / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (
            without_mtp_in_config,
            ["num_nextn_predict_layers=0", "holds 1 MTP layer(s), number 3", "pass --hf-overrides"],
        ),
        (no_layer_in_files, ["has no MTP layer, though num_nextn_predict_layers=1", '"model": "..."']),
        (no_layer_at_all, ["has no MTP layer (num_nextn_predict_layers=0)", '"model": "..."']),
        (no_projection, ["1 missing (model.layers.3.eh_proj.weight)"]),
        (cut_off, ["model-00003-of-00003.safetensors is cut off or damaged"]),
    ],
)
def test_a_checkpoint_without_a_usable_mtp_layer_is_refused(damage, fragments, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1)
    damage(model)
    with pytest.raises(EngineError) as refusal:
        run(make_llm, model, speculative_config=mtp(1))
    assert refusal.value.message.startswith("CheckpointError: ")
    assert "\n" not in refusal.value.message
    for fragment in fragments:
        assert fragment in refusal.value.message


def test_a_draft_of_another_model_is_refused(tmp_path):
    model = make_checkpoint(tmp_path / "a")
    draft = make_checkpoint(tmp_path / "b", num_nextn_predict_layers=1, vocab_size=128)
    with pytest.raises(EngineError, match="has vocab_size=128, the target 256"):
        run(make_llm, model, speculative_config=mtp(1, model=str(draft)))


@NEEDS_AVX512
def test_a_quantized_target_has_a_quantized_draft(tmp_path):
    """Everything that vLLM's CPU build can quantize is int8; `eh_proj` has no scale and stays as it is."""
    model = Path(shutil.copytree(DEMO, tmp_path / "demo"))
    quantize(model, "w8a8", no_expert)
    wanted, _ = run_in_turn(answers, model, 25, 0)
    # Itself, and a draft without scales.
    for draft in ({}, {"model": str(DEMO)}):
        ids, counted = run_in_turn(answers, model, 25, mtp(2, **draft))
        assert ids == wanted
        assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]


def test_pipeline_stages_with_a_draft_are_refused_where_vllm_has_none():
    with pytest.raises(EngineError, match="looks for the draft model in every stage") as failed:
        run(make_llm, DEMO, speculative_config=mtp(1), pipeline_parallel_size=2, env=TWO_RANKS)
    assert "leave --speculative-config out" in failed.value.message
