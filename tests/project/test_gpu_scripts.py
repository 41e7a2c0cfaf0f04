"""The scripts for machines with GPUs, without one: what they skip, refuse and would run; and their workflow."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

GPU = ROOT / "scripts" / "gpu"
SCRIPTS = ("smoke", "bench")
BASH = shutil.which("bash") or "bash"


@pytest.fixture
def run_script(tmp_path):
    """Runs a script with a made-up `nvidia-smi` that shows `gpus` GPUs; None: without one."""

    def run_script(
        script: str, gpus: int | None, memory_mib: int = 81559, **env: str
    ) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        tool = folder / "nvidia-smi"
        lines = ["#!/bin/sh", "case $1 in"]
        if gpus:
            listed = "\\n".join(f"GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i})" for i in range(gpus))
            lines += [
                f"-L) printf '{listed}\\n' ;;",
                # A line for each, and not at once: who takes the first one alone must not end the tool.
                f"--query-gpu=name) for _ in $(seq {gpus}); do echo 'NVIDIA H100 80GB HBM3'; sleep 0.05; done ;;",
                f"--query-gpu=memory.total) for _ in $(seq {gpus}); do echo {memory_mib}; done ;;",
                "esac",
            ]
        else:
            lines += ["*) echo 'NVIDIA-SMI has failed' >&2; exit 9 ;;", "esac"]
        if gpus is not None:
            tool.write_text("\n".join(lines))
            tool.chmod(0o755)
        variables = {name: value for name, value in os.environ.items() if name not in ("REQUIRE_GPU", "SKIP_SETUP")}
        variables |= {"PATH": f"{folder}:/usr/bin:/bin", "VENV": str(tmp_path / "venv"), **env}
        command = [BASH, str(GPU / f"{script}.sh"), str(tmp_path / "out")]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd="/")

    return run_script


def steps(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Command by name of what a dry run prints; their numbers have to be those that were announced."""
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^\[(\d+)/(\d+)\] ([\w.-]+): (.*(?:\n(?![\[g]).*)*)", done.stdout, re.MULTILINE)
    assert [(int(number), int(total)) for number, total, *_ in found] == [
        (number, len(found)) for number in range(1, len(found) + 1)
    ]
    return {name: command for *_, name, command in found}


@pytest.mark.parametrize("gpus", [None, 0])
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_gpu_all_is_skipped(script, gpus, run_script, tmp_path):
    done = run_script(script, gpus)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gpu-{script}: skipped: no NVIDIA GPU\n", "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_that_is_required_and_absent_is_an_error(script, run_script):
    done = run_script(script, 0, REQUIRE_GPU="1")
    assert done.returncode == 1
    assert done.stderr == f"gpu-{script}: no NVIDIA GPU, and REQUIRE_GPU=1 asks for one\n"


def test_smoke_on_one_gpu(run_script, tmp_path):
    found = steps(run_script("smoke", 1, DRY_RUN="1"))
    wanted = "setup versions reference-fp32 reference-bf16 runners mtp quantized adapters serve"
    assert list(found) == wanted.split()
    assert found["setup"].endswith("/scripts/setup.sh")
    assert "scripts/demo.sh --adapter" in found["serve"]
    assert not (tmp_path / "out").exists()


def test_smoke_on_two_gpus_runs_two_ranks_too(run_script):
    found = steps(run_script("smoke", 2, DRY_RUN="1", SKIP_SETUP="1"))
    assert "tp2" in found and "setup" not in found


def test_smoke_selects_every_gpu_test_once(run_script):
    """The steps' expressions, as pytest's -k takes them, against the names in tests/engine/test_gpu.py."""
    names = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "engine" / "test_gpu.py").read_text(), re.MULTILINE)
    chosen = [re.search(r"-k (\S+)", command) for command in steps(run_script("smoke", 2, DRY_RUN="1")).values()]
    prefixes = {match[1].split("\\")[0] for match in chosen if match}
    for name in names:
        assert sum(name.startswith(prefix) for prefix in prefixes) == 1, name


def test_bench_measures_what_fits(run_script):
    found = steps(run_script("bench", 1, DRY_RUN="1"))
    shapes = "compare-mini compare-flash-4L compare-flash-8L"
    assert list(found) == f"setup environment {shapes} mtp-model mtp expectations".split()
    assert re.search(r"out/H100-80GB-HBM3-\d{4}-\d\d-\d\d-mini$", found["compare-mini"])
    assert "--acceptance 0.8" in found["mtp"] and "load_format" in found["mtp"]
    done = run_script("bench", 1, memory_mib=40960, DRY_RUN="1", SKIP_SETUP="1", ROUNDS="2")
    assert list(steps(done)) == "environment compare-mini compare-flash-4L mtp-model mtp expectations".split()
    assert "flash-8L left out: it needs 57 GB" in done.stdout
    assert "--rounds 2" in steps(done)["compare-mini"]


def test_bench_measures_the_whole_model_on_four_gpus(run_script):
    found = steps(run_script("bench", 4, DRY_RUN="1", SKIP_SETUP="1", SHAPES="mini"))
    assert list(found) == "environment compare-mini compare-flash-tp4 mtp-model mtp expectations".split()
    assert "bench compare flash --" in found["compare-flash-tp4"]
    assert found["compare-flash-tp4"].rstrip().endswith("--tensor-parallel-size 4")
    # What is expected of both is looked up for the files that they leave.
    for name in ("mini", "flash-tp4"):
        (out,) = re.findall(rf"--out (\S+-{name}) ", found[f"compare-{name}"] + " ")
        assert f"{out}.json" in found["expectations"].replace("\\", "")
    assert "compare-flash-tp4" not in steps(run_script("bench", 4, memory_mib=40960, DRY_RUN="1"))


