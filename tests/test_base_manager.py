"""What the four scripts share: settings, credentials, retries, secrets, logs, exit codes."""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from email.utils import formatdate
from pathlib import Path

import bulkupdate
import index_cleanup
import opensearch_base_manager as base
import pytest
import reindex
import sandbox
import switch_alias
from conftest import OWN, count, fill, on_terminal
from fault_proxy import answer, edited, lost_answer, refused

pytestmark = pytest.mark.quick

SCRIPTS = [bulkupdate, index_cleanup, reindex, switch_alias]
TOP = Path(base.__file__).parent
LINE = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR) index_cleanup: "
SECRETS = [sandbox.PASSWORD, base64.b64encode(f"{sandbox.USER}:{sandbox.PASSWORD}".encode()).decode()]


@pytest.fixture
def index(make_index):
    return make_index("index", {"n": {"type": "long"}}, docs=2)


@pytest.fixture(scope="module")
def lasting_index(box):
    index = f"{OWN}-lasting"
    box.server.request("PUT", f"/{index}", {})
    fill(box.server.request, index, [{"n": 1}, {"n": 2}])
    yield index
    box.server.request("DELETE", f"/{index}")


@pytest.fixture
def look(run, lasting_index):
    """The shortest run that asks the cluster seven different questions, and changes nothing."""
    return lambda: run(index_cleanup, "--index", lasting_index, "--dry-run")


@pytest.fixture
def variables(monkeypatch, tmp_path):
    """Set variables: `variables({"in .env": ...}, {"in the environment": ...})`; nothing of them outlives the test."""

    def use(in_file, in_environment=None):
        for name in {*in_file, *(in_environment or {})}:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in in_file.items()))
        for name, value in (in_environment or {}).items():
            monkeypatch.setenv(name, value)

    return use


def script(*words, env, code=None, **kwargs):
    """Run Python in a process of its own, as cron would."""
    command = [sys.executable, *(["-c", code] if code else []), *words]
    kwargs = {"stdout": subprocess.PIPE, **kwargs}
    return subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, timeout=60, cwd=TOP, **kwargs)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "variable", "in_file", "used"),
    [("1", "2", "3", "1"), ("", "2", "3", "2"), ("", "", "3", "3"), ("", "", "", "10"), ("", None, "3", "3"),
     ("", None, "", "10")],
)  # fmt: skip
def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(
    flag, variable, in_file, used, variables, run, lasting_index, make_index, name
):
    new = make_index("new", docs=2, alias=name("alias"))
    key = "DOCUMENT_COUNT_THRESHOLD"
    variables({key: in_file} if in_file else {}, {} if variable is None else {key: variable})
    command = ["--alias", name("alias"), "--source", new, "--target", lasting_index, "--dry-run"]
    outcome = run(switch_alias, *command, *(["--threshold", flag] if flag else []))
    assert outcome.code == 0, outcome.err
    assert f"threshold {used} %" in outcome.err


def test_none_switches_off_what_has_no_default(variables):
    rows = [row for row in sandbox.VARIABLES if not row.default]
    variables({row.variable: "7" for row in rows}, {row.variable: "none" for row in rows})
    base.load_env_file()
    assert {row.variable for row in rows} >= {"MIN_DOCUMENTS", "READER_QUERIES", "MAX_AGE_HOURS", "READY_OBJECT"}
    assert {row.variable: row.value() for row in rows} == {row.variable: None for row in rows}


def test_credentials_come_from_the_file_with_every_character(variables, look, box):
    quoted = sandbox.PASSWORD.replace("\\", "\\\\").replace('"', '\\"')
    variables({
        "OPENSEARCH_ENDPOINT": box.server.endpoint, "OPENSEARCH_USERNAME": sandbox.USER,
        "OPENSEARCH_PASSWORD": f'"{quoted}"', "AWS_REGION": "",
    })  # fmt: skip
    outcome = look()
    assert outcome.code == 0, outcome.err
    assert "from the environment" in outcome.err


@pytest.mark.parametrize("secret", ["'pa$HOME$$ ${X} #1'", "pa$HOME", "p#1", "'pass word'", "pässwört€"])
def test_the_file_is_read_without_interpolation(secret, variables):
    variables({"OPENSEARCH_PASSWORD": secret})
    base.load_env_file()
    assert os.environ["OPENSEARCH_PASSWORD"] == secret.strip("'")


