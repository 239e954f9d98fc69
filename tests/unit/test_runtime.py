"""What is said of Ray's errors, without a cluster."""

from __future__ import annotations

import pytest
from eagleray.flows.runtime import _first_fault

LONG = """\x1b[36mray::MapWorker(Map(RayWorker)).submit()\x1b[39m (pid=8899, ip=127.0.0.1)
  File "/x/worker.py", line 4, in <module>
    int(text)
ValueError: invalid literal for int() with base 10: 'x'

The above exception was the direct cause of the following exception:

ray.exceptions.UserCodeException: UDF failed to process a data block.
Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).
To change retry attempts, backoff, or which errors are retried, configure the context."""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LONG, "ValueError: invalid literal for int() with base 10: 'x'"),
        (
            "The actor died unexpectedly before finishing this task.",
            "The actor died unexpectedly before finishing this task.",
        ),
        ("", "RuntimeError"),
    ],
)
def test_the_first_fault_is_told_and_not_the_advice_after_it(text: str, said: str) -> None:
    assert _first_fault(RuntimeError(text)) == said
