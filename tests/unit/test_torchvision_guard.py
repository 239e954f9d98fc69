"""The guard declares what is missing, only where it is missing, and lets timm import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from eagleray.vision import torchvision_guard as guard

PROGRAM = """
import sys
from eagleray.vision import torchvision_guard as guard
state = guard.ensure_importable()
assert guard.ensure_importable() == state, "a second call says the same"
import torchvision, timm
print(state, bool(torchvision.extension._has_ops()))
"""


def test_timm_imports_behind_the_guard() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=_environment(), check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    state, has_operators = done.stdout.split()
    assert (state, has_operators) in {("native", "True"), ("declared", "False")}


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_no_torchvision_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_kept", [])
    monkeypatch.delitem(sys.modules, "torchvision.ops", raising=False)
    monkeypatch.setattr(guard, "find_spec", lambda name: None)
    monkeypatch.setattr(guard, "_declare", lambda namespace: pytest.fail("nothing to declare for"))
    assert guard.ensure_importable() == "absent"


def test_operators_that_load_are_not_declared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_kept", [])
    monkeypatch.delitem(sys.modules, "torchvision.ops", raising=False)
    monkeypatch.setattr(guard, "loads_operators", lambda folder: True)
    monkeypatch.setattr(guard, "_declare", lambda namespace: pytest.fail("they load"))
    assert guard.ensure_importable() == "native"


def test_a_library_that_does_not_load_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_has_operator", lambda namespace, name: False)
    assert not guard.loads_operators(tmp_path)
    (tmp_path / "_C.so").write_bytes(b"no library")
    assert not guard.loads_operators(tmp_path)


def test_what_is_declared_has_the_operators_schemas() -> None:
    import torch

    library = guard._declare("eagleray_guard_test")
    for name in ("nms", "qnms"):
        schema = str(getattr(torch.ops.eagleray_guard_test, name).default._schema)
        assert schema == f"eagleray_guard_test::{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    del library
