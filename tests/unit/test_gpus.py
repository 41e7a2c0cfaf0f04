"""The planner's table of GPUs, against data sheets and against what vLLM takes on each of them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from serve_configs import zoo_config

from tests.support.engine import run
from tests.support.paths import DATA
from vllm_bailing.planning.gpus import GPUS
from vllm_bailing.planning.plan import make_plan

SHEETS = json.loads((DATA / "gpus.json").read_text(encoding="utf-8"))
SHEETS.pop("comment")
NAMES = {"A100-80G": "NVIDIA A100-SXM4-80GB", "RTX4090": "NVIDIA GeForce RTX 4090", "MI300X": "AMD Instinct MI300X"}


def test_every_gpu_has_a_data_sheet():
    assert GPUS.keys() == SHEETS.keys()


@pytest.mark.parametrize("name", SHEETS)
def test_a_gpu_is_as_its_data_sheet_says(name):
    gpu, sheet = GPUS[name], SHEETS[name]
    assert gpu.bandwidth / 1e9 == pytest.approx(sheet["bandwidth"], rel=0.001)
    assert gpu.flops_16 / 1e12 == pytest.approx(sheet["bf16"], rel=0.002)
    assert (gpu.flops_8 is None) == (sheet["fp8"] is None)
    if gpu.flops_8 is not None:
        assert gpu.flops_8 / 1e12 == pytest.approx(sheet["fp8"], rel=0.002)
    # The driver keeps a part for itself, and error correction a part of GDDR.
    assert 0.92 < gpu.memory_bytes / 2**30 / sheet["memory"] < 1


def _vllms_defaults(machines):
    """Tokens of a step that `vllm serve` takes on each of `machines`: (memory in bytes, name)."""
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    found = []
    for memory, name in machines:
        arg_utils.current_platform = SimpleNamespace(
            get_device_total_memory=lambda memory=memory: memory,
            get_device_name=lambda name=name: name,
            is_tpu=lambda: False,
            is_cpu=lambda: False,
        )
        tokens, _ = arg_utils.EngineArgs.get_batch_defaults(1)
        found.append(tokens[UsageContext.OPENAI_API_SERVER])
    return found


def test_a_plan_gives_the_tokens_of_a_step_where_vllm_would_take_others():
    machines = [(gpu.memory_bytes, NAMES.get(name, f"NVIDIA {name}")) for name, gpu in GPUS.items()]
    taken = dict(zip(GPUS, run(_vllms_defaults, machines), strict=True))
    assert set(taken.values()) == {2048, 8192, 16384}
    config = zoo_config("Ling-mini-2.0")
    for name, default in taken.items():
        for tokens in (2048, 8192, 16384):
            found = make_plan(config, name, 1, 4096, 1, max_num_batched_tokens=tokens)
            assert found.settings().get("max-num-batched-tokens", default) == tokens, name
