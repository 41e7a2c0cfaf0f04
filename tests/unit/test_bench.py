"""The measurement of MTP: what is computed from the runs, what is written, what is refused."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
    tasks = mtp.mtp_tasks(TASK, [0, 2], drafts={"": {"model": "draft"}})
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
    for share, (low, high) in zip(two["acceptance"], two["interval"], strict=True):
        assert 0 < low < share < high < 1
    assert two["drafts"] == 40 and two["kinds"] == {} and plain["acceptance"] == plain["interval"] == []


def test_kinds_of_text_are_told_apart():
    one, other = measured(10, 1.0, 9, (8, 4)), measured(10, 1.0, 9, (8, 4))
    one.kinds, other.kinds = {"code": (4, [4, 3]), "prose": (5, [4, 1])}, {"code": (6, [4, 2]), "prose": (5, [3, 0])}
    base = measured(10, 1.0)
    _, row = mtp.summarize({"0": [{1: base}] * 2, "2": [{1: one}, {1: other}]}, "0")
    assert {kind: (found["drafts"], found["acceptance"]) for kind, found in row["kinds"].items()} == {
        "code": (10, [0.8, 0.5]),
        "prose": (10, [0.7, 0.1]),
    }


def test_counters_that_were_not_there_yet_count_from_zero():
    assert mtp.difference((5, [3, 1]), (0, [])) == (5, [3, 1])
    assert mtp.difference((5, [3, 1]), (2, [2, 1])) == (3, [1, 0])
    assert mtp.prompt_of("Hi").messages == [{"role": "user", "content": "Hi"}]


METRICS = """# HELP vllm:spec_decode_num_drafts_total drafts
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 30.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 10.0
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_total accepted
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 15.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 24.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 6.0
"""


@pytest.fixture
def metrics_server():
    """A server whose /metrics shows what `texts` has, one after the other, the last of them again and again."""
    texts = [METRICS]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            text = '{"data": [{"id": "m"}]}'
            if self.path == "/metrics":
                text = texts.pop(0) if len(texts) > 1 else texts[0]
            self.send_response(200)
            self.send_header("Content-Type", "text/plain" if self.path == "/metrics" else "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": []}')

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", texts
    server.shutdown()


def test_a_running_server_is_read(metrics_server):
    url, texts = metrics_server
    done = CliRunner().invoke(app, ["bench", "mtp", "m", "--url", url, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["all"]
    assert (found["drafts"], found["acceptance"]) == (40, [0.75, 0.375])
    done = CliRunner().invoke(app, ["bench", "mtp", "m", "--url", f"{url}/v1"], env={"COLUMNS": "80"})
    assert "75 % (60-86)" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    texts[:] = ["nothing"]
    done = CliRunner().invoke(app, ["bench", "mtp", "m", "--url", url])
    assert "counts no drafts; start the server with --speculative-config" in done.output


def test_a_running_server_is_asked_by_kind(metrics_server, tmp_path):
    url, texts = metrics_server
    later = METRICS.replace(" 30.0", " 50.0").replace(" 24.0", " 34.0")
    latest = later.replace(" 50.0", " 60.0").replace(" 15.0", " 17.0")
    texts[:] = [METRICS, METRICS, later, later, latest]
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a", "kind": "code"}\n{"prompt": "b", "kind": "prose"}\n{"prompt": "c", "kind": "code"}\n'
    )
    done = CliRunner().invoke(app, ["bench", "mtp", "m", "--url", url, "--prompts", str(file), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    counted = {kind: (one["drafts"], one["acceptance"]) for kind, one in found.items()}
    assert counted == {"all": (30, [1 / 3, 2 / 30]), "code": (20, [0.5, 0.0]), "prose": (10, [0.0, 0.2])}
    texts[:] = ["no drafts"]
    done = CliRunner().invoke(app, ["bench", "mtp", "other", "--url", url, "--prompts", str(file)])
    assert done.exit_code == 2 and f"{url} has m, and not other; name what it has" in done.output, done.output


def test_a_server_that_is_not_there_and_prompts_that_are_none_are_refused(tmp_path):
    done = CliRunner().invoke(app, ["bench", "mtp", "m", "--url", "http://127.0.0.1:9"])
    assert done.exit_code and "no server at http://127.0.0.1:9; start one" in done.output
    done = CliRunner().invoke(app, ["bench", "mtp", "m", "--prompts", str(tmp_path / "x")], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and "cannot be read" in done.output


def row(size, arm, median, low):
    return {"batch_size": size, "arm": arm, "ratio": {"median": median, "low": low, "high": median}}


def test_advice_names_the_fastest_that_won_every_round():
    rows = [row(1, "0", 1, 1), row(1, "1", 1.3, 1.2), row(1, "2", 1.5, 1.4), row(8, "0", 1, 1), row(8, "1", 1.1, 0.9)]
    told = mtp.advice(rows, "0")
    assert told[1] == "num_speculative_tokens=2: 1.50 times as fast"
    assert "without speculation" in told[8]
    told = mtp.advice([row(1, "0", 1, 1), row(1, "2 lent", 1.3, 1.2), row(1, "2 own", 1.5, 1.4)], "0")
    assert told[1] == "num_speculative_tokens=2 with own: 1.50 times as fast"


def test_only_arms_that_speculate_get_the_draft_vocabulary():
    task = MtpTask("model", {"additional_config": {"other": 1}}, [1], ["Hi"], 8)
    tasks = mtp.mtp_tasks(task, [0, 2], drafts={"": {"draft_vocab": "ids.json"}})
    assert tasks["0"].engine == task.engine == {"additional_config": {"other": 1}}
    assert tasks["2"].engine["additional_config"] == {"other": 1, "bailing_draft_vocab": "ids.json"}
    assert tasks["2"].engine["speculative_config"] == {"method": "mtp", "num_speculative_tokens": 2}


def test_kinds_of_draft_are_arms_beside_each_other():
    drafts = {"lent": {"model": "base"}, "small head": {"model": "own", "draft_vocab": "ids.json"}}
    tasks = mtp.mtp_tasks(TASK, [0, 1, 2], drafts=drafts)
    assert list(tasks) == ["0", "1 lent", "2 lent", "1 small head", "2 small head"]
    models = [task.engine["speculative_config"]["model"] for name, task in tasks.items() if name != "0"]
    assert models == ["base", "base", "own", "own"]
    assert ["additional_config" in task.engine for task in tasks.values()] == [False, False, False, True, True]
    results = {name: [{1: measured(100, 1.0, 10, (8, 4)[: len(task.engine) - 1])}] for name, task in tasks.items()}
    rows = mtp.summarize(results | {"0": [{1: measured(100, 2.0)}]}, "0")
    found = [(*mtp.of_arm(one["arm"]), one["ratio"]["median"]) for one in rows]
    assert found == [(0, "", 1), (1, "lent", 2), (2, "lent", 2), (1, "small head", 2), (2, "small head", 2)]
    deepest = mtp.deepest_of(rows)
    assert {name: one["arm"] for name, one in deepest.items()} == {"lent": "2 lent", "small head": "2 small head"}


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--draft", "lent"], ["'lent' is not NAME=JSON"]),
        (["--draft", "lent=[1]"], ["'[1]' is not a JSON object"]),
        (["--draft", 'a={"model": "x"}', "--draft", 'a={"model": "y"}'], ["'a' is given twice"]),
        (["--draft", 'a={"draft_vocab": "nowhere.json"}'], ["'nowhere.json' is no file", "draft-vocab"]),
        (["--draft", 'a={"draft_vocab": 5}'], ["5 is no file"]),
    ],
)
def test_kinds_of_draft_that_cannot_be_are_refused_before_an_engine_starts(options, fragments):
    done = CliRunner().invoke(app, ["bench", "mtp", str(DEMO), *options], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and all(fragment in done.output for fragment in fragments), done.output


def test_what_kinds_of_draft_gain_is_shown_side_by_side_within_80_columns(monkeypatch, tmp_path):
    def ran(tasks, rounds):
        return {name: [{1: measured(100, 1.0 if name == "0" else 0.5, 10, (8, 4))}] * rounds for name in tasks}

    monkeypatch.setattr(runner, "alternate", ran)
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "mtp", str(DEMO), "--draft-tokens", "2", "--out", "x"]
    drafts = ["--draft", "lent={}", "--draft", 'quantized={"model": "elsewhere"}', "--draft", "of a long name={}"]
    done = CliRunner().invoke(app, [*arguments, *drafts], env={"COLUMNS": "80"}, catch_exceptions=False)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    table = [line.split() for line in lines[2:5]]
    assert table == [
        ["1", "0", "100", "(100-100)", "1", "2.20"],
        ["1", "2", "lent", "200", "(200-200)", "2.00", "(2.00-2.00)", "2.20"],
        ["1", "2", "quantized", "200", "(200-200)", "2.00", "(2.00-2.00)", "2.20"],
    ]
    assert any(line.split()[:2] == ["quantized", "30"] and "80 % (" in line for line in lines), done.output
    assert "num_speculative_tokens=2 with lent: 2.00 times as fast" in done.output
    assert (tmp_path / "x.png").is_file()


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
