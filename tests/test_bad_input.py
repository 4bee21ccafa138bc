"""Whatever an operator can get wrong ends with the right exit code, one clear last line, and an untouched cluster."""

from __future__ import annotations

import fcntl
import re
import shlex
import time

import bulkupdate
import index_cleanup
import opensearch_base_manager as base
import pytest
import reindex
import sandbox
import switch_alias
from conftest import OWN, OWN_PASSWORD, fill, load_arguments, secured, state_of
from fault_proxy import FaultProxy, after, answer

pytestmark = pytest.mark.quick


def assert_says(outcome, code, *patterns):
    """One error, in the last line, that matches all patterns; no success and no traceback beside it."""
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    assert " done: " not in outcome.err
    assert outcome.err.count(" ERROR ") + outcome.err.count(": error: ") == 1
    for pattern in patterns:
        assert re.search(pattern, outcome.last), outcome.last


@pytest.fixture
def connect(box, own_environment, monkeypatch):
    """Give the scripts a way to log in past Parameter Store; `connect("", "", "")` asks the store again."""

    def use(endpoint=box.server.endpoint, user=sandbox.USER, password=sandbox.PASSWORD):
        for variable, value in (("ENDPOINT", endpoint), ("USERNAME", user), ("PASSWORD", password)):
            monkeypatch.setenv(f"OPENSEARCH_{variable}", value)

    use()
    return use


class Commands:
    """A live index and a standby, and valid commands of the four scripts on them."""

    def __init__(self, old, new, alias):
        self.old, self.new, self.alias = old, new, alias
        self.copy = (reindex, "--source", old, "--target", new)
        self.switch = (switch_alias, "--alias", alias, "--source", old, "--target", new)
        self.empty = (index_cleanup, "--index", new, "--no-force-merge")

    def load(self, prefix, *more):
        return bulkupdate, *load_arguments(prefix, self.new, *more)


@pytest.fixture(scope="module")
def lasting_commands(box):
    admin, commands = box.server.request, Commands(*(f"{OWN}-commands-{part}" for part in ("old", "new", "alias")))
    for index, aliases in ((commands.old, {commands.alias: {}}), (commands.new, {})):
        admin("PUT", f"/{index}", {"mappings": {"properties": {"n": {"type": "long"}}}, "aliases": aliases})
        fill(admin, index, [{"n": n} for n in range(10)])
    commands.state = state_of(admin, commands.old, commands.new)
    yield commands
    for index in (commands.old, commands.new):
        admin("DELETE", f"/{index}")


@pytest.fixture
def commands(lasting_commands, connect, admin):
    """For commands that are refused or fail: when the test ends, both indices must be untouched."""
    before = lasting_commands.state
    yield lasting_commands
    lasting_commands.state = state_of(admin, lasting_commands.old, lasting_commands.new)
    assert lasting_commands.state == before


@pytest.fixture
def fresh(make_index, name, connect):
    """On indices of the test's own, for commands that succeed or fail halfway."""
    return Commands(make_index("old", docs=2, alias=name("alias")), make_index("new", docs=2), name("alias"))


# --- usage and configuration: nothing is sent (2) ---------------------------------------------------------------------

SWITCH = "--alias t-x --source t-a --target t-b"
LOAD = "--bucket b --prefix p/ --index t-a"


