#!/usr/bin/env bash
# Checks on NVIDIA GPUs that the plugin computes and serves what it should; the first failure ends it. Unattended.
#
#   scripts/gpu/smoke.sh [OUT]     OUT: folder for the logs (default: build/gpu-smoke)
#
#   REQUIRE_GPU=1    no GPU is an error; otherwise everything is skipped then, with exit code 0
#   DRY_RUN=1        print the commands instead of running them
#   REHEARSAL=1      for tests/cuda_build: a step may end where it needs a GPU
#   SKIP_SETUP=1, VENV=dir, VLLM_VERSION=0.32.0 as for scripts/setup.sh
set -euo pipefail

OUT=$(realpath -m "${1:-$(dirname "$0")/../../build/gpu-smoke}")
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require_gpu
plan $((9 + (gpus > 1) - (${SKIP_SETUP:+1} + 0)))
use_environment
cd "$root"

# Of tests/engine/test_gpu.py the tests whose names have this in them.
tests() {
    step "$1" "$venv/bin/python" -m pytest -m gpu tests/engine/test_gpu.py -k "$2" -n 0 -v --durations 5 \
        ${REHEARSAL:+--exitfirst}
}

step versions "$venv/bin/vllm-bailing" info
tests reference-fp32 "test_reference and float32"
tests reference-bf16 "test_reference and bfloat16" # YaRN is one of the recorded cases
tests runners test_runner
tests mtp test_mtp
tests quantized test_quantized
tests adapters test_adapter
if ((gpus > 1)); then tests tp2 test_tp2; fi
step serve bash scripts/demo.sh --adapter --port "${PORT:-8123}"

say "all is well; logs are in $OUT"
