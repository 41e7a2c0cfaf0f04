"""`vllm-bailing tune`: the search with made-up times, the files as vLLM reads them, the timing code without its GPU."""

from __future__ import annotations

import contextlib
import inspect
import json
import random
from types import SimpleNamespace

import pytest
import torch
from engine import run
from hypothesis import given
from hypothesis import strategies as st
from serve_configs import zoo_config
from typer.testing import CliRunner

from vllm_bailing import compat, tune
from vllm_bailing import settings as our_settings
from vllm_bailing.cli import DEMO, app
from vllm_bailing.tune import FIELDS, LADDER, CandidateFailed, Experts, Notes, Row, TuneError, candidates, search

MINI = Experts(256, 512, 2048, 8, 8, 4, "bf16")
TINY = Experts(16, 128, 256, 2, 4, 2, "fp8")
H20 = "NVIDIA H20"


def config(*values: int) -> dict[str, int]:
    return dict(zip(FIELDS, values, strict=True))


DEFAULT = config(16, 64, 128, 1, 4, 4)
TEN, ONE, SLOW = config(16, 64, 64, 1, 4, 3), config(16, 32, 64, 1, 4, 3), config(16, 128, 64, 1, 8, 3)

# ---- what is tuned -------------------------------------------------------------------------------------------------


def test_shapes_are_those_of_one_rank():
    experts = tune.experts_of(zoo_config("Ling-flash-2.0"), 4)
    assert experts == Experts(256, 256, 4096, 8, 8, 4, "bf16")
    assert (experts.w1_shape, experts.w2_shape) == ((256, 512, 4096), (256, 4096, 256))
    assert experts.weight_bytes == 256 * 3 * 256 * 4096 * 2


@pytest.mark.parametrize(
    ("quantization", "wanted"),
    [
        (None, "bf16"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float", "block_structure": [128, 128]}}},
            },
            "fp8",
        ),
    ],
)
def test_the_checkpoints_own_dtype_is_taken(quantization, wanted):
    overrides = {"quantization_config": quantization} if quantization else {}
    assert tune.experts_of(zoo_config("Ling-mini-2.0", **overrides), 1).dtype == wanted


@pytest.mark.parametrize(
    ("overrides", "tp", "dtype", "words"),
    [
        ({}, 3, None, "--tensor-parallel-size 3 must divide moe_intermediate_size=512"),
        ({}, 0, None, "--tensor-parallel-size 0 must divide"),
        ({}, 8, "fp8", "tensor-parallel size = 64 is no multiple of 128"),
        ({}, 1, "int8", "--dtype int8 has no tables of vLLM's Triton experts; use one of bf16, fp8"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            1,
            None,
            "'gptq' and not in blocks of 128 x 128",
        ),
    ],
)
def test_what_has_no_table_is_refused_in_one_line(overrides, tp, dtype, words):
    with pytest.raises(ValueError) as error:
        tune.experts_of(zoo_config("Ling-mini-2.0", **overrides), tp, dtype)
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- the search space ----------------------------------------------------------------------------------------------


@given(
    tokens=st.sampled_from(LADDER),
    experts=st.builds(
        Experts,
        st.sampled_from([8, 64, 256]),
        st.sampled_from([128, 256, 512, 1024, 2048]),
        st.sampled_from([2048, 4096, 8192]),
        st.sampled_from([1, 2, 8]),
        st.just(8),
        st.just(4),
        st.sampled_from(tune.DTYPES),
    ),
    kib=st.sampled_from([64, 99, 163, 227]),
)
def test_candidates_keep_to_the_limits(tokens, experts, kib):
    found = candidates(experts, tokens, kib * 1024)
    keys = [tuple(one.values()) for one in found]
    assert found and len(set(keys)) == len(keys)
    for one in found:
        assert tuple(one) == FIELDS
        assert tune.shared_memory_bytes(experts, one) <= kib * 1024
        assert all(value & (value - 1) == 0 for value in list(one.values())[:5]), "Triton takes powers of two"
        assert one["BLOCK_SIZE_M"] >= 16, "no matrix instruction takes fewer rows"
        assert one["BLOCK_SIZE_M"] * one["BLOCK_SIZE_N"] // (32 * one["num_warps"]) <= 128
        # A step along K that is longer than a block of weights would multiply with the scale of its first.
        assert experts.block_shape is None or experts.block_shape[1] % one["BLOCK_SIZE_K"] == 0


