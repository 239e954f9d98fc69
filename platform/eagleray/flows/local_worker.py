"""The child process of a local pool: ``python -m eagleray.flows.local_worker``.

One JSON line in names the worker and its settings; then one line a unit in, one line of counts out. Whatever a library
prints to stdout goes to stderr, so that the answers stay clean.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from eagleray.core.errors import EagleError
from eagleray.flows.pool import error_json


def build_worker(factory: str, settings: dict[str, Any]) -> Any:
    """The worker that ``"module:Class"`` names, built from its settings."""
    module, attribute = factory.split(":")
    return getattr(importlib.import_module(module), attribute)(settings)


def main() -> None:
    """Answers units until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    worker = None
    first = json.loads(sys.stdin.buffer.readline() or b"{}")
    for line in sys.stdin.buffer:
        try:
            worker = worker or build_worker(first["factory"], first["settings"])
            answer = worker(json.loads(line))
        except EagleError as error:
            answer = {"error": error_json(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


if __name__ == "__main__":
    main()
