"""switch_alias.py: what it checks, what it moves, what it leaves alone."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import opensearch_base_manager as base
import pytest
import sandbox
import switch_alias
from conftest import NUMBER, command_in, state_of
from fault_proxy import after, answer, before, edited, lost_answer, refused

pytestmark = pytest.mark.quick


@pytest.fixture
def pair(make_pair):
    return make_pair(NUMBER, [{"n": 1}, {"n": 2}])


def without_documents(answer):
    for found in answer["indices"].values():
        found["primaries"]["docs"]["count"] = 0


def moves(proxy):
    return [json.loads(body)["actions"] for body in proxy.seen("POST", "/_aliases")]


# --- the move ---------------------------------------------------------------------------------------------------------


def test_the_alias_moves_and_the_undo_command_is_printed(make_index, switch, behind_alias, run, alias):
    old, new = make_index("old", NUMBER, docs=10, alias=alias), make_index("new", NUMBER, docs=11)
    outcome = switch(old, new)
    assert outcome.code == 0
    assert behind_alias() == [new]
    assert f"alias {alias}: {old} -> {new}" in outcome.err
    expected = {"alias": alias, "source": old, "target": new, "changed": True, "documents": 11, "fields_checked": 1}
    assert outcome.result == {**expected, "seconds": outcome.result["seconds"]}
    undo = command_in(outcome.err, "undo: ")
    assert undo == ["--alias", alias, "--source", new, "--target", old, "--wait-seconds", "5", "--undo"]
    assert run(switch_alias, *undo).code == 0
    assert behind_alias() == [old]


def test_what_belongs_to_the_alias_moves_along(pair, switch, admin, alias):
    old, new = pair
    kept = {"filter": {"term": {"n": 1}}, "index_routing": "a", "search_routing": "a,b"}
    flags = {"is_write_index": True, "is_hidden": True}
    entry = {"index": old, "alias": alias, **kept, **flags}
    admin("POST", "/_aliases", {"actions": [{"add": entry}]})
    assert switch(old, new).code == 0
    assert admin("GET", f"/{new}/_alias")[new]["aliases"][alias] == {**kept, **flags}
    assert admin("GET", f"/{old}/_alias")[old]["aliases"] == {}


def test_an_alias_on_both_is_removed_from_the_source_and_stays_as_it_is_on_the_target(
    pair, switch, admin, behind_alias, alias
):
    old, new = pair
    filtered = {"index": new, "alias": alias, "filter": {"term": {"n": 1}}}
    admin("POST", "/_aliases", {"actions": [{"add": filtered}]})
    refused = switch(old, new)  # of its two documents readers would see one
    assert refused.code == 4
    assert f"{old} holds 2 documents, {new} 1, as seen through the filter or routing of {alias}" in refused.err
    assert behind_alias() == sorted(pair)
    assert switch(old, new, "--threshold", "50").code == 0
    assert behind_alias() == [new]
    assert admin("GET", f"/{new}/_alias")[new]["aliases"][alias] == {"filter": {"term": {"n": 1}}}


def test_an_alias_on_the_target_alone_is_success_without_a_change(pair, switch, behind_alias, proxy):
    old, new = pair
    outcome = switch(new, old)
    assert (outcome.code, outcome.result["changed"]) == (0, False)
    assert f"already points only at {old}, nothing to do" in outcome.last
    assert behind_alias() == [old]
    assert moves(proxy) == []


@pytest.mark.parametrize("others", ["old and third", "all three"])
def test_an_alias_on_a_third_index_beside_the_source_is_refused(
    others, pair, make_index, switch, admin, behind_alias, alias
):
    old, new = pair
    third = make_index("third", NUMBER, docs=2, alias=alias)
    if others == "all three":
        admin("POST", "/_aliases", {"actions": [{"add": {"index": new, "alias": alias}}]})
    before = behind_alias()
    outcome = switch(old, new)
    assert outcome.code == 4, outcome.err
    assert f"alias {alias} points at {', '.join(before)}" in outcome.last
    assert third in before
    assert behind_alias() == before


def test_an_application_may_write_through_the_alias_afterwards(pair, switch, admin, alias):
    assert switch(*pair).code == 0
    assert admin("POST", f"/{alias}/_doc", {"n": 3})["_index"] == pair[1]


def test_printed_commands_work_from_any_directory_and_without_the_environment(pair, box, behind_alias, tmp_path, alias):
    home = tmp_path / "a folder with spaces"
    home.mkdir()
    for file in [*Path(switch_alias.__file__).parent.glob("*.py"), Path(base.HERE / "run_refresh.sh")]:
        shutil.copy(file, home)
    (home / ".venv").symlink_to(sys.prefix)
    password = sandbox.PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
    variables = {**box.environment, "OPENSEARCH_ENDPOINT": box.server.endpoint, "OPENSEARCH_USERNAME": sandbox.USER,
                 "OPENSEARCH_PASSWORD": f"'{password}'", "LOCK_DIR": "its locks"}  # fmt: skip
    (home / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    (tmp_path / "queries").write_text('{"query": {"match_all": {}}}\n')

    def paste(command, cwd="/"):
        bare = ["env", "-i", "bash", "-c", command]
        return subprocess.run(bare, cwd=cwd, capture_output=True, text=True, timeout=60)

    def printed(text, before):
        return text.split(before)[-1].splitlines()[0]

    old, new = pair
    words = ["--alias", alias, "--source", old, "--target", new, "--queries", "queries", "--min-documents", "3"]
    refused = paste(shlex.join([sys.executable, f"{home}/switch_alias.py", *words]), tmp_path)
    assert refused.returncode == 4, refused.stderr
    moved = paste(printed(refused.stderr, "if the data is right, run "))
    assert (moved.returncode, behind_alias()) == (0, [new]), moved.stderr
    assert f"{tmp_path / 'queries'}, line 1: hits" in moved.stderr
    back = paste(printed(moved.stderr, "undo: "))
    assert (back.returncode, behind_alias()) == (0, [old]), back.stderr
    held = paste(printed(back.stderr, "to prevent that, run "))
    assert held.returncode == 0, held.stderr
    assert (home / "its locks" / f"HOLD-{alias}").read_text().startswith("why, since when")


# --- how many documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "threshold", "code"),
    [
        (10, 11, "10", 0), (10, 9, "10", 0), (10, 11, "9.99", 4), (10, 9, "9.99", 4), (10, 12, "10", 4),
        (10, 10, "0", 0), (10, 11, "0", 4), (1000, 1001, "0.1", 0), (1000, 999, "0.1", 0), (1000, 1002, "0.1", 4),
        (3, 4, "33.33", 4), (3, 4, "33.34", 0), (1000, 1007, "0.7", 0), (1, 1000, "99900", 0), (1, 1000, "99899", 4),
        (0, 5, "0", 0), (0, 0, "0", 0), (5, 0, "1000", 4),
    ],
)  # fmt: skip
def test_the_threshold_is_inclusive_and_exact(source, target, threshold, code, pair, switch, proxy):
    for index, documents in zip(pair, (source, target)):
        proxy.on("GET", f"/{index}/_count", edited(lambda answer, n=documents: answer.update(count=n)), times=None)
        proxy.on("GET", f"/{index}/_stats/docs", edited(without_documents), times=None)
    outcome = switch(*pair, "--threshold", threshold, "--field-threshold", "100", "--dry-run")
    assert outcome.code == code, outcome.err


def test_the_variable_sets_the_threshold_and_the_flag_wins(make_index, switch, monkeypatch, behind_alias, alias):
    old, new = make_index("old", NUMBER, docs=3, alias=alias), make_index("new", NUMBER, docs=2)
    monkeypatch.setenv("DOCUMENT_COUNT_THRESHOLD", "40")
    assert switch(old, new, "--threshold", "20").code == 4
    assert behind_alias() == [old]
    assert switch(old, new).code == 0


def test_documents_that_no_search_sees_yet_are_counted(make_index, switch, admin, alias):
    hidden = {"refresh_interval": "-1"}
    old, new = make_index("old", NUMBER, docs=2, alias=alias), make_index("new", NUMBER, docs=1, settings=hidden)
    admin("POST", f"/{new}/_doc", {"n": 2})
    assert switch(old, new, "--threshold", "0").code == 0


def test_a_count_that_misses_a_shard_is_no_count(pair, switch, behind_alias, proxy):
    proxy.on("GET", f"/{pair[1]}/_count", edited(lambda answer: answer["_shards"].update(failed=1)))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert f"_count of {pair[1]}: 1 shard(s) failed" in outcome.last
    assert behind_alias() == [pair[0]]


# --- is the target fit for readers? -----------------------------------------------------------------------------------


def test_an_unfinished_target_is_refused(pair, switch, admin, behind_alias):
    old, new = pair
    marker = {"started": "2026-01-31T02:00:00Z", "host": "elsewhere", "found": {}, "set": {}}
    admin("PUT", f"/{new}/_mapping", {"_meta": {base.SUITE: marker}})
    outcome = switch(old, new)
    assert outcome.code == 4, outcome.err
    assert f"{new} is unfinished: a run on elsewhere, started at 2026-01-31T02:00:00Z, has" in outcome.last
    assert behind_alias() == [old]


def test_a_target_that_another_client_starts_to_load_during_the_wait_is_refused(
    pair, switch, admin, behind_alias, proxy
):
    old, new = pair
    marker = {"started": "now", "host": "elsewhere", "found": {}, "set": {}}
    mark = after(lambda: admin("PUT", f"/{new}/_mapping", {"_meta": {base.SUITE: marker}}))
    proxy.on("GET", "/_cluster/health", mark)
    outcome = switch(old, new)
    assert outcome.code == 4, outcome.err
    assert "unfinished" in outcome.last
    assert behind_alias() == [old]


@pytest.mark.parametrize(
    ("replicas", "data_nodes", "live_copies", "needed"),
    [
        (0, 1, [1], 1), (1, 1, [1], 1), (1, 3, [2], 2), (2, 3, [3], 3), (2, 3, [2], 2), (2, 2, [3], 2),
        (1, 3, [2, 1], 1), (1, 3, [0], 1), (0, 3, [3], 1), (5, 3, [6, 6], 3),
    ],
)  # fmt: skip
def test_the_target_needs_as_many_copies_as_readers_have_now_where_that_is_possible(
    replicas, data_nodes, live_copies, needed
):
    live = {"shards": {str(shard): {"active_shards": copies} for shard, copies in enumerate(live_copies)}}
    assert switch_alias.needed_copies({"number_of_replicas": replicas}, live, data_nodes) == needed


def test_replicas_that_a_single_node_can_never_have_do_not_block(make_index, switch, alias):
    replicas = {"number_of_replicas": 1}
    old = make_index("old", NUMBER, docs=1, alias=alias, settings=replicas)
    assert switch(old, make_index("new", NUMBER, docs=1, settings=replicas)).code == 0


def copies(index, started):
    """Edit an answer about health: so many started copies of the one shard of an index."""

    def change(health):
        health["indices"][index]["shards"]["0"]["active_shards"] = started

    return edited(change)


def test_missing_shard_copies_are_waited_for(pair, switch, behind_alias, proxy):
    proxy.on("GET", "/_cluster/health", copies(pair[1], 0), times=2)
    assert switch(*pair).code == 0
    assert behind_alias() == [pair[1]]
    assert len(proxy.seen("GET", "/_cluster/health")) == 3


def test_shard_copies_that_never_come_refuse_the_switch(pair, switch, behind_alias, proxy):
    proxy.on("GET", "/_cluster/health", copies(pair[1], 0), times=None)
    outcome = switch(*pair, "--wait-seconds", "1")
    assert outcome.code == 4, outcome.err
    assert "fewer than 1 active copies in 1 of 1 shards after 1 s" in outcome.last
    assert behind_alias() == [pair[0]]


def test_an_index_that_is_replaced_during_the_wait_is_not_switched_to(pair, switch, admin, behind_alias, proxy):
    def replace():
        admin("DELETE", f"/{pair[1]}")
        admin("PUT", f"/{pair[1]}", {})

    proxy.on("GET", "/_cluster/health", after(replace))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert f"another client deleted and recreated index {pair[1]}" in outcome.last
    assert behind_alias() == [pair[0]]


# --- the one call, and when it goes wrong -----------------------------------------------------------------------------


def test_the_switch_is_one_call_that_insists_on_the_source(pair, switch, proxy, alias):
    old, new = pair
    assert switch(old, new).code == 0
    remove = {"index": old, "alias": alias, "must_exist": True}
    assert moves(proxy) == [[{"remove": remove}, {"add": {"index": new, "alias": alias}}]]


def test_an_older_version_is_not_sent_what_it_would_refuse(pair, switch, behind_alias, proxy, alias):
    proxy.on("GET", "^/$", edited(lambda answer: answer["version"].update(number="2.10.0")), times=None)
    assert switch(*pair).code == 0
    assert behind_alias() == [pair[1]]
    assert moves(proxy)[0][0] == {"remove": {"index": pair[0], "alias": alias}}


def test_a_switch_that_not_every_node_acknowledged_is_no_switch_yet(pair, switch, proxy):
    proxy.on("POST", "/_aliases", edited(lambda answer: answer.update(acknowledged=False)))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert "not every node acknowledged" in outcome.last
    assert "run again, but first check where the alias is: " in outcome.last
    assert "undo" not in outcome.err
    assert outcome.out == ""


def test_a_switch_that_does_not_take_is_a_failure(pair, switch, behind_alias, proxy):
    proxy.on("POST", "/_aliases", answer(200, {"acknowledged": True}))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert f"is on {pair[0]} now" in outcome.last
    assert behind_alias() == [pair[0]]


@pytest.mark.parametrize(
    ("fault", "sent"),
    [
        (lost_answer, 1), (refused, 2), (answer(503), 2), (answer(504, "<html>upstream timed out</html>"), 2),
        (answer(429, retry_after="0"), 2),
    ],
    ids=["carried out, no answer", "no answer", "503", "504", "429"],
)  # fmt: skip
def test_the_state_is_read_before_a_lost_call_is_sent_again(fault, sent, pair, switch, behind_alias, proxy):
    proxy.on("POST", "/_aliases", fault)
    outcome = switch(*pair)
    assert outcome.code == 0, outcome.err
    assert behind_alias() == [pair[1]]
    assert len(moves(proxy)) == sent


def test_a_call_that_is_lost_for_good_ends_with_the_command_that_shows_the_state(
    pair, switch, behind_alias, proxy, monkeypatch, alias
):
    monkeypatch.setenv("RETRY_SECONDS", "1")
    proxy.on("POST", "/_aliases", answer(503), times=None)
    outcome = switch(*pair)
    assert outcome.code == 1
    assert base.script_command("switch_alias.py", "--alias", alias, "--show") in outcome.last
    assert behind_alias() == [pair[0]]


@pytest.mark.parametrize("to", ["the target", "a third index"])
def test_an_alias_that_another_client_moves_right_before_the_call_stays_there(
    to, pair, make_index, switch, move_alias, behind_alias, proxy
):
    there = pair[1] if to == "the target" else make_index("third", NUMBER, docs=2)
    proxy.on("POST", "/_aliases", before(lambda: move_alias(pair[0], there)))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert "aliases_not_found" in outcome.last
    assert behind_alias() == [there]


def test_an_alias_that_another_client_moves_to_a_third_index_during_the_wait_is_refused(
    pair, make_index, switch, move_alias, behind_alias, proxy
):
    third = make_index("third", NUMBER, docs=2)
    proxy.on("GET", "/_cluster/health", after(lambda: move_alias(pair[0], third)))
    outcome = switch(*pair)
    assert outcome.code == 4, outcome.err
    assert behind_alias() == [third]
    assert moves(proxy) == []


def test_an_alias_that_another_client_moves_to_the_target_during_the_wait_is_where_it_should_be(
    pair, switch, move_alias, behind_alias, proxy
):
    proxy.on("GET", "/_cluster/health", after(lambda: move_alias(*pair)))
    outcome = switch(*pair)
    assert outcome.code == 0, outcome.err
    assert behind_alias() == [pair[1]]
    assert moves(proxy) == []


def test_an_alias_that_another_client_moves_away_right_after_the_call_is_a_failure(
    pair, make_index, switch, move_alias, proxy
):
    third = make_index("third", NUMBER, docs=2)
    proxy.on("POST", "/_aliases", after(lambda: move_alias(pair[1], third)))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert f"is on {third} now" in outcome.last
    assert " done: " not in outcome.err


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_show_prints_the_index_and_nothing_else(pair, run, alias):
    outcome = run(switch_alias, "--alias", alias, "--show")
    assert (outcome.code, outcome.out) == (0, f"{pair[0]}\n")


def test_show_refuses_to_choose_between_two_indices(pair, make_index, run, alias):
    third = make_index("third", NUMBER, alias=alias)
    outcome = run(switch_alias, "--alias", alias, "--show")
    assert (outcome.code, outcome.out) == (4, "")
    assert f"points at 2 indices: {', '.join(sorted([pair[0], third]))}" in outcome.last


def test_an_alias_on_both_indices_comes_with_the_command_that_leaves_it_on_the_first(
    make_index, switch, behind_alias, run, alias
):
    old, new = (make_index(name, NUMBER, docs=3, alias=alias) for name in ("old", "new"))
    outcome = switch(old, new, "--show")
    assert outcome.code == 4, outcome.err
    assert f"; to keep it on {old} alone, run " in outcome.last
    assert run(switch_alias, *command_in(outcome.last)).code == 0
    assert behind_alias() == [old]


def test_show_of_a_missing_alias_fails(name, run):
    outcome = run(switch_alias, "--alias", name("none"), "--show")
    assert (outcome.code, outcome.out) == (1, "")


def test_a_dry_run_checks_everything_and_changes_nothing(pair, make_index, switch, admin, proxy):
    before = state_of(admin, *pair)
    outcome = switch(*pair, "--dry-run")
    assert (outcome.code, outcome.result["changed"]) == (0, False)
    assert switch(pair[0], make_index("other", NUMBER, docs=5), "--dry-run").code == 4
    assert state_of(admin, *pair) == before
    assert moves(proxy) == []


def test_a_copy_of_another_client_into_the_target_refuses_the_switch(pair, foreign_copy, switch, behind_alias):
    task = foreign_copy(pair[1])
    outcome = switch(*pair)
    assert outcome.code == 4, outcome.err
    assert f"task {task}, which this suite did not start, is using index {pair[1]}" in outcome.last
    assert behind_alias() == [pair[0]]


def test_a_field_whose_name_is_a_pattern_is_not_counted(make_pair, switch):
    """The server would count the documents of each field that matches."""
    both = {"price": {"type": "long"}, "price*": {"type": "long"}}
    pair = make_pair(both, [{"price": 1, "price*": 1}], [{"price": 1}])
    outcome = switch(*pair)
    assert outcome.code == 0, outcome.err
    assert "field price* is not compared" in outcome.err
    assert outcome.result["fields_checked"] == 1
