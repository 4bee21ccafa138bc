"""SKIP_UNCHANGED: nothing is done when the live index provably holds what S3 holds, and everything where it may not."""

from __future__ import annotations

import json
import re
import sys

import bulkupdate
import index_cleanup
import opensearch_base_manager as base
import pytest
import reindex
import sandbox
from conftest import count, finish, meta_of
from fault_proxy import after, edited

PROPERTIES = {"n": {"type": "long"}, "k": {"type": "keyword"}}
FILES = {"a.csv": "n,k\n1,a\n2,b\n", "b.csv": "n,k\n3,c\n"}


@pytest.fixture
def skip(monkeypatch):
    monkeypatch.setenv("SKIP_UNCHANGED", "true")


@pytest.fixture
def loaded(skip, make_index, put_csv, load):
    """Load an index; return it, the prefix, and a function that says whether it counts as unchanged."""
    index, prefix = make_index("index", PROPERTIES, settings={"number_of_shards": 2}), put_csv(FILES)
    load(prefix, index)

    def unchanged(other=prefix, *more):
        outcome = load(other, index, "--dry-run", *more)
        assert outcome.result.get("unchanged", False) == ("nothing has changed" in outcome.err)
        return outcome.result.get("unchanged", False)

    assert unchanged()
    return index, prefix, unchanged


def record_of(admin, index):
    return meta_of(admin, index).get(bulkupdate.RECORD)


def add(admin, index, name="stray", n=9):
    admin("PUT", f"/{index}/_doc/{name}?refresh=true", {"n": n})


def delete_one(admin, index):
    found = admin("POST", f"/{index}/_search", {"size": 1})["hits"]["hits"][0]["_id"]
    admin("DELETE", f"/{index}/_doc/{found}?refresh=true")


def update_one(admin, index):
    found = admin("POST", f"/{index}/_search", {"size": 1})["hits"]["hits"][0]["_id"]
    admin("POST", f"/{index}/_update/{found}?refresh=true", {"doc": {"n": 77}})


def one_of_each(admin, index):
    add(admin, index)
    delete_one(admin, index)
    assert count(admin, index) == 3


def another_mapping(admin, index):
    admin("PUT", f"/{index}/_mapping", {"properties": {"x": {"type": "long"}}})


@pytest.mark.parametrize("write", [add, delete_one, update_one, one_of_each, another_mapping])
def test_any_write_is_a_change(write, loaded, admin):
    index, _, unchanged = loaded
    write(admin, index)
    assert not unchanged()


@pytest.mark.parametrize(
    "change",
    [
        {"c.csv": "n,k\n4,d\n"}, {"a.csv": "n,k\n1,a\n2,x\n"}, {"a.csv": None},
        {"a.csv": None, "c.csv": FILES["a.csv"]},
    ],
    ids=["added", "replaced, of the same size", "gone", "renamed"],
)  # fmt: skip
def test_another_object_is_a_change(change, loaded, s3):
    _, prefix, unchanged = loaded
    for key, text in change.items():
        if text is None:
            s3.delete_object(Bucket=sandbox.BUCKET, Key=prefix + key)
        else:
            s3.put_object(Bucket=sandbox.BUCKET, Key=prefix + key, Body=text.encode())
    assert not unchanged()


def test_the_same_objects_written_again_are_no_change_and_another_prefix_or_option_is_one(loaded, load, s3):
    index, prefix, unchanged = loaded
    for key, text in FILES.items():
        s3.put_object(Bucket=sandbox.BUCKET, Key=prefix + key, Body=text.encode())
    assert unchanged()
    assert not unchanged(prefix[:-1])
    assert not unchanged(prefix, "--id-column", "n")
    load(prefix, index, "--dry-run", "--delimiter", ";", code=4)  # read, and refused for its header


def test_flush_merge_and_settings_are_no_change(loaded, admin):
    index, _, unchanged = loaded
    admin("POST", f"/{index}/_flush")
    admin("POST", f"/{index}/_forcemerge?only_expunge_deletes=true")
    admin("PUT", f"/{index}/_settings", {"refresh_interval": "7s"})
    assert unchanged()


def test_an_index_that_was_restored_over_itself_is_changed(loaded, proxy):
    """Its UUID stays, its history is another."""
    index, _, unchanged = loaded

    def restored(found):
        for copy in found["indices"][index]["shards"]["0"]:
            copy["commit"]["user_data"]["history_uuid"] = "another"

    proxy.on("GET", r"/_stats\?level=shards", edited(restored), times=None)
    assert not unchanged()


def test_an_index_that_was_recreated_with_its_record_is_changed(loaded, admin):
    index, _, unchanged = loaded
    mapping = admin("GET", f"/{index}/_mapping")[index]["mappings"]
    admin("DELETE", f"/{index}")
    admin("PUT", f"/{index}", {"mappings": mapping, "settings": {"number_of_shards": 2}})
    assert record_of(admin, index)
    assert not unchanged()