def test_the_first_variable_after_a_byte_order_mark_is_read(variables, look, tmp_path):
    variables({"VERIFY_SSL": ""})
    (tmp_path / ".env").write_text("\ufeffVERIFY_SSL=true\n")
    outcome = look()
    assert outcome.code == 1, outcome.err
    assert "certificate" in outcome.last


def test_names_in_the_file_that_are_no_settings_are_listed_once_without_their_values(variables, look, tmp_path):
    variables({
        "MAX_REJECTS": "1", "S3_PREFIX": "x/", "AWS_MAX_ATTEMPTS": "3", "HTTPS_PROXY": "", "MAX_REJECT": "hidden",
        "INDEX_ALIASES": "'hidden'", "hiddenPart+of/a": "secret==",
    })  # fmt: skip
    with open(tmp_path / ".env", "a") as file:
        file.write("HIDDEN\nMIN_DOCUMENTS='1000\n")
    outcome = look()
    assert outcome.code == 0, outcome.err
    said = r"\.env: these entries are not settings and are ignored: MAX_REJECT, INDEX_ALIASES, line \d+; check"
    said += " the spelling"
    assert len(re.findall(said, outcome.err)) == 1
    assert "hidden" not in outcome.err.lower()


@pytest.mark.parametrize("kind", ["missing", "a folder"])
def test_a_file_that_is_not_there_is_no_obstacle(kind, variables, look, tmp_path):
    variables({})
    (tmp_path / ".env").unlink()
    if kind == "a folder":  # a virtual environment, perhaps
        (tmp_path / ".env").mkdir()
    assert look().code == 0


def test_a_file_that_is_not_utf_8_ends_with_one_line(variables, look, tmp_path):
    variables({})
    (tmp_path / ".env").write_bytes("OPENSEARCH_PASSWORD=hidden-ü\n".encode("latin-1"))
    outcome = look()
    assert outcome.code == 2, outcome.err
    assert ".env" in outcome.last
    assert "hidden" not in outcome.err


@pytest.mark.parametrize("kind", ["String", "SecureString"])
@pytest.mark.parametrize(("slash", "newline"), [("", ""), ("/", ""), ("", "\n")])
def test_the_prefix_says_where_in_the_store_the_credentials_are(kind, slash, newline, look, box, name, monkeypatch):
    prefix = f"/{name('deep')}/er"
    ssm = sandbox.aws_client("ssm", box.environment)
    for key, value in (("endpoint", box.server.endpoint + slash), ("username", sandbox.USER),
                       ("password", sandbox.PASSWORD)):  # fmt: skip
        ssm.put_parameter(Name=f"{prefix}/{key}", Value=value + newline, Type=kind)
    monkeypatch.setenv("OPENSEARCH_PARAMETER_PREFIX", prefix + slash)
    outcome = look()
    assert outcome.code == 0, outcome.err
    assert "from Parameter Store" in outcome.err


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("host", "https://host"), ("host:9200", "https://host:9200"), ("https://host/", "https://host"),
        ("http://host:9200//", "http://host:9200"), (" https://host/path/ ", "https://host/path"),
        ("[::1]:9200", "https://[::1]:9200"),
    ],
)  # fmt: skip
def test_an_endpoint_gets_a_scheme_and_loses_its_slash(text, url):
    assert base.endpoint_url(text) == url


def test_throttled_documents_are_sent_evenly():
    rate, began, sent = base.Rate(1000), time.monotonic(), []
    for _ in range(6):
        rate.wait(100)
        sent.append(time.monotonic() - began)
    assert all(at / 10 <= moment for at, moment in enumerate(sent))
    assert sent[-1] < 2
    base.Rate(0).wait(10**9)
    sizes = [base.Rate(rate).batch_size(5000) for rate in (0, 1, 1000, 10_000, 10**6)]
    assert sizes == [5000, 1, 100, 1000, 5000]
    assert (base.Rate(0).task_params(), base.Rate(0.5).task_params()) == ({}, {"requests_per_second": 0.5})


def test_relative_folders_are_beside_the_scripts(monkeypatch):
    monkeypatch.setenv("LOG_DIR", "my-logs")
    assert base.resolve("reindex", argparse.Namespace()).log_dir == TOP / "my-logs"


