"""Quantized checkpoints turned into plain ones while they load, for platforms that have no kernel for a scheme.

The table of schemes that are read is in `Dequantizer`; those that `vllm-bailing quantize` writes are in
`tools/quantize.py`.

The arithmetic is that of the compressed-tensors library, which vLLM depends on; GPTQ alone is laid out here, since the
library does not read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import CheckpointError, shown, told
from vllm_bailing.tensor_names import ACTIVATION_LEAVES, KV_SCALES

if TYPE_CHECKING:  # registering must not import it
    import torch

Tensors = dict[str, "torch.Tensor"]  # parts of one module by the last component of their names
_PARTS = ("weight", "weight_scale", "weight_scale_inv", "weight_packed", "weight_shape", "weight_zero_point")
_SCALES = ("weight_scale", "weight_scale_inv", "scales")
_INTEGERS = ("weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "qweight", "qzeros", "g_idx")
_GPTQ_BITS = (2, 3, 4, 8)
_PARTS += ("weight_g_idx", "qweight", "qzeros", "scales", "g_idx")


def dequantized(
    tensors: Iterable[tuple[str, torch.Tensor]], config: BailingMoeV2Config, dtype: torch.dtype
) -> Iterable[tuple[str, torch.Tensor]]:
    """`tensors` as they are, or as `config.dequantize` asks."""
    stored = config.stored_quantization_config
    return tensors if stored is None else Dequantizer(stored, dtype).plain(tensors)


class Dequantizer:
    """Yields a checkpoint's tensors with every quantized linear layer as one plain weight.

    Args:
        quantization: `quantization_config` of the checkpoint's config.json.
        dtype: Of the weights that were quantized; others pass as they are.
    Raises:
        CheckpointError: If the scheme is not known.
    """

    def __init__(self, quantization: dict[str, Any], dtype: torch.dtype) -> None:
        self.dtype = dtype
        method = quantization.get("quant_method")
        makers: dict[Any, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
            "compressed-tensors": _compressed_tensors,
            "fp8": _fp8,
            "gptq": _gptq,
            "awq": _awq,
        }
        if method not in makers:
            raise CheckpointError(
                f"dequantize=true cannot turn quant_method={told(method)} of config.json into plain weights, only "
                f"{', '.join(makers)}; leave it out, or use a checkpoint of another scheme"
            )
        # What a module's weight is made of, and how; and what to do with a part that it does not need.
        self.parts_of, self.weight_of, *spare = makers[method](quantization)
        self.check_spare: Callable[[str, str, torch.Tensor], None] | None = spare[0] if spare else None

    def plain(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield `tensors` with plain weights; holds parts of a module until all of them have come.

        Scales of activations and of the KV cache are left out: nothing is left to apply them.

        Raises:
            CheckpointError: If parts of a module never come, or do not fit each other.
        """
        waiting: dict[str, Tensors] = {}
        for name, tensor in tensors:
            module, _, leaf = name.rpartition(".")
            if leaf in ACTIVATION_LEAVES or leaf in KV_SCALES:
                continue
            if leaf not in _PARTS or (leaf == "weight" and tensor.is_floating_point() and tensor.itemsize > 1):
                yield name, tensor
                continue
            if self.check_spare is not None and leaf not in self.parts_of(module):
                self.check_spare(module, leaf, tensor)
                continue
            parts = waiting.setdefault(module, {})
            parts[leaf] = tensor
            if all(part in parts for part in self.parts_of(module)):
                yield f"{module}.weight", self._weight(module, waiting.pop(module))
        for module, parts in waiting.items():
            absent = [part for part in self.parts_of(module) if part not in parts]
            raise CheckpointError(
                f"{module} of the quantized checkpoint has {', '.join(sorted(parts))} but no {', '.join(absent)}; "
                "fetch or export it again"
            )

    def _weight(self, module: str, parts: Tensors) -> torch.Tensor:
        try:
            _require_kinds(parts)
            return self.weight_of(module, parts).to(self.dtype).contiguous()
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{leaf} {list(part.shape)}" for leaf, part in parts.items())
            reason = shown(error)
            raise CheckpointError(
                f"the parts of {module} do not fit each other or the quantization_config: {shapes} ({reason}); fetch "
                "or export the checkpoint again"
            ) from error


def _require_kinds(parts: Tensors) -> None:
    """Scales are floats and indices integers: arithmetic would take anything for them."""
    for leaf, part in parts.items():
        name = str(part.dtype).removeprefix("torch.")
        if leaf in _SCALES and "float" not in name:
            raise ValueError(f"{leaf} is {part.dtype}, wanted are floats")
        if leaf in _INTEGERS and "int" not in name:
            raise ValueError(f"{leaf} is {part.dtype}, wanted are integers")
        if leaf in ("qweight", "qzeros") and part.itemsize != 4:
            raise ValueError(f"{leaf} is {part.dtype}, wanted are integers of 32 bits")


