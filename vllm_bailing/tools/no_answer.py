"""Why a server cannot be asked, or refuses what it is asked; and what to do."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

from vllm_bailing.errors import ChatError, Finding, shown
from vllm_bailing.tools.chat import NOT_READY


def no_answer(url: str, error: Exception, seconds: float | None = None) -> Finding:
    """What an error says of the server at `url`: one of httpx, of the OpenAI client, of `tools.chat`, or of their use.

    Args:
        seconds: That it had for its answer, if there is a limit to tell.
    """
    from httpx import TransportError
    from openai import APIConnectionError, APIStatusError, OpenAIError

    url, causes = shown(url), list(_causes(error))
    if "stack trace" in str(error):  # vLLM's words for a dead engine point at a trace that only the server's log has
        return Finding(f"{url}: the server's engine has ended; the server's log says why", "start the server again")
    if isinstance(error, APIStatusError):
        return _refusal(url, error.status_code, shown(_said(error), 1000))
    if any(
        type(one).__name__ in ("InvalidURL", "UnsupportedProtocol") for one in causes
    ):  # newer clients have an httpx2
        return Finding(f"{url} is no URL of a server", "give one such as http://localhost:8000")
    if type(error) is APIConnectionError and len(causes) == 1:
        return _nobody(url)
    if isinstance(error, (APIConnectionError, TransportError)):
        return _unreachable(url, causes, seconds)
    if isinstance(error, (OpenAIError, ChatError)):
        return Finding(f"{url}: {shown(error, 1000)}", "")
    return Finding(
        f"{url} did not answer as a vLLM server does: {shown(error) or type(error).__name__}",
        "see the end of its log, or correct --url",
    )


def _refusal(url: str, status: int, said: str) -> Finding:
    if status in NOT_READY:
        return Finding(f"{url} is not ready (HTTP {status})", "wait until it has loaded its model, and ask again")
    if status in (401, 403):
        return Finding(f"{url} asks for a key (HTTP {status})", "set VLLM_API_KEY to it")
    if status < 500:
        return Finding(f"{url} refuses a request: {said}", "")
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
