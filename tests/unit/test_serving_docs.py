"""docs/serving.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from eagleray.flows.serve_gateway import CALLBACK
from eagleray.serving.installation import SETTINGS_VARIABLE
from eagleray.serving.paths import OPEN, PROXY_HEALTH
from eagleray.serving.refusals import KINDS
from eagleray.serving.settings import LimitsConfig

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_every_refusal_is_in_the_table_under_its_status() -> None:
    rows = re.findall(r"^\| (\d{3}) \| (.*?) \|", PAGE, re.MULTILINE)
    said = {code: int(status) for status, codes in rows for code in re.findall(r"`([a-z_]+)`", codes)}
    assert said == {code: kind.status for code, kind in KINDS.items()}


@pytest.mark.parametrize("name", sorted(LimitsConfig.model_fields))
def test_every_limit_of_requests_is_told(name: str) -> None:
    of_images = {"max_json_depth", "max_pixels", "max_side_px", "large_pixels"}
    assert name in of_images or f"`{name}`" in PAGE


def test_defaults_are_those_of_the_code() -> None:
    limits = LimitsConfig()
    assert f"| `max_body_bytes` | {limits.max_body_bytes >> 20} MiB |" in PAGE
    assert f"| {limits.max_buffered_bytes >> 20} MiB |" in PAGE
    assert f"| {limits.head_timeout_s:g}, {limits.max_head_bytes >> 10} KiB |" in PAGE
    assert f"| `max_connections` | {limits.max_connections:,} |" in PAGE
    assert f"| `body_timeout_s` | {limits.body_timeout_s:g} |" in PAGE
    assert f"| {limits.max_ongoing_requests}, {limits.max_queued_requests} |" in PAGE


def test_the_names_of_the_environment_and_the_open_paths_are_told() -> None:
    assert f"export {SETTINGS_VARIABLE}=" in PAGE
    assert f"={CALLBACK}\n" in PAGE
    for path in (*OPEN, PROXY_HEALTH):
        assert f"`{path}`" in PAGE or ("/v2/health/*" in PAGE and path.startswith("/v2/health/"))
