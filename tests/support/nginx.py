"""nginx with the project's file for replicas."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support.paths import ROOT

FILE = ROOT / "deploy" / "nginx.conf"
PROGRAM = shutil.which("nginx") or next((str(one) for one in [Path("/usr/sbin/nginx")] if one.exists()), None)
_MAIN = """daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    include {folder}/replicas.conf;
}}
"""


def configured(folder: Path, port: int, replicas: tuple[str, str]) -> Path:
    """A main configuration that includes the project's file, with other addresses; returns its path.

    Args:
        replicas: HOST:PORT of both.
    """
    text = FILE.read_text(encoding="utf-8")
    for placeholder, own in (
        ("10.0.0.1:8000", replicas[0]),
        ("10.0.0.2:8000", replicas[1]),
        ("listen 80;", f"listen 127.0.0.1:{port};"),
    ):
        assert text.count(placeholder) == 1, placeholder
        text = text.replace(placeholder, own)
    (folder / "replicas.conf").write_text(text, encoding="utf-8")
    (folder / "nginx.conf").write_text(_MAIN.format(folder=folder), encoding="utf-8")
    return folder / "nginx.conf"


@contextmanager
def proxying(folder: Path, port: int, replicas: tuple[str, str]) -> Iterator[str]:
    """The URL of a running nginx, for the body of a `with`."""
    file = configured(folder, port, replicas)
    process = subprocess.Popen([str(PROGRAM), "-c", str(file), "-e", str(folder / "error.log")])
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 30
        while True:
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < end, (folder / "error.log").read_text()
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)
