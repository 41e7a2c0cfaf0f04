"""The command line of `vllm-bailing`: the same spellings everywhere, and a help that answers at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tests.support.commands import TERMINAL, invoke
from tests.support.configs import CONFIGS
from tests.support.paths import ROOT
from tests.support.server import free_port
from vllm_bailing import DEMO, cli
from vllm_bailing.bench import in_tree
from vllm_bailing.cli import app, output
from vllm_bailing.errors import BenchError
from vllm_bailing.planning.gpus import GPUS
from vllm_bailing.tools import demo, doctor, task, verify
from vllm_bailing.tuning import space


def leaves(command: Any, *names: str) -> dict[tuple[str, ...], Any]:
    """{words that call it: command without further ones}"""
    parts = getattr(command, "commands", None)
    if parts is None:
        return {names: command}
    return {words: leaf for name, part in parts.items() for words, leaf in leaves(part, *names, name).items()}


COMMANDS = leaves(typer.main.get_command(app))
WORDS = [pytest.param(words, id=" ".join(words)) for words in COMMANDS]
# What a command cannot do without
NEEDED = {"plan": [DEMO, "--gpu", "H100"], "tune": [DEMO], "verify": [DEMO], "bench": [DEMO], "quantize": [DEMO, "out"]}
NEEDED |= {"balance": [DEMO], "draft-vocab": [DEMO, "--text", __file__], "chat-template": ["ring"]}


def parsed(words: tuple[str, ...], *arguments: Any) -> dict[str, Any]:
    """The parameters that the function of a command would get."""
    needed = NEEDED.get(words[0], [])
    return COMMANDS[words].make_context(words[-1], [str(one) for one in (*needed, *arguments)]).params


def with_option(name: str) -> set[str]:
    return {" ".join(words) for words, command in COMMANDS.items() if any(name in part.opts for part in command.params)}


# ---- spellings -------------------------------------------------------------------------------------------------


def test_options_stand_where_they_are_expected():
    assert with_option("--tensor-parallel-size") == {"plan", "tune", "bench compare"}
    assert with_option("--dtype") == {"plan", "tune", "verify", "bench compare"}
    assert with_option("--url") == {"doctor", "verify", "report", "chat", "bench mtp", "balance"}
    tables = {"info", "doctor", "plan", "verify", "chat", "tune", "bench mtp", "bench compare", "balance"}
    assert with_option("--json") == tables
    assert with_option("--engine") == {"verify", "bench mtp", "bench compare", "train-mtp", "balance"}


@pytest.mark.parametrize("spelling", ["--tensor-parallel-size", "--tp", "-tp"])
@pytest.mark.parametrize("words", [("plan",), ("tune",), ("bench", "compare")], ids=" ".join)
def test_the_size_of_tensor_parallelism_has_the_same_spellings_everywhere(words, spelling):
    assert parsed(words, spelling, "2")["tensor_parallel_size"] == 2


@pytest.mark.parametrize("spelling", ["--pipeline-parallel-size", "--pp", "-pp"])
def test_pipeline_stages_have_the_spellings_of_vllm(spelling):
    assert parsed(("plan",), spelling, "2")["pipeline_parallel_size"] == 2


@pytest.mark.parametrize(("words", "value"), [(("plan",), 3), (("bench", "mtp"), "3")], ids=["plan", "bench mtp"])
@pytest.mark.parametrize("spelling", ["--draft-tokens", "--mtp"])
def test_draft_tokens_have_the_same_spellings_everywhere(words, value, spelling):
    assert parsed(words, spelling, "3")["draft_tokens"] == value


@pytest.mark.parametrize("short, full", [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_a_data_type_has_a_short_and_a_full_name_everywhere(short, full, monkeypatch):
    given = []

    def noted(dtype, error=ValueError):
        given.append(dtype)
        raise error("noted")

    monkeypatch.setattr(space, "experts_of", lambda config, tp, dtype, ep: noted(dtype))
    monkeypatch.setattr(verify, "run", lambda *_, dtype, **__: noted(dtype))
    monkeypatch.setattr(in_tree, "run", lambda task, *_: noted(task.engine["dtype"], BenchError))
    config = ROOT / "tests" / "data" / "configs" / "Ling-flash-2.0.json"
    plans = []
    for spelling in (short, full):
        plan = invoke("plan", config, "--gpu", "H200", "--gpus", 8, "--dtype", spelling, "--json")
        plans.append(json.loads(plan.stdout)["dtype"])
        assert invoke("tune", DEMO, "--dtype", spelling).exit_code == 2
        assert invoke("verify", DEMO, "--dtype", spelling).exit_code == 2
        assert invoke("bench", "compare", "demo", "--dtype", spelling).exit_code == 2
    assert plans == [short, short]
    assert given == 2 * [short, full, full]  # as each of the three takes it


@pytest.mark.parametrize("words", [("verify",), ("bench", "mtp")], ids=" ".join)
def test_a_file_without_prompts_is_refused(words, tmp_path):
    (tmp_path / "prompts").write_text("\n \n")
    done = invoke(*words, DEMO, "--prompts", tmp_path / "prompts")
    assert done.exit_code == 2 and "is empty; write one user message a line" in done.stderr


# ---- completion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("plan --gpu H1", {"H100"}),
        ("plan --gpu R", {"RTX4090"}),
        ("plan --go", {"--goal"}),
        ("plan --goal l", {"latency"}),
        ("plan --dtype f", {"fp16", "fp32", "fp8"}),
        ("chat-template ", {"ring"}),
        ("bench compare fl", {"flash-4L", "flash-8L"}),
        ("demo --k", {"--keep"}),
        ("rep", {"report"}),
    ],
)
def test_a_shell_completes_words_without_vllm(typed, offered):
    code = "import sys; from vllm_bailing import cli\ntry:\n    cli.main()\nfinally:\n"
    code += "    print('heavy', *{'torch', 'vllm', 'transformers', 'rich'} & set(sys.modules), file=sys.stderr)"
    words = f"vllm-bailing {typed}"
    env = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1), "_VLLM_BAILING_COMPLETE": "complete_bash"}
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = 'vllm-bailing'\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env})
    assert done.stderr == "heavy\n" and offered <= set(done.stdout.split()), done
    assert all(word.startswith(typed.rpartition(" ")[2]) for word in done.stdout.split())


# ---- help ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [*WORDS, pytest.param((), id="itself"), pytest.param(("bench",), id="bench")])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_fits_into_80_columns(words, flag):
    """And no word of it is cut off."""
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, [*words, flag], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert done.exit_code == 0 and done.stdout.startswith("Usage: ")
    assert max(map(len, done.stdout.splitlines())) <= 80 and "..." not in done.stdout.partition("Commands:")[2]
    options = {option for part in getattr(COMMANDS.get(words), "params", ()) for option in part.opts if "-" in option}
    assert all(option in done.stdout for option in options)


@pytest.mark.parametrize("words", [(), ("bench",)], ids=["all", "bench"])
def test_a_list_of_commands_cuts_none_off(words):
    _, commands = invoke(*words, "--help", COLUMNS="80").output.split("\nCommands:\n")
    assert commands and not [line for line in commands.splitlines() if line.endswith("...")], commands


def test_help_and_version_import_nothing_heavy():
    calls = [["--version"], *([*words, "--help"] for words in COMMANDS)]
    code = f"""
