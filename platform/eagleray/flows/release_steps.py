"""The steps of a release: each makes a bundle of a bundle, in a folder of its own, and knows no gate.

STEPS is a table from name to callable. A step may be stopped and called again: what it finds whole it uses.

Example:
    >>> STEPS["prune"](Ask(config, step, home), bundle).path
    PosixPath('bundles/trash-fast.run/1-prune/bundle')
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray.core.config import load
from eagleray.core.errors import ArtifactError, CapabilityError, ConfigError
from eagleray.core.tables import find, resolve
from eagleray.flows.release_images import draw
from eagleray.flows.release_plan import ReleaseConfig, Step
from eagleray.infer.runtimes import RUNTIMES
from eagleray.infer.runtimes.measure import candidates
from eagleray.vision.bundle import (
    FOREIGN,
    HEAD,
    ONNX,
    PROBES,
    SAFETENSORS,
    TIMM_CONFIG,
    ModelBundle,
    load_bundle,
    save_bundle,
)

if TYPE_CHECKING:
    from eagleray.flows.finetune import FinetuneConfig

BUNDLE = "bundle"


@dataclass(frozen=True)
class Ask:
    """What a step is told.

    Attributes:
        config: The release's.
        step: Itself.
        home: Its folder.
        is_quiet: No progress on stderr.
    """

    config: ReleaseConfig
    step: Step
    home: Path
    is_quiet: bool = False


def distill(ask: Ask, bundle: ModelBundle) -> ModelBundle:
    """A student that learns from the bundle and from the labels."""
    source = str(ask.config.distill_to)
    wanted = {"teacher": str(bundle.path), **ask.step.settings["student"]}
    return _trained(ask, source, wanted)


def prune(ask: Ask, bundle: ModelBundle) -> ModelBundle:
    """The bundle with fewer channels, trained again with the unpruned one as its teacher."""
    narrow = ask.home / "pruned"
    if not (narrow / HEAD).is_file():
        _prune_into(narrow, ask, bundle)
    wanted = {"teacher": str(bundle.path), "head": "keep", **ask.step.settings["recovery"]}
    return _trained(ask, str(narrow), wanted)


def quantize(ask: Ask, bundle: ModelBundle) -> ModelBundle:
    """The bundle in INT8: one Q/DQ graph, calibrated on training images, sensitive layers left in float."""
    from eagleray.infer.quantization import QuantizationSettings
    from eagleray.infer.quantization import quantize as quantized

    config = ask.config
    engine = config.target or _engine(bundle, config.device)
    # uint8 fuses with the ReLU before it: 2.3 times FP32 in ONNX Runtime, where int8 takes 2.6 times as long as FP32
    # (docs/log.md); TensorRT refuses a zero point that is not 0
    own = {
        "max_drop_points": config.max_drop_points,
        "max_images": config.calibration_images,
        "activations": "int8" if engine == "tensorrt" else "uint8",
    }
    settings = load(QuantizationSettings, overrides={**own, "threads": config.threads, **config.quantization})
    pictures = draw(config, bundle.image_spec, config.calibration_images, needs_labels=bundle.label_ids)

    def accuracy(data: bytes) -> float:
        with tempfile.TemporaryDirectory(prefix="eagleray-quantize-") as folder:
            draft = _draft(bundle, precision="int8")
            trial = save_bundle(Path(folder) / "trial", draft, {ONNX: data})
            kind = resolve(RUNTIMES, engine, what="runtime")  # not Classifier: a candidate has no probe set to answer
            return pictures.accuracy(kind(trial, threads=config.threads, device=config.device), bundle.label_ids)

    found = quantized(bundle, pictures.batches(config.batch_size), settings=settings, evaluate=accuracy)
    told = {"calibration": pictures.to_json(), "table": _plain(found.table), "engine": engine}
    return _saved(ask, bundle, found.data, "int8", told)


def fp16(ask: Ask, bundle: ModelBundle) -> ModelBundle:
    """The bundle in FP16: typed in its graph, softmax and layer norm in FP32."""
    from eagleray.infer.quantization import to_fp16

    return _saved(ask, bundle, to_fp16(bundle), "fp16", {})


def target(ask: Ask, bundle: ModelBundle) -> ModelBundle:
    """The bundle as it is, after the engine that it is made for has compiled it and answered its probe set."""
    from eagleray.infer.parity import check_parity, refuse

    engine = str(ask.config.target)
    refuse(bundle, check_parity(bundle, engine, threads=ask.config.threads, device=ask.config.device))
    return bundle


STEPS: Mapping[str, Callable[[Ask, ModelBundle], ModelBundle]] = {
    "distill": distill,
    "prune": prune,
    "quantize": quantize,
    "fp16": fp16,
    "target": target,
}


def check(config: ReleaseConfig, bundle: ModelBundle, asked: list[Step]) -> None:
    """Refuses what cannot be done, before an hour is spent on what comes before it.

    Raises:
        ConfigError: The parent has no weights to train, or a training's keys are wrong.
        CapabilityError: The engine that is asked for is not here.
    """
    names = {step.name for step in asked}
    is_trainable = bundle.architecture != FOREIGN and SAFETENSORS in bundle.files
    if names & {"distill", "prune"} and not is_trainable:
        raise ConfigError(
            f"{config.model} has no weights that can be trained (an imported ONNX, or a quantized bundle)",
            expected="a bundle of a timm architecture with model.safetensors",
            fix="release its parent, or leave --distill-to and --prune out",
        )
    for step in asked:
        for key in ("student", "recovery"):
            if key in step.settings:
                wanted = dict(step.settings[key])
                _training(config, str(bundle.path), "out", "run", {"teacher": str(bundle.path), **wanted})
    if config.target is not None and config.target not in candidates(bundle, config.device):
        find(RUNTIMES, config.target, what="runtime")
        raise CapabilityError(
            f"{config.target} does not run {bundle.name} on {config.device} here",
            expected=f"one of {', '.join(candidates(bundle, config.device)) or 'none'}",
            fix="run the release on a machine that it is for (num_gpus=1 for a GPU), or name another target",
        )


def _prune_into(path: Path, ask: Ask, bundle: ModelBundle) -> None:
    from eagleray.flows.prune import PruneConfig, run

    config, same = ask.config, {"seed": ask.config.seed, "splits": ask.config.splits.model_dump()}
    own = {"model": str(bundle.path), "out": str(path), "ratio": ask.step.settings["ratio"], "corpus": config.corpus}
    run(load(PruneConfig, overrides={**own, **same, "split": config.train_split, **config.pruning}))


def _trained(ask: Ask, source: str, wanted: Mapping[str, Any]) -> ModelBundle:
    from eagleray.flows.finetune import run

    asked = _training(ask.config, source, str(ask.home / BUNDLE), str(ask.home / "training"), wanted)
    run(asked, is_quiet=ask.is_quiet)
    return load_bundle(ask.home / BUNDLE)


def _training(config: ReleaseConfig, source: str, out: str, run_dir: str, wanted: Mapping[str, Any]) -> FinetuneConfig:
    """The fine-tuning's config: the release's own data and place, and what is wanted besides."""
    from eagleray.flows.finetune import FinetuneConfig

    same = {name: getattr(config, name) for name in ("corpus", "seed", "address", "num_cpus", "num_gpus")}
    own: dict[str, Any] = {"parent": source, "out": out, "run_dir": run_dir, "split": config.train_split, "judge": ""}
    own |= {"splits": config.splits.model_dump(), "workers": config.workers, "runtime": config.runtime}
    return load(FinetuneConfig, overrides={**same, **own, **wanted})


def _saved(ask: Ask, bundle: ModelBundle, data: bytes, precision: str, told: Mapping[str, Any]) -> ModelBundle:
    """A bundle of one graph, held to the probe set of the FP32 model and stating how far from it it was seen to be."""
    from eagleray.infer.parity import check_parity, prove, stated

    probes: bytes | Path = bundle.path / PROBES if PROBES in bundle.files else prove(bundle)
    draft = _draft(bundle, precision=precision, lineage=_lineage(ask, bundle, told))
    with tempfile.TemporaryDirectory(prefix="eagleray-release-") as folder:
        trial = save_bundle(Path(folder) / "trial", draft, {ONNX: data}, probes=probes)
        engines = candidates(trial, ask.config.device)
        seen = [check_parity(trial, name, threads=1, device=ask.config.device) for name in engines]
    tolerance = _widest([stated(parity) for parity in seen])
    lineage = {**draft.lineage, "tolerance": tolerance}
    return save_bundle(ask.home / BUNDLE, replace(draft, lineage=lineage), {ONNX: data}, probes=probes)


def _widest(tolerances: list[dict[str, float]]) -> dict[str, float]:
    """What every engine here needs."""
    if not tolerances:
        raise ArtifactError("no engine here runs the new graph", expected="onnx or openvino", fix="install one of them")
    widest = {"max": max, "min": min}  # as each name begins
    return {name: widest[name[:3]](one[name] for one in tolerances) for name in tolerances[0]}


def _draft(bundle: ModelBundle, *, precision: str, lineage: Mapping[str, Any] | None = None) -> ModelBundle:
    """A bundle to be, of the same labels and preprocessing; its thresholds were found for other probabilities."""
    changes: dict[str, Any] = {"precision": precision, "policy": None, "files": {}, "path": Path()}
    return replace(bundle, **changes, lineage=dict(bundle.lineage if lineage is None else lineage))


def _lineage(ask: Ask, bundle: ModelBundle, told: Mapping[str, Any]) -> dict[str, Any]:
    """What it was made of and how; what the parent was trained on stays known, for no judge may use it."""
    kept = {name: bundle.lineage[name] for name in ("trained_on", "class_counts") if name in bundle.lineage}
    parent = {"bundle": str(bundle.path), "model_digest": bundle.model_digest}
    return {"kind": "classifier", "step": ask.step.name, "parent": parent, **kept, **told}


def publish(config: ReleaseConfig, bundle: ModelBundle, lineage: Mapping[str, Any]) -> ModelBundle:
    """The last step's bundle at ``out``, file by file, with the lineage of the whole release.

    Raises:
        ConfigError: The folder holds something else.
        StorageError: It cannot be written.
    """
    import json

    weights: dict[str, bytes | Path] = {
        name: bundle.path / name for name in bundle.files if name not in (PROBES, TIMM_CONFIG)
    }
    timm_config = json.loads(bundle.read_verified(TIMM_CONFIG)) if TIMM_CONFIG in bundle.files else None
    probes = bundle.path / PROBES if PROBES in bundle.files else None
    draft = replace(bundle, lineage={**bundle.lineage, **lineage}, files={}, path=Path())
    return save_bundle(config.out, draft, weights, timm_config=timm_config, probes=probes)


def _engine(bundle: ModelBundle, device: str) -> str:
    """The engine that INT8 is for where none is named: OpenVINO where it is, for it needs no VNNI to be faster."""
    able = candidates(bundle, device)
    found = next((name for name in ("openvino", "onnx", "tensorrt") if name in able), None)
    if found is None:
        raise CapabilityError(
            f"no engine here runs 8 bits on {device}", expected="openvino, onnx or tensorrt", fix="install one of them"
        )
    return found


def _plain(table: Any) -> Any:
    """A table as JSON values."""
    if hasattr(table, "to_json"):
        return table.to_json()
    return [_plain(row) for row in table] if isinstance(table, list | tuple) else table
