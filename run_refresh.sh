#!/usr/bin/env bash
# Replace the data behind an alias: copy its index, switch readers to the copy, load the index, switch readers back
# (copy-back); or load the index that is not live and switch readers to it (alternate).
#
# Usage: run_refresh.sh [--dry-run] [--verbose]
#        run_refresh.sh --hold WHY | --release | --status [--max-age HOURS] | --help
#        --dry-run:   run the checks of step 0 only, change nothing
#        --verbose:   send the steps' log lines to stderr too, as on a terminal; for containers, journals and CI
#        --hold WHY:  refuse every new refresh (exit code 4) until --release; a running one continues
#        --status:    print the last run's outcome, the readers' index, hold and lock, without contacting the cluster;
#                     with --max-age, exit 1 unless a run has succeeded in the last HOURS hours
# Env:   PRIMARY_INDEX (my_index_primary)  SECONDARY_INDEX (my_index_secondary)  INDEX_ALIAS (my_index_alias)
#        S3_BUCKET (your-bucket)  S3_PREFIX (your/prefix/; '*' is the whole bucket)  BATCH_SIZE (1000)
#        STEP_DELAY_SECONDS (5)  REFRESH_STRATEGY (copy-back, or alternate)
#        READER_QUERIES (unset; a file of searches to run before each switch, and on the live index in step 0)
#        SKIP_UNCHANGED (false; true: exit with 0 immediately if the live index provably holds the data in S3)
#        PYTHON (.venv/bin/python next to this script, or python3), LOG_DIR, LOCK_DIR; .env is read, never sourced
# Files: LOCK_DIR/HOLD-<alias>: while it exists, refreshes are refused; its first line holds the reason and the time
#        LOG_DIR/last-<alias>.json: outcome of the last run (unless killed with SIGKILL) and time of the last success
# Exit:  0 succeeded; otherwise the code of the step that failed (all codes: README), 2 usage, 4 held, 75 locked
set -euo pipefail
SELF=$(readlink -f "${BASH_SOURCE[0]}")
cd "$(dirname "$SELF")"
umask 077

readonly KEEP_DAYS=30
began=$(date +%s) log_file=/dev/null result="" # result: the file with the stdout of the last step
step="preparing" message="" journal=()          # for last-<alias>.json and the closing table
last_line=""                                    # the last line that a step logged
command="" why="" max_age=""                    # hold (with why), release, status (with max_age), or "": refresh
dry_run="" verbose=""                           # global: `set -e` discards local variables before the trap runs
declare -A setting

say() { # say TEXT: to stderr and to the log; not with `date`: bash could lose a Ctrl-C while it waits for `date`
  printf '%s\n' "$1" >&2 || true # the terminal or pipe may be closed, see main
  TZ=UTC printf '%(%Y-%m-%dT%H:%M:%SZ)T run_refresh: %s\n' -1 "$1" >>"$log_file"
}

die() { # die TEXT CODE
  message=$1
  say "run_refresh: $1" || true # the log may be on a full disk
  exit "$2"
}

use_command() { # use_command NAME: at most one in a call
  [[ -z $command ]] || die "--$1: cannot be combined with --$command" 2
  command=$1
}

parse_arguments() {
  while (($#)); do
    case $1 in
      --dry-run) dry_run=yes ;;
      --verbose) verbose=yes ;;
      --hold)
        use_command hold
        why=${2:-}
        [[ $why == *[![:space:]]* && $why != --* ]] || die "--hold: give the reason, in quotes" 2
        shift
        ;;
      --release) use_command release ;;
      --status) use_command status ;;
      --max-age)
        max_age=${2:-}
        [[ $max_age =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "--max-age: give a number of hours" 2
        shift
        ;;
      --help | -h)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$SELF"
        exit 0
        ;;
      *) die "unknown argument: $1 (see --help)" 2 ;;
    esac
    shift
  done
  [[ -z $command || -z $dry_run$verbose ]] || die "--$command: cannot be combined with --dry-run or --verbose" 2
  [[ -z $max_age || $command == status ]] || die "--max-age: only with --status" 2
}

choose_python() {
  local own=$PWD/.venv/bin/python
  if [[ -z ${PYTHON:-} ]]; then
    if [[ -x $own ]]; then PYTHON=$own; else PYTHON=python3; fi
  fi
  command -v "$PYTHON" >/dev/null || die "cannot run $PYTHON; set PYTHON to a Python 3.10 or later" 2
}

