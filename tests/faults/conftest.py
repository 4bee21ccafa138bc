"""The fixture of the fault bench: a world of one's own for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sandbox
from conftest import OWN_PASSWORD, Account

from .driver import World


@pytest.fixture
def world_on(
    box: sandbox.Sandbox, name: Callable[[str], str], environment: dict[str, str], tmp_path: Path
) -> Callable[[sandbox.Server], World]:
    """Make a world on this server."""
    return lambda server: World(sandbox.Sandbox(server, box.environment), name, environment, tmp_path)


@pytest.fixture
def world(box: sandbox.Sandbox, world_on: Callable[[sandbox.Server], World]) -> Iterator[World]:
    with world_on(box.server) as made:
        yield made


@pytest.fixture
def account(world, name):
    made = Account(world.box.server, name("user"), [world.primary, world.secondary, world.alias])
    yield made
    made.delete()
    assert OWN_PASSWORD not in "".join(run.out + run.err + run.log for run in world.runs)
