"""The commands of `vllm-bailing`, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.engine import ENGINE_ENV


def run_command(*arguments, cache=None, **env):
    program = [str(Path(sys.executable).with_name("vllm-bailing")), "verify", *map(str, arguments)]
    environment = {**os.environ, **ENGINE_ENV, **({"XDG_CACHE_HOME": str(cache)} if cache else {}), **env}
    return subprocess.run(program, capture_output=True, text=True, env=environment)
