"""Pretrain a backbone on images alone: SimCLR, BYOL or DINO, in this process or on Ray Train.

Labels, where the corpus has them, are learned from by probes only, which give no gradient back: they tell how good the
features are. The result is a bundle of the backbone with one label, ``backbone``, and a head that says nothing (weights
of zero): `score --embeddings`, `finetune --from` and ``timm.create_model("local-dir:...")`` take it at once.

Example:
    >>> run(PretrainConfig(corpus="corpora/photos", method="simclr", backbone="resnet18", out="bundles/ssl"))["step"]
    400
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from eagleray.flows.training_config import TrainingConfig, feed_settings, train_settings
from eagleray.learn.selfsup import METHODS
from eagleray.learn.selfsup.configs import BYOLConfig, DINOConfig, SimCLRConfig
from eagleray.vision.prediction import Label

if TYPE_CHECKING:
    from eagleray.flows.training_run import Made
    from eagleray.learn.selfsup.configs import MethodConfig
    from eagleray.learn.work import Work

SETTINGS: dict[str, type[MethodConfig]] = {"simclr": SimCLRConfig, "byol": BYOLConfig, "dino": DINOConfig}
LABEL = Label(id="backbone", name="no class: a backbone without a head")


class PretrainConfig(TrainingConfig):
    """What to pretrain, on what, to where.

    Attributes:
        method: A name of METHODS.
        backbone: A timm architecture.
        is_pretrained: Begin with the weights that the name stands for; else with new ones of the seed.
        settings: Of the method, see learn.selfsup.configs; e.g. ``settings.temperature``.
        on_collapse: ``warn``, ``stop`` the run, or ``off``.
        batch_size: Of the default for small machines; methods that contrast a batch with itself gain by a larger one.
    """

    method: str = "simclr"
    backbone: str = Field(min_length=1)
    is_pretrained: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)
    on_collapse: Literal["off", "warn", "stop"] = "warn"

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"no such method; one of {', '.join(METHODS)}")
        return value

    @model_validator(mode="after")
    def _fitting_settings(self) -> PretrainConfig:
        try:
            self.method_config()
        except ValidationError as error:
            faults = [f"settings.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            raise ValueError(f"{'; '.join(faults)}; keys: {', '.join(SETTINGS[self.method].model_fields)}") from None
        return self

    def method_config(self) -> MethodConfig:
        """The method's own settings."""
        return SETTINGS[self.method].model_validate({**self.settings, "name": self.method})


CONFIG = PretrainConfig


def run(config: PretrainConfig, *, is_quiet: bool = False, is_live: bool | None = None) -> dict[str, Any]:
    """Pretrains, or resumes, or finds that there is nothing to do.

    Args:
        config: The run.
        is_quiet: No progress and no notes on stderr.
        is_live: A live line (True), log lines (False), or by whether stderr is a terminal.

    Returns:
        The summary: the bundle, the run's folder, steps, the last figures.

    Raises:
        ConfigError: ``out`` holds something else, an unknown backbone, a checkpoint of another config.
        DataError: Too few images, or a leak.
        ArtifactError: The corpus or every checkpoint does not hold.
        CapabilityError: A package, weights or memory that are not there.
        TrainingDiverged: The loss is not finite, or the representation collapsed and that ends the run.
        ClusterError, StorageError: As they say; the same command resumes.
    """
    from eagleray.flows.train import run_training

    return run_training("eagleray.flows.pretrain", config, is_quiet=is_quiet, is_live=is_live)


def make_work(config: PretrainConfig) -> Work:
    """The run before its first step."""
    from eagleray.core.tables import resolve
    from eagleray.flows.training_data import choose, counts_in_words
    from eagleray.learn.pretraining import PretrainingWatch
    from eagleray.learn.selfsup.collapse import CollapseConfig
    from eagleray.learn.selfsup.views import ViewTransform
    from eagleray.learn.work import Work

    chosen = choose(config)
    backbone, width, size_px = make_backbone(config)
    method_config = config.method_config()
    method = _seeded(
        config.seed, lambda: resolve(METHODS, config.method, what="method")(backbone, width, method_config)
    )
    plan = method.plan(size_px).model_copy(update={"seed": config.seed})
    watch = PretrainingWatch(
        plan,
        width=width,
        num_classes=len(chosen.index.labels),
        collapse=CollapseConfig(action=config.on_collapse),
        num_outputs=getattr(method_config, "output_dim", None) if config.method == "dino" else None,
    )
    return Work(
        task=method,
        index=chosen.index,
        transform=ViewTransform(plan),
        feed=feed_settings(config, keeps_last=False),
        settings=train_settings(config),
        key={**config.key_fields(), "kind": "pretrain", "size_px": size_px, "images": chosen.index.digest},
        watch=watch,
        notes=(counts_in_words(chosen), *chosen.notes),
    )


def make_backbone(config: PretrainConfig) -> tuple[Any, int, int]:
    """The headless backbone, its width, and the side of the larger views.

    Raises:
        ConfigError: No such architecture; the nearest names are given.
    """
    from eagleray.vision import backbones

    which = backbones.Backbone(name=config.backbone, pretrained=config.is_pretrained)
    size_px = config.size_px
    backbone, width = _seeded(config.seed, lambda: backbones.create_headless(which, size_px=size_px))
    return backbone, width, size_px or backbones.eval_spec(backbone).height


def make_bundle(config: PretrainConfig, state: Mapping[str, Any]) -> Made:
    """What the trained weights become.

    Args:
        config: The run's.
        state: State dict of the task.
    """
    import dataclasses

    import torch

    from eagleray.flows.training_data import choose
    from eagleray.flows.training_run import Made
    from eagleray.learn.selfsup.views import IMAGENET_MEAN, IMAGENET_STD
    from eagleray.vision import backbones

    model, _, size_px = make_backbone(config)
    prefix = "backbone."
    model.load_state_dict({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})
    backbones.renew_head(model, 1, seed=config.seed)
    with torch.no_grad():
        for parameter in backbones.head(model).parameters():
            parameter.zero_()
    spec = dataclasses.replace(
        backbones.eval_spec(model), height=size_px, width=size_px, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    lineage = {
        "kind": "pretrained backbone",
        "method": config.method_config().model_dump(mode="json"),
        "head": "none: weights of zero under the label 'backbone'",
        "parent": {"source": f"timm:{config.backbone}", "is_pretrained": config.is_pretrained},
        "pretrained_on": choose(config).trained_on(),
    }
    return Made(model.eval(), spec, (LABEL,), "logits", lineage)


def _seeded(seed: int, make: Any) -> Any:
    """What ``make`` gives when torch's generator begins with a seed; the generator stays as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
