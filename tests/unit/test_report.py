"""`vllm-bailing report`: the page holds the numbers of its files, and nothing of a file can become more than text."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from tests.support.commands import invoke
from tests.support.paths import ROOT
from vllm_bailing.report import live, page, pictures
from vllm_bailing.report.inputs import read_result
from vllm_bailing.report.live import Live
from vllm_bailing.tools import doctor_server
from vllm_bailing.tools.doctor import Check

COMPARED = ROOT / "docs" / "benchmarks" / "cpu-mid-eager-bf16.json"
DRAFTED = ROOT / "docs" / "mtp-demo.json"
BALANCED = ROOT / "docs" / "balance.json"
ROW = {"tokens": 67, "mean": 0.014, "max": 0.2, "divergence": 3e-4, "agreement": 1.0}
VERIFIED = {
    "checkpoint": "folder/Ling-mini-2.0",
    "deployment": "http://localhost:8000",
    "dtype": "bfloat16",
    "tolerance": {"mean": 0.05, "divergence": 0.004},
    "prompts": [ROW, {**ROW, "tokens": 1062, "mean": 0.0829}],
    "overall": {**ROW, "tokens": 1129, "mean": 0.024},
    "computes": True,
    "reason": "",
    "not_checked": "",
}
DOCTOR = [{"name": "python", "ok": True, "detail": "3.11", "fix": ""}, {"name": "files", "ok": False, "detail": "gone"}]
SERVER = Live("http://host:8000", [Check("server", True, "well")], "demo", 2048, 4096, "auto", 0.92, 1, 50.0, 7)
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=y> {{7*7}} $\\frac{ \x1b[31m\u202e&amp;"


class Page(HTMLParser):
    """What a browser would see: tags with attributes, headings, and tables as lists of rows of texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {"h1": [], "h2": [], "dd": [], "caption": [], "p": []}
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("meta", "path", "use", "br") and tag != "path":
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in self.texts:
            self.texts[tag].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        for tag in self.texts:
            if tag in self.open:
                self.texts[tag][-1] += data


@pytest.fixture
def written(tmp_path):
    """The page that the command makes of objects or files."""

    def make(*found, **env) -> Page:
        files = []
        for place, one in enumerate(found):
            file = tmp_path / f"{place}.json"
            if not isinstance(one, (dict, list)):
                file = one
            else:
                file.write_text(json.dumps(one))
            files.append(file)
        done = invoke("report", *files, "--out", tmp_path / "page.html", **env)
        assert done.exit_code == 0, done.output
        return Page((tmp_path / "page.html").read_text())

    return make


def planned(**changes) -> dict:
    config = ROOT / "tests" / "data" / "configs" / "Ling-flash-2.0.json"
    return json.loads(invoke("plan", config, "--gpu", "H100", "--gpus", 4, "--json").stdout) | changes


