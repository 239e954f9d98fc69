"""The decoder: pixels are those of images.decode, a refused image ends its own ticket, and none holds up another."""

from __future__ import annotations

import asyncio
import io
import threading
import time
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eagleray.serving import decoding
from eagleray.serving.batcher import Batcher, Closed, DeadlinePassed, Ticket
from eagleray.serving.decoding import Decoder
from eagleray.vision.images import ImageRefused, ImageSpec, Limits, Reason, decode
from PIL import Image

Photo = Callable[..., bytes]
SPEC = ImageSpec(height=32, width=32)


@pytest.fixture
def batcher() -> Iterator[Batcher[Any, Any]]:
    """Gives back the pixels that enter."""
    made: Batcher[Any, Any] = Batcher([list], buckets=(1, 2, 4))
    yield made
    made.close()


@contextmanager
def decoding_with(**settings: Any) -> Iterator[Decoder]:
    decoder = Decoder(**{"threads": 1, **settings})
    try:
        yield decoder
    finally:
        decoder.close()


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await body()

    asyncio.run(bounded())


def put(decoder: Decoder, batcher: Batcher[Any, Any], data: bytes, *, left_s: float = 60.0) -> Ticket[Any, Any]:
    ticket = batcher.ticket(time.monotonic() + left_s)
    decoder.put(data, SPEC, ticket, batcher.enter)
    return ticket


def test_the_pixels_are_those_of_decode(batcher: Batcher[Any, Any], make_photo: Photo) -> None:
    images = [make_photo(seed, kind=kind) for seed, kind in enumerate(["JPEG", "PNG", "WEBP", "JPEG"])]

    async def body() -> None:
        with decoding_with(threads=2) as decoder:
            tickets = [put(decoder, batcher, data) for data in images]
            for data, ticket in zip(images, tickets, strict=True):
                assert np.array_equal((await ticket.future).value, decode(data, SPEC))
                assert ticket.prepared_s > 0

    run(body)


def test_a_refused_image_ends_its_own_ticket_only(batcher: Batcher[Any, Any], make_photo: Photo) -> None:
    async def body() -> None:
        with decoding_with(limits=Limits(max_pixels=10_000)) as decoder:
            good = [put(decoder, batcher, make_photo(seed)) for seed in range(2)]
            bad = [put(decoder, batcher, data) for data in (b"", b"<html>", make_photo(1, width=200, height=200))]
            for ticket, reason in zip(bad, ("empty", "not_image", "too_large"), strict=True):
                with pytest.raises(ImageRefused) as refused:
                    await ticket.future
                assert refused.value.reason == reason
            for ticket in good:
                assert (await ticket.future).value.shape == (32, 32, 3)

    run(body)


def test_the_hostile_corpus_moves_nothing(batcher: Batcher[Any, Any], shared_data: Path, make_photo: Photo) -> None:
    """Each file gets pixels or a reason of the closed list, as images.decode gives it; the loop keeps turning."""
    with zipfile.ZipFile(shared_data / "hostile.zip") as archive:
        files = [archive.read(name) for name in archive.namelist() if not name.endswith("/")]
    files = [data for data in files if len(data) < 200_000][::3]

    async def body() -> None:
        with decoding_with(threads=2) as decoder:
            tickets = [put(decoder, batcher, data) for data in files]
            found = await asyncio.gather(*(ticket.future for ticket in tickets), return_exceptions=True)
            for data, one in zip(files, found, strict=True):
                if isinstance(one, ImageRefused):
                    assert one.reason in set(Reason)
                    with pytest.raises(ImageRefused, match=str(one.reason)):
                        decode(data, SPEC)
                else:
                    assert not isinstance(one, BaseException)
            assert (await put(decoder, batcher, make_photo(1)).future).value.shape == (32, 32, 3)

    run(body)


