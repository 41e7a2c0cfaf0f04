"""Kinds of input that are files of models: config.json, overrides, weights, quantization, adapters, drafts."""

from __future__ import annotations

import atexit
import inspect
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

from tests.support.adapters import scale_in_peft
from tests.support.checkpoints import SMALL, make_checkpoint, read_tensors, write_tensors
from tests.support.configs import CONFIGS, FOREIGN_KEYS, ROPE_KEYS, SPELLINGS, YARN
from tests.support.fuzz.examine import Kind
from tests.support.fuzz.kinds import _require_clear, _write
from tests.support.fuzz.mutate import HOSTILE, hazard, header_of, mutate_header, mutated, readable, text_of
from tests.support.quantized import SCHEMES, quantize, quantize_one
from vllm_bailing import DEMO, DEMO_ADAPTER
from vllm_bailing.config import KEYS, BailingMoeV2Config
from vllm_bailing.reference import BailingMoeV2ForCausalLM
from vllm_bailing.tensor_names import main_tensors, mtp_tensors

PARAMETERS = inspect.signature(BailingMoeV2Config).parameters
# Settled into one another, or derived from others.
_DERIVED = {"rope_scaling", "rope_parameters", "rope_theta", "rotary_dim", "partial_rotary_factor", "kwargs"}
_DERIVED |= {"max_position_embeddings", "architectures", "dequantize"}
_MOST_ELEMENTS, _MOST_MODULES = 5_000_000, 3000
VALUES: list[Any] = [*SPELLINGS.values(), YARN, {"rope_type": "default"}, {"quant_method": "fp8"}, 32768, 128, 64, 8]
VALUES += ["sigmoid", "fp32", "bfloat16", "bailing_moe", "bailing_moe_v2", ["BailingMoeV2ForCausalLM"], "eager"]
MORE_KEYS = [*sorted(KEYS), *FOREIGN_KEYS, *ROPE_KEYS, "auto_map", "attn_implementation", "experts_implementation"]

# ---- config.json, --hf-overrides ------------------------------------------------------------------------------------


def _make_config(folder: Path, rng: random.Random) -> None:
    published = sorted(CONFIGS.glob("*.json"))
    small = rng.random() < 0.6
    raw = dict(SMALL) if small else json.loads(rng.choice([DEMO / "config.json", *published]).read_text())
    if rng.random() < 0.2:
        raw["rope_scaling"] = dict(rng.choice([*SPELLINGS.values(), YARN]))
    _write(folder / "config.json", text_of(mutated(raw, rng, MORE_KEYS, VALUES), rng), rng)


def _read_config(folder: Path) -> BailingMoeV2Config:
    from vllm_bailing.config import read_config
    from vllm_bailing.tools import doctor

    _require_clear(list(doctor.checkpoint(str(folder))))
    return read_config(folder)


def _make_overrides(folder: Path, rng: random.Random) -> None:
    given = {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0},
        "num_nextn_predict_layers": 1,
        "dequantize": False,
    }
    given |= {rng.choice(MORE_KEYS): rng.choice([*VALUES, *HOSTILE]) for _ in range(rng.choice((0, 1, 1, 2)))}
    given = mutated(given, rng, MORE_KEYS, VALUES)
    (folder / "given.json").write_bytes(readable(text_of(given if isinstance(given, dict) else {}, rng, damage=0)))
    (folder / "config.json").write_text(json.dumps(SMALL))


def _read_overrides(folder: Path) -> BailingMoeV2Config:
    from vllm_bailing.config import read_config

    return read_config(folder, json.loads((folder / "given.json").read_bytes()))


