"""Whether the files of a LoRA adapter fit the model that is served, as a whole and with every value.

vLLM checks the ends of names and the rank. What it does not check it copies as far as it goes: half of a factor, or the
factors of another model, are served as if they were an adapter.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from vllm_bailing.adapters import EMBEDDING_MODULE, EXPERTS, LINEAR, adaptable, is_prepared, is_routed, target_of
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.errors import AdapterError, first_of, shown, told
from vllm_bailing.folders import FileStates, states_of
from vllm_bailing.json_files import read_json
from vllm_bailing.tensor_names import HEAD, Shape, layer_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_LARGEST_ALPHA = 1e30
_RETRAIN = "merge the adapter into the checkpoint, or train one without it"
# Keys of PEFT that change what the factors mean, or add something to them, if they are set.
_NOT_APPLIED = (
    *("use_dora", "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "target_parameters"),
    *("trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "use_qalora", "arrow_config"),
)
# Ways to initialize the factors that leave the base model as it is; PiSSA, OLoRA, CorDA and LoftQ change it.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<rows>[AB]))"
)
# Patterns whose time can grow with a power of a name's length; vLLM matches every module with them.
_REPEATED_GROUP, _UNBOUNDED, _MOST_UNBOUNDED = re.compile(r"\)[*+{]"), re.compile(r"[*+]|\{\d*,\}"), 3
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Limits:
    """What an adapter has to fit.

    Attributes:
        targets: The targets that vLLM prepared its layers for, see `adapters.TARGETS`.
        max_rank: The highest rank that they have room for.
        dtype: Full name of the data type that the factors become.
        experts_remedy: What to do with an adapter of routed experts if they are not prepared; `None` for the flag.
        scales_each_module: Whether vLLM knows ranks and scales of single modules, and rsLoRA for experts.
        check_settings: vLLM's own reading of the folder's settings; raises AdapterError.
    """

    config: BailingMoeV2Config = field(hash=False)
    targets: tuple[str, ...] = LINEAR
    max_rank: int = 16
    dtype: str = "float32"
    experts_remedy: str | None = None
    scales_each_module: bool = True
    check_settings: Callable[[Path], None] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Settings:
    """What an adapter_config.json says about ranks and scales, as PEFT reads it.

    Attributes:
        base: Name of the model that the adapter was trained on, for messages; may be empty.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base: str

    @property
    def has_patterns(self) -> bool:
        return bool(self.rank_pattern or self.alpha_pattern)

    @property
    def highest_rank(self) -> int:
        return max(self.rank, *self.rank_pattern.values(), 0)

    def rank_of(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by."""
        rank = self.rank_of(module)
        return _first_match(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _first_match(pattern: dict[str, Any], module: str, default: Any) -> Any:
    """Source: PEFT, `get_pattern_key`: the end of a name, at a dot, as a regular expression."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def check_adapter(folder: Path, limits: Limits) -> None:
    """Refuse an adapter that cannot be served as a whole; reads it once, until its files change.

    Raises:
        AdapterError: On one line, what is wrong with it and what to do.
    """
    _check_once(folder, states_of(folder, "adapter_*"), limits)


@functools.lru_cache(maxsize=256)  # every request that names an adapter asks
def _check_once(folder: Path, files: FileStates, limits: Limits) -> None:
    try:
        settings = read_settings(folder / CONFIG)
        _check_settings(settings, limits)
        factors = _read_header(folder, limits)
        _check_modules(factors, limits)
        _check_shapes(factors, settings, limits)
        _check_experts(factors, settings, limits)
        _check_values(folder / TENSORS, factors, settings, limits)
        if limits.check_settings is not None:
            limits.check_settings(folder)
    except AdapterError as error:
        raise AdapterError(f"the adapter {folder}: {error}") from None


# ---- adapter_config.json -------------------------------------------------------------------------------------------


def read_settings(file: Path) -> Settings:
    """What an adapter_config.json says.

    Raises:
        AdapterError: If it cannot be read, or asks for what is not applied here.
    """
    try:
        raw = read_json(file)
    except ValueError as error:
        raise AdapterError(f"{CONFIG} is not readable JSON: it {error}; save it again") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{CONFIG} holds a {type(raw).__name__}, not an object with keys; save it again")
    _check_kind(raw)
    for key in ("r", "lora_alpha", "target_modules"):
        if raw.get(key) is None:
            raise AdapterError(f"{CONFIG} has no {key}; save the adapter with PEFT's save_pretrained")
    use_rslora = raw.get("use_rslora") or False
    if not isinstance(use_rslora, bool):
        raise AdapterError(f"use_rslora={told(use_rslora)} in {CONFIG} must be true or false; correct it")
    return Settings(
        _rank("r", raw["r"]),
        _alpha("lora_alpha", raw["lora_alpha"]),
        use_rslora,
        _pattern(raw, "rank_pattern", _rank),
        _pattern(raw, "alpha_pattern", _alpha),
        str(raw.get("base_model_name_or_path") or ""),
    )


def _check_kind(raw: dict[str, Any]) -> None:
    kind = raw.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        raise AdapterError(f"peft_type={told(kind)} in {CONFIG} is not LORA; {_RETRAIN}")
    if (bias := raw.get("bias", "none")) is None:
        raise AdapterError(f'bias=null in {CONFIG} is no setting; write "none"')
    if bias != "none":
        raise AdapterError(f"bias={told(bias)} in {CONFIG} is not applied here; {_RETRAIN}")
    for key in _NOT_APPLIED:
        if value := raw.get(key):
            raise AdapterError(f"{key}={_short(value)} in {CONFIG} is not applied here; {_RETRAIN}")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise AdapterError(
            f"init_lora_weights={_short(init)} in {CONFIG} changes the base model too; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it into the checkpoint"
        )


def _short(value: Any) -> str:
    try:
        text = " ".join(json.dumps(value).split())
    except RecursionError:
        return told(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _rank(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{key}={_short(value)} in {CONFIG} must be a whole number of at least 1; correct it")
    return value


def _alpha(key: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < abs(value) < _LARGEST_ALPHA:  # false for NaN too
        raise AdapterError(
            f"{key}={_short(value)} in {CONFIG} must be a finite number other than 0, with which nothing would change; "
            "correct it"
        )
    return value


def _pattern(raw: dict[str, Any], name: str, checked: Callable[[str, Any], Any]) -> dict[str, Any]:
    pattern = raw.get(name) or {}
    if not isinstance(pattern, dict):
        raise AdapterError(f"{name} in {CONFIG} holds a {type(pattern).__name__}, not an object with keys; correct it")
    for key in pattern:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"{_short(key)} in {name} of {CONFIG} is no regular expression ({shown(error)}); correct it"
            ) from None
        if _REPEATED_GROUP.search(key) or len(_UNBOUNDED.findall(key)) > _MOST_UNBOUNDED:
            raise AdapterError(
                f"{_short(key)} in {name} of {CONFIG} is a regular expression that could take for ever, with a "
                f"repeated group or more than {_MOST_UNBOUNDED} of * and +; name the modules"
            )
    return {key: checked(f"{name}[{_short(key)}]", value) for key, value in pattern.items()}


def _check_settings(settings: Settings, limits: Limits) -> None:
    if settings.highest_rank > limits.max_rank:
        raise AdapterError(
            f"rank {settings.highest_rank} is above --max-lora-rank {limits.max_rank}; start the server with a "
            f"--max-lora-rank of at least {settings.highest_rank}"
        )
    if settings.has_patterns and not limits.scales_each_module:
        raise AdapterError(
            f"rank_pattern and alpha_pattern in {CONFIG} are ignored by this vLLM; run `pip install -U vllm`, or "
            "merge the adapter into the checkpoint"
        )


# ---- the header of its file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factor:
    """A factor as the header of the file describes it."""

    name: str
    shape: Shape
    dtype: str
    is_embedding: bool


def _read_header(folder: Path, limits: Limits) -> dict[str, dict[str, Factor]]:
    """Factors "A" and "B" of each module, without those of MTP layers: drafts need no adapter to be right."""
    file = folder / TENSORS
    if not file.is_file():
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        found = f"{pickles[0]} is a pickle file, which could run code" if pickles else f"there is no {TENSORS}"
        raise AdapterError(f"{found}; save the adapter with PEFT's save_pretrained(..., safe_serialization=True)")
    factors: dict[str, dict[str, Factor]] = defaultdict(dict)
    others, twice = [], []
    with _opened(file) as opened:
        for name in sorted(opened.keys()):
            stored = opened.get_slice(name)
            shape = tuple(stored.get_shape())
            match = _FACTOR.fullmatch(name)
            if match is None:
                if not _is_copy_of_the_head(name, shape, limits.config):
                    others.append(name)
                continue
            module, letter = match["module"], match["linear"] or match["rows"]
            if layer_of(module) in limits.config.mtp_layer_ids:
                continue
            if letter in factors[module]:
                twice.append(name)
            factors[module][letter] = Factor(name, shape, stored.get_dtype(), match["rows"] is not None)
    if others:
        raise AdapterError(
            f"{len(others)} tensor(s) of {TENSORS} are no LoRA factors ({first_of(others)}); save the adapter with "
            "PEFT's save_pretrained(..., save_embedding_layers=False)"
        )
    if twice:
        raise AdapterError(f"{len(twice)} factor(s) are there twice ({first_of(twice)}); save the adapter again")
    if not factors:
        raise AdapterError(
            f"{TENSORS} has no factors of the model's own layers, so nothing would change; check that "
            "the adapter was saved after it was trained"
        )
    return factors


def _is_copy_of_the_head(name: str, shape: Shape, config: BailingMoeV2Config) -> bool:
    """PEFT stores the head beside its factors; vLLM, which has it, passes over it."""
    is_copy = name == f"base_model.model.{HEAD.replace('.', '.base_layer.')}"
    return is_copy and shape == (config.vocab_size, config.hidden_size)


def _opened(file: Path) -> Any:
    try:
        file.open("rb").close()  # of one that may not be read, the library says that it does not exist
        return safe_open(file, framework="pt")
    except PermissionError as error:
        raise AdapterError(f"{TENSORS} cannot be read ({error.strerror}); let the server's user read it") from None
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise AdapterError(f"{TENSORS} is cut off or damaged ({size} bytes; {shown(error)}); fetch it again") from None


def _check_modules(factors: dict[str, dict[str, Factor]], limits: Limits) -> None:
    known = adaptable(limits.config)
    foreign = sorted(set(factors) - set(known))
    if foreign:
        _refuse_dropped(
            foreign,
            "the model has no such modules, or its router, which takes none; check that the adapter was trained on it",
        )
    dropped = sorted(module for module in factors if not is_prepared(module, limits.targets))
    if not dropped:
        return
    absent = sorted({target_of(module) for module in dropped} - set(limits.targets))
    if absent == [EXPERTS] and limits.experts_remedy is not None:
        _refuse_dropped(dropped, limits.experts_remedy)
    _refuse_dropped(dropped, f"start the server with --lora-target-modules {' '.join([*limits.targets, *absent])}")


def _refuse_dropped(names: Sequence[str], how: str) -> NoReturn:
    raise AdapterError(f"it has {len(names)} module(s) that would be ignored ({first_of(names)}): {how}")


def _check_shapes(factors: dict[str, dict[str, Factor]], settings: Settings, limits: Limits) -> None:
    known, wrong, halves, kinds = adaptable(limits.config), [], [], []
    for module, pair in sorted(factors.items()):
        out_features, in_features = known[module]
        rank = settings.rank_of(module)
        if len(pair) < len("AB"):
            halves.append(f"{module} has only lora_{next(iter(pair))}")
        for letter, wanted in (("A", (rank, in_features)), ("B", (out_features, rank))):
            factor = pair.get(letter)
            if factor is None:
                continue
            if factor.dtype not in _FLOATS or factor.is_embedding != (module == EMBEDDING_MODULE):
                kinds.append(f"{factor.name} of {factor.dtype}")
            if factor.shape != wanted:
                wrong.append(f"{factor.name} is {list(factor.shape)}, wanted is {list(wanted)}")
    if halves:
        raise AdapterError(f"{len(halves)} module(s) lack a factor ({first_of(halves)}); save the adapter again")
    if kinds:
        raise AdapterError(
            f"{len(kinds)} factor(s) are of a kind that PEFT does not store ({first_of(kinds)}), wanted are "
            f"{', '.join(_FLOATS)}, and lora_embedding_A and _B for the embedding; save the adapter again"
        )
    if wrong:
        base = f" ({_short(settings.base)})" if settings.base else ""
        raise AdapterError(
            f"{len(wrong)} factor(s) are of the wrong shape ({first_of(wrong)}): trained on another model{base} or "
            f"with another rank than r={settings.rank}; serve it with the model that it was trained on"
        )


def _check_experts(factors: dict[str, dict[str, Factor]], settings: Settings, limits: Limits) -> None:
    """vLLM stacks the experts of a layer, so they must all be there, and those of one projection have one rank."""
    routed = [module for module in factors if is_routed(module)]
    if not routed:
        return
    if settings.use_rslora and not limits.scales_each_module:
        raise AdapterError(
            "use_rslora=true is ignored by this vLLM for routed experts; run `pip install -U vllm`, or merge the "
            "adapter into the checkpoint"
        )
    layers = {layer_of(module) for module in routed}
    lacking = sorted(m for m in adaptable(limits.config) if is_routed(m) and layer_of(m) in layers and m not in factors)
    if lacking:
        raise AdapterError(
            f"{len(lacking)} module(s) of routed experts are missing ({first_of(lacking)}), and vLLM takes those of a "
            "layer all or not at all; train it on all experts and projections, or merge it into the checkpoint"
        )
    ranks = Counter(
        (layer, leaf) for layer, leaf, _ in {(layer_of(m), m.rpartition(".")[2], settings.rank_of(m)) for m in routed}
    )
    mixed = sorted(f"layer {layer}, {leaf}" for (layer, leaf), count in ranks.items() if count > 1)
    if mixed:
        raise AdapterError(
            f"the routed experts of {first_of(mixed)} have different ranks, which vLLM cannot serve; give all experts "
            "of a projection one rank, or merge the adapter into the checkpoint"
        )


# ---- its values ----------------------------------------------------------------------------------------------------


def _check_values(file: Path, factors: dict[str, dict[str, Factor]], settings: Settings, limits: Limits) -> None:
    """One NaN in a KV cache can spoil the answers to requests that come later, whatever they ask."""
    import torch

    dtype = getattr(torch, limits.dtype)
    largest, bad = torch.finfo(dtype).max, []
    norm = functools.partial(torch.linalg.vector_norm, dtype=torch.float32)
    with _opened(file) as opened:
        for module, pair in sorted(factors.items()):
            a, b = (opened.get_tensor(pair[letter].name).to(dtype) for letter in "AB")
            scale = abs(settings.scale_of(module))
            # Cauchy and Schwarz: no element of the change is larger. Of something that is not finite, neither is this.
            change = scale * norm(b, dim=1).max() * norm(a, dim=0).max()
            if not change < largest or not scale * b.abs().max() < largest:
                bad.append(module)
    if bad:
        raise AdapterError(
            f"{len(bad)} module(s) have values that are NaN, infinite or too large for {limits.dtype} "
            f"({first_of(bad)}), with which every answer would be wrong; train it again, or serve it with another "
            "--dtype"
        )
