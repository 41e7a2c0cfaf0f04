"""Registration with vLLM, and everything that depends on vLLM's version.

What this package changes in other packages' objects, all of it scoped to configurations that name a BailingMoeV2
architecture:

- `vllm.ModelRegistry`: the architecture points at `vllm_bailing.model` (public API);
- `ReasoningParserManager` and `ToolParserManager` of vLLM: the name "bailing" (public API);
- `transformers.AutoConfig`: model type "bailing_moe_v2" (public API);
- `transformers.PretrainedConfig.get_config_dict`: wrapped, see `config.register_with_transformers`;
- `vllm.config.speculative.SpeculativeConfig.hf_config_override` and `.__post_init__`: wrapped, see `settings`;
- `vllm.model_executor.models.config.MODELS_CONFIG_MAP`: an entry for the architecture, see `settings.check_files`;
- `sys.excepthook` in the `vllm` command: wrapped, see `refusals`;
- `vllm.v1.sample.rejection_sampler.expand_batch_to_tokens` in CPU engines that speculate for this model: see
  `sample_drafts_right_on_cpu`;
- `bgmv_shrink` and its two siblings in `vllm.lora.ops.torch_ops.lora_ops` and `vllm.lora.punica_wrapper.punica_cpu`, in
  CPU engines that serve this model with adapters: see `adapt_only_their_requests_on_cpu`;
- the manager of adapters of this model: see `lora.WholeAdapters`;
- quantisation methods and norms of this model's own layers on CPU: see `repack_experts_on_reload` and `cpu`;
- `VLLM_TUNED_CONFIG_FOLDER` in GPU processes that build this model: see `settings.use_shipped_tables`;
- `current_platform.get_device_name`, for the length of a look-up by `vllm-bailing tune`: see `device_called`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import logging
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_bailing import __version__

MINIMUM_VLLM = "0.27"
CHECKED_VLLM = ("0.27", "0.33")  # first and last minor release checked; README says how each was
USE_INTREE = "VLLM_BAILING_USE_INTREE"
PARSER = "bailing"  # for --reasoning-parser and --tool-call-parser

ARCHITECTURES = {"BailingMoeV2ForCausalLM": "vllm_bailing.model:BailingMoeV2ForCausalLM"}
DRAFT_ARCHITECTURES = {"BailingMoeV2MTPModel": "vllm_bailing.mtp:BailingMoeV2MTPModel"}  # vLLM has none of its own

# The arguments that model.py passes by name: file or folder below vllm/, symbol, arguments. That every imported name is
# there is looked up besides, see `imported_names`.
REQUIRED = (
    (
        "model_executor/layers/fused_moe",
        "FusedMoEFactory",
        "num_experts top_k hidden_size intermediate_size renormalize use_grouped_topk num_expert_group topk_group "
        "quant_config prefix scoring_func routed_scaling_factor e_score_correction_bias enable_eplb "
        "num_redundant_experts is_sequence_parallel router_logits_dtype gate shared_experts",
    ),
    ("model_executor/layers/fused_moe", "GateLinear", "input_size output_size out_dtype params_dtype prefix"),
    ("model_executor/layers/rotary_embedding", "get_rope", "head_size max_position is_neox_style rope_parameters"),
    ("model_executor/layers/attention", "Attention", "num_kv_heads cache_config quant_config prefix"),
    ("model_executor/layers/linear", "QKVParallelLinear", "bias quant_config prefix"),
    ("model_executor/layers/linear", "RowParallelLinear", "bias quant_config reduce_results prefix"),
    ("model_executor/layers/linear", "MergedColumnParallelLinear", "bias quant_config prefix"),
    ("model_executor/layers", "ParallelLMHead", "quant_config prefix"),
)
_MODEL_FILES = ("model.py", "mtp.py", "cpu.py", "fusion.py")


@dataclass
class Status:
    """What `register` decided in this process.

    Attributes:
        vllm: Version of vLLM, or None where it is not installed.
        active: Architectures that this package serves.
        reason: Why `active` is empty; empty otherwise.
        warning: What the user was warned of; empty if nothing.
    """

    vllm: str | None = None
    active: tuple[str, ...] = ()
    reason: str = ""
    warning: str = ""
    problems: list[str] = field(default_factory=list)


_status: Status | None = None


def status() -> Status:
    """The decision of `register`, which is called if it was not yet."""
    return _status or register()


def register() -> Status:
    """Register the configuration and, where this vLLM allows it, the model classes. Safe to call again."""
    global _status
    if _status is not None:
        return _status
    from vllm.logger import init_logger
    from vllm.version import __version__ as vllm_version  # pyright: ignore[reportPrivateImportUsage]

    from vllm_bailing.config import register_with_transformers

    # A child of vLLM's logger, whose level and format its users have set up.
    logger = init_logger("vllm.plugins.bailing")
    decided = decide(vllm_version)
    register_with_transformers()
    if decided.active:
        from vllm import ModelRegistry

        from vllm_bailing import refusals, settings

        refusals.shorten_in_vllm_command()
        for architecture in decided.active:
            ModelRegistry.register_model(architecture, ARCHITECTURES[architecture])
        try:
            settings.install()
            for architecture, where in DRAFT_ARCHITECTURES.items():
                ModelRegistry.register_model(architecture, where)
        except (ImportError, AttributeError) as error:
            decided.warning = f"no MTP drafts on this vLLM, whose settings differ from the checked ones: {error}"
    try:
        register_parsers()
    except Exception as error:  # a server can do without
        decided.warning = decided.warning or f"no parsers named {PARSER!r}: {type(error).__name__}: {error}"
    with _visible(logger):
        if decided.active:
            logger.info(
                "vllm-bailing %s replaces vLLM %s's %s (set %s=1 to keep vLLM's own)",
                __version__,
                vllm_version,
                ", ".join(decided.active),
                USE_INTREE,
            )
        else:
            logger.log(
                logging.INFO if _intree_wanted() else logging.WARNING,
                "vllm-bailing %s leaves vLLM %s's own model class in place: %s",
                __version__,
                vllm_version,
                decided.reason,
            )
        if decided.warning:
            logger.warning("vllm-bailing %s: %s", __version__, decided.warning)
    _status = decided
    return decided


def _intree_wanted() -> bool:
    return os.environ.get(USE_INTREE, "0") not in ("", "0")


@contextlib.contextmanager
def _visible(logger: logging.Logger) -> Iterator[None]:
    """Let `logger` print what vLLM's logging settings allow, also before vLLM has applied them.

    Differs:  vLLM sets up logging after it has loaded the plugins, so that their INFO lines go nowhere; older ones did
              it on import.
    Upstream: `configure_logging_if_needed`, first seen in 0.32.
    Remove:   when plugins are loaded after it.
    """
    from vllm import envs

    if logging.getLogger("vllm").handlers or not envs.VLLM_CONFIGURE_LOGGING:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    before = logger.level, logger.propagate
    logger.setLevel(envs.VLLM_LOGGING_LEVEL)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def decide(vllm_version: str, vllm_root: Path | None = None) -> Status:
    """Whether this package can serve its architectures on `vllm_version`; looks at sources, imports nothing.

    Args:
        vllm_version: As vLLM reports it; anything after a "+" is ignored.
        vllm_root: Folder of the `vllm` package; the installed one when left out.
    """
    from packaging.version import InvalidVersion, Version

    checked = f"{CHECKED_VLLM[0]} to {CHECKED_VLLM[1]}"
    if _intree_wanted():
        return Status(vllm_version, reason=f"{USE_INTREE} is set")
    try:
        version = Version(vllm_version)
    except InvalidVersion:
        version = None
    if version is not None and version.is_devrelease and version.release < (0, 2):
        version = None  # what a build from a checkout without tags calls itself; its sources have to tell what it is
    if version is not None and version < Version(MINIMUM_VLLM):
        return Status(vllm_version, reason=f"it needs vLLM {MINIMUM_VLLM} or newer; run `pip install -U vllm`")
    if version is not None and version.release[:2] <= Version(CHECKED_VLLM[1]).release[:2]:
        return Status(vllm_version, active=tuple(ARCHITECTURES))
    problems = probe(vllm_root)
    if problems:
        reason = (
            f"this vLLM differs from the checked ones ({checked}): {problems[0]}; run `pip install -U vllm-bailing`"
        )
        return Status(vllm_version, reason=reason, problems=problems)
    warning = f"vLLM {vllm_version} is newer than the checked ones ({checked}); what it needs was found, so it goes on"
    return Status(vllm_version, active=tuple(ARCHITECTURES), warning=warning)


def probe(vllm_root: Path | None = None) -> list[str]:
    """What is missing from vLLM's sources; empty if nothing. Reads files, since importing them would cost seconds."""
    if vllm_root is None:
        import vllm

        vllm_root = Path(vllm.__path__[0])
    problems = [
        problem for where, name, wanted in REQUIRED if (problem := _missing(vllm_root / where, name, wanted.split()))
    ]
    for module, name in imported_names():
        base = vllm_root.joinpath(*module.split(".")[1:])
        files = [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]
        if not any(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for file in files):
            problems.append(f"{name} is gone from {module}")
    return problems


