"""Empty an index and give its disk space back; mapping and settings stay.

Example:    python index_cleanup.py --index my_index_secondary --method recreate
Exit codes: 0 empty, and counted; 1 failed; 2 usage; 4 refused (an alias points at it); 75 locked; 129, 130, 143
            signals.

`TargetIndex` is the life of an index that is emptied or filled, for reindex.py and bulkupdate.py as well.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opensearch_base_manager import (
    SUITE, OpenSearchBaseManager, OperationFailed, OutcomeUnknown, Refused, RequestFailed, add_settings,
    documents_at_once, field_definitions, finished_in_any_case, index_name, log, per_second, run_cli, seconds_since,
)  # fmt: skip

MAX_ROUNDS = 3  # a delete-by-query sees what was there when it started; more would chase somebody who writes
SCROLL_SIZE = 5000  # documents a batch on the server
LEASES_WAIT_S = 60  # the server moves retention leases every 30 s; until then a merge drops nothing
STATS_AGE_S = 12  # the server renews the store size every 10 s
EXISTS = "resource_already_exists_exception"
BACKUP_OF = f"{SUITE}/recreates"  # in `_meta` of a backup index: {index, uuid, blocks} of the one it stands for
# what the server gives to each index by itself
SERVER_SETTINGS = re.compile(
    r"index\.(uuid|creation_date|provided_name|version\..*|resize\..*|routing\.allocation\.initial_.*)"
)


class TargetIndex:
    """An index that is about to be emptied or filled, from the lock to the last count.

        target = TargetIndex(manager, "my_index_primary", method="delete")
        target.claim()                      # nobody else works on it, and what a run that died left is recovered
        with target.fill():                 # marked as unfinished, settings of a load
            target.empty()
            ...                             # documents come in
            target.restore_settings()
            ...                             # counted
                                            # the marker is gone: only here is the index finished

    What a kill leaves on the server, by the request that was sent last. A run is healed by the next script that is to
    write to the index, on whatever host: `claim` restores the index and its settings, and a `fill` that ends well
    replaces the marker. Until then switch_alias.py refuses the index, and reindex.py does not copy from it.

        the marker is written     marker; all documents are there
        settings are changed      marker, refresh interval -1 (and replicas 0, if asked)
        a deletion, documents     the same, and a part of the documents; a task of the server runs on: claim() cancels
                                  ours of this host, waits for ours of another host, refuses a stranger's
        settings are restored     marker; the documents are not counted
        the marker is taken out   nothing is left to heal

    and while a fill empties by recreate, the marker and the settings of the load being part of the definition:

        backup index created      index and backup: claim() sees the UUID that the backup names, and deletes the backup
        PUT of the index          as above; it is sent to be refused, and shows that the index could be created
        index deleted             the backup alone: claim() creates the index from it
        index created             index, empty, and backup: claim() sees the same definition, and deletes the backup
        backup deleted            the index, empty, with the marker

    Where somebody else creates the missing index (a stray write does, from guesses), claim() refuses if it lacks
    anything that the backup holds. A backup that may not be read (403) is told where the index is missing, and keeps
    the index from being recreated. Where no marker can be written, nothing tells that an index is unfinished.
    """

    def __init__(self, manager: OpenSearchBaseManager, name: str, *, method: str, shared: bool = False) -> None:
        self.manager, self.name, self.method, self.shared = manager, name, method, shared
        self.backup = BackupIndex(manager, name)
        self.uuid = ""
        self._marker: dict[str, Any] | None = None  # ours, while it stands
        self._emptied = False  # or a part of it

    # --- claim ---

    def claim(self, *, may_be_live: bool = False) -> None:
        """Lock the index and recover it; in a dry run nothing is changed, and a backup stands in for a missing index.

        Raises Locked, Refused when it is live or others work on it, OperationFailed when it is missing.
        """
        self.manager.lock(self.name, shared=self.shared)
        self._recover_index()
        self.uuid = self.manager.index_uuid(self.name)
        if not may_be_live:
            self.refuse_live()
        elif aliases := self.manager._check_index_aliases(self.name):
            log.info("index %s is live: alias %s points at it", self.name, ", ".join(aliases))
        self.manager.await_tasks(self.name, exclusive=not self.shared)
        self._recover_settings()

    def refuse_live(self) -> None:
        if aliases := self.manager._check_index_aliases(self.name):
            raise Refused(
                f"index {self.name} is live: alias {', '.join(aliases)} points at it; nothing was changed. Give the "
                "other index, or move readers there first (switch_alias.py)"
            )

    def verify_same(self) -> None:
        self.manager.verify_same_index(self.name, self.uuid)

    def _recover_index(self) -> None:
        """Create an index that a run deleted before it died; delete a backup that is needed no more."""
        try:
            kept = self.backup.read()
        except RequestFailed as error:
            if error.status != 403:
                raise
            return self._go_on_without_backup(error)
        if kept is None:
            return
        # a deletion without a response may still be queued: what is read next is read when it is carried out
        self.manager.request("GET", "/_cluster/health", params={"wait_for_events": "languid"}, accept=[408])
        if now := read_index(self.manager, self.name):
            self.backup.refuse_another_index(kept, now)
            if not self.manager.dry_run:
                self.backup.delete()
            return
        log.warning("index %s is missing: a run died between deleting and creating it", self.name)
        if self.manager.dry_run:
            self.name = self.backup.name
        else:
            self.backup.restore()

    def _go_on_without_backup(self, forbidden: RequestFailed) -> None:
        """Whoever never recreates needs no right to read backups; only where one may be needed its lack is told."""
        if self.manager.request("GET", f"/{self.name}/_settings", accept=[404]).status == 404:
            raise OperationFailed(
                f'index {self.name} does not exist; create it first (README, "Setting up"), unless {self.backup.name} '
                f"holds its definition, which could not be read: {forbidden}"
            )
        if self.method == "recreate":
            log.warning("index %s is not recreated, its documents are deleted one by one: %s", self.name, forbidden)
            self.method = "delete"

    def _recover_settings(self) -> None:
        """Restore what a load that died left changed; its marker stays until a fill has replaced it and ended well."""
        if (marker := self.manager.read_marker(self.name)) is None:
            return
        who = marker.get("host"), marker.get("started")
        log.warning("index %s is unfinished: a run on %s, begun %s, died", self.name, *who)
        if not self.manager.dry_run:
            self._restore_settings(marker)

    # --- fill ---

    @contextlib.contextmanager
    def fill(self, *, loading: bool = True, without_replicas: bool = False) -> Iterator[None]:
        """Mark the index as unfinished until the body has ended well.

        With `loading`, its refresh interval is -1 meanwhile (and replicas are 0, if asked), unless the marker cannot be
        written: the body calls `restore_settings` before it counts. When it fails they are restored here and the marker
        stays; where even that fails, or the process is killed, `claim` of the next run does it.
        """
        self.refuse_live()
        found, former = self.manager._verify_index_exists(self.name), self.manager.read_marker(self.name)
        wanted = load_settings(found, without_replicas) if loading else {}
        self._marker = {  # before it is written: a signal may come in between
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": self.manager.host,
            "found": {name: found.get(name) for name in wanted}, "set": wanted,
        }  # fmt: skip
        try:
            if self._mark():
                self._change_settings(wanted)
            yield
        except BaseException as failure:
            try:
                finished_in_any_case(self.restore_settings)
                if self._marker and isinstance(failure, Refused) and not self._emptied:
                    self._write_marker(former)
            except OperationFailed as error:
                log.error("index %s: its settings are not restored yet, the next run does it: %s", self.name, error)
            raise
        if self._marker:
            self._write_marker(None)  # only here the index is finished

    def restore_settings(self) -> None:
        """Restore what `fill` has changed, and read it back."""
        if self._marker:
            self._restore_settings(self._marker)

    def _mark(self) -> bool:
        """Write the marker; say whether the cluster has accepted it."""
        try:
            self._write_marker(self._marker)
            return True
        except OutcomeUnknown:
            raise
        except RequestFailed as error:
            log.warning("index %s: no marker can be written, so its settings stay as they are: %s", self.name, error)
            self._marker = None
            return False

    def _write_marker(self, marker: Mapping[str, Any] | None) -> None:
        """Put a marker into `_meta` beside what others keep there, or take it out; an update replaces all of it.

        Raises OperationFailed where ours was to be replaced and another run's is there instead.
        """
        meta = dict(self.manager.get_mapping(self.name).get("_meta", {}))
        there = meta.pop(SUITE, None)
        if marker != self._marker != there:
            self.verify_same()
            raise OperationFailed(
                f"index {self.name}: another run has begun to fill it meanwhile, and its marker stays: {there}; see "
                "that one of the two has ended well, or run again"
            )
        self.manager.request("PUT", f"/{self.name}/_mapping", {"_meta": {**meta, SUITE: marker} if marker else meta})

    def _change_settings(self, wanted: Mapping[str, str]) -> None:
        for name, value in wanted.items():
            try:
                self.manager.request("PUT", f"/{self.name}/_settings", {name: value})
            except OutcomeUnknown:
                raise
            except RequestFailed as error:  # Multi-AZ with Standby fixes replicas, some domains a minimum interval
                log.warning("index %s: going on without %s=%s: %s", self.name, name, value, error)

    def _restore_settings(self, marker: Mapping[str, Any]) -> None:
        """Restore each setting that still has the value of the load; one that somebody changed since stays."""
        current = self.manager._verify_index_exists(self.name)
        left = {name: value for name, value in marker["found"].items() if current.get(name) == marker["set"].get(name)}
        if not left:
            return
        self.manager.request("PUT", f"/{self.name}/_settings", left)
        now = self.manager._verify_index_exists(self.name)
        if wrong := [name for name, value in left.items() if now.get(name) != value]:
            raise OperationFailed(f"index {self.name}: {', '.join(wrong)} could not be restored; run again")
        shown = (f"{name}={'default' if value is None else value}" for name, value in left.items())
        log.info("index %s: restored %s", self.name, ", ".join(shown))

    # --- empty ---

    def empty(self) -> int | None:
        """Empty the index; return how many documents there were, None when nobody could tell.

        Raises Refused when an alias has come since, OperationFailed when it could not be emptied. A failure leaves the
        index partly emptied, or (recreate) missing, with a backup that `claim` restores it from.
        """
        self.refuse_live()
        found = self.count_unless_red()
        if found == 0:
            log.info("%s is empty already", self.name)
            return 0
        log.info("deleting %s documents from %s", "all" if found is None else f"{found:,}", self.name)
        if self.method == "recreate" and self._recreate():
            return found
        found = self.manager._get_index_count(self.name) if found is None else found
        self._emptied = True
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
        began, left, rounds = time.monotonic(), found, 0
        size = documents_at_once(self.manager.settings.requests_per_second, SCROLL_SIZE)
        while left and rounds < MAX_ROUNDS:
            if rounds:  # a run on another host may have finished meanwhile, and have moved readers here
                self.refuse_live()
            self.manager.run_task(
                f"/{self.name}/_delete_by_query", {"query": {"match_all": {}}}, label=f"emptying {self.name}",
                total=left, conflicts="proceed", scroll_size=size,
            )  # fmt: skip
            left, rounds = self.manager._get_index_count(self.name), rounds + 1
        if left:
            raise OperationFailed(
                f"index {self.name}: {left:,} documents are left after {rounds} rounds: somebody writes to it; "
                "run again"
            )
        log.info("deleted %s documents from %s in %.1f s, %s/s", f"{found:,}", self.name, time.monotonic() - began,
                 f"{per_second(found, began):,}")  # fmt: skip

    # --- empty by recreate ---

    def _recreate(self) -> bool:
        """Delete the index and create it anew; say whether it was done, or is forbidden and everything is as it was."""
        began = time.monotonic()
        try:
            definition = self._validate_definition()
            self.refuse_live()
            self.verify_same()
            self._emptied = True
            self._delete_index()
            create_index(self.manager, self.name, definition)
        except CannotRecreate as error:
            self._emptied = False
            self.backup.delete()
            log.warning("index %s cannot be recreated, its documents are deleted one by one: %s", self.name, error)
            return False
        except BaseException as failure:
            if not self._emptied:
                finished_in_any_case(self.backup.delete)
            else:  # a deletion that was sent may yet be carried out: then the backup is all that is left
                self._restore_after(failure, definition)
            raise
        self.backup.delete()
        self.uuid = self.manager.index_uuid(self.name)  # the new one is ours from here on
        log.info("recreated %s in %.1f s", self.name, time.monotonic() - began)
        return True

    def _validate_definition(self) -> dict[str, Any]:
        """Create the backup, and see that the index could be created as well; return the definition of both.

        Raises CannotRecreate when one of them is refused, or would not become the same.
        """
        if (found := read_index(self.manager, self.name)) is None:
            raise OperationFailed(f"index {self.name} was deleted by somebody else meanwhile; run again")
        definition = definition_of(found)
        try:
            self.backup.create(definition, self.uuid)
            # 400, since it is there; 403 without the permission
            self.manager.request("PUT", f"/{self.name}", definition, accept=[400])
        except OutcomeUnknown:
            raise
        except OperationFailed as error:
            raise CannotRecreate(str(error)) from None
        return definition

    def _delete_index(self) -> None:
        """Delete the index by one request, which is never sent again: it could meet the new index, or a live one.

        Raises CannotRecreate when the cluster refuses, OutcomeUnknown when no response came and it is still there.
        """
        try:
            self.manager.request("DELETE", f"/{self.name}", idempotent=False, retry=False)
        except OutcomeUnknown as unknown:
            log.warning("%s; looking whether index %s is gone", unknown, self.name)
            time.sleep(1)
            if read_index(self.manager, self.name):
                raise
        except RequestFailed as error:
            if error.status == 404:  # somebody else was faster: the backup holds what it was
                raise
            raise CannotRecreate(str(error)) from None

    def _restore_after(self, failure: BaseException, definition: Mapping[str, Any]) -> None:
        try:
            finished_in_any_case(lambda: self.backup.restore(definition))
        except OperationFailed as error:
            log.error("index %s is not restored yet, the next run does it: %s", self.name, error)
            self._marker = None  # it is in the backup, and comes back with the index
            failure.args = (
                f"{failure}; index {self.name} is deleted, {self.backup.name} holds its definition: mend the cause, "
                "and the next run creates the index from it",
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

    def restore(self, known: Mapping[str, Any] | None = None) -> None:
        """Create the index from its definition, if it is gone; the backup of one that is there stays.

        `known` is that definition, where somebody may have deleted the backup.
        """
        kept = self.read()
        definition = kept[0] if kept else known
        if definition and not read_index(self.manager, self.index):
            create_index(self.manager, self.index, definition)
            self.delete()
            log.info("index %s is restored, empty", self.index)

    def delete(self) -> None:
        try:
            if self.read():
                self.manager.request("DELETE", f"/{self.name}", accept=[404])
        except RequestFailed as error:
            log.warning("the empty index %s stays; delete it: %s", self.name, error)

    def refuse_another_index(self, kept: tuple[dict[str, Any], str], now: Mapping[str, Any]) -> None:
        """Raise Refused when an index was created meanwhile that lacks something of this definition."""
        definition, uuid = kept
        if now["settings"]["index.uuid"] == uuid:  # it was never deleted
            return
        if different := differences(definition, definition_of(now)):
            live = ", ".join(now["aliases"])
            delete = f"Delete {self.index}, so that the next run creates it from {self.name}, or delete {self.name}"
            raise Refused(
                f"index {self.index} has lost its definition of {', '.join(different)}: a run died between deleting "
                f"and creating it, and somebody else created it. {f'Delete {self.name}' if live else delete} if "
                f"{self.index} is right{live and f' (readers are on it, by {live})'}"
            )


class CannotRecreate(OperationFailed):
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
    mappings, settings = dict(definition["mappings"]), dict(definition["settings"])
    meta = dict(mappings.pop("_meta", {}))
    marker = meta.pop(SUITE, None) or {"found": {}, "set": {}}
    for name, value in marker["found"].items():
        if settings.get(name) == marker["set"].get(name):
            settings[name] = value
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
        if error.kind != EXISTS:
            raise
        exists = error  # by an attempt without a response, or by somebody who may have moved readers to it since
    aliases, found = manager._check_index_aliases(index), read_index(manager, index)
    if not aliases and found and definition_of(found) == definition:
        return
    if exists:
        raise exists
    manager.request("DELETE", f"/{index}", idempotent=False, retry=False, accept=[404])  # once: as in _delete_index
    brought = f"the alias {', '.join(aliases)}" if aliases else "other settings or fields"
    raise OperationFailed(
        f"an index template (or another run) gives a new index {index} {brought}, so it is deleted again; change the "
        "template"
    )


def load_settings(found: Mapping[str, Any], without_replicas: bool) -> dict[str, str]:
    """Return what is changed for the time of a load, less what has that value already."""
    wanted = {"index.refresh_interval": "-1"}
    if without_replicas and found.get("index.auto_expand_replicas", "false") == "false":
        wanted["index.number_of_replicas"] = "0"
    return {name: value for name, value in wanted.items() if found.get(name) != value}


# --- the script -------------------------------------------------------------------------------------------------------


class IndexCleanup(OpenSearchBaseManager):
    def __init__(self, settings: argparse.Namespace) -> None:
        super().__init__(settings)
        self.target = TargetIndex(self, settings.index, method=settings.method)

    def run(self) -> dict[str, Any]:
        began, target = time.monotonic(), self.target
        target.claim()
        if self.dry_run:
            return {"index": target.name, "would_delete": target.count_unless_red(), "dry_run": True}
        before = self._store_bytes()
        with target.fill(loading=False):
            deleted = target.empty()
        if not self.settings.no_force_merge and self._has_deleted_documents():
            self._free_disk_space()
        target.verify_same()
        result = {
            "index": target.name, "deleted": deleted, "documents": self._get_index_count(target.name),
            "bytes_before": before, "bytes_after": self._store_bytes(), "seconds": seconds_since(began),
        }  # fmt: skip
        log.info("done: index %s deleted=%s documents=%s bytes_before=%s bytes_after=%s seconds=%s", *result.values())
        return result

    def _store_bytes(self) -> int:
        stats = self.request("GET", f"/{self.target.name}/_stats/store").data
        return int(stats["_all"]["total"]["store"]["size_in_bytes"])

    def _has_deleted_documents(self) -> bool:
        """Say whether there is space to free, also when a former run was stopped before it could."""
        stats = self.request("GET", f"/{self.target.name}/_stats/docs").data
        return bool(stats["_all"]["total"]["docs"]["deleted"])

    def _free_disk_space(self) -> None:
        """Flush, wait until the server may drop what was deleted, merge, refresh: another order frees nothing."""
        index = self.target.name
        log.info("waiting until the server may drop what was deleted, %s s at most", LEASES_WAIT_S)
        self.request("POST", f"/{index}/_flush")
        self._await_leases()
        try:
            params = {"only_expunge_deletes": "true"}
            merged = self.request("POST", f"/{index}/_forcemerge", params=params, idempotent=False).data
            self.verify_all_shards(merged, f"_forcemerge of {index}")
        except OutcomeUnknown as error:
            log.warning("the merge goes on in the background, disk space comes back when it is done: %s", error)
        self.request("POST", f"/{index}/_refresh")  # an idle index keeps the old files open
        time.sleep(STATS_AGE_S)

    def _await_leases(self) -> None:
        """Wait until no shard copy retains deleted documents for recoveries; a node that is away can hold them 12 h."""
        deadline = time.monotonic() + LEASES_WAIT_S
        while self._retained():
            if time.monotonic() > deadline:
                log.warning("%s: the server still retains deleted documents, a later merge drops them",
                            self.target.name)  # fmt: skip
                return
            time.sleep(1)

    def _retained(self) -> bool:
        for copy in (copy for copies in self.shard_stats(self.target.name).values() for copy in copies):
            leases = copy.get("retention_leases", {}).get("leases", [])
            if any(lease["retaining_seq_no"] <= copy["seq_no"]["max_seq_no"] for lease in leases):
                return True
        return False


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
