"""What each module may import, and where vLLM may be changed. The direction of imports is in .importlinter."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "vllm_bailing"
# What a module must not bring into a process that imports it.
WITHOUT = {
    "vllm_bailing": ["vllm", "torch", "transformers", "safetensors", "typer", "rich"],
    "vllm_bailing.errors": ["vllm", "torch", "transformers", "safetensors"],
    "vllm_bailing.units": ["vllm", "torch", "transformers", "safetensors"],
    "vllm_bailing.rope": ["vllm", "torch", "transformers", "safetensors"],
    "vllm_bailing.reasoning": ["vllm", "torch", "transformers"],
    "vllm_bailing.tool_calls": ["vllm", "torch", "transformers"],
    "vllm_bailing.control_tokens": ["vllm", "torch", "transformers"],
    "vllm_bailing.config": ["vllm"],
    "vllm_bailing.tensor_names": ["vllm"],
    "vllm_bailing.checkpoint": ["vllm"],
    "vllm_bailing.checkpoint_audit": ["vllm"],
    "vllm_bailing.likely_causes": ["vllm"],
    "vllm_bailing.layouts": ["vllm"],
    "vllm_bailing.adapters": ["vllm"],
    "vllm_bailing.adapter_audit": ["vllm"],
    "vllm_bailing.dequantize": ["vllm"],
    "vllm_bailing.processor": ["vllm", "torch", "transformers"],
    "vllm_bailing.draft_target": ["vllm"],
    "vllm_bailing.reference": ["vllm"],
    "vllm_bailing.reference_layers": ["vllm"],
    "vllm_bailing.plugin.supported_versions": ["vllm", "torch", "transformers"],
    "vllm_bailing.plugin.patches": ["vllm", "torch", "transformers"],
    "vllm_bailing.planning.plan": ["vllm"],
    "vllm_bailing.planning.training": ["vllm"],
    "vllm_bailing.training.run": ["vllm"],
    "vllm_bailing.report.page": ["vllm", "torch"],
    "vllm_bailing.cli": ["vllm", "torch", "transformers"],
}
# Modules that registration imports, or that must answer at once: torch comes when it computes. (transformers imports
# it by itself, so this looks at our own imports.)
WITHOUT_TORCH = "config rope folders json_files tensor_names layouts checkpoint checkpoint_audit likely_causes"
WITHOUT_TORCH += " adapters adapter_audit dequantize draft_target processor"
WITHOUT_TORCH += " plugin/patches plugin/checks plugin/speculation plugin/lora plugin/agreement plugin/nodes"
WITHOUT_TORCH += " planning/gpus planning/memory planning/plan planning/request planning/choice planning/traffic"
WITHOUT_TORCH += " planning/serve planning/roofline planning/training tools/doctor tools/verify tools/chat tools/demo"
WITHOUT_TORCH += " planning/cpu tools/doctor_processor cli/plan_cpu"
WITHOUT_TORCH += " tools/quantize tools/draft_vocab tools/info tools/prompts cli/__init__"
WITHOUT_TORCH += " balance/recording balance/report balance/simulate balance/trace cli/balance"
WITHOUT_TORCH += " report/inputs report/live report/sections report/pictures report/page"


MARKS = ("Differs:  ", "Upstream: ", "Remove:   ")


@pytest.fixture(scope="module")
def imported():
    """{module: what importing it alone brought in}, each from a fork of a Python that is bare as far as it matters."""
    code = """