@pytest.mark.parametrize(
    ("script", "argv", "says"),
    [
        (reindex, "--source t-a --target t-a", "source and target are the same"),
        (switch_alias, "--alias t-x --source t-a --target t-a", "source and target are the same"),
        (switch_alias, "--alias t-x --source t-a", "--target"),
        (switch_alias, f"{SWITCH} --threshold many", "--threshold: 'many'"),
        (switch_alias, f"{SWITCH} --threshold=-1", "--threshold: '-1'"),
        (switch_alias, f"{SWITCH} --threshold nan", "--threshold: 'nan'"),
        (switch_alias, f"{SWITCH} --threshold inf", "--threshold: 'inf'"),
        (switch_alias, f"{SWITCH} --wait-seconds=-1", "--wait-seconds: '-1'"),
        (reindex, "--source t-a --target t-b --requests-per-second=-1", "--requests-per-second: '-1'"),
        (bulkupdate, f"{LOAD} --batch-size 0", "--batch-size: must be at least 1"),
        (bulkupdate, f"{LOAD} --batch-size 1.5", "--batch-size: '1.5'"),
        (bulkupdate, f"{LOAD} --workers 0", "--workers: must be at least 1"),
        (bulkupdate, f"{LOAD} --max-rejects=-1", "--max-rejects: '-1'"),
        (bulkupdate, f"{LOAD} --delimiter ;;", "--delimiter: ';;'"),
        (bulkupdate, f'{LOAD} --delimiter "', "--delimiter: "),
        (bulkupdate, f"{LOAD} --delimiter=", "--delimiter: "),
        *[
            (bulkupdate, f"--bucket {wrong} --prefix p/ --index t-a", "is not a bucket name; give the name alone")
            for wrong in ("s3://your-bucket", "your-bucket/", "arn:aws:s3:::your-bucket", "a/b")
        ],
        (bulkupdate, "--bucket b --prefix p/", "required: --index"),
        (index_cleanup, "--index t-*", r"--index: 't-\*' is not an index name"),
        (index_cleanup, "--index t-a,t-b", "--index: 't-a,t-b' is not an index name"),
        (index_cleanup, "--index _all", "--index: '_all' is not an index name"),
        (index_cleanup, "--index <t-{now/d}>", "--index: '<t-{now/d}>' is not an index name"),
        (index_cleanup, "--index t-a/_doc", "--index: 't-a/_doc' is not an index name"),
        (index_cleanup, "--index T-A", "--index: 'T-A' is not an index name"),
        (index_cleanup, "--index t-%2a", "--index: 't-%2a' is not an index name"),
        (index_cleanup, "--index=", "--index: '' is not an index name"),
        (reindex, "--source t-* --target t-b", "--source: 't-"),
        (switch_alias, "--alias t-x,t-y --source t-a --target t-b", "--alias: 't-x,t-y'"),
        (index_cleanup, "--index t-a --all", "unrecognized arguments: --all"),
    ],
)
def test_a_wrong_flag_is_a_usage_error_and_nothing_is_sent(script, argv, says, run, proxy):
    assert_says(run(script, *argv.split(" ")), 2, says)
    assert proxy.requests == []


