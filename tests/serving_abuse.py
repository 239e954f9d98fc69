"""What people do to a service that is reached from outside, as functions that any service can be put to.

Used against a bare uvicorn (unit/test_serving_abuse.py) and through real Serve (journeys/test_serve_abuse.py).
Each drives raw sockets, so that nothing between tidies a request up, and says what it saw.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import socket
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from eagleray.vision.images import ImageRefused, validate

TIMEOUT_S = 30.0
PIECE = 65_536
MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    """A service: where, and a key that is good for it."""

    host: str
    port: int
    key: str

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.create_connection((self.host, self.port), timeout=TIMEOUT_S) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PIECE)
            yield client

    def head(self, line: str, *more: str, key: str | None = None) -> bytes:
        """A request's head with the key (or another; "" is none), in Latin-1."""
        given = self.key if key is None else key
        lines = [line, "Host: localhost", *([f"Authorization: Bearer {given}"] if given else []), *more]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def ask(self, line: str, *more: str, body: bytes = b"", key: str | None = None) -> tuple[int, bytes]:
        """One request on a connection of its own: status (0: no answer) and all that came back."""
        size = [] if "chunked" in " ".join(more).lower() else [f"Content-Length: {len(body)}"]
        with self.connected() as client:
            with contextlib.suppress(OSError):
                client.sendall(self.head(line, "Connection: close", *size, *more, key=key) + body)
            return split(read_all(client))

    def predict(self, image: bytes) -> tuple[int, bytes]:
        return self.ask("POST /v1/predict HTTP/1.1", "Content-Type: application/octet-stream", body=image)


def read_all(client: socket.socket) -> bytes:
    """What comes until the connection ends or is silent for TIMEOUT_S."""
    found = b""
    with contextlib.suppress(OSError):
        while piece := client.recv(PIECE):
            found += piece
    return found


def split(answer: bytes) -> tuple[int, bytes]:
    """Status and body; a chunked body is put together."""
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1."):
        return 0, answer
    if b"transfer-encoding: chunked" in head.lower():
        joined, rest = b"", body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size or b"0", 16)
            if not length:
                break
            joined, rest = joined + rest[:length], rest[length + 2 :]
        body = joined
    return int(head.split()[1]), body


# Hostile images


def hostile_files(shared_data: Path) -> list[tuple[str, bytes]]:
    """The corpus: name and bytes."""
    with zipfile.ZipFile(shared_data / "hostile.zip") as archive:
        rows = csv.DictReader(io.StringIO(archive.read("hostile.csv").decode()))
        return [(row["file"], archive.read(f"files/{row['file']}")) for row in rows]


def verdict(data: bytes) -> tuple[int, str]:
    """What the decoder says of an image, as status and reason."""
    if not data:
        return 400, ""
    try:
        validate(data)
    except ImageRefused as refused:
        return 422, str(refused.reason)
    return 200, ""


def put_to_hostile_images(target: Target, files: list[tuple[str, bytes]], good: bytes) -> Counter[int]:
    """Sends each file, and between them a good image whose answer must not change.

    Returns:
        Count by status.
    """
    seen: Counter[int] = Counter()
    calm = json.loads(target.predict(good)[1])["score"]
    for name, data in files:
        status, body = target.predict(data)
        seen[status] += 1
        said = json.loads(body)
        assert (status, said.get("reason", "") or "") == verdict(data), (name, status, body[:300])
        if status != 200:
            assert said["code"] in ("not_an_image", "empty_body"), name
        assert b"Traceback" not in body
        assert b"/work" not in body
        status, body = target.predict(good)
        assert status == 200, name
        assert json.loads(body)["score"] == calm, name
    return seen


# Another tenant's model


def put_to_probes(
    target: Target, *, theirs: str, theirs_key: str, secrets: tuple[bytes, ...], image: bytes, number: int, seed: int
) -> Counter[int]:
    """Asks with one tenant's key, in many ways, for what another tenant's key opens.

    Args:
        target: Its key opens another model than ``theirs``.
        theirs: The name of the model that must stay closed.
        theirs_key: A key that opens it; parts of it are tried, never the whole.
        secrets: What only that model's answers hold.
        image: A good one.
        number: How many probes.
        seed: Of the draw.

    Returns:
        Count by status; a probe that succeeds fails an assertion.
    """
    draw, seen = random.Random(seed), Counter[int]()
    good = target.ask("POST /v1/predict HTTP/1.1", body=image)
    assert good[0] == 200
    for _ in range(number):
        line, more, key = _probe(draw, target.key, theirs, theirs_key)
        status, body = target.ask(line, *more, body=image if line.startswith("POST") else b"", key=key)
        seen[status] += 1
        for secret in secrets:
            assert secret not in body, (line, more, status, body[:300])
        if status == 200:
            said = json.loads(body) if body.startswith(b"{") else {}
            name = said.get("model", {}).get("name") if isinstance(said.get("model"), dict) else None
            assert name != theirs, (line, more)
    return seen


