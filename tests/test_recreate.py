"""Emptying an index by deleting and creating it: the same index afterwards, whatever comes in between."""

from __future__ import annotations

import contextlib
import os
import random
import signal

import bulkupdate
import index_cleanup
import opensearch_base_manager as base
import pytest
import reindex
import sandbox
from conftest import NUMBER, Reader, count, marker_of, meta_of, secured, sources, state_of
from fault_proxy import Exchange, after, answer, before, lost_answer

SETTINGS = {
    "number_of_shards": 2, "number_of_replicas": 1, "refresh_interval": "7s",
    "analysis": {"analyzer": {"own": {"type": "custom", "tokenizer": "standard", "filter": ["lowercase"]}}},
}  # fmt: skip
MAPPING = {"dynamic": "strict", "_meta": {"owner": "team a"}}
PROPERTIES = {**NUMBER, "text": {"type": "text", "analyzer": "own"}}


@pytest.fixture
def index(make_index, may_recreate):
    return make_index("index", PROPERTIES, docs=3, settings=SETTINGS, **MAPPING)


@pytest.fixture
def recreate(run):
    return lambda index, *more: run(index_cleanup, "--index", index, "--method", "recreate", *more)


def definition(admin, index):
    found = admin("GET", f"/{index}")[index]
    own = {name: value for name, value in found["settings"]["index"].items()
           if name not in ("uuid", "creation_date", "provided_name", "version")}  # fmt: skip
    return {**found, "settings": own}


def uuid_of(admin, index):
    return admin("GET", f"/{index}")[index]["settings"]["index"]["uuid"]


def exists(admin, index):
    return index in admin("GET", f"/{index}*/_settings")


def crash_at(proxy, method, path, *, skip=0):
    """Let a run fail at this request, and at each attempt to recover, as a crash there would."""
    error = {"error": {"type": "crashed", "reason": "of a test"}}
    return proxy.on(method, path, answer(400, error), skip=skip, times=None)


def kinds_of(proxy):
    """Return the requests that change whole indices: the method, and what follows the name of the index."""
    return [(method, path.split("?")[0].rsplit("-index", 1)[-1]) for method, path, _ in proxy.requests
            if method == "DELETE" or (method == "PUT" and path.count("/") == 1)]  # fmt: skip


# --- it is the same index, empty --------------------------------------------------------------------------------------


@pytest.mark.quick
def test_an_index_is_deleted_and_created_with_the_same_definition(index, recreate, admin, proxy):
    wanted, former = definition(admin, index), uuid_of(admin, index)
    outcome = recreate(index)
    assert outcome.code == 0, outcome.err
    assert (outcome.result["deleted"], outcome.result["documents"]) == (3, 0)
    assert definition(admin, index) == wanted
    assert uuid_of(admin, index) != former
    assert count(admin, index) == 0
    assert not exists(admin, f"{index}-recreate")
    assert proxy.seen("POST", "_delete_by_query") == []
    # the backup, the try that cannot succeed, the deletion, the index, and the backup goes
    assert kinds_of(proxy) == [("PUT", "-recreate"), ("PUT", ""), ("DELETE", ""), ("PUT", ""), ("DELETE", "-recreate")]


def test_the_variable_makes_loads_and_copies_recreate_the_index(
    index, make_index, run, put_csv, admin, proxy, monkeypatch
):
    monkeypatch.setenv("CLEANUP_METHOD", "recreate")
    wanted, prefix = definition(admin, index), put_csv({"a.csv": "n\n7\n8\n"})
    load = ["--bucket", sandbox.BUCKET, "--prefix", prefix, "--index", index]
    assert run(bulkupdate, *load).code == 0
    assert sources(admin, index) == [{"n": 7}, {"n": 8}]
    source = make_index("source", PROPERTIES, docs=5, settings=SETTINGS, **MAPPING)
    assert run(reindex, "--source", source, "--target", index).code == 0
    assert count(admin, index) == 5
    assert definition(admin, index) == wanted
    assert proxy.seen("POST", "_delete_by_query") == []


