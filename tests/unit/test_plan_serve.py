"""Commands and files of a plan."""

from __future__ import annotations

import json

import pytest
import serve_configs
from serve_configs import zoo_config

from tests.support.planning import COMMANDS, LAYOUTS, plan
from vllm_bailing.planning.serve import config_file, serve_line

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def test_a_file_says_what_each_node_is_given_besides():
    options = dict(LAYOUTS["data-parallel ranks on two nodes"][0])
    text = plan(zoo_config(options.pop("name")), **options).yaml()
    assert "# On node 0: --data-parallel-size-local 2 --data-parallel-address HOST0\n" in text
    assert "--data-parallel-start-rank 2 --headless\n" in text
    options = dict(LAYOUTS["replicas on one node"][0])
    text = plan(zoo_config(options.pop("name")), **options).yaml()
    assert "# On node 0, replica 1: CUDA_VISIBLE_DEVICES=2,3 --port 8001\n" in text


# What they are by vLLM's own parser is tested in engine/test_plan_serve.py, that nothing else is given here.
FLAGS = {
    "plain": {
        "model": "a model",
        "tensor-parallel-size": 4,
        "max-model-len": 32768,
        "max-num-seqs": 32,
    },
    "everything": {
        "model": "a model",
        "tensor-parallel-size": 4,
        "pipeline-parallel-size": 2,
        "max-model-len": 131072,
        "max-num-seqs": 4,
        "max-num-batched-tokens": 8192,
        "gpu-memory-utilization": 0.9,
        "quantization": "fp8",
        "kv-cache-dtype": "fp8",
        "hf-overrides": '{"rope_scaling":{"type":"yarn","factor":4.0,"original_max_position_embeddings":32768}}',
        "speculative-config": '{"method":"mtp","num_speculative_tokens":2}',
        "enable-lora": True,
        "max-loras": 2,
        "max-lora-rank": 8,
        "lora-target-modules": ["query_key_value", "dense"],
    },
    "dequantized, draft of another": {
        "model": "a model",
        "tensor-parallel-size": 8,
        "pipeline-parallel-size": 4,
        "max-model-len": 65536,
        "max-num-seqs": 4,
        "max-num-batched-tokens": 8192,
        "dtype": "float16",
        "hf-overrides": '{"dequantize":true,"rope_scaling":{"type":"yarn","factor":4.0,'
        '"original_max_position_embeddings":32768}}',
        "speculative-config": '{"method":"mtp","model":"a model\'s folder","num_speculative_tokens":1}',
    },
}
PARSER_FLAGS = {"enable-auto-tool-choice": True, "tool-call-parser": "bailing", "reasoning-parser": "bailing"}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_plan_gives_only_the_flags_that_it_needs(case):
    options = dict(COMMANDS[case])
    found = plan(zoo_config(options.pop("name")), model="a model", **options)
    assert list(found.flags.items()) == list({**FLAGS[case], **PARSER_FLAGS}.items())


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        ({}, "bf16", {}),
        ({}, "fp32", {"dtype": "float32"}),
        ({"torch_dtype": "float16"}, None, {}),
        ({"torch_dtype": "float16"}, "bfloat16", {"dtype": "bfloat16"}),
        ({"quantization_config": FP8}, None, {}),
        ({"quantization_config": FP8}, "fp8", {}),
        ({"quantization_config": FP8}, "bf16", {"hf-overrides": '{"dequantize":true}'}),
        # As config.json says already.
        ({"quantization_config": FP8, "dequantize": True}, "bf16", {"hf-overrides": '{"dequantize":true}'}),
        ({"quantization_config": FP8, "dequantize": True}, "fp8", {"quantization": "fp8"}),
        ({}, "int8", {}),
    ],
)
def test_flags_that_a_dtype_needs(stored, dtype, expected):
    flags = plan(zoo_config("Ling-mini-2.0", **stored), "H200", 1, 4096, 1, dtype=dtype).flags
    assert {name: flags[name] for name in ("dtype", "quantization", "hf-overrides") if name in flags} == expected


def test_a_plan_names_where_the_configuration_came_from_unless_told_otherwise():
    config = zoo_config("Ling-mini-2.0")
    assert plan(config, "H200", 1, 4096, 1).model == "MODEL"
    config.name_or_path = "a folder"
    assert plan(config, "H200", 1, 4096, 1).flags["model"] == "a folder"
    assert plan(config, "H200", 1, 4096, 1, model="another").flags["model"] == "another"


def test_a_command_is_broken_only_where_a_line_would_be_too_long():
    """Lines and the backslashes after them take 100 columns at most; a value is never broken."""
    flags = {"model": "m", "a": "x" * 78, "b": 1, "c": True, "d": "y" * 120, "e": "z z"}
    assert serve_line("m", flags, {}) == (
        f"vllm serve m --a {'x' * 78} \\\n  --b 1 --c --d \\\n  {'y' * 120} \\\n  --e 'z z'"
    )
    assert serve_line("m", {"a": "x" * 79}, {}) == f"vllm serve m --a {'x' * 79}"
    assert serve_line("m", {"a": "x" * 80}, {}) == f"vllm serve m \\\n  --a {'x' * 80}"
    assert serve_line("a m", {"model": "a m"}, {"A": "1", "B": "2"}) == "A=1 B=2 vllm serve 'a m'"


def test_a_file_begins_with_its_comments():
    text = config_file({"model": "m", "z": 1, "a": True}, {"A": "1", "B": "2"}, ["one", "two"])
    assert text == "# one\n# two\n# Set A=1 and B=2.\nmodel: m\nz: 1\na: true\nshutdown-timeout: 60\n"
    assert config_file({"model": "m"}, {}, []) == "model: m\nshutdown-timeout: 60\n"


@pytest.mark.parametrize("case", list(COMMANDS)[:2])
def test_command_is_at_most_100_columns_wide(case):
    options = dict(COMMANDS[case])
    found = plan(zoo_config(options.pop("name")), model="inclusionAI/Ling-flash-base-2.0", **options)
    assert max(map(len, found.serve_line().splitlines())) <= 100


def test_the_window_of_ring_1t_is_stretched_to_what_its_card_promises():
    found = plan(zoo_config("Ring-1T"), "B200", 16, 131072, 1)
    scaling = json.loads(found.flags["hf-overrides"])["rope_scaling"]
    assert scaling == {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536}


def test_files_of_deploy_are_what_the_script_writes():
    plans = serve_configs.plans()
    files = {file.stem: file.read_text(encoding="utf-8") for file in serve_configs.FOLDER.glob("*.yaml")}
    assert files == {name: found.yaml() for name, found in plans.items()}, "run scripts/dev/serve_configs.py"
    assert all(found.fits for found in plans.values())