import importlib, json, os, sys
answers, without = {}, json.loads(sys.argv[1])
for name in sorted(without, key=lambda name: "torch" not in without[name]):
    if "torch" not in without[name]:
        import transformers, transformers.modeling_utils, torch  # once for all that may import them
    reader, writer = os.pipe()
    if not os.fork():
        importlib.import_module(name)
        os.write(writer, json.dumps([top for top in sys.modules if "." not in top]).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answers[name] = json.loads(pipe.read() or "null")
    os.wait()
print(json.dumps(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(WITHOUT)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", WITHOUT)
def test_importing_a_module_brings_nothing_heavy(module, imported):
    assert imported[module] is not None, f"{module} cannot be imported"
    assert not set(WITHOUT[module]) & set(imported[module])


@pytest.mark.parametrize("module", WITHOUT_TORCH.split())
def test_torch_is_imported_where_it_computes(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in names} & {"torch", "vllm"}


def changes_of_others(source: str) -> list[str]:
    """Assignments to attributes or entries of what a module imported from vLLM or transformers, as text."""
    tree = ast.parse(source)
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("vllm", "transformers"):
            foreign |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.partition(".")[0] in ("vllm", "transformers")]
            foreign |= {alias.asname or alias.name.partition(".")[0] for alias in names}
    changed = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            root = target
            while isinstance(root, (ast.Attribute, ast.Subscript)):
                root = root.value
            if root is not target and isinstance(root, ast.Name) and root.id in foreign:
                changed.append(ast.unparse(target))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "mock.patch.object"):
            first = node.args[0]
            while isinstance(first, ast.Attribute):
                first = first.value
            if isinstance(first, ast.Name) and first.id in foreign:
                changed.append(ast.unparse(node))
    return changed


def test_vllm_is_changed_in_one_file():
    found = {}
    for file in PACKAGE.rglob("*.py"):
        if changes := changes_of_others(file.read_text(encoding="utf-8")):
            found[str(file.relative_to(PACKAGE))] = changes
    assert set(found) == {"plugin/patches.py", "config.py"}
    # transformers reads configurations also where there is no vLLM.
    assert set(found["config.py"]) == {"PretrainedConfig.get_config_dict"}


def test_the_list_of_patches_names_every_one():
    text = (PACKAGE / "plugin" / "patches.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    listed = ast.get_docstring(tree) or ""
    public = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    assert [name for name in public if f"`{name}`" not in listed] == ["hf_config_override"]
    assert "SpeculativeConfig.hf_config_override" in listed


@pytest.mark.parametrize("file", ["patches.py", "shims.py"])
def test_every_patch_and_shim_says_what_differs_where_and_until_when(file):
    tree = ast.parse((PACKAGE / "plugin" / file).read_text(encoding="utf-8"))
    public = {
        node.name: ast.get_docstring(node) or ""
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    several = {"patch_for_model", "hf_config_override"}  # calls others; is put in place by another
    silent = {name for name, text in public.items() if not all(f"\n{word}" in text for word in MARKS)}
    assert silent <= several


def test_unit_tests_import_no_vllm_and_start_no_process_that_does():
    """It takes longer than a hundred of them: such tests belong into the other rooms. See also unit/conftest.py."""
    for file in (ROOT / "tests" / "unit").glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not modules & {"tests.support.engine", "tests.support.warm", "tests.support.preload"}, file.name
        assert not {module for module in modules if module and module.split(".")[0] == "vllm"}, file.name
        assert "run_command" not in file.read_text(), file.name


def test_a_change_of_vllm_elsewhere_would_be_seen():
    code = "from vllm.v1.sample import rejection_sampler\nrejection_sampler.expand_batch_to_tokens = print\n"
    assert changes_of_others(code) == ["rejection_sampler.expand_batch_to_tokens"]
    code = "def f():\n    import vllm.envs as envs\n    setattr(envs, 'VLLM_X', 1)\n"
    assert changes_of_others(code) == ["setattr(envs, 'VLLM_X', 1)"]


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("plugin/checks.py", "from vllm_bailing.cli import output", "Imports point one way"),
        ("model.py", "from vllm_bailing.bench import runner", "Imports point one way"),
        ("tensor_names.py", "from vllm import ModelRegistry", "knows nothing of vLLM"),
        ("model.py", "from vllm_bailing import reference", "do not know each other"),
        ("router.py", "from vllm_bailing import reference_layers", "do not know each other"),
        ("planning/memory.py", "import torch", "needs neither vLLM nor torch"),
        ("plugin/speculation.py", "from vllm_bailing.training import run", "Imports point one way"),
    ],
)
def test_an_import_the_wrong_way_is_refused(file, line, contract, tmp_path):
    """The rules can fail."""
    shutil.copytree(PACKAGE, tmp_path / "vllm_bailing", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    target = tmp_path / "vllm_bailing" / file
    target.write_text(target.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False)
    broken = " ".join(" ".join(done.stdout.split()).partition("Broken contracts")[2].split())
    assert done.returncode == 1 and contract in broken
