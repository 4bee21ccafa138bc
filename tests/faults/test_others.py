"""Others at work during a whole refresh: second runs, scripts by hand, copies, writes, moved aliases, new indices."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import sandbox
from conftest import fill
from fault_proxy import after, answer, before

from .driver import MAPPING, OLD, SETTINGS, TOP, Run, World, expected_documents

STRANGER = {"n": 7, "word": "of somebody else"}

# The requests for the owners of the alias, in this order: step 0, three of step 2, three of step 4.
CHECKED, READ_BACK = 1, 3  # of step 2
CHECKED_AGAIN = 4  # the first of step 4


def owners(world: World) -> str:
    return f"/{world.alias}/_alias/"


def settings_back(index: str) -> tuple[str, str]:
    """The second of these requests ends a copy or load: all is written then, and nothing counted yet."""
    return "PUT", f"/{index}/_settings"


def move(world: World, source: str, target: str) -> None:
    """Move the alias past the scripts, as an operator would by hand."""
    remove, add = ({"index": index, "alias": world.alias} for index in (source, target))
    world.admin("POST", "/_aliases", {"actions": [{"remove": remove}, {"add": add}]})


def by_hand(world: World, script: str, *arguments: str) -> Run:
    return world.finish(world.start(sys.executable, script, *arguments))


def switch_by_hand(world: World, source: str, target: str) -> Run:
    return by_hand(world, "switch_alias.py", "--alias", world.alias, "--source", source, "--target", target)


def replace(world: World, index: str, docs: list[dict[str, Any]] | None = None) -> None:
    """Delete an index and create it anew with the same definition, as somebody else would."""
    world.admin("DELETE", f"/{index}")
    create(world, index, docs)


def create(world: World, index: str, docs: list[dict[str, Any]] | None = None) -> None:
    world.admin("PUT", f"/{index}", {"settings": SETTINGS, "mappings": MAPPING})
    fill(world.admin, index, docs or [])
    world.before[index] = world.state(index)  # it has another UUID: what stands from here on is what has to stay


def write(world: World, index: str) -> Callable[[], Any]:
    """Return what writes a document that no refresh knows of; a search sees it at once."""
    return lambda: world.admin("POST", f"/{index}/_doc?refresh=true", STRANGER)


def assert_fresh(world: World) -> None:
    """What has to hold where somebody else changed what readers see meanwhile: no error, and S3 row by row."""
    assert world.owners() == [world.primary]
    assert world.documents(world.primary) == expected_documents(world.prefix, world.objects)
    assert {index: world.state(index) for index in world.before} == world.before
    time.sleep(0.5)  # so that the reader sees the end
    world.reader.finish()
    assert world.reader.errors == []
    assert world.tasks() == []
    world.assert_no_secret()


def undisturbed(world: World, **variables: str) -> Run:
    world.proxy.rules.clear()
    return world.refresh(**variables)


@pytest.fixture
def third(world, name):
    """A third index with the old data, so that readers notice nothing when somebody moves the alias there."""
    world.admin("PUT", f"/{name('third')}", {"mappings": MAPPING})
    fill(world.admin, name("third"), OLD)
    return name("third")


@pytest.fixture
def stranger(world, name):
    """Return a function that starts a slow copy of somebody else into an index; it is ended with the test."""
    world.admin("PUT", f"/{name('stranger')}", {"mappings": MAPPING})
    fill(world.admin, name("stranger"), [STRANGER] * 50)
    started = []

    def copy(index):
        body = {"source": {"index": name("stranger"), "size": 1}, "dest": {"index": index}}
        path = "/_reindex?wait_for_completion=false&requests_per_second=0.2"
        started.append(world.admin("POST", path, body)["task"])

    def cancel():
        while started:
            with contextlib.suppress(RuntimeError):  # it has ended
                world.admin("POST", f"/_tasks/{started.pop()}/_cancel?wait_for_completion=true")

    copy.cancel = cancel
    yield copy
    cancel()


# --- a second run -----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("at", ["/_reindex", "/_bulk"])
def test_a_second_refresh_ends_with_75_and_leaves_the_first_alone(world, at):
    second = []
    world.proxy.on("POST", at, after(lambda: second.append(world.refresh())))
    world.expect(world.refresh(), code=0)
    world.expect(second[0], code=75, message=f"another refresh of {world.alias} is running on this host")
    world.assert_done()


@pytest.mark.long
@pytest.mark.parametrize("at", ["/_reindex", "/_bulk"])
def test_a_script_by_hand_on_an_index_that_is_written_to_ends_with_75(world, at):
    source, target = (world.primary, world.secondary) if at == "/_reindex" else (world.secondary, world.primary)
    load = ["--bucket", sandbox.BUCKET, "--prefix", world.prefix, "--index", target]
    runs = []

    def scripts():
        runs.append(by_hand(world, "index_cleanup.py", "--index", target))
        runs.append(by_hand(world, "reindex.py", "--source", source, "--target", target))
        runs.append(by_hand(world, "bulkupdate.py", *load))
        runs.append(by_hand(world, "bulkupdate.py", *load, "--no-cleanup"))
        runs.append(switch_by_hand(world, source, target))

    world.proxy.on("POST", at, after(scripts))
    world.expect(world.refresh(), code=0)
    assert len(runs) == 5
    for run in runs:
        world.expect(run, code=75, message=f"another run on this host works on index ({source}|{target}); wait")
    world.assert_done()


@pytest.mark.long
@pytest.mark.parametrize("at", ["/_reindex", "/_delete_by_query", "/_bulk"])
def test_a_refresh_of_another_host_at_the_same_time_costs_no_data(world, at):
    """Locks are files of one host: here only the task, the note and the sums are left to tell."""
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("another host name needs root")
    command = 'echo another-host >/proc/sys/kernel/hostname && exec "$0"'
    others = []

    def other():
        locks = str(world.folder / "other-locks")
        runner = str(TOP / "run_refresh.sh")
        others.append(world.finish(world.start("unshare", "--uts", "bash", "-c", command, runner, LOCK_DIR=locks)))

    world.proxy.on("POST", at, after(other))
    run = world.refresh()
    index = world.secondary if at == "/_reindex" else world.primary
    assert f"index {index} is unfinished: a run on " in others[0].log  # they did meet
    assert {run.code, others[0].code} <= {0, 1, 3, 4}
    world.assert_on_one_index()
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize("deed", ["emptied", "added to"])
def test_a_copy_that_somebody_changes_by_hand_before_the_switch_is_not_switched_to(world, deed):
    """No script holds a lock between two steps."""
    load = ["--bucket", sandbox.BUCKET, "--prefix", world.prefix, "--index", world.secondary, "--no-cleanup"]
    hands = {
        "emptied": lambda: by_hand(world, "index_cleanup.py", "--index", world.secondary, "--no-force-merge"),
        "added to": lambda: by_hand(world, "bulkupdate.py", *load),
    }
    done = []
    world.proxy.on("GET", owners(world), after(lambda: done.append(hands[deed]())), skip=CHECKED)
    run = world.refresh()
    assert [hand.code for hand in done] == [0]
    says = {"emptied": "an empty index is never switched to; load it first", "added to": r"\+107.50 % is more than"}
    world.expect(run, code=4, message=rf"{world.secondary} \d+: {says[deed]}")
    assert "FAILED at: 2 switch" in run.err
    assert world.owners() == [world.primary]
    world.heal()


# --- a copy of somebody else ------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("at", "step"), [("/_reindex", "1 copy"), ("/_bulk", "3 load")])
def test_a_copy_of_somebody_else_into_the_target_fails_the_step(world, name, stranger, at, step):
    """It begins after the tasks were looked at."""
    index = world.secondary if at == "/_reindex" else world.primary

    def copy():
        stranger(index)
        while not world.admin("GET", f"/{index}/_search?q=word:%22of+somebody+else%22")["hits"]["hits"]:
            time.sleep(0.1)
            world.admin("POST", f"/{index}/_refresh")

    world.proxy.on("POST", at, after(copy))
    run = world.refresh()
    stranger_found = r"(copied|stored)[;:] (somebody else|another client)"
    world.expect(run, code=1, message=rf"{index} holds \d+ documents,( but)? \d+ were {stranger_found}")
    assert f"FAILED at: {step}" in run.err
    stranger.cancel()
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize(("skip", "step"), [(CHECKED, "2 switch"), (CHECKED_AGAIN, "4 switch")])
def test_readers_are_not_switched_to_an_index_that_somebody_else_copies_into(world, stranger, skip, step):
    index = world.secondary if skip == CHECKED else world.primary
    world.proxy.on("GET", owners(world), after(lambda: stranger(index)), skip=skip)
    run = world.refresh()
    world.expect(run, code=4, message=rf"task \S+ of somebody else works on index {index}; wait for it or cancel it")
    assert f"FAILED at: {step}" in run.err
    assert world.owners() == [world.primary if skip == CHECKED else world.secondary]
    stranger.cancel()
    world.heal()


# --- documents of somebody else ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_document_written_to_the_source_during_the_copy_fails_it(world):
    rule = world.proxy.on(*settings_back(world.secondary), after(write(world, world.primary)), skip=1)
    run = world.refresh()
    assert rule.seen == 2
    world.expect(run, code=1, message=rf"source changed meanwhile: {world.primary} holds 41 .*40 were copied.*again")
    assert world.owners() == [world.primary]
    assert undisturbed(world).code == 0
    assert_fresh(world)


@pytest.mark.long
def test_a_document_written_to_the_source_after_the_copy_refuses_the_switch(world):
    world.proxy.on("GET", owners(world), after(write(world, world.alias)), skip=CHECKED)
    run = world.refresh()
    world.expect(run, code=4, message=f"{world.primary} holds 41 documents, {world.secondary} 40: -2.44 % is more than")
    assert world.owners() == [world.primary]
    assert undisturbed(world).code == 0
    assert_fresh(world)


@pytest.mark.long
@pytest.mark.parametrize(("at", "step"), [("/_reindex", "1 copy"), ("/_bulk", "3 load")])
def test_a_document_written_to_the_target_fails_the_step(world, at, step):
    index = world.secondary if at == "/_reindex" else world.primary
    world.proxy.on("POST", at, after(write(world, index)))
    run = world.refresh()
    stranger_found = r"(copied|stored)[;:] (somebody else|another client)"
    world.expect(run, code=1, message=rf"{index} holds \d+ documents,( but)? \d+ were {stranger_found}")
    assert f"FAILED at: {step}" in run.err
    world.heal()


@pytest.mark.long
def test_what_an_application_writes_through_the_alias_during_the_load_is_replaced_by_s3(world):
    world.proxy.on("POST", "/_bulk", after(write(world, world.alias)))
    run = world.refresh()
    world.expect(run, code=0)
    assert f"{world.secondary} holds 41 documents, {world.primary} 43" in run.log
    assert_fresh(world)


# --- the alias moves --------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("nth", "step"), [(0, "2 switch"), (1, "4 switch")])
def test_an_alias_that_somebody_moves_to_a_third_index_right_before_the_switch_stays_there(world, third, nth, step):
    source = [world.primary, world.secondary][nth]
    world.proxy.on("POST", "/_aliases", before(lambda: move(world, source, third)), skip=nth)
    run = world.refresh()
    world.expect(run, code=1, message=rf"_aliases: 404 aliases_not_found\S*: alias(es)? \[{world.alias}\] missing")
    assert f"FAILED at: {step}" in run.err
    assert world.owners() == [third]
    world.proxy.rules.clear()
    del world.proxy.requests[:]
    again = world.refresh()
    world.expect(again, code=4, message=f"alias {world.alias} is on {third}, neither on {world.primary} nor")
    assert not [method for method, *_ in world.proxy.requests if method != "GET"]
    move(world, third, source)
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize(("nth", "step"), [(0, "2 switch"), (1, "4 switch")])
def test_an_alias_that_somebody_moves_to_the_target_right_before_the_switch_stays_there(world, nth, step):
    source, target = [(world.primary, world.secondary), (world.secondary, world.primary)][nth]
    rule = world.proxy.on("POST", "/_aliases", before(lambda: move(world, source, target)), skip=nth)
    run = world.refresh()
    assert rule.seen == nth + 1
    world.expect(run, code=1, message=rf"_aliases: 404 aliases_not_found\S*: alias(es)? \[{world.alias}\] missing")
    assert f"FAILED at: {step}" in run.err
    assert world.owners() == [target]
    world.heal()


@pytest.mark.long
def test_an_alias_that_is_moved_to_the_fresh_data_by_hand_before_step_4_is_where_it_should_be(world):
    act = before(lambda: move(world, world.secondary, world.primary))
    world.proxy.on("GET", owners(world), act, skip=CHECKED_AGAIN)
    run = world.refresh()
    world.expect(run, code=0)
    assert "already, nothing to do" in run.log
    assert len(world.proxy.seen("POST", "/_aliases")) == 1
    world.assert_done()


# --- the operator goes back by hand -----------------------------------------------------------------------------------


@pytest.mark.long
def test_an_alias_that_was_rolled_back_before_the_load_refuses_it(world):
    act = after(lambda: move(world, world.secondary, world.primary))
    world.proxy.on("GET", owners(world), act, skip=READ_BACK)
    run = world.refresh()
    world.expect(run, code=4, message=f"index {world.primary} is live: alias {world.alias} points at it")
    assert "FAILED at: 3 load" in run.err
    assert world.owners() == [world.primary]
    world.heal()


DENIED = answer(403, {"error": {"type": "security_exception", "reason": "no permissions for [x]"}, "status": 403})


@pytest.mark.long
def test_a_half_loaded_index_is_not_switched_to_by_hand(world):
    world.proxy.on("POST", "/_bulk", DENIED, skip=2, times=None)
    world.expect(world.refresh(), code=1, message=r"_bulk: 403 security_exception")
    hand = switch_by_hand(world, world.secondary, world.primary)
    world.expect(hand, code=4, message=f"index {world.primary} is unfinished: .*load it again first")
    assert world.owners() == [world.secondary]
    world.heal()


def test_a_roll_back_past_the_scripts_to_a_half_loaded_index_does_not_cost_the_whole_copy(world):
    """Readers see a part by the operator's own hand; the only whole data must not be overwritten by it."""
    world.proxy.on("POST", "/_bulk", DENIED, skip=2, times=None)
    world.expect(world.refresh(), code=1, message=r"_bulk: 403 security_exception")
    move(world, world.secondary, world.primary)
    assert 0 < len(world.documents(world.primary)) < len(OLD)
    run = undisturbed(world)
    world.expect(run, code=4, message=f"{world.primary} is unfinished: .*move readers to {world.secondary}")
    assert sorted(document["n"] for document in world.documents(world.secondary).values()) == [row["n"] for row in OLD]
    move(world, world.primary, world.secondary)
    assert undisturbed(world).code == 0
    assert_fresh(world)