import sys
from vllm_bailing.cli import app, output
for arguments in {calls!r}:
    try:
        app(arguments)
    except SystemExit as done:
        assert not done.code, arguments
heavy = "torch vllm transformers numpy openai compressed_tensors safetensors huggingface_hub rich.table".split()
print("heavy:", *(name for name in heavy if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"


# ---- the demo --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "model", "flags", "others"),
    [
        ("", "", [], {}),
        ("--max-model-len 512", "", ["--max-model-len", "512"], {}),
        ("some/model -tp 2 --keep", "some/model", ["-tp", "2"], {"keep": True}),
        ("--port=81 --adapter -dph --no-enable-chunked-prefill", "", ["-dph", "--no-enable-chunked-prefill"],
         {"port": "81", "adapter": True}),
        ("--port 81 some/model -O0 x", "some/model", ["-O0", "x"], {"port": "81"}),
        ("--keep --port", "", [], {"keep": True, "port": ""}),
    ],
)  # fmt: skip
def test_flags_of_the_demo_are_divided_from_those_of_vllm(line, model, flags, others):
    expected = {"keep": False, "adapter": False, "port": "8000", **others, "model": model, "flags": flags or None}
    given = parsed(("demo",), *line.split())
    assert {**given, "flags": given["flags"] or None} == expected


def test_the_demo_is_served_as_the_guides_serve_it():
    words = demo.server_command(demo.Options(adapter=True, flags=["--dtype", "float32"]))
    line = " ".join(words[1:])
    for page in ("serve", "tools-and-thinking", "adapters"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
        call = next(one for one in text.splitlines() if one.startswith('vllm serve "$(vllm-bailing demo-path)"'))
        flags = call.replace("$(vllm-bailing demo-path --adapter)", str(demo.DEMO_ADAPTER)).replace('"', "").split()[4:]
        assert flags and " ".join(flags[:2]) in line and set(flags) <= set(words), page
    assert words[-2:] == ["--dtype", "float32"]


def test_variables_that_are_set_keep_their_values(monkeypatch):
    monkeypatch.setattr(demo, "version", lambda package: "0.32.0+cpu")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    environment = demo.server_environment(demo.Options())
    assert environment["HF_HUB_OFFLINE"] == "0" and "VLLM_CPU_KVCACHE_SPACE" not in environment  # it has a flag
    assert "VLLM_CPU_OMP_THREADS_BIND" in environment
    environment = demo.server_environment(demo.Options("some/model", flags=["-tp", "2"]))
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "4" and "VLLM_CPU_OMP_THREADS_BIND" not in environment


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "INFO 11-25 18:00:00 [core.py:1] Loading\nValueError: too long\n  details\nTraceback",
            ["ValueError: too long"],
        ),
        ("ValueError: first\nRuntimeError: Engine core initialization failed", ["ValueError: first"]),
        ("nothing\nknown", ["nothing", "known"]),
    ],
)
def test_the_reason_why_the_server_ended_is_read_from_its_log(log, words, tmp_path):
    (tmp_path / "log").write_text(log)
    shown = demo._cause(tmp_path / "log").splitlines()
    assert [line for line in shown if line.strip() in words] == [f"  {word}" for word in words]
    assert shown[-1] == f"  the whole log is in {tmp_path / 'log'}"
    assert "Traceback" not in "".join(shown) and "initialization failed" not in "".join(shown[:1])


