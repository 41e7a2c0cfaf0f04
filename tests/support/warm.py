"""`vllm`, `vllm-bailing` and `python` as programs that need not import vLLM first.

`commands()` is a folder for PATH. Its programs hand their arguments, folder, environment and open files to a process
that has imported vLLM (`preload.py`), which forks and calls the same function as the installed program; the processes
that vLLM would spawn are forked, too. Signals are passed on, and the program ends with the same exit code.

Not for tests of what happens while things are imported: those call the installed programs.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from tests.support.engine import ENGINE_ENV, fork_children, fork_context

_PYTHON = sys.executable
PROGRAMS = ("vllm", "vllm-bailing", "python")
_CLIENT = """#!{python} -SE
import json, os, signal, socket, sys

connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda number, frame: connection.send(bytes([number])))
call = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [len(call).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(call)
ended = connection.recv(1)
sys.exit(ended[0] if ended else 1)
"""


@functools.cache
def commands() -> Path:
    """A folder with the programs; it and they are gone when this process ends."""
    home = Path(tempfile.mkdtemp(prefix="warm."))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    address, folder = str(home / "socket"), home / "bin"  # as in a virtual environment
    folder.mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    process = fork_context.Process(target=_serve, args=(listener, folder, ENGINE_ENV), daemon=True)
    process.start()
    listener.close()
    for name in PROGRAMS:
        (folder / name).write_text(_CLIENT.format(python=_PYTHON, address=address))
        (folder / name).chmod(0o755)
    return folder


def _serve(listener: socket.socket, folder: Path, env: dict[str, str]) -> NoReturn:
    os.environ.update(env)
    sys.executable = str(folder / "python")
    with contextlib.suppress(ImportError, AttributeError):
        from vllm.model_executor.models import registry

        # How vLLM inspects a model class that its cache does not know; read from sys.executable when it was imported.
        registry._SUBPROCESS_COMMAND = [sys.executable, *registry._SUBPROCESS_COMMAND[1:]]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that follow
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _attend(connection)
        connection.close()


def _attend(connection: socket.socket) -> NoReturn:
    """Start one program, and be between it and the one who called it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    call = b""
    while len(call) < int.from_bytes(size, "big"):
        call += connection.recv(2**16)
    program = os.fork()
    if program == 0:
        connection.close()
        _become(files, *json.loads(call))
    for file in files:
        os.close(file)
    ended = os.pidfd_open(program)
    while True:
        ready, _, _ = select.select([connection, ended], [], [])
        if ended in ready:
            _, status = os.waitpid(program, 0)
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                connection.send(bytes([code if code >= 0 else 128 - code]))
            os._exit(0)
        number = connection.recv(1)
        with contextlib.suppress(ProcessLookupError):
            # Ctrl-C goes to all of a group; and nobody is left to wait for where the caller was killed.
            if not number or number[0] == signal.SIGINT:
                os.killpg(program, number[0] if number else signal.SIGKILL)
            else:
                os.kill(program, number[0])


def _become(files: list[int], name: str, arguments: list[str], folder: str, env: dict[str, str]) -> NoReturn:
    """Call what the installed program `name` calls, and end as that ends."""
    code: Any = 0
    try:
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout.reconfigure(line_buffering=False)  # pyright: ignore[reportAttributeAccessIssue]
        os.environ.clear()
        os.environ.update(env)
        os.chdir(folder)
        sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.argv = [name, *arguments]
        process: Any = multiprocessing.current_process()
        process.name = "MainProcess"
        process._config["daemon"] = False  # it may have children
        fork_children()
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a server's event loop has set one
        if name == "python":
            _interpret(arguments)
        else:
            (program,) = entry_points(group="console_scripts", name=name)
            code = program.load()()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code or 0)


def _interpret(arguments: list[str]) -> None:
    """What Python does with these arguments."""
    sys.path.insert(0, "")
    match arguments:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv = ["-c", *rest]
            exec(code, {"__name__": "__main__"})
        case _:
            os.execv(_PYTHON, ["python", *arguments])
