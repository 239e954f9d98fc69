"""Whether a request is let in now: its tenant's rate and daily quota, and whether an answer can come in time (see
concurrency.py for how many may be on their way).

The rate is the generic cell rate algorithm (ITU-T I.371; a leaky bucket that needs one number a tenant): a tenant may
ask ``burst`` images at once and ``images_per_s`` in the long run. Several processes let requests in (a proxy on each
machine; in fast mode every replica), so the numbers of one machine's processes stand in one small shared file, and the
limits hold for the machine, exactly, across restarts. They are per machine: on n machines with a proxy a tenant has
n times its rate. Memory is bounded: of more tenants than slots, the one that asked longest ago is forgotten.

Example:
    >>> limiter = RateLimiter(MemoryLedger())
    >>> limiter.admit("acme", Rates(images_per_s=10.0, burst=20))
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import mmap
import os
import re
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from eagleray.core.errors import storage_error
from eagleray.serving.refusals import overloaded, quota_used, rate_limited

DAY_S = 86_400
MOST_TENANTS = 10_000
LOCK_TRIES, LOCK_WAIT_S = 50, 0.0002  # a counter is held for some 5 us; see FileLedger
LEAST_RETRY_S, MOST_RETRY_S = 0.5, 30.0


def refuse_late(wait_s: float, *, left_s: float, max_queue_s: float) -> None:
    """Lets an image in, unless its answer would come too late to be of use.

    Args:
        wait_s: How long it would wait for the engine, estimated.
        left_s: Time to the request's deadline.
        max_queue_s: The longest wait that anybody is let in for.

    Raises:
        Refusal: 503, with the time in which the queue shrinks to what is allowed as Retry-After.
    """
    allowed_s = min(left_s, max_queue_s)
    if wait_s > allowed_s:
        raise overloaded(min(max(wait_s - allowed_s, LEAST_RETRY_S), MOST_RETRY_S))


@dataclass(frozen=True, slots=True)
class Rates:
    """What a tenant may ask.

    Attributes:
        images_per_s: Sustained rate.
        burst: Images at once.
        images_per_day: Quota of a UTC day; None = no quota.
    """

    images_per_s: float
    burst: int
    images_per_day: int | None = None


@dataclass(slots=True)
class Counter:
    """What is known of one tenant.

    Attributes:
        full_s: When its bucket is empty again (GCRA's theoretical arrival time), on the monotonic clock.
        day: Number of the UTC day that ``used`` counts.
        used: Images of that day.
    """

    full_s: float = 0.0
    day: int = 0
    used: int = 0


class Ledger(Protocol):
    """Where the counters of all tenants stand."""

    def change(self, tenant: str, step: Callable[[Counter], float]) -> float:
        """Runs a step on one tenant's counter, alone; what it changed is kept. Returns what it returns."""
        ...


class RateLimiter:
    """Counts what each tenant asks.

    Args:
        ledger: Where.
        clock: Monotonic seconds, the same for every process of the machine.
        wall: Unix time, for the quota's day.
    """

    def __init__(
        self, ledger: Ledger, *, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._ledger, self._clock, self._wall = ledger, clock, wall

    def admit(self, tenant: str, rates: Rates, images: int = 1, *, most: int = 0) -> int:
        """Lets a request in and counts it.

        Args:
            tenant: Who asks.
            rates: What it may ask.
            images: Those that the request is known to hold.
            most: Those that it may hold: so many, or what is left, are kept from the day's quota until ``settle`` tells
                how many there were. Else a crowd of large requests would be let in by one image each.

        Returns:
            How many were counted to the quota.

        Raises:
            Refusal: 429 with Retry-After: the rate or the quota is used; nothing is counted.
        """
        now_s, wall_s, held = self._clock(), self._wall(), images

        def step(counter: Counter) -> float:
            nonlocal held
            over_s = _over(counter, rates, images, now_s)
            if over_s > 0:
                return over_s
            _turn(counter, wall_s)
            if rates.images_per_day is not None:
                left = rates.images_per_day - counter.used
                if images > left:
                    return -1.0
                held = min(max(images, most), left)
            _count(counter, rates, images, now_s)
            counter.used += held - images
            return 0.0

        verdict = self._ledger.change(tenant, step)
        if verdict > 0:
            raise rate_limited(verdict)
        if verdict < 0:
            raise quota_used(DAY_S - wall_s % DAY_S)
        return held

    def settle(self, tenant: str, rates: Rates, images: int, *, counted: int = 1, held: int = 1) -> None:
        """Counts a request that was let in before the number of its images was known; what is too much delays the next.

        Args:
            tenant: Who asked.
            rates: What it may ask.
            images: Those that there were.
            counted: Those that ``admit`` was told of.
            held: What it returned.
        """
        if images <= counted and images == held:
            return
        now_s, wall_s = self._clock(), self._wall()

        def step(counter: Counter) -> float:
            _turn(counter, wall_s)
            _count(counter, rates, max(0, images - counted), now_s)
            counter.used = max(0, counter.used - max(0, images - counted) + images - held)
            return 0.0

        self._ledger.change(tenant, step)


def _over(counter: Counter, rates: Rates, images: int, now_s: float) -> float:
    """Seconds until the request fits the bucket; 0 when it does now."""
    after_s = max(counter.full_s, now_s) + images / rates.images_per_s
    return max(0.0, after_s - now_s - rates.burst / rates.images_per_s - 1e-9)  # 1 ns: sums of a rate's inverse


def _count(counter: Counter, rates: Rates, images: int, now_s: float) -> None:
    counter.full_s = max(counter.full_s, now_s) + images / rates.images_per_s
    counter.used += images


def _turn(counter: Counter, wall_s: float) -> None:
    """Begins a new day's count."""
    day = int(wall_s // DAY_S)
    if counter.day != day:
        counter.day, counter.used = day, 0


class MemoryLedger:
    """Counters of this process.

    Args:
        most: Tenants that are kept; the one that asked longest ago goes.
    """

    def __init__(self, most: int = MOST_TENANTS) -> None:
        self._most, self._counters = most, OrderedDict[str, Counter]()

    def change(self, tenant: str, step: Callable[[Counter], float]) -> float:
        """As Ledger."""
        counter = self._counters.pop(tenant, None) or Counter()
        self._counters[tenant] = counter
        if len(self._counters) > self._most:
            self._counters.popitem(last=False)
        return step(counter)

    def __len__(self) -> int:
        return len(self._counters)


class FileLedger:
    """Counters that every process of a machine shares: a memory-mapped file of fixed slots, one lock.

    A process that dies inside a step leaves the lock free (the kernel does it); one that is stopped inside a step is
    waited for some 10 ms, then the step runs without the lock: a count may be lost, requests are not.

    A file is never made smaller or emptied: another process may have it mapped, and would die. One of another form is
    left to those who use it, and a new one takes its name.

    Args:
        path: The file, see ``ledger_name``; made (mode 0600) when there is none.
        most: Tenants that are kept, at least; twice as many slots are made.

    Raises:
        StorageError: The file cannot be made or mapped.
    """

    MAGIC = b"ERRATES1"
    HEAD = 64
    SLOT = struct.Struct("<16sddIQ20x")  # tenant's hash, full_s, last asked, day, used
    PROBES = 16  # slots that one tenant may stand in; of all 16 taken, the one that asked longest ago goes

    def __init__(
        self, path: str | Path, most: int = MOST_TENANTS, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._slots = _slots(most)
        self._clock = clock
        head = (self.MAGIC + struct.pack("<I", self._slots) + _boot_id().encode()).ljust(self.HEAD, b"\0")
        size = self.HEAD + self._slots * self.SLOT.size
        try:
            while (fd := _open_ledger(path, head, size)) is None:
                pass
            self._fd = fd
            self._map = mmap.mmap(self._fd, size)
        except OSError as error:
            raise storage_error(error, f"opening the counters {path}") from error

    def change(self, tenant: str, step: Callable[[Counter], float]) -> float:
        """As Ledger."""
        name = hashlib.blake2b(tenant.encode(), digest_size=16).digest()
        is_held = self._lock()
        try:
            offset, counter = self._find(name)
            verdict = step(counter)
            self.SLOT.pack_into(self._map, offset, name, counter.full_s, self._clock(), counter.day, counter.used)
            return verdict
        finally:
            if is_held:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Unmaps the file; the counters stay in it."""
        self._map.close()
        os.close(self._fd)

    def _lock(self) -> bool:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(LOCK_WAIT_S)
            else:
                return True
        return False

    def _find(self, name: bytes) -> tuple[int, Counter]:
        """The tenant's slot, a free one, or the one of those it may have that asked longest ago."""
        first = int.from_bytes(name[:8], "little")
        oldest, oldest_s = self.HEAD, math.inf
        for probe in range(self.PROBES):
            offset = self.HEAD + (first + probe) % self._slots * self.SLOT.size
            owner, full_s, asked_s, day, used = self.SLOT.unpack_from(self._map, offset)
            if owner == name:
                return offset, Counter(full_s, day, used)
            if asked_s < oldest_s:  # a free slot has asked at 0
                oldest, oldest_s = offset, asked_s
        return oldest, Counter()


def ledger_name(service: str, most: int = MOST_TENANTS) -> str:
    """The name of a FileLedger's file: of one service, one form, and one clock.

    The folder may be shared by nodes, whose monotonic clocks differ, or by services.

    Args:
        service: What tells the service from others, e.g. the path of its settings.
        most: As FileLedger.
    """
    return f"rates-{_boot_id()}-{_slots(most)}-{hashlib.blake2b(service.encode(), digest_size=8).hexdigest()}"


def _slots(most: int) -> int:
    return max(FileLedger.PROBES, 1 << math.ceil(math.log2(2 * most)))


def _open_ledger(path: str | Path, head: bytes, size: int) -> int | None:
    """A descriptor of a ledger that holds; None when it did not, or another process was quicker: try again.

    Raises:
        OSError: It cannot be made.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        found = os.fstat(fd)
        if found.st_size == 0:
            os.ftruncate(fd, size)
            os.pwrite(fd, head, 0)
        elif found.st_size != size or os.pread(fd, len(head), 0) != head:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == found.st_ino:
                    os.unlink(path)
            os.close(fd)
            return None
        fcntl.flock(fd, fcntl.LOCK_UN)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    return fd


def _boot_id() -> str:
    """What differs after a restart of the machine, and on another one: their monotonic clocks begin elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return re.sub(r"[^A-Za-z0-9.]", "-", socket.gethostname())[:36]