def test_the_log_is_told_in_our_words(tmp_path):
    log, told = tmp_path / "log", []
    for line in (
        "(APIServer pid=1) WARNING 11-26 20:17:23 [system_utils.py:255] Found ulimit of 20000 and failed",
        "(APIServer pid=1) INFO 11-26 20:18:19 [model.py:733] Resolved architecture: BailingMoeV2ForCausalLM",
        "(EngineCore pid=2) INFO 11-26 20:19:15 [core.py:133] Initializing a V1 LLM engine (v0.32.0)",
        "(Worker pid=3) INFO 11-26 20:19:45 [cpu_model_runner.py:68] Starting to load model demo...",
        "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00,  7.08it/s]",
        "(EngineCore pid=2) INFO 11-26 20:19:50 [core.py:402] init engine (profile, create kv cache) took 1 s",
        "(APIServer pid=1) INFO 11-26 20:19:52 [launcher.py:46] Route: /inference/v1/abort_requests, Methods: POST",
    ):
        with log.open("a") as file:
            file.write(f"{line}\n")
        told.append(demo._stage(log))
    assert told == [
        "importing vLLM",
        "reading the configuration",
        "starting the engine",
        "loading the weights",
        "loading the weights, 50 %",
        "opening the port",
        "opening the port",
    ]


