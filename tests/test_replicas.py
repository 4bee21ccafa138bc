"""Replicas that lag behind their primaries (segment replication): no reader, no copy and no deletion sees them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import index_cleanup
import pytest
import reindex
import sandbox
from conftest import Reader, fill
from faults.driver import NEW_ROWS, SETTINGS, World, add_roles
from faults.test_killed import assert_killed_and_healed

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]
PROPERTIES = {"n": {"type": "long"}, "word": {"type": "keyword"}}
# the nodes are started once; the long form has them with a remote store too
WORLDS = ["segments", pytest.param("remote store", marks=pytest.mark.long)]
LAGGING = 3000  # documents that a throttled replica needs some seconds for


@pytest.fixture(scope="session", params=WORLDS)
def box(request: pytest.FixtureRequest, box: sandbox.Sandbox) -> Iterator[sandbox.Sandbox]:
    """Two nodes of their own, with the S3 and the Parameter Store of the others."""
    with sandbox.cluster(2, remote_store=request.param == "remote store") as nodes:
        if sandbox.SECURE:
            add_roles(nodes[0])
        where = {**box.environment, "OPENSEARCH_PARAMETER_PREFIX": "/two-nodes"}
        sandbox.store_parameters(where, nodes[0].endpoint, "/two-nodes")
        yield sandbox.Sandbox(nodes[0], where)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAIT_SECONDS", "60")


@pytest.fixture
def throttled(box: sandbox.Sandbox) -> Iterator[Callable[[], None]]:
    """Throttle replication, until the test ends."""
    yield lambda: sandbox.throttle_replication(box.server)
    sandbox.throttle_replication(box.server, None)


@pytest.fixture
def make(make_index: Callable[..., str], admin: Callable[..., Any]) -> Callable[..., str]:
    """Create an index with a replica, wait until both copies are there, and fill it."""

    def create(suffix: str, docs: int = 0, *, properties: Any = PROPERTIES, alias: str = "", **settings: Any) -> str:
        replication = {"index.number_of_replicas": 1, "index.replication.type": "SEGMENT"}
        index = make_index(suffix, properties, settings={**replication, **settings}, alias=alias)
        admin("GET", f"/_cluster/health/{index}?wait_for_status=green&timeout=30s")
        fill(admin, index, documents(docs))
        return index

    return create


def documents(number: int) -> list[dict[str, Any]]:
    return [{"n": 1, "word": random.randbytes(30).hex()} for _ in range(number)]


def lags(admin: Callable[..., Any], index: str) -> bool:
    """Say whether two copies answer differently now, so that the test proves something."""
    return len({admin("GET", f"/{index}/_count?preference=copy-{at}")["count"] for at in range(8)}) > 1


def test_a_switch_waits_until_all_copies_have_the_data(box, make, name, switch, admin, throttled, patient):
    old, new = make("old", LAGGING, alias=name("alias")), make("new")
    throttled()
    fill(admin, new, documents(LAGGING + 1))
    assert lags(admin, new)
    reader = Reader(box.server.endpoint, name("alias"), "n")
    reader.start()
    outcome = switch(old, new)
    moved = lags(admin, new)
    seen = reader.finish()
    assert (outcome.code, moved, reader.errors) == (0, False, []), outcome.err
    assert {total for total, _ in seen} <= {LAGGING, LAGGING + 1}


def test_a_switch_to_copies_that_do_not_catch_up_is_refused(make, name, switch, admin, throttled, monkeypatch):
    old, new = make("old", LAGGING, alias=name("alias")), make("new")
    throttled()
    fill(admin, new, documents(LAGGING))
    monkeypatch.setenv("WAIT_SECONDS", "1")
    outcome = switch(old, new)
    assert lags(admin, new)
    assert outcome.code == 4, outcome.err
    assert list(admin("GET", f"/_alias/{name('alias')}")) == [old]
    assert f"index {new}: " in outcome.last


def test_a_copy_reads_what_the_primary_has(make, name, run, admin, throttled, patient):
    old, new = make("old", alias=name("alias")), make("new")
    throttled()
    fill(admin, old, documents(LAGGING))
    assert lags(admin, old)
    outcome = run(reindex, "--source", old, "--target", new)
    assert (outcome.code, outcome.result["total"]) == (0, LAGGING), outcome.err


def test_a_deletion_goes_on_when_the_copies_have_caught_up(make, run, admin, throttled, patient):
    index = make("index")
    throttled()
    fill(admin, index, documents(LAGGING))
    assert lags(admin, index)
    outcome = run(index_cleanup, "--index", index, "--no-force-merge")
    left = admin("GET", f"/{index}/_count?preference=_primary")["count"]
    assert (outcome.code, left) == (0, 0), outcome.err


def test_an_index_is_recreated_with_what_the_server_gives_it(make, run, admin, may_recreate):
    index = make("index", 3)
    uuid = admin("GET", f"/{index}")[index]["settings"]["index"]["uuid"]
    outcome = run(index_cleanup, "--index", index, "--method", "recreate", "--no-force-merge")
    assert (outcome.code, "WARNING index_cleanup: index" in outcome.err) == (0, False), outcome.err
    assert admin("GET", f"/{index}")[index]["settings"]["index"]["uuid"] != uuid


def test_an_undo_needs_one_copy_and_names_what_is_missing(make, name, switch, admin):
    old, new = make("old", 3, alias=name("alias")), make("new", 3)
    admin("PUT", f"/{new}/_settings", {"index.routing.allocation.exclude._name": "node-1"})
    admin("PUT", f"/{new}/_settings", {"index.number_of_replicas": 0})
    admin("PUT", f"/{new}/_settings", {"index.number_of_replicas": 1})
    assert switch(old, new, "--wait-seconds", "1").code == 4
    outcome = switch(old, new, "--wait-seconds", "1", "--undo")
    assert outcome.code == 0, outcome.err
    assert list(admin("GET", f"/_alias/{name('alias')}")) == [new]
    assert "WARNING" in outcome.err
    assert f"index {new}: fewer than 2 active copies in 1 of 1 shards" in outcome.err


def test_documents_that_are_too_large_for_one_batch_are_copied_in_smaller_ones(make, run, admin):
    text = {"text": {"type": "text", "index": False}}
    old, new = make("old", properties=text), make("new", properties=text)
    for _ in range(20):  # 60 MB, and a node accepts 10 % of its 512 MB at once
        fill(admin, old, [{"text": random.randbytes(15_000).hex()} for _ in range(100)])
    outcome = run(reindex, "--source", old, "--target", new)
    assert (outcome.code, outcome.result["total"]) == (0, 2000), outcome.err


# --- whole refreshes --------------------------------------------------------------------------------------------------

SLOW = "30kb"  # per second: a replica gets the documents of a load in some seconds
WAYS: dict[str, dict[str, str]] = {
    "copy-back": {}, "alternate": {"REFRESH_STRATEGY": "alternate", "CLEANUP_METHOD": "recreate"},
    "clone": {"COPY_METHOD": "clone", "CLEANUP_METHOD": "recreate"},
}  # fmt: skip


@pytest.fixture(params=WAYS)
def world(
    request: pytest.FixtureRequest, box: sandbox.Sandbox, name: Callable[[str], str], environment: dict[str, str],
    tmp_path: Path, may_recreate: Callable[..., None],
) -> Iterator[World]:  # fmt: skip
    """Two indices whose replicas lag, with a reader at the alias that asks each copy."""
    with World(box, name, environment, tmp_path, {**SETTINGS, "index.replication.type": "SEGMENT"}) as made:
        made.admin("GET", f"/_cluster/health/{made.primary},{made.secondary}?wait_for_status=green&timeout=30s")
        rows = (f"{n},{n / 2},{random.randbytes(2000).hex()}\n" for n in range(NEW_ROWS))
        made.objects = {"a.csv": ("n,half,word\n" + "".join(rows)).encode()}
        made.put(made.objects)
        for key in ("b.csv.gz", "c.csv"):
            made.s3.delete_object(Bucket=sandbox.BUCKET, Key=made.prefix + key)
        made.environment |= {**WAYS[request.param], "WAIT_SECONDS": "60"}
        made.alternate = request.param == "alternate"
        if made.alternate:
            fill(made.admin, made.secondary, [{"n": 1, "half": 0.5, "word": "older"}] * 40)
        sandbox.throttle_replication(box.server, SLOW)
        yield made
    sandbox.throttle_replication(box.server, None)


def test_a_whole_refresh_and_its_undo_show_no_reader_a_replica_that_lags(world):
    run = world.refresh()
    world.expect(run, code=0)
    [live] = world.behind_alias()
    readings = len(world.proxy.seen("GET", f"/{live}/_stats.level=shards"))
    assert readings > 4 or "CLEANUP_METHOD" in world.environment  # a new index is waited for until it is green
    world.assert_done()
    undo = re.findall("undo: (.*)", run.log)[-1]
    back = world.finish(world.start("bash", "-c", undo))
    assert back.code == 0, back.err
    assert world.behind_alias() != [live]


@pytest.mark.parametrize("at", [pytest.param(at, marks=pytest.mark.long) for at in (3, 5, 6, 9, 12)])
def test_a_refresh_that_is_killed_is_healed_though_replicas_lag(world, at):
    assert_killed_and_healed(world, at, "after")
