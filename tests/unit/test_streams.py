"""The reader of streams by which kills are judged: what looks whole and is not has to be called wrong."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.support.streams import DONE, streamed

DONE_LINE = "data: [DONE]\n\n"


def tokens(*ids):
    return f"data: {json.dumps({'choices': [{'token_ids': list(ids)}]})}\n\n"


@contextmanager
def answering(text, status=200, length=None):
    """A server that sends `text`, and promises `length` bytes of it."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text) if length is None else length))
            self.end_headers()
            self.wfile.write(text.encode())

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"


@pytest.mark.parametrize(
    ("text", "how", "verdict"),
    [
        (tokens(1, 2) + tokens(3) + DONE_LINE, {}, "whole"),
        (tokens(1, 2) + DONE_LINE, {}, "WRONG: short, and ended as if whole"),
        (tokens(1, 2), {}, "WRONG: cut off without an error"),
        (tokens(1, 2), {"length": 500}, "RemoteProtocolError"),
        (tokens(1, 2) + 'data: {"error": {"message": "dead"}}\n\n' + DONE_LINE, {}, "an error event"),
        ("{}", {"status": 500}, "HTTP 500"),
    ],
)
def test_how_a_stream_of_three_tokens_ended(text, how, verdict):
    started = threading.Event()
    with answering(text, **how) as url:
        found = streamed(url, {}, started)
    assert found.judged(3) == verdict
    assert started.is_set()
    assert (found.end == DONE) == (DONE_LINE in text and "error" not in text)
    assert found.tokens[:2] == ([1, 2] if "status" not in how else [])