def imported_names() -> list[tuple[str, str]]:
    """(module, name) of all that the model classes import from vLLM."""
    folder = Path(__file__).parent
    trees = [ast.parse((folder / file).read_text(encoding="utf-8")) for file in _MODEL_FILES]
    imports = [node for tree in trees for node in tree.body if isinstance(node, ast.ImportFrom)]
    found = {(node.module or "", one.name) for node in imports for one in node.names}
    return sorted((module, name) for module, name in found if module.startswith("vllm."))


def _missing(where: Path, name: str, wanted: list[str]) -> str:
    files = sorted(where.rglob("*.py")) if where.is_dir() else [where.with_suffix(".py")]
    for file in files:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if f"def {name}(" not in text and f"class {name}" not in text:
            continue
        for node in ast.parse(text).body:
            if getattr(node, "name", None) != name:
                continue
            if isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
                if not methods:  # inherits its constructor, or needs none
                    return ""
                node = methods[0]
            if not isinstance(node, ast.FunctionDef) or node.args.kwarg:
                return ""
            found = {argument.arg for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs}
            lost = [argument for argument in wanted if argument not in found]
            return f"{name} takes no argument {lost[0]!r}" if lost else ""
    return f"{name} is gone from vllm/{'/'.join(where.parts[-3:])}"


