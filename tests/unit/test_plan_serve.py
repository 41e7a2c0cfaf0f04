"""Commands and files of a plan, as vLLM's own parser reads them."""

from __future__ import annotations

import json
import shlex

import pytest
import serve_configs
import yaml
from serve_configs import zoo_config

from tests.support.engine import run_in_turn
from tests.support.planning import YARN, plan
from vllm_bailing.planning.serve import config_file, serve_line


def _parsed(arguments, names=()):
    """What `vllm ARGUMENTS` reads, by the names of its attributes: those of `EXPECTED`, and `names`."""
    import vllm_bailing

    vllm_bailing.register()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command, parser = ServeSubcommand(), FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    parsed = parser.parse_args(arguments)
    command.validate(parsed)
    names = [*(name for flags in EXPECTED.values() for name in flags), "model_tag", "model", *names]
    return {name: getattr(parsed, name) for name in dict.fromkeys(names)}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
COMMANDS = {
    "plain": {"name": "Ling-flash-2.0", "gpu": "H100", "gpus": 4, "context": 32768, "concurrency": 32},
    "everything": {
        "name": "Ling-flash-base-2.0",
        "gpu": "L40S",
        "gpus": 8,
        "context": 131072,
        "concurrency": 4,
        "dtype": "fp8",
        "kv_dtype": "fp8",
        "draft_tokens": 2,
        "memory_utilization": 0.9,
        "tp": 4,
        "pp": 2,
        "max_loras": 2,
        "max_lora_rank": 8,
        "lora_target_modules": ("query_key_value", "dense"),
    },
    "dequantized, draft of another": {
        "name": "Ling-1T-FP8",
        "gpu": "B200",
        "gpus": 32,
        "tp": 8,
        "pp": 4,
        "context": 65536,
        "concurrency": 4,
        "dtype": "fp16",
        "draft_tokens": 1,
        "draft_model": "a model's folder",
    },
}
PARSERS = {"enable_auto_tool_choice": True, "tool_call_parser": "bailing", "reasoning_parser": "bailing"}
EXPECTED = {
    "plain": {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 1,
        "max_model_len": 32768,
        "max_num_seqs": 32,
        "max_num_batched_tokens": None,
        "gpu_memory_utilization": 0.92,
        "kv_cache_dtype": "auto",
        "quantization": None,
        "dtype": "auto",
        "hf_overrides": {},
        "speculative_config": None,
        "enable_lora": None,
        "lora_target_modules": None,
        **PARSERS,
    },
    "everything": {
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
        "max_model_len": 131072,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8192,  # vLLM would take fewer on a small GPU
        "gpu_memory_utilization": 0.9,
        "kv_cache_dtype": "fp8",
        "quantization": "fp8",
        "dtype": "auto",
        "hf_overrides": {"rope_scaling": YARN},
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
        "enable_lora": True,
        "max_loras": 2,
        "max_lora_rank": 8,
        "lora_target_modules": ["query_key_value", "dense"],
        **PARSERS,
    },
    "dequantized, draft of another": {
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 4,
        "max_num_batched_tokens": 8192,  # vLLM would take more on a big GPU
        "dtype": "float16",
        "hf_overrides": {"dequantize": True, "rope_scaling": YARN},
        "speculative_config": {"method": "mtp", "model": "a model's folder", "num_speculative_tokens": 1},
        **PARSERS,
    },
}


@pytest.mark.parametrize("case", COMMANDS)
def test_vllm_reads_command_and_file_as_planned(case, tmp_path):
    options = dict(COMMANDS[case])
    found = plan(zoo_config(options.pop("name")), model="some one's/model", **options)
    file = tmp_path / "serve.yaml"
    file.write_text(found.yaml())
    command = shlex.split(found.serve_line().replace("\\\n", ""))
    command = command[command.index("serve") :]
    by_command, by_file = (run_in_turn(_parsed, arguments) for arguments in (command, ["serve", "--config", str(file)]))
    assert by_command.pop("model_tag") == by_file.pop("model") == "some one's/model"
    by_command.pop("model"), by_file.pop("model_tag")
    assert by_command == by_file
    assert {name: by_command[name] for name in EXPECTED[case]} == EXPECTED[case]
    assert yaml.safe_load(found.yaml()) == {**found.flags, "shutdown-timeout": 60}


