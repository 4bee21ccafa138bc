"""Random mappings and documents: the audit never refuses what is the same, and always refuses what a field has lost.

By default some examples, the same ones each time; with --faults many more, new each time.
"""

from __future__ import annotations

import random
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import switch_alias
from conftest import fill
from hypothesis import given
from hypothesis import strategies as st

from .driver import profiles

# definition and values of each kind of leaf; the last is whether the server sees the value
SEEN = [
    ({"type": "keyword"}, ["a", "", "UA"]), ({"type": "keyword", "doc_values": False}, ["a"]),
    ({"type": "keyword", "index": False}, ["a"]), ({"type": "text"}, ["some words"]),
    ({"type": "text", "norms": False}, ["words"]), ({"type": "wildcard"}, ["w"]), ({"type": "match_only_text"}, ["w"]),
    ({"type": "long"}, [0, 1, -5]), ({"type": "double", "index": False}, [1.5]), ({"type": "unsigned_long"}, [2**63]),
    ({"type": "boolean"}, [True, False]), ({"type": "date"}, ["2024-01-31", 0]), ({"type": "ip"}, ["::1"]),
    ({"type": "geo_point"}, ["1,1"]), ({"type": "integer_range"}, [{"gte": 1}]), ({"type": "completion"}, ["c"]),
    ({"type": "flat_object"}, [{"p": {"q": "r"}}]), ({"type": "binary", "doc_values": True}, ["U29t"]),
    ({"type": "keyword", "null_value": "none"}, ["a", None]),
    ({"type": "text", "fields": {"raw": {"type": "keyword", "ignore_above": 3}}}, ["abc", "ab"]),
]  # fmt: skip
UNSEEN = [
    ({"type": "keyword", "index": False, "doc_values": False}, ["a"]), ({"type": "binary"}, ["U29t"]),
    ({"type": "text", "index": False, "store": True}, ["a"]), ({"type": "object", "enabled": False}, [{"x": 1}]),
    ({"type": "keyword", "ignore_above": 2}, ["long", "longer"]), ({"type": "keyword"}, [None, []]),
    ({"type": "long", "ignore_malformed": True}, ["x"]),
]  # fmt: skip
NAMES = ["a", "b", "carrier", "a b", "x,y", "ünï", "$(x)", "-q", 'q"q', "it's"]


@st.composite
def leaves(draw: st.DrawFn) -> list[tuple[tuple[str, ...], str, dict[str, Any], list[Any], bool]]:
    """Return path, kind of the object around (or nothing), definition, values, seen; of each field."""
    fields = []
    for name in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True)):
        around = draw(st.sampled_from(["", "", "object", "nested"]))
        seen = draw(st.integers(0, 3)) > 0
        definition, values = draw(st.sampled_from(SEEN if seen else UNSEEN))
        fields.append(((f"in {name}", name) if around else (name,), around, definition, values, seen))
    return fields


def properties_of(fields: Any) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for path, around, definition, _, _ in fields:
        if around:
            properties[path[0]] = {"type": around, "properties": {path[1]: definition}}
        else:
            properties[path[0]] = definition
    return properties


def document(fields: Any, has: set[str], values: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for path, around, _, choices, _ in fields:
        if path[-1] in has:
            value = values.choice(choices)
            made[path[0]] = [{path[1]: value}] if around == "nested" else {path[1]: value} if around else value
    return made


@pytest.fixture
def audited(admin, name, run):
    """Create both indices again and compare them: `audited(properties, docs, other_docs, *options)`."""

    def compare(properties, docs, other_docs, *more):
        old, new, alias = name("old"), name("new"), name("alias")
        for index, documents in (old, docs), (new, other_docs):
            admin("DELETE", f"/{index}?ignore_unavailable=true")
            admin("PUT", f"/{index}", {"mappings": {"properties": properties}, "settings": {"number_of_replicas": 0}})
            fill(admin, index, documents)
        admin("POST", "/_aliases", {"actions": [{"add": {"index": old, "alias": alias}}]})
        return run(switch_alias, "--alias", alias, "--source", old, "--target", new, "--dry-run", *more)

    return compare


@profiles(12, 400)
def test_the_same_contents_are_never_refused(profile, audited):
    @profile
    @given(leaves(), st.integers(1, 30), st.integers(0, 2**32), st.sampled_from(["0", "0.1", "10", "99.9"]))
    def check(fields, count, seed, threshold):
        values = random.Random(seed)
        names = [path[-1] for path, *_ in fields]
        docs = [document(fields, {name for name in names if values.random() < 0.6}, values) for _ in range(count)]
        shuffled = values.sample(docs, len(docs))
        outcome = audited(properties_of(fields), docs, shuffled, "--threshold", "0", "--field-threshold", threshold)
        assert outcome.code == 0, outcome.err
        assert "doubled: none; new: none" in outcome.err

    check()


@profiles(12, 400)
def test_a_field_removed_from_more_documents_than_allowed_is_always_refused(profile, audited):
    @profile
    @given(leaves(), st.data(), st.integers(1, 40), st.integers(0, 2**32), st.decimals(0, 99, places=1))
    def check(fields, data, count, seed, threshold: Decimal):
        values = random.Random(seed)
        names = [path[-1] for path, *_ in fields]
        path, *_, seen = data.draw(st.sampled_from(fields))
        has = [{name for name in names if name == path[-1] or values.random() < 0.6} for _ in range(count)]
        lost = data.draw(st.integers(0, count))
        left = [own - {path[-1]} if row < lost else own for row, own in enumerate(has)]
        docs, fewer = ([document(fields, own, random.Random(f"{seed} {row}")) for row, own in enumerate(rows)]
                       for rows in (has, left))  # fmt: skip
        share = Fraction(lost, count)
        fallen = seen and (share * 100 > Fraction(threshold) or share * 2 > 1)
        outcome = audited(properties_of(fields), docs, fewer, "--field-threshold", str(threshold))
        assert outcome.code == (4 if fallen else 0), outcome.err
        if fallen:
            assert {name.removesuffix(".raw") for name in outcome.result["fields_fallen"]} == {".".join(path)}

    check()
