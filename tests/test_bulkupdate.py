"""bulkupdate.py: which objects it reads and how, that each row is stored exactly once, and that all adds up."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import bulkupdate
import opensearch_base_manager as base
import pytest
import sandbox
from conftest import (
    NUMBER, WORDS, by_id, count, digest_of, load_arguments, marker_of, meta_of, sources, state_of, wait_until,
)  # fmt: skip
from fault_proxy import after, answer, delayed, edited_items, gateway, lost_answer, refused

pytestmark = pytest.mark.usefixtures("short_pauses")

SCRIPT = Path(bulkupdate.__file__)
MIB = 1024 * 1024


def numbers(first, last):
    return "n\n" + "".join(f"{number}\n" for number in range(first, last + 1))


@pytest.fixture
def start(environment):
    """Start a load as a process of its own, through the proxy if there is one."""
    running = []

    def do(prefix, index, *more, proxy=None):
        env = {**environment, "PATH": os.environ["PATH"]}
        if proxy:
            names = ["OPENSEARCH_ENDPOINT", "OPENSEARCH_USERNAME", "OPENSEARCH_PASSWORD"]
            env |= zip(names, [proxy.endpoint, sandbox.USER, sandbox.PASSWORD])
        words = [sys.executable, str(SCRIPT), *load_arguments(prefix, index, *more)]
        process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        return process

    yield do
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def by_object(admin):
    """Return `_source` of each document by the key of its object less the prefix, in the order of the records."""

    def do(index, prefix, names):
        keys = {digest_of(prefix + key): key for key in names}
        admin("POST", f"/{index}/_refresh")
        hits = admin("POST", f"/{index}/_search", {"size": 10_000})["hits"]["hits"]
        found = {key: [] for key in names}
        for hit in sorted(hits, key=lambda hit: hit["_id"]):
            found[keys[hit["_id"].split("-")[0]]].append(hit["_source"])
        return found

    return do


def ids_of(body):
    """Return the ids of a bulk request."""
    lines = (json.loads(line) for line in body.decode().split("\n")[::2] if line)
    return [next(iter(action.values()))["_id"] for action in lines]


def settings_of(admin, index):
    return admin("GET", f"/{index}/_settings?flat_settings=true")[index]["settings"]


# --- files ------------------------------------------------------------------------------------------------------------

PLAIN = b"k,t\na,b\n"
READABLE = {  # object: its content, its rows
    "bom.csv": (b"\xef\xbb\xbf" + PLAIN, ["ab"]),
    "bom-quoted.csv": (b'\xef\xbb\xbf"k","t"\n"a","b"\n', ["ab"]),
    "bom-inside.csv": ("k,t\n\ufeffa,b\n".encode(), [("\ufeffa", "b")]),
    "crlf.csv": (b"k,t\r\na,b\r\nc,d\r\n", ["ab", "cd"]),
    "crlf-quoted.csv": (b'k,t\r\n"a","two\r\nlines"\r\n"c","d"\r\n', [("a", "two\r\nlines"), "cd"]),
    "quoted.csv": (b'k,t\n"a,b","say ""hi"""\n"\n\n","d"\n', [("a,b", 'say "hi"'), ("\n\n", "d")]),
    "quote-inside.csv": (b'k,t\n5" nail,b\nc,"d"\n', [('5" nail', "b"), "cd"]),
    "no-newline.csv": (b"k,t\na,b\nc,d", ["ab", "cd"]),
    "no-newline-quoted.csv": (b'k,t\na,"b"', ["ab"]),
    "blank-lines.csv": (b"k,t\n\na,b\r\n\r\n\nc,d\n\n", ["ab", "cd"]),
    "other-order.csv": (b"t,k\nb,a\n", ["ab"]),
    "fewer-columns.csv": (b"t\nb\n", [{"t": "b"}]),
    "spaces-in-header.csv": (b" k , t\na,b\n", ["ab"]),
    "header-only.csv": (b"k,t\n", []),
    "header-without-newline.csv": (b"k,t", []),
    "header-only.csv.gz": (gzip.compress(b"k,t\n"), []),
    "nothing.csv.gz": (gzip.compress(b""), []),
    "nothing.csv": (b"", []),
    "packed.csv.gz": (gzip.compress(PLAIN), ["ab"]),
    "packed-bom.csv.gz": (gzip.compress(b"\xef\xbb\xbf" + PLAIN), ["ab"]),
    "packed.csv": (gzip.compress(PLAIN), ["ab"]),
    "plain.csv.gz": (PLAIN, ["ab"]),
    "upper/CASE.CSV.GZ": (gzip.compress(PLAIN), ["ab"]),
    "upper/Plain.CSV": (PLAIN, ["ab"]),
    "members.csv.gz": (b"".join(map(gzip.compress, [b"k,t\na,", b"b\nc,d\n", b"e,f\n"])), ["ab", "cd", "ef"]),
    "a/deep/er/one.csv": (PLAIN, ["ab"]),
    "odd names/ü €+%20&=.csv": (PLAIN, ["ab"]),
}  # fmt: skip
IGNORED = {
    "readme.txt": PLAIN, "data.csv.bak": PLAIN, "data.json": b"{}", "_SUCCESS": b"", "x.csv.gz.tmp": b"", "csv": PLAIN,
    "folder.csv/": b"", "notcsv": PLAIN, "a.gz": gzip.compress(PLAIN),
}  # fmt: skip


def row(cells):
    return cells if isinstance(cells, dict) else dict(zip("kt", cells))


@pytest.mark.quick
def test_every_readable_kind_of_file_gives_its_rows(make_index, put_csv, load, by_object):
    index = make_index("index", WORDS)
    objects = {key: content for key, (content, _) in READABLE.items()}
    prefix = put_csv({**objects, **IGNORED})
    outcome = load(prefix, index)
    found = by_object(index, prefix, READABLE)
    assert found == {key: [row(cells) for cells in rows] for key, (_, rows) in READABLE.items()}
    stored = sum(len(rows) for _, rows in READABLE.values())
    assert outcome.result["objects"] == len(READABLE)
    assert (outcome.result["stored"], outcome.result["skipped"], outcome.result["rejected"]) == (stored, 4, 0)


