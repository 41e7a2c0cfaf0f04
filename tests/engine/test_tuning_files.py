"""The tuner's files as vLLM reads them, and the tables that come with the package."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from serve_configs import zoo_config

import vllm_bailing
from tests.support.tuning import DEFAULT, H20, MACHINE, MINI, NAMES, ONE, TEN, FakeTimer
from vllm_bailing.plugin import patches, register
from vllm_bailing.tuning import plan, table
from vllm_bailing.tuning.space import FIELDS, LADDER, Experts

H100 = "NVIDIA H100 80GB HBM3"
VLLMS_OWN = "E=256,N=512,device_name=NVIDIA_H100_80GB_HBM3.json"  # for Ling-mini, in every supported release

# ---- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "device", "name"), NAMES)
def test_the_file_has_the_name_that_vllm_looks_for(experts, device, name):
    assert table.table_name(experts, device) == name


def test_vllms_own_table_is_found():
    assert table.vllm_table(VLLMS_OWN)
    assert table.vllm_table("E=256,N=1024,device_name=NVIDIA_H20.json") is None


def test_the_gpus_name_is_borrowed_for_the_look_up_only():
    from vllm.platforms import current_platform

    before = current_platform.get_device_name()
    with patches.pretend_device(H20):
        assert current_platform.get_device_name() == H20
        assert table.table_name(MINI).endswith("device_name=NVIDIA_H20.json")
    assert current_platform.get_device_name() == before != H20
    assert "H20" not in table.table_name(MINI)


def test_the_baseline_is_what_vllm_does_without_the_users_folder(tmp_path):
    """That is vLLM's own table for this shape, and for the next one its rules."""
    own = json.loads(table.vllm_table(VLLMS_OWN).read_text())
    with patches.pretend_device(H100):
        assert table.baseline(MINI, 64) == {field: own["64"][field] for field in FIELDS}
        rules = table.baseline(Experts(256, 1024, 4096, 8, 8, 4, "bf16"), 64)
    assert tuple(rules) == FIELDS and all(type(value) is int for value in rules.values())


def test_a_run_writes_table_and_provenance_and_removes_its_notes(tmp_path, monkeypatch):
    made = plan.make_tuning_plan(MINI, tmp_path / "tables", H100)
    one = {tokens: [ONE, TEN] for tokens in LADDER}
    made = plan.TuningPlan(MINI, H100, made.file, one, 1.0, made.replaced, False, None)
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "another")
    monkeypatch.setattr(plan, "device_info", lambda: MACHINE)

    def baseline(_experts, _tokens):
        assert folder_in_use() is None
        return DEFAULT

    monkeypatch.setattr(plan, "baseline", baseline)
    monkeypatch.setattr(plan, "GpuTimer", lambda _experts: FakeTimer([(DEFAULT, 1.0), (ONE, 0.99), (TEN, 0.8)]))
    rows, written = plan.run(made, "Ling-mini-2.0", 1)
    assert folder_in_use() == "another"
    written_table, origin = (json.loads(file.read_text()) for file in written)
    assert sorted(file.name for file in made.file.parent.iterdir()) == sorted(file.name for file in written)
    assert written_table == {"triton_version": "3.6.0"} | {str(tokens): TEN for tokens in LADDER}
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
    assert origin["baseline"] == f"vLLM's table {VLLMS_OWN}"
    assert (origin["candidates_tried"], origin["entries_kept"]) == (2 * len(LADDER), len(LADDER))
    assert origin["date"].endswith("+00:00")


# ---- tables that come with the package -------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    monkeypatch.setattr(patches, "TABLES", tmp_path / "tables")
    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: True)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "E=1.json").write_text("{}")
    return tmp_path / "tables"


def folder_in_use():
    import os

    return os.environ.get("VLLM_TUNED_CONFIG_FOLDER")


def test_shipped_tables_are_used_on_a_gpu(shipped):
    patches.use_shipped_tables()
    assert folder_in_use() == str(shipped)


def test_the_users_folder_wins(shipped, monkeypatch):
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", "/mine")
    patches.use_shipped_tables()
    assert folder_in_use() == "/mine"


def test_nothing_is_set_without_tables_or_gpu(shipped, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cuda_alike", lambda: False)
    patches.use_shipped_tables()
    assert folder_in_use() is None
    monkeypatch.undo()
    monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
    for missing in ("empty", "none"):
        with monkeypatch.context() as patch:
            patch.setattr(current_platform, "is_cuda_alike", lambda: True)
            patch.setattr(patches, "TABLES", shipped.parent / missing)
            (shipped.parent / "empty").mkdir(exist_ok=True)
            patches.use_shipped_tables()
        assert folder_in_use() is None


def test_tables_are_set_where_our_model_is_built_and_by_nothing_before(shipped, monkeypatch):
    """Registration runs in the processes of all models, so it must not."""
    from vllm_bailing import model

    monkeypatch.setattr(register, "_decision", None)
    register.register()
    assert folder_in_use() is None
    half = SimpleNamespace(model_config=SimpleNamespace(hf_config=zoo_config("Ling-mini-2.0")), quant_config=None)
    with pytest.raises(AttributeError, match="speculative_config"):
        model.BailingMoeV2ForCausalLM(vllm_config=half)
    assert folder_in_use() == str(shipped)


def test_every_shipped_table_says_where_it_was_measured():
    for file in vllm_bailing.TABLES.glob("E=*.json"):
        if ".provenance" not in file.name:
            origin = json.loads(file.with_name(f"{file.stem}.provenance.json").read_text())
            assert {"gpu", "driver", "vllm", "date", "tokens"} <= origin.keys()
