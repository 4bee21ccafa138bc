"""tests/sandbox.sh as the README uses it: runs a command, passes its exit code on, leaves nothing running."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import index_cleanup
import opensearch_base_manager as base
import pytest
import requests
import sandbox
from conftest import secured

TOP = Path(__file__).resolve().parent.parent
SANDBOX = TOP / "tests" / "sandbox.sh"
ITS_OWN = ("AWS_REGION", "CA_BUNDLE")  # the settings that the sandbox gives itself
SHOW = "echo $ENDPOINT $AWS_ENDPOINT_URL;"


def answers(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def test_it_passes_the_exit_code_on_and_stops_everything():
    done = subprocess.run([SANDBOX, "bash", "-c", f"{SHOW} exit 7"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
    urls = done.stdout.split()
    assert len(urls) == 2
    assert not any(map(answers, urls))


def test_a_file_of_settings_for_a_real_cluster_is_hidden(box, monkeypatch, tmp_path, run, make_index):
    names = {*base.CREDENTIALS, *(row.variable for row in sandbox.VARIABLES)}
    (tmp_path / ".env").write_text("".join(f"{name}=real-cluster\n" for name in names))
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in sandbox.command_environment(box).items():
        monkeypatch.setenv(name, value)
    base.load_env_file()
    assert {row.variable: row.given() or "" for row in sandbox.VARIABLES if row.variable not in ITS_OWN} == {
        row.variable: row.default for row in sandbox.VARIABLES if row.variable not in ITS_OWN
    }
    for name in ("LOG_DIR", "LOCK_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    outcome = run(index_cleanup, "--index", make_index(), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "(from Parameter Store)" in outcome.err


@secured
def test_the_roles_are_those_of_this_version_even_if_the_data_were_filled_by_another(box):
    for name, role in sandbox.own_roles().items():
        found = box.server.request("GET", f"{sandbox.SECURITY}/roles/{name}")[name]["index_permissions"]
        assert [entry["allowed_actions"] for entry in found] == [
            entry["allowed_actions"] for entry in role["index_permissions"]
        ]


def test_ctrl_c_reaches_the_command_and_stops_everything():
    command = [SANDBOX, "bash", "-c", f"trap 'exit 9' INT; {SHOW} while :; do sleep 0.1; done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout
        urls = process.stdout.readline().split()
        assert all(map(answers, urls))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 9
    assert not any(map(answers, urls))


def test_term_to_the_sandbox_alone_reaches_the_command():
    command = [SANDBOX, "bash", "-c", f"trap 'exit 8' TERM; {SHOW} while :; do sleep 0.1; done"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout
        urls = process.stdout.readline().split()
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 8
    assert not any(map(answers, urls))


# --- what cannot be fetched or started is said in one line ------------------------------------------------------------


def dead_port(_endpoint):
    requests.get(f"http://127.0.0.1:{sandbox.free_port()}", timeout=5)


def dead_proxy(_endpoint):
    requests.get("https://example.org", timeout=5, proxies={"https": f"http://127.0.0.1:{sandbox.free_port()}"})


def unknown_certificate(endpoint):
    session = requests.Session()
    session.trust_env = False
    session.get(endpoint, timeout=5)


def full_disk(_endpoint):
    with open("/dev/full", "w") as file:
        file.write("x")


@pytest.mark.parametrize(
    ("failure", "advice"),
    [(dead_port, "check the network"), (dead_proxy, "the proxy does not answer: check HTTPS_PROXY"),
     pytest.param(unknown_certificate, "give your CA in REQUESTS_CA_BUNDLE and SSL_CERT_FILE",
                  marks=pytest.mark.skipif(not sandbox.SECURE, reason="no TLS without the security plugin")),
     (full_disk, "free some disk space")],
)  # fmt: skip
def test_what_cannot_be_fetched_is_one_line_with_advice(failure, advice, box):
    with pytest.raises(OSError) as caught:  # noqa: PT011  requests' own are OSErrors too
        failure(box.server.endpoint)
    said = sandbox.what_failed(caught.value)
    assert "\n" not in said
    assert said.split("; ")[-1].startswith(advice)


def test_a_port_in_use_is_named_by_the_last_words_of_the_server(tmp_path):
    node = sandbox.OpenSearch(sandbox.install(), tmp_path / "node", java=sandbox.SMALL_JAVA)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", node.port))  # nobody listens: whoever asks is refused at once
        node.start()
        try:
            with pytest.raises(RuntimeError) as caught:
                node.wait()
        finally:
            node.kill()
    said = sandbox.what_failed(caught.value)
    assert "\n" not in said
    assert "OpenSearch does not start: " in said
    assert f"Failed to bind to 127.0.0.1:{node.port}" in said
    assert said.endswith("; run it again, with other ports")


@pytest.mark.parametrize(
    ("variables", "advice"),
    [({"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}, "no connection; check the network"),
     ({"HTTPS_PROXY": "http://127.0.0.1:9"}, "the proxy does not answer; check HTTPS_PROXY"),
     ({"PYTHON": "no-such-python"}, "Python 3.10 or later is needed")],
)  # fmt: skip
def test_packages_that_cannot_be_fetched_are_one_line_with_advice(variables, advice, tmp_path):
    (tmp_path / "tests").mkdir()
    shutil.copy(TOP / "requirements.txt", tmp_path)
    for path in [SANDBOX, *(TOP / "tests").glob("requirements*.txt")]:
        shutil.copy(path, tmp_path / "tests")
    hidden = ("PIP_", "HTTPS_PROXY", "https_proxy", "REQUESTS_CA_BUNDLE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        [tmp_path / "tests" / "sandbox.sh", "true"], capture_output=True, text=True, timeout=120,
        env={**kept, "PYTHON": sys.executable, "PIP_RETRIES": "1", "PIP_NO_CACHE_DIR": "1", **variables},
    )  # fmt: skip
    assert done.returncode in (1, 2)
    lines = [line for line in done.stderr.splitlines() if not re.search("fetching the packages|making .venv", line)]
    assert len(lines) == 1, done.stderr
    assert advice in lines[0]
    assert not (tmp_path / ".venv" / "stamp-requirements-sandbox.txt").exists()
