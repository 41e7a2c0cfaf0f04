"""A task in its own process, and what the `bench` commands report and write."""

import builtins
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from tests.support.benchmarks import EchoTask, planted
from vllm_bailing.bench import plots, report, statistics
from vllm_bailing.bench.in_tree import CompareTask
from vllm_bailing.bench.mtp import Measurement, MtpTask
from vllm_bailing.bench.statistics import AGAIN, IN_TREE, PLUGIN
from vllm_bailing.errors import BenchError
from vllm_bailing.tools.task import run_task

TASK = MtpTask("folder/demo", {"dtype": "float32"}, [1], ["Hi"], 16)
COMPARED = CompareTask("/tmp/made", {"enforce_eager": True}, [1], [64])


def test_a_task_runs_in_a_process_of_its_own_and_its_result_comes_back(monkeypatch):
    monkeypatch.setenv("A_VARIABLE", "of all")
    told = run_task(EchoTask("model", {}))
    assert told.pop("process") != os.getpid()
    assert told == {"model": "model", "variable": "of all", "was_read": True}
    assert run_task(EchoTask("model", {}, env={"A_VARIABLE": "its own"}))["variable"] == "its own"


def test_a_task_that_fails_says_why():
    with pytest.raises(BenchError) as error:
        run_task(EchoTask("model", {}, failure="no such model"))
    reason, log = str(error.value).split("; the whole log is in ")
    assert reason == "RuntimeError: no such model" and "Traceback" in Path(log).read_text()
    Path(log).unlink()


def test_an_argument_that_the_engine_does_not_take_is_named():
    with pytest.raises(BenchError) as error:
        run_task(EchoTask("model", {"max_model_len": "abc"}, checked=True))
    assert str(error.value) == (
        "argument max_model_len='abc' of vllm.LLM: Input should be a valid integer, unable to parse string as an "
        "integer; correct it in --engine"
    )


def test_nothing_is_left_of_a_task_that_is_interrupted(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pids")

    def interrupted(process, given):
        process.stdin.write(given)
        process.stdin.close()
        pids.extend(map(int, (tmp_path / "pids").read_text().split()))  # waits until they are there
        raise KeyboardInterrupt

    pids = []
    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_task(EchoTask("model", {}, waits=str(tmp_path / "pids")))
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert len(pids) == 2 and all(process.status() == psutil.STATUS_ZOMBIE for process in left)


def test_measurements_survive_json():
    measured = {1: Measurement(32, 2.0, 8, [6, 2], 7)}
    stored = json.loads(json.dumps({size: asdict(one) for size, one in measured.items()}))
    assert TASK.read(stored) == measured
    assert measured[1].speed == 16


def mtp_report():
    results = {"0": [{1: Measurement(100, 2.0)}] * 2, "2": [{1: Measurement(100, 1.0, 10, [8, 4])}] * 2}
    return report.mtp_report(TASK, results, acceptance=0.7, versions={"vllm": "0.32.0"})


def test_report_of_mtp_has_the_rows_their_advice_and_what_was_measured():
    made = mtp_report()
    assert [row["arm"] for row in made.pop("rows")] == ["0", "2"]
    assert made == {
        "model": "folder/demo",
        "acceptance": 0.7,
        "rounds": 2,
        "engine": {"dtype": "float32"},
        "versions": {"vllm": "0.32.0"},
        "advice": {1: "num_speculative_tokens=2: 2.00 times as fast"},
    }


def comparison_report(**changed):
    facts = {"dtype": "bfloat16", "device": "CPU"}
    rows = statistics.summarize(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 1.2}))
    measured = {"machine": {"cores": 2}, "arms": {PLUGIN: facts}, "notes": [], "rows": rows, "roofline": {}}
    arguments = {"command": "vllm-bailing bench compare mid", "versions": {"vllm": "0.32.0"}, **changed}
    return report.comparison_report("mid", COMPARED, {"fp8": {"a": 1}}, 5, measured, **arguments)


def test_report_of_a_comparison_names_the_model_as_the_user_did():
    made = comparison_report()
    assert (made["model"], made["config"]["hidden_size"], made["engine"]) == ("mid", 1024, {"enforce_eager": True})
    assert (made["rounds"], made["options"], made["prompt_tokens"], made["output_tokens"]) == (
        5,
        {"fp8": {"a": 1}},
        32,
        64,
    )
    assert made["command"] == "vllm-bailing bench compare mid" and made["versions"] == {"vllm": "0.32.0"}
    assert made["machine"] == {"cores": 2} and len(made["rows"]) == 9
    assert made["date"].endswith("+00:00")


@pytest.mark.parametrize("name", ["x", "x.json", "x.png"])
def test_a_report_is_written_beside_its_plot(name, tmp_path):
    made = comparison_report()
    files = report.write_report(made, tmp_path / "made" / name, plots.plot_comparison)
    assert files == [tmp_path / "made" / "x.json", tmp_path / "made" / "x.png"]
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(made))
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_a_name_with_a_dot_is_kept_whole(tmp_path):
    files = report.write_report(mtp_report(), tmp_path / "mtp-0.8", plots.plot_mtp)
    assert [file.name for file in files] == ["mtp-0.8.json", "mtp-0.8.png"]


@pytest.mark.parametrize(
    ("made", "plot"), [(mtp_report, plots.plot_mtp), (comparison_report, plots.plot_comparison)], ids=["mtp", "compare"]
)
def test_without_matplotlib_the_report_is_all_that_is_written(made, plot, tmp_path, monkeypatch):
    original = builtins.__import__

    def without_matplotlib(name, *arguments, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    assert report.write_report(made(), tmp_path / "x", plot) == [tmp_path / "x.json"]
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(("eager", "mode"), [(True, "eager"), (False, "compiled")])
def test_the_plot_of_a_comparison_says_what_ran(eager, mode, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles, original = [], Axes.set

    def noting(axis, **options):
        titles.append(options.get("title"))
        return original(axis, **options)

    monkeypatch.setattr(Axes, "set", noting)
    plots.plot_comparison({**comparison_report(), "engine": {"enforce_eager": eager}}, tmp_path / "x.png")
    assert titles == [f"vllm-bailing: mid, {mode}, bfloat16, CPU"]
