"""Schedules go where the papers say, and nowhere after the end."""

from __future__ import annotations

import math

import pytest
import torch
from eagleray.core.tables import resolve
from eagleray.learn.selfsup import METHODS
from eagleray.learn.selfsup.configs import DINOConfig
from eagleray.learn.selfsup.schedules import cosine, linear_warmup, warmup_cosine
from eagleray.learn.task import Progress
from torch import nn


def test_cosine_is_the_papers_at_every_step() -> None:
    for step in range(101):
        expected = 1 - (1 - 0.996) * (math.cos(math.pi * step / 100) + 1) / 2  # BYOL, section 3.3
        assert cosine(step, 100, start=0.996, end=1.0) == pytest.approx(expected, abs=1e-15)


@pytest.mark.filterwarnings("error")
def test_a_step_beyond_the_last_keeps_the_last_value() -> None:
    assert cosine(100, 100, start=0.9, end=1.0) == cosine(250, 100, start=0.9, end=1.0) == 1.0
    assert linear_warmup(11, 10, start=0.04, end=0.07) == 0.07


def test_a_run_of_one_step_begins_at_the_start() -> None:
    assert cosine(0, 1, start=0.9, end=1.0) == pytest.approx(0.9)


def test_linear_warmup_is_a_line_then_flat() -> None:
    values = [linear_warmup(step, 4, start=0.04, end=0.08) for step in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.08, 0.08])
    assert linear_warmup(0, 0, start=0.04, end=0.08) == 0.08
    assert linear_warmup(1, 2, start=1.0, end=0.0) == 0.5, "it may fall as well"


def test_warmup_cosine_rises_to_the_peak_and_falls_to_the_end() -> None:
    values = [warmup_cosine(step, 20, warmup_steps=5, peak=1.0, end=0.1) for step in range(21)]
    assert values[0] == 0.0
    assert values.index(max(values)) == 5
    assert values[5:] == sorted(values[5:], reverse=True)
    assert values[-1] == pytest.approx(0.1)


def test_the_teachers_temperature_rises_as_in_the_paper() -> None:
    """30 of 300 epochs from 0.04 to 0.07, whatever the steps of an epoch."""
    config = DINOConfig(hidden_dim=8, bottleneck_dim=4, output_dim=8)
    method = resolve(METHODS, "dino", what="method")(nn.Flatten(), 12, config)
    told = [method.teacher_temperature(Progress(epoch * 5, 1500, epoch, 5)) for epoch in range(300)]
    paper = torch.cat([torch.linspace(0.04, 0.07, 31)[:30], torch.full((270,), 0.07)])
    torch.testing.assert_close(torch.tensor(told), paper)