def test_the_objects_are_logged_and_read_in_key_order(make_index, put_csv, load, proxy):
    index = make_index("index", NUMBER)
    objects = {"b/2.csv": numbers(20, 29), "a.csv": numbers(1, 3), "b/1.CSV": numbers(10, 11), "c.txt": "no"}
    prefix = put_csv(objects)
    outcome = load(prefix, index, "--workers", "1", "--batch-size", "4")
    sent = [json.loads(line)["n"] for body in proxy.seen("POST", "_bulk") for line in body.split(b"\n")[1::2]]
    assert sent == [1, 2, 3, 10, 11, *range(20, 30)]
    size = sum(len(text) for key, text in objects.items() if key != "c.txt")
    assert re.search(rf"3 objects, {size} bytes, from {prefix}a.csv to {prefix}b/2.csv", outcome.err)


DEFECTIVE = {  # object: its content, its good rows, its rejects as line and a word of the reason
    "short.csv": (b"k,t\na\nc,d\n", ["cd"], [(2, "1 cell")]),
    "long.csv": (b"k,t\na,b\nc,d,\ne,f,g,h\n", ["ab"], [(3, "3 cells"), (4, "4 cells")]),
    "space-before-quote.csv": (b'k,t\na, "b,c"\n', [], [(2, "3 cells")]),
    "after-quoted-newline.csv": (b'k,t\n"a\n\n","b"\nc\nd,e\n', [("a\n\n", "b"), "de"], [(5, "cell")]),
    "ragged-and-quoted.csv": (b'k,t\na,b\n"x\ny"\nc,d\n', ["ab", "cd"], [(3, "cell")]),
    "latin-1.csv": (b"k,t\nK\xf6ln,b\nc,d\n", ["cd"], [(2, "UTF-8")]),
    "surrogate.csv": (b"k,t\n\xed\xa0\x80,b\nc,d\n", ["cd"], [(2, "UTF-8")]),
    "cut-character.csv": (b"k,t\nc,d\na,\xe2\x82", ["cd"], [(3, "UTF-8")]),
    "nul.csv": (b"k,t\na\0,b\n\"c\",\"\0\"\ne,f\n", ["ef"], [(2, "NUL"), (3, "NUL")]),
    "after-quote.csv": (b'k,t\n"a" b,c\nd,e\n"f"g,h\ni,j\n', ["de", "ij"], [(2, "CSV"), (4, "CSV")]),
    "lone-return.csv": (b"k,t\na,b\nc\rd,e\nf,g\n", ["ab", "fg"], [(3, "")]),
    "packed.csv.gz": (gzip.compress(b"k,t\n\na\nc,d\n"), ["cd"], [(3, "cell")]),
}  # fmt: skip


@pytest.mark.quick
def test_every_defective_row_is_a_reject_with_its_line_and_the_others_are_stored(
    make_index, put_csv, load, by_object, rejected
):
    index = make_index("index", WORDS)
    prefix = put_csv({key: content for key, (content, _, _) in DEFECTIVE.items()})
    outcome = load(prefix, index, code=3)
    good = {key: [row(cells) for cells in rows] for key, (_, rows, _) in DEFECTIVE.items()}
    assert by_object(index, prefix, DEFECTIVE) == good
    entries = {key: [entry for entry in rejected() if entry["object"] == prefix + key] for key in DEFECTIVE}
    lines = {key: [entry["line"] for entry in found] for key, found in entries.items()}
    assert lines == {key: [line for line, _ in wanted] for key, (_, _, wanted) in DEFECTIVE.items()}
    for key, (_, _, wanted) in DEFECTIVE.items():
        for entry, (_, word) in zip(entries[key], wanted):
            assert word in entry["reason"]
            assert entry["row"]
    assert outcome.result["rejected"] == sum(map(len, lines.values()))
    assert outcome.result["skipped"] == 1


def test_defects_far_down_a_large_file_have_the_right_line(make_index, put_csv, load, rejected, admin):
    index = make_index("index", {"k": {"type": "keyword"}, "n": {"type": "integer"}})
    good = '"' + "word word word\n" * 9 + '",1\n'  # ten lines, so that most blocks end between quotes
    text = good * 3000 + "x,1.5\n\xff,1\n" + good * 3000 + "y,x\nz\n"
    load(put_csv({"a.csv": b"k,n\n" + text.encode("latin-1")}), index, "--max-rejects", "4")
    assert sorted(entry["line"] for entry in rejected()) == [30_002, 30_003, 60_004, 60_005]
    assert count(admin, index) == 6000