def test_a_copy_into_it_and_one_of_it_have_no_record(loaded, make_index, run, admin, load):
    index, prefix, unchanged = loaded
    other = make_index("other", PROPERTIES)
    assert run(reindex, "--source", index, "--target", other).code == 0
    assert record_of(admin, other) is None
    assert "unchanged" not in load(prefix, other, "--dry-run").result
    assert run(reindex, "--source", other, "--target", index).code == 0
    assert count(admin, index) == 3
    assert not unchanged()


def test_a_cleanup_and_a_load_beside_what_it_holds_are_changes(loaded, load, run):
    index, prefix, unchanged = loaded
    load(prefix, index, "--no-cleanup")
    assert not unchanged()
    load(prefix, index)
    assert unchanged()
    assert run(index_cleanup, "--index", index, "--no-force-merge").code == 0
    assert not unchanged()


@pytest.mark.parametrize("when", ["while it is loaded", "between the count and the record"])
def test_a_stray_write_during_the_load_leaves_no_record(when, skip, make_index, put_csv, load, proxy, admin):
    """The count is as it should be: one was added, one deleted."""
    index, prefix = make_index("index", PROPERTIES, settings={"number_of_shards": 2}), put_csv(FILES)

    def stray():
        add(admin, index)
        admin("DELETE", f"/{index}/_doc/stray?refresh=true")

    path, method = ("/_bulk", "POST") if when == "while it is loaded" else ("/_count", "GET")
    # counts: to see whether all documents are visible, before it is emptied, of the load, of the record
    proxy.on(method, path, after(stray), skip=0 if method == "POST" else 3)
    load(prefix, index)
    assert record_of(admin, index) is None
    assert "unchanged" not in load(prefix, index, "--dry-run").result


def test_neither_rejects_nor_a_load_without_the_setting_leave_a_record(
    skip, make_index, put_csv, load, admin, monkeypatch
):
    index = make_index("index", PROPERTIES)
    load(put_csv({"a.csv": "n,k\n1,a\nx,b\n"}), index, "--max-rejects", "1")
    assert record_of(admin, index) is None
    monkeypatch.setenv("SKIP_UNCHANGED", "false")
    prefix = put_csv(FILES)
    load(prefix, index)
    assert record_of(admin, index) is None


def test_without_the_setting_nothing_is_read(loaded, load, monkeypatch, proxy):
    index, prefix, _ = loaded
    monkeypatch.setenv("SKIP_UNCHANGED", "false")
    outcome = load(prefix, index, "--dry-run")
    assert (outcome.code, "unchanged" in outcome.result) == (0, False)
    assert [path for _, path, _ in proxy.requests if "level=shards" in path] == []


def test_an_unfinished_index_is_changed(loaded, admin):
    """A run was killed after the record, before it took its marker out."""
    index, _, unchanged = loaded
    meta = meta_of(admin, index)
    marker = {"started": "2026-01-01T00:00:00Z", "host": "h", "found": {}, "set": {}}
    admin("PUT", f"/{index}/_mapping", {"_meta": {**meta, base.SUITE: marker}})
    assert not unchanged()
    admin("PUT", f"/{index}/_mapping", {"_meta": {bulkupdate.RECORD: "unreadable"}})
    assert not unchanged()


# --- the runner -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["copy-back", "alternate"])
def test_a_night_with_nothing_new_is_over_at_once(
    strategy, make_pair, refresh, put_csv, admin, s3, proxy, tmp_path, alias, behind_alias
):
    make_pair(PROPERTIES, 3, 0)
    prefix = put_csv(FILES)
    night = {
        "SKIP_UNCHANGED": "true", "REFRESH_STRATEGY": strategy, "OPENSEARCH_ENDPOINT": proxy.endpoint,
        "OPENSEARCH_USERNAME": sandbox.USER, "OPENSEARCH_PASSWORD": sandbox.PASSWORD, "PYTHON": sys.executable,
    }  # fmt: skip
    code, _, err = finish(refresh(prefix, **night))
    assert (code, "nothing to do" in err) == (0, False), err
    readers_on = behind_alias()
    proxy.requests.clear()
    code, _, err = finish(refresh(prefix, **night))
    assert code == 0, err
    assert f"nothing has changed since {readers_on[0]} was loaded: nothing to do" in err
    assert {method for method, path, _ in proxy.requests if not path.endswith("/_refresh")} == {"GET"}
    last = json.loads((tmp_path / "logs" / f"last-{alias}.json").read_text())
    assert (last["exit_code"], last["live_index"], last["documents"]) == (0, readers_on[0], 3)
    assert finish(refresh(prefix, **night, READY_OBJECT="_SUCCESS"))[0] == 4
    s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}c.csv", Body=b"n,k\n4,d\n")
    code, _, err = finish(refresh(prefix, **night, DOCUMENT_COUNT_THRESHOLD="50"))
    assert (code, "nothing to do" in err) == (0, False), err
    assert count(admin, behind_alias()[0]) == 4
    checks = 1 if strategy == "copy-back" else 2  # there, the index to be loaded is the live one
    assert len(re.findall("<== check (what has changed|the load): exit 0", err)) == checks
