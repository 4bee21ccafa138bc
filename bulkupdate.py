"""Replace the documents of an index by the rows of all CSV files under an S3 prefix, each row exactly once.

Example:    python bulkupdate.py --bucket your-bucket --prefix your/prefix/ --index my_index_primary --batch-size 1000
Exit codes: 0 the index holds every row, counted; 1 failed; 2 usage; 3 finished, with more rejected rows than
            MAX_REJECTS; 4 refused before the load touched anything; 75 locked; 129, 130, 143 signals.

From top to bottom in the order of the data: list, look, read, parse, type, render, batch, send, handle item results.
`Renderer` makes bulk text of records and knows no cluster; `BulkStore` stores bulk text and knows no CSV; the script
at the end, `BulkUpdate`, puts them together.
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
import math
import os
import re
import sys
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timezone
from decimal import Decimal
from functools import partial
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, BinaryIO

from index_cleanup import ClearableIndex
from opensearch_base_manager import (
    MAX_CONNECTIONS, SUITE, Aws, Connection, OpenSearchBaseManager, OperationFailed, Progress, Refused, Response, Retry,
    TooManyRejects, add_settings, aws_errors, bucket_name, bulk_probe, deleting_probes, field_definitions,
    in_background, index_name, log, parents_of, per_second, reading_probes, refuse_too_many_fields, run_cli,
    seconds_since, settings_probe,
)  # fmt: skip

MIB = 1024 * 1024
HEAD_BYTES = 64 * 1024  # enough to see a header and some hundred rows of each object
MAX_MANIFEST_BYTES = 16 * MIB  # about 100,000 objects
KEPT_BYTES = 16 * MIB  # of objects that were whole in their heads, together; others are read again
READS_AT_ONCE = 32  # S3 takes 50 to 200 ms for a first byte, and answers thousands of requests side by side
AHEAD_BYTES = MIB  # of an object, before its turn comes; the rest is asked for when it has come
READ_AHEAD_BYTES = 4 * MIB  # of all objects whose turn has not come
READ_BYTES = 256 * 1024  # at once from S3
S3_READ_TIMEOUT_S = 20  # S3 begins to answer within a second; after that long it hangs, and reading on costs little
S3_FIRST_CONTACT_S = 10  # a wrong endpoint or region shows at once
CHUNK_BYTES = 16 * 1024  # of text a step: the cells stay in the processor's cache; 256 KiB took 1.5 times as long
MAX_CELL_CHARS = 8 * MIB  # a quote still open after that much is a stray one
MAX_LINE_BYTES = 16 * MIB  # and a record's
MAX_BATCH_BYTES = 8 * MIB  # managed domains on small nodes refuse requests above 10 MiB
MIN_REQUESTS = 3  # in flight; fewer would leave two cores idle between requests
MAX_BYTES_IN_FLIGHT = 24 * MIB  # bodies in memory here and on the node, which accepts 10 % of its heap (107 MB of 1 GB)
MAX_BYTES_OF_FIXED = 40 * MIB  # with --workers
QUEUE_S = 0.1  # of work that may wait in the cluster; less costs distant loads time, more delays other clients' writes
JITTER = 0.25  # or this share of the fastest response: when times varied by 0.5 s around 1 s, the limit fell to 4
WINDOW_S, WINDOW_RESPONSES = 0.25, 1.2  # length of a measurement: at least so long, and so many fastest responses
REFRESH_EVERY_DOCUMENTS = 100_000  # 2 to 4 % faster than one refresh at the end
CACHED_CELLS = 4000  # remembered values a column, and no longer than this many characters each
CACHED_CELL_CHARS = 32
REJECTS_TOLERATED = 10_000  # past that the file is of another kind than the index; MAX_REJECTS may raise it
REJECTS_SHOWN = 5
REASONS_SHOWN = 10
REASON_END = re.compile(r""": ['"]| in document with id | \(""")  # what follows is about one row
KEEP_DAYS = 30
RECORD = f"{SUITE}/loaded"  # in `_meta`, with SKIP_UNCHANGED: what a load that ended well has stored
IRRELEVANT_SETTINGS = re.compile(  # to documents and to what searches answer
    r"index\.(uuid|creation_date|provided_name|version\.|resize\.|routing\.|number_of_replicas|auto_expand_replicas|"
    r"refresh_interval|blocks\.|translog\.|merge\.|unassigned\.|priority)"
)
DOCUMENT_END = "}\n"
FIRST_COMMA = re.compile("\n{,")  # of a document; str.replace takes 2.5 times as long
GZIP_MAGIC = b"\x1f\x8b"
MAX_ID_BYTES = 512  # one longer id and the cluster refuses the whole request
BULK_RESULTS = "errors,items.*.status,items.*.error.type,items.*.error.reason,items.*.error.caused_by.reason"
VALUE = re.compile(  # what a column name does not look like: nothing, a number, a date
    r"|[+-]?[0-9.,]*[0-9](?:[eE][+-]?[0-9]+)?|[0-9]{4}-[0-9]{2}-[0-9]{2}.*|[0-9]{1,2}/[0-9]{1,2}/[0-9]{2,4}.*"
)
METADATA_FIELDS = frozenset(
    ["_id", "_index", "_source", "_routing", "_field_names", "_ignored", "_size", "_type", "_seq_no", "_version",
     "_doc_count", "_nested_path", "_primary_term", "_data_stream_timestamp"]
)  # fmt: skip
NO_CSV = {  # how files begin that are something else
    b"\x28\xb5\x2f\xfd": "compressed with zstd", b"PK\x03\x04": "a zip archive or a spreadsheet",
    GZIP_MAGIC: "compressed with gzip twice", b"PAR1\x15": "Parquet",
}  # fmt: skip
ROWS_CHECKED = 100  # of each object in a dry run

csv.field_size_limit(MAX_CELL_CHARS)


# --- list -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class S3Object:
    key: str
    size: int
    etag: str
    modified: datetime = field(compare=False)  # another time alone makes it no other object

    def is_csv(self) -> bool:
        return self.key.lower().endswith((".csv", ".csv.gz"))

    def age_h(self, now: datetime) -> float:
        """Return the hours since it was written; below 0 where the clock of S3 is ahead."""
        return (now - self.modified).total_seconds() / 3600

    def __str__(self) -> str:
        return f"{self.key} ({self.modified:%Y-%m-%dT%H:%M:%SZ})"


def log_ignored(data: Sequence[S3Object], ignored: Sequence[S3Object]) -> None:
    """Log what is not loaded: CSV files whose names say that they are no data, and all else."""
    if leftovers := [item for item in ignored if item.is_csv()]:
        number, size = counted(len(leftovers), "object"), sum(item.size for item in leftovers)
        log.warning('not loaded, since a part of the name begins with "." or "_": %s (%s bytes), the first is %s',
                    number, f"{size:,}", leftovers[0].key)  # fmt: skip
    empty = sum(not item.size for item in data)
    folders = sum(item.key.endswith("/") for item in ignored)
    others = len(ignored) - len(leftovers) - folders
    parts = [(empty, "empty object"), (folders, "folder"), (others, "object")]
    if text := ", ".join(counted(number, word) for number, word in parts if number):
        log.info("not loaded: %s%s", text, " with another suffix" * (others > 0))


def is_data(item: S3Object, prefix: str, named: Container[str]) -> bool:
    """Return whether an object is to be loaded; those that a manifest names are, whatever their names."""
    return item.key in named or (item.is_csv() and not is_leftover(item.key, prefix))


def is_leftover(key: str, prefix: str) -> bool:
    """Return whether a name below the prefix marks no data, by Spark's rule: `_date=2024-01-01/` is a partition."""
    parts = key.removeprefix(prefix).split("/")
    if prefix and not prefix.endswith("/"):
        parts = parts[1:]  # the first one begins within the prefix
    return any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in parts)


def folders_of(prefix: str, objects: Iterable[S3Object]) -> list[str]:
    """Return the folders that a prefix without a final slash matches: `flights` matches flights/ and flights_old/."""
    if not prefix or prefix.endswith("/"):
        return []
    ends = {item.key: item.key.find("/", len(prefix)) + 1 for item in objects}
    return sorted({key[:end] for key, end in ends.items() if end})


@dataclass(frozen=True)
class Manifest:
    """What the producer says it wrote: the sizes of the objects by key, and the rows; None where it does not say."""

    sizes: Mapping[str, int | None] = field(default_factory=dict)
    rows: int | None = None

    def differences(self, objects: Iterable[S3Object]) -> list[str]:
        """Return what differs in the bucket, if the manifest names objects."""
        found = {item.key: item.size for item in objects} if self.sizes else {}
        return [
            *(f"{key} is missing" for key in self.sizes if key not in found),
            *(f"{key} is not in the manifest" for key in found if key not in self.sizes),
            *(f"{key} has {found[key]} bytes instead of {size}" for key, size in self.sizes.items()
              if size is not None and found.get(key, size) != size),
        ]  # fmt: skip


def parse_manifest(data: bytes, bucket: str, prefix: str) -> Manifest | None:
    """Parse what `UNLOAD ... MANIFEST VERBOSE` of Redshift writes, or `{"rows": N}`; return None for anything else.

    A manifest whose objects are all elsewhere is none either: it may have been copied with the data.
    """
    root = f"s3://{bucket}/"
    try:
        content = json.loads(data)
        entries = {entry["url"]: entry.get("meta", {}) for entry in content.get("entries", [])}
        sizes = {url.removeprefix(root): meta.get("content_length") for url, meta in entries.items()}
        counts = [meta.get("record_count") for meta in entries.values()] or [content.get("rows")]
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None
    rows = sum(counts) if all(type(count) is int and count >= 0 for count in counts) else None
    if sizes and not any(key.startswith(prefix) for key in sizes):
        return None
    return Manifest(sizes, rows) if sizes or rows is not None else None


def counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


class Bucket:
    """The objects of one bucket, read through one client; failures are OperationFailed and name the object.

    `list_objects` and S3Body try again; the client itself tries once, or each of their attempts would be several.
    `retry_seconds` is for how long a read that brings nothing, or the listing after a load, is tried again.
    """

    def __init__(self, name: str, aws: Aws, retry_seconds: float) -> None:
        self.name, self.retry_seconds = name, retry_seconds
        self.kept: dict[str, bytes] = {}  # small objects, by key: whole since their heads were read
        with aws_errors(f"s3://{name}", "s3:ListBucket on the bucket"):
            self.client = aws.client("s3", attempts=1, read_timeout_s=S3_READ_TIMEOUT_S, connections=READS_AT_ONCE + 1)

    def list_objects(self, prefix: str, retry_seconds: float) -> list[S3Object]:
        """Return all objects under a prefix, in the order of their keys.

        A listing that breaks off goes on behind the last key, for `retry_seconds` without a new one.
        """
        place, found, retry = f"s3://{self.name}/{prefix}", list[S3Object](), Retry(retry_seconds)
        while True:
            after = {"StartAfter": found[-1].key} if found else {}
            try:
                for page in self.client.get_paginator("list_objects_v2").paginate(
                    Bucket=self.name, Prefix=prefix, **after
                ):
                    found += [S3Object(item["Key"], item["Size"], item["ETag"], item["LastModified"])
                              for item in page.get("Contents", [])]  # fmt: skip
                    retry.restart()
                return found
            except Exception as error:
                if not (may_pass(error) and retry.wait(f"{place}: {error}; listing again")):
                    with aws_errors(place, "s3:ListBucket on the bucket"):
                        raise

    def get(self, item: S3Object, first: int, last: int) -> Any:
        """Return some bytes of an object as it was listed, as a stream.

        Raises OperationFailed when it was replaced or deleted since, or may not be read; what may pass (5xx, connection
        errors) is raised as it is.
        """
        from botocore.exceptions import ClientError

        place = f"s3://{self.name}/{item.key}"
        span = f"bytes={first}-{last}"
        try:
            return self.client.get_object(Bucket=self.name, Key=item.key, IfMatch=item.etag, Range=span)["Body"]
        except ClientError as error:
            if may_pass(error):
                raise
            if done := {404: "deleted", 412: "replaced"}.get(error.response["ResponseMetadata"]["HTTPStatusCode"]):
                raise OperationFailed(f"{place} was {done} since it was listed; run again") from None
            with aws_errors(place, "s3:GetObject (and kms:Decrypt for a key of your own)"):
                raise


def may_pass(error: Exception) -> bool:
    """Return whether a failure of S3 may be over soon: it is busy, or cannot be reached."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, SSLError

    if isinstance(error, ClientError):
        code, status = error.response["Error"].get("Code", ""), error.response["ResponseMetadata"]["HTTPStatusCode"]
        return bool(status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout") or "Throttl" in code)
    return isinstance(error, (HTTPClientError, ConnectionError)) and not isinstance(error, SSLError)


# --- look -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What the first 64 KiB of an object show: its columns, and whether rows follow."""

    key: str
    columns: Sequence[str] = ()
    has_rows: bool = False


class NewColumns(dict[str, set[str]]):
    """The columns that the mapping lacks, by name, with the kinds of their values in the heads."""

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        super().__init__()
        self._mapping, self._known = mapping, types_in(mapping)

    def undecided(self, columns: Sequence[str]) -> list[int]:
        """Add the new ones of these columns; return the places of those whose further values could change the type."""
        new = [(place, name) for place, name in enumerate(columns) if name not in self._known]
        return [place for place, name in new
                if "text" not in self.setdefault(name, set()) and is_dynamic(self._mapping, name)]  # fmt: skip


def read_heads(
    bucket: Bucket, objects: Iterable[S3Object], delimiter: str, new: NewColumns, check: FirstRows | None = None
) -> list[Head]:
    """Read the heads of all objects that hold something; complete objects are kept for the load, 16 MiB in total."""
    heads, kept = list[Head](), 0
    for item, data in read_ahead(bucket, [item for item in objects if item.size], HEAD_BYTES):
        head = look_at(item, data, delimiter, new, check)
        heads += [head] if head.columns else []
        if len(data) == item.size and kept + item.size <= KEPT_BYTES:
            bucket.kept[item.key] = data
            kept += item.size
    return heads


def look_at(
    item: S3Object, data: bytes, delimiter: str, new: NewColumns, check: FirstRows | None = None
) -> Head:
    """Read the head of an object. Raises Refused when it is not a CSV file that can be loaded."""
    data, complete = head_lines(item, data)
    columns, blocks = read_csv(io.BytesIO(data), item.key, delimiter, complete=False)
    if data and not columns:
        raise no_header(item.key)
    if check and columns:
        check.render(item.key, *read_csv(io.BytesIO(data), item.key, delimiter, complete=False))
    undecided, has_rows = new.undecided(columns), bool(columns) and not complete
    for block in blocks:
        has_rows = has_rows or any(block.rows)
        if has_rows and not undecided:
            break
        rows = [row for row in block.rows if isinstance(row, list) and len(row) == len(columns)]
        for place in undecided:
            new[columns[place]].update(map(kind_of, {row[place] for row in rows}))
    return Head(item.key, columns, has_rows)


def head_lines(item: S3Object, data: bytes) -> tuple[bytes, bool]:
    """Return the complete lines at the beginning of an object, unpacked, and whether they are all of it."""
    complete = len(data) >= item.size
    if data[:2] == GZIP_MAGIC:
        unpacker = zlib.decompressobj(31)  # expects a gzip header
        try:
            data = unpacker.decompress(data, HEAD_BYTES)
        except zlib.error as error:
            raise OperationFailed(f"{item.key}: broken gzip: {error}; write the object again") from None
        complete = complete and unpacker.eof and not unpacker.unused_data
    if found := [kind for magic, kind in NO_CSV.items() if data.startswith(magic)]:
        raise Refused(f"{item.key} is {found[0]}; save it as plain CSV, or compressed with gzip once")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or abs(data[::2].count(0) - data[1::2].count(0)) > len(data) // 4:
        raise Refused(f"{item.key}: UTF-16; save it as UTF-8")
    if data.count(0) > len(data) // 4:
        raise Refused(f"{item.key}: many NUL characters; is it a CSV file?")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\r" in data and b"\n" not in data:
        raise Refused(f"{item.key}: lines end with CR alone; save it with LF or CRLF")
    if not complete and b"\n" not in data:
        raise Refused(f"{item.key}: no line ends within the first {HEAD_BYTES // 1024} KiB; is it a CSV file?")
    return data if complete else data[: data.rindex(b"\n") + 1], complete


def check_headers(heads: Sequence[Head], known: Container[str]) -> None:
    """Raise Refused where an object has no header, or one that names no fields; log columns that only some have."""
    parts = Counter(name for head in heads for name in set(head.columns))
    for head in heads:
        common = {name for name in head.columns if name in known or parts[name] > 1}
        if (known or len(heads) > 1) and lacks_header(head.columns, common):
            value = next(name for name in head.columns if name not in common and VALUE.fullmatch(name))
            raise Refused(
                f"{head.key}: this part has no header: most of its column names are unknown, and {value!r} looks like "
                "a value; nothing was changed: add the column names to each part, or to the mapping"
            )
        check_names(head)
    if partial_columns := [f"{name} ({found} of {len(heads)})" for name, found in parts.items() if found < len(heads)]:
        log.info("columns that only some objects have: %s", ", ".join(partial_columns))


def lacks_header(columns: Sequence[str], known: Container[str]) -> bool:
    """Return whether a first row is data: fewer than half of its cells are known names, and one looks like a value.

    Values beside known names alone are names: `country,1960,1961`.
    """
    new = [name for name in columns if name not in known]
    values = sum(bool(VALUE.fullmatch(name)) for name in new)
    return len(new) * 2 > len(columns) and values > 0 and not values == len(new) < len(columns)


def check_names(head: Head) -> None:
    """Raise Refused where column names cannot be field names."""
    if doubled := sorted({name for name in head.columns if head.columns.count(name) > 1 and name}):
        raise Refused(f"{head.key}: doubled column names: {', '.join(doubled)}; rename them")
    if wrong := [name for name in head.columns if not all(name.split(".")) or name in METADATA_FIELDS]:
        names = ", ".join(map(repr, wrong))
        raise Refused(f"{head.key}: the header has names that cannot be fields: {names}; rename them")


def types_in(mapping: Mapping[str, Any]) -> dict[str, str]:
    return {name: definition.get("type", "object") for name, definition in field_definitions(mapping)}


