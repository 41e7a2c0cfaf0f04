#!/usr/bin/env bash
# Rehearses what happens on NVIDIA GPUs: vLLM's CUDA build on a machine that has none, as far as its decisions go.
#
#   scripts/gpu/rehearse.sh [VLLM_VERSION [GPU...]]     default: 0.33.0 H100 B200 H20 A100-80G L40S
#
#   OUT=dir                  folder for the logs (default: build/rehearsal)
#   JOBS=n                   how many GPUs at a time, a core and 3 GB of memory each (default: as many as there are cores)
#   PYTEST_ARGUMENTS="..."   more arguments of pytest, such as --write-kernels, which records the kernels that vLLM chose
#
# The environment takes 12 GB below ~/.cache/vllm-bailing/cuda and is made once. Needs gcc. GPUs have the names that
# `vllm-bailing plan` knows. What is checked stands in tests/cuda_build; values and speed are not.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
version=${1:-0.33.0}
shift || true
gpus=("${@:-H100}")
(($#)) || gpus=(H100 B200 H20 A100-80G L40S)
jobs=${JOBS:-$(nproc)} # now: nproc would count no more cores than OMP_NUM_THREADS
out=$(realpath -m "${OUT:-$root/build/rehearsal}")/$version
cache=${XDG_CACHE_HOME:-$HOME/.cache}/vllm-bailing

fail() {
    printf 'rehearse: %s\n' "$*" >&2
    exit 1
}

command -v gcc >/dev/null || fail "gcc is missing; it builds what stands in for NVIDIA's driver"
VENV=$cache/cuda/$version VLLM_BUILD=cuda VLLM_VERSION=$version bash "$root/scripts/setup.sh"
python=$cache/cuda/$version/bin/python
mkdir -p "$out"
machine=$out/machine
bash "$root/tests/cuda_build/machine/build.sh" "$machine"

# Every Python below takes this machine for one with 8 GPUs, and writes caches nowhere else.
export FAKE_GPU_COUNT=8 REHEARSAL_SCRATCH=$out/models
export LD_LIBRARY_PATH=$machine:${LD_LIBRARY_PATH:-} TRITON_LIBCUDA_PATH=$machine
export VLLM_CACHE_ROOT=$out/cache TORCHINDUCTOR_CACHE_DIR=$out/cache/inductor TRITON_CACHE_DIR=$out/cache/triton
export FLASHINFER_WORKSPACE_BASE=$out/cache HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=1
# Compiled graphs are looked at, not kept.
export VLLM_USE_AOT_COMPILE=0 VLLM_DISABLE_COMPILE_CACHE=1
# Importing Humming would start two compilers in every process.
export HUMMING_DISABLE_PARALLEL_BUILD=1
unset PYTHONDONTWRITEBYTECODE # where it is set, every process would compile vLLM anew: 20 s of work

cd "$root"
read -ra more <<<"${PYTEST_ARGUMENTS:-}"
declare -A gpu_of=() start_of=() # by process
failed=0
trap 'kill "${!gpu_of[@]}" 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# start GPU: its tests, in the background.
start() {
    local gpu=$1 facts name capability gib
    facts=$("$python" - "$gpu" <<'PYTHON'
import sys

from vllm_bailing.planning.gpus import GPUS

gpu = GPUS.get(sys.argv[1])
if gpu is None or not gpu.driver_names or not gpu.compute_capability:
    sys.exit(f"rehearse: {sys.argv[1]} is not a GPU of NVIDIA's that `vllm-bailing plan` knows")
print(gpu.driver_names[0], gpu.compute_capability.replace(".", ""), round(gpu.memory_bytes / 2**30), sep="\n")
PYTHON
    )
    { read -r name && read -r capability && read -r gib; } <<<"$facts"
    FAKE_GPU_NAME=$name FAKE_GPU_CAPABILITY=$capability FAKE_GPU_GIB=$gib LD_PRELOAD=$machine/cudart.so \
        PYTHONPATH=$root/tests/cuda_build/machine/site "$python" -m pytest tests/cuda_build -p no:cacheprovider -n 0 -q \
        --durations=10 --junitxml="$out/$gpu.xml" "${more[@]}" >"$out/$gpu.log" 2>&1 </dev/null &
    gpu_of[$!]=$gpu start_of[$!]=$SECONDS
}

# finish: waits for one of those that run, and prints what came of it.
finish() {
    local process=0 outcome=ok log
    wait -n -p process "${!gpu_of[@]}" || outcome=FAILED failed=1
    log=$out/${gpu_of[$process]}.log
    [[ $outcome == ok ]] || outcome="FAILED, see $log"
    printf '%-9s %s; %s, %d s\n' "${gpu_of[$process]}" "$(tail -n 1 "$log" | sed 's/ in .*//')" "$outcome" \
        $((SECONDS - start_of[$process]))
    unset "gpu_of[$process]"
}

for gpu in "${gpus[@]}"; do
    ((${#gpu_of[@]} < jobs)) || finish
    start "$gpu"
done
while ((${#gpu_of[@]})); do finish; done
((failed == 0)) || fail "not everything is as it should be on vLLM $version"
