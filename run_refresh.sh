#!/usr/bin/env bash
# Replace the data behind an alias: copy, switch readers to the copy, load, switch readers back (copy-back);
# or load the index that is not live and switch readers to it (alternate).
#
# Usage: run_refresh.sh [--dry-run] [--verbose] | --help
#        --verbose: what the steps say goes to stderr too, as on a terminal; for containers, journals and CI
# Env:   PRIMARY_INDEX (my_index_primary)  SECONDARY_INDEX (my_index_secondary)  INDEX_ALIAS (my_index_alias)
#        S3_BUCKET (your-bucket)  S3_PREFIX (your/prefix/)  BATCH_SIZE (1000)  STEP_DELAY_SECONDS (5)
#        REFRESH_STRATEGY (copy-back, or alternate)
#        READER_QUERIES (unset: searches that are tried before each switch; here on the live index, before anything)
#        SKIP_UNCHANGED (false; true ends at once when the live index provably holds what S3 holds)
#        PYTHON (.venv/bin/python beside this script, or python3), LOG_DIR, LOCK_DIR; .env is read, never sourced
# Hold:  while LOCK_DIR/HOLD-<alias> exists, nothing is done (4); its first line says why, since when
# Last:  LOG_DIR/last-<alias>.json tells a monitor how the last run ended, and when one last succeeded
# Exit:  0 readers are on the fresh data; otherwise the code of the step that failed (see README), 2 usage, 75 locked
set -euo pipefail
SELF=$(readlink -f "${BASH_SOURCE[0]}")
cd "$(dirname "$SELF")"
umask 077

readonly KEEP_DAYS=30
step="preparing" last="" result="" began=$SECONDS log_file=/dev/null
began_at=$(date -u +%Y-%m-%dT%H:%M:%SZ)
live="" live_documents="" newest_age="" message="" # for last-<alias>.json
dry_run="" documents="" # not local to main: an exit by `set -e` takes those away before the trap
table=() took=()
declare -A setting

say() { # say TEXT: on the terminal and in the log
  printf '%s\n' "$1" >&2 || true # nobody may be listening, see main
  printf '%s run_refresh: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" >>"$log_file"
}

die() { # die TEXT CODE
  message=$1
  say "run_refresh: $1"
  exit "$2"
}

show_steps() { # hand the terminal on to the steps, whose stderr is the log file; with --verbose whatever stderr is
  exec 8>&2
  export REFRESH_BESIDE=8
}

choose_python() {
  local own=$PWD/.venv/bin/python
  if [[ -z ${PYTHON:-} ]]; then
    if [[ -x $own ]]; then PYTHON=$own; else PYTHON=python3; fi
  fi
  command -v "$PYTHON" >/dev/null || die "no $PYTHON: set PYTHON" 2
}

read_settings() { # from the environment or .env, by the table of settings that the scripts use
  local values name value
  values=$("$PYTHON" -c 'import opensearch_base_manager as base; base.print_settings("run_refresh")') || exit 2
  while IFS='=' read -r name value; do setting[$name]=$value; done <<<"$values"
  PRIMARY=${setting[PRIMARY_INDEX]} SECONDARY=${setting[SECONDARY_INDEX]} ALIAS=${setting[INDEX_ALIAS]}
  LOG_DIR=${setting[LOG_DIR]} LOCK_DIR=${setting[LOCK_DIR]}
  [[ $PRIMARY != "$SECONDARY" ]] || die "PRIMARY_INDEX and SECONDARY_INDEX are the same index" 2
}

open_log() {
  mkdir -p "$LOG_DIR" "$LOCK_DIR" \
    || die "LOG_DIR ($LOG_DIR) and LOCK_DIR ($LOCK_DIR) have to be folders that can be written to" 1
  find "$LOG_DIR" -maxdepth 1 -type f \( -name 'refresh-*.log' -o -name '.result-*' \) -mtime +"$KEEP_DAYS" \
    -delete || true
  log_file="$LOG_DIR/refresh-$ALIAS-$(date -u +%Y%m%dT%H%M%SZ)-$$.log"
  result=$(mktemp "$LOG_DIR/.result-XXXXXX") || die "LOG_DIR ($LOG_DIR) has to be a folder that can be written to" 1
  : >>"$log_file" || die "cannot write $log_file" 1
}

refuse_hold() { # somebody wants readers to stay where they are
  local hold="$LOCK_DIR/HOLD-$ALIAS" why=""
  [[ -e $hold || -L $hold ]] || return 0
  if [[ -f $hold ]]; then # what is no text, or would steer a terminal, is not passed on
    why=$(head -c 1000 "$hold" | iconv -c -f UTF-8 -t UTF-8 | LC_ALL=C.UTF-8 sed 's/[[:cntrl:]]/?/g; q') || true
  fi
  die "held: ${why:-no reason given}; delete $hold to go on" 4
}

