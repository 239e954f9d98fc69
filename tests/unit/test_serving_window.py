"""The last requests of a process: what counts as a failure, and what a wrapped app does to its requests (nothing)."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from eagleray.serving import window as window_module
from eagleray.serving.window import Figures, RequestWindow, Watched, together


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def window(*requests: tuple[float, int]) -> RequestWindow:
    found = RequestWindow(clock=Clock())
    for seconds, status in requests:
        found.add(seconds, status)
    return found


def test_refusals_are_no_failures_and_their_times_do_not_count() -> None:
    figures = window((0.01, 200), (9.0, 422), (9.0, 401), (9.0, 503), (9.0, 500), (9.0, 0)).figures()
    assert figures == Figures(requests=6, failures=2, overloaded=1, latency_ms_p99=10.0)


def test_a_503_that_came_late_is_a_failure() -> None:
    """A model that hangs answers nothing but passed deadlines; a rollout's watch took them for overload."""
    found = RequestWindow(clock=Clock(), late_s=0.1)
    for seconds, status in ((0.01, 503), (0.1, 503), (0.2, 503), (10.0, 503), (10.0, 422), (10.0, 200)):
        found.add(seconds, status)
    assert found.figures() == Figures(requests=6, failures=2, overloaded=2, latency_ms_p99=10_000.0)


def test_p99_is_the_value_that_99_of_100_do_not_exceed() -> None:
    times = [(number / 1000, 200) for number in range(1, 101)]
    assert window(*times).figures().latency_ms_p99 == pytest.approx(99.0)
    assert window(*times[:1]).figures().latency_ms_p99 == pytest.approx(1.0)
    assert window().figures() == Figures(0, 0, 0, None)


def test_only_the_newest_are_looked_at_and_kept() -> None:
    clock = Clock()
    found = RequestWindow(most=3, clock=clock)
    for status in (500, 500, 200, 200):
        found.add(0.1, status)
        clock.now += 10
    assert found.figures().requests == 3
    assert found.figures(since_s=25).failures == 0


def test_figures_of_several_processes_add_up_and_the_worst_p99_stands() -> None:
    both = together([Figures(10, 1, 2, 5.0), Figures(20, 0, 0, 50.0), Figures(0, 0, 0, None)])
    assert both == Figures(30, 1, 2, 50.0)
    assert together([]) == Figures(0, 0, 0, None)


@pytest.mark.parametrize(("upload_s", "wait_s", "failures"), [(5.0, 0.0, 0), (0.0, 5.0, 1), (5.0, 5.0, 1)])
def test_a_body_that_comes_slowly_makes_no_refusal_late(
    upload_s: float, wait_s: float, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, found = Clock(), RequestWindow(late_s=0.1)
    monkeypatch.setattr(window_module, "time", SimpleNamespace(perf_counter=clock))

    async def receive() -> Any:
        clock.now += upload_s
        return {"type": "http.request", "body": b"", "more_body": False}

    async def overloaded(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        clock.now += wait_s
        await send({"type": "http.response.start", "status": 503, "headers": []})

    async def send(message: Any) -> None:
        """Nobody reads it."""

    asyncio.run(Watched(overloaded, found)(ASK, receive, send))
    assert found.figures().failures == failures


def serve(app: Any, scope: dict[str, Any]) -> tuple[RequestWindow, list[Any]]:
    found, sent = RequestWindow(), []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(Watched(app, found)(scope, receive, send))
    return found, sent


async def fine(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"yes"})


async def gone(scope: Any, receive: Any, send: Any) -> None:
    """The client left: no answer, and no fault."""


async def broken(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("engine")


ASK = {"type": "http", "method": "POST", "path": "/v1/predict"}


def test_answers_pass_unchanged() -> None:
    found, sent = serve(fine, ASK)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert found.figures().requests == 1


def test_what_is_no_prediction_does_not_count() -> None:
    for scope in ({**ASK, "method": "GET"}, {**ASK, "path": "/healthz"}, {"type": "lifespan"}):
        assert serve(fine, scope)[0].figures().requests == 0
    assert serve(gone, ASK)[0].figures().requests == 0


def test_an_exception_is_a_failure_and_goes_on() -> None:
    found = RequestWindow()
    with pytest.raises(RuntimeError, match="engine"):
        asyncio.run(Watched(broken, found)(ASK, None, None))
    assert found.figures().failures == 1
