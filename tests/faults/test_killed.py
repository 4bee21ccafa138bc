"""Killed right before and right after each request that changes something, and stopped by a signal anywhere."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Exchange

from .driver import Run, World, changes_state

# What a refresh changes, in this order; `primary` and `secondary` stand for the names of the indices.
CHANGES = """
PUT /secondary/_mapping
PUT /secondary/_settings
POST /_reindex
PUT /secondary/_settings
PUT /secondary/_mapping
POST /_aliases
PUT /primary/_mapping
PUT /primary/_settings
POST /primary/_delete_by_query
POST /primary/_bulk
POST /primary/_bulk
POST /primary/_bulk
POST /primary/_bulk
POST /primary/_bulk
PUT /primary/_settings
PUT /primary/_mapping
POST /_aliases
""".split("\n")[1:-1]
CHEAP_CHANGES = """
PUT /secondary/_mapping
PUT /secondary/_settings
PUT /secondary-recreate
PUT /secondary
DELETE /secondary
PUT /secondary
DELETE /secondary-recreate
POST /secondary/_bulk
POST /secondary/_bulk
POST /secondary/_bulk
POST /secondary/_bulk
POST /secondary/_bulk
PUT /secondary/_settings
PUT /secondary/_mapping
POST /_aliases
""".split("\n")[1:-1]  # alternate, recreate
CLONE_CHANGES = """
POST /primary/_clone/secondary
POST /primary/_clone/secondary
PUT /primary/_mapping
PUT /primary/_settings
DELETE /secondary
POST /primary/_clone/secondary
PUT /secondary/_settings
PUT /primary/_settings
PUT /secondary/_mapping
PUT /primary/_mapping
""".split("\n")[1:-1]  # the first two change nothing: they ask whether it is allowed
SHORT = {3, 6, 12}  # of each kind one: a task, the alias, a part of the data


def named(world: World, exchange: Exchange) -> str:
    path = exchange.handler.path.split("?")[0]
    return f"{exchange.handler.command} {path}".replace(world.primary, "primary").replace(world.secondary, "secondary")


class Counter:
    """Counts the requests that change something, and calls `act` at one of them.

    `when` is "before" or "after" the server carries it out (then the connection is closed), or "during".
    """

    def __init__(self, world: World, at: int = 0, when: str = "", act: Callable[[], None] = lambda: None) -> None:
        self.world, self.at, self.when, self.act = world, at, when, act
        self.seen: list[str] = []
        world.proxy.watch = self

    def __call__(self, exchange: Exchange) -> bool:
        if not changes_state(exchange.handler.command, exchange.handler.path):
            return False
        self.seen.append(named(self.world, exchange))
        if len(self.seen) != self.at:
            return False
        if self.when == "after":
            exchange.forward()
        self.act()
        if self.when == "during":
            exchange.pass_on()
        else:
            exchange.drop()
        return True


def run_and_act(world: World, at: int, when: str, act: Callable[[int], None]) -> Run:
    """Run a refresh, and do something to the runner's process at one of its changes."""
    process: list[subprocess.Popen[str]] = []
    counter = Counter(world, at, when, lambda: act(process[0].pid))
    process.append(world.start())
    run = world.finish(process[0])
    assert len(counter.seen) >= at  # other senders may have been faster
    return run


def assert_killed_and_healed(world: World, at: int, when: str) -> None:
    run = run_and_act(world, at, when, lambda runner: os.killpg(runner, signal.SIGKILL))
    assert run.code == -signal.SIGKILL
    world.heal()


@pytest.mark.quick
def test_the_list_of_changes_is_complete(world):
    counter = Counter(world)
    world.expect(world.refresh(), code=0)
    world.assert_done()
    assert counter.seen == CHANGES


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "at", [pytest.param(at, marks=() if at in SHORT else pytest.mark.long) for at in range(1, len(CHANGES) + 1)]
)
def test_killed_at_a_change(world, at, when):
    assert_killed_and_healed(world, at, when)


