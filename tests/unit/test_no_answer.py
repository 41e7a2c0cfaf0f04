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
        (302, "http://server sends elsewhere (HTTP 302); give the URL of the server itself"),
        (400, "http://server refuses a request (HTTP 400): why"),
        (401, "http://server asks for a key (HTTP 401); set VLLM_API_KEY to it"),
        (403, "http://server asks for a key (HTTP 403); set VLLM_API_KEY to it"),
        (
            404,
            "http://server does not have what it is asked for (HTTP 404): why; correct --url or the model's name, or "
            "ask the server itself if there is a proxy in front",
        ),
        (429, "http://server has too many requests (HTTP 429): why; ask again later"),
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
        (AttributeError("no choices"), "http://server did not answer as a vLLM server does; see the end of its log"),
        (ValueError("no number"), "http://server did not answer as a vLLM server does: no number; see the end"),
        (EOFError(), "http://server did not answer as a vLLM server does: EOFError; see the end of its log"),
    ],
    ids=["dead", "failed", "no models", "a web page", "no number", "without words"],
)
def test_an_answer_that_is_none_says_why(error, said):
    assert str(no_answer(URL, error)).startswith(said)


@pytest.mark.parametrize("status", [401, 404])
def test_a_page_that_is_refused_is_told_as_an_answer_that_is(status):
    answer = httpx.Response(status, request=REQUEST)
    error = httpx.HTTPStatusError("no", request=REQUEST, response=answer)
    of_client = APIStatusError("no", response=answer, body={"message": answer.reason_phrase})
    assert no_answer(URL, error) == no_answer(URL, of_client)


def test_a_password_is_not_shown():
    assert "secret" not in str(no_answer("http://user:secret@server:8000", OpenAIError("no")))


def test_the_limit_of_seconds_is_told_where_it_is_known():
    assert "gives no answer within 30 s; look into" in str(no_answer(URL, httpx.ReadTimeout("timed out"), 30))
