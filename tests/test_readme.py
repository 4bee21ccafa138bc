"""The README says what is so: its commands run, its role is the tested one, every flag and variable is in it."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import boto3
import bulkupdate
import index_cleanup
import opensearch_base_manager as base
import pytest
import reindex
import sandbox
import switch_alias
import yaml
from botocore.validate import ParamValidator
from conftest import secured

TOP = Path(__file__).resolve().parent.parent
README = (TOP / "README.md").read_text()
SCRIPTS = {"reindex": reindex, "switch_alias": switch_alias, "bulkupdate": bulkupdate, "index_cleanup": index_cleanup}
ONE_LINERS = README.replace("\\\n", " ")
COMMANDS = re.findall(r"^ *(?:\.venv/bin/)?python (\w+)\.py (.*?)(?: &&?)?$", ONE_LINERS, re.M)
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.S | re.M)
BASH = [text for kind, text in BLOCKS if kind == "bash"]
LINE = 120


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")} - {"--help"}


def runner_flags() -> set[str]:
    said = subprocess.run([TOP / "run_refresh.sh", "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z][a-z-]+", said)) - {"--help"}


@pytest.mark.quick
@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_each_command_parses(script, arguments):
    SCRIPTS[script].build_parser().parse_args(shlex.split(arguments))


@pytest.mark.quick
def test_the_first_command_refreshes_and_the_second_runs_the_tests():
    assert [block.strip() for block in BASH[:2]] == ["tests/sandbox.sh ./run_refresh.sh", "tests/run.sh"]


@pytest.mark.quick
def test_no_line_is_too_long_but_those_of_tables_and_outputs():
    prose = re.sub(r"^```text\n.*?^```", "", README, flags=re.S | re.M)
    assert [line for line in prose.splitlines() if len(line) > LINE and not line.startswith("|")] == []


@pytest.mark.quick
def test_each_link_leads_somewhere():
    titles = re.findall(r"^#+ (.*)$", README, re.M)
    headings = [re.sub("[^a-z ]", "", title.lower()).replace(" ", "-") for title in titles]
    for target in re.findall(r"\]\((.*?)\)", README):
        assert target[1:] in headings if target.startswith("#") else (TOP / target).exists(), target


@pytest.mark.quick
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_is_mentioned(script):
    assert {flag for flag in flags(SCRIPTS[script].build_parser()) if flag not in README} == set()


def test_each_flag_of_the_runner_is_in_the_table():
    assert {flag for flag in runner_flags() if f"`{flag}`" not in README} == set()


@pytest.mark.quick
def test_the_roles_are_the_ones_that_the_tests_run_with():
    names = {f"${variable}": f"my_index_{variable.split('_')[0].lower()}" for variable in
             ("PRIMARY_INDEX", "SECONDARY_INDEX")} | {"$INDEX_ALIAS": "my_index_alias"}  # fmt: skip
    text = re.sub(r"\$[A-Z_]+", lambda found: names.get(found[0], found[0]), README)
    role, recreate = [json.loads(role) for role in re.findall(r"api/roles/\S+ -d @- <<END\n(.*?)\nEND", text, re.S)]
    assert recreate == sandbox.recreate_role(["my_index_primary", "my_index_secondary"])
    expected = sandbox.refresh_role(["my_index_primary", "my_index_secondary", "my_index_alias"])
    assert sorted(role["cluster_permissions"]) == sorted(expected["cluster_permissions"])
    (mine,), (theirs,) = role["index_permissions"], expected["index_permissions"]
    assert sorted(mine["allowed_actions"]) == sorted(theirs["allowed_actions"])
    assert mine["index_patterns"] == theirs["index_patterns"]


# what has no row in the table of the code: the credentials, which must not be logged, and what the runner reads itself
ELSEWHERE = {"OPENSEARCH_ENDPOINT", "OPENSEARCH_USERNAME", "OPENSEARCH_PASSWORD", "PYTHON"}
VARIABLES = {setting.variable for setting in sandbox.VARIABLES} | ELSEWHERE


@pytest.mark.quick
def test_each_setting_is_in_the_table_of_the_readme_and_no_other():
    table = README.split("\n## Settings")[1].split("\n## ")[0]
    in_table = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", table)) - {"INFO", "DEBUG"}
    assert in_table == VARIABLES


@pytest.mark.quick
def test_each_variable_is_in_the_example_file_with_its_default():
    in_example = dict(re.findall(r"^#([A-Z0-9_]+)=(.*)$", (TOP / ".env.example").read_text(), re.M))
    assert set(in_example) == VARIABLES - {"PYTHON"}
    defaults = {setting.variable: setting.default for setting in sandbox.VARIABLES if setting.default}
    assert {name: in_example[name] for name in defaults} == defaults


@pytest.mark.quick
def test_no_script_reads_a_variable_past_the_table():
    code = "".join((TOP / f"{name}.py").read_text() for name in [*SCRIPTS, "opensearch_base_manager"])
    read = set(re.findall(r"\b(?:environ|getenv)\W+(?:get\W+)?([A-Z][A-Z0-9_]+)", code))
    assert read - {"REFRESH_LOG_FILE"} <= VARIABLES  # only the runner sets it


@pytest.mark.quick
def test_the_json_blocks_are_json_and_the_domain_is_one_that_aws_accepts():
    policy, domain = [json.loads(text) for kind, text in BLOCKS if kind == "json"]
    assert {action for statement in policy["Statement"] for action in [*statement["Action"]]}
    client = boto3.client("opensearch", region_name="eu-central-1", aws_access_key_id="x", aws_secret_access_key="x")
    shape = client.meta.service_model.operation_model("CreateDomain").input_shape
    assert ParamValidator().validate(domain, shape).generate_report() == ""


@pytest.mark.quick
def test_the_cron_job_is_yaml_and_its_variables_exist():
    [job] = [yaml.safe_load(text) for kind, text in BLOCKS if kind == "yaml"]
    [container] = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert {variable["name"] for variable in container["env"]} <= VARIABLES


@pytest.mark.quick
def test_every_exit_code_is_in_the_table():
    codes = {error.exit_code for error in base.OperationFailed.__subclasses__()} | {base.OperationFailed.exit_code}
    assert all(re.search(rf"^\|.*\| {code} \|", README, re.M) for code in codes)
    assert "| 129, 130, 143 |" in README


# --- each command is run where it can be ------------------------------------------------------------------------------

# blocks of bash that are not run here, by how they begin, and why
NOT_RUN = {
    "tests/sandbox.sh ": "has tests of its own",
    "tests/run.sh": "it is what runs this test",
    "sudo dnf": "needs Amazon Linux, and would make another .venv",
    "aws iam": "needs an AWS account; the policy and the domain are parsed above",
}
KINDS_NOT_RUN = {"ini": "systemd", "dockerfile": "Docker", "yaml": "Kubernetes", "json": "AWS", "none": "", "text": ""}
FAKE_AWS = f"""#!{sys.executable}
import os, sys
sys.path.insert(0, {str(TOP / "tests")!r})
import sandbox
assert sys.argv[1:3] == ["ssm", "put-parameter"], sys.argv
given = dict(zip(sys.argv[3::2], sys.argv[4::2]))
value = sys.stdin.read() if given["--value"] == "file:///dev/stdin" else given["--value"]
sandbox.aws_client("ssm", os.environ).put_parameter(
    Name=given["--name"], Type=given["--type"], Value=value, Overwrite=True
)
"""


@pytest.mark.quick
def test_what_is_not_run_is_named():
    assert {kind for kind, _ in BLOCKS} == {"bash", "cron", *KINDS_NOT_RUN}
    assert all(any(block.startswith(start) for block in BASH) for start in NOT_RUN)


def sections() -> dict[str, str]:
    """Return the commands of each section that can be run, as one session; `admin` is defined in all of them."""
    [admin] = re.findall(r"^signed=.*?^}$", README, re.S | re.M)
    found = {}
    for section in README.split("\n## ")[1:]:
        blocks = re.findall(r"^```bash\n(.*?)^```", section, re.S | re.M)
        if runs := [block for block in blocks if not block.startswith(tuple(NOT_RUN))]:
            found[section.splitlines()[0]] = "\n".join([admin, *(f"echo '--- block' >&2\n{block}" for block in runs)])
    return found


@secured
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_command_that_can_run_does_one_after_the_other(tmp_path):
    """In a sandbox of its own, in which the names of the README stand for real indices, alias and objects."""
    (tmp_path / "aws").write_text(FAKE_AWS)
    (tmp_path / "aws").chmod(0o755)
    with sandbox.running([*sandbox.JAVA, sandbox.BRIEF]) as own:
        variables = sandbox.command_environment(own)
        variables |= {
            "LOG_DIR": str(tmp_path / "logs"), "LOCK_DIR": str(tmp_path / "locks"),
            "PATH": f"{tmp_path}:{variables['PATH']}", "HOME": str(tmp_path),
        }  # fmt: skip

        def run(shell: str, commands: str) -> subprocess.CompletedProcess[str]:
            command = [shell, "-euc", commands]
            return subprocess.run(command, env=variables, cwd=TOP, capture_output=True, text=True, timeout=400)

        for title, commands in sections().items():
            done = run("bash", commands)
            assert done.returncode == 0, f"{title}: {commands}\n{done.stdout}\n{done.stderr}"
            assert "has failed" not in done.stdout
        logs = "".join(path.read_text() for path in (tmp_path / "logs").glob("refresh-*.log"))
        assert "instead:" not in logs  # the role allows what the cheap way needs
        [alert] = re.findall(r"^0 8 \* \* \* (/opt/refresh/run_refresh\.sh .*)$", README, re.M)
        assert run("sh", alert.replace("/opt/refresh", str(TOP))).stdout == ""


@pytest.mark.quick
def test_each_output_is_there():
    assert not re.search(r"[A-Z]_OUTPUT|TODO|XXX", README)
    outputs = [text for kind, text in BLOCKS if kind == "text"]
    assert len(outputs) >= 2
