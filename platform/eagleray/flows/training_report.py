"""The page of a training run.

Example:
    >>> write_report(run, read_run)
"""

from __future__ import annotations
from collections.abc import Mapping
from typing import Any
from eagleray.flows.training_run import Run


def write_report(run: Run, value: Mapping[str, Any]) -> None:
    """Later."""
