"""Real sockets against a real uvicorn: what a client can hold, and how much of a body is taken before it is refused."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from eagleray.serving import connections
from eagleray.serving.access import KeyFile, KeyRequest, create_key
from eagleray.serving.connections import READ_BYTES, GuardedProtocol
from eagleray.serving.gateway import Gateway
from eagleray.serving.settings import LimitsConfig, ServingConfig
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CAP = 256 * 1024
LOOPS = ("asyncio", "uvloop")  # a bare uvicorn, and Ray's workers


class Counted(GuardedProtocol):
    """Counts what is read from the sockets."""

    num_read = 0

    def buffer_updated(self, nbytes: int) -> None:
        Counted.num_read += nbytes
        super().buffer_updated(nbytes)


class Server:
    """A uvicorn in a thread."""

    def __init__(self, app: Any, protocol: type, loop: str, **more: Any) -> None:
        settings = {"log_level": "critical", "lifespan": "off", "ws": "none", **more}
        config = uvicorn.Config(app, port=0, http=protocol, loop=loop, **settings)
        self._server = uvicorn.Server(config)
        self._socket = config.bind_socket()
        self._socket.listen(128)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Says how long the body is."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    body = str(size).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    found = b""
    try:
        while piece := client.recv(65_536):
            found += piece
    except ConnectionResetError:
        pass
    return found


def read_answer(client: socket.socket) -> tuple[int, bytes]:
    """One answer; its connection stays."""
    found = b""
    while b"\r\n\r\n" not in found:
        piece = client.recv(65_536)
        assert piece, f"the connection ended after {found!r}"
        found += piece
    head, _, body = found.partition(b"\r\n\r\n")
    size = next(int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    while len(body) < size:
        body += client.recv(65_536)
    return int(head.split()[1]), body


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> LimitsConfig:
    found = LimitsConfig(head_timeout_s=0.3, max_head_bytes=4096, max_connections=20, max_body_bytes=CAP)
    monkeypatch.setattr(connections, "_limits", found)
    return found


@pytest.fixture(params=LOOPS)
def server(request: pytest.FixtureRequest, limits: LimitsConfig) -> Iterator[Server]:
    made = Server(echo, GuardedProtocol, request.param)
    yield made
    made.stop()


def test_requests_are_answered_one_after_another_on_one_connection(server: Server) -> None:
    with server.connect() as client:
        for size in (0, 1, READ_BYTES, READ_BYTES + 1, 1_000_000):
            client.sendall(f"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode() + b"x" * size)
            assert read_answer(client) == (200, str(size).encode())
        pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [b"a" * 7] * 50_000) + b"0\r\n\r\n"
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + pieces)
        assert read_answer(client) == (200, b"350000")
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 3)  # pipelined
        assert read_all_of(client, b"HTTP/1.1 200", 3)


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_of_requests_is_answered_as_uvicorn_does_however_it_is_cut(limits: LimitsConfig, seed: int) -> None:
    draw = random.Random(seed)
    stream = b""
    for _ in range(40):
        size = draw.choice([0, 1, 10, 5_000, 70_000])
        if draw.random() < 0.4:
            parts = [b"y" * draw.randint(1, 3_000) for _ in range(draw.randint(1, 30))]
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
            stream += b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + body
        else:
            stream += b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + b"z" * size
    stream += b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    cuts = sorted(draw.sample(range(len(stream)), 60))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    answers = []
    for protocol in (GuardedProtocol, HttpToolsProtocol):
        server = Server(echo, protocol, "uvloop")
        try:
            with server.connect() as client:
                for piece in pieces:
                    client.sendall(piece)
                answers.append(re.sub(rb"date: [^\r]*", b"", read_all(client)))
        finally:
            server.stop()
    assert answers[0] == answers[1]
    assert answers[0].count(b"HTTP/1.1 200") == 41


def read_all_of(client: socket.socket, word: bytes, times: int) -> bool:
    found = b""
    while found.count(word) < times:
        piece = client.recv(65_536)
        if not piece:
            return False
        found += piece
    return True


@pytest.mark.parametrize("sent", [b"POST / HT", b"POST / HTTP/1.1\r\nhost: x\r\nx-a: b\r\n"])
def test_a_head_that_does_not_come_to_its_end_is_given_up(server: Server, sent: bytes) -> None:
    with server.connect() as client:
        client.sendall(sent)
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"application/problem+json" in answer


def test_a_head_a_byte_at_a_time_is_given_up_all_the_same(server: Server) -> None:
    with server.connect() as client:
        client.settimeout(0.02)
        answer = b""
        for byte in b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x-a: b\r\n" * 100:
            try:
                client.send(bytes([byte]))
                answer += client.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                break
            if answer:
                break
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_a_connection_on_which_nothing_comes_is_closed(limits: LimitsConfig, sent: bytes) -> None:
    """uvicorn waits for a first head without end, and stops its keep-alive clock at an empty line."""
    server = Server(echo, GuardedProtocol, "asyncio")
    try:
        with server.connect() as client:
            client.sendall(sent)
            if sent.startswith(b"GET"):
                assert read_answer(client)[0] == 200
                client.sendall(b"\r\n")
            assert read_all(client) == b""
    finally:
        server.stop()


@pytest.mark.parametrize("size", [5_000, 100_000, 10_000_000])
def test_a_head_that_is_too_large_is_refused(server: Server, size: int) -> None:
    with server.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx-a: " + b"b" * size + b"\r\n\r\n")
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 431 ") or (size > 1_000_000 and answer == b"")


def test_the_body_before_a_pipelined_head_is_no_part_of_it(server: Server) -> None:
    """The end of a body and the beginning of the next head come in one read."""
    with server.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 20000\r\n\r\n" + b"x" * 20_000 + b"GET / HT")
        assert read_answer(client) == (200, b"20000")
        client.sendall(b"TP/1.1\r\nhost: x\r\n\r\n")
        assert read_answer(client) == (200, b"0")


@pytest.mark.parametrize("trailer", [b"x-a: " + b"b" * 1_000_000, b"x-a: b\r\n" * 100_000])
def test_trailers_have_the_limit_of_a_head(server: Server, trailer: bytes) -> None:
    with server.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n")
            for start in range(0, len(trailer), 1000):
                client.sendall(trailer[start : start + 1000])
        assert read_all(client).startswith(b"HTTP/1.1 431 ")
    with server.connect() as client:
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-a: b\r\n\r\n")
        assert read_answer(client) == (200, b"1")


def test_what_is_no_http_is_refused_in_our_form(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"application/problem+json" in answer


def test_one_connection_too_many_is_refused_and_the_others_work(server: Server, limits: LimitsConfig) -> None:
    held = [server.connect() for _ in range(limits.max_connections)]
    for client in held:
        client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert read_answer(client)[0] == 200
    with server.connect() as client:
        assert read_all(client).startswith(b"HTTP/1.1 503 ")
    held[0].sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert read_answer(held[0])[0] == 200
    for client in held:
        client.close()


def test_the_rest_of_a_body_that_nobody_reads_cannot_be_sent_for_ever(limits: LimitsConfig) -> None:
    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    server = Server(refuse, GuardedProtocol, "asyncio")
    try:
        with server.connect() as client:
            client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\nx")
            assert read_answer(client)[0] == 401
            assert read_all(client) == b""
        with server.connect() as client:  # one that comes keeps its connection
            for _ in range(2):
                client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 60000\r\n\r\n" + b"x" * 60_000)
                assert read_answer(client)[0] == 401
    finally:
        server.stop()


class Unlimited(GuardedProtocol):
    """Is never told that a client does not read: as when what is unsent is less than a transport's limit."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1 << 30)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("protocol", [GuardedProtocol, Unlimited])
