"""Empty an index and give its disk space back; mapping and settings stay.

Example:    python index_cleanup.py --index my_index_secondary --method recreate
Exit codes: 0 empty, and counted; 1 failed; 2 usage; 4 refused (an alias points at it); 75 locked; 129, 130, 143
            signals.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from opensearch_base_manager import (
    SUITE, OpenSearchBaseManager, OutcomeUnknown, RefreshError, Refused, RequestFailed, add_common_args, either,
    field_definitions, finished_in_any_case, index_name, log, parsed_setting, per_second, run_cli, seconds_since,
    setting,
)  # fmt: skip

MAX_ROUNDS = 3  # a delete-by-query sees what was there when it started; more would chase somebody who writes
SCROLL_SIZE = 5000  # documents a batch on the server
LEASES_WAIT_S = 60  # the server moves retention leases every 30 s; until then a merge drops nothing
STATS_AGE_S = 12  # the server renews the store size every 10 s
METHOD = either("delete", "recreate")
EXISTS = "resource_already_exists_exception"
RECREATES = f"{SUITE}/recreates"  # in `_meta` of the sibling: whose definition it holds
# what the server gives to each index by itself
GIVEN = re.compile(r"index\.(uuid|creation_date|provided_name|version\..*|resize\..*|routing\.allocation\.initial_.*)")


def chosen_method() -> str:
    """Return how scripts that fill an index empty it first (CLEANUP_METHOD)."""
    return parsed_setting("CLEANUP_METHOD", "delete", METHOD)


def empty_index(manager: OpenSearchBaseManager, index: str, method: str) -> int | None:
    """Empty an index that no alias points at; return how many documents there were, None when nobody could tell.

    Raises Refused when an alias has come since, RefreshError when it could not be emptied. A failure leaves the index
    partly emptied, or (recreate) missing, with a sibling that holds its definition for `put_index_back`.
    """
    manager._refuse_live(index)
    found = count_of(manager, index, method)
    if found == 0:
        log.info("%s is empty already", index)
        return 0
    log.info("deleting %s documents from %s", "all" if found is None else f"{found:,}", index)
    if method == "recreate" and recreate_index(manager, index):
        return found
    found = manager._get_index_count(index) if found is None else found
    delete_documents(manager, index, found)
    return found


def count_of(manager: OpenSearchBaseManager, index: str, method: str) -> int | None:
    """Count the documents; return None when a shard has no copy at all, which only recreate can heal."""
    if method == "recreate" and manager.request("GET", f"/_cluster/health/{index}").data["status"] == "red":
        return None
    return manager._get_index_count(index)


# --- delete: all documents, one by one --------------------------------------------------------------------------------


def delete_documents(manager: OpenSearchBaseManager, index: str, found: int) -> None:
    """Delete all documents. Raises RefreshError when some are left after three rounds."""
    began, left, rounds = time.monotonic(), found, 0
    while left and rounds < MAX_ROUNDS:
        if rounds:  # a run on another host may have finished meanwhile, and have moved readers here
            manager._refuse_live(index)
        manager.run_task(
            f"/{index}/_delete_by_query", {"query": {"match_all": {}}}, label=f"emptying {index}", total=left,
            slices="auto", conflicts="proceed", scroll_size=SCROLL_SIZE,
        )  # fmt: skip
        left, rounds = manager._get_index_count(index), rounds + 1
    if left:
        raise RefreshError(
            f"index {index}: {left:,} documents are left after {rounds} rounds: somebody writes to it; run again"
        )
    log.info("deleted %s documents from %s in %.1f s, %s/s", f"{found:,}", index, time.monotonic() - began,
             f"{per_second(found, began):,}")  # fmt: skip


# --- recreate: drop the index, and create it with the same definition -------------------------------------------------


def sibling_of(index: str) -> str:
    return f"{index}-recreate"


def definition_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes an index the same once more, from the answer to a GET of it."""
    settings = {name: value for name, value in found["settings"].items() if not GIVEN.fullmatch(name)}
    if settings.get("index.auto_expand_replicas", "false") != "false":
        settings.pop("index.number_of_replicas", None)  # follows the number of nodes
    return {"settings": settings, "mappings": found["mappings"]}


def read_definition(manager: OpenSearchBaseManager, index: str) -> dict[str, Any] | None:
    """Return the definition of an index; None when there is none of that name, or it may not be read."""
    answer = manager.request("GET", f"/{index}", params={"flat_settings": "true"}, accept=[403, 404])
    found = answer.data.get(index) if answer.status == 200 else None  # an alias answers with another name
    return definition_of(found) if found else None


def kept_definition(manager: OpenSearchBaseManager, index: str) -> dict[str, Any] | None:
    """Return what our sibling holds of an index; None when there is no sibling, or it is somebody else's."""
    kept = read_definition(manager, sibling_of(index))
    meta = dict(kept["mappings"].get("_meta", {})) if kept else {}
    if not kept or meta.pop(RECREATES, None) != index:
        return None
    mappings = {name: value for name, value in kept["mappings"].items() if name != "_meta"}
    return {"settings": kept["settings"], "mappings": {**mappings, "_meta": meta} if meta else mappings}


