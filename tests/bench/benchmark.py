"""Compare bulkupdate.py with the limit of the server and with what an operator could take instead.

Usage: tests/sandbox.sh python tests/bench/benchmark.py [--rounds 5] [--only flights] [--chart FILE.svg]
All loaders run against one warm server in alternating rounds, over TLS, each into a fresh one-shard index.
Exit code 1 when a loader's count is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import queue
import random
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TOP / "tests"), str(TOP)]

import requests
import sandbox
import urllib3

INDEX = sandbox.SECONDARY  # one that the restricted user may write to
BUCKET = sandbox.BUCKET
GRID = [(size, connections) for size in (1000, 2000, 5000) for connections in (2, 3)]
# Started by a process of its own: the peak of a child counts what its parent held when it was forked.
MEASURE = """import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))"""
LATENCY_S = 0.02
STALL_S = 2.0
SETTLE_S = 2.0  # what the load before has left to the server must not slow the next one
MEMORY_CASES = [  # megabytes of CSV, objects, gzip
    (31, 1, False), (310, 1, False), (310, 1000, False), (310, 1, True), (3000, 1, False), (3000, 1000, True),
]  # fmt: skip
WORDS = "delayed gate crew weather fuel inbound late tower hold taxi runway bags door slot checked cleared".split()


# --- the data ---------------------------------------------------------------------------------------------------------


@dataclass
class DataSet:
    """CSV objects under a prefix of the sandbox's bucket, and the mapping they are loaded into."""

    name: str
    prefix: str
    rows: int
    mapping: dict[str, Any]


def flights() -> DataSet:
    rows = sum(path.read_bytes().count(b"\n") - 1 for path in sandbox.month_files())
    return DataSet("flights", sandbox.PREFIX, rows, sandbox.FLIGHTS_MAPPING)


def texts(s3: Any) -> DataSet:
    """The flights with two more columns of free text, no two alike, so that no cache of values helps."""
    made, rows = random.Random(1), 0
    for path in sandbox.month_files():
        header, *lines = path.read_text().splitlines()
        rows += len(lines)
        free = ((" ".join(made.choices(WORDS, k=8)), " ".join(made.choices(WORDS, k=6))) for _ in lines)
        body = [f"{line},{n} {a},{b} {n}" for n, (line, (a, b)) in enumerate(zip(lines, free))]
        s3.put_object(Bucket=BUCKET, Key=f"texts/{path.name}", Body="\n".join([f"{header},note,remark", *body]) + "\n")
    text = {name: {"type": "text"} for name in ("note", "remark")}
    return DataSet("texts", "texts/", rows, {"properties": {**sandbox.FLIGHTS_MAPPING["properties"], **text}})


def objects(s3: Any, prefix: str) -> Iterator[str]:
    for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]:
        yield s3.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read().decode()


def typed_rows(s3: Any, prefix: str) -> Iterator[dict[str, Any]]:
    for text in objects(s3, prefix):
        yield from map(sandbox.document, csv.DictReader(io.StringIO(text)))


# --- the loaders ------------------------------------------------------------------------------------------------------


def finished_bodies(s3: Any, prefix: str, size: int, own_ids: bool) -> list[bytes]:
    documents = (json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in typed_rows(s3, prefix))
    heads = (
        f'{{"create":{{"_id":"0123456789abcdef-{n:09d}"}}}}\n' if own_ids else '{"create":{}}\n'
        for n in itertools.count(1)
    )  # fmt: skip
    lines = (f"{head}{document}\n" for head, document in zip(heads, documents))
    return ["".join(part).encode() for part in iter(lambda: list(itertools.islice(lines, size)), [])]


