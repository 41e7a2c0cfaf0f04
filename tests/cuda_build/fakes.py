"""A model of vLLM's on tensors of GPUs that are not there: shapes, dtypes and strides are real, values are not.

torch's FakeTensorMode stands in for memory and kernels, its process groups of the kind "fake" for the other ranks.
`on_gpus` builds a model as vLLM's loader does, in a process whose torch takes the machine for one with GPUs
(`machine/`). What reads a value from a GPU cannot go on; the message then names fake tensors.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses import fake_impls, fake_tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.configs import CONFIGS

GPU = torch.device("cuda:0")
TOKENS = 37


# ---- torch, where it would look for a GPU ----------------------------------------------------------------------------


class Stream:
    """In place of a stream or an event: takes every call."""

    device, cuda_stream, stream_id, device_index, device_type = GPU, 0, 0, 0, 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


_tensor = torch.tensor


def _fake_tensor(data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    """`torch.tensor`, which does not ask FakeTensorMode before it looks for a GPU."""
    contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
    device = torch.device(device or (contexts[-1].device if contexts else "cpu"))
    made = _tensor(data, dtype=dtype, device="cpu")
    # Moving it would move its values, which torch keeps of what is made like this.
    return made if device.type == "cpu" else torch.empty(made.shape, dtype=made.dtype, device=device)


class _PlainImports(importlib.abc.MetaPathFinder):
    """Modules that are imported while a model is built make their constants on the CPU, and real ones."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname.partition(".")[0] in ("torch", "triton", "sympy"):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        except (ImportError, ValueError, AttributeError):
            return None
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return None
        run = spec.loader.exec_module  # pyright: ignore[reportOptionalMemberAccess]

        def exec_module(module: Any) -> None:
            with _disable_current_modes(), torch.device("cpu"):
                run(module)

        with contextlib.suppress(AttributeError):  # of built-in modules
            spec.loader.exec_module = exec_module  # pyright: ignore
        return spec


def pretend() -> None:
    """Change torch of this process for good."""
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = cuda.ExternalStream = Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("current_stream", "default_stream"):  # a function each, of which Dynamo keeps lists
        setattr(cuda, name, lambda *_: Stream())
    for name in ("set_stream", "set_rng_state", "set_rng_state_all"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8, device="cpu")
    cuda.get_rng_state_all = list
    cuda.is_current_stream_capturing = lambda: False
    accelerator: Any = torch.accelerator
    accelerator.is_available = lambda: False  # Dynamo alone asks, and would look for streams
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda *args: None
    torch.tensor = _fake_tensor
    modes: Any = fake_tensor
    modes.init_gpu_context = lambda *args: None  # it makes a tensor on the GPU
    sys.meta_path.insert(0, _PlainImports())


# ---- ranks -----------------------------------------------------------------------------------------------------------