def test_an_alias_that_comes_right_before_the_deletion_is_seen(index, name, recreate, admin, proxy):
    add = {"actions": [{"add": {"index": index, "alias": name("alias")}}]}
    proxy.on("PUT", f"^/{index}-recreate", after(lambda: admin("POST", "/_aliases", add)))
    outcome = recreate(index)
    assert outcome.code == 4, outcome.err
    assert count(admin, index) == 3
    assert not exists(admin, f"{index}-recreate")


# --- what forbids it: the documents are deleted instead ---------------------------------------------------------------


def assert_deleted_instead(outcome, admin, index, former, reason):
    assert outcome.code == 0, outcome.err
    assert f"index {index} cannot be recreated, so its documents are deleted instead" in outcome.err
    assert reason in outcome.err
    assert (uuid_of(admin, index), count(admin, index)) == (former, 0)


@secured
@pytest.mark.parametrize("missing", ["indices:admin/create", "indices:admin/delete"])
def test_without_a_permission_nothing_is_deleted(missing, index, may_recreate, recreate, admin):
    may_recreate(*(set(sandbox.RECREATE_PERMISSIONS) - {missing}))
    former = uuid_of(admin, index)
    outcome = recreate(index, "--no-force-merge")
    assert_deleted_instead(outcome, admin, index, former, missing)
    if missing == "indices:admin/delete":
        assert f"the empty index {index}-recreate could not be deleted" in outcome.err


def test_an_index_named_like_the_backup_is_left_alone(index, make_index, recreate, admin):
    other = make_index("index-recreate", NUMBER, docs=2, alias=f"{index}-of-another")
    former, before = uuid_of(admin, index), state_of(admin, other)
    outcome = recreate(index, "--no-force-merge")
    assert_deleted_instead(outcome, admin, index, former, "resource_already_exists_exception")
    assert state_of(admin, other) == before


def test_a_running_snapshot_forbids_the_deletion(index, make_index, recreate, admin, box, name):
    large = make_index("large", {"text": {"type": "keyword"}})
    noise = random.Random(1)
    lines = "".join(f'{{"index":{{}}}}\n{{"text":"{noise.randbytes(200).hex()}"}}\n' for _ in range(2000))
    admin("POST", f"/{large}/_bulk?refresh=true", data=lines, headers={"Content-Type": "application/x-ndjson"})
    slow = {"location": str(box.server.run / "snapshots"), "max_snapshot_bytes_per_sec": "20kb"}
    admin("PUT", f"/_snapshot/{name('repo')}", {"type": "fs", "settings": slow})
    former = uuid_of(admin, index)
    try:
        admin("PUT", f"/_snapshot/{name('repo')}/one", {"indices": f"{index},{large}"})
        outcome = recreate(index, "--no-force-merge")
        assert_deleted_instead(outcome, admin, index, former, "snapshot_in_progress_exception")
        assert not exists(admin, f"{index}-recreate")
    finally:
        admin("DELETE", f"/_snapshot/{name('repo')}/one")
        admin("DELETE", f"/_snapshot/{name('repo')}")


@pytest.fixture
def template(admin, name):
    """Make an index template for a pattern, with whatever it brings."""
    admin_of = []

    def make(pattern, **brings):
        admin("PUT", f"/_index_template/{name('template')}", {"index_patterns": [pattern], "template": brings})
        admin_of.append(name("template"))

    yield make
    for made in admin_of:
        with contextlib.suppress(RuntimeError):  # the test has deleted it
            admin("DELETE", f"/_index_template/{made}")


