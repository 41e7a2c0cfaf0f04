"""The process of one task: `python -m vllm_bailing.bench`, started by `vllm_bailing.bench.runner`.

It reads the task as JSON from standard input and writes what that measured to the file that the task names.
"""

from __future__ import annotations

import json
import pkgutil
import sys
from pathlib import Path

from vllm_bailing.bench.runner import Task

if __name__ == "__main__":
    received = json.load(sys.stdin)
    task: Task = pkgutil.resolve_name(received["task"])(**received["fields"])
    Path(task.out).write_text(json.dumps(task.work()))
