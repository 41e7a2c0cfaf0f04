"""What this package adds to vLLM's settings: MTP drafts, and a look at the checkpoint's files before anything starts.

Everything here leaves settings that name no BailingMoeV2 model exactly as they are.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_bailing.config import BailingMoeV2Config, is_bailing_moe_v2
from vllm_bailing.dequantize import Dequantizer
from vllm_bailing.lora import choose_targets
from vllm_bailing.weights import NAME_ANOTHER_DRAFT, Audit, Checkpoint, CheckpointError, main_tensors, mtp_tensors

MTP_ARCHITECTURE = "BailingMoeV2MTPModel"
# vLLM takes a draft for an MTP layer by its model type, and its list of types is closed. This one has no meaning beyond
# that list and the converter that counts the layers of a draft, which fits.
MTP_MODEL_TYPE = "glm4_moe_mtp"
# Keys of --additional-config.
DRAFT_VOCABULARY = "bailing_draft_vocab"
FP32_ROUTER = "bailing_fp32_router"
FUSED_QK_NORM_ROPE = "bailing_fused_qk_norm_rope"
CPU_KERNELS = "bailing_cpu_kernels"
TABLE_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"  # vLLM looks for tables of the fused experts there, then among its own
TABLES = Path(__file__).parent / "tables"  # this package's, made by `vllm-bailing tune`; missing if there are none
_SAFETENSORS_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")

# The SpeculativeConfig that is being made, while its draft's configuration is read.
_in_the_making: contextvars.ContextVar[Any] = contextvars.ContextVar("_in_the_making", default=None)
_original: dict[str, Any] = {}


def install() -> None:
    """Put the hooks of this file into vLLM. Safe to call again."""
    from vllm.config.speculative import SpeculativeConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.platforms import current_platform

    if _original:
        return
    _original.update(hf_config_override=SpeculativeConfig.hf_config_override, post_init=SpeculativeConfig.__post_init__)
    SpeculativeConfig.hf_config_override = staticmethod(hf_config_override)
    SpeculativeConfig.__post_init__ = _post_init

    class BailingMoeV2Settings(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            speculation = vllm_config.speculative_config
            if vllm_config.lora_config is not None:
                choose_targets(vllm_config.lora_config, current_platform.is_cpu(), has_mtp_draft(speculation))
            stages = vllm_config.parallel_config.pipeline_parallel_size
            if current_platform.is_cpu() and stages > 1 and speculation is not None and speculation.use_eagle():
                raise SettingsError(
                    f"speculation by {speculation.method!r} with {stages} pipeline stages: the model runner of vLLM's "
                    "CPU build looks for the draft model in every stage, and only the last has it; use "
                    "--tensor-parallel-size, or leave --speculative-config out"
                )
            keeps_fp32_router(vllm_config)
            wants_fused_qk_norm_rope(vllm_config)
            wants_cpu_kernels(vllm_config)
            check_quantization(vllm_config)
            if draft_vocabulary(vllm_config):
                _check_draft_head(vllm_config)
            check_files(vllm_config)

    MODELS_CONFIG_MAP["BailingMoeV2ForCausalLM"] = BailingMoeV2Settings


class SettingsError(RuntimeError):
    """A setting for this architecture is wrong. No ValueError, for the reason given at `CheckpointError`."""


def has_mtp_draft(speculation: Any) -> bool:
    """Whether a vLLM `SpeculativeConfig` (or None) asks for the MTP layer of this architecture."""
    draft = getattr(speculation, "draft_model_config", None)
    return draft is not None and draft.architectures == [MTP_ARCHITECTURE]


def _post_init(self: Any, *args: Any, **kwargs: Any) -> Any:
    token = _in_the_making.set(self)
    try:
        return _original["post_init"](self, *args, **kwargs)
    finally:
        _in_the_making.reset(token)


def hf_config_override(hf_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Turn a BailingMoeV2 configuration into that of its MTP draft, where one is asked for.

    Stands in for `SpeculativeConfig.hf_config_override`. vLLM pickles it with the draft's configuration, so it has to
    be found by its name in a module.

    Raises:
        CheckpointError: If the checkpoint has no MTP layer, or one of another model.
    """
    speculation = _in_the_making.get()
    if (
        not isinstance(hf_config, BailingMoeV2Config)
        or not is_bailing_moe_v2(hf_config.architectures)
        or speculation is None
        or (speculation.method is not None and "mtp" not in speculation.method)
    ):
        return _original["hf_config_override"](hf_config, *args, **kwargs)
    target = speculation.target_model_config
    if not isinstance(target.hf_config, BailingMoeV2Config):
        return _original["hf_config_override"](hf_config, *args, **kwargs)
    shares_checkpoint = speculation.model == target.model
    # Overrides that the user gave for the target are for all of the checkpoint.
    draft = copy.deepcopy(target.hf_config) if shares_checkpoint else hf_config
    if not shares_checkpoint:
        _fit(draft, target.hf_config, speculation.model)
        if target.hf_config.dequantize and getattr(draft, "quantization_config", None):
            draft.update({"dequantize": True})
    if not draft.num_nextn_predict_layers:
        raise CheckpointError(_no_mtp_layer(draft, speculation, shares_checkpoint))
    draft.update(
        {
            "model_type": MTP_MODEL_TYPE,
            "architectures": [MTP_ARCHITECTURE],
            "n_predict": 1,  # a pass drafts one token, so that any number of them may be asked for
        }
    )
    return draft