@pytest.mark.parametrize("brings", ["alias", "setting", "field"])
def test_a_template_that_would_change_the_new_index_is_found_beforehand(brings, index, template, recreate, admin, name):
    live = name("alias")
    template(f"{index}*", **{
        "alias": {"aliases": {live: {}}}, "setting": {"settings": {"index.codec": "best_compression"}},
        "field": {"mappings": {"properties": {"more": {"type": "long"}}}},
    }[brings])  # fmt: skip
    former = uuid_of(admin, index)
    outcome = recreate(index, "--no-force-merge")
    assert_deleted_instead(outcome, admin, index, former, "index template")
    assert not exists(admin, f"{index}-recreate")


@pytest.mark.parametrize("brings", ["alias", "setting"])
def test_an_index_that_a_template_for_its_name_alone_changes_stays_away_until_the_template_is_changed(
    brings, index, make_index, template, recreate, admin, name, box
):
    live, wanted = name("alias"), definition(admin, index)
    other = make_index("other", NUMBER, docs=4, alias=live)
    template(index, **{"alias": {"aliases": {live: {}}}, "setting": {"settings": {"index.codec": "default"}}}[brings])
    reader = Reader(box.server.endpoint, live, "n")
    reader.start()
    for _ in range(2):
        outcome = recreate(index)
        assert outcome.code == 1
        assert f"an index template (or another run) gave the new index {index}" in outcome.last
        assert list(admin("GET", f"/_alias/{live}")) == [other]
        assert list(admin("GET", f"/{index}*")) == [f"{index}-recreate"]
    assert (reader.finish(), reader.errors) == ([(4, 6.0)], [])
    admin("DELETE", f"/_index_template/{name('template')}")
    assert recreate(index).code == 0
    assert definition(admin, index) == wanted
    assert list(admin("GET", f"/{index}*")) == [index]


# --- no response, and crashed runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "path"), [("PUT", "index-recreate"), ("DELETE", "index"), ("PUT", "index"),
                                              ("DELETE", "index-recreate")])  # fmt: skip
@pytest.mark.parametrize("fault", [lost_answer, answer(504, "<html>Gateway Time-out</html>")])
def test_no_response_is_got_over_and_no_deletion_is_sent_twice(
    method, path, fault, index, recreate, admin, proxy, name
):
    def lost(exchange: Exchange) -> None:
        exchange.forward()
        fault(exchange) if fault is not lost_answer else exchange.drop()

    wanted = definition(admin, index)
    skip = 1 if (method, path) == ("PUT", "index") else 0  # the first one is the try that cannot succeed
    rule = proxy.on(method, f"^/{name(path)}$", lost, skip=skip)
    outcome = recreate(index)
    assert outcome.code == 0, outcome.err
    assert rule.seen > skip
    assert definition(admin, index) == wanted
    assert len(proxy.seen("DELETE", f"^/{index}$")) == 1
    assert not exists(admin, f"{index}-recreate")


def test_a_deletion_that_arrives_late_costs_nothing(index, recreate, admin, proxy):
    """The answer is lost and the index is still there: the run stops, and the backup keeps the definition."""
    wanted = definition(admin, index)
    proxy.on("DELETE", f"^/{index}$", Exchange.drop)
    outcome = recreate(index)
    assert outcome.code == 1, outcome.err
    assert f"DELETE /{index}" in outcome.last
    assert exists(admin, f"{index}-recreate")
    admin("DELETE", f"/{index}")  # it arrives
    assert recreate(index).code == 0
    assert definition(admin, index)["settings"] == wanted["settings"]
    assert not exists(admin, f"{index}-recreate")


def test_an_index_that_another_run_has_created_and_made_live_meanwhile_is_not_deleted(
    index, recreate, admin, proxy, name
):
    """The creation is answered by "already exists": it may be the other run's index, with readers on it."""
    add = {"actions": [{"add": {"index": index, "alias": name("alias")}}]}

    def lost(exchange: Exchange) -> None:
        exchange.forward()
        admin("POST", "/_aliases", add)
        exchange.drop()

    proxy.on("PUT", f"^/{index}$", lost, skip=1)
    outcome = recreate(index)
    assert outcome.code == 1, outcome.err
    assert "resource_already_exists_exception" in outcome.last
    assert list(admin("GET", f"/_alias/{name('alias')}")) == [index]
    assert len(proxy.seen("DELETE", f"^/{index}$")) == 1


