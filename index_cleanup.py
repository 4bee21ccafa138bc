"""Empty an index and give its disk space back; mapping and settings stay.

Example:    python index_cleanup.py --index my_index_secondary --method recreate
Exit codes: 0 empty, and counted; 1 failed; 2 usage; 4 refused (an alias points at it); 75 locked; 129, 130, 143
            signals.

`ClearableIndex` empties an index, for reindex.py and bulkupdate.py as well.
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
    seconds_since,
)  # fmt: skip

MAX_ROUNDS = 3  # a delete-by-query sees what was there when it started; more would chase a client that keeps writing
SCROLL_SIZE = 5000  # documents a batch on the server
LEASES_WAIT_S = 60  # the server moves retention leases every 30 s; until then a merge drops nothing
STATS_AGE_S = 12  # the server renews the store size every 10 s
BACKUP_OF = f"{SUITE}/recreates"  # in `_meta` of a backup index: {index, uuid, blocks} of the one it stands for
# what the server gives to each index by itself
SERVER_SETTINGS = re.compile(
    r"index\.(uuid|creation_date|provided_name|version\..*|resize\..*|routing\.allocation\.initial_.*|remote_store\..*)"
)


class ClearableIndex(TargetIndex):
    """An index that is emptied, for itself or to be filled: `claim`, then `empty` inside of `fill`.

    What a kill leaves while it is emptied by recreate, by the request that was sent last, in addition to the states of
    TargetIndex; the marker and the settings of the load are part of the definition:

        backup index created      index and backup: claim() sees the UUID that the backup names, and deletes the backup
        PUT of the index          as above; it is sent to be refused, and shows that the index could be created
        index deleted             the backup alone: claim() creates the index from it
        index created             index, empty, and backup: claim() sees the same definition, and deletes the backup
        backup deleted            the index, empty, with the marker

    If another client creates the missing index (a stray write does, with guessed types), claim() refuses if it lacks
    anything that the backup holds. A backup that may not be read (403) is reported if the index is missing, and keeps
    the index from being recreated.
    """

    def __init__(self, manager: OpenSearchBaseManager, name: str, *, shared: bool = False) -> None:
        super().__init__(manager, name, shared=shared)
        self.method: str = manager.settings.cleanup_method
        self.backup = BackupIndex(manager, name)

    # --- recover ---

    def exists(self) -> bool:
        """Say whether it is there to stay: with a backup index, a run may be about to delete or to create it."""
        backup = self.manager.request("GET", f"/{self.backup.name}", accept=[403, 404])
        return super().exists() and backup.status != 200

    def require_permissions(self) -> None:
        super().require_permissions()
        if self.method == "recreate":
            probes = [*creating_probes(self.name), *creating_probes(self.backup.name)]
            if missing := missing_permissions(self.manager, probes):
                log.warning("index %s cannot be recreated, so its documents are deleted instead: the role of %s lacks "
                            "%s", self.name, self.manager.who, ", ".join(missing))  # fmt: skip
                self.method = "delete"

    def recover_index(self) -> None:
        """Create an index that a crashed run had deleted; delete a backup that is no longer needed.

        In a dry run the backup stands in for a missing index.
        """
        try:
            kept = self.backup.read()
        except RequestFailed as error:
            if error.status != 403:
                raise
            return self._go_on_without_backup(error)
        if kept is None:
            return
        # wait for queued cluster updates: an unanswered DELETE may still be pending
        self.manager.request("GET", "/_cluster/health", params={"wait_for_events": "languid"}, accept=[408])
        if now := read_index(self.manager, self.name):
            self.backup.refuse_another_index(*kept, now)
            if not self.manager.dry_run:
                self.backup.delete()
            return
        log.warning("index %s is missing: a run crashed between deleting and creating it", self.name)
        if self.manager.dry_run:
            self.name = self.backup.name
        else:
            self.backup.restore()

    def _go_on_without_backup(self, forbidden: RequestFailed) -> None:
        """Without recreate this permission is not needed; report its absence only if a backup may matter."""
        if not self.manager.index_exists(self.name):
            raise OperationFailed(
                f'index {self.name} does not exist; create it first (README, "Setting up"), unless {self.backup.name} '
                f"holds its definition; that index cannot be read: {forbidden}"
            )
        if self.method == "recreate":
            log.warning("index %s cannot be recreated, so its documents are deleted instead: %s", self.name, forbidden)
            self.method = "delete"

    def await_primaries(self) -> None:
        if self.method != "recreate":  # which heals it
            super().await_primaries()

    # --- empty ---

    def empty(self) -> int | None:
        """Empty the index; return how many documents there were, None if that is unknown.

        Raises Refused when an alias has come since, OperationFailed when it could not be emptied. A failure leaves the
        index partly emptied, or (recreate) missing, with a backup that `claim` restores it from.
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

    def count_unless_red(self) -> int | None:
        """Count the documents; return None when a shard has no copy at all, which only recreate can heal."""
        health = f"/_cluster/health/{self.name}"
        if self.method == "recreate" and self.manager.request("GET", health).data["status"] == "red":
            return None
        return self.manager._get_index_count(self.name)

    def _delete_documents(self, found: int) -> None:
        """Delete all documents. Raises OperationFailed when some are left after three rounds."""
        began, left = time.monotonic(), found
        window = result_window(self.manager._verify_index_exists(self.name))
        size = self.manager.settings.requests_per_second.batch_size(min(SCROLL_SIZE, window))
        for rounds in range(MAX_ROUNDS):
            if rounds:
                await_replicas(self.manager, self.name)
            self.manager.run_task(
                f"/{self.name}/_delete_by_query", {"query": {"match_all": {}}}, label=f"emptying {self.name}",
                total=left, conflicts="proceed", scroll_size=size,
            )  # fmt: skip
            if not (left := self.manager._get_index_count(self.name)):
                log.info("deleted %s documents from %s in %.1f s, %s/s", f"{found:,}", self.name,
                         time.monotonic() - began, f"{per_second(found, began):,}")  # fmt: skip
                return
            # a run on another host may have finished meanwhile, and have moved readers here
            if aliases := self.manager._check_index_aliases(self.name):
                raise Refused(
                    f"index {self.name} is live: alias {', '.join(aliases)} points at it, and {found:,} of its "
                    f"documents have been deleted; readers see the {left:,} that remain. Move readers to the other "
                    "index, then load this one again"
                )
        raise OperationFailed(
            f"index {self.name}: {left:,} documents remain after {MAX_ROUNDS} rounds: another client is writing to "
            "it; stop that client and run again"
        )

    # --- empty by recreate ---

    def _recreate(self) -> bool:
        """Delete the index and create it anew; say whether it was done, or is forbidden and everything is as it was."""
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
            else:  # a deletion that was sent may yet be carried out: then the backup is all that is left
                self._restore_after(failure)
            raise
        self.backup.delete()
        self.uuid = self.manager.index_uuid(self.name)  # the new one is ours from here on
        log.info("recreated %s in %.1f s", self.name, time.monotonic() - began)
        return True

    def _validate_definition(self) -> dict[str, Any]:
        """Create the backup, and see that the index could be created as well; return the definition of both.

        Raises CannotReplace when one of them is refused, or would not become the same.
        """
        definition = definition_of(self.manager.read_indices(self.name)[self.name])
        try:
            self.backup.create(definition, self.uuid)
            # 400, since it is there; 403 without the permission
            self.manager.request("PUT", f"/{self.name}", definition, accept=[400])
        except OutcomeUnknown:
            raise
        except OperationFailed as error:
            raise CannotReplace(str(error)) from None
        return definition

    def delete_index(self) -> None:
        """Delete the index by one request, which is never sent again: it could meet the new index, or a live one.

        Raises CannotReplace when the cluster refuses, OutcomeUnknown when no response came and it is still there.
        """
        try:
            self.manager.request("DELETE", f"/{self.name}", idempotent=False, retry=False)
        except OutcomeUnknown as unknown:
            log.warning("%s; checking whether index %s still exists", unknown, self.name)
            time.sleep(1)
            if read_index(self.manager, self.name):
                raise
        except RequestFailed as error:
            if error.status == 404:  # somebody else was faster: the backup holds what it was
                raise
            raise CannotReplace(str(error)) from None

    def _restore_after(self, failure: BaseException) -> None:
        try:
            run_to_completion(self.backup.restore)
        except OperationFailed as error:
            log.error("index %s is not restored yet; the next run restores it: %s", self.name, error)
            self.marker.own = None  # it is in the backup, and comes back with the index
            failure.args = (
                f"{failure}; index {self.name} is deleted, and {self.backup.name} holds its definition. Fix the cause "
                "and run again: the next run creates the index from it",
            )


