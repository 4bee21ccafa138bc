"""What is in the bucket: files that are no data, headers, what the producer says it wrote, and settings of a night."""

from __future__ import annotations

import gzip
import json
import re
import time

import bulkupdate
import opensearch_base_manager as base
import pytest
import sandbox
from conftest import WORDS, count, finish, load_arguments, marker_of, sources
from fault_proxy import after, refused

pytestmark = pytest.mark.usefixtures("short_pauses")

COLUMNS = {"k": {"type": "keyword"}, "n": {"type": "long"}, "d": {"type": "date"}}
ROWS = "k,n\na,1\nb,2\n"
BOM = "\ufeff"


def warnings(outcome, word):
    return [line for line in outcome.err.splitlines() if " WARNING " in line and word in line]


def cells(admin, index, *names):
    """Return the values of these fields of all documents, sorted."""
    return sorted((tuple(document.get(name) for name in names) for document in sources(admin, index)), key=str)


# --- how producers write a table of nothing, or a file in pieces ------------------------------------------------------

HEADER, DATA = gzip.compress(b"k,n\n"), gzip.compress(b"a,1\nb,2\n")
EMPTY_MEMBER = gzip.compress(b"")


@pytest.mark.parametrize(
    "content",
    [
        f"{BOM}{BOM}{ROWS}", f"{BOM}{BOM}{BOM}{ROWS}", HEADER + DATA, EMPTY_MEMBER + gzip.compress(ROWS.encode()),
        gzip.compress(ROWS.encode()) + bytes(512), EMPTY_MEMBER + HEADER + EMPTY_MEMBER + DATA,
    ],
    ids=["two BOMs", "three BOMs", "header and rows", "empty first member", "padded", "four members"],
)  # fmt: skip
def test_the_head_of_an_object_is_read_as_the_load_reads_it(content, make_index, put_csv, load, admin):
    index = make_index("index")
    load(put_csv({"a.csv": content}), index)
    assert cells(admin, index, "k", "n") == [("a", 1), ("b", 2)]
    assert admin("GET", f"/{index}")[index]["mappings"]["properties"]["n"] == {"type": "long"}


@pytest.mark.parametrize("nothing", ["\n", "\r\n", f"{BOM}\n", gzip.compress(b"\n"), BOM], ids=repr)
def test_a_part_without_a_header_and_without_rows_is_an_empty_one(nothing, make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS)
    load(put_csv({"a.csv": ROWS, "b.csv": nothing}), index)
    assert count(admin, index) == 2
    load(put_csv({"c.csv": nothing}) + "c.csv", index, code=4)
    assert count(admin, index) == 2


@pytest.mark.parametrize("ending", [EMPTY_MEMBER, bytes(64), b""], ids=["empty member", "padding", "nothing"])
def test_a_packed_header_alone_is_refused_before_the_index_is_emptied(ending, make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS, docs=[{"k": "old"}])
    outcome = load(put_csv({"a.csv.gz": HEADER + ending}), index, code=4)
    assert "not one data row" in outcome.last
    assert count(admin, index) == 1


def test_a_load_that_finds_only_empty_rows_behind_the_head_fails(make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS, docs=[{"k": "old"}])
    outcome = load(put_csv({"a.csv": "k,n\n" + ",\n" * 50_000}), index, code=1)
    assert "not one data row" in outcome.last
    assert marker_of(admin, index)


@pytest.mark.parametrize("column", ["_id.$oid", "_source.x", "_routing"])
@pytest.mark.parametrize("dynamic", ["true", "false"])
def test_a_column_below_a_metadata_field_is_refused(column, dynamic, make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS, docs=[{"k": "old"}], dynamic=dynamic)
    outcome = load(put_csv({"a.csv": f"k,{column}\na,1\n"}), index, code=4)
    assert "invalid field names" in outcome.last
    assert count(admin, index) == 1


def test_a_manifest_of_another_bucket_is_none_of_the_whole_bucket():
    manifest = b'{"entries": [{"url": "s3://other/out/p0.csv", "meta": {"record_count": 1}}]}'
    assert bulkupdate.parse_manifest(manifest, "mine", "") is None
    assert bulkupdate.parse_manifest(manifest, "other", "").sizes == {"out/p0.csv": None}


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
    [line] = [line for line in outcome.err.splitlines() if "not named *.csv" in line]
    assert re.search(r"1 empty object\b.* 2 folders\b.* 2 objects not named", line)


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


