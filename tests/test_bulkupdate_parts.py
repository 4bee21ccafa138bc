"""The parts of bulkupdate.py, each by itself: the renderer without a cluster, the store without CSV or a manager."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time

import bulkupdate
import opensearch_base_manager as base
import pytest
import sandbox
from bulkupdate import Batch, Block, Bucket, BulkRequests, BulkStore, BulkWorkers, Pace, Renderer, S3Body
from fault_proxy import FaultProxy, answer, delayed, reset_in_answer
from opensearch_base_manager import Response
from opensearch_base_manager import Aws, Retry

TYPES = {"n": "long", "k": "keyword", "day": "date"}
DIGEST = hashlib.sha256(b"bucket/a.csv").hexdigest()[:16]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(base, "BACKOFF_FIRST_S", 0.02)


# --- the renderer -----------------------------------------------------------------------------------------------------


class Rejects(list):
    """Takes what a part hands to `reject`."""

    def __call__(self, key, line, defect):
        self.append((key, line, defect.column, str(defect)))


@pytest.fixture
def rejects():
    return Rejects()


def blocks_of(text, lines_a_block=2):
    """Return the header as the block that the reader makes of it, then the others as plain text."""
    header, *lines = text.splitlines(keepends=True)
    found = [Block([1], [header.strip().split(",")])]
    for start in range(0, len(lines), lines_a_block):
        part = lines[start : start + lines_a_block]
        found.append(Block(range(start + 2, start + 2 + len(part)), text="".join(part)))
    return found


def rendered(renderer, text, key="a.csv"):
    """Return line, action and document of each good row, as it stands in the bulk text."""
    found = []
    for batch in renderer.documents(key, blocks_of(text)):
        for single in batch.documents():
            [(origin, [line])] = single.origins
            action, document, end = single.body.decode().split("\n")
            assert (origin, end) == (key, "")
            found.append((line, json.loads(action), document))
    return found


def test_rows_become_typed_documents_with_ids_of_their_place(rejects):
    renderer = Renderer(TYPES, rejects, bucket="bucket")
    found = rendered(renderer, "n,k,day\n007,NA,NA\n,b,2024\n3,,\n,,\n")
    assert [document for _, _, document in found] == ['{"n":7,"k":"NA"}', '{"k":"b","day":"2024"}', '{"n":3}', "{}"]
    assert [line for line, _, _ in found] == [2, 3, 4, 5]
    assert [action for _, action, _ in found] == [{"create": {"_id": f"{DIGEST}-{at:09d}"}} for at in (1, 2, 3, 4)]
    assert (renderer.read, renderer.skipped, rejects) == (4, 0, [])


def test_a_bad_row_is_a_reject_and_its_neighbours_keep_their_ids_and_lines(rejects):
    renderer = Renderer(TYPES, rejects, bucket="bucket", operation="index")
    found = rendered(renderer, "n,k\n1,a\nx,b\n\n4,d\n5\n6,f\n")
    assert [(line, action["index"]["_id"][-9:], document) for line, action, document in found] == [
        (2, "000000001", '{"n":1,"k":"a"}'), (5, "000000004", '{"n":4,"k":"d"}'), (7, "000000006", '{"n":6,"k":"f"}'),
    ]  # fmt: skip
    assert rejects == [
        ("a.csv", 3, "n", "not a number: 'x'"), ("a.csv", 6, None, "1 cells under 2 column names")
    ]  # fmt: skip
    assert (renderer.read, renderer.skipped) == (6, 1)


def test_two_rows_whose_cells_only_together_are_the_right_number_are_both_rejects(rejects):
    renderer = Renderer(TYPES, rejects, bucket="bucket")
    assert rendered(renderer, "n,k\n1\n2,3,c\n") == []
    assert [line for _, line, _, _ in rejects] == [2, 3]


def test_an_id_from_a_column_has_a_version_that_rises_with_the_rows_of_all_objects(rejects):
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


# --- the store, against the server by plain requests ------------------------------------------------------------------


class Cluster:
    """The requests of a store on one index; `answers` edits the real responses, in their order."""

    def __init__(self, box, index):
        self.url, self.session = f"{box.server.endpoint}/{index}", box.server.session
        self.sent, self.refreshes, self.answers = [], 0, []
        self.requests = BulkRequests(self.send, self.find, self.refresh, self.failure)

    def post(self, path, **more):
        return self.session.post(f"{self.url}/{path}", timeout=60, **more)

    def real(self, body):
        headers = {"Content-Type": "application/x-ndjson"}
        response = self.post("_bulk", data=body, params=bulkupdate.BULK_PARAMS, headers=headers)
        return Response(response.status_code, response.content)

    def send(self, body):
        self.sent.append(body)
        return self.answers.pop(0)(body) if self.answers else self.real(body)

    def find(self, ids):
        self.post("_refresh")
        hits = self.post("_search", json={"size": len(ids), "query": {"ids": {"values": ids}}}).json()["hits"]["hits"]
        return {hit["_id"]: hit["_source"] for hit in hits}

    def refresh(self):
        self.refreshes += 1

    def failure(self, status, body):
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
    return BulkStore("index", cluster.requests, rejects, Pace(4), retry_seconds=5)


def edited(cluster, change):
    """Let the request through, and change the items of its response."""

    def answer(body):
        response = cluster.real(body)
        items = change(response.data["items"])
        return Response(response.status, json.dumps({"errors": True, "items": items}).encode())

    return answer


def busy(count, *refused):
    """Answer without the cluster that it was too busy for those of `count` documents that stand at these places."""
    error = {"type": "rejected_execution_exception", "reason": "full"}
    items = [{"create": {"status": 429, "error": error} if at in refused else {"status": 201}} for at in range(count)]
    return Response(200, json.dumps({"errors": True, "items": items}).encode())


def test_each_document_is_stored_and_counted(store, cluster, rejects):
    store.store(documents(5))
    assert cluster.numbers() == [0, 1, 2, 3, 4]
    assert (store.stored, store.replaced, rejects) == (5, 0, [])


def test_what_the_mapping_refuses_is_a_reject_with_its_column_and_line(store, cluster, rejects):
    store.store(Batch(documents(3).body.replace(b'"n":1', b'"n":"x"'), [("a.csv", [4, 5]), ("b.csv", [2])]))
    assert cluster.numbers() == [0, 2]
    assert [(key, line, column) for key, line, column, _ in rejects] == [("a.csv", 5, "n")]
    assert store.stored == 2


def test_only_documents_answered_429_are_sent_again_and_the_pace_is_halved(cluster, rejects):
    pace = Pace(4)
    store = BulkStore("index", cluster.requests, rejects, pace, retry_seconds=5)
    batch = documents(3)
    first, second = batch.cut(1)[0], batch.cut(2)[1]

    def without_the_middle(body):
        cluster.real(first.body + second.body)
        return busy(3, 1)

    cluster.answers = [without_the_middle]
    store.store(batch)
    assert cluster.sent == [batch.body, batch.documents()[1].body]
    assert cluster.numbers() == [0, 1, 2]
    assert (store.stored, pace.limit) == (3, 2)


def test_documents_that_stay_refused_fail_the_store_with_the_reason(cluster, rejects):
    store = BulkStore("my_index", cluster.requests, rejects, Pace(1), retry_seconds=0.2)
    cluster.answers = [lambda body: busy(1, 0)] * 100
    with pytest.raises(base.OperationFailed, match=r"my_index: 1 documents were not taken for 0.2 s, .*429 .*full"):
        store.store(documents(1))
    assert len(cluster.sent) > 1


def test_progress_gives_documents_that_are_refused_their_time_anew(cluster, rejects):
    store = BulkStore("index", cluster.requests, rejects, Pace(1), retry_seconds=0.3)

    def slowly_taken(body):
        time.sleep(0.2)
        count = body.count(b"\n") // 2
        return busy(count, *range(1, count))  # but for the first

    cluster.answers = [slowly_taken] * 4
    store.store(documents(4))  # 0.8 s in all
    assert [body.count(b"\n") // 2 for body in cluster.sent] == [4, 3, 2, 1]
    assert store.stored == 4


def test_a_response_with_too_few_results_is_no_response(store, cluster):
    cluster.answers = [edited(cluster, lambda items: items[:-1])]
    store.store(documents(4))
    assert cluster.sent == [documents(4).body] * 2
    assert (store.stored, cluster.numbers()) == (4, [0, 1, 2, 3])  # the second time they were all there: 409


def test_a_conflict_is_success_on_a_resend_and_else_only_if_the_index_holds_the_same_document(store, cluster, rejects):
    cluster.real(documents(3).body.replace(b'"n":2', b'"n":-2'))
    store.store(documents(4))
    assert store.stored == 3
    assert [line for _, line, _, _ in rejects] == [4]
    assert cluster.numbers() == [-2, 0, 1, 3]

    def lost(body):
        cluster.real(body)
        response = cluster.real(body)
        return Response(response.status, response.body, resent=True)

    cluster.answers = [lost]
    store.store(documents(2, "b.csv"))
    assert (store.stored, len(rejects)) == (5, 1)


def test_a_conflict_of_versions_counts_as_replaced_if_the_other_one_is_of_this_load(cluster, rejects):
    store = BulkStore("index", cluster.requests, rejects, Pace(1), retry_seconds=1, is_own_version={7}.__contains__)

    def keyed(version):
        action = f'{{"index":{{"_id":"a","version":{version},"version_type":"external"}}}}'
        return Batch(f'{action}\n{{"n":{version}}}\n'.encode(), [("a.csv", [version])])

    for version in (7, 5):
        store.store(keyed(version))
    assert (store.stored, store.replaced, rejects) == (2, 1, [])
    cluster.real(keyed(9).body)  # somebody else's
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


@pytest.mark.parametrize(("status", "kind"), [(403, "security_exception"), (429, "cluster_block_exception")])
def test_a_refusal_that_all_would_meet_ends_the_store(status, kind, store, cluster, rejects):
    error = {"type": kind, "reason": "no"}
    cluster.answers = [edited(cluster, lambda items: [{"create": {"status": status, "error": error}}] * len(items))]
    with pytest.raises(base.RequestFailed, match=f"{status}: no"):
        store.store(documents(2))
    assert (len(cluster.sent), store.stored, rejects) == (1, 0, [])


def test_many_threads_share_one_store_and_refresh_it_once_in_so_many_documents(cluster, rejects):
    store = BulkStore("index", cluster.requests, rejects, Pace(4), retry_seconds=5, refresh_every=50)
    with BulkWorkers(store.store, Pace(4)) as workers:
        for at in range(20):
            workers.put(documents(10, f"{at}.csv"))
        workers.finish()
    assert store.stored == len(cluster.numbers()) == 200
    assert 1 <= cluster.refreshes <= 4  # 4 but where two threads are due at once


# --- the workers ------------------------------------------------------------------------------------------------------


def test_the_first_error_of_a_worker_is_raised_where_batches_are_put():
    def fail(batch):
        raise base.OperationFailed("no more")

    def put_five(workers):
        for _ in range(5):
            workers.put(documents(1))
        workers.finish()

    with BulkWorkers(fail, Pace(2)) as workers, pytest.raises(base.OperationFailed, match="no more"):
        put_five(workers)


def test_as_many_requests_are_under_way_as_the_pace_allows_and_fewer_after_it_was_halved():
    pace, lock, under_way, most = Pace(4), threading.Lock(), [], []

    def store(batch):
        with lock:
            under_way.append(batch)
            most.append(len(under_way))
        time.sleep(0.05)
        with lock:
            under_way.remove(batch)

    with BulkWorkers(store, pace) as workers:
        for at in range(12):
            workers.put(documents(1, str(at)))
        pace.halve()
        pace.halve()  # at most once a second
        time.sleep(0.2)
        del most[:-1]
        for at in range(12):
            workers.put(documents(1, str(at)))
        workers.finish()
    assert pace.limit == 2
    assert max(most[4:]) == 2


# --- S3, and trying again ---------------------------------------------------------------------------------------------

SLOW_DOWN = answer(503, "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>")


@pytest.fixture
def s3_proxy(environment, monkeypatch):
    with FaultProxy(environment["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


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
    with pytest.raises(base.OperationFailed, match=r"a\.csv, byte 0: cannot be read on: "):
        S3Body(bucket, item).readall()
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
    assert S3Body(bucket, item).readall() == b"n\n1\n"
    assert time.monotonic() - began < 7
    assert rule.seen == 2


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
