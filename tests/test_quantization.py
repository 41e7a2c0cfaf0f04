"""Quantised checkpoints: in vLLM's own kernels where the CPU build has them, turned into plain weights elsewhere.

What a stored tensor means is computed in tests/checkpoints.py by the formats' definitions, not by any library.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import (
    PROMPT,
    is_linear,
    make_checkpoint,
    no_expert,
    plain_answer,
    quantize,
    read_tensors,
    write_tensors,
)
from engine import EngineError, generate, loaded_rank, make_llm, run, run_ranks
from test_engine_reference import TOLERANCE
from test_speculation import answers, mtp

from vllm_bailing.cli import DEMO
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.dequantize import Dequantizer
from vllm_bailing.weights import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = ("w8a8", "fp8", "fp8-tensor", "gptq", "gptq-act", "awq")
DEQUANTIZE = {"hf_overrides": {"dequantize": True}}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def plain_copy(folder, meaning, out):
    """A checkpoint in fp32 of what the tensors of a quantised one mean."""
    out.mkdir()
    config = {key: value for key, value in config_of(folder).items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    write_tensors(out, meaning)
    return out


# --- turned into plain weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantised_weights_are_what_the_stored_ones_mean(scheme, tmp_path):
    model = make_checkpoint(tmp_path, hidden_size=160, intermediate_size=288, num_nextn_predict_layers=1)
    meaning = quantize(model, scheme)
    stored = read_tensors(model)
    dequantizer = Dequantizer(config_of(model)["quantization_config"], torch.float32)
    found = dict(dequantizer.plain(reversed(stored.items())))  # in any order
    assert set(found) == set(meaning) != set(stored)
    for name, tensor in found.items():
        assert tensor.shape == meaning[name].shape
        torch.testing.assert_close(tensor.float(), meaning[name], atol=1e-6, rtol=1e-6)
        # What was plain passes as it was.
        assert tensor.dtype == (torch.float32 if is_linear(name) else stored[name].dtype)


def test_scales_of_activations_and_cache_are_left_out_of_plain_weights(tmp_path):
    model = make_checkpoint(tmp_path)
    meaning = quantize(model, "fp8-tensor")
    stored = read_tensors(model)
    stored["model.layers.0.attention.dense.input_scale"] = torch.tensor(1.0)
    stored["model.layers.0.attention.k_scale"] = torch.tensor(1.0)
    dequantizer = Dequantizer(config_of(model)["quantization_config"], torch.bfloat16)
    assert set(dict(dequantizer.plain(stored.items()))) == set(meaning)


@pytest.mark.parametrize(
    ("scheme", "change", "fragments"),
    [
        ("fp8", lambda parts: parts.pop("weight_scale_inv"), ("has weight but no weight_scale_inv",)),
        ("gptq", lambda parts: parts.pop("qzeros"), ("but no qzeros",)),
        ("awq", lambda parts: parts.update(scales=parts["scales"][:1]), ("do not fit", "qweight [128, 8]")),
        ("gptq", lambda parts: parts["g_idx"].fill_(9), ("do not fit", "g_idx points outside the 4 groups")),
        ("fp8", lambda parts: parts.update(weight_scale_inv=torch.ones(7, 3)), ("do not fit", "[7, 3]")),
        ("w8a8", lambda parts: parts.update(weight_scale=torch.ones(5, 1)), ("do not fit", "[5, 1]")),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(scheme, change, fragments, tmp_path):
    model = make_checkpoint(tmp_path)
    quantize(model, scheme)
    stored = read_tensors(model)
    module = "model.layers.0.attention.dense"
    parts = {name.removeprefix(f"{module}."): stored.pop(name) for name in list(stored) if name.startswith(module)}
    change(parts)
    stored |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
    dequantizer = Dequantizer(config_of(model)["quantization_config"], torch.float32)
    with pytest.raises(CheckpointError) as refusal:
        list(dequantizer.plain(stored.items()))
    for fragment in (module, *fragments):
        assert fragment in str(refusal.value)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(CheckpointError, match=r"quant_method='mxfp4'.*only compressed-tensors, fp8, gptq, awq"):
        Dequantizer({"quant_method": "mxfp4"}, torch.bfloat16)


def test_the_configuration_hides_what_is_dequantised():
    stored = {"quant_method": "fp8"}
    given = BailingMoeV2Config(dequantize=True, quantization_config=stored)
    assigned = BailingMoeV2Config(quantization_config=stored)
    assigned.update({"dequantize": True})  # as --hf-overrides does
    late = BailingMoeV2Config(dequantize=True)
    late.quantization_config = stored
    for config in (given, assigned, late, BailingMoeV2Config.from_dict(given.to_dict())):
        assert getattr(config, "quantization_config", None) is None
        assert config.stored_quantization_config == stored
    assert BailingMoeV2Config(quantization_config=stored).quantization_config == stored
    with pytest.raises(ValueError, match="dequantize='yes' must be true or false"):
        BailingMoeV2Config(dequantize="yes")


@pytest.mark.engine
@pytest.mark.parametrize("scheme", SCHEMES)
def test_engine_serves_what_a_dequantised_checkpoint_means(scheme, tmp_path):
    model = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1)
    meaning = quantize(model, scheme)
    wanted, wanted_ids = plain_answer(plain_copy(model, meaning, tmp_path / "plain"), PROMPT)
    ((logprobs, token_ids),) = run(generate, model, [PROMPT], speculative_config=mtp(1), **DEQUANTIZE)
    assert (logprobs - wanted).abs().max() <= TOLERANCE
    assert token_ids == wanted_ids


@pytest.mark.engine
def test_a_swapped_scale_shows(tmp_path):
    """Two experts' scales exchanged: what the comparison above is able to see."""
    model = make_checkpoint(tmp_path / "model")
    meaning = quantize(model, "fp8")
    stored = read_tensors(model)
    one, other = (f"model.layers.1.mlp.experts.{expert}.up_proj.weight_scale_inv" for expert in (3, 4))
    stored[one], stored[other] = stored[other], stored[one].float() * 2
    write_tensors(model, stored)
    wanted, _ = plain_answer(plain_copy(model, meaning, tmp_path / "plain"), PROMPT)
    ((logprobs, _),) = run(generate, model, [PROMPT], **DEQUANTIZE)
    assert (logprobs - wanted).abs().max() > 10 * TOLERANCE