take_lock() { # the steps inherit it: while one of them lives, no other refresh begins
  local lock="$LOCK_DIR/REFRESH-$ALIAS.lock" # upper case: no index has that name
  : >>"$lock" || die "LOCK_DIR ($LOCK_DIR) has to be a folder that can be written to" 1
  exec 9>>"$lock"
  flock -n 9 || die "another refresh of $ALIAS is running on this host" 75
}

run_step() { # run_step NAME SCRIPT ARGUMENT...: a failing step ends the run with its exit code
  local step_began=$SECONDS rc=0 age
  step=$1
  shift
  say "==> $step"
  printf '$ %s\n' "$*" >>"$log_file"
  "$PYTHON" "$@" >"$result" 2>>"$log_file" &
  wait $! || rc=$?
  last=$(tail -n 1 "$log_file")
  sed "s/^/> /" "$result" >>"$log_file"
  documents=$(sed -n 's/.*"documents": \([0-9]*\).*/\1/p' "$result")
  age=$(sed -n 's/.*"newest_object_age_hours": \(-\{0,1\}[0-9.]*\).*/\1/p' "$result")
  newest_age=${age:-$newest_age}
  took+=("$step" "$((SECONDS - step_began))")
  say "<== $step: exit $rc, $((SECONDS - step_began)) s${documents:+, $documents documents}"
  if ((rc != 0)); then
    message=${last#* }
    [[ -n ${REFRESH_BESIDE:-} && $last == *" ERROR "* ]] || say "$message"
    exit "$rc"
  fi
  [[ $step == check* ]] || table+=("$(printf '%-50s %8d %12s' "$step" "$((SECONDS - step_began))" "${documents:--}")")
}

# shellcheck disable=SC2329  # called by a trap
on_signal() { # on_signal NAME CODE: pass it on at once, and wait until the step has put things back
  local child
  trap '' HUP INT TERM
  for child in $(jobs -p); do
    kill -s "$1" "$child" 2>/dev/null || true
    [[ $1 != INT ]] || kill -s TERM "$child" 2>/dev/null || true # just started by `&`, it still ignores INT
    wait "$child" || true
  done
  message="stopped by SIG$1"
  renew ""
  say "$message"
  exit "$2"
}

# shellcheck disable=SC2329  # called by a trap
on_exit() {
  local rc=$?
  trap '' HUP INT TERM
  rm -f "$result"
  [[ -n $dry_run || $rc == 75 ]] || remember "$rc" || true # 75: the run that has the lock tells
  if ((rc == 0)); then
    say "finished in $((SECONDS - began)) s"
  else
    say "FAILED at: $step (exit $rc) after $((SECONDS - began)) s; log: $log_file"
  fi
}

# shellcheck disable=SC2329  # called by a trap
remember() { # remember CODE: for monitors, and replaced whole, so that they never see half of it
  [[ $1 == [04] || $step != *switch* ]] || live="" live_documents="" # broken off: nobody knows
  "$PYTHON" - "$LOG_DIR/last-$ALIAS.json" "$ALIAS" "$began_at" "$1" "$step" "$message" "$live" "$live_documents" \
    "$newest_age" ${took[@]+"${took[@]}"} 2>/dev/null <<'END' || say "$LOG_DIR/last-$ALIAS.json could not be written"
import json, os, sys, time

path, alias, began, code, step, message, live, documents, age, *took = sys.argv[1:]
ended, failed = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), code != "0"
try:
    with open(path) as file:
        last_success = json.load(file)["last_success"]
except (OSError, ValueError, LookupError, TypeError):
    last_success = None
found = {
    "alias": alias, "began": began, "ended": ended, "exit_code": int(code), "step": step if failed else None,
    "message": message if failed else None, "live_index": live or None,
    "documents": int(documents) if documents else None,
    "steps": [{"step": name, "seconds": int(seconds)} for name, seconds in zip(took[::2], took[1::2])],
    "newest_object_age_hours": float(age) if age else None, "last_success": last_success if failed else ended,
}
with open(f"{path}.{os.getpid()}", "w") as file:
    file.write(json.dumps(found) + "\n")
os.replace(file.name, path)
END
}

pause() { # with a sign of life on a terminal: after two seconds without one people reach for Ctrl-C
  local delay=${setting[STEP_DELAY_SECONDS]} waited sleeper
  [[ $delay != 0 ]] || return 0
  sleep "$delay" 8>&- 9>&- & # without the lock: a runner that is killed leaves it behind
  sleeper=$!
  for ((waited = 0; ; waited++)); do
    if [[ ! -t 2 ]] || ! kill -0 "$sleeper" 2>/dev/null; then break; fi
    renew "next step in $delay s, waited $waited s"
    sleep 1 8>&- 9>&- &
    wait $!
  done
  renew ""
  wait "$sleeper"
}