@pytest.fixture
def deleted(index, recreate, proxy, admin):
    """An index that is missing, since a run crashed between the deletion and the creation; and what it was."""
    wanted = definition(admin, index)
    crash = crash_at(proxy, "PUT", f"^/{index}$", skip=1)
    outcome = recreate(index)
    assert outcome.code == 1, outcome.err
    assert f"index {index} is not restored yet; the next run restores it" in outcome.err
    assert not exists(admin, f"{index}") or list(admin("GET", f"/{index}*/_settings")) == [f"{index}-recreate"]
    proxy.rules.remove(crash)
    return wanted


def commands(index, make_index, put_csv, properties):
    source = make_index("source", properties, docs=2, settings=SETTINGS, **MAPPING)
    prefix = put_csv({"a.csv": "n\n7\n8\n"})
    return {
        "cleanup": (index_cleanup, "--index", index), "copy": (reindex, "--source", source, "--target", index),
        "load": (bulkupdate, "--bucket", sandbox.BUCKET, "--prefix", prefix, "--index", index),
    }  # fmt: skip


@pytest.mark.parametrize(("script", "documents"), [("cleanup", 0), ("copy", 2), ("load", 2)])
@pytest.mark.parametrize("method", ["delete", "recreate"])
def test_the_next_run_on_whatever_machine_restores_the_index(
    script, documents, method, deleted, index, make_index, put_csv, run, admin, monkeypatch, tmp_path
):
    monkeypatch.setattr(base, "HOST", "another")
    monkeypatch.setenv("LOCK_DIR", str(tmp_path / "locks of another"))
    monkeypatch.setenv("CLEANUP_METHOD", method)
    outcome = run(*commands(index, make_index, put_csv, PROPERTIES)[script])
    assert outcome.code == 0, outcome.err
    assert f"index {index} is missing: a run crashed after deleting it and before recreating it" in outcome.err
    assert definition(admin, index) == deleted
    assert count(admin, index) == documents
    assert not exists(admin, f"{index}-recreate")


