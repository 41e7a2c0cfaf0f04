"""Everything that an engine imports, for the process that engines are forked from.

What is imported here is imported once; what is not, by every engine again, which takes longer than its work.
"""

import contextlib
import gc
import importlib
import logging
import os

import torch

# Inductor would otherwise start compiling processes as soon as it is imported.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

MODULES = """
    compressed_tensors.offload
    torch._dynamo.backends.distributed
    torch._dynamo.backends.registry
    torch._inductor.compile_fx
    torch._inductor.codegen.cpp
    torch._inductor.codegen.cpp_wrapper_cpu
    torch.distributed.tensor.experimental
    vllm
    vllm.compilation.backends
    vllm.distributed.elastic_ep.elastic_execute
    vllm.entrypoints.anthropic.protocol
    vllm.entrypoints.cli.main
    vllm.entrypoints.cli.serve
    vllm.entrypoints.launchers.cli_args
    vllm.entrypoints.llm
    vllm.lora.resolver
    vllm.lora.worker_manager
    vllm.lora.punica_wrapper.punica_cpu
    vllm.model_executor.layers.fused_moe.eep_reconfigure
    vllm.model_executor.layers.fused_moe.experts.cpu_moe
    vllm.model_executor.layers.fused_moe.oracle.int8
    vllm.model_executor.layers.fused_moe.oracle.mxfp8
    vllm.model_executor.layers.fused_moe.oracle.nvfp4
    vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors
    vllm.model_executor.layers.quantization.fp8
    vllm.model_executor.layers.quantization.auto_gptq
    vllm.model_executor.layers.quantization.moe_wna16
    vllm.model_executor.layers.quantization.online.base
    vllm.model_executor.models.config
    vllm.model_executor.models.llama_eagle3
    vllm.model_executor.warmup.kernel_warmup
    vllm.triton_utils.dispatcher
    vllm.utils.cpu_triton_utils
    vllm.v1.attention.backends.cpu_attn
    vllm.v1.core.sched.scheduler
    vllm.v1.engine.core
    vllm.v1.engine.llm_engine
    vllm.v1.executor.multiproc_executor
    vllm.v1.spec_decode.eagle
    vllm.v1.structured_output.backend_xgrammar
    vllm.v1.worker.cpu_model_runner
    vllm.v1.worker.cpu_worker
    vllm_bailing.model
    vllm_bailing.mtp
""".split()

for name in MODULES:
    with contextlib.suppress(ImportError):  # older vLLM has other modules
        importlib.import_module(name)
# Points all modules' references to Triton kernels at those of the CPU build, which is done once and for all.
with contextlib.suppress(AttributeError, TypeError):  # older vLLM has none, and its platforms answer None for that
    from vllm.platforms import current_platform

    current_platform.register_triton_kernel_overrides()
    type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)
# The first trace of a process prepares much that later ones share.
with contextlib.suppress(Exception):
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU())
    torch.compile(layer, backend="eager", fullgraph=True)(torch.zeros(1, 2))
    torch._dynamo.reset()
# vLLM compiles these little helpers, for ranks of log-probabilities and for a divided vocabulary: longer work than all
# else in an engine for a few prompts.
for module, name in (
    ("vllm.v1.sample.sampler", "batched_count_greater_than"),
    ("vllm.model_executor.layers.vocab_parallel_embedding", "get_masked_input_and_mask"),
):
    with contextlib.suppress(ImportError, AttributeError):
        holder = importlib.import_module(module)
        setattr(holder, name, getattr(holder, name)._torchdynamo_orig_callable)
# Engines of tests have small caches, and a cache is filled with zeros: VLLM_CPU_KVCACHE_SPACE, whole gigabytes, counts
# eighths here.
with contextlib.suppress(ImportError):
    from vllm.platforms import cpu

    cpu.GiB_bytes = 2**27
# Each engine sets up vLLM's logging, for which Python gives every logger below its level again, and walks through all
# loggers for each.
_set_level = logging.Logger.setLevel
logging.Logger.setLevel = lambda self, level: None if self.level == level else _set_level(self, level)
# Collections of garbage would walk through all of this in every engine, and again when one ends and vLLM takes back
# what it set aside.
gc.collect()
gc.freeze()
gc.unfreeze = lambda: None
