"""What distance and a busy cluster cost a load, and what a load costs readers: `benchmark.py --distance`.

Every comparison goes through a relay of its own (relay.py), near ones too, in one run.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import requests
import sandbox
from benchmark import (
    INDEX, TOP, Bench, DataSet, Figures, bulkupdate_command, flights, percentiles, spread, timing,
)  # fmt: skip
from relay import relay, seen_by

USER = {"OPENSEARCH_USERNAME": sandbox.USER, "OPENSEARCH_PASSWORD": sandbox.PASSWORD}
S3_LATE_S = 0.05
BULK_LATE_S = [0, 0.1, 0.3, 1]
WORKERS = [3, 6, 12, 24, 48]
OBJECTS = [(12, 0), (1000, 0), (10_000, 0), (1000, 64 * 1024), (300, 200 * 1024)]  # number, bytes of each; 0: any
YEARS = 9  # of flights for the cluster that admits four
WARM_UP = 6  # loads first: a server just started becomes faster for a minute, whatever the number of requests


def distance(bench: Bench, rounds: int, picture: Path | None) -> None:
    for _ in range(WARM_UP):
        load(bench, flights(), bench.endpoint)
    s3_is_far(bench, rounds)
    bulk_is_late(bench, rounds)
    busy_clusters(bench)
    readers(bench, picture)


# --- S3 ---------------------------------------------------------------------------------------------------------------


def s3_is_far(bench: Bench, rounds: int) -> None:
    late = f"S3 {S3_LATE_S * 1000:g} ms late, s"
    print(f"\n| objects | bytes of each | near, s | {late} | peak MB | within 1.25 x + 1 s |")
    print("|---|---|---|---|---|---|", flush=True)
    for count, size in OBJECTS:
        data = split_flights(bench, count, size)
        near, far = Figures(), Figures()
        for _ in range(rounds):
            for figures, late_s in ((near, 0), (far, S3_LATE_S)):
                with relay(os.environ["AWS_ENDPOINT_URL"], "late", late_s, "/") as s3:
                    bench.process(data, bulkupdate_command(data.prefix), figures, data.name, AWS_ENDPOINT_URL=s3)
        limit = [1.25 * seconds + 1 for seconds in near.seconds]
        held = sum(mine <= most for mine, most in zip(far.seconds, limit))
        print(f"| {count:,} | {size or 31_000_000 // count:,} | {spread(near.seconds)} | {spread(far.seconds)} | "
              f"{max(near.peak_mb + far.peak_mb):.0f} | {held} of {rounds} |", flush=True)  # fmt: skip
        remove(bench, data.prefix)


def split_flights(bench: Bench, count: int, size: int) -> DataSet:
    """Put the flights under a prefix of their own, in so many objects; with `size`, repeated until each has it."""
    texts = [path.read_text().splitlines() for path in sandbox.month_files()]
    header, lines = texts[0][0], [line for text in texts for line in text[1:]]
    prefix, each, total = f"distance-{count}-{size}/", -(-len(lines) // count), 0
    if size:
        each = size // (sum(map(len, lines[:1000])) // 1000 + 1)
    with ThreadPoolExecutor(8) as pool:
        for at in range(count):
            part = [lines[(at * each + n) % len(lines)] for n in range(each)]
            if not size:
                part = lines[at * each : (at + 1) * each]
            total += len(part)
            body = "\n".join([header, *part, ""])
            pool.submit(bench.s3.put_object, Bucket=sandbox.BUCKET, Key=f"{prefix}{at:05d}.csv", Body=body)
    return DataSet(f"{count} objects", prefix, total, sandbox.FLIGHTS_MAPPING)


def remove(bench: Bench, prefix: str) -> None:
    pages = bench.s3.get_paginator("list_objects_v2").paginate(Bucket=sandbox.BUCKET, Prefix=prefix)
    for page in pages:
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", [])]
        bench.s3.delete_objects(Bucket=sandbox.BUCKET, Delete={"Objects": keys})


# --- the cluster ------------------------------------------------------------------------------------------------------


def load(bench: Bench, data: DataSet, endpoint: str, *more: str) -> tuple[float, dict[str, Any]]:
    """Load into a fresh index; return the seconds and the loader's result."""
    bench.fresh_index(data)
    began = time.monotonic()
    done = subprocess.run(
        bulkupdate_command(data.prefix, *more), env={**os.environ, **USER, "OPENSEARCH_ENDPOINT": endpoint},
        capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.monotonic() - began
    if done.returncode:
        bench.wrong = True
        print(done.stderr[-1000:], file=sys.stderr)
        return seconds, {"requests_under_way": 0}
    bench.check(" ".join(more), data)
    return seconds, json.loads(done.stdout)


def bulk_is_late(bench: Bench, rounds: int) -> None:
    data = flights()
    print("\n| batch size | late, s | by itself, s | requests | best fixed number | its s | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for size in ("5000", "1000"):
        for late_s in BULK_LATE_S:
            seconds: dict[int, list[float]] = {number: [] for number in (0, *WORKERS)}
            used = []
            with relay(bench.endpoint, "late", late_s) as endpoint:
                load(bench, data, endpoint, "--batch-size", size)  # the first through a relay is slower
                for at in range(rounds):
                    for number in [*seconds][at:] + [*seconds][:at]:  # none has always the same place
                        fixed = ["--workers", str(number)] if number else []
                        took, result = load(bench, data, endpoint, "--batch-size", size, *fixed)
                        seconds[number].append(took)
                        used += [result["requests_under_way"]] * (not number)
            best = min(WORKERS, key=lambda number: statistics.median(seconds[number]))
            ratios = [mine / other for mine, other in zip(seconds[0], seconds[best])]
            print(f"| {size} | {late_s:g} | {spread(seconds[0])} | {max(used)} | {best} | {spread(seconds[best])} | "
                  f"{spread(ratios)} |", flush=True)  # fmt: skip


def busy_clusters(bench: Bench) -> None:
    data, many = flights(), years(bench)
    with relay(bench.endpoint, "admits", 4) as endpoint:
        seconds, result = load(bench, many, endpoint)
        print(f"\nadmits four, lets others wait: {many.rows:,} rows in {seconds:.0f} s, "
              f"{result['requests_under_way']} in flight at most", flush=True)  # fmt: skip
    remove(bench, many.prefix)
    with relay(bench.endpoint, "refuses", 4) as endpoint:
        seconds, result = load(bench, data, endpoint, "--batch-size", "1000")
        later = [status for moment, status in seen_by(endpoint)["seen"] if moment > 2]
        print(f"refuses beyond four: {seconds:.1f} s, {later.count(429)} of {len(later)} requests refused after two "
              "seconds", flush=True)  # fmt: skip
    with relay(bench.endpoint, "stalls", 5) as endpoint:
        seconds, result = load(bench, data, endpoint, "--batch-size", "1000")
        moments = [moment for moment, _ in seen_by(endpoint)["seen"]]
        before = sum(1 <= moment < 2 for moment in moments)
        after = [sum(second <= moment < second + 1 for moment in moments) for second in range(7, 17)]
        print(f"stalls for five seconds: {seconds:.1f} s, {before} requests in the second before, then {after}")


def years(bench: Bench) -> DataSet:
    prefix = "years/"
    for year in range(YEARS):
        for entry in bench.s3.list_objects_v2(Bucket=sandbox.BUCKET, Prefix=sandbox.PREFIX)["Contents"]:
            source = {"Bucket": sandbox.BUCKET, "Key": entry["Key"]}
            key = f"{prefix}{year}-{entry['Key'].rsplit('/', 1)[1]}"
            bench.s3.copy_object(Bucket=sandbox.BUCKET, Key=key, CopySource=source)
    return DataSet("years", prefix, YEARS * flights().rows, sandbox.FLIGHTS_MAPPING)


# --- readers ----------------------------------------------------------------------------------------------------------


def readers(bench: Bench, picture: Path | None) -> None:
    """Time searches of the index that readers are on while the other one is copied into, emptied and loaded."""
    bench.fresh_index(flights())
    found: dict[str, tuple[float, float]] = {"idle": (0, 0)}
    with searching(bench) as times:
        time.sleep(10)
    found["idle"] = percentiles(times)
    scripts = {
        "copy": ["reindex.py", "--source", sandbox.PRIMARY, "--target", INDEX],
        "deletion": ["index_cleanup.py", "--index", INDEX, "--no-force-merge"],
        "load": bulkupdate_command(sandbox.PREFIX)[1:],
    }
    print("\n| readers meanwhile | seconds | documents/s | p50, ms | p99, ms |\n|---|---|---|---|---|")
    print(f"| idle | | | {found['idle'][0]:.0f} | {found['idle'][1]:.0f} |", flush=True)
    pace: dict[str, float] = {}
    for held in (False, True):
        for name, words in scripts.items():
            variables = {"REQUESTS_PER_SECOND": str(round(pace[name] / 3))} if held else {}
            with searching(bench) as times:
                began = time.monotonic()
                command = [sys.executable, str(TOP / Path(words[0]).name), *words[1:]]
                done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
                seconds = time.monotonic() - began
            result = json.loads(done.stdout)
            moved = result["deleted"] if name == "deletion" else result["documents"]
            pace[name] = moved / seconds
            label = f"{name}, REQUESTS_PER_SECOND={variables['REQUESTS_PER_SECOND']}" if held else name
            found[label] = percentiles(times)
            print(f"| {label} | {seconds:.1f} | {pace[name]:,.0f} | {found[label][0]:.0f} | {found[label][1]:.0f} |",
                  flush=True)  # fmt: skip
    if picture:
        draw_readers(found, picture)


def searching(bench: Bench) -> AbstractContextManager[list[float]]:
    """Search the alias again and again while the body runs."""
    carriers = itertools.cycle(["UA", "B6", "EV", "DL"])

    def search(session: requests.Session) -> requests.Response:
        body = {"query": {"term": {"carrier": next(carriers)}}, "size": 10, "sort": ["dep_delay"]}
        return session.post(f"{bench.endpoint}/{sandbox.ALIAS}/_search", json=body)

    return timing(bench, search)


def draw_readers(found: dict[str, tuple[float, float]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "readers"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 3))
    names = list(found)
    for place, (label, color) in enumerate((("half of the searches", "#999999"), ("99 of 100", "#1f77b4"))):
        values = [found[name][place] for name in names]
        bars = axis.barh([at + 0.4 * place for at in range(len(names))], values, 0.38, label=label, color=color)
        axis.bar_label(bars, fmt="%.0f", padding=2)
    axis.set_yticks([at + 0.2 for at in range(len(names))], names)
    axis.invert_yaxis()
    axis.set(xlabel="milliseconds of a search", xmargin=0.1)
    axis.legend(loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
