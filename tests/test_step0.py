"""Step 0: whatever can be known before readers are moved is said there, by the code that the later steps use."""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from io import BytesIO

import bulkupdate
import index_cleanup
import opensearch_base_manager as base
import pytest
import reindex
import sandbox
import switch_alias
from conftest import NUMBER, count, fill, load_arguments, secured, state_of
from fault_proxy import answer, edited

CSV = {"a.csv": "n\n1\n2\n3\n"}


@pytest.fixture
def pair(make_pair, alias, monkeypatch):
    """Primary with three documents and the alias, and an empty secondary."""
    monkeypatch.setenv("INDEX_ALIAS", alias)
    return make_pair(NUMBER, 3, 0)


@pytest.fixture
def step_0(run, name):
    """Run what the runner's step 0 runs where readers are on primary; return the outcomes by script."""

    def do(prefix, primary, secondary):
        show = ["--alias", name("alias"), "--show", "--source", primary, "--target", secondary]
        return {
            "switch_alias": run(switch_alias, *show),
            "bulkupdate": run(bulkupdate, *load_arguments(prefix, primary, "--dry-run")),
            "reindex": run(reindex, "--source", primary, "--target", secondary, "--dry-run"),
        }

    return do


@pytest.fixture
def show(run, name):
    return lambda source, target, *more: run(
        switch_alias, "--alias", name("alias"), "--show", "--source", source, "--target", target, *more
    )


def codes(outcomes):
    return {script: outcome.code for script, outcome in outcomes.items()}


PASSED = {"switch_alias": 0, "bulkupdate": 0, "reindex": 0}


def test_a_night_that_can_work_passes_and_changes_nothing(pair, step_0, put_csv, admin):
    primary, secondary = pair
    before = state_of(admin, primary, secondary)
    writes = admin("GET", f"/{primary},{secondary}/_stats?level=shards&filter_path=indices.*.shards.*.seq_no")
    outcomes = step_0(put_csv(CSV), primary, secondary)
    assert codes(outcomes) == PASSED, {script: outcome.err for script, outcome in outcomes.items()}
    assert outcomes["switch_alias"].out == f"{primary}\n"
    assert state_of(admin, primary, secondary) == before
    after = admin("GET", f"/{primary},{secondary}/_stats?level=shards&filter_path=indices.*.shards.*.seq_no")
    assert after == writes


def test_show_takes_source_and_target_in_any_order_and_names_a_third_index(pair, show, make_index, move_alias):
    primary, secondary = pair
    assert show(secondary, primary).out == f"{primary}\n"
    third = make_index("third")
    move_alias(primary, third)
    outcome = show(primary, secondary)
    assert outcome.code == 4
    assert third in outcome.last


# --- permissions ------------------------------------------------------------------------------------------------------

# the nightly run sends neither, and goes on without the last one
NOT_ASKED = {"indices:admin/flush*", "indices:admin/forcemerge", "cluster:monitor/nodes/stats"}


def lacking(outcomes):
    """Return the permissions that the last lines name."""
    lasts = [outcome.last for outcome in outcomes.values() if outcome.code]
    assert all("nothing was changed" in last for last in lasts), lasts
    return set(re.findall(r'"((?:cluster|indices):[^"]+)"', " ".join(lasts)))


@secured
@pytest.mark.parametrize("line", [*sandbox.CLUSTER_PERMISSIONS, *sandbox.INDEX_PERMISSIONS])
def test_each_line_of_the_role_that_the_night_needs_is_named_in_step_0(pair, step_0, account, put_csv, admin, line):
    primary, secondary = pair
    before, prefix = state_of(admin, primary, secondary), put_csv(CSV)
    account.grant(line)
    outcomes = step_0(prefix, primary, secondary)
    assert lacking(outcomes) == {line} - NOT_ASKED, codes(outcomes)
    assert set(codes(outcomes).values()) <= ({0} if line in NOT_ASKED else {0, 1})
    assert state_of(admin, primary, secondary) == before