def test_shared_memory_is_what_triton_reports_for_sm_90():
    """Recorded from compiling vLLM 0.32's kernel by Triton 3.6, in bytes."""
    bf16, fp8 = MINI, Experts(256, 256, 4096, 8, 8, 4, "fp8")
    for experts, values, reported in (
        (bf16, (32, 64, 128, 1, 4, 4), 73728),
        (bf16, (64, 256, 128, 16, 8, 3), 245760),
        (bf16, (16, 64, 256, 1, 4, 3), 81920),
        (bf16, (64, 64, 256, 1, 4, 2), 131072),
        (fp8, (16, 128, 128, 1, 4, 4), 74240),
        (fp8, (128, 256, 128, 16, 8, 4), 197632),
        (fp8, (32, 64, 64, 16, 8, 4), 24576),
    ):
        assert tune.shared_memory_bytes(experts, config(*values)) == pytest.approx(reported, rel=0.02)


def test_tiles_grow_with_the_tokens_of_an_expert():
    def heights(tokens: int) -> set[int]:
        return {one["BLOCK_SIZE_M"] for one in candidates(MINI, tokens, 227 * 1024)}

    assert heights(1) == {16}
    assert heights(4096) == {32, 64, 128}


# ---- the choice ----------------------------------------------------------------------------------------------------


class FakeTimer:
    """Times from a table in ms, with noise of which one part changes from draw to draw and one with every timing."""

    def __init__(self, times, noise=0.0, seed=0):
        self.times = {tuple(one.values()): ms for one, ms in times}
        self.noise, self.random, self.timed = noise, random.Random(seed), []

    def start(self, tokens, default):
        self.tokens = tokens

    def route(self, draw):
        self.drift = 1 + 0.3 * random.Random(draw).random()

    def arm(self, one):
        self.timed.append((self.tokens, tuple(one.values())))
        ms = self.times[tuple(one.values())]
        if ms is None:
            raise CandidateFailed("out of resource: shared memory")
        return lambda: ms * self.drift * (1 + self.noise * self.random.uniform(-1, 1))


def found(timer, tmp_path, configs, tokens=(16,)):
    notes = Notes(tmp_path / "partial.jsonl", {"key": 1})
    return search(timer, dict.fromkeys(tokens, configs), lambda _: DEFAULT, notes)


def test_a_gain_of_ten_percent_is_kept(tmp_path):
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (TEN, 0.9), (SLOW, 3.0)])
    (row,) = found(timer, tmp_path, [DEFAULT, ONE, TEN, SLOW])
    assert row.is_kept and row.config == TEN
    assert row.ratio == pytest.approx(1 / 0.9) and row.best_ms / row.default_ms == pytest.approx(0.9)
    assert (row.tried, row.failed) == (3, 0)


def test_a_gain_of_one_percent_is_not_kept_and_the_entry_is_the_default(tmp_path):
    (row,) = found(FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (SLOW, 3.0)]), tmp_path, [ONE, SLOW])
    assert not row.is_kept and row.config == DEFAULT
    assert row.best == ONE and row.ratio == pytest.approx(1 / 0.99)


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_not_taken_for_a_gain(seed, tmp_path):
    """Timings scatter by up to 15 % each way, as much as the gain that has to be found."""
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (TEN, 1.0), (SLOW, 1.01)], noise=0.15, seed=seed)
    (row,) = found(timer, tmp_path, [ONE, TEN, SLOW])
    assert not row.is_kept
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (TEN, 0.8), (SLOW, 3.0)], noise=0.15, seed=seed)
    (row,) = found(timer, tmp_path / "gain", [ONE, TEN, SLOW])
    assert row.config == TEN


def test_the_second_pass_decides_and_not_the_first():
    assert tune.choose([1.0, 1.0, 1.0, 1.0], [[0.99] * 4, [0.9] * 4]) == (1, pytest.approx(1 / 0.9), True)
    # Much faster now and then, slower at other times.
    assert tune.choose([1.0] * 8, [[0.5] * 5 + [1.1] * 3])[2] is False


