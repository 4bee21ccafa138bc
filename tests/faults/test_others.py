"""Other clients at work during a whole refresh: a run on another host, writes, a rollback by hand, a deleted index."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
from fault_proxy import after, answer, before

from .driver import MAPPING, OLD, SETTINGS, TOP, Run, World, expected_documents

FOREIGN = {"n": 7, "word": "of another client"}


def move(world: World, source: str, target: str) -> None:
    """Move the alias past the scripts, as an operator would by hand."""
    remove, add = ({"index": index, "alias": world.alias} for index in (source, target))
    world.admin("POST", "/_aliases", {"actions": [{"remove": remove}, {"add": add}]})


def switch_by_hand(world: World, source: str, target: str) -> Run:
    arguments = ["--alias", world.alias, "--source", source, "--target", target]
    return world.finish(world.start(sys.executable, "switch_alias.py", *arguments))


def write(world: World, index: str) -> Callable[[], Any]:
    """Return what writes a document that no refresh knows of; a search sees it at once."""
    return lambda: world.admin("POST", f"/{index}/_doc?refresh=true", FOREIGN)


def assert_fresh(world: World) -> None:
    """What has to hold where another client has changed what readers see: no error, and S3 row by row."""
    assert world.behind_alias() == [world.primary]
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


@pytest.mark.long
@pytest.mark.parametrize("at", ["/_reindex", "/_delete_by_query", "/_bulk"])
def test_a_refresh_of_another_host_at_the_same_time_costs_no_data(world, at):
    """Locks are files of one host: here only the task, the marker and the counts can tell."""
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
def test_a_document_written_to_the_source_after_the_copy_refuses_the_switch(world):
    alias_read = f"/{world.alias}/_alias/"
    world.proxy.on("GET", alias_read, after(write(world, world.alias)), skip=1)  # the first one is of step 0
    run = world.refresh()
    world.expect(run, code=4, message=f"{world.primary} holds 41 documents, {world.secondary} 40: -2.44 % exceeds")
    assert world.behind_alias() == [world.primary]
    assert undisturbed(world).code == 0
    assert_fresh(world)


@pytest.mark.long
def test_what_an_application_writes_through_the_alias_during_the_load_is_replaced_by_s3(world):
    world.proxy.on("POST", "/_bulk", after(write(world, world.alias)))
    run = world.refresh()
    world.expect(run, code=0)
    assert f"{world.secondary} holds 41 documents, {world.primary} 43" in run.log
    assert_fresh(world)


# --- the operator goes back by hand -----------------------------------------------------------------------------------


DENIED = answer(403, {"error": {"type": "security_exception", "reason": "no permissions for [x]"}, "status": 403})


def test_a_rollback_past_the_scripts_to_a_half_loaded_index_does_not_cost_the_complete_copy(world):
    """Readers see a part by the operator's own hand; the only complete data must not be overwritten with it."""
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
def test_after_a_rollback_to_the_old_data_the_next_refresh_loads_again(world):
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
    world.expect(run, code=1, message=f"check where the alias is: /.*/switch_alias.py --alias {world.alias} --show")
    world.proxy.rules.clear()
    world.expect(switch_by_hand(world, world.secondary, world.primary), code=0)
    world.heal()
    assert "==> 1 copy" in world.runs[-1].err


# --- an index goes ----------------------------------------------------------------------------------------------------


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
    assert world.behind_alias() == [world.primary if step == "1 copy" else world.secondary]
    again = undisturbed(world)
    world.expect(again, code=1, message=f"index {index} does not exist; create it first")
    world.admin("PUT", f"/{index}", {"settings": SETTINGS, "mappings": MAPPING})
    world.before[index] = world.state(index)  # the UUID is another
    world.heal()
