"""Move an alias from one index to another in one atomic step, after checking that the target is fit for readers.

Example:    python switch_alias.py --alias my_index_alias --source my_index_primary --target my_index_secondary
Exit codes: 0 the target alone has the alias, read back; 1 failed; 2 usage; 4 refused, the alias is where it was;
            75 locked; 129, 130, 143 signals.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from typing import Any

from opensearch_base_manager import (
    ConfigurationError, OpenSearchBaseManager, OperationFailed, OutcomeUnknown, Progress, Refused, RequestFailed, Retry,
    add_settings, index_name, log, run_cli, seconds_since,
)  # fmt: skip

CARRIED_OVER = ("filter", "index_routing", "search_routing", "is_write_index", "is_hidden")  # `add` would drop them


def needed_copies(target: Mapping[str, Any], live: Mapping[str, Any], data_nodes: int) -> int:
    """Return how many started copies each shard of the target needs: no fewer than readers have now, where possible."""
    readers_have = min(int(shard["active_shards"]) for shard in live["shards"].values())
    return max(1, min(1 + int(target["number_of_replicas"]), data_nodes, readers_have))


def short_shards(target: Mapping[str, Any], needed: int) -> int:
    return sum(shard["active_shards"] < needed for shard in target["shards"].values())


class SwitchAlias(OpenSearchBaseManager):
    def __init__(self, settings: argparse.Namespace) -> None:
        if not settings.show and not (settings.source and settings.target):
            raise ConfigurationError("give --source and --target, or --show")
        if not settings.show and settings.source == settings.target:
            raise ConfigurationError("source and target are the same index; give two")
        super().__init__(settings)
        self.alias, self.source, self.target = settings.alias, settings.source, settings.target
        self.threshold: Decimal = settings.threshold

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        uuids = {index: self._uuid(index) for index in (self.source, self.target)}
        if set(self._fit_owners()) == {self.target}:
            result = self._result(began, changed=False)
            log.info("done: alias %s is on %s alone already, nothing to do", self.alias, self.target)
            return result
        for index in sorted([self.source, self.target]):
            self.lock(index)
        self._await_tasks(self.target)
        self._refuse_unfinished(self.target, "load it again first")
        self._compare_counts()
        if self.dry_run:
            log.info("dry run: alias %s would be moved: %s -> %s", self.alias, self.source, self.target)
            return self._result(began, changed=False)
        self._await_copies()
        for index, uuid in uuids.items():  # the wait may have been long
            self._verify_same_index(index, uuid)
        self._refuse_unfinished(self.target, "load it again first")
        self._move(self._fit_owners())
        result = self._result(began, changed=True)
        log.info("done: alias %s: %s -> %s", self.alias, self.source, self.target)
        log.info("undo: %s", self._command(self.target, self.source))
        return result

    def show(self) -> str:
        """Return the one index that the alias points at. Raises Refused when there are several."""
        owners = self._owners()
        if len(owners) != 1:
            state = ", ".join(sorted(owners))
            raise Refused(f"alias {self.alias} points at {len(owners)} indices: {state}; take it off all but one")
        return next(iter(owners))

    # --- checks ---

    def _owners(self) -> dict[str, dict[str, Any]]:
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

    def _fit_owners(self) -> dict[str, dict[str, Any]]:
        """Return the owners: source, both, or target alone. Raises Refused when the alias stands on a third index."""
        owners = self._owners()
        if set(owners) - {self.source, self.target}:
            state = ", ".join(sorted(owners))
            mend = self._command(state, self.target) if len(owners) == 1 else "take it off all but one of them"
            raise Refused(f"alias {self.alias} is on {state}, not on {self.source}; it stays there. To mend it: {mend}")
        return owners

    def _compare_counts(self) -> None:
        """Raise Refused when the target is empty or differs by more than the threshold from the source."""
        source, target = self._get_index_count(self.source), self._get_index_count(self.target)
        change = Decimal(target - source) * 100 / source if source else Decimal(0)
        counts = f"{self.source} holds {source:,} documents, {self.target} {target:,}"
        log.info("%s (%+.2f %%, threshold %s %%)", counts, change, self.threshold)
        if source and not target:
            raise Refused(f"{counts}: an empty index is never switched to; load it first")
        if abs(target - source) * 100 > self.threshold * source and source:
            accept = abs(change).quantize(Decimal("0.01"), ROUND_CEILING).normalize()
            raise Refused(
                f"{counts}: {change:+.2f} % is more than the threshold of {self.threshold} %. A refresh refused for "
                f"this is refused again the next night. If the data are right: "
                f"{self._command(self.source, self.target)} --threshold {accept:f}"
            )

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
                    f"index {self.target}: {short} of {len(target['shards'])} shards have fewer than {needed} started "
                    f"copies after {self.settings.wait_seconds:g} s; see GET _cluster/allocation/explain, and run again"
                )
            progress = progress or Progress(f"waiting for the copies of {self.target}", len(target["shards"]), "shards")
            progress.update(len(target["shards"]) - short)
            time.sleep(1)
        if progress:
            progress.close()

    # --- the switch ---

    def _move(self, owners: Mapping[str, Mapping[str, Any]]) -> None:
        """Send the one atomic call, and read back. A lost answer is never repeated before the owners are read."""
        retry, acknowledged = Retry(self.settings.retry_seconds), True
        while set(owners) != {self.target}:
            try:
                answer = self.request("POST", "/_aliases", self._actions(owners), idempotent=False)
                acknowledged = answer.data["acknowledged"] is True
                break
            except RequestFailed as lost:
                late = retry.attempt and lost.status == 404  # must_exist: the first sending was carried out meanwhile
                if not (late or isinstance(lost, OutcomeUnknown)):
                    raise
                if not retry.wait(f"{lost}; reading where alias {self.alias} is"):
                    raise OperationFailed(f"{lost}; look where the alias is: {self._show_command()}") from None
                owners = self._owners()
                self._verify_owners(owners, {self.source, self.target})
        if not acknowledged:
            raise OperationFailed(
                f"alias {self.alias}: not every node acknowledged the switch, some may still answer readers from "
                f"{self.source}; look with {self._show_command()} and run again"
            )
        self._verify_owners(self._owners(), {self.target})

    def _verify_owners(self, owners: Mapping[str, Any], allowed: set[str]) -> None:
        if not set(owners) <= allowed:
            raise OperationFailed(
                f"alias {self.alias} is on {', '.join(sorted(owners))} now: somebody else moved it, or the switch did "
                f"not take; look with {self._show_command()} and run again"
            )

    def _actions(self, owners: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        remove: dict[str, Any] = {"index": self.source, "alias": self.alias}
        if self.version() >= (2, 12):  # before, removing what is not there is silently ignored
            remove["must_exist"] = True
        if self.target in owners:
            return {"actions": [{"remove": remove}]}
        carried = {name: value for name, value in owners[self.source].items() if name in CARRIED_OVER}
        return {"actions": [{"remove": remove}, {"add": {"index": self.target, "alias": self.alias, **carried}}]}

    def _command(self, source: str, target: str) -> str:
        return f"python switch_alias.py --alias {self.alias} --source {source} --target {target}"

    def _show_command(self) -> str:
        return f"python switch_alias.py --alias {self.alias} --show"

    def _result(self, began: float, *, changed: bool) -> dict[str, Any]:
        return {
            "alias": self.alias, "source": self.source, "target": self.target, "changed": changed,
            "documents": self._get_index_count(self.target), "seconds": seconds_since(began),
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
