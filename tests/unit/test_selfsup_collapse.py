"""What collapses is seen, what does not is left alone, and measures are those of their papers."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from eagleray.core.errors import TrainingDiverged
from eagleray.learn.selfsup.collapse import CollapseConfig, CollapseDetector, effective_rank, embedding_spread
from eagleray.learn.task import StepOutput
from torch.nn.functional import normalize

N, D = 64, 32


def rows(seed: int = 0, *, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) * scale


def output(embedding: torch.Tensor | None, **logs: Any) -> StepOutput:
    return StepOutput(loss=torch.zeros(()), logs=logs, embedding=embedding)


def test_effective_rank_is_that_of_the_definition() -> None:
    matrix = rows()
    singular = torch.linalg.svd(matrix.double()).S
    p = singular / singular.sum()
    assert effective_rank(matrix) == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 7, D])
def test_equal_singular_values_count_the_directions(rank: int) -> None:
    basis = torch.linalg.qr(rows()[:, :rank]).Q  # N x rank, singular values 1
    assert effective_rank(basis @ torch.eye(rank, D)) == pytest.approx(rank, rel=1e-5)


def test_effective_rank_knows_no_scale_and_survives_zeros() -> None:
    assert effective_rank(rows() * 1e-6) == pytest.approx(effective_rank(rows()), rel=1e-6)
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert math.isnan(effective_rank(torch.full((4, 3), torch.nan)))


def test_spread_is_one_on_the_sphere_and_zero_at_a_point() -> None:
    many = torch.randn(5000, D, generator=torch.Generator().manual_seed(1))
    assert float(embedding_spread(normalize(many, dim=1))) == pytest.approx(1, abs=0.01)
    assert float(embedding_spread(normalize(torch.ones(9, D), dim=1))) == pytest.approx(0, abs=1e-6)


# To both sides of the mean and far from it: what lies near it points anywhere once it has length one
LINE = torch.tensor([(-1.0) ** number * (1 + number) for number in range(N)])[:, None] * torch.ones(1, D)
LOG_K = math.log(256)
HEALTHY = {"teacher_entropy": 0.8 * LOG_K, "teacher_marginal_entropy": 0.9 * LOG_K, "teacher_student_kl": 0.1}


@pytest.mark.parametrize(
    ("embedding", "logs", "finding"),
    [
        (rows(scale=0.01) + 1, {}, "features lie close to one point"),
        (LINE + rows(scale=0.001), {}, "features lie along one line"),
        (rows(), {"projection_spread": 0.04}, "projections lie close to one point"),
        (rows(), {**HEALTHY, "teacher_marginal_entropy": 0.001}, "one output of the teacher takes all"),
        (rows(), {**HEALTHY, "teacher_entropy": LOG_K * 0.9999}, "all outputs of the teacher are alike"),
        (rows(), {**HEALTHY, "teacher_student_kl": 1e-6}, "nothing to learn"),
        (rows() * torch.nan, {}, "features"),
        (rows(), {**HEALTHY, "teacher_entropy": math.nan}, "all outputs"),
    ],
)
def test_each_collapse_is_seen(embedding: torch.Tensor, logs: dict[str, Any], finding: str) -> None:
    report = CollapseDetector(num_outputs=256).measure(output(embedding, **logs), step=0)
    assert any(finding in one for one in report.findings), report


def test_what_tells_images_apart_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    detector = CollapseDetector(CollapseConfig(action="stop", every_steps=1, grace_steps=0), num_outputs=256)
    for step in range(10):
        report = detector.observe(output(rows(step), **HEALTHY, projection_spread=torch.tensor(0.8)), step=step)
        assert report is not None
        assert report.findings == ()
    assert not caplog.records


def test_it_measures_now_and_then_and_only_what_is_there() -> None:
    detector = CollapseDetector(CollapseConfig(every_steps=10))
    assert [step for step in range(31) if detector.observe(output(rows()), step=step)] == [0, 10, 20, 30]
    assert detector.observe(output(None), step=40) is None


def test_it_warns_after_the_grace_and_stops_at_the_patience(caplog: pytest.LogCaptureFixture) -> None:
    config = CollapseConfig(action="stop", every_steps=1, grace_steps=3, patience=2)
    detector, bad = CollapseDetector(config), output(torch.ones(N, D))
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            detector.observe(bad, step=step)
        assert not caplog.records
        detector.observe(bad, step=3)
        detector.observe(output(rows()), step=4)  # a good one breaks the row
        detector.observe(bad, step=5)
        assert len(caplog.records) == 2
        with pytest.raises(TrainingDiverged, match="collapsed by step 6") as stopped:
            detector.observe(bad, step=6)
    assert stopped.value.expected
    assert stopped.value.fix


@pytest.mark.parametrize(("action", "warnings"), [("warn", 9), ("off", 0)])
def test_warn_and_off_never_stop(action: Any, warnings: int, caplog: pytest.LogCaptureFixture) -> None:
    detector = CollapseDetector(CollapseConfig(action=action, every_steps=1, grace_steps=0, patience=1))
    for step in range(9):
        detector.observe(output(torch.ones(N, D)), step=step)
    assert len(caplog.records) == warnings
