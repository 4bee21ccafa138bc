"""run_refresh.sh as cron and operators run it: the real script, in a process of its own, against the real server."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import opensearch_base_manager as base
import pytest
import sandbox
from conftest import (
    NUMBER, RUNNER, Reader, count, finish, log_of, on_terminal, running_copies, sources, state_of, wait_until,
)  # fmt: skip
from fault_proxy import answer

TOP = Path(__file__).resolve().parent.parent
SCRIPTS = ["opensearch_base_manager.py", "reindex.py", "switch_alias.py", "bulkupdate.py", "index_cleanup.py"]


BLANK_LINES = "\n" * 100  # step 0 renders as many of each object; what comes behind them, the load finds


def flights(*months):
    return {f"{month:02d}.csv": sandbox.month_files()[month - 1].read_bytes() for month in months}


def totals(objects):
    rows = [row for body in objects.values() for row in csv.DictReader(io.StringIO(body.decode()))]
    return len(rows), float(sum(int(row["distance"]) for row in rows))


def test_no_reader_notices_a_whole_refresh(box, make_pair, refresh, put_csv, admin, alias, behind_alias):
    primary, secondary = make_pair(sandbox.FLIGHTS_MAPPING["properties"], 0, 0)
    sandbox.load_months(box.server, primary, [sandbox.month_files()[0]])
    old, new = flights(1), flights(1, 2)
    scroll = admin("POST", f"/{alias}/_search?scroll=5m", {"size": 5000})
    held = len(scroll["hits"]["hits"])
    reader = Reader(box.server.endpoint, alias, "distance")
    reader.start()
    process = refresh(put_csv(new), DOCUMENT_COUNT_THRESHOLD="100")
    code, out, err = finish(process)
    time.sleep(0.5)
    assert (code, reader.finish(), reader.errors) == (0, [totals(old), totals(new)], []), err
    while hits := scroll["hits"]["hits"]:
        scroll = admin("POST", "/_search/scroll", {"scroll": "5m", "scroll_id": scroll["_scroll_id"]})
        held += len(scroll["hits"]["hits"]) if hits else 0
    assert held == totals(old)[0]
    assert behind_alias() == [primary]
    assert (count(admin, secondary), count(admin, primary)) == (totals(old)[0], totals(new)[0])
    table = [line.split() for line in out.splitlines()]
    assert [row[0] for row in table] == ["step", "1", "2", "3", "4", "checks", "total"]
    assert [row[-1] for row in table[1:5]] == [str(totals(old)[0])] * 2 + [str(totals(new)[0])] * 2
    assert sum(int(row[-2]) for row in table[1:5]) + int(table[5][-1]) == int(table[6][-1])


@pytest.mark.parametrize("method", ["delete", "recreate"])
def test_alternate_loads_the_idle_index_and_moves_readers_there(
    method, box, make_pair, refresh, put_csv, admin, may_recreate, alias, behind_alias
):
    primary, secondary = make_pair(NUMBER, 3, 0)
    reader = Reader(box.server.endpoint, alias, "n")
    reader.start()
    seen = [(3, 3.0)]
    for night, index, left in (1, secondary, primary), (2, primary, secondary), (3, secondary, primary):
        rows = range(10 * night, 10 * night + 3)
        prefix = put_csv({"a.csv": "n\n" + "".join(f"{n}\n" for n in rows)})
        before = state_of(admin, left)[left]["docs"]
        process = refresh(prefix, REFRESH_STRATEGY="alternate", CLEANUP_METHOD=method)
        code, out, err = finish(process)
        assert code == 0, err
        assert behind_alias() == [index]
        assert [document["n"] for document in sources(admin, index)] == list(rows)
        assert state_of(admin, left)[left]["docs"] == before
        assert [line.split()[0] for line in out.splitlines()] == ["step", "1", "2", "checks", "total"]
        seen.append((3, float(sum(rows))))
    time.sleep(0.5)
    assert (reader.finish(), reader.errors) == (seen, [])


def test_alternate_goes_on_where_a_former_run_stopped(make_pair, refresh, put_csv, admin, behind_alias):
    primary, secondary = make_pair(NUMBER, 3, 0)
    prefix = put_csv({"a.csv": f"n\n{BLANK_LINES}1\nx\n2\n"})
    code, _, err = finish(refresh(prefix, REFRESH_STRATEGY="alternate"))
    assert code == 3, err
    assert (behind_alias(), count(admin, primary)) == ([primary], 3)
    code, _, err = finish(refresh(prefix, REFRESH_STRATEGY="alternate", MAX_REJECTS="1", DOCUMENT_COUNT_THRESHOLD="50"))
    assert code == 0, err
    assert (behind_alias(), count(admin, primary), count(admin, secondary)) == ([secondary], 3, 2)


def test_alternate_accepts_a_column_that_the_nights_have_typed_differently(make_pair, refresh, put_csv, behind_alias):
    primary, secondary = make_pair(NUMBER, 2, 0)
    for cell, live_index in ("1", secondary), ("1.5", primary), ("2", secondary):
        prefix = put_csv({"a.csv": f"n,x\n1,{cell}\n2,{cell}\n"})
        code, _, err = finish(refresh(prefix, REFRESH_STRATEGY="alternate"))
        assert code == 0, err
        assert behind_alias() == [live_index]


def test_two_refreshes_in_a_row_carry_a_new_column_to_both_indices(make_pair, refresh, put_csv, admin, behind_alias):
    primary, secondary = make_pair(NUMBER, 3, 0)
    prefix = put_csv({"a.csv": "n,since\n1,2024-01-15\n2,\n3,n/a\n"})
    for _ in range(2):
        code, _, err = finish(refresh(prefix))
        assert code == 0, err
    fields = [admin("GET", f"/{index}/_mapping")[index]["mappings"] for index in (primary, secondary)]
    assert fields[0] == fields[1]
    assert fields[0]["properties"]["since"]["type"] == "text"
    assert behind_alias() == [primary]
    expected = [{"n": 1, "since": "2024-01-15"}, {"n": 2}, {"n": 3, "since": "n/a"}]
    assert sources(admin, primary) == sources(admin, secondary) == expected


def test_a_load_that_ends_with_3_stops_before_the_switch_and_the_next_run_goes_on_there(
    make_pair, refresh, put_csv, admin, s3, behind_alias
):
    primary, secondary = make_pair(NUMBER, 3, 0)
    prefix = put_csv({"a.csv": f"n\n{BLANK_LINES}1\nx\n3\n"})
    code, _, err = finish(refresh(prefix))
    assert code == 3
    assert "FAILED at: 3 load" in err.splitlines()[-1]
    assert "rejects-" in err
    assert behind_alias() == [secondary]
    s3.put_object(Bucket=sandbox.BUCKET, Key=f"{prefix}a.csv", Body=b"n\n1\n2\n3\n")
    code, out, err = finish(refresh(prefix))
    assert code == 0, err
    assert f"readers are on {secondary} already" in err
    assert [line.split()[0] for line in out.splitlines()] == ["step", "3", "4", "checks", "total"]
    assert behind_alias() == [primary]
    assert sources(admin, primary) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_too_large_a_change_is_refused_at_the_last_switch_with_readers_on_complete_data(
    make_pair, refresh, put_csv, admin, behind_alias
):
    _, secondary = make_pair(NUMBER, 10, 0)
    code, _, err = finish(refresh(put_csv({"a.csv": "n\n1\n2\n"})))
    assert code == 4
    assert "--threshold 80" in err
    assert behind_alias() == [secondary]
    assert count(admin, secondary) == 10


@pytest.mark.parametrize(
    ("objects", "properties", "word"),
    [({}, None, "no .csv"), ({"a.csv": "n\n"}, None, "not one data row"), ({"a.csv": "x;y\n1;2\n"}, None, "delimiter"),
     ({"a.csv": "n\n1\n"}, {"n": {"type": "keyword"}}, "n long -> keyword")],
)  # fmt: skip
def test_what_can_be_known_beforehand_is_known_before_readers_are_moved(
    make_pair, refresh, put_csv, admin, objects, properties, word, behind_alias
):
    primary, secondary = make_pair(NUMBER, 3, 1, properties)
    prefix = put_csv(objects) if objects else "nothing/here/"
    code, _, err = finish(refresh(prefix))
    assert code == 4
    assert word in err
    assert "==> 1" not in err
    assert behind_alias() == [primary]
    assert (count(admin, primary), count(admin, secondary)) == (3, 1)


def test_an_alias_on_a_third_index_is_refused(make_pair, refresh, put_csv, make_index, behind_alias, move_alias):
    primary, _ = make_pair(NUMBER, 3, 0)
    third = make_index("third")
    move_alias(primary, third)
    code, _, err = finish(refresh(put_csv({"a.csv": "n\n1\n"})))
    assert (code, behind_alias()) == (4, [third])
    assert third in err


def test_a_task_of_another_client_on_the_index_to_be_loaded_is_seen_in_step_0(
    make_pair, refresh, put_csv, behind_alias, foreign_copy
):
    primary, secondary = make_pair(NUMBER, 3, 0)
    task = foreign_copy(secondary)
    code, _, err = finish(refresh(put_csv({"a.csv": "n\n1\n"})))
    assert (code, behind_alias()) == (4, [primary])
    assert task in err


def test_the_second_of_two_runs_ends_with_75_and_says_so(make_pair, refresh, put_csv, admin, last, alias, behind_alias):
    primary, _ = make_pair(NUMBER, 30, 0)
    prefix = put_csv({"a.csv": "n\n" + "1\n" * 30})
    assert finish(refresh(prefix))[0] == 0
    before = last()
    first = refresh(prefix, REQUESTS_PER_SECOND="10")
    wait_until(lambda: running_copies(admin, primary))
    code, _, err = finish(refresh(prefix))
    assert code == 75
    assert "another refresh" in err
    assert (last()["exit_code"], last()["last_success"]) == (75, before["last_success"])
    said = f"another refresh of {alias} is running on this host; wait for it to finish (see --status)"
    assert last()["message"] == said
    assert finish(first)[0] == 0
    assert behind_alias() == [primary]
    assert (last()["exit_code"], last()["last_success"]) == (0, last()["ended"])


@pytest.mark.parametrize("shared", ["PRIMARY_INDEX", "SECONDARY_INDEX"])
def test_a_refresh_of_another_alias_that_uses_one_of_the_indices_is_waited_for(
    shared, make_pair, refresh, put_csv, runner_environment, tmp_path, last
):
    """Between two steps, it could put its own data into the index that readers are about to be moved to."""
    make_pair(NUMBER, 1, 0)
    path = tmp_path / "locks" / f"REFRESH-INDEX-{runner_environment[shared]}.lock"
    path.parent.mkdir()
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = finish(refresh(put_csv({"a.csv": "n\n1\n"})))
    assert (code, last()["exit_code"]) == (75, 75)
    assert "a refresh of another alias that uses" in err
    assert finish(refresh(put_csv({"a.csv": "n\n1\n"})))[0] == 0


def test_a_run_that_was_locked_out_does_not_replace_a_report_that_is_newer_than_its_begin(tmp_path, monkeypatch):
    def report(ending, began):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{ending}\n".encode())))
        base.report_run(str(tmp_path / "last.json"), "alias", str(began))
        return json.loads((tmp_path / "last.json").read_text())

    now = int(time.time())
    success = report("0\t4 switch readers\t", now - 100)
    assert report("75\tpreparing\tanother refresh is running", now - 50) == success
    held = report("4\tpreparing\theld", now - 50)
    assert (held["exit_code"], held["last_success"]) == (4, success["ended"])
    locked_out = report("75\tpreparing\tanother refresh is running", now + 50)
    assert (locked_out["exit_code"], locked_out["last_success"]) == (75, success["ended"])


def test_the_lock_needs_no_flock_and_a_lock_that_fails_is_not_another_refresh(
    make_pair, refresh, put_csv, tmp_path, last
):
    make_pair(NUMBER, 1, 0)
    prefix = put_csv({"a.csv": "n\n1\n"})
    tool = tmp_path / "flock"
    tool.write_text("#!/bin/sh\nexit 1\n")
    tool.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert finish(refresh(prefix, "--dry-run", PATH=path))[0] == 0
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
case "$*" in *fcntl*) echo "OSError: [Errno 37] No locks available" >&2; exit 1 ;; esac
exec "{sys.executable}" "$@"
""")
    python.chmod(0o755)
    code, _, err = finish(refresh(prefix, PYTHON=str(python), PATH=path))
    assert code == 1
    assert "another refresh" not in err
    assert "cannot lock" in last()["message"]
    assert "No locks available" in log_of(tmp_path)