read_settings() { # from the environment or .env, with the table of settings that the scripts use
  local values line
  values=$("$PYTHON" -c 'import opensearch_base_manager as base; base.print_settings("run_refresh")') || exit 2
  while IFS= LC_ALL=C read -r line; do setting[${line%%=*}]=${line#*=}; done <<<"$values"
  PRIMARY=${setting[PRIMARY_INDEX]} SECONDARY=${setting[SECONDARY_INDEX]} ALIAS=${setting[INDEX_ALIAS]}
  export INDEX_ALIAS=$ALIAS # the load's dry run accepts only this alias on the index: step 2 will have moved it
  [[ $ALIAS != */* ]] || die "INDEX_ALIAS: $ALIAS contains a slash; give the name of an alias" 2
  LOG_DIR=${setting[LOG_DIR]} LOCK_DIR=${setting[LOCK_DIR]}
  hold="$LOCK_DIR/HOLD-$ALIAS" lock="$LOCK_DIR/REFRESH-$ALIAS.lock" # upper case: never the lock of an index
  [[ $PRIMARY != "$SECONDARY" ]] || die "PRIMARY_INDEX and SECONDARY_INDEX are the same index; set two different ones" 2
}

open_log() {
  mkdir -p "$LOG_DIR" "$LOCK_DIR" \
    || die "cannot create LOG_DIR ($LOG_DIR) or LOCK_DIR ($LOCK_DIR); set both to folders that this user may write to" 1
  find -H "$LOG_DIR" -maxdepth 1 -type f \( -name 'refresh-*.log' -o -name '.result-*' \) -mtime +"$KEEP_DAYS" \
    -delete || true
  log_file="$LOG_DIR/refresh-$ALIAS-$(date -u +%Y%m%dT%H%M%SZ)-$$.log"
  result=$(mktemp "$LOG_DIR/.result-XXXXXX") || die "cannot write to LOG_DIR ($LOG_DIR); set it to another folder" 1
  : >>"$log_file" || die "cannot write $log_file; free disk space, or set LOG_DIR to another folder" 1
}

open_step_log() { # descriptor 8, the steps' stderr: the runner's own on a terminal or with --verbose, or the log file
  unset REFRESH_LOG_FILE
  if [[ -t 2 || -n $verbose ]]; then
    exec 8>&2
    export REFRESH_LOG_FILE=$log_file # the steps log there too
  else
    exec 8>>"$log_file"
  fi
}

write_hold() { # every refresh is refused from now on
  mkdir -p "$LOCK_DIR" || die "cannot create LOCK_DIR ($LOCK_DIR); set it to another folder" 1
  printf '%s (since %s)\n' "${why//[[:cntrl:]]/ }" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >"$hold" \
    || die "cannot write $hold" 1
  echo "refreshes of $ALIAS are refused until --release, which deletes $hold; a running refresh continues"
}

delete_hold() {
  local was="was not held"
  [[ ! -e $hold && ! -L $hold ]] || was="is no longer held"
  rm -rf "$hold" || die "cannot delete $hold" 1
  echo "$ALIAS $was"
}

print_status() { # with max_age, fails unless a run has succeeded in that time
  "$PYTHON" -c 'import sys, opensearch_base_manager as base; base.print_status(*sys.argv[1:])' \
    "$LOG_DIR/last-$ALIAS.json" "$hold" "$lock" "$max_age"
}

refuse_if_held() { # an operator has stopped refreshes with --hold
  local reason=""
  [[ -e $hold || -L $hold ]] || return 0
  reason=$("$PYTHON" -c 'import sys, opensearch_base_manager as base
print(base.hold_reason(sys.argv[1]))' "$hold") || true
  die "held: ${reason:-no reason given}; to continue, delete $hold, or run this script with --release" 4
}

take_lock() { # the steps inherit the locks: no other refresh of these names starts while one of them is running
  local rc=0
  : >>"$lock" || die "cannot write to LOCK_DIR ($LOCK_DIR); set it to another folder" 1
  exec 9>>"$lock" 7>>"$LOCK_DIR/REFRESH-INDEX-$PRIMARY.lock" 6>>"$LOCK_DIR/REFRESH-INDEX-$SECONDARY.lock"
  "$PYTHON" -ISc 'import fcntl, sys, time
for file, code in (9, 75), (7, 76), (6, 76):
  for wait_s in 0.2, 0: # one retry: --status holds the lock for a moment
    try: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB); break
    except BlockingIOError: time.sleep(wait_s)
  else: sys.exit(code)' 2>&8 || rc=$? # not with flock(1): slim images lack it
  case $rc in
    0) ;;
    75) die "another refresh of $ALIAS is running on this host; wait for it to finish (see --status)" 75 ;;
    76) die "a refresh of another alias that uses $PRIMARY or $SECONDARY is running; wait for it to finish" 75 ;;
    *) die "cannot lock $lock (reason: above, or in $log_file); set LOCK_DIR to a folder on a local disk" 1 ;;
  esac
}

run_step() { # run_step NAME SCRIPT ARGUMENT...: a failing step ends the run with its exit code
  local step_began=$SECONDS rc=0 seconds documents
  step=$1
  shift
  say "==> $step"
  printf '$ %s\n' "$*" >>"$log_file"
  "$PYTHON" "$@" >"$result" 2>&8 8>&- &
  wait $! || rc=$?
  last_line=$(tail -n 1 "$log_file")
  sed "s/^/> /" "$result" >>"$log_file"
  seconds=$((SECONDS - step_began)) documents=$(value_of documents)
  journal+=("$step"$'\t'"$seconds"$'\t'"$rc"$'\t'"$(tail -n 1 "$result")")
  say "<== $step: exit $rc, $seconds s${documents:+, $documents documents}"
  if ((rc != 0)); then
    explain "$rc"
    exit "$rc"
  fi
}

explain() { # explain CODE: say why the step failed, unless its own message is on stderr already
  local error no_error='^(\$|[0-9TZ:-]* (DEBUG|INFO|WARNING)) '
  error=$(sed -n -e '/^\$ /{s/.*//;h;}' -e '/^[0-9TZ:-]* ERROR /h' -e '$!d;g;p' "$log_file") # of the last command
  message=${error:-$last_line}
  message=${message#* } # without the time
  if (($1 > 128)) && [[ $error != *": stopped by SIG"* ]]; then
    message="$step: killed by SIG$(kill -l "$1" || true)"
  elif [[ -z $error && $last_line =~ $no_error ]]; then
    message="$step: ended with exit code $1 and without an error message"
  elif [[ -n ${REFRESH_LOG_FILE:-} ]]; then
    return
  fi
  say "$message"
}

value_of() { # value_of NAME: print this value from the JSON result of the last step; nothing if it is missing
  grep -qF "\"$1\"" "$result" || return 0 # most checks have no such value: do not start Python
  "$PYTHON" -ISc 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1" <"$result" 2>/dev/null || true
}

# shellcheck disable=SC2329  # called by a trap
on_signal() { # on_signal NAME CODE: forward the signal; wait while the step restores settings and cancels its tasks
  local child
  trap '' HUP INT TERM
  for child in $(jobs -p); do
    kill -s "$1" "$child" 2>/dev/null || true
    sleep 0.1 # a step that is just starting may lose the first signal; `&` makes a child ignore INT
    kill -s TERM "$child" 2>/dev/null || true
    wait "$child" || true
  done
  message="stopped by SIG$1"
  say "$message"
  exit "$2"
}

# shellcheck disable=SC2329  # called by a trap
on_exit() {
  local rc=$?
  trap '' HUP INT TERM
  [[ -n $dry_run ]] || report "$rc" || true
  rm -f "$result"
  if ((rc == 0)); then
    say "finished in $SECONDS s"
  else
    say "FAILED at: $step (exit $rc) after $SECONDS s; log: $log_file" || true
  fi
}

# shellcheck disable=SC2329  # called by a trap
report() { # report CODE: write last-<alias>.json; print the closing table or, after a failure, where readers are
  local summary="" last="$LOG_DIR/last-$ALIAS.json"
  summary=$(printf '%s\n' "$1"$'\t'"$step"$'\t'"$message" ${journal[@]+"${journal[@]}"} \
    | "$PYTHON" -c 'import sys, opensearch_base_manager as base; base.report_run(*sys.argv[1:])' \
      "$last" "$ALIAS" "$began" 2>&8) || say "cannot write $last; --status still shows the previous run"
  if [[ -z $summary ]]; then
    return
  elif (($1 != 0)); then
    say "$summary"
  else
    printf '%s\n' "$summary" >>"$log_file"
    printf '%s\n' "$summary"
  fi
}

pause() {
  local delay=${setting[STEP_DELAY_SECONDS]}
  [[ $delay != 0 ]] || return 0
  sleep "$delay" 6>&- 7>&- 8>&- 9>&- & # closes the locks: if the runner is killed, sleep must not hold them any longer
  wait $!
}

check() { # step 0: everything that can be checked before readers are moved
  local to_load=$PRIMARY pair=(--source "$PRIMARY" --target "$SECONDARY") keep=()
  [[ ${setting[SKIP_UNCHANGED]} != true ]] || pair=() # the pair is checked below, unless nothing has changed
  run_step "check where readers are" switch_alias.py --alias "$ALIAS" --show ${pair[@]+"${pair[@]}"}
  live=$(<"$result")
  [[ -n $live ]] || die "cannot write to LOG_DIR ($LOG_DIR): ${last_line#* }; nothing was changed; free disk space" 1
  case "$live" in
    "$PRIMARY") idle=$SECONDARY ;;
    "$SECONDARY") idle=$PRIMARY ;;
    *) die "alias $ALIAS is on $live, not on $PRIMARY or $SECONDARY; nothing was changed; move it to one of them" 4 ;;
  esac
  both=(--source "$live" --target "$idle")
  [[ ${setting[REFRESH_STRATEGY]} != alternate ]] || to_load=$idle
  if [[ ${setting[SKIP_UNCHANGED]} == true ]]; then
    [[ $to_load == "$live" ]] || keep=(--no-cleanup) # this run will not empty the live index
    run_step "check what has changed" bulkupdate.py "${load[@]}" --index "$live" --dry-run ${keep[@]+"${keep[@]}"}
    if [[ $(value_of unchanged) == True ]]; then
      say "nothing has changed since $live was loaded: nothing to do"
      exit 0
    fi
    run_step "check the switch" switch_alias.py --alias "$ALIAS" --show --source "$PRIMARY" --target "$SECONDARY"
  fi
  load+=(--index "$to_load")
  if [[ ${setting[SKIP_UNCHANGED]} != true || $to_load != "$live" ]]; then # otherwise this check has just run
    run_step "check the load" bulkupdate.py "${load[@]}" --dry-run
  fi
  [[ ${setting[REFRESH_STRATEGY]} == copy-back ]] || return 0
  if [[ $live == "$PRIMARY" ]]; then
    run_step "check the copy" reindex.py "${both[@]}" --dry-run
  else
    say "readers are on $SECONDARY already, for example before the first load, or after a failed run or manual switch."
    say "A refresh then starts with step 3 and moves readers to $PRIMARY; to prevent that, stop it and use --hold."
  fi
}

