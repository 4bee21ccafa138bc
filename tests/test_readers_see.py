"""What readers of the alias get is what was checked: filters, routing, settings, pipelines, hidden documents."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time

import bulkupdate
import opensearch_base_manager as base
import pytest
import sandbox
import switch_alias
from conftest import NUMBER, fill, secured, sources, state_of
from fault_proxy import answer, delayed, edited

WORD = {"type": "keyword"}


@pytest.fixture
def pipeline(admin, name):
    """Create an ingest pipeline of these processors and return its name."""
    made = []

    def make(*processors):
        made.append(name("pipeline"))
        admin("PUT", f"/_ingest/pipeline/{made[-1]}", {"processors": list(processors)})
        return made[-1]

    yield make
    for own in made:  # an index that names it is deleted later
        admin("DELETE", f"/_ingest/pipeline/{own}")


def refused_with(outcome, *texts):
    assert outcome.code == 4, outcome.err
    for text in texts:
        assert text in outcome.last


# --- the alias's filter and routing -----------------------------------------------------------------------------------


def test_the_count_is_that_under_the_filter_of_the_alias(make_pair, switch, behind_alias):
    active, inactive = ([{"n": n, "active": value} for n in range(10)] for value in ("true", "false"))
    alias = {"filter": {"term": {"active": "true"}}}
    old, new = make_pair({**NUMBER, "active": {"type": "boolean"}}, active, inactive, definition=alias)
    refused_with(switch(old, new), f"{old} holds 10 documents, {new} 0")
    assert behind_alias() == [old]


def test_a_query_is_asked_under_the_filter_of_the_alias(make_pair, switch, behind_alias, queries):
    docs = [{"n": n % 2, "kind": n % 2} for n in range(20)]
    swapped = [{"n": n % 2, "kind": 1 - n % 2} for n in range(20)]
    alias = {"filter": {"term": {"kind": 1}}}
    old, new = make_pair({**NUMBER, "kind": {"type": "long"}}, docs, swapped, definition=alias)
    refused_with(switch(old, new, "--queries", queries({"query": {"term": {"n": 1}}})), "10", "0")
    assert behind_alias() == [old]


def test_fields_are_counted_without_the_filter(make_pair, switch):
    docs = [{"n": n, "active": n < 5, **({"x": "y"} if n > 5 else {})} for n in range(10)]
    alias = {"filter": {"term": {"active": True}}}
    fewer = [{name: value for name, value in doc.items() if name != "x"} for doc in docs]
    old, new = make_pair({**NUMBER, "x": WORD, "active": {"type": "boolean"}}, docs, fewer, definition=alias)
    refused_with(switch(old, new), "x 40.0 % -> 0.0 %")


def test_search_routing_over_several_shards_is_refused(make_pair, switch, behind_alias):
    shards = {"index.number_of_shards": 3}
    old, new = make_pair(NUMBER, 99, definition={"routing": "x"}, settings=shards)
    refused_with(switch(old, new), "routing", "3")
    assert behind_alias() == [old]


def test_search_routing_over_one_shard_is_harmless(make_pair, switch, behind_alias):
    old, new = make_pair(NUMBER, 9, definition={"routing": "x"})
    assert switch(old, new).code == 0
    assert behind_alias() == [new]


def test_a_filter_with_a_window_of_time_is_no_difference_between_equal_indices(make_pair, switch, behind_alias):
    began = time.time()
    docs = [{"at": int((began - 10 + n / 50) * 1000)} for n in range(1000)]  # one leaves the window every 20 ms
    recent = {"filter": {"range": {"at": {"gte": "now-10s"}}}}
    old, new = make_pair({"at": {"type": "date"}}, docs, definition=recent)
    outcome = switch(old, new, "--threshold", "0")
    assert (outcome.code, behind_alias()) == (0, [new]), outcome.err


def test_a_count_through_the_alias_that_differs_after_the_switch_is_a_failure(
    make_pair, switch, behind_alias, proxy, name
):
    old, new = make_pair(NUMBER, 9)
    proxy.on("GET", f"/{name('alias')}/_count", edited(lambda found: found.update(count=7)))
    outcome = switch(old, new)
    assert outcome.code == 1
    arguments = ["--alias", name("alias"), "--source", new, "--target", old]
    assert f"undo: {base.script_command('switch_alias.py', *arguments)}" in outcome.err
    assert "7" in outcome.last
    assert behind_alias() == [new]


@pytest.mark.parametrize("status", [404, 500])
def test_what_was_done_and_its_undo_are_said_before_anything_that_may_fail(
    status, make_pair, switch, behind_alias, proxy, name
):
    old, new = make_pair(NUMBER, 9)
    proxy.on("GET", f"/{name('alias')}/_count", answer(status))
    outcome = switch(old, new)
    assert outcome.code == 1
    assert f"alias {name('alias')}: {old} -> {new}" in outcome.err
    assert "undo: " in outcome.err
    assert (outcome.result["changed"], outcome.result["target"]) == (True, new)
    assert behind_alias() == [new]


# --- settings that readers feel ---------------------------------------------------------------------------------------


def stop_words(*words):
    analyzer = {"type": "custom", "tokenizer": "standard", "filter": ["own"]}
    return {"analysis": {"analyzer": {"own": analyzer}, "filter": {"own": {"type": "stop", "stopwords": list(words)}}}}


def joined_by(separator):
    return {
        "analysis.analyzer.joined": {"tokenizer": "standard", "filter": ["pairs"]},
        "analysis.filter.pairs": {"type": "shingle", "token_separator": separator},
    }


TEXT = {"text": {"type": "text", "analyzer": "own"}, "word": WORD, **NUMBER}
FOX = [{"text": "the quick fox", "word": "w", "n": 1}] * 10
WORSE = {  # what readers had, what they would get, what is named
    "max_result_window": ({"max_result_window": 20_000}, {}, "index.max_result_window"),
    "max_result_window by default": ({}, {"max_result_window": 5_000}, "index.max_result_window"),
    "stop words": (stop_words("a"), stop_words("fox"), "index.analysis"),
    "max_terms_count": ({}, {"max_terms_count": 10}, "index.max_terms_count"),
    "default_field": ({"query.default_field": "text"}, {"query.default_field": "word"}, "index.query.default_field"),
    "lenient": ({"query_string.lenient": True}, {}, "index.query_string.lenient"),
    "parse": ({}, {"query.parse.allow_unmapped_fields": False}, "index.query.parse.allow_unmapped_fields"),
    "similarity": ({"similarity.default.type": "boolean"}, {}, "index.similarity"),
    "a space": (joined_by(" "), joined_by(""), "index.analysis.analyzer.joined"),
    "quoted phrases": ({}, {"analysis.analyzer.default_search_quoted.type": "keyword"}, "default_search_quoted"),
}  # fmt: skip


@pytest.mark.parametrize(("had", "has", "named"), WORSE.values(), ids=WORSE)
def test_a_setting_that_takes_something_away_from_readers_is_refused(had, has, named, make_pair, switch, behind_alias):
    both = stop_words("a")
    old, new = make_pair(TEXT, FOX, settings={**both, **had}, others={**both, **has})
    outcome = switch(old, new)
    refused_with(outcome, named)
    assert behind_alias() == [old]
    accepted = switch(old, new, "--accept-settings", re.search(r"--accept-settings (\S+)", outcome.last)[1])
    assert (accepted.code, behind_alias()) == (0, [new])


BETTER = {
    "a higher window": ({}, {"max_result_window": 20_000}),
    "explicit defaults": ({"max_result_window": 10_000, "query.default_field": ["*"]}, {"query_string.lenient": False}),
    "one analyzer more": ({}, {"analysis.analyzer.other.type": "standard"}),
    "shards and refresh": ({}, {"number_of_shards": 2, "refresh_interval": "30s"}),
    "sort": ({}, {"sort.field": "n"}),
    "codec": ({}, {"codec": "best_compression"}),
    "a text for a list": ({"query.default_field": ["word", "n"]}, {"query.default_field": "word,n"}),
    "BM25 as it is": ({}, {"similarity.default": {"type": "BM25", "k1": 1.2, "b": 0.75}}),
    "no filters": ({"analysis.analyzer.own": {"tokenizer": "standard", "filter": []}},
                   {"analysis.analyzer.own": {"tokenizer": "standard"}}),
    "stop words of any case": ({"analysis.filter.own": {"type": "stop", "ignore_case": False}},
                               {"analysis.filter.own": {"type": "stop"}}),
}


@pytest.mark.parametrize(("had", "has"), BETTER.values(), ids=BETTER)
def test_settings_that_answer_alike_or_better_are_no_obstacle(had, has, make_pair, switch, behind_alias):
    words = {"word": WORD, **NUMBER}
    old, new = make_pair(words, [{"word": "w", "n": 1}], settings=had, others=has)
    outcome = switch(old, new)
    assert (outcome.code, behind_alias()) == (0, [new]), outcome.err


def test_a_variable_accepts_settings_too(make_pair, switch, monkeypatch):
    old, new = make_pair(NUMBER, 3, settings={"max_result_window": 20_000}, others={})
    monkeypatch.setenv("ACCEPT_SETTINGS", "index.max_result_window")
    outcome = switch(old, new)
    assert outcome.code == 0, outcome.err
    assert "max_result_window" in outcome.err


# --- fields that readers use ------------------------------------------------------------------------------------------

OTHERWISE = {
    "no doc values": ({"type": "long"}, {"type": "long", "doc_values": False}),
    "only stored": ({"type": "keyword"}, {"type": "keyword", "index": False, "doc_values": False}),
    "another analyzer": ({"type": "text"}, {"type": "text", "analyzer": "whitespace"}),
    "another normalizer": ({"type": "keyword", "normalizer": "lowercase"}, {"type": "keyword"}),
    "shorter words": ({"type": "keyword"}, {"type": "keyword", "ignore_above": 1}),
    "another format": ({"type": "date"}, {"type": "date", "format": "yyyy"}),
    "no multi-field": ({"type": "text", "fields": {"raw": WORD}}, {"type": "text"}),
}
ALIKE = {
    "explicit defaults": ({"type": "long"}, {"type": "long", "coerce": True, "index": True, "doc_values": True}),
    "the standard analyzer": ({"type": "text"}, {"type": "text", "analyzer": "standard", "norms": True}),
    "another number": ({"type": "long"}, {"type": "double"}),
    "a remark": ({"type": "keyword"}, {"type": "keyword", "meta": {"unit": "ms"}}),
    "global ordinals": ({"type": "keyword"}, {"type": "keyword", "eager_global_ordinals": True}),
    "a multi-field more": ({"type": "text"}, {"type": "text", "fields": {"raw": WORD}}),
}
OTHERWISE["another target of an alias"] = ({"type": "alias", "path": "n"}, {"type": "alias", "path": "m"})
OTHERWISE["another null value"] = ({"type": "keyword", "null_value": "default"},
                                   {"type": "keyword", "null_value": "standard"})  # fmt: skip
VALUES = {"date": "2013", "text": "some words", "keyword": "ab", "long": 7}


@pytest.mark.parametrize(("had", "has"), OTHERWISE.values(), ids=OTHERWISE)
def test_a_field_that_is_defined_otherwise_is_refused(had, has, make_pair, switch, behind_alias):
    docs = [{**({"x": VALUES[had["type"]]} if had["type"] in VALUES else {}), "n": 1, "m": 2}] * 3
    fields = {**NUMBER, "m": NUMBER["n"]}
    old, new = make_pair({"x": had, **fields}, docs, other_properties={"x": has, **fields})
    refused_with(switch(old, new), "x")
    assert behind_alias() == [old]
    assert switch(old, new, "--accept-fields", "x").code == 0


@pytest.mark.parametrize(("had", "has"), ALIKE.values(), ids=ALIKE)
def test_a_field_that_answers_alike_is_no_obstacle(had, has, make_pair, switch, behind_alias):
    docs = [{"x": VALUES[had["type"]], "n": 1}] * 3
    old, new = make_pair({"x": had, **NUMBER}, docs, other_properties={"x": has, **NUMBER})
    outcome = switch(old, new)
    assert (outcome.code, behind_alias()) == (0, [new]), outcome.err


@pytest.mark.parametrize("kind", ["analyzer", "similarity"])
def test_an_explicit_default_is_another_one_where_the_index_has_a_default_of_its_own(kind, make_pair, switch):
    own = {"analyzer": {"analysis.analyzer.default.type": "keyword"},
           "similarity": {"similarity.default.type": "boolean"}}  # fmt: skip
    explicit = {"type": "text", kind: {"analyzer": "standard", "similarity": "BM25"}[kind]}
    old, new = make_pair({"x": explicit, **NUMBER}, [{"x": "the fox", "n": 1}] * 3, settings=own[kind],
                         other_properties={"x": {"type": "text"}, **NUMBER})  # fmt: skip
    refused_with(switch(old, new), "x")


def test_a_field_without_documents_may_be_missing(make_pair, switch):
    docs = [{"n": 1}] * 3
    assert switch(*make_pair({"x": WORD, **NUMBER}, docs, other_properties=NUMBER)).code == 0


def test_a_derived_field_that_has_gone_is_refused(make_index, name, switch, behind_alias):
    derived = {"derived": {"d": {"type": "keyword", "script": {"source": "emit(doc['word'].value)"}}}}
    words = {"word": WORD, **NUMBER}
    try:
        old = make_index("old", words, docs=[{"word": "w", "n": 1}], alias=name("alias"), **derived)
    except RuntimeError as error:
        pytest.skip(f"this server has no scripts: {error}")
    new = make_index("new", words, docs=[{"word": "w", "n": 1}])
    refused_with(switch(old, new), "derived")
    assert behind_alias() == [old]


def test_a_column_that_has_gone_is_reported_once_with_its_multi_fields(make_pair, switch):
    dynamic = {"carrier": {"type": "text", "fields": {"keyword": WORD}}, **NUMBER}
    old, new = make_pair(dynamic, [{"carrier": "UA", "n": 1}] * 3, [{"n": 1}] * 3)
    outcome = switch(old, new)
    refused_with(outcome, "carrier 100.0 % -> 0.0 %")
    assert "carrier.keyword" not in outcome.last
    assert switch(old, new, "--accept-fields", "carrier").code == 0


def test_source_that_is_not_kept_is_refused(make_index, name, switch, behind_alias):
    old = make_index("old", NUMBER, docs=3, alias=name("alias"))
    new = make_index("new", NUMBER, docs=3, _source={"excludes": ["n"]})
    refused_with(switch(old, new), "_source")
    assert behind_alias() == [old]


SECRET = "secret-of-a-reader"
FAILURE = {"error": {"type": "some_exception", "reason": f"[term] query does not support [{SECRET}]"}}

# --- readers' queries -------------------------------------------------------------------------------------------------


def test_a_query_that_both_refuse_is_a_usage_error_without_its_values(make_pair, switch, queries, behind_alias):
    old, new = make_pair({"day": {"type": "date"}, **NUMBER}, [{"day": "2013-01-01", "n": 1}])
    outcome = switch(old, new, "--queries", queries({"query": {"range": {"day": {"gte": "secret-of-a-reader"}}}}))
    assert outcome.code == 2, outcome.err
    assert "line 1: both indices answer 400 " in outcome.last
    assert "; change that line" in outcome.last
    assert "secret-of-a-reader" not in outcome.err
    assert behind_alias() == [old]


def test_a_query_that_only_the_target_refuses_is_refused_without_its_values(make_pair, switch, queries, behind_alias):
    old, new = make_pair({"x": {"type": "keyword"}, **NUMBER}, [{"x": "2013", "n": 1}] * 3,
                    other_properties={"x": {"type": "date", "format": "yyyy"}, **NUMBER})  # fmt: skip
    query = queries({"query": {"term": {"x": "secret-of-a-reader"}}})
    outcome = switch(old, new, "--queries", query, "--accept-fields", "x")
    assert outcome.code == 4, outcome.err
    assert re.search(rf"line 1: hits in {old}: 0, in {new}: 400 \w+_exception", outcome.last)
    assert "secret-of-a-reader" not in outcome.err
    assert behind_alias() == [old]


@pytest.mark.parametrize("response", [(429, FAILURE), (500, FAILURE), (503, FAILURE), (403, FAILURE), (200, SECRET)])
def test_a_query_that_fails_is_never_logged_with_its_values(response, make_pair, switch, queries, proxy, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("RETRY_SECONDS", "1")
    old, new = make_pair(NUMBER, 3)
    proxy.on("POST", "/_search", answer(*response), times=None)
    outcome = switch(old, new, "--queries", queries({"query": {"term": {"n": SECRET}}}))
    assert outcome.code == 1, outcome.err
    assert FAILURE["error"]["type"] in outcome.last or "not JSON" in outcome.last
    assert SECRET not in outcome.err


def test_a_query_that_only_the_source_refuses_is_no_obstacle(make_pair, switch, queries):
    lower = {"max_result_window": 5_000}
    old, new = make_pair(NUMBER, 3, settings=lower, others={})
    outcome = switch(old, new, "--queries", queries({"from": 8_000, "size": 10}))
    assert outcome.code == 0, outcome.err


def test_a_signal_during_the_audit_does_not_wait_for_counts_that_hang(make_pair, proxy, name, environment):
    old, new = make_pair(NUMBER, 3)
    hanging = proxy.on("POST", "/_count", delayed(60), times=None)
    command = [sys.executable, switch_alias.__file__, "--alias", name("alias"), "--source", old, "--target", new]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not hanging.seen:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        assert process.wait(40) == 143
    assert time.monotonic() - sent < 20


# --- a copy is a copy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor", [{"append": {"field": "tags", "value": "x"}},
                                       {"rename": {"field": "from", "target_field": "to"}}])  # fmt: skip
def test_the_copy_leaves_the_default_pipeline_out(processor, make_index, pipeline, copy, admin):
    properties = dict.fromkeys(("tags", "from", "to"), WORD)
    own = {"index.default_pipeline": pipeline(processor)}
    old, new = make_index("old", properties, settings=own), make_index("new", properties, settings=own)
    fill(admin, old, [{"from": str(n)} for n in range(5)])
    outcome = copy(old, new)
    assert outcome.code == 0, outcome.err
    assert sources(admin, new) == sources(admin, old)


def test_a_final_pipeline_that_changes_documents_fails_the_copy_and_names_the_field_alone(make_index, pipeline, copy):
    own = pipeline({"append": {"field": "tags", "value": "hidden-value"}})
    old = make_index("old", {"tags": WORD, **NUMBER}, docs=20)
    new = make_index("new", {"tags": WORD, **NUMBER}, settings={"index.final_pipeline": own})
    outcome = copy(old, new)
    assert outcome.code == 1, outcome.err
    assert "tags" in outcome.last
    assert own in outcome.err
    assert "WARNING" in outcome.err
    assert "hidden-value" not in outcome.err


def test_a_final_pipeline_that_changes_nothing_is_a_warning(make_index, pipeline, copy):
    own = pipeline({"remove": {"field": "nowhere", "ignore_missing": True}})
    outcome = copy(make_index("old", NUMBER, docs=20), make_index("new", NUMBER, settings={"final_pipeline": own}))
    assert outcome.code == 0, outcome.err
    assert own in outcome.err


def test_a_copy_of_several_shards_and_nested_documents_is_whole(make_index, copy):
    properties = {"l": {"type": "nested", "properties": {"y": {"type": "long"}}}, **NUMBER}
    old = make_index("old", properties, docs=[{"n": n, "l": [{"y": n}] * 3} for n in range(60)],
                     settings={"number_of_shards": 3})  # fmt: skip
    outcome = copy(old, make_index("new", properties))
    assert (outcome.code, outcome.result["total"]) == (0, 60), outcome.err


# --- batches of a copy ------------------------------------------------------------------------------------------------


def test_equal_ids_of_several_routings_are_compared_in_each_shard(make_index, copy, admin):
    five = {"number_of_shards": 5}
    old, new = make_index("old", NUMBER, settings=five), make_index("new", NUMBER, settings=five)
    lines = [{"index": {"_id": str(n % 60), "routing": f"r{n % 40}"}} if even else {"n": n}
             for n in range(240) for even in (True, False)]  # fmt: skip
    admin("POST", f"/{old}/_bulk?refresh=true", data="".join(json.dumps(line) + "\n" for line in lines),
          headers={"Content-Type": "application/x-ndjson"})  # fmt: skip
    outcome = copy(old, new)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("window", [30, 100])
def test_a_window_below_the_batch_size_is_kept_to(window, make_index, copy):
    small = {"max_result_window": window}
    old, new = make_index("old", NUMBER, docs=250, settings=small), make_index("new", NUMBER, docs=250, settings=small)
    outcome = copy(old, new)
    assert (outcome.code, outcome.result["total"]) == (0, 250), outcome.err


def test_a_load_into_a_small_window_finds_its_documents(make_index, put_csv, load, proxy):
    index = make_index("index", NUMBER, settings={"max_result_window": 100})
    rows = "".join(f"{n}\n" for n in range(250))
    proxy.on("POST", "/_bulk", lambda exchange: (exchange.forward(), exchange.pass_on()))  # carried out twice
    outcome = load(put_csv({"a.csv": f"n\n{rows}"}), index)
    assert outcome.result["documents"] == 250


def test_a_copy_that_is_refused_for_memory_goes_on_with_half_the_batches(make_index, copy, proxy):
    old, new = make_index("old", NUMBER, docs=20), make_index("new", NUMBER, docs=3)

    def too_much_at_once(found):
        if found["completed"] and found["task"]["action"].endswith("reindex"):
            found.pop("response", None)
            found["error"] = {
                "type": "rejected_execution_exception",
                "reason": "rejected execution of coordinating operation [coordinating_operation_bytes=90624072]",
            }

    proxy.on("GET", "/_tasks/", edited(too_much_at_once), times=50)
    outcome = copy(old, new)
    sizes = [json.loads(body)["source"]["size"] for body in proxy.seen("POST", "/_reindex")]
    assert outcome.code == 1
    assert sizes == [5000, 2500, 1250, 625, 312, 156, 78, 39, 19, 9, 4, 2, 1]
    assert len(proxy.seen("POST", "/_delete_by_query")) == 1


# --- who asks sees everything -----------------------------------------------------------------------------------------


@secured
def test_a_user_who_does_not_see_all_documents_copies_nothing(make_index, copy, account, admin, name):
    old, new = make_index("old", NUMBER, docs=100), make_index("new", NUMBER, docs=5)
    account.restrict(old, lambda hits: len(hits) == 10, dls=json.dumps({"range": {"n": {"lt": 10}}}))
    before = state_of(admin, old, new)
    outcome = copy(old, new)
    assert outcome.code == 1, outcome.err
    assert name("user") in outcome.last
    assert old in outcome.last
    assert state_of(admin, old, new) == before


@secured
def test_masked_values_are_not_copied(make_index, copy, account):
    properties = {"secret": WORD, **NUMBER}
    old = make_index("old", properties, docs=[{"secret": "s", "n": n} for n in range(10)])
    account.restrict(old, lambda hits: {hit["_source"]["secret"] for hit in hits} != {"s"}, masked_fields=["secret"])
    outcome = copy(old, make_index("new", properties))
    assert outcome.code == 1, outcome.err
    assert "secret" in outcome.last


# --- rows that a pipeline drops ---------------------------------------------------------------------------------------


def test_all_rows_dropped_is_a_failure(make_index, pipeline, put_csv, load):
    index = make_index("index", NUMBER, settings={"index.default_pipeline": pipeline({"drop": {}})})
    outcome = load(put_csv({"a.csv": "n\n1\n2\n3\n"}), index, code=1)
    assert "dropped" in outcome.last


@pytest.mark.parametrize("more", [[], ["--id-column", "n"]], ids=["create", "index"])
def test_a_noop_among_stored_rows_is_a_dropped_row(more, make_index, put_csv, run, proxy):
    index = make_index("index", NUMBER)

    def drop_the_first(exchange):  # as a pipeline with a condition does, for which the server here has no scripts
        stored = exchange.forward(exchange.body.split(b"\n", 2)[2]).json()
        stored["items"].insert(0, {"create": {"result": "noop", "status": 200}})
        exchange.reply(200, json.dumps(stored))

    proxy.on("POST", "/_bulk", drop_the_first)
    outcome = run(bulkupdate, "--bucket", sandbox.BUCKET, "--prefix", put_csv({"a.csv": "n\n1\n2\n3\n"}),
                  "--index", index, *more)  # fmt: skip
    assert outcome.code == 0, outcome.err
    sums = outcome.result
    assert (sums["read"], sums["stored"], sums["dropped"], sums["documents"]) == (3, 2, 1, 2)
    assert "WARNING" in outcome.err
    assert "dropped" in outcome.err


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_cluster_that_calls_itself_by_another_name_is_asked_as_the_oldest(make_pair, switch, proxy):
    def disguise(found):
        found["version"]["number"] = "7.10.2"
        found["version"].pop("distribution", None)

    proxy.on("GET", "/$", edited(disguise), times=20)
    outcome = switch(*make_pair(NUMBER, 3))
    assert outcome.code == 0, outcome.err
    assert proxy.seen("GET", "preference=_primary") == []
    assert b"must_exist" not in b"".join(proxy.seen("POST", "/_aliases"))


# --- nothing to do ----------------------------------------------------------------------------------------------------


@pytest.fixture
def unchanged(load, monkeypatch):
    monkeypatch.setenv("SKIP_UNCHANGED", "true")
    return lambda prefix, index: load(prefix, index, "--dry-run").result.get("unchanged", False)


@pytest.mark.parametrize("changed", ["default_pipeline", "max_result_window"])
def test_another_setting_makes_a_load_due(changed, unchanged, make_index, pipeline, put_csv, load, admin):
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": "n\n1\n"})
    load(prefix, index)
    assert unchanged(prefix, index)
    value = pipeline({"drop": {}}) if changed == "default_pipeline" else 500
    admin("PUT", f"/{index}/_settings", {f"index.{changed}": value})
    assert not unchanged(prefix, index)


def test_a_setting_of_a_load_is_no_other_setting(unchanged, make_index, put_csv, load, admin):
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": "n\n1\n"})
    load(prefix, index)
    admin("PUT", f"/{index}/_settings", {"index.number_of_replicas": 2, "index.refresh_interval": "7s"})
    assert unchanged(prefix, index)


def test_a_live_index_that_lacks_a_column_is_no_refusal_of_a_look_for_changes(
    make_index, put_csv, load, name, monkeypatch
):
    monkeypatch.setenv("SKIP_UNCHANGED", "true")
    monkeypatch.setenv("REFRESH_STRATEGY", "alternate")
    live = make_index("live", NUMBER, alias=name("alias"), dynamic="strict")
    outcome = load(put_csv({"a.csv": "other\n1\n"}), live, "--dry-run")
    assert "unchanged" not in outcome.result
    monkeypatch.setenv("REFRESH_STRATEGY", "copy-back")  # and as the runner does when readers are on secondary
    outcome = load(put_csv({"a.csv": "other\n1\n"}), live, "--dry-run", "--no-cleanup")
    assert "unchanged" not in outcome.result


@pytest.mark.parametrize(("found_on", "expected"), [("new", "2026-01-01T00:00:00Z"), ("old", None)])
def test_the_age_of_the_data_is_not_that_of_another_index_than_the_last_report_says(found_on, expected):
    previous = {"live_index": "new", "live_data_time": "2026-01-01T00:00:00Z"}
    steps = [base.StepResult("check where readers are", 1, 0, found_on, {})]  # after an undo: old
    assert base.end_of_run(1, "check the load", "", steps, previous)["live_data_time"] == expected


# --- how old the data are that readers see ----------------------------------------------------------------------------

LOADED, SWITCHED = {"read": 1, "newest_object_age_hours": 2.0}, {"changed": True, "target": "new", "documents": 1}
STAYED, UNCHANGED = {**SWITCHED, "changed": False}, {"unchanged": True, "documents": 1, "newest_object_age_hours": 5.0}


@pytest.mark.parametrize(
    ("results", "age"),
    [
        ([], None), ([SWITCHED, LOADED], None), ([SWITCHED, LOADED, SWITCHED], 2.0), ([LOADED, SWITCHED], 2.0),
        ([LOADED, STAYED], None), ([UNCHANGED], 5.0),
    ],
)  # fmt: skip
def test_the_age_of_the_data_is_that_of_a_load_that_readers_were_moved_to(results, age):
    assert base.live_state([base.StepResult("step", 1, 0, "", result) for result in results])[2] == age


@pytest.mark.parametrize(
    ("live_after_switch", "line"),
    [
        ({}, "to find out which index readers are on"),  # no result was printed: the disk was full
        ({**SWITCHED, "target": "b"}, "readers are on b, 1 documents; that index is complete"),
    ],
)
def test_a_switch_without_a_result_leaves_it_open_where_readers_are(live_after_switch, line):
    steps = [
        base.StepResult("check where readers are", 1, 0, "a", {}),
        base.StepResult("2 switch readers to b", 1, 0, "", live_after_switch),
        base.StepResult("3 load a", 1, 1, "", {}),
    ]
    report = {"alias": "x", **base.end_of_run(1, "3 load a", "disk full", steps, {})}
    assert line in base.readers_after_failure(report)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("3 load a", "index a is live: alias x points at it"), ("1 copy a to b", "a changed during the copy: 0 now"),
        ("1 copy a to b", "index a does not exist"), ("4 switch readers to a", "alias x points at c, but should"),
    ],
)  # fmt: skip
def test_a_message_that_contradicts_the_steps_leaves_it_open_where_readers_are(step, message):
    steps = [base.StepResult("check where readers are", 1, 0, "a", {}), base.StepResult(step, 1, 4, "", {})]
    report = {"alias": "x", **base.end_of_run(4, step, message, steps, {})}
    assert report["live_index"] is None
    assert base.readers_after_failure(report).startswith("to find out which index readers are on, run ")


def test_a_signal_after_a_finished_switch_can_wait():
    steps = [base.StepResult("2 switch readers to b", 1, 0, "", {**SWITCHED, "target": "b"})]
    report = {"alias": "x", **base.end_of_run(143, "2 switch readers to b", "stopped by SIGTERM", steps, {})}
    line = base.readers_after_failure(report)
    assert line.startswith("readers are on b, 1 documents; that index is complete, so this can wait")


def test_the_age_of_the_data_survives_runs_that_end_before_they_know_where_readers_are():
    previous = {"live_index": "a", "live_data_time": "2026-01-01T00:00:00Z"}
    held = base.end_of_run(4, "preparing", "held", [], previous)
    assert (held["live_index"], held["live_data_index"]) == (None, "a")
    steps = [base.StepResult("check where readers are", 1, 0, "a", {})]
    for report in (held, base.end_of_run(1, "preparing", "", [], held)):
        assert base.end_of_run(1, "check the load", "", steps, report)["live_data_time"] == "2026-01-01T00:00:00Z"


# --- rows that a pipeline rejects, and searches that go through one ---------------------------------------------------


def test_rows_that_a_pipeline_rejects_are_rejects(make_index, pipeline, put_csv, load):
    index = make_index("index", NUMBER, settings={"index.default_pipeline": pipeline({"fail": {"message": "no"}})})
    outcome = load(put_csv({"a.csv": "n\n1\n2\n"}), index, "--max-rejects", "2")
    assert (outcome.result["rejected"], outcome.result["documents"]) == (2, 0)


def test_a_pipeline_in_a_pipeline_that_does_not_exist_is_refused(make_index, pipeline, put_csv, load):
    own = pipeline({"pipeline": {"name": "nowhere"}})
    index = make_index("index", NUMBER, settings={"index.default_pipeline": own})
    assert "nowhere, which does not exist" in load(put_csv({"a.csv": "n\n1\n"}), index, "--dry-run", code=4).last


def test_a_load_through_a_pipeline_never_counts_as_unchanged(unchanged, make_index, pipeline, put_csv, load):
    index = make_index("index", NUMBER, settings={"index.default_pipeline": pipeline()})
    prefix = put_csv({"a.csv": "n\n1\n"})
    load(prefix, index)
    assert not unchanged(prefix, index)  # its definition may change


def test_copies_deletions_and_samples_bypass_the_search_pipeline_of_an_index(make_index, name, copy, admin, proxy):
    path = f"/_search/pipeline/{name('pipeline')}"
    admin("PUT", path, {"response_processors": []})
    own = {"index.search.default_pipeline": path.rpartition("/")[2]}
    old, new = make_index("old", NUMBER, docs=3, settings=own), make_index("new", NUMBER, docs=1, settings=own)
    assert copy(old, new).code == 0
    assert json.loads(proxy.seen("POST", "/_reindex")[0])["source"]["search_pipeline"] == {}
    for request in ("_delete_by_query", f"{old}/_search", f"{new}/_search"):
        paths = [url for _, url, _ in proxy.requests if request in url]
        assert paths
        assert all("search_pipeline=_none" in url for url in paths)
    admin("DELETE", f"/{old},{new}")
    admin("DELETE", path)
