"""A scripted HTTP proxy in front of a real server: everything passes, but for the faults that a test has asked for.

    proxy.on("POST", r"/_bulk", lost_answer, times=1)      # the first bulk request is carried out, its answer is lost
    proxy.on("POST", r"/_bulk", answer(429, retry_after=2), skip=3, times=2)
    proxy.on("POST", r"/_bulk", edited(first_item_429))    # the real answer, changed on its way back
    proxy.refuse_connections(seconds=2)                    # the port is closed for a while

A fault is a function of the exchange; it answers through `exchange.forward`, `exchange.reply` and `exchange.drop`.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

TASK = "/_tasks/[^/?]+$"  # the path of a request about one task
# and what the proxy itself undoes: an answer that came packed is handed on unpacked
HOP_BY_HOP = {
    "connection", "keep-alive", "transfer-encoding", "content-length", "content-encoding", "host", "accept-encoding",
}  # fmt: skip


@dataclass
class Exchange:
    """One request on its way; `nth` counts the requests that matched the rule, from 1."""

    handler: BaseHTTPRequestHandler
    target: str
    session: requests.Session
    nth: int = 0

    @cached_property
    def body(self) -> bytes:
        return self.handler.rfile.read(self.length)

    @property
    def length(self) -> int:
        return int(self.handler.headers.get("Content-Length") or 0)

    def forward(self, body: bytes | None = None) -> requests.Response:
        """Send the request on to the real server and return its answer."""
        headers = {name: value for name, value in self.handler.headers.items() if name.lower() not in HOP_BY_HOP}
        return self.session.request(
            self.handler.command, self.target + self.handler.path, data=self.body if body is None else body,
            headers=headers, verify=False, allow_redirects=False, timeout=300,
        )  # fmt: skip

    def reply(
        self, status: int, body: bytes | str = b"", headers: dict[str, str] | None = None, upto: int | None = None
    ) -> None:
        """Answer; with `upto` only that many bytes of the body, of which the headers promise all."""
        body = body.encode() if isinstance(body, str) else body
        self.handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.handler.send_header(name, value)
        self.handler.send_header("Content-Length", str(len(body)))
        self.handler.end_headers()
        if self.handler.command != "HEAD":
            self.handler.wfile.write(body[:upto])

    def pass_on(self, upto: int | None = None) -> None:
        response = self.forward()
        headers = {name: value for name, value in response.headers.items() if name.lower() not in HOP_BY_HOP}
        self.reply(response.status_code, response.content, headers, upto)

    def drop(self) -> None:
        """Close the connection without another byte."""
        self.handler.close_connection = True
        with contextlib.suppress(OSError):
            self.handler.connection.shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """Break the connection off with a TCP reset."""
        self.handler.close_connection = True
        with contextlib.suppress(OSError):
            self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.handler.connection.close()


Fault = Callable[[Exchange], None]


def answer(status: int, body: Any = "", **headers: str) -> Fault:
    """Answer instead of the server; header names are written with underscores: `retry_after="2"`."""
    text = body if isinstance(body, str) else json.dumps(body)
    named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
    return lambda exchange: exchange.reply(status, text, named)


def lost_answer(exchange: Exchange) -> None:
    """Let the server carry the request out, then close without an answer."""
    exchange.forward()
    exchange.drop()


def refused(exchange: Exchange) -> None:
    """Close before the server has seen the request."""
    exchange.drop()


def reset_in_request(exchange: Exchange) -> None:
    """Reset the connection when half of the request's body has come; for rules with `early`."""
    exchange.handler.rfile.read(exchange.length // 2)
    exchange.reset()


def reset_before_answer(exchange: Exchange) -> None:
    """Let the server carry the request out, then reset the connection."""
    exchange.forward()
    exchange.reset()


def reset_in_answer(upto: int = 20) -> Fault:
    """Let the server carry the request out, then reset the connection after some bytes of its answer."""

    def fault(exchange: Exchange) -> None:
        exchange.pass_on(upto)
        exchange.reset()

    return fault


def edited(change: Callable[[dict[str, Any]], Any]) -> Fault:
    """Pass the real answer on after `change` has worked on its JSON, which stays as compact as the server writes it."""

    def fault(exchange: Exchange) -> None:
        response = exchange.forward()
        parsed = response.json()
        changed = change(parsed)
        text = json.dumps(parsed if changed is None else changed, separators=(",", ":"))
        exchange.reply(response.status_code, text)

    return fault


def edited_items(change: Callable[[list[Any]], list[Any]]) -> Fault:
    """Pass the real answer to a bulk request on with other items."""
    return edited(lambda reply: {**reply, "items": change(reply["items"])})


def gateway(title: str, *, carried_out: bool = False) -> Fault:
    """Answer as a load balancer does: with a page of HTML, whether or not the cluster has had the request."""
    page = f"<html>\r\n<head><title>{title}</title></head>\r\n<body><h1>{title}</h1></body>\r\n</html>\r\n"

    def fault(exchange: Exchange) -> None:
        if carried_out:
            exchange.forward()
        exchange.reply(int(title[:3]), page, {"Content-Type": "text/html"})

    return fault


def delayed(seconds: float) -> Fault:
    def fault(exchange: Exchange) -> None:
        time.sleep(seconds)
        exchange.pass_on()

    return fault


def before(action: Callable[[], Any]) -> Fault:
    """Run `action`, then pass the request on."""

    def fault(exchange: Exchange) -> None:
        action()
        exchange.pass_on()

    return fault


def after(action: Callable[[], Any]) -> Fault:
    """Pass the request on, run `action` once the server has answered, then hand the answer back."""

    def fault(exchange: Exchange) -> None:
        response = exchange.forward()
        action()
        exchange.reply(response.status_code, response.content)

    return fault


def at_the_end(action: Callable[[], Any]) -> Fault:
    """Run `action` once, when the task that is asked about has ended, however often it is asked about (times=None)."""
    actions = [action]

    def fault(exchange: Exchange) -> None:
        response = exchange.forward()
        if actions and response.json().get("completed"):
            actions.pop()()
        exchange.reply(response.status_code, response.content)

    return fault


@dataclass
class Rule:
    method: str
    path: re.Pattern[str]
    fault: Fault
    skip: int
    times: int | None
    early: bool = False
    probes: bool = False
    seen: int = field(default=0)

    def takes(self, method: str, path: str) -> bool:
        if not re.fullmatch(self.method, method) or not self.path.search(path):
            return False
        self.seen += 1
        return self.seen > self.skip and (self.times is None or self.seen <= self.skip + self.times)


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when a client has gone: killed clients are what this is for."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FaultProxy:
    """Serves on a port of its own until the `with` ends; `requests` lists (method, path, body) of all it has seen.

    `watch` is asked about each request that no rule takes; when it returns True it has dealt with it.
    """

    def __init__(self, target: str, port: int = 0) -> None:
        self.target, self.rules = target, list[Rule]()
        self.requests: list[tuple[str, str, bytes]] = []
        self._lock, self._session = threading.Lock(), requests.Session()
        self._session.trust_env = False
        self.watch: Callable[[Exchange], bool] = lambda exchange: False
        self._listen(port)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def on(
        self, method: str, path: str, fault: Fault, *, skip: int = 0, times: int | None = 1, early: bool = False,
        probes: bool = False,
    ) -> Rule:  # fmt: skip
        """Apply a fault to `times` requests (None: all) whose method and path match, after the first `skip`.

        With `early` the fault comes before the request's body has been read. Requests that only ask for permissions
        pass, unless the rule is for `probes`; they are not listed.
        """
        rule = Rule(method, re.compile(path), fault, skip, times, early, probes)
        with self._lock:
            self.rules.append(rule)
        return rule

    def seen(self, method: str, path: str) -> list[bytes]:
        """Return the bodies of the requests of this method whose path matches."""
        return [body for verb, url, body in self.requests if verb == method and re.search(path, url)]

    def refuse_connections(self, seconds: float) -> None:
        """Stop listening at once, and listen again after a while; connections that are open stay open."""
        self._close()
        threading.Timer(seconds, self._reopen).start()

    def _listen(self, port: int) -> None:
        self._server = QuietServer(("127.0.0.1", port), self._handler_class())
        self._server.daemon_threads = True

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _reopen(self) -> None:
        self._listen(self._server.server_port)
        self.__enter__()

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _handler_class(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two packets

            def handle_any(self) -> None:
                exchange = Exchange(self, proxy.target, proxy._session)
                with proxy._lock:
                    probe = (self.headers.get("X-Opaque-Id") or "").endswith("/permissions")
                    rules = [rule for rule in proxy.rules if rule.probes or not probe]
                    rule = next((rule for rule in rules if rule.takes(self.command, self.path)), None)
                    exchange.nth = rule.seen if rule else 0  # here: the next request counts on
                if not probe and not (rule and rule.early):
                    proxy.requests.append((self.command, self.path, exchange.body))
                if rule:
                    rule.fault(exchange)
                elif probe or not proxy.watch(exchange):
                    exchange.pass_on()

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any

            def log_message(self, *_: object) -> None:
                pass

        return Handler
