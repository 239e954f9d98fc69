"""What the gateway lets through, what it refuses and with what, and what of a request the app sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from eagleray.serving.access import KeyFile, KeyRequest, create_key
from eagleray.serving.concurrency import ConcurrencyLimit
from eagleray.serving.gateway import Gateway
from eagleray.serving.passport import Passport, passport_of
from eagleray.serving.refusals import KINDS, Refusal, to_answer
from eagleray.serving.settings import ServingConfig
from eagleray.serving.telemetry import ADMISSIONS, BODY, REFUSALS, REQUEST, REQUESTS, MemoryMeter
from eagleray.serving.visits import Watch

MODELS = [{"name": "lite0", "bundle": "a"}, {"name": "other", "bundle": "b"}]
CAP = 10_000


@dataclass
class Answer:
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def header(self, name: str) -> str | None:
        found = [value.decode() for key, value in self.headers if key == name.encode()]
        assert len(found) <= 1, f"{name} stands {len(found)} times"
        return found[0] if found else None

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


@dataclass
class Client:
    """Drives an ASGI app as a server does, and counts what of the body was taken."""

    app: Any
    taken: int = 0
    client: tuple[str, int] = ("127.0.0.1", 5)

    def ask(self, method: str, path: str, *, headers: Any = (), chunks: Any = (), scheme: str = "http") -> Answer:
        return asyncio.run(self.asked(method, path, headers=headers, chunks=chunks, scheme=scheme))

    async def asked(self, method: str, path: str, *, headers: Any, chunks: Any, scheme: str = "http") -> Answer:
        answer, parts = Answer(), list(chunks)
        path, _, query = path.partition("?")
        names = {name for name, _ in headers}
        pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        if parts and "content-length" not in names and "transfer-encoding" not in names:
            pairs.append((b"content-length", str(sum(len(p) for p in parts if isinstance(p, bytes))).encode()))
        if "host" not in names:
            pairs.append((b"host", b"localhost:8000"))
        pending = iter([*parts] or [b""])
        last = len(parts) or 1
        done = asyncio.Event()

        async def receive() -> dict[str, Any]:
            nonlocal last
            part = next(pending, None)
            if part is None:
                await done.wait()
                return {"type": "http.disconnect"}
            if callable(part):
                return await part()
            last -= 1
            self.taken += len(part)
            return {"type": "http.request", "body": part, "more_body": last > 0}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                assert answer.status == 0, "two answers"
                answer.status, answer.headers = message["status"], list(message["headers"])
            else:
                answer.body += message.get("body", b"")
                if not message.get("more_body"):
                    done.set()

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": pairs,
            "client": self.client,
            "scheme": scheme,
            "state": {},
        }
        await self.app(scope, receive, send)
        return answer


@dataclass
class App:
    """An app that says what it saw."""

    seen: list[dict[str, Any]] = field(default_factory=list)
    images: int = 1

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert message.get("more_body") is False
        self.seen.append({**scope, "body": message["body"]})
        headers = [(b"content-type", b"application/json"), (b"x-eagleray-images", str(self.images).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})


def configured(tmp_path: Path, **more: Any) -> ServingConfig:
    limits = {"max_body_bytes": CAP, "body_timeout_s": 0.2, **more.pop("limits", {})}
    access = more.pop("access", {"auth": "keys", "keys_file": str(tmp_path / "keys.json")})
    return ServingConfig.model_validate({"models": MODELS, "limits": limits, "access": access, **more})


@pytest.fixture
def meter() -> MemoryMeter:
    return MemoryMeter()


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "keys.json"
    made = {
        "all": KeyRequest(tenant="acme", actions=("*",)),
        "one": KeyRequest(tenant="solo", models=("other",), actions=("predict",)),
        "slow": KeyRequest(tenant="slow", images_per_s=0.001, burst=2),
    }
    return {name: create_key(path, request)[1] for name, request in made.items()}


@pytest.fixture
def client(tmp_path: Path, keys, app: App, meter: MemoryMeter) -> Client:
    config = configured(tmp_path)
    return Client(Gateway(app, config=config, keys=KeyFile(tmp_path / "keys.json"), watch=Watch(meter=meter)))


def key(value: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {value}"), *more]


def test_what_is_let_through_has_a_passport_and_no_secret(client: Client, keys, app: App) -> None:
    more = [("content-type", "image/jpeg"), ("cookie", "a=b"), ("x-api-key", keys["all"])]
    answer = client.ask("POST", "/v1/predict?model=lite0", headers=key(keys["all"], *more), chunks=[b"ab", b"cd"])
    assert answer.status == 200
    (seen,) = app.seen
    assert seen["body"] == b"abcd"
    passport = passport_of(seen)
    assert passport == Passport(
        tenant="acme",
        request_id=answer.header("x-request-id"),
        model="lite0",
        models=("*",),
        actions=("*",),
        trace=passport.trace,
        key_id=keys["all"].split("_")[1],
        arrived_s=passport.arrived_s,
    )
    said = dict(seen["headers"])
    assert said[b"content-length"] == b"4"
    assert keys["all"].rsplit("_", 1)[1].encode() not in repr(seen).encode()
    assert {b"authorization", b"x-api-key", b"cookie", b"transfer-encoding"}.isdisjoint(said)
    assert answer.header("x-eagleray-images") is None


@pytest.mark.parametrize(
    "name",
    [
        *("x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id", "serve_multiplexed_model_id"),
        *("serve-multiplexed-model-id", "x-eagleray-images", "x_session_id", "x-eagleray-anything"),
    ],
)
def test_a_client_cannot_steer_serve(client: Client, keys, app: App, name: str) -> None:
    client.ask("POST", "/v1/predict", headers=key(keys["all"], (name, "0")), chunks=[b"x"])
    said = [value for got, value in app.seen[0]["headers"] if got == name.encode()]
    assert said == ([b"11"] if name == "x-request-timeout-seconds" else [])  # ours: the deadline and a second


def test_nobody_is_let_in_without_a_gateway() -> None:
    with pytest.raises(Refusal) as caught:
        passport_of({"type": "http", "headers": [], "state": {"eagleray": {"tenant": "acme"}}})
    assert caught.value.status == 401


@pytest.mark.parametrize(
    ("method", "path", "who", "status", "code"),
    [
        ("POST", "/v1/predict", None, 401, "missing_key"),
        ("GET", "/v1/models", None, 401, "missing_key"),
        ("GET", "/nowhere", None, 401, "missing_key"),
        ("POST", "/", None, 401, "missing_key"),
        ("POST", "/v1/predict", "er_000000000000_" + "0" * 64, 401, "wrong_key"),
        ("POST", "/v1/predict?model=lite0", "one", 403, "forbidden_model"),
        ("POST", "/v1/predict?model=missing", "one", 403, "forbidden_model"),  # tells not whether there is one
        ("POST", "/v1/predict", "one", 403, "forbidden_model"),  # the default model is lite0
        ("POST", "/v2/models/lite0/infer", "one", 403, "forbidden_model"),
        ("GET", "/v2/models/lite0", "one", 403, "forbidden_model"),
        ("POST", "/v2/models/lite0/versions/1/infer", "one", 403, "forbidden_model"),
        ("POST", "/v1/embed?model=other", "one", 403, "forbidden_action"),
        ("GET", "/-/routes", "all", 404, "unknown_path"),
        ("GET", "/-/routes", None, 404, "unknown_path"),
    ],
)
def test_who_may_not_ask_is_told_so_before_a_byte_is_read(client, keys, app, method, path, who, status, code) -> None:
    headers = key(keys.get(who, who)) if who else []
    answer = client.ask(method, path, headers=headers, chunks=[b"x" * 100] if method == "POST" else [])
    assert (answer.status, client.taken, app.seen) == (status, 0, [])
    if path.startswith("/v2"):
        assert set(answer.json) == {"error"}
        assert answer.header("content-type") == "application/json"
    else:
        assert answer.header("content-type") == "application/problem+json"
        problem = answer.json
        assert problem["code"] == code
        assert problem["status"] == status
        assert problem["request_id"] == answer.header("x-request-id")
        assert problem["instance"] == path.partition("?")[0]


@pytest.mark.parametrize(
    "path", ["/", "/openapi.json", "/healthz", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready", "/-/healthz"]
)
def test_health_and_documents_need_no_key_and_bring_no_passport(client: Client, app: App, path: str) -> None:
    assert client.ask("GET", path).status == 200
    assert "eagleray" not in app.seen[0]["state"]
    assert client.ask("HEAD", path).status == 200


def test_a_body_is_cut_by_its_declared_size_before_it_is_read(client: Client, keys, app: App) -> None:
    answer = client.ask(
        "POST", "/v1/predict", headers=key(keys["all"], ("content-length", str(1 << 30))), chunks=[b"x"]
    )
    assert (answer.status, answer.json["code"], client.taken, app.seen) == (413, "too_large", 0, [])
    assert answer.header("connection") == "close"


def test_a_body_without_a_size_is_cut_while_it_arrives(client: Client, keys, app: App) -> None:
    chunks = [b"x" * 1_000] * 1_000
    answer = client.ask(
        "POST", "/v1/predict", headers=key(keys["all"], ("transfer-encoding", "chunked")), chunks=chunks
    )
    assert (answer.status, app.seen) == (413, [])
    assert client.taken == CAP + 1_000  # the piece that went over it was the last
    assert answer.header("connection") == "close"


def test_a_body_of_just_the_limit_is_taken(client: Client, keys, app: App) -> None:
    assert client.ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x" * CAP]).status == 200
    assert len(app.seen[0]["body"]) == CAP


def test_a_small_refused_body_keeps_its_connection(client: Client) -> None:
    answer = client.ask("POST", "/v1/predict", chunks=[b"x" * 100])
    assert answer.status == 401
    assert answer.header("connection") is None


def test_a_slow_body_is_given_up(client: Client, keys, app: App) -> None:
    async def never() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    headers = key(keys["all"], ("content-length", "9"))
    answer = client.ask("POST", "/v1/predict", headers=headers, chunks=[b"x", never])
    assert (answer.status, answer.json["code"], app.seen) == (408, "body_too_slow", [])
    assert answer.header("connection") == "close"


def test_a_client_that_goes_is_counted_and_asks_nobody(client: Client, keys, app: App, meter: MemoryMeter) -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    headers = key(keys["all"], ("content-length", "9"))
    assert client.ask("POST", "/v1/predict", headers=headers, chunks=[b"x", gone]).status == 0
    assert app.seen == []
    assert meter.number(REQUESTS, status="499") == 1


@pytest.mark.parametrize(
    "headers",
    [
        [("content-length", "1"), ("transfer-encoding", "chunked")],
        [("content-length", "1"), ("content-length", "2")],
        [("content-length", "-1")],
        [("content-length", "1e3")],
        [("content-length", "9" * 30)],
    ],
)
def test_a_request_that_could_be_read_in_two_ways_is_refused(client: Client, keys, app: App, headers) -> None:
    answer = client.ask("POST", "/v1/predict", headers=key(keys["all"], *headers), chunks=[b"x"])
    assert (answer.status, answer.json["code"], app.seen) == (400, "bad_request", [])


@pytest.mark.parametrize(
    ("path", "kind", "status"),
    [
        ("/v1/predict", "image/jpeg", 200),
        ("/v1/predict", "IMAGE/PNG; x=y", 200),
        ("/v1/predict", "multipart/form-data; boundary=x", 200),
        ("/v1/predict", "application/json", 200),
        ("/v1/predict", "", 200),
        ("/v1/predict", "text/html", 415),
        ("/v1/predict", "application/xml", 415),
        ("/v2/models/lite0/infer", "application/octet-stream", 200),
        ("/v2/models/lite0/infer", "image/jpeg", 415),
    ],
)
def test_only_what_is_read_is_taken(client: Client, keys, path: str, kind: str, status: int) -> None:
    headers = key(keys["all"], *([("content-type", kind)] if kind else []))
    answer = client.ask("POST", path, headers=headers, chunks=[b"x"])
    assert answer.status == status
    assert client.taken == (1 if status == 200 else 0)
    if status == 415:
        assert answer.header("accept")


def test_what_takes_no_body_is_given_none(client: Client, keys, app: App) -> None:
    headers = key(keys["all"], ("content-length", "1000000"))
    answer = client.ask("GET", "/v1/models", headers=headers, chunks=[b"x" * 100])
    assert (answer.status, app.seen[0]["body"], client.taken) == (200, b"", 0)
    assert answer.header("connection") == "close"  # the rest would be swallowed, not refused


def test_all_bodies_together_have_a_budget(tmp_path: Path, keys, app: App) -> None:
    config = configured(
        tmp_path, limits={"max_body_bytes": 1 << 20, "max_buffered_bytes": 1 << 20, "body_timeout_s": 5}
    )
    gateway = Gateway(app, config=config, keys=KeyFile(tmp_path / "keys.json"))
    headers = key(keys["all"], ("content-length", "700001"))

    async def two() -> tuple[Answer, Answer, Answer]:
        hold = asyncio.Event()

        async def held() -> dict[str, Any]:
            await hold.wait()
            return {"type": "http.disconnect"}

        first = asyncio.ensure_future(
            Client(gateway).asked("POST", "/v1/predict", headers=headers, chunks=[b"x" * 700_000, held])
        )
        await asyncio.sleep(0)
        second = await Client(gateway).asked("POST", "/v1/predict", headers=headers, chunks=[b"x" * 700_001])
        hold.set()
        gone = await first
        third = await Client(gateway).asked("POST", "/v1/predict", headers=headers, chunks=[b"x" * 700_001])
        return gone, second, third

    first, second, third = asyncio.run(two())
    assert (first.status, second.status, third.status) == (0, 503, 200)
    assert second.header("retry-after") == "1"


def uploads_beside(gateway: Gateway, held: list[tuple[str, bytes]], who: str, size: int) -> Answer:
    """One upload while others, of 1 MiB each as they say, have sent some bytes and no more."""

    async def run() -> Answer:
        hold = asyncio.Event()

        async def wait() -> dict[str, Any]:
            await hold.wait()
            return {"type": "http.disconnect"}

        begun = [
            asyncio.ensure_future(
                Client(gateway).asked(
                    "POST", "/v1/predict", headers=key(whose, ("content-length", str(1 << 20))), chunks=[sent, wait]
                )
            )
            for whose, sent in held
        ]
        await asyncio.sleep(0)
        answer = await Client(gateway).asked("POST", "/v1/predict", headers=key(who), chunks=[b"x" * size])
        hold.set()
        await asyncio.gather(*begun)
        return answer

    return asyncio.run(run())


def test_a_body_that_is_announced_and_does_not_come_takes_nothing(tmp_path: Path, keys, app: App) -> None:
    limits = {"max_body_bytes": 1 << 20, "max_buffered_bytes": 4 << 20, "body_timeout_s": 5}
    gateway = Gateway(app, config=configured(tmp_path, limits=limits), keys=KeyFile(tmp_path / "keys.json"))
    assert uploads_beside(gateway, [(keys["all"], b"x")] * 32, keys["all"], 1_000_000).status == 200


def test_one_tenants_uploads_leave_room_for_those_of_others(tmp_path: Path, keys, app: App) -> None:
    limits = {"max_body_bytes": 1 << 20, "max_buffered_bytes": 8 << 20, "body_timeout_s": 5}
    gateway = Gateway(app, config=configured(tmp_path, limits=limits), keys=KeyFile(tmp_path / "keys.json"))
    held = [(keys["all"], b"x" * 1_000_000)] * 32
    answer = uploads_beside(gateway, held, keys["all"], 1_000_000)
    assert (answer.status, answer.json["code"]) == (503, "overloaded")
    assert uploads_beside(gateway, held, keys["slow"], 1_000_000).status == 200


def test_a_tenant_over_its_rate_is_told_when_to_ask_again(client: Client, keys, app: App) -> None:
    statuses = [client.ask("POST", "/v1/predict", headers=key(keys["slow"]), chunks=[b"x"]).status for _ in range(4)]
    assert statuses == [200, 200, 429, 429]
    answer = client.ask("POST", "/v1/predict", headers=key(keys["slow"]), chunks=[b"x"])
    assert int(answer.header("retry-after") or 0) > 900
    assert client.ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"]).status == 200


def test_images_of_a_request_count_one_each(client: Client, keys, app: App) -> None:
    app.images = 2
    statuses = [client.ask("POST", "/v1/predict", headers=key(keys["slow"]), chunks=[b"x"]).status for _ in range(2)]
    assert statuses == [200, 429]


def quota_client(tmp_path: Path, app: Any) -> tuple[Client, str]:
    _, key_of = create_key(tmp_path / "keys.json", KeyRequest(tenant="day", images_per_day=64))
    return Client(Gateway(app, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))), key_of


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/predict", "multipart/form-data; boundary=x"),
        ("/v1/embed", "application/json"),
        ("/v2/models/lite0/infer", "application/octet-stream"),
        ("/v2/models/lite0/infer", ""),
    ],
)
def test_a_crowd_of_large_requests_stays_within_the_quota(tmp_path: Path, path: str, kind: str) -> None:
    app, hold = App(images=32), asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await hold.wait()
        await app(scope, receive, send)

    client, key_of = quota_client(tmp_path, slow)
    headers = key(key_of, *([("content-type", kind)] if kind else []))

    async def crowd() -> list[int]:
        asks = [
            asyncio.ensure_future(Client(client.app).asked("POST", path, headers=headers, chunks=[b"x"]))
            for _ in range(60)
        ]
        await asyncio.sleep(0.01)
        hold.set()
        return [answer.status for answer in await asyncio.gather(*asks)]

    statuses = asyncio.run(crowd())
    assert (statuses.count(200), statuses.count(429)) == (2, 58)


def test_what_a_request_did_not_hold_is_given_back(tmp_path: Path) -> None:
    app = App(images=1)
    client, key_of = quota_client(tmp_path, app)
    headers = key(key_of, ("content-type", "application/json"))
    statuses = [client.ask("POST", "/v1/predict", headers=headers, chunks=[b"x"]).status for _ in range(65)]
    assert (statuses.count(200), statuses[-1]) == (64, 429)


def test_who_goes_before_the_answer_has_had_it_all(tmp_path: Path) -> None:
    async def leave(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    client, key_of = quota_client(tmp_path, leave)
    headers = key(key_of, ("content-type", "application/json"), ("content-length", "1"))

    async def whole() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x", "more_body": False}

    statuses = [client.ask("POST", "/v1/predict", headers=headers, chunks=[whole, gone]).status for _ in range(3)]
    assert statuses == [0, 0, 429]


def test_who_goes_before_the_body_has_come_pays_for_one(tmp_path: Path, app: App) -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    client, key_of = quota_client(tmp_path, app)
    headers = key(key_of, ("content-type", "application/json"))
    for _ in range(63):
        client.ask("POST", "/v1/predict", headers=[*headers, ("content-length", "9")], chunks=[b"x", gone])
    statuses = [client.ask("POST", "/v1/predict", headers=headers, chunks=[b"x"]).status for _ in range(2)]
    assert statuses == [200, 429]


def test_ids_and_traces_of_the_client_are_kept_where_they_are_sound(client: Client, keys, app: App) -> None:
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    for given, kept in [("abcd-1234_X", True), ("short", False), ("x" * 65, False), ("a b c d e f", False)]:
        headers = key(keys["all"], ("x-request-id", given), ("traceparent", trace))
        answer = client.ask("POST", "/v1/predict", headers=headers, chunks=[b"x"])
        assert (answer.header("x-request-id") == given) is kept
        said = [value for name, value in app.seen[-1]["headers"] if name in (b"x-request-id", b"traceparent")]
        assert said[0].decode() == answer.header("x-request-id")
        assert said[1].startswith(b"00-" + b"a" * 32)
        assert b"b" * 16 not in said[1]  # the request is a span of its own


def test_every_answer_has_the_headers_that_keep_browsers_safe(client: Client, keys) -> None:
    for answer in (client.ask("GET", "/v1/models"), client.ask("GET", "/v1/models", headers=key(keys["all"]))):
        assert answer.header("x-content-type-options") == "nosniff"
        assert "default-src 'none'" in (answer.header("content-security-policy") or "")
        assert answer.header("strict-transport-security") is None
    assert client.ask("GET", "/healthz", scheme="https").header("strict-transport-security")


def test_a_head_gets_no_body(client: Client) -> None:
    answer = client.ask("HEAD", "/v1/models")
    assert (answer.status, answer.body) == (401, b"")
    assert int(answer.header("content-length") or 0) > 0


def test_websockets_are_closed(client: Client) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(client.app({"type": "websocket", "path": "/"}, None, send))
    assert sent[0]["type"] == "websocket.close"


def test_more_on_its_way_than_can_be_answered_in_time_is_refused_before_its_body(tmp_path: Path, keys) -> None:
    """The loop is one server of 5 ms a request and 400 come at once: the last would wait 2 s."""

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        async with busy:
            await asyncio.sleep(0.005)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"{}"})

    busy = asyncio.Lock()
    gateway = Gateway(slow, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))

    async def crowd() -> tuple[list[int], int]:
        clients = [Client(gateway) for _ in range(400)]
        answers = await asyncio.gather(
            *(one.asked("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"]) for one in clients)
        )
        page = await Client(gateway).asked("GET", "/v1/models", headers=key(keys["all"]), chunks=[])
        taken = sum(one.taken for one, answer in zip(clients, answers, strict=True) if answer.status == 503)
        assert page.status == 200
        return [answer.status for answer in answers], taken

    statuses, taken = asyncio.run(crowd())
    assert set(statuses) == {200, 503}
    assert 60 <= statuses.count(200) <= 70
    assert taken == 0


def test_what_is_on_its_way_is_judged_by_the_time_of_an_image(tmp_path: Path, keys, app: App, monkeypatch) -> None:
    told = []

    def end(self: ConcurrencyLimit, seconds: float | None, *, images: int = 1) -> None:
        told.append(images)

    monkeypatch.setattr(ConcurrencyLimit, "end", end)
    app.images = 32
    gateway = Gateway(app, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))
    Client(gateway).ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"])
    assert told == [32]


def test_an_answer_that_is_out_is_on_its_way_no_more(tmp_path: Path, keys) -> None:
    """Serve's proxy ends some time after the answer: it waits for the end of the replica's stream."""
    held, asked = asyncio.Event(), []

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": b"{}"})
        asked.append(scope)
        await held.wait()

    gateway = Gateway(late, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))

    async def many() -> None:
        clients = [
            asyncio.ensure_future(Client(gateway).asked("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"]))
            for _ in range(200)
        ]
        while len(asked) < 200:
            await asyncio.sleep(0)
            assert not any(client.done() for client in clients)
        held.set()
        assert {answer.status for answer in await asyncio.gather(*clients)} == {200}

    asyncio.run(asyncio.wait_for(many(), 20))


@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/predict"), ("GET", "/openapi.json")])
def test_a_client_that_does_not_read_its_answer_holds_no_place(tmp_path, keys, app: App, method, path) -> None:
    gateway = Gateway(app, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))

    async def whole() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x", "more_body": False}

    async def full(message: dict[str, Any]) -> None:
        await asyncio.Event().wait()  # the connection's buffer is full

    async def many() -> Answer:
        headers = [(b"authorization", f"Bearer {keys['all']}".encode()), (b"content-length", b"1")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "state": {}}
        held = [asyncio.ensure_future(gateway(dict(scope), whole, full)) for _ in range(200)]
        while len(app.seen) < 64:
            await asyncio.sleep(0)
        quick = await Client(gateway).asked(method, path, headers=key(keys["all"]), chunks=[b"x"])
        for one in held:
            one.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        return quick

    assert asyncio.run(asyncio.wait_for(many(), 20)).status == 200


def test_health_that_hangs_takes_a_fixed_number_of_places_and_none_of_a_keys(tmp_path: Path, keys) -> None:
    """Replicas hang: without a bound, who has no key would fill Serve's queue with GET /readyz."""
    asked: list[str] = []

    async def hanging(scope: Any, receive: Any, send: Any) -> None:
        asked.append(scope["path"])
        await hang.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    hang = asyncio.Event()
    gateway = Gateway(hanging, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))

    async def crowd() -> list[int]:
        def ask(method: str, path: str, count: int, **more: Any) -> list[asyncio.Future[Answer]]:
            asks = [Client(gateway).asked(method, path, **{"headers": [], "chunks": [], **more}) for _ in range(count)]
            return [asyncio.ensure_future(one) for one in asks]

        waiting = ask("GET", "/readyz", 500) + ask("GET", "/-/healthz", 200)
        waiting += ask("GET", "/v1/models", 1, headers=key(keys["all"]))
        waiting += ask("POST", "/v1/predict", 1, headers=key(keys["all"]), chunks=[b"x"])
        await asyncio.sleep(0.01)
        hang.set()
        answers = [answer.status for answer in await asyncio.gather(*waiting)]
        assert [answer.status for answer in await asyncio.gather(*ask("GET", "/readyz", 64))] == [200] * 64
        return answers

    statuses = asyncio.run(asyncio.wait_for(crowd(), 20))
    assert (statuses[:500].count(200), statuses[:500].count(503)) == (64, 436)
    assert set(statuses[500:]) == {200}


