"""Quantize a BailingMoeV2 checkpoint's linear layers, one file at a time, without calibration data.

Attention, dense and shared MLPs and experts are quantized, those of MTP layers too, and the head if it is asked for;
router, embeddings, norms and `eh_proj` stay as they are. The result is in the compressed-tensors format, which vLLM
reads. This file has the schemes that are written; those that are read are in `dequantize.py`.

torch and compressed-tensors are imported where they are used, so that the command line can name the schemes at once.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_bailing.errors import CheckpointError, QuantizeError, shown

if TYPE_CHECKING:
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

    from vllm_bailing.checkpoint import Checkpoint
    from vllm_bailing.config import BailingMoeV2Config

KEPT = (r"re:.*\.mlp\.gate$", r"re:.*\.eh_proj$")
_LINEAR = ("query_key_value.weight", "attention.dense.weight", "_proj.weight")
# Shares of a group's range that a scale is tried for; the best one in the mean square is taken.
_RANGES = tuple(1 - step / 40 for step in range(13))


class Scheme(str, Enum):
    """Presets of compressed-tensors; the second part of a pair of numbers is that of the activations."""

    fp8 = "fp8"  # e4m3, a scale per output channel, activations per token
    fp8_block = "fp8-block"  # e4m3, a scale per 128 x 128 block
    w8a8 = "w8a8"  # int8, a scale per output channel, activations per token
    w4a16 = "w4a16"  # int4, a scale per group of inputs


PRESETS = {Scheme.fp8: "FP8_DYNAMIC", Scheme.fp8_block: "FP8_BLOCK", Scheme.w8a8: "W8A8", Scheme.w4a16: "W4A16"}


class LayerQuantizer:
    """Weights [out, in] of linear layers in one scheme.

    Args:
        targets: The layers, as compressed-tensors names them.
        group_size: Inputs that share a scale, for `Scheme.w4a16`.
    """

    def __init__(self, scheme: Scheme, targets: list[str], group_size: int) -> None:
        import torch
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import preset_name_to_scheme

        self.scheme = preset_name_to_scheme(PRESETS[scheme], targets)
        assert self.scheme.weights is not None
        self.args: QuantizationArgs = self.scheme.weights
        if scheme is Scheme.w4a16:
            self.args.group_size = group_size
        self.scheme.format = infer_module_format(torch.nn.Linear, self.scheme)
        self._compressor = BaseCompressor.get_value_from_registry(self.scheme.format.value)

    def compress(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is stored for `weight`, by the last component of the names."""
        weight = weight.float()
        parts = {"weight": weight, "weight_scale": self.scale(weight)}
        compressed: dict[str, torch.Tensor] = self._compressor.compress(parts, self.scheme)
        return {leaf: part.contiguous() for leaf, part in compressed.items()}

    def scale(self, weight: torch.Tensor) -> torch.Tensor:
        """Scales of `weight` [out, in] fp32: [out, 1] or [out / 128, in / 128] fp32, [out, in / group_size] bf16."""
        import torch
        from compressed_tensors.quantization.utils import calculate_qparams, maybe_pad_tensor_for_block_quant

        if self.args.block_structure is not None:
            height, width = self.args.block_structure
            padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
            rows, columns = padded.shape
            groups = padded.view(rows // height, height, columns // width, width).transpose(1, 2).flatten(2)
        else:
            groups = weight.unflatten(1, (-1, self.args.group_size or weight.shape[1]))
        low, high = groups.amin(-1), groups.amax(-1)
        if self.args.num_bits > 4:
            return calculate_qparams(low, high, self.args)[0].float()
        best, least = torch.zeros_like(high), torch.full_like(high, torch.inf)
        limit = 2 ** (self.args.num_bits - 1)
        for share in _RANGES:
            # In bf16, as vLLM holds it.
            scale = calculate_qparams(low * share, high * share, self.args)[0].bfloat16().float()
            rounded = (groups / scale[..., None]).round().clamp(-limit, limit - 1) * scale[..., None]
            error = (rounded - groups).square().sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best.bfloat16()


class Quantizer:
    """A converter, as `compressed_tensors.entrypoints.convert` takes it.

    Args:
        checkpoint: The files; empty where they are yet to come from the hub.
        group_size: Inputs that share a scale, for `Scheme.w4a16`.
        keep: Modules to leave alone besides `KEPT`, as compressed-tensors matches them: a name or "re:PATTERN".
        head: Scheme of the head, which stays as it is without one.
    Raises:
        QuantizeError: If `group_size` does not divide the inputs of a layer, `keep` names none, or there is no head
            that could be quantized so.
    """

    def __init__(
        self,
        config: BailingMoeV2Config,
        checkpoint: Checkpoint,
        scheme: Scheme,
        group_size: int,
        keep: Iterable[str],
        head: Scheme | None = None,
    ) -> None:
        from compressed_tensors.utils.match import match_name

        from vllm_bailing.tensor_names import HEAD, HEAD_MODULE, main_tensors, mtp_tensors

        published = checkpoint.published(config).tensors
        self.is_draft = is_draft_alone(config, published)
        tensors = mtp_tensors(config) if self.is_draft else main_tensors(config) | mtp_tensors(config)
        modules = {name.rpartition(".")[0] for name in tensors}
        for kept in keep:
            if not any(match_name(module, _pattern(kept)) for module in modules):
                raise QuantizeError(
                    f"--keep {shown(kept)} is none of the model's {len(modules)} modules, such as "
                    "model.layers.0.attention.dense; correct it, or leave it out"
                )
        self.keep = [*KEPT, *keep]
        self.head = None
        if head is None:
            self.keep.append(HEAD_MODULE)
        else:
            if any(match_name(HEAD_MODULE, kept) for kept in self.keep):
                raise QuantizeError(f"--head {head.value} and --keep, which names the head too; leave one of them out")
            _check_head(config, head, HEAD in tensors)
            self.head = LayerQuantizer(head, [HEAD_MODULE], group_size)
        self.linear = LayerQuantizer(scheme, ["Linear"], group_size)
        self.shapes = {
            name: shape
            for name, shape in tensors.items()
            if name.endswith(_LINEAR) and not any(match_name(name.removesuffix(".weight"), kept) for kept in self.keep)
        }
        if self.head:
            self.shapes[HEAD] = tensors[HEAD]
        for name, (_, inputs) in self.shapes.items():
            group = self._quantizer_of(name).args.group_size
            if group and inputs % group:
                raise QuantizeError(
                    f"--group-size {group} does not divide the {inputs} inputs of {name}; choose a smaller one"
                )
        self.config, self.prefix = config, checkpoint.prefix
        self._rest = {whole.name: {part.name for part in whole.rest} for whole in published.values() if whole.rest}

    def _quantizer_of(self, name: str) -> LayerQuantizer:
        module = name.removesuffix(".weight")
        return self.head if self.head and module in self.head.scheme.targets else self.linear

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of one file in the published layout, linear layers compressed."""
        from vllm_bailing.layouts import as_published

        result: dict[str, torch.Tensor] = {}
        for name, tensor in as_published(tensors.items(), self.config, self.prefix):
            if name not in self.shapes:
                result[name] = tensor
                continue
            for leaf, part in self._quantizer_of(name).compress(tensor).items():
                result[f"{name.removesuffix('.weight')}.{leaf}"] = part
        return result

    def validate(self, tensors: dict[str, torch.Tensor]) -> None:
        """Refuse weights that are not plain ones of the configuration's shapes.

        Raises:
            QuantizeError: If one has another shape, or a tensor holds NaN or infinity.
        """
        from vllm_bailing.layouts import as_published

        for name, tensor in as_published(tensors.items(), self.config, self.prefix):
            if name in self.shapes and tuple(tensor.shape) != self.shapes[name]:
                raise QuantizeError(f"{name} is {list(tensor.shape)}, config.json asks for {list(self.shapes[name])}")
            if not tensor.isfinite().all():
                raise QuantizeError(f"{name} holds NaN or infinity; `vllm-bailing doctor MODEL --deep` names all such")

    def create_config(self) -> QuantizationConfig:
        """What becomes `quantization_config` of config.json."""
        from compressed_tensors import CompressionFormat
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus

        schemes = [one.scheme for one in (self.head, self.linear) if one]
        formats = {scheme.format for scheme in schemes}
        return QuantizationConfig(
            config_groups={
                f"group_{index}": QuantizationScheme.model_validate(scheme) for index, scheme in enumerate(schemes)
            },
            ignore=self.keep,
            format=formats.pop() if len(formats) == 1 else CompressionFormat.mixed_precision,
            quantization_status=QuantizationStatus.COMPRESSED,
        )

    def get_dependencies(self, weight_name: str) -> set[str]:
        """The other parts of a projection that is stored split, which must be in one file with the first."""
        return self._rest.get(weight_name, set())


def _check_head(config: BailingMoeV2Config, head: Scheme, is_there: bool) -> None:
    if not is_there:
        what = "is the embedding here" if config.tie_word_embeddings else "is that of the target, which is not here"
        raise QuantizeError(f"--head {head.value}: the head {what}, which stays as it is; leave --head out")
    if config.norm_head:
        raise QuantizeError(
            f"--head {head.value}: with norm_head=true in config.json the head is normalized as it loads; leave it out"
        )
    if head is Scheme.fp8_block:
        raise QuantizeError(
            f"--head {head.value}: vLLM reads no head with a scale per block; choose "
            f"{', '.join(one.value for one in Scheme if one is not head)}"
        )


def _pattern(kept: str) -> str:
    """`kept`, as compressed-tensors matches it."""
    try:
        re.compile(kept.removeprefix("re:"))
    except re.error as error:
        raise QuantizeError(f"--keep {shown(kept)} is no regular expression: {error}; correct it") from None
    return kept


@contextmanager
def whole_folder(out: Path) -> Iterator[None]:
    """A folder for the body to fill, which is empty or not there; it is again what it was if the body does not end."""
    was_there = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not was_there:
            out.rmdir()
        raise


def is_draft_alone(config: BailingMoeV2Config, names: Collection[str]) -> bool:
    """Whether tensors of these published names are an MTP layer without its target, as `train-mtp` writes it."""
    from vllm_bailing.tensor_names import main_tensors

    return bool(names) and main_tensors(config).keys().isdisjoint(names)


def _require_whole(config: BailingMoeV2Config, checkpoint: Checkpoint, is_draft: bool) -> None:
    """Refuse what vLLM would refuse later, in the same words."""
    from vllm_bailing.checkpoint_audit import Audit

    folder = str(checkpoint.folder or "")
    layers = len(checkpoint.layers_past_main(config))
    try:
        if not is_draft:
            Audit.of_target(config, folder=folder).check(checkpoint)
        if layers:
            Audit.of_draft(config, folder=folder).check(checkpoint)
    except CheckpointError as error:
        raise QuantizeError(error) from None
    if layers != config.num_nextn_predict_layers and layers:
        raise QuantizeError(
            f"{layers} MTP layers are in the files, and num_nextn_predict_layers={config.num_nextn_predict_layers} in "
            "config.json; correct it there"
        )


def quantize(
    model: str,
    out: Path,
    scheme: Scheme,
    group_size: int = 128,
    keep: Iterable[str] = (),
    head: Scheme | None = None,
) -> tuple[int, bool]:
    """Quantize a bf16 checkpoint, a folder or a name on the hub, into the folder `out`, with progress bars of tqdm.

    Memory: the largest file of the checkpoint, twice. `out` holds all of it, or nothing.

    Returns:
        Bytes of the weights in `out`, and whether they are those of an MTP layer alone.
    Raises:
        QuantizeError: If it is not such a checkpoint, or `out` is not empty.
        OSError: If `out` cannot be written.
    """
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from loguru import logger

    from vllm_bailing.checkpoint import Checkpoint
    from vllm_bailing.config import read_config

    try:
        config = read_config(model)
    except ValueError as error:
        raise QuantizeError(error) from None
    checkpoint = Checkpoint.at(model)
    if config.stored_quantization_config or getattr(config, "quantization_config", None):
        if {tensor.kind for tensor in checkpoint.tensors.values()} == {"plain"}:
            raise QuantizeError(f"{model}: its weights are plain; remove quantization_config from config.json")
        raise QuantizeError(f"{model} is quantized already; take the bf16 checkpoint")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise QuantizeError(f"{out} is not an empty folder; choose another one")
    if damage := checkpoint.published(config).damage:
        raise QuantizeError(damage)
    if Path(model).is_dir() and not checkpoint.tensors:
        raise QuantizeError(f"no safetensors files in {model}; give the folder of a checkpoint")
    quantizer = Quantizer(config, checkpoint, scheme, group_size, keep, head)
    if checkpoint.tensors:  # those of a name on the hub may not be here yet
        _require_whole(config, checkpoint.published(config), quantizer.is_draft)
    logger.remove()  # of every file copied
    with whole_folder(out):
        convert_checkpoint(model, out, quantizer)
    return sum(file.stat().st_size for file in out.glob("*.safetensors")), quantizer.is_draft