renew() { # renew TEXT: in the last line of the terminal, unless the run is in its background
  [[ ! -t 2 || $(ps -o stat= -p $$ 2>/dev/null) != *+* ]] || printf '\r\033[K%s' "$1" >&2 || true
}

check() { # step 0, before readers are moved: whatever can be known beforehand
  run_step "check where readers are" switch_alias.py --alias "$ALIAS" --show
  live=$(<"$result")
  [[ -n $live ]] || die "where readers are could not be noted: ${last#* }" 1
  case "$live" in
    "$PRIMARY") idle=$SECONDARY ;;
    "$SECONDARY") idle=$PRIMARY ;;
    *) die "alias $ALIAS is on $live, neither on $PRIMARY nor on $SECONDARY; nothing was changed" 4 ;;
  esac
  if [[ -n ${setting[READER_QUERIES]} ]]; then
    run_step "check the queries" switch_alias.py --alias "$ALIAS" --show --source "$live" --target "$idle" --queries="${setting[READER_QUERIES]}"
  fi
  if [[ ${setting[SKIP_UNCHANGED]} == true ]]; then
    run_step "check what has changed" bulkupdate.py "${load[@]}" --index "$live" --dry-run
    if grep -q '"unchanged": true' "$result"; then
      live_documents=$documents
      say "nothing has changed since $live was loaded: nothing to do"
      exit 0
    fi
  fi
  both=(--source "$live" --target "$idle")
  load+=(--index "$([[ ${setting[REFRESH_STRATEGY]} == alternate ]] && echo "$idle" || echo "$PRIMARY")")
  run_step "check the load" bulkupdate.py "${load[@]}" --dry-run
  [[ ${setting[REFRESH_STRATEGY]} == copy-back ]] || return 0
  if [[ $live == "$PRIMARY" ]]; then
    run_step "check the copy" reindex.py "${both[@]}" --dry-run
  else
    say "readers are on $SECONDARY already: a former run ended after step 2, or somebody switched by hand; going on"
    say "with step 3. To leave them on $SECONDARY, stop the schedule of this script."
  fi
}

copy_back() {
  if [[ $live == "$PRIMARY" ]]; then
    run_step "1 copy $PRIMARY to $SECONDARY" reindex.py "${both[@]}"
    live_documents=$documents
    pause
    # the copy has to be equal, field by field; whether the data are good readers know already
    run_step "2 switch readers to $SECONDARY" switch_alias.py --alias "$ALIAS" "${both[@]}" \
      --threshold 0 --field-threshold 0 --min-documents 0 --queries ""
    live=$SECONDARY
    pause
  fi
  run_step "3 load $PRIMARY from S3" bulkupdate.py "${load[@]}"
  pause
  run_step "4 switch readers to $PRIMARY" switch_alias.py --alias "$ALIAS" --source "$SECONDARY" --target "$PRIMARY"
  live=$PRIMARY live_documents=$documents
}

alternate() {
  run_step "1 load $idle from S3" bulkupdate.py "${load[@]}"
  pause
  run_step "2 switch readers to $idle" switch_alias.py --alias "$ALIAS" "${both[@]}"
  live=$idle live_documents=$documents
}

closing_table() {
  {
    printf '%-50s %8s %12s\n' step seconds documents
    printf '%s\n' "${table[@]}"
    printf '%-50s %8d\n' total "$((SECONDS - began))"
  } >"$result"
  cat "$result" >>"$log_file"
  cat "$result" || true
}

main() {
  local verbose="" idle="" both load argument
  for argument in "$@"; do
    case "$argument" in
      --dry-run) dry_run=yes ;;
      --verbose) verbose=yes ;;
      --help | -h)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$SELF"
        exit 0
        ;;
      *) die "unknown argument: $argument (see --help)" 2 ;;
    esac
  done
  choose_python
  read_settings
  load=(--bucket "${setting[S3_BUCKET]}" --prefix="${setting[S3_PREFIX]}" --batch-size "${setting[BATCH_SIZE]}")
  open_log
  trap on_exit EXIT
  trap '' PIPE # a terminal or a `head` that has gone must not stop a refresh
  trap 'on_signal HUP 129' HUP
  trap 'on_signal INT 130' INT
  trap 'on_signal TERM 143' TERM
  refuse_hold
  take_lock
  [[ ! -t 2 && -z $verbose ]] || show_steps
  check
  if [[ -n $dry_run ]]; then
    say "dry run: all checks passed, nothing was changed"
    exit 0
  fi
  if [[ ${setting[REFRESH_STRATEGY]} == alternate ]]; then alternate; else copy_back; fi
  closing_table
  exit 0 # here: what follows would be read from the file only now, and that may have been replaced under way
}

main "$@"