def register_parsers() -> None:
    """Make `--reasoning-parser bailing` and `--tool-call-parser bailing` known, where this process has such flags.

    Importing vLLM's tool parsers takes seconds, so processes that do without them, the workers, are spared.
    """
    for module, manager, parser in (
        ("vllm.reasoning", "ReasoningParserManager", "BailingReasoningParser"),
        ("vllm.tool_parsers", "ToolParserManager", "BailingToolParser"),
    ):
        if module in sys.modules:
            getattr(sys.modules[module], manager).register_lazy_module(PARSER, "vllm_bailing.parsers", parser)


def protocol() -> Any:
    """vLLM's module with `DeltaMessage` and the other parts of an answer.

    Differs:  moved from the OpenAI server's folder in 0.29.
    Remove:   when the oldest supported version has it at the new place.
    """
    return _first_of("vllm.entrypoints.generate.base.protocol", "vllm.entrypoints.openai.engine.protocol")


def make_tool_call_id() -> str:
    """A fresh id for a tool call, as vLLM makes them.

    Differs:  moved to the renderers after 0.31.
    Remove:   when the oldest supported version has it there.
    """
    return _first_of("vllm.renderers.chat_utils", "vllm.entrypoints.chat_utils").make_tool_call_id()


def _first_of(*modules: str) -> Any:
    for module in modules[:-1]:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(module)
    return importlib.import_module(modules[-1])


def rope_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """`parameters` as this vLLM's `get_rope` reads them.

    Differs:  older vLLM ignores YaRN's `attention_factor`, `mscale` and `mscale_all_dim`; it takes the finished factor
              as `attn_factor` with `apply_yarn_scaling` off.
    Upstream: `YaRNScalingRotaryEmbedding.__init__`; takes the three keys in 0.30, not in 0.27.
    Remove:   when the oldest supported version takes them.
    """
    from vllm.model_executor.layers.rotary_embedding.yarn_scaling_rope import YaRNScalingRotaryEmbedding

    known = inspect.signature(YaRNScalingRotaryEmbedding.__init__).parameters
    if parameters["rope_type"] != "yarn" or "attention_factor" in known:
        return parameters
    factor, attention_factor = parameters["factor"], parameters.get("attention_factor")
    mscale, mscale_all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention_factor is None and mscale and mscale_all_dim:
        growth = math.log(factor)
        attention_factor = (0.1 * mscale * growth + 1) / (0.1 * mscale_all_dim * growth + 1)
    if attention_factor is None:
        return parameters
    return {**parameters, "attn_factor": attention_factor, "apply_yarn_scaling": False}


