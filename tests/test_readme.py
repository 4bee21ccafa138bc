"""The README says what is so: its commands parse, its role is the tested one, every flag and variable is in it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import bulkupdate
import index_cleanup
import opensearch_base_manager as base
import pytest
import reindex
import sandbox
import switch_alias

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text()
SCRIPTS = {"reindex": reindex, "switch_alias": switch_alias, "bulkupdate": bulkupdate, "index_cleanup": index_cleanup}
COMMANDS = re.findall(r"^python (\w+)\.py (.*)$", README, re.M)
BASH = re.findall(r"```bash\n(.*?)```", README, re.S)


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


@pytest.mark.quick
@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_each_command_parses(script, arguments):
    SCRIPTS[script].build_parser().parse_args(shlex.split(arguments))


def test_the_first_command_refreshes_and_the_second_runs_the_tests():
    assert [block.strip() for block in BASH[:2]] == ["tests/sandbox.sh ./run_refresh.sh", "tests/run.sh"]


@pytest.mark.quick
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_is_mentioned(script):
    assert {flag for flag in flags(SCRIPTS[script].build_parser()) if flag not in README} == set()


@pytest.mark.quick
def test_the_role_is_the_one_that_the_tests_run_with():
    role, recreate = [json.loads(text) for text in re.findall(r"api/roles/refresh.*?-d '\n(\{.*?\n\})'", README, re.S)]
    assert recreate == sandbox.recreate_role(["my_index_primary", "my_index_secondary"])
    expected = sandbox.refresh_role(["my_index_primary", "my_index_secondary", "my_index_alias"])
    assert sorted(role["cluster_permissions"]) == sorted(expected["cluster_permissions"])
    (mine,), (theirs,) = role["index_permissions"], expected["index_permissions"]
    assert sorted(mine["allowed_actions"]) == sorted(theirs["allowed_actions"])
    assert mine["index_patterns"] == theirs["index_patterns"]


# what has no row in the table of the code: the credentials, which must not be logged, and what the runner reads itself
ELSEWHERE = {"OPENSEARCH_ENDPOINT", "OPENSEARCH_USERNAME", "OPENSEARCH_PASSWORD", "PYTHON"}
ROWS = [setting for rows in base.SETTINGS.values() for setting in rows]
VARIABLES = {setting.variable for setting in ROWS if setting.variable} | ELSEWHERE


@pytest.mark.quick
def test_each_setting_is_in_the_table_of_the_readme_and_no_other():
    table = README.split("## Settings")[1].split("## Setting up")[0]
    in_table = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", table)) - {"INFO", "DEBUG"}
    assert in_table == VARIABLES


@pytest.mark.quick
def test_each_variable_is_in_the_example_file_with_its_default():
    in_example = dict(re.findall(r"^#([A-Z0-9_]+)=(.*)$", (TOP / ".env.example").read_text(), re.M))
    assert set(in_example) == VARIABLES - {"PYTHON"}
    defaults = {setting.variable: setting.default for setting in ROWS if setting.variable and setting.default}
    assert {name: in_example[name] for name in defaults} == defaults


@pytest.mark.quick
def test_no_script_reads_a_variable_past_the_table():
    code = "".join((TOP / f"{name}.py").read_text() for name in [*SCRIPTS, "opensearch_base_manager"])
    read = set(re.findall(r"\b(?:environ|getenv)\W+(?:get\W+)?([A-Z][A-Z0-9_]+)", code))
    assert read - {"REFRESH_LOG_FILE"} <= VARIABLES  # only the runner sets it


@pytest.mark.quick
def test_the_json_blocks_are_json():
    blocks = re.findall(r"```json\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        json.loads(block)


@pytest.mark.quick
def test_every_exit_code_of_the_base_manager_is_in_the_table():
    codes = {error.exit_code for error in base.OperationFailed.__subclasses__()} | {base.OperationFailed.exit_code}
    assert all(re.search(rf"^\| {code} \|", README, re.M) for code in codes)


# what has tests of its own, or needs an installation and a schedule of its own
NOT_RUN = ("tests/sandbox.sh ", "tests/run.sh", "python3 -m venv")


@pytest.mark.timeout(900)
def test_each_command_that_can_run_does_one_after_the_other(tmp_path):
    """In a sandbox of its own, in which the names of the README stand for real indices, alias and objects."""
    with sandbox.running() as own:
        variables = {
            **os.environ, **own.environment, "ENDPOINT": own.server.endpoint,
            "ADMIN": f"{sandbox.ADMIN}:{sandbox.ADMIN_PASSWORD}",
            "LOG_DIR": str(tmp_path / "logs"), "LOCK_DIR": str(tmp_path / "locks"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHON": sys.executable,
        }  # fmt: skip
        for block in BASH:
            if not block.startswith(NOT_RUN):
                done = subprocess.run(
                    ["bash", "-euc", block], env=variables, cwd=TOP, capture_output=True, text=True, timeout=200
                )
                assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
                assert "has failed" not in done.stdout


def test_each_output_is_there():
    assert not re.search(r"[A-Z]_OUTPUT|TODO|XXX", README)
    outputs = re.findall(r"```text\n(.*?)```", README, re.S)
    assert len(outputs) >= 6
    assert all(re.search(r"exit [04]|done: ", output) for output in outputs)
