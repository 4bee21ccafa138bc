"""The parts of bulkupdate.py, each by itself: the renderer without a cluster, the store without CSV or a manager."""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import math
import os
import random
import threading
import time

import bulkupdate
import opensearch_base_manager as base
import pytest
import sandbox
from bulkupdate import Batch, Bucket, BulkStore, BulkWorkers, ConcurrencyLimit, Renderer, S3Body, S3Object
from conftest import wait_until
from fault_proxy import answer, delayed, reset_in_answer
from opensearch_base_manager import Response
from opensearch_base_manager import Aws, Retry

pytestmark = pytest.mark.usefixtures("short_pauses")

TYPES = {"n": "long", "k": "keyword", "day": "date"}
DIGEST = hashlib.sha256(b"bucket/a.csv").hexdigest()[:16]


@pytest.fixture(params=[bulkupdate.CHUNK_BYTES, 8], ids=["one block", "blocks of a line or two"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(bulkupdate, "CHUNK_BYTES", request.param)


# --- the renderer -----------------------------------------------------------------------------------------------------


class Rejects(list):
    """Takes what a part hands to `reject`."""

    def __call__(self, key, line, defect):
        self.append((key, line, defect.column, str(defect)))


@pytest.fixture
def rejects():
    return Rejects()


def rendered(renderer, text, key="a.csv"):
    """Return line, action and document of each good row, as it stands in the bulk text."""
    found = []
    columns, blocks = bulkupdate.read_csv(io.BytesIO(text.encode()), key, ",")
    for batch in renderer.documents(key, columns, blocks):
        for single in batch.documents():
            [(origin, [line])] = single.origins
            action, document, end = single.body.decode().split("\n")
            assert (origin, end) == (key, "")
            found.append((line, json.loads(action), document))
    return found


def test_rows_become_typed_documents_with_ids_of_their_place(rejects, blocks):
    renderer = Renderer(TYPES, rejects, bucket="bucket")
    found = rendered(renderer, "n,k,day\n007,NA,NA\n,b,2024\n3,,\n,,\nNA,,\n")
    assert [document for _, _, document in found] == ['{"n":7,"k":"NA"}', '{"k":"b","day":"2024"}', '{"n":3}', "{}"]
    assert [line for line, _, _ in found] == [2, 3, 4, 6]
    assert [action for _, action, _ in found] == [{"create": {"_id": f"{DIGEST}-{at:09d}"}} for at in (1, 2, 3, 5)]
    assert (renderer.read, renderer.skipped, rejects) == (5, 1, [])


def test_a_bad_row_is_a_reject_and_its_neighbours_keep_their_ids_and_lines(rejects, blocks):
    renderer = Renderer(TYPES, rejects, bucket="bucket", operation="index")
    found = rendered(renderer, "n,k\n1,a\nx,b\n\n4,d\n5\n6,f\n")
    assert [(line, action["index"]["_id"][-9:], document) for line, action, document in found] == [
        (2, "000000001", '{"n":1,"k":"a"}'), (5, "000000004", '{"n":4,"k":"d"}'), (7, "000000006", '{"n":6,"k":"f"}'),
    ]  # fmt: skip
    assert rejects == [
        ("a.csv", 3, "n", "not a number: 'x'"), ("a.csv", 6, None, "1 cell under 2 column names")
    ]  # fmt: skip
    assert (renderer.read, renderer.skipped) == (6, 1)


def test_two_rows_whose_cells_only_together_are_the_right_number_are_both_rejects(rejects, blocks):
    renderer = Renderer(TYPES, rejects, bucket="bucket")
    assert rendered(renderer, "n,k\n1\n2,3,c\n") == []
    assert [line for _, line, _, _ in rejects] == [2, 3]


def test_an_id_from_a_column_has_a_version_that_rises_with_the_rows_of_all_objects(rejects, blocks):
    renderer = Renderer(TYPES, rejects, bucket="bucket", id_column="k")
    first = renderer.first_version
    found = rendered(renderer, "n,k\n1,a\n2,\n3,c\n") + rendered(renderer, "k,n\na,4\n", "b.csv")
    assert [next(iter(action.values())) for _, action, _ in found] == [
        {"_id": name, "version": first + at, "version_type": "external"} for name, at in [("a", 0), ("c", 2), ("a", 3)]
    ]
    assert [(line, column) for _, line, column, _ in rejects] == [(3, "k")]
    assert [renderer.is_own_version(first + at) for at in (-1, 0, 3, 5)] == [False, True, True, False]


def test_a_type_that_the_table_lacks_goes_as_it_stands():
    assert bulkupdate.Column("x", "a_type_of_a_plugin")["007"] == ',"x":"007"'
    assert bulkupdate.Column("x", "short")["007"] == ',"x":7'


def documents(count, key="a.csv", first_line=2):
    body = "".join(f'{{"create":{{"_id":"{key}-{at}"}}}}\n{{"n":{at}}}\n' for at in range(count))
    return Batch(body.encode(), [(key, range(first_line, first_line + count))] if count else [])


def test_batches_cut_and_join_what_comes_without_losing_a_document_or_its_line():
    parts = [documents(count, f"{at}.csv") for at, count in enumerate([0, 7, 1, 0, 3, 12])]
    whole = Batch.joined(parts)
    for size in (1, 2, 5, 8, 100):
        made = list(bulkupdate.batches(iter(parts), size))
        assert [batch.count() for batch in made] == [size] * (23 // size) + [23 % size] * (23 % size > 0)
        assert b"".join(batch.body for batch in made) == whole.body
        assert [single.origins for batch in made for single in batch.documents()] == [
            single.origins for single in whole.documents()
        ]
    assert [half.documents() for half in whole.cut(9)] == [whole.documents()[:9], whole.documents()[9:]]


def test_a_batch_ends_at_8_mib_too(monkeypatch):
    monkeypatch.setattr(bulkupdate, "MAX_BATCH_BYTES", 100)
    made = list(bulkupdate.batches([documents(2, f"{at}.csv") for at in range(6)], 1000))
    assert [batch.count() for batch in made] == [4, 4, 4]


def test_a_batch_of_large_documents_is_not_so_large_that_it_is_halved():
    part = Batch(b"{}\n" + bytes(300_000) + b"\n", [("a.csv", [2])])
    *made, _ = (len(batch.body) for batch in bulkupdate.batches([part] * 100, 1000))
    assert made
    assert all(7 * 2**20 <= size <= bulkupdate.MAX_BATCH_BYTES for size in made)


# --- the heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mapping", "values", "judged"),
    [
        ({}, ["1"] * 900, 1), ({}, ["1", "2.5"] * 400, 2), ({}, ["x"], 1), ({"dynamic": False}, ["1"], 0),
        ({"dynamic": "strict"}, ["1"], 0), ({"properties": {"n": {"type": "long"}}}, ["1"], 0),
    ],
)  # fmt: skip
def test_only_distinct_values_that_may_change_the_type_of_a_new_column_are_judged(mapping, values, judged, monkeypatch):
    asked, kind_of = [], bulkupdate.kind_of
    monkeypatch.setattr(bulkupdate, "kind_of", lambda cell: asked.append(cell) or kind_of(cell))
    new, data = bulkupdate.NewColumns(mapping), "\n".join(["n", *values, ""]).encode()
    item = S3Object("a.csv", len(data), "", None)
    assert bulkupdate.inspect_head(item, data, ",", new) == bulkupdate.Head("a.csv", ["n"], True)
    assert len(asked) == judged
    bulkupdate.inspect_head(item, b"n\n\n7\n", ",", new)
    assert len(asked) == judged + (0 if "x" in values else judged > 0)


# --- the store, against the server by plain requests ------------------------------------------------------------------


class Cluster:
    """The requests of a store on one index; `answers` edits the real responses, in their order."""

    def __init__(self, box, index):
        self.url, self.session = f"{box.server.endpoint}/{index}", box.server.session
        self.sent, self.refreshes, self.answers = [], 0, []

    def post(self, path, **more):
        return self.session.post(f"{self.url}/{path}", timeout=60, **more)

    def real(self, body):
        headers = {"Content-Type": "application/x-ndjson"}
        wanted = {"filter_path": f"{bulkupdate.BULK_RESULTS},items.*.result"}
        response = self.post("_bulk", data=body, params=wanted, headers=headers)
        return Response(response.status_code, response.content)

    def request(self, method, path, body=None, **more):
        if path == "/index/_refresh":
            self.refreshes += 1
            return None
        assert (method, path, more["accept"]) == ("POST", "/index/_bulk", [413])
        assert more["params"]["filter_path"].startswith(bulkupdate.BULK_RESULTS)
        self.sent.append(body)
        return self.answers.pop(0)(body) if self.answers else self.real(body)

    def failure(self, what, status, body):
        return base.RequestFailed(f"{status}: {json.loads(body)['error']['reason']}")

    def numbers(self):
        self.post("_refresh")
        hits = self.post("_search", json={"size": 10_000}).json()["hits"]["hits"]
        return sorted(hit["_source"]["n"] for hit in hits)


@pytest.fixture
def cluster(box, make_index):
    return Cluster(box, make_index("index", {"n": {"type": "long"}}))


@pytest.fixture
def store(cluster, rejects):
    return BulkStore(cluster, "index", rejects, ConcurrencyLimit(4), retry_seconds=5)


def edited_response(cluster, change):
    """Let the request through, and change the items of its response."""

    def answer(body):
        response = cluster.real(body)
        items = change(response.data["items"])
        return Response(response.status, json.dumps({"errors": True, "items": items}).encode())

    return answer


def busy(count, *refused, status=429):
    """Answer without the cluster that it was too busy for those of `count` documents that stand at these places."""
    error = {"type": "rejected_execution_exception", "reason": "full"}
    results = [{"status": status, "error": error} if at in refused else {"status": 201} for at in range(count)]
    items = [{"create": result} for result in results]
    return Response(200, json.dumps({"errors": True, "items": items}).encode(), sent=time.monotonic())


def test_each_document_is_stored_and_counted(store, cluster, rejects):
    store.store(documents(5))
    assert cluster.numbers() == [0, 1, 2, 3, 4]
    assert (store.stored, store.replaced, rejects) == (5, 0, [])


def test_what_the_mapping_refuses_is_a_reject_with_its_column_and_line(store, cluster, rejects):
    store.store(Batch(documents(3).body.replace(b'"n":1', b'"n":"x"'), [("a.csv", [4, 5]), ("b.csv", [2])]))
    assert cluster.numbers() == [0, 2]
    assert [(key, line, column) for key, line, column, _ in rejects] == [("a.csv", 5, "n")]
    assert store.stored == 2


@pytest.mark.parametrize("status", [429, 503])
def test_only_documents_answered_429_are_sent_again_and_the_limit_is_halved(status, cluster, rejects):
    limit = ConcurrencyLimit(4)
    limit.in_flight = 4
    store = BulkStore(cluster, "index", rejects, limit, retry_seconds=5)
    batch = documents(3)
    first, second = batch.cut(1)[0], batch.cut(2)[1]

    def without_the_middle(body):
        cluster.real(first.body + second.body)
        return busy(3, 1, status=status)

    cluster.answers = [without_the_middle]
    store.store(batch)
    assert cluster.sent == [batch.body, batch.documents()[1].body]
    assert cluster.numbers() == [0, 1, 2]
    assert (store.stored, limit.number) == (3, 2)


@pytest.mark.parametrize("kind", ["whole", "resent", "retried", "partly refused", "halved"])
def test_only_first_attempts_that_were_stored_completely_are_measured(kind, cluster, rejects, monkeypatch):
    limit, measured = ConcurrencyLimit(4), []
    monkeypatch.setattr(limit, "completed", measured.append)
    store = BulkStore(cluster, "index", rejects, limit, retry_seconds=5)

    def answer(body):
        real = cluster.real(body)
        return Response(real.status, real.body, kind == "resent", kind not in ("resent", "retried"), 7.0)

    if kind == "halved":
        cluster.answers = [lambda body: Response(413, b"")]
    else:
        cluster.answers = [lambda body: busy(3, 0, 1, 2)] * (kind == "partly refused") + [answer]
    store.store(documents(3))
    assert store.stored == 3
    assert measured == {"whole": [7.0], "halved": [0, 0, 0]}.get(kind, [])


def test_documents_that_stay_refused_fail_the_store_with_the_reason(cluster, rejects):
    store = BulkStore(cluster, "index", rejects, ConcurrencyLimit(1), retry_seconds=0.2)
    cluster.answers = [lambda body: busy(1, 0)] * 100
    with pytest.raises(base.OperationFailed, match=r"index: .* kept rejecting 1 documents for 0.2 s; .*429 .*full"):
        store.store(documents(1))
    assert len(cluster.sent) > 1


def test_progress_restarts_the_time_of_documents_that_are_refused(cluster, rejects):
    store = BulkStore(cluster, "index", rejects, ConcurrencyLimit(1), retry_seconds=0.3)

    def slowly_accepted(body):
        time.sleep(0.2)
        count = body.count(b"\n") // 2
        return busy(count, *range(1, count))  # but for the first

    cluster.answers = [slowly_accepted] * 4
    store.store(documents(4))  # 0.8 s in all
    assert [body.count(b"\n") // 2 for body in cluster.sent] == [4, 3, 2, 1]
    assert store.stored == 4


def test_a_response_with_too_few_results_is_no_response(store, cluster):
    cluster.answers = [edited_response(cluster, lambda items: items[:-1])]
    store.store(documents(4))
    assert cluster.sent == [documents(4).body] * 2
    assert (store.stored, cluster.numbers()) == (4, [0, 1, 2, 3])  # the second time they were all there: 409


@pytest.mark.parametrize("resent", [False, True])
def test_a_conflict_counts_as_stored_by_an_earlier_attempt(resent, store, cluster, rejects):
    def twice(body):
        cluster.real(body)
        response = cluster.real(body)
        return Response(response.status, response.body, resent=resent)

    cluster.answers = [twice]
    store.store(documents(3))
    assert (store.stored, store.replaced, store.unsure, rejects) == (3, 0, 0, [])
    assert cluster.numbers() == [0, 1, 2]


def test_a_conflict_of_versions_counts_as_replaced_if_the_other_one_is_of_this_load(cluster, rejects):
    own, limit = {7}.__contains__, ConcurrencyLimit(1)
    store = BulkStore(cluster, "index", rejects, limit, retry_seconds=1, is_own_version=own)

    def keyed(version):
        action = f'{{"index":{{"_id":"a","version":{version},"version_type":"external"}}}}'
        return Batch(f'{action}\n{{"n":{version}}}\n'.encode(), [("a.csv", [version])])

    for version in (7, 5):
        store.store(keyed(version))
    assert (store.stored, store.replaced, rejects) == (2, 1, [])
    cluster.real(keyed(9).body)  # another client's
    store.store(keyed(8))
    assert (store.stored, [line for _, line, _, _ in rejects]) == (2, [8])
    assert cluster.numbers() == [9]


def test_a_request_that_is_too_large_is_halved_and_the_size_is_remembered(store, cluster, rejects):
    limit = len(documents(4).body)
    real = cluster.real
    cluster.real = lambda body: Response(413, b"") if len(body) > limit else real(body)
    store.store(documents(10))
    store.store(documents(10, "b.csv"))
    assert sum(len(body) > limit for body in cluster.sent) <= 2
    assert len(cluster.numbers()) == store.stored == 20
    big = Batch(b'{"create":{"_id":"big"}}\n{"n":1,"t":"' + b"x" * limit + b'"}\n', [("c.csv", [9])])
    store.store(big)
    assert [(key, line) for key, line, _, _ in rejects] == [("c.csv", 9)]
    assert "larger than the cluster accepts" in rejects[0][3]


@pytest.mark.parametrize(
    ("status", "kind"),
    [(403, "security_exception"), (403, "cluster_block_exception"), (429, "cluster_block_exception")],
)
def test_a_refusal_that_all_would_meet_ends_the_store(status, kind, store, cluster, rejects):
    refusal = {"create": {"status": status, "error": {"type": kind, "reason": "no"}}}
    cluster.answers = [edited_response(cluster, lambda items: [refusal] * len(items))]
    with pytest.raises(base.RequestFailed, match=f"{status}: no"):
        store.store(documents(2))
    assert (len(cluster.sent), store.stored, rejects) == (1, 0, [])


def test_many_threads_share_one_store_and_refresh_it_once_in_so_many_documents(cluster, rejects):
    store = BulkStore(cluster, "index", rejects, ConcurrencyLimit(4), retry_seconds=5, refresh_every=50)
    put_all(BulkWorkers(store.store, ConcurrencyLimit(4)), (documents(10, f"{at}.csv") for at in range(20)))
    assert store.stored == len(cluster.numbers()) == 200
    assert 1 <= cluster.refreshes <= 4  # 4 but where two threads are due at once


# --- the workers ------------------------------------------------------------------------------------------------------


def test_the_first_error_of_a_worker_is_raised_where_batches_are_put():
    def fail(batch):
        raise base.OperationFailed("no more")

    workers = BulkWorkers(fail, ConcurrencyLimit(2))
    with pytest.raises(base.OperationFailed, match="no more"):
        put_all(workers, [documents(1)] * 5)


class Busy:
    """Takes a while for each batch; records the batches in flight, and the most documents and bytes so far."""

    def __init__(self, seconds):
        self.seconds, self.lock, self.in_flight, self.most, self.most_bytes = seconds, threading.Lock(), [], 0, 0

    def __call__(self, batch):
        with self.lock:
            self.in_flight.append(batch)
            self.most = max(self.most, len(self.in_flight))
            self.most_bytes = max(self.most_bytes, sum(len(batch.body) for batch in self.in_flight))
        time.sleep(self.seconds)
        with self.lock:
            self.in_flight.remove(batch)


def put_all(workers, batches):
    for batch in batches:
        workers.put(batch)
    workers.finish()


def test_as_many_requests_are_in_flight_as_the_limit_allows_and_fewer_after_a_429():
    limit, store = ConcurrencyLimit(4), Busy(0.05)
    workers = BulkWorkers(store, limit)
    put_all(workers, (documents(1, str(at)) for at in range(12)))
    assert (store.most, workers.peak) == (4, 4)
    limit.in_flight = 4
    limit.halve(time.monotonic())
    limit.in_flight = store.most = 0
    put_all(workers, (documents(1, str(at)) for at in range(12)))
    assert (store.most, workers.peak) == (2, 4)


@pytest.mark.parametrize(("fixed", "name"), [(8, "MAX_BYTES_OF_FIXED"), (None, "MAX_BYTES_IN_FLIGHT")])
def test_no_more_bytes_are_in_flight_than_allowed_but_for_one_batch_alone(fixed, name, monkeypatch):
    monkeypatch.setattr(bulkupdate, name, 2 * len(documents(5).body))
    store = Busy(0.05)
    workers = BulkWorkers(store, ConcurrencyLimit(fixed))
    put_all(workers, [*[documents(5)] * 6, documents(40), *[documents(1)] * 6])
    assert store.most_bytes == len(documents(40).body)  # which is more than that by itself
    assert 2 < workers.peak <= 8


def test_no_batch_is_made_beyond_the_one_that_waits_for_those_in_flight():
    released, made = threading.Event(), []

    def make():
        for at in range(9):
            made.append(at)
            yield documents(1)

    limit = ConcurrencyLimit(3)
    workers = BulkWorkers(lambda batch: released.wait(20), limit)
    loader = threading.Thread(target=put_all, args=[workers, make()])
    loader.start()
    time.sleep(0.3)
    assert (len(made), limit.in_flight) == (4, 3)
    released.set()
    loader.join(20)
    assert (len(made), limit.in_flight) == (9, 0)


# --- the limit, on a clock of the test's own --------------------------------------------------------------------------


class Clock:
    now = 1.0

    def monotonic(self):
        return self.now


class Simulated:
    """A cluster that works on `servers` requests at a time, each for `seconds`.

    It responds `late` to `late + jitter` seconds after that. The loader always has the next batch.
    """

    def __init__(self, monkeypatch, servers=2, seconds=0.1, late=0.0, fixed=None, jitter=0.0):
        self.clock, self.servers, self.seconds, self.late = Clock(), servers, seconds, late
        self.jitter, self.random = jitter, random.Random(1)
        self.limit, self.flying, self.free_at = ConcurrencyLimit(fixed), [], []
        monkeypatch.setattr(bulkupdate, "time", self.clock)

    def run(self, seconds):
        """Let time pass; return each limit in turn."""
        until, numbers = self.clock.now + seconds, [self.limit.number]
        while self.clock.now < until:
            while len(self.flying) < self.limit.number:
                busy = sorted(self.free_at)[-self.servers :]
                began = max([self.clock.now, *busy[: len(busy) == self.servers]])
                self.free_at = [*busy, began + self.seconds]
                late = self.late + self.random.uniform(0, self.jitter)
                heapq.heappush(self.flying, (began + self.seconds + late, self.clock.now))
            self.limit.in_flight = len(self.flying)
            self.clock.now, sent = heapq.heappop(self.flying)
            self.limit.completed(sent)
            if self.limit.number != numbers[-1]:
                numbers.append(self.limit.number)
        return numbers


@pytest.mark.parametrize(
    ("servers", "seconds", "late", "number"),
    [
        (2, 0.1, 0, 3), (2, 0.1, 1, 28), (8, 0.1, 0, 12), (4, 0.05, 0, 8), (2, 0.02, 0.3, 40),
        (1000, 0.1, 0.3, 64), (2, 2, 0, 3), (1, 1, 0, 3), (1, 0.01, 0, 6),
    ],
)  # fmt: skip
def test_the_limit_is_what_the_cluster_completes_in_its_fastest_response_and_a_little_more(
    servers, seconds, late, number, monkeypatch
):
    cluster = Simulated(monkeypatch, servers, seconds, late)
    assert cluster.run(20)[0] == 64
    assert {abs(found - number) <= 1 and found >= 3 for found in cluster.run(20)} == {True}


def test_responses_of_a_distant_cluster_that_vary_do_not_starve_the_load(monkeypatch):
    cluster = Simulated(monkeypatch, servers=2, seconds=0.03, late=1, jitter=0.3)
    assert cluster.run(100)[-1] > 50  # the distance alone needs 67 for what two servers complete


def test_the_limit_follows_a_cluster_that_becomes_slower_and_faster(monkeypatch):
    cluster = Simulated(monkeypatch, servers=8)
    assert cluster.run(20)[-1] in (12, 13)
    cluster.servers = 2
    assert cluster.run(20)[-1] in (3, 4)
    cluster.servers = 8
    assert cluster.run(20)[-1] in (12, 13)


@pytest.mark.parametrize(("fastest_s", "window_s"), [(0.01, 0.1), (0.1, 0.12), (1, 1.2)])
def test_a_window_begins_with_a_completion_and_lasts_a_while(fastest_s, window_s, monkeypatch):
    clock, limit = Clock(), ConcurrencyLimit()
    monkeypatch.setattr(bulkupdate, "time", clock)
    limit.completed(clock.now - fastest_s)
    for _ in range(3):  # a second one begins where the first one ends
        for _ in range(4):
            limit.completed(clock.now - fastest_s)
        clock.now += window_s - 0.01
        limit.completed(clock.now - 9)
        clock.now += 0.02
        limit.number = 64
        limit.completed(clock.now - 9)
        assert limit.number == max(3, math.ceil(6 / (window_s + 0.01) * (fastest_s + max(0.05, fastest_s / 4))))


def test_a_time_without_requests_is_not_measured(monkeypatch):
    clock, limit = Clock(), ConcurrencyLimit()
    monkeypatch.setattr(bulkupdate, "time", clock)
    limit.completed(clock.now - 0.01)
    clock.now += 60
    limit.discard_window()
    limit.completed(clock.now - 0.01)
    assert limit.number == 64
    workers = BulkWorkers(lambda batch: None, limit)
    clock.now += 60
    workers.put(documents(1))  # nothing was in flight
    limit.completed(clock.now - 0.01)
    assert limit.number == 64


def test_429_halves_the_number_in_flight_once_a_round_trip_and_the_limit_rises_by_one_per_window(monkeypatch):
    cluster = Simulated(monkeypatch, servers=1000, late=0.9)
    cluster.limit.in_flight, sent = 24, cluster.clock.now
    cluster.clock.now += 1
    cluster.limit.halve(sent)
    cluster.limit.halve(sent)
    cluster.limit.halve(cluster.clock.now)  # sent in the moment of the first refusal
    assert cluster.limit.number == 12
    assert cluster.run(120) == list(range(12, 65))
    cluster.limit.halve(cluster.clock.now)
    assert cluster.limit.number == 32


def test_the_limit_rises_after_429_to_what_the_cluster_completes(monkeypatch):
    cluster = Simulated(monkeypatch, servers=3)
    cluster.run(5)
    for _ in range(3):
        cluster.clock.now += 1
        cluster.limit.halve(cluster.clock.now)
    assert cluster.limit.number == 1
    assert cluster.run(10)[:4] == [1, 2, 3, 4]
    assert cluster.run(10)[-1] in (4, 5)


def test_a_fixed_number_is_not_exceeded_and_reached_again_after_429(monkeypatch):
    cluster = Simulated(monkeypatch, servers=100, fixed=5)
    assert cluster.run(10) == [5]
    cluster.limit.halve(cluster.clock.now)
    assert cluster.run(10) == [2, 3, 4, 5]


# --- S3, and trying again ---------------------------------------------------------------------------------------------

SLOW_DOWN = answer(503, "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")


def test_a_listing_that_breaks_off_goes_on_behind_the_last_key(put_csv, s3_proxy):
    prefix = put_csv({f"{at}.csv": f"n\n{at}\n" for at in range(7)} | {"x.txt": ""})

    def two_at_a_time(exchange):
        if exchange.nth in (2, 3, 5):
            return SLOW_DOWN(exchange)
        exchange.handler.path += "&max-keys=2"
        exchange.pass_on()

    rule = s3_proxy.on("GET", "list-type=2", two_at_a_time, times=None)
    found = Bucket(sandbox.BUCKET, Aws(os.environ["AWS_REGION"]), 0).list_objects(prefix, 5)
    assert [item.key for item in found] == [*(f"{prefix}{at}.csv" for at in range(7)), f"{prefix}x.txt"]
    asked = [path for _, path, _ in s3_proxy.requests if "start-after" in path]
    assert "1.csv" in asked[0]
    assert "3.csv" in asked[-1]
    assert rule.seen == 7  # four pages, and three refusals


@pytest.mark.parametrize("fault", [SLOW_DOWN, reset_in_answer(2), answer(500)])
def test_s3_is_asked_once_an_attempt(fault, put_csv, s3_proxy):
    prefix = put_csv({"a.csv": "n\n1\n"})
    bucket = Bucket(sandbox.BUCKET, Aws(os.environ["AWS_REGION"]), 0)
    [item] = bucket.list_objects(prefix, 0)
    rules = [s3_proxy.on("GET", path, fault, times=None) for path in (r"a\.csv", "list-type=2")]
    with pytest.raises(base.OperationFailed, match=r"a\.csv, byte 0: the read cannot be resumed: "):
        S3Body(bucket, item).read_all()
    with pytest.raises(base.OperationFailed, match=prefix):
        bucket.list_objects(prefix, 0)
    assert [rule.seen for rule in rules] == [1, 1]


def test_a_read_that_hangs_is_given_up_soon_and_read_on(put_csv, s3_proxy, monkeypatch):
    monkeypatch.setattr(bulkupdate, "S3_READ_TIMEOUT_S", 1)
    prefix = put_csv({"a.csv": "n\n1\n"})
    bucket = Bucket(sandbox.BUCKET, Aws(os.environ["AWS_REGION"]), 10)
    [item] = bucket.list_objects(prefix, 0)
    rule = s3_proxy.on("GET", r"a\.csv", delayed(8))
    began = time.monotonic()
    assert S3Body(bucket, item).read_all() == b"n\n1\n"
    assert time.monotonic() - began < 7
    assert rule.seen == 2


def listed(put_csv, files, retry_seconds=5):
    """Return a bucket, and the objects of these files, which it holds under a prefix of its own."""
    bucket = Bucket(sandbox.BUCKET, Aws(os.environ["AWS_REGION"]), retry_seconds)
    return bucket, bucket.list_objects(put_csv(files), 5)


def reads(s3_proxy):
    return [path.rsplit("/", 1)[1] for method, path, _ in s3_proxy.requests if method == "GET" and "list-" not in path]


def test_the_next_objects_are_read_while_one_is_loaded_within_a_number_of_requests_and_bytes(put_csv, s3_proxy):
    files = {f"{at:02d}.csv": f"n\n{at}\n" for at in range(50)} | {"x.csv": "n\n" + "1\n" * 3_000_000, "y.csv": "n\n"}
    bucket, objects = listed(put_csv, files)
    coming = bulkupdate.read_ahead(bucket, objects, bulkupdate.AHEAD_BYTES)
    assert next(coming) == (objects[0], b"n\n0\n")
    wait_until(lambda: len(reads(s3_proxy)) >= 32)
    time.sleep(0.2)
    assert sorted(reads(s3_proxy)) == sorted(files)[:32]  # not one more
    rest = list(coming)
    assert [item.key for item, _ in rest] == [item.key for item in objects[1:]]
    assert [len(data) for item, data in rest[-2:]] == [bulkupdate.AHEAD_BYTES, 2]


def test_no_more_bytes_are_read_ahead_than_allowed(put_csv, s3_proxy, monkeypatch):
    monkeypatch.setattr(bulkupdate, "READ_AHEAD_BYTES", 1000)
    bucket, objects = listed(put_csv, {f"{at}.csv": "n\n" + "1\n" * 199 for at in range(6)} | {"7.csv": "n\n" * 2000})
    coming = bulkupdate.read_ahead(bucket, objects, 5000)
    next(coming)
    time.sleep(0.5)
    assert sorted(reads(s3_proxy)) == ["0.csv", "1.csv"]  # 400 bytes each: the third would be more than 1,000
    assert [len(data) for _, data in coming] == [400] * 5 + [4000]


def test_an_object_that_breaks_off_fails_when_its_turn_comes(put_csv, s3_proxy):
    bucket, objects = listed(put_csv, {f"{at}.csv": f"n\n{at}\n" for at in range(4)}, retry_seconds=0)
    s3_proxy.on("GET", r"2\.csv", reset_in_answer(2), times=None)
    found = []
    with pytest.raises(base.OperationFailed, match=r"2\.csv, byte \d: the read cannot be resumed: "):
        found += (item.key[-5:] for item, _ in bulkupdate.read_ahead(bucket, objects, 100))
    assert found == ["0.csv", "1.csv"] or not found  # list.__iadd__ may take all or nothing


def test_what_comes_behind_the_first_bytes_is_asked_for_at_once_and_read_on_when_it_breaks_off(put_csv, s3_proxy):
    text = "n\n" + "".join(f"{at}\n" for at in range(100_000))
    bucket, [item] = listed(put_csv, {"a.csv": text})
    s3_proxy.on("GET", r"a\.csv", reset_in_answer(200_000))
    body = S3Body(bucket, item, first=text[:1000].encode())
    time.sleep(0.3)
    assert reads(s3_proxy) == ["a.csv"]
    assert body.read_all() == text.encode()
    assert len(reads(s3_proxy)) == 2


def test_a_small_object_is_read_once_and_beyond_16_mib_again(put_csv, s3_proxy, monkeypatch):
    files = {f"{at}.csv": f"n\n{at}\n" for at in range(5)} | {"5.csv": "n\n" + "1\n" * 50_000}
    monkeypatch.setattr(bulkupdate, "KEPT_BYTES", 9)
    bucket, objects = listed(put_csv, files)
    heads = bulkupdate.read_heads(bucket, objects, ",", bulkupdate.NewColumns({}))
    assert [head.key for head in heads] == [item.key for item in objects]
    loaded = {item.key[-5:]: S3Body(bucket, item, first=first).read_all().decode()
              for item, first in bulkupdate.read_ahead(bucket, objects, bulkupdate.AHEAD_BYTES)}  # fmt: skip
    assert loaded == files
    assert sorted(reads(s3_proxy)) == sorted([*files, "2.csv", "3.csv", "4.csv", "5.csv"])
    assert bucket.kept == {}


def test_there_is_another_attempt_until_the_time_is_up_or_a_signal_has_come(monkeypatch):
    monkeypatch.setattr(base, "BACKOFF_FIRST_S", 0.2)
    monkeypatch.setattr(base, "BACKOFF_MAX_S", 0.2)
    retry = Retry(0.7)
    began, attempts = time.monotonic(), 0
    while retry.wait("busy"):
        attempts += 1
    assert 3 <= attempts <= 7
    assert time.monotonic() - began < 1.2  # a sleep may take longer than asked
    retry.restart()
    assert retry.wait("busy")
    monkeypatch.setattr(base, "_cleanup_deadline", time.monotonic() + 0.05)
    base.interrupted.set()
    try:
        assert not retry.wait("busy")
    finally:
        base.interrupted.clear()