@secured
def test_all_that_is_missing_is_named_at_once_as_lines_of_a_role(pair, run, account, name):
    primary, secondary = pair
    not_of_a_copy = {"indices:admin/get", "indices:admin/aliases", "indices:admin/aliases/get"}
    of_indices = set(sandbox.INDEX_PERMISSIONS) - not_of_a_copy
    account.grant(*sandbox.CLUSTER_PERMISSIONS, *of_indices)
    outcome = run(reindex, "--source", primary, "--target", secondary, "--dry-run")
    assert outcome.code == 1
    behind_bulk = {"indices:data/write/bulk*", "indices:data/write/index", "indices:data/write/delete"}
    assert lacking({"reindex": outcome}) == {*sandbox.CLUSTER_PERMISSIONS, *of_indices} - NOT_ASKED - behind_bulk
    assert f'"index_patterns": ["{primary}", "{secondary}"]' in outcome.last
    assert name("user") in outcome.last
    account.grant(*of_indices)
    outcome = run(reindex, "--source", primary, "--target", secondary, "--dry-run")
    assert lacking({"reindex": outcome}) == of_indices - NOT_ASKED
    assert "cluster_permissions" not in outcome.last


@secured
def test_a_run_asks_after_the_lock_and_before_the_first_change(pair, run, account, put_csv, admin):
    primary, secondary = pair
    fill(admin, secondary, [{"n": 9}])
    before = state_of(admin, primary, secondary)
    account.grant("indices:data/write/delete")
    outcomes = {
        "reindex": run(reindex, "--source", primary, "--target", secondary),
        "bulkupdate": run(bulkupdate, *load_arguments(put_csv(CSV), secondary)),
        "index_cleanup": run(index_cleanup, "--index", secondary),
    }
    assert set(codes(outcomes).values()) == {1}
    assert lacking(outcomes) == {"indices:data/write/delete"}
    assert state_of(admin, primary, secondary) == before


@secured
@pytest.mark.parametrize("line", ["indices:admin/flush*"])
def test_a_cleanup_that_gives_space_back_asks_for_what_that_needs(pair, run, account, line):
    _, secondary = pair
    account.grant(line)
    outcome = run(index_cleanup, "--index", secondary, "--dry-run")
    assert (outcome.code, lacking({"": outcome})) == (1, {line})
    assert run(index_cleanup, "--index", secondary, "--dry-run", "--no-force-merge").code == 0


@secured
def test_what_only_makes_it_faster_is_one_warning(pair, run, account, monkeypatch):
    primary, secondary = pair
    monkeypatch.setenv("CLEANUP_METHOD", "recreate")
    outcome = run(reindex, "--source", primary, "--target", secondary, "--dry-run")
    assert outcome.code == 0
    warnings = [line for line in outcome.err.splitlines() if " WARNING " in line and "certificates" not in line]
    assert len(warnings) == 1, warnings
    assert "indices:admin/create" in warnings[0]


def test_a_403_without_a_type_names_the_verb(pair, run, proxy):
    primary, secondary = pair
    message = {"Message": "User: anonymous is not authorized to perform: es:ESHttpPut with an explicit deny"}
    proxy.on("PUT", "", answer(403, message), times=None, probes=True)
    outcome = run(reindex, "--source", primary, "--target", secondary, "--dry-run")
    assert outcome.code == 1
    assert "es:ESHttpPut" in outcome.last
    assert "nothing was changed" in outcome.last


def test_a_missing_index_is_not_created_by_asking(pair, run, admin, name, put_csv):
    primary, _ = pair
    missing = name("missing")
    assert run(bulkupdate, *load_arguments(put_csv(CSV), missing, "--dry-run")).code == 1
    assert run(reindex, "--source", primary, "--target", missing).code == 1
    assert missing not in admin("GET", f"/{missing}*")


# --- aliases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"is_write_index": True}])
def test_another_alias_on_the_index_to_be_emptied_is_refused_and_named(pair, run, put_csv, admin, name, more):
    primary, secondary = pair
    dashboard = name("dashboard")
    admin("POST", "/_aliases", {"actions": [{"add": {"index": primary, "alias": dashboard, **more}}]})
    before = state_of(admin, primary, secondary)
    outcome = run(bulkupdate, *load_arguments(put_csv(CSV), primary, "--dry-run"))
    assert outcome.code == 4
    assert f"{base.script_command('switch_alias.py')} --alias {dashboard} --source {primary} --target" in outcome.last
    assert state_of(admin, primary, secondary) == before