# --- headers ----------------------------------------------------------------------------------------------------------

REPEATED = {
    "joined with cat": ({"a.csv": "k,t\na,b\nk,t\nc,d\n"}, 3),
    "and a BOM each": ({"a.csv": f"{BOM}k,t\na,b\n{BOM}k,t\nc,d\n"}, 3),
    "quoted, and a BOM each": ({"a.csv": f'{BOM}"k","t"\r\n"a","b"\r\n{BOM}"k","t"\r\n"c","d"\r\n'}, 3),
    "in each gzip member": ({"a.csv.gz": gzip.compress(b"k,t\na,b\n") + gzip.compress(b"k,t\nc,d\n")}, 3),
    "far down": ({"a.csv": "k,t\n" + "a,b\n" * 50_000 + "k,t\nc,d\n"}, 50_002),
}


@pytest.mark.parametrize(("files", "line"), REPEATED.values(), ids=REPEATED)
def test_a_row_that_repeats_the_header_is_skipped(files, line, make_index, put_csv, load, admin):
    index = make_index("index", WORDS)
    prefix = put_csv(files)
    outcome = load(prefix, index)
    assert outcome.result["skipped"] == 1
    assert count(admin, index) == outcome.result["read"] - 1
    found = admin("POST", f"/{index}/_count", {"query": {"bool": {"should": [
        {"term": {"k": "k"}}, {"term": {"t": "t"}}, {"prefix": {"k": BOM}}]}}})  # fmt: skip
    assert found["count"] == 0
    [said] = warnings(outcome, "header")
    assert re.search(rf"\b1 row\b.*{prefix}a\.csv\S*,? line {line}\b", said)


def test_repeated_headers_are_no_rejects_and_no_evidence_of_types(make_index, put_csv, load, admin):
    """Beside an integer column it was a reject; of an unknown column it made a text."""
    index = make_index("index", {"k": {"type": "keyword"}, "n": {"type": "long"}})
    prefix = put_csv({"a.csv": "k,n,new\na,1,10\nk,n,new\nb,2,20\n", "b.csv": "k,n,new\n\nk,n,new\nc,3,\nk,n,new\n"})
    outcome = load(prefix, index)
    assert cells(admin, index, "k", "n", "new") == [("a", 1, 10), ("b", 2, 20), ("c", 3, None)]
    assert outcome.result["skipped"] == 4
    assert admin("GET", f"/{index}/_mapping")[index]["mappings"]["properties"]["new"] == {"type": "long"}
    [said] = warnings(outcome, "header")
    assert re.search(rf"\b3 rows\b.*{prefix}a\.csv,? line 3\b", said)


def test_a_header_alone_twice_is_not_a_data_row(make_index, put_csv, load):
    load(put_csv({"a.csv": "k,t\nk,t\n"}), make_index("index", WORDS), code=4)


def test_in_a_file_of_one_column_a_row_like_the_header_is_data(make_index, put_csv, load, admin):
    index = make_index("index", {"t": {"type": "keyword"}})
    assert load(put_csv({"a.csv": "t\nt\nu\n"}), index).result["skipped"] == 0
    assert cells(admin, index, "t") == [("t",), ("u",)]


def test_a_row_that_has_the_names_in_part_is_data(make_index, put_csv, load, admin):
    index = make_index("index", WORDS)
    assert load(put_csv({"a.csv": "k,t\nk,x\nx,t\nt,k\n"}), index).result["skipped"] == 0
    assert count(admin, index) == 3


HEADERLESS = {
    "no name is known": ({"part-0.csv": "k,n,d\na,1,2024-01-15\n", "part-1.csv": "b,2,2024-01-16\n"}, COLUMNS),
    "one cell is a name": ({"part-0.csv": "k,t,x\na,b,c\n", "part-1.csv": "k,2,d\ne,3,f\n"}, WORDS),
    "an empty mapping": ({"part-0.csv": "k,t\na,b\n", "part-1.csv": "2,d\n3,e\n"}, {}),
    "an empty mapping and a name": ({"part-0.csv": "k,t,x\na,b,c\n", "part-1.csv": "k,2024-01-15,d\n"}, {}),
    "an empty cell": ({"part-0.csv": "k,t,x\na,b,c\n", "part-1.csv": "k,,d\n"}, WORDS),
    "the same cell twice": ({"part-0.csv": "k,n,m\na,1,1\n", "part-1.csv": "b,0,0\n"}, COLUMNS),
    "packed": ({"part-0.csv.gz": gzip.compress(b"k,t\na,b\n"), "part-1.csv.gz": gzip.compress(b"c,-1.5\n")}, WORDS),
    "no part has one": ({"part-0.csv": "a,1,2024-01-15\n", "part-1.csv": "b,2,2024-01-16\n"}, {}),
}


