"""Why a server cannot be asked, or refuses what it is asked; and what to do."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from vllm_bailing.errors import Finding, shown
from vllm_bailing.tools.chat import NOT_READY


def no_answer(url: str, error: Exception, seconds: float | None = None) -> Finding:
    """What an error of httpx or of the OpenAI client says of the server at `url`.

    Args:
        seconds: That it had for its answer, if there is a limit to tell.
    """
    from openai import APIConnectionError, APIStatusError

    causes = list(_causes(error))
    names = {type(one).__name__ for one in causes}  # the client has classes of its own, beside those of httpx
    if names & {"InvalidURL", "UnsupportedProtocol"}:
        return Finding(f"{shown(url)} is no URL of a server", "give one such as http://localhost:8000")
    if any(isinstance(one, socket.gaierror) for one in causes):
        return Finding(f"no host is called as {shown(url)} has it", "correct --url")
    if names & {"ConnectError", "ConnectionRefusedError"}:
        return Finding(f"no server at {shown(url)}", "start one by `vllm serve MODEL`, or correct --url")
    if any(name.endswith("Timeout") for name in names):
        within = f" within {seconds:g} s" if seconds else " in time"
        return Finding(f"{shown(url)}: no answer{within}", "restart it: see the end of its log")
    if isinstance(error, APIStatusError) and error.status_code in NOT_READY:
        return Finding(f"{shown(url)} is not ready (HTTP {error.status_code})", "wait until it has loaded its model")
    if isinstance(error, APIStatusError) and error.status_code in (401, 403):
        return Finding(f"{shown(url)} asks for a key (HTTP {error.status_code})", "set VLLM_API_KEY to it")
    if isinstance(error, APIStatusError) and error.status_code == 400:
        return Finding(f"{shown(url)} refuses a request: {shown(_said(error), 600)}", "")
    if isinstance(error, APIConnectionError) and len(causes) > 1:
        error = causes[1]
    return Finding(
        f"{shown(url)} did not answer as a vLLM server does: {shown(error) or type(error).__name__}",
        "see the end of its log, or correct --url",
    )


def _said(error: Exception) -> str:
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return message if isinstance(message, str) else str(error)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
