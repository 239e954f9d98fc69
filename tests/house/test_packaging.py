"""What is declared is what is pinned, and the files that make the project installable are there."""

from __future__ import annotations

import importlib
import os
import re
import tomllib

from eagleray import __version__
from eagleray.core.config import load
from eagleray.flows.doctor import RAY_PIN, SAFE_FROM
from house import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = {
    canonicalize_name(line.split("==")[0]): Version(line.split("==")[1].strip())
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line
}
DECLARED = [
    Requirement(line)
    for lines in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for line in lines
    if not line.startswith("eagleray[")
]


def test_constraints_pin_exact_versions_only() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line)] == []


def test_pins_satisfy_what_is_declared() -> None:
    assert [str(r) for r in DECLARED if canonicalize_name(r.name) not in PINS] == []
    assert [(str(r), str(PINS[canonicalize_name(r.name)])) for r in DECLARED
            if not r.specifier.contains(PINS[canonicalize_name(r.name)])] == []  # fmt: skip


def test_declared_floors_are_past_the_known_holes() -> None:
    """What pip may install is never below what doctor calls safe."""
    for name, (floor, _) in SAFE_FROM.items():
        (requirement,) = [r for r in DECLARED if r.name.split("[")[0] == name]
        below = ".".join(map(str, (floor[0], floor[1] - 1)))
        assert not requirement.specifier.contains(below), f"{requirement} allows {below}"


def test_doctor_wants_the_ray_that_is_declared() -> None:
    (ray,) = [r for r in DECLARED if r.name == "ray"]
    assert str(ray.specifier) == f"=={'.'.join(map(str, RAY_PIN))}.*"


def test_version_stands_in_one_story() -> None:
    assert PROJECT["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_is_the_declared_one() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_ci_runs_make_test() -> None:
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert "make test" in run.read_text(encoding="utf-8")


def test_recipes_state_keys_of_their_config() -> None:
    """A recipe whose key was renamed would fail on a cluster, hours later; here it fails now."""
    recipes = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        flow = path.stem.split("-")[0]  # score-cpu.yaml is a recipe of flows/score.py
        kind = getattr(importlib.import_module(f"eagleray.flows.{flow}"), f"{flow.capitalize()}Config")
        required = {name: "x" for name, field in kind.model_fields.items() if field.is_required()}
        load(kind, recipe=path, overrides={**required, "sources": ["x"]} if "sources" in required else required)


def test_every_job_has_a_recipe() -> None:
    """A service is no job: on a cluster it is serve_apps/, and its recipes are of `eagleray serve`."""
    jobs = {*(path.stem for path in (ROOT / "jobs").glob("*.py")), "serve"}
    assert jobs == {path.stem.split("-")[0] for path in (ROOT / "jobs" / "recipes").glob("*.yaml")}
