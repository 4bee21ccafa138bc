"""Replace the documents of an index by the rows of all CSV files under an S3 prefix, each row exactly once.

Example:    python bulkupdate.py --bucket your-bucket --prefix your/prefix/ --index my_index_primary --batch-size 1000
Exit codes: 0 the index holds every row, counted; 1 failed; 2 usage; 3 finished, with more rejected rows than accepted;
            4 refused before anything was touched; 75 locked; 129, 130, 143 signals.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import queue
import re
import threading
import time
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache, partial
from json.encoder import encode_basestring
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from index_cleanup import TargetIndex
from opensearch_base_manager import (
    Aws, OpenSearchBaseManager, OperationFailed, Progress, Refused, Response, TooManyRejects, add_settings, aws_errors,
    backoff_s, field_definitions, index_name, interrupted, log, per_second, run_cli, seconds_since,
)  # fmt: skip

MIB = 1024 * 1024
HEAD_BYTES = 64 * 1024  # enough to see a header and some hundred rows of each object
HEADS_AT_ONCE = 8
READ_BYTES = 256 * 1024  # at once from S3
CHUNK_BYTES = 16 * 1024  # of text a step: the cells stay in the processor's cache; 256 KiB took 1.5 times as long
MAX_CELL_CHARS = 8 * MIB  # a quote still open after that much is a stray one
MAX_LINE_BYTES = 16 * MIB  # and a record's
MAX_BATCH_BYTES = 8 * MIB  # managed domains on small nodes refuse requests above 10 MiB
BATCH_SIZE = 5000  # documents a request
WORKERS = 3  # requests at the same time
WORKERS_FOR_SMALL = 4  # for batches of less than half of BATCH_SIZE: 7 % faster than 3
REFRESH_EVERY = 100_000  # documents; 2 to 4 % faster than one refresh at the end
CACHED_CELLS = 4000  # remembered values a column, and no longer than this many characters each
CACHED_CELL_CHARS = 32
REJECTS_TOLERATED = 10_000  # past that the file is of another kind than the index; MAX_REJECTS may raise it
REJECTS_SHOWN = 5
KEEP_DAYS = 30
NEWLINE = "\n"
DOCUMENT_END = "}\n"
GZIP_MAGIC = b"\x1f\x8b"
MAX_ID_BYTES = 512  # one longer id and the cluster refuses the whole request
BULK_PARAMS = {
    "filter_path": "errors,items.*.status,items.*.error.type,items.*.error.reason,items.*.error.caused_by.reason"
}
METADATA_FIELDS = frozenset(
    ["_id", "_index", "_source", "_routing", "_field_names", "_ignored", "_size", "_type", "_seq_no", "_version"]
)

csv.field_size_limit(MAX_CELL_CHARS)


# --- list -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class S3Object:
    key: str
    size: int
    etag: str


class Bucket:
    """The objects of one bucket, read through one client; failures are OperationFailed and name the object."""

    def __init__(self, name: str, aws: Aws) -> None:
        self.name = name
        with aws_errors(f"s3://{name}", "s3:ListBucket on the bucket"):
            self.client = aws.client("s3")

    def list_csv(self, prefix: str, patience_s: float = 0) -> list[S3Object]:
        """Return all .csv and .csv.gz objects under a prefix, in the order of their keys.

        What may pass is tried again for `patience_s`, beyond the 10 s or so that botocore tries by itself.
        """
        place, began = f"s3://{self.name}/{prefix}", time.monotonic()
        while True:
            try:
                pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
                found = [entry for page in pages for entry in page.get("Contents", [])]
                break
            except Exception as error:
                if interrupted.is_set() or time.monotonic() - began > patience_s or not may_pass(error):
                    with aws_errors(place, "s3:ListBucket on the bucket"):
                        raise
                log.warning("%s: %s; listing again", place, error)
        objects = [S3Object(entry["Key"], entry["Size"], entry["ETag"]) for entry in found]
        return [item for item in objects if item.key.lower().endswith((".csv", ".csv.gz"))]

    def get(self, item: S3Object, first: int, last: int) -> Any:
        """Return some bytes of an object as it was listed, as a stream.

        Raises OperationFailed when it was replaced or deleted since, or may not be read; what may pass (5xx, connection
        errors) is raised as it is, once botocore has given up.
        """
        from botocore.exceptions import ClientError

        place = f"s3://{self.name}/{item.key}"
        span = f"bytes={first}-{last}"
        try:
            return self.client.get_object(Bucket=self.name, Key=item.key, IfMatch=item.etag, Range=span)["Body"]
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if may_pass(error):
                raise
            if status in (404, 412):
                done = "deleted" if status == 404 else "replaced"
                raise OperationFailed(f"{place} was {done} since it was listed; run again") from None
            with aws_errors(place, "s3:GetObject (and kms:Decrypt for a key of your own)"):
                raise


def may_pass(error: Exception) -> bool:
    """Say whether a failure of S3 may be over soon: it is busy, or not reached."""
    from botocore.exceptions import ClientError, HTTPClientError

    if isinstance(error, ClientError):
        code, status = error.response["Error"].get("Code"), error.response["ResponseMetadata"]["HTTPStatusCode"]
        return bool(status >= 500 or code == "SlowDown")
    return isinstance(error, HTTPClientError)


# --- look -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What the first 64 KiB of an object show: its columns, whether rows follow, what kinds of values new ones have."""

    item: S3Object
    columns: list[str]
    has_rows: bool
    kinds: dict[str, set[str]]


