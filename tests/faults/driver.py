"""Whole refreshes of small indices under faults, with a reader at the alias, and what has to hold at the end of each.

def test_something(world):
    world.proxy.on("POST", "/_bulk", lost_answer)
    world.expect(world.refresh(), code=0)          # the disturbed run
    world.heal()                                   # one more, undisturbed, and all that must hold then
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sandbox
from conftest import TEST_PATTERNS, Reader, by_id, digest_of, fill
from fault_proxy import FaultProxy
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

TOP = Path(__file__).resolve().parents[2]
TYPES = {"n": "long", "half": "double", "word": "keyword"}
MAPPING = {"properties": {name: {"type": kind} for name, kind in TYPES.items()}, "_meta": {"owner": "team a"}}
SETTINGS = {"number_of_replicas": 1, "refresh_interval": "7s"}
OLD = [{"n": n, "half": n / 2, "word": "old"} for n in range(40)]
NEW_ROWS = 43  # within the threshold of 10 %
BATCH_SIZE = 10  # so that a load takes several requests
SECRETS = [sandbox.PASSWORD, b64encode(f"{sandbox.USER}:{sandbox.PASSWORD}".encode()).decode()]
# by the server, to each index that is created or cloned
GIVEN = ("uuid", "creation_date", "resize", "routing", "routing_partition_size")
READ_ONLY = re.compile(r"/(_refresh|_search|_count|_flush|_forcemerge)\b")
set_hypothesis_home_dir(sandbox.CACHE / "hypothesis")  # or it leaves a folder wherever a test stands
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


def profiles(short: int, many: int) -> pytest.MarkDecorator:
    """Run a test with `short` examples that never change, and in the long form with `many` new ones."""
    few = settings(max_examples=short, derandomize=True, **QUIET)
    long = settings(max_examples=many, print_blob=True, **QUIET)
    marks = [pytest.mark.long, pytest.mark.timeout(7200)]
    return pytest.mark.parametrize("profile", [pytest.param(few, id="few"), pytest.param(long, id="many", marks=marks)])


def new_objects() -> dict[str, bytes]:
    """Three objects, one of them gzip; a gap and a quoted newline in each."""
    rows = [f'{n},{"" if n % 9 == 0 else n / 2},"new\n{n}"' for n in range(100, 100 + NEW_ROWS)]
    parts = {"a.csv": rows[:15], "b.csv.gz": rows[15:30], "c.csv": rows[30:]}
    texts = {key: ("n,half,word\n" + "\n".join(part) + "\n").encode() for key, part in parts.items()}
    return {key: gzip.compress(text, mtime=0) if key.endswith(".gz") else text for key, text in texts.items()}


def expected_documents(prefix: str, objects: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """Return id and document of each row, made from the specification and not by the scripts' code."""
    found = {}
    for key, body in objects.items():
        text = (gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body).decode()
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline="")), 1):
            convert = {"n": int, "half": float, "word": str}
            document = {name: convert[name](cell) for name, cell in row.items() if cell}
            found[f"{digest_of(prefix + key)}-{number:09d}"] = document
    return found


@dataclass(frozen=True)
class Run:
    """One run of the runner: its exit code, and all that it has printed or logged."""

    code: int
    out: str
    err: str
    log: str


