"""Why the tensors of a checkpoint do not fit its configuration, as far as names, shapes and counts agree on a cause.

What is refused is decided in `checkpoint_audit.py`; this file guesses why. Each cause says what to do about it. Where
nothing agrees, none is named: a wrong guess costs more than no guess.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_bailing.checkpoint import damaged_files
from vllm_bailing.errors import NAME_ANOTHER_DRAFT
from vllm_bailing.layouts import common_prefix
from vllm_bailing.tensor_names import EMBEDDING, HEAD, SCORE, layer_of

if TYPE_CHECKING:
    from vllm_bailing.checkpoint_audit import Audit

_ADAPTER = re.compile(r"\.(lora_[AB]|lora_magnitude_vector|lora_embedding_[AB]|base_layer)\.|\.modules_to_save\.")
_MLX = re.compile(r"\.(scales|biases)$")
_SCALES = re.compile(
    r"\.(weight_scale(_inv)?|weight_packed|qweight|qzeros|scales|g_idx|weight_zero_point|input_scale)$"
)
_MTP = (".eh_proj.weight", ".enorm.weight", ".hnorm.weight")
_SPLIT = re.compile(r"\.attention\.[qkv]_proj\.")
_STACKED = re.compile(r"\.mlp\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight)?$")
_MOST_COMPARED = 2000


def likely_cause(audit: Audit, missing: list[str]) -> str:
    """The first cause that agrees with what `audit` found; empty if there is none.

    Args:
        missing: Expected tensors that did not come.
    """
    return next((cause for find in _CAUSES if (cause := find(audit, missing))), "")


def _damage(audit: Audit, missing: list[str]) -> str:
    return damaged_files(audit.folder)


def _no_draft(audit: Audit, missing: list[str]) -> str:
    if not audit.is_draft or len(missing) < len(audit.expected):
        return ""
    layers = audit.config.num_nextn_predict_layers
    return f"{audit.folder} has no MTP layer, though num_nextn_predict_layers={layers}; {NAME_ANOTHER_DRAFT}"


def _adapter(audit: Audit, missing: list[str]) -> str:
    if not any(_ADAPTER.search(name) for name in audit.unexpected):
        return ""
    return (
        "an adapter that was not merged into the weights; merge it (PEFT: merge_and_unload), or serve the base model "
        "with the adapter by --enable-lora --lora-modules"
    )


def _quantized(audit: Audit, missing: list[str]) -> str:
    if audit.quantized:
        return ""
    scales = [name for name in audit.unexpected if _SCALES.search(name) or _MLX.search(name)]
    if any(name.endswith(".biases") for name in scales):
        return "quantized weights in MLX's layout, which vLLM does not read; convert them back, or take another export"
    if scales or audit.not_float:
        return (
            "quantized weights without a quantization_config in config.json; take the config.json that was exported "
            "with them"
        )
    return ""


def _layers(audit: Audit, missing: list[str]) -> str:
    main = audit.config.num_hidden_layers
    marked = sorted({layer_of(name) or 0 for name in audit.unexpected if name.endswith(_MTP)})
    stray = {layer_of(name) or 0 for name in audit.unexpected} - {*range(main), *audit.config.mtp_layer_ids}
    if marked and marked[0] != main:
        return (
            f"the first MTP layer is number {marked[0]}, so that there are {marked[0]} main layers, but "
            f"num_hidden_layers={main}; set it to {marked[0]} in config.json or by --hf-overrides"
        )
    if marked:
        return (
            f"the checkpoint has {len(stray)} layer(s) past num_hidden_layers={main}, but num_nextn_predict_layers="
            f"{audit.config.num_nextn_predict_layers}; if they are MTP layers, set num_nextn_predict_layers to "
            f"{len(marked)} in config.json or by --hf-overrides"
        )
    if stray:
        return (
            f"the checkpoint has {max(stray) + 1} layers, but num_hidden_layers={main}; set it to {max(stray) + 1} in "
            "config.json or by --hf-overrides, or if it was cut on purpose, leave the others out of the checkpoint"
        )
    absent = {layer_of(name) for name in missing} - {layer_of(name) for name in audit.seen}
    first = min((layer for layer in absent if layer is not None), default=None)
    if first is None or audit.is_draft or absent != set(range(first, main)) or {layer_of(n) for n in missing} != absent:
        return ""
    return (
        f"the checkpoint has the layers up to {first - 1}, but num_hidden_layers={main}; set it to {first} in "
        "config.json or by --hf-overrides, or fetch or export the others too"
    )


def _head(audit: Audit, missing: list[str]) -> str:
    if missing == [HEAD] and SCORE in audit.unexpected:
        return "a reward or classification model; serve it by --runner pooling --convert classify"
    if missing == [HEAD]:
        return (
            "an embedding model, which is served by --runner pooling --convert embed, or a head that is the embedding, "
            "which config.json says by tie_word_embeddings: true"
        )
    if missing == [SCORE]:
        return "a model without a classification head; leave --convert classify out, or train and save it with one"
    if list(audit.misshapen) == [SCORE]:
        return f"num_labels={audit.config.num_labels}; set it to {audit.misshapen[SCORE][0]} in config.json"
    return ""


def _other_layout(audit: Audit, missing: list[str]) -> str:
    if any(_SPLIT.search(name) for name in audit.unexpected):
        return (
            "split projections of queries, keys and values, of which one is absent or of another size than config.json "
            "says; all three have to come"
        )
    stacked = next((name for name in audit.unexpected if _STACKED.search(name)), None)
    if stacked is not None:
        config, shape = audit.config, audit.unexpected[stacked]
        which = ", which does not tell the two apart" if shape[-2:-1] == shape[-1:] else ""
        return (
            f"experts stacked into one tensor, read as [{config.num_experts}, outputs, inputs], but {stacked} is "
            f"{list(shape)}{which}; save one tensor for each expert"
        )
    prefix = common_prefix([*audit.unexpected]) if not audit.seen else ""
    return f"all names begin with {prefix!r}; save the weights without it" if prefix else ""


def _renamed(audit: Audit, missing: list[str]) -> str:
    for name, shape in list(audit.unexpected.items())[:1]:
        alike = [other for other in missing[:_MOST_COMPARED] if audit.expected[other] == shape]
        if close := difflib.get_close_matches(name, alike, n=1, cutoff=0.6):
            return f"{name} should be called {close[0]}"
    return ""


def _shapes(audit: Audit, missing: list[str]) -> str:
    vocabulary = {EMBEDDING, HEAD}
    if audit.misshapen and audit.misshapen.keys() <= vocabulary:
        rows = next(iter(audit.misshapen.values()))[:1]
        return (
            f"vocab_size={audit.config.vocab_size}, where the checkpoint has {rows[0] if rows else 0} rows; take the "
            "config.json that was exported with the weights"
        )
    turned = [name for name, shape in audit.misshapen.items() if shape == audit.expected[name][::-1]]
    if turned and len(turned) == len(audit.misshapen):
        return "weights that were saved transposed; export the checkpoint again"
    if 2 * len(audit.misshapen) > len(audit.seen):
        return "config.json belongs to another model size; take it from the same place as the weights"
    return ""


def _incomplete(audit: Audit, missing: list[str]) -> str:
    if audit.unexpected or audit.misshapen or not missing:
        return ""
    return "an incomplete download or export; fetch or export the checkpoint again"


def _foreign(audit: Audit, missing: list[str]) -> str:
    if missing or audit.misshapen:
        return ""
    return "weights that this architecture has no place for; remove them from the checkpoint"


_CAUSES: tuple[Callable[[Audit, list[str]], str], ...] = (
    *(_damage, _no_draft, _adapter, _quantized, _layers, _head),
    *(_other_layout, _renamed, _shapes, _incomplete, _foreign),
)
