"""switch_alias.py: what it checks, what it moves, what it leaves alone."""

from __future__ import annotations

import fcntl
import json
import shlex

import opensearch_base_manager as base
import pytest
import switch_alias
from conftest import OWN, fill, state_of
from fault_proxy import after, answer, edited, lost_answer, refused


ALIAS = f"{OWN}-switch"
NUMBER = {"n": {"type": "long"}}


@pytest.fixture
def switch(run):
    return lambda source, target, *more: run(
        switch_alias, "--alias", ALIAS, "--source", source, "--target", target, *more
    )


@pytest.fixture(scope="module")
def lasting_pair(box):
    """Two indices with two documents each; a switch does not change them."""
    pair = f"{ALIAS}-old", f"{ALIAS}-new"
    for index in pair:
        box.server.request("PUT", f"/{index}", {"mappings": {"properties": NUMBER}})
        fill(box.server.request, index, [{"n": 1}, {"n": 2}])
    yield pair
    for index in pair:
        box.server.request("DELETE", f"/{index}")


@pytest.fixture
def pair(lasting_pair, admin):
    """The two, with the alias on the first."""
    admin("POST", "/_aliases", {"actions": [{"add": {"index": lasting_pair[0], "alias": ALIAS}}]})
    yield lasting_pair
    for index, entry in admin("GET", f"/{ALIAS}-*/_alias").items():  # wherever the test has left it
        for alias in entry["aliases"]:
            admin("DELETE", f"/{index}/_alias/{alias}")


@pytest.fixture
def fresh_pair(make_index):
    """For tests that change the indices themselves."""
    return make_index("old", NUMBER, docs=2, alias=ALIAS), make_index("new", NUMBER, docs=2)


@pytest.fixture
def owners(admin):
    return lambda: sorted(admin("GET", f"/_alias/{ALIAS}"))


@pytest.fixture
def move(admin):
    """Act as somebody else: `move("from", "to")`."""

    def do(source, target):
        actions = [{kind: {"index": index, "alias": ALIAS}} for kind, index in
                   (("remove", source), ("add", target))]  # fmt: skip
        admin("POST", "/_aliases", {"actions": actions})

    return do


def command_in(text, before=""):
    """Return the arguments of the last command in a text, read as a shell would."""
    return shlex.split(text.split(f"{before}python switch_alias.py ")[-1].splitlines()[0])


def without_documents(answer):
    for found in answer["indices"].values():
        found["primaries"]["docs"]["count"] = 0


def moves(proxy):
    return [json.loads(body)["actions"] for body in proxy.seen("POST", "/_aliases")]


# --- the move ---------------------------------------------------------------------------------------------------------


def test_the_alias_moves_and_the_undo_command_is_printed(make_index, switch, owners, run):
    old, new = make_index("old", NUMBER, docs=10, alias=ALIAS), make_index("new", NUMBER, docs=11)
    outcome = switch(old, new)
    assert outcome.code == 0
    assert owners() == [new]
    assert f"alias {ALIAS}: {old} -> {new}" in outcome.err
    expected = {"alias": ALIAS, "source": old, "target": new, "changed": True, "documents": 11, "fields_checked": 1}
    assert outcome.result == {**expected, "seconds": outcome.result["seconds"]}
    undo = command_in(outcome.err, "undo: ")
    assert undo == ["--alias", ALIAS, "--source", new, "--target", old, "--wait-seconds", "5", "--undo"]
    assert run(switch_alias, *undo).code == 0
    assert owners() == [old]


def test_what_belongs_to_the_alias_moves_along(pair, switch, admin):
    old, new = pair
    kept = {"filter": {"term": {"n": 1}}, "index_routing": "a", "search_routing": "a,b"}
    flags = {"is_write_index": True, "is_hidden": True}
    alias = {"index": old, "alias": ALIAS, **kept, **flags}
    admin("POST", "/_aliases", {"actions": [{"add": alias}]})
    assert switch(old, new).code == 0
    assert admin("GET", f"/{new}/_alias")[new]["aliases"][ALIAS] == {**kept, **flags}
    assert admin("GET", f"/{old}/_alias")[old]["aliases"] == {}