def test_vllm_still_logs_what_tells_the_stages():
    folder = Path(find_spec("vllm").origin).parent
    rooms = ("v1", "config", "model_executor/model_loader", "compilation")
    text = "".join(file.read_text() for room in rooms for file in (folder / room).rglob("*.py"))
    assert [sign for sign in demo._STAGES if sign not in text] == []


def test_the_log_stays_only_where_it_is_of_use():
    with demo.log_file(keep=False) as log:
        pass
    assert not log.exists()
    with demo.log_file(keep=True) as log:
        pass
    assert log.exists()
    log.unlink()
    with pytest.raises(demo.DemoError), demo.log_file(keep=False) as log:
        raise demo.DemoError(f"the whole log is in {log}")
    assert log.exists()
    log.unlink()


def test_an_empty_answer_is_an_error(monkeypatch):
    from vllm_bailing.tools import chat

    answers = {"good": "Fine.", "empty": " "}

    def create(model, **_):
        delta = SimpleNamespace(content=answers[model], reasoning=None, tool_calls=[])
        return iter([SimpleNamespace(choices=[SimpleNamespace(delta=delta, finish_reason="stop")])])

    client = SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))
    monkeypatch.setattr(chat, "connect", lambda url: client)
    assert "".join(demo.ask(demo.Options(), "good", "How are you?")) == "Fine."
    with pytest.raises(demo.DemoError, match="empty text"):
        list(demo.ask(demo.Options(), "empty", "How are you?"))


def test_what_goes_wrong_in_the_program_itself_is_no_verdict(monkeypatch, capsys):
    def broken():
        raise RuntimeError("as broken as can be")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2 and "RuntimeError: as broken as can be" in capsys.readouterr().err