def column_types(
    index: str, mapping: Mapping[str, Any], new: NewColumns
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Return the type of each column, and the definitions of the fields that the mapping lacks.

    Raises Refused for new columns that the mapping forbids.
    """
    dynamic = {name: rule["type"] for name in new if (rule := dynamic_property(mapping, name))}
    added = new_fields(index, mapping, {name: new[name] for name in new if name not in dynamic})
    types = {name: added.get(name, {"type": "text"})["type"] for name in new}
    return {**types_in(mapping), **types, **dynamic}, added


def new_fields(index: str, mapping: Mapping[str, Any], new: Mapping[str, set[str]]) -> dict[str, dict[str, Any]]:
    """Return the definitions of new columns, by the kinds of their values."""
    templates = {name: rule for name, kinds in new.items() if (rule := dynamic_template(mapping, name, kinds))}
    others = [name for name in new if name not in templates]
    if strict := [name for name in others if dynamic_of(mapping, name).startswith("strict")]:
        raise Refused(
            f"columns that the strict mapping of {index} does not know: {', '.join(strict)}; add them to the "
            "mapping, or take them out of the files"
        )
    if ignored := [name for name in others if dynamic_of(mapping, name).startswith("false")]:
        log.warning("not searchable, since the mapping does not know them (dynamic: false): %s", ", ".join(ignored))
    added = {name: templates.get(name) or new_field(kinds) for name, kinds in new.items() if name not in ignored}
    if torn := inside_values(mapping, added):
        raise Refused(f"columns inside of another that is no object: {', '.join(torn)}; rename one of the two")
    if added:
        log.info("new fields: %s", ", ".join(f"{name} ({value['type']})" for name, value in added.items()))
    return added


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
    kinds = kinds - {""}
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


def is_dynamic(mapping: Mapping[str, Any], name: str) -> bool:
    """Return whether a new field of this name could be added to the mapping, with a type."""
    return dynamic_of(mapping, name) not in ("false", "strict")


def dynamic_property(mapping: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the definition that `dynamic_properties` have for a column; the server refuses to add such a field."""
    rules: dict[str, dict[str, Any]] = mapping.get("dynamic_properties", {}) if is_dynamic(mapping, name) else {}
    return next((rule for pattern, rule in rules.items() if matches(pattern, name)), None)


def dynamic_template(mapping: Mapping[str, Any], name: str, kinds: set[str]) -> dict[str, Any] | None:
    """Return the definition of the first of the `dynamic_templates` that matches a new column.

    One with other conditions than `match_mapping_type` and `match` is not evaluated, nor are those behind it.
    """
    kind, leaf = new_field(kinds)["type"], name.rpartition(".")[2]
    for entry in mapping.get("dynamic_templates", []) if is_dynamic(mapping, name) else []:
        [(title, template)] = entry.items()
        if template.get("match_mapping_type", "*") not in ("*", {"text": "string"}.get(kind, kind)):
            continue
        if template.keys() - {"match_mapping_type", "match", "mapping"}:
            log.warning("the dynamic template %s is not evaluated for the new column %s; if it should apply, add the "
                        "column to the mapping", title, name)  # fmt: skip
            return None
        if matches(template.get("match", "*"), leaf):
            text = json.dumps({"type": kind, **template["mapping"]}).replace("{dynamic_type}", kind)
            definition: dict[str, Any] = json.loads(text.replace("{name}", json.dumps(leaf)[1:-1]))
            return definition
    return None


def matches(pattern: str, name: str) -> bool:
    """Return whether a name matches a pattern of the server, in which only the asterisk is special."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.S) is not None


def unwritable(columns: Iterable[str], types: Mapping[str, str]) -> list[str]:
    """Return the columns that no document could bring: alias fields, and single parts of nested objects."""
    nested = {name for name, kind in types.items() if kind == "nested"}
    return [name for name in columns if types.get(name) == "alias" or nested & parents_of(name)]


def inside_values(mapping: Mapping[str, Any], added: Mapping[str, Any]) -> list[str]:
    """Return the new fields that would be part of one that holds a value itself, as a.b would beside a number a."""
    values = {name for name, kind in types_in(mapping).items() if kind not in ("object", "nested")}
    return [name for name in added if parents_of(name) & {*values, *added}]


# --- read -------------------------------------------------------------------------------------------------------------


def read_ahead(bucket: Bucket, objects: Iterable[S3Object], limit: int) -> Iterator[tuple[S3Object, bytes]]:
    """Yield each object, in order, with its first `limit` bytes; those of the next ones are on their way meanwhile.

    They are 32 requests and 4 MiB at most. Raises OperationFailed for an object when its turn comes.
    """
    coming, left = deque[tuple[S3Object, Callable[[], bytes]]](), READ_AHEAD_BYTES
    for item in [*objects, None]:
        size = min(item.size, limit) if item else 0
        while coming and (not item or size > left or len(coming) == READS_AT_ONCE):
            left += min(coming[0][0].size, limit)
            yield coming[0][0], coming.popleft()[1]()  # in no variable: it would live until the next one
        if item and item.key in bucket.kept:
            coming.append((item, partial(bucket.kept.pop, item.key)))
        elif item:
            coming.append((item, in_background(S3Body(bucket, item, limit).read_all).result))
        left -= size


class S3Body(io.RawIOBase):
    """The bytes of one object, or the first `limit` of them; a read that breaks off is resumed there.

    `first` are those that were read before: the others are asked for at once, and come while these are taken.
    """

    def __init__(self, bucket: Bucket, item: S3Object, limit: int | None = None, first: bytes = b"") -> None:
        self.bucket, self.item = bucket, item
        self.position, self.end = 0, min(item.size, limit or item.size)
        self._first: memoryview | bytes = memoryview(first)
        self._opening: Future[Any] | None = None
        if 0 < len(first) < self.end:
            self._opening = in_background(partial(bucket.get, item, len(first), self.end - 1))
        self._body: Any = None

    def readable(self) -> bool:
        return True

    def read_all(self) -> bytes:
        return b"".join(iter(partial(self.read, READ_BYTES), b""))  # readall() of the library takes 8 KiB a step

    def readinto(self, buffer: Any) -> int:
        data: Any = self._first[: len(buffer)] or self._read(len(buffer))
        self._first = self._first[len(data) :] or b""  # an empty view would still hold all of it
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        retry = Retry(self.bucket.retry_seconds)
        while self.position < self.end:
            try:
                self._body = self._body or self._open()
                if data := self._body.read(size):
                    return bytes(data)
                raise OSError("it ended early")
            except OperationFailed:
                raise
            except Exception as error:  # urllib3, botocore, http.client and ssl each have their own for a broken read
                self._body = None
                place = f"s3://{self.bucket.name}/{self.item.key}, byte {self.position:,}"
                if not retry.wait(f"{place}: {error}; reading on from there"):
                    raise OperationFailed(f"{place}: cannot be read on: {error}; run again") from None
        return b""

    def _open(self) -> Any:
        opening, self._opening = self._opening, None
        return opening.result() if opening else self.bucket.get(self.item, self.position, self.end - 1)


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


def open_quote(place: str, line: int, where: str) -> OperationFailed:
    """Return the failure for a quote that does not close: how many rows it swallowed is unknown."""
    return OperationFailed(
        f"{place}, line {line}: a quote of the record that begins here is open {where}; mend the file"
    )


@dataclass
class Block:
    """Consecutive records, each a list of cells or a Defect; record i begins on line `lines[i]`."""

    lines: Sequence[int]
    rows: list[Any]
    empty: int = 0  # rows of empty cells, now blank lines
    repeated: list[int] = field(default_factory=list)  # lines of rows that repeat the header, now blank lines


def parse(text: str, place: str, first_line: int, delimiter: str) -> tuple[Block, str]:
    """Parse the records of a text that begins on `first_line`; return them, and the text of a last one left open.

    Raises OperationFailed when a quote is still open after 8 MiB.
    """
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    block, ends, rest = Block([], []), [0], ""  # the number of lines up to the end of each record
    while True:
        try:
            for row in reader:
                block.rows.append(row)
                ends.append(reader.line_num)
            break
        except csv.Error as error:
            lines = text.split("\n")
            raw = "\n".join(lines[ends[-1] : reader.line_num])
            if "end of data" in str(error):
                rest = "\n".join(lines[ends[-1] :])
                break
            if "field limit" in str(error) and raw.count('"') % 2:
                raise open_quote(place, first_line + ends[-1], f"after {MAX_CELL_CHARS // MIB} MiB") from None
            block.rows.append(Defect(f"not CSV: {error}", raw))
            ends.append(reader.line_num)
    plain = ends[-1] == len(block.rows)  # each line is a record
    block.lines = range(first_line, first_line + ends[-1]) if plain else [first_line + end for end in ends[:-1]]
    return block, rest


def mark_unreadable(block: Block) -> None:
    """Turn rows with a NUL or with bytes that are not UTF-8 into defects."""
    for place, row in enumerate(block.rows):
        text = "" if isinstance(row, Defect) else "".join(row)
        if found := re.search("[\0\udc80-\udcff]", text):
            reason = "a NUL character" if found[0] == "\0" else "bytes that are not UTF-8"
            block.rows[place] = Defect(reason, row)


def no_header(place: str, row: Any = None) -> Refused:
    what_to_do = "add the column names"
    if isinstance(row, Defect):
        spaced = re.search(r'"[ \t]', str(row.row))
        what_to_do = f"{row.reason}; {'remove the space between quote and delimiter' if spaced else 'mend the file'}"
    return Refused(f"{place}: the first line is not a CSV header: {what_to_do}")


def header_of(place: str, row: Any) -> list[str]:
    """Return the column names in the first record. Raises Refused when it is no CSV."""
    if not row or isinstance(row, Defect):
        raise no_header(place, row)
    if re.fullmatch("sep=.?", row[0]):
        raise Refused(f"{place}: the first line, {row[0]}, is for spreadsheets; remove it, and give the delimiter")
    return [sys.intern(name.strip()) for name in row]  # 10,000 objects need 10 MB less


def blank_out(block: Block, header: Sequence[str]) -> Block:
    """Turn rows of empty cells into blank lines, and rows that repeat the header of two columns or more."""
    last = header[-1] if len(header) > 1 else None
    for place in [place for place, row in enumerate(block.rows)
                  if isinstance(row, list) and not (row and row[0] and row[-1] != last)]:  # fmt: skip
        row = block.rows[place]
        if not any(row):
            block.empty += bool(row)
            block.rows[place] = []
        elif row[-1] == last and [row[0].removeprefix("\ufeff").strip('"'), *row[1:]] == header:  # each file has a BOM
            block.repeated.append(block.lines[place])
            block.rows[place] = []
    return block


def read_csv(
    stream: BinaryIO, place: str, delimiter: str, *, complete: bool = True
) -> tuple[list[str], Iterator[Block]]:
    """Return the columns of an object, none where it is empty, and its records in blocks; the only one that reads CSV.

    Where the stream is not `complete`, a last record that is left open is ignored. Raises Refused for the header, and
    OperationFailed when the object is broken gzip, when a line does not end, or when a quote is left open.
    """
    blocks = read_blocks(stream, place, delimiter, complete)
    first = next(blocks, None)
    if not first:
        return [], blocks
    columns = header_of(place, first.rows[0])
    blocks = itertools.chain(iter([Block(first.lines[1:], first.rows[1:])]), blocks)
    return columns, map(partial(blank_out, header=first.rows[0]), blocks)


def read_blocks(stream: BinaryIO, place: str, delimiter: str, complete: bool) -> Iterator[Block]:
    """Yield the records of one object in blocks, the header first."""
    text, line, suspect, left_open = "", 1, False, 0  # of a record left open: its text, its line, its length
    try:
        for piece, is_suspect in itertools.chain(read_lines(stream), [("", False)]):
            text += piece if text or line > 1 else piece.removeprefix("\ufeff")
            suspect = suspect or is_suspect  # its cells have to be checked one by one
            if piece and len(text) <= 2 * left_open:
                continue  # parsed anew with each piece, giant cells would take minutes
            block, rest = parse(text, place, line, delimiter)
            if suspect:
                mark_unreadable(block)
                suspect = bool(rest)
            line += text.count("\n") - rest.count("\n")
            text, left_open = rest, len(rest)
            if rest and not piece and complete:
                raise open_quote(place, line, "at the end of the file")
            if left_open > MAX_LINE_BYTES:
                raise open_quote(place, line, f"after {MAX_LINE_BYTES // MIB} MiB")
            if block.rows:
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OperationFailed(f"{place}: broken gzip: {error}; write the object again") from None
    except OverflowError as error:
        raise OperationFailed(f"{place}, after line {line + text.count(chr(10)) - 1}: {error}") from None


# --- type -------------------------------------------------------------------------------------------------------------

# what means that there is no value, for all types but those of `render_text`
EMPTY = frozenset(["", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None"])
NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?")
BOOLEANS = dict.fromkeys(["true", "yes", "t", "1"], "true") | dict.fromkeys(["false", "no", "f", "0"], "false")

Render = Callable[[str], str]  # from a cell's text to JSON; "" leaves the field out; ValueError makes a reject


def render_text(cell: str) -> str:
    return encode_basestring(cell) if cell else ""


def render_other(cell: str) -> str:
    """Dates, addresses, points and the like go as they stand: the server knows their formats."""
    return "" if cell.strip() in EMPTY else encode_basestring(cell)


def render_float(cell: str) -> str:
    """Return a number as JSON spells it, digit for digit; whether it fits is for the server to say."""
    if (cell := cell.strip()) in EMPTY:
        return ""
    sign, whole, fraction, exponent = number(cell).groups(default="")
    whole = whole.lstrip("0") or "0"
    return f"{sign.strip('+')}{whole}{fraction and '.' + fraction}{exponent and 'e' + exponent}"


def render_integer(cell: str, *, low: int, high: int) -> str:
    """Return an integer with every digit. Raises ValueError for a fraction or overflow, which the server would cut."""
    if (cell := cell.strip()) in EMPTY:
        return ""
    if len(number(cell)[4] or "") > 4:  # what Decimal cannot hold
        raise ValueError("out of range")
    value = Decimal(cell)
    if value != value.to_integral_value():
        raise ValueError("a fraction in an integer field")
    if not low <= value <= high:
        raise ValueError("out of range")
    return str(int(value))


def number(cell: str) -> re.Match[str]:
    """Return the parts of a number: sign, whole, fraction, exponent. Raises ValueError."""
    match = NUMBER.fullmatch(cell)
    if not match or not (match[2] or match[3]):
        raise ValueError("not a number")
    return match


def signed(bits: int) -> Render:
    return partial(render_integer, low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1)


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


RENDERERS: dict[str, Render] = {  # every other type: render_other
    "long": signed(64),
    "integer": signed(32),
    "short": signed(16),
    "byte": signed(8),
    "unsigned_long": partial(render_integer, low=0, high=2**64 - 1),
    "boolean": render_boolean,
    **dict.fromkeys("double float half_float scaled_float rank_feature".split(), render_float),
    **dict.fromkeys("text keyword match_only_text wildcard constant_keyword search_as_you_type".split(), render_text),
    **dict.fromkeys("object nested flat_object percolator knn_vector sparse_vector rank_features".split(), render_json),
    **dict.fromkeys("integer_range long_range float_range double_range date_range ip_range".split(), render_json),
}


# --- render -----------------------------------------------------------------------------------------------------------


class Column(dict[str, str]):
    """From a cell's text to its finished `,"name":value` token; remembers the latest few thousand."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self.name, self.render = name, RENDERERS.get(kind, render_other)
        self.prefix = f",{encode_basestring(name)}:"

    def __missing__(self, cell: str) -> str:
        value = self.render(cell)
        token = self.prefix + value if value else ""
        if len(cell) <= CACHED_CELL_CHARS:
            if len(self) >= CACHED_CELLS:
                self.clear()
            self[cell] = token
        return token


def separator(operation: str, quoted_id: str, version: str = "") -> str:
    """Return the text between two documents: the end of one, the action line of the next, and its brace."""
    return f'{DOCUMENT_END}{{"{operation}":{{"_id":{quoted_id}{version}}}}}\n{{'


def separator_with_id(cell: str, version: int, no_ids: Container[str]) -> str:
    """Take the id from a column; thanks to the version a later row wins, in any order of arrival."""
    if cell.strip() in no_ids or len(cell.encode()) > MAX_ID_BYTES:
        raise ValueError(f"no id, or one of more than {MAX_ID_BYTES} bytes")
    return separator("index", encode_basestring(cell), f',"version":{version},"version_type":"external"')


@dataclass
class Source:
    """One object while its records are rendered."""

    key: str
    columns: list[Column]
    id_place: int  # of the column that holds the id
    separator: str  # with a placeholder for the number of the record
    record: int = 1  # the number of the next one


class Renderer:
    """Turns the records of all objects into bulk text; what cannot become a document goes to `reject(key, line, ...)`.

    Used by the main thread alone, but for `is_own_version`. Without an id column the ids depend on bucket, key and
    record alone: sending or loading again changes nothing.
    """

    def __init__(
        self, types: Mapping[str, str], reject: Callable[[str, int, Defect], None], *, bucket: str,
        id_column: str = "", operation: str = "create",
    ) -> None:  # fmt: skip
        self.columns = {name: Column(name, kind) for name, kind in types.items()}
        self.reject, self.bucket = reject, bucket
        self.id_column, self.operation = id_column, operation
        is_text = RENDERERS.get(types.get(id_column, "text")) is render_text  # `NA` is Namibia
        self.no_ids = {"", r"\N"} if is_text else {*EMPTY, r"\N"}
        self.first_version = time.time_ns()  # of --id-column: a later row has a higher one, a later load too
        self.read = self.skipped = 0  # records
        self.empty = self.repeated = 0  # of the skipped ones: rows of empty cells, rows that repeat the header
        self.first_repeated = ""

    def documents(self, key: str, columns: Sequence[str], blocks: Iterable[Block]) -> Iterator[Batch]:
        """Yield the documents of one object."""
        id_place = columns.index(self.id_column) if self.id_column in columns else 0
        digest = hashlib.sha256(f"{self.bucket}/{key}".encode()).hexdigest()[:16]
        placeholder = separator(self.operation, f'"{digest}-%09d"')
        source = Source(key, [self.columns[name] for name in columns], id_place, placeholder)
        for block in blocks:
            lines = block.lines
            try:
                text = self._render(source, block.rows)
            except ValueError:  # something is wrong in one of them
                lines, text = self._render_good(source, block)
            self.empty += block.empty
            if block.repeated:
                self.first_repeated = self.first_repeated or f"{key} line {block.repeated[0]}"
                self.repeated += len(block.repeated)
            yield Batch.of(key, lines, text)

    def is_own_version(self, version: int) -> bool:
        """Say whether a document of this version is a row of this load; else it is somebody's newer one."""
        return 0 <= version - self.first_version <= self.read

    def _render(self, source: Source, rows: Sequence[Any]) -> str:
        r"""Return the documents of consecutive records. Raises ValueError when one of them is no document.

        The cells are rendered a column at a time, so that nearly all of it runs in C.

            rows    [7, a], [8, b]
            cells   (7, 8), (a, b)
            parts   }\n{"create":{"_id":"x-1"}}\n{   ,"n":7  ,"k":"a"   }\n{...   ,"n":8  ,"k":"b"
        """
        if {len(row) if isinstance(row, list) else 0 for row in rows} != {len(source.columns)}:
            raise ValueError("a defect, or records of different widths")
        cells = list(zip(*rows))
        stride = len(cells) + 1
        parts = [""] * (stride * len(rows))
        parts[::stride] = self._separators(source, cells[source.id_place])
        for place, (column, values) in enumerate(zip(source.columns, cells), 1):
            parts[place::stride] = map(column.__getitem__, values)
        source.record += len(rows)
        self.read += len(rows)
        return "".join(parts)

    def _render_good(self, source: Source, block: Block) -> tuple[list[int], str]:
        """Return the lines and the documents of those records that are good."""
        lines, texts = [], []
        for line, row in zip(block.lines, block.rows):
            try:
                texts.append(self._render(source, [row]))
                lines.append(line)
            except ValueError as error:
                source.record += 1
                self.read += 1
                if row:
                    self.reject(source.key, line, self._defect(source, row, str(error)))
                else:
                    self.skipped += 1
        return lines, "".join(texts)

    def _defect(self, source: Source, row: Any, reason: str) -> Defect:
        """Return why a record is no document, and in which column; `reason` where only its id is wrong."""
        if isinstance(row, Defect):
            return row
        if len(row) != len(source.columns):
            return Defect(f"{len(row)} cells under {len(source.columns)} column names", row)
        for column, cell in zip(source.columns, row):
            try:
                column.render(cell)
            except ValueError as error:
                named = dict(zip((column.name for column in source.columns), row))
                return Defect(f"{error}: {cell[:100]!r}", named, column.name)
        return Defect(reason, row, self.id_column)

    def _separators(self, source: Source, ids: Sequence[str]) -> Iterator[str]:
        """Yield the separators before consecutive documents."""
        if self.id_column:
            versions = itertools.count(self.first_version + self.read)
            return map(partial(separator_with_id, no_ids=self.no_ids), ids, versions)
        return map(source.separator.__mod__, range(source.record, source.record + len(ids)))


class FirstRows:
    """Renders the first rows of each object as the load would, to see in a dry run what it would reject."""

    def __init__(self, types: Mapping[str, str], bucket: str, id_column: str) -> None:
        self._renderer = Renderer(types, self._reject, bucket=bucket, id_column=id_column)
        self.rejected, self.reasons = 0, list[str]()

    def render(self, key: str, columns: Sequence[str], blocks: Iterable[Block]) -> None:
        for name in columns:  # the type of a new one will fit all cells of the heads
            self._renderer.columns.setdefault(name, Column(name, "text"))
        records = (record for block in blocks for record in zip(block.lines, block.rows))
        first = list(itertools.islice(records, ROWS_CHECKED))
        block = Block([line for line, _ in first], [row for _, row in first])
        list(self._renderer.documents(key, columns, [block]))

    def _reject(self, key: str, line: int, defect: Defect) -> None:
        self.rejected += 1
        if len(self.reasons) < REJECTS_SHOWN:
            self.reasons.append(f"{key} line {line}: {defect.reason}")

    def refuse(self, accepted: int) -> None:
        """Raise Refused if the load would reject more rows than are accepted."""
        if self.rejected > accepted:
            raise Refused(
                f"of the first {ROWS_CHECKED} rows of each object {self.rejected:,} would be rejected, {accepted:,} "
                f"are accepted (MAX_REJECTS); nothing was changed: mend data or mapping. {'; '.join(self.reasons)}"
            )


# --- batch ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Documents as finished bulk text, two lines each, and the objects and lines they came from, in the same order."""

    body: bytes = b""
    origins: Sequence[tuple[str, Sequence[int]]] = ()

    @classmethod
    def of(cls, key: str, lines: Sequence[int], text: str) -> Batch:
        """Return documents of one object; each begins with the separator, which ends the document before.

        The first field of each still has its comma. The text of a cell holds no newline, so these are all.
        """
        text = FIRST_COMMA.sub("\n{", text)
        return cls((text[len(DOCUMENT_END) :] + DOCUMENT_END).encode(), [(key, lines)]) if text else cls()

    @classmethod
    def joined(cls, parts: Sequence[Batch]) -> Batch:
        return cls(b"".join(part.body for part in parts), [origin for part in parts for origin in part.origins])

    def count(self) -> int:
        return sum(len(lines) for _, lines in self.origins)

    def cut(self, at: int) -> tuple[Batch, Batch]:
        """Return the first `at` documents, and the others."""
        if at >= self.count():
            return self, Batch()
        *lines, rest = self.body.split(b"\n", 2 * at)
        first, others = list[tuple[str, Sequence[int]]](), list[tuple[str, Sequence[int]]]()
        for key, numbers in self.origins:
            first.append((key, numbers[:at]))
            others.append((key, numbers[at:]))
            at -= len(first[-1][1])
        return Batch(b"\n".join([*lines, b""]), first), Batch(rest, others)

    def documents(self) -> list[Batch]:
        """Return each document as a batch of its own."""
        places = ((key, line) for key, lines in self.origins for line in lines)
        texts = iter(self.body.split(b"\n"))
        return [Batch(b"%s\n%s\n" % pair, [(key, [line])]) for pair, (key, line) in zip(zip(texts, texts), places)]


def batches(documents: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Make batches of `size` documents or 8 MiB of smaller and larger ones, across the borders of objects."""
    parts: list[Batch] = []
    count = length = 0
    for rest in documents:
        while rest.count():
            part, rest = rest.cut(size - count)
            parts.append(part)
            count, length = count + part.count(), length + len(part.body)
            if count >= size or length >= MAX_BATCH_BYTES:
                batch = Batch.joined(parts)
                parts, count, length = [], 0, 0  # before the wait: they are as large as the batch
                yield batch
    if parts:
        yield Batch.joined(parts)


# --- send -------------------------------------------------------------------------------------------------------------


class ConcurrencyLimit:
    """How many bulk requests may be in flight, by Little's law.

    The limit is the number of requests that the cluster completes in its fastest response time plus a tenth of a
    second, or a quarter of that time if it is longer. More would only wait in the cluster's queue, in front of other
    clients' writes. The rate is measured anew in each window, from one completion to another. After a 429 the limit is
    half the number in flight, and rises by at most one per window. A fixed limit only follows 429.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed, self.max_bytes = fixed, MAX_BYTES_OF_FIXED if fixed else MAX_BYTES_IN_FLIGHT
        self.number = self._ceiling = self._most = fixed or MAX_CONNECTIONS
        self.in_flight = 0  # counted by BulkWorkers
        self._lock = threading.Lock()  # guards what follows, and `number`
        self._fastest_s = math.inf
        self._window_began, self._completed = 0.0, 0  # 0.0: the next completion begins one
        self._halved = 0.0

    def completed(self, sent: float) -> None:
        """Count a first attempt that was stored completely; at the end of a window, set the limit."""
        with self._lock:
            now = time.monotonic()
            self._fastest_s = min(self._fastest_s, now - sent)
            if not self._window_began:
                self._window_began, self._completed = now, 0
                return
            self._completed += 1
            seconds = now - self._window_began
            if seconds < max(WINDOW_S, WINDOW_RESPONSES * self._fastest_s):
                return
            self._ceiling = min(self._ceiling + 1, self._most)
            response_s = self._fastest_s + max(QUEUE_S, JITTER * self._fastest_s)
            wanted = math.ceil(self._completed / seconds * response_s)
            self.number = min(self.fixed or max(wanted, MIN_REQUESTS), self._ceiling)
            self._window_began, self._completed = now, 0

    def halve(self, sent: float) -> None:
        """Halve the number in flight, once per round trip: a request sent at this time was answered with 429."""
        with self._lock:
            if sent > self._halved:
                self._halved, self._window_began = time.monotonic(), 0.0
                self.number = self._ceiling = max(1, min(self.number, self.in_flight) // 2)
                log.warning("the cluster is busy (429): at most %s requests in flight from here on", self.number)

    def interrupt(self) -> None:
        """Discard the current window: nothing was in flight, so its rate would not be the cluster's."""
        with self._lock:
            self._window_began = 0.0


class BulkWorkers:
    """Stores each batch in a thread of its own, as many at a time as the limit allows.

    The first error of a thread is raised in the main thread. The threads are daemons: after a failure, a request that
    hangs cannot keep the process alive.
    """

    def __init__(self, store: Callable[[Batch], None], limit: ConcurrencyLimit) -> None:
        self._store, self._limit = store, limit
        self._changed = threading.Condition()  # guards what follows, and the limit's `in_flight`
        self._error: BaseException | None = None
        self._bytes = 0  # of the bodies in flight
        self.peak = 0  # most batches in flight

    def put(self, batch: Batch) -> None:
        """Begin to store a batch as soon as the limit allows. Raises the first error of a thread."""
        size, limit = len(batch.body), self._limit
        with self._changed:
            self._wait_for(lambda: limit.in_flight < limit.number and self._bytes + size <= limit.max_bytes)
            if not limit.in_flight:
                limit.interrupt()
            limit.in_flight += 1
            self._bytes += size
            self.peak = max(self.peak, limit.in_flight)
        threading.Thread(target=self._work, args=[batch], daemon=True).start()

    def finish(self) -> None:
        """Return when all batches are stored. Raises the first error of a thread."""
        with self._changed:
            self._wait_for(lambda: False)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until this is so, or nothing is in flight."""
        self._changed.wait_for(lambda: self._error or not self._limit.in_flight or condition())
        if self._error:
            raise self._error

    def _work(self, batch: Batch) -> None:
        error = None
        try:
            self._store(batch)
        except BaseException as caught:
            error = caught
        with self._changed:
            self._error = self._error or error
            self._limit.in_flight -= 1
            self._bytes -= len(batch.body)
            self._changed.notify()


class BulkStore:
    """Stores batches, for any number of threads at a time; what the cluster refuses goes to `reject(key, line, ...)`.

    Documents refused with 429 or 5xx are sent again, alone, for `retry_seconds` without progress at most; a batch too
    large for the cluster (413) is halved. `is_own_version` is given where ids come from a column, `creates` where no
    document may replace another: then 200 means that a pipeline dropped it, otherwise the result is `noop`.
    """

    def __init__(
        self, cluster: Connection, index: str, reject: Callable[[str, int, Defect], None], limit: ConcurrencyLimit,
        *, retry_seconds: float, refresh_every: int = 0, is_own_version: Callable[[int], bool] | None = None,
        creates: bool = False,
    ) -> None:  # fmt: skip
        self._cluster, self.index, self._reject, self._limit = cluster, index, reject, limit
        self._retry_seconds, self._refresh_every, self._is_own_version = retry_seconds, refresh_every, is_own_version
        self._creates = creates
        more = "" if creates else ",items.*.result"
        self._params = {"filter_path": BULK_RESULTS + more}
        self._lock = threading.Lock()  # of what follows
        self.stored = 0
        self.dropped = 0  # by an ingest pipeline
        self.replaced = 0  # of the stored ones, rows of an id that another row has as well
        self.unsure = 0  # of the stored ones, perhaps replaced: the response that would tell was lost
        self._max_bytes = MAX_BATCH_BYTES
        self._refreshed_at = 0  # documents

    def store(self, batch: Batch) -> None:
        """Store a batch: each document is stored once or rejected when this returns.

        Raises OperationFailed when documents stay refused, or what the requests raise.
        """
        self._store(batch)
        with self._lock:  # refresh now and then, or one core is busy with it at the end while the others are idle
            due = 0 < self._refresh_every <= self.stored - self._refreshed_at
            self._refreshed_at = self.stored if due else self._refreshed_at
        if due:
            self._cluster.request("POST", f"/{self.index}/_refresh")

    def _store(self, batch: Batch, resent: bool = False) -> None:
        retry = Retry(self._retry_seconds)
        while count := batch.count():
            if len(batch.body) > self._max_bytes and count > 1:
                for half in batch.cut(count // 2):
                    self._store(half, resent)
                return
            response = self._cluster.request(
                "POST", f"/{self.index}/_bulk", batch.body, params=self._params, accept=[413], busy=self._limit.halve
            )
            resent = resent or response.resent
            if response.status == 413:
                if count == 1:
                    return self._refused(batch, f"larger than the cluster accepts ({len(batch.body):,} bytes)")
                self._lower_max_bytes(len(batch.body))
                continue
            batch, refusal = self._handle_item_results(batch, response, resent)
            if batch.count():
                self._limit.halve(response.sent)
            elif response.first and not resent:
                self._limit.completed(response.sent)
            if batch.count() < count:
                retry.restart()
            if refusal and not retry.wait(f"the cluster rejected {batch.count():,} documents: {refusal}; trying again"):
                raise OperationFailed(
                    f"{self.index}: the cluster kept rejecting {batch.count():,} documents for "
                    f"{self._retry_seconds:g} s; last error: {refusal}; check the cluster's load and run again"
                )
            resent = True

    def _lower_max_bytes(self, size: int) -> None:
        with self._lock:
            self._max_bytes = most = min(self._max_bytes, max(size // 2, 1))
        log.warning("the cluster rejects requests of %s bytes (413): at most %s from here on", size, most)

    # --- handle item results ---

    def _handle_item_results(self, batch: Batch, response: Response, resent: bool) -> tuple[Batch, str]:
        """Count or reject each document; return those that have to be sent again, and why."""
        body, count = response.body, batch.count()
        created, updated = body.count(b'"status":201'), body.count(b'"status":200')
        if body.startswith(b'{"errors":false') and created + updated == count:  # not parsed: most responses are this
            dropped = updated if self._creates else body.count(b'"result":"noop"')
            self._count(stored=count - dropped, replaced=updated - dropped, dropped=dropped)
            return Batch(), ""
        items = [next(iter(item.values())) for item in response.data.get("items", [])]
        if len(items) != count:
            return batch, f"{len(items)} answers to {count} documents"
        again, refusal = [], ""
        for document, item in zip(batch.documents(), items):
            status, error = item["status"], item.get("error", {})
            if status == 200 and (self._creates or item.get("result") == "noop"):
                self._count(dropped=1)
                continue
            if self._is_final(document, status, error, resent):
                continue
            again.append(document)
            refusal = f"{status} {error.get('type', '')}: {error.get('reason', '')}"
        return Batch.joined(again), refusal

    def _is_final(self, document: Batch, status: int, error: Mapping[str, Any], resent: bool) -> bool:
        """Count or reject a document by its result; say False when it has to be sent again."""
        kind, reason = str(error.get("type", "")), str(error.get("reason", ""))
        if status in (200, 201):
            self._count(stored=1, replaced=status == 200)
        elif status == 409 and self._is_of_this_load(reason):  # a later row, or this one by an earlier attempt
            again = resent or re.search(r"current version \[(\d+)\].*\[\1\]", reason) is not None
            self._count(stored=1, replaced=not again, unsure=again)
        elif status == 409 and not self._is_own_version:
            self._count(stored=1)  # by an earlier attempt: ours, or the cluster's own when a node fails
        elif "block" in kind or status in (401, 403, 404):
            raise self._cluster.failure(f"POST /{self.index}/_bulk", status, json.dumps({"error": error}).encode())
        elif status == 429 or status >= 500:
            return False
        else:
            cause = error.get("caused_by", {}).get("reason", "")
            if status == 409:
                cause = "the clock of the host of an earlier load was ahead, or another client writes to the index"
            self._refused(document, f"{kind}: {reason}{cause and ': ' + cause}")
        return True

    def _is_of_this_load(self, conflict: str) -> bool:
        there = re.search(r"current version \[(\d+)\]", conflict)
        return bool(there and self._is_own_version and self._is_own_version(int(there[1])))

    def _refused(self, document: Batch, reason: str) -> None:
        named = re.search(r'field(?: \[|=")([^\]"]+)', reason)
        row = json.loads(document.body.split(b"\n")[1], parse_float=str, parse_int=str)  # digit for digit
        [(key, line)] = [(key, line) for key, lines in document.origins for line in lines]
        self._reject(key, line, Defect(reason, row, named[1] if named else None))

    def _count(self, *, stored: int = 0, replaced: int = 0, unsure: int = 0, dropped: int = 0) -> None:
        with self._lock:
            self.dropped += dropped
            self.stored += stored
            self.replaced += replaced
            self.unsure += unsure


class Rejects:
    """Counts rejected rows and writes each to a file of its own for this run, made for its owner alone."""

    def __init__(self, folder: Path, index: str, accepted: int) -> None:
        self.path = folder / f"rejects-{index}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.ndjson"
        self.limit, self.count = max(accepted, REJECTS_TOLERATED), 0
        self._reasons = Counter[tuple[str | None, str]]()  # by column and reason less its values
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
            where = f"{self.path.parent}: {error.strerror}"
            raise OperationFailed(f"{where}; set LOG_DIR to a folder of your own") from None

    def add(self, key: str, line: int, defect: Defect) -> None:
        entry = {"object": key, "line": line, "column": defect.column, "reason": defect.reason, "row": defect.row}
        with self._lock:
            self.count += 1
            self._reasons[defect.column, REASON_END.split(defect.reason)[0]] += 1
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
                raise OperationFailed(
                    f"more than {self.limit:,} rows are rejected: mend data or mapping, see {self.path}"
                )

    def summary(self) -> list[dict[str, Any]]:
        """Return how many rows were rejected for which reason in which column, the most frequent first."""
        return [{"rows": rows, "column": column, "reason": reason}
                for (column, reason), rows in self._reasons.most_common(REASONS_SHOWN)]  # fmt: skip

    def log_summary(self) -> None:
        for entry in self.summary():
            column = f"{entry['column']}: " if entry["column"] else ""
            log.warning("rejected: %s x %s%s", entry["rows"], column, entry["reason"])

    def _open(self) -> Any:
        if self.path.exists():  # of another load that began in the same second
            self.path = self.path.with_stem(f"{self.path.stem}-{os.getpid()}")
        return os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")


# --- the script -------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """What became of the rows: read = stored + rejected + skipped + dropped, or something was lost."""

    read: int
    stored: int
    rejected: int
    skipped: int
    empty: int  # of the skipped ones, rows of empty cells
    dropped: int  # by an ingest pipeline
    replaced: int  # of the stored ones, those whose id another row has as well
    unsure: int  # of the stored ones, perhaps replaced
    requests_under_way: int  # at most


class Delivery:
    """The objects under the prefix, and what READY_OBJECT, a manifest and settings say of them."""

    def __init__(self, settings: argparse.Namespace, bucket: Bucket) -> None:
        self.settings, self.bucket = settings, bucket
        self.place, self.manifest = f"s3://{settings.bucket}/{settings.prefix}", Manifest()

    def objects(self) -> list[S3Object]:
        """Return the objects to load. Raises Refused where their producer has not finished, or has not begun."""
        found, ready = self._listed(S3_FIRST_CONTACT_S)
        if ready:
            self.manifest = self._read_manifest(ready)
        objects = self._data_in(found)
        data = set(objects)
        ignored = [item for item in found if item not in data]
        log_ignored(objects, ignored)
        if not objects:
            advice = "check bucket and prefix"
            if others := [item.key for item in ignored if not item.is_csv()]:
                advice = f"{others[0]} has another suffix; a manifest (READY_OBJECT) may name such objects"
            raise Refused(f"{self.place}: no .csv or .csv.gz object, nothing was changed; {advice}")
        log.info("%s: %s objects, %s bytes, from %s to %s", self.place, len(objects),
                 f"{sum(item.size for item in objects):,}", objects[0].key, objects[-1].key)  # fmt: skip
        if len(folders := folders_of(self.settings.prefix, objects)) > 1:
            log.warning("the prefix %s does not end with a slash, and all folders that it matches are loaded: %s",
                        self.settings.prefix, ", ".join(folders))  # fmt: skip
        self._refuse_untimely(objects, ready)
        if differences := self.manifest.differences(objects):
            raise Refused(
                f"{self.place}: {self.settings.ready_object} (READY_OBJECT) names other objects, nothing was changed: "
                f"{'; '.join(differences[:5])}; run again when the producer has finished, or with READY_OBJECT=none if "
                "the files are right"
            )
        return objects

    def _refuse_untimely(self, objects: list[S3Object], ready: S3Object | None) -> None:
        """Raise Refused where the producer of the files is still writing, or has written nothing since long."""
        newest, oldest = (pick(objects, key=lambda item: item.modified) for pick in (max, min))
        now, limit = datetime.now(timezone.utc), self.settings.max_age_hours
        log.info("the newest object is %s, %.1f h old, the oldest %s, %.1f h", newest, newest.age_h(now), oldest,
                 oldest.age_h(now))  # fmt: skip
        what = f"{self.place}: {self.settings.ready_object} (READY_OBJECT)"
        if self.settings.ready_object and not ready:
            raise Refused(f"{what} is not there, nothing was changed; run again when the producer has finished")
        if ready and ready.modified < newest.modified:
            raise Refused(
                f"{what} is older than the newest object, {newest}: {ready}; nothing was changed: the producer is "
                "still writing; run again when it has finished"
            )
        if limit is not None and newest.age_h(now) > limit:
            raise Refused(
                f"{self.place}: the newest object, {newest}, is {newest.age_h(now):.1f} h old, more than MAX_AGE_HOURS "
                f"({limit:g}); nothing was changed: see why the producer has written nothing since"
            )

    def verify_unchanged(self, objects: Iterable[S3Object]) -> None:
        """Raise OperationFailed unless S3 still holds these objects."""
        found, _ = self._listed(self.bucket.retry_seconds)  # all is stored: waiting pays
        if changed := sorted({item.key for item in set(self._data_in(found)) ^ set(objects)}):
            raise OperationFailed(
                f"{self.place} changed during the load ({', '.join(changed[:5])}): the producer was still writing; run "
                "again when it has finished"
            )

    def _listed(self, retry_seconds: float) -> tuple[list[S3Object], S3Object | None]:
        """List the prefix; return READY_OBJECT apart from the others."""
        prefix, name = self.settings.prefix, self.settings.ready_object
        found = self.bucket.list_objects(prefix, retry_seconds)
        ready = next((item for item in found if name and item.key in (prefix + name, f"{prefix}/{name}")), None)
        return [item for item in found if item is not ready], ready

    def _data_in(self, found: list[S3Object]) -> list[S3Object]:
        return [item for item in found if is_data(item, self.settings.prefix, self.manifest.sizes)]

    def _read_manifest(self, ready: S3Object) -> Manifest:
        data = S3Body(self.bucket, ready).read_all() if 0 < ready.size <= MAX_MANIFEST_BYTES else b""
        manifest = parse_manifest(data, self.bucket.name, self.settings.prefix)
        if not manifest:
            log.info("%s (READY_OBJECT) is no manifest: neither objects nor rows are compared", ready.key)
            return Manifest()
        rows = "an unknown number of rows" if manifest.rows is None else counted(manifest.rows, "row")
        log.info("%s (READY_OBJECT) is a manifest: %s, %s", ready.key, counted(len(manifest.sizes), "object"), rows)
        return manifest

    def expected_rows(self) -> int | None:
        """Return how many rows the load must read, if that is known; EXPECTED_ROWS=0 says that it is not."""
        given: int | None = self.settings.expected_rows
        return self.manifest.rows if given is None else given or None


class LoadRecord:
    """SKIP_UNCHANGED: proof in an index's `_meta` that it holds exactly what a load from `source` stores.

    It names the source, the loader, fields and settings, and of each primary shard the history and the last sequence
    number, which change with every write and every restore.
    """

    def __init__(self, manager: OpenSearchBaseManager, target: ClearableIndex, source: Sequence[Any]) -> None:
        self._manager, self._target, self._source = manager, target, source
        self._writes_before = 0

    def begin(self) -> None:
        """Remember the number of writes so far, when the index has been emptied."""
        self._writes_before = self._count_writes(self._shards())

    def write(self, stored: int) -> None:
        """Write the record, unless another client wrote to the index during the load."""
        found = self._manager._verify_index_exists(self._target.name)
        record, mapping = self._current(found), found["mappings"]
        if self._count_writes(record["writes"]) - self._writes_before == stored:
            meta = {**mapping.get("_meta", {}), RECORD: record}
            self._manager.request("PUT", f"/{self._target.name}/_mapping", {"_meta": meta})

    def unchanged(self) -> dict[str, Any] | None:
        """Return the record if the index still is as recorded, of the same source, and complete."""
        found = self._manager._verify_index_exists(self._target.name)
        meta = found["mappings"].get("_meta", {})
        if RECORD not in meta or SUITE in meta:
            return None
        record = self._current(found)
        return record if meta[RECORD] == record else None

    def _current(self, found: Mapping[str, Any]) -> dict[str, Any]:
        fields = {key: value for key, value in found["mappings"].items() if key != "_meta"}
        settings = {name: value for name, value in found["settings"].items() if not IRRELEVANT_SETTINGS.match(name)}
        loader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # an upgraded one may store other documents
        made_of = json.dumps([self._source, fields, settings, loader], sort_keys=True)
        digest = hashlib.sha256(made_of.encode()).hexdigest()
        documents = self._manager._get_index_count(self._target.name)  # first: a write after it still shows in `writes`
        return {"digest": digest, "uuid": self._target.uuid, "writes": self._shards(), "documents": documents}

    def _shards(self) -> dict[str, list[Any]]:
        """Return history and last sequence number of each primary."""
        return {
            number: [copy["commit"]["user_data"]["history_uuid"], copy["seq_no"]["max_seq_no"]]
            for number, copies in self._manager.shard_stats(self._target.name).items()
            for copy in copies if copy["routing"]["primary"]
        }  # fmt: skip

    @staticmethod
    def _count_writes(shards: Mapping[str, list[Any]]) -> int:
        return sum(last for _, last in shards.values())


class BulkUpdate(OpenSearchBaseManager):
    def __init__(self, settings: argparse.Namespace) -> None:
        super().__init__(settings)
        self.keep: bool = settings.no_cleanup
        self.target = ClearableIndex(self, settings.index, shared=self.keep)
        self.delimiter, self.id_column = settings.delimiter, settings.id_column
        self.bucket = Bucket(settings.bucket, self.aws, settings.retry_seconds)
        self.delivery = Delivery(settings, self.bucket)
        self.place = self.delivery.place
        self.rejects = Rejects(settings.log_dir, settings.index, settings.max_rejects)
        index, self.names = settings.index, [settings.index]
        self.probes = [*reading_probes(index), bulk_probe(index, *(["index"] if self.keep else ["index", "delete"]))]
        if not self.keep:
            self.probes += [*deleting_probes(index), settings_probe(index)]

    def run(self) -> dict[str, Any]:
        began, objects = time.monotonic(), list[S3Object]()
        if self.dry_run and self.settings.skip_unchanged:  # first: without a change, nothing else has to be checked
            self.target.read()
            objects = self.delivery.objects()
            if record := self._load_record(objects).unchanged():
                log.info("%s holds what %s holds: nothing has changed since it was loaded", self.target.name,
                         self.place)  # fmt: skip
                return {**self._result(objects), "documents": record["documents"], "unchanged": True, "dry_run": True}
            if self.settings.refresh_strategy == "alternate" and self._check_index_aliases(self.target.name):
                log.info("%s may not hold what %s holds", self.target.name, self.place)
                return {**self._result(objects), "dry_run": True}  # the load goes to the other index
        self.target.claim(may_be_live=self.keep or self.dry_run, alias="" if self.keep else self.settings.index_alias)
        if not self.keep:
            self.target.verify_sees_everything()
        self.rejects.prepare()
        objects = objects or self.delivery.objects()
        types, added = self._look(objects)
        if self.dry_run:
            log.info("dry run: %s would be %s", self.target.name, "added to" if self.keep else "emptied and filled")
            return {**self._result(objects), "dry_run": True}
        try:
            if self.keep:
                self._add_fields(added)
                sums = self._load(objects, types)
            else:
                sums = self._replace(objects, types, added)
        finally:
            self.rejects.log_summary()
        return self._report(objects, sums, began)

    # --- the index ---

    def _replace(self, objects: list[S3Object], types: Mapping[str, str], added: Mapping[str, Any]) -> Sums:
        """Empty the index, load it and count; until all of it is done the index is marked as unfinished."""
        with self.target.fill(without_replicas=self.settings.load_without_replicas):
            self._add_fields(added)
            self.target.empty()
            record = self._load_record(objects) if self.settings.skip_unchanged else None
            if record:
                record.begin()
            sums = self._load(objects, types)
            self.target.restore_settings()
            self._verify_count(sums)
            if record and not sums.rejected:
                record.write(sums.stored)
        return sums

    def _load_record(self, objects: list[S3Object]) -> LoadRecord:
        files = sorted((item.key, item.etag, item.size) for item in objects)
        rows = self.delivery.expected_rows()
        return LoadRecord(self, self.target, [self.place, self.delimiter, self.id_column, rows, files])

    def _add_fields(self, added: Mapping[str, Any]) -> None:
        """Define new fields before the first document, which would make the server guess (dates!)."""
        if added:
            self.request("PUT", f"/{self.target.name}/_mapping", {"properties": added})

    # --- look ---

    def _result(self, objects: list[S3Object]) -> dict[str, Any]:
        """Return what every result says."""
        now = datetime.now(timezone.utc)
        age_h = round(min(item.age_h(now) for item in objects), 2)
        return {"index": self.target.name, "objects": len(objects), "newest_object_age_hours": age_h}

    def _look(self, objects: list[S3Object]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Read the head of each object and refuse what cannot be loaded; return the types, and the new fields."""
        mapping, index = self.target.found["mappings"], self.target.name
        if mapping.get("_routing", {}).get("required"):
            raise Refused(f"index {index} requires a routing (_routing), which no row has; create it without that")
        new, types = NewColumns(mapping), types_in(mapping)
        check = FirstRows(types, self.bucket.name, self.id_column) if self.dry_run else None
        heads = read_heads(self.bucket, objects, self.delimiter, new, check)
        known = {*types, *(name for name in new if dynamic_property(mapping, name))}
        check_headers(heads, known)
        if not any(head.has_rows for head in heads):
            raise Refused(
                f"{self.place}: not one data row, nothing was changed; see whether the producer of the files has "
                "finished"
            )
        for head in heads:
            self._check_columns(head, known)
        if wrong := unwritable(sorted({name for head in heads for name in head.columns}), types):
            raise Refused(f"columns that {index} takes from no document, since they are aliases or parts of nested "
                          f"objects: {', '.join(wrong)}; rename them or take them out")  # fmt: skip
        types, added = column_types(index, mapping, new)
        refuse_too_many_fields(index, self.target.found, added)
        if check:
            check.refuse(self.settings.max_rejects)
        return types, added

    def _check_columns(self, head: Head, known: Container[str]) -> None:
        if known and not any(name in known for name in head.columns):
            raise Refused(
                f"{head.key}: the mapping of {self.target.name} knows none of the columns "
                f"{', '.join(head.columns)[:200]}; is the delimiter {self.delimiter!r} (DELIMITER, --delimiter)?"
            )
        if self.id_column and self.id_column not in head.columns:
            raise Refused(f"{head.key}: has no column {self.id_column}; set ID_COLUMN (--id-column) to another one")

    # --- load ---

    def _load(self, objects: list[S3Object], types: Mapping[str, str]) -> Sums:
        """Load all objects. Raises OperationFailed unless each of their rows was stored, rejected or skipped."""
        began, rate = time.monotonic(), self.settings.requests_per_second
        limit = ConcurrencyLimit(self.settings.workers)
        renderer = Renderer(
            types, self.rejects.add, bucket=self.bucket.name, id_column=self.id_column,
            operation="index" if self.keep else "create",
        )  # fmt: skip
        store = BulkStore(
            self, self.target.name, self.rejects.add, limit,
            retry_seconds=self.settings.retry_seconds, refresh_every=0 if self.keep else REFRESH_EVERY_DOCUMENTS,
            is_own_version=renderer.is_own_version if self.id_column else None, creates=self._creates(),
        )  # fmt: skip
        size = rate.batch_size(self.settings.batch_size)
        workers = BulkWorkers(store.store, limit)
        for batch in batches(self._documents(objects, renderer, limit), size):
            rate.wait(batch.count())
            workers.put(batch)
        workers.finish()
        if renderer.repeated:
            log.warning("skipped %s equal to the header, the first is %s", counted(renderer.repeated, "row"),
                        renderer.first_repeated)  # fmt: skip
        log.info("loaded %s rows in %.1f s, %s/s, at most %s requests in flight", f"{store.stored:,}",
                 time.monotonic() - began, f"{per_second(store.stored, began):,}", workers.peak)  # fmt: skip
        sums = Sums(
            read=renderer.read, stored=store.stored, rejected=self.rejects.count, skipped=renderer.skipped,
            empty=renderer.empty, dropped=store.dropped, replaced=store.replaced, unsure=store.unsure,
            requests_under_way=workers.peak,
        )  # fmt: skip
        self._verify_all_loaded(objects, sums)
        return sums

    def _documents(self, objects: list[S3Object], renderer: Renderer, limit: ConcurrencyLimit) -> Iterator[Batch]:
        """Yield the good rows of all objects as bulk text."""
        progress = Progress(f"loading {self.target.name}", sum(item.size for item in objects), "bytes")
        before = 0
        for item, first in read_ahead(self.bucket, objects, AHEAD_BYTES):
            body = S3Body(self.bucket, item, first=first)
            del first  # the body lets them go as they are taken
            columns, blocks = read_csv(plain(body), f"s3://{self.bucket.name}/{item.key}", self.delimiter)
            for documents in renderer.documents(item.key, columns, blocks):
                yield documents
                progress.update(before + body.position, f"{renderer.read:,} rows, {limit.in_flight} requests")
            before += item.size
        progress.close()

    def _creates(self) -> bool:
        """Say whether each row is a document of its own, which is created or refused."""
        return not (self.keep or self.id_column)

    # --- does it add up? ---

    def _verify_all_loaded(self, objects: list[S3Object], sums: Sums) -> None:
        """Raise OperationFailed unless S3 holds what was loaded, and each row was stored, rejected or skipped."""
        self.delivery.verify_unchanged(objects)
        self.target.verify_same()
        if sums.read != sums.stored + sums.rejected + sums.skipped + sums.dropped:
            raise OperationFailed(f"the rows do not add up: {sums}; run again")
        if sums.dropped:
            pipelines = f"an ingest pipeline of {self.target.name} (index.default_pipeline or index.final_pipeline)"
            if not sums.stored:
                raise OperationFailed(f"{pipelines} dropped all {sums.dropped:,} rows; change it, and run again")
            log.warning("%s dropped %s rows", pipelines, f"{sums.dropped:,}")
        rows, expected = sums.read - sums.skipped, self.delivery.expected_rows()
        if expected is not None and not rows <= expected <= rows + sums.empty:  # a producer may count rows of NULLs
            raise OperationFailed(
                f"{self.place}: {rows:,} rows were read, {expected:,} are expected; run again when the producer has "
                "finished, or with EXPECTED_ROWS=0 if the files are right"
            )

    def _verify_count(self, sums: Sums) -> None:
        """Raise OperationFailed unless the index holds what the responses said was stored."""
        count, most = self._get_index_count(self.target.name), sums.stored - sums.replaced
        if not most - sums.unsure <= count <= most:
            raise OperationFailed(
                f"{self.target.name} holds {count:,} documents, {most:,} were stored: somebody else writes to it; run "
                "again"
            )
        sums.replaced = sums.stored - count

    # --- the result ---

    def _report(self, objects: list[S3Object], sums: Sums, began: float) -> dict[str, Any]:
        """Return the sums. Raises TooManyRejects when more rows were rejected than accepted."""
        result: dict[str, Any] = {
            **self._result(objects), "read": sums.read, "stored": sums.stored,
            "rejected": sums.rejected, "skipped": sums.skipped, "dropped": sums.dropped, "replaced": sums.replaced,
            "requests_under_way": sums.requests_under_way,
            "documents": self._get_index_count(self.target.name), "seconds": seconds_since(began),
            "rows_per_second": per_second(sums.read, began),
        }  # fmt: skip
        text = " ".join(f"{name}={value}" for name, value in result.items())
        if sums.rejected:
            result |= {"rejects_file": str(self.rejects.path), "reject_reasons": self.rejects.summary()}
        if sums.rejected > self.settings.max_rejects:
            raise TooManyRejects(
                f"finished, but {sums.rejected:,} rows were rejected and {self.settings.max_rejects:,} are accepted "
                f"(MAX_REJECTS), see {self.rejects.path}: {text}", result
            )  # fmt: skip
        log.info("done: %s", text)
        return result


# --- the command line -------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bulkupdate.py",
        description="Replace the documents of an index by the rows of the CSV files under an S3 prefix.",
    )
    parser.add_argument("--bucket", required=True, type=bucket_name, help="the S3 bucket")
    parser.add_argument("--prefix", required=True, help="the prefix of the keys; .csv and .csv.gz are taken")
    parser.add_argument("--index", required=True, type=index_name, help="the index to fill; no alias may point at it")
    return add_settings(parser)


def run(settings: argparse.Namespace) -> dict[str, Any]:
    with BulkUpdate(settings) as update:
        return update.run()


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