@pytest.mark.quick
@pytest.mark.parametrize("script", ["cleanup", "copy", "load"])
def test_a_dry_run_meets_a_missing_index_and_changes_nothing(script, deleted, index, make_index, put_csv, run, proxy):
    command = commands(index, make_index, put_csv, PROPERTIES)[script]
    proxy.requests.clear()
    outcome = run(*command, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert f"index {index} is missing" in outcome.err
    assert {method for method, path, _ in proxy.requests if not path.endswith("_refresh")} == {"GET"}


def test_an_index_that_a_stray_write_created_is_refused_while_the_backup_has_another_definition(
    deleted, index, recreate, admin
):
    admin("POST", f"/{index}/_doc?refresh=true", {"n": 1, "text": "a stray write creates the index"})
    for more in ([], ["--dry-run"]):
        outcome = recreate(index, *more)
        assert outcome.code == 4, outcome.err
        assert f"index {index} differs from its backup {index}-recreate in text" in outcome.last
    assert exists(admin, f"{index}-recreate")
    admin("DELETE", f"/{index}")
    assert recreate(index).code == 0
    assert definition(admin, index) == deleted


def test_an_index_that_is_blocked_fails_and_its_backup_goes(index, recreate, admin):
    admin("PUT", f"/{index}/_settings", {"index.blocks.read_only": True})
    outcome = recreate(index)
    assert outcome.code == 1
    assert "remove the block" in outcome.last
    assert not exists(admin, f"{index}-recreate")
    admin("PUT", f"/{index}/_settings", {"index.blocks.read_only": None})
    assert count(admin, index) == 3


@pytest.mark.parametrize("method", ["delete", "recreate"])
def test_the_backup_of_a_run_that_crashed_before_the_deletion_is_no_obstacle(method, index, recreate, admin, proxy):
    wanted = definition(admin, index)
    proxy.on("DELETE", f"^/{index}$", Exchange.drop)
    assert recreate(index).code == 1
    outcome = recreate(index, "--method", method, "--no-force-merge")
    assert outcome.code == 0, outcome.err
    assert definition(admin, index) == wanted
    assert not exists(admin, f"{index}-recreate")


@pytest.mark.parametrize(("method", "path"), [("PUT", "-recreate"), ("DELETE", "")])
def test_an_index_that_another_client_deletes_meanwhile_is_a_failure_and_restored(
    method, path, index, recreate, admin, proxy
):
    """Such as the late deletion of a former run."""
    wanted = definition(admin, index)
    proxy.on(method, f"^/{index}{path}$", before(lambda: admin("DELETE", f"/{index}")))
    outcome = recreate(index)
    assert outcome.code == 1, outcome.err
    assert recreate(index).code == 0
    assert definition(admin, index) == wanted
    assert not exists(admin, f"{index}-recreate")


def test_a_deletion_that_the_cluster_has_no_time_for_is_not_sent_again(index, recreate, admin, proxy):
    former = uuid_of(admin, index)
    proxy.on("DELETE", f"^/{index}$", answer(429, {"error": {"type": "busy", "reason": "too many requests"}}))
    assert_deleted_instead(recreate(index, "--no-force-merge"), admin, index, former, "too many requests")
    assert len(proxy.seen("DELETE", f"^/{index}$")) == 1


def test_a_stop_before_the_deletion_leaves_no_backup(index, recreate, admin, proxy):
    wanted = definition(admin, index)
    stop = after(lambda: os.kill(os.getpid(), signal.SIGTERM))
    proxy.on("PUT", f"^/{index}-recreate$", stop)
    outcome = recreate(index)
    assert outcome.code == 143, outcome.err
    assert not exists(admin, f"{index}-recreate")
    assert (definition(admin, index)["settings"], count(admin, index)) == (wanted["settings"], 3)


def test_the_marker_of_an_unfinished_load_comes_along(index, admin, run, put_csv, proxy, monkeypatch):
    """A load that crashes between deletion and creation leaves the marker in the restored index."""
    monkeypatch.setenv("CLEANUP_METHOD", "recreate")
    prefix = put_csv({"a.csv": "n\n7\n"})
    crash = crash_at(proxy, "PUT", f"^/{index}$", skip=1)
    load = ["--bucket", sandbox.BUCKET, "--prefix", prefix, "--index", index]
    wanted = definition(admin, index)
    assert run(bulkupdate, *load).code == 1
    assert marker_of(admin, f"{index}-recreate")
    assert definition(admin, f"{index}-recreate")["settings"]["refresh_interval"] == "-1"
    proxy.rules.remove(crash)
    assert run(bulkupdate, *load).code == 0
    assert definition(admin, index) == wanted
    assert sources(admin, index) == [{"n": 7}]


# --- what the backup index holds, and who may read it -----------------------------------------------------------------


@pytest.fixture
def crashed_after_creation(index, recreate, proxy, admin):
    """The definition of an index that a run created again before it crashed, with its backup left behind."""
    wanted = definition(admin, index)
    crash = crash_at(proxy, "DELETE", f"^/{index}-recreate$")
    assert recreate(index).code == 0  # all but the backup is done, and it is said
    assert exists(admin, f"{index}-recreate")
    proxy.rules.remove(crash)
    return wanted


@pytest.mark.parametrize("method", ["delete", "recreate"])
def test_the_backup_of_a_run_that_crashed_after_the_creation_is_deleted(
    method, crashed_after_creation, index, recreate, admin
):
    assert recreate(index, "--method", method, "--no-force-merge").code == 0
    assert definition(admin, index) == crashed_after_creation
    assert not exists(admin, f"{index}-recreate")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"number_of_shards": 1}, "index.number_of_shards"), ({"refresh_interval": "9s"}, "index.refresh_interval"),
        ({"analysis": {"analyzer": {"own": {"type": "custom", "tokenizer": "standard"}}}},
         "index.analysis.analyzer.own.filter"),
    ],
    ids=["shards", "interval", "analysis"],
)  # fmt: skip
def test_an_index_with_the_same_fields_and_other_settings_is_refused_and_the_backup_stays(
    other, named, crashed_after_creation, index, recreate, admin
):
    admin("DELETE", f"/{index}")
    mappings = {"properties": PROPERTIES, **MAPPING}
    admin("PUT", f"/{index}", {"settings": {**SETTINGS, **other}, "mappings": mappings})
    outcome = recreate(index)
    assert outcome.code == 4, outcome.err
    assert f"index {index} differs from its backup {index}-recreate in" in outcome.last
    assert named in outcome.last
    assert exists(admin, f"{index}-recreate")