def test_a_plan_that_cannot_be_written_is_one_line(tmp_path):
    done = invoke("plan", DEMO, "--gpu", "H100", "--config", tmp_path / "missing" / "serve.yaml")
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 2 and "missing/serve.yaml: No such file or directory; name another file" in line


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--gpu", "H100"),
        ("tune", "--dry-run", "--device-name", "NVIDIA_H20"),
        ("bench", "mtp"),
        ("bench", "compare"),
        ("draft-vocab", "--text", __file__),
        ("quantize", "out"),
        ("verify",),
        ("train-mtp", "--plan"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("place", ["nowhere/at/all", "./nowhere"])
def test_a_path_that_is_nowhere_is_one_line_before_anything_starts(words, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, names = words[0], 2 if words[0] == "bench" else 1
    done = invoke(*words[:names], place, *words[names:])
    (line,) = done.stderr.strip().splitlines()
    assert done.exit_code == 2 and command in line and f"{place} is no folder" in line and "name on the hub" in line


def test_gpus_are_listed_without_a_model():
    done = invoke("plan", "--list-gpus")
    first, *lines = done.stdout.splitlines()
    assert done.exit_code == 0 and first.startswith("name ") and max(map(len, done.stdout.splitlines())) <= 80
    assert [line.split()[0] for line in lines] == list(GPUS)
    assert [line.split(maxsplit=3)[3] for line in lines] == [gpu.driver_names[0] for gpu in GPUS.values()]


def test_a_plan_shows_more_only_where_there_is_more_to_say():
    config = ROOT / "tests" / "data" / "configs" / "Ling-mini-2.0.json"
    alone, many = (invoke("plan", config, "--gpu", "H100", "--gpus", count).stdout for count in (1, 8))
    assert not any(word in alone for word in ("why:", "runner-up:", "traffic:", "replica", "A router", "--port"))
    assert len(alone.splitlines()) <= 28  # one less than when there was one layout
    assert "nothing was run on GPUs yet" in alone and "nothing was run on GPUs yet" in many
    for word in (
        "why: 1 GPU holds",
        "runner-up: 4 replicas of TP 2",
        "CUDA_VISIBLE_DEVICES=0 vllm serve",
        "--port 8000",
    ):
        assert word in many
    assert [line for line in many.splitlines() if line.startswith("the same")] == [
        f"the same with CUDA_VISIBLE_DEVICES={number} --port {8000 + number}" for number in range(1, 8)
    ]


def test_a_plan_over_nodes_has_a_command_for_each():
    config = ROOT / "tests" / "data" / "configs" / "Ling-1T.json"
    arguments = ("plan", config, "--gpu", "H200", "--gpus", 8, "--nodes", 2, "--concurrency", 7)
    shown = invoke(*arguments).stdout
    assert "node 0, of address HOST0:" in shown and "node 1:" in shown and shown.count("vllm serve") == 2
    found = json.loads(invoke(*arguments, "--json").stdout)
    assert [own["node"] for own in found["commands"]] == [0, 1] and found["serve"] == found["commands"][0]["line"]
    assert "--node-rank 1 --master-addr HOST0 --headless" in found["commands"][1]["line"].replace("\\\n  ", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", 0), "--nodes 0 must be a whole number of at least 1"),
        (("--goal", "x"), "--goal 'x' is not known; use one of throughput, latency"),
        (
            ("--gpus", 8, "--tp", 4, "--dp", 4),
            "--tensor-parallel-size 4 x --data-parallel-size 4 makes no groups of equal size of --gpus 8",
        ),
        (("--ep",), "expert parallelism needs more than one GPU"),
        (("--gpu-memory-utilization", 2), "--gpu-memory-utilization 2.0 must be above 0 and at most 1"),
        (("--draft-tokens", 1, "--dtype", "x"), "--dtype 'x' is not known"),
        (("--gpus", 8, "--tp", 8, "--redundant-experts", 8), "add --enable-expert-parallel or --dp"),
        (("--gpus", 12), "--gpus 12 are more than the 8 of a usual node"),
    ],
)
def test_a_plan_that_makes_no_sense_is_one_line(arguments, said):
    done = invoke("plan", ROOT / "tests" / "data" / "configs" / "Ling-mini-2.0.json", "--gpu", "H100", *arguments)
    (line,) = done.stderr.splitlines()
    assert done.exit_code == 2 and line.startswith("vllm-bailing plan: ") and said in line


@pytest.mark.parametrize(
    "arguments",
    [("--batch-size", "0"), ("--batch-size", "1,x"), ("--draft-tokens", "-1")],
    ids=str,
)
def test_wrong_numbers_are_refused_before_an_engine_starts(arguments, monkeypatch):
    from vllm_bailing.bench import mtp

    monkeypatch.setattr(mtp, "MtpTask", lambda *_: pytest.fail("goes on"))
    done = invoke("bench", "mtp", DEMO, *arguments)
    assert done.exit_code == 2 and "is not a list of numbers from" in " ".join(done.stderr.split()), done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", CONFIGS / "Ling-flash-2.0.json", "--gpu", "H100", "--gpus", "4"),
        ("doctor", DEMO, "--deep"),
        ("doctor", "--url", "URL"),
        ("verify", DEMO, "--url", "URL"),
        ("report", "--model", DEMO, "--url", "URL"),
        ("bench", "mtp", DEMO, "--url", "URL"),
        ("balance", DEMO, "--url", "URL"),
        ("chat", "hello", "--url", "URL"),
    ],
    ids=lambda arguments: " ".join(str(one) for one in arguments if not isinstance(one, Path)),
)
def test_nothing_is_asked_but_the_server_named(arguments, tmp_path, monkeypatch):
    """Not the hub either, which knows nothing of a folder."""
    url, asked = f"http://127.0.0.1:{free_port()}", set()

    def connect(_, address):
        asked.add(address)
        raise ConnectionRefusedError(111, "Connection refused")

    look_up = socket.getaddrinfo

    def resolve(host, *rest, **options):
        asked.add(host)
        return look_up(host, *rest, **options)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(doctor, "Worker", lambda: SimpleNamespace(checks=lambda: iter(())))  # a process imports vLLM
    monkeypatch.chdir(tmp_path)
    words = [url if one == "URL" else str(one) for one in arguments]
    done = CliRunner().invoke(app, words, env={"XDG_CACHE_HOME": str(tmp_path)})
    assert done.exception is None or isinstance(done.exception, SystemExit)
    port = int(url.rpartition(":")[2])
    assert asked <= {"127.0.0.1", ("127.0.0.1", port)}
    assert bool(asked) == ("URL" in arguments), done.output


