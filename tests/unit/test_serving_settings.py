"""A service's settings: what does not fit together is refused at deploy, all of it at once."""

from __future__ import annotations

from typing import Any

import pytest
from eagleray.core.config import load
from eagleray.core.errors import ConfigError
from eagleray.serving.settings import HttpConfig, ServingConfig

MODEL = {"name": "a", "bundle": "models/a"}
CUDA = {**MODEL, "device": "cuda"}


def make(**changes: Any) -> ServingConfig:
    """A service without keys on loopback, with changes of dotted keys."""
    return load(ServingConfig, overrides={"models": [MODEL], "access.auth": "none", **changes})


def test_a_service_of_defaults_is_sound() -> None:
    config = make()
    assert (config.batching.sizes("cpu")[-1], config.batching.sizes("cuda")[-1]) == (8, 32)
    assert make(**{"batching.buckets": [1, 3]}).batching.sizes("cpu") == (1, 3)
    assert config.max_queue_s == config.slo.latency_p99_ms / 1000
    assert config.limits.image_limits.max_bytes == config.limits.max_body_bytes
    assert config.entry("a") == config.models[0]
    assert config.entry("b") is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"limits.max_ongoing_requests": 15}, "cannot fill batches of 8: at least 16"),
        ({"limits.max_ongoing_requests": 99, "batching.buckets": [50]}, "cannot fill batches of 50: at least 100"),
        ({"models": [{**MODEL, "engines": 17}]}, "at least 272 (2 batches for each of 17 engines)"),
        ({"limits.max_queued_requests": 7}, "is less than one batch of 8"),
        ({"limits.deadline_s": 0.05}, "what is promised must fit in the deadline"),
        ({"limits.max_queue_s": 11.0}, "is above limits.deadline_s=10"),
        ({"limits.max_buffered_bytes": 2**20}, "the largest body would never be read"),
        ({"autoscale.min_replicas": 3}, "is above autoscale.max_replicas=1"),
        ({"rates.burst": 100, "rates.images_per_day": 99}, "is above rates.images_per_day=99"),
        ({"rates.burst": 31}, "the largest request would always be refused"),
        ({"models": [MODEL, MODEL]}, "a stands twice"),
        ({"models": [{**CUDA, "runtime": "openvino"}], "memory.gpus": 1, "memory.gpu_memory_mib": 900}, "openvino"),
        ({"models": [{**MODEL, "runtime": "tensorrt"}]}, "tensorrt on the cpu"),
        ({"models": [CUDA], "memory.gpu_memory_mib": 900}, "memory.gpus is 0 and a run on cuda"),
        ({"models": [CUDA], "memory.gpus": 0.5}, "memory.gpu_memory_mib is missing"),
        ({"access.auth": "keys"}, "access.keys_file is missing"),
        ({"http.host": "0.0.0.0"}, "without keys a service listens on 127.0.0.1 only"),
        ({"http.host": "example.org"}, "without keys a service listens on 127.0.0.1 only"),
        ({"http.proxy": "haproxy"}, "that mode binds every address, so it needs keys"),
        ({"http.tls_cert": "a.pem"}, "go together"),
        ({"models": []}, "at least 1 item"),
        ({"models": [{**MODEL, "name": "../a"}]}, "a model's name is 1 to 64"),
        ({"models": [{**MODEL, "runtime": "onx"}]}, "unknown runtime; one of auto, torch, onnx"),
        ({"batching.buckets": [4, 2]}, "rising batch sizes"),
        ({"batching.buckets": []}, "rising batch sizes"),
        ({"batching.bucket": 3}, "did you mean batching.buckets?"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_what_to_do(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**changes)
    assert said in str(error.value)


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        make(**{"limits.max_ongoing_requests": 1, "http.host": "0.0.0.0", "autoscale.min_replicas": 2})
    assert str(error.value).startswith("3 faults in ServingConfig:")


@pytest.mark.parametrize(
    ("host", "proxy", "is_loopback"),
    [
        ("127.0.0.1", "python", True),
        ("127.8.0.1", "python", True),
        ("::1", "python", True),
        ("localhost", "python", True),
        ("0.0.0.0", "python", False),
        ("::", "python", False),
        ("10.0.0.1", "python", False),
        ("127.0.0.1", "haproxy", False),
    ],
)
def test_haproxy_is_never_loopback_whatever_the_host_says(host: str, proxy: Any, is_loopback: bool) -> None:
    assert HttpConfig(host=host, proxy=proxy).is_loopback is is_loopback


def test_keys_open_every_address_and_every_proxy() -> None:
    keys = {"access.auth": "keys", "access.keys_file": "keys.json"}
    assert make(**keys, **{"http.host": "0.0.0.0", "http.proxy": "haproxy"}).http.proxy == "haproxy"


def test_settings_survive_json() -> None:
    config = make(**{"limits.max_queue_s": 0.25, "batching.buckets": [1, 3]})
    assert load(ServingConfig, overrides=config.model_dump(mode="json")) == config
