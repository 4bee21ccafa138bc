"""tests/sandbox.sh as the README uses it: runs a command, passes its exit code on, leaves nothing running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

SANDBOX = Path(__file__).resolve().parent / "sandbox.sh"
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