def test_a_client_that_never_reads_its_answers_is_cut(limits: LimitsConfig, monkeypatch, protocol, loop: str) -> None:
    """uvicorn waits for it without end, and a close waits for what is unsent."""
    ended, piece = threading.Semaphore(0), b"x" * (1 << 20)

    async def large(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"content-length", str(16 * len(piece)).encode()), (b"connection", b"close")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": head})
            for left in reversed(range(16)):
                await send({"type": "http.response.body", "body": piece, "more_body": left > 0})
        finally:
            ended.release()

    class Told(protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            ended.release()

    server = Server(large, Told, loop)
    try:
        with server.connect() as client:  # one that reads has it all
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert len(read_all(client)) > 16 << 20
        assert ended.acquire(timeout=20)
        assert ended.acquire(timeout=20)
        monkeypatch.setattr(connections, "_limits", limits.model_copy(update={"body_timeout_s": 0.3}))
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
            for _ in range(2):
                assert ended.acquire(timeout=20), "the app, or the connection, is held"
    finally:
        server.stop()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate of this machine, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(private)
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.mark.parametrize("loop", LOOPS)
def test_it_is_the_same_under_tls(limits: LimitsConfig, certificate: tuple[str, str], loop: str) -> None:
    cert, key = certificate
    server = Server(echo, GuardedProtocol, loop, ssl_certfile=cert, ssl_keyfile=key)
    context = ssl.create_default_context(cafile=cert)
    try:
        with context.wrap_socket(server.connect(), server_hostname="localhost") as client:
            for size in (0, 1, 48_000, READ_BYTES + 1, 3_000_000):
                client.sendall(f"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode() + b"x" * size)
                assert read_answer(client) == (200, str(size).encode())
        with context.wrap_socket(server.connect(), server_hostname="localhost") as client:
            client.sendall(b"POST / HT")
            assert read_all(client).startswith(b"HTTP/1.1 408 ")
    finally:
        server.stop()


# How much of an upload is read


@pytest.fixture
def guarded(tmp_path: Path, limits: LimitsConfig) -> tuple[Gateway, bytes]:
    _, key = create_key(tmp_path / "keys.json", KeyRequest(tenant="acme"))
    config = ServingConfig.model_validate(
        {
            "models": [{"name": "lite0", "bundle": "a"}],
            "limits": limits.model_dump() | {"body_timeout_s": 20},
            "access": {"auth": "keys", "keys_file": str(tmp_path / "keys.json")},
        }
    )
    return Gateway(echo, config=config, keys=KeyFile(tmp_path / "keys.json")), key.encode()


def upload(server: Server, head: bytes, piece: bytes, most: int) -> bytes:
    """Sends until the server has enough, as a client that does not look at answers would."""
    with server.connect() as client:
        client.sendall(head)
        try:
            for _ in range(most // len(piece)):
                client.sendall(piece)
        except OSError:
            pass
        return read_all(client)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["declared", "chunked", "no key"])
def test_a_gigabyte_is_refused_after_the_limit_and_64_kb(guarded: tuple[Gateway, bytes], loop: str, how: str) -> None:
    """Measured at the socket: everything that the process has read of this connection, its head too."""
    gateway, key = guarded
    Counted.num_read = 0
    server = Server(gateway, Counted, loop)
    size = 1 << 30
    head = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\n" + (b"" if how == "no key" else b"x-api-key: " + key + b"\r\n")
    piece = b"x" * READ_BYTES
    if how == "chunked":
        head += b"transfer-encoding: chunked\r\n\r\n"
        piece = b"%x\r\n%s\r\n" % (len(piece), piece)
    else:
        head += b"content-length: %d\r\n\r\n" % size
    try:
        answer = upload(server, head, piece, size)
    finally:
        server.stop()
    assert answer.startswith(b"HTTP/1.1 401 " if how == "no key" else b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert Counted.num_read <= (CAP if how == "chunked" else 0) + READ_BYTES + len(head) + READ_BYTES // 8


def test_expect_100_continue_is_refused_before_anything_is_sent(guarded: tuple[Gateway, bytes]) -> None:
    gateway, key = guarded
    server = Server(gateway, GuardedProtocol, "asyncio")
    head = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\nx-api-key: " + key + b"\r\nexpect: 100-continue\r\n"
    try:
        with server.connect() as client:
            client.sendall(head + b"content-length: %d\r\n\r\n" % (1 << 30))
            assert read_all(client).startswith(b"HTTP/1.1 413 ")
        with server.connect() as client:
            client.sendall(head + b"content-length: 3\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 100 ")
            client.sendall(b"abc")
            assert read_answer(client) == (200, b"3")
    finally:
        server.stop()


def test_uvicorn_alone_reads_on(limits: LimitsConfig) -> None:
    """Why all this: the same server without the gateway has read everything that was sent, whatever the app wants."""

    class Naive(HttpToolsProtocol):
        num_read = 0

        def data_received(self, data: bytes) -> None:
            Naive.num_read += len(data)
            super().data_received(data)

    async def eager(scope: Any, receive: Any, send: Any) -> None:
        """Puts all that comes into a queue, as Serve's proxy_asgi_receive does."""
        queue = [await receive()]
        while queue[-1].get("more_body"):
            queue.append(await receive())
        await send({"type": "http.response.start", "status": 413, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    server = Server(eager, Naive, "asyncio")
    try:
        head = b"POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 8388608\r\n\r\n"
        upload(server, head, b"x" * READ_BYTES, 8 << 20)
    finally:
        server.stop()
    assert Naive.num_read > 8 << 20


def test_install_reaches_servers_that_others_make(limits: LimitsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    connections.install(limits)
    config = uvicorn.Config(echo, lifespan="off")
    config.load()
    assert config.http_protocol_class is GuardedProtocol