# ---- what a command does not take, and how it ends -------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("verify", DEMO, "--url", "localhost:9", "--engine", '{"seed": 1}'), "--engine has no effect with --url"),
        (("verify", DEMO, "--served-model-name", "x"), "--served-model-name has no effect without --url"),
        (("verify", DEMO, "--chat-template", __file__), "--chat-template has no effect without --url"),
        (("verify", DEMO, "--engine", '{"hf_overrides": {}}'), "give it by --hf-overrides"),
        (("doctor", "--deep"), "--deep has no effect without MODEL"),
        (("doctor", "--hf-overrides", '{"dequantize": true}'), "--hf-overrides has no effect without MODEL"),
        (("doctor", "--timeout", 3), "--timeout has no effect without --url"),
        (("report", "--model", DEMO, "--served-model-name", "x"), "--served-model-name has no effect without --url"),
        (("bench", "mtp", "m", "--url", "localhost:9", "--draft-model", "x"), "--draft-model has no effect with --url"),
        (("balance", DEMO, "--served-model-name", "x"), "--served-model-name has no effect without --url"),
        (("plan", DEMO, "--gpu", "cpu", "--dtype", "int8"), "--dtype has no effect with --gpu cpu"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(arguments, said):
    done = invoke(*arguments)
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.output


@pytest.mark.parametrize(
    "words", [("verify", DEMO), ("bench", "mtp", DEMO), ("bench", "compare", "demo"), ("balance", DEMO)], ids=str
)
@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ('{"nope_nope": 1}', "--engine: 'nope_nope' is no argument of vllm.LLM; correct it, or leave it out"),
        ('{"max_modle_len": 1}', "'max_modle_len' is no argument of vllm.LLM; is 'max_model_len' meant?"),
        ('{"model": "x"}', "--engine: 'model' is what MODEL says; leave it out"),
    ],
)
def test_what_is_no_argument_of_an_engine_is_refused_before_one_starts(words, engine, said, tmp_path, monkeypatch):
    monkeypatch.setattr(task.subprocess, "Popen", lambda *_, **__: pytest.fail("starts a process"))
    monkeypatch.chdir(tmp_path)
    done = invoke(*words, "--engine", engine)
    assert done.exit_code == 2 and said in " ".join(done.stderr.split()), done.output


def test_arguments_of_an_arm_are_checked_as_those_of_the_engine(tmp_path):
    done = invoke("bench", "compare", "demo", "--option", 'a={"max_modle_len": 1}', "--out", tmp_path / "out")
    assert done.exit_code == 2 and "--option: 'max_modle_len' is no argument of vllm.LLM" in done.stderr


def test_arguments_of_an_engine_are_known_without_importing_it():
    task.check_arguments("--engine", ["max_model_len", "enforce_eager", "kv_cache_memory_bytes", "hf_overrides"])
    assert len(task._engine_arguments()) > 100


