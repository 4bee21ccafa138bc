"""The reader that watches refreshes: it notices what must never be, or its silence would prove nothing."""

from __future__ import annotations

import time

import pytest
from conftest import NUMBER, Reader

pytestmark = pytest.mark.quick

TIMES = 5  # on a busy machine a state of 40 ms may pass between two searches, but not each time


@pytest.fixture
def reader(box, make_index, name):
    make_index("old", NUMBER, docs=3, alias=name("alias"))
    watching = Reader(box.server.endpoint, name("alias"), "n")
    watching.start()
    while not watching.seen:
        time.sleep(0.01)
    yield watching
    watching.finish()


def change(admin, name, *actions):
    """Send each change of the alias as a request of its own, one right after the other."""
    for kind, index in actions:
        admin("POST", "/_aliases", {"actions": [{kind: {"index": name(index), "alias": name("alias")}}]})


def test_an_alias_that_is_away_between_two_requests_is_noticed(reader, make_index, name, admin):
    make_index("new", NUMBER, docs=4)
    for _ in range(TIMES):
        change(admin, name, ("remove", "old"), ("add", "new"), ("add", "old"), ("remove", "new"))
    reader.finish()
    assert any("index_not_found_exception" in error for error in reader.errors)


def test_an_alias_that_is_on_two_indices_between_two_requests_is_noticed(reader, make_index, name, admin):
    make_index("new", NUMBER, docs=4)
    for _ in range(TIMES):
        change(admin, name, ("add", "new"), ("remove", "old"), ("add", "old"), ("remove", "new"))
    assert (7, 9.0) in reader.finish()


def test_an_empty_index_that_is_live_for_one_request_is_noticed(reader, make_index, name, admin):
    make_index("new", NUMBER)
    alias = name("alias")
    for source, target in (("old", "new"), ("new", "old")) * TIMES:
        remove, add = ({"index": name(index), "alias": alias} for index in (source, target))
        admin("POST", "/_aliases", {"actions": [{"remove": remove}, {"add": add}]})
    assert (0, 0.0) in reader.finish()