@pytest.mark.parametrize(("path", "said"), [("/readyz", b"2"), ("/", b"2"), ("/v1/models", b"11")])
def test_serve_ends_what_hangs_whoever_asked(client: Client, keys, app: App, path: str, said: bytes) -> None:
    client.ask("GET", path, headers=key(keys["all"], ("x-request-timeout-seconds", "999")))
    assert [value for name, value in app.seen[0]["headers"] if name == b"x-request-timeout-seconds"] == [said]


def test_a_slow_upload_holds_no_place(tmp_path: Path, keys, app: App) -> None:
    gateway = Gateway(app, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))
    headers = key(keys["all"], ("content-length", "9"))

    async def held() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def both() -> tuple[list[Answer], Answer]:
        slow = [
            asyncio.ensure_future(Client(gateway).asked("POST", "/v1/predict", headers=headers, chunks=[b"x", held]))
            for _ in range(200)
        ]
        await asyncio.sleep(0)
        quick = await Client(gateway).asked("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"])
        return await asyncio.gather(*slow), quick

    slow, quick = asyncio.run(both())
    assert quick.status == 200
    assert {answer.status for answer in slow} == {408}


# What Serve does around the app


def serve_says(status: int, *headers: tuple[bytes, bytes], text: bytes = b"Traceback: secret.py") -> Callable[..., Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        kinds = [(b"content-type", b"text/plain"), *headers]
        await send({"type": "http.response.start", "status": status, "headers": kinds})
        await send({"type": "http.response.body", "body": text})

    return app


@pytest.mark.parametrize(
    ("status", "headers", "ours", "code"),
    [
        (503, [(b"retry-after", b"7")], 503, "overloaded"),
        (408, [], 503, "deadline_passed"),
        (404, [], 404, "unknown_path"),
        (500, [], 500, "fault"),
    ],
)
def test_what_serve_says_itself_is_told_in_our_form(tmp_path, keys, meter, status, headers, ours, code) -> None:
    gateway = Gateway(
        serve_says(status, *headers),
        config=configured(tmp_path),
        keys=KeyFile(tmp_path / "keys.json"),
        watch=Watch(meter=meter),
    )
    answer = Client(gateway).ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"])
    assert (answer.status, answer.json["code"]) == (ours, code)
    assert b"secret" not in answer.body
    if headers:
        assert answer.header("retry-after") == "7"
    assert meter.number(REQUESTS, status=str(ours), model="lite0") == 1
    assert meter.number(REFUSALS, code=code) == 1


@pytest.mark.parametrize(("deaths", "status"), [(1, 200), (2, 503)])
def test_a_replica_that_dies_with_a_request_is_asked_again_once(tmp_path, keys, app: App, deaths, status) -> None:
    """Serve's proxy ends such a request without a message (http_util.py, send_http_response_on_exception)."""
    bodies = []

    async def dying(scope: Any, receive: Any, send: Any) -> None:
        if len(bodies) < deaths:
            bodies.append((await receive())["body"])
        else:
            await app(scope, receive, send)

    gateway = Gateway(dying, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))
    answer = Client(gateway).ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"abc"])
    assert answer.status == status
    assert bodies == [b"abc"] * deaths
    if status == 200:
        assert app.seen[0]["body"] == b"abc"
    else:
        assert answer.header("retry-after")


