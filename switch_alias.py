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
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from opensearch_base_manager import (
    HERE, SETTINGS, TO_MOVE_ALIAS, ConfigurationError, LogFormatter, Marker, OpenSearchBaseManager, OperationFailed,
    OutcomeUnknown, Probe, Progress, Refused, RequestFailed, Retry, add_settings, await_primaries, await_replicas,
    boolean, error_of, in_parallel, index_name, log, reading_probes, refuse_unusable, require_permissions, run_cli,
    seconds_since, verify_sees_everything,
)  # fmt: skip

CARRIED_OVER = ("filter", "index_routing", "search_routing", "is_write_index", "is_hidden")  # `add` would drop them
NUMBER_TYPES = set("long integer short byte double float half_float scaled_float unsigned_long".split())
TEXT_TYPES = set("text match_only_text annotated_text search_as_you_type".split())
# parameters of a field: those that concern what is stored alone, the server's defaults, and where these come from
NOT_FOR_READERS = set(
    "type path properties fields meta eager_global_ordinals coerce ignore_malformed ignore_above dynamic".split()
)
PARAMETERS: dict[str, Any] = {
    "index": True, "store": False, "boost": 1.0, "analyzer": "standard", "term_vector": "no", "fielddata": False,
    "similarity": "BM25", "position_increment_gap": 100, "index_phrases": False,
    "split_queries_on_whitespace": False, "include_in_parent": False, "include_in_root": False, "enabled": True,
    "format": "strict_date_optional_time||epoch_millis",
}  # fmt: skip
FALLS_BACK_TO = {"search_analyzer": "analyzer", "search_quote_analyzer": "search_analyzer"}
# settings of an index: less than before, true before, or another value takes something away from readers
AT_LEAST = re.compile(r"index\.(max_(?!ngram|shingle|refresh).*|highlight\.max_.*|analyze\.max_.*|query\.max_.*)")
TRUE_IS_MORE = re.compile(r"index\.(knn|query_string\.lenient|query\.(parse|derived_field)\..*)")
EQUAL = re.compile(r"index\.(search\.default_pipeline|query\.default_field|knn\..*)")
NOT_COMPARED = re.compile(  # what the server or a load sets, and what `analysis_of` compares
    r"index\.(uuid|creation_date|provided_name|version\.|resize\.|routing\.|number_of_|auto_expand_|refresh_interval|"
    r"analysis\.|similarity\.)"
)
COMPONENT = re.compile(r"index\.analysis\.(?!analyzer\.|normalizer\.)")
IMPLICIT_ANALYSIS: dict[str, dict[str, Any]] = {
    "index.similarity.default": {"type": ["BM25"]}, "index.analysis.analyzer.default": {"type": ["standard"]},
    "index.analysis.analyzer.default_search": {},
}  # fmt: skip
FIELDS_AT_ONCE = 8  # counts under way; each is answered in a millisecond, however many documents there are
NAMED = 10  # fields or queries in a message; the command beside it has them all
NOTICED_SHARE = Fraction(1, 100)  # a field that fewer documents have may come and go
GB = 1e9
# of the live index's size: the copy and the load beside what was deleted, or the load alone
DISK_NEEDED = {"copy-back": 2.5, "alternate": 1.5}
QUERY_TIMEOUT_S = 30  # the server's limit for a reader's query; where it does not answer, READ_TIMEOUT_S is ours
TOO_SLOW = f"not within {QUERY_TIMEOUT_S} s, tried twice"
REJECTED = "400 "
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
    parent: str  # the field that it is a multi-field of
    definition: Mapping[str, Any]


def fields_of(mapping: Mapping[str, Any]) -> dict[str, Field]:
    """Return the fields of a mapping by their full names; an alias field is what it stands for."""
    walked = list(walk_mapping(mapping))
    found = {name: definition for name, definition, _, _ in walked}
    fields = {}
    for name, definition, nested, parent in walked:
        meant = found.get(definition.get("path", ""), definition)
        fields[name] = Field(meant.get("type", "object"), nested, is_told(meant), parent, meant)
    return fields