@pytest.mark.parametrize(
    ("content", "line", "word"),
    [
        (b'k,t\na,b\nc,"d\ne,f\ng,h\n', 3, "end of the file"),
        (b'k,t\na,b\n"c","d', 3, "end of the file"),
        (b'k,t\n"x\ny",b\n\nc,"' + b"d,e\n" * (9 * MIB // 4), 5, "8 MiB"),
        (b'k,t\na,b\nc,"' + b"d,e\n" * 100_000, 3, "end of the file"),
        (gzip.compress(b"k,t\n" + os.urandom(30_000).hex().encode() + b",b\n")[:-2_000], None, "broken gzip"),
        (gzip.compress(PLAIN)[:-8] + b"12345678", None, "broken gzip"),
        (gzip.compress(PLAIN) + b"trailing", None, "gzip"),
    ],
    ids="at-the-end last-line after-8-mib over-two-blocks gzip-breaks-off gzip-checksum gzip-garbage".split(),
)
def test_a_file_that_hides_how_many_rows_it_has_fails_the_load(content, line, word, make_index, put_csv, load, admin):
    index = make_index("index", WORDS)
    prefix = put_csv({"a.csv": PLAIN, "broken.csv": content})
    outcome = load(prefix, index, code=1)
    assert f"{prefix}broken.csv" in outcome.last
    assert word in outcome.last
    if line:
        assert re.search(rf"\bline {line}\b", outcome.last)
    seen_beforehand = content.endswith(b"12345678")  # small enough to be unpacked whole by the first look
    assert (marker_of(admin, index) is None) == seen_beforehand


UNLOADABLE = {
    "nothing": ({}, "no .csv or .csv.gz object"),
    "other-suffixes": ({"a.txt": PLAIN, "b.csv.bak": b"{}"}, "no .csv or .csv.gz object"),
    "empty-object": ({"a.csv": b""}, ""),
    "no-rows": ({"a.csv": b"k,t\n", "b.csv": b"k,t\n\n\r\n", "c.csv": b""}, "not one data row"),
    "no-rows-packed": ({"a.csv.gz": gzip.compress(b"k,t\n")}, "not one data row"),
    "doubled": ({"a.csv": PLAIN, "b.csv": b"k,t,k\na,b,c\n"}, "b.csv"),
    "inside-a-field": ({"b.csv": b"k,t.x\na,b\n"}, "t.x"),
    "inside-another-column": ({"a.csv": b"k,new\na,1\n", "b.csv": b"k,new.x\na,b\n"}, "new.x"),
    "doubled-after-spaces": ({"b.csv": b"k, k\na,b\n"}, "b.csv"),
    "empty-name": ({"a.csv": PLAIN, "b.csv": b"k,,t\na,b,c\n"}, "b.csv"),
    "blank-name": ({"b.csv": b'k," "\na,b\n'}, "b.csv"),
    "last-name-empty": ({"b.csv": b"k,t,\na,b,c\n"}, "b.csv"),
    "blank-first-line": ({"b.csv": b"\nk,t\na,b\n"}, "b.csv"),
    "dots": ({"b.csv": b"k,a..b\na,b\n"}, "b.csv"),
    "leading-dot": ({"b.csv": b"k,.a\na,b\n"}, "b.csv"),
    "_id": ({"b.csv": b"_id,k\na,b\n"}, "_id"),
    "_source": ({"b.csv": b"k,_source\na,b\n"}, "_source"),
    "nul-in-header": ({"a.csv": PLAIN, "b.csv": b"k,t\0\na,b\n"}, "b.csv"),
    "latin-1-header": ({"a.csv": PLAIN, "b.csv": b"k,gr\xf6\xdfe\na,b\n"}, "b.csv"),
    "unknown-columns": ({"a.csv": PLAIN, "b.csv": b"k;t\na;b\n"}, "delimiter"),
    "utf-16": ({"a.csv": "k,t\na,b\n".encode("utf-16")}, "UTF-16"),
    "utf-16-be": ({"a.csv": b"\xfe\xff" + "k,t\na,b\n".encode("utf-16-be")}, "UTF-16"),
    "utf-16-without-mark": ({"a.csv": "k,t\na,b\n".encode("utf-16-le")}, "UTF-16"),
    "utf-16-packed": ({"a.csv.gz": gzip.compress("k,t\na,b\n".encode("utf-16"))}, "UTF-16"),
    "open-quote-in-header": ({"b.csv": b'k,"t\na,b\n'}, "b.csv: a quote in the header is not closed"),
}
UNLOADABLE_UNDER_ANY_MAPPING = ["no-rows-packed", "blank-first-line", "nul-in-header", "latin-1-header"]


@pytest.mark.parametrize("mapping", [{}, {"properties": WORDS}, {"properties": WORDS, "dynamic": False}])
def test_what_cannot_be_loaded_is_refused_before_anything_is_touched(mapping, make_index, put_csv, run, admin):
    wrong, index, before = {}, "", {}
    for case, (objects, word) in UNLOADABLE.items():
        if mapping != {"properties": WORDS} and case not in UNLOADABLE_UNDER_ANY_MAPPING:
            continue
        if not index:
            index = make_index(f"index-{len(wrong)}", docs=[{"k": "old"}], **mapping)
            before = state_of(admin, index)
        prefix = put_csv({f"{case}/{key}": content for key, content in objects.items()})
        outcome = run(bulkupdate, *load_arguments(f"{prefix}{case}/", index))
        touched = state_of(admin, index) != before
        if outcome.code != 4 or word not in outcome.last or touched:
            wrong[case] = (outcome.code, outcome.last, "touched" if touched else "untouched")
            index = ""  # the next one starts afresh
    assert wrong == {}


@pytest.mark.parametrize(("flag", "delimiter"), [(";", ";"), (r"\t", "\t")])
def test_the_delimiter_can_be_another_one(flag, delimiter, make_index, put_csv, load, admin):
    index = make_index("index", WORDS)
    load(put_csv({"a.csv": f'k,t\na;"x{delimiter}y"\n'.replace(",", delimiter).replace(";", delimiter)}), index,
         "--delimiter", flag)  # fmt: skip
    assert sources(admin, index) == [{"k": "a", "t": f"x{delimiter}y"}]


def test_large_cells_are_kept_and_no_request_exceeds_8_mib(make_index, put_csv, load, admin, proxy):
    index = make_index("index", {"t": {"type": "keyword", "index": False, "doc_values": False}})
    cells = [letter * (2 * MIB) for letter in "abcde"]
    load(put_csv({"a.csv": "t\n" + "\n".join(cells), "b.csv": f't\n"{cells[0]}\n"\n'}), index)
    stored = sorted(document["t"] for document in sources(admin, index))
    assert stored == sorted([*cells, cells[0] + "\n"])
    sizes = [len(body) for body in proxy.seen("POST", "_bulk")]
    assert max(sizes) <= 8 * MIB
    assert len(sizes) <= 3  # and batches are filled


# --- exactly once -----------------------------------------------------------------------------------------------------


def test_ids_are_made_of_the_place_of_a_row_alone(make_index, put_csv, load, admin):
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": numbers(1, 3), "b/ü.csv": "n\n\n7\n"})
    load(prefix, index)
    ids = [hit["_id"] for hit in admin("POST", f"/{index}/_search", {"sort": ["n"]})["hits"]["hits"]]
    assert ids[:3] == [f"{digest_of(prefix + 'a.csv')}-{number:09d}" for number in (1, 2, 3)]
    assert re.fullmatch(rf"{digest_of(prefix + 'b/ü.csv')}-[0-9]{{9}}", ids[3])
    load(prefix, index)
    assert [hit["_id"] for hit in admin("POST", f"/{index}/_search", {"sort": ["n"]})["hits"]["hits"]] == ids


@pytest.mark.parametrize(
    "fault",
    [lost_answer, refused, answer(503), answer(502, "<html>bad gateway</html>"),
     gateway("504 Gateway Time-out", carried_out=True), answer(429, retry_after="1"),
     edited_items(lambda items: items[1:]), edited_items(lambda items: [*items, items[0]]),
     edited_items(lambda items: [])],
    ids=["answer-lost", "never-carried-out", "503", "502", "504, carried out", "429", "items-short", "items-long",
         "items-missing"],
)  # fmt: skip
def test_a_request_without_a_complete_answer_is_sent_again_and_each_row_is_stored_once(
    fault, make_index, put_csv, load, proxy, admin
):
    index = make_index("index", NUMBER)
    proxy.on("POST", "/_bulk", fault, skip=1)
    outcome = load(put_csv({"a.csv": numbers(1, 25)}), index, "--batch-size", "10")
    assert sorted(document["n"] for document in sources(admin, index)) == list(range(1, 26))
    assert (outcome.result["stored"], outcome.result["rejected"]) == (25, 0)
    bodies = proxy.seen("POST", "/_bulk")
    assert len(bodies) == 4
    assert len(set(bodies)) == 3


def test_429_halves_the_number_of_requests_at_a_time(make_index, put_csv, load, proxy):
    index = make_index("index", NUMBER)
    began, ended = {}, {}  # by number of the request; one document each

    def timed(exchange):
        began[exchange.nth] = time.monotonic()
        time.sleep(0.1)
        (exchange.reply(429) if exchange.nth == 1 else exchange.pass_on())
        ended[exchange.nth] = time.monotonic()

    proxy.on("POST", "/_bulk", timed, times=None)
    outcome = load(put_csv({"a.csv": numbers(1, 80)}), index, "--batch-size", "1", "--workers", "4")
    bodies = proxy.seen("POST", "/_bulk")
    assert re.search(r"busy \(429 or 5xx\): at most 2 requests", outcome.err)
    # the refused one has been stored, its worker knows, and what was in flight then has ended
    since = ended[2 + bodies[1:].index(bodies[0])] + 0.1
    late = [moment for moment in began.values() if moment > since]
    at_once = [sum(start <= moment < ended[nth] for nth, start in began.items()) for moment in late]
    assert at_once[0] < 4 == max(at_once)  # one more after each window, up to the given number
    assert len(at_once) > 10


@pytest.mark.parametrize("stays", [True, False])
def test_a_document_of_another_client_with_the_id_of_a_row_is_decided_by_the_count(
    stays, make_index, put_csv, load, proxy, admin
):
    """Its id can hardly be anything but that row; where it is deleted again, the row is missing, and the load fails."""
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": numbers(1, 3)})
    intruder = f"/{index}/_doc/{digest_of(prefix + 'a.csv')}-000000002"

    def intrude(exchange):
        admin("PUT", intruder, {"n": 2})
        exchange.pass_on()
        if not stays:
            admin("DELETE", intruder)

    proxy.on("POST", "/_bulk", intrude)
    outcome = load(prefix, index, code=0 if stays else 1)
    if stays:
        assert (outcome.result["stored"], outcome.result["rejected"], count(admin, index)) == (3, 0, 3)
    else:
        assert f"{index} holds 2 documents, but 3 were stored" in outcome.last
        assert marker_of(admin, index)


def test_a_row_that_was_there_fails_the_load_if_another_run_has_left_the_index_unfinished(
    make_index, put_csv, load, proxy, admin, monkeypatch
):
    """That run may still be loading, on another host: its rows have the same ids, and perhaps older values."""
    monkeypatch.setenv("SKIP_UNCHANGED", "true")
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": numbers(1, 3)})

    def intrude(exchange):
        admin("PUT", f"/{index}/_doc/{digest_of(prefix + 'a.csv')}-000000002", {"n": 7})
        exchange.pass_on()

    proxy.on("POST", "/_bulk", answer(400, {"error": {"type": "parse_exception", "reason": "of a test"}}))
    load(prefix, index, code=1)
    assert marker_of(admin, index)
    proxy.on("POST", "/_bulk", intrude)
    outcome = load(prefix, index, code=1)
    assert f"{index} held 1 of the rows before this run sent them" in outcome.last
    assert marker_of(admin, index)
    load(prefix, index)
    assert sorted(document["n"] for document in sources(admin, index)) == [1, 2, 3]
    proxy.on("POST", "/_bulk", intrude)
    load(prefix, index)  # the index was finished: the cluster's own retry is more likely
    assert "unchanged" not in load(prefix, index, "--dry-run").result


def test_a_missing_permission_ends_the_load_and_is_named_with_the_user(make_index, put_csv, load, proxy):
    index = make_index("index", NUMBER)
    error = {"type": "security_exception", "reason": "no permissions for [indices:data/write/bulk[s]] and User [x]"}
    items = [{"create": {"status": 403, "error": error}}] * 3
    proxy.on("POST", "/_bulk", answer(200, {"errors": True, "items": items}), times=None)
    outcome = load(put_csv({"a.csv": numbers(1, 3)}), index, code=1)
    assert sandbox.USER in outcome.last
    assert "indices:data/write/bulk" in outcome.last
    assert len(proxy.seen("POST", "/_bulk")) == 1


# --- ids from a column ------------------------------------------------------------------------------------------------

KEYED = {"id": {"type": "keyword"}, "n": {"type": "long"}}


def test_a_later_row_replaces_an_earlier_one_of_the_same_id_in_whatever_order_they_arrive(
    make_index, put_csv, load, proxy, admin
):
    index = make_index("index", KEYED)
    rows = [(f"id{number * 7 % 10}", number) for number in range(60)]
    files = {
        f"{place}.csv": "id,n\n" + "".join(f"{key},{number}\n" for key, number in rows[place * 20 : place * 20 + 20])
        for place in range(3)
    }
    proxy.on("POST", "/_bulk", lost_answer, skip=2, times=2)
    proxy.on("POST", "/_bulk", refused, skip=4)
    proxy.on("POST", "/_bulk", delayed(0.5), skip=4)
    outcome = load(put_csv(files), index, "--id-column", "id", "--batch-size", "3", "--workers", "4")
    assert by_id(admin, index) == {key: {"id": key, "n": number} for key, number in rows}
    sums = outcome.result
    assert (sums["read"], sums["stored"], sums["replaced"], sums["documents"]) == (60, 60, 50, 10)


def test_odd_ids_are_kept_and_empty_or_too_long_ones_are_rejects(make_index, put_csv, load, admin, rejected):
    index = make_index("index", KEYED)
    longest = "ü" * 256
    odd = ['a"b', "c\\d", "ü€/ ?#", "007", longest]
    rows = [*odd, "", longest + "x", "x" * 513]
    text = "id,n\n" + "".join(f'"{key.replace(chr(34), chr(34) * 2)}",{number}\n' for number, key in enumerate(rows))
    load(put_csv({"a.csv": text}), index, "--id-column", "id", "--max-rejects", "3")
    assert set(by_id(admin, index)) == set(odd)
    assert [(entry["line"], entry["column"]) for entry in rejected()] == [(line, "id") for line in (7, 8, 9)]


def test_a_row_with_an_id_that_the_mapping_rejects_does_not_count_as_stored(make_index, put_csv, load, admin):
    index = make_index("index", {"id": {"type": "keyword"}, "day": {"type": "date"}})
    prefix = put_csv({"a.csv": "id,day\na,2024-01-01\na,soon\nb,2024-01-02\n\n"})
    outcome = load(prefix, index, "--id-column", "id", code=3)
    assert by_id(admin, index)["a"]["day"] == "2024-01-01"
    assert outcome.result["stored"] == 2


def test_an_object_without_the_id_column_is_refused(make_index, put_csv, load, admin):
    index = make_index("index", KEYED, docs=[{"id": "old"}])
    before = state_of(admin, index)
    outcome = load(put_csv({"a.csv": "id,n\na,1\n", "b.csv": "n\n1\n"}), index, "--id-column", "id", code=4)
    assert "b.csv" in outcome.last
    assert state_of(admin, index) == before


def test_the_later_row_wins_wherever_the_blocks_of_a_large_object_end(make_index, put_csv, load, admin):
    index = make_index("index", {"id": {"type": "keyword"}, "n": {"type": "long"}, "pad": {"type": "keyword"}})
    rows = "".join(f"k{n // 50},{n},{'x' * 30}\n" for n in range(14_000))  # 600 KB: three blocks, the last one short
    outcome = load(put_csv({"a.csv": "id,n,pad\n" + rows}), index, "--id-column", "id", "--batch-size", "500")
    assert {key: source["n"] for key, source in by_id(admin, index).items()} == {
        f"k{at}": at * 50 + 49 for at in range(280)
    }
    assert outcome.result["replaced"] == 14_000 - 280


def test_a_newer_document_in_the_way_of_a_row_is_a_reject_and_no_later_row(make_index, put_csv, load, admin, rejected):
    index = make_index("index", KEYED)
    admin("PUT", f"/{index}/_doc/a?version={9 * 10**18}&version_type=external&refresh=true", {"id": "a", "n": -1})
    outcome = load(put_csv({"a.csv": "id,n\na,1\nb,2\n"}), index, "--id-column", "id", "--no-cleanup", code=3)
    assert outcome.result["rejected"] == 1
    assert [entry["line"] for entry in rejected()] == [2]
    assert by_id(admin, index)["a"]["n"] == -1


# --- adding to what is there ------------------------------------------------------------------------------------------


def test_no_cleanup_adds_to_a_live_index_and_leaves_its_settings_alone(make_index, put_csv, load, proxy, admin, name):
    index = make_index("index", NUMBER, docs=[{"n": -1}], alias=name("alias"), settings={"refresh_interval": "7s"})
    before = admin("GET", f"/{index}")
    outcome = load(put_csv({"a.csv": numbers(1, 5)}), index, "--no-cleanup", "--no-replicas")
    assert sorted(document["n"] for document in sources(admin, index)) == [-1, 1, 2, 3, 4, 5]
    assert admin("GET", f"/{index}") == before
    assert proxy.seen("PUT", "") == []
    assert outcome.result["stored"] == 5


def test_no_cleanup_replaces_documents_of_the_same_id(make_index, put_csv, load, admin, s3):
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": numbers(1, 3)})
    load(prefix, index)
    s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}a.csv", Body=numbers(11, 14))
    outcome = load(prefix, index, "--no-cleanup")
    assert sorted(document["n"] for document in sources(admin, index)) == [11, 12, 13, 14]
    assert (outcome.result["stored"], outcome.result["replaced"]) == (4, 3)


def test_no_cleanup_with_an_id_column_replaces_documents_of_the_same_id(make_index, put_csv, load, admin):
    index = make_index("index", KEYED)
    admin("PUT", f"/{index}/_doc/a", {"id": "a", "n": 0})
    admin("PUT", f"/{index}/_doc/z", {"id": "z", "n": 0})
    for n in (1, 2):
        outcome = load(put_csv({"a.csv": f"id,n\na,{n}\nb,{n}\n"}), index, "--no-cleanup", "--id-column", "id")
    assert {key: document["n"] for key, document in by_id(admin, index).items()} == {"a": 2, "b": 2, "z": 0}
    assert (outcome.result["stored"], outcome.result["replaced"]) == (2, 2)


def test_two_loads_that_add_may_run_side_by_side_and_store_each_row_once(make_index, put_csv, start, proxy, admin):
    index = make_index("index", NUMBER, docs=[{"n": 0}])
    both = threading.Barrier(2, timeout=30)

    def meet(exchange):
        both.wait()
        exchange.pass_on()

    proxy.on("POST", "/_bulk", meet, times=2)  # a load has one worker: one of each
    prefixes = [put_csv({f"{place}/a.csv": numbers(place * 100, place * 100 + 49)}) + f"{place}/" for place in (1, 2)]
    words = ["--no-cleanup", "--workers", "1", "--batch-size", "10"]
    loads = [start(prefix, index, *words, proxy=proxy) for prefix in prefixes]
    for process in loads:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert json.loads(out)["stored"] == 50
    assert sorted(document["n"] for document in sources(admin, index)) == [0, *range(100, 150), *range(200, 250)]


def test_two_loads_of_the_same_second_each_keep_their_rejects(make_index, put_csv, load, rejected, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "20260102T030405Z")
    index = make_index("index", NUMBER)
    prefixes = [put_csv({f"{place}/a.csv": f"n\n{place}\nx{place}\n"}) + f"{place}/" for place in (1, 2)]
    for prefix in prefixes:
        load(prefix, index, "--no-cleanup", code=3)
    assert sorted(entry["row"]["n"] for entry in rejected()) == ["x1", "x2"]


# --- it adds up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "variable", "code"),
    [([], "", 3), (["--max-rejects", "1"], "", 3), (["--max-rejects", "2"], "", 0), ([], "2", 0),
     (["--max-rejects", "1"], "2", 3)],
)  # fmt: skip
def test_rejects_are_accepted_up_to_max_rejects(words, variable, code, make_index, put_csv, load, monkeypatch, admin):
    monkeypatch.setenv("MAX_REJECTS", variable)
    index = make_index("index", NUMBER)
    outcome = load(put_csv({"a.csv": "n\n1\nx\n\n2\ny\n"}), index, *words, code=code)
    sums = [outcome.result[name] for name in ("read", "stored", "rejected", "skipped", "documents")]
    assert sums == [5, 2, 2, 1, 2]
    assert count(admin, index) == 2
    assert not marker_of(admin, index)  # it holds all that it can hold


