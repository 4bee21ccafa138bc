"""Move an alias from one index to another in one atomic step, after an audit: is the target fit for readers?

Example:    python switch_alias.py --alias my_index_alias --source my_index_primary --target my_index_secondary
Exit codes: 0 the target alone has the alias, read back; 1 failed; 2 usage; 4 refused, the alias is where it was;
            75 locked; 129, 130, 143 signals.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from opensearch_base_manager import (
    HERE, SETTINGS, TO_MOVE_ALIAS, ConfigurationError, LogFormatter, Marker, OpenSearchBaseManager, OperationFailed,
    OutcomeUnknown, Probe, Progress, Refused, RequestFailed, Retry, add_settings, await_primaries, boolean, error_of,
    index_name, log, reading_probes, refuse_unusable, require_permissions, run_cli, seconds_since,
)  # fmt: skip

CARRIED_OVER = ("filter", "index_routing", "search_routing", "is_write_index", "is_hidden")  # `add` would drop them
NUMBER_TYPES = set("long integer short byte double float half_float scaled_float unsigned_long".split())
TEXT_TYPES = set("text match_only_text annotated_text search_as_you_type".split())
FIELDS_AT_ONCE = 8  # counts under way; each is answered in a millisecond, however many documents there are
NAMED = 10  # fields or queries in a message; the command beside it has them all
NOTICED_SHARE = Fraction(1, 100)  # a field that fewer documents have may come and go
GB = 1e9
# of the live index's size: the copy and the load beside what was deleted, or the load alone
DISK_NEEDED = {"copy-back": 2.5, "alternate": 1.5}
QUERY_TIMEOUT_S = 30  # the server's limit for a reader's query; where it does not answer, READ_TIMEOUT_S is ours
AGAIN = "Until this is resolved, every nightly refresh will be refused."


def option_text(value: Any) -> str:
    """Return what the option's parser makes this value of; no field looks like an option."""
    if not isinstance(value, list):
        return f"{value:.15g}" if isinstance(value, float) else str("" if value is None else value)
    plain = re.compile(r'[^\s,"-][^\s,"]*')
    return ",".join(name if plain.fullmatch(name) else '"' + name.replace('"', '""') + '"' for name in value)


def shell_word(text: str) -> str:
    """Quote a word for bash, in the form that the log keeps: it escapes control characters, `$'...'` reads them.

    Exports from spreadsheets have line breaks in column names.
    """
    if LogFormatter.CONTROL.search(text):
        return "$'" + re.sub(r"[\\']", r"\\\g<0>", text) + "'"
    return shlex.quote(text)


class Field(NamedTuple):
    """A field as readers may use it."""

    type: str
    nested: str  # the innermost nested object around it
    told: bool  # whether `exists` finds the documents that have it


def fields_of(mapping: Mapping[str, Any]) -> dict[str, Field]:
    """Return the fields of a mapping by their full names; an alias field is what it stands for."""
    found = {name: (definition, nested) for name, definition, nested in walk_mapping(mapping)}
    fields = {}
    for name, (definition, nested) in found.items():
        meant, _ = found.get(definition.get("path", ""), (definition, ""))
        fields[name] = Field(meant.get("type", "object"), nested, is_told(meant))
    return fields


