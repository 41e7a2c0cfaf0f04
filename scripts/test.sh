#!/usr/bin/env bash
# Sets up the environment (see setup.sh), then runs the linter, the type checker and all tests.
#
#   scripts/test.sh [arguments of pytest]         such as: -m "not engine", or -k routing; -n 0 runs one test at a time
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ -n ${SKIP_SETUP:-} ]] || bash "$root/scripts/setup.sh"
venv=${VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
cd "$root"
unset PYTHONDONTWRITEBYTECODE # where it is set, each process of the tests would compile vLLM anew: 20 s of work
"$venv/bin/ruff" check .
# The type checker works on one core for more than a minute: beside the tests, not before them.
"$venv/bin/basedpyright" --pythonpath "$venv/bin/python" &
types=$!
trap 'kill "$types" 2>/dev/null || true' EXIT
tests_ended=0 types_ended=0
"$venv/bin/python" -m pytest -n 2 "$@" || tests_ended=$?
wait "$types" || types_ended=$?
((types_ended == 0)) || echo "test: the type checker found mistakes (above, beside the tests' output)" >&2
exit $((tests_ended ? tests_ended : types_ended))
