#!/usr/bin/env bash
# A refresh with Python 3.10 and the lowest packages that requirements.txt allows, and one with 3.13 and the newest ones.
#
# Usage: tests/versions.sh
# Env:   as in tests/sandbox.sh
# Exit:  0 when they passed; a Python that is not on this machine is named and left out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

find_python() { # find_python VERSION: what pyenv has is not on the PATH by its version alone
  local found
  for found in "$(command -v "python$1")" "$(pyenv whence --path "python$1" 2>/dev/null | tail -n 1)"; do
    if [[ -n $found ]] && "$found" -c '' 2>/dev/null; then
      echo "$found"
      return
    fi
  done
  return 1
}

refresh_with() { # refresh_with VERSION SED: the Python, and what makes of requirements.txt what is installed
  local python own="$folder/$1"
  python=$(find_python "$1") || {
    echo "versions: no Python $1 here, not run"
    return 0
  }
  "$python" -m venv "$own"
  sed "$2" requirements.txt >"$own/requirements.txt"
  "$own/bin/python" -m pip install --quiet --disable-pip-version-check -r "$own/requirements.txt"
  tests/sandbox.sh env PYTHON="$own/bin/python" STEP_DELAY_SECONDS=0 ./run_refresh.sh
  echo "versions: refreshed with $("$own/bin/python" --version)," \
    "$("$own/bin/python" -m pip freeze | grep -iE '^(boto3|requests|urllib3|python-dotenv)==' | paste -sd ' ')"
}

refresh_with 3.10 's/>=/==/'
refresh_with 3.13 ""
