"""index_cleanup.py: everything goes, mapping and settings stay, the disk space comes back."""

from __future__ import annotations

import json
import re

import index_cleanup
import pytest
from conftest import NUMBER, count, marker_of, state_of
from fault_proxy import TASK, after, answer, at_the_end, edited


@pytest.fixture
def cleanup(run):
    return lambda index, *more: run(index_cleanup, "--index", index, *more)


@pytest.fixture
def index(make_index):
    return make_index("index", NUMBER, docs=3)


@pytest.fixture
def no_wait(monkeypatch):
    """The server moves its leases every 30 s; only tests of the disk space wait for that."""
    monkeypatch.setattr(index_cleanup, "LEASES_WAIT_S", 0)
    monkeypatch.setattr(index_cleanup, "STATS_AGE_S", 0)


def definition(admin, index):
    found = admin("GET", f"/{index}")[index]
    mapping = {key: value for key, value in found["mappings"].items() if value}  # an empty _meta stays behind
    return mapping, found["settings"]


def test_all_documents_go_and_their_disk_space_comes_back(make_index, cleanup, admin, monkeypatch):
    settings = {"number_of_shards": 2, "refresh_interval": "7s", "index.store.stats_refresh_interval": "1s"}
    monkeypatch.setattr(index_cleanup, "STATS_AGE_S", 2)
    index = make_index("large", {**NUMBER, "text": {"type": "keyword"}}, settings=settings)
    lines = [json.dumps(line) for n in range(2000) for line in ({"index": {}}, {"n": n, "text": f"{n * 7919:x}" * 5})]
    headers = {"Content-Type": "application/x-ndjson"}
    admin("POST", f"/{index}/_bulk?refresh=true", None, data="\n".join([*lines, ""]).encode(), headers=headers)
    before = definition(admin, index)
    outcome = cleanup(index)
    assert outcome.code == 0, outcome.err
    assert count(admin, index) == 0
    assert definition(admin, index) == before
    assert "deleting 2,000 documents" in outcome.err
    result = outcome.result
    assert (result["index"], result["deleted"], result["documents"]) == (index, 2000, 0)
    assert result["bytes_before"] > 50_000
    assert result["bytes_after"] < result["bytes_before"] / 10
    assert admin("GET", f"/{index}/_stats/docs")["_all"]["primaries"]["docs"]["deleted"] == 0


@pytest.mark.quick
def test_without_the_merge_there_is_no_wait_for_the_disk_space(index, cleanup, proxy):
    outcome = cleanup(index, "--no-force-merge")
    assert (outcome.code, outcome.result["documents"]) == (0, 0)
    assert not [path for _, path, _ in proxy.requests if "_forcemerge" in path or "_flush" in path]


def test_the_merge_comes_after_the_flush_and_before_a_refresh(index, cleanup, proxy, no_wait):
    assert cleanup(index).code == 0
    verbs = [path.split("?")[0].rsplit("/", 1)[1] for _, path, _ in proxy.requests]
    order = [verbs.index(verb) for verb in ("_delete_by_query", "_flush", "_stats", "_forcemerge")]
    assert order == sorted(order)
    assert "_refresh" in verbs[order[-1] :]
    assert any("only_expunge_deletes=true" in path for _, path, _ in proxy.requests if "_forcemerge" in path)


def test_a_server_that_keeps_deleted_documents_is_a_log_line_and_no_failure(index, cleanup, no_wait):
    outcome = cleanup(index)
    assert outcome.code == 0, outcome.err
    assert "still retains deleted documents" in outcome.err


@pytest.mark.parametrize("status", [502, 504])
def test_a_merge_that_times_out_behind_a_proxy_is_no_failure(status, index, cleanup, admin, proxy, no_wait):
    proxy.on("POST", "_forcemerge", answer(status, "<html>Gateway Time-out</html>"))
    outcome = cleanup(index)
    assert outcome.code == 0, outcome.err
    assert "the merge may still be running; if so, it frees the disk space when it ends" in outcome.err
    assert len(proxy.seen("POST", "_forcemerge")) == 1
    assert count(admin, index) == 0


def test_a_merge_that_fails_on_a_shard_is_a_failure(index, cleanup, proxy, no_wait):
    proxy.on("POST", "_forcemerge", edited(lambda answer: answer["_shards"].update(failed=1)))
    outcome = cleanup(index)
    assert outcome.code == 1, outcome.err
    assert "_forcemerge of" in outcome.last


def test_an_empty_index_is_left_as_it_is(make_index, cleanup, proxy):
    outcome = cleanup(make_index("empty", NUMBER))
    assert (outcome.code, outcome.result["deleted"]) == (0, 0)
    assert proxy.seen("POST", "_delete_by_query") == []
    assert proxy.seen("POST", "_forcemerge") == []


def test_documents_that_no_search_sees_yet_go_too(make_index, cleanup, admin):
    index = make_index("hidden", NUMBER, settings={"refresh_interval": "-1"})
    admin("POST", f"/{index}/_doc", {"n": 1})
    outcome = cleanup(index, "--no-force-merge")
    assert (outcome.code, outcome.result["deleted"]) == (0, 1)
    assert count(admin, index) == 0