# --- in vLLM's own kernels ----------------------------------------------------------------------------------------


def quantize_by_script(folder, out, scheme, *arguments):
    """Run scripts/quantize.py; returns what the tensors that it wrote mean, in fp32, as `quantize` does."""
    command = [sys.executable, str(ROOT / "scripts" / "quantize.py"), str(folder), str(out), "--scheme", scheme]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return meaning_of(read_tensors(out))


def meaning_of(stored):
    """What tensors in the compressed-tensors format mean."""
    meaning = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight_scale", "weight_shape"):
            continue
        scale = stored.get(f"{module}.weight_scale")
        if leaf == "weight_packed":
            nibbles = torch.stack([(tensor >> 4 * place) & 15 for place in range(8)], -1).flatten(1)
            rows, columns = stored[f"{module}.weight_shape"].tolist()
            name, tensor = f"{module}.weight", nibbles[:rows, :columns].float() - 8
        if scale is not None:
            rows, columns = (-(-size // count) for size, count in zip(tensor.shape, scale.shape, strict=True))
            if rows > 1:
                rows, columns = 128, 128
            spread = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            tensor = tensor.float() * spread[: tensor.shape[0], : tensor.shape[1]]
        meaning[name] = tensor.float()
    return meaning


@pytest.mark.parametrize(
    ("scheme", "error"), [("fp8", 0.04), ("fp8-block", 0.04), ("w8a8", 0.01), ("w4a16", 0.1)], ids=lambda value: value
)
def test_the_script_rounds_every_linear_layer_and_nothing_else(scheme, error, tmp_path):
    model = make_checkpoint(tmp_path / "model", num_nextn_predict_layers=1, hidden_size=160, shards=3)
    meaning = quantize_by_script(model, tmp_path / "out", scheme, "--group-size", "32")
    plain = read_tensors(model)
    assert set(meaning) == set(plain)
    for name, tensor in plain.items():
        change = (meaning[name] - tensor.float()).norm() / tensor.float().norm()
        assert (0 < change < error) if is_linear(name) else change == 0, name
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("--scheme", "w4a16"), "--group-size 128 does not divide the 64 inputs of model.layers"),
        (("--scheme", "int3"), "int3"),
    ],
)
def test_the_script_refuses_what_it_cannot_do(arguments, fragment, tmp_path):
    model = make_checkpoint(tmp_path / "model")
    command = [sys.executable, str(ROOT / "scripts" / "quantize.py"), str(model), str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert fragment in " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.engine
@pytest.mark.parametrize(
    ("scheme", "mean_error"),
    [("w8a8", 0.3), ("script-fp8", 0.5), ("script-w4a16", 0.1), ("gptq", 0.1), ("awq", 0.1)],
    ids=lambda value: value,
)
def test_linear_layers_in_vllms_quantised_kernels(scheme, mean_error, tmp_path):
    """Experts stay plain. W8A8 and FP8 round what goes into a layer too, so they cannot agree as well."""
    model = make_checkpoint(tmp_path / "plain", hidden_size=128, moe_intermediate_size=128)
    if scheme.startswith("script-"):
        arguments = ("--group-size", "32", "--keep", r"re:.*\.mlp\.experts\..*")
        meaning = quantize_by_script(model, tmp_path / "model", scheme.removeprefix("script-"), *arguments)
        model = tmp_path / "model"
    else:
        meaning = quantize(model, scheme, no_expert)
    wanted, _ = plain_answer(plain_copy(model, meaning, tmp_path / "meaning"), PROMPT)
    ((logprobs, _),) = run(generate, model, [PROMPT], dtype="bfloat16")
    assert (logprobs - wanted).abs().mean() <= mean_error


@pytest.mark.engine
@pytest.mark.parametrize(
    ("scheme", "options", "fragments"),
    [
        ("fp8", {}, ("no kernel for fp8 experts", '"dequantize": true')),
        ("w8a8", {}, ("no kernel for compressed-tensors experts", '"dequantize": true')),
        ("awq", {}, ("no kernel for", '"dequantize": true')),
        (None, {"quantization": "fp8"}, ("--quantization fp8", "leave it out")),
        (None, DEQUANTIZE, ("dequantize=true, but config.json has no quantization_config",)),
    ],
    ids=["fp8", "w8a8", "awq", "online", "nothing"],
)
def test_a_scheme_without_a_kernel_is_refused_with_the_way_out(scheme, options, fragments, tmp_path):
    model = make_checkpoint(tmp_path)
    if scheme:
        quantize(model, scheme)
    with pytest.raises(EngineError) as refusal:
        run(make_llm, model, **options)
    for fragment in fragments:
        assert fragment in refusal.value.message


# --- where experts land -------------------------------------------------------------------------------------------


def _loaded_experts(rank, ranks, init, model):
    """Expert parameters of the first MoE layer as the loader leaves them, before any kernel repacks them.

    vLLM finds no kernel for them on this machine, so it is spared the choice; nothing is computed.
    """
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, int_wna16
    from vllm.model_executor.layers.quantization import auto_gptq, moe_wna16  # noqa: F401
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors  # noqa: F401

    from vllm_bailing import settings

    settings._has_amx = lambda: True
    choices = {
        "select_fp8_moe_backend": fp8.Fp8MoeBackend.TRITON,
        "select_int8_moe_backend": int8.Int8MoeBackend.TRITON,
        "select_wna16_moe_backend": int_wna16.WNA16MoEBackend.TRITON,
    }
    stubs = {name: lambda *args, backend=backend, **kwargs: (backend, None) for name, backend in choices.items()}
    stubs["init_fp8_linear_kernel"] = lambda *args, **kwargs: SimpleNamespace(input_quant_key=lambda: None)
    stubs["check_moe_marlin_supports_config"] = lambda *args, **kwargs: True
    for module in list(sys.modules.values()):
        for name, stub in stubs.items():
            if name in getattr(module, "__dict__", {}):
                setattr(module, name, stub)
    module, _ = loaded_rank(rank, ranks, init, {"model": str(model), "tensor_parallel_size": ranks})
    experts = module.model.layers[1].mlp.experts.routed_experts
    found = {name: parameter.data for name, parameter in experts.named_parameters()}
    return {name: data.float() if data.is_floating_point() else data for name, data in found.items()}


@pytest.mark.engine
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", ["fp8", "fp8-tensor", "w8a8", "script-fp8", "script-w4a16", "gptq"])
def test_every_quantised_expert_lands_in_its_slice(scheme, ranks, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128, "moe_intermediate_size": 256}
    model = make_checkpoint(tmp_path / "model", num_experts=8, n_group=2, **sizes)
    if scheme.startswith("script-"):
        quantize_by_script(model, tmp_path / "out", scheme.removeprefix("script-"), "--group-size", "32")
        model = tmp_path / "out"
    else:
        quantize(model, scheme)
    stored = read_tensors(model)
    found = run_ranks(_loaded_experts, ranks, tmp_path, model)
    prefix = "model.layers.1.mlp.experts"
    leaves = {name.rpartition(".")[2] for name in stored if name.startswith(prefix)} - {"weight_shape", "g_idx"}
    transposed = scheme in ("gptq", "awq")  # inputs first
    for expert in range(8):
        for leaf in leaves:
            gate, up, down = (stored[f"{prefix}.{expert}.{name}_proj.{leaf}"] for name in ("gate", "up", "down"))
            for rank, parameters in enumerate(found):
                w13, w2 = parameters[f"w13_{leaf}"][expert], parameters[f"w2_{leaf}"][expert]
                if gate.dim() == 0:  # one scale for the whole tensor, on every rank
                    assert w13.tolist() == [gate.item(), up.item()] and w2.item() == down.item()
                    continue
                out, into = (1, 0) if transposed else (0, 1)
                halves = [part.chunk(ranks, out)[rank] for part in (gate, up)]
                part = down.chunk(ranks, into)[rank] if down.shape[into] > 1 else down
                if w13.shape != torch.cat(halves, out).shape:  # some of vLLM's kernels want inputs first
                    halves, part = [half.T for half in halves], part.T
                    out = 1 - out
                assert torch.equal(w13.float(), torch.cat(halves, out).float()), (expert, leaf, rank)
                assert torch.equal(w2.float(), part.float()), (expert, leaf, rank)


# --- the demo, quantised ------------------------------------------------------------------------------------------


def quantized_demo(scheme, folder):
    if scheme in SCHEMES:
        shutil.copytree(DEMO, folder)
        quantize(folder, scheme)
    else:
        quantize_by_script(DEMO, folder, scheme.removeprefix("script-"), "--group-size", "32")
    return folder


@pytest.fixture(scope="module")
def demo_answers():
    return run(answers, DEMO, 200, 0, dtype="bfloat16")[0]


@pytest.mark.engine
@pytest.mark.parametrize("scheme", [*(f"script-{one}" for one in ("fp8", "fp8-block", "w8a8", "w4a16")), *SCHEMES])
def test_the_quantised_demo_answers_like_the_plain_one(scheme, tmp_path, demo_answers):
    """Experts, MTP layer and all; what the plain checkpoint answers in bf16 is right in 97 of 100 cases."""
    model = quantized_demo(scheme, tmp_path / "demo")
    ids, counted = run(answers, model, 200, 1, dtype="bfloat16", **DEQUANTIZE)
    same = sum(one == other for one, other in zip(ids, demo_answers, strict=True))
    assert same >= 0.95 * len(ids), f"{same} of {len(ids)}"
    assert counted["accepted_tokens"] >= 0.9 * counted["drafts"]


@pytest.mark.engine
def test_a_quantised_draft_of_a_plain_target_is_dequantised_too(tmp_path):
    draft = quantized_demo("fp8", tmp_path / "draft")
    target = Path(shutil.copytree(DEMO, tmp_path / "target"))
    speculation = mtp(2, model=str(draft))
    with pytest.raises(EngineError) as refusal:
        run(answers, target, 25, speculation, dtype="bfloat16")
    assert '"dequantize": true' in refusal.value.message
    ids, counted = run(answers, target, 25, speculation, **DEQUANTIZE)
    assert ids == run(answers, target, 25, 0)[0]
    assert counted["accepted_tokens"] >= 0.8 * counted["drafts"]