def test_the_rejects_file_is_named_in_the_result_and_private_and_old_ones_go(make_index, put_csv, load, tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    for days in (29, 31):
        (logs / f"rejects-x-{days}.ndjson").write_text("")
        os.utime(logs / f"rejects-x-{days}.ndjson", (time.time() - days * 86400,) * 2)
    index = make_index("index", NUMBER)
    outcome = load(put_csv({"a.csv": "n\n1\nx\n"}), index, code=3)
    file = Path(outcome.result["rejects_file"])
    assert file.parent == logs
    assert re.fullmatch(rf"rejects-{index}-\d{{8}}T\d{{6}}Z.*\.ndjson", file.name)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert set(json.loads(file.read_text())) == {"object", "line", "column", "reason", "row"}
    assert str(file) in outcome.last
    assert sorted(path.name for path in logs.iterdir()) == sorted([file.name, "rejects-x-29.ndjson"])


def test_more_than_10_000_rejects_end_the_load_unless_more_are_accepted(make_index, put_csv, load, admin):
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": "n\n1\n" + "x\n" * 10_001})
    outcome = load(prefix, index, code=1)
    assert "10,000" in outcome.last
    assert marker_of(admin, index)
    time.sleep(1)  # the file's name holds the second
    assert load(prefix, index, "--max-rejects", "10001").result["rejected"] == 10_001
    assert not marker_of(admin, index)


CHANGES = {
    "new": lambda s3, prefix: s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}c.csv", Body=b"n\n9\n"),
    "changed": lambda s3, prefix: s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}a.csv", Body=b"n\n8\n9\n"),
    "deleted": lambda s3, prefix: s3.delete_object(Bucket=sandbox.BUCKET, Key=f"{prefix}a.csv"),
}


