"""Which adapters are refused, and that no other is: a table of changes of the demo's adapter, and a property."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.adapters import (
    DEMO_RANK,
    EXPERTS_NAME,
    MLP,
    REFUSED,
    SERVED,
    changed_adapter,
    make_adapter,
    merged,
    setting,
)
from tests.support.checkpoints import read_tensors
from vllm_bailing import DEMO, DEMO_ADAPTER
from vllm_bailing.adapter_audit import Limits, check_adapter
from vllm_bailing.adapters import LINEAR, TARGETS
from vllm_bailing.config import read_config
from vllm_bailing.errors import AdapterError


def limits(**options):
    return Limits(read_config(DEMO), **options)


def refusal(folder, **options):
    """The message, which is one line that says what to do; empty if the adapter passes."""
    try:
        check_adapter(folder, limits(**options))
    except AdapterError as error:
        message = str(error)
        assert message.isprintable() and len(message) < 1000 and message.startswith(f"the adapter {folder}: ")
        assert ";" in message or ": start the server with" in message
        return message
    return ""


@pytest.mark.parametrize("case", SERVED)
def test_an_adapter_that_can_be_merged_passes(case, tmp_path):
    folder = changed_adapter(tmp_path / "adapter", SERVED[case])
    assert refusal(folder) == ""
    assert all(tensor.isfinite().all() for tensor in read_tensors(merged(DEMO, folder, tmp_path / "merged")).values())


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_served_is_refused(case, tmp_path):
    change, fragment = REFUSED[case]
    assert fragment in refusal(changed_adapter(tmp_path / "adapter", change))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


DEMO_TENSORS = read_tensors(DEMO_ADAPTER)
DEMO_WEIGHTS = read_tensors(DEMO)
NAMES = sorted(DEMO_TENSORS)
SIZES = st.sampled_from([0, 1, 4, 8, 16, 64, 127, 128, 256, 384])
SHAPES = st.one_of(st.tuples(SIZES, SIZES), st.tuples(SIZES), st.tuples(SIZES, SIZES, SIZES))
VALUES = st.sampled_from([0.0, 1e-30, 1.0, 1e18, 1e38, math.inf, -math.inf, math.nan])
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.uint8])
TENSORS = st.builds(lambda shape, value, dtype: torch.full(shape, value).to(dtype), SHAPES, VALUES, DTYPES)
_numbers = itertools.count()
SAME_SHAPE = st.tuples(VALUES, DTYPES)


def fits(tensors):
    """Whether PyTorch can add B A to every weight, with a finite result, from factors of rank 8 in floating point."""
    modules = {name.rpartition(".lora_")[0] for name in tensors}
    for module in modules:
        a, b = (tensors.get(f"{module}.lora_{letter}.weight") for letter in "AB")
        if a is None or b is None or not a.is_floating_point() or not b.is_floating_point():
            return False
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != DEMO_RANK or b.shape[1] != DEMO_RANK:
            return False
        weight = DEMO_WEIGHTS[f"{module.removeprefix('base_model.model.')}.weight"]
        product = 2 * b.float() @ a.float()
        if product.shape != weight.shape or not (weight.float() + product).isfinite().all():
            return False
    return bool(modules)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), st.one_of(st.none(), TENSORS, SAME_SHAPE), max_size=3))
def test_what_passes_is_what_can_be_merged(workplace, changes):
    tensors = dict(DEMO_TENSORS)
    for name, change in changes.items():
        if isinstance(change, tuple):
            change = torch.full(tensors[name].shape, change[0]).to(change[1])
        tensors[name] = change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    folder = changed_adapter(workplace / str(next(_numbers)), lambda t, c: (t.clear(), t.update(tensors)))
    message = refusal(folder)
    # The bound of Cauchy and Schwarz is above the elements of the product, in each of the two by a factor below 2000.
    with_room = {name: tensor * 2000 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    if not message:
        assert fits(tensors)
    elif not fits(tensors):
        assert message
    else:
        assert "too large" in message and not fits(with_room)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "is not readable JSON"),
        ("{", "is not readable JSON"),
        ("[]", "holds a list"),
        ("null", "holds a NoneType"),
        ('"r"', "holds a str"),
        ("[" * 100_000, "is not readable JSON"),
        ("{}", "has no r"),
        ('{"r": ' + "1" * 5000 + "}", "is not readable JSON"),
    ],
    ids=["empty", "cut_off", "list", "null", "text", "deep", "no_keys", "long_number"],
)
def test_a_config_that_is_none(text, fragment, tmp_path):
    folder = changed_adapter(tmp_path / "adapter", setting())
    (folder / "adapter_config.json").write_text(text)
    assert fragment in refusal(folder)


def test_a_config_in_no_encoding(tmp_path):
    folder = changed_adapter(tmp_path / "adapter", setting())
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe\x00{")
    assert "is not readable JSON" in refusal(folder)


@pytest.mark.parametrize(
    ("pattern", "fragment"),
    [
        ("(a+)+$", "could take for ever"),
        ("(.*)*x", "could take for ever"),
        ("(a|b){5}", "could take for ever"),
        (r".*\..*\..*\..*", "could take for ever"),
        ("(", "is no regular expression"),
        ("a{99999999999}", "is no regular expression"),
        ("(" * 500 + ")" * 500, "is no regular expression"),
        (r".*layers\.(1|2)\..*\.dense.*", ""),
        (r"^model\.layers\.\d+\.attention\.dense", ""),
    ],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_match_every_module_in_time(key, pattern, fragment, tmp_path):
    folder = changed_adapter(tmp_path / "adapter", setting(**{key: {pattern: DEMO_RANK}}))
    message = refusal(folder)
    assert fragment in message and bool(fragment) == bool(message)


def test_values_of_many_levels(tmp_path):
    folder = changed_adapter(tmp_path / "adapter", setting())
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace("{", '{"lora_bias": ' + "[" * 900 + "]" * 900 + ",", 1))
    assert "lora_bias=" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_file_that_is_cut_off(kept, tmp_path):
    folder = changed_adapter(tmp_path / "adapter", setting())
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "adapter_model.safetensors is cut off or damaged" in refusal(folder)


def test_no_tensors_and_pickle_files(tmp_path):
    folder = changed_adapter(tmp_path / "adapter", setting())
    (folder / "adapter_model.safetensors").unlink()
    assert "there is no adapter_model.safetensors" in refusal(folder)
    torch.save(dict(DEMO_TENSORS), folder / "adapter_model.bin")
    assert "adapter_model.bin is a pickle file" in refusal(folder)


def test_an_adapter_is_read_again_when_its_files_change(tmp_path):
    folder = changed_adapter(tmp_path / "adapter", setting())
    assert refusal(folder) == ""
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    assert "use_dora" in refusal(folder)


def test_values_are_those_of_the_servers_data_type(tmp_path):
    folder = changed_adapter(tmp_path / "adapter", lambda t, c: t.update({n: x.float() * 1e5 for n, x in t.items()}))
    assert refusal(folder) == refusal(folder, dtype="bfloat16") == ""
    assert "too large for float16" in refusal(folder, dtype="float16")


# ---- what the engine prepared, and what it can -----------------------------------------------------------------------


def with_experts(folder, keep=lambda module: True, **options):
    return make_adapter(folder, DEMO, MLP, keep=lambda module: EXPERTS_NAME in module and keep(module), **options)


def test_experts_need_the_flag_or_another_machine(tmp_path):
    folder = with_experts(tmp_path / "adapter")
    wanted = f"start the server with --lora-target-modules {' '.join(LINEAR)} experts"
    assert wanted in refusal(folder) and "144 module(s)" in refusal(folder)
    assert "buy a GPU" in refusal(folder, experts_remedy="buy a GPU; now")
    assert refusal(folder, targets=("experts",)) == refusal(folder, targets=TARGETS) == ""


@pytest.mark.parametrize(
    ("keep", "lacking"),
    [
        (lambda module: "experts.3." not in module, "9 module(s) of routed experts are missing"),
        (lambda module: "up_proj" not in module, "48 module(s) of routed experts are missing"),
        (lambda module: ".layers.1." in module, ""),
        (lambda module: "layers.2.mlp.experts.15.down_proj" not in module, "1 module(s) of routed experts are missing"),
    ],
    ids=["an_expert", "a_projection", "whole_layers", "a_module"],
)
def test_experts_of_a_layer_are_there_all_or_not_at_all(keep, lacking, tmp_path):
    found = refusal(with_experts(tmp_path / "adapter", keep), targets=TARGETS)
    assert lacking in found and bool(lacking) == bool(found)


def test_experts_of_one_projection_have_one_rank(tmp_path):
    """Of different projections they may differ."""

    def write(name, pattern, rank_of):
        folder = with_experts(tmp_path / name)
        tensors = {}
        for key, tensor in read_tensors(folder).items():
            rank = rank_of(key)
            tensors[key] = torch.ones(rank, tensor.shape[1]) if "lora_A" in key else torch.ones(tensor.shape[0], rank)
        return changed_adapter(
            tmp_path / f"{name}-changed",
            lambda t, c: (t.clear(), t.update(tensors), c.update(r=4, rank_pattern=pattern)),
        )

    ranks = write("ranks", {"down_proj": 2}, lambda key: 2 if "down_proj" in key else 4)
    assert refusal(ranks, targets=TARGETS) == ""
    mixed = write("mixed", {r"experts\.0\.up_proj": 2}, lambda key: 2 if "experts.0.up_proj" in key else 4)
    assert "the routed experts of layer 1, up_proj, layer 2, up_proj" in refusal(mixed, targets=TARGETS)


def test_a_vllm_that_ignores_scales_of_modules_refuses_them(tmp_path):
    """As before 0.32."""
    for case, is_refused in (("rank_pattern", True), ("alpha_pattern", True), ("rslora", False), ("as_it_is", False)):
        folder = changed_adapter(tmp_path / case, SERVED[case])
        assert ("are ignored by this vLLM" in refusal(folder, scales_each_module=False)) == is_refused
    folder = with_experts(tmp_path / "experts")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert refusal(folder, targets=TARGETS, scales_each_module=False) == ""
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    assert "use_rslora=true is ignored" in refusal(folder, targets=TARGETS, scales_each_module=False)
    assert refusal(folder, targets=TARGETS) == ""


@pytest.mark.parametrize(
    ("targets", "passes"),
    [
        (("up_proj",), ["gate_proj", "up_proj"]),
        (("gate_up_proj",), ["gate_proj", "up_proj"]),
        (("model.layers.0.mlp.gate_up_proj", "model.layers.2.attention.dense"), []),
        (("dense",), ["dense"]),
    ],
)
def test_targets_are_read_as_vllm_reads_them(targets, passes, tmp_path):
    for kind in LINEAR:
        folder = changed_adapter(tmp_path / kind, lambda t, c, kind=kind: [t.pop(n) for n in list(t) if kind not in n])
        assert (refusal(folder, targets=targets) == "") == (kind in passes)
    folder = make_adapter(tmp_path / "one", DEMO, ("dense",), keep=lambda module: ".layers.2." in module)
    assert (refusal(folder, targets=targets) == "") == ("dense" in " ".join(targets))