def walk_mapping(
    mapping: Mapping[str, Any], prefix: str = "", nested: str = ""
) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yield full name, definition and nested object of each field, multi-fields too, but not what is stored alone."""
    for name, definition in {**mapping.get("properties", {}), **mapping.get("fields", {})}.items():
        if definition.get("enabled", True):
            path = prefix + name
            yield path, definition, nested
            yield from walk_mapping(definition, f"{path}.", path if definition.get("type") == "nested" else nested)


def is_told(definition: Mapping[str, Any]) -> bool:
    kind, stored = definition.get("type", "object"), definition.get("store", False)
    if kind in TEXT_TYPES:  # where it is stored alone, the server answers 500
        return bool(definition.get("index", True))
    unless_said = kind != "binary"
    return bool(definition.get("index", unless_said) or definition.get("doc_values", unless_said) or stored)


def has_fallen(old: Fraction, new: Fraction, threshold: Decimal) -> bool:
    """Compare the shares of the documents that have a field."""
    return (old - new) * 100 > Fraction(threshold) or (old >= NOTICED_SHARE and new * 2 < old)


def shares(old: Fraction, new: Fraction) -> str:
    """Show two shares with as many digits as tell them apart, one at least."""
    for digits in range(1, 15):
        before, after = (f"{float(share * 100):.{digits}f} %" for share in (old, new))
        if before != after:
            break
    return f"{before} -> {after}"


def listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - NAMED:,} more" if len(items) > NAMED else ""
    return (", ".join(items[:NAMED]) or "none") + more


def queries_file(settings: argparse.Namespace) -> str:
    """Return the file of queries, from the working directory or else beside the scripts; "" if none are to be tried."""
    name: str = settings.reader_queries
    if settings.undo or not name or not settings.source:  # a broken file must not hide which index is live
        return ""
    return name if Path(name).exists() else str(HERE / name)


def read_queries(file: str) -> list[tuple[str, dict[str, Any]]]:
    """Return a search body a line, each with its place: what stands there is not for the log."""
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n") if file else []
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file}: {type(error).__name__}; give --queries a UTF-8 file") from None
    queries = []
    for place, line in ((f"{file}, line {at}", line) for at, line in enumerate(lines, 1) if line.strip()):
        try:
            queries.append((place, {**json.loads(line)}))
        except (ValueError, TypeError, RecursionError):
            raise ConfigurationError(f"{place}: not a JSON object; give one search body a line") from None
    return queries


def needed_copies(target: Mapping[str, Any], live: Mapping[str, Any], data_nodes: int) -> int:
    """Return how many active copies each shard of the target needs: no fewer than readers have now, where possible."""
    readers_have = min(int(shard["active_shards"]) for shard in live["shards"].values())
    return max(1, min(1 + int(target["number_of_replicas"]), data_nodes, readers_have))


def short_shards(target: Mapping[str, Any], needed: int) -> int:
    return sum(shard["active_shards"] < needed for shard in target["shards"].values())


class Audit:
    """The comparison of source and target before a switch: is the target fit for readers?

    A reason to refuse is one check here, and one row of SETTINGS if a setting accepts it: the command in the message
    repeats the options of this run and adds those that accept the problem.
    """

    def __init__(self, switch: SwitchAlias) -> None:
        self.switch, self.settings = switch, switch.settings
        self.source, self.target = switch.source, switch.target
        self.accepted: list[str] = self.settings.accept_fields or []
        self.fields: dict[str, Any] = {"fields_checked": 0}  # for the result

    def run(self) -> None:
        """Raise Refused if the target is not fit for readers; an undo checks only that it is not empty."""
        if self.settings.undo:
            self._refuse_empty(self.switch._get_index_count(self.target))
            return
        before, after = self._compare_counts()
        if before and self.settings.field_threshold < 100:
            self._compare_fields(before, after)
        self._compare_hits()

    def _refuse_empty(self, documents: int) -> None:
        if not documents and (had := self.switch._get_index_count(self.source)):
            counts = f"{self.source} holds {had:,} documents, {self.target} 0"
            raise Refused(f"{counts}: an empty index is never switched to; load it first")

    def _compare_counts(self) -> tuple[int, int]:
        """Return both counts. Raises Refused when the target has none, too few, or too many more or less."""
        source, target = self.switch._get_index_count(self.source), self.switch._get_index_count(self.target)
        self._refuse_empty(target)
        change = Decimal(target - source) * 100 / source if source else Decimal(0)
        counts = f"{self.source} holds {source:,} documents, {self.target} {target:,}"
        threshold: Decimal = self.settings.document_count_threshold
        log.info("%s (%+.2f %%, threshold %s %%)", counts, change, threshold)
        problems: list[str] = []
        accepted: dict[str, Any] = {}
        if source and abs(target - source) * 100 > threshold * source:
            problems.append(f"{change:+.2f} % is more than the threshold of {threshold} %")
            rounded = abs(change).quantize(Decimal("0.01"), ROUND_CEILING).normalize()
            accepted["document_count_threshold"] = f"{rounded:f}"
        if target < (self.settings.min_documents or 0):
            problems.append(f"fewer than MIN_DOCUMENTS, {self.settings.min_documents:,}, are never switched to")
            accepted["min_documents"] = str(target)
        if problems:
            command = self.switch.command(self.source, self.target, **accepted)
            raise Refused(
                f"{counts}: {', and '.join(problems)}. {AGAIN} Load it again, or, if the data are right: {command}"
            )
        return source, target

    def _compare_fields(self, before: int, after: int) -> None:
        """Raise Refused when fields have another type, or too large a share of the documents has them no longer."""
        old, new = (fields_of(self.switch.get_mapping(index)) for index in (self.source, self.target))
        if accepted := self.accepted:
            unknown = listed([name for name in accepted if name not in old])
            log.warning("not looked at: %s; no such field in %s: %s", listed(accepted), self.source, unknown)
        compared = {name: field for name, field in old.items() if field.told and name not in accepted}
        retyped = {
            name: f"{field.type} -> {new[name].type}" for name, field in compared.items()
            if name in new and field.type != new[name].type and not {field.type, new[name].type} <= NUMBER_TYPES
        }  # fmt: skip
        counts = self._count_fields({name: field for name, field in compared.items() if name not in retyped}, new)
        change = {name: (Fraction(had, before), Fraction(has, after)) for name, (had, has) in counts.items()}
        worst_first = sorted(change, key=lambda name: change[name][1] - change[name][0])
        threshold = self.settings.field_threshold
        grown = [name for name in worst_first[::-1] if has_fallen(*change[name][::-1], threshold)]
        fallen = [name for name in worst_first if has_fallen(*change[name], threshold)]
        shown = {name: shares(*change[name]) for name in grown + fallen}
        self.fields = {"fields_checked": len(counts) + len(retyped)}
        log.info("%s fields compared (threshold %s points); grown: %s; new: %s", self.fields["fields_checked"],
                 threshold, listed([f"{name} {shown[name]}" for name in grown]),
                 listed([name for name in new if name not in old]))  # fmt: skip
        if retyped or fallen:
            self._refuse_fields({**retyped, **{name: shown[name] for name in fallen}})

    def _refuse_fields(self, differing: Mapping[str, str]) -> None:
        self.fields["fields_fallen"] = differing
        named = listed([f"{name} {change}" for name, change in differing.items()])
        command = self.switch.command(self.source, self.target, accept_fields=[*self.accepted, *differing])
        raise Refused(
            f"fewer documents of {self.target} than of {self.source} have these fields, or their type is another: "
            f"{named}. {AGAIN} Load it again from whole data, or, if this is meant: {command}",
            {"alias": self.switch.alias, "source": self.source, "target": self.target, "changed": False, **self.fields},
        )

    def _count_fields(self, old: Mapping[str, Field], new: Mapping[str, Field]) -> dict[str, tuple[int, int]]:
        """Return how many documents of the source and of the target have each field, where the server can tell."""

        def count(name: str) -> tuple[int, int] | None:
            try:
                had = self._count_field(self.source, name, old[name].nested)
            except RequestFailed as error:
                if error.kind != "query_shard_exception":
                    raise
                log.warning("field %s is not compared: %s", name, error.reason)  # such as rank_features
                return None
            return had, self._count_field(self.target, name, new[name].nested) if name in new else 0

        names = [name for name, field in old.items() if field.type not in ("object", "nested")]
        with ThreadPoolExecutor(FIELDS_AT_ONCE) as pool:
            return {name: counts for name, counts in zip(names, pool.map(count, names)) if counts}

    def _count_field(self, index: str, name: str, nested: str) -> int:
        query: dict[str, Any] = {"exists": {"field": name}}
        if nested:
            query = {"nested": {"path": nested, "query": query}}
        answer = self._ask(index, "_count", {"query": query})
        if answer["_shards"]["successful"] < answer["_shards"]["total"]:
            raise OperationFailed(f"_count of field {name} in {index}: failed shards; see GET _cluster/health/{index}")
        return int(answer["count"])

    def _compare_hits(self) -> None:
        """Raise Refused when the target does not answer one of the readers' queries as the source does."""
        problems = []
        for place, body in self.switch.queries:
            had, has = (self.hits(index, place, body) for index in (self.source, self.target))
            log.info("%s: hits in %s: %s, in %s: %s", place, self.source, had, self.target, has)
            if isinstance(has, str) or (had and not has):
                problems.append(f"{place}: hits in {self.source}: {had}, in {self.target}: {has}")
        if problems:
            command = self.switch.command(self.source, self.target, reader_queries="")
            raise Refused(f"{listed(problems)}. {AGAIN} Change the line, or do without queries: {command}")

    def hits(self, index: str, place: str, body: Mapping[str, Any]) -> int | str:
        """Search the primary copies, and return the number of hits; or, for the target, why it cannot be told."""
        limited = {**body, "track_total_hits": True, "timeout": f"{QUERY_TIMEOUT_S}s"}
        try:
            for _ in range(2):  # the first try may have met a cold index, and has warmed it
                answer = self._ask(index, "_search", limited)
                if not answer["timed_out"]:
                    break
        except RequestFailed as error:
            if error.status == 400 and index != self.target:
                raise ConfigurationError(f"{place}: {index} refuses it: {error.reason}; change that line") from None
            if isinstance(error, OutcomeUnknown) or index != self.target or error.status in (0, 401, 403, 429):
                raise
            return error.reason
        problem = f"not within {QUERY_TIMEOUT_S} s, tried twice" if answer["timed_out"] else ""
        if answer["_shards"]["successful"] < answer["_shards"]["total"]:
            problem = "failed shards"
        if problem and index != self.target:
            raise OperationFailed(f"{place}: hits in {index}: {problem}; see GET _cluster/health, or change that line")
        return problem or int(answer["hits"]["total"]["value"])

    def _ask(self, index: str, action: str, body: Mapping[str, Any]) -> Any:
        return self.switch.request("POST", f"/{index}/{action}", body, params=self.switch.on_primaries()).data


