"""Why a server cannot be asked, or refuses what it is asked; and what to do."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Iterator

from vllm_bailing.errors import ChatError, Finding, shown
from vllm_bailing.tools.chat import NOT_READY

_NO_SUCH_ANSWER = AttributeError, LookupError, TypeError  # of whoever took JSON of another kind, or a page, for one


def no_answer(url: str, error: Exception, seconds: float | None = None) -> Finding:
    """What an error says of the server at `url`: one of httpx, of the OpenAI client, of `tools.chat`, or of their use.

    Args:
        seconds: That it had for its answer, if there is a limit to tell.
    """
    from httpx import HTTPStatusError, TransportError
    from openai import APIConnectionError, APIStatusError, OpenAIError

    url, causes = re.sub("(?<=//)[^/@]*@", "", shown(url)), list(_causes(error))  # without a password
    if tells_dead_engine(str(error)):
        return Finding(f"{url}: the server's engine has ended; the server's log says why", "start the server again")
    if isinstance(error, HTTPStatusError):
        return refusal(url, error.response.status_code, error.response.reason_phrase)
    if isinstance(error, APIStatusError):
        return refusal(url, error.status_code, shown(_said(error), 1000))
    names = {type(one).__name__ for one in causes}  # not the classes: newer clients have an httpx2
    if names & {"InvalidURL", "UnsupportedProtocol"}:
        return Finding(f"{url} is no URL of a server", "give one such as http://localhost:8000")
    if type(error) is APIConnectionError and len(causes) == 1:
        return _nobody(url)
    if isinstance(error, (APIConnectionError, TransportError)):
        return _unreachable(url, causes, seconds)
    if isinstance(error, (OpenAIError, ChatError)):
        return Finding(f"{url}: {shown(error, 1000)}", "")
    why = "" if isinstance(error, _NO_SUCH_ANSWER) else f": {shown(error) or type(error).__name__}"
    return Finding(f"{url} did not answer as a vLLM server does{why}", "see the end of its log, or correct --url")


def tells_dead_engine(text: str) -> bool:
    """Whether a server says so: vLLM's words point at a stack trace, which only the server's log has."""
    return "stack trace" in text


def refusal(url: str, status: int, said: str) -> Finding:
    """What an answer with this status of HTTP says, which is not the one that was asked for."""
    if status in NOT_READY:
        return Finding(f"{url} is not ready (HTTP {status})", "wait until it has loaded its model, and ask again")
    if status in (401, 403):
        return Finding(f"{url} asks for a key (HTTP {status})", "set VLLM_API_KEY to it")
    if status == 404:
        remedy = "correct --url or the model's name, or ask the server itself if there is a proxy in front"
        return Finding(f"{url} does not have what it is asked for (HTTP 404): {said}", remedy)
    if status == 429:
        return Finding(f"{url} has too many requests (HTTP 429): {said}", "ask again later")
    if status < 400:
        return Finding(f"{url} sends elsewhere (HTTP {status})", "give the URL of the server itself")
    if status < 500:
        return Finding(f"{url} refuses a request (HTTP {status}): {said}", "")
    return Finding(f"{url} failed (HTTP {status}): {said}", "look into the server's log")


def _nobody(url: str) -> Finding:
    way = "start one by `vllm serve MODEL` or `vllm-bailing demo --keep`"
    return Finding(f"no server at {url}", f"{way}, and wait until its log says that the start is complete")


def _unreachable(url: str, causes: list[BaseException], seconds: float | None) -> Finding:
    last = causes[-1]
    reason = getattr(last, "strerror", None) or shown(str(last)) or type(last).__name__
    if isinstance(last, socket.gaierror):
        return Finding(f"the name in {url} cannot be resolved ({reason})", "correct it, or look into the network")
    if isinstance(last, ssl.SSLError):
        remedy = "look into its certificate, or write http:// if it has none"
        return Finding(f"{url}: no TLS connection ({reason})", remedy)
    if isinstance(last, ConnectionRefusedError):
        return _nobody(url)
    is_late = any(type(one).__name__.endswith("Timeout") for one in causes)  # the libraries have classes of their own
    why = f"within {seconds:g} s" if is_late and seconds else f"({reason})"
    return Finding(f"{url} gives no answer {why}", "look into the server's log, or into the network")


def _said(error: Exception) -> str:
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return message if isinstance(message, str) else str(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
