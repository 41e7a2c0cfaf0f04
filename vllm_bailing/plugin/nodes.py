"""Nodes of a deployment that do not come: said in the log of the one that waits for them, which vLLM does in silence.

A node without this package ends with a message of its own, and its peer would wait on for as long as PyTorch does. When
a node may be started is its user's business, so the wait is told, not ended.
"""

from __future__ import annotations

import functools
import socket
import threading
from typing import NamedTuple

from vllm_bailing import __version__

FIRST_TOLD = {"first": 10.0, "other": 30.0}  # seconds; the first node is seen to wait, others may be starting still
PATIENCE = 45.0  # seconds from then on
_LOOK = 1.0  # seconds between two looks


class Link(NamedTuple):
    """A TCP connection or listener of this node's processes: (address, port) of both ends."""

    local: tuple[str, int]
    remote: tuple[str, int] | None
    listens: bool


@functools.cache  # vLLM settles its configuration more than once
def watch_for_nodes(nodes: int, node: int, ranks: int, address: str, port: int) -> None:
    """Look from a thread whether all nodes meet, and say in the log if they do not.

    Args:
        nodes, node: As for --nnodes and --node-rank.
        ranks: On each node.
        address, port: Where they meet, on the first.
    """
    if nodes > 1:
        arguments = (nodes, node, ranks, address, port, threading.Event())
        threading.Thread(target=_watch, args=arguments, name="bailing nodes", daemon=True).start()


def _watch(nodes: int, node: int, ranks: int, address: str, port: int, stop: threading.Event) -> None:
    from vllm.logger import init_logger

    logger = init_logger("vllm.plugins.bailing.nodes")
    waited, tell = 0.0, FIRST_TOLD["other" if node else "first"]
    while not stop.wait(_LOOK):
        links = links_here()
        # The first node is waiting once it listens. What the others do until they meet is not seen.
        if node == 0 and not any(one.listens and one.local[1] == port for one in links):
            continue
        number = missing(links, nodes, node, ranks, port)
        if number == 0:
            return
        waited += _LOOK
        if waited >= tell:
            logger.warning(waiting(nodes, node, f"{address}:{port}", number, round(waited)))
            tell += PATIENCE


def missing(links: list[Link], nodes: int, node: int, ranks: int, port: int) -> int:
    """How many nodes are not there yet: on the first node of the others, elsewhere the first.

    Args:
        links: Of this node.
    """
    if node:
        return int(not any(one.remote is not None and one.remote[1] == port for one in links))
    own = {one.local for one in links}
    others = {one.remote for one in links if one.local[1] == port and one.remote is not None} - own
    return max(0, nodes - 1 - len(others) // ranks)  # each rank has one connection, or more


def waiting(nodes: int, node: int, place: str, number: int, seconds: int) -> str:
    """What is said of the wait."""
    if node:
        return (
            f"node {node} on {socket.gethostname()} has waited {seconds} s for the first of {nodes} nodes at {place}; "
            f"look into its log: it needs vllm-bailing {__version__} too, the same flags with --node-rank 0, and a "
            "port that no firewall closes"
        )
    return (
        f"the first node on {socket.gethostname()} has waited {seconds} s at {place} for {number} of {nodes} nodes; "
        f"look into the log of what is missing: it needs vllm-bailing {__version__} too, and the same flags with its "
        "own --node-rank and --headless"
    )


def links_here() -> list[Link]:
    """The TCP connections and listeners of this process and all that it started."""
    import psutil

    found = []
    itself = psutil.Process()
    for process in (itself, *itself.children(recursive=True)):
        try:
            connections = process.net_connections("tcp")
        except psutil.Error:  # it ended meanwhile
            continue
        for one in connections:
            if one.status in (psutil.CONN_ESTABLISHED, psutil.CONN_LISTEN):
                remote = (one.raddr.ip, one.raddr.port) if one.raddr else None
                found.append(Link((one.laddr.ip, one.laddr.port), remote, one.status == psutil.CONN_LISTEN))
    return found
