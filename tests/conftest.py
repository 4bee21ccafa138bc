"""Fixtures: one real server for the whole run, names and S3 prefixes of one's own for each test, a scripted proxy."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import urllib3
from xdist.scheduler import LoadGroupScheduling

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import bulkupdate
import opensearch_base_manager as base
import reindex
import sandbox
import switch_alias
from fault_proxy import FaultProxy

_create_client, _clients = base.Aws.client, dict[Any, Any]()


def shared_client(aws: base.Aws, service: str, **options: Any) -> Any:
    """Create each client of boto3 once per process and environment: this takes an eighth of the tests' time."""
    variables = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    key = (aws.region, service, *options.items(), *variables.items())
    if key not in _clients:
        _clients[key] = _create_client(aws, service, **options)
    return _clients[key]


base.Aws.client = shared_client  # type: ignore[method-assign]

# under nohup and `&` they are ignored, and would be by all that is started here
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# the names that tests may use, except the backup indices of recreate, with the role that the scripts need
TEST_PATTERNS = ["/t-.*(?<!-recreate)/"]
OWN_PASSWORD = "of-the-Test-only-2026!"  # of users that a test creates
NUMBER = {"n": {"type": "long"}}  # the mapping of most indices here
WORDS = {"k": {"type": "keyword"}, "t": {"type": "keyword"}}
RUNNER = Path(base.__file__).parent / "run_refresh.sh"
# tests run side by side on one server: the names of each process begin with this
OWN = f"t-{os.environ.get('PYTEST_XDIST_WORKER', 'one')}"
secured = pytest.mark.skipif(not sandbox.SECURE, reason="the server of this version runs without the security plugin")
READER_PAUSE_S = 0.02  # what a reader could notice lasts a change of the cluster's state at least, 40 ms and more
# files whose servers are started once for all of their tests, which therefore run on one worker
NODES = tuple(path.name for path in Path(__file__).parent.rglob("test_*.py") if "pytest.mark.nodes" in path.read_text())
counter = itertools.count(1)
STARTED = pytest.StashKey[sandbox.Sandbox]()


# --- which tests run, and on which worker -----------------------------------------------------------------------------


class ByServer(LoadGroupScheduling):
    """Runs the tests of a file in NODES on one worker; xdist 3.8 loses its own groups under pytest 9.2."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return path if path.endswith(NODES) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByServer:
    return ByServer(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also clusters of several nodes, and killed refreshes")
    parser.addoption("--faults", action="store_true", help="everything: the long form of the fault bench too (an hour)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--faults"):
        return
    unwanted = ["long"] if config.getoption("--slow") else ["long", "slow", "nodes"]
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in unwanted)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


# --- the sandbox ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running() -> Iterator[sandbox.Sandbox]:
    with sandbox.running([*sandbox.JAVA, sandbox.BRIEF]) as started:
        if sandbox.SECURE:
            started.server.grant("tests", sandbox.refresh_role(TEST_PATTERNS))
        yield started


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker where the server is; it is started before the first one, and stopped after the last one."""
    config = node.config
    if STARTED not in config.stash:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler)  # an orderly end, as after Ctrl-C
        stack = contextlib.ExitStack()
        config.add_cleanup(stack.close)
        config.stash[STARTED] = stack.enter_context(running())
    box = config.stash[STARTED]
    node.workerinput["sandbox"] = (box.server.port, str(box.server.run), box.environment)


@pytest.fixture(scope="session")
def box(request: pytest.FixtureRequest) -> Iterator[sandbox.Sandbox]:
    """The one sandbox of the whole run; without workers (-n 0) it is started here."""
    if workerinput := getattr(request.config, "workerinput", None):
        port, run, environment = workerinput["sandbox"]
        yield sandbox.Sandbox(sandbox.Server(port, Path(run)), environment)
    else:
        with running() as started:
            yield started


@pytest.fixture
def admin(box: sandbox.Sandbox) -> Callable[..., Any]:
    """Send a request as admin, past the scripts: `admin("GET", "/_cat/indices")`."""
    return box.server.request