def test_another_alias_on_the_index_that_is_only_left_is_a_warning(pair, show, admin, name, monkeypatch):
    primary, secondary = pair
    admin("POST", "/_aliases", {"actions": [{"add": {"index": primary, "alias": name("dashboard")}}]})
    monkeypatch.setenv("REFRESH_STRATEGY", "alternate")
    outcome = show(primary, secondary)
    assert outcome.code == 0
    assert re.search(rf"WARNING .*{name('dashboard')}.*{primary}", outcome.err)


# --- limits -----------------------------------------------------------------------------------------------------------

MANY_KINDS = {
    "n": {"type": "long"}, "alias": {"type": "alias", "path": "n"}, "off": {"type": "object", "enabled": False},
    "t": {"type": "text", "index_prefixes": {}, "index_phrases": True, "fields": {
        "k": {"type": "keyword", "fields": {"deep": {"type": "keyword"}}}, "l": {"type": "keyword"}}},
    "o": {"properties": {"x": {"type": "long"}, "p": {"properties": {"y": {"type": "long"}}}}},
    "l": {"type": "nested", "properties": {"z": {"type": "long"}}}, "f": {"type": "flat_object"},
}  # fmt: skip
ADDED = {"w": "text", "v": "long", "o.q.r": "text", "new.s": "long"}  # 2 + 1 + 3 + 2 fields


@pytest.mark.parametrize(("room", "code"), [(-1, 4), (0, 0), (1, 0)])
def test_the_limit_of_fields_is_counted_as_the_server_does(make_index, put_csv, run, admin, room, code):
    held, needed = 16, 8
    settings = {"index.mapping.total_fields.limit": held + needed + room}
    index = make_index("index", MANY_KINDS, docs=[{"n": 1}], settings=settings)
    values = {"text": "word", "long": "1"}
    cells = ",".join(values[kind] for kind in ADDED.values())
    prefix = put_csv({"a.csv": f"n,{','.join(ADDED)}\n1,{cells}\n"})
    for more in [["--dry-run"], []] if code else [["--dry-run"]]:
        outcome = run(bulkupdate, *load_arguments(prefix, index, *more))
        assert outcome.code == code, outcome.err
        if code:
            assert "index.mapping.total_fields.limit" in outcome.last
            assert count(admin, index) == 1
    definitions = {name: bulkupdate.new_field({kind}) for name, kind in ADDED.items()}
    update = {"properties": definitions}
    if code:
        with pytest.raises(RuntimeError, match=r"Limit of total fields \[\d+\]"):
            admin("PUT", f"/{index}/_mapping", update)
    else:
        assert admin("PUT", f"/{index}/_mapping", update)["acknowledged"]


def test_a_mapping_beyond_its_limit_takes_a_load_without_new_columns(make_index, put_csv, load, admin):
    index = make_index("index", MANY_KINDS)
    admin("PUT", f"/{index}/_settings", {"index.mapping.total_fields.limit": 3})
    load(put_csv(CSV), index)


@pytest.mark.parametrize(
    ("properties", "mapping", "header", "named"),
    [
        ({**NUMBER, "b": {"type": "alias", "path": "n"}}, {}, "n,b", "b"),
        (NUMBER, {"_routing": {"required": True}}, "n", "_routing"),
        ({**NUMBER, "o": {"type": "nested", "properties": {"y": {"type": "long"}}}}, {}, "n,o.y", r"o\.y"),
        ({**NUMBER, "o": {"type": "nested"}}, {}, "n,o.new", r"o\.new"),
        *((NUMBER, {}, f"n,{name}", name) for name in ("_doc_count", "_nested_path", "_primary_term")),
    ],
)
@pytest.mark.parametrize("arguments", [["--dry-run"], []])
def test_a_column_that_no_row_could_bring_is_refused_before_the_index_is_emptied(
    make_index, put_csv, run, admin, properties, mapping, header, named, arguments
):
    index = make_index("index", properties, **mapping)
    admin("PUT", f"/{index}/_doc/1?routing=x&refresh=true", {"n": 5})
    before = state_of(admin, index)
    cells = ",".join("1" for _ in header.split(","))
    prefix = put_csv({"a.csv": f"{header}\n{cells}\n"})
    outcome = run(bulkupdate, *load_arguments(prefix, index, *arguments))
    assert outcome.code == 4, outcome.err
    assert re.search(rf"\b{named}\b", outcome.last)
    assert state_of(admin, index) == before


