"""What is refused before an engine starts: flags, quantization schemes, and files that do not fit the configuration."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.checkpoint_audit import Audit
from vllm_bailing.dequantize import Dequantizer
from vllm_bailing.draft_target import other_target
from vllm_bailing.errors import DEQUANTIZE, SettingsError, shown
from vllm_bailing.plugin.lora import refuse_misfit, settle_lora_targets
from vllm_bailing.plugin.nodes import watch_for_nodes
from vllm_bailing.plugin.options import (
    DRAFT_VOCABULARY,
    SEQUENCE_PARALLEL,
    check_switches,
    draft_vocabulary,
    keeps_sequence_parallel,
)
from vllm_bailing.plugin.patches import check_adapters_up_front
from vllm_bailing.plugin.shims import portable_cpu_experts
from vllm_bailing.plugin.speculation import draft_source, has_mtp_draft
from vllm_bailing.tensor_names import HEAD, SCORE, main_tensors
from vllm_bailing.units import GIB, dtype_name
from vllm_bailing.validation import require_token_ids

if TYPE_CHECKING:
    from prometheus_client import Gauge

_ONLINE_ON_CPU = ("int8_per_channel_weight_only", "fp8_per_block")
_SAFETENSORS_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")


def settle_engine_config(vllm_config: Any) -> None:
    """Fill in what the user left open, and refuse what cannot run; vLLM calls this when its settings are complete.

    Raises:
        SettingsError: If a flag asks for what this machine or model cannot do, or a stop token does not exist.
        AdapterError: If `--lora-target-modules` names what cannot be adapted.
        CheckpointError: If the files do not fit the configuration.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    speculation = vllm_config.speculative_config
    if vllm_config.lora_config is not None:
        settle_lora_targets(vllm_config, on_cpu, has_mtp_draft(speculation))
        check_adapters_up_front(refuse_misfit)
    if on_cpu:
        _check_ranks_on_cpu(vllm_config)
    check_switches(vllm_config)
    check_sequence_parallel(vllm_config)
    publish_version(vllm_config)
    check_quantization(vllm_config)
    settle_experts(vllm_config)
    check_stop_tokens(vllm_config.model_config)
    _check_draft_head(vllm_config)
    check_files(vllm_config)
    warn_of_another_target(vllm_config)
    _watch_for_nodes(vllm_config.parallel_config)


def _watch_for_nodes(parallel_config: Any) -> None:
    nodes = getattr(parallel_config, "nnodes", 1)  # no flag of the oldest versions
    if nodes > 1:
        ranks = parallel_config.world_size * parallel_config.data_parallel_size // nodes
        address = (parallel_config.master_addr, parallel_config.master_port)
        watch_for_nodes(nodes, parallel_config.node_rank, ranks, *address)


def publish_version(vllm_config: Any) -> None:
    """Let `/metrics` say that this package serves, which version, and what drafts: `bailing_plugin_info`."""
    from vllm_bailing import __version__

    info = _info()
    info.clear()  # of an engine before this one
    info.labels(version=__version__, drafts=draft_source(vllm_config)).set(1)


@functools.cache
def _info() -> Gauge:
    from prometheus_client import Gauge

    # vLLM forgets metrics with its name in theirs when it makes its own.
    words = "The vllm-bailing that serves, and what drafts"
    return Gauge("bailing_plugin_info", words, ["version", "drafts"], multiprocess_mode="mostrecent")