@pytest.mark.parametrize(
    ("change", "key", "words", "method", "path"),
    [
        ("new", "c.csv", [], "POST", "/_bulk"), ("changed", "a.csv", [], "POST", "/_bulk"),
        ("deleted", "a.csv", [], "POST", "/_bulk"), ("changed", "a.csv", ["--no-cleanup"], "POST", "/_bulk"),
        ("changed", "a.csv", [], "PUT", "/_mapping"), ("deleted", "a.csv", [], "PUT", "/_mapping"),  # not read yet
    ],
)  # fmt: skip
def test_a_producer_that_is_still_writing_fails_the_load(
    change, key, words, method, path, make_index, put_csv, load, proxy, s3, admin
):
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": numbers(1, 3), "b.csv": numbers(4, 6)})
    proxy.on(method, path, after(lambda: CHANGES[change](s3, prefix)))
    outcome = load(prefix, index, *words, code=1)
    assert prefix + key in outcome.last
    assert bool(marker_of(admin, index)) == (not words)


def test_another_client_that_writes_meanwhile_fails_the_load(make_index, put_csv, load, proxy, admin):
    index = make_index("index", NUMBER)
    proxy.on("POST", "/_bulk", after(lambda: admin("POST", f"/{index}/_doc", {"n": 0})))
    outcome = load(put_csv({"a.csv": numbers(1, 3)}), index, code=1)
    assert "4" in outcome.last
    assert marker_of(admin, index)
    assert "index.refresh_interval" not in settings_of(admin, index)


