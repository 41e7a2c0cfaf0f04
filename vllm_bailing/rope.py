"""The rope keys of a configuration, in all the spellings that files and flags use, settled into one.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from vllm_bailing.errors import shown, told
from vllm_bailing.validation import require_int, require_number, require_object

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rotary_dim")
ROPE_TYPES = {  # rope_type -> the parameters it takes beside the common ones
    "default": set(),
    "linear": {"factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# What other programs write into YaRN parameters, with the values that change nothing.
_NEUTRAL = {
    "attn_factor": (1,),
    "extrapolation_factor": (1,),
    "apply_yarn_scaling": (True,),
    "finetuned": (True, False),
}
_DEFAULT_THETA = 600000.0
LONGEST_WINDOW = 2**24  # positions are fp32 numbers, which count without gaps up to here
LARGEST_FACTOR = 1024  # published models of any family stay below 100; more is a slip


def settled_rope(
    head_dim: int,
    rope_parameters: dict[str, Any] | None,
    rope_scaling: dict[str, Any] | None,
    rope_theta: float | None,
    partial_rotary_factor: float | None,
    rotary_dim: int | None,
    window: int,
) -> dict[str, Any]:
    """The rope keys of a configuration, each with the value that all of them together mean.

    Args:
        head_dim: Channels of a head.
        window: Tokens that the model was trained with, or that a stretched configuration names.

    Returns:
        `rope_theta`, `partial_rotary_factor`, `rotary_dim` (channels), `max_position_embeddings` (tokens; with YaRN
        `factor` times the original window) and `rope_parameters`, in which the first two stand again.

    Raises:
        ValueError: If a value is of the wrong type or range, or two keys contradict each other.
    """
    given = _merged(rope_parameters, rope_scaling)
    rope_type = _rope_type(given)
    scaling = _scaling(given, rope_type)
    theta = _agreed("rope_theta", rope_theta, given.get("rope_theta"), _DEFAULT_THETA)
    require_number("rope_theta", theta)
    if theta <= 1:
        raise ValueError(f"rope_theta={told(theta)} must be above 1: it is the base of the wavelengths")
    factor = _agreed("partial_rotary_factor", partial_rotary_factor, given.get("partial_rotary_factor"), None)
    width = _rotary_width(head_dim, factor, rotary_dim)
    if "factor" in ROPE_TYPES[rope_type]:
        require_number(f"rope_type {told(rope_type)}: factor", scaling.get("factor"), largest=sys.float_info.max)
        if scaling["factor"] < 1:
            raise ValueError(f"factor={scaling['factor']} of rope_type {told(rope_type)} must be at least 1")
    if rope_type == "yarn":
        window = _stretched_window(scaling, window)
    elif rope_type == "linear":
        _require_window(window, scaling["factor"], "max_position_embeddings")
    else:
        _require_window(window, 1, "max_position_embeddings")
    if scaling.get("factor", 1) > LARGEST_FACTOR:
        raise ValueError(f"factor={scaling['factor']} of rope_type {told(rope_type)} must be at most {LARGEST_FACTOR}")

    share = width / head_dim
    if int(head_dim * share) < width:  # everyone computes the width back from the share, this way
        share = math.nextafter(share, 1)
    return {
        "rope_theta": theta,
        "partial_rotary_factor": share,
        "rotary_dim": width,
        "max_position_embeddings": window,
        "rope_parameters": {
            "rope_type": rope_type,
            "rope_theta": theta,
            "partial_rotary_factor": share,
            **scaling,
        },
    }


def _merged(rope_parameters: dict[str, Any] | None, rope_scaling: dict[str, Any] | None) -> dict[str, Any]:
    require_object("rope_parameters", rope_parameters)
    require_object("rope_scaling", rope_scaling)
    if rope_parameters and rope_scaling:
        for key in sorted(set(rope_parameters) & set(rope_scaling)):
            if rope_parameters[key] != rope_scaling[key]:
                raise ValueError(
                    f"rope_parameters.{shown(key)}={told(rope_parameters[key])} contradicts "
                    f"rope_scaling.{shown(key)}={told(rope_scaling[key])}; keep one of them"
                )
    return {**(rope_parameters or {}), **(rope_scaling or {})}


def _rope_type(given: dict[str, Any]) -> str:
    spellings = [given[key] for key in ("rope_type", "type") if given.get(key) is not None] or ["default"]
    rope_type = spellings[0]
    if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={told(rope_type)} is not supported; use one of {', '.join(sorted(ROPE_TYPES))}")
    if spellings[-1] != rope_type:
        raise ValueError(f"type={told(given['type'])} contradicts rope_type={told(rope_type)}; keep one of them")
    return rope_type


def _scaling(given: dict[str, Any], rope_type: str) -> dict[str, Any]:
    """The scaling parameters of `given`, all of which belong to `rope_type`."""
    allowed = ROPE_TYPES[rope_type]
    scaling = {key: value for key, value in given.items() if key not in _COMMON and value is not None}
    if rope_type == "yarn":
        scaling = {key: value for key, value in scaling.items() if value not in _NEUTRAL.get(key, ())}
    unknown = sorted(set(scaling) - allowed)
    if rope_type == "default":
        # vLLM and transformers write a leftover window or factor of 1 into plain ropes; anything else is a mistake.
        unknown = [key for key in unknown if key != "original_max_position_embeddings" and scaling[key] != 1]
        scaling = {}
    if rope_type == "yarn" and "attn_factor" in unknown:
        raise ValueError(
            f"attn_factor={told(given['attn_factor'])} of rope_type 'yarn' is not read by the official code, which "
            "takes the whole factor of cosines and sines from attention_factor; remove it, or write "
            "attention_factor instead"
        )
    if unknown:
        raise ValueError(
            f"{shown(unknown[0])}={told(given[unknown[0]])} does not belong to rope_type={told(rope_type)}; "
            f"it takes {', '.join(sorted(allowed)) or 'no scaling keys'} (for YaRN write rope_type 'yarn')"
        )
    return scaling


def _stretched_window(scaling: dict[str, Any], window: int) -> int:
    """Tokens that the YaRN parameters in `scaling` give; writes the original window into them."""
    original = scaling.setdefault("original_max_position_embeddings", window)
    require_int("original_max_position_embeddings", original, 1)
    _require_window(original, scaling["factor"], "original_max_position_embeddings")
    extended = round(scaling["factor"] * original)
    if window > extended:
        raise ValueError(
            f"max_position_embeddings={window} exceeds factor={scaling['factor']} times "
            f"original_max_position_embeddings={original} of the YaRN scaling; correct one of the three"
        )
    for key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        if key in scaling:  # a magnitude of 0 is the usual way to leave it out
            require_number(f"rope_type 'yarn': {key}", scaling[key], or_zero=key.startswith("mscale"))
    fast, slow = scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)
    if fast < slow:
        raise ValueError(f"beta_fast={fast} of rope_type 'yarn' is below beta_slow={slow}; correct one of the two")
    if not isinstance(scaling.get("truncate", True), bool):
        raise ValueError(f"truncate={told(scaling['truncate'])} of rope_type 'yarn' must be true or false")
    return extended


def _require_window(window: int, factor: float, key: str) -> None:
    if not factor * window <= LONGEST_WINDOW:
        stretched = "" if factor == 1 else f"factor={factor} times "
        raise ValueError(
            f"{stretched}{key}={window} exceeds {LONGEST_WINDOW} tokens, up to which positions are exact; correct it"
        )


def with_original_window(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw`, a config.json, with `original_max_position_embeddings` at its top moved into the YaRN scaling.

    transformers reads it there too. Without YaRN it has no meaning and is left out.

    Raises:
        ValueError: If the scaling holds another value.
    """
    original = raw.get("original_max_position_embeddings")
    settled = {key: value for key, value in raw.items() if key != "original_max_position_embeddings"}
    for name in ("rope_parameters", "rope_scaling"):
        scaling = raw.get(name)
        if original is None or not isinstance(scaling, dict):
            continue
        if "yarn" in (scaling.get("rope_type"), scaling.get("type")):
            inner = scaling.get("original_max_position_embeddings")
            both = _agreed("original_max_position_embeddings", original, inner, None)
            settled[name] = {**scaling, "original_max_position_embeddings": both}
    return settled


