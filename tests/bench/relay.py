"""A relay in front of a server, in a process of its own, which behaves as a distant or a busy cluster does.

Usage: python tests/bench/relay.py PORT ENDPOINT KIND VALUE [PATH]

    late SECONDS    each answer comes so much later
    admits N        so many requests at a time go on, the others wait
    refuses N       more than N at a time are refused with 429
    stalls SECONDS  once, two seconds after the first request, nothing goes on for so long

Other paths than PATH (/_bulk) pass. GET /_relay tells what was seen: [seconds since the first request, status] of
each, and how many were in flight at most.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import requests
import sandbox
import urllib3
from fault_proxy import Exchange, FaultProxy, answer
from requests.adapters import HTTPAdapter

STALLS_AFTER_S = 2
BUSY = answer(429, {"error": {"type": "rejected_execution_exception", "reason": "too many at a time"}, "status": 429})


class Relay:
    def __init__(self, kind: str, value: float, path: str) -> None:
        self.kind, self.value, self.path = kind, value, path
        self.lock, self.began = threading.Lock(), 0.0
        self.admitted = threading.Semaphore(int(value) if kind == "admits" else 1000)
        self.seen: list[tuple[float, int]] = []
        self.in_flight = self.most = 0

    def watch(self, exchange: Exchange) -> bool:
        if exchange.handler.path == "/_relay":
            exchange.reply(200, json.dumps({"seen": self.seen, "most": self.most}))
            return True
        if self.path not in exchange.handler.path:
            return False
        with self.lock:
            self.began = self.began or time.monotonic()
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            refused = self.kind == "refuses" and self.in_flight > self.value
            self.seen.append((round(time.monotonic() - self.began, 3), 429 if refused else 200))
        try:
            self.answer(exchange, refused)
        finally:
            with self.lock:
                self.in_flight -= 1
        return True

    def answer(self, exchange: Exchange, refused: bool) -> None:
        if refused:
            return BUSY(exchange)
        if self.kind == "stalls":
            since = time.monotonic() - self.began - STALLS_AFTER_S
            if 0 < since < self.value:
                time.sleep(self.value - since)
        with self.admitted:
            response = exchange.forward()
        if self.kind == "late":
            time.sleep(self.value)
        kept = ("content-type", "etag", "content-range", "last-modified", "retry-after")
        headers = {name: text for name, text in response.headers.items() if name.lower() in kept}
        exchange.reply(response.status_code, response.content, headers)


@contextlib.contextmanager
def relay(endpoint: str, kind: str, value: float, path: str = "/_bulk") -> Iterator[str]:
    """Start a relay, yield its endpoint, and end it."""
    port = sandbox.free_port()
    child = subprocess.Popen([sys.executable, __file__, str(port), endpoint, kind, str(value), path])
    sandbox.wait_for_port(port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        child.kill()
        child.wait()


def seen_by(endpoint: str) -> Any:
    with requests.Session() as session:
        session.trust_env = False
        return session.get(f"{endpoint}/_relay", timeout=30).json()


def main() -> None:
    port, endpoint, kind, value, path = sys.argv[1:]
    urllib3.disable_warnings()
    proxy = FaultProxy(endpoint, int(port))
    proxy.requests = deque(maxlen=0)  # type: ignore[assignment]  # their bodies would be gigabytes
    for scheme in ("http://", "https://"):
        proxy._session.mount(scheme, HTTPAdapter(pool_maxsize=100))
    proxy.watch = Relay(kind, float(value), path).watch
    with proxy:
        threading.Event().wait()


if __name__ == "__main__":
    main()
