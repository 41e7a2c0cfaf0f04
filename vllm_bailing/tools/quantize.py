"""Quantise a BailingMoeV2 checkpoint's linear layers, one file at a time, without calibration data.

    python scripts/quantize.py inclusionAI/Ling-flash-2.0 Ling-flash-2.0-FP8 --scheme fp8

Attention, dense and shared MLPs and experts are quantised, those of MTP layers too; router, embeddings, head, norms
and `eh_proj` stay as they are. The result is in the compressed-tensors format, which vLLM reads. Memory: the biggest
file of the checkpoint, twice. Needs the packages that vllm-bailing depends on, and no GPU.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.entrypoints.convert import convert_checkpoint
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant
from compressed_tensors.utils.match import match_name
from loguru import logger
from transformers import AutoConfig

from vllm_bailing.config import BailingMoeV2Config, register_with_transformers
from vllm_bailing.weights import main_tensors, mtp_tensors

KEPT = ["lm_head", r"re:.*\.mlp\.gate$", r"re:.*\.eh_proj$"]
# Shares of a group's range that a scale is tried for; the best one in the mean square is taken.
RANGES = tuple(1 - step / 40 for step in range(13))


class Scheme(str, Enum):
    """Presets of compressed-tensors; the second part of a pair of numbers is that of the activations."""

    fp8 = "fp8"  # e4m3, a scale per output channel, activations per token
    fp8_block = "fp8-block"  # e4m3, a scale per 128 x 128 block
    w8a8 = "w8a8"  # int8, a scale per output channel, activations per token
    w4a16 = "w4a16"  # int4, a scale per group of inputs


PRESETS = {Scheme.fp8: "FP8_DYNAMIC", Scheme.fp8_block: "FP8_BLOCK", Scheme.w8a8: "W8A8", Scheme.w4a16: "W4A16"}


class Quantizer:
    """A converter, as `compressed_tensors.entrypoints.convert` takes it."""

    def __init__(self, config: BailingMoeV2Config, scheme: Scheme, group_size: int, keep: list[str]) -> None:
        self.scheme = preset_name_to_scheme(PRESETS[scheme], ["Linear"])
        assert self.scheme.weights is not None
        self.args: QuantizationArgs = self.scheme.weights
        if scheme is Scheme.w4a16:
            self.args.group_size = group_size
        format_ = infer_module_format(torch.nn.Linear, self.scheme)
        self.scheme.format = format_
        self.compressor = BaseCompressor.get_value_from_registry(format_.value)
        self.keep = [*KEPT, *keep]
        self.shapes = {
            name: shape
            for name, shape in (main_tensors(config) | mtp_tensors(config)).items()
            if name.endswith(("query_key_value.weight", "attention.dense.weight", "_proj.weight"))
            and not any(match_name(name.removesuffix(".weight"), kept) for kept in self.keep)
        }
        if scheme is Scheme.w4a16:
            for name, (_, inputs) in self.shapes.items():
                if inputs % group_size:
                    raise typer.BadParameter(
                        f"--group-size {group_size} does not divide the {inputs} inputs of {name}; choose a smaller one"
                    )

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of one file, linear layers compressed."""
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if name not in self.shapes:
                found[name] = tensor
                continue
            parts = {"weight": tensor.float(), "weight_scale": self.scale(tensor.float()).float()}
            compressed: dict[str, torch.Tensor] = self.compressor.compress(parts, self.scheme)
            for leaf, part in compressed.items():
                found[f"{name.removesuffix('.weight')}.{leaf}"] = part.contiguous()
        return found

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """Scales of `weight` [out, in]: [out, 1], [out, in / group_size] or [out / 128, in / 128], fp32."""
        if self.args.block_structure is not None:
            height, width = self.args.block_structure
            padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
            rows, columns = padded.shape
            groups = padded.view(rows // height, height, columns // width, width).transpose(1, 2).flatten(2)
        else:
            groups = weight.unflatten(1, (-1, self.args.group_size or weight.shape[1]))
        low, high = groups.amin(-1), groups.amax(-1)
        if self.args.num_bits > 4:
            return calculate_qparams(low, high, self.args)[0]
        best, least = torch.zeros_like(high), torch.full_like(high, torch.inf)
        limit = 2 ** (self.args.num_bits - 1)
        for share in RANGES:
            # In bf16, as vLLM holds it.
            scale = calculate_qparams(low * share, high * share, self.args)[0].bfloat16().float()
            rounded = (groups / scale[..., None]).round().clamp(-limit, limit - 1) * scale[..., None]
            error = (rounded - groups).square().sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best

    def validate(self, tensors: dict[str, torch.Tensor]) -> None:
        """Refuse weights that are no plain ones of the configuration's shapes."""
        for name, tensor in tensors.items():
            if name in self.shapes and tuple(tensor.shape) != self.shapes[name]:
                raise typer.BadParameter(
                    f"{name} is {list(tensor.shape)}, config.json asks for {list(self.shapes[name])}"
                )

    def create_config(self) -> QuantizationConfig:
        """What becomes `quantization_config` of config.json."""
        return QuantizationConfig(
            config_groups={"group_0": QuantizationScheme.model_validate(self.scheme)},
            ignore=self.keep,
            format=self.scheme.format,
            quantization_status=QuantizationStatus.COMPRESSED,
        )

    def get_dependencies(self, weight_name: str) -> set[str]:
        """Of a tensor on others; plain ones have none."""
        return set()


def main(
    model: Annotated[str, typer.Argument(help="A bf16 checkpoint: a folder, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(help="Folder for the quantised checkpoint.")],
    scheme: Annotated[Scheme, typer.Option(help="fp8, fp8-block, w8a8 (int8) or w4a16 (int4 weights).")] = Scheme.fp8,
    group_size: Annotated[int, typer.Option(min=1, help="Inputs that share a scale, for w4a16.")] = 128,
    keep: Annotated[
        list[str] | None, typer.Option(help="Modules to leave alone, a name or re:PATTERN; repeatable.")
    ] = None,
) -> None:
    """Quantise MODEL into OUT."""
    register_with_transformers()
    config = AutoConfig.from_pretrained(model)
    if not isinstance(config, BailingMoeV2Config):
        raise typer.BadParameter(f"{model} is a {type(config).__name__}, no BailingMoeV2 model")
    if getattr(config, "quantization_config", None):
        raise typer.BadParameter(f"{model} is quantised already; take the bf16 checkpoint")
    if out.exists() and any(out.iterdir()):
        raise typer.BadParameter(f"{out} is not empty; choose another folder")
    quantizer = Quantizer(config, scheme, group_size, keep or [])
    out.mkdir(parents=True, exist_ok=True)
    logger.remove()  # of every file copied
    convert_checkpoint(model, out, quantizer)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{out}: {size / 2**30:.3f} GiB; serve it with `vllm serve {out}`", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
