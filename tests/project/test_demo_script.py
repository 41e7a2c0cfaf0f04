"""scripts/setup.sh and scripts/demo.sh: what a person sees, above all when something is wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import pytest

from tests.support import warm
from tests.support.paths import ROOT
from tests.support.server import free_port
from vllm_bailing import DEMO

SH = shutil.which("bash") or "bash"


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An empty home folder, a temporary folder of its own, and this Python's environment taken as it is."""
    home = tmp_path / "home"
    home.mkdir()
    # vLLM's processes talk through sockets in TMPDIR, whose paths the system limits to 107 characters.
    with tempfile.TemporaryDirectory(prefix="demo.") as temporary:
        (tmp_path / "tmp").symlink_to(temporary)
        yield os.environ | {
            "HOME": str(home),
            "TMPDIR": temporary,
            "VENV": sys.prefix,
            "SKIP_SETUP": "1",
            "PYTHONPATH": str(ROOT),
        }


@pytest.fixture
def warm_environment(environment: dict[str, str]) -> dict[str, str]:
    """With commands that have vLLM imported already, where what a server does is not the point."""
    return environment | {"VENV": str(warm.commands().parent)}


@pytest.fixture
def port() -> int:
    return free_port()


def demo(environment: dict[str, str], *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    command = [SH, str(ROOT / "scripts" / "demo.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, cwd="/")


def servers(port: int) -> list[psutil.Process]:
    """The running `vllm serve` on `port`."""
    found = psutil.process_iter(["cmdline"])
    return [process for process in found if {"serve", str(port)} <= set(process.info["cmdline"] or [])]


def processes_of(session: int) -> list[str]:
    """What still runs in `session`, that is, the server and all that it started."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.info["cmdline"] or [])[:100])
        except ProcessLookupError:
            continue
    return found


def has_engine(session: int) -> bool:
    """Whether the server has an engine process; the one that inspects the model class comes before it."""
    others = [line for line in processes_of(session) if not line.endswith("models.registry")]
    return len(others) > 1


def needs_vllm_command() -> None:
    try:
        version("vllm-bailing")
    except PackageNotFoundError:
        pytest.skip("vllm-bailing is not installed in this environment; run scripts/setup.sh")


# --- setup.sh -----------------------------------------------------------------------------------------------------


def setup(environment: dict[str, str], venv: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    used = {name: value for name, value in environment.items() if name not in ("VLLM_VERSION", "PYTHON")}
    return subprocess.run(
        [SH, str(ROOT / "scripts" / "setup.sh")],
        env=used | {"VENV": str(venv)} | variables,
        capture_output=True,
        text=True,
        timeout=180,
        cwd="/",
    )


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with the few system tools that setup.sh uses, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in "awk bash cat cksum date df dirname flock grep kill mkdir mktemp rm sed sleep tail tr".split():
        if path := shutil.which(tool):
            (folder / tool).symlink_to(path)
    return folder


def test_setup_without_python(environment, tmp_path, tools):
    done = setup(environment, tmp_path / "venv", PATH=str(tools))
    assert done.returncode == 1
    assert "no Python 3.11 to 3.14" in done.stderr and "PYTHON" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_setup_with_a_folder_that_is_no_environment(environment, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").write_text("mine")
    done = setup(environment, tmp_path / "venv")
    assert done.returncode == 1
    assert "is not a Python environment" in done.stderr
    assert (tmp_path / "venv" / "thesis.txt").read_text() == "mine"


def test_setup_with_a_wrong_version(environment, tmp_path):
    done = setup(environment, tmp_path / "venv", VLLM_VERSION="latest; rm -rf /")
    assert done.returncode == 1
    assert "VLLM_VERSION=latest; rm -rf / is not a version" in done.stderr


def test_setup_on_a_full_disk(environment, tmp_path, tools):
    (tools / "df").unlink()
    (tools / "df").write_text("#!/bin/sh\necho header\necho /dev/x 100 100 1048576 0% /\n")
    (tools / "df").chmod(0o755)
    done = setup(environment, tmp_path / "venv", PATH=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 1
    assert re.search(r"has 1 GB free, and vLLM needs \d+ GB", done.stderr)
    assert not (tmp_path / "venv").exists()


def test_setup_without_network_then_interrupted(environment, tmp_path):
    """Nothing listens at the index; what the failed run leaves is not trusted by the next one."""
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    unreachable |= {"PIP_EXTRA_INDEX_URL": "", "PIP_NO_INDEX": ""}
    venv = tmp_path / "venv"
    done = setup(environment, venv, PYTHON=sys.executable, **unreachable)
    assert done.returncode == 1
    assert "the package index could not be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (venv / ".vllm-bailing-complete").exists()
    (venv / "half-made").touch()
    again = setup(environment, venv, PYTHON=sys.executable, **unreachable)
    assert again.returncode == 1
    assert "Making" in again.stderr, "the second run went on with the first one's folder"
    assert not (venv / "half-made").exists()


def test_setup_accepts_a_complete_environment(environment):
    if not (Path(sys.prefix) / ".vllm-bailing-complete").is_file():
        pytest.skip("this environment was not made by scripts/setup.sh")
    done = setup(environment, Path(sys.prefix), PIP_INDEX_URL="http://127.0.0.1:9/simple")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- demo.sh ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no-such-folder"], "demo: ./no-such-folder is neither a folder nor a model name"),
        ([str(ROOT / "scripts")], "has no config.json"),
        (["--port", "eighty"], "demo: --port 'eighty' is not a port"),
        (["--keep", "--port"], "demo: --port '' is not a port"),
    ],
)
def test_demo_with_wrong_arguments(environment, arguments, message):
    done = demo(environment, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_demo_with_its_port_in_use(environment):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = demo(environment, str(DEMO.parent / "demo"), "--port", str(port))
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"vllm-bailing demo: port {port} cannot be used (Address already in use); choose another one"
    )
    assert not servers(port)


def test_demo_help(environment):
    done = demo(environment, "--help")
    assert done.returncode == 0
    assert "--keep" in done.stdout and "#" not in done.stdout


@pytest.mark.engine
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag"], "no-such-flag"),
        (["--max-model-len", "99999999"], "99999999"),
    ],
)
def test_demo_with_a_server_that_does_not_start(warm_environment, port, flags, message):
    done = demo(warm_environment, "--port", str(port), *flags)
    assert done.returncode == 1
    first, *details = done.stderr.splitlines()
    assert first.startswith("vllm-bailing demo: the server ended while it started (exit code ")
    assert any(message in line for line in details[:-1]), done.stderr
    assert Path(details[-1].rpartition(" ")[2]).is_file()
    assert len(details) <= 6
    assert not servers(port)


def _heed_signals() -> None:
    """What nohup, or a script's &, has the tests ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def started_demo(environment, port) -> Iterator[subprocess.Popen[str]]:
    needs_vllm_command()
    command = [SH, str(ROOT / "scripts" / "demo.sh"), "--port", str(port)]
    pipe = subprocess.PIPE
    # vLLM need not inspect the model class again: that takes a process and, on a slow machine, most of a minute.
    environment |= {"VLLM_CACHE_ROOT": str(Path("~/.cache/vllm").expanduser())}
    options = {"stdout": pipe, "stderr": pipe, "text": True, "start_new_session": True}
    process = subprocess.Popen(command, env=environment, preexec_fn=_heed_signals, **options)
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(60)


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_demo_interrupted_while_the_server_starts(started_demo, port, number):
    deadline = time.monotonic() + 60
    while not servers(port) and time.monotonic() < deadline:
        time.sleep(0.2)
    (server,) = servers(port)
    session = os.getsid(server.pid)
    assert session == server.pid
    if number == signal.SIGINT:  # at a moment when the server has started an engine process of its own
        while not has_engine(session) and started_demo.poll() is None and time.monotonic() < deadline + 400:
            time.sleep(0.2)
        assert has_engine(session)
    else:
        time.sleep(3)
    os.killpg(started_demo.pid, number)  # as a terminal does: to every process in the foreground
    _, errors = started_demo.communicate(timeout=60)
    assert started_demo.returncode == 128 + number
    assert "demo: interrupted; the server is stopped" in errors
    assert "Traceback" not in errors
    assert processes_of(session) == []


@pytest.mark.engine
def test_demo_chats_and_stops(environment, port, tmp_path):
    """The whole way on the shipped checkpoint, with an empty home folder and no terminal."""
    needs_vllm_command()
    done = demo(environment, "--port", str(port), timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "You:    Who are you?\nModel:  I am a tiny BailingMoeV2 model" in done.stdout
    assert "Paris" in done.stdout
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in done.stdout
    assert "scripts/demo.sh --port" in done.stdout
    assert done.stderr == ""
    assert not servers(port)
    assert not list((tmp_path / "tmp").glob("vllm-bailing-demo*")), "the log of a good run is not left behind"


@pytest.mark.engine
def test_demo_keeps_the_server(warm_environment, port):
    done = demo(warm_environment, "--keep", "--port", str(port), timeout_s=600)
    kill = re.search(r"Stop it with: kill (\d+)", done.stdout)
    assert done.returncode == 0 and kill, done.stdout + done.stderr
    try:
        assert servers(port)
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    finally:
        os.kill(int(kill[1]), signal.SIGTERM)
    deadline = time.monotonic() + 60
    while processes_of(int(kill[1])) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(int(kill[1])), "the printed command stops everything"
    with pytest.raises(ConnectionError), socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