def test_an_alias_on_both_is_taken_off_the_source_and_stays_as_it_is_on_the_target(pair, switch, admin, owners):
    old, new = pair
    filtered = {"index": new, "alias": ALIAS, "filter": {"term": {"n": 1}}}
    admin("POST", "/_aliases", {"actions": [{"add": filtered}]})
    refused = switch(old, new)  # of its two documents readers would see one
    assert refused.code == 4 and f"{old} holds 2 documents, {new} 1 for readers" in refused.err
    assert owners() == sorted(pair)
    assert switch(old, new, "--threshold", "50").code == 0
    assert owners() == [new]
    assert admin("GET", f"/{new}/_alias")[new]["aliases"][ALIAS] == {"filter": {"term": {"n": 1}}}


def test_an_alias_on_the_target_alone_is_success_without_a_change(pair, switch, owners, proxy):
    old, new = pair
    outcome = switch(new, old)
    assert (outcome.code, outcome.result["changed"]) == (0, False)
    assert "already, nothing to do" in outcome.last
    assert owners() == [old]
    assert moves(proxy) == []


@pytest.mark.parametrize("others", ["old and third", "all three"])
def test_an_alias_on_a_third_index_beside_the_source_is_refused(others, pair, make_index, switch, admin, owners):
    old, new = pair
    third = make_index("third", NUMBER, docs=2, alias=ALIAS)
    if others == "all three":
        admin("POST", "/_aliases", {"actions": [{"add": {"index": new, "alias": ALIAS}}]})
    before = owners()
    outcome = switch(old, new)
    assert outcome.code == 4, outcome.err
    assert f"alias {ALIAS} is on {', '.join(before)}" in outcome.last
    assert third in before
    assert owners() == before


def test_an_application_may_write_through_the_alias_afterwards(fresh_pair, switch, admin):
    assert switch(*fresh_pair).code == 0
    assert admin("POST", f"/{ALIAS}/_doc", {"n": 3})["_index"] == fresh_pair[1]


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


def test_the_variable_sets_the_threshold_and_the_flag_wins(make_index, switch, monkeypatch, owners):
    old, new = make_index("old", NUMBER, docs=3, alias=ALIAS), make_index("new", NUMBER, docs=2)
    monkeypatch.setenv("DOCUMENT_COUNT_THRESHOLD", "40")
    assert switch(old, new, "--threshold", "20").code == 4
    assert owners() == [old]
    assert switch(old, new).code == 0


def test_documents_that_no_search_sees_yet_are_counted(make_index, switch, admin):
    hidden = {"refresh_interval": "-1"}
    old, new = make_index("old", NUMBER, docs=2, alias=ALIAS), make_index("new", NUMBER, docs=1, settings=hidden)
    admin("POST", f"/{new}/_doc", {"n": 2})
    assert switch(old, new, "--threshold", "0").code == 0


def test_a_count_that_misses_a_shard_is_no_count(pair, switch, owners, proxy):
    proxy.on("GET", f"/{pair[1]}/_count", edited(lambda answer: answer["_shards"].update(failed=1)))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert f"_count of {pair[1]}: 1 shard(s) failed" in outcome.last
    assert owners() == [pair[0]]


# --- is the target fit for readers? -----------------------------------------------------------------------------------


def test_an_unfinished_target_is_refused(fresh_pair, switch, admin, owners):
    old, new = fresh_pair
    note = {"started": "2026-01-31T02:00:00Z", "host": "elsewhere", "found": {}, "set": {}}
    admin("PUT", f"/{new}/_mapping", {"_meta": {base.SUITE: note}})
    outcome = switch(old, new)
    assert outcome.code == 4, outcome.err
    assert f"{new} is unfinished: a load on elsewhere, started at 2026-01-31T02:00:00Z" in outcome.last
    assert owners() == [old]


def test_a_target_that_somebody_starts_to_load_during_the_wait_is_refused(fresh_pair, switch, admin, owners, proxy):
    old, new = fresh_pair
    note = {"started": "now", "host": "elsewhere", "found": {}, "set": {}}
    mark = after(lambda: admin("PUT", f"/{new}/_mapping", {"_meta": {base.SUITE: note}}))
    proxy.on("GET", "/_cluster/health", mark)
    outcome = switch(old, new)
    assert outcome.code == 4, outcome.err
    assert "unfinished" in outcome.last
    assert owners() == [old]


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