def look_at(item: S3Object, data: bytes, delimiter: str, known: Container[str]) -> Head:
    """Read the head of an object. Raises Refused when it is not a CSV file that can be loaded."""
    whole = len(data) >= item.size
    if data[:2] == GZIP_MAGIC:
        unpacker = zlib.decompressobj(31)  # expects a gzip header
        try:
            data = unpacker.decompress(data, HEAD_BYTES)
        except zlib.error as error:
            raise OperationFailed(f"{item.key}: broken gzip: {error}; write the object again") from None
        whole = whole and unpacker.eof and not unpacker.unused_data
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data.count(0) > len(data) // 4 > 0:
        raise Refused(f"{item.key}: UTF-16; save it as UTF-8")
    text, _ = decode(data.removeprefix(b"\xef\xbb\xbf"))
    if whole and not text:
        return Head(item, [], False, {})
    if not whole and "\n" not in text:
        raise Refused(f"{item.key}: no line ends within the first {HEAD_BYTES // 1024} KiB; is it a CSV file?")
    block, _ = parse(text if whole else text[: text.rindex("\n") + 1], 1, delimiter)
    mark_unreadable(block)
    columns = header_of(item, block)
    rows = [row for row in block.rows[1:] if isinstance(row, list) and len(row) == len(columns)]
    new = [(name, cells) for name, cells in zip(columns, zip(*rows)) if name not in known]
    kinds = {name: {kind_of(cell) for cell in cells} - {""} for name, cells in new}
    return Head(item, columns, not whole or any(block.rows[1:]), kinds)


def header_of(item: S3Object, block: Block) -> list[str]:
    """Return the column names of an object. Raises Refused when they could not be field names."""
    if not block.rows or not block.rows[0] or isinstance(block.rows[0], Defect):
        raise Refused(f"{item.key}: the first line is not a CSV header; add the column names")
    columns = [name.strip() for name in block.rows[0]]
    doubled = sorted({name for name in columns if columns.count(name) > 1 and name})
    if doubled:
        raise Refused(f"{item.key}: doubled column names: {', '.join(doubled)}; rename them")
    if wrong := [name for name in columns if not all(name.split(".")) or name in METADATA_FIELDS]:
        names = ", ".join(map(repr, wrong))
        raise Refused(f"{item.key}: the header has names that cannot be fields: {names}; rename them")
    return columns


def kind_of(cell: str) -> str:
    """Say what a value could be: long, double, boolean or text; nothing when it is no evidence."""
    if cell.strip() in EMPTY:
        return ""
    if re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", cell):
        return "long"
    if re.fullmatch(r"-?(0|[1-9][0-9]*)\.[0-9]+", cell) and len(cell) <= 19:  # 18 digits and the point
        return "double"
    return "boolean" if cell.lower() in ("true", "false") else "text"


def new_field(kinds: set[str]) -> dict[str, Any]:
    """Return the definition of a new column; text unless every value seen is a canonical number or true/false."""
    if kinds and kinds <= {"long", "double"}:
        return {"type": "double" if "double" in kinds else "long"}
    if kinds == {"boolean"}:
        return {"type": "boolean"}
    return {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 256}}}


def dynamic_of(mapping: Mapping[str, Any], name: str) -> str:
    """Return what the mapping says of new fields where `name` would be: the nearest object's `dynamic` counts."""
    dynamic = str(mapping.get("dynamic", "true")).lower()
    for part in name.split(".")[:-1]:
        mapping = mapping.get("properties", {}).get(part, {})
        dynamic = str(mapping.get("dynamic", dynamic)).lower()
    return dynamic


def inside_values(mapping: Mapping[str, Any], added: Mapping[str, Any]) -> list[str]:
    """Return the new fields that would be part of one that holds a value itself, as a.b would beside a number a."""
    objects = (None, "object", "nested")
    values = {name for name, definition in field_definitions(mapping) if definition.get("type") not in objects}
    parents = {name: set(itertools.accumulate(name.split(".")[:-1], "{}.{}".format)) for name in added}
    return [name for name in added if parents[name] & {*values, *added}]


# --- read -------------------------------------------------------------------------------------------------------------


class S3Body(io.RawIOBase):
    """The bytes of one object; a read that breaks off is resumed there, for `patience_s` without progress."""

    def __init__(self, bucket: Bucket, item: S3Object, patience_s: float, limit: int | None = None) -> None:
        self.bucket, self.item, self.patience_s = bucket, item, patience_s
        self.position, self.end = 0, min(item.size, limit or item.size)
        self._body: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        began, attempt = time.monotonic(), 0
        while self.position < self.end:
            try:
                self._body = self._body or self.bucket.get(self.item, self.position, self.end - 1)
                if data := self._body.read(len(buffer)):
                    buffer[: len(data)] = data
                    self.position += len(data)
                    return len(data)
                raise OSError("it ended early")
            except OperationFailed:
                raise
            except Exception as error:  # urllib3, botocore, http.client and ssl each have their own for a broken read
                self._body = None
                delay = backoff_s(attempt)
                place = f"s3://{self.bucket.name}/{self.item.key}, byte {self.position:,}"
                if interrupted.is_set() or time.monotonic() - began + delay > self.patience_s:
                    raise OperationFailed(f"{place}: cannot be read on: {error}; run again") from None
                log.warning("%s: %s; reading on from there in %.1f s", place, error, delay)
                attempt += 1
                time.sleep(delay)
        return 0


def plain(body: io.RawIOBase) -> BinaryIO:
    """Return the content, unpacked when it is gzip; its first bytes tell, names are often wrong."""
    stream = io.BufferedReader(body, READ_BYTES)
    if stream.peek(2)[:2] == GZIP_MAGIC:
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    return stream


def decode(data: bytes) -> tuple[str, bool]:
    """Return the text, and whether its cells have to be looked at one by one (bad UTF-8, NUL)."""
    try:
        return data.decode(), b"\0" in data
    except UnicodeDecodeError:
        return data.decode(errors="surrogateescape"), True