def send_bodies(endpoint: str, bodies: list[bytes], connections: int) -> None:
    """Send finished bodies and do nothing else: what the server can take."""
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    for body in bodies:
        waiting.put(body)
    context = ssl._create_unverified_context()
    headers = urllib3.make_headers(basic_auth=f"{sandbox.ADMIN}:{sandbox.ADMIN_PASSWORD}")
    headers["Content-Type"] = "application/x-ndjson"
    pool = urllib3.PoolManager(num_pools=1, maxsize=connections, ssl_context=context)

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                url = f"{endpoint}/{INDEX}/_bulk?filter_path=errors"
                answer = pool.request("POST", url, body=waiting.get_nowait(), headers=headers)
                assert answer.data == b'{"errors":false}', answer.data[:300]

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def load_with_opensearch_py(s3: Any, endpoint: str, prefix: str) -> None:
    from opensearchpy import OpenSearch, helpers

    client = OpenSearch(endpoint, http_auth=(sandbox.ADMIN, sandbox.ADMIN_PASSWORD), verify_certs=False,
                        ssl_show_warn=False, timeout=60, pool_maxsize=4)  # fmt: skip
    actions = ({"_index": INDEX, "_source": row} for row in typed_rows(s3, prefix))
    for ok, item in helpers.parallel_bulk(client, actions, thread_count=4, chunk_size=1000):
        assert ok, item
    client.indices.refresh(index=INDEX)


def load_with_pandas(s3: Any, endpoint: str, prefix: str) -> None:
    """As people write it: read_csv, a loop over the rows, a bulk request for each thousand."""
    import pandas

    session = requests.Session()
    session.auth, session.verify = (sandbox.ADMIN, sandbox.ADMIN_PASSWORD), False
    session.trust_env = False

    def post(lines: list[str]) -> None:
        body = "\n".join(lines) + "\n"
        headers = {"Content-Type": "application/x-ndjson"}
        answer = session.post(f"{endpoint}/{INDEX}/_bulk", data=body.encode(), headers=headers).json()
        assert not answer["errors"]

    for text in objects(s3, prefix):
        frame = pandas.read_csv(io.StringIO(text))
        lines: list[str] = []
        for _, row in frame.iterrows():
            lines += ['{"index":{}}', row.dropna().to_json()]
            if len(lines) >= 2000:
                post(lines)
                lines = []
        if lines:
            post(lines)
    session.post(f"{endpoint}/{INDEX}/_refresh")