def _compressed_tensors(quantization: dict[str, Any]) -> tuple[Any, Any]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
    from compressed_tensors.utils.match import match_name
    from torch import nn

    try:
        config = QuantizationConfig.model_validate(quantization)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"quantization_config of config.json is not understood: {_reason(error)}") from None
    schemes: list[Any] = list(config.config_groups.values())
    compressors = [BaseCompressor.get_value_from_registry(infer_module_format(nn.Linear, one).value) for one in schemes]

    def find(module: str) -> tuple[Any, Any]:
        named = [any(match_name(module, target) for target in scheme.targets) for scheme in schemes]
        # A name goes before what holds for all linear layers, as in vLLM.
        for scheme, compressor, is_named in zip(schemes, compressors, named, strict=True):
            if is_named or ("Linear" in scheme.targets and not any(named)):
                if scheme.weights is None:
                    raise CheckpointError(
                        f"{module} is quantized, but its group of quantization_config in config.json says nothing of "
                        "weights; take the config.json that was exported with them"
                    )
                return scheme, compressor
        raise CheckpointError(f"{module} is quantized, but no group of quantization_config in config.json targets it")

    def parts_of(module: str) -> tuple[str, ...]:
        scheme, compressor = find(module)
        return compressor.compression_param_names(scheme)

    def weight_of(module: str, parts: Tensors) -> torch.Tensor:
        import torch

        scheme, compressor = find(module)
        # In fp32, as a scale may be stored in fewer bits; shapes, indices and packed zeros are integers.
        scale = parts["weight_scale"].to(torch.float32)
        if scheme.weights.block_structure:  # the library takes one block per row for a scale per channel
            return _of_blocks(parts["weight"], scale, scheme.weights.block_structure)
        if "weight" in parts and scheme.weights.type == "int" and parts["weight"].dtype != torch.int8:
            raise ValueError(f"weight is {parts['weight'].dtype}, wanted is int8")
        if "weight" in parts and scheme.weights.type == "float" and not parts["weight"].is_floating_point():
            raise ValueError(f"weight is {parts['weight'].dtype}, wanted is float8")
        shape = parts["weight_shape"].tolist() if "weight_shape" in parts else list(parts["weight"].shape)
        _require_scales(scale, QuantizationStrategy(scheme.weights.strategy).value, shape, scheme.weights.group_size)
        return compressor.decompress({**parts, "weight_scale": scale}, scheme)["weight"]

    return parts_of, weight_of