def read_lines(stream: BinaryIO) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces of whole lines. Raises OverflowError when a line does not end."""
    rest = b""
    while data := stream.read(CHUNK_BYTES):
        data = rest + data
        end = data.rfind(b"\n") + 1
        rest = data[end:]
        if len(rest) > MAX_LINE_BYTES:
            raise OverflowError(f"a line does not end within {MAX_LINE_BYTES // MIB} MiB; is it a CSV file?")
        if end:
            yield decode(data[:end])
    if rest:
        yield decode(rest)


# --- parse ------------------------------------------------------------------------------------------------------------


class Defect(Exception):
    """A record that cannot become a document: why, and what stands there."""

    def __init__(self, reason: str, row: Any, column: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.row, self.column = reason, row, column


class OpenQuote(Exception):
    """A quote that does not close, in the record that begins on `line`: how many rows it swallowed, nobody knows."""

    def __init__(self, line: int, where: str) -> None:
        super().__init__(f"line {line}: a quote of the record that begins here is open {where}; mend the file")


@dataclass
class Block:
    """Consecutive records; the one at place i begins on line `lines[i]`.

    `rows` has for each a list of cells or, unless `clean`, a Defect. Where each line is a record and each delimiter
    parts two cells there may be only the `text` of whole lines, which is taken apart without a CSV reader.
    """

    lines: Sequence[int]
    rows: list[Any] = field(default_factory=list)
    clean: bool = True
    text: str = ""


def parse(text: str, first_line: int, delimiter: str) -> tuple[Block, str]:
    """Parse the records of a text that begins on `first_line`; return them, and the text of a last one left open.

    Raises OpenQuote when one is still open after 8 MiB.
    """
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    physical = text.split("\n")
    lines: list[int] = []
    block = Block(lines)
    while True:
        start = reader.line_num
        try:
            row: Any = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raw = "\n".join(physical[start : reader.line_num])
            if "end of data" in str(error):
                return block, "\n".join(physical[start:])
            if "field limit" in str(error) and raw.count('"') % 2:
                raise OpenQuote(first_line + start, f"after {MAX_CELL_CHARS // MIB} MiB") from None
            row, block.clean = Defect(f"not CSV: {error}", raw), False
        block.rows.append(row)
        lines.append(first_line + start)
    return block, ""


def plain_lines(text: str, first_line: int) -> Block | None:
    """Return a block of lines that need no CSV reader; nothing when there are quotes, stray returns or giant cells."""
    text = text.replace("\r\n", "\n")
    if '"' in text or "\r" in text or len(text) > MAX_CELL_CHARS:
        return None
    text += "" if text.endswith("\n") else "\n"
    return Block(range(first_line, first_line + text.count("\n")), text=text)


def mark_unreadable(block: Block) -> None:
    """Turn rows with a NUL or with bytes that are not UTF-8 into defects."""
    for place, row in enumerate(block.rows):
        text = "" if isinstance(row, Defect) else "".join(row)
        if found := re.search("[\0\udc80-\udcff]", text):
            reason = "a NUL character" if found[0] == "\0" else "bytes that are not UTF-8"
            block.rows[place], block.clean = Defect(reason, row), False


def read_blocks(stream: BinaryIO, place: str, delimiter: str) -> Iterator[Block]:
    """Yield the records of one object in blocks, the header first.

    Raises OperationFailed when the object is broken gzip, when a line does not end, or when a quote is left open.
    """
    rest, line, suspect = "", 1, False
    pieces = read_lines(stream)
    while True:
        try:
            text, bad, ended = gather(pieces, len(rest))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise OperationFailed(f"{place}: broken gzip: {error}; write the object again") from None
        except OverflowError as error:
            raise OperationFailed(f"{place}, after line {line + rest.count(NEWLINE) - 1}: {error}") from None
        text, suspect = rest + (text.removeprefix("\ufeff") if line == 1 and not rest else text), suspect or bad
        if not text:
            return
        block = None if rest or suspect or line == 1 else plain_lines(text, line)
        if not block:
            try:
                block, rest = parse(text, line, delimiter)
            except OpenQuote as error:
                raise OperationFailed(f"{place}, {error}") from None
        if rest and (ended or len(rest) > MAX_LINE_BYTES):
            where = "at the end of the file" if ended else f"after {MAX_LINE_BYTES // MIB} MiB"
            begins = line + text.count(NEWLINE) - rest.count(NEWLINE)
            raise OperationFailed(f"{place}, {OpenQuote(begins, where)}")
        if suspect:
            mark_unreadable(block)
            suspect = bool(rest)
        line += text.count(NEWLINE) - rest.count(NEWLINE)
        if block.lines:
            yield block


def gather(pieces: Iterator[tuple[str, bool]], chars: int) -> tuple[str, bool, bool]:
    """Return the next text, whether it is suspect and whether it is the last.

    It is longer than `chars`, which a quote has left open: parsed anew with each piece, giant cells would take minutes.
    """
    text, suspect = "", False
    while len(text) <= chars:
        piece, bad = next(pieces, ("", False))
        text, suspect = text + piece, suspect or bad
        if not piece:
            return text, suspect, True
    return text, suspect, False


# --- type -------------------------------------------------------------------------------------------------------------

# for every type but text and keyword
EMPTY = frozenset(["", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None"])
NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?")
BOOLEANS = dict.fromkeys(["true", "yes", "t", "1"], "true") | dict.fromkeys(["false", "no", "f", "0"], "false")
INTEGER_BITS = {"long": 64, "integer": 32, "short": 16, "byte": 8}
FLOATS = ("double", "float", "half_float", "scaled_float", "rank_feature")
TEXTS = ("text", "keyword", "match_only_text", "wildcard", "constant_keyword", "search_as_you_type")
JSON_TYPES = (
    "object", "nested", "flat_object", "integer_range", "long_range", "float_range", "double_range", "date_range",
    "ip_range", "knn_vector", "sparse_vector", "rank_features", "percolator",
)  # fmt: skip

Render = Callable[[str], str]  # from a cell's text to JSON; "" leaves the field out; ValueError makes a reject


def render_text(cell: str) -> str:
    return encode_basestring(cell) if cell else ""


def render_other(cell: str) -> str:
    """Dates, addresses, points and the like go as they stand: the server knows their formats."""
    return "" if cell.strip() in EMPTY else encode_basestring(cell)


def number_parts(cell: str) -> tuple[str, str, str, str]:
    match = NUMBER.fullmatch(cell)
    if not match or not (match[2] or match[3]):
        raise ValueError("not a number")
    return match[1].replace("+", ""), match[2].lstrip("0") or "0", match[3] or "", match[4] or ""


def render_float(cell: str) -> str:
    """Return a number as JSON spells it, digit for digit; whether it fits is for the server to say."""
    if (cell := cell.strip()) in EMPTY:
        return ""
    sign, whole, fraction, exponent = number_parts(cell)
    return f"{sign}{whole}{fraction and '.' + fraction}{exponent and 'e' + exponent}"


def render_integer(cell: str, *, low: int, high: int) -> str:
    """Return an integer with every digit. Raises ValueError for a fraction or overflow, which the server would cut."""
    if (cell := cell.strip()) in EMPTY:
        return ""
    sign, whole, fraction, exponent = number_parts(cell)
    if len(whole) > 20 or len(exponent) > 4:
        raise ValueError("out of range")
    value = Decimal(f"{sign}{whole}.{fraction}e{exponent or 0}") if fraction or exponent else Decimal(sign + whole)
    if value and value.adjusted() > 20:
        raise ValueError("out of range")
    if value != value.to_integral_value():
        raise ValueError("a fraction in an integer field")
    if not low <= value <= high:
        raise ValueError("out of range")
    return str(int(value))


def render_boolean(cell: str) -> str:
    if (cell := cell.strip()) in EMPTY:
        return ""
    if cell.lower() not in BOOLEANS:
        raise ValueError("neither true nor false")
    return BOOLEANS[cell.lower()]


def render_json(cell: str) -> str:
    """Return the JSON of a cell on one line, digit for digit."""
    if cell.strip() in EMPTY:
        return ""
    try:
        json.loads(cell, parse_constant=lambda name: json.loads(""), parse_float=str, parse_int=str)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    return cell.translate({10: " ", 13: " "})  # outside strings, where JSON allows them


def renderer(kind: str) -> Render:
    """Return how cells of a field type become JSON."""
    if bits := INTEGER_BITS.get(kind):
        return partial(render_integer, low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1)
    if kind == "unsigned_long":
        return partial(render_integer, low=0, high=2**64 - 1)
    if kind == "boolean":
        return render_boolean
    if kind in FLOATS:
        return render_float
    if kind in JSON_TYPES:
        return render_json
    return render_text if kind in TEXTS else render_other


class Column(dict[str, str]):
    """From a cell's text to its finished `,"name":value` token; remembers the latest few thousand."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.name, self.render = name, renderer(kind)
        self.prefix = f",{encode_basestring(name)}:"

    def __missing__(self, cell: str) -> str:
        value = self.render(cell)
        token = self.prefix + value if value else ""
        if len(cell) <= CACHED_CELL_CHARS:
            if len(self) >= CACHED_CELLS:
                self.clear()
            self[cell] = token
        return token


