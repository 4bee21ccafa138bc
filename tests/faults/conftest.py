"""The fixture of the fault bench: a world of one's own for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sandbox

from .driver import World


@pytest.fixture
def world(
    box: sandbox.Sandbox, name: Callable[[str], str], environment: dict[str, str], tmp_path: Path
) -> Iterator[World]:
    with World(box, name, environment, tmp_path) as made:
        yield made
