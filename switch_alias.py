"""Move an alias from one index to another with one atomic request, after an audit of the target.

Example:    python switch_alias.py --alias my_index_alias --source my_index_primary --target my_index_secondary
Exit codes: 0 the alias is on the target alone (read back), or --show or a dry run found no problem; 1 failed;
            2 usage; 4 refused, the alias was not moved; 75 locked; 129, 130, 143 signals.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from opensearch_base_manager import (
    HERE, SETTINGS, TO_MOVE_ALIAS, ConfigurationError, Marker, OpenSearchBaseManager, OperationFailed, OutcomeUnknown,
    Probe, Progress, Refused, RequestFailed, Retry, add_settings, alias_name, await_primaries, await_replicas, boolean,
    error_of, field_definitions, in_parallel, index_name, log, reading_probes, refuse_unusable, require_permissions,
    run_cli, script_command, seconds_since, shell_command, verify_sees_everything,
)  # fmt: skip

CARRIED_OVER = ("filter", "index_routing", "search_routing", "is_write_index", "is_hidden")  # `add` would drop them
NUMBER_TYPES = set("long integer short byte double float half_float scaled_float unsigned_long".split())
TEXT_TYPES = set("text match_only_text annotated_text search_as_you_type".split())
NOT_FOR_READERS = set(  # parameters of a field that readers do not notice, or that are compared separately
    "type path properties fields meta eager_global_ordinals coerce ignore_malformed ignore_above dynamic".split()
)
PARAMETERS: dict[str, Any] = {  # the server's defaults for parameters that readers notice
    "index": True, "store": False, "boost": 1.0, "analyzer": "standard", "term_vector": "no", "fielddata": False,
    "similarity": "BM25", "position_increment_gap": 100, "index_phrases": False,
    "split_queries_on_whitespace": False, "include_in_parent": False, "include_in_root": False, "enabled": True,
    "format": "strict_date_optional_time||epoch_millis", "ignore_z_value": True,
}  # fmt: skip
# index settings that readers notice: when the value falls, when it is no longer true, when it changes at all
MUST_NOT_FALL = re.compile(r"index\.(max_(?!ngram|shingle|refresh).*|highlight\.max_.*|analyze\.max_.*|query\.max_.*)")
MUST_STAY_TRUE = re.compile(r"index\.(knn|query_string\.lenient|query\.(parse|derived_field)\..*)")
MUST_NOT_CHANGE = re.compile(r"index\.(search\.default_pipeline|query\.default_field|knn\..*)")
NOT_COMPARED = re.compile(  # set by the server or a load, about shards, or compared through `analysis_of`
    r"index\.(uuid|creation_date|provided_name|version\.|resize\.|routing\.|number_of_|auto_expand_|refresh_interval|"
    r"analysis\.|similarity\.)"
)
OWN_DEFAULT = re.compile(r"index\.(analysis\.analyzer|similarity)\.default")
COMPONENT = re.compile(r"index\.analysis\.(?!analyzer\.|normalizer\.)")
IMPLICIT_ANALYSIS: dict[str, dict[str, Any]] = {
    "index.similarity.default": {"type": ["BM25"]}, "index.analysis.analyzer.default": {"type": ["standard"]},
    "index.analysis.analyzer.default_search": {}, "index.analysis.analyzer.default_search_quoted": {},
}  # fmt: skip
EXPLICIT_DEFAULTS = {  # (key, value) pairs that state a default, in analyzers, their components, and similarities
    ("type", "custom"), ("k1", "1.2"), ("b", "0.75"), ("ignore_case", "false"), ("stopwords", "_none_"),
}  # fmt: skip
FIELDS_AT_ONCE = 8  # counts in flight; each takes a millisecond, however many documents there are
NAMED = 10  # fields, settings or queries in a message; a printed command has all fields or settings
NOTICED_SHARE = Fraction(1, 100)  # rarer fields may come and go
GB = 1e9
# free disk space needed, as a multiple of the live index, with room for deleted documents; a clone needs none
DISK_TO_COPY, DISK_TO_LOAD = 2.5, 1.5
QUERY_TIMEOUT_S = 30  # the server's limit for a reader's query; without a response, READ_TIMEOUT_S applies
TOO_SLOW = f"not within {QUERY_TIMEOUT_S} s, tried twice"
REJECTED = "400 "
AGAIN = "Until this is resolved, every nightly refresh will be refused."


class Field(NamedTuple):
    """A field that readers may use."""

    definition: Mapping[str, Any]
    nested: str  # path of the innermost nested object that contains it, or ""
    parent: str  # path of the field whose multi-field it is, or ""

    @property
    def type(self) -> str:
        return str(self.definition.get("type", "object"))

    def is_countable(self) -> bool:
        """Return whether an `exists` query finds the documents that have this field."""
        if self.type in TEXT_TYPES:  # the server responds with 500 for a text field that is only stored
            return bool(self.definition.get("index", True))
        defaults = {"index": self.type != "binary", "doc_values": self.type != "binary", "store": False}
        return any(self.definition.get(name, default) for name, default in defaults.items())

    def parameters(self, own_defaults: bool) -> dict[str, Any]:
        """Return the effective parameters: explicit ones, and the server's defaults.

        With `own_defaults`, index settings define the default analyzer or similarity, so the server's do not apply.
        """
        is_text = self.type in TEXT_TYPES
        implied = {"analyzer": "default", "similarity": "default"} if own_defaults else {}
        explicit = {name: "standard" if value == "default" and "analyzer" in name and not own_defaults else value
                    for name, value in self.definition.items()}  # fmt: skip
        found = {**PARAMETERS, **implied, "norms": is_text, "doc_values": not is_text and self.type != "binary",
                 "index_options": "positions" if is_text else "docs", **explicit}  # fmt: skip
        found.setdefault("search_analyzer", found["analyzer"])
        found.setdefault("search_quote_analyzer", found["search_analyzer"])
        return found


def fields_of(mapping: Mapping[str, Any]) -> dict[str, Field]:
    """Return the fields of a mapping by their full names; a field alias has the definition of its target."""
    fields = dict(walk_mapping(mapping))
    return {
        name: field._replace(definition=fields.get(field.definition.get("path", ""), field).definition)
        for name, field in fields.items()
    }


def walk_mapping(mapping: Mapping[str, Any], prefix: str = "", nested: str = "") -> Iterator[tuple[str, Field]]:
    """Yield each field with its full name, except those that are only kept in _source (`enabled: false`)."""
    for kind in ("properties", "fields"):
        for name, definition in mapping.get(kind, {}).items():
            if definition.get("enabled", True):
                path = prefix + name
                yield path, Field(definition, nested, prefix[:-1] if kind == "fields" else "")
                yield from walk_mapping(definition, f"{path}.", path if definition.get("type") == "nested" else nested)


def lost_parameters(old: Field, new: Field, own_defaults: bool) -> str:
    """Describe what readers of a field would lose with its new definition; all number types count as one type."""
    if old.type != new.type and not {old.type, new.type} <= NUMBER_TYPES:
        return f"{old.type} -> {new.type}"
    had, has = old.parameters(own_defaults), new.parameters(own_defaults)
    return ", ".join(
        f"{name} {had.get(name)} -> {has.get(name)}"
        for name in sorted({*old.definition, *new.definition} - NOT_FOR_READERS)
        if had.get(name) != has.get(name) and has.get(name) is not True
        and not (name == "scaling_factor" and old.type != new.type)
    )  # fmt: skip


def lost_definitions(old: Mapping[str, Any], new: Mapping[str, Any], *, own_defaults: bool) -> dict[str, str]:
    """Return what readers would lose with the new mapping, by field (or `_source`).

    Missing fields, except derived ones, are not reported here: the comparison of shares finds them.
    """
    known = fields_of(new)
    lost = {name: lost_parameters(field, known[name], own_defaults) for name, field in fields_of(old).items()
            if name in known and field.is_countable()}  # fmt: skip
    for name, script in old.get("derived", {}).items():
        lost[name] = "" if new.get("derived", {}).get(name) == script else "derived field missing or different"
    paths, new_paths = (alias_paths(mapping) for mapping in (old, new))
    for name in paths.keys() & new_paths.keys():
        lost[name] = lost.get(name) or ("" if paths[name] == new_paths[name] else f"{paths[name]} -> {new_paths[name]}")
    had, has = ({"enabled": True, **mapping.get("_source", {})} for mapping in (old, new))
    lost["_source"] = "" if has in (had, {"enabled": True}) else f"{had} -> {has}"
    return {name: text for name, text in lost.items() if text}


def alias_paths(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Return the field that each field alias stands for."""
    return {name: field["path"] for name, field in field_definitions(mapping) if field.get("type") == "alias"}