WITHOUT_COMMA = itemgetter(slice(1, None))


def document(row: list[str], columns: Sequence[Column]) -> str:
    """Return the JSON of one row less its opening brace. Raises Defect."""
    if len(row) != len(columns):
        raise Defect(f"{len(row)} cells under {len(columns)} column names", row)
    tokens = []
    for column, cell in zip(columns, row):
        try:
            tokens.append(column[cell])
        except ValueError as error:
            named = dict(zip((column.name for column in columns), row))
            raise Defect(f"{error}: {cell[:100]!r}", named, column.name) from None
    return "".join(tokens)[1:]


def all_cells(block: Block, width: int, delimiter: str) -> list[str]:
    """Return the cells of all records in one list, a newline before each record.

    Raises ValueError when a record is not `width` good cells.
    """
    if block.text and width > 1:  # where there is one column, a blank line would pass for a cell
        marked = ("\n" + block.text[:-1]).replace("\n", f"{delimiter}\n{delimiter}")
        cells = marked.split(delimiter)[1:]
        if len(cells) == len(block.lines) * (width + 1) == cells[:: width + 1].count("\n") * (width + 1):
            return cells
    elif block.clean and set(map(len, block.rows)) == {width}:
        return [*itertools.chain.from_iterable(map(["\n"].__add__, block.rows))]
    raise ValueError("records of different widths")


def render_all(cells: list[str], columns: Sequence[Column]) -> None:
    """Turn all cells into tokens in place, a column at a time, which runs in C. Raises ValueError at a wrong cell."""
    stride = len(columns) + 1
    for place, column in enumerate(columns, 1):
        cells[place::stride] = map(column.__getitem__, cells[place::stride])
    first = cells[1::stride]
    cells[1::stride] = map(WITHOUT_COMMA, first)
    if "" in first:  # then another column begins the document
        for start in (at * stride + 1 for at, token in enumerate(first) if not token):
            place = next(filter(cells.__getitem__, range(start, start + stride - 1)), start)
            cells[place] = cells[place][1:]


@lru_cache(maxsize=1)
def digest_of(place: str) -> str:
    """Return what the ids of all rows of one object begin with; remembered, since it is asked for with each block."""
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def action_with_id(cell: str, version: int) -> str:
    """Return an action line with the id from a column; by the version a later row wins, in any order of arrival."""
    if not cell or len(cell.encode()) > MAX_ID_BYTES:
        raise ValueError(f"no id, or one of more than {MAX_ID_BYTES} bytes")
    action = f'"_id":{encode_basestring(cell)},"version":{version},"version_type":"external"'
    return f'{DOCUMENT_END}{{"index":{{{action}}}}}\n{{'


# --- batch ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Documents as finished bulk text, two lines each, and the objects and lines they came from, in the same order."""

    body: bytes = b""
    origins: Sequence[tuple[str, Sequence[int]]] = ()

    @classmethod
    def joined(cls, parts: Sequence[Batch]) -> Batch:
        return cls(b"".join(part.body for part in parts), [origin for part in parts for origin in part.origins])

    def count(self) -> int:
        return sum(len(lines) for _, lines in self.origins)

    def documents(self) -> list[Batch]:
        """Return each document as a batch of its own."""
        places = ((key, line) for key, lines in self.origins for line in lines)
        texts = iter(self.body.split(b"\n"))
        return [Batch(b"%s\n%s\n" % pair, [(key, [line])]) for pair, (key, line) in zip(zip(texts, texts), places)]


