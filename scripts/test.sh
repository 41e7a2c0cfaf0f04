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
"$venv/bin/ruff" check .
"$venv/bin/basedpyright" --pythonpath "$venv/bin/python"
exec "$venv/bin/python" -m pytest -n 2 "$@"
