"""A node that waits for others: what it sees of its connections, and what it says."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from tests.support.machines import NoSecondMachineError, two_machines
from vllm_bailing.plugin import nodes
from vllm_bailing.plugin.nodes import Link, links_here, missing

HERE, FIRST, SECOND, THIRD = "10.0.0.1", ("10.0.0.2", 40001), ("10.0.0.2", 40002), ("10.0.0.3", 40001)
MEET = (HERE, 29501)
LISTENS = Link(("0.0.0.0", 29501), None, True)
OWN = [Link(MEET, (HERE, 40000), False), Link((HERE, 40000), MEET, False)]  # rank 0 is a client of itself
CONNECTS = """
import socket, sys, time
kept = socket.create_connection((sys.argv[2], int(sys.argv[1])))
time.sleep(60)
"""
# An orphan is nobody's child.
LEAVES = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.DEVNULL).pid)
"""


def joined(*remotes):
    return [LISTENS, *OWN, *(Link(MEET, remote, False) for remote in remotes)]


@pytest.mark.parametrize(
    ("links", "count", "ranks", "wanted"),
    [
        (joined(), 2, 1, 1),
        (joined(FIRST), 2, 1, 0),
        (joined(FIRST), 2, 2, 1),  # one of its two ranks
        (joined(FIRST, SECOND), 2, 2, 0),
        (joined(FIRST, SECOND), 3, 2, 1),  # two of one node are not one of two
        (joined(FIRST, THIRD), 3, 1, 0),
        (joined((HERE, 40009)), 2, 1, 0),  # both "nodes" are one machine
    ],
)
def test_the_first_node_counts_the_ranks_of_others(links, count, ranks, wanted):
    assert missing(links, count, 0, ranks, 29501) == wanted


@pytest.mark.parametrize(("links", "wanted"), [([], 1), ([LISTENS], 1), ([Link(FIRST, MEET, False)], 0)])
def test_another_node_looks_for_the_first(links, wanted):
    assert missing(links, 2, 1, 1, 29501) == wanted


@pytest.fixture
def told(monkeypatch):
    """What is said, with a patience of a moment."""
    from vllm.logger import init_logger

    lines = []
    logger, handler = init_logger("vllm.plugins.bailing.nodes"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    monkeypatch.setattr(nodes, "FIRST_TOLD", {"first": 0.2, "other": 0.4})
    monkeypatch.setattr(nodes, "PATIENCE", 0.4)
    monkeypatch.setattr(nodes, "_LOOK", 0.1)
    yield lines
    logger.removeHandler(handler)


def test_a_wait_is_told_until_the_node_comes(told):
    """With real connections: of a child, which is of this node, and of a process that is not."""
    stop = threading.Event()
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        own = subprocess.Popen([sys.executable, "-c", CONNECTS, str(port), "127.0.0.1"])
        watch = threading.Thread(target=nodes._watch, args=(2, 0, 1, "127.0.0.1", port, stop))
        try:
            accepted = [listener.accept()[0]]
            watch.start()
            end = time.monotonic() + 30
            while not told and time.monotonic() < end:
                time.sleep(0.05)
            assert watch.is_alive()
            command = [sys.executable, "-c", LEAVES, CONNECTS, str(port), "127.0.0.1"]
            orphan = int(subprocess.check_output(command, timeout=30))
            accepted.append(listener.accept()[0])
            watch.join(30)
            assert not watch.is_alive()
            os.kill(orphan, 9)
        finally:
            stop.set()
            own.kill()
            own.wait()
            for one in accepted:
                one.close()
    assert "for 1 of 2 nodes; look into the log of what is missing: it needs vllm-bailing" in told[0]
    assert f"at 127.0.0.1:{port} for" in told[0]


def test_a_rank_on_another_machine_is_seen():
    """Over the network: of a process with an address of its own, which is not in this one's list of connections."""
    try:
        with two_machines() as (here, there), closing(socket.create_server((here.address, 0))) as listener:
            port = listener.getsockname()[1]
            assert missing(links_here(), 2, 0, 1, port) == 1
            connects = [sys.executable, "-c", CONNECTS, str(port), here.address]
            other = subprocess.Popen([*there.prefix, *connects])
            try:
                with closing(listener.accept()[0]) as accepted:
                    assert accepted.getpeername()[0] == there.address
                    assert missing(links_here(), 2, 0, 1, port) == 0
            finally:
                other.kill()
                other.wait()
    except NoSecondMachineError as error:
        pytest.skip(f"no second machine can be made here: {error}")


def test_several_nodes_are_watched(monkeypatch):
    from vllm_bailing.plugin import checks

    asked = []
    monkeypatch.setattr(checks, "watch_for_nodes", lambda *arguments: asked.append(arguments))
    sizes = {"node_rank": 1, "master_addr": HERE, "master_port": 29501, "world_size": 16, "data_parallel_size": 2}
    checks._watch_for_nodes(SimpleNamespace(nnodes=4, **sizes))
    checks._watch_for_nodes(SimpleNamespace(nnodes=1, **sizes))
    checks._watch_for_nodes(SimpleNamespace())  # vLLM before --nnodes
    assert asked == [(4, 1, 8, HERE, 29501)]


def test_a_node_without_the_first_says_so(told):
    stop = threading.Event()
    watch = threading.Thread(target=nodes._watch, args=(2, 1, 1, "10.0.0.9", 1, stop))
    watch.start()
    end = time.monotonic() + 30
    while not told and time.monotonic() < end:
        time.sleep(0.05)
    stop.set()
    watch.join()
    assert "node 1 on" in told[0] and "for the first of 2 nodes at 10.0.0.9:1" in told[0]


def test_listeners_and_both_ends_of_a_connection_are_seen():
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        with closing(socket.create_connection(("127.0.0.1", port))) as client:
            links = links_here()
            mine = client.getsockname()
        assert Link(("127.0.0.1", port), None, True) in links
        assert Link(mine, ("127.0.0.1", port), False) in links