# --- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        refused, lost_answer, answer(502), answer(503, "<html>Service Unavailable</html>"), answer(504),
        answer(429), answer(429, retry_after="0"), answer(503, retry_after="soon"),
    ],
    ids=["reset", "lost", "502", "503", "504", "429", "429 with Retry-After", "503 with a strange Retry-After"],
)  # fmt: skip
@pytest.mark.parametrize("path", ["_settings", "_refresh", "_count"])
def test_what_may_be_repeated_is_tried_again(fault, path, look, proxy, short_pauses):
    verb = "POST" if path == "_refresh" else "GET"
    proxy.on(verb, path, fault, times=2)
    outcome = look()
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("trying again (in") == 2
    assert len(proxy.seen(verb, path)) >= 3


def test_a_cluster_that_asks_for_time_gets_it(look, proxy, short_pauses):
    proxy.on("GET", "_count", answer(429, retry_after="1"))
    began = time.monotonic()
    assert look().code == 0
    assert time.monotonic() - began >= 1


@pytest.mark.parametrize(
    ("asked", "low", "high"),
    [
        ("7", 7, 7), ("3600", 60, 60), ("0", 0, 1), ("soon", 0, 1), (None, 0, 1), ("-5", 0, 1), ("nan", 0, 1),
        (formatdate(time.time() + 3600, usegmt=True), 60, 60), (formatdate(time.time() - 60, usegmt=True), 0, 1),
        ("9" * 400, 60, 60),
    ],
    ids=["7", "an hour", "0", "a word", "nothing", "negative", "nan", "a date to come", "a date gone by", "too large"],
)  # fmt: skip
def test_an_unreasonable_wait_is_capped_and_nonsense_ignored(asked, low, high):
    assert low <= base.backoff_s(0, asked) <= high


def test_pauses_grow_up_to_a_limit():
    pauses = [max(base.backoff_s(attempt) for _ in range(50)) for attempt in range(12)]
    assert pauses[:6] == sorted(pauses[:6])
    assert pauses[0] <= 0.5
    assert 20 < pauses[-1] <= 30


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("no cluster manager", "no cluster manager"),
        ({"type": "cluster_block_exception", "reason": "blocked by: [SERVICE_UNAVAILABLE/1/state not recovered];"},
         r"state not recovered\];; gave up after [01] s: check GET _cluster/health and run again"),
    ],
)  # fmt: skip
def test_a_cluster_that_stays_away_is_given_up_after_retry_seconds(error, says, look, proxy, monkeypatch, short_pauses):
    monkeypatch.setenv("RETRY_SECONDS", "1")
    proxy.on("GET", "_count", answer(503, {"error": error}), times=None)
    began = time.monotonic()
    outcome = look()
    assert outcome.code == 1
    assert time.monotonic() - began < 5
    assert re.search(rf"GET /\S+/_count: 503 .*{says}", outcome.last), outcome.last


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (429, {"error": {"type": "cluster_block_exception", "reason": "index [x] blocked by: [TOO_MANY_REQUESTS/12/"
               "disk usage exceeded flood-stage watermark, index has read-only-allow-delete block]"}},
         "flood-stage.*free disk space"),
        (403, {"error": {"type": "cluster_block_exception", "reason": "blocked by: [FORBIDDEN/8/index write (api)]"}},
         "FORBIDDEN/8.*remove the block"),
        (400, {"error": {"type": "x", "reason": "outer", "root_cause": [{"type": "y", "reason": "inner"}]}},
         "400 y: inner"),
        (404, {"error": "alias [x] missing", "status": 404}, r"404 alias \[x\] missing"),
        (500, "<html><h1>Oops</h1></html>", "500 Oops"), (418, "", "418"), (400, "null", "400 null"),
        (301, "", "301.*redirects are not followed"), (307, "", "307.*redirects are not followed"),
    ],
)  # fmt: skip
def test_a_refusal_is_final_and_its_reason_is_told(status, body, says, look, proxy):
    proxy.on("GET", "_count", answer(status, body, location="https://example.org/"), times=None)
    outcome = look()
    assert outcome.code == 1
    assert re.search(says, outcome.last), outcome.last
    assert "trying again" not in outcome.err
    assert len(proxy.seen("GET", "_count")) == 1


@pytest.mark.parametrize("body", ["<html>Sign in</html>", "", "{"])
def test_an_answer_that_is_not_of_opensearch_is_recognised(body, look, proxy):
    proxy.on("GET", r"^/[^/_]+\?", answer(200, body))
    outcome = look()
    assert outcome.code == 1
    assert "the response is not from OpenSearch (is the endpoint right?)" in outcome.last


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_wait_for_a_cluster_that_is_away(number, look, proxy):
    def interrupt(exchange):
        os.kill(os.getpid(), number)
        exchange.reply(503, headers={"Retry-After": "15"})

    handler = signal.getsignal(number)
    proxy.on("GET", "_count", interrupt, times=None)
    began = time.monotonic()
    outcome = look()
    assert (outcome.code, outcome.out) == (128 + number, "")
    assert f"stopped by {number.name}" in outcome.last
    assert time.monotonic() - began < 5
    assert signal.getsignal(number) == handler