def value_of(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


# ---- the numbers -----------------------------------------------------------------------------------------------


def test_the_figures_of_a_comparison_are_those_of_the_file(written):
    (table, *_) = written(COMPARED).tables
    rows = json.loads(COMPARED.read_text())["rows"]
    assert len(table) == len(rows) + 1
    for shown, row in zip(table[1:], rows, strict=True):
        assert shown[:2] == [row["figure"], row["arm"]] and shown[2].split()[1] == row["unit"]
        assert value_of(shown[2]) == pytest.approx(row["median"], rel=0.006)
        low, high = (value_of(one) for one in shown[3].split(" to "))
        assert (low, high) == (pytest.approx(row["low"], rel=0.006), pytest.approx(row["high"], rel=0.006))
        assert value_of(shown[4]) == pytest.approx(row["ratio"], abs=0.0051)
        if row["arm"] == "plugin":
            assert shown[6] == row["verdict"]


def test_drafts_and_what_verify_found_are_those_of_the_files(written):
    shown = written(DRAFTED, VERIFIED)
    verified, drafted = shown.tables[:2]
    for cells, row in zip(drafted[1:], json.loads(DRAFTED.read_text())["rows"], strict=True):
        assert (int(cells[0]), cells[1]) == (row["batch_size"], row["arm"])
        assert value_of(cells[2]) == pytest.approx(row["tokens_per_second"]["median"], rel=0.006)
        shares = [float(one) / 100 for one in cells[7].replace("%", "").split()]
        assert shares == pytest.approx(row["acceptance"], abs=0.0006)
    assert verified[2] == ["2", "1,062", "0.0829", "0.2", "0.0003", "100.0 %", "above"]
    assert verified[3] == ["all", "1,129", "0.024", "0.2", "0.0003", "100.0 %", "within"]
    assert shown.texts["h1"] == ["Deployment of folder/Ling-mini-2.0"]


def test_the_load_of_experts_and_ranks_is_that_of_the_file(written):
    found = json.loads(BALANCED.read_text())
    shown = written(BALANCED)
    load, ranks = shown.tables[:2]
    for cells, row in zip(load[1:], found["load"], strict=True):
        picks = row["picks"]
        even, most, least = sum(picks) / len(picks), max(picks), min(picks)
        assert cells == [
            str(row["layer"]),
            f"{most / even:.2f}",
            str(picks.index(most)),
            f"{least / even:.2f}",
            str(picks.count(0)),
        ]
    for cells, row in zip(ranks[1:], found["ranks"], strict=True):
        worth, without = row["worth"], row["eplb"][0]
        copies = f"{worth['imbalance']:.2f}, {worth['redundant']}, {worth['bytes'] / 2**20:.2f} MiB"
        assert cells[:4] == [str(row["ep"]), *(f"{row[key]:.2f}" for key in ("linear", "round_robin")), cells[3]]
        assert without["redundant"] == 0 and cells[3] == f"{without['imbalance']:.2f}"
        assert cells[4] == (copies if worth["redundant"] else "none") and cells[5] == f"{row['even']:.2f}"
        assert cells[6] == f"{100 * row['waiting']:.1f} % to {100 * row['waiting_with_eplb']:.1f} %"
    assert len([tag for tag, _ in shown.tags if tag == "figure"]) == 1


def test_what_decided_and_where_it_differs_is_shown(written):
    judged = {key: value for key, value in VERIFIED.items() if key != "tolerance"} | {
        "measures": {"median": [0.91, 1.25], "worst_token": [40.0, 12.5]},
        "shifts": [{"part": "experts of layer 7", "size": 0.05, "error": 0.004, "significance": 12.5, "share": 0.31}],
        "coverage": {"vocabulary": 0.93, "experts": [1.0, 0.875]},
        "words": {**ROW, "tokens": 1024},
        "looks_like": "one layer's experts",
    }
    shown = written(judged)
    decides, parts, deviations = shown.tables[:3]
    assert decides[1:] == [["median", "0.91", "1.25", "within"], ["worst token", "40", "12.5", "above"]]
    assert parts[1:] == [["experts of layer 7", "0.05", "0.004", "12.5", "31.0 %"]]
    assert [row[:2] for row in deviations[1:]] == [["1", "67"], ["2", "1,062"], ["words", "1,024"], ["all", "1,129"]]
    touched = "93.0 % of the vocabulary, at least 87.5 % of the experts of every layer"
    assert {touched, "one layer's experts"} <= set(shown.texts["dd"])
    assert len([tag for tag, _ in shown.tags if tag == "figure"]) == 1


def test_the_memory_of_a_plan_adds_up(written):
    plan = planned()
    (table, *_) = written(plan).tables
    sizes = {(group, part): size for group, part, size in table[1:]}
    weights = sum(plan["weights"].values()) / 2**30
    assert value_of(sizes["weights", ""]) == pytest.approx(weights, abs=0.006)
    assert value_of(sizes["left for the KV cache", ""]) == pytest.approx(plan["kv_room_bytes"] / 2**30, abs=0.006)
    total = sum(
        value_of(sizes[key]) for key in (("weights", ""), ("other, estimated", ""), ("left for the KV cache", ""))
    )
    assert total == pytest.approx(plan["gpu"]["memory_bytes"] * plan["memory_utilization"] / 2**30, abs=0.02)
    assert any(f"room for {plan['kv_tokens']:,} tokens" in text for text in written(plan).texts["dd"])


def test_a_plan_is_held_against_a_server(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(planned(kv_tokens=8192, replicas=2, context=4096, draft_tokens=1)))
    made = page.make([read_result(file)], replace(SERVER, kv_tokens=4000))
    table = next(table for table in Page(made).tables if table[0][2] == "server")
    found = {row[0]: row[1:] for row in table[1:]}
    assert found["longest request, tokens"] == ["4,096", "2,048", "0.50"]
    assert found["KV cache, tokens of a replica"] == ["4,096", "4,000", "0.98"]
    assert found["draft tokens"] == ["1", "1", ""] and found["answers since the start"] == ["", "7", ""]
    assert 'class="bad"' in made
    untold = page.make([read_result(file)], replace(SERVER, kv_tokens=None, window=None, tokens_per_s=None))
    assert untold.count(">not told<") == 4


@pytest.mark.parametrize(
    ("served", "differs"),
    [
        ({"model": "Ling-flash-2.0"}, ""),
        ({"root": "/models/Ling-flash-2.0"}, ""),
        ({"window": None}, "it serves demo, and the plan is for inclusionAI/Ling-flash-2.0"),
        ({"root": "/models/demo"}, "it serves demo, and the plan is for inclusionAI/Ling-flash-2.0"),
        ({"model": "Ling-flash-2.0", "window": 1024}, "its window is 1,024 tokens, and the plan's requests have 2,048"),
    ],
)
def test_a_server_that_is_another_deployment_than_the_plans_is_told(served, differs, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(planned(model="inclusionAI/Ling-flash-2.0", context=2048)))
    said = " ".join(Page(page.make([read_result(file)], replace(SERVER, **served))).texts["p"])
    assert ("the server is not what was planned" in said) == bool(differs) and differs in said


def test_findings_of_doctor_say_what_to_do(written):
    shown = written([*DOCTOR, {"name": "index", "ok": False, "detail": "stale", "fix": "fetch it"}])
    assert shown.tables[0][2:] == [["no", "files", "gone"], ["no", "index", "stale; to do: fetch it"]]
    assert "2 problems" in shown.texts["p"]


def test_versions_that_differ_are_told(written):
    other = {**json.loads(DRAFTED.read_text()), "versions": {"vllm": "0.27.1"}}
    assert any("different versions: vllm" in text for text in written(DRAFTED, other).texts["p"])
    assert any("the same throughout" in text for text in written(DRAFTED, COMPARED).texts["p"])


def test_keys_that_a_newer_command_adds_are_shown(written):
    further = {"likely": "rotary", "shares": {"experts": 0.93}, "layers": [{"layer": 7, "gain": 1.5}], "odd": [[1]]}
    shown = written(VERIFIED | further)
    assert {"rotary", "experts 0.93"} <= set(shown.texts["dd"])
    assert [["layer", "gain"], ["7", "1.5"]] in shown.tables


def test_metrics_are_read():
    text = (
        'vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",gpu_memory_utilization="0.9",'
        'num_gpu_blocks="100"} 1.0\n'
        'vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="1",gpu_memory_utilization="0.9",'
        'num_gpu_blocks="50"} 1.0\n'
        'vllm:inter_token_latency_seconds_sum{engine="0"} 2.0\n'
        'vllm:inter_token_latency_seconds_count{engine="0"} 100.0\n'
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 3.0\n'
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="1"} 1.0\n'
        'vllm:request_success_total{finished_reason="stop"} 4.0\n'
        'vllm:request_success_total{finished_reason="length"} 2.0\n'
    )

    def counted(shown):
        return doctor_server._counted(SimpleNamespace(get=lambda path: SimpleNamespace(text=shown)))

    assert live._of_metrics(counted(text)) == {
        "kv_tokens": 16 * 150,
        "kv_dtype": "auto",
        "memory_utilization": 0.9,
        "draft_tokens": 2,
        "tokens_per_s": 50.0,
        "requests": 6,
    }
    for other in ("", "<html>", 'vllm:cache_config_info{num_gpu_blocks="None",block_size="16"} 1.0\n'):
        assert live._of_metrics(counted(other))["kv_tokens"] is None