@pytest.mark.parametrize("change", [{"dynamic": "false"}, {"_meta": {"owner": "another"}}], ids=["dynamic", "_meta"])
def test_an_index_with_other_parameters_of_its_mapping_is_refused(
    change, crashed_after_creation, index, recreate, admin
):
    admin("PUT", f"/{index}/_mapping", change)
    outcome = recreate(index)
    assert outcome.code == 4, outcome.err
    assert next(iter(change)) in outcome.last


def test_an_index_that_was_never_deleted_may_have_changed_since(index, recreate, admin, proxy):
    """The backup names the UUID of the index that it stands for: this is the very same one."""
    proxy.on("DELETE", f"^/{index}$", Exchange.drop)
    assert recreate(index).code == 1
    admin("PUT", f"/{index}/_settings", {"index.refresh_interval": "9s"})
    assert recreate(index).code == 0
    assert definition(admin, index)["settings"]["refresh_interval"] == "9s"
    assert not exists(admin, f"{index}-recreate")


def test_blocks_are_restored_with_the_index(index, recreate, admin, proxy):
    admin("PUT", f"/{index}/_settings", {"index.blocks.write": True})
    wanted = definition(admin, index)
    crash = crash_at(proxy, "PUT", f"^/{index}$", skip=1)
    assert recreate(index).code == 1
    proxy.rules.remove(crash)
    assert recreate(index).code == 0
    assert definition(admin, index) == wanted
    assert wanted["settings"]["blocks"] == {"write": "true"}


@secured
def test_a_permission_that_is_lost_in_the_middle_is_named_and_what_stands_where(
    index, may_recreate, recreate, admin, proxy
):
    wanted = definition(admin, index)
    without_create = set(sandbox.RECREATE_PERMISSIONS) - {"indices:admin/create"}
    proxy.on("DELETE", f"^/{index}$", after(lambda: may_recreate(*without_create)))
    outcome = recreate(index)
    assert outcome.code == 1, outcome.err
    assert "lacks indices:admin/create" in outcome.last
    assert f"index {index} may be deleted, and {index}-recreate holds its definition" in outcome.last
    assert "create it first" not in outcome.err
    may_recreate(*sandbox.RECREATE_PERMISSIONS)
    assert recreate(index).code == 0
    assert definition(admin, index) == wanted


@secured
@pytest.mark.parametrize("method", ["delete", "recreate"])
def test_a_backup_that_may_not_be_read_is_not_treated_as_missing(method, deleted, index, may_recreate, recreate, admin):
    may_recreate("indices:monitor/stats")
    outcome = recreate(index, "--method", method)
    assert outcome.code == 1, outcome.err
    assert f"index {index} does not exist; create it first" in outcome.last
    assert f"{index}-recreate holds its definition, but it cannot be read" in outcome.last
    assert "lacks indices:admin/get" in outcome.last
    may_recreate(*sandbox.RECREATE_PERMISSIONS)
    assert recreate(index).code == 0
    assert definition(admin, index) == deleted


