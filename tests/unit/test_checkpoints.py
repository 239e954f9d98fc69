"""Laws of checkpoints: whole or not there, bit for bit, verified, never of another run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eagleray.core.errors import ArtifactError, ConfigError, StorageError
from eagleray.learn.checkpoints import HEAD, Checkpoint, folders, load, load_latest, save, write
from eagleray.learn.order import Position
from eagleray.learn.state_trees import flatten, unflatten
from eagleray.learn.task import Progress
from torch import nn

CONFIG = {"seed": 3, "optimizer": {"name": "adamw", "betas": (0.9, 0.999)}}


def make(step: int = 5) -> Checkpoint:
    torch.manual_seed(step)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999))
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    return Checkpoint(
        progress=Progress(step, 100, 1, 4),
        position=Position(1, 64),
        config=CONFIG,
        state={"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}},
        metrics={"loss": 0.25},
    )


def same(one: object, other: object) -> bool:
    """Whether two trees are equal bit for bit, types and dtypes included."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        assert isinstance(other, list | tuple)
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint = make()
    save(tmp_path, checkpoint)
    found = load_latest(tmp_path, config=CONFIG)
    assert found is not None
    assert found.passed_over == ()
    assert (found.checkpoint.progress, found.checkpoint.position) == (checkpoint.progress, checkpoint.position)
    assert found.checkpoint.metrics == {"loss": 0.25}
    for part in checkpoint.state:
        one, other = checkpoint.state[part], found.checkpoint.state[part]
        assert same(dict(one), other), part


def test_any_tree_of_plain_values_and_tensors_comes_back(tmp_path: Path) -> None:
    tree = {
        "numbers": {0: torch.tensor(3.0), 7: {"deep": [1, (2.5, None, "x"), True]}},
        "halves": torch.randn(3, 2).bfloat16().t(),
        "odd": [float("inf"), float("-inf"), float("nan"), 0.1 + 0.2],
        "$like": {"$tensor": "no tensor"},
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        "empty": {},
    }
    plain, tensors = flatten(tree)
    assert same(unflatten(json.loads(json.dumps(plain, allow_nan=False)), tensors), tree)
    with pytest.raises(TypeError, match="numbers is a set"):
        flatten({"numbers": {1}})
    checkpoint = replace(make(), state={"other": tree})
    assert same(load(write(tmp_path / "one", checkpoint)).state["other"], tree)


def test_only_the_last_n_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 12):
        save(tmp_path, make(step), keep=2)
    assert [path.name for path in folders(tmp_path)] == ["step-00000012", "step-00000003"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000012"]


def test_no_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none") is None
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize("file", [HEAD, "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("fault", ["flipped", "cut", "missing", "empty"])
def test_a_torn_newest_is_passed_over_and_named(tmp_path: Path, file: str, fault: str) -> None:
    save(tmp_path, make(5))
    path = save(tmp_path, make(6)) / file
    if fault == "flipped":
        damage(path)
    elif fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if fault == "cut" else b"")
    found = load_latest(tmp_path, config=CONFIG)
    assert found is not None
    assert found.checkpoint.progress.step == 5
    assert len(found.passed_over) == 1
    assert found.passed_over[0].startswith(f"step-00000006: {file}")
    again = save(tmp_path, make(6))  # the run comes by the same step again
    assert load(again).progress.step == 6


def test_a_writer_that_died_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, make(5))
    with monkeypatch.context() as patch:
        patch.setattr("eagleray.core.storage.write_new", fails)
        with pytest.raises(StorageError):
            save(tmp_path, make(6))
    write(tmp_path / ".aside-1-killed-step-00000007", make(7))  # killed before the rename
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.checkpoint.progress.step, found.passed_over) == (5, ())


def fails(*_: object) -> None:
    raise StorageError("no space")


def test_when_none_is_whole_each_is_named(tmp_path: Path) -> None:
    for step in (5, 6):
        damage(save(tmp_path, make(step)) / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"step-00000006: model.*step-00000005: model"):
        load_latest(tmp_path)


def test_a_checkpoint_of_another_config_is_refused_with_the_keys(tmp_path: Path) -> None:
    save(tmp_path, make())
    other = {"seed": 4, "optimizer": {"name": "sgd", "betas": (0.9, 0.999)}, "new": 1}
    with pytest.raises(ConfigError) as caught:
        load_latest(tmp_path, config=other)
    assert "3 keys differ" in str(caught.value)
    for line in ("seed: 3 in the checkpoint, 4 asked for", "optimizer.name: 'adamw'", "new: None"):
        assert line in str(caught.value)
    assert "betas" not in str(caught.value)


def test_a_newer_schema_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eagleray.learn.checkpoints.SCHEMA", 2)
    path = save(tmp_path, make())
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match="schema 2"):
        load(path)