def analysis_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return each analyzer, normalizer and similarity by the prefix of its settings, with the components it uses."""
    parts: dict[str, dict[str, Any]] = {**IMPLICIT_ANALYSIS}
    for key, value in settings.items():
        if match := re.fullmatch(r"(index\.(?:analysis\.\w+|similarity)\.[^.]+)\.(.+)", key):
            parts[match[1]] = {**parts.get(match[1], {}), match[2]: listed_value(value)}

    def expanded(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
        words = {word.strip() for words in parts[name].values() for word in words}
        used = [part for part in parts if COMPONENT.match(part) and part.split(".")[-1] in words and part not in above]
        own = {key: words for key, words in parts[name].items() if words and (key, *words) not in EXPLICIT_DEFAULTS}
        return {**own, **{part: expanded(part, (*above, part)) for part in used}}

    return {name: expanded(name) for name in parts if not COMPONENT.match(name)}


def listed_value(value: Any) -> list[str]:
    """Return the value of a setting as a list: "x,y" and ["x", "y"] are equivalent."""
    return [str(item) for item in value] if isinstance(value, list) else str(value).split(",")


def compare_settings(live: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """Return the differences that readers would notice (a text, by setting), and the names of other differences.

    Both arguments are responses with `include_defaults`; settings that are explicit in neither are not compared.
    """
    old, new = ({**found["defaults"], **found["settings"]} for found in (live, target))
    lost: dict[str, str] = {}
    others = []
    for name in sorted({*live["settings"], *target["settings"]}):
        had, has = old.get(name), new.get(name)
        if listed_value(had) == listed_value(has) or NOT_COMPARED.match(name):
            continue
        less = MUST_NOT_FALL.fullmatch(name) and int(has or 0) < int(had or 0)
        if less or (MUST_STAY_TRUE.fullmatch(name) and had == "true") or MUST_NOT_CHANGE.fullmatch(name):
            lost[name] = f"{had} -> {has}"
        else:
            others.append(name)
    new_analysis = analysis_of(target["settings"])
    for name, analysis in analysis_of(live["settings"]).items():
        if analysis != new_analysis.get(name):
            lost[name] = "different" if name in new_analysis else "missing"
    return lost, others


def refuse_unsupported(index: str, settings: Mapping[str, Any], routing: Mapping[str, str]) -> None:
    """Raise Refused for search replicas, and for a search routing that would hide documents from readers."""
    if int(settings.get("index.number_of_search_replicas", 0)):
        raise Refused(f"index {index} has search replicas, which are not supported; set "
                      f"index.number_of_search_replicas to 0. {AGAIN}")  # fmt: skip
    shards = int(settings["index.number_of_shards"])
    if routing and shards > 1:
        raise Refused(
            f"the alias has the search routing {routing['routing']}, and index {index} has {shards} primary "
            "shards: documents are loaded without routing, so readers would miss some of them; remove the routing "
            f"from the alias. {AGAIN}"
        )


def has_fallen(old: Fraction, new: Fraction, threshold: Decimal) -> bool:
    """Return whether a share has fallen by more than the threshold, or, from 1 % or more, by more than half."""
    return (old - new) * 100 > Fraction(threshold) or (old >= NOTICED_SHARE and new * 2 < old)


def shares(old: Fraction, new: Fraction) -> str:
    """Show two shares, with enough digits to tell them apart."""
    for digits in range(1, 15):
        before, after = (f"{float(share * 100):.{digits}f} %" for share in (old, new))
        if before != after:
            break
    return f"{before} -> {after}"


def listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - NAMED:,} more" if len(items) > NAMED else ""
    return (", ".join(items[:NAMED]) or "none") + more


def with_values(values: Mapping[str, str]) -> str:
    return listed([f"{name} {value}" for name, value in values.items()])


def option_text(value: Any) -> str:
    """Return a value as text for a command line; in a list, names with commas, spaces or quotes are quoted."""
    if not isinstance(value, list):
        return f"{value:.15g}" if isinstance(value, float) else str("" if value is None else value)
    plain = re.compile(r'[^\s,"-][^\s,"]*')
    return ",".join(name if plain.fullmatch(name) else '"' + name.replace('"', '""') + '"' for name in value)


def queries_file(settings: argparse.Namespace) -> str:
    """Return the path of READER_QUERIES, in the working directory or else beside the scripts; "" to skip queries."""
    name: str = settings.reader_queries
    if settings.undo or not name or not settings.source:  # a broken file must not hide which index is live
        return ""
    return str(Path(name).absolute() if Path(name).exists() else HERE / name)


def read_queries(file: str) -> list[tuple[str, dict[str, Any]]]:
    """Return one search body per line, with its position. No message may quote a query: it may contain secrets."""
    try:
        lines = Path(file).read_text("utf-8-sig").split("\n") if file else []
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {file} (READER_QUERIES, --queries): {type(error).__name__}; give a "
                                 "readable UTF-8 file") from None  # fmt: skip
    queries = []
    for place, line in ((f"{file}, line {at}", line) for at, line in enumerate(lines, 1) if line.strip()):
        try:
            queries.append((place, {**json.loads(line)}))
        except (ValueError, TypeError, RecursionError):
            raise ConfigurationError(f"{place}: not a JSON object; give one search body per line") from None
    return queries


def active_copies(health: Mapping[str, Any]) -> list[int]:
    return [int(shard["active_shards"]) for shard in health["shards"].values()]


def needed_copies(target: Mapping[str, Any], live: Mapping[str, Any], data_nodes: int) -> int:
    """Return how many active copies each shard of the target needs: no fewer than readers have now, where possible."""
    return max(1, min(1 + int(target["number_of_replicas"]), data_nodes, *active_copies(live)))


class ReadersView:
    """An index as readers of the alias see it: through the alias's filter and search routing."""

    def __init__(self, manager: OpenSearchBaseManager, index: str, alias: Mapping[str, Any]) -> None:
        self.manager, self.index, self.filter = manager, index, alias.get("filter")
        self.routing = {"routing": alias["search_routing"]} if "search_routing" in alias else {}

    def count(self) -> tuple[int, int]:
        """Refresh the index; return how many documents it holds, and how many of them readers see."""
        documents = self.manager._get_index_count(self.index)
        if not (self.filter or self.routing):
            return documents, documents
        return documents, self.manager._get_index_count(self.index, self.filter, self.routing)

    def hits(self, body: Mapping[str, Any]) -> int | str:
        """Search the primaries; return the number of hits, or, as text, why the query failed."""
        try:
            for _ in range(2):  # the first attempt may time out on a cold index, which it warms
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
        """Search any copy, to warm its caches before readers arrive; a failure is only logged."""
        try:
            self._search(body, {}, retry=False)
        except RequestFailed as error:
            log.info("%s: warming %s failed: %s", place, self.index, error)

    def _search(self, body: Mapping[str, Any], params: Mapping[str, str], *, retry: bool = True) -> Any:
        """Search with the alias's filter (which restricts hits, not aggregations) and routing."""
        search = {**body, "track_total_hits": True, "timeout": f"{QUERY_TIMEOUT_S}s"}
        if self.filter:  # not inside the query: some kinds of query must be the outermost one
            filters = [body["post_filter"]] if "post_filter" in body else []
            search["post_filter"] = {"bool": {"filter": [*filters, self.filter]}}
        path, params = f"/{self.index}/_search", {**params, **self.routing}
        response = self.manager.request("POST", path, search, params=params, retry=retry)
        try:
            return response.data
        except RequestFailed:
            raise RequestFailed(f"POST {path}: the response is not JSON; check the endpoint") from None