def walk_mapping(
    mapping: Mapping[str, Any], prefix: str = "", nested: str = ""
) -> Iterator[tuple[str, Mapping[str, Any], str, str]]:
    """Yield full name, definition, nested object and parent of each field, but not what is stored alone.

    The parent is the field that a multi-field belongs to.
    """
    for kind in ("properties", "fields"):
        for name, definition in mapping.get(kind, {}).items():
            if definition.get("enabled", True):
                path = prefix + name
                yield path, definition, nested, prefix[:-1] if kind == "fields" else ""
                yield from walk_mapping(definition, f"{path}.", path if definition.get("type") == "nested" else nested)


def is_told(definition: Mapping[str, Any]) -> bool:
    kind, stored = definition.get("type", "object"), definition.get("store", False)
    if kind in TEXT_TYPES:  # where it is stored alone, the server answers 500
        return bool(definition.get("index", True))
    unless_said = kind != "binary"
    return bool(definition.get("index", unless_said) or definition.get("doc_values", unless_said) or stored)


def lost_parameters(old: Field, new: Field) -> str:
    """Describe what readers of a field would lose by its new definition; types of numbers count as one type.

    What concerns storing alone, explicit defaults and what readers gain is left out.
    """
    if old.type != new.type and not {old.type, new.type} <= NUMBER_TYPES:
        return f"{old.type} -> {new.type}"
    is_text = old.type in TEXT_TYPES
    defaults = {**PARAMETERS, "norms": is_text, "doc_values": not is_text and old.type != "binary",
                "index_options": "positions" if is_text else "docs"}  # fmt: skip
    lost = []
    for name in sorted({*old.definition, *new.definition} - NOT_FOR_READERS):
        had, has = (effective_parameter(field.definition, name, defaults) for field in (old, new))
        if had != has and has is not True and not (name == "scaling_factor" and old.type != new.type):
            lost.append(f"{name} {had} -> {has}")
    return ", ".join(lost)


