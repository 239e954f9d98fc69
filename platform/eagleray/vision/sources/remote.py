"""Single objects of a remote store, several requests at a time, given in order.

An object that is gone or forbidden is unreadable; a store that does not answer is an error, so that an outage never
quarantines an archive.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from eagleray.core import storage
from eagleray.core.errors import EagleError, StorageError
from eagleray.vision.images import ImageRefused, Reason
from eagleray.vision.sources import locations
from eagleray.vision.sources.containers import Containers, Found, Row, too_large
from eagleray.vision.sources.rows import text_of

REQUESTS = 16  # at a time: hides 20 ms of latency at 800 objects/s; memory is at most this many images
ATTEMPTS, PAUSE_S = 3, 0.5  # beside the client's own retries
DENIED_RUN = 64  # so many refused in a row are wrong credentials, not a few protected objects


def read_remote(_: str, rows: list[Row], limit: int, __: Containers) -> Iterator[Found]:
    """Objects by URI.

    Raises:
        StorageError: The store does not answer, or refuses everything.
    """
    denied = 0
    with ThreadPoolExecutor(REQUESTS) as pool:
        ahead: deque[Future[Found]] = deque()
        left = iter(rows)
        try:
            while True:
                while len(ahead) < REQUESTS and (row := next(left, None)) is not None:
                    ahead.append(pool.submit(_read, row, limit))
                if not ahead:
                    return
                found = ahead.popleft().result()
                is_denied = isinstance(found, ImageRefused) and found.detail == DENIED
                denied = denied + 1 if is_denied else 0
                if denied >= DENIED_RUN:
                    raise StorageError(
                        f"{denied} objects in a row were refused: {DENIED}",
                        expected="credentials that may read the objects",
                        fix="check the credentials, then run the same command again",
                    )
                yield found
        finally:
            for future in ahead:
                future.cancel()


DENIED = "access denied"


def _read(row: Row, limit: int) -> Found:
    uri, size = row["member"].decode("utf-8", "surrogateescape"), row["size"]
    if size > limit:
        return too_large(size, limit)
    if size == 0:
        return b""
    for attempt in range(ATTEMPTS):
        try:
            fs, path = storage.filesystem(uri)
            return _fetch(fs, path, size, limit)
        except FileNotFoundError:
            return ImageRefused(Reason.UNREADABLE, "no such object")
        except PermissionError:
            return ImageRefused(Reason.UNREADABLE, DENIED)
        except IsADirectoryError:
            return ImageRefused(Reason.UNREADABLE, "is a folder")
        except EagleError:
            raise
        except Exception as error:
            if attempt + 1 == ATTEMPTS:
                raise locations.store_error(error, text_of(uri)) from error
            time.sleep(PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


def _fetch(fs: Any, path: str, size: int, limit: int) -> Found:
    if size < 0:  # listed without its size: one more request, because a range over an empty object is an error in S3
        size = int(fs.info(path).get("size") or 0)
        if size > limit:
            return too_large(size, limit)
    data: bytes = fs.cat_file(path)
    return data if len(data) <= limit else too_large(len(data), limit)