def test_replicas_that_a_single_node_can_never_have_do_not_block(make_index, switch):
    replicas = {"number_of_replicas": 1}
    old = make_index("old", NUMBER, docs=1, alias=ALIAS, settings=replicas)
    assert switch(old, make_index("new", NUMBER, docs=1, settings=replicas)).code == 0


def copies(index, started):
    """Edit an answer about health: so many started copies of the one shard of an index."""

    def change(health):
        health["indices"][index]["shards"]["0"]["active_shards"] = started

    return edited(change)


def test_missing_shard_copies_are_waited_for(pair, switch, owners, proxy):
    proxy.on("GET", "/_cluster/health", copies(pair[1], 0), times=2)
    assert switch(*pair).code == 0
    assert owners() == [pair[1]]
    assert len(proxy.seen("GET", "/_cluster/health")) == 3


def test_shard_copies_that_never_come_refuse_the_switch(pair, switch, owners, proxy):
    proxy.on("GET", "/_cluster/health", copies(pair[1], 0), times=None)
    outcome = switch(*pair, "--wait-seconds", "1")
    assert outcome.code == 4, outcome.err
    assert "1 of 1 shards have fewer than 1 active copies after 1 s" in outcome.last
    assert owners() == [pair[0]]


def test_an_index_that_is_replaced_during_the_wait_is_not_switched_to(fresh_pair, switch, admin, owners, proxy):
    def replace():
        admin("DELETE", f"/{fresh_pair[1]}")
        admin("PUT", f"/{fresh_pair[1]}", {})

    proxy.on("GET", "/_cluster/health", after(replace))
    outcome = switch(*fresh_pair)
    assert outcome.code == 1
    assert f"another client deleted and recreated index {fresh_pair[1]}" in outcome.last
    assert owners() == [fresh_pair[0]]


# --- the one call, and when it goes wrong -----------------------------------------------------------------------------


def test_the_switch_is_one_call_that_insists_on_the_source(pair, switch, proxy):
    old, new = pair
    assert switch(old, new).code == 0
    remove = {"index": old, "alias": ALIAS, "must_exist": True}
    assert moves(proxy) == [[{"remove": remove}, {"add": {"index": new, "alias": ALIAS}}]]


def test_an_older_version_is_not_sent_what_it_would_refuse(pair, switch, owners, proxy):
    proxy.on("GET", "^/$", edited(lambda answer: answer["version"].update(number="2.10.0")), times=None)
    assert switch(*pair).code == 0
    assert owners() == [pair[1]]
    assert moves(proxy)[0][0] == {"remove": {"index": pair[0], "alias": ALIAS}}


def test_a_switch_that_not_every_node_acknowledged_is_no_switch_yet(pair, switch, proxy):
    proxy.on("POST", "/_aliases", edited(lambda answer: answer.update(acknowledged=False)))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert "not every node acknowledged" in outcome.last
    assert "--show and run again" in outcome.last
    assert "undo" not in outcome.err
    assert outcome.out == ""


def test_a_switch_that_does_not_take_is_a_failure(pair, switch, owners, proxy):
    proxy.on("POST", "/_aliases", answer(200, {"acknowledged": True}))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert f"is on {pair[0]} now" in outcome.last
    assert owners() == [pair[0]]


@pytest.mark.parametrize(
    ("fault", "sent"),
    [
        (lost_answer, 1), (refused, 2), (answer(503), 2), (answer(504, "<html>upstream timed out</html>"), 2),
        (answer(429, retry_after="0"), 2),
    ],
    ids=["carried out, no answer", "no answer", "503", "504", "429"],
)  # fmt: skip
def test_the_state_is_read_before_a_lost_call_is_sent_again(fault, sent, pair, switch, owners, proxy):
    proxy.on("POST", "/_aliases", fault)
    outcome = switch(*pair)
    assert outcome.code == 0, outcome.err
    assert owners() == [pair[1]]
    assert len(moves(proxy)) == sent