# ---- the page --------------------------------------------------------------------------------------------------


def test_a_page_stands_alone_and_is_in_order(written):
    shown = written(VERIFIED, planned(), DOCTOR, DRAFTED, COMPARED)
    attributes = [(tag, name, value) for tag, found in shown.tags for name, value in found.items()]
    names = [value for _, name, value in attributes if name == "id"]
    assert len(names) == len(set(names))
    for tag, name, value in attributes:
        if name in ("href", "xlink:href", "src", "aria-labelledby"):
            assert value.removeprefix("#") in names, (tag, name, value)
    assert not {tag for tag, _ in shown.tags} & {"script", "link", "img", "iframe", "image"}
    policy = [found["content"] for _, found in shown.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert len(shown.texts["h1"]) == 1 and len(shown.texts["h2"]) == 6
    assert all(shown.texts["caption"]) and len(shown.texts["caption"]) == len(shown.tables)
    scopes = [found.get("scope") for tag, found in shown.tags if tag == "th"]
    assert set(scopes) == {"col", "row"}
    pictured = [found for tag, found in shown.tags if tag == "figure"]
    assert len(pictured) == 3 and all(found["role"] == "img" and found["aria-label"] for found in pictured)


def test_what_is_missing_is_named_with_its_command(written):
    assert {"vllm-bailing doctor MODEL --json > doctor.json"} <= set(written(VERIFIED).texts["dd"])
    complete = written(VERIFIED, planned(), DOCTOR)
    assert "Not in this report" not in complete.texts["h2"]


def hostile(kind: str):
    found = json.loads(COMPARED.read_text()) if kind == "compare" else copy.deepcopy(VERIFIED)
    if kind == "compare":
        found |= {"model": HOSTILE, "notes": [HOSTILE], "command": HOSTILE, "versions": {HOSTILE: HOSTILE}}
        for row in found["rows"]:
            row["figure"] += HOSTILE
    elif kind == "mtp":
        found = json.loads(DRAFTED.read_text()) | {"model": HOSTILE, "advice": {HOSTILE: HOSTILE}}
    elif kind == "balance":
        found = json.loads(BALANCED.read_text()) | {"model": HOSTILE}
    elif kind == "plan":
        found = planned(model=50 * HOSTILE, serve=HOSTILE, notes=[HOSTILE], verdict=HOSTILE)
        found["gpu"]["name"] = HOSTILE
    elif kind == "doctor":
        found = [{"name": HOSTILE, "ok": False, "detail": HOSTILE, "fix": HOSTILE}]
    else:
        found |= {"checkpoint": HOSTILE, "reason": HOSTILE, HOSTILE: HOSTILE, "more": [{HOSTILE: HOSTILE}]}
    return found


@pytest.mark.parametrize("kind", ["verify", "plan", "doctor", "compare", "mtp", "balance"])
def test_what_stands_in_a_file_stays_text(kind, written):
    shown = written(hostile(kind))
    assert not {tag for tag, _ in shown.tags} & {"script", "img"}
    cells = [cell for table in shown.tables for row in table for cell in row]
    everything = "".join([*cells, *(text for texts in shown.texts.values() for text in texts)])
    assert "<script>alert(1)</script>" in everything and "{{7*7}}" in everything and "&amp;" in everything
    assert "\x1b" not in everything and "\u202e" not in everything


def test_numbers_that_are_none_make_a_page_too(written):
    odd = copy.deepcopy(VERIFIED)
    odd["prompts"][0] |= {"mean": math.nan, "max": math.inf}
    odd["prompts"] *= 300
    table = written(odd).tables[0]
    assert table[1][2:4] == ["nan", "inf"] and table[1][6] == "above" and len(table) == 202
    drafted, compared = json.loads(DRAFTED.read_text()), json.loads(COMPARED.read_text())
    for row in drafted["rows"]:
        row["ratio"]["median"] = math.nan
    for row in compared["rows"]:
        row |= {"ratio": math.nan, "interval": [math.nan, math.inf], "noise": math.inf}
    written(drafted, compared, compared | {"rows": [], "arms": {}}, VERIFIED | {"prompts": []})


def test_without_matplotlib_the_page_says_so(monkeypatch, written):
    def gone(*_):
        raise ImportError

    monkeypatch.setitem(pictures._DRAW, "mtp", gone)
    assert pictures.NO_MATPLOTLIB in written(DRAFTED).texts["p"]


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON (Expecting value"),
        ("[" * 200000, "is no JSON"),
        ("9" * 10000, "is no JSON"),
        ('{"a": 1}', "is JSON of something else; give the result of plan --json, verify --json,"),
        ("[]", "is JSON of something else"),
        ("null", "is JSON of something else"),
        (json.dumps(VERIFIED | {"overall": {**ROW, "mean": "x"}}), "`vllm-bailing verify --json`, but overall.mean:"),
        (json.dumps(VERIFIED | {"prompts": [{}]}), "but prompts.0.tokens: Field required; make it again"),
        (json.dumps(VERIFIED | {"overall": {**ROW, "tokens": 10**30}}), "but overall.tokens: Input should be less"),
        (
            json.dumps({"load": [], "ranks": []}),
            "`vllm-bailing balance --json`, but model: Field required; make it again",
        ),
        (json.dumps([{"name": "x", "ok": 1.5, "detail": "y"}]), "`vllm-bailing doctor --json`, but 0.ok:"),
    ],
    ids=lambda text: str(text)[:20],
)
def test_a_file_that_is_no_result_is_one_line(text, said, tmp_path):
    (tmp_path / "file").write_text(text)
    done = invoke("report", tmp_path / "file", "--out", tmp_path / "page.html")
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 2 and line.startswith("vllm-bailing report: ") and said in line
    assert not (tmp_path / "page.html").exists()


def test_what_cannot_be_read_written_or_reached_is_one_line(tmp_path):
    for arguments, said in (
        ((tmp_path / "missing",), "No such file or directory; name a file with a result"),
        ((tmp_path,), "Is a directory; name a file with a result"),
        ((DRAFTED, "--out", tmp_path / "no" / "page.html"), "name another file"),
        ((DRAFTED, "--url", "localhost:9"), "no server at http://localhost:9; start one"),
        ((DRAFTED, "--out", DRAFTED), "is a file that is read; name another one"),
        (("--model", "./nowhere"), "--model ./nowhere is no folder and no file on this machine"),
    ):
        done = invoke("report", *arguments)
        (line,) = done.stderr.splitlines()
        assert done.exit_code == 2 and said in line
    assert "nothing to report on" in invoke("report").stderr
