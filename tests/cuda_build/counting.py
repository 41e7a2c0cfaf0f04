"""What a step of decoding launches on a GPU, counted where none is.

Of what torch.compile makes, the calls in Inductor's generated code. Of what stays one operation for it, the experts,
the operations and Triton kernels that the layer calls for so many tokens. Names are those of the operations; how many
kernels each launches is said in `scripts/dev/gpu_expectations.py`.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_build import fakes

# Calls in generated code: kernels that Inductor wrote, libraries' products, operations.
_CALLS = re.compile(
    r"\b(triton_\w+?)(?:_\d+)?\.run\(|\bextern_kernels\.(\w+)\(|\btorch\.ops\.([\w.]+?)(?:\.default)?\("
)


class _Stop(Exception):
    pass


def generated(graph: Any, inputs: Any, vllm_config: Any) -> Counter[str]:
    """Calls in the code that Inductor generates for `graph` after vLLM's passes."""
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.config.utils import Range

    manager, code = PostGradPassManager(), []
    manager.configure(vllm_config)

    def stop(self: Any) -> None:
        code.append(self.codegen()[0].value)
        raise _Stop

    settings = {"enable_auto_functionalized_v2": False, "force_disable_caches": True, "compile_threads": 1}
    settings |= {"joint_graph_constant_folding": False}  # it makes tensors
    with (
        pass_context(Range(1, 2048)),
        config.patch(post_grad_custom_post_pass=manager, **settings),
        mock.patch.object(GraphLowering, "_compile_to_module", stop),
        mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: ""),  # it asks the driver
    ):
        try:
            compile_fx.compile_fx(graph, inputs)
        except Exception:
            if not code:
                raise
    (text,) = code
    body = text[text.index("def call(") :]
    found = _CALLS.findall(body)
    return Counter("triton" if written else product or operation for written, product, operation in found)


class _Log(TorchDispatchMode):
    """Counts operations that compute; views and allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removesuffix(".default")
        if not func.is_view and not re.match(r"aten\.(new_)?empty|aten\._unsafe_view|aten\.detach|prim", name):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


# Functions that launch what no operation of torch stands for, and what they give.
_LIBRARIES: dict[str, Callable[..., torch.Tensor]] = {
    "vllm.model_executor.kernels.linear.cute_dsl.ll_bf16.ll_bf16_gemm": lambda x, weight: _product(x, weight),
    "vllm.model_executor.kernels.linear.cute_dsl.ll_fp32w.ll_fp32w_gemm": lambda x, weight: _product(x, weight),
    "flashinfer.fused_moe.trtllm_bf16_moe": lambda hidden_states, **_: torch.empty_like(hidden_states),
    "flashinfer.fused_moe.trtllm_fp8_block_scale_moe": lambda hidden_states, **_: torch.empty_like(
        hidden_states, dtype=torch.bfloat16
    ),
}


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(x), len(weight), dtype=torch.float32)


@contextlib.contextmanager
def logged() -> Iterator[Counter[str]]:
    """The operations, Triton kernels and calls of other libraries that run inside, by name."""
    from triton.runtime.jit import JITFunction

    log = _Log()

    def launch(self: Any, *_: Any, **__: Any) -> None:
        log.calls[f"triton.{self.__name__}"] += 1

    def noted(name: str, result: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            log.calls[name] += 1
            return result(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for path, result in _LIBRARIES.items():
            with contextlib.suppress(ImportError, AttributeError):  # not in every release
                stack.enter_context(mock.patch(path, noted(path.rpartition(".")[2], result)))
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        stack.enter_context(log)
        yield log.calls


@contextlib.contextmanager
def routed() -> Iterator[set[str]]:
    """What the kernels of experts that are called inside get of the router, such as "float32 weights"."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel

    seen: set[str] = set()

    def noting(call: Callable[..., Any], argument: str) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(call).bind(*args, **kwargs).arguments[argument]
            seen.add(f"{str(given.dtype).removeprefix('torch.')} {argument.partition('_')[2]}")
            return call(*args, **kwargs)

        return noted

    with (
        mock.patch.object(FusedMoEKernel, "apply", noting(FusedMoEKernel.apply, "topk_weights")),
        mock.patch.object(FusedMoEKernel, "apply_monolithic", noting(FusedMoEKernel.apply_monolithic, "router_logits")),
    ):
        yield seen


def inside_experts(built: Any, layer: Any, tokens: int) -> Counter[str]:
    """What the runner of `layer` calls for so many tokens, shared experts and the router included if it holds them."""
    from vllm.forward_context import set_forward_context
    from vllm.utils import torch_utils
    from vllm.v1.worker.workspace import init_workspace_manager

    torch_utils._current_stream_tls.value = fakes.Stream()
    init_workspace_manager(fakes.GPU)
    hidden_size = built.vllm_config.model_config.hf_config.hidden_size
    runner = layer.mlp.experts
    with (
        built.mode,
        torch.inference_mode(),
        set_forward_context(None, built.vllm_config, num_tokens=tokens),
        fakes.GPU,
    ):
        hidden = torch.zeros(tokens, hidden_size, dtype=built.vllm_config.model_config.dtype)
        logits = torch.zeros(tokens, built.vllm_config.model_config.hf_config.num_experts, dtype=hidden.dtype)
        with logged() as calls:
            runner._forward_impl(hidden, logits, hidden)
    return calls
