"""The engine on an NVIDIA GPU: fidelity in fp32 and bf16, drafts, YaRN, quantized experts, adapters, ranks and runners.

scripts/gpu/smoke.sh runs this file in steps.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.adapters import ATTENTION, MLP, adapted, make_adapter, merged
from tests.support.cases import CASES, load_case
from tests.support.checkpoints import PROMPT, make_checkpoint
from tests.support.engine import EngineError, generate, run
from tests.support.quantized import quantized_demo
from tests.support.speculation import answers
from vllm_bailing import DEMO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]
SHARE = {"gpu_memory_utilization": 0.5}


# Largest mean difference of log-probabilities; a single one can be 6 in bf16, where a token changes its experts.
# Measured on a CPU: 0.04 to 0.06 in bf16, 1.4 if an adapter is left out. Not measured on a GPU yet, where fp32 products
# may pass through TF32, which has three bits more than bf16.
LIMITS = {"float32": 0.02, "bfloat16": 0.15}


def check_case(case: str, dtype: str, env: dict[str, str] | None = None, **options) -> None:
    model, expected = load_case(case)
    prompt = expected["input_ids"].tolist()
    ((logprobs, token_ids),) = run(generate, model, [prompt], env=env, dtype=dtype, **SHARE, **options)
    assert (logprobs - expected["logits"].log_softmax(-1)[:-1]).abs().mean() <= LIMITS[dtype]
    if dtype == "float32":
        assert token_ids == expected["greedy_ids"].tolist()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_reference(case, mode, dtype):
    check_case(case, dtype, enforce_eager=mode == "eager")


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("case", ["plain", "mtp_yarn"])
def test_runner(case, runner):
    check_case(case, "bfloat16", {"VLLM_USE_V2_MODEL_RUNNER": runner}, enforce_eager=False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("case", ["plain", "biases", "two_shared"])
def test_tp2(case):
    check_case(case, "bfloat16", enforce_eager=False, tensor_parallel_size=2)


@pytest.mark.parametrize("runner", ["0", "1"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_mtp_leaves_answers_as_they_are(tokens, runner):
    # fp32, in which two tokens are hardly ever so close that the number of tokens in a step decides.
    env = {"VLLM_USE_V2_MODEL_RUNNER": runner}
    options = {"dtype": "float32", "enforce_eager": False, **SHARE}
    wanted, _ = run(answers, DEMO, 50, 0, env=env, **options)
    found, counted = run(answers, DEMO, 50, tokens, env=env, **options)
    assert found == wanted
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]


@pytest.fixture(scope="module")
def demo_answers():
    return run(answers, DEMO, 200, 0, dtype="bfloat16", **SHARE)[0]


@pytest.mark.parametrize("scheme", ["fp8", "w8a8", "w4a16"])
def test_quantized_experts_answer_like_plain_ones(scheme, tmp_path, demo_answers):
    model = quantized_demo(f"script-{scheme}", tmp_path / "demo")
    try:
        found, _ = run(answers, model, 200, 1, dtype="bfloat16", **SHARE)
    except EngineError as error:
        if '"dequantize": true' in error.message:  # the refusal that names the way out
            pytest.skip(f"no kernel for {scheme} here")
        raise
    same = sum(one == other for one, other in zip(found, demo_answers, strict=True))
    assert same >= 0.95 * len(found), f"{same} of {len(found)}"


def test_adapter_of_the_experts_acts_as_if_it_were_merged(tmp_path):
    model = make_checkpoint(tmp_path / "model")
    adapter = make_adapter(tmp_path / "adapter", model, (*ATTENTION, *MLP), keep=lambda module: True)
    options = {"dtype": "bfloat16", **SHARE}
    ((wanted, _),) = run(generate, merged(model, adapter, tmp_path / "merged"), [PROMPT], **options)
    ((found, _), (base, _)), _ = run(adapted, model, [(PROMPT, adapter), (PROMPT, None)], **options)
    assert (found - wanted).abs().mean() <= LIMITS["bfloat16"]
    assert (base - wanted).abs().mean() > 3 * LIMITS["bfloat16"]  # the adapter does something
