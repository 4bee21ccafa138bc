"""Empty an index and free its disk space; mapping and settings stay.

Example:    python index_cleanup.py --index my_index_secondary --method recreate
Exit codes: 0 the index is empty; 1 failed; 2 usage; 4 refused (it is live, blocked, closed, or in use by a task);
            75 locked; 129, 130, 143 signals.

reindex.py and bulkupdate.py also use `ClearableIndex`.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opensearch_base_manager import (
    SUITE, OpenSearchBaseManager, OperationFailed, OutcomeUnknown, Probe, Refused, RequestFailed, TargetIndex,
    add_settings, await_replicas, bulk_probe, creating_probes, deleting_probes, field_definitions, index_name, log,
    missing_permissions, per_second, reading_probes, recovered_settings, result_window, run_cli, run_to_completion,
    seconds_since, verify_sees_everything, without_search_pipeline,
)  # fmt: skip

MAX_ROUNDS = 3  # a delete-by-query misses documents added meanwhile; more rounds would chase a client that still writes
SCROLL_SIZE = 5000  # documents per batch on the server
LEASES_WAIT_S = 60  # the server advances retention leases every 30 s; until then, a merge keeps deleted documents
STATS_AGE_S = 12  # the server updates the store size every 10 s
BACKUP_OF = f"{SUITE}/recreates"  # in `_meta` of a backup index: {index, uuid, blocks} of the original index
# settings that the server generates
SERVER_SETTINGS = re.compile(
    r"index\.(uuid|creation_date|provided_name|history\.uuid|version\..*|resize\..*|"
    r"routing\.allocation\.initial_.*|remote_store\..*)"
)


class ClearableIndex(TargetIndex):
    """A target index that can be emptied: call `claim`, then `empty` inside `fill`.

    State after a kill during a recreate, by the last request that was sent (TargetIndex lists the other states). The
    recreated index also has the marker and the settings of the load, which are part of its definition.

        backup index created      index and backup: claim() finds the UUID that the backup names, deletes the backup
        PUT of the index          the same; the server rejects it, since the index exists: this tests the permission
        index deleted             only the backup: claim() creates the index from it
        index created             empty index and backup: claim() finds the same definition, deletes the backup
        backup deleted            empty index with the marker

    Another client may have created the missing index (a stray write does so, with guessed types): claim() refuses it
    unless it has everything in the backup. If this user may not read the backup (403), a missing index is an error
    that names the backup, and an existing one is emptied by deleting its documents.
    """

    def __init__(self, manager: OpenSearchBaseManager, name: str, *, shared: bool = False) -> None:
        super().__init__(manager, name, shared=shared)
        self.method: str = manager.settings.cleanup_method
        self.backup = BackupIndex(manager, name)
        self._kept: tuple[dict[str, Any], str] | None = None  # what the backup held when the index was claimed
        self._unreadable: RequestFailed | None = None  # why the backup cannot be read

    # --- recover ---

    def require_permissions(self, exists: bool) -> None:
        """Read the backup and check the permissions; if a recreate is not permitted, fall back to deleting documents.

        While a backup exists, no bulk probe is sent: the index may be missing, and the probe would create it.
        """
        try:
            self._kept = self.backup.read()
        except RequestFailed as error:
            if error.status != 403:
                raise
            self._unreadable = error
        super().require_permissions(exists and not self._kept)
        if self.method == "recreate":
            probes = [*creating_probes(self.name), *creating_probes(self.backup.name)]
            if missing := missing_permissions(self.manager, probes):
                log.warning("index %s cannot be recreated, so its documents are deleted instead: the role of %s lacks "
                            "%s", self.name, self.manager.who, ", ".join(missing))  # fmt: skip
                self.method = "delete"

    def recover_index(self, found: dict[str, Any] | None) -> dict[str, Any] | None:
        """Create an index that a crashed run has deleted, or delete a backup that is no longer needed.

        Returns the state of the index, None if it must be read. In a dry run the backup stands in for a missing index.
        """
        if self._unreadable:
            self._continue_without_backup(self._unreadable, found)
        if not self._kept:
            return found
        # wait for queued cluster updates: an unanswered DELETE may still be pending
        self.manager.request("GET", "/_cluster/health", params={"wait_for_events": "languid"}, accept=[408])
        if now := self.manager.read_index(self.name):
            self.backup.refuse_another_index(*self._kept, now)
            if not self.manager.dry_run:
                self.backup.delete()
            return now
        log.warning("index %s is missing: a run crashed after deleting it and before recreating it", self.name)
        if self.manager.dry_run:
            self.name = self.backup.name
        else:
            self.backup.restore()
        return None

    def _continue_without_backup(self, forbidden: RequestFailed, found: Mapping[str, Any] | None) -> None:
        """Without recreate this permission is not needed; report its absence only if a backup may matter."""
        if not found and not self.manager._read(self.name, [404]):
            raise OperationFailed(f'index {self.name} does not exist; create it first (README, "Setting up"), unless a '
                                  f"recreate was interrupted: then {self.backup.name} holds its definition, but it "
                                  f"cannot be read: {forbidden}; grant that permission and run again")  # fmt: skip
        if self.method == "recreate":
            log.warning("index %s cannot be recreated, so its documents are deleted instead: %s", self.name, forbidden)
            self.method = "delete"

    def await_primaries(self) -> bool:
        return self.method != "recreate" and super().await_primaries()  # recreate fixes a red index

    # --- empty ---

    def empty(self) -> int | None:
        """Empty the index; return how many documents it held, None if unknown.

        Raises Refused if an alias has been added, OperationFailed if the index cannot be emptied. A failure can leave
        the index partly emptied or (recreate) missing; the next `claim` then restores it from the backup.
        """
        self.refuse_live()
        found = self.count_unless_red()
        if found == 0:
            log.info("%s is already empty", self.name)
            return 0
        log.info("deleting %s documents from %s", "all" if found is None else f"{found:,}", self.name)
        if self.method == "recreate" and self._recreate():
            return found
        found = self.manager._get_index_count(self.name) if found is None else found
        self.emptied = True
        self._delete_documents(found)
        return found

    def needs_recreate(self) -> bool:
        """Return whether the index is red and will be recreated; with the method delete, always False."""
        health = f"/_cluster/health/{self.name}"
        return self.method == "recreate" and self.manager.request("GET", health).data["status"] == "red"

    def count_unless_red(self) -> int | None:
        return None if self.needs_recreate() else self.manager._get_index_count(self.name)

    def verify_sees_everything(self) -> None:
        if not self.needs_recreate():
            verify_sees_everything(self.manager, self.name, self.found)

    def _delete_documents(self, found: int) -> None:
        """Delete all documents. Raises OperationFailed if some remain after 3 rounds, Refused if an alias was added."""
        began, left = time.monotonic(), found
        window = result_window(self.found["settings"])
        size = self.manager.settings.requests_per_second.batch_size(min(SCROLL_SIZE, window))
        for rounds in range(MAX_ROUNDS):
            if rounds:
                await_replicas(self.manager, self.name)
            self.manager.run_task(
                f"/{self.name}/_delete_by_query", {"query": {"match_all": {}}}, label=f"emptying {self.name}",
                total=left, conflicts="proceed", scroll_size=size,
                **without_search_pipeline(self.found["settings"]),
            )  # fmt: skip
            if not (left := self.manager._get_index_count(self.name)):
                log.info("deleted %s documents from %s in %.1f s, %s/s", f"{found:,}", self.name,
                         time.monotonic() - began, f"{per_second(found, began):,}")  # fmt: skip
                return
            # a run on another host may have finished in the meantime and moved readers here
            if aliases := self.manager._check_index_aliases(self.name):
                raise Refused(
                    f"index {self.name} is live: alias {', '.join(aliases)} points at it, but this run has deleted "
                    f"documents from it; readers see the {left:,} that remain. Move readers to the other index, then "
                    "load this one again"
                )
        raise OperationFailed(
            f"index {self.name}: {left:,} documents remain after {MAX_ROUNDS} rounds: another client is writing to "
            "it; stop that client and run again"
        )

    # --- empty by recreate ---

    def _recreate(self) -> bool:
        """Delete and recreate the index. If the cluster does not allow that, return False; nothing has changed then."""
        began = time.monotonic()
        try:
            definition = self._validate_definition()
            self.refuse_live()
            self.verify_same()
            self.emptied = True
            self.delete_index()
            create_index(self.manager, self.name, definition)
        except CannotReplace as error:
            self.emptied = False
            self.backup.delete()
            log.warning("index %s cannot be recreated, so its documents are deleted instead: %s", self.name, error)
            return False
        except BaseException as failure:
            if not self.emptied:
                run_to_completion(self.backup.delete)
            else:  # an unanswered deletion may still take effect: then only the backup is left
                self._restore_after(failure)
            raise
        self.backup.delete()
        self.uuid = self.manager.index_uuid(self.name)  # of the new index
        log.info("recreated %s in %.1f s", self.name, time.monotonic() - began)
        return True

    def _validate_definition(self) -> dict[str, Any]:
        """Create the backup from the index's definition, and return that definition.

        Raises CannotReplace if the backup differs from it, or if the cluster would not allow this user to create the
        index. The index itself stays unchanged.
        """
        definition = definition_of(self.manager._verify_index_exists(self.name))
        try:
            self.backup.create(definition, self.uuid)
            if self.manager.request("GET", f"/_cluster/health/{self.backup.name}").data["status"] == "red":
                raise OperationFailed("the shards of a new index are not allocated; see GET "
                                      "_cluster/allocation/explain")  # fmt: skip
            # 400, since it exists; 403 without the permission
            self.manager.request("PUT", f"/{self.name}", definition, accept=[400])
        except OutcomeUnknown:
            raise
        except OperationFailed as error:
            raise CannotReplace(str(error)) from None
        return definition

    def delete_index(self) -> None:
        """Delete the index with a single request: a second one could delete the new index, or a live one.

        Raises CannotReplace if the cluster refuses, OutcomeUnknown if there is no response and the index still exists.
        """
        try:
            self.manager.request("DELETE", f"/{self.name}", idempotent=False, retry=False)
        except OutcomeUnknown as unknown:
            log.warning("%s; checking whether index %s still exists", unknown, self.name)
            time.sleep(1)
            if self.manager.read_index(self.name):
                raise
        except RequestFailed as error:
            if error.status == 404:  # another client deleted it; the backup holds its definition
                raise
            raise CannotReplace(str(error)) from None

    def _restore_after(self, failure: BaseException) -> None:
        try:
            run_to_completion(self.backup.restore)
        except OperationFailed as error:
            log.error("index %s is not restored yet; the next run restores it: %s", self.name, error)
            self.marker.own = None  # `fill` has nothing to restore; the backup holds the marker, too
            failure.args = (
                f"{failure}; index {self.name} may be deleted, and {self.backup.name} holds its definition. Fix the "
                "cause and run again: if the index is missing, the next run creates it from that definition",
            )


class BackupIndex:
    """The empty index `<index>-recreate`, which holds the definition of an index while it is recreated."""

    def __init__(self, manager: OpenSearchBaseManager, index: str) -> None:
        self.manager, self.index, self.name = manager, index, f"{index}-recreate"

    def create(self, definition: Mapping[str, Any], uuid: str) -> None:
        """Create the backup; blocks are kept in `_meta`, since a backup with a block could not be deleted."""
        settings, mappings = dict(definition["settings"]), definition["mappings"]
        blocks = {name: settings.pop(name) for name in list(settings) if name.startswith("index.blocks.")}
        meta = {**mappings.get("_meta", {}), BACKUP_OF: {"index": self.index, "uuid": uuid, "blocks": blocks}}
        create_index(self.manager, self.name, {"settings": settings, "mappings": {**mappings, "_meta": meta}})

    def read(self) -> tuple[dict[str, Any], str] | None:
        """Return the definition in this backup, and the UUID of the index that it was taken from.

        Return None if there is no index of this name, or if it is not a backup of this index. Raises RequestFailed
        (403) if this user may not read it.
        """
        if (found := self.manager.read_index(self.name)) is None:
            return None
        definition = definition_of(found)
        meta = dict(definition["mappings"].pop("_meta", {}))
        kept = meta.pop(BACKUP_OF, None)
        if not isinstance(kept, dict) or kept.get("index") != self.index:
            return None
        definition["settings"].update(kept["blocks"])
        if meta:
            definition["mappings"]["_meta"] = meta
        return definition, str(kept["uuid"])

    def restore(self) -> None:
        """If the index is missing, create it from the backup and delete the backup; otherwise change nothing."""
        if (kept := self.read()) and not self.manager.read_index(self.index):
            create_index(self.manager, self.index, kept[0])
            self.delete()
            log.info("index %s is restored and empty", self.index)

    def delete(self) -> None:
        try:
            if self.read():
                self.manager.request("DELETE", f"/{self.name}", accept=[404])
        except RequestFailed as error:
            log.warning("the empty index %s could not be deleted (%s); delete it by hand", self.name, error)

    def refuse_another_index(self, definition: Mapping[str, Any], uuid: str, now: Mapping[str, Any]) -> None:
        """Raise Refused if another client has created the index, and it differs from this definition."""
        different = [] if now["settings"]["index.uuid"] == uuid else differences(definition, definition_of(now))
        if different:
            live = ", ".join(now["aliases"])
            delete = f"Delete {self.index}, so that the next run creates it from {self.name}, or delete {self.name}"
            raise Refused(
                f"index {self.index} differs from its backup {self.name} in {', '.join(different)}: a run crashed "
                f"after deleting the index, and another client created it. {f'Delete {self.name}' if live else delete} "
                f"if {self.index} is right{live and f' (alias {live} points at it)'}"
            )


class CannotReplace(OperationFailed):
    """The cluster does not allow the index to be replaced; nothing has been deleted."""


# --- definitions: mapping and settings of an index --------------------------------------------------------------------


def definition_of(found: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in found["settings"].items() if not SERVER_SETTINGS.fullmatch(name)}
    if settings.get("index.auto_expand_replicas", "false") != "false":
        settings.pop("index.number_of_replicas", None)  # follows the number of nodes
    return {"settings": settings, "mappings": dict(found["mappings"])}


def differences(definition: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the fields, mapping parameters and settings that only one of two indices has, or that differ.

    This ignores fields that only `other` has (documents add them), the marker, changes that the marker will undo, and
    the block that the server manages.
    """
    ours, theirs = parts_of(definition), parts_of(other)
    further = {name for name, _ in field_definitions(other["mappings"])} - set(ours)
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name) and name not in further]


