"""Copy all documents of an index into another that is not live, replacing its documents.

Example:    python reindex.py --source my_index_primary --target my_index_secondary
Exit codes: 0 copied and verified; 1 failed; 2 usage; 4 refused (target live, fields defined differently); 75 locked;
            129, 130, 143 signals. After a failure, run again (states: TargetIndex, ClearableIndex, Clone).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from index_cleanup import CannotReplace, ClearableIndex
from opensearch_base_manager import (
    TO_READ, BatchTooLarge, ConfigurationError, Marker, OpenSearchBaseManager, OperationFailed, OutcomeUnknown, Probe,
    Refused, RequestFailed, Response, add_settings, await_primaries, await_replicas, bulk_probe, deleting_probes,
    field_definitions, index_name, log, mapping_probe, missing_permissions, per_second, reading_probes,
    refuse_too_many_fields, refuse_unusable, result_window, run_cli, run_to_completion, seconds_since, settings_probe,
    verify_sees_everything, without_search_pipeline,
)  # fmt: skip

LATE_REQUEST_S = 1  # a request sent just before a signal normally reaches the cluster within this time
WRITE_BLOCK = {"index.blocks.write": "true"}
EXPANSION = "index.auto_expand_replicas"
REPLICATION_TYPE = "index.replication.type"  # the only setting that a clone does not inherit
BATCH_SIZE = 5000  # documents per scroll batch; copies 8 to 15 % faster than the server's default of 1000
BATCH_BYTES = 32 * 1024 * 1024  # stored size, all slices; a node's limit is 10 % of its heap, uncompressed
SAMPLE_SIZE, SAMPLE_BYTES = 50, 8 * 1024 * 1024  # compared after a copy: documents per shard, and bytes of all shards
SAMPLE_WINDOW = 2000  # sequence numbers; searching it takes milliseconds, however large the index is
MAX_SLICES = 20  # the server's limit for slices=auto, which starts one per shard


def compare_fields(source: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the definitions of the fields that the target lacks, and the fields that it defines differently."""
    wanted, known = dict(field_definitions(source)), dict(field_definitions(target))
    missing = {name: definition for name, definition in wanted.items() if name not in known}
    return missing, [name for name, definition in wanted.items() if known.get(name, definition) != definition]


