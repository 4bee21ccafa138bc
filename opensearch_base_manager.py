"""Code that the scripts of the refresh suite share, in three layers; each can be read on its own.

    this process    settings, log, progress, retries, signals, exit codes
    one request     AWS clients and signatures, `Connection`: one request to the cluster, retried where that is safe
    the cluster     `OpenSearchBaseManager`: indices, counts, aliases, locks, markers, tasks

Each script subclasses `OpenSearchBaseManager` once and passes that class to `run_cli`. Failures and their exit codes:

    OperationFailed (1)          the operation failed
    +-- RequestFailed (1)        the cluster rejected a request: status, error type and reason
    |   +-- OutcomeUnknown (1)   no response: the request may or may not have taken effect
    +-- BatchTooLarge (1)        the cluster has too little memory for the batches of a task
    +-- ConfigurationError (2)   a flag, a variable or the AWS setup is wrong; nothing was changed
    +-- TooManyRejects (3)       finished, but more documents were rejected than MAX_REJECTS allows
    +-- Refused (4)              a safety check failed, as a rule before anything was changed
    +-- Locked (75)              another run holds the lock
    Interrupted (128 + signal)   a BaseException, so that no `except Exception` catches it
"""

from __future__ import annotations

import argparse
import atexit
import base64
import calendar
import contextlib
import csv
import fcntl
import gc
import itertools
import io
import json
import logging
import math
import os
import random
import re
import shlex
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import timedelta
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

try:
    import requests
    import urllib3
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream
    from requests.adapters import HTTPAdapter
    from requests.auth import AuthBase
    from urllib3.util.ssl_ import create_urllib3_context
except ImportError as missing:
    required = Path(__file__).resolve().with_name("requirements.txt")
    command = shlex.join([sys.executable, "-m", "pip", "install", "-r", str(required)])
    with open(os.environ.get("REFRESH_LOG_FILE") or os.devnull, "a") as log_file:
        for file in (sys.stderr, log_file):
            print(f"{missing.name} is not installed; run {command}", file=file)
    raise SystemExit(2) from None

SUITE = "opensearch-refresh"  # in the X-Opaque-Id of each request, and the key of the marker
HERE = Path(__file__).resolve().parent
ENV_FILE = HERE / ".env"
ENV_NAME = re.compile(r"(?!AWS_|.*_PROXY$)[A-Z][A-Z0-9_]{,40}")  # neither a variable of boto3 nor part of a secret
AWS_SECRETS = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]
CREDENTIALS = ["OPENSEARCH_ENDPOINT", "OPENSEARCH_USERNAME", "OPENSEARCH_PASSWORD"]
HOST = socket.gethostname()
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 120  # the slowest response is that of a _refresh of a large index
FIRST_CONTACT_S = 10  # a wrong endpoint fails fast; RETRY_SECONDS is for a cluster that has responded before
CLEANUP_S = 18  # after a signal; by default, Kubernetes sends SIGKILL 30 s after SIGTERM, systemd after 90 s
CLEANUP_GRACE_S = 2  # after this additional time, the process is ended
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30
RETRY_AFTER_MAX_S = 60  # some proxies ask for an hour
BURST_S = 0.1  # a throttled batch holds the documents of this time; longer would be bursty
POLL_FIRST_S, POLL_MAX_S = 0.1, 1.5  # short tasks are noticed soon, long ones are polled rarely
PROGRESS_EVERY_S = 30  # in a log file
PROGRESS_TTY_S = 0.2  # on a terminal
PROBES_AT_ONCE = 8
MEMORY_ERRORS = re.compile(r"rejected_execution|circuit_breaking")  # of a task whose batches are too large
OLDEST_VERSION = (1, 3)
DEFAULT_WINDOW = 10_000  # index.max_result_window: maximum documents per search or scroll batch
MAX_CONNECTIONS = 64  # opened on demand; limits the bulk requests in flight
GC_THRESHOLD = 50_000  # new objects per collection; AWS service models are many small objects, no garbage: saves 40 ms
HOLD_BYTES = 1000  # maximum that is read from a HOLD file; more would fill the log
# in a message about a failed step: another client has been at work, so it is unknown where readers are
NOT_AS_EXPECTED = re.compile(r"alias \S+ (points at|does not exist)|index \S+ does not exist|changed during the copy")
TIME_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

log = logging.getLogger(SUITE)
Manager = TypeVar("Manager", bound="OpenSearchBaseManager")
Item = TypeVar("Item")
Result = TypeVar("Result")


class OperationFailed(Exception):
    """The operation failed; if there is a `result`, it is printed like that of a success."""

    exit_code = 1

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result


class RequestFailed(OperationFailed):
    """A request failed: it was rejected or not sent, or got no usable response.

    `status` is 0 if there was no response; if `without_effect` is true (as for 429), the request had none.
    """

    def __init__(
        self, message: str, status: int = 0, kind: str = "", reason: str = "", *, without_effect: bool = False,
        retry_after: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.kind, self.reason = status, kind, reason
        self.without_effect, self.retry_after = without_effect, retry_after

    def is_transient(self) -> bool:
        """Return whether a retry may succeed; a block (flood stage) also causes a 429, but does not go away soon."""
        return self.status == 429 and "block" not in self.kind


class OutcomeUnknown(RequestFailed):
    """No response, or 502 to 504. Unless `without_effect`, the request may have taken effect: read the state first."""

    def is_transient(self) -> bool:
        return True


class BatchTooLarge(OperationFailed):
    """The cluster has too little memory for the batches of a task; smaller ones may fit."""


class ConfigurationError(OperationFailed):
    exit_code = 2


class TooManyRejects(OperationFailed):
    exit_code = 3


class Refused(OperationFailed):
    exit_code = 4


class Locked(OperationFailed):
    exit_code = 75


class Interrupted(BaseException):
    """SIGHUP, SIGINT or SIGTERM arrived; raised in the main thread so that every `finally` runs."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


# --- this process: settings -------------------------------------------------------------------------------------------


def matching(pattern: str, otherwise: str) -> Callable[[str], str]:
    """Return a parser that accepts only text of this pattern; the error is `<text> is <otherwise>`."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is {otherwise}")
        return text

    return parse


def either(*allowed: str) -> Callable[[str], str]:
    return matching("|".join(allowed), f"neither {' nor '.join(allowed)}")


def percent(text: str) -> Decimal:
    """Parse a number >= 0 exactly: a float cannot represent 0.1."""
    number = r"\s*[+]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]{1,4})?\s*"
    return Decimal(matching(number, "not a number >= 0")(text))


def non_negative(text: str) -> float:
    return float(percent(text))


def whole_number(text: str) -> int:
    return int(matching("[0-9]+", "not a whole number >= 0")(text))