class CannotRecreate(RefreshError):
    """Something forbids it, and nothing has been dropped."""


def recreate_index(manager: OpenSearchBaseManager, index: str) -> bool:
    """Drop an index and create it anew; say whether it was done, or is forbidden and everything is as it was.

    Until the new one stands, an empty sibling holds its definition: whoever finds no index then puts it back.
    """
    began, dropping = time.monotonic(), False
    try:
        definition = rehearse(manager, index)
        manager._refuse_live(index)
        manager._verify_same_index(index)
        dropping = True
        drop_index(manager, index)
        create_index(manager, index, definition)
    except CannotRecreate as error:
        drop_sibling(manager, index)
        log.warning("index %s cannot be recreated, its documents are deleted one by one: %s", index, error)
        return False
    except BaseException:
        try:  # a drop that was sent may yet be carried out: then the sibling is all that is left
            finished_in_any_case(lambda: (restore if dropping else drop_sibling)(manager, index))
        except RefreshError as error:
            log.error("index %s is not put back yet, the next run does it: %s", index, error)
        raise
    drop_sibling(manager, index)
    manager._uuids.pop(index)  # the new one is ours from here on
    manager._verify_index_exists(index)
    log.info("recreated %s in %.1f s", index, time.monotonic() - began)
    return True


def rehearse(manager: OpenSearchBaseManager, index: str) -> dict[str, Any]:
    """Create the sibling, and see that the index could be created as well; return the definition of both.

    Raises CannotRecreate when one of them is refused, or would not become the same.
    """
    if (definition := read_definition(manager, index)) is None:
        raise RefreshError(f"index {index} was deleted by somebody else meanwhile; run again")
    mappings = definition["mappings"]
    marked = {**mappings, "_meta": {**mappings.get("_meta", {}), RECREATES: index}}
    # with a block it could not be deleted any more
    settings = {name: value for name, value in definition["settings"].items() if "index.blocks." not in name}
    try:
        create_index(manager, sibling_of(index), {"settings": settings, "mappings": marked})
        # 400, since it is there; 403 without the permission
        manager.request("PUT", f"/{index}", definition, accept=[400])
    except OutcomeUnknown:
        raise
    except RefreshError as error:
        raise CannotRecreate(str(error)) from None
    return definition


def drop_index(manager: OpenSearchBaseManager, index: str) -> None:
    """Drop an index by one request, which is never sent again: it could meet the new index, or one that is live.

    Raises CannotRecreate when the cluster refuses, OutcomeUnknown when the answer was lost and the index still there.
    """
    try:
        manager.request("DELETE", f"/{index}", repeatable=False, patient=False)
    except OutcomeUnknown as lost:
        log.warning("%s; looking whether index %s is gone", lost, index)
        time.sleep(1)
        if read_definition(manager, index):
            raise
    except RequestFailed as error:
        if error.status == 404:  # somebody else was faster: the sibling holds what it was
            raise
        raise CannotRecreate(str(error)) from None


def create_index(manager: OpenSearchBaseManager, index: str, definition: Mapping[str, Any]) -> None:
    """Create an index, and read it back.

    Raises RefreshError when it is not what was asked for; it is dropped again if it was certainly created here.
    """
    exists: RequestFailed | None = None
    try:
        manager.request("PUT", f"/{index}", definition)
    except RequestFailed as error:
        if error.kind != EXISTS:
            raise
        exists = error  # by a sending whose answer was lost, or by somebody who may have moved readers to it since
    aliases = manager._check_index_aliases(index)
    if not aliases and read_definition(manager, index) == definition:
        return
    if exists:
        raise exists
    manager.request("DELETE", f"/{index}", accept=[404])
    brought = f"the alias {', '.join(aliases)}" if aliases else "other settings or fields"
    raise RefreshError(
        f"an index template (or another run) gives a new index {index} {brought}, so it is dropped again; change the "
        "template"
    )


def drop_sibling(manager: OpenSearchBaseManager, index: str) -> None:
    try:
        if kept_definition(manager, index):
            manager.request("DELETE", f"/{sibling_of(index)}", accept=[404])
    except RequestFailed as error:
        log.warning("the empty index %s stays; delete it: %s", sibling_of(index), error)


def put_index_back(manager: OpenSearchBaseManager, index: str) -> str:
    """Create an index that a run dropped before it died; return the index to go on with.

    Call it with the lock held. In a dry run nothing is created, and the sibling takes its place. Raises Refused when
    somebody else has created the index since, from guesses: the sibling holds all that is left of its definition.
    """
    if (kept := kept_definition(manager, index)) is None:
        return index
    if now := read_definition(manager, index):
        refuse_other_fields(index, kept["mappings"], now["mappings"])
        if not manager.dry_run:
            drop_sibling(manager, index)  # of a run that died before it dropped the index, or after it was created
        return index
    log.warning("index %s is missing: a run died between dropping and creating it", index)
    if manager.dry_run:
        return sibling_of(index)
    restore(manager, index)
    return index