def _check_ranks_on_cpu(vllm_config: Any) -> None:
    """Refuse ways of dividing a model with which vLLM's CPU build starts, and fails at the first request."""
    parallel_config, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    stages = parallel_config.pipeline_parallel_size
    if stages > 1 and speculation is not None and speculation.use_eagle():
        raise SettingsError(
            f"speculation by {speculation.method!r} with {stages} pipeline stages: the model runner of vLLM's CPU "
            "build looks for the draft model in every stage, and only the last has it; use --tensor-parallel-size, or "
            "leave --speculative-config out"
        )
    if stages > 1 and vllm_config.model_config.enforce_eager:
        raise SettingsError(
            f"--pipeline-parallel-size {stages} with --enforce-eager: the worker of vLLM's CPU build prepares what a "
            "stage passes on only while it compiles; leave --enforce-eager out, or use --tensor-parallel-size"
        )
    if parallel_config.enable_expert_parallel and portable_cpu_experts() is None:
        raise SettingsError(
            "--enable-expert-parallel: experts of this vLLM's CPU build do not know which of them a rank holds; leave "
            "it out, and --tensor-parallel-size divides every expert; or use vLLM 0.32"
        )


def check_sequence_parallel(vllm_config: Any) -> None:
    """Refuse to keep hidden states divided by tokens where nothing divides them.

    Raises:
        SettingsError: Naming what is missing.
    """
    if not keeps_sequence_parallel(vllm_config):
        return
    obstacle = ""
    if not vllm_config.parallel_config.use_sequence_parallel_moe:
        obstacle = (
            "tokens are divided between ranks only by --enable-expert-parallel with both --tensor-parallel-size and "
            "--data-parallel-size above 1, and an --all2all-backend that takes them so"
        )
    elif vllm_config.model_config.hf_config.use_bias:
        obstacle = "with use_bias in config.json every rank would add the bias of the attention's output"
    if obstacle:
        raise SettingsError(f"{SEQUENCE_PARALLEL}=true in --additional-config: {obstacle}; leave it out")


def check_quantization(vllm_config: Any) -> None:
    """Refuse schemes that this machine has no kernel for; say what `dequantize` costs where it is asked for.

    Raises:
        SettingsError: Naming the scheme and what to do.
        CheckpointError: If `dequantize` does not know the scheme.
    """
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    model_config, speculation = vllm_config.model_config, vllm_config.speculative_config
    config = model_config.hf_config
    checkpoint = Checkpoint.of(model_config).published(config)
    stored = config.stored_quantization_config
    draft = speculation.draft_model_config.hf_config if has_mtp_draft(speculation) else config
    if config.dequantize and stored is None and draft.stored_quantization_config is None:
        raise SettingsError(
            "dequantize=true, but config.json has no quantization_config: nothing to dequantize; leave it out"
        )
    if stored is not None:
        Dequantizer(stored, model_config.dtype)
        elements = sum(math.prod(shape) for shape in main_tensors(config).values())
        init_logger("vllm.plugins.bailing").warning(
            "dequantize: the checkpoint's %s weights become %s while they load: %.1f GiB over all ranks instead of "
            "%.1f, a slower load, and no quantized kernels",
            stored.get("quant_method"),
            dtype_name(model_config.dtype),
            elements * model_config.dtype.itemsize / GIB,
            checkpoint.size / GIB,
        )
    elif model_config.quantization is not None and current_platform.is_cpu() and not _has_amx():
        _check_quantization_on_cpu(vllm_config, checkpoint)


def _check_quantization_on_cpu(vllm_config: Any, checkpoint: Any) -> None:
    """Refuse what no processor without AMX has a kernel for, or this one not."""
    from vllm_bailing.plugin.kernels.cpu_quantized import layout_problem, obstacle

    model_config, missing = vllm_config.model_config, obstacle(vllm_config)
    scheme = model_config.quantization
    quantization = getattr(model_config.hf_config, "quantization_config", None)
    if quantization is None:
        if missing:
            raise SettingsError(
                f"--quantization {scheme}: vLLM's CPU build cannot quantize experts on this processor ({missing}); "
                "leave it out"
            )
        if scheme not in (*_ONLINE_ON_CPU, "online"):  # of that vLLM asks the classes of layers
            raise SettingsError(
                f"--quantization {scheme}: vLLM's CPU build quantizes experts while they load with "
                f"{' or '.join(_ONLINE_ON_CPU)} alone; ask for one of them, or leave it out"
            )
        return
    if missing and (checkpoint.has_quantized_experts or scheme == "fp8"):
        raise SettingsError(
            f"vLLM's CPU build has no kernel for {scheme} experts on this processor ({missing}); {DEQUANTIZE}"
        )
    if checkpoint.has_quantized_experts and (problem := layout_problem(quantization)):
        raise SettingsError(f"vLLM's CPU build has no int4 kernel for these experts ({problem}); {DEQUANTIZE}")
    if checkpoint.has_integers and missing and _lacks_avx512():
        raise SettingsError(
            f"vLLM's CPU build has no kernel for {scheme} layers of integers on this processor ({missing}); "
            f"{DEQUANTIZE}"
        )


