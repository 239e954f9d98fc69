"""The edge of a program: whatever a verb or a job raises becomes a message and an exit code, in this one place.

A fault that a person can answer (an EagleError) is said in three lines, no traceback; Ctrl-C is 130; anything else
is a fault of Eagleray, 1, and says so. ``--debug`` shows the traceback and keeps the exit code.

Example:
    >>> sys.exit(guarded(lambda: 0, is_json=False, is_debug=False))
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from eagleray.core.errors import STORAGE_ERRNOS, EagleError, storage_error

FAULT_OF_OURS, INTERRUPTED, CLOSED_PIPE = 1, 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as shells count them


def guarded(body: Callable[[], int | None], *, is_json: bool = False, is_debug: bool = False) -> int:
    """Runs a program's body.

    Args:
        body: What to do; what it returns is the exit code (None is 0).
        is_json: Also write ``{"error": {...}}`` to stdout when it fails, so that a script reads one stream.
        is_debug: Write the traceback to stderr.

    Returns:
        The exit code.
    """
    try:
        return body() or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit must not raise it again
        return CLOSED_PIPE
    except KeyboardInterrupt:
        return _tell(
            INTERRUPTED, "Interrupted", "stopped by Ctrl-C", "run the same command again: it resumes", is_json=is_json
        )
    except EagleError as error:
        _trace(is_debug)
        return _tell(error.exit_code, type(error).__name__, error.seen, error.fix, error.expected, is_json=is_json)
    except OSError as error:
        _trace(is_debug)
        if error.errno in STORAGE_ERRNOS:
            known = storage_error(error, f"using {error.filename}" if error.filename else "using the storage")
            return _tell(known.exit_code, type(known).__name__, known.seen, known.fix, known.expected, is_json=is_json)
        return _fault(error, is_json=is_json, is_debug=is_debug)
    except Exception as error:  # noqa: BLE001  the one place that answers for everything
        _trace(is_debug)
        return _fault(error, is_json=is_json, is_debug=is_debug)


def _fault(error: Exception, *, is_json: bool, is_debug: bool) -> int:
    seen = f"this is a fault of Eagleray: {type(error).__name__}: {error}"
    fix = (
        "report it with the traceback above"
        if is_debug
        else "run the same command with --debug and report what it shows"
    )
    return _tell(FAULT_OF_OURS, type(error).__name__, seen, fix, is_json=is_json)


def _trace(is_debug: bool) -> None:
    if is_debug:
        import traceback

        traceback.print_exc()


def _tell(code: int, kind: str, seen: str, fix: str, expected: str = "", *, is_json: bool) -> int:
    lines = [f"error: {seen}"]
    lines += [f"  expected: {expected}"] if expected else []
    lines += [f"  do: {fix}"] if fix else []
    sys.stderr.write("\n".join(lines) + "\n")
    if is_json:
        fields: dict[str, Any] = {"kind": kind, "exit_code": code, "seen": seen, "expected": expected, "fix": fix}
        sys.stdout.write(json.dumps({"error": fields}, ensure_ascii=False) + "\n")
    return code