@pytest.mark.parametrize(("files", "mapping"), HEADERLESS.values(), ids=HEADERLESS)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
def test_a_part_without_a_header_is_refused(files, mapping, dry, make_index, put_csv, load, admin):
    index = make_index("index", mapping, docs=[])
    before = admin("GET", f"/{index}/_mapping")
    prefix = put_csv(files)
    outcome = load(prefix, index, *dry, code=4)
    assert "this part has no header" in outcome.last
    assert re.search(rf"{prefix}part-[01]\.csv", outcome.last)
    assert "nothing was changed" in outcome.last
    assert admin("GET", f"/{index}/_mapping") == before


YEARS = "country,code,1960,1961\nNamibia,NA,1,2\n"
HEADERS = {
    "years beside known names": ({"a.csv": YEARS}, {"country": {"type": "keyword"}, "code": {"type": "keyword"}}),
    "many years beside one": ({"a.csv": "country,1960,1961,1962\nNA,1,2,3\n"}, {"country": {"type": "keyword"}}),
    "years in each part": ({"a.csv": YEARS, "b.csv": YEARS}, {}),
    "years alone in an empty index": ({"a.csv": YEARS}, {}),
    "new names without a value": ({"a.csv": "k,t,u,v,w\na,b,c,d,e\n"}, {"k": {"type": "keyword"}}),
}


@pytest.mark.parametrize(("files", "mapping"), HEADERS.values(), ids=HEADERS)
def test_a_header_with_numbers_is_one(files, mapping, make_index, put_csv, load, admin):
    index = make_index("index", mapping)
    load(put_csv(files), index)
    assert count(admin, index) == len(files)


def test_columns_that_only_some_parts_have_are_logged(make_index, put_csv, load):
    files = {"a.csv": "k,t\na,b\n", "b.csv": "k,t,new\na,b,c\n", "c.csv": "k\na\n", "empty.csv": ""}
    outcome = load(put_csv(files), make_index("index", WORDS))
    assert re.search(r"only some objects have: .*\bt \(2 of 3\)", outcome.err)
    assert re.search(r"only some objects have: .*\bnew \(1 of 3\)", outcome.err)
    prefix = put_csv({"equal/a.csv": ROWS, "equal/b.csv": ROWS})
    assert "only some objects" not in load(f"{prefix}equal/", make_index("other", COLUMNS)).err


# --- rows of empty cells ----------------------------------------------------------------------------------------------

EXCEL = f"{BOM}k;n;d\r\na;1;2024-01-15\r\n;;\r\n\r\nb;2;\r\n;;\r\n;;\r\n"


@pytest.mark.parametrize("id_column", [[], ["--id-column", "k"]], ids=["", "ids"])
def test_a_row_of_empty_cells_is_skipped_like_a_blank_line(id_column, make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS)
    outcome = load(put_csv({"a.csv": EXCEL}), index, "--delimiter", ";", *id_column)
    assert cells(admin, index, "k", "n") == [("a", 1), ("b", 2)]
    assert (outcome.result["read"], outcome.result["skipped"], outcome.result["rejected"]) == (6, 4, 0)


def test_quoted_empty_cells_are_empty_and_other_cells_are_not(make_index, put_csv, load, admin):
    index = make_index("index", WORDS)
    outcome = load(put_csv({"a.csv": 'k,t\n"",""\n,b\na,\n" ",\n', "b.csv": 't\n""\nx\n'}), index)
    assert (outcome.result["stored"], outcome.result["skipped"]) == (4, 2)
    assert count(admin, index) == 4


def test_a_file_of_empty_cells_alone_has_no_data_row(make_index, put_csv, load):
    load(put_csv({"a.csv": "k,t\n,\n,\n"}), make_index("index", WORDS), code=4)


