"""The HTTP side around a real little model: every answer, every refusal, and what is told of them afterwards."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from eagleray.serving.app import build_app
from eagleray.serving.exchanges import Exchange
from eagleray.serving.passport import STATE_KEY, Passport
from eagleray.serving.refusals import PROBLEM_TYPE, deadline_passed, overloaded
from eagleray.serving.routes_pages import PAGE, content_policy
from eagleray.serving.settings import LimitsConfig
from eagleray.serving.telemetry import DECISIONS, IMAGES, REFUSALS, REQUESTS, MemoryMeter
from eagleray.serving.traces import Span, TraceContext
from starlette.testclient import TestClient
from starlette.types import Scope

from tests.serving_service import DirectService, direct_service, local_passport
from tests.tiny_model import make_bundle

JPEG = {"content-type": "image/jpeg"}


@pytest.fixture(scope="module")
def bundles(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_model, make_bundle(tmp_path_factory.mktemp("model") / "second", seed=8)


@pytest.fixture
def service(bundles: tuple[Path, Path]) -> DirectService:
    return direct_service(*bundles)


@pytest.fixture
def client(service: DirectService) -> TestClient:
    return client_of(service)


@pytest.fixture(scope="module")
def photo(make_photo: Callable[..., bytes]) -> bytes:
    return make_photo(3)


def client_of(service: DirectService, **settings: Any) -> TestClient:
    return TestClient(build_app(service, **{"passport": local_passport, **settings}), raise_server_exceptions=False)


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM_TYPE), answer.text
    body = answer.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


def test_one_image_is_answered_as_the_classifier_says(client: TestClient, service: DirectService, photo: bytes) -> None:
    answer = client.post("/v1/predict", content=photo, headers=JPEG)
    expected = service.classifiers["tiny"].predict([photo])[0]
    body = answer.json()
    assert answer.status_code == 200
    assert (body["label"], body["label_name"], body["score"]) == (expected.label, expected.label_name, expected.score)
    assert [(entry["label"], entry["score"]) for entry in body["topk"]] == list(expected.topk)
    assert (body["decision"], body["status"], body["reason"]) == (expected.decision, "scored", None)
    assert body["model"] == {
        "name": "tiny",
        "version": expected.model_digest[:12],
        "digest": expected.model_digest,
        "policy": None,
    }
    assert body["timing_ms"] == {"queue": 0.25, "decode": 0.5, "infer": 1.0, "batch_size": 1}
    assert body["request_id"] == answer.headers["x-request-id"] == "request-1"
    assert answer.headers["x-eagleray-images"] == "1"
    assert answer.headers["cache-control"] == "no-store"


def test_every_form_of_upload_gives_the_same_answer(client: TestClient, photo: bytes) -> None:
    text = base64.b64encode(photo).decode()
    raw = client.post("/v1/predict", content=photo, headers={"content-type": "application/octet-stream"}).json()
    untyped = client.post("/v1/predict", content=photo).json()
    encoded = client.post("/v1/predict", json={"image": text}).json()
    several = client.post("/v1/predict", json={"images": [text]}).json()
    form = client.post("/v1/predict", files=[("file", ("a.jpg", photo))]).json()
    assert raw == untyped == encoded
    assert several["predictions"] == form["predictions"] == [{k: raw[k] for k in several["predictions"][0]}]
    assert several["model"] == raw["model"]


def test_a_bad_image_among_several_is_quarantined_alone(client: TestClient, photo: bytes) -> None:
    files = [("a", ("a", photo)), ("b", ("b", b"not an image")), ("c", ("c", b"")), ("d", ("d", photo[:200]))]
    answer = client.post("/v1/predict", files=files)
    entries = answer.json()["predictions"]
    assert answer.status_code == 200
    assert [entry["status"] for entry in entries] == ["scored", *["quarantined"] * 3]
    assert [entry["reason"] for entry in entries] == [None, "not_image", "empty", "truncated"]
    assert entries[1]["label"] is None
    assert entries[1]["topk"] == []
    assert answer.headers["x-eagleray-images"] == "4"


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/embed"])
def test_where_no_image_can_be_used_the_request_is_refused(client: TestClient, path: str) -> None:
    single = problem(client.post(path, content=b"not an image", headers=JPEG), 422, "not_an_image")
    assert single["reason"] == "not_image"
    several = client.post(path, files=[("a", ("a", b"x")), ("b", ("b", b""))])
    body = problem(several, 422, "not_an_image")
    member = "predictions" if path == "/v1/predict" else "embeddings"
    assert [entry["reason"] for entry in body[member]] == ["not_image", "empty"]
    assert several.headers["x-eagleray-images"] == "2"


def test_embeddings_are_given_where_the_model_has_them(
    client: TestClient, service: DirectService, photo: bytes
) -> None:
    one = client.post("/v1/embed", content=photo, headers=JPEG).json()
    two = client.post("/v1/embed", files=[("a", ("a", photo)), ("b", ("b", b"x"))]).json()
    assert len(one["embedding"]) == 5
    assert service.asked[0].wants_embedding
    assert [entry["embedding"] for entry in two["embeddings"]] == [one["embedding"], None]
    plain = client_of(direct_service(service.classifiers["tiny"].bundle.path, names=("plain",)))
    problem(plain.post("/v1/embed", content=photo, headers=JPEG), 400, "bad_parameter")


def test_query_parameters_choose_model_and_length(client: TestClient, service: DirectService, photo: bytes) -> None:
    body = client.post("/v1/predict?model=other&top_k=2", content=photo, headers=JPEG).json()
    assert (body["model"]["name"], len(body["topk"])) == ("other", 2)
    assert body["model"]["digest"] == service.classifiers["other"].bundle.model_digest
    assert service.asked[0].model == "other"


@pytest.mark.parametrize(
    "query",
    ["top_k=0", "top_k=101", "top_k=x", "top_k=", "top_k=1&top_k=2", "topk=3", "top_k=%D9%A5", "&".join("a" * 40)],
)
def test_a_wrong_query_is_refused(client: TestClient, photo: bytes, query: str) -> None:
    problem(client.post(f"/v1/predict?{query}", content=photo, headers=JPEG), 400, "bad_parameter")


def test_a_deadline_is_the_shorter_of_the_clients_and_the_services(
    client: TestClient, service: DirectService, photo: bytes
) -> None:
    for given in ("250", "999999999"):
        client.post("/v1/predict", content=photo, headers={**JPEG, "x-deadline-ms": given})
    client.post("/v1/predict", content=photo, headers=JPEG)
    first, second, third = service.asked
    assert second.deadline - first.deadline > 5
    assert abs(third.deadline - second.deadline) < 5
    for wrong in ("", "0", "-1", "soon", "1.5"):  # the empty one was found by schemathesis
        answer = client.post("/v1/predict", content=photo, headers={**JPEG, "x-deadline-ms": wrong})
        problem(answer, 400, "bad_parameter")


def test_a_deadline_runs_from_the_moment_at_which_the_gateway_had_the_request(
    service: DirectService, photo: bytes
) -> None:
    told = list[Exchange]()
    for waited_s in (0.0, 6.0, -60.0, 1e9):  # clocks of two machines differ; what is absurd is cut
        passport = replace(local_passport({}), arrived_s=time.time() - waited_s)
        client = client_of(service, passport=lambda scope: passport, log=told.append)  # noqa: B023
        client.post("/v1/predict", content=photo, headers=JPEG)
    left_s = [ask.deadline - exchange.started_s for ask, exchange in zip(service.asked, told, strict=True)]
    assert 4 < left_s[0] <= 10
    assert 0 < left_s[1] <= 4
    assert left_s[2:] == pytest.approx([10, 0])


def test_an_engine_that_hangs_costs_the_deadline_and_no_more(service: DirectService, photo: bytes) -> None:
    service.wait = asyncio.Event()
    answer = client_of(service).post("/v1/predict", content=photo, headers={**JPEG, "x-deadline-ms": "50"})
    assert "within 0.05 s" in problem(answer, 503, "deadline_passed")["detail"]
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-eagleray-images"] == "1"
    assert service.cancelled == 1


def test_a_deadline_that_is_too_short_is_charged_by_its_images(service: DirectService, photo: bytes) -> None:
    service.fault = deadline_passed(0.001)
    files = [("images", ("a.jpg", photo, "image/jpeg"))] * 3
    answer = client_of(service).post("/v1/predict", files=files, headers={"x-deadline-ms": "1"})
    problem(answer, 503, "deadline_passed")
    assert answer.headers["x-eagleray-images"] == "3"


def test_what_the_service_refuses_goes_to_the_client(service: DirectService, photo: bytes) -> None:
    service.fault = overloaded(2.2)
    answer = client_of(service).post("/v1/predict", content=photo, headers=JPEG)
    problem(answer, 503, "overloaded")
    assert answer.headers["retry-after"] == "3"
    assert "x-eagleray-images" not in answer.headers  # what was not answered is not charged


def test_a_deadline_is_told_as_the_client_gave_it(service: DirectService, photo: bytes) -> None:
    service.fault = deadline_passed(0.000633366)
    answer = client_of(service).post("/v1/predict", content=photo, headers={**JPEG, "x-deadline-ms": "200"})
    assert "within 0.2 s" in problem(answer, 503, "deadline_passed")["detail"]


def test_a_fault_of_ours_is_said_as_one_and_tells_nothing_of_the_inside(
    service: DirectService, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    service.fault = RuntimeError("/secret/place")
    answer = client_of(service).post("/v1/predict", content=photo, headers=JPEG)
    problem(answer, 500, "fault")
    assert "secret" not in answer.text
    assert "request-1" in caplog.text


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("image/jpeg", b"", 400, "empty_body"),
        ("text/plain", b"x", 415, "unsupported_media_type"),
        ("application/x-www-form-urlencoded", b"x", 415, "unsupported_media_type"),
        ("multipart/form-data", b"x", 400, "bad_request"),
        ("multipart/form-data; boundary=b", b"x", 400, "bad_request"),
        ("multipart/form-data; boundary=b", b"--b--", 400, "bad_request"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\nx',
            400,
            "bad_request",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n--b--',
            400,
            "bad_request",
        ),
        ("application/json", b"{", 400, "bad_json"),
        ("application/json", b"\xff", 400, "bad_json"),
        ("application/json", b"[]", 400, "bad_json"),
        ("application/json", b"{}", 400, "bad_json"),
        ("application/json", b'{"image": 3}', 400, "bad_json"),
        ("application/json", b'{"image": "a b"}', 400, "bad_json"),
        ("application/json", b'{"image": "\\ud800"}', 400, "bad_json"),
        ("application/json", b'{"image": ""}', 400, "empty_body"),
        ("application/json", b'{"image": "QQ==", "more": 1}', 400, "bad_json"),
        ("application/json", b'{"images": []}', 400, "bad_json"),
        ("application/json", b'{"images": "QQ=="}', 400, "bad_json"),
        ("application/json", b'{"image": NaN}', 400, "bad_json"),
        ("application/json", b"[" * 100_000, 400, "bad_json"),
        ("application/json", b"[" * 20 + b"]" * 20, 400, "bad_json"),
        ("application/json", b"1" * 10_000, 400, "bad_json"),
        ("application/json", b"[" + b"1," * 1_000_000 + b"1]", 400, "bad_json"),
    ],
)
def test_a_body_that_cannot_be_read_is_refused(
    client: TestClient, content_type: str, body: bytes, status: int, code: str
) -> None:
    problem(client.post("/v1/predict", content=body, headers={"content-type": content_type}), status, code)


def test_limits_hold_without_a_gateway_too(service: DirectService, photo: bytes) -> None:
    client = client_of(service, limits=LimitsConfig(max_body_bytes=2048, max_images_per_request=2))
    body = problem(client.post("/v1/predict", content=bytes(2049), headers=JPEG), 413, "too_large")
    assert body["limit_bytes"] == 2048
    many = [(name, (name, b"x")) for name in "abc"]
    problem(client.post("/v1/predict", files=many), 422, "too_many_images")
    problem(client.post("/v1/predict", json={"images": ["QQ=="] * 3}), 422, "too_many_images")
    assert service.asked == []


def test_a_compressed_body_is_refused(client: TestClient, photo: bytes) -> None:
    answer = client.post("/v1/predict", content=photo, headers={**JPEG, "content-encoding": "gzip"})
    problem(answer, 415, "unsupported_media_type")
    assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("path", ["/v1", "/v1/predict/", "/v3", "/v1/models/tiny", "/static/../x", "/metrics"])
def test_an_unknown_path_is_refused(client: TestClient, path: str) -> None:
    problem(client.get(path), 404, "unknown_path")


def test_a_wrong_method_is_refused_with_the_right_ones(client: TestClient) -> None:
    answer = client.get("/v1/predict")
    problem(answer, 405, "wrong_method")
    assert answer.headers["allow"] == "POST"
    assert client.delete("/v1/models").headers["allow"] == "GET, HEAD"
    assert client.head("/v1/models").text == ""


def test_a_key_opens_its_own_models_for_its_own_actions(service: DirectService, photo: bytes) -> None:
    passport = Passport(tenant="acme", request_id="r", models=("other",), actions=("predict",))
    client = client_of(service, passport=lambda scope: passport)
    listed = client.get("/v1/models").json()["models"]
    assert [model["name"] for model in listed] == ["other"]
    assert client.post("/v1/predict?model=other", content=photo, headers=JPEG).status_code == 200
    for query in ("", "?model=tiny", "?model=nothing", "?model="):  # the same whether there is such a model or not
        body = problem(client.post(f"/v1/predict{query}", content=photo, headers=JPEG), 403, "forbidden_model")
        assert "tiny" not in json.dumps(body)
    problem(client.post("/v1/embed?model=other", content=photo, headers=JPEG), 403, "forbidden_action")


def test_an_unknown_model_is_said_with_those_that_there_are(client: TestClient, photo: bytes) -> None:
    body = problem(client.post("/v1/predict?model=tinny", content=photo, headers=JPEG), 404, "unknown_model")
    assert body["detail"] == "expected one of tiny, other"


def test_without_a_gateway_nothing_is_answered_but_what_anybody_may_ask(service: DirectService, photo: bytes) -> None:
    client = TestClient(build_app(service))
    problem(client.post("/v1/predict", content=photo, headers=JPEG), 401, "missing_key")
    problem(client.get("/v1/models"), 401, "missing_key")
    assert client.get("/v2/models/tiny").status_code == 401
    for path in ("/", "/openapi.json", "/healthz", "/readyz", "/v2", "/v2/health/live", "/v2/health/ready"):
        assert client.get(path).status_code == 200


def test_the_gateways_passport_is_taken_from_the_scope(service: DirectService, photo: bytes) -> None:
    app = build_app(service)

    async def gateway(scope: Scope, receive: Any, send: Any) -> None:
        await app({**scope, "state": {STATE_KEY: Passport(tenant="acme", request_id="from-gateway")}}, receive, send)

    client = TestClient(gateway)
    assert client.post("/v1/predict", content=photo, headers=JPEG).json()["request_id"] == "from-gateway"
    assert client.get("/nowhere").headers["x-request-id"] == "from-gateway"
    assert client.get("/healthz").headers["x-request-id"] == "from-gateway"
    assert service.asked[0].tenant == "acme"


def test_readiness_is_the_services(service: DirectService) -> None:
    service.is_up = False
    client = client_of(service)
    assert [client.get(path).status_code for path in ("/healthz", "/readyz", "/v2/health/ready")] == [200, 503, 503]
    assert client.get("/v1/models").json()["models"][0]["is_ready"] is False


def test_the_list_of_models_describes_them(client: TestClient) -> None:
    first, second = client.get("/v1/models").json()["models"]
    assert (first["is_default"], second["is_default"]) == (True, False)
    assert (first["input"], first["embedding_dim"], first["max_top_k"]) == ({"height": 32, "width": 32}, 5, 5)
    assert [label["name"] for label in first["labels"]] == ["circle", "cross", "square", "star", "wave"]


def test_what_happened_is_counted_traced_and_logged_after_the_answer(service: DirectService, photo: bytes) -> None:
    meter, spans, told = MemoryMeter(), list[Span](), list[Exchange]()

    class Tracer:
        is_on = True

        def record(self, span: Span) -> None:
            spans.append(span)

    trace = TraceContext.new()
    passport = replace(local_passport({}), trace=trace.to_header())
    client = client_of(service, passport=lambda scope: passport, meter=meter, tracer=Tracer(), log=told.append)
    client.post("/v1/predict", files=[("a", ("a", photo)), ("b", ("b", b"x"))])
    client.post("/v1/predict?model=nothing", content=photo, headers=JPEG)
    client.get("/nowhere")
    assert meter.number(REFUSALS, code="unknown_model") == meter.number(REFUSALS, code="unknown_path") == 1
    assert meter.number(REQUESTS) == 0  # the gateway's to count, who answers more than the app
    assert meter.number(IMAGES, status="scored", reason="") == meter.number(IMAGES, reason="not_image") == 1
    assert meter.number(DECISIONS, kind="none") == 1
    request, *steps = spans[:4]
    assert (request.context.trace_id, request.parent_id, request.is_server) == (trace.trace_id, trace.span_id, False)
    assert [step.name for step in steps] == ["decode", "queue", "infer"]
    assert {step.parent_id for step in steps} == {request.context.span_id}
    assert [(exchange.status, exchange.code, exchange.num_images) for exchange in told] == [
        (200, "", 2),
        (404, "unknown_model", 0),
        (404, "unknown_path", 0),
    ]
    assert told[0].inputs == (photo, b"x")


def test_a_log_that_fails_costs_no_answer(
    service: DirectService, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(exchange: Exchange) -> None:
        raise OSError("the disk is full")

    assert client_of(service, log=broken).post("/v1/predict", content=photo, headers=JPEG).status_code == 200
    assert "could not be counted or logged" in caplog.text


def test_a_client_that_goes_takes_its_request_out_of_the_queue(service: DirectService, photo: bytes) -> None:
    told = list[Exchange]()
    app = build_app(service, passport=local_passport, log=told.append)
    sent = list[Any]()

    async def run() -> None:
        service.wait = asyncio.Event()
        messages = [{"type": "http.request", "body": photo}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            if len(messages) == 1:
                while not service.asked:
                    await asyncio.sleep(0)
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope_of("/v1/predict"), receive, send)
        await asyncio.sleep(0)

    asyncio.run(run())
    assert (sent, service.cancelled) == ([], 1)
    assert [exchange.status for exchange in told] == [499]


def test_a_body_that_breaks_off_is_given_up(service: DirectService) -> None:
    app = build_app(service, passport=local_passport)
    messages = [{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}]
    sent = list[Any]()

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope_of("/v1/predict"), receive, send))  # type: ignore[arg-type]
    assert (sent, service.asked) == ([], [])


def scope_of(path: str) -> Scope:
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"image/jpeg")],
    }


def test_the_page_comes_with_a_policy_that_names_its_own_script_and_style(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.text == PAGE.read_text("utf-8")
    policy = answer.headers["content-security-policy"]
    assert policy == content_policy(answer.text)
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
