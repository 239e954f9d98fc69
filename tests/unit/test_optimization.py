"""Optimizers, groups and schedules against torch, timm and the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from eagleray.learn.optimization import (
    OptimizerSettings,
    layer_groups,
    lr_factor,
    make_optimizer,
    peak_lr,
    set_rates,
    split_groups,
    weight_decay_at,
)
from eagleray.learn.task import Progress
from eagleray.vision import backbones
from torch import nn


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 6, 6, generator=generator)).square().sum().backward()
        optimizer.step()
    return [one.detach().clone() for one in model.parameters()]


def made(settings: OptimizerSettings) -> list[torch.Tensor]:
    model = small()
    model(torch.zeros(2, 3, 6, 6))
    return steps(model, make_optimizer([{"params": model.parameters()}], settings, batch_size=256))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_optimizer_is_torchs_without_decay_on_norms_and_biases(name: str) -> None:
    settings = OptimizerSettings(name=name, lr=0.01, weight_decay=0.1)
    model = small()
    model(torch.zeros(2, 3, 6, 6))
    groups = [
        {"params": [one for one in model.parameters() if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in model.parameters() if one.ndim <= 1], "weight_decay": 0.0},
    ]
    oracle = (
        torch.optim.AdamW(groups, lr=0.01, fused=True)
        if name == "adamw"
        else torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    )
    for ours, torchs in zip(made(settings), steps(model, oracle), strict=True):
        assert torch.equal(ours, torchs)


def test_lars_is_the_papers_and_leaves_norms_and_biases_alone() -> None:
    """v = m v + lr * trust |w| / (|g| + wd |w|) (g + wd w); w = w - v. Source: You et al. 2017, algorithm 1."""
    settings = OptimizerSettings(name="lars", lr=0.5, weight_decay=0.01, trust_coefficient=0.02)
    model = small()
    model(torch.zeros(2, 3, 6, 6))
    generator, speed = torch.Generator().manual_seed(1), {}
    for _ in range(4):
        model.zero_grad()
        model(torch.randn(4, 3, 6, 6, generator=generator)).square().sum().backward()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                gradient = weight.grad
                if weight.ndim > 1:
                    trust = 0.02 * weight.norm() / (gradient.norm() + 0.01 * weight.norm() + 1e-8)
                    gradient = trust * (gradient + 0.01 * weight)
                speed[name] = 0.9 * speed.get(name, 0) + gradient
                weight.sub_(0.5 * speed[name])
    for ours, oracle in zip(made(settings), model.parameters(), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-5, atol=1e-6)  # norms summed in another order


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_parameter_without_a_gradient_stays(name: str) -> None:
    model = small()
    model(torch.zeros(2, 3, 6, 6))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    settings = OptimizerSettings(name=name, weight_decay=0.5)
    steps(model, make_optimizer([{"params": model.parameters()}], settings, batch_size=256))
    assert torch.equal(before, model[0].weight)


# Schedules


def test_the_schedule_warms_up_linearly_then_is_half_a_cosine() -> None:
    settings = OptimizerSettings(warmup_epochs=2, min_lr_ratio=0.1)
    factors = [lr_factor(Progress(step, 50, step // 5, 5), settings) for step in range(50)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.1)
    for step in range(10, 50):
        assert factors[step] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        oracle.step()


def test_a_run_of_one_step_learns() -> None:
    assert lr_factor(Progress(0, 1, 0, 1), OptimizerSettings(warmup_epochs=5)) == 1.0


def test_weight_decay_goes_by_half_a_cosine_where_it_ends_elsewhere() -> None:
    settings = OptimizerSettings(weight_decay=0.04, weight_decay_end=0.4)
    values = [weight_decay_at(Progress(step, 100, 0, 10), settings) for step in (0, 50, 100)]
    assert values == pytest.approx([0.04, 0.22, 0.4])
    assert weight_decay_at(Progress(50, 100, 0, 10), OptimizerSettings(weight_decay=0.3)) == 0.3


def test_the_learning_rate_is_linear_in_the_batch() -> None:
    assert peak_lr(OptimizerSettings(lr=0.1), 1024) == pytest.approx(0.4)
    assert peak_lr(OptimizerSettings(lr=0.1, base_batch=None), 1024) == 0.1


def test_rates_reach_every_group() -> None:
    weight, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    settings = OptimizerSettings(lr=0.1, weight_decay=0.5, warmup_epochs=0)
    groups = [{"params": [weight, bias]}, {"params": [nn.Parameter(torch.zeros(3, 3))], "lr_scale": 0.5}]
    optimizer = make_optimizer(groups, settings, batch_size=512)
    assert set_rates(optimizer, settings, Progress(5, 10, 0, 10), batch_size=512) == pytest.approx(0.1)
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [pytest.approx(pair) for pair in ((0.1, 0.5), (0.1, 0.0), (0.05, 0.5))]


# Groups


def test_groups_that_say_their_decay_are_left_whole() -> None:
    weight, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    split = split_groups([{"params": [weight, bias], "weight_decay": 0.0}, {"params": [weight, bias]}])
    assert [(len(group["params"]), group["has_decay"]) for group in split] == [(2, False), (1, True), (1, False)]


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_layers_decay_towards_the_input(name: str) -> None:
    model = backbones.create(backbones.Backbone(name=name, num_classes=3))
    groups = layer_groups(model, layer_decay=0.5, lr_scale=0.1)
    scale = {id(one): group["lr_scale"] for group in groups for one in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    head = [scale[id(one)] for one in model.get_classifier().parameters()]
    first = scale[id(next(model.parameters()))]
    assert head == [0.1, 0.1]
    assert first == min(scale.values()) < 0.1
    assert all(
        math.log(value / 0.1, 0.5) == pytest.approx(round(math.log(value / 0.1, 0.5))) for value in scale.values()
    )


def test_what_a_model_names_as_undecayed_is_not_decayed() -> None:
    model = backbones.create(backbones.Backbone(name="test_vit", num_classes=3))
    for decay in (None, 0.5):
        split = split_groups(layer_groups(model, layer_decay=decay))
        free = {id(one) for group in split if not group["has_decay"] for one in group["params"]}
        assert id(model.pos_embed) in free
        assert id(model.head.bias) in free
        assert id(model.head.weight) not in free
