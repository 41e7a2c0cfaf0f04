#!/usr/bin/env bash
# Measures on an NVIDIA GPU what the plugin and its options gain over vLLM's own class, and holds docs/gpu-expectations.md
# against it. Unattended; takes some hours.
#
#   scripts/gpu/bench.sh [OUT]     OUT: folder for GPU-DATE-*.json and .png (default: docs/benchmarks); logs go to OUT/logs
#
#   ROUNDS=6         how often each arm is measured
#   SHAPES="mini"    which of mini, flash-4L and flash-8L (default: all that fit into the memory)
#   REQUIRE_GPU=1    no GPU is an error; otherwise everything is skipped then, with exit code 0
#   DRY_RUN=1        print the commands instead of running them
#   REHEARSAL=1      for tests/cuda_build: a step may end where it needs a GPU
#   SKIP_SETUP=1, VENV=dir, VLLM_VERSION=0.32.0 as for scripts/setup.sh
#
# Weights are dummies, so routing is not that of a trained model. Nothing else should run on the GPU; its clocks and power
# limits stay as they are. A result that is slower is a result: only an arm that runs the wrong class ends this.
set -euo pipefail

results=$(realpath -m "${1:-$(dirname "$0")/../../docs/benchmarks}")
OUT=$results/logs
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

require_gpu
# GB that a shape needs beside its weights: workspaces, CUDA graphs and some KV cache.
readonly room_gb=8
declare -A weights_gb=([mini]=33 [flash-4L]=23 [flash-8L]=49)
readonly flash_gb=206 # over all GPUs
chosen=() # of the shapes
for shape in ${SHAPES:-mini flash-4L flash-8L}; do
    [[ -n ${weights_gb[$shape]:-} ]] || { say "SHAPES: there is no $shape" >&2 && exit 1; }
    if ((weights_gb[$shape] + room_gb <= gpu_gb)); then
        chosen+=("$shape")
    else
        say "$shape left out: it needs $((weights_gb[$shape] + room_gb)) GB"
    fi
done
# flash-4L with an MTP layer, 29 GB, to see what a draft costs; real acceptance needs real weights.
with_mtp=$((29 + room_gb <= gpu_gb))
with_flash=$((gpus >= 4 && flash_gb / 4 + room_gb <= gpu_gb))
plan $((${#chosen[@]} + with_flash + 2 * with_mtp + 3 - (${SKIP_SETUP:+1} + 0)))
use_environment
cd "$root"

name=$gpu_name-$(date -u +%Y-%m-%d)
fused='{"compilation_config": {"pass_config": {"enable_qk_norm_rope_fusion": true}}}'
step environment bash -c "nvidia-smi -q -d CLOCK,POWER,ECC; '$venv/bin/vllm-bailing' info"
# compare NAME SHAPE [FLAG...]
compare() {
    local result=$results/$name-$1
    step "compare-$1" "$venv/bin/vllm-bailing" bench compare "$2" --rounds "${ROUNDS:-6}" --dtype bfloat16 \
        --batch-size 1,8,64,128 --prompt-tokens 1024 --output-tokens 256 --prefill 512,2048,8192 \
        --option "qk-norm-rope=$fused" --out "$result" "${@:3}"
}
for shape in "${chosen[@]}"; do compare "$shape" "$shape"; done
if ((with_flash)); then compare flash-tp4 flash --tensor-parallel-size 4; fi
if ((with_mtp)); then
    model=$root/build/gpu-bench/flash-4L-mtp
    step mtp-model "$venv/bin/python" -c "
from pathlib import Path
from vllm_bailing.bench.shapes import add_tokenizer, write_shape
write_shape('flash-4L', Path('$model'), mtp_layers=1)
add_tokenizer(Path('$model'))"
    step mtp "$venv/bin/vllm-bailing" bench mtp "$model" --draft-tokens 0,1,2,3 --acceptance 0.8 --batch-size 1,8 \
        --rounds "${ROUNDS:-6}" --max-tokens 256 --engine '{"load_format": "dummy", "max_model_len": 2048}' \
        --out "$results/$name-flash-4L-mtp"
fi
# What was expected of mini and flash by counting: met or missed, and what came. Both are results.
step expectations bash -c "
for result in '$results/$name-mini.json' '$results/$name-flash-tp4.json'; do
    [[ ! -f \$result ]] || '$venv/bin/python' scripts/dev/gpu_expectations.py --check \"\$result\" || true
done"
[[ ${DRY_RUN:-0} == 1 ]] || cat "$OUT/expectations.log"
say "results are in $results/$name-*"
