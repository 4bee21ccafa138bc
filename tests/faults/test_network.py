"""A network that fails during a refresh: refused and broken connections, gateways, slow and lost answers, a 401."""

from __future__ import annotations

import re
import socket
import time
from urllib.parse import urlsplit

import pytest
import sandbox
from conftest import OWN_PASSWORD, wait_until
from fault_proxy import (
    Exchange, Fault, Rule, after, answer, delayed, edited_items, gateway, lost_answer, reset_before_answer,
    reset_in_answer, reset_in_request,
)  # fmt: skip

from .driver import World

# What is disturbed, in the order of a refresh: method, path, how many like it come before, the step it belongs to.
POINTS = {
    "the first request": ("GET", r"/(?!\w)", 0, "check where readers are"),
    "the marker of the copy": ("PUT", "/secondary/_mapping", 0, "1 copy"),
    "the settings of the copy": ("PUT", "/secondary/_settings", 0, "1 copy"),
    "the start of the copy": ("POST", "/_reindex", 0, "1 copy"),
    "a poll of the copy": ("GET", "/_tasks/", 0, "1 copy"),
    "the settings after the copy": ("PUT", "/secondary/_settings", 1, "1 copy"),
    "the end of the copy's marker": ("PUT", "/secondary/_mapping", 1, "1 copy"),
    "the first switch": ("POST", "/_aliases", 0, "2 switch"),
    "the start of the emptying": ("POST", "/primary/_delete_by_query", 0, "3 load"),
    "a bulk request": ("POST", "/primary/_bulk", 2, "3 load"),
    "the settings after the load": ("PUT", "/primary/_settings", 1, "3 load"),
    "the count after the load": ("GET", "/primary/_count", 10, "3 load"),
    "the second switch": ("POST", "/_aliases", 1, "4 switch"),
}


FAULTS: dict[str, Fault] = {
    "reset before the request": Exchange.reset,
    "reset in the request": reset_in_request,
    "reset before the answer": reset_before_answer,
    "reset in the answer": reset_in_answer(),
    "closed without an answer": lost_answer,
    "502": gateway("502 Bad Gateway"),
    "503": gateway("503 Service Temporarily Unavailable"),
    "504": gateway("504 Gateway Time-out", carried_out=True),
}
DELICATE = [  # what must not be repeated blindly meets each of the faults, all else some
    "the start of the copy", "the first switch", "the start of the emptying", "a bulk request", "the second switch",
]  # fmt: skip
SOME = ("reset before the answer", "504")
STAYS = ("a bulk request", "the count after the load")  # in the short form; the second one has the largest number
EARLY = ("reset before the request", "reset in the request")  # before the body has been read
BROKEN = "(Connection reset by peer|Broken pipe|Remote end closed connection)"
SHORT_ITEMS = edited_items(lambda items: items[:-1])


def path_of(world: World, point: str) -> str:
    """Return the path with this world's names."""
    names = {"primary": world.primary, "secondary": world.secondary, "alias": world.alias}
    return re.sub(r"(?<=/)(primary|secondary|alias)\b", lambda match: names[match[0]], POINTS[point][1])


def disturb(world: World, point: str, fault: str | Fault, *, times: int | None = 1) -> Rule:
    method, _, skip, _ = POINTS[point]
    early = fault in EARLY
    action = FAULTS[fault] if isinstance(fault, str) else fault
    return world.proxy.on(method, f"^{path_of(world, point)}", action, skip=skip, times=times, early=early)


def took_place(rule: Rule) -> bool:
    return rule.seen > rule.skip


def listens(world: World) -> bool:
    parts = urlsplit(world.proxy.endpoint)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def outage(world: World, seconds: float) -> Fault:
    """Break the connection off; for a while the port is closed, and what is open already is reset when it is used."""

    def fault(exchange: Exchange) -> None:
        end = time.monotonic() + seconds

        def gone(other: Exchange) -> bool:
            if time.monotonic() > end:
                return False
            other.reset()
            return True

        world.proxy.watch = gone
        world.proxy.refuse_connections(seconds)
        exchange.reset()

    return fault


# --- what passes ------------------------------------------------------------------------------------------------------