def warn_of_another_target(vllm_config: Any) -> None:
    """Say so in one line if the MTP draft was trained for another target; only its speed depends on that."""
    from vllm.logger import init_logger

    speculation, folder = vllm_config.speculative_config, Checkpoint.of(vllm_config.model_config).folder
    # What is not on this machine yet is fetched after this; then only names are known, which say nothing.
    if not has_mtp_draft(speculation) or folder is None or speculation.model == vllm_config.model_config.model:
        return
    if said := other_target(speculation.draft_model_config.hf_config, folder):
        init_logger("vllm.plugins.bailing").warning("%s", said)


def settle_experts(vllm_config: Any) -> None:
    """Ask for Triton's experts where vLLM would pick TensorRT-LLM's for fp16 weights, which those do not take.

    That is on data-center GPUs of the Blackwell generation (`TrtLlmBf16Experts`): without this, vLLM ends while it
    loads.
    """
    import torch
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    model_config, kernels = vllm_config.model_config, vllm_config.kernel_config
    if (
        current_platform.is_cuda()
        and current_platform.is_device_capability_family(100)
        and model_config.dtype == torch.float16
        and model_config.quantization is None
        and kernels.moe_backend == "auto"
    ):
        kernels.moe_backend = "triton"
        init_logger("vllm.plugins.bailing").warning(
            "--dtype float16: experts run in Triton, since the kernels that vLLM would pick on this GPU take bfloat16 "
            "alone; leave --dtype out, or say bfloat16, to have those"
        )


def check_stop_tokens(model_config: Any) -> None:
    """Refuse stop tokens outside the vocabulary: the first request with `min_tokens` would end the engine.

    Raises:
        SettingsError: Naming the file and the tokens, or what transformers makes of the file.
    """
    name, remedy = (
        f"generation_config.json of {model_config.model}",
        "or pass --generation-config vllm to go without it",
    )
    file = Path(model_config.model, "generation_config.json")
    if file.exists() and not file.is_file():
        raise SettingsError(f"{name} is no file; fetch it again, {remedy}")
    try:
        values = model_config.try_get_generation_config() or {}
    except Exception as error:  # of any type, from wherever transformers stumbles
        raise SettingsError(
            f"{name} cannot be read ({type(error).__name__}: {shown(error)}); correct it, {remedy}"
        ) from None
    try:
        require_token_ids("eos_token_id", values.get("eos_token_id"), model_config.get_vocab_size())
    except ValueError as error:
        raise SettingsError(f"{name}: {error}") from None


def _has_amx() -> bool:
    import torch

    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _lacks_avx512() -> bool:
    """Whether this is an x86 processor for which vLLM's build leaves its kernels for integers out."""
    import torch
    from vllm.platforms import CpuArchEnum, current_platform

    is_x86 = current_platform.get_cpu_architecture() == CpuArchEnum.X86
    return is_x86 and not torch.cpu._is_avx512_supported()