def test_a_step_that_finds_its_index_locked_is_reported(make_pair, refresh, put_csv, last, tmp_path):
    primary, secondary = make_pair(NUMBER, 1, 0)
    (tmp_path / "locks").mkdir()
    with open(tmp_path / "locks" / f"{secondary}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = finish(refresh(put_csv({"a.csv": "n\n1\n"})))
    assert code == 75, err
    assert (last()["exit_code"], last()["live_index"]) == (75, primary)
    assert secondary in last()["message"]


@pytest.mark.parametrize(("arguments", "number"), [([], "KILL"), (["--verbose"], "SEGV")])
def test_a_step_that_is_killed_says_by_which_signal(arguments, number, make_pair, refresh, put_csv, last, admin):
    primary, _ = make_pair(NUMBER, 60, 0)
    process = refresh(put_csv({"a.csv": "n\n1\n"}), *arguments, REQUESTS_PER_SECOND="1")
    wait_until(lambda: running_copies(admin, primary))
    [step] = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "reindex.py"], text=True).split()
    os.kill(int(step), getattr(signal, f"SIG{number}"))
    code, _, err = finish(process)
    assert code == 128 + getattr(signal, f"SIG{number}")
    assert re.fullmatch(rf"1 copy \S+ to \S+: killed by SIG{number}", last()["message"])
    assert last()["message"] in err


