"""Files that others wrote, whatever they are, and who reads them."""

from __future__ import annotations

import errno
import inspect
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.commands import invoke
from vllm_bailing import DEMO
from vllm_bailing.cli import app
from vllm_bailing.errors import ChatError, SettingsError
from vllm_bailing.json_files import parsed, read_json, write_json, write_text
from vllm_bailing.plugin.options import draft_vocabulary
from vllm_bailing.tools.chat import Chat
from vllm_bailing.tools.prompts import read_prompts

PLACES = {
    "pipe": (os.mkfifo, "is no file"),
    "folder": (os.mkdir, "is no file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is no file"),
    "link to nothing": (lambda path: path.symlink_to("gone"), "cannot be read (No such file or directory)"),
    "link in a circle": (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
    "nothing": (lambda path: None, "cannot be read (No such file or directory)"),
}
TEXTS = {
    b"": "is no JSON (Expecting value",
    b"{": "is no JSON (Expecting property name",
    b"\xff\xfe{": "is not UTF-8 (",
    b"[" * 100_000: "is no JSON, or has too many levels",
    b"1" * 5000: "is no JSON (Exceeds the limit",
}

# What comes before the file on the command line, by the command and its option.
READ = {
    ("draft-vocab", "text"): (DEMO, "--text"),
    ("train-mtp", "data"): (DEMO, "--out", "layer", "--data"),
    ("train-mtp", "answers"): (DEMO, "--out", "layer", "--answers"),
    ("verify", "prompts"): (DEMO, "--prompts"),
    ("verify", "chat_template"): (DEMO, "--url", "http://127.0.0.1:9", "--chat-template"),
    ("report", "files"): (),
    ("chat", "tools"): ("--url", "http://127.0.0.1:9", "Hello", "--tools"),
    ("balance", "prompts"): (DEMO, "--gpus", "2", "--prompts"),
    ("balance", "trace"): (DEMO, "--gpus", "2", "--trace"),
    ("bench mtp", "prompts"): (DEMO, "--prompts"),
}
# Folders; and what the engine reads, by `draft_vocabulary`.
OTHERS = {("train-mtp", "adapter"), ("bench mtp", "draft_vocab")}
WRITTEN = {"out", "merge", "config_file"}


def vocabulary(file):
    config = SimpleNamespace(hf_config=SimpleNamespace(vocab_size=1024))
    return draft_vocabulary(SimpleNamespace(additional_config={"bailing_draft_vocab": str(file)}, model_config=config))


@pytest.mark.parametrize("place", PLACES)
def test_what_is_no_file_is_not_opened(place, tmp_path):
    make, words = PLACES[place]
    make(tmp_path / "ids.json")
    with pytest.raises(ValueError) as refusal:
        read_json(tmp_path / "ids.json")
    assert str(refusal.value) == words
    with pytest.raises(SettingsError) as refusal:
        vocabulary(tmp_path / "ids.json")
    assert str(refusal.value) == (
        f"bailing_draft_vocab {tmp_path / 'ids.json'} {words}; make one by `vllm-bailing draft-vocab`"
    )
    make(tmp_path / "prompts.jsonl")
    with pytest.raises(ValueError, match=r"prompts\.jsonl .*; |prompts\.jsonl cannot be read"):
        read_prompts(tmp_path / "prompts.jsonl")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:8]))
def test_what_is_no_json_is_said_in_a_few_words(text, tmp_path):
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(ValueError) as refusal:
        read_json(tmp_path / "file")
    assert str(refusal.value).startswith(TEXTS[text]) and str(refusal.value).isprintable()


def test_what_is_json_comes_as_it_is(tmp_path):
    (tmp_path / "file").write_text('{"ä": [1, 2.5, null]}', encoding="utf-8")
    assert read_json(tmp_path / "file") == parsed('{"ä": [1, 2.5, null]}') == {"ä": [1, 2.5, None]}


@pytest.mark.parametrize("ids", ["x" * 9000, {"a": "\x1b[2J"}, [1, "2"], [True], [1024], [-1], [], 5])
def test_a_draft_vocabulary_is_a_list_of_tokens(ids):
    config = SimpleNamespace(hf_config=SimpleNamespace(vocab_size=1024))
    with pytest.raises(SettingsError) as refusal:
        draft_vocabulary(SimpleNamespace(additional_config={"bailing_draft_vocab": ids}, model_config=config))
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 500


def test_a_separator_of_lines_within_a_prompt_is_a_part_of_it(tmp_path):
    said = "one\u2028two\x85three\x0cfour"
    (tmp_path / "p.txt").write_text(f"{said}\nfive\r\n\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "{said.replace(chr(12), "")}"}}\n', encoding="utf-8")
    assert [prompt.messages[0]["content"] for prompt in read_prompts(tmp_path / "p.txt")] == [said, "five"]
    assert read_prompts(tmp_path / "p.jsonl")[0].messages[0]["content"] == said.replace("\x0c", "")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "kept.json", {"a": 1})
    original = Path.write_text

    def full(file, text, **options):
        original(file, text[:5], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "kept.json", {"a": 2})
    assert read_json(tmp_path / "kept.json") == {"a": 1}


def paths_of(commands, prefix=""):
    """The options of all commands that take a path: the command and the name."""
    for command in commands.registered_commands:
        name = prefix + (command.name or command.callback.__name__.replace("_", "-"))
        for option in inspect.signature(command.callback, eval_str=True).parameters.values():
            if "Path" in str(option.annotation):
                yield name, option.name
    for group in commands.registered_groups:
        yield from paths_of(group.typer_instance, f"{group.name} ")


def test_every_option_that_takes_a_path_is_known_here():
    found = {option for option in paths_of(app) if option[1] not in WRITTEN}
    assert found == READ.keys() | OTHERS


@pytest.fixture
def soon():
    """A limit of time for what would wait for ever."""

    def late(*_):
        raise AssertionError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("place", ["pipe", "device"])
@pytest.mark.parametrize("option", READ, ids=" ".join)
def test_no_command_waits_for_a_pipe_or_reads_a_device(option, place, tmp_path, monkeypatch, soon):
    monkeypatch.chdir(tmp_path)
    PLACES[place][0](tmp_path / "given")
    done = invoke(*option[0].split(), *READ[option], tmp_path / "given")
    said = done.stderr.replace("\n", " ").replace("│", " ")  # a refusal of an option is drawn in a box
    assert done.exit_code == 2 and f"{tmp_path / 'given'} is no file; " in " ".join(said.split()), done.output


def test_a_conversation_is_not_waited_for(tmp_path, soon):
    os.mkfifo(tmp_path / "kept.json")
    with pytest.raises(ChatError, match="no conversation that /save wrote: it is no file"):
        Chat(None, "demo").load(tmp_path / "kept.json")


# ---- writing ---------------------------------------------------------------------------------------------------


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_text(file, "before")
    file.chmod(0o640)
    write_text(file, "after")
    assert file.read_text() == "after" and file.stat().st_mode & 0o777 == 0o640

    def full(new, text, **_):
        new.write_bytes(text[:2].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "never")
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "another", "never")
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and file.read_bytes() == b"after"


def test_a_link_stays_one_and_a_device_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"
    write_text(Path("/dev/null"), "text")
    assert not Path("/dev/null").is_file()
