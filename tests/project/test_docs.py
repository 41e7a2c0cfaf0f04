"""README and guides: links lead somewhere, commands run, options and messages exist.

A block of bash or Python runs as it stands, on the demo checkpoint, unless the line above it says what it needs
(`<!-- needs: gpu -->`). Such a block is read by bash with every program replaced by one that notes its arguments, and
those have to be ones that vLLM, `vllm-bailing` and the scripts take. A block of text under a block is its output.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.support import warm
from tests.support.engine import ENGINE_ENV, run
from tests.support.paths import ROOT
from tests.support.server import free_port, stop
from tests.support.versions import since
from vllm_bailing.cli import app

README, CHANGELOG = ROOT / "README.md", ROOT / "CHANGELOG.md"
GUIDES = sorted((ROOT / "docs").glob("*.md"))


# Pages that start the same server stand beside each other, so that it is started once.
FIRST = ("README.md", "docs/serve.md", "docs/tools-and-thinking.md", "docs/verify.md", "docs/scale-out.md")
PAGES = sorted([README, *GUIDES], key=lambda page: str(page.relative_to(ROOT)) not in FIRST)
TROUBLESHOOT = ROOT / "docs" / "troubleshoot.md"
# Pages whose blocks need more than the oldest release has.
RECENT = {"docs/scale-out.md": since("0.32", "routers on CPUs that can be watched")}
NEEDS = {"gpu", "download", "minutes"}
SERVER = "localhost:8000"  # where the pages expect one; the tests' listens elsewhere
BIN = Path(sys.executable).parent


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def tokens_of(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def inline(page: Path, kind: str) -> list[Token]:
    """Tokens of a kind in a page's running text."""
    return [child for token in tokens_of(page) for child in token.children or () if child.type == kind]


@dataclass
class Block:
    """Code of a page; `needs` says why it cannot run here, `output` is what the page shows of its output."""

    page: Path
    line: int
    language: str
    text: str
    needs: str
    output: str = ""

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    before: Token | Block | None = None
    for token in tokens_of(page):
        if token.type == "fence":
            needs = ""
            if isinstance(before, Token) and (mark := re.fullmatch(r"<!-- needs: (\w+) -->\s*", before.content)):
                needs = mark[1]
            if token.info == "text" and isinstance(before, Block):
                before.output = token.content
                before = token
            else:
                found.append(Block(page, (token.map or [0])[0] + 1, token.info, token.content, needs))
                before = found[-1]
        elif token.level == 0:
            before = token
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


# ---- links -----------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    found: set[str] = set()
    tokens = tokens_of(page)
    for token, text in itertools.pairwise(tokens):
        if token.type == "heading_open":
            plain = "".join(child.content for child in text.children or ())
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            found.add(next(one for one in [slug, *(f"{slug}-{n}" for n in range(1, 99))] if one not in found))
    return found


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=name_of)
def test_links_lead_somewhere(page):
    targets = [str(token.attrs["href"]) for token in inline(page, "link_open")]
    targets += [str(token.attrs["src"]) for token in inline(page, "image")]
    for target in targets:
        parts = urllib.parse.urlsplit(target)
        if parts.scheme:
            assert parts.scheme == "https" and "." in parts.netloc, target
            continue
        file = (page.parent / parts.path).resolve() if parts.path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        if parts.fragment:
            assert parts.fragment in anchors_of(file), target


def test_every_guide_is_in_the_index_and_in_the_readme():
    for page in (README, ROOT / "docs" / "README.md"):
        linked = {str(token.attrs["href"]).partition("#")[0] for token in inline(page, "link_open")}
        for guide in GUIDES:
            if guide.name != "README.md":
                assert os.path.relpath(guide, page.parent) in linked, (page, guide.name)


# ---- what cannot run here --------------------------------------------------------------------------------------


def test_the_table_of_benchmarks_shows_the_results_beside_it():
    table = importlib.import_module("benchmark_table")
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.with_table(page) == page, "run `python scripts/dev/benchmark_table.py --write`"


def test_the_tables_of_kernels_are_those_of_the_rehearsal():
    table = importlib.import_module("kernel_table")
    page = (ROOT / "docs" / "gpus.md").read_text()
    assert table.with_tables(page) == page, "run `python scripts/dev/kernel_table.py --write`"


def test_the_expectations_of_gpus_are_those_that_were_counted():
    table = importlib.import_module("gpu_expectations")
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.with_tables(page) == page, "run `python scripts/dev/gpu_expectations.py --write`"


def test_every_block_is_one_that_the_tests_know():
    for block in BLOCKS:
        assert block.language in ("bash", "python", "json"), f"{block}: {block.language!r}"
        assert not block.needs or block.needs in NEEDS, f"{block}: needs {block.needs}"
        if block.language == "python":
            compile(block.text, str(block), "exec")


STUB = """#!{python} -IS
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[0], *sys.argv[1:]]) + "\\n")
print("noted")
"""


