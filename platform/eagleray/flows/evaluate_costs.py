"""What scoring a million images with the evaluated model would cost, from the seconds that its scoring run took.

Example:
    >>> costs(subject)["lite0"][0].hours_per_million
    1.94...
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eagleray.assure.cost import Cost, Work, price
from eagleray.assure.cost_report import cost_blocks
from eagleray.assure.report import Block
from eagleray.flows import hardware
from eagleray.flows.evaluate_subject import COMPARED, SCORING, names_of
from eagleray.flows.profiles import node_shapes
from eagleray.flows.score_outputs import read_run

if TYPE_CHECKING:
    from eagleray.flows.evaluate import Judged
    from eagleray.flows.evaluate_subject import Subject


def costs(subject: Subject) -> dict[str, list[Cost]]:
    """The cost on each kind of node of the model, and of the one that it is compared with, by name.

    Raises:
        ConfigError: As ``node_shapes`` says.
    """
    if subject.other is None:
        places = {subject.bundle.name: SCORING}
    else:
        places = dict(zip(names_of(subject.bundle, subject.other), (SCORING, COMPARED), strict=True))
    shapes = node_shapes()
    works = {name: work_of(read_run(subject.root / place) or {}) for name, place in places.items()}
    return {name: [price(work, shape) for shape in shapes] for name, work in works.items()}


def work_of(run: Mapping[str, Any]) -> Work:
    """What an image took in a scoring run: CPU seconds of its workers; on GPUs, the seconds that one was held too.

    Args:
        run: Its run.json.
    """
    images = run.get("inferred") or 0
    if not images:
        return Work(0.0)
    is_gpu = run.get("runtime", {}).get("device") == "cuda"
    held = sum(float(worker["seconds"]) for worker in run.get("workers", ())) if is_gpu else 0.0
    return Work(
        core_s_per_image=float(run.get("cpu_s") or 0.0) / images,
        gpu_s_per_image=held / images,
        gpu=hardware.gpu_name() if is_gpu else "",
        processor=platform.machine(),
    )


def blocks(subject: Subject, judged: Judged, found: Mapping[str, Sequence[Cost]]) -> list[Block]:
    """The page's blocks; of two models, those meet the KPI that are not really worse than the other."""
    meets, kpi = list(found), ""
    if judged.comparison is not None and len(found) > 1:
        kpi = "not really worse than the other"
        figure = judged.comparison.differences[judged.comparison.lead]
        if judged.comparison.is_real:
            meets = [judged.comparison.names[int((figure.value or 0.0) > 0)]]
    n = sum(int((read_run(subject.root / place) or {}).get("inferred") or 0) for place in (SCORING, COMPARED))
    what = f"the CPU seconds that scoring took here on {n:,} images (decoding, model, writing; starting up left out)"
    return list(cost_blocks(found, meets=meets, kpi=kpi, what=what))