@pytest.fixture
def environment(box: sandbox.Sandbox, tmp_path: Path) -> dict[str, str]:
    """The variables of a script under test, for monkeypatch or a subprocess."""
    return {
        **box.environment, "LOG_DIR": str(tmp_path / "logs"), "LOCK_DIR": str(tmp_path / "locks"),
        "RETRY_SECONDS": "20", "WAIT_SECONDS": "5", "STEP_DELAY_SECONDS": "0",
        "OPENSEARCH_ENDPOINT": "none", "OPENSEARCH_USERNAME": "", "OPENSEARCH_PASSWORD": "",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def own_environment(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let nothing of the caller's environment, no stray .env and no working directory decide what a test sees."""
    settings = {setting.variable for setting in sandbox.VARIABLES}
    other = re.compile(r"(AWS|OPENSEARCH|REFRESH)_|(https?|no|all)_proxy$", re.I)
    for name in [name for name in os.environ if name in settings or other.match(name)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(base, "ENV_FILE", tmp_path / ".env")
    monkeypatch.chdir(tmp_path)


# --- proxies, and waiting ---------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A scripted proxy in front of the server; the scripts talk to it instead."""
    with FaultProxy(box.server.endpoint) as running:
        monkeypatch.setenv("OPENSEARCH_ENDPOINT", running.endpoint)
        monkeypatch.setenv("OPENSEARCH_USERNAME", sandbox.USER)
        monkeypatch.setenv("OPENSEARCH_PASSWORD", sandbox.PASSWORD)
        yield running


@pytest.fixture
def s3_proxy(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A scripted proxy in front of S3; the scripts talk to it instead."""
    with FaultProxy(environment["AWS_ENDPOINT_URL"]) as running:
        environment["AWS_ENDPOINT_URL"] = running.endpoint  # of processes that the test starts
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let retries begin with a pause of 50 ms; for `usefixtures`."""
    monkeypatch.setattr(base, "BACKOFF_FIRST_S", 0.05)


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Return the first result of `condition` that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.05)
    return found


# --- indices, aliases and documents -----------------------------------------------------------------------------------


@pytest.fixture
def name(admin: Callable[..., Any]) -> Iterator[Callable[[str], str]]:
    """Make a name that no other test uses; what is created under it is deleted afterwards."""
    own = f"{OWN}-{next(counter):03d}"
    yield lambda suffix="index": f"{own}-{suffix}"
    for index in admin("GET", f"/{own}-*/_settings?expand_wildcards=all"):
        admin("DELETE", f"/{index}")


@pytest.fixture
def make_index(admin: Callable[..., Any], name: Callable[[str], str]) -> Callable[..., str]:
    """Create an index and return its name: `make_index("a", {"n": {"type": "long"}}, docs=[{"n": 1}], alias="x")`."""

    def make(
        suffix: str = "index", properties: dict[str, Any] | None = None, *, docs: list[dict[str, Any]] | int = 0,
        alias: str = "", settings: dict[str, Any] | None = None, **mapping: Any,
    ) -> str:  # fmt: skip
        index = name(suffix)
        body: dict[str, Any] = {"settings": settings or {}, "mappings": {"properties": properties or {}, **mapping}}
        if alias:
            body["aliases"] = {alias: {}}
        admin("PUT", f"/{index}", body)
        fill(admin, index, [{"n": n} for n in range(docs)] if isinstance(docs, int) else docs)
        return index

    return make


def fill(admin: Callable[..., Any], index: str, docs: list[dict[str, Any]]) -> None:
    """Add documents to an index, past the scripts."""
    if docs:
        lines = "".join(f'{{"index":{{}}}}\n{json.dumps(doc)}\n' for doc in docs)
        headers = {"Content-Type": "application/x-ndjson"}
        assert not admin("POST", f"/{index}/_bulk?refresh=true", data=lines, headers=headers)["errors"]


@pytest.fixture
def alias(name: Callable[[str], str]) -> str:
    return name("alias")


@pytest.fixture
def make_pair(make_index: Callable[..., str], admin: Callable[..., Any], alias: str) -> Callable[..., tuple[str, str]]:
    """Create two indices, the alias on the first: `make_pair(properties, docs, other_docs, other_properties)`.

    The second one is like the first where nothing else is said; `others` are its settings, `definition` is what the
    alias has besides its name, and `mapping` is for the first index alone.
    """

    def make(
        properties: dict[str, Any], docs: Any, other_docs: Any = None, other_properties: Any = None, *,
        definition: dict[str, Any] | None = None, settings: Any = None, others: Any = None, **mapping: Any,
    ) -> tuple[str, str]:  # fmt: skip
        first = make_index("primary", properties, docs=docs, settings=settings, **mapping)
        second = make_index(
            "secondary", properties if other_properties is None else other_properties,
            docs=docs if other_docs is None else other_docs, settings=settings if others is None else others,
        )  # fmt: skip
        admin("POST", "/_aliases", {"actions": [{"add": {"index": first, "alias": alias, **(definition or {})}}]})
        return first, second

    return make


@pytest.fixture
def behind_alias(admin: Callable[..., Any], alias: str) -> Callable[[], list[str]]:
    """Return the indices behind the alias."""
    return lambda: sorted(admin("GET", f"/_alias/{alias}"))


@pytest.fixture
def move_alias(admin: Callable[..., Any], alias: str) -> Callable[[str, str], None]:
    """Act as another client: `move_alias("from", "to")`."""

    def move(source: str, target: str) -> None:
        remove, add = ({"index": index, "alias": alias} for index in (source, target))
        admin("POST", "/_aliases", {"actions": [{"remove": remove}, {"add": add}]})

    return move


def sources(admin: Callable[..., Any], index: str) -> list[dict[str, Any]]:
    """Return `_source` of all documents (at most 10,000), in the order of their ids."""
    answer = admin("POST", f"/{index}/_search", {"size": 10_000, "query": {"match_all": {}}})
    hits = sorted(answer["hits"]["hits"], key=lambda hit: str(hit["_id"]))
    return [hit["_source"] for hit in hits]


def by_id(admin: Callable[..., Any], index: str) -> dict[str, dict[str, Any]]:
    """Return `_source` of all documents (at most 10,000) by their ids."""
    admin("POST", f"/{index}/_refresh")
    return {hit["_id"]: hit["_source"] for hit in admin("POST", f"/{index}/_search", {"size": 10_000})["hits"]["hits"]}


def digest_of(key: str) -> str:
    """Return what the ids of the rows of an object begin with."""
    return hashlib.sha256(f"{sandbox.BUCKET}/{key}".encode()).hexdigest()[:16]


def count(admin: Callable[..., Any], index: str) -> int:
    admin("POST", f"/{index}/_refresh")
    return int(admin("GET", f"/{index}/_count")["count"])


def state_of(admin: Callable[..., Any], *indices: str) -> dict[str, Any]:
    """Return what a refused or failed step must leave as it was: settings, mapping, aliases, ids and documents."""
    state: dict[str, Any] = {}
    for index in indices:
        found = admin("GET", f"/{index}")[index]
        admin("POST", f"/{index}/_refresh")
        hits = admin("POST", f"/{index}/_search", {"size": 1000, "sort": ["_doc"], "version": True})["hits"]["hits"]
        docs = sorted((hit["_id"], hit["_version"], json.dumps(hit["_source"])) for hit in hits)
        state[index] = {**found, "docs": docs}
    return state


def meta_of(admin: Callable[..., Any], index: str) -> dict[str, Any]:
    found: dict[str, Any] = admin("GET", f"/{index}/_mapping")[index]["mappings"].get("_meta", {})
    return found


def marker_of(admin: Callable[..., Any], index: str) -> Any:
    """Return what says that an index is unfinished, None where nothing does."""
    return meta_of(admin, index).get(base.SUITE)


def running_copies(admin: Callable[..., Any], index: str) -> list[str]:
    """Return the copies from or to an index that the server is working on; requests for permissions are none."""
    nodes = admin("GET", "/_tasks?actions=*reindex&detailed=true")["nodes"].values()
    return [
        name for node in nodes for name, task in node["tasks"].items()
        if f"[{index}]" in task["description"] and "parent_task_id" not in task
        and not task["headers"].get("X-Opaque-Id", "").endswith("/permissions")
    ]  # fmt: skip


@pytest.fixture
def foreign_copy(make_index: Callable[..., str], admin: Callable[..., Any]) -> Iterator[Callable[..., str]]:
    """Start a copy of three documents that this host has not started, and return the task; it ends with the test."""
    started: list[str] = []

    def start(target: str, opaque_id: str = "", rate: float = 0.5) -> str:
        body = {"source": {"index": make_index("foreign", docs=3), "size": 1}, "dest": {"index": target}}
        path = f"/_reindex?wait_for_completion=false&requests_per_second={rate}"
        started.append(admin("POST", path, body, headers={"X-Opaque-Id": opaque_id})["task"])
        return started[-1]

    yield start
    for task in started:
        with contextlib.suppress(RuntimeError):  # it has ended
            admin("POST", f"/_tasks/{task}/_cancel?wait_for_completion=true")


# --- objects in S3 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def s3(box: sandbox.Sandbox) -> Any:
    return sandbox.aws_client("s3", box.environment)


@pytest.fixture
def put_csv(box: sandbox.Sandbox, name: Callable[[str], str]) -> Callable[..., str]:
    """Store objects under a prefix of one's own and return the prefix: `put_csv({"a.csv": "n\\n1\\n"})`."""
    s3 = sandbox.aws_client("s3", box.environment)

    def put(objects: dict[str, str | bytes]) -> str:
        prefix = f"{name('prefix')}/"
        for key, content in objects.items():
            body = content.encode() if isinstance(content, str) else content
            s3.put_object(Bucket=sandbox.BUCKET, Key=prefix + key, Body=body)
        return prefix

    return put


# --- the four scripts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The JSON line of stdout."""
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed

    @property
    def last(self) -> str:
        """The last line of stderr: the error, when there is one."""
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a script in process, as the operator would: `run(reindex, "--source", "a", "--target", "b")`."""

    def run_script(script: Any, *argv: str) -> Outcome:
        capsys.readouterr()
        code = script.main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert sandbox.PASSWORD not in captured.out + captured.err
        return Outcome(code, captured.out, captured.err)

    return run_script


@pytest.fixture
def copy(run: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Copy an index: `copy(source, target, "--dry-run")`."""
    return lambda source, target, *more: run(reindex, "--source", source, "--target", target, *more)


@pytest.fixture
def switch(run: Callable[..., Outcome], alias: str) -> Callable[..., Outcome]:
    """Switch the alias: `switch(source, target, "--threshold", "5")`."""
    words = ["--alias", alias]
    return lambda source, target, *more: run(switch_alias, *words, "--source", source, "--target", target, *more)


def load_arguments(prefix: str, index: str, *more: str) -> list[str]:
    return ["--bucket", sandbox.BUCKET, "--prefix", prefix, "--index", index, *more]


@pytest.fixture
def load(run: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Load a prefix, see that it ends as expected and that its sums are right: `load(prefix, index, code=3)`."""

    def do(prefix: str, index: str, *more: str, code: int = 0) -> Outcome:
        outcome = run(bulkupdate, *load_arguments(prefix, index, *more))
        assert outcome.code == code, outcome.err
        if outcome.out and "read" in outcome.result:
            sums = outcome.result
            assert sums["read"] == sums["stored"] + sums["rejected"] + sums["skipped"] + sums["dropped"]
        return outcome

    return do


@pytest.fixture
def rejected(tmp_path: Path) -> Callable[..., list[Any]]:
    """Return the entries of all rejects files."""

    def read(parse: Callable[[str], Any] = json.loads) -> list[Any]:
        return [parse(line) for file in sorted((tmp_path / "logs").glob("rejects-*")) for line in file.open()]

    return read


@pytest.fixture
def queries(tmp_path: Path) -> Callable[..., str]:
    """Write a file of readers' queries, one a line, and return its name."""

    def write(*lines: Any) -> str:
        file = tmp_path / "queries.ndjson"
        texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
        file.write_bytes(b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts))
        return str(file)

    return write


def command_in(text: str, before: str = "") -> list[str]:
    """Return the arguments of the last switch_alias.py command in a text, as bash reads them."""
    command = text.split(f"{before}{base.script_command('switch_alias.py')} ")[-1].splitlines()[0]
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return shown.stdout.split("\0")[:-1]


# --- run_refresh.sh ---------------------------------------------------------------------------------------------------


@pytest.fixture
def runner_environment(environment: dict[str, str], name: Callable[[str], str], alias: str) -> dict[str, str]:
    """The environment of run_refresh.sh on the pair of this test, but for the prefix."""
    return {
        **os.environ, **environment, "PRIMARY_INDEX": name("primary"), "SECONDARY_INDEX": name("secondary"),
        "INDEX_ALIAS": alias, "S3_BUCKET": sandbox.BUCKET, "PYTHON": sys.executable,
    }  # fmt: skip


@pytest.fixture
def refresh(runner_environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Start the runner: `finish(refresh(prefix, "--dry-run", MAX_REJECTS="1"))`."""

    def start(prefix: str, *arguments: str, runner: Path = RUNNER, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [runner, *arguments], env={**runner_environment, "S3_PREFIX": prefix, **variables},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return start


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """Wait for the runner; return its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=timeout)
    assert sandbox.PASSWORD not in out + err
    return process.returncode, out, err


def log_of(folder: Path) -> str:
    """Return the log of the newest run of the runner in this test's folder."""
    return max((folder / "logs").glob("refresh-*.log"), key=lambda path: path.stat().st_mtime_ns).read_text()


def on_terminal(words: list[str], environment: dict[str, str], columns: int = 80) -> tuple[int, str]:
    """Run a command on a terminal of its own; return its exit code and all that was written there."""
    child, terminal = pty.fork()
    if not child:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execvpe(words[0], words, environment)  # noqa: S606
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is gone with its last process
        while part := os.read(terminal, 65536):
            shown += part
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


# --- users and their roles --------------------------------------------------------------------------------------------


class Account:
    """A user of the test's own with the role of the README on some indices, less what is left out."""

    def __init__(self, server: sandbox.Server, user: str, patterns: list[str]) -> None:
        self.server, self.user, self.patterns = server, user, patterns
        self.login = {"OPENSEARCH_USERNAME": user, "OPENSEARCH_PASSWORD": OWN_PASSWORD}
        server.add_user(user, OWN_PASSWORD)
        self.grant()

    def grant(self, *without: str, **view: Any) -> None:
        """Grant the role without these actions; `view` restricts what the user sees: `dls=...`."""
        role = sandbox.refresh_role(self.patterns)
        [of_indices] = role["index_permissions"]
        assert {*without} <= {*role["cluster_permissions"], *of_indices["allowed_actions"]}  # or nothing is left out
        for actions in (role["cluster_permissions"], of_indices["allowed_actions"]):
            actions[:] = [action for action in actions if action not in without]
        of_indices |= view
        self.server.grant(self.user, role, self.user)

    def restrict(self, index: str, as_expected: Callable[[list[dict[str, Any]]], bool], **view: Any) -> None:
        """Restrict what the user sees, until the server has shown these documents for a second.

        It applies changes in the background, and a change of another test may undo this one for a moment. With the
        regular expression of TEST_PATTERNS, it did not apply some views at all.
        """
        self.patterns = [f"{OWN}-*"]
        path, login = f"/{index}/_search?size=100", (self.user, OWN_PASSWORD)

        def shown() -> bool:
            return as_expected(self.server.request("GET", path, auth=login)["hits"]["hits"])

        def settled() -> bool:
            self.grant(**view)
            wait_until(shown)
            time.sleep(1)
            return shown()

        wait_until(settled)

    def delete(self) -> None:
        self.server.take_back(self.user)
        self.server.change_security("DELETE", f"internalusers/{self.user}")


@pytest.fixture
def account(
    box: sandbox.Sandbox, name: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Account]:  # fmt: skip
    """Let the scripts run as a user of the test's own."""
    made = Account(box.server, name("user"), TEST_PATTERNS)
    for variable, value in {"OPENSEARCH_ENDPOINT": box.server.endpoint, **made.login}.items():
        monkeypatch.setenv(variable, value)
    yield made
    made.delete()


class Recreation:
    """The role that lets the scripts' user drop and create indices; a change of it costs 0.2 s."""

    role = f"recreate-{OWN}"

    def __init__(self) -> None:
        self.granted: dict[int, tuple[str, ...]] = {}  # by the port of the server

    def allow(self, server: sandbox.Server, actions: tuple[str, ...]) -> None:
        if sandbox.SECURE and actions != self.granted.get(server.port, ()):
            if actions:
                server.grant(self.role, sandbox.recreate_role([f"{OWN}-*"], actions))
            else:
                server.take_back(self.role)
            self.granted[server.port] = actions


recreation = Recreation()


@pytest.fixture(autouse=True)
def role_of_the_test(request: pytest.FixtureRequest, box: sandbox.Sandbox) -> None:
    """Only a test that asks for it may recreate an index; the next one that asks finds the role still there."""
    if "may_recreate" not in request.fixturenames:
        recreation.allow(box.server, ())


@pytest.fixture
def may_recreate(box: sandbox.Sandbox) -> Callable[..., None]:
    """Let the scripts' user drop and create indices too; with arguments, only what they name."""

    def allow(*actions: str) -> None:
        recreation.allow(box.server, actions)

    allow(*sandbox.RECREATE_PERMISSIONS)
    return allow


# --- a reader of the alias --------------------------------------------------------------------------------------------


class Reader(threading.Thread):
    """Asks the alias for the count and a sum in one search, again and again until stopped; each copy now and then."""

    def __init__(self, endpoint: str, alias: str, field: str, *, outage_is_an_error: bool = True) -> None:
        super().__init__(daemon=True)
        self.url, self.outage_is_an_error = f"{endpoint}/{alias}/_search", outage_is_an_error
        self.body = {"size": 0, "track_total_hits": True, "aggs": {"sum": {"sum": {"field": field}}}}
        self.seen: list[tuple[int, float]] = []
        self.errors: list[str] = []
        self.stopped = threading.Event()

    def run(self) -> None:
        login = urllib3.make_headers(basic_auth=f"{sandbox.ADMIN}:{sandbox.ADMIN_PASSWORD}")
        with urllib3.PoolManager(headers=login, cert_reqs="CERT_NONE", retries=False, timeout=30) as http:
            for number in itertools.takewhile(lambda _: not self.stopped.wait(READER_PAUSE_S), itertools.count()):
                try:
                    url = f"{self.url}?preference=reader-{number}"
                    answer = http.request("POST", url, json=self.body, headers=login)
                    parsed = answer.json()
                except (urllib3.exceptions.HTTPError, ValueError) as error:
                    self.outage(str(error))
                    continue
                if answer.status in (502, 503, 504):
                    self.outage(answer.data.decode())
                elif answer.status != 200 or parsed["_shards"]["failed"]:
                    self.errors.append(answer.data.decode()[:300])
                else:
                    found = (parsed["hits"]["total"]["value"], parsed["aggregations"]["sum"]["value"])
                    if not self.seen or self.seen[-1] != found:
                        self.seen.append(found)

    def outage(self, text: str) -> None:
        if self.outage_is_an_error:
            self.errors.append(text[:300])
        time.sleep(0.1)

    def finish(self) -> list[tuple[int, float]]:
        self.stopped.set()
        self.join(60)
        return self.seen