def test_a_refresh_gets_through_one_of_each_fault(world):
    rules = [
        disturb(world, "the marker of the copy", "reset in the request"),
        disturb(world, "the settings of the copy", "502"),
        disturb(world, "the start of the copy", "reset before the answer"),
        disturb(world, "a poll of the copy", "reset in the answer"),
        disturb(world, "the second switch", "reset before the request"),  # before the rule that takes the first
        disturb(world, "the first switch", "closed without an answer"),
        disturb(world, "the start of the emptying", "closed without an answer"),
        disturb(world, "a bulk request", SHORT_ITEMS),
        disturb(world, "the settings after the load", "504"),
    ]
    world.expect(world.refresh(), code=0)
    assert [rule.path.pattern for rule in rules if not took_place(rule)] == []
    world.assert_done()


@pytest.mark.long
@pytest.mark.parametrize(
    ("point", "fault"),
    [(point, fault) for point in POINTS for fault in FAULTS if point in DELICATE or fault in SOME],
)
def test_a_fault_that_passes_is_got_over(world, point, fault):
    rule = disturb(world, point, fault)
    run = world.refresh()
    world.expect(run, code=0)
    assert took_place(rule)
    what = f"{POINTS[point][0]} {path_of(world, point)}"
    assert re.search(rf"WARNING .*{what}.*; (trying again|checking whether|checking where)", run.log), run.log
    world.assert_done()


@pytest.mark.long
@pytest.mark.parametrize("point", ["the first switch", "a bulk request", "the second switch"])
def test_a_request_that_arrives_after_it_was_sent_again_changes_nothing(world, point):
    arrived: list[str] = []

    def late(exchange: Exchange) -> None:
        exchange.drop()
        wait_until(lambda: [body for _, _, body in world.proxy.requests].count(exchange.body) > 1)
        time.sleep(0.5)  # after the second sending was carried out, before the next switch
        arrived.append(exchange.forward().text)

    disturb(world, point, late)
    world.expect(world.refresh(), code=0)
    wait_until(lambda: bool(arrived))
    assert re.search("aliases_not_found_exception|version_conflict_engine_exception", arrived[0])
    world.assert_done()


@pytest.mark.long
@pytest.mark.parametrize("point", ["a poll of the copy", "a bulk request", "the second switch"])
def test_an_outage_during_a_step_is_waited_for(world, point):
    rule = disturb(world, point, outage(world, 3))
    run = world.refresh()
    world.expect(run, code=0)
    assert took_place(rule)
    assert re.search(f"(Connection refused|{BROKEN}).*(trying again|checking where)", run.log)
    world.assert_done()


@pytest.mark.long
def test_an_outage_at_the_start_of_a_step_is_waited_for(world):
    """The connection of the step that runs stays open: it ends well, and the next one finds the port closed."""
    rule = disturb(world, "the end of the copy's marker", after(lambda: world.proxy.refuse_connections(3.5)))
    run = world.refresh()
    world.expect(run, code=0)
    assert took_place(rule)
    assert re.search(r"WARNING switch_alias: .*Connection refused.*trying again", run.log)
    world.assert_done()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_slow_network_is_only_slow(world):
    rule = world.proxy.on(".*", "", delayed(2), times=None)
    began = time.monotonic()
    world.expect(world.finish(world.start(), timeout=800), code=0)
    assert rule.seen > 50
    assert time.monotonic() - began > 100
    world.assert_done()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("point", ["a bulk request", "the first switch"])
def test_an_answer_that_takes_longer_than_is_waited_for_is_got_over(world, point):
    def too_slow(exchange: Exchange) -> None:
        response = exchange.forward()
        time.sleep(130)  # the scripts wait for two minutes
        exchange.reply(response.status_code, response.content)

    rule = disturb(world, point, too_slow)
    run = world.finish(world.start(RETRY_SECONDS="300"), timeout=600)
    world.expect(run, code=0)
    assert took_place(rule)
    assert re.search(rf"{path_of(world, point)}.*timed out", run.log)
    world.assert_done()


