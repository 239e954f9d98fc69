"""Export a bundle for an engine: built, held to the bundle's probe set, then published; nothing is left when it fails.

``onnx`` is one file, with labels, preprocessing, thresholds and the digest of the lineage in its metadata. ``openvino``
is a folder with model.xml and model.bin. ``tensorrt`` is a folder with the ONNX that engines are built from; the engine
itself goes into this machine's cache, signed, and is never the artefact. The same command again does nothing new.

Refuses: a place that holds something else, an ONNX with external data, custom operators or endless loops, an engine
    that is not installed, answers that are not the bundle's.

Example:
    >>> run(ExportConfig(model="bundles/lite0", to="onnx", out="lite0.onnx"))["parity"]["max_abs_dp"]
    6e-07
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from eagleray import __version__
from eagleray.core import storage
from eagleray.core.config import Config, digest_json
from eagleray.core.errors import CapabilityError, ConfigError, storage_error
from eagleray.core.tables import find
from eagleray.infer.engine_check import EngineCheck, check_engine
from eagleray.infer.export import export_bundle, seal_onnx
from eagleray.infer.parity import Parity, check_parity, prove, refuse
from eagleray.infer.runtimes import RUNTIMES
from eagleray.vision.bundle import ONNX, PROBES, SAFETENSORS, ModelBundle, load_bundle, save_bundle

MANIFEST = "export.json"
SCHEMA = 1


class ExportConfig(Config):
    """Which bundle, for which engine, to where.

    Attributes:
        model: A bundle's folder.
        to: The engine.
        out: A file for onnx, a folder for the others: absent, or of the same export.
        check: Measure every engine that is installed here, each in a process of its own.
        has_preprocessing: Put the normalisation into the graph: uint8 N,H,W,3 in.
        threads: Engine threads of the measurements.
        device: Of the measurements: ``cpu`` or ``cuda``; TensorRT is always asked on CUDA.
        compute_capability: Of the GPU that a TensorRT engine is built for; none = the GPU here.
    """

    model: str
    to: Literal["onnx", "openvino", "tensorrt"]
    out: str = Field(min_length=1)
    check: bool = False
    has_preprocessing: bool = False
    threads: int = Field(1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    compute_capability: str | None = None

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _two_numbers(cls, value: Any) -> Any:
        """Takes 8.9 as YAML gives it."""
        if value is not None and not re.fullmatch(r"\d+\.\d", str(value)):
            raise ValueError("a compute capability as 8.9")
        return None if value is None else str(value)


@dataclass(frozen=True)
class Subject:
    """What is exported, resolved.

    Attributes:
        config: As asked.
        bundle: The bundle.
        data: Its ONNX, sealed: what is published, or what the engine's form is made of.
        scratch: A bundle of that ONNX and the probe set, in a folder that goes away: what engines are asked about.
    """

    config: ExportConfig
    bundle: ModelBundle
    data: bytes
    scratch: ModelBundle

    @property
    def out(self) -> Path:
        """Where it goes."""
        return Path(self.config.out)

    @property
    def key(self) -> str:
        """All that the export depends on: model, labels, preprocessing, policy and lineage stand in the ONNX."""
        config = self.config
        what: dict[str, Any] = {"schema": SCHEMA, "to": config.to, "onnx_sha256": storage.sha256_bytes(self.data)}
        if config.to != "onnx":
            what["version"] = RUNTIMES[config.to].version
        if config.to == "tensorrt":
            what["for"] = config.compute_capability
        return digest_json(what)


def run(config: ExportConfig) -> dict[str, Any]:
    """Exports, or finds that there is nothing to do.

    Returns:
        ``out``, ``to``, ``is_new``, ``bytes``, ``files`` (name to SHA-256), ``model_digest``, ``parity``, for tensorrt
        ``engine`` (where it lies, its size, whether it was run), and ``checks``, one an engine.

    Raises:
        ConfigError: ``out`` holds something else, or is remote.
        ArtifactError: The bundle does not hold, or what was built answers otherwise.
        CapabilityError: The engine is not installed, or cannot be built here.
        StorageError: No space or no permission.
    """
    if "://" in config.out:
        raise ConfigError(f"the output {config.out} is a remote URI", expected="a local or shared path", fix="mount it")
    find(RUNTIMES, config.to, what="runtime")
    bundle = load_bundle(config.model)
    with _subject(config, bundle) as subject:
        said = _published(subject)
        if said is not None and config.to == "tensorrt":
            said["engine"] = _build(subject)  # the cache may have been emptied since
        if said is None:
            _refuse_occupied(subject.out)
            said = {"onnx": _to_onnx, "openvino": _to_openvino, "tensorrt": _to_tensorrt}[config.to](subject)
            said = {**said, "is_new": True}
        checks = [check.to_json() for check in _checks(subject, said)] if config.check else []
    return {"out": config.out, "to": config.to, "model_digest": bundle.model_digest, **said, "checks": checks}


@contextmanager
def _subject(config: ExportConfig, bundle: ModelBundle) -> Iterator[Subject]:
    data = bundle.read_verified(ONNX) if ONNX in bundle.files else export_bundle(bundle)
    data = seal_onnx(data, bundle, has_preprocessing=config.has_preprocessing)
    with tempfile.TemporaryDirectory(prefix="eagleray-export-") as folder:
        probes = bundle.path / PROBES if PROBES in bundle.files else prove(bundle)
        draft = replace(bundle, files={}, path=Path())
        scratch = save_bundle(Path(folder) / bundle.name, draft, {ONNX: data}, probes=probes)
        yield Subject(config, bundle, data, scratch)


def _published(subject: Subject) -> dict[str, Any] | None:
    """What was said of the same export, when it lies there whole; None when it is to be made."""
    out = subject.out
    if subject.config.to == "onnx":
        if not out.is_file() or storage.sha256_file(out) != storage.sha256_bytes(subject.data):
            return None
        return {"is_new": False, **_sizes({out.name: out}), "parity": _require(subject, "onnx").to_json()}
    try:
        manifest = storage.read_json(out / MANIFEST)
        files: Mapping[str, str] = manifest["files"]
        is_same = manifest["key"] == subject.key and {entry.name for entry in out.iterdir()} == {MANIFEST, *files}
        if is_same and all(storage.sha256_file(out / name) == digest for name, digest in files.items()):
            keep = ("bytes", "files", "parity", "engine")
            return {"is_new": False, **{name: manifest[name] for name in keep if name in manifest}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def _refuse_occupied(out: Path) -> None:
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(
            f"{out} exists and is not this very export", expected="a new path", fix="give another --out, or delete it"
        )


def _require(subject: Subject, runtime: str, *, device: str = "cpu") -> Parity:
    """The gate at export: what is to be published, on the engine that it is for."""
    find(RUNTIMES, runtime, what="runtime")
    parity = check_parity(subject.scratch, runtime, threads=subject.config.threads, device=device)
    refuse(subject.scratch, parity)
    return parity


def _sizes(files: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "bytes": sum(path.stat().st_size for path in files.values()),
        "files": {name: storage.sha256_file(path) for name, path in files.items()},
    }


def _to_onnx(subject: Subject) -> dict[str, Any]:
    parity = _require(subject, "onnx")
    out = subject.out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():  # it is empty
            out.rmdir()
    except OSError as error:
        raise storage_error(error, f"writing {out}") from error
    if not storage.publish_new(out, subject.data):
        _refuse_occupied(out)
    return {**_sizes({out.name: out}), "parity": parity.to_json()}


def _to_openvino(subject: Subject) -> dict[str, Any]:
    from eagleray.infer.runtimes.open_vino import OpenVino, write_ir

    with _aside(subject.out) as home:
        write_ir(subject.data, subject.bundle, home / "model.xml")
        has_embedding = subject.scratch.embedding_dim is not None
        runtime = OpenVino(
            subject.scratch,
            threads=subject.config.threads,
            wants_embedding=has_embedding,
            ir=home / "model.xml",
        )
        parity = check_parity(subject.scratch, runtime)
        refuse(subject.scratch, parity)
        return _publish(subject, home, {"parity": parity.to_json()})


def _to_tensorrt(subject: Subject) -> dict[str, Any]:
    """The ONNX, held to the probe set, and an engine of it in the cache; that is asked too where there is a GPU."""
    parity = _require(subject, "onnx")
    engine = _build(subject)
    if engine["is_run"]:
        parity = _require(subject, "tensorrt", device="cuda")
    with _aside(subject.out) as home:
        storage.write_new(home / ONNX, subject.data)
        return _publish(subject, home, {"parity": parity.to_json(), "engine": engine})


def _build(subject: Subject) -> dict[str, Any]:
    """Builds the engine for the GPU here, or for the compute capability that was declared."""
    from eagleray.infer.export import with_preprocessing
    from eagleray.infer.runtimes import cuda_driver, engine_cache, tensor_rt, tensor_rt_api
    from eagleray.infer.runtimes.engine_build import Target

    declared, library = subject.config.compute_capability, tensor_rt_api.load_library()
    if declared is not None:
        target = Target(declared)
    else:
        try:
            target = tensor_rt.target_of(cuda_driver.open_driver())
        except CapabilityError as error:
            raise CapabilityError(
                f"no GPU to build a TensorRT engine for: {error.seen}",
                expected="a GPU, or the compute capability of one",
                fix="add --set compute_capability=8.9 (an L4 or RTX 4090)",
            ) from None
    onnx = with_preprocessing(subject.data, subject.bundle)
    key = tensor_rt.make_key(library, onnx, target, tensor_rt.settings_of(onnx))
    built = tensor_rt.provide(library, onnx, key)
    return {
        "path": str(engine_cache.path_of(key)),
        "bytes": len(built),
        "library": f"{library.name} {library.version}",
        "for": target.gpu or f"compute capability {target.compute_capability}",
        "buckets": list(key.settings.buckets),
        "is_run": bool(target.gpu),
    }


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` to write into; it is gone afterwards unless it was published."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        home = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        home.chmod(0o755)  # mkdtemp gives 0700, and an export is as readable as any folder
    except OSError as error:
        raise storage_error(error, f"writing {out}") from error
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _publish(subject: Subject, home: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest and gives the folder its name."""
    sizes = _sizes({entry.name: entry for entry in sorted(home.iterdir())})
    manifest = {
        "schema": SCHEMA,
        "key": subject.key,
        "to": subject.config.to,
        "eagleray": __version__,
        "model_digest": subject.bundle.model_digest,
        **sizes,
        **said,
    }
    storage.write_json(home / MANIFEST, manifest)
    try:
        storage.fsync_dir(home)
        home.rename(subject.out)
        storage.fsync_dir(subject.out.parent)
    except OSError as error:
        _refuse_occupied(subject.out)
        raise storage_error(error, f"writing {subject.out}") from error
    return {**sizes, **said}


def _checks(subject: Subject, said: Mapping[str, Any]) -> Iterator[EngineCheck]:
    """Every engine that is installed here: torch on the bundle's own weights, the others on what was exported."""
    config = subject.config
    for name, entry in RUNTIMES.items():
        bundle = subject.bundle if name == "torch" else subject.scratch
        if not entry.is_installed or (name == "torch" and SAFETENSORS not in bundle.files):
            continue
        size = (bundle.path / (SAFETENSORS if name == "torch" else ONNX)).stat().st_size
        if name == "openvino" and config.to == "openvino":
            size = said["bytes"]
        device = "cuda" if name == "tensorrt" else "cpu" if name == "openvino" else config.device
        found = check_engine(bundle, name, threads=config.threads, device=device)
        yield replace(found, size_bytes=found.size_bytes or (None if name == "tensorrt" else size))
