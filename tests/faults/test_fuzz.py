"""Whatever bytes come as a CSV file: each row is stored with the right values or rejected with its line, nothing else.

The oracle reads a whole file at once with csv.reader, and types its cells by the rules of the README; it shares no code
with the scripts. By default some hundred examples, the same ones each time; with --faults many more, new each time.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import bulkupdate
import pytest
import sandbox
from conftest import OWN, digest_of, sources, state_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .driver import QUIET, profiles

# --- what has to come out ---------------------------------------------------------------------------------------------

TYPES = {"word": "keyword", "n": "long", "small": "byte", "half": "double", "flag": "boolean", "any": "object"}
RANGES = {"long": 2**63, "byte": 2**7}
EMPTY = ["", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None"]
BOOLEANS = {**dict.fromkeys(["true", "yes", "t", "1"], True), **dict.fromkeys(["false", "no", "f", "0"], False)}
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def exact(text: str) -> Any:
    """Parse JSON with all digits of its numbers."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_int=Decimal, parse_float=Decimal, parse_constant=refuse)


def value_of(kind: str, cell: str) -> Any:
    """Return what a cell stands for, None for nothing. Raises ValueError where the row is a reject."""
    bare = cell.strip()
    if kind == "keyword":
        return cell or None
    if bare in EMPTY:
        return None
    if kind == "object":
        return exact(cell)
    if kind == "boolean":
        if bare.lower() not in BOOLEANS:
            raise ValueError(bare)
        return BOOLEANS[bare.lower()]
    if not NUMBER.fullmatch(bare):
        raise ValueError(bare)
    value = Decimal(bare)
    if kind in RANGES and not (value == value.to_integral_value() and -RANGES[kind] <= value < RANGES[kind]):
        raise ValueError(bare)
    return value


@dataclass
class Expected:
    """What a load must do: documents by line, lines of rejects, and the line of a quote that is never closed."""

    documents: dict[int, dict[str, Any]] = field(default_factory=dict)
    records: dict[int, int] = field(default_factory=dict)  # the number of the record, by line
    rejects: list[int] = field(default_factory=list)
    skipped: int = 0
    open_at: int | None = None


def expected(content: bytes, columns: list[str], delimiter: str) -> Expected:
    text = content.decode(errors="surrogateescape").removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    next(reader)
    found = Expected()
    for record in itertools.count(1):
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return found
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                found.open_at = line
                return found
            row = None
        if row is not None and (not any(row) or (len(row) > 1 and [cell.strip() for cell in row] == columns)):
            found.skipped += 1  # a blank line, empty cells, or the header once more
            continue
        try:
            if row is None or len(row) != len(columns) or re.search("[\0\ud800-\udfff]", "".join(row)):
                raise ValueError
            values = {name: value_of(TYPES[name], cell) for name, cell in zip(columns, row)}
        except ValueError:
            found.rejects.append(line)
        else:
            found.records[line] = record
            found.documents[line] = {name: value for name, value in values.items() if value is not None}
    raise AssertionError


# --- what comes in ----------------------------------------------------------------------------------------------------

DELIMITERS = [",", ";", "\t", "|", " ", "x", "1", ".", "€", "\x1f", "\u2028", "\x85", "\x0b"]
GOOD = {
    "keyword": ["a", "", "NA", " a ", "007", "ü€𝄞", "a\u2028b", "\x1b[2K", "\x7f", "\\", "\\n", "'", "{}", "\ufeff",
                "a\nb"],
    "long": ["7", "-7", "+7", "007", " 7 ", "517.0", "5e2", "", "NA", "9223372036854775807", "-0", "7.",
             "-9223372036854775808", "\u00a07", "7\u2003"],
    "byte": ["1", "127", "-128", "12.7e1", "", "null"],
    "double": ["0.5", ".5", "5.", "-1e-9", "+1E5", "00.10", "0.1000000000000000055511151231257827", "", "None"],
    "boolean": ["true", "F", "Yes", "no", "1", "0", " t ", "", "null", "TRUE"],
    "object": ['{"a": 1}', "[1, 2.50]", '"x"', "7", "true", "", "NaN", '{"a":\n[]}', '{"\\u0000": "\\ud834\\udd1e"}'],
}  # fmt: skip
DOUBTFUL = [
    "a", "5.5", "1_0", "٣", "9223372036854775808", "-9223372036854775809", "1,000", "inf", "nan", ".", "1e99", "0x7",
    "128", "-129", "e5", "2", "tru", "{", "[NaN]", '{"a": "\r\n"}', "[" * 50 + "]" * 50, "\0", '"', "\n", "\r", "\r\n",
]  # fmt: skip
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=4)
TOKENS = [
    b'"', b'"', b'""', b"\n", b"\n", b"\r\n", b"\r", b"\0", b"\xff", b"\xed\xa0\x80", b"\xc3", b"\xe2\x82\xac", b" ",
    b"a", b"1", b"-1", b"0.5", b"true", b"NA", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85", b"\x0b", b"\x1a", b"\\",
]  # fmt: skip