def _judge_config(folder: Path, config: BailingMoeV2Config) -> str:
    file = folder / "given.json"
    raw = json.loads((file if file.exists() else folder / "config.json").read_bytes())
    for key in PARAMETERS.keys() - _DERIVED:
        if raw.get(key) is not None and not _is_same(getattr(config, key), raw[key]):
            return f"{key} is {getattr(config, key)!r}, not {raw[key]!r}"[:300]
    shapes = main_tensors(config) | mtp_tensors(config)
    if len(shapes) > _MOST_MODULES:
        return ""
    with torch.device("meta"):
        model = BailingMoeV2ForCausalLM(config)
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = shapes
    if wrong := {name for name in built.keys() | wanted.keys() if built.get(name) != wanted.get(name)} - _tied(config):
        return f"the plain model has other tensors: {sorted(wrong)[:3]}"
    if sum(map(math.prod, wanted.values())) > _MOST_ELEMENTS or config.max_position_embeddings > 2**20:
        return ""
    torch.manual_seed(0)
    with torch.no_grad():
        logits = BailingMoeV2ForCausalLM(config).float()(torch.tensor([[1, 0, 1, 0]]) % config.vocab_size).logits
    return "" if logits.isfinite().all() else "the plain model gives numbers that are not finite"


def _is_same(found: Any, given: Any) -> bool:
    return found == given or (found != found and given != given)


def _tied(config: BailingMoeV2Config) -> set[str]:
    return {"lm_head.weight"} if config.tie_word_embeddings else set()


# ---- weights --------------------------------------------------------------------------------------------------------

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
_folders: dict[str, Path] = {}


def _temporary(prefix: str) -> Path:
    """A folder that goes when this process ends, and not when a fork of it does."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _small_checkpoint() -> Path:
    """Two files and their index."""
    if "small" not in _folders:
        folder = _temporary("fuzz-small-")
        sizes = {"num_hidden_layers": 2, "num_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
        make_checkpoint(folder, shards=2, num_nextn_predict_layers=1, vocab_size=64, **sizes)
        _folders["small"] = folder
    return _folders["small"]


def _copied(folder: Path) -> None:
    shutil.copytree(_small_checkpoint(), folder, dirs_exist_ok=True)


def _make_index(folder: Path, rng: random.Random) -> None:
    _copied(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    files = sorted(set(index["weight_map"].values()))
    values = [*files, "../outside.safetensors", "/etc/passwd", "/tmp/x.safetensors", "a/b.safetensors", f"./{files[0]}"]
    if rng.random() < 0.5:
        for name in rng.sample(sorted(index["weight_map"]), rng.choice((1, 2))):
            index["weight_map"][name] = rng.choice(values)
    else:
        index = mutated(index, rng, keys=["weight_map", *files], values=values)
    _write(file, text_of(index, rng), rng)


def _make_weights(folder: Path, rng: random.Random) -> None:
    _copied(folder)
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    if rng.random() < 0.05:
        hazard(file, rng)
    else:
        mutate_header(file, rng)


def _read_weights(folder: Path) -> Any:
    from safetensors import safe_open

    from vllm_bailing.checkpoint import Checkpoint
    from vllm_bailing.checkpoint_audit import Audit
    from vllm_bailing.config import read_config
    from vllm_bailing.tools import doctor, doctor_weights

    _require_clear(list(doctor.checkpoint(str(folder))))
    _require_clear(list(doctor_weights.weights(folder)))
    config = read_config(folder)
    checkpoint = Checkpoint.at(str(folder)).published(config)
    Audit.of_target(config, folder=str(folder)).check(checkpoint)
    Audit.of_draft(config, folder=str(folder)).check(checkpoint)
    opened = {path: safe_open(path, framework="pt") for path in {one.file for one in checkpoint.tensors.values()}}
    names = [name for name in main_tensors(config) | mtp_tensors(config) if name in checkpoint.tensors]
    return {name: (checkpoint.tensors[name], checkpoint.tensors[name].read(opened.__getitem__)) for name in names}


def _judge_weights(folder: Path, found: dict[str, Any]) -> str:
    config = BailingMoeV2Config(**_without_type(json.loads((folder / "config.json").read_text())))
    wanted = main_tensors(config) | mtp_tensors(config)
    if missing := wanted.keys() - found.keys():
        return f"passed without {sorted(missing)[:3]}"
    for name, (stored, tensor) in found.items():
        if tuple(tensor.shape) != wanted[name] or not tensor.is_floating_point() or tensor.itemsize < 2:
            return f"{name} is {list(tensor.shape)} of {tensor.dtype}"
        meant = _by_definition(stored.file, stored.name)
        if (
            not stored.rest
            and meant is not None
            and not numpy.array_equal(tensor.double().numpy(), meant, equal_nan=True)
        ):
            return f"{name} has other numbers than its file"
    return ""


def _quantized_checkpoint(scheme: str) -> Path:
    if scheme not in _folders:
        folder = _temporary("fuzz-quantized-")
        shutil.copytree(_small_checkpoint(), folder, dirs_exist_ok=True)
        (folder / "model.safetensors.index.json").unlink()
        quantize(folder, scheme)
        _folders[scheme] = folder
    return _folders[scheme]


def _make_quantized_headers(folder: Path, rng: random.Random) -> None:
    scheme = rng.choice(("w8a8", "fp8", "fp8-tensor", "awq", "gptq"))
    shutil.copytree(_quantized_checkpoint(scheme), folder, dirs_exist_ok=True)
    mutate_header(rng.choice(sorted(folder.glob("*.safetensors"))), rng)
    (folder / "scheme").write_text(scheme)


def _read_quantized_headers(folder: Path) -> None:
    from vllm_bailing.checkpoint import Checkpoint
    from vllm_bailing.checkpoint_audit import Audit
    from vllm_bailing.config import read_config
    from vllm_bailing.tools import doctor

    _require_clear(list(doctor.checkpoint(str(folder))))
    config = read_config(folder)
    checkpoint = Checkpoint.at(str(folder)).published(config)
    Audit.of_target(config, quantized=True, folder=str(folder)).check(checkpoint)
    Audit.of_draft(config, quantized=True, folder=str(folder)).check(checkpoint)


def _judge_quantized_headers(folder: Path, _found: None) -> str:
    """All that is not a part of vLLM's own scheme has the shape and the kind of numbers that were written."""
    original, changed = (_kinds_in(one) for one in (_quantized_checkpoint((folder / "scheme").read_text()), folder))
    config = BailingMoeV2Config(**_without_type(json.loads((folder / "config.json").read_text())))
    wanted = main_tensors(config) | mtp_tensors(config)
    for name in sorted(wanted.keys() & original.keys()):  # also with a wrapper's name before it, or without its own
        own = f".{name.removeprefix('model.')}"
        found = [one for stored, one in changed.items() if f".{stored}".endswith(own)]
        if original[name] not in found:
            return f"{name} was {original[name]} and is {found}"
    return ""


