"""What a person says about a service becomes its settings or a refusal; HAProxy runs on a mended config or not."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import socket
import stat
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from eagleray.cli.serving import guide
from eagleray.core.config import load
from eagleray.core.errors import ArtifactError, CapabilityError, ClusterError, ConfigError
from eagleray.flows import deployment, serve_haproxy, serve_local
from eagleray.flows.listeners import Listener, listeners, unexpected
from eagleray.flows.serve import Running, ServeConfig, to_serving
from eagleray.serving.settings import HttpConfig

# As Ray 2.60 writes it for http_options host=127.0.0.1, port=8000, shortened
WRITTEN = """global
    log 127.0.0.1:514 local0 info
    stats socket /tmp/er-x/h/node/admin.sock mode 666 level admin expose-fd listeners
    stats timeout 30s
defaults
    mode http
    option log-health-checks
    timeout connect 5s
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
    http-request return status 200 content-type application/json string "{\\"/\\":\\"eagleray\\"}" if routes
backend http-eagleray
    server replica-1 127.0.0.1:30000 check
listen stats
  bind *:8404
  stats enable
"""


def serving(**given: Any) -> Any:
    return to_serving(load(ServeConfig, overrides={"model": "bundles/lite0", "auth": "none", **given}))


def test_a_model_is_named_by_its_folder_or_by_the_person() -> None:
    config = serving(model=["bundles/lite0", "other=runs/a=b/bundle", "runs/a=b/third"])
    assert [entry.name for entry in config.models] == ["lite0", "other", "third"]
    assert config.models[1].bundle == str(Path("runs/a=b/bundle").resolve())


def test_a_name_that_cannot_stand_in_a_url_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 to 64"):
        serving(model="bundles/my model")


def test_settings_reach_the_service() -> None:
    config = serving(**{"slo.latency_p99_ms": 50, "engines": 2, "threads": 3, "limits.deadline_s": 2})
    assert (config.slo.latency_p99_ms, config.limits.deadline_s) == (50, 2)
    assert (config.models[0].engines, config.models[0].threads) == (2, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"is_fast": True}, "needs keys"),
        ({"host": "0.0.0.0"}, "127.0.0.1 only"),
        ({"auth": "keys"}, "keys_file is missing"),
        ({"tls_cert": "a.pem"}, "go together"),
        ({"limits.max_ongoing_requests": 3}, "cannot fill batches"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        serving(**given)


def mend(
    tmp_path: Path, text: str, http: HttpConfig, monkeypatch: pytest.MonkeyPatch
) -> subprocess.CompletedProcess[str]:
    """Runs the script on a config as Serve does; in place of HAProxy stands cat."""
    monkeypatch.setattr(serve_haproxy, "find_haproxy", lambda: "cat")
    environment = serve_haproxy.prepare(tmp_path, http, head_timeout_s=7)
    config = tmp_path / "h" / "haproxy.cfg"
    config.write_text(text)
    script = environment["RAY_SERVE_HAPROXY_BINARY_PATH"]
    return subprocess.run([script, "-f", str(config)], capture_output=True, text=True, check=False)


def haproxy(host: str = "127.0.0.1", **more: Any) -> HttpConfig:
    return HttpConfig(host=host, port=8000, proxy="haproxy", **more)


def binds(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith("bind ")]


def test_haproxy_is_kept_to_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = mend(tmp_path, WRITTEN, haproxy(), monkeypatch)
    mended = (tmp_path / "h" / "haproxy.cfg").read_text()
    assert binds(mended) == ["bind 127.0.0.1:9101", "bind 127.0.0.1:8000", "bind 127.0.0.1:8404"], done.stderr
    assert "mode 600 level admin" in mended
    assert "timeout http-request 7s" in mended
    assert "http-request return status 404 if routes" in mended
    assert "eagleray\\" not in mended  # the names of applications are nobody's business
    assert stat.S_IMODE((tmp_path / "h" / "haproxy.cfg").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "haproxy").stat().st_mode) == 0o700


def test_the_service_alone_listens_where_it_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mend(tmp_path, WRITTEN, haproxy("0.0.0.0"), monkeypatch)
    assert binds((tmp_path / "h" / "haproxy.cfg").read_text()) == [
        *("bind 127.0.0.1:9101", "bind *:8000", "bind 127.0.0.1:8404"),
    ]


def test_haproxy_speaks_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.pem").write_text("CHAIN")
    (tmp_path / "k.pem").write_text("KEY")
    http = haproxy(tls_cert=str(tmp_path / "c.pem"), tls_key=str(tmp_path / "k.pem"))
    mend(tmp_path, WRITTEN, http, monkeypatch)
    pem = tmp_path / "tls.pem"
    assert f"bind 127.0.0.1:8000 ssl crt {pem} ssl-min-ver TLSv1.2" in binds(
        (tmp_path / "h" / "haproxy.cfg").read_text()
    )
    assert (pem.read_text(), stat.S_IMODE(pem.stat().st_mode)) == ("CHAIN\nKEY", 0o600)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mode 666", "mode 777"),  # the admin socket in another form
        ("option log-health-checks", "option other"),
        ("bind 127.0.0.1:8000", "bind 10.0.0.5:8000"),
        ("bind *:8404", "bind 0.0.0.0:8404"),
    ],
)
def test_a_config_that_cannot_be_mended_starts_no_haproxy(
    old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert old in WRITTEN
    done = mend(tmp_path, WRITTEN.replace(old, new), haproxy(), monkeypatch)
    assert done.returncode == 78
    assert done.stderr
    assert done.stdout == ""  # cat was not reached


def test_ray_still_writes_what_the_script_mends() -> None:
    ray = importlib.util.find_spec("ray")
    assert ray
    assert ray.origin
    template = (Path(ray.origin).parent / "serve" / "_private" / "haproxy_templates.py").read_text(encoding="utf-8")
    for line in (
        "stats socket {{ config.socket_path }} mode 666 level admin",
        "    bind :{{ config.metrics_port }}\n",
        "    bind {{ config.frontend_host }}:{{ config.frontend_port }}\n",
        "  bind *:{{ config.stats_port }}\n",
        "    option log-health-checks\n",
        'string "{{ route_info.routes_message }}" if routes\n',
    ):
        assert line in template, line


def test_a_taken_port_says_who_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        http = HttpConfig(port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="cannot be listened on"):
            serve_local.free_port(http)
        with serve_local.state_kept(http.port, {"url": "http://here", "pid": os.getpid(), "address": "a:1"}):
            assert stat.S_IMODE(serve_local.state_path(http.port).stat().st_mode) == 0o600
            with pytest.raises(ConfigError, match=rf"already answers at http://here \(process {os.getpid()}\)"):
                serve_local.free_port(http)
    assert serve_local.read_state(http.port) == {}
    assert serve_local.free_port(HttpConfig(port=0)) > 0


def test_a_state_left_by_a_killed_service_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path))
    dead = subprocess.Popen(["true"])
    dead.wait()
    path = serve_local.state_path(8000)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"url": "x", "pid": dead.pid, "address": "a"}))
    assert serve_local.read_state(8000) == {}


def test_an_error_of_ours_comes_back_as_it_was() -> None:
    said = ArtifactError("the bundle does not hold", expected="a whole one", fix="get it again")
    text = f"Deploying app failed:\nray::ServeReplica\n  File x\neagleray.core.errors.ArtifactError: {said}\nRetrying"
    found = serve_local.start_error(RuntimeError(text))
    assert isinstance(found, ArtifactError)
    assert (found.seen, found.expected, found.fix) == (said.seen, said.expected, said.fix)
    other = serve_local.start_error(RuntimeError("no room\n  for it"))
    assert isinstance(other, ClusterError)
    assert "no room" in other.seen


def test_what_other_machines_reach_is_found() -> None:
    with socket.socket() as wide, socket.socket() as narrow:
        wide.bind(("0.0.0.0", 0))
        narrow.bind(("127.0.0.1", 0))
        for probe in (wide, narrow):
            probe.listen()
        port = wide.getsockname()[1]
        found = listeners(os.getpid())
        assert [one.port for one in unexpected(found)] == [port]
        assert unexpected(found, allowed=[port]) == []
    assert not Listener("::", 80, "x").is_loopback
    assert Listener("::1", 80, "x").is_loopback
    assert Listener("::ffff:127.0.0.1", 80, "x").is_loopback  # as Ray's own listeners are told
    assert not Listener("::ffff:10.0.0.1", 80, "x").is_loopback


@pytest.mark.parametrize(("node", "address"), [("127.0.0.1", "127.0.0.1:0"), ("fd00::1", "[fd00::1]:0")])
def test_the_inner_server_of_a_replica_is_bound_to_its_node(
    node: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Serve 2.60 binds it to every address, and unpickles what it is sent; seen at the first start of a service."""
    asked: list[str] = []
    replica = types.ModuleType("ray.serve._private.replica")
    replica.add_port_to_grpc_server = lambda server, where: asked.append(where)  # type: ignore[attr-defined]
    ray = types.ModuleType("ray")
    ray.util = types.SimpleNamespace(get_node_ip_address=lambda: node)  # type: ignore[attr-defined]
    private = types.ModuleType("ray.serve._private")
    private.replica = replica  # type: ignore[attr-defined]
    for module in (ray, types.ModuleType("ray.serve"), private, replica):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    ray.__version__ = "2.60.0"  # type: ignore[attr-defined]
    deployment.bind_inner_server()
    replica.add_port_to_grpc_server("server", "[::]:0")  # type: ignore[attr-defined]
    assert asked == [address]
    del replica.add_port_to_grpc_server  # type: ignore[attr-defined]
    with pytest.raises(CapabilityError, match="another way"):
        deployment.bind_inner_server()