class Clone:
    """A copy with `_clone`: the target is deleted, and the new one shares the source's files (hard links).

    Meanwhile the source has a write block, which readers do not notice. The table shows the state after a kill, by the
    last request that was sent. The marker is in the source, and its entry `source` is the source's UUID; the clone
    inherits the marker. The next run, on any host, restores the source and copies or clones it again.

        marker written            marker; the target is as it was
        write block set           marker, block
        target deleted            the same, but no target: the marker has its replica settings
        clone created             marker and block; the clone has the marker as soon as its primaries are active, and is
                                  unfinished: its UUID differs from `source`
        block removed             marker in both; the clone is verified
        clone's marker removed    marker in the source; the clone is finished
        source's marker removed   nothing to recover
    """

    def __init__(self, manager: Reindex) -> None:
        self.manager, self.source, self.target = manager, manager.source, manager.target
        self.marker = Marker(manager, self.source)

    def obstacle(self) -> str:
        """Return why the source cannot be cloned, "" if it can; find out with requests that the cluster must reject."""
        if missing := missing_permissions(self.manager, [settings_probe(self.source), mapping_probe(self.source)]):
            return f"the role of {self.manager.who} lacks {', '.join(missing)} on {self.source}"
        try:
            self._request_clone({"index.permission_probe": 1})
        except OutcomeUnknown:
            raise
        except RequestFailed as error:
            return str(error)
        return ""

    def run(self) -> None:
        """Replace the target with a clone that has the marker.

        Raises CannotReplace if the cluster rejects the marker, the block or the deletion: only the source was changed,
        and `abandon` restores it. After another failure the target may be missing until the next run.
        """
        former = self.marker.read()  # of a crashed run
        replicas = self._replicas_of_target(former)
        self.marker.restore_settings(former)
        found = self.manager._verify_index_exists(self.source)
        source_uuid = found["settings"]["index.uuid"]
        wanted = {name: value for name, value in WRITE_BLOCK.items() if found["settings"].get(name) != value}
        if not self.marker.write(found, wanted, source=source_uuid, replicas=replicas):
            raise CannotReplace("the marker cannot be written")
        if wanted:
            self._set_block(wanted)
        if self.target.uuid:
            self.target.refuse_live()
            self.target.verify_same()
            self.target.delete_index()
        # the clone would store null as a value, so these settings are created as "false" and removed afterwards
        given = {name: found["settings"][name] for name in (REPLICATION_TYPE,) if name in found["settings"]}
        unblocked = dict.fromkeys(WRITE_BLOCK, "false")  # or the clone inherits a block that no marker describes
        self._create({**replicas, **given, **unblocked, EXPANSION: replicas[EXPANSION] or "false"}, source_uuid)
        await_primaries(self.manager, self.target.name, max(30, self.manager.settings.wait_seconds), OperationFailed)
        left = {**dict.fromkeys(WRITE_BLOCK), EXPANSION: replicas[EXPANSION]}
        self.manager.request("PUT", f"/{self.target.name}/_settings", left)

    def _set_block(self, wanted: Mapping[str, str]) -> None:
        try:
            self.manager.request("PUT", f"/{self.source}/_settings", wanted)
        except OutcomeUnknown:
            raise
        except RequestFailed as error:
            raise CannotReplace(str(error)) from None

    def finish(self) -> None:
        """Remove the block and both markers: the clone is verified."""
        self.marker.restore_settings(self.marker.own)
        self.target.marker.own = self.marker.own
        self.target.marker.replace()
        self.marker.replace()

    def remove_block(self) -> None:
        """Remove the block, and once more after a second: the request that sets it may still be in flight.

        The marker stays: if that request, or the deletion of the target, arrives even later, the next run recovers.
        """
        if self.marker.own and (found := self.marker.own["found"]):
            self.manager.request("PUT", f"/{self.source}/_settings", found)
            time.sleep(LATE_REQUEST_S)
            self.marker.restore_settings(self.marker.own)

    def abandon(self) -> None:
        """Remove block and marker from the source after the cluster has rejected a request; none is in flight."""
        if self.marker.own:
            self.marker.restore_settings(self.marker.own)
            if self.marker.read():  # otherwise a signal interrupted this after the marker was removed
                self.marker.replace()

    def _replicas_of_target(self, former: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the replica settings in a crashed run's marker, or else the target's; if it is missing, the source's.

        None means that auto_expand_replicas is not set.
        """
        index = self.target.name if self.target.uuid else self.source
        found = (former or {}).get("replicas") or self.manager._verify_index_exists(index)["settings"]
        expansion = found.get(EXPANSION, "false")
        return {"index.number_of_replicas": found["index.number_of_replicas"],
                EXPANSION: None if expansion == "false" else expansion}  # fmt: skip

    def _create(self, settings: Mapping[str, Any], source_uuid: str) -> None:
        """Create the clone, with the source's replicas if the cluster rejects these settings, and remember its UUID.

        A rejection is ignored if the clone exists: an earlier attempt, whose response was lost, created it. Raises
        OperationFailed if there is no clone, or if another client has created the index.
        """
        failure: RequestFailed | None = None
        for wanted in settings, dict.fromkeys(WRITE_BLOCK, "false"):
            if failure:
                log.warning("%s; cloning with the replica settings of %s", failure, self.source)
            response = self._request_clone(wanted)
            if made := self.manager.read_index(self.target.name):
                break
            failure = self.manager.failure(f"_clone of {self.source}", response.status, response.body)
        else:
            raise OperationFailed(
                f"{failure}; index {self.target.name} is missing until a run succeeds: fix the cause and run again"
            )
        if made["settings"].get("index.resize.source.uuid") != source_uuid:
            raise OperationFailed(f"another client has created index {self.target.name}; run again to replace it")
        self.target.uuid = made["settings"]["index.uuid"]

    def _request_clone(self, settings: Mapping[str, Any]) -> Response:
        """Send a clone request; return the response, even if the cluster rejects the request (400)."""
        path, params = f"/{self.source}/_clone/{self.target.name}", {"wait_for_active_shards": "1", "timeout": "60s"}
        return self.manager.request("POST", path, {"settings": settings}, params=params, accept=[400])


def differing_fields(original: Mapping[str, Any], copied: Mapping[str, Any] | None) -> list[str]:
    """Return the fields whose values differ as JSON (as 1, 1.0 and true do); `_id` if the copy is missing."""
    if copied is None:
        return ["_id"]
    texts = [{name: json.dumps(value, sort_keys=True) for name, value in document.items()}
             for document in (original, copied)]  # fmt: skip
    return sorted({name for name, _ in texts[0].items() ^ texts[1].items()})


class Reindex(OpenSearchBaseManager):
    def __init__(self, settings: argparse.Namespace) -> None:
        if settings.source == settings.target:
            raise ConfigurationError("source and target are the same index; give two different ones")
        super().__init__(settings)
        source, target = settings.source, settings.target
        self.source: str = source
        self.target = ClearableIndex(self, target)
        self.names = [source, target]
        nothing = {"source": {"index": source, "query": {"match_none": {}}}, "dest": {"index": target}}
        self.probes = [
            *reading_probes(source, target), *deleting_probes(target), settings_probe(target),
            bulk_probe(target, "index", "delete"), Probe("POST", "/_reindex", nothing),
            Probe("GET", f"/{source}/_search_shards"),
        ]  # fmt: skip
        self.clone = Clone(self) if settings.copy_method == "clone" else None

    def run(self) -> dict[str, Any]:
        began, target = time.monotonic(), self.target
        source_uuid = self._check()
        if self.dry_run:
            how = "replaced by a clone of" if self.clone else "emptied and filled from"
            log.info("dry run: %s would be %s %s", target.name, how, self.source)
            return {"source": self.source, "target": target.name, "dry_run": True}
        response = self._clone(source_uuid) or self._copy_documents(source_uuid)
        return self._report(response, began)

    def _check(self) -> str:
        """Claim the target, and check that the source is complete and can be copied; return the source's UUID."""
        self._resume_crashed_clone()
        self.lock(self.source, shared=not self.clone)  # or another run could cancel the copy as orphaned
        self.target.claim(may_be_missing=self.clone is not None)
        found = self._verify_index_exists(self.source)
        refuse_unusable(self.source, found, TO_READ)
        if await_primaries(self, self.source, self.settings.retry_seconds):
            found = self._verify_index_exists(self.source)
        verify_sees_everything(self, self.source, found)
        marker = Marker(self, self.source)
        # if another client has moved readers to an unfinished source, perhaps only the target is complete
        marker.refuse(f"load it again, or move readers to {self.target.name}, before it is copied", found)
        if self.clone and (obstacle := self.clone.obstacle()):
            self._fall_back_to_copy(obstacle)
        if not self.clone:
            marker.recover(found)
            self.target.verify_sees_everything()
            self._compare_fields(found)
        return str(found["settings"]["index.uuid"])

    def _resume_crashed_clone(self) -> None:
        """If a crashed clone deleted the target, clone even with COPY_METHOD=reindex: the marker has its replicas."""
        if self.clone or self.read_index(self.target.name, accept=[403, 404]):
            return
        found, marker = self.read_index(self.source, accept=[403, 404]), Marker(self, self.source)
        if found and (crashed := marker.read(found)) and marker.is_of_clone_source(crashed):
            log.warning("index %s is missing: a run crashed while cloning %s; cloning it again",
                        self.target.name, self.source)  # fmt: skip
            self.clone = Clone(self)

    def _fall_back_to_copy(self, obstacle: str) -> None:
        log.warning("index %s cannot be cloned, so its documents are copied instead: %s", self.source, obstacle)
        self.clone = None
        self.target.await_primaries()
        self.target.read()

    def _compare_fields(self, source: Mapping[str, Any]) -> None:
        target, stored = self.target.found, source["mappings"].get("_source", {})
        other_ways = "COPY_METHOD=clone or REFRESH_STRATEGY=alternate"
        if not stored.get("enabled", True):
            raise Refused(f"index {self.source} does not store its documents (_source is disabled), so they cannot be "
                          f"copied; nothing was changed. Set {other_ways} for the refresh")  # fmt: skip
        if stored:
            log.warning("index %s stores documents without some of their fields (_source: %s), so a copy lacks them; "
                        "%s keeps them", self.source, json.dumps(stored), other_ways)  # fmt: skip
        missing, different = compare_fields(source["mappings"], target["mappings"])
        if different:
            raise Refused(
                f"fields defined differently in {self.source} and {self.target.name}: {', '.join(different)}; "
                f"recreate {self.target.name} with the mapping of {self.source}, or set {other_ways}"
            )
        refuse_too_many_fields(self.target.name, target, missing)
        if missing:
            log.info("fields to be added to %s: %s", self.target.name, ", ".join(missing))
        pipeline = target["settings"].get("index.final_pipeline", "_none")
        if pipeline != "_none":
            log.warning("index %s has the final pipeline %s, which processes the copied documents again",
                        self.target.name, pipeline)  # fmt: skip

    # --- copy ---

    def _clone(self, source_uuid: str) -> dict[str, Any]:
        """Clone the source and verify the clone; return {}, with nothing changed, if that is unwanted or impossible."""
        if not self.clone:
            return {}
        try:
            self.clone.run()
            total = self._get_index_count(self.source)  # nobody can write to it now
            self._verify_copy(total, source_uuid)
            self.clone.finish()
        except CannotReplace as error:
            run_to_completion(self.clone.abandon)
            self._fall_back_to_copy(str(error))
            self._compare_fields(self._verify_index_exists(self.source))
            return {}
        except BaseException:
            try:
                run_to_completion(self.clone.remove_block)
            except OperationFailed as error:
                log.error("index %s may still have a write block; the next run removes it: %s", self.source, error)
            raise
        log.info("cloned %s to %s", self.source, self.target.name)
        return {"total": total, "batches": 0}

    def _copy_documents(self, source_uuid: str) -> dict[str, Any]:
        with self.target.fill(without_replicas=self.settings.load_without_replicas):
            self._add_missing_fields()
            self.target.empty()
            total = self._get_index_count(self.source)  # refreshes, since a copy sees only searchable documents
            await_replicas(self, self.source)
            response = self._copy(total)
            self.target.restore_settings()
            self._verify_copy(int(response["total"]), source_uuid)
        return response

    def _add_missing_fields(self) -> None:
        """Define missing fields as in the source; otherwise the server would guess their types (dates!)."""
        source, target = (self._verify_index_exists(index)["mappings"] for index in (self.source, self.target.name))
        if compare_fields(source, target)[0]:
            self.request("PUT", f"/{self.target.name}/_mapping", {"properties": source["properties"]})

    def _copy(self, total: int) -> dict[str, Any]:
        """Copy in batches that fit into the cluster's memory; retries with smaller ones overwrite documents by id."""
        log.info("copying %s documents from %s to %s", f"{total:,}", self.source, self.target.name)
        # the default pipeline has already processed these documents
        dest = {"index": self.target.name, "pipeline": "_none"}
        settings = self._verify_index_exists(self.source)["settings"]
        source: dict[str, Any] = {"index": self.source}
        if without_search_pipeline(settings):
            source["search_pipeline"] = {}  # here, the server ignores `_none`
        label, size = f"copying {self.source} to {self.target.name}", self._first_batch_size(settings)
        while True:
            source["size"] = self.settings.requests_per_second.batch_size(size)
            try:
                response = self.run_task("/_reindex", {"source": source, "dest": dest}, label=label, total=total)
                break
            except BatchTooLarge as refusal:
                if size == 1:
                    raise
                size //= 2
                log.warning("%s; trying batches of %s documents", refusal, f"{size:,}")
        written = response["created"] + response["updated"]
        if response["version_conflicts"] or written != response["total"]:
            raise OperationFailed(
                f"{label}: {written:,} of {response['total']:,} documents written, "
                f"{response['version_conflicts']:,} version conflicts: another client is writing to "
                f"{self.target.name}; stop it and run again"
            )
        return response

    def _first_batch_size(self, settings: Mapping[str, Any]) -> int:
        """Estimate from the size of the stored documents how many per slice fit into the cluster's memory."""
        slices = min(int(settings["index.number_of_shards"]), MAX_SLICES)
        fitting = int(BATCH_BYTES / slices / max(self._bytes_per_document(), 1))
        return max(1, min(BATCH_SIZE, result_window(settings), fitting))

    def _bytes_per_document(self) -> float:
        stats = self.request("GET", f"/{self.source}/_stats/docs,store").data["indices"][self.source]["primaries"]
        return float(stats["store"]["size_in_bytes"] / max(stats["docs"]["count"], 1))

    def _verify_copy(self, total: int, source_uuid: str) -> None:
        """Raise OperationFailed unless counts and a sample agree and neither index has been recreated meanwhile."""
        source, target = self._get_index_count(self.source), self._get_index_count(self.target.name)
        if source != total:
            raise OperationFailed(
                f"{self.source} changed during the copy: it holds {source:,} documents, but {total:,} were copied; "
                "keep other clients from writing to this index and run again"
            )
        if target != total:
            raise OperationFailed(
                f"{self.target.name} holds {target:,} documents, but {total:,} were copied: another client is writing "
                "to this index; stop that client and run again"
            )
        self.verify_same_index(self.source, source_uuid)
        self.target.verify_same()
        self._verify_sample()

    def _verify_sample(self) -> None:
        """Compare documents from a random place in each shard with their copies.

        Raises OperationFailed if they differ; it names fields, not values. Possible causes are pipelines, masked
        fields and derived sources.
        """
        shards = self.shard_stats(self.source)
        settings = [self._verify_index_exists(index)["settings"] for index in (self.source, self.target.name)]
        # with custom routing, each shard of the target may have a document of the same id
        most = min(result_window(found) // int(found["index.number_of_shards"]) for found in settings)
        size = max(1, min(SAMPLE_SIZE, most, int(SAMPLE_BYTES / len(shards) / max(self._bytes_per_document(), 1))))
        bypass = list(map(without_search_pipeline, settings))
        compared = 0
        for number, copies in shards.items():
            last = next(copy["seq_no"]["max_seq_no"] for copy in copies if copy["routing"]["primary"])
            originals = self._sample(number, last, size, bypass[0]) if last >= 0 else {}
            found = int(settings[1]["index.number_of_shards"]) * size
            ids = {"query": {"ids": {"values": [name for name, _ in originals]}}, "size": found}
            copied = self._sources(self.target.name, ids, {**self.on_primaries(), **bypass[1]}) if originals else {}
            for key, original in originals.items():
                if fields := differing_fields(original, copied.get(key)):
                    raise OperationFailed(
                        f"{self.target.name} differs from {self.source}: in a sample of documents, these fields differ "
                        f"(_id: no copy found): {', '.join(fields[:10])}; check whether a pipeline changes or drops "
                        f"documents, or whether {self.who} sees masked values"
                    )
            compared += len(originals)
        log.info("compared %s documents of %s with their copies", compared, self.source)

    def _sample(self, shard: str, last: int, size: int, bypass: Mapping[str, str]) -> dict[tuple[str, str], Any]:
        """Return documents of a shard by (id, routing): from a random place, or from anywhere if two such are empty."""
        primary = self.on_primaries().get("preference", "")
        for start, width in ((random.randint(0, last), SAMPLE_WINDOW), (random.randint(0, last), SAMPLE_WINDOW),
                             (0, last + 1)):  # fmt: skip
            window = {"range": {"_seq_no": {"gte": start, "lt": start + width}}}
            search = {"query": window, "size": size, "track_total_hits": False}
            params = {**bypass, "preference": f"_shards:{shard}|{primary}".rstrip("|")}
            if found := self._sources(self.source, search, params):
                break
        return found

    def _sources(self, index: str, search: Mapping[str, Any], params: Mapping[str, str]) -> dict[tuple[str, str], Any]:
        found = self.request("POST", f"/{index}/_search", search, params=params).data
        self.verify_all_shards(found, f"_search of {index}")
        return {(hit["_id"], hit.get("_routing", "")): hit.get("_source", {}) for hit in found["hits"]["hits"]}

    def _report(self, response: Mapping[str, Any], began: float) -> dict[str, Any]:
        total = int(response["total"])
        retries = sum(response.get("retries", {}).values())
        result = {
            "source": self.source, "target": self.target.name, "total": total, "documents": total,
            "batches": response["batches"], "retries": retries, "seconds": seconds_since(began),
            "documents_per_second": per_second(total, began),
        }  # fmt: skip
        log.info("done: %s", " ".join(f"{name}={value}" for name, value in result.items()))
        return result


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="reindex.py", description="Copy all documents of an index into another.")
    parser.add_argument("--source", required=True, type=index_name, help="the index to copy from")
    parser.add_argument("--target", required=True, type=index_name, help="the index to fill; no alias may point at it")
    return add_settings(parser)


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, Reindex, argv)


if __name__ == "__main__":
    raise SystemExit(main())
