"""Replace the documents of an index with the rows of all CSV files under an S3 prefix. Each row is stored exactly once.

Example:    python bulkupdate.py --bucket your-bucket --prefix your/prefix/ --index my_index_primary --batch-size 1000
Exit codes: 0 loaded, and verified by count; 1 failed; 2 usage; 3 finished, but more rows were rejected than
            MAX_REJECTS; 4 refused, as a rule before any change; 75 locked; 129, 130, 143 signals.

The file follows the data from top to bottom: list, inspect, read, parse, convert, render, batch, send. `Renderer` turns
CSV records into bulk text without a cluster, `BulkStore` sends bulk text without CSV, and `BulkUpdate`, at the end,
connects the two.
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
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from index_cleanup import ClearableIndex
from opensearch_base_manager import (
    MAX_CONNECTIONS, SUITE, Aws, Connection, OpenSearchBaseManager, OperationFailed, Progress, Refused, Response, Retry,
    TooManyRejects, add_settings, aws_errors, bucket_name, bulk_probe, deleting_probes, field_definitions,
    in_background, index_name, log, mapping_probe, parents_of, per_second, reading_probes, refuse_too_many_fields,
    require_permissions, run_cli, seconds_since, settings_probe,
)  # fmt: skip

MIB = 1024 * 1024
HEAD_BYTES = 64 * 1024  # of each object, read before the load: its header and a few hundred rows
MAX_MANIFEST_BYTES = 16 * MIB  # about 100,000 objects
KEPT_BYTES = 16 * MIB  # total of small objects kept in memory from the checks; others are read again for the load
READS_AT_ONCE = 32  # S3 needs 50 to 200 ms for a first byte, and serves thousands of requests in parallel
AHEAD_BYTES = MIB  # read from an object before its turn; its rest is requested when its turn comes
READ_AHEAD_BYTES = 4 * MIB  # total of all objects that wait for their turn
READ_BYTES = 256 * 1024  # per read from S3
S3_READ_TIMEOUT_S = 20  # S3 responds within a second; resuming a hung read is cheap
S3_FIRST_CONTACT_S = 10  # a wrong endpoint or region is reported soon
CHUNK_BYTES = 16 * 1024  # parsed at once: its cells fit into the processor's cache; 256 KiB took 1.5 times as long
MAX_CELL_CHARS = 8 * MIB  # a quote that is still open after this much text is a stray quote
MAX_LINE_BYTES = 16 * MIB  # also the maximum for a record
MAX_BATCH_BYTES = 8 * MIB  # managed domains on small nodes reject requests above 10 MiB
FULL_SHARE = 7 / 8  # of MAX_BATCH_BYTES: the part that exceeds this closes a batch; above the maximum, it is halved
MIN_REQUESTS = 3  # in flight; fewer would leave two cores idle between requests
MAX_BYTES_IN_FLIGHT = 24 * MIB  # bodies in memory here and on the node, which allows 10 % of its heap (107 MB of 1 GB)
MAX_BYTES_OF_FIXED = 40 * MIB  # the same limit with --workers
QUEUE_S = 0.05  # of queued work in the cluster; with 0.1, other clients' writes wait nearly twice as long
JITTER = 0.25  # or this share of the fastest response time; without it, responses in 1 s +- 0.5 s cut the limit to 4
# minimum length of a measurement, in seconds and in fastest response times; during the first one, requests may pile up
WINDOW_S, WINDOW_RESPONSES = 0.1, 1.2
REFRESH_EVERY_DOCUMENTS = 100_000  # 2 to 4 % faster than one refresh at the end
CACHED_CELLS = 80_000  # converted values kept for all columns together, at most a twentieth for one of them
CACHED_CELL_CHARS = 32  # longer cells are not kept
MAX_JSON_DEPTH = 1000  # a node has survived 2,000 levels in a flat_object; 3,000 levels stopped it (StackOverflowError)
REJECTS_TOLERATED = 10_000  # with more, a load stops: files and mapping do not match; MAX_REJECTS can raise this
REJECTS_SHOWN = 5
REASONS_SHOWN = 10
REASON_END = re.compile(r""": ['"]| in document with id | \(""")  # the rest of a reason concerns a single row
KEEP_DAYS = 30
RECORD = f"{SUITE}/loaded"  # in `_meta`, with SKIP_UNCHANGED: the last successful load
IRRELEVANT_SETTINGS = re.compile(  # settings that change neither documents nor search results
    r"index\.(uuid|creation_date|provided_name|version\.|resize\.|routing\.|number_of_replicas|auto_expand_replicas|"
    r"refresh_interval|blocks\.|translog\.|merge\.|unassigned\.|priority)"
)
DOCUMENT_END = "}\n"
FIRST_COMMA = re.compile("\n{,")  # of a document without its first column; a rendered cell contains no newline
GZIP_MAGIC = b"\x1f\x8b"
MAX_ID_BYTES = 512  # a single longer id makes the cluster reject the entire request
BULK_RESULTS = "errors,items.*.status,items.*.error.type,items.*.error.reason,items.*.error.caused_by.reason"
VALUE = re.compile(  # cells that are unlikely as column names: empty, a number, a date
    r"|[+-]?[0-9.,]*[0-9](?:[eE][+-]?[0-9]+)?|[0-9]{4}-[0-9]{2}-[0-9]{2}.*|[0-9]{1,2}/[0-9]{1,2}/[0-9]{2,4}.*"
)
METADATA_FIELDS = frozenset(
    ["_id", "_index", "_source", "_routing", "_field_names", "_ignored", "_size", "_type", "_seq_no", "_version",
     "_doc_count", "_nested_path", "_primary_term", "_data_stream_timestamp"]
)  # fmt: skip
NO_CSV = {  # the first bytes of other formats
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
    modified: datetime = field(compare=False)  # a new timestamp alone is not a change

    def is_csv(self) -> bool:
        return self.key.lower().endswith((".csv", ".csv.gz"))

    def age_h(self, now: datetime) -> float:
        """Return the age in hours; negative if the clock of S3 is ahead."""
        return (now - self.modified).total_seconds() / 3600

    def __str__(self) -> str:
        return f"{self.key} ({self.modified:%Y-%m-%dT%H:%M:%SZ})"


def log_ignored(data: Sequence[S3Object], ignored: Sequence[S3Object]) -> None:
    """Log the objects that are not loaded. CSV files among them cause a warning."""
    if leftovers := [item for item in ignored if item.is_csv()]:
        number, size = plural(len(leftovers), "object"), sum(item.size for item in leftovers)
        log.warning('not loaded, because a file or folder name begins with "." or "_": %s (%s bytes), the first is %s',
                    number, f"{size:,}", leftovers[0].key)  # fmt: skip
    empty = sum(not item.size for item in data)
    folders = sum(item.key.endswith("/") for item in ignored)
    others = len(ignored) - len(leftovers) - folders
    parts = [(empty, "empty object"), (folders, "folder"), (others, "object")]
    if text := ", ".join(plural(number, word) for number, word in parts if number):
        log.info("not loaded: %s%s", text, " not named *.csv or *.csv.gz" * (others > 0))


def is_leftover(key: str, prefix: str) -> bool:
    """Return whether the name is that of a temporary file, as Spark defines it. `_date=2024-01-01/` is a partition."""
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
    """The producer's list of its output: sizes of the objects by key, and the number of rows. None means unknown."""

    sizes: Mapping[str, int | None] = field(default_factory=dict)
    rows: int | None = None

    def differences(self, objects: Iterable[S3Object]) -> list[str]:
        """Return how the bucket differs from the objects in the manifest, if it lists any."""
        found = {item.key: item.size for item in objects} if self.sizes else {}
        return [
            *(f"{key} is missing" for key in self.sizes if key not in found),
            *(f"{key} is not in the manifest" for key in found if key not in self.sizes),
            *(f"{key} has {found[key]} bytes instead of {size}" for key, size in self.sizes.items()
              if size is not None and found.get(key, size) != size),
        ]  # fmt: skip


def parse_manifest(data: bytes, bucket: str, prefix: str) -> Manifest | None:
    """Parse a manifest of Redshift's `UNLOAD ... MANIFEST [VERBOSE]`, or `{"rows": N}`; return None for anything else.

    A manifest without any object under the prefix does not count: it may have been copied with the data.
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
    if sizes and not any(url.startswith(root + prefix) for url in entries):
        return None
    return Manifest(sizes, rows) if sizes or rows is not None else None


def plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


class Bucket:
    """The objects of one bucket. Final failures are raised as OperationFailed, which names the object.

    `list_objects` and S3Body retry, so the client itself makes a single attempt. Reads, and the listing after a load,
    are retried for up to `retry_seconds` without progress.
    """

    def __init__(self, name: str, aws: Aws, retry_seconds: float) -> None:
        self.name, self.retry_seconds = name, retry_seconds
        self.kept: dict[str, bytes] = {}  # complete small objects by key, read by the checks
        with aws_errors(f"s3://{name}", "s3:ListBucket on the bucket"):
            self.client = aws.client("s3", attempts=1, read_timeout_s=S3_READ_TIMEOUT_S, connections=READS_AT_ONCE + 1)

    def list_objects(self, prefix: str, retry_seconds: float) -> list[S3Object]:
        """Return all objects under a prefix in key order.

        An interrupted listing resumes after the last key, for up to `retry_seconds` without progress.
        """
        place, found, retry = f"s3://{self.name}/{prefix}", list[S3Object](), Retry(retry_seconds)
        pages = self.client.get_paginator("list_objects_v2")
        while True:
            after = {"StartAfter": found[-1].key} if found else {}
            try:
                for page in pages.paginate(Bucket=self.name, Prefix=prefix, **after):
                    found += [S3Object(item["Key"], item["Size"], item["ETag"], item["LastModified"])
                              for item in page.get("Contents", [])]  # fmt: skip
                    retry.restart()
                return found
            except Exception as error:
                if not (is_transient(error) and retry.wait(f"{place}: {error}; listing again")):
                    with aws_errors(place, "s3:ListBucket on the bucket"):
                        raise

    def get(self, item: S3Object, first: int, last: int) -> Any:
        """Return a stream of the bytes `first` to `last`, inclusive, of the listed version of an object.

        Raises OperationFailed if it was replaced or deleted since, or if S3 rejects the request for another lasting
        reason (no access, archived). A transient failure (5xx, connection error) is raised unchanged.
        """
        from botocore.exceptions import ClientError

        place = f"s3://{self.name}/{item.key}"
        span = f"bytes={first}-{last}"
        try:
            return self.client.get_object(Bucket=self.name, Key=item.key, IfMatch=item.etag, Range=span)["Body"]
        except ClientError as error:
            if is_transient(error):
                raise
            if done := {404: "deleted", 412: "replaced"}.get(error.response["ResponseMetadata"]["HTTPStatusCode"]):
                raise OperationFailed(f"{place} has been {done} since it was listed; run again") from None
            with aws_errors(place, "s3:GetObject (and kms:Decrypt for a customer managed key)"):
                raise


def is_transient(error: Exception) -> bool:
    """Return whether a retry may help: S3 is busy or cannot be reached."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, SSLError

    if isinstance(error, ClientError):
        code, status = error.response["Error"].get("Code", ""), error.response["ResponseMetadata"]["HTTPStatusCode"]
        return bool(status >= 500 or status == 429 or code in ("SlowDown", "RequestTimeout") or "Throttl" in code)
    return isinstance(error, (HTTPClientError, ConnectionError)) and not isinstance(error, SSLError)


# --- inspect ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """The first 64 KiB of an object: its columns, and whether rows follow."""

    key: str
    columns: Sequence[str] = ()
    has_rows: bool = False


class NewColumns(dict[str, set[str]]):
    """The columns that the mapping lacks: the kinds of their values in the heads, by name."""

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        super().__init__()
        self._mapping, self._known = mapping, types_in(mapping)

    def undecided(self, columns: Sequence[str]) -> list[int]:
        """Add those of the columns that are new; return the positions of those whose type more values could change."""
        new = [(place, name) for place, name in enumerate(columns) if name not in self._known]
        return [place for place, name in new
                if "text" not in self.setdefault(name, set()) and is_dynamic(self._mapping, name)]  # fmt: skip


def read_heads(
    bucket: Bucket, objects: Iterable[S3Object], delimiter: str, new: NewColumns, check: FirstRows | None = None
) -> list[Head]:
    """Read the heads of all objects that are not empty; keep up to 16 MiB of complete objects for the load."""
    heads, kept = list[Head](), 0
    for item, data in read_ahead(bucket, [item for item in objects if item.size], HEAD_BYTES):
        head = inspect_head(item, data, delimiter, new, check)
        heads += [head] if head.columns else []
        if len(data) == item.size and kept + item.size <= KEPT_BYTES:
            bucket.kept[item.key] = data
            kept += item.size
    return heads


def inspect_head(
    item: S3Object, data: bytes, delimiter: str, new: NewColumns, check: FirstRows | None = None
) -> Head:
    """Read the head of an object. Raises Refused if it is not CSV with a header, OperationFailed for broken gzip."""
    data, complete = head_lines(item, data)
    columns, blocks = read_csv(io.BytesIO(data), item.key, delimiter, complete=False)
    if data.strip(b"\xef\xbb\xbf\r\n") and not columns:
        raise Refused(f"{item.key}: a quote in the header is not closed; fix the file and run again")
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
    """Return the complete lines at the beginning of an object, unpacked, and whether these are the complete object."""
    complete = len(data) >= item.size
    if data[:2] == GZIP_MAGIC:
        packed, data = data, b""
        try:
            while packed[:2] == GZIP_MAGIC and len(data) < HEAD_BYTES:  # a file may have several members
                unpacker = zlib.decompressobj(31)  # expects a gzip header
                data, packed = data + unpacker.decompress(packed, HEAD_BYTES), unpacker.unused_data
        except zlib.error as error:
            raise OperationFailed(f"{item.key}: broken gzip: {error}; write the object again") from None
        complete = complete and unpacker.eof and not packed.strip(b"\0")  # some tools pad the end
    if found := [kind for magic, kind in NO_CSV.items() if data.startswith(magic)]:
        raise Refused(f"{item.key} is {found[0]}; save it as CSV, uncompressed or compressed once with gzip")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or abs(data[::2].count(0) - data[1::2].count(0)) > len(data) // 4:
        raise Refused(f"{item.key} is encoded in UTF-16; save it as UTF-8")
    if data.count(0) > len(data) // 4:
        raise Refused(f"{item.key}: many NUL characters; is it a CSV file?")
    if b"\r" in data and b"\n" not in data:
        raise Refused(f"{item.key}: lines end with CR alone; save it with LF or CRLF")
    if not complete and b"\n" not in data:
        raise Refused(f"{item.key}: no line ends within the first {HEAD_BYTES // 1024} KiB; is it a CSV file?")
    return data if complete else data[: data.rindex(b"\n") + 1], complete


def check_headers(heads: Sequence[Head], known: Container[str]) -> None:
    """Raise Refused for an object without a header or with unusable names; log columns that only some objects have."""
    parts = Counter(name for head in heads for name in set(head.columns))
    for head in heads:
        common = {name for name in head.columns if name in known or parts[name] > 1}
        if (known or len(heads) > 1) and lacks_header(head.columns, common):
            value = next(name for name in head.columns if name not in common and VALUE.fullmatch(name))
            raise Refused(
                f"{head.key}: this part has no header: most names in its first row are unknown, and {value!r} looks "
                "like a value; nothing was changed; add a header, or, if this row is one, add its names to the mapping"
            )
        check_names(head)
    if partial_columns := [f"{name} ({found} of {len(heads)})" for name, found in parts.items() if found < len(heads)]:
        log.info("columns that only some objects have: %s", ", ".join(partial_columns))


def lacks_header(columns: Sequence[str], known: Container[str]) -> bool:
    """Return whether a first row is data instead of column names.

    It is data if fewer than half of its cells are known names and at least one of the others looks like a value. There
    is one exception: if each unknown cell looks like a value and some cells are known, all of them are names, as in
    `country,1960,1961`.
    """
    new = [name for name in columns if name not in known]
    values = sum(bool(VALUE.fullmatch(name)) for name in new)
    return len(new) * 2 > len(columns) and values > 0 and not values == len(new) < len(columns)


def check_names(head: Head) -> None:
    """Raise Refused if column names cannot be field names."""
    if doubled := sorted(name for name, found in Counter(head.columns).items() if found > 1 and name):
        raise Refused(f"{head.key}: duplicate column names: {', '.join(doubled)}; rename them")
    if wrong := [name for name in head.columns if not all(name.split(".")) or name.split(".")[0] in METADATA_FIELDS]:
        names = ", ".join(map(repr, wrong))
        raise Refused(f"{head.key}: the header has invalid field names: {names}; rename them")


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
    """Return the definitions of new columns, based on the kinds of their values."""
    templates = {name: rule for name, kinds in new.items() if (rule := dynamic_template(mapping, name, kinds))}
    others = [name for name in new if name not in templates]
    if strict := [name for name in others if dynamic_of(mapping, name).startswith("strict")]:
        raise Refused(
            f"columns that the strict mapping of {index} does not define: {', '.join(strict)}; add them to the "
            "mapping, or remove them from the files"
        )
    if ignored := [name for name in others if dynamic_of(mapping, name).startswith("false")]:
        log.warning("columns that no search will find, because the mapping does not define them (dynamic: false): %s",
                    ", ".join(ignored))  # fmt: skip
    added = {name: templates.get(name) or new_field(kinds) for name, kinds in new.items() if name not in ignored}
    values = {name for name, kind in types_in(mapping).items() if kind not in ("object", "nested")}
    if inside := [name for name in added if parents_of(name) & {*values, *added}]:  # a.b beside a number a
        raise Refused(f"columns whose parent field is not an object: {', '.join(inside)}; rename them or their parents")
    if added:
        log.info("new fields: %s", ", ".join(f"{name} ({value['type']})" for name, value in added.items()))
    return added


def kind_of(cell: str) -> str:
    """Return the kind of a value: long, double, boolean or text; "" if it counts as empty, which fits any kind."""
    if cell.strip() in EMPTY:
        return ""
    if re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", cell):
        return "long"
    if re.fullmatch(r"-?(0|[1-9][0-9]*)\.[0-9]+", cell) and len(cell) <= 19:  # 18 digits and the point
        return "double"
    return "boolean" if cell.lower() in ("true", "false") else "text"


def new_field(kinds: set[str]) -> dict[str, Any]:
    """Return the definition of a new column: text unless all values are canonical numbers, or all true/false."""
    kinds = kinds - {""}
    if kinds and kinds <= {"long", "double"}:
        return {"type": "double" if "double" in kinds else "long"}
    if kinds == {"boolean"}:
        return {"type": "boolean"}
    return {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 256}}}