def test_ray_still_starts_the_inner_server_there() -> None:
    ray = importlib.util.find_spec("ray")
    assert ray
    assert ray.origin
    source = (Path(ray.origin).parent / "serve" / "_private" / "replica.py").read_text(encoding="utf-8")
    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in source


def test_the_environment_of_ray_is_complete(tmp_path: Path) -> None:
    environment = serve_local.environment(serving(), tmp_path)
    assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == serve_local.CALLBACK
    assert environment["EAGLERAY_SERVING_SETTINGS"].startswith(str(tmp_path))
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "0"


@pytest.mark.parametrize(
    ("engines", "verdicts", "asked"),
    [
        (1, "-+-+--", 6),  # one may be a machine that stood still for a moment
        (2, "+-+-", 4),  # every other canary meets the engine that is ill
        (2, "-++-+++--", 9),
        (3, "-++-", 4),
        (3, "-+++-++-", 8),
    ],
)
def test_an_ill_engine_among_well_ones_is_noticed(
    engines: int, verdicts: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Canaries of a model alternate between its engines: each pass of a well one forgave the ill one."""
    left = list(verdicts)

    async def check_health() -> None:
        if left.pop(0) == "-":
            raise RuntimeError("engine 1 hangs")

    replica: Any = object.__new__(deployment.Replica)
    replica._config = serving(**{"engines": engines, "canary.period_s": 1e-4})
    replica.shelf, replica._illness = types.SimpleNamespace(check_health=check_health), ""
    monkeypatch.delattr(deployment.Replica, "__del__")
    asyncio.run(replica._watch_health())
    assert len(verdicts) - len(left) == asked
    assert replica._illness == "RuntimeError: engine 1 hangs"


def test_an_ill_engine_is_noticed_later_among_others() -> None:
    one, three = (deployment.replaced_within_s(serving(engines=engines)) for engines in (1, 3))
    assert three - one == 2 * 2 * serving().canary.period_s


def test_the_guide_holds_no_secret_and_every_way_in(tmp_path: Path) -> None:
    running = Running("http://127.0.0.1:8000", ("lite0",), "abc", tmp_path / "key", True, False, "python", 1.0)
    text = guide(running)
    for part in ("curl -sS -H @", "tritonclient.http", "/v1/predict", "http://127.0.0.1:8000/\n", "lite0"):
        assert part in text
    assert "er_" not in text
