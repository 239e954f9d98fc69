"""One root error; one subclass for each remedy, each with the exit code that a script can branch on.

A message says what was seen, what was expected, and what to do next. At the command line a person sees these lines and
no traceback (``--debug`` shows it). Exit code 1 is kept for faults of ours, 130 for Ctrl-C.

Example:
    >>> raise DataError("the source is empty", expected="at least one file", fix="check the path")
"""

from __future__ import annotations

import errno
from typing import ClassVar


class EagleError(Exception):
    """The root: a fault that a person can answer.

    Args:
        seen: What was found, in one line.
        expected: What would have been right.
        fix: What to do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, seen: str, *, expected: str = "", fix: str = "") -> None:
        super().__init__(seen)
        self.seen, self.expected, self.fix = seen, expected, fix

    def __str__(self) -> str:
        lines = [self.seen]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  do: {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.seen, self.expected, self.fix))


def _rebuild(kind: type[EagleError], seen: str, expected: str, fix: str) -> EagleError:
    """Remakes an error that crossed a process border, keyword arguments and all."""
    return kind(seen, expected=expected, fix=fix)


class ConfigError(EagleError):
    """A wrong argument, recipe or setting: change the command."""

    exit_code = 2


class DataError(EagleError):
    """A source or corpus that cannot be used as it is: change the data."""

    exit_code = 3


class ArtifactError(EagleError):
    """A bundle, corpus, record or signature that does not hold: get the artefact again."""

    exit_code = 4


class CapabilityError(EagleError):
    """An engine, accelerator or extra that this machine does not have: install it or ask for another."""

    exit_code = 5


class KpiNotMet(EagleError):
    """A gate that was asked for did not pass."""

    exit_code = 6


class PrivacyBudgetExceeded(EagleError):
    """The next step would spend more privacy budget than is left."""

    exit_code = 7


class FederationError(EagleError):
    """Sites or server of a federation are not in a state to go on."""

    exit_code = 8


class StorageError(EagleError):
    """No space, no permission, or a remote store that does not answer: mend the storage and run again."""

    exit_code = 9


class ClusterError(EagleError):
    """A Ray cluster that cannot be reached, refuses the token, or lost what the run needs."""

    exit_code = 10


class BudgetStopped(EagleError):
    """The cost limit that was set has been reached."""

    exit_code = 11


class DriftFound(EagleError):
    """The watched data has drifted past its threshold."""

    exit_code = 12


class TrainingDiverged(EagleError):
    """The loss is not finite or the representation collapsed."""

    exit_code = 13


class RunIncomplete(EagleError):
    """The totals of a run do not balance: run the same command again."""

    exit_code = 14


STORAGE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG})


def storage_error(error: OSError, doing: str) -> StorageError:
    """Says an operating-system error in our words.

    Args:
        error: What the system raised.
        doing: What was under way, e.g. ``"writing runs/a/part.parquet"``.

    Returns:
        The error to raise ``from`` the original.
    """
    fixes = {
        errno.ENOSPC: "free some space and run the same command again: it goes on where it stopped",
        errno.EDQUOT: "raise the quota or free some space, then run the same command again",
        errno.EROFS: "give a folder on a writable file system",
        errno.EACCES: "give a folder that you may write to, or change its permissions",
        errno.EPERM: "give a folder that you may write to, or change its permissions",
    }
    reason = error.strerror or type(error).__name__
    return StorageError(
        f"{doing} failed: {reason}",
        expected="storage that takes the write",
        fix=fixes.get(error.errno or 0, "look at the storage and run the same command again"),
    )
