#!/usr/bin/env bash
# The linters and most tests; makes .venv and the sandbox by itself.
#
# Usage: tests/run.sh [PYTEST ARGUMENT...]    --slow: also clusters of several nodes and killed refreshes
#                                             --faults: with those and the long form of the fault tests (an hour)
#                                             -m quick: about a minute
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
