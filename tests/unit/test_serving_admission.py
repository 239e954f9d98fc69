"""Rates and quotas: never more than is allowed, never less than is allowed for long, memory that does not grow."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import pytest
from eagleray.serving import admission
from eagleray.serving.admission import DAY_S, FileLedger, MemoryLedger, RateLimiter, Rates, ledger_name, refuse_late
from eagleray.serving.refusals import Refusal


class Clock:
    def __init__(self, now: float = 1_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["memory", "file"])
def ledger(request, tmp_path: Path):
    made = MemoryLedger() if request.param == "memory" else FileLedger(tmp_path / "rates")
    yield made
    if isinstance(made, FileLedger):
        made.close()


def admitted(limiter: RateLimiter, tenant: str, rates: Rates, images: int = 1) -> bool:
    try:
        limiter.admit(tenant, rates, images)
    except Refusal as refusal:
        return not (refusal.status == 429 and refusal.retry_after_s and refusal.retry_after_s > 0)
    return True


def test_a_burst_then_the_rate(ledger) -> None:
    clock = Clock()
    limiter = RateLimiter(ledger, clock=clock)
    rates = Rates(images_per_s=10.0, burst=20)
    assert sum(admitted(limiter, "a", rates) for _ in range(100)) == 20
    clock.now += 1.0
    assert sum(admitted(limiter, "a", rates) for _ in range(100)) == 10
    clock.now += 1_000.0
    assert sum(admitted(limiter, "a", rates) for _ in range(100)) == 20


def test_the_time_to_wait_is_the_time_that_does(ledger) -> None:
    clock = Clock()
    limiter = RateLimiter(ledger, clock=clock)
    rates = Rates(images_per_s=2.0, burst=4)
    limiter.admit("a", rates, 4)
    with pytest.raises(Refusal) as caught:
        limiter.admit("a", rates, 3)
    assert caught.value.retry_after_s == pytest.approx(1.5)
    clock.now += caught.value.retry_after_s - 0.01
    assert not admitted(limiter, "a", rates, 3)
    clock.now += 0.011
    assert admitted(limiter, "a", rates, 3)


def test_a_refused_request_costs_nothing_and_tenants_do_not_touch_one_another(ledger) -> None:
    clock = Clock()
    limiter = RateLimiter(ledger, clock=clock)
    rates = Rates(images_per_s=1.0, burst=1)
    assert admitted(limiter, "a", rates)
    for _ in range(1_000):
        assert not admitted(limiter, "a", rates)
    assert admitted(limiter, "b", rates)
    clock.now += 1.0
    assert admitted(limiter, "a", rates)


def test_images_that_are_counted_late_delay_the_next_request(ledger) -> None:
    clock = Clock()
    limiter = RateLimiter(ledger, clock=clock)
    rates = Rates(images_per_s=10.0, burst=10)
    limiter.admit("a", rates)
    limiter.settle("a", rates, 30)
    clock.now += 1.9
    assert not admitted(limiter, "a", rates)
    clock.now += 0.2
    assert admitted(limiter, "a", rates)


def test_a_quota_ends_at_midnight_utc(ledger) -> None:
    clock, wall = Clock(), Clock(20_000 * DAY_S + 80_000.0)
    limiter = RateLimiter(ledger, clock=clock, wall=wall)
    rates = Rates(images_per_s=1e6, burst=1_000, images_per_day=100)
    limiter.admit("a", rates, 99)
    assert not admitted(limiter, "a", rates, 2)
    assert admitted(limiter, "a", rates, 1)
    with pytest.raises(Refusal) as caught:
        limiter.admit("a", rates)
    assert caught.value.code == "quota_used"
    assert caught.value.retry_after_s == DAY_S - 80_000
    wall.now += 6_400
    assert admitted(limiter, "a", rates, 100)


def test_what_a_request_may_hold_is_kept_from_the_quota_until_it_is_known(ledger) -> None:
    clock, wall = Clock(), Clock(20_000 * DAY_S + 80_000.0)
    limiter = RateLimiter(ledger, clock=clock, wall=wall)
    rates = Rates(images_per_s=1e6, burst=1_000, images_per_day=70)
    held = [limiter.admit("a", rates, most=32) for _ in range(3)]
    assert held == [32, 32, 6]
    assert not admitted(limiter, "a", rates)
    limiter.settle("a", rates, 1, held=32)
    limiter.settle("a", rates, 32, held=32)
    limiter.settle("a", rates, 10, held=6)
    assert limiter.admit("a", rates, most=32) == 27  # 70 - 1 - 32 - 10
    wall.now += 6_400  # a new day: what was kept of the last one is not given back to it
    limiter.settle("a", rates, 1, held=27)
    assert admitted(limiter, "a", rates, 70)


def test_what_is_kept_from_the_quota_is_nothing_to_the_rate(ledger) -> None:
    clock = Clock()
    limiter = RateLimiter(ledger, clock=clock)
    rates = Rates(images_per_s=1.0, burst=3, images_per_day=1_000)
    assert [limiter.admit("a", rates, most=32) for _ in range(3)] == [32, 32, 32]
    with pytest.raises(Refusal) as caught:
        limiter.admit("a", rates, most=32)
    assert caught.value.retry_after_s == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(5))
def test_no_window_holds_more_than_burst_and_rate(seed: int) -> None:
    """The law of the algorithm, against a count of every window, slow and obvious."""
    draw, clock = random.Random(seed), Clock()
    limiter = RateLimiter(MemoryLedger(), clock=clock)
    rates = Rates(images_per_s=5.0, burst=7)
    events: list[tuple[float, int]] = []
    for _ in range(400):
        clock.now += draw.expovariate(8.0)
        images = draw.randint(1, 4)
        if admitted(limiter, "a", rates, images):
            events.append((clock.now, images))
    for start in range(len(events)):
        total = 0
        for when, images in events[start:]:
            total += images
            assert total <= rates.burst + rates.images_per_s * (when - events[start][0]) + 1e-6


def test_memory_does_not_grow_with_tenants() -> None:
    ledger = MemoryLedger(most=100)
    limiter = RateLimiter(ledger)
    for number in range(10_000):
        limiter.admit(f"t{number}", Rates(1.0, 1))
    assert len(ledger) == 100


def test_a_file_does_not_grow_and_the_busy_tenant_is_not_forgotten(tmp_path: Path) -> None:
    clock = Clock()
    ledger = FileLedger(tmp_path / "rates", most=100, clock=clock)
    limiter = RateLimiter(ledger, clock=clock)
    size = (tmp_path / "rates").stat().st_size
    rates = Rates(images_per_s=0.001, burst=1)
    assert admitted(limiter, "busy", rates)
    for number in range(5_000):
        clock.now += 0.001
        limiter.admit(f"t{number}", Rates(1.0, 1))
        assert not admitted(limiter, "busy", rates)
    assert (tmp_path / "rates").stat().st_size == size
    assert (tmp_path / "rates").stat().st_mode & 0o777 == 0o600
    ledger.close()


def test_counters_outlive_a_process_and_are_begun_anew_in_another_form(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "rates"
    rates = Rates(images_per_s=0.001, burst=1)
    first = FileLedger(path, most=100)
    assert admitted(RateLimiter(first, clock=clock), "a", rates)
    second = FileLedger(path, most=100)
    assert not admitted(RateLimiter(second, clock=clock), "a", rates)
    first.close()
    second.close()
    path.write_bytes(b"not a ledger")
    third = FileLedger(path, most=100)
    assert admitted(RateLimiter(third, clock=clock), "a", rates)
    third.close()


def test_another_form_of_the_file_leaves_those_who_have_it_mapped_alive(tmp_path: Path) -> None:
    """A file that is cut while it is mapped is a SIGBUS for who reads it: in a process of its own."""
    import subprocess
    import sys

    program = (
        "import sys; from eagleray.serving.admission import FileLedger, RateLimiter, Rates;"
        "first = RateLimiter(FileLedger(sys.argv[1], most=10_000));"
        "FileLedger(sys.argv[1], most=10);"
        "[first.admit(f't{n}', Rates(1.0, 1)) for n in range(1_000)]"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "rates")], check=True, timeout=60)


def test_a_ledgers_name_tells_boots_forms_and_services_apart(monkeypatch) -> None:
    names = {ledger_name(service, most) for service in ("/a.json", "/b.json") for most in (10, 10_000)}
    monkeypatch.setattr(admission, "_boot_id", lambda: "another")
    names.add(ledger_name("/a.json", 10))
    assert len(names) == 5
    assert ledger_name("/a.json", 10) == ledger_name("/a.json", 10)


def _hammer(path: str, found: multiprocessing.Queue) -> None:
    limiter = RateLimiter(FileLedger(path), clock=lambda: 1_000.0)
    found.put(sum(admitted(limiter, "a", Rates(images_per_s=1.0, burst=500)) for _ in range(400)))


def test_processes_of_a_machine_share_one_limit(tmp_path: Path) -> None:
    FileLedger(tmp_path / "rates").close()
    context = multiprocessing.get_context("fork")
    found = context.Queue()
    workers = [context.Process(target=_hammer, args=(str(tmp_path / "rates"), found)) for _ in range(3)]
    for worker in workers:
        worker.start()
    total = sum(found.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert total == 500


def test_a_stopped_process_that_holds_the_lock_stops_nobody(tmp_path: Path) -> None:
    import fcntl

    ledger = FileLedger(tmp_path / "rates")
    with (tmp_path / "rates").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert admitted(RateLimiter(ledger), "a", Rates(1.0, 1))
    ledger.close()


def test_what_would_come_too_late_is_refused_at_once() -> None:
    refuse_late(0.1, left_s=0.2, max_queue_s=0.1)
    for wait, left, most in [(0.11, 10.0, 0.1), (0.11, 0.1, 10.0), (3.0, -1.0, 1.0)]:
        with pytest.raises(Refusal) as caught:
            refuse_late(wait, left_s=left, max_queue_s=most)
        assert caught.value.status == 503
        assert 0.5 <= caught.value.retry_after_s <= 30.0