def test_a_nested_field_takes_json_and_an_object_takes_dots(make_index, put_csv, load):
    nested = {"type": "nested", "properties": {"y": {"type": "long"}}}
    index = make_index("index", {**NUMBER, "l": nested, "o": {"properties": {"y": {"type": "long"}}}})
    load(put_csv({"a.csv": 'n,l,o.y\n1,"[{""y"": 1}]",2\n'}), index)


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def put_state(admin):
    """Bring an index into a state, and out of it in the end, or it could not be deleted."""
    changed = []

    def put(state, index):
        if state == "closed":
            admin("POST", f"/{index}/_close")
        else:
            admin("PUT", f"/{index}/_settings", {state: True})
            changed.append((index, state))

    yield put
    for index, state in changed:
        admin("PUT", f"/{index}/_settings", {state: None})


STATES = ["closed", "index.blocks.read", "index.blocks.read_only", "index.blocks.read_only_allow_delete"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("which", [0, 1])
def test_an_index_that_cannot_be_switched_to_or_from_is_refused(pair, show, put_state, state, which):
    indices = pair
    put_state(state, indices[which])
    outcome = show(*indices)
    assert outcome.code == 4, outcome.err
    assert state.removeprefix("index.") in outcome.last
    assert indices[which] in outcome.last


@pytest.mark.parametrize("state", [*STATES, "index.blocks.write"])
def test_an_index_that_cannot_be_filled_is_refused_in_a_dry_run_and_a_run(pair, run, put_csv, put_state, state):
    primary, secondary = pair
    put_state(state, secondary)
    prefix = put_csv(CSV)
    for arguments in ["--dry-run"], []:
        for script, words in (
            (reindex, ["--source", primary, "--target", secondary]),
            (bulkupdate, load_arguments(prefix, secondary)),
        ):
            outcome = run(script, *words, *arguments)
            assert outcome.code == 4, outcome.err
            assert state.removeprefix("index.") in outcome.last


def test_an_append_only_index_is_refused(pair, make_index, run, put_csv):
    index = make_index("append", NUMBER, settings={"index.append_only.enabled": True})
    outcome = run(bulkupdate, *load_arguments(put_csv(CSV), index, "--dry-run"))
    assert outcome.code == 4
    assert "index.append_only.enabled" in outcome.last


def test_an_index_that_is_scaled_down_to_searches_is_refused(pair, run, proxy):
    """Only 3.x has the setting, and with a remote store; here it is in the answer alone."""
    primary, secondary = pair

    def add(found):
        for entry in found.values():
            entry["settings"]["index.blocks.search_only"] = "true"

    proxy.on("GET", rf"^/{primary},{secondary}\?|^/{secondary}\?|^/{secondary},{primary}\?", edited(add), times=None)
    outcome = run(reindex, "--source", primary, "--target", secondary, "--dry-run")
    assert outcome.code == 4
    assert "index.blocks.search_only" in outcome.last


@pytest.fixture
def red(admin, name):
    """Make an index whose only shard has no copy anywhere."""

    def make(suffix, **body):
        index = name(suffix)
        nowhere = {"index.routing.allocation.require._name": "nowhere"}
        admin("PUT", f"/{index}?wait_for_active_shards=0&timeout=1s", {"settings": nowhere, **body})
        return index

    return make


def test_a_red_index_is_refused_after_it_had_time_to_recover(pair, run, red, monkeypatch, put_csv, name):
    _, secondary = pair
    index = red("red", mappings={"properties": NUMBER}, aliases={name("other"): {}})
    monkeypatch.setenv("INDEX_ALIAS", name("other"))
    monkeypatch.setenv("RETRY_SECONDS", "1")
    for outcome in (
        run(switch_alias, "--alias", name("other"), "--show", "--source", index, "--target", secondary),
        run(bulkupdate, *load_arguments(put_csv(CSV), index, "--dry-run")),
        run(reindex, "--source", index, "--target", secondary, "--dry-run"),
    ):
        assert outcome.code == 4, outcome.err
        assert "_cluster/allocation/explain" in outcome.last


def test_a_red_standby_that_would_be_recreated_passes(pair, run, show, red, may_recreate, monkeypatch):
    primary, _ = pair
    index = red("red", mappings={"properties": NUMBER})
    monkeypatch.setenv("RETRY_SECONDS", "1")
    monkeypatch.setenv("CLEANUP_METHOD", "recreate")
    assert run(reindex, "--source", primary, "--target", index, "--dry-run").code == 0
    assert show(primary, index).code == 0


# --- rows of the heads ------------------------------------------------------------------------------------------------


def test_rows_that_would_be_rejected_are_counted_in_a_dry_run(make_index, put_csv, run, admin):
    index = make_index("index", {**NUMBER, "k": {"type": "keyword"}}, docs=3)
    ragged = "".join(f"a,{n},\n" for n in range(12_000))
    prefix = put_csv({"a.csv": f"k,n\n{ragged}"})
    before = state_of(admin, index)
    outcome = run(bulkupdate, *load_arguments(prefix, index, "--dry-run"))
    assert outcome.code == 4
    assert "MAX_REJECTS" in outcome.last
    assert "a.csv line 2: 3 cells under 2 column names" in outcome.last
    assert state_of(admin, index) == before
    assert not list((base.HERE / "logs").glob(f"rejects-{index}-*"))


@pytest.mark.parametrize(("accepted", "code"), [(1, 4), (2, 0), (3, 0)])
def test_as_many_rejects_as_are_accepted_pass(make_index, put_csv, run, accepted, code):
    index = make_index("index", NUMBER)
    prefix = put_csv({"a.csv": "n\n1\nx\n", "b.csv": "n\n1\n2,3\n4\n"})
    outcome = run(bulkupdate, *load_arguments(prefix, index, "--dry-run", "--max-rejects", str(accepted)))
    assert outcome.code == code, outcome.err


def test_only_the_first_hundred_rows_of_each_head_are_rendered(make_index, put_csv, run):
    index = make_index("index", NUMBER)
    good = "".join(f"{n}\n" for n in range(100))
    prefix = put_csv({"a.csv": f"n\n{good}x\n", "b.csv": f"n\n{good}y\n"})
    assert run(bulkupdate, *load_arguments(prefix, index, "--dry-run")).code == 0
    prefix = put_csv({"c.csv": f"n\n{good.replace('99', 'x')}", "d.csv": f"n\n{good}"})
    assert run(bulkupdate, *load_arguments(prefix, index, "--dry-run")).code == 4


def test_ids_that_are_no_ids_count_too(make_index, put_csv, run):
    index = make_index("index", {**NUMBER, "k": {"type": "keyword"}})
    prefix = put_csv({"a.csv": "k,n\n,1\nb,2\n"})
    assert run(bulkupdate, *load_arguments(prefix, index, "--dry-run", "--id-column", "k")).code == 4
    assert run(bulkupdate, *load_arguments(prefix, index, "--dry-run")).code == 0


# --- disk -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(proxy):
    """Let each data node have so many bytes free."""

    def have(free):
        def change(found):
            for node in found["nodes"].values():
                node["fs"]["total"]["available_in_bytes"] = free

        proxy.on("GET", "^/_nodes/.*stats/fs", edited(change), times=None)

    return have


def store(admin, index):
    return admin("GET", f"/{index}/_stats/store")["_all"]["total"]["store"]["size_in_bytes"]


@pytest.mark.parametrize(("strategy", "factor"), [("copy-back", 2.5), ("alternate", 1.5), ("continued", 1.5)])
def test_too_little_disk_for_the_strategy_is_refused(pair, show, disk, admin, proxy, monkeypatch, strategy, factor):
    (primary, secondary), live = pair, pair[0]
    if strategy == "continued":  # readers are on the index that the runner calls secondary: only the load is left
        primary, secondary, strategy = secondary, primary, "copy-back"
    monkeypatch.setenv("REFRESH_STRATEGY", strategy)
    admin("POST", f"/{live}/_flush")
    needed = int(store(admin, live) * factor)
    disk(needed - 2)
    outcome = show(primary, secondary)
    assert outcome.code == 4, outcome.err
    assert "DISK_CHECK=false" in outcome.last
    monkeypatch.setenv("DISK_CHECK", "false")
    assert show(primary, secondary).code == 0
    monkeypatch.setenv("DISK_CHECK", "true")
    proxy.rules.clear()
    disk(needed + 1000)
    assert show(primary, secondary).code == 0


@secured
def test_the_disk_check_is_skipped_with_one_line_where_it_is_denied(pair, show, account):
    primary, secondary = pair
    account.grant("cluster:monitor/nodes/stats")
    outcome = show(primary, secondary)
    assert outcome.code == 0
    assert outcome.err.count("cluster:monitor/nodes/stats") == 1


def test_relocating_shards_are_a_warning(pair, show, proxy):
    primary, secondary = pair
    proxy.on("GET", "^/_cluster/health", edited(lambda found: found.update(relocating_shards=3)), times=None)
    outcome = show(primary, secondary)
    assert outcome.code == 0
    assert re.search(r"WARNING .*relocating shards: 3;", outcome.err)


# --- messages that help -----------------------------------------------------------------------------------------------


def zipped(text):
    with zipfile.ZipFile(found := BytesIO(), "w") as archive:
        archive.writestr("a.csv", text)
    return found.getvalue()


TEXT = b"n,k\n1,a\n2,b\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (TEXT.replace(b"\n", b"\r"), "CR alone"),
        (b"\x28\xb5\x2f\xfd" + bytes(40), "zstd"),
        (zipped(TEXT.decode()), "zip"),
        (gzip.compress(gzip.compress(TEXT)), "gzip twice"),
        (b"PAR1\x15" + bytes(40), "Parquet"),
        (b"sep=;\nn;k\n1;a\n", "sep=;"),
        (b'"n" ,"k"\n1,a\n', "space"),
        ("n,k\n1,a\n".encode("utf-16"), "UTF-16"),
        ("n,k\n1,a\n".encode("utf-16-le"), "UTF-16"),
        (b"\x00\x01\x02\x00\x00\x00\x00\x03" * 9, "NUL"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",  # archives contain the time
)
def test_a_header_that_is_no_csv_says_why(make_index, put_csv, run, content, said):
    index = make_index("index", {**NUMBER, "k": {"type": "keyword"}})
    outcome = run(bulkupdate, *load_arguments(put_csv({"a.csv": content}), index, "--dry-run"))
    assert outcome.code == 4, outcome.err
    assert said in outcome.last
    assert ("UTF-16" in outcome.last) == (said == "UTF-16")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("InvalidObjectState", "restore it"), ("RequestTimeTooSkewed", "clock"),
        ("SignatureDoesNotMatch", "secret"), ("AllAccessDisabled", "bucket"),
        ("NoSuchBucket", "check the name"), ("AccessDenied", "IAM policy"), ("ExpiredToken", "credentials"),
        ("SlowDown", "again"), ("InvalidSignatureException", "clock"), ("InvalidClientTokenId", "renew"),
        ("KMSInvalidStateException", "KMS key"),
    ],
)  # fmt: skip
def test_an_aws_error_says_what_to_do(code, said):
    assert said in base.aws_advice(code, "s3:GetObject")


