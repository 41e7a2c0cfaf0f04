"""deploy/nginx.conf: taken by nginx, and what becomes of sessions and streams when a replica dies."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from tests.support.nginx import PROGRAM, configured, proxying
from tests.support.server import free_port

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="nginx is not installed")


class Replica(ThreadingHTTPServer):
    """Says its name; /stream sends a part of it at a time, and waits in between."""

    daemon_threads = True

    def __init__(self, name):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.go_on, self.open = name, threading.Event(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def place(self):
        return f"127.0.0.1:{self.server_address[1]}"

    def die(self):
        """As a process that is killed: nobody listens, and connections are cut."""
        self.shutdown()
        self.server_close()
        for connection in self.open:
            with contextlib.suppress(OSError):
                connection.shutdown(2)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.open.append(self.connection)
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        parts = [self.server.name, "more"] if self.path == "/stream" else [self.server.name]
        with contextlib.suppress(OSError):
            for number, part in enumerate(parts):
                if number:
                    self.server.go_on.wait(30)
                self.wfile.write(f"{len(part):x}\r\n{part}\r\n".encode())
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")


@pytest.fixture
def behind(tmp_path):
    replicas = Replica("one"), Replica("two")
    with proxying(tmp_path, free_port(), tuple(one.place for one in replicas)) as url:
        yield url, {one.name: one for one in replicas}
    for one in replicas:
        one.go_on.set()
        with contextlib.suppress(Exception):
            one.die()


def asked(url, session):
    return httpx.get(url, headers={"X-Session-Id": session}, timeout=20).text


def test_nginx_takes_the_file(tmp_path):
    file = configured(tmp_path, 8123, ("127.0.0.1:1", "127.0.0.1:2"))
    done = subprocess.run([PROGRAM, "-t", "-c", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_session_keeps_its_replica_until_that_dies(behind):
    url, replicas = behind
    sessions = [f"session {number}" for number in range(20)]
    before = {session: asked(url, session) for session in sessions}
    assert {session: asked(url, session) for session in sessions} == before
    assert set(Counter(before.values())) == {"one", "two"}
    replicas["one"].die()
    assert {asked(url, session) for session in sessions} == {"two"}


def test_a_stream_comes_part_by_part_and_breaks_as_an_error(behind):
    url, replicas = behind
    with httpx.stream("GET", f"{url}/stream", headers={"X-Session-Id": "a"}, timeout=20) as answer:
        parts = answer.iter_text()
        replica = replicas[next(parts)]  # the first part came before the second was sent
        replica.die()
        with pytest.raises(httpx.RemoteProtocolError):
            list(parts)