# --- settings of a night ----------------------------------------------------------------------------------------------


def test_delimiter_and_id_column_come_from_variables_as_well(make_index, put_csv, load, admin, monkeypatch):
    index = make_index("index", WORDS)
    prefix = put_csv({"a.csv": "k\tt\na\tb\na\tc\n"})
    monkeypatch.setenv("DELIMITER", r"\t")
    monkeypatch.setenv("ID_COLUMN", "k")
    assert load(prefix, index).result["replaced"] == 1
    assert cells(admin, index, "k", "t") == [("a", "c")]
    load(put_csv({"a.csv": "k;t\nb;d\n"}), index, "--delimiter", ";", "--id-column", "t")
    assert admin("GET", f"/{index}/_doc/d")["_source"] == {"k": "b", "t": "d"}


def test_advice_names_the_variable_that_the_nightly_run_reads(make_index, put_csv, load, monkeypatch):
    index = make_index("index", WORDS)
    assert "DELIMITER" in load(put_csv({"a.csv": "k;t\na;b\n"}), index, code=4).last
    monkeypatch.setenv("ID_COLUMN", "no")
    assert "ID_COLUMN" in load(put_csv({"a.csv": "k,t\na,b\n"}), index, code=4).last


@pytest.mark.parametrize(("delimiter", "variable"), [(";", ";"), ("\t", r"\t")])
def test_the_runner_loads_semicolons_tabs_and_an_id_column(delimiter, variable, make_pair, refresh, put_csv, admin):
    primary, _ = make_pair(WORDS, 0)
    prefix = put_csv({"a.csv": "k,t\na,b\na,c\n".replace(",", delimiter)})
    code, _, err = finish(refresh(prefix, DELIMITER=variable, ID_COLUMN="k"))
    assert code == 0, err
    assert admin("GET", f"/{primary}/_doc/a")["_source"] == {"k": "a", "t": "c"}


# --- what the producer says it wrote ----------------------------------------------------------------------------------


def manifest(prefix, files, rows, **more):
    """Return what UNLOAD ... MANIFEST VERBOSE writes about these files; `rows` by name, None for a size alone."""
    entries = [
        {"url": f"s3://{sandbox.BUCKET}/{prefix}{key}", "mandatory": True,
         "meta": {"content_length": len(content)} | ({} if rows is None else {"record_count": rows[key]})}
        for key, content in files.items()
    ]  # fmt: skip
    return json.dumps({"entries": entries, **more})


UNLOADED = {"0000_part_00": "k,n\na,1\nb,2\n", "0001_part_00": "k,n\nc,3\n"}
COUNTED = {"0000_part_00": 2, "0001_part_00": 1}


@pytest.fixture
def unload(put_csv, s3):
    """Store files and a manifest about them, changed by a function if there is one; return the prefix."""

    def do(files, rows, change=lambda entries: None):
        prefix = put_csv(files)
        body = json.loads(manifest(prefix, files, rows))
        change(body["entries"])
        s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}manifest", Body=json.dumps(body).encode())
        return prefix

    return do


READY = ["--ready-object", "manifest"]


def test_what_a_manifest_names_is_loaded_whatever_its_suffix(unload, make_index, load, admin):
    index = make_index("index", COLUMNS)
    outcome = load(unload(UNLOADED, COUNTED), index, *READY)
    assert cells(admin, index, "k", "n") == [("a", 1), ("b", 2), ("c", 3)]
    assert outcome.result["objects"] == 2
    assert re.search(r"manifest.* 2 objects, 3 rows", outcome.err)


def test_what_a_manifest_names_is_data_whatever_its_name_says(unload, make_index, load, admin):
    index = make_index("index", COLUMNS)
    load(unload({"_run/.a": "k,n\na,1\n"}, {"_run/.a": 1}), index, *READY)
    assert count(admin, index) == 1


def drop(at):
    return lambda entries: entries.pop(at)


def resize(entries):
    entries[0]["meta"]["content_length"] += 1


def another_url(entries):
    entries[1]["url"] += "x"


