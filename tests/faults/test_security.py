"""The smallest role, certificates and redirects, forged log lines, private files."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import stat
import sys
import threading
from pathlib import Path

import pytest
import sandbox
from bulkupdate import ROWS_CHECKED
from conftest import Account, fill, secured
from fault_proxy import HOP_BY_HOP, Exchange, FaultProxy, answer

from .driver import OLD, SECRETS, TOP

long = pytest.mark.long


def lacks(account: Account, permission: str) -> str:
    """Return what one line has to say: the user, and the action, where the role has a pattern."""
    action = re.escape(permission).replace(r"\*", r"[\w/*]*(\[\w+\])?")
    return rf"(?m)^(?=.*\b{account.user}\b).*[ \[\"]{action}($|[\],; \"])"


# --- the role ---------------------------------------------------------------------------------------------------------


@secured
def test_a_refresh_without_a_permission_names_it_in_step_0_and_the_next_run_with_it_heals(world, account):
    permission = "indices:data/write/delete"  # would be missed only inside a task on the server
    account.grant(permission)
    run = world.refresh(**account.login)
    world.expect(run, code=1, message=lacks(account, permission))
    assert "FAILED at: check" in run.err
    assert {index: world.state(index) for index in world.before} == world.before
    assert world.behind_alias() == [world.primary]
    account.grant()
    world.heal(**account.login)


@secured
@long
@pytest.mark.timeout(900)  # the server keeps deleted documents for half a minute
@pytest.mark.parametrize("permission", ["indices:admin/flush*", "indices:admin/forcemerge"])
def test_a_cleanup_without_a_permission_names_it_and_the_next_run_with_it_succeeds(world, account, permission):
    fill(world.admin, world.secondary, OLD)
    command = [sys.executable, str(TOP / "index_cleanup.py"), "--index", world.secondary]
    account.grant(permission)
    run = world.finish(world.start(*command, **account.login), timeout=250)
    world.expect(run, code=1, message=lacks(account, permission))
    account.grant()
    run = world.finish(world.start(*command, **account.login), timeout=250)
    world.expect(run, code=0)
    assert json.loads(run.out)["documents"] == 0
    world.heal(**account.login)


# --- certificates -----------------------------------------------------------------------------------------------------


class TlsServer:
    """Speaks TLS with a certificate of its own, records what it receives after each handshake, and answers 403."""

    def __init__(self, folder, **certificate) -> None:
        sandbox.write_certificate(folder, **certificate)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "node.pem", folder / "node.key")
        self.ca = str(folder / "ca.pem")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.connections, self.received = 0, b""
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                plain, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            plain.settimeout(20)
            try:
                with self.context.wrap_socket(plain, server_side=True) as connection:
                    self.received += connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            except OSError:  # the client has broken the handshake off
                plain.close()


@pytest.fixture
def tls(tmp_path_factory):
    servers = []

    def start(**certificate) -> TlsServer:
        servers.append(TlsServer(tmp_path_factory.mktemp("tls"), **certificate))
        return servers[-1]

    yield start
    for server in servers:
        server.listener.close()


@pytest.mark.parametrize(
    ("certificate", "variables", "reason"),
    [
        pytest.param({}, {"VERIFY_SSL": "true"}, "self-signed certificate", marks=long, id="self-signed"),
        pytest.param({}, {"CA_BUNDLE": "another"}, "self-signed certificate", marks=long, id="another authority"),
        pytest.param({}, {"CA_BUNDLE": "another", "VERIFY_SSL": "false"}, "self-signed certificate", marks=long,
                     id="a bundle goes before VERIFY_SSL"),
        pytest.param({"names": ("elsewhere.example",)}, {"CA_BUNDLE": "own"}, "not valid for 'localhost'",
                     id="another host name"),
        pytest.param({"days": -1}, {"CA_BUNDLE": "own"}, "certificate has expired", marks=long, id="expired"),
    ],
)  # fmt: skip
def test_a_wrong_certificate_is_refused_before_anything_is_sent(world, tls, certificate, variables, reason):
    server = tls(**certificate)
    bundles = {"own": server.ca, "another": tls().ca}
    variables = {name: bundles.get(value, value) for name, value in variables.items()}
    run = world.refresh(OPENSEARCH_ENDPOINT=f"https://localhost:{server.port}", **variables)
    world.expect(run, code=1, message=rf"certificate verify failed: .*{reason}")
    assert server.connections == 1  # and no second try: it will not get better
    assert server.received == b""
    assert world.proxy.requests == []
    world.expect(world.refresh(OPENSEARCH_ENDPOINT=f"https://localhost:{server.port}"), code=1, message="es:ESHttpGet")
    assert b"\r\nAuthorization: Basic " in server.received  # unverified, it would have been seen
    world.heal()


# --- who is talked to, and as whom ------------------------------------------------------------------------------------


@pytest.fixture
def stranger(box):
    """A server that must receive no request; it records those it gets."""
    with FaultProxy(box.server.endpoint) as running:
        yield running


@long
@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_of_the_bucket_is_followed_nowhere(world, stranger, status):
    rule = world.s3_proxy.on("GET", r"a\.csv", answer(status, location=f"{stranger.endpoint}/x"), times=None)
    world.expect(world.refresh(RETRY_SECONDS="3"), code=1, message=r"s3://\S+a\.csv")
    assert rule.seen
    assert stranger.requests == []
    world.heal()


# --- log lines --------------------------------------------------------------------------------------------------------

EVIL = "x\n2026-01-01T00:00:00Z INFO bulkupdate: done: forged\r\x1b[2K\x1b]0;title\x07\u2028b\x85c\x9b31m\x7f"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
LOG_LINE = re.compile(
    rf"{STAMP} (DEBUG|INFO|WARNING|ERROR) \w+: .*|{STAMP} run_refresh: .*|\$ \w+\.py .*|> .*"
    r"|(step|total|checks and pauses|[1-4] (copy|switch|load) .*) +(seconds|\d+).*"
)
TERMINAL_LINE = re.compile(
    r"(==>|<==) .*|(DEBUG|INFO|WARNING|ERROR) \w+: .*|finished in .*|FAILED at: .*"
    r"|(this run has not moved readers|readers are on \S+, [0-9,]+ documents).*"
)
GOOD_ROWS = "7,1,w\n" * ROWS_CHECKED  # after these, a dry run does not see defects


def assert_no_forged_line(run):
    """Each line is one that the scripts have written, and what it quotes of others cannot move the cursor."""
    for text, kind in ((run.log, LOG_LINE), (run.err, TERMINAL_LINE)):
        assert not CONTROL.search(text), repr(text)
        assert [line for line in text.rstrip("\n").split("\n") if not kind.fullmatch(line)] == []
        assert not re.search(rf"(?m)^{STAMP} INFO bulkupdate: done: forged|^INFO bulkupdate: done: forged", text)


def quoted(*cells: str) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\n"


def newline_in_key(exchange):
    """S3 takes keys with a newline, but the one at hand does not: there it is NEWLINE."""
    exchange.handler.path = exchange.handler.path.replace("%0A", "NEWLINE")
    response = exchange.forward()
    headers = {name: value for name, value in response.headers.items() if name.lower() not in HOP_BY_HOP}
    exchange.reply(response.status_code, response.content.replace(b"NEWLINE", b"%0A"), headers)
    return True


@long
def test_neither_key_nor_cell_forges_a_line_of_the_log(world):
    key = f"b-{EVIL}.csv".replace("\n", "NEWLINE")
    world.s3_proxy.watch = newline_in_key
    defects = quoted(EVIL, "1", EVIL) + quoted("7", EVIL, "w", EVIL)
    for code, rows, message in (
        (4, defects, r"First reasons: \S+b-x\\n2026.*done: forged\\r\\x1b\[2K.* line 2"),
        (3, GOOD_ROWS + defects, r"rejected: \S+b-x\\n2026.*done: forged\\r\\x1b\[2K.* line 102, column n"),
    ):
        body = f"n,half,word\n{rows}".encode()
        world.s3.put_object(Bucket=sandbox.BUCKET, Key=world.prefix + key, Body=body)
        run = world.refresh()
        world.expect(run, code=code)
        assert re.search(message, run.log), run.log
        assert_no_forged_line(run)
    world.s3.delete_object(Bucket=sandbox.BUCKET, Key=world.prefix + key)
    world.heal()


HEADERS = {
    "doubled": (["n", EVIL, EVIL], [4], "duplicate column names: x"),
    "no field": (["n", f".{EVIL}"], [4], "invalid field names"),
    "no column known": ([EVIL], [4], "defines none of the columns x"),
    "new": (["n", EVIL], [0, 1, 3], ""),  # whether it is a name is for the server to say
}


@long
@pytest.mark.parametrize(("names", "codes", "message"), HEADERS.values(), ids=HEADERS)
def test_the_name_of_a_column_forges_no_line_of_the_log(world, names, codes, message):
    world.put({"d.csv": (quoted(*names) + quoted(*["500", "a", "b"][: len(names)])).encode()})
    run = world.refresh(FIELD_THRESHOLD="100")
    assert_no_forged_line(run)
    assert run.code in codes, run.err
    assert re.search(message, run.err), run.err
    if codes != [4]:
        assert re.search(r"new fields: x\\n2026.*done: forged\\r\\x1b\[2K", run.log), run.log
    world.assert_on_one_index()
    world.assert_no_secret()


# --- files ------------------------------------------------------------------------------------------------------------


@long
def test_no_secret_is_in_the_list_of_processes(world):
    lines: set[bytes] = set()

    def look(_: Exchange) -> bool:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                lines.add(path.read_bytes())
        return False

    world.proxy.watch = look
    world.expect(world.refresh(), code=0)
    for script in (b"reindex.py", b"switch_alias.py", b"bulkupdate.py"):
        assert any(script in line for line in lines)
    assert [line for line in lines if any(secret.encode() in line for secret in SECRETS)] == []


@long
@pytest.mark.parametrize("mask", ["000", "022"])
def test_logs_rejects_and_locks_are_private_under_any_umask(world, mask):
    world.put({"d.csv": f"n,half,word\n{GOOD_ROWS}x,1,a secret of the data\n".encode()})
    folders = {"LOG_DIR": str(world.folder / "new" / "logs"), "LOCK_DIR": str(world.folder / "new" / "locks")}
    script = "umask $0; exec ./run_refresh.sh"
    run = world.finish(world.start("bash", "-c", script, mask, **folders))
    world.expect(run, code=3, message="1 rows were rejected")
    load = [sys.executable, "bulkupdate.py", "--bucket", sandbox.BUCKET, "--prefix", world.prefix,
            "--index", world.primary]  # fmt: skip
    script = 'umask $0; exec "$@"'
    direct = {name: str(world.folder / "direct" / name) for name in folders}
    run = world.finish(world.start("bash", "-c", script, mask, *load, **direct))
    world.expect(run, code=3, message="1 rows were rejected")
    files = [path for name in ("new", "direct") for path in (world.folder / name).rglob("*") if path.is_file()]
    kinds = {re.sub(r"[-.].*", "", path.name) for path in files}
    assert {"rejects", "refresh"} <= kinds
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in files} == {0o700}
    world.s3.delete_object(Bucket=sandbox.BUCKET, Key=f"{world.prefix}d.csv")
    world.heal()
