"""The OpenAPI document is the committed one, says what the app does, and names every refusal."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from eagleray.serving.app import build_app
from eagleray.serving.openapi import document
from eagleray.serving.refusals import KINDS
from starlette.routing import Router
from starlette.testclient import TestClient

from tests.serving_service import direct_service, local_passport

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"get", "post", "put", "delete", "patch"}


def operations() -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, item in document()["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


def references(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(child) for child in value.values()))
    return set().union(*(references(child) for child in value)) if isinstance(value, list) else set()


def test_the_document_is_the_committed_one() -> None:
    committed = json.loads((ROOT / "docs" / "openapi.json").read_text("utf-8"))
    assert document() == committed, "PYTHONPATH=platform python -m eagleray.serving.openapi > docs/openapi.json"


def test_it_names_exactly_the_paths_and_methods_of_the_app(tiny_model: Path) -> None:
    app = build_app(direct_service(tiny_model), passport=local_passport)
    assert isinstance(app, Router)
    paths = {route.path for route in app.routes}  # type: ignore[attr-defined]
    assert paths == set(document()["paths"])
    client = TestClient(app)
    for path in paths:
        allowed = client.request("PATCH", re.sub(r"\{.*?\}", "tiny", path)).headers["allow"].lower().split(", ")
        named = {method for where, method, _ in operations() if where == path}
        assert set(allowed) - {"head"} == named


def test_every_reference_leads_somewhere_and_nothing_is_left_over() -> None:
    made = document()
    wanted = references(made)
    given = {f"#/components/{kind}/{name}" for kind in ("schemas", "parameters") for name in made["components"][kind]}
    assert wanted == given


def test_operations_have_names_of_their_own() -> None:
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(names)) == len(names)


def test_every_refusal_is_documented_somewhere() -> None:
    statuses = {int(status) for _, _, operation in operations() for status in operation["responses"]}
    assert {kind.status for kind in KINDS.values()} - statuses == {405}  # a method that the document does not have


def test_what_anybody_may_ask_is_what_asks_for_no_key(tiny_model: Path) -> None:
    client = TestClient(build_app(direct_service(tiny_model)))
    for path, method, operation in operations():
        answer = client.request(method, re.sub(r"\{.*?\}", "tiny", path))
        assert (answer.status_code == 401) == (operation.get("security") != []), path


@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/v2", "/v2/models/tiny"])
def test_what_is_answered_has_the_documented_members(tiny_model: Path, path: str) -> None:
    client = TestClient(build_app(direct_service(tiny_model), passport=local_passport))
    template = "/v2/models/{model}" if "tiny" in path else path
    schema = document()["paths"][template]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    name = schema["$ref"].rpartition("/")[2]
    assert set(client.get(path).json()) == set(document()["components"]["schemas"][name]["required"])
