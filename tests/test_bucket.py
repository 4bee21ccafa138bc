"""What is in the bucket: files that are no data, headers, what the producer says it wrote, and settings of a night."""

from __future__ import annotations

import gzip
import re

import pytest
import sandbox
from conftest import count, sources
from fault_proxy import after
from test_bulkupdate import NUMBERS, WORDS, meta_of, rejected, short_pauses  # noqa: F401  # fixtures
from test_run_refresh import finish, pair, refresh  # noqa: F401  # fixtures

COLUMNS = {"k": {"type": "keyword"}, "n": {"type": "long"}, "d": {"type": "date"}}
ROWS = "k,n\na,1\nb,2\n"
BOM = "\ufeff"


def warnings(outcome, word):
    return [line for line in outcome.err.splitlines() if " WARNING " in line and word in line]


def cells(admin, index, *names):
    """Return the values of these fields of all documents, sorted."""
    return sorted((tuple(document.get(name) for name in names) for document in sources(admin, index)), key=str)


# --- names that are no data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leftovers",
    [
        {"_temporary/0/task_1/part-00000.csv": ROWS, "_temporary/0/task_2/part-00001.csv": ROWS},
        {".ipynb_checkpoints/a.csv": ROWS, ".hidden.csv": "k,n\nz,9\n"},
        {"._part-00000.csv": b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(64), "deep/er/._b.csv": bytes(99)},
        {"_started_17.csv": "x", "2024/_backup/b.csv.gz": gzip.compress(ROWS.encode())},
    ],
    ids=["an aborted Spark job", "a notebook", "AppleDouble", "underscores"],
)
def test_objects_whose_names_say_that_they_are_no_data_are_left_out(leftovers, make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS)
    prefix = put_csv({"part-00000.csv": ROWS, **leftovers})
    outcome = load(prefix, index)
    assert cells(admin, index, "k", "n") == [("a", 1), ("b", 2)]
    assert outcome.result["objects"] == 1
    [line] = warnings(outcome, "not loaded")
    size = sum(len(content) for content in leftovers.values())
    assert re.search(rf": 2 objects \({size:,} bytes\), the first is ", line)
    assert f"{prefix}{min(leftovers)}" in line


def test_partitions_whose_names_begin_with_an_underscore_are_data(make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS)
    files = {"_date=2024-01-01/a.csv": "k,n\na,1\n", "x/_k=b/b.csv": "k,n\nb,2\n", "a_b/c.d.csv": "k,n\nc,3\n"}
    outcome = load(put_csv(files), index)
    assert count(admin, index) == 3
    assert warnings(outcome, "not loaded") == []


def test_only_what_is_below_the_prefix_counts(make_index, put_csv, load, admin):
    """Who asks for `_export/` or for `x/_part` gets it."""
    index = make_index("index", COLUMNS)
    prefix = put_csv({"_export/part-1.csv": "k,n\na,1\n", "_export/_part-2.csv": "k,n\nb,2\n"})
    load(f"{prefix}_export/", index)
    assert cells(admin, index, "k") == [("a",)]
    load(f"{prefix}_export/_part", index)
    assert cells(admin, index, "k") == [("b",)]
    load(f"{prefix}_export", index)
    assert cells(admin, index, "k") == [("a",)]


def test_nothing_but_leftovers_is_refused(make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS, docs=3)
    prefix = put_csv({"_temporary/0/part-0.csv": ROWS, "_SUCCESS": ""})
    outcome = load(prefix, index, "--ready-object", "_SUCCESS", code=4)
    assert f"{prefix}_temporary/0/part-0.csv" in outcome.err
    assert "nothing was changed" in outcome.last
    assert count(admin, index) == 3


def test_a_producer_that_writes_leftovers_during_the_load_changes_nothing(make_index, put_csv, load, proxy, s3, admin):
    index = make_index("index", COLUMNS)
    prefix = put_csv({"a.csv": ROWS})
    put = {"Bucket": sandbox.BUCKET, "Key": f"{prefix}_temporary/b.csv", "Body": b"k,n\n"}
    proxy.on("POST", "/_bulk", after(lambda: s3.put_object(**put)))
    load(prefix, index)
    assert count(admin, index) == 2


def test_whatever_else_is_not_loaded_is_counted_in_one_line(make_index, put_csv, load):
    files = {"a.csv": ROWS, "empty.csv": "", "folder/": "", "folder/more.csv/": "", "_SUCCESS": "", "readme.txt": "x"}
    outcome = load(put_csv(files), make_index("index", COLUMNS))
    [line] = [line for line in outcome.err.splitlines() if "other suffix" in line]
    assert re.search(r"1 empty object\b.* 2 folders\b.* 2 objects with (an)?other suffix", line)


def test_parts_without_a_suffix_are_named_when_there_is_nothing_else(make_index, put_csv, load):
    prefix = put_csv({"0000_part_00": ROWS, "0001_part_00": ROWS})
    outcome = load(prefix, make_index("index", COLUMNS), code=4)
    assert f"{prefix}0000_part_00" in outcome.last
    assert "READY_OBJECT" in outcome.last  # a manifest may name them


def test_a_prefix_that_matches_several_folders_says_so(make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS)
    prefix = put_csv({"flights/a.csv": "k,n\na,1\n", "flights_old/a.csv": "k,n\nb,2\n", "flights_old/b.csv": ROWS})
    outcome = load(f"{prefix}flights", index)
    assert count(admin, index) == 4
    [line] = warnings(outcome, "flights_old/")
    assert f"{prefix}flights/" in line
    for one_folder in (f"{prefix}flights/", f"{prefix}flights_", f"{prefix}"):
        assert warnings(load(one_folder, index), "flights_old/") == []