def test_serve_ends_a_late_request_by_cancelling_itself(tmp_path, keys) -> None:
    """replica.py, _direct_ingress_asgi: it sends its 408 and raises CancelledError in the middleware's own task."""
    says = serve_says(408)

    async def late(scope: Any, receive: Any, send: Any) -> None:
        await says(scope, receive, send)
        raise asyncio.CancelledError

    gateway = Gateway(late, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))
    answer = Client(gateway).ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"])
    assert (answer.status, answer.json["code"]) == (503, "deadline_passed")


def test_a_fault_of_the_app_is_said_without_its_inside(tmp_path, keys, caplog) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("the inside")

    gateway = Gateway(broken, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))
    answer = Client(gateway).ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"])
    assert (answer.status, answer.json["code"]) == (500, "fault")
    assert b"inside" not in answer.body
    assert "the inside" in caplog.text


def test_our_own_errors_pass_as_they_are(tmp_path, keys) -> None:
    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        status, headers, body = to_answer(Refusal("not_an_image", "x"), request_id="theirs", path="/v1/predict")
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    gateway = Gateway(refusing, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"))
    answer = Client(gateway).ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"])
    assert (answer.status, answer.json["code"]) == (422, "not_an_image")
    assert answer.header("x-request-id") != "theirs"


def test_every_request_is_counted_once_by_what_the_client_saw(client: Client, keys, meter: MemoryMeter) -> None:
    client.ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x" * 10])
    client.ask("POST", "/v1/predict?model=made-up", headers=key(keys["all"]), chunks=[b"x"])
    client.ask("POST", "/v1/predict", chunks=[b"x"])
    assert meter.number(REQUESTS) == 3
    assert meter.number(REQUESTS, model="lite0", route="predict", status="200") == 1
    assert meter.number(REQUESTS, model="none") == 1  # never what a client typed
    assert meter.number(REFUSALS, code="missing_key") == 1
    assert meter.number(ADMISSIONS, tenant="acme", outcome="admitted") == 2
    assert meter.number(ADMISSIONS, tenant="none", outcome="missing_key") == 1
    assert meter.distributions[REQUEST.name, ("lite0", "predict")].count == 1  # answers, not refusals
    assert meter.distributions[BODY.name, ("predict",)].total == 11


def test_the_time_of_a_slow_upload_is_not_the_services(client: Client, keys, meter: MemoryMeter) -> None:
    async def slow() -> dict[str, Any]:
        await asyncio.sleep(0.15)
        return {"type": "http.request", "body": b"y", "more_body": False}

    headers = key(keys["all"], ("content-length", "2"))
    assert client.ask("POST", "/v1/predict", headers=headers, chunks=[b"x", slow]).status == 200
    assert meter.distributions[REQUEST.name, ("lite0", "predict")].total < 0.15


@pytest.mark.parametrize(("most", "path", "said"), [(1, "", b"lite0"), (1, "?model=other", b"other"), (4, "", None)])
def test_serve_is_told_the_model_where_not_all_fit(tmp_path: Path, keys, app: App, most, path, said) -> None:
    config = configured(tmp_path, memory={"max_loaded_models": most})
    gateway = Gateway(app, config=config, keys=KeyFile(tmp_path / "keys.json"))
    headers = key(keys["all"], ("serve_multiplexed_model_id", "theirs"))
    Client(gateway).ask("POST", f"/v1/predict{path}", headers=headers, chunks=[b"x"])
    assert dict(app.seen[0]["headers"]).get(b"serve_multiplexed_model_id") == said


def test_a_meter_that_fails_costs_no_answer(tmp_path: Path, keys, app: App, caplog) -> None:
    class Broken(MemoryMeter):
        def add(self, *args: Any, **labels: str) -> None:
            raise RuntimeError("no registry")

    gateway = Gateway(
        app, config=configured(tmp_path), keys=KeyFile(tmp_path / "keys.json"), watch=Watch(meter=Broken())
    )
    assert Client(gateway).ask("POST", "/v1/predict", headers=key(keys["all"]), chunks=[b"x"]).status == 200
    assert "could not be counted" in caplog.text


# Without keys


@pytest.fixture
def open_client(tmp_path: Path, app: App) -> Client:
    return Client(Gateway(app, config=configured(tmp_path, access={"auth": "none"})))


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_without_keys_this_machine_may_ask(open_client: Client, app: App, host: str) -> None:
    headers = [("host", host), ("origin", f"http://{host}")]
    assert open_client.ask("POST", "/v1/predict", headers=headers, chunks=[b"x"]).status == 200
    assert passport_of(app.seen[0]).tenant == "local"


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ([("host", "evil.example")], "127.0.0.1"),  # a name that was rebound to this machine
        ([("host", "localhost.evil.example:8000")], "127.0.0.1"),
        ([("host", "localhost:8000"), ("origin", "http://evil.example")], "127.0.0.1"),
        ([("host", "localhost:8000"), ("origin", "null")], "127.0.0.1"),
        ([("host", "localhost:8000"), ("origin", "http://localhost:9000")], "127.0.0.1"),
        ([("host", "localhost:8000")], "10.0.0.7"),
        ([("host", "localhost:8000"), ("x-forwarded-for", "127.0.0.1")], "10.0.0.7"),
    ],
)
def test_without_keys_nobody_else_may(open_client: Client, app: App, headers, client: str) -> None:
    open_client.client = (client, 5)
    answer = open_client.ask("POST", "/v1/predict", headers=headers, chunks=[b"x"])
    assert (answer.status, answer.json["code"], app.seen) == (403, "forbidden_origin", [])


def test_keys_that_are_on_must_be_there(tmp_path: Path, app: App) -> None:
    with pytest.raises(ValueError, match="needs the keys"):
        Gateway(app, config=configured(tmp_path))


# The words


@pytest.mark.parametrize("code", KINDS)
def test_every_refusal_can_be_said_in_both_forms(code: str) -> None:
    refusal = Refusal(code, "why\u2028\ud800", extra={"status": 1})
    status, headers, body = to_answer(refusal, request_id="r-12345678", path="/v1/predict")
    problem = json.loads(body)
    assert problem["status"] == status == KINDS[code].status
    assert problem["type"] == f"urn:eagleray:problem:{code}"
    assert int(dict(headers)[b"content-length"]) == len(body)
    _, _, body = to_answer(refusal, request_id="r-12345678", path="/v2/models/x/infer")
    assert set(json.loads(body)) == {"error"}