@dataclass(frozen=True)
class Pieces:
    """Documents of one object that are not put together yet: `stride` pieces each, the first with what joins them."""

    key: str
    lines: Sequence[int]
    texts: list[str]
    stride: int

    def batch(self, start: int, end: int) -> Batch:
        text = "".join(self.texts[start * self.stride : end * self.stride])
        body = (text[len(DOCUMENT_END) :] + DOCUMENT_END).encode()
        return Batch(body, [(self.key, self.lines[start:end])])


def batches(blocks: Iterable[Pieces], size: int) -> Iterator[Batch]:
    """Cut what comes in into batches of `size` documents or 8 MiB, across the borders of objects."""
    parts: list[Batch] = []
    count = length = 0
    for pieces in blocks:
        start = 0
        while start < len(pieces.lines):
            part = pieces.batch(start, start + size - count)
            parts.append(part)
            start, count, length = start + part.count(), count + part.count(), length + len(part.body)
            if count >= size or length >= MAX_BATCH_BYTES:
                batch = Batch.joined(parts)
                parts, count, length = [], 0, 0  # before the wait: they are as large as the batch
                yield batch
    if parts:
        yield Batch.joined(parts)


# --- send -------------------------------------------------------------------------------------------------------------


class Senders:
    """Threads that store batches from a short queue; the first error of one is raised in the main thread.

    They are daemons: after a failure nobody waits for a request that hangs. A busy cluster (429) halves their number,
    at most once a second.
    """

    def __init__(self, store: Callable[[Batch], None], count: int) -> None:
        self.store, self.limit, self.halved, self.ended = store, count, 0.0, False
        self.error: BaseException | None = None
        self.queue: queue.Queue[Batch] = queue.Queue(maxsize=1)
        self.threads = [threading.Thread(target=self._work, args=(place,), daemon=True) for place in range(count)]
        for thread in self.threads:
            thread.start()

    def put(self, batch: Batch) -> None:
        while not self.error:
            with contextlib.suppress(queue.Full):
                return self.queue.put(batch, timeout=0.2)
        raise self.error

    def finish(self) -> None:
        """Return when all batches are stored; raise what stopped a sender."""
        self.ended = True
        for thread in self.threads:
            while thread.is_alive() and not self.error:
                thread.join(0.2)
        if self.error:
            raise self.error

    def halve(self) -> None:
        if self.limit > 1 and time.monotonic() - self.halved > 1:
            self.limit, self.halved = self.limit // 2, time.monotonic()
            log.warning("the cluster is busy (429): %s requests at a time from here on", self.limit)

    def _work(self, place: int) -> None:
        while place < self.limit and not self.error:
            try:
                self.store(self.queue.get(timeout=0.05))
            except queue.Empty:
                if self.ended and self.queue.empty():
                    return
            except BaseException as error:
                self.error = self.error or error


# --- settle -----------------------------------------------------------------------------------------------------------