@st.composite
def tame_row(draw: st.DrawFn, columns: list[str], delimiter: str) -> bytes:
    """A row as a program would write it, each cell quoted where it has to be, and sometimes where it need not be."""
    cells = []
    for name in columns:
        kind = draw(st.integers(0, 30))
        choice = {0: st.sampled_from(DOUBTFUL), 1: ANY_TEXT}.get(kind, st.sampled_from(GOOD[TYPES[name]]))
        cell = draw(choice)
        if kind == 2 or any(mark in cell for mark in (delimiter, '"', "\n", "\r")):
            cell = '"' + cell.replace('"', '""') + '"'
        cells.append(cell)
    return delimiter.join(cells).encode() + draw(st.sampled_from([b"\n", b"\n", b"\r\n"]))


@st.composite
def wild_row(draw: st.DrawFn, delimiter: str) -> bytes:
    """Anything at all; it need not even end."""
    tokens = st.sampled_from([*TOKENS, *[delimiter.encode()] * 8])
    return b"".join(draw(st.lists(tokens, max_size=12) | st.lists(st.binary(max_size=3), max_size=4)))


@st.composite
def csv_file(draw: st.DrawFn, columns: list[str], delimiter: str) -> bytes:
    wild = draw(st.sampled_from([0, 0, 1, 3, 10]))  # of ten rows
    bom = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"]))
    header = delimiter.join(f'"{name}"' if delimiter in name else name for name in columns).encode()
    rows = draw(st.integers(0, 25))
    body = b"".join(
        draw(wild_row(delimiter) if draw(st.integers(1, 10)) <= wild else tame_row(columns, delimiter))
        for _ in range(rows)
    )
    content = bom + header + draw(st.sampled_from([b"\n", b"\r\n"])) + body
    return content.removesuffix(b"\n") if draw(st.booleans()) else content


@dataclass
class Case:
    columns: list[str]
    delimiter: str
    contents: list[bytes]


@st.composite
def cases(draw: st.DrawFn, most: int = 1) -> Case:
    """Some files with the same columns and delimiter."""
    columns = draw(st.lists(st.sampled_from(list(TYPES)), min_size=1, unique=True))
    delimiter = draw(st.sampled_from(DELIMITERS))
    return Case(columns, delimiter, draw(st.lists(csv_file(columns, delimiter), min_size=1, max_size=most)))


# --- the pipeline, from the bytes of an object to the requests --------------------------------------------------------


class Columns(dict[str, bulkupdate.Column]):
    """Knows damaged names too: the look at the head would have added them."""

    def __missing__(self, name: str) -> bulkupdate.Column:
        return bulkupdate.Column(name, "text")


