"""A cluster that pushes back during a refresh: 429 for items and requests, breakers, full disks, size limits."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest
import sandbox
from fault_proxy import Exchange, after, answer, before

from .driver import World

BUSY = {
    "type": "opensearch_rejected_execution_exception",
    "reason": "rejected execution of coordinating operation [coordinating_and_primary_bytes=0, max=1]",
}
MIB = 1024 * 1024
LARGE = 30_000  # characters; a keyword holds 32,766 bytes
BLOCK = "index.blocks.read_only_allow_delete"  # what the server sets at the flood stage


def pairs(body: bytes) -> list[bytes]:
    """Return action line and document of each document of a bulk request."""
    lines = body.splitlines(keepends=True)
    return [action + document for action, document in zip(lines[::2], lines[1::2])]


class Full:
    """Refuses some documents, as a full queue does: they do not reach the server, and their items say 429."""

    def __init__(self, refuses: Callable[[int, bytes], bool]) -> None:
        self.refuses, self.lock = refuses, threading.Lock()
        self.seen, self.refused = 0, list[bytes]()

    def __call__(self, exchange: Exchange) -> None:
        documents = pairs(exchange.body)
        with self.lock:
            places = [at for at, document in enumerate(documents) if self.refuses(self.seen + at, document)]
            self.seen += len(documents)
            self.refused += [documents[at] for at in places]
        kept = b"".join(document for at, document in enumerate(documents) if at not in places)
        reply = exchange.forward(kept).json() if kept else {"errors": False, "items": []}
        for at in places:
            reply["items"].insert(at, {"create": {"status": 429, "error": BUSY}})
        exchange.reply(200, json.dumps({**reply, "errors": reply["errors"] or bool(places)}))


def test_documents_that_a_full_queue_refuses_are_sent_again(world):
    full = Full(lambda nth, document: nth % 10 in (0, 3, 6) and nth < 60)  # the first 43, and some a second time
    world.proxy.on("POST", "/_bulk", full, times=None)
    run = world.refresh()
    world.expect(run, code=0)
    sent = [document for body in world.proxy.seen("POST", "/_bulk") for document in pairs(body)]
    assert len(full.refused) > 13
    assert [document for document in set(sent) if sent.count(document) != 1 + full.refused.count(document)] == []
    assert "the cluster is busy (429 or 5xx)" in run.log
    world.assert_done()


# --- whole requests ---------------------------------------------------------------------------------------------------


class Busy:
    """Answers 429 to the first requests, with what `retry_after` says; records when each body comes."""

    def __init__(self, retry_after: Callable[[], str], times: int) -> None:
        self.retry_after, self.times, self.lock = retry_after, times, threading.Lock()
        self.arrivals: dict[bytes, list[float]] = {}

    def __call__(self, exchange: Exchange) -> None:
        with self.lock:
            self.arrivals.setdefault(exchange.body, []).append(time.monotonic())
        if exchange.nth <= self.times:
            exchange.reply(429, json.dumps({"message": "Too Many Requests"}), {"Retry-After": self.retry_after()})
        else:
            exchange.pass_on()

    def pauses(self) -> list[float]:
        """Return the seconds between a refused sending and the next one of the same documents."""
        return [next_one - one for moments in self.arrivals.values() for one, next_one in itertools.pairwise(moments)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("retry_after", "least"),
    [(lambda: "4", 4), (lambda: formatdate(time.time() + 5, usegmt=True), 3.9), (lambda: "3600", 59)],
    ids=["seconds", "a date", "an hour"],
)
def test_a_cluster_that_asks_for_time_gets_it_up_to_a_minute(world, retry_after, least):
    busy = Busy(retry_after, times=2)
    world.proxy.on("POST", "/_bulk", busy, times=None)
    run = world.finish(world.start(RETRY_SECONDS="150"), timeout=250)
    world.expect(run, code=0)
    assert len(busy.pauses()) == 2
    assert min(busy.pauses()) >= least
    assert max(busy.pauses()) < 100
    assert "the cluster is busy (429 or 5xx)" in run.log
    world.assert_done()


@pytest.mark.long
def test_a_cluster_that_asks_for_more_than_retry_seconds_ends_the_run_at_once(world):
    rule = world.proxy.on(
        "POST", "/_bulk", answer(429, {"message": "Too Many Requests"}, retry_after="3600"), times=None
    )
    began = time.monotonic()
    world.expect(world.refresh(RETRY_SECONDS="20"), code=1, message=f"POST /{world.primary}/_bulk: 429 .*Too Many Req")
    assert time.monotonic() - began < 60
    assert rule.seen >= 1
    world.heal()


@pytest.mark.long
def test_every_request_that_changes_something_may_be_refused_for_a_while(world):
    paths = [f"/{world.secondary}/_mapping", f"/{world.secondary}/_settings", "/_reindex", "/_aliases",
             f"/{world.primary}/_mapping", f"/{world.primary}/_settings", f"/{world.primary}/_delete_by_query",
             f"/{world.primary}/_bulk"]  # fmt: skip
    too_busy = answer(429, {"error": BUSY, "status": 429}, retry_after="1")
    rules = [world.proxy.on("PUT|POST", f"^{path}", too_busy, times=2) for path in paths]
    run = world.refresh()
    world.expect(run, code=0)
    assert [rule.path.pattern for rule in rules if rule.seen < 3] == []
    assert run.log.count("trying again") == 2 * len(rules)
    world.assert_done()


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "path", "step"),
    [("POST", "/_reindex", "1 copy"), ("POST", "/_aliases", "2 switch"),
     ("POST", "/primary/_delete_by_query", "3 load"), ("POST", "/primary/_bulk", "3 load")],
)  # fmt: skip
def test_a_cluster_that_stays_busy_ends_the_run_with_its_reason(world, method, path, step):
    path = path.replace("primary", world.primary)
    rule = world.proxy.on(method, f"^{path}", answer(429, {"error": BUSY, "status": 429}), times=None)
    run = world.refresh(RETRY_SECONDS="3")
    world.expect(run, code=1, message=f"{method} {path}: 429 {BUSY['type']}: rejected execution")
    assert f"FAILED at: {step}" in run.err
    assert rule.seen > 1
    world.heal()


# --- a full disk ------------------------------------------------------------------------------------------------------


def block(world: World, index: str, value: bool | None = True) -> None:
    world.admin("PUT", f"/{index}/_settings", {BLOCK: value})


def assert_still_blocked(world: World, index: str) -> None:
    assert world.state(index)["settings"]["blocks"] == {"read_only_allow_delete": "true"}


def test_a_disk_that_fills_up_during_the_load_ends_the_run_soon(world):
    world.proxy.on("POST", "/_bulk", after(lambda: block(world, world.primary)))
    began = time.monotonic()
    run = world.refresh(RETRY_SECONDS="300")
    world.expect(run, code=1, message=f"/{world.primary}/_.*flood-stage.*; free disk space on the data nodes first")
    assert "FAILED at: 3 load" in run.err
    assert_still_blocked(world, world.primary)
    # the next night the disk is still full
    world.expect(world.refresh(), code=4, message="read_only_allow_delete.* free disk space on the data nodes")
    assert time.monotonic() - began < 60
    assert_still_blocked(world, world.primary)
    block(world, world.primary, None)
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize("nth", [1, 2])
def test_a_disk_that_fills_up_before_a_switch_ends_the_run_soon(world, nth):
    world.proxy.on("POST", "^/_aliases", before(lambda: block(world, world.primary)), skip=nth - 1)
    began = time.monotonic()
    run = world.refresh(RETRY_SECONDS="300")
    world.expect(run, code=1, message="POST /_aliases: 429 .*flood-stage.*; free disk space on the data nodes first")
    assert time.monotonic() - began < 60
    assert f"FAILED at: {nth * 2} switch" in run.err
    assert_still_blocked(world, world.primary)
    block(world, world.primary, None)
    world.heal()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_disk_that_fills_up_during_the_copy_ends_the_run(world):
    world.proxy.on("POST", "^/_reindex", before(lambda: block(world, world.secondary)))
    run = world.finish(world.start(), timeout=400)  # the server itself tries again for a minute or so
    reason = "flood-stage.*; free disk space on the data nodes first"
    world.expect(run, code=1, message=f"copying {world.primary} to {world.secondary}.*{reason}")
    assert "FAILED at: 1 copy" in run.err
    assert_still_blocked(world, world.secondary)
    block(world, world.secondary, None)
    world.heal()


# --- requests that are too large --------------------------------------------------------------------------------------


class Limit:
    """Answers 413 to bulk requests above a size, as load balancers and managed domains do."""

    def __init__(self, most: int) -> None:
        self.most, self.refused, self.passed = most, list[int](), list[int]()

    def __call__(self, exchange: Exchange) -> None:
        size = len(exchange.body)
        if size > self.most:
            self.refused.append(size)
            exchange.reply(413, "<html><h1>413 Request Entity Too Large</h1></html>", {"Content-Type": "text/html"})
        else:
            self.passed.append(size)
            exchange.pass_on()


def test_requests_above_one_mib_are_halved_where_the_cluster_refuses_them(world):
    rows = [f"{n},{n / 2},{'x' * LARGE}\n" for n in range(100, 143)]
    world.objects = {"a.csv": ("n,half,word\n" + "".join(rows)).encode()}
    for key in ("b.csv.gz", "c.csv"):
        world.s3.delete_object(Bucket=sandbox.BUCKET, Key=world.prefix + key)
    world.put(world.objects)
    limit = Limit(MIB)
    world.proxy.on("POST", "/_bulk", limit, times=None)
    run = world.refresh(BATCH_SIZE="1000")
    world.expect(run, code=0)
    assert len(limit.refused) == 1
    assert sum(limit.passed) == limit.refused[0]
    assert "(413)" in run.log
    world.assert_done()
