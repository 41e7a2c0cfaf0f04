"""The measurement of MTP: what is computed from the runs, what is written, what is refused."""

import pytest
from typer.testing import CliRunner

from vllm_bailing import DEMO
from vllm_bailing.bench import mtp, plots, runner
from vllm_bailing.bench.mtp import Measurement, MtpTask
from vllm_bailing.cli import app

TASK = MtpTask("model", {"dtype": "float32"}, [1, 8], ["Hi"], 16)


def measured(tokens, seconds, drafts=0, accepted=(), checksum=7):
    return Measurement(tokens, seconds, drafts, list(accepted), checksum)


def test_arms_differ_in_the_speculative_configuration_alone():
    tasks = mtp.mtp_tasks(TASK, [0, 2], draft={"model": "draft"})
    assert tasks["0"] == TASK
    speculation = {"method": "mtp", "num_speculative_tokens": 2, "model": "draft"}
    assert tasks["2"].engine == {"dtype": "float32", "speculative_config": speculation}
    assert (tasks["2"].batch_sizes, tasks["2"].prompts, tasks["2"].ignore_eos) == ([1, 8], ["Hi"], False)


def test_a_given_acceptance_is_one_chance_per_position_and_answers_go_on_to_the_limit():
    tasks = mtp.mtp_tasks(TASK, [0, 3], acceptance=0.5)
    speculation = tasks["3"].engine["speculative_config"]
    assert speculation["rejection_sample_method"] == "synthetic"
    assert speculation["synthetic_acceptance_rates"] == [0.5, 0.25, 0.125]
    assert tasks["0"].ignore_eos and tasks["3"].ignore_eos
    assert "speculative_config" not in tasks["0"].engine


def test_summary_pairs_the_rounds_and_counts_acceptance():
    results = {
        "0": [{1: measured(100, 2.0)}, {1: measured(100, 1.0)}, {1: measured(100, 4.0)}],
        "2": [
            {1: measured(100, 1.0, 10, (8, 4))},
            {1: measured(100, 1.0, 10, (6, 2))},
            {1: measured(100, 1.0, 20, (14, 6), checksum=8)},
        ],
    }
    plain, two = mtp.summarize(results, "0")
    assert plain["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert plain["tokens_per_second"] == {"median": 50, "low": 25, "high": 100}
    assert two["ratio"] == {"median": 2, "low": 1, "high": 4}
    assert two["acceptance"] == [28 / 40, 12 / 40]
    assert two["acceptance_length"] == 2.0
    assert plain["same_answers"] and not two["same_answers"]


def row(size, arm, median, low):
    return {"batch_size": size, "arm": arm, "ratio": {"median": median, "low": low, "high": median}}


def test_advice_names_the_fastest_that_won_every_round():
    rows = [row(1, "0", 1, 1), row(1, "1", 1.3, 1.2), row(1, "2", 1.5, 1.4), row(8, "0", 1, 1), row(8, "1", 1.1, 0.9)]
    told = mtp.advice(rows, "0")
    assert told[1] == "num_speculative_tokens=2: 1.50 times as fast"
    assert "without speculation" in told[8]


def test_only_arms_that_speculate_get_the_draft_vocabulary():
    task = MtpTask("model", {"additional_config": {"other": 1}}, [1], ["Hi"], 8)
    tasks = mtp.mtp_tasks(task, [0, 2], draft_vocab="ids.json")
    assert tasks["0"].engine == task.engine == {"additional_config": {"other": 1}}
    assert tasks["2"].engine["additional_config"] == {"other": 1, "bailing_draft_vocab": "ids.json"}


def test_rounds_take_turns_and_show_how_far_they_are(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(runner, "run_task", lambda task: ran.append(task.model) or {1: measured(1, 1.0)})
    tasks = {name: MtpTask(name, {}, [1], [], 1) for name in "abc"}
    results = runner.alternate(tasks, 3)
    assert ran == list("abccbaabc")
    assert {name: len(rounds) for name, rounds in results.items()} == {"a": 3, "b": 3, "c": 3}
    assert "9/9" in capsys.readouterr().err


def test_plot_is_written(tmp_path):
    rows = [
        {**row(1, "0", 1, 1), "acceptance": []},
        {**row(1, "1", 1.4, 1.3), "acceptance": [0.9]},
    ]
    plots.plot_mtp({"model": "model", "rows": rows}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft-tokens", "one"], "'one' is not a list of numbers"),
        (["--engine", "{"], "is not a JSON object"),
        (["--engine", "[1]"], "is not a JSON object, such as"),
        (["--acceptance", "1.5"], "--acceptance"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    done = CliRunner().invoke(app, ["bench", "mtp", str(DEMO), *arguments])
    assert done.exit_code == 2
    assert message in done.output