class Pipeline:
    """Makes the requests of one object, with pieces of any size, by the fast path or row by row."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.fast, self.slow = patch, 0, 0
        self.render, self.by_rows = bulkupdate.Renderer._render, False
        patch.setattr(bulkupdate.Renderer, "_render", lambda *given: self.counted(*given))

    def counted(self, renderer: bulkupdate.Renderer, source: Any, rows: Any) -> str:
        if len(rows) == 1:
            return self.render(renderer, source, rows)
        if self.by_rows:
            raise ValueError("row by row")
        try:
            text = self.render(renderer, source, rows)
        except ValueError:
            self.slow += 1
            raise
        self.fast += 1
        return text

    def run(self, content: bytes, delimiter: str, chunk: int, *, by_rows: bool = False, id_column: str = "") -> Output:
        self.by_rows = by_rows
        self.patch.setattr(bulkupdate, "CHUNK_BYTES", chunk)
        rejects: list[int] = []

        def reject(key: str, line: int, defect: bulkupdate.Defect) -> None:
            assert str(defect)
            rejects.append(line)

        renderer = bulkupdate.Renderer(TYPES, reject, bucket=sandbox.BUCKET, id_column=id_column)
        renderer.columns, renderer.first_version = Columns(renderer.columns), 1
        documents, error = [], ""
        try:
            columns, blocks = bulkupdate.read_csv(bulkupdate.unpacked(io.BytesIO(content)), "a.csv", delimiter)
            for batch in bulkupdate.batches(renderer.documents("a.csv", columns, blocks), 3):
                documents += [(line, part.body) for part in batch.documents() for _, [line] in part.origins]
        except bulkupdate.OperationFailed as failure:
            error = str(failure)
        return Output(documents, rejects, renderer.skipped, renderer.read, error)


@dataclass
class Output:
    documents: list[tuple[int, bytes]]
    rejects: list[int]
    skipped: int
    read: int
    error: str

    def parsed(self) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
        for line, body in self.documents:
            action, document, end = body.decode().split("\n")
            assert end == ""
            yield line, json.loads(action), exact(document)


@pytest.fixture
def pipeline(monkeypatch):
    made = Pipeline(monkeypatch)
    yield made
    assert made.fast > 20  # or only one of the two ways was tried
    assert made.slow > 20


@profiles(400, 20_000)
def test_whatever_bytes_come_each_row_becomes_its_document_or_a_reject_with_its_line(pipeline, profile):
    @profile
    @given(cases(), st.integers(1, 80), st.booleans())
    def holds(case: Case, chunk: int, zipped: bool) -> None:
        [content] = case.contents
        wanted = expected(content, case.columns, case.delimiter)
        packed = gzip.compress(content, 1, mtime=0) if zipped else content
        whole = pipeline.run(packed, case.delimiter, 16 * 1024)
        pieces = pipeline.run(packed, case.delimiter, chunk)
        rows = pipeline.run(packed, case.delimiter, chunk, by_rows=True)
        if wanted.open_at:
            for output in (whole, pieces, rows):
                assert re.search(rf"a\.csv, line {wanted.open_at}: a quote .* is still open at the end", output.error)
            return
        assert whole == pieces == rows
        assert whole.error == ""
        assert whole.rejects == wanted.rejects
        assert whole.skipped == wanted.skipped
        assert whole.read == len(whole.documents) + len(whole.rejects) + whole.skipped
        ids = {line: f"{digest_of('a.csv')}-{record:09d}" for line, record in wanted.records.items()}
        assert list(whole.parsed()) == [
            (line, {"create": {"_id": ids[line]}}, document) for line, document in wanted.documents.items()
        ]

    holds()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_an_id_from_a_column_is_that_cell_and_rises_in_version_with_the_rows(pipeline):
    @settings(max_examples=5000, print_blob=True, **QUIET)
    @given(cases(), st.integers(1, 80), st.data())
    def holds(case: Case, chunk: int, data: st.DataObject) -> None:
        [content] = case.contents
        column = data.draw(st.sampled_from(case.columns))
        wanted = expected(content, case.columns, case.delimiter)
        output = pipeline.run(content, case.delimiter, chunk, id_column=column)
        assert output == pipeline.run(content, case.delimiter, chunk, id_column=column, by_rows=True)
        if wanted.open_at:
            return
        found = list(output.parsed())
        without_id = set(wanted.documents) - {line for line, _, _ in found}
        assert sorted(output.rejects) == sorted([*wanted.rejects, *without_id])
        assert [document for _, _, document in found] == [
            document for line, document in wanted.documents.items() if line not in without_id
        ]
        actions = [action["index"] for _, action, _ in found]
        versions = [action["version"] for action in actions]
        assert versions == sorted(set(versions))
        assert all(action["_id"] and action["version_type"] == "external" for action in actions)
        for (_, _, document), action in zip(found, actions):
            if TYPES[column] == "keyword":
                assert document[column] == action["_id"]
        cells = [str(wanted.documents[line].get(column, "")) for line in without_id]
        assert all(cell.strip() in ("", r"\N") for cell in cells)  # none here is too long

    holds()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_gzip_that_is_cut_or_damaged_never_passes_for_a_whole_file(pipeline):
    @settings(max_examples=3000, print_blob=True, **QUIET)
    @given(cases(), st.integers(1, 80), st.data())
    def holds(case: Case, chunk: int, data: st.DataObject) -> None:
        [content] = case.contents
        packed = gzip.compress(content, mtime=0)
        whole = pipeline.run(packed, case.delimiter, chunk)
        cut = pipeline.run(packed[: data.draw(st.integers(2, len(packed) - 1))], case.delimiter, chunk)
        assert cut.error
        place = data.draw(st.integers(10, len(packed) - 1))  # the header of gzip is not covered by its checksum
        damaged = packed[:place] + bytes([packed[place] ^ data.draw(st.integers(1, 255))]) + packed[place + 1 :]
        output = pipeline.run(damaged, case.delimiter, chunk)
        assert output.error or output == whole

    holds()


# --- the whole load, against the server -------------------------------------------------------------------------------


def visible(admin):
    """Return the indices that there are, less the server's own and those of tests that run at the same time."""
    others = re.compile(rf"\.|t-(?!{OWN.removeprefix('t-')}-)")
    return {index for index in admin("GET", "/_alias") if not others.match(index)}