def parts_of(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields, mapping parameters and settings by name; settings as they are when no load is running."""
    mappings, settings = dict(definition["mappings"]), recovered_settings(definition)
    meta = dict(mappings.pop("_meta", {}))
    meta.pop(SUITE, None)
    settings.pop("index.blocks.read_only_allow_delete", None)
    fields = dict(field_definitions(mappings))
    mappings.pop("properties", None)
    return {**fields, **mappings, **settings, "_meta": meta}


def create_index(manager: OpenSearchBaseManager, index: str, definition: Mapping[str, Any]) -> None:
    """Create an index and read it back.

    Raises OperationFailed if the index differs from the definition or has an alias. The index is then deleted, unless
    it already existed: another client may have created it.
    """
    exists: RequestFailed | None = None
    try:
        manager.request("PUT", f"/{index}", definition)
    except RequestFailed as error:
        if error.kind != "resource_already_exists_exception":
            raise
        exists = error  # created by an unanswered attempt, or by another client, which may have moved readers to it
    found = manager._verify_index_exists(index)
    aliases = sorted(found["aliases"])
    if not aliases and definition_of(found) == definition:
        return
    if exists:
        raise exists
    manager.request("DELETE", f"/{index}", idempotent=False, retry=False, accept=[404])  # no retry: see delete_index
    brought = f"the alias {', '.join(aliases)}" if aliases else "other settings or fields"
    raise OperationFailed(
        f"an index template (or another run) gave the new index {index} {brought}, so this index was deleted; change "
        "the template"
    )


# --- the script -------------------------------------------------------------------------------------------------------


class IndexCleanup(OpenSearchBaseManager):
    def __init__(self, settings: argparse.Namespace) -> None:
        super().__init__(settings)
        self.target = ClearableIndex(self, settings.index)
        if settings.cleanup_method == "recreate":
            self.target.obstacles = ()  # a recreate works on a full disk, and the new index keeps a write block
        self.names = [settings.index]
        self.probes = [*reading_probes(settings.index), *deleting_probes(settings.index),
                       bulk_probe(settings.index, "delete")]  # fmt: skip
        if not settings.no_force_merge:
            self.probes.append(Probe("POST", f"/{settings.index}/_flush"))

    def run(self) -> dict[str, Any]:
        began, target = time.monotonic(), self.target
        target.claim()
        if self.dry_run:
            return {"index": target.name, "would_delete": target.count_unless_red(), "dry_run": True}
        before = self._stats("store")["size_in_bytes"]
        with target.fill(loading=False):
            deleted = target.empty()
        if not self.settings.no_force_merge and self._stats("docs")["deleted"]:  # perhaps by an earlier run
            self._free_disk_space()
        target.verify_same()
        result = {
            "index": target.name, "deleted": deleted, "documents": self._get_index_count(target.name),
            "bytes_before": before, "bytes_after": self._stats("store")["size_in_bytes"],
            "seconds": seconds_since(began),
        }  # fmt: skip
        log.info("done: index %s deleted=%s documents=%s bytes_before=%s bytes_after=%s seconds=%s", *result.values())
        return result

    def _stats(self, metric: str) -> dict[str, int]:
        found = self.request("GET", f"/{self.target.name}/_stats/{metric}").data["_all"]["total"]
        return dict(found.get(metric, {"size_in_bytes": 0, "deleted": 0}))  # without an active shard, there are none

    def _free_disk_space(self) -> None:
        """Flush, wait until a merge can drop deleted documents, merge, refresh; only this order frees disk space."""
        index = self.target.name
        log.info("waiting until the server may drop the deleted documents (at most %s s)", LEASES_WAIT_S)
        self.request("POST", f"/{index}/_flush")
        self._await_leases()
        try:
            params = {"only_expunge_deletes": "true"}
            merged = self.request("POST", f"/{index}/_forcemerge", params=params, idempotent=False).data
            self.verify_all_shards(merged, f"_forcemerge of {index}")
        except OutcomeUnknown as error:
            log.warning("%s; the merge may still be running; if so, it frees the disk space when it ends", error)
        self.request("POST", f"/{index}/_refresh")  # an idle index keeps the old files open
        time.sleep(STATS_AGE_S)

    def _await_leases(self) -> None:
        """Wait up to LEASES_WAIT_S until no copy retains deleted documents; a missing node's lease lasts 12 h."""
        deadline = time.monotonic() + LEASES_WAIT_S
        while any(map(retains_deleted, itertools.chain(*self.shard_stats(self.target.name).values()))):
            if time.monotonic() > deadline:
                log.warning("index %s: the server still retains deleted documents; a later merge drops them",
                            self.target.name)  # fmt: skip
                return
            time.sleep(1)


def retains_deleted(copy: Mapping[str, Any]) -> bool:
    leases = copy.get("retention_leases", {}).get("leases", [])
    return any(lease["retaining_seq_no"] <= copy["seq_no"]["max_seq_no"] for lease in leases)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="index_cleanup.py", description="Delete all documents of an index.")
    parser.add_argument("--index", required=True, type=index_name, help="index to empty; no alias may point at it")
    return add_settings(parser)


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, IndexCleanup, argv)


if __name__ == "__main__":
    raise SystemExit(main())
