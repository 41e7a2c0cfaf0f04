"""Models of the published checkpoints' widths, with layers cut off."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest

from tests.support.configs import write_config
from tests.support.engine import ENGINE_ENV, ask, make_llm, run_in_turn
from tests.support.paths import ROOT
from tests.support.zoo import ZOO, raw_config
from vllm_bailing import DEMO

# Cut to what a small machine holds: one dense and one MoE layer; of the bigger ones fewer experts and words.
CUTS = {
    "Ling-mini-base-2.0": {},
    "Ling-flash-base-2.0": {"num_experts": 32, "vocab_size": 32768},
    "Ring-1T": {"num_experts": 16, "vocab_size": 16384},
}


def _one_step(model, **overrides):
    from vllm.model_executor.model_loader import dummy_loader

    # The dummy weights' values are not the point, and drawing gigabytes of them takes longer than all else.
    with mock.patch.object(dummy_loader, "initialize_single_dummy_weight", _filled):
        llm = make_llm(model, dtype="bfloat16", load_format="dummy", hf_overrides=overrides, **SPECULATION)
    return ask(llm, [list(range(40))], max_tokens=3, logprobs=False)[0][1]


def _filled(weight):
    if weight.is_floating_point():
        weight.data.fill_(1e-3)


SPECULATION = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}


@pytest.mark.parametrize("name", CUTS)
def test_model_of_the_width_of(name, tmp_path):
    cut = {
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **CUTS[name],
    }
    model = write_config(tmp_path, {**raw_config(name), **cut})
    assert len(run_in_turn(_one_step, model)) == 3


def _asked_by_name(name):
    from vllm import SamplingParams

    question = [{"role": "user", "content": "What is the capital of France?"}]
    llm = make_llm(name, skip_tokenizer_init=False)
    return llm.chat([question], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)[0].outputs[0].text


def test_a_checkpoint_of_modelscope_needs_no_remote_code(tmp_path):
    """With the real package and a cache as it lays one out, which writes dots of a name as ___."""
    folder = tmp_path / "models" / "inclusionAI" / "Ling-flash-2___0"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, {**config, "auto_map": ZOO["common"]["auto_map"]})
    # vLLM decides while it is imported, so in a process of its own.
    env = {**os.environ, **ENGINE_ENV, "MODELSCOPE_CACHE": str(tmp_path), "VLLM_USE_MODELSCOPE": "True"}
    code = "from tests.engine.test_zoo import _asked_by_name; print(_asked_by_name('inclusionAI/Ling-flash-2.0'))"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "The capital of France is Paris."