@pytest.fixture
def load_contents(run, s3, name, make_index, admin, tmp_path, monkeypatch):
    """Load contents into an index as the objects 0.csv, 1.csv, ...; return the outcome and the prefix."""
    bystander = make_index("bystander", docs=3, alias=name("alias"))
    before = state_of(admin, bystander)
    attempts = itertools.count()

    def do(index, contents, *more):
        attempt = next(attempts)
        prefix = f"{name('fuzz')}-{attempt}/"
        monkeypatch.setenv("LOG_DIR", str(tmp_path / f"logs-{attempt}"))
        for number, content in enumerate(contents):
            s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}{number}.csv", Body=content)
        indices = visible(admin)
        words = ["--bucket", sandbox.BUCKET, "--prefix", prefix, "--index", index]
        outcome = run(bulkupdate, *words, "--workers", "1", *more)
        assert "unexpected" not in outcome.err
        assert visible(admin) == indices
        return outcome, prefix

    yield do
    assert state_of(admin, bystander) == before


def stored(box, index):
    """Return `_source` of each document by id, with all digits."""
    box.server.request("POST", f"/{index}/_refresh")
    url = f"{box.server.endpoint}/{index}/_search"
    answer = box.server.session.post(url, json={"size": 10_000}, timeout=60)
    return {hit["_id"]: hit["_source"] for hit in exact(answer.text)["hits"]["hits"]}


def rejected_lines(outcome, prefix):
    """Return object number and line of each entry of the rejects file."""
    if "rejects_file" not in (outcome.out and outcome.result):
        return set()
    with open(outcome.result["rejects_file"]) as file:
        entries = [json.loads(line) for line in file]
    found = [(int(entry["object"].removeprefix(prefix).removesuffix(".csv")), entry["line"]) for entry in entries]
    assert len(found) == len(set(found))
    return set(found)


PROPERTIES = {name: {"type": kind} for name, kind in TYPES.items()} | {"any": {"type": "object", "enabled": False}}