def test_candidates_that_fail_are_counted_and_passed_over(tmp_path):
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, None), (TEN, 0.9), (SLOW, None)])
    (row,) = found(timer, tmp_path, [ONE, TEN, SLOW])
    assert (row.tried, row.failed, row.config) == (3, 2, TEN)


def test_where_no_candidate_runs_the_default_stays(tmp_path):
    (row,) = found(FakeTimer([(DEFAULT, 1.0), (ONE, None)]), tmp_path, [ONE])
    assert (row.config, row.ratio, row.is_kept) == (DEFAULT, 1.0, False)


def test_all_steps_are_told(tmp_path):
    told = []
    space = {1: [ONE, TEN], 2: [DEFAULT, ONE]}
    timer = FakeTimer([(DEFAULT, 1.0), (ONE, None), (TEN, 0.9)])
    search(timer, space, lambda _: DEFAULT, Notes(tmp_path / "n", {}), lambda *step: told.append(step))
    assert sum(count for _, count in told) == tune.steps(space)
    assert [tokens for tokens, _ in told] == sorted(tokens for tokens, _ in told)


# ---- going on with what was cut off ----------------------------------------------------------------------------------


class Stops(FakeTimer):
    """Pressed Ctrl-C at the given timing."""

    def __init__(self, times, after):
        super().__init__(times)
        self.after = after

    def arm(self, one):
        if len(self.timed) == self.after:
            raise KeyboardInterrupt
        return super().arm(one)


TIMES = [(DEFAULT, 1.0), (ONE, 0.99), (TEN, 0.9), (SLOW, None)]


@pytest.mark.parametrize("after", range(12))
def test_a_run_cut_off_anywhere_goes_on_to_the_same_rows(after, tmp_path):
    whole = found(FakeTimer(TIMES), tmp_path / "whole", [ONE, TEN, SLOW], (1, 2))
    cut = Stops(TIMES, after)
    with pytest.raises(KeyboardInterrupt):
        found(cut, tmp_path, [ONE, TEN, SLOW], (1, 2))
    rest = FakeTimer(TIMES)
    assert found(rest, tmp_path, [ONE, TEN, SLOW], (1, 2)) == whole
    first_pass = [one for one in cut.timed + rest.timed if one[1] == tuple(SLOW.values())]
    assert len(first_pass) == 2, "a candidate was tried twice"


def test_a_last_line_that_was_cut_off_is_dropped(tmp_path):
    file = tmp_path / "n"
    notes = Notes(file, {"a": 1})
    notes.add_time(1, ONE, 0.5)
    with file.open("a") as text:
        text.write('{"tokens": 1, "con')
    notes = Notes(file, {"a": 1})
    assert notes.time(1, ONE) == (True, 0.5) and len(notes) == 1
    notes.add_time(1, TEN, None)
    assert Notes(file, {"a": 1}).time(1, TEN) == (True, None)


def test_results_of_anything_else_do_not_count(tmp_path):
    here = {"gpu": H20, "driver": "1", "vllm": "0.32.0"}
    space = {1: [ONE, TEN]}
    key = tune.partial_key(MINI, space, here)
    others = [
        tune.partial_key(MINI, space, here | {"driver": "2"}),
        tune.partial_key(MINI, space, here | {"vllm": "0.33.0"}),
        tune.partial_key(TINY, space, here),
        tune.partial_key(MINI, {1: [ONE]}, here),
        tune.partial_key(MINI, {2: [ONE, TEN]}, here),
    ]
    assert key == tune.partial_key(MINI, {1: [dict(ONE), dict(TEN)]}, dict(here))
    for number, other in enumerate(others):
        file = tmp_path / str(number)
        Notes(file, key).add_time(1, ONE, 0.5)
        assert Notes(file, key).time(1, ONE) == (True, 0.5)
        assert Notes(file, other).time(1, ONE) == (False, None)


def test_what_broke_the_gpu_is_not_tried_again(tmp_path):
    class Breaks(FakeTimer):
        def arm(self, one):
            if one == TEN:
                raise CandidateFailed("illegal memory access", is_fatal=True)
            return super().arm(one)

    with pytest.raises(TuneError, match=r"illegal memory access.*run this again"):
        found(Breaks(TIMES), tmp_path, [ONE, TEN])
    rest = FakeTimer(TIMES)
    (row,) = found(rest, tmp_path, [ONE, TEN])
    assert row.failed == 1 and (16, tuple(TEN.values())) not in rest.timed


