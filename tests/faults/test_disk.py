"""The disk of the loader: full, without permission, gone; and an output without a reader."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import RUNNER
from fault_proxy import after

from .driver import NEW_ROWS, Run, World

NOWHERE = "/proc"  # a folder in which not even root can create a file


def through_shell(world: World, command: str, **variables: str) -> Run:
    """Run a shell command, in which "$0" is the runner."""
    return world.finish(world.start("bash", "-c", command, str(RUNNER), **variables))


def with_small_files(world: World, kib: int, **variables: str) -> Run:
    """Run with files limited to some KiB: to a program, what a full disk is; and it needs no rights."""
    return through_shell(world, f'trap "" XFSZ; ulimit -f {kib}; exec "$0"', **variables)


@pytest.fixture
def start_on_small_disk(world):
    """Return a function that starts the runner with a disk of 64 KiB of its own for logs."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    logs = Path(world.environment["LOG_DIR"])
    logs.mkdir()
    command = f'mount -t tmpfs -o size=64k,mode=700 tmpfs {logs} && exec "$0"'
    return lambda: world.start("unshare", "--mount", "bash", "-c", command, str(RUNNER))


def fill_disk(world: World, pid: int, *, log_page: bool = True) -> None:
    """Leave no byte on the small disk that a runner sees, nor (unless asked) on the last page of its log."""
    logs = Path(f"/proc/{pid}/root{world.environment['LOG_DIR']}")
    for path in [logs / "of-another-program", *(logs.glob("refresh-*.log") if log_page else ())]:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with contextlib.suppress(OSError):
            while os.write(file, b"\n" * 1024):
                pass
        os.close(file)


# --- full -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "skip", "step"),
    [
        pytest.param("GET", "/_alias/", 0, "check where readers are", marks=pytest.mark.long),
        pytest.param("POST", "/_reindex", 0, "1 copy", marks=pytest.mark.long),
        ("POST", "/_bulk", 2, "3 load"),
        pytest.param("POST", "/_aliases", 1, "4 switch", marks=pytest.mark.long),
    ],
)
def test_a_disk_that_fills_up_ends_the_run_with_its_reason(world, start_on_small_disk, method, path, skip, step):
    """No line can be written to the log any more: the running step ends well, the next one does not begin."""
    process = []
    rule = world.proxy.on(method, path, after(lambda: fill_disk(world, process[0].pid)), skip=skip)
    process.append(start_on_small_disk())
    run = world.finish(process[0])
    assert rule.seen > skip
    world.expect(run, code=1, message="No space left on device")
    assert f"FAILED at: {step}" in run.err
    assert f"log: {world.environment['LOG_DIR']}/refresh-{world.alias}-" in run.err
    world.heal()


@pytest.mark.long
def test_an_answer_that_found_no_space_is_not_used(world, start_on_small_disk):
    """The log has room for some lines yet, the file with the answer of step 0 has none."""
    process = []
    rule = world.proxy.on("GET", "/_alias/", after(lambda: fill_disk(world, process[0].pid, log_page=False)))
    process.append(start_on_small_disk())
    run = world.finish(process[0])
    assert rule.seen == 1
    world.expect(run, code=1, message="No space left on device")
    assert f"alias {world.alias} is on ," not in run.err
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize("kib", [1, 3, 5])
def test_a_log_that_cannot_grow_ends_the_run_with_its_reason(world, kib):
    run = with_small_files(world, kib)
    assert len(run.log.encode()) == kib * 1024
    world.expect(run, code=1, message="File too large")
    assert f"log: {world.environment['LOG_DIR']}/refresh-{world.alias}-" in run.err
    world.heal()


@pytest.mark.long
def test_a_rejects_file_that_cannot_grow_fails_the_load(world):
    good = world.objects["a.csv"]
    world.put({"a.csv": b"n,half,word\n" + b"".join(b"%s,1,x\n" % (b"x" * 5000) for _ in range(15))})
    run = with_small_files(world, 32, MAX_REJECTS="100")
    world.expect(run, code=1, message=r"rejects file \S+/rejects-\S+\.ndjson: File too large")
    assert "FAILED at: 3 load" in run.err
    [rejects] = Path(world.environment["LOG_DIR"]).glob("rejects-*")
    assert rejects.stat().st_size == 32 * 1024
    world.put({"a.csv": good})
    world.heal()


# --- no permission ----------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("variable", ["LOG_DIR", "LOCK_DIR"])
@pytest.mark.parametrize("kind", ["a file", "in a file", "not writable", "not writable even by root"])
def test_a_folder_that_cannot_be_used_ends_the_run_before_anything_is_sent(world, variable, kind):
    place = world.folder / "in-use"
    if kind == "not writable":
        if os.geteuid() == 0:
            pytest.skip("root may write to any folder")
        place.mkdir(mode=0o500)
    else:
        place.touch(mode=0o600)
    folder = {"in a file": str(place / "logs"), "not writable even by root": NOWHERE}.get(kind, str(place))
    run = world.refresh(**{variable: folder})
    world.expect(run, code=1, message=folder)
    assert variable in run.err
    assert world.proxy.requests == []
    world.heal()


@pytest.mark.long
@pytest.mark.parametrize(("at", "step"), [("/_reindex", "1 copy"), ("/_bulk", "3 load")])
def test_a_log_folder_that_is_deleted_ends_the_run_after_the_step(world, at, step):
    logs = Path(world.environment["LOG_DIR"])
    world.proxy.on("POST", at, after(lambda: shutil.rmtree(logs)))
    run = world.refresh()
    world.expect(run, code=1, message=rf"{logs}/refresh-\S+: No such file or directory|{logs}/refresh-.*No such file")
    assert f"FAILED at: {step}" in run.err
    world.heal()


# --- no reader --------------------------------------------------------------------------------------------------------


LONG_OUTPUTS = ['"$0" | head -n 1', '"$0" | true', '"$0" >/dev/full', '"$0" >/dev/full 2>&1', '"$0" 2>&1 | head -n 1',
                '"$0" 2>&1 >/dev/null | true']  # fmt: skip


@pytest.mark.parametrize(
    "command",
    ['"$0" >&-', '"$0" >&- 2>&-', *(pytest.param(command, marks=pytest.mark.long) for command in LONG_OUTPUTS)],
)
def test_an_output_without_a_reader_stops_no_refresh(world, command):
    run = through_shell(world, f"set -o pipefail; {command}")
    world.expect(run, code=0)
    assert f"readers to {world.primary}: exit 0" in run.log
    assert f'"documents": {NEW_ROWS}' in run.log
    world.assert_done()
