"""The MTP draft's arithmetic."""

import pytest
import torch

from tests.support.cases import load_case
from tests.support.checkpoints import PROMPT, make_checkpoint
from tests.support.engine import TOLERANCE, TWO_RANKS, run
from tests.support.speculation import RPC, draft_logits
from vllm_bailing.reference import BailingMoeV2ForCausalLM


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("case", ["mtp", "mtp_yarn"])
def test_the_draft_computes_what_the_official_code_computes(case, tp_size):
    model, expected = load_case(case)
    env = {**RPC, **(TWO_RANKS if tp_size == 2 else {})}
    logits = run(draft_logits, model, expected["input_ids"].tolist(), env=env, tensor_parallel_size=tp_size)
    wanted = expected["mtp_logits"][: len(logits)].log_softmax(-1)
    assert len(logits) == len(expected["input_ids"]) - 1
    assert (logits.log_softmax(-1) - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"norm_head": True},
        {"first_k_dense_replace": 0, "num_shared_experts": 0, "use_qk_norm": False},
        {"use_bias": True, "use_qkv_bias": True, "n_group": None, "topk_group": None},
        {"first_k_dense_replace": 3},  # only the MTP layer has experts
    ],
    ids=["tied", "norm_head", "no_shared_expert", "biases", "dense_target"],
)
def test_the_draft_computes_what_the_plain_reference_computes(overrides, tmp_path):
    model = make_checkpoint(tmp_path, num_nextn_predict_layers=1, **overrides)
    reference = BailingMoeV2ForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        hidden = reference(ids, output_hidden_states=True).hidden_states[-1]
        wanted = reference.mtp_logits(hidden[:, :-1], ids[:, 1:])[0].log_softmax(-1)
    logits = run(draft_logits, model, PROMPT, env=RPC)
    assert (logits.log_softmax(-1) - wanted).abs().max() <= TOLERANCE