@pytest.mark.parametrize("name", base.AWS_SECRETS)
def test_a_line_break_in_aws_credentials_is_named_without_its_value(name, run, monkeypatch):
    monkeypatch.setenv(name, "hidden-value\n")
    outcome = run(switch_alias, "--alias", "a", "--show")
    assert outcome.code == 2, outcome.err
    assert f"{name}: remove the line break" in outcome.last
    assert "hidden" not in outcome.err


@pytest.mark.parametrize("text", [
    "The security token included in the request is expired", "Signature expired: 2026 is now earlier than 2026",
    "The request signature we calculated does not match the signature you provided.",
])  # fmt: skip
def test_wrong_aws_credentials_are_not_reported_as_missing_permissions(text):
    assert base.denied_permissions("GET", 403, json.dumps({"message": text}).encode()) == []


def test_a_cluster_that_is_read_only_is_refused():
    reason = "blocked by: [FORBIDDEN/6/cluster read-only (api)];"
    body = json.dumps({"error": {"type": "cluster_block_exception", "reason": reason}, "status": 403}).encode()
    with pytest.raises(base.Refused, match="the cluster is read-only"):
        base.denied_permissions("PUT", 403, body)


@pytest.mark.parametrize("setting", ["default_pipeline", "final_pipeline"])
def test_an_ingest_pipeline_that_does_not_exist_is_refused_before_the_index_is_emptied(
    setting, make_index, load, put_csv, admin
):
    index = make_index("index", NUMBER, docs=3)
    admin("PUT", f"/{index}/_settings", {f"index.{setting}": "nowhere"})
    for more in (["--dry-run"], []):
        outcome = load(put_csv({"a.csv": "n\n1\n"}), index, *more, code=4)
        assert "the ingest pipeline nowhere, which does not exist" in outcome.last
    assert count(admin, index) == 3


