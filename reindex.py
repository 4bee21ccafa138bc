"""Copy all documents of one index into another that is not live, replacing what it holds.

Example:    python reindex.py --source my_index_primary --target my_index_secondary
Exit codes: 0 copied, and counted; 1 failed; 2 usage; 4 refused (target live, fields defined differently); 75 locked;
            129, 130, 143 signals. After a failure the target is partly filled and marked as such; run it again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from index_cleanup import chosen_method, empty_index, put_index_back
from opensearch_base_manager import (
    ConfigurationError, OpenSearchBaseManager, RefreshError, Refused, add_common_args, add_replicas_arg,
    field_definitions, index_name, log, number, per_second, run_cli, seconds_since, setting, wants_no_replicas,
)  # fmt: skip

BATCH_SIZE = 5000  # documents a scroll batch; copies 8 to 15 % faster than the server's 1000
MAX_BATCH_PAUSE_S = 10  # a throttled batch waits size / rate; 20 slices of it have to stay below the scroll's 5 minutes


def compare_fields(source: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the fields that the target's mapping lacks, and those that it defines differently."""
    known = dict(field_definitions(target))
    missing = [name for name, _ in field_definitions(source) if name not in known]
    different = [name for name, definition in field_definitions(source) if known.get(name, definition) != definition]
    return missing, different


class Reindex(OpenSearchBaseManager):
    def __init__(
        self, source: str, target: str, *, requests_per_second: float, without_replicas: bool, dry_run: bool
    ) -> None:
        if source == target:
            raise ConfigurationError("source and target are the same index; give two")
        super().__init__(dry_run=dry_run)
        self.source, self.target = source, target
        self.requests_per_second, self.without_replicas = requests_per_second, without_replicas
        self.cleanup_method = chosen_method()

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        self._check()
        if self.dry_run:
            log.info("dry run: %s would be emptied and filled from %s", self.target, self.source)
            return {"source": self.source, "target": self.target, "dry_run": True}
        with self.unfinished(self.target, without_replicas=self.without_replicas) as note:
            self._add_missing_fields()
            empty_index(self, self.target, self.cleanup_method)
            total = self._get_index_count(self.source)  # refreshes: a copy sees only what a search would
            response = self._copy(total)
            self._put_back_settings(self.target, note)
            self._verify_counts(int(response["total"]))
        return self._report(response, began)

    def _check(self) -> None:
        self.lock(self.target)
        self.lock(self.source, shared=True)  # so that a task found on it is known to be alive
        self.target = put_index_back(self, self.target)
        for index in (self.source, self.target):
            self._verify_index_exists(index)
        self._refuse_live(self.target)
        # somebody has moved readers to it past the scripts: the target may be the only whole data there is
        self._refuse_unfinished(self.source, f"load it again, or move readers to {self.target}, before it is copied")
        self._settle_tasks(self.target)
        self._put_right(self.target)
        missing, different = compare_fields(self._get_mapping(self.source), self._get_mapping(self.target))
        if different:
            raise Refused(
                f"fields defined differently in {self.source} and {self.target}: {', '.join(different)}; "
                f"create {self.target} anew with the mapping of {self.source}"
            )
        if missing:
            log.info("fields that %s lacks: %s", self.target, ", ".join(missing))

    def _add_missing_fields(self) -> None:
        """Define new fields in the target as the source does, or the copy would make it guess (dates!)."""
        source = self._get_mapping(self.source)
        if compare_fields(source, self._get_mapping(self.target))[0]:
            self.request("PUT", f"/{self.target}/_mapping", {"properties": source["properties"]})

    def _copy(self, total: int) -> dict[str, Any]:
        log.info("copying %s documents from %s to %s", f"{total:,}", self.source, self.target)
        size, throttle = BATCH_SIZE, {}
        if self.requests_per_second:
            size = max(1, min(BATCH_SIZE, int(self.requests_per_second * MAX_BATCH_PAUSE_S)))
            throttle = {"requests_per_second": self.requests_per_second}
        body = {"source": {"index": self.source, "size": size}, "dest": {"index": self.target}}
        label = f"copying {self.source} to {self.target}"
        response = self.run_task("/_reindex", body, label=label, total=total, slices="auto", **throttle)
        written = response["created"] + response["updated"]
        if response["version_conflicts"] or written != response["total"]:
            raise RefreshError(
                f"{label}: {written:,} of {response['total']:,} documents written, "
                f"{response['version_conflicts']:,} version conflicts: somebody else writes to {self.target}; run again"
            )
        return response

    def _verify_counts(self, total: int) -> None:
        """Raise RefreshError unless both indices hold what was copied, and are still the same two indices."""
        source, target = self._get_index_count(self.source), self._get_index_count(self.target)
        if source != total:
            raise RefreshError(
                f"the source changed meanwhile: {self.source} holds {source:,} documents, {total:,} were copied; "
                "keep others from writing to it and run again"
            )
        if target != total:
            raise RefreshError(
                f"{self.target} holds {target:,} documents, {total:,} were copied: somebody else writes to it; "
                "keep it from that and run again"
            )
        for index in (self.source, self.target):
            self._verify_same_index(index)

    def _report(self, response: Mapping[str, Any], began: float) -> dict[str, Any]:
        total = int(response["total"])
        retries = sum(response.get("retries", {}).values())
        result = {
            "source": self.source, "target": self.target, "total": total, "documents": total,
            "batches": response["batches"], "retries": retries, "seconds": seconds_since(began),
            "documents_per_second": per_second(total, began),
        }  # fmt: skip
        log.info("done: %s", " ".join(f"{name}={value}" for name, value in result.items()))
        return result


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reindex.py", description="Copy all documents of an index into another.")
    parser.add_argument("--source", required=True, type=index_name, help="the index to copy from")
    parser.add_argument("--target", required=True, type=index_name, help="the index to fill; no alias may point at it")
    parser.add_argument(
        "--requests-per-second", type=number, default=setting("REQUESTS_PER_SECOND", "0"),
        help="documents a second at most, 0 for no limit (default: %(default)s; env: REQUESTS_PER_SECOND)",
    )  # fmt: skip
    add_replicas_arg(parser)
    add_common_args(parser)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    with Reindex(
        args.source, args.target, requests_per_second=args.requests_per_second,
        without_replicas=wants_no_replicas(args), dry_run=args.dry_run,
    ) as reindex:  # fmt: skip
        return reindex.run()


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