def test_an_alias_that_comes_between_the_check_and_the_first_change_is_seen(index, name, cleanup, admin, proxy):
    proxy.on("GET", rf"^/{index}\?", after(lambda: admin("PUT", f"/{index}/_alias/{name('alias')}")))
    before = state_of(admin, index)
    outcome = cleanup(index)
    assert outcome.code == 4, outcome.err
    assert f"alias {name('alias')} points at it" in outcome.last
    before[index]["aliases"] = {name("alias"): {}}
    assert state_of(admin, index) == before


def test_documents_that_come_during_the_first_round_go_in_the_second(index, cleanup, admin, proxy):
    proxy.on("GET", TASK, at_the_end(lambda: admin("POST", f"/{index}/_doc", {"n": 7})), times=None)
    outcome = cleanup(index, "--no-force-merge")
    assert outcome.code == 0, outcome.err
    assert len(proxy.seen("POST", "_delete_by_query")) == 2
    assert count(admin, index) == 0


def test_documents_that_keep_coming_are_not_chased_for_ever(index, cleanup, admin, proxy):
    proxy.on("GET", TASK, after(lambda: admin("POST", f"/{index}/_doc", {"n": 7})), times=None)
    outcome = cleanup(index)
    assert outcome.code == 1, outcome.err
    assert re.search(rf"index {index}: \d+ documents remain after 3 rounds: another client is writing", outcome.last)
    assert len(proxy.seen("POST", "_delete_by_query")) == 3
    assert marker_of(admin, index)


def test_documents_that_change_meanwhile_are_no_failure(make_index, cleanup, admin, proxy):
    index = make_index("index", NUMBER)
    admin("PUT", f"/{index}/_doc/1?refresh=true", {"n": 1})

    def conflict(document):
        document.get("response", {}).update(deleted=0, version_conflicts=1)

    proxy.on("GET", TASK, edited(conflict), times=None)
    assert cleanup(index, "--no-force-merge").code == 0
    assert "conflicts=proceed" in next(path for _, path, _ in proxy.requests if "_delete_by_query" in path)


def test_a_failed_round_leaves_the_index_marked_until_the_next_one_succeeds(index, cleanup, admin, proxy):
    failure = {"cause": {"type": "cluster_block_exception", "reason": "index read-only"}}
    proxy.on("GET", TASK, edited(lambda document: document.get("response", {}).update(failures=[failure])), times=None)
    outcome = cleanup(index)
    assert outcome.code == 1, outcome.err
    assert f"emptying {index}: 1 failure(s), the first: cluster_block_exception: index read-only" in outcome.last
    assert marker_of(admin, index)
    proxy.rules.clear()
    assert cleanup(index, "--no-force-merge").code == 0
    assert marker_of(admin, index) is None


def test_a_write_block_is_said_with_what_to_do_about_it(index, cleanup, admin):
    admin("PUT", f"/{index}/_settings", {"index.blocks.write": True})
    outcome = cleanup(index)
    assert outcome.code == 4, outcome.err
    assert "remove it: PUT" in outcome.last
    assert count(admin, index) == 3


def test_an_index_that_is_replaced_meanwhile_is_a_failure(index, cleanup, admin, proxy):
    def replace():
        admin("DELETE", f"/{index}")
        admin("PUT", f"/{index}", {})

    proxy.on("GET", TASK, at_the_end(replace), times=None)
    outcome = cleanup(index, "--no-force-merge")
    assert outcome.code == 1, outcome.err
    assert f"another client deleted and recreated index {index}" in outcome.last


@pytest.mark.quick
def test_a_dry_run_counts_and_deletes_nothing(index, cleanup, admin):
    before = state_of(admin, index)
    outcome = cleanup(index, "--dry-run")
    assert (outcome.code, outcome.result) == (0, {"index": index, "would_delete": 3, "dry_run": True})
    assert state_of(admin, index) == before


def test_space_that_a_stopped_run_left_is_freed_by_the_next_one(index, cleanup, admin, proxy, monkeypatch):
    monkeypatch.setattr(index_cleanup, "LEASES_WAIT_S", 1)
    monkeypatch.setattr(index_cleanup, "STATS_AGE_S", 0)
    admin("POST", f"/{index}/_delete_by_query?refresh=true", {"query": {"match_all": {}}})
    assert cleanup(index).code == 0
    assert proxy.seen("POST", "_forcemerge")


def test_a_deletion_is_throttled_evenly(make_index, cleanup, proxy, no_wait):
    index = make_index("index", NUMBER, docs=60)
    outcome = cleanup(index, "--requests-per-second", "50", "--no-force-merge")
    assert (outcome.code, outcome.result["deleted"]) == (0, 60)
    assert outcome.result["seconds"] >= 1
    [path] = [path for verb, path, _ in proxy.requests if verb == "POST" and "_delete_by_query" in path]
    assert "requests_per_second=50" in path
    assert "scroll_size=5&" in path + "&"