def dynamic_of(mapping: Mapping[str, Any], name: str) -> str:
    """Return the `dynamic` setting that applies to a new field, as text.

    It is that of the innermost enclosing object that sets one, or of the mapping; inside an object with
    `enabled: false`, it is "false".
    """
    dynamic = str(mapping.get("dynamic", "true")).lower()
    for part in name.split(".")[:-1]:
        mapping = mapping.get("properties", {}).get(part, {})
        if not mapping.get("enabled", True):
            return "false"
        dynamic = str(mapping.get("dynamic", dynamic)).lower()
    return dynamic


def is_dynamic(mapping: Mapping[str, Any], name: str) -> bool:
    """Return whether `dynamic` allows a new field of this name in the mapping, even if only through a template."""
    return dynamic_of(mapping, name) not in ("false", "strict")


def dynamic_property(mapping: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return the `dynamic_properties` definition of a column, if any; the server rejects an explicit mapping for it."""
    rules: dict[str, dict[str, Any]] = mapping.get("dynamic_properties", {}) if is_dynamic(mapping, name) else {}
    return next((rule for pattern, rule in rules.items() if matches(pattern, name)), None)


def dynamic_template(mapping: Mapping[str, Any], name: str, kinds: set[str]) -> dict[str, Any] | None:
    """Return the definition from the first of the `dynamic_templates` that matches a new column, or None.

    A template for this type with conditions other than `match_mapping_type` and `match` ends the search with None.
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
    """Return whether a name matches a pattern of the server, where only the asterisk is special."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name, re.S) is not None


def unwritable(columns: Iterable[str], types: Mapping[str, str]) -> list[str]:
    """Return the columns that a document cannot contain: alias fields, and single properties of nested objects."""
    nested = {name for name, kind in types.items() if kind == "nested"}
    return [name for name in columns if types.get(name) == "alias" or nested & parents_of(name)]


# --- read -------------------------------------------------------------------------------------------------------------


def read_ahead(bucket: Bucket, objects: Iterable[S3Object], limit: int) -> Iterator[tuple[S3Object, bytes]]:
    """Yield each object, in order, with its first `limit` bytes, while up to 32 requests and 4 MiB are read ahead.

    Raises OperationFailed for an object when its turn comes.
    """
    coming, left = deque[tuple[S3Object, Callable[[], bytes]]](), READ_AHEAD_BYTES
    for item in [*objects, None]:
        size = min(item.size, limit) if item else 0
        while coming and (not item or size > left or len(coming) == READS_AT_ONCE):
            left += min(coming[0][0].size, limit)
            yield coming[0][0], coming.popleft()[1]()  # not in a variable, which would keep the bytes alive
        if item and item.key in bucket.kept:
            coming.append((item, partial(bucket.kept.pop, item.key)))
        elif item:
            coming.append((item, in_background(S3Body(bucket, item, limit).read_all).result))
        left -= size


class S3Body(io.RawIOBase):
    """The bytes of one object, or the first `limit` of them. An interrupted read is resumed at the same position.

    `first` are bytes that were read before. The rest is downloaded while these bytes are consumed.
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
        return b"".join(iter(partial(self.read, READ_BYTES), b""))  # readall() of the library reads 8 KiB at a time

    def readinto(self, buffer: Any) -> int:
        data: Any = self._first[: len(buffer)] or self._read(len(buffer))
        self._first = self._first[len(data) :] or b""  # an empty view would keep all bytes in memory
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
                raise OSError("the response ended early")
            except OperationFailed:
                raise
            except Exception as error:  # urllib3, botocore, http.client and ssl each have their own
                self._body = None
                place = f"s3://{self.bucket.name}/{self.item.key}, byte {self.position:,}"
                if not retry.wait(f"{place}: {error}; resuming the read"):
                    raise OperationFailed(f"{place}: the read cannot be resumed: {error}; run again") from None
        return b""

    def _open(self) -> Any:
        opening, self._opening = self._opening, None
        return opening.result() if opening else self.bucket.get(self.item, self.position, self.end - 1)


def unpacked(body: io.RawIOBase) -> BinaryIO:
    """Return the content, unpacked if it is gzip (detected by magic bytes; file names are unreliable)."""
    stream = io.BufferedReader(body, READ_BYTES)
    if stream.peek(2)[:2] == GZIP_MAGIC:
        return gzip.GzipFile(fileobj=stream)  # type: ignore[return-value]
    return stream


def decode(data: bytes) -> tuple[str, bool]:
    """Return the text, and whether its cells have to be checked one by one (bad UTF-8, NUL)."""
    try:
        return data.decode(), b"\0" in data
    except UnicodeDecodeError:
        return data.decode(errors="surrogateescape"), True


def read_lines(stream: BinaryIO) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces of complete lines. Raises OverflowError if one does not end within MAX_LINE_BYTES."""
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
    """A record that cannot become a document: the reason, its content, and the column."""

    def __init__(self, reason: str, row: Any, column: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.row, self.column = reason, row, column


def open_quote(place: str, line: int, where: str) -> OperationFailed:
    """Return the failure for a quote that does not close: the number of rows inside it is unknown."""
    return OperationFailed(
        f"{place}, line {line}: a quote in the record that begins here is still open {where}; fix the file and run "
        "again"
    )


@dataclass
class Block:
    """Consecutive records, each a list of cells or a Defect; record i begins on line `lines[i]`."""

    lines: Sequence[int]
    rows: list[Any]
    empty: int = 0  # rows of empty cells, now blank lines
    repeated: list[int] = field(default_factory=list)  # lines of rows that repeat the header, now blank lines


def parse(text: str, place: str, first_line: int, delimiter: str) -> tuple[Block, str]:
    """Parse the records of a text that begins on `first_line`; return them, and the text of a last, unfinished one.

    Raises OperationFailed if a quote is still open after 8 MiB.
    """
    if '"' not in text and text.endswith("\n"):
        source: Iterable[str] = text[:-1].split("\n")  # a tenth faster
    else:
        source = io.StringIO(text, newline="\n")
    with contextlib.suppress(csv.Error):
        reader = csv.reader(source, delimiter=delimiter, strict=True)
        rows = list(reader)
        if len(rows) == reader.line_num:  # each line is a record, as in most files
            return Block(range(first_line, first_line + len(rows)), rows), ""
    return parse_records(text, place, first_line, delimiter)


def parse_records(text: str, place: str, first_line: int, delimiter: str) -> tuple[Block, str]:
    """Parse records one by one, since some of them span several lines or have defects."""
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    rows, ends, rest = list[Any](), [0], ""  # ends: the number of lines up to the end of each record
    while True:
        try:
            for row in reader:
                rows.append(row)
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
            rows.append(Defect(f"not CSV: {error}", raw))
            ends.append(reader.line_num)
    return Block([first_line + end for end in ends[:-1]], rows), rest


def mark_unreadable(block: Block) -> None:
    """Turn each row with a NUL or invalid UTF-8 (surrogates from `decode`, not encodable) into a Defect."""
    for place, row in enumerate(block.rows):
        text = "" if isinstance(row, Defect) else "".join(row)
        if found := re.search("[\0\udc80-\udcff]", text):
            reason = "a NUL character" if found[0] == "\0" else "bytes that are not UTF-8"
            block.rows[place] = Defect(reason, row)


def header_of(place: str, row: Any) -> list[str]:
    """Return the column names in the first record. Raises Refused if it is not a header."""
    if not row or isinstance(row, Defect):
        advice = "add the column names"
        if row:
            spaced = re.search(r'"[ \t]', str(row.row))
            advice = f"{row.reason}; {'remove the space between quote and delimiter' if spaced else 'fix the file'}"
        raise Refused(f"{place}: the first line is not a CSV header: {advice}")
    if re.fullmatch("sep=.?", row[0]):
        raise Refused(f"{place}: the first line ({row[0]}) is for spreadsheets only; remove it and set DELIMITER")
    return [sys.intern(name.strip()) for name in row]  # saves 10 MB for 10,000 objects


def all_have(width: int, rows: Sequence[Any]) -> bool:
    """Return whether all records have this number of cells and none is a Defect."""
    return set(map(type, rows)) == {list} and set(map(len, rows)) == {width}


def blank_out(block: Block, header: Sequence[str]) -> Block:
    """Replace rows of empty cells, and repeated headers (if they have at least two columns), with blank lines."""
    rows, last = block.rows, header[-1] if len(header) > 1 else None
    if all_have(len(header), rows) and "" not in map(itemgetter(0), rows) and last not in map(itemgetter(-1), rows):
        return block  # most blocks, without Python code for each row
    for place, row in enumerate(rows):
        if isinstance(row, Defect):
            continue
        if not any(row):
            block.empty += bool(row)
            rows[place] = []
        elif row[-1] == last and [row[0].removeprefix("\ufeff").strip('"'), *row[1:]] == header:  # BOMs of joined files
            block.repeated.append(block.lines[place])
            rows[place] = []
    return block


def read_csv(
    stream: BinaryIO, place: str, delimiter: str, *, complete: bool = True
) -> tuple[list[str], Iterator[Block]]:
    """Return the columns of an object (none if it is empty) and its records in blocks. All CSV is read here.

    If the stream is not `complete`, an unfinished last record is ignored. Raises Refused for an unusable header, and
    OperationFailed for broken gzip, a line that does not end within MAX_LINE_BYTES, or a quote that does not close.
    """
    blocks = read_blocks(stream, place, delimiter, complete)
    first = next(blocks, None)
    if first and not any(first.rows):  # pandas writes a table without columns as a single newline
        first = next(blocks, None) and first
    if not first:
        return [], blocks
    columns = header_of(place, first.rows[0])
    blocks = itertools.chain(iter([Block(first.lines[1:], first.rows[1:])]), blocks)
    return columns, map(partial(blank_out, header=first.rows[0]), blocks)


def read_blocks(stream: BinaryIO, place: str, delimiter: str, complete: bool) -> Iterator[Block]:
    """Yield the records of one object in blocks, beginning with the header."""
    text, line, suspect, unfinished = "", 1, False, 0  # the unfinished record: text, first line, suspect?, length
    try:
        for piece, is_suspect in itertools.chain(read_lines(stream), [("", False)]):
            text += piece if text or line > 1 else piece.lstrip("\ufeff")
            suspect = suspect or is_suspect  # its cells have to be checked one by one
            if piece and len(text) <= 2 * unfinished:
                continue  # parsing a giant cell again with each piece would take minutes
            block, rest = parse(text, place, line, delimiter)
            if suspect:
                mark_unreadable(block)
                suspect = bool(rest)
            line += text.count("\n") - rest.count("\n")
            text, unfinished = rest, len(rest)
            if rest and not piece and complete:
                raise open_quote(place, line, "at the end of the file")
            if unfinished > MAX_LINE_BYTES:
                raise open_quote(place, line, f"after {MAX_LINE_BYTES // MIB} MiB")
            if block.rows:
                yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise OperationFailed(f"{place}: broken gzip: {error}; write the object again") from None
    except OverflowError as error:
        raise OperationFailed(f"{place}, after line {line + text.count(chr(10)) - 1}: {error}") from None


# --- convert ----------------------------------------------------------------------------------------------------------

EMPTY = frozenset(["", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None"])  # empty, except for `render_text`
NUMBER = re.compile(r"([+-]?)([0-9]*)(?:\.([0-9]*))?(?:[eE]([+-]?[0-9]+))?")
JSON_NO_BRACKET = re.compile(r'"(?:[^"\\]+|\\.)*"|[^][{}"]+')
BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}
BOOLEANS = dict.fromkeys(["true", "yes", "t", "1"], "true") | dict.fromkeys(["false", "no", "f", "0"], "false")

Render = Callable[[str], str]  # from a cell to one line of JSON; "" omits the field; only a ValueError rejects the row


def render_text(cell: str) -> str:
    return encode_basestring(cell) if cell else ""


def render_other(cell: str) -> str:
    """Keep dates, addresses, points and the like unchanged: the server parses their formats."""
    return "" if cell.strip() in EMPTY else encode_basestring(cell)


def render_float(cell: str) -> str:
    """Return a JSON number with every digit, or "" for an empty cell; the server checks the range."""
    if (cell := cell.strip()) in EMPTY:
        return ""
    sign, integer, fraction, exponent = number(cell).groups(default="")
    integer = integer.lstrip("0") or "0"
    return f"{sign.strip('+')}{integer}{fraction and '.' + fraction}{exponent and 'e' + exponent}"


def render_integer(cell: str, *, low: int, high: int) -> str:
    """Return an integer with every digit. Raises ValueError for overflow or a fraction (the server truncates it)."""
    if (cell := cell.strip()) in EMPTY:
        return ""
    if len(number(cell)[4] or "") > 4:  # Decimal cannot hold much longer exponents
        raise ValueError("out of range")
    value = Decimal(cell)
    if value != value.to_integral_value():
        raise ValueError("a fraction in an integer field")
    if not low <= value <= high:
        raise ValueError("out of range")
    return str(int(value))


def number(cell: str) -> re.Match[str]:
    """Return the parts of a number: sign, integer, fraction, exponent. Raises ValueError."""
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
    """Return the JSON of a cell on one line, with every digit."""
    if cell.strip() in EMPTY:
        return ""
    try:
        json.loads(cell, parse_constant=lambda name: json.loads(""), parse_float=str, parse_int=str)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    depths = itertools.accumulate(map(BRACKETS.__getitem__, JSON_NO_BRACKET.sub("", cell)))
    if max(depths, default=0) > MAX_JSON_DEPTH:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH:,} levels deep")
    return cell.translate({10: " ", 13: " "})  # JSON has line breaks only between tokens


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
    """A cache from a cell to its finished token: `,"name":value`, or without the comma for the first column."""

    def __init__(self, name: str, kind: str, comma: str = ",") -> None:
        super().__init__()
        self.name, self.kind, self.render = name, kind, RENDERERS.get(kind, render_other)
        self.prefix = f"{comma}{encode_basestring(name)}:"
        self.limit = 0  # of cached cells, set for each object

    def __missing__(self, cell: str) -> str:
        value = self.render(cell)
        token = self.prefix + value if value else ""
        if len(cell) <= CACHED_CELL_CHARS:
            if len(self) >= self.limit:
                self.clear()
            self[cell] = token
        return token


def separator(operation: str, quoted_id: str, version: str = "") -> str:
    """Return the text between two documents: the end of one, then action line and opening brace of the next."""
    return f'{DOCUMENT_END}{{"{operation}":{{"_id":{quoted_id}{version}}}}}\n{{'


def separator_with_id(cell: str, version: int, no_ids: Container[str]) -> str:
    """Return a separator with the id in this cell. Because of the version, a later row wins in any order of arrival."""
    if cell.strip() in no_ids or len(cell.encode()) > MAX_ID_BYTES:
        raise ValueError(f"the id is empty or longer than {MAX_ID_BYTES} bytes")
    return separator("index", encode_basestring(cell), f',"version":{version},"version_type":"external"')


@dataclass
class Source:
    """The object whose records are being rendered."""

    key: str
    columns: list[Column]
    id_place: int  # position of the id column; 0 without ID_COLUMN, where it has no effect
    separator: str  # with a placeholder for the record number
    record: int = 1  # number of the next record: the header does not count; empty and rejected records do


class Renderer:
    """Turns the records of all objects into bulk text, and passes defective ones to `reject(key, line, ...)`.

    Only the main thread uses it, except for `is_own_version`. Without an id column, the ids depend only on bucket, key
    and record number, so a resend or another load creates no duplicates.
    """

    def __init__(
        self, types: Mapping[str, str], reject: Callable[[str, int, Defect], None], *, bucket: str,
        id_column: str = "", operation: str = "create",
    ) -> None:  # fmt: skip
        self.columns = {name: Column(name, kind) for name, kind in types.items()}
        self.reject, self.bucket = reject, bucket
        self.id_column, self.operation = id_column, operation
        is_text = RENDERERS.get(types.get(id_column, "text")) is render_text  # `NA` may be Namibia's id
        self.no_ids = {"", r"\N"} if is_text else {*EMPTY, r"\N"}
        self.first_version = time.time_ns()  # with --id-column; versions rise with each row and from load to load
        self.read = self.skipped = 0  # records
        self.empty = self.repeated = 0  # skipped records: rows of empty cells, rows that repeat the header
        self.first_repeated = ""

    def documents(self, key: str, columns: Sequence[str], blocks: Iterable[Block]) -> Iterator[Batch]:
        """Yield the documents of one object in batches; count skipped records, pass defective ones to `reject`."""
        if not columns:
            return
        id_place = columns.index(self.id_column) if self.id_column in columns else 0
        digest = hashlib.sha256(f"{self.bucket}/{key}".encode()).hexdigest()[:16]
        placeholder = separator(self.operation, f'"{digest}-%09d"')
        first, *others = (self.columns[name] for name in columns)
        first = Column(first.name, first.kind, comma="")
        source = Source(key, [first, *others], id_place, placeholder)
        for column in source.columns:
            column.limit = CACHED_CELLS // max(20, len(columns))
        for block in blocks:
            lines = block.lines
            try:
                text = self._render(source, block.rows)
            except ValueError:  # at least one record is defective or blank
                lines, text = self._render_good(source, block)
            self.empty += block.empty
            if block.repeated:
                self.first_repeated = self.first_repeated or f"{key} line {block.repeated[0]}"
                self.repeated += len(block.repeated)
            yield Batch.of(key, lines, text)

    def is_own_version(self, version: int) -> bool:
        """Return whether a document of this version is a row of this load, not a newer one of another client."""
        return 0 <= version - self.first_version <= self.read

    def _render(self, source: Source, rows: Sequence[Any]) -> str:
        r"""Return the documents of consecutive records. Raises ValueError if one of them cannot become a document.

        Cells are rendered column by column, so that nearly all of the work runs in C.

            rows    [7, a], [8, b]
            cells   (7, 8), (a, b)
            parts   }\n{"create":{"_id":"x-1"}}\n{   "n":7  ,"k":"a"   }\n{...   "n":8  ,"k":"b"
        """
        if not all_have(len(source.columns), rows):
            raise ValueError("a defect, or records of different widths")
        cells = list(zip(*rows))
        stride = len(cells) + 1
        parts = [""] * (stride * len(rows))
        parts[::stride] = self._separators(source, cells[source.id_place])
        for place, (column, values) in enumerate(zip(source.columns, cells), 1):
            parts[place::stride] = map(column.__getitem__, values)
        source.record += len(rows)
        self.read += len(rows)
        text = "".join(parts)
        return text if all(parts[1::stride]) else FIRST_COMMA.sub("\n{", text)  # some lack the first column

    def _render_good(self, source: Source, block: Block) -> tuple[list[int], str]:
        """Return the lines and the documents of the good records; count or reject the others."""
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
        """Return the defect of a record, with its column; `reason` applies if only the id is wrong."""
        if isinstance(row, Defect):
            return row
        if len(row) != len(source.columns):
            return Defect(f"{plural(len(row), 'cell')} under {plural(len(source.columns), 'column name')}", row)
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
    """Renders the first rows of each object in a dry run, to report the rows that the load would reject."""

    def __init__(self, types: Mapping[str, str], bucket: str, id_column: str) -> None:
        self._renderer = Renderer(types, self._reject, bucket=bucket, id_column=id_column)
        self._rejected, self._reasons = 0, list[str]()

    def render(self, key: str, columns: Sequence[str], blocks: Iterable[Block]) -> None:
        for name in columns:  # a new column's type will fit the cells of the heads (unless a dynamic rule sets it)
            self._renderer.columns.setdefault(name, Column(name, "text"))
        records = (record for block in blocks for record in zip(block.lines, block.rows))
        first = list(itertools.islice(records, ROWS_CHECKED))
        block = Block([line for line, _ in first], [row for _, row in first])
        list(self._renderer.documents(key, columns, [block]))

    def _reject(self, key: str, line: int, defect: Defect) -> None:
        self._rejected += 1
        if len(self._reasons) < REJECTS_SHOWN:
            self._reasons.append(f"{key} line {line}: {defect.reason}")

    def refuse(self, accepted: int) -> None:
        """Raise Refused if the load would reject more rows than are accepted."""
        if self._rejected > accepted:
            raise Refused(
                f"among the first {ROWS_CHECKED} rows of each object, the load would reject {self._rejected:,}; "
                f"MAX_REJECTS allows {accepted:,}. Nothing was changed. Fix the files or the mapping. First reasons: "
                f"{'; '.join(self._reasons)}"
            )


# --- batch ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Documents as bulk text, two lines each, and where they come from: objects and line numbers, in the same order."""

    body: bytes = b""
    origins: Sequence[tuple[str, Sequence[int]]] = ()

    @classmethod
    def of(cls, key: str, lines: Sequence[int], text: str) -> Batch:
        """Return documents of one object; in `text`, each begins with its separator, which ends the one before."""
        return cls((text[len(DOCUMENT_END) :] + DOCUMENT_END).encode(), [(key, lines)]) if text else cls()

    @classmethod
    def joined(cls, parts: Sequence[Batch]) -> Batch:
        return cls(b"".join(part.body for part in parts), [origin for part in parts for origin in part.origins])

    def count(self) -> int:
        return sum(len(lines) for _, lines in self.origins)

    def cut(self, at: int) -> tuple[Batch, Batch]:
        """Return the first `at` documents (1 or more), and the others."""
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
        """Return each document as its own batch."""
        places = ((key, line) for key, lines in self.origins for line in lines)
        texts = iter(self.body.split(b"\n"))
        return [Batch(b"%s\n%s\n" % pair, [(key, [line])]) for pair, (key, line) in zip(zip(texts, texts), places)]


def batches(documents: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Regroup documents, across objects, into batches of `size` documents or 7 to 8 MiB."""
    parts: list[Batch] = []
    count = length = 0
    for rest in documents:
        while rest.count():
            part, rest = rest.cut(size - count)
            parts.append(part)
            count, length = count + part.count(), length + len(part.body)
            if count >= size or length >= FULL_SHARE * MAX_BATCH_BYTES:
                batch = Batch.joined(parts)
                parts, count, length = [], 0, 0  # free the parts before the batch waits to be sent
                yield batch
    if parts:
        yield Batch.joined(parts)


# --- send -------------------------------------------------------------------------------------------------------------


class ConcurrencyLimit:
    """The number of bulk requests that may be in flight, by Little's law.

    The limit is the number of requests that the cluster completes within its fastest response time plus an allowance: a
    twentieth of a second or a quarter of that time, whichever is longer. More requests would only wait in the cluster's
    queue and delay other clients' writes. The rate is measured in windows that begin and end with a completion. After a
    429, or a 5xx for a document, the limit is half the number in flight, then rises by at most one per window; a fixed
    limit changes in no other case. Batches should be of similar size: a small one would set the fastest time for good.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.fixed, self.max_bytes = fixed, MAX_BYTES_OF_FIXED if fixed else MAX_BYTES_IN_FLIGHT
        self.number = self._ceiling = self._most = fixed or MAX_CONNECTIONS
        self.in_flight = 0  # counted by BulkWorkers
        self._lock = threading.Lock()  # guards `number` and the attributes below
        self._fastest_s = math.inf
        self._window_began, self._completed = 0.0, 0  # 0.0: the next completion begins a window
        self._halved = 0.0

    def completed(self, sent: float) -> None:
        """Count a request after which nothing had to be resent; set the limit at the end of a window."""
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
        """Halve the number in flight after a 429 (or 5xx items) to a request sent at this time, once per round trip."""
        with self._lock:
            if sent > self._halved:
                self._halved, self._window_began = time.monotonic(), 0.0
                self.number = self._ceiling = max(1, min(self.number, self.in_flight) // 2)
                log.warning("the cluster is busy (429 or 5xx): at most %s requests in flight for now", self.number)

    def discard_window(self) -> None:
        """Discard the current window: without requests in flight, its rate is not the cluster's. `_fastest_s` stays."""
        with self._lock:
            self._window_began = 0.0


class BulkWorkers:
    """Stores each batch in its own thread, as many at a time as the limit allows.

    The first error of a thread is raised in the main thread. The threads are daemons: after a failure, a hung request
    cannot keep the process alive.
    """

    def __init__(self, store: Callable[[Batch], None], limit: ConcurrencyLimit) -> None:
        self._store, self._limit = store, limit
        self._changed = threading.Condition()  # guards the attributes below and the limit's `in_flight`
        self._error: BaseException | None = None
        self._bytes = 0  # of the bodies in flight
        self.peak = 0  # most batches in flight

    def put(self, batch: Batch) -> None:
        """Start to store a batch as soon as the limit allows. Raises the first error of a thread."""
        size, limit = len(batch.body), self._limit
        with self._changed:
            self._wait_for(lambda: limit.in_flight < limit.number and self._bytes + size <= limit.max_bytes)
            if not limit.in_flight:
                limit.discard_window()
            limit.in_flight += 1
            self._bytes += size
            self.peak = max(self.peak, limit.in_flight)
        threading.Thread(target=self._work, args=[batch], daemon=True).start()

    def finish(self) -> None:
        """Return when all batches are stored. Raises the first error of a thread."""
        with self._changed:
            self._wait_for(lambda: False)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds or nothing is in flight."""
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
    """Stores batches, from any number of threads, and passes rejected documents to `reject(key, line, ...)`.

    Documents answered with 429 or 5xx are resent alone, for up to `retry_seconds` without progress. A batch that is too
    large for the cluster (413) is halved. Pass `is_own_version` if ids come from a column. Pass `creates` if documents
    cannot replace each other. A pipeline has dropped a document if its status is 200 (`creates`) or its result `noop`.
    """

    def __init__(
        self, cluster: Connection, index: str, reject: Callable[[str, int, Defect], None], limit: ConcurrencyLimit,
        *, retry_seconds: float, refresh_every: int = 0, is_own_version: Callable[[int], bool] | None = None,
        creates: bool = False,
    ) -> None:  # fmt: skip
        self._cluster, self.index, self._reject, self._limit = cluster, index, reject, limit
        self._retry_seconds, self._refresh_every = retry_seconds, refresh_every
        self._is_own_version, self._creates = is_own_version, creates
        self._params = {"filter_path": BULK_RESULTS + ("" if creates else ",items.*.result")}
        self._lock = threading.Lock()  # guards the attributes below
        self.stored = 0
        self.dropped = 0  # by an ingest pipeline
        self.replaced = 0  # stored rows that added no document, because their id existed
        self.unsure = 0  # stored rows that may belong to those, since a response was lost
        self.found = 0  # stored rows that were there at the first attempt, from the cluster's own retry or another run
        self._max_bytes = MAX_BATCH_BYTES
        self._refreshed_at = 0  # documents

    def store(self, batch: Batch) -> None:
        """Store or reject each document of a batch.

        Raises OperationFailed if the cluster keeps rejecting documents, or the exceptions of the requests.
        """
        self._store(batch)
        with self._lock:  # without refreshes during the load, one core refreshes at the end while the others idle
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
                "POST", f"/{self.index}/_bulk", batch.body, params=self._params, accept=[413],
                on_throttled=self._limit.halve,
            )  # fmt: skip
            resent = resent or response.resent
            if response.status == 413:
                if count == 1:
                    return self._reject_document(batch, f"larger than the cluster accepts ({len(batch.body):,} bytes)")
                self._lower_max_bytes(len(batch.body))
                continue
            batch, refusal = self._handle_item_results(batch, response, resent)
            if batch.count():
                self._limit.halve(response.sent)
            elif response.first and not resent:
                self._limit.completed(response.sent)
            if batch.count() < count:
                retry.restart()
            if refusal and not retry.wait(f"{plural(batch.count(), 'document')} unconfirmed: {refusal}; trying again"):
                raise OperationFailed(
                    f"{self.index}: the cluster kept rejecting {batch.count():,} documents for "
                    f"{self._retry_seconds:g} s; last error: {refusal}; check the cluster (health, load) and run again"
                )
            resent = True

    def _lower_max_bytes(self, size: int) -> None:
        with self._lock:
            self._max_bytes = most = min(self._max_bytes, max(size // 2, 1))
        log.warning("the cluster rejects requests of %s bytes (413): at most %s from now on", size, most)

    def _handle_item_results(self, batch: Batch, response: Response, resent: bool) -> tuple[Batch, str]:
        """Count or reject each document; return those that have to be resent, and the reason."""
        body, count = response.body, batch.count()
        created, updated = body.count(b'"status":201'), body.count(b'"status":200')
        if body.startswith(b'{"errors":false') and created + updated == count:  # most responses; saves parsing
            dropped = updated if self._creates else body.count(b'"result":"noop"')
            self._count(stored=count - dropped, replaced=updated - dropped, dropped=dropped)
            return Batch(), ""
        items = [next(iter(item.values())) for item in response.data.get("items", [])]
        if len(items) != count:
            return batch, f"the response has {len(items)} results for {count} documents"
        again, refusal = [], ""
        for document, item in zip(batch.documents(), items):
            status, error = item["status"], item.get("error", {})
            kind, reason = str(error.get("type", "")), str(error.get("reason", ""))
            if status == 200 and (self._creates or item.get("result") == "noop"):
                self._count(dropped=1)
            elif status in (200, 201):
                self._count(stored=1, replaced=status == 200)
            elif status == 409:
                self._handle_conflict(document, f"{kind}: {reason}", resent)
            elif ("block" in kind and status != 503) or status in (401, 403, 404):
                raise self._cluster.failure(f"POST /{self.index}/_bulk", status, json.dumps({"error": error}).encode())
            elif status == 429 or (status >= 500 and "processor" not in kind):  # such as fail_processor_exception
                again.append(document)
                refusal = f"{status} {kind}: {reason}"
            else:
                cause = error.get("caused_by", {}).get("reason", "")
                self._reject_document(document, f"{kind}: {reason}{cause and ': ' + cause}")
        return Batch.joined(again), refusal

    def _handle_conflict(self, document: Batch, reason: str, resent: bool) -> None:
        """Handle a conflict: the id exists, or, with an id column, has at least the version of this document."""
        version = re.search(r"current version \[(\d+)\]", reason)
        if not self._is_own_version:
            self._count(stored=1, found=not resent)
        elif version and self._is_own_version(int(version[1])):  # a later row, or an earlier attempt for this row
            again = resent or re.search(r"current version \[(\d+)\].*\[\1\]", reason) is not None
            self._count(stored=1, replaced=not again, unsure=again)
        else:
            self._reject_document(document, f"{reason}: an earlier load ran on a host whose clock was ahead, or "
                                            "another client is writing to the index")  # fmt: skip

    def _reject_document(self, document: Batch, reason: str) -> None:
        named = re.search(r'field(?: \[|=")([^\]"]+)', reason)
        row = json.loads(document.body.split(b"\n")[1], parse_float=str, parse_int=str)  # with every digit
        [(key, line)] = [(key, line) for key, lines in document.origins for line in lines]
        self._reject(key, line, Defect(reason, row, named[1] if named else None))

    def _count(
        self, *, stored: int = 0, replaced: int = 0, unsure: int = 0, dropped: int = 0, found: int = 0
    ) -> None:  # fmt: skip
        with self._lock:
            self.found += found
            self.dropped += dropped
            self.stored += stored
            self.replaced += replaced
            self.unsure += unsure


class Rejects:
    """Counts rejected rows and writes them to a file of this run that only its owner may read."""

    def __init__(self, folder: Path, index: str, accepted: int) -> None:
        self.path = folder / f"rejects-{index}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}.ndjson"
        self.limit, self.count = max(accepted, REJECTS_TOLERATED), 0
        self._reasons = Counter[tuple[str | None, str]]()  # by column and reason without values
        self._lock = threading.Lock()
        self._file: Any = None

    def prepare(self) -> None:
        """Create the folder and delete files older than 30 days. Raises OperationFailed if it is not writable."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            for old in self.path.parent.glob("rejects-*.ndjson"):
                with contextlib.suppress(OSError):  # another load may have deleted it
                    if time.time() - old.stat().st_mtime > KEEP_DAYS * 86400:
                        old.unlink()
            if not os.access(self.path.parent, os.W_OK | os.X_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            where = f"{self.path.parent}: {error.strerror}"
            raise OperationFailed(f"{where}; set LOG_DIR to a writable folder") from None

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
                    f"rejects file {self.path}: {error.strerror}; free some space, or set LOG_DIR to another folder"
                ) from None
            if self.count > self.limit:
                raise OperationFailed(
                    f"more than {self.limit:,} rows were rejected; fix the files or the mapping, see {self.path}"
                )

    def summary(self) -> list[dict[str, Any]]:
        """Return the ten most frequent pairs of reason and column, with their numbers of rejected rows."""
        return [{"rows": rows, "column": column, "reason": reason}
                for (column, reason), rows in self._reasons.most_common(REASONS_SHOWN)]  # fmt: skip

    def log_summary(self) -> None:
        for entry in self.summary():
            column = f"{entry['column']}: " if entry["column"] else ""
            log.warning("rejected: %s x %s%s", entry["rows"], column, entry["reason"])

    def _open(self) -> Any:
        if self.path.exists():  # another load began in the same second
            self.path = self.path.with_stem(f"{self.path.stem}-{os.getpid()}")
        return os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")


# --- the script -------------------------------------------------------------------------------------------------------


class Delivery:
    """The objects under the prefix, checked against READY_OBJECT (which may be a manifest) and MAX_AGE_HOURS."""

    def __init__(self, settings: argparse.Namespace, bucket: Bucket) -> None:
        self.settings, self.bucket = settings, bucket
        self.place, self.manifest = f"s3://{settings.bucket}/{settings.prefix}", Manifest()

    def objects(self) -> list[S3Object]:
        """Return the objects to load. Raises Refused if there are none, or they are too old or incomplete."""
        found, ready = self._listed(S3_FIRST_CONTACT_S)
        if ready:
            self.manifest = self._read_manifest(ready)
        objects = self._data_in(found)
        data = set(objects)
        ignored = [item for item in found if item not in data]
        log_ignored(objects, ignored)
        if not objects:
            advice = "run again when the producer has finished, or check bucket and prefix"
            if other := [item.key for item in ignored if item.size and not is_leftover(item.key, self.settings.prefix)]:
                advice = f"{other[0]} is not named *.csv or *.csv.gz; rename it or list it in a READY_OBJECT manifest"
            raise Refused(f"{self.place}: no .csv or .csv.gz object; nothing was changed; {advice}")
        log.info("%s: %s, %s bytes, from %s to %s", self.place, plural(len(objects), "object"),
                 f"{sum(item.size for item in objects):,}", objects[0].key, objects[-1].key)  # fmt: skip
        if len(folders := folders_of(self.settings.prefix, objects)) > 1:
            log.warning("the prefix %s does not end with a slash, so all folders that it matches are loaded: %s",
                        self.settings.prefix, ", ".join(folders))  # fmt: skip
        self._refuse_untimely(objects, ready)
        if differences := self.manifest.differences(objects):
            raise Refused(
                f"{self.place}: {self.settings.ready_object} (READY_OBJECT) does not match the objects in S3: "
                f"{'; '.join(differences[:5])}. Nothing was changed; run again when the producer has finished, or, if "
                "the files are right, with READY_OBJECT=none"
            )
        return objects

    def _refuse_untimely(self, objects: list[S3Object], ready: S3Object | None) -> None:
        """Raise Refused if the producer is still writing, or if the newest object is older than MAX_AGE_HOURS."""
        newest, oldest = (pick(objects, key=lambda item: item.modified) for pick in (max, min))
        now, limit = datetime.now(timezone.utc), self.settings.max_age_hours
        log.info("the newest object is %s, %.1f h old, the oldest %s, %.1f h", newest, newest.age_h(now), oldest,
                 oldest.age_h(now))  # fmt: skip
        marker = f"{self.place}: {self.settings.ready_object} (READY_OBJECT)"
        if self.settings.ready_object and not ready:
            raise Refused(f"{marker} is missing; nothing was changed; run again when the producer has finished")
        if ready and ready.modified < newest.modified:
            raise Refused(
                f"{marker} is older ({ready.modified:%Y-%m-%dT%H:%M:%SZ}) than the newest object, {newest}; nothing "
                "was changed; the producer is still writing; run again when it has finished"
            )
        if limit is not None and newest.age_h(now) > limit:
            raise Refused(
                f"{self.place}: the newest object, {newest}, is {newest.age_h(now):.1f} h old, more than MAX_AGE_HOURS "
                f"({limit:g}); nothing was changed; check why the producer has not written since"
            )

    def verify_unchanged(self, objects: Iterable[S3Object]) -> None:
        """Raise OperationFailed unless S3 still holds exactly these objects."""
        found, _ = self._listed(self.bucket.retry_seconds)  # everything is stored: a long wait pays off
        if changed := sorted({item.key for item in set(self._data_in(found)) ^ set(objects)}):
            raise OperationFailed(
                f"{self.place} changed during the load ({', '.join(changed[:5])}): the producer was still writing; run "
                "again when it has finished"
            )

    def _listed(self, retry_seconds: float) -> tuple[list[S3Object], S3Object | None]:
        """List the prefix; return READY_OBJECT separately."""
        prefix, name = self.settings.prefix, self.settings.ready_object
        found = self.bucket.list_objects(prefix, retry_seconds)
        ready = next((item for item in found if name and item.key in (prefix + name, f"{prefix}/{name}")), None)
        return [item for item in found if item is not ready], ready

    def _data_in(self, found: list[S3Object]) -> list[S3Object]:
        return [item for item in found if item.key in self.manifest.sizes
                or (item.is_csv() and not is_leftover(item.key, self.settings.prefix))]  # fmt: skip

    def _read_manifest(self, ready: S3Object) -> Manifest:
        data = S3Body(self.bucket, ready).read_all() if 0 < ready.size <= MAX_MANIFEST_BYTES else b""
        manifest = parse_manifest(data, self.bucket.name, self.settings.prefix)
        if not manifest:
            log.info("%s (READY_OBJECT) is not a usable manifest: objects and rows are not compared", ready.key)
            return Manifest()
        rows = "an unknown number of rows" if manifest.rows is None else plural(manifest.rows, "row")
        log.info("%s (READY_OBJECT) is a manifest: %s, %s", ready.key, plural(len(manifest.sizes), "object"), rows)
        return manifest

    def expected_rows(self) -> int | None:
        """Return how many rows the load must read, from EXPECTED_ROWS or else the manifest.

        Returns None if any number will do: with EXPECTED_ROWS=0, or if neither of them gives a number.
        """
        given: int | None = self.settings.expected_rows
        return self.manifest.rows if given is None else given or None


class LoadRecord:
    """SKIP_UNCHANGED: a record in an index's `_meta` which proves that the index still holds a load from `source`.

    It contains a digest of the source, the loader, the fields and the settings, and the history and last sequence
    number of each primary shard, which change with every write and every restore.
    """

    def __init__(self, manager: OpenSearchBaseManager, target: ClearableIndex, source: Sequence[Any]) -> None:
        self._manager, self._target, self._source = manager, target, source
        self._writes_before = dict[str, list[Any]]()

    def begin(self) -> None:
        """Remember the writes up to now; call it when the index is empty."""
        self._writes_before = self._writes()

    def write(self, stored: int) -> None:
        """Write the record if each stored row was one write; otherwise another client may have written, too."""
        found = self._manager._verify_index_exists(self._target.name)
        record, mapping = self._current(found), found["mappings"]
        before, after = (sum(last for _, last in writes.values()) for writes in (self._writes_before, record["writes"]))
        if after - before == stored and not uses_pipeline(found["settings"]):  # whose definition may change
            meta = {**mapping.get("_meta", {}), RECORD: record}
            self._manager.request("PUT", f"/{self._target.name}/_mapping", {"_meta": meta})

    def unchanged(self) -> dict[str, Any] | None:
        """Return the record if it still describes the index and the source, and the index is not unfinished."""
        found = self._manager._verify_index_exists(self._target.name)
        meta = found["mappings"].get("_meta", {})
        if RECORD not in meta or SUITE in meta:
            return None
        record = self._current(found)
        return record if meta[RECORD] == record else None

    def _current(self, found: Mapping[str, Any]) -> dict[str, Any]:
        fields = {key: value for key, value in found["mappings"].items() if key != "_meta"}
        settings = {name: value for name, value in found["settings"].items() if not IRRELEVANT_SETTINGS.match(name)}
        loader = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()  # a new version may store other documents
        made_of = json.dumps([self._source, fields, settings, loader], sort_keys=True)
        digest = hashlib.sha256(made_of.encode()).hexdigest()
        documents = self._manager._get_index_count(self._target.name)  # before `writes`, which shows later writes
        return {"digest": digest, "uuid": self._target.uuid, "writes": self._writes(), "documents": documents}

    def _writes(self) -> dict[str, list[Any]]:
        """Return history and last sequence number of each primary."""
        return {
            number: [copy["commit"]["user_data"]["history_uuid"], copy["seq_no"]["max_seq_no"]]
            for number, copies in self._manager.shard_stats(self._target.name).items()
            for copy in copies if copy["routing"]["primary"]
        }  # fmt: skip


def uses_pipeline(settings: Mapping[str, Any]) -> bool:
    return {settings.get(f"index.{kind}_pipeline", "_none") for kind in ("default", "final")} != {"_none"}


class BulkUpdate(OpenSearchBaseManager):
    renderer: Renderer  # these three are created by `_load`
    store: BulkStore
    workers: BulkWorkers

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
        if self.dry_run and self.settings.skip_unchanged:  # first: without a change, no other check is needed
            found = self.read_index(self.target.name, accept=[403, 404])
            self.target.require_permissions(found is not None)
            self.target.read(found)
            objects = self.delivery.objects()
            if record := self._load_record(objects).unchanged():
                log.info("%s already holds the data in %s: nothing has changed since the last load", self.target.name,
                         self.place)  # fmt: skip
                return {**self._result(objects), "documents": record["documents"], "unchanged": True, "dry_run": True}
            loads_another = self.keep or self.settings.refresh_strategy == "alternate"  # keep: set by the runner
            if loads_another and self._check_index_aliases(self.target.name):
                log.info("cannot prove that %s holds the data in %s: a refresh is needed", self.target.name, self.place)
                return {**self._result(objects), "dry_run": True}
        self.target.claim(may_be_live=self.keep or self.dry_run, alias="" if self.keep else self.settings.index_alias)
        if not self.keep:
            self.target.verify_sees_everything()
        self.rejects.prepare()
        objects = objects or self.delivery.objects()
        types, added = self._inspect(objects)
        if self.keep and added:
            require_permissions(self, [mapping_probe(self.target.name)])
        if self.dry_run:
            log.info("dry run: the load would %s %s", "add to" if self.keep else "empty and fill", self.target.name)
            return {**self._result(objects), "dry_run": True}
        try:
            if self.keep:
                self._add_fields(added)
                self._load(objects, types)
            else:
                self._replace(objects, types, added)
        finally:
            self.rejects.log_summary()
        return self._report(objects, began)

    # --- the index ---

    def _replace(self, objects: list[S3Object], types: Mapping[str, str], added: Mapping[str, Any]) -> None:
        """Empty the index, load it, and count; it is marked as unfinished until all of this has succeeded."""
        with self.target.fill(without_replicas=self.settings.load_without_replicas):
            self._add_fields(added)
            self.target.empty()
            record = self._load_record(objects) if self.settings.skip_unchanged else None
            if record:
                record.begin()
            self._load(objects, types)
            self.target.restore_settings()
            self._verify_count()
            if record and not self.rejects.count and not self.store.found:
                record.write(self.store.stored)

    def _load_record(self, objects: list[S3Object]) -> LoadRecord:
        files = sorted((item.key, item.etag, item.size) for item in objects)
        rows = self.delivery.expected_rows()
        return LoadRecord(self, self.target, [self.place, self.delimiter, self.id_column, rows, files])

    def _add_fields(self, added: Mapping[str, Any]) -> None:
        """Define new fields before the first document, or the server would guess their types (dates!)."""
        if added:
            self.request("PUT", f"/{self.target.name}/_mapping", {"properties": added})

    # --- inspect ---

    def _result(self, objects: list[S3Object]) -> dict[str, Any]:
        """Return the part that all results have in common."""
        now = datetime.now(timezone.utc)
        age_h = round(min(item.age_h(now) for item in objects), 2)
        return {"index": self.target.name, "objects": len(objects), "newest_object_age_hours": age_h}

    def _inspect(self, objects: list[S3Object]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Read the heads and refuse objects that cannot be loaded; return the types and the new fields."""
        mapping, index = self.target.found["mappings"], self.target.name
        if mapping.get("_routing", {}).get("required"):
            raise Refused(f"index {index} requires a routing value (_routing), which rows do not have; create it "
                          "without this requirement")  # fmt: skip
        self._refuse_missing_pipeline()
        new, types = NewColumns(mapping), types_in(mapping)
        check = FirstRows(types, self.bucket.name, self.id_column) if self.dry_run else None
        heads = read_heads(self.bucket, objects, self.delimiter, new, check)
        known = {*types, *(name for name in new if dynamic_property(mapping, name))}
        check_headers(heads, known)
        if not any(head.has_rows for head in heads):
            raise Refused(
                f"{self.place}: not one data row; nothing was changed; check whether the producer of the files has "
                "finished"
            )
        for head in heads:
            self._check_columns(head, known)
        if wrong := unwritable(sorted({name for head in heads for name in head.columns}), types):
            raise Refused(f"columns that no document of {index} can contain, because they are aliases or properties of "
                          f"nested objects: {', '.join(wrong)}; rename or remove them")  # fmt: skip
        types, added = column_types(index, mapping, new)
        refuse_too_many_fields(index, self.target.found, added)
        if check:
            check.refuse(self.settings.max_rejects)
        return types, added

    def _refuse_missing_pipeline(self) -> None:
        """Raise Refused if the index names an ingest pipeline that does not exist: each row would be rejected.

        A harmless bulk request tests this, since reading pipelines would need another permission.
        """
        index = self.target.name
        if not uses_pipeline(self.target.found["settings"]):
            return
        body = self.request("POST", f"/{index}/_bulk", bulk_probe(index, "index").body).body
        if missing := re.search(r"(?:pipeline with id|non-existent pipeline) \[(.*?)\]", body.decode(errors="replace")):
            raise Refused(f"index {index} uses the ingest pipeline {missing[1]}, which does not exist; nothing was "
                          f"changed. Create it, or remove it from the settings of {index}")  # fmt: skip

    def _check_columns(self, head: Head, known: Container[str]) -> None:
        if known and not any(name in known for name in head.columns):
            raise Refused(
                f"{head.key}: the mapping of {self.target.name} defines none of the columns "
                f"{', '.join(head.columns)[:200]}; is {self.delimiter!r} the right delimiter (DELIMITER, --delimiter)?"
            )
        if self.id_column and self.id_column not in head.columns:
            raise Refused(f"{head.key}: there is no column {self.id_column}; set ID_COLUMN (--id-column) to another "
                          "one")  # fmt: skip

    # --- load ---

    def _load(self, objects: list[S3Object], types: Mapping[str, str]) -> None:
        """Load all objects, then verify that no row is missing. Raises OperationFailed (see `_verify_all_loaded`)."""
        began, rate = time.monotonic(), self.settings.requests_per_second
        limit = ConcurrencyLimit(self.settings.workers)
        self.renderer = Renderer(
            types, self.rejects.add, bucket=self.bucket.name, id_column=self.id_column,
            operation="index" if self.keep else "create",
        )  # fmt: skip
        self.store = BulkStore(
            self, self.target.name, self.rejects.add, limit,
            retry_seconds=self.settings.retry_seconds, refresh_every=0 if self.keep else REFRESH_EVERY_DOCUMENTS,
            is_own_version=self.renderer.is_own_version if self.id_column else None,
            creates=not (self.keep or self.id_column),
        )  # fmt: skip
        self.workers = BulkWorkers(self.store.store, limit)
        for batch in batches(self._documents(objects, limit), rate.batch_size(self.settings.batch_size)):
            rate.wait(batch.count())
            self.workers.put(batch)
        self.workers.finish()
        if self.renderer.repeated:
            log.warning("skipped %s equal to the header, the first is %s", plural(self.renderer.repeated, "row"),
                        self.renderer.first_repeated)  # fmt: skip
        stored = self.store.stored
        log.info("loaded %s rows in %.1f s, %s/s, at most %s requests in flight", f"{stored:,}",
                 time.monotonic() - began, f"{per_second(stored, began):,}", self.workers.peak)  # fmt: skip
        self._verify_all_loaded(objects)

    def _documents(self, objects: list[S3Object], limit: ConcurrencyLimit) -> Iterator[Batch]:
        """Yield the good rows of all objects as bulk text."""
        progress = Progress(f"loading {self.target.name}", sum(item.size for item in objects), "bytes")
        before = 0
        for item, first in read_ahead(self.bucket, objects, AHEAD_BYTES):
            body = S3Body(self.bucket, item, first=first)
            del first  # the body releases these bytes as they are consumed
            columns, blocks = read_csv(unpacked(body), f"s3://{self.bucket.name}/{item.key}", self.delimiter)
            for documents in self.renderer.documents(item.key, columns, blocks):
                yield documents
                progress.update(before + body.position, f"{self.renderer.read:,} rows, {limit.in_flight} requests")
            before += item.size
        progress.close()

    # --- verify and report ---

    def _verify_all_loaded(self, objects: list[S3Object]) -> None:
        """Raise OperationFailed unless S3 is unchanged, the index is the same one, and the row counts are right."""
        self.delivery.verify_unchanged(objects)
        self.target.verify_same()
        read, stored, dropped = self.renderer.read, self.store.stored, self.store.dropped
        if read != stored + self.rejects.count + self.renderer.skipped + dropped:
            raise OperationFailed(f"{self.place}: the row counts do not add up: {self._counts()}; run again")
        if dropped:
            pipelines = f"an ingest pipeline of {self.target.name} (index.default_pipeline or index.final_pipeline)"
            if not stored:
                raise OperationFailed(f"{pipelines} dropped all {dropped:,} rows; change it and run again")
            log.warning("%s dropped %s rows", pipelines, f"{dropped:,}")
        if read == self.renderer.skipped:
            raise OperationFailed(f"{self.place}: not one data row; run again when the producer has finished")
        rows, expected = read - self.renderer.skipped, self.delivery.expected_rows()
        if expected is not None and not rows <= expected <= rows + self.renderer.empty:  # some producers count them
            raise OperationFailed(
                f"{self.place}: {rows:,} rows were read, {expected:,} are expected; run again when the producer has "
                "finished, or with EXPECTED_ROWS=0 if the files are right"
            )

    def _verify_count(self) -> None:
        """Raise OperationFailed unless the number of documents in the index agrees with what was stored.

        Rows that may have been replaced (`store.unsure`) may be missing. The count then sets `store.replaced`. A row
        may have been there before (`store.found`) after a retry inside the cluster, but not in an unfinished index.
        """
        store = self.store
        if store.found and self.target.was_unfinished:
            raise OperationFailed(
                f"{self.target.name} held {store.found:,} of the rows before this run sent them: the run that left it "
                "unfinished, perhaps on another host, is still loading; run again when that run has ended"
            )
        count, most = self._get_index_count(self.target.name), store.stored - store.replaced
        if not most - store.unsure <= count <= most:
            raise OperationFailed(
                f"{self.target.name} holds {count:,} documents, but {most:,} were stored: another client is writing "
                "to it, or an ingest pipeline changes ids; stop that client, or change the pipeline, and run again"
            )
        store.replaced = store.stored - count

    def _counts(self) -> dict[str, int]:
        return {
            "read": self.renderer.read, "stored": self.store.stored, "rejected": self.rejects.count,
            "skipped": self.renderer.skipped, "dropped": self.store.dropped, "replaced": self.store.replaced,
        }  # fmt: skip

    def _report(self, objects: list[S3Object], began: float) -> dict[str, Any]:
        """Return the result. Raises TooManyRejects if more rows were rejected than MAX_REJECTS allows."""
        result: dict[str, Any] = {
            **self._result(objects), **self._counts(), "requests_under_way": self.workers.peak,
            "documents": self._get_index_count(self.target.name), "seconds": seconds_since(began),
            "rows_per_second": per_second(self.renderer.read, began),
        }  # fmt: skip
        text = " ".join(f"{name}={value}" for name, value in result.items())
        rejected, accepted = self.rejects.count, self.settings.max_rejects
        if rejected:
            result |= {"rejects_file": str(self.rejects.path), "reject_reasons": self.rejects.summary()}
        if rejected > accepted:
            raise TooManyRejects(
                f"finished, but {rejected:,} rows were rejected; MAX_REJECTS allows {accepted:,}. Fix the rows "
                f"listed in {self.rejects.path}, or raise MAX_REJECTS, and run again: {text}", result
            )  # fmt: skip
        log.info("done: %s", text)
        return result


# --- the command line -------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bulkupdate.py",
        description="Replace the documents of an index with the rows of the CSV files under an S3 prefix.",
    )
    parser.add_argument("--bucket", required=True, type=bucket_name, help="the S3 bucket")
    parser.add_argument("--prefix", required=True, help="the prefix of the keys; .csv and .csv.gz objects are loaded")
    parser.add_argument("--index", required=True, type=index_name, help="index to fill (live only with --no-cleanup)")
    return add_settings(parser)


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, BulkUpdate, argv)


if __name__ == "__main__":
    raise SystemExit(main())
