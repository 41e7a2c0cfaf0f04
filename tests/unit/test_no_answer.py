"""What an error says of a server, whichever command asked it."""

from __future__ import annotations

import socket
import ssl

import httpx
import pytest
from openai import APIConnectionError, APIStatusError, APITimeoutError, OpenAIError

from vllm_bailing.errors import ChatError
from vllm_bailing.tools.no_answer import no_answer

URL = "http://server"
REQUEST = httpx.Request("POST", f"{URL}/v1/chat/completions")


@pytest.mark.parametrize("library", ["httpx", "openai"])
@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"),
         "the name in http://server cannot be resolved (Name or service not known); correct it, or look into the net"),
        (ssl.SSLError(1, "wrong version number"),
         "http://server: no TLS connection (wrong version number); look into its certificate, or write http:// if"),
        (ConnectionRefusedError(111, "Connection refused"), "no server at http://server; start one by"),
        (OSError(113, "No route to host"), "http://server gives no answer (No route to host); look into"),
        (TimeoutError("timed out"), "http://server gives no answer (timed out); look into the server's log, or into"),
        (httpx.RemoteProtocolError("Server disconnected"), "http://server gives no answer (Server disconnected); look"),
        (httpx.UnsupportedProtocol("no"), "http://server is no URL of a server; give one such as http://localhost"),
    ],
    ids=["name", "TLS", "refused", "route", "time", "protocol", "no URL"],
)  # fmt: skip
def test_a_server_that_is_not_reached_says_why(library, cause, said):
    error: Exception = (httpx.ReadTimeout if isinstance(cause, TimeoutError) else httpx.ConnectError)("failed")
    error.__context__ = cause
    if library == "openai":
        between = error
        error = (APITimeoutError if isinstance(cause, TimeoutError) else APIConnectionError)(request=REQUEST)
        error.__cause__ = between
    assert str(no_answer(URL, error)).startswith(said)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "http://server refuses a request: why"),
        (401, "http://server asks for a key (HTTP 401); set VLLM_API_KEY to it"),
        (403, "http://server asks for a key (HTTP 403); set VLLM_API_KEY to it"),
        (404, "http://server refuses a request: why"),
        (500, "http://server failed (HTTP 500): why; look into the server's log"),
        (502, "http://server is not ready (HTTP 502); wait until it has loaded its model, and ask again"),
        (503, "http://server is not ready (HTTP 503); wait until it has loaded its model, and ask again"),
    ],
)
def test_a_server_that_refuses_says_why(status, said):
    error = APIStatusError("no", response=httpx.Response(status, request=REQUEST), body={"message": "why"})
    assert str(no_answer(URL, error)) == said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OpenAIError("See stack trace (above)"), "http://server: the server's engine has ended; the server's log says"),
        (OpenAIError("overloaded"), "http://server: overloaded"),
        (ChatError("it lists no models; is it a vLLM server?"), "http://server: it lists no models; is it a vLLM"),
        (AttributeError("no choices"), "http://server did not answer as a vLLM server does: no choices; see the end"),
        (KeyError(), "http://server did not answer as a vLLM server does: KeyError; see the end of its log"),
    ],
    ids=["dead", "failed", "no models", "a web page", "without words"],
)
def test_an_answer_that_is_none_says_why(error, said):
    assert str(no_answer(URL, error)).startswith(said)


def test_the_limit_of_seconds_is_told_where_it_is_known():
    assert "gives no answer within 30 s; look into" in str(no_answer(URL, httpx.ReadTimeout("timed out"), 30))
