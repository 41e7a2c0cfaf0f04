"""Files that an engine reads, and those that it refuses."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version

from tests.support.checkpoints import (
    GATE,
    PROMPT,
    make_checkpoint,
    read_tensors,
    with_a_tensor_transposed,
    without_its_end,
    write_tensors,
)
from tests.support.configs import change_config
from tests.support.engine import EngineError, generate, loaded_rank, run, run_ranks
from tests.support.quantized import quantize
from tests.support.versions import INSTALLED

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 128,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 8,
    "max_position_embeddings": 256,
    "first_k_dense_replace": 0,
}


def _read_by_rank(rank, ranks, init, model, overrides):
    """Bytes of the tensors that this rank took from the files, and names of the parameters it loaded."""
    taken = []

    def counted(weights):
        for name, tensor in weights:
            taken.append(tensor.nbytes)
            yield name, tensor

    options = {"model": str(model), "pipeline_parallel_size": ranks, "hf_overrides": overrides}
    _, names = loaded_rank(rank, ranks, init, options, counted)
    return sum(taken), sorted(names)


def read_by_ranks(model, ranks, **overrides):
    return run_ranks(_read_by_rank, ranks, model.parent, model, overrides)


@pytest.mark.parametrize("scheme", [None, "fp8"])
def test_a_pipeline_stage_reads_its_own_files_only(scheme, tmp_path):
    model = make_checkpoint(tmp_path / "model", **SIZES, num_nextn_predict_layers=1)
    overrides = {}
    if scheme:
        quantize(model, scheme)
        overrides["dequantize"] = True
    tensors = read_tensors(model)
    # As published: each file a run of layers.
    write_tensors(model, dict(sorted(tensors.items())), shards=36, interleaved=False)
    size = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.8." not in name)
    ((whole, names),) = read_by_ranks(model, 1, **overrides)
    assert whole >= size
    (first, first_names), (second, second_names) = read_by_ranks(model, 2, **overrides)
    assert sorted(first_names + second_names) == names
    if Version("0.32") <= INSTALLED:  # older ones open every file
        assert whole < 1.1 * size  # MTP layers without speculation are not read either
        assert 0.45 * size < first < 0.65 * size and 0.45 * size < second < 0.65 * size


def lose_shard(model):
    write_tensors(model, read_tensors(model), shards=4)
    (model / "model-00003-of-00004.safetensors").unlink()


def rename(model):
    tensors = read_tensors(model)
    tensors["model.layers.1.mlp.expert.5.gate_proj.weight"] = tensors.pop(GATE)
    write_tensors(model, tensors)


def add(model):
    write_tensors(model, {**read_tensors(model), "model.layers.0.attention.dense.bias": torch.zeros(64)})


def drop_expert_part(model):
    tensors = read_tensors(model)
    del tensors[GATE]
    write_tensors(model, tensors)


def nan_in_config(model):
    change_config(model, rms_norm_eps=float("nan"))


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (without_its_end, "model.safetensors is cut off or damaged ("),
        (lose_shard, "first model-00003-of-00004.safetensors; fetch them"),
        (rename, "model.layers.1.mlp.expert.5.gate_proj.weight should be called " + GATE),
        (with_a_tensor_transposed, "is [64, 32], config.json asks for [32, 64]"),
        (add, "1 unexpected (model.layers.0.attention.dense.bias)"),
        (drop_expert_part, f"1 missing ({GATE})"),
        (nan_in_config, "rms_norm_eps=nan must be a finite number above 0"),
    ],
)
def test_the_engine_refuses_a_damaged_checkpoint_and_says_why(damage, fragment, tmp_path):
    model = make_checkpoint(tmp_path)
    damage(model)
    with pytest.raises(EngineError) as refusal:
        run(generate, model, [PROMPT], max_tokens=1)
    assert fragment in refusal.value.message
