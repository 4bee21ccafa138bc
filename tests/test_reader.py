"""The reader that watches refreshes: it notices what must never be, or its silence would prove nothing."""

from __future__ import annotations

import time

import pytest
from conftest import NUMBER, Reader

pytestmark = pytest.mark.quick

ROUNDS = 100  # on a busy machine a state of 40 ms often passes between two searches


@pytest.fixture
def reader(box, make_index, name):
    make_index("old", NUMBER, docs=3, alias=name("alias"))
    watching = Reader(box.server.endpoint, name("alias"), "n")
    watching.start()
    while not watching.seen:
        time.sleep(0.01)
    yield watching
    watching.finish()


@pytest.fixture
def repeat(admin, name):
    """Send changes of the alias, each list of actions in a request of its own, again and again until it is noticed."""

    def send(*requests, until):
        for _ in range(ROUNDS):
            for actions in requests:
                body = [{kind: {"index": name(index), "alias": name("alias")}} for kind, index in actions]
                admin("POST", "/_aliases", {"actions": body})
            if until():
                return True
        return False

    return send


def test_an_alias_that_is_away_between_two_requests_is_noticed(reader, make_index, repeat):
    make_index("new", NUMBER, docs=4)
    assert repeat([("remove", "old")], [("add", "new")], [("add", "old")], [("remove", "new")],
                  until=lambda: any("index_not_found_exception" in error for error in reader.errors))  # fmt: skip


def test_an_alias_that_is_on_two_indices_between_two_requests_is_noticed(reader, make_index, repeat):
    make_index("new", NUMBER, docs=4)
    assert repeat([("add", "new")], [("remove", "old")], [("add", "old")], [("remove", "new")],
                  until=lambda: (7, 9.0) in reader.seen)  # fmt: skip


def test_an_empty_index_that_is_live_for_one_request_is_noticed(reader, make_index, repeat):
    make_index("new", NUMBER)
    assert repeat([("remove", "old"), ("add", "new")], [("remove", "new"), ("add", "old")],
                  until=lambda: (0, 0.0) in reader.seen)  # fmt: skip
