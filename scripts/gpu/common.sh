# shellcheck shell=bash
# Shared by smoke.sh and bench.sh, which source it: the check for a GPU, the environment, and steps.
#
#   require_gpu      ends the script where there is no NVIDIA GPU: "skipped" and 0, or an error and 1 with REQUIRE_GPU=1
#   use_environment  sets $venv, with vLLM and this project in it
#   plan N           how many steps will follow
#   step NAME CMD..  runs a command with its output in $OUT/NAME.log; a failure ends the script with the end of that
#   DRY_RUN=1        prints the commands of the steps and runs none
#   REHEARSAL=1      on a machine whose GPUs are stand-ins (tests/cuda_build/machine): a step may end where it needs one

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
script=gpu-$(basename "$0" .sh)
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
steps=0 done_steps=0
# What the first call that needs a GPU says where there is none.
readonly needs_gpu='ProcessGroupNCCL is only supported with GPUs|CUDA error|CUDA driver|CUDA-capable device|NVIDIA driver'

say() { printf '%s: %s\n' "$script" "$*"; }

require_gpu() {
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || gpus=0
    if ((gpus == 0)); then
        if [[ ${REQUIRE_GPU:-0} == 1 ]]; then
            say "no NVIDIA GPU, and REQUIRE_GPU=1 asks for one" >&2
            exit 1
        fi
        say "skipped: no NVIDIA GPU"
        exit 0
    fi
    gpu_name=$(nvidia-smi --query-gpu=name --format=csv,noheader | sed -n 1p)
    gpu_name=${gpu_name#NVIDIA }
    gpu_name=${gpu_name// /-}
    # Of the smallest one, in GB.
    gpu_gb=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | sort -n | sed -n 1p)
    gpu_gb=$((gpu_gb * 1048576 / 1000000000))
    say "$gpus x $gpu_name, $gpu_gb GB"
}

use_environment() {
    if [[ -z ${SKIP_SETUP:-} ]]; then step setup bash "$root/scripts/setup.sh"; fi
    export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 PYTHONUNBUFFERED=1
    [[ ${DRY_RUN:-0} == 1 ]] || mkdir -p "$OUT"
}

plan() { steps=$1; }

step() {
    local name=$1 start=$SECONDS log=$OUT/$1.log
    shift
    done_steps=$((done_steps + 1))
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '[%d/%d] %s:' "$done_steps" "$steps" "$name"
        printf ' %q' "$@"
        printf '\n'
        return
    fi
    mkdir -p "$OUT"
    printf '[%d/%d] %s ...\n' "$done_steps" "$steps" "$name"
    if "$@" >"$log" 2>&1 </dev/null; then
        printf '[%d/%d] %s: ok in %d s\n' "$done_steps" "$steps" "$name" $((SECONDS - start))
        return
    fi
    if [[ ${REHEARSAL:-0} == 1 ]] && grep -qE "$needs_gpu" "$log"; then
        printf '[%d/%d] %s: as far as a GPU is needed, in %d s\n' "$done_steps" "$steps" "$name" $((SECONDS - start))
        return
    fi
    tail -n 40 "$log" >&2
    say "$name failed after $((SECONDS - start)) s; the whole output is in $log" >&2
    exit 1
}
