"""What the scripts of the refresh suite share: settings, credentials, HTTP, tasks, locks, the note, logs, exit codes.

A script subclasses `OpenSearchBaseManager` once and hands its work to `run_cli`. Failures, with their exit codes:

    RefreshError (1)             the operation failed
    +-- RequestFailed (1)        the cluster refused a request: status, error type and reason
    |   +-- OutcomeUnknown (1)   no answer came back: the request may or may not have been carried out
    +-- ConfigurationError (2)   a flag or variable is wrong; nothing was sent
    +-- TooManyRejects (3)       finished, but more documents were rejected than accepted by MAX_REJECTS
    +-- Refused (4)              a safety check said no; this step changed nothing
    +-- Locked (75)              another run holds the lock
    Interrupted (128 + signal)   a BaseException, so that no handler of errors swallows it
"""

from __future__ import annotations

import argparse
import atexit
import base64
import contextlib
import fcntl
import gc
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

try:
    import requests
    import urllib3
    from dotenv import load_dotenv
    from requests.adapters import HTTPAdapter
    from requests.auth import AuthBase
    from urllib3.util.ssl_ import create_urllib3_context
except ImportError as missing:
    print(f"{missing.name} is not installed: pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2) from None

SUITE = "opensearch-refresh"  # in the X-Opaque-Id of every request and as the key of the note
HERE = Path(__file__).resolve().parent
ENV_FILE = HERE / ".env"
HOST = socket.gethostname()
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 120  # a _refresh of a large index is the slowest answer that is waited for
FIRST_CONTACT_S = 10  # a wrong endpoint shows at once; RETRY_SECONDS is for a cluster that was there before
CLEANUP_S = 20  # after a signal: supervisors send SIGKILL 30 s after SIGTERM, or later
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30
RETRY_AFTER_MAX_S = 60  # some proxies say an hour
POLL_FIRST_S, POLL_MAX_S = 0.1, 2  # short tasks end fast, long ones are not asked too often
PROGRESS_EVERY_S = 30  # in a log file; a terminal is renewed at most five times a second
PROGRESS_TTY_S = 0.2
CERTIFICATE_ADVICE = "renew the certificate, use the host name it is for, or set CA_BUNDLE to its CA"
MAX_CONNECTIONS = 64  # a pool, not a target: connections are opened when needed
GC_THRESHOLD = 50_000  # new objects; the AWS service models are many small ones, none garbage: 40 ms a run saved

log = logging.getLogger(SUITE)
Parsed = TypeVar("Parsed")


class RefreshError(Exception):
    """The operation failed; `result` is what can be reported all the same."""

    exit_code = 1

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result


class RequestFailed(RefreshError):
    """The cluster refused a request; `status` is 0 when there was no answer at all."""

    def __init__(self, message: str, status: int = 0, kind: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.status, self.kind, self.reason = status, kind, reason


class OutcomeUnknown(RequestFailed):
    """No answer to a request that must not be repeated blindly: read the state before anything else."""


class ConfigurationError(RefreshError):
    exit_code = 2


class TooManyRejects(RefreshError):
    exit_code = 3


class Refused(RefreshError):
    exit_code = 4


class Locked(RefreshError):
    exit_code = 75


class Interrupted(BaseException):
    """SIGHUP, SIGINT or SIGTERM arrived; raised in the main thread so that every `finally` runs."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


# --- settings: flag before environment before .env before default -----------------------------------------------------


def load_env_file() -> None:
    """Add the variables of .env to those of the environment. Raises ConfigurationError when it cannot be read."""
    try:
        load_dotenv(ENV_FILE, interpolate=False)  # a password may hold a dollar sign
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{ENV_FILE} cannot be read: {type(error).__name__}; give it to this user, as UTF-8"
        ) from None


def setting(name: str, default: str = "") -> str:
    """Return a variable of the environment (or of .env, once it is loaded); an empty one counts as unset."""
    return os.environ.get(name) or default


def parsed_setting(name: str, default: str, parse: Callable[[str], Parsed]) -> Parsed:
    try:
        return parse(setting(name, default))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigurationError(f"{name}: {error}") from None


def number(text: str) -> float:
    """Parse a number >= 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 <= value < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")
    return value


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def either(*allowed: str) -> Callable[[str], str]:
    """Return a parser that accepts these words alone."""

    def word(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r} is neither {' nor '.join(allowed)}")
        return text

    return word


def index_name(text: str) -> str:
    """Accept the name of one index or alias: no pattern, list or date math, which would reach other indices."""
    if not re.fullmatch(r"[^-_+A-Z\s\\/*?\"<>|,#:%][^A-Z\s\\/*?\"<>|,#:%]*", text) or text in (".", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of an index (lower case, no pattern, no list)")
    return text


def add_common_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="make all checks, change nothing")


def add_replicas_arg(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-replicas", action="store_true",
        help="replicas 0 while loading, faster and without a second copy meanwhile (env: LOAD_WITHOUT_REPLICAS)",
    )  # fmt: skip


def wants_no_replicas(args: argparse.Namespace) -> bool:
    return args.no_replicas or parsed_setting("LOAD_WITHOUT_REPLICAS", "false", boolean)


def endpoint_url(text: str) -> str:
    """Return the endpoint with a scheme and without a trailing slash. Raises ConfigurationError, never quoting it."""
    url = text.strip().rstrip("/")
    try:
        parts = urlsplit(url if "://" in url else f"https://{url}")
        _ = parts.port  # is only parsed here
    except ValueError:
        raise ConfigurationError("the endpoint is not a URL such as https://host:9200") from None
    if "@" in parts.netloc:
        raise ConfigurationError("the endpoint holds a user or password; give them by variables of their own")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigurationError("the endpoint is not a URL such as https://host:9200")
    if parts.hostname.endswith(".aoss.amazonaws.com"):
        raise ConfigurationError("OpenSearch Serverless has no _reindex, _refresh and _tasks; give a domain")
    return parts.geturl()


def certificate_check() -> bool | str:
    """Return what `requests` takes as `verify`: a CA file, True, or False (the default)."""
    bundle = setting("CA_BUNDLE")
    if bundle and not Path(bundle).is_file():
        raise ConfigurationError(f"CA_BUNDLE: {bundle} is not a file; give that of the CA")
    return bundle or parsed_setting("VERIFY_SSL", "false", boolean)


def own_folder(name: str, default: str) -> Path:
    """Return the folder that a variable names; a relative one is beside the scripts, whatever directory cron uses."""
    return HERE / setting(name, default)


@dataclass(frozen=True)
class Settings:
    """What all scripts need to know, resolved once; the password is in no repr."""

    endpoint: str
    username: str  # empty where requests are signed instead
    password: str = field(repr=False)
    verify: bool | str
    retry_seconds: float
    wait_seconds: float
    lock_dir: Path
    log_dir: Path

    @classmethod
    def load(cls, aws: Aws) -> Settings:
        """Read variables, then the credentials. Raises ConfigurationError, or RefreshError when the store refuses."""
        signed = parsed_setting("OPENSEARCH_AUTH", "basic", either("basic", "sigv4")) == "sigv4"
        checked: dict[str, Any] = {
            "verify": certificate_check(),
            "retry_seconds": parsed_setting("RETRY_SECONDS", "300", number),
            "wait_seconds": parsed_setting("WAIT_SECONDS", "900", number),
            "lock_dir": own_folder("LOCK_DIR", ".locks"),
            "log_dir": own_folder("LOG_DIR", "logs"),
        }
        endpoint, username, password = (signed_endpoint(aws), "", "") if signed else credentials(aws)
        if ":" in username:
            raise ConfigurationError("a user name with a colon cannot be sent by Basic authentication; give another")
        return cls(endpoint=endpoint_url(endpoint), username=username, password=password, **checked)


def credentials(aws: Aws) -> tuple[str, str, str]:
    """Return endpoint, user and password from the environment, or else from Parameter Store."""
    names = ["OPENSEARCH_ENDPOINT", "OPENSEARCH_USERNAME", "OPENSEARCH_PASSWORD"]
    given = [setting(name) for name in names]
    if all(given):
        return given[0], given[1], given[2]
    if any(given):
        unset = [name for name, value in zip(names, given) if not value]
        raise ConfigurationError(f"{' and '.join(unset)}: not set; set all three, or none to use Parameter Store")
    endpoint, username, password = stored(aws, "endpoint", "username", "password")
    return endpoint, username, password


def signed_endpoint(aws: Aws) -> str:
    """Return the endpoint alone, from the environment or else from Parameter Store."""
    return setting("OPENSEARCH_ENDPOINT") or stored(aws, "endpoint")[0]


def stored(aws: Aws, *parameters: str) -> list[str]:
    """Return the values below OPENSEARCH_PARAMETER_PREFIX, SecureString or not, read in one call."""
    prefix = setting("OPENSEARCH_PARAMETER_PREFIX", "/opensearch").rstrip("/")
    names = [f"{prefix}/{name}" for name in parameters]
    with aws_errors(f"Parameter Store, {prefix}/*", "ssm:GetParameters (and kms:Decrypt for a key of your own)"):
        answer = aws.client("ssm").get_parameters(Names=names, WithDecryption=True)
    if missing := answer["InvalidParameters"]:
        raise RefreshError(f"Parameter Store: {', '.join(missing)}: no such parameter in this region; create it")
    values = {parameter["Name"]: parameter["Value"] for parameter in answer["Parameters"]}
    return [values[name] for name in names]


# --- AWS --------------------------------------------------------------------------------------------------------------


class Aws:
    """The boto3 clients of one run, made when they are needed; a session of each one's own costs 35 ms more."""

    @cached_property
    def session(self) -> Any:
        """Return the session; AWS_REGION is handed on, since boto3 reads only AWS_DEFAULT_REGION."""
        import boto3  # slow to import: --help and runs without AWS do without it

        session = boto3.session.Session(region_name=setting("AWS_REGION") or None)
        if not session.region_name:
            raise ConfigurationError("no AWS region: set AWS_REGION")
        return session

    def client(self, service: str, *, attempts: int = 5, read_timeout_s: float = 60) -> Any:
        """Return a client; with `attempts=1` for a caller that has a Retry of its own around it."""
        from botocore.config import Config

        retries: Any = {"mode": "standard", "total_max_attempts": attempts}
        config = Config(
            connect_timeout=CONNECT_TIMEOUT_S, read_timeout=read_timeout_s, retries=retries, max_pool_connections=16
        )
        return self.session.client(service, config=config)


class SignedAuth(AuthBase):
    """Signs each request as it is sent; botocore renews credentials that come from a role before they expire."""

    def __init__(self, aws: Aws) -> None:
        with aws_errors("AWS credentials", "sts:AssumeRole"):
            self.credentials, self.region = aws.session.get_credentials(), aws.session.region_name
        if self.credentials is None:
            raise ConfigurationError("OPENSEARCH_AUTH: no AWS credentials; give them by role, profile or variables")

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
    """Translate botocore's exceptions; `permission` is the IAM action that `what` needs."""
    from botocore.exceptions import (
        BotoCoreError, ClientError, CredentialRetrievalError, NoCredentialsError, PartialCredentialsError,
        ProfileNotFound,
    )  # fmt: skip

    try:
        yield
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise ConfigurationError(f"{what}: {error}; give the AWS credentials by role, profile or variables") from None
    except ClientError as error:
        code, text = error.response["Error"].get("Code", "?"), error.response["Error"].get("Message", "")
        raise RefreshError(f"{what}: {code}: {text}; {aws_advice(code, permission)}") from None
    except (CredentialRetrievalError, RuntimeError) as error:  # RuntimeError: renewed ones that have expired again
        raise RefreshError(f"{what}: {error}; renew the AWS credentials and run again") from None
    except BotoCoreError as error:
        raise RefreshError(f"{what}: {error}; check AWS_REGION and the network, and run again") from None


def aws_advice(code: str, permission: str) -> str:
    if code in ("AccessDenied", "AccessDeniedException", "403"):
        return f"the IAM policy has to allow {permission}"
    if "Expired" in code or code in ("InvalidAccessKeyId", "InvalidToken", "UnrecognizedClientException"):
        return "renew the AWS credentials and run again"
    if code in ("SlowDown", "ServiceUnavailable", "InternalError", "InternalServerError") or "Throttl" in code:
        return "AWS is busy: run again later"
    return "check its name and the region"


# --- output -----------------------------------------------------------------------------------------------------------


class LogFormatter(logging.Formatter):
    """One line a message, UTC; control characters are escaped, so that no cell or header can forge a line."""

    converter = staticmethod(time.gmtime)
    CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

    def __init__(self, script: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {script}: %(message)s", "%Y-%m-%dT%H:%M:%SZ")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = self.CONTROL.sub(lambda match: repr(match[0])[1:-1], record.message)
        return super().formatMessage(record)


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]  # has no [] before Python 3.11
    """Writes to stderr; on a terminal it first wipes the progress line."""

    def format(self, record: logging.LogRecord) -> str:
        return ("\r\x1b[K" if self.stream.isatty() else "") + super().format(record)


def set_up_logging(script: str) -> None:
    """Log this suite only: botocore's and urllib3's own lines would carry what must not be written."""
    logging.raiseExceptions = False  # a closed stderr or a full disk under it must not stop a load
    handler = LogHandler(sys.stderr)
    handler.setFormatter(LogFormatter(script))
    log.handlers[:] = [handler]
    log.propagate = False
    level = setting("LOG_LEVEL", "INFO").upper()
    if level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ConfigurationError(f"LOG_LEVEL: {level} is none of DEBUG, INFO, WARNING, ERROR")
    log.setLevel(level)


def seconds_since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def per_second(count: float, began: float) -> int:
    return round(count / max(time.monotonic() - began, 0.001))


class Progress:
    """One line that renews itself on a terminal; a plain line every 30 s otherwise."""

    def __init__(self, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self.shown < (PROGRESS_TTY_S if self.live else PROGRESS_EVERY_S):
            return
        self.shown = now
        if not self.live:
            log.info("%s", self._line(done, note))
            return
        width = shutil.get_terminal_size().columns - 1
        with contextlib.suppress(OSError):
            print(f"\r\x1b[K{self._line(done, note)[:width]}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.live:
            with contextlib.suppress(OSError):
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _line(self, done: int, note: str) -> str:
        """Return what counts first: a terminal of 80 columns may cut the rest off."""
        rate = done / max(self.shown - self.began, 0.001)
        share = f"{done * 100 // self.total} %, " if self.total else ""
        left = f"{timedelta(seconds=round(max(self.total - done, 0) / rate))} left, " if self.total and rate else ""
        of_all = f" of {self.total:,}" if self.total else ""
        return f"{self.label}: {share}{left}{done:,}{of_all} {self.unit}, {rate:,.0f}/s{note and ', ' + note}"


# --- the command line: signals, exceptions, exit codes ----------------------------------------------------------------

interrupted = threading.Event()  # set by the first signal: what is left to do is clean-up, and bounded
_cleanup_deadline = math.inf


def _on_signal(number: int, _frame: object) -> None:
    global _cleanup_deadline
    if not interrupted.is_set():  # a repeated one must not break the clean-up off
        _cleanup_deadline = time.monotonic() + CLEANUP_S
        interrupted.set()
        raise Interrupted(number)


def finished_in_any_case(action: Callable[[], None]) -> None:
    """Run a clean-up after a failure; a first signal that breaks it off makes it run again, in the 20 s then left."""
    try:
        action()
    except Interrupted:
        action()
        raise


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Turn SIGHUP, SIGINT and SIGTERM into `Interrupted`; a SIGHUP that nohup ignores stays ignored."""
    interrupted.clear()
    caught = [signal.SIGINT, signal.SIGTERM]  # SIGINT even where a shell's `&` has it ignored
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        caught = []
    before = {number: signal.signal(number, _on_signal) for number in caught}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_result(result: Mapping[str, Any] | str | None) -> None:
    """Print the one line of stdout: the result as JSON, or a plain answer. A closed stdout undoes nothing."""
    if result is None:
        return
    try:
        print(result if isinstance(result, str) else json.dumps(result), flush=True)
    except OSError as error:
        log.warning("the result could not be written to stdout: %s", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains once more when it ends


def run_cli(
    build_parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], Mapping[str, Any] | str | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Load .env, parse, carry the command out, and return the exit code."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  # started with 2>&-
    try:
        load_env_file()
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    try:
        parser = build_parser()
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed usage or help
        return int(stop.code or 0)
    gc.set_threshold(GC_THRESHOLD)
    atexit.register(gc.freeze)  # or Python ends with a search for garbage among them: 90 ms
    return carry_out(parser.prog.removesuffix(".py"), lambda: run(args))


def carry_out(script: str, work: Callable[[], Mapping[str, Any] | str | None]) -> int:
    """Do the work, print its result, and return the exit code: the only place where exceptions become one."""
    try:
        set_up_logging(script)
        with signals_as_exceptions():
            result = work()
    except RefreshError as error:
        log.error("%s", error)
        print_result(error.result)
        return error.exit_code
    except Interrupted as error:
        log.error("stopped by %s", error)
        return error.exit_code
    except ModuleNotFoundError as error:
        log.error("%s is not installed: pip install -r requirements.txt", error.name)
        return 2
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        log.error(
            "unexpected %s at %s:%s; LOG_LEVEL=DEBUG shows the traceback",
            type(error).__name__, Path(place.filename).name, place.lineno,
        )  # fmt: skip
        log.debug("traceback", exc_info=True)
        return 1
    print_result(result)
    return 0


# --- HTTP -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A response of the cluster; `resent` says that an earlier sending may have been carried out as well."""

    status: int
    body: bytes
    resent: bool = False
    throttled: bool = False  # the cluster answered 429 before

    @property
    def data(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            start = self.body[:80].decode(errors="replace")
            raise RequestFailed(f"not an answer of OpenSearch (is the endpoint right?): {start!r}") from None


def innermost(error: BaseException) -> str:
    """Return the reason at the bottom of an exception's chain: `[Errno 111] Connection refused`, not its wrappers."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return str(error) or type(error).__name__


def was_never_sent(error: requests.RequestException) -> bool:
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    return isinstance(reason, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError))


def error_of(body: bytes) -> tuple[str, str]:
    """Return type and reason of an error answer; `error` may be an object, a string, or no JSON at all."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return "", re.sub(r"<[^>]*>|\s+", " ", body[:300].decode(errors="replace")).strip()
    if not isinstance(error, dict):
        return "", str(error)
    cause = (error.get("root_cause") or [error])[0]
    return str(cause.get("type") or error.get("type")), str(cause.get("reason") or error.get("reason"))


def backoff_s(attempt: int, retry_after: str | None = None) -> float:
    """Return the seconds before the next attempt: exponential with jitter, or what `Retry-After` asks, capped."""
    delay: float = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** min(attempt, 10)) * random.uniform(0.5, 1)
    if retry_after:
        with contextlib.suppress(urllib3.exceptions.InvalidHeader):
            asked = urllib3.Retry().parse_retry_after(retry_after)  # seconds or a date
            delay = max(delay, min(float(asked), RETRY_AFTER_MAX_S))
    return delay


class Retry:
    """Says whether there is another attempt, and waits for it: for `limit_s` in all, or since the last progress."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.restart()

    def restart(self) -> None:
        """Begin anew, after progress."""
        self.began, self.attempt = time.monotonic(), 0

    def wait(self, why: str, retry_after: str | None = None) -> bool:
        """Log why, sleep and return True, or return False when the time is up (or a signal has arrived)."""
        delay = backoff_s(self.attempt, retry_after)
        if interrupted.is_set() or time.monotonic() + delay > self.began + self.limit_s:
            return False
        log.warning("%s; trying again in %.1f s", why, delay)
        self.attempt += 1
        time.sleep(delay)
        return True


class OpenSearchBaseManager:
    """One connection to one cluster, and the verbs that two scripts or more need.

    Use it as a context manager: leaving it cancels tasks of this run that are still under way (after a failure),
    releases the locks and closes the connections.
    """

    def __init__(self, *, dry_run: bool = False) -> None:
        self.dry_run = dry_run
        self.aws = Aws()
        self.settings = Settings.load(self.aws)
        self.opaque_id = f"{SUITE}/{HOST}/{uuid.uuid4().hex[:12]}"
        self._session = self._open_session()
        self._answered = False
        self._version: tuple[int, int] | None = None
        self._uuids: dict[str, str] = {}
        self._locks: list[int] = []
        self._task_started = False
        source = "the environment" if setting("OPENSEARCH_PASSWORD") else "Parameter Store"
        who = f"user {self.settings.username} (from {source})" if self.settings.username else "signed AWS requests"
        log.info("cluster %s, %s%s", self.settings.endpoint, who, ", dry run: nothing is changed" if dry_run else "")

    def __enter__(self: Parsed) -> Parsed:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None and self._task_started:
                finished_in_any_case(self._cancel_own_tasks)
        except RefreshError as error:
            log.error("tasks of this run may still be under way; the next run cancels them: %s", error)
        finally:
            for lock in self._locks:
                os.close(lock)
            self._session.close()

    def _open_session(self) -> requests.Session:
        session = requests.Session()
        session.trust_env = False  # neither ~/.netrc nor a proxy's variables decide who we log in as
        session.verify = self.settings.verify
        session.headers["X-Opaque-Id"] = self.opaque_id
        if self.settings.username:
            session.headers.update(self._create_auth_header())
        else:
            session.auth = SignedAuth(self.aws)
        adapter = HTTPAdapter()  # without retries: they are in request(), alone
        # without a context each connection reads the system's CA certificates (15 ms), needed or not
        unverified = None if self.settings.verify else create_urllib3_context(cert_reqs=ssl.CERT_NONE)
        adapter.init_poolmanager(1, MAX_CONNECTIONS, ssl_context=unverified)
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        if self.settings.endpoint.startswith("http://"):
            log.warning("the endpoint is http://: password and data travel in the clear")
        elif not self.settings.verify:
            log.warning("certificates are not verified; VERIFY_SSL=true or CA_BUNDLE=file does")
            urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        return session

    def _create_auth_header(self) -> dict[str, str]:
        """Return the Basic header; UTF-8, so that a password may hold any character."""
        pair = f"{self.settings.username}:{self.settings.password}".encode()
        return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        repeatable: bool = True,
        patient: bool = True,
        accept: Sequence[int] = (),
    ) -> Answer:
        """Send one request (bytes are sent as NDJSON, anything else as JSON) and return the answer.

        Connection errors, 502, 503, 504 and 429 are tried again with growing pauses, for RETRY_SECONDS in all; for 10 s
        before the cluster has answered once, and for 20 s after a signal. A request with `repeatable=False` is only
        sent again when it was certainly not carried out; otherwise OutcomeUnknown is raised. With `patient=False` it is
        not sent again at all. Statuses in `accept` are returned, every other failure raises RequestFailed.
        """
        failure: RequestFailed
        began, attempt, resent, throttled = time.monotonic(), 0, False, False
        what = f"{method} {path}"
        while True:
            try:
                response = self._send(method, path, body, params)
            except requests.RequestException as error:
                failure, never_sent, retry_after = self._lost(what, error), was_never_sent(error), None
            else:
                status, retry_after = response.status_code, response.headers.get("Retry-After")
                self._answered = True
                if status < 300 or status in accept:
                    log.debug("%s: %s in %.2f s", what, status, time.monotonic() - began)
                    return Answer(status, response.content, resent, throttled)
                failure = self._failure(what, status, response.content)
                if not isinstance(failure, OutcomeUnknown) and (status != 429 or "block" in failure.kind):
                    raise failure
                never_sent = status == 429
                throttled = throttled or never_sent
            resent = resent or not never_sent
            if not (patient and (repeatable or never_sent)):
                raise failure
            delay = backoff_s(attempt, retry_after)
            if time.monotonic() + delay > self._deadline(began):
                failure.args = (f"{failure}{self._after_giving_up(began)}",)
                raise failure
            attempt += 1
            log.warning("%s; trying again in %.1f s", failure, delay)
            time.sleep(delay)

    def _send(self, method: str, path: str, body: Any, params: Mapping[str, Any] | None) -> requests.Response:
        ndjson = isinstance(body, bytes)
        content = body if ndjson or body is None else json.dumps(body).encode()
        now, hurried = time.monotonic(), interrupted.is_set() or not self._answered
        return self._session.request(
            method, self.settings.endpoint + path, params=params, data=content,
            headers={"Content-Type": "application/x-ndjson" if ndjson else "application/json"},
            timeout=(CONNECT_TIMEOUT_S, max(1, self._deadline(now) - now) if hurried else READ_TIMEOUT_S),
            allow_redirects=False,  # credentials go to the endpoint and nowhere else
        )  # fmt: skip

    def _lost(self, what: str, error: requests.RequestException) -> OutcomeUnknown:
        """Return the failure of a request without an answer. Raises RequestFailed for a certificate that is refused."""
        if isinstance(error, requests.exceptions.SSLError) and "CERTIFICATE" in str(error):
            raise RequestFailed(f"{what}: {innermost(error)}; {CERTIFICATE_ADVICE}") from None
        return OutcomeUnknown(f"{what} at {self.settings.endpoint}: {innermost(error)}")

    def _deadline(self, began: float) -> float:
        """Return until when a request may be tried that was first sent at `began` (both of the monotonic clock)."""
        if interrupted.is_set():
            return _cleanup_deadline
        return began + (self.settings.retry_seconds if self._answered else FIRST_CONTACT_S)

    def _after_giving_up(self, began: float) -> str:
        what_to_do = "check the endpoint, and whether the cluster is up"
        if self._answered:
            what_to_do = "look at GET _cluster/health and run again"
        return f"; given up after {seconds_since(began):.0f} s: {what_to_do}"

    def _failure(self, what: str, status: int, body: bytes) -> RequestFailed:
        kind, reason = error_of(body)
        text = f"{what}: {status} {kind and kind + ': '}{reason}{self._advice(status, kind, reason)}"
        unknown = status in (502, 503, 504)  # a load balancer gave up, or the cluster is not ready
        return (OutcomeUnknown if unknown else RequestFailed)(text, status, kind, reason)

    def _advice(self, status: int, kind: str, reason: str) -> str:
        user = f"user {self.settings.username}" if self.settings.username else "the AWS credentials"
        if not self.settings.username and status in (401, 403) and not kind:  # AWS itself, before the cluster
            return "; renew the AWS credentials, or let their policy allow es:ESHttp* on the domain"
        if status == 401:
            return f"; {user} is not accepted: check user and password"
        if status == 403 and "security" in kind:
            missing = re.search(r"no permissions for \[(.*?)\](?=\s|$)", reason)
            return f"; the role of {user} lacks {missing[1] if missing else 'a permission'}"
        if "block" in kind:
            disk = "flood" in reason
            return f"; {'free disk space on the data nodes' if disk else 'remove the block (index.blocks.*)'} first"
        if 300 <= status < 400:
            return "; a redirect is not followed: give the final address as the endpoint"
        return ""

    def version(self) -> tuple[int, int]:
        """Return major and minor of the cluster's version, asked for once."""
        if not self._version:
            found = self.request("GET", "/").data["version"]["number"]
            major, minor = found.split(".")[:2]
            self._version = int(major), int(minor)
            log.debug("version %s", found)
        return self._version

    # --- indices ---

    def _verify_index_exists(self, index: str) -> dict[str, Any]:
        """Return the flat settings of an index and note its UUID. Raises RefreshError for an alias or a missing one."""
        answer = self.request("GET", f"/{index}/_settings", params={"flat_settings": "true"}, accept=[404])
        if answer.status == 404:
            raise RefreshError(f'index {index} does not exist; create it first (README, "Setting up")')
        found: dict[str, Any] = answer.data
        if index not in found:
            raise RefreshError(f"{index} is an alias of {', '.join(sorted(found))}; give the index itself")
        settings: dict[str, Any] = found[index]["settings"]
        self._uuids.setdefault(index, settings["index.uuid"])
        return settings

    def _verify_same_index(self, index: str) -> None:
        """Raise RefreshError when an index of this name is no longer the one that was seen first."""
        if self._verify_index_exists(index)["index.uuid"] != self._uuids[index]:
            raise RefreshError(
                f"index {index} was deleted and created anew by somebody else meanwhile; see that its mapping is "
                "right, and run again"
            )

    def _check_index_aliases(self, index: str) -> list[str]:
        """Return the aliases that point at an index; any one makes it live."""
        return sorted(self.request("GET", f"/{index}/_alias").data[index]["aliases"])

    def _refuse_live(self, index: str) -> None:
        if aliases := self._check_index_aliases(index):
            raise Refused(
                f"index {index} is live: alias {', '.join(aliases)} points at it; nothing was changed. Give the other "
                "index, or move readers there first (switch_alias.py)"
            )

    def _on_primaries(self) -> dict[str, str]:
        """Return what makes a search ask the primary copies, since replicas may lag (segment replication)."""
        return {"preference": "_primary"} if self.version() >= (2, 8) else {}  # 1.3 refuses it

    def _get_index_count(self, index: str) -> int:
        """Refresh, then count."""
        self._whole(self.request("POST", f"/{index}/_refresh").data, f"_refresh of {index}")
        answer = self.request("GET", f"/{index}/_count", params=self._on_primaries()).data
        self._whole(answer, f"_count of {index}")
        if answer["_shards"]["successful"] < answer["_shards"]["total"]:
            raise RefreshError(f"_count of {index}: not every shard answered; see GET _cluster/health/{index}")
        return int(answer["count"])

    @staticmethod
    def _whole(answer: Mapping[str, Any], what: str) -> None:
        if failed := answer["_shards"]["failed"]:
            raise RefreshError(f"{what}: {failed} shard(s) failed; see GET _cluster/allocation/explain")

    def _get_mapping(self, index: str) -> dict[str, Any]:
        mapping: dict[str, Any] = self.request("GET", f"/{index}/_mapping").data[index]["mappings"]
        return mapping

    # --- locks ---

    def lock(self, index: str, *, shared: bool = False) -> None:
        """Hold the lock of an index on this host until the end. Raises Locked when another run holds it."""
        path = self.settings.lock_dir / f"{index}.lock"
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self._locks.append(lock)
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"another run on this host works on index {index}; wait for it ({path})") from None
        except OSError as error:
            raise RefreshError(f"lock file {path}: {error.strerror}; set LOCK_DIR to a folder of your own") from None

    # --- tasks on the server ---

    def _tasks(self, **params: str) -> dict[str, dict[str, Any]]:
        nodes = self.request("GET", "/_tasks", params={"detailed": "true", **params}).data.get("nodes", {})
        return {name: task for node in nodes.values() for name, task in node["tasks"].items()}

    def _writing_tasks(self) -> dict[str, dict[str, Any]]:
        """Return the copy and by-query tasks of the cluster, each with its X-Opaque-Id, without their slices."""
        tasks = self._tasks(actions="*reindex,*byquery").items()
        return {
            name: {**task, "opaque_id": task.get("headers", {}).get("X-Opaque-Id", "")}
            for name, task in tasks if "parent_task_id" not in task
        }  # fmt: skip

    def _tasks_naming(self, index: str) -> dict[str, str]:
        """Return the X-Opaque-Id of each copy or by-query task that names the index, by task id."""
        return {
            name: task["opaque_id"] for name, task in self._writing_tasks().items()
            if index in re.split(r"[\[\],\s]+", task.get("description", ""))
        }  # fmt: skip

    def _settle_tasks(self, index: str, *, exclusive: bool = True) -> None:
        """Let no other task touch the index: cancel our orphans, wait for our other hosts', refuse a stranger's.

        Call it with the lock held: if exclusive, a task of ours from this host is an orphan of a run that died.
        """
        began, waiting = time.monotonic(), ""
        while named := self._tasks_naming(index):
            for task, opaque_id in named.items():
                if not opaque_id.startswith(f"{SUITE}/"):
                    raise Refused(f"task {task} of somebody else works on index {index}; wait for it or cancel it")
                if opaque_id.startswith(f"{SUITE}/{HOST}/") and exclusive and not self.dry_run:
                    log.warning("cancelling task %s on index %s, left by a run that died", task, index)
                    self.request("POST", f"/_tasks/{task}/_cancel", accept=[404])
            if self.dry_run:
                log.warning("task %s of another run works on index %s", ", ".join(named), index)
                return
            if time.monotonic() - began > self.settings.wait_seconds:
                raise Refused(f"task {', '.join(named)} of another run still works on index {index}; wait for it")
            if waiting != (waiting := ", ".join(named)):
                log.info("waiting for task %s of another run on index %s", waiting, index)
            time.sleep(1)

    def run_task(self, path: str, body: Any, *, label: str, total: int, **params: Any) -> dict[str, Any]:
        """Start a task on the server, follow it, and return its response once it is known to be whole.

        Raises RefreshError when it ended with an error, failures, a time-out or a cancellation, or vanished with its
        node. A lost answer to the start is looked up by X-Opaque-Id before it is started again.
        """
        progress, pause = Progress(label, total, "documents"), POLL_FIRST_S
        task = self._start_task(path, body, {**params, "wait_for_completion": "false"})
        while True:
            answer = self.request("GET", f"/_tasks/{task}", accept=[404])
            if answer.status == 404:
                raise RefreshError(f"{label}: task {task} vanished with its node, its outcome is unknown; run it again")
            if answer.data["completed"]:
                break
            progress.update(self._documents_done(task, answer.data["task"]["status"]))
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_MAX_S)
        progress.close()
        self._task_started = False
        return self._task_response(label, answer.data)

    def _start_task(self, path: str, body: Any, params: Mapping[str, Any]) -> str:
        began, action = time.monotonic(), path.rsplit("/_", 1)[1].replace("_by_query", "/byquery")
        self._task_started = True
        while True:
            try:
                return str(self.request("POST", path, body, params=params, repeatable=False).data["task"])
            except OutcomeUnknown as lost:
                log.warning("%s; looking whether the task was started", lost)
                time.sleep(BACKOFF_FIRST_S * 2)
                if started := [task for task, own in self._own_tasks().items() if own["action"].endswith(action)]:
                    return started[0]
                if time.monotonic() > self._deadline(began):
                    raise

    def _own_tasks(self) -> dict[str, dict[str, Any]]:
        return {name: task for name, task in self._writing_tasks().items() if task["opaque_id"] == self.opaque_id}

    def _documents_done(self, task: str, status: Mapping[str, Any]) -> int:
        """Return how far a task is; a sliced one knows nothing of it until its slices end, so they are summed."""
        parts = [status]
        if status.get("slices"):
            parts = [child["status"] for child in self._tasks(parent_task_id=task).values()]
            parts += [part for part in status["slices"] if part]
        return sum(part.get(kind, 0) for part in parts for kind in ("created", "updated", "deleted"))

    def _task_response(self, label: str, document: Mapping[str, Any]) -> dict[str, Any]:
        if error := document.get("error"):
            raise RefreshError(f"{label}: {self._reason_of(error)}")
        response: dict[str, Any] = document["response"]
        if failures := response.get("failures"):
            cause = failures[0].get("cause") or failures[0].get("reason") or failures[0]
            raise RefreshError(f"{label}: {len(failures)} failure(s), the first: {self._reason_of(cause)}")
        if response.get("canceled"):
            raise RefreshError(f"{label}: cancelled ({response['canceled']}); run it again")
        if response.get("timed_out"):
            raise RefreshError(f"{label}: timed out on the server; run it again")
        return response

    def _reason_of(self, error: Mapping[str, Any]) -> str:
        kind, reason = str(error.get("type")), str(error.get("reason"))
        return f"{kind}: {reason}{self._advice(0, kind, reason) or '; run it again'}"

    def _cancel_own_tasks(self) -> None:
        """Cancel what this run started and wait until it is gone, 20 s at most."""
        deadline = time.monotonic() + CLEANUP_S
        while (own := self._own_tasks()) and time.monotonic() < deadline:
            for task in own:
                log.warning("cancelling task %s", task)
                self.request("POST", f"/_tasks/{task}/_cancel", accept=[404])
            time.sleep(0.5)

    # --- the note: an index that holds it is unfinished ---

    def read_note(self, index: str) -> dict[str, Any] | None:
        """Return `{started, host, found, set}` of a load or copy that has not finished, or None."""
        note: dict[str, Any] | None = self._get_mapping(index).get("_meta", {}).get(SUITE)
        return note

    def _refuse_unfinished(self, index: str, what_to_do: str) -> None:
        if note := self.read_note(index):
            raise Refused(
                f"index {index} is unfinished: a load on {note.get('host')}, begun {note.get('started')}, has not "
                f"ended well; {what_to_do}"
            )

    def _write_note(self, index: str, note: Mapping[str, Any] | None) -> None:
        """Put our note into `_meta` beside what others keep there, or take it out; an update replaces all of it."""
        meta = {key: value for key, value in self._get_mapping(index).get("_meta", {}).items() if key != SUITE}
        self.request("PUT", f"/{index}/_mapping", {"_meta": meta if note is None else {**meta, SUITE: note}})

    def _put_right(self, index: str) -> None:
        """Put back the settings that a load that died left changed, before the first change of one's own.

        Its note stays until `unfinished` has replaced it and ended well: until then the index holds a part.
        """
        if (note := self.read_note(index)) is None:
            return
        log.warning("index %s is unfinished: a run on %s, begun %s, died", index, note.get("host"), note.get("started"))
        if not self.dry_run:
            self._put_back_settings(index, note)

    def _put_back_settings(self, index: str, note: Mapping[str, Any] | None) -> None:
        """Put back each setting that still has the value of the load; one that somebody changed since stays."""
        if not note or not note["set"]:
            return
        current = self._verify_index_exists(index)
        left = {name: value for name, value in note["found"].items() if current.get(name) == note["set"].get(name)}
        if left:
            self.request("PUT", f"/{index}/_settings", left)
            now = self._verify_index_exists(index)
            if wrong := [name for name, value in left.items() if now.get(name) != value]:
                raise RefreshError(f"index {index}: {', '.join(wrong)} could not be put back; run again")
            shown = (f"{name}={'default' if value is None else value}" for name, value in left.items())
            log.info("index %s: put back %s", index, ", ".join(shown))

    @contextlib.contextmanager
    def unfinished(
        self, index: str, *, loading: bool = True, without_replicas: bool = False
    ) -> Iterator[dict[str, Any] | None]:
        """Mark an index as unfinished until the body has ended well; yield the note, None where it cannot be written.

        With `loading`, its refresh interval is -1 meanwhile (and replicas are 0, if asked): the body puts them back by
        `_put_back_settings` before it counts. When it fails they are put back here and the note stays; where even that
        fails (or the process is killed), `_put_right` of the next run does it.
        """
        self._refuse_live(index)
        found, former_note = self._verify_index_exists(index), self.read_note(index)
        wanted = load_settings(found, without_replicas) if loading else {}
        wish = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": HOST,
            "found": {name: found.get(name) for name in wanted}, "set": wanted,
        }  # fmt: skip
        note: dict[str, Any] | None = wish  # before it is written: a signal may come in between
        try:
            if note := self._mark(index, wish):
                self._change_settings(index, wanted)
            yield note
        except BaseException as failure:
            try:
                finished_in_any_case(lambda: self._put_back_settings(index, note))
                if note and isinstance(failure, Refused):  # nothing was deleted yet, or another run has filled it
                    self._write_note(index, former_note)
            except RefreshError as error:
                log.error("index %s: its settings are not put back yet, the next run does it: %s", index, error)
            raise
        if note:
            self._write_note(index, None)

    def _mark(self, index: str, note: dict[str, Any]) -> dict[str, Any] | None:
        """Write the note and return it, or None where the cluster refuses it."""
        try:
            self._write_note(index, note)
            return note
        except OutcomeUnknown:
            raise
        except RequestFailed as error:
            log.warning("index %s: no note can be written, so its settings stay as they are: %s", index, error)
            return None

    def _change_settings(self, index: str, wanted: Mapping[str, str]) -> None:
        for name, value in wanted.items():
            try:
                self.request("PUT", f"/{index}/_settings", {name: value})
            except OutcomeUnknown:
                raise
            except RequestFailed as error:  # Multi-AZ with Standby fixes replicas, some domains a minimum interval
                log.warning("index %s: going on without %s=%s: %s", index, name, value, error)


def load_settings(found: Mapping[str, Any], without_replicas: bool) -> dict[str, str]:
    """Return what is changed for the time of a load, less what has that value already."""
    wanted = {"index.refresh_interval": "-1"}
    if without_replicas and found.get("index.auto_expand_replicas", "false") == "false":
        wanted["index.number_of_replicas"] = "0"
    return {name: value for name, value in wanted.items() if found.get(name) != value}


def field_definitions(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each field of a mapping, objects included, by its full path, with its definition less its sub-fields."""
    for name, definition in mapping.get("properties", {}).items():
        yield prefix + name, {key: value for key, value in definition.items() if key != "properties"}
        yield from field_definitions(definition, f"{prefix}{name}.")