def test_a_rehearsal_goes_on_where_a_step_needs_a_gpu_and_ends_at_any_other_failure(run_script, tmp_path):
    program = tmp_path / "venv" / "bin" / "vllm-bailing"
    program.parent.mkdir(parents=True)
    python = program.with_name("python")
    for text, code in (("RuntimeError: CUDA error: no CUDA-capable device is detected", 0), ("a slip", 1)):
        for tool, says in ((program, "here"), (python, text)):
            tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {int(tool is python)}\n")
            tool.chmod(0o755)
        done = run_script("smoke", 1, SKIP_SETUP="1", REHEARSAL="1", VENV=str(program.parent.parent), PORT="none")
        assert "versions: ok" in done.stdout
        assert ("reference-fp32: as far as a GPU is needed" in done.stdout) == (code == 0)
        assert ("reference-fp32 failed" in done.stderr) == (code == 1)
    plain = run_script("smoke", 1, SKIP_SETUP="1", VENV=str(program.parent.parent))
    assert plain.returncode == 1 and "reference-fp32 failed" in plain.stderr


@pytest.fixture
def rehearse(tmp_path):
    """Runs rehearse.sh with a Python that only says which GPU it is given; `body` is what its pytest does."""

    def rehearse(*gpus: str, body: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        python = tmp_path / "cache" / "vllm-bailing" / "cuda" / "0.33.0" / "bin" / "python"
        of_gpu = 'case $2 in H*) printf "%s\\n90\\n80\\n" "$2"; exit ;; *) exit 1 ;; esac'
        files = {
            python: f"[ $1 != - ] || {of_gpu}\ncd {tmp_path}\n{body}\necho '2 passed in 1.0s'\n",
            tmp_path / "scripts" / "setup.sh": "",
            tmp_path / "tests" / "cuda_build" / "machine" / "build.sh": "",
            tmp_path / "scripts" / "gpu" / "rehearse.sh": (GPU / "rehearse.sh").read_text(),
        }
        for file, text in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}")
            file.chmod(0o755)
        variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OUT": str(tmp_path / "out"), **env}
        command = [BASH, str(tmp_path / "scripts" / "gpu" / "rehearse.sh"), "0.33.0", *gpus]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    return rehearse


def test_as_many_gpus_are_rehearsed_at_the_same_time_as_there_are_cores(rehearse, tmp_path, monkeypatch):
    wait = 'touch "$FAKE_GPU_NAME"; for _ in $(seq 500); do [ -e H100 ] && [ -e H20 ] && break; sleep 0.02; done; '
    # GNU's nproc: two cores, or fewer where threads are limited, as the tests are in the script.
    nproc = tmp_path / "bin" / "nproc"
    nproc.parent.mkdir()
    nproc.write_text("#!/bin/sh\necho ${OMP_NUM_THREADS:-2}\n")
    nproc.chmod(0o755)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    path = f"{nproc.parent}:{os.environ['PATH']}"
    done = rehearse("H100", "H20", body=wait + "[ -e H100 ] && [ -e H20 ] || exit 1", PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(re.findall(r"^(\w+) +2 passed; ok, \d+ s$", done.stdout, re.MULTILINE)) == ["H100", "H20"]


def test_a_gpu_that_fails_is_named_and_the_others_are_rehearsed(rehearse, tmp_path):
    fails = '[ "$FAKE_GPU_NAME" != H20 ] || { echo "1 failed in 1.0s"; exit 1; }'
    done = rehearse("H20", "H100", body=fails, JOBS="1")
    assert done.returncode == 1
    assert f"1 failed; FAILED, see {tmp_path}/out/0.33.0/H20.log" in done.stdout
    assert re.search(r"^H100 +2 passed; ok", done.stdout, re.MULTILINE)
    assert rehearse("MI300X").returncode == 1


def test_bench_refuses_a_shape_that_is_not_there(run_script):
    done = run_script("bench", 1, DRY_RUN="1", SHAPES="maxi")
    assert (done.returncode, done.stderr) == (1, "gpu-bench: SHAPES: there is no maxi\n")


def test_a_step_that_fails_ends_the_script_with_its_last_words(run_script, tmp_path):
    program = tmp_path / "venv" / "bin" / "vllm-bailing"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho the reason\nexit 3\n")
    program.chmod(0o755)
    done = run_script("smoke", 1, SKIP_SETUP="1")
    assert done.returncode == 1
    assert done.stderr.startswith("the reason\ngpu-smoke: versions failed after")
    assert (tmp_path / "out" / "versions.log").read_text() == "the reason\n"
    assert "reference" not in done.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "common"])
def test_scripts_are_well_formed(script):
    file = GPU / f"{script}.sh"
    subprocess.run([BASH, "-n", str(file)], check=True)
    assert os.access(file, os.X_OK) == (script in SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_pass_shellcheck(script):
    command = [
        str(Path(sys.executable).with_name("shellcheck")),
        "--external-sources",
        "--source-path=SCRIPTDIR",
        f"{script}.sh",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=GPU)
    assert done.returncode == 0, done.stdout


def test_the_workflow_calls_the_scripts():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text())
    # YAML 1.1 takes the key "on" for a boolean.
    assert set(workflow[True]) == {"workflow_dispatch", "schedule"}
    assert workflow["env"]["REQUIRE_GPU"] == "1"
    for job in SCRIPTS:
        assert workflow["jobs"][job]["runs-on"] == ["self-hosted", "gpu"]
        (command,) = [step["run"] for step in workflow["jobs"][job]["steps"] if "run" in step]
        assert command.split()[0] == f"scripts/gpu/{job}.sh" and (ROOT / command.split()[0]).is_file()
    assert workflow["jobs"]["bench"]["needs"] == "smoke"
