"""A whole service under a bare uvicorn, put to what people do to services (tests/serving_abuse.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import uvicorn.config
from eagleray.serving import connections
from eagleray.serving.settings import ServingConfig

from tests.serving_abuse import (
    MIB,
    Target,
    hostile_files,
    put_to_a_gigabyte,
    put_to_hostile_images,
    put_to_probes,
    put_to_slow_clients,
)
from tests.serving_server import make_key, running, service_config
from tests.tiny_model import make_bundle

CAP = 2 * MIB
PROBES = 500


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    return {"mine": tiny_model, "theirs": make_bundle(tmp_path_factory.mktemp("theirs") / "theirs", seed=8)}


@pytest.fixture(scope="module")
def service(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Target, str, str]]:
    """The target with a key of everything, one of "mine" only, one of "theirs" only."""
    keys_file = tmp_path_factory.mktemp("keys") / "keys.json"
    rates = {"images_per_s": 1e6, "burst": 1_000_000}
    every = make_key(keys_file, **rates)
    mine = make_key(keys_file, tenant="mine", models=("mine",), **rates)
    theirs = make_key(keys_file, tenant="theirs", models=("theirs",), **rates)
    plain = service_config(keys_file, **bundles)
    limits = {"max_body_bytes": 16 * MIB, "body_timeout_s": 0.5, "head_timeout_s": 0.5, "max_queue_s": 10.0}
    config = ServingConfig.model_validate(plain.model_dump() | {"limits": plain.limits.model_dump() | limits})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", connections.TARGET)
        patch.setattr(connections, "_limits", config.limits)
        with running(config) as url:
            host, _, port = url.removeprefix("http://").partition(":")
            yield Target(host, int(port), every), mine, theirs


def test_hostile_images_are_told_what_they_are_and_move_nothing(
    service: tuple[Target, str, str], shared_data: Path, make_photo: Callable[..., bytes]
) -> None:
    seen = put_to_hostile_images(service[0], hostile_files(shared_data), make_photo(1))
    assert sum(seen.values()) == 110
    assert set(seen) == {200, 400, 422}


def test_no_probe_reaches_another_tenants_model(
    service: tuple[Target, str, str], bundles: dict[str, Path], make_photo: Callable[..., bytes]
) -> None:
    from eagleray.vision.bundle import load_bundle

    target, mine, theirs = service
    digest = load_bundle(bundles["theirs"]).model_digest
    good = Target(target.host, target.port, mine)
    assert Target(target.host, target.port, theirs).ask("GET /v2/models/theirs HTTP/1.1")[0] == 200
    seen = put_to_probes(
        good,
        theirs="theirs",
        theirs_key=theirs,
        secrets=(digest[:12].encode(), digest.encode()),
        image=make_photo(2),
        number=PROBES,
        seed=5,
    )
    assert sum(seen.values()) == PROBES
    assert {401, 403, 404} <= set(seen)
    assert 500 not in seen
    assert 0 not in seen


def test_slow_clients_are_given_up_while_others_are_answered(
    service: tuple[Target, str, str], make_photo: Callable[..., bytes]
) -> None:
    image = make_photo(3)
    seen, asked = put_to_slow_clients(
        service[0], heads=60, bodies=60, is_well=lambda: service[0].predict(image)[0] == 200, limit_s=60
    )
    assert set(seen) <= {0, 400, 408}
    assert seen[408] >= 100
    assert asked >= 2


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_gigabyte_takes_no_memory(service: tuple[Target, str, str], is_chunked: bool) -> None:
    before = psutil.Process().memory_info().rss
    status, sent = put_to_a_gigabyte(service[0], is_chunked=is_chunked)
    assert status == 413
    # beyond the limit: what the kernel holds between two processes (net.ipv4.tcp_rmem, at most 32 MiB by default)
    assert sent <= (16 if is_chunked else 0) * MIB + 40 * MIB
    assert psutil.Process().memory_info().rss - before < 64 * MIB