# ---- the files -------------------------------------------------------------------------------------------------------

NAMES = [
    (MINI, H20, "E=256,N=512,device_name=NVIDIA_H20.json"),
    (MINI, "NVIDIA H100 80GB HBM3", "E=256,N=512,device_name=NVIDIA_H100_80GB_HBM3.json"),
    (
        Experts(256, 1024, 4096, 8, 8, 4, "fp8"),
        "NVIDIA H20-3e",
        "E=256,N=1024,device_name=NVIDIA_H20-3e,dtype=fp8_w8a8,block_shape=[128,128].json",
    ),
    # vLLM has one name for the H200 family.
    (
        Experts(64, 256, 8192, 8, 8, 4, "fp8"),
        "NVIDIA H200 NVL",
        "E=64,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
    ),
]


@pytest.mark.parametrize(("experts", "device", "name"), NAMES)
def test_the_file_has_the_name_that_vllm_looks_for(experts, device, name):
    assert tune.table_name(experts, device) == name


def test_vllms_own_table_is_found():
    assert tune.vllm_table("E=256,N=512,device_name=NVIDIA_H20.json")
    assert tune.vllm_table("E=256,N=1024,device_name=NVIDIA_H20.json") is None


def test_the_gpus_name_is_borrowed_for_the_look_up_only():
    from vllm.platforms import current_platform

    before = current_platform.get_device_name()
    with compat.device_called(H20):
        assert current_platform.get_device_name() == H20
        assert tune.table_name(MINI).endswith("device_name=NVIDIA_H20.json")
    assert current_platform.get_device_name() == before != H20
    assert "H20" not in tune.table_name(MINI)


def test_weights_that_do_not_fit_are_an_error(timer, monkeypatch):
    timer.experts = Experts(256, 64, 2048, 8, 8, 4, "bf16")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (200 * 2**20, 0))
    with pytest.raises(TuneError, match=r"one layer take 0\.2 GiB"):
        timer._affordable_copies()


def rows_of(experts, limit=227 * 1024):
    """One row for each M, every other one kept, all entries different where they can be."""
    rows = []
    for index, tokens in enumerate(LADDER):
        best = candidates(experts, tokens, limit)[index]
        rows.append(Row(tokens, DEFAULT, best, 1.0, 0.5 + index / 100, 1.5, index % 2 == 0, 40, 2))
    return rows


def _read_back(experts, folder, device):
    import os

    os.environ["VLLM_TUNED_CONFIG_FOLDER"] = folder
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs, try_get_optimal_moe_config

    block_n, block_k = experts.block_shape or (0, 0)
    with compat.device_called(device):
        loaded = get_moe_configs(experts.num_experts, experts.intermediate_size, experts.table_dtype, block_n, block_k)
        taken = {
            tokens: try_get_optimal_moe_config(
                experts.w1_shape,
                experts.w2_shape,
                experts.top_k,
                experts.table_dtype,
                tokens,
                block_shape=experts.block_shape,
            )
            for tokens in (3000, 100000, *LADDER)
        }
    return loaded, taken


@pytest.mark.parametrize(("experts", "device", "name"), NAMES)
def test_vllm_reads_the_same_integers_back(experts, device, name, tmp_path):
    rows = rows_of(experts)
    tune.write_table(tmp_path / name, tune.table(rows, "3.6.0"), {})
    loaded, taken = run(_read_back, experts, str(tmp_path), device)
    assert loaded == {row.tokens: row.config for row in rows}
    assert taken == loaded | {3000: loaded[3072], 100000: loaded[4096]}


def test_the_baseline_is_what_vllm_does_without_the_users_folder(tmp_path):
    """That is vLLM's own table for this shape, and for the next one its rules."""
    own = json.loads(tune.vllm_table("E=256,N=512,device_name=NVIDIA_H20.json").read_text())
    with compat.device_called(H20):
        assert tune.baseline(MINI, 64) == {field: own["64"][field] for field in FIELDS}
        rules = tune.baseline(Experts(256, 1024, 4096, 8, 8, 4, "bf16"), 64)
    assert tuple(rules) == FIELDS and all(type(value) is int for value in rules.values())


