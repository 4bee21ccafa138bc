#!/usr/bin/env bash
# A real OpenSearch (TLS, users), S3 and Parameter Store on this machine, with nothing but Python 3.
#
# Usage: tests/sandbox.sh [COMMAND...]    runs COMMAND against them, or an interactive shell without one
#        tests/sandbox.sh --set-up        only makes .venv
# Env:   PYTHON (python3)                 the Python that .venv is made from
#        OPENSEARCH_VERSION (2.19.4)      3.x runs without the security plugin
# Exit:  that of COMMAND
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
top=$PWD
cd "$OLDPWD"

make_venv() { # make_venv: .venv with both requirement files; the stamp is what it was made from
  local python=${PYTHON:-python3} stamp
  stamp=$(cat "$top/requirements.txt" "$top/tests/requirements.txt")
  if [[ -f $top/.venv/stamp && $(<"$top/.venv/stamp") == "$stamp" ]]; then return; fi
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
    || { echo "sandbox: $python is too old; Python 3.10 or later is needed (PYTHON=...)" >&2; exit 2; }
  echo "sandbox: making .venv (about a minute)" >&2
  "$python" -m venv "$top/.venv" \
    || { echo "sandbox: $python cannot make a venv; on Debian install python3-venv" >&2; exit 2; }
  "$top/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$top/requirements.txt" -r "$top/tests/requirements.txt" >&2
  printf '%s\n' "$stamp" >"$top/.venv/stamp"
}

make_venv
if [[ ${1:-} == --set-up ]]; then exit 0; fi
exec "$top/.venv/bin/python" "$top/tests/sandbox.py" "$@"