@pytest.mark.parametrize(
    ("change", "says"),
    [(drop(1), "0001_part_00.csv"), (resize, "0000_part_00.csv"), (another_url, "0001_part_00.csvx")],
    ids=["an object is not named", "another size", "an object is missing"],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
def test_a_bucket_that_is_not_what_its_manifest_says_is_refused(change, says, dry, unload, make_index, load, admin):
    index = make_index("index", COLUMNS, docs=4)
    files = {f"{key}.csv": content for key, content in UNLOADED.items()}
    prefix = unload(files, {f"{key}.csv": rows for key, rows in COUNTED.items()}, change)
    outcome = load(prefix, index, *READY, *dry, code=4)
    assert f"{prefix}{says}" in outcome.last
    assert "manifest (READY_OBJECT)" in outcome.last
    assert "Nothing was changed" in outcome.last
    assert count(admin, index) == 4


def test_leftovers_beside_a_manifest_are_no_difference(unload, make_index, load, s3):
    prefix = unload(UNLOADED, COUNTED)
    for key in ("_temporary/x.csv", ".a.csv", "notes.txt", "old_part_00"):
        s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}{key}", Body=b"k,n\nz,9\n")
    s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}manifest",
                  Body=manifest(prefix, UNLOADED, COUNTED).encode())  # fmt: skip
    assert load(prefix, make_index("index", COLUMNS), *READY).result["stored"] == 3


@pytest.mark.parametrize("said", ["manifest", "plain", "variable", "flag"])
@pytest.mark.parametrize(("rows", "code"), [(3, 0), (4, 1), (2, 1)])
def test_the_rows_are_compared_before_readers_see_them(
    said, rows, code, unload, make_index, put_csv, run, admin, monkeypatch
):
    index, more = make_index("index", COLUMNS), []
    files = {"a.csv": "k,n\na,1\n\nb,2\n\nk,n\n", "b.csv": "k,n\nc,x\n"}  # 3 rows, one of them a reject
    if said == "manifest":
        prefix, more = unload(files, {"a.csv": 2, "b.csv": rows - 2}), READY
    elif said == "plain":
        prefix, more = put_csv({**files, "done.json": json.dumps({"rows": rows})}), ["--ready-object", "done.json"]
    elif said == "variable":
        prefix = put_csv(files)
        monkeypatch.setenv("EXPECTED_ROWS", str(rows))
    else:
        prefix, more = put_csv(files), ["--expected-rows", str(rows)]
    outcome = run(bulkupdate, *load_arguments(prefix, index, "--max-rejects", "1", *more))
    assert outcome.code == code, outcome.err
    assert bool(marker_of(admin, index)) == bool(code)  # unfinished: no switch goes there
    if code:
        assert re.search(rf"\b3 rows\b.*\b{rows}\b", outcome.last)
        assert " done: " not in outcome.err


def test_the_number_given_by_hand_counts_and_0_compares_nothing(unload, make_index, load):
    prefix = unload(UNLOADED, {"0000_part_00": 2, "0001_part_00": 9})
    load(prefix, make_index("a", COLUMNS), *READY, code=1)
    load(prefix, make_index("b", COLUMNS), *READY, "--expected-rows", "3")
    load(prefix, make_index("c", COLUMNS), *READY, "--expected-rows", "0")


def test_a_row_of_empty_cells_may_be_one_for_the_producer(make_index, put_csv, load):
    """A database counts a row of NULLs, a spreadsheet does not count its empty rows."""
    prefix = put_csv({"a.csv": "k,n\na,1\n,\nb,2\n"})
    for rows, code in (2, 0), (3, 0), (1, 1), (4, 1):
        load(prefix, make_index(f"index-{rows}", COLUMNS), "--expected-rows", str(rows), code=code)


@pytest.mark.parametrize(
    "content",
    [b"", b"done", b"3", b'"x"', b"[]", b"{}", b'{"rows": "3"}', b'{"rows": true}', b'{"rows": -1}', b'{"entries": {}}',
     b'{"entries": []}', b'{"entries": [{"path": "x"}]}', b'{"entries": [1]}', b"\xff\xfe\0", b"{" * 99_999,
     b'{"entries": [{"url": "s3://elsewhere/x.csv"}]}', b'{"entries": [{"url": "s3://your-bucket/else/x.csv"}]}'],
)  # fmt: skip
def test_anything_else_is_no_manifest_and_the_log_says_so(content, make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS)
    outcome = load(put_csv({"a.csv": ROWS, "manifest": content}), index, *READY)
    assert count(admin, index) == 2
    assert re.search(r"manifest \(READY_OBJECT\).* not a usable manifest", outcome.err)