MACHINE = {
    "gpu": H20,
    "compute_capability": "9.0",
    "driver": "580.1",
    "cuda": "12.9",
    "torch": "2.13.0",
    "triton": "3.6.0",
    "vllm": "0.32.0",
    "vllm_bailing": "0.1.0",
    "python": "3.11",
}


def test_a_run_writes_table_and_provenance_and_removes_its_notes(tmp_path, monkeypatch):
    plan = tune.plan(MINI, tmp_path / "tables", H20)
    one = {tokens: [ONE, TEN] for tokens in LADDER}
    plan = tune.Plan(MINI, H20, plan.file, one, 1.0, plan.replaced, False)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "another")
    monkeypatch.setattr(tune, "machine", lambda: MACHINE)
    monkeypatch.setattr(tune, "baseline", lambda _experts, _tokens: DEFAULT)
    monkeypatch.setattr(tune, "GpuTimer", lambda _experts: FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (TEN, 0.8)]))
    rows, written = tune.run(plan, "Ling-mini-2.0", 1)
    table, origin = (json.loads(file.read_text()) for file in written)
    assert sorted(file.name for file in plan.file.parent.iterdir()) == sorted(file.name for file in written)
    assert table == {"triton_version": "3.6.0"} | {str(tokens): TEN for tokens in LADDER}
    assert origin["tokens"]["4096"] == {
        "default": DEFAULT,
        "best": TEN,
        "default_ms": rows[-1].default_ms,
        "best_ms": rows[-1].best_ms,
        "ratio": pytest.approx(1.25),
        "is_kept": True,
        "tried": 2,
        "failed": 0,
    }
    assert origin.items() >= MACHINE.items()
    assert (origin["model"], origin["tensor_parallel_size"]) == ("Ling-mini-2.0", 1)
    assert origin["baseline"] == "vLLM's table E=256,N=512,device_name=NVIDIA_H20.json"
    assert (origin["candidates_tried"], origin["entries_kept"]) == (2 * len(LADDER), len(LADDER))
    assert origin["date"].endswith("+00:00")


# ---- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture
def mini(tmp_path):
    zoo_config("Ling-mini-2.0").save_pretrained(tmp_path)
    return tmp_path


def test_a_dry_run_needs_no_gpu(mini, tmp_path):
    done = invoke(
        mini, "--dry-run", "--device-name", H20, "-tp", 2, "--dtype", "fp8", "--out", tmp_path / "t", "--json"
    )
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["file"] == str(
        tmp_path / "t" / "E=256,N=256,device_name=NVIDIA_H20,dtype=fp8_w8a8,block_shape=[128,128].json"
    )
    assert (plan["exists"], plan["experts"]["intermediate_size"]) == (False, 256)
    assert plan["in_vllm"].endswith(
        "configs/E=256,N=256,device_name=NVIDIA_H20,dtype=fp8_w8a8,block_shape=[128,128].json"
    )
    assert list(plan["candidates"]) == [str(tokens) for tokens in LADDER] and min(plan["candidates"].values()) > 10
    assert 300 < plan["estimated_seconds"] < 4 * 3600
    assert not (tmp_path / "t").exists()


def test_a_dry_run_says_what_is_there(mini, tmp_path):
    (tmp_path / "E=256,N=128,device_name=NVIDIA_H20.json").write_text("{}")
    done = invoke(mini, "--dry-run", "--device-name", H20, "-tp", 4, "--out", tmp_path)
    assert "device_name=NVIDIA_H20.json (exists)" in done.stdout
    assert "vLLM's own: none, so it would use its defaults" in done.stdout
    assert "w1 [256, 256, 2048], w2 [256, 2048, 128]" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_without_a_gpu_there_is_one_line(arguments):
    done = invoke(DEMO, *arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if "vllm-bailing tune:" in line]
    assert "no GPU that torch can use" in line and "--dry-run --device-name" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-tp", 3), "must divide"),
        (("--device-name", H20), "--device-name is for --dry-run"),
        (("--dtype", "int4", "--dry-run", "--device-name", H20), "--dtype int4"),
    ],
)
def test_a_request_that_makes_no_sense_ends_with_exit_code_2(arguments, words, mini):
    done = invoke(mini, *arguments)
    assert done.exit_code == 2 and words in " ".join(done.stderr.replace("│", " ").split())


