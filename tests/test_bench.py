"""The subcommands that measure: what they compute from their runs, what they write, what they refuse."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from vllm_bailing import bench, compare, planner, screens
from vllm_bailing.bench import BenchError, Job, Measurement
from vllm_bailing.cli import DEMO, app
from vllm_bailing.compare import AGAIN, IN_TREE, KINDS, PLUGIN, SHAPES, Referee, Trial
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.weights import Checkpoint, main_tensors

JOB = Job("model", {"dtype": "float32"}, [1, 8], ["Hi"], 16)


def measured(tokens, seconds, drafts=0, accepted=(), answers=7):
    return Measurement(tokens, seconds, drafts, list(accepted), answers)


def test_jobs_differ_in_the_speculative_configuration_alone():
    jobs = bench.mtp_jobs(JOB, [0, 2], draft={"model": "draft"})
    assert jobs["0"] == JOB
    speculation = {"method": "mtp", "num_speculative_tokens": 2, "model": "draft"}
    assert jobs["2"].engine == {"dtype": "float32", "speculative_config": speculation}
    assert (jobs["2"].batch_sizes, jobs["2"].prompts, jobs["2"].ignore_eos) == ([1, 8], ["Hi"], False)


def test_a_given_acceptance_is_one_chance_per_position_and_answers_go_on_to_the_limit():
    jobs = bench.mtp_jobs(JOB, [0, 3], acceptance=0.5)
    speculation = jobs["3"].engine["speculative_config"]
    assert speculation["rejection_sample_method"] == "synthetic"
    assert speculation["synthetic_acceptance_rates"] == [0.5, 0.25, 0.125]
    assert jobs["0"].ignore_eos and jobs["3"].ignore_eos
    assert "speculative_config" not in jobs["0"].engine


def test_summary_pairs_the_rounds_and_counts_acceptance():
    results = {
        "0": [{1: measured(100, 2.0)}, {1: measured(100, 1.0)}, {1: measured(100, 4.0)}],
        "2": [
            {1: measured(100, 1.0, 10, (8, 4))},
            {1: measured(100, 1.0, 10, (6, 2))},
            {1: measured(100, 1.0, 20, (14, 6), answers=8)},
        ],
    }
    plain, two = bench.summarize(results, "0")
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
    told = bench.advice(rows, "0")
    assert told[1] == "num_speculative_tokens=2: 1.50 times as fast"
    assert "without speculation" in told[8]


def test_only_jobs_that_speculate_get_the_draft_vocabulary():
    job = Job("model", {"additional_config": {"other": 1}}, [1], ["Hi"], 8)
    jobs = bench.mtp_jobs(job, [0, 2], draft_vocab="ids.json")
    assert jobs["0"].engine == job.engine == {"additional_config": {"other": 1}}
    assert jobs["2"].engine["additional_config"] == {"other": 1, "bailing_draft_vocab": "ids.json"}


def test_rounds_take_turns_and_show_how_far_they_are(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(bench, "run_job", lambda job: ran.append(job.model) or {1: measured(1, 1.0)})
    jobs = {name: Job(name, {}, [1], [], 1) for name in "abc"}
    results = bench.alternate(jobs, 3)
    assert ran == list("abccbaabc")
    assert {name: len(rounds) for name, rounds in results.items()} == {"a": 3, "b": 3, "c": 3}
    assert "9/9" in capsys.readouterr().err


def test_plot_is_written(tmp_path):
    rows = [
        {**row(1, "0", 1, 1), "acceptance": []},
        {**row(1, "1", 1.4, 1.3), "acceptance": [0.9]},
    ]
    bench.plot_mtp(rows, "MTP", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft-tokens", "one"], "'one' is not a list of numbers"),
        (["--engine", "{"], "is no JSON object"),
        (["--engine", "[1]"], "an object is wanted"),
        (["--acceptance", "1.5"], "--acceptance"),
    ],
)
def test_wrong_options_are_refused(arguments, message):
    done = CliRunner().invoke(app, ["bench", "mtp", str(DEMO), *arguments])
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.engine
def test_mtp_is_measured_on_the_demo(tmp_path):
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    arguments = ["--draft-tokens", "1", "--rounds", "1", "--batch-size", "2", "--max-tokens", "24"]
    arguments += ["--engine", json.dumps(engine), "--out", str(tmp_path / "mtp"), "--json"]
    done = CliRunner().invoke(app, ["bench", "mtp", str(DEMO), *arguments], catch_exceptions=False)
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "mtp.json").read_text())
    assert [row["arm"] for row in report["rows"]] == ["0", "1"]
    assert all(row["same_answers"] for row in report["rows"])
    assert report["rows"][1]["acceptance"][0] >= 0.8
    assert (tmp_path / "mtp.png").is_file()


@pytest.mark.engine
def test_short_answers_are_asked_for_until_the_measurement_is_long_enough():
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512}
    job = Job(str(DEMO), engine, [2], ["What is YaRN?", "Tell me about vLLM."], 8, ignore_eos=True)
    found = bench.run_job(job)[2]
    assert found.seconds >= bench.MIN_SECONDS
    assert found.tokens > 2 * 8 and found.tokens % (2 * 8) == 0


@pytest.mark.engine
def test_an_engine_that_refuses_ends_the_measurement_with_its_reason(tmp_path):
    done = CliRunner().invoke(app, ["bench", "mtp", str(tmp_path), "--rounds", "1", "--out", str(tmp_path / "mtp")])
    assert done.exit_code == 1
    assert "vllm-bailing bench: " in str(done.exception or done.output)


def test_draft_vocabulary_keeps_the_most_frequent_tokens_and_all_that_end_an_answer(tmp_path):
    from transformers import AutoTokenizer

    text, out = tmp_path / "text.txt", tmp_path / "ids.json"
    text.write_text("The capital of France is Paris.\n" * 3 + "YaRN\n")
    done = CliRunner().invoke(
        app, ["draft-vocab", str(DEMO), "--text", str(text), "--size", "30", "--out", str(out)], catch_exceptions=False
    )
    assert done.exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = json.loads(out.read_text())
    assert ids == sorted(set(ids)) and len(ids) <= 30
    assert set(tokenizer.encode("The capital of France is Paris.")) | set(tokenizer.all_special_ids) <= set(ids)
    assert "% of the text" in done.output


# --- bench compare -------------------------------------------------------------------------------------------------

TRIAL = Trial("model", {"dtype": "float32"}, [1], [64])
FACTS = {
    "model": "vllm.model_executor.models.bailing_moe.BailingMoeV2ForCausalLM",
    "experts": "CPUUnquantizedExperts",
    "attention": "CPU_ATTN",
    "dtype": "bfloat16",
    "quantization": None,
    "compilation": "NONE",
    "graphs": "NONE",
    "fusions": ["eliminate_noops"],
    "runner": "vllm.v1.worker.cpu_model_runner",
    "device": "CPU",
}
OURS = {**FACTS, "model": "vllm_bailing.model.BailingMoeV2ForCausalLM"}


def planted(gains, rounds=5, noise=0.02, drift=0.0, **figures):
    """Results of `bench.alternate` for arms that are `gains` times as good, with noise and a drift over the rounds."""
    draw = np.random.default_rng(1)

    def value(figure, base, gain, number):
        disturbed = base * (1 + drift * number) * (1 + noise * draw.standard_normal())
        return disturbed * gain if KINDS[figure.split()[0]].more_is_better else disturbed / gain

    figures = figures or {"decode 1": 50.0, "TTFT 1": 20.0, "memory": 2.0}
    return {
        arm: [{"figures": {name: value(name, base, gain, n) for name, base in figures.items()}} for n in range(rounds)]
        for arm, gain in gains.items()
    }


def verdicts(results, arm=PLUGIN):
    return {row["figure"]: row["verdict"] for row in compare.summarize(results) if row["arm"] == arm}


def test_arms_differ_in_the_class_and_options_come_on_top():
    found = compare.arms(TRIAL, {"fp8-kv": {"kv_cache_dtype": "fp8"}}, plain="plain")
    assert list(found) == [IN_TREE, AGAIN, PLUGIN, "fp8-kv"]
    assert [trial.env["VLLM_BAILING_USE_INTREE"] for trial in found.values()] == ["1", "1", "0", "0"]
    assert [trial.model for trial in found.values()] == ["plain", "plain", "plain", "model"]
    assert found["fp8-kv"].engine == {"dtype": "float32", "kv_cache_dtype": "fp8"}
    assert all(found[arm].engine == TRIAL.engine for arm in (IN_TREE, AGAIN, PLUGIN))


def test_arms_take_turns_and_warm_up_once_before(monkeypatch):
    ran = []

    def run_job(trial):
        ours = trial.env["VLLM_BAILING_USE_INTREE"] == "0"
        ran.append(("plugin" if ours else "in-tree", trial.repeats))
        return {"facts": OURS if ours else FACTS, "figures": {"load": 1.0}}

    monkeypatch.setattr(bench, "run_job", run_job)
    found = compare.run(Trial(str(DEMO), {}, [1], [64]), {}, rounds=2)
    cold, warm = [("in-tree", 0), ("plugin", 0)], [("in-tree", 3), ("in-tree", 3), ("plugin", 3)]
    assert ran == cold + warm + warm[::-1]
    assert list(found["arms"]) == [IN_TREE, PLUGIN, AGAIN]
    assert [row["arm"] for row in found["rows"]] == [IN_TREE, AGAIN, PLUGIN]


def test_prompts_beyond_the_window_are_refused_before_an_engine_starts():
    with pytest.raises(BenchError, match="takes 2049 tokens with its answer, and the model's window has 2048; lower"):
        compare.run(Trial(str(DEMO), {}, [1], [2048]), {}, rounds=1)


def test_kernels_of_this_package_are_no_reason_to_refuse_but_a_note():
    referee = Referee()
    referee(IN_TREE, {"facts": FACTS})
    referee(PLUGIN, {"facts": {**OURS, "experts": "vllm_bailing.PackedExperts"}})
    assert referee.notes == [f"plugin: experts vllm_bailing.PackedExperts (in-tree: {FACTS['experts']})"]


def test_interval_of_five_ratios_is_their_range_and_narrows_with_more():
    assert compare.interval([1.0, 1.1, 1.2, 1.3, 1.4]) == (1.0, 1.4)
    assert compare.interval([1.5]) == (1.5, 1.5)
    draw = np.random.default_rng(0).normal(1.2, 0.05, 100)
    low, high = compare.interval(list(draw))
    # Of a normal distribution the median of n has the standard error 1.2533 sigma / sqrt(n).
    assert (high - low) / 2 == pytest.approx(1.96 * 1.2533 * 0.05 / 10, rel=0.3)


def test_the_interval_encloses_the_true_median_as_often_as_it_says():
    draw = np.random.default_rng(2)
    samples = draw.normal(1, 0.05, (200, 9))
    enclosed = sum(low <= 1 <= high for low, high in map(compare.interval, samples.tolist()))
    assert enclosed >= 0.9 * 200


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_an_arm_that_is_the_same_makes_no_difference(drift):
    told = verdicts(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 1}, drift=drift))
    assert set(told.values()) == {"no difference"}


def test_a_planted_fifth_is_found_in_either_direction():
    assert verdicts(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 1.2})) == {
        "decode 1": "faster",
        "TTFT 1": "faster",
        "memory": "less",
    }
    assert verdicts(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 1 / 1.2})) == {
        "decode 1": "slower",
        "TTFT 1": "slower",
        "memory": "more",
    }


def test_a_gain_below_the_noise_floor_is_no_difference():
    ratios = [1.05, 1.06, 1.05, 1.07, 1.06]
    assert compare.judge(ratios, noise=1.08, kind=KINDS["decode"]) == "no difference"
    assert compare.judge(ratios, noise=1.01, kind=KINDS["decode"]) == "faster"


def test_few_rounds_give_no_verdict():
    assert set(verdicts(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 2}, rounds=4)).values()) == {"few rounds"}


def test_rows_pair_the_rounds_and_turn_times_around():
    results = {
        IN_TREE: [{"figures": {"TPOT 1": 10.0}}, {"figures": {"TPOT 1": 20.0}}, {"figures": {"TPOT 1": 40.0}}],
        AGAIN: [{"figures": {"TPOT 1": 10.0}}, {"figures": {"TPOT 1": 25.0}}, {"figures": {"TPOT 1": 40.0}}],
        PLUGIN: [{"figures": {"TPOT 1": 5.0}}, {"figures": {"TPOT 1": 10.0}}, {"figures": {"TPOT 1": 10.0}}],
    }
    base, again, plugin = compare.summarize(results)
    assert (base["median"], base["low"], base["high"], base["ratio"]) == (20, 10, 40, 1)
    assert again["interval"] == (0.8, 1.0) and again["noise"] == plugin["noise"] == 1.25
    assert (plugin["ratio"], plugin["interval"]) == (2, (2, 4))


def test_referee_lets_the_arms_pass_that_are_what_they_should_be():
    referee = Referee()
    for arm, facts in ((IN_TREE, FACTS), (AGAIN, FACTS), (PLUGIN, OURS), ("option", OURS)):
        referee(arm, {"facts": facts})
    assert list(referee.facts) == [IN_TREE, AGAIN, PLUGIN, "option"]
    assert referee.notes == []


@pytest.mark.parametrize(
    ("arm", "facts", "message"),
    [
        (PLUGIN, FACTS, "the arm 'plugin' ran vllm.model_executor.models.bailing_moe.BailingMoeV2ForCausalLM"),
        (AGAIN, OURS, "the arm 'in-tree again' ran vllm_bailing.model.BailingMoeV2ForCausalLM"),
        (PLUGIN, {**OURS, "experts": "TritonExperts"}, "experts TritonExperts and 'in-tree' with CPUUnquantizedExp"),
        (AGAIN, {**FACTS, "graphs": "FULL"}, "the arm 'in-tree again' ran with graphs FULL"),
        ("option", FACTS, "the arm 'option' ran vllm.model_executor"),
    ],
)
def test_referee_refuses_other_classes_and_other_kernels(arm, facts, message):
    referee = Referee()
    referee(IN_TREE, {"facts": FACTS})
    with pytest.raises(BenchError, match=message):
        referee(arm, {"facts": facts})


def test_referee_tells_what_an_option_changed():
    referee = Referee()
    referee(IN_TREE, {"facts": FACTS})
    referee("fused", {"facts": {**OURS, "attention": "OTHER", "fusions": []}})
    assert referee.notes == [
        "fused: attention OTHER (in-tree: CPU_ATTN)",
        "fused: fusion eliminate_noops off, unlike in-tree",
    ]


def test_a_wrong_class_ends_the_command_with_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "run_job", lambda trial: {"facts": OURS, "figures": {"load": 1.0}})
    done = CliRunner().invoke(app, ["bench", "compare", "mid", "--out", str(tmp_path / "x")])
    assert done.exit_code == 1
    message = str(done.exception)
    assert message.startswith("vllm-bailing bench: the arm 'in-tree' ran vllm_bailing") and "\n" not in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "x"], "'x' is not NAME=JSON"),
        (["--option", "plugin={}"], "with a name of its own"),
        (["--option", "x=[1]"], "an object is wanted"),
        (["--engine", "{"], "is no JSON object"),
        (["--batch-size", "a"], "'a' is not a list of numbers"),
        (["--output-tokens", "1"], "--output-tokens"),
    ],
)
def test_wrong_options_of_a_comparison_are_refused(arguments, message):
    done = CliRunner().invoke(app, ["bench", "compare", "mid", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("mini", 32.5), ("flash-4L", 22.5), ("flash-8L", 48.7), ("mid", 0.908)]
)
def test_shapes_have_the_size_that_they_stand_for(name, gigabytes):
    assert compare.parameters(BailingMoeV2Config(**SHAPES[name])) * 2 / 1e9 == pytest.approx(gigabytes, rel=2e-3)


def test_a_written_shape_is_read_back(tmp_path):
    compare.write_shape("mid", tmp_path / "mid", mtp_layers=1)
    config = compare.load_config(str(tmp_path / "mid"))
    assert (config.num_experts, config.rotary_dim, config.num_nextn_predict_layers) == (64, 32, 1)
    assert compare.parameters(config) == pytest.approx(454e6, rel=2e-3)


def test_share_of_the_roofline_is_left_out_where_steps_are_others(tmp_path):
    config = BailingMoeV2Config(**SHAPES["mid"])
    rows = compare.summarize(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 1, "mtp": 1, "int8": 1}, noise=0))
    trials = compare.arms(TRIAL, {"mtp": {"speculative_config": {}}, "int8": {}})
    facts = dict.fromkeys(trials, FACTS) | {"int8": {**FACTS, "quantization": "experts_int8"}}
    shares = compare.roofline_shares(rows, trials, facts, config, 40e9)
    step_s = planner.step_bytes(config, "bf16", 1, 32 + 64 // 2, 1) / 40e9
    assert shares == {"decode 1": dict.fromkeys((IN_TREE, AGAIN, PLUGIN), pytest.approx(50 * step_s))}


def test_bandwidth_is_known_by_the_whole_name():
    assert compare.known_bandwidth("NVIDIA H100 80GB HBM3") == 3.35
    assert compare.known_bandwidth("NVIDIA H100 PCIe") is None


def test_a_copy_without_mtp_layers_has_all_the_rest(tmp_path):
    copied = Checkpoint.at(compare.without_mtp(str(DEMO), tmp_path / "copy"))
    config = compare.load_config(str(tmp_path / "copy"))
    assert config.num_nextn_predict_layers == 0
    assert copied.tensors.keys() == main_tensors(config).keys()
    before, after = load_file(DEMO / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert all(after[name].equal(before[name]) for name in after)
    assert compare.without_mtp(str(tmp_path / "copy"), tmp_path / "again") == str(tmp_path / "copy")
    prompt = "What is YaRN?"
    tokenizers = (AutoTokenizer.from_pretrained(folder) for folder in (DEMO, tmp_path / "copy"))
    assert len({tuple(one(prompt)["input_ids"]) for one in tokenizers}) == 1


def test_comparison_is_plotted_and_its_table_fits_into_80_columns(tmp_path, monkeypatch, capsys):
    gains = {IN_TREE: 1, AGAIN: 1, PLUGIN: 1.2, "fp8-kv": 0.8}
    figures = {"decode 32": 123456.0, "prefill 2048": 123456.0, "TTFT 32": 1.0, "load": 123.0}
    rows = compare.summarize(planted(gains, **figures))
    compare.plot(rows, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setenv("COLUMNS", "80")
    screens.show_comparison(
        {"rows": rows, "arms": {**dict.fromkeys(gains, OURS), IN_TREE: FACTS}, "roofline": {}, "notes": ["a note"]}
    )
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "\x1b" not in printed and "…" not in printed
    assert printed.count("faster") == 4 and printed.count("slower") == 4 and "a note" in printed


@pytest.mark.engine
def test_both_classes_are_compared_on_the_demo(tmp_path):
    command = [sys.executable, "-c", "from vllm_bailing.cli import main; main()", "bench", "compare", "demo"]
    command += ["--rounds", "1", "--batch-size", "1", "--output-tokens", "8", "--prefill", "64", "--eager"]
    command += ["--no-warm-up", "--bandwidth", "0.04", "--out", str(tmp_path / "x"), "--json"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report == json.loads((tmp_path / "x.json").read_text())
    assert list(report["arms"]) == [IN_TREE, AGAIN, PLUGIN]
    assert [facts["model"].partition(".")[0] for facts in report["arms"].values()] == ["vllm", "vllm", "vllm_bailing"]
    facts = report["arms"][PLUGIN]
    assert facts["experts"] != "-" and facts["attention"] != "-" and facts["compilation"] == "NONE"
    wanted = ["decode 1", "TTFT 1", "TPOT 1", "prefill 64", "load", "start", "memory"]
    assert list(dict.fromkeys(row["figure"] for row in report["rows"])) == wanted
    assert all(0 < row["median"] < math.inf for row in report["rows"])
    assert report["roofline"]["shares"].keys() == {"decode 1"}
    own = facts["experts"] == "vllm_bailing.PackedExperts"  # on some CPUs, see test_cpu.py
    assert (len(report["notes"]) == 1 and "PackedExperts" in report["notes"][0]) if own else report["notes"] == []
    assert (tmp_path / "x.png").is_file()
