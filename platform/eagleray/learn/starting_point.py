"""Where fine-tuning starts: a bundle of ours or a timm name, with a head for the labels at hand.

The head is kept when the bundle has the very same labels, its rows in the order asked for; else it is new, and what was
unknown is said.

Example:
    >>> start = begin("models/lite0", labels=index.labels, seed=0)
    >>> start.notes
    ('a new head: lite0 does not know 6 labels (cardboard, glass, metal, paper, plastic, ...)',)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eagleray.core.errors import ConfigError
from eagleray.vision import backbones, imports
from eagleray.vision.bundle import FOREIGN, HEAD, SAFETENSORS, ModelBundle, load_bundle
from eagleray.vision.images import ImageSpec
from eagleray.vision.prediction import Label
from eagleray.vision.state_dicts import fill, read_state_dict

SHOWN = 5


@dataclass(frozen=True)
class StartingPoint:
    """A model before its first step.

    Attributes:
        model: A timm classifier with an output for each label, on the CPU.
        spec: How pixels become its input.
        labels: In the order of its outputs.
        parent: For the lineage: where the weights came from.
        notes: What a person should know, one line each.
    """

    model: nn.Module
    spec: ImageSpec
    labels: tuple[Label, ...]
    parent: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def begin(
    source: str, *, labels: Sequence[str], size_px: int | None = None, is_pretrained: bool = True, seed: int = 0
) -> StartingPoint:
    """Makes the model that a run starts from.

    Args:
        source: A bundle's folder, a timm name, ``lite0``, ``local-dir:FOLDER`` or ``hf-hub:ORG/NAME``.
        labels: Label ids, in the order of the outputs.
        size_px: Side of the input; None: that of the bundle or of the name.
        is_pretrained: Whether a name's weights are loaded; else they are drawn from the seed.
        seed: Of new weights.

    Raises:
        ConfigError: No such model; the nearest names are given. Or a bundle that is a foreign ONNX graph.
        ArtifactError: The bundle does not hold.
        CapabilityError: Weights that cannot be had from here.
    """
    if (Path(source) / HEAD).is_file() or (Path(source).is_dir() and not backbones.is_timm_name(source)):
        return _from_bundle(load_bundle(source), labels, size_px, seed)
    return _from_name(source, labels, size_px, is_pretrained=is_pretrained, seed=seed)


def load_model(bundle: ModelBundle, *, size_px: int | None = None) -> nn.Module:
    """The model of a bundle with its weights, on the CPU, in eval mode.

    Args:
        bundle: Of a timm architecture, pruned or not.
        size_px: Side of the input; None: the bundle's.

    Raises:
        ConfigError: The bundle is a foreign ONNX graph.
        ArtifactError: Its weights do not fit its architecture.
    """
    if bundle.architecture == FOREIGN or SAFETENSORS not in bundle.files:
        raise ConfigError(
            f"{bundle.path} was imported from an ONNX file, or quantized: it has no weights that torch runs",
            expected="a bundle of a timm architecture",
            fix="import the model by its timm name and its state dict: eagleray import NAME --weights FILE",
        )
    sized = {} if size_px is None else backbones.size_args(bundle.architecture, size_px)
    args = {**bundle.model_args, **sized}
    model = backbones.create(
        backbones.Backbone(name=bundle.architecture, num_classes=len(bundle.labels), model_args=args)
    )
    fill(model, read_state_dict(bundle.read_verified(SAFETENSORS), SAFETENSORS), str(bundle.path))
    return model


def _from_bundle(bundle: ModelBundle, labels: Sequence[str], size_px: int | None, seed: int) -> StartingPoint:
    model = load_model(bundle, size_px=size_px)
    known = {label.id: label for label in bundle.labels}
    note = _fit_head(model, bundle.label_ids, labels, bundle.name, seed)
    spec = bundle.image_spec if size_px is None else replace(bundle.image_spec, height=size_px, width=size_px)
    parent = {"bundle": bundle.name, "model_digest": bundle.model_digest, "lineage": dict(bundle.lineage)}
    return StartingPoint(model, spec, tuple(known.get(one, Label(one, one)) for one in labels), parent, (note,))


def _fit_head(model: nn.Module, known: Sequence[str], labels: Sequence[str], name: str, seed: int) -> str:
    """Keeps the head with its rows in the order of ``labels``, or makes a new one; what was done, in words."""
    layer = backbones.head(model)
    if set(known) == set(labels) and isinstance(layer, nn.Linear):
        rows = [list(known).index(one) for one in labels]
        with torch.no_grad():
            layer.weight.copy_(layer.weight[rows])
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[rows])
        return f"the head of {name} is kept: it has the same {len(rows)} labels"
    backbones.renew_head(model, len(labels), seed=seed)
    unknown = [one for one in labels if one not in set(known)]
    if not unknown:
        return f"a new head: {name} has {len(known)} labels, {len(labels)} of them are trained"
    shown = ", ".join(unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
    return f"a new head: {name} does not know {len(unknown)} label{'s' * (len(unknown) > 1)} ({shown})"


def _from_name(
    name: str, labels: Sequence[str], size_px: int | None, *, is_pretrained: bool, seed: int
) -> StartingPoint:
    known: tuple[Label, ...] = ()
    if is_pretrained:
        config = imports.ImportConfig(model=name, out="nowhere", size=size_px)  # nothing is saved
        model, source, digest, own = imports.make_model(config, None)
        known, parent = own or (), {"source": source, "source_sha256": digest}
        note = f"the weights of {source}, a new head for {len(labels)} labels"
    else:
        architecture = imports.LITE0_ARCHITECTURE if name == imports.LITE0 else name
        args = {} if size_px is None else backbones.size_args(architecture, size_px)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = backbones.create(backbones.Backbone(name=architecture, model_args=args))
        parent = {"source": f"timm:{backbones.architecture_of(model)}", "weights": f"random, seed {seed}"}
        note = f"{architecture} with random weights of seed {seed}"
    spec = backbones.eval_spec(model)
    if size_px is not None:
        spec = replace(spec, height=size_px, width=size_px)
    backbones.renew_head(model, len(labels), seed=seed)
    names = {label.id: label for label in known}
    return StartingPoint(model, spec, tuple(names.get(one, Label(one, one)) for one in labels), parent, (note,))
