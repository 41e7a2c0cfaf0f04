"""A draft vocabulary."""

import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from tests.support.checkpoints import PROMPT, make_checkpoint
from tests.support.config_switches import SWITCHES
from tests.support.engine import TOLERANCE, TWO_RANKS, EngineError, make_llm, run, run_in_turn
from tests.support.quantized import quantize_by_command
from tests.support.speculation import answers, draft_logits, mtp
from vllm_bailing import DEMO
from vllm_bailing.config import read_config
from vllm_bailing.errors import SettingsError


def test_a_draft_vocabulary_changes_no_answer_and_only_the_chosen_tokens_are_proposed(
    tmp_path, plain_answers, drafted_answers
):
    common = Counter(token for ids in plain_answers for token in ids)
    chosen = [token for token, _ in common.most_common(len(common) // 2)]
    file = tmp_path / "draft_vocab.json"
    file.write_text(json.dumps(chosen))
    options = {"additional_config": {"bailing_draft_vocab": str(file)}}
    ids, counted = run_in_turn(answers, DEMO, 200, 2, **options)
    _, free = drafted_answers(2)
    assert ids == plain_answers
    assert 0.3 * free["accepted_tokens"] < counted["accepted_tokens"] < free["accepted_tokens"]


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("switch", ["plain", "tied", "norm_head"])
def test_a_draft_vocabulary_keeps_the_logits_of_its_tokens(switch, tp_size, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1, **SWITCHES[switch])
    chosen = list(range(3, 256, 5))
    env = TWO_RANKS if tp_size == 2 else None
    wanted = run_in_turn(draft_logits, model, PROMPT, env=env, tensor_parallel_size=tp_size)
    logits = run_in_turn(
        draft_logits,
        model,
        PROMPT,
        env=env,
        tensor_parallel_size=tp_size,
        additional_config={"bailing_draft_vocab": chosen},
    )
    assert (logits[:, chosen] - wanted[:, chosen]).abs().max() <= TOLERANCE
    others = [token for token in range(256) if token not in chosen]
    assert torch.isneginf(logits[:, others]).all()


@pytest.mark.parametrize(
    ("given", "speculative_config", "fragment"),
    [
        ("missing.json", mtp(1), "missing.json cannot be read"),
        ([], mtp(1), "must hold a list of token ids from 0 to 255, not []"),
        ([1, 256], mtp(1), "must hold a list of token ids from 0 to 255, not [1, 256]"),
        ({"ids": [1]}, mtp(1), "must hold a list of token ids"),
        ([1, 2], None, "is for MTP drafts; add --speculative-config"),
    ],
)
def test_a_wrong_draft_vocabulary_is_refused(given, speculative_config, fragment, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1)
    options = {"additional_config": {"bailing_draft_vocab": given}, "speculative_config": speculative_config}
    with pytest.raises(EngineError) as refusal:
        run(make_llm, model, **options)
    assert refusal.value.message.startswith("SettingsError: ")
    assert fragment in refusal.value.message


@pytest.mark.parametrize(
    ("additional", "quantization", "fragment"),
    [
        ({"bailing_draft_vocab": [1, 2]}, None, "bailing_draft_vocab in --additional-config takes rows of the head"),
        ({}, "fp8", "draft_lm_head_quantization='fp8' in --speculative-config makes a copy of the head"),
        ({}, None, None),
    ],
)
def test_what_needs_a_plain_head_is_refused_with_a_quantized_one(additional, quantization, fragment, tmp_path):
    from vllm_bailing.plugin.checks import _check_draft_head
    from vllm_bailing.plugin.speculation import MTP_ARCHITECTURE

    model = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1)
    quantize_by_command(model, tmp_path / "out", "w8a8", "--head", "w8a8")
    for folder in (tmp_path / "out", model):
        draft = SimpleNamespace(architectures=[MTP_ARCHITECTURE])
        speculation = SimpleNamespace(draft_lm_head_quantization=quantization, draft_model_config=draft)
        model_config = SimpleNamespace(model=str(folder), hf_config=read_config(str(folder)), revision=None)
        vllm_config = SimpleNamespace(
            additional_config=additional, speculative_config=speculation, model_config=model_config
        )
        if fragment is None or folder == model:
            _check_draft_head(vllm_config)
        else:
            with pytest.raises(SettingsError, match=re.escape(fragment) + ".* is quantized; leave it out"):
                _check_draft_head(vllm_config)