# --- the cheap way ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cheap(world, may_recreate):
    world.go_the_cheap_way()
    return world


def test_the_list_of_cheap_changes_is_complete(cheap):
    counter = Counter(cheap)
    cheap.expect(cheap.refresh(), code=0)
    assert cheap.behind_alias() == [cheap.secondary]
    cheap.assert_done()
    assert counter.seen == CHEAP_CHANGES


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "at", [pytest.param(at, marks=() if at == 5 else pytest.mark.long) for at in range(1, len(CHEAP_CHANGES) + 1)]
)
def test_killed_at_a_cheap_change(cheap, at, when):
    assert_killed_and_healed(cheap, at, when)


# --- step 1 by clone -------------------------------------------------------------------------------------------------


# the short form: the target deleted, the clone created, its marker removed
CLONE_PLACES = [pytest.param(at, marks=() if at in (5, 6, 9) else pytest.mark.long) for at in range(3, 11)]


@pytest.fixture
def cloning(world, may_recreate):
    world.environment["COPY_METHOD"] = "clone"
    return world


@pytest.mark.quick
def test_the_list_of_changes_by_clone_is_complete(cloning):
    counter = Counter(cloning)
    cloning.expect(cloning.refresh(), code=0)
    cloning.assert_done()
    assert counter.seen[: len(CLONE_CHANGES)] == CLONE_CHANGES
    assert counter.seen[len(CLONE_CHANGES) :] == CHANGES[CHANGES.index("POST /_aliases") :]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", CLONE_PLACES)
def test_killed_at_a_change_by_clone(cloning, at, when):
    assert_killed_and_healed(cloning, at, when)


@pytest.mark.slow
@pytest.mark.parametrize("at", [pytest.param(at, marks=() if at == 6 else pytest.mark.long) for at in range(3, 11)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_while_an_index_is_cloned(cloning, at, number):
    run = run_and_act(cloning, at, "during", partial(send, number, "group"))
    cloning.expect(run, code=SIGNALS[number], message=number.name)
    assert cloning.state(cloning.primary)["settings"] == cloning.before[cloning.primary]["settings"]
    cloning.heal()


# --- signals ----------------------------------------------------------------------------------------------------------

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
PLACES = sorted([*range(1, len(CHANGES) + 1, 2), 12])  # ten of them


def step_of(runner: int) -> int:
    """Return the process of the step that the runner waits for."""
    children = Path(f"/proc/{runner}/task/{runner}/children").read_text().split()
    [step] = [child for child in children if b"--" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return int(step)


def send(number: signal.Signals, whom: str, runner: int) -> None:
    if whom == "group":
        os.killpg(runner, number)
    else:
        os.kill(runner if whom == "runner" else step_of(runner), number)


def signal_cases() -> list[Any]:
    """Every signal to everybody at every place; in the short form each signal and each addressee once."""
    short = [(signal.SIGTERM, "runner", 5), (signal.SIGINT, "group", 11), (signal.SIGHUP, "step", 13)]
    return [
        pytest.param(number, whom, at, marks=() if (number, whom, at) in short else pytest.mark.long)
        for number in SIGNALS for whom in ("group", "runner", "step") for at in PLACES
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("at", [pytest.param(at, marks=() if at == 5 else pytest.mark.long) for at in range(3, 9)])
def test_stopped_by_a_signal_while_an_index_is_recreated(cheap, at, number):
    run = run_and_act(cheap, at, "during", partial(send, number, "group"))
    cheap.expect(run, code=SIGNALS[number], message=number.name)
    cheap.heal()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "whom", "at"), signal_cases())
def test_stopped_by_a_signal_at_a_change(world, number, whom, at):
    run = run_and_act(world, at, "during", partial(send, number, whom))
    world.expect(run, code=SIGNALS[number], message=number.name)
    assert world.tasks() == []
    settings = {index: world.state(index)["settings"] for index in (world.primary, world.secondary)}
    assert settings == {index: before["settings"] for index, before in world.before.items()}
    world.heal()