def restore(manager: OpenSearchBaseManager, index: str) -> None:
    """Create an index that is gone from what its sibling holds; the sibling of one that is there stays."""
    if (kept := kept_definition(manager, index)) and not read_definition(manager, index):
        create_index(manager, index, kept)
        drop_sibling(manager, index)
        log.info("index %s is put back, empty", index)


def refuse_other_fields(index: str, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    there = dict(field_definitions(now))
    if other := [name for name, definition in field_definitions(kept) if there.get(name) != definition]:
        raise Refused(
            f"index {index} has lost its definition of {', '.join(other)}: a run died between dropping and creating "
            f"it, and somebody else created it. Delete {index}, so that the next run puts it back from "
            f"{sibling_of(index)}, or delete {sibling_of(index)} if {index} is right"
        )


class IndexCleanup(OpenSearchBaseManager):
    def __init__(self, index: str, *, method: str, force_merge: bool, dry_run: bool) -> None:
        super().__init__(dry_run=dry_run)
        self.index, self.method, self.force_merge = index, method, force_merge

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        self.lock(self.index)
        self.index = put_index_back(self, self.index)
        self._verify_index_exists(self.index)
        self._refuse_live(self.index)
        self._settle_tasks(self.index)
        self._put_right(self.index)
        if self.dry_run:
            return {"index": self.index, "would_delete": count_of(self, self.index, self.method), "dry_run": True}
        before = self._store_bytes()
        with self.unfinished(self.index, loading=False):
            deleted = empty_index(self, self.index, self.method)
        if self.force_merge and self._has_deleted_documents():
            self._free_disk_space()
        self._verify_same_index(self.index)
        result = {
            "index": self.index, "deleted": deleted, "documents": self._get_index_count(self.index),
            "bytes_before": before, "bytes_after": self._store_bytes(), "seconds": seconds_since(began),
        }  # fmt: skip
        log.info("done: index %s deleted=%s documents=%s bytes_before=%s bytes_after=%s seconds=%s", *result.values())
        return result

    def _store_bytes(self) -> int:
        answer = self.request("GET", f"/{self.index}/_stats/store").data
        return int(answer["_all"]["total"]["store"]["size_in_bytes"])

    def _has_deleted_documents(self) -> bool:
        """Say whether there is space to free, also when a former run was stopped before it could."""
        answer = self.request("GET", f"/{self.index}/_stats/docs").data
        return bool(answer["_all"]["total"]["docs"]["deleted"])

    def _free_disk_space(self) -> None:
        """Flush, wait until the server may drop what was deleted, merge, refresh: another order frees nothing."""
        log.info("waiting until the server may drop what was deleted, %s s at most", LEASES_WAIT_S)
        self.request("POST", f"/{self.index}/_flush")
        self._await_leases()
        try:
            params = {"only_expunge_deletes": "true"}
            answer = self.request("POST", f"/{self.index}/_forcemerge", params=params, repeatable=False).data
            self._whole(answer, f"_forcemerge of {self.index}")
        except OutcomeUnknown as error:
            log.warning("the merge goes on in the background, disk space comes back when it is done: %s", error)
        self.request("POST", f"/{self.index}/_refresh")  # an idle index keeps the old files open
        time.sleep(STATS_AGE_S)

    def _await_leases(self) -> None:
        """Wait until no shard copy retains deleted documents for recoveries; a node that is away can hold them 12 h."""
        deadline = time.monotonic() + LEASES_WAIT_S
        while self._retained():
            if time.monotonic() > deadline:
                log.warning("%s: the server still retains deleted documents, a later merge drops them", self.index)
                return
            time.sleep(1)

    def _retained(self) -> bool:
        shards = self.request("GET", f"/{self.index}/_stats", params={"level": "shards"}).data["indices"][self.index]
        for copy in (copy for copies in shards["shards"].values() for copy in copies):
            leases = copy.get("retention_leases", {}).get("leases", [])
            if any(lease["retaining_seq_no"] <= copy["seq_no"]["max_seq_no"] for lease in leases):
                return True
        return False


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="index_cleanup.py", description="Delete all documents of an index.")
    parser.add_argument("--index", required=True, type=index_name, help="the index to empty; no alias may point at it")
    parser.add_argument(
        "--method", type=METHOD, default=setting("CLEANUP_METHOD", "delete"),
        help="delete the documents, or recreate the index, which takes no time and frees the disk at once "
        "(default: %(default)s; env: CLEANUP_METHOD)",
    )  # fmt: skip
    parser.add_argument(
        "--no-force-merge", action="store_true",
        help="do not wait for the disk space to come back (half a minute); for an index that is filled right away",
    )  # fmt: skip
    add_common_args(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    with IndexCleanup(
        args.index, method=args.method, force_merge=not args.no_force_merge, dry_run=args.dry_run
    ) as cleanup:
        return cleanup.run()


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