class SwitchAlias(OpenSearchBaseManager):
    def __init__(self, settings: argparse.Namespace) -> None:
        if not settings.show and not (settings.source and settings.target):
            raise ConfigurationError("give --source and --target, or --show")
        if not settings.show and settings.source == settings.target:
            raise ConfigurationError("source and target are the same index; give two")
        self.queries = read_queries(queries_file(settings))
        super().__init__(settings)
        self.alias, self.source, self.target = settings.alias, settings.source, settings.target
        if self.source and self.target:
            self.names, self.probes = [self.source, self.target, self.alias], self._probes()
        self.audit = Audit(self)

    def _probes(self) -> list[Probe]:
        indices, alias = [self.source, self.target], self.alias
        twice = [{"add": {"index": index, "alias": alias, "index_routing": "x,y"}} for index in indices]
        return [
            *reading_probes(*indices), Probe("GET", f"/{alias}/_alias/{alias}"),
            Probe("POST", "/_tasks/permission-probe:1/_cancel"),
            Probe("POST", "/_aliases", {"actions": twice}),  # two routing values: refused, whatever is there
        ]  # fmt: skip

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        uuids = {index: self.index_uuid(index) for index in (self.source, self.target)}
        if set(self._expected_indices()) == {self.target}:
            result = self._result(began, changed=False)
            log.info("done: alias %s is on %s alone already, nothing to do", self.alias, self.target)
            return result
        for index in sorted([self.source, self.target]):
            self.lock(index)
        if not self.settings.undo:
            require_permissions(self, self.probes)
            self.await_tasks(self.target)
        Marker(self, self.target).refuse("load it again first")
        self.audit.run()
        if self.dry_run:
            log.info("dry run: alias %s would be moved: %s -> %s", self.alias, self.source, self.target)
            return self._result(began, changed=False)
        self._await_copies()
        for index, uuid in uuids.items():  # the wait may have been long
            self.verify_same_index(index, uuid)
        Marker(self, self.target).refuse("load it again first")
        self._move(self._expected_indices())
        result = self._result(began, changed=True)
        log.info("done: alias %s: %s -> %s", self.alias, self.source, self.target)
        self._say_how_to_undo()
        return result

    def show(self) -> str:
        """Return the one index that the alias points at. Raises Refused if it points at several.

        With source and target, in any order, check whether a switch from it to the other one could work, as far as that
        does not depend on the documents of the target.
        """
        if self.source and self.target:
            require_permissions(self, self.probes)
        indices = self._indices_behind()
        if len(indices) != 1:
            state = ", ".join(sorted(indices))
            raise Refused(f"alias {self.alias} points at {len(indices)} indices: {state}; take it off all but one")
        [live] = indices
        if self.source and self.target:
            if live not in (self.source, self.target):
                raise Refused(f"alias {self.alias} is on {live}, neither on {self.source} nor on {self.target}; it "
                              f"stays there. Move it to one: {self.command(live, self.source)}")  # fmt: skip
            self.source, self.target = sorted([self.source, self.target], key=lambda index: index != live)
            self._check_pair()
        return live

    def _check_pair(self) -> None:
        """Raise Refused for what would keep readers from being moved, whatever the target will hold by then."""
        # a crashed run may have deleted the target: the step that fills it restores it, or reports that it is missing
        there = [self.source, self.target] if self.index_exists(self.target) else [self.source]
        found = self.read_indices(*there)
        for index in there:
            refuse_unusable(index, found[index], TO_MOVE_ALIAS)
        await_primaries(self, self.source)
        if others := sorted({*found[self.source]["aliases"]} - {self.alias}):
            log.warning("alias %s points at %s too: a refresh that is to empty this index is refused; give that alias "
                        "an index of its own", ", ".join(others), self.source)  # fmt: skip
        self._warn_of_moving_shards()
        if self.settings.disk_check:
            self._check_disk()
        for place, body in self.queries:
            self.audit.hits(self.source, place, body)

    def _warn_of_moving_shards(self) -> None:
        if moving := self.request("GET", "/_cluster/health").data["relocating_shards"]:
            log.warning("%s shards are relocating: if a node is about to leave, or the domain is being changed, a copy "
                        "or a deletion may be lost with its node", moving)  # fmt: skip

    def _check_disk(self) -> None:
        """Raise Refused if the data nodes have less free space than the strategy needs for copies of the live index."""
        response = self.request("GET", "/_nodes/stats/fs", accept=[403])
        if response.status == 403:
            log.info("free disk space is not checked: %s", error_of(response.body)[1])
            return
        free = {node["name"]: node["fs"]["total"]["available_in_bytes"]
                for node in response.data["nodes"].values() if "data" in node["roles"]}  # fmt: skip
        stats = self.request("GET", f"/{self.source}/_stats/store").data
        needed = DISK_NEEDED[self.settings.refresh_strategy] * stats["_all"]["total"]["store"]["size_in_bytes"]
        shown = ", ".join(f"{name} {size / GB:,.1f}" for name, size in free.items())
        if sum(free.values()) < needed:
            raise Refused(
                f"a refresh of {self.source} needs {needed / GB:,.1f} GB of disk, and the data nodes have less free "
                f"({shown}); nothing was changed. Give them more, or turn this check off: DISK_CHECK=false"
            )
        if any(size < needed / len(free) for size in free.values()):
            log.warning("a refresh of %s needs %.1f GB of disk, and one of the data nodes may run short: %s",
                        self.source, needed / GB, shown)  # fmt: skip

    # --- the indices behind the alias ---

    def _indices_behind(self) -> dict[str, dict[str, Any]]:
        """Return the alias's definition by index, by the one path that a role limited to named indices may read."""
        answer = self.request("GET", f"/{self.alias}/_alias/{self.alias}", accept=[404])
        if answer.status == 404:
            raise self._no_such_alias()
        return {index: entry["aliases"][self.alias] for index, entry in answer.data.items()}

    def _no_such_alias(self) -> OperationFailed:
        if self.request("GET", f"/{self.alias}", accept=[403, 404]).status == 200:
            return Refused(f"{self.alias} is the name of an index, not an alias; delete it or name another alias")
        return OperationFailed(
            f'alias {self.alias} does not exist; create it: POST /_aliases {{"actions": [{{"add": '
            f'{{"index": "{self.source or "INDEX"}", "alias": "{self.alias}"}}}}]}}'
        )

    def _expected_indices(self) -> dict[str, dict[str, Any]]:
        """Return source, both, or target alone. Raises Refused when the alias stands on a third index."""
        indices = self._indices_behind()
        if set(indices) - {self.source, self.target}:
            state = ", ".join(sorted(indices))
            mend = self.command(state, self.target) if len(indices) == 1 else "take it off all but one of them"
            raise Refused(f"alias {self.alias} is on {state}, not on {self.source}; it stays there. To mend it: {mend}")
        return indices

    # --- the shard copies ---

    def _await_copies(self) -> None:
        """Wait until each shard of the target has the copies it needs. Raises Refused after WAIT_SECONDS."""
        began = time.monotonic()
        progress = None
        while True:
            path, params = f"/_cluster/health/{self.source},{self.target}", {"level": "shards"}
            health = self.request("GET", path, params=params).data
            live, target = health["indices"][self.source], health["indices"][self.target]
            needed = needed_copies(target, live, health["number_of_data_nodes"])
            short = short_shards(target, needed)
            if not short:
                break
            if time.monotonic() - began > self.settings.wait_seconds:
                raise Refused(
                    f"index {self.target}: {short} of {len(target['shards'])} shards have fewer than {needed} active "
                    f"copies after {self.settings.wait_seconds:g} s; see GET _cluster/allocation/explain, and run again"
                )
            progress = progress or Progress(f"waiting for the copies of {self.target}", len(target["shards"]), "shards")
            progress.update(len(target["shards"]) - short)
            time.sleep(1)
        if progress:
            progress.close()

    # --- the switch ---

    def _move(self, indices: Mapping[str, Mapping[str, Any]]) -> None:
        """Send the one atomic call, and read back. After no response the alias is read before a second one."""
        retry, acknowledged = Retry(self.settings.retry_seconds), True
        while set(indices) != {self.target}:
            try:
                response = self.request("POST", "/_aliases", self._actions(indices), idempotent=False)
                acknowledged = response.data["acknowledged"] is True
                break
            except RequestFailed as failure:
                late = retry.attempt and failure.status == 404  # must_exist: the first attempt took place meanwhile
                if not (late or isinstance(failure, OutcomeUnknown)):
                    raise
                if not retry.wait(f"{failure}; reading where alias {self.alias} is"):
                    raise OperationFailed(f"{failure}; look where the alias is: {self._show_command()}") from None
                indices = self._indices_behind()
                self._verify_indices(indices, {self.source, self.target})
        if not acknowledged:
            raise OperationFailed(
                f"alias {self.alias}: not every node acknowledged the switch, some may still answer readers from "
                f"{self.source}; look with {self._show_command()} and run again"
            )
        self._verify_indices(self._indices_behind(), {self.target})

    def _verify_indices(self, indices: Mapping[str, Any], allowed: set[str]) -> None:
        if not set(indices) <= allowed:
            raise OperationFailed(
                f"alias {self.alias} is on {', '.join(sorted(indices))} now: somebody else moved it, or the switch did "
                f"not take; look with {self._show_command()} and run again"
            )

    def _actions(self, indices: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        remove: dict[str, Any] = {"index": self.source, "alias": self.alias}
        if self.version() >= (2, 12):  # before, removing what is not there is silently ignored
            remove["must_exist"] = True
        if self.target in indices:
            return {"actions": [{"remove": remove}]}
        carried = {name: value for name, value in indices[self.source].items() if name in CARRIED_OVER}
        return {"actions": [{"remove": remove}, {"add": {"index": self.target, "alias": self.alias, **carried}}]}

    def _say_how_to_undo(self) -> None:
        hold = shlex.quote(str(self.settings.lock_dir / f"HOLD-{self.alias}"))
        log.info("undo: %s", self.command(self.target, self.source, undo=True))
        log.info("after an undo, the next refresh moves readers on again unless this keeps it from that: "
                 "echo 'why, since when' > %s", hold)  # fmt: skip

    def command(self, source: str, target: str, *, undo: bool = False, **other: Any) -> str:
        """Return a command with the options of this run, or other values of them; an undo needs only its wait."""
        words = ["python", "switch_alias.py", "--alias", self.alias, "--source", source, "--target", target]
        undo = undo or self.settings.undo
        for setting in SETTINGS["switch_alias"]:
            if not setting.flag or setting.parse is boolean or (undo and setting.flag != "--wait-seconds"):
                continue
            text = option_text(other.get(setting.name, getattr(self.settings, setting.name)))
            if not (setting.given() or "") == text == setting.default:  # the variable may differ tomorrow
                words += [setting.flag, text]
        return " ".join(map(shell_word, words + ["--undo"] * undo))

    def _show_command(self) -> str:
        return f"python switch_alias.py --alias {shlex.quote(self.alias)} --show"

    def _result(self, began: float, *, changed: bool) -> dict[str, Any]:
        return {
            "alias": self.alias, "source": self.source, "target": self.target, "changed": changed,
            "documents": self._get_index_count(self.target), **self.audit.fields, "seconds": seconds_since(began),
        }  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="switch_alias.py", description="Move an alias from one index to another.")
    parser.add_argument("--alias", required=True, type=index_name, help="the alias that readers use")
    parser.add_argument("--source", type=index_name, help="the index that the alias is to leave")
    parser.add_argument("--target", type=index_name, help="the index that readers are to see")
    return add_settings(parser)


def run(settings: argparse.Namespace) -> dict[str, Any] | str:
    with SwitchAlias(settings) as switch:
        return switch.show() if settings.show else switch.run()


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