# --- what does not pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        pytest.param(point, fault, marks=() if fault == "503" and point in STAYS else pytest.mark.long)
        for point in POINTS for fault in ("503", "reset before the request") if fault == "503" or point in DELICATE
    ],
)  # fmt: skip
def test_a_fault_that_stays_ends_the_run_with_the_reason(world, point, fault):
    method, _, _, step = POINTS[point]
    rule = disturb(world, point, fault, times=None)
    run = world.refresh(RETRY_SECONDS="3")
    reason = "503 Service Temporarily Unavailable" if fault == "503" else BROKEN
    world.expect(run, code=1, message=rf"{method} {path_of(world, point)}.*{reason}")
    assert f"FAILED at: {step}" in run.err
    assert took_place(rule)
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize("fault", ["closed without an answer", "504"])
@pytest.mark.parametrize("point", ["the start of the copy", "the start of the emptying", "a bulk request"])
def test_a_request_whose_answers_are_all_lost_ends_the_run(world, point, fault):
    disturb(world, point, fault, times=None)
    world.proxy.on("GET", r"^/_tasks\?", answer(200, {"nodes": {}}), times=None)  # they are over before one looks
    world.expect(world.refresh(RETRY_SECONDS="3"), code=1, message=f"POST {path_of(world, point)}")
    assert len(world.proxy.seen("POST", path_of(world, point))) > 1
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize("fault", ["closed without an answer", "504"])
def test_switches_whose_answers_are_all_lost_are_seen_to_have_taken_place(world, fault):
    world.proxy.on("POST", "^/_aliases", FAULTS[fault], times=None)
    run = world.refresh()
    world.expect(run, code=0)
    assert len(world.proxy.seen("POST", "^/_aliases")) == 2
    assert run.log.count("checking where alias") == 2
    world.assert_done()


@pytest.mark.long
def test_answers_that_stay_short_of_items_end_the_run(world):
    rule = world.proxy.on("POST", "/_bulk", SHORT_ITEMS, times=None)
    run = world.refresh(RETRY_SECONDS="3")
    world.expect(run, code=1, message=f"{world.primary}: .*documents")
    assert "9 results for 10 documents" in run.log
    assert rule.seen > 3
    world.heal()


@pytest.mark.long
def test_a_cluster_that_is_not_there_is_said_to_be_so_soon(world):
    world.proxy.refuse_connections(25)
    began = time.monotonic()
    world.expect(world.refresh(RETRY_SECONDS="300"), code=1, message=f"{world.proxy.endpoint}: .*Connection refused")
    assert time.monotonic() - began < 60
    wait_until(lambda: listens(world))
    world.heal()


@pytest.mark.long
def test_a_cluster_that_does_not_answer_is_said_to_be_so_soon(world):
    rule = disturb(world, "the first request", delayed(20), times=None)
    began = time.monotonic()
    run = world.refresh(RETRY_SECONDS="300")
    world.expect(run, code=1, message=f"{world.proxy.endpoint}: .*timed out")
    assert time.monotonic() - began < 60
    assert took_place(rule)
    world.heal()


@pytest.mark.long
def test_an_outage_that_outlasts_retry_seconds_ends_the_run(world):
    disturb(world, "a bulk request", outage(world, 25))
    run = world.refresh(RETRY_SECONDS="3")
    world.expect(run, code=1, message=f"POST /{world.primary}/_bulk at {world.proxy.endpoint}: .*Connection refused")
    wait_until(lambda: listens(world))
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize(
    "point", ["the start of the copy", "a poll of the copy", "a bulk request", "the second switch"]
)
def test_a_user_who_is_no_longer_accepted_ends_the_run_and_is_named(world, point):
    rule = disturb(world, point, answer(401, "Unauthorized"), times=None)
    what = f"{POINTS[point][0]} {path_of(world, point)}"
    message = rf"{what}\S*: 401 Unauthorized; the cluster rejected user {sandbox.USER}"
    world.expect(world.refresh(), code=1, message=message)
    assert took_place(rule)
    world.heal()


@pytest.mark.long
@pytest.mark.skipif(not sandbox.SECURE, reason="no users without the security plugin")
@pytest.mark.parametrize("point", ["the start of the copy", "a bulk request"])
def test_a_password_that_is_changed_during_the_run_ends_it(world, point, account):
    def change(password: str) -> None:
        account.server.add_user(account.user, password)

    rule = disturb(world, point, after(lambda: change("Another-0ne-From-Now-On")))
    try:
        run = world.refresh(**account.login)
    finally:
        change(OWN_PASSWORD)
    world.expect(run, code=1, message=f"401 Unauthorized; the cluster rejected user {account.user}: check")
    assert took_place(rule)
    world.heal(**account.login)
