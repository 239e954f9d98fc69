"""Pruned models: as narrow as asked, remade from JSON to the bit, run by every runtime, trained on, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eagleray.core.errors import ArtifactError, CapabilityError, ConfigError
from eagleray.flows.training_outputs import save_made
from eagleray.flows.training_run import Made
from eagleray.infer.classifier import Classifier
from eagleray.infer.runtimes.torch_eager import TorchEager
from eagleray.learn import pruning
from eagleray.learn.pruning import Pruned, PruneSettings, count_macs, prune
from eagleray.learn.starting_point import begin
from eagleray.vision import backbones
from eagleray.vision.bundle import TIMM_CONFIG, ModelBundle, load_bundle, save_bundle
from eagleray.vision.images import ImageSpec
from eagleray.vision.prediction import Label
from eagleray.vision.state_dicts import to_safetensors
from eagleray.vision.widths import differences, narrow
from torch import nn

CLASSES = ("ant", "bee", "cat")
FAMILIES = ("test_resnet", "resnet18", "test_efficientnet", "tf_efficientnet_lite0", "test_vit")


def make(name: str, size_px: int = 32, seed: int = 0) -> nn.Module:
    """A model with statistics that are not those of its making, so that a norm that is lost shows."""
    torch.manual_seed(seed)
    args = backbones.size_args(name, size_px)
    model = backbones.create(backbones.Backbone(name=name, num_classes=len(CLASSES), model_args=args))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def images(size_px: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def pruned(request: pytest.FixtureRequest) -> Pruned:
    return prune(make(request.param), ratio=0.4, example_x=images(count=1))


def save(pruned: Pruned, out: Path, *, has_onnx: bool = False) -> ModelBundle:
    size_px = 32
    spec = ImageSpec(size_px, size_px, crop_pct=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    labels = tuple(Label(one, one) for one in CLASSES)
    made = Made(pruned.model, spec, labels, "logits", {"pruned": pruned.to_json()})
    return save_made(out, made, made.lineage, has_onnx=has_onnx)


# The law, over architectures


def test_about_the_asked_share_goes_in_steps_of_eight_channels(pruned: Pruned) -> None:
    model = pruned.model
    with torch.inference_mode():
        logits, embedding = backbones.logits_and_embedding(model, images())
    wide = make(backbones.architecture_of(model))
    _, whole = backbones.logits_and_embedding(wide, images())
    assert logits.shape == (2, len(CLASSES))
    assert embedding.shape == whole.shape, "the embedding stays as wide"
    assert pruned.macs_before == count_macs(wide, images(count=1))
    assert pruned.macs_after == count_macs(model, images(count=1))
    # a step of eight channels of the narrowest stages is a tenth of these tiny models
    assert 1 - pruned.macs_after / pruned.macs_before == pytest.approx(0.4, abs=0.1)
    assert pruned.params_after < 0.9 * pruned.params_before
    before = dict(wide.named_modules())
    for name, value in pruned.channels.items():
        if isinstance(before[name], nn.Conv2d | nn.Linear | nn.BatchNorm2d) and name:
            was = (before[name].weight.shape[0], value[0])
            assert was[0] == was[1] or value[0] % 8 == 0, (name, was)


def test_the_weights_that_stay_are_those_that_were(pruned: Pruned) -> None:
    wide = make(backbones.architecture_of(pruned.model)).state_dict()
    for name, value in pruned.model.state_dict().items():
        if value.ndim:
            assert np.isin(value.numpy(), wide[name].numpy()).all(), name


def test_a_saved_bundle_is_loaded_to_the_bit_and_needs_no_torch_pruning(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    bundle = load_bundle(save(pruned, tmp_path / "pruned").path)
    assert json.loads((bundle.path / "bundle.json").read_text())["model_args"]["channels"] == pruned.channels
    assert TIMM_CONFIG not in bundle.files, "timm alone cannot load it"
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    scale, bias = (torch.from_numpy(one).view(3, 1, 1) for one in bundle.image_spec.scale_and_bias)
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() * scale + bias).contiguous(
        memory_format=torch.channels_last
    )
    ours = pruned.model.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        wanted = ours(x).numpy()
    assert (TorchEager(bundle, threads=1).run(pixels).logits == wanted).all()
    start = begin(str(bundle.path), labels=CLASSES)
    assert backbones.saved_args(start.model)["channels"] == pruned.channels
    with torch.inference_mode():
        assert torch.equal(start.model.to(memory_format=torch.channels_last)(x), torch.from_numpy(wanted))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_every_runtime_says_what_torch_says(name: str, tmp_path: Path) -> None:
    bundle = save(prune(make(name), ratio=0.3, example_x=images(count=1)), tmp_path / name, has_onnx=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    said = {
        runtime: Classifier(bundle, runtime, wants_embedding=True).infer(pixels)
        for runtime in ("torch", "onnx", "openvino")
    }
    for runtime in ("onnx", "openvino"):
        np.testing.assert_allclose(said[runtime].probabilities, said["torch"].probabilities, atol=1e-4)
        np.testing.assert_allclose(said[runtime].embedding, said["torch"].embedding, atol=1e-3)


def test_a_pruned_model_is_pruned_again_and_takes_other_labels(pruned: Pruned, tmp_path: Path) -> None:
    bundle = save(pruned, tmp_path / "once")
    start = begin(str(bundle.path), labels=("a", "b", "c", "d"))
    assert start.model(images()).shape == (2, 4)
    again = backbones.create(
        backbones.Backbone(name=bundle.architecture, num_classes=4, model_args=backbones.saved_args(start.model))
    )
    again.load_state_dict(start.model.state_dict())
    twice = prune(start.model, ratio=0.2, example_x=images(count=1))
    assert twice.macs_before == count_macs(start.model, images(count=1))
    assert twice.macs_after < twice.macs_before
    assert set(twice.channels) >= {name for name in pruned.channels if name}


# What is chosen


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("test_resnet", PruneSettings(keeps_embedding=False, importance="bn_scale", scope="global")),
        ("mobilenetv3_small_050", PruneSettings(keeps_embedding=False)),  # its embedding has no batch norm
    ],
)
def test_the_embedding_is_narrowed_where_that_is_asked_for(name: str, settings: PruneSettings, tmp_path: Path) -> None:
    narrowed = prune(make(name), ratio=0.5, example_x=images(count=1), settings=settings)
    bundle = save(narrowed, tmp_path / "narrow")
    whole = backbones.embedding_width(make(name), bundle.image_spec)
    assert bundle.embedding_dim is not None
    assert bundle.embedding_dim < whole
    assert bundle.embedding_dim % 8 == 0
    other = begin(str(bundle.path), labels=("a", "b", "c", "d"))  # a new head over the narrow embedding
    assert other.model(images()).shape == (2, 4)
    saved = backbones.Backbone(name=name, num_classes=4, model_args=backbones.saved_args(other.model))
    assert backbones.create(saved)(images()).shape == (2, 4)


def test_heads_go_whole_and_keep_their_width() -> None:
    settings = PruneSettings(transformer="both")
    model = make("test_vit")
    smaller = prune(model, ratio=0.4, example_x=images(count=1), settings=settings).model
    for block, was in zip(smaller.blocks, model.blocks, strict=True):
        assert block.attn.head_dim == was.attn.head_dim
        assert 1 <= block.attn.num_heads < was.attn.num_heads
        assert block.attn.qkv.out_features == 3 * block.attn.num_heads * block.attn.head_dim
    assert smaller.pos_embed.shape == model.pos_embed.shape


def strength(model: nn.Module, importance: str) -> list[torch.Tensor]:
    """What each measure reads of the channels of one layer, the channel first: filters, norm, and the filters after."""
    block = model.layer3[0]
    weights = [block.conv1.weight, block.bn1.weight, block.bn1.bias, block.conv2.weight]
    if importance == "taylor":
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        weights = [weight.grad for weight in weights]
    weights[-1] = weights[-1].transpose(0, 1)
    return weights[1:2] if importance == "bn_scale" else weights


@pytest.mark.parametrize("importance", ["magnitude", "bn_scale", "taylor"])
def test_the_least_important_channels_go(importance: str) -> None:
    model = make("test_resnet")
    norm = model.layer3[0].bn1
    with torch.no_grad():
        for tensor in strength(model, importance):
            tensor[::2] *= 1e-4
    settings = PruneSettings(importance=importance)
    less = prune(model, ratio=0.4, example_x=images(count=1), settings=settings).model
    kept = less.layer3[0].bn1.running_mean.numpy()
    assert len(norm.running_mean) // 2 <= len(kept) < len(norm.running_mean)
    assert np.isin(norm.running_mean[1::2].numpy(), kept).all()


def test_a_layer_that_is_kept_stays_as_wide() -> None:
    kept = prune(make("resnet18"), ratio=0.3, example_x=images(count=1), keep=("layer3.0.conv1", "layer1"))
    assert kept.model.layer3[0].conv1.out_channels == 256
    assert kept.model.layer1[1].conv1.out_channels == 64
    assert kept.model.layer3[1].conv1.out_channels < 256


def test_what_is_pruned_stays_as_it_was() -> None:
    model = make("test_resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (prune(model, ratio=0.3, example_x=images(count=1)) for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state = second.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in first.model.state_dict().items())


def test_multiply_adds_are_counted_as_torch_pruning_counts_them() -> None:
    import torch_pruning

    model = make("resnet18")
    theirs, params = torch_pruning.utils.count_ops_and_params(model, images(count=1))
    assert count_macs(model, images(count=1)) == pytest.approx(theirs, rel=0.02)  # theirs has norms and biases too
    assert pruning.count_params(model) == params


# What is refused


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"ratio": 0.0}, "a ratio of 0"),
        ({"ratio": 1.0}, "a ratio of 1"),
        ({"ratio": -0.2}, "a ratio of -0.2"),
        ({"ratio": 0.3, "round_to": 0}, "round_to 0"),
        ({"ratio": 0.3, "keep": ("layer9.conv",)}, r"no layer layer9\.conv"),
        ({"ratio": 0.3, "settings": PruneSettings(importance="taylor")}, "parameters have no gradient"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(given: Mapping[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        prune(make("test_resnet"), example_x=images(count=1), **given)


def test_more_than_an_architecture_can_lose_is_refused_with_what_it_can() -> None:
    with pytest.raises(ConfigError, match=r"test_vit can lose \d+% of its multiply-adds.*90% were asked") as refused:
        prune(make("test_vit"), ratio=0.9, example_x=images(count=1))
    assert "transformer=both" in refused.value.fix
    with pytest.raises(ConfigError, match="no batch norm"):
        prune(
            make("test_vit"), ratio=0.3, example_x=images(count=1), settings=PruneSettings(importance="bn_scale")
        )  # fmt: skip
    with pytest.raises(ValueError, match="heads go by layer"):
        PruneSettings(scope="global", transformer="heads")


def test_an_architecture_that_widths_do_not_say_is_refused() -> None:
    with pytest.raises(CapabilityError, match=r"test_convnext cannot be made again from its widths.*gamma"):
        prune(make("test_convnext"), ratio=0.4, example_x=images(count=1))


def test_without_torch_pruning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
    with pytest.raises(CapabilityError, match="torch-pruning is not installed") as refused:
        prune(make("test_resnet"), ratio=0.3, example_x=images(count=1))
    assert "eagleray[prune]" in refused.value.fix


@pytest.mark.parametrize(
    ("channels", "match"),
    [
        ({"conv9": [8, 3, 1]}, r"no layer 'conv9'"),
        ({"bn1": [48, 1]}, "not 1 whole numbers"),
        ({"bn1": ["8"]}, "not 1 whole numbers"),
        ({"bn1": [True]}, "not 1 whole numbers"),
        ({"bn1": 8}, "not 1 whole numbers"),
        ({"bn1": [0]}, "not within 1"),
        ({"bn1": [1 << 40]}, "not within 1"),
        ({"layer1.0.conv1": [24, 24, 5]}, "not within 1"),
        ({"act1": [8]}, "has no widths"),
        ([8], "channels are a list"),
    ],
)
def test_widths_that_do_not_fit_are_refused(channels: Any, match: str) -> None:
    with pytest.raises(ArtifactError, match=match):
        backbones.create(backbones.Backbone(name="test_resnet", model_args={"channels": channels}))


def test_groups_that_do_not_divide_are_refused() -> None:
    model = make("test_efficientnet")
    name = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1)
    layer = model.get_submodule(name)
    with pytest.raises(ArtifactError, match="do not go in 7 groups"):
        narrow(model, {name: [8, 8, 7]})
    with pytest.raises(ArtifactError, match="do not go in 1 groups"):
        narrow(model, {name: [layer.out_channels, layer.in_channels, 1]})


def test_weights_of_other_widths_are_refused_at_load(tmp_path: Path) -> None:
    less = prune(make("test_resnet"), ratio=0.4, example_x=images(count=1))
    bundle = save(less, tmp_path / "good")
    other = make("test_resnet")
    wrong = save_bundle(
        tmp_path / "wrong",
        ModelBundle(
            architecture="test_resnet",
            labels=bundle.labels,
            image_spec=bundle.image_spec,
            model_args=bundle.model_args,
        ),
        {"model.safetensors": to_safetensors(other, "other")},
    )
    for load in (lambda: TorchEager(wrong, threads=1), lambda: begin(str(wrong.path), labels=CLASSES)):
        with pytest.raises(ArtifactError, match="does not fit the architecture"):
            load()


def test_no_difference_is_no_width() -> None:
    assert differences(make("test_vit"), make("test_vit", seed=1)) == {}
