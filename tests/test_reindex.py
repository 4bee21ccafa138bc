"""reindex.py: what arrives in the target, and what is left behind when a copy goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import opensearch_base_manager as base
import pytest
import reindex
from conftest import NUMBER, OWN, count, fill, marker_of, running_copies, sources, state_of, wait_until
from fault_proxy import TASK, after, answer, edited, lost_answer, refused

pytestmark = pytest.mark.usefixtures("short_pauses")

START = "/_reindex"


@pytest.fixture(scope="module")
def lasting_source(box):
    """An index with three documents that no test changes."""
    index = f"{OWN}-reindex-source"
    box.server.request("PUT", f"/{index}", {"mappings": {"properties": NUMBER}})
    fill(box.server.request, index, [{"n": n} for n in range(3)])
    yield index
    box.server.request("DELETE", f"/{index}")


@pytest.fixture
def pair(lasting_source, make_index):
    """That source, and a target with a document of its own."""
    return lasting_source, make_index("target", NUMBER, docs=[{"n": 99}])


@pytest.fixture
def own_pair(make_index):
    """For tests that change the source."""
    return make_index("source", NUMBER, docs=3), make_index("target", NUMBER)


@pytest.fixture
def own_settings(admin):
    """What is set on an index, less what the server itself writes there."""

    def read(index):
        found = admin("GET", f"/{index}/_settings?flat_settings=true")[index]["settings"]
        return {name: found.get(f"index.{name}") for name in ("refresh_interval", "number_of_replicas")}

    return read


def numbers_in(admin, index):
    admin("POST", f"/{index}/_refresh")
    return sorted(doc["n"] for doc in sources(admin, index))


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_target_holds_the_documents_of_the_source_and_nothing_else(pair, copy, admin, own_settings):
    source, target = pair
    outcome = copy(source, target)
    assert outcome.code == 0, outcome.err
    assert numbers_in(admin, target) == numbers_in(admin, source) == [0, 1, 2]
    assert marker_of(admin, target) is None
    assert own_settings(target) == {"refresh_interval": None, "number_of_replicas": "1"}
    result = outcome.result
    assert {name: result[name] for name in ("source", "target", "total", "documents", "batches", "retries")} == {
        "source": source, "target": target, "total": 3, "documents": 3, "batches": 1, "retries": 0,
    }  # fmt: skip
    assert {"seconds", "documents_per_second"} < set(result)
    assert " done: " in outcome.last


def test_ids_and_routing_are_kept(own_pair, copy, admin):
    source, target = own_pair
    admin("PUT", f"/{source}/_doc/my-id?routing=here", {"n": 7})
    assert copy(source, target).code == 0
    found = admin("GET", f"/{target}/_doc/my-id?routing=here")
    assert (found["_routing"], found["_source"]) == ("here", {"n": 7})


def test_an_empty_source_leaves_an_empty_target(make_index, copy, admin):
    source, target = make_index("source", NUMBER), make_index("target", NUMBER, docs=2)
    outcome = copy(source, target)
    assert (outcome.code, outcome.result["documents"]) == (0, 0)
    assert count(admin, target) == 0


def test_all_shards_are_copied_in_parallel(make_index, copy, admin, proxy):
    shards = {"number_of_shards": 3}
    source, target = make_index("source", NUMBER, docs=30, settings=shards), make_index("target", NUMBER)
    assert copy(source, target).code == 0
    assert numbers_in(admin, target) == list(range(30))
    assert any("slices=auto" in path and "wait_for_completion=false" in path for _, path, _ in proxy.requests)
    assert json.loads(proxy.seen("POST", START)[0])["source"]["size"] == 5000


def test_documents_that_no_search_sees_yet_are_copied(make_index, copy, admin):
    source = make_index("source", NUMBER, settings={"refresh_interval": "-1"})
    target = make_index("target", NUMBER)
    admin("POST", f"/{source}/_doc", {"n": 1})
    assert copy(source, target).code == 0
    assert numbers_in(admin, target) == [1]


@pytest.mark.parametrize("dynamic", ["true", "strict", "false"])
def test_new_fields_are_defined_in_the_target_as_they_are_in_the_source(dynamic, make_index, copy, admin):
    fields = {
        **NUMBER, "day": {"type": "date", "format": "yyyy/MM/dd"}, "code": {"type": "keyword"},
        "place": {"properties": {"at": {"type": "geo_point"}, "name": {"type": "text"}}},
    }  # fmt: skip
    doc = {"n": 1, "day": "2013/01/31", "code": "2013-01-31", "place": {"at": "1,2", "name": "here"}}
    source = make_index("source", fields, docs=[doc])
    some = {**NUMBER, "place": {"properties": {"name": {"type": "text"}}}}
    target = make_index("target", some, dynamic=dynamic)
    assert copy(source, target).code == 0
    mapping = admin("GET", f"/{target}/_mapping")[target]["mappings"]
    assert mapping["properties"] == fields
    assert mapping["dynamic"] == dynamic
    assert sources(admin, target) == [doc]


def test_a_field_that_only_the_target_knows_stays(make_index, copy, admin):
    source = make_index("source", NUMBER, docs=1)
    target = make_index("target", {**NUMBER, "own": {"type": "ip"}})
    assert copy(source, target).code == 0
    assert admin("GET", f"/{target}/_mapping")[target]["mappings"]["properties"] == {**NUMBER, "own": {"type": "ip"}}


@pytest.mark.quick
def test_a_dry_run_changes_nothing(pair, copy, admin, make_index):
    before = state_of(admin, *pair)
    outcome = copy(*pair, "--dry-run")
    assert (outcome.code, outcome.result["dry_run"]) == (0, True)
    assert copy(pair[0], make_index("other", {"n": {"type": "ip"}}), "--dry-run").code == 4
    assert state_of(admin, *pair) == before


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_the_copy_can_be_throttled(by, pair, copy, monkeypatch, proxy):
    if by == "variable":
        monkeypatch.setenv("REQUESTS_PER_SECOND", "25")
    assert copy(*pair, *(["--requests-per-second", "25"] if by == "flag" else [])).code == 0
    assert "requests_per_second=25" in next(path for verb, path, _ in proxy.requests if START in path)


# --- settings during the copy, and the marker -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "replicas"), [("7s", "--no-replicas"), ("-1", ""), (None, ""), (None, "--no-replicas")]
)
def test_settings_are_changed_for_the_copy_and_restored_as_they_were_found(
    interval, replicas, lasting_source, make_index, copy, admin, proxy, own_settings
):
    source = lasting_source
    found = {"refresh_interval": interval, "number_of_replicas": "2"}
    target = make_index("target", NUMBER, settings={key: value for key, value in found.items() if value})
    seen = []
    proxy.on("POST", START, after(lambda: seen.append((own_settings(target), marker_of(admin, target)))))
    assert copy(source, target, *filter(None, [replicas])).code == 0
    during, marker = seen[0]
    assert during == {"refresh_interval": "-1", "number_of_replicas": "0" if replicas else "2"}
    assert set(marker) == {"started", "host", "found", "set"}
    assert marker["host"] == base.HOST
    assert own_settings(target) == found
    assert marker_of(admin, target) is None


def test_a_setting_that_another_client_changes_meanwhile_stays_changed(pair, copy, admin, proxy, own_settings):
    change = after(lambda: admin("PUT", f"/{pair[1]}/_settings", {"index": {"refresh_interval": "30s"}}))
    proxy.on("POST", START, change)
    assert copy(*pair).code == 0
    assert own_settings(pair[1])["refresh_interval"] == "30s"


def test_a_setting_that_the_cluster_refuses_is_gone_without(pair, copy, admin, proxy, own_settings):
    proxy.on("PUT", "_settings", answer(400, {"error": {"type": "illegal_argument", "reason": "too low"}}))
    outcome = copy(*pair)
    assert outcome.code == 0, outcome.err
    assert "continuing without index.refresh_interval=-1" in outcome.err
    assert "too low" in outcome.err
    assert own_settings(pair[1])["refresh_interval"] is None
    assert numbers_in(admin, pair[1]) == [0, 1, 2]


def test_where_no_marker_can_be_written_the_settings_stay_untouched(pair, copy, admin, proxy):
    denied = {"error": {"type": "security_exception", "reason": "no permissions for [indices:admin/mapping/put]"}}
    proxy.on("PUT", "_mapping", answer(403, denied), times=None)
    outcome = copy(*pair)
    assert outcome.code == 0, outcome.err
    assert "the marker cannot be written" in outcome.err
    assert "lacks indices:admin/mapping/put" in outcome.err
    assert proxy.seen("PUT", "_settings") == []
    assert numbers_in(admin, pair[1]) == [0, 1, 2]


def unfinished(admin, index, **changed):
    """Leave an index as a copy that was killed leaves it."""
    marker = {"started": "2026-01-31T02:00:00Z", "host": "elsewhere", "found": {"index.refresh_interval": "9s"},
            "set": {"index.refresh_interval": "-1"}}  # fmt: skip
    admin("PUT", f"/{index}/_mapping", {"_meta": {base.SUITE: marker}})
    admin("PUT", f"/{index}/_settings", {"refresh_interval": "-1", **changed})


def test_the_next_run_restores_the_settings_of_a_killed_one(pair, copy, admin, own_settings):
    unfinished(admin, pair[1])
    outcome = copy(*pair)
    assert outcome.code == 0, outcome.err
    said = f"{pair[1]} is unfinished: a run on elsewhere, started at 2026-01-31T02:00:00Z, has not succeeded"
    assert said in outcome.err
    assert own_settings(pair[1])["refresh_interval"] == "9s"
    assert marker_of(admin, pair[1]) is None


def test_the_next_run_leaves_a_setting_that_another_client_has_changed_since(pair, copy, admin, own_settings):
    unfinished(admin, pair[1], refresh_interval="33s")
    assert copy(*pair).code == 0
    assert own_settings(pair[1])["refresh_interval"] == "33s"


def test_an_index_stays_marked_as_unfinished_when_the_next_run_is_refused(make_index, copy, admin):
    source, target = make_index("source", NUMBER, docs=1), make_index("target", {"n": {"type": "ip"}})
    unfinished(admin, target)
    assert copy(source, target).code == 4
    assert marker_of(admin, target)


def test_a_dry_run_restores_nothing(pair, copy, admin):
    unfinished(admin, pair[1])
    before = state_of(admin, *pair)
    assert copy(*pair, "--dry-run").code == 0
    assert state_of(admin, *pair) == before


# --- a copy that fails ------------------------------------------------------------------------------------------------


def ended(response):
    """Edit the response of a copy that is over, or put an error in its place."""

    def change(document):
        if document["completed"] and "reindex" in document["task"]["action"]:
            if "error" in response:
                del document["response"]
                document.update(response)
            else:
                document["response"].update(response)

    return edited(change)


@pytest.mark.parametrize(
    ("response", "says"),
    [
        ({"failures": [{"cause": {"type": "mapper_parsing", "reason": "not a date"}, "status": 400}]},
         r"1 failure\(s\), the first: mapper_parsing: not a date"),
        ({"failures": [{"reason": {"type": "context_missing", "reason": "gone"}}]}, "context_missing: gone"),
        ({"canceled": "by user request"}, r"canceled \(by user request\)"),
        ({"timed_out": True}, "timed out"),
        ({"version_conflicts": 1}, "1 version conflicts"),
        ({"created": 2}, "2 of 3 documents written"),
        ({"error": {"type": "index_not_found", "reason": "no such index"}}, "index_not_found: no such index"),
    ],
)  # fmt: skip
def test_a_task_that_did_not_do_all_of_its_work_is_a_failure(response, says, pair, copy, proxy, own_settings, admin):
    proxy.on("GET", TASK, ended(response), times=None)
    outcome = copy(*pair)
    assert outcome.code == 1, outcome.err
    assert re.search(says, outcome.last), outcome.last
    assert f"copying {pair[0]} to {pair[1]}" in outcome.last
    assert marker_of(admin, pair[1])
    assert own_settings(pair[1])["refresh_interval"] is None
    assert outcome.out == ""


def test_a_vanished_task_is_a_failure(pair, copy, admin, proxy):
    missing = {"error": {"type": "resource_not_found_exception", "reason": "node is gone"}, "status": 404}
    proxy.on("GET", TASK, answer(404, missing), skip=1)  # the first is of the task that empties the target
    outcome = copy(*pair)
    assert outcome.code == 1, outcome.err
    assert "disappeared (node restart?); its outcome is unknown, run the step again" in outcome.last
    assert marker_of(admin, pair[1])


def test_a_task_that_another_client_cancels_is_a_failure(pair, copy, admin, proxy, own_settings):
    def throttled(task):
        return admin("GET", f"/_tasks/{task}")["task"]["status"]["throttled_until_millis"]

    def cancel():  # not while it starts a search or a bulk request, which would end with an exception of its own
        for task in running_copies(admin, pair[1]):
            wait_until(lambda task=task: throttled(task))
            admin("POST", f"/_tasks/{task}/_cancel")

    proxy.on("GET", TASK, after(cancel), skip=1, times=None)
    outcome = copy(*pair, "--requests-per-second", "0.2")
    assert outcome.code == 1, outcome.err
    assert "canceled (by user request); run it again" in outcome.last
    assert own_settings(pair[1])["refresh_interval"] is None
    assert marker_of(admin, pair[1])


@pytest.mark.parametrize("fault", [refused, lost_answer, answer(502), answer(503)], ids=["reset", "lost", "502", "503"])
def test_a_failed_poll_is_tried_again(fault, pair, copy, proxy):
    proxy.on("GET", TASK, fault, skip=1, times=2)
    outcome = copy(*pair)
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("trying again") == 2
    assert len(proxy.seen("POST", START)) == 1


def test_a_copy_whose_start_got_no_answer_is_found_and_not_started_twice(pair, copy, admin, proxy):
    proxy.on("POST", START, lost_answer)
    outcome = copy(*pair, "--requests-per-second", "1")
    assert outcome.code == 0, outcome.err
    assert "checking whether the task was started" in outcome.err
    assert len(proxy.seen("POST", START)) == 1
    assert numbers_in(admin, pair[1]) == [0, 1, 2]


@pytest.mark.parametrize("fault", [refused, answer(503)], ids=["refused", "503"])
def test_a_copy_that_was_not_started_is_started_again(fault, pair, copy, admin, proxy):
    proxy.on("POST", START, fault)
    outcome = copy(*pair)
    assert outcome.code == 0, outcome.err
    assert len(proxy.seen("POST", START)) == 2
    assert numbers_in(admin, pair[1]) == [0, 1, 2]


def test_a_source_that_changes_during_the_copy_is_a_failure_that_says_so(own_pair, copy, admin, proxy):
    proxy.on("POST", START, after(lambda: wait_until(lambda: count(admin, own_pair[1]) == 3) and
                                  fill(admin, own_pair[0], [{"n": 5}])))  # fmt: skip
    admin("PUT", f"/{own_pair[0]}/_settings", {"refresh_interval": "-1"})
    outcome = copy(*own_pair)
    assert outcome.code == 1, outcome.err
    assert f"{own_pair[0]} changed during the copy: it holds 4 documents, but 3 were copied" in outcome.last
    assert marker_of(admin, own_pair[1])


def test_a_target_that_another_client_writes_to_is_a_failure(pair, copy, admin, proxy):
    proxy.on("POST", START, after(lambda: fill(admin, pair[1], [{"n": 5}])))
    outcome = copy(*pair)
    assert outcome.code == 1, outcome.err
    assert f"{pair[1]} holds 4 documents, but 3 were copied: another client is writing to this" in outcome.last
    assert marker_of(admin, pair[1])


def test_a_target_that_another_client_replaces_meanwhile_is_a_failure(pair, copy, admin, proxy):
    def replace():
        time.sleep(0.5)  # let the copy end
        admin("DELETE", f"/{pair[1]}")
        admin("PUT", f"/{pair[1]}", {"mappings": {"properties": NUMBER}})
        fill(admin, pair[1], [{"n": n} for n in range(3)])

    proxy.on("POST", START, after(replace))
    outcome = copy(*pair)
    assert outcome.code == 1, outcome.err
    assert f"another client deleted and recreated index {pair[1]}" in outcome.last


def test_settings_that_cannot_be_restored_now_are_left_to_the_next_run(pair, copy, admin, proxy, monkeypatch):
    monkeypatch.setenv("RETRY_SECONDS", "0")
    proxy.on("PUT", "_settings", answer(503), skip=1, times=None)
    outcome = copy(*pair)
    assert outcome.code == 1, outcome.err
    assert "not restored yet; the next run restores them" in outcome.err
    assert marker_of(admin, pair[1])["set"] == {"index.refresh_interval": "-1"}
    proxy.rules.clear()
    assert copy(*pair).code == 0
    assert marker_of(admin, pair[1]) is None


# --- signals, and crashed runs ----------------------------------------------------------------------------------------


@pytest.fixture
def start(environment, pair, admin):
    """Start a copy of six seconds in a process of its own, and return it when the server is at work."""
    started = []

    def do():
        command = [sys.executable, reindex.__file__, "--source", pair[0], "--target", pair[1]]
        process = subprocess.Popen(
            [*command, "--requests-per-second", "0.5"], env={**os.environ, **environment}, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        wait_until(lambda: running_copies(admin, pair[1]))
        return process

    yield do
    for process in started:
        process.kill()
        process.communicate()
    for task in running_copies(admin, pair[1]):
        admin("POST", f"/_tasks/{task}/_cancel?wait_for_completion=true")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_cancels_the_copy_and_restores_settings(number, start, pair, copy, admin, own_settings):
    process = start()
    assert own_settings(pair[1])["refresh_interval"] == "-1"
    process.send_signal(number)
    out, err = process.communicate(timeout=25)
    assert process.returncode == 128 + number, err
    assert f"stopped by {number.name}" in err.splitlines()[-1]
    assert out == ""
    assert running_copies(admin, pair[1]) == []
    assert own_settings(pair[1])["refresh_interval"] is None
    assert marker_of(admin, pair[1])
    if number == signal.SIGTERM:
        assert copy(*pair).code == 0
        assert numbers_in(admin, pair[1]) == [0, 1, 2]
        assert marker_of(admin, pair[1]) is None


def test_after_a_kill_the_next_run_cancels_the_orphan_and_copies_again(start, pair, copy, admin, own_settings):
    process = start()
    process.kill()
    process.communicate()
    orphans = running_copies(admin, pair[1])
    assert len(orphans) == 1
    assert marker_of(admin, pair[1])
    outcome = copy(*pair)
    assert outcome.code == 0, outcome.err
    assert f"canceling task {orphans[0]} on index {pair[1]}, left by a crashed run" in outcome.err
    assert running_copies(admin, pair[1]) == []
    assert numbers_in(admin, pair[1]) == [0, 1, 2]
    assert marker_of(admin, pair[1]) is None
    assert own_settings(pair[1])["refresh_interval"] is None


def test_a_second_run_finds_the_lock_held_and_leaves_the_first_alone(start, pair, copy, admin):
    process = start()
    for source, target in (pair, pair[::-1]):
        outcome = copy(source, target)
        assert outcome.code == 75, outcome.err
        assert "is locked by another run on this host" in outcome.last
    assert len(running_copies(admin, pair[1])) == 1
    assert process.poll() is None


@pytest.mark.parametrize("opaque_id", ["", "another", f"{base.SUITE}-2/{base.HOST}/x"])
def test_a_copy_of_another_client_refuses_ours(opaque_id, foreign_copy, pair, copy, admin):
    task = foreign_copy(pair[1], opaque_id)
    outcome = copy(*pair)
    assert outcome.code == 4, outcome.err
    assert f"task {task}, which this suite did not start, is using index {pair[1]}; wait for it or" in outcome.last
    assert running_copies(admin, pair[1]) == [task]
    assert marker_of(admin, pair[1]) is None


def test_a_copy_of_ours_from_another_host_is_awaited_and_then_refuses(foreign_copy, pair, copy, admin, monkeypatch):
    monkeypatch.setenv("WAIT_SECONDS", "1")
    task = foreign_copy(pair[1], f"{base.SUITE}/otherhost/x")
    began = time.monotonic()
    outcome = copy(*pair)
    assert outcome.code == 4, outcome.err
    assert time.monotonic() - began > 1
    assert outcome.err.count(f"waiting for task {task} of another run, which is using index {pair[1]}") == 1
    assert f"task {task} of another run is still using index {pair[1]}" in outcome.last
    assert running_copies(admin, pair[1]) == [task]


def test_a_copy_of_ours_from_another_host_that_ends_in_time_is_followed_by_ours(foreign_copy, pair, copy, admin):
    foreign_copy(pair[1], f"{base.SUITE}/otherhost/x", rate=2)
    assert copy(*pair).code == 0
    assert numbers_in(admin, pair[1]) == [0, 1, 2]


def test_a_copy_into_an_index_with_a_longer_name_is_no_obstacle(pair, make_index, foreign_copy, copy):
    longer = make_index("target-2", NUMBER)
    foreign_copy(longer)
    assert copy(*pair).code == 0


def test_a_copy_that_runs_long_shows_how_far_it_is(pair, copy, monkeypatch):
    monkeypatch.setattr(base, "PROGRESS_EVERY_S", 0.2)
    outcome = copy(*pair, "--requests-per-second", "2")
    assert outcome.code == 0, outcome.err
    assert re.search(rf"copying {pair[0]} to {pair[1]}: 100 %, 0:00:00 left, 3 of 3 documents, \d+/s", outcome.err)


def test_an_orphan_of_another_host_name_is_ours_where_run_host_is_the_same(foreign_copy, pair, copy, monkeypatch):
    monkeypatch.setenv("RUN_HOST", "nightly.refresh-1")
    task = foreign_copy(pair[1], f"{base.SUITE}/nightly.refresh-1/x")
    outcome = copy(*pair)
    assert outcome.code == 0, outcome.err
    assert f"canceling task {task} on index {pair[1]}, left by a crashed run" in outcome.err


def test_run_host_is_in_the_marker_and_has_to_be_a_name(pair, copy, proxy, monkeypatch, admin):
    monkeypatch.setenv("RUN_HOST", "nightly")
    seen = []
    proxy.on("POST", START, after(lambda: seen.append(marker_of(admin, pair[1])["host"])))
    assert copy(*pair).code == 0
    assert seen == ["nightly"]
    for wrong in ("a/b", "a b", "a\nb", "x" * 101):
        monkeypatch.setenv("RUN_HOST", wrong)
        outcome = copy(*pair)
        assert (outcome.code, "RUN_HOST" in outcome.last) == (2, True)


def test_an_object_without_properties_is_the_same_object_once_documents_have_filled_it(make_index, copy, admin):
    """The server then omits its `type`, and the next copy compares it with the standby's."""
    properties = {"o": {"type": "object"}, **NUMBER}
    old, new = make_index("old", properties, docs=[{"o": {"x": 1}}]), make_index("new", properties)
    assert copy(old, new).code == 0
    assert sources(admin, new) == [{"o": {"x": 1}}]