@pytest.fixture
def with_gpu(monkeypatch):
    """The command as it would run on a GPU, with times that are made up."""
    monkeypatch.setattr(tune, "missing", str)
    monkeypatch.setattr(tune, "shared_memory", lambda: 99 * 1024)
    monkeypatch.setattr(tune, "machine", lambda: MACHINE)
    monkeypatch.setattr(tune, "LADDER", (1, 4096))
    monkeypatch.setattr(tune, "baseline", lambda _experts, _tokens: DEFAULT)

    class ThreeStagesAreFast(FakeTimer):
        def __init__(self, _experts):
            super().__init__([])

        def arm(self, one):
            self.times[tuple(one.values())] = 0.8 if one["num_stages"] == 3 else 1.0
            return super().arm(one)

    monkeypatch.setattr(tune, "GpuTimer", ThreeStagesAreFast)
    with compat.device_called(H20):
        yield ThreeStagesAreFast


def test_the_command_prints_times_and_how_to_use_the_table(mini, tmp_path, with_gpu):
    done = invoke(mini, "-tp", 2, "--out", tmp_path / "tables")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["tokens", "default", "ms", "best", "ms", "ratio", "entry"]
    assert [line.split()[0] for line in lines[2:4]] == ["1", "4096"] and "1.25" in lines[2]
    assert "2 of 2 entries are faster" in done.stdout
    assert "(does not exist yet)" in done.stderr and "vLLM's own: " in done.stderr
    serve = f"VLLM_TUNED_CONFIG_FOLDER={tmp_path / 'tables'} vllm serve {mini} --tensor-parallel-size 2"
    assert serve in lines
    again = invoke(mini, "-tp", 2, "--out", tmp_path / "tables")
    assert again.exit_code == 2 and "is there; use it, or add --overwrite" in again.stderr


def test_ctrl_c_says_how_to_go_on(mini, tmp_path, with_gpu, monkeypatch):
    arm = with_gpu.arm
    count = iter(range(100))

    def stopping(self, one):
        if next(count) == 5:
            raise KeyboardInterrupt
        return arm(self, one)

    monkeypatch.setattr(with_gpu, "arm", stopping)
    done = invoke(mini, "--out", tmp_path / "tables")
    left = tmp_path / "tables" / "E=256,N=512,device_name=NVIDIA_H20.partial.jsonl"
    assert done.exit_code == 130 and f"{left}, and the same command goes on" in done.stderr
    assert len(left.read_text().splitlines()) == 6  # the key, and five candidates
    monkeypatch.setattr(with_gpu, "arm", arm)
    assert invoke(mini, "--out", tmp_path / "tables").exit_code == 0
    assert not left.exists()


# ---- the timing code, as far as a CPU goes ---------------------------------------------------------------------------


def test_vllm_has_all_that_is_called_by_these_names():
    from vllm.model_executor.layers import fused_moe as package
    from vllm.model_executor.layers.fused_moe import config as configs
    from vllm.model_executor.layers.fused_moe import fused_moe

    wanted = {
        fused_moe.fused_experts: "hidden_states w1 w2 topk_weights topk_ids",
        fused_moe.get_config_file_name: "E N dtype block_shape",
        fused_moe.try_get_optimal_moe_config: "w1_shape w2_shape top_k dtype M block_shape",
        fused_moe.get_moe_configs: "E N dtype block_n block_k",
        package.override_config: "config",
    }
    for function, names in wanted.items():
        parameters = list(inspect.signature(function).parameters)
        assert parameters[: len(names.split())] == names.split(), function.__name__
    assert not inspect.signature(package.get_config).parameters
    assert "quant_config" in inspect.signature(fused_moe.fused_experts).parameters
    for name in ("w1_scale", "w2_scale", "block_shape"):
        assert name in inspect.signature(configs.fp8_w8a8_moe_quant_config).parameters
    # The override comes before any table, and everything else of a configuration goes to the kernel as it is.
    source = inspect.getsource(fused_moe.try_get_optimal_moe_config)
    assert source.index("get_config()") < source.index("get_moe_configs(")
    kernel = inspect.signature(getattr(fused_moe.fused_moe_kernel, "fn", fused_moe.fused_moe_kernel)).parameters
    assert set(FIELDS[:4]) <= set(kernel)