@secured
@pytest.mark.parametrize(("method", "told"), [("delete", False), ("recreate", True)])
def test_a_role_that_may_not_read_backups_empties_all_the_same(method, told, index, may_recreate, recreate, admin):
    may_recreate("indices:monitor/stats")
    outcome = recreate(index, "--method", method, "--no-force-merge")
    assert outcome.code == 0, outcome.err
    assert (f"index {index} cannot be recreated" in outcome.err) is told
    assert count(admin, index) == 0


def test_a_load_whose_backup_could_not_be_deleted_is_no_reason_to_refuse_the_next(
    index, admin, run, put_csv, proxy, monkeypatch
):
    """The backup holds the settings of the load; those of the index are restored by then."""
    monkeypatch.setenv("CLEANUP_METHOD", "recreate")
    wanted = definition(admin, index)
    load = ["--bucket", sandbox.BUCKET, "--prefix", put_csv({"a.csv": "n,text\n7,x\n"}), "--index", index]
    crash = crash_at(proxy, "DELETE", f"^/{index}-recreate$")
    assert run(bulkupdate, *load).code == 0
    assert exists(admin, f"{index}-recreate")
    proxy.rules.remove(crash)
    outcome = run(bulkupdate, *load)
    assert outcome.code == 0, outcome.err
    assert definition(admin, index) == wanted
    assert not exists(admin, f"{index}-recreate")


def test_a_deletion_that_is_carried_out_while_the_next_run_looks_costs_nothing(index, recreate, admin, proxy):
    wanted = definition(admin, index)
    proxy.on("DELETE", f"^/{index}$", Exchange.drop)
    assert recreate(index).code == 1
    proxy.on("GET", "wait_for_events", before(lambda: admin("DELETE", f"/{index}")))
    outcome = recreate(index)
    assert outcome.code == 0, outcome.err
    assert f"index {index} is missing" in outcome.err
    assert definition(admin, index) == wanted


def test_an_index_made_live_after_a_part_was_deleted_stays_marked(index, recreate, admin, proxy, name):
    add = {"actions": [{"add": {"index": index, "alias": name("alias")}}]}
    stray = after(lambda: (admin("POST", f"/{index}/_doc?refresh=true", {"n": 9}), admin("POST", "/_aliases", add)))
    proxy.on("POST", "_delete_by_query", stray)
    outcome = recreate(index, "--method", "delete", "--no-force-merge")
    assert outcome.code == 4, outcome.err
    assert marker_of(admin, index)


def test_the_marker_of_another_run_is_not_removed(index, recreate, admin, proxy):
    theirs = {"_meta": {base.SUITE: {"started": "2026-01-01T00:00:00Z", "host": "another", "found": {}, "set": {}}}}
    proxy.on("POST", "_delete_by_query", after(lambda: admin("PUT", f"/{index}/_mapping", theirs)))
    outcome = recreate(index, "--method", "delete", "--no-force-merge")
    assert outcome.code == 1, outcome.err
    assert "another run has started to fill it" in outcome.last
    assert meta_of(admin, index) == theirs["_meta"]


def test_an_index_without_a_single_active_shard_has_no_size(recreate, may_recreate, name, admin):
    """Its definition allows no node, so the backup is red as well: it can neither be recreated nor emptied."""
    index = name("red")
    settings = {"index.routing.allocation.require._name": "nowhere"}
    admin("PUT", f"/{index}?wait_for_active_shards=0", {"settings": settings})
    outcome = recreate(index)
    assert "the shards of a new index are not allocated" in outcome.err
    assert outcome.code == 1
    assert "unexpected" not in outcome.last