def positive_int(text: str) -> int:
    if (value := whole_number(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def boolean(text: str) -> bool:
    return matching("true|1|yes|false|0|no", "neither true nor false")(text.lower()) in ("true", "1", "yes")


one_line = matching(".*", "more than one line; remove the line breaks")  # the runner reads one line per setting
# no pattern, list or date math: they would match other indices
index_name = matching(r"(?!\.{1,2}$)[^-_+A-Z\s\\/*?\"<>|,#:%][^A-Z\s\\/*?\"<>|,#:%]*",
                      "not an index name (lower case, no pattern, no list)")  # fmt: skip
alias_name = matching(r"(?!\.{1,2}$)[^-_+\s\\/*?\"<>|,#:%][^\s\\/*?\"<>|,#:%]*",
                      "not the name of an alias (no pattern, no list)")  # fmt: skip
bucket_name = matching("[^:/\n]*", "not a bucket name; give the name alone, without s3:// and slashes")
# part of the X-Opaque-Id, in which slashes separate the parts
host_name = matching("[A-Za-z0-9._-]{1,100}", "not a host name (letters, digits, dots, hyphens, underscores)")


def one_character(text: str) -> str:
    return matching('[^"\r\n]', "not a single character (\\t for a tab)")("\t" if text == r"\t" else text)


def field_names(text: str) -> list[str]:
    """Parse a line of CSV: `a,"b,c"` are two names."""
    try:
        return next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list: {error}") from None


def own_folder(text: str) -> Path:
    """Return a folder; relative paths are relative to the scripts, since cron may start them in any directory."""
    return HERE / one_line(text)


def ca_file(text: str) -> str:
    """Return the path of a file, looked up in the working directory, then beside the scripts."""
    for path in Path(text), HERE / text:
        if path.is_file():
            return str(path)
    raise argparse.ArgumentTypeError(f"{text} is not a file; give the path of a file with CA certificates")


def log_level(text: str) -> str:
    return either("DEBUG", "INFO", "WARNING", "ERROR")(text.upper())


class Rate:
    """The limit of REQUESTS_PER_SECOND, in documents per second (0: unlimited); `wait` is not thread-safe."""

    def __init__(self, per_second: float = 0) -> None:
        self.per_second, self._free_at = per_second, 0.0

    @classmethod
    def parse(cls, text: str) -> Rate:
        return cls(non_negative(text))

    def batch_size(self, most: int) -> int:
        """Return the documents per bulk request, or per batch of a task (of each slice; fixed once it has started)."""
        return max(1, int(min(most, self.per_second * BURST_S))) if self.per_second else most

    def task_params(self) -> dict[str, float]:
        """Return the parameter for the start of a server-side task; the server keeps to it until the task ends."""
        return {"requests_per_second": self.per_second} if self.per_second else {}

    def wait(self, documents: int) -> None:
        """Sleep until the limit allows the next batch, which has this many documents."""
        if self.per_second:
            time.sleep(max(0, self._free_at - time.monotonic()))
            self._free_at = max(self._free_at, time.monotonic()) + documents / self.per_second


@dataclass(frozen=True)
class Setting:
    """One setting: the flag overrides the variable, which overrides the default; `parse` converts the text.

    A flag with the parser `boolean` takes no value. Without a default, the value of an unset setting is None.
    """

    variable: str
    flag: str
    default: str
    parse: Callable[[str], Any]
    help: str

    @property
    def name(self) -> str:
        """Return the attribute's name: `max_rejects` for MAX_REJECTS, `batch_size` for --batch-size."""
        return (self.variable or self.flag.lstrip("-")).replace("-", "_").lower()

    def given(self) -> str | None:
        """Return the text of the variable, else the default, else None; without a default, its `none` means unset."""
        text = os.environ.get(self.variable)
        return self.default or None if not text or (text == "none" and not self.default) else text

    def value(self) -> Any:
        """Return the parsed value of the variable or the default, not of the flag. Raises ConfigurationError."""
        text = self.given()
        try:
            return None if text is None else self.parse(text)
        except argparse.ArgumentTypeError as error:
            raise ConfigurationError(f"{self.variable}: {error}") from None

    def add_flag(self, parser: argparse.ArgumentParser) -> None:
        """Add the flag to the parser, without a default: if the flag is not given, `resolve` sets the value."""
        default = self.default if self.parse is not boolean else ""
        sources = [f"default: {default}"] * bool(default) + [f"env: {self.variable}"] * bool(self.variable)
        kind: dict[str, Any] = {"action": "store_true"} if self.parse is boolean else {"type": self.parse}
        if self.parse is field_names:
            kind["action"] = "extend"
        text = f"{self.help} ({'; '.join(sources)})" if sources else self.help
        parser.add_argument(self.flag, dest=self.name, default=argparse.SUPPRESS, help=text, **kind)


# Each setting has a row here, and an entry in the README and (variables) in .env.example. Not here: credentials, since
# these values may be logged; --index and the like, which each script defines; PYTHON and the runner's own flags.
# columns: variable, flag, default, parser, help
WAIT_SECONDS = Setting("WAIT_SECONDS", "", "900", non_negative, "seconds to wait for shard copies and running tasks")
CLEANUP_METHOD = Setting("CLEANUP_METHOD", "", "delete", either("delete", "recreate"),
                         "delete the documents, or recreate the index (faster, frees the disk space at once)")
COPY_METHOD = Setting("COPY_METHOD", "--copy-method", "reindex", either("reindex", "clone"),
                      "reindex the documents, or clone the source (takes a second and no disk space)")
REQUESTS_PER_SECOND = Setting("REQUESTS_PER_SECOND", "--requests-per-second", "0", Rate.parse,
                              "maximum documents per second for copies, loads and deletions (0: unlimited)")
LOAD_WITHOUT_REPLICAS = Setting("LOAD_WITHOUT_REPLICAS", "--no-replicas", "false", boolean,
                                "load without replicas: faster, but with only one copy of the data until the load ends")
SKIP_UNCHANGED = Setting("SKIP_UNCHANGED", "", "false", boolean, "do nothing if the live index holds the data in S3")
REFRESH_STRATEGY = Setting("REFRESH_STRATEGY", "", "copy-back", either("copy-back", "alternate"), "index to load")
INDEX_ALIAS = Setting("INDEX_ALIAS", "", "my_index_alias", one_line, "alias that readers use")
READER_QUERIES = Setting("READER_QUERIES", "--queries", "", one_line,
                         "file of search bodies, one per line, to run on both indices (with --show: on the live one)")
LOG_DIR = Setting("LOG_DIR", "", "logs", own_folder, "run logs and rejects files")
LOCK_DIR = Setting("LOCK_DIR", "", ".locks", own_folder, "lock files")
ALL_SCRIPTS = [
    Setting("AWS_REGION", "", "", str, "AWS region of Parameter Store and S3"),
    Setting("OPENSEARCH_PARAMETER_PREFIX", "", "/opensearch", str, "prefix of the credentials in Parameter Store"),
    Setting("OPENSEARCH_AUTH", "", "basic", either("basic", "sigv4"), "how requests are authenticated"),
    Setting("VERIFY_SSL", "", "false", boolean, "verify the certificate"),
    Setting("CA_BUNDLE", "", "", ca_file, "CA certificates to verify it with"),
    Setting("RETRY_SECONDS", "", "300", non_negative, "seconds to retry one request"),
    Setting("RUN_HOST", "", "", host_name, "stable name of this runner, used to recognize its own orphaned tasks"),
    Setting("LOG_LEVEL", "", "INFO", log_level, "minimum level of log messages"),
    LOG_DIR,
    LOCK_DIR,
    Setting("", "--dry-run", "false", boolean, "run all checks, change nothing"),
]  # fmt: skip
SETTINGS: dict[str, list[Setting]] = {
    "reindex": [*ALL_SCRIPTS, WAIT_SECONDS, COPY_METHOD, CLEANUP_METHOD, REQUESTS_PER_SECOND, LOAD_WITHOUT_REPLICAS],
    "switch_alias": [
        *ALL_SCRIPTS,
        Setting("DOCUMENT_COUNT_THRESHOLD", "--threshold", "10", percent,
                "maximum difference between the document counts, in percent of the source"),
        Setting("FIELD_THRESHOLD", "--field-threshold", "10", percent,
                "maximum drop, in percentage points, of the share of documents that have a field; 100: check none"),
        Setting("MIN_DOCUMENTS", "--min-documents", "", whole_number, "never switch to an index with fewer documents"),
        Setting("ACCEPT_FIELDS", "--accept-fields", "", field_names,
                'comma-separated fields not to check (with their multi-fields), quoted as in CSV: a,"b,c"'),
        Setting("ACCEPT_SETTINGS", "--accept-settings", "", field_names,
                "comma-separated index settings not to check, * for all"),
        READER_QUERIES, REFRESH_STRATEGY, replace(COPY_METHOD, flag=""),
        Setting("DISK_CHECK", "", "true", boolean, "refuse a refresh if the data nodes have too little disk space"),
        replace(WAIT_SECONDS, flag="--wait-seconds"),
        Setting("", "--undo", "false", boolean, "move readers back without checking counts, fields or queries"),
        Setting("", "--show", "false", boolean, "print the live index; with --source and --target, also check both"),
    ],
    "bulkupdate": [
        *ALL_SCRIPTS, WAIT_SECONDS, CLEANUP_METHOD, REQUESTS_PER_SECOND, LOAD_WITHOUT_REPLICAS, SKIP_UNCHANGED,
        replace(INDEX_ALIAS, default=""), REFRESH_STRATEGY,
        Setting("", "--batch-size", "5000", positive_int, "documents per request"),
        Setting("", "--workers", "", positive_int, "bulk requests in flight (default: adjusted while loading)"),
        Setting("ID_COLUMN", "--id-column", "", str, "column of document ids; of rows with equal ids, the last wins"),
        Setting("DELIMITER", "--delimiter", ",", one_character, "character that separates cells"),
        Setting("MAX_REJECTS", "--max-rejects", "0", whole_number, "maximum number of rejected rows"),
        Setting("MAX_AGE_HOURS", "--max-age-hours", "", non_negative, "maximum age of the newest object, in hours"),
        Setting("READY_OBJECT", "--ready-object", "", str,
                "object under the prefix that must exist, no older than the files; if a manifest, it must match them"),
        Setting("EXPECTED_ROWS", "--expected-rows", "", whole_number,
                "number of rows that the load must read, even if a manifest differs (0: any number)"),
        Setting("", "--no-cleanup", "false", boolean, "add documents to the index, replacing those with the same id"),
    ],
    "index_cleanup": [
        *ALL_SCRIPTS, WAIT_SECONDS, replace(CLEANUP_METHOD, flag="--method"), REQUESTS_PER_SECOND,
        Setting("", "--no-force-merge", "false", boolean,
                "do not free the disk space (saves half a minute); for an index that will be filled right away"),
    ],
    "run_refresh": [
        LOG_DIR, LOCK_DIR, READER_QUERIES, SKIP_UNCHANGED,
        Setting("PRIMARY_INDEX", "", "my_index_primary", one_line, "index that readers use"),
        Setting("SECONDARY_INDEX", "", "my_index_secondary", one_line, "standby index"),
        INDEX_ALIAS,
        Setting("S3_BUCKET", "", "your-bucket", bucket_name, "bucket of the CSV files"),
        Setting("S3_PREFIX", "", "your/prefix/", one_line, "prefix of their keys"),
        Setting("BATCH_SIZE", "", "1000", positive_int, "documents per request"),
        Setting("STEP_DELAY_SECONDS", "", "5", non_negative, "seconds to pause between steps"),
        REFRESH_STRATEGY,
    ],
}  # fmt: skip


def load_env_file() -> list[str]:
    """Add variables from .env that are unset or empty in the environment; return unknown names and unreadable lines.

    Raises ConfigurationError if the file cannot be read.
    """
    try:
        text = ENV_FILE.read_text("utf-8-sig")  # python-dotenv before 1.2.4 loses the first variable after a BOM
        values = dotenv_values(stream=io.StringIO(text), interpolate=False)  # a password may contain a dollar sign
        for name, value in values.items():
            if value is not None and not os.environ.get(name):
                os.environ[name] = value
    except (FileNotFoundError, IsADirectoryError):  # a virtual environment may have this name
        return []
    except (OSError, ValueError) as error:
        reason = type(error).__name__
        raise ConfigurationError(f"cannot read {ENV_FILE}: {reason}; grant access to it, or save it as UTF-8") from None
    known = {*CREDENTIALS, *(setting.variable for rows in SETTINGS.values() for setting in rows)}
    unknown = [name for name, value in values.items() if value and ENV_NAME.fullmatch(name) and name not in known]
    return [*unknown, *(f"line {line.original.line}" for line in parse_stream(io.StringIO(text)) if line.error)]


def add_settings(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of a script's settings and return the parser; its `prog` is the file name of the script."""
    for setting in SETTINGS[parser.prog.removesuffix(".py")]:
        if setting.flag:
            setting.add_flag(parser)
    return parser


def resolve(script: str, args: argparse.Namespace) -> argparse.Namespace:
    """Add the settings that were not given as flags. Raises ConfigurationError."""
    for setting in SETTINGS[script]:
        if not hasattr(args, setting.name):
            setattr(args, setting.name, setting.value())
    return args


def print_settings(script: str) -> None:
    """Print the settings of the runner, one `NAME=text` per line; exit with a message at the first invalid one.

    Folders are absolute paths; boolean values are `true` or `false`.
    """
    try:
        load_env_file()
        if os.environ.get("S3_PREFIX") == "":
            raise ConfigurationError("S3_PREFIX is empty; give a prefix, or '*' for the whole bucket")
        for setting in SETTINGS[script]:
            value, text = setting.value(), setting.given() or ""
            if setting.parse is own_folder:
                text = str(value)
            elif setting.parse is boolean:
                text = str(value).lower()
            elif isinstance(value, float):
                text = f"{value:.15g}"  # without spaces around it
            os.write(1, os.fsencode(f"{setting.variable}={text}\n"))  # the same bytes as in the environment
    except ConfigurationError as error:
        raise SystemExit(str(error)) from None


# --- this process: log and progress -----------------------------------------------------------------------------------


class LogFormatter(logging.Formatter):
    """One line per message, in UTC; control characters are escaped (not in tracebacks): no cell can forge a line."""

    converter = staticmethod(time.gmtime)
    CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

    def __init__(self, script: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {script}: %(message)s", TIME_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = self.CONTROL.sub(lambda match: repr(match[0])[1:-1], record.message)
        return super().formatMessage(record)


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]  # has no [] before Python 3.11
    """Log to stderr; on a terminal, clear the progress line first, and skip progress, which `Progress` shows itself."""

    def format(self, record: logging.LogRecord) -> str:
        return ("\r\x1b[K" if self.stream.isatty() else "") + super().format(record)

    def filter(self, record: logging.LogRecord) -> Any:
        return not (hasattr(record, "progress") and self.stream.isatty())


def set_up_logging(script: str) -> None:
    """Log to stderr, and to REFRESH_LOG_FILE, which the runner sets if stderr is not its log file.

    Messages of botocore and urllib3 are not logged: they could contain secrets.
    """
    logging.raiseExceptions = False  # a closed stderr or a full disk must not stop a load
    log.handlers[:] = [LogHandler(sys.stderr)]
    if path := os.environ.get("REFRESH_LOG_FILE"):
        with contextlib.suppress(OSError):
            log.addHandler(logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"))
    for handler in log.handlers:
        handler.setFormatter(LogFormatter(script))
    log.propagate = False
    log.setLevel("INFO")  # until LOG_LEVEL has been parsed


def shell_command(*words: str, **variables: str) -> str:
    """Return a command line for bash, with assignments in front.

    The log escapes control characters, so words that contain any (column names from spreadsheets) are quoted as $'...'.
    """

    def quoted(word: str) -> str:
        if LogFormatter.CONTROL.search(word):
            return "$'" + re.sub(r"[\\']", r"\\\g<0>", word) + "'"
        return shlex.quote(word)

    assignments = [f"{name}={quoted(value)}" for name, value in variables.items()]
    return " ".join([*assignments, *map(quoted, words)])


def script_command(script: str, *arguments: str) -> str:
    """Return the command that runs a script of the suite from any directory, with the interpreter of this process."""
    return shell_command(sys.executable, str(HERE / script), *arguments)


def seconds_since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def per_second(count: float, began: float) -> int:
    return round(count / max(time.monotonic() - began, 0.001))


class Progress:
    """A line that is updated in place on a terminal; elsewhere, a log line every 30 s."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.began = self.redrawn = self.logged = time.monotonic()

    def update(self, done: int, remark: str = "") -> None:
        now = time.monotonic()
        if now - self.redrawn >= PROGRESS_TTY_S:
            self.redrawn = now
            self._redraw(self._line(done, remark, now))
        if now - self.logged >= PROGRESS_EVERY_S:
            self.logged = now
            log.info("%s", self._line(done, remark, now), extra={"progress": True})

    def close(self) -> None:
        self._redraw("")

    def _redraw(self, line: str) -> None:
        """Replace the progress line if stderr is a terminal and the process is in its foreground."""
        with contextlib.suppress(OSError):
            terminal = sys.stderr.fileno()
            if os.tcgetpgrp(terminal) == os.getpgrp():
                width = (os.get_terminal_size(terminal).columns or 80) - 1
                sys.stderr.write(f"\r\x1b[K{line[:width]}")
                sys.stderr.flush()

    def _line(self, done: int, remark: str, now: float) -> str:
        """Return the progress line, most important values first: a narrow terminal cuts off the rest."""
        rate = done / max(now - self.began, 0.001)
        share = f"{done * 100 // self.total} %, " if self.total else ""
        left = f"{timedelta(seconds=round(max(self.total - done, 0) / rate))} left, " if self.total and rate else ""
        of_all = f" of {self.total:,}" if self.total else ""
        return f"{self.label}: {share}{left}{done:,}{of_all} {self.unit}, {rate:,.0f}/s{remark and ', ' + remark}"


# --- this process: signals and retries --------------------------------------------------------------------------------

interrupted = threading.Event()  # set by the first signal; only clean-up follows, for at most CLEANUP_S
_cleanup_deadline = math.inf


def _on_signal(number: int, _frame: object) -> None:
    global _cleanup_deadline
    if not interrupted.is_set():  # a second signal must not interrupt the clean-up
        _cleanup_deadline = time.monotonic() + CLEANUP_S
        interrupted.set()
        # the alarm: an exception in `Condition.__enter__` leaves its lock held, and the clean-up could wait for ever
        signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
        signal.alarm(CLEANUP_S + CLEANUP_GRACE_S)
        raise Interrupted(number)


def run_to_completion(action: Callable[[], None]) -> None:
    """Run a clean-up after a failure; if a signal interrupts it, run it again, then raise Interrupted."""
    try:
        action()
    except Interrupted:
        action()
        raise


def in_background(call: Callable[[], Result]) -> Future[Result]:
    """Start a call in a daemon thread: with ThreadPoolExecutor, a hung read would keep the process alive."""
    future = Future[Result]()

    def carry_out() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=carry_out, daemon=True).start()
    return future


def in_parallel(call: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> list[Result]:
    """Apply `call` to the items, `at_once` at a time; return the results in order. A signal ends the wait at once."""
    waiting, results = iter([*enumerate(items)]), dict[int, Result]()

    def work() -> None:
        for number, item in waiting:  # all threads share this iterator
            results[number] = call(item)

    try:
        for worker in [in_background(work) for _ in range(at_once)]:
            worker.result()
    finally:
        list(waiting)  # once a failure or a signal has ended the wait, threads get no further items
    return [results[number] for number in sorted(results)]


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Turn SIGHUP, SIGINT and SIGTERM into `Interrupted`; under nohup, SIGHUP stays ignored."""
    interrupted.clear()
    caught = [signal.SIGINT, signal.SIGTERM]  # SIGINT even if a shell's `&` ignores it
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    before = {number: signal.signal(number, _on_signal) for number in caught}
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def backoff_s(attempt: int, retry_after: str | None = None) -> float:
    """Return the seconds until the next attempt: exponential with jitter, or a longer `Retry-After`; both capped."""
    delay: float = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(attempt, 10)) * random.uniform(0.5, 1)
    if retry_after:
        with contextlib.suppress(urllib3.exceptions.InvalidHeader):
            asked = urllib3.Retry().parse_retry_after(retry_after)  # seconds or a date
            delay = max(delay, min(float(asked), RETRY_AFTER_MAX_S))
    return delay


class Retry:
    """Decides whether to retry, and waits before the next attempt.

    Retries end `limit_s` seconds after the first attempt or the last progress; after a signal, when clean-up must end.
    The last attempt may begin right before this deadline, and exceed it by its own timeout.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.restart()

    def restart(self) -> None:
        """Restart the time limit and the count of attempts; call this after progress."""
        self.began, self.attempt = time.monotonic(), 0

    def seconds_left(self) -> float:
        deadline = _cleanup_deadline if interrupted.is_set() else self.began + self.limit_s
        return deadline - time.monotonic()

    def wait(self, why: str, retry_after: str | None = None) -> bool:
        """Log why, sleep and return True; return False at once if the pause would be longer than the time left."""
        delay = backoff_s(self.attempt, retry_after)
        if delay > self.seconds_left():
            return False
        self.attempt += 1
        log.warning("%s (in %.1f s)", why, delay)
        time.sleep(delay)
        return True


# --- this process: the command line -----------------------------------------------------------------------------------


def print_result(result: Mapping[str, Any] | str | None) -> None:
    """Print the only line of stdout: the result as JSON, or plain text. A closed stdout is not a failure."""
    if result is None:
        return
    try:
        print(result if isinstance(result, str) else json.dumps(result), flush=True)
    except OSError as error:
        log.warning("cannot write the result to stdout: %s", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains again at exit


def print_error(text: str) -> None:
    """Print an error before logging is set up, also to the runner's log file."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
    with contextlib.suppress(OSError), open(os.environ.get("REFRESH_LOG_FILE") or os.devnull, "a") as log_file:
        log_file.write(text)


def discard_unwritable_stderr() -> None:
    """Redirect stderr to /dev/null if it cannot be written: otherwise the interpreter exits with 120."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def run_cli(
    build_parser: Callable[[], argparse.ArgumentParser], manager_class: type[OpenSearchBaseManager],
    argv: Sequence[str] | None = None,
) -> int:  # fmt: skip
    """Parse the command line, run the script's manager, print its result and return the exit code."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  # started with 2>&-
    parser, usage = build_parser(), io.StringIO()
    try:
        with contextlib.redirect_stderr(usage):
            args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed usage or help
        print_error(usage.getvalue())
        return int(stop.code or 0)
    gc.set_threshold(GC_THRESHOLD)
    atexit.register(discard_unwritable_stderr)
    atexit.register(gc.freeze)  # or Python checks all objects for garbage at exit: 90 ms
    script = parser.prog.removesuffix(".py")
    set_up_logging(script)
    try:
        with signals_as_exceptions():
            unknown = load_env_file()
            settings = resolve(script, args)
            log.setLevel(settings.log_level)
            if unknown:
                log.warning("%s: these entries are not settings and are ignored: %s; check the spelling and the quotes",
                            ENV_FILE, ", ".join(unknown))  # fmt: skip
            with manager_class(settings) as manager:
                result = manager.run()
    except (Exception, Interrupted) as error:
        return log_failure(error)
    print_result(result)
    return 0


def log_failure(error: BaseException) -> int:
    """Log why a command failed, print its result if there is one, and return the exit code."""
    if isinstance(error, OperationFailed):
        log.error("%s", error)
        print_result(error.result)
        return error.exit_code
    if isinstance(error, Interrupted):
        log.error("stopped by %s", error)
        return error.exit_code
    if isinstance(error, ModuleNotFoundError):
        command = shell_command(sys.executable, "-m", "pip", "install", "-r", str(HERE / "requirements.txt"))
        log.error("%s is not installed; run %s", error.name, command)
        return 2
    place = traceback.extract_tb(error.__traceback__)[-1]
    log.error("unexpected %s at %s:%s; run with LOG_LEVEL=DEBUG to see the traceback",
              type(error).__name__, Path(place.filename).name, place.lineno)  # fmt: skip
    log.debug("traceback", exc_info=error)
    return 1


# --- this process: the report of a run --------------------------------------------------------------------------------


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; return an empty one for any other text."""
    with contextlib.suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    return {}


class StepResult(NamedTuple):
    """A finished step of the runner: `printed` is its line on stdout, `result` that line as JSON."""

    name: str
    seconds: int
    exit_code: int
    printed: str
    result: dict[str, Any]

    @classmethod
    def parse(cls, line: str) -> StepResult:
        name, seconds, exit_code, printed = line.split("\t", 3)
        return cls(name, int(seconds), int(exit_code), printed, json_object(printed))


def live_state(steps: Sequence[StepResult]) -> tuple[str | None, int | None, float | None]:
    """Return the index that readers use after these steps, its document count, and the age of its data in hours.

    A value is None if it cannot be determined from these steps.
    """
    live, documents, age, loaded = None, None, None, None
    for step in (step for step in steps if step.exit_code == 0 or step.result.get("changed")):
        result = step.result
        if re.match(r"\d switch ", step.name):
            live, documents = None, None  # unless its result says more: the disk may be full
        if step.name == "check where readers are":
            live = step.printed
        elif "changed" in result:  # a switch
            live, documents = result["target"], result["documents"]
            age = loaded if result["changed"] and loaded is not None else age
        elif "read" in result:  # a load
            loaded = result["newest_object_age_hours"]
        elif result.get("unchanged"):
            documents, age = result["documents"], result["newest_object_age_hours"]
        elif "source" in result:  # a copy
            documents = result.get("documents", documents)
    return live, documents, age


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically. Raises SystemExit if it cannot be written."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        new.write_text(text)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise SystemExit(f"cannot write {path}: {error.strerror}") from None


def print_closing_table(steps: Sequence[StepResult], seconds: int) -> None:
    print(f"{'step':<50} {'seconds':>8} {'documents':>12}")
    for step in steps:
        print(f"{step.name:<50} {step.seconds:>8} {step.result.get('documents', '-'):>12}")
    print(f"{'checks and pauses':<50} {seconds - sum(step.seconds for step in steps):>8}")
    print(f"{'total':<50} {seconds:>8}")


def utc(moment: float) -> str:
    return time.strftime(TIME_FORMAT, time.gmtime(moment))


def report_run(file: str, alias: str, began: str) -> None:
    """Write the report of a refresh for monitors, and print its summary.

    stdin is tab-separated: exit code, last step and message in the first line, then one line per finished step.
    After a success, the summary is the closing table; after a failure, it says where readers are.
    """
    ending, *lines = sys.stdin.buffer.read().decode(errors="replace").rstrip("\n").split("\n")
    exit_code, last_step, message = ending.split("\t", 2)
    steps, path = [StepResult.parse(line) for line in lines], Path(file)
    previous = read_report(path)
    if exit_code == "75" and not steps and str(previous.get("ended", "")) >= utc(int(began)):
        return  # the run that held the lock has reported in the meantime
    end = end_of_run(int(exit_code), last_step, message, steps, previous)
    report = {"alias": alias, "began": utc(int(began)), **end}
    if exit_code == "0" and (done := [step for step in steps if not step.name.startswith("check")]):
        print_closing_table(done, int(time.time()) - int(began))
    elif exit_code != "0" and (steps or exit_code != "75"):
        print(readers_after_failure(report))
    replace_file(path, json.dumps(report) + "\n")


def read_report(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError):
        return json_object(path.read_text(errors="replace"))
    return {}


def end_of_run(
    exit_code: int, last_step: str, message: str, steps: Sequence[StepResult], previous: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the entries of the report that describe how the run ended and where readers are."""
    failed, now = exit_code != 0, time.time()
    live, documents, age = live_state(steps)
    finished = [step.name for step in steps if step.exit_code in (0, 4) or step.result.get("changed")]
    switching = re.match(r"\d switch ", last_step) and last_step not in finished
    if switching or (re.match(r"\d ", last_step) and NOT_AS_EXPECTED.search(message)):
        live, documents = None, None
    ages = [step.result["newest_object_age_hours"] for step in steps if "newest_object_age_hours" in step.result]
    found_on = next((step.printed for step in steps if step.name == "check where readers are"), None)
    data_index = previous.get("live_data_index", previous.get("live_index"))
    known = found_on in (None, data_index)  # otherwise the alias was moved between the runs
    data_time = utc(now - 3600 * age) if age is not None else previous.get("live_data_time") if known else None
    return {
        "ended": utc(now), "exit_code": exit_code, "step": last_step if failed else None,
        "message": message if failed else None, "live_index": live, "documents": documents,
        "steps": [{"step": step.name, "seconds": step.seconds} for step in steps],
        "newest_object_age_hours": ages[-1] if ages else None,
        "last_success": previous.get("last_success") if failed else utc(now),
        "failures_in_a_row": int(previous.get("failures_in_a_row") or 0) + 1 if failed else 0,
        "live_data_time": data_time or None, "live_data_age_hours": hours_since(data_time),
        "live_data_index": live or data_index,
    }  # fmt: skip


def hours_since(text: Any) -> float | None:
    """Return the hours since a time in a report; None if it is missing or invalid."""
    try:
        return round((time.time() - calendar.timegm(time.strptime(str(text), TIME_FORMAT))) / 3600, 2)
    except ValueError:
        return None


def readers_after_failure(report: Mapping[str, Any]) -> str:
    """Describe where readers are after a failed run, how old their data are, and whether a repair can wait."""
    switching = re.match(r"\d switch ", str(report["step"]))
    if report["live_index"] and not re.match(r"\d ", str(report["step"])):  # step 0: this index may have failed a check
        readers = f"this run has not moved readers; they are {describe_readers(report)}"
    elif report["live_index"] and switching and report["exit_code"] not in (4, 129, 130, 143):  # a later check failed
        readers = f"readers are {describe_readers(report)}; see the message above"
    elif report["live_index"]:
        readers = f"readers are {describe_readers(report)}; that index is complete, so this can wait"
    elif re.match(r"\d ", str(report["step"])):
        command = script_command("switch_alias.py", "--alias", str(report["alias"]), "--show")
        readers = f"to find out which index readers are on, run {command}"
    else:
        readers = "this run has not moved readers"
    refused = report["exit_code"] == 4
    next_run = "until the cause is removed, every run will be refused" if refused else "the next run tries again"
    failures = report["failures_in_a_row"]
    return f"{readers}; {next_run}" + (f" (failed runs in a row: {failures})" if failures > 1 else "")


def print_status(report_file: str, hold_file: str, lock_file: str, max_age_hours: str) -> None:
    """Print the last run, the hold and the lock. With a maximum age, exit with 1 unless a success is that recent."""
    last = read_report(Path(report_file))
    if last.get("ended"):
        failed = f"failed at: {last.get('step')} (exit {last.get('exit_code')})"
        outcome = failed if last.get("exit_code") else "succeeded"
        print(f"last run      {last.get('began')} to {last['ended']}, {outcome}")
        if last.get("message"):
            print(f"message       {last['message']}")
        print(f"readers       {describe_readers(last)}")
    age = hours_since(last.get("last_success"))
    print("last success  " + ("never" if age is None else f"{last['last_success']}, {age:.1f} hours ago"))
    print(f"hold          {hold_reason(hold_file) or 'none'}")
    print(f"running now   {running_now(Path(lock_file))}")
    if max_age_hours and (age is None or age > float(max_age_hours)):
        raise SystemExit(1)


def describe_readers(report: Mapping[str, Any]) -> str:
    """Return a phrase about the report's live index, with the number and the age of its documents if known."""
    if not report.get("live_index"):
        return "unknown; to find out, run switch_alias.py with --alias and --show"
    count, age = report.get("documents"), hours_since(report.get("live_data_time"))
    documents = f", {count:,} documents" if isinstance(count, int) else ""
    return f"on {report['live_index']}{documents}" + ("" if age is None else f", data {age:.1f} hours old")


def hold_reason(file: str) -> str:
    """Return the beginning of the first line of a HOLD file; "" if there is no hold."""
    path = Path(file)
    try:
        path.lstat()
        with path.open("rb") if path.is_file() else io.BytesIO() as content:
            line = content.readline(HOLD_BYTES).decode(errors="ignore").rstrip("\n")
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f"unknown, {file} cannot be read: {error.strerror}"
    return LogFormatter.CONTROL.sub("?", line) or "no reason given"


def running_now(path: Path) -> str:
    """Return whether another process holds the lock, as text; takes a shared lock for a moment to find out."""
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "yes"
    except (FileNotFoundError, NotADirectoryError):
        return "no"
    except OSError as error:
        return f"unknown, {path} cannot be read: {error.strerror}"
    return "no"


# --- one request: AWS -------------------------------------------------------------------------------------------------


class Aws:
    """The boto3 clients of a run, created on demand; they share one session, which takes 35 ms to create."""

    def __init__(self, region: str | None) -> None:
        self.region = region

    @cached_property
    def session(self) -> Any:
        """Return the session; AWS_REGION is passed, since boto3 reads only AWS_DEFAULT_REGION."""
        import boto3  # slow to import; --help and runs without AWS do not need it

        if broken := [name for name in AWS_SECRETS if re.search(r"\s", os.environ.get(name, ""))]:
            raise ConfigurationError(f"{', '.join(broken)}: remove the line break or space")  # or an error quotes it
        session = boto3.session.Session(region_name=self.region)
        if not session.region_name:
            raise ConfigurationError("no AWS region: set AWS_REGION")
        return session

    def client(self, service: str, *, attempts: int = 5, read_timeout_s: float = 60, connections: int = 10) -> Any:
        """Return a client. Callers that retry themselves pass `attempts=1`, or the two layers of retries multiply."""
        from botocore.config import Config

        retries: Any = {"mode": "standard", "total_max_attempts": attempts}
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S, read_timeout=read_timeout_s, retries=retries,
            max_pool_connections=connections,
        )  # fmt: skip
        return self.session.client(service, config=config)


class SignedAuth(AuthBase):
    """Sign each request when it is sent; botocore renews the credentials of a role before they expire."""

    def __init__(self, aws: Aws) -> None:
        with aws_errors("AWS credentials", "sts:AssumeRole"):
            self.credentials, self.region = aws.session.get_credentials(), aws.session.region_name
        if self.credentials is None:
            raise ConfigurationError("OPENSEARCH_AUTH=sigv4: no AWS credentials; set up a role, "
                                     "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")  # fmt: skip

    def __call__(self, sent: requests.PreparedRequest) -> requests.PreparedRequest:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        content_type = {"Content-Type": sent.headers["Content-Type"]}
        request = AWSRequest(method=sent.method, url=sent.url, data=sent.body, headers=content_type)
        with aws_errors("AWS credentials", "sts:AssumeRole"):
            current = self.credentials.get_frozen_credentials()
        SigV4Auth(current, "es", self.region).add_auth(request)
        sent.headers.update(dict(request.headers))
        return sent


@contextlib.contextmanager
def aws_errors(what: str, permission: str) -> Iterator[None]:
    """Turn botocore exceptions into ConfigurationError or OperationFailed; `permission`: the IAM action for `what`."""
    from botocore.exceptions import (
        BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound,
    )  # fmt: skip

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise ConfigurationError(f"{what}: {error}; give AWS credentials: a role, a profile or variables") from None
    except ClientError as error:
        code, text = error.response["Error"].get("Code", "?"), error.response["Error"].get("Message", "")
        raise OperationFailed(f"{what}: {code}: {text}; {aws_advice(code, permission)}") from None
    except (BotoCoreError, RuntimeError) as error:  # RuntimeError: renewed credentials have already expired
        advice = "check AWS_REGION, the network and the AWS credentials, then run again"
        raise OperationFailed(f"{what}: {error}; {advice}") from None


AWS_ADVICE = {  # by error code
    "AccessDenied|AccessDeniedException|403": "allow {permission} in the IAM policy",
    ".*Expired.*|Invalid(AccessKeyId|Token|ClientTokenId|IdentityToken)|UnrecognizedClientException|"
    "MissingAuthenticationToken.*": "renew the AWS credentials and run again",
    "SlowDown|ServiceUnavailable|InternalError|InternalServerError|.*Throttl.*": "AWS is overloaded: run again later",
    "InvalidObjectState": "the object is archived: restore it, or move it out of the prefix",
    "RequestTimeTooSkewed": "set the clock on this host",
    "SignatureDoesNotMatch|(Invalid|Incomplete)Signature.*": "check the secret access key and the clock on this host",
    "AllAccessDisabled": "AWS has disabled the bucket: contact AWS Support, or use another bucket",
    "KMS.*": "check that the KMS key exists and is enabled",
    ".*": "check the name and the region",
}


def aws_advice(code: str, permission: str) -> str:
    advice = next(advice for pattern, advice in AWS_ADVICE.items() if re.fullmatch(pattern, code))
    return advice.format(permission=permission)


# --- one request: where it goes, and as whom --------------------------------------------------------------------------


@dataclass(frozen=True)
class Credentials:
    """Endpoint and user of the cluster; repr hides the password."""

    endpoint: str
    username: str  # empty if requests are signed instead
    password: str = field(repr=False)
    source: str  # for the log

    @classmethod
    def load(cls, aws: Aws, settings: argparse.Namespace) -> Credentials:
        """Read the environment or Parameter Store. Raises ConfigurationError or OperationFailed."""
        given = [os.environ.get(name, "") for name in CREDENTIALS]
        if given[0] == "none":
            given = ["", "", ""]
        prefix, source = settings.opensearch_parameter_prefix.rstrip("/"), "the environment"
        if settings.opensearch_auth == "sigv4":
            given = [given[0] or read_parameters(aws, prefix, "endpoint")[0], "", ""]
        elif not any(given):
            given, source = read_parameters(aws, prefix, "endpoint", "username", "password"), "Parameter Store"
        elif not all(given):
            unset = " and ".join(name for name, value in zip(CREDENTIALS, given) if not value)
            raise ConfigurationError(f"{unset} not set; set all three, or none of them to use Parameter Store")
        if ":" in given[1]:
            raise ConfigurationError("Basic authentication does not allow a user name with a colon; give another user")
        return cls(endpoint_url(given[0]), given[1], given[2], source)


def read_parameters(aws: Aws, prefix: str, *parameters: str) -> list[str]:
    """Read values below a prefix of Parameter Store in one call; SecureStrings are decrypted."""
    names = [f"{prefix}/{name}" for name in parameters]
    if not names[0].startswith("/"):
        raise ConfigurationError(f"OPENSEARCH_PARAMETER_PREFIX: {prefix!r} does not begin with a slash; give /{prefix}")
    with aws_errors(f"Parameter Store, {prefix}/*", "ssm:GetParameters (and kms:Decrypt for a customer managed key)"):
        found = aws.client("ssm").get_parameters(Names=names, WithDecryption=True)
    if unset := ", ".join(found["InvalidParameters"]):
        raise OperationFailed(f"Parameter Store lacks {unset} in this region; create what is missing or fix AWS_REGION")
    values = {parameter["Name"]: re.sub(r"\r?\n\Z", "", parameter["Value"]) for parameter in found["Parameters"]}
    return [values[name] for name in names]


def endpoint_url(text: str) -> str:
    """Return the endpoint with a scheme, without a trailing slash.

    Raises ConfigurationError, which does not quote the endpoint: it may contain a secret.
    """
    url = text.strip().rstrip("/")
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        _ = parts.port  # raises ValueError if invalid
    except ValueError:
        raise ConfigurationError("the endpoint is not a URL such as https://host:9200") from None
    if "@" in parts.netloc:
        raise ConfigurationError("the endpoint contains a user or password; set these separately instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigurationError("the endpoint is not a URL such as https://host:9200")
    if parts.hostname.endswith(".aoss.amazonaws.com"):
        raise ConfigurationError("OpenSearch Serverless does not support _reindex, _refresh or _tasks; give the "
                                 "endpoint of an OpenSearch Service domain")  # fmt: skip
    return parts.geturl()


# --- one request: sent, and tried again where that is safe ------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """A response of the cluster; with `resent`, an earlier attempt may have taken effect as well."""

    status: int
    body: bytes
    resent: bool = False
    first: bool = True  # the response to the first attempt
    sent: float = 0  # time of the last attempt, on the monotonic clock

    @property
    def data(self) -> Any:
        try:
            return {**json.loads(self.body)}
        except (ValueError, TypeError):  # not JSON, or not an object
            start = self.body[:80].decode(errors="replace")
            raise RequestFailed(f"the response is not from OpenSearch (is the endpoint right?): {start!r}") from None


def innermost(error: BaseException) -> str:
    """Return the message of an exception's root cause: `[Errno 111] Connection refused`, without its wrappers."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(error) or type(error).__name__


def error_of(body: bytes) -> tuple[str, str]:
    """Return type and reason of an error response; `error` may be an object, a string, or missing."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return "", re.sub(r"<[^>]*>|\s+", " ", body[:300].decode(errors="replace")).strip()
    if not isinstance(error, dict):
        return "", str(error)
    return root_cause(error)


def root_cause(error: Mapping[str, Any]) -> tuple[str, str]:
    """Return type and reason of the root cause of an error, or of its first failed shard."""
    if shards := error.get("failed_shards"):
        return root_cause(shards[0]["reason"])
    cause = (error.get("root_cause") or [error])[0]
    return str(cause.get("type") or error.get("type")), str(cause.get("reason") or error.get("reason"))


def other_server(response: requests.Response) -> str:
    """Return the kind of server that responded instead of OpenSearch, if it can be recognized."""
    if {"osd-name", "kbn-name"} & {name.lower() for name in response.headers}:
        return "OpenSearch Dashboards"
    page = "html" in response.headers.get("Content-Type", "") and response.status_code in (200, 302, 404)
    return "a web page (a proxy's login?)" if page else ""


class Connection:
    """A connection pool to one cluster."""

    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.aws = Aws(settings.aws_region)
        self.credentials = Credentials.load(self.aws, settings)
        self.host: str = settings.run_host or HOST  # tasks of this host are ours
        self.opaque_id = f"{SUITE}/{self.host}/{uuid.uuid4().hex[:12]}"
        self._session = self._open_session(settings.ca_bundle or settings.verify_ssl)
        self._has_responded = False  # true after the first response: the endpoint is right
        self._version: tuple[int, int] | None = None

    def _open_session(self, verify: bool | str) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # or ~/.netrc could replace the credentials, and a proxy receive them
        session.verify = verify
        if self.credentials.username:
            session.headers.update(self._create_auth_header())
        else:
            session.auth = SignedAuth(self.aws)
        # without a context, each connection reads the system's CA certificates (15 ms)
        unverified = None if verify else create_urllib3_context(cert_reqs=ssl.CERT_NONE)
        adapter = HTTPAdapter()  # without retries: only request() retries
        adapter.init_poolmanager(1, MAX_CONNECTIONS, ssl_context=unverified)
        session.mount("http://", adapter)
        session.mount("https://", adapter)
        if self.credentials.endpoint.startswith("http://"):
            log.warning("the endpoint is http://: passwords and data are sent unencrypted")
        elif not verify:
            log.warning("certificates are not verified; set VERIFY_SSL=true or CA_BUNDLE to verify them")
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return session

    def _create_auth_header(self) -> dict[str, str]:
        """Return the Basic header, in UTF-8: a password may contain any character."""
        pair = f"{self.credentials.username}:{self.credentials.password}".encode()
        return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}

    def version(self) -> tuple[int, int]:
        """Return the major and minor version of the cluster, read once; the oldest supported one if it is hidden.

        In compatibility mode (compatibility.override_main_response_version), each version reports 7.10.2.
        """
        if not self._version:
            found = self.request("GET", "/").data["version"]
            major, minor = found["number"].split(".")[:2]
            self._version = (int(major), int(minor)) if found.get("distribution") == "opensearch" else OLDEST_VERSION
            log.debug("version %s %s", found.get("distribution"), found["number"])
        return self._version

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        idempotent: bool = True,
        retry: bool = True,
        accept: Sequence[int] = (),
        on_throttled: Callable[[float], None] | None = None,
    ) -> Response:
        """Send a request (bytes as NDJSON, anything else as JSON) and return the response.

        Connection errors, 429, 502, 503 and 504 are retried with exponential backoff. Retries end after RETRY_SECONDS
        (after 10 s if the cluster has never responded; after a signal, when clean-up must end). A request with
        `idempotent=False` is sent again only if it cannot have taken effect; otherwise OutcomeUnknown is raised. With
        `retry=False`, it is never sent again. A response whose status is in `accept` is returned; any other failure
        raises RequestFailed. After a 429 that may be retried, `on_throttled` is called with the time of the attempt.
        """
        attempts, resent = Retry(self._retry_seconds()), False
        while True:
            sent = time.monotonic()
            try:
                response = self._attempt(method, path, body, params, accept, attempts)
                return Response(response.status_code, response.content, resent, attempts.attempt == 0, sent)
            except RequestFailed as failure:
                if not (failure.is_transient() and retry and (idempotent or failure.without_effect)):
                    raise
                resent = resent or not failure.without_effect
                if on_throttled and failure.status == 429:
                    on_throttled(sent)
                attempts.limit_s = self._retry_seconds()
                if not attempts.wait(f"{failure}; trying again", failure.retry_after):
                    failure.args = (f"{failure}{self._after_giving_up(attempts.began)}",)
                    raise

    def probe(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Send a permission probe once; return status and body (status 0: no response)."""
        try:
            response = self._send(method, path, body, FIRST_CONTACT_S, purpose="/permissions")
        except requests.RequestException as error:
            log.debug("%s %s: %s", method, path, innermost(error))
            return 0, b""
        log.debug("%s %s: %s", method, path, response.status_code)
        return response.status_code, response.content

    def _send(
        self, method: str, path: str, body: Any, limit_s: float, params: Mapping[str, Any] | None = None,
        purpose: str = "",
    ) -> requests.Response:  # fmt: skip
        ndjson = isinstance(body, bytes)
        return self._session.request(
            method, self.credentials.endpoint + path, params=params, allow_redirects=False,
            data=body if ndjson or body is None else json.dumps(body).encode(),
            headers={"Content-Type": f"application/{'x-ndjson' if ndjson else 'json'}",
                     "X-Opaque-Id": self.opaque_id + purpose},
            timeout=(min(CONNECT_TIMEOUT_S, limit_s), limit_s),
        )  # fmt: skip

    def _retry_seconds(self) -> float:
        return float(self.settings.retry_seconds if self._has_responded else FIRST_CONTACT_S)

    def _attempt(
        self, method: str, path: str, body: Any, params: Mapping[str, Any] | None, accept: Sequence[int],
        attempts: Retry,
    ) -> requests.Response:  # fmt: skip
        """Send a request once. Raises RequestFailed, or OutcomeUnknown if there was no response, or 502 to 504."""
        what, began = f"{method} {path}", time.monotonic()
        hurried = interrupted.is_set() or not self._has_responded
        if interrupted.is_set() and attempts.seconds_left() <= 0:
            raise RequestFailed(f"{what} was not sent: the time for clean-up is over; run again", without_effect=True)
        try:
            limit_s = max(1, attempts.seconds_left()) if hurried else READ_TIMEOUT_S
            response = self._send(method, path, body, limit_s, params)
        except requests.RequestException as error:
            raise self._no_response(what, error) from None
        if what_answers := other_server(response):
            raise RequestFailed(f"{what}: {self.credentials.endpoint} is {what_answers}, not the cluster; give the "
                                "endpoint of the cluster itself")  # fmt: skip
        self._has_responded = True
        if response.status_code >= 300 and response.status_code not in accept:
            raise self.failure(what, response.status_code, response.content, response.headers.get("Retry-After"))
        log.debug("%s: %s in %.2f s", what, response.status_code, time.monotonic() - began)
        return response

    def _no_response(self, what: str, error: requests.RequestException) -> RequestFailed:
        if isinstance(error, requests.exceptions.SSLError) and "CERTIFICATE" in str(error):
            advice = "renew the certificate, use the host name that it was issued for, or set CA_BUNDLE to its CA"
            return RequestFailed(f"{what}: {innermost(error)}; {advice}")
        reason = getattr(error.args[0] if error.args else None, "reason", None)
        refused = isinstance(reason, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError))
        text = f"{what} at {self.credentials.endpoint}: {innermost(error)}"
        return OutcomeUnknown(text, without_effect=refused)

    def failure(self, what: str, status: int, body: bytes, retry_after: str | None = None) -> RequestFailed:
        kind, reason = error_of(body)
        text = f"{what}: {status} {kind and kind + ': '}{reason}{self._advice(status, kind, reason)}"
        unknown = status in (502, 503, 504)  # a load balancer timed out, or the cluster is not ready
        kind_of_failure = OutcomeUnknown if unknown else RequestFailed
        return kind_of_failure(text, status, kind, reason, without_effect=status == 429, retry_after=retry_after)

    def _after_giving_up(self, began: float) -> str:
        look = "check GET _cluster/health and run again"
        what_to_do = look if self._has_responded else "check the endpoint and that the cluster is up"
        return f"; gave up after {seconds_since(began):.0f} s: {what_to_do}"

    @property
    def who(self) -> str:
        return f"user {self.credentials.username}" if self.credentials.username else "the AWS credentials"

    def _advice(self, status: int, kind: str, reason: str) -> str:
        user = self.who
        if not self.credentials.username and status in (401, 403) and not kind:  # from AWS, not from the cluster
            return "; renew the AWS credentials, or allow es:ESHttp* on the domain in their policy"
        if status == 401:
            return f"; the cluster rejected {user}: check the user name and password"
        if status == 403 and "security" in kind:
            missing = re.search(r"no permissions for \[(.*?)\](?=\s|$)", reason)
            return f"; the role of {user} lacks {missing[1] if missing else 'a permission'}"
        if "block" in kind and "SERVICE_UNAVAILABLE" not in reason:  # a cluster that is starting, not a setting
            disk = "flood" in reason
            return f"; {'free disk space on the data nodes' if disk else 'remove the block (index.blocks.*)'} first"
        if 300 <= status < 400:
            return "; redirects are not followed: set the endpoint to the final address"
        return ""


# --- the cluster ------------------------------------------------------------------------------------------------------


class OpenSearchBaseManager(Connection):
    """One cluster, and the operations that at least two scripts need.

    Use it as a context manager: on exit, it cancels running tasks of this run (after a failure), releases the locks
    and closes the connections. The rest of the suite may call methods with an underscore.
    """

    def __init__(self, settings: argparse.Namespace) -> None:
        super().__init__(settings)
        self.dry_run: bool = settings.dry_run
        self.names: list[str] = []  # indices and aliases that the script works on
        self.probes: list[Probe] = []  # for the permissions that the script needs with these settings
        self._locks: list[int] = []
        self._task_started = False
        cluster = self.credentials
        who = f"user {cluster.username} (from {cluster.source})" if cluster.username else "signed AWS requests"
        log.info("cluster %s, %s%s", cluster.endpoint, who, ", dry run: nothing changes" if self.dry_run else "")

    def __enter__(self: Manager) -> Manager:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and self._task_started:
                run_to_completion(self._cancel_own_tasks)
        except OperationFailed as error:
            log.error("tasks of this run may still be running; the next run on this host cancels them: %s", error)
        finally:
            for lock in self._locks:
                os.close(lock)
            self._session.close()

    def run(self) -> Mapping[str, Any] | str:
        """Do the work of the script; return its result, which is printed as JSON, or as plain text."""
        raise NotImplementedError

    # --- indices ---

    def _read(self, name: str, accept: Sequence[int]) -> dict[str, Any]:
        response = self.request("GET", f"/{name}", params={"flat_settings": "true"}, accept=accept)
        found: dict[str, Any] = response.data if response.status == 200 else {}
        return found

    def read_index(self, index: str, accept: Sequence[int] = (404,)) -> dict[str, Any] | None:
        """Return `aliases`, `mappings` and flat `settings` of an index.

        Returns None if the name is unknown or that of an alias, or if the response has a status in `accept`.
        """
        return self._read(index, accept).get(index)

    def name_exists(self, name: str) -> bool:
        """Return whether there is an index or an alias of this name."""
        return bool(self._read(name, [404]))

    def _verify_index_exists(self, index: str) -> dict[str, Any]:
        """Return the same as `read_index`. Raises OperationFailed if there is no such index."""
        if not (found := self._read(index, [404])):
            raise OperationFailed(f'index {index} does not exist; create it first (README, "Setting up"). If a run '
                                  "with COPY_METHOD=clone or CLEANUP_METHOD=recreate was stopped, repeat that run "
                                  "instead")  # fmt: skip
        if index not in found:
            raise OperationFailed(f"{index} is an alias of {', '.join(sorted(found))}; give the name of an index")
        return dict(found[index])

    def index_uuid(self, index: str) -> str:
        """Return the UUID, which distinguishes an index from a later one of the same name."""
        return str(self._verify_index_exists(index)["settings"]["index.uuid"])

    def verify_same_index(self, index: str, uuid: str) -> None:
        """Raise OperationFailed if the index no longer has this UUID."""
        if self.index_uuid(index) != uuid:
            raise OperationFailed(
                f"another client deleted and recreated index {index} during this run; check its mapping and run again"
            )

    def _check_index_aliases(self, index: str) -> list[str]:
        """Return the aliases that point at an index; any alias makes it live."""
        return sorted(self._verify_index_exists(index)["aliases"])

    def on_primaries(self) -> dict[str, str]:
        """Return the parameter that sends searches to primaries: replicas may lag (segment replication)."""
        return {"preference": "_primary"} if self.version() >= (2, 8) else {}  # 1.3 rejects it

    def _get_index_count(
        self, index: str, query: Mapping[str, Any] | None = None, params: Mapping[str, str] | None = None
    ) -> int:
        """Refresh, then count all documents or those that match a query."""
        self.verify_all_shards(self.request("POST", f"/{index}/_refresh").data, f"_refresh of {index}")
        body = {"query": query} if query else None
        where = {**self.on_primaries(), **(params or {})}
        counted = self.request("POST" if body else "GET", f"/{index}/_count", body, params=where).data
        self.verify_all_shards(counted, f"_count of {index}")
        if counted["_shards"]["successful"] < counted["_shards"]["total"]:
            raise OperationFailed(f"_count of {index}: not all shards responded; see GET _cluster/health/{index}")
        return int(counted["count"])

    @staticmethod
    def verify_all_shards(found: Mapping[str, Any], what: str) -> None:
        if failed := found["_shards"]["failed"]:
            raise OperationFailed(f"{what}: {failed} shard(s) failed; see GET _cluster/allocation/explain")

    def shard_stats(self, index: str) -> dict[str, list[dict[str, Any]]]:
        """Return the statistics of the copies of each shard, by shard number."""
        found = self.request("GET", f"/{index}/_stats", params={"level": "shards"}).data
        shards: dict[str, list[dict[str, Any]]] = found["indices"][index]["shards"]
        return shards

    # --- locks ---

    def lock(self, index: str, *, shared: bool = False) -> None:
        """Lock an index on this host until the manager exits or is killed. Raises Locked if another run holds it."""
        path = self.settings.lock_dir / f"{index}.lock"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self._locks.append(lock)
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(
                f"index {index} is locked by another run on this host; wait for it to finish ({path})"
            ) from None
        except OSError as error:
            raise OperationFailed(f"lock file {path}: {error.strerror}; set LOCK_DIR to a writable folder") from None

    # --- tasks on the server ---

    def _tasks(self, **params: str) -> dict[str, dict[str, Any]]:
        nodes = self.request("GET", "/_tasks", params={"detailed": "true", **params}).data.get("nodes", {})
        return {name: task for node in nodes.values() for name, task in node["tasks"].items()}

    def _writing_tasks(self) -> dict[str, dict[str, Any]]:
        """Return the copy and by-query tasks of the cluster with their X-Opaque-Id, without child tasks."""
        tasks = self._tasks(actions="*reindex,*byquery").items()
        return {
            name: {**task, "opaque_id": task.get("headers", {}).get("X-Opaque-Id", "")}
            for name, task in tasks if "parent_task_id" not in task
        }  # fmt: skip

    def _tasks_naming(self, index: str) -> dict[str, str]:
        """Return the X-Opaque-Id of each copy or by-query task that names the index, by task id."""
        return {
            name: task["opaque_id"] for name, task in self._writing_tasks().items()
            if re.search(rf"(?<=[\[\s]){re.escape(index)}(?=[\],])", task.get("description", ""))
        }  # fmt: skip

    def await_tasks(self, index: str, *, exclusive: bool = True) -> bool:
        """Wait until no task of the suite reads or writes the index; return whether there was one.

        With an exclusive lock, tasks of this host can only be orphans of a crashed run: they are canceled. A dry run
        warns instead, and does not wait. Raises Refused if a task of another client is using the index, or if a task
        of the suite does not end within WAIT_SECONDS.
        """
        began, awaited = time.monotonic(), ""
        while named := self._tasks_naming(index):
            for task, opaque_id in named.items():
                if not opaque_id.startswith(f"{SUITE}/"):
                    raise Refused(
                        f"task {task}, which this suite did not start, is using index {index}; wait for it or "
                        "cancel it"
                    )
                if opaque_id.startswith(f"{SUITE}/{self.host}/") and exclusive and not self.dry_run:
                    log.warning("canceling task %s on index %s, left by a crashed run", task, index)
                    self.request("POST", f"/_tasks/{task}/_cancel", accept=[404])
            if self.dry_run:
                log.warning("task %s of another run is using index %s", ", ".join(named), index)
                return True
            if time.monotonic() - began > self.settings.wait_seconds:
                raise Refused(
                    f"task {', '.join(named)} of another run is still using index {index}; wait for it to finish"
                )
            if awaited != (awaited := ", ".join(named)):
                log.info("waiting for task %s of another run, which is using index %s", awaited, index)
            time.sleep(1)
        return bool(awaited)

    def run_task(self, path: str, body: Any, *, label: str, total: int, **params: Any) -> dict[str, Any]:
        """Run a task on the server, one slice per shard, throttled to REQUESTS_PER_SECOND; return its response.

        Raises OperationFailed if it ends with an error, failures, a timeout or a cancellation, or disappears. If there
        is no response to the start, the task is looked up by X-Opaque-Id before it is started again.
        """
        progress, pause = Progress(label, total, "documents"), POLL_FIRST_S
        params = {**params, **self.settings.requests_per_second.task_params(),
                  "slices": "auto", "wait_for_completion": "false"}  # fmt: skip
        task = self._start_task(path, body, params)
        while True:
            response = self.request("GET", f"/_tasks/{task}", accept=[404])
            if response.status == 404:
                raise OperationFailed(
                    f"{label}: task {task} disappeared (node restart?); its outcome is unknown, run the step again"
                )
            if response.data["completed"]:
                break
            progress.update(self._documents_done(task, response.data["task"]["status"]))
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_MAX_S)
        progress.close()
        self._task_started = False
        return self._task_response(label, response.data)

    def _start_task(self, path: str, body: Any, params: Mapping[str, Any]) -> str:
        retry, action = Retry(self._retry_seconds()), path.rsplit("/_", 1)[1].replace("_by_query", "/byquery")
        self._task_started = True
        while True:
            try:
                return str(self.request("POST", path, body, params=params, idempotent=False).data["task"])
            except OutcomeUnknown as unknown:
                again = retry.wait(f"{unknown}; checking whether the task was started")
                if started := [task for task, own in self._own_tasks().items() if own["action"].endswith(action)]:
                    return started[0]
                if not again:
                    raise

    def _own_tasks(self) -> dict[str, dict[str, Any]]:
        return {name: task for name, task in self._writing_tasks().items() if task["opaque_id"] == self.opaque_id}

    def _documents_done(self, task: str, status: Mapping[str, Any]) -> int:
        """Return how many documents a task has processed; for a sliced task, sum its slices."""
        parts = [status]
        if status.get("slices"):
            parts = [child["status"] for child in self._tasks(parent_task_id=task).values()]
            parts += [part for part in status["slices"] if part]
        return sum(part.get(kind, 0) for part in parts for kind in ("created", "updated", "deleted"))

    def _task_response(self, label: str, document: Mapping[str, Any]) -> dict[str, Any]:
        error, response, what = document.get("error"), document.get("response") or {}, label
        if failures := response.get("failures"):
            error = failures[0].get("cause") or failures[0].get("reason") or failures[0]
            what = f"{label}: {len(failures)} failure(s), the first"
        if error:
            kind, reason = root_cause(error)
            failure = BatchTooLarge if MEMORY_ERRORS.search(str(error.get("type"))) else OperationFailed
            advice = self._advice(0, kind, reason) or "; remove a lasting cause, then run it again"
            raise failure(f"{what}: {kind}: {reason}{advice}")
        if response.get("canceled"):
            raise OperationFailed(f"{label}: canceled ({response['canceled']}); run it again")
        if response.get("timed_out"):
            raise OperationFailed(f"{label}: timed out on the server; run it again")
        return dict(document["response"])

    def _cancel_own_tasks(self) -> None:
        """Cancel the tasks of this run and wait until they have ended, for at most CLEANUP_S."""
        retry = Retry(CLEANUP_S)
        while (own := self._own_tasks()) and retry.seconds_left() > 0:
            for task in own:
                log.warning("canceling task %s", task)
                self.request("POST", f"/_tasks/{task}/_cancel", accept=[404])
            time.sleep(0.5)


# --- permissions ------------------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """A harmless request that is denied to a user without certain permissions; any other response means allowed."""

    method: str
    path: str
    body: Any = None


# Values that make a probe harmless: with the permission, it is rejected because there is no such setting or document.
UNKNOWN_SETTING = {"index.permission_probe": 1}
NOT_THERE = {"_id": "permission-probe", "if_seq_no": 2**53, "if_primary_term": 1}  # fails even if a pipeline sets an id


def reading_probes(*indices: str) -> list[Probe]:
    """Return probes for the requests that each script sends before it changes anything."""
    names = ",".join(indices)
    cluster = ["/", f"/_cluster/health/{names}?timeout=0s", "/_tasks?actions=*reindex"]
    paths = [*cluster, *(f"/{names}{part}" for part in ("", "/_count", "/_stats/store"))]
    return [*(Probe("GET", path) for path in paths), Probe("POST", f"/{names}/_refresh")]


def bulk_probe(index: str, *actions: str) -> Probe:
    """Return a probe for bulk actions. Send it only to an index that exists: it would create a missing one."""
    lines = [json.dumps({action: NOT_THERE}) + ("\n{}" if action == "index" else "") for action in actions]
    return Probe("POST", f"/{index}/_bulk?pipeline=_none&timeout=1s", ("\n".join(lines) + "\n").encode())


def deleting_probes(index: str) -> list[Probe]:
    """Return probes for tasks on the server and for emptying an index, except for deletions (see `bulk_probe`)."""
    return [
        Probe("GET", "/_tasks/permission-probe:1"),
        Probe("POST", "/_tasks/permission-probe:1/_cancel"),
        Probe("POST", "/_search/scroll", {"scroll_id": "permission-probe"}),
        Probe("GET", f"/{index}/_search_shards"),
        Probe("POST", f"/{index}/_delete_by_query?slices=auto", {"query": {"match_none": {}}}),
        mapping_probe(index),
    ]


def mapping_probe(index: str) -> Probe:
    return Probe("PUT", f"/{index}/_mapping", {"properties": {}})


def settings_probe(index: str) -> Probe:
    return Probe("PUT", f"/{index}/_settings", UNKNOWN_SETTING)


def creating_probes(index: str) -> list[Probe]:
    """Return probes for recreating an index, except for its deletion: no harmless request proves that permission."""
    return [Probe("PUT", f"/{index}", {"settings": UNKNOWN_SETTING}), Probe("GET", f"/{index}")]


def denied_permissions(method: str, status: int, body: bytes) -> list[str]:
    """Return the missing permissions that a response reports: lines of a role, or IAM actions (`es:...`).

    Raises Refused if it reports that the cluster is read-only.
    """
    if status != 403 and b'"errors":true' not in body:  # in a bulk response
        return []
    text = body.decode(errors="replace")
    if "cluster read-only" in text:
        raise Refused("the cluster is read-only; nothing was changed. Find out why, then remove the block: PUT "
                      '/_cluster/settings {"persistent": {"cluster.blocks.read_only": null}} (or '
                      "read_only_allow_delete)")  # fmt: skip
    if found := re.findall(r"no permissions for \[((?:[^][]|\[\w+\])+)\]", text):
        return [role_line(action) for actions in found for action in actions.split(", ")]
    if status != 403 or error_of(body)[0] or re.search("request: .* is not allowed", text):
        return []  # a block, or a request that managed domains do not allow
    verb = re.search(r"es:\w+", text)
    if not verb and re.search("security token|[Ss]ignature", text):
        return []  # the credentials are invalid: the next request reports that
    return [verb[0] if verb else f"es:ESHttp{method.capitalize()}"]


def role_line(action: str) -> str:
    """Return an action as a role lists it; an asterisk covers its sub-actions, such as `bulk[s]` or `scroll/clear`."""
    return re.sub(r"^(indices:(data/read/scroll|admin/(refresh|flush)|data/write/bulk(?=\[))).*", r"\1*", action)


def missing_permissions(manager: OpenSearchBaseManager, probes: Sequence[Probe]) -> list[str]:
    """Send all probes, eight at a time; return the denied permissions without duplicates."""
    found = in_parallel(lambda probe: denied_permissions(probe.method, *manager.probe(*probe)), probes, PROBES_AT_ONCE)
    return sorted({line for lines in found for line in lines})


def require_permissions(manager: OpenSearchBaseManager, probes: Sequence[Probe]) -> None:
    """Raise OperationFailed that names all missing permissions, as lines of a role."""
    if not manager._has_responded:  # or a wrong endpoint would fail eight times, and unnoticed
        manager.request("GET", "/", accept=[403])
    if not (missing := missing_permissions(manager, probes)):
        return
    verbs = [line for line in missing if line.startswith("es:")]
    cluster = [line for line in missing if re.match(r"cluster:|indices:data/(write/(bulk|reindex)$|read/scroll)", line)]
    role, advice = dict[str, Any](), list[str]()
    if cluster:
        role["cluster_permissions"] = cluster
    if index := [line for line in missing if line not in verbs + cluster]:
        role["index_permissions"] = [{"index_patterns": manager.names, "allowed_actions": index}]
    if role:
        advice.append(f"add to the role of {manager.who}: {json.dumps(role)}")
    if verbs:
        advice.append(f"grant {', '.join(verbs)} to {manager.who} in IAM and in the access policy of the domain")
    raise OperationFailed(f"permissions are missing; nothing was changed; {'; '.join(advice)}")


# --- the state of an index --------------------------------------------------------------------------------------------

TO_READ = ("index.blocks.read", "index.blocks.search_only")
TO_MOVE_ALIAS = (*TO_READ, "index.blocks.read_only", "index.blocks.read_only_allow_delete")
TO_FILL = (*TO_MOVE_ALIAS, "index.blocks.write", "index.append_only.enabled")
REMEDIES = {  # where removing the setting does not help
    "index.blocks.read_only_allow_delete": "free disk space on the data nodes; the server then removes it",
    "index.blocks.search_only": "scale the index up again (_scale)",
    "index.append_only.enabled": "create the index without it",
}


def recovered_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of an index as they will be when the changes in its marker have been undone."""
    settings, marker = found["settings"], found["mappings"].get("_meta", {}).get(SUITE) or {"found": {}, "set": {}}
    changed = {name: value for name, value in marker["found"].items() if settings.get(name) == marker["set"].get(name)}
    return {**settings, **changed}


def refuse_unusable(index: str, found: Mapping[str, Any], obstacles: Sequence[str]) -> None:
    """Raise Refused if the index is closed or a setting in `obstacles` is true (unless a failed run left it)."""
    settings = recovered_settings(found)
    if settings.get("index.verified_before_close") == "true":
        raise Refused(f"index {index} is closed; nothing was changed. Open it (POST /{index}/_open) and run again")
    for name in obstacles:
        if settings.get(name) == "true":
            remedy = REMEDIES.get(name, f'remove it: PUT /{index}/_settings {{"{name}": null}}')
            raise Refused(f"index {index} has {name}; nothing was changed. Check why it was set, then {remedy}")


def await_primaries(
    manager: OpenSearchBaseManager, index: str, limit_s: float, failure: type[OperationFailed] = Refused
) -> bool:
    """Wait until the index is not red; return whether it was red at first. Raises `failure` after `limit_s`."""
    retry, path = Retry(limit_s), f"/_cluster/health/{index}"
    while True:
        if manager.request("GET", path).data["status"] != "red":
            return retry.attempt > 0
        if not retry.wait(f"index {index} is red: a shard has no active copy; checking again"):
            unchanged = "; nothing was changed" if failure is Refused else ""
            raise failure(f"index {index} is red: a shard has no active copy{unchanged}. See GET "
                          "_cluster/allocation/explain, and run again when it is yellow or green")  # fmt: skip


def count_fields(definition: Mapping[str, Any]) -> int:
    """Count a field as the server does: with its multi-fields and the hidden fields of a text field."""
    hidden = ("index_prefixes" in definition) + bool(definition.get("index_phrases"))
    return 1 + hidden + sum(map(count_fields, definition.get("fields", {}).values()))


def refuse_too_many_fields(index: str, found: Mapping[str, Any], added: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise Refused if adding these fields (definitions by full name) would exceed the field limit of the mapping."""
    held, name = dict(field_definitions(found["mappings"])), "index.mapping.total_fields.limit"
    objects = {parent for field in added for parent in parents_of(field)} - {*held, *added}
    derived = found["mappings"].get("derived", {})
    needed = len(objects) + len(derived) + sum(map(count_fields, [*held.values(), *added.values()]))
    if added and needed > (limit := int(found["settings"].get(name, 1000))):
        raise Refused(
            f"index {index} would have {needed:,} fields with the new ones ({', '.join(added)[:200]}), and {name} is "
            f'{limit:,}; nothing was changed. Raise it: PUT /{index}/_settings {{"{name}": {needed}}}, or remove '
            "columns from the files"
        )


# --- documents and shard copies ---------------------------------------------------------------------------------------


def without_search_pipeline(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameter that bypasses the search pipeline of an index, if it has one; deletions use it, too."""
    return {"search_pipeline": "_none"} if "index.search.default_pipeline" in settings else {}


def result_window(settings: Mapping[str, Any]) -> int:
    """Return the maximum number of documents that one search may return."""
    return int(settings.get("index.max_result_window", DEFAULT_WINDOW))


def verify_sees_everything(manager: OpenSearchBaseManager, index: str, found: Mapping[str, Any] | None = None) -> None:
    """Raise OperationFailed if document-level security hides documents of an index from this user."""
    mapping = (found or manager._verify_index_exists(index))["mappings"]
    if any(definition.get("type") == "nested" for _, definition in field_definitions(mapping)):
        return  # _stats also counts nested objects
    for _ in range(3):  # another client may write in between
        seen, stats = manager._get_index_count(index), manager.request("GET", f"/{index}/_stats/docs", accept=[403])
        if stats.status == 403:  # a backup index, or a role without this permission: unknown
            return
        live = int(stats.data["indices"][index]["primaries"]["docs"]["count"])
        if live <= seen or manager._get_index_count(index) != seen:
            return
    raise OperationFailed(
        f"index {index} holds {live:,} documents, but {manager.who} sees only {seen:,} of them: "
        "document-level security (or index.search.default_pipeline) hides the others; give this user a role without it"
    )


def await_replicas(manager: OpenSearchBaseManager, index: str) -> None:
    """Wait until the replicas of an index have caught up with their primaries: with segment replication, they may lag.

    Searches, copies and deletions read from any copy. Raises Refused after WAIT_SECONDS.
    """
    settings, wait_seconds = manager._verify_index_exists(index)["settings"], manager.settings.wait_seconds
    if settings.get("index.replication.type") != "SEGMENT" or settings["index.number_of_replicas"] == "0":
        return
    began, complete, shards = time.monotonic(), 0, manager.shard_stats(index)
    progress = Progress(f"waiting for the replicas of {index}", len(shards), "shards")
    while (behind := lagging_shards(shards)) is not None:
        complete = 0 if behind else complete + 1
        if complete == 2:  # once is not enough: a replica may not have received the last checkpoint yet
            return progress.close()
        if behind and time.monotonic() - began > wait_seconds:
            raise Refused(
                f"index {index}: in {behind} of {len(shards)} shards a replica still lags behind its primary after "
                f"{wait_seconds:g} s; see GET _cat/segment_replication/{index} and run again"
            )
        progress.update(len(shards) - behind)
        time.sleep(1)
        shards = manager.shard_stats(index)
    log.warning("index %s uses segment replication, whose progress this server version cannot report: replicas may lag",
                index)  # fmt: skip


def lagging_shards(shards: Mapping[str, Sequence[Mapping[str, Any]]]) -> int | None:
    """Return the number of shards with an active copy that lags behind its primary; None if that is not reported.

    Neither value suffices. `max_bytes_behind` is reported by the primary or, in some versions, by each replica, which
    ignores checkpoints that it has not received. `max_seq_no` includes documents that no search finds yet (translog).
    """
    lagging = 0
    for copies in shards.values():
        active = [copy for copy in copies if copy["routing"]["state"] in ("STARTED", "RELOCATING")]
        replication = [copy["segments"].get("segment_replication") for copy in active]
        if None in replication:
            return None
        behind = any(entry["max_bytes_behind"] for entry in replication)
        lagging += behind or len({copy["seq_no"]["max_seq_no"] for copy in active}) > 1
    return lagging


# --- an index that is filled ------------------------------------------------------------------------------------------


class Marker:
    """The marker in `_meta` of an index's mapping means that the index is unfinished: `{started, host, found, set}`.

    `set` holds the settings that were changed for the load, `found` their previous values (None: the default). `own` is
    the marker of this run while it is in the index. While an index is being cloned, its marker also holds `source`, its
    own UUID: an index with another UUID is the clone, which has inherited the marker and is unfinished.
    """

    def __init__(self, manager: OpenSearchBaseManager, index: str) -> None:
        self.manager, self.index = manager, index
        self.own: dict[str, Any] | None = None

    def read(self, found: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Return the marker of any run, or None; `found` saves reading the index once more."""
        marker: dict[str, Any] | None = self._meta(found).get(SUITE)
        return marker

    def is_of_clone_source(self, marker: Mapping[str, Any]) -> bool:
        return "source" in marker and marker["source"] == self.manager.index_uuid(self.index)

    def refuse(self, what_to_do: str, found: Mapping[str, Any] | None = None) -> None:
        """Raise Refused if the index is unfinished."""
        if (marker := self.read(found)) and not self.is_of_clone_source(marker):
            raise Refused(
                f"index {self.index} is unfinished: a run on {marker.get('host')}, started at "
                f"{marker.get('started')}, has not succeeded; {what_to_do}"
            )

    def write(self, found: Mapping[str, Any], wanted: Mapping[str, str], **more: Any) -> bool:
        """Write the marker of this run; return False and log a warning if the cluster rejects it."""
        self.own = {  # set before the request: a signal may arrive during it
            "started": utc(time.time()), "host": self.manager.host,
            "found": {name: found["settings"].get(name) for name in wanted}, "set": dict(wanted), **more,
        }  # fmt: skip
        try:
            self._put(self._meta(found), self.own)
            return True
        except OutcomeUnknown:
            raise
        except RequestFailed as error:
            log.warning("index %s: the marker cannot be written to _meta, so if this run crashes, nothing shows that "
                        "the index is unfinished; its settings stay unchanged: %s", self.index, error)  # fmt: skip
            self.own = None
            return False

    def replace(self, former: Mapping[str, Any] | None = None) -> None:
        """Remove the marker of this run, or put the former one in its place.

        Raises OperationFailed if the index now has no marker, or that of another run, which stays.
        """
        if self.own is None:
            return
        meta = self._meta()
        if (there := meta.get(SUITE)) != self.own:
            raise OperationFailed(
                f"index {self.index}: another run has started to fill it in the meantime, or a client has replaced "
                f"_meta (marker now: {there}). When no run is using the index, run again"
            )
        self._put(meta, former)

    def recover(self, found: Mapping[str, Any] | None = None) -> None:
        """Restore the settings that a failed run changed (dry run: warn). Only a clone source loses its marker."""
        if not (marker := self.read(found)):
            return
        cloned = self.is_of_clone_source(marker)
        state = "was being cloned" if cloned else "is unfinished"
        log.warning("index %s %s: a run on %s, started at %s, has not succeeded", self.index, state, marker.get("host"),
                    marker.get("started"))  # fmt: skip
        if self.manager.dry_run:
            return
        self.restore_settings(marker)
        if cloned:
            self.own = marker
            self.replace()

    def restore_settings(self, marker: Mapping[str, Any] | None) -> None:
        """Restore each setting that still has the value of the load, and read it back."""
        current = self.manager._verify_index_exists(self.index)["settings"]
        found, changed = (marker["found"], marker["set"]) if marker else ({}, {})
        left = {name: value for name, value in found.items() if current.get(name) == changed.get(name)}
        if not left:
            return
        try:
            self.manager.request("PUT", f"/{self.index}/_settings", left)
        except OutcomeUnknown:
            raise
        except RequestFailed as error:
            raise OperationFailed(
                f"index {self.index}: the settings from before the load cannot be restored: {error}; set values that "
                f"the cluster accepts, with PUT /{self.index}/_settings {json.dumps(left)}, and run again"
            ) from None
        now = self.manager._verify_index_exists(self.index)["settings"]
        if wrong := [name for name, value in left.items() if now.get(name) != value]:
            raise OperationFailed(f"index {self.index}: cannot restore {', '.join(wrong)}; run again")
        shown = (f"{name}={'default' if value is None else value}" for name, value in left.items())
        log.info("index %s: restored %s", self.index, ", ".join(shown))

    def _meta(self, found: Mapping[str, Any] | None = None) -> dict[str, Any]:
        meta: dict[str, Any] = (found or self.manager._verify_index_exists(self.index))["mappings"].get("_meta", {})
        return meta

    def _put(self, meta: Mapping[str, Any], marker: Mapping[str, Any] | None) -> None:
        """Write `_meta` with this marker or without one; other entries are sent, too, or the server drops them."""
        others = {key: value for key, value in meta.items() if key != SUITE}
        self.manager.request(
            "PUT", f"/{self.index}/_mapping", {"_meta": {**others, SUITE: marker} if marker else others}
        )


def load_settings(found: Mapping[str, Any], without_replicas: bool) -> dict[str, str]:
    """Return the settings to change during a load, without those that already have the value."""
    wanted = {"index.refresh_interval": "-1"}
    if without_replicas and found.get("index.auto_expand_replicas", "false") == "false":
        wanted["index.number_of_replicas"] = "0"
    return {name: value for name, value in wanted.items() if found.get(name) != value}


class TargetIndex:
    """An index that is about to be filled, from the lock to the last count.

        target = TargetIndex(manager, "my_index_primary")
        target.claim()                      # locked, recovered after a crashed run, no task is using it
        with target.fill():                 # marked as unfinished, settings of a load
            ...                             # empty it, add documents
            target.restore_settings()
            ...                             # count
                                            # the marker is removed: only now is the index finished

    State after a kill, by the last request that was sent. The next script that fills or empties the index, on any
    host, recovers it and starts over: `claim` restores the settings, and the end of a successful `fill` removes the
    marker (not with `bulkupdate.py --no-cleanup`). Until then, switch_alias.py refuses the index, and reindex.py does
    not copy it.

        marker written            marker; all documents are there
        settings changed          marker, refresh interval -1 (then 0 replicas, if requested)
        new fields                the same, and the fields, which stay
        deletion, documents       the same, and some of the documents; a server-side task may be running: claim()
                                  cancels tasks of this host, waits WAIT_SECONDS for those of others
        settings restored         marker; the documents are not counted
        marker removed            nothing to recover

    index_cleanup.py adds the states of an index that is recreated. If the marker cannot be written, an unfinished index
    cannot be recognized.
    """

    def __init__(self, manager: OpenSearchBaseManager, name: str, *, shared: bool = False) -> None:
        self.manager, self.name, self.shared = manager, name, shared
        self.marker = Marker(manager, name)
        self.uuid = ""
        self.found: dict[str, Any] = {}  # aliases, mappings and settings at the claim
        self.emptied = False  # true as soon as a deletion may have begun
        self.was_unfinished = False  # when `fill` began
        self.obstacles: Sequence[str] = TO_FILL

    def claim(self, *, may_be_live: bool = False, may_be_missing: bool = False, alias: str = "") -> None:
        """Lock the index and recover it; a dry run changes nothing.

        With `may_be_live` and `alias`, only this alias may point at the index: it will be moved before the load. Raises
        Locked, Refused (such as: it is live, or another client's task is using it) or OperationFailed (it is missing).
        """
        self.manager.lock(self.name, shared=self.shared)
        found = self.manager.read_index(self.name, accept=[403, 404])
        self.require_permissions(found is not None)
        found = self.recover_index(found)
        self.marker = Marker(self.manager, self.name)
        if may_be_missing and not found and not self.manager.name_exists(self.name):
            return
        found = self.read(found)
        refuse_unusable(self.name, found, self.obstacles)
        if not may_be_missing and self.await_primaries():  # a clone replaces a red index
            found = self.read()
        if not may_be_live:
            self.refuse_live(found)
        elif alias and (others := sorted({*found["aliases"]} - {alias})):
            arguments = ["--alias", others[0], "--source", self.name, "--target", "ITS_OWN_INDEX"]
            raise Refused(
                f"index {self.name} is to be emptied, but alias {', '.join(others)} also points at it; nothing was "
                f"changed. Give that alias its own index and move it there: "
                f"{script_command('switch_alias.py', *arguments)}"
            )
        elif aliases := ", ".join(sorted(found["aliases"])):
            log.info("index %s is live: alias %s points at it", self.name, aliases)
        if self.manager.await_tasks(self.name, exclusive=not self.shared):
            found = self.read()
        self.marker.recover(found)

    def read(self, found: dict[str, Any] | None = None) -> dict[str, Any]:
        """Store the state of the index (`found`, or read now) and return it; `uuid` keeps the first value read."""
        self.found = found or self.manager._verify_index_exists(self.name)
        self.uuid = self.uuid or self.found["settings"]["index.uuid"]
        return self.found

    def require_permissions(self, exists: bool) -> None:
        """Raise OperationFailed if the user lacks a permission that the script needs."""
        probes = [probe for probe in self.manager.probes if exists or "_bulk" not in probe.path]  # see bulk_probe
        require_permissions(self.manager, probes)

    def await_primaries(self) -> bool:
        return await_primaries(self.manager, self.name, self.manager.settings.retry_seconds)

    def recover_index(self, found: dict[str, Any] | None) -> dict[str, Any] | None:
        """Recover a missing index and return its state; a hook, since only ClearableIndex has a backup."""
        return found

    def refuse_live(self, found: Mapping[str, Any] | None = None) -> None:
        """Raise Refused if an alias points at the index; without `found`, its state is read now."""
        if aliases := sorted((found or self.manager._verify_index_exists(self.name))["aliases"]):
            raise Refused(
                f"index {self.name} is live: alias {', '.join(aliases)} points at it; its documents are unchanged. "
                "Give the name of the other index, or move readers to the other index first (switch_alias.py)"
            )

    def verify_same(self) -> None:
        self.manager.verify_same_index(self.name, self.uuid)

    @contextlib.contextmanager
    def fill(self, *, loading: bool = True, without_replicas: bool = False) -> Iterator[None]:
        """Mark the index as unfinished until the body has succeeded.

        With `loading`, the refresh interval is -1 (and replicas 0, if requested) unless the marker cannot be written;
        the body calls `restore_settings` before it counts. If the body fails, the settings are restored here (if that
        fails, by `claim` of the next run), and the marker stays, unless the body raised Refused before any deletion.
        """
        found = self.manager._verify_index_exists(self.name)
        self.refuse_live(found)
        former = self.marker.read(found)
        self.was_unfinished = former is not None
        wanted = load_settings(found["settings"], without_replicas) if loading else {}
        try:
            if self.marker.write(found, wanted):
                self._change_settings(wanted)
            yield
        except BaseException as failure:
            try:
                run_to_completion(self.restore_settings)
                if isinstance(failure, Refused) and not self.emptied:
                    self.marker.replace(former)
            except OperationFailed as error:
                log.error("index %s: its settings or its marker are not restored yet; the next run restores them: %s",
                          self.name, error)  # fmt: skip
            raise
        self.verify_same()
        self.marker.replace()  # only now is the index finished

    def restore_settings(self) -> None:
        """Restore the settings that `fill` has changed."""
        if self.marker.own:
            self.marker.restore_settings(self.marker.own)

    def _change_settings(self, wanted: Mapping[str, str]) -> None:
        for name, value in wanted.items():
            try:
                self.manager.request("PUT", f"/{self.name}/_settings", {name: value})
            except OutcomeUnknown:
                raise
            except RequestFailed as error:  # Multi-AZ with Standby enforces replicas, some domains an interval
                log.warning("index %s: continuing without %s=%s: %s", self.name, name, value, error)


# --- definitions of fields --------------------------------------------------------------------------------------------


def parents_of(name: str) -> set[str]:
    """Return the objects that contain a field: `a` and `a.b` for `a.b.c`."""
    return set(itertools.accumulate(name.split(".")[:-1], "{}.{}".format))


def field_definitions(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the full path and the definition of each field of a mapping, objects included.

    The definition of an object lacks `properties`: they follow as separate fields; multi-fields (`fields`) stay in it.
    It also lacks `type: object`, which the server omits as soon as the object has a field.
    """
    for name, definition in mapping.get("properties", {}).items():
        yield prefix + name, {key: value for key, value in definition.items()
                              if key != "properties" and (key, value) != ("type", "object")}  # fmt: skip
        yield from field_definitions(definition, f"{prefix}{name}.")