class World:
    """Two indices, an alias, S3 objects, a proxy before the cluster and one before S3, and a reader."""

    def __init__(
        self, box: sandbox.Sandbox, name: Callable[[str], str], environment: dict[str, str], folder: Path,
        settings: Mapping[str, Any] = SETTINGS,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.box, self.admin, self.folder = box, box.server.request, folder
        self.primary, self.secondary, self.alias = name("primary"), name("secondary"), name("alias")
        self.prefix = f"{name('prefix')}/"
        self.s3 = sandbox.aws_client("s3", box.environment)
        self.proxy = FaultProxy(box.server.endpoint)
        self.s3_proxy = FaultProxy(box.environment["AWS_ENDPOINT_URL"])
        self.objects = new_objects()
        self.environment = {
            **environment, "PRIMARY_INDEX": self.primary, "SECONDARY_INDEX": self.secondary,
            "INDEX_ALIAS": self.alias, "S3_BUCKET": sandbox.BUCKET, "S3_PREFIX": self.prefix,
            "BATCH_SIZE": str(BATCH_SIZE), "PYTHON": sys.executable, "RETRY_SECONDS": "20", "WAIT_SECONDS": "5",
            "OPENSEARCH_ENDPOINT": self.proxy.endpoint, "OPENSEARCH_USERNAME": sandbox.USER,
            "OPENSEARCH_PASSWORD": sandbox.PASSWORD, "AWS_ENDPOINT_URL": self.s3_proxy.endpoint,
        }  # fmt: skip
        self.alternate = False
        self.reader = Reader(box.server.endpoint, self.alias, "n")
        self.runs: list[Run] = []

    def __enter__(self) -> World:
        for index in (self.primary, self.secondary):
            self.admin("PUT", f"/{index}", {"settings": self.settings, "mappings": MAPPING})
        self.admin("POST", "/_aliases", {"actions": [{"add": {"index": self.primary, "alias": self.alias}}]})
        fill(self.admin, self.primary, OLD)
        self.put(self.objects)
        self.before = {index: self.state(index) for index in (self.primary, self.secondary)}
        self.proxy.__enter__()
        self.s3_proxy.__enter__()
        self.reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.finish()
        self.proxy.__exit__()
        self.s3_proxy.__exit__()

    def go_the_cheap_way(self) -> None:
        """Alternate between the indices, and recreate instead of deleting; both hold the old data."""
        self.alternate = True
        self.environment |= {"REFRESH_STRATEGY": "alternate", "CLEANUP_METHOD": "recreate"}
        fill(self.admin, self.secondary, OLD)

    def put(self, objects: dict[str, bytes]) -> None:
        for key, body in objects.items():
            self.s3.put_object(Bucket=sandbox.BUCKET, Key=self.prefix + key, Body=body)

    # --- running ---

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Start the runner, or another command, in a process group of its own."""
        return subprocess.Popen(
            command or [str(TOP / "run_refresh.sh")], env={**os.environ, **self.environment, **variables}, cwd=TOP,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def finish(self, process: subprocess.Popen[str], timeout: float = 120) -> Run:
        """Wait for a run and record its output."""
        out, err = process.communicate(timeout=timeout)
        logs = sorted((self.folder / "logs").glob("refresh-*.log"), key=lambda path: path.stat().st_mtime)
        run = Run(process.returncode, out, err, logs[-1].read_text() if logs else "")
        self.runs.append(run)
        return run

    def refresh(self, **variables: str) -> Run:
        return self.finish(self.start(**variables))

    # --- what has to hold ---

    def expect(self, run: Run, *, code: int, message: str = "") -> None:
        """The run ended with this code, and its last lines say why (a regular expression)."""
        assert run.code == code, f"{run.err}\n{run.log}"
        assert re.search(message, run.err), run.err

    def heal(self, **variables: str) -> None:
        """Run once more, undisturbed; then everything is as after a refresh that was never disturbed."""
        self.proxy.rules.clear()
        self.s3_proxy.rules.clear()
        self.proxy.watch = self.s3_proxy.watch = lambda exchange: False
        self.assert_on_one_index()
        run = self.refresh(**variables)
        assert run.code == 0, f"{run.err}\n{run.log}"
        self.assert_done()

    def assert_done(self) -> None:
        """Readers are on an index that holds S3 row by row; the reader saw no error, nothing is left behind."""
        [live] = self.behind_alias()
        assert live == self.primary or self.alternate
        assert self.documents(live) == expected_documents(self.prefix, self.objects)
        assert set(self.admin("GET", f"/{self.secondary}*,{self.primary}*")) == {self.primary, self.secondary}
        time.sleep(0.2)  # so that the reader sees the end
        self.assert_reader_saw_nothing_odd()
        now = {index: self.state(index) for index in (self.primary, self.secondary)}
        assert now == self.before, f"{now}\n{self.before}"
        assert self.tasks() == []
        self.assert_no_secret()

    def assert_on_one_index(self) -> None:
        assert self.behind_alias() in ([self.primary], [self.secondary])

    def assert_reader_saw_nothing_odd(self) -> None:
        seen = self.reader.finish()
        new = [document["n"] for document in expected_documents(self.prefix, self.objects).values()]
        whole = [(len(OLD), float(sum(row["n"] for row in OLD))), (len(new), float(sum(new)))]
        assert self.reader.errors == []
        assert seen in (whole, whole[:1], whole[1:]), seen

    def assert_no_secret(self) -> None:
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        texts = [path.read_text(errors="replace") for path in files] + [run.out + run.err for run in self.runs]
        assert not [secret for secret in SECRETS for text in texts if secret in text]
        assert {path.stat().st_mode & 0o077 for path in files} <= {0}, files

    def behind_alias(self) -> list[str]:
        """Return the indices that the alias points at."""
        return list(self.admin("GET", f"/_alias/{self.alias}"))

    def documents(self, index: str) -> dict[str, dict[str, Any]]:
        return by_id(self.admin, index)

    def state(self, index: str) -> dict[str, Any]:
        """Settings and mapping, `_meta` included; a default that was spelled out is still the default."""
        found = self.admin("GET", f"/{index}")[index]
        own = {name: value for name, value in found["settings"]["index"].items() if name not in GIVEN}
        own["version"].pop("upgraded", None)
        return {"settings": own, "mappings": found["mappings"]}

    def tasks(self) -> list[str]:
        nodes = self.admin("GET", "/_tasks?actions=*reindex,*byquery&detailed=true")["nodes"].values()
        tasks = [task for node in nodes for task in node["tasks"].values()]
        both = (self.primary, self.secondary)
        return [task["description"] for task in tasks if any(index in task["description"] for index in both)]


def changes_state(method: str, path: str) -> bool:
    return method in ("PUT", "DELETE") or (method == "POST" and not READ_ONLY.search(path.split("?")[0]))


def add_roles(node: sandbox.OpenSearch) -> None:
    if sandbox.SECURE:
        node.grant("tests", sandbox.refresh_role(TEST_PATTERNS))
        node.grant("recreate", sandbox.recreate_role(["t-*"]))
