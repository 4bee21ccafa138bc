"""OPENSEARCH_AUTH=sigv4: each request is signed as it is sent, with credentials that may renew themselves."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

import bulkupdate
import index_cleanup
import pytest
import reindex
import sandbox
import switch_alias
from conftest import count, sources
from fault_proxy import Exchange

pytestmark = pytest.mark.quick

REGION = "eu-central-1"
BASIC = "Basic " + b64encode(f"{sandbox.USER}:{sandbox.PASSWORD}".encode()).decode()


def hmac_of(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def encoded(text: str) -> str:
    return quote(text, safe="-_.~")


def expected_signature(exchange: Exchange, secret: str, scope: str, names: str) -> str:
    """Compute the signature from AWS's description of Signature Version 4, and from the bytes that came."""
    handler = exchange.handler
    parts = urlsplit(handler.path)
    query = sorted((encoded(key), encoded(value)) for key, value in parse_qsl(parts.query, keep_blank_values=True))
    canonical = "\n".join([
        handler.command, quote(parts.path, safe="/-_.~"), "&".join(f"{key}={value}" for key, value in query),
        *[f"{name}:{' '.join(str(handler.headers[name]).split())}" for name in names.split(";")], "", names,
        hashlib.sha256(exchange.body).hexdigest(),
    ])  # fmt: skip
    day, region, service, end = scope.split("/")
    key = hmac_of(hmac_of(hmac_of(hmac_of(f"AWS4{secret}".encode(), day), region), service), end)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return hmac_of(key, f"AWS4-HMAC-SHA256\n{handler.headers['X-Amz-Date']}\n{scope}\n{digest}").hex()


class Verifier:
    """Stands where AWS does: what is not signed right gets 403, everything else goes on to the cluster."""

    def __init__(self) -> None:
        self.secrets = {"sandbox": "sandbox"}
        self.seen: list[tuple[str, str]] = []

    def __call__(self, exchange: Exchange) -> bool:
        headers = exchange.handler.headers
        kind, _, rest = (headers["Authorization"] or "").partition(" ")
        given = dict(part.strip().split("=", 1) for part in rest.split(",") if "=" in part) if kind else {}
        key, _, scope = given.get("Credential", "").partition("/")
        self.seen.append((key, scope))
        secret = self.secrets.get(key)
        if kind != "AWS4-HMAC-SHA256" or not {"host", "x-amz-date"} <= set(given["SignedHeaders"].split(";")):
            exchange.reply(403, json.dumps({"message": "Missing Authentication Token"}))
        elif secret is None:
            exchange.reply(403, json.dumps({"message": "The security token included in the request is expired"}))
        elif given["Signature"] != expected_signature(exchange, secret, scope, given["SignedHeaders"]):
            exchange.reply(403, json.dumps({"message": "The request signature we calculated does not match"}))
        else:
            del headers["Authorization"]
            headers["Authorization"] = BASIC
            exchange.pass_on()
        return True


