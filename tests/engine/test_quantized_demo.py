"""The demo checkpoint, quantized."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.conversations import evenly
from tests.support.cpu_kernels import AVX2, AVX512, NEEDS_AVX2, NEEDS_VLLMS, NEEDS_VNNI, VNNI, use
from tests.support.engine import EngineError, run, run_in_turn
from tests.support.quantized import DEQUANTIZE, SCHEMES, quantized_demo
from tests.support.speculation import answers, mtp
from tests.support.versions import since
from vllm_bailing import DEMO


@pytest.fixture(scope="module")
def demo_answers():
    return run_in_turn(answers, DEMO, 200, 0, dtype="bfloat16")[0]


@pytest.mark.parametrize("scheme", [*(f"script-{one}" for one in ("fp8", "fp8-block+w8a8", "w8a8", "w4a16")), *SCHEMES])
def test_the_quantized_demo_answers_like_the_plain_one(scheme, tmp_path, demo_answers):
    """Experts, MTP layer and all; what the plain checkpoint answers in bf16 is right in 97 of 100 cases."""
    model = quantized_demo(scheme, tmp_path / "demo")
    ids, counted = run_in_turn(answers, model, 200, 1, dtype="bfloat16", **DEQUANTIZE)
    same = sum(one == other for one, other in zip(ids, demo_answers, strict=True))
    assert same >= 0.95 * len(ids), f"{same} of {len(ids)}"
    assert counted["accepted_tokens"] >= 0.9 * counted["drafts"]


@since("0.32", "quantized experts for CPUs to which a kernel can be given")
@pytest.mark.parametrize(
    "whose",
    [
        pytest.param(AVX512, marks=NEEDS_VLLMS),
        pytest.param(AVX2, marks=NEEDS_AVX2),
        pytest.param(VNNI, marks=NEEDS_VNNI),
    ],
)
@pytest.mark.parametrize(
    "scheme",
    [
        "script-w4a16+w8a8",
        *(
            pytest.param(one, marks=pytest.mark.thorough)
            for one in ("script-w8a8+w8a8", "script-w4a16+w4a16", "gptq", "awq")
        ),
    ],
)
def test_the_quantized_demo_answers_like_the_plain_one_in_kernels(scheme, whose, tmp_path, demo_answers):
    model = quantized_demo(scheme, tmp_path / "demo")
    ids, counted = run(_answers_in_kernels, model, whose)
    same = sum(one == other for one, other in zip(ids, demo_answers, strict=True))
    assert same >= 0.95 * len(ids), f"{same} of {len(ids)}"
    assert counted["accepted_tokens"] >= 0.9 * counted["drafts"]


def _answers_in_kernels(model, whose):
    use(whose)
    return answers(model, 200, 1, dtype="bfloat16")


def test_a_quantized_draft_of_a_plain_target_is_dequantized_too(tmp_path, plain_answers):
    draft = quantized_demo("fp8", tmp_path / "draft")
    target = Path(shutil.copytree(DEMO, tmp_path / "target"))
    speculation = mtp(2, model=str(draft))
    with pytest.raises(EngineError) as refusal:
        run(answers, target, 25, speculation, dtype="bfloat16")
    assert '"dequantize": true' in refusal.value.message
    ids, counted = run_in_turn(answers, target, 25, speculation, **DEQUANTIZE)
    assert ids == evenly(plain_answers, 25)
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]