# --- who we are -------------------------------------------------------------------------------------------------------


def test_neither_netrc_nor_a_proxy_of_the_environment_decides_where_we_log_in(look, proxy, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login another password else\n")
    (tmp_path / ".netrc").chmod(0o600)
    with monkeypatch.context() as patch:
        for variable in ("HOME", "NETRC"):
            patch.setenv(variable, str(tmp_path / (".netrc" if variable == "NETRC" else "")))
        for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
            patch.setenv(variable, "http://127.0.0.1:9")
        outcome = look()
    assert outcome.code == 0, outcome.err


def test_every_request_says_which_run_it_is_of(look, proxy):
    seen = set()

    def record(exchange):
        seen.add(exchange.handler.headers["X-Opaque-Id"])
        exchange.pass_on()

    proxy.on("GET", "", record, times=None)
    assert look().code == 0
    assert len(seen) == 1
    assert seen.pop().startswith(f"{base.SUITE}/{base.HOST}/")


def test_a_user_without_ascii_can_log_in_by_utf_8(connect_as):
    header = connect_as("jörg", "pä:ß")._create_auth_header()["Authorization"]
    assert base64.b64decode(header.removeprefix("Basic ")).decode() == "jörg:pä:ß"


@pytest.fixture
def connect_as(monkeypatch):
    def make(user, password):
        monkeypatch.setenv("OPENSEARCH_ENDPOINT", "https://host")
        monkeypatch.setenv("OPENSEARCH_USERNAME", user)
        monkeypatch.setenv("OPENSEARCH_PASSWORD", password)
        return base.OpenSearchBaseManager(base.resolve("index_cleanup", argparse.Namespace()))

    return make


# --- secrets and logs -------------------------------------------------------------------------------------------------


def assert_no_secret(text):
    for secret in SECRETS:
        assert secret not in text
        assert json.dumps(secret)[1:-1] not in text
        assert repr(secret)[1:-1] not in text


def test_no_secret_is_in_the_repr_of_credentials_and_settings(connect_as):
    manager = connect_as(sandbox.USER, sandbox.PASSWORD)
    assert_no_secret(repr(manager.credentials) + str(manager.settings) + repr(vars(manager)))


@pytest.mark.parametrize(
    "fault", [answer(400, {"error": "no"}), answer(200, "{}"), answer(401, "Unauthorized"), refused],
    ids=["400", "another answer", "401", "reset"],
)  # fmt: skip
def test_no_secret_is_in_a_debug_log_of_a_run_that_fails(fault, look, proxy, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("RETRY_SECONDS", "0")
    proxy.on("GET", "_count", fault, times=None)
    outcome = look()
    assert outcome.code == 1
    assert " DEBUG index_cleanup: " in outcome.err
    assert_no_secret(outcome.err + outcome.out)


def test_libraries_are_not_logged(look, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    outcome = look()
    assert outcome.code == 0
    assert [line for line in outcome.err.splitlines() if not re.match(LINE, line)] == []
    assert {"DEBUG", "INFO"} < set(re.findall(r"Z ([A-Z]+) index_cleanup: ", outcome.err))


@pytest.mark.parametrize("reason", ["a\nERROR forged: line", "a\r\x1b[2Kgone", "a\u2028b\x85c\x00", "\x9b31mred"])
def test_what_others_say_cannot_forge_a_log_line(reason, look, proxy):
    proxy.on("GET", "_count", answer(400, {"error": {"type": "x", "reason": reason}}))
    outcome = look()
    assert outcome.code == 1
    assert [line for line in outcome.err.rstrip("\n").split("\n") if not re.match(LINE, line)] == []
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]", outcome.err)


@pytest.mark.parametrize(("level", "present"), [("INFO", False), ("DEBUG", True)])
def test_an_unknown_exception_is_one_line_with_type_and_place(level, present, look, proxy, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", level)
    proxy.on("GET", "_count", answer(200, "{}"))
    outcome = look()
    assert (outcome.code, outcome.out) == (1, "")
    assert re.search(r"ERROR index_cleanup: unexpected KeyError at \w+\.py:\d+", outcome.err)
    assert ("Traceback" in outcome.err) is present


HANGS = """
import signal, threading
import opensearch_base_manager as base
base.CLEANUP_S, base.CLEANUP_GRACE_S = 0, 1
lock = threading.Lock()
lock.acquire()
with base.signals_as_exceptions():
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        lock.acquire()
"""


def test_a_clean_up_that_hangs_ends_nevertheless():
    done = script(env=BARE, code=HANGS)
    assert (done.returncode, done.stderr) == (143, "")


# --- progress ---------------------------------------------------------------------------------------------------------


PROGRESS = """
import os, sys, time
import opensearch_base_manager as base
base.PROGRESS_TTY_S, base.PROGRESS_EVERY_S = 0, 0
if "background" in sys.argv:
    os.setpgrp()
base.set_up_logging("test")
progress = base.Progress("copying", 200, "documents")
progress.update(50)
progress.update(100, "a note " * 50)
base.log.info("between")
progress.close()
"""


def progress_on_a_terminal(*words, columns=80, log=None):
    command = [sys.executable, "-c", PROGRESS]
    if "background" in words:  # the leader of a session cannot leave its group
        parent = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
        command = [sys.executable, "-c", parent, *command, *words]
    if log:  # as the runner does it
        command = ["env", f"REFRESH_LOG_FILE={log}", *command]
    code, shown = on_terminal(command, {**os.environ, "PYTHONPATH": str(Path(base.__file__).parent)}, columns)
    assert code == 0, shown
    return shown


@pytest.mark.parametrize("columns", [40, 80, 200])
@pytest.mark.parametrize("logged", [False, True])
def test_progress_on_a_terminal_is_one_line_that_renews_itself(columns, logged, tmp_path):
    log = tmp_path / "log" if logged else None
    wipe, first, second, between, rest = re.split(r"\r\x1b\[K", progress_on_a_terminal(columns=columns, log=log))
    assert (wipe, rest) == ("", "")
    assert first.startswith("copying: 25 %, ")
    assert second.startswith("copying: 50 %, ")
    assert (len(first) < columns, len(second)) == (True, columns - 1)
    assert re.fullmatch(r"\S+Z INFO test: between\r\n", between)
    if log:
        lines = log.read_text().splitlines()
        assert [line.split(" INFO test: ")[1][:13] for line in lines] == ["copying: 25 %", "copying: 50 %", "between"]
        assert "\x1b" not in log.read_text()


def test_a_run_in_the_background_of_its_terminal_renews_nothing():
    assert re.fullmatch(r"\r\x1b\[K\S+Z INFO test: between\r\n", progress_on_a_terminal("background"))


def test_progress_in_a_log_is_a_plain_line_every_half_minute(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    clock = iter([0.0, 1.0, 29.0, 31.0, 45.0, 62.0])
    monkeypatch.setattr(base.time, "monotonic", lambda: next(clock))
    base.set_up_logging("test")
    progress = base.Progress("copying", 620, "documents")
    for done in (10, 290, 310, 450, 620):
        progress.update(done)
    progress.close()
    assert [line.split("INFO test: ")[1] for line in stream.getvalue().splitlines()] == [
        "copying: 50 %, 0:00:31 left, 310 of 620 documents, 10/s",
        "copying: 100 %, 0:00:00 left, 620 of 620 documents, 10/s",
    ]


# --- a process of its own ---------------------------------------------------------------------------------------------

BARE = {"PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_help_needs_no_configuration_and_imports_no_boto3(module):
    code = f"import sys, {module.__name__} as m; c = m.main(['--help']); sys.exit(c or 'boto3' in sys.modules)"
    done = script(env=BARE, code=code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {module.__name__}.py")


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_the_command_itself_shows_its_usage_and_ends_with_2(module):
    done = script(module.__file__, env=BARE)
    assert done.returncode == 2
    assert f"{module.__name__}.py: error: the following arguments are required" in done.stderr.splitlines()[-1]


def test_a_run_that_needs_nothing_of_aws_imports_no_boto3(lasting_index, environment, box):
    code = "import sys, index_cleanup as m; c = m.main(sys.argv[1:]); sys.exit(c or 'botocore' in sys.modules)"
    user = {"OPENSEARCH_USERNAME": sandbox.USER, "OPENSEARCH_PASSWORD": sandbox.PASSWORD}
    variables = {**BARE, **environment, **user, "OPENSEARCH_ENDPOINT": box.server.endpoint}
    done = script("--index", lasting_index, "--dry-run", env=variables, code=code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["requests", "urllib3", "dotenv", "boto3"])
def test_a_missing_package_is_named_and_ends_with_2(package, environment):
    code = f"import sys; sys.modules['{package}'] = None; import index_cleanup as m; sys.exit(m.main(['--index', 'a']))"
    done = script(env={**BARE, **environment}, code=code)
    assert done.returncode == 2, done.stderr
    command = f"{sys.executable} -m pip install -r {base.HERE}/requirements.txt"
    assert f"{package} is not installed; run {command}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "variables", "text"),
    [(["--index"], {}, "expected one argument"), ([], {}, "usage: "), (["--index", "a"], {"RETRY_SECONDS": "x"}, "x"),
     (["--index", "a"], {"OPENSEARCH_ENDPOINT": "x"}, "ERROR index_cleanup: ")],
)  # fmt: skip
def test_what_is_wrong_with_a_command_is_in_the_log_file_of_the_runner_too(
    arguments, variables, text, environment, tmp_path
):
    log = tmp_path / "log"
    log.write_text("a line before\n")
    done = script(
        str(TOP / "index_cleanup.py"), *arguments, env={**BARE, **environment, **variables, "REFRESH_LOG_FILE": log}
    )
    assert done.returncode == 2
    assert text in done.stderr
    assert log.read_text() == f"a line before\n{done.stderr}"


@pytest.mark.parametrize("package", ["requests", "boto3"])
def test_a_missing_package_is_in_the_log_file_of_the_runner_too(package, environment, tmp_path):
    code = f"import sys; sys.modules['{package}'] = None; import index_cleanup as m; sys.exit(m.main(['--index', 'a']))"
    done = script(env={**BARE, **environment, "REFRESH_LOG_FILE": str(tmp_path / "log")}, code=code)
    assert done.returncode == 2, done.stderr
    assert (tmp_path / "log").read_text() == done.stderr


def test_a_log_file_that_cannot_be_written_stops_nothing(environment, tmp_path, index):
    variables = {**environment, "REFRESH_LOG_FILE": str(tmp_path / "nowhere" / "log")}
    done = script(str(TOP / "index_cleanup.py"), "--index", index, "--dry-run", env=variables)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stdout", ["closed", "full", "a pipe without a reader"])
def test_a_result_that_cannot_be_written_does_not_undo_what_was_done(stdout, index, environment, admin):
    command = f'exec "$0" index_cleanup.py --index {index} --no-force-merge'
    redirect = {"closed": " >&-", "full": " >/dev/full", "a pipe without a reader": ""}[stdout]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        ["bash", "-c", command + redirect, sys.executable], env={**BARE, **environment}, stdout=writing,
        stderr=subprocess.PIPE, text=True, timeout=60, cwd=TOP,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert count(admin, index) == 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_closed_stderr_stops_no_run(index, environment, admin):
    command = f'exec "$0" index_cleanup.py --index {index} --no-force-merge 2>&-'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable], env={**BARE, **environment}, stdout=subprocess.PIPE, text=True,
        timeout=60, cwd=TOP,
    )  # fmt: skip
    assert (done.returncode, count(admin, index)) == (0, 0)
    assert json.loads(done.stdout)["deleted"] == 2


def test_a_hangup_that_nohup_ignores_stays_ignored(index, environment):
    code = (
        "import os, signal, sys, index_cleanup as m; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        f"m.run = lambda args: os.kill(os.getpid(), signal.SIGHUP); sys.exit(m.main(['--index', '{index}']))"
    )
    assert script(env={**BARE, **environment}, code=code).returncode == 0


# --- what is read from the cluster ------------------------------------------------------------------------------------


def test_counts_are_of_the_primary_copies_where_the_version_has_that(look, proxy):
    assert look().code == 0
    assert any("_count?preference=_primary" in path for _, path, _ in proxy.requests)


def test_counts_of_an_older_version_are_plain(look, proxy):
    proxy.on("GET", "^/$", edited(lambda answer: answer["version"].update(number="1.3.20")), times=None)
    assert look().code == 0
    assert not any("preference" in path for _, path, _ in proxy.requests)


def test_nested_documents_are_not_counted(make_index, run):
    index = make_index("nested", {"o": {"type": "nested"}}, docs=[{"o": [{"x": 1}, {"x": 2}]}])
    assert run(index_cleanup, "--index", index, "--dry-run").result["would_delete"] == 1