def test_a_manifest_without_rows_compares_names_and_sizes_alone(unload, make_index, load):
    index = make_index("index", COLUMNS)
    load(unload(UNLOADED, None), index, *READY)
    load(unload(UNLOADED, None, lambda entries: entries[0].pop("meta")), index, *READY)
    load(unload(UNLOADED, None, resize), index, *READY, code=4)


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["keyword", "text", "long", "date"])
def test_a_cell_without_a_value_is_no_id(kind, make_index, put_csv, load, admin, rejected):
    good = {"keyword": ["x", "y"], "text": ["x", "y"], "long": ["1", "2"], "date": ["2024-01-15", "2024-01-16"]}[kind]
    words = ["NULL", "NaN", "NA", "null", "None", "N/A", "#N/A", "nan"]
    blank = ["", "  ", r"\N"]
    rows = [f"{name},{at}\n" for at, name in enumerate([*good, *words, *blank])]
    index = make_index("index", {"i": {"type": kind}, "n": {"type": "long"}})
    are_ids = kind in ("keyword", "text")
    outcome = load(put_csv({"a.csv": "i,n\n" + "".join(rows)}), index, "--id-column", "i", code=3)
    kept = [*good, *(words if are_ids else [])]
    found = admin("POST", f"/{index}/_search", {"size": 100})["hits"]["hits"]
    assert sorted(hit["_id"] for hit in found) == sorted(kept)
    assert outcome.result["replaced"] == 0
    lines = [entry["line"] for entry in rejected()]
    assert lines == list(range(2 + len(kept), 2 + len(rows)))
    assert {entry["column"] for entry in rejected()} == {"i"}


# --- new columns and the mapping's own rules --------------------------------------------------------------------------

TEMPLATES = [
    {"dates": {"match": "*_at", "match_mapping_type": "string", "mapping": {"type": "date"}}},
    {"codes": {"match": "code_*_x", "mapping": {"type": "keyword", "ignore_above": 9}}},
    {"whole": {"match_mapping_type": "long", "mapping": {"type": "integer"}}},
    {"strings": {"match_mapping_type": "string", "mapping": {"type": "keyword"}}},
    {"rest": {"match": "*", "match_mapping_type": "*", "mapping": {"type": "{dynamic_type}", "store": True}}},
]


def test_new_columns_get_what_dynamic_templates_say(make_index, put_csv, load, admin):
    index = make_index("index", {"k": {"type": "keyword"}}, dynamic_templates=TEMPLATES)
    text = "k,seen_at,code_1_x,count,word,price,flag,a.b,void\na,2024-01-15,7,3,x,1.5,true,y,\n"
    load(put_csv({"a.csv": text}), index)
    assert admin("GET", f"/{index}/_mapping")[index]["mappings"]["properties"] == {
        "k": {"type": "keyword"}, "seen_at": {"type": "date"}, "code_1_x": {"type": "keyword", "ignore_above": 9},
        "count": {"type": "integer"}, "word": {"type": "keyword"}, "price": {"type": "double", "store": True},
        "flag": {"type": "boolean", "store": True}, "a": {"properties": {"b": {"type": "keyword"}}},
        "void": {"type": "keyword"},
    }  # fmt: skip
    [document] = sources(admin, index)
    assert (document["code_1_x"], document["count"], document["price"], document["flag"]) == ("7", 3, 1.5, True)
    admin("POST", f"/{index}/_search", {"size": 0, "aggs": {"words": {"terms": {"field": "word"}}}})


@pytest.mark.parametrize(
    "other",
    [
        {"match_pattern": "regex", "match": "^w.*$", "mapping": {"type": "keyword"}},
        {"path_match": "a.*", "mapping": {"type": "keyword"}},
        {"match_mapping_type": "string", "unmatch": "*_t", "mapping": {"type": "keyword"}},
    ],
)
def test_other_templates_leave_text_and_are_named(other, make_index, put_csv, load, admin):
    index = make_index("index", {"k": {"type": "keyword"}}, dynamic_templates=[TEMPLATES[0], {"special": other}])
    outcome = load(put_csv({"a.csv": "k,seen_at,word\na,2024-01-15,x\n"}), index)
    properties = admin("GET", f"/{index}/_mapping")[index]["mappings"]["properties"]
    assert (properties["seen_at"], properties["word"]["type"]) == ({"type": "date"}, "text")
    [line] = warnings(outcome, "special")
    assert "word" in line
    assert warnings(load(put_csv({"a.csv": "k,seen_at,word\na,2024-01-15,x\n"}), index), "special") == []


