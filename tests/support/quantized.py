"""Quantized checkpoints.

What a stored tensor means is computed here by the formats' definitions, not by any library.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints import read_tensors, write_tensors
from tests.support.commands import invoke
from tests.support.configs import raw_config_of
from vllm_bailing import DEMO


def is_linear(name: str) -> bool:
    """Whether quantized checkpoints of the family hold this tensor quantized; the vendor leaves `eh_proj` alone."""
    return name.endswith(("query_key_value.weight", "attention.dense.weight", "_proj.weight")) and "eh_proj" not in name


def no_expert(name: str) -> bool:
    """As `is_linear`, without the experts, for which few processors have a kernel."""
    return is_linear(name) and ".mlp.experts." not in name


def only_experts(name: str) -> bool:
    """As `is_linear`, of routed experts alone."""
    return is_linear(name) and ".mlp.experts." in name


def quantize(folder: Path, scheme: str, chosen: Callable[[str], bool] = is_linear, group: int = 32) -> dict:
    """Rewrite a checkpoint with the tensors that are `chosen` in the layout of `scheme`.

    Args:
        scheme: "w8a8" (compressed-tensors, int8 with a scale per row), "fp8" (the vendor's export: blocks of 128 x 128,
            some scales in e8m0), "fp8-tensor" (one scale each), "gptq" (symmetric), "gptq-act" (columns in another
            order, zero points), "gptq-v2" (zero points as they are), "awq".
    Returns:
        What the stored tensors mean, in fp32, by the names of the plain checkpoint.
    """
    tensors = read_tensors(folder)
    names = [name for name in tensors if chosen(name)]
    kept = sorted({name.removesuffix(".weight") for name in tensors if is_linear(name) and name not in names})
    meaning = {name: tensor.float() for name, tensor in tensors.items()}
    for name in names:
        module, weight = name.removesuffix(".weight"), tensors.pop(name).float()
        parts, meaning[name] = _LAYOUTS[scheme.partition("-")[0]](module, weight, group, scheme)
        tensors |= {f"{module}.{leaf}": part for leaf, part in parts.items()}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = _quantization_config(scheme, group, kept)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors)
    return meaning


def quantize_one(module: str, weight: torch.Tensor, scheme: str, group: int = 32) -> tuple[dict, dict, torch.Tensor]:
    """As `quantize` for one linear layer [out, in]: `quantization_config`, stored tensors by name, their meaning."""
    parts, meaning = _LAYOUTS[scheme.partition("-")[0]](module, weight, group, scheme)
    return _quantization_config(scheme, group, []), {f"{module}.{leaf}": part for leaf, part in parts.items()}, meaning


def _quantization_config(scheme: str, group: int, kept: list[str]) -> dict[str, Any]:
    if scheme == "w8a8":
        eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
        linear = {
            "targets": ["Linear"],
            "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
            "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head", r"re:.*mlp\.gate$", *kept],
            "config_groups": {"group_0": linear},
        }
    if scheme.startswith("fp8"):
        blocks = {"weight_block_size": [128, 128]} if scheme == "fp8" else {}
        return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", **blocks}
    four_bits = {"bits": 4, "group_size": group}
    if scheme == "awq":
        skipped = ["mlp.experts"] if any(".experts." in name for name in kept) else kept
        return {
            "quant_method": "awq",
            **four_bits,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": skipped,
        }
    skip = {r"-:.*\.experts.*": {}} if any(".experts." in name for name in kept) else {}
    if kept and not skip:
        skip = {r"-:(?!.*\.experts).*": {}}
    version = {"checkpoint_format": "gptq_v2"} if scheme == "gptq-v2" else {}
    symmetric, act = scheme == "gptq", scheme == "gptq-act"
    return {"quant_method": "gptq", **four_bits, "sym": symmetric, "desc_act": act, "dynamic": skip, **version}


def _w8a8(module: str, weight: torch.Tensor, group: int, scheme: str) -> tuple[dict, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    levels = (weight / scale).round()
    return {"weight": levels.to(torch.int8), "weight_scale": scale}, levels * scale


def _fp8(module: str, weight: torch.Tensor, group: int, scheme: str) -> tuple[dict, torch.Tensor]:
    rows, columns = (size if scheme == "fp8-tensor" else 128 for size in weight.shape)
    scales = torch.stack(
        [torch.stack([block.abs().max() / 448 for block in row.split(columns, 1)]) for row in weight.split(rows, 0)]
    )
    small = scheme == "fp8" and module.endswith(("dense", "gate_proj", "up_proj"))
    if small:
        scales = torch.exp2(scales.log2().ceil())
    spread = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
    levels = (weight / spread).to(torch.float8_e4m3fn)
    if scheme == "fp8-tensor":
        return {"weight": levels, "weight_scale": scales.reshape(())}, levels.float() * spread
    stored = scales.to(torch.float8_e8m0fnu) if small else scales
    return {"weight": levels, "weight_scale_inv": stored}, levels.float() * spread


def _pack(values: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Integers of four bits [rows, n] as int32 [rows, n / 8]; bits 4 i to 4 i + 3 hold value order[i] of eight."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for place, index in enumerate(order):
        words |= values[:, index::8].long() << (4 * place)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _rounded(
    weight: torch.Tensor, group: int, symmetric: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels 0 to 15 [out, in]; zero points 1 to 15 (8 if `symmetric`) and scales in fp16, both [out, in / group]."""
    groups = weight.unflatten(1, (-1, group))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        scales = (torch.maximum(high, -low) / 7).half()
        zeros = torch.full_like(high, 8)
    else:
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(1, 15)
    levels = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15)
    return levels.flatten(1), zeros, scales


