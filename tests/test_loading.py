"""What a rank of a pipeline reads from the files of a checkpoint, and loads."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
from checkpoints import make_checkpoint, quantize, read_tensors, write_tensors
from engine import run
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


def _read_by_rank(model, rank, ranks, init, overrides):
    """Bytes of the tensors that this rank took from the files, and names of the parameters it loaded."""
    import vllm_bailing

    vllm_bailing.register()
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.utils import initialize_model

    arguments = EngineArgs(
        str(model),
        dtype="bfloat16",
        enforce_eager=True,
        pipeline_parallel_size=ranks,
        skip_tokenizer_init=True,
        hf_overrides=overrides,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(ranks, rank, f"file://{init}", rank, "gloo")
        initialize_model_parallel(1, ranks)
        module = initialize_model(vllm_config=config, model_config=config.model_config)
        taken = []

        def counted(weights):
            for name, tensor in weights:
                taken.append(tensor.nbytes)
                yield name, tensor

        loader = DefaultModelLoader(config.load_config)
        names = module.load_weights(counted(loader.get_all_weights(config.model_config, module)))
    return sum(taken), sorted(names)


def read_by_ranks(model, ranks, **overrides):
    identity = {"VLLM_DIST_IDENT": uuid.uuid4().hex}
    with ThreadPoolExecutor() as pool:
        init = Path(model).parent / f"init-{ranks}-{len(overrides)}"
        jobs = [
            pool.submit(run, _read_by_rank, model, rank, ranks, init, overrides, env=identity, timeout=200)
            for rank in range(ranks)
        ]
        found = [job.result() for job in jobs]
    for file in Path("/dev/shm").glob(f"*{identity['VLLM_DIST_IDENT']}*"):
        file.unlink(missing_ok=True)
    return found


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
