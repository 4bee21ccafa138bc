"""Empty an index and give its disk space back; mapping and settings stay.

Example:    python index_cleanup.py --index my_index_secondary
Exit codes: 0 empty, and counted; 1 failed; 2 usage; 4 refused (an alias points at it); 75 locked; 129, 130, 143
            signals.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from opensearch_base_manager import (
    OpenSearchBaseManager, OutcomeUnknown, RefreshError, add_common_args, index_name, log, per_second, run_cli,
    seconds_since,
)  # fmt: skip

MAX_ROUNDS = 3  # a delete-by-query sees what was there when it started; more would chase somebody who writes
SCROLL_SIZE = 5000  # documents a batch on the server
LEASES_WAIT_S = 60  # the server moves retention leases every 30 s; until then a merge drops nothing
STATS_AGE_S = 12  # the server renews the store size every 10 s


def empty_index(manager: OpenSearchBaseManager, index: str) -> int:
    """Delete all documents of an index that no alias points at; return how many there were.

    Raises Refused when an alias has come since, RefreshError when documents are left after three rounds. A failure
    leaves the index partly emptied.
    """
    manager._refuse_live(index)
    began, found = time.monotonic(), manager._get_index_count(index)
    if not found:
        log.info("%s is empty already", index)
        return 0
    log.info("deleting %s documents from %s", f"{found:,}", index)
    left, rounds = found, 0
    while left and rounds < MAX_ROUNDS:
        if rounds:  # a run on another host may have finished meanwhile, and have moved readers here
            manager._refuse_live(index)
        manager.run_task(
            f"/{index}/_delete_by_query", {"query": {"match_all": {}}}, label=f"emptying {index}", total=left,
            slices="auto", conflicts="proceed", scroll_size=SCROLL_SIZE,
        )  # fmt: skip
        left, rounds = manager._get_index_count(index), rounds + 1
    if left:
        raise RefreshError(f"index {index}: {left:,} documents are left after {rounds} rounds: somebody writes to it")
    log.info("deleted %s documents from %s in %.1f s, %s/s", f"{found:,}", index, time.monotonic() - began,
             f"{per_second(found, began):,}")  # fmt: skip
    return found


class IndexCleanup(OpenSearchBaseManager):
    def __init__(self, index: str, *, force_merge: bool = True, dry_run: bool = False) -> None:
        super().__init__(dry_run=dry_run)
        self.index, self.force_merge = index, force_merge

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        self._verify_index_exists(self.index)
        self.lock(self.index)
        self._refuse_live(self.index)
        self._settle_tasks(self.index)
        self._put_right(self.index)
        if self.dry_run:
            return {"index": self.index, "would_delete": self._get_index_count(self.index), "dry_run": True}
        before = self._store_bytes()
        with self.unfinished(self.index, loading=False):
            deleted = empty_index(self, self.index)
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
        "--no-force-merge", action="store_true",
        help="do not wait for the disk space to come back (half a minute); for an index that is filled right away",
    )  # fmt: skip
    add_common_args(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    with IndexCleanup(args.index, force_merge=not args.no_force_merge, dry_run=args.dry_run) as cleanup:
        return cleanup.run()


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