def test_documents_that_are_not_stored_cannot_be_copied(make_index, run, admin):
    old, new = make_index("old", NUMBER, docs=3, _source={"enabled": False}), make_index("new", NUMBER, docs=2)
    for more in (["--dry-run"], []):
        outcome = run(reindex, "--source", old, "--target", new, *more)
        assert outcome.code == 4, outcome.err
        assert "COPY_METHOD=clone" in outcome.last
    assert count(admin, new) == 2


def test_documents_that_are_stored_in_part_are_a_warning(make_index, run):
    old, new = (make_index(name, NUMBER, docs=3, _source={"excludes": ["nothing"]}) for name in ("old", "new"))
    outcome = run(reindex, "--source", old, "--target", new)
    assert outcome.code == 0, outcome.err
    assert "COPY_METHOD=clone" in outcome.err


def test_a_clone_replaces_whatever_the_target_has(pair, show, admin, monkeypatch):
    admin("PUT", f"/{pair[0]}/_settings", {"index.max_result_window": 20_000})
    assert show(*pair).code == 4
    monkeypatch.setenv("COPY_METHOD", "clone")
    assert show(*pair).code == 0
    monkeypatch.setenv("REFRESH_STRATEGY", "alternate")
    assert show(*pair).code == 4


@secured
@pytest.mark.parametrize(("column", "code"), [("n", 0), ("x", 1)])
def test_a_load_beside_other_documents_needs_the_mapping_only_for_new_columns(
    column, code, make_index, account, load, put_csv
):
    index = make_index("index", NUMBER, docs=1)
    account.grant("indices:admin/mapping/put")
    prefix = put_csv({"a.csv": f"n,{column}\n1,2\n" if column != "n" else "n\n1\n"})
    for more in (["--dry-run"], []):
        outcome = load(prefix, index, "--no-cleanup", *more, code=code)
        assert ("indices:admin/mapping/put" in outcome.last) == (code == 1)


