"""Instructions of processors, the kernels that follow, and plans for machines without a GPU."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from tests.support.checkpoints import make_checkpoint, read_tensors
from tests.support.commands import invoke
from tests.support.paths import DATA
from tests.support.quantized import is_linear, quantize_by_command
from vllm_bailing import DEMO, processor
from vllm_bailing.config import read_config
from vllm_bailing.planning.cpu import CpuMachine, cpu_plans
from vllm_bailing.tensor_names import main_tensors
from vllm_bailing.tools import doctor_processor
from vllm_bailing.units import GIB

MINI = DATA / "configs" / "Ling-mini-2.0.json"
ZEN_3 = {"avx2": True}
ZEN_4 = {**ZEN_3, "avx512_f": True, "avx512_bf16": True, "avx512_vnni": True}
SAPPHIRE_RAPIDS = {**ZEN_4, "amx_tile": True}
ICE_LAKE = {**ZEN_3, "avx512_f": True, "avx512_vnni": True}


@pytest.fixture(params=[False, True], ids=["record", "questions"])
def pretend(request, monkeypatch):
    """Let torch report these capabilities, by its record of the processor or by the questions of older releases."""

    def become(capabilities):
        if not request.param:
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
            return
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
        questions = {"avx2": "avx2", "avx512_f": "avx512", "avx512_bf16": "avx512_bf16", "avx512_vnni": "vnni"}
        for key, name in {**questions, "amx_tile": "amx_tile"}.items():
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda key=key: capabilities.get(key, False))

    return become


ALL = ("bf16", "fp8", "int8", "int4")


@pytest.mark.parametrize(
    ("capabilities", "words", "whose", "dtypes"),
    [
        ({}, "none of x86's wide ones", "none (it has none", ("bf16",)),
        (ZEN_3, "AVX2", "of this package", ALL),
        (ICE_LAKE, "AVX2, AVX-512, AVX-512 VNNI", "of this package", ALL),
        (ZEN_4, "AVX2, AVX-512, AVX-512 bf16, AVX-512 VNNI", "AMX (fp8, int8) and kernels of this package (int4)", ALL),
        (SAPPHIRE_RAPIDS, "AVX2, AVX-512, AVX-512 bf16, AVX-512 VNNI, AMX", "vLLM's", ALL),
    ],
    ids=["Arm", "Zen 3", "Ice Lake", "Zen 4", "Sapphire Rapids"],
)
def test_instructions_and_the_kernels_that_follow(pretend, capabilities, words, whose, dtypes, monkeypatch):
    monkeypatch.setattr(processor, "compiler", lambda: "/usr/bin/c++")
    pretend(capabilities)
    assert processor.found().startswith(words)
    assert processor.dtypes_with_kernels() == dtypes
    kernels = processor.kernels()
    assert whose in kernels["experts in int8, int4 or fp8 blocks"]
    linear = "oneDNN" if capabilities == ICE_LAKE else whose
    assert linear in kernels["linear layers in int8 or int4"]


class Stored:
    has_quantized_experts, has_integers = True, True


@pytest.mark.parametrize(
    ("capabilities", "compiler", "reason"),
    [
        ({}, "c++", "they need AVX2"),
        (ZEN_3, "c++", ""),
        (ZEN_3, "nowhere", "there is no C++ compiler here; install one (g++), or name it by CXX"),
        (ZEN_4, "nowhere", ""),
        (SAPPHIRE_RAPIDS, "nowhere", ""),
    ],
)
def test_doctor_names_what_a_quantized_checkpoint_lacks(pretend, capabilities, compiler, reason, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable if compiler == "c++" else compiler)
    pretend(capabilities)
    found, detail, fix = doctor_processor.kernels_for(Stored, "fp8")
    assert found is not bool(reason)
    assert reason in detail and ('"dequantize": true' in fix) == bool(reason)
    assert processor.found() in doctor_processor.processor()


def test_memory_bandwidth_is_one_that_a_machine_can_have():
    assert 1e8 < processor.memory_bandwidth(0.01) < 1e13


def machine(gib, kernels=("bf16", "fp8", "int8", "int4")):
    return CpuMachine(int(gib * GIB), 40e9, kernels)


def test_sizes_are_those_of_the_tensors():
    config = read_config(MINI)
    shapes = main_tensors(config)
    plans = {plan.dtype: plan for plan in cpu_plans(config, machine(64), 4096)}
    elements = sum(math.prod(shape) for shape in shapes.values())
    assert plans["bf16"].weights_bytes == pytest.approx(2 * elements, rel=1e-3)
    # Linear layers in four bits, a scale in two bytes for each group of 128; the head in eight.
    head = math.prod(shapes["lm_head.weight"])
    linear = sum(math.prod(shape) for name, shape in shapes.items() if is_linear(name))
    wanted = 2 * (elements - linear - head) + linear * (0.5 + 2 / 128) + head
    assert plans["int4"].weights_bytes == pytest.approx(wanted, rel=1e-3)
    layers, heads = config.num_hidden_layers, 2 * config.num_key_value_heads * config.head_dim
    assert plans["int8"].kv_bytes_per_token == 2 * layers * heads
    for plan in plans.values():
        assert plan.tokens_per_s == pytest.approx(40e9 / plan.step_bytes)
    assert plans["bf16"].tokens_per_s < plans["int8"].tokens_per_s


@pytest.mark.parametrize(
    ("flags", "dtype", "head"),
    [
        (("w4a16", "--head", "w8a8"), "int4", "int8"),
        (("w4a16",), "int4", None),
        (("w8a8", "--head", "w4a16"), "int8", "int4"),
        (("fp8-block", "--head", "w8a8"), "fp8", "int8"),
    ],
)
def test_a_quantized_checkpoint_is_as_large_as_its_files(flags, dtype, head, tmp_path):
    """And is served as it is or dequantized, in nothing else."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "moe_shared_expert_intermediate_size": 128}
    model = make_checkpoint(tmp_path / "model", vocab_size=256, intermediate_size=256, **sizes)
    quantize_by_command(model, tmp_path / "out", *flags)
    as_it_is, plain = cpu_plans(read_config(str(tmp_path / "out")), machine(8), 512)
    assert (as_it_is.dtype, as_it_is.head_dtype, plain.dtype, plain.head_dtype) == (dtype, head, "bf16", None)
    stored = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "out").values())
    assert as_it_is.weights_bytes == pytest.approx(stored, rel=0.02)
    assert plain.weights_bytes == pytest.approx(sum(one.nbytes for one in read_tensors(model).values()), rel=0.01)
    done = invoke("plan", str(tmp_path / "out"), "--gpu", "cpu", "--memory-gib", "8", "--bandwidth", "0.04")
    assert (
        f"vllm serve {tmp_path / 'out'} --max-model-len" in done.output and "vllm-bailing quantize" not in done.output
    )