class BackupIndex:
    """The empty index `<index>-recreate`, which holds the definition of an index while that is deleted and created."""

    def __init__(self, manager: OpenSearchBaseManager, index: str) -> None:
        self.manager, self.index, self.name = manager, index, f"{index}-recreate"

    def create(self, definition: Mapping[str, Any], uuid: str) -> None:
        """Create it; blocks are kept in `_meta`, since with a block it could not be deleted any more."""
        settings, mappings = dict(definition["settings"]), definition["mappings"]
        blocks = {name: settings.pop(name) for name in list(settings) if name.startswith("index.blocks.")}
        meta = {**mappings.get("_meta", {}), BACKUP_OF: {"index": self.index, "uuid": uuid, "blocks": blocks}}
        create_index(self.manager, self.name, {"settings": settings, "mappings": {**mappings, "_meta": meta}})

    def read(self) -> tuple[dict[str, Any], str] | None:
        """Return the definition that it holds and the UUID of the index that had it.

        None when there is no such index, or it is somebody else's. Raises RequestFailed (403) when it may not be read.
        """
        if (found := read_index(self.manager, self.name)) is None:
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
        """Create the index from its definition, if it is gone; the backup of one that is there stays."""
        if (kept := self.read()) and not read_index(self.manager, self.index):
            create_index(self.manager, self.index, kept[0])
            self.delete()
            log.info("index %s is restored and empty", self.index)

    def delete(self) -> None:
        try:
            if self.read():
                self.manager.request("DELETE", f"/{self.name}", accept=[404])
        except RequestFailed as error:
            log.warning("the empty index %s could not be deleted; delete it: %s", self.name, error)

    def refuse_another_index(self, definition: Mapping[str, Any], uuid: str, now: Mapping[str, Any]) -> None:
        """Raise Refused if another client has created the index since, and it lacks something of this definition."""
        different = [] if now["settings"]["index.uuid"] == uuid else differences(definition, definition_of(now))
        if different:
            live = ", ".join(now["aliases"])
            delete = f"Delete {self.index}, so that the next run creates it from {self.name}, or delete {self.name}"
            raise Refused(
                f"index {self.index} has lost its definition of {', '.join(different)}: a run crashed between deleting "
                f"and creating it, and another client created it. {f'Delete {self.name}' if live else delete} if "
                f"{self.index} is right{live and f' (alias {live} points at it)'}"
            )


