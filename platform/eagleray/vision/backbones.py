"""timm models by name: the only file that creates them.

Example:
    >>> model = create(Backbone(name="tf_efficientnet_lite0", num_classes=6))
    >>> logits, embedding = WithEmbedding(model)(x_nchw)
"""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from eagleray.core.errors import ArtifactError, CapabilityError, ConfigError
from eagleray.vision.images import ImageSpec
from eagleray.vision.prediction import Label
from eagleray.vision.torchvision_guard import ensure_importable
from eagleray.vision.widths import CHANNELS, narrow

ensure_importable()

import timm  # noqa: E402  torchvision must be importable first
from timm.data import ImageNetInfo, infer_imagenet_subset  # noqa: E402
from timm.data.model_config import resolve_input_data_config  # noqa: E402
from timm.models import get_model_args, get_model_input_config  # noqa: E402
from timm.models._hub import save_config_for_hf  # noqa: E402  timm 1.0.31 gives it no public name

SOURCES = ("local-dir:", "hf-hub:", "hf_hub:")
REBUILT = ("num_classes", "in_chans", "pretrained_model_args")  # arguments that a bundle says elsewhere


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Which timm model to make.

    Attributes:
        name: A timm name (with or without tag), "local-dir:FOLDER" or "hf-hub:ORG/NAME".
        pretrained: Whether to load the weights that the name stands for.
        num_classes: Outputs; None keeps the name's own.
        model_args: More arguments of the architecture, e.g. img_size; ``channels``: the widths of a pruned one.
    """

    name: str
    pretrained: bool = False
    num_classes: int | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)


def is_timm_name(name: str) -> bool:
    """Whether timm knows the name: an architecture (with or without tag), or a ``local-dir:`` or ``hf-hub:`` id."""
    return name.startswith(SOURCES) or timm.is_model(name)


def nearest_names(name: str) -> list[str]:
    """Architectures of timm that are spelled much like the name."""
    import difflib

    return difflib.get_close_matches(name.split(".", maxsplit=1)[0], timm.list_models(), n=3)


def create(backbone: Backbone) -> nn.Module:
    """Makes a timm model in eval mode, on the CPU.

    Raises:
        ConfigError: timm has no such architecture, or it refuses the arguments.
        ArtifactError: The folder or repository named is not a timm model; or ``channels`` do not fit the architecture.
        CapabilityError: Pretrained weights cannot be had from here.
    """
    args = dict(backbone.model_args)
    channels = args.pop(CHANNELS, None)
    name, is_local = backbone.name, backbone.name.startswith("local-dir:")
    if not is_timm_name(name):
        near = nearest_names(name)
        raise ConfigError(
            f"timm has no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""),
            expected="a timm name, local-dir:FOLDER, hf-hub:ORG/NAME, a FILE.onnx, or lite0",
            fix="name another model",
        )
    try:
        with _offline_when_cut_off():
            model: nn.Module = timm.create_model(
                name, pretrained=backbone.pretrained, num_classes=backbone.num_classes, **args
            )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if is_local:
            raise ArtifactError(
                f"{name} is not a timm model: {reason}", expected="a folder with config.json and model.safetensors"
            ) from error
        if isinstance(error, OSError):
            raise CapabilityError(
                f"the pretrained weights of {name} cannot be fetched: no answer from the Hugging Face hub",
                expected="a network route to the hub, or the weights in its cache (HF_HOME) with HF_HUB_OFFLINE=1",
                fix="give the weights as a file: --weights FILE.safetensors, or import lite0, which comes in a package",
            ) from error
        raise ConfigError(f"timm cannot make {name}: {reason}", expected="weights and arguments that fit it") from error
    if channels is not None:
        mark_pruned(model, channels)
    return model.eval()


def mark_pruned(model: nn.Module, channels: Mapping[str, Sequence[int]]) -> None:
    """Narrows a model as timm makes it to the widths of a pruned one, which ``saved_args`` then says.

    Raises:
        ArtifactError: They do not fit the architecture.
    """
    if not isinstance(channels, Mapping):
        raise ArtifactError(f"channels are a {type(channels).__name__}", expected="layer names and their widths")
    narrow(model, channels)
    model.pruned_channels = {name: list(value) for name, value in channels.items()}  # type: ignore[assignment]


def is_pruned(model: nn.Module) -> bool:
    """Whether a model is narrower than timm makes its architecture."""
    return hasattr(model, "pruned_channels")


@contextlib.contextmanager
def _offline_when_cut_off() -> Iterator[None]:
    """Asks only the hub's cache when its host has no address here: its retries would take 47 s to fail (measured)."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    host = urlsplit(constants.ENDPOINT).hostname or ""
    try:
        if not before and not urllib.request.getproxies():
            socket.getaddrinfo(host, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def size_args(name: str, size_px: int) -> dict[str, Any]:
    """The arguments that make an architecture of fixed input size take another; none where any size will do."""
    if not is_timm_name(name) or name.startswith(SOURCES):
        return {}
    with torch.device("meta"):
        model = timm.create_model(name.split(".", maxsplit=1)[0])
    current = get_model_input_config(model)
    is_other = tuple(current["input_size"][1:]) != (size_px, size_px)
    return {"img_size": size_px} if current["fixed_input_size"] and is_other else {}


def create_headless(backbone: Backbone, *, size_px: int | None = None) -> tuple[nn.Module, int]:
    """Makes a timm model without its classifier, and says the width D of what it gives.

    It takes float32 (N, 3, H, W) to pooled features (N, D). An architecture of fixed input size, as a ViT, is made to
    take any size that its patches divide, since the views of multi-crop have two; its positions are laid out for
    ``size_px`` and resampled for others.

    Args:
        backbone: Which model; ``num_classes`` is not read.
        size_px: The side of the larger images to come; None for the model's own.

    Raises:
        ConfigError: As ``create``, or the model can take one input size only, or does not pool to one row a picture.
        ArtifactError, CapabilityError: As ``create``.
    """
    plain = replace(backbone, num_classes=0)
    model = create(plain)
    wanted = get_model_input_config(model)
    more: dict[str, Any] = {"img_size": size_px} if size_px and "img_size" in saved_args(model) else {}
    if wanted["fixed_input_size"]:
        more["dynamic_img_size"] = True
    if more:
        try:
            model = create(replace(plain, model_args={**more, **plain.model_args}))
        except ConfigError as error:
            raise ConfigError(
                f"{backbone.name} takes images of one size only: {error.seen}",
                expected="an architecture that takes any size, as the ResNets, the EfficientNets and the plain ViTs",
                fix="name another backbone",
            ) from error
    side = size_px or int(wanted["input_size"][1])
    with torch.inference_mode():
        features = model(torch.zeros(1, 3, side, side))
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise ConfigError(f"{backbone.name} does not pool to one row a picture", expected="a timm image backbone")
    return model, int(features.shape[1])


def architecture_of(model: nn.Module) -> str:
    """The timm architecture's name, without tag or source."""
    return str(model.pretrained_cfg["architecture"])  # type: ignore[index]


def pretrained_tag(model: nn.Module) -> str:
    """The tag of the weights' configuration, e.g. "in1k"; empty when there is none."""
    return str(getattr(model, "pretrained_cfg", {}).get("tag") or "")


def saved_args(model: nn.Module) -> dict[str, Any]:
    """The arguments that make the same model again, but for the number of classes and channels."""
    args = {key: value for key, value in get_model_args(model).items() if key not in REBUILT}
    return {**args, CHANNELS: model.pruned_channels} if is_pruned(model) else args


def eval_spec(model: nn.Module) -> ImageSpec:
    """The preprocessing of timm's evaluation transform for this model.

    Raises:
        ConfigError: The model takes something other than three channels.
    """
    config = resolve_input_data_config(model)
    channels, height, width = config["input_size"]
    if channels != 3:
        raise ConfigError(f"{architecture_of(model)} takes {channels} channels", expected="3 (RGB)")
    return ImageSpec(
        height=int(height),
        width=int(width),
        crop_pct=float(config["crop_pct"]),
        crop_mode=str(config.get("crop_mode") or "center"),
        interpolation=str(config["interpolation"]),
        mean=tuple(float(value) for value in config["mean"]),
        std=tuple(float(value) for value in config["std"]),
    )


def own_labels(model: nn.Module) -> tuple[Label, ...] | None:
    """The labels that come with the weights: of their configuration, or ImageNet's (id = wnid); None when unknown."""
    config = getattr(model, "pretrained_cfg", {})
    names, descriptions = config.get("label_names"), config.get("label_descriptions") or {}
    if names:
        ordered = [names[key] for key in sorted(names, key=int)] if isinstance(names, dict) else list(names)
        return tuple(Label(id=str(name), name=str(descriptions.get(name, name))) for name in ordered)
    subset = infer_imagenet_subset(model)
    return imagenet_labels(subset) if subset else None


def imagenet_labels(subset: str = "imagenet-1k") -> tuple[Label, ...]:
    """ImageNet's labels in the order of the usual models: id = wnid, name = description."""
    info = ImageNetInfo(subset)
    return tuple(Label(id=wnid, name=info.label_name_to_description(wnid)) for wnid in info.label_names())


def hub_config(model: nn.Module, spec: ImageSpec, labels: Sequence[Label]) -> dict[str, Any] | None:
    """What a bundle's config.json says, so that ``timm.create_model("local-dir:BUNDLE", pretrained=True)`` loads it.

    None of a pruned model: timm does not know its widths and would refuse the weights.
    """
    if is_pruned(model):
        return None
    data_config = {
        "input_size": (3, spec.height, spec.width),
        "mean": spec.mean,
        "std": spec.std,
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "crop_mode": spec.crop_mode,
    }
    words = {"label_names": [label.id for label in labels], "label_descriptions": {one.id: one.name for one in labels}}
    with tempfile.TemporaryDirectory(prefix="eagleray-") as folder:
        path = Path(folder) / "config.json"
        save_config_for_hf(model, str(path), model_config=words, data_config=data_config)
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


class WithEmbedding(nn.Module):  # type: ignore[misc]
    """A timm model that gives (logits (N, C), embedding (N, D)): the embedding is the input of the last layer.

    Args:
        model: A timm classifier in eval mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs float32 (N, 3, H, W)."""
        return logits_and_embedding(self.model, x)


def embedding_width(model: nn.Module, spec: ImageSpec) -> int:
    """The width D of WithEmbedding's second output, by running one gray picture.

    Raises:
        ArtifactError: The model's own forward gives other logits than its head, or not one row a picture.
    """
    x = torch.zeros(1, 3, spec.height, spec.width)
    with torch.inference_mode():
        logits, embedding = WithEmbedding(model)(x)
        direct = model(x)
    if (
        not isinstance(direct, torch.Tensor)
        or logits.shape != direct.shape
        or not torch.allclose(logits, direct, atol=1e-4)
    ):
        raise ArtifactError(
            f"{architecture_of(model)} is not a plain classifier", expected="one row of logits a picture"
        )
    return int(embedding.shape[1])


def head(model: nn.Module) -> nn.Module:
    """The last layer of a timm classifier, the one that a new set of classes replaces."""
    layer = model.get_classifier()  # type: ignore[operator]
    return nn.ModuleList(layer) if isinstance(layer, tuple) else layer


def renew_head(model: nn.Module, num_classes: int, *, seed: int) -> None:
    """Puts a new last layer with its own first weights into a timm classifier; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.reset_classifier(num_classes)  # type: ignore[operator]


def logits_and_embedding(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, C) and embedding (N, D), the input of the last layer, of float (N, 3, H, W) by a timm classifier."""
    features = model.forward_features(x)  # type: ignore[operator]
    embedding = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    classifier = model.get_classifier()  # type: ignore[operator]
    # A linear classifier is run on the embedding; other heads (distilled, convolutional) run whole, beside it.
    logits = classifier(embedding) if isinstance(classifier, nn.Linear) else model.forward_head(features)  # type: ignore[operator]
    return logits, embedding.flatten(1)