def _kinds_in(folder: Path) -> dict[str, tuple[list[int], str]]:
    entries: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        entries |= {name: entry for name, entry in header_of(file)[0].items() if name != "__metadata__"}
    kinds = {"F64": "float", "F32": "float", "F16": "float", "BF16": "float", "F8_E4M3": "float8", "F8_E5M2": "float8"}
    kinds["F8_E8M0"] = "float8"
    return {name: (entry["shape"], kinds.get(entry["dtype"], "integer")) for name, entry in entries.items()}


def _without_type(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in raw.items() if key != "model_type"}


def _by_definition(file: Path, name: str) -> Any:
    """A tensor as the format defines it, in float64; None for a type that numpy lacks."""
    header, data = header_of(file)
    entry = header[name]
    start, end = entry["data_offsets"]
    if entry["dtype"] == "BF16":
        numbers = (numpy.frombuffer(data[start:end], "<u2").astype("<u4") << 16).view("<f4")
    elif entry["dtype"] in _NUMPY:
        numbers = numpy.frombuffer(data[start:end], _NUMPY[entry["dtype"]])
    else:
        return None
    return numbers.astype("f8").reshape(entry["shape"])


# ---- small checkpoints of an MTP layer ------------------------------------------------------------------------------


def _draft_checkpoint() -> Path:
    if "draft" not in _folders:
        from vllm_bailing.draft_target import DraftTarget

        target, folder = _small_checkpoint(), _temporary("fuzz-draft-")
        raw = json.loads((target / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, "mtp_target": DraftTarget.at(target).to_json()}))
        write_tensors(folder, {name: one for name, one in read_tensors(target).items() if ".layers.2." in name})
        _folders["draft"] = folder
    return _folders["draft"]


