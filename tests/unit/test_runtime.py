"""What is said of Ray's errors, without a cluster."""

from __future__ import annotations

import pytest
from eagleray.flows.runtime import first_fault, tasks

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
def test_thefirst_fault_is_told_and_not_the_advice_after_it(text: str, said: str) -> None:
    assert first_fault(RuntimeError(text)) == said


@pytest.mark.parametrize("num_units", [0, 1, 3, 8, 40, 1000])
@pytest.mark.parametrize("workers", [0, 1, 2, 16])
def test_tasks_hold_every_unit_once_in_order_and_end_with_single_ones(num_units: int, workers: int) -> None:
    units = [{"unit": str(number), "images": 128} for number in range(num_units)]
    found = list(tasks(units, workers))
    assert [unit for few in found for unit in few] == units
    assert all(1 <= len(few) <= 4 for few in found)
    last = max(1, workers) * 4
    assert all(len(few) == 1 for few in found if int(few[0]["unit"]) > num_units - last)


def test_a_large_unit_is_a_task_of_its_own() -> None:
    assert [len(few) for few in tasks([{"unit": str(n), "images": 4096} for n in range(100)], 2)] == [1] * 100
    assert [len(few) for few in tasks([{"unit": str(n)} for n in range(100)], 2)] == [1] * 100