def test_a_step_that_ends_without_a_word_does_not_blame_its_last_line(make_pair, refresh, put_csv, last, tmp_path):
    make_pair(NUMBER, 1, 0)
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
case "$1" in bulkupdate.py) exit 9 ;; esac
exec "{sys.executable}" "$@"
""")
    python.chmod(0o755)
    code, _, err = finish(refresh(put_csv({"a.csv": "n\n1\n"}), PYTHON=str(python)))
    assert code == 9
    assert last()["message"] == "check the load: ended with exit code 9 and without an error message"
    assert last()["message"] in err


def test_the_lock_outlives_a_killed_runner_as_long_as_its_step_lives(make_pair, refresh, put_csv, admin):
    primary, _ = make_pair(NUMBER, 60, 0)
    prefix = put_csv({"a.csv": "n\n" + "1\n" * 60})
    first = refresh(prefix, REQUESTS_PER_SECOND="10")
    wait_until(lambda: running_copies(admin, primary))
    first.kill()
    assert finish(refresh(prefix))[0] == 75
    os.killpg(first.pid, signal.SIGKILL)
    finish(first)
    assert finish(refresh(prefix))[0] == 0  # cancels the orphan on the server


@pytest.mark.quick
def test_a_dry_run_changes_nothing(make_pair, refresh, put_csv, admin, behind_alias):
    primary, secondary = make_pair(NUMBER, 3, 0)
    code, _, err = finish(refresh(put_csv({"a.csv": "n\n1\n"}), "--dry-run"))
    assert code == 0
    assert "nothing was changed" in err
    assert (behind_alias(), count(admin, primary), count(admin, secondary)) == ([primary], 3, 0)


def test_it_works_under_crons_bare_environment_from_another_directory(
    make_pair, put_csv, box, tmp_path, environment, alias, behind_alias
):
    primary, secondary = make_pair(NUMBER, 3, 0)
    home = tmp_path / "a folder with spaces"
    home.mkdir()
    for script in [*SCRIPTS, "run_refresh.sh"]:
        shutil.copy(TOP / script, home)
    (home / ".venv").symlink_to(Path(sys.prefix))
    variables = {
        **box.environment, "PRIMARY_INDEX": primary, "SECONDARY_INDEX": secondary, "INDEX_ALIAS": alias,
        "S3_BUCKET": sandbox.BUCKET, "S3_PREFIX": put_csv({"a.csv": "n\n1\n2\n3\n"}), "STEP_DELAY_SECONDS": "0",
        "OPENSEARCH_ENDPOINT": box.server.endpoint, "OPENSEARCH_USERNAME": sandbox.USER,
    }  # fmt: skip
    lines = [f"{name}={value}\n" for name, value in variables.items()]
    quoted = sandbox.PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
    (home / ".env").write_text("".join(lines) + f"OPENSEARCH_PASSWORD='{quoted}'\n")
    bare = ["env", "-i", "PATH=/usr/bin:/bin", str(home / "run_refresh.sh")]
    done = subprocess.run(bare, cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert behind_alias() == [primary]
    logs = list((home / "logs").glob("refresh-*.log"))
    assert len(logs) == 1
    assert logs[0].stat().st_mode & 0o777 == 0o600
    assert sandbox.PASSWORD not in logs[0].read_text() + done.stderr + done.stdout
    stamped = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ |\$ |> |step|checks|total|\d ")
    assert all(stamped.match(line) for line in logs[0].read_text().splitlines())


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(["--foo"], {}), (["--dry-run", "x"], {}), ([], {"STEP_DELAY_SECONDS": "soon"}), ([], {"BATCH_SIZE": "0"}),
     ([], {"REFRESH_STRATEGY": "sideways"}), ([], {"PYTHON": "no-such-python"}), ([], {"SECONDARY_INDEX": "t-same",
     "PRIMARY_INDEX": "t-same"}), ([], {"AWS_REGION": ""}), ([], {"S3_BUCKET": "your-bucket\n"})],
)  # fmt: skip
def test_wrong_usage_ends_with_2_and_says_what(refresh, arguments, variables):
    code, out, err = finish(refresh("x/", *arguments, **variables))
    assert (code, out) == (2, "")
    named = next(iter(variables), "argument")
    assert any(word in err for word in (named, named.removesuffix("_INDEX"), "PYTHON"))


def test_a_python_without_the_packages_ends_with_2_and_says_what(refresh, tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    code, out, err = finish(refresh("x/", PYTHON=str(bare)))
    command = f"{sys.executable} -m pip install -r {TOP}/requirements.txt"
    assert (code, out, err) == (2, "", f"requests is not installed; run {command}\n")


def test_help_is_printed_without_any_configuration(tmp_path):
    done = subprocess.run([TOP / "run_refresh.sh", "--help"], env={"PATH": os.environ["PATH"]}, capture_output=True,
                          text=True, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0
    assert "Usage: run_refresh.sh" in done.stdout


def test_old_logs_are_deleted_after_30_days(make_pair, refresh, put_csv, tmp_path):
    make_pair(NUMBER, 1, 0)
    logs = tmp_path / "logs"
    logs.mkdir()
    for age in (29, 32):
        path = logs / f"refresh-x-{age}.log"
        path.touch()
        os.utime(path, times=(time.time() - age * 86400,) * 2)
    finish(refresh(put_csv({"a.csv": "n\n1\n"}), "--dry-run"))
    left = {path.name for path in logs.glob("refresh-x-*.log")}
    assert left == {"refresh-x-29.log"}


def test_it_can_be_called_through_a_link_and_with_odd_names(make_pair, refresh, put_csv, tmp_path):
    make_pair(NUMBER, 1, 0)
    prefix = put_csv({"daily $1 'x' /a.csv": "n\n1\n", "daily $1 'x'/b.csv": ""})
    (tmp_path / "link").symlink_to(TOP / "run_refresh.sh")
    (tmp_path / "run_refresh.sh").symlink_to(tmp_path / "link")
    code, _, err = finish(refresh(f"{prefix}daily $1 'x' ", "--dry-run", runner=tmp_path / "run_refresh.sh"))
    assert code == 0, err


# --- values on their way to a step ------------------------------------------------------------------------------------

ODD = [
    "exports/country=", "=", "==a==", "a b ", " a", "'", '"', "a'b\"c", "#", "a #b", "$HOME", "${X}", "`id`", "$(id)",
    "\\", "a\\b\\\\", "\\n", "-x", "--dry-run", "**", "?", "~", "!", "ü日本\U0001f600", "a\tb", "%s", "&;|<>", "\x7f",
]  # fmt: skip
ALPHABET = "=='\"  #$\\`*&;|<>()[]{}!~?%^@,.:/-_aZ0üß日\U0001f600\t"


def odd_pairs():
    """Return pairs of odd values, the fixed ones and some by chance."""
    chance = random.Random(22)
    values = ODD + ["".join(chance.choices(ALPHABET, k=chance.randint(2, 12))) for _ in range(12)]
    buckets = [value.replace("/", ".").replace(":", ".") for value in values[::2]]  # a bucket has neither
    return list(zip(buckets, values[1::2]))


@pytest.fixture
def arguments_of_the_load(tmp_path):
    """Return a function that starts a copy of the runner and returns bucket and prefix as bulkupdate.py gets them."""
    home = tmp_path / "home"
    home.mkdir()
    for script in [*SCRIPTS, "run_refresh.sh"]:
        shutil.copy(TOP / script, home)
    python = home / "python"  # the question is what a step gets, not what it does
    python.write_text(f"""#!/bin/sh
