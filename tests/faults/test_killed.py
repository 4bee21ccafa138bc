"""Killed right before and right after each request that changes something, and stopped by a signal anywhere."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

import pytest
from fault_proxy import Exchange

from .driver import World, changes_state

# What a refresh changes, in this order; `primary` and `secondary` stand for the names of the indices.
CHANGES = """
TO BE FILLED
""".split("\n")[1:-1]
SHORT = {1}


def named(world: World, exchange: Exchange) -> str:
    path = exchange.handler.path.split("?")[0]
    return f"{exchange.handler.command} {path}".replace(world.primary, "primary").replace(world.secondary, "secondary")


class Counter:
    """Counts the requests that change something, and calls `act` at one of them, before or after it is carried out."""

    def __init__(self, world: World, at: int = 0, when: str = "", act: Callable[[], None] = lambda: None) -> None:
        self.world, self.at, self.when, self.act = world, at, when, act
        self.seen: list[str] = []
        world.proxy.watch = self

    def __call__(self, exchange: Exchange) -> bool:
        if not changes_state(exchange):
            return False
        self.seen.append(named(self.world, exchange))
        if len(self.seen) != self.at:
            return False
        if self.when == "after":
            exchange.forward()
        self.act()
        exchange.drop()
        return True


def kill_group(process: list[subprocess.Popen[str]]) -> Callable[[], None]:
    return lambda: os.killpg(process[0].pid, signal.SIGKILL)


def test_the_list_of_changes_is_complete(world):
    counter = Counter(world)
    world.expect(world.refresh(), code=0)
    world.assert_done()
    assert counter.seen == CHANGES


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "at", [pytest.param(at, marks=() if at in SHORT else pytest.mark.long) for at in range(1, len(CHANGES) + 1)]
)
def test_killed_at_a_change(world, at, when):
    process: list[subprocess.Popen[str]] = []
    counter = Counter(world, at, when, kill_group(process))
    process.append(world.start())
    run = world.finish(process[0])
    assert run.code == -signal.SIGKILL
    assert len(counter.seen) == at
    world.heal()