def _make_draft(folder: Path, rng: random.Random) -> None:
    shutil.copytree(_draft_checkpoint(), folder, dirs_exist_ok=True)
    file = folder / "config.json"
    if rng.random() < 0.4:
        mutate_header(folder / "model.safetensors", rng)
        return
    raw = json.loads(file.read_text())
    if rng.random() < 0.6:
        changed = mutated({"mtp_target": raw["mtp_target"]}, rng, ["name", "config", "weights"])
        raw |= changed if isinstance(changed, dict) else {"mtp_target": changed}
    else:
        raw = mutated(raw, rng, MORE_KEYS, VALUES)
    _write(file, text_of(raw, rng, 0.05), rng)


def _read_draft(folder: Path) -> Any:
    from vllm_bailing.checkpoint import Checkpoint
    from vllm_bailing.checkpoint_audit import Audit
    from vllm_bailing.config import read_config
    from vllm_bailing.draft_target import other_target
    from vllm_bailing.tools import doctor

    _require_clear(list(doctor.checkpoint(str(folder))))
    config = read_config(folder)
    checkpoint = Checkpoint.at(str(folder)).published(config)
    Audit.of_draft(config, folder=str(folder)).check(checkpoint)
    said = other_target(config, _small_checkpoint())
    if said and (not said.isprintable() or len(said) > 1500):
        raise SystemError(f"the note is {said[:300]!r}")
    return config, checkpoint, said


def _judge_draft(folder: Path, found: Any) -> str:
    config, checkpoint, said = found
    for name, shape in mtp_tensors(config).items():
        if name not in checkpoint.tensors or checkpoint.tensors[name].shape != shape:
            return f"{name} is not there as {shape}"
    named = json.loads((folder / "config.json").read_bytes()).get("mtp_target")
    own = json.loads((_draft_checkpoint() / "config.json").read_text())["mtp_target"]
    names_one = isinstance(named, dict) and all(isinstance(named.get(key), str) for key in ("config", "weights"))
    differs = names_one and any(named[key] != own[key] for key in ("config", "weights"))
    return "" if bool(said) == bool(differs) else f"says {said!r} of {named}"


# ---- quantization ---------------------------------------------------------------------------------------------------

MODULE = "model.layers.0.attention.dense"
# What says how the same numbers are to be read; a file cannot be asked whether it is so.
_MEANING = {"sym", "checkpoint_format", "zero_point"}
_DTYPES = (torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.uint8, torch.bool)


def _make_quantized(folder: Path, rng: random.Random) -> None:
    scheme = rng.choice([*SCHEMES, "gptq-v2"])
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    quantization, parts, meaning = quantize_one(MODULE, weight, scheme)
    if rng.random() < 0.65:
        quantization = mutated(
            quantization, rng, ["dynamic", "bits", "group_size", "sym", "quant_method"], [4, 8, 32, True]
        )
    else:
        name = rng.choice(sorted(parts))
        what = rng.random()
        if what < 0.4:
            parts[name] = parts[name].to(rng.choice(_DTYPES))
        elif what < 0.7:
            parts[name] = rng.choice(
                (
                    lambda p: p[:1] if p.ndim else p,
                    lambda p: p.reshape(-1),
                    lambda p: p.t() if p.ndim == 2 else p,
                    lambda p: p[..., None],
                )
            )(parts[name])
        elif what < 0.85:
            parts[name[:-1]] = parts.pop(name)
        else:
            del parts[name]
    (folder / "config.json").write_bytes(readable(text_of(quantization, rng, damage=0)))
    save_file({name: part.contiguous() for name, part in parts.items()}, folder / "parts.safetensors")
    save_file({"meaning": meaning.contiguous()}, folder / "meaning.safetensors", {"scheme": scheme})


def _read_quantized(folder: Path) -> Any:
    from safetensors.torch import load_file

    from vllm_bailing.dequantize import Dequantizer
    from vllm_bailing.validation import require_quantization

    quantization = json.loads((folder / "config.json").read_bytes())
    require_quantization(quantization)
    return dict(Dequantizer(quantization, torch.float32).plain(load_file(folder / "parts.safetensors").items()))