@contextlib.contextmanager
def adding_the_remedy(vllm_config: Any) -> Iterator[None]:
    """Append the remedy to errors that vLLM raises while it builds quantized layers."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if vllm_config.quant_config is None:
            raise
        reason = shown(error, longest=1000).rstrip(".")
        is_cut = vllm_config.parallel_config.tensor_parallel_size > 1 and "divisible" in reason  # as vLLM puts it
        way = "start with a smaller --tensor-parallel-size; or " if is_cut else ""
        is_stored = getattr(vllm_config.model_config.hf_config, "quantization_config", None) is not None
        remedy = DEQUANTIZE if is_stored else "leave --quantization out"
        raise SettingsError(f"{vllm_config.model_config.quantization}: {reason}; {way}{remedy}") from error


def _check_draft_head(vllm_config: Any) -> None:
    has_vocabulary = draft_vocabulary(vllm_config)
    quantization = getattr(vllm_config.speculative_config, "draft_lm_head_quantization", None)
    asked = f"draft_lm_head_quantization={quantization!r} in --speculative-config"
    if has_vocabulary and not has_mtp_draft(vllm_config.speculative_config):
        raise SettingsError(
            f"{DRAFT_VOCABULARY} in --additional-config is for MTP drafts; add --speculative-config "
            '\'{"method": "mtp", "num_speculative_tokens": 1}\' or leave it out'
        )
    if has_vocabulary and quantization is not None:
        raise SettingsError(
            f"{DRAFT_VOCABULARY} in --additional-config and {asked}: vLLM would quantize a head that the draft does "
            "not use then; leave one of them out"
        )
    model_config = vllm_config.model_config
    if (has_vocabulary or quantization is not None) and _has_quantized_head(model_config):
        what = f"{DRAFT_VOCABULARY} in --additional-config takes rows" if has_vocabulary else f"{asked} makes a copy"
        raise SettingsError(f"{what} of the head, and that of {model_config.model} is quantized; leave it out")


def _has_quantized_head(model_config: Any) -> bool:
    config = model_config.hf_config
    return not config.stored_quantization_config and Checkpoint.of(model_config).published(config).has_scales("lm_head")


def check_files(vllm_config: Any) -> None:
    """Compare the headers of the checkpoint's files with the configuration.

    So a wrong file is found in a second and not after minutes of loading. Files that are not on this machine yet are
    checked while they are loaded.

    Raises:
        CheckpointError: If files are damaged, or tensors missing, unexpected or of another shape.
    """
    if vllm_config.load_config.load_format not in _SAFETENSORS_FORMATS:
        return
    target, speculation = vllm_config.model_config, vllm_config.speculative_config
    may_lack_experts = vllm_config.parallel_config.enable_expert_parallel
    _check_files_of(target, functools.partial(Audit.of_target, head=_head_of(target)), may_lack_experts)
    if has_mtp_draft(speculation):
        _check_files_of(speculation.draft_model_config, Audit.of_draft, may_lack_experts)


def _head_of(model_config: Any) -> str:
    """The head that a vLLM `ModelConfig` asks for, as `tensor_names.main_tensors` takes it."""
    if model_config.runner_type != "pooling":
        return HEAD
    if model_config.convert_type != "classify":
        return ""
    config = model_config.hf_config  # vLLM makes the classifier of some rerankers from the head, as these keys say
    is_made = getattr(config, "classifier_from_token", None) or getattr(config, "method", None)
    return HEAD if is_made else SCORE


def _check_files_of(model_config: Any, audit_of: Callable[..., Audit], may_lack_experts: bool) -> None:
    config = model_config.hf_config
    checkpoint = Checkpoint.of(model_config).published(config)
    if not checkpoint.tensors and not checkpoint.damage:
        return  # not fetched yet: checked while it loads
    is_quantized = model_config.quantization is not None or config.stored_quantization_config is not None
    audit = audit_of(config, quantized=is_quantized, folder=model_config.model, may_lack_experts=may_lack_experts)
    audit.check(checkpoint)