def _fit(draft: BailingMoeV2Config, target: BailingMoeV2Config, model: str) -> None:
    """Give a draft from a checkpoint of its own the target's context."""
    for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
        wanted, came = getattr(target, name), getattr(draft, name)
        if wanted != came:
            raise CheckpointError(
                f"the draft model {model} has {name}={came}, the target {wanted}; its MTP layer is another model's"
            )
    if draft.rope_parameters["rope_type"] == "default":
        draft.update(
            {"rope_parameters": target.rope_parameters, "max_position_embeddings": target.max_position_embeddings}
        )


def _no_mtp_layer(draft: BailingMoeV2Config, speculation: Any, shares_checkpoint: bool) -> str:
    model = speculation.model
    revision = speculation.target_model_config.revision if shares_checkpoint else speculation.revision
    found = Checkpoint.at(model, revision).layers_behind(draft)
    if found:
        how = "pass --hf-overrides" if shares_checkpoint else "write into its config.json"
        return (
            f"{model} has num_nextn_predict_layers=0 in its config.json, but the checkpoint holds {len(found)} MTP "
            f"layer(s), number {', '.join(map(str, found))}; {how} '{{\"num_nextn_predict_layers\": {len(found)}}}'"
        )
    return f"{model} has no MTP layer (num_nextn_predict_layers=0), as usual for the chat models; {NAME_ANOTHER_DRAFT}"


DEQUANTIZE = (
    """--hf-overrides '{"dequantize": true}' turns it into plain weights while it loads, at the price of their memory"""
)


def check_quantization(vllm_config: Any) -> None:
    """Refuse schemes that this machine has no kernel for; say what `dequantize` costs where it is asked for.

    Raises:
        SettingsError: Naming the scheme and what to do.
        CheckpointError: If `dequantize` does not know the scheme.
    """
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    model_config, speculation = vllm_config.model_config, vllm_config.speculative_config
    config, checkpoint = model_config.hf_config, Checkpoint.of(model_config)
    stored = config.stored_quantization_config
    draft = speculation.draft_model_config.hf_config if has_mtp_draft(speculation) else config
    if config.dequantize and stored is None and draft.stored_quantization_config is None:
        raise SettingsError(
            "dequantize=true, but config.json has no quantization_config: nothing to dequantise; leave it out"
        )
    if stored is not None:
        Dequantizer(stored, model_config.dtype)
        elements = sum(math.prod(shape) for shape in main_tensors(config).values())
        init_logger("vllm.plugins.bailing").warning(
            "dequantize: the checkpoint's %s weights become %s while they load: %.1f GiB over all ranks instead of "
            "%.1f, a slower load, and no quantised kernels",
            stored.get("quant_method"),
            str(model_config.dtype).removeprefix("torch."),
            elements * model_config.dtype.itemsize / 2**30,
            checkpoint.size / 2**30,
        )
    elif model_config.quantization is not None and current_platform.is_cpu() and not _has_amx():
        if getattr(config, "quantization_config", None) is None:
            raise SettingsError(
                f"--quantization {model_config.quantization}: vLLM's CPU build quantises no experts on a processor "
                "without AMX; leave it out"
            )
        if checkpoint.has_quantized_experts or model_config.quantization == "fp8":
            raise SettingsError(
                f"vLLM's CPU build has no kernel for {model_config.quantization} experts on a processor without AMX; "
                f"{DEQUANTIZE}"
            )


