"""Bundles: whole or not there, and not a byte other than what was saved."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, ConfigError, StorageError
from eagleray.vision import bundle as bundle_module
from eagleray.vision.bundle import ModelBundle, load_bundle, save_bundle
from eagleray.vision.images import ImageSpec
from eagleray.vision.prediction import Label, ThresholdPolicy

DRAFT = ModelBundle(
    architecture="onnx",
    labels=(Label("a", "a name"), Label("ü", "Übel")),
    image_spec=ImageSpec(height=32, width=48, mean=(0.1, 0.2, 0.3)),
    embedding_dim=4,
    policy=ThresholdPolicy({"a": 0.25}),
    lineage={"source": "onnx:model.onnx"},
)
WEIGHTS: dict[str, bytes | Path] = {"model.onnx": b"not parsed here", "model.safetensors": b"nor this"}


@pytest.fixture
def saved(tmp_path: Path) -> ModelBundle:
    return save_bundle(tmp_path / "model", DRAFT, WEIGHTS, timm_config={"architecture": "x"})


def test_a_saved_bundle_is_the_loaded_one(saved: ModelBundle) -> None:
    loaded = load_bundle(saved.path)
    assert loaded == saved
    assert loaded.name == "model"
    assert loaded.label_ids == ("a", "ü")
    assert loaded.read_verified("model.onnx") == WEIGHTS["model.onnx"]
    assert ModelBundle.from_json(saved.to_json(), path=saved.path) == saved
    assert not [name for name in os.listdir(saved.path.parent) if name != "model"]  # nothing is left aside


def test_weights_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"not parsed here")
    by_path = save_bundle(tmp_path / "a", DRAFT, {"model.onnx": tmp_path / "weights"})
    by_bytes = save_bundle(tmp_path / "b", DRAFT, {"model.onnx": b"not parsed here"})
    assert by_path.model_digest == by_bytes.model_digest


@pytest.mark.parametrize("name", ["bundle.json", "config.json", "model.onnx", "model.safetensors"])
def test_any_changed_byte_is_refused_by_name(saved: ModelBundle, name: str) -> None:
    path = saved.path / name
    whole = path.read_bytes()
    for position in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(ArtifactError, match=name):
            load_bundle(saved.path)
    path.write_bytes(whole + b"\n")
    with pytest.raises(ArtifactError, match=name):
        load_bundle(saved.path)


def test_every_flipped_bit_of_the_head_is_refused(saved: ModelBundle) -> None:
    head = saved.path / "bundle.json"
    whole = head.read_bytes()
    for position in range(0, len(whole), 7):
        head.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
        with pytest.raises(ArtifactError):
            load_bundle(saved.path)


def test_missing_and_added_files_are_named(saved: ModelBundle) -> None:
    (saved.path / "model.onnx").unlink()
    (saved.path / "notes.txt").write_text("hello")
    (saved.path / ".DS_Store").write_text("no reader opens it")
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing; notes\.txt was added\n"):
        load_bundle(saved.path)


def test_the_bytes_that_are_read_are_the_bytes_that_were_checked(saved: ModelBundle) -> None:
    """A file that changes between load_bundle and its use is found at its use."""
    loaded = load_bundle(saved.path)
    (saved.path / "model.onnx").write_bytes(b"swapped")
    with pytest.raises(ArtifactError, match=r"model\.onnx has changed"):
        loaded.read_verified("model.onnx")
    (saved.path / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        loaded.read_verified("model.onnx")
    with pytest.raises(ArtifactError, match="has no other"):
        loaded.read_verified("other")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".hidden", ""])
def test_a_head_that_names_files_elsewhere_is_refused(saved: ModelBundle, name: str) -> None:
    _rewrite(saved, lambda body: body["files"].update({name: "00"}))
    with pytest.raises(ArtifactError, match="plain file name"):
        load_bundle(saved.path)


def _rewrite(saved: ModelBundle, change: Callable[[dict], object]) -> None:
    """Changes bundle.json as a forger would, digest and all."""
    head = saved.path / "bundle.json"
    body = json.loads(head.read_text(encoding="utf-8"))
    del body["digest"]
    change(body)
    text = json.dumps({**body, "digest": digest_json(body)}, indent=1, sort_keys=True, ensure_ascii=False)
    head.write_text(text + "\n", encoding="utf-8")


def test_a_newer_schema_is_refused_with_what_to_do(saved: ModelBundle) -> None:
    _rewrite(saved, lambda body: body.update(schema=2))
    with pytest.raises(ArtifactError, match="newer") as caught:
        load_bundle(saved.path)
    assert "newer eagleray" in caught.value.fix


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("labels"),
        lambda body: body.update(labels=[]),
        lambda body: body.update(labels=[{"id": "a", "name": "a"}] * 2),
        lambda body: body.update(output="scores"),
        lambda body: body.update(image_spec={"schema": 1, "height": 0, "width": 3}),
        lambda body: body.update(policy={"schema": 1, "thresholds": {"z": 0.5}, "otherwise": ""}),
        lambda body: body.update(files=[]),
        lambda body: body.update(schema="1"),
    ],
)
def test_a_head_that_is_no_bundle_is_refused(saved: ModelBundle, change: Callable[[dict], object]) -> None:
    _rewrite(saved, change)
    with pytest.raises(ArtifactError):
        load_bundle(saved.path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": NaN}', b"[" * 100_000])
def test_a_head_that_is_no_json_object_is_refused(saved: ModelBundle, text: bytes) -> None:
    (saved.path / "bundle.json").write_bytes(text)
    with pytest.raises(ArtifactError):
        load_bundle(saved.path)


@pytest.mark.parametrize("place", ["nothing", "a_file", "an_empty_folder"])
def test_no_bundle_is_said_as_such(tmp_path: Path, place: str) -> None:
    (tmp_path / "a_file").write_text("x")
    (tmp_path / "an_empty_folder").mkdir()
    with pytest.raises(ArtifactError, match="no model bundle"):
        load_bundle(tmp_path / place)


def test_a_bundle_without_weights_is_refused(tmp_path: Path) -> None:
    bundle = save_bundle(tmp_path / "model", DRAFT, {})
    with pytest.raises(ArtifactError, match="no weights"):
        load_bundle(bundle.path)


def test_saving_the_same_model_again_returns_the_one_that_is_there(saved: ModelBundle) -> None:
    before = (saved.path / "bundle.json").read_bytes()
    again = save_bundle(
        saved.path, replace(DRAFT, lineage={"source": "later"}), WEIGHTS, timm_config={"architecture": "x"}
    )
    assert again == saved
    assert (saved.path / "bundle.json").read_bytes() == before


@pytest.mark.parametrize(
    ("draft", "weights"),
    [
        (DRAFT, {"model.onnx": b"other weights"}),
        (replace(DRAFT, labels=(Label("a", "a"), Label("b", "b"))), WEIGHTS),
        (replace(DRAFT, image_spec=ImageSpec(height=32, width=32)), WEIGHTS),
        (replace(DRAFT, policy=None), WEIGHTS),
    ],
)
def test_another_model_never_replaces_a_bundle(saved: ModelBundle, draft: ModelBundle, weights: dict) -> None:
    with pytest.raises(ConfigError, match="not empty"):
        save_bundle(saved.path, draft, weights)
    assert load_bundle(saved.path) == saved


def test_a_folder_with_anything_else_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    for place in ("out", "file"):
        with pytest.raises(ConfigError):
            save_bundle(tmp_path / place, DRAFT, WEIGHTS)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["diary.txt", "file", "out"]


def test_an_empty_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert load_bundle(save_bundle(tmp_path / "out", DRAFT, WEIGHTS).path).files


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = bundle_module._write, []

    def write(path: Path, source: bytes | Path) -> None:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        real(path, source)

    monkeypatch.setattr(bundle_module, "_write", write)
    with pytest.raises(StorageError, match="No space left"):
        save_bundle(tmp_path / "model", DRAFT, WEIGHTS)
    assert not list(tmp_path.iterdir())


def test_the_model_digest_follows_what_decides_the_scores(tmp_path: Path) -> None:
    base = save_bundle(tmp_path / "base", DRAFT, WEIGHTS)
    moved = tmp_path / "elsewhere"
    shutil.copytree(base.path, moved)
    assert load_bundle(moved).model_digest == base.model_digest
    changes = [
        replace(DRAFT, output="probabilities"),
        replace(DRAFT, labels=DRAFT.labels[::-1]),
        replace(DRAFT, architecture="resnet18"),
    ]
    digests = {save_bundle(tmp_path / str(k), draft, WEIGHTS).model_digest for k, draft in enumerate(changes)}
    digests.add(save_bundle(tmp_path / "w", DRAFT, {"model.onnx": b"other"}).model_digest)
    assert len(digests | {base.model_digest}) == 5
    same = replace(DRAFT, lineage={}, policy=None)
    assert save_bundle(tmp_path / "same", same, WEIGHTS).model_digest == base.model_digest


def test_precision_stands_in_the_head_only_where_it_is_not_fp32(tmp_path: Path) -> None:
    """The head of an fp32 bundle is what it was before there was a precision: its digest holds."""
    assert "precision" not in DRAFT.to_json()
    half = save_bundle(tmp_path / "half", replace(DRAFT, precision="fp16"), {"model.onnx": b"typed"})
    assert load_bundle(half.path).precision == "fp16"
    with pytest.raises(ArtifactError, match="weights of another model"):
        save_bundle(tmp_path / "both", replace(DRAFT, precision="int8"), WEIGHTS)
    with pytest.raises(ArtifactError, match="precision 'int4' is none of"):
        replace(DRAFT, precision="int4")  # type: ignore[arg-type]
