"""What a running service tells: Prometheus scrapes the names of the table, spans reach a collector, logs are JSON."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from eagleray.serving.telemetry import METRICS

from tests.journeys.conftest import wait_for
from tests.journeys.serving import JPEG, Served, served
from tests.span_collector import collector

SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
FILE_NAME = "anna-schmidt-1984.jpg"  # a person's name: it is to be found nowhere
GOOD, BAD, KEYLESS = 7, 2, 3
Samples = list[tuple[str, dict[str, str], float]]


@pytest.fixture(scope="module")
def spans() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    with collector() as (address, got):
        yield address, got


@pytest.fixture(scope="module")
def service(
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
    spans: tuple[str, list[tuple[str, bytes]]],
    make_photo: Callable[..., bytes],
) -> Iterator[Served]:
    """A service with a collector and a short report interval, after some requests of every kind."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", spans[0])
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with served(tmp_path_factory.mktemp("serve"), [f"tiny={tiny_model}"]) as running:
            traced = {**JPEG, "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
            for number in range(GOOD):
                assert running.ask("/v1/predict", make_photo(number), traced).status == 200
            named = {**JPEG, "Content-Disposition": f'attachment; filename="{FILE_NAME}"'}
            for _ in range(BAD):
                assert running.ask("/v1/predict", b"no picture at all", named).status == 422
            for _ in range(KEYLESS):
                assert running.ask("/v1/predict", b"x", {**JPEG, "Authorization": ""}).status == 401
            assert running.ask("/v1/predict?model=nobody-has-this", make_photo(1), JPEG).status in (403, 404)
            yield running


def scrape(service: Served) -> str:
    """What Ray's metrics agent of this service tells; "" while it tells nothing of ours."""
    for process in service.processes():
        with contextlib.suppress(psutil.Error):
            ports = {each.laddr.port for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN}
            if "agent" not in " ".join(process.cmdline()).lower():
                continue
            for port in ports:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
                    with contextlib.closing(connection):
                        connection.request("GET", "/metrics")
                        text = connection.getresponse().read().decode(errors="replace")
                    if "ray_eagleray_serving_" in text:
                        return text
    return ""


def samples(text: str) -> Samples:
    found: Samples = []
    for line in text.splitlines():
        match = SAMPLE.fullmatch(line)
        if match and match[1].startswith("ray_eagleray_"):
            found.append((match[1], dict(LABEL.findall(match[2] or "")), float(match[3])))
    return found


def total(found: Samples, name: str, **labels: str) -> float:
    return sum(value for each, has, value in found if each == name and labels.items() <= has.items())


@pytest.fixture(scope="module")
def told(service: Served) -> str:
    """The figures once all of the requests are in them, and the gauges, which Ray drops between two canaries here."""
    requests = GOOD + BAD + KEYLESS + 1
    gauges = ("ray_eagleray_serving_models_loaded", "ray_eagleray_serving_model_info")

    def whole() -> str:
        text = scrape(service)
        found = samples(text)
        counted = total(found, "ray_eagleray_serving_requests_total", route="predict")
        return text if counted >= requests and set(gauges) <= {name for name, _, _ in found} else ""

    return str(wait_for(whole, 60))


def test_prometheus_sees_each_request_once_by_its_status(told: str) -> None:
    found, name = samples(told), "ray_eagleray_serving_requests_total"
    assert total(found, name, route="predict", status="200", model="tiny") == GOOD
    assert total(found, name, route="predict", status="422") == BAD
    assert total(found, name, route="predict", status="401") == KEYLESS
    assert total(found, "ray_eagleray_serving_images_total", status="scored", reason="", model="tiny") == GOOD
    assert total(found, "ray_eagleray_serving_images_total", status="quarantined") == BAD
    assert total(found, "ray_eagleray_serving_refusals_total", code="missing_key") == KEYLESS
    assert total(found, "ray_eagleray_serving_request_seconds_count", route="predict", model="tiny") == GOOD
    assert total(found, "ray_eagleray_serving_queue_seconds_count", model="tiny") == GOOD
    assert total(found, "ray_eagleray_serving_models_loaded") == 1
    assert total(found, "ray_eagleray_serving_model_info", model="tiny") == 1


def test_only_names_of_the_table_go_out_as_what_they_are(told: str) -> None:
    known = {name: metric for metric in METRICS for name in metric.exported}
    found = samples(told)
    assert sorted({name for name, _, _ in found} - set(known)) == []
    kinds = dict(re.findall(r"# TYPE (ray_eagleray_\w+) (\w+)", told))
    for metric in METRICS:
        name = f"ray_{metric.name}"
        assert kinds.get(name, metric.kind) == metric.kind, name
    for name, labels, _ in found:
        assert set(known[name].labels) <= set(labels), name


def test_the_edge_of_the_slo_is_written_as_the_alerts_write_it(told: str) -> None:
    edges = {has["le"] for name, has, _ in samples(told) if name == "ray_eagleray_serving_request_seconds_bucket"}
    assert "0.1" in edges


def test_nothing_of_the_input_or_the_key_is_in_the_figures(service: Served, told: str) -> None:
    assert FILE_NAME not in told
    assert "nobody-has-this" not in told  # a model name that a client typed is no label
    assert service.headers["Authorization"].split()[1] not in told


def test_spans_of_a_request_reach_the_collector(service: Served, spans: tuple[str, list[tuple[str, bytes]]]) -> None:
    def sent() -> bytes:
        return b"".join(body for path, body in spans[1] if path == "/v1/traces")

    wait_for(lambda: all(name in sent() for name in (b"queue", b"decode", b"infer", bytes.fromhex(TRACE))), 30)
    assert FILE_NAME.encode() not in sent()
    assert service.headers["Authorization"].split()[1].encode() not in sent()


def test_logs_of_the_service_are_json_and_hold_no_secret(service: Served) -> None:
    folder = Path(service.facts["key_file"]).parent
    logs = [path for path in folder.rglob("*.log") if path.parent.name == "serve"]
    assert logs, "Serve's logs lie in the service's private folder"
    for path in logs:
        text = path.read_text(errors="replace")
        assert service.headers["Authorization"].split()[1] not in text
        assert FILE_NAME not in text
        if path.name.startswith(("replica_", "proxy_")):
            for line in text.splitlines():
                assert isinstance(json.loads(line), dict), (path, line)