LOADERS: dict[str, Callable[[Any, str, str], None]] = {
    "opensearch-py": load_with_opensearch_py,
    "pandas": load_with_pandas,
}


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """Of one loader on one data set, a value a round."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)


class Bench:
    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.session = requests.Session()
        self.session.auth, self.session.verify = (sandbox.ADMIN, sandbox.ADMIN_PASSWORD), False
        self.session.trust_env = False  # REQUESTS_CA_BUNDLE would win over verify
        self.s3 = sandbox.aws_client("s3", dict(os.environ))
        self.wrong = False

    def admin(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.session.request(method, self.endpoint + path, json=body, timeout=600)
        answer.raise_for_status()
        return answer.json()

    def fresh_index(self, data: DataSet) -> None:
        self.admin("DELETE", f"/{INDEX}?ignore_unavailable=true")
        time.sleep(SETTLE_S)
        settings = {"index.number_of_shards": 1, "index.refresh_interval": "-1"}
        self.admin("PUT", f"/{INDEX}", {"settings": settings, "mappings": data.mapping})

    def count(self) -> int:
        return int(self.admin("GET", f"/{INDEX}/_count")["count"])

    def check(self, name: str, data: DataSet) -> None:
        if (found := self.count()) != data.rows:
            self.wrong = True
            print(f"WRONG COUNT: {name} stored {found:,} of {data.rows:,} rows", file=sys.stderr)

    def limit(self, data: DataSet, bodies: list[bytes], connections: int, figures: Figures, name: str) -> None:
        self.fresh_index(data)
        began, cpu = time.monotonic(), time.process_time()
        send_bodies(self.endpoint, bodies, connections)
        self.admin("POST", f"/{INDEX}/_refresh")
        self.check(name, data)
        figures.seconds.append(time.monotonic() - began)
        figures.cpu.append(time.process_time() - cpu)
        figures.peak_mb.append(0)

    def process(self, data: DataSet, command: list[str], figures: Figures, name: str, **variables: str) -> None:
        """Run a loader as a whole process and take the operating system's figures for it."""
        self.fresh_index(data)
        began = time.monotonic()
        measured = [sys.executable, "-c", MEASURE, *command]
        done = subprocess.run(measured, env={**os.environ, **variables}, capture_output=True, text=True)
        figures.seconds.append(time.monotonic() - began)
        code, cpu, peak_mb = json.loads(done.stdout)
        if code:
            self.wrong = True
            print(f"{name}: exit {code}\n{done.stderr[-2000:]}", file=sys.stderr)
        figures.cpu.append(cpu)
        figures.peak_mb.append(peak_mb)
        self.check(name, data)

    def best_of_grid(self, data: DataSet) -> tuple[int, int]:
        """Return the request size and number of connections with which finished bodies load fastest."""
        tried: dict[tuple[int, int], float] = {}
        for size in sorted({size for size, _ in GRID}):
            bodies = finished_bodies(self.s3, data.prefix, size, own_ids=True)
            for connections in [connections for grid_size, connections in GRID if grid_size == size]:
                figures = Figures()
                for _ in range(2):
                    self.limit(data, bodies, connections, figures, "limit")
                tried[size, connections] = min(figures.seconds)
        return min(tried, key=tried.__getitem__)

    def compare(self, data: DataSet, rounds: int, warm_up: int, slow: bool) -> dict[str, Figures]:
        size, connections = self.best_of_grid(data)
        print(f"{data.name}: the limit is {size} documents a request over {connections} connections")
        bodies = finished_bodies(self.s3, data.prefix, size, own_ids=True)
        generated = finished_bodies(self.s3, data.prefix, size, own_ids=False)
        figures: dict[str, Figures] = {}
        for at in range(-warm_up, rounds):
            for name, run in self.contenders(data, bodies, generated, connections, slow):
                measured = Figures() if at < 0 else figures.setdefault(name, Figures())
                if at < 0 and name in LOADERS:
                    continue
                run(measured)
                print(".", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return figures

    def contenders(
        self, data: DataSet, bodies: list[bytes], generated: list[bytes], connections: int, slow: bool
    ) -> list[tuple[str, Callable[[Figures], None]]]:
        bulkupdate = bulkupdate_command(data.prefix)
        found: list[tuple[str, Callable[[Figures], None]]] = [
            ("limit", lambda figures: self.limit(data, bodies, connections, figures, "limit")),
            ("limit, generated ids", lambda figures: self.limit(data, generated, connections, figures, "generated")),
            ("bulkupdate.py", lambda figures: self.process(data, bulkupdate, figures, "bulkupdate.py")),
            ("bulkupdate.py --batch-size 1000", lambda figures: self.process(
                data, [*bulkupdate, "--batch-size", "1000"], figures, "bulkupdate.py 1000")),
        ]  # fmt: skip
        for name in LOADERS if slow else ():
            command = [sys.executable, __file__, "--loader", name, "--prefix", data.prefix]
            found.append((name, lambda figures, c=command, n=name: self.process(data, c, figures, n)))  # type: ignore
        return found


def bulkupdate_command(prefix: str, *more: str) -> list[str]:
    script = [sys.executable, str(TOP / "bulkupdate.py")]
    return [*script, "--bucket", BUCKET, "--prefix", prefix, "--index", INDEX, *more]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def ratio(figures: dict[str, Figures], name: str, other: str) -> list[float]:
    return [mine / theirs for mine, theirs in zip(figures[name].seconds, figures[other].seconds)]


def print_table(data: DataSet, figures: dict[str, Figures]) -> None:
    print(f"\n{data.name}, {data.rows:,} rows, {len(figures['limit'].seconds)} rounds, median (least-most)\n")
    print(f"| loader | seconds | documents/s | client CPU s | peak MB | ratio to the limit |\n|{'---|' * 6}")
    for name, own in figures.items():
        speed = round(data.rows / statistics.median(own.seconds))
        peak = f"{max(own.peak_mb):.0f}" if any(own.peak_mb) else ""
        print(f"| {name} | {spread(own.seconds)} | {speed:,} | {statistics.median(own.cpu):.1f} | {peak} | "
              f"{spread(ratio(figures, name, 'limit'))} |")  # fmt: skip


def draw(results: dict[str, dict[str, Figures]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "benchmark"  # the same figures draw the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 3), squeeze=False)
    for axis, (title, figures) in zip(axes[0], results.items()):
        names = list(figures)
        medians = [statistics.median(figures[name].seconds) for name in names]
        bars = axis.barh(names, medians, color=["#999999" if "limit" in name else "#1f77b4" for name in names])
        axis.bar_label(bars, fmt="%.1f", padding=2)
        axis.invert_yaxis()
        axis.set(title=title, xlabel="seconds to the verified count", xmargin=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


# --- beside the comparison --------------------------------------------------------------------------------------------


def stages(bench: Bench, data: DataSet) -> None:
    """Print the seconds of each stage of the pipeline, by running it up to there, and those spent on waiting."""
    import bulkupdate as b
    from opensearch_base_manager import resolve

    bench.fresh_index(data)
    settings = resolve("bulkupdate", b.build_parser().parse_args(bulkupdate_command(data.prefix)[2:]))
    with b.BulkUpdate(settings) as load:
        load.target.claim()
        items = load.delivery.objects()
        types, _ = load._inspect(items)
        print(f"\n{data.name}: seconds of the main thread in each stage")
        print_stages(load, items, types, data.rows)


def print_stages(load: Any, items: list[Any], types: dict[str, str], rows: int) -> None:
    import bulkupdate as b

    def read() -> None:
        for item in items:
            body = b.unpacked(b.S3Body(load.bucket, item))
            while body.read(b.CHUNK_BYTES):
                pass

    def parse() -> None:
        for item in items:
            _, blocks = b.read_csv(b.unpacked(b.S3Body(load.bucket, item)), item.key, ",")
            for _ in blocks:
                pass

    def render() -> None:
        load.renderer = b.Renderer(types, load.rejects.add, bucket=load.bucket.name)
        for _ in b.batches(load._documents(items, b.ConcurrencyLimit()), load.settings.batch_size):
            pass

    def whole() -> None:
        load._load(items, types)

    before = 0.0
    for name, stage, times in (("S3 read", read, 3), ("CSV", parse, 3), ("types and JSON", render, 3),
                               ("waiting for the server", whole, 1)):  # fmt: skip
        seconds = min(timed(stage) for _ in range(times))
        print(f"  {name}: {seconds - before:.2f} s, {(seconds - before) / rows * 1e6:.2f} us a row")
        before = seconds


def timed(action: Callable[[], None]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@contextlib.contextmanager
def slow_line(endpoint: str, delay_s: float) -> Iterator[str]:
    """Pass TCP on to the server, each piece of an answer later, from a process of its own."""
    port, target = sandbox.free_port(), int(endpoint.rsplit(":", 1)[1])
    child = subprocess.Popen([sys.executable, __file__, "--delay-line", str(port), str(target), str(delay_s)])
    sandbox.wait_for_port(port)
    try:
        yield f"https://127.0.0.1:{port}"
    finally:
        child.kill()
        child.wait()


async def delay_line(port: int, target: int, delay_s: float) -> None:
    loop = asyncio.get_running_loop()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        while data := await reader.read(256 * 1024):
            if delay:
                loop.call_later(delay, writer.write, data)
            else:
                writer.write(data)
                await writer.drain()
        loop.call_later(delay, writer.close)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pipe(reader, server_writer, 0), pipe(server_reader, writer, delay_s))

    async with await asyncio.start_server(accept, "127.0.0.1", port) as server:
        await server.serve_forever()


def with_latency(bench: Bench, data: DataSet, rounds: int) -> None:
    near, far, stalled = Figures(), Figures(), Figures()
    command = bulkupdate_command(data.prefix)
    user = {"OPENSEARCH_USERNAME": sandbox.USER, "OPENSEARCH_PASSWORD": sandbox.PASSWORD}
    with slow_line(bench.endpoint, LATENCY_S) as endpoint:
        for _ in range(rounds):
            bench.process(data, command, near, "near")
            bench.process(data, command, far, "far", OPENSEARCH_ENDPOINT=endpoint, **user)
    with slow_line(bench.endpoint, STALL_S) as endpoint:
        bench.process(data, command, stalled, "stalled", OPENSEARCH_ENDPOINT=endpoint, **user)
    print(f"\nbulkupdate.py {spread(near.seconds)} s, peak {max(near.peak_mb):.0f} MB; with 20 ms more for each answer "
          f"{spread(far.seconds)} s, {max(far.peak_mb):.0f} MB; with {STALL_S:g} s more {spread(stalled.seconds)} s, "
          f"{max(stalled.peak_mb):.0f} MB")  # fmt: skip


@contextlib.contextmanager
def timing(bench: Bench, send: Callable[[requests.Session], requests.Response]) -> Iterator[list[float]]:
    """Send a request every 20 ms while the body runs; the list fills with response times in milliseconds."""
    times: list[float] = []
    ended = threading.Event()

    def work() -> None:
        with requests.Session() as session:
            session.auth, session.verify, session.trust_env = bench.session.auth, False, False
            while not ended.wait(0.02):
                began = time.perf_counter()
                response = send(session)
                times.append((time.perf_counter() - began) * 1000)
                response.raise_for_status()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield times
    finally:
        ended.set()
        thread.join()


def percentiles(times: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(times, n=100)
    return cuts[49], cuts[98]


def another_writer(bench: Bench, data: DataSet, rounds: int) -> None:
    """Print the response times of another client that writes one document per bulk request, idle and during loads."""

    def write(session: requests.Session) -> requests.Response:
        headers = {"Content-Type": "application/x-ndjson"}
        return session.post(f"{bench.endpoint}/another/_bulk", data='{"index":{}}\n{"n":1}\n', headers=headers)

    bench.admin("PUT", "/another", {"settings": {"number_of_shards": 1, "number_of_replicas": 0}})
    bench.process(data, bulkupdate_command(data.prefix, "--batch-size", "1000"), Figures(), "to warm the server")
    with timing(bench, write) as idle:
        time.sleep(5)
    during: list[float] = []
    for _ in range(rounds):
        with timing(bench, write) as times:
            bench.process(data, bulkupdate_command(data.prefix, "--batch-size", "1000"), Figures(), "another writer")
        during += times
    bench.admin("DELETE", "/another")
    print("\n| another client's 1-document bulk | p50, ms | p99, ms |\n|---|---|---|")
    for name, found in (("idle", idle), ("during a load, --batch-size 1000", during)):
        print("| {} | {:.0f} | {:.0f} |".format(name, *percentiles(found)))


def memory(bench: Bench) -> None:
    """Print the peak memory of loads of growing size, all strings unique, plain and gzip, one object and many."""
    columns = [f"c{at}" for at in range(10)]
    field = {"type": "keyword", "index": False, "doc_values": False}  # what is measured is the loader
    mapping = {"properties": dict.fromkeys(columns, field)}
    print("\n| CSV | objects | form | rows | seconds | peak MB |\n|---|---|---|---|---|---|")
    for megabytes, count, packed in MEMORY_CASES:
        rows = put_unique(bench.s3, columns, megabytes, count, packed)
        data, figures = DataSet("unique strings", "unique/", rows, mapping), Figures()
        bench.process(data, bulkupdate_command(data.prefix), figures, f"{megabytes} MB")
        form, seconds, peak_mb = "gzip" if packed else "plain", figures.seconds[0], figures.peak_mb[0]
        print(f"| {megabytes:,} MB | {count:,} | {form} | {rows:,} | {seconds:.1f} | {peak_mb:.0f} |", flush=True)
        pages = bench.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="unique/")
        for entry in pages.search("Contents[]"):
            bench.s3.delete_object(Bucket=BUCKET, Key=entry["Key"])


def put_unique(s3: Any, columns: list[str], megabytes: int, count: int, packed: bool) -> int:
    """Put `count` objects with rows of about 600 bytes, no two cells alike; return the number of rows."""
    rows = megabytes * 1_000_000 // count // 600
    for at in range(count):
        with tempfile.NamedTemporaryFile(suffix=".csv") as file:
            with gzip.open(file.name, "wt", compresslevel=1) if packed else open(file.name, "w") as text:
                text.write(",".join(columns) + "\n")
                for _ in range(rows):
                    cells = os.urandom(300).hex()
                    text.write(",".join([cells[start : start + 60] for start in range(0, 600, 60)]) + "\n")
            s3.upload_file(file.name, BUCKET, f"unique/{at:04d}.csv{'.gz' if packed else ''}")
    return rows * count


def copies(bench: Bench, rounds: int) -> None:
    """Compare reindex.py onto an empty target with the bare task of the same batch size."""
    data, script, bare = flights(), Figures(), Figures()
    data.rows = int(bench.admin("GET", f"/{sandbox.PRIMARY}/_count")["count"])
    reindex = [sys.executable, str(TOP / "reindex.py"), "--source", sandbox.PRIMARY, "--target", INDEX]
    for _ in range(rounds):
        bench.process(data, reindex, script, "reindex.py")
        bench.fresh_index(data)
        began = time.monotonic()
        body = {"source": {"index": sandbox.PRIMARY, "size": 5000}, "dest": {"index": INDEX}}
        task = bench.admin("POST", "/_reindex?wait_for_completion=false&slices=auto", body)["task"]
        while not bench.admin("GET", f"/_tasks/{task}")["completed"]:
            time.sleep(0.05)
        bench.admin("POST", f"/{INDEX}/_refresh")
        bare.seconds.append(time.monotonic() - began)
        bench.check("bare _reindex", data)
    both = ratio({"script": script, "bare": bare}, "script", "bare")
    print(f"\nreindex.py {spread(script.seconds)} s, the bare task {spread(bare.seconds)} s, ratio {spread(both)}")


def whole_refresh(bench: Bench, rounds: int) -> None:
    """Compare the ways to refresh by whole refreshes of the flights, and show the steps of the last ones."""
    cheap = {"CLEANUP_METHOD": "recreate"}
    ways = {
        "copy-back, delete": {}, "copy-back, clone and recreate": {**cheap, "COPY_METHOD": "clone"},
        "alternate, recreate": {**cheap, "REFRESH_STRATEGY": "alternate"},
    }  # fmt: skip
    seconds, beyond = ({way: list[float]() for way in ways} for _ in range(2))
    tables = dict[str, str]()
    bench.fresh_index(flights())
    for _ in range(rounds):
        for way, variables in ways.items():
            for _ in range(2 if "alternate" in way else 1):  # there and back: readers begin on primary
                total, tables[way], results = refresh(bench, **variables)
                bench.wrong |= "clone" in way and any(found.get("batches") for found in results)  # it copied instead
                seconds[way].append(total)
                beyond[way].append(total - next(found["seconds"] for found in results if "stored" in found))
    for way, table in tables.items():
        print(f"\n{way}: {spread(seconds[way])} s, {spread(beyond[way])} s without its load\n{table}")


def audit_cost(bench: Bench, rounds: int) -> None:
    """Time what the audit of fields adds to a switch: dry runs with and without it, in turn."""
    wide = {f"field_{at:03d}": {"type": "keyword"} for at in range(1000)}
    cases = [("19 fields, 336,776 documents", 1, {}), ("19 fields, 1,010,328 documents", 3, {}),
             ("1,000 fields, 1,000 documents", 0, wide)]  # fmt: skip
    user, password = os.environ["ADMIN"].split(":", 1)
    login = {"OPENSEARCH_ENDPOINT": bench.endpoint, "OPENSEARCH_USERNAME": user, "OPENSEARCH_PASSWORD": password}
    for name, copies_of_the_year, fields in cases:
        pair = ["audit-old", "audit-new"]
        for index in pair:
            fill_for_audit(bench, index, copies_of_the_year, fields, login)
        bench.admin("POST", "/_aliases", {"actions": [{"add": {"index": pair[0], "alias": "audit"}}]})
        added = []
        for _ in range(rounds):
            seconds = []
            for more in ([], ["--field-threshold", "100"]):
                command = [sys.executable, str(TOP / "switch_alias.py"), "--alias", "audit", "--source", pair[0],
                           "--target", pair[1], "--dry-run", *more]  # fmt: skip
                began = time.monotonic()
                subprocess.run(command, env={**os.environ, **login}, check=True, capture_output=True)
                seconds.append(time.monotonic() - began)
            added.append(seconds[0] - seconds[1])
        print(f"the audit of {name}: {spread(added)} s")
        for index in pair:
            bench.admin("DELETE", f"/{index}")


def fill_for_audit(
    bench: Bench, index: str, copies_of_the_year: int, fields: dict[str, Any], login: dict[str, str]
) -> None:
    """Create an index of the flights, as often as asked for, or of 1,000 documents with one value in each field."""
    bench.admin("PUT", f"/{index}", {"mappings": {"properties": fields} if fields else sandbox.FLIGHTS_MAPPING})
    if fields:
        lines = "".join(f'{{"index":{{}}}}\n{json.dumps(dict.fromkeys(fields, "x"))}\n' for _ in range(1000))
        headers = {"Content-Type": "application/x-ndjson"}
        url = f"{bench.endpoint}/{index}/_bulk?refresh=true"
        assert not bench.session.post(url, data=lines.encode(), headers=headers).json()["errors"]
    for copy in range(copies_of_the_year):
        prefix = f"audit/{copy}/"
        for item in bench.s3.list_objects_v2(Bucket=sandbox.BUCKET, Prefix=sandbox.PREFIX)["Contents"]:
            key, source = prefix + item["Key"].rsplit("/", 1)[1], {"Bucket": sandbox.BUCKET, "Key": item["Key"]}
            bench.s3.copy_object(Bucket=sandbox.BUCKET, Key=key, CopySource=source)
        load = ["--bucket", sandbox.BUCKET, "--prefix", prefix, "--index", index, "--no-cleanup"]
        command = [sys.executable, str(TOP / "bulkupdate.py"), *load]
        subprocess.run(command, env={**os.environ, **login}, check=True, capture_output=True)


def refresh(bench: Bench, **variables: str) -> tuple[float, str, list[dict[str, Any]]]:
    """Run one refresh without pauses; return its seconds, its closing table, and what the steps have answered."""
    with tempfile.TemporaryDirectory() as logs:
        began = time.monotonic()
        done = subprocess.run(
            [str(TOP / "run_refresh.sh")], capture_output=True, text=True,
            env={**os.environ, **variables, "STEP_DELAY_SECONDS": "0", "LOG_DIR": logs},
        )  # fmt: skip
        seconds = time.monotonic() - began
        log = next(Path(logs).glob("refresh-*.log")).read_text()
    bench.wrong |= done.returncode != 0
    results = [json.loads(line[2:]) for line in log.splitlines() if line.startswith("> {")]
    return seconds, done.stdout or done.stderr, results


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after 2 for warming up")
    parser.add_argument("--only", choices=["flights", "texts"], help="one data set, without the slow loaders")
    parser.add_argument("--chart", type=Path, help="draw the medians as SVG into this file")
    parser.add_argument("--loader", choices=LOADERS, help=argparse.SUPPRESS)
    parser.add_argument("--prefix", help=argparse.SUPPRESS)
    parser.add_argument("--refresh", action="store_true", help="only whole refreshes, and the audit")
    parser.add_argument("--audit", action="store_true", help="only what the audit of a switch costs")
    parser.add_argument("--distance", action="store_true", help="only distant and busy ends, and readers (an hour)")
    parser.add_argument("--memory", action="store_true", help="only peak memory, up to 3 GB of CSV (ten minutes)")
    parser.add_argument("--writer", action="store_true", help="only another client's writes during loads")
    parser.add_argument("--delay-line", nargs=3, type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    urllib3.disable_warnings()
    if args.delay_line:
        port, target, delay_s = args.delay_line
        asyncio.run(delay_line(int(port), int(target), delay_s))
    bench = Bench(os.environ["ENDPOINT"])
    if args.loader:
        LOADERS[args.loader](bench.s3, bench.endpoint, args.prefix)
        return 0
    if args.refresh:
        whole_refresh(bench, args.rounds)
        audit_cost(bench, args.rounds)
        return int(bench.wrong)
    if args.audit:
        audit_cost(bench, args.rounds)
        return 0
    if args.writer:
        another_writer(bench, flights(), args.rounds)
        return int(bench.wrong)
    if args.distance:
        from distance import distance

        distance(bench, min(args.rounds, 3), args.chart)
        return int(bench.wrong)
    if args.memory:
        memory(bench)
        return int(bench.wrong)
    results: dict[str, dict[str, Figures]] = {}
    for name in [args.only] if args.only else ["flights", "texts"]:
        data = flights() if name == "flights" else texts(bench.s3)
        results[data.name] = bench.compare(data, args.rounds, 2, slow=not args.only)
        print_table(data, results[data.name])
        stages(bench, data)
    with_latency(bench, flights(), 3)
    another_writer(bench, flights(), 3)
    copies(bench, 3)
    whole_refresh(bench, 3)
    if args.chart:
        draw(results, args.chart)
    return int(bench.wrong)


if __name__ == "__main__":
    sys.modules["benchmark"] = sys.modules["__main__"]  # for distance.py
    raise SystemExit(main())
