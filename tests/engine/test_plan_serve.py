"""Commands and files of a plan, as vLLM's own parser reads them."""

from __future__ import annotations

import shlex

import pytest
import yaml
from serve_configs import zoo_config

from tests.support.engine import run_in_turn
from tests.support.planning import COMMANDS, LAYOUTS, YARN, plan


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