@pytest.mark.parametrize("n_group", [1, 4])
def test_random_routing_is_group_limited(n_group):
    experts = Experts(16, 128, 256, 3, n_group, min(n_group, 2), "bf16")
    ids, weights = tune.random_routing(experts, (5, 40), torch.Generator().manual_seed(0))
    assert (ids.shape, ids.dtype, weights.dtype) == ((5, 40, 3), torch.int32, torch.float32)
    assert all(len(set(one)) == 3 for one in ids.flatten(0, 1).tolist())
    assert ids.unique().tolist() == list(range(16))
    if n_group > 1:
        assert max(len(set(one)) for one in (ids // 4).flatten(0, 1).tolist()) == 2
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 40))


class Graph:
    """Stands in for a CUDA graph: runs again what the timer captured."""

    replays = 0

    def replay(self):
        Graph.replays += 1


@pytest.fixture
def timer(monkeypatch):
    """A `GpuTimer` on the CPU. vLLM's experts are replaced by plain ones that notice what they are given."""
    from vllm.model_executor.layers.fused_moe import fused_moe, get_config

    seen = []

    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, quant_config):
        seen.append(SimpleNamespace(config=get_config(), w1=w1, ids=topk_ids, quant_config=quant_config))
        if get_config()["BLOCK_SIZE_N"] == 256:
            raise RuntimeError("out of resource: shared memory,\n Required: 270336")
        scales = [
            scale.repeat_interleave(128, 1).repeat_interleave(128, 2) for scale in quant_config_scales(quant_config)
        ]
        w1, w2 = (w.float() * scale for w, scale in zip((w1, w2), scales, strict=True))
        gate, up = torch.einsum("mh,mkfh->mkf", hidden_states.float(), w1[topk_ids]).chunk(2, -1)
        each = torch.einsum("mkf,mkhf->mkh", torch.nn.functional.silu(gate) * up, w2[topk_ids])
        wrong = 1.2 if get_config()["BLOCK_SIZE_N"] == 128 else 1.0
        return wrong * (each * topk_weights[..., None]).sum(1).bfloat16()

    def quant_config_scales(quant_config):
        return quant_config.w1_scale, quant_config.w2_scale

    @contextlib.contextmanager
    def graph(_graph):
        yield

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Graph.replays

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 4.0 * (end.at - self.at)

    for name, value in {"CUDAGraph": Graph, "graph": graph, "Event": Event, "synchronize": lambda *_: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(tune.GpuTimer, "_cache_bytes", lambda _: 64)
    monkeypatch.setattr(fused_moe, "fused_experts", fused_experts)
    made = tune.GpuTimer(TINY, "cpu", copies=2)
    made.seen = seen
    return made


def test_a_timing_is_of_one_replay_divided_by_its_calls(timer):
    timer.start(24, DEFAULT)
    measure = timer.arm(TEN)
    assert measure() == 4.0 / tune.CALLS


def test_calls_run_under_the_candidate_and_rotate_weights_and_routing(timer):
    timer.start(24, DEFAULT)
    timer.seen.clear()
    timer.arm(TEN)
    assert len(timer.seen) == 2 * tune.CALLS  # once to compile, once to capture
    assert all(call.config == TEN for call in timer.seen)
    assert len({call.w1.data_ptr() for call in timer.seen}) == 2
    assert timer.seen[0].w1.data_ptr() != timer.seen[1].w1.data_ptr()
    assert not torch.equal(timer.seen[0].ids, timer.seen[1].ids)


def test_routing_changes_in_place_and_is_the_same_for_the_same_draw(timer):
    timer.start(24, DEFAULT)
    where, first = timer._ids.data_ptr(), timer._ids.clone()
    timer.route(1)
    assert timer._ids.data_ptr() == where and not torch.equal(timer._ids, first)
    timer.route(0)
    assert torch.equal(timer._ids, first)


def test_results_are_of_the_size_that_a_models_are(timer):
    """Weights with scales give numbers that neither overflow nor vanish."""
    timer.start(24, DEFAULT)
    assert 0.05 < timer._right.std() < 5


def test_a_candidate_that_computes_something_else_is_refused(timer):
    timer.start(24, DEFAULT)
    with pytest.raises(CandidateFailed, match=r"off by 0\.2"):
        timer.arm(config(16, 128, 64, 1, 4, 3))


def test_a_candidate_that_fails_leaves_no_override_behind(timer):
    """vLLM's context manager would: later look-ups would find the failed configuration."""
    from vllm.model_executor.layers.fused_moe import get_config

    timer.start(24, DEFAULT)
    with pytest.raises(
        CandidateFailed, match="RuntimeError: out of resource: shared memory, Required: 270336"
    ) as error:
        timer.arm(config(16, 256, 64, 1, 4, 3))
    assert not error.value.is_fatal and get_config() is None


def test_a_gpu_that_can_do_nothing_more_is_noticed(timer, monkeypatch):
    timer.start(24, DEFAULT)

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(CandidateFailed) as error:
        timer.arm(TEN)
    assert error.value.is_fatal


def test_a_default_that_does_not_run_is_an_error(timer):
    with pytest.raises(TuneError, match=r"vLLM's own configuration .* for 24 tokens does not run: RuntimeError"):
        timer.start(24, config(16, 256, 64, 1, 4, 3))


@pytest.mark.parametrize(
    ("cache", "free", "copies"),
    [(40, 4000, 2), (50, 4000, 3), (126, 4000, 6), (500, 4000, 8), (500, 520, 2), (500, 260, 1)],
)
def test_copies_of_the_weights_are_several_times_the_cache_and_fit(timer, monkeypatch, cache, free, copies):
    experts = Experts(256, 64, 2048, 8, 8, 4, "bf16")
    assert experts.weight_bytes == 192 * 2**20
    timer.experts = experts
    monkeypatch.setattr(tune.GpuTimer, "_cache_bytes", lambda _: cache * 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * 2**20, 0))
    assert timer._affordable_copies() == copies