def noted(block: Block, folder: Path) -> list[list[str]]:
    """The commands of `block` with their arguments; nothing of it runs."""
    log, stubs, scripts = folder / "log", folder / "bin", folder / "scripts"
    stubs.mkdir()
    scripts.mkdir()
    programs = [stubs / name for name in "vllm vllm-bailing python pip git docker kubectl helm hf serve".split()]
    programs += [scripts / file.relative_to(ROOT / "scripts") for file in (ROOT / "scripts").rglob("*.sh")]
    for program in programs:
        program.parent.mkdir(exist_ok=True)
        program.write_text(STUB.format(python=sys.executable, log=str(log)))
        program.chmod(0o755)
    bash = shutil.which("bash") or "bash"
    done = subprocess.run(
        [bash, "-euo", "pipefail", "-c", f"cd() {{ :; }}\n{block.text}"],
        cwd=folder,
        env={"PATH": str(stubs), "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block}: {done.stderr}"
    commands = [json.loads(line) for line in log.read_text().splitlines()]
    return [[os.path.relpath(first, folder).removeprefix("bin/"), *rest] for first, *rest in commands]


def program_of(script: str) -> typer.Typer:
    module = importlib.import_module(Path(script).stem)
    if not hasattr(module, "app"):
        found = typer.Typer()
        found.command()(module.main)
        return found
    return module.app


def parser_of(program: typer.Typer) -> Any:
    """The command line of `program`, which does nothing."""

    def disarm(command: Any) -> Any:
        command.callback = None
        for part in getattr(command, "commands", {}).values():
            disarm(part)
        return command

    return disarm(typer.main.get_command(program))


def check_command(words: list[str]) -> None:
    """Whether a program of this project takes these arguments."""
    name, *rest = words
    if name == "vllm-bailing":
        parser_of(app).main(args=rest, prog_name=name, standalone_mode=False)
    elif name == "python" and rest[0].startswith("scripts/"):
        assert (ROOT / rest[0]).is_file(), rest[0]
        parser_of(program_of(rest[0])).main(args=rest[1:], prog_name=rest[0], standalone_mode=False)
    elif name.startswith("scripts/"):
        told = (ROOT / name).read_text(encoding="utf-8")
        assert all(word in told for word in rest if word.startswith("-")), words


def _vllm_options(commands: list[list[str]]) -> tuple[list[str], dict[int, str]]:
    """All options of `vllm serve`, and what its parser says against some of `commands`."""
    import vllm.entrypoints.cli.main  # noqa: F401 (imports what the command imports)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    refused, serve = {}, None
    for number, command in enumerate(commands):
        parser = FlexibleArgumentParser()
        serve = ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                parser.parse_args(command[1:])
        except SystemExit:
            refused[number] = said.getvalue()
    assert serve is not None
    return list(serve._option_string_actions), refused


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """(block, command) of everything in the blocks that cannot run here."""
    found = []
    for block in BLOCKS:
        if block.needs and block.language == "bash":
            found += [(block, words) for words in noted(block, tmp_path_factory.mktemp("noted"))]
    return found


@pytest.fixture(scope="module")
def vllm_options(marked):
    """Options of `vllm serve`; every such command of the marked blocks was taken."""
    commands = [(block, words) for block, words in marked if words[:2] == ["vllm", "serve"]]
    assert len(commands) >= 10
    words = [
        # Paths of this repository are those of the root.
        [str(ROOT / word) if word.startswith("deploy/") else word for word in words]
        for _, words in commands
    ]
    options, refused = run(_vllm_options, words)
    assert not refused, "\n".join(f"{commands[number][0]}: {said}" for number, said in refused.items())
    return set(options)


def test_what_cannot_run_here_is_at_least_taken_by_the_programs(marked, vllm_options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block, words in marked:
        for word in words:
            if word.endswith(".txt"):  # a text of the reader's
                Path(word).touch()
        try:
            check_command(words)
        except Exception as error:  # of whatever kind the parser raises
            pytest.fail(f"{block}: {shlex.join(words)}: {error}")


@since("0.32", "all options of vLLM's that the pages name")
def test_commands_and_options_in_the_text_exist(vllm_options):
    parser = parser_of(app)

    def options_of(command: Any) -> set[str]:
        found = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        return found.union(*(options_of(part) for part in getattr(command, "commands", {}).values()))

    known = vllm_options | options_of(parser)
    for script in ("needle", "check_versions"):
        known |= options_of(parser_of(program_of(script)))
    known |= set(re.findall(r"--[\w-]+", (ROOT / "scripts" / "demo.sh").read_text()))
    known |= {"--trust-remote-code"}
    for page in (*PAGES, CHANGELOG):
        for code in (token.content for token in inline(page, "code_inline")):
            if re.match(r"vllm-bailing [a-z-]+(?! replaces)", code) and "..." not in code:
                command, words = parser, code.split()[1:]
                while words and words[0] in getattr(command, "commands", {}):
                    command = command.commands[words.pop(0)]
                assert command is not parser, f"{name_of(page)}: {code}"
                assert {word for word in words if word.startswith("--")} <= options_of(command), (page, code)
            elif code.startswith("--"):
                named = code.split()[0].rstrip(",").partition("=")[0]
                assert named in known, f"{name_of(page)}: {code}"


def test_every_command_is_in_the_pages():
    texts = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)

    def leaves(command: Any, name: str):
        parts = getattr(command, "commands", None)
        for part, one in (parts or {}).items():
            yield from leaves(one, f"{name} {part}")
        if not parts:
            yield name

    for name in leaves(parser_of(app), "vllm-bailing"):
        assert name in texts, name


# ---- messages --------------------------------------------------------------------------------------------------


def joined(files: Any) -> str:
    """Source text in which a string over several lines is one."""
    text = "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)
    return re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)


def test_messages_are_those_of_the_code():
    vllm = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])  # type: ignore[union-attr]
    ours = joined((ROOT / "vllm_bailing").rglob("*.py"))
    theirs = joined(vllm.rglob("*.py")) if version("vllm").startswith("0.32.") else None
    rows = [
        [child.content for child in token.children or () if child.type == "code_inline"]
        for before, token in zip(tokens_of(TROUBLESHOOT), tokens_of(TROUBLESHOOT)[2:], strict=False)
        if before.type == "tr_open"
    ]
    messages = [message for row in rows for message in row if " " in message]
    assert len(messages) >= 25
    for message in messages:
        parts = [part.strip() for part in message.split("...")]
        parts = [part for part in parts if len(part) > 2]
        if not all(part in ours for part in parts) and theirs is not None:
            assert all(part in theirs for part in parts), message


