"""The comparison with vLLM's own class: arms, their referee, shapes, the table."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.support.benchmarks import planted
from tests.support.commands import TERMINAL
from tests.support.paths import DATA
from vllm_bailing import DEMO
from vllm_bailing.bench import in_tree, plots, runner, shapes, statistics
from vllm_bailing.bench.in_tree import CompareTask, Referee
from vllm_bailing.bench.shapes import SHAPES
from vllm_bailing.bench.statistics import AGAIN, IN_TREE, PLUGIN
from vllm_bailing.checkpoint import Checkpoint
from vllm_bailing.cli import app
from vllm_bailing.cli.bench import show_comparison
from vllm_bailing.config import BailingMoeV2Config, adopt
from vllm_bailing.errors import BenchError
from vllm_bailing.planning import roofline
from vllm_bailing.planning.memory import Layout
from vllm_bailing.tensor_names import main_tensors

TASK = CompareTask("model", {"dtype": "float32"}, [1], [64])
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


def test_arms_differ_in_the_class_and_options_come_on_top():
    found = in_tree.arms(TASK, {"fp8-kv": {"kv_cache_dtype": "fp8"}}, plain="plain")
    assert list(found) == [IN_TREE, AGAIN, PLUGIN, "fp8-kv"]
    assert [task.env["VLLM_BAILING_USE_INTREE"] for task in found.values()] == ["1", "1", "0", "0"]
    assert [task.model for task in found.values()] == ["plain", "plain", "plain", "model"]
    assert found["fp8-kv"].engine == {"dtype": "float32", "kv_cache_dtype": "fp8"}
    assert all(found[arm].engine == TASK.engine for arm in (IN_TREE, AGAIN, PLUGIN))


def test_arms_take_turns_and_warm_up_once_before(monkeypatch):
    ran = []

    def run_task(task):
        ours = task.env["VLLM_BAILING_USE_INTREE"] == "0"
        ran.append(("plugin" if ours else "in-tree", task.repeats))
        return {"facts": OURS if ours else FACTS, "figures": {"load": 1.0}}

    monkeypatch.setattr(runner, "run_task", run_task)
    found = in_tree.run(CompareTask(str(DEMO), {}, [1], [64]), {}, rounds=2)
    cold, warm = [("in-tree", 0), ("plugin", 0)], [("in-tree", 3), ("in-tree", 3), ("plugin", 3)]
    assert ran == cold + warm + warm[::-1]
    assert list(found["arms"]) == [IN_TREE, PLUGIN, AGAIN]
    assert [row["arm"] for row in found["rows"]] == [IN_TREE, AGAIN, PLUGIN]


def test_prompts_beyond_the_window_are_refused_before_an_engine_starts():
    with pytest.raises(BenchError, match="takes 2049 tokens with its answer, and the model's window has 2048; lower"):
        in_tree.run(CompareTask(str(DEMO), {}, [1], [2048]), {}, rounds=1)


def test_kernels_of_this_package_are_no_reason_to_refuse_but_a_note():
    referee = Referee()
    referee(IN_TREE, {"facts": FACTS})
    referee(PLUGIN, {"facts": {**OURS, "experts": "vllm_bailing.PackedExperts"}})
    assert referee.notes == [f"plugin: experts vllm_bailing.PackedExperts (in-tree: {FACTS['experts']})"]


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
    monkeypatch.setattr(runner, "run_task", lambda task: {"facts": OURS, "figures": {"load": 1.0}})
    done = CliRunner().invoke(app, ["bench", "compare", "mid", "--out", str(tmp_path / "x")])
    assert done.exit_code == 2
    *_progress, message = done.stderr.strip().splitlines()
    assert message.startswith("vllm-bailing bench: the arm 'in-tree' ran vllm_bailing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "x"], "'x' is not NAME=JSON"),
        (["--option", "plugin={}"], "with a name of its own"),
        (["--option", "x=[1]"], "is not a JSON object, such as"),
        (["--engine", "{"], "is not a JSON object"),
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
    assert shapes.parameters(BailingMoeV2Config(**SHAPES[name])) * 2 / 1e9 == pytest.approx(gigabytes, rel=2e-3)


@pytest.mark.parametrize(("name", "size"), [("mini", "mini"), ("flash-4L", "flash"), ("flash-8L", "flash")])
def test_shapes_are_those_of_the_published_checkpoints(name, size):
    """All but the number of layers, which is cut so that the weights fit on one GPU."""
    zoo = json.loads((DATA / "zoo.json").read_text())
    published = adopt({**zoo["common"], **zoo["sizes"][size]})
    shape = dict(SHAPES[name])
    if size == "flash":
        assert shape.pop("num_hidden_layers") < published["num_hidden_layers"]
    assert shape == {key: published[key] for key in shape}


def test_a_written_shape_is_read_back(tmp_path):
    shapes.write_shape("mid", tmp_path / "mid", mtp_layers=1)
    config = shapes.load_config(str(tmp_path / "mid"))
    assert (config.num_experts, config.rotary_dim, config.num_nextn_predict_layers) == (64, 32, 1)
    assert shapes.parameters(config) == pytest.approx(454e6, rel=2e-3)


def test_share_of_the_roofline_is_left_out_where_steps_are_others(tmp_path):
    config = BailingMoeV2Config(**SHAPES["mid"])
    rows = statistics.summarize(planted({IN_TREE: 1, AGAIN: 1, PLUGIN: 1, "mtp": 1, "int8": 1}, noise=0))
    tasks = in_tree.arms(TASK, {"mtp": {"speculative_config": {}}, "int8": {}})
    facts = dict.fromkeys(tasks, FACTS) | {"int8": {**FACTS, "quantization": "experts_int8"}}
    shares = in_tree.roofline_shares(rows, tasks, facts, config, 40e9)
    step_s = roofline.step_bytes(Layout(config, "bf16"), 32 + 64 // 2, 1) / 40e9
    assert shares == {"decode 1": dict.fromkeys((IN_TREE, AGAIN, PLUGIN), pytest.approx(50 * step_s))}


def test_bandwidth_is_known_by_the_whole_name():
    assert in_tree.known_bandwidth("NVIDIA H100 80GB HBM3") == 3.35
    assert in_tree.known_bandwidth("NVIDIA H100 PCIe") is None


def test_a_copy_without_mtp_layers_has_all_the_rest(tmp_path):
    copied = Checkpoint.at(shapes.without_mtp(str(DEMO), tmp_path / "copy"))
    config = shapes.load_config(str(tmp_path / "copy"))
    assert config.num_nextn_predict_layers == 0
    assert copied.tensors.keys() == main_tensors(config).keys()
    before, after = load_file(DEMO / "model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert all(after[name].equal(before[name]) for name in after)
    assert shapes.without_mtp(str(tmp_path / "copy"), tmp_path / "again") == str(tmp_path / "copy")
    prompt = "What is YaRN?"
    tokenizers = (AutoTokenizer.from_pretrained(folder) for folder in (DEMO, tmp_path / "copy"))
    assert len({tuple(one(prompt)["input_ids"]) for one in tokenizers}) == 1


def test_comparison_is_plotted_and_its_table_fits_into_80_columns(tmp_path, monkeypatch, capsys):
    gains = {IN_TREE: 1, AGAIN: 1, PLUGIN: 1.2, "fp8-kv": 0.8}
    figures = {"decode 32": 123456.0, "prefill 2048": 123456.0, "TTFT 32": 1.0, "load": 123.0}
    rows = statistics.summarize(planted(gains, **figures))
    report = {"model": "demo", "engine": {}, "rows": rows, "roofline": {}, "notes": ["a note"]}
    report["arms"] = {**dict.fromkeys(gains, OURS), IN_TREE: FACTS}
    plots.plot_comparison(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for name, value in TERMINAL.items():  # in a pipe no line is broken
        monkeypatch.setenv(name, value)
    show_comparison(report)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "\x1b" not in printed and "…" not in printed
    assert printed.count("faster") == 4 and printed.count("slower") == 4 and "a note" in printed
