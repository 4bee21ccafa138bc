"""A node crashes (SIGKILL) and comes back during each step: alone, and as one of three."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import sandbox
from conftest import Reader, wait_until
from fault_proxy import Exchange, Fault, before

from .driver import OLD, Run, World, add_roles

PATIENCE = {"RETRY_SECONDS": "150", "WAIT_SECONDS": "150"}  # a node is back in 10 s, on a busy machine in 60
FEW_AT_A_TIME = {"REQUESTS_PER_SECOND": "3"}  # copies 30 documents, then waits 10 s for the other ten
Nodes = list[sandbox.OpenSearch]
pytestmark = pytest.mark.nodes


def revive(nodes: Nodes) -> None:
    """Start what is down, and wait until every copy of every shard is there."""
    for node in nodes:
        if not node.process or node.process.poll() is not None:
            node.start()
    for node in nodes:
        node.wait()
    status = "green" if len(nodes) > 1 else "yellow"
    query = f"wait_for_nodes={len(nodes)}&wait_for_status={status}&wait_for_no_relocating_shards=true&timeout=100s"
    nodes[0].request("GET", f"/_cluster/health?{query}")


def await_run(world: World, process: subprocess.Popen[str]) -> Run:
    return world.finish(process, timeout=280)


def logs_of(world: World) -> str:
    return "".join(path.read_text() for path in (world.folder / "logs").glob("refresh-*.log"))


def throttled(exchange: Exchange) -> None:
    """Let a delete-by-query wait 10 s after its first 20 documents, as REQUESTS_PER_SECOND does for a copy."""
    slow = exchange.handler.path.replace("scroll_size=5000", "scroll_size=20&requests_per_second=2")
    assert slow != exchange.handler.path
    exchange.handler.path = slow
    exchange.pass_on()


def half_done(world: World, action: str, kind: str) -> int:
    """Wait until a task on primary has worked on some documents, and return how many."""

    def look() -> int:
        nodes = world.admin("GET", f"/_tasks?actions=*{action}&detailed=true")["nodes"].values()
        tasks = [task for node in nodes for task in node["tasks"].values() if world.primary in task["description"]]
        return sum(task["status"][kind] for task in tasks)

    done: int = wait_until(look, 90)
    assert done < len(OLD)
    return done


# --- one node ---------------------------------------------------------------------------------------------------------


class Witness(Reader):
    """An outage is no error here, but it is recorded."""

    def __init__(self, endpoint: str, alias: str) -> None:
        super().__init__(endpoint, alias, "n", outage_is_an_error=False)
        self.outages: list[str] = []

    def outage(self, text: str) -> None:
        self.outages.append(text[:300])
        super().outage(text)


@pytest.fixture(scope="module")
def alone(box: sandbox.Sandbox) -> Iterator[sandbox.OpenSearch]:
    with sandbox.cluster(1) as [node]:
        add_roles(node)
        yield node


@pytest.fixture
def node(alone: sandbox.OpenSearch) -> sandbox.OpenSearch:
    revive([alone])
    return alone


@pytest.fixture
def world(node: sandbox.OpenSearch, world_on: Callable[[sandbox.Server], World]) -> Iterator[World]:
    """A world on a node of its own, since others share that of the session."""
    made = world_on(node)
    made.reader = Witness(node.endpoint, made.alias)
    made.proxy.watch = closed_while_down
    with made:
        yield made
    revive([node])
    node.request("DELETE", f"/{made.primary},{made.secondary}")


def closed_while_down(exchange: Exchange) -> bool:
    try:
        exchange.pass_on()
    except requests.RequestException:
        exchange.drop()
    return True


def restarted(node: sandbox.OpenSearch, when: str, answers: list[int]) -> Fault:
    """Kill the node before or after it has carried the request out, start it again, lose the answer."""

    def fault(exchange: Exchange) -> None:
        answers.append(exchange.forward().status_code if when == "after" else 0)
        node.restart()
        exchange.drop()

    return fault


def assert_outage_seen(world: World, run: Run) -> None:
    """The node was away while the reader asked and the run worked."""
    assert isinstance(world.reader, Witness)
    assert world.reader.outages
    assert "trying again" in run.log


def test_a_copy_that_vanished_with_its_node_fails_and_the_next_run_heals(world, node):
    process = world.start(**FEW_AT_A_TIME, **PATIENCE)
    copied = half_done(world, "reindex", "created")
    node.restart()
    run = await_run(world, process)
    node.wait()
    message = rf"copying {world.primary} to {world.secondary}: task \S+ disappeared .node restart.*run the step again"
    world.expect(run, code=1, message=rf"(?s){message}.*FAILED at: 1 copy")
    assert_outage_seen(world, run)
    assert len(world.documents(world.secondary)) == copied
    world.heal()


@pytest.mark.long
def test_an_emptying_that_vanished_with_its_node_fails_and_the_next_run_heals(world, node):
    world.proxy.on("POST", "/_delete_by_query", throttled)
    process = world.start(**PATIENCE)
    deleted = half_done(world, "byquery", "deleted")
    node.restart()
    run = await_run(world, process)
    node.wait()
    message = rf"emptying {world.primary}: task \S+ disappeared .node restart.*run the step again"
    world.expect(run, code=1, message=rf"(?s){message}.*FAILED at: 3 load")
    assert_outage_seen(world, run)
    assert len(world.documents(world.primary)) == len(OLD) - deleted
    assert world.behind_alias() == [world.secondary]
    world.heal()


POINTS = {
    "marker": ("PUT", "secondary/_mapping", 0), "settings": ("PUT", "secondary/_settings", 0),
    "copy": ("POST", "/_reindex", 0), "switch": ("POST", "/_aliases", 0), "empty": ("POST", "/_delete_by_query", 0),
    "load": ("POST", "/_bulk", 2), "restore": ("PUT", "primary/_settings", 1), "switch back": ("POST", "/_aliases", 1),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", POINTS)
def test_goes_on_when_the_node_is_back(world, node, point, when):
    method, path, skip = POINTS[point]
    answers: list[int] = []
    world.proxy.on(method, path, restarted(node, when, answers), skip=skip)
    run = await_run(world, world.start(**PATIENCE))
    world.expect(run, code=0)
    assert answers == [0 if when == "before" else 200]
    assert_outage_seen(world, run)
    # only what was not carried out is sent again; a copy and a load are repeated, their documents have the same ids
    assert len(world.proxy.seen("POST", "/_aliases")) == 2 + ("switch" in point and when == "before")
    if point == "load":
        bodies = world.proxy.seen("POST", "/_bulk")
        assert len(set(bodies)) < len(bodies)
    world.assert_done()


@pytest.mark.long
@pytest.mark.parametrize(
    ("step", "following"), [("1 copy", "2 switch"), ("2 switch", "3 load"), ("3 load", "4 switch")]
)
def test_node_away_between_steps(world, node, step, following):
    process = world.start(STEP_DELAY_SECONDS="8", OPENSEARCH_ENDPOINT=node.endpoint)
    wait_until(lambda: f"<== {step}" in logs_of(world), 90)
    node.kill()
    assert f"==> {following}" not in logs_of(world)
    run = await_run(world, process)
    revive([node])
    message = rf"GET /\S+ at {re.escape(node.endpoint)}: .*refused"
    world.expect(run, code=1, message=rf"(?s){message}.*FAILED at: {following}")
    assert_outage_seen(world, run)
    world.heal()


def is_whole(world: World, index: str) -> bool:
    """Say whether each shard of an index has a copy, and the node can be asked at all."""
    with contextlib.suppress(RuntimeError, requests.RequestException):
        return bool(world.admin("GET", f"/_cluster/health/{index}")["status"] != "red")
    return False


@pytest.mark.long
def test_a_standby_that_has_lost_its_data_is_recreated(world, node):
    world.go_the_cheap_way()
    uuid = world.admin("GET", f"/{world.secondary}")[world.secondary]["settings"]["index"]["uuid"]
    node.kill()
    shutil.rmtree(node.run / "data" / "nodes" / "0" / "indices" / uuid / "0")
    node.start()
    wait_until(lambda: is_whole(world, world.primary), 90)
    assert not is_whole(world, world.secondary)
    run = await_run(world, world.start(**PATIENCE))
    world.expect(run, code=0)
    assert f"deleting all documents from {world.secondary}" in run.log
    assert (world.behind_alias(), is_whole(world, world.secondary)) == ([world.secondary], True)
    world.assert_done()


# --- one of three -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(box: sandbox.Sandbox) -> Iterator[Nodes]:
    with sandbox.cluster(3) as nodes:
        add_roles(nodes[0])
        yield nodes


@pytest.fixture
def wide(
    three: Nodes, box: sandbox.Sandbox, name: Callable[[str], str], environment: dict[str, str], tmp_path: Path
) -> Iterator[Wide]:
    revive(three)
    with Wide(three, sandbox.Sandbox(three[0], box.environment), name, environment, tmp_path) as made:
        made.spread()
        yield made
    revive(three)
    three[0].request("DELETE", f"/{made.primary},{made.secondary}")


class Wide(World):
    """A world on three nodes: one holds the primary copy of primary alone, one a copy of secondary alone,
    one a copy of both.

    The reader and the scripts talk to a node that stays; `moves` are the indices that readers were moved to, each with
    the copies that its shard had at that moment.
    """

    def __init__(self, nodes: Nodes, *args: Any) -> None:
        super().__init__(*args)
        self.nodes = {node.name: node for node in nodes}
        self.moves: list[tuple[str, int]] = []
        self.proxy.watch = self.record_move

    def record_move(self, exchange: Exchange) -> bool:
        if exchange.handler.command == "POST" and exchange.handler.path.startswith("/_aliases"):
            actions = json.loads(exchange.body)["actions"]
            [index] = [action["add"]["index"] for action in actions if "add" in action]
            self.moves.append((index, len(self.copies(index))))
        return False

    def copies(self, index: str) -> dict[str, str]:
        """Return the names of the nodes that hold a started copy, by `p` and `r`."""
        shards = self.admin("GET", f"/_cat/shards/{index}?format=json")
        return {shard["prirep"]: shard["node"] for shard in shards if shard["state"] == "STARTED"}

    def holder(self, index: str) -> str:
        """Return the node that holds a copy of this index and none of the other."""
        other = self.secondary if index == self.primary else self.primary
        [name] = set(self.copies(index).values()) - set(self.copies(other).values())
        return name

    def spread(self) -> None:
        self.settle()
        victim, held = self.copies(self.primary)["p"], set(self.copies(self.secondary).values())
        if victim in held:
            [free] = set(self.nodes) - held
            move = {"index": self.secondary, "shard": 0, "from_node": victim, "to_node": free}
            self.admin("POST", "/_cluster/reroute", {"commands": [{"move": move}]})
            self.settle()
        assert self.holder(self.primary) == victim

    def settle(self) -> None:
        query = "wait_for_status=green&wait_for_no_relocating_shards=true&wait_for_no_initializing_shards=true"
        self.admin("GET", f"/_cluster/health?{query}&timeout=100s")

    def talk_to(self, name: str) -> None:
        """Let the scripts, the reader and the test talk to this node."""
        self.assert_reader_saw_nothing_odd()
        node = self.nodes[name]
        self.proxy.target, self.admin = node.endpoint, node.request
        self.reader = Reader(node.endpoint, self.alias, "n")
        self.reader.start()

    def lose(self, name: str) -> None:
        """Kill a node, and wait until the others have noticed."""
        self.nodes[name].kill()

        def noticed() -> bool:
            with contextlib.suppress(RuntimeError):  # the others may be electing another manager
                return bool(self.admin("GET", "/_cluster/health")["number_of_nodes"] == len(self.nodes) - 1)
            return False

        wait_until(noticed, 90)

    def scrolled(self) -> str:
        """Return the node whose copy the running task reads from."""
        stats = self.admin("GET", "/_nodes/stats/indices/search")["nodes"].values()
        [name] = [node["name"] for node in stats if node["indices"]["search"]["scroll_current"]]
        return name

    def revive(self) -> None:
        revive(list(self.nodes.values()))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_of_three_away_during_the_copy(wide):
    wide.talk_to(wide.holder(wide.secondary))
    process = wide.start(**FEW_AT_A_TIME, **PATIENCE)
    half_done(wide, "reindex", "created")
    wide.lose(wide.scrolled())
    run = await_run(wide, process)
    message = rf"copying {wide.primary} to {wide.secondary}: .*"
    wide.expect(run, code=1, message=rf"(?s){message}.*FAILED at: 1 copy")
    assert wide.moves == []
    wide.revive()
    wide.heal()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_of_three_away_during_the_emptying(wide):
    wide.talk_to(wide.holder(wide.secondary))
    wide.proxy.on("POST", "/_delete_by_query", throttled)
    process = wide.start(**PATIENCE)
    half_done(wide, "byquery", "deleted")
    wide.lose(wide.scrolled())
    run = await_run(wide, process)
    wide.expect(run, code=1, message=rf"(?s)emptying {wide.primary}: .*FAILED at: 3 load")
    assert wide.moves == [(wide.secondary, 2)]
    wide.revive()
    wide.heal()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_of_three_restarts_during_the_load(wide):
    victim = wide.holder(wide.primary)
    wide.talk_to(wide.holder(wide.secondary))
    rule = wide.proxy.on("POST", "/_bulk", before(wide.nodes[victim].restart), skip=2)
    run = await_run(wide, wide.start(**PATIENCE))
    wide.expect(run, code=0)
    assert rule.seen > 2
    assert wide.copies(wide.primary)["p"] != victim
    assert wide.moves == [(wide.secondary, 2), (wide.primary, 2)]
    wide.assert_done()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_of_three_away_since_the_load(wide):
    victim = wide.holder(wide.primary)
    wide.talk_to(wide.holder(wide.secondary))
    wide.proxy.on("POST", "/_bulk", before(wide.nodes[victim].kill), skip=2)
    run = await_run(wide, wide.start(RETRY_SECONDS="150", WAIT_SECONDS="3"))
    message = rf"index {wide.primary}: fewer than 2 active copies in 1 of 1 shards after 3 s.*run again"
    wide.expect(run, code=4, message=rf"(?s){message}.*FAILED at: 4 switch")
    assert wide.moves == [(wide.secondary, 2)]
    wide.revive()
    wide.heal()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nth", [0, 1], ids=["switch", "switch back"])
def test_a_switch_waits_for_the_copies_of_a_node_that_restarts(wide, nth):
    target, other = [(wide.secondary, wide.primary), (wide.primary, wide.secondary)][nth]
    victim = wide.holder(target)
    wide.talk_to(wide.holder(other))
    rule = wide.proxy.on("GET", f"/_cluster/health/{other},{target}", before(lambda: wide.lose(victim)))
    process = wide.start(**PATIENCE)
    wait_until(lambda: rule.seen >= 3, 240)
    assert len(wide.moves) == nth
    wide.nodes[victim].start()
    run = await_run(wide, process)
    wide.expect(run, code=0)
    assert wide.moves == [(wide.secondary, 2), (wide.primary, 2)]
    wide.assert_done()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("nth", [0, 1], ids=["switch", "switch back"])
def test_the_cluster_manager_restarts_during_a_switch(wide, nth):
    [manager] = [row["node"] for row in wide.admin("GET", "/_cat/cluster_manager?format=json")]
    wide.talk_to(next(name for name in wide.nodes if name != manager))

    def fault(exchange: Exchange) -> None:
        wide.record_move(exchange)
        wide.nodes[manager].restart()
        exchange.pass_on()

    rule = wide.proxy.on("POST", "/_aliases", fault, skip=nth)
    run = await_run(wide, wide.start(**PATIENCE))
    assert rule.seen > nth
    assert [row["node"] for row in wide.admin("GET", "/_cat/cluster_manager?format=json")] != [manager]
    assert [copies for _, copies in wide.moves[: nth + 1]] == [2] * (nth + 1)
    if run.code:  # moved, but the manager that crashed was among those that had to acknowledge it
        wide.expect(run, code=1, message="not every node acknowledged the switch")
        wide.revive()
        wide.heal()
    else:
        wide.assert_done()
