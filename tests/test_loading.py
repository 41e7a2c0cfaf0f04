"""What a rank of a pipeline reads from the files of a checkpoint, and loads."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from checkpoints import make_checkpoint, quantize, read_tensors, write_tensors
from engine import loaded_rank, run_ranks
from packaging.version import Version

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


@pytest.mark.engine
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
    if Version(version("vllm")) >= Version("0.32"):  # older ones open every file
        assert whole < 1.1 * size  # MTP layers without speculation are not read either
        assert 0.45 * size < first < 0.65 * size and 0.45 * size < second < 0.65 * size
