"""The MTP layer as a draft model: its configuration, made from that of the checkpoint that holds it."""

from __future__ import annotations

import copy
from typing import Any

from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.config import BailingMoeV2Config, is_bailing_moe_v2
from vllm_bailing.errors import NAME_ANOTHER_DRAFT, CheckpointError
from vllm_bailing.plugin.options import draft_vocabulary

MTP_ARCHITECTURE = "BailingMoeV2MTPModel"
# vLLM takes a draft for an MTP layer by its model type, and its list of types is closed. This one has no meaning beyond
# that list and the converter that counts the layers of a draft, which fits.
MTP_MODEL_TYPE = "glm4_moe_mtp"


def has_mtp_draft(speculation: Any) -> bool:
    """Whether a vLLM `SpeculativeConfig` (or None) asks for the MTP layer of this architecture."""
    draft = getattr(speculation, "draft_model_config", None)
    return draft is not None and draft.architectures == [MTP_ARCHITECTURE]


def draft_source(vllm_config: Any) -> str:
    """What drafts: "mtp" for the checkpoint's own MTP layer as it is, otherwise in words; empty if nothing does."""
    speculation = vllm_config.speculative_config
    if speculation is None:
        return ""
    if not has_mtp_draft(speculation):
        return str(speculation.method)
    if speculation.model != vllm_config.model_config.model:
        return "the MTP layer of another checkpoint"
    if speculation.draft_model_config.quantization != vllm_config.model_config.quantization:
        return "the MTP layer in other bits"
    return "the MTP layer with a draft vocabulary" if draft_vocabulary(vllm_config) else "mtp"


def mtp_draft(hf_config: BailingMoeV2Config, speculation: Any) -> BailingMoeV2Config | None:
    """The configuration of the MTP draft that `speculation` asks for; None if it does not ask for one.

    Args:
        hf_config: Of the draft's checkpoint.
        speculation: The vLLM `SpeculativeConfig` that is being made, or None.

    Raises:
        CheckpointError: If the checkpoint has no MTP layer, or one of another model.
    """
    if (
        not is_bailing_moe_v2(hf_config.architectures)
        or speculation is None
        or (speculation.method is not None and "mtp" not in speculation.method)
    ):
        return None
    target = speculation.target_model_config
    if not isinstance(target.hf_config, BailingMoeV2Config):
        return None
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
        expected, actual = getattr(target, name), getattr(draft, name)
        if expected != actual:
            raise CheckpointError(
                f"the draft model {model} has {name}={actual}, the target {expected}; its MTP layer is another model's"
            )
    if draft.rope_parameters["rope_type"] == "default":
        draft.update(
            {"rope_parameters": target.rope_parameters, "max_position_embeddings": target.max_position_embeddings}
        )


def _no_mtp_layer(draft: BailingMoeV2Config, speculation: Any, shares_checkpoint: bool) -> str:
    model = speculation.model
    revision = speculation.target_model_config.revision if shares_checkpoint else speculation.revision
    layers = Checkpoint.at(model, revision).published(draft).layers_past_main(draft)
    if layers:
        how = "pass --hf-overrides" if shares_checkpoint else "write into its config.json"
        return (
            f"{model} has num_nextn_predict_layers=0 in its config.json, but the checkpoint holds {len(layers)} MTP "
            f"layer(s), number {', '.join(map(str, layers))}; {how} '{{\"num_nextn_predict_layers\": {len(layers)}}}'"
        )
    return f"{model} has no MTP layer (num_nextn_predict_layers=0), as usual for the chat models; {NAME_ANOTHER_DRAFT}"
