"""The MTP draft's arithmetic."""

import pytest
import torch

from tests.support.cases import load_case
from tests.support.checkpoints import PROMPT, make_checkpoint
from tests.support.config_switches import switched
from tests.support.engine import TOLERANCE, TWO_RANKS, run_in_turn
from tests.support.speculation import draft_logits
from vllm_bailing.reference import BailingMoeV2ForCausalLM


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("case", ["mtp", "mtp_yarn"])
def test_the_draft_computes_what_the_official_code_computes(case, tp_size):
    model, expected = load_case(case)
    env = TWO_RANKS if tp_size == 2 else None
    logits = run_in_turn(draft_logits, model, expected["input_ids"].tolist(), env=env, tensor_parallel_size=tp_size)
    wanted = expected["mtp_logits"][: len(logits)].log_softmax(-1)
    assert len(logits) == len(expected["input_ids"]) - 1
    assert (logits.log_softmax(-1) - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "switches",
    [
        ("tied",),
        ("norm_head",),
        ("no_dense_layer", "no_shared_expert", "no_qk_norm"),
        ("only_dense_bias", "only_qkv_bias", "no_groups"),
        ("only_dense_layers",),  # only the MTP layer has experts
    ],
    ids=", ".join,
)
def test_the_draft_computes_what_the_plain_reference_computes(switches, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1, **switched(*switches))
    reference = BailingMoeV2ForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True).hidden_states[-1]
        wanted = reference.mtp_logits(hidden[:, :-1], ids[:, 1:])[0].log_softmax(-1)
    logits = run_in_turn(draft_logits, model, PROMPT)
    assert (logits.log_softmax(-1) - wanted).abs().max() <= TOLERANCE