class Audit:
    """The comparison of source and target before a switch: is the target fit for readers?

    Each reason to refuse is one check here. If a setting can override it (a row of SETTINGS), the message has a command
    with the options of this run and that setting. In step 2, the runner turns off each check of the target alone, such
    as MIN_DOCUMENTS: readers already use these data, and step 3 is to replace them. Documents are counted, and queries
    run, as readers see them; the shares of fields are those of all documents: these counts take hardly any time.
    """

    def __init__(self, switch: SwitchAlias, indices: Mapping[str, Mapping[str, Any]]) -> None:
        """`indices` has the alias's definition by index; an index without one is viewed with that of another."""
        self.switch, self.settings = switch, switch.settings
        self.source, self.target = switch.source, switch.target
        # "" (from a trailing comma) would match the parent of every field that is not a multi-field
        self.accepted = [name for name in self.settings.accept_fields or [] if name]
        of_source = indices.get(self.source, next(iter(indices.values())))
        self.views = {index: ReadersView(switch, index, indices.get(index, of_source))
                      for index in (self.source, self.target)}  # fmt: skip
        self.documents = 0  # in the target
        self.visible = 0  # documents in the target that readers of the alias will see
        self.fields: dict[str, Any] = {"fields_checked": 0}  # for the result

    @cached_property
    def found(self) -> dict[str, dict[str, Any]]:
        """Return both indices as they were at the first call: mappings, settings, and the settings' defaults."""
        params = {"flat_settings": "true", "include_defaults": "true"}
        return {index: self.switch.request("GET", f"/{index}", params=params).data[index] for index in self.views}

    def run(self) -> None:
        """Raise Refused if the target is not fit for readers; an undo only checks that it is not empty."""
        if self.settings.undo:
            self.documents, self.visible = self.views[self.target].count()
            if not self.documents:
                self._refuse_empty(self.switch._get_index_count(self.source), 0)
            return
        self._refuse_unsupported()
        self._compare_settings()
        for index in self.views:
            verify_sees_everything(self.switch, index, self.found[index])
        before, after = self._compare_counts()
        if before and self.settings.field_threshold < 100:
            self._compare_fields(before, after)
        self._compare_hits()

    def check_without_data(self) -> None:
        """Check what does not depend on the target's data (or on the source's, if readers will return to the source).

        If the target will be a clone, settings and fields are not compared: they will be those of the source.
        """
        self._refuse_unsupported()
        if copy_method(self.settings, self.source) != "clone":
            self._compare_settings()
            if self.settings.field_threshold < 100 and (redefined := self._read_fields()[2]):
                self._refuse_fields(redefined)
        for place, body in self.switch.queries:
            if isinstance(self.views[self.source].hits(body), str):  # otherwise skip the target: it may be red
                had, has = self._hits(place, body)
                log.warning("%s: hits in %s: %s, in %s: %s; a switch back to %s may be refused", place, self.source,
                            had, self.target, has, self.source)  # fmt: skip

    def warm(self, copies: int) -> None:
        """Send each query to the target `copies` times, once per shard copy; a single copy is warm already."""
        for place, body in self.switch.queries * (copies if copies > 1 else 0):
            self.views[self.target].warm(place, body)

    def verify_through_alias(self) -> None:
        """Raise OperationFailed unless the alias shows as many documents as the audit counted in the target."""
        counted = self.switch.request("GET", f"/{self.switch.alias}/_count").data
        self.switch.verify_all_shards(counted, f"_count of {self.switch.alias}")
        view = self.views[self.target]
        now = view.count()[1] if view.filter else self.visible  # the filter may contain `now`
        bounds = sorted([self.visible, now])
        if not bounds[0] <= counted["count"] <= bounds[1]:
            raise OperationFailed(
                f"readers of {self.switch.alias} see {counted['count']:,} documents, but {self.visible:,} were counted "
                f"in {self.target}; to move readers back, run {self.switch.undo_command()}"
            )

    # --- settings and counts ---

    def _refuse_unsupported(self) -> None:
        for index, view in self.views.items():
            refuse_unsupported(index, self.found[index]["settings"], view.routing)

    def _compare_settings(self) -> None:
        """Raise Refused if readers would notice differences in settings, unless these are accepted."""
        lost, others = compare_settings(self.found[self.source], self.found[self.target])
        accepted: list[str] = self.settings.accept_settings or []
        passed = {name: values for name, values in lost.items() if {name, "*"} & {*accepted}}
        lost = {name: values for name, values in lost.items() if name not in passed}
        if others:
            log.info("settings of %s that differ without affecting readers: %s", self.target, listed(others))
        if passed:
            log.warning("settings that differ and are accepted: %s", with_values(passed))
        if lost:
            command = self.switch.command(self.source, self.target, accept_settings=[*accepted, *lost])
            raise Refused(
                f"readers of {self.source} would notice these settings of {self.target}: {with_values(lost)}. {AGAIN} "
                f"Change these settings, or, if they are intended, run {command}"
            )

    def _refuse_empty(self, before: int, after: int, where: str = "") -> None:
        if before and not after:
            raise Refused(f"{self.source} holds {before:,} documents, {self.target} 0{where}: readers are never moved "
                          "to an empty index; load it first")  # fmt: skip

    def _compare_counts(self) -> tuple[int, int]:
        """Return the counts of all documents. Raises Refused if readers' count is 0, too low, or differs too much."""
        (before, source), (self.documents, self.visible) = (view.count() for view in self.views.values())
        target = self.visible
        if self.views[self.source].filter:  # it may contain `now`: accept any count between those before and after
            source = sorted([source, target, self.views[self.source].count()[1]])[1]
        as_readers = any(view.filter or view.routing for view in self.views.values())
        where = f", as seen through the filter or routing of {self.switch.alias}" if as_readers else ""
        self._refuse_empty(source, target, where)
        change = Decimal(target - source) * 100 / source if source else Decimal(0)
        counts = f"{self.source} holds {source:,} documents, {self.target} {target:,}{where}"
        threshold, minimum = self.settings.document_count_threshold, self.settings.min_documents or 0
        log.info("%s (%+.2f %%, threshold %s %%)", counts, change, threshold)
        problems, accepted = list[str](), dict[str, Any]()
        if source and abs(target - source) * 100 > threshold * source:
            problems.append(f"{change:+.2f} % exceeds the threshold of {threshold} %")
            rounded = abs(change).quantize(Decimal("0.01"), ROUND_CEILING).normalize()
            accepted["document_count_threshold"] = f"{rounded:f}"
        if target < minimum:
            problems.append(f"fewer than MIN_DOCUMENTS ({minimum:,})")
            accepted["min_documents"] = str(target)
        if problems:
            command = self.switch.command(self.source, self.target, **accepted)
            raise Refused(
                f"{counts}: {', and '.join(problems)}. {AGAIN} Load {self.target} again, or, if the data is right, run "
                f"{command}"
            )
        return before, self.documents

    # --- fields ---

    def _compare_fields(self, before: int, after: int) -> None:
        """Raise Refused if fields are defined differently, or if the share of documents that have one fell too much."""
        old, new, redefined = self._read_fields()
        if self.accepted:
            unknown = listed([name for name in self.accepted if name not in old])
            log.warning("fields not checked: %s; no such field in %s: %s", listed(self.accepted), self.source, unknown)
        skipped = {*self.accepted, *redefined}
        countable = {name: field for name, field in old.items()
                     if field.is_countable() and not {name, field.parent} & skipped}  # fmt: skip
        counts = self._count_fields(countable, new)
        change = {name: (Fraction(had, before), Fraction(has, after)) for name, (had, has) in counts.items()}
        worst_first = sorted(change, key=lambda name: change[name][1] - change[name][0])
        threshold = self.settings.field_threshold
        grown = [name for name in worst_first[::-1] if has_fallen(*change[name][::-1], threshold)]
        falling = {name for name in worst_first if has_fallen(*change[name], threshold)}
        fallen = [name for name in worst_first if name in falling and old[name].parent not in falling]
        self.fields = {"fields_checked": len(counts) + len(redefined)}
        log.info("%s fields compared; share up by more than %s percentage points, or doubled: %s; new: %s",
                 self.fields["fields_checked"], threshold, with_values({name: shares(*change[name]) for name in grown}),
                 listed([name for name in new if name not in old]))  # fmt: skip
        if redefined or fallen:
            self._refuse_fields({**redefined, **{name: shares(*change[name]) for name in fallen}})

    def _read_fields(self) -> tuple[dict[str, Field], dict[str, Field], dict[str, str]]:
        """Return the fields of both indices, and what readers would lose with the target's definitions.

        These losses do not include accepted fields, nor multi-fields of a field that is accepted or itself included.
        """
        mappings = [self.found[index]["mappings"] for index in self.views]
        old, new = (fields_of(mapping) for mapping in mappings)
        settings = (name for found in self.found.values() for name in found["settings"])
        lost = lost_definitions(*mappings, own_defaults=any(map(OWN_DEFAULT.match, settings)))
        parents = {name: old[name].parent if name in old else "" for name in lost}
        return old, new, {
            name: text for name, text in lost.items()
            if not {name, parents[name]} & {*self.accepted} and parents[name] not in lost
        }  # fmt: skip

    def _refuse_fields(self, differing: Mapping[str, str]) -> None:
        self.fields["fields_fallen"] = differing
        command = self.switch.command(self.source, self.target, accept_fields=[*self.accepted, *differing])
        remedy = f"Fix files or mapping and load {self.target} again; if the differences are intended, run {command}"
        if self.settings.show and copy_method(self.settings, self.source):  # reindex.py refuses other definitions
            remedy = f"Recreate {self.target} with the mapping of {self.source}"
        raise Refused(
            f"these fields are rarer in {self.target} than in {self.source}, or defined differently: "
            f"{with_values(differing)}. {AGAIN} {remedy}",
            {"alias": self.switch.alias, "source": self.source, "target": self.target, "changed": False, **self.fields},
        )

    def _count_fields(self, old: Mapping[str, Field], new: Mapping[str, Field]) -> dict[str, tuple[int, int]]:
        """Return how many documents of source and target have each field, where the server can count them."""

        def count(name: str) -> tuple[int, int] | None:
            if "*" in name:
                log.warning("field %s is not compared: the server takes its name for a pattern", name)
                return None
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
            raise OperationFailed(f"_count of field {name} in {index}: not all shards responded; see GET "
                                  f"_cluster/health/{index}")  # fmt: skip
        return int(answer["count"])

    # --- readers' queries ---

    def _compare_hits(self) -> None:
        """Raise Refused if a query fails in the target, or has hits in the source but none in the target.

        If both thresholds and MIN_DOCUMENTS are 0, as in step 2 of the runner, the target is assumed to be a verified
        copy: a query may then find nothing or time out.
        """
        settings = self.settings
        is_copy = settings.document_count_threshold == settings.field_threshold == settings.min_documents == 0
        problems = []
        for place, body in self.switch.queries:
            had, has = self._hits(place, body)
            log.info("%s: hits in %s: %s, in %s: %s", place, self.source, had, self.target, has)
            if (isinstance(has, str) or (had and not has)) and not (is_copy and has in (0, TOO_SLOW)):
                problems.append(f"{place}: hits in {self.source}: {had}, in {self.target}: {has}")
        if problems:
            command = self.switch.command(self.source, self.target, reader_queries="")
            raise Refused(f"{listed(problems)}. {AGAIN} Fix the data or the query; to skip all queries, run {command}")

    def _hits(self, place: str, body: Mapping[str, Any]) -> tuple[int | str, int | str]:
        """Return the hits in both indices, or why they are unknown.

        Raises ConfigurationError if both reject the query, OperationFailed if the source fails otherwise.
        """
        had, has = (view.hits(body) for view in self.views.values())
        if isinstance(had, str) and not had.startswith(REJECTED):
            raise OperationFailed(
                f"{place}: failed in {self.source}: {had}; see GET _cluster/health, or change that line"
            )
        if isinstance(had, str) and isinstance(has, str) and has.startswith(REJECTED):
            raise ConfigurationError(f"{place}: both indices answer {has}; change that line")
        return had, has