@pytest.mark.parametrize(
    ("script", "argv", "variables", "says"),
    [
        *[(index_cleanup, "--index t-a", *case) for case in [
            ({"OPENSEARCH_PASSWORD": ""}, "OPENSEARCH_PASSWORD not set"),
            ({"OPENSEARCH_USERNAME": "", "OPENSEARCH_ENDPOINT": ""}, "ENDPOINT and OPENSEARCH_USERNAME not set"),
            ({"OPENSEARCH_USERNAME": "a:b"}, "user name with a colon"),
            ({"OPENSEARCH_ENDPOINT": "https://me:hidden@host"}, "the endpoint contains a user or password"),
            ({"OPENSEARCH_ENDPOINT": "me:hidden@host"}, "the endpoint contains a user or password"),
            ({"OPENSEARCH_ENDPOINT": "https://x.us-east-1.aoss.amazonaws.com"}, "Serverless does not support _reindex"),
            ({"OPENSEARCH_ENDPOINT": "ftp://host"}, "endpoint is not a URL such as"),
            ({"OPENSEARCH_ENDPOINT": "https://host:port"}, "endpoint is not a URL such as"),
            ({"OPENSEARCH_ENDPOINT": "https://[::1"}, "endpoint is not a URL such as"),
            ({"OPENSEARCH_AUTH": "kerberos"}, "OPENSEARCH_AUTH: 'kerberos' is neither basic nor sigv4"),
            ({"VERIFY_SSL": "maybe"}, "VERIFY_SSL: 'maybe'"),
            ({"CA_BUNDLE": "/nowhere/ca.pem"}, "CA_BUNDLE: /nowhere/ca.pem"),
            ({"RETRY_SECONDS": "soon"}, "RETRY_SECONDS: 'soon'"),
            ({"RETRY_SECONDS": "-1"}, "RETRY_SECONDS: '-1'"),
            ({"WAIT_SECONDS": "nan"}, "WAIT_SECONDS: 'nan'"),
            ({"LOG_LEVEL": "LOUD"}, "LOG_LEVEL: 'LOUD'"),
        ]],
        *[(script, argv, {"CLEANUP_METHOD": "burn"}, "'burn' is neither delete nor recreate") for script, argv in [
            (index_cleanup, "--index t-a"), (reindex, "--source t-a --target t-b"), (bulkupdate, LOAD),
        ]],
        (switch_alias, SWITCH, {"DOCUMENT_COUNT_THRESHOLD": "nan"}, "'nan' is not a number"),
        (reindex, "--source t-a --target t-b", {"REQUESTS_PER_SECOND": "fast"}, "'fast'"),
        (reindex, "--source t-a --target t-b", {"LOAD_WITHOUT_REPLICAS": "perhaps"}, "LOAD_WITHOUT_REPLICAS: "),
        (bulkupdate, LOAD, {"MAX_REJECTS": "few"}, "'few'"),
        (bulkupdate, LOAD, {"AWS_REGION": ""}, "no AWS region: set AWS_REGION"),
        (bulkupdate, LOAD, {"AWS_PROFILE": "nobody"}, "profile.*nobody"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_an_error_of_configuration_and_nothing_is_sent(
    script, argv, variables, says, run, proxy, monkeypatch
):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    outcome = run(script, *argv.split(" "))
    assert_says(outcome, 2, says)
    assert "hidden" not in outcome.err
    assert proxy.requests == []


def test_without_a_region_the_store_cannot_be_asked(commands, run, connect, monkeypatch):
    connect("", "", "")
    monkeypatch.delenv("AWS_REGION")
    assert_says(run(*commands.copy), 2, "no AWS region: set AWS_REGION")


def test_no_region_is_needed_when_the_environment_holds_the_credentials(fresh, run, monkeypatch):
    monkeypatch.delenv("AWS_REGION")
    assert run(*fresh.copy).code == 0


def test_the_region_may_come_from_the_variable_that_boto3_reads_itself(commands, run, connect, monkeypatch):
    connect("", "", "")
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert run(*commands.switch, "--dry-run").code == 0


def test_without_aws_credentials_the_message_says_where_they_may_come_from(commands, run, connect, monkeypatch):
    connect("", "", "")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    outcome = run(*commands.copy)
    assert_says(outcome, 2, "Parameter Store, /opensearch/", "credentials", "a role, a profile or variables")


# --- Parameter Store --------------------------------------------------------------------------------------------------


def test_missing_parameters_are_named(commands, run, box, name, connect, monkeypatch):
    connect("", "", "")
    prefix = f"/{name('parameters')}"
    sandbox.aws_client("ssm", box.environment).put_parameter(Name=f"{prefix}/endpoint", Value="x", Type="String")
    monkeypatch.setenv("OPENSEARCH_PARAMETER_PREFIX", prefix)
    lacks = f"Parameter Store lacks {prefix}/username, {prefix}/password in this region"
    assert_says(run(*commands.copy), 1, lacks, "create what is missing")


def test_a_denied_parameter_names_the_permission(commands, run, environment, connect, monkeypatch):
    connect("", "", "")
    denied = {"__type": "AccessDeniedException", "Message": "User: arn:aws:iam::1:user/cron is not authorized"}
    with FaultProxy(environment["AWS_ENDPOINT_URL"]) as aws:
        aws.on("POST", "/", answer(400, denied))
        monkeypatch.setenv("AWS_ENDPOINT_URL", aws.endpoint)
        outcome = run(*commands.copy)
    assert_says(outcome, 1, "Parameter Store, /opensearch/", "user/cron is not authorized", "allow ssm:GetParameters")


# --- the cluster ------------------------------------------------------------------------------------------------------


@secured
def test_a_wrong_password_names_the_user(commands, run, connect):
    connect(password=OWN_PASSWORD)
    outcome = run(*commands.copy)
    assert_says(outcome, 1, "401", f"the cluster rejected user {sandbox.USER}: check the user name and password")
    assert OWN_PASSWORD not in outcome.err


@secured
@pytest.mark.parametrize(
    ("command", "permission"),
    [
        ("switch", "indices:admin/aliases"), ("switch", "indices:data/read/search"),
        ("copy", "indices:admin/settings/update"), ("empty", "indices:admin/mapping/put"),
        ("empty", "cluster:monitor/tasks/lists"),
    ],
)  # fmt: skip
def test_a_missing_permission_is_named_with_the_user(command, permission, commands, run, account):
    account.grant(permission)
    outcome = run(*getattr(commands, command))
    assert_says(outcome, 1, "permissions are missing", f'role of user {account.user}: .*"{permission}"')


@pytest.mark.parametrize(
    ("endpoint", "says"),
    [
        (f"https://127.0.0.1:{sandbox.free_port()}", "Connection refused"),
        ("https://no-such-host.invalid", r"\[Errno -\d+\]"),
    ],
    ids=["nobody listens", "no such host"],
)
def test_a_cluster_that_cannot_be_reached_is_given_up_soon(endpoint, says, commands, run, connect, monkeypatch):
    assert base.FIRST_CONTACT_S == 10
    monkeypatch.setattr(base, "FIRST_CONTACT_S", 1)
    monkeypatch.setenv("RETRY_SECONDS", "100")
    connect(endpoint)
    began = time.monotonic()
    assert_says(run(*commands.copy), 1, re.escape(endpoint), says)
    assert time.monotonic() - began < 8


@secured
def test_a_certificate_of_an_unknown_ca_fails_at_once(commands, run, monkeypatch):
    monkeypatch.setenv("VERIFY_SSL", "true")
    outcome = run(*commands.copy)
    assert_says(outcome, 1, "certificate verify failed", "set CA_BUNDLE")
    assert "trying again" not in outcome.err


@secured
def test_the_certificate_is_accepted_with_its_ca_bundle(fresh, run, box, monkeypatch):
    monkeypatch.setenv("CA_BUNDLE", str(box.server.run / "config" / "ca.pem"))
    outcome = run(*fresh.switch)
    assert outcome.code == 0
    assert "not verified" not in outcome.err


@secured
def test_that_certificates_are_not_verified_is_said_once(commands, run):
    outcome = run(*commands.switch, "--dry-run")
    assert outcome.code == 0
    assert outcome.err.count("certificates are not verified") == 1
    assert "InsecureRequestWarning" not in outcome.err


# --- indices and aliases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["source", "target"])
@pytest.mark.parametrize("script", [reindex, switch_alias])
def test_a_missing_index_is_named(missing, script, commands, run, name):
    names = {"source": commands.old, "target": commands.new, missing: name("none")}
    alias = ["--alias", commands.alias] if script is switch_alias else []
    outcome = run(script, *alias, "--source", names["source"], "--target", names["target"])
    assert_says(outcome, 1, f"index {name('none')} does not exist; create it first")


def test_a_missing_index_of_a_load_or_cleanup_is_named(run, name, put_csv):
    prefix = put_csv({"a.csv": "n\n1\n"})
    load = load_arguments(prefix, name("none"))
    for outcome in (run(bulkupdate, *load), run(index_cleanup, "--index", name("none"))):
        assert_says(outcome, 1, f"index {name('none')} does not exist; create it first")


def test_an_alias_in_the_place_of_an_index_is_not_followed(commands, run, put_csv):
    load = (bulkupdate, *load_arguments(put_csv({"a.csv": "n\n1\n"}), commands.alias))
    copy = (reindex, "--source", commands.alias, "--target", commands.new)
    for command in copy, (index_cleanup, "--index", commands.alias), load:
        assert_says(run(*command), 1, f"{commands.alias} is an alias of {commands.old}")


def test_a_live_index_is_neither_emptied_nor_loaded_nor_copied_into(commands, run, put_csv, may_recreate):
    prefix = put_csv({"a.csv": "n\n1\n"})
    copy = (reindex, "--source", commands.new, "--target", commands.old)
    empty = (index_cleanup, "--index", commands.old)
    load = (bulkupdate, *load_arguments(prefix, commands.old))
    for command in copy, (*copy, "--copy-method", "clone"), empty, (*empty, "--method", "recreate"), load:
        assert_says(run(*command), 4, f"{commands.old} is live: alias {commands.alias} points at it")


def test_a_missing_alias_comes_with_the_call_that_creates_it(commands, run, name):
    outcome = run(switch_alias, "--alias", name("none"), "--source", commands.old, "--target", commands.new)
    assert_says(outcome, 1, f"alias {name('none')} does not exist", "POST /_aliases", f'"index": "{commands.old}"')


def test_an_alias_on_a_third_index_is_left_there_with_the_command_that_moves_it(fresh, run, make_index, name, admin):
    third = make_index("third", docs=2, alias=name("elsewhere"))
    outcome = run(switch_alias, "--alias", name("elsewhere"), "--source", fresh.old, "--target", fresh.new)
    command = f"--alias {name('elsewhere')} --source {third} --target {fresh.new}"
    points = f"alias {name('elsewhere')} points at {third}, but should point only at {fresh.old}; it was not moved"
    assert_says(outcome, 4, points, command)
    assert list(admin("GET", f"/_alias/{name('elsewhere')}")) == [third]
    assert run(switch_alias, *command.split()).code == 0


def test_an_alias_with_the_name_of_an_index_is_refused(commands, run, make_index):
    index = make_index("third", docs=1)
    outcome = run(switch_alias, "--alias", index, "--source", commands.old, "--target", commands.new)
    assert_says(outcome, 4, f"{index} is the name of an index, not of an alias")


@pytest.mark.parametrize(
    ("target", "change", "accepted"),
    [(1, r"-66\.67 %", r"66\.67"), (4, r"\+33\.33 %", r"33\.34"), (6, r"\+100", "100")],
)
def test_too_large_a_difference_is_refused_with_the_command_that_accepts_it(
    target, change, accepted, run, make_index, name, admin
):
    old, new = make_index("old", docs=3, alias=name("alias")), make_index("new", docs=target)
    before = state_of(admin, old, new)
    outcome = run(switch_alias, "--alias", name("alias"), "--source", old, "--target", new)
    assert_says(
        outcome, 4, f"{old} holds 3 documents, {new} {target}: {change}", "threshold of 10 %",
        "every nightly refresh will be refused", f"--threshold {accepted} ",
    )  # fmt: skip
    assert state_of(admin, old, new) == before
    assert run(switch_alias, *shlex.split(outcome.last.split(base.script_command("switch_alias.py"))[1])).code == 0
    assert list(admin("GET", f"/_alias/{name('alias')}")) == [new]


def test_an_empty_target_is_refused(commands, run, make_index):
    empty = make_index("empty")
    for more in ([], ["--threshold", "1000"]):
        outcome = run(switch_alias, "--alias", commands.alias, "--source", commands.old, "--target", empty, *more)
        assert_says(outcome, 4, f"{empty} 0: readers are never moved to an empty index; load it first")


@pytest.mark.parametrize(
    ("source", "target", "field"),
    [
        ({"d": {"type": "date"}}, {"d": {"type": "text"}}, "d"),
        ({"d": {"type": "date"}}, {"d": {"type": "date", "format": "yyyy"}}, "d"),
        ({"o": {"properties": {"x": {"type": "long"}}}}, {"o": {"properties": {"x": {"type": "keyword"}}}}, r"o\.x"),
        ({"o": {"properties": {"x": {"type": "long"}}}}, {"o": {"type": "keyword"}}, "o"),
        ({"o": {"type": "keyword"}}, {"o": {"properties": {"x": {"type": "long"}}}}, "o"),
        ({"o": {"type": "nested"}}, {"o": {"properties": {}}}, "o"),
        ({"a": {"type": "long"}, "b": {"type": "long"}}, {"a": {"type": "ip"}, "b": {"type": "ip"}}, "a, b"),
    ],
)
def test_fields_defined_differently_are_listed_and_nothing_is_copied(source, target, field, make_index, run, admin):
    one, other = make_index("one", source), make_index("other", target, docs=3)
    before = state_of(admin, one, other)
    outcome = run(reindex, "--source", one, "--target", other)
    assert_says(outcome, 4, f"fields defined differently in {one} and {other}: {field};", f"recreate {other}")
    assert state_of(admin, one, other) == before


# --- S3 ---------------------------------------------------------------------------------------------------------------


def test_a_missing_bucket_is_named(commands, run):
    outcome = run(bulkupdate, "--bucket", "t-no-bucket", "--prefix", "p/", "--index", commands.new)
    assert_says(outcome, 1, "s3://t-no-bucket/p/: NoSuchBucket")


@pytest.mark.parametrize(("change", "says"), [("delete", "been deleted since"), ("replace", "been replaced since")])
def test_an_object_that_changes_between_list_and_read_fails(change, says, commands, run, put_csv, s3, s3_proxy):
    prefix = put_csv({"a.csv": "n\n1\n"})
    where = {"Bucket": sandbox.BUCKET, "Key": f"{prefix}a.csv"}
    act = {"delete": lambda: s3.delete_object(**where), "replace": lambda: s3.put_object(**where, Body=b"n\n2\n")}
    s3_proxy.on("GET", "list-type=2", after(act[change]))
    outcome = run(*commands.load(prefix))
    assert_says(outcome, 1, rf"{prefix}a\.csv has {says} it was listed; run again")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_lock_folder_that_cannot_be_used_is_named_before_any_change(commands, run, put_csv, tmp_path, monkeypatch):
    prefix = put_csv({"a.csv": "n\n1\n"})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCK_DIR", str(tmp_path / "file"))
    for command in (commands.copy, commands.switch, commands.empty, commands.load(prefix)):
        assert_says(run(*command), 1, f"{tmp_path}/file", "set LOCK_DIR")


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["exclusive", "shared"])
@pytest.mark.parametrize("command", ["copy", "switch", "empty", "load", "add"])
def test_a_locked_index_ends_with_75_and_is_left_alone(command, kind, commands, run, put_csv, tmp_path):
    load = commands.load(put_csv({"a.csv": "n\n1\n"}))
    words = {"load": load, "add": (*load, "--no-cleanup")}.get(command) or getattr(commands, command)
    (tmp_path / "locks").mkdir()
    shared = [("copy", commands.old), ("add", commands.new)]  # two of these may run side by side
    for index in [commands.new, commands.old] if command in ("copy", "switch") else [commands.new]:
        if kind == fcntl.LOCK_EX or (command, index) not in shared:
            with open(tmp_path / "locks" / f"{index}.lock", "w") as lock:
                fcntl.flock(lock, kind)
                assert_says(run(*words), 75, f"index {index} is locked by another run on this host; wait")


def test_a_log_folder_that_cannot_be_used_is_named_before_any_change(commands, run, put_csv, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOG_DIR", str(tmp_path / "file"))
    assert_says(run(*commands.load(put_csv({"a.csv": "n\n1\n"}))), 1, f"{tmp_path}/file", "set LOG_DIR")


def test_the_commands_that_the_refusals_above_are_made_of_are_accepted(fresh, run, put_csv):
    loaded = run(*fresh.load(put_csv({"a.csv": "n\n1\n2\n"})))
    assert (loaded.code, loaded.result["documents"]) == (0, 2)
    for command in (fresh.copy, fresh.empty, fresh.copy, fresh.switch):
        assert run(*command).code == 0