def _require_scales(scale: torch.Tensor, strategy: str, shape: list[int], group: int | None) -> None:
    """One scale, or [out, 1], or [out, groups]: others would be stretched over the weight without an error."""
    rows, columns = shape
    if strategy == "tensor" and scale.numel() != 1:
        raise ValueError("strategy 'tensor' needs one scale")
    wanted = {"channel": [rows, 1], "group": [rows, -(-columns // (group or columns))]}.get(strategy)
    if wanted is not None and list(scale.shape) != wanted:
        raise ValueError(f"strategy {strategy!r} needs {wanted} scales")


def _reason(error: Exception) -> str:
    """What pydantic found first, which it says on several lines, or the message of another error."""
    rows: Any = getattr(error, "errors", list)()
    return shown(f"{'.'.join(map(str, rows[0]['loc']))}: {rows[0]['msg']}" if rows else error)


def _of_blocks(weight: torch.Tensor, scale: torch.Tensor, block: Iterable[int]) -> torch.Tensor:
    """`weight` [out, in] times `scale` [ceil(out / block[0]), ceil(in / block[1])], in fp32."""
    import torch
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer

    height, width = block
    expected = (-(-weight.shape[0] // height), -(-weight.shape[1] // width))
    if tuple(scale.shape) != expected:
        raise ValueError(f"blocks of {height} x {width} need {list(expected)} scales")
    converter = FP8BlockDequantizer(targets=["re:.*"], weight_block_size=(height, width), dtype=torch.float32)
    return converter.process({"module.weight": weight, "module.weight_scale_inv": scale})["module.weight"]


def _fp8(quantization: dict[str, Any]) -> tuple[Any, Any]:
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    block = quantization.get("weight_block_size")
    if block and (not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block)):
        raise CheckpointError(
            f"quantization_config of config.json has weight_block_size={told(block)}; wanted are two numbers, "
            "such as [128, 128]"
        )
    parts = ("weight", "weight_scale_inv" if block else "weight_scale")

    def weight_of(module: str, stored: Tensors) -> torch.Tensor:
        import torch

        if not stored["weight"].is_floating_point():  # and of one byte, or it would have passed as it is
            raise ValueError(f"weight is {stored['weight'].dtype}, wanted is float8")
        if block:
            return _of_blocks(stored["weight"], stored["weight_scale_inv"], block)
        return dequantize(stored["weight"], stored["weight_scale"].to(torch.float32))

    return lambda module: parts, weight_of


def _awq(quantization: dict[str, Any]) -> tuple[Any, ...]:
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    _group_size(quantization)
    try:
        converter = AutoAWQConverter.from_autoawq_config({**quantization, "modules_to_not_convert": None})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"quantization_config of config.json: {_reason(error)}") from None
    _, weight_of_packed = _compressed_tensors(converter.create_config().model_dump(mode="json"))
    parts = ("qweight", "qzeros", "scales") if converter.zero_point else ("qweight", "scales")

    def weight_of(module: str, stored: Tensors) -> torch.Tensor:
        if "qzeros" in stored and len(stored["qzeros"]) != len(stored["scales"]):
            raise ValueError(f"{len(stored['qzeros'])} rows of zero points for {len(stored['scales'])} of scales")
        named = {f"{module}.{leaf}": tensor for leaf, tensor in stored.items()}
        packed = converter.process(named)
        return weight_of_packed(module, {name.rpartition(".")[2]: tensor for name, tensor in packed.items()})

    def check_spare(module: str, leaf: str, tensor: torch.Tensor) -> None:
        if leaf == "qzeros":
            raise CheckpointError(
                f"{module} has zero points, but quantization_config has zero_point=false; take the config.json "
                "that was exported with the weights"
            )
        _refuse_part(module, leaf, "AWQ")

    return lambda module: parts, weight_of, check_spare


def _group_size(quantization: dict[str, Any]) -> int:
    group_size = quantization.get("group_size", -1)
    if type(group_size) is not int or (group_size < 1 and group_size != -1):
        raise CheckpointError(
            f"quantization_config of config.json has group_size={told(group_size)}; wanted is a number of inputs, or -1"
        )
    return group_size


def _gptq(quantization: dict[str, Any]) -> tuple[Any, Any, Any]:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    bits, group_size = quantization.get("bits", 4), _group_size(quantization)
    if type(bits) is not int or bits not in _GPTQ_BITS:
        raise CheckpointError(
            f"quantization_config of config.json has bits={told(bits)}; GPTQ has {', '.join(map(str, _GPTQ_BITS))}"
        )
    if quantization.get("dynamic"):
        raise CheckpointError(
            'quantization_config of config.json has "dynamic" settings of single modules, which dequantize=true does '
            "not apply; leave it out, or use a checkpoint with one setting for all"
        )
    # Symmetric weights have their zero in the middle, whatever an exporter stored; kernels do not read it either.
    is_symmetric = bool(quantization.get("sym", True))
    # The first format stores every zero point less one.
    shift = 0 if quantization.get("checkpoint_format") == "gptq_v2" else 1
    # Without desc_act input i is of group i // group_size, and not every exporter stores that.
    is_in_order = not quantization.get("desc_act")
    needed = ("qweight", "scales", *(() if is_symmetric else ("qzeros",)), *(() if is_in_order else ("g_idx",)))

    def in_order(inputs: int) -> torch.Tensor:
        import torch

        return torch.arange(inputs) // (group_size if group_size > 0 else inputs)

    def check_spare(module: str, leaf: str, tensor: torch.Tensor) -> None:
        if leaf == "g_idx" and tensor.long().tolist() != in_order(tensor.numel()).tolist():
            raise CheckpointError(
                f"{module}.g_idx is out of order, but quantization_config has desc_act=false and "
                f"group_size={group_size}; take the config.json that was exported with the weights"
            )
        if leaf not in ("g_idx", "qzeros"):
            _refuse_part(module, leaf, "GPTQ")

    def weight_of(module: str, stored: Tensors) -> torch.Tensor:
        import torch

        scales = stored["scales"].float()  # [groups, out]
        groups, width = scales.shape
        inputs = stored["qweight"].shape[0] * 32 // bits
        if group_size > 0 and is_in_order and -(-inputs // group_size) != groups:
            raise ValueError(f"{inputs} inputs of {bits} bits in groups of {group_size} are not {groups} groups")
        if group_size == -1 and groups != 1:
            raise ValueError(f"group_size=-1 means one group, not {groups}")
        index = in_order(inputs) if is_in_order else stored["g_idx"].long()
        if index.shape != (inputs,):
            raise ValueError(f"g_idx has {list(index.shape)} values for {inputs} inputs")
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise ValueError(f"g_idx points outside the {groups} groups")
        # The library takes half of the range off, so that the middle is 0.
        weight = unpack_from_int32(stored["qweight"], bits, torch.Size((inputs, width)), packed_dim=0).float()
        if not is_symmetric:
            # As floats: a zero point of 2^bits leaves the range of the stored integers.
            zeros = unpack_from_int32(stored["qzeros"], bits, torch.Size((groups, width))).float() + shift
            weight = weight - zeros[index]
        return weight.T * scales.T[:, index]

    return lambda module: needed, weight_of, check_spare


def _refuse_part(module: str, leaf: str, method: str) -> NoReturn:
    raise CheckpointError(f"{module}.{leaf} is no part of {method}, which quantization_config names; export it again")
