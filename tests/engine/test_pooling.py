"""Embedding, classification and reward models made from this architecture: `--runner pooling`."""

import json

import pytest
import torch
import torch.nn.functional as F

from tests.support.checkpoints import make_checkpoint, read_tensors, write_tensors
from tests.support.engine import TOLERANCE, TWO_RANKS, EngineError, make_llm, run, run_in_turn
from tests.support.pooling import PROMPTS, last_hidden, with_tokenizer, without_head


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