def _judge_quantized(folder: Path, found: dict[str, torch.Tensor]) -> str:
    from safetensors import safe_open

    with safe_open(folder / "meaning.safetensors", framework="pt") as opened:
        meaning, scheme = opened.get_tensor("meaning"), opened.metadata()["scheme"]
    weight = found.get(f"{MODULE}.weight")
    if weight is None:  # a part under another name, which the audit of all names refuses
        return ""
    raw = json.loads((folder / "config.json").read_bytes())
    original = quantize_one(MODULE, torch.zeros(128, 256), scheme)[0]
    if any(raw.get(key) != original.get(key) for key in _MEANING):
        return ""
    if weight.shape != meaning.shape:  # which the layer that it is for refuses
        return ""
    error = float((weight - meaning).abs().max())
    return "" if error < 0.05 else f"the weight of {scheme} is off by {error:.3g} with {raw}"[:400]


# ---- adapters -------------------------------------------------------------------------------------------------------

ADAPTER_KEYS = (
    "r lora_alpha target_modules rank_pattern alpha_pattern use_rslora use_dora bias modules_to_save peft_type "
    "init_lora_weights layers_to_transform layers_pattern lora_bias exclude_modules fan_in_fan_out task_type"
).split()
PATTERNS: list[Any] = [
    {"dense": 8},
    {".*query_key_value": 4},
    {"(": 8},
    {"(a+)+$": 8},
    {"(.*)*x": 8},
    {"a{99999999999}": 8},
]
PATTERNS += [{"(" * 500 + ")" * 500: 8}, {r"(.*\.)*(.*\.)*(.*\.)*y": 8}, 8, 16, "dense", ["dense"], {"dense": 16}]


def _make_adapter(folder: Path, rng: random.Random) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(DEMO_ADAPTER / name, folder / name)
    if rng.random() < 0.4:
        mutate_header(folder / "adapter_model.safetensors", rng)
        return
    file = folder / "adapter_config.json"
    raw = json.loads(file.read_text())
    if rng.random() < 0.3:
        raw[rng.choice(("rank_pattern", "alpha_pattern"))] = rng.choice(PATTERNS)
    _write(file, text_of(mutated(raw, rng, ADAPTER_KEYS, PATTERNS), rng), rng)


def _limits() -> Any:
    import functools

    from vllm_bailing.adapter_audit import Limits
    from vllm_bailing.config import read_config

    check: Callable[[Path], None] | None = None
    if "vllm.config.lora" in sys.modules:
        from vllm.config import LoRAConfig

        from vllm_bailing.plugin.lora import _read_as_vllm_does

        check = functools.partial(_read_as_vllm_does, LoRAConfig(max_lora_rank=16))
    return Limits(read_config(DEMO), check_settings=check)


def _read_adapter(folder: Path) -> Any:
    from vllm_bailing.adapter_audit import check_adapter, read_settings

    check_adapter(folder, _limits())
    return read_settings(folder / "adapter_config.json")


def _judge_adapter(folder: Path, settings: Any) -> str:
    raw, tensors = json.loads((folder / "adapter_config.json").read_bytes()), read_tensors(folder)
    weights = _folders.setdefault("demo", read_tensors(DEMO))  # type: ignore[arg-type]
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if f"{module}.weight" not in weights:
            continue  # of an MTP layer
        if not math.isclose(settings.scale_of(module), scale_in_peft(raw, module), rel_tol=1e-9):
            return f"{module} is scaled by {settings.scale_of(module)}, not {scale_in_peft(raw, module)}"
        product = tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float()
        if product.shape != weights[f"{module}.weight"].shape or not product.isfinite().all():  # type: ignore[index]
            return f"{module} does not fit"
    return ""


KINDS = {
    "config.json": Kind(_make_config, _read_config, _judge_config),
    "--hf-overrides": Kind(_make_overrides, _read_overrides, _judge_config),
    "index of the weights": Kind(_make_index, _read_weights, _judge_weights),
    "headers of the weights": Kind(_make_weights, _read_weights, _judge_weights),
    "headers of quantized weights": Kind(_make_quantized_headers, _read_quantized_headers, _judge_quantized_headers),
    "small MTP checkpoints": Kind(_make_draft, _read_draft, _judge_draft, (f"{tempfile.gettempdir()}/fuzz-small-",)),
    "quantization": Kind(_make_quantized, _read_quantized, _judge_quantized),
    "adapters": Kind(_make_adapter, _read_adapter, _judge_adapter, (str(DEMO),)),
}