@pytest.mark.parametrize("words", [[], ["--no-cleanup"]])
def test_an_index_that_another_client_replaced_meanwhile_fails_the_load(words, make_index, put_csv, load, proxy, admin):
    index = make_index("index", NUMBER)

    def replace():
        admin("DELETE", f"/{index}")
        admin("PUT", f"/{index}", {"mappings": {"properties": NUMBER}})
        for n in (1, 2, 3):
            admin("POST", f"/{index}/_doc", {"n": n})

    proxy.on("POST", "/_bulk", after(replace))
    outcome = load(put_csv({"a.csv": numbers(1, 3)}), index, *words, code=1)
    assert "deleted and recreated" in outcome.last


@pytest.fixture
def seen_meanwhile(proxy, admin):
    """Return what settings and `_meta` are while the first documents are stored."""
    seen = {}

    def watch(index):
        def look():
            seen.update(settings=settings_of(admin, index), meta=meta_of(admin, index))

        proxy.on("POST", "/_bulk", after(look))
        return seen

    return watch


@pytest.mark.parametrize("interval", [None, "7s", "-1"])
def test_settings_and_meta_change_for_the_time_of_the_load_only(
    interval, make_index, put_csv, load, proxy, admin, seen_meanwhile
):
    settings = {"number_of_replicas": 1, **({"refresh_interval": interval} if interval else {})}
    foreign = {"owner": "team a", "nested": {"deep": [1, None]}}
    index = make_index("index", NUMBER, docs=3, settings=settings, _meta=foreign)
    before = admin("GET", f"/{index}")
    seen = seen_meanwhile(index)
    load(put_csv({"a.csv": numbers(1, 9)}), index, "--no-replicas")
    assert admin("GET", f"/{index}") == before
    assert count(admin, index) == 9
    assert seen["settings"]["index.refresh_interval"] == "-1"
    assert seen["settings"]["index.number_of_replicas"] == "0"
    assert {name: seen["meta"][name] for name in foreign} == foreign
    assert set(seen["meta"][base.SUITE]) == {"started", "host", "found", "set"}
    assert seen["meta"][base.SUITE]["found"]["index.number_of_replicas"] == "1"


@pytest.mark.parametrize(("words", "replicas"), [([], "1"), (["--no-replicas"], "0-1")])
def test_replicas_stay_as_they_are_unless_asked_and_never_where_they_expand_by_themselves(
    words, replicas, make_index, put_csv, load, proxy, admin
):
    setting = "auto_expand_replicas" if "-" in replicas else "number_of_replicas"
    index = make_index("index", NUMBER, settings={setting: replicas})
    before = settings_of(admin, index)
    load(put_csv({"a.csv": numbers(1, 3)}), index, *words)
    assert settings_of(admin, index) == before
    sent = proxy.seen("PUT", "/_settings")
    assert sent
    assert not any(b"replicas" in body for body in sent)