def _agreed(name: str, outer: Any, inner: Any, default: Any) -> Any:
    if outer is not None and inner is not None and outer != inner:
        raise ValueError(f"{name}={told(outer)} contradicts rope_parameters.{name}={told(inner)}; keep one of them")
    return next((value for value in (outer, inner) if value is not None), default)


def _rotary_width(head_dim: int, factor: float | None, rotary_dim: int | None) -> int:
    if rotary_dim is not None:
        require_int("rotary_dim", rotary_dim, 1)
    if factor is not None:
        require_number("partial_rotary_factor", factor)
        if factor > 1:
            raise ValueError(f"partial_rotary_factor={factor} exceeds 1, the whole of head_dim={head_dim}")
    width = rotary_dim if factor is None else int(head_dim * factor)
    width = head_dim if width is None else width
    if rotary_dim is not None and width != rotary_dim:
        raise ValueError(
            f"rotary_dim={rotary_dim} contradicts partial_rotary_factor={factor}, which gives {width} of "
            f"head_dim={head_dim} channels; correct one of the two"
        )
    if width > head_dim:
        raise ValueError(f"rotary_dim={rotary_dim} is wider than head_dim={head_dim}; correct one of the two")
    if width < 2 or width % 2:
        given = f"rotary_dim={rotary_dim}" if factor is None else f"partial_rotary_factor={factor}"
        raise ValueError(
            f"{given} gives {width} of head_dim={head_dim} channels to the rotary part, "
            "which takes an even number of at least 2"
        )
    return width
