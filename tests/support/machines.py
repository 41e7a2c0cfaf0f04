"""A second "machine" on this one: a network namespace with an address and a /dev/shm of its own.

Ranks there share no memory with ranks here, so they talk over TCP as those of two nodes do. Needs root on Linux, and
iproute2.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """One of the two.

    Attributes:
        address: By which the other reaches it.
        env: For what runs on it.
        prefix: Words to put before a command that is to run on it.
    """

    address: str
    env: dict[str, str]
    prefix: tuple[str, ...] = ()


class NoSecondMachineError(RuntimeError):
    """This system makes no namespaces for this user."""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise NoSecondMachineError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """This machine and a second one, for the body of a `with`.

    Raises:
        NoSecondMachineError: If namespaces may not be made here.
    """
    number = os.getpid() % 60000
    there, ends, net = f"vb{number}", (f"vb{number}a", f"vb{number}b"), f"10.77.{number % 250}"
    try:
        _ip("netns", "add", there)
    except FileNotFoundError:
        raise NoSecondMachineError("there is no `ip` here; install iproute2") from None
    try:
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", there)
        _ip("addr", "add", f"{net}.1/24", "dev", ends[0])
        _ip("link", "set", ends[0], "up")
        for words in (
            ("addr", "add", f"{net}.2/24", "dev", ends[1]),
            ("link", "set", ends[1], "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "dev", ends[1]),  # vLLM finds its own address by it
        ):
            _ip("-n", there, *words)
        mount = 'mount -t tmpfs -o size=2g tmpfs /dev/shm && exec "$@"'
        prefix = ("ip", "netns", "exec", there, "unshare", "--mount", "--ipc", "sh", "-c", mount, "sh")
        yield (
            Machine(f"{net}.1", {"VLLM_HOST_IP": f"{net}.1", "GLOO_SOCKET_IFNAME": ends[0]}),
            Machine(f"{net}.2", {"VLLM_HOST_IP": f"{net}.2", "GLOO_SOCKET_IFNAME": ends[1]}, prefix),
        )
    finally:
        # A namespace goes when the last process in it has ended, and would keep its interface and the names until then.
        for words in (("link", "del", ends[0]), ("netns", "del", there)):
            subprocess.run(["ip", *words], capture_output=True)
