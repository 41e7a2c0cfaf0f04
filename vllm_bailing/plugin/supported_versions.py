"""Which versions of vLLM the architecture is served on, and what is looked for in one that was never checked.

How to support a new one, step by step: CONTRIBUTING.md, "A new vLLM release".
"""

from __future__ import annotations

import ast
import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

MINIMUM_VLLM = "0.27"
CHECKED_VLLM = ("0.27", "0.33")  # first and last minor release checked; README says how each was
USE_INTREE = "VLLM_BAILING_USE_INTREE"
PARSER = "bailing"  # for --reasoning-parser and --tool-call-parser
# For --tokenizer-mode, with the classes of control_tokens.py.
TOKENIZER_MODES = {"bailing_split": "SplitsControlTokens", "bailing_refuse": "RefusesControlTokens"}
ARCHITECTURES = {"BailingMoeV2ForCausalLM": "vllm_bailing.model:BailingMoeV2ForCausalLM"}
DRAFT_ARCHITECTURES = {"BailingMoeV2MTPModel": "vllm_bailing.mtp:BailingMoeV2MTPModel"}  # vLLM has none of its own
# The arguments that model.py and router.py pass by name: file or folder below vllm/, symbol, arguments. That every
# imported name is there is looked up besides, see `imported_names`.
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
    ("model_executor/layers/layernorm", "RMSNorm", "eps dtype"),
    ("model_executor/layers/linear", "QKVParallelLinear", "bias quant_config prefix"),
    ("model_executor/layers/linear", "RowParallelLinear", "bias quant_config reduce_results prefix disable_tp"),
    ("model_executor/layers/linear", "MergedColumnParallelLinear", "bias quant_config prefix disable_tp"),
    ("model_executor/layers/linear", "ReplicatedLinear", "bias quant_config prefix"),
    ("model_executor/layers", "VocabParallelEmbedding", "quant_config prefix"),
    ("model_executor/layers", "ParallelLMHead", "quant_config prefix"),
    ("model_executor/models/utils", "WeightsMapper", "orig_to_new_prefix orig_to_new_stacked"),
    ("model_executor/models/utils", "make_layers", "prefix"),
)


@dataclass
class Decision:
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


def decide(vllm_version: str, vllm_root: Path | None = None) -> Decision:
    """Whether this package can serve its architectures on `vllm_version`; looks at sources, imports nothing.

    Args:
        vllm_version: As vLLM reports it; anything after a "+" is ignored.
        vllm_root: Folder of the `vllm` package; the installed one when left out.
    """
    from packaging.version import InvalidVersion, Version

    checked = f"{CHECKED_VLLM[0]} to {CHECKED_VLLM[1]}"
    if wants_intree():
        return Decision(vllm_version, reason=f"{USE_INTREE} is set")
    try:
        version = Version(vllm_version)
    except InvalidVersion:
        version = None
    if version is not None and version.is_devrelease and version.release < (0, 2):
        version = None  # what a build from a checkout without tags calls itself; its sources must tell what it is
    if version is not None and version < Version(MINIMUM_VLLM):
        return Decision(vllm_version, reason=f"it needs vLLM {MINIMUM_VLLM} or newer; run `pip install -U vllm`")
    if version is not None and version.release[:2] <= Version(CHECKED_VLLM[1]).release[:2]:
        return Decision(vllm_version, active=tuple(ARCHITECTURES))
    problems = missing_from_vllm(vllm_root)
    if problems:
        reason = (
            f"this vLLM differs from the checked ones ({checked}): {problems[0]}; run `pip install -U vllm-bailing`"
        )
        return Decision(vllm_version, reason=reason, problems=problems)
    warning = f"vLLM {vllm_version} is newer than the checked ones ({checked}); what it needs was found, so it goes on"
    return Decision(vllm_version, active=tuple(ARCHITECTURES), warning=warning)


def wants_intree() -> bool:
    """Whether the user asks for vLLM's own class."""
    return os.environ.get(USE_INTREE, "0") not in ("", "0")


def missing_from_vllm(vllm_root: Path | None = None) -> list[str]:
    """What is missing from vLLM's sources; empty if nothing. Reads files, since importing them would cost seconds."""
    if vllm_root is None:
        import vllm

        vllm_root = Path(vllm.__path__[0])
    problems = [
        problem
        for where, name, arguments in REQUIRED
        if (problem := _missing(vllm_root / where, name, arguments.split()))
    ]
    for module, name in imported_names():
        base = vllm_root.joinpath(*module.split(".")[1:])
        files = [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]
        is_module = (base / f"{name}.py").is_file() or (base / name).is_dir()
        if not is_module and not any(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8")) for file in files):
            problems.append(f"{name} is gone from {module}")
    return problems


@functools.cache
def imported_names() -> tuple[tuple[str, str], ...]:
    """(module, name) of all that the model classes, and what they import of this package, import from vLLM."""
    names = {
        (node.module or "", alias.name)
        for tree in model_files().values()
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    return tuple(sorted((module, name) for module, name in names if module.partition(".")[0] == "vllm"))


def model_files() -> dict[Path, ast.Module]:
    """This package's files that are imported with the model classes, as they stand and parsed."""
    package = Path(__file__).parents[1]
    found: dict[Path, ast.Module] = {}
    waiting = [package / "model.py", package / "mtp.py"]
    while waiting:
        file = waiting.pop()
        if file in found or not file.is_file():
            continue
        found[file] = ast.parse(file.read_text(encoding="utf-8"))
        for node in found[file].body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package.name:
                module = package.parent.joinpath(*(node.module or "").split("."))
                waiting += [module.with_suffix(".py"), *(module / f"{alias.name}.py" for alias in node.names)]
    return found


def _missing(where: Path, name: str, arguments: list[str]) -> str:
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
            accepted = {argument.arg for argument in node.args.posonlyargs + node.args.args + node.args.kwonlyargs}
            lost = [argument for argument in arguments if argument not in accepted]
            return f"{name} takes no argument {lost[0]!r}" if lost else ""
    return f"{name} is gone from vllm/{'/'.join(where.parts[-3:])}"
