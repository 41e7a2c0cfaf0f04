"""`vllm-bailing verify`: right deployments pass, planted faults are flagged."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from tests.support.checkpoints import changed_demo, with_two_experts_swapped
from tests.support.commands import run_command
from tests.support.engine import run
from vllm_bailing import DEMO
from vllm_bailing.config import read_config
from vllm_bailing.tools import verify, verify_deployment

YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}


@pytest.fixture(scope="module")
def prompts():
    return verify.prompts_of(DEMO, list(verify.DEFAULT_PROMPTS), 32, 256, read_config(DEMO).vocab_size)


def without_bias(tensors):
    for name in tensors:
        if name.endswith("expert_bias"):
            tensors[name] = torch.zeros_like(tensors[name])


def round_router_logits():
    from vllm_bailing.router import BailingMoeV2Gate

    forward = BailingMoeV2Gate.forward

    def rounded(self, hidden_states):
        logits, *rest = forward(self, hidden_states)
        return (logits.bfloat16().float(), *rest)

    BailingMoeV2Gate.forward = rounded


def _ask(folder, options, prompts, patch):
    if patch:
        patch()
    return verify_deployment.ask_offline(
        str(folder), {"enforce_eager": True, "max_model_len": 512, **options}, prompts
    )[0]


def with_a_norm_too_large(tensors):
    tensors["model.norm.weight"] = (1.01 * tensors["model.norm.weight"].float()).bfloat16()


FAULTS = {
    "none": {},
    # vLLM 0.13 to 0.22 lost it (issue 37633).
    "partial rotary lost": {"keys": {"partial_rotary_factor": 1.0, "rotary_dim": 32}},
    "expert bias ignored": {"change": without_bias},
    "two experts swapped": {"change": with_two_experts_swapped},
    "YaRN off": {"overrides": YARN},
    "routing in bf16": {"patch": round_router_logits},
}
SMALL_FAULTS = {
    "routed scaling": ({"keys": {"routed_scaling_factor": 2.4}}, "the routed experts"),
    # On CPUs without AVX-512 the engine rounds toward zero, which hides what the norm makes larger from the words.
    "final norm": ({"change": with_a_norm_too_large}, ""),
}


def judged(planted, dtype, prompts, folder):
    """The report on a deployment with a fault."""
    served_folder = DEMO
    if "change" in planted or "keys" in planted:
        served_folder = changed_demo(folder / "faulty", planted.get("change"), **planted.get("keys", {}))
    served = run(_ask, served_folder, {"dtype": dtype}, prompts, planted.get("patch"))
    config = read_config(DEMO, planted.get("overrides"))
    return verify.judged(DEMO, config, served, dtype, folder / "work", vllm=version("vllm"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_flagged(fault, dtype, prompts, tmp_path):
    report = judged(FAULTS[fault], dtype, prompts, tmp_path)
    # Rounding of the router disappears among that of everything else: only a deployment in fp32 shows it.
    right = fault == "none" or (fault == "routing in bf16" and dtype == "bfloat16")
    assert bool(report["reason"]) != right, report["measures"]


@pytest.mark.parametrize("fault", SMALL_FAULTS)
def test_a_fault_smaller_than_rounding_is_flagged(fault, tmp_path):
    """By as many words as the command asks unless told otherwise: a quarter of them is not always enough."""
    prompts = verify.prompts_of(DEMO, list(verify.DEFAULT_PROMPTS), 32, verify.WORDS, read_config(DEMO).vocab_size)
    planted, part = SMALL_FAULTS[fault]
    report = judged(planted, "bfloat16", prompts, tmp_path)
    assert "significance" in report["reason"] and report["looks_like"].startswith(part), report


def test_without_a_server_only_the_report_is_printed(tmp_path):
    """vLLM logs to standard output, and so does the process that it starts."""
    engine = json.dumps({"enforce_eager": True, "max_model_len": 512, "dtype": "float32"})
    done = run_command(
        *("verify", DEMO, "--engine", engine, "--json", "--max-tokens", 4, "--words", 64),
        cache=tmp_path,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["dtype"] == "float32"


def test_drafts_of_something_else_are_not_judged(tmp_path):
    """A small draft vocabulary makes more drafts, and is no fault."""
    engine = {"enforce_eager": True, "max_model_len": 512, "dtype": "float32"}
    engine |= {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
    engine |= {"additional_config": {"bailing_draft_vocab": [*range(0, 1024, 2)]}}
    options = ("--engine", json.dumps(engine), "--json", "--max-tokens", 16, "--words", 64, "--no-parts")
    done = run_command("verify", DEMO, *options, cache=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = "the MTP layer: what drafts is the MTP layer with a draft vocabulary"
    assert json.loads(done.stdout)["not_checked"] == said
