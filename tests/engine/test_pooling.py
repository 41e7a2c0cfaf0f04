"""Embedding, classification and reward models made from this architecture: `--runner pooling`."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from tests.support.checkpoints import PROMPT, make_checkpoint, read_tensors, write_tensors
from tests.support.engine import TOLERANCE, TWO_RANKS, EngineError, make_llm, run, run_in_turn
from vllm_bailing import DEMO
from vllm_bailing.reference import BailingMoeV2ForCausalLM

PROMPTS = [PROMPT, PROMPT[:7]]


def without_head(folder, prefix="model.", labels=0, **keys):
    """A checkpoint as training an embedding or a reward model leaves it."""
    make_checkpoint(folder, tie_word_embeddings=False)
    tensors = {
        f"{prefix}{name.removeprefix('model.')}": tensor
        for name, tensor in read_tensors(folder).items()
        if name != "lm_head.weight"
    }
    if labels:
        torch.manual_seed(3)
        tensors["score.weight"] = torch.randn(labels, 64).bfloat16() * 0.2
        keys["id2label"] = {str(label): f"LABEL_{label}" for label in range(labels)}
    write_tensors(folder, tensors)
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return with_tokenizer(folder)


def with_tokenizer(folder):
    """vLLM makes no offline pooling engine without one."""
    for file in DEMO.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


@torch.no_grad()
def last_hidden(folder):
    """Hidden states [prompts, H] of the last tokens after the final norm, by the plain reference."""
    config = json.loads((folder / "config.json").read_text())
    tensors = {
        name if name.startswith(("model.", "score.")) else f"model.{name}": tensor.float()
        for name, tensor in read_tensors(folder).items()
    }
    from tests.support.checkpoints import small_config

    model = BailingMoeV2ForCausalLM(small_config(num_hidden_layers=config["num_hidden_layers"])).float()
    score = tensors.pop("score.weight", None)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    rows = [model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1] for prompt in PROMPTS]
    return torch.stack(rows), score


def _pooled(folder, task, **options):
    llm = make_llm(folder, runner="pooling", max_logprobs=20, **options)
    requests = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    if task == "embed":
        return torch.tensor([output.outputs.embedding for output in llm.embed(requests, use_tqdm=False)])
    return torch.tensor([output.outputs.probs for output in llm.classify(requests, use_tqdm=False)])


ARCHITECTURES = ["BailingMoeV2ForCausalLM", "BailingMoeV2Model", "BailingMoeV2ForSequenceClassification"]


@pytest.mark.parametrize(("prefix", "architecture"), [("model.", ARCHITECTURES[0]), ("", ARCHITECTURES[1])])
def test_embeddings_are_the_last_hidden_states_of_the_plain_model(prefix, architecture, tmp_path):
    folder = without_head(tmp_path, prefix, architectures=[architecture])
    embeddings = run_in_turn(_pooled, folder, "embed", convert="embed")
    assert (embeddings - F.normalize(last_hidden(folder)[0], dim=-1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("architecture", [ARCHITECTURES[0], ARCHITECTURES[2]])
def test_classes_are_those_of_the_plain_model(architecture, labels, tmp_path):
    folder = without_head(tmp_path, labels=labels, architectures=[architecture])
    probabilities = run_in_turn(_pooled, folder, "classify", convert="classify")
    hidden_states, score = last_hidden(folder)
    logits = hidden_states @ score.T
    wanted = logits.sigmoid() if labels == 1 else logits.softmax(-1)
    assert (probabilities - wanted).abs().max() <= TOLERANCE


def test_a_reward_model_on_two_ranks(tmp_path):
    folder = without_head(tmp_path, labels=1)
    rewards = run_in_turn(_pooled, folder, "classify", convert="classify", env=TWO_RANKS, tensor_parallel_size=2)
    hidden_states, score = last_hidden(folder)
    assert (rewards - (hidden_states @ score.T).sigmoid()).abs().max() <= TOLERANCE


def test_a_chat_model_gives_embeddings_too(tmp_path):
    folder = with_tokenizer(make_checkpoint(tmp_path))
    embeddings = run_in_turn(_pooled, folder, "embed", convert="embed")
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if name != "lm_head.weight"}
    write_tensors(folder, tensors)
    assert (embeddings - F.normalize(last_hidden(folder)[0], dim=-1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("labels", "convert", "message"),
    [
        (1, None, "a reward or classification model; serve it by --runner pooling --convert classify"),
        (0, None, "an embedding model, which is served by --runner pooling --convert embed"),
        (0, "classify", "a model without a classification head; leave --convert classify out"),
    ],
)
def test_the_wrong_way_to_serve_one_is_refused_with_the_right_one(labels, convert, message, tmp_path):
    folder = without_head(tmp_path, labels=labels)
    with pytest.raises(EngineError, match=message):
        run(make_llm, folder, **({"runner": "pooling", "convert": convert} if convert else {}))


def test_other_labels_than_the_configuration_says(tmp_path):
    folder = without_head(tmp_path, labels=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": {"0": "good"}}))
    with pytest.raises(EngineError, match="num_labels=1; set it to 3 in"):
        run(make_llm, folder, runner="pooling", convert="classify")