@profiles(12, 400)
def test_whatever_files_come_the_index_holds_their_good_rows_and_the_rejects_file_the_others(
    load_contents, make_index, box, profile
):
    index = make_index("target", PROPERTIES, docs=[{"n": 1}])
    loaded = []

    @profile
    @given(cases(most=4), st.integers(1, 40))
    def holds(case: Case, chunk: int) -> None:
        before = stored(box, index)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bulkupdate, "CHUNK_BYTES", chunk)
            outcome, prefix = load_contents(index, case.contents, f"--delimiter={case.delimiter}", "--batch-size", "7")
        wanted = [expected(content, case.columns, case.delimiter) for content in case.contents]
        utf_16 = any(content.count(0) > len(content) // 4 for content in case.contents)
        if utf_16 or all(not (one.documents or one.rejects) for one in wanted):
            assert outcome.code in (1, 4), outcome.err
            assert outcome.code == 1 or stored(box, index) == before
            return
        if still_open := [(number, one.open_at) for number, one in enumerate(wanted) if one.open_at]:
            number, line = still_open[0]
            assert outcome.code == 1, outcome.err
            assert f"{prefix}{number}.csv, line {line}: a quote" in outcome.last
            return
        rejects = {(number, line) for number, one in enumerate(wanted) for line in one.rejects}
        assert outcome.code == (3 if rejects else 0), outcome.err
        assert rejected_lines(outcome, prefix) == rejects
        assert stored(box, index) == {
            f"{digest_of(f'{prefix}{number}.csv')}-{one.records[line]:09d}": document
            for number, one in enumerate(wanted) for line, document in one.documents.items()
        }  # fmt: skip
        loaded.append(sum(len(one.documents) for one in wanted))

    holds()
    assert sum(map(bool, loaded)) > 3  # or nothing was ever loaded


# --- headers ----------------------------------------------------------------------------------------------------------

ODD_NAMES = [
    "", " ", "a", "a ", "A", "a.b", "a.b.c", ".a", "a.", "a..b", "a. .b", ".", "_id", "_source", "_index", "_doc_count",
    "_x", "_routing", "*", "a*", "?", "-", "#", "\\", "\"", "'", "a,b", "a\nb", "a\rb", "\x1b[2K", "\x00", "\x7f",
    "\x85", "\u2028", "\ufeff", "ü", "𝄞", "\u202e", "null", "1", "1.5", "{}", "properties", "type", "__proto__",
    "n" * 300, "n" * 40_000, ".".join("n" * 25),
]  # fmt: skip
NAMES = st.sampled_from(ODD_NAMES) | st.text(st.characters(codec="utf-8"), max_size=6)


def header_line(names: list[str]) -> str:
    return ",".join('"' + name.replace('"', '""') + '"' for name in names) + "\n"


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dynamic", [True, False, "strict"])
def test_whatever_the_columns_are_called_they_are_stored_so_or_the_load_is_refused_with_the_index_as_it_was(
    load_contents, make_index, admin, box, dynamic
):
    codes = []

    @settings(max_examples=150, print_blob=True, **QUIET)
    @given(st.lists(NAMES, min_size=1, max_size=4))
    @example(["a", "a.b"])
    @example(["a.b", "a"])
    @example(["a", "A", "a "])
    def holds(names: list[str]) -> None:
        number = len(codes)
        names = ["known", *names]
        index = make_index(f"target-{number}", {"known": {"type": "keyword"}}, docs=[{"known": "old"}], dynamic=dynamic)
        content = header_line(names) + header_line([f"x{place}" for place in range(len(names))])
        outcome, prefix = load_contents(index, [content.encode()])
        codes.append(outcome.code)
        stripped = [name.strip() for name in names]
        if outcome.code in (0, 3):
            assert len(set(stripped)) == len(stripped)
            document = {name: f"x{place}" for place, name in enumerate(stripped)}
            wanted = {f"{digest_of(f'{prefix}0.csv')}-000000001": document} if outcome.code == 0 else {}
            assert stored(box, index) == wanted
            line = 2 + sum(name.count("\n") for name in names)
            assert rejected_lines(outcome, prefix) == ({(0, line)} if outcome.code == 3 else set())
        else:
            assert outcome.code in (1, 4), outcome.err
            assert sources(admin, index) == [{"known": "old"}]
        admin("DELETE", f"/{index}")

    holds()
    assert {0, 4} <= set(codes) if dynamic != "strict" else set(codes) == {4}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_whatever_bytes_stand_in_the_place_of_a_header_the_load_is_refused_or_stores_by_it(
    load_contents, make_index, admin, box
):
    codes = []

    @settings(max_examples=150, print_blob=True, **QUIET)
    @given(
        st.sampled_from([b"", b"known,"]),  # a header of which the mapping knows nothing is refused
        st.lists(st.sampled_from([*TOKENS, b",", b",", b"known"]), max_size=12), st.integers(1, 40),
    )  # fmt: skip
    def holds(first: bytes, tokens: list[bytes], chunk: int) -> None:
        index = make_index(f"target-{len(codes)}", docs=[{"known": "old"}])
        content = first + b"".join(tokens) + b"\nx1\nx1,x2\nx1,x2,x3\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bulkupdate, "CHUNK_BYTES", chunk)
            outcome, prefix = load_contents(index, [content])
        codes.append(outcome.code)
        found = sources(admin, index)
        if outcome.code in (0, 3):
            text = content.decode(errors="surrogateescape").removeprefix("\ufeff")
            header = next(csv.reader(io.StringIO(text, newline="\n"), strict=True))
            names = {name.strip() for name in header}
            assert len(names) == len(header)
            assert not re.search("[\0\ud800-\udfff]", "".join(header))
            assert all(set(document) <= names for document in found)
            assert outcome.result["stored"] == len(found)
            assert outcome.result["rejected"] == len(rejected_lines(outcome, prefix))
        elif outcome.code == 4:
            assert found == [{"known": "old"}]
        else:
            assert outcome.code == 1
        admin("DELETE", f"/{index}")

    holds()
    assert min(codes.count(3), codes.count(4)) > 10