@pytest.mark.parametrize(
    "arguments",
    [("doctor", ""), ("plan", "", "--gpu", "H100"), ("report", "--model", ""), ("verify", ""), ("quantize", DEMO, "")],
    ids=str,
)
def test_an_empty_argument_is_a_variable_that_is_not_set(arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2 and "is empty; is a variable not set?" in done.stderr, done.output


@pytest.mark.parametrize(
    ("arguments", "target", "said"),
    [
        (("verify", DEMO), "vllm_bailing.tools.verify.run", "verify: interrupted; the same command goes on from here"),
        (("verify", DEMO, "--fresh"), "vllm_bailing.tools.verify.run", "goes on from here, without --fresh"),
        (("plan", DEMO, "--gpu", "H100"), "vllm_bailing.planning.plan.make_plan", "vllm-bailing plan: interrupted"),
        (("bench", "compare", "demo"), "vllm_bailing.bench.in_tree.run", "vllm-bailing bench: interrupted"),
        (("report", "--model", DEMO), "vllm_bailing.report.page.make", "vllm-bailing report: interrupted"),
    ],
)
def test_what_is_interrupted_says_so(arguments, target, said, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(target, interrupted)
    done = invoke(*arguments)
    assert done.exit_code == 130 and done.stderr.endswith(f"{said}\n"), done.output


@pytest.mark.parametrize("words", [["plan", "--list-gpus"], ["plan", "--help"], ["plan", str(DEMO), "--gpu", "H100"]])
def test_a_reader_that_goes_away_is_no_failure(words):
    code = "import sys; from vllm_bailing import cli; sys.argv[0] = 'vllm-bailing'; cli.main()"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code, *words], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("before", ["SIG_DFL", "SIG_IGN"])
def test_a_signal_ends_a_command_in_its_own_way_unless_it_is_ignored(name, before):
    """As nohup leaves the one of a terminal that goes away."""
    code = f"""
import os, signal
from vllm_bailing import cli
signal.signal(signal.{name}, signal.{before})
def app():
    try:
        os.kill(os.getpid(), signal.{name})
        print("goes on")
    finally:
        print("cleaned up")
cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    goes_on = before == "SIG_IGN"
    assert done.stdout == "goes on\n" * goes_on + "cleaned up\n", done.stderr
    assert done.returncode == (0 if goes_on else 128 + signal.Signals[name])


@pytest.mark.parametrize("argument", ["--prompts=", "--url="])
def test_an_option_without_a_value_is_refused_and_one_with_any_is_not(argument):
    assert "is empty; is a variable not set?" in invoke("verify", DEMO, argument).stderr
    assert "is empty" not in invoke("verify", DEMO, f"{argument}no-such-file=").stderr


@pytest.mark.parametrize("option", ["--prompts", "--draft-vocab"])
def test_a_result_is_not_written_over_what_is_read(option, tmp_path, monkeypatch):
    (tmp_path / "given.json").write_text("[1]")
    monkeypatch.chdir(tmp_path)
    done = invoke("bench", "mtp", DEMO, option, "given.json", "--out", tmp_path / "given")
    assert done.exit_code == 2 and "is a file that is read; name another one" in done.stderr, done.output
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    done = invoke("plan", "config.json", "--gpu", "H100", "--config", "config.json")
    assert done.exit_code == 2 and "--config config.json is a file that is read" in done.stderr, done.output


@pytest.mark.parametrize("words", [("bench", "mtp", DEMO), ("bench", "compare", "demo"), ("balance", DEMO)], ids=str)
def test_a_place_that_cannot_be_written_is_refused_before_an_engine_starts(words, monkeypatch):
    monkeypatch.setattr(task.subprocess, "Popen", lambda *_, **__: pytest.fail("starts a process"))
    done = invoke(*words, "--out", "/proc/x/y")
    assert done.exit_code == 2 and "--out /proc/x/y: No such file or directory; name another file" in done.stderr


def test_a_result_is_not_written_over_another_name_of_what_is_read(tmp_path):
    (tmp_path / "given.json").write_text("{}")
    os.link(tmp_path / "given.json", tmp_path / "page.html")
    done = invoke("report", tmp_path / "given.json", "--out", tmp_path / "page.html")
    assert done.exit_code == 2 and "is a file that is read; name another one" in done.stderr, done.output


@pytest.mark.parametrize("words", [["plan", str(DEMO), "--gpu", "H100", "--json"], ["info", "--json"]], ids=" ".join)
def test_an_output_that_is_full_is_one_line(words):
    code = "import sys; from vllm_bailing import cli; sys.argv[0] = 'vllm-bailing'; cli.main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code, *words], stdout=full, stderr=subprocess.PIPE, cwd=ROOT)
    said = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2 and said.endswith(": No space left on device; make room, or write elsewhere"), said
    assert b"Traceback" not in done.stderr


def test_an_output_that_is_closed_is_no_traceback():
    code = "import sys; from vllm_bailing import cli; sys.argv[0] = 'vllm-bailing'; cli.main()"
    command = [sys.executable, "-c", code, "demo-path"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, cwd=ROOT)
    assert done.stderr == b""


@pytest.mark.parametrize("name", ["[/x]", "a[red]b", "[bold]x[/bold]"])
@pytest.mark.parametrize("gpu", [("--gpu", "H100"), ("--gpu", "cpu", "--bandwidth", "0.05", "--memory-gib", "8")])
def test_brackets_in_a_name_are_brackets(name, gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    (Path(name) / "config.json").write_text((DEMO / "config.json").read_text())
    done = invoke("plan", name, *gpu)
    assert done.stdout.startswith(f"{name} "), done.output
    assert name in invoke("doctor", name).output


def test_a_name_that_begins_with_a_dash_is_shown_so_that_it_can_be_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-dash").mkdir()
    Path("-dash/config.json").write_text((DEMO / "config.json").read_text())
    assert "vllm serve ./-dash" in invoke("plan", "--gpu", "H100", "--", "-dash").stdout


@pytest.mark.parametrize("url", ["/etc/passwd", "http://", "http://[::1", "ftp://here", " "])
@pytest.mark.parametrize(
    "words", [("verify", DEMO), ("doctor",), ("report",), ("balance", DEMO), ("bench", "mtp", "m")]
)
def test_what_is_no_url_is_refused_in_the_same_words(words, url):
    done = invoke(*words, "--url", url)
    assert done.exit_code == 2 and "give a URL such as http://localhost:8000" in " ".join(done.stderr.split())


# ---- lines -----------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(monkeypatch):
    for name, value in TERMINAL.items():
        monkeypatch.setenv(name, value)


CHECK = doctor.Check(
    "generation_config.json", False, "long words " * 12 + "inclusionAI/Ling-flash-2.0", "call `" + "word " * 20 + "`"
)


def test_a_text_breaks_at_blanks_and_goes_on_under_its_beginning(terminal, capsys):
    cli.doctor.show_check(output.console(), CHECK)
    lines = capsys.readouterr().out.splitlines()
    first, *rest = (line for line in lines if "word " not in line.replace("long words", ""))
    assert first.startswith("no  generation_config.json long words long") and max(map(len, (first, *rest))) <= 80
    assert all(line[:4].isspace() for line in lines[1:])
    assert "inclusionAI/Ling-flash-2.0" in "".join(rest)
    assert f"`{'word ' * 20}`" in "\n".join(lines)  # it is to be copied


def test_nothing_is_broken_in_a_pipe(capsys):
    cli.doctor.show_check(output.console(), CHECK)
    assert capsys.readouterr().out.splitlines() == [
        f"no  {CHECK.name} {CHECK.detail}",
        f"    to do: {CHECK.fix}",
    ]
    output.console().print("word " * 40 + "end")
    assert capsys.readouterr().out == "word " * 40 + "end\n"


def test_a_command_is_laid_out_for_the_terminal():
    config = ROOT / "tests" / "data" / "configs" / "Ling-flash-2.0.json"
    done = invoke("plan", config, "--gpu", "H100", "--gpus", 4, **TERMINAL)
    command = done.stdout[done.stdout.index("vllm serve MODEL ") :]
    assert max(map(len, command.splitlines())) <= 80 and command.count(" \\\n  --") == 2


def test_a_plan_serves_the_folder_of_a_config_file(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(DEMO / name)
    assert f"vllm serve {tmp_path} " in invoke("plan", tmp_path / "config.json", "--gpu", "H100").stdout
    (tmp_path / "model.safetensors").unlink()
    assert "vllm serve MODEL " in invoke("plan", tmp_path / "config.json", "--gpu", "H100").stdout
