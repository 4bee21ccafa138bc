"""bulkupdate.py: what becomes of a cell, and of a column that the mapping does not know."""

from __future__ import annotations

import csv
import io
import json
import re

import bulkupdate
import pytest
import requests
import sandbox
from conftest import state_of

pytestmark = pytest.mark.quick

GONE, REJECT = "the field is left out", "the row is rejected"
EMPTIES = ["NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "None", "", " ", "  NA "]


class Number(str):
    """A number as it stands in JSON, digit for digit; never equal to the text of the same digits."""

    def __eq__(self, other):
        return isinstance(other, Number) and str(self) == str(other)

    __hash__ = str.__hash__


def n(digits):
    return Number(digits)


def exactly(text):
    """Parse JSON so that every digit of a number can be compared; NaN and Infinity come out as such words."""
    return json.loads(text, parse_int=Number, parse_float=Number, parse_constant=str)


def csv_of(*rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


@pytest.fixture
def stored(box):
    """Return `_source` by record number, as it was sent."""

    def do(index):
        answer = requests.post(
            f"{box.server.endpoint}/{index}/_search", auth=(sandbox.ADMIN, sandbox.ADMIN_PASSWORD), verify=False,
            json={"size": 10_000}, timeout=60,
        )  # fmt: skip
        return {int(hit["_id"].split("-")[1]): hit["_source"] for hit in exactly(answer.text)["hits"]["hits"]}

    return do


WHOLE = {
    "0": n("0"), "7": n("7"), "007": n("7"), "-007": n("-7"), "517.0": n("517"), "517.000": n("517"), "1e2": n("100"),
    "1E+2": n("100"), "500e-1": n("50"), "1.5e1": n("15"), " 5 ": n("5"), "+5": n("5"), "5.": n("5"), "-5": n("-5"),
    "000000000000000000000000000000000000042": n("42"), "0e9": n("0"), ".0": n("0"),
    **dict.fromkeys([".5", "1.7", "1e-1", "-0.1", "1.0000000000000000000000000001"], REJECT),
}  # fmt: skip
NO_NUMBER = dict.fromkeys([
    "1,000", "1_000", "inf", "-inf", "Infinity", "INF", "NAN", "-nan", "na", "NA5", "1e", "1e+", "e5", ".", "+", "-",
    "+-5", "--5", "5-", "0x10", "1.2.3", "1d", "abc", "true", "1 000", "1e 3", "- 5", "1\n2",
    "\u0663", "\u096b", "\uff15", "\u00b2", "1\u0663", "\u22125",
], REJECT)  # fmt: skip
REAL = {
    "0.1": n("0.1"), "007.50": n("7.50"), "1e3": n("1e3"), "-1.5E-3": n("-1.5e-3"), ".5": n("0.5"), "-.5": n("-0.5"),
    "5.": n("5"), "+5": n("5"), " 2.5 ": n("2.5"), "517": n("517"), "517.0": n("517.0"), "000": n("0"),
    "3.14159265358979323846264338327950288": n("3.14159265358979323846264338327950288"),
}  # fmt: skip


def bounds(low, high):
    """Return the smallest and largest value of an integer type, and what is one beyond, plain and with an exponent."""
    inside = {str(value): n(value) for value in (low, low + 1, high - 1, high)}
    beyond = [str(low - 1), str(high + 1), f"{high + 1}.0", "1e20", "1e400", "1e99999", "9" * 50, "-" + "9" * 50]
    return {**inside, f"{high}.0": n(high), **dict.fromkeys(beyond, REJECT)}


EMPTY = dict.fromkeys(EMPTIES, GONE)
KEPT = {cell: cell for cell in [
    *EMPTIES, "007", " x ", "1e3", "true", 'a "b", c', "\\n\\", "tab\there", "ü€😀", "\x01\x7f", "two\nlines", "\u2028",
    "null\n",
] if cell}  # fmt: skip
TRUE = "true TRUE True tRuE yes YES t T 1".split()
FALSE = "false FALSE False no No f F 0".split()
CELLS = {
    "long": {**bounds(-(2**63), 2**63 - 1), "9007199254740993": n("9007199254740993"), **WHOLE, **NO_NUMBER, **EMPTY},
    "integer": {**bounds(-(2**31), 2**31 - 1), **WHOLE, **NO_NUMBER, **EMPTY},
    "short": {**bounds(-(2**15), 2**15 - 1), **WHOLE, **NO_NUMBER, **EMPTY},
    "byte": {**bounds(-(2**7), 2**7 - 1), "127.0": n("127"), "1e2": n("100"), **NO_NUMBER, **EMPTY},
    "unsigned_long": {**bounds(0, 2**64 - 1), "9223372036854775808": n(2**63), **WHOLE, **NO_NUMBER, **EMPTY,
                      "-007": REJECT, "-5": REJECT},
    "double": {**REAL, "1e308": n("1e308"), "12345678901234567890123": n("12345678901234567890123"),
               **dict.fromkeys(["1e400", "-1e400"], REJECT), **NO_NUMBER, **EMPTY},
    "float": {**REAL, "3.4e38": n("3.4e38"), "1e39": REJECT, **NO_NUMBER, **EMPTY},
    "half_float": {**REAL, "65504": n("65504"), "70000": REJECT, **NO_NUMBER, **EMPTY},
    "boolean": {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False), **EMPTY,
                **dict.fromkeys("y n on off 2 -1 1.0 01 00 tru ja wahr".split(), REJECT)},
    "keyword": {**KEPT, "x" * 32_766: "x" * 32_766, "ü" * 16_383: "ü" * 16_383, "": GONE,
                "y" * 32_767: REJECT, "ä" * 16_384: REJECT},
    "text": {**KEPT, "word " * 20_000: "word " * 20_000, "": GONE},
    "date": {**{cell: cell for cell in ("2024-01-15", "2024-01-15T10:00:00Z", "2024", "20240101", "1700000000000")},
             **dict.fromkeys(["2024-01-01 00:00:00", "01/02/2024", "2024-02-30", "n/a", "yesterday"], REJECT), **EMPTY},
    "ip": {**{cell: cell for cell in ("192.168.0.1", "::1", "2001:db8::ff")},
           **dict.fromkeys(["300.1.1.1", "localhost", "10.0.0.0/8"], REJECT), **EMPTY},
    "geo_point": {**{cell: cell for cell in ("52.5,13.4", "POINT (13.4 52.5)", "u33dc0cppjs7")},
                  **dict.fromkeys(["95,13", "1,2,3,4", "north"], REJECT), **EMPTY},
    "binary": {"U29tZSBiaW5hcnk=": "U29tZSBiaW5hcnk=", "007=": "007=", **EMPTY},
}  # fmt: skip
JSON_CELLS = {
    "object": {
        '{"a": 1, "b": {"c": [1.5, 2.50]}}': {"a": n("1"), "b": {"c": [n("1.5"), n("2.50")]}},
        '{"big": 9223372036854775807, "digits": 0.1000000000000000055511151231257827}':
            {"big": n(2**63 - 1), "digits": n("0.1000000000000000055511151231257827")},
        '[{"a": 1}, {"a": 2}]': [{"a": n("1")}, {"a": n("2")}],
        '{\n  "t": "two\\nlines",\r\n  "u": "NA"\n}': {"t": "two\nlines", "u": "NA"},
        ' {"a": null} ': {"a": None}, "{}": {}, '{"t": "\\u2028\u2028"}': {"t": "\u2028\u2028"},
        **dict.fromkeys([
            "5", '"text"', "true", "text", "{'a': 1}", '{"a": NaN}', '{"a": -Infinity}', '{"a": 1} {}', '{"a": 1',
            '{"a": 1,}', '{"a": 1},"b":{}', '{"a": 1, "a": 2}', '{"t": "raw\ttab"}', "[" * 50_000,
        ], REJECT),
    },
    "nested": {'[{"a": 1}, {"a": 2}]': [{"a": n("1")}, {"a": n("2")}], '{"a": 3}': {"a": n("3")}, "[1": REJECT},
    "integer_range": {'{"gte": 1, "lt": 5}': {"gte": n("1"), "lt": n("5")},
                      **dict.fromkeys(["1-5", '{"gte": 9, "lt": 1}'], REJECT)},
    "long_range": {'{"gte": 9007199254740993}': {"gte": n("9007199254740993")}, "5": REJECT},
    "double_range": {'{"gt": 0.10}': {"gt": n("0.10")}, "[0.1, 0.2]": REJECT},
    "float_range": {'{"gt": 0.5}': {"gt": n("0.5")}},
    "date_range": {'{"gte": "2024-01-01", "lt": "2025-01-01"}': {"gte": "2024-01-01", "lt": "2025-01-01"},
                   "2024-01-01/2025-01-01": REJECT},
    "ip_range": {'"10.0.0.0/8"': "10.0.0.0/8", '{"gte": "10.0.0.1"}': {"gte": "10.0.0.1"}, "10.0.0.0/8": REJECT},
    "flat_object": {'{"a": {"b": "c"}}': {"a": {"b": "c"}}, "x": REJECT},
}  # fmt: skip


def test_each_cell_becomes_what_its_type_says_or_a_reject_with_its_line(make_index, put_csv, load, stored, rejected):
    kinds = {**CELLS, **{kind: {**cells, **EMPTY} for kind, cells in JSON_CELLS.items()}}
    wanted = {(kind, cell): want for kind, cells in kinds.items() for cell, want in cells.items()}
    index = make_index("index", {**{kind: {"type": kind} for kind in kinds}, "at": {"type": "integer"}})
    rows = [[*[cell if kind == own else "" for kind in kinds], at] for at, (own, cell) in enumerate(wanted)]
    prefix = put_csv({"a.csv": csv_of([*kinds, "at"], *rows)})
    load(prefix, index, "--max-rejects", "9999")

    found = dict.fromkeys(wanted, REJECT)
    for source in stored(index).values():
        kind, cell = list(wanted)[int(source.pop("at"))]
        found[kind, cell] = source.pop(kind, GONE)
        assert source == {}
    wrong = {(kind, cell[:60]): found[kind, cell] for kind, cell in wanted if found[kind, cell] != wanted[kind, cell]}
    assert wrong == {}
    line, lines = 2, {}
    for at, (kind, cell) in enumerate(wanted):
        if wanted[kind, cell] is REJECT:
            lines[at] = line
        line += 1 + cell.count("\n")
    entries = {int(entry["row"]["at"]): entry for entry in rejected(exactly)}
    assert {at: int(entry["line"]) for at, entry in entries.items()} == lines
    assert {entry["object"] for entry in entries.values()} == {f"{prefix}a.csv"}
    assert all(entry["reason"] for entry in entries.values())


def test_a_reject_names_the_column_whoever_refused_it(make_index, put_csv, load, rejected):
    columns = {
        "whole": ("integer", "1.5"), "flag": ("boolean", "maybe"), "data": ("object", "{"), "large": ("float", "1e39"),
        "day": ("date", "today"), "host": ("ip", "here"), "place": ("geo_point", "north"),
        "word": ("keyword", "x" * 33_000), "span": ("integer_range", '{"gte": 9, "lt": 1}'),
    }  # fmt: skip
    index = make_index("index", {name: {"type": kind} for name, (kind, _) in columns.items()})
    rows = [[cell if other == name else "" for other in columns] for name, (_, cell) in columns.items()]
    load(put_csv({"a.csv": csv_of(list(columns), *rows)}), index, "--max-rejects", "9")
    assert {entry["line"]: entry["column"] for entry in rejected(exactly)} == {
        n(line): name for line, name in enumerate(columns, 2)
    }


def test_the_rejects_file_is_json_and_holds_each_row_as_it_was(make_index, put_csv, load, rejected):
    index = make_index("index", {"v": {"type": "double"}, "day": {"type": "date"}, "k": {"type": "keyword"}})
    rows = [["1e400", "2024", "007"], ["x", "2024", "NA"], ["0.1000000000000000055", "soon", "007"]]
    load(put_csv({"a.csv": csv_of(["v", "day", "k"], *rows)}), index, "--max-rejects", "3")
    entries = sorted(rejected(exactly), key=lambda entry: int(entry["line"]))
    assert [[str(entry["row"][name]) for name in ("v", "day", "k")] for entry in entries] == rows


def test_a_long_keyword_is_stored_where_the_mapping_ignores_it(make_index, put_csv, load, stored):
    index = make_index("index", {"v": {"type": "keyword", "ignore_above": 256}})
    load(put_csv({"a.csv": f"v\n{'x' * 40_000}\n"}), index)
    assert stored(index) == {1: {"v": "x" * 40_000}}


# --- columns that the mapping does not know ---

NEW_COLUMNS = {  # name: its values, its type
    "whole": (["1", "-5", "0"], "long"),
    "eighteen": (["123456789012345678", "-123456789012345678", "1"], "long"),
    "nineteen": (["1234567890123456789", "1", "2"], "text"),
    "mixed": (["1", "2.5", "-0.25"], "double"),
    "gaps": (["NA", "", "5"], "long"),
    "more_gaps": ([" ", "null", "true"], "boolean"),
    "flags": (["true", "false", "true"], "boolean"),
    "yes": (["yes", "no", "yes"], "text"),
    "zip": (["01234", "12345", "23456"], "text"),
    "zero_point": (["01.5", "2.5", "3.5"], "text"),
    "flag_and_number": (["true", "1", "0"], "text"),
    "word": (["a", "1", "2"], "text"),
    "day": (["2024-01-15", "2024-01-16", "2024-02-30"], "text"),
    "stamp": (["2024-01-15T10:00:00Z", "2024/01/15", "n/a"], "text"),
    "part": (["1234-56", "2024/13/45", "2024-01"], "text"),
    "compact_day": (["20240115", "20240116", "20240117"], "long"),
    "thousands": (["1,000", "2,000", "3"], "text"),
    "infinite": (["inf", "1", "2"], "text"),
    "nothing": (["", "NA", ""], "text"),
    "_own": (["1", "2", "3"], "long"),
    "place.city": (["Rome", "Oslo", "Bonn"], "text"),
    "place.at.lat": (["1.5", "2.5", "3.5"], "double"),
}
TEXT = {"type": "text", "fields": {"keyword": {"type": "keyword", "ignore_above": 256}}}


def definition_in(mapping, name):
    *parents, leaf = name.split(".")
    for parent in parents:
        mapping = mapping["properties"][parent]
    return mapping["properties"][leaf]


def test_new_columns_get_the_type_that_all_their_values_have(make_index, put_csv, load, stored, admin):
    index = make_index()
    rows = zip(*[cells for cells, _ in NEW_COLUMNS.values()])
    load(put_csv({"a.csv": csv_of(list(NEW_COLUMNS), *rows)}), index)
    mapping = admin("GET", f"/{index}/_mapping")[index]["mappings"]
    got = {name: definition_in(mapping, name) for name in NEW_COLUMNS}
    assert got == {name: TEXT if kind == "text" else {"type": kind} for name, (_, kind) in NEW_COLUMNS.items()}
    first, second, third = stored(index).values()
    assert (first["whole"], first["mixed"], first["flags"], first["zip"]) == (n("1"), n("1"), True, "01234")
    assert (first["nineteen"], second["mixed"], third["gaps"]) == ("1234567890123456789", n("2.5"), n("5"))
    assert (first["day"], third["stamp"], first["gaps" if "gaps" in first else "word"]) == ("2024-01-15", "n/a", "a")
    assert "nothing" not in first
    assert second["nothing"] == "NA"  # it is text now
    hits = admin("POST", f"/{index}/_search", {"query": {"term": {"place.city.keyword": "Oslo"}}})["hits"]
    assert hits["total"]["value"] == 1


def test_what_the_heads_of_all_objects_show_is_combined(make_index, put_csv, load, admin):
    index = make_index()
    prefix = put_csv({"a.csv": "n,m,f,only_a\n1,1,true,1\n", "b.csv": "f,n,m,only_b\nNA,1.5,x,2\n", "c.csv": "n\nNA\n"})
    load(prefix, index)
    properties = admin("GET", f"/{index}/_mapping")[index]["mappings"]["properties"]
    kinds = {name: definition["type"] for name, definition in properties.items()}
    assert kinds == {"n": "double", "m": "text", "f": "boolean", "only_a": "long", "only_b": "long"}


def test_a_value_behind_the_head_that_does_not_fit_its_new_type_is_a_reject(make_index, put_csv, load, rejected, admin):
    index = make_index()
    text = "n,pad\n" + "1,xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n" * 3000 + "abc,x\n2.5,x\n"
    load(put_csv({"a.csv": text}), index, "--max-rejects", "2")
    assert definition_in(admin("GET", f"/{index}/_mapping")[index]["mappings"], "n") == {"type": "long"}
    assert [(entry["line"], entry["column"]) for entry in rejected(exactly)] == [(n("3002"), "n"), (n("3003"), "n")]


def test_new_columns_inside_a_known_object_leave_its_fields_alone(make_index, put_csv, load, admin):
    index = make_index("index", {"place": {"properties": {"zip": {"type": "keyword"}}}})
    load(put_csv({"a.csv": "place.zip,place.floor\n007,3\n"}), index)
    mapping = admin("GET", f"/{index}/_mapping")[index]["mappings"]
    place = {"properties": {"zip": {"type": "keyword"}, "floor": {"type": "long"}}}
    assert mapping["properties"] == {"place": place}


@pytest.mark.parametrize("mapping", [
    {"properties": {"n": {"type": "long"}}, "dynamic": False},
    {"properties": {"n": {"type": "long"}, "o": {"properties": {}, "dynamic": False}}},
    {"properties": {"n": {"type": "long"}, "o": {"type": "object", "enabled": False}}},
])  # fmt: skip
def test_dynamic_false_takes_unknown_columns_as_text_and_warns_once(mapping, make_index, put_csv, load, admin):
    index = make_index("index", **mapping)
    before = admin("GET", f"/{index}/_mapping")[index]["mappings"]["properties"]
    columns = ["n", "o.x", "o.y"]
    prefix = put_csv({f"{name}.csv": csv_of(columns, ["1", "007", "true"], ["2", "NA", ""]) for name in "ab"})
    outcome = load(prefix, index)
    assert admin("GET", f"/{index}/_mapping")[index]["mappings"]["properties"] == before
    rows = admin("POST", f"/{index}/_search", {"sort": ["_id"]})["hits"]["hits"]
    want = [{"n": 1, "o.x": "007", "o.y": "true"}, {"n": 2, "o.x": "NA"}]
    assert sorted((hit["_source"] for hit in rows), key=str) == sorted(want * 2, key=str)
    assert len(re.findall(r"WARNING.*o\.x.*o\.y|WARNING.*o\.y.*o\.x", outcome.err)) == 1
    assert len(re.findall(r"o\.[xy]", outcome.err)) == 2


@pytest.mark.parametrize("mapping", [
    {"properties": {"n": {"type": "long"}}, "dynamic": "strict"},
    {"properties": {"n": {"type": "long"}, "o": {"properties": {"a": {"type": "long"}}, "dynamic": "strict"}}},
    {"properties": {"n": {"type": "long"}, "o": {"properties": {"p": {"properties": {}}}}}, "dynamic": "strict"},
])  # fmt: skip
def test_unknown_columns_under_a_strict_mapping_are_refused(mapping, make_index, put_csv, load, admin):
    index = make_index("index", docs=[{"n": 1}], **mapping)
    before = state_of(admin, index)
    outcome = load(put_csv({"a.csv": "n\n1\n", "b.csv": "n,o.b\n1,2\n"}), index, code=4)
    assert "o.b" in outcome.last
    assert state_of(admin, index) == before


def test_an_object_under_a_strict_mapping_may_itself_be_open(make_index, put_csv, load, admin):
    index = make_index("index", {"n": {"type": "long"}, "o": {"properties": {}, "dynamic": True}}, dynamic="strict")
    load(put_csv({"a.csv": "n,o.b\n1,2\n"}), index)
    assert definition_in(admin("GET", f"/{index}/_mapping")[index]["mappings"], "o.b") == {"type": "long"}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("cell", "fits"),
    [
        ("[" * 900 + "]" * 900, True), ("[" * 1001 + "]" * 1001, False), ('{"a":' * 1001 + "1" + "}" * 1001, False),
        ("[" + "[1]," * 5000 + "[1]]", True), (json.dumps({"k": "[{" * 3000, "q": 'a"b'}), True),
    ],
)  # fmt: skip
def test_json_is_not_nested_too_deeply_for_the_server(cell, fits):
    if fits:
        assert bulkupdate.render_json(cell) == cell
    else:
        with pytest.raises(ValueError, match=r"nested more than 1,000 levels|not JSON"):  # or the parser's limit
            bulkupdate.render_json(cell)