def test_templates_for_other_kinds_of_values_are_passed_over(make_index, put_csv, load, admin):
    templates = [{"o": {"match_mapping_type": "object", "mapping": {"enabled": False}}}, TEMPLATES[2]]
    index = make_index("index", {"k": {"type": "keyword"}}, dynamic_templates=templates)
    outcome = load(put_csv({"a.csv": "k,count,word\na,1,x\n"}), index)
    properties = admin("GET", f"/{index}/_mapping")[index]["mappings"]["properties"]
    assert (properties["count"]["type"], properties["word"]["type"]) == ("integer", "text")
    assert warnings(outcome, "template") == []


@pytest.mark.skipif(sandbox.VERSION < "2.16", reason="2.16 and later")
def test_a_mapping_that_allows_templates_alone_takes_the_columns_that_one_matches(make_index, put_csv, load, admin):
    index = make_index("index", {"k": {"type": "keyword"}}, dynamic="strict_allow_templates",
                       dynamic_templates=TEMPLATES[:1])  # fmt: skip
    load(put_csv({"a.csv": "k,seen_at\na,2024-01-15\n"}), index)
    assert sources(admin, index) == [{"k": "a", "seen_at": "2024-01-15"}]
    assert "word" in load(put_csv({"a.csv": "k,word\na,x\n"}), index, code=4).last


@pytest.mark.skipif(sandbox.MAJOR < 3, reason="dynamic_properties are new in 3.x")
def test_columns_that_dynamic_properties_match_have_their_type_and_are_not_added(make_index, put_csv, load, admin):
    rules = {"*_i": {"type": "long"}, "*_s": {"type": "keyword"}}
    index = make_index("index", {"k": {"type": "keyword"}}, dynamic_properties=rules)
    load(put_csv({"a.csv": "k,a_i,b_s\na,007,007\nb,1.0,x\n"}), index)
    assert cells(admin, index, "k", "a_i", "b_s") == [("a", 7, "007"), ("b", 1, "x")]
    assert admin("GET", f"/{index}/_mapping")[index]["mappings"]["properties"] == {"k": {"type": "keyword"}}


# --- rejects at a glance ----------------------------------------------------------------------------------------------

MIXED = {"k": {"type": "keyword"}, "distance": {"type": "long"}, "when": {"type": "date"}}
BAD = (
    "k,distance,when\n" + "a,x,\n" * 2 + "b,1e99,\n" + "".join(f"c,word{at},\n" for at in range(5))
    + "".join(f"d,1,day{at}\n" for at in range(4)) + "e\n" * 3 + "f,1,2024-01-15\n"
)  # fmt: skip


def test_the_closing_lines_sum_up_the_rejects(make_index, put_csv, load):
    outcome = load(put_csv({"a.csv": BAD}), make_index("index", MIXED), code=3)
    sums = outcome.result["reject_reasons"]
    found = [(entry["rows"], entry["column"]) for entry in sums]
    assert found == [(7, "distance"), (4, "when"), (3, None), (1, "distance")]
    assert sums[0]["reason"] == "not a number"
    assert "failed to parse field [when] of type [date]" in sums[1]["reason"]
    said = [line.split(": ", 2)[2] for line in warnings(outcome, " x ")]
    assert said[0] == "7 x distance: not a number"
    assert len(said) == 4
    assert outcome.err.index(said[3]) < outcome.err.index("finished, but")


def test_ten_reasons_at_most_are_said_also_where_the_load_goes_on(make_index, put_csv, load):
    names = [f"c{at:02d}" for at in range(12)]
    rows = [",".join("x" if name == bad else "1" for name in names) + "\n" for bad in names]
    text = ",".join(names) + "\n" + "".join(row * at for at, row in enumerate(rows, 1)) + ",".join("1" * 12)
    index = make_index("index", {name: {"type": "long"} for name in names})
    outcome = load(put_csv({"a.csv": text}), index, "--max-rejects", "100")
    assert [entry["rows"] for entry in outcome.result["reject_reasons"]] == list(range(12, 2, -1))
    assert len(warnings(outcome, " x c")) == 10
    assert "reject_reasons" not in load(put_csv({"a.csv": "c00\n1\n"}), index).result