@pytest.mark.long
def test_after_a_roll_back_to_the_old_data_the_next_refresh_loads_again(world):
    world.expect(world.refresh(), code=0)
    hand = switch_by_hand(world, world.primary, world.secondary)
    world.expect(hand, code=0)
    run = undisturbed(world)
    world.expect(run, code=0, message=f"readers are on {world.secondary} already")
    assert "==> 1 copy" not in run.err
    assert_fresh(world)
    whole = {(len(documents), float(sum(row["n"] for row in documents)))
             for documents in (OLD, expected_documents(world.prefix, world.objects).values())}  # fmt: skip
    assert set(world.reader.seen) == whole
    assert len(world.reader.seen) == 4


@pytest.mark.long
def test_after_a_switch_by_hand_in_the_place_of_step_4_the_next_refresh_copies(world):
    world.proxy.on("POST", "/_aliases", answer(503), skip=1, times=None)
    run = world.refresh(RETRY_SECONDS="3")
    world.expect(run, code=1, message=f"look where the alias is: python switch_alias.py --alias {world.alias} --show")
    world.proxy.rules.clear()
    world.expect(switch_by_hand(world, world.secondary, world.primary), code=0)
    world.heal()
    assert "==> 1 copy" in world.runs[-1].err


# --- an index goes ----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("at", "step"), [("/_reindex", "1 copy"), ("/_bulk", "3 load")])
def test_an_index_that_is_replaced_while_it_is_filled_fails_the_step(world, at, step):
    """Also when the number of documents is the right one."""
    index = world.secondary if at == "/_reindex" else world.primary
    docs = OLD if at == "/_reindex" else []
    rule = world.proxy.on(*settings_back(index), after(lambda: replace(world, index, docs)), skip=1)
    run = world.refresh()
    assert rule.seen == 2
    world.expect(run, code=1, message=f"index {index} was deleted and created anew by somebody else.*run again")
    assert f"FAILED at: {step}" in run.err
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize(("at", "step"), [("/_reindex", "1 copy"), ("/_bulk", "3 load")])
def test_an_index_that_is_deleted_while_it_is_filled_fails_until_it_is_there_again(world, at, step):
    index = world.secondary if at == "/_reindex" else world.primary
    rule = world.proxy.on("POST", at, before(lambda: world.admin("DELETE", f"/{index}")))
    run = world.refresh()
    assert rule.seen >= 1
    reasons = [rf"no such index \[{index}\]", f"index {index} does not exist", r"no permissions for \[\S+create\]"]
    world.expect(run, code=1, message="|".join(reasons))
    assert f"FAILED at: {step}" in run.err
    assert world.owners() == [world.primary if step == "1 copy" else world.secondary]
    again = undisturbed(world)
    world.expect(again, code=1, message=f"index {index} does not exist; create it first")
    create(world, index)
    world.heal()


@pytest.mark.long
def test_a_copy_that_is_replaced_by_an_empty_index_is_not_switched_to(world):
    act = after(lambda: replace(world, world.secondary))
    world.proxy.on("GET", owners(world), act, skip=CHECKED)
    run = world.refresh()
    world.expect(run, code=4, message=f"{world.secondary} 0: an empty index is never switched to; load it first")
    assert world.owners() == [world.primary]
    world.heal()