def _awq(module: str, weight: torch.Tensor, group: int, scheme: str) -> tuple[dict, torch.Tensor]:
    levels, zeros, scales = _rounded(weight, group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    parts = {
        "qweight": _pack(levels.T, order),
        "qzeros": _pack(zeros.T, order),
        "scales": scales.T.contiguous(),
    }
    return parts, (levels - zeros.repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)


def _gptq(module: str, weight: torch.Tensor, group: int, scheme: str) -> tuple[dict, torch.Tensor]:
    inputs = weight.shape[1]
    order = torch.arange(inputs)
    if scheme == "gptq-act":  # the columns of a group lie anywhere
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))
    levels, zeros, scales = _rounded(weight[:, order], group, symmetric=scheme == "gptq")
    index = torch.empty(inputs, dtype=torch.int32)
    index[order] = torch.arange(inputs, dtype=torch.int32) // group
    levels = levels[:, order.argsort()]
    parts = {
        "qweight": _pack(levels, tuple(range(8))).T.contiguous(),
        # The first format stores zero points less one.
        "qzeros": _pack(zeros.T - (0 if scheme == "gptq-v2" else 1), tuple(range(8))),
        "scales": scales.T.contiguous(),
        "g_idx": index,
    }
    return parts, (levels - zeros[:, index.long()]) * scales.float()[:, index.long()]


_LAYOUTS = {"w8a8": _w8a8, "fp8": _fp8, "awq": _awq, "gptq": _gptq}
SCHEMES = ("w8a8", "fp8", "fp8-tensor", "gptq", "gptq-act", "awq")
DEQUANTIZE = {"hf_overrides": {"dequantize": True}}


def plain_copy(folder, meaning, out):
    """A checkpoint in fp32 of what the tensors of a quantized one mean."""
    out.mkdir()
    config = {key: value for key, value in raw_config_of(folder).items() if key != "quantization_config"}
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    write_tensors(out, meaning)
    return out


def quantize_by_command(folder, out, scheme, *arguments):
    """Quantize as a user does; returns what the tensors that were written mean, in fp32, as `quantize` does."""
    done = invoke("quantize", folder, out, "--scheme", scheme, *arguments)
    assert done.exit_code == 0, done.output
    return meaning_of(read_tensors(out))


def meaning_of(stored):
    """What tensors in the compressed-tensors format mean."""
    meaning = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("weight_scale", "weight_shape"):
            continue
        scale = stored.get(f"{module}.weight_scale")
        if leaf == "weight_packed":
            nibbles = torch.stack([(tensor >> 4 * place) & 15 for place in range(8)], -1).flatten(1)
            rows, columns = stored[f"{module}.weight_shape"].tolist()
            name, tensor = f"{module}.weight", nibbles[:rows, :columns].float() - 8
        if scale is not None:
            rows, columns = (-(-size // count) for size, count in zip(tensor.shape, scale.shape, strict=True))
            if rows > 1:
                rows, columns = 128, 128
            spread = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            tensor = tensor.float() * spread[: tensor.shape[0], : tensor.shape[1]]
        meaning[name] = tensor.float()
    return meaning


def quantized_demo(scheme, folder):
    if scheme in SCHEMES:
        shutil.copytree(DEMO, folder)
        quantize(folder, scheme)
    else:
        linear, _, head = scheme.removeprefix("script-").partition("+")
        quantize_by_command(DEMO, folder, linear, "--group-size", "32", *(["--head", head] if head else []))
    return folder
