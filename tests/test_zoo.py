"""The published checkpoints: their configurations, and models of their widths with layers cut off."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from engine import ENGINE_ENV, ask, make_llm, run
from transformers import AutoConfig

from vllm_bailing.cli import DEMO
from vllm_bailing.config import BailingMoeV2Config, adopt, register_with_transformers
from vllm_bailing.weights import main_tensors, mtp_tensors

ZOO = json.loads((Path(__file__).parent / "data" / "zoo.json").read_text(encoding="utf-8"))
CHECKPOINTS, OTHERS = ZOO["checkpoints"], ZOO["others"]
# Cut to what a small machine holds: one dense and one MoE layer; of the bigger ones fewer experts and words.
CUTS = {
    "Ling-mini-base-2.0": {},
    "Ling-flash-base-2.0": {"num_experts": 32, "vocab_size": 32768},
    "Ring-1T": {"num_experts": 16, "vocab_size": 16384},
}


def raw_config(name):
    entry = CHECKPOINTS[name]
    return {**ZOO["common"], **ZOO["sizes"][entry["size"]], **entry["config"]}


def write_config(folder, raw):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_configuration_of(name, tmp_path):
    register_with_transformers()
    raw = raw_config(name)
    config = AutoConfig.from_pretrained(write_config(tmp_path, raw))  # auto_map is not followed: it names no file here
    assert isinstance(config, BailingMoeV2Config)
    assert (config.rotary_dim, config.head_dim) == (64, 128)
    assert config.max_position_embeddings == raw["max_position_embeddings"]
    assert getattr(config, "quantization_config", None) == raw.get("quantization_config")
    count = sum(math.prod(shape) for shape in main_tensors(config).values())
    assert count == pytest.approx(CHECKPOINTS[name]["parameters"], rel=5e-4)
    extra = sum(math.prod(shape) for shape in mtp_tensors(config).values())
    assert bool(extra) == bool(raw["num_nextn_predict_layers"])


@pytest.mark.parametrize("name", OTHERS)
def test_configuration_of_another_architecture_is_left_alone(name):
    assert adopt(OTHERS[name]) is OTHERS[name]


def _resolve(raw):
    import vllm_bailing

    vllm_bailing.register()
    from vllm import ModelRegistry

    return (
        ModelRegistry.models[raw["architectures"][0]].module_name
        if raw["architectures"][0] in ModelRegistry.models
        else None
    )


@pytest.mark.parametrize("name", OTHERS)
def test_classes_of_other_architectures_are_vllms_own(name):
    assert not str(run(_resolve, OTHERS[name])).startswith("vllm_bailing")


def test_class_of_the_family_is_this_packages():
    assert run(_resolve, raw_config("Ling-1T")) == "vllm_bailing.model"


def _one_step(model, **overrides):
    llm = make_llm(model, dtype="bfloat16", load_format="dummy", hf_overrides=overrides, **SPECULATION)
    return ask(llm, [list(range(40))], max_tokens=3, logprobs=False)[0][1]


SPECULATION = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}


@pytest.mark.engine
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
    assert len(run(_one_step, model)) == 3


def _asked_by_name(name):
    from vllm import SamplingParams

    question = [{"role": "user", "content": "What is the capital of France?"}]
    llm = make_llm(name, skip_tokenizer_init=False)
    return llm.chat([question], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)[0].outputs[0].text


@pytest.mark.engine
def test_a_checkpoint_of_modelscope_needs_no_remote_code(tmp_path):
    """With the real package and a cache as it lays one out, which writes dots of a name as ___."""
    folder = tmp_path / "models" / "inclusionAI" / "Ling-flash-2___0"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, {**config, "auto_map": ZOO["common"]["auto_map"]})
    # vLLM decides while it is imported, so in a process of its own.
    env = {**os.environ, **ENGINE_ENV, "MODELSCOPE_CACHE": str(tmp_path), "VLLM_USE_MODELSCOPE": "True"}
    code = "import test_zoo; print(test_zoo._asked_by_name('inclusionAI/Ling-flash-2.0'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "The capital of France is Paris."