def test_what_nobody_awaits_or_is_late_is_not_decoded(
    batcher: Batcher[Any, Any], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, seen = threading.Event(), list[bytes]()

    def slow(data: bytes, spec: ImageSpec, **settings: Any) -> Any:
        seen.append(data)
        gate.wait(20)
        return decode(data, spec, **settings)

    monkeypatch.setattr(decoding, "decode", slow)
    images = [make_photo(seed) for seed in range(4)]

    async def body() -> None:
        with decoding_with() as decoder:
            first = put(decoder, batcher, images[0])
            gone, late, last = (put(decoder, batcher, images[k], left_s=-1.0 if k == 2 else 60.0) for k in (1, 2, 3))
            gone.future.cancel()
            await asyncio.sleep(0)
            gate.set()
            await asyncio.gather(first.future, last.future)
            with pytest.raises(DeadlinePassed):
                await late.future
            assert seen == [images[0], images[3]]

    run(body)


def test_large_pictures_do_not_hold_up_common_ones(
    batcher: Batcher[Any, Any], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    large, common = make_photo(1, width=120, height=120), make_photo(2)

    def slow(data: bytes, spec: ImageSpec, **settings: Any) -> Any:
        if data == large:
            gate.wait(20)
        return decode(data, spec, **settings)

    monkeypatch.setattr(decoding, "decode", slow)

    async def body() -> None:
        with decoding_with(large_pixels=120 * 120 - 1) as decoder:
            held = [put(decoder, batcher, large) for _ in range(5)]
            await put(decoder, batcher, common).future
            assert not any(ticket.future.done() for ticket in held)
            gate.set()
            await asyncio.gather(*(ticket.future for ticket in held))

    run(body)


def test_a_codec_that_hangs_is_seen_and_the_wait_is_estimated(
    batcher: Batcher[Any, Any], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, began, now = threading.Event(), threading.Semaphore(0), [0.0]

    def slow(data: bytes, spec: ImageSpec, **settings: Any) -> Any:
        began.release()
        now[0] += 0.01  # each takes that long
        gate.wait(20)
        return decode(data, spec, **settings)

    monkeypatch.setattr(decoding, "decode", slow)
    image = make_photo(1)

    async def body() -> None:
        with decoding_with(clock=lambda: now[0]) as decoder:
            gate.set()
            await put(decoder, batcher, image).future
            assert (decoder.delay_s(), decoder.longest_s()) == (0.0, 0.0)
            gate.clear()
            tickets = [put(decoder, batcher, image) for _ in range(4)]
            await asyncio.to_thread(began.acquire)
            await asyncio.to_thread(began.acquire)
            now[0] += 9.0
            assert decoder.longest_s() >= 9.0
            assert decoder.delay_s() == pytest.approx(3 * 0.01)
            gate.set()
            await asyncio.gather(*(ticket.future for ticket in tickets), return_exceptions=True)

    run(body)


def test_a_fault_of_ours_is_its_images_and_the_thread_goes_on(
    batcher: Batcher[Any, Any], make_photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(data: bytes, spec: ImageSpec, **settings: Any) -> Any:
        raise KeyError("a fault")

    async def body() -> None:
        with decoding_with() as decoder:
            with monkeypatch.context() as patched:
                patched.setattr(decoding, "decode", faulty)
                with pytest.raises(KeyError):
                    await put(decoder, batcher, make_photo(1)).future
            await put(decoder, batcher, make_photo(1)).future

    run(body)


def test_a_closed_decoder_refuses(batcher: Batcher[Any, Any], make_photo: Photo) -> None:
    async def body() -> None:
        decoder = Decoder(threads=1)
        decoder.close()
        with pytest.raises(Closed):
            await put(decoder, batcher, make_photo(1)).future

    run(body)


def test_a_header_of_thirty_thousand_pixels_is_refused_without_them(batcher: Batcher[Any, Any]) -> None:
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30)).save(buffer, "PNG")

    async def body() -> None:
        with decoding_with() as decoder:
            with pytest.raises(ImageRefused) as refused:
                await put(decoder, batcher, buffer.getvalue()).future
            assert refused.value.reason == "too_large"

    run(body)