def test_a_failed_load_keeps_its_marker_and_restores_settings(make_index, put_csv, load, proxy, admin):
    index = make_index("index", NUMBER, settings={"refresh_interval": "7s", "number_of_replicas": 1}, _meta={"a": 1})
    before = settings_of(admin, index)
    proxy.on("POST", "/_bulk", answer(400, {"error": {"type": "odd_exception", "reason": "no"}, "status": 400}))
    outcome = load(put_csv({"a.csv": numbers(1, 3)}), index, "--no-replicas", code=1)
    assert "odd_exception" in outcome.last
    assert settings_of(admin, index) == before
    assert meta_of(admin, index)["a"] == 1
    assert set(marker_of(admin, index)) == {"started", "host", "found", "set"}
    load(put_csv({"a.csv": numbers(1, 3)}), index)
    assert meta_of(admin, index) == {"a": 1}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_next_run_restores_the_settings_of_a_stopped_one(number, make_index, put_csv, load, start, proxy, admin):
    index = make_index("index", NUMBER, docs=2, settings={"refresh_interval": "7s", "number_of_replicas": 1})
    before = settings_of(admin, index)
    prefix = put_csv({"a.csv": numbers(1, 40)})
    released = threading.Event()

    def hang(exchange):
        released.wait(60)
        exchange.drop()

    proxy.on("POST", "/_bulk", hang, skip=2, times=None)
    process = start(prefix, index, "--no-replicas", "--batch-size", "10", proxy=proxy)
    wait_until(lambda: len(proxy.seen("POST", "/_bulk")) >= 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    released.set()
    proxy.rules.clear()
    assert process.returncode == (-9 if number == signal.SIGKILL else 143)
    assert out == ""
    left = settings_of(admin, index)
    changed = {"index.refresh_interval": "-1", "index.number_of_replicas": "0"} if number == signal.SIGKILL else {}
    assert {name: value for name, value in left.items() if value != before.get(name)} == changed, err
    assert marker_of(admin, index)
    outcome = load(prefix, index)
    assert "unfinished" in outcome.err
    assert settings_of(admin, index) == before
    assert meta_of(admin, index) == {}
    assert sorted(document["n"] for document in sources(admin, index)) == list(range(1, 41))


# --- dry run, the real flights ----------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("words", [[], ["--no-cleanup"]])
def test_a_dry_run_changes_nothing_and_only_logs_that_an_index_is_live(
    words, make_index, put_csv, load, proxy, admin, name, tmp_path
):
    index = make_index("index", NUMBER, docs=3, alias=name("alias"))
    before = state_of(admin, index)
    outcome = load(put_csv({"a.csv": "n,new\n1,2\n"}), index, "--dry-run", *words)
    assert state_of(admin, index) == before
    others = {path.split("?")[0] for method, path, _ in proxy.requests if method not in ("GET", "HEAD")}
    assert others <= {f"/{index}/_refresh"}
    assert re.search(rf"live.*{name('alias')}", outcome.err)
    assert not list(tmp_path.glob("logs/*.ndjson"))


MEASURED = """
import sys, bulkupdate
code = bulkupdate.main(sys.argv[1:])
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))  # KiB, of this program
print(peak)
raise SystemExit(code)
"""


@pytest.mark.timeout(900)  # a busy machine; usually 30 s
def test_a_year_needs_no_more_memory_than_a_month_and_each_row_of_a_month_arrives(make_index, environment, admin):
    mapping = sandbox.FLIGHTS_MAPPING["properties"]
    peaks, indices = [], [make_index(suffix, mapping, settings={"max_result_window": 50_000}) for suffix in "ab"]
    for prefix, index in zip([f"{sandbox.PREFIX}flights-01", sandbox.PREFIX], indices):
        words = [sys.executable, "-c", MEASURED, *load_arguments(prefix, index, "--workers", "3")]  # or that differs
        env = {**environment, "PATH": os.environ["PATH"], "PYTHONPATH": str(SCRIPT.parent)}
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    month, year = peaks
    assert abs(year - month) < 30  # a year is 31 MB of CSV; what is read ahead and the allocator make 10 to 21
    assert max(peaks) < 110
    assert count(admin, indices[1]) == 336_776

    with sandbox.month_files()[0].open(newline="") as file:
        rows = [
            {name: int(cell) if name in sandbox.INTEGERS else cell for name, cell in row.items()
             if not (cell in ("", "NA") and mapping[name]["type"] != "keyword")}
            for row in csv.DictReader(file)
        ]  # fmt: skip
    hits = admin("POST", f"/{indices[0]}/_search", {"size": 50_000, "sort": ["_id"]})["hits"]["hits"]
    assert len(hits) == len(rows)
    wrong = [(hit["_id"], hit["_source"], row) for hit, row in zip(hits, rows) if hit["_source"] != row]
    assert wrong == []


def test_a_record_may_be_larger_than_one_cell_may_be(make_index, put_csv, load, admin):
    text = {"type": "text", "index": False}
    index = make_index("index", {"a": text, "b": text})
    lines = "y\n" * (2 * MIB)
    outcome = load(put_csv({"a.csv": f'a,b\n{"x" * 5 * MIB},"{lines}"\n'}), index)
    assert outcome.result["stored"] == 1
    assert len(sources(admin, index)[0]["b"]) == 4 * MIB


def test_a_signal_while_settings_are_restored_after_a_failure_does_not_stop_that(
    make_index, put_csv, start, proxy, admin
):
    index = make_index("index", NUMBER)
    proxy.on("POST", "/_bulk", answer(400, {"error": {"type": "x", "reason": "y"}}), times=None)
    proxy.on("PUT", "/_settings", answer(503), skip=1, times=None)  # the first one sets the refresh interval to -1
    process = start(put_csv({"a.csv": numbers(1, 5)}), index, proxy=proxy)
    wait_until(lambda: len(proxy.seen("PUT", "/_settings")) >= 3)
    proxy.rules.clear()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert "refresh_interval" not in admin("GET", f"/{index}/_settings")[index]["settings"]["index"]
    assert marker_of(admin, index)


# --- is the producer done, are the files new? -------------------------------------------------------------------------


@pytest.fixture
def aged(s3_proxy):
    """Let S3 say that objects of a prefix were written so many hours ago: `aged(prefix, {"a.csv": 30})`."""

    def age(prefix, hours):
        def change(exchange):
            response = exchange.forward()
            text = re.sub(r">\s+<", "><", response.text)
            for key, old in hours.items():
                written = datetime.now(timezone.utc) - timedelta(hours=old)
                place = rf"(<Key>{prefix}{key}</Key><LastModified>)[^<]*"
                text = re.sub(place, rf"\g<1>{written:%Y-%m-%dT%H:%M:%S}.000Z", text)
            exchange.reply(response.status_code, text, {"Content-Type": "application/xml"})

        s3_proxy.on("GET", "list-type=2", change, times=None)

    return age


@pytest.fixture
def load_of(make_index, run):
    """Load a prefix into a new index of three documents; return the outcome, and how many it holds then."""

    def load(prefix, *more):
        index = make_index("index", {"n": {"type": "long"}}, docs=3)
        return run(bulkupdate, *load_arguments(prefix, index, *more)), index

    return load


@pytest.mark.parametrize(
    ("hours", "more", "code", "says"),
    [
        ({"a.csv": 30, "b.csv": 25.5}, ["--max-age-hours", "25"], 4,
         r"b\.csv \(\S+Z\), is 25\.5 h old, more than .*\(25\)"),
        ({"a.csv": 30, "b.csv": 25.5}, ["--max-age-hours", "26"], 0, ""),
        ({"a.csv": 30, "b.csv": 25.5}, [], 0, ""),
        ({"a.csv": 30, "b.csv": -2}, ["--max-age-hours", "0"], 0, ""),
    ],
    ids=["too old", "young enough", "no limit", "from the future"],
)  # fmt: skip
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
def test_files_older_than_the_limit_are_refused_untouched(hours, more, code, says, dry, aged, load_of, put_csv, admin):
    prefix = put_csv({"a.csv": "n\n7\n", "b.csv": "n\n8\n"})
    aged(prefix, hours)
    outcome, index = load_of(prefix, *more, *dry)
    assert outcome.code == code, outcome.err
    assert re.search(says, outcome.last)
    assert count(admin, index) == (2 if code == 0 and not dry else 3)
    newest = rf"newest object is \S+b\.csv \(\S+Z\), {hours['b.csv']:.1f} h old"
    assert re.search(rf"{newest}, the oldest \S+a\.csv \(\S+Z\), 30\.0 h", outcome.err)


@pytest.mark.parametrize(
    ("objects", "hours", "code", "says"),
    [
        ({}, {}, 4, r"_SUCCESS \(READY_OBJECT\) is missing; .*run again when the producer has finished"),
        ({"_SUCCESS": ""}, {"a.csv": 1, "_SUCCESS": 2}, 4,
         r"_SUCCESS \(READY_OBJECT\) is older \(\S+Z\) than .*a\.csv \(\S+Z\)"),
        ({"_SUCCESS": ""}, {"a.csv": 2, "_SUCCESS": 1}, 0, ""),
        ({"_SUCCESS": ""}, {"a.csv": 2, "_SUCCESS": 2}, 0, ""),
    ],
    ids=["missing", "older", "newer", "of the same moment"],
)  # fmt: skip
def test_a_producer_that_has_not_finished_is_waited_for(
    objects, hours, code, says, aged, load_of, put_csv, admin, monkeypatch
):
    monkeypatch.setenv("READY_OBJECT", "_SUCCESS")
    prefix = put_csv({"a.csv": "n\n7\n", **objects})
    aged(prefix, hours)
    outcome, index = load_of(prefix)
    assert outcome.code == code, outcome.err
    assert re.search(says, outcome.last)
    assert count(admin, index) == (1 if code == 0 else 3)


def test_a_manifest_that_is_a_csv_file_is_not_loaded(load_of, put_csv, admin):
    outcome, index = load_of(put_csv({"a.csv": "n\n7\n", "manifest.csv": "n\n8\n"}), "--ready-object", "manifest.csv")
    assert outcome.code == 0, outcome.err
    assert sources(admin, index) == [{"n": 7}]


def test_an_object_that_is_written_again_as_it_was_is_no_change(load_of, put_csv, proxy, s3, admin):
    prefix = put_csv({"a.csv": "n\n7\n"})

    def again():
        time.sleep(1.1)  # S3 tells whole seconds
        s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}a.csv", Body=b"n\n7\n")

    proxy.on("POST", "/_bulk", after(again))
    outcome, index = load_of(prefix)
    assert outcome.code == 0, outcome.err
    assert sources(admin, index) == [{"n": 7}]


