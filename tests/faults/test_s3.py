"""S3 fails, slows down or changes while a whole refresh reads from it."""

from __future__ import annotations

import base64
import gzip
import random
import re

import pytest
import sandbox
from fault_proxy import Exchange, Fault, after, answer, reset_in_answer

from .driver import NEW_ROWS, World, changes_state

LISTING = "list-type=2"
LOOKS = 2  # an object that is not whole in its head is read twice before it is loaded: in step 0, and by the load
LARGE_CELL_BYTES = 22_500  # 30,000 characters: an object of 15 rows takes two reads of 256 KiB, packed too
ONE_MORE = {"d.csv": b"n,half,word\n200,100.0,more\n"}


def s3_error(status: int, code: str, text: str) -> Fault:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{text}</Message></Error>'
    return answer(status, body)


SLOW_DOWN = s3_error(503, "SlowDown", "Please reduce your request rate.")
EXPIRED = "The provided token has expired."


def large(first: int, count: int) -> bytes:
    """Rows that do not compress well, with a quoted newline each."""
    cells = random.Random(first)
    numbers = range(first, first + count)
    rows = [f'{n},{n / 2},"{n}\n{base64.b64encode(cells.randbytes(LARGE_CELL_BYTES)).decode()}"\n' for n in numbers]
    return ("n,half,word\n" + "".join(rows)).encode()


def put_large(world: World) -> None:
    last = NEW_ROWS - 30
    world.objects = {"a.csv": large(100, 15), "b.csv.gz": gzip.compress(large(115, 15)), "c.csv": large(130, last)}
    world.put(world.objects)


def changed(world: World) -> list[str]:
    """Return the requests of all runs so far that change something in the cluster."""
    return [f"{method} {path}" for method, path, _ in world.proxy.requests if changes_state(method, path)]


def closed_in_answer(upto: int) -> Fault:
    """Close the connection in an orderly way after some bytes of the answer."""

    def fault(exchange: Exchange) -> None:
        exchange.pass_on(upto)
        exchange.drop()

    return fault


def watch_reads(world: World, key: str) -> list[tuple[int, str]]:
    """Return a list that fills up with first byte and `If-Match` of each read of an object that no rule takes."""
    reads: list[tuple[int, str]] = []

    def record(exchange: Exchange) -> bool:
        if exchange.handler.path.endswith(key):
            headers = exchange.handler.headers
            reads.append((int(re.match(r"bytes=(\d+)-", headers["Range"])[1]), headers["If-Match"]))
        return False

    world.s3_proxy.watch = record
    return reads


def replace_by(world: World, key: str, body: bytes) -> None:
    world.objects[key] = body
    world.put({key: body})


# --- a connection that breaks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "offset", "kind"),
    [
        ("b.csv.gz", 300_000, "reset"),
        *[
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                ("a.csv", 0, "reset"), ("a.csv", 100_000, "reset"), ("a.csv", -1, "closed"), ("b.csv.gz", 1, "reset"),
                ("b.csv.gz", 300_000, "closed"), ("b.csv.gz", -1, "closed"),
            ]
        ],
    ],
)  # fmt: skip
def test_an_object_whose_connection_breaks_is_read_on_from_there(world, key, offset, kind):
    put_large(world)
    reads = watch_reads(world, key)
    fault = {"reset": reset_in_answer, "closed": closed_in_answer}[kind](offset)
    rule = world.s3_proxy.on("GET", re.escape(key), fault, skip=LOOKS)
    run = world.refresh()
    world.expect(run, code=0)
    assert rule.seen == LOOKS + 2
    assert re.search(rf"{re.escape(key)}, byte [\d,]+: .*; resuming the read", run.log)
    first, tag = reads[-1]
    sent = offset % len(world.objects[key])
    assert first == sent if kind == "closed" else first <= sent  # a reset may overtake what was sent
    assert [tag] * len(reads) == [tag for _, tag in reads]
    world.assert_done()


# --- objects that change ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_an_object_that_is_replaced_while_it_is_read_fails_the_load(world):
    put_large(world)

    def replaced(exchange: Exchange) -> None:
        exchange.pass_on(300_000)
        replace_by(world, "a.csv", large(300, 15))
        exchange.reset()

    world.s3_proxy.on("GET", r"a\.csv", replaced, skip=LOOKS)
    run = world.refresh()
    world.expect(run, code=1, message=r"a\.csv has been replaced since it was listed; run again")
    assert "FAILED at: 3 load" in run.err
    world.heal()


@pytest.mark.long
def test_an_object_that_appears_between_step_0_and_the_load_is_loaded(world):
    rule = world.s3_proxy.on("GET", LISTING, after(lambda: replace_by(world, "d.csv", ONE_MORE["d.csv"])))
    run = world.refresh()
    world.expect(run, code=0)
    assert rule.seen == 3
    assert "4 objects" in run.log
    world.assert_done()


# --- refused by S3 ----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("path", "skip"), [(LISTING, 2), (r"c\.csv", LOOKS)])
def test_an_s3_that_asks_for_time_gets_it(world, path, skip):
    put_large(world)
    rule = world.s3_proxy.on("GET", path, SLOW_DOWN, skip=skip, times=2)
    world.expect(world.refresh(), code=0)
    assert rule.seen >= skip + 3
    world.assert_done()


@pytest.mark.long
@pytest.mark.parametrize(
    ("path", "skip", "step"), [(LISTING, 0, "check the load"), (r"c\.csv", LOOKS, "3 load")]
)  # fmt: skip
def test_an_s3_that_stays_too_busy_fails_the_run(world, path, skip, step):
    put_large(world)
    rule = world.s3_proxy.on("GET", path, SLOW_DOWN, skip=skip, times=None)
    run = world.refresh(RETRY_SECONDS="5")
    place = f"s3://{sandbox.BUCKET}/{world.prefix}{'' if path == LISTING else 'c.csv'}"
    world.expect(run, code=1, message=rf"{place}.*SlowDown.*Please reduce your request rate")
    assert f"FAILED at: {step}" in run.err
    assert rule.seen > skip + 3
    assert bool(changed(world)) == (step == "3 load")
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize(
    ("status", "path", "skip", "step"),
    [
        (400, LISTING, 0, "check the load"), (400, r"b\.csv", 1, "3 load"), (403, r"c\.csv", LOOKS, "3 load"),
        (400, LISTING, 2, "3 load"),
    ],
)  # fmt: skip
def test_credentials_that_expire_fail_the_run(world, status, path, skip, step):
    put_large(world)
    world.s3_proxy.on("GET", path, s3_error(status, "ExpiredToken", EXPIRED), skip=skip, times=None)
    run = world.refresh()
    key = {LISTING: "", r"b\.csv": r"b\.csv\.gz", r"c\.csv": r"c\.csv"}[path]
    world.expect(run, code=1, message=rf"s3://{sandbox.BUCKET}/{world.prefix}{key}: ExpiredToken: {EXPIRED}")
    assert f"FAILED at: {step}" in run.err
    assert bool(changed(world)) == (step == "3 load")
    world.heal()
