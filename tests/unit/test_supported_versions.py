"""Which vLLM versions the model is registered with, and what is looked for in those that were never tested."""

import ast
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from vllm_bailing.plugin import supported_versions

TESTED = "0.32.0"


@pytest.fixture(autouse=True)
def _no_preference(monkeypatch):
    monkeypatch.delenv(supported_versions.USE_INTREE, raising=False)


def file_of(root: Path, module: str) -> Path:
    return root.joinpath(*(module.split(".")[1:] or ["__init__"])).with_suffix(".py")


@pytest.fixture
def vllm_root(tmp_path):
    """Sources with everything that the model needs, and nothing else."""
    for number, (where, name, arguments) in enumerate(supported_versions.REQUIRED):
        folder = tmp_path / where
        folder.mkdir(parents=True, exist_ok=True)
        signature = ", ".join(["self", *(f"{argument}=None" for argument in arguments.split())])
        (folder / f"file_{number}.py").write_text(f"class {name}:\n    def __init__({signature}): ...\n")
    for module, name in supported_versions.imported_names():
        file = file_of(tmp_path, module)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as text:
            text.write(f"from somewhere import {name}\n")
    return tmp_path


def rewrite(root: Path, name: str, text: str) -> None:
    (file,) = [file for file in root.rglob("*.py") if f"class {name}:" in file.read_text()]
    file.write_text(text)


def test_the_installed_vllm_has_all_that_the_model_needs():
    assert supported_versions.missing_from_vllm() == []


def test_every_argument_that_is_passed_by_name_is_looked_for():
    """In calls of what is imported from vLLM; of a decorator with overloads the first form says nothing."""
    looked_for = {name: set(arguments.split()) for _, name, arguments in supported_versions.REQUIRED}
    passed: dict[str, set[str]] = {}
    imported = {name for _, name in supported_versions.imported_names()} - {"support_torch_compile"}
    for tree in supported_versions.model_files().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
                passed.setdefault(node.func.id, set()).update(key.arg for key in node.keywords if key.arg)
    assert [name for name, names in passed.items() if not names <= looked_for.get(name, set())] == []
    assert passed["RowParallelLinear"] and passed["Attention"]


def test_all_that_is_imported_with_the_model_classes_is_looked_at():
    names = {str(file.relative_to(ROOT / "vllm_bailing")) for file in supported_versions.model_files()}
    assert {"model.py", "mtp.py", "router.py", "plugin/weight_loading.py", "plugin/kernels/unpack.py"} <= names
    assert ("vllm", "_custom_ops") in supported_versions.imported_names()


@pytest.mark.parametrize("version", ["0.27", "0.27.1", "0.30.0+cpu", "0.32.0", "0.33.0", "0.33.7", "0.33.1.dev5+g123"])
def test_tested_versions_are_served_without_a_word(version, tmp_path):
    decided = supported_versions.decide(version, tmp_path / "not looked at")
    assert decided.active == ("BailingMoeV2ForCausalLM",)
    assert (decided.reason, decided.warning, decided.problems) == ("", "", [])


@pytest.mark.parametrize("version", ["0.26.1", "0.9.2", "0.27.0rc1", "0.26.5.dev3+gabc"])
def test_too_old_a_version_keeps_its_own_class(version, vllm_root):
    decided = supported_versions.decide(version, vllm_root)
    assert decided.active == ()
    assert "0.27" in decided.reason
    assert "pip install -U vllm`" in decided.reason


UNTESTED = ["0.34.0", "0.34.0rc1", "0.40.2+cu130", "1.0", "0.1.dev1+gabc", "0.1.dev15207+g1a2b3c.d20260101", "dev"]


@pytest.mark.parametrize("version", UNTESTED)
def test_an_untested_version_with_all_that_is_needed_is_served_with_one_warning(version, vllm_root):
    decided = supported_versions.decide(version, vllm_root)
    assert decided.active == ("BailingMoeV2ForCausalLM",)
    assert version in decided.warning
    assert "0.27 to 0.33" in decided.warning
    assert "\n" not in decided.warning


@pytest.mark.parametrize(("module", "name"), supported_versions.imported_names())
def test_an_untested_version_without_an_imported_name_keeps_its_own_class(module, name, vllm_root):
    """It must not surface as an ImportError when the model class is loaded."""
    file = file_of(vllm_root, module)
    file.write_text(file.read_text().replace(f"import {name}\n", "import something_else\n"))
    decided = supported_versions.decide("0.34.0", vllm_root)
    assert decided.active == ()
    assert decided.problems == [f"{name} is gone from {module}"]


@pytest.mark.parametrize("version", UNTESTED)
@pytest.mark.parametrize("name", [name for _, name, _ in supported_versions.REQUIRED])
def test_an_untested_version_without_a_needed_name_keeps_its_own_class(version, name, vllm_root):
    rewrite(vllm_root, name, "something_else = 1\n")
    decided = supported_versions.decide(version, vllm_root)
    assert decided.active == ()
    assert name in decided.reason
    assert "0.27 to 0.33" in decided.reason
    assert "pip install -U vllm-bailing" in decided.reason


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for _, name, arguments in supported_versions.REQUIRED for argument in arguments.split()],
)
def test_an_untested_version_without_a_needed_argument_keeps_its_own_class(name, argument, vllm_root):
    left = [
        one
        for _, other, arguments in supported_versions.REQUIRED
        if other == name
        for one in arguments.split()
        if one != argument
    ]
    rewrite(vllm_root, name, f"class {name}:\n    def __init__(self, {', '.join([*left, 'new'])}): ...\n")
    decided = supported_versions.decide("0.34.0", vllm_root)
    assert decided.active == ()
    assert decided.problems == [f"{name} takes no argument {argument!r}"]


@pytest.mark.parametrize(
    "text",
    [
        "def {name}({arguments}, new=None): ...",
        "def {name}(*, {arguments}): ...",
        "def {name}(**everything): ...",
        "class {name}(Base): ...",
        "class {name}(Base):\n    def __init__(self, *args, **kwargs): ...",
    ],
    ids=["more arguments", "keywords only", "any keyword", "inherited constructor", "passes on"],
)
def test_the_probe_accepts_every_form_that_takes_the_arguments(text, vllm_root):
    ((arguments,),) = [[given] for _, name, given in supported_versions.REQUIRED if name == "get_rope"]
    rewrite(vllm_root, "get_rope", text.format(name="get_rope", arguments=", ".join(arguments.split())))
    assert supported_versions.missing_from_vllm(vllm_root) == []


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_vllms_own_class_stays_on_request(value, monkeypatch, vllm_root):
    monkeypatch.setenv(supported_versions.USE_INTREE, value)
    decided = supported_versions.decide(TESTED, vllm_root)
    assert decided.active == ()
    assert supported_versions.USE_INTREE in decided.reason


@pytest.mark.parametrize("value", ["0", ""])
def test_an_unset_request_changes_nothing(value, monkeypatch, vllm_root):
    monkeypatch.setenv(supported_versions.USE_INTREE, value)
    assert supported_versions.decide(TESTED, vllm_root).active


def test_the_minimum_is_the_one_that_the_package_depends_on():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"vllm>={supported_versions.MINIMUM_VLLM}"' in pyproject
    assert supported_versions.CHECKED_VLLM[0] == supported_versions.MINIMUM_VLLM