def test_a_load_that_stops_for_too_many_rejects_sums_them_up(make_index, put_csv, load, monkeypatch):
    monkeypatch.setattr(bulkupdate, "REJECTS_TOLERATED", 20)
    outcome = load(put_csv({"a.csv": "n\n1\n" + "x\n" * 50}), make_index("index", {"n": {"type": "long"}}), code=1)
    assert re.search(r"2\d x n: not a number", outcome.err)


# --- S3 that is away for a minute -------------------------------------------------------------------------------------


def test_a_listing_after_the_load_outlasts_a_closed_port(s3_proxy, proxy, make_index, put_csv, load, admin):
    index = make_index("index", COLUMNS)
    s3_proxy.on("GET", "list-type=2", refused, skip=1)  # the connection that is open
    proxy.on("POST", "/_bulk", after(lambda: s3_proxy.refuse_connections(3)))
    outcome = load(put_csv({"a.csv": ROWS}), index)
    assert warnings(outcome, "listing again")
    assert count(admin, index) == 2


def test_a_wrong_endpoint_shows_within_ten_seconds_at_the_start(make_index, put_csv, load, monkeypatch, admin):
    index = make_index("index", COLUMNS, docs=3)
    prefix = put_csv({"a.csv": ROWS})
    monkeypatch.setattr(base, "BACKOFF_FIRST_S", 0.5)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    began = time.monotonic()
    outcome = load(prefix, index, code=1)
    assert time.monotonic() - began < 13
    assert "127.0.0.1:9" in outcome.last
    assert count(admin, index) == 3


# --- prefixes as the producers leave them -----------------------------------------------------------------------------


def test_redshift(make_index, put_csv, s3, load, admin):
    """UNLOAD ... FORMAT CSV HEADER GZIP MANIFEST VERBOSE, beside the parts of a former and larger one."""
    index = make_index("index", COLUMNS)
    files = {"0000_part_00.gz": gzip.compress(b"k,n\na,1\n"), "0001_part_00.gz": gzip.compress(b'k,n\n"b, c",2\n')}
    prefix = put_csv({**files, "0002_part_00.gz": gzip.compress(b"k,n\nold,9\n")})
    meta = {"content_length": sum(map(len, files.values())), "record_count": 2}
    text = manifest(prefix, files, dict.fromkeys(files, 1), meta=meta, schema={"elements": []},
                    author={"name": "Amazon Redshift", "version": "1.0.0"})  # fmt: skip
    s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}manifest", Body=text.encode())
    load(prefix, index, *READY)
    assert cells(admin, index, "k", "n") == [("a", 1), ("b, c", 2)]


def test_athena(make_index, put_csv, load, admin):
    """The result of a query: all cells quoted, NULL is an unquoted empty cell, and a binary beside it."""
    index = make_index("index", COLUMNS)
    name = "7b0a0d4e-8d4c-4a2c-9a1b-0c5b5d3b8f11"
    outcome = load(put_csv({f"{name}.csv": '"k","n"\n"a","1"\n"b",\n', f"{name}.csv.metadata": b"\x0a\x14\x08"}), index)
    assert cells(admin, index, "k", "n") == [("a", 1), ("b", None)]
    assert "not named *.csv" in outcome.err


def test_snowflake(make_index, put_csv, load, admin):
    r"""COPY INTO with HEADER and quotes; without HEADER it is refused."""
    index = make_index("index", {"K": {"type": "keyword"}, "N": {"type": "long"}})
    parts = [gzip.compress(b'"K","N"\n"a",1\n'), gzip.compress(b'"K","N"\n"b",\n')]
    load(put_csv({f"data_0_{at}_0.csv.gz": part for at, part in enumerate(parts)}), index)
    assert cells(admin, index, "K", "N") == [("a", 1), ("b", None)]
    files = {"data_0_0_0.csv.gz": gzip.compress(b"a,1\n"), "data_0_1_0.csv.gz": gzip.compress(b"b,\\N\n")}
    assert "this part has no header" in load(put_csv(files), index, code=4).last