def repack_experts_on_reload(routed_experts: Any) -> None:
    """Make `reload_weights` leave the same model on CPU.

    Differs:  vLLM packs expert weights for its CPU kernel only while the kernel is first built; on a reload it copies
              the plain weights over the packed ones, and every answer after that is wrong.
    Upstream: `UnquantizedFusedMoEMethod._setup_kernel`, up to 0.33 at least.
    Remove:   when that calls the experts' `process_weights_after_loading` on weight updates too.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
    from vllm.platforms import current_platform

    method = routed_experts.quant_method
    if not current_platform.is_cpu() or not isinstance(method, UnquantizedFusedMoEMethod):
        return
    process = method.process_weights_after_loading

    def process_weights_after_loading(layer: Any) -> None:
        method.moe_kernel = None  # what vLLM takes for "the first time"
        process(layer)

    method.process_weights_after_loading = process_weights_after_loading


def portable_cpu_experts() -> Any:
    """vLLM's class of experts for CPUs without instructions of their own; None where it is of another kind.

    Differs:  experts for CPUs came as one function with the router in it, to which no kernel can be given.
    Upstream: `CPUUnquantizedExperts` is one of `FusedMoEExpertsModular` in 0.32, not in 0.27.
    Remove:   when the oldest supported version has it so, or when vLLM takes its AVX-512 bf16 kernels without AMX.
    """
    from vllm.model_executor.layers.fused_moe import modular_kernel

    try:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    except ImportError:
        return None
    return CPUUnquantizedExperts if issubclass(CPUUnquantizedExperts, modular_kernel.FusedMoEExpertsModular) else None


@contextlib.contextmanager
def device_called(name: str | None) -> Iterator[None]:
    """Let vLLM's look-up of tables of the fused experts take this machine's GPU for the one called `name`, if any.

    Differs:  it takes the device's name from the machine that it runs on, and remembers what it found.
    Upstream: `get_config_file_name` and `get_moe_configs`, in 0.27 to 0.33.
    Remove:   when they take the name as an argument.
    """
    from unittest import mock

    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs
    from vllm.platforms import current_platform
    from vllm.utils.platform_utils import get_device_name_as_file_name

    if name is None:
        yield
        return
    remembering = (get_device_name_as_file_name, get_moe_configs)
    try:
        with mock.patch.object(current_platform, "get_device_name", lambda *_args: name):
            for function in remembering:
                function.cache_clear()
            yield
    finally:
        for function in remembering:
            function.cache_clear()


@contextlib.contextmanager
def experts_without_lora_on_cpu() -> Iterator[None]:
    """Let experts be built as if no adapters were wanted, which on CPU they cannot have; other layers keep theirs.

    Differs:  with LoRA enabled vLLM picks its Triton experts for every layer, adapted or not, and CPUs have no Triton.
    Upstream: `select_unquantized_moe_backend`, in 0.27 to 0.33.
    Remove:   when vLLM's CPU experts take adapters, or are chosen where experts are no LoRA target.
    """
    from vllm.config import get_current_vllm_config
    from vllm.platforms import current_platform

    vllm_config = get_current_vllm_config()
    lora_config = vllm_config.lora_config
    if lora_config is None or not current_platform.is_cpu():
        yield
        return
    vllm_config.lora_config = None
    try:
        yield
    finally:
        vllm_config.lora_config = lora_config


def adapt_only_their_requests_on_cpu() -> None:
    """Keep adapters away from requests without one that share a batch with them.

    Differs:  such rows have index -1, with which vLLM's CPU operations pick the last adapter.
    Upstream: pull request 48421, in 0.33.
    Remove:   when the oldest supported version has it; tests/test_lora.py mixes the two in a batch.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice"):
        operation = getattr(lora_ops, name)
        if getattr(operation, "masks_base_rows", False):
            continue
        masked = _masking_base_rows(operation)
        for module in (lora_ops, punica_cpu):
            setattr(module, name, masked)


def _masking_base_rows(operation: Any) -> Any:
    def masked(inputs: Any, weights: Any, output: Any, indices: Any, *rest: Any, **options: Any) -> None:
        operation(inputs.masked_fill((indices < 0).unsqueeze(1), 0), weights, output, indices, *rest, **options)

    masked.masks_base_rows = True  # pyright: ignore[reportFunctionMemberAccess]
    return masked


def sample_drafts_right_on_cpu() -> None:
    """Make sampled answers keep their distribution when a CPU engine speculates.

    Differs:  vLLM's stand-in for a Triton kernel writes float results, such as the temperature of every draft token,
              into a copy that is dropped. Logits are then divided by whatever was in memory, with any kind of draft.
    Upstream: `_expand_kernel_impl` in `vllm/utils/cpu_triton_utils.py`, in 0.32.
    Remove:   when that returns floats; tests/test_speculation.py compares the distributions.
    """
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = _expand_batch_to_tokens


def _expand_batch_to_tokens(
    x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    """Values [num_tokens] of the request that each token belongs to, from `x` [batch], one value replaced."""
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)