class CannotReplace(OperationFailed):
    """Something forbids it, and nothing has been deleted."""


# --- definitions: what makes an index the same once more --------------------------------------------------------------


def read_index(manager: OpenSearchBaseManager, index: str) -> dict[str, Any] | None:
    """Return the response to a GET of an index; None when there is none of that name (an alias has another)."""
    response = manager.request("GET", f"/{index}", params={"flat_settings": "true"}, accept=[404])
    found: dict[str, Any] | None = response.data.get(index) if response.status == 200 else None
    return found


def definition_of(found: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in found["settings"].items() if not SERVER_SETTINGS.fullmatch(name)}
    if settings.get("index.auto_expand_replicas", "false") != "false":
        settings.pop("index.number_of_replicas", None)  # follows the number of nodes
    return {"settings": settings, "mappings": dict(found["mappings"])}


def differences(definition: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return what another index has not, or otherwise: fields, parameters of the mapping, settings.

    Further fields are none, since documents bring them; nor are our marker, the settings that it says to restore, and
    the block that the server sets and removes by itself.
    """
    ours, theirs = parts_of(definition), parts_of(other)
    further = {name for name, _ in field_definitions(other["mappings"])} - set(ours)
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name) and name not in further]


def parts_of(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return a definition name by name, as it is when no load is under way."""
    mappings, settings = dict(definition["mappings"]), recovered_settings(definition)
    meta = dict(mappings.pop("_meta", {}))
    meta.pop(SUITE, None)
    settings.pop("index.blocks.read_only_allow_delete", None)
    fields = dict(field_definitions(mappings))
    mappings.pop("properties", None)
    return {**fields, **mappings, **settings, "_meta": meta}


def create_index(manager: OpenSearchBaseManager, index: str, definition: Mapping[str, Any]) -> None:
    """Create an index, and read it back.

    Raises OperationFailed when it is not what was asked for; it is deleted again if it was certainly created here.
    """
    exists: RequestFailed | None = None
    try:
        manager.request("PUT", f"/{index}", definition)
    except RequestFailed as error:
        if error.kind != "resource_already_exists_exception":
            raise
        exists = error  # by an attempt without a response, or by somebody who may have moved readers to it since
    aliases, found = manager._check_index_aliases(index), read_index(manager, index)
    if not aliases and found and definition_of(found) == definition:
        return
    if exists:
        raise exists
    manager.request("DELETE", f"/{index}", idempotent=False, retry=False, accept=[404])  # once: as in delete_index
    brought = f"the alias {', '.join(aliases)}" if aliases else "other settings or fields"
    raise OperationFailed(
        f"an index template (or another run) gave the new index {index} {brought}, so it was deleted again; change "
        "the template"
    )


# --- the script -------------------------------------------------------------------------------------------------------


class IndexCleanup(OpenSearchBaseManager):
    def __init__(self, settings: argparse.Namespace) -> None:
        super().__init__(settings)
        self.target = ClearableIndex(self, settings.index)
        if settings.cleanup_method == "recreate":
            self.target.obstacles = ()  # it frees a full disk too, and keeps a write block
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
        if not self.settings.no_force_merge and self._stats("docs")["deleted"]:  # by a former run, perhaps
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
        return dict(self.request("GET", f"/{self.target.name}/_stats/{metric}").data["_all"]["total"][metric])

    def _free_disk_space(self) -> None:
        """Flush, wait until the server may drop what was deleted, merge, refresh: another order frees nothing."""
        index = self.target.name
        log.info("waiting until the server may drop the deleted documents (at most %s s)", LEASES_WAIT_S)
        self.request("POST", f"/{index}/_flush")
        self._await_leases()
        try:
            params = {"only_expunge_deletes": "true"}
            merged = self.request("POST", f"/{index}/_forcemerge", params=params, idempotent=False).data
            self.verify_all_shards(merged, f"_forcemerge of {index}")
        except OutcomeUnknown as error:
            log.warning("the merge continues in the background and frees the disk space when it ends: %s", error)
        self.request("POST", f"/{index}/_refresh")  # an idle index keeps the old files open
        time.sleep(STATS_AGE_S)

    def _await_leases(self) -> None:
        """Wait until no shard copy retains deleted documents for recoveries; a node that is away can hold them 12 h."""
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
    parser.add_argument("--index", required=True, type=index_name, help="the index to empty; no alias may point at it")
    return add_settings(parser)


def run(settings: argparse.Namespace) -> dict[str, Any]:
    with IndexCleanup(settings) as cleanup:
        return cleanup.run()


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
