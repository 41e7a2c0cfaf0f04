#!/usr/bin/env bash
# From a fresh clone to a first chat: installs what is needed, starts `vllm serve`, asks it something, shows the answer.
#
#   scripts/demo.sh [MODEL] [--keep] [--adapter] [--port N] [any further flag of vllm serve]
#
#   MODEL       a folder with a checkpoint, or a name such as inclusionAI/Ling-mini-2.0 (default: the shipped demo model)
#   --keep      leave the server running
#   --adapter   serve a LoRA adapter of the demo model too, and ask both
#   --port N    port of the server (default: 8000)
#
#   VENV=dir, VLLM_VERSION=0.27.1, PYTHON=path are handed to scripts/setup.sh.
#   SKIP_SETUP=1 uses the environment in VENV as it is.
#
# Without the setup it is `vllm-bailing demo`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for argument in "$@"; do
    if [[ $argument == -h || $argument == --help ]]; then
        sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
        exit 0
    fi
done

[[ -n ${SKIP_SETUP:-} ]] || bash "$root/scripts/setup.sh"
unset PYTHONDONTWRITEBYTECODE # where it is set, each of the server's three processes would compile vLLM anew
export DEMO_COMMAND=scripts/demo.sh # for the hint how to call it again
exec "${VENV:-$root/.venv}/bin/vllm-bailing" demo "$@"