# --- at the pace of what is on the other end --------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_a_load_and_its_deletion_are_throttled_evenly(by, make_index, put_csv, load, proxy, monkeypatch):
    index = make_index("index", NUMBER, docs=30)
    if by == "variable":
        monkeypatch.setenv("REQUESTS_PER_SECOND", "100")
    outcome = load(put_csv({"a.csv": numbers(1, 90)}), index, *["--requests-per-second=100"] * (by == "flag"))
    assert outcome.result["documents"] == 90
    assert outcome.result["seconds"] >= 1
    bodies = proxy.seen("POST", "/_bulk")
    assert [len(ids_of(body)) for body in bodies] == [10] * 9
    [path] = [path for verb, path, _ in proxy.requests if verb == "POST" and "_delete_by_query" in path]
    assert "requests_per_second=100" in path
    assert "scroll_size=10&" in path + "&"


def test_the_number_of_requests_follows_a_distant_cluster_and_is_reported(make_index, put_csv, load, proxy):
    proxy.on("POST", "/_bulk", delayed(0.5), times=None)
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": numbers(1, 120)})
    outcome = load(prefix, index, "--batch-size", "1")
    assert outcome.result["requests_under_way"] == 64  # 120 batches for a cluster that seems to work on all at once
    assert "at most 64 requests in flight" in outcome.err
    assert "requests_under_way=" in outcome.last
    few = put_csv({"b.csv": numbers(1, 12)})
    assert load(few, index, "--batch-size", "1", "--workers", "4").result["requests_under_way"] == 4


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_read_that_hangs_does_not_keep_the_process(part, make_index, put_csv, start, s3_proxy):
    """Whatever a thread waits for, after a signal the process ends within its clean-up time."""
    released = threading.Event()
    skip = 2 if part == "body" else 0
    files = {"a.csv": numbers(1, 30_000), "b.csv": numbers(1, 30_000)}
    rule = s3_proxy.on("GET", r"\.csv", lambda exchange: released.wait(60), skip=skip, times=None)
    process = start(put_csv(files), make_index("index", NUMBER))
    wait_until(lambda: rule.seen > skip)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(30) == 143
    assert time.monotonic() - began < 10
    released.set()