def copy_method(settings: argparse.Namespace, live: str) -> str:
    """Return how the refresh about to start will copy the live index; "" if it will not.

    Only copy-back copies, and only while readers are on primary, which the runner passes as --source. If they are on
    secondary, the refresh loads primary and moves readers back to it.
    """
    copies = settings.refresh_strategy == "copy-back" and live == settings.source
    return str(settings.copy_method) if copies else ""


def warn_about_moving_shards(manager: OpenSearchBaseManager) -> None:
    if moving := manager.request("GET", "/_cluster/health").data["relocating_shards"]:
        log.warning("relocating shards: %s; if a node is about to leave, or the domain is being changed, a task "
                    "that copies or deletes documents may be lost with its node", moving)  # fmt: skip


def check_disk(manager: OpenSearchBaseManager, index: str, factor: float) -> None:
    """Raise Refused if the data nodes have less free space than `factor` times the size of this live index."""
    response = manager.request("GET", "/_nodes/stats/fs", accept=[403])
    if response.status == 403:
        log.info("free disk space is not checked: %s", error_of(response.body)[1])
        return
    free = {node["name"]: node["fs"]["total"]["available_in_bytes"]
            for node in response.data["nodes"].values() if "data" in node["roles"]}  # fmt: skip
    stats = manager.request("GET", f"/{index}/_stats/store").data
    needed = factor * stats["_all"]["total"]["store"]["size_in_bytes"]
    shown = ", ".join(f"{name} {size / GB:,.1f}" for name, size in free.items())
    if sum(free.values()) < needed:
        raise Refused(
            f"a refresh of {index} needs {needed / GB:,.1f} GB of free disk space, more than the data nodes have (GB: "
            f"{shown}); nothing was changed. Add disk space, or turn this check off: DISK_CHECK=false"
        )
    if any(size < needed / len(free) for size in free.values()):
        log.warning("a refresh of %s needs %.1f GB of disk space, and one of the data nodes may run short; free GB: %s",
                    index, needed / GB, shown)  # fmt: skip


