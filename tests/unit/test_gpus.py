"""The table of GPUs, against data sheets, the names that drivers give, and what vLLM takes on each of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from serve_configs import zoo_config

from tests.support.paths import DATA
from tests.support.planning import plan
from tests.support.tuning import MINI
from vllm_bailing.bench.in_tree import known_bandwidth
from vllm_bailing.planning.gpus import GPUS, find_gpu, find_gpus, gpu_called, shared_memory_of
from vllm_bailing.planning.serve import default_batched_tokens
from vllm_bailing.tuning.plan import estimate_seconds
from vllm_bailing.tuning.space import candidates

TABLE = json.loads((DATA / "gpus.json").read_text(encoding="utf-8"))
SHEETS, SHARED_KB = TABLE["sheets"], TABLE["shared_memory"]
DRIVER_NAMES = {sheet["driver"]: name for name, sheet in SHEETS.items()}


def test_every_gpu_has_a_data_sheet_and_names_it():
    assert GPUS.keys() == SHEETS.keys()
    for gpu in GPUS.values():
        title, _, address = gpu.source.partition(": https://")
        assert title and "." in address, gpu.name


@pytest.mark.parametrize("name", SHEETS)
def test_a_gpu_is_as_its_data_sheet_says(name):
    gpu, sheet = GPUS[name], SHEETS[name]
    assert gpu.bandwidth / 1e9 == pytest.approx(sheet["bandwidth"], rel=1e-6)
    assert gpu.flops_16 / 1e12 == pytest.approx(sheet["bf16"], rel=0.002)
    assert (gpu.flops_8 is None) == (sheet["fp8"] is None)
    if gpu.flops_8 is not None:
        assert gpu.flops_8 / 1e12 == pytest.approx(sheet["fp8"], rel=0.002)
    # The driver keeps a part for itself, and error correction a part of GDDR, which nvidia-smi has left out already.
    least, nominal = (0.97, sheet["smi"] / 1024) if "smi" in sheet else (0.92, sheet["memory"])
    assert least < gpu.memory_bytes / 2**30 / nominal < 1
    assert nominal <= sheet["memory"]
    assert gpu.driver_names == (sheet["driver"],)
    assert gpu.compute_capability == (None if sheet["capability"].startswith("gfx") else sheet["capability"])
    assert gpu.shared_memory == SHARED_KB[sheet["capability"]] * 1024


# --- names that the driver gives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("driver_name", DRIVER_NAMES)
def test_a_gpu_is_known_by_the_name_of_the_driver_and_of_vllms_files(driver_name):
    gpu = GPUS[DRIVER_NAMES[driver_name]]
    assert gpu_called(driver_name) is gpu
    assert gpu_called(driver_name.replace(" ", "_")) is gpu
    assert shared_memory_of(driver_name) == gpu.shared_memory
    assert known_bandwidth(driver_name) == gpu.bandwidth / 1e12


# They have less bandwidth or arithmetic than the GPU whose name they begin with.
@pytest.mark.parametrize(
    "driver_name",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H200 NVL",
        "NVIDIA H800 PCIe",
        "NVIDIA A10G",
        "H200",
        "CPU",
        "",
    ],
)
def test_a_gpu_of_another_name_is_not_taken_for_a_known_one(driver_name):
    assert gpu_called(driver_name) is None
    assert known_bandwidth(driver_name) is None


@pytest.mark.parametrize(
    ("driver_name", "kb"),
    [
        ("NVIDIA A100-SXM4-40GB", 163),
        ("NVIDIA_A800-SXM4-80GB", 163),
        ("NVIDIA RTX 6000 Ada Generation", 99),
        ("NVIDIA L40", 99),
        ("NVIDIA L20", 99),
        ("NVIDIA_GB10", 99),
        ("NVIDIA H800 PCIe", 227),
        ("NVIDIA GH200 480GB", 227),
    ],
)
def test_shared_memory_of_a_gpu_without_a_row_follows_from_its_family(driver_name, kb):
    assert shared_memory_of(driver_name) == kb * 1024


def test_tuning_is_estimated_for_the_gpu_at_hand():
    space = {1: candidates(MINI, 1, 99 * 1024), 4096: candidates(MINI, 4096, 99 * 1024)}
    seconds = {name: estimate_seconds(MINI, space, name) for name in (*DRIVER_NAMES, "NVIDIA GH200 480GB")}
    assert seconds["NVIDIA GH200 480GB"] == seconds["NVIDIA H20"]
    assert seconds["NVIDIA B200"] < seconds["NVIDIA A100-SXM4-80GB"] < seconds["NVIDIA GeForce RTX 4090"]


def test_a_gpu_is_found_in_any_case_and_may_be_described():
    assert find_gpu("h20-3E") is GPUS["H20-3e"]
    other = find_gpu("B300", memory_gib=268, bandwidth=8)
    assert (other.name, other.memory_bytes, other.bandwidth) == ("B300", 268 * 2**30, 8e12)
    assert (other.flops_16, other.flops_8, other.shared_memory, other.source) == (None, None, None, "")
    wider = find_gpu("H100", memory_gib=93, bandwidth=3.9)
    assert (wider.memory_bytes, wider.bandwidth, wider.flops_8) == (93 * 2**30, 3.9e12, GPUS["H100"].flops_8)
    assert find_gpu("H100", memory_gib=93).bandwidth == GPUS["H100"].bandwidth


@pytest.mark.parametrize("options", [{}, {"memory_gib": 268.0}, {"bandwidth": 8.0}])
def test_a_gpu_that_is_not_known_has_to_be_described_by_both_numbers(options):
    with pytest.raises(
        ValueError, match=r"'B300' is not known \(is GB300 meant\?\); (give|add) .*, or name one of --list-gpus$"
    ) as refusal:
        find_gpu("B300", **options)
    way = str(refusal.value).partition(" or name one")[0]
    for flag in ("memory_gib", "bandwidth"):
        assert (f"--{flag.replace('_', '-')}" in way) == (flag not in options)


@pytest.mark.parametrize("row", GPUS)
def test_a_gpu_may_be_named_as_nvidia_smi_does(row):
    for name in (row, row.lower(), *GPUS[row].driver_names, *(name.upper() for name in GPUS[row].driver_names)):
        assert find_gpu(name) is GPUS[row]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("A100", "is A100-80G meant?"), ("4090", "is RTX4090 meant?"), ("A10G", ""), ("", "")],
)
def test_a_name_that_is_like_a_row_is_not_taken_for_it(name, hint):
    """An A10G is no A10."""
    with pytest.raises(ValueError, match="is not known") as refusal:
        find_gpu(name)
    assert hint in str(refusal.value) and ("meant" in str(refusal.value)) == bool(hint)
    assert find_gpu(name, 24, 0.6).memory_bytes == 24 * 2**30


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize(("option", "flag"), [("memory_gib", "--memory-gib"), ("bandwidth", "--bandwidth")])
def test_a_number_that_describes_a_gpu_is_positive(option, flag, value):
    with pytest.raises(ValueError, match=f"^{flag} .* must be a number above 0$"):
        find_gpu("H100", **{option: value})


# --- GPUs of this machine -------------------------------------------------------------------------------------------


class Nvml:
    """Stands in for NVML's package on a machine with GPUs of these names, each of 22 GiB."""

    class NVMLError(Exception):
        pass

    def __init__(self, *names, as_bytes=False):
        self.names, self.as_bytes, self.is_open = names, as_bytes, False

    def nvmlInit(self):
        self.is_open = True

    def nvmlShutdown(self):
        self.is_open = False

    def nvmlDeviceGetCount(self):
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return self.names[handle].encode() if self.as_bytes else self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle):
        assert self.is_open
        return SimpleNamespace(total=22 * 2**30)