# name: (of a plan, flags of all, flags of each command)
LAYOUTS = {
    "replicas on one node": (
        {"name": "Ling-flash-2.0", "gpu": "H200", "gpus": 4, "context": 32768, "concurrency": 5},
        {"tensor_parallel_size": 2, "data_parallel_size": 1, "enable_expert_parallel": False, "max_num_seqs": 3},
        [{"port": 8000, "headless": False}, {"port": 8001, "headless": False}],
    ),
    "a replica on each node": (
        {"name": "Ling-mini-2.0", "gpu": "H200", "gpus": 1, "nodes": 2, "context": 32768, "concurrency": 32},
        {"tensor_parallel_size": 1, "max_num_seqs": 16, "nnodes": 1},
        2 * [{"port": 8000, "headless": False}],
    ),
    "stages on two nodes": (
        {"name": "Ling-1T", "gpu": "H200", "gpus": 8, "nodes": 2, "context": 32768, "concurrency": 7},
        {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "nnodes": 2, "master_addr": "HOST0"},
        [{"node_rank": 0, "headless": False}, {"node_rank": 1, "headless": True}],
    ),
    "two replicas on four nodes": (
        {"name": "Ling-1T", "gpu": "H200", "gpus": 8, "nodes": 4, "context": 32768, "concurrency": 7},
        {"tensor_parallel_size": 8, "pipeline_parallel_size": 2, "nnodes": 2, "max_num_seqs": 4},
        [
            {"node_rank": 0, "master_addr": "HOST0", "headless": False},
            {"node_rank": 1, "master_addr": "HOST0", "headless": True},
            {"node_rank": 0, "master_addr": "HOST2", "headless": False},
            {"node_rank": 1, "master_addr": "HOST2", "headless": True},
        ],
    ),
    "data-parallel ranks on one node, with copies of experts": (
        {
            "name": "Ling-flash-2.0",
            "gpu": "H100",
            "gpus": 8,
            "context": 32768,
            "concurrency": 64,
            "dp": 2,
            "redundant_experts": 16,
        },
        {
            "tensor_parallel_size": 4,
            "data_parallel_size": 2,
            "enable_expert_parallel": True,
            "enable_eplb": True,
            "max_num_seqs": 32,
            "data_parallel_size_local": None,
        },
        [{"headless": False}],
    ),
    "data-parallel ranks on two nodes": (
        {
            "name": "Ling-flash-2.0",
            "gpu": "H100",
            "gpus": 8,
            "nodes": 2,
            "context": 32768,
            "concurrency": 64,
            "dp": 4,
            "tp": 4,
        },
        {
            "tensor_parallel_size": 4,
            "data_parallel_size": 4,
            "data_parallel_size_local": 2,
            "data_parallel_address": "HOST0",
            "max_num_seqs": 16,
            "nnodes": 1,
        },
        [
            {"data_parallel_start_rank": None, "headless": False},
            {"data_parallel_start_rank": 2, "headless": True},
        ],
    ),
}
LAYOUT_NAMES = "port headless nnodes node_rank master_addr enable_expert_parallel enable_eplb max_num_seqs".split()
LAYOUT_NAMES += [f"{way}_parallel_size" for way in ("tensor", "pipeline", "data")]
LAYOUT_NAMES += [f"data_parallel_{name}" for name in ("size_local", "address", "start_rank")]


@pytest.mark.parametrize("case", LAYOUTS)
def test_vllm_reads_every_command_of_a_layout_as_planned(case):
    options, of_all, of_each = LAYOUTS[case]
    options = dict(options)
    found = plan(zoo_config(options.pop("name")), model="a model", **options)
    assert len(found.commands) == len(of_each)
    for number, own in enumerate(of_each):
        words = shlex.split(found.serve_line(number).replace("\\\n", ""))
        parsed = run_in_turn(_parsed, words[words.index("serve") :], LAYOUT_NAMES)
        expected = {**of_all, **own}
        assert {name: parsed[name] for name in expected} == expected
        assert dict(word.split("=", 1) for word in words[: words.index("vllm")]) == {
            **found.commands[number].environment,
            **found.environment,
        }


def test_a_file_says_what_each_node_is_given_besides():
    options = dict(LAYOUTS["data-parallel ranks on two nodes"][0])
    text = plan(zoo_config(options.pop("name")), **options).yaml()
    assert "# On node 0: --data-parallel-size-local 2 --data-parallel-address HOST0\n" in text
    assert "--data-parallel-start-rank 2 --headless\n" in text
    options = dict(LAYOUTS["replicas on one node"][0])
    text = plan(zoo_config(options.pop("name")), **options).yaml()
    assert "# On node 0, replica 1: CUDA_VISIBLE_DEVICES=2,3 --port 8001\n" in text


# What they are by vLLM's own parser is tested above, that nothing else is given here.
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
