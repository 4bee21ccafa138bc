"""reindex.py --copy-method clone: the same verified copy in a second, and what is left behind when it goes wrong."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import reindex
import sandbox
from conftest import NUMBER, count, fill, marker_of, secured, sources, wait_until
from fault_proxy import after, answer, lost_answer

pytestmark = pytest.mark.usefixtures("short_pauses")

RESIZE = "indices:admin/resize"


@pytest.fixture
def pair(make_index, may_recreate):
    settings = {"analysis": {"analyzer": {"mine": {"type": "standard", "stopwords": ["a"]}}}}
    source = make_index("source", {**NUMBER, "t": {"type": "text", "analyzer": "mine"}}, docs=5, settings=settings)
    return source, make_index("target", NUMBER, docs=[{"n": 99}], settings={**settings, "number_of_replicas": 2})


@pytest.fixture
def clone(run):
    return lambda source, target, *more: run(
        reindex, "--source", source, "--target", target, "--copy-method", "clone", *more
    )


@pytest.fixture
def look(admin):
    """Return what matters of an index: marker, write block, number of replicas, numbers of its documents."""

    def read(index):
        found = admin("GET", f"/{index}?flat_settings=true")[index]
        count(admin, index)
        return (
            marker_of(admin, index), found["settings"].get("index.blocks.write"),
            found["settings"]["index.number_of_replicas"], sorted(doc["n"] for doc in sources(admin, index)),
        )  # fmt: skip

    return read


CLEAN = (None, None, "1", [0, 1, 2, 3, 4])
CLONED = (None, None, "2", [0, 1, 2, 3, 4])


def test_the_target_becomes_the_source_but_for_its_replicas(pair, clone, look, admin):
    outcome = clone(*pair)
    assert outcome.code == 0, outcome.err
    assert f"cloned {pair[0]} to {pair[1]}" in outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLONED)
    definition = admin("GET", f"/{pair[1]}")[pair[1]]
    assert definition["settings"]["index"]["analysis"]["analyzer"]["mine"]["stopwords"] == ["a"]
    assert outcome.result["documents"] == outcome.result["total"] == 5
    fill(admin, pair[0], [{"n": 5}])  # both can be written again
    fill(admin, pair[1], [{"n": 6}])


def test_a_missing_target_is_created(pair, clone, look, admin):
    admin("DELETE", f"/{pair[1]}")
    assert clone(*pair).code == 0
    assert look(pair[1]) == CLEAN


def test_a_block_of_the_operator_stays(pair, clone, look, admin):
    admin("PUT", f"/{pair[0]}/_settings", {"index.blocks.write": True})
    assert clone(*pair).code == 0
    assert look(pair[0])[:2] == (None, "true")
    assert look(pair[1])[:2] == (None, None)


@pytest.mark.quick
def test_a_dry_run_says_how_and_changes_nothing(pair, clone, look):
    outcome = clone(*pair, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert f"{pair[1]} would be replaced by a clone of {pair[0]}" in outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, (None, None, "2", [99]))


@secured
def test_without_the_permission_documents_are_copied(pair, clone, look, may_recreate):
    may_recreate(*[name for name in sandbox.RECREATE_PERMISSIONS if name != RESIZE])
    outcome = clone(*pair)
    assert outcome.code == 0, outcome.err
    assert f"index {pair[0]} cannot be cloned, so its documents are copied instead" in outcome.err
    assert RESIZE in outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLONED)


@secured
def test_a_deletion_that_is_refused_leads_to_a_copy(pair, clone, look, may_recreate):
    may_recreate(RESIZE)
    outcome = clone(*pair)
    assert outcome.code == 0, outcome.err
    assert "cannot be cloned, so its documents are copied instead" in outcome.err
    assert "indices:admin/delete" in outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLONED)


@secured
def test_a_signal_at_the_end_of_a_fall_back_leaves_nothing_behind(pair, clone, look, proxy, may_recreate):
    may_recreate(RESIZE)
    stop = after(lambda: os.kill(os.getpid(), signal.SIGTERM))
    proxy.on("PUT", f"{pair[0]}/_mapping", stop, skip=1)  # the removal of the marker
    assert clone(*pair).code == 143
    assert (look(pair[0]), look(pair[1])) == (CLEAN, (None, None, "2", [99]))


@pytest.mark.parametrize(
    ("method", "path", "skip"),
    [("POST", "_clone", 1), ("DELETE", "target", 0), ("PUT", "_settings", 0), ("PUT", "_mapping", 0)],
)
def test_a_lost_response_is_looked_up(method, path, skip, pair, clone, look, proxy):
    proxy.on(method, path, lost_answer, skip=skip)
    outcome = clone(*pair)
    assert outcome.code == 0, outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLONED)


def test_a_clone_that_fails_leaves_no_block_and_the_next_run_clones_with_the_replicas_of_the_target(
    pair, clone, look, proxy
):
    refusal = answer(400, {"error": {"type": "illegal_argument_exception", "reason": "of a test"}})
    proxy.on("POST", "_clone", refusal, skip=1, times=2)
    outcome = clone(*pair)
    assert outcome.code == 1, outcome.err
    marker, block, _, documents = look(pair[0])
    assert (block, documents) == (None, [0, 1, 2, 3, 4])
    assert marker["replicas"]["index.number_of_replicas"] == "2"
    assert clone(*pair).code == 0
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLONED)


def test_a_client_that_writes_all_the_time_gets_errors_and_loses_nothing(pair, clone, look, box):
    stored, errors, stopped = [], [], threading.Event()

    def write():
        while not stopped.is_set():
            try:
                box.server.request("POST", f"/{pair[0]}/_doc", {"n": 100 + len(stored)})
                stored.append(1)
            except RuntimeError as error:
                errors.append(str(error))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        outcome = clone(*pair)
    finally:
        stopped.set()
        writer.join()
    assert outcome.code == 0, outcome.err
    assert errors
    assert all(" 403 " in error and "cluster_block_exception" in error for error in errors)
    assert look(pair[0])[3] == [*range(5), *range(100, 100 + len(stored))]
    copied = look(pair[1])[3]
    assert copied == look(pair[0])[3][: len(copied)]


def test_an_index_of_five_shards_is_cloned_whatever_the_templates(make_index, clone, look, admin, name, may_recreate):
    source = make_index("source", NUMBER, docs=50, settings={"number_of_shards": 5, "replication.type": "SEGMENT"})
    brings = {"settings": {"index.default_pipeline": "missing"}, "mappings": {"properties": {"x": {"type": "long"}}}}
    template = {"index_patterns": [name("target")], "template": {**brings, "aliases": {name("alias"): {}}}}
    admin("PUT", f"/_index_template/{name('template')}", template)
    try:
        outcome = clone(source, name("target"))
    finally:
        admin("DELETE", f"/_index_template/{name('template')}")
    assert outcome.code == 0, outcome.err
    assert look(name("target")) == look(source) == (None, None, "1", list(range(50)))
    made = admin("GET", f"/{name('target')}")[name("target")]
    assert (made["aliases"], made["mappings"]["properties"]) == ({}, NUMBER)
    assert "default_pipeline" not in made["settings"]["index"]
    assert made["settings"]["index"]["replication"] == {"type": "SEGMENT"}


def test_an_alias_in_the_place_of_the_target_is_refused_before_anything_changes(pair, clone, look, admin, name):
    admin("POST", "/_aliases", {"actions": [{"add": {"index": pair[1], "alias": name("alias")}}]})
    for more in ([], ["--dry-run"]):
        outcome = clone(pair[0], name("alias"), *more)
        assert outcome.code == 1, outcome.err
        assert f"{name('alias')} is an alias of {pair[1]}" in outcome.last
    assert look(pair[0]) == CLEAN


def arrives_late(seconds):
    """Stop the script while a request is on its way, and let the server carry it out afterwards."""

    def fault(exchange):
        body = exchange.body
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        exchange.forward(body)
        exchange.drop()

    return fault


@pytest.mark.parametrize(("method", "path"), [("PUT", "source/_settings"), ("DELETE", "target")])
@pytest.mark.parametrize("seconds", [0.003, 1])
def test_a_request_that_is_carried_out_after_a_signal_is_undone_by_the_next_run(
    method, path, seconds, pair, clone, look, proxy, admin, name
):
    proxy.on(method, path, arrives_late(seconds))
    assert clone(*pair).code == 143
    wait_until(lambda: path != "target" or pair[1] not in admin("GET", "/_alias"))
    time.sleep(seconds)
    assert marker_of(admin, pair[0])  # the next run knows
    outcome = clone(*pair)
    assert outcome.code == 0, outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLONED)


def test_after_a_crash_behind_the_deletion_a_run_with_another_method_clones_as_well(pair, clone, look, run, proxy):
    refusal = answer(400, {"error": {"type": "illegal_argument_exception", "reason": "of a test"}})
    proxy.on("POST", "_clone", refusal, skip=1, times=2)
    outcome = clone(*pair)
    assert outcome.code == 1, outcome.err
    assert f"index {pair[1]} is missing until a run succeeds" in outcome.last
    for more in (["--dry-run"], []):
        outcome = run(reindex, "--source", pair[0], "--target", pair[1], *more)
        assert outcome.code == 0, outcome.err
        assert f"a run crashed while cloning {pair[0]}; cloning it again" in outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLONED)


@pytest.mark.parametrize("method", ["clone", "reindex"])
def test_a_crash_before_the_clone_is_finished_is_healed_even_if_the_operator_has_set_the_block(
    method, pair, clone, look, run, admin, proxy
):
    admin("PUT", f"/{pair[0]}/_settings", {"index.blocks.write": True})
    proxy.on("PUT", f"{pair[1]}/_settings", answer(400, {"error": {"type": "crash", "reason": "of a test"}}))
    assert clone(*pair).code == 1
    outcome = run(reindex, "--source", pair[0], "--target", pair[1], "--copy-method", method)
    assert outcome.code == 0, outcome.err
    assert look(pair[0])[:2] == (None, "true")
    marker, block, replicas, documents = look(pair[1])
    assert (marker, block in (None, "false"), replicas, documents) == (None, True, "2", [0, 1, 2, 3, 4])


@secured
def test_a_source_whose_settings_may_not_be_changed_is_copied(pair, clone, look, account, box):
    role, of_target = (sandbox.refresh_role([index]) for index in pair)
    [of_source], [of_target] = role["index_permissions"], of_target["index_permissions"]
    of_source["allowed_actions"].remove("indices:admin/settings/update")
    of_source["allowed_actions"].append(RESIZE)
    of_target["allowed_actions"] += sandbox.RECREATE_PERMISSIONS
    box.server.grant(account.user, {**role, "index_permissions": [of_source, of_target]}, account.user)
    outcome = clone(*pair)
    assert outcome.code == 0, outcome.err
    assert "lacks indices:admin/settings/update" in outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLONED)


NOWHERE = {"index.routing.allocation.require._name": "nowhere"}


def test_a_clone_whose_replicas_the_cluster_rejects_gets_those_of_the_source(pair, clone, look, admin):
    admin("PUT", f"/{pair[0]}/_settings", {"index.number_of_replicas": 1, "index.write.wait_for_active_shards": 2})
    admin("PUT", f"/{pair[1]}/_settings", {"index.number_of_replicas": 0})
    outcome = clone(*pair)
    assert outcome.code == 0, outcome.err
    assert "cannot be greater than number of shard copies" in outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLEAN)


def test_a_red_target_is_replaced(make_index, may_recreate, clone, admin, monkeypatch):
    monkeypatch.setenv("RETRY_SECONDS", "1")
    source = make_index("source", NUMBER, docs=3)
    admin("PUT", f"/{source}-red?wait_for_active_shards=0", {"settings": NOWHERE, "mappings": {"properties": NUMBER}})
    outcome = clone(source, f"{source}-red")
    assert outcome.code == 0, outcome.err
    assert count(admin, f"{source}-red") == 3


def test_an_index_that_a_stray_write_creates_while_it_is_cloned_gets_its_replicas_back(pair, clone, look, admin, proxy):
    def create(exchange):
        exchange.pass_on()
        admin("PUT", f"/{pair[1]}")

    proxy.on("DELETE", pair[1], create)
    outcome = clone(*pair)
    assert outcome.code == 1
    assert "another client has created index" in outcome.last
    outcome = clone(*pair)
    assert outcome.code == 0, outcome.err
    assert (look(pair[0]), look(pair[1])) == (CLEAN, CLONED)
