"""switch_alias.py: what it checks, what it moves, what it leaves alone."""

from __future__ import annotations

import pytest
import switch_alias


@pytest.fixture
def switch(run, name):
    def do(source, target, *more):
        return run(switch_alias, "--alias", name("alias"), "--source", source, "--target", target, *more)

    return do


def test_the_alias_moves_and_the_undo_command_is_printed(make_index, name, switch, admin):
    old, new = make_index("old", docs=10, alias=name("alias")), make_index("new", docs=11)
    outcome = switch(old, new)
    assert outcome.code == 0
    assert list(admin("GET", f"/_alias/{name('alias')}")) == [new]
    assert f"--alias {name('alias')} --source {new} --target {old}" in outcome.last
    assert outcome.result["documents"] == 11