def effective_parameter(definition: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> Any:
    if name in definition:
        return "standard" if definition[name] == "default" else definition[name]
    if name in FALLS_BACK_TO:
        return effective_parameter(definition, FALLS_BACK_TO[name], defaults)
    return defaults.get(name)


def lost_definitions(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Return what readers would lose by the mapping of the target, by field; a missing field is left to the counts."""
    known = fields_of(new)
    lost = {name: lost_parameters(field, known[name]) for name, field in fields_of(old).items()
            if name in known and field.told}  # fmt: skip
    for name, script in old.get("derived", {}).items():
        lost[name] = "" if new.get("derived", {}).get(name) == script else "derived field missing or different"
    had, has = ({"enabled": True, **mapping.get("_source", {})} for mapping in (old, new))
    lost["_source"] = "" if has in (had, {"enabled": True}) else f"{had} -> {has}"
    return {name: text for name, text in lost.items() if text}


def analysis_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return each analyzer, normalizer and similarity by the name of its settings, with all that it is made of."""
    parts: dict[str, dict[str, Any]] = {**IMPLICIT_ANALYSIS}
    for key, value in settings.items():
        if match := re.fullmatch(r"(index\.(?:analysis\.\w+|similarity)\.[^.]+)\.(.+)", key):
            words = value if isinstance(value, list) else [word.strip() for word in str(value).split(",")]
            parts[match[1]] = {**parts.get(match[1], {}), match[2]: words}

    def whole(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
        words = {word for words in parts[name].values() for word in words}
        used = [part for part in parts if COMPONENT.match(part) and part.split(".")[-1] in words and part not in above]
        plain = {key: words for key, words in parts[name].items() if (key, words) != ("type", ["custom"])}
        return {**plain, **{part: whole(part, (*above, part)) for part in used}}

    return {name: whole(name) for name in parts if not COMPONENT.match(name)}


def compare_settings(live: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return the settings by which readers would lose something, with both values, and others that differ.

    Both are responses with `include_defaults`; a setting that is explicit in neither is left out.
    """
    old, new = ({**found["defaults"], **found["settings"]} for found in (live, target))
    lost: dict[str, str] = {}
    others = []
    for name in sorted({*live["settings"], *target["settings"]}):
        had, has = old.get(name), new.get(name)
        if had == has or NOT_COMPARED.match(name):
            continue
        less = AT_LEAST.fullmatch(name) and int(has or 0) < int(had or 0)
        if less or (TRUE_IS_MORE.fullmatch(name) and had == "true") or EQUAL.fullmatch(name):
            lost[name] = f"{had} -> {has}"
        else:
            others.append(name)
    had_all, has_all = analysis_of(live["settings"]), analysis_of(target["settings"])
    for name, analysis in had_all.items():
        if analysis != has_all.get(name):
            lost[name] = "different" if name in has_all else "missing"
    return lost, others


def unsupported(index: str, settings: Mapping[str, Any], alias: Mapping[str, Any]) -> str:
    """Return why readers of an index cannot be served, or ""."""
    if int(settings.get("index.number_of_search_replicas", 0)):
        return f"index {index} has search replicas, which are not supported; set index.number_of_search_replicas to 0"
    if "search_routing" in alias and (shards := int(settings["index.number_of_shards"])) > 1:
        return (
            f"the alias has the search routing {alias['search_routing']}, and index {index} {shards} primary shards: "
            "the load stores without routing, so readers would miss documents; take the routing off the alias"
        )
    return ""


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


class ReadersView:
    """An index as readers of the alias see it: under the alias's filter and search routing."""

    def __init__(self, manager: OpenSearchBaseManager, index: str, alias: Mapping[str, Any]) -> None:
        self.manager, self.index, self.filter = manager, index, alias.get("filter")
        self.routing = {"routing": alias["search_routing"]} if "search_routing" in alias else {}

    def count(self) -> tuple[int, int]:
        """Return how many documents the index holds, and how many of them readers see."""
        documents = self.manager._get_index_count(self.index)
        if not (self.filter or self.routing):
            return documents, documents
        return documents, self.manager._get_index_count(self.index, self.filter, self.routing)

    def hits(self, body: Mapping[str, Any]) -> int | str:
        """Search the primary copies, and return the number of hits, or why it is unknown.

        The server's reason is left out, since it quotes values of the query.
        """
        try:
            for _ in range(2):  # the first try may have met a cold index, and has warmed it
                answer = self._search(body, self.manager.on_primaries())
                if not answer["timed_out"]:
                    break
        except RequestFailed as error:
            if isinstance(error, OutcomeUnknown) or error.status in (0, 401, 403, 429):
                raise
            return f"{error.status} {error.kind}"
        if answer["_shards"]["successful"] < answer["_shards"]["total"]:
            return "failed shards"
        return TOO_SLOW if answer["timed_out"] else int(answer["hits"]["total"]["value"])

    def warm(self, place: str, body: Mapping[str, Any]) -> None:
        """Search any copy, so that the first readers do not meet a cold one; a failure changes nothing."""
        try:
            self._search(body, {}, retry=False)
        except RequestFailed as error:
            log.info("%s: %s answers with %s %s while it is warmed", place, self.index, error.status, error.kind)

    def _search(self, body: Mapping[str, Any], params: Mapping[str, str], *, retry: bool = True) -> Any:
        search = {**body, "track_total_hits": True, "timeout": f"{QUERY_TIMEOUT_S}s"}
        if self.filter:  # not as part of the query: some kinds of query must be the outermost one
            filters = [body["post_filter"]] if "post_filter" in body else []
            search["post_filter"] = {"bool": {"filter": [*filters, self.filter]}}
        path, params = f"/{self.index}/_search", {**params, **self.routing}
        return self.manager.request("POST", path, search, params=params, retry=retry).data


class Audit:
    """The comparison of source and target before a switch: is the target fit for readers?

    A reason to refuse is one check here, and one row of SETTINGS if a setting accepts it: the command in the message
    repeats the options of this run and adds those that accept the problem. Documents are counted, and queries tried, as
    readers see them; the shares of fields are those of all documents, which cost nothing.
    """

    def __init__(self, switch: SwitchAlias, indices: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the indices behind the alias, with its definitions; the target gets that of the source."""
        self.switch, self.settings = switch, switch.settings
        self.source, self.target = switch.source, switch.target
        self.accepted: list[str] = self.settings.accept_fields or []
        of_source = indices.get(self.source, next(iter(indices.values())))
        self.alias = {self.source: of_source, self.target: indices.get(self.target, of_source)}
        self.views = {index: ReadersView(switch, index, alias) for index, alias in self.alias.items()}
        self.documents = 0  # that the target holds
        self.visible = 0  # those of them that readers of the alias will see
        self.fields: dict[str, Any] = {"fields_checked": 0}  # for the result

    def run(self) -> None:
        """Raise Refused if the target is not fit for readers; an undo checks only that it is not empty."""
        if self.settings.undo:
            self.documents, self.visible = self.views[self.target].count()
            if not self.documents:
                self._refuse_empty(self.switch._get_index_count(self.source), 0)
            return
        self._compare_settings()
        for index in (self.source, self.target):
            verify_sees_everything(self.switch, index)
        before, after = self._compare_counts()
        if before and self.settings.field_threshold < 100:
            self._compare_fields(before, after)
        self._compare_hits()

    def check_beforehand(self) -> None:
        """Make the checks that need no data in the target: settings, definitions of fields, and rejected queries."""
        self._compare_settings()
        if self.settings.field_threshold < 100:
            mappings = [self.switch._verify_index_exists(index)["mappings"] for index in (self.source, self.target)]
            if redefined := self._redefined(*mappings):
                self._refuse_fields(redefined)
        for place, body in self.switch.queries:
            if isinstance(self.views[self.source].hits(body), str):  # or the target, which may be red, is not asked
                self._hits(place, body)

    def warm(self, copies: int) -> None:
        """Send the queries once for each copy of the target's shards."""
        for place, body in self.switch.queries * (copies if copies > 1 else 0):
            self.views[self.target].warm(place, body)

    def verify_through_alias(self) -> None:
        """Raise OperationFailed unless readers of the alias see as many documents as were counted for them."""
        counted = self.switch.request("GET", f"/{self.switch.alias}/_count").data
        self.switch.verify_all_shards(counted, f"_count of {self.switch.alias}")
        if counted["count"] != self.visible:
            raise OperationFailed(
                f"readers of {self.switch.alias} see {counted['count']:,} documents, {self.visible:,} were counted in "
                f"{self.target}; to move readers back: {self.switch.undo_command()}"
            )

    def _refuse_empty(self, before: int, after: int, where: str = "") -> None:
        if before and not after:
            counts = f"{self.source} holds {before:,} documents, {self.target} 0{where}"
            raise Refused(f"{counts}: an empty index is never switched to; load it first")

    def _compare_settings(self) -> None:
        """Raise Refused if the target's settings take something away from readers, or are not supported."""
        found = {index: self._effective_settings(index) for index in (self.source, self.target)}
        for index in (self.source, self.target):
            if problem := unsupported(index, found[index]["settings"], self.alias[index]):
                raise Refused(f"{problem}. {AGAIN}")
        lost, others = compare_settings(found[self.source], found[self.target])
        accepted = self.settings.accept_settings or []
        if others:
            log.info("settings that differ in %s, but take nothing away from readers: %s", self.target, listed(others))
        if passed := [f"{name} {values}" for name, values in lost.items() if {name, "*"} & {*accepted}]:
            log.warning("settings that differ and are accepted: %s", listed(passed))
        if lost := {name: values for name, values in lost.items() if not {name, "*"} & {*accepted}}:
            command = self.switch.command(self.source, self.target, accept_settings=[*accepted, *lost])
            raise Refused(
                f"settings of {self.target} take something away from readers of {self.source}: "
                f"{listed([f'{name} {values}' for name, values in lost.items()])}. {AGAIN} Change {self.target}, or, "
                f"if this is intended: {command}"
            )

    def _effective_settings(self, index: str) -> Any:
        params = {"flat_settings": "true", "include_defaults": "true"}
        return self.switch.request("GET", f"/{index}", params=params).data[index]

    def _compare_counts(self) -> tuple[int, int]:
        """Return both counts. Raises Refused when the target has none, too few, or too many more or less."""
        (before, source), (self.documents, self.visible) = (view.count() for view in self.views.values())
        target = self.visible
        as_readers = any(view.filter or view.routing for view in self.views.values())
        where = f" for readers of {self.switch.alias}, which has a filter or routing" if as_readers else ""
        self._refuse_empty(source, target, where)
        change = Decimal(target - source) * 100 / source if source else Decimal(0)
        counts = f"{self.source} holds {source:,} documents, {self.target} {target:,}{where}"
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
        return before, self.documents

    def _compare_fields(self, before: int, after: int) -> None:
        """Raise Refused when fields are defined otherwise, or too large a share of the documents lacks them now."""
        mappings = [self.switch._verify_index_exists(index)["mappings"] for index in (self.source, self.target)]
        old, new = (fields_of(mapping) for mapping in mappings)
        if accepted := self.accepted:
            unknown = listed([name for name in accepted if name not in old])
            log.warning("not looked at: %s; no such field in %s: %s", listed(accepted), self.source, unknown)
        redefined = self._redefined(*mappings)
        compared = {
            name: field for name, field in old.items()
            if field.told and not self._is_in({*self.accepted, *redefined}, name, old)
        }  # fmt: skip
        counts = self._count_fields(compared, new)
        change = {name: (Fraction(had, before), Fraction(has, after)) for name, (had, has) in counts.items()}
        worst_first = sorted(change, key=lambda name: change[name][1] - change[name][0])
        threshold = self.settings.field_threshold
        grown = [name for name in worst_first[::-1] if has_fallen(*change[name][::-1], threshold)]
        falling = {name for name in worst_first if has_fallen(*change[name], threshold)}
        fallen = [name for name in worst_first if name in falling and old[name].parent not in falling]
        shown = {name: shares(*change[name]) for name in grown + fallen}
        self.fields = {"fields_checked": len(counts) + len(redefined)}
        log.info("%s fields compared (threshold %s points); grown: %s; new: %s", self.fields["fields_checked"],
                 threshold, listed([f"{name} {shown[name]}" for name in grown]),
                 listed([name for name in new if name not in old]))  # fmt: skip
        if redefined or fallen:
            self._refuse_fields({**redefined, **{name: shown[name] for name in fallen}})

    def _redefined(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
        """Return what readers would lose by the target's mapping, less what is accepted, with no multi-field twice."""
        fields, lost = fields_of(old), lost_definitions(old, new)
        return {
            name: text for name, text in lost.items()
            if not self._is_in(self.accepted, name, fields) and not (name in fields and fields[name].parent in lost)
        }  # fmt: skip

    @staticmethod
    def _is_in(names: Collection[str], name: str, fields: Mapping[str, Field]) -> bool:
        """Say whether a field is one of these, or a multi-field of one."""
        return name in names or (name in fields and fields[name].parent in names)

    def _refuse_fields(self, differing: Mapping[str, str]) -> None:
        self.fields["fields_fallen"] = differing
        named = listed([f"{name} {change}" for name, change in differing.items()])
        command = self.switch.command(self.source, self.target, accept_fields=[*self.accepted, *differing])
        raise Refused(
            f"these fields are rarer in {self.target} than in {self.source}, or defined otherwise: {named}. {AGAIN} "
            f"Load it again from complete data, or, if this is intended: {command}",
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
        return {name: counts for name, counts in zip(names, in_parallel(count, names, FIELDS_AT_ONCE)) if counts}

    def _count_field(self, index: str, name: str, nested: str) -> int:
        query: dict[str, Any] = {"exists": {"field": name}}
        if nested:
            query = {"nested": {"path": nested, "query": query}}
        path, params = f"/{index}/_count", self.switch.on_primaries()
        answer = self.switch.request("POST", path, {"query": query}, params=params).data
        if answer["_shards"]["successful"] < answer["_shards"]["total"]:
            raise OperationFailed(f"_count of field {name} in {index}: failed shards; see GET _cluster/health/{index}")
        return int(answer["count"])

    def _compare_hits(self) -> None:
        """Raise Refused when the target does not answer one of the readers' queries as the source does.

        If both thresholds are 0, the target is a copy: what it holds is verified, and it may be slow the first time.
        """
        is_copy = self.settings.document_count_threshold == self.settings.field_threshold == 0
        problems = []
        for place, body in self.switch.queries:
            had, has = self._hits(place, body)
            log.info("%s: hits in %s: %s, in %s: %s", place, self.source, had, self.target, has)
            if (isinstance(has, str) or (had and not has)) and not (is_copy and has in (0, TOO_SLOW)):
                problems.append(f"{place}: hits in {self.source}: {had}, in {self.target}: {has}")
        if problems:
            command = self.switch.command(self.source, self.target, reader_queries="")
            raise Refused(f"{listed(problems)}. {AGAIN} Change the line, or do without queries: {command}")

    def _hits(self, place: str, body: Mapping[str, Any]) -> tuple[int | str, int | str]:
        """Return the hits in both indices, or why they are unknown.

        Raises ConfigurationError where both reject the query, OperationFailed where the source fails otherwise.
        """
        had, has = (view.hits(body) for view in self.views.values())
        if isinstance(had, str) and not had.startswith(REJECTED):
            raise OperationFailed(f"{place}: {self.source} answers {had}; see GET _cluster/health, or change that line")
        if isinstance(had, str) and isinstance(has, str) and has.startswith(REJECTED):
            raise ConfigurationError(f"{place}: both indices answer {has}; change that line")
        return had, has


def warn_of_moving_shards(manager: OpenSearchBaseManager) -> None:
    if moving := manager.request("GET", "/_cluster/health").data["relocating_shards"]:
        log.warning("%s shards are relocating: if a node is about to leave, or the domain is being changed, a copy or "
                    "a deletion may be lost with its node", moving)  # fmt: skip


def check_disk(manager: OpenSearchBaseManager, index: str) -> None:
    """Raise Refused if the data nodes have less free space than a refresh of this live index needs."""
    response = manager.request("GET", "/_nodes/stats/fs", accept=[403])
    if response.status == 403:
        log.info("free disk space is not checked: %s", error_of(response.body)[1])
        return
    free = {node["name"]: node["fs"]["total"]["available_in_bytes"]
            for node in response.data["nodes"].values() if "data" in node["roles"]}  # fmt: skip
    settings, stats = manager.settings, manager.request("GET", f"/{index}/_stats/store").data
    way = "alternate" if settings.copy_method == "clone" else settings.refresh_strategy  # a clone shares its files
    needed = DISK_NEEDED[way] * stats["_all"]["total"]["store"]["size_in_bytes"]
    shown = ", ".join(f"{name} {size / GB:,.1f}" for name, size in free.items())
    if sum(free.values()) < needed:
        raise Refused(
            f"a refresh of {index} needs {needed / GB:,.1f} GB of disk, and the data nodes have less free ({shown}); "
            "nothing was changed. Give them more, or turn this check off: DISK_CHECK=false"
        )
    if any(size < needed / len(free) for size in free.values()):
        log.warning("a refresh of %s needs %.1f GB of disk, and one of the data nodes may run short: %s", index,
                    needed / GB, shown)  # fmt: skip


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
        indices = self._expected_indices()
        if set(indices) == {self.target}:
            result = self._result(began, self._get_index_count(self.target), {"fields_checked": 0}, changed=False)
            log.info("done: alias %s is on %s alone already, nothing to do", self.alias, self.target)
            return result
        for index in sorted([self.source, self.target]):
            self.lock(index)
        if not self.settings.undo:
            require_permissions(self, self.probes)
            self.await_tasks(self.target)
        Marker(self, self.target).refuse("load it again first")
        audit = Audit(self, indices)
        audit.run()
        if self.dry_run:
            log.info("dry run: alias %s would be moved: %s -> %s", self.alias, self.source, self.target)
            return self._result(began, audit.documents, audit.fields, changed=False)
        audit.warm(self._await_copies())
        for index, uuid in uuids.items():  # the wait may have been long
            self.verify_same_index(index, uuid)
        Marker(self, self.target).refuse("load it again first")
        self._move(self._expected_indices())
        log.info("alias %s: %s -> %s, acknowledged", self.alias, self.source, self.target)
        self._say_how_to_undo()
        self._verify_indices(self._indices_behind(), {self.target})
        result = self._result(began, audit.documents, audit.fields, changed=True)
        try:
            audit.verify_through_alias()
        except OperationFailed as error:
            error.result = result
            raise
        log.info("done: alias %s: %s -> %s", self.alias, self.source, self.target)
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
            self._check_pair(indices)
        return live

    def _check_pair(self, indices: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise Refused for what would keep readers from being moved, whatever the target will hold by then."""
        # a crashed run may have deleted the target: the step that fills it restores it, or reports that it is missing
        found, target = {self.source: self._verify_index_exists(self.source)}, self.read_index(self.target)
        if target:
            found[self.target] = target
        for index, state in found.items():
            refuse_unusable(index, state, TO_MOVE_ALIAS)
        await_primaries(self, self.source, self.settings.retry_seconds)
        if others := sorted({*found[self.source]["aliases"]} - {self.alias}):
            log.warning("alias %s points at %s too: a refresh that is to empty this index is refused; give that alias "
                        "an index of its own", ", ".join(others), self.source)  # fmt: skip
        warn_of_moving_shards(self)
        if self.settings.disk_check:
            check_disk(self, self.source)
        if target:
            if self.settings.refresh_strategy == "copy-back" and self.source != self.settings.source:
                self.settings.accept_settings = ["*"]  # readers go back to the index that they are always on
            Audit(self, indices).check_beforehand()

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

    def _await_copies(self) -> int:
        """Wait until each shard of the target has the copies it needs, and return how many it has at most.

        Raises Refused after WAIT_SECONDS. An undo needs one copy, and reports the missing ones.
        """
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
            shards, why = f"{short} of {len(target['shards'])} shards", "see GET _cluster/allocation/explain"
            problem = f"index {self.target}: {shards} have fewer than {needed} active copies"
            if self.settings.undo and not short_shards(target, 1):
                log.warning("%s; %s", problem, why)
                break
            if time.monotonic() - began > self.settings.wait_seconds:
                raise Refused(f"{problem} after {self.settings.wait_seconds:g} s; {why}, and run again")
            progress = progress or Progress(f"waiting for the copies of {self.target}", len(target["shards"]), "shards")
            progress.update(len(target["shards"]) - short)
            time.sleep(1)
        if progress:
            progress.close()
        if not self.settings.undo:
            await_replicas(self, self.target)
        return max(int(shard["active_shards"]) for shard in target["shards"].values())

    # --- the switch ---

    def _move(self, indices: Mapping[str, Mapping[str, Any]]) -> None:
        """Send the one atomic call. After no response the alias is read before a second one."""
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
        log.info("undo: %s", self.undo_command())
        log.info("after an undo, the next refresh moves readers on again unless this keeps it from that: "
                 "echo 'why, since when' > %s", hold)  # fmt: skip

    def undo_command(self) -> str:
        return self.command(self.target, self.source, undo=True)

    def command(self, source: str, target: str, *, undo: bool = False, **other: Any) -> str:
        """Return a command with the options of this run, or other values of them; an undo needs only its wait.

        With --show it is the runner that checks, and that takes the other values as variables.
        """
        if self.settings.show and other:
            named = [setting for setting in SETTINGS["switch_alias"] if setting.name in other]
            values = [f"{setting.variable}={shell_word(option_text(other[setting.name]))}" for setting in named]
            return " ".join([*values, "./run_refresh.sh"])
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

    def _result(
        self, began: float, documents: int, fields: Mapping[str, Any], *, changed: bool
    ) -> dict[str, Any]:
        return {
            "alias": self.alias, "source": self.source, "target": self.target, "changed": changed,
            "documents": documents, **fields, "seconds": seconds_since(began),
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