class Rejects:
    """Counts rejected rows and writes each to a file of its own for this run, made for its owner alone."""

    def __init__(self, folder: Path, index: str, accepted: int) -> None:
        self.path = folder / f"rejects-{index}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.ndjson"
        self.limit, self.count = max(accepted, REJECTS_TOLERATED), 0
        self._lock = threading.Lock()
        self._file: Any = None

    def prepare(self) -> None:
        """Make the folder and drop files older than 30 days. Raises OperationFailed when it cannot be written to."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for old in self.path.parent.glob("rejects-*.ndjson"):
                with contextlib.suppress(OSError):  # another load may have been faster
                    if time.time() - old.stat().st_mtime > KEEP_DAYS * 86400:
                        old.unlink()
            if not os.access(self.path.parent, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise OperationFailed(f"{self.path.parent}: {error.strerror}; set LOG_DIR to a folder of your own") from None

    def add(self, key: str, line: int, defect: Defect) -> None:
        entry = {"object": key, "line": line, "column": defect.column, "reason": defect.reason, "row": defect.row}
        with self._lock:
            self.count += 1
            if self.count <= REJECTS_SHOWN:
                column = f", column {defect.column}" if defect.column else ""
                log.warning("rejected: %s line %s%s: %s", key, line, column, defect.reason)
            try:
                self._file = self._file or self._open()
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()
            except OSError as error:
                raise OperationFailed(
                    f"rejects file {self.path}: {error.strerror}; make room, or set LOG_DIR to another folder"
                ) from None
            if self.count > self.limit:
                raise OperationFailed(f"more than {self.limit:,} rows are rejected: mend data or mapping, see {self.path}")

    def _open(self) -> Any:
        if self.path.exists():  # of another load that began in the same second
            self.path = self.path.with_stem(f"{self.path.stem}-{os.getpid()}")
        return os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")


@dataclass
class Tally:
    """What became of the rows: read = stored + rejected + skipped, or something was lost."""

    read: int = 0
    skipped: int = 0
    stored: int = 0
    replaced: int = 0  # rows of an id that another row has as well
    unsure: int = 0  # perhaps replaced: the answer that would tell was lost


class BulkUpdate(OpenSearchBaseManager):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.prefix, self.delimiter, self.id_column = args.prefix, args.delimiter, args.id_column
        self.keep: bool = args.no_cleanup
        self.target = TargetIndex(self, args.index, method=args.method, shared=self.keep)
        self.index: str = args.index
        self.batch_size, self.max_rejects = args.batch_size, args.max_rejects
        self.workers = args.workers or (WORKERS_FOR_SMALL if args.batch_size < BATCH_SIZE // 2 else WORKERS)
        self.bucket = Bucket(args.bucket, self.aws)
        self.rejects = Rejects(self.settings.log_dir, self.index, self.max_rejects)
        self.tally, self._tally_lock = Tally(), threading.Lock()
        self.max_bytes = MAX_BATCH_BYTES
        self.refreshes = 0
        self.last_refusal = ""  # why documents had to be sent again, of whichever sender
        self.columns: dict[str, Column] = {}
        self.first_version = time.time_ns()  # of --id-column: a later row has a higher one, a later load too

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        self._check_index()
        objects = self._list()
        added = self._look(objects)
        if self.dry_run:
            log.info("dry run: %s would be %s", self.index, "added to" if self.keep else "emptied and filled")
            return {"index": self.index, "objects": len(objects), "dry_run": True}
        if self.keep:
            self._add_columns(added)
            self._load(objects)
            self._verify_objects(objects)
            self._verify_sums()
        else:
            self._replace(objects, added)
        return self._report(objects, began)

    def _check_index(self) -> None:
        self.target.claim(may_be_live=self.keep or self.dry_run)
        self.index = self.target.name
        self.rejects.prepare()

    def _list(self) -> list[S3Object]:
        place = f"s3://{self.bucket.name}/{self.prefix}"
        objects = self.bucket.list_csv(self.prefix)
        if not objects:
            raise Refused(f"{place}: no .csv or .csv.gz object, nothing was changed; check bucket and prefix")
        log.info("%s: %s objects, %s bytes, from %s to %s", place, len(objects),
                 f"{sum(item.size for item in objects):,}", objects[0].key, objects[-1].key)  # fmt: skip
        return objects

    def _look(self, objects: list[S3Object]) -> dict[str, dict[str, Any]]:
        """Read the head of each object and refuse what cannot be loaded; return the fields to add to the mapping."""
        mapping = self._get_mapping(self.index)
        known = {name: definition.get("type", "object") for name, definition in field_definitions(mapping)}

        def head_of(item: S3Object) -> Head:
            data = S3Body(self.bucket, item, self.settings.retry_seconds, HEAD_BYTES).readall()
            return look_at(item, data, self.delimiter, known)

        with ThreadPoolExecutor(HEADS_AT_ONCE) as pool:
            heads = list(pool.map(head_of, (item for item in objects if item.size)))
        if not any(head.has_rows for head in heads):
            raise Refused(
                f"s3://{self.bucket.name}/{self.prefix}: not one data row, nothing was changed; see whether the "
                "producer of the files has finished"
            )
        kinds: dict[str, set[str]] = {}
        for head in heads:
            if head.columns:
                self._check_head(head, known)
            for name in head.columns:
                if name not in known:
                    kinds.setdefault(name, set()).update(head.kinds.get(name, ()))
        added = self._new_fields(mapping, kinds)
        for name in [*known, *kinds]:
            self.columns[name] = Column(name, known.get(name) or added.get(name, {"type": "text"})["type"])
        return added

    def _check_head(self, head: Head, known: Mapping[str, str]) -> None:
        if known and not any(name in known for name in head.columns):
            raise Refused(
                f"{head.item.key}: the mapping of {self.index} knows none of the columns "
                f"{', '.join(head.columns)[:200]}; is the delimiter {self.delimiter!r} (--delimiter)?"
            )
        if self.id_column and self.id_column not in head.columns:
            raise Refused(f"{head.item.key}: has no column {self.id_column}; give another --id-column")

    def _new_fields(self, mapping: Mapping[str, Any], kinds: Mapping[str, set[str]]) -> dict[str, dict[str, Any]]:
        dynamic = {name: dynamic_of(mapping, name) for name in kinds}
        if strict := [name for name in kinds if dynamic[name].startswith("strict")]:
            raise Refused(
                f"columns that the strict mapping of {self.index} does not know: {', '.join(strict)}; add them to the "
                "mapping, or take them out of the files"
            )
        if ignored := [name for name in kinds if dynamic[name] == "false"]:
            log.warning("not searchable, since the mapping does not know them (dynamic: false): %s", ", ".join(ignored))
        added = {name: new_field(kinds[name]) for name in kinds if dynamic[name] != "false"}
        if torn := inside_values(mapping, added):
            raise Refused(f"columns inside of another that is no object: {', '.join(torn)}; rename one of the two")
        if added:
            log.info("new fields: %s", ", ".join(f"{name} ({value['type']})" for name, value in added.items()))
        return added

    def _add_columns(self, added: Mapping[str, Any]) -> None:
        """Define new fields before the first document, which would make the server guess (dates!)."""
        if added:
            properties: dict[str, Any] = {}
            for name, definition in added.items():
                *parents, leaf = name.split(".")
                inner = properties
                for parent in parents:
                    inner = inner.setdefault(parent, {}).setdefault("properties", {})
                inner[leaf] = definition
            self.request("PUT", f"/{self.index}/_mapping", {"properties": properties})

    def _replace(self, objects: list[S3Object], added: Mapping[str, Any]) -> None:
        """Empty the index, load it and count; until all of it is done the index is marked as unfinished."""
        with self.target.fill(without_replicas=self.settings.no_replicas):
            self._add_columns(added)
            self.target.empty()
            self._load(objects)
            self.target.restore_settings()
            self._verify_objects(objects)
            self._verify_sums()
            self._verify_count()

    # --- the pipeline: read, parse, type, batch, send, settle ---

    def _load(self, objects: list[S3Object]) -> None:
        began = time.monotonic()
        self.senders = Senders(self._store_and_refresh, self.workers)
        try:
            for batch in batches(self._documents(objects), self.batch_size):
                self.senders.put(batch)
            self.senders.finish()
        finally:
            self.senders.limit = 0
        log.info("loaded %s rows in %.1f s, %s/s", f"{self.tally.stored:,}", time.monotonic() - began,
                 f"{per_second(self.tally.stored, began):,}")  # fmt: skip

    def _documents(self, objects: list[S3Object]) -> Iterator[Pieces]:
        """Yield the good rows of all objects as bulk text; the others go to the rejects."""
        progress = Progress(f"loading {self.index}", sum(item.size for item in objects), "bytes")
        before = 0
        for item in objects:
            body = S3Body(self.bucket, item, self.settings.retry_seconds)
            record, columns = 1, None
            for block in read_blocks(plain(body), f"s3://{self.bucket.name}/{item.key}", self.delimiter):
                if columns is None:
                    columns = [self.columns[name] for name in header_of(item, block)]
                    block.rows, block.lines = block.rows[1:], block.lines[1:]
                version = self.first_version + self.tally.read
                self.tally.read += len(block.lines)
                yield self._pieces(item, block, columns, record, version)
                record += len(block.lines)
                progress.update(before + body.position, f"{self.tally.read:,} rows")
            before += item.size
        progress.close()

    def _pieces(self, item: S3Object, block: Block, columns: list[Column], record: int, version: int) -> Pieces:
        """Return the documents of a block whose first record has the number `record` in its object."""
        with contextlib.suppress(ValueError):  # something is wrong in one row: see below
            stride = len(columns) + 1
            cells = all_cells(block, len(columns), self.delimiter)
            ids = cells[self._id_place(columns) + 1 :: stride]
            cells[::stride] = self._actions(item, ids, record, version)
            render_all(cells, columns)
            return Pieces(item.key, block.lines, cells, stride)
        lines, texts = [], []
        rows = block.rows or csv.reader(io.StringIO(block.text, newline="\n"), delimiter=self.delimiter, strict=True)
        for at, (line, row) in enumerate(zip(block.lines, rows)):
            if not row:
                self.tally.skipped += 1
                continue
            try:
                texts.append(self._document(item, row, columns, record + at, version + at))
                lines.append(line)
            except Defect as defect:
                self.rejects.add(item.key, line, defect)
        return Pieces(item.key, lines, texts, 1)

    def _document(self, item: S3Object, row: Any, columns: list[Column], record: int, version: int) -> str:
        if isinstance(row, Defect):
            raise row
        text = document(row, columns)
        try:
            [action] = self._actions(item, [row[self._id_place(columns)]], record, version)
        except ValueError as error:
            raise Defect(str(error), row, self.id_column) from None
        return f"{action}{text}"

    def _id_place(self, columns: list[Column]) -> int:
        return [column.name for column in columns].index(self.id_column) if self.id_column else 0

    def _actions(self, item: S3Object, ids: Sequence[str], record: int, version: int) -> Iterator[str]:
        """Yield what stands before consecutive documents: the end of the one before, an action line, a brace.

        Without an id column the ids depend on place alone: sending or loading again changes nothing.
        """
        if self.id_column:
            return map(action_with_id, ids, itertools.count(version))
        digest = digest_of(f"{self.bucket.name}/{item.key}")
        action = f'{{"{"index" if self.keep else "create"}":{{"_id":"{digest}-%09d"}}}}'
        return map(f"{DOCUMENT_END}{action}\n{{".__mod__, range(record, record + len(ids)))

    def _store_and_refresh(self, batch: Batch) -> None:
        """Store a batch; refresh now and then, or the last refresh keeps one core busy while all others wait for it."""
        self._store(batch)
        due = self.tally.stored // REFRESH_EVERY
        if due > self.refreshes and not self.keep:
            self.refreshes = due
            self.request("POST", f"/{self.index}/_refresh")

    def _store(self, batch: Batch, resent: bool = False) -> None:
        """Store a batch: each document is stored once or rejected when this returns.

        Documents refused with 429 or 5xx are sent again, alone, for RETRY_SECONDS without progress at most; a batch too
        large for the cluster (413) is halved. Raises RequestFailed when the cluster refuses as a whole.
        """
        began, attempt = time.monotonic(), 0
        while count := batch.count():
            if len(batch.body) > self.max_bytes and count > 1:
                return self._store_halves(batch, resent)
            answer = self.request("POST", f"/{self.index}/_bulk", batch.body, params=BULK_PARAMS, accept=[413])
            resent = resent or answer.resent
            if answer.status == 413:
                return self._too_large(batch, resent)
            left = self._settle(batch, answer, resent)
            if answer.throttled or left.origins:
                self.senders.halve()
            if left.count() < count:
                began, attempt = time.monotonic(), 0
            elif time.monotonic() - began > self.settings.retry_seconds:
                raise OperationFailed(
                    f"{self.index}: {left.count():,} documents were not taken for {self.settings.retry_seconds:g} s, "
                    f"at last: {self.last_refusal}; look at the cluster's load and run again"
                )
            if left.origins:
                time.sleep(backoff_s(attempt))
            batch, resent, attempt = left, True, attempt + 1

    def _store_halves(self, batch: Batch, resent: bool) -> None:
        documents = batch.documents()
        middle = len(documents) // 2
        self._store(Batch.joined(documents[:middle]), resent)
        self._store(Batch.joined(documents[middle:]), resent)

    def _too_large(self, batch: Batch, resent: bool) -> None:
        size = len(batch.body)
        self.max_bytes = min(self.max_bytes, max(size // 2, 1))
        log.warning("the cluster refuses requests of %s bytes (413): at most %s from here on", size, self.max_bytes)
        if batch.count() > 1:
            self._store_halves(batch, resent)
        else:
            self._reject(batch, f"larger than the cluster accepts ({size:,} bytes)")

    def _settle(self, batch: Batch, answer: Response, resent: bool) -> Batch:
        """Count what an answer says of each document; return those that have to be sent again."""
        body, count = answer.body, batch.count()
        created, updated = body.count(b'"status":201'), body.count(b'"status":200')
        if body.startswith(b'{"errors":false') and created + updated == count:  # not parsed: most answers are this
            self._count(stored=count, replaced=updated)
            return Batch()
        items = [next(iter(item.values())) for item in answer.data.get("items", [])]
        if len(items) != count:
            self.last_refusal = f"{len(items)} answers to {count} documents"
            log.warning("%s; sending them again", self.last_refusal)
            return batch
        documents = batch.documents()
        there = set() if resent or self.id_column else self._there(
            [document for document, item in zip(documents, items) if item["status"] == 409]
        )  # fmt: skip
        left = [document for document, item in zip(documents, items)
                if not self._settled(document, item["status"], item.get("error", {}), resent or document.body in there)]
        return Batch.joined(left)

    def _there(self, documents: list[Batch]) -> set[bytes]:
        """Return the bodies of those that the index holds as they are.

        When a node dies the cluster sends a request on to the next copy by itself, and may meet its own first sending.
        """
        found: set[bytes] = set()
        for start in range(0, len(documents), BATCH_SIZE):  # a search returns 10,000 at most
            parsed = [(document.body, *map(json.loads, document.body.splitlines()))
                      for document in documents[start : start + BATCH_SIZE]]  # fmt: skip
            wanted = {next(iter(action.values()))["_id"]: (body, source) for body, action, source in parsed}
            self.request("POST", f"/{self.index}/_refresh")
            query = {"size": len(wanted), "query": {"ids": {"values": list(wanted)}}}
            params = {"allow_partial_search_results": "false", **self._on_primaries()}
            hits = self.request("POST", f"/{self.index}/_search", query, params=params).data["hits"]["hits"]
            there = {hit["_id"]: hit.get("_source") for hit in hits}
            found |= {body for name, (body, source) in wanted.items() if there.get(name) == source}
        return found

    def _settled(self, document: Batch, status: int, error: Mapping[str, Any], resent: bool) -> bool:
        kind, reason = str(error.get("type", "")), str(error.get("reason", ""))
        if status in (200, 201):
            self._count(stored=1, replaced=status == 200)
        elif status == 409 and self._is_of_this_load(reason):  # a later row, or this one by an earlier sending
            again = resent or re.search(r"current version \[(\d+)\].*\[\1\]", reason) is not None
            self._count(stored=1, replaced=not again, unsure=again)
        elif status == 409 and resent and not self.id_column:
            self._count(stored=1)  # by the first sending, ours or the cluster's own
        elif "block" in kind or status in (401, 403, 404):  # would be the same for all the others
            raise self._failure(f"POST /{self.index}/_bulk", status, json.dumps({"error": error}).encode())
        elif status == 429 or status >= 500:
            self.last_refusal = f"{status} {kind}: {reason}"
            return False
        else:
            cause = error.get("caused_by", {}).get("reason", "")
            self._reject(document, f"{kind}: {reason}{cause and ': ' + cause}")
        return True

    def _is_of_this_load(self, conflict: str) -> bool:
        """Say whether a version conflict is with another row of this load; else somebody's newer one is in the way."""
        there = re.search(r"current version \[(\d+)\]", conflict) if self.id_column else None
        return there is not None and 0 <= int(there[1]) - self.first_version <= self.tally.read

    def _reject(self, document: Batch, reason: str) -> None:
        named = re.search(r'field(?: \[|=")([^\]"]+)', reason)
        row = json.loads(document.body.split(b"\n")[1], parse_float=str, parse_int=str)  # digit for digit
        [(key, [line])] = document.origins
        self.rejects.add(key, line, Defect(reason, row, named[1] if named else None))

    def _count(self, *, stored: int, replaced: int = 0, unsure: int = 0) -> None:
        with self._tally_lock:
            self.tally.stored += stored
            self.tally.replaced += replaced
            self.tally.unsure += unsure

    # --- does it add up? ---

    def _verify_objects(self, objects: list[S3Object]) -> None:
        """Raise OperationFailed when S3 no longer holds what was loaded."""
        now = self.bucket.list_csv(self.prefix, self.settings.retry_seconds)  # all is stored: patience pays
        if changed := sorted({item.key for item in set(now) ^ set(objects)}):
            raise OperationFailed(
                f"s3://{self.bucket.name}/{self.prefix} changed during the load ({', '.join(changed[:5])}): the "
                "producer was still writing; run again when it has finished"
            )

    def _verify_sums(self) -> None:
        """Raise OperationFailed unless each row read was stored, rejected or skipped, and in the index seen first."""
        self.target.verify_same()
        tally, rejected = self.tally, self.rejects.count
        if tally.read != tally.stored + rejected + tally.skipped:
            raise OperationFailed(f"the rows do not add up: {rejected} rejected, {tally}; run again")

    def _verify_count(self) -> None:
        """Raise OperationFailed unless the index holds what the answers said was stored."""
        count, tally = self._get_index_count(self.index), self.tally
        most = tally.stored - tally.replaced
        if not most - tally.unsure <= count <= most:
            raise OperationFailed(
                f"{self.index} holds {count:,} documents, {most:,} were stored: somebody else writes to it; run again"
            )
        tally.replaced = tally.stored - count

    def _report(self, objects: list[S3Object], began: float) -> dict[str, Any]:
        """Return the sums. Raises TooManyRejects when more rows were rejected than accepted."""
        tally, rejected = self.tally, self.rejects.count
        result: dict[str, Any] = {
            "index": self.index, "objects": len(objects), "read": tally.read, "stored": tally.stored,
            "rejected": rejected, "skipped": tally.skipped, "replaced": tally.replaced,
            "documents": self._get_index_count(self.index), "seconds": seconds_since(began),
            "rows_per_second": per_second(tally.read, began),
        }  # fmt: skip
        sums = " ".join(f"{name}={value}" for name, value in result.items())
        if rejected:
            result["rejects_file"] = str(self.rejects.path)
        if rejected > self.max_rejects:
            raise TooManyRejects(
                f"finished, but {rejected:,} rows were rejected and {self.max_rejects:,} are accepted (MAX_REJECTS), "
                f"see {self.rejects.path}: {sums}", result
            )  # fmt: skip
        log.info("done: %s", sums)
        return result


# --- the command line -------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bulkupdate.py",
        description="Replace the documents of an index by the rows of the CSV files under an S3 prefix.",
    )
    parser.add_argument("--bucket", required=True, help="the S3 bucket")
    parser.add_argument("--prefix", required=True, help="the prefix of the keys; .csv and .csv.gz are taken")
    parser.add_argument("--index", required=True, type=index_name, help="the index to fill; no alias may point at it")
    return add_settings(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with BulkUpdate(args) as update:
        return update.run()


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
