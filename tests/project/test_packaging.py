"""The built wheel and sdist: their contents, and that the wheel works where nothing else of the project is."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

import check_versions
import pytest
from filelock import FileLock
from markdown_it import MarkdownIt
from packaging.requirements import Requirement

import vllm_bailing
from tests.support.paths import ROOT

VERSION = vllm_bailing.__version__
DATA = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_bailing" / "assets").rglob("*") if path.is_file()}


def build(source: Path, folder: Path, kind: str) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder), str(source)]
    with FileLock(ROOT / "build.lock"):  # builds write into the source tree, and two test processes may build at once
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def unpacked_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"vllm_bailing-{VERSION}"


@pytest.fixture(scope="module")
def wheel(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as package indexes and distributions do."""
    return build(unpacked_sdist, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment with this wheel, which finds vLLM in the environment of the tests.

    A plain path in a .pth file does not run the .pth files there, so the project's own editable install stays unseen.
    """
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    target = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    (target / "with_vllm.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, code: str, folder: Path) -> str:
    """What `code` prints last, run with `python` in an empty folder."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [str(python), "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = (path for kind in ("*.py", "*.cpp") for path in (ROOT / "vllm_bailing").rglob(kind))
    sources = {str(path.relative_to(ROOT)) for path in files}
    metadata = {name for name in names if name.startswith(f"vllm_bailing-{VERSION}.dist-info/")}
    assert names - metadata == sources | DATA | {"vllm_bailing/py.typed"}
    assert {
        f"vllm_bailing/assets/demo/{name}" for name in ("config.json", "tokenizer.json", "model.safetensors")
    } <= names
    assert f"vllm_bailing-{VERSION}.dist-info/licenses/LICENSE" in metadata


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = BytesParser().parsebytes(archive.read(f"vllm_bailing-{VERSION}.dist-info/METADATA"))
        entry_points = archive.read(f"vllm_bailing-{VERSION}.dist-info/entry_points.txt").decode()
    assert (metadata["Name"], metadata["Version"]) == ("vllm-bailing", VERSION)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "vllm>=0.27" in metadata.get_all("Requires-Dist", []), "an upper bound would only keep users from upgrading"
    assert "[vllm.general_plugins]\nbailing = vllm_bailing:register" in entry_points
    assert "[console_scripts]\nvllm-bailing = vllm_bailing.cli:main" in entry_points


def test_links_of_the_readme_lead_to_the_files_of_this_version(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = BytesParser().parsebytes(archive.read(f"vllm_bailing-{VERSION}.dist-info/METADATA"))
    address = dict(one.split(", ") for one in metadata.get_all("Project-URL", []))["Source"] + f"/blob/v{VERSION}/"
    assert metadata["Description-Content-Type"] == "text/markdown"
    tokens = MarkdownIt().parse(metadata.get_payload())
    links = [child.attrs["href"] for token in tokens for child in token.children or [] if child.type == "link_open"]
    inside = [link.removeprefix(address).partition("#")[0] for link in links if link.startswith(address)]
    assert len(inside) > 20 and {link for link in links if not link.startswith("https://")} == set()
    assert [path for path in inside if not (ROOT / path).is_file()] == []


def test_declared_dependencies_are_what_is_imported(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = BytesParser().parsebytes(archive.read(f"vllm_bailing-{VERSION}.dist-info/METADATA"))
    # Of every extra too: what only an extra brings is imported where it is used.
    names = {Requirement(line).name.replace("-", "_") for line in metadata.get_all("Requires-Dist", [])}
    declared = {{"pyyaml": "yaml"}.get(name, name) for name in names}
    imported: set[str] = set()
    for file in (ROOT / "vllm_bailing").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"vllm_bailing"} == declared


def test_sdist_is_sufficient_by_itself(unpacked_sdist):
    for name in ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "scripts/setup.sh", "scripts/demo.sh"):
        assert (unpacked_sdist / name).is_file(), name
    for folder in ("requirements", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (unpacked_sdist / path.relative_to(ROOT)).is_file(), path
    assert os.access(unpacked_sdist / "scripts" / "demo.sh", os.X_OK)


def test_wheel_brings_the_command(installed, tmp_path):
    done = subprocess.run(
        [str(installed.parent / "vllm-bailing"), "demo-path"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed.parents[1])


@pytest.fixture(scope="module")
def used(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What an engine in the environment of the wheel takes from where, and what it answers."""
    code = """
import json
from importlib.metadata import entry_points
import vllm_bailing
from vllm import LLM, ModelRegistry, SamplingParams
llm = LLM(str(vllm_bailing.DEMO), enforce_eager=True, dtype="float32", max_model_len=512)
plugins = entry_points(group="vllm.general_plugins")
(bailing,) = [plugin for plugin in plugins if plugin.name == "bailing"]
model = llm.llm_engine.model_config
found, _ = ModelRegistry.resolve_model_cls(["BailingMoeV2ForCausalLM"], model)
question = [{"role": "user", "content": "What is the capital of France?"}]
answer = llm.chat([question], SamplingParams(temperature=0, max_tokens=40))[0].outputs[0].text
classes = [found.__module__, type(model.hf_config).__module__]
print(json.dumps({"file": vllm_bailing.__file__, "plugin": bailing.value, "classes": classes, "answer": answer}))
"""
    return json.loads(run(installed, code, tmp_path_factory.mktemp("used")))


@pytest.mark.engine
def test_wheel_is_found_by_vllm(installed, used):
    assert Path(used["file"]).is_relative_to(installed.parents[1]), "not the wheel, but the project beside it"
    assert used["plugin"] == "vllm_bailing:register"
    assert used["classes"] == ["vllm_bailing.model", "vllm_bailing.config"]


@pytest.mark.engine
def test_wheel_answers_offline(used):
    assert used["answer"] == "The capital of France is Paris."


def test_readme_shows_the_recorded_versions():
    readme = (ROOT / "README.md").read_text()
    results = check_versions.read_results()
    assert results, "no recorded results; run scripts/dev/check_versions.py"
    assert check_versions.with_table(readme, results) == readme, "run scripts/dev/check_versions.py table --write"