@pytest.mark.parametrize(
    ("gib", "kernels", "wanted"),
    [
        (64, ("bf16", "fp8", "int8", "int4"), {"bf16": "fits", "fp8": "fits", "int8": "fits", "int4": "fits"}),
        (24, ("bf16", "fp8", "int8", "int4"), {"bf16": "no", "fp8": "fits", "int8": "fits", "int4": "fits"}),
        (12, ("bf16", "fp8", "int8", "int4"), {"bf16": "no", "fp8": "no", "int8": "no", "int4": "fits"}),
        (24, ("bf16",), {"bf16": "no", "fp8": "no kernel", "int8": "no kernel", "int4": "no kernel"}),
    ],
)
def test_ling_mini_on_machines_of_several_sizes(gib, kernels, wanted):
    plans = cpu_plans(read_config(MINI), machine(gib, kernels), 4096)
    assert {plan.dtype: plan.verdict(4096) for plan in plans} == wanted


def test_the_command_says_what_fits_and_how_to_serve_it():
    asked = ("plan", str(MINI), "--gpu", "cpu", "--memory-gib", "64", "--bandwidth", "0.04")
    done = invoke(*asked)
    assert done.exit_code == 0 and "vllm serve" in done.output and "--max-model-len 4096" in done.output
    report = json.loads(invoke(*asked, "--json").output)
    assert f" {report['plans'][0]['kv_tokens']:,} " in done.output
    assert [plan["dtype"] for plan in report["plans"]] == ["bf16", "fp8", "int8", "int4"]
    assert report["machine"]["bandwidth"] == 40e9
    assert invoke(*asked[:-4], "--memory-gib", "4", "--bandwidth", "0.04").exit_code == 1


@pytest.mark.parametrize("wrong", [("--memory-gib", "-1"), ("--bandwidth", "inf"), ("--context", "0")])
def test_impossible_machines_are_refused_in_one_line(wrong):
    done = invoke("plan", str(DEMO), "--gpu", "cpu", "--memory-gib", "8", "--bandwidth", "0.04", *wrong)
    assert done.exit_code == 2 and "must be" in done.output and len(done.output.strip().splitlines()) == 1
