"""switch_alias.py: what it finds wrong with the data of a target that has the right count, and how to go back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time

import bulkupdate
import opensearch_base_manager as base
import pytest
import reindex
import sandbox
import switch_alias
from conftest import Reader, command_in, count, finish, load_arguments, log_of, sources, state_of
from fault_proxy import answer, delayed, edited, refused
from hypothesis import example, given, settings
from hypothesis import strategies as st

WORD = {"type": "keyword"}
FLIGHT = {"carrier": WORD, "n": {"type": "long"}}
FLIGHTS = [{"carrier": "UA", "n": n} for n in range(10)]


def counted(proxy):
    """Return the queries of the counts that the audit has sent."""
    return [json.loads(body)["query"] for body in proxy.seen("POST", "/_count")]


# --- fields that fall -------------------------------------------------------------------------------------------------


def test_a_column_of_another_name_is_refused_and_the_printed_command_accepts_it(
    make_pair, switch, behind_alias, admin, run
):
    renamed = [{"carrier_code": "UA", "n": n} for n in range(10)]
    old, new = make_pair(FLIGHT, FLIGHTS, renamed)
    before = state_of(admin, old, new)
    for more in ["--dry-run"], []:
        outcome = switch(old, new, *more)
        assert outcome.code == 4, outcome.err
        assert "carrier 100.0 % -> 0.0 %" in outcome.last
        assert "n 100.0 %" not in outcome.err
        assert "every nightly refresh will be refused" in outcome.last
        assert outcome.result["fields_fallen"] == {"carrier": "100.0 % -> 0.0 %"}
        assert (outcome.result["fields_checked"], outcome.result["changed"]) == (2, False)
        assert state_of(admin, old, new) == before
    command = command_in(outcome.last)
    assert command[command.index("--accept-fields") + 1] == "carrier"
    accepted = run(switch_alias, *command)
    assert accepted.code == 0, accepted.err
    assert behind_alias() == [new]
    assert accepted.result["fields_checked"] == 1
    assert "fields_fallen" not in accepted.result


@pytest.mark.parametrize(
    ("had", "has", "threshold", "code"),
    [
        (200, 180, "10", 0), (200, 179, "10", 4), (200, 199, "0", 4), (200, 199, "0.5", 0), (200, 199, "0.49", 4),
        (200, 200, "0", 0), (100, 80, "10", 0), (100, 79, "10", 4), (200, 100, "50", 0), (200, 99, "50", 4),
        (18, 9, "10", 0), (18, 8, "10", 4), (2, 1, "10", 0), (2, 0, "10", 4), (1, 0, "10", 0), (1, 0, "0", 4),
        (200, 0, "100", 0), (200, 0, "99.999", 4), (0, 200, "0", 0),
    ],
)  # fmt: skip
def test_the_thresholds_of_a_field_are_inclusive_and_exact(had, has, threshold, code, make_pair, switch):
    def docs(count):
        return [{"n": n, **({"x": "y"} if n < count else {})} for n in range(200)]

    outcome = switch(*make_pair({"x": WORD}, docs(had), docs(has)), "--field-threshold", threshold, "--dry-run")
    assert outcome.code == code, outcome.err


def test_a_share_is_of_all_documents_not_a_count(make_pair, switch):
    some = [{"x": 1}] * 9 + [{}]
    assert switch(*make_pair({"x": WORD}, some, some * 2), "--threshold", "100", "--field-threshold", "0").code == 0


def test_a_sparse_field_may_come_and_go(make_pair, switch):
    docs = [{"n": n} for n in range(5000)]
    old, new = make_pair({**FLIGHT, "rare": WORD}, docs + [{"n": 0, "rare": "x"}] * 20, docs + [{"n": 0}] * 20)
    assert switch(old, new).code == 0
    assert switch(new, old).code == 0


def test_the_smallest_loss_is_shown_with_as_many_digits_as_it_takes(make_pair, switch):
    docs = [{"carrier": "UA"}] * 4999
    outcome = switch(*make_pair(FLIGHT, docs + docs[:1], [*docs, {}]), "--field-threshold", "0")
    assert "carrier 100.00 % -> 99.98 %" in outcome.last


def test_the_worst_are_named_first_ten_at_most_and_the_command_has_all(make_pair, switch, run, behind_alias):
    names = [f"f{number:02d}" for number in range(12)]
    left = {name: 12 - number for number, name in enumerate(names)}  # f11 falls most
    docs = [dict.fromkeys(names, "x")] * 20
    fewer = [{name: "x" for name in names if row < left[name]} for row in range(20)]
    outcome = switch(*make_pair(dict.fromkeys(names, WORD), docs, fewer))
    assert outcome.code == 4
    assert "differently: f11 100.0 % -> 5.0 %, f10 100.0 % -> 10.0 %, " in outcome.last
    assert "f02 100.0 % -> 50.0 % and 2 more. " in outcome.last
    assert outcome.last.count(" -> ") == 10
    assert list(outcome.result["fields_fallen"]) == names[::-1]
    assert run(switch_alias, *command_in(outcome.last)).code == 0
    assert len(behind_alias()) == 1


ODD = ["$(touch spoiled)", "`x`", "a b", "a,b", 'q"uote', "it's", "-x", "--undo", "ünï", " led", "\\"]
CONTROL = ["a\nb", "tab\t", "esc\x1b[2K", "'\n\\", "it's $(touch spoiled)"]


@pytest.mark.parametrize("names", [ODD, CONTROL], ids=["odd", "control characters"])
def test_names_of_any_kind_are_quoted_so_that_the_command_works(names, make_pair, switch, run, behind_alias, tmp_path):
    old, new = make_pair(dict.fromkeys(names, WORD), [dict.fromkeys(names, "x")], [{"y": 1}])
    outcome = switch(old, new)
    assert outcome.code == 4, outcome.err
    assert set(outcome.result["fields_fallen"]) == set(names)
    assert "\x1b" not in outcome.err
    assert run(switch_alias, *command_in(outcome.last)).code == 0
    assert behind_alias() == [new]
    assert not (tmp_path / "spoiled").exists()


@settings(deadline=None, max_examples=200, derandomize=True, database=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=5), max_size=5))
@example(ODD + CONTROL)
def test_names_are_parsed_to_what_they_were(names):
    assert base.field_names(switch_alias.option_text(names)) == names


def test_names_may_come_by_several_options_and_with_spaces_after_the_commas(make_pair, switch):
    old, new = make_pair({**FLIGHT, "a,b": WORD, "c": WORD}, [{"n": 1, "carrier": 1, "a,b": 1, "c": 1}], [{"n": 1}])
    outcome = switch(old, new, "--accept-fields", 'carrier, "a,b"', "--accept-fields", "c,typo")
    assert outcome.code == 0, outcome.err
    assert f"fields not checked: carrier, a,b, c, typo; no such field in {old}: typo" in outcome.err
    assert outcome.result["fields_checked"] == 1


def test_a_trailing_comma_accepts_no_other_field(make_pair, switch, behind_alias):
    old, new = make_pair({**FLIGHT, "c": WORD}, [{"n": 1, "carrier": 1, "c": 1}], [{"n": 1}])
    for accepted in "c,", '""', ",":
        outcome = switch(old, new, "--accept-fields", accepted)
        assert outcome.code == 4, outcome.err
        assert "carrier 100.0 % -> 0.0 %" in outcome.last
    assert behind_alias() == [old]


def test_a_list_of_names_that_cannot_be_read_is_a_usage_error(switch):
    assert switch("t-a", "t-b", "--accept-fields", 'a,"b').code == 2


def test_the_command_repeats_what_was_given(make_pair, switch, run, monkeypatch):
    docs = [{"carrier": "x", "n": 1, "m": 1}] * 10
    old, new = make_pair({**FLIGHT, "m": WORD}, docs, [{"n": 1, "m": 1}] * 4 + [{"n": 1}] * 3)
    monkeypatch.setenv("DOCUMENT_COUNT_THRESHOLD", "40")
    outcome = switch(old, new, "--accept-fields", "m", "--field-threshold", "20.5", "--min-documents", "5")
    command = command_in(outcome.last)
    assert outcome.code == 4
    assert command[6:] == ["--threshold", "40", "--field-threshold", "20.5", "--min-documents", "5",
                           "--accept-fields", "m,carrier", "--wait-seconds", "5"]  # fmt: skip
    monkeypatch.delenv("DOCUMENT_COUNT_THRESHOLD")
    assert run(switch_alias, *command).code == 0


def test_growth_and_new_fields_are_logged_and_never_refused(make_pair, switch):
    old, new = make_pair(FLIGHT, [{"n": 1}] * 10, [{"n": 1, "carrier": "x", "extra": "y"}] * 10)
    outcome = switch(old, new)
    assert outcome.code == 0
    assert "doubled: carrier 0.0 % -> 100.0 %; new: extra, extra.keyword" in outcome.err


def test_a_field_that_the_target_has_never_heard_of(make_pair, switch):
    outcome = switch(*make_pair(FLIGHT, FLIGHTS, [{"n": n} for n in range(10)], {"n": {"type": "long"}}))
    assert outcome.code == 4
    assert "carrier 100.0 % -> 0.0 %" in outcome.last


def test_an_empty_source_is_not_audited(make_pair, switch, proxy):
    outcome = switch(*make_pair(FLIGHT, [], [{"n": 1}]))
    assert (outcome.code, outcome.result["fields_checked"]) == (0, 0)
    assert counted(proxy) == []


def test_a_threshold_of_100_compares_no_field(make_pair, switch, proxy):
    old, new = make_pair(FLIGHT, FLIGHTS, [{"m": 1}] * 10, {"carrier": {"type": "long"}})
    outcome = switch(old, new, "--field-threshold", "100")
    assert (outcome.code, outcome.result["fields_checked"]) == (0, 0)
    assert counted(proxy) == []


def test_indices_without_fields(make_pair, switch):
    outcome = switch(*make_pair({}, [{}] * 3))
    assert (outcome.code, outcome.result["fields_checked"]) == (0, 0)


def test_each_field_is_one_count_an_index_of_the_primary_copies(make_pair, switch, proxy):
    old, new = make_pair(FLIGHT, FLIGHTS)
    assert switch(old, new).code == 0
    sent = sorted((path, json.dumps(json.loads(body))) for _, path, body in proxy.requests if "POST" in _ and
                  "/_count" in path)  # fmt: skip
    bodies = [json.dumps({"query": {"exists": {"field": name}}}) for name in ("carrier", "n")]
    expected = [(f"/{index}/_count?preference=_primary", body) for index in (old, new) for body in bodies]
    assert sent == sorted(expected)


def test_a_copy_that_lost_a_field_with_its_source_is_found(make_pair, switch, run):
    source = {"_source": {"excludes": ["carrier"]}}
    old, new = make_pair(FLIGHT, FLIGHTS, [], **source)
    assert run(reindex, "--source", old, "--target", new).code == 0
    outcome = switch(old, new, "--threshold", "0", "--field-threshold", "0")
    assert outcome.code == 4, outcome.err
    assert outcome.result["fields_fallen"] == {"carrier": "100.0 % -> 0.0 %"}


# --- types ------------------------------------------------------------------------------------------------------------

NOT_INDEXED = {"index": False, "doc_values": False}
TYPES = {  # definition, value, and the names that can be counted
    "text": ({"type": "text", "fields": {"raw": WORD}}, "a b", ["text"]),
    "text_no_norms": ({"type": "text", "norms": False}, "a", ["text_no_norms"]),
    "text_unindexed": ({"type": "text", "index": False}, "a", []),
    "text_stored": ({"type": "text", "index": False, "store": True}, "a", []),
    "match_only": ({"type": "match_only_text"}, "a", ["match_only"]),
    "wildcard": ({"type": "wildcard"}, "abc", ["wildcard"]),
    "word": (WORD, "a", ["word"]),
    "word_unindexed": ({**WORD, "index": False}, "a", ["word_unindexed"]),
    "word_no_values": ({**WORD, "doc_values": False}, "a", ["word_no_values"]),
    "word_neither": ({**WORD, **NOT_INDEXED}, "a", []),
    "word_stored": ({**WORD, **NOT_INDEXED, "store": True}, "a", ["word_stored"]),
    "constant": ({"type": "constant_keyword", "value": "x"}, "x", []),
    **{kind: ({"type": kind}, 1, [kind]) for kind in
       ("long", "integer", "short", "byte", "double", "float", "half_float", "unsigned_long")},
    "long_neither": ({"type": "long", **NOT_INDEXED}, 1, []),
    "date": ({"type": "date"}, "2024-01-01", ["date"]),
    "date_nanos": ({"type": "date_nanos"}, "2024-01-01", ["date_nanos"]),
    "boolean": ({"type": "boolean"}, True, ["boolean"]),
    "ip": ({"type": "ip"}, "1.1.1.1", ["ip"]),
    "ip_range": ({"type": "ip_range"}, "1.1.1.0/24", ["ip_range"]),
    "integer_range": ({"type": "integer_range"}, {"gte": 1, "lte": 2}, ["integer_range"]),
    "date_range": ({"type": "date_range"}, {"gte": "2024", "lte": "2025"}, ["date_range"]),
    "geo_point": ({"type": "geo_point"}, "1,1", ["geo_point"]),
    "binary": ({"type": "binary"}, "U29t", []),
    "binary_values": ({"type": "binary", "doc_values": True}, "U29t", ["binary_values"]),
    "binary_stored": ({"type": "binary", "store": True}, "U29t", ["binary_stored"]),
    "completion": ({"type": "completion"}, "abc", ["completion"]),
    "flat": ({"type": "flat_object"}, {"p": "q", "r": {"s": 1}}, ["flat"]),
    "object": ({"properties": {"x": WORD, "deeper": {"properties": {"y": WORD}}}}, {"x": "1", "deeper": {"y": "1"}},
               ["object.x", "object.deeper.y"]),
    "disabled": ({"enabled": False, "properties": {"x": WORD}}, {"x": "1"}, []),
    "nested": ({"type": "nested", "properties": {
        "y": WORD, "again": {"type": "alias", "path": "nested.y"},
        "inner": {"type": "nested", "properties": {"z": {"type": "long"}, "flat": {"type": "flat_object"}}}}},
        [{"y": "1", "inner": [{"z": 1, "flat": {"a": 1}}]}],
        ["nested.y", "nested.again", "nested.inner.z", "nested.inner.flat"]),
    "alias": ({"type": "alias", "path": "word"}, ..., ["alias"]),
    "alias_of_none": ({"type": "alias", "path": "word_neither"}, ..., []),
    "copy": (WORD, ..., ["copy"]),
    "copied": ({**WORD, "copy_to": "copy"}, "a", ["copied"]),
    "null_value": ({**WORD, "null_value": "none"}, None, ["null_value"]),
    "too_long": ({**WORD, "ignore_above": 2}, "abcdef", []),
    "malformed": ({"type": "long", "ignore_malformed": True}, "x", []),
    "null": (WORD, None, []),
    "empty_list": (WORD, [], []),
    "empty": ({"type": "object"}, {}, []),
    **({"version": ({"type": "version"}, "1.2.3", ["version"])} if sandbox.MAJOR >= 3 else {}),
}  # fmt: skip
PROPERTIES = {name: definition for name, (definition, _, _) in TYPES.items()}
DOCUMENT = {name: value for name, (_, value, _) in TYPES.items() if value is not ...}


def test_an_unchanged_index_of_all_types_is_never_refused(make_pair, switch):
    old, new = make_pair(PROPERTIES, [DOCUMENT, {}, DOCUMENT, {"n": 1}])
    for source, target in (old, new), (new, old):
        outcome = switch(source, target, "--field-threshold", "0")
        assert outcome.code == 0, outcome.err
    assert outcome.result["fields_checked"] >= sum(len(names) for _, _, names in TYPES.values())


def test_whatever_type_it_has_a_field_that_is_gone_is_found(make_pair, switch):
    outcome = switch(*make_pair(PROPERTIES, [DOCUMENT] * 3, [{}] * 3))
    assert outcome.code == 4
    assert set(outcome.result["fields_fallen"]) == {name for _, _, names in TYPES.values() for name in names}


def test_what_the_server_cannot_count_is_not_compared(make_pair, switch, proxy):
    left_out = ["text_unindexed", "text_stored", "word_neither", "long_neither", "binary", "disabled", "alias_of_none"]
    properties = {name: PROPERTIES[name] for name in left_out}
    document = {name: value for name, value in DOCUMENT.items() if name in left_out}
    other = dict.fromkeys(left_out, WORD)
    outcome = switch(*make_pair(properties, [document], [{}], other))
    assert (outcome.code, outcome.result["fields_checked"]) == (0, 0), outcome.err
    assert counted(proxy) == []


def test_a_type_that_knows_no_exists_is_left_out(make_pair, switch, proxy):
    """As rank_features, which is in a module that the sandbox has not."""
    reason = {"type": "query_shard_exception", "reason": "[rank_features] fields do not support [exists] queries"}
    error = {"error": {"type": "search_phase_execution_exception", "root_cause": [reason]}, "status": 400}
    old, new = make_pair({"x": WORD}, [{"x": 1}], [{}])
    proxy.on("POST", f"/{old}/_count", answer(400, error))
    outcome = switch(old, new)
    assert "field x is not compared: [rank_features] fields do not support [exists] queries" in outcome.err
    assert (outcome.code, outcome.result["fields_checked"]) == (0, 0), outcome.err


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ({"type": "long"}, WORD, 4), (WORD, {"type": "text"}, 4), ({"type": "text"}, WORD, 4),
        ({"type": "date"}, {"type": "long"}, 4), ({"type": "long"}, {"type": "double"}, 0),
        ({"type": "unsigned_long"}, {"type": "byte"}, 0), (WORD, {**WORD, "ignore_above": 256}, 0),
        (WORD, {"type": "alias", "path": "same"}, 0), ({"type": "alias", "path": "same"}, WORD, 0),
        ({"type": "alias", "path": "n"}, WORD, 4),
    ],
)  # fmt: skip
def test_another_type_is_refused_even_where_no_document_has_the_field(old, new, code, make_pair, switch, run):
    others = {"n": {"type": "long"}, "same": WORD}
    source, target = make_pair({**others, "x": old}, [{"n": 1}], [{"n": 1}], {**others, "x": new})
    outcome = switch(source, target, "--dry-run")
    assert outcome.code == code, outcome.err
    if code:
        was = "long" if old["type"] == "alias" else old["type"]
        assert f"x {was} -> {new['type']}. " in outcome.last
        assert outcome.result["fields_fallen"] == {"x": f"{was} -> {new['type']}"}
        assert run(switch_alias, *command_in(outcome.last)).code == 0


def test_nested_objects_that_are_plain_ones_in_the_target(make_pair, switch, run):
    inner = {"properties": {"y": WORD}}
    old, new = make_pair({"l": {"type": "nested", **inner}}, [{"l": [{"y": 1}]}], None, {"l": inner})
    for source, target, change in (old, new, "l nested -> object"), (new, old, "l object -> nested"):
        outcome = switch(source, target)
        assert outcome.code == 4, outcome.err
        assert outcome.result["fields_fallen"] == dict([change.split(" ", 1)])
        assert run(switch_alias, *command_in(outcome.last)).code == 0


def test_an_object_whose_place_a_keyword_has_taken(make_pair, switch):
    outcome = switch(*make_pair({"o": {"properties": {"x": WORD}}}, [{"o": {"x": 1}}], [{"o": 1}], {"o": WORD}))
    assert outcome.code == 4
    assert outcome.result["fields_fallen"] == {"o": "object -> keyword", "o.x": "100.0 % -> 0.0 %"}


# --- a count of the audit that fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [answer(429, retry_after="0"), answer(503), answer(504), refused], ids=["429", "503", "504", "dropped"]
)
@pytest.mark.parametrize("nth", range(4))
def test_a_count_that_fails_for_a_while_is_tried_again(fault, nth, make_pair, switch, proxy):
    proxy.on("POST", "/_count", fault, skip=nth)
    outcome = switch(*make_pair(FLIGHT, FLIGHTS))
    assert (outcome.code, outcome.result["fields_checked"]) == (0, 2), outcome.err


FORBIDDEN = {"error": {"type": "security_exception",
                       "reason": "no permissions for [indices:data/read/search] and User [name=refresh]"}}  # fmt: skip
FAILING = {
    "shard failed": (edited(lambda found: found["_shards"].update(failed=1, successful=0)), "not all shards responded"),
    "shard missing": (edited(lambda found: found["_shards"].update(successful=0)), "not all shards responded"),
    "403": (answer(403, FORBIDDEN), "lacks indices:data/read/search"),
    "500": (answer(500, {"error": "odd"}), "500 odd"),
    "400": (answer(400, {"error": "odd"}), "400 odd"),
    "429 for good": (answer(429), "gave up after"),
    "503 for good": (answer(503), "gave up after"),
    "no answer": (delayed(3), "gave up after"),
    "not JSON": (answer(200, "<html>"), "the response is not from OpenSearch"),
}


@pytest.mark.parametrize("index", [0, 1], ids=["source", "target"])
@pytest.mark.parametrize("fault", FAILING)
def test_a_count_that_fails_is_a_failure_and_never_a_pass(
    fault, index, make_pair, switch, behind_alias, proxy, monkeypatch
):
    monkeypatch.setenv("RETRY_SECONDS", "1")
    monkeypatch.setattr(base, "READ_TIMEOUT_S", 0.5)
    both = make_pair(FLIGHT, FLIGHTS)
    proxy.on("POST", f"/{both[index]}/_count", FAILING[fault][0], skip=1, times=None)
    outcome = switch(*both)
    assert outcome.code == 1, outcome.err
    assert FAILING[fault][1] in outcome.last
    assert outcome.out == ""
    assert behind_alias() == [both[0]]


def test_at_most_eight_counts_are_in_flight(make_pair, switch, proxy):
    in_flight, most = [], []

    def slow(exchange):
        in_flight.append(exchange)
        most.append(len(in_flight))
        time.sleep(0.3)
        in_flight.remove(exchange)
        exchange.pass_on()

    proxy.on("POST", "/_count", slow, times=None)
    names = [f"f{number}" for number in range(30)]
    assert switch(*make_pair(dict.fromkeys(names, WORD), [dict.fromkeys(names, 1)])).code == 0
    assert 2 < max(most) <= 8


# --- a floor ----------------------------------------------------------------------------------------------------------


def test_fewer_documents_than_the_floor_are_refused(make_pair, switch, run, behind_alias, monkeypatch):
    old, new = make_pair(FLIGHT, FLIGHTS)
    assert switch(old, new, "--min-documents", "10", "--dry-run").code == 0
    monkeypatch.setenv("MIN_DOCUMENTS", "11")
    outcome = switch(old, new)
    assert outcome.code == 4, outcome.err
    assert f"{new} 10: fewer than MIN_DOCUMENTS (11)." in outcome.last
    assert "every nightly refresh will be refused" in outcome.last
    assert behind_alias() == [old]
    assert run(switch_alias, *command_in(outcome.last)).code == 0
    assert behind_alias() == [new]


def test_the_floor_and_the_threshold_are_accepted_by_one_command(make_pair, switch, run):
    outcome = switch(*make_pair(FLIGHT, FLIGHTS, FLIGHTS[:7]), "--min-documents", "9")
    assert outcome.code == 4
    assert "-30.00 % exceeds the threshold of 10 %, and fewer than MIN_DOCUMENTS (9)" in outcome.last
    assert run(switch_alias, *command_in(outcome.last)).code == 0


@pytest.mark.parametrize("text", ["-1", "1.5", "ten", "1_000", "٣", ""])
def test_a_floor_is_a_whole_number(text, run):
    outcome = run(switch_alias, "--alias", "t-x", "--source", "t-a", "--target", "t-b", f"--min-documents={text}")
    assert outcome.code == 2
    assert "--min-documents" in outcome.err


# --- readers' queries -------------------------------------------------------------------------------------------------

UA, SECRET = {"query": {"term": {"carrier": "UA"}}}, "swordfish"


def test_queries_that_find_something_in_both_let_the_switch_pass(make_pair, switch, queries, proxy):
    file = queries(UA, "", {**UA, "size": 0, "track_total_hits": False, "timeout": "1d"}, {"query": {"match_none": {}}})
    old, new = make_pair(FLIGHT, FLIGHTS)
    outcome = switch(old, new, "--queries", file)
    assert outcome.code == 0, outcome.err
    assert f"{file}, line 3: hits in {old}: 10, in {new}: 10" in outcome.err
    assert f"{file}, line 4: hits in {old}: 0, in {new}: 0" in outcome.err
    sent = [json.loads(body) for body in proxy.seen("POST", "/_search")]
    assert len(sent) == 6
    assert {(body["track_total_hits"], body["timeout"]) for body in sent} == {(True, "30s")}


def test_a_query_that_finds_nothing_in_the_target_is_refused(make_pair, switch, queries, run, behind_alias):
    other = [{"carrier": "ua", "n": n} for n in range(10)]
    old, new = make_pair(FLIGHT, FLIGHTS, other)
    file = queries({"query": {"match_all": {}}}, UA)
    for more in ["--dry-run"], []:
        outcome = switch(old, new, "--queries", file, *more)
        assert outcome.code == 4, outcome.err
        assert f"ERROR switch_alias: {file}, line 2: hits in {old}: 10, in {new}: 0. " in outcome.last
        assert "every nightly refresh will be refused" in outcome.last
        assert behind_alias() == [old]
    assert run(switch_alias, *command_in(outcome.last)).code == 0


def test_the_command_without_queries_says_so_where_a_variable_names_them(make_pair, switch, queries, run, monkeypatch):
    monkeypatch.setenv("READER_QUERIES", queries(UA))
    old, new = make_pair(FLIGHT, FLIGHTS, [{"carrier": "ua", "n": n} for n in range(10)])
    outcome = switch(old, new)
    assert outcome.code == 4
    assert command_in(outcome.last)[-4:-2] == ["--queries", ""]
    assert run(switch_alias, *command_in(outcome.last)).code == 0


def test_a_file_that_a_variable_names_is_beside_the_scripts(make_pair, switch, monkeypatch):
    monkeypatch.setenv("READER_QUERIES", "no/such file")
    outcome = switch(*make_pair(FLIGHT, FLIGHTS))
    assert outcome.code == 2
    assert f"cannot read {base.HERE}/no/such file (READER_QUERIES, --queries): FileNotFoundError; " in outcome.last
    assert outcome.last.endswith("give a readable UTF-8 file")


@pytest.mark.parametrize(
    "line", ["[]", '"x"', "1", "null", "{", "x", '{"query": {}', "[" * 100_000, "# comment", b"\xff"],
    ids=lambda line: str(line[:9]),
)  # fmt: skip
def test_a_line_that_is_no_json_object_is_a_configuration_error_and_nothing_is_sent(
    line, make_pair, switch, queries, proxy
):
    old, new = make_pair(FLIGHT, FLIGHTS)
    file = queries(UA, "", line)
    outcome = switch(old, new, "--queries", file)
    assert outcome.code == 2, outcome.err
    assert (f"cannot read {file} " if line == bytes([255]) else f"{file}, line 3: ") in outcome.last
    assert proxy.requests == []


def slow(found):
    found["timed_out"] = True


def broken(found):
    found["_shards"].update(failed=1, successful=0)


@pytest.mark.parametrize(
    ("index", "change", "times", "code", "says"),
    [
        (0, slow, 1, 0, "hits in"), (1, slow, 1, 0, "hits in"), (0, slow, 2, 1, "not within 30 s, tried twice"),
        (1, slow, 2, 4, "not within 30 s, tried twice"), (0, broken, 1, 1, "failed shards"),
        (1, broken, 1, 4, "failed shards"),
    ],
)  # fmt: skip
def test_a_time_out_is_tried_once_more_and_failed_shards_are_no_answer(
    index, change, times, code, says, make_pair, switch, queries, proxy, behind_alias
):
    both = make_pair(FLIGHT, FLIGHTS)
    file = queries(UA)
    proxy.on("POST", f"/{both[index]}/_search", edited(change), times=times)
    outcome = switch(*both, "--queries", file)
    assert outcome.code == code, outcome.err
    assert says in outcome.err
    assert f"{file}, line 1" in (outcome.err if code == 0 else outcome.last)
    assert behind_alias() == [both[code == 0]]


@pytest.mark.parametrize("index", [0, 1], ids=["source", "target"])
@pytest.mark.parametrize("fault", ["403", "429 for good", "503 for good", "no answer"])
def test_what_would_keep_any_request_fails_as_ever(
    fault, index, make_pair, switch, queries, proxy, behind_alias, monkeypatch
):
    monkeypatch.setenv("RETRY_SECONDS", "1")
    monkeypatch.setattr(base, "READ_TIMEOUT_S", 0.5)
    both = make_pair(FLIGHT, FLIGHTS)
    proxy.on("POST", f"/{both[index]}/_search", FAILING[fault][0], times=None)
    outcome = switch(*both, "--queries", queries(UA))
    assert outcome.code == 1, outcome.err
    assert FAILING[fault][1] in outcome.last
    assert behind_alias() == [both[0]]


def test_what_stands_in_a_query_is_not_logged_and_control_characters_do_no_harm(
    make_pair, switch, queries, monkeypatch, tmp_path
):
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    old, new = make_pair(FLIGHT, FLIGHTS, [{"carrier": "x\x1b[2Ky", "n": n} for n in range(10)])
    file = tmp_path / "a\x1b[2Kb"
    file.write_text(json.dumps({"query": {"bool": {"should": [UA["query"], {"term": {"carrier": SECRET}}]}}}))
    outcome = switch(old, new, "--queries", str(file))
    assert outcome.code == 4, outcome.err
    assert SECRET not in outcome.err + outcome.out
    assert "\x1b" not in outcome.err + outcome.out
    assert "a\\x1b[2Kb, line 1" in outcome.last
    broken = queries('{"query": "' + SECRET)
    assert SECRET not in switch(old, new, "--queries", broken).err


def test_show_tries_a_file_on_the_live_index_when_it_is_asked_to(make_pair, queries, run, monkeypatch, alias):
    old, new = make_pair(FLIGHT, FLIGHTS)
    show = ["--alias", alias, "--show"]
    both = ["--source", old, "--target", new]
    good, bad = queries(UA), [UA, {"query": {"no_such": {}}}]
    outcome = run(switch_alias, *show, *both, "--queries", good)
    assert (outcome.code, outcome.out) == (0, f"{old}\n")
    file = queries(*bad)
    outcome = run(switch_alias, *show, *both, "--queries", file)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{file}, line 2: both indices answer 400 parsing_exception" in outcome.last
    monkeypatch.setenv("READER_QUERIES", file)
    assert run(switch_alias, *show).code == 0


# --- the way back -----------------------------------------------------------------------------------------------------


def test_an_undo_is_never_refused_for_what_the_data_are(make_pair, switch, run, behind_alias, monkeypatch, alias):
    old, new = make_pair(FLIGHT, FLIGHTS, [{"carrier": "UA", "extra": 1, "n": n} for n in range(9)])
    outcome = switch(old, new)
    assert outcome.code == 0, outcome.err
    undo = command_in(outcome.err, "undo: ")
    assert undo[-1] == "--undo"
    monkeypatch.setenv("MIN_DOCUMENTS", "1000")
    monkeypatch.setenv("FIELD_THRESHOLD", "0")
    monkeypatch.setenv("READER_QUERIES", "no such file")
    back = run(switch_alias, *undo)
    assert back.code == 0, back.err
    assert behind_alias() == [old]
    assert command_in(back.err, "undo: ") == ["--alias", alias, "--source", old, "--target", new,
                                           "--wait-seconds", "5", "--undo"]  # fmt: skip


def test_each_switch_says_how_to_hold_the_next_refresh_off(make_pair, switch, environment, tmp_path, alias):
    outcome = switch(*make_pair(FLIGHT, FLIGHTS))
    [command] = re.findall(r"to prevent that, run (.*)", outcome.err)
    subprocess.run(["bash", "-c", command], check=True)
    assert (tmp_path / "locks" / f"HOLD-{alias}").read_text().startswith("why, since when")


def test_an_undo_does_not_ask_the_index_that_it_leaves(make_pair, switch, run, behind_alias, proxy):
    old, new = make_pair(FLIGHT, FLIGHTS)
    undo = command_in(switch(old, new).err, "undo: ")
    proxy.on("(GET|POST)", f"/{new}/_(count|refresh|search|mapping)", answer(500), times=None)
    assert run(switch_alias, *undo).code == 0
    assert behind_alias() == [old]


def test_an_undo_to_an_empty_or_unfinished_index_is_refused(make_pair, switch, behind_alias, admin):
    old, new = make_pair(FLIGHT, FLIGHTS, [])
    outcome = switch(old, new, "--undo")
    assert outcome.code == 4, outcome.err
    assert f"{old} holds 10 documents, {new} 0: readers are never moved to an empty index" in outcome.last
    admin("POST", f"/{new}/_doc?refresh=true", {"n": 1})
    marker = {"started": "now", "host": "elsewhere", "found": {}, "set": {}}
    admin("PUT", f"/{new}/_mapping", {"_meta": {base.SUITE: marker}})
    outcome = switch(old, new, "--undo")
    assert outcome.code == 4
    assert "unfinished" in outcome.last
    admin("PUT", f"/{new}/_mapping", {"_meta": {}})
    assert switch(old, new, "--undo", "--dry-run").code == 0
    assert behind_alias() == [old]
    assert switch(old, new, "--undo").code == 0


def test_an_undo_does_not_wait_for_the_task_of_another_client(make_pair, foreign_copy, switch, behind_alias):
    old, new = make_pair(FLIGHT, FLIGHTS)
    foreign_copy(new)
    assert switch(old, new).code == 4
    assert switch(old, new, "--undo").code == 0
    assert behind_alias() == [new]


def test_an_undo_waits_for_shard_copies_and_stops_at_a_third_index(make_pair, make_index, switch, proxy, behind_alias):
    def no_copies(health):
        health["indices"][new]["shards"]["0"]["active_shards"] = 0

    old, new = make_pair(FLIGHT, FLIGHTS)
    proxy.on("GET", "/_cluster/health", edited(no_copies), times=None)
    outcome = switch(old, new, "--undo", "--wait-seconds", "1")
    assert outcome.code == 4, outcome.err
    assert "fewer than 1 active copies" in outcome.last
    third = make_index("third", FLIGHT, docs=1)
    outcome = switch(third, new, "--undo")
    assert outcome.code == 4
    assert command_in(outcome.last)[-1] == "--undo"
    assert behind_alias() == [old]


# --- whole refreshes --------------------------------------------------------------------------------------------------


def csv_of(numbers, carrier="carrier", word="UA"):
    return {"a.csv": f"n,{carrier}\n" + "".join(f"{n},{word}\n" for n in numbers)}


def test_a_held_refresh_does_nothing_and_goes_on_as_usual_when_the_file_is_gone(
    make_pair, refresh, put_csv, behind_alias, admin, proxy, tmp_path, alias
):
    old, new = make_pair(FLIGHT, FLIGHTS, [])
    prefix = put_csv(csv_of(range(10)))
    hold = tmp_path / "locks" / f"HOLD-{alias}"
    hold.parent.mkdir()
    hold.write_bytes("mapping \x1b[2K\x9b is wrong, Ödön\nsecond line\n".encode())
    for arguments in [], ["--dry-run"]:
        code, _, err = finish(refresh(prefix, *arguments))
        log = log_of(tmp_path)
        assert code == 4, err
        for text in err, log:
            assert f"held: mapping ?[2K? is wrong, Ödön; to continue, delete {hold}, or run" in text
            assert "second line" not in text
    assert proxy.requests == []
    assert (behind_alias(), count(admin, new)) == ([old], 0)
    hold.unlink()
    code, _, err = finish(refresh(prefix))
    assert code == 0, err
    assert count(admin, new) == 10


@pytest.mark.parametrize("kind", ["empty", "folder", "dangling link", "pipe", "binary"])
def test_whatever_the_file_is_it_holds(kind, refresh, tmp_path, proxy, alias):
    hold = tmp_path / "locks" / f"HOLD-{alias}"
    hold.parent.mkdir()
    {
        "empty": hold.touch, "folder": hold.mkdir, "dangling link": lambda: hold.symlink_to("nowhere"),
        "pipe": lambda: os.mkfifo(hold), "binary": lambda: hold.write_bytes(bytes(range(11, 256)) * 100),
    }[kind]()  # fmt: skip
    code, _, err = finish(refresh("none/"))
    assert code == 4, err
    assert "held: " in err
    assert not set(err) & set(map(chr, range(10))) - {"\n"}
    assert proxy.requests == []


def test_the_copy_is_proved_field_by_field(make_pair, refresh, put_csv, behind_alias):
    old, _ = make_pair(FLIGHT, FLIGHTS, [], _source={"excludes": ["carrier"]})
    code, _, err = finish(refresh(put_csv(csv_of(range(10)))))
    assert code == 4, err
    assert "carrier 100.0 % -> 0.0 %" in err
    assert "FAILED at: 2 switch readers" in err
    assert behind_alias() == [old]


def test_what_readers_have_today_is_no_reason_to_refuse_the_copy(
    make_pair, refresh, put_csv, behind_alias, queries, tmp_path
):
    """Step 2 moves readers to what they have already: the floor does not count, nor a query without hits."""
    old, _ = make_pair(FLIGHT, FLIGHTS, [])
    limits = {"MIN_DOCUMENTS": "11", "READER_QUERIES": queries({"query": {"term": {"n": 10}}})}
    code, _, err = finish(refresh(put_csv(csv_of(range(11))), **limits))
    log = log_of(tmp_path)
    assert code == 0, err + log
    assert "--threshold 0 --field-threshold 0 --min-documents 0\n" in log
    assert log.count("line 1: hits in") == 2
    assert behind_alias() == [old]


def test_a_column_of_another_name_stops_each_night_until_it_is_accepted(
    make_pair, refresh, put_csv, behind_alias, admin, run
):
    old, new = make_pair(FLIGHT, FLIGHTS, [])
    prefix = put_csv(csv_of(range(10), carrier="carrier_code"))
    for _ in range(2):
        code, _, err = finish(refresh(prefix))
        assert code == 4, err
        assert "carrier 100.0 % -> 0.0 %" in err
        assert behind_alias() == [new]
        assert {row["carrier"] for row in sources(admin, new)} == {"UA"}
    assert run(switch_alias, *command_in(err)).code == 0
    assert behind_alias() == [old]
    code, _, err = finish(refresh(prefix))
    assert code == 0, err


def test_the_file_of_queries_is_tried_before_anything_is_touched(make_pair, refresh, put_csv, admin, queries):
    both = make_pair(FLIGHT, FLIGHTS, [])
    before = state_of(admin, *both)
    prefix = put_csv(csv_of(range(10)))
    wrong = ("x", "line 1: not a JSON object"), ({"query": {"no_such": {}}}, "line 1: both indices answer 400")
    for line, says in wrong:
        code, _, err = finish(refresh(prefix, READER_QUERIES=queries(line)))
        assert code == 2, err
        assert says in err
        assert "FAILED at: check where readers are" in err
    assert state_of(admin, *both) == before
    code, _, err = finish(refresh(prefix, "--dry-run", READER_QUERIES=queries(UA)))
    assert code == 0, err


@pytest.mark.parametrize("strategy", ["copy-back", "alternate"])
def test_a_mapping_is_changed_without_a_reader_noticing(
    strategy, box, make_pair, refresh, put_csv, behind_alias, admin, run, environment, alias
):
    """The recipe of the README, and the next two nights; readers go back and forth on the way."""
    old, new = make_pair(FLIGHT, FLIGHTS, [])
    prefix = put_csv(csv_of(range(10)))
    mapping = {"mappings": {"properties": {**FLIGHT, "carrier": {"type": "text"}}}}
    reader = Reader(box.server.endpoint, alias, "n")
    reader.start()

    def create(index):
        admin("DELETE", f"/{index}")
        admin("PUT", f"/{index}", mapping)

    create(new)
    code, _, err = finish(refresh(prefix, REFRESH_STRATEGY="alternate"))
    assert code == 4, err
    assert "carrier keyword -> text" in err
    assert "ACCEPT_FIELDS=carrier" in err
    assert behind_alias() == [old]
    assert run(bulkupdate, *load_arguments(prefix, new)).code == 0
    accept = undo = ["--alias", alias, "--source", old, "--target", new, "--accept-fields", "carrier"]
    for command, index in ("accept", new), ("undo", old), ("accept", new):
        outcome = run(switch_alias, *(accept if command == "accept" else undo))
        assert outcome.code == 0, outcome.err
        assert behind_alias() == [index]
        undo = command_in(outcome.err, "undo: ")
    if strategy == "copy-back":  # the other index still has the old mapping: readers must not go back to it
        code, _, err = finish(refresh(prefix))
        assert code == 4, err
        assert "carrier text -> keyword" in err
    create(old)
    assert run(reindex, "--source", new, "--target", old).code == 0
    for index, command in (old, undo), (new, None):
        outcome = run(switch_alias, *(command or command_in(outcome.err, "undo: ")))
        assert (outcome.code, behind_alias()) == (0, [index]), outcome.err
    for _ in range(2):
        code, _, err = finish(refresh(prefix, REFRESH_STRATEGY=strategy))
        assert code == 0, err
    time.sleep(0.2)
    assert (reader.finish(), reader.errors) == ([(10, 45.0)], [])
    assert behind_alias() == ([old] if strategy == "copy-back" else [new])
    for index in (old, new):
        assert admin("GET", f"/{index}/_mapping")[index]["mappings"]["properties"]["carrier"] == {"type": "text"}