copy_back() {
  if [[ $live == "$PRIMARY" ]]; then
    run_step "1 copy $PRIMARY to $SECONDARY" reindex.py "${both[@]}"
    pause
    # the copy must be equal to its source; readers already use these data, so MIN_DOCUMENTS does not apply
    run_step "2 switch readers to $SECONDARY" switch_alias.py --alias "$ALIAS" "${both[@]}" \
      --threshold 0 --field-threshold 0 --min-documents 0
    pause
  fi
  run_step "3 load $PRIMARY from S3" bulkupdate.py "${load[@]}"
  pause
  # readers return to the index that they normally use: its settings need no check
  run_step "4 switch readers to $PRIMARY" switch_alias.py --alias "$ALIAS" --source "$SECONDARY" --target "$PRIMARY" \
    --accept-settings '*'
}

alternate() {
  run_step "1 load $idle from S3" bulkupdate.py "${load[@]}"
  pause
  run_step "2 switch readers to $idle" switch_alias.py --alias "$ALIAS" "${both[@]}"
}

refresh() {
  local live idle both load
  [[ ${setting[S3_PREFIX]} != '*' ]] || setting[S3_PREFIX]="" # an empty prefix is the whole bucket
  load=(--bucket "${setting[S3_BUCKET]}" --prefix="${setting[S3_PREFIX]}" --batch-size "${setting[BATCH_SIZE]}")
  open_log
  open_step_log
  trap on_exit EXIT
  trap '' PIPE # a closed terminal or `head` must not stop a refresh
  trap 'on_signal HUP 129' HUP
  trap 'on_signal INT 130' INT
  trap 'on_signal TERM 143' TERM
  refuse_if_held
  take_lock
  check
  if [[ -n $dry_run ]]; then
    say "dry run: all checks of step 0 passed, nothing was changed"
    exit 0
  fi
  if [[ ${setting[REFRESH_STRATEGY]} == alternate ]]; then alternate; else copy_back; fi
}

main() {
  true >&2 || exec 2>/dev/null # started with 2>&-
  parse_arguments "$@"
  choose_python
  read_settings
  case $command in
    hold) write_hold ;;
    release) delete_hold ;;
    status) print_status ;;
    *) refresh ;;
  esac
  exit 0 # before bash reads on: an update may have changed this file since the start
}

main "$@"
