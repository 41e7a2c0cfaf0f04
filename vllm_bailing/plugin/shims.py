"""Where vLLM's versions differ: one call for each difference, with when it can go. Nothing is changed in vLLM here.

Which versions are served is decided in `supported_versions.py`; the steps for a new one stand in CONTRIBUTING.md.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
from typing import Any

from packaging.version import InvalidVersion, Version


def protocol() -> Any:
    """vLLM's module with `DeltaMessage` and the other parts of an answer.

    Differs:  moved from the OpenAI server's folder in 0.29.
    Upstream: `vllm.entrypoints.generate.base.protocol`.
    Remove:   when the oldest supported version has it at the new place.
    """
    return _first_of("vllm.entrypoints.generate.base.protocol", "vllm.entrypoints.openai.engine.protocol")


def make_tool_call_id() -> str:
    """A fresh id for a tool call, as vLLM makes them.

    Differs:  moved to the renderers after 0.31.
    Upstream: `vllm.renderers.chat_utils.make_tool_call_id`.
    Remove:   when the oldest supported version has it there.
    """
    return _first_of("vllm.renderers.chat_utils", "vllm.entrypoints.chat_utils").make_tool_call_id()


def _first_of(*modules: str) -> Any:
    for module in modules[:-1]:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(module)
    return importlib.import_module(modules[-1])


def rope_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """`parameters` as this vLLM's `get_rope` reads them.

    Differs:  older vLLM ignores YaRN's `attention_factor`, `mscale` and `mscale_all_dim`; it takes the finished factor
              as `attn_factor` with `apply_yarn_scaling` off.
    Upstream: `YaRNScalingRotaryEmbedding.__init__`; takes the three keys in 0.30, not in 0.27.
    Remove:   when the oldest supported version takes them.
    """
    from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding

    known = inspect.signature(YaRNScalingRotaryEmbedding.__init__).parameters
    if parameters["rope_type"] != "yarn" or "attention_factor" in known:
        return parameters
    factor, attention_factor = parameters["factor"], parameters.get("attention_factor")
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all_dim:
        growth = math.log(factor)
        attention_factor = (0.1 * mscale * growth + 1) / (0.1 * mscale_all_dim * growth + 1)
    if attention_factor is None:
        return parameters
    return {**parameters, "attn_factor": attention_factor, "apply_yarn_scaling": False}


def portable_cpu_experts() -> Any:
    """vLLM's class of experts for CPUs without instructions of their own; None where it is of another kind.

    Differs:  experts for CPUs came as one function with the router in it, to which no kernel can be given.
    Upstream: `CPUUnquantizedExperts` is one of `FusedMoEExpertsModular` in 0.32, not in 0.27.
    Remove:   when the oldest supported version has it so, or when vLLM takes its AVX-512 bf16 kernels without AMX.
    """
    from vllm.model_executor.layers.fused_moe import modular_kernel

    try:
        module = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
        experts = module.CPUUnquantizedExperts
    except (ImportError, AttributeError):
        return None
    return experts if issubclass(experts, modular_kernel.FusedMoEExpertsModular) else None


@functools.cache  # vLLM's own: this package may put others into their places
def quantized_cpu_layers() -> tuple[dict[str, Any], dict[str, Any]] | None:
    """vLLM's classes of quantized experts and of quantized linear layers for x86 CPUs, by scheme.

    Differs:  there were none, or of another kind.
    Upstream: `CPUExpertsInt8`, `CPUExpertsFp8` and `CPUExpertsInt4` are of `FusedMoEExpertsModular` in 0.32.
    Remove:   when the oldest supported version has them, or when vLLM takes their kernels without AMX.
    """
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular

    try:
        module = importlib.import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
        linear = importlib.import_module("vllm.model_executor.kernels.linear")
        linears = {
            "int8": linear.CPUInt8ScaledMMLinearKernel,
            "fp8": linear.CPUFp8BlockScaledMMKernel,
            "int4": linear.CPUWNA16LinearKernel,
        }
        experts = {scheme: getattr(module, f"CPUExperts{scheme.capitalize()}") for scheme in ("int8", "fp8", "int4")}
    except (ImportError, AttributeError):
        return None
    return (experts, linears) if all(issubclass(one, FusedMoEExpertsModular) for one in experts.values()) else None


def takes_expert_map(experts: Any) -> bool:
    """Whether a class of experts, or None, is handed the map of expert parallelism together with the router's picks.

    Differs:  experts for CPUs came as one function with the router in it, into which nothing can be put between.
    Upstream: `CPUUnquantizedExperts` is one of `FusedMoEExpertsModular` in 0.32, not in 0.27.
    Remove:   when the oldest supported version has it so, or when its experts for CPUs heed the map.
    """
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExpertsModular

    return isinstance(experts, type) and issubclass(experts, FusedMoEExpertsModular)


def grouped_topk_for_cpus() -> Any:
    """vLLM's rule for the choice of experts on CPUs; None where a model cannot bring a function in its place.

    Differs:  experts for CPUs came as one function with the router in it.
    Upstream: `fused_moe.router.cpu_router._grouped_topk`, beside `CPURouter`, in 0.32, not in 0.31.
    Remove:   when the oldest supported version has it, or when it is one operation.
    """
    try:
        module = importlib.import_module("vllm.model_executor.layers.fused_moe.router.cpu_router")
    except ImportError:
        return None
    return getattr(module, "_grouped_topk", None)


def instructions_of_attention(layer: Any) -> str:
    """Those that vLLM's kernels for CPUs use for an attention layer, as it names them, once the KV cache is there.

    Differs:  the layer's implementation had them.
    Upstream: `CPUAttentionMetadataBuilder._set_isa_to_layers`, in 0.29, not in 0.28.
    Remove:   when the oldest supported version has it.
    """
    return layer.isa if hasattr(layer, "isa") else layer.impl.isa


def experts_of(routed_experts: Any) -> Any:
    """What computes the experts of a layer, an object of vLLM's class for them; None where there is none.

    Differs:  methods of older versions hold a function.
    Upstream: `FusedMoEKernel.fused_experts`, which a method for quantized experts has in 0.32.
    Remove:   when the oldest supported version has it.
    """
    return getattr(getattr(routed_experts.quant_method, "moe_kernel", None), "fused_experts", None)


def returns_routed_experts(vllm_config: Any) -> bool:
    """Whether answers tell which experts were picked, which vLLM's router notes.

    Differs:  the setting was one of the model's.
    Upstream: `VllmConfig.aux_output_config`, in 0.32.
    Remove:   when the oldest supported version has it.
    """
    settings = getattr(vllm_config, "aux_output_config", vllm_config.model_config)
    return bool(getattr(settings, "enable_return_routed_experts", False))


def knows_scales_of_modules() -> bool:
    """Whether this vLLM scales each module of an adapter by its own rank and alpha.

    Differs:  older vLLM ignores `rank_pattern` and `alpha_pattern`, and 0.27 `use_rslora` for routed experts.
    Upstream: `PEFTHelper.get_rank_and_scaling`, in 0.32, not in 0.31.
    Remove:   when the oldest supported version has it.
    """
    from vllm.lora.peft_helper import PEFTHelper

    return hasattr(PEFTHelper, "get_rank_and_scaling")


def takes_a_part_of_the_files() -> bool:
    """Whether a model's `allow_patterns_overrides` may leave out files that are in the checkpoint's index.

    Differs:  older vLLM ends with "Weight files referenced in index but missing", so that it has to read all.
    Upstream: `DefaultModelLoader._prepare_weights`, in 0.32, not in 0.31. Nothing but the version tells.
    Remove:   when the oldest supported version takes them.
    """
    from vllm import __version__

    try:
        return Version(__version__).release >= (0, 32)
    except InvalidVersion:  # of a build from a checkout without tags
        return False


# ---- what newer releases ask of a model; older ones do not ----------------------------------------------------------


def local_logits(logits_processor: Any, head: Any, hidden_states: Any) -> Any:
    """The logits [T, V / ranks] of this rank's rows of the head.

    Differs:  vLLM gathered logits on every way; nothing asked for less.
    Upstream: `LogitsProcessor.forward` with `skip_gather`, in 0.31, not in 0.28.
    Remove:   when the oldest supported version has it.
    """
    return logits_processor(head, hidden_states, skip_gather=True)


def skipping_padding() -> dict[str, bool]:
    """Argument of `FusedMoEFactory` for rows that only fill a CUDA graph: they are not sent to other ranks.

    Differs:  they were routed, sent and computed as all others; they are left out with DeepEP's second version alone.
    Upstream: `skip_padding` of `FusedMoEFactory`, in 0.33, not in 0.32.
    Remove:   when the oldest supported version has it.
    """
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    return {"skip_padding": True} if "skip_padding" in inspect.signature(FusedMoEFactory).parameters else {}


def spec_decode_needs_target_embed(vllm_config: Any) -> bool:
    """Whether a draft model on the last pipeline stage shares the target's embedding, which must be there then.

    Differs:  only the first stage had it, and such drafts ran on one stage.
    Upstream: `models.utils.spec_decode_needs_target_embed`, in 0.31, not in 0.28.
    Remove:   when the oldest supported version has it.
    """
    from vllm.model_executor.models import utils

    question = getattr(utils, "spec_decode_needs_target_embed", None)
    return question is not None and question(vllm_config)


def pack_aux_hidden_states(model: Any, states: list[Any]) -> dict[str, Any]:
    """What a pipeline stage gives the next one of the hidden states for EAGLE-3, by the names that vLLM knows.

    Differs:  EAGLE-3 ran on one stage.
    Upstream: `EagleModelMixin.pack_local_aux_hidden_states`, in 0.31, not in 0.28.
    Remove:   when the oldest supported version has it.
    """
    pack = getattr(model, "pack_local_aux_hidden_states", None)
    return {} if pack is None else pack(states)


def collect_aux_hidden_states(model: Any, intermediate_tensors: Any) -> list[Any]:
    """The hidden states for EAGLE-3 of the pipeline stages before this one.

    Differs:  EAGLE-3 ran on one stage.
    Upstream: `EagleModelMixin.collect_remote_aux_hidden_states`, in 0.31, not in 0.28.
    Remove:   when the oldest supported version has it.
    """
    collect = getattr(model, "collect_remote_aux_hidden_states", None)
    return [] if collect is None else collect(intermediate_tensors)
