"""How the gateway gets into Serve's processes: by a file that an environment variable names, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import uvicorn.config
from eagleray.core.errors import ConfigError
from eagleray.serving import admission, installation
from eagleray.serving.access import KeyRequest, create_key
from eagleray.serving.connections import TARGET
from eagleray.serving.gateway import Gateway
from eagleray.serving.installation import SETTINGS_VARIABLE, read_settings, serve_middlewares, write_settings
from eagleray.serving.settings import ServingConfig


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    monkeypatch.delenv(SETTINGS_VARIABLE, raising=False)


def config(tmp_path: Path) -> ServingConfig:
    create_key(tmp_path / "keys.json", KeyRequest(tenant="acme"))
    return ServingConfig.model_validate(
        {
            "models": [{"name": "lite0", "bundle": "a"}],
            "access": {"auth": "keys", "keys_file": str(tmp_path / "keys.json")},
        }
    )


def test_settings_come_back_as_they_were_written_and_are_private(tmp_path: Path) -> None:
    path = write_settings(config(tmp_path), tmp_path)
    assert read_settings(path) == (config(tmp_path), path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_operator_may_write_them_as_yaml(tmp_path: Path) -> None:
    path = tmp_path / "serving.yaml"
    path.write_text("models:\n- {name: lite0, bundle: /models/lite0}\naccess: {keys_file: /etc/eagleray/keys.json}\n")
    assert read_settings(path)[0].models[0].name == "lite0"


@pytest.mark.parametrize("text", ["", "{", "models: []", "models: [{name: a, bundle: b}]\nlimit: 3"])
def test_settings_that_do_not_hold_start_no_proxy(tmp_path: Path, monkeypatch, text: str) -> None:
    path = tmp_path / "serving.json"
    path.write_text(text)
    monkeypatch.setenv(SETTINGS_VARIABLE, str(path))
    with pytest.raises(ConfigError):
        serve_middlewares()


def test_no_settings_start_no_proxy(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=SETTINGS_VARIABLE):
        serve_middlewares()
    monkeypatch.setenv(SETTINGS_VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(ConfigError, match="no settings at"):
        serve_middlewares()


def test_missing_keys_start_no_proxy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(SETTINGS_VARIABLE, str(write_settings(config(tmp_path), tmp_path)))
    (tmp_path / "keys.json").unlink()
    with pytest.raises(ConfigError, match="no key file"):
        serve_middlewares()


def test_the_gateway_and_guarded_connections_are_installed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(SETTINGS_VARIABLE, str(write_settings(config(tmp_path), tmp_path)))
    (middleware,) = serve_middlewares()
    assert middleware.cls is Gateway
    assert isinstance(middleware.cls(None, *middleware.args, **middleware.kwargs), Gateway)
    assert uvicorn.config.HTTP_PROTOCOLS["auto"] == TARGET
    assert len(list(tmp_path.glob("rates-*"))) == 1


def test_nodes_that_share_a_home_share_no_counters(tmp_path: Path, monkeypatch) -> None:
    """Their monotonic clocks begin elsewhere: a counter of the other node would mean a wait of months."""
    monkeypatch.setenv(SETTINGS_VARIABLE, str(write_settings(config(tmp_path), tmp_path)))
    for boot in ("one", "two", "one"):
        monkeypatch.setattr(admission, "_boot_id", lambda boot=boot: boot)
        serve_middlewares()
    assert sorted(path.name.split("-")[1] for path in tmp_path.glob("rates-*")) == ["one", "two"]


def test_counters_go_to_the_cache_where_settings_are_read_only(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(installation, "cache_folder", lambda kind: tmp_path / "cache" / kind)
    monkeypatch.setattr(installation.os, "access", lambda *_: False)
    assert installation.state_folder(tmp_path / "mount" / "serving.yaml") == tmp_path / "cache" / "serving"