@pytest.fixture
def verifier(proxy, monkeypatch):
    for name in ("OPENSEARCH_USERNAME", "OPENSEARCH_PASSWORD"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENSEARCH_AUTH", "sigv4")
    monkeypatch.setenv("AWS_REGION", REGION)
    proxy.watch = Verifier()
    return proxy.watch


def test_a_whole_refresh_is_signed(verifier, make_index, name, put_csv, run, admin):
    number = {"n": {"type": "long"}, "ü": {"type": "keyword"}}
    primary = make_index("primary", number, docs=3, alias=name("alias"))
    secondary = make_index("secondary", number, docs=2)
    prefix = put_csv({"a.csv": "n,ü\n7,ä b\n8,€\n9,x\n"})
    assert run(reindex, "--source", primary, "--target", secondary).code == 0
    there = ["--alias", name("alias"), "--source", primary, "--target", secondary]
    assert run(switch_alias, *there).code == 0
    outcome = run(bulkupdate, "--bucket", sandbox.BUCKET, "--prefix", prefix, "--index", primary)
    assert outcome.code == 0, outcome.err
    assert "signed AWS requests" in outcome.err
    assert sources(admin, primary) == [{"n": 7, "ü": "ä b"}, {"n": 8, "ü": "€"}, {"n": 9, "ü": "x"}]
    assert run(index_cleanup, "--index", primary, "--no-force-merge").code == 0
    assert {scope.split("/", 1)[1] for _, scope in verifier.seen} == {f"{REGION}/es/aws4_request"}


def test_the_endpoint_alone_comes_from_the_store(verifier, make_index, run, monkeypatch, box, proxy):
    monkeypatch.delenv("OPENSEARCH_ENDPOINT")
    monkeypatch.setenv("OPENSEARCH_PARAMETER_PREFIX", "/signed")
    sandbox.aws_client("ssm", {**box.environment, "AWS_REGION": REGION}).put_parameter(
        Name="/signed/endpoint", Value=proxy.endpoint, Type="String", Overwrite=True
    )
    outcome = run(index_cleanup, "--index", make_index(), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert verifier.seen


def test_a_wrong_secret_is_refused_with_what_to_do(verifier, make_index, run, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    outcome = run(index_cleanup, "--index", make_index())
    assert outcome.code == 1
    assert "403 The request signature" in outcome.last or "403 " in outcome.last
    assert "renew the AWS credentials, or allow es:ESHttp*" in outcome.last
    assert "wrong" not in outcome.err


def test_without_credentials_nothing_is_sent(verifier, run, monkeypatch, name):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    outcome = run(index_cleanup, "--index", name())
    assert outcome.code == 2
    assert "no AWS credentials" in outcome.last
    assert verifier.seen == []


def test_a_profile_that_does_not_exist_is_said_to_be_missing(verifier, run, monkeypatch, name):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    outcome = run(index_cleanup, "--index", name())
    assert outcome.code == 2
    assert "nobody" in outcome.last
    assert "unexpected" not in outcome.err


def test_a_block_of_the_cluster_is_not_reported_as_bad_credentials(verifier, run, make_index, proxy):
    index = make_index("index", {"n": {"type": "long"}}, docs=2)
    block = {"type": "cluster_block_exception", "reason": f"index [{index}] blocked by: [FORBIDDEN/9/index metadata]"}

    def blocked(exchange):  # a real block would also refuse what other tests ask about all indices meanwhile
        if exchange.handler.path.startswith(f"/{index}?"):
            exchange.reply(403, json.dumps({"error": {"root_cause": [block], **block}, "status": 403}))
            return True
        return verifier(exchange)

    proxy.watch = blocked
    outcome = run(index_cleanup, "--index", index)
    assert "renew the AWS credentials" not in outcome.err
    assert "remove the block" in outcome.err


@pytest.fixture
def role(monkeypatch, verifier):
    """Hand out credentials as a container's role does: new ones whenever they are asked for, soon to expire."""
    handed: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            handed.append(f"key{len(handed)}")
            verifier.secrets = {key: f"secret of {key}" for key in handed[-5:]}  # the former ones have expired
            soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=60)
            body = json.dumps({
                "AccessKeyId": handed[-1], "SecretAccessKey": f"secret of {handed[-1]}", "Token": "a-token",
                "Expiration": soon.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }).encode()  # fmt: skip
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_port}/role")
        yield handed
        server.shutdown()


def test_credentials_that_renew_themselves_keep_a_load_going(role, verifier, make_index, put_csv, run, admin):
    index = make_index("index", {"n": {"type": "long"}})
    prefix = put_csv({"a.csv": "n\n" + "".join(f"{n}\n" for n in range(50))})
    command = ["--bucket", sandbox.BUCKET, "--prefix", prefix, "--index", index, "--batch-size", "5", "--workers", "1"]
    outcome = run(bulkupdate, *command)
    assert outcome.code == 0, outcome.err
    assert count(admin, index) == 50
    assert len({key for key, _ in verifier.seen}) > 10