def test_a_parameter_prefix_needs_its_slash(run, monkeypatch):
    monkeypatch.setenv("OPENSEARCH_PARAMETER_PREFIX", "opensearch")
    outcome = run(switch_alias, "--alias", "a", "--show")
    assert outcome.code == 2
    assert "/opensearch" in outcome.last


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (404, {"osd_name": "dashboards"}, "OpenSearch Dashboards"),
        (302, {"osd_name": "dashboards", "location": "/app/login"}, "OpenSearch Dashboards"),
        (200, {"Content_Type": "text/html; charset=utf-8"}, "web page"),
    ],
)
def test_an_endpoint_that_is_something_else_is_named(run, proxy, status, headers, said):
    headers = {"Content_Type": "application/json"} | headers
    proxy.on("GET", "", answer(status, "<html>Log in</html>", **headers), times=None)
    outcome = run(switch_alias, "--alias", "a", "--show")
    assert outcome.code == 1
    assert said in outcome.last


def test_the_reason_at_the_bottom_is_given():
    error = {
        "type": "search_phase_execution_exception", "reason": "all shards failed", "phase": "query", "grouped": True,
        "failed_shards": [{"shard": 0, "index": "i", "reason": {
            "type": "illegal_argument_exception", "reason": "Batch size is too large"}}],
    }  # fmt: skip
    assert base.error_of(b'{"error": %s}' % str(error).replace("'", '"').replace("True", "true").encode()) == (
        "illegal_argument_exception", "Batch size is too large",
    )  # fmt: skip


def test_nothing_was_changed_is_not_said_after_a_first_round_of_deleting(make_index, run, admin, proxy, name):
    index = make_index("index", NUMBER, docs=30)

    def add(exchange):
        exchange.pass_on()
        fill(admin, index, [{"n": 99}])
        admin("POST", "/_aliases", {"actions": [{"add": {"index": index, "alias": name("late")}}]})

    proxy.on("POST", r"_delete_by_query\?(?!.*slices=auto$)", add)
    outcome = run(index_cleanup, "--index", index, "--no-force-merge")
    assert outcome.code == 4, outcome.err
    assert "nothing was changed" not in outcome.last
    assert "this run has deleted documents from it; readers see the 1 that remain" in outcome.last
    assert count(admin, index) == 1