@pytest.mark.parametrize(
    ("index", "description", "code"),
    [
        ("s[b]", "reindex from [OWN-a] to [OWN-s[b]]", 4), ("b", "reindex from [OWN-b] to [OWN-c][_doc]", 4),
        ("a", "delete-by-query [x, OWN-a]", 4), ("ab", "delete-by-query [OWN-abc]", 0),
        ("b", "copy from OWN-b to [OWN-c]", 0),
    ],
)  # fmt: skip
def test_a_task_is_recognized_by_the_name_of_an_index_between_brackets(
    index, description, code, name, copy, make_index, proxy
):
    text = description.replace("OWN-", name(""))
    task = {"action": "indices:data/write/reindex", "description": text, "headers": {"X-Opaque-Id": "another"}}
    old, new = make_index("old", NUMBER, docs=1), make_index(index, NUMBER)
    proxy.on("GET", "/_tasks", answer(200, {"nodes": {"n": {"tasks": {"n:1": task}}}}), times=None)
    outcome = copy(old, new, "--dry-run")
    assert outcome.code == code, outcome.err


def test_settings_that_the_cluster_no_longer_accepts_are_named_with_the_way_out(own_pair, copy, proxy, admin):
    error = {"type": "illegal_argument_exception", "reason": "invalid index.refresh_interval [1s]"}
    admin("PUT", f"/{own_pair[1]}/_settings", {"index.refresh_interval": "1s"})
    proxy.on("PUT", "/_settings", answer(400, {"error": error}), skip=1, times=None)
    assert copy(*own_pair).code == 1
    outcome = copy(*own_pair)
    assert outcome.code == 1
    assert f'PUT /{own_pair[1]}/_settings {{"index.refresh_interval": "1s"}}' in outcome.last
    proxy.rules.clear()
    assert copy(*own_pair).code == 0