class _Communicator:
    """Between GPUs: results have the right shapes."""

    def __init__(self, cpu_group: Any = None, device: Any = None, device_group: Any = None, *_: Any, **__: Any) -> None:
        self.world_size = dist.get_world_size(device_group) if device_group is not None else 1
        self.disabled, self.use_all2all = True, False
        self.all2all_manager = SimpleNamespace(world_size=self.world_size, rank=0)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat([x] * self.world_size, dim=dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return x.chunk(self.world_size, dim=dim)[0].clone()

    def gather(self, x: torch.Tensor, dst: int = 0, dim: int = -1) -> torch.Tensor:
        return self.all_gather(x, dim)


def _agree(everyone: list[Any], mine: Any, group: Any = None) -> None:
    everyone[:] = [mine] * len(everyone)


def start_ranks(tensor_parallel: int, pipeline_parallel: int, data_parallel: int) -> None:
    """Process groups in which this is the first rank, and the others do not exist; once in a process."""
    if dist.is_initialized():
        return
    import vllm.distributed.parallel_state as state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world, new_group = tensor_parallel * pipeline_parallel, dist.new_group
    dist.init_process_group(backend="fake", store=FakeStore(), rank=0, world_size=world * data_parallel)
    dist.new_group = lambda ranks=None, *args, **kwargs: new_group(ranks, backend="fake")
    dist.monitored_barrier, dist.all_gather_object = lambda *_, **__: None, _agree
    state.in_the_same_node_as = lambda group, source_rank=0: [True] * dist.get_world_size(group)
    devices = "vllm.distributed.device_communicators"
    mock.patch(f"{devices}.cuda_communicator.CudaCommunicator", _Communicator).start()
    mock.patch(f"{devices}.shm_broadcast.MessageQueue.create_from_process_group", lambda *args, **kwargs: None).start()
    state.init_distributed_environment(world, 0, "env://", 0, "nccl")
    state.ensure_model_parallel_initialized(tensor_parallel, pipeline_parallel)


@contextlib.contextmanager
def _unset_scales() -> Iterator[None]:
    """Numbers that are read from fake tensors are -1, as scales that a checkpoint lacks; nothing compares as true."""
    read = torch.ops.aten._local_scalar_dense.default

    def unset(mode: Any, func: Any, tensor: torch.Tensor) -> Any:
        return -1.0 if tensor.dtype.is_floating_point else tensor.dtype != torch.bool and -1

    with mock.patch.dict(fake_impls.op_implementations_dict, {read: unset}):
        yield


# ---- models ----------------------------------------------------------------------------------------------------------


def folder(name: str, **changes: Any) -> Path:
    """A folder with the config.json of a published checkpoint, changed, and nothing else."""
    text = json.dumps({**json.loads((CONFIGS / f"{name}.json").read_text()), **changes})
    target = Path(os.environ["REHEARSAL_SCRATCH"]) / f"{name}-{hash(text) & 0xFFFFFFFF:08x}"
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(text)
    return target


def engine_config(name: str, changes: dict[str, Any] | None = None, **options: Any) -> Any:
    """The whole configuration of an engine for a published checkpoint, cut to few layers unless `changes` say more."""
    from vllm.engine.arg_utils import EngineArgs

    model = folder(name, **{"num_hidden_layers": 3, **(changes or {})})
    defaults = {"skip_tokenizer_init": True, "load_format": "dummy"}
    return EngineArgs(**{"model": str(model), **defaults, **options}).create_engine_config()


@contextlib.contextmanager
def on_gpus(vllm_config: Any, is_processed: bool = True) -> Iterator[SimpleNamespace]:
    """The model of `vllm_config` on the first rank: `.model`, and `.mode` for what runs on it."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    from vllm_bailing.plugin.kernels import qk_norm_rope

    current_platform.import_kernels()
    mock.patch.object(qk_norm_rope, "_difference", lambda *args: "").start()  # it compares values
    experts = "vllm.model_executor.layers.fused_moe.expert_map_manager.ExpertMapManager"
    mock.patch(f"{experts}.get_compressed_map_string", lambda self: "").start()  # for the log, by values
    scales = "vllm.model_executor.layers.quantization.utils.fp8_utils.transform_sf_into_required_layout"
    mock.patch(scales, lambda sf=None, *_, **__: sf).start()  # DeepGEMM's kernel, which has no stand-in
    parallel = vllm_config.parallel_config
    dtype = vllm_config.model_config.dtype
    mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    with set_current_vllm_config(vllm_config):
        start_ranks(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size)
        with mode, set_default_torch_dtype(dtype), GPU:
            model = initialize_model(vllm_config=vllm_config)
            if is_processed:
                # Inductor would compute constants on the GPU.
                with torch.compiler.set_stance("force_eager"), _unset_scales():
                    process_weights_after_loading(model, vllm_config.model_config, GPU)
        yield SimpleNamespace(model=model, mode=mode, vllm_config=vllm_config)


def forward(built: SimpleNamespace, model: Any = None, **extra: tuple[int, ...]) -> Any:
    """Hidden states of `TOKENS` tokens; `extra` has the shapes of further inputs."""
    from vllm.forward_context import set_forward_context

    model = model or built.model
    dtype = built.vllm_config.model_config.dtype
    ranks = built.vllm_config.parallel_config.data_parallel_size
    tokens = {"num_tokens": TOKENS, "num_tokens_across_dp": torch.full((ranks,), TOKENS) if ranks > 1 else None}
    with (
        set_forward_context(None, built.vllm_config, **tokens),  # with real numbers, which it reads
        built.mode,
        torch.inference_mode(),
        GPU,
    ):
        inputs: dict[str, Any] = {name: torch.zeros(*shape, dtype=dtype) for name, shape in extra.items()}
        ids, positions = torch.zeros(TOKENS, dtype=torch.int32), torch.arange(TOKENS, dtype=torch.int64)
        return model(input_ids=ids, positions=positions, **inputs)


def draft(built: SimpleNamespace) -> Any:
    """The draft model, as vLLM's second model runner loads it and shares the target's parts with it."""
    from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.worker.gpu.spec_decode.eagle import utils

    def get_model(vllm_config: Any, model_config: Any) -> Any:
        model = initialize_model(vllm_config=vllm_config, model_config=model_config)
        process_weights_after_loading(model, model_config, GPU)
        return model

    dtype = built.vllm_config.model_config.dtype
    with built.mode, set_default_torch_dtype(dtype), GPU, mock.patch.object(utils, "get_model", get_model):
        return utils.load_eagle_model(built.model, built.vllm_config)