@pytest.fixture
def nvml(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda found: monkeypatch.setitem(sys.modules, "pynvml", found)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_auto_is_what_this_machine_has(as_bytes, nvml, monkeypatch):
    found = Nvml(*4 * ["NVIDIA H100 80GB HBM3"], as_bytes=as_bytes)
    nvml(found)
    assert find_gpus("auto") == find_gpus("AUTO") == (GPUS["H100"], 4)
    assert not found.is_open
    assert find_gpus("auto", 2) == (GPUS["H100"], 2)
    assert find_gpus("auto", memory_gib=94)[0].memory_bytes == 94 * 2**30
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert find_gpus("auto") == (GPUS["H100"], 2)
    assert find_gpus("H200") == (GPUS["H200"], 1) and find_gpus("H200", 3) == (GPUS["H200"], 3)


def test_auto_knows_the_memory_of_a_gpu_without_a_row(nvml):
    nvml(Nvml("NVIDIA A10G"))
    gpu, count = find_gpus("auto", bandwidth=0.6)
    assert (gpu.name, gpu.memory_bytes, gpu.bandwidth, count) == ("NVIDIA A10G", 22 * 2**30, 0.6e12, 1)
    with pytest.raises(ValueError, match="'NVIDIA A10G' is not known; add --bandwidth"):
        find_gpus("auto")


@pytest.mark.parametrize(
    ("names", "said"), [((), "finds no GPU here"), (("NVIDIA H100", "NVIDIA L4"), "finds NVIDIA H100, NVIDIA L4 here")]
)
def test_auto_wants_gpus_of_one_kind(names, said, nvml):
    nvml(Nvml(*names))
    with pytest.raises(ValueError, match=f"^--gpu auto: NVML {said}, not one kind; name the GPU instead"):
        find_gpus("auto")


def test_auto_says_what_to_do_without_nvml(nvml):
    nvml(None)  # as if it were not installed
    with pytest.raises(
        ValueError, match=r"^--gpu auto asks NVML, .* missing; pip install nvidia-ml-py, or name the GPU"
    ):
        find_gpus("auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_auto_says_what_to_do_without_a_driver(nvml):
    """With the package as NVIDIA publishes it, which vLLM has a copy of."""
    (vllm,) = importlib.util.find_spec("vllm").submodule_search_locations
    spec = importlib.util.spec_from_file_location("pynvml", Path(vllm, "third_party", "pynvml.py"))
    module = importlib.util.module_from_spec(spec)
    nvml(module)
    spec.loader.exec_module(module)
    with pytest.raises(ValueError, match=r"^--gpu auto: NVML finds no driver of NVIDIA's here \(.+\); name the GPU"):
        find_gpus("auto")


@pytest.mark.parametrize("name", GPUS)
def test_a_plan_gives_the_tokens_of_a_step_where_vllm_would_take_others(name):
    default = default_batched_tokens(GPUS[name])
    for tokens in (2048, 8192, 16384):
        flags = plan(zoo_config("Ling-mini-2.0"), name, 1, 4096, 1, max_num_batched_tokens=tokens).flags
        assert flags.get("max-num-batched-tokens", default) == tokens
        assert ("max-num-batched-tokens" in flags) == (tokens != default)
