#!/usr/bin/env bash
# All checks and tests; makes .venv and the sandbox by itself.
#
# Usage: tests/run.sh [PYTEST ARGUMENT...]
# Env:   as in tests/sandbox.sh
# Exit:  0 when everything passed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tests/sandbox.sh --set-up
PATH=$PWD/.venv/bin:$PATH
ruff check .
mypy ./*.py
shellcheck run_refresh.sh tests/*.sh .ci/run
exec python -m pytest "$@"