def _probe(draw: random.Random, key: str, theirs: str, theirs_key: str) -> tuple[str, list[str], str]:
    """One way to try: request line, headers, key."""
    name = _spelled(draw, theirs)
    path = draw.choice(
        [
            f"/v1/predict?model={name}",
            f"/v1/embed?model={name}",
            f"/v1/predict?model=mine&model={name}",
            f"/v1/predict?model={name}&model=mine",
            f"/v1/predict?model=mine;model={name}",
            f"/v1/predict?MODEL={name}",
            f"/v1/predict?model[]={name}",
            f"/v1/predict/?model={name}",
            f"//v1/predict?model={name}",
            f"/v1/./predict?model={name}",
            f"/-/../v1/predict?model={name}",
            f"/healthz/../v1/predict?model={name}",
            f"/v2/models/{name}/infer",
            f"/v2/models/{name}/versions/1/infer",
            f"/v2/models/mine/../{name}/infer",
            f"/v2/models/mine%2f..%2f{name}/infer",
            f"/v2/models/{name}",
            f"/v2/models/{name}/ready",
            f"/v2/models//{name}",
            "/v1/models",
            f"http://localhost/v1/predict?model={name}",
            f"/v1/predict#?model={name}",
        ]
    )
    more = draw.sample(
        [
            f"serve_multiplexed_model_id: {theirs}",
            f"serve-multiplexed-model-id: {theirs}",
            f"X-Eagleray-Passport: {json.dumps({'tenant': 'theirs', 'models': ['*'], 'actions': ['*']})}",
            "X-Eagleray-Tenant: theirs",
            f"X-Original-URL: /v1/predict?model={theirs}",
            f"X-Rewrite-URL: /v1/predict?model={theirs}",
            "X-HTTP-Method-Override: POST",
            "X-Forwarded-For: 127.0.0.1",
            "X-Session-Id: theirs",
            f"X-Request-Id: {'a' * 20}",
            "X-Request-Timeout-Seconds: 0",
            f"Cookie: key={theirs_key[:40]}",
            "Content-Type: image/jpeg",
        ],
        draw.randint(0, 4),
    )
    mine, other = key.split("_"), theirs_key.split("_")
    tried = draw.choice(
        [
            *[key] * 9,
            "",
            f"er_{other[1]}_{mine[2]}",
            f"er_{mine[1]}_{other[2]}",
            theirs_key[:-1],
            theirs_key.upper(),
            theirs_key + " " + key,
            f"{other[1]}:{other[2]}",
            f"er_{other[1]}_{other[2][:-1]}{'0' if other[2][-1] != '0' else '1'}",
        ]
    )
    method = draw.choice(["POST", "POST", "POST", "GET", "PUT", "PATCH", "OPTIONS", "HEAD"])
    return f"{method} {path} HTTP/1.1", more, tried


def _spelled(draw: random.Random, name: str) -> str:
    return draw.choice(
        [
            name,
            name,
            quote(name),
            "".join(f"%{ord(letter):02x}" for letter in name),
            name.upper(),
            name + "%00",
            name + "%20",
            "%20" + name,
            name + ".",
            name + "%2f",
            f"mine%00{name}",
            f"mine,{name}",
            f"*{name}",
            "*",
            "%2a",
            f"..%2f{name}",
            f"{name}%0d%0ax-a:%20b",
        ]
    )


# Slow clients


def put_to_slow_clients(
    target: Target, *, heads: int, bodies: int, is_well: Callable[[], bool], limit_s: float
) -> tuple[Counter[int], int]:
    """Holds connections by heads and bodies of a byte now and then, and asks meanwhile whether the service is well.

    Args:
        heads: Connections that never finish their head.
        bodies: Connections that never finish their body.
        is_well: Asks something good.
        limit_s: When everything must have been answered or closed.

    Returns:
        Count of the slow ones by status (0: closed without an answer), and how often the service was asked.
    """
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(target.connected()) for _ in range(heads + bodies)]
        for client in slow[:heads]:
            client.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\n")
        for client in slow[heads:]:
            client.sendall(target.head("POST /v1/predict HTTP/1.1", "Content-Length: 100000") + b"x")
        seen, open_ones, asked, until = Counter[int](), dict.fromkeys(slow, b""), 0, time.monotonic() + limit_s
        for client in slow:
            client.settimeout(0.001)
        while open_ones and time.monotonic() < until:
            assert is_well()
            asked += 1
            for place, client in enumerate(list(open_ones)):
                with contextlib.suppress(OSError):
                    client.send(b"x-a: b\r\n" if place % 2 else b"x")
                try:
                    piece = client.recv(4096)
                    open_ones[client] += piece
                except TimeoutError:
                    continue
                except OSError:
                    piece = b""
                if not piece:
                    seen[split(open_ones.pop(client))[0]] += 1
        assert not open_ones, f"{len(open_ones)} slow connections are held after {limit_s} s"
        return seen, asked


# Large bodies


def put_to_a_gigabyte(target: Target, *, is_chunked: bool, key: str | None = None) -> tuple[int, int]:
    """Sends 1 GiB, as a client that looks at no answer before it is done.

    Returns:
        The status, and how many bytes the connection took before it was closed.
    """
    size, sent, piece = 1 << 30, 0, b"x" * PIECE
    length = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {size}"
    framed = b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece
    with target.connected() as client:
        client.sendall(target.head("POST /v1/predict HTTP/1.1", length, key=key))
        with contextlib.suppress(OSError):
            while sent < size:
                client.sendall(framed)
                sent += PIECE
        return split(read_all(client))[0], sent