def use_shipped_tables() -> None:
    """Point vLLM at this package's tables of the fused experts, unless the user names a folder.

    For processes that build this architecture on a GPU; vLLM reads the variable when the experts first run.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cuda_alike() and any(TABLES.glob("*.json")):
        os.environ.setdefault(TABLE_FOLDER, str(TABLES))


def _has_amx() -> bool:
    import torch

    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@contextlib.contextmanager
def naming_the_way_out(vllm_config: Any) -> Iterator[None]:
    """Add what to do to vLLM's errors about layers of a quantised model, which come while they are built."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        if vllm_config.quant_config is None:
            raise
        reason = " ".join(str(error).split())
        raise SettingsError(f"{vllm_config.model_config.quantization}: {reason}. {DEQUANTIZE}") from error


def _additional(vllm_config: Any, key: str) -> Any:
    given = vllm_config.additional_config
    return given.get(key) if isinstance(given, dict) else None


def _switch(vllm_config: Any, key: str) -> bool | None:
    given = _additional(vllm_config, key)
    if given not in (None, True, False):
        raise SettingsError(f"{key}={given!r} in --additional-config must be true or false")
    return given


def keeps_fp32_router(vllm_config: Any) -> bool:
    """Whether `--additional-config` asks for router weights in fp32 whatever the first ones need.

    Raises:
        SettingsError: If it is neither true nor false.
    """
    return bool(_switch(vllm_config, FP32_ROUTER))


def wants_fused_qk_norm_rope(vllm_config: Any) -> bool | None:
    """Whether `--additional-config` asks for the fused kernel, or rules it out; None if it leaves that open.

    Raises:
        SettingsError: If it is neither true nor false.
    """
    return _switch(vllm_config, FUSED_QK_NORM_ROPE)


def wants_cpu_kernels(vllm_config: Any) -> bool | None:
    """Whether `--additional-config` asks for the kernels of `vllm_bailing.cpu`, or rules them out; None if open.

    Raises:
        SettingsError: If it is neither true nor false.
    """
    return _switch(vllm_config, CPU_KERNELS)


def draft_vocabulary(vllm_config: Any) -> list[int] | None:
    """Token ids that an MTP draft may propose, from `--additional-config`; None for all.

    Raises:
        SettingsError: If they are no list of token ids, or no file with one.
    """
    given = _additional(vllm_config, DRAFT_VOCABULARY)
    if given is None:
        return None
    source, vocab_size = DRAFT_VOCABULARY, vllm_config.model_config.hf_config.vocab_size
    if isinstance(given, str):
        source = f"{DRAFT_VOCABULARY} {given}"
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingsError(f"{source} cannot be read: {error}; make one by `vllm-bailing draft-vocab`") from None
    ids = sorted(set(given)) if isinstance(given, list) and all(type(token) is int for token in given) else []
    if not ids or ids[0] < 0 or ids[-1] >= vocab_size:
        raise SettingsError(
            f"{source} must hold a list of token ids from 0 to {vocab_size - 1}, not {json.dumps(given)[:60]}; "
            "make one by `vllm-bailing draft-vocab`"
        )
    return ids


def _check_draft_head(vllm_config: Any) -> None:
    if not has_mtp_draft(vllm_config.speculative_config):
        raise SettingsError(
            f"{DRAFT_VOCABULARY} in --additional-config is for MTP drafts; add --speculative-config "
            '\'{"method": "mtp", "num_speculative_tokens": 1}\' or leave it out'
        )
    if Checkpoint.of(vllm_config.model_config).has_scales("lm_head"):
        raise SettingsError(
            f"{DRAFT_VOCABULARY} in --additional-config takes rows of the head, and that of "
            f"{vllm_config.model_config.model} is quantised; leave it out"
        )


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
    experts_apart = vllm_config.parallel_config.enable_expert_parallel
    main = main_tensors(target.hf_config)
    _check(target, main, (), experts_apart)
    if has_mtp_draft(speculation):
        draft = speculation.draft_model_config
        _check(draft, mtp_tensors(draft.hf_config), main, experts_apart)


def _check(model_config: Any, expected: dict[str, Any], elsewhere: Any, experts_apart: bool) -> None:
    checkpoint = Checkpoint.of(model_config)
    if checkpoint.tensors or checkpoint.damage:
        quantized = (
            model_config.quantization is not None or model_config.hf_config.stored_quantization_config is not None
        )
        audit = Audit(
            model_config.hf_config,
            expected,
            quantized=quantized,
            folder=model_config.model,
            may_lack_experts=experts_apart,
            elsewhere=elsewhere,
            is_draft=bool(elsewhere),
        )
        audit.check(checkpoint)
