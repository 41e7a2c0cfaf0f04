"""Which errors the `vllm` command ends with in one line, and which keep their traceback."""

from __future__ import annotations

import json
import sys

import pydantic
import pytest

import vllm_bailing
from vllm_bailing.config import BailingMoeV2Config
from vllm_bailing.plugin import excepthook

PACKAGE = vllm_bailing.__path__[0]


@pytest.fixture
def hook(monkeypatch):
    """The hook as `vllm serve` gets it; returns the errors that it passed on."""
    passed_on = []
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/vllm", "serve", "model"])
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: passed_on.append(error))
    excepthook.shorten_in_vllm_command()
    return passed_on


def raised(function):
    """The error that `function` raises, with its traceback."""
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def end_with(error):
    sys.excepthook(type(error), error, error.__traceback__)


def raise_in(file):
    """An error raised by code of the package's `file`."""
    return raised(lambda: exec(compile("raise ValueError('as it should not be')", f"{PACKAGE}/{file}", "exec"), {}))


@pytest.mark.parametrize("file", ["config.py", "plugin/patches.py", "plugin/kernels/cpu.py"])
def test_what_this_package_refuses_is_one_line_from_whichever_folder(file, hook, capsys):
    end_with(raise_in(file))
    assert capsys.readouterr().err == "vllm-bailing: as it should not be\n" and hook == []


def test_a_real_refusal_is_one_line(hook, capsys):
    end_with(raised(lambda: BailingMoeV2Config(n_group=7)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-bailing: ") and "n_group=7" in line and hook == []


def wrapped_by_a_cause():
    try:
        BailingMoeV2Config(n_group=7)
    except ValueError as error:
        raise RuntimeError("engine core could not start") from error


def wrapped_by_pydantic():
    class Model(pydantic.BaseModel):
        groups: int

        @pydantic.field_validator("groups")
        @classmethod
        def check(cls, value):
            return BailingMoeV2Config(n_group=value)

    Model(groups=7)


@pytest.mark.parametrize("wrapped", [wrapped_by_a_cause, wrapped_by_pydantic])
def test_a_refusal_that_vllm_wrapped_is_the_line(wrapped, hook, capsys):
    end_with(raised(wrapped))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vllm-bailing: ") and "n_group=7" in line and hook == []


def called_from_this_package():
    """An error of another package, in a call of this one's."""
    exec(compile("import json; json.loads('{')", f"{PACKAGE}/config.py", "exec"), {})


@pytest.mark.parametrize("foreign", [lambda: json.loads("{"), called_from_this_package, lambda: 1 / 0])
def test_an_error_of_another_package_keeps_its_traceback(foreign, hook, capsys):
    error = raised(foreign)
    end_with(error)
    assert hook == [error] and capsys.readouterr().err == ""


def test_a_folder_beside_the_package_is_another_package(hook, capsys):
    error = raised(lambda: exec(compile("raise ValueError('theirs')", f"{PACKAGE}_tools/config.py", "exec"), {}))
    end_with(error)
    assert hook == [error] and capsys.readouterr().err == ""


def test_other_programs_keep_their_tracebacks(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my_program.py"])
    before = sys.excepthook
    excepthook.shorten_in_vllm_command()
    assert sys.excepthook is before


def test_the_hook_is_set_once(hook):
    once = sys.excepthook
    excepthook.shorten_in_vllm_command()
    assert sys.excepthook is once