class SwitchAlias(OpenSearchBaseManager):
    def __init__(self, settings: argparse.Namespace) -> None:
        if not settings.show and not (settings.source and settings.target):
            raise ConfigurationError("give --source and --target, or --show")
        if not settings.show and settings.source == settings.target:
            raise ConfigurationError("source and target are the same index; give two different ones")
        settings.reader_queries = queries_file(settings)
        self.queries = read_queries(settings.reader_queries)
        super().__init__(settings)
        self.began = time.monotonic()
        self.alias, self.source, self.target = settings.alias, settings.source, settings.target
        if self.source and self.target:
            self.names = [self.source, self.target, self.alias]
            rejected = [{"add": {"index": index, "alias": self.alias, "index_routing": "x,y"}}
                        for index in (self.source, self.target)]  # two routing values are never accepted # fmt: skip
            self.probes = [
                *reading_probes(self.source, self.target), Probe("GET", f"/{self.alias}/_alias/{self.alias}"),
                Probe("POST", "/_tasks/permission-probe:1/_cancel"), Probe("POST", "/_aliases", {"actions": rejected}),
            ]  # fmt: skip

    def failure(self, what: str, status: int, body: bytes, retry_after: str | None = None) -> RequestFailed:
        """Omit the server's reason for a failed search: it may quote values of the query."""
        kind = error_of(body)[0]
        denied = status in (401, 403) and (not kind or "security" in kind)
        if what.endswith("/_search") and not denied:
            body = json.dumps({"error": {"type": kind, "reason": "(not shown, it may quote the query)"}}).encode()
        return super().failure(what, status, body, retry_after)

    def run(self) -> dict[str, Any] | str:
        return self.show() if self.settings.show else self.switch()

    def switch(self) -> dict[str, Any]:
        """Audit the target, move the alias, and read it back."""
        uuids = {index: self.index_uuid(index) for index in (self.source, self.target)}
        indices = self._expected_indices()
        if set(indices) == {self.target}:
            result = self._result(self._get_index_count(self.target), {"fields_checked": 0}, changed=False)
            log.info("done: alias %s already points only at %s, nothing to do", self.alias, self.target)
            return result
        for index in sorted(uuids):
            self.lock(index)
        if not self.settings.undo:
            require_permissions(self, self.probes)
            self.await_tasks(self.target)
        Marker(self, self.target).refuse("load it again first")
        audit = Audit(self, indices)
        audit.run()
        if self.dry_run:
            log.info("dry run: alias %s would be moved: %s -> %s", self.alias, self.source, self.target)
            return self._result(audit.documents, audit.fields, changed=False)
        audit.warm(self._await_copies())
        for index, uuid in uuids.items():  # the wait may have been long
            self.verify_same_index(index, uuid)
        Marker(self, self.target).refuse("load it again first")
        self._move(self._expected_indices())
        return self._verify(audit)

    def _verify(self, audit: Audit) -> dict[str, Any]:
        """Report the switch and its undo before anything that may still fail, then read the alias back."""
        log.info("alias %s: %s -> %s; verifying", self.alias, self.source, self.target)
        log.info("undo: %s", self.undo_command())
        log.info("after an undo, the next refresh moves readers again; to prevent that, run %s",
                 self._runner_command("--hold", "why, since when"))  # fmt: skip
        self._verify_indices(self._indices_behind(), {self.target})
        result = self._result(audit.documents, audit.fields, changed=True)
        try:
            audit.verify_through_alias()
        except OperationFailed as error:
            error.result = result
            raise
        log.info("done: alias %s: %s -> %s", self.alias, self.source, self.target)
        return result

    def show(self) -> str:
        """Return the one index that the alias points at. Raises Refused if it points at several.

        With source and target, in any order, check whether a switch from this index to the other one could work, as far
        as that does not depend on the documents of the target.
        """
        if self.source and self.target:
            require_permissions(self, self.probes)
        indices = self._indices_behind()
        if len(indices) != 1:
            state, remedy = ", ".join(sorted(indices)), "remove it from all but one"
            if set(indices) == {self.source, self.target}:
                remedy = f"to keep it on {self.source} alone, run {self.command(self.target, self.source)}"
            raise Refused(f"alias {self.alias} points at {len(indices)} indices: {state}; {remedy}")
        [live] = indices
        if self.source and self.target:
            if live not in (self.source, self.target):
                remedy = f"Correct the names, or, to move it to {self.source}, run {self.command(live, self.source)}"
                raise Refused(f"alias {self.alias} points at {live}, which is neither {self.source} nor {self.target}"
                              f"; it was not moved. {remedy}")  # fmt: skip
            self.source, self.target = sorted([self.source, self.target], key=lambda index: index != live)
            self._check_pair(indices)
        return live

    def _check_pair(self, indices: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise Refused if the switch would fail whatever data the target will hold."""
        # a crashed run may have deleted the target: the next copy or load restores it, or reports that it is missing
        there = [self.source, self.target] if self.name_exists(self.target) else [self.source]
        found = {index: self._verify_index_exists(index) for index in there}
        for index, state in found.items():
            refuse_unusable(index, state, TO_MOVE_ALIAS)
        await_primaries(self, self.source, self.settings.retry_seconds)
        if others := sorted({*found[self.source]["aliases"]} - {self.alias}):
            log.warning("alias %s points at %s too: a refresh that would empty this index is refused; give that alias "
                        "an index of its own", ", ".join(others), self.source)  # fmt: skip
        warn_about_moving_shards(self)
        method = copy_method(self.settings, self.source)
        if self.settings.disk_check:
            check_disk(self, self.source, DISK_TO_COPY if method == "reindex" else DISK_TO_LOAD)
        if self.target in found:
            if self.settings.refresh_strategy == "copy-back" and not method:
                self.settings.accept_settings = ["*"]  # readers return to the index that they normally use
            Audit(self, indices).check_without_data()

    # --- the indices behind the alias ---

    def _indices_behind(self) -> dict[str, dict[str, Any]]:
        """Return the alias's definition by index; a role limited to named indices may read no other path than this."""
        answer = self.request("GET", f"/{self.alias}/_alias/{self.alias}", accept=[404])
        if answer.status != 404:
            return {index: entry["aliases"][self.alias] for index, entry in answer.data.items()}
        if self.request("GET", f"/{self.alias}", accept=[403, 404]).status == 200:
            raise Refused(f"{self.alias} is the name of an index, not of an alias; give another name for the alias")
        action = {"add": {"index": self.source or "INDEX", "alias": self.alias}}
        call = f"POST /_aliases {json.dumps({'actions': [action]})}"
        raise OperationFailed(f"alias {self.alias} does not exist; create it on the index for readers: {call}")

    def _expected_indices(self) -> dict[str, dict[str, Any]]:
        """Return the indices behind the alias: source, target, or both. Raises Refused if there is a third one."""
        indices = self._indices_behind()
        if set(indices) - {self.source, self.target}:
            state = ", ".join(sorted(indices))
            remedy = f"run {self.command(state, self.target)}" if len(indices) == 1 else "remove it from all but one"
            raise Refused(f"alias {self.alias} points at {state}, but should point only at {self.source}; it was not "
                          f"moved. To fix this, {remedy}")  # fmt: skip
        return indices

    def _verify_indices(self, indices: Mapping[str, Any], allowed: set[str]) -> None:
        if not set(indices) <= allowed:
            raise OperationFailed(
                f"alias {self.alias} is on {', '.join(sorted(indices))} now, but should be on {self.target}: another "
                f"client moved it, or the switch had no effect. Before you run again, check it: {self._show_command()}"
            )

    # --- the shard copies ---

    def _await_copies(self) -> int:
        """Wait until each shard of the target has enough active copies; return the largest number of copies.

        Raises Refused after WAIT_SECONDS. For an undo, one copy per shard is enough; a lack of others is only logged.
        """
        began, wait_seconds = time.monotonic(), self.settings.wait_seconds
        progress = Progress(f"waiting for the copies of {self.target}", 0, "shards")
        path, params = f"/_cluster/health/{self.source},{self.target}", {"level": "shards"}
        while True:
            health = self.request("GET", path, params=params).data
            live, target = health["indices"][self.source], health["indices"][self.target]
            active, needed = active_copies(target), needed_copies(target, live, health["number_of_data_nodes"])
            short = sum(copies < needed for copies in active)
            if not short:
                break
            problem = f"index {self.target}: fewer than {needed} active copies in {short} of {len(active)} shards"
            advice = "see GET _cluster/allocation/explain"
            if self.settings.undo and min(active):
                log.warning("%s; %s", problem, advice)
                break
            if time.monotonic() - began > wait_seconds:
                raise Refused(f"{problem} after {wait_seconds:g} s; {advice}, and run again")
            progress.total = len(active)
            progress.update(len(active) - short)
            time.sleep(1)
        progress.close()
        if not self.settings.undo:
            await_replicas(self, self.target)
        return max(active)

    # --- the switch ---

    def _move(self, indices: Mapping[str, Mapping[str, Any]]) -> None:
        """Send the one atomic request. If there is no response, read the alias before the request is sent again."""
        retry = Retry(self.settings.retry_seconds)
        while set(indices) != {self.target}:
            try:
                response = self.request("POST", "/_aliases", self._actions(indices), idempotent=False)
            except RequestFailed as failure:
                moved = retry.attempt and failure.status == 404  # must_exist: an earlier attempt took effect
                if not (moved or isinstance(failure, OutcomeUnknown)):
                    raise
                if not retry.wait(f"{failure}; checking where alias {self.alias} is"):
                    raise OperationFailed(f"{failure}; check where the alias is: {self._show_command()}") from None
                indices = self._indices_behind()
                self._verify_indices(indices, {self.source, self.target})
                continue
            if response.data["acknowledged"] is not True:
                raise OperationFailed(
                    f"alias {self.alias}: not every node acknowledged the switch: some may still serve readers from "
                    f"{self.source}; run again, but first check where the alias is: {self._show_command()}"
                )
            break

    def _actions(self, indices: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        remove: dict[str, Any] = {"index": self.source, "alias": self.alias}
        if self.version() >= (2, 12):  # older versions silently ignore a removal that has no effect
            remove["must_exist"] = True
        if self.target in indices:
            return {"actions": [{"remove": remove}]}
        carried = {name: value for name, value in indices[self.source].items() if name in CARRIED_OVER}
        return {"actions": [{"remove": remove}, {"add": {"index": self.target, "alias": self.alias, **carried}}]}

    # --- printed commands ---

    def undo_command(self) -> str:
        return self.command(self.target, self.source, undo=True)

    def command(self, source: str, target: str, *, undo: bool = False, **other: Any) -> str:
        """Return the switch_alias.py command with the options of this run; `other` overrides settings by name.

        An undo repeats only --wait-seconds. With --show and `other`, return a runner command instead, with `other` as
        variables: the check was step 0 of a refresh.
        """
        settings = SETTINGS["switch_alias"]
        if self.settings.show and other:
            return self._runner_command(**{setting.variable: option_text(other[setting.name])
                                           for setting in settings if setting.name in other})  # fmt: skip
        words = ["--alias", self.alias, "--source", source, "--target", target]
        undo = undo or self.settings.undo
        for setting in settings:
            if not setting.flag or setting.parse is boolean or (undo and setting.flag != "--wait-seconds"):
                continue
            text = option_text(other.get(setting.name, getattr(self.settings, setting.name)))
            if not (setting.given() or "") == text == setting.default:  # the variable may have changed by then
                words += [setting.flag, text]
        return script_command("switch_alias.py", *words, *["--undo"] * undo)

    def _runner_command(self, *words: str, **variables: str) -> str:
        """Return a runner command that sets the alias and LOCK_DIR, since .env may differ where it is pasted."""
        variables = {"INDEX_ALIAS": self.alias, "LOCK_DIR": str(self.settings.lock_dir), **variables}
        return shell_command(str(HERE / "run_refresh.sh"), *words, **variables)

    def _show_command(self) -> str:
        return script_command("switch_alias.py", "--alias", self.alias, "--show")

    def _result(self, documents: int, fields: Mapping[str, Any], *, changed: bool) -> dict[str, Any]:
        return {
            "alias": self.alias, "source": self.source, "target": self.target, "changed": changed,
            "documents": documents, **fields, "seconds": seconds_since(self.began),
        }  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="switch_alias.py", description="Move an alias from one index to another.")
    parser.add_argument("--alias", required=True, type=alias_name, help="the alias that readers use")
    parser.add_argument("--source", type=index_name, help="the index that the alias points at now")
    parser.add_argument("--target", type=index_name, help="the index that the alias is moved to")
    return add_settings(parser)


def main(argv: Sequence[str] | None = None) -> int:
    return run_cli(build_parser, SwitchAlias, argv)


if __name__ == "__main__":
    raise SystemExit(main())
