"""Every error that the scripts raise says what to do; they are found in the source, so that none is forgotten."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.quick

TOP = Path(__file__).resolve().parent.parent
ERRORS = ("OperationFailed", "RequestFailed", "ConfigurationError", "TooManyRejects", "Refused", "Locked")
# A question is advice too, an example, the list of allowed values, or another message that is passed on.
ADVICE = re.compile(
    r"\b(run (it )?again|give|set|check|see|load|(re)?create|delete|renew|rename|remove|save|wait|"
    r"add|change)\b|such as|none of|\?|command\(|_advice\(|ADVICE|_reason_of|\{error\}|what_to_do|remedy|AGAIN", re.I
)  # fmt: skip


def messages() -> Iterator[Any]:
    """Yield the text of each error as source code, with file and line."""
    for path in sorted(TOP.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                yield pytest.param(ast.unparse(node.args[0]), id=f"{path.name}:{node.lineno}")


@pytest.mark.parametrize("message", list(messages()))
def test_an_error_says_what_to_do(message):
    assert ADVICE.search(message)
