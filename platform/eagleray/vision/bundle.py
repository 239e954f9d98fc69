"""The model bundle: weights, labels, preprocessing, thresholds and lineage, saved and loaded as one thing.

A bundle is a folder: ``bundle.json``, ``model.safetensors`` and/or ``model.onnx``, ``config.json`` where the
architecture is timm's, so that ``timm.create_model("local-dir:BUNDLE")`` loads it, and ``probes.safetensors``, images
with the answers that every engine must give (infer/probes.py). Every file's SHA-256 stands in bundle.json and
bundle.json holds its own: a changed, missing or added file is refused by name. Weights are parsed only from bytes whose
digest was just checked (read_verified). No pickle.

Example:
    >>> bundle = load_bundle("models/lite0")
    >>> onnx_bytes = bundle.read_verified("model.onnx")
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from eagleray.core.config import digest_json
from eagleray.core.errors import ArtifactError, ConfigError, EagleError, storage_error
from eagleray.core.storage import fsync_dir, sha256_bytes, sha256_file
from eagleray.vision.images import ImageSpec
from eagleray.vision.prediction import Label, ThresholdPolicy, check_labels, refuse_newer

SCHEMA = 1
HEAD = "bundle.json"
SAFETENSORS = "model.safetensors"
ONNX = "model.onnx"
TIMM_CONFIG = "config.json"
PROBES = "probes.safetensors"
WEIGHT_FILES = (ONNX, SAFETENSORS)
FOREIGN = "onnx"  # the architecture of a bundle that was imported from an ONNX file

Output = Literal["logits", "multi_label_logits", "probabilities"]
Precision = Literal["fp32", "fp16", "int8"]
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class ModelBundle:
    """A classifier as a thing: what it is, how it must be fed, what its outputs mean, where it came from.

    Attributes:
        architecture: A timm architecture, or "onnx" for a foreign graph.
        labels: One label for each output, in order.
        image_spec: The one definition of preprocessing.
        output: What the model's first output is: "logits" (of one label: softmax), "multi_label_logits" (each label for
            itself: sigmoid) or "probabilities".
        embedding_dim: Width of the "embedding" output; None when there is none.
        policy: Thresholds, when they have been found.
        model_args: Arguments of timm.create_model besides num_classes.
        lineage: Source, its digest, date, versions.
        precision: The arithmetic of model.onnx; fp16 and int8 are graphs only, without model.safetensors.
        files: File name to SHA-256; filled by save_bundle.
        path: The folder; filled by save_bundle and load_bundle.
        schema: Number of this record's format.
    """

    architecture: str
    labels: tuple[Label, ...]
    image_spec: ImageSpec
    output: Output = "logits"
    embedding_dim: int | None = None
    policy: ThresholdPolicy | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    lineage: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "fp32"
    files: Mapping[str, str] = field(default_factory=dict)
    path: Path = Path()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        faults = []
        ids = [label.id for label in self.labels]
        if not ids:
            faults.append("no labels")
        if len(set(ids)) != len(ids):
            twice = sorted({label for label in ids if ids.count(label) > 1})
            faults.append(f"{len(twice)} label ids stand twice: {', '.join(twice[:3])}")
        if self.output not in get_args(Output):
            faults.append(f"output {self.output!r} is none of {', '.join(get_args(Output))}")
        if self.precision not in get_args(Precision):
            faults.append(f"precision {self.precision!r} is none of {', '.join(get_args(Precision))}")
        elif self.precision != "fp32" and SAFETENSORS in self.files:
            faults.append(f"it is {self.precision} and holds {SAFETENSORS}, the weights of another model")
        faults += [f"{name!r} is not a plain file name" for name in self.files if not _FILE_NAME.fullmatch(name)]
        if faults:
            raise ArtifactError(f"not a model bundle: {'; '.join(faults)}", expected="one label id for each output")
        if self.policy is not None:
            check_labels(self.policy, ids)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @cached_property
    def label_ids(self) -> tuple[str, ...]:
        """The label ids in output order."""
        return tuple(label.id for label in self.labels)

    @cached_property  # a digest over every label: asked for with every part
    def model_digest(self) -> str:
        """SHA-256, in hex, of what decides the probabilities of given pixels: weights, labels, output."""
        weights = {name: self.files[name] for name in WEIGHT_FILES if name in self.files}
        labels = [label.to_json() for label in self.labels]
        return digest_json(
            {"architecture": self.architecture, "labels": labels, "output": self.output, "weights": weights}
        )

    def read_verified(self, name: str) -> bytes:
        """A file's bytes, after checking the digest of those very bytes.

        Raises:
            ArtifactError: The bundle has no such file, or its bytes are not those that were saved.
        """
        if name not in self.files:
            raise ArtifactError(f"{self.path} has no {name}", expected=f"one of {', '.join(self.files)}")
        try:
            data = (self.path / name).read_bytes()
        except FileNotFoundError:
            raise _changed(self.path, f"{name} is missing") from None
        except OSError as error:
            raise storage_error(error, f"reading {self.path / name}") from error
        if sha256_bytes(data) != self.files[name]:
            raise _changed(self.path, f"{name} has changed")
        return data

    def to_json(self) -> dict[str, Any]:
        """What bundle.json holds, but for its own digest."""
        return {
            "schema": self.schema,
            "architecture": self.architecture,
            "labels": [label.to_json() for label in self.labels],
            "image_spec": self.image_spec.to_json(),
            "output": self.output,
            "embedding_dim": self.embedding_dim,
            "policy": self.policy.to_json() if self.policy else None,
            "model_args": dict(self.model_args),
            "lineage": dict(self.lineage),
            "files": dict(self.files),
            # Only where it is not fp32: the bundles of before keep their bytes and digests
            **({} if self.precision == "fp32" else {"precision": self.precision}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, path: Path = Path()) -> ModelBundle:
        """Reads what to_json wrote.

        Raises:
            ArtifactError: A newer schema, or something that is not a bundle.
        """
        refuse_newer(value, SCHEMA, "model bundle")
        try:
            return cls(
                path=path,
                architecture=str(value["architecture"]),
                labels=tuple(Label(id=str(label["id"]), name=str(label["name"])) for label in value["labels"]),
                image_spec=ImageSpec.from_json(value["image_spec"]),
                output=value["output"],
                embedding_dim=value["embedding_dim"],
                policy=ThresholdPolicy.from_json(value["policy"]) if value["policy"] else None,
                model_args=dict(value["model_args"]),
                lineage=dict(value["lineage"]),
                precision=value.get("precision", "fp32"),
                files={str(name): str(digest) for name, digest in dict(value["files"]).items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise ArtifactError(
                f"{path / HEAD} is not a model bundle: {error!r}", expected="what import writes"
            ) from None


def load_bundle(path: str | Path) -> ModelBundle:
    """Opens a bundle after checking every file's digest.

    Args:
        path: The bundle's folder.

    Raises:
        ArtifactError: There is no bundle, it is of a newer schema, or a file is changed, missing or added; the message
            names the file.
    """
    path = Path(path)
    head = path / HEAD
    try:
        data = head.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(
            f"no model bundle at {path}", expected=f"a folder with {HEAD}", fix="eagleray import MODEL --out BUNDLE"
        ) from None
    except OSError as error:
        raise storage_error(error, f"reading {head}") from error
    bundle = ModelBundle.from_json(_parse_head(path, data), path=path)
    present = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - {HEAD}
    faults = [f"{name} is missing" for name in sorted(set(bundle.files) - present)]
    faults += [f"{name} was added" for name in sorted(present - set(bundle.files))]
    faults += [
        f"{name} has changed"
        for name, digest in bundle.files.items()
        if name in present and (not (path / name).is_file() or sha256_file(path / name) != digest)
    ]
    if not any(name in bundle.files for name in WEIGHT_FILES):
        faults.append(f"it holds no weights ({' or '.join(WEIGHT_FILES)})")
    if faults:
        raise _changed(path, "; ".join(faults))
    return bundle


def save_bundle(
    path: str | Path,
    draft: ModelBundle,
    weights: Mapping[str, bytes | Path],
    *,
    timm_config: Mapping[str, Any] | None = None,
    probes: bytes | Path | Callable[[ModelBundle], bytes] | None = None,
) -> ModelBundle:
    """Writes a bundle aside, then renames it into place: a reader sees all of it or none.

    Args:
        path: Where the bundle will be: absent, an empty folder, or the very same model (then it is returned as it is).
        draft: What the bundle is; its path and files are filled in here.
        weights: File name ("model.onnx", "model.safetensors") to its bytes or a file to copy.
        timm_config: What config.json says (backbones.hub_config), for timm architectures.
        probes: What probes.safetensors is, or what makes it of the bundle as it lies aside, whole but for that file.

    Raises:
        ConfigError: The folder holds something else.
        StorageError: It cannot be written.
    """
    path = Path(path)
    aside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        home = aside / path.name  # messages about it, while it lies aside, name the bundle
        home.mkdir()
        for name, source in weights.items():
            _write(home / name, source)
        if timm_config is not None:
            _write(home / TIMM_CONFIG, _as_text(timm_config))
        bundle = replace(draft, path=path, files=_digests(home))
        same = _same_model(path, bundle)
        if same is not None:
            return same
        if probes is not None:
            _write(home / PROBES, probes(replace(bundle, path=home)) if callable(probes) else probes)
            bundle = replace(bundle, files=_digests(home))
        body = bundle.to_json()
        _write(home / HEAD, _as_text({**body, "digest": digest_json(body)}))
        fsync_dir(home)
        home.rename(path)
        fsync_dir(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _occupied(path) from None
        raise storage_error(error, f"writing {path}") from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return bundle


def _digests(home: Path) -> dict[str, str]:
    return {entry.name: sha256_file(entry) for entry in sorted(home.iterdir())}


def _parse_head(path: Path, data: bytes) -> dict[str, Any]:
    """bundle.json as a value, after its own digest and its very bytes were found to hold."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path / HEAD} is not JSON: {error}", expected="what import writes", fix="import the model again"
        ) from None
    refuse_newer(value, SCHEMA, "model bundle")
    body = {key: item for key, item in value.items() if key != "digest"}
    if value.get("digest") != digest_json(body) or _as_text(value) != data:
        raise _changed(path, f"{HEAD} has changed")
    return body


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _changed(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: {what}",
        expected="the files that were saved, byte for byte",
        fix="get the bundle again, or import again",
    )


def _occupied(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is not empty", expected="a new folder, or a bundle of the very same model", fix="give another --out"
    )


def _same_model(path: Path, bundle: ModelBundle) -> ModelBundle | None:
    """The bundle at path when it is this very model and preprocessing; None when path is free.

    Raises:
        ConfigError: path holds something else.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    try:
        there = load_bundle(path)
    except EagleError:
        raise _occupied(path) from None
    if (there.model_digest, there.image_spec, there.policy) != (bundle.model_digest, bundle.image_spec, bundle.policy):
        raise _occupied(path)
    return there


def _write(path: Path, source: bytes | Path) -> None:
    with path.open("xb") as file:
        if isinstance(source, Path):
            with source.open("rb") as origin:
                shutil.copyfileobj(origin, file, 1 << 20)
        else:
            file.write(source)
        file.flush()
        os.fsync(file.fileno())


def _as_text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