case "$1" in
  switch_alias.py) echo my_index_primary; exit 0 ;;
  bulkupdate.py) printf '%s\\n%s' "$3" "$4" >got; exit 4 ;;
esac
exec "{sys.executable}" "$@"
""")
    python.chmod(0o755)

    def start(in_file="", **variables):
        (home / ".env").write_text(in_file)
        env = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
        done = subprocess.run([home / "run_refresh.sh", "--dry-run"], env=env, capture_output=True, text=True)
        assert done.returncode == 4, done.stderr
        bucket, prefix = (home / "got").read_bytes().decode().split("\n")
        return bucket, prefix.removeprefix("--prefix=")

    return start


def test_no_value_loses_a_character_between_the_environment_and_a_step(arguments_of_the_load):
    pairs = odd_pairs()
    assert [arguments_of_the_load(S3_BUCKET=bucket, S3_PREFIX=prefix, LC_ALL="C") for bucket, prefix in pairs] == pairs


def test_no_value_loses_a_character_between_the_file_and_a_step(arguments_of_the_load):
    for pair_of_values in odd_pairs():
        quoted = [value.replace("\\", "\\\\").replace("'", "\\'") for value in pair_of_values]
        in_file = "S3_BUCKET='{}'\n# a comment\nS3_PREFIX='{}'\n".format(*quoted)
        assert arguments_of_the_load(in_file, S3_BUCKET="", S3_PREFIX="") == pair_of_values


def test_the_whole_bucket_is_an_asterisk_and_an_empty_prefix_a_mistake(arguments_of_the_load, refresh):
    assert arguments_of_the_load(S3_PREFIX="*") == ("your-bucket", "")
    code, _, err = finish(refresh(""))
    assert (code, err) == (2, "S3_PREFIX is empty; give a prefix, or '*' for the whole bucket\n")


# --- what it shows, and what it leaves for a monitor ------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 200])
def test_on_a_terminal_each_step_looks_as_it_does_by_hand(columns, make_pair, put_csv, runner_environment, tmp_path):
    make_pair(sandbox.FLIGHTS_MAPPING["properties"], 0, 0)
    variables = {
        "S3_PREFIX": put_csv(flights(1, 2)), "DOCUMENT_COUNT_THRESHOLD": "100", "REQUESTS_PER_SECOND": "20000",
    }  # fmt: skip
    code, shown = on_terminal([str(RUNNER)], {**runner_environment, **variables}, columns)
    assert code == 0, shown
    assert "==> 3 load" in shown
    assert re.search(r"INFO bulkupdate: loaded 51,955 rows", shown)
    renewed = [part for part in re.split(r"\r\x1b\[K", shown) if re.match(r"loading \S+: \d+ %", part)]
    assert len(renewed) > 3
    assert max(len(part.splitlines()[0]) for part in renewed) < columns
    [log] = (tmp_path / "logs").glob("refresh-*.log")
    assert "INFO bulkupdate: loaded 51,955 rows" in log.read_text()
    assert not re.search(r"[\x1b\r]", log.read_text())


def test_verbose_puts_what_the_steps_say_on_stderr_and_without_it_there_are_short_lines(make_pair, refresh, put_csv):
    make_pair(NUMBER, 1, 0)
    prefix = put_csv({"a.csv": "n\n1\n"})
    code, _, err = finish(refresh(prefix, "--verbose"))
    assert code == 0
    assert "INFO bulkupdate: done: " in err
    assert "\x1b" not in err
    code, _, err = finish(refresh(prefix))
    assert code == 0
    assert " INFO " not in err
    code, _, err = finish(refresh(put_csv({"a.csv": "x\n1\n"}), "--verbose", "--dry-run"))
    assert code == 4
    assert err.count("the mapping of") == 1


@pytest.fixture
def last(runner_environment, tmp_path):
    return lambda: json.loads((tmp_path / "logs" / f"last-{runner_environment['INDEX_ALIAS']}.json").read_text())


def test_each_run_leaves_how_it_ended_for_a_monitor(make_pair, refresh, put_csv, last, tmp_path, alias):
    primary, secondary = make_pair(NUMBER, 1, 0)
    good = put_csv({"good/a.csv": "n\n1\n", "bad/a.csv": f'n\n{BLANK_LINES}"x, ""y"\n'}) + "good/"
    bad = good.replace("good", "bad")
    assert finish(refresh(good))[0] == 0
    first = last()
    assert (first["exit_code"], first["step"], first["message"]) == (0, None, None)
    assert (first["alias"], first["live_index"], first["documents"]) == (alias, primary, 1)
    assert [step["step"][:7] for step in first["steps"] if step["step"][0].isdigit()] == [
        "1 copy ", "2 switc", "3 load ", "4 switc"
    ]  # fmt: skip
    assert first["began"] <= first["ended"] == first["last_success"]
    assert 0 <= first["newest_object_age_hours"] < 1
    assert finish(refresh(good, "--dry-run"))[0] == 0
    assert last() == first

    code, _, err = finish(refresh(bad))
    assert code == 3
    failed = last()
    assert (failed["exit_code"], failed["live_index"], failed["documents"]) == (3, secondary, 1)
    assert failed["step"] == f"3 load {primary} from S3"
    assert "1 rows were rejected" in failed["message"]
    readers = f"readers are on {secondary}, 1 documents, data 0.0 hours old; that index is complete, so this can wait"
    assert readers in err
    assert failed["last_success"] == first["last_success"]

    hold = tmp_path / "locks" / f"HOLD-{alias}"
    hold.write_text('wrong "prices", monday\n')
    assert finish(refresh(good))[0] == 4
    assert last()["message"].startswith('held: wrong "prices", monday; to continue, delete ')
    assert (last()["exit_code"], last()["last_success"]) == (4, first["last_success"])
    hold.unlink()
    assert [path.name for path in (tmp_path / "logs").glob("last-*")] == [f"last-{alias}.json"]


def test_a_signal_and_a_broken_file_of_the_last_run_are_no_obstacle(
    make_pair, refresh, put_csv, last, runner_environment, admin, tmp_path
):
    primary, _ = make_pair(NUMBER, 60, 0)
    path = tmp_path / "logs" / f"last-{runner_environment['INDEX_ALIAS']}.json"
    path.parent.mkdir()
    path.write_text("[1")
    process = refresh(put_csv({"a.csv": "n\n1\n"}), REQUESTS_PER_SECOND="1")
    wait_until(lambda: running_copies(admin, primary))
    began = time.monotonic()
    process.terminate()
    assert finish(process)[0] == 143
    assert time.monotonic() - began < 10
    assert not running_copies(admin, primary)
    assert (last()["exit_code"], last()["message"], last()["last_success"]) == (143, "stopped by SIGTERM", None)


def test_the_live_index_is_unknown_after_a_switch_that_broke_off(make_pair, refresh, put_csv, last, proxy):
    primary, secondary = make_pair(NUMBER, 1, 0)
    prefix = put_csv({"a.csv": "n\n1\n"})
    proxy.on("POST", "_aliases", answer(500, {"error": {"type": "x", "reason": "broken"}}))
    by_proxy = {name: os.environ[name] for name in os.environ if name.startswith("OPENSEARCH_")}
    code, _, err = finish(refresh(prefix, **by_proxy))
    assert (code, last()["step"]) == (1, f"2 switch readers to {secondary}"), err
    assert (last()["live_index"], last()["documents"]) == (None, None)
    assert "to find out which index readers are on, run" in err
    process = refresh(prefix, STEP_DELAY_SECONDS="30")
    wait_until(lambda: "<== 1 copy" in process.stderr.readline())
    process.terminate()
    assert finish(process)[0] == 143
    assert (last()["live_index"], last()["documents"]) == (primary, 1)


# --- on a terminal, into a pipe ---------------------------------------------------------------------------------------


class Terminal:
    """A command on a terminal of its own, on which one can type."""

    def __init__(self, words, environment):
        self.pid, self.descriptor = pty.fork()
        if not self.pid:
            os.execvpe(words[0], words, environment)  # noqa: S606
        self.shown = ""

    def read_until(self, text):
        while text not in self.shown:
            self.shown += os.read(self.descriptor, 65536).decode()

    def finish(self):
        """Read what is left, and return the exit code."""
        with contextlib.suppress(OSError):  # the terminal is gone with its last process
            while part := os.read(self.descriptor, 65536).decode():
                self.shown += part
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.parametrize("during", ["copying 60 documents", "<== 1 copy"])
def test_ctrl_c_stops_the_step_or_the_pause_at_once(
    during, make_pair, put_csv, runner_environment, admin, last, tmp_path
):
    primary, _ = make_pair(NUMBER, 60, 0)
    slow = {"REQUESTS_PER_SECOND": "1"} if "copying" in during else {"STEP_DELAY_SECONDS": "60"}
    terminal = Terminal([str(RUNNER)], {**runner_environment, **slow, "S3_PREFIX": put_csv({"a.csv": "n\n1\n"})})
    terminal.read_until(during)
    began = time.monotonic()
    os.write(terminal.descriptor, b"\x03")
    assert terminal.finish() == 130, terminal.shown
    assert time.monotonic() - began < 10
    assert not running_copies(admin, primary)
    assert (last()["exit_code"], last()["message"], last()["live_index"]) == (130, "stopped by SIGINT", primary)
    for text in (terminal.shown, log_of(tmp_path)):
        assert ("ERROR reindex: stopped by SIGINT" in text) is ("copying" in during)
        assert "stopped by SIGINT" in text
        assert "FAILED at: 1 copy" in text or text != terminal.shown


def test_a_terminal_that_is_closed_stops_the_run_in_good_order(
    make_pair, put_csv, runner_environment, admin, last, tmp_path
):
    primary, secondary = make_pair(NUMBER, 60, 0)
    slow = {"REQUESTS_PER_SECOND": "1", "S3_PREFIX": put_csv({"a.csv": "n\n1\n"})}
    terminal = Terminal([str(RUNNER)], {**runner_environment, **slow})
    terminal.read_until("copying 60 documents")
    os.close(terminal.descriptor)
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 129
    assert (last()["exit_code"], last()["message"]) == (129, "stopped by SIGHUP")
    assert "ERROR reindex: stopped by SIGHUP" in log_of(tmp_path)
    assert not running_copies(admin, primary)
    assert "refresh_interval" not in admin("GET", f"/{secondary}/_settings")[secondary]["settings"]["index"]


@pytest.mark.parametrize("ending", ["2>&1 | head -n 1", "2>&-"])
def test_a_verbose_run_needs_no_reader_of_its_output(ending, make_pair, put_csv, runner_environment, last, tmp_path):
    primary, _ = make_pair(NUMBER, 1, 0)
    command = f"set -o pipefail; {TOP}/run_refresh.sh --verbose {ending}"
    variables = {**runner_environment, "S3_PREFIX": put_csv({"a.csv": "n\n1\n"})}
    done = subprocess.run(["bash", "-c", command], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (last()["exit_code"], last()["live_index"]) == (0, primary)
    assert log_of(tmp_path).count("INFO bulkupdate: done: ") == 1


def test_a_wrong_setting_of_a_step_is_shown_once_and_logged(make_pair, put_csv, refresh, last, tmp_path):
    make_pair(NUMBER, 1, 0)
    wrong = {"RETRY_SECONDS": "soon"}
    code, _, err = finish(refresh(put_csv({"a.csv": "n\n1\n"}), "--verbose", **wrong))
    assert (code, err.count("RETRY_SECONDS: ")) == (2, 1)
    assert "RETRY_SECONDS: " in last()["message"]
    assert log_of(tmp_path).count("RETRY_SECONDS: ") == 1


# --- hold, release, status --------------------------------------------------------------------------------------------


@pytest.fixture
def ask(refresh, tmp_path):
    """Run --hold, --release or --status without cluster and credentials; return stdout and stderr."""

    def do(*arguments, code=0):
        unreachable = dict.fromkeys(["OPENSEARCH_ENDPOINT", "AWS_ENDPOINT_URL"], "http://127.0.0.1:9")
        found, out, err = finish(refresh("none/", *arguments, **unreachable))
        assert found == code, err
        return out + err

    return do


def test_hold_and_release_write_and_delete_the_file_that_the_runner_reads(ask, runner_environment, tmp_path):
    hold = tmp_path / "locks" / f"HOLD-{runner_environment['INDEX_ALIAS']}"
    assert "was not held" in ask("--release")
    ask("--hold", "wrong 'carriers', ask\nKim")
    assert re.fullmatch(r"wrong 'carriers', ask Kim \(since 2[0-9TZ:-]+\)\n", hold.read_text())
    assert "held: wrong 'carriers', ask Kim (since " in ask(code=4)
    assert "wrong 'carriers', ask Kim (since " in ask("--status")
    assert "is no longer held" in ask("--release")
    assert not hold.exists()
    assert re.search("^hold +none$", ask("--status"), re.M)


def test_the_status_is_what_report_and_lock_say(ask, make_pair, refresh, put_csv, alias, tmp_path):
    assert "last success  never" in ask("--status")
    ask("--status", "--max-age", "24", code=1)
    assert list(tmp_path.glob("logs/refresh-*")) == []
    primary, _ = make_pair(NUMBER, [{"n": 0}])
    assert finish(refresh(put_csv({"a.csv": "n\n1\n"})))[0] == 0
    status = ask("--status", "--max-age", "24")
    assert f"readers       on {primary}, 1 documents, data 0.0 hours old" in status
    assert re.search("^last run .*, succeeded$", status, re.M)
    assert status.endswith(", 0.0 hours ago\nhold          none\nrunning now   no\n")
    with (tmp_path / "locks" / f"REFRESH-{alias}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert re.search("^running now +yes$", ask("--status"), re.M)
    path = tmp_path / "logs" / f"last-{alias}.json"
    path.write_text(re.sub(r'"last_success": "\d+', '"last_success": "2020', path.read_text()))
    ask("--status", "--max-age", "24.5", code=1)
    ask("--status")
    for text in "[1", '{"ended": "long ago", "live_index": "a", "documents": "many"}':
        path.write_text(text)
        assert "last success  never" in ask("--status")


@pytest.mark.parametrize(
    "arguments",
    [["--hold"], ["--hold", " "], ["--hold", "x", "y"], ["--release", "x"], ["--status", "--max-age"],
     ["--max-age", "1"], ["--status", "--max-age", "1 h"], ["--status", "--dry-run"], ["--verbose", "--hold", "x"]],
)  # fmt: skip
def test_an_own_command_with_wrong_arguments_is_a_usage_error(arguments, ask, tmp_path):
    assert len(ask(*arguments, code=2).splitlines()) == 1
    assert list(tmp_path.glob("locks/HOLD*")) == []
