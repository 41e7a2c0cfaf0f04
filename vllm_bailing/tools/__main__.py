"""The process of one task: `python -m vllm_bailing.tools`, started by `vllm_bailing.tools.task`.

It reads the task as JSON from standard input and writes what that gave, or why it gave nothing, to the file that the
task names.
"""

from __future__ import annotations

import json
import pkgutil
import sys
import traceback
from pathlib import Path

from vllm_bailing.errors import reason_of
from vllm_bailing.tools.task import Task

if __name__ == "__main__":
    received = json.load(sys.stdin)
    task: Task = pkgutil.resolve_name(received["task"])(**received["fields"])
    try:
        ended = {"result": task.work()}
    except Exception as error:
        traceback.print_exc()
        ended = {"error": f"{type(error).__name__}: {reason_of(error)}"}
    Path(task.out).write_text(json.dumps(ended))