# ---- tables that come with the package -------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setattr(our_settings, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: True)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "E=1.json").write_text("{}")
    return tmp_path / "tables"


def folder_in_use():
    import os

    return os.environ.get("VLLM_TUNED_CONFIG_FOLDER")


def test_shipped_tables_are_used_on_a_gpu(shipped):
    our_settings.use_shipped_tables()
    assert folder_in_use() == str(shipped)


def test_the_users_folder_wins(shipped, monkeypatch):
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "/mine")
    our_settings.use_shipped_tables()
    assert folder_in_use() == "/mine"


def test_nothing_is_set_without_tables_or_gpu(shipped, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: False)
    our_settings.use_shipped_tables()
    assert folder_in_use() is None
    monkeypatch.undo()
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    for missing in ("empty", "none"):
        with monkeypatch.context() as patch:
            patch.setattr(current_platform, "is_cuda_alike", lambda: True)
            patch.setattr(our_settings, "TABLES", shipped.parent / missing)
            (shipped.parent / "empty").mkdir(exist_ok=True)
            our_settings.use_shipped_tables()
        assert folder_in_use() is None


def test_tables_are_set_where_our_model_is_built_and_by_nothing_before(shipped, monkeypatch):
    """Registration runs in the processes of all models, so it must not."""
    from vllm_bailing import model

    monkeypatch.setattr(compat, "_status", None)
    compat.register()
    assert folder_in_use() is None
    half = SimpleNamespace(model_config=SimpleNamespace(hf_config=zoo_config("Ling-mini-2.0")), quant_config=None)
    with pytest.raises(AttributeError, match="speculative_config"):
        model.BailingMoeV2ForCausalLM(vllm_config=half)
    assert folder_in_use() == str(shipped)


def test_every_shipped_table_says_where_it_was_measured():
    for file in our_settings.TABLES.glob("E=*.json"):
        if ".provenance" not in file.name:
            origin = json.loads(file.with_name(f"{file.stem}.provenance.json").read_text())
            assert {"gpu", "driver", "vllm", "date", "tokens"} <= origin.keys()
