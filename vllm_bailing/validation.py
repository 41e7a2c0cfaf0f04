"""What a value of config.json must be. Every error names the key, its value and what to do.

Which keys there are, and keys that contradict each other: `_require_known` and `_check_fields` in `config.py`. Where
the texts of all other refusals stand: `errors.py`.
"""

from __future__ import annotations

from typing import Any

from vllm_bailing.errors import told

LARGEST = 2**31 - 1
LARGEST_NUMBER = 3.4028234663852886e38  # of fp32, which norms, rotation and routing compute in
SMALLEST_NUMBER = 1.1754943508222875e-38


def require_int(name: str, value: Any, minimum: int, largest: int = LARGEST) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= largest:
        wanted = f"an integer from {minimum} to {largest}"
        raise ValueError(f"{name}={told(value)} must be {wanted}; correct it in config.json")


def require_number(name: str, value: Any, or_zero: bool = False, largest: float = LARGEST_NUMBER) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (SMALLEST_NUMBER <= value <= largest or (or_zero and value == 0)):
        least = "of at least 0" if or_zero else "above 0"
        most = "that fp32 holds" if largest == LARGEST_NUMBER else f"and at most {largest:g}"
        raise ValueError(f"{name}={told(value)} must be a finite number {least} {most}; correct it in config.json")


def require_object(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise ValueError(
            f"{name}={told(value)} must be an object such as {{'rope_type': 'yarn', 'factor': 4.0}}, or null"
        )


def require_token_ids(name: str, value: Any, vocab_size: int) -> None:
    ids = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise ValueError(f"{name}={told(value)} must be a token id, a list of them or null; correct it in config.json")
    if value is not None and not all(0 <= one < vocab_size for one in ids):
        raise ValueError(
            f"{name}={told(value)} is outside the vocabulary, whose ids go from 0 to {vocab_size - 1} "
            f"(vocab_size={vocab_size}); correct one of the two, or write null for none"
        )


def require_quantization(value: Any, name: str = "quantization_config") -> None:
    """`value` of `name`: null, an object of transformers, or a dict that names its scheme."""
    if isinstance(value, (str, bool, int, float, list)):
        raise ValueError(f"{name}={told(value)} must be an object or null")
    if not isinstance(value, dict):
        return
    method = value.get("quant_method")
    is_modelopt = "quant_method" not in value and ("producer" in value or "quantization" in value)
    if not is_modelopt and (not isinstance(method, str) or not method):
        raise ValueError(
            f"{name} has quant_method={told(method)}, which must name the scheme, such as 'fp8'; write it, or remove "
            f"{name} if the weights are plain"
        )


def require_one_of(name: str, value: Any, supported: tuple) -> None:
    if value not in supported:
        choices = ", ".join(repr(choice) for choice in supported)
        raise ValueError(
            f"{name}={told(value)} is not part of BailingMoeV2, which supports {choices}; correct config.json"
        )