def test_a_call_that_is_lost_for_good_ends_with_the_command_that_shows_the_state(
    pair, switch, owners, proxy, monkeypatch
):
    monkeypatch.setenv("RETRY_SECONDS", "1")
    proxy.on("POST", "/_aliases", answer(503), times=None)
    outcome = switch(*pair)
    assert outcome.code == 1
    assert f"python switch_alias.py --alias {ALIAS} --show" in outcome.last
    assert owners() == [pair[0]]


def test_an_alias_that_somebody_moves_right_before_the_call_stays_where_they_put_it(
    pair, make_index, switch, move, owners, proxy
):
    third = make_index("third", NUMBER, docs=2)

    def overtaken(exchange):
        move(pair[0], third)
        exchange.pass_on()

    proxy.on("POST", "/_aliases", overtaken)
    outcome = switch(*pair)
    assert outcome.code == 1
    assert "aliases_not_found" in outcome.last
    assert owners() == [third]


def test_an_alias_that_somebody_moves_to_a_third_index_during_the_wait_is_refused(
    pair, make_index, switch, move, owners, proxy
):
    third = make_index("third", NUMBER, docs=2)
    proxy.on("GET", "/_cluster/health", after(lambda: move(pair[0], third)))
    outcome = switch(*pair)
    assert outcome.code == 4, outcome.err
    assert owners() == [third]
    assert moves(proxy) == []


def test_an_alias_that_somebody_moves_to_the_target_during_the_wait_is_where_it_should_be(
    pair, switch, move, owners, proxy
):
    proxy.on("GET", "/_cluster/health", after(lambda: move(*pair)))
    outcome = switch(*pair)
    assert outcome.code == 0, outcome.err
    assert owners() == [pair[1]]
    assert moves(proxy) == []


def test_an_alias_that_somebody_moves_away_right_after_the_call_is_a_failure(pair, make_index, switch, move, proxy):
    third = make_index("third", NUMBER, docs=2)
    proxy.on("POST", "/_aliases", after(lambda: move(pair[1], third)))
    outcome = switch(*pair)
    assert outcome.code == 1
    assert f"is on {third} now" in outcome.last
    assert " done: " not in outcome.err


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_show_prints_the_index_and_nothing_else(pair, run):
    outcome = run(switch_alias, "--alias", ALIAS, "--show")
    assert (outcome.code, outcome.out) == (0, f"{pair[0]}\n")


def test_show_refuses_to_choose_between_two_indices(pair, make_index, run):
    third = make_index("third", NUMBER, alias=ALIAS)
    outcome = run(switch_alias, "--alias", ALIAS, "--show")
    assert (outcome.code, outcome.out) == (4, "")
    assert f"points at 2 indices: {', '.join(sorted([pair[0], third]))}" in outcome.last


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


@pytest.mark.parametrize("locked", [0, 1], ids=["source", "target"])
@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["exclusive", "shared"])
def test_a_locked_index_ends_with_75_and_is_left_alone(locked, kind, pair, switch, owners, tmp_path):
    (tmp_path / "locks").mkdir()
    with open(tmp_path / "locks" / f"{pair[locked]}.lock", "w") as lock:
        fcntl.flock(lock, kind)
        outcome = switch(*pair)
        assert outcome.code == 75, outcome.err
        assert f"index {pair[locked]} is locked by another run on this host" in outcome.last
        assert owners() == [pair[0]]
    assert switch(*pair).code == 0


def test_a_copy_of_a_stranger_into_the_target_refuses_the_switch(fresh_pair, make_index, switch, admin, owners):
    third = make_index("third", NUMBER, docs=3)
    body = {"source": {"index": third, "size": 1}, "dest": {"index": fresh_pair[1]}}
    task = admin("POST", "/_reindex?wait_for_completion=false&requests_per_second=0.5", body)["task"]
    try:
        outcome = switch(*fresh_pair)
    finally:
        admin("POST", f"/_tasks/{task}/_cancel?wait_for_completion=true")
    assert outcome.code == 4, outcome.err
    assert f"task {task}, which this suite did not start, is modifying index {fresh_pair[1]}" in outcome.last
    assert owners() == [fresh_pair[0]]
