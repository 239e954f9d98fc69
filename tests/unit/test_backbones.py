"""Headless backbones: pooled features of one width, whatever the family, and a ViT at more than one size."""

from __future__ import annotations

import pytest
import torch
from eagleray.core.errors import ConfigError
from eagleray.vision.backbones import Backbone, create, create_headless, saved_args

FAMILIES = ("test_resnet", "test_efficientnet", "test_vit", "mobilenetv3_small_050")


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_pooled_at_every_size_of_a_multi_crop(name: str) -> None:
    model, width = create_headless(Backbone(name=name), size_px=64)
    with torch.inference_mode():
        assert {tuple(model(torch.zeros(2, 3, size, size)).shape) for size in (64, 32)} == {(2, width)}


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_what_the_classifier_of_the_whole_model_gets(name: str) -> None:
    model, width = create_headless(Backbone(name=name), size_px=64)
    whole = create(Backbone(name=name, num_classes=5, model_args=saved_args(model)))
    missing, unexpected = whole.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    classifier = whole.get_classifier()
    with torch.inference_mode():
        torch.testing.assert_close(whole(x), classifier(model(x)))
    assert {name.rsplit(".", 1)[-1] for name in missing} == {"weight", "bias"}
    assert classifier.in_features == width


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])  # of any size, and of one, by themselves
def test_positions_of_a_vit_are_laid_out_for_the_larger_view(name: str) -> None:
    model, width = create_headless(Backbone(name=name), size_px=64)
    assert model.pos_embed.shape[1] == (64 // 16) ** 2 + 1
    again = create(Backbone(name=name, num_classes=0, model_args=saved_args(model)))
    with torch.inference_mode():
        assert again(torch.zeros(1, 3, 32, 32)).shape == (1, width), "what is saved makes it again"


def test_an_architecture_of_one_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="one size only") as refused:
        create_headless(Backbone(name="mixer_s32_224"))
    assert "plain ViTs" in refused.value.expected


def test_an_unknown_name_gets_its_neighbours() -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        create_headless(Backbone(name="resnet19"))
