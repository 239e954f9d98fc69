"""Imports run downward only, engines stay behind their walls, and what must start fast loads no torch and no Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

import pytest
from house import ROOT, Import, Module, module_of, modules

FLOORS = {
    "core": 0,
    "vision": 1,
    "learn": 2,
    "infer": 2,
    "assure": 2,
    "pages": 3,
    "serving": 3,
    "federation": 3,
    "flows": 4,
    "cli": 5,
    "jobs": 5,
    "serve_apps": 5,
}

# Package to the places that may import it: a folder, or a file without its suffix.
WALLS = {
    "ray": ("eagleray.flows", "serve_apps"),
    "flwr": ("eagleray.flows",),
    "onnxruntime": ("eagleray.infer.runtimes", "eagleray.infer.quantization"),
    "openvino": ("eagleray.infer.runtimes", "eagleray.infer.quantization"),
    "tensorrt": ("eagleray.infer.runtimes",),
    "tensorrt_rtx": ("eagleray.infer.runtimes",),
    "nncf": ("eagleray.infer.quantization",),
    "onnx": (
        "eagleray.infer.complexity",
        "eagleray.infer.export",
        "eagleray.infer.quantization",
        "eagleray.infer.runtimes",
        *("eagleray.vision.imports", "eagleray.vision.onnx_graph"),
    ),
    "onnxscript": ("eagleray.infer.export",),
    "opacus": ("eagleray.learn.privacy",),
    "torch_pruning": ("eagleray.learn.pruning",),
    "timm": ("eagleray.vision.backbones",),
    "timm.data": ("eagleray.vision.backbones", "eagleray.learn"),
    "timm.optim": ("eagleray.vision.backbones", "eagleray.learn"),
    "timm.utils": ("eagleray.vision.backbones", "eagleray.learn"),
}

FAST = (
    *("eagleray.core", "eagleray.flows", "eagleray.cli", "eagleray.infer.classifier", "eagleray.infer.scoring"),
    *("eagleray.vision.images", "eagleray.vision.corpus", "eagleray.vision.prediction", "eagleray.vision.bundle"),
)
HEAVY = ("torch", "torchvision", "timm", "ray", "flwr", "lightly")


def is_below(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def upward(checked: Iterable[Module]) -> list[str]:
    """Imports that do not run downward."""
    wrong = []
    for module in checked:
        for edge in module.imports:
            parts = edge.name.split(".")
            target = (parts[1] if len(parts) > 1 else "") if parts[0] == "eagleray" else parts[0]
            if parts[0] not in ("eagleray", "jobs", "serve_apps") or target not in FLOORS:
                continue
            if module.floor == "":  # eagleray/__init__.py names what it resolves on use, and imports nothing
                is_right = edge.is_target
            else:
                is_right = target == module.floor or FLOORS[target] < FLOORS[module.floor]
            if not is_right:
                wrong.append(f"{module.where}:{edge.line} ({module.floor or 'root'}) imports {edge.name}")
    return sorted(set(wrong))


def breached(checked: Iterable[Module]) -> list[str]:
    """Imports of a walled package from elsewhere."""
    wrong = []
    for module in checked:
        for edge in module.imports:
            walls = [package for package in WALLS if is_below(edge.name, package)]
            if walls and not any(is_below(module.name, place) for place in WALLS[max(walls, key=len)]):
                wrong.append(f"{module.where}:{edge.line} imports {edge.name}")
    return sorted(set(wrong))


def loaded_by(start: Iterable[str], known: dict[str, Module]) -> dict[str, str]:
    """Every module of ours that loading these loads, with the one that loads it."""
    seen: dict[str, str] = {}
    queue = [(name, "") for name in start]
    while queue:
        name, parent = queue.pop()
        if name in seen or name not in known:
            continue
        seen[name] = parent
        queue += [(edge.name, name) for edge in known[name].imports if edge.is_at_load and not edge.is_for_types]
        queue += [(name.rpartition(".")[0], name)]
    return seen


def cycles(checked: Iterable[Module]) -> list[list[str]]:
    """Import cycles, those in functions too; a table's targets and imports for types do not count."""
    known = {module.name: module for module in checked}

    def is_edge(edge: Import) -> bool:  # ``from package import module`` asks for the module, not for the package
        return edge.name in known and not (edge.names and all(name in known for name in edge.names))

    edges = {
        name: {e.name for e in module.imports if is_edge(e) and not e.is_for_types and not e.is_target} - {name}
        for name, module in known.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(edges[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return found


def test_imports_run_downward_only() -> None:
    assert upward(modules()) == []


def test_no_import_cycle() -> None:
    assert cycles(modules()) == []


def test_ray_engines_and_model_zoos_stay_behind_their_walls() -> None:
    assert breached(modules()) == []


def test_what_must_start_fast_loads_neither_torch_nor_ray() -> None:
    known = {module.name: module for module in modules()}
    start = [name for name in known if any(is_below(name, place) for place in FAST)]
    wrong = [
        f"{known[name].where}:{edge.line} imports {edge.name} when it is loaded (by {parent or 'itself'})"
        for name, parent in loaded_by(start, known).items()
        for edge in known[name].imports
        if edge.is_at_load and not edge.is_for_types and edge.name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_loading_them_really_loads_neither_torch_nor_ray() -> None:
    names = [m.name for m in modules() if any(is_below(m.name, place) for place in FAST)]
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_every_floor_is_known() -> None:
    assert {module.floor for module in modules()} - {""} <= set(FLOORS)


def test_platform_is_no_package() -> None:
    """As a package it would shadow the stdlib's ``platform``."""
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("eagleray.core.a", "import eagleray.vision.images"),
        ("eagleray.core.a", "def f():\n    from eagleray.vision import images"),
        ("eagleray.infer.a", "from eagleray.assure.report import Report"),
        ("eagleray.assure.a", "import eagleray.infer.classifier"),
        ("eagleray.vision.a", "TABLE = {'x': 'eagleray.flows.score:run'}"),
        ("eagleray.vision.a", "import importlib\nimportlib.import_module('eagleray.pages.page')"),
        ("eagleray.flows.a", "from eagleray.cli.main import main"),
        ("jobs.a", "from eagleray.cli.main import main"),
        (
            "eagleray.core.a",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from eagleray.flows import score",
        ),
        ("eagleray", "import eagleray.core.errors"),
    ],
)
def test_the_rule_sees_an_upward_import(name: str, source: str) -> None:
    assert upward([module_of(source, name)])


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("eagleray.infer.scoring", "def f():\n    import ray"),
        ("eagleray.infer.classifier", "import onnxruntime as ort"),
        ("eagleray.vision.images", "from openvino import Core"),
        ("eagleray.vision.bundle", "import timm"),
        ("eagleray.learn.training", "from timm.models import create_model"),
        ("eagleray.learn.training", "import opacus"),
        ("jobs.score", "import ray"),
    ],
)
def test_the_rule_sees_a_breach(name: str, source: str) -> None:
    assert breached([module_of(source, name)])


def test_the_rule_sees_a_cycle() -> None:
    a = module_of("def f():\n    import eagleray.core.b", "eagleray.core.a")
    b = module_of("import eagleray.core.a", "eagleray.core.b")
    assert cycles([a, b])