# ---- what runs -------------------------------------------------------------------------------------------------


def same(wanted: str, came: str) -> bool:
    """Whether an output is the one shown: whitespace, numbers with a point or in a column may differ, `...` is all."""

    def plain(text: str) -> str:
        # Where the likeliest two tokens are near, the processor decides, and with it how long an answer is.
        text = re.sub(r"(?<=  )\d+(?=  )", "0", text)
        text = re.sub(r"\d+(\.\d+)+(e-?\d+)?|\d+e-?\d+", "0", re.sub(r"localhost:\d+", SERVER, text))
        return re.sub("─+", "─", text)

    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(plain(wanted), plain(came), flags)


def test_outputs_are_compared_as_they_are_meant():
    assert same("a 0.12 b\n...\n55\n", "a 0.9  b\nx\ny\n55\n")
    assert same("all    392    0.1\n", "all    395    0.2\n")
    assert not same("47 + 8 = 55\n", "47 + 8 = 54\n")
    assert not same("a\n", "a\nb\n")


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(map(str, (warm.commands(), BIN, os.environ["PATH"])))
    return {**os.environ, **ENGINE_ENV, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **more}


class Server:
    """What the pages start at port 8000: one at a time, and the same one for pages that start the same."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, ""
        self.process: subprocess.Popen | None = None
        self.port = 0

    def start(self, block: Block) -> None:
        if block.text == self.text:
            return
        self.stop()
        self.port = free_port()
        command = f"{block.text.strip()} --host 127.0.0.1 --port {self.port}"
        log = self.folder / f"{block.page.stem}-{block.line}.log"
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", command],
                stdout=stream,
                stderr=stream,
                env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="1"),
                start_new_session=True,
            )
        self.text = block.text
        deadline = time.monotonic() + 300
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, f"{block}: {log.read_text()[-6000:]}"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process)
        self.process, self.text = None, ""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("server"))
    yield found
    found.stop()


def _execute(text: str, name: str, folder: str) -> str:
    os.chdir(folder)
    logging.disable(logging.WARNING)  # vLLM logs to standard output
    with tempfile.TemporaryFile("w+") as said, contextlib.redirect_stdout(said):  # vLLM 0.27 asks for its number
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
        said.seek(0)
        return said.read()


def output_of(block: Block, port: int, folder: Path) -> str:
    """What `block` prints when it runs in `folder`."""
    text = block.text.replace(SERVER, f"localhost:{port}")
    if block.language == "python":
        return run(_execute, text, str(block), str(folder))
    text = text.replace("vllm-bailing chat ", f"vllm-bailing chat --url http://localhost:{port} ")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env=environment(XDG_CACHE_HOME=str(folder / "cache")),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{block}: exit code {done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"
    return done.stdout


def runs(block: Block) -> bool:
    return block.language in ("bash", "python") and not block.needs


@pytest.mark.engine
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name_of(page), marks=RECENT.get(name_of(page), ()))
        for page in PAGES
        if any(map(runs, blocks_of(page)))
    ],
)
def test_the_blocks_of_a_page_run_and_say_what_it_shows(page, server, tmp_path):
    for part in (README, *(ROOT / name for name in ("scripts", "tests", "docs", "deploy", "vllm_bailing"))):
        (tmp_path / part.name).symlink_to(part)
    for block in filter(runs, blocks_of(page)):
        if "vllm serve" in block.text:
            server.start(block)
            continue
        came = output_of(block, server.port, tmp_path)
        assert not block.output or same(block.output, came), f"{block}\n--- wanted\n{block.output}--- came\n{came}"
